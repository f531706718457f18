"""A command line from a dataclass, and one line with an exit status for every expected error.

A command declares its flags as the fields of a frozen dataclass, each made by flag(), and ends with
run(main, Config, __doc__). Exit status 2 means a wrong call, 1 a failure, 128 + n a signal n.
"""

import argparse
import math
import pathlib
import shlex
import signal
import sys
import types
import typing
from dataclasses import MISSING, field, fields

from support import workers
from support.errors import Failure, UsageError, out_of_memory, printable
from support.progress import note

# --- Flags ---------------------------------------------------------------------------------------


def flag(default, help, **about):
    """Declare a flag as a field of a dataclass. The annotation is its final type.

    default: MISSING for a required flag. A list annotation collects repeated flags; every other
    flag may be given once. about: type, a function that parses the text and raises UsageError (by
    default the annotation itself); low and high, inclusive limits; choices; metavar; group, which
    opens a section of --help; alias, an older name.
    """
    return field(default=default, metadata=dict(about, help=help))


def flag_name(name):
    """Return "--batch-size" for the setting "batch_size"."""
    return "--" + name.replace("_", "-")


def typed(path):
    """Quote a path for a shell, in the form in which it can follow a flag."""
    return shlex.quote(f"./{path}" if path.startswith("-") else path)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message} (--help lists the flags)")


class Once(argparse.Action):
    """Store a value; reject a flag that is given twice, because one of the two would be ignored."""

    def __call__(self, parser, namespace, value, option=None):
        if hasattr(namespace, self.dest):
            raise UsageError(f"{option}: given twice; give it once")
        setattr(namespace, self.dest, value)


def parse_flags(config, description, argv):
    """Return argv as an instance of `config`, and the set of names of the flags that were given."""
    how = dict(description=description, argument_default=argparse.SUPPRESS)
    parser = Parser(formatter_class=argparse.RawDescriptionHelpFormatter, **how)
    section = parser
    for f in fields(config):
        about = f.metadata
        if "group" in about:
            section = parser.add_argument_group(about["group"])
        names = [flag_name(f.name)] + ([about["alias"]] if "alias" in about else [])
        section.add_argument(*names, dest=f.name, **argument(f.type, f.default, about))
    given = vars(parser.parse_args(argv))
    return config(**given), set(given)


def argument(kind, default, about):
    """Return the arguments of add_argument for a field: its annotation, default and metadata."""
    text = about["help"].replace("%", "%%")
    if default not in (None, MISSING) and default is not False:
        text += f" (default: {default})"
    if isinstance(kind, types.UnionType):  # int | None
        kind = typing.get_args(kind)[0]
    if kind is bool and "type" not in about:
        return dict(action="store_true", help=text)
    several = typing.get_origin(kind) is list
    if several:
        kind = typing.get_args(kind)[0]
    metavar = None if "choices" in about else {int: "N", float: "X"}.get(kind)
    return dict(
        action="append" if several else Once,
        type=value_parser(about.get("type", kind), about.get("low"), about.get("high")),
        help=text,
        required=default is MISSING,
        choices=about.get("choices"),
        metavar=about.get("metavar", metavar),
    )


def value_parser(kind, low, high):
    """Return a function from a flag's text to its value, which is in range."""

    def parse(text):
        if not text.strip():
            raise argparse.ArgumentTypeError("must not be empty")
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if kind is int and value > 10**9:
            raise argparse.ArgumentTypeError(f"{text} is too large")
        if (low is not None and value < low) or (high is not None and value > high):
            span = f"at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text}: must be {span}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}.get(kind, "text")
    return parse


# --- Errors and signals --------------------------------------------------------------------------


def run(main, config, description):
    """Call main(settings, names of the flags given). An expected error becomes one line and a status."""
    on_ending_signals(interrupt)
    status = 1
    try:
        main(*parse_flags(config, description, sys.argv[1:]))
        return
    except (UsageError, Failure) as error:
        status = error.status
        message = error
    except KeyboardInterrupt as error:
        status = 128 + (error.args[0] if error.args else signal.SIGINT)
        message = "interrupted"
    except OSError as error:
        message = f"{error.filename}: {error.strerror or error}" if error.filename else error
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            message = "out of memory; try a smaller --batch-size, or a smaller network or images"
        elif "gloo" in str(error) or "NCCL" in str(error):
            message = f"another process of this run has ended: {str(error).splitlines()[0]}"
        else:
            raise
    line = f"{pathlib.Path(sys.argv[0]).name}: error: {printable(message)}"
    # A wrong call is wrong in every process of a torchrun, and the first one reports it.
    if status == 2 or workers.is_first():
        note(line)
    else:
        print(line, file=sys.stderr)
    sys.exit(status)


def on_ending_signals(handler):
    """Set the handler of Ctrl-C, kill, a closed terminal and a cluster's warning, where they exist.

    A signal that the parent ignores stays ignored, as SIGHUP under nohup.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        number = getattr(signal, name, None)
        if number and (name == "SIGINT" or signal.getsignal(number) != signal.SIG_IGN):
            signal.signal(number, handler)


def interrupt(number, frame):
    """End the command as Ctrl-C does: `finally` blocks run, and the status is 128 + number."""
    raise KeyboardInterrupt(number)

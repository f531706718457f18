"""A command line from a dataclass, and every expected error as one line with an exit status.

A command declares its flags as the fields of a frozen dataclass, each made by flag(), and ends with
run(main, Config, __doc__). Exit status 2 is a wrong call, 1 a failure, 130 an interruption.
"""

import argparse
import difflib
import math
import os
import pathlib
import shlex
import signal
import sys
import time
import types
import typing
from dataclasses import MISSING, field, fields

from support.errors import Failure, UsageError, out_of_memory, printable
from support.progress import note, silence

# --- Flags ---------------------------------------------------------------------------------------


def flag(default, text, *, group=None, metavar=None, choices=None, low=None, high=None):
    """A field of a command's dataclass: its default (MISSING: it must be given), its help text, the
    values that it takes; `group` opens a section of --help, which goes on to the next one."""
    about = dict(text=text, group=group, metavar=metavar, choices=choices, low=low, high=high)
    return field(metadata=about) if default is MISSING else field(default=default, metadata=about)


def flag_name(name):
    return "--" + name.replace("_", "-")


def typed(path):
    """A path as a shell takes it after a flag."""
    return shlex.quote(f"./{path}" if path.startswith("-") else path)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message} (--help lists the flags)")


METAVARS = {int: "N", float: "X", str: "NAME"}


def parser_of(config, description):
    """The argparse parser of a dataclass of flags."""
    parser = Parser(
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    section = parser
    for f in fields(config):
        kind = typing.get_args(f.type)[0] if isinstance(f.type, types.UnionType) else f.type
        about = f.metadata
        if about["group"]:
            section = parser.add_argument_group(about["group"])
        text = about["text"].replace("%", "%%")
        if not any(f.default is nothing for nothing in (None, MISSING, False)):
            text += f" (default: {f.default})"
        if kind is bool:
            section.add_argument(flag_name(f.name), dest=f.name, action="store_true", help=text)
        else:
            section.add_argument(
                flag_name(f.name),
                dest=f.name,
                type=checked(kind, about),
                help=text,
                required=f.default is MISSING,
                choices=about["choices"],
                metavar=None if about["choices"] else about["metavar"] or METAVARS[kind],
            )
    return parser


def parse_flags(config, description, argv):
    """argv as an instance of `config`, and the names of the flags that were given."""
    known, unknown = parser_of(config, description).parse_known_args(argv)
    if unknown:
        names = [flag_name(f.name) for f in fields(config)]
        near = difflib.get_close_matches(unknown[0].split("=")[0], names, 1, 0.7)
        hint = f"; did you mean {near[0]}?" if near else " (--help lists the flags)"
        raise UsageError(f"unknown argument {unknown[0]}{hint}")
    for name, value in vars(known).items():
        if value == []:  # what argparse makes of "--out=--"
            raise UsageError(f"{flag_name(name)}: expected one argument (--help lists the flags)")
    return config(**vars(known)), set(vars(known))


def checked(kind, about):
    """An argparse type: text -> kind, inside [low, high]."""
    low, high = about["low"], about["high"]

    def parse(text):
        value = kind(text)
        if kind is str and not text.strip():
            raise argparse.ArgumentTypeError("must not be empty")
        if (kind is int and abs(value) > 2**31) or (kind is float and not math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is impossible")
        if not inside(value, low, high):
            span = f"at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is impossible; it must be {span}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}.get(kind, kind.__name__)
    return parse


def inside(value, low, high):
    """Whether low <= value <= high, where None is no limit."""
    return (low is None or value >= low) and (high is None or value <= high)


def restored(config, values):
    """The settings that an earlier run saved, those that `config` knows, each as a flag could set it.

    Raises ValueError for a value that no flag could have.
    """
    known = {f.name: values[f.name] for f in fields(config) if f.name in values}
    for f in fields(config):
        about, value = f.metadata, known.get(f.name)
        typed = f.name not in known or isinstance(value, f.type)
        typed = typed and (not isinstance(value, (int, float)) or abs(value) <= 2**31)
        typed = typed and (not isinstance(value, str) or (os.fsencode(value) and "\0" not in value))
        chosen = value is None or about["choices"] is None or value in about["choices"]
        if not (typed and chosen and (value is None or inside(value, about["low"], about["high"]))):
            raise ValueError(f.name)
    return known


# --- Errors --------------------------------------------------------------------------------------


def run(main, config, description):
    """main(flags, names of the flags given); an expected error becomes one line and an exit status."""
    open_streams()
    on_ending_signals(interrupter())
    try:
        if os.name != "posix":
            raise Failure("runs on Linux and macOS only")
        main(*parse_flags(config, description, sys.argv[1:]))
        sys.stdout.flush()
        return
    except (UsageError, Failure, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
        status, message = explained(error)
        if status is None:
            raise
    try:
        sys.stdout.flush()
    except OSError:
        silence(sys.stdout)
    another = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") not in ("", "0")
    if status != 2 or not another:  # under torchrun, a wrong call is wrong in every process
        note(f"{pathlib.Path(sys.argv[0]).name}: error: {printable(message)}")
    sys.exit(status)


def open_streams():
    """Gives a closed standard stream a file, so that no other file takes its number; never stops at a
    character that a stream cannot write."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
        elif name != "stdin" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def on_ending_signals(handler):
    """Sets the handler of each signal that asks a process to end: Ctrl-C, kill, a closed terminal, a
    cluster's warning, a limit of CPU time. One that is ignored, as SIGHUP under nohup, stays so."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
        number = getattr(signal, name, None)
        if number and (name == "SIGINT" or signal.getsignal(number) != signal.SIG_IGN):
            signal.signal(number, handler)


def interrupter():
    """A handler that ends a command as Ctrl-C does, so that it cleans up. For five seconds more, no signal
    interrupts that."""
    ended = -math.inf

    def interrupt(number, frame):
        nonlocal ended
        if time.monotonic() - ended > 5:
            ended = time.monotonic()
            raise KeyboardInterrupt(number)

    return interrupt


def explained(error):
    """(exit status, message) of an expected error; (None, None) of a bug."""
    if isinstance(error, UsageError):
        return 2, error
    if isinstance(error, Failure):
        return 1, error
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.args[0] if error.args else signal.SIGINT), "interrupted"
    if isinstance(error, BrokenPipeError):
        return 1, "nobody reads the output any more"
    if isinstance(error, OSError):
        return 1, f"{error.filename or 'the output'}: {error.strerror or error}"
    if isinstance(
        error, NotImplementedError
    ):  # an operation that the device lacks, as log_ndtr on Apple's
        return 1, f"{str(error).split('. ')[0]}; try --device cpu, or PYTORCH_ENABLE_MPS_FALLBACK=1"
    if out_of_memory(error):
        return 1, "out of memory; try a smaller --batch-size, or smaller images or networks"
    if any(word in str(error) for word in ("closed by peer", "gloo", "NCCL")):
        cause = str(error).strip().splitlines()[0]
        return 1, f"another process of this run has ended; if none says why: {cause}"
    return None, None

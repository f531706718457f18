"""Loads torch for a command, which imports this first: what cannot be loaded is one line, and Ctrl-C
meanwhile ends the process without a traceback, since nothing has begun. A command that is only imported is
left alone.
"""

import importlib
import os
import pathlib
import signal
import sys


def load():
    """Raises SystemExit, with a line of words and status 1, for what the machine lacks."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until command.run
    name = pathlib.Path(sys.argv[0]).name
    try:
        os.getcwd()  # without it, a library of torch's ends the process
    except FileNotFoundError:
        sys.exit(f"{name}: error: the folder in which it was started is gone")
    for package in ("numpy", "PIL", "torch"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            sys.exit(
                f"{name}: error: {error}; the first command of README.md installs it: then run "
                f".venv/bin/python {name}"
            )
        except Exception as error:  # as of a variable such as TORCH_LOGS that torch cannot read
            why = " ".join(str(error).split())[:200] or type(error).__name__
            sys.exit(f"{name}: error: {package} cannot be loaded: {why}")


main = getattr(sys.modules["__main__"], "__file__", None)
if main and pathlib.Path(main).resolve().parent == pathlib.Path(__file__).resolve().parents[1]:
    load()

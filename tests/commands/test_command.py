"""support/command.py and support/errors.py: flags from a dataclass, and errors in one line."""

import errno
import io
import os
import pathlib
import shlex
import signal
import subprocess
import sys
from dataclasses import MISSING, dataclass

import pytest
import running
from running import ROOT, TINY

import convert
import evaluate
import figures
import sample
import train
from support import command, progress
from support.command import flag
from support.errors import Failure, UsageError


@dataclass(frozen=True)
class Config:
    name: str = flag(MISSING, "a required text")
    n: int = flag(3, "a number", low=1, high=9)
    rate: float | None = flag(None, "a fraction", low=0)
    kind: str = flag("a", "one of two", choices=("a", "b"), alias="--sort")
    fast: bool = flag(False, "a switch")
    labels: list[str] | None = flag(None, "a list")  # noqa: RUF009
    side: int | None = flag(None, "a parsed number", type=lambda text: 2 * int(text))


def parsed(*argv):
    return command.parse_flags(Config, "", argv)


def test_flags_become_settings_of_their_final_types():
    """A default stays, an older name works, a list accumulates, and `given` names what was typed."""
    argv = "--name x --rate 1 --sort b --fast --labels 1 --labels 2 --side 4".split()
    cfg, given = parsed(*argv)
    assert cfg == Config("x", 3, 1.0, "b", True, ["1", "2"], 8)
    assert given == {"name", "rate", "kind", "fast", "labels", "side"}


@pytest.mark.parametrize("argv, words", [
    ("--n 2", "--name"),
    ("--name x --n three", "--n: invalid whole number value: 'three'"),
    ("--name x --n 2.5", "--n: invalid whole number value: '2.5'"),
    ("--name x --n 0", "--n: 0: must be from 1 to 9"),
    ("--name x --rate nan", "--rate: nan is not a finite number"),
    (f"--name x --n {10**30}", f"--n: {10**30} is too large"),
    ("--name x --rate -1", "--rate: -1: must be at least 0"),
    ("--name x --kind c", "--kind/--sort: invalid choice: 'c'"),
    ("--name x --name y", "--name: given twice"),
    ("--name ''", "--name: must not be empty"),
    ("--name x --unknown", "--unknown"),
    ("--name x surplus", "surplus"),
    ("--name x --n", "--n: expected one argument"),
])  # fmt: skip
def test_a_wrong_flag_raises_usage_error_with_its_name(argv, words):
    with pytest.raises(UsageError, match=r".") as error:
        parsed(*shlex.split(argv))
    assert words in str(error.value)


@pytest.mark.parametrize("module", [train, sample, evaluate, figures, convert])
def test_help_explains_every_flag(call, module):
    status, out, _ = call(module, "--help")
    assert status == 0 and "python " in out
    for name, f in module.Config.__dataclass_fields__.items():
        assert "--" + name.replace("_", "-") in out and f.metadata["help"].split()[0] in out


# --- Errors --------------------------------------------------------------------------------------

EXPECTED = [
    (UsageError("--n: no"), 2, "--n: no"),
    (Failure("a.pt: no"), 1, "a.pt: no"),
    (Failure("two\nlines\x1b[31m"), 1, "two\\nlines\\x1b[31m"),
    (FileNotFoundError(errno.ENOENT, "No such file", "a.png"), 1, "a.png: No such file"),
    (KeyboardInterrupt(signal.SIGTERM), 128 + signal.SIGTERM, "interrupted"),
    (MemoryError(), 1, "out of memory"),
    (RuntimeError("CUDA error: out of memory"), 1, "out of memory"),
    (RuntimeError("[gloo] Connection closed by peer"), 1, "another process of this run has ended"),
]


@pytest.mark.parametrize("error, status, words", EXPECTED, ids=lambda x: repr(x)[:40])
def test_an_expected_error_is_one_line_and_a_status(monkeypatch, capsys, error, status, words):
    def main(cfg, given):
        raise error

    monkeypatch.setattr(sys, "argv", ["tool.py", "--name", "x"])
    assert ended(main) == status
    err = capsys.readouterr().err
    assert err.startswith("tool.py: error: ") and words in err and err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError, AttributeError, RuntimeError])
def test_a_bug_is_not_caught(monkeypatch, error):
    def main(cfg, given):
        raise error("a bug")

    monkeypatch.setattr(sys, "argv", ["tool.py", "--name", "x"])
    with pytest.raises(error, match="a bug"):
        ended(main)


def ended(main):
    """Return the exit status of command.run(main), with the signal handlers restored."""

    class Module:
        __name__ = "tool"
        __doc__ = ""

    module = Module()
    module.Config, module.main = Config, main
    return running.in_process(module, "--name", "x")


@pytest.mark.parametrize("name", ["a b.pt", "--.pt"])
def test_a_path_that_a_command_prints_can_be_typed(name):
    words = shlex.split(f"--name {command.typed(name)}")
    assert pathlib.Path(parsed(*words)[0].name) == pathlib.Path(name)


# --- Whole processes -----------------------------------------------------------------------------


def test_a_run_works_in_safe_path_mode_with_streams_that_take_nothing(tmp_path):
    """python -P leaves the project out of sys.path. A full stream costs neither work nor status."""
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    flags = [*TINY, "--epochs", "1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-P", ROOT / "train.py", *flags],
            cwd=tmp_path,
            stdout=full,
            stderr=full,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=100,
        )
    assert done.returncode == 0 and (tmp_path / "ckpt.pt").is_file()


WINDOWS = """
import signal, sys
for name in ("fcntl", "resource", "pwd", "termios"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM"):
    if hasattr(signal, name):
        delattr(signal, name)
sys.path.insert(0, {root!r})
import os
for name in ("fchmod", "geteuid", "getuid", "getloadavg", "fork", "mkfifo"):
    delattr(os, name)
import train, sample
from support import command, progress
for module, flags in ((train, {train!r}), (train, {resume!r}), (sample, {sample!r})):
    sys.argv = [module.__name__ + ".py", *flags]
    command.run(module.main, module.Config, module.__doc__)
"""


def test_the_commands_run_without_the_modules_and_signals_of_posix(tmp_path):
    """As on Windows: train, resume and sample."""
    code = WINDOWS.format(
        root=str(ROOT),
        train=[*TINY, "--epochs", "1", "--log", "log.jsonl"],
        resume=["--resume", "ckpt.pt", "--epochs", "2"],
        sample="--ckpt ckpt.pt --out a.png --n 2 --steps 2".split(),
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").is_file()


def test_a_result_is_printed_on_a_stream_without_its_letters_and_lost_without_a_stream(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    progress.say("3.78 ± 0.04")
    assert stream.buffer.getvalue() == b"3.78 \\xb1 0.04\n"
    monkeypatch.setattr(sys, "stdout", None)  # as Python starts with >&-
    progress.say("3.78 ± 0.04")

"""Fixtures of the commands' tests: a command run inside this process, and tiny runs that others share."""

import signal
import sys

import pytest
from running import TINY, run

from support import budget, command

COUNTED = {}


def counted_once(network, shape, memory=budget.memory):
    """budget.memory, which says the same of the same network each time: a quarter of a tiny run."""
    key = repr((network, shape))
    if key not in COUNTED:
        COUNTED[key] = memory(network, shape)
    return COUNTED[key]


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs a command inside this process, which saves its start: (exit status, output, errors)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(budget, "memory", counted_once)
    handlers = {s: signal.getsignal(s) for s in signal.valid_signals()}

    def call(module, *flags):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        capsys.readouterr()
        try:
            command.run(module.main, module.Config, module.__doc__)
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    yield call
    for number, handler in handlers.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a tiny run on the glyphs, by the real command, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [*TINY[:-2], "--epochs", "4", "--log", "log.jsonl", "--sample-every", "2"]
    status, out, err = run("train.py", *flags, cwd=folder)
    assert status == 0, err
    return folder, out


@pytest.fixture
def ckpt(trained):
    return trained[0] / "ckpt.pt"


@pytest.fixture(scope="session")
def learned(tmp_path_factory):
    """The checkpoint of a tiny run with learned variances, by the real command."""
    folder = tmp_path_factory.mktemp("learned")
    status, _, err = run("train.py", *TINY, "--epochs", 2, "--variance", "learned", cwd=folder)
    assert status == 0, err
    return folder / "ckpt.pt"

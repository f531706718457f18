"""Fixtures of the commands' tests: a command run inside this process, and tiny runs that tests share."""

import pytest
import running
from running import TINY

import train
from support import budget

COUNTED = {}


def counted_once(network, shape, memory=budget.memory):
    """Return budget.memory of a network, counted once: it takes a quarter of the time of a tiny run."""
    key = repr((network, shape))
    if key not in COUNTED:
        COUNTED[key] = memory(network, shape)
    return COUNTED[key]


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run a command in this process, in an empty folder: call(module, *flags) -> (status, out, err)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(budget, "memory", counted_once)

    def call(module, *flags):
        capsys.readouterr()
        status = running.in_process(module, *flags)
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Return the folder of a tiny run on the digits, by the real command, and its standard output."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [*TINY[:-2], "--epochs", "4", "--log", "log.jsonl", "--sample-every", "2"]
    status, out, err = running.run("train.py", *flags, cwd=folder)
    assert status == 0, err
    return folder, out


@pytest.fixture
def ckpt(trained):
    return trained[0] / "ckpt.pt"


@pytest.fixture(scope="session")
def learned(tmp_path_factory):
    """Return the checkpoint of a tiny run with learned variances."""
    path = tmp_path_factory.mktemp("learned") / "ckpt.pt"
    assert (
        running.in_process(train, *TINY, "--variance=learned", "--epochs=2", f"--out={path}") == 0
    )
    return path

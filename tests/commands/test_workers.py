"""support/workers.py: the processes of a torchrun."""

import os
import subprocess
import sys

import pytest
import torch
from checks import close
from running import ROOT, TINY

import train
from support import checkpoint, workers

TORCHRUN = dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")


def test_without_torchrun_there_is_one_process(monkeypatch):
    """Also where a cluster left some of torchrun's variables."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert workers.place() == (0, 1) and workers.is_first() and not workers.several()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert workers.place() == (1, 2) and not workers.is_first() and workers.several()


@pytest.mark.parametrize("asked, taken", [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cpu", "cpu")])
def test_each_process_of_torchrun_takes_its_own_gpu(monkeypatch, asked, taken):
    """The second of a machine takes cuda:1, unless another device is named."""
    for name, value in (TORCHRUN | {"TORCHELASTIC_RUN_ID": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert workers.own_device(asked) == taken


def test_a_batch_that_the_processes_cannot_share_is_rejected(call, monkeypatch):
    monkeypatch.setattr(workers, "place", lambda: (0, 3))
    status, out, err = call(train, *TINY)
    assert status == 2 and out == "" and "--batch-size 16: the processes cannot share it" in err


def test_two_processes_make_the_same_run_as_one(call, tmp_path):
    """The same batches and noise; only sums are rounded otherwise."""
    flags = [*TINY, "--epochs", "2"]
    assert call(train, *flags, "--out", "one.pt")[0] == 0
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*torchrun, str(ROOT / "train.py"), *flags, "--out", "two.pt"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    a, one, _ = checkpoint.load_model(tmp_path / "one.pt")
    b, two, _ = checkpoint.load_model(tmp_path / "two.pt")
    assert a["step"] == b["step"] == 8
    x, t = torch.randn(4, *a["shape"]), torch.tensor([1, 5, 10, 20])
    close("eps of both networks", two(x, t), one(x, t), 1e-3, 1.0)

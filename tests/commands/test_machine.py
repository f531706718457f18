"""Devices, precision, files and terminals, as the commands meet them."""

import json
import os
import pathlib
import pty
import subprocess
import sys

import far
import numpy as np
import pytest
import torch
from judge import close
from running import ROOT, TINY

import evaluate
import sample
import train
from support import checkpoint, devices


def test_the_commands_say_the_same_on_another_device_and_seldom_wait_for_it(call):
    """Training, stopped and resumed, sampling and evaluation, on the device of far.py: the CPU's losses,
    pictures (within a level of 256 on average) and bits/dim, but for the order of sums. A GPU would be
    waited for at reports and at pictures only: there are fewer of both than steps."""
    tiny = [*TINY, "--limit", 32, "--batch-size", 4, "--timesteps", 6, "--flip", "yes", "--dropout", 0.1,
            "--log", "log"]  # fmt: skip
    drawing = "--ckpt ckpt.pt --out a.npz --n 4 --guidance 1 --steps".split()

    def results(device):
        for flags in (tiny, ["--resume", "ckpt.pt"]):
            status, _, err = call(train, *flags, "--epochs", 1 if flags is tiny else 2, "--device", device)
            assert status == 0, err
        losses = [json.loads(line)["loss"] for line in pathlib.Path("log").read_text().splitlines()]
        waits = [len(reads)]
        for steps in (6, 3):
            assert call(sample, *drawing, steps, "--device", device)[0] == 0
            waits.append(len(reads))
        _, out, err = call(evaluate, "--ckpt", "ckpt.pt", "--n", 2, "--device", device)
        bits = float(out.splitlines()[-1].split()[-3]) if out else err
        pathlib.Path("log").unlink()
        return losses, np.load("a.npz")["arr_0"].astype(float), bits, waits

    with far.device() as reads:
        near, away = results("cpu"), results("far")
    close("loss", away[0], near[0], 1e-3, 1.0)
    close("bits/dim", away[2], near[2], 1e-2, 1.0)
    off = abs(away[1] - near[1]).mean()  # Adam's first steps turn a gradient's rounding into a whole step
    assert off < 1, f"pixels are off by {off:.2g} levels on average"
    training, *drawings = np.diff([0, *away[3]])
    assert near[3] == [0, 0, 0] and training < 16 and drawings == [2, 2], reads


@pytest.mark.parametrize("precision, matmul, tf32", [("fp32", "highest", False), ("bf16", "high", True)])
def test_float32_is_not_tf32_unless_bfloat16_is_asked_for(precision, matmul, tf32):
    """Neither in products of matrices nor in convolutions, where CUDA's default is TF32."""
    try:
        assert devices.use_precision(precision, torch.device("cpu")) == tf32
        assert torch.get_float32_matmul_precision() == matmul
        assert torch.backends.cudnn.allow_tf32 == tf32
    finally:
        devices.use_precision("fp32", torch.device("cpu"))


def test_an_operation_that_a_device_lacks_is_one_line(call, monkeypatch, ckpt):
    """As log_ndtr, of the decoder, on Apple's GPUs."""
    def missing(x):
        raise NotImplementedError("The operator 'aten::special_log_ndtr' is not there for MPS. More words.")

    monkeypatch.setattr(torch.special, "log_ndtr", missing)
    status, _, err = call(evaluate, "--ckpt", ckpt, "--n", 1, "--device", "cpu")
    assert status == 1 and err == ("evaluate.py: error: The operator 'aten::special_log_ndtr' is not there "
                                   "for MPS; try --device cpu, or PYTORCH_ENABLE_MPS_FALLBACK=1\n")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."),
                                   RuntimeError("CUDA error: out of memory")], ids=["allocator", "start"])
def test_a_device_that_is_full_is_not_one_that_is_missing(call, monkeypatch, ckpt, error):
    """As when another process has all of its memory."""
    def empty(*size, device=None):
        raise error

    monkeypatch.setattr(torch, "empty", empty)
    status, _, err = call(sample, "--ckpt", ckpt, "--out", "a.png", "--device", "cuda")
    assert (status, err.count("\n")) == (1, 1) and "out of memory; try a smaller --batch-size" in err


def test_an_output_that_takes_no_more_is_one_line(ckpt):
    """Also where Python buffers what is printed, and would find out at its very end."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "evaluate.py", "--ckpt", ckpt, "--n", "1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=env, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "evaluate.py: error: " in done.stderr and "No space left" in done.stderr


def test_what_a_killed_writer_left_is_cleared_after_an_hour(tmp_path):
    """Another writer's partial file is left alone while it is young."""
    old, young = (tmp_path / f".a.pt.{pid}.partial" for pid in (1, 2))
    old.touch(), young.touch()
    os.utime(old, (0, 0))
    checkpoint.save(tmp_path / "a.pt", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == [young.name, "a.pt"]


def test_progress_rewrites_one_line_on_a_terminal(ckpt, tmp_path):
    leader, follower = pty.openpty()
    command = [sys.executable, ROOT / "sample.py", "--ckpt", ckpt, "--out", tmp_path / "a.png", "--n", "4"]
    subprocess.run(command, stderr=follower, stdout=subprocess.DEVNULL, check=True)
    shown = os.read(leader, 10_000).decode()
    assert "\rsampling: " in shown and "left" in shown and "\n" not in shown

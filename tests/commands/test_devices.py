"""support/devices.py: the device, and the precision of its networks."""

import re

import far
import numpy as np
import pytest
import torch
from checks import close

import evaluate
import sample
import train
from support import devices, monitor
from support.errors import UsageError


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:99", "nonsense", ""])
def test_a_device_that_is_not_there_is_a_usage_error(name):
    with pytest.raises(UsageError, match=f"--device {name}: .*; try cpu"):
        devices.pick_device(name)


@pytest.mark.parametrize("bf16, matmul", [(False, "highest"), (True, "high")])
def test_float32_is_not_tf32_unless_bfloat16_is_asked_for(bf16, matmul):
    """Neither in products of matrices nor in convolutions, where CUDA's default is TF32."""
    try:
        devices.use_precision(bf16)
        assert torch.get_float32_matmul_precision() == matmul
        assert torch.backends.cudnn.allow_tf32 == bf16
    finally:
        devices.use_precision(bf16=False)


def test_a_network_samples_in_the_precision_of_its_training(monkeypatch):
    """Where the hardware has it; a flag has the last word."""
    monkeypatch.setattr(devices, "has_bf16", lambda device: True)
    cpu = torch.device("cpu")
    assert devices.samples_in_bf16("auto", cpu, "bf16")
    assert not devices.samples_in_bf16("auto", cpu, "fp32")
    assert not devices.samples_in_bf16("fp32", cpu, "bf16")
    assert devices.samples_in_bf16("bf16", cpu, "fp32")
    monkeypatch.setattr(devices, "has_bf16", lambda device: False)
    assert not devices.samples_in_bf16("auto", cpu, "bf16")


def test_the_commands_give_the_same_on_another_device_and_seldom_wait_for_it(call, monkeypatch):
    """Training, sampling and evaluation on the device of far.py, but for the order of sums.

    A GPU is waited for at reports, at pictures and in the trial: fewer times than there are steps.
    """
    monkeypatch.setattr(monitor.Monitor, "due", lambda self: self.ends())
    tiny = "--limit 64 --batch-size 4 --timesteps 6 --width 8 --warmup 0 --precision fp32".split()
    tiny += "--micro-batch 4 --sample-every 0 --flip yes --dropout 0.1 --epochs 1".split()
    drawing = "--ckpt ckpt.pt --out a.npz --n 4 --guidance 1 --precision fp32 --steps 3".split()

    def results(device):
        status, out, err = call(train, *tiny, "--device", device)
        assert status == 0, err
        losses = [float(x) for x in re.search(r"loss (.*), held out (.*),", out).groups()]
        waits = len(reads)
        assert call(sample, *drawing, "--device", device)[0] == 0
        _, out, err = call(evaluate, "--ckpt", "ckpt.pt", "--n", 2, "--device", device)
        bits = float(out.splitlines()[-1].split()[-3]) if out else err
        return losses, np.load("a.npz")["arr_0"].astype(float), bits, waits

    with far.device() as reads:
        near = results("cpu")
        reads.clear()
        away = results("far")
    close("losses", away[0], near[0], 2e-3, 1.0)
    close("pictures", away[1], near[1], 8, 1.0)
    close("bits/dim", away[2], near[2], 1e-2, 1.0)
    assert 0 < away[3] < 16, away[3]

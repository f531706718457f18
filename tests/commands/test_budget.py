"""support/budget.py: memory that is counted, time that is measured, and what follows from both."""

import copy
import itertools
import re

import pytest
import torch
from running import run

import ddpm
import train
from support import budget

SMALL = dict(ch=16, mult=(1, 2), attention=(1,), groups=4, dropout=0.1)
ABOUT = dict(network=SMALL, shape=(3, 16, 16))
CPU = torch.device("cpu")


@pytest.fixture
def net():
    torch.manual_seed(0)
    return ddpm.UNet(**SMALL)


@pytest.fixture
def trial(net, monkeypatch):
    """Return a trial on a machine whose step of n images takes cost(precision, n) seconds."""

    def trial(cost, free=10**12, batch=64, **how):
        monkeypatch.setattr(budget, "free_memory", lambda device: free)
        monkeypatch.setattr(budget.devices, "has_bf16", lambda device: True)
        monkeypatch.setattr(budget, "timed", lambda net, shape, n, device, name: cost(name, n))
        return budget.trial(net, ABOUT, batch, CPU, **how)

    return trial


# --- Memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("network, shape", [
    (SMALL, (3, 16, 16)), (dict(SMALL, mult=(1, 2, 2, 2)), (3, 64, 32)),
    (dict(SMALL, attention=()), (3, 32, 32)),
], ids=["attention", "four levels", "no attention"])  # fmt: skip
def test_the_memory_that_is_counted_is_what_a_real_step_keeps(network, shape):
    """Without computing anything. bf16 keeps less; float32 no more, and at least half of it."""
    net = ddpm.UNet(**network).to(memory_format=torch.channels_last)
    weights, image = budget.memory(network, shape)
    assert weights == sum(weight.numel() for weight in net.parameters())
    real = budget.kept(net, torch.zeros(5, *shape), torch.ones(5, dtype=torch.int64))
    assert real / 1.05 <= 5 * image <= 2 * real


def test_the_memory_of_the_process_is_estimated_within_a_factor_of_1_5(tmp_path):
    """Printed before the first step, and measured after the last one."""
    flags = (
        "--limit 64 --batch-size 64 --micro-batch 64 --width 48 --epochs 2 --log log --device cpu"
    )
    status, out, err = run("train.py", *flags.split(), "--sample-every", 0, cwd=tmp_path)
    assert status == 0, err
    estimate = float(re.search(r"about ([\d.]+) GB in all", out)[1])
    measured = float(re.findall(r'"memory_gb": ([\d.]+)', (tmp_path / "log").read_text())[-1])
    assert measured / 1.5 <= estimate <= 1.5 * measured, (estimate, measured)


def test_a_network_that_cannot_fit_is_rejected_before_it_takes_memory(call):
    status, out, err = call(train, "--width", 8192, "--device", "cpu")
    assert status == 1 and out == "" and "a smaller --width" in err and err.count("\n") == 1


def test_a_step_needs_at_most_half_of_the_free_memory(trial):
    """The largest number of images for which that holds, where more at a time are faster."""
    weights, image = budget.memory(SMALL, (3, 16, 16))
    for n in (1, 7, 8):
        free = 2 * (12 * weights + n * image) + 1
        assert trial(lambda name, n: 1e-3, free, batch=840).micro_batch == n


# --- Time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio, name", [(0.5, "bf16"), (0.97, "fp32"), (1.8, "fp32")])
def test_auto_is_bf16_where_it_is_clearly_faster(trial, ratio, name):
    cost = trial(lambda name, n: n * (0.01 * ratio if name == "bf16" else 0.01))
    assert cost.precision == name and f"seconds in {name}, 64 images at a time" in str(cost)
    assert trial(lambda name, n: 0.01, precision="bf16").precision == "bf16"


@pytest.mark.parametrize("period", [3, 4])
def test_a_busy_machine_does_not_change_the_choice(trial, period):
    """Every third or fourth step takes ten times longer."""
    calls = itertools.count()

    def cost(name, n):
        return n * (0.005 if name == "bf16" else 0.01) * (1 if next(calls) % period else 10)

    chosen = trial(cost)
    assert (chosen.precision, chosen.micro_batch) == ("bf16", 64)


def test_a_gpu_without_memory_halves_the_micro_batch(trial):
    def cost(name, n):
        if n > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 0.01

    assert trial(cost).micro_batch == 16
    assert trial(cost, micro_batch=50).micro_batch <= 20
    with pytest.raises(torch.OutOfMemoryError):
        trial(lambda name, n: cost(name, 99))


def test_the_trial_leaves_network_and_generators_as_they_were(net):
    weights, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    net.train()
    cost = budget.trial(net, ABOUT, 4, CPU)
    assert cost.seconds > 0 and cost.micro_batch == 4 and net.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), net.state_dict().values()))
    assert all(weight.grad is None for weight in net.parameters())


def test_a_busy_machine_is_reported(trial, monkeypatch, capsys):
    monkeypatch.setattr(budget.os, "getloadavg", lambda: (9.0, 0, 0))
    monkeypatch.setattr(budget.os, "cpu_count", lambda: 2)
    trial(lambda name, n: 0.01)
    assert "this machine is busy (load 9)" in capsys.readouterr().err


def test_a_resumed_run_keeps_what_its_trial_chose(call, monkeypatch):
    """The precision and the micro-batch; a flag can change them."""
    monkeypatch.setattr(budget.devices, "has_bf16", lambda device: True)

    def timed(net, shape, n, device, name):
        return n * (0.001 if name == "bf16" else 0.01)

    monkeypatch.setattr(budget, "timed", timed)
    flags = ["--limit", 64, "--batch-size", 16, "--width", 8, "--timesteps", 20, "--device", "cpu"]
    status, out, err = call(train, *flags, "--epochs", 1, "--sample-every", 0)
    assert status == 0 and "in bf16, 16 images at a time" in out, err
    monkeypatch.setattr(budget, "timed", lambda net, shape, n, device, name: 0.01)
    status, out, err = call(train, "--resume", "ckpt.pt", "--epochs", 2)
    assert status == 0 and "in bf16, 16 images at a time" in out, err
    status, out, err = call(train, "--resume", "ckpt.pt", "--epochs", 3, "--micro-batch", 4)
    assert status == 0 and "in bf16, 4 images at a time" in out, err

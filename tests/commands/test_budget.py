"""A trial step: memory that is counted, time that is measured, and what follows from both."""

import copy
import json
import pathlib
import re
import resource

import pytest
import torch
from judge import close
from running import TINY

import ddpm
import train
from support import budget, checkpoint
from support.errors import Failure

SMALL = dict(ch=16, mult=(1, 2), attention=(1,), groups=4, dropout=0.1)
ABOUT = dict(network=SMALL, shape=(3, 16, 16))
CPU = torch.device("cpu")


def needed(network, shape, images):
    """The bytes of a step on so many images."""
    own, each = budget.memory(network, shape)
    return own + images * each


@pytest.fixture
def net():
    torch.manual_seed(0)
    return ddpm.UNet(**SMALL)


def trial(net, monkeypatch, cost, free=10**12, batch=64, **how):
    """The trial on a machine of so much free memory, whose images take cost(bf16, n) seconds each."""
    monkeypatch.setattr(budget, "free_memory", lambda device: free)
    monkeypatch.setattr(budget.devices, "has_bf16", lambda device: True)
    monkeypatch.setattr(budget, "timed", lambda net, shape, n, device, bf16: cost(bf16, n))
    return budget.trial(net, ABOUT, batch, CPU, **how)


# --- Memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("network, shape", [
    (SMALL, (3, 16, 16)), (dict(SMALL, mult=(1, 2, 2, 2)), (3, 64, 32)),
    (dict(SMALL, attention=()), (3, 32, 32)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("bf16", [False, True])
def test_the_memory_that_is_counted_holds_what_a_real_step_keeps(network, shape, bf16):
    """Without computing anything, for any number of images; not more than twice of it in float32."""
    net, n = ddpm.UNet(**network).to(memory_format=torch.channels_last), 5
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        real = budget.kept(net, torch.zeros(n, *shape), torch.ones(n, dtype=torch.int64))
    weights = sum(weight.numel() for weight in net.parameters())
    counted = needed(network, shape, n) - budget.A_WEIGHT * weights
    assert counted >= real and (bf16 or counted <= 2 * real), (counted, real)


def test_a_step_takes_half_of_the_free_memory_at_most(net, monkeypatch):
    """The largest number of images for which that holds, where more at a time are faster."""
    for free in (2 * needed(SMALL, (3, 16, 16), 7), 2 * needed(SMALL, (3, 16, 16), 8) - 1):
        cost = trial(net, monkeypatch, lambda bf16, n: 1e-3 / n, free)
        assert cost.images == 7 and cost.memory <= free / 2
    assert trial(net, monkeypatch, lambda bf16, n: 1e-3 / n).images == 64


def test_where_no_free_memory_can_be_read_four_gibibytes_are_taken_for_it(net, monkeypatch):
    monkeypatch.setattr(budget, "memory", lambda network, shape: (0, 2**28))
    cost = trial(net, monkeypatch, lambda bf16, n: 1e-3 / n, free=None)
    assert cost.images == 8 and "cannot be read" in str(cost)


def test_an_image_that_does_not_fit_is_refused_with_a_size_that_does(net, monkeypatch):
    monkeypatch.setitem(ABOUT, "shape", (3, 96, 64))
    free = needed(SMALL, (3, 96, 64), 1) - 1
    with pytest.raises(Failure, match="not even one image of 96x64 fits") as caught:
        trial(net, monkeypatch, lambda bf16, n: 1e-3, free)
    h, w = map(int, re.search(r"one of (\d+)x(\d+)", str(caught.value)).groups())
    assert needed(SMALL, (3, h, w), 1) < free / 2 and h % 2 == w % 2 == 0
    with pytest.raises(Failure, match="a smaller --width"):
        trial(net, monkeypatch, lambda bf16, n: 1e-3, 300_000, batch=1)
    with pytest.raises(Failure, match="--batch-size 64: its images alone take 14 MB"):
        trial(net, monkeypatch, lambda bf16, n: 1e-3, 1000)
    with pytest.raises(
        Failure, match=r"--micro-batch 50: more than the .* that are free; 1 or auto"
    ):
        trial(net, monkeypatch, lambda bf16, n: 1e-3, 2 * free, at_a_time="50")


@pytest.mark.parametrize("files, free", [
    ({"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 1000 kB"}, 1_024_000),
    ({"/proc/meminfo": "MemAvailable: 1000 kB", "/proc/self/cgroup": "0::/a/b",
      "/sys/fs/cgroup/a/memory.max": "900000", "/sys/fs/cgroup/a/memory.current": "500000",
      "/sys/fs/cgroup/a/memory.stat": "anon 5\ninactive_file 100000", "/sys/fs/cgroup/a/b/memory.max": "max",
      "/sys/fs/cgroup/a/b/memory.current": "1"}, 500_000),
    ({"/proc/self/cgroup": "4:cpu:/\n5:memory:/x", "/sys/fs/cgroup/memory/x/memory.limit_in_bytes": "70",
      "/sys/fs/cgroup/memory/x/memory.usage_in_bytes": "80"}, 0),
    ({}, None),
], ids=["machine", "group above", "older groups", "nothing to read"])  # fmt: skip
def test_the_free_memory_is_the_least_that_any_limit_leaves(monkeypatch, files, free):
    monkeypatch.setattr(budget, "lines", lambda path: files.get(str(path), "").splitlines())
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert budget.free_memory(CPU) == free


# --- Time ----------------------------------------------------------------------------------------


def test_fewer_images_at_a_time_are_taken_where_fewer_are_faster(net, monkeypatch):
    cost = trial(net, monkeypatch, lambda bf16, n: 0.01 * (1 + abs(n - 8)))
    assert cost.images == 8 and cost.seconds == pytest.approx(64 * 0.01)
    assert (
        trial(net, monkeypatch, lambda bf16, n: 30.0).images == 1
    )  # a step of a minute is tried once


@pytest.mark.parametrize("half, name", [(0.5, "bf16"), (0.97, "fp32"), (1.8, "fp32")])
def test_auto_is_bf16_where_it_is_clearly_faster(net, monkeypatch, half, name):
    cost = trial(net, monkeypatch, lambda bf16, n: 0.1 * (half if bf16 else 1))
    assert str(cost).startswith("about") and f"in {name} (about" in str(cost)
    assert trial(net, monkeypatch, lambda bf16, n: 0.1, precision="bf16").bf16
    assert not trial(net, monkeypatch, lambda bf16, n: 0.1 / (1 + bf16), precision="fp32").bf16


def test_the_trial_leaves_network_and_generators_as_they_were(net):
    weights, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    net.train()
    cost = budget.trial(net, ABOUT, 4, CPU)
    assert cost.seconds > 0 and cost.images in (1, 2, 4) and net.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), net.state_dict().values()))
    assert all(weight.grad is None for weight in net.parameters())


def test_images_a_few_at_a_time_make_the_step_of_the_whole_batch(call):
    """Three at a time, of batches of 16: the same losses, but for the order of sums."""
    for few in (3, 16):
        status, out, err = call(
            train,
            *TINY,
            "--epochs",
            2,
            "--micro-batch",
            few,
            "--out",
            f"{few}.pt",
            "--log",
            f"{few}.jsonl",
            "--variance",
            "learned",
        )
        assert status == 0 and f"{few} images at a time" in out, err
    a, b = ([json.loads(line)["loss"] for line in pathlib.Path(name).read_text().splitlines()]
            for name in ("3.jsonl", "16.jsonl"))  # fmt: skip
    close("loss", a, b, 1e-3, 1.0)


@pytest.mark.parametrize("micro", [1, 3, 8, 20])
def test_the_gradients_of_parts_add_up_to_that_of_the_batch(micro):
    """By a step of plain gradient descent, which is the gradient itself; a part counts by its size."""
    torch.manual_seed(0)
    first, d = ddpm.UNet(**dict(SMALL, dropout=0.0)), ddpm.Diffusion(ddpm.cosine_schedule(20))
    batch = (
        torch.rand(8, 3, 16, 16) * 2 - 1,
        None,
        torch.randint(1, 21, (8,)),
        torch.randn(8, 3, 16, 16),
    )
    after = []
    for few in (micro, None):
        net, ema = copy.deepcopy(first), copy.deepcopy(first)
        sgd = torch.optim.SGD(net.parameters(), 1.0)
        loss, norm = train.update(net, d, batch, sgd, 1.0, ema, 0.0, micro=few)
        weights = torch.cat([weight.flatten() for weight in net.parameters()]).detach()
        after.append((loss.item(), norm.item(), weights))
    close("loss", after[0][0], after[1][0], 1e-5, 1.0)
    close("norm", after[0][1], after[1][1], 1e-4, 1.0)
    close("weights", after[0][2], after[1][2], 1e-5, 1.0)


def test_a_resumed_run_keeps_what_its_trial_chose(call, monkeypatch):
    """The precision and the images at a time; a flag can change them."""

    def timed(net, shape, n, device, bf16):
        return (0.001 if bf16 else 0.01) * (1 + abs(n - 4))

    monkeypatch.setattr(budget, "timed", timed)
    assert call(train, *TINY, "--epochs", 1, "--precision", "auto", "--micro-batch", "auto")[0] == 0
    config = checkpoint.load("ckpt.pt")["config"]
    assert (config["precision"], config["micro_batch"]) == ("bf16", "4")
    monkeypatch.setattr(budget, "timed", lambda net, shape, n, device, bf16: 1.0)
    status, out, err = call(train, "--resume", "ckpt.pt", "--epochs", 2)
    assert status == 0 and "in bf16, 4 images at a time" in out, err
    status, out, err = call(train, "--resume", "ckpt.pt", "--epochs", 3, "--micro-batch", 16)
    assert status == 0 and "in bf16, 16 images at a time" in out, err


@pytest.mark.parametrize("number", ["0", "-1", "2.5", "some", "٣"])
def test_a_number_of_images_at_a_time_that_is_none_is_refused(call, number):
    status, _, err = call(train, *TINY, f"--micro-batch={number}")
    assert status == 2 and "--micro-batch" in err and err.count("\n") == 1

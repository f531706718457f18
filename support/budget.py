"""What a step of this network costs here: seconds and memory; hence its precision, and images at a time.

Memory is counted before anything is computed: the tensors that a forward pass keeps for its backward pass, of
a network without numbers. Time is measured, in steps that leave weights and generators as they were.
"""

import itertools
import math
import pathlib
import sys
import time
from typing import NamedTuple

import torch

import ddpm
from support import devices, workers
from support.errors import Failure
from support.progress import say

UNKNOWN = 4 * 2**30  # bytes that count as free where no free memory can be read
A_WEIGHT = 12  # bytes that a step adds to what is there: float32 of its gradient and of Adam's two averages
CLEAR = 0.9  # a choice is faster if it takes this much of the time, or less; the rest may be noise


class Cost(NamedTuple):
    """A step on this machine: of so many `images` at a time, in bf16 or not."""

    bf16: bool
    images: int
    seconds: float  # of the whole step
    memory: int  # bytes that it adds to those of the network: optimiser, and what the backward pass needs
    free: int | None  # bytes, before it; None if they cannot be read
    other: float | None  # seconds of a step in the other precision, if it was tried

    def __str__(self):
        name, other = ("bf16", "fp32") if self.bf16 else ("fp32", "bf16")
        than = f" (about {short(self.other)} in {other})" if self.other else ""
        of = (
            f"of the {gigabytes(self.free)} that are free"
            if self.free
            else "(what is free cannot be read)"
        )
        return (
            f"about {short(self.seconds)} seconds in {name}{than}, {self.images} images at a time, about "
            f"{gigabytes(self.memory)} {of}"
        )


# --- Memory --------------------------------------------------------------------------------------


def memory(network, shape):
    """The bytes of a step, in any precision, as (its own, each image's): ddpm.UNet(**network) on images of
    `shape` (C, H, W)."""
    with torch.device("meta"):  # tensors that have a shape and no numbers
        net = ddpm.UNet(**network).to(memory_format=torch.channels_last)
        images = [(torch.empty(n, *shape), torch.ones(n, dtype=torch.int64)) for n in (1, 2)]
    # The second of two images takes what an image takes; the first takes what a step does, too.
    one, two = (kept(net, xt, t) for xt, t in images)
    weights = sum(weight.numel() for weight in net.parameters())
    return A_WEIGHT * weights + 2 * one - two, two - one


def kept(net, xt, t):
    """The bytes that a forward pass keeps for its backward pass."""
    tensors = {}  # each storage once, held, so that no other takes its address

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            tensors[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(xt.contiguous(memory_format=torch.channels_last), t).sum()
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


def free_memory(device):
    """The bytes that a process may still take on a device; None where that cannot be read."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    limits = [*machine(), *container(), *process()]
    return max(0, min(limits)) // workers.here() if limits else None


def machine():
    """The bytes that Linux can give without swapping."""
    for line in lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def container():
    """The bytes that are left to this control group and to those above it, as a container sets them."""
    for line in lines("/proc/self/cgroup"):
        _, kinds, name = line.split(":", 2)
        new = not kinds
        if not new and "memory" not in kinds.split(","):
            continue
        root = pathlib.Path("/sys/fs/cgroup" if new else "/sys/fs/cgroup/memory")
        most, used = (
            ("memory.max", "memory.current")
            if new
            else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        own = root / name.strip("/")
        for folder in (own, *own.parents):
            limit, now = ("".join(lines(folder / file)) for file in (most, used))
            if limit.isdecimal() and now.isdecimal():  # "max" is none
                files = [
                    int(line.split()[1])
                    for line in lines(folder / "memory.stat")
                    if line.startswith(("inactive_file ", "total_inactive_file "))
                ]
                yield int(limit) - int(now) + max(files, default=0)  # caches of files make room
            if folder == root:
                break


def process():
    """The bytes that ulimit -v leaves."""
    import resource  # here, since Windows has none

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    pages = "".join(lines("/proc/self/statm")).split()
    if limit != resource.RLIM_INFINITY and pages:
        yield limit - int(pages[0]) * resource.getpagesize()


def lines(path):
    """The lines of a file of the system; none where there is no such file."""
    try:
        return pathlib.Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []


# --- Time ----------------------------------------------------------------------------------------


def trial(net, about, batch, device, precision="auto", at_a_time="auto"):
    """The Cost of a step of `batch` images of this process, by the faster precision and number at a time.

    about: network and shape. precision: auto, fp32 or bf16. at_a_time: auto, or a number that is asked for;
    auto takes more images as long as each then takes less time, and at most half of what memory is free.
    Several processes agree. Raises Failure if not even one image fits.
    """
    if workers.is_first():
        say(f"trying a step of {batch:,} images, for its time and memory")
    free = free_memory(device)
    known, seconds = UNKNOWN if free is None else free, {}
    own, each = memory(about["network"], about["shape"])
    most = fitting(about, own, each, batch, known)
    n = 1 if at_a_time == "auto" else min(int(at_a_time), batch)
    if own + n * each > known:
        raise Failure(
            f"--micro-batch {at_a_time}: more than the {gigabytes(known)} of memory that are free; "
            f"{most} or auto would do"
        )

    def measured(bf16, n):
        """The seconds an image, n at a time."""
        if (bf16, n) not in seconds:
            seconds[bf16, n] = timed(net, about["shape"], n, device, bf16)
        return seconds[bf16, n]

    # Both precisions, on as many images as take a fifth of a second: fewer are mostly overhead.
    first, able = precision == "bf16", devices.has_bf16(device)
    while at_a_time == "auto" and 2 * n <= most and n * measured(first, n) < 0.2:
        n *= 2
    both = [
        measured(False, n) if precision in ("auto", "fp32") else 0.0,
        measured(True, n) if precision == "bf16" or (precision == "auto" and able) else 0.0,
    ]
    fp32, half = workers.total(torch.tensor(both, device=device)).cpu().tolist()
    bf16 = precision == "bf16" or 0 < half < CLEAR * fp32

    if at_a_time == "auto":
        n = fastest(lambda n: measured(bf16, n), n, most)
    devices.use_precision(bf16)
    slowest = workers.largest(torch.tensor([batch * measured(bf16, n), -n], device=device))
    slowest, fewest = slowest.cpu().tolist()
    n = math.ceil(batch / math.ceil(batch / round(-fewest)))  # parts of one size
    if device.type == "cuda":  # what the trial took is no part of the run's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    other = batch * both[not bf16] or None
    return Cost(bf16, n, slowest, own + n * each, free, other)


def fastest(seconds, n, most):
    """How many images at a time, from n on: more while each then takes less time, or fewer. What takes a
    second gains nothing more."""
    while n < most and n * seconds(n) < 1:
        if seconds(more := min(2 * n, most)) > 0.97 * seconds(n):
            break
        n = more
    while n > 1 and seconds(n // 2) < 0.97 * seconds(n):
        n //= 2
    return n


def fitting(about, own, each, batch, free):
    """The largest number of images, up to `batch`, whose step takes at most half of the free memory; own and
    each are those of memory(). Raises Failure if one image, or the batch itself, does not fit."""
    network, shape = about["network"], about["shape"]
    if (images := 12 * batch * math.prod(shape)) > free:  # image, noise and their mirror in float32
        raise Failure(
            f"--batch-size {batch}: its images alone take {gigabytes(images)}, and "
            f"{gigabytes(free)} of memory are free"
        )
    if own + each > free:
        raise Failure(
            f"not even one image of {shape[1]}x{shape[2]} fits: with this network a step takes "
            f"{gigabytes(own + each)}, and {gigabytes(free)} of memory are free; "
            f"{smaller(network, shape, free)}"
        )
    return max(1, min(batch, int((free / 2 - own) / each)))


def smaller(network, shape, free):
    """What would fit, in words: images of half the side, or a quarter, ..."""
    C, H, W = shape
    least = 2 ** (len(network["mult"]) - 1)
    for half in itertools.takewhile(
        lambda n: min(H, W) // n >= least, (2**k for k in itertools.count(1))
    ):
        h, w = (side // half // least * least for side in (H, W))
        if (less := sum(memory(network, (C, h, w)))) < free / 2:
            return f"one of {h}x{w} would take {gigabytes(less)}"
    return "a smaller --width, or a machine with more, is needed"


def timed(net, shape, n, device, bf16):
    """The seconds that each of n images takes, forward and backward: the best of a few after a first, which
    chooses kernels. Weights, modes and generators are left as they were."""
    devices.use_precision(bf16)
    xt = torch.zeros(n, *shape, device=device).contiguous(memory_format=torch.channels_last)
    t, best, began = torch.ones(n, dtype=torch.int64, device=device), float("inf"), time.monotonic()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout draws
        for i in itertools.count():
            start = time.monotonic()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = net(xt, t).float().square().mean()
            loss.backward()
            loss.item()  # waits for the device
            if i:
                best = min(best, time.monotonic() - start)
            if i and (i == 5 or time.monotonic() - began > 0.5):
                break
    net.zero_grad()
    return best / n


def used(device):
    """The most bytes that this process has taken: of a GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def short(seconds):
    return f"{seconds:.2g}" if seconds < 10 else f"{seconds:,.0f}"


def gigabytes(count):
    """Bytes as a person reads them."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"

"""Time and memory of a training step on this machine; from them the precision and the micro-batch.

Memory is counted before anything is computed, on a network without numbers. Time is measured, in
steps that leave weights and generators as they were.
"""

import contextlib
import math
import os
import pathlib
import sys
import time
from typing import NamedTuple

import torch

import ddpm
from support import devices, workers
from support.errors import Failure
from support.progress import note, say

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None


class Cost(NamedTuple):
    """A training step on this machine."""

    precision: str  # "fp32" or "bf16"
    micro_batch: int  # images that are computed at a time
    seconds: float  # of the whole step
    memory: int  # bytes of the whole process while it trains; of a GPU's memory if there is one
    free: int  # bytes before the step

    def __str__(self):
        return (
            f"about {self.seconds:.3f} seconds in {self.precision}, {self.micro_batch} images at a "
            f"time; about {gigabytes(self.memory)} in all, and {gigabytes(self.free)} are free"
        )


def gigabytes(count):
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


# --- Memory --------------------------------------------------------------------------------------


def memory(network, shape):
    """Return the number of weights of UNet(**network), and the bytes that a step keeps for each image."""
    with torch.device("meta"):  # tensors that have a shape and no numbers
        net = ddpm.UNet(**network).to(memory_format=torch.channels_last)
        one, two = (kept(net, torch.empty(n, *shape), torch.ones(n).long()) for n in (1, 2))
    return sum(weight.numel() for weight in net.parameters()), two - one


def kept(net, xt, t):
    """Return the bytes that a forward pass keeps for its backward pass."""
    tensors = {}  # one per storage, and alive, so that no other tensor takes its address

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            tensors[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(xt.contiguous(memory_format=torch.channels_last), t)
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


def check(network, shape, batch_size, device):
    """Raise Failure if not even one image at a time fits into the free memory. Allocates nothing."""
    weights, image = memory(network, shape)
    # Weights, average, gradient and Adam's two averages; the batch with its noise, in float32.
    needed = 5 * 4 * weights + image + 3 * 4 * batch_size * math.prod(shape)
    free = free_memory(device)
    if needed > free:
        raise Failure(
            f"a training step needs {gigabytes(needed)} even with one image at a time, and "
            f"{gigabytes(free)} are free; try a smaller --width, --size or --batch-size"
        )


def free_memory(device):
    """Return the bytes that this process may still use on a device; 4 GiB where that is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free = 4 * 2**30
    with contextlib.suppress(OSError):  # Linux only
        available = pathlib.Path("/proc/meminfo").read_text().split("MemAvailable:")[1]
        free = 1024 * int(available.split()[0])
    with contextlib.suppress(OSError, ValueError):  # the limit of a container: a number, or "max"
        group = pathlib.Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return max(0, free) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of a torchrun


def used(device):
    """Return the most bytes that this process has used so far; 0 where that cannot be read."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- Time ----------------------------------------------------------------------------------------


def trial(net, about, batch, device, precision="auto", micro_batch=None):
    """Return the Cost of a step of `batch` images in this process, from trial steps.

    about: the network's arguments and the shape of an image. precision: "auto", the faster one,
    "fp32" or "bf16". micro_batch: None for as many images as need at most half of the free memory,
    since more at a time are never slower. On a GPU without enough memory, it is halved. Several
    processes agree.
    """
    say(f"trying a step of {batch:,} images, for its time and memory")
    free = free_memory(device)
    before = used(device)
    weights, image = memory(about["network"], about["shape"])
    n = min(batch, micro_batch or max(1, int((free / 2 - 12 * weights) / image)))
    names = [precision]
    if precision == "auto":
        names = ["fp32", "bf16"] if devices.has_bf16(device) else ["fp32"]
    while True:
        try:
            seconds = measure(net, about["shape"], n, device, names)
            break
        except torch.OutOfMemoryError:
            if n == 1:
                raise
            torch.cuda.empty_cache()
            n = n // 2
    # The slowest process decides: the others wait for it. Seconds are those of an image.
    *seconds, n = workers.largest(torch.tensor([*seconds, -n], device=device)).cpu().tolist()
    bf16 = len(names) == 2 and seconds[1] < 0.9 * seconds[0]  # less may be noise
    precision = names[bf16]
    devices.use_precision(precision == "bf16")
    n = math.ceil(batch / math.ceil(batch / -n))  # parts of one size
    if device.type == "cuda":  # the memory of the trial is not the run's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    if device.type == "cpu" and hasattr(os, "getloadavg"):
        load = os.getloadavg()[0]
        if load > os.cpu_count() + 1:
            note(f"note: this machine is busy (load {load:.0f}), so the time is a rough estimate")
    return Cost(precision, n, batch * seconds[bf16], before + 12 * weights + n * image, free)


def measure(net, shape, n, device, names):
    """Return the seconds per image in each precision: the best of a few steps.

    The precisions take turns, because another program may slow down some of the steps.
    """
    best = [math.inf for _ in names]
    began = time.monotonic()
    for _ in range(5):
        for i, name in enumerate(names):
            best[i] = min(best[i], timed(net, shape, n, device, name) / n)
        if time.monotonic() - began > 10:
            break
    return best


def timed(net, shape, n, device, precision):
    """Return the seconds of a forward and backward pass. Weights and generators stay as they were."""
    devices.use_precision(precision == "bf16")
    xt = torch.zeros(n, *shape, device=device).contiguous(memory_format=torch.channels_last)
    t = torch.ones(n, dtype=torch.int64, device=device)
    start = time.monotonic()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # of dropout
        with devices.autocast(device, precision):
            loss = net(xt, t).float().square().mean()
        loss.backward()
        loss.item()  # waits for the device
    seconds = time.monotonic() - start
    net.zero_grad()
    return seconds

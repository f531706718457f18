"""The processes that share one run, as torchrun starts them.

Without torchrun there is one process, and every function here returns at once.
"""

import contextlib
import os
from datetime import timedelta

import torch
import torch.distributed as dist


def place():
    """Return (rank, world): the number of this process, from 0, and the number of processes."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def several():
    return place()[1] > 1


def is_first():
    """Return whether this process prints and writes files."""
    return place()[0] == 0


def own_device(name):
    """Return the GPU of this process if it is one of several; otherwise `name`."""
    if several() and torch.cuda.is_available() and name in ("auto", "cuda"):
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return name


def meet(device):
    """Connect the processes, by NCCL between GPUs and by gloo elsewhere."""
    if several():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(hours=6),  # the others wait while the first decodes images
            device_id=device if device.type == "cuda" else None,
        )


def together(model):
    """Return the model; its gradients are averaged over the processes from now on."""
    return torch.nn.parallel.DistributedDataParallel(model) if several() else model


def skip_all_reduce(model, when):
    """Return a context that skips the gradient all-reduce: it is needed for the last micro-batch only."""
    return model.no_sync() if several() and when else contextlib.nullcontext()


@contextlib.contextmanager
def first_goes_ahead():
    """Let the first process run the block before the others, which then read the files it wrote."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def total(numbers):
    """Return the sum of a tensor over all processes, in place."""
    if several():
        dist.all_reduce(numbers)
    return numbers


def largest(numbers):
    """Return the elementwise maximum of a tensor over all processes, in place."""
    if several():
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers


def wait():
    """Wait for all processes. torchrun ends all of them once one has ended."""
    if several():
        dist.barrier()


def end():
    if several():
        dist.destroy_process_group()

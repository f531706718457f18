"""The processes that share one run, as torchrun starts them: which one is this, wait, agree, end.

A run without torchrun has one process; every function here then returns at once.
"""

import contextlib
import os
import re
import signal
from datetime import timedelta

import torch
import torch.distributed as dist

from support.command import interrupter, on_ending_signals
from support.errors import UsageError

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
TORCHRUN = (*NUMBERS, "MASTER_ADDR")


def place():
    """(rank, world): the number of this process, from 0, and how many there are.

    An empty variable counts as none. Raises UsageError for half of torchrun's variables, as a cluster may
    leave them, and for numbers that no torchrun sets.
    """
    found = {name: os.environ.get(name) or None for name in TORCHRUN}
    if (found["WORLD_SIZE"] or "1") == "1":
        return 0, 1
    numbers = [
        int(found[name]) for name in NUMBERS if re.fullmatch("[0-9]{1,9}", found[name] or "")
    ]
    if len(numbers) < len(NUMBERS) or not found["MASTER_ADDR"]:
        raise UsageError(
            f"the environment has WORLD_SIZE={found['WORLD_SIZE']}, but not what torchrun sets "
            f"({', '.join(TORCHRUN)}); start with torchrun, or unset WORLD_SIZE"
        )
    rank, world, local, port = numbers
    if not (rank < world and local <= rank and 0 < port < 2**16):
        said = ", ".join(f"{name}={found[name]}" for name in NUMBERS)
        raise UsageError(
            f"the environment has {said}, which no torchrun sets; start with torchrun, or unset "
            "WORLD_SIZE"
        )
    return rank, world


def here():
    """How many of the processes are on this machine."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(local) if several() and local.isdecimal() and int(local) else place()[1]


def several():
    return place()[1] > 1


def is_first():
    """Whether this process speaks and writes files."""
    return place()[0] == 0


def share(batch_size):
    """Raises UsageError if the processes cannot share a batch evenly."""
    world = place()[1]
    if batch_size % world:
        raise UsageError(
            f"--batch-size {batch_size} cannot be divided evenly among {world} processes"
        )


def own_device(name):
    """The GPU of this process, if it is one of several on a machine; otherwise `name`."""
    if several() and torch.cuda.is_available() and name in ("auto", "cuda"):
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return name


def meet(device):
    """Connects the processes: NCCL between GPUs, gloo elsewhere. Waits for all of them; meanwhile a signal
    ends the process at once, since native code hears no handler of Python's. Nothing is done by then."""
    if several():
        cuda = device.type == "cuda"
        on_ending_signals(signal.SIG_DFL)
        try:
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                timeout=timedelta(hours=6),
                device_id=device if cuda else None,
            )
        finally:
            on_ending_signals(interrupter())


def together(model):
    """The model, whose gradients are from now on averaged over the processes."""
    return torch.nn.parallel.DistributedDataParallel(model) if several() else model


def unsummed(model, unless):
    """A context for a part of a batch: gradients are averaged over the processes with the last one only."""
    return model.no_sync() if several() and not unless else contextlib.nullcontext()


@contextlib.contextmanager
def first_goes_ahead():
    """The first process runs the block before the others: it downloads and decodes, they read its files."""
    if several() and not is_first():
        dist.barrier()
    yield
    if several() and is_first():
        dist.barrier()


def total(numbers):
    """The sum of a tensor over all processes."""
    if several():
        dist.all_reduce(numbers)
    return numbers


def largest(numbers):
    """The largest of each number of a tensor over all processes."""
    if several():
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers


def wait():
    """Waits for all processes. torchrun ends all of them when one has ended."""
    if several():
        dist.barrier()


def end():
    if several():
        dist.destroy_process_group()

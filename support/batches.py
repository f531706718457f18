"""The batch of a step. It depends on the seed and the step alone.

No generator is carried from step to step. A resumed run therefore draws what an uninterrupted one draws,
and several processes make the batches of one.
"""

import functools

import numpy as np
import torch

import ddpm
import improved
from support import workers


def mixed(*numbers):
    """One well-mixed 64-bit seed from several small numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def draw(step, data, d, device, batch_size, seed, flip=False):
    """x0, labels or None, t and eps of a step: this process's share, on `device`, but t on the CPU.

    data.images are uint8 (N, C, H, W), on the CPU or on `device`. A tenth of the labels is dropped.
    """
    rank, world = workers.place()
    torch.manual_seed(mixed(seed, 1, step))
    B, N, cuda = batch_size, len(data.images), device.type == "cuda"
    mine = slice(rank * B // world, (rank + 1) * B // world)
    i, y = places(step, B, N, seed), None
    x0 = data.images[i[mine].to(data.images.device, non_blocking=cuda)].to(
        device, non_blocking=cuda
    )
    x0 = x0.float() / 127.5 - 1
    if data.labels is not None:
        y = improved.drop_labels(data.labels[i], len(data.classes))[mine].to(
            device, non_blocking=cuda
        )
    if flip:
        mirror = (torch.rand(B) < 0.5)[mine].to(device, non_blocking=cuda)
        x0 = torch.where(mirror[:, None, None, None], x0.flip(3), x0)
    t = torch.randint(1, d.T + 1, (B,))[mine]
    eps = torch.randn(B, *x0.shape[1:], device=device)[mine]
    if world > 1:  # what follows is dropout, whose masks must differ between the processes
        torch.manual_seed(mixed(seed, 3, step, rank))
    return x0.contiguous(memory_format=torch.channels_last), y, t, eps


def fixed(data, T, count, device, at_a_time):
    """x0, labels or None, t and eps, as draw() gives them, a few at a time: `count` draws, the same ones at
    each call, of the images in turn and of evenly spaced t."""
    order = torch.from_numpy(
        np.random.default_rng(0).permutation(count)
    )  # so that no class has its own t
    for first in range(0, count, at_a_time):
        k = torch.arange(first, min(count, first + at_a_time))
        i, t = k % len(data.images), 1 + (2 * order[k] + 1) * T // (2 * count)
        x0 = data.images[i].to(device).float() / 127.5 - 1
        y = None if data.labels is None else data.labels[i].to(device)
        eps = ddpm.noise_like(x0, [torch.Generator().manual_seed(mixed(4, n)) for n in k.tolist()])
        yield x0.contiguous(memory_format=torch.channels_last), y, t, eps


def places(step, B, N, seed):
    """The images of a step: B numbers of an endless row of shuffles of all N, one shuffle an epoch."""
    place = torch.arange(step * B, (step + 1) * B)
    epochs = range(step * B // N, ((step + 1) * B - 1) // N + 1)
    return torch.cat([shuffle(N, seed, e)[place[place // N == e] % N] for e in epochs])


@functools.lru_cache(maxsize=2)
def shuffle(N, seed, epoch):
    return torch.randperm(N, generator=torch.Generator().manual_seed(mixed(seed, 2, epoch)))

"""The random numbers of a training step. They depend on the seed and the step only.

So a resumed run uses those of an uninterrupted one, and several processes share the batch of one.
"""

import functools

import numpy as np
import torch

import improved
from support import sampling, workers


def mixed(*numbers):
    """Return one well-mixed 64-bit seed from several small numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def sample_batch(step, data, T, batch_size, seed, flip, device):
    """Return x0 (B, C, H, W), labels (B,) or None, t (B,) and eps of a step: this process's share.

    x0 is in [-1, 1]. Everything is on `device`, except t, which stays on the CPU. A tenth of the
    labels is dropped.
    """
    rank, world = workers.place()
    mine = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    move = functools.partial(torch.Tensor.to, device=device, non_blocking=device.type == "cuda")
    i = images_of(step, batch_size, len(data.images), seed)
    x0, y = data.batch(i[mine], device)
    # The order of these random numbers is part of the checkpoint format: labels, flip, t, eps.
    torch.manual_seed(mixed(seed, 1, step))
    if data.labels is not None:
        y = move(improved.drop_labels(data.labels[i], len(data.classes))[mine])
    if flip:
        mirror = move((torch.rand(batch_size, 1, 1, 1) < 0.5)[mine])
        x0 = torch.where(mirror, x0.flip(3), x0)
    t = torch.randint(1, T + 1, (batch_size,))[mine]
    eps = torch.randn(batch_size, *x0.shape[1:], device=device)[mine]
    if world > 1:  # what follows is dropout, whose masks must differ between the processes
        torch.manual_seed(mixed(seed, 3, step, rank))
    return x0.contiguous(memory_format=torch.channels_last), y, t, eps


def on_device(data, device):
    """Return the data with its images on a GPU if they take at most a quarter of its free memory."""
    need = data.images.shape.numel()
    fits = device.type == "cuda" and need < 0.25 * torch.cuda.mem_get_info(device)[0]
    return data._replace(images=data.images[:].to(device)) if fits else data


def images_of(step, B, N, seed):
    """Return the B image numbers of a step. One shuffle of all N images follows another."""
    place = torch.arange(step * B, (step + 1) * B)
    epochs = range(step * B // N, ((step + 1) * B - 1) // N + 1)
    return torch.cat([shuffle(N, seed, e)[place[place // N == e] % N] for e in epochs])


@functools.lru_cache(maxsize=2)
def shuffle(N, seed, epoch):
    return torch.randperm(N, generator=torch.Generator().manual_seed(mixed(seed, 2, epoch)))


def fixed_batches(data, T, count, micro_batch, device):
    """Yield x0, labels or None, t and eps, a few at a time: `count` in total, the same at each call.

    The images take turns, and t is evenly spaced over 1..T, in an order that no class can follow.
    """
    order = torch.from_numpy(np.random.default_rng(0).permutation(count))
    for k in torch.arange(count).split(micro_batch):
        x0, y = data.batch(k % len(data.images), device)
        t = 1 + (2 * order[k] + 1) * T // (2 * count)
        eps = sampling.image_noise([mixed(4, n) for n in k.tolist()])(x0)
        yield x0.contiguous(memory_format=torch.channels_last), y, t, eps

"""Images from a network, one for each seed, by the sampler that is asked for.

train.py draws its grids with it, sample.py its pictures.
"""

import numpy as np
import torch

import ddpm
import improved
from support.errors import UsageError


def sample(
    net,
    d,
    shape,
    seeds,
    labels=None,
    steps=None,
    eta=None,
    variance="beta",
    guidance=0.0,
    clip=True,
    grid="even",
    on_step=None,
):
    """x0 (N, C, H, W) in [-1, 1], on the network's device: one image of `shape` for each of N seeds.

    steps: how many of the T, by one of GRIDS; all of them by default. eta: DDIM, with this much noise;
    None: Algorithm 2 with `variance`, which is "beta", "beta_tilde" or "learned". labels: N classes, guided
    by w = `guidance`. clip: x0 to [-1, 1], at every step. on_step(s, xs) is called after every step. A seed
    gives one image at any batch size.
    """
    device, model = next(net.parameters()).device, net
    if labels is not None:
        y = torch.as_tensor(np.asarray(labels), device=device).long()
        model = improved.guided(net, y, net.num_classes, guidance)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    xT = ddpm.noise_like(torch.empty(len(seeds), *shape, device=device), generators)
    chosen = GRIDS[grid](d.T, steps or d.T)
    how = dict(clip=clip, generator=generators, on_step=on_step)
    if (
        eta is None and len(chosen) < d.T
    ):  # a diffusion of those steps alone, with variances of its own
        model, d = improved.strided(model, d, chosen)
    if eta is None and variance == "learned":
        return improved.sample_ancestral(model, d, xT, **how)
    if net.conv_out.out_channels > shape[0]:
        model = improved.eps_only(model)
    if eta is None:
        return ddpm.sample_ancestral(model, d, xT, getattr(d, variance), **how)
    return ddpm.sample_ddim(model, d, xT, chosen, eta, **how)


def quadratic_grid(T, n):
    """n of the steps 1..T, dense near 1: T (i/n)^2, rounded up, or i if that is less. DDIM's paper chooses
    its steps so for CIFAR-10 (sec. D.2); T is the last one here, and 0.8 T in its authors' code."""
    return [max(i, -(-T * i * i // n**2)) for i in range(1, n + 1)]


GRIDS = {"even": ddpm.ddim_grid, "quadratic": quadratic_grid}


def class_labels(classes, label=None, n=None):
    """The labels (n,) of the images to draw, and the rows of their grid, one for each class.

    label: a name of `classes`, several with commas, or "all", the default; they take turns. n: 64 by
    default, or up to 8 of each class. Raises UsageError for a name that is no class.
    """
    chosen = list(classes) if label in (None, "all") else [label]
    if label is not None and not (classes and set(chosen) <= set(classes)):
        chosen = [name.strip() for name in label.split(",")]
    for name in chosen:
        if name not in classes:
            known = f"its classes are {', '.join(classes)}" if classes else "it knows no classes"
            raise UsageError(f"--label {name}: not a class of this checkpoint; {known}")
    numbers, K = [classes.index(name) for name in chosen] or [0], max(1, len(chosen))
    n = n or (64 if K == 1 else K * max(1, min(8, 128 // K)))
    return np.resize(numbers, n), round(n**0.5) if K == 1 else min(n, K)

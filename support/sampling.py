"""Sample images from a network, one for each seed, with the requested sampler."""

import unicodedata

import numpy as np
import torch

import ddpm
import improved
from support.errors import UsageError


def image_seeds(seed, images):
    """Return the generator seeds of these image numbers under --seed. Different seeds share no images."""
    return [(i + 2654435769 * seed) % 2**32 for i in images]


def image_noise(seeds):
    """Return a function noise(x) for ddpm.py's samplers, with one generator for each image of x.

    So the noise of an image does not depend on its batch, and on the CPU or a GPU it is the same.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise(x):
        z = [torch.randn(x.shape[1:], generator=one, dtype=x.dtype) for one in generators]
        return torch.stack(z).to(x.device)

    return noise


def sample(net, d, shape, seeds, labels=None, steps=None, eta=None, variance="beta",
           guidance=0.0, clip=True, spacing="even", on_step=None):  # fmt: skip
    """Sample an image of `shape` (C, H, W) for each of N seeds: (N, C, H, W) in [-1, 1].

    steps: the number of timesteps (default: T), chosen by SPACINGS[spacing]. eta: use DDIM with this
    much noise; with None, use Algorithm 2 with `variance` ("beta", "beta_tilde" or "learned").
    labels (N,) are guided with w = guidance. on_step(s, xs) is called after every step.
    """
    device = next(net.parameters()).device
    model = net
    if labels is not None and net.num_classes:
        y = torch.as_tensor(labels, dtype=torch.int64, device=device)
        model = improved.guided(net, y, net.num_classes, guidance)
    noise = image_noise(seeds)
    xT = noise(torch.empty(len(seeds), *shape, device=device))
    timesteps = SPACINGS[spacing](d.T, steps or d.T)
    how = dict(clip=clip, noise=noise, on_step=on_step)
    if eta is None and len(timesteps) < d.T:
        model, d = improved.respaced(model, d, timesteps)
    if eta is None and variance == "learned":
        return improved.sample_ancestral(model, d, xT, **how)
    if net.conv_out.out_channels > shape[0]:
        model = improved.eps_only(model)
    if eta is None:
        return ddpm.sample_ancestral(model, d, xT, getattr(d, variance), **how)
    return ddpm.sample_ddim(model, d, xT, timesteps, eta=eta, **how)


def quadratic_timesteps(T, n):
    """Return n of the timesteps 1..T, dense near 1: T (i/n)^2 rounded up, or i if that is less.

    DDIM's paper uses this spacing for CIFAR-10 (sec. D.2). It ends at T, in its authors' code at 0.8 T.
    """
    return [max(i, -(-T * i * i // n**2)) for i in range(1, n + 1)]


SPACINGS = {"even": ddpm.ddim_timesteps, "quadratic": quadratic_timesteps}


def class_labels(classes, names=None, n=None):
    """Return the labels int64 (n,) of the images to sample, and the number of rows of their grid.

    names: values of --label, each a class, several with commas, or "all" (the default). The classes
    take turns, so a grid has a row for each. n: by default 64, or up to 8 images of each class.
    """
    # macOS and Linux write the same accented name with different characters.
    known = [unicodedata.normalize("NFC", name) for name in classes]
    chosen = []
    for text in ["all"] if names is None else names:
        text = unicodedata.normalize("NFC", text)
        # An exact name first: it may be "all", or contain a comma.
        for name in [text] if text in known else text.split(","):
            every = name.strip() == "all" and "all" not in known
            chosen += known if every else [name.strip()]
    for name in chosen:
        if name not in known:
            raise UsageError(f"--label {name}: not a class; choose from {', '.join(known)}")
    numbers = [known.index(name) for name in chosen] or [0]
    K = len(numbers)
    if n is None:
        n = 64 if K == 1 else K * max(1, min(8, 128 // K))
    return np.resize(numbers, n), round(n**0.5) if K == 1 else min(n, K)

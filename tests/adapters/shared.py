"""What the adapters share. The libraries count steps from 0, where ours are 1..T. What one of them has no
public way to do raises NotImplementedError, which counts as absent.
"""

import torch
from torch.nn.functional import pad


def absent_if(condition, what):
    if condition:
        raise NotImplementedError(what)


def table(values, first):
    """A table [0..T] of the library's values for 1..T."""
    return pad(torch.as_tensor(values), (1, 0), value=first)


def from_0(t, x):
    """Our t, an int or one for each image of x, as the library counts: t - 1, for each image."""
    t = torch.as_tensor(t).reshape(-1)
    absent_if(0 in t, "t = 0, the clean image, is no step there")
    return t.expand(len(x)) - 1 if len(t) == 1 else t - 1


def kind_of(sigma2, d, beta, beta_tilde):
    """The library's name for the variances sigma2: the one given for d.beta, or that for d.beta_tilde."""
    absent_if(
        sigma2 is not d.beta and sigma2 is not d.beta_tilde,
        "variances other than beta and beta_tilde",
    )
    return beta if sigma2 is d.beta else beta_tilde


@torch.no_grad()
def report(states, grid, on_step):
    """Tell on_step(s, xs) each state of a library's loop along the grid, and return the last."""
    for s, xs in zip([0, *grid[:-1]][::-1], states, strict=True):
        if on_step:
            on_step(s, xs)
    return xs

"""Helpers of the adapters. Other libraries count timesteps from 0, and ours are 1..T.

Where a library has no public way to do something, its adapter raises NotImplementedError. The specification then
skips the test and counts it as absent.
"""

from types import SimpleNamespace

import torch
from torch.nn.functional import pad


def absent_if(condition, what):
    """Raise NotImplementedError if the condition holds."""
    if condition:
        raise NotImplementedError(what)


def table(values, first):
    """Return a table [0..T] of the library's values for 1..T."""
    return pad(torch.as_tensor(values), (1, 0), value=first)


def from_0(t, x):
    """Return t - 1 (B,), the library's timesteps. t is an int or a tensor (B,) or (1,)."""
    t = torch.as_tensor(t).reshape(-1)
    absent_if(0 in t, "t = 0, the clean image, is not a timestep there")
    return t.expand(len(x)) - 1 if len(t) == 1 else t - 1


def counting_from_0(model):
    """Return the model (xt, t) for timesteps that are counted from 0."""
    return lambda xt, t, **_: model(xt, t + 1)


def kind_of(sigma2, d, beta, beta_tilde):
    """Return the library's name for the variances sigma2: `beta` for None or d.beta, or `beta_tilde`."""
    if sigma2 is None or sigma2 is d.beta:
        return beta
    absent_if(sigma2 is not d.beta_tilde, "variances other than beta and beta_tilde")
    return beta_tilde


def unet_settings(in_channels=3, out_channels=None, **given):
    """Return the settings of ddpm.UNet: the given ones, and its defaults."""
    settings = dict(ch=128, mult=(1, 2, 2, 2), blocks=2, attention=(1,), dropout=0.1, groups=32)
    settings.update(given, in_channels=in_channels, out_channels=out_channels or in_channels)
    absent_if(settings.pop("num_classes", None), "labels with a row for no label")
    return SimpleNamespace(**settings)


def process(d, betas, alpha_bar, beta_tilde):
    """Give d the tables of ddpm.Diffusion from the library's values for 1..T."""
    d.T = len(betas)
    d.beta = table(betas, 0.0)
    d.alpha = table(1 - betas, 1.0)
    d.alpha_bar = table(alpha_bar, 1.0)
    d.beta_tilde = table(beta_tilde, torch.nan)


@torch.no_grad()
def report(states, timesteps, on_step):
    """Call on_step(s, xs) for each state of a library's loop, and return the last state."""
    for s, xs in zip([0, *timesteps[:-1]][::-1], states, strict=True):
        if on_step:
            on_step(s, xs)
    return xs

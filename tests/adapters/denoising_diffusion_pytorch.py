"""lucidrains' denoising-diffusion-pytorch by ddpm.py's names. Its Unet is another network than the paper's,
and is not judged. What it has no way to do raises NotImplementedError, which counts as absent.

Steps count from 0 there, images are (B, C, H, W), and betas come from a function that is known by name.
"""

from unittest import mock

import torch
from denoising_diffusion_pytorch import denoising_diffusion_pytorch as theirs
from torch.nn.functional import pad


def linear_schedule(T=1000, beta_1=None, beta_T=None):
    if beta_1 is not None:
        raise NotImplementedError("other ends than 0.1 / T and 20 / T")
    return pad(theirs.linear_beta_schedule(T), (1, 0))


def cosine_schedule(T=1000, s=0.008):
    return pad(theirs.cosine_beta_schedule(T, s), (1, 0))


def steps(t, x):
    """t - 1, for each image."""
    t = torch.as_tensor(t).reshape(-1)
    if 0 in t:
        raise NotImplementedError("t = 0, the clean image, is no step there")
    return t.expand(len(x)) - 1 if len(t) == 1 else t - 1


class Model(torch.nn.Module):
    """A model (xt, t) of images of any shape, as theirs of (B, 1, 1, N)."""

    channels = out_dim = 1
    self_condition = False

    def __init__(self, model, shape):
        super().__init__()
        self.model, self.shape = model, shape

    def forward(self, xt, t, _):
        return self.model(xt.reshape(self.shape), t + 1).reshape(xt.shape)


class Diffusion:
    def __init__(self, beta):
        beta = torch.as_tensor(beta)
        self.theirs = lambda model=None, shape=(), **how: self.make(beta[1:], model, shape, **how)
        d = self.theirs()
        self.T, self.beta = d.num_timesteps, pad(d.betas, (1, 0))
        self.alpha, self.alpha_bar = 1 - self.beta, pad(d.alphas_cumprod, (1, 0), value=1.0)
        self.beta_tilde = pad(d.posterior_variance, (1, 0), value=float("nan"))

    @staticmethod
    def make(betas, model, shape, **how):
        with mock.patch.object(theirs, "linear_beta_schedule", lambda T: betas):
            return theirs.GaussianDiffusion(
                Model(model, shape),
                image_size=1,
                timesteps=len(betas),
                beta_schedule="linear",
                objective="pred_noise",
                auto_normalize=False,
                **how,
            )

    def q_sample(self, x0, t, eps):
        return self.theirs().q_sample(x0, steps(t, x0), eps)

    def posterior_mean(self, x0, xt, t):
        return self.theirs().q_posterior(x0, xt, steps(t, xt))[0]

    def x0_from_eps(self, xt, t, eps):
        return self.theirs().predict_start_from_noise(xt, steps(t, xt), eps)

    def eps_from_x0(self, xt, t, x0):
        return self.theirs().predict_noise_from_start(xt, steps(t, xt), x0)

    def p_mean(self, xt, t, eps, clip=True):
        d = self.theirs(lambda xt, t: eps, xt.shape)
        return d.p_mean_variance(xt, steps(t, xt), clip_denoised=clip)[0]


def loss_simple(model, d, x0, t=None, eps=None):
    flat, d = x0.reshape(len(x0), 1, 1, -1), d.theirs(model, x0.shape)
    t = d.random_times(len(x0)) if t is None else steps(t, x0)
    return d.p_losses(flat, t, None if eps is None else eps.reshape(flat.shape))


def sample_ancestral(model, d, xt, sigma2=None, clip=True, generator=None, on_step=None):
    """p_sample, which draws from the global generator, clips, and takes beta_tilde."""
    if not clip or not (sigma2 is None or sigma2 is d.beta_tilde):
        raise NotImplementedError("sampling without clipping, or with another variance than beta_tilde")
    theirs_ = d.theirs(model, xt.shape)
    for t in range(d.T, 0, -1):
        xt, _ = theirs_.p_sample(xt, t - 1)
        if on_step:
            on_step(t - 1, xt)
    return xt


def sample_ddim(model, d, xt, grid, eta=0.0, clip=True, generator=None, on_step=None):
    """ddim_sample, which draws xT itself, clips, and has one grid for each number of steps."""
    grid = list(grid)
    if not clip or torch.linspace(-1, d.T - 1, len(grid) + 1).int().tolist() != [-1, *[t - 1 for t in grid]]:
        raise NotImplementedError("sampling without clipping, or on another grid than the even one")
    theirs_ = d.theirs(model, xt.shape, sampling_timesteps=len(grid), ddim_sampling_eta=eta)
    with mock.patch.object(torch, "randn", lambda *shape, **how: xt):
        states = theirs_.ddim_sample(xt.shape, return_all_timesteps=True).unbind(1)
    for s, x in zip([0, *grid[:-1]][::-1], states[1:]):
        if on_step:
            on_step(s, x)
    return states[-1]


def timestep_embedding(t, dim):
    return theirs.SinusoidalPosEmb(dim)(t)

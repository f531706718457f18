"""lucidrains' denoising-diffusion-pytorch under the names of ddpm.py.

Images are (B, C, H, W) there, and betas come from a function that is found by its name. Its Unet is another
network than the paper's, so it is not tested. Noise comes from the global generator.
"""

from unittest import mock

import torch
from adapters import shared
from denoising_diffusion_pytorch import denoising_diffusion_pytorch as library


def linear_schedule(T=1000, beta_1=None, beta_T=None):
    shared.absent_if(beta_1 is not None, "other ends than 0.1 / T and 20 / T")
    return shared.table(library.linear_beta_schedule(T), 0.0)


def cosine_schedule(T=1000, s=0.008):
    return shared.table(library.cosine_beta_schedule(T, s), 0.0)


class Model(torch.nn.Module):
    """A model (xt, t) of images of any shape, for images (B, 1, 1, N)."""

    channels = out_dim = 1
    self_condition = False

    def __init__(self, model, shape):
        super().__init__()
        self.model = model
        self.shape = shape

    def forward(self, xt, t, _):
        return self.model(xt.reshape(self.shape), t + 1).reshape(xt.shape)


class Diffusion:
    def __init__(self, beta):
        self.betas = torch.as_tensor(beta)[1:]
        d = self.library()
        shared.process(self, d.betas, d.alphas_cumprod, d.posterior_variance)

    def library(self, model=None, shape=(), **how):
        with mock.patch.object(library, "linear_beta_schedule", lambda T: self.betas):
            return library.GaussianDiffusion(
                Model(model, shape), image_size=1, timesteps=len(self.betas), beta_schedule="linear",
                objective="pred_noise", auto_normalize=False, **how)  # fmt: skip

    def q_sample(self, x0, t, eps):
        return self.library().q_sample(x0, shared.from_0(t, x0), eps)

    def posterior_mean(self, x0, xt, t):
        return self.library().q_posterior(x0, xt, shared.from_0(t, xt))[0]

    def x0_from_eps(self, xt, t, eps):
        return self.library().predict_start_from_noise(xt, shared.from_0(t, xt), eps)

    def eps_from_x0(self, xt, t, x0):
        return self.library().predict_noise_from_start(xt, shared.from_0(t, xt), x0)

    def p_mean(self, xt, t, eps, *, clip=True):
        d = self.library(lambda xt, t: eps, xt.shape)
        return d.p_mean_variance(xt, shared.from_0(t, xt), clip_denoised=clip)[0]


def loss_simple(model, d, x0, t=None, eps=None):
    flat = x0.reshape(len(x0), 1, 1, -1)
    d = d.library(model, x0.shape)
    t = d.random_times(len(x0)) if t is None else shared.from_0(t, x0)
    return d.p_losses(flat, t, None if eps is None else eps.reshape(flat.shape))


def states(loop, xt):
    """Return the states of a loop that starts from xt instead of its own noise."""
    with mock.patch.object(torch, "randn", lambda *_, **__: xt):
        return loop(xt.shape, return_all_timesteps=True).unbind(1)[1:]


def only_beta_tilde(d, sigma2, clip):
    shared.absent_if(not clip, "sampling without clipping")
    shared.absent_if(
        sigma2 is not None and sigma2 is not d.beta_tilde, "another variance than beta_tilde"
    )


def ancestral_step(d, xt, t, eps, sigma2=None, *, clip=True):
    only_beta_tilde(d, sigma2, clip)
    return d.library(lambda xt, t: eps, xt.shape).p_sample(xt, t - 1)[0]


def sample_ancestral(model, d, xt, sigma2=None, *, clip=True, on_step=None):
    only_beta_tilde(d, sigma2, clip)
    return shared.report(
        states(d.library(model, xt.shape).p_sample_loop, xt), range(1, d.T + 1), on_step
    )


def sample_ddim(model, d, xt, timesteps, *, eta=0.0, clip=True, on_step=None):
    """ddim_sample clips, and has one set of timesteps for each number of steps."""
    shared.absent_if(not clip, "sampling without clipping")
    even = torch.linspace(-1, d.T - 1, len(timesteps) + 1).int() + 1
    shared.absent_if([0, *timesteps] != even.tolist(), "timesteps that are not evenly spaced")
    how = {"sampling_timesteps": len(timesteps), "ddim_sampling_eta": eta}
    return shared.report(
        states(d.library(model, xt.shape, **how).ddim_sample, xt), timesteps, on_step
    )


def timestep_embedding(t, dim):
    return library.SinusoidalPosEmb(dim)(t)

"""lucidrains' denoising-diffusion-pytorch by ddpm.py's names. Its Unet is another network than the paper's,
and is not judged. Images are (B, C, H, W) there, and betas come from a function that is known by name.
"""

from unittest import mock

import torch
from adapters.shared import absent_if, from_0, report, table
from denoising_diffusion_pytorch import denoising_diffusion_pytorch as library


def linear_schedule(T=1000, beta_1=None, beta_T=None):
    absent_if(beta_1 is not None, "other ends than 0.1 / T and 20 / T")
    return table(library.linear_beta_schedule(T), 0.0)


def cosine_schedule(T=1000, s=0.008):
    return table(library.cosine_beta_schedule(T, s), 0.0)


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
        self.betas = torch.as_tensor(beta)[1:]
        d = self.theirs()
        self.T, self.beta, self.alpha = (
            d.num_timesteps,
            table(d.betas, 0.0),
            table(1 - d.betas, 1.0),
        )
        self.alpha_bar, self.beta_tilde = (
            table(d.alphas_cumprod, 1.0),
            table(d.posterior_variance, torch.nan),
        )

    def theirs(self, model=None, shape=(), **how):
        with mock.patch.object(library, "linear_beta_schedule", lambda T: self.betas):
            return library.GaussianDiffusion(
                Model(model, shape), image_size=1, timesteps=len(self.betas), beta_schedule="linear",
                objective="pred_noise", auto_normalize=False, **how)  # fmt: skip

    def q_sample(self, x0, t, eps):
        return self.theirs().q_sample(x0, from_0(t, x0), eps)

    def posterior_mean(self, x0, xt, t):
        return self.theirs().q_posterior(x0, xt, from_0(t, xt))[0]

    def x0_from_eps(self, xt, t, eps):
        return self.theirs().predict_start_from_noise(xt, from_0(t, xt), eps)

    def eps_from_x0(self, xt, t, x0):
        return self.theirs().predict_noise_from_start(xt, from_0(t, xt), x0)

    def p_mean(self, xt, t, eps, clip=True):
        d = self.theirs(lambda xt, t: eps, xt.shape)
        return d.p_mean_variance(xt, from_0(t, xt), clip_denoised=clip)[0]


def loss_simple(model, d, x0, t=None, eps=None):
    flat, d = x0.reshape(len(x0), 1, 1, -1), d.theirs(model, x0.shape)
    t = d.random_times(len(x0)) if t is None else from_0(t, x0)
    return d.p_losses(flat, t, None if eps is None else eps.reshape(flat.shape))


def states(loop, xt):
    """What the loop makes of xt, which it would draw itself."""
    with mock.patch.object(torch, "randn", lambda *_, **__: xt):
        return loop(xt.shape, return_all_timesteps=True).unbind(1)[1:]


def sample_ancestral(model, d, xt, sigma2=None, clip=True, generator=None, on_step=None):
    """p_sample_loop, which draws from the global generator, clips, and takes beta_tilde."""
    absent_if(not clip, "sampling without clipping")
    absent_if(sigma2 is not None and sigma2 is not d.beta_tilde, "another variance than beta_tilde")
    return report(states(d.theirs(model, xt.shape).p_sample_loop, xt), range(1, d.T + 1), on_step)


def sample_ddim(model, d, xt, grid, eta=0.0, clip=True, generator=None, on_step=None):
    """ddim_sample, which does as p_sample_loop, on one grid for each number of steps."""
    absent_if(not clip, "sampling without clipping")
    even = torch.linspace(-1, d.T - 1, len(grid) + 1).int() + 1
    absent_if([0, *grid] != even.tolist(), "another grid than the even one")
    how = {"sampling_timesteps": len(grid), "ddim_sampling_eta": eta}
    return report(states(d.theirs(model, xt.shape, **how).ddim_sample, xt), grid, on_step)


def timestep_embedding(t, dim):
    return library.SinusoidalPosEmb(dim)(t)

"""OpenAI's improved-diffusion (commit 1bc7bbb) under the names of ddpm.py.

Images have a channel dimension there, and noise comes from the global generator.
"""

import numpy as np
import torch
from adapters import shared
from improved_diffusion import gaussian_diffusion as library
from improved_diffusion import losses, respace, unet
from improved_diffusion.nn import timestep_embedding  # noqa: F401


def linear_schedule(T=1000, beta_1=None, beta_T=None):
    shared.absent_if(beta_1 is not None, "other ends than 0.1 / T and 20 / T")
    return shared.table(library.get_named_beta_schedule("linear", T), 0.0)


def cosine_schedule(T=1000, s=0.008):
    shared.absent_if(s != 0.008, "another s than 0.008")
    return shared.table(library.get_named_beta_schedule("cosine", T), 0.0)


class Diffusion:
    def __init__(self, beta):
        self.betas = np.asarray(beta, dtype=np.float64)[1:]
        d = self.library()
        shared.process(self, d.betas, d.alphas_cumprod, d.posterior_variance)

    def library(self, sigma2=None, kind=library.GaussianDiffusion, **how):
        """The class has no default variance. Its scripts use beta."""
        large, small = library.ModelVarType.FIXED_LARGE, library.ModelVarType.FIXED_SMALL
        return kind(betas=self.betas, model_mean_type=library.ModelMeanType.EPSILON,
                    model_var_type=shared.kind_of(sigma2, self, large, small),
                    loss_type=library.LossType.MSE, **how)  # fmt: skip

    def q_sample(self, x0, t, eps):
        return self.library().q_sample(x0, shared.from_0(t, x0), eps)

    def posterior_mean(self, x0, xt, t):
        return self.library().q_posterior_mean_variance(x0, xt, shared.from_0(t, xt))[0]

    def x0_from_eps(self, xt, t, eps):
        return self.library()._predict_xstart_from_eps(xt, shared.from_0(t, xt), eps)

    def eps_from_x0(self, xt, t, x0):
        return self.library()._predict_eps_from_xstart(xt, shared.from_0(t, xt), x0)

    def p_mean(self, xt, t, eps, *, clip=True):
        x, eps = xt.reshape(len(xt), 1, -1), eps.reshape(len(xt), 1, -1)
        out = self.library().p_mean_variance(
            lambda *_: eps, x, shared.from_0(t, xt), clip_denoised=clip
        )
        return out["mean"].reshape(xt.shape)


def loss_simple(model, d, x0, t=None, eps=None):
    """training_losses. t is drawn here, because the library's sampler of t uses NumPy."""
    t = torch.randint(0, d.T, (len(x0),)) if t is None else shared.from_0(t, x0)
    return (
        d.library().training_losses(shared.counting_from_0(model), x0, t, noise=eps)["loss"].mean()
    )


@torch.no_grad()
def ancestral_step(d, xt, t, eps, sigma2=None, *, clip=True):
    step = d.library(sigma2).p_sample(lambda *_: eps, xt, shared.from_0(t, xt), clip_denoised=clip)
    return step["sample"]


def spaced(d, timesteps):
    """Return the diffusion on these timesteps only."""
    return d.library(kind=respace.SpacedDiffusion, use_timesteps=[t - 1 for t in timesteps])


def ddim_step(d, xt, t, s, eps, *, eta=0.0, clip=True):
    shared.absent_if(s >= t, "DDIM steps upwards")
    last = torch.full((len(xt),), int(s > 0))
    sample = spaced(d, [s, t] if s else [t]).ddim_sample
    return sample(lambda *_: eps, xt, last, clip_denoised=clip, eta=eta)["sample"]


def states(loop, model, xt, **how):
    steps = loop(shared.counting_from_0(model), xt.shape, noise=xt, device=xt.device, **how)
    return (step["sample"] for step in steps)


def sample_ancestral(model, d, xt, sigma2=None, *, clip=True, on_step=None):
    loop = d.library(sigma2).p_sample_loop_progressive
    return shared.report(states(loop, model, xt, clip_denoised=clip), range(1, d.T + 1), on_step)


def sample_ddim(model, d, xt, timesteps, *, eta=0.0, clip=True, on_step=None):
    loop = spaced(d, timesteps).ddim_sample_loop_progressive
    return shared.report(states(loop, model, xt, clip_denoised=clip, eta=eta), timesteps, on_step)


def normal_kl(mean_1, var_1, mean_2, var_2):
    return losses.normal_kl(mean_1, var_1.log(), mean_2, var_2.log())


def discretized_log_likelihood(x0, mean, var):
    return losses.discretized_gaussian_log_likelihood(x0, means=mean, log_scales=0.5 * var.log())


def bound_terms(model, d, x0, variances, *, clip=True):
    rows, random_state = [], torch.get_rng_state()
    for sigma2 in variances:
        torch.set_rng_state(random_state)
        terms = d.library(sigma2).calc_bpd_loop(
            shared.counting_from_0(model), x0, clip_denoised=clip
        )
        rows.append(torch.cat([terms["vb"].flip(1), terms["prior_bpd"][:, None]], dim=1))
    return torch.stack(rows)


class UNet(unet.UNetModel):
    def __init__(self, *channels, **given):
        s = shared.unet_settings(*channels, **given)
        shared.absent_if(s.groups != 32, "another number of groups than 32")
        downsampling = [2**level for level in s.attention]
        shape = s.in_channels, s.ch, s.out_channels, s.blocks
        super().__init__(*shape, downsampling, s.dropout, s.mult)

    def forward(self, xt, t, y=None):
        return super().forward(xt, t - 1, y)

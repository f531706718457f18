"""OpenAI's improved-diffusion (commit 1bc7bbb) by ddpm.py's names. What it has no way to do raises
NotImplementedError, which counts as absent.

Steps count from 0 there, and images have a channel; noise is drawn from the global generator.
"""

import numpy as np
import torch
from improved_diffusion import gaussian_diffusion as theirs
from improved_diffusion.losses import discretized_gaussian_log_likelihood
from improved_diffusion.losses import normal_kl as kl_of_logarithms
from improved_diffusion.nn import timestep_embedding  # noqa: F401
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.unet import UNetModel

BETA, BETA_TILDE = theirs.ModelVarType.FIXED_LARGE, theirs.ModelVarType.FIXED_SMALL


def table(values, first):
    return torch.from_numpy(np.concatenate([[first], values]))


def linear_schedule(T=1000, beta_1=None, beta_T=None):
    if beta_1 is not None:
        raise NotImplementedError("other ends than 0.1 / T and 20 / T")
    return table(theirs.get_named_beta_schedule("linear", T), 0.0)


def cosine_schedule(T=1000, s=0.008):
    if s != 0.008:
        raise NotImplementedError("another s than 0.008")
    return table(theirs.get_named_beta_schedule("cosine", T), 0.0)


def steps(t, x):
    """t - 1, for each image."""
    t = torch.as_tensor(t).reshape(-1)
    if 0 in t:
        raise NotImplementedError("t = 0, the clean image, is no step there")
    return t.expand(len(x)) - 1 if len(t) == 1 else t - 1


class Diffusion:
    def __init__(self, beta):
        self.betas = np.asarray(beta, dtype=np.float64)[1:]
        d = self.theirs()
        self.T, self.beta, self.alpha = d.num_timesteps, table(d.betas, 0.0), table(1 - d.betas, 1.0)
        self.alpha_bar = table(d.alphas_cumprod, 1.0)
        self.beta_tilde = table(d.posterior_variance, np.nan)

    def theirs(self, variance=BETA_TILDE, kind=theirs.GaussianDiffusion, **how):
        return kind(
            betas=self.betas,
            model_mean_type=theirs.ModelMeanType.EPSILON,
            model_var_type=variance,
            loss_type=theirs.LossType.MSE,
            **how,
        )

    def variance(self, sigma2):
        if sigma2 is not self.beta and sigma2 is not self.beta_tilde:
            raise NotImplementedError("variances other than beta and beta_tilde")
        return BETA if sigma2 is self.beta else BETA_TILDE

    def q_sample(self, x0, t, eps):
        return self.theirs().q_sample(x0, steps(t, x0), eps)

    def posterior_mean(self, x0, xt, t):
        return self.theirs().q_posterior_mean_variance(x0, xt, steps(t, xt))[0]

    def x0_from_eps(self, xt, t, eps):
        return self.theirs()._predict_xstart_from_eps(xt, steps(t, xt), eps)

    def eps_from_x0(self, xt, t, x0):
        return self.theirs()._predict_eps_from_xstart(xt, steps(t, xt), x0)

    def p_mean(self, xt, t, eps, clip=True):
        x, eps = xt.reshape(len(xt), 1, -1), eps.reshape(len(xt), 1, -1)
        mean = self.theirs().p_mean_variance(lambda *_: eps, x, steps(t, xt), clip_denoised=clip)["mean"]
        return mean.reshape(xt.shape)


def told(model):
    return lambda xt, t: model(xt, t + 1)


def loss_simple(model, d, x0, t=None, eps=None):
    t = (
        torch.randint(0, d.T, (len(x0),)) if t is None else steps(t, x0)
    )  # their sampler of t draws with NumPy
    return d.theirs().training_losses(told(model), x0, t, noise=eps)["loss"].mean()


@torch.no_grad()
def run(step, model, xt, clip, on_step, told_steps, **how):
    for i, s in reversed(list(enumerate(told_steps))):
        t = torch.full((len(xt),), i)
        xt = step(told(model), xt, t, clip_denoised=clip, **how)["sample"]
        if on_step:
            on_step(s, xt)
    return xt


def sample_ancestral(model, d, xt, sigma2=None, clip=True, generator=None, on_step=None):
    step = d.theirs(BETA_TILDE if sigma2 is None else d.variance(sigma2)).p_sample
    return run(step, model, xt, clip, on_step, range(d.T))


def sample_ddim(model, d, xt, grid, eta=0.0, clip=True, generator=None, on_step=None):
    grid = list(grid)
    step = d.theirs(kind=SpacedDiffusion, use_timesteps=[t - 1 for t in grid]).ddim_sample
    return run(step, model, xt, clip, on_step, [0, *grid[:-1]], eta=eta)


def normal_kl(mean_1, var_1, mean_2, var_2):
    return kl_of_logarithms(mean_1, var_1.log(), mean_2, var_2.log())


def discretized_log_likelihood(x0, mean, var):
    return discretized_gaussian_log_likelihood(x0, means=mean, log_scales=0.5 * var.log())


def bound_terms(model, d, x0, variances, clip=True, generator=None):
    rows, draws = [], torch.get_rng_state()
    for sigma2 in variances:
        torch.set_rng_state(draws)
        all_ = d.theirs(d.variance(sigma2)).calc_bpd_loop(told(model), x0, clip_denoised=clip)
        rows.append(torch.cat([all_["vb"].flip(1), all_["prior_bpd"][:, None]], dim=1))
    return torch.stack(rows)


class UNet(UNetModel):
    def __init__(
        self,
        in_channels=3,
        out_channels=None,
        ch=128,
        mult=(1, 2, 2, 2),
        blocks=2,
        attention=(1,),
        dropout=0.1,
        groups=32,
        num_classes=None,
    ):
        if groups != 32 or num_classes:
            raise NotImplementedError(
                "another number of groups than 32, or labels with a row for none of them"
            )
        super().__init__(
            in_channels,
            ch,
            out_channels or in_channels,
            blocks,
            [2**level for level in attention],
            dropout,
            mult,
        )

    def forward(self, xt, t, y=None):
        return super().forward(xt, t - 1)

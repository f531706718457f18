"""OpenAI's improved-diffusion (commit 1bc7bbb) by ddpm.py's names. Images have a channel there, and noise is
drawn from the global generator.
"""

import numpy as np
import torch
from adapters.shared import absent_if, from_0, kind_of, report, table
from improved_diffusion import gaussian_diffusion as library
from improved_diffusion import losses, respace, unet
from improved_diffusion.nn import timestep_embedding  # noqa: F401


def linear_schedule(T=1000, beta_1=None, beta_T=None):
    absent_if(beta_1 is not None, "other ends than 0.1 / T and 20 / T")
    return table(library.get_named_beta_schedule("linear", T), 0.0)


def cosine_schedule(T=1000, s=0.008):
    absent_if(s != 0.008, "another s than 0.008")
    return table(library.get_named_beta_schedule("cosine", T), 0.0)


class Diffusion:
    def __init__(self, beta):
        self.betas = np.asarray(beta, dtype=np.float64)[1:]
        d = self.theirs()
        self.T, self.beta, self.alpha = (
            d.num_timesteps,
            table(d.betas, 0.0),
            table(1 - d.betas, 1.0),
        )
        self.alpha_bar, self.beta_tilde = (
            table(d.alphas_cumprod, 1.0),
            table(d.posterior_variance, np.nan),
        )

    def theirs(self, sigma2=None, kind=library.GaussianDiffusion, **how):
        """Its class has no default variance; that of its scripts is beta."""
        large, small = library.ModelVarType.FIXED_LARGE, library.ModelVarType.FIXED_SMALL
        variance = large if sigma2 is None else kind_of(sigma2, self, large, small)
        return kind(betas=self.betas, model_mean_type=library.ModelMeanType.EPSILON,
                    model_var_type=variance, loss_type=library.LossType.MSE, **how)  # fmt: skip

    def q_sample(self, x0, t, eps):
        return self.theirs().q_sample(x0, from_0(t, x0), eps)

    def posterior_mean(self, x0, xt, t):
        return self.theirs().q_posterior_mean_variance(x0, xt, from_0(t, xt))[0]

    def x0_from_eps(self, xt, t, eps):
        return self.theirs()._predict_xstart_from_eps(xt, from_0(t, xt), eps)

    def eps_from_x0(self, xt, t, x0):
        return self.theirs()._predict_eps_from_xstart(xt, from_0(t, xt), x0)

    def p_mean(self, xt, t, eps, clip=True):
        x, eps = xt.reshape(len(xt), 1, -1), eps.reshape(len(xt), 1, -1)
        mean = self.theirs().p_mean_variance(lambda *_: eps, x, from_0(t, xt), clip_denoised=clip)[
            "mean"
        ]
        return mean.reshape(xt.shape)


def told_from_0(model):
    return lambda xt, t: model(xt, t + 1)


def loss_simple(model, d, x0, t=None, eps=None):
    """training_losses, at steps that are drawn here: their sampler of steps draws with NumPy."""
    t = torch.randint(0, d.T, (len(x0),)) if t is None else from_0(t, x0)
    return d.theirs().training_losses(told_from_0(model), x0, t, noise=eps)["loss"].mean()


def states(loop, model, xt, **how):
    steps = loop(told_from_0(model), xt.shape, noise=xt, device=xt.device, **how)
    return (step["sample"] for step in steps)


def sample_ancestral(model, d, xt, sigma2=None, clip=True, generator=None, on_step=None):
    loop = d.theirs(sigma2).p_sample_loop_progressive
    return report(states(loop, model, xt, clip_denoised=clip), range(1, d.T + 1), on_step)


def sample_ddim(model, d, xt, grid, eta=0.0, clip=True, generator=None, on_step=None):
    spaced = d.theirs(kind=respace.SpacedDiffusion, use_timesteps=[t - 1 for t in grid])
    loop = spaced.ddim_sample_loop_progressive
    return report(states(loop, model, xt, clip_denoised=clip, eta=eta), grid, on_step)


def normal_kl(mean_1, var_1, mean_2, var_2):
    return losses.normal_kl(mean_1, var_1.log(), mean_2, var_2.log())


def discretized_log_likelihood(x0, mean, var):
    return losses.discretized_gaussian_log_likelihood(x0, means=mean, log_scales=0.5 * var.log())


def bound_terms(model, d, x0, variances, clip=True, generator=None):
    rows, draws = [], torch.get_rng_state()
    for sigma2 in variances:
        torch.set_rng_state(draws)
        terms = d.theirs(sigma2).calc_bpd_loop(told_from_0(model), x0, clip_denoised=clip)
        rows.append(torch.cat([terms["vb"].flip(1), terms["prior_bpd"][:, None]], dim=1))
    return torch.stack(rows)


class UNet(unet.UNetModel):
    def __init__(self, in_channels=3, out_channels=None, ch=128, mult=(1, 2, 2, 2), blocks=2, attention=(1,),
                 dropout=0.1, groups=32, num_classes=None):  # fmt: skip
        absent_if(groups != 32, "another number of groups than 32")
        absent_if(num_classes, "labels with a row for none of them")
        super().__init__(in_channels, ch, out_channels or in_channels, blocks,
                         [2**level for level in attention], dropout, mult)  # fmt: skip

    def forward(self, xt, t, y=None):
        return super().forward(xt, t - 1, y)

"""Hugging Face diffusers by ddpm.py's names: its schedulers in the loop of its pipelines, and UNet2DModel set
up as in google/ddpm-cifar10-32. step() takes all images at one t; its mean is what it gives without noise.
"""

import functools
from unittest import mock

import torch
from adapters.shared import absent_if, from_0, kind_of, report, table
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.utils.torch_utils import randn_tensor


def linear_schedule(T=1000, beta_1=1e-4, beta_T=0.02):
    return table(DDPMScheduler(T, beta_1, beta_T, beta_schedule="linear").betas, 0.0)


def cosine_schedule(T=1000, s=0.008):
    absent_if(s != 0.008, "another s than 0.008")
    return table(DDPMScheduler(T, beta_schedule="squaredcos_cap_v2").betas, 0.0)


class Diffusion:
    def __init__(self, beta):
        self.betas = torch.as_tensor(beta)[1:].tolist()
        scheduler = self.scheduler()
        self.T, self.beta = len(self.betas), table(scheduler.betas, 0.0)
        self.alpha, self.alpha_bar = (
            table(scheduler.alphas, 1.0),
            table(scheduler.alphas_cumprod, 1.0),
        )

    @functools.cached_property
    def beta_tilde(self):
        return table([*map(self.scheduler()._get_variance, range(self.T))], torch.nan)

    def scheduler(self, kind=DDPMScheduler, clip=False, **how):
        return kind(len(self.betas), trained_betas=self.betas, clip_sample=clip, **how)

    def q_sample(self, x0, t, eps):
        return self.scheduler().add_noise(x0, eps, from_0(t, x0))

    def step(self, xt, t, said, wanted="prev_sample", **how):
        """What step() gives of each image, which needs a channel there, at its own t, without noise."""
        scheduler, each, out = self.scheduler(**how), from_0(t, xt), torch.empty_like(xt)
        with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", return_value=0.0):
            for s in each.unique().tolist():
                done = scheduler.step(said[each == s][:, None], s, xt[each == s][:, None])[wanted]
                out[each == s] = done[:, 0].to(out.dtype)
        return out

    def posterior_mean(self, x0, xt, t):
        return self.step(xt, t, x0, prediction_type="sample")

    def p_mean(self, xt, t, eps, clip=True):
        return self.step(xt, t, eps, clip=clip)

    def x0_from_eps(self, xt, t, eps):
        return self.step(xt, t, eps, "pred_original_sample")


def noise_like(x, generator=None):
    return randn_tensor(x.shape, generator=generator, dtype=x.dtype)


def states(scheduler, model, xt, **how):
    for t in scheduler.timesteps.tolist():
        xt = scheduler.step(model(xt, torch.full((len(xt),), t + 1)), t, xt, **how).prev_sample
        yield xt


def sample_ancestral(model, d, xt, sigma2=None, clip=True, generator=None, on_step=None):
    how = (
        {}
        if sigma2 is None
        else {"variance_type": kind_of(sigma2, d, "fixed_large", "fixed_small")}
    )
    chain = states(d.scheduler(clip=clip, **how), model, xt, generator=generator)
    return report(chain, range(1, d.T + 1), on_step)


def ddim_grid(T, n, spacing="trailing"):
    """The grid that set_timesteps makes: with spacing="trailing" it begins at T, as sample_ddim does."""
    scheduler = DDIMScheduler(T, timestep_spacing=spacing)
    scheduler.set_timesteps(n)
    return (scheduler.timesteps + 1).tolist()[::-1]


def sample_ddim(model, d, xt, grid, eta=0.0, clip=True, generator=None, on_step=None):
    """Only grids that set_timesteps makes: from one of their steps it goes to t - T // n."""
    spacings = [
        s for s in ("trailing", "leading", "linspace") if ddim_grid(d.T, len(grid), s) == [*grid]
    ]
    absent_if(not spacings, f"the grid {grid} of {d.T} steps")
    scheduler = d.scheduler(DDIMScheduler, clip, timestep_spacing=spacings[0])
    scheduler.set_timesteps(len(grid))
    chain = states(
        scheduler, model, xt, eta=eta, generator=generator, use_clipped_model_output=clip
    )
    return report(chain, grid, on_step)


def timestep_embedding(t, dim):
    return get_timestep_embedding(t, dim, flip_sin_to_cos=False, downscale_freq_shift=1)


class UNet(UNet2DModel):
    def __init__(self, in_channels=3, out_channels=None, ch=128, mult=(1, 2, 2, 2), blocks=2, attention=(1,),
                 dropout=0.1, groups=32, num_classes=None):  # fmt: skip
        absent_if(num_classes, "labels with a row for none of them")
        down = [f"{'Attn' * (level in attention)}DownBlock2D" for level in range(len(mult))]
        super().__init__(
            in_channels=in_channels, out_channels=out_channels or in_channels, layers_per_block=blocks,
            block_out_channels=[ch * m for m in mult], norm_num_groups=groups, norm_eps=1e-6, dropout=dropout,
            attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
            down_block_types=down, up_block_types=[b.replace("Down", "Up") for b in down[::-1]])  # fmt: skip

    def forward(self, xt, t, y=None):
        return super().forward(xt, t - 1, y).sample

"""Hugging Face diffusers under the names of ddpm.py.

The schedulers run in the loop of its pipelines, and UNet2DModel has the settings of google/ddpm-cifar10-32.
step() handles one t for all images; without noise it returns the mean.
"""

import functools
from unittest import mock

import torch
from adapters import shared
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding


def linear_schedule(T=1000, beta_1=1e-4, beta_T=0.02):
    return shared.table(DDPMScheduler(T, beta_1, beta_T, beta_schedule="linear").betas, 0.0)


def cosine_schedule(T=1000, s=0.008):
    shared.absent_if(s != 0.008, "another s than 0.008")
    return shared.table(DDPMScheduler(T, beta_schedule="squaredcos_cap_v2").betas, 0.0)


class Diffusion:
    def __init__(self, beta):
        self.betas = torch.as_tensor(beta)[1:].tolist()
        scheduler = self.scheduler()
        self.T = len(self.betas)
        self.beta = shared.table(scheduler.betas, 0.0)
        self.alpha = shared.table(scheduler.alphas, 1.0)
        self.alpha_bar = shared.table(scheduler.alphas_cumprod, 1.0)

    @functools.cached_property
    def beta_tilde(self):
        return shared.table([*map(self.scheduler()._get_variance, range(self.T))], torch.nan)

    def scheduler(self, kind=DDPMScheduler, clip=False, **how):
        return kind(len(self.betas), trained_betas=self.betas, clip_sample=clip, **how)

    def q_sample(self, x0, t, eps):
        return self.scheduler().add_noise(x0, eps, shared.from_0(t, x0))

    def step(self, xt, t, output, wanted="prev_sample", **how):
        """Return what step() gives without noise for each image at its own t."""
        scheduler, each, out = self.scheduler(**how), shared.from_0(t, xt), torch.empty_like(xt)
        with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", return_value=0.0):
            for s in each.unique().tolist():
                here = each == s
                result = scheduler.step(output[here][:, None], s, xt[here][:, None])[wanted]
                out[here] = result[:, 0].to(out.dtype)
        return out

    def posterior_mean(self, x0, xt, t):
        return self.step(xt, t, x0, prediction_type="sample")

    def p_mean(self, xt, t, eps, *, clip=True):
        return self.step(xt, t, eps, clip=clip)

    def x0_from_eps(self, xt, t, eps):
        return self.step(xt, t, eps, "pred_original_sample")


def ancestral(d, sigma2, clip):
    """Return the DDPMScheduler. Without sigma2 it keeps its own default, beta_tilde."""
    if sigma2 is None:
        return d.scheduler(clip=clip)
    return d.scheduler(
        clip=clip, variance_type=shared.kind_of(sigma2, d, "fixed_large", "fixed_small")
    )


def ancestral_step(d, xt, t, eps, sigma2=None, *, clip=True, generator=None):
    return ancestral(d, sigma2, clip).step(eps, t - 1, xt, generator=generator).prev_sample


def states(scheduler, model, xt, **how):
    for t in scheduler.timesteps.tolist():
        xt = scheduler.step(model(xt, torch.full((len(xt),), t + 1)), t, xt, **how).prev_sample
        yield xt


def sample_ancestral(model, d, xt, sigma2=None, *, clip=True, generator=None, on_step=None):
    chain = states(ancestral(d, sigma2, clip), model, xt, generator=generator)
    return shared.report(chain, range(1, d.T + 1), on_step)


def ddim_timesteps(T, n, spacing="trailing"):
    """Return the timesteps of set_timesteps. With spacing="trailing" they end at T."""
    scheduler = DDIMScheduler(T, timestep_spacing=spacing)
    scheduler.set_timesteps(n)
    return (scheduler.timesteps + 1).tolist()[::-1]


def sample_ddim(model, d, xt, timesteps, *, eta=0.0, clip=True, generator=None, on_step=None):
    """Only timesteps of set_timesteps are possible. step() goes from t to t - T // n."""
    for spacing in ("trailing", "leading", "linspace"):
        if ddim_timesteps(d.T, len(timesteps), spacing) == [*timesteps]:
            break
    else:
        shared.absent_if(True, f"the timesteps {timesteps} of {d.T}")
    scheduler = d.scheduler(DDIMScheduler, clip, timestep_spacing=spacing)
    scheduler.set_timesteps(len(timesteps))
    how = {"eta": eta, "generator": generator, "use_clipped_model_output": clip}
    return shared.report(states(scheduler, model, xt, **how), timesteps, on_step)


def timestep_embedding(t, dim):
    return get_timestep_embedding(t, dim, flip_sin_to_cos=False, downscale_freq_shift=1)


class UNet(UNet2DModel):
    def __init__(self, *channels, **given):
        s = shared.unet_settings(*channels, **given)
        down = [f"{'Attn' * (level in s.attention)}DownBlock2D" for level in range(len(s.mult))]
        super().__init__(
            in_channels=s.in_channels, out_channels=s.out_channels, layers_per_block=s.blocks,
            block_out_channels=[s.ch * m for m in s.mult], norm_num_groups=s.groups, norm_eps=1e-6,
            dropout=s.dropout, attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False,
            freq_shift=1, down_block_types=down,
            up_block_types=[block.replace("Down", "Up") for block in down[::-1]])  # fmt: skip

    def forward(self, xt, t, y=None):
        return super().forward(xt, t - 1, y).sample

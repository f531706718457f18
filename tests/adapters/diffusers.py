"""Hugging Face diffusers by ddpm.py's names: its DDPM and DDIM schedulers, and UNet2DModel set up as in
google/ddpm-cifar10-32. What it has no public way to do raises NotImplementedError: it counts as absent.

Steps count from 0 there, one at a time. The mean of a step is what step() gives without noise.
"""

import contextlib
import functools
from unittest import mock

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.schedulers import scheduling_ddpm
from diffusers.utils.torch_utils import randn_tensor
from torch.nn.functional import pad


def linear_schedule(T=1000, beta_1=1e-4, beta_T=0.02):
    return pad(DDPMScheduler(T, beta_1, beta_T, beta_schedule="linear").betas, (1, 0))


def cosine_schedule(T=1000, s=0.008):
    if s != 0.008:
        raise NotImplementedError("another s than 0.008")
    return pad(DDPMScheduler(T, beta_schedule="squaredcos_cap_v2").betas, (1, 0))


def steps(t, x):
    """t - 1, for each image."""
    t = torch.as_tensor(t).reshape(-1)
    if 0 in t:
        raise NotImplementedError("t = 0, the clean image, is no step there")
    return t.expand(len(x)) - 1 if len(t) == 1 else t - 1


def without_noise():
    return mock.patch.object(
        scheduling_ddpm, "randn_tensor", lambda shape, dtype=None, **_: torch.zeros(shape, dtype=dtype)
    )


class Diffusion:
    def __init__(self, beta):
        self.betas, self.made = torch.as_tensor(beta)[1:], {}
        scheduler = self.scheduler()
        self.T, self.beta = len(self.betas), pad(scheduler.betas, (1, 0))
        self.alpha, self.alpha_bar = 1 - self.beta, pad(scheduler.alphas_cumprod, (1, 0), value=1.0)

    @functools.cached_property
    def beta_tilde(self):
        return torch.stack([torch.tensor(float("nan")), *map(self.scheduler()._get_variance, range(self.T))])

    def scheduler(self, kind=DDPMScheduler, clip=False, **how):
        """Theirs, made once for each way of stepping."""
        key = kind, clip, *how.items()
        if key not in self.made:
            self.made[key] = kind(len(self.betas), trained_betas=self.betas.tolist(), clip_sample=clip, **how)
        return self.made[key]

    def q_sample(self, x0, t, eps):
        return self.scheduler().add_noise(x0, eps, steps(t, x0))

    def step(self, xt, t, said, wanted="prev_sample", **how):
        """What step() gives of each image, which needs a channel there, at its own t, without noise."""
        scheduler, each, out = self.scheduler(**how), steps(t, xt), torch.empty_like(xt)
        with without_noise():
            for s in each.unique().tolist():
                here = each == s
                done = scheduler.step(said[here][:, None], s, xt[here][:, None])
                out[here] = getattr(done, wanted)[:, 0].to(out.dtype)
        return out

    def posterior_mean(self, x0, xt, t):
        return self.step(xt, t, x0, prediction_type="sample")

    def p_mean(self, xt, t, eps, clip=True):
        return self.step(xt, t, eps, clip=clip)

    def x0_from_eps(self, xt, t, eps):
        return self.step(xt, t, eps, "pred_original_sample")


def noise_like(x, generator=None):
    return randn_tensor(x.shape, generator=generator, dtype=x.dtype)


@torch.no_grad()
def run(scheduler, model, xt, on_step, reports, **how):
    """Their loop: at each of the scheduler's timesteps, step()."""
    for t, s in zip(scheduler.timesteps.tolist(), reports, strict=True):
        xt = scheduler.step(model(xt, torch.full((len(xt),), t + 1)), t, xt, **how).prev_sample
        if on_step:
            on_step(s, xt)
    return xt


def sample_ancestral(model, d, xt, sigma2=None, clip=True, generator=None, on_step=None):
    kinds = {
        id(None): {},
        id(d.beta): {"variance_type": "fixed_large"},
        id(d.beta_tilde): {"variance_type": "fixed_small"},
    }
    if id(sigma2) not in kinds:
        raise NotImplementedError("variances other than beta and beta_tilde")
    scheduler = d.scheduler(clip=clip, **kinds[id(sigma2)])
    return run(scheduler, model, xt, on_step, range(d.T - 1, -1, -1), generator=generator)


def ddim_grid(T, n):
    """timestep_spacing="trailing", the one that begins at T as sample_ddim does."""
    scheduler = DDIMScheduler(T, timestep_spacing="trailing")
    scheduler.set_timesteps(n)
    return [t + 1 for t in scheduler.timesteps.tolist()[::-1]]


def sample_ddim(model, d, xt, grid, eta=0.0, clip=True, generator=None, on_step=None):
    """Only grids that set_timesteps makes: from one of their steps it goes to t - T // n."""
    grid = list(grid)
    for spacing in ("trailing", "leading", "linspace"):
        scheduler = d.scheduler(DDIMScheduler, clip, timestep_spacing=spacing)
        with contextlib.suppress(ValueError):
            scheduler.set_timesteps(len(grid))
            if [t + 1 for t in scheduler.timesteps.tolist()[::-1]] == grid:
                return run(
                    scheduler,
                    model,
                    xt,
                    on_step,
                    [0, *grid[:-1]][::-1],
                    eta=eta,
                    generator=generator,
                    use_clipped_model_output=clip,
                )
    raise NotImplementedError(f"the grid {grid} of {d.T} steps")


def timestep_embedding(t, dim):
    return get_timestep_embedding(t, dim, flip_sin_to_cos=False, downscale_freq_shift=1)


class UNet(UNet2DModel):
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
        if num_classes:
            raise NotImplementedError("labels with a row for none of them")
        kinds = ["Attn" if level in attention else "" for level in range(len(mult))]
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels or in_channels,
            layers_per_block=blocks,
            block_out_channels=[ch * m for m in mult],
            norm_num_groups=groups,
            norm_eps=1e-6,
            dropout=dropout,
            attention_head_dim=None,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
            up_block_types=[f"{kind}UpBlock2D" for kind in kinds[::-1]],
        )

    def forward(self, xt, t, y=None):
        if y is not None:
            raise NotImplementedError("labels")
        return super().forward(xt, t - 1).sample

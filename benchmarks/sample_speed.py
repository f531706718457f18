"""Sampling speed of the paper's network next to other libraries', taking turns in one run.

    pip install diffusers denoising-diffusion-pytorch       the peers are optional, each
    python benchmarks/sample_speed.py                       on this machine
    python benchmarks/sample_speed.py --device cuda --compile --batch-size 512

Each draws its images by two steps of DDIM, network and update, as its own sampler does it; images/s
count one step. diffusers takes part as it comes, and with the best settings that it takes.
"""

import contextlib
import io

import torch
from train_speed import by_default, contestants, diffusers_network, flags, table, title

import ddpm
from support import devices

STEPS = 2


def ours(x, bf16, compiled):
    """sample.py's own sampler."""
    net = ddpm.UNet().to(x.device, memory_format=torch.channels_last).eval()
    model = torch.compile(net) if compiled else net
    d = ddpm.Diffusion(ddpm.linear_schedule())
    xT = x.contiguous(memory_format=torch.channels_last)

    def step():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            ddpm.sample_ddim(model, d, xT, ddpm.ddim_grid(d.T, STEPS))

    return net, step


def diffusers(x, best, bf16, compiled):
    """The loop of its DDIMPipeline."""
    from diffusers import DDIMScheduler

    net, schedule = diffusers_network().to(x.device).eval(), DDIMScheduler(1000)
    xT = x
    if best:
        net = net.to(memory_format=torch.channels_last)
        xT = x.contiguous(memory_format=torch.channels_last)
    model = torch.compile(net) if best and compiled else net

    @torch.no_grad()
    def step():
        schedule.set_timesteps(STEPS)
        xt = xT
        with torch.autocast(x.device.type, torch.bfloat16, enabled=best and bf16):
            for t in schedule.timesteps:
                xt = schedule.step(model(xt, t).sample, t, xt).prev_sample

    return net, step


def denoising_diffusion_pytorch(x):
    """Its ddim_sample."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    net = Unet(128, dim_mults=(1, 2, 2, 2))
    diffusion = GaussianDiffusion(
        net, image_size=32, objective="pred_noise", sampling_timesteps=STEPS
    )
    diffusion = diffusion.to(x.device).eval()

    def step():
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            diffusion.ddim_sample(tuple(x.shape))

    return net, step


def main():
    given = flags(__doc__, 512)
    x = torch.randn(given.batch_size, 3, 32, 32, device=given.device)
    trained = by_default(x[:8]).precision  # by train.py
    bf16 = devices.samples_in_bf16("auto", given.device, trained)
    devices.use_precision(bf16)
    found = contestants({
        "ddpm.py": lambda: ours(x, bf16, given.compile),
        "diffusers, as it comes": lambda: diffusers(x, False, False, False),
        "diffusers, at its best": lambda: diffusers(x, True, bf16, given.compile),
        "denoising-diffusion-pytorch": lambda: denoising_diffusion_pytorch(x),
    })  # fmt: skip
    head = title(given.device, given.batch_size, bf16, given.compile)
    table(head, found, given.batch_size * STEPS, given.rounds, given.device, given.compile)


if __name__ == "__main__":
    main()

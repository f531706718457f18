"""Training speed of the paper's network next to other libraries', taking turns in one run.

    pip install diffusers denoising-diffusion-pytorch       the peers are optional, each
    python benchmarks/train_speed.py                        on this machine
    python benchmarks/train_speed.py --device cuda --compile --batch-size 128

A step is the whole of it: noise, forward, backward, gradient clipping, Adam, moving average. ddpm.py
makes it as train.py does (train.train); diffusers as its example for unconditional training does, and
once more with the best settings that it takes; denoising-diffusion-pytorch as its Trainer does, with
its own network of the same width (which is another, smaller one). All see the same 32x32 images.
"""

import argparse
import contextlib
import copy
import pathlib
import statistics
import sys
import time
import types
import warnings

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import ddpm
import train
from support import budget, devices
from support.data import Data


def by_default(x, **network):
    """What train.py's trial step chooses for such a batch: its precision, and how many images at a time."""
    net = ddpm.UNet(**network).to(x.device, memory_format=torch.channels_last)
    return budget.trial(net, dict(network=network, shape=x.shape[1:]), len(x), x.device)


def ours(x, bf16, compiled, micro=None, **network):
    """train.py's own step, of the paper's network or of another."""
    net = ddpm.UNet(**network).to(x.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), 2e-4, fused=True)
    model = torch.compile(net) if compiled else net
    d = ddpm.Diffusion(ddpm.linear_schedule())
    cfg = train.Config(
        batch_size=len(x),
        micro_batch=micro or len(x),
        precision="bf16" if bf16 else "fp32",
        lr=2e-4,
        warmup=0,
        decay="none",
        ema=0.9999,
        flip=False,
    )
    data = Data(((x + 1) * 127.5).to(torch.uint8), None, [])
    run = train.Run(model, ema, optimizer, 0, {}, "")
    monitor = types.SimpleNamespace(steps=0, losses=[], due=lambda: False)

    def step():
        monitor.steps = run.step + 1
        train.train(cfg, run, d, data, None, x.device, monitor)

    return net, step


def diffusers(x, best, bf16, compiled):
    """The paper's CIFAR-10 network as diffusers configures it, trained as in its example."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    net = diffusers_network().to(x.device)
    if best:
        net = net.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    model = torch.compile(net) if best and compiled else net
    optimizer = torch.optim.AdamW(
        net.parameters(), 1e-4, (0.95, 0.999), 1e-8, 1e-6, fused=best or None
    )
    schedule, ema = DDPMScheduler(1000), EMAModel(net.parameters(), decay=0.9999, foreach=best)

    def step():
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),), device=x.device)
        xt = schedule.add_noise(x, noise, t)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=best and bf16):
            loss = F.mse_loss(model(xt, t).sample.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(net.parameters())

    return net, step


def diffusers_network():
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2, dropout=0.1,
        attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def denoising_diffusion_pytorch(x):
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    net = Unet(128, dim_mults=(1, 2, 2, 2))
    diffusion = GaussianDiffusion(
        net, image_size=32, objective="pred_noise", beta_schedule="linear"
    )
    diffusion = diffusion.to(x.device)
    optimizer = torch.optim.Adam(diffusion.parameters(), 1e-4, (0.9, 0.99))
    ema = EMA(diffusion, beta=0.995, update_every=10)

    def step():
        diffusion((x + 1) / 2).backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    return net, step


def contestants(makers):
    """{name: (network, step)} of all that are installed."""
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except ImportError as error:
            print(f"{name}: left out ({error.name} is not installed)")
    return found


def take_turns(steps, rounds, device):
    """({name: median seconds}, {name: bytes}) of steps that take turns, the first two unmeasured.

    The bytes, on a GPU, are what a step takes beyond what it finds: weights, Adam's state and averages."""
    times, peaks = {name: [] for name in steps}, dict.fromkeys(steps)
    cuda = device.type == "cuda"
    for i in range(rounds + 2):
        for name, step in steps.items():
            wait_for(device)
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            began = time.perf_counter()
            step()
            wait_for(device)
            if cuda:
                peaks[name] = torch.cuda.max_memory_allocated(device) - before
            if i >= 2:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(t) for name, t in times.items()}, peaks


def wait_for(device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def matmul_rate(device, dtype):
    """FLOP/s of a large matrix product on this machine."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n**3 / take_turns({"": lambda: a @ b}, 5, device)[0][""]


def operations(step, compiled):
    """Floating-point operations of a step, counted as it runs, not compiled."""
    eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with warnings.catch_warnings(action="ignore"), FlopCounterMode(display=False) as counter, eager:
        step()
    return counter.get_total_flops()


def table(title, found, B, rounds, device, compiled):
    """Runs the contestants in turn and prints images/s, ratios, work, share of the matmul rate, memory."""
    print(title)
    seconds, peaks = take_turns({name: step for name, (_, step) in found.items()}, rounds, device)
    rates = {dtype: matmul_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    print(
        "  ".join(
            f"{str(dtype)[6:]} matmul {rate / 1e12:.2f} TFLOP/s" for dtype, rate in rates.items()
        )
    )
    print(
        f"{'':30} {'parameters':>11} {'images/s':>9} {'ours is':>9} {'GFLOP/image':>12} {'of matmul':>10} "
        f"{'memory':>8}"
    )
    first = next(iter(seconds.values()))
    for name, s in seconds.items():
        net, step = found[name]
        work = operations(step, compiled)
        peak = f"{peaks[name] / 1e9:6.1f}GB" if peaks[name] else "-"
        print(
            f"{name:30} {sum(p.numel() for p in net.parameters()):11,} {B / s:9.2f} {s / first:8.2f}x "
            f"{work / B / 1e9:12.1f} {work / s / max(rates.values()):10.1%} {peak:>8}"
        )


def flags(description, batch):
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, help="default: 128 on a GPU, 8 elsewhere")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile those that take it")
    given = parser.parse_args()
    given.device = devices.pick_device(given.device)
    given.batch_size = given.batch_size or (batch if given.device.type == "cuda" else 8)
    return given


def title(device, B, bf16, compiled):
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads"
    )
    return (
        f"{name}, torch {torch.__version__}, batch {B}, {'bf16' if bf16 else 'float32'}"
        f"{', compiled' if compiled else ''}"
    )


def main():
    given = flags(__doc__, 128)
    x = (torch.rand(given.batch_size, 3, 32, 32) * 2 - 1).to(given.device)
    cost = by_default(x)
    bf16 = cost.precision == "bf16"
    print(f"train.py's trial: {cost}")
    found = contestants({
        "ddpm.py": lambda: ours(x, bf16, given.compile, cost.micro_batch),
        "diffusers, as its example": lambda: diffusers(x, False, False, False),
        "diffusers, at its best": lambda: diffusers(x, True, bf16, given.compile),
        "denoising-diffusion-pytorch": lambda: denoising_diffusion_pytorch(x),
    })  # fmt: skip
    head = title(given.device, given.batch_size, bf16, given.compile)
    table(head, found, given.batch_size, given.rounds, given.device, given.compile)


if __name__ == "__main__":
    main()

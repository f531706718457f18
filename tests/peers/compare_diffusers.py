"""Compare our networks and samplers with those of diffusers, in both directions.

    pip install diffusers safetensors           in a separate environment, with requirements.txt
    python tests/peers/compare_diffusers.py                small networks and their samplers, a minute
    python tests/peers/compare_diffusers.py --full         the published networks' sizes too, half an hour
    python tests/peers/compare_diffusers.py --fixture      writes tests/fixtures/diffusers

All weights are random and different, also in norms and biases. Prints the largest difference of each
comparison and its limit. Exits with 1 if a limit is exceeded.
"""

import argparse
import contextlib
import io
import pathlib
import shutil
import sys
import tempfile

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel  # noqa: E402
from diffusers.training_utils import EMAModel  # noqa: E402
from diffusers.utils import logging  # noqa: E402

import convert  # noqa: E402
import ddpm  # noqa: E402
import improved  # noqa: E402
from support import checkpoint  # noqa: E402

SAME_OUTPUT, SAME_SAMPLE = 1e-5, 1e-4  # float32, tens of layers, and those once a step
# The published networks have these settings, which are not UNet2DModel's defaults.
AUTHORS = dict(act_fn="silu", attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False,
               freq_shift=1, norm_eps=1e-6, layers_per_block=2)  # fmt: skip


def settings(widths, attention, **other):
    """Return settings of a UNet2DModel with these channels per level, and attention on some levels."""
    kinds = ["Attn" * (level in attention) for level in range(len(widths))]
    return {**AUTHORS, "block_out_channels": widths, "down_block_types": [f"{k}DownBlock2D" for k in kinds],
            "up_block_types": [f"{k}UpBlock2D" for k in reversed(kinds)], **other}  # fmt: skip


CIFAR10 = settings((128, 256, 256, 256), (1,), sample_size=32, dropout=0.1)
LARGE = settings((128, 128, 256, 256, 512, 512), (4,), sample_size=64)  # the published ones: 256
SMALL = {
    "two levels": settings((16, 32), (1,), sample_size=8, norm_num_groups=8),
    "attention everywhere, one block": settings((8, 16, 8), (0, 1, 2), sample_size=16, norm_num_groups=4,
                                                layers_per_block=1),
    "one level, grey, not square": settings((16,), (), sample_size=[6, 10], norm_num_groups=4, in_channels=1,
                                            out_channels=1),
    "learned variances": settings((8, 16), (1,), sample_size=8, norm_num_groups=4, out_channels=6),
    "heads of 16, one each": settings((16, 16), (0,), sample_size=8, norm_num_groups=8,
                                      attention_head_dim=16),
    "classes": settings((8, 8), (), sample_size=8, norm_num_groups=4, num_class_embeds=4),
}  # fmt: skip


def network(config, seed=0):
    """Return diffusers' network with these settings, in which all weights differ."""
    torch.manual_seed(seed)
    net = UNet2DModel(**config).eval()
    with torch.no_grad():
        for weights in net.parameters():
            if weights.ndim == 1:  # initially, norms are 1 and biases 0
                weights.add_(0.1 * torch.randn_like(weights))
    return net


def converted(source, out, **flags):
    """Run convert.py without its report, and return `out`."""
    cfg = convert.Config(ckpt=str(source), out=str(out), **flags)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        convert.main(cfg, set(flags))
    return out


@torch.no_grad()
def output_error(theirs, net, timesteps, batch, y=None):
    """Return the largest difference of two networks over timesteps from 1 on, with one image each."""
    size = theirs.config.sample_size
    H, W = (size, size) if isinstance(size, int) else size
    worst = 0.0
    for first in range(0, len(timesteps), batch):
        t = torch.tensor(timesteps[first : first + batch])
        x = torch.randn(len(t), theirs.config.in_channels, H, W)
        labels = None if y is None else torch.arange(len(t)) % y
        a, b = (
            theirs(x, t - 1, class_labels=labels).sample,
            net(x, t, *([] if y is None else [labels])),
        )
        C = x.shape[1]
        if a.shape[1] > C:  # learned variances
            a = torch.cat([a[:, :C], (a[:, C:] + 1) / 2], dim=1)
        worst = max(worst, (a - b).abs().max().item())
    return worst


def old_names(folder):
    """Rename the attention of a saved network to its names before 2023."""
    from safetensors.torch import load_file, save_file

    path = folder / "diffusion_pytorch_model.safetensors"
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(path)
    for name in list(weights):
        for now, before in new.items():
            if f".{now}." in name:
                weights[name.replace(f".{now}.", f".{before}.")] = weights.pop(name)
    save_file(weights, path, metadata={"format": "pt"})


class Report:
    """Print each comparison, and remember whether one exceeded its limit."""

    failed = False

    def __call__(self, what, error, allowed):
        self.failed |= not error <= allowed  # so that NaN fails
        verdict = "ok" if error <= allowed else "TOO LARGE"
        print(f"{verdict:>9}  {error:.1e} of {allowed:.0e}  {what}", flush=True)


def compare_networks(report, folder, name, config, timesteps, batch=20):
    """diffusers writes a network in each of its formats; we read it, write it, and diffusers reads it."""
    theirs, y = network(config), config.get("num_class_embeds")
    classes = dict(classes=",".join(f"class {i}" for i in range(y - 1))) if y else {}
    learned = theirs.config.out_channels > theirs.config.in_channels
    scheduler = DDPMScheduler(variance_type="learned_range" if learned else "fixed_large")
    theirs.save_pretrained(folder / "new" / "unet")
    scheduler.save_pretrained(folder / "new" / "scheduler")
    ckpt, ours, _ = checkpoint.load_model(converted(folder / "new", folder / "new.pt", **classes))
    report(
        f"{name}: diffusers to ours", output_error(theirs, ours, timesteps, batch, y), SAME_OUTPUT
    )

    back = UNet2DModel.from_pretrained(converted(folder / "new.pt", f"{folder}/back/")).eval()
    report(f"{name}: ours to diffusers", output_error(back, ours, timesteps, batch, y), SAME_OUTPUT)
    converted(folder / "new.pt", f"{folder}/bf16/", dtype="bf16")
    back = UNet2DModel.from_pretrained(folder / "bf16").eval()
    _, direct, _ = checkpoint.load_model(folder / "bf16")  # no convert.py in between
    error = output_error(back, direct, timesteps, batch, y)
    report(f"{name}: a bf16 folder, in both", error, SAME_OUTPUT)

    formats = dict(bin=dict(safe_serialization=False), sharded=dict(max_shard_size="20KB"), old={},
                   fp16=dict(variant="fp16"))  # fmt: skip
    for kind, how in formats.items():
        theirs.save_pretrained(folder / kind, **how)
        scheduler.save_pretrained(folder / kind)
    old_names(folder / "old")
    loads = UNet2DModel.from_pretrained(folder / "old").eval()
    error = output_error(loads, ours, timesteps[:1], 1, y)
    report(f"{name}: the old names, in diffusers", error, SAME_OUTPUT)
    for kind in formats:
        again = checkpoint.load(converted(folder / kind, folder / f"{kind}.pt", **classes))
        same = all(torch.equal(again["ema"][k], v) for k, v in ckpt["ema"].items())
        files = len(list((folder / kind).glob("diffusion*")))
        report(f"{name}: {kind} ({files} files) is the same network", 0 if same else torch.inf, 0)


def compare_trained_average(report, folder):
    """The folder of diffusers' trainer: unet/ has the last weights, and unet_ema/ their average."""
    net = network(SMALL["two levels"])
    average = EMAModel(net.parameters(), use_ema_warmup=True, inv_gamma=1.0, power=0.75,
                       model_cls=UNet2DModel, model_config=net.config)  # fmt: skip
    for _ in range(5):  # the first average is a copy of the weights
        with torch.no_grad():
            for weights in net.parameters():
                weights.mul_(0.95)
        average.step(net.parameters())
    net.save_pretrained(folder / "unet")
    average.save_pretrained(folder / "unet_ema")
    DDPMScheduler(20).save_pretrained(folder / "scheduler")
    ckpt, ours, _ = checkpoint.load_model(folder)
    theirs = UNet2DModel.from_pretrained(folder, subfolder="unet_ema").eval()
    report("unet_ema of diffusers' trainer", output_error(theirs, ours, [1, 20], 2), SAME_OUTPUT)
    last = net.state_dict()["conv_in.weight"]
    report(
        "and not unet", 0 if not torch.equal(ckpt["ema"]["conv_in.weight"], last) else torch.inf, 0
    )


SCHEDULERS = {
    "fixed_large": DDPMScheduler(20, variance_type="fixed_large"),
    "fixed_small, cosine": DDPMScheduler(20, beta_schedule="squaredcos_cap_v2"),
    "scaled_linear, not clipped": DDPMScheduler(20, beta_schedule="scaled_linear", beta_start=1e-3,
                                                clip_sample=False),
    "sigmoid, fixed_small_log": DDPMScheduler(20, beta_schedule="sigmoid", beta_end=0.3,
                                              variance_type="fixed_small_log"),
    "a table": DDPMScheduler(20, trained_betas=np.geomspace(1e-3, 0.5, 20).tolist()),
    "learned_range": DDPMScheduler(20, beta_end=0.3, variance_type="learned_range"),
}  # fmt: skip


@torch.no_grad()
def sample_theirs(net, scheduler, seed=0):
    """Sample as DDPMPipeline does, without the conversion to pixels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 8, 8, generator=generator)
    scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t).sample, t, x, generator=generator).prev_sample
    return x


def sample_ours(path, seed=0):
    """Sample with the same noise by ddpm.py, with the variance and clipping of the checkpoint."""
    ckpt, net, d = checkpoint.load_model(path)
    generator = torch.Generator().manual_seed(seed)

    def noise(x):
        return torch.randn(x.shape, generator=generator)

    xT = noise(torch.empty(4, 3, 8, 8))
    variance, clip = ckpt["process"]["variance"], ckpt["process"]["clip"]
    if variance == "learned":
        return improved.sample_ancestral(net, d, xT, clip=clip, noise=noise)
    return ddpm.sample_ancestral(net, d, xT, getattr(d, variance), clip=clip, noise=noise)


def compare_sampling(report, folder, name, scheduler):
    """Compare whole sampling runs, with the folder of diffusers and with ours."""
    learned = scheduler.config.variance_type == "learned_range"
    theirs = network(SMALL["learned variances" if learned else "two levels"])
    DDPMPipeline(theirs, scheduler).save_pretrained(folder / "theirs")
    x0 = sample_ours(converted(folder / "theirs", folder / "ours.pt"))
    error = (sample_theirs(theirs, scheduler) - x0).abs().max() / x0.abs().max().clamp(min=1)
    report(f"{name}: 20 timesteps by ours", error.item(), SAME_SAMPLE)
    converted(folder / "ours.pt", f"{folder}/back/")
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        pipeline = DDPMPipeline.from_pretrained(folder / "back")
        drawn = pipeline(4, torch.Generator().manual_seed(0), 20, output_type="np").images
    pixels = (x0 / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    report(
        f"{name}: 20 timesteps by DDPMPipeline", float(np.abs(drawn - pixels).max()), SAME_SAMPLE
    )


def compare_ddim(report, folder):
    """Compare DDIM. Its scheduler has no variance in its settings."""
    theirs, scheduler = network(SMALL["two levels"]), DDIMScheduler(20, beta_end=0.3)
    theirs.save_pretrained(folder)
    scheduler.save_pretrained(folder)
    _, net, d = checkpoint.load_model(converted(folder, folder / "ours.pt"))
    x = torch.randn(4, 3, 8, 8)
    x0 = ddpm.sample_ddim(net, d, x, list(range(1, 21)))
    scheduler.set_timesteps(20)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(theirs(x, t).sample, t, x, use_clipped_model_output=True).prev_sample
    report("DDIM: 20 timesteps", (x - x0).abs().max().item(), SAME_SAMPLE)


def write_fixture(folder):
    """Write a small network, its outputs at each of 20 timesteps, and its samples from seed 0."""
    shutil.rmtree(folder, ignore_errors=True)
    config = settings((8, 16), (1,), sample_size=8, norm_num_groups=4, layers_per_block=1)
    net, scheduler = (
        network(config, seed=1),
        DDPMScheduler(20, beta_end=0.3, variance_type="fixed_large"),
    )
    DDPMPipeline(net, scheduler).save_pretrained(folder)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        eps = torch.stack([net(x, t).sample for t in range(20)])
    np.savez(folder / "outputs.npz", x=x, eps=eps, x0=sample_theirs(net, scheduler))


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--full", action="store_true", help="the published networks' sizes too")
    parser.add_argument(
        "--fixture", action="store_true", help="write tests/fixtures/diffusers instead"
    )
    given, report = parser.parse_args(), Report()
    logging.set_verbosity_error()
    if given.fixture:
        return write_fixture(ROOT / "tests" / "fixtures" / "diffusers")
    cases = {name: (config, [1, 2, 3, 500, 999, 1000]) for name, config in SMALL.items()}
    if given.full:
        cases["cifar10-32, all 1000 t"] = CIFAR10, list(range(1, 1001))
        cases["celebahq-256 at 64x64"] = LARGE, list(range(50, 1001, 50))
    for name, (config, steps) in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            compare_networks(report, pathlib.Path(folder), name, config, steps)
    for name, scheduler in SCHEDULERS.items():
        with tempfile.TemporaryDirectory() as folder:
            compare_sampling(report, pathlib.Path(folder), name, scheduler)
    for compare in (compare_ddim, compare_trained_average):
        with tempfile.TemporaryDirectory() as folder:
            compare(report, pathlib.Path(folder))
    sys.exit(report.failed)


if __name__ == "__main__":
    main()

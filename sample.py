"""Sample images from a checkpoint: a grid, a film of the reverse process, an array, or a folder of PNGs.

python sample.py --ckpt ckpt.pt --out grid.png
python sample.py --ckpt ckpt.pt --out grid.png --label 3,8 --guidance 1.5 --steps 100
"""

import itertools
import pathlib
import sys
from dataclasses import MISSING, dataclass

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # also under python -P

import numpy as np
import torch

from support import checkpoint, command, devices, pictures, sampling
from support.command import flag
from support.errors import Failure, UsageError
from support.progress import Progress, note, say

FRAMES = 24  # the approximate number of frames of a film
SHORT = 50_000  # training steps below which a network gets colours wrong (docs/training.md)


@dataclass(frozen=True)
class Config:
    ckpt: str = flag(
        MISSING, "checkpoint, or a diffusers folder", group="input and output", metavar="PATH"
    )
    out: str = flag(
        MISSING,
        "X.png: a grid; X.gif or X.webp: a film of the reverse process; X.npz: images as uint8 "
        "(N, H, W, 3) in arr_0, labels in arr_1, class names in classes; X/: a folder of PNGs, "
        "written batch by batch (repeat an interrupted call to continue it)",
        metavar="PATH",
    )
    weights: str = flag("ema", "the moving average, or the last weights", choices=("ema", "raw"))

    n: int | None = flag(
        None,
        "number of images (default: 64, or up to 8 of each class)",
        low=1,
        high=10**6,
        group="images",
    )
    label: list[str] | None = flag(  # noqa: RUF009
        None,
        "class to sample; separate several with commas, or repeat the flag (default: all)",
        metavar="CLASS",
    )
    guidance: float = flag(
        0.0,
        "guidance w: 0 is without guidance, -1 without a class; other libraries call 1 + w the scale",
        low=-1,
        high=100,
    )
    seed: int = flag(0, "different seeds give different images", low=0, high=2**31)

    steps: int | None = flag(
        None,
        "number of timesteps (default: all T, ancestral sampling); fewer use DDIM, or ancestral "
        "sampling with --variance or learned variances",
        low=1,
        group="sampler",
    )
    spacing: str = flag(
        "even",
        "which timesteps to choose: quadratic has more of them near t = 1",
        choices=tuple(sampling.SPACINGS),
        alias="--grid",
    )
    eta: float | None = flag(
        None, "noise of DDIM, from 0 (default) to 1; selects DDIM", low=0, high=1
    )
    variance: str | None = flag(
        None,
        "variance of ancestral sampling (default: learned if possible, otherwise the checkpoint's)",
        choices=("beta", "beta_tilde", "learned"),
    )

    batch_size: int = flag(256, "number of images sampled at a time", low=1, group="machine")
    device: str = flag("auto", "device to compute on: auto, cpu, cuda, cuda:1, mps, ...")
    precision: str = flag(
        "auto",
        "precision of the network; auto is the training's precision if the hardware has it",
        choices=("auto", "fp32", "bf16"),
    )
    compile: bool = flag(False, "compile the network: slow to start, faster on a GPU")


def main(cfg, given):
    # Everything that can be wrong is checked first, since sampling may take hours.
    device = devices.pick_device(cfg.device)
    kind = pictures.kind_of(cfg.out)
    ckpt, net, d = checkpoint.load_model(cfg.ckpt, cfg.weights, device)
    classes = ckpt["classes"]
    how = sampler(cfg, given, ckpt, d.T)
    labels, rows = sampling.class_labels(classes, cfg.label, cfg.n)
    n = len(labels)
    numbers = range(n)
    if kind == "/":
        names = pictures.png_names(labels, classes)
        numbers = pictures.missing(cfg.out, names)
        if len(numbers) < n:
            note(
                f"note: {cfg.out} keeps its {n - len(numbers):,} of {n:,} images, however they were made"
            )
    elif kind != ".npz":
        pictures.reject_too_large(kind, ckpt["shape"], n, rows)
    bf16 = devices.samples_in_bf16(cfg.precision, device, ckpt.get("config", {}).get("precision"))
    devices.use_precision(bf16)
    net = torch.compile(net) if cfg.compile else net

    every = max(1, how["steps"] // FRAMES) if kind in pictures.FILMS else how["steps"]
    parts = []
    for batch, frames in sampled(cfg, net, d, ckpt, numbers, labels, how, bf16, every):
        if kind == "/":
            pictures.write_pngs(cfg.out, [names[i] for i in batch], frames[-1])
        else:
            parts.append(frames)
    if kind != "/":
        frames = [np.concatenate(part) for part in zip(*parts, strict=True)]
        pictures.write(cfg.out, kind, frames, rows, labels, classes)
    _, H, W = ckpt["shape"]
    way = "DDIM, {steps} steps, eta {eta:g}"
    if how["eta"] is None:
        way = "ancestral, {steps} steps, sigma^2 = {variance}"
    if cfg.guidance:
        way += ", w = {guidance:g}"
    title = checkpoint.title(ckpt, cfg.weights)
    say(f"{cfg.out}: {n} images of {H}x{W}, {way.format(**how)}, {title}")


def sampler(cfg, given, ckpt, T):
    """Return the sampler that the flags choose, as arguments of sampling.sample().

    eta None is ancestral sampling (Algorithm 2). Raises UsageError for flags that have no effect.
    """
    steps = T if cfg.steps is None else cfg.steps
    learned = checkpoint.learned(ckpt)
    if steps > T:
        raise UsageError(f"--steps {steps}: the checkpoint has T = {T} timesteps; use 1 to {T}")
    if "spacing" in given and steps == T:
        raise UsageError(f"--spacing {cfg.spacing}: all {T} timesteps are used; add --steps")
    if cfg.variance and cfg.eta is not None:
        raise UsageError("--eta is for DDIM, --variance for ancestral sampling; use one of them")
    if cfg.variance == "learned" and not learned:
        raise UsageError("--variance learned: this network has no learned variance")
    if given & {"label", "guidance"} and not ckpt["classes"]:
        raise UsageError("--label, --guidance: this network has no classes (train.py --labels)")
    if cfg.label and cfg.guidance == -1:
        raise UsageError("--label has no effect with --guidance -1, which samples without a class")
    if cfg.weights == "raw" and not checkpoint.holds_run(ckpt):
        raise UsageError("--weights raw has no effect: converted weights have no moving average")
    # With fewer timesteps, fixed variances leave noise in the image, so DDIM is the default. Learned
    # variances adapt to the timesteps (iDDPM sec. 4).
    eta = cfg.eta
    if eta is None and steps < T and not cfg.variance and not learned:
        eta = 0.0
        if ckpt["shape"][0] == 3 and 0 < ckpt["step"] < SHORT:
            note("note: after a short training, eta 0 gives oversaturated colours; try --eta 1")
    variance = cfg.variance or ckpt["process"]["variance"]
    how = dict(steps=steps, spacing=cfg.spacing, eta=eta, variance=variance)
    return dict(how, guidance=cfg.guidance, clip=ckpt["process"]["clip"])


def sampled(cfg, net, d, ckpt, numbers, labels, how, bf16, every):
    """Sample the images with these numbers; yield (numbers, frames) batch by batch.

    frames: uint8 (B, H, W, C) after every `every` steps. The last ones are the images.
    """
    steps = how["steps"]
    batches = [numbers[i : i + cfg.batch_size] for i in range(0, len(numbers), cfg.batch_size)]
    progress = Progress("sampling", steps * len(batches), "steps")
    count = itertools.count(1)
    for batch in batches:
        frames = []

        def on_step(s, xs, frames=frames):
            done = next(count)
            progress(done)
            if -done % steps % every == 0:  # counted from the end, so that it includes the images
                frames.append(pictures.to_uint8(xs))

        y = labels[batch] if ckpt["classes"] else None
        seeds = sampling.image_seeds(cfg.seed, batch)
        # Only the network computes in bf16: x_t stays float32 from timestep to timestep.
        with torch.autocast(next(net.parameters()).device.type, torch.bfloat16, enabled=bf16):
            x0 = sampling.sample(net, d, ckpt["shape"], seeds, y, on_step=on_step, **how)
        if not x0.isfinite().all():
            raise Failure(f"{cfg.ckpt}: the network's output is not finite; its training diverged")
        yield batch, frames
    progress.close()


if __name__ == "__main__":
    command.run(main, Config, __doc__)

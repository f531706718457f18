"""From a checkpoint to pictures: a grid, a film of the reverse process, an array, or a folder of PNGs.

python sample.py --ckpt ckpt.pt --out grid.png
python sample.py --ckpt ckpt.pt --out grid.png --label 3,8 --guidance 1.5 --steps 100
"""

import support.start  # noqa: F401, and first: see there

# isort: split
import itertools
from dataclasses import MISSING, dataclass

import numpy as np
import torch

from support import checkpoint, command, devices, pictures, sampling
from support.command import flag
from support.errors import Failure, UsageError
from support.files import refuse_input
from support.progress import Progress, note, say

FRAMES = 24  # of a film, about
SHORT = (
    50_000  # steps of training, before which a network is wrong about colours (docs/training.md)
)


@dataclass(frozen=True)
class Config:
    ckpt: str = flag(
        MISSING,
        "checkpoint that train.py or convert.py wrote; it carries its configuration",
        group="input and output",
        metavar="PATH",
    )
    out: str = flag(
        MISSING,
        "X.png: a grid; X.gif or X.webp: a film of the reverse process; X.npz: images "
        "as uint8 (N, H, W, 3) in arr_0, and their labels in arr_1; X/: a folder of PNGs",
        metavar="PATH",
    )
    weights: str = flag(
        "ema", "weights to use: their moving average, or the last", choices=("ema", "raw")
    )

    n: int | None = flag(
        None,
        "number of images (default: 64, or up to 8 of each class)",
        low=1,
        high=10**6,
        group="images",
    )
    label: str | None = flag(
        None,
        "classes to draw, by name, such as 7 or cat,dog (default: all); a grid has one a row",
        metavar="CLASS",
    )
    guidance: float | None = flag(
        None,
        "w of classifier-free guidance, eps = (1 + w) eps(x, y) - w eps(x): 0, the default, is the "
        "class alone, and -1 no class; other libraries call 1 + w the scale",
        low=-1,
        high=100,
    )
    seed: int = flag(0, "image i is drawn from seed + i, at any batch size", low=0, high=2**31)

    steps: int | None = flag(
        None,
        "number of steps, chosen from T by --grid; all of them, the default, is ancestral sampling; "
        "fewer is DDIM, or ancestral sampling if --variance is given or learned",
        low=1,
        group="sampler",
    )
    grid: str = flag(
        "even",
        "which steps to choose: quadratic has more of them near t = 1",
        choices=tuple(sampling.GRIDS),
    )
    eta: float | None = flag(
        None, "noise of DDIM, from 0 (its default) to 1; if given, DDIM is used", low=0, high=1
    )
    variance: str | None = flag(
        None,
        "variance of the steps of ancestral sampling (default: learned, if the network has learned it; "
        "otherwise beta, or what came with converted weights)",
        choices=("beta", "beta_tilde", "learned"),
    )

    batch_size: int = flag(256, "number of images drawn at a time", low=1, group="machine")
    device: str = flag("auto", "device to compute on: auto, cpu, cuda, cuda:1, mps, ...")
    precision: str = flag(
        "auto",
        "precision of the network; auto is that of its training, where the hardware has it",
        choices=("auto", "fp32", "bf16"),
    )
    compile: bool = flag(False, "compile the network: slow to start, faster on a GPU")


def main(cfg, given):
    # What is asked for, and whether it can be had: the file, the network, the sampler, the classes. All
    # refusals come first, since sampling may take hours.
    device = devices.pick_device(cfg.device)
    kind = pictures.kind_of(cfg.out)
    refuse_input(cfg.out, cfg.ckpt)
    ckpt, net, d = checkpoint.load_model(cfg.ckpt, cfg.weights, device)
    steps, eta, variance = sampler(cfg, ckpt, d.T)
    if "grid" in given and steps == d.T:
        raise UsageError(
            f"--grid {cfg.grid}: chooses some of the {d.T} steps; say how many with --steps"
        )
    if cfg.guidance is not None and not ckpt["classes"]:
        raise UsageError(
            f"--guidance {cfg.guidance:g}: the network knows no classes (train.py --labels)"
        )
    labels, rows = sampling.class_labels(ckpt["classes"], cfg.label, cfg.n)
    pictures.refuse_too_large(kind, ckpt["shape"], len(labels), rows)
    if eta == 0 and cfg.eta is None and ckpt["shape"][0] == 3 and 0 < ckpt["step"] < SHORT:
        note(
            "note: eta 0 makes the colours of so short a training too strong; --eta 1 corrects them"
        )

    # The images, a batch at a time, and what a film shows of them on the way. Only the network computes in
    # bf16: x_t stays float32 from step to step.
    bf16 = devices.samples_in_bf16(cfg.precision, device, ckpt.get("config", {}).get("precision"))
    devices.use_precision(bf16)
    net = torch.compile(net) if cfg.compile else net
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        images, film = draw(
            cfg, net, d, ckpt, labels, steps, eta, variance, filming=kind in pictures.SIDES
        )

    # The file, and one line that says how it was drawn.
    pictures.write(cfg.out, kind, images, labels if ckpt["classes"] else None, rows, film)
    equals = "is" if variance == "learned" else "="
    how = (
        f"ancestral, {steps} steps, sigma^2 {equals} {variance}"
        if eta is None
        else f"DDIM, {steps} steps, eta {eta:g}"
    )
    how += f", w = {cfg.guidance:g}" if cfg.guidance else ""
    _, H, W = ckpt["shape"]
    say(f"{cfg.out}: {len(images)} images of {H}x{W}, {how}, {checkpoint.title(ckpt, cfg.weights)}")


def sampler(cfg, ckpt, T):
    """Steps, eta and variance that the flags ask for; eta None is ancestral sampling (Algorithm 2)."""
    steps = T if cfg.steps is None else cfg.steps
    if steps > T:
        raise UsageError(f"--steps {steps}: the checkpoint has T = {T} steps; ask for 1 to {T}")
    if cfg.variance and cfg.eta is not None:
        raise UsageError(
            "--eta: belongs to DDIM, and --variance to ancestral sampling; give one of them"
        )
    learned = checkpoint.learned(ckpt)
    if cfg.variance == "learned" and not learned:
        raise UsageError(
            "--variance learned: this network has learned none (train.py --variance learned)"
        )
    # Fewer steps are DDIM by default: with them, fixed variances leave noise in the image. Learned ones adapt
    # to the steps (iDDPM sec. 4).
    implicit = cfg.eta is not None or (steps < T and not cfg.variance and not learned)
    return (
        steps,
        (cfg.eta or 0.0) if implicit else None,
        cfg.variance or ckpt["process"]["variance"],
    )


def draw(cfg, net, d, ckpt, labels, steps, eta, variance, filming):
    """The images uint8 (N, H, W, C), and the frames of a film, each as large; no frames unless filming."""
    n, progress, done = len(labels), Progress("sampling", steps * len(labels), "image-steps"), 0
    images, films = [], []  # of each batch
    for first in range(0, n, cfg.batch_size):
        y = labels[first : first + cfg.batch_size]
        film, steps_left = [], itertools.count(steps - 1, -1)

        def on_step(s, xs, film=film, steps_left=steps_left, first=first):
            nonlocal done
            done += len(xs)
            progress(done, f"image {first + len(xs)} of {n}")
            # Counted from the end, so that the last frame is the finished image.
            if next(steps_left) % max(1, steps // FRAMES) == 0 and filming:
                film.append(pictures.to_uint8(xs))

        # A generator for each image, and not one for the batch: a seed gives one image at any batch size.
        seeds = range(cfg.seed + first, cfg.seed + first + len(y))
        x0 = sampling.sample(
            net,
            d,
            ckpt["shape"],
            seeds,
            y if ckpt["classes"] else None,
            steps,
            eta,
            variance,
            cfg.guidance or 0.0,
            ckpt["process"]["clip"],
            cfg.grid,
            on_step,
        )
        if not x0.isfinite().all():
            raise Failure(f"{cfg.ckpt}: the network's output is not finite; its training diverged")
        images.append(pictures.to_uint8(x0))
        films.append(film)
    progress.close()
    return np.concatenate(images), [np.concatenate(frames) for frames in zip(*films, strict=True)]


if __name__ == "__main__":
    command.run(main, Config, __doc__)

"""Sample images from a checkpoint.

python sample.py --ckpt ckpt.pt --out grid.png
python sample.py --ckpt ckpt.pt --out grid.png --label 3,8 --guidance 1.5 --steps 100

--out: X.png is a grid, X.gif or X.webp a film of the reverse process, X.npz uint8 (N, H, W, 3) in
arr_0 with labels in arr_1 and class names in classes, X/ a folder of PNGs, which the same call
continues after an interruption. Fewer --steps than T use DDIM, unless variances are learned.
"""

import itertools
import pathlib
import sys
from dataclasses import MISSING, dataclass

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # also under python -P

import torch

from support import checkpoint, command, devices, pictures, sampling
from support.command import flag
from support.errors import Failure, UsageError
from support.progress import Progress, note, say

FRAMES = 24  # the approximate number of frames of a film
SHORT = 50_000  # training steps below which a network gets colours wrong (docs/training.md)
VARIANCES = ("beta", "beta_tilde", "learned")


@dataclass(frozen=True)
class Config:
    ckpt: str = flag(MISSING, "checkpoint, or a diffusers folder", group="input and output")
    out: str = flag(MISSING, "X.png, X.gif, X.webp, X.npz or X/, as described above")
    weights: str = flag("ema", "the moving average, or the last weights", choices=("ema", "raw"))

    n: int | None = flag(None, "how many (64, or 8 per class)", low=1, high=10**6, group="images")
    label: list[str] | None = flag(None, "classes, such as cat,dog (default: all)")  # noqa: RUF009
    guidance: float = flag(0.0, "guidance w (elsewhere the scale 1 + w)", low=-1, high=100)
    seed: int = flag(0, "different seeds give different images", low=0, high=2**31)

    steps: int | None = flag(None, "number of timesteps (default: T)", low=1, group="sampler")
    spacing: str = flag("even", "which timesteps", choices=tuple(sampling.SPACINGS), alias="--grid")
    eta: float | None = flag(None, "use DDIM with this much noise", low=0, high=1)
    variance: str | None = flag(None, "use ancestral sampling", choices=VARIANCES)

    batch_size: int = flag(256, "number of images sampled at a time", low=1, group="machine")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    precision: str = flag("auto", "auto is as in training", choices=("auto", "fp32", "bf16"))
    compile: bool = flag(False, "compile the network: slow to start, faster on a GPU")


def main(cfg, given):
    # Everything that can be wrong is checked first, since sampling may take hours.
    device = devices.pick_device(cfg.device)
    ckpt, net, d = checkpoint.load_model(cfg.ckpt, cfg.weights, device)
    how = sampler(cfg, given, ckpt, d.T)
    labels, rows = sampling.class_labels(ckpt["classes"], cfg.label, cfg.n)
    kind, numbers = pictures.plan(cfg.out, ckpt["shape"], rows, labels, ckpt["classes"])
    n = len(labels)
    kept = n - len(numbers)
    if kept:
        note(f"note: {cfg.out} keeps its {kept:,} of {n:,} images, however they were made")
    bf16 = devices.samples_in_bf16(cfg.precision, device, ckpt.get("config", {}).get("precision"))
    devices.use_precision(bf16)
    net = torch.compile(net) if cfg.compile else net
    every = max(1, how["steps"] // FRAMES) if kind in pictures.FILMS else how["steps"]
    batches = sampled(cfg, net, d, ckpt["shape"], numbers, labels, how, every)
    # Only the network computes in bf16: x_t stays float32 from timestep to timestep.
    with devices.autocast(device, "bf16" if bf16 else "fp32"):
        pictures.write(cfg.out, kind, batches, rows, labels, ckpt["classes"])
    _, H, W = ckpt["shape"]
    way = "DDIM, {steps} steps, eta {eta:g}"
    if how["eta"] is None:
        way = "ancestral, {steps} steps, sigma^2 = {variance}"
    if cfg.guidance:
        way += ", w = {guidance:g}"
    way = f"{way.format(**how)}, {checkpoint.title(ckpt, cfg.weights)}"
    say(f"{cfg.out}: {n} images of {H}x{W}, {way}")


def sampler(cfg, given, ckpt, T):
    """Return the sampler that the flags choose, as arguments of sampling.sample()."""
    steps = cfg.steps or T
    learned = checkpoint.learned(ckpt)
    choice = given & {"label", "guidance"}
    raw = cfg.weights == "raw" and not checkpoint.holds_run(ckpt)
    for wrong, message in (
        (steps > T, f"--steps {steps}: the checkpoint has T = {T} timesteps; use 1 to {T}"),
        (steps == T and "spacing" in given, f"--spacing: all {T} timesteps are used; add --steps"),
        (cfg.variance and cfg.eta is not None, "--eta selects DDIM, --variance does not; use one"),
        (cfg.variance == "learned" and not learned, "--variance learned: this network has none"),
        (choice and not ckpt["classes"], "--label, --guidance: this network has no classes"),
        (cfg.label and cfg.guidance == -1, "--label: --guidance -1 samples without a class"),
        (raw, "--weights raw has no effect: converted weights have no moving average"),
    ):
        if wrong:
            raise UsageError(message)
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


def sampled(cfg, net, d, shape, numbers, labels, how, every):
    """Yield batches (numbers, frames): the images (B, H, W, C) after every `every` steps."""
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

        seeds = sampling.image_seeds(cfg.seed, batch)
        x0 = sampling.sample(net, d, shape, seeds, labels[batch], on_step=on_step, **how)
        if not x0.isfinite().all():
            raise Failure(f"{cfg.ckpt}: the network's output is not finite; its training diverged")
        yield batch, frames
    progress.close()


if __name__ == "__main__":
    command.run(main, Config, __doc__)

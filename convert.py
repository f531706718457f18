"""Published weights in, ours out: checkpoints, folders in diffusers' layout, the authors' weights.

python convert.py --ckpt ddpm-cifar10-32 --out cifar10-32.pt     a folder, as diffusers writes it
python convert.py --ckpt model-790000.ckpt --out cifar10-32.pt   the authors' weights, in PyTorch
python convert.py --ckpt ckpt.pt --out my-model/                 a checkpoint of train.py, for diffusers
"""

import support.start  # noqa: F401, and first: see there

# isort: split
import os
import pathlib
from dataclasses import MISSING, dataclass

from support import checkpoint, command, diffusers_format
from support.command import flag
from support.errors import Failure, UsageError
from support.files import replacing_folder, takes_files
from support.progress import note, say


@dataclass(frozen=True)
class Config:
    ckpt: str = flag(
        MISSING,
        "what to convert: a folder in diffusers' layout, the authors' weights in their "
        "PyTorch port, or a checkpoint of train.py",
        group="input and output",
        metavar="PATH",
    )
    out: str = flag(
        MISSING,
        "what to write: X.pt for a checkpoint; X/ for a folder that diffusers loads",
        metavar="PATH",
    )
    weights: str = flag(
        "ema",
        "weights to take from a checkpoint: their moving average, or the last ones",
        choices=("ema", "raw"),
    )
    classes: str | None = flag(
        None,
        "names of the classes of a folder's network, with commas: one for each "
        "row of its class_embedding but the last, which must mean no label",
        metavar="NAMES",
    )


def main(cfg, given):
    out, to_folder = pathlib.Path(cfg.out), cfg.out.endswith(("/", os.sep))
    refuse(cfg, out, to_folder)
    with checkpoint.refusing(cfg.ckpt):
        held = read(cfg)
        weights = held["weights"]  # one set stands for the average and for the last ones
        parts = {name: held[name] for name in ("network", "shape", "classes", "process")}
        parts = dict(parts, model=weights, ema=weights, step=0)
        checkpoint.check_contents(parts)  # what the other commands would refuse is not written
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise Failure(f"{cfg.ckpt}: its weights are not finite")
    if to_folder:
        with replacing_folder(cfg.out) as folder:
            diffusers_format.write_folder(folder, held)
    else:
        checkpoint.save(cfg.out, parts)
    describe(cfg, held)


def refuse(cfg, out, to_folder):
    """Refuses an output that is neither of the two, or cannot be written, or is there already."""
    if not to_folder and out.suffix != ".pt":
        raise UsageError(f"--out {cfg.out}: must end in .pt for a checkpoint, or in / for a folder")
    if os.path.lexists(out):
        raise Failure(f"--out {cfg.out}: exists; name a new one")
    takes_files(out, cfg.out)


def read(cfg):
    """What --ckpt holds, as support/diffusers_format.py says it."""
    names = [name.strip() for name in cfg.classes.split(",")] if cfg.classes else []
    if os.path.isdir(cfg.ckpt):
        return diffusers_format.read_folder(cfg.ckpt, names)
    if not os.path.isfile(cfg.ckpt):
        raise Failure(
            f"{cfg.ckpt}: no such file or folder; nothing is downloaded here, and "
            f"docs/weights-and-fid.md says how to fetch published weights"
        )
    if names:
        raise UsageError("--classes: only a folder in diffusers' layout takes it")
    if not checkpoint.sealed(cfg.ckpt):
        return diffusers_format.read_authors(cfg.ckpt)
    ckpt = checkpoint.load(cfg.ckpt)
    return dict(ckpt, weights=ckpt["ema" if cfg.weights == "ema" else "model"])


def describe(cfg, held):
    """Prints what was written, and how to use it."""
    (C, H, W), process, classes = held["shape"], held["process"], held["classes"]
    if held.get("assumed"):
        note("note: no scheduler_config.json came with it: the process is the paper's")
    say(
        f"{cfg.out}: {sum(w.numel() for w in held['weights'].values()):,} parameters, images {H}x{W}x{C}"
        + (f", {len(classes)} classes" if classes else "")
        + f"; {process['schedule']} schedule, T = {len(process['beta']) - 1}, "
        f"variance {process['variance']}, x0 {'' if process['clip'] else 'not '}clipped"
    )
    if not cfg.out.endswith(("/", os.sep)):
        say(f"now: python sample.py --ckpt {command.typed(cfg.out)} --out grid.png")
    elif classes:
        say(f"now: UNet2DModel.from_pretrained({cfg.out!r}); DDPMPipeline hands on no labels")
    else:
        say(f"now: DDPMPipeline.from_pretrained({cfg.out!r})")


if __name__ == "__main__":
    command.run(main, Config, __doc__)

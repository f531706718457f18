"""Convert diffusers folders, the authors' weights and state_dicts to checkpoints, or checkpoints to diffusers folders.

python convert.py --ckpt ddpm-cifar10-32 --out cifar10-32.pt     a diffusers folder
python convert.py --ckpt model-790000.ckpt --out cifar10-32.pt   the authors' weights, in PyTorch
python convert.py --ckpt ckpt.pt --out my-model/                 a checkpoint of train.py, for diffusers
python convert.py --ckpt weights.pt --groups 32 --size 32 --schedule linear --out net.pt
                                                                 net.state_dict() of a copied ddpm.py
"""

import os
import pathlib
import sys
from dataclasses import MISSING, dataclass

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from support import checkpoint, command, diffusers_format, recipes
from support.command import flag
from support.errors import Failure, UsageError
from support.files import replacing_folder, writable, writable_folder
from support.progress import say


@dataclass(frozen=True)
class Config:
    ckpt: str = flag(
        MISSING,
        "a diffusers folder, the authors' weights, a state_dict, or a checkpoint of train.py",
        group="input and output",
        metavar="PATH",
    )
    out: str = flag(MISSING, "X.pt for a checkpoint, X/ for a diffusers folder", metavar="PATH")
    weights: str = flag("ema", "moving average or last weights", choices=("ema", "raw"))
    dtype: str = flag(
        "fp32",
        "type of the weights in a diffusers folder; bf16 halves its size",
        choices=("fp32", "bf16"),
    )
    classes: str | None = flag(
        None,
        "class names, separated by commas, one for each row of the class embedding except the "
        "last, which means no label; ignored if the folder contains classes.txt",
        metavar="NAMES",
    )

    groups: int | None = flag(
        None, "number of groups in GroupNorm", low=1, group="only for a state_dict"
    )
    size: tuple | None = flag(None, "image size", type=recipes.size, metavar="HxW")
    schedule: str | None = flag(None, "noise schedule", choices=tuple(checkpoint.SCHEDULES))
    timesteps: int = flag(1000, "number of timesteps T in training", low=1, high=10**6)


def main(cfg, given):
    to_folder = cfg.out.endswith(("/", os.sep))
    if not to_folder and not cfg.out.endswith(".pt"):
        raise UsageError(f"--out {cfg.out}: must end in .pt for a checkpoint, or in / for a folder")
    if os.path.lexists(cfg.out):
        raise Failure(f"--out {cfg.out}: exists; choose another path")
    if "dtype" in given and not to_folder:
        raise UsageError("--dtype: only for a folder; a checkpoint always has float32 weights")
    if to_folder:
        writable_folder(cfg.out)
    else:
        writable(cfg.out)
    ckpt = read(cfg, given)
    checkpoint.check(cfg.ckpt, ckpt)
    if to_folder:
        with replacing_folder(cfg.out) as folder:
            diffusers_format.write_folder(folder, ckpt, cfg.dtype)
    else:
        checkpoint.save(cfg.out, ckpt)
    describe(cfg, ckpt)


def read(cfg, given):
    """Return the network in --ckpt as a checkpoint without a run."""
    path = cfg.ckpt
    names = [name.strip() for name in cfg.classes.split(",")] if cfg.classes else []
    if not os.path.exists(path):
        raise Failure(
            f"{path}: no such file or folder; docs/weights-and-fid.md tells what to download"
        )
    if os.path.isdir(path):
        reject_others(given, "classes")
        return diffusers_format.read_folder(path, names)
    if checkpoint.sealed(path):
        reject_others(given, "weights")
        ckpt = checkpoint.load(path)
        weights = ckpt["ema" if cfg.weights == "ema" else "model"]
        parts = {name: ckpt[name] for name in checkpoint.FIELDS}
        return dict(parts, model=weights, ema=weights)
    found = diffusers_format.read_weights(path)
    if not diffusers_format.is_state_dict(found):
        reject_others(given)
        return diffusers_format.read_authors(path, found)
    reject_others(given, "classes", "groups", "size", "schedule", "timesteps")
    if not {"groups", "size", "schedule"} <= given:
        raise UsageError(
            f"{path}: is a state_dict; add --groups, --size and --schedule of its training"
        )
    beta = checkpoint.SCHEDULES[cfg.schedule](cfg.timesteps)
    process = dict(beta=beta, schedule=cfg.schedule, clip=True)
    return diffusers_format.read_state_dict(found, cfg.groups, cfg.size, process, names)


def reject_others(given, *used):
    """Raise UsageError for a flag without effect on this kind of input."""
    for name in given - {"ckpt", "out", "dtype", *used}:
        raise UsageError(f"--{name}: has no effect on this kind of --ckpt")


def describe(cfg, ckpt):
    """Print what was written, and how to use it."""
    (C, H, W), process, classes = ckpt["shape"], ckpt["process"], ckpt["classes"]
    count = sum(weight.numel() for weight in ckpt["ema"].values())
    say(
        f"{cfg.out}: {count:,} parameters, images {H}x{W}x{C}, {len(classes)} classes; "
        f"{process['schedule']} schedule, T = {len(process['beta']) - 1}, "
        f"variance {process['variance']}, x0 {'' if process['clip'] else 'not '}clipped"
    )
    say(f"now: python sample.py --ckpt {command.typed(cfg.out)} --out grid.png")
    if cfg.out.endswith(("/", os.sep)):
        kind = "UNet2DModel" if classes else "DDPMPipeline"  # a pipeline passes no labels
        say(f"or, in diffusers: {kind}.from_pretrained({cfg.out!r})")


if __name__ == "__main__":
    command.run(main, Config, __doc__)

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
from support.files import replacing_folder, writable
from support.progress import say


@dataclass(frozen=True)
class Config:
    ckpt: str = flag(MISSING, "diffusers folder, checkpoint or weights", group="input and output")
    out: str = flag(MISSING, "X.pt for a checkpoint, X/ for a diffusers folder")
    weights: str = flag("ema", "moving average or last weights", choices=("ema", "raw"))
    dtype: str = flag("fp32", "type of the weights in a folder", choices=("fp32", "bf16"))
    classes: str | None = flag(None, "class names, separated by commas, unless in classes.txt")

    groups: int | None = flag(None, "groups in GroupNorm", low=1, group="only for a state_dict")
    size: tuple | None = flag(None, "image size", type=recipes.size, metavar="HxW")
    schedule: str | None = flag(None, "noise schedule", choices=tuple(checkpoint.SCHEDULES))
    timesteps: int = flag(1000, "number of timesteps T in training", low=1, high=10**6)


def main(cfg, given):
    to_folder = cfg.out.endswith(("/", os.sep))
    if not to_folder and not cfg.out.endswith(".pt"):
        raise UsageError(f"--out {cfg.out}: must end in .pt for a checkpoint, or in / for a folder")
    if "dtype" in given and not to_folder:
        raise UsageError("--dtype: only for a folder; a checkpoint always has float32 weights")
    if os.path.lexists(cfg.out):
        raise Failure(f"--out {cfg.out}: exists; choose another path")
    writable(cfg.out, folder=to_folder)
    ckpt = read(cfg, given)
    if to_folder:
        with replacing_folder(cfg.out) as folder:
            diffusers_format.write_folder(folder, ckpt, cfg.dtype)
    else:
        checkpoint.save(cfg.out, ckpt)

    C, H, W = ckpt["shape"]
    process = ckpt["process"]
    count = sum(weight.numel() for weight in ckpt["ema"].values())
    say(
        f"{cfg.out}: {count:,} parameters, images {H}x{W}x{C}, {len(ckpt['classes'])} classes; "
        f"{process['schedule']} schedule, T = {len(process['beta']) - 1}, "
        f"variance {process['variance']}, x0 {'' if process['clip'] else 'not '}clipped"
    )
    say(f"now: python sample.py --ckpt {command.typed(cfg.out)} --out grid.png")
    if to_folder:
        kind = "UNet2DModel" if ckpt["classes"] else "DDPMPipeline"  # a pipeline passes no labels
        say(f"or, in diffusers: {kind}.from_pretrained({cfg.out!r})")


def read(cfg, given):
    """Return the network in --ckpt as a checkpoint without a run."""
    path = cfg.ckpt
    classes = [name.strip() for name in cfg.classes.split(",")] if cfg.classes else []
    if not os.path.exists(path):
        raise Failure(f"{path}: no such file or folder; see docs/weights-and-fid.md")
    used = {"ckpt", "out", "dtype"}
    if os.path.isdir(path):
        if not os.path.exists(os.path.join(path, "classes.txt")):
            used.add("classes")
        ckpt = diffusers_format.read_folder(path, classes)
    elif checkpoint.unsealed(path):
        used.add("weights")
        saved = checkpoint.load(path)
        weights = saved["ema" if cfg.weights == "ema" else "model"]
        ckpt = {name: saved[name] for name in checkpoint.FIELDS} | dict(model=weights, ema=weights)
    else:
        found = diffusers_format.read_weights(path)
        if {"time.0.weight", "conv_in.weight", "conv_out.weight"} <= found.keys():
            if not {"groups", "size", "schedule"} <= given:
                raise UsageError(f"{path}: is a state_dict; add --groups, --size and --schedule")
            used.update(["classes", "groups", "size", "schedule", "timesteps"])
            process = checkpoint.process(cfg.schedule, cfg.timesteps, "fixed")
            ckpt = diffusers_format.read_state_dict(found, cfg.groups, cfg.size, process, classes)
        else:
            ckpt = diffusers_format.read_authors(path, found)
    for name in given - used:
        raise UsageError(f"--{name}: has no effect on this kind of --ckpt")
    checkpoint.check(path, ckpt)
    return ckpt


if __name__ == "__main__":
    command.run(main, Config, __doc__)

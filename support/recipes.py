"""The settings of a run: those that suit its data, those of the run to resume or of the weights to start
from, and its network's sizes."""

import math
import os
import pathlib
from dataclasses import replace

from support import command
from support.checkpoint import SCHEDULES, fit, holds_run, learned
from support.data import is_folder
from support.errors import UsageError

# The paper's settings (App. B), made for CIFAR-10 and taken for photos too.
PAPER = dict(batch_size=128, lr=2e-4, warmup=5000, decay="none", ema=0.9999, dropout=0.1,
             flip="yes", schedule="linear", width=128, labels=False)
# A network a thirtieth of the paper's cost: the digits are legible after two minutes on two cores.
# A high rate that falls to 0 and a short average suit so few steps; digits have no mirror images.
GLYPHS = dict(batch_size=32, lr=4e-3, warmup=20, decay="cosine", ema=0.999, dropout=0.0,
              flip="no", schedule="cosine", width=24, labels=True)


def settled(cfg, given, saved=None, start=None):
    """The settings of a run: a new one, one to resume (`saved`), or one from other weights (`start`)."""
    if is_folder(cfg.data):  # its absolute path: the run may be resumed from another folder
        cfg = replace(cfg, data=os.path.abspath(cfg.data))
    if saved:
        return resumed(cfg, given, saved)
    return started(cfg, given, start) if start else complete(cfg)


def complete(cfg, shape=(3, 32, 32)):
    """`cfg` with the settings of its data wherever no flag gave one; a folder's images become `shape`."""
    recipe = GLYPHS if cfg.data == "glyphs" else PAPER
    if cfg.init:  # trained weights: gentler steps, and a warm-up that only has to fill Adam's averages
        recipe = dict(recipe, lr=recipe["lr"] / 10, warmup=min(100, recipe["warmup"]))
    if is_folder(cfg.data):
        C, H, W = shape
        recipe = dict(recipe, size=f"{H}x{W}", channels=C)
    else:
        for name in ("size", "channels"):
            if getattr(cfg, name) is not None:
                raise UsageError(f"--{name}: only a folder of images takes it; {cfg.data} has its own")
    return replace(cfg, **{name: value for name, value in recipe.items() if getattr(cfg, name) is None})


def started(cfg, given, start):
    """The settings of a new run from the weights of the checkpoint `start`, which keep their network and
    process. Raises UsageError for a flag that contradicts them."""
    process = start["process"]
    kept = dict(width=start["network"]["ch"], timesteps=len(process["beta"]) - 1,
                schedule=process["schedule"] if process["schedule"] in SCHEDULES else None,
                variance="learned" if learned(start) else "fixed")
    if is_folder(cfg.data):
        kept["channels"] = start["shape"][0]
    for name, value in kept.items():
        if name in given and getattr(cfg, name) != value:
            raise UsageError(f"{command.flag_name(name)} {getattr(cfg, name)}: the weights of --init have "
                             f"{value or 'a table of their own'}, and cannot change it")
    if "out" not in given:  # the weights must not be replaced by what is made of them
        kept["out"] = pathlib.Path(cfg.init).stem + "-tuned.pt"
    return replace(complete(cfg, start["shape"]), **kept)


def resumed(cfg, given, saved):
    """The settings of a saved run, changed by the flags `given` now. Refuses what a run cannot change.

    Raises UsageError for such a flag, and an exception for checkpoint.refusing() if a setting is wrong.
    """
    if cfg.init:
        raise UsageError("--init: starts a new run, and --resume goes on with one; give one of them")
    if not holds_run(saved):
        raise UsageError(f"--resume {cfg.resume}: holds a network, and no run to go on with; --init starts "
                         f"one from it")
    for name in ("data", "size", "channels", "labels", "limit", "seed", "batch_size", "schedule", "variance",
                 "timesteps", "width", "dropout"):
        if name in given and getattr(cfg, name) != saved["config"][name]:
            raise UsageError(f"{command.flag_name(name)} {getattr(cfg, name)}: the run to resume has "
                             f"{saved['config'][name]}, and cannot change it")
    fit({"data", "seed", "timesteps", *PAPER} <= set(saved["config"]))
    settings = command.restored(type(cfg), saved["config"])
    fit(not is_folder(settings["data"]) or (settings["size"] and settings["channels"]))
    # Where this run writes is said by its own command line: a file may come from a stranger.
    own = dict(data_dir=cfg.data_dir, log=cfg.log, init=None, resume=cfg.resume,
               out=cfg.out if "out" in given else cfg.resume)
    return type(cfg)(**(settings | {name: getattr(cfg, name) for name in given} | own))


def network(cfg, shape, classes, start=None):
    """The arguments of ddpm.UNet for images `shape` (C, H, W) and so many classes.

    Photos have the paper's network for 32x32 or for 256x256, or a shorter one of the latter in between; the
    weights of the checkpoint `start` keep theirs. Raises UsageError for a size or a width that its levels
    or groups do not divide.
    """
    (C, H, W), glyphs = shape, cfg.data == "glyphs"
    if start:
        takes, levels = start["network"]["in_channels"], len(start["network"]["mult"])
        if C != takes:
            raise UsageError(f"--init: its network takes images of {takes} channels, and {cfg.data} has {C}")
        refuse_uneven(H, W, 2 ** (levels - 1))
        return dict(start["network"], dropout=cfg.dropout, num_classes=classes or None)
    side = max(H, W)
    if glyphs:
        mult = (1, 2, 2)
    else:
        mult = (1, 2, 2, 2) if side <= 64 else (1, 1, 2, 2, 4, 4)[: 5 + (side > 128)]
    refuse_uneven(H, W, 2 ** (len(mult) - 1))
    if cfg.width % 4:
        raise UsageError(f"--width {cfg.width}: must be a multiple of 4")
    sixteen = min(len(mult) - 1, max(0, math.ceil(math.log2(side / 16))))  # the level of 16x16
    return dict(in_channels=C, out_channels=2 * C if cfg.variance == "learned" else C, ch=cfg.width,
                mult=mult, blocks=1 if glyphs else 2, attention=(1,) if glyphs else (sixteen,),
                dropout=cfg.dropout, groups=math.gcd(32, cfg.width), num_classes=classes or None)


def refuse_uneven(H, W, factor):
    """Raises UsageError, with the nearest sizes that fit, unless `factor` divides H and W."""
    if H % factor or W % factor:
        down = f"{H // factor * factor}x{W // factor * factor}"
        up = f"{-(-H // factor) * factor}x{-(-W // factor) * factor}"
        raise UsageError(f"--size {H}x{W}: the network needs multiples of {factor}; "
                         f"try {down if min(H, W) >= factor else up} or {up}")

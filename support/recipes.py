"""The settings of a run: those that suit its data, those of the run to resume or of the weights to start
from, and its network's sizes."""

import math
import pathlib
import re
from dataclasses import replace

from support import command, devices, workers
from support.checkpoint import SCHEDULES, fit, holds_run, learned
from support.data import is_folder, refuse_for_no_folder
from support.data.folder import parse_size
from support.errors import UsageError

# The paper's settings (App. B), made for CIFAR-10 on a GPU.
PAPER = dict(
    batch_size=128,
    lr=2e-4,
    warmup=5000,
    decay="none",
    ema=0.9999,
    dropout=0.1,
    flip="yes",
    schedule="linear",
    width=128,
    labels=False,
)
# Photos on a CPU: a network with a sixteenth of the paper's arithmetic, for what an hour can teach.
SMALL = dict(
    PAPER,
    batch_size=32,
    lr=1e-3,
    warmup=100,
    decay="cosine",
    ema=0.999,
    dropout=0.0,
    width=32,
    schedule="cosine",
)
# A network a thirtieth of the paper's cost: the digits are legible after two minutes on two cores.
# A high rate that falls to 0 and a short average suit so few steps; digits have no mirror images.
GLYPHS = dict(
    batch_size=32,
    lr=4e-3,
    warmup=20,
    decay="cosine",
    ema=0.999,
    dropout=0.0,
    flip="no",
    schedule="cosine",
    width=24,
    labels=True,
)
PLANNED, SEEN = (
    3000,
    400,
)  # photos on a CPU: seconds of a run, and times that it sees an image, at most


def recipe_for(cfg, shape, device):
    """The settings that suit the data, the size of its images and the device, and why."""
    if cfg.data == "glyphs":
        return GLYPHS, "a small network, enough for the digits"
    if device == "cpu":
        return SMALL, "a small network, since the paper's (--width 128) is made for a GPU"
    side = max(shape[1:])
    if cfg.data == "cifar10":
        return PAPER, "the paper's for CIFAR-10 (App. B)"
    larger = dict(PAPER, dropout=0.0)  # App. B: dropout on CIFAR-10 alone
    if side > 64:
        larger.update(batch_size=64, lr=2e-5 if side > 128 else 2e-4)
    return larger, "the paper's for images of this size (App. B)"


def reason(cfg, about, device):
    """Why the settings that no flag gave are what they are."""
    if cfg.resume:
        return "those with which the run began"
    return recipe_for(cfg, about["shape"], device)[1] + (
        ", with a tenth of the rate" if cfg.init else ""
    )


def settled(cfg, given, saved=None, start=None):
    """The settings of a run, and its device: a new run, one to resume (`saved`), or one from other weights
    (`start`). What follows from a trial step is left to measured()."""
    cfg = resumed(cfg, given, saved) if saved else cfg
    try:
        if cfg.micro_batch != "auto" and not re.fullmatch("[1-9][0-9]{0,9}", cfg.micro_batch):
            raise UsageError(
                f"--micro-batch {cfg.micro_batch}: must be auto or a whole number, at least 1"
            )
        device = devices.pick_device(workers.own_device(cfg.device))
        if cfg.compile:
            cfg = replace(cfg, precision=devices.to_compile(cfg.precision, device))
    except UsageError as error:
        flag = re.match("[-a-z]*", str(error))[0]
        if saved and flag not in map(command.flag_name, given):  # nobody typed it
            raise UsageError(f"{error} ({cfg.resume} says so; {flag} changes it)") from None
        raise
    if saved:
        return cfg, device
    return (
        started(cfg, given, start, device.type) if start else complete(cfg, device.type)
    ), device


def complete(cfg, device, shape=(3, 32, 32)):
    """`cfg` with the settings of its data wherever no flag gave one; a folder's images become `shape`."""
    if is_folder(cfg.data):
        shape = (cfg.channels or shape[0], *(parse_size(cfg.size) if cfg.size else shape[1:]))
        cfg = replace(cfg, size=f"{shape[1]}x{shape[2]}", channels=shape[0])
    else:
        refuse_for_no_folder(
            cfg.data, size=cfg.size, channels=cfg.channels, skip_broken=cfg.skip_broken
        )
    recipe, _ = recipe_for(cfg, shape, device)
    if cfg.init:  # trained weights, mostly of the paper's network: gentler steps
        recipe = dict(recipe, lr=(recipe if recipe is GLYPHS else PAPER)["lr"] / 10)
    return replace(
        cfg,
        **{
            name: value
            for name, value in recipe.items()
            if getattr(cfg, name) is None and name != "warmup"
        },
    )


def measured(cfg, about, cost, device):
    """`cfg` with what follows from the number of images and from a trial step, where no flag gave it: the
    precision, the images at a time, the epochs and the warm-up.

    Photos on a CPU train for PLANNED seconds, unless that is more than SEEN epochs; everything else for
    100 epochs, and photos for 5,000 steps at least. A warm-up is a tenth of the run at most.
    """
    (recipe, _), images = recipe_for(cfg, about["shape"], device), about["images"]
    epochs = 100
    if recipe is SMALL:
        epochs = max(1, min(SEEN, int(PLANNED / cost.seconds * cfg.batch_size / images)))
    elif cfg.data != "glyphs":
        epochs = max(100, math.ceil(5000 * cfg.batch_size / images))
    epochs = cfg.epochs or epochs
    warmup = min(
        100 if cfg.init else 5000, recipe["warmup"], epochs * images // cfg.batch_size // 10
    )
    return replace(
        cfg,
        precision="bf16" if cost.bf16 else "fp32",
        micro_batch=str(cost.images),
        epochs=epochs,
        warmup=warmup if cfg.warmup is None else cfg.warmup,
    )


def steps(cfg, run):
    """The steps of a run in all. Raises UsageError if a resumed one has done them."""
    images, B = run.about["images"], cfg.batch_size
    if run.step * B >= cfg.epochs * images:
        raise UsageError(
            f"{cfg.resume} has done {min(cfg.epochs, run.step * B // images)} of {cfg.epochs} "
            f"epochs; ask for more with --epochs"
        )
    return math.ceil(cfg.epochs * images / B)


def warnings(cfg, about, steps, d):
    """What is known not to work in these settings, a line each."""
    images, network = about["images"], about["network"]
    if cfg.warmup > steps / 3:
        yield (
            f"--warmup {cfg.warmup}: is more than a third of the {steps:,} steps; little is learned while "
            f"the rate rises to --lr {cfg.lr:g}"
        )
    least = 500 if cfg.data == "glyphs" else 2000
    if steps < least and not cfg.init:
        yield (
            f"{steps:,} steps are too few for pictures: {least:,} are the least; more --epochs, or a "
            f"smaller --batch-size"
        )
    if d.alpha_bar[-1] > 0.01:
        yield (
            f"alpha_bar_T = {d.alpha_bar[-1]:.2g}: x_T is not yet noise, and samples will be poor; a "
            f"longer --timesteps or --schedule cosine helps"
        )
    if images < 2000 and cfg.epochs > SEEN:
        yield (
            f"{cfg.epochs} epochs of {images:,} images: the network will copy them, more than it does in "
            f"{SEEN} epochs"
        )
    if about["shape"][0] > 1 and network["ch"] < 8 * network["groups"] and network["ch"] < 128:
        yield (
            f"{network['groups']} groups of {network['ch'] // network['groups']} channels: colours of a "
            f"short run will be too strong (docs/training.md)"
        )


def started(cfg, given, start, device):
    """The settings of a new run from the weights of the checkpoint `start`, which keep their network and
    process. Raises UsageError for a flag that contradicts them."""
    process = start["process"]
    kept = dict(
        width=start["network"]["ch"],
        timesteps=len(process["beta"]) - 1,
        schedule=process["schedule"] if process["schedule"] in SCHEDULES else None,
        variance="learned" if learned(start) else "fixed",
    )
    if is_folder(cfg.data):
        kept["channels"] = start["shape"][0]
    for name, value in kept.items():
        if name in given and getattr(cfg, name) != value:
            raise UsageError(
                f"{command.flag_name(name)} {getattr(cfg, name)}: the weights of --init have "
                f"{value or 'a table of their own'}, and cannot change it"
            )
    if "out" not in given:  # the weights must not be replaced by what is made of them
        kept["out"] = pathlib.Path(cfg.init).stem + "-tuned.pt"
    return replace(complete(cfg, device, start["shape"]), **kept)


def resumed(cfg, given, saved):
    """The settings of a saved run, changed by the flags `given` now. Refuses what a run cannot change.

    Raises UsageError for such a flag, and an exception for checkpoint.refusing() if a setting is wrong.
    """
    if cfg.init:
        raise UsageError(
            "--init: starts a new run, and --resume goes on with one; give one of them"
        )
    if not holds_run(saved):
        raise UsageError(
            f"--resume {cfg.resume}: holds a network, and no run to go on with; --init starts "
            f"one from it"
        )
    moved = is_folder(cfg.data) and is_folder(
        saved["config"]["data"]
    )  # a folder is known by its images
    for name in (
        "data",
        "size",
        "channels",
        "labels",
        "limit",
        "seed",
        "batch_size",
        "schedule",
        "variance",
        "timesteps",
        "width",
        "dropout",
    ):
        if (
            name in given
            and getattr(cfg, name) != saved["config"][name]
            and not (moved and name == "data")
        ):
            raise UsageError(
                f"{command.flag_name(name)} {getattr(cfg, name)}: the run to resume has "
                f"{saved['config'][name]}, and cannot change it"
            )
    fit({"data", "seed", "timesteps", "epochs", *PAPER} <= set(saved["config"]))
    settings = command.restored(type(cfg), saved["config"])
    fit(all(settings[name] is not None for name in ("epochs", *PAPER)))
    fit(not is_folder(settings["data"]) or (settings["size"] and settings["channels"]))
    # Where this run writes is said by its own command line: a file may come from a stranger.
    own = dict(data_dir=cfg.data_dir, log=cfg.log, init=None, resume=cfg.resume, out=cfg.out)
    return type(cfg)(**(settings | {name: getattr(cfg, name) for name in given} | own))


MOST_CLASSES = 25_000  # whose names still fit into weight_files.LARGEST_PICKLE


def network(cfg, shape, classes, start=None):
    """The arguments of ddpm.UNet for images `shape` (C, H, W) and so many classes (0 for none).

    Photos have the paper's network for 32x32 or for 256x256, or a shorter one of the latter in between; the
    weights of the checkpoint `start` keep theirs. Raises UsageError for a size or a width that its levels
    or groups do not divide.
    """
    (C, H, W), glyphs = shape, cfg.data == "glyphs"
    if start:
        takes, levels = start["network"]["in_channels"], len(start["network"]["mult"])
        if C != takes:
            raise UsageError(
                f"--init: its network takes images of {takes} channels, and {cfg.data} has {C}"
            )
        refuse_uneven(H, W, 2 ** (levels - 1))
        return dict(start["network"], dropout=cfg.dropout, num_classes=classes or None)
    side = max(H, W)
    if glyphs:
        mult = (1, 2, 2)
    else:
        mult = (1, 2, 2, 2) if side <= 64 else (1, 1, 2, 2, 4, 4)[: 5 + (side > 128)]
    refuse_uneven(H, W, 2 ** (len(mult) - 1))
    if classes > MOST_CLASSES:
        raise UsageError(
            f"--labels: {classes:,} classes; a checkpoint names {MOST_CLASSES:,} at most"
        )
    if cfg.width % 4:
        raise UsageError(f"--width {cfg.width}: must be a multiple of 4")
    sixteen = min(len(mult) - 1, max(0, math.ceil(math.log2(side / 16))))  # the level of 16x16
    # The paper's 32 groups leave few channels in each of a small network's. Such a group normalises away the
    # means of its channels, and with them the colour of the image (docs/training.md).
    groups = math.gcd(32, cfg.width)
    if C > 1 and cfg.width < 128:
        groups = 2 ** int(math.log2(max(1, cfg.width // 16)))
    return dict(
        in_channels=C,
        out_channels=2 * C if cfg.variance == "learned" else C,
        ch=cfg.width,
        mult=mult,
        blocks=1 if glyphs else 2,
        attention=(1,) if glyphs else (sixteen,),
        dropout=cfg.dropout,
        groups=groups,
        num_classes=classes or None,
    )


def refuse_uneven(H, W, factor):
    """Raises UsageError, with the nearest sizes that fit, unless `factor` divides H and W."""
    if H % factor or W % factor:
        down = f"{H // factor * factor}x{W // factor * factor}"
        up = f"{-(-H // factor) * factor}x{-(-W // factor) * factor}"
        raise UsageError(
            f"--size {H}x{W}: the network needs multiples of {factor}; "
            f"try {down if min(H, W) >= factor else up} or {up}"
        )

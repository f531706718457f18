"""The settings of a run: what suits its data and machine, or what a checkpoint prescribes."""

import math
import pathlib
from dataclasses import fields, replace

from support import budget, checkpoint, command, files, workers
from support.data import SPLIT, fingerprint, is_folder, split_of
from support.errors import Failure, UsageError
from support.monitor import open_log
from support.progress import duration, note, say

# The paper's settings (App. B) were made for CIFAR-10 on a GPU. Photos on a CPU have a network with a
# sixteenth of its arithmetic, for what an hour can teach, and digits a thirtieth: they are legible
# after two minutes, with a high rate that falls to 0 and a short average.
DEFAULTS = {  # CIFAR-10 on a GPU, photos on a CPU, digits
    "batch_size": (128, 32, 32),
    "lr": (2e-4, 1e-3, 4e-3),
    "warmup": (5000, 100, 20),
    "decay": ("none", "cosine", "cosine"),
    "ema": (0.9999, 0.999, 0.999),
    "dropout": (0.1, 0.0, 0.0),
    "flip": (True, True, False),
    "schedule": ("linear", "cosine", "cosine"),
    "width": (128, 32, 24),
    "labels": (False, False, True),
}
PAPER = {name: row[0] for name, row in DEFAULTS.items()}
SMALL = {name: row[1] for name, row in DEFAULTS.items()}
GLYPHS = {name: row[2] for name, row in DEFAULTS.items()}

# Photos on a CPU train for so many minutes at most, and for enough of the others otherwise.
MINUTES = 50
LEAST = 2000  # steps: fewer do not give pictures
SEEN = 400  # epochs: a network that sees an image more often copies it


# --- Types of flags ------------------------------------------------------------------------------


def size(text):
    """Parse --size: (H, W) from "64" or "48x64"."""
    sides = [int(side) if side.isdecimal() else 0 for side in text.split("x")]
    if len(sides) > 2 or not all(0 < side <= 2048 for side in sides):
        raise UsageError(f"--size {text}: must be one or two numbers up to 2048: 64 or 48x64")
    return sides[0], sides[-1]


def micro_batch(text):
    """Parse --micro-batch: a number of images, or None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--micro-batch {text}: must be auto or a whole number, at least 1")
    return int(text)


def yes_or_no(text):
    """Parse --flip: a bool from "yes" or "no"."""
    if text not in ("yes", "no"):
        raise UsageError(f"--flip {text}: must be yes or no")
    return text == "yes"


# --- Settings ------------------------------------------------------------------------------------


def recipe_for(cfg, device):
    """Return the settings that suit the data, the size of its images and the device, and why."""
    if cfg.data == "glyphs":
        return GLYPHS, "a small network, enough for the digits"
    if device.type == "cpu":
        return SMALL, "a small network, since the paper's (--width 128) is made for a GPU"
    if cfg.data == "cifar10":
        return PAPER, "the paper's for CIFAR-10 (App. B)"
    larger = dict(PAPER, dropout=0.0)  # App. B: dropout on CIFAR-10 only
    side = max(cfg.size)
    if side > 64:
        larger.update(batch_size=64, lr=2e-5 if side > 128 else 2e-4)
    return larger, "the paper's for images of this size (App. B)"


def keep(cfg, given, kept, whose):
    """Return the settings with those in `kept`. Raises UsageError for a flag that contradicts one."""
    for name, value in kept.items():
        typed = getattr(cfg, name)
        if name in given and typed != value:
            raise UsageError(f"{command.flag_name(name)} {typed}: {whose} {value}; this is fixed")
    return replace(cfg, **kept)


def complete(cfg, given, device, start=None):
    """Return the settings of a new run, with a recipe's where no flag gave one.

    start: a checkpoint whose weights the run begins with; they keep their network and process.
    Epochs, warm-up, precision and micro-batch follow from a trial step, in measured().
    """
    folder = is_folder(cfg.data)
    if start:
        kept = dict(
            width=start["network"]["ch"],
            timesteps=len(start["process"]["beta"]) - 1,
            schedule=start["process"]["schedule"],
            variance="learned" if checkpoint.learned(start) else "fixed",
        )
        if folder:
            kept["channels"] = start["shape"][0]
            if kept["channels"] == 1:
                say(f"--init {cfg.init}: its network is grey, so the images are read as grey")
        cfg = keep(cfg, given, kept, "the weights of --init have")
        if "out" not in given:  # the weights must not be replaced by what is made of them
            cfg = replace(cfg, out=pathlib.Path(cfg.init).stem + "-tuned.pt")
    if folder:
        size = start["shape"][1:] if start else (32, 32)
        cfg = replace(cfg, size=cfg.size or size, channels=cfg.channels or 3)
    recipe, _ = recipe_for(cfg, device)
    if start:  # trained weights, mostly of the paper's network, need gentle steps
        recipe = dict(recipe, lr=(GLYPHS if recipe is GLYPHS else PAPER)["lr"] / 10)
    missing = [name for name in recipe if getattr(cfg, name) is None and name != "warmup"]
    return replace(cfg, **{name: recipe[name] for name in missing})


FIXED = (
    "size channels labels limit seed batch_size schedule variance timesteps width dropout".split()
)


def resumed(cfg, given, saved):
    """Return the settings of a saved run, changed by the flags `given` now.

    Raises UsageError for a flag that a run cannot change, and Failure for a damaged setting.
    """
    if cfg.init:
        raise UsageError("--init: starts a new run, and --resume continues one; give one of them")
    if not checkpoint.holds_run(saved):
        raise UsageError(f"--resume {cfg.resume}: contains only weights; use --init instead")
    settings = {}
    for f in fields(cfg):
        value = saved["config"].get(f.name, f.default)
        if isinstance(value, str) and "type" in f.metadata:  # older checkpoints keep the text
            value = f.metadata["type"](value)
        missing = value is None and f.name in ("epochs", *PAPER)
        checkpoint.need(cfg.resume, isinstance(value, f.type) and not missing, f"config.{f.name}")
        settings[f.name] = value
    moved = "data" in given and is_folder(cfg.data) and is_folder(settings["data"])
    fixed = FIXED if moved else ("data", *FIXED)  # a folder is known by its images
    keep(cfg, given, {name: settings[name] for name in fixed}, "the run to resume has")
    if settings["log"] and not cfg.log:
        say(f"no log is written; to continue it: --log {command.typed(settings['log'])}")
    # Where this run writes is decided by its own command line, since the file may be untrusted.
    now = ("data_dir", "log", "resume", "minutes", *given)
    settings.update({name: getattr(cfg, name) for name in now}, init=None)
    if "out" not in given:
        settings["out"] = cfg.resume
    return type(cfg)(**settings)


def check(cfg, given, start, device):
    """Reject settings and outputs that cannot work, before images are read."""
    folder = is_folder(cfg.data)
    for name in ("size", "channels", "skip_broken"):
        if getattr(cfg, name) and not folder:
            raise UsageError(f"{command.flag_name(name)}: is only for a folder of images")
    if cfg.minutes and "epochs" in given:
        raise UsageError("--minutes: chooses --epochs; give one of them")
    if cfg.batch_size % workers.place()[1]:
        raise UsageError(f"--batch-size {cfg.batch_size}: the processes cannot share it evenly")
    if cfg.compile and device.type == "cpu" and cfg.precision == "bf16":
        raise UsageError("--compile: loses gradients in bf16 on a CPU; give --precision fp32")
    if not start:
        checkpoint.process(cfg.schedule, cfg.timesteps, cfg.variance)
    known = {"glyphs": (1, 16, 16), "cifar10": (3, 32, 32)}
    shape = (cfg.channels, *cfg.size) if folder else known[cfg.data]
    budget.check(network(cfg, shape, 0, start), shape, cfg.batch_size, device)
    out, log, images = (pathlib.Path(path or "").resolve() for path in (cfg.out, cfg.log, cfg.data))
    if folder and out.is_relative_to(images):
        raise UsageError(f"--out {cfg.out}: its sample grids would become images of --data")
    if cfg.log and (log == out or (folder and log.is_relative_to(images))):
        raise UsageError(f"--log {cfg.log}: choose a path other than --out, and outside --data")
    if cfg.init and files.same(cfg.init, cfg.out):
        raise UsageError(f"--out {cfg.out}: --init reads this file; name another one")
    files.writable(cfg.out)
    if cfg.log:
        open_log(cfg.log)


def measured(cfg, images, step, cost, device):
    """Return the settings with what follows from the number of images and a trial step.

    Photos on a CPU train for SEEN epochs and LEAST steps, as far as MINUTES allow. Everything else
    trains for 100 epochs, or longer if the images are few. A warm-up is a tenth of the run at
    most. step: the steps that a resumed run has done. Raises UsageError if it is complete.
    """
    recipe, _ = recipe_for(cfg, device)
    epoch = images / cfg.batch_size  # steps
    if cfg.minutes:
        epochs = max(int(step / epoch) + 1, int((step + 60 * cfg.minutes / cost.seconds) / epoch))
    elif cfg.epochs:
        epochs = cfg.epochs
    elif recipe is SMALL:
        enough = max(SEEN, math.ceil(LEAST / epoch))
        epochs = max(1, min(enough, int(60 * MINUTES / cost.seconds / epoch)))
    else:
        epochs = max(100, math.ceil((500 if recipe is GLYPHS else 5000) / epoch))
    if step >= epochs * epoch:
        raise UsageError(f"{cfg.resume} has done {epochs} epochs; continue with more --epochs")
    warmup = min(100 if cfg.init else 5000, recipe["warmup"], int(epochs * epoch) // 10)
    return replace(
        cfg,
        precision=cost.precision,
        micro_batch=cost.micro_batch,
        epochs=epochs,
        warmup=warmup if cfg.warmup is None else cfg.warmup,
    )


def warn(cfg, images, d, seconds):
    """Print a line for each setting that gives poor samples. A step takes so many seconds."""
    least = 500 if cfg.data == "glyphs" else LEAST
    epochs = math.ceil(least * cfg.batch_size / images)
    if cfg.epochs < epochs and not cfg.init:
        takes = f"--epochs {epochs} takes about {duration(least * seconds)}"
        note(f"warning: {cfg.epochs} epochs are too few for good pictures; {takes}")
    if cfg.warmup >= cfg.epochs * images / cfg.batch_size:
        note("warning: the learning rate rises during the whole run; try a shorter --warmup")
    if d.alpha_bar[-1] > 0.01:
        note("warning: x_T is not yet noise, and samples will be poor; try more --timesteps")


# --- The network ---------------------------------------------------------------------------------


def about(cfg, saved, start, train_set, held_out):
    """Return what identifies a run: its images, network and process.

    saved: the checkpoint to resume. Raises Failure if the images are not those with which it began.
    """
    shape = tuple(train_set.images.shape[1:])
    classes = train_set.classes
    found = dict(
        shape=shape,
        classes=classes,
        images=len(train_set.images),
        held_out=len(held_out.images),
        fingerprint=fingerprint(train_set),
        split=split_of(saved) if saved else SPLIT,
    )
    if saved:
        for name in ("shape", "classes", "images", "fingerprint"):
            if found[name] != saved[name]:
                raise Failure(
                    f"--data {cfg.data}: the images have changed since the run began ({name}: {saved[name]} "
                    f"before, {found[name]} now); try --init {command.typed(cfg.resume)}"
                )
        return dict(found, network=saved["network"], process=saved["process"])
    if start:
        process = start["process"]
        say(f"starts from {checkpoint.title(start, 'ema')} of {cfg.init}")
    else:
        process = checkpoint.process(cfg.schedule, cfg.timesteps, cfg.variance)
    return dict(found, network=network(cfg, shape, len(classes), start), process=process)


def network(cfg, shape, classes, start=None):
    """Return the arguments of ddpm.UNet for images `shape` (C, H, W) and a number of classes, 0 for none.

    Photos have the paper's network for 32x32 or for 256x256, or a shorter one of the latter in
    between. The weights of the checkpoint `start` keep theirs. Raises UsageError for a size or
    width that does not fit.
    """
    C, H, W = shape
    side = max(H, W)
    if start:
        mult = start["network"]["mult"]
    elif cfg.data == "glyphs":
        mult = (1, 2, 2)
    else:
        mult = (1, 2, 2, 2) if side <= 64 else (1, 1, 2, 2, 4, 4)[: 5 + (side > 128)]
    factor = 2 ** (len(mult) - 1)
    if H % factor or W % factor:
        up = f"{-(-H // factor) * factor}x{-(-W // factor) * factor}"
        raise UsageError(f"--size {H}x{W}: the network needs multiples of {factor}; try {up}")
    if start:
        if C != start["network"]["in_channels"]:
            raise UsageError(f"--init: its network does not fit images with {C} channels")
        return dict(start["network"], dropout=cfg.dropout, num_classes=classes or None)
    if cfg.width % 4:
        raise UsageError(f"--width {cfg.width}: must be a multiple of 4")
    # The paper's 32 groups leave few channels in each of a small network's. Such a group
    # normalises away the means of its channels, and with them the colour of the image
    # (docs/training.md).
    groups = math.gcd(32, cfg.width)
    if C > 1 and cfg.width < 128:
        groups = 2 ** int(math.log2(max(1, cfg.width // 16)))
    level = min(len(mult) - 1, max(0, math.ceil(math.log2(side / 16))))  # the level of 16x16
    return dict(
        in_channels=C,
        out_channels=2 * C if cfg.variance == "learned" else C,
        ch=cfg.width,
        mult=mult,
        blocks=1 if cfg.data == "glyphs" else 2,
        attention=(1,) if cfg.data == "glyphs" else (level,),
        dropout=cfg.dropout,
        groups=groups,
        num_classes=classes or None,
    )

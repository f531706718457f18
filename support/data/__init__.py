"""Each kind of data as uint8 images, labels and names of classes. load() is the way in."""

import os
import zlib
from typing import NamedTuple

import torch

from support.command import flag_name
from support.data import cifar10, folder, glyphs
from support.errors import Failure, UsageError
from support.progress import note


class Data(NamedTuple):
    """images uint8 (N, C, H, W); labels int64 (N,), numbers of `classes`, or None where there are none."""

    images: torch.Tensor
    labels: torch.Tensor | None
    classes: list[str]


def is_folder(name):
    """Whether --data names a folder of images, and not data that is built in or known."""
    return name not in ("glyphs", "cifar10")


def refuse_for_no_folder(name, **given):
    """Raises UsageError for the first of these flags that was given, if --data names no folder."""
    for flag, value in given.items():
        if value and not is_folder(name):
            raise UsageError(f"{flag_name(flag)}: only a folder of images takes it, and not {name}")


def load(
    name,
    part,
    data_dir="data",
    size=None,
    channels=None,
    skip_broken=False,
    labels=False,
    limit=None,
):
    """The images of a part of some data: "training" or "held out"; or "all", those of another folder; of
    glyphs and CIFAR-10, what is held out.

    name: "glyphs", "cifar10" or a folder, whose images are cropped to `size` (H, W). labels: give classes
    too; glyphs always do. limit: a seeded choice of so many images.
    """
    train = part == "training"
    if name == "glyphs":  # each is drawn by chance, so that the first few are a choice
        n = 6_000 if train else 2_000
        images, numbers = glyphs.draw(min(n, limit or n), seed=0 if train else 1)
        return Data(
            torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
            torch.from_numpy(numbers).long(),
            list(glyphs.GLYPHS),
        )
    if name == "cifar10":
        images, numbers = cifar10.load(data_dir, train)
        if limit:
            few = folder.chosen(len(images), "all", limit)
            images, numbers = images[few], numbers[few]
        classes = cifar10.CLASSES
    else:
        images, files = folder.load(
            name, size, channels, data_dir, skip_broken, labels, part, limit
        )
        numbers, classes = folder.labels_of(name, files) if labels else (None, [])
    images = torch.from_numpy(images)
    return (
        Data(images, torch.from_numpy(numbers).long(), classes)
        if labels
        else Data(images, None, [])
    )


def load_both(cfg, size):
    """Of the settings of train.py: the Data to train on, and the Data held out from it, perhaps none."""
    how = (cfg.data_dir, size, cfg.channels, cfg.skip_broken, cfg.labels)
    train_set = load(cfg.data, "training", *how, cfg.limit)
    return train_set, known_only(load(cfg.data, "held out", *how, limit=512), train_set.classes)


def known_only(data, classes):
    """The images of these classes, with labels that are numbers of them."""
    images, labels, names = data
    if labels is None:
        return Data(images, None, classes)
    numbers = torch.tensor([classes.index(name) if name in classes else -1 for name in names])
    labels = numbers[labels]
    if (labels < 0).any():
        images, labels = images[labels >= 0], labels[labels >= 0]
    return Data(images, labels, classes)


def held_out(ckpt, name=None, data_dir="data", skip_broken=False, limit=None):
    """Data held out from a checkpoint's, or that called `name`, as its network takes it; and whether it was
    held out: a folder that was too small was trained on whole.

    Its labels are the network's numbers of its classes, or None if it knows none. limit: a seeded choice of
    so many. Raises Failure for a class that the network does not know, for a folder that has changed since
    the run began, and where nothing is left; UsageError for another shape.
    """
    own, (C, H, W) = (
        ckpt.get("config", {}).get("data"),
        ckpt["shape"],
    )  # converted weights have no data
    name = name or own
    if not name:
        raise UsageError("--data: this checkpoint does not say what it was trained on; name images")
    refuse_for_no_folder(name, skip_broken=skip_broken)
    how = dict(
        data_dir=data_dir,
        size=(H, W),
        channels=C,
        labels=bool(ckpt["classes"]),
        skip_broken=skip_broken or ckpt.get("config", {}).get("skip_broken") is True,
    )
    ours = is_folder(name) and trained_on(ckpt, name, how)
    apart = not ours or ckpt.get("held_out", 0) > 0
    found = load(name, "held out" if ours and apart else "all", limit=limit, **how)
    if not len(found.images):
        raise Failure(f"--data {name}: holds no image that can be used")
    if tuple(found.images.shape[1:]) != (C, H, W):
        raise UsageError(
            f"--data {name}: images of {tuple(found.images.shape[1:])}, but a network for "
            f"{(C, H, W)}"
        )
    if not ckpt["classes"]:  # glyphs always bring labels; this network was trained without
        return Data(found.images, None, []), apart
    if (unknown := sorted(set(found.classes) - set(ckpt["classes"]))) and not ours:
        raise Failure(f"--data {name}: the network knows no class {unknown[0]}, but those of {own}")
    return known_only(found, ckpt["classes"]), apart


def trained_on(ckpt, name, how):
    """Whether the folder `name` holds what the checkpoint was trained on, wherever that lay then. Raises
    Failure if it is the run's own and has changed: what was held out is no longer known then."""
    config = ckpt.get("config", {})
    if not is_folder(config.get("data", "glyphs")):
        return False
    own = os.path.abspath(name) == config["data"]
    if name == config["data"]:  # a path out of a file is shown before it is read
        note(f"images of {name}, which the checkpoint names")
    part, limit = "training" if ckpt.get("held_out", 0) else "all", config.get("limit")
    most = len(folder.chosen(len(folder.listed(name)), part, limit))
    possible = ckpt["images"] <= most if how["skip_broken"] else ckpt["images"] == most
    same = possible and fingerprint(load(name, part, limit=limit, **how)) == ckpt["fingerprint"]
    if own and not same:
        raise Failure(
            f"--data {name}: not the images with which this run began, so that nobody knows which "
            f"it held out; name others"
        )
    return same


def fingerprint(data):
    """A checksum of ten thousand images at most, evenly chosen, and of their labels."""
    few, crc = slice(None, None, -(-len(data.images) // 10_000)), 0
    for image in data.images[few]:  # one at a time: all of them may be more than the memory
        crc = zlib.crc32(image.numpy().tobytes(), crc)
    return zlib.crc32(b"" if data.labels is None else data.labels[few].numpy().tobytes(), crc)

"""Each data set as uint8 images, labels and class names: digits, CIFAR-10 or a folder of images.

load() returns the training images and the held-out images. held_out() returns images on which a
checkpoint can be evaluated, and states what is known about them.
"""

import os
import zlib

import numpy as np
import torch

from support.data import cifar10, folder, glyphs
from support.data.split import SPLIT, Data, divide, split_of, take, with_classes
from support.errors import Failure, UsageError
from support.progress import note


def is_folder(name):
    """Return whether --data names a folder of images, not one of the two known data sets."""
    return name not in ("glyphs", "cifar10")


def load(
    name, data_dir, size=None, channels=3, skip_broken=False, labels=False, limit=None, split=SPLIT
):
    """Return the training Data and the held-out Data of `name`: "glyphs", "cifar10" or a folder.

    A folder's images are cropped to `size` (H, W). labels: learn classes; digits always have them.
    limit: a seeded choice of this many training images. split: a rule of support/data/split.py.
    """
    if not is_folder(name) and os.path.isdir(name):
        note(f"--data {name} is the known data set; write --data ./{name} for your folder {name}")
    if name == "glyphs":
        training, held = digits(6000, limit, seed=0), digits(512, None, seed=1)
    elif name == "cifar10":
        whole, test = (cifar10_part(data_dir, labels, train) for train in (True, False))
        numbers = np.arange(len(whole.images))
        training, _ = divide(whole, numbers, limit, split, hold_out=False)
        held = take(test, 512)
    else:
        whole = folder.load(name, data_dir, size, channels, skip_broken, labels)
        training, held = divide(*whole, limit, split)
    if training.labels is not None:
        missing = set(range(len(training.classes))) - set(training.labels.tolist())
        if missing:
            names = ", ".join(training.classes[k] for k in sorted(missing))
            note(f"warning: there is no training image of {names}")
    return training, held


def load_all(name, data_dir, size, channels=3, skip_broken=False, labels=False, limit=None):
    """Return all images of a folder, 2,000 held-out digits, or CIFAR-10's test images.

    limit: a seeded choice of this many images.
    """
    if name == "glyphs":
        return digits(2000, limit, seed=1)
    if name == "cifar10":
        return take(cifar10_part(data_dir, labels, train=False), limit)
    whole, _ = folder.load(name, data_dir, size, channels, skip_broken, labels)
    return take(whole, limit)


def digits(n, limit, seed):
    images, labels = glyphs.draw(min(n, limit or n), seed)
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return Data(images, torch.from_numpy(labels).long(), list(glyphs.GLYPHS))


def cifar10_part(data_dir, labels, train):
    """Return CIFAR-10's training images or its test images."""
    images, numbers = (torch.from_numpy(array) for array in cifar10.load(data_dir, train))
    return Data(images, numbers.long(), cifar10.CLASSES) if labels else Data(images, None, [])


# --- Evaluation ----------------------------------------------------------------------------------


def held_out(ckpt, name=None, data_dir="data", skip_broken=False, limit=None):
    """Return images for evaluating a checkpoint as Data, and a description of them.

    name: by default the checkpoint's own data, of which the held-out images are used, if there are any.
    Labels number the checkpoint's classes. Raises UsageError for images of another shape, and Failure
    for an unknown class or if the checkpoint's own folder has changed.
    """
    config = ckpt.get("config", {})  # converted weights have none
    own = config.get("data")
    name = name or own
    if not name:
        raise UsageError("--data: this checkpoint does not contain its training data; name images")
    if skip_broken and not is_folder(name):
        raise UsageError(f"--skip-broken: has no effect with --data {name}")
    C, H, W = ckpt["shape"]
    skip_broken = skip_broken or config.get("skip_broken", False)
    how = (data_dir, (H, W), C, skip_broken, bool(ckpt["classes"]))
    if is_folder(name):
        data, description = from_folder(ckpt, name, how)
    else:
        data = load_all(name, *how, limit)
        description = f"held-out images of {name}" if name == own else f"images of {name}"
    shape = tuple(data.images.shape[1:])
    if shape != (C, H, W):
        raise UsageError(
            f"--data {name}: its images are {shape}, but the network's are {(C, H, W)}"
        )
    if not ckpt["classes"]:  # digits always have labels
        return take(Data(data.images, None, []), limit), description
    unknown = set(data.classes) - set(ckpt["classes"])
    if unknown:
        raise Failure(f"--data {name}: the network does not know the class {min(unknown)}")
    return take(with_classes(data, ckpt["classes"]), limit), description


def from_folder(ckpt, name, how):
    """Return the held-out images if this is the training folder, or else all images; and a description."""
    whole = folder.load(name, *how)
    config = ckpt.get("config", {})
    training, held = divide(*whole, config.get("limit"), split_of(ckpt))
    if fingerprint(training) == ckpt.get("fingerprint"):
        if len(held.images):
            return held, f"held-out images of {name}"
        return training, "images it was trained on"
    if os.path.abspath(name) == config.get("data"):
        raise Failure(
            f"--data {name}: the folder has changed since training, so its held-out images are "
            f"unknown; pass other images with --data"
        )
    return whole[0], f"images of {name}"


def fingerprint(data):
    """Return a checksum of at most 10,000 images, evenly chosen, and of their labels."""
    few = range(0, len(data.images), -(-len(data.images) // 10_000))
    crc = 0
    for i in few:  # one at a time: all may need more memory than there is
        crc = zlib.crc32(data.images[i].numpy().tobytes(), crc)
    return crc if data.labels is None else zlib.crc32(data.labels[few].numpy().tobytes(), crc)

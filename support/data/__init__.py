"""Each data set as uint8 images, labels and class names: digits, CIFAR-10 or a folder of images."""

import os
import zlib

import numpy as np
import torch

from support.data import cifar10, folder, glyphs
from support.data.split import SPLIT, Data, divide, split_of
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
    how = (data_dir, size, channels, skip_broken, labels)
    rule = SPLIT if name == "glyphs" else split
    whole, numbers = read(name, *how, limit, train=True)
    training, held = divide(whole, numbers, limit, rule, hold_out=is_folder(name))
    if not is_folder(name):
        held = read(name, *how, 512)[0].take(512)
        if os.path.isdir(name):
            note(f"--data {name} is the known data set; for the folder, write --data ./{name}")
    missing = [name for k, name in enumerate(training.classes) if k not in training.labels]
    if missing:
        note(f"warning: there is no training image of {', '.join(missing)}")
    return training, held


def read(name, data_dir, size, channels=3, skip_broken=False, labels=False, n=None, train=False):
    """Return the images as Data, and the number of each file's image: see folder.load().

    Of CIFAR-10 and the digits, these are the training images or the held-out ones. n: the number
    of digits to draw.
    """
    if is_folder(name):
        return folder.load(name, data_dir, size, channels, skip_broken, labels)
    if name == "cifar10":
        images, y = map(torch.from_numpy, cifar10.load(data_dir, train))
        data = Data(images, y.long(), cifar10.CLASSES) if labels else Data(images, None, [])
    else:
        most = 6000 if train else 2000
        images, y = map(torch.from_numpy, glyphs.draw(min(most, n or most), seed=0 if train else 1))
        data = Data(images.permute(0, 3, 1, 2).contiguous(), y.long(), list(glyphs.GLYPHS))
    return data, np.arange(len(images))


def held_out(ckpt, name=None, data_dir="data", skip_broken=False, limit=None):
    """Return images for evaluating a checkpoint as Data, and a description of them.

    name: by default the checkpoint's own data, of which the held-out images are used, if there are any.
    Labels number the checkpoint's classes. Rejects images that the network cannot use.
    """
    config = ckpt.get("config", {})  # converted weights have none
    own = config.get("data")
    name = name or own
    if not name:
        raise UsageError("--data: this checkpoint does not contain its training data; name images")
    if skip_broken and not is_folder(name):
        raise UsageError(f"--skip-broken: has no effect with --data {name}")
    C, H, W = ckpt["shape"]
    classes = ckpt["classes"]
    skip_broken = skip_broken or config.get("skip_broken", False)
    data, numbers = read(name, data_dir, (H, W), C, skip_broken, bool(classes), limit)
    which = f"images of {name}"
    if is_folder(name):
        training, held = divide(data, numbers, config.get("limit"), split_of(ckpt))
        if fingerprint(training) != ckpt.get("fingerprint"):
            if os.path.abspath(name) == own:
                raise Failure(f"--data {name}: has changed since training; name other images")
        elif len(held.images):
            data = held
            which = f"held-out {which}"
        else:
            data = training
            which = "images it was trained on"
    elif name == own:
        which = f"held-out {which}"
    shape = tuple(data.images.shape[1:])
    if shape != (C, H, W):
        raise UsageError(f"--data {name}: its images are {shape}, the network's {(C, H, W)}")
    if not classes:  # digits always have labels
        data = Data(data.images, None, [])
    elif unknown := set(data.classes) - set(classes):
        raise Failure(f"--data {name}: the network does not know the class {min(unknown)}")
    else:
        data = data.with_classes(classes)
    return data.take(limit), which


def fingerprint(data):
    """Return a checksum of at most 10,000 images, evenly chosen, and of their labels."""
    few = range(0, len(data.images), -(-len(data.images) // 10_000))
    crc = 0
    for i in few:  # one at a time: all may need more memory than there is
        crc = zlib.crc32(data.images[i].numpy(), crc)
    return crc if data.labels is None else zlib.crc32(data.labels[few].numpy(), crc)

"""Each kind of data as uint8 images, labels and names of classes. load() is the way in."""

import os
import zlib
from typing import NamedTuple

import torch

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


def load(name, train, data_dir="data", size=None, channels=None, skip_broken=False, labels=False,
         limit=None):
    """The images to train on, or those held out; a folder holds none out and gives all.

    name: "glyphs", "cifar10" or a folder, whose images are cropped to `size` (H, W). labels: give classes
    too; glyphs always do. limit: the first so many images.
    """
    if name == "glyphs":
        n = 6_000 if train else 2_000
        images, numbers = glyphs.draw(min(n, limit or n), seed=0 if train else 1)
        return Data(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
                    torch.from_numpy(numbers).long(), list(glyphs.GLYPHS))
    if name == "cifar10":
        images, numbers = cifar10.load(data_dir, train)
        classes = cifar10.CLASSES
    else:
        images, files = folder.load(name, size, channels, data_dir, skip_broken, labels)
        numbers, classes = folder.labels_of(name, files) if labels else (None, [])
    images = torch.from_numpy(images)[:limit]
    if not labels:
        return Data(images, None, [])
    return Data(images, torch.from_numpy(numbers)[:limit].long(), classes)


def held_out(ckpt, name=None, data_dir="data", skip_broken=False, limit=None):
    """Images held out from a checkpoint's data, or those called `name`, as its network takes them.

    Their labels are the network's numbers of its classes, or None if it knows none. Raises Failure for a
    class that the network does not know, UsageError for images of another shape.
    """
    own, (C, H, W) = ckpt.get("config", {}).get("data"), ckpt["shape"]  # converted weights have no data
    name = os.path.abspath(name) if name and is_folder(name) else name or own
    if name == own and own and is_folder(own):  # a path out of a file is shown before it is read
        note(f"images of {own}, which the checkpoint names")
    if not name:
        raise UsageError("--data: this checkpoint does not say what it was trained on; name images")
    labelled = bool(ckpt["classes"])
    images, labels, classes = load(name, False, data_dir, (H, W), C, skip_broken, labelled, limit)
    if tuple(images.shape[1:]) != (C, H, W):
        raise UsageError(f"--data {name}: images of {tuple(images.shape[1:])}, but a network for {(C, H, W)}")
    if not ckpt["classes"]:  # glyphs always bring labels; this network was trained without
        return Data(images, None, [])
    if unknown := sorted(set(classes) - set(ckpt["classes"])):
        raise Failure(f"--data {name}: the network knows no class {unknown[0]}, but those of {own}")
    if labels is not None:  # classes have numbers of their own in each folder
        labels = torch.tensor([ckpt["classes"].index(known) for known in classes])[labels]
    return Data(images, labels, ckpt["classes"])


def fingerprint(data):
    """A checksum of ten thousand images at most, evenly chosen, and of their labels."""
    few, crc = slice(None, None, -(-len(data.images) // 10_000)), 0
    for image in data.images[few]:  # one at a time: all of them may be more than the memory
        crc = zlib.crc32(image.numpy().tobytes(), crc)
    return zlib.crc32(b"" if data.labels is None else data.labels[few].numpy().tobytes(), crc)

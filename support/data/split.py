"""The images of a data set, and their split into training images and held-out images."""

from typing import NamedTuple

import numpy as np
import torch

# The rule that splits a folder. A checkpoint stores it, so that a resumed run keeps its images.
#   0: nothing is held out.
#   1: all files are counted, even broken ones, and classes are those of the training images.
#   2: images are counted, classes are those of the whole folder, and each has a training image.
SPLIT = 2


def split_of(ckpt):
    """Return the rule that split a checkpoint's images. The first checkpoints do not store it."""
    return ckpt.get("split", 1 if "held_out" in ckpt else 0)


class Chosen:
    """Rows of a tensor, given by their numbers. A row is copied when it is read, not before."""

    def __init__(self, source, places):
        self.source = source
        self.places = torch.as_tensor(places)
        self.shape = torch.Size([len(places), *source.shape[1:]])
        self.device = source.device

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        return self.source[self.places[i]]


class Data(NamedTuple):
    """images uint8 (N, C, H, W); labels int64 (N,), which number `classes`, or None without classes."""

    images: torch.Tensor | Chosen
    labels: torch.Tensor | None
    classes: list[str]

    def batch(self, i, device):
        """Return the images with the numbers i in [-1, 1], and their labels or None, on `device`."""
        fast = device.type == "cuda"  # copy without waiting for the GPU
        x0 = self.images[i.to(self.images.device, non_blocking=fast)]
        y = None if self.labels is None else self.labels[i].to(device, non_blocking=fast)
        return x0.to(device, non_blocking=fast).float() / 127.5 - 1, y

    def pick(self, places):
        """Return the images with the numbers `places`, without copying them."""
        labels = None if self.labels is None else self.labels[places]
        return Data(Chosen(self.images, places), labels, self.classes)

    def take(self, limit):
        """Return the images, or a seeded choice of `limit` of them."""
        return self.pick(np.sort(shuffled(len(self.images))[:limit]))

    def with_classes(self, classes):
        """Return the images of these classes, with labels that number `classes`."""
        number = {name: k for k, name in enumerate(classes)}
        labels = torch.tensor([number.get(name, -1) for name in self.classes])[self.labels]
        return Data(self.images, labels, classes).pick((labels >= 0).nonzero()[:, 0])


def shuffled(n):
    """Return the numbers below n in an order that never changes."""
    return np.random.default_rng(0).permutation(n)


def divide(data, numbers, limit=None, rule=SPLIT, hold_out=True):
    """Return the training images, at most `limit`, and the held-out images, as Data.

    numbers: for each file, the number of its image, -1 for a broken file. From 40 images on, a
    twentieth is held out, but at most 512.
    """
    order = numbers[shuffled(len(numbers))]
    if rule == 2:
        order = order[order >= 0]
    n = len(order)
    held, rest = np.split(order, [min(512, n // 20) if hold_out and rule > 0 and n >= 40 else 0])
    chosen = rest[:limit]
    if rule == 2 and data.labels is not None:
        # The first image of each class precedes the others, so that the limit cuts none of them.
        others = np.concatenate([rest, held])
        _, first = np.unique(data.labels[others], return_index=True)
        first = sorted(first, key=lambda place: place >= len(chosen))
        chosen = list(dict.fromkeys([*others[first], *chosen]))[:limit]
    training = data.pick(np.setdiff1d(chosen, [-1]))
    held = data.pick(np.setdiff1d(held, [-1, *chosen]))
    if rule < 2 and data.labels is not None:
        classes = [data.classes[k] for k in training.labels.unique()]
        return training.with_classes(classes), held.with_classes(classes)
    return training, held

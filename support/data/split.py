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
    """Rows of a tensor, given by an index list. A row is copied when it is read, not before."""

    def __init__(self, source, places):
        self.source = source
        self.places = torch.tensor(places, dtype=torch.int64)
        self.shape = (len(places), *source.shape[1:])
        self.nbytes = len(places) * source[:1].nbytes
        self.device = source.device

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        return self.source[self.places[i]]

    def to(self, device):
        return self[:].to(device)


class Data(NamedTuple):
    """images uint8 (N, C, H, W); labels int64 (N,), which number `classes`, or None without classes."""

    images: torch.Tensor | Chosen
    labels: torch.Tensor | None
    classes: list[str]


def pick(data, places):
    """Return some of the images, without copying them."""
    labels = None if data.labels is None else data.labels[places]
    return Data(Chosen(data.images, places), labels, data.classes)


def take(data, limit):
    """Return the images, or a seeded choice of `limit` of them."""
    return pick(data, sorted(shuffled(len(data.images))[:limit].tolist()))


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
    count = min(512, n // 20) if hold_out and rule > 0 and n >= 40 else 0
    held = order[:count].tolist()
    rest = order[count:].tolist()
    chosen = rest[:limit]
    if rule == 2 and data.labels is not None:
        add_missing_classes(chosen, rest + held, data.labels.tolist(), limit)
    training = pick(data, sorted(set(chosen) - {-1}))
    held = pick(data, sorted(set(held) - set(chosen) - {-1}))
    if rule < 2 and data.labels is not None:
        classes = [data.classes[k] for k in training.labels.unique()]
        return with_classes(training, classes), with_classes(held, classes)
    return training, held


def add_missing_classes(training, others, labels, limit):
    """Add an image of each class that has none to the list `training` of image numbers.

    If there is a limit, it replaces an image of a class with several.
    """
    count = np.bincount([labels[i] for i in training], minlength=max(labels) + 1)
    for k in np.flatnonzero(count == 0):
        if limit and len(training) >= limit:
            spare = [i for i in training if count[labels[i]] > 1]
            if not spare:
                return  # fewer images than classes
            training.remove(spare[-1])
            count[labels[spare[-1]]] -= 1
        training.append(next(i for i in others if labels[i] == k))


def with_classes(data, classes):
    """Return the images of these classes, with labels that number `classes`."""
    number = {name: k for k, name in enumerate(classes)}
    new = torch.tensor([number.get(name, -1) for name in data.classes], dtype=torch.int64)
    labels = new[data.labels]
    return pick(Data(data.images, labels, classes), (labels >= 0).nonzero()[:, 0].tolist())

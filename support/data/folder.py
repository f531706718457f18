"""A folder of images, decoded once into a cache that is mapped into memory.

The cache is one file: the pixels of all images, uint8 (N, C, H, W), and then one byte for each file of
the folder, with the flags of support/data/decode.py.
"""

import hashlib
import os
import pathlib
import unicodedata

import numpy as np
import torch

from support.data.decode import BRIGHT, ENLARGED, decode_all
from support.data.split import Data
from support.errors import Failure
from support.files import create_folder, replacing
from support.progress import note

SPLITS = {"train", "training", "val", "valid", "validation", "test"}


def load(folder, data_dir, size, channels, skip_broken=False, labels=False):
    """Return the images under `folder`, cropped to `size` (H, W), as Data, and their numbers.

    The numbers are those of each file's image, -1 if it is broken. Raises Failure for a folder without
    images, for a broken image unless skip_broken, and for a labelled image outside the subfolders.
    """
    root = pathlib.Path(folder)
    H, W = size
    paths = list_files(root)
    cache = cache_path(root, paths, size, channels, data_dir)
    flags = read_flags(cache, len(paths), channels * H * W)
    if flags is None or not (skip_broken or flags.all()):
        create_folder(data_dir, "--data-dir")
        with replacing(cache) as out:
            flags = decode_all(paths, size, channels, out, skip_broken)
            if not flags.any():
                raise Failure(f"--data {folder}: contains no images")
            out.write(flags)
    images = np.memmap(cache, np.uint8, "c", shape=(np.count_nonzero(flags), channels, H, W))
    names = []
    if labels:
        names = [class_name(root, path) for path, flag in zip(paths, flags) if flag]
    report(root, size, paths, flags, names)
    classes, y = np.unique(names, return_inverse=True)
    data = Data(torch.from_numpy(images), torch.from_numpy(y) if labels else None, classes.tolist())
    return data, np.where(flags, np.cumsum(flags > 0) - 1, -1)


def list_files(root):
    """Return the sorted paths of all files in a folder and its subfolders.

    Hidden files, thumbnails and our caches are left out. A folder that is also a link is read once.
    """
    if not root.is_dir():
        raise Failure(f"--data {root}: is not glyphs, cifar10 or a folder")
    if any(root.glob("data_batch_1*")):
        raise Failure(f"--data {root}: contains CIFAR-10, not image files; use --data cifar10")
    paths = []
    thumbnails = []
    seen = {os.path.realpath(root)}
    for folder, names, files in os.walk(root, followlinks=True, onerror=stop):
        for name in sorted(names):
            path = os.path.join(folder, name)
            real = os.path.realpath(path)
            if name == "@eaDir":
                thumbnails.append(path)
            if name == "@eaDir" or name.startswith(".") or real in seen:
                names.remove(name)
            seen.add(real)
        for name in files:
            if not name.startswith(".") and not name.endswith(".u8"):
                paths.append(pathlib.Path(folder, name))
    if thumbnails:
        note(f"left out {len(thumbnails)} folders of thumbnails, such as {thumbnails[0]}")
    return sorted(paths)


def stop(error):
    raise error


def cache_path(root, paths, size, channels, data_dir):
    """Return the cache's path. Its name follows from the files, the size and the channels."""
    stamps = []
    for path in paths:
        about = path.stat()
        stamps.append((path.relative_to(root).as_posix(), about.st_size, about.st_mtime_ns))
    key = hashlib.sha256(repr((7, stamps, size, channels)).encode()).hexdigest()[:16]
    H, W = size
    return pathlib.Path(data_dir) / f"{root.resolve().name[:50]}-{H}x{W}x{channels}-{key}.u8"


def read_flags(cache, count, image_bytes):
    """Return the flags at the end of a cache, uint8 (count,), or None without a complete cache."""
    size = cache.stat().st_size if cache.is_file() else 0
    if size <= count:
        return None
    flags = np.fromfile(cache, np.uint8, offset=size - count)
    return flags if size == np.count_nonzero(flags) * image_bytes + count else None


def class_name(root, path):
    """Return the name of an image's class, which is its folder directly under `root`."""
    parts = path.relative_to(root).parts
    if len(parts) == 1:
        raise Failure(f"{path}: is in no subfolder of --data; with --labels, those are the classes")
    return unicodedata.normalize("NFC", parts[0])  # macOS may write an accent as a second letter


def report(folder, size, paths, flags, names):
    """Print a line for each property of the images that a user may not expect."""
    small = f"smaller than {size[0]}x{size[1]} and were enlarged"
    for what, found in (
        ("not images and were left out", flags == 0),
        (small, flags & ENLARGED > 0),
    ):
        if found.any():
            example = paths[found.argmax()]
            note(f"{found.sum()} of {len(paths)} files are {what}, such as {example}")
    if not (flags & BRIGHT).any():
        note(
            f"warning: no pixel of {folder} reaches a quarter of the full brightness; if its files "
            f"contain 10-bit or 12-bit data, scale them to the full 16 bits"
        )
    classes = set(names)
    if classes and {name.lower() for name in classes} <= SPLITS:
        note(
            f"warning: the classes of {folder} are {', '.join(sorted(classes))}; if these are splits, "
            f"use --data {folder}/{max(classes, key=names.count)}"
        )

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
    """Return the images under `folder`, cropped to `size` (H, W), as Data; and each file's image number.

    A broken file has the number -1, or raises Failure without skip_broken.
    """
    root = pathlib.Path(folder)
    paths = list_files(root)
    cache = cache_path(root, paths, size, channels, data_dir)
    if not cache.is_file():
        create_folder(data_dir, "--data-dir")
        with replacing(cache) as out:
            flags = decode_all(paths, out, size=size, channels=channels, skip_broken=skip_broken)
            if not any(flags):
                raise Failure(f"--data {folder}: contains no images")
            out.write(flags)
    images, flags = np.split(np.memmap(cache, np.uint8, "c"), [-len(paths)])
    images = torch.from_numpy(images).reshape(-1, channels, *size)
    if not (skip_broken or flags.all()):
        broken = paths[flags.argmin()]
        raise Failure(f"{broken}: cannot be read as an image; remove it or give --skip-broken")
    names = [class_name(path, root) for path in np.array(paths)[flags > 0]] if labels else []
    classes, y = np.unique(names, return_inverse=True)
    report(folder, size, paths, flags, classes.tolist())
    data = Data(images, torch.from_numpy(y) if labels else None, classes.tolist())
    return data, np.where(flags, np.cumsum(flags > 0) - 1, -1)


def list_files(root):
    """Return the sorted paths of all files in a folder and its subfolders.

    Hidden files, thumbnails and our caches are left out. A folder that is also a link is read once.
    """
    if not root.is_dir():
        raise Failure(f"--data {root}: is not glyphs, cifar10 or a folder")
    if any(root.glob("data_batch_1*")):
        raise Failure(f"--data {root}: contains CIFAR-10, not image files; use --data cifar10")

    def stop(error):
        raise error

    paths = []
    seen = {os.path.realpath(root)}
    for folder, names, files in os.walk(root, followlinks=True, onerror=stop):
        for name in sorted(names):
            real = os.path.realpath(os.path.join(folder, name))
            if name == "@eaDir" or name.startswith(".") or real in seen:
                names.remove(name)
            seen.add(real)
        paths += [pathlib.Path(folder, name) for name in files]
    thumbnails = [path for path in seen if path.endswith("@eaDir")]
    if thumbnails:
        note(f"left out {len(thumbnails)} folders of thumbnails, such as {min(thumbnails)}")
    return sorted(path for path in paths if path.name[0] != "." and path.suffix != ".u8")


def cache_path(root, paths, size, channels, data_dir):
    """Return the cache's path. Its name follows from the files, the size and the channels."""
    about = [(path.relative_to(root).as_posix(), path.stat()) for path in paths]
    stamps = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in about]
    key = hashlib.sha256(repr((7, stamps, size, channels)).encode()).hexdigest()[:16]
    shape = f"{size[0]}x{size[1]}x{channels}"
    return pathlib.Path(data_dir) / f"{root.resolve().name[:50]}-{shape}-{key}.u8"


def class_name(path, root):
    """Return the name of an image's class, which is its folder directly under `root`."""
    parts = path.relative_to(root).parts
    if len(parts) == 1:
        raise Failure(f"{path}: is in no subfolder of --data; subfolders are the classes")
    return unicodedata.normalize("NFC", parts[0])  # macOS may write an accent as a second letter


def report(folder, size, paths, flags, classes):
    """Print a line for each property of the images that a user may not expect."""
    small = f"smaller than {size[0]}x{size[1]} and were enlarged"
    found = {"not images and were left out": flags == 0, small: flags & ENLARGED > 0}
    for what, files in found.items():
        if files.any():
            example = paths[files.argmax()]
            note(f"{files.sum()} of {len(paths)} files are {what}, such as {example}")
    if not (flags & BRIGHT).any():
        note(f"warning: no pixel of {folder} is above 63 of 255; scale 12-bit data to 16 bits")
    if classes and {name.lower() for name in classes} <= SPLITS:
        names = ", ".join(classes)
        note(f"warning: the classes are {names}; if these are splits, give one of them as --data")

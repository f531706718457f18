"""A folder of images, decoded once into a cache that is mapped into memory and never copied whole.

The cache is one file: the pixels of all images, uint8 (N, C, H, W); the number of each one's file, int32,
in the order of all files (a broken file that --skip-broken leaves out has no number); and a checksum of both.
"""

import hashlib
import os
import pathlib

import numpy as np

from support import workers
from support.data.decode import decode_all
from support.errors import Failure, UsageError
from support.files import replacing, sha256
from support.progress import Progress

CHECKSUM = 32  # bytes, at the end of a cache


def parse_size(text):
    """(H, W) from "64" or "48x64". Raises UsageError for anything else."""
    try:
        H, W = (int(side) for side in (text.lower().split("x") * 2)[:2])
        if H < 1 or W < 1 or H * W > 2**22 or text.lower().count("x") > 1:
            raise ValueError
    except ValueError:
        raise UsageError(
            f"--size {text}: must be one number or HEIGHTxWIDTH, such as 64 or 48x64, of at "
            f"most 2048x2048 pixels"
        ) from None
    return H, W


def load(folder, size, channels, cache_dir, skip_broken, labelled=False, part="all", limit=None):
    """Images under `folder`, cropped to `size` (H, W): uint8 (N, C, H, W), and the paths of their files.

    part: "all" of them, those for "training", or those "held out"; limit: a choice of so many, of all its
    parts alike. Raises Failure for a folder without images, a file that is no image (unless skip_broken), a
    labelled image outside the subfolders, and a folder that changes meanwhile.
    """
    root, (H, W) = pathlib.Path(folder), size
    every = listed(folder)
    files = [every[i] for i in chosen(len(every), part, limit)]
    state = stamps(files)
    key = hashlib.sha256(repr((4, state, size, channels, skip_broken)).encode()).hexdigest()[:16]
    name = os.fsdecode(os.fsencode(root.resolve().name)[:100])  # a longer one might be refused
    cache = pathlib.Path(cache_dir) / f"{name}-{H}x{W}x{channels}-{key}.u8"
    whole = cached(cache, channels * H * W, len(files))
    if files and not len(whole):
        if labelled and not skip_broken:
            labels_of(root, every)  # refuses an image without a class before the work of decoding
        cache.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cache, through_links=False) as out:
            decode_all(files, size, channels, out, skip_broken, none=part == "held out")
            out.seek(0)
            out.write(checksum(out))
            if stamps(files) != state or listed(folder) != every:
                raise Failure(
                    f"--data {folder}: changed while it was read; start again when it is at rest"
                )
        whole = cached(cache, channels * H * W, len(files))
    if not len(whole):  # of the few that are held out, all may be broken
        return np.empty((0, channels, H, W), np.uint8), []
    images = np.memmap(cache, np.uint8, "c", shape=(len(whole), channels, H, W))
    return images, [files[i] for i in whole]


def listed(folder):
    """The files of a folder, in the order of their names. Raises Failure for one without files."""
    root = pathlib.Path(folder)
    if not root.is_dir():
        problem = "it is a file" if root.exists() else "there is no such folder"
        raise Failure(f"--data {folder}: neither glyphs nor cifar10, and {problem}")
    files = sorted(visible_files(root))
    if not files:
        raise Failure(f"--data {folder}: there are no images in it")
    return files


def held_out(count):
    """How many of `count` images are held out: a twentieth, 512 at most, none of fewer than 40."""
    return min(512, count // 20) if count >= 40 else 0


def chosen(count, part, limit=None):
    """The places, in order, of the images of a part ("all", "training", "held out") out of `count`, or of
    `limit` of them. A fixed seed shuffles all; those held out come first."""
    order, held = np.random.default_rng(0).permutation(count), held_out(count)
    places = {"all": order, "training": order[held:], "held out": order[:held]}[part]
    return sorted(places[:limit].tolist())


def cached(cache, pixels, count):
    """The numbers of the files, out of `count`, that a cache holds; none if it is missing or damaged."""
    if cache.is_symlink() or not cache.is_file():
        return []
    N, rest = divmod(os.path.getsize(cache) - CHECKSUM, pixels + 4)
    if rest or not 0 < N <= count:
        return []
    with open(cache, "rb") as file:
        sum_of_all = checksum(file, N * (pixels + 4))
        if file.read() != sum_of_all:
            return []
    whole = np.fromfile(cache, np.int32, N, offset=N * pixels)
    fits = whole[0] >= 0 and whole[-1] < count and (np.diff(whole) > 0).all()
    return whole if fits else []


def checksum(file, length=None):
    """SHA-256 of what follows in a file: of `length` bytes, or of all. It is left behind them."""
    length = os.fstat(file.fileno()).st_size - file.tell() if length is None else length
    if not workers.is_first():
        return sha256(file, length)
    progress = Progress("checking the cache", length, "bytes")
    digest = sha256(file, length, progress)
    progress.close()
    return digest


def labels_of(folder, files):
    """Labels (N,) and names of the classes, which are the folders right under `folder`."""
    names = [path.relative_to(folder).parts[:-1] for path in files]
    if () in names:
        raise Failure(
            f"{files[names.index(())]}: is in no subfolder of --data, and those are the classes"
        )
    classes = sorted({name[0] for name in names})
    number = {name: k for k, name in enumerate(classes)}
    return np.array([number[name[0]] for name in names]), classes


def visible_files(root):
    """Every file under root whose path has no hidden part. Pipes, sockets, devices and our own caches are
    left out. A link to a folder is followed once, and only to one that the walk does not meet anyway. A
    link to nothing is kept, as a broken file."""
    seen = {os.path.realpath(root)}
    for folder, names, files in os.walk(root, followlinks=True, onerror=reraise):
        names.sort(
            key=lambda name, folder=folder: (os.path.islink(os.path.join(folder, name)), name)
        )
        names[:] = [
            name
            for name in names
            if not name.startswith(".")
            and (real := os.path.realpath(os.path.join(folder, name))) not in seen
            and not seen.add(real)
        ]
        paths = (
            os.path.join(folder, name)
            for name in files
            if not name.startswith(".") and not name.endswith(".u8")
        )
        yield from (
            pathlib.Path(path) for path in paths if os.path.isfile(path) or not os.path.exists(path)
        )


def reraise(error):
    raise error


def stamps(files):
    """Name, size and time of each file: what changes when its contents do."""
    stats = ((path, os.stat(path, follow_symlinks=path.exists())) for path in files)
    return [(os.fsencode(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]

"""Files that are complete or do not exist, and existing files that are moved aside.

A file is written under a hidden name beside its target, flushed to disk, and renamed. A crash, a
full disk or a signal therefore leaves the old file as it was.
"""

import contextlib
import glob
import itertools
import os
import pathlib
import secrets
import shutil

from support.errors import Failure
from support.progress import note

# --- Checks before the work ----------------------------------------------------------------------


def writable(path, flag="--out", folder=False):
    """Raise Failure unless the value of `flag` is a file, or a folder, that can be written or created."""
    bare = str(path).rstrip("/" + os.sep) or os.sep  # "file/" does not exist
    wrong = os.path.exists(bare) and not (os.path.isdir(bare) if folder else os.path.isfile(bare))
    if wrong or (bare != str(path) and not folder):
        kind = "folder" if folder else "file"
        raise Failure(f"{flag} {path}: is not a {kind}; choose another path")
    partial = partial_name(path)
    try:
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise Failure(f"{flag} {path}: cannot be written: {error.strerror}") from None


def create_folder(path, flag):
    """Create a folder, and those above it, unless it exists. Raise Failure if that fails."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise Failure(f"{flag} {path}: {error.strerror}; choose another folder") from None


def same(one, other):
    """Return whether two paths lead to the same file, which exists."""
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


# --- Writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path):
    """Yield a binary file that replaces `path` once it is complete on disk.

    Any exception inside leaves `path` as it was.
    """
    partial = partial_name(path)
    try:
        with naming(path, partial):
            with open(partial, "x+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, os.path.realpath(path))
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path):
    """Yield an empty folder that replaces `path`, which is missing or an empty folder, at the end."""
    partial = partial_name(path)
    try:
        with naming(path, partial):
            partial.mkdir()
            yield partial
            if os.path.exists(path):
                os.rmdir(path)  # raises if it is not empty
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def naming(path, partial):
    """Give an error of writing, which names no file or the hidden one, the name `path`."""
    try:
        yield
    except OSError as error:
        if not error.filename or str(error.filename).startswith(str(partial)):
            error.filename = path
        raise


def partial_name(path):
    """Return a hidden name beside the file `path`, or the file that it links to. A long name is cut."""
    real = pathlib.Path(os.path.realpath(path))
    return real.with_name(f".{real.name[:50]}.{secrets.token_hex(4)}.partial")


# --- A run's checkpoint and the sample grids beside it -------------------------------------------


def grid_name(out, epoch):
    """Return ckpt.0005.png for ckpt.pt."""
    return f"{out.removesuffix('.pt')}.{epoch:04d}.png"


def grids(out):
    """Return the grids that lie beside a checkpoint as {epoch: path}, the earliest epoch first."""
    start = out.removesuffix(".pt") + "."
    found = {}
    for path in glob.glob(f"{glob.escape(start)}*.png"):
        number = path.removeprefix(start).removesuffix(".png")
        if number.isdecimal() and len(number) >= 4:
            found[int(number)] = path
    return dict(sorted(found.items()))


def free_name(out):
    """Return the first of ckpt.1.pt, ckpt.2.pt, ... that no run uses."""
    stem = out.removesuffix(".pt")
    suffix = out.removeprefix(stem)
    for i in itertools.count(1):
        name = f"{stem}.{i}{suffix}"
        if not os.path.exists(name) and not grids(name):
            return name


def make_way(out):
    """Rename an existing checkpoint and its grids: ckpt.pt becomes ckpt.1.pt, or the next number."""
    pictures = grids(out)
    if not os.path.exists(out) and not pictures:
        return
    name = free_name(out)
    if os.path.exists(out):
        os.rename(out, name)
    for epoch, picture in pictures.items():
        os.rename(picture, grid_name(name, epoch))
    note(f"note: the existing {out} is now {name}, and its grids have this name too")


def version(path):
    """Identify the content of a file by size, time and inode; None if the file does not exist."""
    if not os.path.exists(path):
        return None
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns, state.st_ino

"""Files and folders that are written whole or not at all.

A writer works on a partial file beside the target and renames it at the end. A crash, a full disk or
a signal therefore leaves the old file as it was. Everything that the commands write goes through here.
"""

import contextlib
import glob
import os
import pathlib
import secrets
import shutil
import time

from support.errors import Failure


def writable(path):
    """Raises Failure if `path` cannot become a file. Called before the work, not after it."""
    folder = pathlib.Path(path).parent
    if not folder.is_dir():
        raise Failure(f"{path}: there is no folder {folder}")
    if pathlib.Path(path).is_dir() or (isinstance(path, str) and path.endswith("/")):
        raise Failure(f"{path}: is a folder")
    if os.path.exists(path) and not os.path.isfile(path):
        raise Failure(f"{path}: is not an ordinary file")
    if not os.access(folder, os.W_OK):
        raise Failure(f"{path}: no permission to write there")


@contextlib.contextmanager
def replacing(path):
    """Yields a binary file that takes the place of `path` once it is complete and on disk.

    Any exception inside leaves `path` as it was. A full disk raises Failure.
    """
    path = pathlib.Path(os.path.realpath(path))
    partial = partial_name(path)
    clear_old_partials(path)
    try:
        with open(partial, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        network = isinstance(error, (ConnectionError, TimeoutError))
        if isinstance(error, OSError) and not error.filename and not network:
            raise Failure(f"{path}: {error.strerror or error}; nothing changed") from None
        raise


@contextlib.contextmanager
def replacing_folder(path):
    """Yields an empty folder that takes the place of `path`, which is missing or empty, at the end."""
    partial = partial_name(path)
    partial.mkdir()
    try:
        yield partial
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_name(path):
    """A hidden name beside `path` that no other process takes, on whatever machine it runs."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def clear_old_partials(path):
    """Removes what a killed writer of `path` left. A partial file younger than an hour may be in use."""
    with contextlib.suppress(OSError):
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()

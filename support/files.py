"""Files and folders that are written whole or not at all.

A writer works on a partial file beside the target and renames it at the end. A crash, a full disk or
a signal therefore leaves the old file as it was. Everything that the commands write goes through here.
"""

import contextlib
import glob
import hashlib
import os
import pathlib
import secrets
import shutil
import stat
import time

from support.errors import Failure, UsageError


def writable(path):
    """Raises Failure if `path`, as a person typed it, cannot become a file. Called before the work."""
    if path.endswith("/") or os.path.isdir(path):
        raise Failure(f"{path}: is a folder")
    if os.path.exists(path) and not os.path.isfile(path):
        raise Failure(f"{path}: is not an ordinary file")
    takes_files(path, path)


def takes_files(path, typed):
    """Raises Failure, in which `typed` stands for the path, unless a file can be made at `path`."""
    path, parent = pathlib.Path(os.path.realpath(path)), pathlib.Path(typed).parent
    if not path.parent.is_dir():  # where a link leads, perhaps
        raise Failure(f"{typed}: there is no folder {path.parent if parent.is_dir() else parent}")
    partial, folder = partial_name(path), path.parent.stat()
    try:
        with contextlib.suppress(FileNotFoundError):
            owner = os.lstat(path).st_uid  # a name that is too long is refused here
            if folder.st_mode & stat.S_ISVTX and os.geteuid() not in (0, owner, folder.st_uid):
                raise Failure(
                    f"{typed}: belongs to another user, and its folder lets nobody else replace it"
                )
        partial.touch(exist_ok=False)
        partial.unlink()
    except OSError as error:
        raise Failure(f"{typed}: cannot be written there: {error.strerror}") from None


def refuse_no_folder(path, typed):
    """Raises Failure if `path`, which is to be a folder, is there as something else."""
    if os.path.lexists(path) and not os.path.isdir(path):
        raise Failure(f"--out {typed}: is there, and no folder; name a new one")


def refuse_input(out, *inputs):
    """Raises UsageError if `out` is one of the files that the command reads, by whatever path."""
    for path in filter(None, inputs):
        if os.path.exists(path) and os.path.exists(out) and os.path.samefile(path, out):
            raise UsageError(f"--out: {out} is what the command reads; name another file")


@contextlib.contextmanager
def replacing(path, through_links=True):
    """Yields a binary file that takes the place of `path`, and its permissions, once it is complete and
    on disk.

    Any exception inside leaves `path` as it was. A full disk raises Failure. through_links: if `path` is a
    link, what it points to is replaced; otherwise the link is, for a place that others may write to.
    """
    typed, path = path, pathlib.Path(os.path.realpath(path) if through_links else path)
    partial = partial_name(path)
    clear_old_partials(path)
    try:
        with naming(typed, partial):
            with open(partial, "x+b") as file:
                if path.is_file() and not path.is_symlink():
                    os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replacing_folder(typed):
    """Yields an empty folder that takes the place of `typed`, which is missing or empty, at the end. A full
    disk raises Failure."""
    path = pathlib.Path(os.path.realpath(typed))
    partial = partial_name(path)
    try:
        with naming(typed, partial):
            partial.mkdir()
            yield partial
            partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def naming(typed, partial):
    """A writer's error names the file as a person typed it, where the system names none or the partial."""
    try:
        yield
    except (ConnectionError, TimeoutError):  # of a network, not of the disk
        raise
    except OSError as error:
        if str(error.filename or partial).startswith(str(partial)):
            raise Failure(f"{typed}: {error.strerror or error}; nothing changed") from None
        raise


def sha256(file, length, after=lambda done: None):
    """SHA-256 of the next `length` bytes of an open file, or of as many as there are. It is read, not mapped:
    a mapped file that shrinks meanwhile would end the process. after(done) is called after each part."""
    digest, done = hashlib.sha256(), 0
    while chunk := file.read(min(length - done, 2**20)):
        digest.update(chunk)
        done += len(chunk)
        after(done)
    return digest.digest()


def partial_name(path):
    """A hidden name beside `path` that no other process takes, on whatever machine it runs."""
    return path.with_name(f"{partial_stem(path)}{secrets.token_hex(4)}.partial")


def partial_stem(path):
    """How the partial names of `path` begin. A long name is cut: with more letters it might be refused."""
    return f".{os.fsdecode(os.fsencode(path.name)[:200])}."


def clear_old_partials(path):
    """Removes what a killed writer of `path` left. A partial file younger than an hour may be in use."""
    with contextlib.suppress(OSError):
        for left in path.parent.glob(f"{glob.escape(partial_stem(path))}*.partial"):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()

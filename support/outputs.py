"""The names of what a run writes beside its checkpoint, and how an earlier run's files make way for them."""

import contextlib
import glob
import itertools
import os
import pathlib
import re

from support import workers
from support.data import is_folder
from support.errors import Failure, UsageError
from support.files import partial_stem, writable
from support.monitor import refuse_log
from support.progress import note


def split(out):
    """("ckpt", ".pt") for ckpt.pt; the whole name, and "", for one that does not end so."""
    ends = out.endswith(".pt") and len(os.path.basename(out)) > 3
    return (out[:-3], ".pt") if ends else (out, "")


def grid_name(out, epoch):
    """ckpt.0005.png for ckpt.pt, and ckpt-0005.png for a name without .pt: no two runs share a grid."""
    stem, suffix = split(out)
    return f"{stem}{'.' if suffix else '-'}{epoch:04d}.png"


def grids(out):
    """The grids that lie beside a checkpoint, as {epoch: path}, the earliest first."""
    before, after = grid_name(out, 0).rsplit("0000", 1)
    found = {}
    for path in glob.glob(f"{glob.escape(before)}*{after}"):
        number = path[len(before) : -len(after)]
        if re.fullmatch("[0-9]{4,9}", number) and path == grid_name(out, int(number)):
            found[int(number)] = path
    return dict(sorted(found.items()))


def refuse(cfg):
    """Refuses what train.py would write beside --out, which is claimed, and cannot, and what would damage
    something else."""
    writable(grid_name(cfg.out, 0))
    for name, path in (("--out", cfg.out), ("--log", cfg.log)):
        above = pathlib.Path(os.path.realpath(path)).parents if path else ()
        if is_folder(cfg.data) and pathlib.Path(os.path.realpath(cfg.data)) in above:
            raise UsageError(
                f"{name} {path}: is inside --data, and would be taken for one of its images"
            )
    if cfg.init and os.path.exists(cfg.out) and os.path.samefile(cfg.out, cfg.init):
        raise UsageError(
            f"--out {cfg.out}: is the checkpoint of --init, and would be lost; name another"
        )
    if cfg.log:
        refuse_log(cfg.log, (cfg.out, cfg.resume or cfg.init or cfg.out))


@contextlib.contextmanager
def claimed(out):
    """Holds --out for this run: a second one at the same time is refused. The claim is a lock on a hidden
    file, which the system lifts when the process ends."""
    if not workers.is_first():
        yield
        return
    writable(out)
    path = pathlib.Path(os.path.realpath(out))
    claim = path.with_name(f"{partial_stem(path)}running")
    with locked(claim, out):
        try:
            yield
        finally:
            claim.unlink(missing_ok=True)


def locked(claim, out):
    """The file `claim`, open and locked. Raises Failure if another process has locked it."""
    import fcntl  # here, since Windows has none

    file = open(claim, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Failure(f"--out {out}: another run is writing there; name another file") from None
    except OSError:  # a disk of a network that knows no locks
        return file
    return (
        file if os.fstat(file.fileno()).st_nlink else locked(claim, out)
    )  # its holder has just removed it


def make_way(cfg):
    """Renames what another run left at --out."""
    own = cfg.resume and os.path.exists(cfg.out) and os.path.samefile(cfg.out, cfg.resume)
    if workers.is_first() and not own and (old := set_aside(cfg.out)):
        note(f"note: what another run left at {cfg.out}, with its grids, is now {old}")


def set_aside(out):
    """Renames a checkpoint and its grids, for a new run that will write there: ckpt.pt becomes ckpt.1.pt, or
    the first free number. A link stays, and what it points to is renamed. Returns what it is called now; None
    if there was nothing."""
    there, real = os.path.exists(out), os.path.realpath(out)
    if not there and not grids(out):
        return None
    for i in itertools.count(1):
        old, moved = numbered(out, i), numbered(real, i)
        if not (os.path.lexists(old) or os.path.lexists(moved) or grids(old)):
            break
    if there:
        os.rename(real, moved)
    for epoch, path in grids(out).items():
        os.rename(path, grid_name(old, epoch))
    return moved if os.path.islink(out) else old


def numbered(out, i):
    """ckpt.1.pt for ckpt.pt and 1."""
    stem, suffix = split(out)
    return f"{stem}.{i}{suffix}"

"""CIFAR-10 in its binary version: found unpacked, or downloaded, checked and unpacked."""

import hashlib
import http.client
import pathlib
import tarfile
import tempfile
import time
import urllib.error
import urllib.request

import numpy as np

from support.errors import Failure
from support.files import replacing
from support.progress import Progress

FOLDER = "cifar-10-batches-bin"
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # published beside it
ARCHIVE_BYTES, DEADLINE = 170_052_171, 4 * 3600  # of the download, in seconds
BYTES = 10_000 * 3073  # of each file: a label and 3 x 32 x 32 pixels an image
TRAINING, TEST = [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]


def load(data_dir, train):
    """Images uint8 (N, 3, 32, 32) and labels uint8 (N,), found in data_dir or downloaded to it.

    data_dir may be the unpacked folder itself. Raises Failure for damaged files, and without a network.
    """
    names, root = TRAINING if train else TEST, pathlib.Path(data_dir)
    folder = root if (root / names[0]).is_file() else root / FOLDER
    if not folder.is_dir():
        unpack(root)
    rows = []
    for name in names:
        raw = np.fromfile(folder / name, np.uint8)
        if len(raw) != BYTES:
            raise Failure(
                f"{folder / name}: {len(raw):,} bytes, not {BYTES:,}; damaged: "
                f"delete {folder} and let it be downloaded again"
            )
        rows.append(raw.reshape(-1, 3073))
        if rows[-1][:, 0].max() > 9:
            raise Failure(
                f"{folder / name}: a label is not one of 0 to 9; damaged: "
                f"delete {folder} and let it be downloaded again"
            )
    rows = np.concatenate(rows)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]


def unpack(root):
    """Downloads the archive where it is missing, and unpacks the six files that are used."""
    archive = root / URL.rsplit("/")[-1]
    root.mkdir(parents=True, exist_ok=True)
    if not archive.is_file():
        download(URL, archive)
    with open(archive, "rb") as file:
        if hashlib.file_digest(file, "md5").hexdigest() != MD5:
            raise Failure(
                f"{archive}: not the published file (its MD5 differs); delete it and try again"
            )
    with (
        tempfile.TemporaryDirectory(dir=root, prefix=".unpacking-") as partial,
        tarfile.open(archive) as tar,
    ):
        whole = pathlib.Path(partial) / FOLDER
        whole.mkdir()
        for name in TRAINING + TEST:
            (whole / name).write_bytes(tar.extractfile(f"{FOLDER}/{name}").read())
        whole.rename(root / FOLDER)


def download(url, path):
    """Writes what `url` sends to `path`, if it is the published archive. Raises Failure otherwise.

    Nothing that the server says is relied on: neither a length, nor that it ends, nor that it goes on.
    """
    try:
        with (
            urllib.request.urlopen(url, timeout=30) as reply,
            replacing(path, through_links=False) as file,
        ):
            progress, done = Progress(f"downloading {path.name}", ARCHIVE_BYTES, "bytes"), 0
            began = time.monotonic()
            while done <= ARCHIVE_BYTES and (chunk := reply.read1(1 << 20)):
                file.write(chunk)
                done += len(chunk)
                progress(done)
                if time.monotonic() - began > DEADLINE:
                    raise TimeoutError(f"{done:,} bytes came in {DEADLINE // 3600} hours")
            progress.close()
            file.seek(0)
            if hashlib.file_digest(file, "md5").hexdigest() != MD5:
                raise ConnectionError(f"{done:,} bytes came, which are not the published file")
    except (
        urllib.error.URLError,
        http.client.HTTPException,
        TimeoutError,
        ConnectionError,
    ) as error:
        raise Failure(
            f"cannot download CIFAR-10 ({getattr(error, 'reason', error)}): connect to a network; or put "
            f"{url} at {path}; or name the folder that holds {FOLDER}/ with --data-dir"
        ) from None

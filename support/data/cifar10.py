"""CIFAR-10 in its binary version: found unpacked, or downloaded, checked and unpacked."""

import hashlib
import pathlib
import tarfile
from http.client import HTTPException
from urllib.request import urlopen

import numpy as np

from support.errors import Failure
from support.files import create_folder, replacing, replacing_folder
from support.progress import Progress, note

FOLDER = "cifar-10-batches-bin"
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # published with the archive
BYTES = 10_000 * 3073  # of each file: a label and 3 x 32 x 32 pixels for each image
TRAINING = [f"data_batch_{i}.bin" for i in range(1, 6)]
TEST = ["test_batch.bin"]


def load(data_dir, train):
    """Return images uint8 (N, 3, 32, 32) and labels uint8 (N,), found in data_dir or downloaded to it."""
    names = TRAINING if train else TEST
    root = pathlib.Path(data_dir)
    folder = root if (root / names[0]).is_file() else root / FOLDER
    if not folder.is_dir():
        unpack(root)
    for name in names:
        if (folder / name).stat().st_size != BYTES:
            raise Failure(f"{folder / name}: damaged; delete {folder} to download it again")
    rows = np.stack([np.fromfile(folder / name, np.uint8) for name in names]).reshape(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]


def unpack(root):
    """Download the archive if it is missing, and unpack the six files that are used."""
    create_folder(root, "--data-dir")
    archive = root / "cifar-10-binary.tar.gz"
    if not archive.is_file():
        if (root / "cifar-10-batches-py").is_dir():
            note(f"{root}: contains CIFAR-10 for Python, but the binary version is needed")
        download(archive)
    if hashlib.md5(archive.read_bytes()).hexdigest() != MD5:
        raise Failure(f"{archive}: its MD5 is not {MD5}; delete it to download it again")
    with tarfile.open(archive) as tar, replacing_folder(root / FOLDER) as folder:
        for name in TRAINING + TEST:
            (folder / name).write_bytes(tar.extractfile(f"{FOLDER}/{name}").read())


def download(archive):
    """Write the published archive to the path `archive`."""
    progress = Progress(f"downloading {archive.name}", 170_052_171, "bytes")
    try:
        with urlopen(URL, timeout=30) as reply, replacing(archive) as out:
            while chunk := reply.read1(2**20):
                out.write(chunk)
                progress(out.tell())
    except (OSError, HTTPException) as error:
        ways = f"save {URL} as {archive}, or name its folder with --data-dir"
        raise Failure(f"cannot download CIFAR-10 ({error}); {ways}") from None
    finally:
        progress.close()

"""Weights in files that strangers wrote: safetensors, and the pickles of torch.save.

Nothing in such a file is believed. No code of it is run, every size in it is checked against the file's
own, and a tensor is read only when it is asked for: what a file claims costs no memory.
"""

import io
import json
import math
import os
import pickletools
import warnings
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from support.errors import Failure

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Weight(NamedTuple):
    """A tensor in a file: its shape, and a function that reads it, as float32, on the CPU."""

    shape: tuple
    read: Callable


def shown(text):
    """A stranger's name for something, at a length that fits into a message."""
    return text if len(text) <= 60 else f"{text[:57]}..."


def weights_in(path):
    """{name: Weight} of a file of weights. Failure, in one line, if it is not wholly what it should be."""
    if not os.path.isfile(path):
        raise Failure(f"{path}: no such file")
    return read_safetensors(path) if str(path).endswith(".safetensors") else read_pickled(path)


# --- safetensors: eight bytes of length, a header in JSON, and the tensors' bytes ----------------

LONGEST_HEADER = 100_000_000  # bytes: the format's own limit


def read_safetensors(path):
    """{name: Weight} of a .safetensors file, after every bound in its header was checked."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise Failure(f"{path}: damaged: a header of {length:,} bytes in a file of {size:,}")
        header = parse_header(path, file.read(length))
    start, weights, end = 8 + length, {}, 0
    for name, (dtype, shape, first, last) in sorted(header.items(), key=lambda item: item[1][2:]):
        if first != end:
            raise Failure(f"{path}: damaged: {shown(name)} begins at {first:,}, and not at {end:,}")
        weights[name], end = (
            Weight(shape, reader(path, start + first, last - first, dtype, shape)),
            last,
        )
    if start + end != size:
        raise Failure(
            f"{path}: damaged: its tensors end at byte {start + end:,}, the file at {size:,}"
        )
    return weights


def parse_header(path, text):
    """{name: (dtype, shape, first byte, last byte)} of a header, each of them possible by itself."""

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("it names something twice")
        return dict(pairs)

    try:
        header = json.loads(text.decode(), object_pairs_hook=unique)
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
        header.pop("__metadata__", None)
        return {name: parse_entry(name, entry) for name, entry in header.items()}
    except RecursionError:
        raise Failure(f"{path}: damaged: its header cannot be read (too deep)") from None
    except ValueError as error:
        raise Failure(f"{path}: damaged: its header cannot be read ({error})") from None


def parse_entry(name, entry):
    """(dtype, shape, first byte, last byte) of one tensor in a header. ValueError if they do not agree."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown(name)}: needs a dtype, a shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{shown(name)}: of {shown(repr(dtype))}, and not of {', '.join(DTYPES)}")
    if (
        not all(
            isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)
            for numbers in (shape, span)
        )
        or len(span) != 2
    ):
        raise ValueError(f"{shown(name)}: its shape or data_offsets are no whole numbers")
    if len(shape) > 8:  # the product of more would take its time
        raise ValueError(f"{shown(name)}: of {len(shape):,} dimensions")
    if span[1] - span[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(
            f"{shown(name)}: {span[1] - span[0]:,} bytes, which are not those of its shape"
        )
    return DTYPES[dtype], tuple(shape), *span


def reader(path, first, size, dtype, shape):
    """A function that reads one tensor out of the file."""

    def read():
        raw = np.fromfile(path, np.uint8, size, offset=first)
        if len(raw) != size:
            raise Failure(f"{path}: changed while it was read")
        return torch.from_numpy(raw).view(dtype).reshape(shape).float()

    return read


def metadata(path):
    """The text that a .safetensors file carries besides its tensors, {name: text}; it was read before."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    found = header.get("__metadata__", {})
    return found if isinstance(found, dict) else {}


def write_safetensors(file, tensors, about):
    """Writes {name: float32 tensor}, and {name: text} about them, to a binary file."""
    header, end = {"__metadata__": {"format": "pt", **about}}, 0
    for name, tensor in tensors.items():
        header[name] = dict(
            dtype="F32", shape=list(tensor.shape), data_offsets=[end, end + tensor.nbytes]
        )
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(tensor.float().contiguous().numpy().tobytes())


# --- .bin and .ckpt: a pickle, and in a zip archive (since PyTorch 1.6) or behind it the numbers --

PLAIN = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch FloatStorage",
    "torch HalfStorage",
    "torch BFloat16Storage",
}
LARGEST_PICKLE = 2 * 2**20  # bytes, without the numbers: some ten thousand tensors
OLD = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # how a file from before PyTorch 1.6 begins
LARGEST_OLD = 2 * 2**30  # bytes of a file that is not an archive, which is read at once


def read_pickled(path):
    """{name: Weight} of a dictionary of tensors that torch.save wrote."""
    try:
        archive = zipfile.is_zipfile(path)
        (check_archive if archive else check_old)(path)
        with warnings.catch_warnings(action="ignore"):
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
        if not isinstance(tensors, dict):
            raise ValueError("it holds no dictionary of tensors")
        for name, tensor in tensors.items():
            check_tensor(name, tensor)
        if sum(tensor.nbytes for tensor in tensors.values()) > os.path.getsize(path):
            raise ValueError("its tensors share their memory")
    except ValueError as error:
        raise Failure(f"{path}: cannot be read as weights: {error}") from None
    except (OSError, MemoryError):
        raise
    except Exception:  # whatever a damaged or foreign file makes a reader raise
        raise Failure(
            f"{path}: cannot be read as weights: damaged, or no file of PyTorch's"
        ) from None
    return {name: Weight(tuple(t.shape), t.detach().float) for name, t in tensors.items()}


def check_tensor(name, tensor):
    """ValueError unless it is a plain tensor, which takes as many bytes as it has numbers."""
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{shown(repr(name))} is no tensor")
    if (
        tensor.dtype not in DTYPES.values()
        or tensor.layout != torch.strided
        or tensor.device.type != "cpu"
    ):
        raise ValueError(f"{shown(name)} is not a plain tensor of {', '.join(DTYPES)}")
    if not tensor.is_contiguous():  # one number may stand for a gigantic tensor
        raise ValueError(f"{shown(name)} is not contiguous")


def check_archive(path, plain=PLAIN):
    """ValueError for what torch.load would unpack to any size, which are compressed members, and for a
    pickle that asks for anything but `plain`."""
    check_end(path)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("its archive is compressed, which PyTorch's are not")
        if sum(member.file_size for member in members) > os.path.getsize(path):
            raise ValueError("its archive says that it holds more than the file")
        pickles = [member for member in members if member.filename.endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > LARGEST_PICKLE:
            raise ValueError("not an archive of PyTorch's")
        check_pickle(
            io.BytesIO(archive.read(pickles[0])), plain
        )  # from memory, it takes half the time


def check_end(path):
    """ValueError unless the directory of an archive lies where its last record says, and right before it:
    torch looks at the one place and Python at the other, and each could be shown a directory of its own."""
    with open(path, "rb") as file:
        start = max(0, os.path.getsize(path) - 2**16)
        file.seek(start)
        tail = file.read()

    def number(place, size):
        return int.from_bytes(tail[place : place + size], "little")

    last = end = tail.rfind(b"PK\5\6")
    size, offset = number(last + 12, 4), number(last + 16, 4)
    if tail[last - 20 : last - 16] == b"PK\6\7":  # records of 64 bits, which torch always writes
        end = number(last - 12, 8) - start
        size, offset = number(end + 40, 8), number(end + 48, 8)
    if last < 76 or end not in (last, last - 76) or offset + size != start + end:
        raise ValueError("the directory of its archive is not where it should be")


def check_old(path):
    """The same of a file from before PyTorch 1.6: its mark, four pickles, then the numbers."""
    if os.path.getsize(path) > LARGEST_OLD:
        raise ValueError(f"not an archive, and larger than {LARGEST_OLD:,} bytes")
    with open(path, "rb") as file:
        if file.read(len(OLD)) != OLD:
            raise ValueError("no file of PyTorch's")
        for _ in range(4):
            check_pickle(file)


def check_pickle(file, plain=PLAIN):
    """ValueError if a pickle asks for anything but plain tensors. torch.load runs no code either, but
    what it does allow takes memory, as bytearray(10**12), or hours, as a dictionary of the multiples of
    2**61 - 1, whose hashes are one."""
    for op, argument, place in pickletools.genops(file):
        if place > LARGEST_PICKLE or (isinstance(argument, int) and abs(argument) >= 2**63):
            raise ValueError("it is too large, or has too large a number")
        if op.name in ("GLOBAL", "INST", "STACK_GLOBAL") and argument not in plain:
            raise ValueError(f"it asks for {shown(argument or 'a name')}, which is no tensor")

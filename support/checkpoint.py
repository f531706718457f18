"""The checkpoint: one file that holds a run, or a network to sample from. It carries its configuration.

It is a torch.save archive of a dictionary (CONTENTS), followed by a seal: a SHA-256 of every byte before.
torch.load alone accepts most bit flips, as other weights. Reading runs no code of the file.
"""

import contextlib
import hashlib
import os
import warnings

import numpy as np
import torch

import ddpm
from support.errors import Failure, out_of_memory
from support.files import replacing

FORMAT = 1  # a file with a higher number is refused
SEAL = b"\nddpm checkpoint; SHA-256 of all above: "  # and 32 bytes end the file; torch.load skips them
CONTENTS = dict(config=dict, network=dict, shape=tuple, classes=list, images=int, step=int, model=dict,
                ema=dict, optimizer=dict, fingerprint=int)
SCHEDULES = {"linear": ddpm.linear_schedule, "cosine": ddpm.cosine_schedule,
             "exponential": ddpm.exponential_schedule}


def save(path, ckpt):
    """Writes a dictionary of CONTENTS, whole or not at all. Raises Failure on a full disk."""
    with replacing(path) as file:
        try:
            torch.save({"ddpm_format": FORMAT, **ckpt}, file)
        except RuntimeError:  # how torch reports a full disk
            raise Failure(f"{path}: cannot be written, the disk may be full; nothing changed") from None
        file.seek(0)
        file.write(SEAL + hashlib.file_digest(file, "sha256").digest())


def load(path):
    """The dictionary that save() wrote, on the CPU. Raises Failure for any other file."""
    check_seal(path)
    try:
        with warnings.catch_warnings(action="ignore"):
            ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception:  # whatever a foreign file makes the reader raise
        raise Failure(f"{path}: sealed as a checkpoint, but cannot be read as one") from None
    if not isinstance(ckpt, dict) or "ddpm_format" not in ckpt:
        raise Failure(f"{path}: sealed as a checkpoint, but does not hold one")
    if ckpt["ddpm_format"] != FORMAT:
        raise Failure(f"{path}: its format, {ckpt['ddpm_format']}, is newer than this program's, "
                      f"{FORMAT}; update the program")
    with refusing(path):
        check_contents(ckpt)
    return ckpt


def check_seal(path):
    """Raises Failure unless `path` is a file that ends with the seal of its own bytes."""
    if not os.path.isfile(path):
        problem = "is a folder" if os.path.isdir(path) else "no such file"
        raise Failure(f"{path}: {problem}; train.py writes checkpoints (--out)")
    end, size = len(SEAL) + 32, os.path.getsize(path)
    data = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    if size < end or data[size - end : size - 32].tobytes() != SEAL:
        raise Failure(f"{path}: not a checkpoint of train.py, or not all of one")
    if hashlib.sha256(data[: size - end]).digest() != data[size - 32 :].tobytes():
        raise Failure(f"{path}: damaged: its checksum does not match its contents")


def check_contents(ckpt):
    """Raises an exception that refusing() turns into one line, unless the parts fit together."""
    network, (C, H, W), config = ckpt["network"], ckpt["shape"], ckpt["config"]
    factor = 2 ** (len(network["mult"]) - 1)
    fit(all(isinstance(ckpt[name], kind) for name, kind in CONTENTS.items()))
    fit(len(ckpt["classes"]) == (network["num_classes"] or 0))
    fit(all(isinstance(name, str) for name in ckpt["classes"]))
    fit(isinstance(config["data"], str) and isinstance(config["labels"], bool))
    fit(C == network["in_channels"] and ckpt["step"] > 0)
    fit(network["out_channels"] == {"fixed": C, "learned": 2 * C}[config["variance"]])
    fit(H > 0 and W > 0 and H % factor == W % factor == 0)


def fit(condition):
    """Raises what refusing() turns into one line, unless the condition holds."""
    if not condition:
        raise ValueError


@contextlib.contextmanager
def refusing(path):
    """Whatever the contents of an edited checkpoint make the code raise becomes one line; with path None,
    where nothing comes from a file, it stays what it is."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        if path is None or out_of_memory(error):
            raise
        raise Failure(f"{path}: its contents do not fit together") from None


def refuse_other_images(name, about, saved):
    """Raises Failure unless the images of the data called `name` are those that the saved run began with.

    about: their shape, classes, number (images) and fingerprint.
    """
    if saved["classes"] != about["classes"]:
        raise Failure(f"{name}: its classes are not those with which this run began")
    if saved["images"] != about["images"]:
        raise Failure(f"{name}: {about['images']:,} images, but {saved['images']:,} when this run began")
    if saved["fingerprint"] != about["fingerprint"]:
        raise Failure(f"{name}: not the images, or not in the order, with which this run began")


def load_model(path, weights="ema", device="cpu"):
    """The checkpoint, its network in eval mode on `device`, and its diffusion.

    weights: "ema", the moving average, or "raw", the last ones.
    """
    ckpt = load(path)
    with refusing(path):
        net = ddpm.UNet(**ckpt["network"])
        net.load_state_dict(ckpt["ema" if weights == "ema" else "model"])
        d = diffusion(ckpt["config"])
    # Its weights keep requires_grad: without it, autocast would round them again at every step.
    return ckpt, net.to(device, memory_format=torch.channels_last).eval(), d


def diffusion(config):
    """The diffusion of a run's settings."""
    return ddpm.Diffusion(SCHEDULES[config["schedule"]](config["timesteps"]))


def learned(ckpt):
    """Whether the network gives learned variances beside eps (improved.py)."""
    return ckpt["network"]["out_channels"] > ckpt["shape"][0]

"""The checkpoint: one file with a network, its diffusion process, and the run that trained it.

It is a torch.save archive of a dictionary, followed by a SHA-256 of every byte before, because
torch.load accepts most flipped bits as other weights. Loading runs no code of the file. A
checkpoint of convert.py, or a folder in diffusers' layout, has no run that --resume could continue.
"""

import hashlib
import io
import os
import pickle

import torch

import ddpm
from support import diffusers_format
from support.errors import Failure, UsageError
from support.files import replacing

FORMAT = 2  # format 1 had no process, which follows from its config
SEAL = b"\nddpm checkpoint; SHA-256 of all above: "  # the digest's 32 bytes end the file
SCHEDULES = dict(
    linear=ddpm.linear_schedule, cosine=ddpm.cosine_schedule, exponential=ddpm.exponential_schedule
)
# The types of a checkpoint's fields. A run has all of RUN; weights alone have none of them.
FIELDS = dict(network=dict, shape=tuple, classes=list, process=dict, step=int, model=dict, ema=dict)
RUN = dict(config=dict, images=int, fingerprint=int, optimizer=dict)
PROCESS = dict(beta=torch.Tensor, schedule=str, variance=str, clip=bool)
NETWORK = dict(in_channels=int, out_channels=int, ch=int, mult=(tuple, list), blocks=int)
NETWORK |= dict(attention=(tuple, list), dropout=(int, float), groups=int)
NETWORK |= dict(num_classes=(int, type(None)))


def save(path, ckpt):
    """Write a dictionary of FIELDS, and perhaps RUN, completely or not at all."""
    archive = io.BytesIO()
    torch.save({"ddpm_format": FORMAT, **ckpt}, archive)
    with replacing(path) as file:
        file.write(archive.getbuffer())
        file.write(SEAL + hashlib.sha256(archive.getbuffer()).digest())


def load(path):
    """Return the dictionary that save() wrote, or a diffusers folder as one without a run."""
    if os.path.isdir(path):
        ckpt = diffusers_format.read_folder(path)
    else:
        archive = unsealed(path)
        if not archive:
            raise Failure(f"{path}: not a complete checkpoint; convert.py reads other weights")
        try:
            ckpt = torch.load(archive, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise Failure(f"{path}: contains more than tensors and plain values") from None
        number = ckpt.get("ddpm_format")
        if number not in (1, FORMAT):
            raise Failure(f"{path}: format {number} is not supported; update this program")
        if number == 1:
            upgrade(ckpt)
    check(path, ckpt)
    return ckpt


def unsealed(path):
    """Return the archive in a checkpoint, None if the file is not one. Raises Failure if damaged."""
    with open(path, "rb") as file:
        content = memoryview(file.read())
    archive = content[: -len(SEAL) - 32]
    if content[len(archive) : -32] != SEAL:
        return None
    if content[-32:] != hashlib.sha256(archive).digest():
        raise Failure(f"{path}: damaged: its checksum does not match its contents")
    return io.BytesIO(archive)


def upgrade(ckpt):
    """Complete a checkpoint of format 1, whose runs had no learned variances and used every label."""
    ckpt["network"] = {"out_channels": ckpt["network"]["in_channels"], **ckpt["network"]}
    config = {"variance": "fixed", "labels": bool(ckpt["classes"]), **ckpt["config"]}
    ckpt["config"] = config
    ckpt["process"] = process(config["schedule"], config["timesteps"], config["variance"])


def process(schedule, T, variance):
    """Return the process of a run's settings: its betas, and the defaults for sampling from it."""
    beta = SCHEDULES[schedule](T)
    if (1 - beta).cumprod(0)[-1].sqrt().float() == 0:  # networks compute in float32
        raise UsageError(f"--timesteps {T}: with --schedule {schedule}, alpha_bar underflows to 0")
    variance = "learned" if variance == "learned" else "beta"
    return dict(beta=beta, schedule=schedule, clip=True, variance=variance)


def holds_run(ckpt):
    """Return whether the checkpoint has a run to resume, and not only a network."""
    return "config" in ckpt


def learned(ckpt):
    """Return whether the network predicts variances beside eps (improved.py)."""
    return ckpt["network"]["out_channels"] > ckpt["shape"][0]


def title(ckpt, weights):
    """Return what to call the weights, "ema" or "raw"."""
    return f"{weights} weights at step {ckpt['step']}" if ckpt["step"] else "converted weights"


def need(path, ok, field):
    """Raise Failure, which names the field of the checkpoint, unless `ok`."""
    if not ok:
        raise Failure(f"{path}: its settings and weights do not match (field: {field})")


def is_like(value, shape):
    """Return whether a value is a float32 tensor of this shape."""
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.shape == shape


def check(path, ckpt):
    """Raise Failure unless types, names and shapes are as save() writes them."""
    fields = FIELDS | RUN if holds_run(ckpt) else FIELDS
    for prefix, types in (("", fields), ("network.", NETWORK), ("process.", PROCESS)):
        part = ckpt[prefix[:-1]] if prefix else ckpt
        for name, kind in types.items():
            need(path, isinstance(part.get(name), kind), prefix + name)
    network = ckpt["network"]
    C, *sides = ckpt["shape"]
    factor = 2 ** (len(network["mult"]) - 1)
    multiples = all(type(side) is int and side > 0 and side % factor == 0 for side in sides)
    outputs = C * (2 if ckpt["process"]["variance"] == "learned" else 1)
    K = network["num_classes"] or 0
    need(path, network.keys() == NETWORK.keys(), "network")
    need(path, C == network["in_channels"] and len(sides) == 2 and multiples, "shape")
    need(path, outputs == network["out_channels"], "process.variance")
    names = ckpt["classes"]
    who = f"classes; convert.py --classes or classes.txt must name {K} different ones"
    need(path, len(names) == len(set(names)) == K and "" not in names, who)
    try:
        ddpm.Diffusion(ckpt["process"]["beta"])
        shapes = diffusers_format.shapes(network)
    except ValueError as error:  # ddpm.py rejects what the file contains
        raise Failure(f"{path}: {error}") from None
    for part in ("model", "ema"):
        for name in ckpt[part] | shapes:
            need(path, is_like(ckpt[part].get(name), shapes.get(name)), f"{part}.{name}")


def load_optimizer(path, saved, optimizer):
    """Load Adam's state. Raises Failure unless it has the shapes and layout of the parameters.

    Adam's kernels do not check them, and would write beyond the end of a shorter tensor.
    """
    params = optimizer.param_groups[0]["params"]
    state = saved.get("state")
    complete = isinstance(state, dict) and list(state) == list(range(len(params)))
    need(path, complete, "optimizer.state")
    for i, weight in enumerate(params):
        for name, like in dict(step=torch.zeros(()), exp_avg=weight, exp_avg_sq=weight).items():
            value = state[i].get(name)
            same = is_like(value, like.shape) and value.stride() == like.stride()
            need(path, same, f"optimizer.{i}.{name}")
    groups = optimizer.state_dict()["param_groups"]  # this run's own settings, not the file's
    optimizer.load_state_dict(dict(state=state, param_groups=groups))


def load_model(path, weights="ema", device="cpu"):
    """Return the checkpoint, its network in eval mode, and its diffusion. weights: "ema" or "raw"."""
    ckpt = load(path)
    net = ddpm.UNet(**ckpt["network"])
    net.load_state_dict(ckpt["ema" if weights == "ema" else "model"])
    d = ddpm.Diffusion(ckpt["process"]["beta"])
    # The weights keep requires_grad: without it, autocast would round them again at every step.
    return ckpt, net.to(device, memory_format=torch.channels_last).eval(), d


def starting_weights(ckpt, classes):
    """Return the average weights for a network with other classes, which at first predicts the same eps.

    A class keeps its row of the label table by its name. A new class starts as the old "no label",
    a row of zeros if there were no classes. Without classes, that row is added to the time's bias,
    since both embeddings are added.
    """
    weights = dict(ckpt["ema"])
    bias = weights["time.2.bias"]
    *rows, none = weights.pop("label.weight", torch.zeros(1, len(bias)))
    if classes:
        known = dict(zip(ckpt["classes"], rows))
        weights["label.weight"] = torch.stack([*(known.get(name, none) for name in classes), none])
    else:
        weights["time.2.bias"] = bias + none
    return weights

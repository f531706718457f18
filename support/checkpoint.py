"""The checkpoint: one file with a network, its diffusion process, and the run that trained it.

It is a torch.save archive of a dictionary, followed by a SHA-256 of every byte before, because
torch.load accepts most flipped bits as other weights. Loading runs no code of the file. A
checkpoint of convert.py, or a folder in diffusers' layout, has no run: it can be sampled,
evaluated and used by --init, but not resumed.
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
SCHEDULES = {
    "linear": ddpm.linear_schedule,
    "cosine": ddpm.cosine_schedule,
    "exponential": ddpm.exponential_schedule,
}
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
    """Return the dictionary that save() wrote, on the CPU. Raises Failure for any other file.

    A folder in diffusers' layout becomes a dictionary without a run, whose weights are both sets.
    """
    if os.path.isdir(path):
        ckpt = diffusers_format.read_folder(path)
    else:
        archive = io.BytesIO(unsealed(path))
        try:
            ckpt = torch.load(archive, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise Failure(f"{path}: contains more than tensors and plain values") from None
        number = ckpt.get("ddpm_format") if isinstance(ckpt, dict) else None
        if number not in (1, FORMAT):
            raise Failure(f"{path}: format {number} is not supported; update this program")
        if number == 1:
            upgrade(ckpt)
    check(path, ckpt)
    return ckpt


def upgrade(ckpt):
    """Complete a checkpoint of format 1, whose runs had no learned variances and used every label."""
    ckpt["network"] = {"out_channels": ckpt["network"]["in_channels"], **ckpt["network"]}
    ckpt["config"] = {"variance": "fixed", "labels": bool(ckpt["classes"]), **ckpt["config"]}
    config = ckpt["config"]
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


# --- Checks --------------------------------------------------------------------------------------


def sealed(path):
    """Return whether a file ends as a checkpoint does."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - len(SEAL) - 32))
        return file.read(len(SEAL)) == SEAL


def unsealed(path):
    """Return the bytes of a checkpoint before its checksum. Raises Failure if they do not match it."""
    if not os.path.isfile(path):
        raise Failure(f"{path}: no such file; train.py and convert.py write checkpoints (--out)")
    if not sealed(path):
        raise Failure(
            f"{path}: not a complete checkpoint of train.py; convert.py reads other weights"
        )
    with open(path, "rb") as file:
        content = memoryview(file.read())
    archive = content[: -len(SEAL) - 32]
    if hashlib.sha256(archive).digest() != content[-32:]:
        raise Failure(f"{path}: damaged: its checksum does not match its contents")
    return archive


def need(path, ok, field):
    """Raise Failure, which names the field of the checkpoint, unless `ok`."""
    if not ok:
        raise Failure(
            f"{path}: this checkpoint's settings and weights do not match (field: {field})"
        )


def is_like(value, shape):
    """Return whether a value is a float32 tensor of this shape."""
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.shape == shape


def check(path, ckpt):
    """Raise Failure unless types, names and shapes are as save() writes them."""
    for fields, part, prefix in (
        (FIELDS | RUN if holds_run(ckpt) else FIELDS, ckpt, ""),
        (NETWORK, ckpt.get("network"), "network."),
        (PROCESS, ckpt.get("process"), "process."),
    ):
        for name, kind in fields.items():
            need(path, isinstance(part, dict) and isinstance(part.get(name), kind), prefix + name)
    network = ckpt["network"]
    channels = network["in_channels"]
    learns = ckpt["process"]["variance"] == "learned"
    numbers = [*ckpt["shape"], *network["mult"], *network["attention"]]
    need(path, network.keys() == NETWORK.keys(), "network")
    need(path, all(type(number) is int for number in numbers), "shape, mult or attention")
    need(path, len(ckpt["shape"]) == 3 and ckpt["shape"][0] == channels, "shape")
    factor = 2 ** (len(network["mult"]) - 1)
    need(path, all(side > 0 and side % factor == 0 for side in ckpt["shape"][1:]), "shape")
    need(path, len(ckpt["classes"]) == (network["num_classes"] or 0), "classes")
    need(path, network["out_channels"] == channels * (2 if learns else 1), "process.variance")
    try:
        ddpm.Diffusion(ckpt["process"]["beta"])
        shapes = diffusers_format.shapes(network)
    except ValueError as error:  # ddpm.py rejects what the file contains
        raise Failure(f"{path}: {error}") from None
    for part in ("model", "ema"):
        need(path, ckpt[part].keys() == shapes.keys(), part)
        for name, shape in shapes.items():
            need(path, is_like(ckpt[part][name], shape), f"{part}.{name}")


def load_optimizer(path, saved, optimizer):
    """Load Adam's state. Raises Failure unless it has the shapes and layout of the parameters.

    Adam's kernels do not check them, and would write beyond the end of a shorter tensor.
    """
    params = optimizer.param_groups[0]["params"]
    state = saved.get("state")
    numbers = list(range(len(params)))
    need(path, isinstance(state, dict) and list(state) == numbers, "optimizer.state")
    for i, weight in enumerate(params):
        expected = dict(step=torch.tensor(0.0), exp_avg=weight, exp_avg_sq=weight)
        for name, tensor in expected.items():
            value = state[i].get(name)
            same = is_like(value, tensor.shape) and value.stride() == tensor.stride()
            need(path, same, f"optimizer.{i}.{name}")
    groups = optimizer.state_dict()["param_groups"]  # this run's own settings, not the file's
    optimizer.load_state_dict(dict(state=state, param_groups=groups))


# --- Networks from a checkpoint ------------------------------------------------------------------


def load_model(path, weights="ema", device="cpu"):
    """Return the checkpoint, its network in eval mode on `device`, and its diffusion.

    weights: "ema", the moving average, or "raw", the last weights.
    """
    ckpt = load(path)
    net = ddpm.UNet(**ckpt["network"])
    net.load_state_dict(ckpt["ema" if weights == "ema" else "model"])
    d = ddpm.Diffusion(ckpt["process"]["beta"])
    # The weights keep requires_grad: without it, autocast would round them again at every step.
    return ckpt, net.to(device, memory_format=torch.channels_last).eval(), d


def starting_weights(ckpt, classes):
    """Return the average weights for a network with other classes, which at first predicts the same eps.

    A class keeps its row of the label table by its name. A new class starts as the old "no label".
    If the network loses its classes, the effect of "no label" is added to the time's bias, since
    both embeddings are added. A network without classes had a row of zeros.
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

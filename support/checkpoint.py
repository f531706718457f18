"""The checkpoint: one file that holds a network with its process, and the run that trained it.

It is a torch.save archive of a dictionary, followed by a seal: a SHA-256 of every byte before. torch.load
alone accepts most bit flips, as other weights. Reading runs no code of the file. What convert.py brought in
has no run: it can be sampled, evaluated, and trained on with --init, but not resumed.
"""

import contextlib
import hashlib
import math
import os
import stat
import warnings

import torch

import ddpm
from support.errors import Failure, out_of_memory
from support.files import replacing, sha256
from support.weight_files import PLAIN, check_archive

FORMAT = 2  # a higher number is refused; format 1 had no process, which followed from its config
SEAL = (
    b"\nddpm checkpoint; SHA-256 of all above: "  # and 32 bytes end the file; torch.load skips them
)
NETWORK = dict(
    network=dict, shape=tuple, classes=list, process=dict, step=int, model=dict, ema=dict
)
RUN = dict(config=dict, images=int, fingerprint=int, optimizer=dict)  # all of these, or none
PROCESS = dict(
    beta=torch.Tensor, schedule=str, variance=str, clip=bool
)  # and the defaults of sampling
SCHEDULES = {
    "linear": ddpm.linear_schedule,
    "cosine": ddpm.cosine_schedule,
    "exponential": ddpm.exponential_schedule,
}


def save(path, ckpt):
    """Writes a dictionary of NETWORK and perhaps RUN, whole or not at all. Raises Failure on a full disk."""
    with replacing(path) as file:
        try:
            torch.save({"ddpm_format": FORMAT, **ckpt}, file)
        except RuntimeError:  # how torch reports a full disk
            raise Failure(
                f"{path}: cannot be written, the disk may be full; nothing changed"
            ) from None
        file.seek(0)
        file.write(SEAL + hashlib.file_digest(file, "sha256").digest())


def load(path):
    """The dictionary that save() wrote, on the CPU. Raises Failure for any other file."""
    check_seal(path)
    try:
        check_archive(path, PLAIN | {"torch DoubleStorage"})
        with warnings.catch_warnings(action="ignore"):
            ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a foreign file makes the reader raise
        if out_of_memory(error):  # which is the machine's fault
            raise
        raise Failure(f"{path}: sealed as a checkpoint, but cannot be read as one") from None
    if not isinstance(ckpt, dict) or type(ckpt.get("ddpm_format")) is not int:
        raise Failure(f"{path}: sealed as a checkpoint, but does not hold one")
    if ckpt["ddpm_format"] not in (1, FORMAT):
        raise Failure(
            f"{path}: its format, {ckpt['ddpm_format']}, is newer than this program's, "
            f"{FORMAT}; update the program"
        )
    with refusing(path):
        if ckpt["ddpm_format"] == 1:
            # The first runs learned no variances, and had labels wherever their data did.
            ckpt["network"] = {"out_channels": ckpt["network"]["in_channels"]} | ckpt["network"]
            config = {"variance": "fixed", "labels": bool(ckpt["classes"])} | ckpt["config"]
            ckpt["config"] = config
            ckpt["process"] = process(config["schedule"], config["timesteps"], config["variance"])
        check_contents(ckpt)
        check_weights(ckpt["network"], (ckpt["model"], ckpt["ema"]), os.path.getsize(path))
    return ckpt


def process(schedule, T, variance):
    """The process of a run's settings: its table of betas, and how to sample from it by default."""
    fit(0 < T <= 10**6)
    return dict(
        beta=SCHEDULES[schedule](T),
        schedule=schedule,
        clip=True,
        variance="learned" if variance == "learned" else "beta",
    )


def holds_run(ckpt):
    """Whether there is a run in it to go on with, and not only a network."""
    return "config" in ckpt


def check_seal(path):
    """Raises Failure unless `path` is a file that ends with the seal of its own bytes."""
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        kind = 0
    if not stat.S_ISREG(kind):
        problem = (
            "is a folder"
            if stat.S_ISDIR(kind)
            else "is no ordinary file"
            if kind
            else "no such file"
        )
        raise Failure(f"{path}: {problem}; train.py and convert.py write checkpoints (--out)")
    if not sealed(path):
        raise Failure(
            f"{path}: not a checkpoint of train.py, or not all of one; convert.py reads others' "
            f"weights"
        )
    with open(path, "rb") as file:
        digest = sha256(file, max(0, os.fstat(file.fileno()).st_size - len(SEAL) - 32))
        if file.read(len(SEAL) + 32)[len(SEAL) :] != digest:
            raise Failure(f"{path}: damaged: its checksum does not match its contents")


def sealed(path):
    """Whether a file ends as a checkpoint does."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - len(SEAL) - 32))
        return file.read(len(SEAL)) == SEAL


def check_contents(ckpt):
    """Raises an exception that refusing() turns into one line, unless every value is one that could have
    been written, and the parts fit together. The settings of a run are checked when it is resumed."""
    wanted = NETWORK | RUN if any(name in ckpt for name in RUN) else NETWORK
    fit(all(isinstance(ckpt[name], kind) for name, kind in wanted.items()))
    network, (C, H, W), process = ckpt["network"], ckpt["shape"], ckpt["process"]
    check_network(network)
    fit(is_whole(ckpt["step"], 0, 2**53) and is_whole(H, 1, 2**22) and is_whole(W, 1, 2**22))
    fit(H * W <= 2**22)  # as --size
    factor = 2 ** (len(network["mult"]) - 1)
    fit(all(isinstance(process[name], kind) for name, kind in PROCESS.items()))
    beta = process["beta"]
    fit(beta.dtype == torch.float64 and 1 < len(beta) <= 10**6 + 1 and not beta.requires_grad)
    ddpm.Diffusion(beta)  # refuses what is no table of betas
    fit(process["schedule"] in (*SCHEDULES, "table"))
    fit(len(ckpt["classes"]) == (network["num_classes"] or 0))
    fit(all(isinstance(name, str) for name in ckpt["classes"]))
    fit(C == network["in_channels"] and C in (1, 3))
    fit(
        network["out_channels"]
        == {"beta": C, "beta_tilde": C, "learned": 2 * C}[process["variance"]]
    )
    fit(H % factor == W % factor == 0)
    if holds_run(ckpt):
        config, learns = ckpt["config"], process["variance"] == "learned"
        fit(
            isinstance(config["data"], str)
            and isinstance(config["labels"], bool)
            and ckpt["step"] > 0
        )
        fit(config["variance"] == ("learned" if learns else "fixed"))
        fit(config.get("limit") is None or is_whole(config["limit"], 1, 2**31))
        fit(is_whole(ckpt.get("held_out", 0), 0, 2**53))  # older runs held out nothing of a folder


def check_network(network):
    """The same, unless these are arguments of ddpm.UNet, each of its type and of a possible size."""
    whole = dict(
        in_channels=3, out_channels=6, ch=8192, blocks=64, groups=8192
    )  # the largest of each
    fit(network.keys() == {*whole, "mult", "attention", "dropout", "num_classes"})
    fit(all(is_whole(network[name], 1, top) for name, top in whole.items()))
    for name, low, high in (("mult", 1, 64), ("attention", 0, 15)):
        fit(isinstance(network[name], (tuple, list)) and len(network[name]) <= 16)
        fit(all(is_whole(n, low, high) for n in network[name]))
    fit(isinstance(network["dropout"], (int, float)) and 0 <= network["dropout"] < 1)
    fit(network["num_classes"] is None or is_whole(network["num_classes"], 1, 10**6))


def is_whole(n, low, high):
    return type(n) is int and low <= n <= high


def check_optimizer(saved, optimizer):
    """The same, unless `saved` is what this optimiser would hold: in names, shapes, types, layout and
    settings. Its kernels believe what they are given, and would write beyond the end of a short tensor."""
    own, weights = optimizer.state_dict()["param_groups"], optimizer.param_groups[0]["params"]
    fit(saved.keys() == {"state", "param_groups"} and len(saved["param_groups"]) == 1)
    fit(own[0].keys() == saved["param_groups"][0].keys())
    for name, value in saved["param_groups"][0].items():
        fit(type(value) is type(own[0][name]) and (name == "lr" or value == own[0][name]))
    fit(0 <= saved["param_groups"][0]["lr"] < math.inf)
    fit(list(saved["state"]) == list(range(len(weights))))
    for state, weight in zip(saved["state"].values(), weights):
        fit(state.keys() == {"step", "exp_avg", "exp_avg_sq"})
        fit(state["step"].shape == () and state["step"].dtype == torch.float32)
        fit(not any(tensor.requires_grad for tensor in state.values()))
        for average in (state["exp_avg"], state["exp_avg_sq"]):
            fit(average.dtype == weight.dtype and average.layout == weight.layout)
            fit(average.shape == weight.shape and average.stride() == weight.stride())


def check_weights(network, both, size):
    """The same, unless both are weights of the network, and a file of `size` bytes can hold each of them.

    A network that is larger than its file is refused here, before its memory is asked for.
    """
    fewest = 10 * len(network["mult"]) * (2 * network["blocks"] + 1)  # ten or more a block
    fit(all(len(weights) >= fewest for weights in both))
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in ddpm.UNet(**network).state_dict().items()}
    for weights in both:
        fit({name: tensor.shape for name, tensor in weights.items()} == shapes)
        fit(all(t.dtype == torch.float32 and t.layout == torch.strided for t in weights.values()))
        fit(sum(t.nbytes for t in weights.values()) <= size)


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
    except (
        LookupError,
        TypeError,
        ValueError,
        ArithmeticError,
        AttributeError,
        AssertionError,
        RuntimeError,
    ) as error:
        if path is None or out_of_memory(error):
            raise
        raise Failure(f"{path}: its contents do not fit together") from None


def refuse_other_images(name, about, saved):
    """Raises Failure unless the images of the data called `name` are those that the saved run began with.

    about: their shape, classes, number (images) and fingerprint.
    """
    fit(saved["shape"] == about["shape"])
    if saved["classes"] != about["classes"]:
        raise Failure(f"{name}: its classes are not those with which this run began")
    if saved["images"] != about["images"]:
        older = "" if "held_out" in saved else "; it is older than the rule that some are held out"
        raise Failure(
            f"{name}: {about['images']:,} images, but {saved['images']:,} when this run "
            f"began{older}"
        )
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
        d = ddpm.Diffusion(ckpt["process"]["beta"])
    # Its weights keep requires_grad: without it, autocast would round them again at every step.
    return ckpt, net.to(device, memory_format=torch.channels_last).eval(), d


def starting_weights(ckpt, classes):
    """The averaged weights, for a network with these classes: it does at first what the old one did.

    A class keeps its row of the label table by its name. A new one starts as the old "no label", of which a
    network without classes keeps the effect: the embeddings of time and label are added, so that it becomes
    a part of the time's bias. An old network without classes has a row of zeros for it.
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


def title(ckpt, weights):
    """What to call its weights."""
    return f"{weights} weights at step {ckpt['step']}" if ckpt["step"] else "converted weights"


def learned(ckpt):
    """Whether the network gives learned variances beside eps (improved.py)."""
    return ckpt["network"]["out_channels"] > ckpt["shape"][0]

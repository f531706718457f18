"""Networks in files of other programs: diffusers folders, the authors' weights, plain state_dicts.

Every function here returns or expects a checkpoint without a run, as support/checkpoint.py describes
it. Its load() or convert.py checks that the settings and the weights fit together. Settings that
ddpm.py does not support are rejected by name.
"""

import inspect
import json
import pathlib
import pickle
import warnings

import numpy as np
import torch
import torch.nn.functional as F

import ddpm
from support.errors import Failure, UsageError
from support.progress import note

# --- Settings ------------------------------------------------------------------------------------

VERSION = "0.42.1"  # of diffusers: the tests load our folders with it

# These settings are the same for every network and every process of ddpm.py. A file of an older
# version may lack some of them: diffusers' defaults are the same.
NETWORK = json.loads("""{
    "dropout": 0.0, "num_class_embeds": null, "class_embed_type": null, "center_input_sample": false,
    "act_fn": "silu", "add_attention": true, "attn_norm_num_groups": null, "downsample_type": "conv",
    "upsample_type": "conv", "mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1,
    "resnet_time_scale_shift": "default", "time_embedding_dim": null, "time_embedding_type": "positional"
}""")
PROCESS = json.loads("""{
    "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "trained_betas": null,
    "clip_sample": true, "clip_sample_range": 1.0, "variance_type": "fixed_small",
    "prediction_type": "epsilon", "thresholding": false, "rescale_betas_zero_snr": false
}""")
# Settings that change neither network nor process: how unet_ema/ was averaged; how timesteps are chosen.
IGNORED = set(
    "decay min_decay inv_gamma power optimization_step update_after_step use_ema_warmup "
    "dynamic_thresholding_ratio sample_max_value timestep_spacing steps_offset set_alpha_to_one "
    "skip_prk_steps".split()
)
VARIANCES = {
    "fixed_large": "beta",
    "fixed_small_log": "beta_tilde",
    "fixed_small": "beta_tilde",  # we write the later one of two names
    "learned_range": "learned",
}


def model_config(network, H, W):
    """Return the settings of the UNet2DModel that computes what ddpm.UNet(**network) computes."""
    kinds = ["Attn" if i in network["attention"] else "" for i in range(len(network["mult"]))]
    K = network["num_classes"]
    return NETWORK | {
        "sample_size": H if H == W else [H, W],
        "in_channels": network["in_channels"],
        "out_channels": network["out_channels"],
        "block_out_channels": [network["ch"] * m for m in network["mult"]],
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "layers_per_block": network["blocks"],
        "dropout": network["dropout"],
        "norm_num_groups": network["groups"],
        "attention_head_dim": None,  # one head
        "num_class_embeds": K + 1 if K else None,
        "flip_sin_to_cos": False,  # sines come first
        "freq_shift": 1,  # d/2 - 1 in the denominator
        "downsample_padding": 0,  # TensorFlow's SAME
        "norm_eps": 1e-6,
    }


def scheduler_config(process):
    """Return the settings of the DDPMScheduler with this process."""
    named = {"linear": "linear", "cosine": "squaredcos_cap_v2"}.get(process["schedule"])
    beta = process["beta"][1:].tolist()
    return PROCESS | {
        "num_train_timesteps": len(beta),
        "beta_schedule": named or "linear",
        "trained_betas": None if named else beta,
        "variance_type": {ours: theirs for theirs, ours in VARIANCES.items()}[process["variance"]],
        "clip_sample": process["clip"],
    }


def read_settings(path, kinds, defaults):
    """Return the settings in a JSON file, completed by `defaults`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Failure(f"{path}: cannot be read as JSON ({error})") from None
    if found.get("_class_name", kinds[0]) not in kinds:
        reject(path, found, "_class_name", f"supported: {', '.join(kinds)}")
    return defaults | found


def reject(path, settings, name, why):
    value = json.dumps(settings[name])[:60] if name in settings else "missing"
    raise Failure(f"{path}: {name} is {value}; {why}")


def compare(path, found, expected):
    """Raise Failure unless the settings in a file are the expected ones."""
    for name in found | expected:
        if name.startswith("_") or name in IGNORED:
            continue
        if name not in expected:
            reject(path, found, name, "this setting is not supported")
        if name not in found or found[name] != expected[name]:
            reject(path, found, name, f"in ddpm.py it is {json.dumps(expected[name])}")


def read_network(path):
    """Return the arguments of ddpm.UNet, the shape (C, H, W) of its images and its training steps."""
    config = read_settings(path, ["UNet2DModel"], NETWORK)
    channels = config["block_out_channels"]
    embeds = config["num_class_embeds"]
    attention = [i for i, kind in enumerate(config["down_block_types"]) if "Attn" in kind]
    network = dict(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        ch=channels[0],
        mult=tuple(c // channels[0] for c in channels),
        blocks=config["layers_per_block"],
        attention=tuple(attention),
        dropout=float(config["dropout"]),
        groups=config["norm_num_groups"],
        num_classes=embeds - 1 if embeds else None,
    )
    widths = {channels[i] for i in (*attention, -1)}
    if widths == {config.get("attention_head_dim")}:
        config["attention_head_dim"] = None  # heads as wide as the layer: one head
    C = network["in_channels"]
    if C not in (1, 3):
        reject(path, config, "in_channels", "it must be 3, or 1 for grey images")
    sides = config["sample_size"]
    H, W = sides if isinstance(sides, list) else (sides, sides)
    any_value = {"sample_size": sides, "num_train_timesteps": config.get("num_train_timesteps")}
    compare(path, any_value | config, model_config(network, H, W) | any_value)
    return network, (C, H, W), config.get("_step", 0)


def read_process(path):
    """Return the process of a scheduler."""
    config = read_settings(path, ["DDPMScheduler", "DDIMScheduler"], PROCESS)
    kind = config["variance_type"]
    if kind not in VARIANCES:
        reject(path, config, "variance_type", f"supported: {', '.join(VARIANCES)}")
    beta = read_betas(path, config)
    schedule = "table"
    for name in ("linear", "cosine", "exponential"):
        if torch.equal(beta, getattr(ddpm, f"{name}_schedule")(len(beta) - 1)):
            schedule = name
    clip = config["clip_sample"]
    process = dict(beta=beta, schedule=schedule, variance=VARIANCES[kind], clip=clip)
    read = ("beta_schedule", "beta_start", "beta_end", "trained_betas", "variance_type")
    compare(path, config, scheduler_config(process) | {name: config[name] for name in read})
    return process


def read_betas(path, config):
    """Return the table beta[0..T]."""
    T = config.get("num_train_timesteps", 1000)
    kind, first, last = (config[f"beta_{name}"] for name in ("schedule", "start", "end"))
    if config["trained_betas"] is not None:
        return F.pad(torch.tensor(config["trained_betas"], dtype=torch.float64), (1, 0))
    if kind == "linear":
        return ddpm.linear_schedule(T, first, last)
    if kind == "squaredcos_cap_v2":
        return ddpm.cosine_schedule(T)
    if kind == "scaled_linear":
        return ddpm.linear_schedule(T, first**0.5, last**0.5) ** 2
    if kind == "sigmoid":
        rise = torch.linspace(-6, 6, T, dtype=torch.float64).sigmoid()
        return F.pad(first + (last - first) * rise, (1, 0))
    reject(path, config, "beta_schedule", "it is not supported")


# --- Names of the layers -------------------------------------------------------------------------

# The layers of a block: in ddpm.py, in diffusers, in the authors' weights.
RES = [
    "norm1 conv1 emb norm2 conv2 shortcut".split(),
    "norm1 conv1 time_emb_proj norm2 conv2 conv_shortcut".split(),
    "norm1 conv1 temb_proj norm2 conv2 nin_shortcut".split(),
]
ATTENTION = [
    "norm q k v out".split(),
    "group_norm to_q to_k to_v to_out.0".split(),
    "norm q k v proj_out".split(),
]
# diffusers renamed its attention in 2023. The published files are older.
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
CONVOLUTIONS = (".q.weight", ".k.weight", ".v.weight", ".out.weight")  # Linear layers in diffusers
DIFFUSERS, AUTHORS = 1, 2  # columns of the tables above


def layers(network):
    """Yield the names of each layer that such a network can have: ours, diffusers', the authors'.

    Our numbers continue through all levels; theirs begin again at each level. diffusers counts the
    levels of up_blocks from the lowest, the authors count those of up from the highest.
    """
    levels = len(network["mult"])
    blocks = network["blocks"]

    def block(parts, *wholes):
        for row in zip(*parts):
            yield tuple(f"{whole}.{part}" for whole, part in zip(wholes, row))

    def stage(ours, theirs, authors, j):
        yield from block(RES, f"{ours}.0", f"{theirs}.resnets.{j}", f"{authors}.block.{j}")
        yield from block(ATTENTION, f"{ours}.1", f"{theirs}.attentions.{j}", f"{authors}.attn.{j}")

    yield "time.0", "time_embedding.linear_1", "temb.dense.0"
    yield "time.2", "time_embedding.linear_2", "temb.dense.1"
    yield "label", "class_embedding", "label"
    yield ("conv_in",) * 3
    for level in range(levels):
        i, theirs, authors = level * (blocks + 1), f"down_blocks.{level}", f"down.{level}"
        for j in range(blocks):
            yield from stage(f"down.{i + j}", theirs, authors, j)
        yield f"down.{i + blocks}.1", f"{theirs}.downsamplers.0.conv", f"{authors}.downsample.conv"
    yield from block(RES, "mid.0", "mid_block.resnets.0", "mid.block_1")
    yield from block(ATTENTION, "mid.1", "mid_block.attentions.0", "mid.attn_1")
    yield from block(RES, "mid.2", "mid_block.resnets.1", "mid.block_2")
    for rung in range(levels):
        level = levels - 1 - rung
        i, theirs, authors = rung * (blocks + 1), f"up_blocks.{rung}", f"up.{level}"
        for j in range(blocks + 1):
            yield from stage(f"up.{i + j}", theirs, authors, j)
        place = 3 if level in network["attention"] else 2
        upsample = f"up.{i + blocks}.{place}"
        yield upsample, f"{theirs}.upsamplers.0.conv", f"{authors}.upsample.conv"
    yield "norm_out", "conv_norm_out", "norm_out"
    yield ("conv_out",) * 3


def names(network, column):
    """Return {name in ddpm.UNet: name in a column} of each tensor that such a network can have."""
    rows = [(row[0], row[column]) for row in layers(network)]
    return {f"{a}.{kind}": f"{b}.{kind}" for a, b in rows for kind in ("weight", "bias")}


def renamed(path, found, network, column):
    """Return `found`, {name in a column: tensor}, as {name in ddpm.UNet: tensor}."""
    ours = {theirs: name for name, theirs in names(network, column).items()}
    weights = {}
    for theirs, tensor in found.items():
        name = ours.get(".".join(OLD.get(part, part) for part in theirs.split(".")))
        if name is None:
            raise Failure(f"{path}: {theirs} is not a part of the network")
        if name.endswith(CONVOLUTIONS) and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        weights[name] = tensor
    return weights


def shapes(network):
    """Return {name: shape} for every tensor of ddpm.UNet(**network), without memory for its weights."""
    with torch.device("meta"):  # a label table takes a second there
        net = ddpm.UNet(**{**network, "num_classes": None})
    found = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    if network["num_classes"]:
        found["label.weight"] = (network["num_classes"] + 1, 4 * network["ch"])
    return found


# --- Files of weights ----------------------------------------------------------------------------

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FILES = ("safetensors", "safetensors.index.json", "fp16.safetensors", "bin")


def read_weights(path):
    """Return {name: float32 tensor} of a .safetensors file, of its index, or of a file of torch.save."""
    path = pathlib.Path(path)
    if path.suffix == ".json":
        found = {}
        for part in sorted(set(json.loads(path.read_text())["weight_map"].values())):
            found |= read_safetensors(path.parent / part)
        return found
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickled(path)


def read_safetensors(path):
    """Return {name: float32 tensor}: 8 bytes of length, a header in JSON, then the tensors' bytes."""
    raw = np.fromfile(path, np.uint8)
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    try:
        header = json.loads(raw[8:start].tobytes())
    except ValueError:
        raise Failure(f"{path}: damaged: its header cannot be read") from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        if start + last > len(raw):
            raise Failure(f"{path}: damaged: it ends before {name}")
        if entry["dtype"] not in DTYPES:
            raise Failure(f"{path}: {name} has the type {entry['dtype']}, not {', '.join(DTYPES)}")
        data = torch.from_numpy(raw[start + first : start + last].copy())
        tensors[name] = data.view(DTYPES[entry["dtype"]]).reshape(entry["shape"]).float()
    return tensors


def write_safetensors(path, tensors):
    """Write {name: tensor}, of the types in DTYPES, to a new file."""
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        span = [end, end + tensor.nbytes]
        header[name] = dict(dtype=kinds[tensor.dtype], shape=list(tensor.shape), data_offsets=span)
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def read_pickled(path):
    """Return {name: float32 tensor} of a dictionary of tensors that torch.save wrote. No code is run."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise Failure(f"{path}: cannot be read as weights ({reason})") from None
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise Failure(f"{path}: is not a dictionary of tensors; save net.state_dict() alone")
    return {name: tensor.detach().float() for name, tensor in tensors.items()}


# --- Reading -------------------------------------------------------------------------------------


def weights_alone(network, shape, process, weights, classes=(), step=0):
    """Return a checkpoint without a run. Raises UsageError unless all classes are named."""
    K = network["num_classes"] or 0
    if len(classes) != K:
        raise UsageError(
            f"the network has {K} classes, but {len(classes)} are named; name them with convert.py "
            f"--classes or in classes.txt (the last row of class_embedding means no label)"
        )
    return dict(network=network, shape=shape, process=process, classes=list(classes), step=step,
                model=weights, ema=weights)  # fmt: skip


def authors_process(variance):
    """Return the process of the authors' runs (sec. 4), with this variance."""
    return dict(beta=ddpm.linear_schedule(), schedule="linear", variance=variance, clip=True)


def read_folder(folder, classes=()):
    """Read a diffusers folder: all files in one place, or in unet_ema/ or unet/ and in scheduler/.

    classes: the names of the classes, if the folder has no classes.txt.
    """
    folder = pathlib.Path(folder)
    unet = next((p for p in (folder / "unet_ema", folder / "unet") if p.is_dir()), folder)
    if not (unet / "config.json").is_file():
        raise Failure(f"{unet / 'config.json'}: no such file; a diffusers folder contains it")
    network, shape, step = read_network(unet / "config.json")
    learned = network["out_channels"] > shape[0]

    scheduler = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    if (scheduler / "scheduler_config.json").is_file():
        process = read_process(scheduler / "scheduler_config.json")
        whose = "the folder's"
    else:
        process = authors_process("learned" if learned else "beta")
        whose = "without scheduler_config.json, the paper's"

    paths = [unet / f"diffusion_pytorch_model.{suffix}" for suffix in FILES]
    file = next((path for path in paths if path.is_file()), None)
    if file is None:
        raise Failure(f"{unet}: contains no {paths[0].name} (or {', '.join(FILES[1:])})")
    weights = renamed(file, read_weights(file), network, DIFFUSERS)
    if learned:  # diffusers' v is (output + 1) / 2, ours is the output
        weights = rescaled(weights, shape[0], 0.5, 0.5)
    if (folder / "classes.txt").is_file():
        classes = (folder / "classes.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    note(f"read {file}; process: {whose}")
    return weights_alone(network, shape, process, weights, classes, step)


def rescaled(weights, C, scale, shift):
    """Return the weights of a network whose predicted variances v become scale * v + shift."""
    kernel = weights["conv_out.weight"].clone()
    bias = weights["conv_out.bias"].clone()
    kernel[C:] *= scale
    bias[C:] = scale * bias[C:] + shift
    return weights | {"conv_out.weight": kernel, "conv_out.bias": bias}


# The authors' runs, whose weights come without settings: the network, its images, the variance.
CIFAR10 = {name: each.default for name, each in inspect.signature(ddpm.UNet).parameters.items()}
CIFAR10 |= dict(out_channels=3)
LARGE = CIFAR10 | dict(mult=(1, 1, 2, 2, 4, 4), attention=(4,), dropout=0.0)
RUNS = [(CIFAR10, (3, 32, 32), "beta"), (LARGE, (3, 256, 256), "beta_tilde")]


def read_authors(path, found):
    """Return the checkpoint of the authors' weights in PyTorch: for CIFAR-10, or for 256x256 images."""
    for network, shape, variance in RUNS:
        theirs = names(network, AUTHORS)
        if {theirs[name] for name in shapes(network)} == found.keys():
            weights = renamed(path, found, network, AUTHORS)
            return weights_alone(network, shape, authors_process(variance), weights)
    raise Failure(f"{path}: contains neither the authors' weights nor a state_dict of ddpm.UNet")


def is_state_dict(found):
    """Return whether these are the weights of a ddpm.UNet under its own names."""
    return "time.0.weight" in found and "conv_in.weight" in found


def read_state_dict(found, groups, size, process, classes=()):
    """Return the checkpoint of a state_dict of ddpm.UNet, whose network follows from the shapes.

    The shapes do not contain the number of groups, the image size (H, W) and the process.
    """
    ch, C = found["conv_in.weight"].shape[:2]
    stages = 1 + max(int(name.split(".")[1]) for name in found if name.startswith("down."))
    residual = [f"down.{i}.0.conv1.weight" in found for i in range(stages)]
    blocks = [*residual, False].index(False)
    first = range(0, stages, blocks + 1)  # the first stage of each level
    outputs = len(found["conv_out.weight"])
    network = dict(
        in_channels=C,
        out_channels=outputs,
        ch=ch,
        mult=tuple(len(found[f"down.{i}.0.conv1.weight"]) // ch for i in first),
        blocks=blocks,
        attention=tuple(level for level, i in enumerate(first) if f"down.{i}.1.q.weight" in found),
        dropout=0.0,
        groups=groups,
        num_classes=len(found["label.weight"]) - 1 if "label.weight" in found else None,
    )
    process = dict(process, variance="learned" if outputs > C else "beta")
    return weights_alone(network, (C, *size), process, found, classes)


# --- Writing -------------------------------------------------------------------------------------


def write_folder(folder, ckpt, dtype="fp32"):
    """Write the average weights into an empty folder, for read_folder and UNet2DModel.from_pretrained.

    Without classes, DDPMPipeline.from_pretrained reads it too. dtype: "fp32" or "bf16".
    """
    network, (C, H, W), classes = ckpt["network"], ckpt["shape"], ckpt["classes"]
    if network["mult"][0] != 1:
        raise Failure(
            f"mult begins with {network['mult'][0]}, but diffusers' first level is as wide as conv_in"
        )
    weights = ckpt["ema"]
    if network["out_channels"] > C:
        weights = rescaled(weights, C, 2, -1)
    theirs = names(network, DIFFUSERS)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    tensors = {}
    for name, tensor in weights.items():
        linear = name.endswith(CONVOLUTIONS)
        tensors[theirs[name]] = (tensor.flatten(1) if linear else tensor).to(kind)
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors)

    # diffusers ignores names with an underscore.
    config = model_config(network, H, W) | {"_step": ckpt["step"]}
    write_json(folder / "config.json", "UNet2DModel", config)
    write_json(folder / "scheduler_config.json", "DDPMScheduler", scheduler_config(ckpt["process"]))
    if classes:
        (folder / "classes.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")
    else:  # DDPMPipeline passes no labels
        parts = dict(scheduler=["diffusers", "DDPMScheduler"], unet=["diffusers", "UNet2DModel"])
        write_json(folder / "model_index.json", "DDPMPipeline", parts)


def write_json(path, kind, settings):
    settings = {"_class_name": kind, "_diffusers_version": VERSION, **settings}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

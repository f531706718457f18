"""Networks in files of other programs: diffusers folders, the authors' weights, plain state_dicts.

Each function that reads one returns a checkpoint without a run, for support/checkpoint.py to check.
"""

import json
import pathlib
from types import NoneType

import numpy as np
import torch
import torch.nn.functional as F

import ddpm
from support.errors import Failure
from support.progress import note

# --- Settings ------------------------------------------------------------------------------------

# What each network and process of ddpm.py has, unless the functions below replace it. These are
# diffusers' defaults, so files of an older version may lack some of them.
NETWORK = json.loads("""{
    "_class_name": "UNet2DModel", "_diffusers_version": "0.42.1",
    "dropout": 0.0, "num_class_embeds": null, "class_embed_type": null, "center_input_sample": false,
    "act_fn": "silu", "add_attention": true, "attn_norm_num_groups": null, "downsample_type": "conv",
    "upsample_type": "conv", "mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1,
    "resnet_time_scale_shift": "default", "time_embedding_dim": null, "time_embedding_type": "positional"
}""")
PROCESS = json.loads("""{
    "_class_name": "DDPMScheduler", "_diffusers_version": "0.42.1",
    "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "trained_betas": null,
    "clip_sample": true, "clip_sample_range": 1.0, "variance_type": "fixed_small",
    "prediction_type": "epsilon", "thresholding": false, "rescale_betas_zero_snr": false,
    "num_train_timesteps": 1000
}""")
# These change neither network nor process: how unet_ema/ was averaged; how timesteps are chosen.
IGNORED = """decay min_decay inv_gamma power optimization_step update_after_step use_ema_warmup
    dynamic_thresholding_ratio sample_max_value timestep_spacing steps_offset set_alpha_to_one
    skip_prk_steps _diffusers_version _name_or_path _step""".split()
# The types of the settings from which a network and a process are computed.
NUMBER = (int, float)
NETWORK_TYPES = dict(sample_size=(int, list), in_channels=int, out_channels=int, dropout=NUMBER)
NETWORK_TYPES |= dict(block_out_channels=list, layers_per_block=int, down_block_types=list)
NETWORK_TYPES |= dict(norm_num_groups=int, num_class_embeds=(int, NoneType))
PROCESS_TYPES = dict(num_train_timesteps=int, beta_start=NUMBER, beta_end=NUMBER, beta_schedule=str)
PROCESS_TYPES |= dict(trained_betas=(list, NoneType), variance_type=str, clip_sample=bool)
VARIANCES = {"fixed_small_log": "beta_tilde"}  # a second name; we write the others
VARIANCES |= {"fixed_large": "beta", "fixed_small": "beta_tilde", "learned_range": "learned"}


def model_config(network, sample_size):
    """Return the settings of the UNet2DModel that computes what ddpm.UNet(**network) computes."""
    kinds = ["Attn" if i in network["attention"] else "" for i in range(len(network["mult"]))]
    K = network["num_classes"]
    return NETWORK | {
        "sample_size": sample_size,
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
        "beta_schedule": named or "linear",
        "trained_betas": None if named else beta,
        "clip_sample": process["clip"],
        "variance_type": {ours: theirs for theirs, ours in VARIANCES.items()}[process["variance"]],
        "num_train_timesteps": len(beta),
    }


def read_settings(path, defaults, types):
    """Return the settings in a JSON file, completed by `defaults`. Some have these types."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Failure(f"{path}: cannot be read as JSON ({error})") from None
    settings = defaults | found if isinstance(found, dict) else {}
    for name, kind in types.items():
        value = settings.get(name, "missing")
        if not isinstance(value, kind):
            raise Failure(f"{path}: {name} is {json.dumps(value)[:60]}, which is not supported")
    return settings


def compare(path, config, ours, **choices):
    """Raise Failure unless the settings in a file are ours. choices: other supported values."""
    for name in config | ours:
        value = config.get(name, "missing")
        supported = choices.get(name, [ours.get(name, "missing")])
        if value not in supported and name not in IGNORED:
            values = ", ".join(map(json.dumps, supported))[:60]
            raise Failure(f"{path}: {name} is {json.dumps(value)[:60]}; supported: {values}")


def read_network(path):
    """Return the arguments of ddpm.UNet, the shape (C, H, W) of its images and its training steps."""
    config = read_settings(path, NETWORK, NETWORK_TYPES)
    compare(path, config, config, _class_name=["UNet2DModel"])  # others have other settings
    config.pop("num_train_timesteps", None)  # unused
    sides = config["sample_size"]
    size = sides if isinstance(sides, list) else [sides, sides]
    channels = config["block_out_channels"]
    sizes = [*channels, config["layers_per_block"], config["norm_num_groups"]]
    if not channels or not all(type(size) is int and size > 0 for size in sizes):
        names = "block_out_channels, layers_per_block and norm_num_groups"
        raise Failure(f"{path}: {names} must be positive")
    embeds = config["num_class_embeds"]
    attention = [i for i, kind in enumerate(config["down_block_types"]) if "Attn" in kind]
    network = dict(
        in_channels=1 if config["in_channels"] == 1 else 3,  # grey or RGB
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
    one_head = [None, *widths] if len(widths) == 1 else [None]  # a head as wide as the layer
    compare(path, config, model_config(network, sides), attention_head_dim=one_head)
    return network, (network["in_channels"], *size), config.get("_step", 0)


def read_process(path):
    """Return the process of a scheduler."""
    config = read_settings(path, PROCESS, PROCESS_TYPES)
    T = config["num_train_timesteps"]
    first = config["beta_start"]
    last = config["beta_end"]
    if min(T, first, last) <= 0:
        raise Failure(f"{path}: timesteps and betas must be positive")
    given = config["trained_betas"]
    rise = torch.linspace(-6, 6, T, dtype=torch.float64).sigmoid()
    tables = {
        "linear": ddpm.linear_schedule(T, first, last),
        "squaredcos_cap_v2": ddpm.cosine_schedule(T),
        "scaled_linear": ddpm.linear_schedule(T, first**0.5, last**0.5) ** 2,
        "sigmoid": F.pad(first + (last - first) * rise, (1, 0)),
    }
    beta = tables.get(config["beta_schedule"], tables["linear"])
    if given is not None:
        beta = F.pad(torch.tensor(given, dtype=torch.float64), (1, 0))
    schedule = "table"
    for name in ("linear", "cosine", "exponential"):
        if torch.equal(beta, getattr(ddpm, f"{name}_schedule")(len(beta) - 1)):
            schedule = name
    variance = VARIANCES.get(config["variance_type"], "beta")
    process = dict(beta=beta, schedule=schedule, variance=variance, clip=config["clip_sample"])
    classes = ["DDPMScheduler", "DDIMScheduler"]
    compare(path, config, scheduler_config(process), _class_name=classes, variance_type=VARIANCES,
            beta_schedule=tables, beta_start=[first], beta_end=[last], trained_betas=[given])  # fmt: skip
    return process


# --- Names of the layers -------------------------------------------------------------------------

DIFFUSERS = 1  # columns of the table
AUTHORS = 2
# Parts of names in ddpm.py, in diffusers, and in the authors' weights. Other parts are the same.
PARTS = """
time.0       time_embedding.linear_1  temb.dense.0
time.2       time_embedding.linear_2  temb.dense.1
label        class_embedding          label
down         down_blocks              down
mid.0        mid_block.resnets.0      mid.block_1
mid.1        mid_block.attentions.0   mid.attn_1
mid.2        mid_block.resnets.1      mid.block_2
up           up_blocks                up
block        resnets                  block
attn         attentions               attn
downsample   downsamplers.0           downsample
upsample     upsamplers.0             upsample
norm_out     conv_norm_out            norm_out
emb          time_emb_proj            temb_proj
shortcut     conv_shortcut            nin_shortcut
norm         group_norm               norm
q            to_q                     q
k            to_k                     k
v            to_v                     v
out          to_out.0                 proj_out
"""
# diffusers renamed its attention in 2023. The published files are older.
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
CONVOLUTIONS = (".q.weight", ".k.weight", ".v.weight", ".out.weight")  # Linear layers in diffusers


def names(weights, network, column):
    """Return {name in a column: name} of tensors in ddpm.UNet(**network).

    Our numbers continue through all levels; theirs begin again at each level. diffusers counts the
    levels of up_blocks from the lowest, the authors count those of up from the highest.
    """
    found = {}
    for name in weights:
        theirs = f".{name}"
        if name.startswith(("down.", "up.")):
            way, i, place, *rest = name.split(".")
            level, j = divmod(int(i), network["blocks"] + 1)
            if way == "up" and column == AUTHORS:
                level = len(network["mult"]) - 1 - level
            if len(rest) == 1:  # after the last block of a level
                layer = f"{way}sample.conv"
            else:
                layer = f"block.{j}" if place == "0" else f"attn.{j}"
            theirs = f".{way}.{level}.{layer}.{'.'.join(rest)}"
        for row in PARTS.strip().splitlines():
            parts = row.split()
            theirs = theirs.replace(f".{parts[0]}.", f".{parts[column]}.")
        found[theirs[1:]] = name
    return found


def shapes(network):
    """Return {name: shape} for every tensor of ddpm.UNet(**network), without memory for its weights."""
    with torch.device("meta"):
        net = ddpm.UNet(**network | {"num_classes": None})  # a label table takes seconds there
    found = {name: tensor.shape for name, tensor in net.state_dict().items()}
    if network["num_classes"]:
        found["label.weight"] = (network["num_classes"] + 1, 4 * network["ch"])
    return found


# --- Files of weights ----------------------------------------------------------------------------

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_weights(path):
    """Return {name: float32 tensor} of a .safetensors file or a file of torch.save. No code is run."""
    if str(path).endswith(".safetensors"):
        return read_safetensors(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch's unpickler raises any type of error for another file
        kind = type(error).__name__
        raise Failure(f"{path}: cannot be read as weights of torch.save ({kind})") from None
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise Failure(f"{path}: is not a dictionary of tensors; save net.state_dict() alone")
    return {name: tensor.detach().float() for name, tensor in tensors.items()}


def read_safetensors(path):
    """Return {name: float32 tensor}: 8 bytes of length, a header in JSON, then the tensors' bytes."""
    raw = np.fromfile(path, np.uint8)
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    entries = {}
    try:
        header = json.loads(raw[8:start].tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            data = raw[start + first : start + last].copy()
            entries[name] = (str(entry["dtype"]), torch.Size(entry["shape"]), data)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise Failure(f"{path}: damaged: its header cannot be read") from None
    tensors = {}
    for name, (dtype, shape, data) in entries.items():
        if dtype not in DTYPES:
            raise Failure(f"{path}: {name} has the type {dtype}, not {', '.join(DTYPES)}")
        if len(data) != shape.numel() * DTYPES[dtype].itemsize:
            raise Failure(f"{path}: damaged: the size of {name} does not fit its shape")
        tensors[name] = torch.from_numpy(data).view(DTYPES[dtype]).reshape(shape).float()
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


# --- Checkpoints ---------------------------------------------------------------------------------

PAPER = dict(beta=ddpm.linear_schedule(), schedule="linear", variance="beta", clip=True)
# The files of a folder, in order of preference. A sharded network has several of one kind.
FILES = (".safetensors", "-*.safetensors", ".fp16.safetensors", ".bin")


def weights_alone(network, shape, process, weights, classes=(), step=0):
    """Return a checkpoint without a run."""
    about = dict(network=network, shape=shape, process=process, classes=list(classes), step=step)
    return dict(about, model=weights, ema=weights)


def read_folder(folder, classes=()):
    """Read a diffusers folder: all files in one place, or in unet_ema/ or unet/ and in scheduler/.

    classes: the names of the classes, if the folder has no classes.txt.
    """
    folder = pathlib.Path(folder)
    unet = next(p for p in (folder / "unet_ema", folder / "unet", folder) if p.is_dir())
    scheduler = next(p for p in (folder / "scheduler", folder) if p.is_dir())
    network, shape, step = read_network(unet / "config.json")
    learned = network["out_channels"] > shape[0]
    if (scheduler / "scheduler_config.json").is_file():
        process = read_process(scheduler / "scheduler_config.json")
        whose = "the folder's"
    else:
        process = PAPER | dict(variance="learned" if learned else "beta")
        whose = "without scheduler_config.json, the paper's"

    files = [sorted(unet.glob(f"diffusion_pytorch_model{kind}")) for kind in FILES]
    files = next(filter(None, files), [unet / "diffusion_pytorch_model.safetensors"])
    known = shapes(network | dict(groups=1, dropout=0.0))  # check() rejects wrong values of these
    ours = names(known, network, DIFFUSERS)
    weights = {}
    for file in files:
        for theirs, tensor in read_weights(file).items():
            theirs = ".".join(OLD.get(part, part) for part in theirs.split("."))
            name = ours.get(theirs, theirs)
            linear = name.endswith(CONVOLUTIONS) and tensor.ndim == 2
            weights[name] = tensor[:, :, None, None] if linear else tensor
    if learned:  # diffusers' v is (output + 1) / 2, ours is the output
        weights = rescaled(weights, shape[0], 0.5, 0.5)
    if (folder / "classes.txt").is_file():
        try:
            text = (folder / "classes.txt").read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise Failure(f"{folder / 'classes.txt'}: is not text in UTF-8") from None
        classes = text.rstrip("\n").split("\n")
    note(f"read {files[0]}; process: {whose}")
    return weights_alone(network, shape, process, weights, classes, step)


def rescaled(weights, C, scale, shift):
    """Return the weights of a network whose predicted variances v become scale * v + shift."""
    kernel = weights["conv_out.weight"].clone()
    bias = weights["conv_out.bias"].clone()
    kernel[C:] *= scale
    bias[C:] = scale * bias[C:] + shift
    return weights | {"conv_out.weight": kernel, "conv_out.bias": bias}


# The authors' runs, whose weights come without settings: the network, its images, the variance.
CIFAR10 = dict(in_channels=3, out_channels=3, ch=128, mult=(1, 2, 2, 2), blocks=2, attention=(1,),
               dropout=0.1, groups=32, num_classes=None)  # fmt: skip
LARGE = CIFAR10 | dict(mult=(1, 1, 2, 2, 4, 4), attention=(4,), dropout=0.0)
RUNS = [(CIFAR10, (3, 32, 32), "beta"), (LARGE, (3, 256, 256), "beta_tilde")]


def read_authors(path, found):
    """Return the checkpoint of the authors' weights in PyTorch: for CIFAR-10, or for 256x256 images."""
    for network, shape, variance in RUNS:
        ours = names(shapes(network), network, AUTHORS)
        if ours.keys() == found.keys():
            weights = {ours[theirs]: tensor for theirs, tensor in found.items()}
            return weights_alone(network, shape, PAPER | dict(variance=variance), weights)
    raise Failure(f"{path}: contains neither the authors' weights nor a state_dict of ddpm.UNet")


def read_state_dict(found, groups, size, process, classes=()):
    """Return the checkpoint of a state_dict of ddpm.UNet, whose network follows from the shapes.

    The shapes do not contain the number of groups, the image size (H, W) and the process.
    """
    ch, C = found["conv_in.weight"].shape[:2]
    outputs = len(found["conv_out.weight"])
    widths = [len(found.get(f"down.{i}.0.conv1.weight", ())) for i in range(len(found))]
    blocks = widths.index(0)  # the strided convolution to the next level
    first = [i for i in range(0, len(found), blocks + 1) if widths[i]]  # the first of each level
    mult = tuple(widths[i] // ch for i in first)
    attention = tuple(n for n, i in enumerate(first) if f"down.{i}.1.q.weight" in found)
    K = len(found["label.weight"]) - 1 if "label.weight" in found else None
    network = dict(in_channels=C, out_channels=outputs, ch=ch, mult=mult, blocks=blocks)
    network |= dict(attention=attention, dropout=0.0, groups=groups, num_classes=K)
    process = dict(process, variance="learned" if outputs > C else "beta")
    return weights_alone(network, (C, *size), process, found, classes)


def write_folder(folder, ckpt, dtype="fp32"):
    """Write the average weights into an empty folder, for read_folder and UNet2DModel.from_pretrained.

    Without classes, DDPMPipeline.from_pretrained reads it too. dtype: "fp32" or "bf16".
    """
    network = ckpt["network"]
    weights = ckpt["ema"]
    C, H, W = ckpt["shape"]
    if network["mult"][0] != 1:
        raise Failure(f"mult begins with {network['mult'][0]}, which diffusers does not support")
    if network["out_channels"] > C:
        weights = rescaled(weights, C, 2, -1)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    tensors = {}
    for theirs, name in names(weights, network, DIFFUSERS).items():
        tensor = weights[name].to(kind)
        tensors[theirs] = tensor.flatten(1) if name.endswith(CONVOLUTIONS) else tensor
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors)

    config = model_config(network, H if H == W else [H, W])
    write_json(folder / "config.json", config | {"_step": ckpt["step"]})  # diffusers ignores _step
    write_json(folder / "scheduler_config.json", scheduler_config(ckpt["process"]))
    if ckpt["classes"]:
        text = "\n".join(ckpt["classes"]) + "\n"
        (folder / "classes.txt").write_text(text, encoding="utf-8")
    else:  # DDPMPipeline passes no labels
        about = {"_class_name": "DDPMPipeline", "_diffusers_version": NETWORK["_diffusers_version"]}
        parts = dict(scheduler=["diffusers", "DDPMScheduler"], unet=["diffusers", "UNet2DModel"])
        write_json(folder / "model_index.json", about | parts)


def write_json(path, settings):
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

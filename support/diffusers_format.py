"""Networks as others publish them, and as ours: diffusers' folder, and the authors' weights in PyTorch.

What a file holds is a dictionary here, whoever wrote it:

    network    the arguments of ddpm.UNet
    shape      (C, H, W) of its images
    classes    their names, [] if it knows none
    process    beta: the table beta[0..T]; schedule: its name; variance: beta, beta_tilde or learned; clip
    weights    {name in ddpm.UNet: float32 tensor}
    assumed    whether no settings of the process came with it, so that it is the paper's

diffusers' words for them are the settings of its UNet2DModel, in config.json, and of its DDPMScheduler,
in scheduler_config.json. What ddpm.py cannot be is refused by the setting's name.
"""

import json
import os

import torch
import torch.nn.functional as F

import ddpm
from support.errors import Failure, UsageError
from support.weight_files import metadata, shown, weights_in, write_safetensors

# --- Settings ------------------------------------------------------------------------------------

LARGEST_CONFIG = 32 * 2**20  # bytes: a table of a million betas fits
LOWEST = 1e-9  # beta: with less, 1 - alpha_bar_1 has no digits left

# Of the network. FIXED must be these for ddpm.UNet to be it: what a missing one means, and what fits.
FIXED = {
    "center_input_sample": (False, [False]),
    "time_embedding_type": ("positional", ["positional"]),
    "flip_sin_to_cos": (True, [False]),  # sines come first
    "freq_shift": (0, [1]),  # d/2 - 1 in the denominator
    "mid_block_type": ("UNetMidBlock2D", ["UNetMidBlock2D"]),
    "mid_block_scale_factor": (1, [1]),
    "downsample_padding": (1, [0]),  # TensorFlow's SAME
    "downsample_type": ("conv", ["conv"]),
    "upsample_type": ("conv", ["conv"]),
    "act_fn": ("silu", ["silu", "swish"]),
    "norm_eps": (1e-5, [1e-6]),
    "resnet_time_scale_shift": ("default", ["default"]),
    "add_attention": (True, [True]),
    "class_embed_type": (None, [None]),
}
# FREE becomes an argument of ddpm.UNet: what a missing one means.
FREE = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [224, 448, 672, 896],
    "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
    "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    "layers_per_block": 2,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "num_class_embeds": None,
    "time_embedding_dim": None,
    "num_train_timesteps": None,
}
# The same of the process. The last row says how steps are skipped: here, --steps and --grid say that.
PROCESS_FIXED = {
    "prediction_type": ("epsilon", ["epsilon"]),
    "thresholding": (False, [False]),
    "rescale_betas_zero_snr": (False, [False]),
}
PROCESS_FREE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "skip_prk_steps": False,
}
VARIANCES = {
    "fixed_large": "beta",
    "fixed_small": "beta_tilde",
    "fixed_small_log": "beta_tilde",
    "learned_range": "learned",
}


class Settings(dict):
    """The settings in a JSON file, with diffusers' own for the missing ones; they can be insisted on."""

    def __init__(self, path, kinds, fixed, free):
        self.path = path
        super().__init__(
            {name: missing for name, (missing, _) in fixed.items()} | free | read_json(path)
        )
        ok = self.get("_class_name", kinds[0]) in kinds
        self.need("_class_name", ok, f"only {' or '.join(kinds)} can be converted")
        for name in self:
            self.need(
                name, name in fixed or name in free or name.startswith("_"), "it is not known here"
            )
        for name, (_, fit) in fixed.items():
            self.need(name, self[name] in fit, f"in ddpm.py it is {json.dumps(fit[0])}")

    def need(self, name, ok, why):
        if not ok:
            raise Failure(f"{self.path}: {shown(name)} is {shown(json.dumps(self[name]))}; {why}")

    def whole(self, name, low, high):
        ok = type(self[name]) is int and low <= self[name] <= high
        self.need(name, ok, f"it must be a whole number from {low:,} to {high:,}")
        return self[name]

    def real(self, name, low, high):
        ok = type(self[name]) in (int, float) and low <= self[name] <= high
        self.need(name, ok, f"it must be a number from {low:g} to {high:g}")
        return float(self[name])


def read_json(path):
    """The object in a JSON file, whose size is bounded."""
    try:
        if not os.path.isfile(path):  # a pipe may have no writer
            raise ValueError("not an ordinary file")
        if os.path.getsize(path) > LARGEST_CONFIG:
            raise ValueError(f"larger than {LARGEST_CONFIG:,} bytes")
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found
    except (ValueError, RecursionError) as error:
        raise Failure(f"{path}: cannot be read as settings ({shown(str(error))})") from None


def read_network(config, tensors):
    """(arguments of ddpm.UNet, shape of its images), for a file with so many tensors."""
    ch, mult, attention = read_levels(config)
    blocks, groups = (
        config.whole("layers_per_block", 1, 1000),
        config.whole("norm_num_groups", 1, 2**16),
    )
    enough = (
        10 * len(mult) * (2 * blocks + 1) <= tensors
    )  # of a residual block alone, there are ten
    config.need("layers_per_block", enough, f"so many blocks cannot come out of {tensors} tensors")
    config.need(
        "norm_num_groups", all(ch * m % groups == 0 for m in mult), "it must divide all channels"
    )
    heads = {ch * mult[level] for level in (*attention, -1)}
    one = config["attention_head_dim"] is None or [config["attention_head_dim"]] == list(heads)
    config.need("attention_head_dim", one, "in ddpm.py attention has one head, which is null here")
    for name, same in (("attn_norm_num_groups", groups), ("time_embedding_dim", 4 * ch)):
        config.need(name, config[name] in (None, same), f"in ddpm.py it is {same}")
    C = config["in_channels"]
    config.need("in_channels", C in (1, 3), "images here have 3, or 1 if they are grey")
    config.need(
        "out_channels",
        config["out_channels"] in (C, 2 * C),
        f"it must be {C}, or {2 * C} if the variances are learned",
    )
    known = (
        None
        if config["num_class_embeds"] is None
        else config.whole("num_class_embeds", 2, 10**6) - 1
    )
    network = dict(
        in_channels=C,
        out_channels=int(config["out_channels"]),
        ch=ch,
        mult=mult,
        blocks=blocks,
        attention=attention,
        dropout=config.real("dropout", 0, 0.999),
        groups=groups,
        num_classes=known,
    )
    return network, (C, *read_size(config, 2 ** (len(mult) - 1)))


def read_levels(config):
    """(ch, mult, attention) of ddpm.UNet."""
    channels, down, up = (
        config[name] if isinstance(config[name], list) else [None]
        for name in ("block_out_channels", "down_block_types", "up_block_types")
    )
    L, ch = len(channels), channels[0] if channels else None
    ok = 0 < L <= 16 and all(type(c) is int and 4 <= c < 2**16 for c in channels)
    config.need(
        "block_out_channels", ok, "it must be a list of 1 to 16 whole numbers from 4 to 65,535"
    )
    ok = ch % 2 == 0 and all(c % ch == 0 for c in channels)
    config.need(
        "block_out_channels", ok, "in ddpm.py, each is a multiple of the first, which is even"
    )
    attention = tuple(level for level, kind in enumerate(down) if kind == "AttnDownBlock2D")
    kinds = ["Attn" * (level in attention) for level in range(L)]
    ok = down == [f"{kind}DownBlock2D" for kind in kinds]
    config.need("down_block_types", ok, f"it must be {L} of DownBlock2D and AttnDownBlock2D")
    ok = up == [f"{kind}UpBlock2D" for kind in reversed(kinds)]
    config.need("up_block_types", ok, "it must have attention where down_block_types has it")
    return ch, tuple(c // ch for c in channels), attention


def read_size(config, factor):
    """(H, W) of the images."""
    size = config["sample_size"]
    sides = size if isinstance(size, list) else [size, size]
    ok = len(sides) == 2 and all(
        type(n) is int and 0 < n <= 4096 and n % factor == 0 for n in sides
    )
    config.need(
        "sample_size",
        ok,
        f"it must be the side of its images, or [height, width]: multiples of {factor}, up to 4096",
    )
    return sides


def read_process(config, learned):
    """What a scheduler's settings say of the process, for a network whose variances are learned or not."""
    T = config.whole("num_train_timesteps", 1, 10**6)
    schedule, beta = read_schedule(config, T)
    fit = ["learned_range"] if learned else [name for name in VARIANCES if name != "learned_range"]
    config.need(
        "variance_type",
        config["variance_type"] in fit,
        f"for this network, it must be {' or '.join(fit)}",
    )
    config.need("clip_sample", config["clip_sample"] in (True, False), "it must be true or false")
    config.need(
        "clip_sample_range",
        not config["clip_sample"] or config["clip_sample_range"] == 1,
        "in ddpm.py it is 1.0",
    )
    return dict(
        beta=beta,
        schedule=schedule,
        variance=VARIANCES[config["variance_type"]],
        clip=bool(config["clip_sample"]),
    )


def read_schedule(config, T):
    """(name, beta[0..T]) of the schedule: the name that it has in ddpm.py, or "table"."""
    kind, given = config["beta_schedule"], config["trained_betas"]
    ends = [config.real(name, LOWEST, 1 - LOWEST) for name in ("beta_start", "beta_end")]
    if given is not None:
        ok = (
            isinstance(given, list)
            and len(given) == T
            and all(type(b) is float and LOWEST <= b <= 1 - LOWEST for b in given)
        )
        config.need("trained_betas", ok, f"it must be a list of T = {T:,} numbers between 0 and 1")
        return "table", F.pad(torch.tensor(given, dtype=torch.float64), (1, 0))
    if kind == "squaredcos_cap_v2":
        return "cosine", ddpm.cosine_schedule(T)
    if kind == "linear":
        return "linear" if ends == [1e-4, 0.02] else "table", ddpm.linear_schedule(T, *ends)
    if kind == "scaled_linear":
        return "table", ddpm.linear_schedule(T, *(end**0.5 for end in ends)) ** 2
    config.need(
        "beta_schedule",
        kind == "sigmoid",
        "ddpm.py can be linear, scaled_linear, squaredcos_cap_v2, sigmoid or trained_betas",
    )
    beta = ends[0] + (ends[1] - ends[0]) * ddpm.linear_schedule(T, -6, 6).sigmoid()
    return "table", F.pad(beta[1:], (1, 0))


# --- Names of the layers -------------------------------------------------------------------------

RES = [
    ("norm1",) * 3,
    ("conv1",) * 3,
    ("emb", "time_emb_proj", "temb_proj"),
    ("norm2",) * 3,
    ("conv2",) * 3,
    ("shortcut", "conv_shortcut", "nin_shortcut"),
]
ATTENTION = [
    ("norm", "group_norm", "norm"),
    ("q", "to_q", "q"),
    ("k", "to_k", "k"),
    ("v", "to_v", "v"),
    ("out", "to_out.0", "proj_out"),
]
# diffusers renamed its attention in 2023; the published files are older.
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def layers(levels, blocks):
    """(in ddpm.UNet, in diffusers, in the authors' weights): each layer that such a network may have.

    The numbers of ours run on through down and up; theirs begin again at each level. diffusers counts
    the levels of up_blocks from the lowest, the authors those of up from the highest.
    """

    def block(parts, *wholes):
        return [tuple(f"{whole}.{part}" for whole, part in zip(wholes, names)) for names in parts]

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
        i, theirs, authors = rung * (blocks + 1), f"up_blocks.{rung}", f"up.{levels - 1 - rung}"
        for j in range(blocks + 1):
            yield from stage(f"up.{i + j}", theirs, authors, j)
        for place in (2, 3):  # without and with attention before it
            yield (
                f"up.{i + blocks}.{place}",
                f"{theirs}.upsamplers.0.conv",
                f"{authors}.upsample.conv",
            )
    yield "norm_out", "conv_norm_out", "norm_out"
    yield ("conv_out",) * 3


DIFFUSERS, AUTHORS = 1, 2  # columns of `layers`


def names(network, column):
    """{name in ddpm.UNet: (theirs, our shape)} of every tensor of a network, which is not built."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in ddpm.UNet(**network).state_dict().items()}
    listed = {
        f"{row[0]}.{kind}": f"{row[column]}.{kind}"
        for kind in ("weight", "bias")
        for row in layers(len(network["mult"]), network["blocks"])
    }
    return {name: (listed[name], tuple(shape)) for name, shape in shapes.items()}


def matched(path, found, network, column):
    """{name in ddpm.UNet: tensor} out of {their name: Weight}: all of them, nothing else, all finite."""
    current = {".".join(OLD.get(part, part) for part in name.split(".")): name for name in found}
    wanted = names(network, column)
    for theirs, shape in wanted.values():
        if theirs not in current:
            raise Failure(f"{path}: {theirs} is missing, and the network needs it")
        has = found[current[theirs]].shape
        if shape not in (has, (*has, 1, 1)):  # a Linear is a 1x1 convolution
            raise Failure(
                f"{path}: {shown(current[theirs])} is {shown(str(list(has)))}, and the network "
                f"needs {list(shape)}"
            )
    extra = found.keys() - {current[theirs] for theirs, _ in wanted.values()}
    if extra:
        raise Failure(f"{path}: {shown(min(extra))} is not a part of the network")
    weights = {}
    for name, (theirs, shape) in wanted.items():
        weights[name] = found[current[theirs]].read().reshape(shape)
        if not weights[name].isfinite().all():
            raise Failure(f"{path}: {shown(current[theirs])} holds numbers that are not finite")
    return weights


# --- Reading -------------------------------------------------------------------------------------


def read_folder(folder, class_names=None):
    """What a folder in diffusers' layout holds: all in one place, or in unet/ and scheduler/.

    class_names: of a labelled network whose file does not tell them.
    """

    def inside(name, file):
        nested = os.path.join(folder, name, file)
        return nested if os.path.lexists(nested) else os.path.join(folder, file)

    path = inside("unet", "config.json")
    if not os.path.lexists(path):
        raise Failure(f"{path}: no such file; a folder in diffusers' layout has it")
    config = Settings(path, ["UNet2DModel"], FIXED, FREE)
    safe, pickled = (
        os.path.join(os.path.dirname(path), f"diffusion_pytorch_model.{kind}")
        for kind in ("safetensors", "bin")
    )
    file = pickled if os.path.isfile(pickled) and not os.path.isfile(safe) else safe
    found = weights_in(file)
    network, shape = read_network(config, len(found))
    learned = network["out_channels"] > shape[0]
    scheduler = inside("scheduler", "scheduler_config.json")
    process, assumed = (
        authors_process("learned" if learned else "beta"),
        not os.path.lexists(scheduler),
    )
    if not assumed:
        kinds = ["DDPMScheduler", "DDIMScheduler"]
        process = read_process(Settings(scheduler, kinds, PROCESS_FIXED, PROCESS_FREE), learned)
    weights = matched(file, found, network, DIFFUSERS)
    classes = read_classes(file, network["num_classes"], class_names)
    if learned:  # diffusers' v is (output + 1) / 2, ours is the output
        weights["conv_out.weight"][shape[0] :] /= 2
        weights["conv_out.bias"][shape[0] :].add_(1).div_(2)
    return dict(
        network=network,
        shape=shape,
        classes=classes,
        process=process,
        weights=weights,
        assumed=assumed,
    )


def read_classes(file, K, class_names):
    """The names of the K classes, which our files carry and others do not. The last row means "no label"."""
    carried = metadata(file).get("classes") if file.endswith(".safetensors") else None
    try:
        classes = json.loads(carried) if carried else class_names or []
    except (ValueError, TypeError, RecursionError):
        classes = None
    if not isinstance(classes, list) or not all(isinstance(name, str) and name for name in classes):
        raise Failure(f"{file}: the names of its classes cannot be read")
    if len(set(classes)) < len(classes):
        raise UsageError("--classes: a name stands there twice")
    if len(classes) != (K or 0):
        raise UsageError(
            f"--classes: {len(classes)} names, but the network has {K or 0} classes (rows of "
            f'its class_embedding, of which the last must be "no label")'
        )
    return classes


def authors_process(variance):
    """Sec. 4 and the authors' code: the process of their runs, of this variance."""
    return dict(beta=ddpm.linear_schedule(), schedule="linear", variance=variance, clip=True)


# The authors' runs, whose weights come without settings: the network, its images, the variance.
CIFAR10 = dict(
    in_channels=3,
    out_channels=3,
    ch=128,
    mult=(1, 2, 2, 2),
    blocks=2,
    attention=(1,),
    dropout=0.1,
    groups=32,
    num_classes=None,
)
LARGE = CIFAR10 | dict(mult=(1, 1, 2, 2, 4, 4), attention=(4,), dropout=0.0)
RUNS = [(CIFAR10, (3, 32, 32), "beta"), (LARGE, (3, 256, 256), "beta_tilde")]


def read_authors(path):
    """What a file of the authors' weights in PyTorch holds: their CIFAR-10 run or one at 256x256."""
    found = weights_in(path)
    for network, shape, variance in RUNS:
        if {theirs for theirs, _ in names(network, AUTHORS).values()} == found.keys():
            weights = matched(path, found, network, AUTHORS)
            return dict(
                network=network,
                shape=shape,
                classes=[],
                process=authors_process(variance),
                weights=weights,
                assumed=False,
            )
    raise Failure(
        f"{path}: these are not the weights of the authors' network for CIFAR-10 or for 256x256"
    )


# --- Writing -------------------------------------------------------------------------------------


def write_folder(folder, held):
    """Writes into an empty folder what read_folder reads, and diffusers too: UNet2DModel.from_pretrained,
    and, unless it has classes, DDPMPipeline.from_pretrained."""
    network, (C, H, W), process = held["network"], held["shape"], held["process"]
    if network["mult"][0] != 1:
        raise Failure(
            f"mult begins with {network['mult'][0]}: in diffusers, the first level is as wide as "
            f"conv_in"
        )
    weights = dict(held["weights"])
    if network["out_channels"] > C:
        for name, shift in (("conv_out.weight", 0), ("conv_out.bias", 1)):
            eps, v = weights[name].split(C)
            weights[name] = torch.cat([eps, 2 * v - shift])
    tensors = {}
    for name, (theirs, _) in names(network, DIFFUSERS).items():
        attention = ".attentions." in theirs and weights[name].ndim == 4
        tensors[theirs] = weights[name].flatten(1) if attention else weights[name]
    files = {
        "config.json": model_config(network, H, W),
        "scheduler_config.json": scheduler_config(process),
    }
    if not held["classes"]:  # DDPMPipeline hands on no labels
        files["model_index.json"] = {
            "_class_name": "DDPMPipeline",
            "_diffusers_version": VERSION,
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        }
    for name, settings in files.items():
        with open(os.path.join(folder, name), "x") as file:
            json.dump(settings, file, indent=2)
    about = {"classes": json.dumps(held["classes"])} if held["classes"] else {}
    with open(os.path.join(folder, "diffusion_pytorch_model.safetensors"), "xb") as file:
        write_safetensors(file, tensors, about)


VERSION = "0.42.1"  # of diffusers, with which what is written here was loaded


def model_config(network, H, W):
    """A network as the settings of UNet2DModel."""
    L, attention, K = len(network["mult"]), network["attention"], network["num_classes"]
    kinds = ["Attn" * (level in attention) for level in range(L)]
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": VERSION,
        **{name: fit[0] for name, (_, fit) in FIXED.items()},
        "sample_size": H if H == W else [H, W],
        "in_channels": network["in_channels"],
        "out_channels": network["out_channels"],
        "block_out_channels": [network["ch"] * m for m in network["mult"]],
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "layers_per_block": network["blocks"],
        "dropout": network["dropout"],
        "attention_head_dim": None,
        "norm_num_groups": network["groups"],
        "num_class_embeds": K and K + 1,
    }


def scheduler_config(process):
    """A process as the settings of DDPMScheduler."""
    named = {"linear": "linear", "cosine": "squaredcos_cap_v2"}.get(process["schedule"])
    beta = process["beta"][1:].tolist()
    theirs = {ours: name for name, ours in reversed(VARIANCES.items())}
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": VERSION,
        **{name: fit[0] for name, (_, fit) in PROCESS_FIXED.items()},
        "num_train_timesteps": len(beta),
        "beta_schedule": named or "linear",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "trained_betas": None if named else beta,
        "variance_type": theirs[process["variance"]],
        "clip_sample": process["clip"],
    }

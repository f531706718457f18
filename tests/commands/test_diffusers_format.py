"""support/diffusers_format.py: networks in the files of other programs. convert.py is in test_convert.py.

tests/peers/compare_diffusers.py compares with diffusers itself, in an environment of its own, and has
written tests/fixtures/diffusers: a network, its outputs and its samples.
"""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from checks import close
from running import ROOT, equal

import ddpm
from support import checkpoint, diffusers_format
from support.diffusers_format import (
    read_folder,
    read_state_dict,
    read_weights,
    write_folder,
    write_safetensors,
)
from support.errors import Failure

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
NETWORK = dict(in_channels=3, out_channels=3, ch=8, mult=(1, 2), blocks=1, attention=(1,), dropout=0.1,
               groups=4, num_classes=None)  # fmt: skip


@pytest.fixture
def theirs(tmp_path):
    """A folder that diffusers wrote: a network of two levels, 8x8 images, 20 timesteps, fixed_large."""
    return shutil.copytree(ROOT / "tests" / "fixtures" / "diffusers", tmp_path / "theirs")


def change(folder, file, **settings):
    """Change settings in a folder's JSON file. The value `...` removes a setting."""
    found = json.loads((folder / file).read_text()) | settings
    (folder / file).write_text(json.dumps({k: v for k, v in found.items() if v is not ...}))


def replace_weights(path, tensors):
    path.unlink(missing_ok=True)
    write_safetensors(path, tensors)


def network_of(held):
    """The network and the diffusion of a dictionary."""
    net = ddpm.UNet(**held["network"])
    net.load_state_dict(held["ema"])
    return net.eval(), ddpm.Diffusion(held["process"]["beta"])


def holding(network=NETWORK, shape=(3, 8, 8), classes=(), schedule="cosine", **process):
    """A checkpoint, as read_folder() returns it, with random weights everywhere."""
    network = NETWORK | network
    torch.manual_seed(0)
    weights = {name: torch.randn_like(w) for name, w in ddpm.UNet(**network).state_dict().items()}
    beta = getattr(ddpm, f"{schedule}_schedule")(20)
    process = dict(beta=beta, schedule=schedule, variance="beta", clip=True) | process
    return dict(network=network, shape=shape, classes=list(classes), process=process,
                model=weights, ema=weights, step=123)  # fmt: skip


def written(tmp_path, held, dtype="fp32"):
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "out", held, dtype)
    return tmp_path / "out"


# --- What diffusers computes ---------------------------------------------------------------------


def test_a_network_predicts_what_it_predicts_in_diffusers_at_every_timestep(theirs):
    net, _ = network_of(read_folder(theirs))
    saved = np.load(theirs / "outputs.npz")
    x = torch.from_numpy(saved["x"])
    with torch.no_grad():
        eps = torch.stack([net(x, torch.full((len(x),), t)) for t in range(1, 21)])
    close("eps", eps.numpy(), saved["eps"], 1e-5, 1.0)  # float32, tens of layers


def test_a_network_samples_what_it_samples_in_diffusers(theirs):
    """Schedule, variance and clipping come from the folder; the noise from the same generator."""
    held = read_folder(theirs)
    net, d = network_of(held)
    generator = torch.Generator().manual_seed(0)

    def noise(x):
        return torch.randn(x.shape, generator=generator)

    sigma2 = getattr(d, held["process"]["variance"])
    xT = noise(torch.empty(4, 3, 8, 8))
    x0 = ddpm.sample_ancestral(net, d, xT, sigma2, clip=held["process"]["clip"], noise=noise)
    # 1e-5 for each of 20 timesteps
    close("x0", x0.numpy(), np.load(theirs / "outputs.npz")["x0"], 1e-4, 1.0)


@pytest.mark.parametrize(
    "settings, name, beta",
    [
        (dict(beta_schedule="linear", beta_end=0.02), "linear", np.linspace(1e-4, 0.02, 20)),
        (dict(beta_schedule="linear"), "table", np.linspace(1e-4, 0.3, 20)),
        (dict(beta_schedule="squaredcos_cap_v2"), "cosine", ddpm.cosine_schedule(20)[1:].numpy()),
        (dict(beta_schedule="scaled_linear"), "table", np.linspace(1e-2, 0.3**0.5, 20) ** 2),
        (dict(trained_betas=[0.01, 0.5], num_train_timesteps=2), "table", np.array([0.01, 0.5])),
        (dict(trained_betas=ddpm.exponential_schedule(20)[1:].tolist()), "exponential",
         ddpm.exponential_schedule(20)[1:].numpy()),
    ],
    ids=["paper's", "linear", "cosine", "scaled", "given", "exponential"],
)  # fmt: skip
def test_schedules_are_those_of_diffusers(theirs, settings, name, beta):
    change(theirs, "scheduler/scheduler_config.json", **settings)
    process = read_folder(theirs)["process"]
    close("beta", process["beta"][1:].numpy(), beta, 1e-12, 1.0)
    assert process["schedule"] == name


@pytest.mark.parametrize("kind, variance", [("fixed_large", "beta"), ("fixed_small", "beta_tilde"),
                                            ("fixed_small_log", "beta_tilde")])  # fmt: skip
@pytest.mark.parametrize("clip", [True, False])
def test_variance_and_clipping_come_from_the_folder(theirs, kind, variance, clip):
    change(theirs, "scheduler/scheduler_config.json", variance_type=kind, clip_sample=clip)
    process = read_folder(theirs)["process"]
    assert (process["variance"], process["clip"]) == (variance, clip)


def test_learned_variances_are_rescaled(tmp_path):
    """diffusers' v is (output + 1) / 2, and ours is the output: its last layer gives 2 v - 1."""
    held = holding(dict(out_channels=6), variance="learned")
    folder = written(tmp_path, held)
    there, ours = read_weights(folder / WEIGHTS.split("/")[1]), held["ema"]
    features = torch.randn(2, 8, 4, 4)
    out = torch.nn.functional.conv2d(features, there["conv_out.weight"], there["conv_out.bias"])
    own = torch.nn.functional.conv2d(features, ours["conv_out.weight"], ours["conv_out.bias"])
    close("eps", out[:, :3].numpy(), own[:, :3].numpy(), 1e-5, 1.0)
    close("v", (out[:, 3:].numpy() + 1) / 2, own[:, 3:].numpy(), 1e-5, 1.0)
    back = read_folder(folder)
    assert torch.equal(back["ema"]["conv_out.weight"], ours["conv_out.weight"])
    bias = back["ema"]["conv_out.bias"].numpy()
    close("v's bias", bias, ours["conv_out.bias"].numpy(), 1e-6, 1.0)
    assert back["process"]["variance"] == "learned"


# --- Layouts and formats -------------------------------------------------------------------------


def old_names(tensors):
    """The names that diffusers gave to its attention before 2023."""
    for old, new in diffusers_format.OLD.items():
        tensors = {key.replace(f".{new}.", f".{old}."): tensor for key, tensor in tensors.items()}
    return tensors


def convolutions(tensors):
    """Linear layers of attention as 1x1 convolutions."""
    linear = [key for key, tensor in tensors.items() if ".attentions." in key and tensor.ndim == 2]
    return tensors | {key: tensors[key][:, :, None, None] for key in linear}


def repacked(theirs, kind, tensors):
    """Replace the weights in a folder by the same tensors in another format."""
    path = theirs / WEIGHTS
    path.unlink()
    if kind == "fp16":
        write_safetensors(path.with_suffix(".fp16.safetensors"), tensors)
    elif kind == "sharded":
        files = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for i, file in enumerate(files):
            write_safetensors(path.with_name(file), dict(list(tensors.items())[i::2]))
        where = {name: files[i % 2] for i, name in enumerate(tensors)}
        path.with_suffix(".safetensors.index.json").write_text(json.dumps(dict(weight_map=where)))
    else:
        archive = kind == "bin"
        torch.save(tensors, path.with_suffix(".bin"), _use_new_zipfile_serialization=archive)


@pytest.mark.parametrize("change_names", [old_names, convolutions, lambda both: old_names(convolutions(both))],
                         ids=["old names", "convolutions", "both"])  # fmt: skip
def test_both_generations_of_attention_are_the_same_network(theirs, change_names):
    want, tensors = read_folder(theirs), read_weights(theirs / WEIGHTS)
    changed = change_names(tensors)
    assert [*changed] != [*tensors] or any(changed[k].ndim > tensors[k].ndim for k in tensors)
    replace_weights(theirs / WEIGHTS, changed)
    assert equal(read_folder(theirs), want)


@pytest.mark.parametrize("kind", ["fp16", "sharded", "bin", "bin before PyTorch 1.6"])
def test_all_formats_contain_the_same_network(theirs, kind, capsys):
    """Half precision is widened, and the printed name of the file shows that it was used."""
    tensors = read_weights(theirs / WEIGHTS)
    if kind == "fp16":
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
    replace_weights(theirs / WEIGHTS, {name: tensor.float() for name, tensor in tensors.items()})
    want = read_folder(theirs)
    repacked(theirs, kind, tensors)
    capsys.readouterr()
    assert equal(read_folder(theirs), want)
    assert (".fp16." in capsys.readouterr().err) == (kind == "fp16")


def test_settings_may_lie_next_to_the_weights(theirs, tmp_path):
    want = read_folder(theirs)
    flat = shutil.copytree(theirs / "unet", tmp_path / "flat")
    shutil.copy(theirs / "scheduler" / "scheduler_config.json", flat)
    assert equal(read_folder(flat), want)


def test_without_a_scheduler_the_papers_process_is_assumed_and_the_user_is_told(theirs, capsys):
    shutil.rmtree(theirs / "scheduler")
    held = read_folder(theirs)
    assert torch.equal(held["process"]["beta"], ddpm.linear_schedule())
    assert held["process"]["variance"] == "beta" and "the paper's" in capsys.readouterr().err


def test_the_average_weights_of_diffusers_trainer_are_preferred(theirs, capsys):
    """unet_ema/ has more settings, which describe how it was averaged."""
    average = {name: tensor + 1 for name, tensor in read_weights(theirs / WEIGHTS).items()}
    last = read_folder(theirs)
    shutil.copytree(theirs / "unet", theirs / "unet_ema")
    replace_weights(theirs / WEIGHTS.replace("unet", "unet_ema"), average)
    settings = dict(decay=0.9999, inv_gamma=1.0, min_decay=0.0, optimization_step=500, power=0.75,
                    update_after_step=0, use_ema_warmup=True)  # fmt: skip
    change(theirs, "unet_ema/config.json", **settings)
    held = read_folder(theirs)
    assert torch.equal(held["ema"]["conv_in.bias"], last["ema"]["conv_in.bias"] + 1)
    assert "unet_ema" in capsys.readouterr().err


# --- Our own folders -----------------------------------------------------------------------------

KINDS_OF_NETWORK = {
    "plain": holding(),
    "grey, not square, one level": holding(dict(in_channels=1, out_channels=1, mult=(1,), attention=()),
                                           shape=(1, 6, 10)),
    "classes": holding(dict(num_classes=3), classes=["Café au lait", "a, b", " spaces "]),
    "exponential, beta_tilde, not clipped": holding(schedule="exponential", variance="beta_tilde", clip=False),
    "deep": holding(dict(mult=(1, 2, 1), blocks=2, attention=(0, 2)), schedule="linear"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS_OF_NETWORK)
def test_a_folder_that_we_write_is_read_back_bit_for_bit(tmp_path, kind):
    """Network, process, classes and step too, so that other commands can use the folder directly."""
    held = KINDS_OF_NETWORK[kind]
    assert equal(read_folder(written(tmp_path, held)), held)


def test_bf16_folders_contain_rounded_weights(tmp_path):
    held = holding()
    folder = written(tmp_path, held, "bf16")
    back = read_folder(folder)["ema"]
    for name, weight in held["ema"].items():
        assert torch.equal(back[name], weight.bfloat16().float())
    header = (folder / "diffusion_pytorch_model.safetensors").stat().st_size
    assert header < 2 * sum(weight.numel() for weight in held["ema"].values()) + 20_000


ALSO_WRITTEN = ("num_train_timesteps dynamic_thresholding_ratio sample_max_value steps_offset "
                "timestep_spacing").split()  # fmt: skip


def test_what_diffusers_wrote_is_written_again_as_it_was(theirs, tmp_path):
    """The same tensor names, shapes and values, and the same settings."""
    folder = written(tmp_path, read_folder(theirs))
    want = read_weights(theirs / WEIGHTS)
    assert equal(read_weights(folder / "diffusion_pytorch_model.safetensors"), want)
    for file in ("unet/config.json", "scheduler/scheduler_config.json"):
        ours = json.loads((folder / file.split("/")[1]).read_text())
        for name, value in json.loads((theirs / file).read_text()).items():
            if name not in {"beta_end", "trained_betas"} | set(ALSO_WRITTEN):
                assert ours[name] == value, name
    assert ours["trained_betas"] == ddpm.linear_schedule(20, 1e-4, 0.3)[1:].tolist()


def test_a_first_level_wider_than_the_first_layer_does_not_exist_in_diffusers(tmp_path):
    with pytest.raises(Failure, match="mult begins with 2"):
        written(tmp_path, holding(dict(mult=(2, 2))))


def test_classes_of_other_folders_are_named_by_the_user(tmp_path):
    """classes.txt replaces the names on the command line."""
    folder = written(tmp_path, holding(dict(num_classes=2), classes=["cat", "dog"]))
    assert read_folder(folder, ["x", "y"])["classes"] == ["cat", "dog"]
    (folder / "classes.txt").unlink()
    assert read_folder(folder, ["x", "y"])["classes"] == ["x", "y"]
    for names in ((), ["x", "y", "z"]):
        with pytest.raises(Failure, match=r"--classes or classes.txt must name 2"):
            checkpoint.check("folder", read_folder(folder, names))


# --- The authors' weights, and state_dicts -------------------------------------------------------


def test_the_authors_weights_are_recognised_by_their_names_and_shapes(monkeypatch):
    """Two small networks replace theirs. Levels are counted from the highest."""
    small = diffusers_format.CIFAR10 | dict(ch=8, groups=4)
    large = diffusers_format.LARGE | dict(ch=8, groups=4)
    runs = [(small, (3, 32, 32), "beta"), (large, (3, 256, 256), "beta_tilde")]
    monkeypatch.setattr(diffusers_format, "RUNS", runs)
    for network, shape, variance in runs:
        weights = ddpm.UNet(**network).state_dict()
        names = diffusers_format.names(weights, network, diffusers_format.AUTHORS)
        tensors = {theirs: weights[name] for theirs, name in names.items()}
        lowest = len(network["mult"]) - 1
        assert len(tensors[f"up.{lowest}.block.0.conv1.bias"]) == 8 * network["mult"][lowest]
        for name in ("up.0.block.2.nin_shortcut.weight", "mid.attn_1.proj_out.bias", "temb.dense.1.bias",
                     "down.0.downsample.conv.bias", f"up.{lowest}.upsample.conv.bias"):  # fmt: skip
            assert name in tensors
        assert "up.0.upsample.conv.bias" not in tensors
        held = diffusers_format.read_authors("a.ckpt", tensors)
        assert equal(held["ema"], dict(weights)) and held["shape"] == shape
        assert held["process"]["variance"] == variance
        assert torch.equal(held["process"]["beta"], ddpm.linear_schedule())
    tensors.pop("conv_out.bias")
    with pytest.raises(Failure, match="contains neither the authors' weights"):
        diffusers_format.read_authors("a.ckpt", tensors)


def state_dict(network, groups=4, size=(8, 16), classes=()):
    weights = dict(ddpm.UNet(**network).state_dict())
    process = dict(beta=ddpm.cosine_schedule(20), schedule="cosine", clip=True)
    held = read_state_dict(weights, groups, size, process, classes)
    checkpoint.check("w.pt", held)
    return weights, held


@pytest.mark.parametrize("network", [
    NETWORK, NETWORK | dict(mult=(1, 2, 3), blocks=2, attention=(0, 2)), NETWORK | dict(mult=(2,), attention=()),
    NETWORK | dict(mult=(2, 1, 1, 1), blocks=3, attention=(3,)), NETWORK | dict(in_channels=1, out_channels=2),
    NETWORK | dict(num_classes=3),
], ids=["two levels", "three", "one", "four", "grey, learned", "classes"])  # fmt: skip
def test_the_shapes_of_a_state_dict_determine_its_network(network):
    classes = ["a", "b", "c"][: network["num_classes"] or 0]
    weights, held = state_dict(network, classes=classes)
    assert held["network"] == network | dict(dropout=0.0) and equal(held["ema"], weights)
    assert held["shape"] == (network["in_channels"], 8, 16) and held["classes"] == classes
    learned = network["out_channels"] > network["in_channels"]
    assert held["process"]["variance"] == ("learned" if learned else "beta")
    assert torch.equal(held["process"]["beta"], ddpm.cosine_schedule(20))


def test_a_state_dict_with_impossible_flags_is_rejected():
    for flags, words in ((dict(groups=3), "must be divisible by num_groups"),
                         (dict(size=(8, 9)), "field: shape"),
                         (dict(classes=["a"]), "classes.txt must name 0")):  # fmt: skip
        with pytest.raises(Failure, match=words):
            state_dict(NETWORK, **flags)


# --- Networks and processes that ddpm.py does not have -------------------------------------------


def rejected(folder, *words):
    with pytest.raises(Failure) as error:
        checkpoint.load(folder)
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message, message


@pytest.mark.parametrize(
    "name, value",
    dict(
        act_fn="gelu", add_attention=False, attention_head_dim=8, attn_norm_num_groups=2,
        block_out_channels=[8, 12], center_input_sample=True, class_embed_type="timestep",
        down_block_types=["DownBlock2D", "ResnetDownsampleBlock2D"], downsample_padding=1,
        downsample_type="resnet", flip_sin_to_cos=True, freq_shift=0, in_channels=4,
        mid_block_scale_factor=2, mid_block_type=None, norm_eps=1e-5,
        resnet_time_scale_shift="scale_shift",
        time_embedding_dim=64, time_embedding_type="fourier", up_block_types=["UpBlock2D", "AttnUpBlock2D"],
        upsample_type="resnet", _class_name="UNet2DConditionModel", a_new_setting=1,
    ).items(),
)  # fmt: skip
def test_a_network_that_ddpm_py_lacks_is_rejected_by_the_settings_name(theirs, name, value):
    change(theirs, "unet/config.json", **{name: value})
    rejected(theirs, "config.json", f"{name} is {json.dumps(value)}")


@pytest.mark.parametrize("settings, words", [
    (dict(dropout=1.5), "dropout"), (dict(norm_num_groups=3), "num_groups"), (dict(sample_size=9), "shape"),
    (dict(sample_size=None), "sample_size is null"), (dict(out_channels=4), "process.variance"),
    (dict(layers_per_block=2), "model"), (dict(attention_head_dim=...), "attention_head_dim is \"missing\""),
], ids=str)  # fmt: skip
def test_sizes_that_do_not_fit_are_rejected(theirs, settings, words):
    change(theirs, "unet/config.json", **settings)
    rejected(theirs, words)


@pytest.mark.parametrize("name, value", [
    ("out_channels", None), ("block_out_channels", []), ("block_out_channels", [0, 0]), ("in_channels", ...),
    ("layers_per_block", "2"), ("norm_num_groups", 0), ("dropout", "x"), ("num_class_embeds", "x"),
], ids=str)  # fmt: skip
def test_a_size_of_another_type_or_without_a_value_is_rejected_by_its_name(theirs, name, value):
    change(theirs, "unet/config.json", **{name: value})
    rejected(theirs, name)


@pytest.mark.parametrize("name, value", [
    ("num_train_timesteps", -1), ("beta_start", None), ("beta_start", -0.1), ("trained_betas", 0.1),
    ("beta_schedule", []), ("variance_type", []), ("clip_sample", "yes"),
], ids=str)  # fmt: skip
def test_a_process_of_other_types_is_rejected(theirs, name, value):
    change(theirs, "scheduler/scheduler_config.json", **{name: value})
    rejected(theirs, "scheduler_config.json: ")


def test_settings_that_are_not_a_dictionary_are_rejected(theirs):
    (theirs / "unet" / "config.json").write_text("[]")
    rejected(theirs, "config.json: sample_size is")


def test_settings_that_older_versions_lack_have_the_same_default(theirs):
    want = read_folder(theirs)
    names = "dropout num_class_embeds add_attention attn_norm_num_groups upsample_type".split()
    change(theirs, "unet/config.json", **dict.fromkeys(names, ...))
    change(theirs, "scheduler/scheduler_config.json", rescale_betas_zero_snr=..., thresholding=...)
    assert equal(read_folder(theirs), want)


@pytest.mark.parametrize(
    "name, value",
    dict(
        prediction_type="v_prediction", thresholding=True, rescale_betas_zero_snr=True, clip_sample_range=2.0,
        variance_type="fixed_large_log", beta_schedule="laplace", _class_name="ScoreSdeVeScheduler", sigma_min=0.01,
    ).items(),
)  # fmt: skip
def test_a_process_that_ddpm_py_lacks_is_rejected_by_the_settings_name(theirs, name, value):
    change(theirs, "scheduler/scheduler_config.json", **{name: value})
    rejected(theirs, "scheduler_config.json", f"{name} is {json.dumps(value)}")


@pytest.mark.parametrize("settings, words", [
    (dict(variance_type="learned_range"), "process.variance"), (dict(beta_start=0.0), "beta"),
    (dict(trained_betas=[0.1]), "num_train_timesteps is 20"),
], ids=str)  # fmt: skip
def test_a_process_that_does_not_fit_is_rejected(theirs, settings, words):
    change(theirs, "scheduler/scheduler_config.json", **settings)
    rejected(theirs, words)


# --- Damaged and foreign files -------------------------------------------------------------------


def test_a_missing_an_unknown_and_a_wrong_tensor_are_rejected(theirs):
    tensors = read_weights(theirs / WEIGHTS)
    name = "down_blocks.0.resnets.0.conv1.weight"
    for other, words in (
        ({k: v for k, v in tensors.items() if k != name}, "field: model.down.0.0.conv1.weight"),
        (tensors | {"conv_in.extra": torch.zeros(3)}, "field: model.conv_in.extra"),
        (tensors | {name: tensors[name][:, :, :1]}, "field: model.down.0.0.conv1.weight"),
    ):
        replace_weights(theirs / WEIGHTS, other)
        rejected(theirs, words)


def test_a_safetensors_file_of_an_unknown_type_is_rejected(theirs):
    path = theirs / WEIGHTS
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F64"', 1))
    rejected(theirs, "has the type F64")


@pytest.mark.parametrize("old, new", [
    (b'"dtype"', b'"dtypf"'), (b'"shape"', b'"shapf"'), (b'"data_offsets"', b'"data_offsett"'),
    (b'"data_offsets":[0,', b'"data_offsets":[1,'), (b'"data_offsets":[0,', b'"data_offsets":["'),
    (b'"shape":[', b'"shape":9, "a":['), (b'"dtype":"F32"', b'"dtype":["F"]'),
])  # fmt: skip
def test_a_safetensors_file_with_a_damaged_header_is_rejected(theirs, old, new):
    whole = (theirs / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = whole[8:end].replace(b", ", b",").replace(b": ", b":")
    assert old in header
    header = header.replace(old, new, 1)
    (theirs / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + whole[end:])
    rejected(theirs, "safetensors: ")


def test_a_safetensors_file_that_is_cut_anywhere_is_rejected(theirs):
    whole = (theirs / WEIGHTS).read_bytes()
    for end in range(0, len(whole), len(whole) // 50):
        (theirs / WEIGHTS).write_bytes(whole[:end])
        rejected(theirs, "safetensors: damaged")


class Code:
    """A pickle that runs code when pickle loads it."""

    def __reduce__(self):
        return open, ("ran", "w")


def test_a_pickle_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv_in.weight": Code()}, "a.bin")
    with pytest.raises(Failure, match=r"a.bin: cannot be read as weights"):
        read_weights("a.bin")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [torch.zeros(3), {"model": {"a": torch.zeros(3)}}, {"step": 3}])
def test_a_pickle_of_something_else_is_rejected(tmp_path, content):
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(Failure, match=r"is not a dictionary of tensors"):
        read_weights(tmp_path / "a.bin")


def test_a_damaged_pickle_is_rejected(tmp_path):
    torch.save({"a": torch.zeros(99)}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    text = [b"", b"no pickle", b"hello world\n", b"epoch,loss\n1,2\n", b"<!DOCTYPE html>\n"]
    for bad in (*text, whole[:500], whole[:-100], pickle.dumps({"a": 1})[:-1]):
        (tmp_path / "a.bin").write_bytes(bad)
        with pytest.raises(Failure, match=r"a.bin: cannot be read as weights"):
            read_weights(tmp_path / "a.bin")


@pytest.mark.parametrize("text", ["", "{", "\xff"])
@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_settings_that_are_not_json_are_rejected(theirs, file, text):
    (theirs / file).write_text(text, encoding="latin-1")
    rejected(theirs, file.split("/")[1])


def test_an_incomplete_folder_is_told_what_is_missing(theirs):
    """The operating system's error names the file, and command.run() prints it."""
    for path in (theirs / WEIGHTS, theirs / "unet" / "config.json"):
        path.unlink()
        with pytest.raises(FileNotFoundError) as error:
            checkpoint.load(theirs)
        assert str(error.value.filename) == str(path)

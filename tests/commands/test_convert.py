"""Weights in and out: convert.py, what it refuses, and what the other commands make of its checkpoints."""

import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import zipfile

import numpy as np
import pytest
import torch
from judge import close
from running import ROOT, TINY, equal

import convert
import ddpm
import evaluate
import sample
import train
from support import batches, checkpoint, command, diffusers_format, sampling
from support.data import cifar10

FIXTURE = ROOT / "tests" / "fixtures" / "diffusers"  # written by tests/peers/compare_diffusers.py
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def theirs(tmp_path):
    """A folder that diffusers wrote: a network of two levels, 8x8 images, 20 steps, fixed_large."""
    shutil.copytree(FIXTURE, tmp_path / "theirs")
    return tmp_path / "theirs"


def change(folder, file, **settings):
    """Changes settings in a folder's JSON file; with `...` for a value, leaves the setting out."""
    found = json.loads((folder / file).read_text()) | settings
    (folder / file).write_text(json.dumps({k: v for k, v in found.items() if v is not ...}))


def tensors_of(folder):
    """{name: tensor} of a folder's safetensors, by the format's own description."""
    raw = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header.pop("__metadata__")
    return {name: torch.frombuffer(bytearray(data[slice(*entry["data_offsets"])]), dtype=torch.float32)
            .reshape(entry["shape"]) for name, entry in header.items()}  # fmt: skip


KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def safetensors(tensors, **header):
    """The bytes of a safetensors file, whose header is changed by `header`."""
    entries, end = {}, 0
    for name, tensor in tensors.items():
        entries[name] = dict(dtype=KINDS[tensor.dtype], shape=list(tensor.shape),
                             data_offsets=[end, end + tensor.nbytes])  # fmt: skip
        end += tensor.nbytes
    text = json.dumps(entries | header).encode()
    data = b"".join(
        bytes(tensor.contiguous().view(torch.uint8).numpy()) for tensor in tensors.values()
    )
    return len(text).to_bytes(8, "little") + text + data


def converted(call, source, out="new.pt"):
    """The checkpoint that convert.py makes of `source`."""
    status, _, err = call(convert, "--ckpt", source, "--out", out)
    assert status == 0, err
    return checkpoint.load_model(out)


def refused(call, source, *words, status=1):
    """convert.py refuses `source` in one line that holds these words, and writes nothing."""
    got, out, err = call(convert, "--ckpt", source, "--out", "new.pt")
    assert (got, out) == (status, "") and len(err.splitlines()) == 1 and len(err) < 400, err
    assert all(word in err for word in words), err
    assert not any(name.endswith((".pt", ".partial")) for name in os.listdir())


# --- From diffusers, and back --------------------------------------------------------------------


def test_a_network_of_diffusers_gives_its_outputs_at_every_step(call, theirs):
    _, net, _ = converted(call, theirs)
    saved = np.load(theirs / "outputs.npz")
    x = torch.from_numpy(saved["x"])
    with torch.no_grad():
        eps = torch.stack([net(x, torch.full((len(x),), t)) for t in range(1, 21)])
    close("eps", eps.numpy(), saved["eps"], 1e-5, 1.0)  # float32, tens of layers


def test_a_converted_network_samples_what_diffusers_samples(call, theirs):
    """T, schedule, variance and clipping came with it; the noise is that of the same generator."""
    ckpt, net, d = converted(call, theirs)
    generator = torch.Generator().manual_seed(0)
    xT = torch.randn(4, 3, 8, 8, generator=generator)
    sigma2 = getattr(d, ckpt["process"]["variance"])
    x0 = ddpm.sample_ancestral(net, d, xT, sigma2, ckpt["process"]["clip"], generator)
    close(
        "x0", x0.numpy(), np.load(theirs / "outputs.npz")["x0"], 1e-4, 1.0
    )  # 1e-5 a step, 20 steps


def old_names(tensors):
    """The names that diffusers gave to its attention before 2023."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        tensors = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in tensors.items()}
    return tensors


def convolutions(tensors):
    """Linear layers of attention as 1x1 convolutions."""
    return {key: t[:, :, None, None] if ".attentions." in key and t.ndim == 2 else t
            for key, t in tensors.items()}  # fmt: skip


@pytest.mark.parametrize(
    "change", [old_names, convolutions, lambda both: old_names(convolutions(both))]
)
@pytest.mark.parametrize("kind", ["safetensors", "bin", "bin before PyTorch 1.6"])
def test_both_generations_of_attention_and_all_formats_hold_the_same_network(
    call, theirs, change, kind
):
    expected, tensors = converted(call, theirs)[0], change(tensors_of(theirs))
    assert tensors.keys() != tensors_of(theirs).keys() or change is convolutions
    (theirs / WEIGHTS).unlink()
    if kind == "safetensors":
        (theirs / WEIGHTS).write_bytes(safetensors(tensors, __metadata__={"format": "pt"}))
    else:
        torch.save(tensors, (theirs / WEIGHTS).with_suffix(".bin"),
                   _use_new_zipfile_serialization=kind == "bin")  # fmt: skip
    assert equal(converted(call, theirs, "again.pt")[0], expected)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(call, theirs, kind):
    halves = {name: tensor.to(kind) for name, tensor in tensors_of(theirs).items()}
    (theirs / WEIGHTS).write_bytes(safetensors(halves))
    got = converted(call, theirs)[0]["model"]["conv_in.weight"]
    assert got.dtype == torch.float32 and torch.equal(got, halves["conv_in.weight"].float())


def test_settings_may_lie_beside_the_weights_or_in_folders_of_their_own(call, theirs):
    """As the published folders have them; and without a scheduler's, the process is the paper's."""
    expected = converted(call, theirs)[0]
    flat = theirs.with_name("flat")
    shutil.copytree(theirs / "unet", flat)
    shutil.copy(theirs / "scheduler" / "scheduler_config.json", flat)
    assert equal(converted(call, flat, "flat.pt")[0], expected)
    (flat / "scheduler_config.json").unlink()
    status, _, err = call(convert, "--ckpt", flat, "--out", "assumed.pt")
    process = checkpoint.load("assumed.pt")["process"]
    assert status == 0 and "no scheduler_config.json" in err
    assert torch.equal(process["beta"], ddpm.linear_schedule()) and process["variance"] == "beta"


@pytest.mark.parametrize(
    "settings, beta",
    [
        (dict(beta_schedule="linear", beta_end=0.02), np.linspace(1e-4, 0.02, 20)),
        (dict(beta_schedule="squaredcos_cap_v2"), ddpm.cosine_schedule(20)[1:].numpy()),
        (dict(beta_schedule="scaled_linear"), np.linspace(1e-2, 0.3**0.5, 20) ** 2),
        (dict(beta_schedule="sigmoid"), 1e-4 + 0.2999 / (1 + np.exp(-np.linspace(-6, 6, 20)))),
        (dict(trained_betas=[0.01, 0.5], num_train_timesteps=2), np.array([0.01, 0.5])),
    ],
)
def test_schedules_are_those_of_diffusers(call, theirs, settings, beta):
    """Its formulas, in float64; without a name here, a schedule is kept as its table."""
    change(theirs, "scheduler/scheduler_config.json", **settings)
    ckpt, _, d = converted(call, theirs)
    close("beta", d.beta[1:].numpy(), beta, 1e-12, 1.0)
    named = {"linear": "linear", "squaredcos_cap_v2": "cosine"}.get(
        settings.get("beta_schedule"), "table"
    )
    assert ckpt["process"]["schedule"] == named


@pytest.mark.parametrize("theirs_say, here", [("fixed_large", "beta"), ("fixed_small", "beta_tilde"),
                                              ("fixed_small_log", "beta_tilde")])  # fmt: skip
def test_variance_and_clipping_that_came_with_weights_are_the_defaults(
    call, theirs, theirs_say, here
):
    """sample.py without --variance draws what Algorithm 2 draws with them."""
    change(
        theirs,
        "scheduler/scheduler_config.json",
        variance_type=theirs_say,
        clip_sample=here == "beta",
    )
    _, net, d = converted(call, theirs)
    status, out, err = call(sample, "--ckpt", "new.pt", "--out", "x.npz", "--n", 2, "--device", "cpu",
                            "--precision", "fp32")  # fmt: skip
    assert status == 0 and f"sigma^2 = {here}, converted weights" in out, (out, err)
    drawn = [sampling.sample(net, d, (3, 8, 8), range(2), variance=variance, clip=clip)
             for variance in ("beta", "beta_tilde") for clip in (True, False)]  # fmt: skip
    pixels = [
        ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy() for x in drawn
    ]
    same = [np.array_equal(np.load("x.npz")["arr_0"], one) for one in pixels]
    assert same == [here == "beta", False, False, here == "beta_tilde"]


def test_evaluate_takes_converted_weights_and_asks_for_images(call, theirs, tmp_path, monkeypatch):
    """And clips as they say: the bound is that of ddpm.py with the same clipping."""
    change(theirs, "unet/config.json", sample_size=16)
    change(theirs, "scheduler/scheduler_config.json", clip_sample=False)
    converted(call, theirs)
    status, _, err = call(evaluate, "--ckpt", "new.pt")
    assert status == 2 and "--data: this checkpoint does not say what it was trained on" in err
    folder_of(tmp_path)
    clips, bound_terms = [], ddpm.bound_terms
    monkeypatch.setattr(ddpm, "bound_terms", lambda *a: clips.append(a[4]) or bound_terms(*a))
    status, out, err = call(evaluate, "--ckpt", "new.pt", "--data", tmp_path / "images")
    assert (
        status == 0 and "converted weights" in out and out.count("±") == 8 and clips == [False]
    ), err


def test_a_checkpoint_goes_to_diffusers_and_back_bit_for_bit(call, trained):
    """With its classes, by name; the average, or the last weights."""
    ours = checkpoint.load(trained[0] / "ckpt.pt")
    for name, key in (("ema", "ema"), ("raw", "model")):
        flags = ["--out", f"{name}/", "--weights", name]
        status, out, err = call(convert, "--ckpt", trained[0] / "ckpt.pt", *flags)
        assert status == 0 and "DDPMPipeline hands on no labels" in out, err
        ckpt = converted(call, name, f"{name}.pt")[0]
        assert equal(ckpt["model"], ours[key]) and equal(ckpt["ema"], ours[key])
        for part in ("network", "shape", "classes", "process"):
            assert equal(ckpt[part], ours[part]), part
    assert not equal(ours["ema"], ours["model"])


def test_what_diffusers_wrote_goes_back_as_it_came(call, theirs, tmp_path):
    """The same names, shapes and numbers; the same settings, where both files have one."""
    converted(call, theirs)
    assert call(convert, "--ckpt", "new.pt", "--out", "back/unet/")[0] == 1  # no such folder
    assert call(convert, "--ckpt", "new.pt", "--out", "unet/")[0] == 0
    assert equal(tensors_of(tmp_path), tensors_of(theirs))
    table = ddpm.linear_schedule(20, 1e-4, 0.3)[1:].tolist()  # of another end than the paper's
    for file in ("unet/config.json", "scheduler/scheduler_config.json"):
        ours = json.loads((tmp_path / "unet" / file.split("/")[1]).read_text())
        for name, value in json.loads((theirs / file).read_text()).items():
            if name in ours and name not in ("beta_end", "trained_betas"):
                assert ours[name] == value, name
    assert ours["trained_betas"] == table


def test_learned_variances_are_rescaled_on_both_ways(call, learned, tmp_path):
    """diffusers' v is (output + 1) / 2: its last layer, applied to the same features, gives 2 v - 1."""
    assert call(convert, "--ckpt", learned, "--out", "theirs/")[0] == 0
    (tmp_path / "theirs" / "unet").mkdir()
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / "theirs" / file).rename(tmp_path / "theirs" / "unet" / file)
    there, ours = tensors_of(tmp_path / "theirs"), checkpoint.load(learned)["ema"]
    features = torch.randn(2, ours["conv_out.weight"].shape[1], 4, 4)
    out = torch.nn.functional.conv2d(features, there["conv_out.weight"], there["conv_out.bias"])
    own = torch.nn.functional.conv2d(features, ours["conv_out.weight"], ours["conv_out.bias"])
    close("eps", out[:, 0].numpy(), own[:, 0].numpy(), 1e-6, 1.0)
    close("v", (out[:, 1].numpy() + 1) / 2, own[:, 1].numpy(), 1e-6, 1.0)
    back = converted(call, tmp_path / "theirs")[0]["ema"]
    assert torch.equal(
        back["conv_out.weight"], ours["conv_out.weight"]
    )  # times 2, and half of that
    close("v's bias", back["conv_out.bias"].numpy(), ours["conv_out.bias"].numpy(), 1e-6, 1.0)
    settings = json.loads((tmp_path / "theirs" / "scheduler_config.json").read_text())
    assert settings["variance_type"] == "learned_range"


def test_a_schedule_without_a_name_in_diffusers_goes_there_as_its_table(call, tmp_path):
    assert call(train, *TINY, "--epochs", 1, "--schedule", "exponential")[0] == 0
    assert call(convert, "--ckpt", "ckpt.pt", "--out", "theirs/")[0] == 0
    settings = json.loads((tmp_path / "theirs" / "scheduler_config.json").read_text())
    assert settings["trained_betas"] == ddpm.exponential_schedule(20)[1:].tolist()
    assert torch.equal(
        converted(call, "theirs")[0]["process"]["beta"], ddpm.exponential_schedule(20)
    )


def test_the_authors_weights_are_told_apart_by_their_names_and_shapes(call, tmp_path, monkeypatch):
    """Two small networks stand for theirs; names of the authors' port, levels counted from the highest."""
    small = diffusers_format.CIFAR10 | dict(ch=8, groups=4)
    large = diffusers_format.LARGE | dict(ch=8, groups=4)
    runs = [(small, (3, 32, 32), "beta"), (large, (3, 256, 256), "beta_tilde")]
    monkeypatch.setattr(diffusers_format, "RUNS", runs)
    for i, (network, shape, variance) in enumerate(runs):
        net = ddpm.UNet(**network)
        names = diffusers_format.names(network, diffusers_format.AUTHORS)
        tensors = {names[name][0]: tensor for name, tensor in net.state_dict().items()}
        assert (
            "up.0.block.2.nin_shortcut.weight" in tensors and "mid.attn_1.proj_out.bias" in tensors
        )
        lowest = len(network["mult"]) - 1
        assert len(tensors[f"up.{lowest}.block.0.conv1.bias"]) == 8 * network["mult"][lowest]
        assert (
            f"up.{lowest}.upsample.conv.bias" in tensors
            and "up.0.upsample.conv.bias" not in tensors
        )
        assert "down.0.downsample.conv.bias" in tensors and "temb.dense.1.bias" in tensors
        torch.save(tensors, tmp_path / f"{i}.ckpt")
        ckpt, back, d = converted(call, tmp_path / f"{i}.ckpt", f"{i}.pt")
        assert equal(back.state_dict(), net.state_dict()) and torch.equal(
            d.beta, ddpm.linear_schedule()
        )
        assert (ckpt["shape"], ckpt["process"]["variance"]) == (shape, variance)
    tensors.pop("conv_out.bias")
    torch.save(tensors, tmp_path / "bad.ckpt")
    assert (
        "not the weights of the authors'"
        in call(convert, "--ckpt", "bad.ckpt", "--out", "bad.pt")[2]
    )


def test_classes_of_a_folder_are_named_on_the_command_line(call, theirs):
    tensors = tensors_of(theirs) | {"class_embedding.weight": torch.randn(3, 32)}
    (theirs / WEIGHTS).write_bytes(safetensors(tensors))
    change(theirs, "unet/config.json", num_class_embeds=3)
    refused(call, theirs, "--classes: 0 names", "2 classes", status=2)
    assert call(convert, "--ckpt", theirs, "--out", "new.pt", "--classes", "cat,cat")[0] == 2
    status, out, err = call(convert, "--ckpt", theirs, "--out", "new.pt", "--classes", "cat, dog")
    assert status == 0 and "2 classes" in out, err
    ckpt = checkpoint.load("new.pt")
    assert ckpt["classes"] == ["cat", "dog"]
    assert torch.equal(ckpt["ema"]["label.weight"], tensors["class_embedding.weight"])


def test_what_is_there_already_is_not_replaced(call, theirs, tmp_path):
    (tmp_path / "old.pt").write_text("mine")
    for out in ("old.pt", "theirs/"):
        status, _, err = call(convert, "--ckpt", theirs, "--out", out)
        assert status == 1 and "exists" in err and err.count("\n") == 1
    assert (tmp_path / "old.pt").read_text() == "mine"
    assert call(convert, "--ckpt", theirs, "--out", "new.zip")[0] == 2


# --- What cannot be converted --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value",
    dict(
        act_fn="gelu", add_attention=False, attention_head_dim=8, attn_norm_num_groups=2,
        block_out_channels=[8, 12], center_input_sample=True, class_embed_type="timestep",
        down_block_types=["DownBlock2D", "ResnetDownsampleBlock2D"], downsample_padding=1,
        downsample_type="resnet", dropout=1.5, flip_sin_to_cos=True, freq_shift=0, in_channels=4,
        layers_per_block=0, mid_block_scale_factor=2, mid_block_type=None, norm_eps=1e-5, norm_num_groups=3,
        num_class_embeds=1, out_channels=4, resnet_time_scale_shift="scale_shift", sample_size=9,
        time_embedding_dim=64, time_embedding_type="fourier", up_block_types=["UpBlock2D", "AttnUpBlock2D"],
        upsample_type="resnet", _class_name="UNet2DConditionModel", a_new_setting=1,
    ).items(),
)  # fmt: skip
def test_a_network_that_ours_cannot_be_is_refused_by_the_settings_name(call, theirs, name, value):
    change(theirs, "unet/config.json", **{name: value})
    refused(call, theirs, "config.json", f"{name} is {json.dumps(value)}")


@pytest.mark.parametrize("name", ["attention_head_dim", "downsample_padding", "flip_sin_to_cos", "freq_shift",
                                  "norm_eps", "sample_size"])  # fmt: skip
def test_a_missing_setting_means_what_it_means_in_diffusers(call, theirs, name):
    """Heads of 8, padding on both sides, cosines first, ...: its own defaults are not our network's."""
    change(theirs, "unet/config.json", **{name: ...})
    refused(call, theirs, "config.json", f"{name} is ")


@pytest.mark.parametrize(
    "name, value",
    dict(
        prediction_type="v_prediction", thresholding=True, rescale_betas_zero_snr=True, clip_sample_range=2.0,
        variance_type="fixed_large_log", beta_schedule="laplace", num_train_timesteps=0, beta_start=0.0,
        trained_betas=[0.1], _class_name="ScoreSdeVeScheduler", sigma_min=0.01, clip_sample="yes",
    ).items(),
)  # fmt: skip
def test_a_process_that_ours_cannot_be_is_refused_by_the_settings_name(call, theirs, name, value):
    change(theirs, "scheduler/scheduler_config.json", **{name: value})
    refused(call, theirs, "scheduler_config.json", f"{name} is {json.dumps(value)}")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)],
                         ids=["a pipe", "a folder", "a link to nowhere"])  # fmt: skip
def test_settings_that_are_there_but_no_file_are_refused_and_not_assumed(call, theirs, make):
    scheduler = theirs / "scheduler" / "scheduler_config.json"
    scheduler.unlink()
    make(scheduler)
    refused(
        call, theirs, "scheduler_config.json: cannot be read as settings (not an ordinary file)"
    )


def test_variances_that_the_network_does_not_learn_cannot_be_learned_ones(call, theirs):
    change(theirs, "scheduler/scheduler_config.json", variance_type="learned_range")
    refused(call, theirs, "scheduler_config.json", 'variance_type is "learned_range"')


def test_a_network_wider_at_the_first_level_than_its_first_layer_does_not_go_to_diffusers(
    call, tmp_path
):
    network = dict(in_channels=1, out_channels=1, ch=8, mult=(2, 2), blocks=1, attention=(), dropout=0.0,
                   groups=4, num_classes=None)  # fmt: skip
    weights = ddpm.UNet(**network).state_dict()
    process = checkpoint.process("linear", 20, "fixed")
    checkpoint.save("wide.pt", dict(network=network, shape=(1, 8, 8), classes=[], process=process,
                                    model=weights, ema=weights, step=0))  # fmt: skip
    status, _, err = call(convert, "--ckpt", "wide.pt", "--out", "theirs/")
    assert status == 1 and "mult begins with 2" in err and not (tmp_path / "theirs").exists()


# --- Strangers' files ----------------------------------------------------------------------------


def test_a_missing_a_further_and_a_misshapen_tensor_are_named(call, theirs):
    tensors = tensors_of(theirs)
    name = "down_blocks.0.resnets.0.conv1.weight"
    for other, word in (
        ({k: v for k, v in tensors.items() if k != name}, f"{name} is missing"),
        (tensors | {"conv_in.extra": torch.zeros(3)}, "conv_in.extra is not a part"),
        (tensors | {name: tensors[name][:, :, :1]}, f"{name} is [8, 8, 1, 3]"),
        (tensors | {name: tensors[name] * math.nan}, f"{name} holds numbers that are not finite"),
        (tensors | {name: tensors[name] / 0}, f"{name} holds numbers that are not finite"),
        ({**tensors, "mid_block.attentions.0.query.bias": torch.zeros(16)}, "is not a part"),
    ):  # fmt: skip
        (theirs / WEIGHTS).write_bytes(safetensors(other))
        refused(call, theirs, "safetensors", word)


@pytest.mark.parametrize(
    "settings, word",
    [
        (dict(block_out_channels=[32768, 32768]), "and the network needs [131072, 32768]"),
        (dict(layers_per_block=1000), "layers_per_block is 1000; so many blocks"),
        (dict(layers_per_block=10**12), "layers_per_block is 1000000000000"),
        (dict(block_out_channels=[8] * 16, down_block_types=["DownBlock2D"] * 16,
              up_block_types=["UpBlock2D"] * 16), "layers_per_block is 1; so many blocks"),
        (dict(block_out_channels=[8] * 10**6), "block_out_channels is [8, 8, "),
        (dict(block_out_channels=[10**30, 10**30]), "block_out_channels is [1000000"),
        (dict(num_class_embeds=10**6), "class_embedding.weight is missing"),
        (dict(sample_size=2**40), "sample_size is 1099511627776"),
    ],
)  # fmt: skip
def test_a_config_that_asks_for_a_gigantic_network_is_refused_before_it_is_built(
        call, theirs, settings, word, monkeypatch):  # fmt: skip
    """Nothing but the meta device, which has no memory, is asked for a network."""

    class Checked(ddpm.UNet):
        def __init__(self, **network):
            assert torch.get_default_device().type == "meta", "a network was built"
            super().__init__(**network)

    monkeypatch.setattr(ddpm, "UNet", Checked)
    change(theirs, "unet/config.json", **settings)
    refused(call, theirs, word)


def entry(shape, first, last, dtype="F32"):
    return dict(dtype=dtype, shape=shape, data_offsets=[first, last])


def lying(header, data=b""):
    """The bytes of a safetensors file with this header: a dictionary, or text that need not be one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


FOUR = bytes(4)
TWICE = json.dumps({"a": entry([1], 0, 4)}).encode()
LYING = {
    "a length that is not there": b"\x01\x02",
    "a header of exabytes": (2**62).to_bytes(8, "little") + b"{}",
    "a header longer than the file": (10**8).to_bytes(8, "little") + b"{}",
    "no JSON": lying(b"{,,}"),
    "not UTF-8": lying(b"{\xff\xfe}"),
    "JSON that is no object": lying([]),
    "JSON that never ends": lying(b"[" * 10**5),
    "a number of a million digits": lying(b"1" * 10**6),
    "a name twice": lying(TWICE[:-1] + b", " + TWICE[1:], FOUR),
    "an entry that is no object": lying({"a": [1]}),
    "an entry without a shape": lying({"a": dict(dtype="F32", data_offsets=[0, 4])}, FOUR),
    "an entry with more": lying({"a": entry([1], 0, 4) | {"more": 1}}, FOUR),
    "an unknown dtype": lying({"a": entry([4], 0, 4, "F8_E4M3")}, FOUR),
    "a dtype that is no text": lying({"a": entry([1], 0, 4, ["F32"])}, FOUR),
    "negative sides": lying({"a": entry([-1, -1], 0, 4)}, FOUR),
    "a side that is no number": lying({"a": entry([True], 0, 4)}, FOUR),
    "a shape of exabytes": lying({"a": entry([2**40, 2**40], 0, 4)}, FOUR),
    "fewer bytes than the shape has": lying({"a": entry([2], 0, 4)}, FOUR),
    "offsets backwards": lying({"a": entry([1], 4, 0)}, FOUR),
    "three offsets": lying({"a": dict(dtype="F32", shape=[1], data_offsets=[0, 4, 4])}, FOUR),
    "offsets beyond the file": lying({"a": entry([1024], 0, 4096)}, FOUR),
    "tensors that overlap": lying({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, 2 * FOUR),
    "a hole between tensors": lying({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, 3 * FOUR),
    "bytes after the last tensor": lying({"a": entry([1], 0, 4)}, 2 * FOUR),
    "a name of a megabyte": lying({"a" * 10**6: 1}),
    "nothing": b"",
}


@pytest.mark.parametrize("lie", LYING)
def test_a_lying_safetensors_file_is_refused_in_one_line(call, theirs, lie):
    (theirs / WEIGHTS).write_bytes(LYING[lie])
    refused(call, theirs, "safetensors", "damaged")


def test_a_header_over_a_hundred_megabytes_is_refused_unread(call, theirs):
    """The file is sparse: it takes no room, and reading it would take the memory."""
    with open(theirs / WEIGHTS, "wb") as file:
        file.write((10**11).to_bytes(8, "little"))
        file.truncate(10**11 + 8)
    refused(call, theirs, "safetensors", "a header of 100,000,000,000 bytes")


class Code:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self):
        return open, ("ran", "w")


class Memory:
    """A pickle that asks for a terabyte, by a class that torch.load allows."""

    def __reduce__(self):
        return bytearray, (10**12,)


def repacked(source, target):
    """The same archive, compressed: it could unpack to any size."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


PICKLES = {
    "code": ({"conv_in.weight": Code()}, "asks for"),
    "numbers of one hash": ({i * (2**61 - 1): i for i in range(9)}, "too large a number"),
    "a terabyte": ({"conv_in.weight": Memory()}, "bytearray, which is no tensor"),
    "no dictionary": (torch.zeros(3), "no dictionary"),
    "no tensor": ({"conv_in.weight": 3}, "is no tensor"),
    "no name": ({3: torch.zeros(3)}, "is no tensor"),
    "one number that stands for a terabyte": ({"a": torch.zeros(1).expand(10**12)}, "not contiguous"),
    "tensors that share their memory": (dict.fromkeys(map(str, range(99)), torch.zeros(999)), "share"),
    "whole numbers": ({"a": torch.zeros(3, dtype=torch.int64)}, "LongStorage"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["archive", "before PyTorch 1.6"])
@pytest.mark.parametrize("what", PICKLES)
def test_a_pickle_of_more_than_tensors_is_refused_and_none_of_its_code_runs(
    call, theirs, what, kind
):
    held, word = PICKLES[what]
    (theirs / WEIGHTS).unlink()
    torch.save(
        held,
        (theirs / WEIGHTS).with_suffix(".bin"),
        _use_new_zipfile_serialization=kind == "archive",
    )
    refused(call, theirs, ".bin: cannot be read as weights", word)
    assert not os.path.exists("ran")


def test_a_damaged_or_compressed_or_bare_pickle_is_refused(call, theirs, tmp_path):
    path = (theirs / WEIGHTS).with_suffix(".bin")
    torch.save(tensors_of(theirs), tmp_path / "whole")
    (theirs / WEIGHTS).unlink()
    whole = (tmp_path / "whole").read_bytes()
    for bad in (b"", b"no pickle", whole[:5000], whole[:-100], pickle.dumps({"a": 1})):
        path.write_bytes(bad)
        refused(call, theirs, ".bin", "cannot be read as weights")
    repacked(tmp_path / "whole", path)
    refused(call, theirs, ".bin", "its archive is compressed")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": ' * 10**5, "\xff", '{"act_fn": NaN}'])
def test_settings_that_cannot_be_read_are_refused(call, theirs, text):
    for file in ("unet/config.json", "scheduler/scheduler_config.json"):
        whole = (theirs / file).read_bytes()
        (theirs / file).write_text(text, encoding="latin-1")
        refused(call, theirs, file)
        (theirs / file).write_bytes(whole)


def test_an_incomplete_folder_says_what_is_missing(call, theirs, tmp_path):
    (theirs / WEIGHTS).unlink()
    refused(call, theirs, "diffusion_pytorch_model.safetensors: no such file")
    (theirs / "unet" / "config.json").unlink()
    refused(call, theirs, "config.json: no such file")
    refused(call, tmp_path / "google" / "ddpm-cifar10-32", "docs/weights-and-fid.md")
    os.mkfifo("pipe")
    refused(call, tmp_path / "pipe", "no such file")


# --- Fine-tuning ---------------------------------------------------------------------------------


def losses(folder, name="log.jsonl"):
    return [json.loads(line)["loss"] for line in (folder / name).read_text().splitlines()]


def loss_of(net, d, steps):
    """The mean loss of a network on the first batches of TINY's run: their images, t and noise are known."""
    train_set = train.data.load("glyphs", "training", "data", None, None, False, True, 64)
    how = dict(data=train_set, d=d, device=torch.device("cpu"), batch_size=16, seed=0, flip=False)
    draws = [batches.draw(step, **how) for step in range(steps)]
    with torch.no_grad():
        return np.mean([ddpm.loss_simple(lambda xt, t, y=y: net(xt, t, y), d, x0, t, eps).item()
                        for x0, y, t, eps in draws])  # fmt: skip


FINE = (
    "--limit 64 --batch-size 16 --device cpu --precision fp32 --micro-batch 16 --sample-every 0 "
    "--out ckpt.pt"
).split()


def test_fine_tuning_starts_at_the_loss_of_the_trained_network(call, trained, tmp_path):
    """With a rate of 0, its average stays; from weights of chance, the loss is about 1."""
    start = trained[0] / "ckpt.pt"
    status, out, err = call(
        train, *FINE, "--init", start, "--epochs", 1, "--lr", 0, "--log", "log.jsonl"
    )
    assert status == 0, err
    assert (
        f"starts from {start}, ema weights at step 16; afresh: optimiser, average and steps\n"
        in out
    )
    expected = loss_of(*checkpoint.load_model(start)[1:], steps=4)
    close("first loss", np.array(losses(tmp_path)), np.array([expected]), 1e-5, 1.0)
    assert equal(checkpoint.load("ckpt.pt")["model"], checkpoint.load(start)["ema"])
    status, _, err = call(train, *FINE, *TINY, "--epochs", 1, "--lr", 0, "--log", "chance.jsonl")
    assert status == 0 and losses(tmp_path, "chance.jsonl")[0] > expected + 0.05, err


@pytest.mark.parametrize("old, new", [("abc", "bd"), ("", "ab"), ("abc", ""), ("", "")])
def test_a_network_with_other_classes_does_at_first_what_the_old_one_did(old, new):
    """A class keeps its own embedding by its name; a new one, and no label, are the old "no label"."""
    torch.manual_seed(0)
    size = dict(in_channels=1, ch=8, mult=(1, 2), blocks=1, attention=(), dropout=0.0, groups=4)
    before = ddpm.UNet(**size, num_classes=len(old) or None).eval()
    torch.nn.init.normal_(before.conv_out.weight)
    start = dict(ema=before.state_dict(), classes=list(old))
    after = ddpm.UNet(**size, num_classes=len(new) or None).eval()
    after.load_state_dict(checkpoint.starting_weights(start, list(new)))
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([7])
    with torch.no_grad():
        for name in [*new, None]:
            y_new = [torch.tensor([new.index(name)])] if name else []
            y_old = [torch.tensor([old.index(name)])] if name and name in old else []
            close(
                f"class {name}",
                after(x, t, *y_new).numpy(),
                before(x, t, *y_old).numpy(),
                1e-5,
                1.0,
            )


def folder_of(tmp_path, names=("a", "b"), size=16, count=4):
    """Images of one grey each, in a folder a class."""
    for k, name in enumerate(names):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(count):
            image = np.full((size, size, 3), 40 * k + 20 * i, np.uint8)
            sample.pictures.to_picture(image).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def test_fine_tuning_takes_another_size_and_other_classes_and_says_what_starts_afresh(
    call, theirs, tmp_path
):
    """Converted weights, whose schedule is a table, whose variance and clipping are not the usual ones."""
    change(
        theirs, "scheduler/scheduler_config.json", variance_type="fixed_small", clip_sample=False
    )
    weights = converted(call, theirs, "theirs.pt")[0]
    flags = [
        "--data",
        folder_of(tmp_path),
        "--batch-size",
        4,
        "--device",
        "cpu",
        "--sample-every",
        0,
    ]
    other = ["--init", "theirs.pt", "--labels", "--size", "16x24"]
    status, out, err = call(train, *flags, *other, "--epochs", 2)
    assert status == 0 and "16x24x3, 2 classes" in out and "table schedule, T = 20" in out, err
    assert (
        "afresh: optimiser, average and steps; and the classes a, b, which begin as no label" in out
    )
    assert "lr 2e-05, warm-up 0" in out
    tuned = checkpoint.load("theirs-tuned.pt")
    assert tuned["shape"] == (3, 16, 24) and tuned["classes"] == ["a", "b"] and tuned["step"] == 4
    assert (
        equal(tuned["process"], weights["process"]) and tuned["process"]["variance"] == "beta_tilde"
    )
    status, out, err = call(
        train, *flags, "--init", "theirs.pt", "--epochs", 1, "--out", "own-size.pt"
    )
    assert status == 0 and "8x8x3;" in out and "classes" not in out, (
        err
    )  # its own size is the default
    assert equal(checkpoint.load("theirs.pt"), weights)


def test_a_fine_tuned_run_resumes_bit_for_bit_without_the_weights_it_began_with(
    call, trained, tmp_path
):
    shutil.copy(trained[0] / "ckpt.pt", "start.pt")
    flags = [*FINE, "--decay", "none", "--init", "start.pt"]
    assert call(train, *flags, "--epochs", 2)[0] == 0
    whole = checkpoint.load("ckpt.pt")
    assert call(train, *flags, "--epochs", 1, "--out", "half.pt")[0] == 0
    os.unlink("start.pt")
    status, out, err = call(train, "--resume", "half.pt", "--epochs", 2)
    assert status == 0 and "starts from" not in out, err
    half = checkpoint.load("half.pt")
    assert all(
        equal(half[part], whole[part]) for part in ("model", "ema", "optimizer", "step", "process")
    )


def test_init_and_resume_cannot_be_confused(call, theirs, trained):
    converted(call, theirs, "theirs.pt")
    own = trained[0] / "ckpt.pt"
    before = own.read_bytes()
    for flags, word in (
        (
            ["--init", own, "--resume", own],
            "--init: starts a new run, and --resume goes on with one",
        ),
        (["--resume", "theirs.pt"], "holds a network, and no run to go on with; --init starts one"),
        (
            ["--init", own, "--out", own],
            "is the checkpoint of --init, and would be lost; name another",
        ),
        (["--init", "theirs.pt"], "its network takes images of 3 channels, and glyphs has 1"),
        (
            ["--init", own, "--width", 16],
            "--width 16: the weights of --init have 8, and cannot change it",
        ),
        (["--init", own, "--timesteps", 30], "--timesteps 30: the weights of --init have 20"),
        (
            ["--init", own, "--schedule", "linear"],
            "--schedule linear: the weights of --init have cosine",
        ),
        (
            ["--init", own, "--variance", "learned"],
            "--variance learned: the weights of --init have fixed",
        ),
        (["--init", "theirs.pt", "--schedule", "linear"], "have a table of their own"),
    ):
        status, _, err = call(train, *flags)
        assert (
            status == 2 and word in err and err.count("\n") == 1 and not os.path.exists("ckpt.pt")
        ), err
    assert own.read_bytes() == before
    status, _, err = call(train, "--init", "nothing.pt")
    assert status == 1 and "nothing.pt: no such file" in err


def test_weights_of_another_number_of_channels_or_an_uneven_size_are_refused(
    call, theirs, tmp_path
):
    converted(call, theirs, "theirs.pt")
    folder = folder_of(tmp_path)
    for flags, word in ((["--channels", 1], "--channels 1: the weights of --init have 3"),
                        (["--size", 17], "--size 17x17: the network needs multiples of 2")):  # fmt: skip
        status, _, err = call(train, "--data", folder, "--init", "theirs.pt", *flags)
        assert status == 2 and word in err, err


# --- The file ------------------------------------------------------------------------------------


def test_a_checkpoint_of_format_1_is_still_read(call, trained, tmp_path, monkeypatch):
    """Its process is that of its settings; it samples, and it resumes."""
    ckpt = checkpoint.load(trained[0] / "ckpt.pt")
    del ckpt["process"], ckpt["ddpm_format"]
    del (
        ckpt["config"]["variance"],
        ckpt["config"]["labels"],
        ckpt["network"]["out_channels"],
    )  # the first
    with monkeypatch.context() as then:
        then.setattr(checkpoint, "FORMAT", 1)
        checkpoint.save("old.pt", ckpt)
    old = checkpoint.load("old.pt")
    assert old["ddpm_format"] == 1
    assert torch.equal(old["process"].pop("beta"), ddpm.cosine_schedule(20))
    assert old["process"] == dict(schedule="cosine", variance="beta", clip=True)
    assert call(sample, "--ckpt", "old.pt", "--out", "x.png", "--n", 1)[0] == 0
    assert call(train, "--resume", "old.pt", "--epochs", 5)[0] == 0
    assert checkpoint.load("old.pt")["ddpm_format"] == checkpoint.FORMAT


def test_a_checkpoint_whose_settings_ask_for_another_network_is_refused(call, trained):
    """A gigantic one before it is built."""
    ckpt = checkpoint.load(trained[0] / "ckpt.pt")
    for change in (dict(ch=2**15), dict(blocks=10**9), dict(mult=(1,) * 10**4), dict(attention=()),
                   dict(num_classes=2**40), dict(ch=10**18), dict(groups=0)):  # fmt: skip
        edited = dict(ckpt, network=ckpt["network"] | change)
        if "num_classes" in change:
            edited["classes"] = []
        checkpoint.save("edited.pt", edited)
        for module, *flags in (
            (sample, "--out", "x.png", "--ckpt"),
            (train, "--init"),
            (train, "--resume"),
        ):
            status, _, err = call(module, *flags, "edited.pt")
            assert status == 1 and err.endswith("edited.pt: its contents do not fit together\n"), (
                err
            )


# --- Samples -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "T, n", [(1000, 10), (1000, 50), (1000, 1000), (20, 7), (2, 2), (1, 1), (1000, 1)]
)
def test_a_quadratic_grid_is_dense_near_1_and_ends_at_T(T, n):
    """n different steps; T (i/n)^2 rounded up, and more only where integers leave no room."""
    grid = sampling.quadratic_grid(T, n)
    assert len(grid) == n and grid[-1] == T and grid[0] >= 1
    assert all(s < t for s, t in itertools.pairwise(grid))
    for i, t in enumerate(grid, 1):
        assert t == i or 0 <= t - T * i * i / n**2 < 1


def test_sample_takes_the_steps_of_the_grid_that_is_asked_for(call, ckpt, monkeypatch):
    asked = []
    drawn = ddpm.sample_ddim
    monkeypatch.setattr(ddpm, "sample_ddim", lambda *a, **k: asked.append(a[3]) or drawn(*a, **k))
    for grid in ("even", "quadratic"):
        flags = ["--out", "x.png", "--n", 2, "--steps", 4, "--grid", grid]
        status, out, err = call(sample, "--ckpt", ckpt, *flags)
        assert status == 0 and "DDIM, 4" in out, err
    assert asked == [[5, 10, 15, 20], [2, 5, 12, 20]]


def test_an_npz_holds_colours_even_of_grey_images(call, ckpt):
    """The ADM evaluator takes uint8 (N, H, W, 3) and nothing else."""
    assert call(sample, "--ckpt", ckpt, "--out", "x.npz", "--n", 3)[0] == 0
    assert call(sample, "--ckpt", ckpt, "--out", "x/", "--n", 3)[0] == 0
    images = np.load("x.npz")["arr_0"]
    assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8
    for i in range(3):
        grey = np.asarray(sample.pictures.Image.open(f"x/{i:06d}.png"))
        assert all(np.array_equal(images[i, :, :, c], grey) for c in range(3))


# --- docs/weights-and-fid.md ---------------------------------------------------------------------

PAGE = (ROOT / "docs" / "weights-and-fid.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)


def test_every_command_of_the_page_on_weights_is_one_that_its_command_takes():
    scripts = {
        "convert.py": convert,
        "sample.py": sample,
        "evaluate.py": evaluate,
        "train.py": train,
    }
    seen = set()
    for line in (line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()):
        words = shlex.split(line)
        if words[0] == "python" and words[1] in scripts:
            cfg, _ = command.parse_flags(scripts[words[1]].Config, "", words[2:])
            seen.add(words[1])
            if words[1] == "sample.py" and cfg.out.endswith((".npz", "/")):
                assert cfg.n == 50_000
    assert seen == scripts.keys()


def test_the_code_of_the_page_writes_the_images_of_cifar10_as_the_tools_want_them(
    monkeypatch, tmp_path
):
    pixels = np.arange(2 * 3 * 32 * 32).astype(np.uint8).reshape(2, 3, 32, 32)
    monkeypatch.setattr(
        cifar10, "load", lambda folder, training: (pixels, np.zeros(2)) if training else None
    )
    monkeypatch.chdir(tmp_path)
    (code,) = (block for kind, block in BLOCKS if kind == "py")
    exec(code, {})
    images = pixels.transpose(0, 2, 3, 1)
    assert np.array_equal(np.load("cifar10-train.npz")["arr_0"], images)
    for i, image in enumerate(images):
        assert np.array_equal(
            np.asarray(sample.pictures.Image.open(f"cifar10-train/{i:05d}.png")), image
        )

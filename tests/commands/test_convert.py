"""convert.py: its flags, and what it writes. The formats are tested in test_diffusers_format.py."""

import pathlib
import shutil

import pytest
import torch
from running import ROOT, equal

import convert
import ddpm
from support import checkpoint, diffusers_format

FIXTURE = ROOT / "tests" / "fixtures" / "diffusers"
SMALL = dict(
    in_channels=1,
    out_channels=1,
    ch=8,
    mult=(1, 2),
    blocks=1,
    attention=(1,),
    dropout=0.0,
    groups=4,
)


@pytest.fixture
def theirs(tmp_path):
    return shutil.copytree(FIXTURE, tmp_path / "theirs")


@pytest.fixture
def ours(tmp_path):
    """A checkpoint of a network with two classes, whose average differs from its last weights."""
    network = dict(SMALL, num_classes=2)
    torch.manual_seed(0)
    average, last = (dict(ddpm.UNet(**network).state_dict()) for _ in range(2))
    process = checkpoint.process("exponential", 20, "fixed")
    checkpoint.save(str(tmp_path / "ours.pt"), dict(
        network=network, shape=(1, 8, 8), classes=["cat", "dog"], process=process, step=77,
        model=last, ema=average))  # fmt: skip
    return checkpoint.load(str(tmp_path / "ours.pt"))


def converted(call, source, out, *flags):
    status, printed, err = call(convert, "--ckpt", source, "--out", out, *flags)
    assert status == 0, err
    return printed + err


def rejected(call, *flags, status, words):
    """The call ends with this status and one line, perhaps after a note on what was read."""
    got, printed, err = call(convert, *flags)
    *notes, line = err.splitlines()
    assert (got, printed) == (status, "") and words in line, err
    assert all(note.startswith("read ") for note in notes) and len(notes) < 2, err


def test_a_diffusers_folder_becomes_a_checkpoint(call, theirs):
    printed = converted(call, theirs, "new.pt")
    assert "images 8x8x3, 0 classes; table schedule, T = 20, variance beta, x0 clipped" in printed
    assert "now: python sample.py --ckpt new.pt --out grid.png" in printed
    ckpt, held = checkpoint.load("new.pt"), diffusers_format.read_folder(theirs)
    assert equal({name: ckpt[name] for name in held}, held)


def test_notes_of_the_folder_are_printed(call, theirs):
    shutil.copytree(theirs / "unet", theirs / "unet_ema")
    assert "unet_ema/diffusion_pytorch_model.safetensors" in converted(call, theirs, "new.pt")


@pytest.mark.parametrize("weights, part", [("ema", "ema"), ("raw", "model")])
def test_a_checkpoint_becomes_a_folder_and_the_same_checkpoint_again(call, ours, weights, part):
    """With its classes, its process, its step, and one of its two sets of weights."""
    printed = converted(call, "ours.pt", "folder/", "--weights", weights)
    assert (
        "2 classes; exponential schedule" in printed
        and "UNet2DModel.from_pretrained('folder/')" in printed
    )
    converted(call, "folder", "again.pt")
    again = checkpoint.load("again.pt")
    for name in ("network", "shape", "classes", "process", "step"):
        assert equal(again[name], ours[name]), name
    assert equal(again["ema"], ours[part]) and equal(again["model"], ours[part])
    assert not equal(ours["ema"], ours["model"])


def test_other_commands_load_a_folder_directly(call, ours):
    converted(call, "ours.pt", "folder/", "--dtype", "bf16")
    ckpt, net, d = checkpoint.load_model("folder/")
    assert (
        ckpt["classes"] == ["cat", "dog"]
        and ckpt["step"] == 77
        and torch.equal(d.beta, ours["process"]["beta"])
    )
    rounded = {name: weight.bfloat16().float() for name, weight in ours["ema"].items()}
    assert equal(dict(net.state_dict()), rounded)


def test_a_state_dict_of_a_copied_ddpm_py_is_converted(call, tmp_path):
    """Its widths and levels follow from the shapes; the rest is asked for."""
    weights = ddpm.UNet(**SMALL).state_dict()
    torch.save(weights, "w.pt")
    flags = ["--ckpt", "w.pt", "--out", "new.pt", "--groups", 4]
    words = "w.pt: is a state_dict; add --groups, --size and --schedule"
    rejected(call, *flags, "--size", 8, status=2, words=words)
    flags[-1] = 3
    how = ["--size", 8, "--schedule", "cosine"]
    rejected(call, *flags, *how, status=1, words="w.pt: num_channels (8) must be divisible by")
    how = ["--groups", 4, "--size", "8x16", "--schedule", "cosine"]
    converted(call, "w.pt", "new.pt", *how, "--timesteps", 30)
    ckpt, net, d = checkpoint.load_model("new.pt")
    assert ckpt["network"] == dict(SMALL, num_classes=None) and ckpt["shape"] == (1, 8, 16)
    assert equal(dict(net.state_dict()), dict(weights)) and torch.equal(
        d.beta, ddpm.cosine_schedule(30)
    )
    converted(call, "w.pt", "paper.pt", *how)
    assert len(checkpoint.load("paper.pt")["process"]["beta"]) == 1001


def test_weights_without_the_last_layer_are_not_a_state_dict(call):
    weights = ddpm.UNet(ch=8, mult=(1,), attention=(), groups=4).state_dict()
    torch.save({name: w for name, w in weights.items() if "conv_out" not in name}, "w.pt")
    words = "contains neither the authors' weights nor a state_dict"
    rejected(call, "--ckpt", "w.pt", "--out", "new.pt", status=1, words=words)


@pytest.mark.parametrize("flags, words", [
    (["--dtype", "bf16"], "--dtype: only for a folder"),
    (["--weights", "raw"], "--weights: has no effect"),
    (["--groups", 4], "--groups: has no effect"),
    (["--timesteps", 50], "--timesteps: has no effect"),
], ids=lambda value: value[0] if isinstance(value, list) else "")  # fmt: skip
def test_a_flag_without_effect_is_rejected(call, theirs, flags, words):
    rejected(call, "--ckpt", theirs, "--out", "new.pt", *flags, status=2, words=words)


def test_classes_have_no_effect_on_a_checkpoint(call, ours):
    rejected(
        call,
        "--ckpt",
        "ours.pt",
        "--out",
        "new.pt",
        "--classes",
        "a,b",
        status=2,
        words="--classes: has no",
    )


def test_classes_have_no_effect_on_a_folder_that_names_them(call, ours):
    converted(call, "ours.pt", "folder/")
    flags = ["--ckpt", "folder", "--out", "new.pt", "--classes", "a,b"]
    rejected(call, *flags, status=2, words="--classes: has no effect")


@pytest.mark.parametrize("text, words", [
    (b"a\na\n", "must name 2 different ones"), (b"a\n\n", "must name 2 different ones"),
    (b"a\n\xe9\n", "classes.txt: is not text in UTF-8"),
], ids=["a name twice", "an empty name", "latin-1"])  # fmt: skip
def test_class_names_that_cannot_be_told_apart_or_read_are_rejected(call, ours, text, words):
    converted(call, "ours.pt", "folder/")
    pathlib.Path("folder", "classes.txt").write_bytes(text)
    rejected(call, "--ckpt", "folder", "--out", "new.pt", status=1, words=words)


def test_a_byte_order_mark_is_not_part_of_a_class_name(call, ours):
    converted(call, "ours.pt", "folder/")
    names = ["cat", "dog"]
    pathlib.Path("folder", "classes.txt").write_text("\n".join(names), encoding="utf-8-sig")
    assert checkpoint.load("folder")["classes"] == names


def test_an_existing_output_is_not_replaced(call, theirs, tmp_path):
    (tmp_path / "old.pt").write_text("mine")
    (tmp_path / "old").mkdir()
    for out in ("old.pt", "old/"):
        rejected(
            call, "--ckpt", theirs, "--out", out, status=1, words="exists; choose another path"
        )
    assert (tmp_path / "old.pt").read_text() == "mine"


@pytest.mark.parametrize("out, status, words", [
    ("new.zip", 2, "must end in .pt for a checkpoint, or in / for a folder"),
    ("nowhere/new.pt", 1, "--out nowhere/new.pt: cannot be written: No such file or directory"),
    ("nowhere/new/", 1, "--out nowhere/new/: cannot be written: No such file or directory"),
])  # fmt: skip
def test_an_impossible_output_is_rejected(call, theirs, out, status, words):
    rejected(call, "--ckpt", theirs, "--out", out, status=status, words=words)


def test_a_missing_input_tells_where_to_find_weights(call):
    words = "no such file or folder; see docs/weights-and-fid.md"
    rejected(call, "--ckpt", "google/ddpm-cifar10-32", "--out", "new.pt", status=1, words=words)


def test_nothing_is_written_if_the_weights_cannot_be_read(call, theirs, tmp_path):
    (theirs / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged!" * 9)
    for out in ("new.pt", "new/"):
        rejected(call, "--ckpt", theirs, "--out", out, status=1, words="damaged")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]

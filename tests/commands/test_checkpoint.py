"""support/checkpoint.py: a file that is complete, checked, and runs no code."""

import os
import pickle

import pytest
import torch
from running import equal

import convert
import ddpm
import sample
import train
from support import checkpoint
from support.errors import Failure, UsageError


def edited(ckpt, tmp_path, edit):
    """Write a checkpoint with one change, sealed as ours, and return its path."""
    saved = checkpoint.load(ckpt)
    edit(saved)
    checkpoint.save(tmp_path / "edited.pt", saved)
    return tmp_path / "edited.pt"


def set_in(part, name, change):
    """Return an edit of one value of a part of the checkpoint."""

    def edit(saved):
        saved[part][name] = change(saved[part][name])

    return edit


# --- The file ------------------------------------------------------------------------------------


def test_a_checkpoint_is_read_as_it_was_written(ckpt, tmp_path):
    saved = checkpoint.load(ckpt)
    checkpoint.save(tmp_path / "again.pt", saved)
    assert equal(checkpoint.load(tmp_path / "again.pt"), saved)


def test_any_flipped_bit_and_any_cut_is_detected(ckpt, tmp_path):
    """At a hundred places, evenly spaced, the last byte among them."""
    whole = ckpt.read_bytes()
    path = tmp_path / "a.pt"
    for i in range(1, 101):
        place = len(whole) * i // 100 - 1
        damaged = bytearray(whole)
        damaged[place] ^= 1 << i % 8
        for content in (bytes(damaged), whole[:place]):
            path.write_bytes(content)
            with pytest.raises(Failure, match=r"damaged|not a complete checkpoint"):
                checkpoint.load(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"cos\nsystem\n(S'touch owned'\ntR."])
def test_another_file_is_a_failure(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(Failure, match="not a complete checkpoint"):
        checkpoint.load(tmp_path / "a.pt")


class Trap:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_no_code_of_a_file_runs(tmp_path, monkeypatch):
    """Although the file has our seal."""
    monkeypatch.chdir(tmp_path)
    checkpoint.save("a.pt", {"trap": Trap()})
    with pytest.raises(Failure, match="more than tensors"):
        checkpoint.load("a.pt")
    assert not os.path.exists("owned")
    pickle.loads(pickle.dumps(Trap()))  # the trap works
    assert os.path.exists("owned")


def test_a_format_from_the_future_is_a_failure(ckpt, tmp_path):
    path = edited(ckpt, tmp_path, lambda saved: saved.update(ddpm_format=3))
    with pytest.raises(Failure, match="format 3 is not supported"):
        checkpoint.load(path)


def first_format(saved):
    """Turn a checkpoint into one of format 1, as the first runs wrote it."""
    saved["ddpm_format"] = 1
    for part, names in (("network", ["out_channels"]), ("config", ["variance", "labels"])):
        for name in names:
            del saved[part][name]
    for name in ("process", "held_out", "split"):
        del saved[name]
    saved["config"].update(size=None, micro_batch="16", flip="no")


def test_a_checkpoint_of_format_1_loads_and_resumes(call, ckpt, tmp_path):
    """The process follows from its settings, which were kept as the text of flags."""
    path = edited(ckpt, tmp_path, first_format)
    old, new = checkpoint.load(path), checkpoint.load(ckpt)
    for name in ("process", "network", "model", "ema"):
        assert equal(old[name], new[name]), name
    status, _, err = call(train, "--resume", path, "--epochs", 5, "--sample-every", 0)
    assert status == 0, err
    again = tmp_path / "again.pt"
    again.write_bytes(ckpt.read_bytes())
    assert call(train, "--resume", again, "--epochs", 5, "--sample-every", 0)[0] == 0
    assert equal(checkpoint.load(path)["model"], checkpoint.load(again)["model"])


# --- Contents ------------------------------------------------------------------------------------

CONTENTS = {
    "network.ch": set_in("network", "ch", str),
    "network.dropout": lambda saved: saved["network"].pop("dropout"),
    "field: network)": lambda saved: saved["network"].update(depth=3),
    "classes": lambda saved: saved["classes"].pop(),
    "shape": lambda saved: saved.update(shape=(3, 16, 16)),
    "process.variance": set_in("process", "variance", lambda _: "learned"),
    "process.beta": set_in("process", "beta", lambda _: [0.0, 0.1]),
    "ema.conv_in.weight": set_in("ema", "conv_in.weight", lambda w: w[:1]),
    "model.conv_in.bias": set_in("model", "conv_in.bias", lambda w: w.double()),
    "model.conv_out.bias": lambda saved: saved["model"].pop("conv_out.bias"),
    "ema.extra": lambda saved: saved["ema"].update(extra=torch.zeros(1)),
    "optimizer)": lambda saved: saved.pop("optimizer"),
}


@pytest.mark.parametrize("field", CONTENTS)
def test_a_part_that_does_not_fit_is_a_failure_that_names_the_field(ckpt, tmp_path, field):
    path = edited(ckpt, tmp_path, CONTENTS[field])
    with pytest.raises(Failure, match="settings and weights do not match") as error:
        checkpoint.load(path)
    assert field in str(error.value)


def test_a_table_of_betas_or_a_width_that_ddpm_rejects_is_a_failure(ckpt, tmp_path):
    for edit in (
        set_in("process", "beta", torch.zeros_like),
        set_in("network", "groups", lambda n: 3),
    ):
        with pytest.raises(Failure, match=r"edited\.pt: "):
            checkpoint.load(edited(ckpt, tmp_path, edit))


@pytest.mark.parametrize("change", [
    lambda state: state.update(exp_avg=torch.zeros(3)),
    lambda state: state.update(exp_avg=torch.zeros(1).expand(state["exp_avg"].shape)),
    lambda state: state.update(exp_avg_sq=state["exp_avg_sq"].double()),
    lambda state: state.update(step=torch.zeros(2)),
    lambda state: state.pop("step"),
], ids=["short", "expanded", "float64", "two steps", "no step"])  # fmt: skip
def test_an_optimiser_state_of_another_shape_is_not_loaded(call, ckpt, tmp_path, change):
    """Adam's kernels would write beyond the end of a short tensor."""
    path = edited(ckpt, tmp_path, lambda saved: change(saved["optimizer"]["state"][0]))
    status, _, err = call(train, "--resume", path, "--epochs", 9)
    assert status == 1 and "(field: optimizer.0." in err and err.count("\n") == 1


def test_no_path_of_a_checkpoint_is_written_to(call, ckpt, tmp_path):
    """Neither its log nor its data folder nor its output: the command line decides."""
    there = tmp_path / "there"
    there.mkdir()
    paths = dict(log=str(there / "log"), data_dir=str(there), out=str(there / "out.pt"))
    path = edited(ckpt, tmp_path, lambda saved: saved["config"].update(paths))
    status, out, err = call(train, "--resume", path, "--epochs", 5, "--sample-every", 0)
    assert status == 0 and "no log is written; to continue it: --log" in out, err
    assert not list(there.iterdir()) and checkpoint.load(path)["step"] == 20


# --- Networks from it ----------------------------------------------------------------------------


def test_a_diffusers_folder_is_a_checkpoint_without_a_run(call, ckpt, tmp_path):
    """It samples the same image as the checkpoint, and cannot be resumed."""
    assert call(convert, "--ckpt", ckpt, "--out", "folder/", "--dtype", "fp32")[0] == 0
    ours, theirs = checkpoint.load(ckpt), checkpoint.load("folder")
    assert equal(theirs["ema"], ours["ema"]) and theirs["classes"] == ours["classes"]
    assert not checkpoint.holds_run(theirs)
    for path, out in ((ckpt, "a.npz"), ("folder", "b.npz")):
        flags = ["--ckpt", path, "--out", out, "--precision", "fp32"]
        assert call(sample, *flags, "--n", 2, "--steps", 2)[0] == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    status, _, err = call(train, "--resume", "folder")
    assert status == 2 and "use --init instead" in err


@pytest.mark.parametrize("classes", [["7", "new", "2"], []], ids=["some", "none"])
def test_weights_with_other_classes_predict_the_same_eps(ckpt, classes):
    """A class keeps its effect by its name; a new class, and no class at all, begin as "no label"."""
    saved, net, _ = checkpoint.load_model(ckpt)
    with torch.no_grad():  # so that each label has an effect
        net.label.weight.normal_()
    saved["ema"] = net.state_dict()
    other = ddpm.UNet(**dict(saved["network"], num_classes=len(classes) or None)).eval()
    other.load_state_dict(checkpoint.starting_weights(saved, classes))
    x, t = torch.randn(1, *saved["shape"]), torch.tensor([5])
    for k, name in enumerate([*classes, None]):
        old = saved["classes"].index(name) if name in saved["classes"] else 10
        y = torch.tensor([k]) if classes else None
        torch.testing.assert_close(other(x, t, y), net(x, t, torch.tensor([old])))


def test_a_schedule_that_underflows_is_a_wrong_call(call):
    with pytest.raises(UsageError, match="alpha_bar underflows to 0"):
        checkpoint.process("linear", 100_000, "fixed")
    flags = ["--schedule", "linear", "--timesteps", 100_000, "--device", "cpu"]
    status, out, err = call(train, *flags)
    assert status == 2 and out == "" and "--timesteps 100000: with --schedule linear" in err

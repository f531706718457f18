"""Checkpoints from strangers: sealed as ours, but with contents that this program would not have written."""

import copy
import io
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from running import ROOT, TINY, stripes

import evaluate
import figures
import sample
import train
from support import checkpoint, recipes, weight_files
from support.command import flag_name
from support.errors import UsageError


def change(part, **values):
    """An edit of one dictionary of the checkpoint."""

    def edit(ckpt):
        ckpt[part].update(values)

    return edit


def state(name, make):
    """An edit of one tensor of the optimiser."""

    def edit(ckpt):
        of_first = ckpt["optimizer"]["state"][0]
        of_first[name] = make(of_first[name])

    return edit


def group(**values):
    def edit(ckpt):
        ckpt["optimizer"]["param_groups"][0].update(values)

    return edit


def without(part, name):
    def edit(ckpt):
        del ckpt[part][name]

    return edit


OPTIMISERS = {
    "a short average": state("exp_avg", lambda x: torch.zeros(3)),
    "one number as an average": state("exp_avg_sq", lambda x: torch.zeros(1).expand(x.shape)),
    "an average in another layout": state(
        "exp_avg", lambda x: torch.zeros(x.shape).mT.contiguous().mT
    ),
    "an average in float64": state("exp_avg", lambda x: x.double()),
    "an average that is a list": state("exp_avg", lambda x: x.tolist()),
    "a step that is a number": state("step", lambda x: 3),
    "a step with a gradient": state("step", lambda x: x.requires_grad_()),
    "two steps": state("step", lambda x: x.repeat(2)),
    "another setting": group(weight_decay=0.5),
    "a setting of another type": group(betas=[0.9, 0.999]),
    "a setting more": group(momentum=0.9),
    "an infinite rate": group(lr=float("inf")),
    "no state": lambda ckpt: ckpt["optimizer"].update(state={}),
    "the states of other weights": lambda ckpt: ckpt["optimizer"]["state"].update({999: {}}),
    "two groups": lambda ckpt: ckpt["optimizer"].update(
        param_groups=ckpt["optimizer"]["param_groups"] * 2
    ),
}
CONTENTS = {
    "no groups": change("network", groups=0),
    "a level of no channels": change("network", mult=(0, 1, 1)),
    "blocks below 0": change("network", blocks=-1),
    "channels that are true": change("network", ch=True),
    "a text for channels": change("network", ch="8"),
    "attention at a level that is not there": change("network", attention=(9,)),
    "an argument more": change("network", depth=3),
    "an argument less": without("network", "dropout"),
    "a dropout above 1": change("network", dropout=1.5),
    "more classes than names": change("network", num_classes=10**9),
    "a size of no image": lambda ckpt: ckpt.update(shape=(1, 10**9, 16)),
    "a step below 0": lambda ckpt: ckpt.update(step=-1),
    "weights in float64": lambda ckpt: ckpt.update(
        ema={k: v.double() for k, v in ckpt["ema"].items()}
    ),
    "a table that is none": change("process", beta=torch.zeros(3)),
    "a table with a gradient": lambda ckpt: ckpt["process"]["beta"].requires_grad_(),
    "a schedule of another name": change("process", schedule="steep"),
}


def edited(ckpt, edit, path):
    saved = checkpoint.load(ckpt)
    edit(saved)
    checkpoint.save(path, saved)


@pytest.mark.parametrize("edit", OPTIMISERS.values(), ids=OPTIMISERS)
def test_an_optimiser_that_is_not_this_runs_own_is_refused(call, ckpt, tmp_path, edit):
    """In names, shapes, types, layout and settings: a kernel would write beyond the end of a short tensor."""
    edited(ckpt, edit, tmp_path / "a.pt")
    status, _, err = call(train, "--resume", "a.pt", "--epochs", 9)
    assert (status, err) == (1, "train.py: error: a.pt: its contents do not fit together\n")


@pytest.mark.parametrize("edit", CONTENTS.values(), ids=CONTENTS)
def test_a_value_that_could_not_have_been_written_is_refused(call, ckpt, tmp_path, edit):
    """By type and range, where it is read; by every command."""
    edited(ckpt, edit, tmp_path / "a.pt")
    for command, flags in (
        (train, ["--resume", "a.pt"]),
        (sample, ["--ckpt", "a.pt", "--out", "a.png"]),
    ):
        status, _, err = call(command, *flags)
        assert status == 1 and err.endswith("a.pt: its contents do not fit together\n"), err


def test_a_gigantic_network_is_refused_before_it_takes_memory(ckpt, tmp_path):
    """A network of 64 times the channels, in a process of 3 GB."""
    edited(ckpt, change("network", ch=4096, groups=32), tmp_path / "a.pt")
    command = f"ulimit -v 3000000; {sys.executable} {ROOT / 'sample.py'} --ckpt a.pt --out a.png"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 1 and done.stderr.endswith(
        "a.pt: its contents do not fit together\n"
    ), done


def test_a_checkpoint_can_name_as_many_classes_as_a_run_may_have(tmp_path):
    """By names of 40 letters; a run with more is refused when it starts."""
    names = [f"{i:040d}" for i in range(recipes.MOST_CLASSES)]
    torch.save({"classes": names}, tmp_path / "a.pt")
    weight_files.check_archive(tmp_path / "a.pt")
    shape, cfg = (3, 8, 8), train.Config(data="album", width=8, dropout=0.0)
    assert recipes.network(cfg, shape, len(names))["num_classes"] == len(names)
    with pytest.raises(UsageError, match="--labels: 25,001 classes"):
        recipes.network(cfg, shape, len(names) + 1)


def test_a_compressed_archive_is_not_unpacked(call, ckpt, tmp_path):
    """torch.save never compresses; a file of a megabyte could become any number of them."""
    packed = io.BytesIO()
    with zipfile.ZipFile(ckpt) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    data = packed.getvalue() + checkpoint.SEAL
    (tmp_path / "a.pt").write_bytes(data + checkpoint.hashlib.sha256(packed.getvalue()).digest())
    status, _, err = call(sample, "--ckpt", "a.pt", "--out", "a.png")
    assert status == 1 and "a.pt: sealed as a checkpoint, but cannot be read as one" in err


def test_too_little_memory_is_not_a_foreign_file(call, ckpt, monkeypatch):
    def full(*args, **how):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
        )

    monkeypatch.setattr(torch, "load", full)
    status, _, err = call(sample, "--ckpt", ckpt, "--out", "a.png")
    assert status == 1 and "out of memory" in err


def test_no_path_of_a_checkpoint_is_written_to(call, ckpt, tmp_path):
    """Its log and its folder of caches are not those of the run that goes on."""
    there = tmp_path / "there"
    edited(ckpt, change("config", log=str(there / "log"), data_dir=str(there), out=str(there / "out.pt")),
           tmp_path / "a.pt")  # fmt: skip
    there.mkdir()
    status, _, err = call(train, "--resume", "a.pt", "--epochs", 5, "--sample-every", 0)
    assert status == 0, err
    assert not list(there.iterdir()) and checkpoint.load(tmp_path / "a.pt")["config"]["log"] is None


def test_a_path_of_a_checkpoint_is_shown_before_it_is_read(call, tmp_path):
    """So that a person can see what a stranger's file makes the command read."""
    (tmp_path / "album").mkdir()
    stripes(20, 20).save(tmp_path / "album" / "a.png")
    tiny = [flag for flag in TINY if flag not in ("--limit", "64")]
    assert call(train, "--data", "album", "--size", 8, *tiny, "--epochs", 1)[0] == 0
    (tmp_path / "album" / "a.png").unlink()
    status, out, err = call(train, "--resume", "ckpt.pt", "--epochs", 2)
    assert status == 1 and out == f"ckpt.pt: goes on with the images of {tmp_path / 'album'}\n", (
        out,
        err,
    )


def test_an_archive_whose_members_overlap_or_with_two_directories_is_not_unpacked(
    call, ckpt, tmp_path
):
    """Members that share their bytes say that they hold more than the file; torch and Python look for the
    directory in different places."""
    whole = ckpt.read_bytes()
    body = whole[: whole.rindex(checkpoint.SEAL)]
    end = body.rindex(b"PK\5\6")
    extra = (
        body[:end] + b"PK\1\2" + bytes(50) + body[end:]
    )  # something between the directory and its record
    grown = io.BytesIO()
    with zipfile.ZipFile(ckpt) as old, zipfile.ZipFile(grown, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
        big = max(new.infolist(), key=lambda member: member.file_size)
        for i in range(9):
            more = copy.copy(big)
            more.filename = f"archive/data/more{i}"
            new.filelist.append(more)
    for content in (extra, grown.getvalue()):
        digest = checkpoint.hashlib.sha256(content).digest()
        (tmp_path / "a.pt").write_bytes(content + checkpoint.SEAL + digest)
        status, _, err = call(sample, "--ckpt", "a.pt", "--out", "a.png")
        assert status == 1 and err.endswith(
            "a.pt: sealed as a checkpoint, but cannot be read as one\n"
        ), err


@pytest.mark.parametrize("edit", [
    lambda ckpt: ckpt.update(ddpm_format=torch.ones(3)), lambda ckpt: ckpt.update(ddpm_format="x" * 300_000),
], ids=["a tensor", "a long text"])  # fmt: skip
def test_a_format_that_is_no_number_is_refused(call, ckpt, tmp_path, edit):
    saved = checkpoint.load(ckpt)
    edit(saved)
    checkpoint.save(tmp_path / "a.pt", saved)
    status, _, err = call(sample, "--ckpt", "a.pt", "--out", "a.png")
    assert (status, err) == (
        1,
        "sample.py: error: a.pt: sealed as a checkpoint, but does not hold one\n",
    )


@pytest.mark.parametrize("values", [
    dict(epochs=10**18), dict(batch_size=2**31 + 1), dict(data="\ud800x"), dict(data="/a/folder", size=None),
], ids=["epochs", "batch", "no path", "no size"])  # fmt: skip
def test_a_setting_that_no_flag_could_give_is_refused(call, ckpt, tmp_path, values):
    edited(ckpt, change("config", **values), tmp_path / "a.pt")
    status, _, err = call(train, "--resume", "a.pt", "--epochs", 9)
    assert (status, err) == (1, "train.py: error: a.pt: its contents do not fit together\n")


@pytest.mark.parametrize(
    "setting", [dict(device="cuda:7"), dict(micro_batch="none")], ids=lambda s: min(s)
)
def test_a_setting_that_nobody_typed_is_said_to_be_the_checkpoints(call, ckpt, tmp_path, setting):
    """As of a run that is resumed on another machine; a flag that is typed takes its place."""
    edited(ckpt, change("config", **setting), tmp_path / "a.pt")
    [flag] = map(flag_name, setting)
    status, _, err = call(train, "--resume", "a.pt", "--epochs", 5)
    assert status == 2 and err.endswith(f"(a.pt says so; {flag} changes it)\n"), err
    value = {"--device": "cpu", "--micro-batch": 16}[flag]
    assert call(train, "--resume", "a.pt", "--epochs", 5, flag, value)[0] == 0


def test_what_a_checkpoint_says_is_shown_in_one_line_without_escapes(call, ckpt, tmp_path):
    """A terminal obeys escapes, and a second line could pass for the command's own."""
    edited(ckpt, change("config", data="/x\x1b[31m\nevaluate.py: forged"), tmp_path / "a.pt")
    status, _, err = call(evaluate, "--ckpt", "a.pt")
    assert status == 1 and err.count("\n") == 2 and "\x1b" not in err and "\\x1b[31m\\n" in err, err


@pytest.mark.parametrize("command, flags", [
    (sample, "--ckpt c.png --out c.png"), (sample, "--ckpt c.png --out link.png"),
    (figures, "--ckpt schedules.png --only schedules --out ."),
], ids=["sample", "a link", "figures"])  # fmt: skip
def test_a_checkpoint_is_not_replaced_by_a_picture(call, ckpt, tmp_path, command, flags):
    for name in ("c.png", "schedules.png"):
        (tmp_path / name).write_bytes(ckpt.read_bytes())
    (tmp_path / "link.png").symlink_to("c.png")
    status, _, err = call(command, *flags.split())
    assert status == 2 and "is what the command reads" in err
    assert (
        (tmp_path / "c.png").read_bytes()
        == (tmp_path / "schedules.png").read_bytes()
        == ckpt.read_bytes()
    )

"""train.py: Algorithm 1, exact resuming, and what a run keeps of others."""

import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from checks import close
from PIL import Image
from running import ROOT, TINY, equal, start, stripes

import ddpm
import reference_numpy as ref
import train
from support import batches, checkpoint, files, monitor

WITHOUT_LIMIT = [flag for flag in TINY if flag not in ("--limit", "64")]


# --- What is printed and written -----------------------------------------------------------------


def test_a_run_prints_what_it_does_and_leaves_a_checkpoint_a_log_and_grids(trained):
    folder, out = trained
    for words in (
        "glyphs: 64 images, 16x16x1, 10 classes (0, 1, 2, 3, 4, 5, 6, 7, 8, 9); 512 more are held out",
        "71,385 parameters",
        "lr 0.004",
        "settings: a small network",
        "seconds in fp32, 16 images at a time; about ",
        "are free",
        "4 epochs, 16 steps: about 0:0",
        "ckpt.pt: step 16 is done; now: python sample.py --ckpt ckpt.pt --out grid.png",
    ):
        assert words in out, out
    epochs = [line.split(":")[0] for line in out.splitlines() if line.startswith("epoch")]
    assert epochs == [f"epoch {i} of 4" for i in (1, 2, 3, 4)]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 16 and log[-1]["loss"] < log[0]["loss"]
    assert sorted(p.name for p in folder.glob("ckpt*.png")) == ["ckpt.0002.png", "ckpt.0004.png"]
    assert Image.open(folder / "ckpt.0004.png").size == (4 * 66 + 2, 10 * 66 + 2)  # 4 per digit


def test_the_loss_that_is_shown_is_the_mean_since_the_last_report(call, monkeypatch):
    """Of every step of the interval, not of one batch: in the log and on the line of each epoch."""
    losses, loss_simple = [], train.ddpm.loss_simple

    def recording(*args):
        loss = loss_simple(*args)
        if torch.is_grad_enabled():  # not the loss on held-out images
            losses.append(loss.item())
        return loss

    monkeypatch.setattr(train.ddpm, "loss_simple", recording)
    status, out, err = call(train, *TINY, "--epochs", 3, "--log", "log.jsonl")
    assert status == 0, err
    shown = [float(x) for x in re.findall(r"^epoch \d of 3: loss ([\d.]+),", out, re.MULTILINE)]
    close("loss of each epoch", shown, np.reshape(losses, (3, 4)).mean(1), 6e-5, 1.0)
    first = 0
    for line in map(json.loads, pathlib.Path("log.jsonl").read_text().splitlines()):
        mean = np.mean(losses[first : line["step"]])
        close(f"loss at step {line['step']}", line["loss"], mean, 1e-6, 1.0)
        first = line["step"]
    assert first == 12


# --- Algorithm 1 ---------------------------------------------------------------------------------


def test_micro_batches_make_the_step_of_the_whole_batch(call):
    """Three images at a time, of batches of 16: the same weights, but for the order of sums."""
    flags = "--limit 64 --batch-size 16 --width 8 --timesteps 20 --warmup 0 --device cpu --epochs 2"
    for micro in (3, 16):
        how = ["--micro-batch", micro, "--precision", "fp32", "--variance", "learned"]
        how += ["--sample-every", 0, "--lr", 1e-4, "--out", f"{micro}.pt"]
        status, _, err = call(train, *flags.split(), *how)
        assert status == 0, err
    few, all_at_once = (checkpoint.load(f"{micro}.pt")["model"] for micro in (3, 16))
    for name, weight in all_at_once.items():
        close(name, few[name], weight, 2e-5, 1.0)


def test_training_drops_labels_so_that_no_label_is_learned_too(call):
    """A tenth of them: the last row of the label table, "no label", moves as the others do."""
    assert call(train, *TINY, "--epochs", 4, "--decay", "none")[0] == 0
    saved = checkpoint.load("ckpt.pt")
    torch.manual_seed(batches.mixed(0, 0))
    first = ddpm.UNet(**saved["network"]).label.weight.detach()
    moved = (saved["model"]["label.weight"] - first).norm(dim=1)
    assert moved.shape == (11,) and (moved > 0).all(), moved


def test_the_average_is_the_closed_form_with_the_ramp(call):
    """After n updates: sum of (1 - d_i) d_{i+1} .. d_n w_i with d_n = min(ema, (1 + n) / (10 + n))."""
    flags = [*WITHOUT_LIMIT, "--decay", "none", "--ema", 0.3, "--limit", 16]
    history = []
    for epochs in (1, 2, 3, 4):
        assert call(train, *flags, "--epochs", epochs)[0] == 0
        saved = checkpoint.load("ckpt.pt")
        history.append(saved["model"]["conv_in.weight"].numpy())
    torch.manual_seed(batches.mixed(0, 0))
    first = ddpm.UNet(**saved["network"]).conv_in.weight.detach().numpy()
    close("EMA", saved["ema"]["conv_in.weight"], ref.ema([first, *history], 0.3), 1e-5, 1.0)


def test_the_learning_rate_rises_and_falls():
    cfg = train.Config(lr=2.0, warmup=4, decay="cosine")
    rates = [train.learning_rate(cfg, step, 100) for step in range(100)]
    assert (
        rates[0] == pytest.approx(0.5)
        and max(rates) < 2
        and rates[99] == pytest.approx(0, abs=1e-3)
    )
    assert rates[50] == pytest.approx(1.0) and rates[:4] == sorted(rates[:4])
    flat = train.Config(lr=2.0, warmup=0, decay="none")
    assert {train.learning_rate(flat, step, 100) for step in range(100)} == {2.0}


def test_deterministic_changes_nothing_on_the_cpu(call):
    """Its kernels are exact already; on a GPU the flag makes them so, or names one that cannot be."""
    for name, flags in (("a.pt", []), ("b.pt", ["--deterministic"])):
        assert call(train, *TINY, "--epochs", 1, "--out", name, *flags)[0] == 0
        torch.use_deterministic_algorithms(False)
    assert equal(checkpoint.load("a.pt")["model"], checkpoint.load("b.pt")["model"])


# --- Stopping and resuming -----------------------------------------------------------------------


def test_a_run_that_is_interrupted_and_resumed_equals_one_that_is_not(call, tmp_path):
    """Ctrl-C after the first epoch: the checkpoint is whole, and the run continues bit for bit."""
    flags = [*TINY, "--epochs", 8, "--dropout", 0.1, "--flip", "yes", "--variance", "learned"]
    process = start("train.py", *flags, "--out", "a.pt", cwd=tmp_path)
    while not process.stdout.readline().startswith("epoch 1 of 8"):
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130 and "continue with --resume a.pt" in out, err
    stopped = checkpoint.load(tmp_path / "a.pt")["step"]
    assert 4 <= stopped < 32, "the run ended before it could be interrupted"
    for command in ([*flags, "--out", "b.pt"], ["--resume", "a.pt"]):
        status, _, err = call(train, *command)
        assert status == 0, err
    a, b = (checkpoint.load(tmp_path / name) for name in ("a.pt", "b.pt"))
    for part in ("model", "ema", "optimizer", "step"):
        assert equal(a[part], b[part]), f"{part} differs"


def test_a_terminal_that_is_closed_ends_the_run_with_a_checkpoint(tmp_path):
    """As a lost ssh connection does: SIGHUP, and nowhere left to write to."""
    pty = pytest.importorskip("pty")
    import fcntl
    import termios

    leader, follower = pty.openpty()

    def at_the_terminal():
        os.setsid()
        fcntl.ioctl(follower, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may be under nohup

    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *TINY, "--epochs", "500"],
        cwd=tmp_path,
        stdout=follower,
        stderr=follower,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=at_the_terminal,
    )
    os.close(follower)
    shown = b""
    while b"epoch 1 of 500:" not in shown:
        shown += os.read(leader, 1000)
    os.close(leader)
    process.wait(timeout=100)
    assert process.returncode > 0, "killed, not ended"
    assert checkpoint.load(tmp_path / "ckpt.pt")["step"] >= 4


@pytest.fixture
def stopping_at(monkeypatch):
    """Make a run receive SIGTERM before the report of this step."""

    def stopping_at(step):
        report = monitor.Monitor.report

        def reporting(self, *args):
            if self.run.step == step:
                self.signals.append(signal.SIGTERM)
            report(self, *args)

        monkeypatch.setattr(monitor.Monitor, "report", reporting)

    return stopping_at


def test_a_run_that_is_stopped_at_the_end_of_an_epoch_writes_its_grid(call, tmp_path, stopping_at):
    stopping_at(4)
    status, out, _ = call(train, *TINY[:-2], "--epochs", 4, "--sample-every", 1)
    assert status == 143 and "stopped at step 4 of 16" in out
    assert (tmp_path / "ckpt.0001.png").is_file()
    assert checkpoint.load("ckpt.pt")["step"] == 4


@pytest.mark.parametrize("flags, words", [
    ("--width 16", "--width 16: the run to resume has 8"),
    ("--variance learned", "--variance learned: the run to resume has fixed"),
    ("--timesteps 30", "--timesteps 30: the run to resume has 20"),
    ("--epochs 4", "has done 4 epochs; continue with more --epochs"),
    ("--init a.pt", "--init: starts a new run, and --resume continues one"),
    ("--epochs 9 --minutes 3", "--minutes: chooses --epochs"),
])  # fmt: skip
def test_a_flag_that_a_run_cannot_change_is_rejected(call, ckpt, tmp_path, flags, words):
    (tmp_path / "a.pt").write_bytes(ckpt.read_bytes())
    status, _, err = call(train, "--resume", "a.pt", *flags.split())
    assert status == 2 and words in err.splitlines()[-1]
    assert (tmp_path / "a.pt").read_bytes() == ckpt.read_bytes()


def test_a_run_whose_images_changed_is_not_resumed_and_init_is_offered(call, tmp_path):
    """One image more, or another one; the folder may move."""
    album = tmp_path / "album"
    album.mkdir()
    stripes(8, 8).save(album / "a.png")
    tiny = "--batch-size 2 --width 8 --timesteps 5 --device cpu --micro-batch 2 --sample-every 0"
    how = [*tiny.split(), "--size", 8, "--precision", "fp32"]
    assert call(train, "--data", "album", "--epochs", 1, *how)[0] == 0
    stripes(8, 8).save(album / "b.png")
    status, _, err = call(train, "--resume", "ckpt.pt", "--epochs", 9)
    assert status == 1 and "(images: 1 before, 2 now)" in err and "--init ckpt.pt" in err
    (album / "b.png").unlink()
    album.rename(tmp_path / "moved")
    status, _, err = call(train, "--resume", "ckpt.pt", "--epochs", 9, "--data", "moved")
    assert status == 0, err
    Image.new("RGB", (8, 8)).save(tmp_path / "moved" / "a.png")
    status, _, err = call(train, "--resume", "ckpt.pt", "--epochs", 99)
    assert status == 1 and "the images have changed since the run began (fingerprint: " in err


@pytest.mark.parametrize("error", [AttributeError, TypeError, ValueError, RuntimeError])
@pytest.mark.parametrize("flag", ["--resume", "--init"])
def test_a_bug_of_ours_is_a_traceback_and_not_the_checkpoints_fault(
    call, ckpt, monkeypatch, error, flag
):
    def broken(self, state):
        raise error("a bug")

    monkeypatch.setattr(train.ddpm.UNet, "load_state_dict", broken)
    with pytest.raises(error, match="a bug"):
        call(train, flag, ckpt, "--epochs", 9, "--device", "cpu", "--out", "new.pt")


# --- What a run keeps of others ------------------------------------------------------------------


def test_a_second_run_moves_the_first_ones_checkpoint_and_grids_aside(call, tmp_path):
    """Their new name is printed; a third run takes the next number, and a resumed run none."""
    flags = [*TINY[:-2], "--epochs", 1, "--sample-every", 1]
    for seed in (0, 1, 2):
        status, _, err = call(train, *flags, "--seed", seed)
        assert status == 0 and (f"is now ckpt.{seed}.pt" in err) == (seed > 0), err
    names = {"ckpt.1.pt": 0, "ckpt.2.pt": 1, "ckpt.pt": 2}
    assert {name: checkpoint.load(name)["config"]["seed"] for name in names} == names
    for name in names:
        assert (tmp_path / files.grid_name(name, 1)).is_file()
    status, _, err = call(train, "--resume", "ckpt.1.pt", "--epochs", 2, "--sample-every", 0)
    assert status == 0 and not (tmp_path / "ckpt.3.pt").exists() and "is now" not in err


def test_a_file_that_another_program_writes_meanwhile_is_kept(call, monkeypatch, tmp_path):
    """As convert.py --out ckpt.pt during the run: the run is saved under the next number."""
    number = itertools.count()
    save = train.save

    def saving(cfg, run):
        save(cfg, run)
        if next(number) == 0:
            pathlib.Path("ckpt.pt").write_text("another program's")

    monkeypatch.setattr(train, "save", saving)
    flags = [*TINY[:-2], "--epochs", 2, "--sample-every", 1]
    status, out, err = call(train, *flags)
    assert status == 0 and "another program wrote ckpt.pt; this run is saved to ckpt.1.pt" in err
    assert (tmp_path / "ckpt.pt").read_text() == "another program's"
    assert checkpoint.load("ckpt.1.pt")["step"] == 8 and "--ckpt ckpt.1.pt" in out


def test_a_call_that_is_rejected_moves_nothing(call, tmp_path):
    (tmp_path / "ckpt.pt").write_text("the old one")
    (tmp_path / "album").mkdir()
    for flags, code in (
        ("--width 10", 2),
        ("--log ckpt.pt", 2),
        ("--out new.pt --log ckpt.pt", 1),
        ("--size 32", 2),
        ("--skip-broken", 2),
        ("--device none", 2),
        ("--data album --size 30x32", 2),
        ("--data album --out album/a.pt", 2),
        ("--data album --log album/log.jsonl", 2),
        ("--out new.pt --log ./new.pt", 2),
        ("--compile --precision bf16 --device cpu", 2),
        ("--data nowhere", 1),
        ("--data album --size 32", 1),
        ("--out nowhere/ckpt.pt", 1),
        ("--init ckpt.pt", 1),
    ):
        status, _, err = call(train, *flags.split())
        assert status == code and err.count("\n") == 1, (flags, err)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "data") == [
        "album",
        "ckpt.pt",
    ]


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(call, tmp_path):
    (tmp_path / "ckpt.pt").write_text("the old one")
    status, _, err = call(train, *TINY, "--epochs", 3, "--lr", 1e30)
    assert status == 1 and "step 4: the loss is nan; try a lower --lr" in err
    assert (tmp_path / "ckpt.1.pt").read_text() == "the old one"
    assert not (tmp_path / "ckpt.pt").exists()


# --- Fine-tuning ---------------------------------------------------------------------------------


def test_init_starts_a_new_run_from_the_average_weights(call, ckpt, tmp_path):
    """At step 0, in a new file, with a tenth of the rate. The old file stays, and is not claimed."""
    (tmp_path / "a.pt").write_bytes(ckpt.read_bytes())
    flags = "--limit 16 --batch-size 16 --epochs 1 --device cpu --precision fp32 --micro-batch 16"
    status, out, err = call(train, "--init", "a.pt", *flags.split(), "--sample-every", 0, "--lr", 0)
    assert status == 0 and "starts from ema weights at step 16 of a.pt" in out, err
    tuned, old = checkpoint.load("a-tuned.pt"), checkpoint.load("a.pt")
    assert equal(tuned["model"], old["ema"]) and tuned["step"] == 1
    assert (tmp_path / "a.pt").read_bytes() == ckpt.read_bytes()
    status, _, err = call(train, "--init", "a.pt", "--out", "a.pt")
    assert status == 2 and "--init reads this file" in err


def test_a_grey_network_reads_photos_in_grey_and_says_so(call, ckpt, tmp_path):
    (tmp_path / "album").mkdir()
    stripes(20, 20).save(tmp_path / "album" / "a.png")
    flags = "--data album --batch-size 1 --epochs 1 --device cpu --precision fp32 --micro-batch 1"
    status, out, err = call(train, "--init", ckpt, *flags.split(), "--sample-every", 0)
    assert status == 0 and "its network is grey, so the images are read as grey" in out, err
    assert not (tmp_path / "ckpt.pt").exists()  # only ckpt-tuned.pt is written

"""train.py: what it leaves, that its runs are exact, and which runs it does not go on with."""

import fcntl
import io
import itertools
import json
import os
import pathlib
import pty
import signal
import subprocess
import sys
import termios
from dataclasses import replace

import numpy as np
import pytest
import torch
from judge import close
from PIL import Image
from running import ROOT, TINY, equal, start, stripes

import ddpm
import reference_numpy as ref
import train
from support import batches, budget, checkpoint, devices, monitor, recipes, sampling, snapshots
from support.errors import Failure


def test_training_says_what_it_does_and_leaves_a_checkpoint_a_log_and_grids(trained):
    folder, out = trained
    lines = out.splitlines()
    assert lines[0].startswith("trying a step") and lines[1].startswith("glyphs: 64 images")
    assert "parameters" in lines[2] and "lr 0.004" in lines[3]
    assert [line.split(":")[0] for line in lines if line.startswith("epoch")] == [
        f"epoch {i} of 4" for i in (1, 2, 3, 4)]  # fmt: skip
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 16 and log[-1]["loss"] < log[0]["loss"]
    assert sorted(p.name for p in folder.glob("ckpt*.png")) == ["ckpt.0002.png", "ckpt.0004.png"]
    assert Image.open(folder / "ckpt.0004.png").size == (
        4 * 66 + 2,
        10 * 66 + 2,
    )  # four of each digit


def test_training_drops_labels_so_that_no_label_is_learned_too(call):
    """A tenth of them: the last row of the label table, "no label", is moved as the others are."""
    assert call(train, *TINY, "--epochs", 4, "--decay", "none")[0] == 0
    saved = checkpoint.load("ckpt.pt")
    torch.manual_seed(batches.mixed(0, 0))
    first = ddpm.UNet(**saved["network"]).label.weight.detach()
    moved = (saved["model"]["label.weight"] - first).norm(dim=1)
    assert moved.shape == (11,) and (moved > 0).all(), moved


def test_ema_is_the_closed_form_with_the_ramp(call):
    """After n updates: sum of (1 - d_i) d_{i+1} .. d_n w_i with d_n = min(ema, (1 + n) / (10 + n))."""
    flags = [*TINY, "--decay", "none", "--ema", 0.3, "--limit", 16]
    history = []
    for epochs in (1, 2, 3, 4):
        assert call(train, *flags, "--epochs", epochs)[0] == 0
        saved = checkpoint.load("ckpt.pt")
        history.append(saved["model"]["conv_in.weight"].numpy())
    torch.manual_seed(batches.mixed(0, 0))
    first = ddpm.UNet(**saved["network"]).conv_in.weight.detach().numpy()
    close("EMA", saved["ema"]["conv_in.weight"], ref.ema([first, *history], 0.3), 1e-5, 1.0)


def test_the_loss_that_is_shown_is_the_mean_since_the_last_one(call, monkeypatch):
    """Of every step of the interval, not of one batch: in the log and on the line of each epoch."""
    losses, loss_simple = [], ddpm.loss_simple

    def recording(*args):
        loss = loss_simple(*args)
        if torch.is_grad_enabled():  # not that of images held out
            losses.append(loss.item())
        return loss

    monkeypatch.setattr(ddpm, "loss_simple", recording)
    status, out, err = call(train, *TINY, "--epochs", 3, "--log", "log.jsonl")
    assert status == 0, err
    shown = [
        float(line.split("loss ")[1].split(",")[0]) for line in out.splitlines() if ": loss" in line
    ]
    close("loss of each epoch", shown, np.reshape(losses, (3, 4)).mean(1), 6e-5, 1.0)
    first = 0
    for line in map(json.loads, pathlib.Path("log.jsonl").read_text().splitlines()):
        close(
            f"loss at step {line['step']}",
            line["loss"],
            np.mean(losses[first : line["step"]]),
            1e-6,
            1.0,
        )
        first = line["step"]
    assert first == 12


def test_batches_go_through_all_images_once_an_epoch_in_an_order_that_the_seed_decides():
    """Steps of 4 in 10 images: any ten images in a row from a multiple of ten are all ten."""
    row = torch.cat([batches.places(step, 4, 10, seed=1) for step in range(10)]).tolist()
    assert all(sorted(row[i : i + 10]) == list(range(10)) for i in range(0, 40, 10))
    other = torch.cat([batches.places(step, 4, 10, seed=2) for step in range(10)]).tolist()
    assert row[:10] != row[10:20] and row != other
    assert sorted(batches.places(0, 25, 10, 1).tolist()[:10]) == list(
        range(10)
    )  # a batch of more than all


def test_a_run_that_is_interrupted_and_resumed_equals_one_that_is_not(call, tmp_path):
    """Ctrl-C after the first epoch: the checkpoint is whole, says so, and goes on bit for bit."""
    flags = [*TINY, "--epochs", 8, "--dropout", 0.1, "--flip", "yes", "--variance", "learned"]
    process = start("train.py", *flags, "--out", "a.pt", cwd=tmp_path)
    while not process.stdout.readline().startswith("epoch 1 of 8"):
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (
        process.returncode == 130 and "go on with --resume a.pt" in out and "Traceback" not in err
    )
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
    leader, follower = pty.openpty()

    def at_the_terminal():
        os.setsid()
        fcntl.ioctl(follower, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may be under nohup

    flags = [*TINY, "--epochs", 500, "--batch-size", 4]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, flags)],
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
    process.wait(timeout=60)
    assert process.returncode > 0, "killed, not ended"
    assert checkpoint.load(tmp_path / "ckpt.pt")["step"] >= 16


def test_two_processes_make_the_same_run_as_one(call, tmp_path):
    """torchrun with two processes: the same batches, the same noise; only sums are rounded otherwise."""
    flags = [*TINY, "--epochs", 2]
    assert call(train, *flags, "--out", "one.pt")[0] == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "train.py"), *map(str, flags), "--out", "two.pt"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                          capture_output=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (a, one, _), (b, two, _) = (
        checkpoint.load_model(tmp_path / name) for name in ("one.pt", "two.pt")
    )
    assert a["step"] == b["step"] == 8
    x, t = torch.randn(4, *a["shape"]), torch.tensor([1, 5, 10, 20])
    close("eps of both networks", two(x, t), one(x, t), 1e-3, 1.0)


@pytest.mark.parametrize("asked, taken", [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cpu", "cpu")])
def test_each_process_of_torchrun_takes_its_own_gpu(call, monkeypatch, asked, taken):
    """The second of a machine takes cuda:1, unless another device is named."""

    def pick(name):
        raise Failure(f"takes {name}.")

    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1"), ("MASTER_PORT", "29500"),
                        ("MASTER_ADDR", "localhost")):  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "pick_device", pick)
    assert f"takes {taken}." in call(train, "--device", asked)[2]


def test_deterministic_changes_nothing_on_the_cpu(call):
    """Its kernels are exact already; on a GPU the flag makes them so, or says which one cannot be."""
    for name, flags in ("a.pt", []), ("b.pt", ["--deterministic"]):
        assert call(train, *TINY, "--epochs", 1, "--out", name, *flags)[0] == 0
        torch.use_deterministic_algorithms(False)
    a, b = (checkpoint.load(name) for name in ("a.pt", "b.pt"))
    assert equal(a["model"], b["model"])


@pytest.mark.parametrize("flags, words", [
    ("--width 16", "--width 16: the run to resume has 8"),
    ("--variance learned", "--variance learned: the run to resume has fixed"),
    ("--timesteps 30", "--timesteps 30: the run to resume has 20"),
    ("--epochs 4", "has done 4 of 4 epochs; ask for more with --epochs"),
])  # fmt: skip
def test_resuming_another_run_or_a_finished_one_is_refused(call, ckpt, tmp_path, flags, words):
    (tmp_path / "a.pt").write_bytes(ckpt.read_bytes())
    status, out, err = call(train, "--resume", "a.pt", *flags.split())
    assert status == 2 and words in err and err.count("\n") == 1 and "trying" not in out
    assert (tmp_path / "a.pt").read_bytes() == ckpt.read_bytes()


def test_resuming_on_other_images_is_refused(call, tmp_path):
    """A folder that has changed since would make another run of it."""
    (tmp_path / "album").mkdir()
    stripes(8, 8).save(tmp_path / "album" / "a.png")
    tiny = ["--batch-size", 2, "--width", 8, "--timesteps", 5, "--device", "cpu", "--size", 8]
    assert call(train, "--data", "album", "--epochs", 1, *tiny)[0] == 0
    stripes(8, 8).save(tmp_path / "album" / "b.png")
    status, _, err = call(train, "--resume", "ckpt.pt", "--epochs", 9)
    assert status == 1 and "2 images, but 1 when this run began" in err
    (tmp_path / "album" / "b.png").unlink()
    Image.new("RGB", (8, 8)).save(tmp_path / "album" / "a.png")
    status, _, err = call(train, "--resume", "ckpt.pt", "--epochs", 9)
    assert status == 1 and "not the images, or not in the order" in err


def test_a_loss_that_is_not_finite_stops_the_run_and_touches_nothing(call, tmp_path):
    (tmp_path / "ckpt.pt").write_text("the old one")
    status, _, err = call(train, *TINY, "--epochs", 3, "--lr", 1e30)
    assert status == 1 and "step 2: the loss: nan" in err and "--lr" in err
    assert (tmp_path / "ckpt.1.pt").read_text() == "the old one" and not (
        tmp_path / "ckpt.pt"
    ).exists()


def test_a_schedule_that_leaves_the_image_in_xT_is_pointed_out(call):
    """The paper's linear schedule with T = 20 ends at alpha_bar_T = 0.8: a note, not a refusal."""
    status, _, err = call(train, *TINY, "--epochs", 1, "--schedule", "linear")
    assert status == 0 and "alpha_bar_T = 0.82" in err


# --- What is said before the first step, and while it runs ------------------------------------------


def test_what_will_happen_is_said_before_the_first_step(trained):
    """Images, network, settings and why; seconds a step, images at a time, memory; epochs, steps and time."""
    _, out = trained
    before = out.split("epoch 1 of 4: loss")[0]
    for words in (
        "glyphs: 64 images, 16x16x1, 10 classes; 512 more are held out",
        "settings: a small network",
        "a step: about ",
        "seconds in fp32, 16 images at a time, about ",
        "are free",
        "4 epochs, 16 steps: about 0:0",
    ):
        assert words in before, before


@pytest.mark.parametrize("flags, words", [
    ("--warmup 9 --epochs 4", "--warmup 9: is more than a third of the 16 steps"),
    ("--epochs 4", "16 steps are too few for pictures"),
    ("--epochs 1 --schedule linear", "alpha_bar_T = 0.82"),
])  # fmt: skip
def test_settings_that_cannot_work_are_warned_of_in_a_line_each(call, flags, words):
    status, _, err = call(train, *TINY, *flags.split())
    assert status == 0 and [words in line for line in err.splitlines()].count(True) == 1, err


def test_settings_that_work_are_not_warned_of():
    """The README's first command, and the recipes for a folder of 300 and of 10,000 photos."""
    cosine = ddpm.Diffusion(ddpm.cosine_schedule())
    network = recipes.network(train.Config(data="album", width=32), (3, 32, 32), 0)
    for cfg, images, steps in (
        (train.Config(epochs=5, batch_size=32, warmup=20, lr=4e-3), 6_000, 938),
        (
            train.Config(data="album", epochs=recipes.SEEN, batch_size=32, warmup=100, lr=1e-3),
            285,
            3563,
        ),
        (train.Config(data="album", epochs=42, batch_size=32, warmup=100, lr=1e-3), 9_500, 12_469),
    ):
        about = dict(images=images, network=network, shape=(3, 32, 32))
        assert list(recipes.warnings(cfg, about, steps, cosine)) == []
    cfg, about["images"] = replace(cfg, epochs=401), 300
    assert "copy" in "".join(recipes.warnings(cfg, about, steps, cosine))
    about["network"] = dict(network, groups=32)
    assert "32 groups of 1 channels: colours" in "".join(
        recipes.warnings(cfg, about, steps, cosine)
    )


def test_a_small_networks_groups_have_many_channels_each():
    """A group of a few would normalise away the means, and with them the colours; the paper's has its 32."""
    for width in range(4, 300, 4):
        groups = recipes.network(train.Config(data="album", width=width), (3, 32, 32), 0)["groups"]
        assert width % groups == 0 and (width // groups >= min(16, width) or width >= 128), (
            width,
            groups,
        )
    assert recipes.network(train.Config(data="album", width=128), (3, 32, 32), 0)["groups"] == 32


@pytest.mark.parametrize("name, shape, device, recipe", [
    ("glyphs", (1, 16, 16), "cpu", dict(width=24, batch_size=32, warmup=20, epochs=100)),
    ("cifar10", (3, 32, 32), "cuda", dict(width=128, batch_size=128, dropout=0.1, lr=2e-4, warmup=3906)),
    ("album", (3, 32, 32), "cuda", dict(dropout=0.0, batch_size=128, lr=2e-4, epochs=128, warmup=500)),
    ("album", (3, 128, 96), "cuda", dict(dropout=0.0, batch_size=64, lr=2e-4)),
    ("album", (3, 256, 256), "mps", dict(dropout=0.0, batch_size=64, lr=2e-5, width=128)),
    ("album", (3, 32, 32), "cpu", dict(width=32, batch_size=32, epochs=76, warmup=100, schedule="cosine")),
    ("cifar10", (3, 32, 32), "cpu", dict(width=32, epochs=7)),
])  # fmt: skip
def test_the_recipe_follows_from_the_data_their_size_and_the_device(name, shape, device, recipe):
    """App. B on a GPU, dropout on CIFAR-10 alone; on a CPU a small network, for 50 minutes."""
    images = 50_000 if name == "cifar10" else 5_000
    size = f"{shape[1]}x{shape[2]}" if name == "album" else None
    cfg = recipes.complete(train.Config(data=name, size=size), device)
    about = dict(shape=shape, images=images)
    cfg = recipes.measured(cfg, about, budget.Cost(False, 32, 0.25, 0, 0, None), device)
    assert {key: getattr(cfg, key) for key in recipe} == recipe


def test_the_log_is_json_lines_of_numbers_and_never_beyond_the_last_epoch(call):
    """Steps of 16 in 50 images do not end with an epoch; the log says 2, not 2.24."""
    assert call(train, *TINY, "--limit", 50, "--epochs", 2, "--log", "log.jsonl")[0] == 0
    lines = [json.loads(line) for line in pathlib.Path("log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 7 and lines[-1]["epoch"] == 2
    for line in lines:
        assert {"step", "epoch", "loss", "lr", "images_per_s", "memory_gb", "seconds"} <= set(line)
        assert all(isinstance(number, (int, float)) for number in line.values())
        assert ("held_out" in line) == (line["step"] in (4, 7)) and 0.05 < line["memory_gb"] < 50
    status, _, err = call(train, "--resume", "ckpt.pt")
    assert status == 2 and "has done 2 of 2 epochs" in err


def test_time_that_is_no_training_is_not_charged_to_it(monkeypatch):
    """Neither to an epoch nor to the images a second: a grid, a checkpoint, the loss on held-out images."""
    clock = itertools.count(0, 10)
    monkeypatch.setattr(monitor.time, "monotonic", lambda: next(clock))
    watch = monitor.Monitor(train.Config(epochs=1, batch_size=4), 8, 0, 2, torch.device("cpu"))
    began = watch.epoch_began, watch.reported_at, watch.progress.began
    with watch.aside():
        pass
    after = watch.epoch_began, watch.reported_at, watch.progress.began
    assert [b - a for a, b in zip(began, after)] == [10, 10, 10]


def test_ctrl_c_is_answered_at_once(capfd):
    """Before the step is over, which may take a minute; the second one ends the run."""
    watch = monitor.Monitor(train.Config(epochs=1, batch_size=4), 8, 0, 2, torch.device("cpu"))
    watch.stop(signal.SIGINT, None)
    assert "stopping after this step; Ctrl-C again to stop now" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        watch.stop(signal.SIGINT, None)


def test_a_grid_takes_the_time_of_a_few_steps(call, monkeypatch):
    """A step computes three passes over its batch, and a grid at most twelve, with any number of classes."""
    for B, classes in ((32, 10), (32, 0), (128, 10), (64, 100)):
        seen = []

        def sample(net, d, shape, seeds, y, on_step, steps, seen=seen, **how):
            seen.append(len(seeds) * steps)
            return torch.zeros(len(seeds), *shape)

        monkeypatch.setattr(sampling, "sample", sample)
        monkeypatch.setattr(snapshots, "replacing", lambda path: io.BytesIO())
        about = dict(classes=[str(k) for k in range(classes)], shape=(3, 8, 8), network=dict(out_channels=3),
                     process=checkpoint.process("cosine", 1000, "fixed"))  # fmt: skip
        run = train.Run(None, torch.nn.Linear(1, 1), None, 0, about)
        snapshots.draw_grid(
            train.Config(batch_size=B, micro_batch="16", precision="fp32"),
            run,
            ddpm.Diffusion(ddpm.cosine_schedule()),
            1,
        )
        assert sum(seen) <= 12 * B, (B, classes, sum(seen))

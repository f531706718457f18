"""The commands as a user runs them: train.py, sample.py, evaluate.py, their files and their refusals."""

import fcntl
import http.server
import json
import os
import pathlib
import pty
import shlex
import signal
import socket
import subprocess
import sys
import tarfile
import termios
import threading

import far
import numpy as np
import pytest
import torch
from judge import close
from PIL import Image
from running import ROOT, TINY, equal, run, start
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import reference_numpy as ref
import sample
import train

# --- The main road -------------------------------------------------------------------------------


def test_training_says_what_it_does_and_leaves_a_checkpoint_a_log_and_grids(trained):
    folder, out = trained
    lines = out.splitlines()
    assert lines[0].startswith("glyphs: 64 images") and "parameters" in lines[1] and "lr 0.004" in lines[2]
    assert [line.split(":")[0] for line in lines if line.startswith("epoch")] == [
        f"epoch {i} of 4" for i in (1, 2, 3, 4)]  # fmt: skip
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 16 and log[-1]["loss"] < log[0]["loss"]
    assert sorted(p.name for p in folder.glob("ckpt*.png")) == ["ckpt.0002.png", "ckpt.0004.png"]
    assert Image.open(folder / "ckpt.0004.png").size > (300, 300)


def test_sample_draws_a_grid_and_says_how(trained, ckpt, tmp_path):
    status, out, err = run("sample.py", "--ckpt", ckpt, "--out", tmp_path / "grid.png", "--steps", 5)
    assert status == 0 and err == ""
    assert "DDIM, 5 steps, eta 0, ema weights at step 16" in out
    assert Image.open(tmp_path / "grid.png").size > (300, 300)


def test_evaluate_prints_the_bound_and_its_terms_for_both_variances(trained, ckpt):
    status, out, err = run("evaluate.py", "--ckpt", ckpt, "--n", 6)
    assert status == 0 and err == ""
    title, head, *rows = out.splitlines()
    assert title.startswith("6 held-out images of glyphs") and "bits/dim" in title
    assert "sigma^2 = beta" in head and "sigma^2 = beta_tilde" in head
    values = np.array([[float(cell.split(" ±")[0]) for cell in row[32:].split("  ") if cell.strip()]
                       for row in rows])  # fmt: skip
    assert values.shape == (4, 2)
    close("L_T + rate + distortion", values[:3].sum(0), values[3], 2e-5, 1.0)


def test_learned_variances_are_trained_sampled_and_evaluated(call, learned, tmp_path):
    """The network says two halves; all samplers take it; its bound is a third column."""
    saved = sample.load_checkpoint(learned)
    assert saved["network"]["out_channels"] == 2 and saved["config"]["variance"] == "learned"
    drawn = {}
    for way, how in {
        "": "ancestral, 20 steps, sigma^2 is learned",
        "--steps 5": "ancestral, 5 steps, sigma^2 is learned",
        "--variance beta": "ancestral, 20 steps, sigma^2 = beta,",
        "--steps 5 --eta 0": "DDIM, 5 steps, eta 0",
        "--steps 5 --variance beta_tilde": "ancestral, 5 steps, sigma^2 = beta_tilde",
    }.items():  # fmt: skip
        status, out, err = call(sample, "--ckpt", learned, "--out", "a.npz", "--n", 2, *way.split())
        assert status == 0 and how in out, (out, err)
        drawn[way] = np.load("a.npz")["arr_0"].tobytes()
    assert len(set(drawn.values())) == 5
    status, out, err = call(evaluate, "--ckpt", learned, "--n", 4)
    assert status == 0 and "sigma^2 learned" in out.splitlines()[1], err
    assert all(line.count("±") == 3 for line in out.splitlines()[2:])


def test_training_drops_labels_so_that_no_label_is_learned_too(call):
    """A tenth of them: the last row of the label table, "no label", is moved as the others are."""
    assert call(train, *TINY, "--epochs", 4, "--decay", "none")[0] == 0
    saved = sample.load_checkpoint("ckpt.pt")
    torch.manual_seed(train.mixed(0, 0))
    first = train.ddpm.UNet(**saved["network"]).label.weight.detach()
    moved = (saved["model"]["label.weight"] - first).norm(dim=1)
    assert moved.shape == (11,) and (moved > 0).all(), moved


def test_labels_are_the_classes_asked_for_in_turn_and_a_grid_has_one_a_row():
    """class_labels: labels and rows; the grid is filled column by column."""
    names = ["cat", "dog", "a,b", "eel"]
    for label, n, labels, rows in (
        (None, 6, [0, 1, 2, 3, 0, 1], 4), ("all", 5, [0, 1, 2, 3, 0], 4), ("dog", 3, [1, 1, 1], 2),
        ("eel, cat", 3, [3, 0, 3], 2), ("a,b", 1, [2], 1), (None, 2, [0, 1], 2),
    ):  # fmt: skip
        got, shape = sample.class_labels(names, label, n)
        assert (got.tolist(), shape) == (labels, rows)
    assert sample.class_labels(names)[0].tolist() == [0, 1, 2, 3] * 8
    assert len(sample.class_labels(names, "cat")[0]) == len(sample.class_labels([])[0]) == 64
    images = np.full((5, 64, 64, 1), 0, np.uint8)
    images += np.arange(1, 6, dtype=np.uint8)[:, None, None, None]
    sheet = np.asarray(sample.grid(images, 2))[30::66, 30::66]
    assert sheet.tolist() == [[1, 3, 5], [2, 4, 255]]


def test_bfloat16_draws_nearly_the_same_picture(call, ckpt):
    """Tables and samples stay float32; the network alone is rounded to 8 bits."""
    drawn = []
    for precision in ("fp32", "bf16"):
        how = ["--ckpt", ckpt, "--out", "a.npz", "--n", 4, "--precision", precision, "--device", "cpu"]
        assert call(sample, *how)[0] == 0
        drawn.append(np.load("a.npz")["arr_0"].astype(int))
    off = abs(drawn[0] - drawn[1])
    assert 0 < off.mean() < 2, off.mean()


def test_the_commands_say_the_same_on_another_device_and_seldom_wait_for_it(call):
    """Training, stopped and resumed, sampling and evaluation, on the device of far.py: the CPU's losses,
    pictures (within a level of 256 on average) and bits/dim, but for the order of sums. A GPU would be
    waited for at reports and at pictures only: there are fewer of both than steps."""
    tiny = [*TINY, "--limit", 32, "--batch-size", 4, "--timesteps", 6, "--flip", "yes", "--dropout", 0.1,
            "--log", "log"]  # fmt: skip
    drawing = "--ckpt ckpt.pt --out a.npz --n 4 --guidance 1 --steps".split()

    def results(device):
        for flags in (tiny, ["--resume", "ckpt.pt"]):
            status, _, err = call(train, *flags, "--epochs", 1 if flags is tiny else 2, "--device", device)
            assert status == 0, err
        losses = [json.loads(line)["loss"] for line in pathlib.Path("log").read_text().splitlines()]
        waits = [len(reads)]
        for steps in (6, 3):
            assert call(sample, *drawing, steps, "--device", device)[0] == 0
            waits.append(len(reads))
        _, out, err = call(evaluate, "--ckpt", "ckpt.pt", "--n", 2, "--device", device)
        bits = float(out.splitlines()[-1].split()[-3]) if out else err
        pathlib.Path("log").unlink()
        return losses, np.load("a.npz")["arr_0"].astype(float), bits, waits

    with far.device() as reads:
        near, away = results("cpu"), results("far")
    close("loss", away[0], near[0], 1e-3, 1.0)
    close("bits/dim", away[2], near[2], 1e-2, 1.0)
    off = abs(away[1] - near[1]).mean()  # Adam's first steps turn a gradient's rounding into a whole step
    assert off < 1, f"pixels are off by {off:.2g} levels on average"
    training, *drawings = np.diff([0, *away[3]])
    assert near[3] == [0, 0, 0] and training < 16 and drawings == [2, 2], reads


def test_sampling_in_bfloat16_rounds_the_weights_once_and_not_at_every_step(ckpt):
    """autocast keeps what it has rounded of a weight, but only where the weight could have a gradient."""
    _, net, d = sample.load_model(ckpt)
    weights = {p.data_ptr() for p in net.parameters()}

    class Count(TorchDispatchMode):
        roundings = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.roundings += op is torch.ops.aten._to_copy.default and args[0].data_ptr() in weights
            return op(*args, **(kwargs or {}))

    counts = []
    for steps in (1, 4):
        with torch.autocast("cpu", torch.bfloat16), Count() as count:
            sample.sample(net, d, (1, 16, 16), [0, 1], [3, 5], steps, eta=0.0)
        counts.append(count.roundings)
    assert counts[0] == counts[1] > 50, counts


@pytest.mark.parametrize("precision, matmul, tf32", [("fp32", "highest", False), ("bf16", "high", True)])
def test_float32_is_not_tf32_unless_bfloat16_is_asked_for(precision, matmul, tf32):
    """Neither in products of matrices nor in convolutions, where CUDA's default is TF32."""
    try:
        assert sample.use_precision(precision, torch.device("cpu")) == tf32
        assert torch.get_float32_matmul_precision() == matmul
        assert torch.backends.cudnn.allow_tf32 == tf32
    finally:
        sample.use_precision("fp32", torch.device("cpu"))


@pytest.mark.parametrize("asked, taken", [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cpu", "cpu")])
def test_each_process_of_torchrun_takes_its_own_gpu(call, monkeypatch, asked, taken):
    """The second of a machine takes cuda:1, unless another device is named."""
    def pick(name):
        raise sample.Failure(f"takes {name}.")

    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sample, "pick_device", pick)
    assert f"takes {taken}." in call(train, "--device", asked)[2]


def test_bfloat16_has_nearly_the_same_bound(call, ckpt):
    """The network is rounded; the terms are not, which is why float32 is the default."""
    bits = []
    for precision in ([], ["--precision", "bf16"]):
        status, out, err = call(evaluate, "--ckpt", ckpt, "--n", 2, "--device", "cpu", *precision)
        assert status == 0, err
        bits.append(float(out.splitlines()[-1].split()[-3]))
    assert bits[0] != bits[1]
    close("bits/dim in bfloat16", bits[1], bits[0], 0.02)


def test_guidance_0_is_the_class_and_minus_1_no_class_at_all(call, ckpt):
    """One seed: w = 0 is the default; at w = -1 the label has no say; w = 2 goes beyond both."""
    def draw(*flags):
        status, out, err = call(sample, "--ckpt", ckpt, "--out", "a.npz", "--n", 3, "--steps", 4, *flags)
        assert status == 0, err
        return np.load("a.npz")["arr_0"], out

    ways = [], ["--guidance", 0], ["--guidance", 2]
    plain, zero, two = (draw("--label", "3", *flags)[0] for flags in ways)
    free, said = draw("--label", "3", "--guidance", -1)
    assert (plain == zero).all() and (plain != two).any() and (plain != free).any() and "w = -1" in said
    assert (free == draw("--label", "7,1", "--guidance", -1)[0]).all()


@pytest.mark.parametrize("out", ["a.gif", "a.WEBP", "a.npz", "a/"])
def test_sample_writes_animations_arrays_and_folders(call, trained, ckpt, tmp_path, out):
    C, H, W = sample.load_checkpoint(ckpt)["shape"]
    status, _, err = call(sample, "--ckpt", ckpt, "--out", out, "--n", 3, "--steps", 4)
    assert status == 0, err
    if out == "a.npz":
        arrays = np.load(out)
        assert arrays["arr_0"].shape == (3, H, W, C) and arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].tolist() == [0, 1, 2]
    elif out == "a/":
        assert [p.name for p in sorted(tmp_path.glob("a/*"))] == [f"00000{i}.png" for i in range(3)]
        assert Image.open("a/000000.png").size == (W, H)
    else:
        film = Image.open(out)
        assert film.n_frames == 4


def test_a_seed_gives_the_same_picture_at_any_batch_size(call, ckpt):
    """Image i is drawn from seed + i: the third of --seed 5 is the only one of --seed 7."""
    how = ["--ckpt", ckpt, "--steps", 3, "--eta", 1, "--label", "1"]
    call(sample, *how, "--out", "a.npz", "--n", 4, "--seed", 5, "--batch-size", 3)
    call(sample, *how, "--out", "b.npz", "--n", 1, "--seed", 7)
    a, b = (np.load(name)["arr_0"].astype(int) for name in ("a.npz", "b.npz"))
    assert abs(a[2] - b[0]).max() <= 1  # a convolution may sum in another order in another batch
    assert abs(a[1] - b[0]).max() > 1


def test_sampling_chooses_ancestral_or_ddim_variance_and_weights(call, ckpt):
    """One seed, six ways to draw, six pictures; eta = 1 on all T steps is the variance beta_tilde."""
    ways = "", "--variance beta_tilde", "--eta 0", "--steps 7", "--weights raw", "--label 3", "--eta 1"
    drawn = {}
    for way in ways:
        status, _, err = call(sample, "--ckpt", ckpt, "--out", "a.npz", "--n", 2, *way.split())
        assert status == 0, err
        drawn[way] = np.load("a.npz")["arr_0"].astype(int)
    assert abs(drawn["--eta 1"] - drawn["--variance beta_tilde"]).max() <= 1
    assert len({images.tobytes() for way, images in drawn.items() if way != "--eta 1"}) == 6


def test_progress_rewrites_one_line_on_a_terminal(ckpt, tmp_path):
    leader, follower = pty.openpty()
    command = [sys.executable, ROOT / "sample.py", "--ckpt", ckpt, "--out", tmp_path / "a.png", "--n", "4"]
    subprocess.run(command, stderr=follower, stdout=subprocess.DEVNULL, check=True)
    shown = os.read(leader, 10_000).decode()
    assert "\rsampling: " in shown and "left" in shown and "\n" not in shown


@pytest.mark.parametrize("module", [train, sample, evaluate])
def test_help_explains_every_flag(call, module):
    status, out, _ = call(module, "--help")
    assert status == 0 and "python " in out
    for name, f in module.Config.__dataclass_fields__.items():
        assert "--" + name.replace("_", "-") in out and f.metadata["text"].split()[0] in out


# --- Exactness -----------------------------------------------------------------------------------


def test_pixels_survive_the_way_to_minus_1_1_and_back():
    """uint8 -> [-1, 1] -> uint8 is the identity on all 256 levels; outside is clipped."""
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert (sample.to_uint8(levels.float() / 127.5 - 1).ravel() == np.arange(256)).all()
    assert sample.to_uint8(torch.tensor([-7.0, 7.0]).reshape(1, 1, 1, 2)).ravel().tolist() == [0, 255]


def test_ema_is_the_closed_form_with_the_ramp(call):
    """After n updates: sum of (1 - d_i) d_{i+1} .. d_n w_i with d_n = min(ema, (1 + n) / (10 + n))."""
    flags = [*TINY, "--decay", "none", "--ema", 0.3, "--limit", 16]
    history = []
    for epochs in (1, 2, 3, 4):
        assert call(train, *flags, "--epochs", epochs)[0] == 0
        saved = sample.load_checkpoint("ckpt.pt")
        history.append(saved["model"]["conv_in.weight"].numpy())
    torch.manual_seed(train.mixed(0, 0))
    first = train.ddpm.UNet(**saved["network"]).conv_in.weight.detach().numpy()
    close("EMA", saved["ema"]["conv_in.weight"], ref.ema([first, *history], 0.3), 1e-5, 1.0)


def test_the_loss_that_is_shown_is_the_mean_since_the_last_one(call, monkeypatch):
    """Of every step of the interval, not of one batch: in the log and on the line of each epoch."""
    losses, loss_simple = [], train.ddpm.loss_simple

    def recording(*args):
        loss = loss_simple(*args)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(train.ddpm, "loss_simple", recording)
    status, out, err = call(train, *TINY, "--epochs", 3, "--log", "log.jsonl")
    assert status == 0, err
    shown = [float(line.split("loss ")[1].split(",")[0]) for line in out.splitlines() if ": loss" in line]
    close("loss of each epoch", shown, np.reshape(losses, (3, 4)).mean(1), 6e-5, 1.0)
    first = 0
    for line in map(json.loads, pathlib.Path("log.jsonl").read_text().splitlines()):
        close(f"loss at step {line['step']}", line["loss"], np.mean(losses[first : line["step"]]), 1e-6, 1.0)
        first = line["step"]
    assert first == 12


def test_deterministic_changes_nothing_on_the_cpu(call):
    """Its kernels are exact already; on a GPU the flag makes them so, or says which one cannot be."""
    for name, flags in ("a.pt", []), ("b.pt", ["--deterministic"]):
        assert call(train, *TINY, "--epochs", 1, "--out", name, *flags)[0] == 0
        torch.use_deterministic_algorithms(False)
    a, b = (sample.load_checkpoint(name) for name in ("a.pt", "b.pt"))
    assert equal(a["model"], b["model"])


def test_a_run_that_is_interrupted_and_resumed_equals_one_that_is_not(call, tmp_path):
    """Ctrl-C after the first epoch: the checkpoint is whole, says so, and goes on bit for bit."""
    flags = [*TINY, "--epochs", 8, "--dropout", 0.1, "--flip", "yes", "--variance", "learned"]
    process = start("train.py", *flags, "--out", "a.pt", cwd=tmp_path)
    while not process.stdout.readline().startswith("epoch 1 of 8"):
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "go on with --resume a.pt" in out and "Traceback" not in err
    stopped = sample.load_checkpoint(tmp_path / "a.pt")["step"]
    assert 4 <= stopped < 32, "the run ended before it could be interrupted"
    for command in ([*flags, "--out", "b.pt"], ["--resume", "a.pt"]):
        status, _, err = call(train, *command)
        assert status == 0, err
    a, b = (sample.load_checkpoint(tmp_path / name) for name in ("a.pt", "b.pt"))
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
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, flags)], cwd=tmp_path,
                               stdout=follower, stderr=follower, env={**os.environ, "OMP_NUM_THREADS": "1"},
                               preexec_fn=at_the_terminal)
    os.close(follower)
    shown = b""
    while b"epoch 1 of 500:" not in shown:
        shown += os.read(leader, 1000)
    os.close(leader)
    process.wait(timeout=60)
    assert process.returncode > 0, "killed, not ended"
    assert sample.load_checkpoint(tmp_path / "ckpt.pt")["step"] >= 16


def test_two_processes_make_the_same_run_as_one(call, tmp_path):
    """torchrun with two processes: the same batches, the same noise; only sums are rounded otherwise."""
    flags = [*TINY, "--epochs", 2]
    assert call(train, *flags, "--out", "one.pt")[0] == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "train.py"), *map(str, flags), "--out", "two.pt"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                          capture_output=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (a, one, _), (b, two, _) = (sample.load_model(tmp_path / name) for name in ("one.pt", "two.pt"))
    assert a["step"] == b["step"] == 8
    x, t = torch.randn(4, *a["shape"]), torch.tensor([1, 5, 10, 20])
    close("eps of both networks", two(x, t), one(x, t), 1e-2, 1.0)  # another seed: 0.5


# --- Data ----------------------------------------------------------------------------------------


def test_glyphs_are_the_same_for_the_same_seed_and_others_are_held_out():
    a, labels = train.draw_glyphs(50, seed=3)
    b, _ = train.draw_glyphs(50, seed=3)
    c, _ = train.draw_glyphs(50, seed=4)
    assert a.dtype == np.uint8 and (a == b).all() and not (a == c).all()
    assert labels.shape == (50,) and labels.max() < len(train.GLYPHS)
    held_out = train.load_data(train.Config(), train=False)[0]
    assert len(held_out) == 2000
    training = {image.tobytes() for image in train.load_data(train.Config(), train=True)[0].numpy()}
    assert not training & {image.tobytes() for image in held_out.numpy()}


def test_batches_go_through_all_images_once_an_epoch_in_an_order_that_the_seed_decides():
    """Steps of 4 in 10 images: any ten images in a row from a multiple of ten are all ten."""
    row = torch.cat([train.places(step, 4, 10, seed=1) for step in range(10)]).tolist()
    assert all(sorted(row[i : i + 10]) == list(range(10)) for i in range(0, 40, 10))
    other = torch.cat([train.places(step, 4, 10, seed=2) for step in range(10)]).tolist()
    assert row[:10] != row[10:20] and row != other
    assert sorted(train.places(0, 25, 10, 1).tolist()[:10]) == list(range(10))  # a batch of more than all


def stripes(W, H):
    """Red, green and blue thirds, side by side."""
    x = np.arange(W) * 3 // W
    return Image.fromarray(np.broadcast_to(255 * np.eye(3, dtype=np.uint8)[x], (H, W, 3)).copy())


@pytest.fixture
def album(tmp_path):
    """A folder of images of many formats, modes and shapes, some in a folder of their own."""
    folder = tmp_path / "album"
    (folder / "more").mkdir(parents=True)
    stripes(90, 30).save(folder / "wide.png")
    stripes(60, 40).save(folder / "more" / "photo.JPG", "JPEG")
    stripes(40, 40).convert("P").save(folder / "palette.gif")
    stripes(40, 40).convert("L").save(folder / "grey.bmp")
    stripes(40, 40).convert("1").save(folder / "bits.png")
    stripes(40, 40).convert("CMYK").save(folder / "print.tif")
    Image.new("RGBA", (20, 50), (0, 0, 255, 0)).save(folder / "clear.webp")
    Image.fromarray(np.full((30, 30), 32768, np.uint16)).save(folder / "deep.png")
    Image.fromarray(np.full((30, 30), 0.5, np.float32)).save(folder / "float.tiff")
    (folder / ".hidden").write_text("not an image, and not looked at")
    return folder


def test_any_image_is_read_upright_cropped_at_its_centre_and_not_squashed(album, tmp_path):
    """The middle of red-green-blue is green; transparent is white; 16 bits and floats keep their grey."""
    images = train.load_folder(album, (16, 24), 3, tmp_path / "cache", skip_broken=False)[0]
    names = sorted(str(p.relative_to(album)) for p in album.rglob("*.*") if not p.name.startswith("."))
    files = sorted(p for p in album.rglob("*") if p.is_file() and not p.name.startswith("."))
    assert images.shape == (len(names), 3, 16, 24) and len(names) == 9
    by_name = {p.name: image for p, image in zip(files, images, strict=True)}
    assert (by_name["clear.webp"] == 255).all()
    for name in ("deep.png", "float.tiff"):
        assert abs(by_name[name].astype(int) - 128).max() <= 1
    square = train.load_folder(album, (16, 16), 3, tmp_path / "cache", skip_broken=False)[0]
    wide = square[files.index(album / "wide.png")]
    assert (wide[1, :, 1:-1] > 200).all() and (wide[0, :, 1:-1] < 60).all()
    grey = train.load_folder(album, (16, 16), 1, tmp_path / "cache", skip_broken=False)[0]
    assert grey.shape == (9, 1, 16, 16)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned by 90 degrees
    (tmp_path / "a").mkdir()
    stripes(30, 30).save(tmp_path / "a" / "turned.png", exif=exif)
    image = train.load_folder(tmp_path / "a", (30, 30), 3, tmp_path, skip_broken=False)[0][0]
    assert (image[0, :9] == 255).all() and (image[2, -9:] == 255).all()  # red on top, blue below


def test_a_folder_is_decoded_once_and_again_when_it_changes(album, tmp_path, monkeypatch):
    load = lambda: train.load_folder(album, (8, 8), 3, tmp_path / "cache", False)[0]  # noqa: E731
    first = np.array(load())
    monkeypatch.setattr(train, "decode", lambda *args: pytest.fail("decoded twice"))
    assert (load() == first).all()
    monkeypatch.undo()
    stripes(30, 30).save(album / "new.png")
    assert len(load()) == len(first) + 1


def test_links_pipes_and_names_of_a_folder_are_taken_for_what_they_are(album, tmp_path, call):
    """A link back into the folder adds nothing, a pipe is no file, a newline stays inside one line; a
    link to nothing is a broken file."""
    count = len(train.load_folder(album, (8, 8), 3, tmp_path / "cache", False)[0])
    (album / "more" / "loop").symlink_to(album)
    os.mkfifo(album / "pipe.png")
    stripes(9, 9).save(album / "line\nbreak.png")
    assert len(train.load_folder(album, (8, 8), 3, tmp_path / "cache", False)[0]) == count + 1
    (album / "a\nb.png").symlink_to("nothing")
    status, _, err = call(train, "--data", album)
    assert status == 1 and err.count("\n") == 1 and "a\\nb.png: cannot be read" in err


def test_a_folder_that_changes_while_it_is_read_is_refused(album, tmp_path, monkeypatch):
    """A file comes or goes while the others are decoded: no cache of a state that never was."""
    decode = train.decode

    def meddling(path, *how):
        (album / "new.png").write_bytes((album / "wide.png").read_bytes())
        return decode(path, *how)

    monkeypatch.setattr(train, "decode", meddling)
    with pytest.raises(sample.Failure, match="changed while it was read"):
        train.load_folder(album, (8, 8), 3, tmp_path / "cache", False)[0]
    assert not list((tmp_path / "cache").iterdir())


def test_what_a_killed_writer_left_is_cleared_after_an_hour(tmp_path):
    """Another writer's partial file is left alone while it is young."""
    old, young = (tmp_path / f".a.pt.{pid}.partial" for pid in (1, 2))
    old.touch(), young.touch()
    os.utime(old, (0, 0))
    sample.save_checkpoint(tmp_path / "a.pt", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == [young.name, "a.pt"]


def test_a_folders_subfolders_are_its_classes(call, tmp_path):
    """Every image has the label of its folder, also where some files are broken; sample and evaluate
    know the names; images in no folder are refused."""
    for i, name in enumerate(["big dog", "cat", "cat", "eel", "cat"]):
        (tmp_path / "pets" / name / "deep").mkdir(parents=True, exist_ok=True)
        grey = Image.new("L", (8, 8), 10 + {"big dog": 0, "cat": 100, "eel": 200}[name])
        grey.save(tmp_path / "pets" / name / "deep" / f"{i}.png")
    (tmp_path / "pets" / "cat" / "broken.png").write_text("no image")
    tiny = ["--batch-size", 4, "--width", 8, "--timesteps", 5, "--device", "cpu", "--epochs", 1, "--size", 8]
    flags = ["--data", "pets", "--labels", "--channels", 1, "--skip-broken", *tiny]
    (tmp_path / "pets" / "a link").symlink_to("cat")  # which is there anyway, and is no class of its own
    (tmp_path / "pets" / "notes.txt").write_text("no image, and in no folder")
    for damage in (None, None, lambda cache: cache[:200], lambda cache: bytes(len(cache)), lambda cache: b""):
        if damage:  # decoded; from the cache; decoded, for the cache is damaged
            [cache] = (tmp_path / "data").iterdir()
            cache.write_bytes(damage(cache.read_bytes()))
        status, out, err = call(train, *flags)
        assert status == 0 and "5 images, 8x8x1, 3 classes" in out, err
    saved = sample.load_checkpoint("ckpt.pt")
    assert saved["classes"] == ["big dog", "cat", "eel"] and saved["network"]["num_classes"] == 3
    images, labels, _ = train.load_data(train.Config(**train.settings_of(saved)), train=True)
    assert ((images[:, 0, 0, 0] - 10) // 100).tolist() == labels.tolist() == [0, 1, 1, 1, 2]
    assert call(sample, "--ckpt", "ckpt.pt", "--out", "a.npz", "--n", 3, "--label", "eel,big dog")[0] == 0
    assert np.load("a.npz")["arr_1"].tolist() == [2, 0, 2]
    status, out, err = call(evaluate, "--ckpt", "ckpt.pt", "--n", 2, "--skip-broken")
    assert status == 0 and "2 images it was trained on" in out, err
    (tmp_path / "pets" / "fox").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "pets" / "fox" / "a.png")
    status, _, err = call(evaluate, "--ckpt", "ckpt.pt", "--skip-broken")
    assert status == 1 and "knows no class fox" in err
    status, _, err = call(train, "--resume", "ckpt.pt", "--epochs", 2)
    assert status == 1 and "its classes are not those with which this run began" in err
    Image.new("L", (8, 8)).save(tmp_path / "pets" / "lost.png")
    for more in ([], ["--skip-broken"]):
        status, _, err = call(train, *(flag for flag in flags if flag != "--skip-broken"), *more)
        assert status == 1 and "lost.png: is in no subfolder" in err.splitlines()[-1], err


def test_training_sampling_and_evaluating_a_folder_of_images(call, album, tmp_path):
    """Anyone's images, not square, grey; the checkpoint knows their size."""
    tiny = ["--batch-size", 4, "--width", 8, "--timesteps", 5, "--device", "cpu", "--epochs", 1]
    status, out, err = call(train, "--data", album, "--size", "16x24", "--channels", 1, *tiny)
    assert status == 0 and out.startswith(f"{album}: 9 images, 16x24x1"), err
    assert call(sample, "--ckpt", "ckpt.pt", "--out", "a.npz", "--n", 2)[0] == 0
    assert np.load("a.npz")["arr_0"].shape == (2, 16, 24, 1)
    status, out, err = call(evaluate, "--ckpt", "ckpt.pt", "--n", 2)
    assert status == 0 and "images it was trained on" in out, err
    assert call(train, "--data", album, "--size", "16", "--channels", 1, *tiny)[0] == 0
    status, out, err = call(evaluate, "--ckpt", "ckpt.pt", "--n", 2, "--data", "glyphs")
    assert status == 0 and "held-out images of glyphs" in out, err


def test_a_file_that_is_no_image_is_named_and_can_be_skipped(call, album):
    (album / "notes.txt").write_text("hello")
    whole = (album / "wide.png").read_bytes()
    (album / "half.png").write_bytes(whole[: len(whole) // 2])
    flags = ["--data", album, "--epochs", 1, "--width", 8, "--timesteps", 2, "--batch-size", 9, "--size", 8]
    status, _, err = call(train, *flags)
    assert status == 1 and "half.png: cannot be read as an image" in err and "--skip-broken" in err
    status, out, err = call(train, *flags, "--skip-broken")
    assert status == 0 and "9 images" in out and "left out 2 of 11 files" in err


# --- CIFAR-10 ------------------------------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A CIFAR-10 of ten images a file, as an unpacked folder and as an archive on a local server."""
    monkeypatch.setattr(train, "CIFAR10_BYTES", 10 * 3073)
    folder = tmp_path / "source" / train.CIFAR10
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        rows = rng.integers(0, 256, (10, 3073), dtype=np.uint8)
        rows[:, 0] %= 10
        rows.tofile(folder / name)
    archive = tmp_path / "source" / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, train.CIFAR10)
    monkeypatch.setattr(train, "CIFAR10_MD5", __import__("hashlib").md5(archive.read_bytes()).hexdigest())
    return tmp_path / "source"


@pytest.fixture
def server(cifar, monkeypatch):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=cifar)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{httpd.server_port}/cifar-10-binary.tar.gz"
        monkeypatch.setattr(train, "CIFAR10_URL", url)
        yield url
        httpd.shutdown()


def test_cifar10_is_found_unpacked_with_its_pixels_in_place(cifar):
    """Rows of a label and 3 x 32 x 32 pixels; in --data-dir itself or in its folder."""
    for where in (cifar, cifar / train.CIFAR10):
        assert train.load_cifar10(where, train=True)[0].shape == (50, 3, 32, 32)
        test, labels = train.load_cifar10(where, train=False)
        raw = np.fromfile(cifar / train.CIFAR10 / "test_batch.bin", np.uint8)
        assert test.shape == (10, 3, 32, 32) and (test[0].ravel() == raw[1:3073]).all()
        assert (labels == raw[::3073]).all()
    cfg = train.Config(data="cifar10", data_dir=str(cifar), limit=7)
    assert train.load_data(train.with_recipe(cfg), train=False)[1] is None
    _, labels, classes = train.load_data(train.replace(cfg, labels=True), train=False)
    assert labels.tolist() == raw[: 7 * 3073 : 3073].tolist() and classes[3:6] == ["cat", "deer", "dog"]


def test_cifar10_is_downloaded_checked_and_unpacked_once(server, tmp_path):
    assert train.load_cifar10(tmp_path / "new", train=True)[0].shape == (50, 3, 32, 32)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        train.CIFAR10, "cifar-10-binary.tar.gz"]  # fmt: skip


def test_cifar10_that_is_cut_or_replaced_on_the_way_is_refused_and_not_kept(server, cifar, call):
    """A broken connection, or a login page in its place."""
    archive = cifar / "cifar-10-binary.tar.gz"
    for content in (archive.read_bytes()[:5000], b"<html>log in</html>"):
        archive.write_bytes(content)
        status, _, err = call(train, "--data", "cifar10", "--data-dir", "new")
        assert status == 1 and err.count("\n") == 1
        assert f"{len(content):,} bytes came, which are not the published file" in err
        assert not list(pathlib.Path("new").iterdir())


def test_cifar10_that_is_damaged_is_refused(call, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "cifar-10-binary.tar.gz").write_text("not it")
    status, _, err = call(train, "--data", "cifar10", "--data-dir", "new")
    assert status == 1 and "not the published file" in err and "delete it" in err
    folder = tmp_path / "short" / train.CIFAR10
    folder.mkdir(parents=True)
    (folder / "data_batch_1.bin").write_bytes(b"short")
    status, _, err = call(train, "--data", "cifar10", "--data-dir", "short")
    assert status == 1 and "5 bytes, not 30,730" in err and "delete" in err


def test_cifar10_without_a_network_names_the_three_ways_out(call, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/cifar-10-binary.tar.gz"
        monkeypatch.setattr(train, "CIFAR10_URL", url)
        status, _, err = call(train, "--data", "cifar10", "--data-dir", "new")
    assert status == 1 and err.count("\n") == 1
    assert "connect" in err and "put http" in err and "--data-dir" in err
    assert not list(pathlib.Path("new").glob("*"))


# --- Refusals ------------------------------------------------------------------------------------


def test_an_operation_that_a_device_lacks_is_one_line(call, monkeypatch, ckpt):
    """As log_ndtr, of the decoder, on Apple's GPUs."""
    def missing(x):
        raise NotImplementedError("The operator 'aten::special_log_ndtr' is not there for MPS. More words.")

    monkeypatch.setattr(torch.special, "log_ndtr", missing)
    status, _, err = call(evaluate, "--ckpt", ckpt, "--n", 1, "--device", "cpu")
    assert status == 1 and err == ("evaluate.py: error: The operator 'aten::special_log_ndtr' is not there "
                                   "for MPS; try --device cpu, or PYTORCH_ENABLE_MPS_FALLBACK=1\n")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."),
                                   RuntimeError("CUDA error: out of memory")], ids=["allocator", "start"])
def test_a_device_that_is_full_is_not_one_that_is_missing(call, monkeypatch, ckpt, error):
    """As when another process has all of its memory."""
    def empty(*size, device=None):
        raise error

    monkeypatch.setattr(torch, "empty", empty)
    status, _, err = call(sample, "--ckpt", ckpt, "--out", "a.png", "--device", "cuda")
    assert (status, err.count("\n")) == (1, 1) and "out of memory; try a smaller --batch-size" in err


@pytest.mark.parametrize("module, flags, words", [
    (train, "--epoch 3", "unknown argument --epoch; did you mean --epochs?"),
    (train, "surplus", "unknown argument surplus"),
    (train, "--epochs", "--epochs: expected one argument"),
    (train, "--epochs three", "--epochs: invalid whole number value: 'three'"),
    (train, "--epochs 0", "--epochs: 0 is impossible; it must be at least 1"),
    (train, "--epochs 2.5", "invalid whole number"),
    (train, "--lr nan", "--lr: nan is impossible"),
    (train, "--ema 1.5", "--ema: 1.5 is impossible; it must be from 0 to 1"),
    (train, "--dropout 1", "--dropout: 1 is impossible"),
    (train, "--schedule quadratic", "invalid choice: 'quadratic'"),
    (train, "--device tpu", "--device tpu: not on this machine"),
    (train, "--device cuda:99", "--device cuda:99: not on this machine"),
    (train, "--compile --precision bf16 --device cpu", "loses gradients of a compiled network in bf16"),
    (train, "--size 32", "--size is for a folder of images"),
    (train, "--data . --size 30x32", "multiples of 8; try 24x32 or 32x32"),
    (train, "--data . --size big", "--size big: must be one number or HEIGHTxWIDTH"),
    (train, "--data . --size 0", "--size 0: must be"),
    (train, "--resume ''", "--resume: must not be empty"),
    (train, "--lr inf", "--lr: inf is impossible"),
    (train, "--epochs 99999999999", "--epochs: 99999999999 is impossible"),
    (train, "--out a.pt --log a.pt", "--log a.pt: is the checkpoint"),
    (train, "--width 10", "--width 10: must be a multiple of 4"),
    (train, "--data . --out ckpt.pt", "--out ckpt.pt: is inside --data"),
    (sample, "--out a.png", "arguments are required: --ckpt"),
    (sample, "--ckpt {ckpt} --out a.jpg", "must end in .png, .gif, .webp, .npz, or in / for a folder"),
    (sample, "--ckpt {ckpt} --out a.png --steps 21", "the checkpoint has T = 20 steps"),
    (sample, "--ckpt {ckpt} --out a.png --eta 0 --variance beta", "--eta is DDIM's and --variance"),
    (sample, "--ckpt {ckpt} --out a.png --variance learned", "this network has learned none"),
    (sample, "--ckpt {ckpt} --out a.png --guidance -2", "--guidance: -2 is impossible"),
    (sample, "--ckpt {ckpt} --out a.png --label 7,Q", "--label Q: not a class of this checkpoint"),
    (train, "--variance guessed", "invalid choice: 'guessed'"),
    (sample, "--ckpt {ckpt} --out a.gif --n 99999 --steps 1", "too many for one .gif picture"),
    (sample, "--ckpt {ckpt} --out a.png --eta 2", "--eta: 2 is impossible"),
    (sample, "--ckpt {ckpt} --out a.png --label Q", "--label Q: not a class of this checkpoint; its classes"),
    (evaluate, "--ckpt {ckpt} --n 0", "--n: 0 is impossible"),
])  # fmt: skip
def test_a_wrong_call_is_one_line_and_status_2(call, ckpt, tmp_path, module, flags, words):
    stripes(40, 40).save(tmp_path / "image.png")
    status, out, err = call(module, *shlex.split(flags.format(ckpt=ckpt)))
    assert status == 2 and out == "" and err.count("\n") == 1 and words in err, err
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("module, flags, words", [
    (train, "--data nowhere", "there is no such folder"),
    (train, "--data empty", "there are no images in it"),
    (train, "--out nowhere/ckpt.pt", "there is no folder nowhere"),
    (train, "--out empty", "is a folder"),
    (train, "--out new/", "is a folder"),
    (train, "--out /dev/null", "is not an ordinary file"),
    (train, "--data full/a.png", "it is a file"),
    (train, "--log text.pt", "--log text.pt: exists, and is not a log"),
    (sample, "--ckpt edited.pt --out a.png", "contents do not fit together"),
    (train, "--resume edited.pt", "contents do not fit together"),
    (train, "--resume settings.pt", "contents do not fit together"),
    (sample, "--ckpt variance.pt --out a.png", "contents do not fit together"),
    (sample, "--ckpt classes.pt --out a.png --label 1", "contents do not fit together"),
    (sample, "--ckpt empty --out a.png", "is a folder"),
    (evaluate, "--ckpt nan.pt --n 1", "not finite"),
    (train, "--resume nowhere.pt", "no such file"),
    (train, "--resume half.pt", "not a checkpoint of train.py, or not all of one"),
    (sample, "--ckpt flipped.pt --out a.png", "damaged: its checksum"),
    (sample, "--ckpt nowhere.pt --out a.png", "no such file"),
    (sample, "--ckpt half.pt --out a.png", "not a checkpoint of train.py, or not all"),
    (sample, "--ckpt text.pt --out a.png", "not a checkpoint of train.py, or not all"),
    (sample, "--ckpt pickle.pt --out a.png", "not a checkpoint of train.py, or not all"),
    (sample, "--ckpt tensor.pt --out a.png", "not a checkpoint of train.py, or not all"),
    (sample, "--ckpt newer.pt --out a.png", "its format, 2, is newer"),
    (sample, "--ckpt nan.pt --out a.png --n 1", "not finite"),
    (sample, "--ckpt {ckpt} --out nowhere/a.png", "there is no folder nowhere"),
    (sample, "--ckpt {ckpt} --out full/", "the folder is not empty"),
    (sample, "--ckpt {ckpt} --out .", "the folder is not empty"),
    (evaluate, "--ckpt {ckpt} --data nowhere", "there is no such folder"),
    (evaluate, "--ckpt {ckpt} --data full", "a.png: is in no subfolder"),
])  # fmt: skip
def test_a_failing_world_is_one_line_and_status_1(call, ckpt, tmp_path, module, flags, words):
    whole = ckpt.read_bytes()
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "a.png").touch()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "pickle.pt").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    saved = sample.load_checkpoint(ckpt)
    bad = {k: v * float("nan") for k, v in saved["ema"].items()}
    for name, change in {
        "edited.pt": {"network": {**saved["network"], "ch": 16}}, "newer.pt": {"ddpm_format": 2},
        "nan.pt": {"ema": bad}, "settings.pt": {"config": {**saved["config"], "lr": "fast"}},
        "variance.pt": {"config": {**saved["config"], "variance": "learned"}},
        "classes.pt": {"classes": list(range(10))},
    }.items():  # fmt: skip
        sample.save_checkpoint(tmp_path / name, {**saved, **change})
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (tmp_path / "flipped.pt").write_bytes(flipped)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = call(module, *flags.format(ckpt=ckpt).split())
    assert status == 1 and out == "" and err.count("\n") == 1 and words in err, err
    assert sorted(tmp_path.rglob("*")) == before, "a file appeared or was lost"


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


def test_a_folder_may_be_where_its_cache_is_too(album):
    """The cache of its own images is not taken for one of them."""
    count = len(train.load_folder(album, (8, 8), 3, album, False)[0])
    assert len(train.load_folder(album, (8, 8), 3, album, False)[0]) == count


def test_an_output_that_takes_no_more_is_one_line(ckpt):
    """Also where Python buffers what is printed, and would find out at its very end."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "evaluate.py", "--ckpt", ckpt, "--n", "1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=env, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "evaluate.py: error: " in done.stderr and "No space left" in done.stderr


def test_a_folder_of_samples_is_there_whole_or_not_at_all(call, ckpt, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample, "to_picture", full)
    status, _, err = call(sample, "--ckpt", ckpt, "--out", "new/", "--n", 2, "--steps", 1)
    assert status == 1 and "No space left" in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, words", [
    ("--width 16", "--width 16: the run to resume has 8"),
    ("--variance learned", "--variance learned: the run to resume has fixed"),
    ("--timesteps 30", "--timesteps 30: the run to resume has 20"),
    ("--epochs 4", "has done 4 of 4 epochs; ask for more with --epochs"),
])  # fmt: skip
def test_resuming_another_run_or_a_finished_one_is_refused(call, ckpt, tmp_path, flags, words):
    (tmp_path / "a.pt").write_bytes(ckpt.read_bytes())
    status, _, err = call(train, "--resume", "a.pt", *flags.split())
    assert status == 2 and words in err and err.count("\n") == 1
    assert (tmp_path / "a.pt").read_bytes() == ckpt.read_bytes()


def test_a_loss_that_is_not_finite_stops_the_run_and_touches_nothing(call, tmp_path):
    (tmp_path / "ckpt.pt").write_text("the old one")
    status, _, err = call(train, *TINY, "--epochs", 3, "--lr", 1e30)
    assert status == 1 and "step 2: the loss: nan" in err and "--lr" in err
    assert (tmp_path / "ckpt.pt").read_text() == "the old one"


def test_a_schedule_that_leaves_the_image_in_xT_is_pointed_out(call):
    """The paper's linear schedule with T = 20 ends at alpha_bar_T = 0.8: a note, not a refusal."""
    status, _, err = call(train, *TINY, "--epochs", 1, "--schedule", "linear")
    assert status == 0 and "alpha_bar_T = 0.82" in err

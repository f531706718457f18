"""sample.py: samplers, classes, seeds, and the files that it writes."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from running import run
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import sample
from support import checkpoint, pictures, sampling


def test_sample_draws_a_grid_and_says_how(trained, ckpt, tmp_path):
    status, out, err = run(
        "sample.py", "--ckpt", ckpt, "--out", tmp_path / "grid.png", "--steps", 5
    )
    assert status == 0 and err == ""
    assert "DDIM, 5 steps, eta 0, ema weights at step 16" in out
    assert Image.open(tmp_path / "grid.png").size > (300, 300)


def test_labels_are_the_classes_asked_for_in_turn_and_a_grid_has_one_a_row():
    """class_labels: labels and rows; the grid is filled column by column."""
    names = ["cat", "dog", "a,b", "eel"]
    for label, n, labels, rows in (
        (None, 6, [0, 1, 2, 3, 0, 1], 4), ("all", 5, [0, 1, 2, 3, 0], 4), ("dog", 3, [1, 1, 1], 2),
        ("eel, cat", 3, [3, 0, 3], 2), ("a,b", 1, [2], 1), (None, 2, [0, 1], 2),
    ):  # fmt: skip
        got, shape = sampling.class_labels(names, label, n)
        assert (got.tolist(), shape) == (labels, rows)
    assert sampling.class_labels(names)[0].tolist() == [0, 1, 2, 3] * 8
    assert len(sampling.class_labels(names, "cat")[0]) == len(sampling.class_labels([])[0]) == 64
    images = np.full((5, 64, 64, 1), 0, np.uint8)
    images += np.arange(1, 6, dtype=np.uint8)[:, None, None, None]
    sheet = np.asarray(pictures.grid(images, 2))[30::66, 30::66]
    assert sheet.tolist() == [[1, 3, 5], [2, 4, 255]]


def test_sampling_chooses_ancestral_or_ddim_variance_and_weights(call, ckpt):
    """One seed, six ways to draw, six pictures; eta = 1 on all T steps is the variance beta_tilde."""
    ways = (
        "",
        "--variance beta_tilde",
        "--eta 0",
        "--steps 7",
        "--weights raw",
        "--label 3",
        "--eta 1",
    )
    drawn = {}
    for way in ways:
        status, _, err = call(sample, "--ckpt", ckpt, "--out", "a.npz", "--n", 2, *way.split())
        assert status == 0, err
        drawn[way] = np.load("a.npz")["arr_0"].astype(int)
    assert abs(drawn["--eta 1"] - drawn["--variance beta_tilde"]).max() <= 1
    assert len({images.tobytes() for way, images in drawn.items() if way != "--eta 1"}) == 6


def test_guidance_0_is_the_class_and_minus_1_no_class_at_all(call, ckpt):
    """One seed: w = 0 is the default; at w = -1 the label has no say; w = 2 goes beyond both."""

    def draw(*flags):
        status, out, err = call(
            sample, "--ckpt", ckpt, "--out", "a.npz", "--n", 3, "--steps", 4, *flags
        )
        assert status == 0, err
        return np.load("a.npz")["arr_0"], out

    ways = [], ["--guidance", 0], ["--guidance", 2]
    plain, zero, two = (draw("--label", "3", *flags)[0] for flags in ways)
    free, said = draw("--label", "3", "--guidance", -1)
    assert (
        (plain == zero).all()
        and (plain != two).any()
        and (plain != free).any()
        and "w = -1" in said
    )
    assert (free == draw("--label", "7,1", "--guidance", -1)[0]).all()


def test_learned_variances_are_trained_sampled_and_evaluated(call, learned, tmp_path):
    """The network says two halves; all samplers take it; its bound is a third column."""
    saved = checkpoint.load(learned)
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


def test_a_seed_gives_the_same_picture_at_any_batch_size(call, ckpt):
    """Image i is drawn from seed + i: the third of --seed 5 is the only one of --seed 7."""
    how = ["--ckpt", ckpt, "--steps", 3, "--eta", 1, "--label", "1"]
    call(sample, *how, "--out", "a.npz", "--n", 4, "--seed", 5, "--batch-size", 3)
    call(sample, *how, "--out", "b.npz", "--n", 1, "--seed", 7)
    a, b = (np.load(name)["arr_0"].astype(int) for name in ("a.npz", "b.npz"))
    assert abs(a[2] - b[0]).max() <= 1  # a convolution may sum in another order in another batch
    assert abs(a[1] - b[0]).max() > 1


@pytest.mark.parametrize("out", ["a.gif", "a.WEBP", "a.npz", "a/"])
def test_sample_writes_animations_arrays_and_folders(call, trained, ckpt, tmp_path, out):
    _, H, W = checkpoint.load(ckpt)["shape"]
    status, _, err = call(sample, "--ckpt", ckpt, "--out", out, "--n", 3, "--steps", 4)
    assert status == 0, err
    if out == "a.npz":
        arrays = np.load(out)
        assert arrays["arr_0"].shape == (3, H, W, 3) and arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].tolist() == [0, 1, 2]
    elif out == "a/":
        assert [p.name for p in sorted(tmp_path.glob("a/*"))] == [f"00000{i}.png" for i in range(3)]
        assert Image.open("a/000000.png").size == (W, H)
    else:
        film = Image.open(out)
        assert film.n_frames == 4


def test_a_film_is_small_enough_to_send_and_ends_with_the_images_themselves(call, ckpt):
    """A hardly trained network's frames are noise, which no format compresses: of 80 images the film takes
    less than a megabyte all the same. Its last frame is the grid that a .png shows, in all 256 levels."""
    flags = ["--ckpt", ckpt, "--steps", 20, "--eta", 1]
    for out, n in ("many.gif", 80), ("few.gif", 6), ("few.png", 6):
        assert call(sample, *flags, "--out", out, "--n", n)[0] == 0
    assert os.path.getsize("many.gif") < 1e6
    film = Image.open("few.gif")
    film.seek(film.n_frames - 1)
    assert film.n_frames == 20
    assert np.array_equal(film.convert("L"), Image.open("few.png"))


def test_a_folder_of_samples_is_there_whole_or_not_at_all(call, ckpt, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures, "to_picture", full)
    status, _, err = call(sample, "--ckpt", ckpt, "--out", "new/", "--n", 2, "--steps", 1)
    assert status == 1 and "No space left" in err and not list(tmp_path.iterdir())


def test_pixels_survive_the_way_to_minus_1_1_and_back():
    """uint8 -> [-1, 1] -> uint8 is the identity on all 256 levels; outside is clipped."""
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert (pictures.to_uint8(levels.float() / 127.5 - 1).ravel() == np.arange(256)).all()
    assert pictures.to_uint8(torch.tensor([-7.0, 7.0]).reshape(1, 1, 1, 2)).ravel().tolist() == [
        0,
        255,
    ]


def test_bfloat16_draws_nearly_the_same_picture(call, ckpt):
    """Tables and samples stay float32; the network alone is rounded to 8 bits."""
    drawn = []
    for precision in ("fp32", "bf16"):
        how = [
            "--ckpt",
            ckpt,
            "--out",
            "a.npz",
            "--n",
            4,
            "--precision",
            precision,
            "--device",
            "cpu",
        ]
        assert call(sample, *how)[0] == 0
        drawn.append(np.load("a.npz")["arr_0"].astype(int))
    off = abs(drawn[0] - drawn[1])
    assert 0 < off.mean() < 2, off.mean()


def test_sampling_in_bfloat16_rounds_the_weights_once_and_not_at_every_step(ckpt):
    """autocast keeps what it has rounded of a weight, but only where the weight could have a gradient."""
    _, net, d = checkpoint.load_model(ckpt)
    weights = {p.data_ptr() for p in net.parameters()}

    class Count(TorchDispatchMode):
        roundings = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.roundings += (
                op is torch.ops.aten._to_copy.default and args[0].data_ptr() in weights
            )
            return op(*args, **(kwargs or {}))

    counts = []
    for steps in (1, 4):
        with torch.autocast("cpu", torch.bfloat16), Count() as count:
            sampling.sample(net, d, (1, 16, 16), [0, 1], [3, 5], steps, eta=0.0)
        counts.append(count.roundings)
    assert counts[0] == counts[1] > 50, counts

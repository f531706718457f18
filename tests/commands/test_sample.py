"""sample.py: samplers, classes, seeds, and the files that it writes."""

import os

import numpy as np
import pytest
from PIL import Image
from running import run

import evaluate
import figures
import sample
from support import checkpoint, diffusers_format, sampling
from support.errors import UsageError


def arrays(call, *flags):
    """Return the images of a call of sample.py that writes an .npz, as ints, and what it printed."""
    status, out, err = call(sample, *flags, "--out", "a.npz")
    assert status == 0, err
    return np.load("a.npz")["arr_0"].astype(int), out + err


def test_sample_writes_a_grid_and_prints_how(trained, ckpt, tmp_path):
    flags = ["--ckpt", ckpt, "--out", tmp_path / "grid.png", "--steps", 5]
    status, out, err = run("sample.py", *flags)
    assert status == 0 and err == ""
    assert "64 images" not in out and "DDIM, 5 steps, eta 0, ema weights at step 16" in out
    assert Image.open(tmp_path / "grid.png").size > (300, 300)


def test_the_flags_choose_sampler_variance_weights_and_timesteps(call, ckpt):
    """One seed, seven ways, seven pictures; eta = 1 with all T steps is the variance beta_tilde."""
    ways = ["", "--variance beta_tilde", "--eta 0", "--steps 7", "--weights raw", "--label 3"]
    ways += ["--steps 7 --spacing quadratic", "--eta 1"]
    found = {}
    for way in ways:
        found[way], _ = arrays(call, "--ckpt", ckpt, "--n", 2, *way.split())
    assert abs(found["--eta 1"] - found["--variance beta_tilde"]).max() <= 1
    assert len({images.tobytes() for way, images in found.items() if way != "--eta 1"}) == 7


def test_the_older_name_of_spacing_still_works(call, ckpt):
    flags = ["--ckpt", ckpt, "--n", 2, "--steps", 4]
    new, _ = arrays(call, *flags, "--spacing", "quadratic")
    old, _ = arrays(call, *flags, "--grid", "quadratic")
    assert np.array_equal(new, old)


def test_guidance_0_is_the_class_and_minus_1_is_no_class(call, ckpt):
    """w = 0 is the default; w = 2 differs. At w = -1 the class is not used."""
    flags = ["--ckpt", ckpt, "--n", 3, "--steps", 4]
    plain, _ = arrays(call, *flags, "--label", 3)
    zero, _ = arrays(call, *flags, "--label", 3, "--guidance", 0)
    two, _ = arrays(call, *flags, "--label", 3, "--guidance", 2)
    free, printed = arrays(call, *flags, "--guidance", -1)
    assert np.array_equal(plain, zero) and (plain != two).any()
    assert (plain != free).any() and "w = -1" in printed


def test_learned_variances_are_sampled_in_all_ways(call, learned):
    words = {
        "": "ancestral, 20 steps, sigma^2 = learned",
        "--steps 5": "ancestral, 5 steps, sigma^2 = learned",
        "--variance beta": "ancestral, 20 steps, sigma^2 = beta,",
        "--steps 5 --eta 0": "DDIM, 5 steps, eta 0",
        "--steps 5 --variance beta_tilde": "ancestral, 5 steps, sigma^2 = beta_tilde",
    }
    found = set()
    for way, how in words.items():
        images, printed = arrays(call, "--ckpt", learned, "--n", 2, *way.split())
        assert how in printed
        found.add(images.tobytes())
    assert len(found) == 5


def test_an_image_does_not_depend_on_its_batch(call, ckpt):
    flags = ["--ckpt", ckpt, "--steps", 3, "--eta", 1, "--label", "1", "--seed", 5, "--n", 4]
    one, _ = arrays(call, *flags, "--batch-size", 3)
    other, _ = arrays(call, *flags, "--batch-size", 1)
    assert abs(one - other).max() <= 1  # a convolution may sum in another order
    assert abs(one[0] - one[1]).max() > 1


@pytest.mark.parametrize("out", ["a.gif", "a.WEBP", "a.npz", "a/"])
def test_sample_writes_animations_arrays_and_folders(call, ckpt, tmp_path, out):
    """Arrays and folders say which class each image has."""
    _, H, W = checkpoint.load(ckpt)["shape"]
    status, _, err = call(sample, "--ckpt", ckpt, "--out", out, "--n", 3, "--steps", 4)
    assert status == 0, err
    if out == "a.npz":
        file = np.load(out)
        assert file["arr_0"].shape == (3, H, W, 3) and file["arr_0"].dtype == np.uint8
        assert file["arr_1"].tolist() == [0, 1, 2]
        assert file["classes"].tolist() == [str(digit) for digit in range(10)]
    elif out == "a/":
        names = sorted(path.name for path in tmp_path.glob("a/*"))
        assert names == [f"00000{i}-{i}.png" for i in range(3)]
        assert Image.open("a/000000-0.png").size == (W, H)
    else:
        assert Image.open(out).n_frames == 4


def test_a_film_is_small_and_ends_with_the_images_themselves(call, ckpt):
    """80 noisy images take less than two megabytes. The last frame is the grid of a .png, in 256 levels."""
    flags = ["--ckpt", ckpt, "--steps", 20, "--eta", 1]
    for out, n in ("many.gif", 80), ("few.gif", 6), ("few.png", 6):
        assert call(sample, *flags, "--out", out, "--n", n)[0] == 0
    assert os.path.getsize("many.gif") < 2e6
    film = Image.open("few.gif")
    film.seek(film.n_frames - 1)
    assert film.n_frames == 20
    assert np.array_equal(film.convert("L"), Image.open("few.png"))


def interrupt_after(monkeypatch, batches):
    """Make sampling fail like Ctrl-C after this many batches. Returns the list of the sampled seeds."""
    seeds = []

    def sampled(net, d, shape, some, *args, original=sampling.sample, **how):
        if batches is not None and len(seeds) >= batches:
            raise KeyboardInterrupt
        seeds.append(list(some))
        return original(net, d, shape, some, *args, **how)

    monkeypatch.setattr(sampling, "sample", sampled)
    return seeds


def test_an_interrupted_folder_keeps_its_batches_and_the_same_call_continues_it(
    call, ckpt, tmp_path, monkeypatch
):
    flags = ["--ckpt", ckpt, "--n", 7, "--steps", 3, "--batch-size", 3]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert call(sample, *flags, "--out", "part/")[0] == 130
    assert len(list(tmp_path.glob("part/*"))) == 3
    with monkeypatch.context() as patch:
        seeds = interrupt_after(patch, None)
        status, _, err = call(sample, *flags, "--out", "part/")
        assert status == 0 and "keeps its 3 of 7 images" in err
        assert seeds == [[3, 4, 5], [6]]
    assert call(sample, *flags, "--out", "whole/")[0] == 0
    for path in tmp_path.glob("whole/*"):
        part = np.asarray(Image.open(tmp_path / "part" / path.name), int)
        assert abs(part - np.asarray(Image.open(path), int)).max() <= 1, path.name


@pytest.mark.parametrize("flags", ["--n 3 --label 3", "--n 2", "--n 3"])
def test_a_folder_with_other_files_is_rejected_and_stays_as_it_is(call, ckpt, tmp_path, flags):
    """Images of another class, more images than requested, and files of other programs."""
    common = ["--ckpt", ckpt, "--steps", 2, "--out", "a/"]
    assert call(sample, *common, "--n", 3)[0] == 0
    if flags == "--n 3":
        (tmp_path / "a" / "notes.txt").touch()
    before = sorted(tmp_path.glob("a/*"))
    status, _, err = call(sample, *common, *flags.split())
    assert status == 1 and "choose another folder" in err and err.count("\n") == 1
    assert sorted(tmp_path.glob("a/*")) == before


def test_a_diffusers_folder_is_sampled_directly_as_the_checkpoint_it_came_from(
    call, ckpt, tmp_path
):
    saved = checkpoint.load(ckpt)
    (tmp_path / "net").mkdir()
    diffusers_format.write_folder(tmp_path / "net", dict(saved, weights=saved["ema"]))
    flags = ["--n", 2, "--steps", 3, "--label", 3, "--device", "cpu", "--precision", "fp32"]
    own, _ = arrays(call, "--ckpt", ckpt, *flags)
    theirs, _ = arrays(call, "--ckpt", "net", *flags)
    assert np.array_equal(own, theirs)
    status, _, err = call(sample, "--ckpt", "net", "--out", "a.png", "--weights", "raw")
    assert status == 2 and "--weights raw has no effect" in err


def test_bfloat16_gives_nearly_the_same_picture(call, ckpt):
    """Tables and samples stay float32; only the network is rounded to 8 bits."""
    found = []
    for precision in ("fp32", "bf16"):
        flags = ["--ckpt", ckpt, "--n", 4, "--precision", precision, "--device", "cpu"]
        found.append(arrays(call, *flags)[0])
    assert 0 < abs(found[0] - found[1]).mean() < 2


@pytest.mark.parametrize("flags, words", [
    ("--label Q", "--label Q: not a class; choose from 0, 1, 2"),
    ("--label 7,Q", "--label Q: not a class"),
    ("--steps 21", "the checkpoint has T = 20 timesteps"),
    ("--spacing quadratic", "--spacing: all 20 timesteps are used; add --steps"),
    ("--eta 0 --variance beta", "--eta selects DDIM, --variance does not; use one"),
    ("--variance learned", "--variance learned: this network has none"),
    ("--label 3 --guidance -1", "--label: --guidance -1 samples without a class"),
    ("--n 99999 --steps 1", "--n 99999: too many for one .png"),
])  # fmt: skip
def test_a_wrong_call_is_one_line_and_writes_nothing(call, ckpt, tmp_path, flags, words):
    status, out, err = call(sample, "--ckpt", ckpt, "--out", "a.png", *flags.split())
    assert status == 2 and out == "" and err.count("\n") == 1 and words in err, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", [sample, evaluate, figures], ids=lambda module: module.__name__)
def test_a_network_whose_training_diverged_is_reported(call, ckpt, tmp_path, module):
    saved = checkpoint.load(ckpt)
    bad = {name: weight * float("nan") for name, weight in saved["ema"].items()}
    checkpoint.save(tmp_path / "nan.pt", dict(saved, ema=bad))
    flags = ["--out", "a.png"] if module is sample else ["--out", "f"] if module is figures else []
    status, out, err = call(module, "--ckpt", "nan.pt", "--n", 1, *flags)
    assert status == 1 and out == "" and "training diverged" in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["nan.pt"]


@pytest.mark.parametrize("flag", ["label", "guidance"])
def test_flags_of_classes_are_rejected_for_a_network_without_classes(ckpt, flag):
    saved = dict(checkpoint.load(ckpt), classes=[])
    with pytest.raises(UsageError, match=f"--{flag}.*this network has no classes"):
        sample.sampler(sample.Config(ckpt="", out=""), {flag}, saved, 20)

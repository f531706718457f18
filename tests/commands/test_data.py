"""Glyphs and folders of images: decoded, cached, labelled, and refused."""

import os

import numpy as np
import pytest
from PIL import Image
from running import stripes

import evaluate
import sample
import train
from support import checkpoint, data
from support.data import decode, folder, glyphs
from support.errors import Failure


def test_glyphs_are_the_same_for_the_same_seed_and_others_are_held_out():
    a, labels = glyphs.draw(50, seed=3)
    b, _ = glyphs.draw(50, seed=3)
    c, _ = glyphs.draw(50, seed=4)
    assert a.dtype == np.uint8 and (a == b).all() and not (a == c).all()
    assert labels.shape == (50,) and labels.max() < len(glyphs.GLYPHS)
    held_out = data.load("glyphs", train=False).images
    assert len(held_out) == 2000
    training = {image.tobytes() for image in data.load("glyphs", train=True).images.numpy()}
    assert not training & {image.tobytes() for image in held_out.numpy()}


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
    images = folder.load(album, (16, 24), 3, tmp_path / "cache", skip_broken=False)[0]
    names = sorted(str(p.relative_to(album)) for p in album.rglob("*.*") if not p.name.startswith("."))
    files = sorted(p for p in album.rglob("*") if p.is_file() and not p.name.startswith("."))
    assert images.shape == (len(names), 3, 16, 24) and len(names) == 9
    by_name = {p.name: image for p, image in zip(files, images, strict=True)}
    assert (by_name["clear.webp"] == 255).all()
    for name in ("deep.png", "float.tiff"):
        assert abs(by_name[name].astype(int) - 128).max() <= 1
    square = folder.load(album, (16, 16), 3, tmp_path / "cache", skip_broken=False)[0]
    wide = square[files.index(album / "wide.png")]
    assert (wide[1, :, 1:-1] > 200).all() and (wide[0, :, 1:-1] < 60).all()
    grey = folder.load(album, (16, 16), 1, tmp_path / "cache", skip_broken=False)[0]
    assert grey.shape == (9, 1, 16, 16)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned by 90 degrees
    (tmp_path / "a").mkdir()
    stripes(30, 30).save(tmp_path / "a" / "turned.png", exif=exif)
    image = folder.load(tmp_path / "a", (30, 30), 3, tmp_path, skip_broken=False)[0][0]
    assert (image[0, :9] == 255).all() and (image[2, -9:] == 255).all()  # red on top, blue below


def test_a_folder_is_decoded_once_and_again_when_it_changes(album, tmp_path, monkeypatch):
    load = lambda: folder.load(album, (8, 8), 3, tmp_path / "cache", False)[0]  # noqa: E731
    first = np.array(load())
    monkeypatch.setattr(decode, "decode", lambda *args: pytest.fail("decoded twice"))
    assert (load() == first).all()
    monkeypatch.undo()
    stripes(30, 30).save(album / "new.png")
    assert len(load()) == len(first) + 1


def test_links_pipes_and_names_of_a_folder_are_taken_for_what_they_are(album, tmp_path, call):
    """A link back into the folder adds nothing, a pipe is no file, a newline stays inside one line; a
    link to nothing is a broken file."""
    count = len(folder.load(album, (8, 8), 3, tmp_path / "cache", False)[0])
    (album / "more" / "loop").symlink_to(album)
    os.mkfifo(album / "pipe.png")
    stripes(9, 9).save(album / "line\nbreak.png")
    assert len(folder.load(album, (8, 8), 3, tmp_path / "cache", False)[0]) == count + 1
    (album / "a\nb.png").symlink_to("nothing")
    status, _, err = call(train, "--data", album)
    assert status == 1 and err.count("\n") == 1 and "a\\nb.png: cannot be read" in err


def test_a_folder_that_changes_while_it_is_read_is_refused(album, tmp_path, monkeypatch):
    """A file comes or goes while the others are decoded: no cache of a state that never was."""
    real = decode.decode

    def meddling(path, *how):
        (album / "new.png").write_bytes((album / "wide.png").read_bytes())
        return real(path, *how)

    monkeypatch.setattr(decode, "decode", meddling)
    with pytest.raises(Failure, match="changed while it was read"):
        folder.load(album, (8, 8), 3, tmp_path / "cache", False)[0]
    assert not list((tmp_path / "cache").iterdir())


def test_a_folder_may_be_where_its_cache_is_too(album):
    """The cache of its own images is not taken for one of them."""
    count = len(folder.load(album, (8, 8), 3, album, False)[0])
    assert len(folder.load(album, (8, 8), 3, album, False)[0]) == count


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
    saved = checkpoint.load("ckpt.pt")
    assert saved["classes"] == ["big dog", "cat", "eel"] and saved["network"]["num_classes"] == 3
    images, labels, _ = data.load(saved["config"]["data"], True, size=(8, 8), channels=1, skip_broken=True,
                                  labels=True)  # fmt: skip
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


def test_a_file_that_is_no_image_is_named_and_can_be_skipped(call, album):
    (album / "notes.txt").write_text("hello")
    whole = (album / "wide.png").read_bytes()
    (album / "half.png").write_bytes(whole[: len(whole) // 2])
    flags = ["--data", album, "--epochs", 1, "--width", 8, "--timesteps", 2, "--batch-size", 9, "--size", 8]
    status, _, err = call(train, *flags)
    assert status == 1 and "half.png: cannot be read as an image" in err and "--skip-broken" in err
    status, out, err = call(train, *flags, "--skip-broken")
    assert status == 0 and "9 images" in out and "left out 2 of 11 files" in err

"""Glyphs and folders of images: decoded, cached, labelled, and refused."""

import errno
import os
import pathlib
import subprocess
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
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
    held_out = data.load("glyphs", "held out").images
    assert len(held_out) == 2000
    training = {image.tobytes() for image in data.load("glyphs", "training").images.numpy()}
    assert not training & {image.tobytes() for image in held_out.numpy()}


ONE_STEP = "--width 8 --timesteps 5 --device cpu --epochs 1 --sample-every 0".split()


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
    names = sorted(
        str(p.relative_to(album)) for p in album.rglob("*.*") if not p.name.startswith(".")
    )
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
    link to nothing, or to itself, is a broken file."""
    count = len(folder.load(album, (8, 8), 3, tmp_path / "cache", False)[0])
    (album / "more" / "loop").symlink_to(album)
    os.mkfifo(album / "pipe.png")
    stripes(9, 9).save(album / "line\nbreak.png")
    assert len(folder.load(album, (8, 8), 3, tmp_path / "cache", False)[0]) == count + 1
    for target in ("nothing", "a\nb.png"):
        (album / "a\nb.png").symlink_to(target)
        status, _, err = call(train, "--data", album)
        assert status == 1 and err.count("\n") == 1 and "a\\nb.png: cannot be read" in err, err
        (album / "a\nb.png").unlink()


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
    assert status == 0 and f"{album}: 9 images, 16x24x1" in out, err
    assert call(sample, "--ckpt", "ckpt.pt", "--out", "a.npz", "--n", 2)[0] == 0
    assert np.load("a.npz")["arr_0"].shape == (2, 16, 24, 3)
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
    tiny = [
        "--batch-size",
        4,
        "--width",
        8,
        "--timesteps",
        5,
        "--device",
        "cpu",
        "--epochs",
        1,
        "--size",
        8,
    ]
    flags = ["--data", "pets", "--labels", "--channels", 1, "--skip-broken", *tiny]
    (tmp_path / "pets" / "a link").symlink_to(
        "cat"
    )  # which is there anyway, and is no class of its own
    (tmp_path / "pets" / "notes.txt").write_text("no image, and in no folder")
    for damage in (
        None,
        None,
        lambda cache: cache[:200],
        lambda cache: bytes(len(cache)),
        lambda cache: b"",
    ):
        if damage:  # decoded; from the cache; decoded, for the cache is damaged
            [cache] = (tmp_path / "data").iterdir()
            cache.write_bytes(damage(cache.read_bytes()))
        status, out, err = call(train, *flags)
        assert status == 0 and "5 images, 8x8x1, 3 classes" in out, err
    saved = checkpoint.load("ckpt.pt")
    assert saved["classes"] == ["big dog", "cat", "eel"] and saved["network"]["num_classes"] == 3
    images, labels, _ = data.load(saved["config"]["data"], "all", size=(8, 8), channels=1, skip_broken=True,
                                  labels=True)  # fmt: skip
    assert ((images[:, 0, 0, 0] - 10) // 100).tolist() == labels.tolist() == [0, 1, 1, 1, 2]
    assert (
        call(sample, "--ckpt", "ckpt.pt", "--out", "a.npz", "--n", 3, "--label", "eel,big dog")[0]
        == 0
    )
    assert np.load("a.npz")["arr_1"].tolist() == [2, 0, 2]
    status, out, err = call(evaluate, "--ckpt", "ckpt.pt", "--n", 2, "--skip-broken")
    assert status == 0 and "2 images it was trained on" in out, err
    (tmp_path / "pets" / "fox").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "pets" / "fox" / "a.png")
    status, _, err = call(evaluate, "--ckpt", "ckpt.pt", "--skip-broken")
    assert status == 1 and "not the images with which this run began" in err
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
    flags = [
        "--data",
        album,
        "--epochs",
        1,
        "--width",
        8,
        "--timesteps",
        2,
        "--batch-size",
        9,
        "--size",
        8,
    ]
    status, _, err = call(train, *flags)
    assert status == 1 and "half.png: cannot be read as an image" in err and "--skip-broken" in err
    status, out, err = call(train, *flags, "--skip-broken")
    assert status == 0 and "9 images" in out and "left out 2 of 11 files" in err


# --- What makes an image broken, and what does not -----------------------------------------------


@pytest.mark.parametrize(
    "number", [errno.EMFILE, errno.EACCES, errno.ENOMEM, errno.ESTALE, errno.EIO]
)
def test_a_machine_that_fails_to_read_a_file_stops_the_run_with_its_name(
    call, album, monkeypatch, number
):
    """Too many open files, no permission, no memory, a stale network share: no image is left out for it,
    and nothing is cached."""
    real = pathlib.Path.read_bytes

    def fail(path):
        if path.name == "wide.png":
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(pathlib.Path, "read_bytes", fail)
    status, _, err = call(train, "--data", album, "--skip-broken", "--size", 8, *ONE_STEP)
    assert status == 1 and err == f"train.py: error: {album}/wide.png: {os.strerror(number)}\n"
    assert not list(pathlib.Path("data").iterdir())


def test_a_memory_that_is_too_small_stops_the_run_with_the_files_name(call, album, monkeypatch):
    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(decode.ImageOps, "fit", fail)
    status, _, err = call(train, "--data", album, "--skip-broken", "--size", 8, *ONE_STEP)
    assert status == 1 and err.count("\n") == 1 and "the memory is too small to decode it" in err


@pytest.mark.parametrize("content, words", [
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "PostScript is a"),
    (b"\0\0\0\x18ftypheic" + bytes(40), "package pillow-heif"),
    (b"\xff\x0a" + bytes(40), "package pillow-jxl-plugin"),
    (b"hello", "its format is not known"),
    (b"", "its format is not known"),
], ids=["EPS", "HEIC", "JPEG XL", "text", "empty"])  # fmt: skip
def test_a_file_that_is_not_decoded_here_says_what_it_is(tmp_path, monkeypatch, content, words):
    """No other program runs on it, whatever its name."""
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **how: pytest.fail("a program was started")
    )
    (tmp_path / "holiday.jpg").write_bytes(content)
    assert words in decode.decode(tmp_path / "holiday.jpg", (8, 8), 3)


def grey(values, mode, tmp_path):
    """The mean that decode() gives to a TIFF of these values."""
    Image.fromarray(np.asarray(values, mode)).save(tmp_path / "a.tiff")
    got = decode.decode(tmp_path / "a.tiff", (8, 8), 1)
    return np.frombuffer(got, np.uint8).mean() if isinstance(got, bytes) else got


def test_a_value_means_the_same_in_every_image(tmp_path):
    """Floats go from 0 to 1, with or without a pixel of 1.02; 16 bits go to 65535. What has no known range
    is refused in words."""
    half = np.full((8, 8), 0.5, np.float32)
    over = half.copy()
    over[3, 3] = 1.02
    assert (
        grey(half, np.float32, tmp_path) == 128 and abs(grey(over, np.float32, tmp_path) - 130) < 1
    )
    assert abs(grey(np.full((8, 8), 32768), np.uint16, tmp_path) - 128) <= 1
    assert "its floats go from 0.5 to 127.5, and 0 to 1 is expected" in grey(half * np.linspace(1, 255, 8),
                                                                            np.float32, tmp_path)  # fmt: skip
    (tmp_path / "a.pgm").write_bytes(b"P5 8 8 65535\n" + b"\x80\x00" * 64)
    assert set(decode.decode(tmp_path / "a.pgm", (8, 8), 1)) == {128}
    assert "32-bit integers have no known range" in grey(np.full((8, 8), 9), np.int32, tmp_path)


def test_a_colour_profile_is_applied_before_the_image_is_scaled(tmp_path):
    """With a profile that exchanges red and blue, the image has them exchanged; one that is no profile
    changes nothing."""
    wide = swapped_profile()
    image = Image.new("RGB", (20, 20), (250, 100, 0))
    for profile, want in (
        (None, (250, 100, 0)),
        (wide, (0, 100, 250)),
        (b"no profile", (250, 100, 0)),
    ):
        image.save(tmp_path / "a.png", icc_profile=profile)
        got = np.frombuffer(decode.decode(tmp_path / "a.png", (4, 4), 3), np.uint8).reshape(3, 16)[
            :, 0
        ]
        assert abs(got.astype(int) - want).max() <= 2, (profile and len(profile), got)


def swapped_profile():
    """sRGB's profile in which red and blue have changed places: the tags rXYZ and bXYZ."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(data[128:132], "big")
    tags = {bytes(data[i : i + 4]): i for i in range(132, 132 + 12 * count, 12)}
    for a, b in ((b"rXYZ", b"bXYZ"), (b"rTRC", b"bTRC")):
        i, j = tags[a] + 4, tags[b] + 4
        data[i : i + 8], data[j : j + 8] = data[j : j + 8], data[i : i + 8]
    return bytes(data)


@pytest.mark.parametrize("damage", [
    lambda cache, one: cache[:one] + cache[2 * one : 2 * one + 4] + cache[-32:],  # to its first image
    lambda cache, one: cache[: one - 1] + bytes([cache[one - 1] ^ 1]) + cache[one:],
    lambda cache, one: cache[:-1],
    lambda cache, one: b"",
], ids=["shortened", "flipped", "cut", "emptied"])  # fmt: skip
def test_a_cache_that_is_not_what_was_written_is_decoded_again(tmp_path, damage):
    (tmp_path / "two").mkdir()
    for i in range(2):
        Image.new("L", (8, 8), 10 + i).save(tmp_path / "two" / f"{i}.png")
    load = lambda: folder.load(tmp_path / "two", (8, 8), 1, tmp_path / "cache", False)[0]  # noqa: E731
    want = np.array(load())
    [cache] = (tmp_path / "cache").iterdir()
    cache.write_bytes(damage(cache.read_bytes(), 64))
    assert np.array_equal(load(), want)


def test_a_cache_is_not_written_through_a_link(tmp_path):
    (tmp_path / "one").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "one" / "a.png")
    folder.load(tmp_path / "one", (8, 8), 1, tmp_path / "cache", False)
    [cache] = (tmp_path / "cache").iterdir()
    (tmp_path / "precious").write_bytes(cache.read_bytes()[:-1])
    cache.unlink()
    cache.symlink_to(tmp_path / "precious")
    folder.load(tmp_path / "one", (8, 8), 1, tmp_path / "cache", False)
    assert (
        not cache.is_symlink()
        and len((tmp_path / "precious").read_bytes()) == cache.stat().st_size - 1
    )


def test_a_fingerprint_takes_no_copy_of_the_images():
    """It is that of all their bytes, computed an image at a time."""
    images = (
        torch.arange(40 * 3 * 64 * 64, dtype=torch.int64).to(torch.uint8).reshape(40, 3, 64, 64)
    )
    tracemalloc.start()
    got = data.fingerprint(data.Data(images, torch.arange(40), []))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert got == zlib.crc32(
        torch.arange(40).numpy().tobytes(), zlib.crc32(images.numpy().tobytes())
    )
    assert peak < images.nbytes / 10, f"{peak:,} bytes"

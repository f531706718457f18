"""support/data: the digits, folders of images, their splits, and the images for an evaluation."""

import errno
import pathlib
import subprocess
import unicodedata
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from running import stripes

from support import data
from support.data import decode, glyphs, split
from support.errors import Failure, UsageError


def grey(path, value, size=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (size, size), value).save(path)


def load(name, size=(8, 8), channels=1, **how):
    return data.load(str(name), str(name.parent / "cache"), size, channels, **how)


def values(part):
    """The grey value of each image."""
    return part.images[:][:, 0, 0, 0].tolist()


@pytest.fixture
def album(tmp_path):
    """A folder of 60 images in two subfolders, image i with the grey value 4 * i + 10."""
    for i in range(60):
        grey(tmp_path / "album" / ("ant", "bee")[i >= 30] / f"{i:02d}.png", 4 * i + 10)
    return tmp_path / "album"


# --- Digits --------------------------------------------------------------------------------------


def test_the_seed_determines_the_digits():
    a, b = (glyphs.draw(50, seed) for seed in (3, 4))
    assert np.array_equal(a[0], glyphs.draw(50, seed=3)[0]) and not np.array_equal(a[0], b[0])


def test_no_held_out_digit_is_a_training_digit():
    training, held = data.load("glyphs", "data")
    assert training.images.shape == (6000, 1, 16, 16) and held.images.shape == (512, 1, 16, 16)
    known = {image.numpy().tobytes() for image in training.images}
    assert not any(image.numpy().tobytes() in known for image in held.images)


# --- Decoding ------------------------------------------------------------------------------------


def decoded(path, size, channels=3):
    """The pixels (C, H, W) of one file."""
    pixels, _ = decode.decode(path, size, channels)
    return np.frombuffer(pixels, np.uint8).reshape(channels, *size).astype(int)


def test_an_image_is_cropped_at_its_centre_and_not_squashed(tmp_path):
    """The middle of red, green and blue thirds is green."""
    stripes(90, 30).save(tmp_path / "a.png")
    got = decoded(tmp_path / "a.png", (16, 16))
    assert (got[1, :, 1:-1] > 200).all() and (got[0, :, 1:-1] < 60).all()


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned by 90 degrees
    stripes(30, 30).save(tmp_path / "a.png", exif=exif)
    got = decoded(tmp_path / "a.png", (30, 30))
    assert (got[0, :9] == 255).all() and (got[2, -9:] == 255).all()  # red on top, blue below


@pytest.mark.parametrize("name, mode", [("a.gif", "P"), ("a.bmp", "L"), ("a.png", "1"), ("a.tif", "CMYK"),
                                        ("a.JPG", "RGB"), ("a.webp", "RGBA"), ("a.png", "LA"), ("a.tiff", "LAB")])  # fmt: skip
def test_every_mode_keeps_its_grey_value(tmp_path, name, mode):
    Image.new("RGB", (20, 30), (255, 255, 255)).convert(mode).save(tmp_path / name)
    for channels in (1, 3):
        assert (decoded(tmp_path / name, (8, 8), channels) >= 254).all()


def test_transparent_pixels_become_white(tmp_path):
    Image.new("RGBA", (20, 50), (0, 0, 255, 0)).save(tmp_path / "a.webp")
    assert (decoded(tmp_path / "a.webp", (8, 8)) == 255).all()


def test_an_animated_image_is_its_first_frame(tmp_path):
    frames = [Image.new("L", (9, 9), value) for value in (10, 200)]
    for kind in ("gif", "webp", "png"):
        frames[0].save(
            tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], lossless=True
        )
        assert (abs(decoded(tmp_path / f"a.{kind}", (8, 8), 1) - 10) <= 1).all()


def test_an_image_larger_than_pillows_limit_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    Image.new("L", (10, 10)).save(tmp_path / "a.png")
    with pytest.raises(Failure, match=r"decompression bomb"):
        decode.decode(tmp_path / "a.png", (8, 8), 1)


def tiff(values, mode, tmp_path):
    """The mean of an image file with these values, or the reason why it is rejected."""
    Image.fromarray(np.asarray(values, mode)).save(tmp_path / "a.tiff")
    try:
        return decoded(tmp_path / "a.tiff", (8, 8), 1).mean()
    except Failure as error:
        return str(error)


def test_a_value_means_the_same_in_every_image(tmp_path):
    """Floats go from 0 to 1, also with one pixel of 1.02 or -0.02; 16-bit integers go to 65535."""
    half = np.full((8, 8), 0.5)
    near = half.copy()
    near[3, 3:5] = 1.02, -0.02
    assert tiff(half, np.float32, tmp_path) == 128
    assert abs(tiff(near, np.float32, tmp_path) - 128) < 1
    assert abs(tiff(np.full((8, 8), 32768), np.uint16, tmp_path) - 128) <= 1
    (tmp_path / "a.pgm").write_bytes(b"P5 8 8 65535\n" + b"\x80\x00" * 64)
    assert (decoded(tmp_path / "a.pgm", (8, 8), 1) == 128).all()


@pytest.mark.parametrize("values, mode, words", [
    (np.linspace(-1, 1, 64).reshape(8, 8), np.float32, "its floats go from -1 to 1, not from 0 to 1"),
    (np.linspace(0, 255, 64).reshape(8, 8), np.float32, "its floats go from 0 to 255, not from 0 to 1"),
    (np.full((8, 8), np.nan), np.float32, "its floats go from nan to nan"),
    (np.full((8, 8), 9), np.int32, "32-bit integers have no known range"),
], ids=["-1..1", "0..255", "nan", "32 bits"])  # fmt: skip
def test_values_of_an_unknown_range_are_rejected(tmp_path, values, mode, words):
    assert words in tiff(values, mode, tmp_path)


def swapped_profile():
    """sRGB's profile with red and blue exchanged: the tags rXYZ and bXYZ."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(profile[128:132], "big")
    tags = {bytes(profile[i : i + 4]): i for i in range(132, 132 + 12 * count, 12)}
    for a, b in ((b"rXYZ", b"bXYZ"), (b"rTRC", b"bTRC")):
        i, j = tags[a] + 4, tags[b] + 4
        profile[i : i + 8], profile[j : j + 8] = profile[j : j + 8], profile[i : i + 8]
    return bytes(profile)


@pytest.mark.parametrize("profile, want", [
    (None, (250, 100, 0)), (swapped_profile(), (0, 100, 250)), (b"no profile", (250, 100, 0))
], ids=["none", "swapped", "damaged"])  # fmt: skip
def test_a_colour_profile_is_applied(tmp_path, profile, want):
    Image.new("RGB", (20, 20), (250, 100, 0)).save(tmp_path / "a.png", icc_profile=profile)
    assert abs(decoded(tmp_path / "a.png", (4, 4))[:, 0, 0] - want).max() <= 2


@pytest.mark.parametrize("content", [
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    b"\0\0\0\x18ftypheic" + bytes(40), b"hello", b"",
], ids=["EPS", "HEIC", "text", "empty"])  # fmt: skip
def test_an_unknown_format_is_named_and_starts_no_program(tmp_path, monkeypatch, content):
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **how: pytest.fail("a program started"))
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(Failure, match=r"unknown format"):
        decode.decode(tmp_path / "a.jpg", (8, 8), 3)


def test_a_bug_in_the_conversion_is_not_reported_as_a_broken_image(tmp_path, monkeypatch):
    def bug(*args):
        raise TypeError("a bug")

    monkeypatch.setattr(decode, "eight_bits", bug)
    grey(tmp_path / "a.png", 0)
    with pytest.raises(TypeError, match=r"a bug"):
        decode.decode(tmp_path / "a.png", (8, 8), 1)


# --- Folders and their cache ---------------------------------------------------------------------


def test_a_folder_is_decoded_once_for_all_splits_limits_and_places(album, tmp_path, monkeypatch):
    want = values(load(album)[0])
    monkeypatch.setattr(decode, "decode", lambda *args: pytest.fail("decoded again"))
    for limit in (None, 20):
        for labels in (False, True):
            load(album, limit=limit, labels=labels, skip_broken=labels)
    (tmp_path / "moved").mkdir()
    album.rename(tmp_path / "moved" / "album")
    moved = data.load(str(tmp_path / "moved" / "album"), str(tmp_path / "cache"), (8, 8), 1)
    assert values(moved[0]) == want and len(list((tmp_path / "cache").iterdir())) == 1


def test_a_changed_folder_is_decoded_again(album):
    before = len(load(album)[0].images)
    grey(album / "ant" / "new.png", 3)
    assert len(load(album)[0].images) == before + 1


def test_the_cache_may_lie_in_the_folder_itself(album):
    counts = [len(data.load(str(album), str(album), (8, 8), 1)[0].images) for _ in range(2)]
    assert counts == [57, 57]


def test_links_and_hidden_files(album, tmp_path):
    """A folder that is linked twice is read once; hidden files are left out."""
    (album / "loop").symlink_to(album)
    grey(tmp_path / "elsewhere" / "x.png", 1)
    (album / "one").symlink_to(tmp_path / "elsewhere")
    (album / "two").symlink_to(tmp_path / "elsewhere")
    (album / ".hidden").write_text("not an image")
    assert sum(len(part.images) for part in load(album)) == 61


def test_a_broken_file_is_named(album):
    """By the run that decodes the folder, and by a run that finds the cache of --skip-broken."""
    (album / "ant" / "cut.png").write_bytes((album / "ant" / "00.png").read_bytes()[:40])
    for _ in range(2):
        with pytest.raises(Failure, match=r"ant/cut.png: cannot be read as an image.*--skip-brok"):
            load(album)
        load(album, skip_broken=True)


def test_skipped_files_are_counted_each_time(album, capsys):
    (album / "ant" / "notes.txt").write_text("no image")
    for _ in range(2):
        load(album, skip_broken=True, labels=True)
        assert "1 of 61 files are not images and were left out, such as" in capsys.readouterr().err


@pytest.mark.parametrize("where, error", [
    ((pathlib.Path, "read_bytes"), OSError(errno.EIO, "Input/output error", "07.png")),
    ((decode.Image, "open"), MemoryError()),
], ids=["disk", "memory"])  # fmt: skip
def test_an_error_of_the_machine_is_not_a_broken_image(album, monkeypatch, where, error):
    def fail(*args, **how):
        raise error

    monkeypatch.setattr(*where, fail)
    with pytest.raises(type(error)):
        load(album, skip_broken=True)


# --- Lines about unexpected images ---------------------------------------------------------------


def printed(capsys, *args, **how):
    load(*args, **how)
    return capsys.readouterr().err


def test_thumbnails_of_a_nas_are_left_out(album, capsys):
    grey(album / "ant" / "@eaDir" / "00.png" / "SYNOPHOTO_THUMB_M.jpg", 1)
    assert "left out 1 folders of thumbnails, such as" in printed(capsys, album)
    assert sum(len(part.images) for part in load(album)) == 60


def test_enlarged_images_are_reported(album, tmp_path, capsys):
    assert printed(capsys, album) == ""
    words = "60 of 60 files are smaller than 12x8 and were enlarged"
    assert words in printed(capsys, album, (12, 8))
    (tmp_path / "high").mkdir()
    Image.new("L", (8, 12), 99).save(tmp_path / "high" / "a.png")  # 8 wide, 12 high
    assert printed(capsys, tmp_path / "high", (12, 8)) == ""
    assert "1 of 1 files are smaller than 8x12" in printed(capsys, tmp_path / "high", (8, 12))


def test_dark_folders_are_reported(tmp_path, capsys):
    """12-bit data in 16-bit files is at most 16 of 255. One brighter image shows that the rest is dark."""
    (tmp_path / "a").mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(tmp_path / "a" / f"{i}.png")
    assert "is above 63 of 255" in printed(capsys, tmp_path / "a")
    grey(tmp_path / "a" / "bright.png", 64)
    assert printed(capsys, tmp_path / "a") == ""


def test_splits_that_become_classes_are_reported(tmp_path, capsys):
    for name in ("train", "train", "val"):
        grey(tmp_path / "a" / name / f"{len(name)}.png", 99)
    assert "the classes of" not in printed(capsys, tmp_path / "a")
    assert "are train, val; if these are splits" in printed(capsys, tmp_path / "a", labels=True)
    grey(tmp_path / "a" / "cat" / "0.png", 99)
    assert "if these are splits" not in printed(capsys, tmp_path / "a", labels=True)


# --- The split -----------------------------------------------------------------------------------


def divided(n, limit=None):
    """The numbers of the training images and of the held-out images, of n images."""
    images = torch.arange(n)[:, None]
    parts = split.divide(split.Data(images, None, []), np.arange(n), limit)
    return [part.images[:][:, 0].tolist() for part in parts]


@pytest.mark.parametrize(
    "n, held", [(1, 0), (39, 0), (40, 2), (60, 3), (10_000, 500), (20_000, 512)]
)
def test_a_twentieth_is_held_out_from_40_images_on_but_at_most_512(n, held):
    training, apart = divided(n)
    assert len(apart) == held and sorted(training + apart) == list(range(n))


def test_the_split_never_changes(album):
    """Runs that were begun with any version must keep their held-out images."""
    assert divided(60)[1] == [16, 20, 27] and divided(60, 5)[0] == [4, 8, 34, 42, 51]
    training, held = load(album, labels=True)
    assert values(held) == [4 * i + 10 for i in (16, 20, 27)] and held.labels.tolist() == [0, 0, 0]
    assert not set(values(held)) & set(values(training)) and len(training.images) == 57


def test_images_are_counted_instead_of_files(tmp_path):
    """50 images and 50 text files: 40 images to train on, and 2 that are held out."""
    for i in range(50):
        grey(tmp_path / "a" / f"{i}.png", 100 + i)
        (tmp_path / "a" / f"{i}.txt").write_text("a caption")
    training, held = load(tmp_path / "a", skip_broken=True, limit=40)
    assert (len(training.images), len(held.images)) == (40, 2)
    training, held = load(tmp_path / "a", skip_broken=True)
    assert (len(training.images), len(held.images)) == (48, 2)


@pytest.mark.parametrize("rule, limit", [(0, None), (0, 20), (1, None), (1, 20)])
def test_older_runs_keep_their_split(album, rule, limit):
    """Files were counted, even broken ones; the first runs held nothing out."""
    for i in range(8):
        (album / "ant" / f"{i}.txt").write_text("no image")
    files = sorted(p for p in album.rglob("*.*"))
    order = [files[i] for i in np.random.default_rng(0).permutation(68)]
    held = order[: 3 * rule]
    rest = order[3 * rule :][:limit]
    wanted = [
        sorted(4 * int(p.stem) + 10 for p in part if p.suffix == ".png") for part in (rest, held)
    ]
    got = load(album, skip_broken=True, labels=True, limit=limit, split=rule)
    assert [values(part) for part in got] == wanted


def test_a_checkpoint_keeps_its_rule():
    kept = [dict(), dict(held_out=3), dict(held_out=3, split=2)]
    assert [split.split_of(ckpt) for ckpt in kept] == [0, 1, 2]


@pytest.fixture
def lonely(tmp_path):
    """Sixty images, of which number 20, which the split holds out, is the only one of class kite."""
    for i in range(60):
        name = "cat" if i < 20 else "kite" if i == 20 else "zebra"
        grey(tmp_path / "pets" / name / f"{i:02d}.png", 4 * i + 10)
    return tmp_path / "pets"


def test_every_class_has_a_training_image(lonely, capsys):
    """The only image of a class is not held out, whatever the limit."""
    for limit in (None, 57, 20, 3):
        training, held = load(lonely, labels=True, limit=limit)
        assert training.classes == held.classes == ["cat", "kite", "zebra"]
        assert (training.labels.bincount(minlength=3) > 0).all() and values(held) == [74, 118]
        assert len(training.images) == (limit or 58)
        names = [training.classes[k] for k in training.labels]
        numbers = [(value - 10) // 4 for value in values(training)]
        assert names == ["cat" if i < 20 else "kite" if i == 20 else "zebra" for i in numbers]
    assert "no training image" not in capsys.readouterr().err


def test_a_limit_below_the_number_of_classes_is_reported(lonely, capsys):
    training, _ = load(lonely, labels=True, limit=1)
    assert len(training.images) == 1
    missing = ", ".join(name for k, name in enumerate(training.classes) if k != training.labels[0])
    assert f"there is no training image of {missing}\n" in capsys.readouterr().err


def test_a_limit_is_a_seeded_choice_and_does_not_change_the_held_out_images(album):
    whole, few = load(album, labels=True), load(album, labels=True, limit=20)
    assert len(few[0].images) == 20 and 5 < few[0].labels.sum() < 15
    assert set(values(few[0])) < set(values(whole[0])) and values(few[1]) == values(whole[1])


def test_the_classes_of_an_older_run_are_those_of_its_training_images(lonely):
    training, held = load(lonely, labels=True, split=1)
    assert training.classes == held.classes == ["cat", "zebra"]
    assert training.labels.bincount().tolist() == [19, 38] and held.labels.tolist() == [0, 1]
    assert values(held) == [74, 118]


def test_a_labelled_image_outside_the_subfolders_is_named(album):
    grey(album / "lost.png", 1)
    for skip in (False, True):
        with pytest.raises(Failure, match=r"lost.png: is in no subfolder"):
            load(album, labels=True, skip_broken=skip)
    (album / "lost.png").write_text("no image")
    assert load(album, labels=True, skip_broken=True)[0].classes == ["ant", "bee"]


def test_chosen_rows_are_those_of_a_copy():
    images = torch.arange(40, dtype=torch.uint8).reshape(10, 1, 2, 2)
    places = [1, 4, 7, 9]
    rows, copy = split.Chosen(images, places), images[places]
    assert len(rows) == 4 and rows.shape == copy.shape
    for i in (2, slice(1, 3), torch.tensor([3, 0, 3]), torch.tensor([True, False, True, False])):
        assert torch.equal(rows[i], copy[i])
    assert torch.equal(rows[:], copy) and rows.device == copy.device


def test_a_fingerprint_is_the_checksum_of_all_bytes_up_to_10_000_images():
    images = torch.randint(256, (25_000, 1, 2, 2), dtype=torch.uint8)
    labels = torch.arange(25_000)
    for n, step in ((10_000, 1), (25_000, 3)):
        few = images[:n][::step].numpy().tobytes()
        want = zlib.crc32(labels[:n][::step].numpy().tobytes(), zlib.crc32(few))
        for source in (images[:n], split.Chosen(images, range(n))):
            assert data.fingerprint(data.Data(source, labels[:n], [])) == want


# --- Evaluation ----------------------------------------------------------------------------------


def checkpoint_of(name, shape=(1, 8, 8), labels=False, **config):
    """The parts of a checkpoint that name its data."""
    how = dict(labels=labels, **config)
    training, held = load(name, shape[1:], shape[0], **how)
    return dict(config=dict(config, data=str(name)), shape=shape, classes=training.classes,
                images=len(training.images), held_out=len(held.images), split=data.SPLIT,
                fingerprint=data.fingerprint(training))  # fmt: skip


@pytest.mark.parametrize("labels, limit", [(False, None), (True, None), (True, 20)])
def test_an_evaluation_uses_the_held_out_images_wherever_the_folder_lies(
    album, tmp_path, labels, limit
):
    ckpt = checkpoint_of(album, labels=labels, limit=limit)
    want = values(load(album)[1])
    moved = tmp_path / "moved"
    for name, place in ((None, album), (str(moved), moved)):
        found, description = data.held_out(ckpt, name, str(tmp_path / "cache"))
        assert values(found) == want and description == f"held-out images of {place}"
        if name is None:
            album.rename(moved)
    assert len(data.held_out(ckpt, str(moved), str(tmp_path / "cache"), limit=2)[0].images) == 2


def test_an_evaluation_on_training_images_says_so(album, tmp_path):
    for path in sorted(album.rglob("*.png"))[35:]:
        path.unlink()
    found, description = data.held_out(checkpoint_of(album), data_dir=str(tmp_path / "cache"))
    assert len(found.images) == 35 and description == "images it was trained on"


def test_other_images_are_not_called_held_out(album, tmp_path):
    """Another folder may contain copies of the training images."""
    grey(tmp_path / "other" / "0.png", 10)
    found, description = data.held_out(
        checkpoint_of(album), str(tmp_path / "other"), str(tmp_path / "cache")
    )
    assert values(found) == [10] and description == f"images of {tmp_path / 'other'}"


def test_a_training_folder_that_has_changed_is_not_evaluated(album, tmp_path):
    ckpt = checkpoint_of(album)
    grey(album / "ant" / "new.png", 3)
    with pytest.raises(Failure, match=r"has changed since training; name other images"):
        data.held_out(ckpt, data_dir=str(tmp_path / "cache"))


def test_digits_are_held_out_only_from_digits():
    ckpt = dict(config=dict(data="glyphs"), shape=(1, 16, 16), classes=list("0123456789"))
    found, description = data.held_out(ckpt, limit=7)
    assert len(found.images) == 7 and description == "held-out images of glyphs"
    ckpt["config"]["data"] = "/some/folder"
    assert data.held_out(ckpt, "glyphs", limit=7)[1] == "images of glyphs"
    assert data.held_out(dict(ckpt, classes=[]), "glyphs", limit=7)[0].labels is None


@pytest.mark.parametrize("given, error, words", [
    (dict(config={}, name=None), UsageError, "--data: this checkpoint does not contain"),
    (dict(shape=(3, 16, 16), name="glyphs"), UsageError, "its images are .1, 16, 16., the network's"),
    (dict(classes=["0", "1"], name="glyphs"), Failure, "the network does not know the class 2"),
    (dict(name="glyphs", skip_broken=True), UsageError, "--skip-broken: has no effect with --data glyphs"),
], ids=["no data", "shape", "class", "flag"])  # fmt: skip
def test_images_that_a_network_cannot_use_are_rejected(given, error, words):
    ckpt = dict(config=dict(data="glyphs"), shape=(1, 16, 16), classes=list("0123456789"))
    ckpt.update((key, value) for key, value in given.items() if key in ckpt)
    with pytest.raises(error, match=words):
        data.held_out(ckpt, given["name"], skip_broken=given.get("skip_broken", False))


def test_class_names_are_compared_in_one_unicode_form(album, tmp_path):
    """macOS writes an accent as a letter of its own."""
    composed, split_up = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))
    (album / "ant").rename(album / split_up)
    ckpt = dict(config={}, shape=(1, 8, 8), classes=["bee", composed])
    found, _ = data.held_out(ckpt, str(album), str(tmp_path / "cache"))
    assert found.labels.bincount().tolist() == [30, 30] and found.labels[0] == 1


# --- Names of data sets --------------------------------------------------------------------------


@pytest.mark.parametrize("file, words", [
    (None, "is not glyphs, cifar10 or a folder"), ("data_batch_1", "contains CIFAR-10, not image files"),
    ("notes.txt", "contains no images"),
])  # fmt: skip
def test_a_folder_without_images_is_rejected(tmp_path, file, words):
    if file:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / file).write_text("")
    with pytest.raises(Failure, match=words):
        load(tmp_path / "a", skip_broken=True)
    assert not list(tmp_path.glob("cache/*"))


def test_a_folder_with_the_name_of_a_data_set_is_mentioned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data.load("glyphs", "data", limit=64)
    assert capsys.readouterr().err == ""
    (tmp_path / "glyphs").mkdir()
    data.load("glyphs", "data", limit=64)
    assert "for the folder, write --data ./glyphs" in capsys.readouterr().err

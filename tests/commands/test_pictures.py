"""support/pictures.py: pixels, grids, and image files."""

import numpy as np
import pytest
import torch
from PIL import Image

from support import pictures
from support.errors import UsageError


def test_pixels_survive_the_way_to_minus_1_1_and_back():
    """uint8 -> [-1, 1] -> uint8 is the identity on all 256 levels; values outside are clipped."""
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert (pictures.to_uint8(levels.float() / 127.5 - 1).ravel() == np.arange(256)).all()
    outside = torch.tensor([-7.0, 7.0]).reshape(1, 1, 1, 2)
    assert pictures.to_uint8(outside).ravel().tolist() == [0, 255]


def test_a_grid_is_filled_column_by_column_with_white_between():
    images = np.full((5, 64, 64, 1), 0, np.uint8)
    images += np.arange(1, 6, dtype=np.uint8)[:, None, None, None]
    sheet = np.asarray(pictures.grid(images, 2))
    assert sheet[30::66, 30::66].tolist() == [[1, 3, 5], [2, 4, 255]]
    assert (sheet[:2] == 255).all() and (sheet[:, 66:68] == 255).all()


def test_an_array_has_rgb_images_labels_and_class_names(tmp_path):
    """Grey images get three equal channels."""
    images = np.arange(24, dtype=np.uint8).reshape(6, 2, 2, 1)
    batches = [(range(2), [images[:2]]), (range(2, 6), [images[2:]])]
    pictures.write(tmp_path / "a.npz", ".npz", batches, 2, np.arange(6) % 2, ["ä", "b"])
    file = np.load(tmp_path / "a.npz")
    assert np.array_equal(file["arr_0"], images.repeat(3, axis=3))
    assert file["arr_1"].tolist() == [0, 1, 0, 1, 0, 1] and file["classes"].tolist() == ["ä", "b"]


def test_the_files_of_a_folder_have_the_number_and_the_class_of_their_image():
    """Characters that file systems reject become an underscore."""
    assert pictures.png_names([1, 0], ["cat", "a/b*"]) == ["000000-a_b_.png", "000001-cat.png"]
    assert pictures.png_names([0, 0], []) == ["000000.png", "000001.png"]


def test_an_image_of_a_folder_is_complete_or_missing(tmp_path, monkeypatch):
    """The disk is full in the second image: the first stays, and the second is not there."""
    folder = str(tmp_path / "a") + "/"
    how = dict(rows=1, labels=[0, 0, 0], classes=[])

    def write(numbers):
        images = np.zeros((len(numbers), 4, 4, 1), np.uint8)
        pictures.write(folder, "/", [(numbers, [images])], **how)

    def full(picture, file, kind, original=Image.Image.save):
        if (tmp_path / "a" / "000000.png").exists():
            raise OSError(28, "No space left on device")
        original(picture, file, kind)

    assert pictures.plan(folder, (1, 4, 4), **how) == ("/", [0, 1, 2])
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(OSError, match=r"No space left.*000001\.png"):
            write([0, 1, 2])
    assert pictures.plan(folder, (1, 4, 4), **how) == ("/", [1, 2])
    write([1, 2])
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [f"00000{i}.png" for i in range(3)]


def test_a_name_that_is_no_kind_of_picture_is_rejected(tmp_path):
    with pytest.raises(UsageError, match=r"must end in \.png, \.gif, \.webp, \.npz"):
        pictures.plan(str(tmp_path / "a.jpg"), (1, 4, 4), 1, [0], [])


@pytest.mark.parametrize("kind, n, rows", [(".webp", 300, 1), (".gif", 99_999, 300), (".png", 99_999, 8)])  # fmt: skip
def test_more_images_than_a_picture_can_hold_are_rejected_first(tmp_path, kind, n, rows):
    out = str(tmp_path / f"a{kind}")
    with pytest.raises(UsageError, match=f"--n {n}: too many for one"):
        pictures.plan(out, (3, 64, 64), rows, [0] * n, [])
    assert pictures.plan(out, (3, 64, 64), 8, [0] * 64, []) == (kind, range(64))

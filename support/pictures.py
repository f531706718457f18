"""From tensors to pixels, and from pixels to files: grids, films, folders of PNGs, arrays.

Images are uint8 (N, H, W, C), with C = 1 (grey) or 3 (RGB). A grid is filled column by column, so that
classes which take turns have a row each. Small images are enlarged by a whole factor.
"""

import os
import pathlib

import numpy as np
import torch
from PIL import Image, ImageOps

from support.errors import Failure, UsageError
from support.files import refuse_no_folder, replacing, replacing_folder, takes_files, writable

GAP = 2  # white pixels between the images of a grid
SIDES = {".gif": 65_000, ".webp": 16_000}  # the longest side that the format takes


def to_uint8(x):
    """(N, C, H, W) in [-1, 1] -> uint8 (N, H, W, C), rounded: the 256 levels survive the trip."""
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return x.permute(0, 2, 3, 1).cpu().numpy()


def grid(images, rows, side=64):
    """uint8 (N, H, W, C) -> one Pillow image of so many rows, each enlarged to `side` pixels at most."""
    n, H, W, C = images.shape
    (H, W), scale = cell(H, W, side)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    sheet = np.full((rows * H + GAP, -(-n // rows) * W + GAP, C), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = GAP + i % rows * H, GAP + i // rows * W
        sheet[top : top + H - GAP, left : left + W - GAP] = image
    return to_picture(sheet)


def cell(H, W, side=64):
    """(height, width) that an image takes in a grid, and the factor by which it is enlarged."""
    scale = max(1, side // max(H, W))
    return (H * scale + GAP, W * scale + GAP), scale


def film_side(n):
    """Pixels to which each of n images of a film is enlarged; of many, fewer: 80 digits take a megabyte."""
    return 64 if n <= 32 else 32


def to_picture(image):
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


# --- Files: the end of a name says what is written -----------------------------------------------


def kind_of(out):
    """What `out` asks for: ".png", ".gif", ".webp", ".npz" or "/", a folder.

    Raises UsageError for another ending, Failure for a place where it cannot be written.
    """
    path = where(out)
    if out.endswith("/") or path.is_dir():
        if path.is_dir() and (any(path.iterdir()) or path.is_mount() or path == pathlib.Path.cwd()):
            raise Failure(f"--out {out}: the folder is not empty, or in use; name a new one")
        refuse_no_folder(path, out)
        takes_files(path, out)
        return "/"
    kind = path.suffix.lower()
    if kind not in (".png", ".gif", ".webp", ".npz"):
        raise UsageError(f"--out {out}: must end in .png, .gif, .webp, .npz, or in / for a folder")
    writable(out)
    return kind


def where(out):
    """The place of `out` itself: where a link leads, and what "." and ".." are called."""
    return pathlib.Path(os.path.realpath(out))


def refuse_too_large(kind, shape, n, rows):
    """Raises UsageError if n images (C, H, W) in so many rows are more than the format can hold."""
    tall, wide = cell(*shape[1:], film_side(n))[0]
    if kind in SIDES and max(-(-n // rows) * wide, rows * tall) > SIDES[kind]:
        raise UsageError(f"--n {n}: too many for one {kind} picture; ask for fewer, or for a .png")
    (tall, wide), _ = cell(*shape[1:])
    if (
        kind == ".png" and -(-n // rows) * wide * rows * tall > 10**8
    ):  # a decoder takes it for an attack
        raise UsageError(
            f"--n {n}: too many for one picture; ask for fewer, or for an .npz or a folder"
        )


def write(out, kind, images, labels, rows, film):
    """Writes what kind_of(out) announced. labels (N,) or None; film: frames of N images each."""
    if kind == "/":
        with replacing_folder(out) as folder:
            for i, image in enumerate(images):
                to_picture(image).save(folder / f"{i:06d}.png", "PNG")
        return
    with replacing(out) as file:
        if kind == ".npz":
            colour = np.broadcast_to(
                images, (*images.shape[:3], 3)
            )  # the ADM evaluator takes no grey
            np.savez(file, colour, **({} if labels is None else {"arr_1": labels}))
        elif kind == ".png":
            grid(images, rows).save(file, "PNG")
        else:
            # Noise hardly compresses, so that all frames but the last have only 32 levels.
            *moving, last = [grid(frame, rows, film_side(len(images))) for frame in film]
            first, *others = [*(ImageOps.posterize(frame, 5) for frame in moving), last]
            first.save(
                file,
                kind[1:].upper(),
                save_all=True,
                loop=0,
                append_images=others,
                duration=[80] * len(others) + [2000],
            )  # milliseconds: the last frame stays

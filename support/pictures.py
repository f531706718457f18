"""Turn tensors into pixels, and pixels into files: grids, films, arrays, folders of PNGs.

Images are uint8 (N, H, W, C), with C = 1 (grey) or 3 (RGB). A grid is filled column by column, so that
classes which take turns have a row each. Small images are enlarged by a whole factor.
"""

import os
import pathlib
import re

import numpy as np
import torch
from PIL import Image, ImageOps

from support.errors import Failure, UsageError
from support.files import naming, replacing, writable, writable_folder

GAP = 2  # white pixels between the images of a grid
FILMS = (".gif", ".webp")


def to_uint8(x):
    """(N, C, H, W) in [-1, 1] -> uint8 (N, H, W, C), rounded: all 256 levels come back exactly."""
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return x.permute(0, 2, 3, 1).cpu().numpy()


def grid(images, rows, side=64):
    """uint8 (N, H, W, C) -> one Pillow image with this many rows, each image enlarged up to `side` pixels."""
    n, H, W, C = images.shape
    tall, wide, scale = cell(H, W, side)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    sheet = np.full((rows * tall + GAP, -(-n // rows) * wide + GAP, C), 255, np.uint8)
    for i, image in enumerate(images):
        top = GAP + i % rows * tall
        left = GAP + i // rows * wide
        sheet[top : top + tall - GAP, left : left + wide - GAP] = image
    return to_picture(sheet)


def cell(H, W, side=64):
    """Return the height and width that an image takes in a grid, and the factor by which it is enlarged."""
    scale = max(1, side // max(H, W))
    return H * scale + GAP, W * scale + GAP, scale


def to_picture(image):
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


# --- Files: the end of the name chooses the kind -------------------------------------------------


def kind_of(out):
    """Return ".png", ".gif", ".webp", ".npz" or "/" (a folder) for a path that can be written.

    Raises UsageError for another ending, and Failure where nothing can be written.
    """
    if out.endswith("/") or os.path.isdir(out):
        writable_folder(out)
        return "/"
    kind = pathlib.Path(out).suffix.lower()
    if kind not in (".png", ".npz", *FILMS):
        raise UsageError(f"--out {out}: must end in .png, .gif, .webp, .npz, or in / for a folder")
    writable(out)
    return kind


def reject_too_large(kind, shape, n, rows):
    """Raise UsageError if n images (C, H, W) in this many rows are more than one picture can hold."""
    tall, wide, _ = cell(*shape[1:])
    sides = (rows * tall, -(-n // rows) * wide)
    pixels = 4 * 10**6 if kind in FILMS else 10**8  # of each frame; Pillow opens up to 1.8e8
    if max(sides) > 16_000 or sides[0] * sides[1] > pixels:  # .webp ends at 16,383
        raise UsageError(f"--n {n}: too many for one {kind}; use fewer, an .npz or a folder")


def write(out, kind, frames, rows, labels, classes):
    """Write frames, each uint8 (N, H, W, C), as a film; write only the last one to a .png or an .npz.

    An .npz contains RGB images (N, H, W, 3) as arr_0, because the evaluators of FID reject grey ones, and
    with classes, labels (N,) as arr_1 and the names as classes.
    """
    images = frames[-1]
    with replacing(out) as file:
        if kind == ".npz":
            arrays = dict(arr_1=labels, classes=classes) if classes else {}
            np.savez(file, arr_0=np.broadcast_to(images, (*images.shape[:3], 3)), **arrays)
        elif kind == ".png":
            grid(images, rows).save(file, "PNG")
        else:
            # Noise hardly compresses. With 32 levels in all frames but the last, a film stays small.
            grids = [ImageOps.posterize(grid(frame, rows), 5) for frame in frames[:-1]]
            grids.append(grid(images, rows))
            times = [80] * (len(grids) - 1) + [2000]  # milliseconds
            how = dict(save_all=True, append_images=grids[1:], duration=times, loop=0)
            grids[0].save(file, kind[1:].upper(), **how)


def png_names(labels, classes):
    """Return the file names of a folder's images: 000012-cat.png, or 000012.png without classes.

    Characters that file systems reject become "_".
    """
    names = []
    for i, label in enumerate(labels):
        suffix = f"-{classes[label]}" if classes else ""
        suffix = re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", suffix)[:60]
        names.append(f"{i:06d}{suffix}.png")
    return names


def missing(out, names):
    """Return the numbers of the images that a folder does not contain yet.

    Raises Failure if it contains other files, because samples would be mixed with them.
    """
    found = {path.name for path in pathlib.Path(out).glob("[!.]*")}
    if found - set(names):
        other = min(found - set(names))
        raise Failure(f"--out {out}: {other} is not one of these images; choose another folder")
    return [i for i, name in enumerate(names) if name not in found]


def write_pngs(out, names, images):
    """Add images to a folder. Each file is complete or missing."""
    folder = pathlib.Path(out)
    folder.mkdir(exist_ok=True)
    partial = folder / ".partial"
    for name, image in zip(names, images, strict=True):
        with naming(folder / name, partial):
            to_picture(image).save(partial, "PNG")
            os.replace(partial, folder / name)

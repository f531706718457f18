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
from support.files import replacing, writable

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


def plan(out, shape, rows, labels, classes):
    """Return the kind of `out`, ".png", ".gif", ".webp", ".npz" or "/", and the images to sample.

    These are the numbers of the images that a folder does not contain yet, or of all images. Raises
    UsageError or Failure if `out` cannot hold them, cannot be written, or contains other files.
    """
    folder = out.endswith("/") or os.path.isdir(out)
    kind = "/" if folder else pathlib.Path(out).suffix.lower()
    if kind not in ("/", ".png", ".npz", *FILMS):
        raise UsageError(f"--out {out}: must end in .png, .gif, .webp, .npz, or in / for a folder")
    writable(out, folder=folder)
    numbers = range(len(labels))
    if folder:
        names = png_names(labels, classes)
        found = {path.name for path in pathlib.Path(out).glob("[!.]*")}
        other = min(found - set(names), default=None)
        if other:
            raise Failure(f"--out {out}: {other} is not one of these images; choose another folder")
        numbers = [i for i in numbers if names[i] not in found]
    elif kind != ".npz":
        tall, wide, _ = cell(*shape[1:])
        sides = (rows * tall, -(-len(labels) // rows) * wide)
        pixels = 4 * 10**6 if kind in FILMS else 10**8  # of each frame; Pillow opens up to 1.8e8
        if max(sides) > 16_000 or sides[0] * sides[1] > pixels:  # .webp ends at 16,383
            raise UsageError(f"--n {len(labels)}: too many for one {kind}; use an .npz or a folder")
    return kind, numbers


def png_names(labels, classes):
    """Return 000012-cat.png for each image; "_" replaces characters that file systems reject."""
    names = [re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", f"-{name}")[:60] for name in classes] or [""]
    return [f"{i:06d}{names[label]}.png" for i, label in enumerate(labels)]


def write(out, kind, batches, rows, labels, classes):
    """Write batches (numbers of images, frames uint8 (B, H, W, C)), to a folder one by one.

    Only a film has more than the last frame. An .npz contains RGB images (N, H, W, 3) as arr_0,
    because the evaluators of FID reject grey ones, and with classes, labels (N,) and class names.
    """
    if kind == "/":
        names = png_names(labels, classes)
        os.makedirs(out, exist_ok=True)
        for numbers, frames in batches:
            for i, image in zip(numbers, frames[-1], strict=True):
                with replacing(os.path.join(out, names[i])) as file:
                    to_picture(image).save(file, "PNG")
        return
    parts = [frames for _, frames in batches]
    *earlier, images = [np.concatenate(part) for part in zip(*parts, strict=True)]
    with replacing(out) as file:
        if kind == ".npz":
            arrays = dict(arr_1=labels, classes=classes) if classes else {}
            np.savez(file, arr_0=np.broadcast_to(images, (*images.shape[:3], 3)), **arrays)
        elif kind == ".png":
            grid(images, rows).save(file, "PNG")
        else:
            # Noise hardly compresses. With 32 levels in all frames but the last, a film stays small.
            grids = [ImageOps.posterize(grid(frame, rows), 5) for frame in earlier]
            grids.append(grid(images, rows))
            times = [80] * len(earlier) + [2000]  # milliseconds
            how = dict(save_all=True, append_images=grids[1:], duration=times, loop=0)
            grids[0].save(file, kind[1:].upper(), **how)

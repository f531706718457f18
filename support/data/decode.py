"""Image files to pixels: upright, cropped at their centre without squashing, grey or RGB."""

import contextlib
import functools
import importlib
import io
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from support.errors import Failure
from support.progress import Progress

# The flags of a file. A file without flags is not an image.
IMAGE = 1
ENLARGED = 2  # it is smaller than the size of the network's images
BRIGHT = 4  # a pixel is at least 64 of 255

for plugin in ("pillow_heif.HeifImagePlugin", "pillow_jxl"):
    with contextlib.suppress(ImportError):
        importlib.import_module(plugin)
Image.init()
FORMATS = sorted(set(Image.OPEN) - {"EPS", "WMF"})  # Pillow starts other programs for these two


def decode_all(paths, out, **how):
    """Write the pixels of all images to the open file `out`, and return the flags of all files."""
    warnings.filterwarnings("ignore", module="PIL")
    progress = Progress("reading images", len(paths), "images")
    flags = bytearray()
    with contextlib.closing(progress), ThreadPoolExecutor() as pool:
        for first in range(0, len(paths), 1024):  # so many decoded images may wait in memory
            some = paths[first : first + 1024]
            for pixels, flag in pool.map(functools.partial(decode, **how), some):
                out.write(pixels)
                flags.append(flag)
                progress(len(flags))
    return flags


def decode(path, size, channels, skip_broken=False):
    """Return the pixels of a file, as bytes (C, H, W), and its flags.

    A file that is not an image raises Failure, or has no pixels and flags with skip_broken.
    """
    H, W = size
    data = path.read_bytes()
    try:
        image = opened(data, size)
        enlarged = image.height < H or image.width < W
        image = in_srgb(eight_bits(image))
    except Failure as error:
        if skip_broken:
            return b"", 0
        hint = "remove it or give --skip-broken"
        raise Failure(f"{path}: cannot be read as an image ({error}); {hint}") from None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "LAB":  # Pillow cannot convert it to grey
        image = image.convert("RGB")
    image = image.convert("L" if channels == 1 else "RGB")
    image = ImageOps.fit(image, (W, H), Image.Resampling.LANCZOS)
    pixels = np.asarray(image).reshape(H, W, channels).transpose(2, 0, 1)
    return pixels.tobytes(), IMAGE + ENLARGED * enlarged + BRIGHT * (pixels.max() >= 64)


def opened(data, size):
    """Return a decoded image, turned upright."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.draft("RGB", (2 * max(size), 2 * max(size)))  # JPEG can skip unneeded detail
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image
    except UnidentifiedImageError:
        raise Failure("unknown format; HEIC needs pillow-heif, JPEG XL pillow-jxl-plugin") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise any type of error for a damaged file
        raise Failure(str(error) or type(error).__name__) from None


def eight_bits(image):
    """Return integers from 0 to 65535 and floats from 0 to 1 as 8 bits. Reject unknown ranges."""
    if not image.mode.startswith(("I", "F")):
        return image
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # Pillow reads their 16 bits as 32
        raise Failure("32-bit integers have no known range; save it with 8 or 16 bits")
    values = np.asarray(image, np.float64) / (1 if image.mode == "F" else 65535)
    # Filters may overshoot a little. A value that is not a number fails here too.
    if not (values.min() >= -0.1 and values.max() <= 2):
        raise Failure(f"its floats go from {values.min():g} to {values.max():g}, not from 0 to 1")
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))


def in_srgb(image):
    """Return the image with the colours of its profile converted to sRGB, if the profile fits it."""
    try:
        profile = ImageCms.getOpenProfile(io.BytesIO(image.info["icc_profile"]))
        space = profile.profile.xcolor_space.strip()
        colours = image.convert({"GRAY": "L"}.get(space, space))
        srgb = ImageCms.createProfile("sRGB")
        colours = ImageCms.profileToProfile(colours, profile, srgb, outputMode="RGB")
    except (KeyError, ImageCms.PyCMSError, ValueError):  # no profile, or it is damaged, or unfit
        return image
    if image.has_transparency_data:
        colours.putalpha(image.convert("RGBA").getchannel("A"))
    return colours

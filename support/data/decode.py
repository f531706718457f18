"""Image files to pixels: upright, cropped at their centre without squashing, grey or RGB."""

import concurrent.futures
import contextlib
import importlib
import io
import warnings

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from support.errors import Failure
from support.progress import Progress

# The flags of a file. A file without flags is not an image.
IMAGE = 1
ENLARGED = 2  # it is smaller than the size of the network's images
BRIGHT = 4  # a pixel is at least 64 of 255
TOGETHER = 1024  # the number of decoded images that may wait in memory

with contextlib.suppress(ImportError):
    importlib.import_module("pillow_heif").register_heif_opener()
with contextlib.suppress(ImportError):
    importlib.import_module("pillow_jxl")
Image.init()
FORMATS = sorted(set(Image.OPEN) - {"EPS", "WMF"})  # Pillow starts other programs for these two


class Unreadable(Exception):
    """A file is not an image that can be used. The text gives the reason."""


def decode_all(paths, size, channels, out, skip_broken):
    """Write the pixels of all images to the open file `out`, and return the flags of all files.

    Raises Failure at the first file that is not an image, unless skip_broken.
    """

    def attempt(path):
        try:
            return decode(path, size, channels)
        except Unreadable as error:
            if skip_broken:
                return b"", 0
            raise Failure(
                f"{path}: cannot be read as an image ({error}); remove it, or skip such files with "
                f"--skip-broken"
            ) from None

    warnings.filterwarnings("ignore", module="PIL")
    progress = Progress("reading images", len(paths), "images")
    flags = bytearray()
    with contextlib.closing(progress), concurrent.futures.ThreadPoolExecutor() as pool:
        for first in range(0, len(paths), TOGETHER):
            for pixels, flag in pool.map(attempt, paths[first : first + TOGETHER]):
                out.write(pixels)
                flags.append(flag)
                progress(len(flags))
    return np.frombuffer(flags, np.uint8)


def decode(path, size, channels):
    """Return the pixels of a file, as bytes (C, H, W), and its flags.

    Raises Unreadable if the file is not an image, and OSError if the machine fails to read it.
    """
    image = opened(path.read_bytes(), size)
    flags = IMAGE
    if image.height < size[0] or image.width < size[1]:
        flags |= ENLARGED
    pixels = crop(in_srgb(eight_bits(image)), size, channels)
    if pixels.max() >= 64:
        flags |= BRIGHT
    return pixels.tobytes(), flags


def opened(data, size):
    """Return a decoded image, turned upright."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.draft("RGB", (2 * max(size), 2 * max(size)))  # JPEG can skip unneeded detail
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image
    except UnidentifiedImageError:
        raise Unreadable(
            "unknown format; HEIC needs the package pillow-heif, and JPEG XL pillow-jxl-plugin"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise any type of error for a damaged file
        raise Unreadable(str(error) or type(error).__name__) from None


def eight_bits(image):
    """Return an image of 16-bit integers or floats with 8 bits, and others unchanged.

    A value means the same in every image: integers go from 0 to 65535, floats from 0 to 1. Images with
    an unknown range are rejected: 32-bit integers, and floats that are clearly outside 0 to 1.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, np.float64)
    top = 1 if image.mode == "F" else 65535
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # Pillow reads their 16 bits as 32
        raise Unreadable("32-bit integers have no known range; save it with 8 or 16 bits")
    # Filters may overshoot a little. A value that is not a number fails here too.
    if image.mode == "F" and not (values.min() >= -0.1 and values.max() <= 2):
        raise Unreadable(
            f"its floats go from {values.min():g} to {values.max():g}, but 0 to 1 is expected; save "
            f"it with 8 or 16 bits"
        )
    return Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))


def in_srgb(image):
    """Return the image with the colours of its profile converted to sRGB, if the profile fits it."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        plain = image.convert({"GRAY": "L"}.get(space, space))
        srgb = ImageCms.createProfile("sRGB")
        plain = ImageCms.profileToProfile(plain, source, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):  # the profile is damaged or does not fit
        return image
    if alpha:
        plain.putalpha(alpha)
    return plain


def crop(image, size, channels):
    """Return the centre of an image, scaled to `size` (H, W), as uint8 (C, H, W)."""
    H, W = size
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if channels == 1 else "RGB")
    except ValueError as error:  # Pillow cannot convert all colour spaces
        raise Unreadable(str(error)) from None
    image = ImageOps.fit(image, (W, H), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(H, W, channels).transpose(2, 0, 1)

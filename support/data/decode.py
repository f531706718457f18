"""Image files to pixels: upright, cropped at their centre without squashing, grey or RGB."""

import concurrent.futures
import sys
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from support.errors import Failure, printable
from support.progress import Progress

TOGETHER = 1024  # decoded images that wait in memory, at most


def decode_all(files, size, channels, out, skip_broken):
    """Writes to `out` the pixels of every image in order, then int32 numbers of the files that are whole.

    Raises Failure at the first file that is no image, or, with skip_broken, if none is one.
    """
    progress, whole, broken = Progress("reading images", len(files), "images"), [], []
    warnings.filterwarnings("ignore", module="PIL")  # what cannot be read is named below
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for first in range(0, len(files), TOGETHER):
            some = files[first : first + TOGETHER]
            for i, pixels in enumerate(pool.map(lambda path: decode(path, size, channels), some)):
                if isinstance(pixels, str):
                    broken.append(some[i])
                    if not skip_broken:
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise Failure(f"{some[i]}: {pixels}; remove it, or leave such files out with "
                                      f"--skip-broken")
                else:
                    out.write(pixels)
                    whole.append(first + i)
                progress(first + i + 1)
    progress.close()
    out.write(np.array(whole, np.int32).tobytes())
    if len(broken) == len(files):
        raise Failure(f"{files[0].parent}: none of its {len(files)} files is an image")
    if broken:
        print(f"left out {len(broken)} of {len(files)} files that are no images, such as "
              f"{printable(broken[0])}", file=sys.stderr)


def decode(path, size, channels):
    """The image as bytes (C, H, W); or, as text, why it cannot be read."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * size[1], 2 * size[0]))  # lets JPEG skip detail that the size drops
            image = eight_bits(ImageOps.exif_transpose(image))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if channels == 1 else "RGB")
            image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    except UnidentifiedImageError:
        return "cannot be read as an image (its format is not known)"
    except Exception as error:  # a decoder given a damaged file raises what it likes, MemoryError too
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        return f"cannot be read as an image ({reason})"
    return np.asarray(image).reshape(*size, channels).transpose(2, 0, 1).tobytes()


def eight_bits(image):
    """An image of 16 bits or floats as one of 8 bits; convert() would clip its values. Others as they are."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    top = 65535 if image.mode.startswith("I") else 1 if values.max() <= 1 else 255
    return Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))

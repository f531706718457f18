"""Image files to pixels: upright, cropped at their centre without squashing, grey or RGB."""

import concurrent.futures
import contextlib
import errno
import importlib
import io
import warnings

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from support.errors import Failure, printable
from support.progress import Progress, note

TOGETHER = 1024  # decoded images that wait in memory, at most

with contextlib.suppress(ImportError):
    importlib.import_module("pillow_heif").register_heif_opener()
with contextlib.suppress(ImportError):
    importlib.import_module("pillow_jxl")
Image.init()
FORMATS = sorted(set(Image.OPEN) - {"EPS", "WMF"})  # those two would be drawn by other programs


def decode_all(files, size, channels, out, skip_broken, none=False):
    """Writes to `out` the pixels of every image in order, then int32 numbers of the files that are whole.

    Raises Failure at the first file that is no image, or, with skip_broken, if none is one, unless `none` is
    allowed.
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
                        raise Failure(
                            f"{some[i]}: {pixels}; remove it, or leave such files out with "
                            f"--skip-broken"
                        )
                else:
                    out.write(pixels)
                    whole.append(first + i)
                progress(first + i + 1)
    progress.close()
    out.write(np.array(whole, np.int32).tobytes())
    if len(broken) == len(files) and not none:
        raise Failure(f"{files[0].parent}: none of its {len(files)} files is an image")
    if broken:
        note(
            f"left out {len(broken)} of {len(files)} files that are no images, such as "
            f"{printable(broken[0])}"
        )


def decode(path, size, channels):
    """The image as bytes (C, H, W); or, as text, why it cannot be read.

    Only what the decoder says of the bytes makes an image broken. A file that the machine cannot open or
    read raises OSError with its name, and one for which the memory is too small raises Failure.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return "cannot be read as an image (it is a link to nothing)"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "cannot be read as an image (it is a link to itself)"
        raise OSError(error.errno, error.strerror, str(path)) from None
    except MemoryError:
        raise Failure(f"{path}: the memory is too small to read it") from None
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.draft(
                "RGB", (2 * max(size), 2 * max(size))
            )  # lets JPEG skip detail that the size drops
            image = in_srgb(eight_bits(ImageOps.exif_transpose(image), image.format))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if channels == 1 else "RGB")
            image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    except UnidentifiedImageError:
        return f"cannot be read as an image ({unknown(data)})"
    except MemoryError:
        raise Failure(f"{path}: the memory is too small to decode it") from None
    except Exception as error:  # a decoder given a damaged file raises what it likes
        return f"cannot be read as an image ({error or type(error).__name__})"
    return np.asarray(image).reshape(*size, channels).transpose(2, 0, 1).tobytes()


def unknown(data):
    """What to say of bytes whose format Pillow does not know."""
    if data[4:8] == b"ftyp" and data[8:12] in (
        b"heic",
        b"heix",
        b"hevc",
        b"heim",
        b"heis",
        b"mif1",
        b"msf1",
    ):
        return "HEIC is read once the package pillow-heif is installed"
    if data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JPEG XL is read once the package pillow-jxl-plugin is installed"
    if data.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        return "PostScript is a program, and is not run"
    return "its format is not known"


def eight_bits(image, format):
    """An image of 16 bits or of floats as one of 8 bits; others as they are.

    A value means the same in every image: 16 bits go to 65535, floats from 0 to 1. Where the range cannot be
    known, ValueError says so: 32-bit integers, and floats that are clearly not from 0 to 1.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    top = 1 if image.mode.startswith("F") else 65535
    if image.mode == "I" and format not in ("PNG", "PPM"):  # their 16 bits may come as 32
        raise ValueError("32-bit integers have no known range; save it with 8 or 16 bits")
    if top == 1 and (values.min() < -1 or values.max() > 2):  # a filter may overshoot by a little
        raise ValueError(
            f"its floats go from {values.min():g} to {values.max():g}, and 0 to 1 is expected; "
            f"save it with 8 or 16 bits"
        )
    return Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))


def in_srgb(image):
    """The image with the colours that its profile means, in sRGB; as it is, without a profile that fits."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space]
        plain = image if image.mode == mode else image.convert(mode)
        plain = ImageCms.profileToProfile(
            plain, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, KeyError, OSError, ValueError):
        return image
    plain.info.pop("icc_profile", None)
    if alpha:
        plain.putalpha(alpha)
    return plain

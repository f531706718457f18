"""Charts and captioned rows of images, drawn with Pillow alone: dark on white, readable at 100%.

    t = range(1001)
    x, y = Axis("step t", 0, 1000), Axis("alpha_bar_t", 0, 1)
    lines(x, y, {"linear": (t, linear), "cosine": (t, cosine)}).save("schedules.png")

A picture is drawn ZOOM times too large and averaged down, which smooths its edges. Lengths are pixels of
the finished picture. The colours are Okabe and Ito's, which a colour-blind reader can tell apart.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ZOOM = 3
INK, GREY, FAINT = (34, 34, 34), (110, 110, 110), (228, 228, 228)
COLOURS = [
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
]
LEFT, TOP, RIGHT, BOTTOM = (
    52,
    66,
    20,
    44,
)  # a chart's margins: titles above, ticks and names around the data
SMALL, TEXT, TITLE = 12, 13, 15  # heights of letters


class Axis(NamedTuple):
    """What an axis measures, with its unit, and the values at its two ends."""

    name: str
    low: float
    high: float
    log: bool = False


# --- Where things are ----------------------------------------------------------------------------


def span(name, values, log=False):
    """The Axis from the least to the greatest of several arrays, with round ends."""
    values = np.concatenate([np.ravel(v) for v in values])
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    low, high = values.min(), values.max()
    if log:
        steps = ladder(low, high)
        low = max(v for v in steps if v <= low)
        return Axis(name, low, min(v for v in steps if v >= high and v > low), True)
    step = spacing(low, high)
    first, last = math.floor(low / step), math.ceil(high / step)
    return Axis(name, first * step, max(first + 1, last) * step)


def spacing(low, high):
    """The distance of about five round ticks between low and high: 1, 2 or 5 times a power of ten."""
    rough = (high - low or 1) / 5
    return next(step for step in ladder(rough, rough) if step >= rough * 0.999)


def ladder(low, high):
    """1, 2 and 5 times each power of ten, from below low to above high."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2)
    return [float(f"{k}e{power}") for power in powers for k in (1, 2, 5)]


def ticks(axis):
    """The values at which an axis is marked: of many powers of ten, every second or third."""
    _, low, high, log = axis
    if not log:
        step = spacing(low, high)
        return [
            k * step
            for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
        ]
    steps = [v for v in ladder(low, high) if low <= v * (1 + 1e-9) and v <= high * (1 + 1e-9)]
    powers = steps if high / low <= 101 else [v for v in steps if f"{v:e}".startswith("1.")]
    return powers[:: -(-len(powers) // 7)]


def along(axis, values):
    """Where values lie on an axis: 0 at its low end, 1 at its high end; nan if its logarithm is none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = np.array(axis[1:3], float)
        values = np.asarray(values, float)
        v, (low, high) = (np.log10(values), np.log10(ends)) if axis.log else (values, ends)
    return (v - low) / (high - low)


def pixel(x, y, xs, ys, size):
    """Where the points (xs, ys) land in a chart of this size (width, height): pixels from the top left.

    The pixel in row i and column j covers the square from (j, i) to (j + 1, i + 1).
    """
    width, height = size
    return (
        LEFT + along(x, xs) * (width - LEFT - RIGHT),
        height - BOTTOM - along(y, ys) * (height - TOP - BOTTOM),
    )


# --- Charts --------------------------------------------------------------------------------------


def lines(x, y, series, title="", size=(400, 320), dots=False, wide=0):
    """A chart of {name: (xs, ys)} as lines, or as dots, with a legend if there are several names.

    wide: each line is so many pixels wider than the next, which lies on top of it. So lines that coincide
    are all seen.
    """
    picture, pen = blank(size)
    axes(pen, x, y, title, size)
    inside = picture.copy()
    over = ImageDraw.Draw(inside)
    for i, (colour, (xs, ys)) in enumerate(zip(COLOURS, series.values())):
        places = np.stack(pixel(x, y, xs, ys, size), axis=1) * ZOOM - 0.5
        places = places[np.isfinite(places).all(axis=1)]
        for px, py in places if dots or len(places) == 1 else ():
            over.circle((px, py), 1.2 * ZOOM, colour)
        if not dots:
            width = round(ZOOM * (2 + wide * (len(series) - 1 - i)))
            over.line([tuple(p) for p in places], colour, width, joint="curve")
    box = tuple(ZOOM * side for side in (LEFT, TOP, size[0] - RIGHT, size[1] - BOTTOM))
    picture.paste(inside.crop(box), box)  # nothing is drawn beyond the axes
    legend(pen, series if len(series) > 1 else {}, LEFT, TOP - 12)
    return picture.reduce(ZOOM)


def heat(x, y, values, title="", size=(400, 320), low=-1):
    """A chart of values (rows, columns) in -1..1 as colours: blue, white at 0, vermilion; row 0 at the top.

    Its rows go along y, from y.low at the top, its columns along x. A bar shows the scale, from low to 1.
    """
    picture, pen = blank(size)
    left, top, right, bottom = LEFT, TOP, size[0] - RIGHT, size[1] - BOTTOM
    tall, wide = (bottom - top) * ZOOM, (right - left) * ZOOM
    colours = Image.fromarray(diverging(np.asarray(values)))
    picture.paste(colours.resize((wide, tall), Image.Resampling.BOX), (left * ZOOM, top * ZOOM))
    axes(pen, x, Axis(y.name, y.high, y.low), title, size, grid=False)
    bar = Image.fromarray(diverging(np.linspace(low, 1, 101)[None])).resize((100 * ZOOM, 9 * ZOOM))
    picture.paste(bar, ((right - 120) * ZOOM, (top - 20) * ZOOM))
    write(pen, right - 124, top - 15, f"{low:g}", "rm", SMALL, GREY)
    write(pen, right - 16, top - 15, "1", "lm", SMALL, GREY)
    return picture.reduce(ZOOM)


def diverging(values):
    """values in -1..1 -> uint8 (.., 3): the two ends are the first two COLOURS, 0 is white."""
    cold, hot = np.array(COLOURS[0]), np.array(COLOURS[1])
    strength = np.abs(values).clip(0, 1)[..., None]
    return np.uint8((255 + strength * (np.where(values[..., None] < 0, cold, hot) - 255)).round())


def axes(pen, x, y, title, size, grid=True):
    """The frame of a chart: title, lines at the ticks, their numbers, the names of both axes."""
    left, top, right, bottom = LEFT, TOP, size[0] - RIGHT, size[1] - BOTTOM
    write(pen, left, 14, title, "lm", TITLE)
    for value, text in numbers(ticks(x)):
        at, _ = pixel(x, y, value, y.low, size)
        stroke(pen, (at, top if grid else bottom, at, bottom + 4), FAINT if grid else INK)
        write(pen, at, bottom + 6, text, "mt", SMALL, GREY)
    for value, text in numbers(ticks(y._replace(low=min(y[1:3]), high=max(y[1:3])))):
        _, at = pixel(x, y, x.low, value, size)
        stroke(pen, (left - 4, at, right if grid else left, at), FAINT if grid else INK)
        write(pen, left - 8, at, text, "rm", SMALL, GREY)
    stroke(pen, (left, top, left, bottom), INK)
    stroke(pen, (left, bottom, right, bottom), INK)
    write(pen, (left + right) / 2, size[1] - 12, x.name, "mm", TEXT)
    write(pen, 8, 36, y.name, "lm", TEXT)


def legend(pen, names, left, at):
    """A row of short lines in the colours of the names, each with its name."""
    for colour, name in zip(COLOURS, names):
        stroke(pen, (left, at, left + 14, at), colour, 3)
        write(pen, left + 18, at, name, "lm", SMALL)
        left += 18 + 11 + ImageFont.load_default(SMALL).getlength(name)


def numbers(values):
    """(value, its text) of each tick: plain if all are from 0.001 to 10000, else with its power of ten."""
    if all(value == 0 or 1e-3 <= abs(value) < 1e5 for value in values):
        return [(value, f"{value:g}") for value in values]
    parts = [f"{value:.3e}".split("e") for value in values]
    return [(value, f"{float(digits):g}e{int(power)}" if value else "0")
            for value, (digits, power) in zip(values, parts)]  # fmt: skip


# --- Rows of images ------------------------------------------------------------------------------


def sheet(rows, above=(), beside=(), title="", scale=None, gap=4):
    """Rows of images uint8 (H, W, C), all of one size, with captions above the columns and beside the rows.

    None is a grey cell. Small images are enlarged by a whole factor, to 64 pixels or by `scale`.
    """
    H, W, _ = next(image for row in rows for image in row if image is not None).shape
    scale = scale or max(1, 64 // max(H, W))
    H, W, across = H * scale + gap, W * scale + gap, max(map(len, rows))
    font = ImageFont.load_default(TEXT)
    left = round(max([0, *(font.getlength(text) + 14 for text in beside)]))
    top = 34 * bool(title) + 22 * bool(above)
    words = left + font.getlength(title) * TITLE / TEXT + 8
    picture, pen = blank((round(max(left + across * W + gap, words)), top + len(rows) * H + gap))
    write(pen, max(left, gap), 16, title, "lm", TITLE)
    for j, text in enumerate(above):
        write(pen, left + j * W + (W + gap) / 2, top - 10, text, "mm", SMALL, GREY)
    for i, text in enumerate(beside):
        write(pen, left - 7, top + i * H + (H + gap) / 2, text, "rm", TEXT)
    picture, empty = picture.reduce(ZOOM), Image.new("RGB", (W - gap, H - gap), FAINT)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            cell = empty
            if image is not None:
                cell = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).convert(
                    "RGB"
                )
                cell = cell.resize(empty.size, Image.Resampling.NEAREST)
            picture.paste(cell, (left + gap + j * W, top + gap + i * H))
    return picture


def joined(pictures, down=False):
    """Pictures next to one another, or one below the other, as one."""
    wide, tall = zip(*(picture.size for picture in pictures))
    size = (max(wide), sum(tall)) if down else (sum(wide), max(tall))
    whole, at = Image.new("RGB", size, "white"), 0
    for picture in pictures:
        whole.paste(picture, (0, at) if down else (at, 0))
        at += picture.size[down]
    return whole


# --- The pen, which works ZOOM times larger and counts from the centre of the first pixel --------


def blank(size):
    """A white picture, ZOOM times as large as size, and a pen for it."""
    picture = Image.new("RGB", (size[0] * ZOOM, size[1] * ZOOM), "white")
    return picture, ImageDraw.Draw(picture)


def write(pen, x, y, text, anchor, height, colour=INK):
    pen.text((x * ZOOM, y * ZOOM), text, colour, ImageFont.load_default(height * ZOOM), anchor)


def stroke(pen, ends, colour, width=1):
    pen.line([end * ZOOM - 0.5 for end in ends], colour, round(width * ZOOM))

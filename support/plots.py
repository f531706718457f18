"""Charts and captioned rows of images, drawn with Pillow alone: dark on white, readable at 100%.

A picture is drawn ZOOM times too large and averaged down, which smooths its edges. Lengths are pixels
of the finished picture, from its top left corner. The colours are Okabe and Ito's, which colour-blind
readers can tell apart. Pillow's font has no Greek letters, so symbols are written as in the code.
"""

import math
from collections import namedtuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ZOOM = 3
INK = (34, 34, 34)
GREY = (110, 110, 110)
FAINT = (228, 228, 228)
COLOURS = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0)]
LEFT, TOP, RIGHT, BOTTOM = (52, 66, 20, 44)  # the margins of a chart, which hold its text
SMALL, TEXT, TITLE = (12, 13, 15)  # heights of letters
FONTS = {height: ImageFont.load_default(height * ZOOM) for height in (SMALL, TEXT, TITLE)}
MARKS = [float(f"{k}e{power}") for power in range(-15, 16) for k in (1, 2, 5)]  # round numbers
# The name of an axis, with its unit, and the values at its two ends.
Axis = namedtuple("Axis", ["name", "low", "high", "log"], defaults=[False])


def span(name, values, log=False):
    """Return the Axis from the least to the greatest of several arrays, with round ends."""
    values = np.concatenate([np.ravel(v) for v in values])
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    low = values.min()
    high = values.max()
    if log:
        low = max(mark for mark in MARKS if mark <= low)
        return Axis(name, low, min(mark for mark in MARKS if mark >= high and mark > low), True)
    step = spacing(low, high)
    first = math.floor(low / step)
    last = max(first + 1, math.ceil(high / step))
    return Axis(name, first * step, last * step)


def spacing(low, high):
    """Return the distance of about five round ticks."""
    return next(mark for mark in MARKS if mark >= (high - low or 1) / 5 * 0.999)


def ticks(axis):
    """Return the values at which an axis is marked. Of many powers of ten, every second or third."""
    low, high = sorted(axis[1:3])
    if not axis.log:
        step = spacing(low, high)
        numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
        return [number * step for number in numbers]
    marks = MARKS[::3] if high / low > 101 else MARKS
    marks = [mark for mark in marks if low <= mark * (1 + 1e-9) and mark <= high * (1 + 1e-9)]
    return marks[:: -(-len(marks) // 7)]


def along(axis, values, start, end):
    """Return where values lie if an axis goes from pixel `start` to `end`, not finite without a log."""
    values = np.array([axis.low, axis.high, *np.ravel(values)], float)
    if axis.log:
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.log10(values)
    low, high, *values = values
    return start + (np.array(values) - low) / (high - low) * (end - start)


def lines(x, y, series, title="", size=(400, 320), dots=False, legend=True):
    """Draw {name: (xs, ys)} as lines that end at the axes or as dots; a legend names several."""
    picture, pen = blank(size)
    axes(pen, x, y, title, size)
    inside = picture.copy()
    over = ImageDraw.Draw(inside)
    for colour, (xs, ys) in zip(COLOURS, series.values()):
        across = along(x, xs, LEFT, size[0] - RIGHT) * ZOOM - 0.5
        down = along(y, ys, size[1] - BOTTOM, TOP) * ZOOM - 0.5
        places = [place for place in zip(across, down) if np.isfinite(place).all()]
        if dots or len(places) == 1:
            for place in places:
                over.circle(place, 1.2 * ZOOM, colour)
        else:
            over.line(places, colour, 2 * ZOOM, joint="curve")
    # Two pixels more than the frame, so that a line on an axis is drawn whole.
    box = (LEFT - 2, TOP - 2, size[0] - RIGHT + 2, size[1] - BOTTOM + 2)
    box = tuple(ZOOM * side for side in box)
    picture.paste(inside.crop(box), box)
    left = LEFT
    for colour, name in zip(COLOURS, series if legend and len(series) > 1 else ()):
        stroke(pen, (left, TOP - 12, left + 14, TOP - 12), colour, 3)
        write(pen, left + 18, TOP - 12, name, "lm", SMALL)
        left += 29 + FONTS[SMALL].getlength(name) / ZOOM
    return picture.reduce(ZOOM)


def heat(x, y, values, title, cell):
    """Draw values (rows, columns) in -1..1 as colours: blue, white at 0, vermilion; row 0 at the top.

    Each takes `cell` (width, height) whole pixels, so that no pattern appears that is not in the data.
    """
    values = np.asarray(values)[:, :, None]
    cold, hot = np.array(COLOURS[:2])
    colours = 255 + np.abs(values) * (np.where(values < 0, cold, hot) - 255)
    colours = colours.round().repeat(cell[1] * ZOOM, axis=0).repeat(cell[0] * ZOOM, axis=1)
    tall, wide, _ = colours.shape
    size = (LEFT + wide // ZOOM + RIGHT, TOP + tall // ZOOM + BOTTOM)
    picture, pen = blank(size)
    picture.paste(Image.fromarray(np.uint8(colours)), (LEFT * ZOOM, TOP * ZOOM))
    axes(pen, x, Axis(y.name, y.high, y.low), title, size, grid=False)
    return picture.reduce(ZOOM)


def axes(pen, x, y, title, size, grid=True):
    """Draw the title, the frame, lines at the ticks with their numbers, and the names of both axes."""
    right = size[0] - RIGHT
    bottom = size[1] - BOTTOM
    write(pen, LEFT, 14, title, "lm", TITLE)
    for value, at in zip(ticks(x), along(x, ticks(x), LEFT, right)):
        stroke(pen, (at, TOP if grid else bottom, at, bottom + 4), FAINT if grid else INK)
        write(pen, at, bottom + 13, number(value), "mm", SMALL, GREY)
    for value, at in zip(ticks(y), along(y, ticks(y), bottom, TOP)):
        stroke(pen, (LEFT - 4, at, right if grid else LEFT, at), FAINT if grid else INK)
        write(pen, LEFT - 8, at, number(value), "rm", SMALL, GREY)
    stroke(pen, (LEFT, TOP, LEFT, bottom), INK)
    stroke(pen, (LEFT, bottom, right, bottom), INK)
    write(pen, (LEFT + right) / 2, size[1] - 12, x.name, "mm", TEXT)
    write(pen, 8, 36, y.name, "lm", TEXT)


def number(value):
    """Return the text of a tick: 0.5, 1000, 1e-5 or 1e6."""
    return f"{value:g}".replace("e-0", "e-").replace("e+0", "e")


def sheet(rows, above=(), beside=(), title="", scale=None, gap=4):
    """Draw rows of images uint8 (H, W, C), None for a grey cell, with captions above and beside them.

    Small images are enlarged by a whole factor, to 64 pixels or by `scale`.
    """
    H, W, _ = next(image for row in rows for image in row if image is not None).shape
    scale = scale or max(1, 64 // max(H, W))
    tall = H * scale + gap
    wide = W * scale + gap
    left = round(max((FONTS[TEXT].getlength(text) / ZOOM + 14 for text in beside), default=0))
    top = 34 * bool(title) + 22 * bool(above)
    titled = round(left + FONTS[TITLE].getlength(title) / ZOOM + 8)
    size = (max(left + max(map(len, rows)) * wide + gap, titled), top + len(rows) * tall + gap)
    picture, pen = blank(size)
    write(pen, max(left, gap), 16, title, "lm", TITLE)
    for j, text in enumerate(above):
        write(pen, left + j * wide + (wide + gap) / 2, top - 10, text, "mm", SMALL, GREY)
    for i, text in enumerate(beside):
        write(pen, left - 7, top + i * tall + (tall + gap) / 2, text, "rm", TEXT)
    picture = picture.reduce(ZOOM)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            cell = Image.new("RGB", (W * scale, H * scale), FAINT)
            if image is not None:
                image = Image.fromarray(np.broadcast_to(image, (H, W, 3)))  # grey becomes RGB
                cell = image.resize(cell.size, Image.Resampling.NEAREST)
            picture.paste(cell, (left + gap + j * wide, top + gap + i * tall))
    return picture


def joined(pictures, down=False):
    """Return pictures of one height side by side, or of one width one below the other, as one."""
    pixels = [np.asarray(picture) for picture in pictures]
    return Image.fromarray(np.concatenate(pixels, axis=0 if down else 1))


def blank(size):
    """Return a white picture, ZOOM times as large as `size`, and a pen for it."""
    picture = Image.new("RGB", (size[0] * ZOOM, size[1] * ZOOM), "white")
    return picture, ImageDraw.Draw(picture)


def stroke(pen, ends, colour, width=1):
    pen.line([end * ZOOM - 0.5 for end in ends], colour, round(width * ZOOM))


def write(pen, x, y, text, anchor, height, colour=INK):
    """Write a text, its middle at height y, from x ("lm"), around x ("mm") or up to x ("rm")."""
    pen.text((x * ZOOM, y * ZOOM), text, colour, FONTS[height], anchor)

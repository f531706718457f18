"""A drawing of ddpm.UNet: a box for each side of each level, with its shape, and arrows between them."""

import numpy as np

from support.plots import COLOURS, GREY, INK, SMALL, TITLE, ZOOM, blank, stroke, write

WIDE, TALL = (190, 44)  # of a box
DOWN = 80  # from one level to the next
IN = 30  # a deeper level starts further in


def network_picture(network, shape, title):
    """Draw the UNet with these settings for images of `shape` (C, H, W)."""
    C, H, W = shape
    found = levels(network, H, W)
    picture, pen = blank((760, 232 + DOWN * len(found)))
    write(pen, 20, 18, title, "lm", TITLE)
    write(pen, 20, 40, "Shapes: channels x height x width", "lm", SMALL, GREY)
    label = " + label" if network["num_classes"] else ""
    time = f"t - 1 as {network['ch']} sinusoids"
    box(pen, 285, 62, time, f"two linear layers: {4 * network['ch']}{label}", COLOURS[3])
    write(pen, 380, 116, "added in every residual block", "mm", SMALL, GREY)
    out = network["out_channels"] or C
    predicted = "predicted eps and v" if out > C else "predicted eps"
    box(pen, 20, 62, "x_t", f"{C} x {H} x {W}", COLOURS[4])
    box(pen, 550, 62, predicted, f"{out} x {H} x {W}", COLOURS[4])
    vertical(pen, 115, 106, 140, "convolution")
    vertical(pen, 645, 140, 106, "norm, convolution")
    for i, level in enumerate(found):
        draw_level(pen, i, level, network["blocks"], last=i == len(found) - 1)
    return picture.reduce(ZOOM)


def levels(network, H, W):
    """Return (channels, height, width, whether with attention) of each level of this UNet."""
    found = []
    for i, m in enumerate(network["mult"]):
        found.append((network["ch"] * m, H // 2**i, W // 2**i, i in network["attention"]))
    return found


def draw_level(pen, i, level, blocks, last):
    """Draw both sides of level i, the arrows across and to the next level, or the middle below the last."""
    c, h, w, attention = level
    shape = f"{c} x {h} x {w}"
    top = 140 + DOWN * i
    bottom = top + TALL
    below = top + DOWN
    left = 20 + IN * i
    right = 550 - IN * i
    for x, count in ((left, blocks), (right, blocks + 1)):
        words = f"{count} residual block" + "s" * (count > 1) + " + attention" * attention
        box(pen, x, top, shape, words, COLOURS[0])
    arrow(pen, (left + WIDE, top + 22), (right, top + 22), GREY)
    write(pen, 380, top + 14, f"{blocks + 1} skip connections", "mm", SMALL, GREY)
    if last:
        box(pen, 285, below, shape, "block, attention, block", COLOURS[2])
        arrow(pen, (left + 95, bottom), (285, below + 15))
        arrow(pen, (285 + WIDE, below + 15), (right + 95, bottom))
    else:
        vertical(pen, left + 110, bottom, below, "stride 2")
        vertical(pen, right + 80, below, bottom, "upsample, convolution")


def vertical(pen, x, start, end, text):
    """Draw an arrow down with a text on its right, or up with a text on its left."""
    arrow(pen, (x, start), (x, end))
    side = 7 if start < end else -7
    write(pen, x + side, (start + end) / 2, text, "lm" if side > 0 else "rm", SMALL, GREY)


def arrow(pen, start, end, colour=INK):
    """Draw a line between two points (x, y) that ends in an arrowhead."""
    end = np.array(end, float)
    ahead = (end - start) / np.linalg.norm(end - start) * 6
    aside = np.array([-ahead[1], ahead[0]]) * 0.6
    stroke(pen, (*start, *(end - ahead)), colour, 1.5)
    corners = [end, end - ahead + aside, end - ahead - aside]
    pen.polygon([tuple(corner * ZOOM) for corner in corners], colour)


def box(pen, left, top, first, second, colour):
    """Draw a coloured box with two centred lines of text."""
    pale = tuple(round(255 - (255 - part) * 0.18) for part in colour)
    ends = (left, top, left + WIDE, top + TALL)
    pen.rounded_rectangle([end * ZOOM for end in ends], 4 * ZOOM, pale, colour, ZOOM)
    write(pen, left + WIDE / 2, top + 14, first, "mm", SMALL)
    write(pen, left + WIDE / 2, top + 30, second, "mm", SMALL)

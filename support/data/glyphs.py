"""The built-in data set: ten digits, drawn with Pillow's own font."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GLYPHS = "0123456789"


def draw(n, seed, side=16):
    """Draw n digits with random place, size, slant and rotation, all determined by the seed.

    Returns images uint8 (n, 16, 16, 1), white on black, and labels uint8 (n,): label k is GLYPHS[k].
    """
    rng = np.random.default_rng(seed)
    big = 4 * side  # drawn four times too large, then averaged
    masters = [master(glyph, big) for glyph in GLYPHS]
    labels = rng.integers(len(GLYPHS), size=n, dtype=np.uint8)
    turn = np.radians(rng.uniform(-12, 12, n))
    slant = rng.uniform(-0.1, 0.1, n)
    scale = rng.uniform(0.85, 1.1, (2, n))
    shift = rng.uniform(-4, 4, (2, n))
    cos, sin = np.cos(turn), np.sin(turn)
    a, b, d, e = np.stack([cos, sin + slant, -sin, cos]) / scale[[0, 0, 1, 1]]
    c, f = big / 2 * (1 - np.array([a + b, d + e])) + shift  # the centre stays at the centre
    images = np.empty((n, side, side, 1), np.uint8)
    for i, matrix in enumerate(np.stack([a, b, c, d, e, f], axis=1)):
        turned = masters[labels[i]].transform((big, big), Image.AFFINE, matrix, Image.BILINEAR)
        images[i, :, :, 0] = turned.reduce(4)
    return images, labels


def master(glyph, side):
    """Return an upright digit in the middle of a square image."""
    image = Image.new("L", (side, side))
    font = ImageFont.load_default(size=70)
    left, top, right, bottom = font.getbbox(glyph, stroke_width=1)
    corner = ((side - left - right) / 2, (side - top - bottom) / 2)
    ImageDraw.Draw(image).text(corner, glyph, 255, font, stroke_width=1)
    return image

"""Which characters sampled glyphs are, and how clear: by the nearest of many drawn glyphs that are known.

    python sample.py --ckpt ckpt.pt --out samples.npz --n 1000 --steps 50 --eta 1
    python benchmarks/legibility.py samples.npz [more.npz ..]

Each image is compared with TEMPLATES drawn glyphs of random place, size, slant and turn. "As asked":
the nearest one is the character that was asked for. "Clear": it is, whatever it is, as near as that of
99% of real glyphs. Held-out glyphs are the ceiling; glyphs laid over one another, and glyphs with their
lower half pushed aside, say what the measure lets pass.
"""

import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from support.data.glyphs import draw as draw_glyphs

TEMPLATES = 40_000


def flat(images):
    """uint8 (N, H, W, 1), or 3 equal channels, -> float (N, H W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images[..., :1])).flatten(1).float() / 255


def nearest(images, templates):
    """(root mean square distance, index) of each image's nearest template, both (N,)."""
    best = [torch.cdist(part, templates).min(1) for part in images.split(100)]
    far, i = (torch.cat(parts) for parts in zip(*best))
    return far / images.shape[1] ** 0.5, i


def main(paths):
    drawn, characters = draw_glyphs(TEMPLATES, seed=77)
    templates, characters = flat(drawn), torch.from_numpy(characters).long()
    glyphs, labels = draw_glyphs(2_000, seed=1)  # train.py's held-out ones
    limit = nearest(flat(draw_glyphs(2_000, seed=78)[0]), templates)[0].quantile(0.99)
    laid_over = np.maximum(glyphs, np.roll(glyphs, 1, axis=0))
    pushed = np.concatenate([glyphs[:, :8], np.roll(glyphs[:, 8:], 5, axis=2)], axis=1)
    rows = [("held-out glyphs (the ceiling)", glyphs, labels),
            ("glyphs laid over one another", laid_over, labels),
            ("glyphs with their lower half pushed aside", pushed, labels)]  # fmt: skip
    for path in paths:
        file = np.load(path)
        rows.append((f"samples of {path}", file["arr_0"], file["arr_1"]))
    print("as asked    clear  of")
    for name, images, asked in rows:
        far, i = nearest(flat(images), templates)
        as_asked, clear = characters[i] == torch.from_numpy(asked).long(), far <= limit
        print(f"{as_asked.float().mean():8.1%} {clear.float().mean():8.1%}  {len(images):,} {name}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])

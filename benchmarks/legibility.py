"""How many sampled glyphs can be read: a small classifier that never saw a sample is the judge.

    python sample.py --ckpt ckpt.pt --out samples.npz --n 1000 --steps 50 --eta 1
    python benchmarks/legibility.py samples.npz

A sample is legible if the judge gives more than 0.95 to the class that was asked for. The same share
of held-out glyphs is the ceiling; that of glyphs laid over one another, and of glyphs with their lower
half pushed aside, says what the judge lets pass.
"""

import pathlib
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from train import GLYPHS, draw_glyphs


def prepare(images):
    """uint8 (N, 16, 16, 1) -> float (N, 1, 16, 16) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_judge(n=10_000, epochs=6, batch=100):
    """A classifier of n glyphs, drawn from a seed of its own."""
    torch.manual_seed(0)
    images, labels = draw_glyphs(n, seed=77)
    x, y = prepare(images), torch.from_numpy(labels).long()
    judge = nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(24, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(48 * 16, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, len(GLYPHS)),
    )  # fmt: skip
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
    for _ in range(epochs):
        for i in torch.randperm(n).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(judge(x[i]), y[i]).backward()
            optimizer.step()
    return judge.eval()


@torch.no_grad()
def legible(judge, images, labels):
    """The share of images whose own class gets more than 0.95."""
    p = judge(prepare(images)).softmax(1)
    return (p[torch.arange(len(p)), torch.from_numpy(labels).long()] > 0.95).float().mean().item()


def main(path):
    file = np.load(path)
    samples, asked = file["arr_0"], file["arr_1"].astype(np.uint8)
    judge = train_judge()
    glyphs, labels = draw_glyphs(2_000, seed=78)
    laid_over = np.maximum(glyphs, np.roll(glyphs, 1, axis=0))
    pushed = np.concatenate([glyphs[:, :8], np.roll(glyphs[:, 8:], 5, axis=2)], axis=1)
    for name, images, wanted in (
        ("held-out glyphs (the ceiling)", glyphs, labels),
        ("glyphs laid over one another", laid_over, labels),
        ("glyphs with their lower half pushed aside", pushed, labels),
        (f"samples in {path}", samples, asked),
    ):
        print(f"legible: {legible(judge, images, wanted):7.2%} of {len(images):,} {name}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])

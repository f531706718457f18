"""Whether samples have the colours of their data, and whether they are copies of it.

    python sample.py --ckpt ckpt.pt --out samples.npz --n 256 --steps 50 --eta 1
    python benchmarks/colours.py --ckpt ckpt.pt samples.npz [more.npz ..] [--out nearest.png]

Colour of an image: the standard deviation of its three channel means, on the scale from -1 to 1; a grey image
has 0. A network that is wrong about the mean of x_t makes images of one strong colour. Copies: the root
mean square distance to the nearest training image, mirrored or not, beside that of images held out. The
picture shows samples above their nearest training images.
"""

import argparse
import pathlib
import sys

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from support import checkpoint, data


def colour(images):
    """The mean over images uint8 (N, 3, H, W)."""
    return (images.float() / 127.5 - 1).mean((2, 3)).std(1).mean().item()


def nearest(images, others):
    """(distance on the scale 0..255, which) of each image's nearest among others, mirrored or not; uint8."""
    flat = others.flatten(1).float()
    rows = []
    for batch in images.split(64):
        pair = [torch.cdist(x.flatten(1).float(), flat) for x in (batch, batch.flip(3))]
        rows.append(torch.minimum(*pair).min(1))
    far, which = (torch.cat(column) for column in zip(*rows))
    return far / flat.shape[1] ** 0.5, which


def main(given):
    ckpt = checkpoint.load(given.ckpt)
    config, (C, H, W) = ckpt["config"], ckpt["shape"]
    training, held_out = data.load(
        *(given.data or config["data"], given.data_dir, (H, W), C, config["skip_broken"]),
        limit=config["limit"],
        split=data.split_of(ckpt),
    )
    training, held_out = training.images[:], held_out.images[:]
    print("colour  nearest training image (of 255: median, smallest)")
    for name, images in (
        ("held-out images", held_out),
        *((path, samples(path)) for path in given.paths),
    ):
        if len(images):
            far, which = nearest(images, training)
            print(
                f"{colour(images):6.3f}  {far.median():5.1f} {far.min():5.1f}  {len(images):,} {name}"
            )
    if given.out:
        pairs = torch.cat([images[:16], training[which[:16]]])
        rows = pairs.reshape(2, -1, C, H, W).permute(0, 3, 1, 4, 2).reshape(2 * H, -1, C)
        picture = Image.fromarray(rows.numpy() if C == 3 else rows.numpy()[:, :, 0])
        picture.resize((picture.width * 3, picture.height * 3), Image.Resampling.NEAREST).save(
            given.out
        )


def samples(path):
    """uint8 (N, 3, H, W) of a file of sample.py."""
    return torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2).contiguous()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", metavar="samples.npz")
    parser.add_argument("--ckpt", required=True, metavar="PATH")
    parser.add_argument("--data", metavar="DATA", help="where its images lie now")
    parser.add_argument("--data-dir", default="data", metavar="DIR")
    parser.add_argument("--out", metavar="PNG")
    main(parser.parse_args())

"""From a checkpoint to bits/dim on held-out images: the bound of eq. 5, split into its terms.

    python evaluate.py --ckpt ckpt.pt --n 100            held-out glyphs, or CIFAR-10's test images
    python evaluate.py --ckpt ckpt.pt --data path/to/held-out/images
"""

import os
from dataclasses import dataclass, replace

import torch

import ddpm
import improved
import sample
import train
from sample import MISSING, Failure, Progress, UsageError, flag


@dataclass(frozen=True)
class Config:
    ckpt: str = flag(MISSING, "checkpoint that train.py wrote; it carries its own configuration")
    data: str | None = flag(None, "glyphs, cifar10 or a folder of images (default: what it was trained on)")
    data_dir: str = flag("data", "where cifar10 is or goes, and the cache of image folders")
    n: int | None = flag(None, "evaluate the first n images (default: all of them)", low=1)
    skip_broken: bool = flag(False, "leave out a folder's files that are no images")
    seed: int = flag(0, "image i is noised from seed + i, at any batch size", low=0, high=2**31)
    batch_size: int = flag(256, "images evaluated at a time", low=1)
    weights: str = flag("ema", "moving average or last weights", choices=("ema", "raw"))
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps, ..")
    precision: str = flag("fp32", "bf16: rounded; faster where the hardware has it", choices=("fp32", "bf16"))


def main(cfg, given):
    device = sample.pick_device(cfg.device)
    bf16 = sample.use_precision(cfg.precision, device)
    ckpt, net, d = sample.load_model(cfg.ckpt, cfg.weights, device)
    images, labels, what = held_out(cfg, ckpt)
    N = len(images)
    progress, rows = Progress("evaluating", N * d.T, "image-steps"), []
    for first in range(0, N, cfg.batch_size):
        x0 = images[first : first + cfg.batch_size].to(device).float() / 127.5 - 1
        y = None if labels is None else labels[first : first + cfg.batch_size].to(device)
        generators = [torch.Generator().manual_seed(cfg.seed + first + i) for i in range(len(x0))]

        def model(xt, t, y=y, first=first):
            B = len(xt)
            progress(first * d.T + B * int(t[0]), f"image {first + B} of {N}")
            return net(xt, t, y)

        bound = improved.bound_terms if sample.learned(ckpt) else ddpm.bound_terms
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            rows.append(bound(model, d, x0, [d.beta, d.beta_tilde], generator=generators))
    progress.close()
    if not all(row.isfinite().all() for row in rows):
        raise Failure(f"{cfg.ckpt}: the network's output is not finite; its training diverged")
    report(torch.cat(rows, dim=1), f"{N:,} {what}, {cfg.weights} weights at step {ckpt['step']}")


def held_out(cfg, ckpt):
    """The images to evaluate, sized as the checkpoint's, their labels or None, and what to call them."""
    with sample.refusing(cfg.ckpt):
        saved = train.settings_of(ckpt)
    data = cfg.data or saved["data"]
    data = os.path.abspath(data) if train.kind(data) == "folder" else data
    C, H, W = ckpt["shape"]
    settings = replace(train.Config(**saved), data=data, data_dir=cfg.data_dir, limit=cfg.n, size=f"{H}x{W}",
                       channels=C, skip_broken=cfg.skip_broken)
    images, labels, classes = train.load_data(settings, train=False)
    if not ckpt["classes"]:
        labels = None
    elif unknown := sorted(set(classes) - set(ckpt["classes"])):
        raise Failure(f"--data {data}: the network knows no class {unknown[0]}, but those of {saved['data']}")
    if tuple(images.shape[1:]) != (C, H, W):
        raise UsageError(f"--data {data}: images of {tuple(images.shape[1:])}, but a network for {(C, H, W)}")
    if labels is not None:
        labels = torch.tensor([ckpt["classes"].index(name) for name in classes])[labels]
    same = train.kind(data) == "folder" and data == saved["data"]
    what = "images it was trained on" if same else f"held-out images of {data}"
    return images, labels, what


def report(terms, title):
    """Prints the bound and its parts, mean and standard error over the images; terms (2 or 3, N, T + 1)."""
    T = terms.shape[2] - 1
    parts = {
        "L_T                 prior": terms[:, :, T],
        f"L_1 .. L_{T - 1:<9} rate": terms[:, :, 1:T].sum(2),
        "L_0                 distortion": terms[:, :, 0],
        "bound on -log2 p(x0)": terms.sum(2),
    }
    print(f"{title}; bits/dim")
    heads = ["sigma^2 = beta", "sigma^2 = beta_tilde", "sigma^2 learned"][: len(terms)]
    print(f"{'':32}" + "".join(f"{head:>22}" for head in heads))
    for name, values in parts.items():
        n = values.shape[1]
        cells = (f"{row.mean():.5f}" + (f" ± {row.std() / n**0.5:.5f}" if n > 1 else "") for row in values)
        print(f"{name:32}" + "".join(f"{cell:>22}" for cell in cells))


if __name__ == "__main__":
    sample.run(main, Config, __doc__)

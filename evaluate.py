"""Evaluate a checkpoint in bits/dim on held-out images: the bound of eq. 5, split into its terms.

python evaluate.py --ckpt ckpt.pt --n 100            held-out digits, or CIFAR-10's test images
python evaluate.py --ckpt ckpt.pt --data path/to/held-out/images
"""

import pathlib
import sys
from dataclasses import MISSING, dataclass

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # also under python -P

import torch

import improved
import likelihood
from support import checkpoint, command, data, devices, sampling
from support.command import flag
from support.errors import Failure
from support.progress import Progress, say


@dataclass(frozen=True)
class Config:
    ckpt: str = flag(MISSING, "checkpoint, or a diffusers folder", group="input")
    weights: str = flag("ema", "the moving average, or the last weights", choices=("ema", "raw"))
    data: str | None = flag(None, "glyphs, cifar10 or an image folder (default: held-out images)")
    data_dir: str = flag("data", "folder for CIFAR-10 and the caches of image folders")
    skip_broken: bool = flag(False, "skip the files of a folder that are not images")
    n: int | None = flag(None, "number of images, chosen at random (default: all)", low=1)
    seed: int = flag(0, "different seeds give different noise", low=0, high=2**31)

    batch_size: int = flag(256, "number of images evaluated at a time", low=1, group="machine")
    device: str = flag("auto", "device to compute on: auto, cpu, cuda, cuda:1, mps, ...")
    precision: str = flag("fp32", "bf16 is faster but less accurate", choices=("fp32", "bf16"))


def main(cfg, given):
    # float32 by default: the bound sums T terms, and bf16 would round eps in each.
    device = devices.pick_device(cfg.device)
    devices.use_precision(cfg.precision == "bf16")
    ckpt, net, d = checkpoint.load_model(cfg.ckpt, cfg.weights, device)
    held, which = data.held_out(ckpt, cfg.data, cfg.data_dir, cfg.skip_broken, cfg.n)
    with devices.autocast(device, cfg.precision):
        terms = bound(cfg, net, d, held, ckpt, device)
    if not terms.isfinite().all():
        raise Failure(f"{cfg.ckpt}: the network's output is not finite; its training diverged")
    say(f"{len(held.images):,} {which}, {checkpoint.title(ckpt, cfg.weights)}; bits/dim")
    report(terms)


def bound(cfg, net, d, held, ckpt, device):
    """Return the terms (K, N, T + 1) in bits/dim, for beta, beta_tilde and a learned variance, if any."""
    bound_terms = improved.bound_terms if checkpoint.learned(ckpt) else likelihood.bound_terms
    clip = ckpt["process"]["clip"]
    N = len(held.images)
    parts = []
    progress = Progress("evaluating", N * d.T, "image-steps")
    for i in torch.arange(N).split(cfg.batch_size):
        x0, y = held.batch(i, device)
        noise = sampling.image_noise(sampling.image_seeds(cfg.seed, i.tolist()))

        def model(xt, t, y=y, first=int(i[0])):  # called once for each t = 1 .. T
            progress(first * d.T + len(xt) * int(t[0]), f"image {first + len(xt)} of {N}")
            return net(xt, t, y)

        parts.append(bound_terms(model, d, x0, [d.beta, d.beta_tilde], clip=clip, noise=noise))
    progress.close()
    return torch.cat(parts, dim=1)


def report(terms):
    """Print the bound and its parts: mean and standard error over the images; terms (2 or 3, N, T + 1)."""
    _, n, columns = terms.shape
    T = columns - 1
    # The paper reports rate and distortion (sec. 4.3); its rate includes L_T.
    parts = {
        "L_T                 prior": terms[:, :, T],
        f"L_1 .. L_{T - 1:<9} rate": terms[:, :, 1:T].sum(2),
        "L_0                 distortion": terms[:, :, 0],
        "bound on -log2 p(x0)": terms.sum(2),
    }
    heads = ["sigma^2 = beta", "sigma^2 = beta_tilde", "sigma^2 learned"][: len(terms)]
    say(" " * 32 + "".join(f"{head:>22}" for head in heads))
    for name, values in parts.items():
        means = [f"{row.mean():.5f}" for row in values]
        if n > 1:
            means = [f"{mean} ± {row.std() / n**0.5:.5f}" for mean, row in zip(means, values)]
        say(f"{name:32}" + "".join(f"{mean:>22}" for mean in means))


if __name__ == "__main__":
    command.run(main, Config, __doc__)

"""From a checkpoint to bits/dim on held-out images: the bound of eq. 5, split into its terms.

python evaluate.py --ckpt ckpt.pt --n 100            held-out digits, or CIFAR-10's test images
python evaluate.py --ckpt ckpt.pt --data path/to/held-out/images
"""

import support.start  # noqa: F401, and first: see there

# isort: split
from dataclasses import MISSING, dataclass

import torch

import ddpm
import improved
from support import checkpoint, command, data, devices
from support.command import flag
from support.errors import Failure, printable
from support.progress import Progress


@dataclass(frozen=True)
class Config:
    ckpt: str = flag(
        MISSING,
        "checkpoint that train.py or convert.py wrote; it carries its configuration",
        group="input",
        metavar="PATH",
    )
    weights: str = flag(
        "ema", "weights to use: their moving average, or the last", choices=("ema", "raw")
    )
    data: str | None = flag(
        None,
        "images to evaluate: glyphs, cifar10, or a folder (default: those held out "
        "from the network's own data)",
        metavar="DATA",
    )
    data_dir: str = flag(
        "data", "folder of CIFAR-10 and of the caches of image folders", metavar="DIR"
    )
    skip_broken: bool = flag(False, "leave out the files of a folder that are no images")
    n: int | None = flag(None, "number of images, a seeded choice (default: all)", low=1)
    seed: int = flag(0, "image i is noised from seed + i, at any batch size", low=0, high=2**31)

    batch_size: int = flag(256, "number of images evaluated at a time", low=1, group="machine")
    device: str = flag("auto", "device to compute on: auto, cpu, cuda, cuda:1, mps, ...")
    precision: str = flag(
        "fp32",
        "precision of the network; bf16 rounds the bound, and is faster where the hardware has it",
        choices=("fp32", "bf16"),
    )


def main(cfg, given):
    # float32 by default: the bound sums T terms, and bf16 would round eps in each.
    device = devices.pick_device(cfg.device)
    bf16 = cfg.precision == "bf16"
    devices.use_precision(bf16)
    ckpt, net, d = checkpoint.load_model(cfg.ckpt, cfg.weights, device)
    (images, labels, _), apart = data.held_out(ckpt, cfg.data, cfg.data_dir, cfg.skip_broken, cfg.n)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        terms = bound(cfg, net, d, images, labels, ckpt, device)
    if not terms.isfinite().all():
        raise Failure(f"{cfg.ckpt}: the network's output is not finite; its training diverged")
    name = printable(cfg.data or ckpt["config"]["data"])
    what = f"held-out images of {name}" if apart else "images it was trained on"
    report(terms, f"{len(images):,} {what}, {checkpoint.title(ckpt, cfg.weights)}")


def bound(cfg, net, d, images, labels, ckpt, device):
    """The terms (K, N, T + 1) of the bound in bits/dim: for beta, beta_tilde, and a learned variance."""
    N, rows = len(images), []
    bound_terms = improved.bound_terms if checkpoint.learned(ckpt) else ddpm.bound_terms
    progress = Progress("evaluating", N * d.T, "image-steps")
    for first in range(0, N, cfg.batch_size):
        x0 = images[first : first + cfg.batch_size].to(device).float() / 127.5 - 1
        y = None if labels is None else labels[first : first + cfg.batch_size].to(device)
        # A generator for each image: its terms do not depend on the batch size.
        generators = [torch.Generator().manual_seed(cfg.seed + first + i) for i in range(len(x0))]

        def model(xt, t, y=y, first=first):  # the bound asks it once for each t = 1 .. T
            progress(first * d.T + len(xt) * int(t[0]), f"image {first + len(xt)} of {N}")
            return net(xt, t, y)

        rows.append(
            bound_terms(model, d, x0, [d.beta, d.beta_tilde], ckpt["process"]["clip"], generators)
        )
    progress.close()
    return torch.cat(rows, dim=1)


def report(terms, title):
    """Prints the bound and its parts, mean and standard error over the images; terms (2 or 3, N, T + 1)."""
    T = terms.shape[2] - 1
    # The paper reports rate and distortion (sec. 4.3); its rate includes L_T.
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
        cells = (
            f"{row.mean():.5f}" + (f" ± {row.std() / n**0.5:.5f}" if n > 1 else "")
            for row in values
        )
        print(f"{name:32}" + "".join(f"{cell:>22}" for cell in cells))


if __name__ == "__main__":
    command.run(main, Config, __doc__)

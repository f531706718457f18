r"""Draw pictures that explain diffusion, with your own network: the papers' figures, and the network itself.

    python figures.py --out figures                           the pictures that need no network
    python figures.py --ckpt ckpt.pt --out figures            all pictures possible with this checkpoint
    python figures.py --ckpt ckpt.pt --out figures --only reverse,shared
    python figures.py --out figures --only loss --log log.jsonl

    1  no network    forward, schedules, embedding, unet   iDDPM fig. 3 and 5
    2  a run         epochs, loss
    3  sampling      reverse, shared, interpolation        DDPM fig. 6, 7, 8 and 9
                     steps, guidance                       DDIM table 1, CFG fig. 1
    4  the bound     rate, terms                           DDPM fig. 5, iDDPM fig. 2

The docstring of each figure's function in figures.py says what to look for.
"""

import functools
import inspect
import itertools
import json
import pathlib
import sys
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # also under python -P

import numpy as np
import torch
from PIL import Image

import ddpm
import improved
import likelihood
from support import data, devices, pictures, sampling
from support.checkpoint import learned, load_model
from support.command import flag, run
from support.errors import Failure, UsageError
from support.files import grids, replacing, writable_folder
from support.network_picture import network_picture
from support.pictures import to_uint8
from support.plots import Axis, heat, joined, lines, sheet, span
from support.progress import Progress, note, say


@dataclass(frozen=True)
class Config:
    ckpt: str | None = flag(
        None, "checkpoint, or a diffusers folder", group="input", metavar="PATH"
    )
    log: str | None = flag(None, "file of train.py --log, for the figure loss", metavar="PATH")
    data: str | None = flag(
        None,
        "glyphs, cifar10, or a folder of images (default: the images held out in training)",
        metavar="DATA",
    )
    data_dir: str = flag(
        "data", "folder for CIFAR-10 and the caches of image folders", metavar="DIR"
    )

    out: str = flag("figures", "folder for the pictures NAME.png", group="output", metavar="DIR")
    only: str | None = flag(
        None, "figures to draw, such as reverse,shared (default: all)", metavar="NAMES"
    )
    n: int | None = flag(
        None,
        "number of samples in a figure (default: 3 to 10), or of images averaged in rate and terms "
        "(default: 16)",
        low=1,
        high=64,
    )
    seed: int = flag(0, "different seeds give different images and noise", low=0, high=2**31)

    device: str = flag("auto", "device to compute on: auto, cpu, cuda, mps, ...", group="machine")


def main(cfg, given):
    names = cfg.only.split(",") if cfg.only else list(FIGURES)
    for name in names:
        if name not in FIGURES:
            raise UsageError(f"--only {name}: not a figure; choose from {', '.join(FIGURES)}")
    if cfg.log and "loss" not in names:
        raise UsageError("--log: only the figure loss uses it; add loss to --only")
    scene = Scene(cfg)
    lacking = {}
    for name in names:
        need = needs(name, scene)
        if need and cfg.only:
            raise UsageError(f"--only {name}: needs {need}")
        if need:
            lacking[name] = need
    writable_folder(cfg.out)
    out = pathlib.Path(cfg.out)
    out.mkdir(exist_ok=True)
    drawn = [name for name in names if name not in lacking]
    progress = Progress("drawing", len(drawn), "pictures")
    for i, name in enumerate(drawn):
        progress(i, name)
        picture = FIGURES[name](scene)
        progress.close()
        with replacing(out / f"{name}.png") as file:
            picture.save(file, "PNG", optimize=True)
        say(f"{out / name}.png: {inspect.getdoc(FIGURES[name]).splitlines()[0]}")
    for name, need in lacking.items():
        say(f"not drawn: {name}, which needs {need}")
    say(f"{len(drawn)} pictures in {out}")


def needs(name, scene):
    """Return what a figure needs that was not given, in words; None if it can be drawn."""
    if name == "loss":
        return None if scene.log else "--log, a log that train.py --log wrote"
    if name in ("forward", "schedules", "embedding", "unet"):
        return None
    if not scene.ckpt:
        return "--ckpt, a checkpoint of train.py"
    if name == "guidance" and not scene.ckpt["classes"]:
        return "a network with classes (train.py --labels)"
    if name == "epochs" and not grids(scene.cfg.ckpt):
        return "the sample grids that train.py saves next to the checkpoint"
    return None


class Scene:
    """The inputs of the figures: the flags, held-out images, and a checkpoint's network, if there is one."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.ckpt = None
        self.log = read_log(cfg.log) if cfg.log else None
        device = devices.pick_device(cfg.device)
        devices.use_precision(bf16=False)  # the bound sums T terms, and bf16 would round each
        several = max(2, cfg.n or 16)
        if cfg.ckpt:
            self.ckpt, self.net, self.d = load_model(cfg.ckpt, "ema", device)
            self.clip = self.ckpt["process"]["clip"]
            if not all(weight.isfinite().all() for weight in self.net.parameters()):
                raise Failure(f"{cfg.ckpt}: its weights are not finite; its training diverged")
            # Without a class, x_t alone decides the image.
            self.model = improved.eps_only(self.net) if learned(self.ckpt) else self.net
            found, _ = data.held_out(self.ckpt, cfg.data, cfg.data_dir, limit=several)
        else:
            found = data.load_all(cfg.data or "glyphs", cfg.data_dir, (64, 64), limit=several)
        self.labels = None if found.labels is None else found.labels.to(device)
        self.x0 = found.images.to(device).float() / 127.5 - 1

    def noise(self, numbers):
        """Return a noise function for the images with these numbers of --seed, as in sample.py."""
        return sampling.image_noise(sampling.image_seeds(self.cfg.seed, numbers))

    def sample(self, n, **how):
        """Sample n images as sample.py does; the classes take turns: uint8 (n, H, W, C)."""
        labels, _ = sampling.class_labels(self.ckpt["classes"], n=n)
        labels = labels if self.ckpt["classes"] else None
        seeds = sampling.image_seeds(self.cfg.seed, range(n))
        how.update(labels=labels, clip=self.clip)
        return to_uint8(sampling.sample(self.net, self.d, self.ckpt["shape"], seeds, **how))

    def decode(self, xt, t, noise):
        """Sample x_0 ~ p(x_0 | x_t) of xt (B, C, H, W) by DDIM with eta = 1 in at most 50 steps."""
        timesteps = ddpm.ddim_timesteps(t, min(t, 50))
        return ddpm.sample_ddim(
            self.model, self.d, xt, timesteps, eta=1.0, clip=self.clip, noise=noise
        )

    @functools.cached_property
    def bound(self):
        """The terms of the bound (K, B, T + 1), and the error of the predicted x0 (T,), of held-out images.

        The terms are for both fixed variances and the learned one, if there is one. The error is the mean
        squared difference from x0 at t = 1, .., T, for the same x_t.
        """
        d = self.d
        x0 = self.x0[: self.cfg.n or 16]
        y = None if self.labels is None else self.labels[: len(x0)]
        bound_terms = improved.bound_terms if learned(self.ckpt) else likelihood.bound_terms
        noise = self.noise(range(len(x0)))
        error = np.empty(d.T)

        def model(xt, t):
            output = self.net(xt, t, y)
            predicted = d.x0_from_eps(xt, t, output[:, : x0.shape[1]]).clamp(-1, 1)
            error[int(t[0]) - 1] = (predicted - x0).square().mean().item()
            return output

        terms = bound_terms(model, d, x0, [d.beta, d.beta_tilde], clip=self.clip, noise=noise)
        return terms, error


def times(T):
    """Return the timesteps that a row of pictures shows: T, 0 and nine evenly between, or fewer."""
    return sorted({T * tenth // 10 for tenth in range(11)}, reverse=True)


# --- 1. No network -------------------------------------------------------------------------------


def forward(scene):
    """An image dissolves in noise as t grows, with the linear and with the cosine schedule.

    Look at the right half. With the linear schedule nothing is left of the image at t = 600, so the later
    timesteps teach a network little. With the cosine schedule the image remains visible for longer.
    """
    at = times(1000)[::-1]
    x0 = scene.x0[:1]
    eps = scene.noise([0])(x0)
    rows = []
    for beta in (ddpm.linear_schedule(), ddpm.cosine_schedule()):
        d = ddpm.Diffusion(beta)
        rows.append(to_uint8(torch.cat([d.q_sample(x0, t, eps) for t in at])))  # eq. 4
    return sheet(rows, [f"t = {t}" for t in at], ["linear", "cosine"])


def schedules(scene):
    """Three schedules: the noise that a timestep adds, the remaining image, and the signal-to-noise ratio.

    Look at the middle: alpha_bar_t is the image's share of the variance of x_t. The linear schedule has
    used it up at t = 600; the cosine schedule falls evenly. On the right, the ratio falls by eight powers
    of ten or more; the cosine schedule leaves the least of an image, but only in its last timesteps.
    """
    tables = {
        "linear": ddpm.linear_schedule(),
        "cosine": ddpm.cosine_schedule(),
        "exponential": ddpm.exponential_schedule(),
    }
    t = np.arange(1, 1001)
    share = {name: ddpm.Diffusion(beta).alpha_bar[1:] for name, beta in tables.items()}
    added = {name: (t, beta[1:]) for name, beta in tables.items()}
    left = {name: (t, s) for name, s in share.items()}
    ratio = {name: (t, s / (1 - s)) for name, s in share.items()}
    x = Axis("timestep t", 0, 1000)
    snr = Axis("alpha_bar / (1 - alpha_bar)", 1e-9, 1e6, log=True)
    charts = [
        lines(x, Axis("beta", 1e-5, 1, log=True), added, "Noise added", (300, 290)),
        lines(x, Axis("alpha_bar", 0, 1), left, "Remaining image", (264, 290), legend=False),
        lines(x, snr, ratio, "Signal to noise", (264, 290), legend=False),
    ]
    return joined(charts)


def embedding(scene):
    """The sinusoids that tell the network t, and how similar they are for two timesteps.

    Look at one row on the left: fast channels differ from row to row, slow ones over hundreds of rows.
    On the right: neighbouring timesteps look alike, so what the network learns at one helps the next.
    """
    table = ddpm.timestep_embedding(torch.arange(1000), 128)
    x = Axis("channel: 64 sines, 64 cosines", 0, 128)
    title = "Embedding of t: blue -1, orange 1"
    left = heat(x, Axis("timestep t", 0, 50), table[:50], title, cell=(2, 6))
    table = table / table.norm(dim=1, keepdim=True)
    far = np.arange(-400, 401)
    alike = table[500 + far] @ table[500]
    x = Axis("t' - t", -400, 400)
    right = lines(
        x,
        Axis("cosine of their angle", 0, 1),
        {"": (far, alike)},
        "Similarity of t and t'",
        (400, left.height),
    )
    return joined([left, right])


def unet(scene):
    """The network with the shapes (channels x height x width) of all its levels.

    Look at the two sides: the left one halves the image and adds channels, the right one goes back, and
    skip connections carry each resolution across. t reaches every residual block.
    """
    network = {name: p.default for name, p in inspect.signature(ddpm.UNet).parameters.items()}
    shape = (3, 32, 32)  # without a checkpoint, the paper's network for CIFAR-10
    if scene.ckpt:
        network = scene.ckpt["network"]
        shape = scene.ckpt["shape"]
    with torch.device("meta"):
        count = sum(weight.numel() for weight in ddpm.UNet(**network).parameters())
    return network_picture(network, shape, f"UNet with {count:,} weights")


# --- 2. A run ------------------------------------------------------------------------------------


def epochs(scene):
    """A network learns: images of the same seeds after each epoch, or every few.

    Look down a column: first the shape, then the details. A row shows the first images, ten at most, of a
    grid that train.py saved next to the checkpoint.
    """
    tall, wide, _ = pictures.cell(*scene.ckpt["shape"][1:])
    gap = pictures.GAP
    found = grids(scene.cfg.ckpt)
    rows = []
    for path in found.values():
        grid = np.atleast_3d(np.asarray(Image.open(path)))[gap:, gap:]
        places = itertools.product(range(0, grid.shape[1], wide), range(0, len(grid), tall))
        images = [grid[top : top + tall - gap, left : left + wide - gap] for left, top in places]
        rows.append(images[:10])
    classes = scene.ckpt["classes"]
    names = [classes[i % len(classes)] for i in range(len(rows[0]))] if classes else []
    return sheet(rows, names, [f"epoch {epoch}" for epoch in found], scale=1)


def loss(scene):
    """The loss along a run, and its last three quarters enlarged: of training and of held-out images.

    Look at the gap on the right. Where the training loss falls and the held-out loss rises, the network
    memorises images. A loss that hardly falls is no reason to stop: samples still get better.
    """
    curves = {}
    for name, key in (("training (running mean)", "loss"), ("held out", "held_out")):
        points = [(line["epoch"], line[key]) for line in scene.log if line.get(key) is not None]
        if points:
            epoch, value = np.array(points).T
            few = max(1, len(value) // 30) if key == "loss" else 1
            mean = np.ones(few) / few
            curves[name] = (np.convolve(epoch, mean, "valid"), np.convolve(value, mean, "valid"))
    end = max(epoch[-1] for epoch, _ in curves.values())
    charts = []
    for title, start, log in (("Loss", 0, True), ("Last three quarters", end / 4, False)):
        shown = [value[epoch >= start] for epoch, value in curves.values()]
        y = span("mean squared error of eps", shown, log)
        charts.append(lines(Axis("epoch", start, end), y, curves, title, (400, 340), legend=log))
    return joined(charts)


def read_log(path):
    """Return the entries of a log by increasing step, the latest for each step. Broken lines are skipped."""
    needed = ("step", "epoch", "loss")
    log = {}
    skipped = 0
    with open(path, errors="replace") as file:
        for text in file:
            try:
                entry = json.loads(text)
            except ValueError:  # a killed run may leave half a line
                entry = None
            values = [entry.get(key) for key in needed] if isinstance(entry, dict) else [None]
            if all(isinstance(value, (int, float)) for value in values):
                log[entry["step"]] = entry
            else:
                skipped += 1
    if not log:
        raise Failure(f"--log {path}: contains no line of a log of train.py")
    if skipped:
        note(f"note: --log {path}: skipped {skipped} broken lines")
    return [log[step] for step in sorted(log)]


# --- 3. Sampling ---------------------------------------------------------------------------------


@torch.no_grad()
def walk(model, d, xt, timesteps, noise, clip=True):
    """DDIM with eta = 1 from xt (B, ...): {t: (x_t, the predicted x0, eq. 15)} for `timesteps` and 0."""
    path = {}
    for s, t in reversed(ddpm.timestep_pairs(d.T, timesteps)):
        eps = model(xt, ddpm.same_t(t, xt))
        path[t] = (xt, d.x0_from_eps(xt, t, eps).clamp(-1, 1))
        xt = ddpm.ddim_step(d, xt, t, s, eps, eta=1.0, clip=clip, noise=noise)
    path[0] = (xt, xt)
    return path


def reverse(scene):
    """From noise to an image: x_t, and below it the network's prediction of x0 at that timestep (DDPM fig. 6).

    Look at each second row. The first prediction is a blur, the mean of all images that x_t may become;
    then the shape is settled, and last the edges. At t = T there is none (grey): x_t holds no image, and
    eq. 15 divides by almost 0.
    """
    d = scene.d
    n = scene.cfg.n or 3
    noise = scene.noise(range(n))
    xT = noise(scene.x0[:1])
    timesteps = ddpm.ddim_timesteps(d.T, min(100, d.T))
    path = walk(scene.model, d, xT, timesteps, noise, scene.clip)
    at = times(d.T)
    rows = []
    for i in range(n):
        rows.append([to_uint8(path[t][0])[i] for t in at])
        rows.append([to_uint8(path[t][1])[i] if d.alpha_bar[t] > 1e-4 else None for t in at])
    return sheet(rows, [f"t = {t}" for t in at], ["x_t", "predicted x0"] * n)


def shared(scene):
    """Several images from one noisy x_t: they share what x_t has already decided (DDPM fig. 7).

    Look along a row; its samples differ only by the noise of the timesteps from t down to 0. From t = T
    everything is open. The smaller t, the more is decided: the rough shape, the character, then its edges.
    """
    T = scene.d.T
    n = scene.cfg.n or 8
    x0 = scene.x0[:1]
    eps = scene.noise([n])(x0)
    at = sorted({max(1, T * quarter // 4) for quarter in (1, 2, 3, 4)}, reverse=True)
    rows = []
    for t in at:
        xt = scene.d.q_sample(x0, t, eps)
        samples = scene.decode(xt.expand(n, -1, -1, -1), t, scene.noise(range(n)))
        rows.append(to_uint8(torch.cat([x0, xt, samples])))
    above = ["image", "x_t", *(f"sample {i + 1}" for i in range(n))]
    title = "Samples from one x_t: only the noise from t down to 0 differs"
    return sheet(rows, above, [f"t = {t}" for t in at], title)


def interpolation(scene):
    """Two images are noised to timestep t, mixed, and the mixture is denoised (DDPM sec. 4.4, fig. 8 and 9).

    Look at a row's ends first: at 0% and 100% nothing is mixed, and a small t gives the images back. A
    small t also lays one image over the other; a larger one makes a whole image of the mixture; at t = T
    any image can come, whichever two were mixed.
    """
    T = scene.d.T
    at = sorted({max(1, T * eighth // 8) for eighth in (1, 2, 4, 5, 6, 8)})
    share = torch.linspace(0, 1, 9, device=scene.x0.device).reshape(-1, 1, 1, 1)
    other = len(scene.x0) - 1
    if scene.labels is not None:  # an image of another class, if there is one
        other = int((scene.labels != scene.labels[0]).int().argmax()) or other
    pair = scene.x0[[0, other]]
    eps = scene.noise([0, 1])(pair)
    rows = []
    for t in at:
        one, two = scene.d.q_sample(pair, t, eps).split(1)
        same = scene.noise([2] * len(share))  # all columns share the noise
        mixtures = scene.decode((1 - share) * one + share * two, t, same)
        rows.append(to_uint8(torch.cat([pair[:1], mixtures, pair[1:]])))
    above = ["one", *(f"{100 * part:g}%" for part in share.flatten()), "other"]
    title = "Mixtures of two x_t: only the share of the other differs along a row"
    return sheet(rows, above, [f"t = {t}" for t in at], title)


def steps(scene):
    """The same seeds in 5 to T sampling steps: DDIM without noise, with noise, and ancestral sampling.

    Look along a row. Without noise (eta 0), few steps give what many give, less sharply. With noise (eta
    1), many steps give the better images; with sigma^2 = beta, few steps leave noise in them.
    """
    T = scene.d.T
    counts = sorted({min(k, T) for k in (5, 10, 20, 50, 100, T)})
    ways = {
        "DDIM, eta = 0": dict(eta=0.0),
        "DDIM, eta = 1": dict(eta=1.0),
        "ancestral, beta": dict(variance="beta"),
    }
    if learned(scene.ckpt):
        ways["ancestral, learned"] = dict(variance="learned")
    rows = []
    for way in ways.values():
        several = [scene.sample(scene.cfg.n or 4, steps=k, **way) for k in counts]
        small = [pictures.grid(images, 2, side=48) for images in several]  # two rows in each place
        rows.append([np.atleast_3d(np.asarray(picture)) for picture in small])
    return sheet(rows, [f"{k} steps" for k in counts], list(ways), gap=8)


def guidance(scene):
    """The same seeds at five strengths w of classifier-free guidance; w = -1 uses no class.

    Look down a column: at w = 0 the class is there; with larger w it gets clearer, bolder, and more like
    every other image of its class. That is the price.
    """
    classes = scene.ckpt["classes"]
    strengths = {-1: "w = -1 (no class)", 0: "w = 0", 1: "w = 1", 2: "w = 2", 4: "w = 4"}
    n = min(scene.cfg.n or 10, len(classes))
    few = min(50, scene.d.T)
    rows = [scene.sample(n, steps=few, eta=1.0, guidance=w) for w in strengths]
    return sheet(rows, classes[:n], list(strengths.values()))


# --- 4. The bound --------------------------------------------------------------------------------


def smooth(values):
    """Return values (.., T), each averaged over the timesteps within a tenth of t, but not beyond T.

    This removes most of the sampling noise at large t, and changes nothing at t < 10.
    """
    T = values.shape[-1]
    means = []
    for t in range(1, T + 1):
        few = min(t // 10, T - t)
        means.append(values[..., t - 1 - few : t + few].mean(-1))
    return np.stack(means, axis=-1)


def rate(scene):
    """Distortion against rate, in bits, as x_T, .., x_1 are sent one by one (DDPM fig. 5).

    Look at how the curve begins: the first tenth of the bits removes most of the error. The others
    describe what the eye hardly notices, so the model is a good lossy compressor. The error is smoothed
    over neighbouring t, and on a log scale: on the paper's linear one the curve follows the axes.
    """
    terms, error = scene.bound
    variance = scene.ckpt["process"]["variance"]
    terms = terms.mean(1)[["beta", "beta_tilde", "learned"].index(variance)].numpy()
    # Sec. 4.3: x_T costs L_T bits, and each x_t after it L_t more (Algorithms 3 and 4).
    bits = terms[::-1].cumsum()[::-1][1:]
    rmse = 127.5 * smooth(error) ** 0.5
    x = span("rate, bits/dim", [[0], bits])
    y = span("distortion, RMSE on 0..255", [rmse], log=True)
    title = f"Distortion against rate, sigma^2 = {variance}"
    return lines(x, y, {"": (bits, rmse)}, title, (620, 380))


def terms(scene):
    """The cost of each timestep: the terms L_{t-1} of the bound, averaged over held-out images.

    Look at the left ends: the last timesteps of sampling, in which nothing seems to change, cost most of
    the bits. There the choice of sigma^2 matters, as the ratios on the right show; at large t it does
    not. The legend gives the whole bound, L_T included. The curves are smoothed over neighbouring t.
    """
    mean = scene.bound[0].mean(1)
    cost = smooth(mean[:, :-1].numpy())
    t = np.arange(1, scene.d.T + 1)
    x = Axis("timestep t", 1, max(2, scene.d.T), log=True)
    y = span("L_{t-1}, bits/dim", cost[1], log=True)
    title = "Terms of the bound, sigma^2 = beta_tilde"
    left = lines(x, y, {"": (t, cost[1])}, title, (440, 380))
    ratios = {}
    for i, name in ((1, "beta_tilde"), (0, "beta"), (2, "learned")):
        if i < len(cost):
            ratios[f"{name}: {mean[i].sum():.3f}"] = (t, cost[i] / cost[1])
    y = span("ratio to the terms of beta_tilde", [ratio for _, ratio in ratios.values()])
    title = "Choices of sigma^2, with sums in bits/dim"
    return joined([left, lines(x, y, ratios, title, (440, 380))])


FIGURES = {figure.__name__: figure for figure in (
    forward, schedules, embedding, unet, epochs, loss, reverse, shared, interpolation, steps, guidance,
    rate, terms,
)}  # fmt: skip


if __name__ == "__main__":
    run(main, Config, __doc__)

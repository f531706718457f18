"""Draw pictures that explain diffusion, with your own network: the papers' figures, and the network itself.

    python figures.py --out figures                           the pictures that need no network
    python figures.py --ckpt ckpt.pt --out figures            all pictures possible with this checkpoint
    python figures.py --log log.jsonl --only loss

    no network    forward, schedules, embedding, unet   iDDPM fig. 3 and 5
    a run         epochs, loss
    sampling      reverse, shared, interpolation        DDPM fig. 6, 7, 8 and 9
                  steps, guidance                       DDIM table 1, CFG fig. 1
    the bound     rate, terms                           DDPM fig. 5, iDDPM fig. 2

The docstring of each figure's function in figures.py says what to look for.
"""

import functools
import inspect
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
from support.checkpoint import SCHEDULES, learned, load_model
from support.command import flag, run
from support.errors import Failure, UsageError
from support.files import grids, replacing, writable
from support.network_picture import network_picture
from support.pictures import GAP, to_uint8
from support.plots import Axis, heat, joined, lines, sheet, span
from support.progress import Progress, note, say


@dataclass(frozen=True)
class Config:
    ckpt: str | None = flag(None, "checkpoint, or a diffusers folder", group="input")
    log: str | None = flag(None, "file of train.py --log, for the figure loss")
    data: str | None = flag(None, "glyphs, cifar10 or a folder (default: held-out images)")
    data_dir: str = flag("data", "folder for CIFAR-10 and the caches of image folders")
    skip_broken: bool = flag(False, "skip the files of a folder that are not images")

    out: str = flag("figures", "folder for the pictures NAME.png", group="output")
    only: str | None = flag(None, "figures to draw, such as reverse,shared (default: all)")
    n: int | None = flag(None, "images in a figure (default: 3 to 10, 16 averaged)", low=1, high=64)
    seed: int = flag(0, "different seeds give different images and noise", low=0, high=2**31)

    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps, ...", group="machine")


def main(cfg, given):
    names = [name.strip() for name in cfg.only.split(",")] if cfg.only else list(FIGURES)
    unknown = set(names) - set(FIGURES)
    if unknown:
        raise UsageError(f"--only {min(unknown)}: not a figure; choose from {', '.join(FIGURES)}")
    if cfg.log and "loss" not in names:
        raise UsageError("--log: only the figure loss uses it; add loss to --only")
    scene = Scene(cfg)
    lacking = missing(scene)
    for name in names:
        if cfg.only and name in lacking:
            raise UsageError(f"--only {name}: needs {lacking[name]}")
    writable(cfg.out, folder=True)
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
    for name in names:
        if name in lacking:
            say(f"not drawn: {name}, which needs {lacking[name]}")
    say(f"{len(drawn)} pictures in {out}")


def missing(scene):
    """Return {name of a figure that cannot be drawn: what it needs}."""
    needs = {} if scene.log else {"loss": "--log, a log that train.py --log wrote"}
    if not scene.ckpt:
        return needs | {figure.__name__: "--ckpt, a checkpoint of train.py" for figure in NETWORK}
    if not scene.ckpt["classes"]:
        needs["guidance"] = "a network with classes (train.py --labels)"
    if not grids(scene.cfg.ckpt):
        needs["epochs"] = "the sample grids that train.py saves next to the checkpoint"
    return needs


class Scene:
    """The inputs of the figures: flags, images x0 (B, C, H, W), and perhaps a log and a network."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.log = read_log(cfg.log) if cfg.log else None
        self.ckpt = None
        device = devices.pick_device(cfg.device)
        devices.use_precision(bf16=False)  # the bound sums T terms, and bf16 would round each
        limit = max(2, cfg.n or 16)
        if cfg.ckpt:
            self.ckpt, self.net, self.d = load_model(cfg.ckpt, "ema", device)
            if not all(weight.isfinite().all() for weight in self.net.parameters()):
                raise Failure(f"{cfg.ckpt}: its weights are not finite; its training diverged")
            self.clip = self.ckpt["process"]["clip"]
            self.model = improved.eps_only(self.net) if learned(self.ckpt) else self.net
            source = (cfg.data, cfg.data_dir, cfg.skip_broken)
            found, _ = data.held_out(self.ckpt, *source, limit=limit)
        else:
            how = dict(skip_broken=cfg.skip_broken, n=limit)
            found, _ = data.read(cfg.data or "glyphs", cfg.data_dir, (64, 64), **how)
            found = found.take(limit)
        self.x0, self.labels = found.batch(torch.arange(len(found.images)), device)

    def noise(self, numbers):
        """Return a noise function for the images with these numbers of --seed, as in sample.py."""
        return sampling.image_noise(sampling.image_seeds(self.cfg.seed, numbers))

    def sample(self, n, **how):
        """Sample n images as sample.py does; the classes take turns: uint8 (n, H, W, C)."""
        how["labels"], _ = sampling.class_labels(self.ckpt["classes"], n=n)
        how["clip"] = self.clip
        seeds = sampling.image_seeds(self.cfg.seed, range(n))
        return to_uint8(sampling.sample(self.net, self.d, self.ckpt["shape"], seeds, **how))

    def decode(self, xt, t, noise, most=50, on_step=None):
        """Sample x_0 ~ p(x_0 | x_t) of xt (B, C, H, W) by DDIM with eta = 1, in t or `most` steps."""
        timesteps = ddpm.ddim_timesteps(t, min(t, most))
        how = dict(eta=1.0, clip=self.clip, noise=noise, on_step=on_step)
        return ddpm.sample_ddim(self.model, self.d, xt, timesteps, **how)

    @functools.cached_property
    def bound(self):
        """The terms of the bound (K, B, T + 1), and the mean squared error of the predicted x0 (T,)."""
        x0 = self.x0[: self.cfg.n or 16]
        y = None if self.labels is None else self.labels[: len(x0)]
        error = np.empty(self.d.T)

        def model(xt, t):
            output = self.net(xt, t, y)
            predicted = self.d.x0_from_eps(xt, t, output[:, : x0.shape[1]]).clamp(-1, 1)
            error[int(t[0]) - 1] = (predicted - x0).square().mean().item()
            return output

        bound_terms = improved.bound_terms if learned(self.ckpt) else likelihood.bound_terms
        how = dict(clip=self.clip, noise=self.noise(range(len(x0))))
        return bound_terms(model, self.d, x0, [self.d.beta, self.d.beta_tilde], **how), error


def times(T):
    """Return the timesteps that a row of pictures shows: T, 0 and nine evenly between, or fewer."""
    return sorted({T * tenth // 10 for tenth in range(11)}, reverse=True)


def forward(scene):
    """An image dissolves in noise as t grows, with the linear and with the cosine schedule.

    Look at t = 600: with the linear schedule nothing is left, so later timesteps teach little.
    """
    at = times(1000)[::-1]
    x0 = scene.x0[:1]
    eps = scene.noise([0])(x0)
    rows = []
    for name in ("linear", "cosine"):
        d = ddpm.Diffusion(SCHEDULES[name](1000))
        rows.append(to_uint8(torch.cat([d.q_sample(x0, t, eps) for t in at])))  # eq. 4
    return sheet(rows, [f"t = {t}" for t in at], ["linear", "cosine"])


def schedules(scene):
    """Three schedules: the noise that a timestep adds, the remaining image, and the signal-to-noise ratio.

    Look at the middle: the linear schedule has used up the image at t = 600; cosine falls evenly.
    """
    t = np.arange(1, 1001)
    added = {}
    left = {}
    ratio = {}
    for name, schedule in SCHEDULES.items():
        beta = schedule(1000)
        share = ddpm.Diffusion(beta).alpha_bar[1:]
        added[name] = (t, beta[1:])
        left[name] = (t, share)
        ratio[name] = (t, share / (1 - share))
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

    Look at one row on the left: fast channels differ from row to row, slow ones over hundreds of
    rows. On the right: neighbouring timesteps look alike, so the network generalises over t.
    """
    table = ddpm.timestep_embedding(torch.arange(1000), 128)
    x = Axis("channel: 64 sines, 64 cosines", 0, 128)
    title = "Embedding of t: blue -1, orange 1"
    left = heat(x, Axis("timestep t", 0, 50), table[:50], title, cell=(2, 6))
    table = table / table.norm(dim=1, keepdim=True)
    far = np.arange(-400, 401)
    alike = {"": (far, table[500 + far] @ table[500])}
    x = Axis("t' - t", -400, 400)
    y = Axis("cosine of their angle", 0, 1)
    return joined([left, lines(x, y, alike, "Similarity of t and t'", (400, left.height))])


def unet(scene):
    """The network with the shapes (channels x height x width) of all its levels.

    Look at the two sides: the left one halves the image and adds channels, the right one goes back,
    and skip connections carry each resolution across. t reaches every residual block.
    """
    network = {name: p.default for name, p in inspect.signature(ddpm.UNet).parameters.items()}
    shape = (3, 32, 32)  # without a checkpoint, the paper's network for CIFAR-10
    if scene.ckpt:
        network = scene.ckpt["network"]
        shape = scene.ckpt["shape"]
    with torch.device("meta"):
        count = sum(weight.numel() for weight in ddpm.UNet(**network).parameters())
    return network_picture(network, shape, f"UNet with {count:,} weights")


def loss(scene):
    """The loss along a run, and its last three quarters enlarged: of training and of held-out images.

    Look at the gap on the right. Where the training loss falls and the held-out loss rises, the
    network memorises images. If the loss hardly falls, train on: samples still get better.
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
    """Return a log's entries by increasing step, the latest of each step. Broken lines are skipped."""
    log = {}
    skipped = 0
    with open(path, errors="replace") as file:
        for text in file:
            try:
                entry = json.loads(text)
                numbers = {key: float(entry[key]) for key in ("step", "epoch", "loss")}
                log[numbers["step"]] = entry | numbers
            except (ValueError, KeyError, TypeError):  # a killed run may leave half a line
                skipped += 1
    if not log:
        raise Failure(f"--log {path}: contains no line of a log of train.py")
    if skipped:
        note(f"note: --log {path}: skipped {skipped} broken lines")
    return [log[step] for step in sorted(log)]


def epochs(scene):
    """A network learns: images of the same seeds after each epoch, or every few.

    Look down a column: first the shape, then the details. A row begins a grid of train.py.
    """
    tall, wide, _ = pictures.cell(*scene.ckpt["shape"][1:])
    found = grids(scene.cfg.ckpt)
    rows = []
    for path in found.values():
        grid = np.atleast_3d(np.asarray(Image.open(path)))[GAP:, GAP:]
        columns = np.split(grid, grid.shape[1] // wide, axis=1)
        cells = [np.split(column, len(grid) // tall) for column in columns]
        rows.append(np.concatenate(cells)[:10, :-GAP, :-GAP])
    classes = scene.ckpt["classes"]
    names = [classes[i % len(classes)] for i in range(len(rows[0]))] if classes else []
    return sheet(rows, names, [f"epoch {epoch}" for epoch in found], scale=1)


@torch.no_grad()
def reverse(scene):
    """From noise to an image: x_t, and below it the network's prediction of x0 at that timestep (DDPM fig. 6).

    Look at each second row: first a blur, the mean of all images that x_t may become, then the
    shape, and last the edges. At t = T there is none (grey), because eq. 15 divides by almost 0.
    """
    d = scene.d
    n = scene.cfg.n or 3
    noise = scene.noise(range(n))
    x = {d.T: noise(scene.x0[:1])}
    scene.decode(x[d.T], d.T, noise, most=100, on_step=x.__setitem__)
    at = times(d.T)
    rows = []
    predicted = {0: x[0]}
    for t in at[:-1]:
        predicted[t] = d.x0_from_eps(x[t], t, scene.model(x[t], ddpm.same_t(t, x[t])))
    for i in range(n):
        rows.append([to_uint8(x[t])[i] for t in at])
        rows.append([to_uint8(predicted[t])[i] if d.alpha_bar[t] > 1e-4 else None for t in at])
    return sheet(rows, [f"t = {t}" for t in at], ["x_t", "predicted x0"] * n)


def shared(scene):
    """Several images from one noisy x_t: they share what x_t has already decided (DDPM fig. 7).

    Look along a row: only the later noise differs. The smaller t, the more is already decided.
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

    Look at a row's ends first, where nothing is mixed: a small t gives the images back. It also
    lays one image over the other; a larger t makes a whole image of the mixture, T any image.
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

    Look along a row. Without noise (eta 0), few steps give what many give, less sharply. With noise
    (eta 1), many steps give the better images; with sigma^2 = beta, few steps leave noise in them.
    """
    counts = sorted({min(k, scene.d.T) for k in (5, 10, 20, 50, 100, scene.d.T)})
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

    Look down a column: with larger w, the class gets clearer and bolder, but less varied.
    """
    classes = scene.ckpt["classes"][: scene.cfg.n or 10]
    strengths = {-1: "w = -1 (no class)", 0: "w = 0", 1: "w = 1", 2: "w = 2", 4: "w = 4"}
    how = dict(steps=min(50, scene.d.T), eta=1.0)
    rows = [scene.sample(len(classes), guidance=w, **how) for w in strengths]
    return sheet(rows, classes, list(strengths.values()))


def smooth(values):
    """Return values (.., T), each averaged over the timesteps within a tenth of t, but not beyond T."""
    T = values.shape[-1]
    means = []
    for t in range(1, T + 1):
        few = min(t // 10, T - t)
        means.append(values[..., t - 1 - few : t + few].mean(-1))
    return np.stack(means, axis=-1)


def rate(scene):
    """Distortion against rate, in bits, as x_T, .., x_1 are sent one by one (DDPM fig. 5).

    Look at how the curve begins: the first tenth of the bits removes most of the error. The others
    describe what the eye hardly notices, so the model is a good lossy compressor.
    """
    terms, error = scene.bound
    variance = scene.ckpt["process"]["variance"]
    terms = terms.mean(1)[["beta", "beta_tilde", "learned"].index(variance)].numpy()
    # Sec. 4.3: x_T costs L_T bits, and each x_t after it L_t more (Algorithms 3 and 4).
    bits = terms[::-1].cumsum()[::-1][1:]
    rmse = 127.5 * smooth(error) ** 0.5
    x = span("rate, bits/dim", [[0], bits])
    y = span("distortion, RMSE on 0..255", [rmse], log=True)  # on the paper's linear axis, a corner
    title = f"Distortion against rate, sigma^2 = {variance}"
    return lines(x, y, {"": (bits, rmse)}, title, (620, 380))


def terms(scene):
    """The cost of each timestep: the terms L_{t-1} of the bound, averaged over held-out images.

    Look at the left ends: the last timesteps of sampling, which seem to change nothing, cost most
    of the bits. Only there the choice of sigma^2 matters. The sums in the legend include L_T.
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


NO_NETWORK = (forward, schedules, embedding, unet, loss)
NETWORK = (epochs, reverse, shared, interpolation, steps, guidance, rate, terms)
FIGURES = {figure.__name__: figure for figure in NO_NETWORK + NETWORK}


if __name__ == "__main__":
    run(main, Config, __doc__)

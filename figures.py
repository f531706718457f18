"""The pictures that explain diffusion, drawn from a checkpoint: the papers' figures, of one's own network.

    python figures.py --out figures                           those that need no network
    python figures.py --ckpt ckpt.pt --out figures            all that the checkpoint can show
    python figures.py --ckpt ckpt.pt --out figures --only reverse,shared
    python figures.py --out figures --only loss --log log.jsonl

    1  no network    forward, schedules, embedding       iDDPM fig. 3 and 5
    2  a run         epochs, loss
    3  sampling      reverse, shared, interpolation      DDPM fig. 6, 7, 8 and 9
                     steps, guidance                     DDIM table 1, CFG fig. 1
    4  the bound     rate, terms                         DDPM fig. 5, iDDPM fig. 2

Each figure is a function of a Scene; its docstring says what to look for. What it plots comes from the
functions above it, which take a model and a diffusion as ddpm.py's do.
"""

import support.start  # noqa: F401, and first: see there

# isort: split
import itertools
import json
import os
import pathlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image

import ddpm
import improved
from support import data, devices, outputs, sampling
from support.checkpoint import learned, load_model
from support.command import flag, run
from support.errors import Failure, UsageError
from support.files import refuse_input, refuse_no_folder, replacing, takes_files
from support.pictures import cell, to_uint8
from support.plots import Axis, heat, joined, lines, sheet, span
from support.progress import Progress, say


@dataclass(frozen=True)
class Config:
    ckpt: str | None = flag(
        None,
        "checkpoint that train.py wrote (default: draw what needs no network)",
        group="input",
        metavar="PATH",
    )
    log: str | None = flag(
        None, "log that train.py --log wrote, for the figure loss", metavar="PATH"
    )
    data: str | None = flag(
        None,
        "images to show: glyphs, cifar10, or a folder (default: those held out "
        "from the network's own data)",
        metavar="DATA",
    )
    data_dir: str = flag(
        "data", "folder of CIFAR-10 and of the caches of image folders", metavar="DIR"
    )

    out: str = flag(
        "figures",
        "folder for the pictures, NAME.png each; made if missing",
        group="output",
        metavar="DIR",
    )
    only: str | None = flag(
        None,
        "figures to draw, such as reverse,shared (default: all that can be drawn)",
        metavar="NAMES",
    )
    n: int | None = flag(
        None,
        "number of images: those that a figure of samples shows (default: 3 to 10, as "
        "suits it), and over which rate and terms average (default: 16)",
        low=1,
    )
    seed: int = flag(0, "image i is drawn and noised from seed + i", low=0, high=2**31)

    device: str = flag(
        "auto", "device to compute on: auto, cpu, cuda, cuda:1, mps, ...", group="machine"
    )


def main(cfg, given):
    names = cfg.only.split(",") if cfg.only else list(FIGURES)
    if unknown := [name for name in names if name not in FIGURES]:
        raise UsageError(f"--only {unknown[0]}: no such figure; there are {', '.join(FIGURES)}")
    if cfg.log and "loss" not in names:
        raise UsageError("--log: the figure loss alone takes it, which --only leaves out")
    scene = Scene(cfg)
    reasons = {name: why for name in names if (why := lacking(name, scene))}
    if cfg.only and reasons:
        raise UsageError("; ".join(f"--only {name}: needs {why}" for name, why in reasons.items()))
    out = pathlib.Path(cfg.out)
    refuse_no_folder(out, cfg.out)
    out.mkdir(exist_ok=True)
    takes_files(out / "new", cfg.out)
    for name in names:
        refuse_input(out / f"{name}.png", cfg.ckpt, cfg.log)
    for name in names:
        if name not in reasons:
            picture = FIGURES[name](scene)
            with replacing(out / f"{name}.png") as file:
                picture.save(file, "PNG", optimize=True)
            about = FIGURES[name].__doc__ or name  # python -OO leaves no docstrings
            say(f"{out / name}.png: {about.splitlines()[0]}")
    for name, why in reasons.items():
        say(f"not drawn: {name}, which needs {why}")


def lacking(name, scene):
    """What a figure needs that was not given, in words; None, if it can be drawn."""
    if name == "loss":
        return None if scene.log else "--log, a file that train.py --log wrote"
    if name in ("forward", "schedules", "embedding"):
        return None
    if not scene.ckpt:
        return "--ckpt, a checkpoint of train.py"
    if name == "guidance" and not scene.ckpt["classes"]:
        return "a network that knows classes (train.py --labels)"
    if name == "epochs" and not outputs.grids(scene.cfg.ckpt):
        return "the grids that train.py writes beside the checkpoint"


class Scene:
    """What the figures are drawn from: the flags, held-out images, and a checkpoint's network, if any."""

    def __init__(self, cfg):
        self.cfg, self.ckpt, self.device = cfg, None, devices.pick_device(cfg.device)
        self.log = read_log(cfg.log) if cfg.log else None
        devices.use_precision(bf16=False)  # the bound sums T terms, and bf16 would round each
        several = max(2, cfg.n or 16)
        if cfg.ckpt:
            self.ckpt, self.net, self.d = load_model(cfg.ckpt, "ema", self.device)
            self.clip = self.ckpt["process"]["clip"]
            if not all(weight.isfinite().all() for weight in self.net.parameters()):
                raise Failure(f"{cfg.ckpt}: its weights are not finite; its training diverged")
            (images, self.labels, _), _ = data.held_out(
                self.ckpt, cfg.data, cfg.data_dir, limit=several
            )
        else:
            images, self.labels, _ = data.load(cfg.data or "glyphs", "all", cfg.data_dir, (64, 64), 3,
                                               limit=several)  # fmt: skip
        self.x0 = images.to(self.device).float() / 127.5 - 1

    def network(self, calls, labels=None):
        """The network as a model (xt, t), of labels (B,) or of none, with a line of progress over calls."""
        tick, y = ticker(calls), None if labels is None else labels.to(self.device)

        def model(xt, t):
            tick()
            return self.net(xt, t) if y is None else self.net(xt, t, y)

        return model

    def model(self, calls):
        """The network as (xt, t) -> eps, told no class, so that what x_t itself decides is seen."""
        model = self.network(calls)
        return improved.eps_only(model) if learned(self.ckpt) else model

    def seeds(self, n):
        return range(self.cfg.seed, self.cfg.seed + n)

    def generators(self, n):
        """One for each of n images, as in sample.py and evaluate.py."""
        return [torch.Generator().manual_seed(seed) for seed in self.seeds(n)]

    def noise(self, n):
        """n images of noise."""
        return ddpm.noise_like(self.x0[:1].expand(n, -1, -1, -1), self.generators(n))

    def spread(self, n):
        """n labels, spread over the classes; None if there are none."""
        K = len(self.ckpt["classes"])
        return [(2 * i + 1) * K // (2 * n) for i in range(n)] if K else None

    def sample(self, n, tick, **how):
        """n images, as sample.py draws them, of labels spread over the classes: uint8 (n, H, W, C)."""
        return to_uint8(sampling.sample(self.net, self.d, self.ckpt["shape"], self.seeds(n), self.spread(n),
                                        clip=self.clip, on_step=tick, **how))  # fmt: skip

    @cached_property
    def bound(self):
        """bound_and_error of held-out images, for both fixed variances and the learned one, if any."""
        n, d = self.cfg.n or 16, self.d
        x0, y = self.x0[:n], None if self.labels is None else self.labels[:n]
        terms = improved.bound_terms if learned(self.ckpt) else ddpm.bound_terms
        return bound_and_error(
            terms, self.network(d.T, y), d, x0, self.generators(len(x0)), self.clip
        )


def ticker(calls):
    """To be called after each of so many calls of a network: a line of progress, gone after the last."""
    progress, done = Progress("drawing", calls, "steps"), itertools.count(1)

    def tick(*_):
        progress(at := next(done))
        if at == calls:
            progress.close()

    return tick


def times(T):
    """The steps that a row of pictures shows: T, 0 and nine evenly between; fewer, if T is small."""
    return sorted({round(T * tenth / 10) for tenth in range(11)}, reverse=True)


# --- 1. No network -------------------------------------------------------------------------------


def dissolved(x0, d, at, eps):
    """eq. 4: x_t of x0 (1, C, H, W) at each step of `at`, by the same noise eps: (len(at), C, H, W)."""
    many = len(at), -1, -1, -1
    return d.q_sample(x0.expand(many), torch.tensor(at), eps.expand(many))


def forward(scene):
    """An image dissolves in noise along t: by the linear schedule above, by the cosine one below.

    Look at the right half. The linear schedule has nothing left of the image at t = 600, and the steps
    after it teach a network little; the cosine schedule spends them on an image that can be made out.
    """
    at = times(1000)[::-1]
    rows = [to_uint8(dissolved(scene.x0[:1], ddpm.Diffusion(beta), at, scene.noise(1)))
            for beta in (ddpm.linear_schedule(), ddpm.cosine_schedule())]  # fmt: skip
    return sheet(rows, [f"t = {t}" for t in at], ["linear", "cosine"])


def schedules(scene):
    """Three schedules: the noise of a step, what is left of the image, and signal to noise.

    Look at the middle: alpha_bar_t is the image's share of the variance of x_t. The linear schedule has
    spent it at t = 600, the cosine one falls evenly. On the right: the ratio falls by eight powers of
    ten or more. The cosine schedule leaves the least of an image, but only in its last few steps.
    """
    t, x = np.arange(1, 1001), Axis("step t", 0, 1000)
    each = {"linear": ddpm.linear_schedule(), "cosine": ddpm.cosine_schedule(),
            "exponential": ddpm.exponential_schedule()}  # fmt: skip
    beta = {name: (t, table[1:].numpy()) for name, table in each.items()}
    left = {name: (t, ddpm.Diffusion(table).alpha_bar[1:].numpy()) for name, table in each.items()}
    ratio = {name: (t, share / (1 - share)) for name, (_, share) in left.items()}
    charts = [
        (beta, Axis("beta_t", 1e-5, 1, log=True), "Noise that a step adds"),
        (left, Axis("alpha_bar_t", 0, 1), "What is left of the image"),
        (ratio, Axis("alpha_bar_t / (1 - alpha_bar_t)", 1e-9, 1e6, log=True), "Signal to noise"),
    ]
    return joined([lines(x, y, series, title, (276, 290)) for series, y, title in charts])


def similarity(e):
    """The cosine of the angle between each two rows of e (N, D): (N, N)."""
    e = e / e.norm(dim=1, keepdim=True)
    return e @ e.T


def embedding(scene):
    """The sinusoids by which the network is told t, and how similar they are for two steps t and t'.

    Look at one row on the left: the fast channels of the sines and of the cosines tell it from the next
    row, the slow ones tell early from late. On the right, the dark diagonal: near steps look alike to
    the network, so that what it learns at one step serves the next.
    """
    t, y = torch.arange(1, 1001), Axis("step t", 0, 1000)
    e = ddpm.timestep_embedding(t - 1, 128)
    channel = Axis("channel: 0 to 63 sines, 64 to 127 cosines", 0, 128)
    left = heat(channel, y, e, "Embedding of t", (400, 390))
    right = heat(
        Axis("step t'", 0, 1000), y, similarity(e), "Similarity of t and t'", (400, 390), low=0
    )
    return joined([left, right])


# --- 2. A run ------------------------------------------------------------------------------------


def epochs(scene):
    """A network learns: images of the same seeds, as it drew them after each epoch, or every few.

    Look down a column, below the class that was asked for, if any. A row is from a grid that train.py wrote
    beside the checkpoint: its first images, column by column, ten at most.
    """
    rows, ((tall, wide), _), classes = [], cell(*scene.ckpt["shape"][1:]), scene.ckpt["classes"]
    grids = outputs.grids(scene.cfg.ckpt)
    for path in grids.values():
        grid = np.asarray(Image.open(path).convert("RGB"))
        places = itertools.product(range(2, grid.shape[1] - 2, wide), range(2, len(grid) - 2, tall))
        rows.append(
            [grid[top : top + tall - 2, left : left + wide - 2] for left, top in places][:10]
        )
    asked = (
        [classes[y] for y in sampling.class_labels(classes)[0][: len(rows[0])]] if classes else []
    )
    return sheet(rows, asked, [f"epoch {epoch}" for epoch in grids], scale=1)


def loss(scene):
    """The loss along a run, on a log scale: of the images trained on and, where logged, of held-out ones.

    Look at the gap. Where the training loss falls and the held-out one rises, images are learnt by
    heart. A loss that hardly falls any more is no reason to stop: samples still get better.
    """
    curves = {}
    for name, key in (("training", "loss"), ("held out", "held_out")):
        if points := [
            (line["epoch"], line[key]) for line in scene.log if line.get(key) is not None
        ]:
            curves[name] = np.array(points).T
    x = Axis("epochs", 0, max(epoch.max() for epoch, _ in curves.values()))
    y = span("mean squared error of eps", [value for _, value in curves.values()], log=True)
    return lines(x, y, curves, "Loss", (560, 360))


def read_log(path):
    """The lines of a log as dictionaries."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe may have no writer, or no end
        raise Failure(f"--log {path}: is not an ordinary file")
    with open(path, errors="replace") as file:
        text = file.read()
    try:
        log = [json.loads(line) for line in text.splitlines()]
        numbers = [line.get(key) for line in log for key in ("epoch", "loss", "held_out")]
        whole = all(0 < line["epoch"] and 0 < line["loss"] for line in log) and bool(log)
        whole = whole and all(0 < number < 1e12 for number in numbers if number is not None)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise Failure(f"--log {path}: not a log of train.py")
    return log


# --- 3. Sampling ---------------------------------------------------------------------------------


def walk(model, d, xT, at, generator, clip=True, steps=100):
    """From xT (B, ...) to x_0 by DDIM with eta = 1: {t: (x_t, the x0 that its eps implies, eq. 15)}.

    t in `at`, of which 0 is one: there x0 is x_0. Between them it takes about so many even steps.
    """
    grid, path = sorted({*ddpm.ddim_grid(d.T, min(steps, d.T)), *at} - {0}), {}

    def watched(xt, t):
        eps = model(xt, t)
        path[int(t[0])] = xt, d.x0_from_eps(xt, t.cpu(), eps).clamp(-1, 1)
        return eps

    x0 = ddpm.sample_ddim(watched, d, xT, grid, 1.0, clip, generator)
    return {t: path[t] if t else (x0, x0) for t in at}


def reverse(scene):
    """From noise to an image: x_t, and below it the x0 that the network sees in it (DDPM fig. 6).

    Look at each second row. The network's first guess is a blur, the mean of all images that x_t may
    become; then the shape is settled, and last the edges. At t = T there is none (grey): x_t holds no
    image, and eq. 15 divides by almost 0.
    """
    d, n, at = scene.d, scene.cfg.n or 3, times(scene.d.T)
    calls = len({*ddpm.ddim_grid(d.T, min(100, d.T)), *at} - {0})
    path = walk(scene.model(calls), d, scene.noise(n), at, scene.generators(n), scene.clip)
    rows = []
    for i in range(n):
        rows.append([to_uint8(path[t][0])[i] for t in at])
        rows.append([to_uint8(path[t][1])[i] if d.alpha_bar[t] > 1e-4 else None for t in at])
    return sheet(rows, [f"t = {t}" for t in at], ["x_t", "predicted x0"] * n)


def decoded(model, d, xt, t, generator, clip=True, steps=50):
    """x_0 ~ p(x_0 | x_t) of xt (B, ...) at step t, by DDIM with eta = 1 and at most so many steps."""
    return ddpm.sample_ddim(model, d, xt, ddpm.ddim_grid(t, min(t, steps)), 1.0, clip, generator)


def shared(scene):
    """Several images from one noisy x_t: what they share is what x_t has decided (DDPM fig. 7).

    Look along a row; its samples differ only by the noise of the steps from t down to 0. From t = T all
    is open. The smaller t, the more is settled: first the rough shape, then the character, then its edges.
    """
    d, n, x0, rows = scene.d, scene.cfg.n or 8, scene.x0[:1], []
    at = sorted({max(1, d.T * quarter // 4) for quarter in (1, 2, 3, 4)}, reverse=True)
    model = scene.model(sum(min(t, 50) for t in at))
    for t in at:
        xt = d.q_sample(x0, t, scene.noise(1))
        samples = decoded(model, d, xt.expand(n, -1, -1, -1), t, scene.generators(n), scene.clip)
        rows.append(to_uint8(torch.cat([x0, xt, samples])))
    title = "Samples of one x_t: only the noise of the steps from t down to 0 differs"
    above = ["image", "x_t", *(f"sample {i + 1}" for i in range(n))]
    return sheet(rows, above, [f"t = {t}" for t in at], title)


def interpolated(model, d, pair, t, shares, eps, generator, clip=True):
    """DDPM sec. 4.3: x_0 ~ p(x_0 | (1 - share) x_t + share x'_t) for each share: (len(shares), C, H, W).

    x_t and x'_t are q_samples of the two images of pair (2, C, H, W), with noise eps of that shape.
    """
    xt, other = d.q_sample(pair, t, eps).split(1)
    share = torch.tensor(shares, dtype=xt.dtype, device=xt.device).reshape(-1, 1, 1, 1)
    return decoded(model, d, (1 - share) * xt + share * other, t, generator, clip)


def interpolation(scene):
    """Two images, mixed when both are noised to step t, and the mixture denoised (DDPM fig. 8 and 9).

    Look at a row's ends first: at 0% and 100% nothing is mixed, and a small t gives the images back. A
    small t also lays one image over the other; a larger one makes a whole image of the mixture; at t = T
    any image can come, whichever two were mixed.
    """
    d, shares, rows = scene.d, [eighth / 8 for eighth in range(9)], []
    at = sorted({max(1, d.T * eighth // 8) for eighth in (1, 2, 4, 5, 6, 8)})
    labels = [0] if scene.labels is None else scene.labels.tolist()
    second = next((i for i, y in enumerate(labels) if y != labels[0]), len(scene.x0) - 1)
    pair, model = scene.x0[[0, second]], scene.model(sum(min(t, 50) for t in at))
    for t in at:
        same = [
            torch.Generator().manual_seed(scene.cfg.seed) for _ in shares
        ]  # only the share differs
        mixtures = interpolated(model, d, pair, t, shares, scene.noise(2), same, scene.clip)
        rows.append(to_uint8(torch.cat([pair[:1], mixtures, pair[1:]])))
    title = "Mixtures of two x_t: all columns share the noise, only the share of the other differs"
    above = ["one", *(f"{100 * share:g}%" for share in shares), "other"]
    return sheet(rows, above, [f"t = {t}" for t in at], title)


def steps(scene):
    """The same seeds in 5 to T steps: by DDIM without noise, with it, and by ancestral sampling.

    Look along a row. Without noise (eta 0), few steps draw what many draw, less sharply. With noise (eta
    1), many steps draw the better images; with sigma^2 = beta, few steps leave noise in them.
    """
    T, n = scene.d.T, scene.cfg.n or 4
    counts = sorted({min(k, T) for k in (5, 10, 20, 50, 100, T)})
    ways = {"DDIM, eta 0": dict(eta=0.0), "DDIM, eta 1": dict(eta=1.0),
            "ancestral, beta": dict(variance="beta")}  # fmt: skip
    if learned(scene.ckpt):
        ways["ancestral, learned"] = dict(variance="learned")
    tick = ticker(len(ways) * sum(counts))
    rows = [[tiled(scene.sample(n, tick, steps=k, **way)) for k in counts] for way in ways.values()]
    return sheet(rows, [f"{k} steps" for k in counts], list(ways), gap=8)


def tiled(images, columns=2):
    """uint8 (N, H, W, C) as one, enlarged to 48 pixels or more each, with white lines between them."""
    scale = max(1, 48 // max(images.shape[1:3]))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    images = np.pad(
        images, [(0, -len(images) % columns), (0, 2), (0, 2), (0, 0)], constant_values=255
    )
    rows = images.reshape(-1, columns, *images.shape[1:])
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows])


def guidance(scene):
    """The same seeds at five strengths w of classifier-free guidance; w = -1 is told no class.

    Look down a column: at w = 0 the class is there; with w it gets clearer, bolder, and more like every
    other image of its class. That is the price.
    """
    classes, strengths, k = scene.ckpt["classes"], [-1, 0, 1, 2, 4], min(50, scene.d.T)
    n = min(scene.cfg.n or 10, len(classes))
    tick = ticker(k * len(strengths))
    rows = [scene.sample(n, tick, steps=k, eta=1.0, guidance=w) for w in strengths]
    return sheet(
        rows,
        [classes[y] for y in scene.spread(n)],
        [f"w = {w}{' (no class)' * (w == -1)}" for w in strengths],
    )


# --- 4. The bound --------------------------------------------------------------------------------


def bound_and_error(bound_terms, model, d, x0, generator, clip=True):
    """bound_terms of x0 for both fixed variances (and those that model learned), (2 or 3, B, T + 1); and the
    mean square of x0 less the x0 that the model sees in x_1, .., x_T, (T,): both by the same draws of x_t.
    """
    error = torch.empty(d.T, dtype=torch.float64)

    def watched(xt, t):
        out, t = model(xt, t), t.cpu()
        seen = d.x0_from_eps(xt, t, out[:, : x0.shape[1]]).clamp(-1, 1)
        error[t[0] - 1] = (seen - x0).square().mean().cpu()
        return out

    return bound_terms(watched, d, x0, [d.beta, d.beta_tilde], clip, generator), error


def rate_and_distortion(terms, error):
    """DDPM sec. 4.3: bits/dim that x_T, .., x_t cost, (K, T), and RMSE of 0..255, (T,), for t = 1..T.

    terms (K, T + 1), error (T,). x_T costs L_T, and each x_t after it L_t (Algorithms 3 and 4).
    """
    return terms.flip(1).cumsum(1).flip(1)[:, 1:], 127.5 * error.sqrt()


def rate(scene):
    """How well an image is known after so many bits, as x_T, .., x_1 are sent one by one (DDPM fig. 5).

    Look at how the curve begins: the first tenth of the bits removes most of the error. All the others
    describe what the eye hardly notices, which makes a good lossy compressor. The paper's quantities; the
    error is on a log scale, since on the paper's linear one the curve follows the axes.
    """
    terms, error = scene.bound
    bits, rmse = rate_and_distortion(terms.mean(1), error)
    x, y = span("rate, bits/dim", [[0], bits]), span("distortion, RMSE on 0..255", [rmse], log=True)
    curves = {f"{name}: {row[0]:.2f} bits/dim": (row, rmse) for name, row in zip(VARIANCES, bits)}
    return lines(x, y, curves, "Distortion against rate", (620, 380), wide=1)


def terms(scene):
    """What each step costs: the terms L_{t-1} of the bound, L_0 first, averaged over held-out images.

    Look at the left ends: the last steps of sampling, in which nothing seems to change, cost most of the
    bits. There the choice of sigma^2 matters, as their ratio to those of beta_tilde shows; at large t, all
    do the same. Beside the names: the whole bound, L_T included.
    """
    mean, t = scene.bound[0].mean(1), np.arange(1, scene.d.T + 1)
    cost, x = mean[:, :-1].numpy(), Axis("step t", 1, max(2, scene.d.T), log=True)
    ratio, sums = cost / cost[1], [f"{name}: {row.sum():.3f}" for name, row in zip(VARIANCES, mean)]
    left = lines(x, span("L_{t-1}, bits/dim", cost, log=True), {n: (t, v) for n, v in zip(VARIANCES, cost)},
                 "Terms of the bound", (430, 380), wide=1)  # fmt: skip
    right = lines(x, span("ratio", ratio), {n: (t, v) for n, v in zip(sums, ratio)},
                  "Their ratio to beta_tilde's, and sums in bits/dim", (450, 380))  # fmt: skip
    return joined([left, right])


VARIANCES = ["sigma^2 = beta", "beta_tilde", "learned"]  # the rows of Scene.bound
FIGURES = {f.__name__: f for f in (forward, schedules, embedding, epochs, loss, reverse, shared,
                                   interpolation, steps, guidance, rate, terms)}  # fmt: skip


if __name__ == "__main__":
    run(main, Config, __doc__)

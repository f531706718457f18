"""Trains a DDPM on built-in glyphs, on CIFAR-10, or on a folder of images.

    python train.py --epochs 5                           glyphs: nothing to download, no GPU needed
    python train.py --data cifar10 --epochs 100          the paper's network and settings
    python train.py --data path/to/images --size 64      anyone's images; --labels: its subfolders are classes
    python train.py --resume ckpt.pt                     goes on, bit for bit, where it stopped
    torchrun --standalone --nproc-per-node 4 -- train.py --data cifar10    several GPUs, the same batches
"""

import concurrent.futures
import contextlib
import copy
import functools
import hashlib
import http.client
import json
import math
import os
import pathlib
import shlex
import signal
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import warnings
import zlib
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

import ddpm
import improved
import sample
from sample import Failure, Progress, UsageError, duration, flag, printable, replacing

# What suits each kind of data: the paper's settings (App. B), and a small network's for the glyphs.
PAPER = dict(batch_size=128, lr=2e-4, warmup=5000, decay="none", ema=0.9999, dropout=0.1,
             flip="yes", schedule="linear", width=128, labels=False)
RECIPES = {
    "glyphs": dict(batch_size=32, lr=4e-3, warmup=20, decay="cosine", ema=0.999, dropout=0.0,
                   flip="no", schedule="cosine", width=24, labels=True),
    "cifar10": PAPER,
    "folder": PAPER,
}


def own(name, text, **limits):
    """A flag whose default is the data's own."""
    glyphs, paper = RECIPES["glyphs"][name], PAPER[name]
    return flag(None, f"{text} (default: {paper}; glyphs: {glyphs})", **limits)


@dataclass(frozen=True)
class Config:
    data: str = flag("glyphs", "glyphs: built in; cifar10: found in or downloaded to --data-dir; "
                               "or a folder of images, read recursively")
    data_dir: str = flag("data", "where cifar10 is or goes, and the cache of image folders")
    size: str | None = flag(None, "of a folder's images, cropped to S or HxW (default: 32)")
    channels: int | None = flag(None, "of a folder's images: 3 colour, 1 grey (default: 3)",
                                choices=(1, 3))
    skip_broken: bool = flag(False, "leave out a folder's files that are no images")
    labels: bool | None = flag(None, "learn classes too: cifar10's, or the folders right in --data; a tenth "
                                     "of them is dropped, for sample.py --guidance (glyphs: always)")
    limit: int | None = flag(None, "train on the first so many images only", low=1)
    epochs: int = flag(100, "passes over the data, in all", low=1)
    batch_size: int | None = own("batch_size", "images a step, over all processes", low=1)
    lr: float | None = own("lr", "Adam's learning rate", low=0)
    warmup: int | None = own("warmup", "steps in which it rises from 0", low=0)
    decay: str | None = own("decay", "how it falls to 0 over the run", choices=("none", "cosine"))
    ema: float | None = own("ema", "decay of the moving average of the weights; at update n, "
                                   "(1 + n) / (10 + n) if less", low=0, high=1)
    dropout: float | None = own("dropout", "in the residual blocks", low=0, high=0.999)
    flip: str | None = own("flip", "mirror images at random", choices=("yes", "no"))
    schedule: str | None = own("schedule", "of the noise", choices=tuple(sample.SCHEDULES))
    variance: str = flag("fixed", "learned: the network learns sigma^2 too (improved.py)",
                         choices=("fixed", "learned"))
    timesteps: int = flag(1000, "T, the steps of the diffusion", low=1, high=10**6)
    width: int | None = own("width", "channels at full resolution", low=4, high=8192)
    seed: int = flag(0, "of the weights and of all that is drawn", low=0, high=2**31)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps, ..")
    precision: str = flag("auto", "auto: bf16 where it is faster", choices=("auto", "fp32", "bf16"))
    compile: bool = flag(False, "torch.compile the network: slow to start, faster on a GPU")
    out: str = flag("ckpt.pt", "checkpoint to write; sample grids go beside it")
    resume: str | None = flag(None, "checkpoint to go on from, with its settings; it is also --out")
    sample_every: int | None = flag(None, "epochs between sample grids, 0 for none "
                                          "(default: a tenth of --epochs)", low=0)
    deterministic: bool = flag(False, "on a GPU: no kernel whose sums vary, so that a resumed run is exact")
    log: str | None = flag(None, "append a JSON line per progress report to this file")


def main(cfg, given):
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    saved = sample.load_checkpoint(cfg.resume) if cfg.resume else None
    with sample.refusing(cfg.resume):
        cfg = resumed(cfg, given, saved) if saved else with_recipe(cfg)
    if cfg.batch_size % world:
        raise UsageError(f"--batch-size {cfg.batch_size} cannot be shared evenly by {world} processes")
    if kind(cfg.data) == "folder":  # refused before the folder is read, not after
        network_for(cfg, (cfg.channels, *parse_size(cfg.size)), 0)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    several = world > 1 and torch.cuda.is_available() and cfg.device in ("auto", "cuda")
    device = sample.pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if several else cfg.device)
    cuda, bf16 = device.type == "cuda", sample.use_precision(cfg.precision, device)
    if bf16 and cfg.compile and device.type == "cpu":  # seen by benchmarks/curves.py, with torch 2.13.0
        raise UsageError("--compile: on a CPU, torch loses gradients of a compiled network in bf16; leave it "
                         "out, or give --precision fp32")
    sample.writable(cfg.out)
    above = pathlib.Path(cfg.out).resolve().parents
    if kind(cfg.data) == "folder" and pathlib.Path(cfg.data).resolve() in above:
        raise UsageError(f"--out {cfg.out}: is inside --data, and would be taken for one of its images")
    if cfg.log:
        if os.path.realpath(cfg.log) in map(os.path.realpath, (cfg.out, cfg.resume or cfg.out)):
            raise UsageError(f"--log {cfg.log}: is the checkpoint; name another file")
        if os.path.isfile(cfg.log):
            with open(cfg.log, "rb") as file:
                if file.read(1) not in (b"", b"{"):
                    raise Failure(f"--log {cfg.log}: exists, and is not a log of train.py; name another file")
    if os.path.exists(cfg.out) and rank == 0 and not (saved and os.path.samefile(cfg.out, cfg.resume)):
        print(f"note: {cfg.out} exists and will be replaced; --resume goes on with it", file=sys.stderr)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=6),
                                device_id=device if cuda else None)
        if rank > 0:
            dist.barrier()  # the first process downloads and decodes, the others read its files
    images, labels, classes = load_data(cfg, train=True)
    if world > 1 and rank == 0:
        dist.barrier()
    shape, N, B = tuple(images.shape[1:]), len(images), cfg.batch_size

    torch.manual_seed(mixed(cfg.seed, 0))
    network = saved["network"] if saved else network_for(cfg, shape, len(classes))
    images_print = fingerprint(images, labels)
    if saved and saved["classes"] != classes:
        raise Failure(f"{cfg.data}: its classes are not those with which this run began")
    if saved and saved["images"] != N:
        raise Failure(f"{cfg.data}: {N:,} images, but {saved['images']:,} when this run began")
    if saved and saved["fingerprint"] != images_print:
        raise Failure(f"{cfg.data}: not the images, or not in the order, with which this run began")
    with sample.refusing(cfg.resume):
        net, d = ddpm.UNet(**network), sample.make_diffusion(cfg.schedule, cfg.timesteps)
    net = net.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    params = list(net.parameters())
    optimizer = torch.optim.Adam(params, cfg.lr, fused=device.type in ("cuda", "cpu", "mps"))
    step = 0
    if saved:
        with sample.refusing(cfg.resume):
            net.load_state_dict(saved["model"])
            ema.load_state_dict(saved["ema"])
            optimizer.load_state_dict(saved["optimizer"])
            assert len(optimizer.state) == len(params)
            step = saved["step"]
    steps = math.ceil(cfg.epochs * N / B)
    if step >= steps:
        raise UsageError(f"{cfg.resume} has done {step * B / N:g} of {cfg.epochs} epochs; ask for more "
                         f"with --epochs")
    if cfg.log:
        open(cfg.log, "a").close()  # if it cannot be written, this is the time to say so
    model = torch.compile(net) if cfg.compile else net
    if world > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    if cuda and images.nbytes < 0.25 * torch.cuda.mem_get_info(device)[0]:
        images = images.to(device)
    if rank == 0:
        describe(cfg, shape, N, classes, params, d, device, bf16, step, steps)

    def batch(step):
        """x0, labels, t and eps of a step: functions of seed and step alone, whatever the world."""
        torch.manual_seed(mixed(cfg.seed, 1, step))
        mine = slice(rank * B // world, (rank + 1) * B // world)
        i, y = places(step, B, N, cfg.seed), None
        x0 = images[i[mine].to(images.device, non_blocking=cuda)].to(device, non_blocking=cuda)
        x0 = x0.float() / 127.5 - 1
        if labels is not None:
            y = improved.drop_labels(labels[i], len(classes))[mine].to(device, non_blocking=cuda)
        if cfg.flip == "yes":
            mirror = (torch.rand(B) < 0.5)[mine].to(device, non_blocking=cuda)
            x0 = torch.where(mirror[:, None, None, None], x0.flip(3), x0)
        t = torch.randint(1, d.T + 1, (B,))[mine]
        eps = torch.randn(B, *shape, device=device)[mine]
        if world > 1:  # other dropout masks for other images
            torch.manual_seed(mixed(cfg.seed, 3, step, rank))
        return x0.contiguous(memory_format=torch.channels_last), y, t, eps

    def check(at, *numbers):
        """Stops the run, at the first step where something is not finite, before that is saved."""
        for what, number in zip(("loss", "gradient", "weights", "moving average"), numbers, strict=False):
            if not math.isfinite(number):
                raise Failure(
                    f"step {at}: the {what}: {number}; a lower --lr or a longer --warmup may help. "
                    f"Nothing of it is saved; if {cfg.out} was saved before, --resume goes on from there")

    def save():
        check(step, 0, 0, *(float(sum(p.detach().sum() for p in n.parameters())) for n in (net, ema)))
        if rank == 0:
            sample.save_checkpoint(cfg.out, dict(
                config=asdict(cfg), network=network, shape=shape, classes=classes, images=N,
                fingerprint=images_print, step=step, model=net.state_dict(), ema=ema.state_dict(),
                optimizer=optimizer.state_dict()))

    def draw_grid(epoch):
        if rank == 0:
            y, rows = sample.class_labels(classes)
            how = dict(variance="learned") if cfg.variance == "learned" else dict(eta=1.0)
            parts = [slice(i, i + B) for i in range(0, len(y), B)]  # no more at a time than training takes
            x0 = torch.cat([sample.sample(ema, d, shape, range(len(y))[part], y[part] if classes else None,
                                          min(50, d.T), **how) for part in parts])  # fmt: skip
            path = pathlib.Path(cfg.out).with_suffix(f".{epoch:04d}.png")
            with replacing(path) as file:
                sample.grid(sample.to_uint8(x0), rows).save(file, "PNG")

    stop = []
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the last: the terminal was closed
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # as under nohup
            signal.signal(signum, lambda number, frame: interrupt(stop, number))
    progress = Progress("training", steps, "steps", step) if rank == 0 else None
    every = cfg.epochs // 10 or 1 if cfg.sample_every is None else cfg.sample_every
    losses, since = torch.zeros(2, device=device), (step, time.monotonic())
    seen, saved_at, epoch_began = torch.zeros(2), time.monotonic(), time.monotonic()
    first_bad = torch.zeros(3, device=device)  # step, loss and gradient's norm, where one is not finite
    objective = improved.loss_hybrid if cfg.variance == "learned" else ddpm.loss_simple
    model.train()
    while step < steps:
        lr, x0_y_t_eps = rate(cfg, step, steps), batch(step)
        step += 1
        decay = min(cfg.ema, (1 + step) / (10 + step))
        loss, norm = update(model, d, x0_y_t_eps, optimizer, lr, ema, decay, bf16, objective)
        losses += torch.stack([loss, torch.ones_like(loss)])
        state = torch.stack([torch.full_like(norm, step), loss, norm])
        first_bad = torch.where((first_bad[0] == 0) & ~state.isfinite().all(), state, first_bad)

        # Nothing above waits for the device; reading the loss does, so it is read now and then.
        epoch, epoch_ends = step * B // N, step * B // N > (step - 1) * B // N or step == steps
        now = time.monotonic()
        soon = stop or now - since[1] > 5 if world == 1 else step % 10 == 0  # all processes must agree
        if not (epoch_ends or soon or step % 50 == 0):
            continue
        if world > 1:
            everyone = torch.cat([losses, torch.tensor([float(len(stop))], device=device)])
            dist.all_reduce(everyone)
            losses, stop = everyone[:2], stop or [signal.SIGTERM] * int(everyone[2] > 0)
        if first_bad[0]:
            check(int(first_bad[0]), *first_bad[1:].tolist())
        mean, seen = (losses[0] / losses[1]).item(), seen + losses.cpu()
        now, speed = time.monotonic(), (step - since[0]) * B / (time.monotonic() - since[1])
        losses, since = torch.zeros_like(losses), (step, now)
        if rank == 0:
            progress(step, f"epoch {min(epoch + 1, cfg.epochs)} of {cfg.epochs}  loss {mean:.4f}")
            if cfg.log:
                with open(cfg.log, "a") as file:
                    print(json.dumps(dict(step=step, epoch=step * B / N, loss=mean, images_per_s=speed,
                                          lr=rate(cfg, step - 1, steps))), file=file)
        if epoch_ends and rank == 0:
            progress.close()
            say(f"epoch {min(epoch, cfg.epochs)} of {cfg.epochs}: loss {seen[0] / seen[1]:.4f}, "
                f"{duration(now - epoch_began)}")
            seen, epoch_began = torch.zeros(2), now
        grid_due = every and (epoch // every > (step - 1) * B // N // every or step == steps)
        if stop or grid_due or step == steps or now - saved_at > 600:
            save()
            saved_at = now
        if stop and step < steps:
            if rank == 0:
                progress.close()
                say(f"stopped at step {step} of {steps}; go on with --resume {shlex.quote(cfg.out)}")
            if world > 1:
                dist.barrier()  # torchrun ends all when one has ended: the first must have saved
            sys.exit(128 + stop[0])
        if grid_due:
            draw_grid(epoch)
    if rank == 0:
        print(f"{cfg.out}: {steps} steps done; now: python sample.py --ckpt {shlex.quote(cfg.out)} "
              f"--out grid.png")
    if world > 1:
        dist.destroy_process_group()


def update(model, d, batch, optimizer, lr, ema, decay, bf16=False, objective=ddpm.loss_simple):
    """One step of training, Algorithm 1, that never waits for the device: (loss, norm of its gradient)."""
    x0, y, t, eps = batch
    params = optimizer.param_groups[0]["params"]
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=bf16):
        loss = objective(lambda xt, t: model(xt, t, y), d, x0, t, eps)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():  # or the graph of every step so far would stay in memory
        torch._foreach_lerp_(list(ema.parameters()), params, 1 - decay)
    return loss.detach(), norm


def say(line):
    """Prints it, or not, if there is nowhere to print to any more: no reason to lose the run."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def interrupt(stop, number):
    """The first signal ends the run after the step, with a checkpoint; a second Ctrl-C, at once."""
    stop.append(number)
    if number == signal.SIGINT and len(stop) > 1:
        raise KeyboardInterrupt


# --- Settings ------------------------------------------------------------------------------------


def kind(data):
    return data if data in RECIPES and data != "folder" else "folder"


def with_recipe(cfg):
    """cfg, with the data's own settings where none were given."""
    if kind(cfg.data) != "folder":
        for name in ("size", "channels"):
            if getattr(cfg, name) is not None:
                raise UsageError(f"--{name} is for a folder of images; {cfg.data} has its own")
    recipe = RECIPES[kind(cfg.data)]
    if kind(cfg.data) == "folder":
        cfg, recipe = replace(cfg, data=os.path.abspath(cfg.data)), dict(recipe, size="32", channels=3)
    return replace(cfg, **{k: v for k, v in recipe.items() if getattr(cfg, k) is None})


def resumed(cfg, given, saved):
    """The saved run's settings, changed by the flags given now, where a run can change."""
    if kind(cfg.data) == "folder":
        cfg = replace(cfg, data=os.path.abspath(cfg.data))
    for name in ("data", "size", "channels", "labels", "limit", "seed", "batch_size", "schedule",
                 "variance", "timesteps", "width", "dropout"):
        if name in given and getattr(cfg, name) != saved["config"][name]:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: the run to resume has "
                             f"{saved['config'][name]}, and cannot change it")
    settings = settings_of(saved)
    settings.update({k: getattr(cfg, k) for k in given}, resume=cfg.resume)
    if "out" not in given:
        settings["out"] = cfg.resume
    return Config(**settings)


def settings_of(saved):
    """A checkpoint's settings, those that this program knows; each as the command line could have set it."""
    assert {"data", "seed", "timesteps", *PAPER} <= set(saved["config"])
    known = {f.name: saved["config"][f.name] for f in fields(Config) if f.name in saved["config"]}
    for f in fields(Config):
        about, value = f.metadata, known.get(f.name)
        assert f.name not in known or isinstance(value, f.type), f.name
        assert value is None or about["choices"] is None or value in about["choices"], f.name
        assert value is None or sample.inside(value, about["low"], about["high"]), f.name
    return known


def network_for(cfg, shape, classes):
    """The arguments of UNet for images (C, H, W): the paper's networks; a small one for glyphs."""
    C, H, W = shape
    side = max(H, W)
    if cfg.data == "glyphs":
        mult, blocks = (1, 2, 2), 1
    else:  # the paper's for 32x32 and for 256x256, and the shorter of the latter in between
        mult, blocks = (1, 2, 2, 2) if side <= 64 else (1, 1, 2, 2, 4, 4)[: 5 + (side > 128)], 2
    factor = 2 ** (len(mult) - 1)
    if H % factor or W % factor:
        down, up = f"{H // factor * factor}x{W // factor * factor}", \
            f"{-(-H // factor) * factor}x{-(-W // factor) * factor}"
        raise UsageError(f"--size {H}x{W}: the network needs multiples of {factor}; "
                         f"try {down if min(H, W) >= factor else up} or {up}")
    if cfg.width % 4:
        raise UsageError(f"--width {cfg.width}: must be a multiple of 4")
    sixteen = min(len(mult) - 1, max(0, math.ceil(math.log2(side / 16))))  # the level of 16x16
    attention = (1,) if cfg.data == "glyphs" else (sixteen,)
    return dict(in_channels=C, out_channels=2 * C if cfg.variance == "learned" else C, ch=cfg.width,
                mult=mult, blocks=blocks, attention=attention, dropout=cfg.dropout,
                groups=math.gcd(32, cfg.width), num_classes=classes or None)


def rate(cfg, step, steps):
    """The learning rate of a step."""
    warm = min(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
    return cfg.lr * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps) if cfg.decay == "cosine" else 1)


def describe(cfg, shape, N, classes, params, d, device, bf16, step, steps):
    C, H, W = shape
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{cfg.data}: {N:,} images, {H}x{W}x{C}" + (f", {len(classes)} classes" if classes else ""))
    print(f"UNet with {sum(p.numel() for p in params):,} parameters on {name}, "
          f"{'bf16' if bf16 else 'fp32'}; {cfg.schedule} schedule, T = {d.T}, variance {cfg.variance}")
    print(f"batch {cfg.batch_size}, lr {cfg.lr:g}, warm-up {cfg.warmup}, decay {cfg.decay}, "
          f"ema {cfg.ema:g}, dropout {cfg.dropout:g}, flip {cfg.flip}, seed {cfg.seed}")
    print(f"{cfg.epochs} epochs, {steps:,} steps" + (f", from step {step:,}" if step else ""), flush=True)
    if d.alpha_bar[-1] > 0.01:
        print(f"note: alpha_bar_T = {d.alpha_bar[-1]:.2g}, so x_T is not yet noise and samples will be "
              f"poor; a longer --timesteps or --schedule cosine helps", file=sys.stderr)


# --- Data: uint8 (N, C, H, W), labels (N,) or None, names of the classes -------------------------


def load_data(cfg, train):
    """The training images of cfg.data, or the ones held out (a folder holds none out: all)."""
    if cfg.data == "glyphs":
        n = 6_000 if train else 2_000
        images, labels = draw_glyphs(min(n, cfg.limit or n), seed=0 if train else 1)
        images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        return images, torch.from_numpy(labels).long(), list(GLYPHS)
    if cfg.data == "cifar10":
        images, labels = load_cifar10(cfg.data_dir, train)
        classes = CIFAR10_CLASSES
    else:
        images, files = load_folder(cfg.data, parse_size(cfg.size), cfg.channels, cfg.data_dir,
                                    cfg.skip_broken, cfg.labels)
        labels, classes = folder_labels(cfg.data, files) if cfg.labels else (None, [])
    images = torch.from_numpy(images)[: cfg.limit]
    if not cfg.labels:
        return images, None, []
    return images, torch.from_numpy(labels)[: cfg.limit].long(), classes


GLYPHS = "0123456789"


def fingerprint(images, labels):
    """A checksum of the images, and of their labels: of ten thousand of them at most."""
    few = slice(None, None, -(-len(images) // 10_000))
    return zlib.crc32(b"" if labels is None else labels[few].numpy().tobytes(),
                      zlib.crc32(images[few].numpy().tobytes()))


def draw_glyphs(n, seed, side=16):
    """Digits in Pillow's own font, each of random place, size, slant and turn; seed decides all.

    Returns images (n, 16, 16, 1) uint8, white on black, and labels (n,) uint8: label k is GLYPHS[k].
    """
    rng, big = np.random.default_rng(seed), 4 * side  # drawn four times too large, averaged down
    font, masters = ImageFont.load_default(size=70), []
    for glyph in GLYPHS:
        masters.append(Image.new("L", (big, big)))
        pen = ImageDraw.Draw(masters[-1])
        left, top, right, bottom = pen.textbbox((0, 0), glyph, font, stroke_width=1)
        pen.text(((big - left - right) / 2, (big - top - bottom) / 2), glyph, 255, font, stroke_width=1)

    labels = rng.integers(len(GLYPHS), size=n, dtype=np.uint8)
    turn, slant = np.radians(rng.uniform(-12, 12, n)), rng.uniform(-0.1, 0.1, n)
    scale, shift = rng.uniform(0.85, 1.1, (2, n)), rng.uniform(-4, 4, (2, n))
    cos, sin = np.cos(turn), np.sin(turn)
    a, b, d, e = np.stack([cos, sin + slant, -sin, cos]) / scale[[0, 0, 1, 1]]
    c, f = big / 2 * (1 - np.array([a + b, d + e])) + shift  # the centre goes to the centre
    images = np.empty((n, side, side, 1), np.uint8)
    for i, matrix in enumerate(np.stack([a, b, c, d, e, f], axis=1)):
        turned = masters[labels[i]].transform((big, big), Image.AFFINE, matrix, Image.BILINEAR)
        images[i, :, :, 0] = turned.reduce(4)
    return images, labels


CIFAR10 = "cifar-10-batches-bin"
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # as published beside it
CIFAR10_BYTES = 10_000 * 3073  # of each file: a label and 3 x 32 x 32 pixels an image


def load_cifar10(data_dir, train):
    """CIFAR-10's binary version, found in data_dir or downloaded to it: uint8 (N, 3, 32, 32) and (N,)."""
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if train else ["test_batch.bin"]
    root = pathlib.Path(data_dir)
    folder = root if (root / names[0]).is_file() else root / CIFAR10
    if not folder.is_dir():
        unpack_cifar10(root)
    rows = []
    for name in names:
        raw = np.fromfile(folder / name, np.uint8)
        if len(raw) != CIFAR10_BYTES:
            raise Failure(f"{folder / name}: {len(raw):,} bytes, not {CIFAR10_BYTES:,}; damaged: "
                          f"delete {folder} and let it be downloaded again")
        rows.append(raw.reshape(-1, 3073))
    rows = np.concatenate(rows)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]


def unpack_cifar10(root):
    """Downloads the archive where it is missing, and unpacks the six files that are used."""
    archive = root / CIFAR10_URL.rsplit("/")[-1]
    root.mkdir(parents=True, exist_ok=True)
    if not archive.is_file():
        download(CIFAR10_URL, archive)
    with open(archive, "rb") as file:
        if hashlib.file_digest(file, "md5").hexdigest() != CIFAR10_MD5:
            raise Failure(f"{archive}: not the published file (its MD5 differs); delete it and try again")
    with tempfile.TemporaryDirectory(dir=root, prefix=".unpacking-") as partial, tarfile.open(archive) as tar:
        whole = pathlib.Path(partial) / CIFAR10
        whole.mkdir()
        for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
            (whole / name).write_bytes(tar.extractfile(f"{CIFAR10}/{name}").read())
        whole.rename(root / CIFAR10)


def download(url, path):
    try:
        with urllib.request.urlopen(url, timeout=30) as reply, replacing(path) as file:
            total, done = int(reply.headers["Content-Length"] or 170_052_171), 0
            progress = Progress(f"downloading {path.name}", total, "bytes")
            while chunk := reply.read(1 << 20):
                file.write(chunk)
                done += len(chunk)
                progress(done)
            progress.close()
            file.seek(0)
            if hashlib.file_digest(file, "md5").hexdigest() != CIFAR10_MD5:
                raise ConnectionError(f"{done:,} bytes came, which are not the published file")
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise Failure(
            f"cannot download CIFAR-10 ({getattr(error, 'reason', error)}): connect to a network; or put "
            f"{url} at {path}; or name the folder that holds {CIFAR10}/ with --data-dir") from None


def parse_size(text):
    try:
        H, W = (int(side) for side in (text.lower().split("x") * 2)[:2])
        if H < 1 or W < 1 or text.lower().count("x") > 1:
            raise ValueError
    except ValueError:
        raise UsageError(f"--size {text}: must be one number or HEIGHTxWIDTH, such as 64 or 48x64") from None
    return H, W


def load_folder(folder, size, channels, cache_dir, skip_broken, labelled=False):
    """Every image under `folder`, centre-cropped: a memory-mapped uint8 (N, C, H, W) cache, and their files.

    The cache is their pixels, then their numbers, int32, in the row of all files: broken ones have none.
    """
    root, (H, W) = pathlib.Path(folder), size
    if not root.is_dir():
        problem = "it is a file" if root.exists() else "there is no such folder"
        raise Failure(f"--data {folder}: neither glyphs nor cifar10, and {problem}")
    files = sorted(visible_files(root))
    if not files:
        raise Failure(f"--data {folder}: there are no images in it")
    state = stamps(files)
    key = hashlib.sha256(repr((2, state, size, channels, skip_broken)).encode()).hexdigest()[:16]
    cache = pathlib.Path(cache_dir) / f"{root.resolve().name}-{H}x{W}x{channels}-{key}.u8"
    whole = cached(cache, channels * H * W, len(files))
    if not len(whole):
        if labelled and not skip_broken:
            folder_labels(root, files)  # refuses what has none, before the work of decoding
        cache.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cache) as out:
            decode_folder(files, size, channels, out, skip_broken)
            if stamps(sorted(visible_files(root))) != state:
                raise Failure(f"--data {folder}: changed while it was read; start again when it is at rest")
        whole = cached(cache, channels * H * W, len(files))
    images = np.memmap(cache, np.uint8, "c", shape=(len(whole), channels, H, W))
    return images, [files[i] for i in whole]


def cached(cache, pixels, count):
    """The numbers of the files, out of `count`, whose pixels a cache holds; none, if damaged or missing."""
    if not cache.is_file():
        return []
    N, rest = divmod(os.path.getsize(cache), pixels + 4)
    whole = np.fromfile(cache, np.int32, offset=N * pixels)
    fits = rest == 0 and N > 0 and whole[0] >= 0 and whole[-1] < count and (np.diff(whole) > 0).all()
    return whole if fits else []


def folder_labels(folder, files):
    """Labels (N,) and names of the classes, which are the folders right under `folder`."""
    names = [path.relative_to(folder).parts[:-1] for path in files]
    if () in names:
        raise Failure(f"{files[names.index(())]}: is in no subfolder of --data, and those are the classes")
    classes = sorted({name[0] for name in names})
    number = {name: k for k, name in enumerate(classes)}
    return np.array([number[name[0]] for name in names]), classes


def visible_files(root):
    """Every file under root whose path has no hidden part; links to folders are followed once, and not
    to one that is there anyway. Pipes, sockets, devices and our own caches are left out; a link to
    nothing is a broken file."""
    seen = {os.path.realpath(root)}
    for folder, names, files in os.walk(root, followlinks=True, onerror=reraise):
        names.sort(key=lambda name, folder=folder: (os.path.islink(os.path.join(folder, name)), name))
        names[:] = [name for name in names if not name.startswith(".")
                    and (real := os.path.realpath(os.path.join(folder, name))) not in seen
                    and not seen.add(real)]
        paths = (os.path.join(folder, name) for name in files
                 if not name.startswith(".") and not name.endswith(".u8"))
        yield from (pathlib.Path(path) for path in paths if os.path.isfile(path) or not os.path.exists(path))


def stamps(files):
    """Name, size and time of each file: what changes with its contents."""
    stats = ((path, os.stat(path, follow_symlinks=path.exists())) for path in files)
    return [(os.fsencode(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def reraise(error):
    raise error


def decode_folder(files, size, channels, out, skip_broken):
    """Writes the pixels of every file, in order, then the numbers of those that are whole, to `out`."""
    progress, together = Progress("reading images", len(files), "images"), 1024
    whole, broken = [], []
    warnings.filterwarnings("ignore", module="PIL")  # what cannot be read is named below
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for first in range(0, len(files), together):  # so many wait in memory at most
            some = files[first : first + together]
            for i, pixels in enumerate(pool.map(lambda path: decode(path, size, channels), some)):
                if isinstance(pixels, str):
                    broken.append(some[i])
                    if not skip_broken:
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise Failure(f"{some[i]}: {pixels}; remove it, or leave such files out with "
                                      f"--skip-broken")
                else:
                    out.write(pixels)
                    whole.append(first + i)
                progress(first + i + 1)
    progress.close()
    out.write(np.array(whole, np.int32).tobytes())
    if len(broken) == len(files):
        raise Failure(f"{files[0].parent}: none of its {len(files)} files is an image")
    if broken:
        print(f"left out {len(broken)} of {len(files)} files that are no images, such as "
              f"{printable(broken[0])}", file=sys.stderr)


def decode(path, size, channels):
    """The image as bytes (C, H, W), upright, centre-cropped without squashing; or what is wrong."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * size[1], 2 * size[0]))  # lets JPEG skip detail nobody will see
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):  # 16 bits or floats, which convert() would clip
                values = np.asarray(image, np.float64)
                if not np.isfinite(values).all():
                    raise ValueError("it holds values that are not finite")
                top = 65535 if image.mode.startswith("I") else 1 if values.max() <= 1 else 255
                image = Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if channels == 1 else "RGB")
            image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    except UnidentifiedImageError:
        return "cannot be read as an image (its format is not known)"
    except Exception as error:  # a decoder given a damaged file raises what it likes, MemoryError too
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        return f"cannot be read as an image ({reason})"
    return np.asarray(image).reshape(*size, channels).transpose(2, 0, 1).tobytes()


# --- The order of the data, and the randomness of a step -----------------------------------------


def mixed(*numbers):
    """One well-mixed 64-bit seed from several small numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@functools.lru_cache(maxsize=2)
def shuffle(N, seed, epoch):
    return torch.randperm(N, generator=torch.Generator().manual_seed(mixed(seed, 2, epoch)))


def places(step, B, N, seed):
    """The images of a step: its place in an endless row of shuffles of all N, one an epoch."""
    place = torch.arange(step * B, (step + 1) * B)
    epochs = range(step * B // N, ((step + 1) * B - 1) // N + 1)
    return torch.cat([shuffle(N, seed, e)[place[place // N == e] % N] for e in epochs])


if __name__ == "__main__":
    sample.run(main, Config, __doc__)

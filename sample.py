"""From a checkpoint to pictures: a grid, an animation of the reverse process, an .npz, or a folder.

    python sample.py --ckpt ckpt.pt --out grid.png
    python sample.py --ckpt ckpt.pt --out grid.png --label cat,dog --guidance 1.5 --steps 100

The first half is sampling; the second, what all three commands share: flags, files, progress.
"""

import argparse
import contextlib
import difflib
import glob
import hashlib
import itertools
import math
import os
import pathlib
import secrets
import shutil
import signal
import sys
import time
import types
import typing
import warnings
from dataclasses import MISSING, dataclass, field, fields

import numpy as np
import torch
from PIL import Image

import ddpm
import improved


def flag(default, text, *, choices=None, low=None, high=None):
    """A field of a command's dataclass: its default, its help text, and the values it may take."""
    about = dict(text=text, choices=choices, low=low, high=high)
    return field(metadata=about) if default is MISSING else field(default=default, metadata=about)


@dataclass(frozen=True)
class Config:
    ckpt: str = flag(MISSING, "checkpoint that train.py wrote; it carries its own configuration")
    out: str = flag(
        MISSING, "X.png: a grid; X.gif or X.webp: the reverse process, animated; X.npz: uint8 "
        "(N, H, W, C) as arr_0, labels as arr_1; X/: a folder of PNGs")
    n: int | None = flag(None, "number of images (default: 64, or up to 8 of each class)", low=1)
    steps: int | None = flag(
        None, "of T, evenly; all: ancestral sampling (the default); fewer: DDIM, or ancestral sampling if "
        "--variance is given or learned", low=1)
    eta: float | None = flag(
        None, "noise of DDIM, from 0 (none, its default) to 1; given, DDIM is used", low=0, high=1)
    variance: str | None = flag(
        None, "sigma^2 of ancestral sampling (default: learned, if the network has learned it; else beta)",
        choices=("beta", "beta_tilde", "learned"))
    label: str | None = flag(
        None, "classes by name, such as 7 or cat,dog; all: every one (the default); a grid has one a row")
    guidance: float | None = flag(
        None, "w of classifier-free guidance, eps = (1 + w) eps(x, y) - w eps(x): 0 is the class alone "
        "(the default), -1 no class; others call 1 + w the scale", low=-1, high=100)
    seed: int = flag(0, "image i is drawn from seed + i, at any batch size", low=0, high=2**31)
    batch_size: int = flag(256, "images drawn at a time", low=1)
    weights: str = flag("ema", "moving average or last weights", choices=("ema", "raw"))
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps, ..")
    precision: str = flag("auto", "auto: bf16 where it is faster", choices=("auto", "fp32", "bf16"))
    compile: bool = flag(False, "torch.compile the network: slow to start, faster on a GPU")


def main(cfg, given):
    device = pick_device(cfg.device)
    out = pathlib.Path(cfg.out)
    out = out if out.name.strip(".") else out.resolve()  # "." and ".." are folders with names
    write = writer(out, cfg.out.endswith(("/", os.sep)))
    kind = pathlib.Path(cfg.out).suffix.lower()
    ckpt, net, d = load_model(cfg.ckpt, cfg.weights, device)
    net = torch.compile(net) if cfg.compile else net
    steps = d.T if cfg.steps is None else cfg.steps
    if steps > d.T:
        raise UsageError(f"--steps {steps}: the checkpoint has T = {d.T} steps; ask for 1 to {d.T}")
    if cfg.variance and cfg.eta is not None:
        raise UsageError("--eta is DDIM's and --variance ancestral sampling's; give one of them")
    if cfg.variance == "learned" and not learned(ckpt):
        raise UsageError("--variance learned: this network has learned none (train.py --variance learned)")
    variance = cfg.variance or ("learned" if learned(ckpt) else "beta")
    implicit = cfg.eta is not None or (steps < d.T and not cfg.variance and not learned(ckpt))
    eta = (cfg.eta or 0.0) if implicit else None
    classes, (_, H, W) = ckpt["classes"], ckpt["shape"]
    if cfg.guidance is not None and not classes:
        raise UsageError(f"--guidance {cfg.guidance:g}: it knows no classes (train.py --labels)")
    labels, rows = class_labels(classes, cfg.label, cfg.n)
    n = len(labels)
    (tall, wide), limit = cell(H, W)[0], {".webp": 16_000, ".gif": 65_000}.get(kind)
    if limit and max(-(-n // rows) * wide, rows * tall) > limit:
        raise UsageError(f"--n {n}: too many for one {kind} picture; ask for fewer, or for a .png")
    frames, progress, done = [], Progress("sampling", steps * n, "image-steps"), 0
    bf16 = use_precision(cfg.precision, device)

    images = []
    for first in range(0, n, cfg.batch_size):
        y = labels[first : first + cfg.batch_size]
        film, left = [], itertools.count(steps - 1, -1)

        def on_step(s, xs, film=film, left=left, first=first):
            nonlocal done
            done += len(xs)
            progress(done, f"image {first + len(xs)} of {n}")
            if next(left) % max(1, steps // 48) == 0 and limit:
                film.append(to_uint8(xs))

        seeds = range(cfg.seed + first, cfg.seed + first + len(y))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            x0 = sample(net, d, ckpt["shape"], seeds, y if classes else None, steps, eta, variance,
                        cfg.guidance or 0.0, on_step)
        if not x0.isfinite().all():
            raise Failure(f"{cfg.ckpt}: the network's output is not finite; its training diverged")
        images.append(to_uint8(x0))
        frames.append(film)
    progress.close()
    images = np.concatenate(images)
    film = [np.concatenate(parts) for parts in zip(*frames, strict=True)]
    write(images, labels if classes else None, rows, film)
    how = f"DDIM, {steps} steps, eta {eta:g}" if implicit else (
        f"ancestral, {steps} steps, sigma^2 {'=' if variance != 'learned' else 'is'} {variance}")
    how += f", w = {cfg.guidance:g}" if cfg.guidance else ""
    print(f"{cfg.out}: {n} images of {H}x{W}, {how}, {cfg.weights} weights at step {ckpt['step']}")


def sample(net, d, shape, seeds, labels=None, steps=None, eta=None, variance="beta", guidance=0.0,
           on_step=None):  # fmt: skip
    """One image (C, H, W) per seed: x0 (N, C, H, W), by DDIM, or, with eta=None, by Algorithm 2.

    It takes so many even `steps`, or all T. With labels, their classes, guided by w = `guidance`.
    """
    device, model = next(net.parameters()).device, net
    if labels is not None:
        y = torch.as_tensor(np.asarray(labels), device=device).long()
        model = improved.guided(net, y, net.num_classes, guidance)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    xT = ddpm.noise_like(torch.empty(len(seeds), *shape, device=device), generators)
    grid, how = ddpm.ddim_grid(d.T, steps or d.T), dict(generator=generators, on_step=on_step)
    if eta is None and len(grid) < d.T:
        model, d = improved.strided(model, d, grid)
    if eta is None and variance == "learned":
        return improved.sample_ancestral(model, d, xT, **how)
    if net.conv_out.out_channels > shape[0]:
        model = improved.eps_only(model)
    if eta is None:
        return ddpm.sample_ancestral(model, d, xT, getattr(d, variance), **how)
    return ddpm.sample_ddim(model, d, xT, grid, eta, **how)


def class_labels(classes, label=None, n=None):
    """The labels of n images, the chosen classes in turn, and the rows of their grid: one a class."""
    chosen = list(classes) if label in (None, "all") else [label]
    if label is not None and not (classes and set(chosen) <= set(classes)):
        chosen = [name.strip() for name in label.split(",")]
    for name in chosen:
        if name not in classes:
            known = f"its classes are {', '.join(classes)}" if classes else "it knows no classes"
            raise UsageError(f"--label {name}: not a class of this checkpoint; {known}")
    numbers, K = [classes.index(name) for name in chosen] or [0], max(1, len(chosen))
    n = n or (64 if K == 1 else K * max(1, min(8, 128 // K)))
    return np.resize(numbers, n), round(n**0.5) if K == 1 else min(n, K)


def to_uint8(x):
    """(N, C, H, W) in [-1, 1] -> uint8 (N, H, W, C), rounded: levels survive the trip unchanged."""
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return x.permute(0, 2, 3, 1).cpu().numpy()


def grid(images, rows, gap=2):
    """uint8 (N, H, W, C) -> one picture, column by column; small images are enlarged, by whole factors."""
    n, H, W, C = images.shape
    (H, W), scale = cell(H, W, gap)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    sheet = np.full((rows * H + gap, -(-n // rows) * W + gap, C), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i % rows * H, gap + i // rows * W
        sheet[top : top + H - gap, left : left + W - gap] = image
    return to_picture(sheet)


def cell(H, W, gap=2):
    """(height, width) that an image takes in a grid, and the factor by which it is enlarged."""
    scale = max(1, 64 // max(H, W))
    return (H * scale + gap, W * scale + gap), scale


def to_picture(image):
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def writer(out, folder):
    """A function (images, labels, rows, film) that writes `out`; refuses at once what cannot be."""
    kinds = ".png .gif .webp .npz".split()
    if folder or out.is_dir():
        if out.is_dir() and (any(out.iterdir()) or out.is_mount() or out == pathlib.Path.cwd()):
            raise Failure(f"--out {out}: the folder is not empty, or in use; name a new one")
        writable(out.with_name("new"))

        def write(images, labels, rows, film):
            partial = partial_name(out)
            partial.mkdir()
            try:
                for i, image in enumerate(images):
                    to_picture(image).save(partial / f"{i:06d}.png", "PNG")
                partial.replace(out)
            finally:
                shutil.rmtree(partial, ignore_errors=True)

        return write
    kind = out.suffix.lower()
    if kind not in kinds:
        raise UsageError(f"--out {out}: must end in {', '.join(kinds)}, or in / for a folder")
    writable(out)

    def write(images, labels, rows, film):
        with replacing(out) as file:
            if kind == ".npz":
                np.savez(file, images, **({} if labels is None else {"arr_1": labels}))
            elif kind == ".png":
                grid(images, rows).save(file, "PNG")
            else:
                pictures = [grid(frame, rows) for frame in film]
                pictures[0].save(file, kind[1:].upper(), save_all=True, loop=0,
                                 append_images=pictures[1:],
                                 duration=[60] * (len(pictures) - 1) + [2000])

    return write


# --- Checkpoints ---------------------------------------------------------------------------------

FORMAT = 1  # of the checkpoint file; a file with a higher number is refused
SEAL = b"\nddpm checkpoint; SHA-256 of all above: "  # and 32 bytes end the file; torch.load skips them
CONTENTS = dict(config=dict, network=dict, shape=tuple, classes=list, images=int, step=int, model=dict,
                ema=dict, optimizer=dict, fingerprint=int)
SCHEDULES = {"linear": ddpm.linear_schedule, "cosine": ddpm.cosine_schedule,
             "exponential": ddpm.exponential_schedule}


def save_checkpoint(path, ckpt):
    """Writes a dictionary that load_checkpoint reads, whole or not at all."""
    with replacing(path) as file:
        try:
            torch.save({"ddpm_format": FORMAT, **ckpt}, file)
        except RuntimeError:  # how it reports a full disk
            raise Failure(f"{path}: cannot be written, the disk may be full; nothing changed") from None
        file.seek(0)
        file.write(SEAL + hashlib.file_digest(file, "sha256").digest())


def load_checkpoint(path):
    """The dictionary that train.py saved, on the CPU. No code in the file is run.

    torch.load alone accepts most bit flips, as other weights: hence the seal.
    """
    if not os.path.isfile(path):
        problem = "is a folder" if os.path.isdir(path) else "no such file"
        raise Failure(f"{path}: {problem}; train.py writes checkpoints (--out)")
    end, size = len(SEAL) + 32, os.path.getsize(path)
    data = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    if size < end or data[size - end : size - 32].tobytes() != SEAL:
        raise Failure(f"{path}: not a checkpoint of train.py, or not all of one")
    if hashlib.sha256(data[: size - end]).digest() != data[size - 32 :].tobytes():
        raise Failure(f"{path}: damaged: its checksum does not match its contents")
    try:
        with warnings.catch_warnings(action="ignore"):
            ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception:  # whatever a foreign file makes the reader raise
        raise Failure(f"{path}: sealed as a checkpoint, but cannot be read as one") from None
    if not isinstance(ckpt, dict) or "ddpm_format" not in ckpt:
        raise Failure(f"{path}: sealed as a checkpoint, but does not hold one")
    if ckpt["ddpm_format"] != FORMAT:
        raise Failure(f"{path}: its format, {ckpt['ddpm_format']}, is newer than this program's, "
                      f"{FORMAT}; update the program")
    with refusing(path):
        assert all(isinstance(ckpt[name], kind) for name, kind in CONTENTS.items())
        assert len(ckpt["classes"]) == (ckpt["network"]["num_classes"] or 0)
        (C, H, W), factor = ckpt["shape"], 2 ** (len(ckpt["network"]["mult"]) - 1)
        assert C == ckpt["network"]["in_channels"] and ckpt["step"] > 0
        assert ckpt["network"]["out_channels"] == {"fixed": C, "learned": 2 * C}[ckpt["config"]["variance"]]
        assert all(isinstance(name, str) for name in ckpt["classes"])
        assert H > 0 and W > 0 and H % factor == W % factor == 0
    return ckpt


def learned(ckpt):
    """Whether its network says the variances too (improved.py)."""
    return ckpt["network"]["out_channels"] > ckpt["shape"][0]


@contextlib.contextmanager
def refusing(path):
    """Whatever a checkpoint that was edited makes the code raise, in one line; path None: nothing."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        if path is None or out_of_memory(error):
            raise
        raise Failure(f"{path}: its contents do not fit together") from None


def load_model(path, weights="ema", device="cpu"):
    """The checkpoint, its network in eval mode and its diffusion."""
    ckpt = load_checkpoint(path)
    with refusing(path):
        net = ddpm.UNet(**ckpt["network"])
        net.load_state_dict(ckpt["ema" if weights == "ema" else "model"])
        d = make_diffusion(ckpt["config"]["schedule"], ckpt["config"]["timesteps"])
    # Its weights keep requires_grad, without which autocast would round them again at every step.
    return ckpt, net.to(device, memory_format=torch.channels_last).eval(), d


def make_diffusion(schedule, T):
    return ddpm.Diffusion(SCHEDULES[schedule](T))


# --- What the commands share ---------------------------------------------------------------------


class UsageError(Exception):
    """The call is wrong: one line, exit status 2."""


class Failure(Exception):
    """The world is: one line, exit status 1."""


def run(main, config, description):
    """main(flags, names of those given); every expected error becomes one line and an exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it cleans up as Ctrl-C does
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        main(*parse_flags(config, description, sys.argv[1:]))
        sys.stdout.flush()
    except UsageError as error:
        status, message = 2, error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, NotImplementedError):  # such as log_ndtr on an Apple GPU
            cause = str(error).split(". ")[0]
            status, message = 1, f"{cause}; try --device cpu, or PYTORCH_ENABLE_MPS_FALLBACK=1"
        elif out_of_memory(error):
            status, message = 1, "out of memory; try a smaller --batch-size, or smaller images or networks"
        elif any(word in str(error) for word in ("closed by peer", "gloo", "NCCL")):
            cause = str(error).strip().splitlines()[0]
            status, message = 1, f"another process of this run has ended; if none says why: {cause}"
        else:
            raise
    except BrokenPipeError:
        status, message = 1, "nobody reads the output any more"
    except OSError as error:
        status, message = 1, f"{error.filename or 'file'}: {error.strerror or error}"
    except Failure as error:
        status, message = 1, error
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    else:
        return
    try:
        sys.stdout.flush()
    except OSError:  # nobody is there, or the disk is full: not to be tried again at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if status != 2 or os.environ.get("RANK", "0") == "0":  # a wrong call is wrong in every process
        print(f"{pathlib.Path(sys.argv[0]).name}: error: {printable(message)}", file=sys.stderr)
    sys.exit(status)


def printable(message):
    """One line, whatever is in the names of files."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message))


def out_of_memory(error):
    words = ("allocate memory", "out of memory")  # the second: of a CUDA that cannot even start
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or any(word in str(error) for word in words))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message} (--help lists the flags)")


METAVARS = {int: "N", float: "X", str: "NAME"}


def parse_flags(config, description, argv):
    """argv as an instance of `config`, a dataclass of `flag`s, and the names of the flags given."""
    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(config):
        kind = typing.get_args(f.type)[0] if isinstance(f.type, types.UnionType) else f.type
        about, name = f.metadata, "--" + f.name.replace("_", "-")
        text = about["text"].replace("%", "%%")
        if not any(f.default is nothing for nothing in (None, MISSING, False)):
            text += f" (default: {f.default})"
        if kind is bool:
            parser.add_argument(name, dest=f.name, action="store_true", help=text)
        else:
            parser.add_argument(name, dest=f.name, type=checked(kind, about), help=text,
                                required=f.default is MISSING, choices=about["choices"],
                                metavar=None if about["choices"] else METAVARS[kind])
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        names = ["--" + f.name.replace("_", "-") for f in fields(config)]
        near = difflib.get_close_matches(unknown[0].split("=")[0], names, 1, 0.7)
        hint = f"; did you mean {near[0]}?" if near else " (--help lists the flags)"
        raise UsageError(f"unknown argument {unknown[0]}{hint}")
    for name, value in vars(known).items():
        if value == []:  # what argparse makes of "--out=--"
            raise UsageError(f"--{name.replace('_', '-')}: expected one argument (--help lists the flags)")
    return config(**vars(known)), set(vars(known))


def inside(value, low, high):
    """Whether low <= value <= high, where None is no limit."""
    return (low is None or value >= low) and (high is None or value <= high)


def checked(kind, about):
    """An argparse type: text -> kind, inside [low, high]."""
    low, high = about["low"], about["high"]

    def parse(text):
        value = kind(text)
        if kind is str and not text.strip():
            raise argparse.ArgumentTypeError("must not be empty")
        if (kind is int and abs(value) > 2**31) or (kind is float and not math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is impossible")
        if not inside(value, low, high):
            span = f"at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is impossible; it must be {span}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}.get(kind, kind.__name__)
    return parse


def pick_device(name):
    """The torch device called `name`; auto: cuda, else mps, else cpu."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available()
                else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        if name.split(":")[0] == "meta":
            raise RuntimeError
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if out_of_memory(error):
            raise
        raise UsageError(f"--device {name}: not on this machine; try cpu") from None
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # where NCCL, too, looks
    return device


def use_precision(precision, device):
    """in_bf16, of all that is computed from here on; where it is not, float32 is no TF32 either."""
    bf16 = in_bf16(precision, device)
    torch.set_float32_matmul_precision("high" if bf16 else "highest")
    torch.backends.cudnn.allow_tf32 = bf16
    return bf16


def in_bf16(precision, device):
    """Whether networks compute in bfloat16: as told, or, if "auto", where the hardware is faster so."""
    if precision == "auto" and device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto" and device.type == "cpu":  # AVX-512's bfloat16 is slower than its float32
        return bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return precision == "bf16"


def writable(path):
    """Refuses a path that cannot be written, before the work and not after it."""
    folder = pathlib.Path(path).parent
    if not folder.is_dir():
        raise Failure(f"{path}: there is no folder {folder}")
    if pathlib.Path(path).is_dir() or (isinstance(path, str) and path.endswith("/")):
        raise Failure(f"{path}: is a folder")
    if os.path.exists(path) and not os.path.isfile(path):
        raise Failure(f"{path}: is not an ordinary file")
    if not os.access(folder, os.W_OK):
        raise Failure(f"{path}: no permission to write there")


@contextlib.contextmanager
def replacing(path):
    """A binary file that takes the place of `path` once it is complete and on disk, or not at all."""
    path = pathlib.Path(os.path.realpath(path))
    partial = partial_name(path)
    with contextlib.suppress(OSError):  # what a killed writer left an hour ago; a writing one's is younger
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()
    try:
        with open(partial, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        network = isinstance(error, (ConnectionError, TimeoutError))
        if isinstance(error, OSError) and not error.filename and not network:
            raise Failure(f"{path}: {error.strerror or error}; nothing changed") from None
        raise


def partial_name(path):
    """Beside `path`, and no other process's, on whatever machine."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


class Progress:
    """One line that rewrites itself on a terminal; elsewhere a plain line now and then."""

    def __init__(self, what, total, unit, start=0):
        self.what, self.total, self.unit, self.start = what, total, unit, start
        self.tty = sys.stderr.isatty()
        self.began = self.shown = time.monotonic()

    def __call__(self, done, note=""):
        now = time.monotonic()
        if now - self.shown < (0.2 if self.tty else 15) and not (self.tty and done == self.total):
            return
        self.shown = now
        rate = (done - self.start) / max(now - self.began, 1e-9)
        left = duration((self.total - done) / rate) if rate > 0 else "?"
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        line = f"{self.what}: {done / self.total:4.0%}  {note}  {speed} {self.unit}/s  {left} left"
        self.show(f"\r{line}\x1b[K" if self.tty else f"{line}\n")

    def close(self):
        if self.tty:
            self.show("\r\x1b[K")

    def show(self, text):
        with contextlib.suppress(OSError):  # the terminal was closed: no reason to lose the work
            print(text, end="", file=sys.stderr, flush=True)


def duration(seconds):
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


if __name__ == "__main__":
    run(main, Config, __doc__)

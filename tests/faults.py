"""What it survives: faults by the hundred, put into the real commands, each in a process of its own.

    python tests/faults.py            all of them (ten to fifteen minutes on two cores)
    python tests/faults.py killed     the kinds with this text in their name

Exit status 1 if one is not survived. Every kind is a function of a seed, so that a failure comes back.
The run that is disturbed is a whole one, only small: 20 glyphs, batches of 8, dropout, mirror images,
a checkpoint and a grid after each of four epochs, ten steps in all. It is resumed after the fault, and
its last checkpoint must be the undisturbed run's, bit for bit.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from dataclasses import dataclass, fields

from mutants import ROOT, in_parallel

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests" / "commands"))

import hypothesis
import numpy as np
import torch
import torch._dynamo  # which every optimizer imports: once here, not in every child
from hypothesis import strategies as st
from PIL import Image
from running import equal

import ddpm
import evaluate
import sample
import train
from support import checkpoint, errors, files
from support import command as command_line
from support.data import cifar10, folder

RUN = ("--log log.jsonl --limit 20 --batch-size 8 --epochs 4 --width 4 --timesteps 4 --dropout 0.1 "
       "--flip yes --sample-every 1 --precision fp32 --micro-batch 8 --device cpu").split()  # fmt: skip
RESUME = "--resume ckpt.pt --log log.jsonl".split()
ENDING = [
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGXCPU,
]
SAMPLING = ["--ckpt", "ckpt.pt", "--out", "a.png", "--n", "4"]
STEPS = 10

# --- A command, in a process of its own ----------------------------------------------------------


@dataclass
class Done:
    """How a command ended: its exit status, or minus the signal that killed it, and what it said."""

    status: int
    out: str
    err: str

    def refused(self, status=1):
        """It ended with this status, in one line."""
        lines = [line for line in self.err.splitlines()  # a library of torch's speaks too, without files
                 if not line.startswith(("note: ", "warning: ", "Error in cpuinfo"))]  # fmt: skip
        assert self.status == status and len(lines) == 1 and ".py: error: " in lines[0], self
        return lines[0]


def command(module, *flags, fault=lambda: None, seconds=120, memory=None):
    """Runs a command of the project in the current folder, with a fault armed just before."""
    return wait(start(module, *flags, fault=fault, seconds=seconds, memory=memory))


def start(module, *flags, fault=lambda: None, seconds=120, memory=None):
    sys.stdout.flush()
    out, err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
    pid = os.fork()
    if pid:
        return pid, out, err
    try:
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = (open(fd, "w", closefd=False, buffering=1) for fd in (1, 2))
        signal.alarm(seconds)
        if memory:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        sys.argv = [module.__name__ + ".py", *map(str, flags)]
        status = 0
        fault()
        command_line.run(module.main, module.Config, module.__doc__)
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
        status = 70
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(status)


def wait(process):
    pid, out, err = process
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    texts = []
    for file in (out, err):
        file.seek(0)
        texts.append(file.read())
        file.close()
    return Done(status, *texts)


def resumes_exactly():
    """What is there is whole, the log too; the run is finished from it, and ends as the undisturbed one."""
    if os.path.exists("ckpt.pt"):
        if checkpoint.load("ckpt.pt")["step"] < STEPS:
            done = command(train, *RESUME)
            assert done.status == 0, done
    else:
        done = command(train, *RUN)
        assert done.status == 0, done
    log = [json.loads(line) for line in pathlib.Path("log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == STEPS, "the log does not reach the end"
    end, want = checkpoint.load("ckpt.pt"), WHOLE
    for part in ("model", "ema", "optimizer", "step"):
        assert equal(end[part], want[part]), f"{part} differs from the undisturbed run's"


# --- Ways to break it ----------------------------------------------------------------------------


def each_line(call):
    """Arms call() before every line of code that the project runs from now on, run() itself apart."""
    ours = {str(path) for path in (*ROOT.glob("*.py"), *ROOT.glob("support/**/*.py"))}

    def in_frame(frame, event, arg):
        if event == "line":
            call()
        return in_frame

    def trace(frame, event, arg):
        code = frame.f_code
        return in_frame if code.co_filename in ours and code.co_name != "run" else None

    sys.settrace(trace)


def at_line(n, action):
    """Arms `action` at the n-th of those lines."""
    lines = itertools.count(1)
    each_line(lambda: next(lines) == n and action())


def die(signum=signal.SIGKILL):
    os.kill(os.getpid(), signum)


class Dying(io.FileIO):
    """A file in whose writing the process is killed, after so many bytes in all such files."""

    left = math.inf

    def write(self, data):
        data = memoryview(data).cast("B")
        if len(data) > Dying.left:
            super().write(data[: Dying.left])
            die()
        Dying.left -= len(data)
        return super().write(data)


def at_byte(n):
    """Arms the death of the process at the n-th byte that it writes to checkpoints and pictures."""
    Dying.left, files.open = n, Dying


def lines_of(module, *flags):
    """How many of those lines an undisturbed command runs."""
    lines, main = itertools.count(), module.main

    def and_say(*args):
        main(*args)
        print("lines:", next(lines))

    def count():
        module.main = and_say
        each_line(lambda: next(lines))

    done = command(module, *flags, fault=count)
    assert done.status == 0, done
    return int(done.out.split("lines: ")[1])


def undisturbed():
    """The whole run, once: its last checkpoint, also as bytes; bytes written; lines of it and of sampling."""
    training = lines_of(train, *RUN)
    whole, data = checkpoint.load("ckpt.pt"), pathlib.Path("ckpt.pt").read_bytes()
    pictures = sum(p.stat().st_size for p in pathlib.Path().glob("ckpt.*.png"))
    assert whole["step"] == STEPS
    return whole, data, 4 * len(data) + pictures, training, lines_of(sample, *SAMPLING)


# --- The run, killed -----------------------------------------------------------------------------


def killed_at_a_line(rng):
    """Up to three times in a row."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        flags, n = RESUME if os.path.exists("ckpt.pt") else RUN, rng.randrange(1, int(0.98 * LINES))
        if flags is RESUME and checkpoint.load("ckpt.pt")["step"] == STEPS:
            break
        done = command(train, *flags, fault=lambda n=n: at_line(n, die))
        assert done.status in (-signal.SIGKILL, 0) and (done.status or flags is RESUME), done
    resumes_exactly()


def killed_in_a_write(rng):
    n = rng.randrange(BYTES)
    done = command(train, *RUN, fault=lambda: at_byte(n))
    assert done.status == -signal.SIGKILL, done
    resumes_exactly()
    assert len(list(pathlib.Path().glob(".*.partial"))) <= 1


def stopped(signum, rng):
    """It saves, says so, and exits by the signal's number; before the first step there is no more to do."""
    n = rng.randrange(1, int(0.98 * LINES))
    done = command(train, *RUN, fault=lambda: at_line(n, lambda: die(signum)))
    assert "Traceback" not in done.err and done.status in (0, 128 + signum), done
    if "stopped at step" in done.out:
        step = int(done.out.split("stopped at step ")[1].split()[0])
        assert checkpoint.load("ckpt.pt")["step"] == step < STEPS, "lost work"
    elif done.status:
        assert done.refused(done.status).endswith("interrupted") and not os.path.exists("ckpt.pt")
    assert not list(pathlib.Path().glob(".*.partial"))
    resumes_exactly()


def sampling_interrupted(rng):
    """sample.py, by one of the signals that end it: the old picture stays, or the new one is whole."""
    pathlib.Path("ckpt.pt").write_bytes(WHOLE_BYTES)
    pathlib.Path("a.png").write_text("the old one")
    n, signum = rng.randrange(1, SAMPLING_LINES), rng.choice(ENDING)
    done = command(sample, *SAMPLING, fault=lambda: at_line(n, lambda: die(signum)))
    assert "Traceback" not in done.err and done.status in (0, 128 + signum), done
    if pathlib.Path("a.png").read_bytes() != b"the old one":
        Image.open("a.png").load()
    assert sorted(os.listdir()) == ["a.png", "ckpt.pt"]


def full_disk(rng):
    """No file may grow beyond so many bytes, while a run goes on from its second epoch."""
    half_way()
    before, limit = (
        pathlib.Path("ckpt.pt").read_bytes(),
        rng.randrange(2000, len(WHOLE_BYTES) - 2000),
    )
    done = command(train, *RESUME,
                   fault=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))  # fmt: skip
    assert "ckpt.pt: " in done.refused()
    assert pathlib.Path("ckpt.pt").read_bytes() == before
    assert not list(pathlib.Path().glob(".*.partial"))
    resumes_exactly()


def half_way():
    """The folder as a run leaves it that was stopped in the middle."""
    done = command(train, *RUN, fault=lambda: at_line(LINES // 2, lambda: die(signal.SIGTERM)))
    assert "stopped at step" in done.out, done


def two_trainers(rng):
    """Of different seeds, both would write one file: one of them is refused, or comes after the other, whose
    file it leaves; whoever reads meanwhile finds a whole one."""
    both = [start(train, *RUN, "--seed", seed) for seed in range(2)]
    reads, until = 0, time.monotonic() + 4
    while time.monotonic() < until:
        if os.path.exists("ckpt.pt"):
            checkpoint.load("ckpt.pt")
            reads += 1
    ends = [wait(process) for process in both]
    refused = [end for end in ends if end.status]
    assert all(end.status == 1 and "another run is writing there" in end.err for end in refused), (
        refused
    )
    assert reads and len(refused) + os.path.exists("ckpt.pt") + os.path.exists("ckpt.1.pt") == 2
    if refused and checkpoint.load("ckpt.pt")["config"]["seed"] == 0:
        resumes_exactly()


def not_a_number(rng):
    """nan or inf, in bf16 or float32, in the loss, a gradient or the moving average of a random step."""
    at, what = rng.randrange(1, STEPS + 1), rng.choice(["loss", "gradient", "moving average"])
    value, calls = rng.choice([math.nan, math.inf, -math.inf]), 0

    def poisoned(function, poison):
        def call(*args):
            nonlocal calls
            calls += what != "loss" or torch.is_grad_enabled()  # not the loss on images held out
            return poison(function, args) if calls == at else function(*args)

        return call

    def loss(function, args):
        return function(*args) * value

    def gradient(function, args):
        args[0][3].grad.flatten()[0] = value
        return function(*args)

    def average(function, args):
        function(*args)
        args[0][5].flatten()[0] = value

    def fault():
        if what == "loss":
            ddpm.loss_simple = poisoned(ddpm.loss_simple, loss)
        elif what == "gradient":
            torch.nn.utils.clip_grad_norm_ = poisoned(torch.nn.utils.clip_grad_norm_, gradient)
        else:
            torch._foreach_lerp_ = poisoned(torch._foreach_lerp_, average)

    precision = rng.choice(["fp32", "bf16"])
    line = command(train, *RUN, "--precision", precision, fault=fault).refused()
    named = int(line.split("step ")[1].split(":")[0])
    assert f"the {what}: " in line and "--lr" in line, line
    assert named == at or (what == "moving average" and at <= named <= at + 3), (at, line)
    if os.path.exists("ckpt.pt"):
        saved = checkpoint.load("ckpt.pt")
        assert saved["step"] < at and all(v.isfinite().all() for v in saved["ema"].values())
    if precision == "fp32":
        resumes_exactly()


def one_process_dies(rng):
    """torchrun with two processes, one killed; one process goes on from what they left."""
    flags = [*RUN[:-2], "--epochs", "400", "--device", "cpu", "--sample-every", "2"]
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "--", str(ROOT / "train.py"), *flags], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    for line in torchrun.stdout:
        if line.startswith("epoch 4"):
            break
    workers = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            about, call = (
                pathlib.Path(f"/proc/{pid}/{name}").read_text() for name in ("stat", "cmdline")
            )
            if int(about.rsplit(")", 1)[1].split()[1]) == torchrun.pid and "train.py" in call:
                workers.append(int(pid))
    assert len(workers) == 2, workers
    os.kill(workers[rng.randrange(2)], signal.SIGKILL)
    out, err = torchrun.communicate(timeout=120)
    said = (
        "train.py: error: another process of this run has ended" in err or "stopped at step" in out
    )
    assert torchrun.returncode and said and 'train.py", line' not in err, out + err
    step = checkpoint.load("ckpt.pt")["step"]
    done = command(train, *RESUME, "--epochs", math.ceil((step + 1) * 8 / 20))
    assert done.status == 0 and f"from step {step}" in done.out, done


def memory_stays(rng):
    """Resident memory after 500 steps and after 3,000."""
    seen = {}

    def fault():
        rate = train.rate

        def call(cfg, step, steps):
            if step in (500, 2999):
                pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
                seen[step] = pages * resource.getpagesize()
                if step == 2999:
                    pathlib.Path("memory.json").write_text(json.dumps(seen))
            return rate(cfg, step, steps)

        train.rate = call

    done = command(train, *RUN, "--epochs", 1200, "--sample-every", 0, fault=fault, seconds=300)
    assert done.status == 0, done
    early, late = json.loads(pathlib.Path("memory.json").read_text()).values()
    remark = f"grew by {(late - early) / 1e6:.1f} MB"
    assert late - early < 2e6, remark
    return remark


# --- Checkpoints that are none -------------------------------------------------------------------


class Owned:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return os.system, ("touch owned",)


def foreign(rng):
    """The bytes of a file that never was a checkpoint; some would run code."""
    file, kind = io.BytesIO(), rng.randrange(9)
    if kind == 0:
        return pickle.dumps(Owned(), rng.randrange(6))
    if kind == 1:
        torch.save({"model": Owned()}, file)
    elif kind == 2:
        torch.save({"model": Owned(), "ddpm_format": 1}, file, _use_new_zipfile_serialization=False)
    elif kind == 3:
        torch.save(
            ddpm.UNet(ch=4, groups=4, mult=(1,), attention=()).state_dict(), file
        )  # another project's
    elif kind == 4:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Owned()))
            archive.writestr("archive/version", "3")
    elif kind == 5:
        Image.new("RGB", (9, 9)).save(file, "PNG")
    elif kind == 6:
        np.savez(file, weights=np.zeros(9))
    elif kind == 7:
        return rng.randbytes(rng.randrange(100_000))
    else:
        return "model: ünet\n".encode(rng.choice(["utf-8", "utf-16"])) * rng.randrange(1000)
    return file.getvalue()


def corrupted_checkpoint(rng):
    """Cut, lengthened, flipped, blanked, shuffled, foreign, or foreign and sealed as ours."""
    data, kind = bytearray(WHOLE_BYTES), rng.randrange(8)
    place = rng.randrange(len(data))
    if kind in (0, 1):
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data = data[:place]
    elif kind == 3:
        data += rng.randbytes(rng.randrange(1, 100))
    elif kind == 4:
        length = rng.randrange(1, 5000)
        blank = bytes(len(data[place : place + length]))
        data[place : place + length] = blank if any(data[place : place + length]) else blank + b"\0"
    elif kind == 5:
        data = data[place:] + data[:place] if place else data[1:]
    elif kind == 6:
        data = foreign(rng)
    else:
        data = foreign(rng)
        data += checkpoint.SEAL + hashlib.sha256(data).digest()
    pathlib.Path("ckpt.pt").write_bytes(data)
    for module, flags in (train, RESUME), (sample, ["--ckpt", "ckpt.pt", "--out", "a.png"]):
        line = command(module, *flags).refused()
        assert line.count("ckpt.pt: ") == 1, line
    assert os.listdir() == ["ckpt.pt"] and pathlib.Path("ckpt.pt").read_bytes() == data, (
        "something changed"
    )


def wrong_contents(rng):
    """Sealed as ours, of our format, but with parts that are missing, of another type or shape."""
    ckpt = {k: v for k, v in WHOLE.items()}
    part = rng.choice("model ema optimizer network config shape classes step images".split())
    how = rng.randrange(3)
    if part in ("model", "ema") and how:
        name = rng.choice(list(ckpt[part]))
        ckpt[part] = {**ckpt[part], name: torch.zeros(7, 7) if how == 1 else "not a tensor"}
    elif part == "network" and how:
        ckpt[part] = {
            **ckpt[part],
            **rng.choice(
                [
                    {"ch": 10},
                    {"groups": 3},
                    {"mult": (1, 2)},
                    {"depth": 3},
                    {"attention": None},
                    {"in_channels": 3},
                ]
            ),
        }
    elif part == "config" and how:
        name = rng.choice(["schedule", "timesteps"])
        ckpt[part] = rng.choice([{}, {**ckpt[part], name: rng.choice(["none", None, -5, 0, [1]])}])
    elif part == "shape" and how:
        ckpt[part] = rng.choice([(3, 16, 16), (1, 15, 16), (1, 16), (1, 0, "16")])
    elif part == "optimizer" and how:
        ckpt[part] = {**ckpt[part], **rng.choice([{"state": {}}, {"param_groups": []}])}
    elif how == 0:
        del ckpt[part]
    else:
        ckpt[part] = rng.choice([None, "text", 1.5, [torch.zeros(2)], {"a": 1}, -1])
    checkpoint.save("ckpt.pt", ckpt)
    before = pathlib.Path("ckpt.pt").read_bytes()
    done = command(train, *RESUME, "--epochs", 5)
    assert done.refused(), done
    for module, flags in (sample, ["--out", "a.png"]), (evaluate, []):
        done = command(module, "--ckpt", "ckpt.pt", "--n", 1, *flags)
        if done.status:  # what they do not look at may be as it likes
            done.refused()
    assert pathlib.Path("ckpt.pt").read_bytes() == before


# --- Images that are none ------------------------------------------------------------------------


def picture(rng, side=40):
    """A picture of a random kind and mode, as the bytes of its file."""
    pixels = np.frombuffer(rng.randbytes(side * side * 4), np.uint8).reshape(side, side, 4)
    image = Image.fromarray(pixels, "RGBA").resize((rng.randrange(1, 90), rng.randrange(1, 90)))
    modes = {"PNG": "1 L LA P RGB RGBA I;16", "JPEG": "L RGB CMYK", "GIF": "P L RGB", "BMP": "1 L P RGB",
             "TIFF": "1 L LA P RGB RGBA CMYK I;16 F YCbCr LAB", "WEBP": "RGB RGBA", "PPM": "1 L RGB",
             "ICO": "RGBA", "TGA": "L P RGB RGBA", "PCX": "1 L P RGB", "SGI": "L RGB RGBA"}  # fmt: skip
    kind = rng.choice(list(modes))
    mode = rng.choice(modes[kind].split())
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode == "LAB":
        image = Image.frombytes("LAB", image.size, image.convert("RGB").tobytes())
    else:
        image = (
            image.convert("RGB").convert(mode)
            if mode not in ("RGBA", "LA")
            else image.convert(mode)
        )
    file, extra = io.BytesIO(), {}
    if kind in ("GIF", "WEBP", "TIFF", "PNG") and mode != "I;16" and rng.random() < 0.3:
        extra = dict(save_all=True, append_images=[image, image])  # animated
    if kind == "JPEG" and rng.random() < 0.5:
        exif = Image.Exif()
        exif[274] = rng.randrange(12)  # upright, turned, mirrored, or nonsense
        extra = dict(exif=exif.tobytes())
    image.save(file, kind, **extra)
    return file.getvalue()


def bomb(width, height):
    """A PNG of a few bytes that says it is this large."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


ALBUM = "--data album --size 8 --epochs 1 --width 4 --timesteps 2".split()


def hostile_image(rng):
    """Decoded, or refused in words; train.py names it, and goes on without it if told to."""
    kind, data = rng.randrange(7), bytearray(picture(rng))
    if kind == 1:
        data = data[: rng.randrange(len(data))]
    elif kind in (2, 3):
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(min(len(data), 200 if kind == 2 else len(data)))] = rng.randrange(
                256
            )
    elif kind == 4:
        big = 2**31 - 1
        data = bomb(*rng.choice([(20_000, 20_000), (big, big), (0, 5), (1, 2**30), (10**5, 10**3)]))
    elif kind == 5:
        data = rng.choice(
            [
                b"",
                b"not an image",
                rng.randbytes(3000),
                bytes(3000),
                b"GIF89a",
                b"\xff\xd8\xff",
                b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
                b"<svg></svg>",
                b"%PDF-1.7",
            ]
        )
    elif kind == 6:
        data = data[: len(data) // 2] + bytearray(picture(rng))
    os.mkdir("album")
    name = rng.choice(
        ["a b.png", "ünï.jpg", "line\nbreak.gif", "no suffix", "\udcff.bmp", "-x", "x" * 200]
    )
    pathlib.Path("album", name).write_bytes(data)
    Image.new("RGB", (9, 9), "red").save("album/good.png")
    flags = [*ALBUM, "--sample-every", 0]
    done = command(train, *flags, memory=6 << 30)
    if done.status == 0:
        assert "2 images" in done.out, done
        return
    line = done.refused()
    assert f"album/{errors.printable(name)}: cannot be read as an image" in line, line
    assert "--skip-broken" in line, line
    assert not os.path.exists("ckpt.pt") and not list(pathlib.Path("data").iterdir())
    done = command(train, *flags, "--skip-broken", memory=6 << 30)
    assert done.status == 0 and "1 images" in done.out and "left out 1 of 2" in done.err, done


def failing_machine(rng):
    """Few open files while a folder is read: all of it, or one line; nothing is left out."""
    os.mkdir("album")
    for i in range(30):
        Image.new("RGB", (2000, 2000), (i, 0, 0)).save(f"album/{i}.jpg")
    files = rng.randrange(8, 40)
    done = command(train, *ALBUM, "--sample-every", 0, "--skip-broken",
                   fault=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)))  # fmt: skip
    assert "left out" not in done.err and "Traceback" not in done.err, done
    if done.status == 0:
        assert "30 images" in done.out, done
    else:
        done.refused()
    assert not list(pathlib.Path().rglob("*.partial"))


def damaged_cache(rng):
    """A cache that was cut, flipped, blanked or exchanged is decoded again; the run is the same one."""
    os.mkdir("album")
    for i in range(5):
        Image.new("RGB", (9, 9), (50 * i, 0, 0)).save(f"album/{i}.png")
    prints = []
    for damaged in (False, True):
        if damaged:
            [cache] = pathlib.Path("data").iterdir()
            data, place = bytearray(cache.read_bytes()), rng.randrange(cache.stat().st_size)
            kind = rng.randrange(4)
            if kind == 0:
                data[place] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del data[place:]
            elif kind == 2:
                data[place:] = bytes(len(data) - place)
            else:
                del data[: place // 196 * 196]  # whole images and their numbers
            cache.write_bytes(data)
        done = command(train, *ALBUM, "--sample-every", 0)
        assert done.status == 0, done
        prints.append(checkpoint.load("ckpt.pt")["fingerprint"])
    assert prints[0] == prints[1]


def many_files(rng):
    """100,000 images (of two files, linked): read once, and then opened at once; memory stays small."""
    os.mkdir("album")
    for k in range(2):
        Image.new("RGB", (9, 9), ["red", "blue"][k]).save(f"album/{k}.png")
    for i in range(100_000 - 2):
        os.link(f"album/{i % 2}.png", f"album/x{i}.png")

    def load(path):
        began, base = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        images = folder.load("album", (8, 8), 3, "data", False)[0]
        assert images.shape == (100_000, 3, 8, 8)
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
        pathlib.Path(path).write_text(json.dumps([time.monotonic() - began, used / 1e3]))
        sys.exit(0)

    for name in ("first", "again"):
        assert command(train, *ALBUM, fault=lambda name=name: load(name), seconds=300).status == 0
    (first, _), (again, _) = (
        json.loads(pathlib.Path(name).read_text()) for name in ("first", "again")
    )
    megabytes = max(json.loads(pathlib.Path(name).read_text())[1] for name in ("first", "again"))
    assert megabytes < 200 and again < first / 3, (first, again, megabytes)
    return f"read in {first:.0f} s, opened again in {again:.1f} s, {megabytes:.0f} MB"


# --- Calls that are wrong ------------------------------------------------------------------------

SMALL = {
    train: [*RUN[:-4], "--sample-every", "0", "--device", "cpu", "--epochs", "1"],
    sample: ["--ckpt", "ckpt.pt", "--out", "out.png", "--n", "2", "--device", "cpu"],
    evaluate: ["--ckpt", "ckpt.pt", "--n", "2", "--device", "cpu"],
}
TEXTS = st.text(st.characters(exclude_characters="\0"), max_size=8) | st.sampled_from(
    [
        "",
        " ",
        "-",
        "--",
        "-1",
        "=",
        "\n",
        "\t",
        "é",
        "٣",
        "\u202e",
        "💥",
        "a" * 300,
        "%s",
        "$HOME",
        "*",
    ]
)
NUMBERS = st.integers(-2, 9).map(str) | st.sampled_from([
    "4", "8", "16", "1e3", "2.5", "0.5", "1e-3", "1e30", "nan", "inf", "-inf", "1_0", "+3", "0x10", "²",
    "2147483647", "2147483649", "99999999999999999999", "1e400", "0.9999999", "-0"])  # fmt: skip
PATHS = st.sampled_from([
    "ckpt.pt", "new.pt", "old.txt", "old.png", "folder", "folder/", "new/", "missing/new.png", "/dev/null",
    "/", ".", "..", "out.png", "out.gif", "out.webp", "out.npz", "out.PNG", "out.jpg", "out", "glyphs",
    "cifar10", "images", "~", "a\nb.png", "ünï.png", "x" * 240 + ".png", "old.txt/new.png", "log.jsonl",
    ".hidden.png", "out.png/", "folder/../new.pt", "broken.pt"])  # fmt: skip
WORDS = st.sampled_from(
    "yes no none cosine linear exponential beta beta_tilde ema raw auto cpu cpu:0 cpu:7 cuda cuda:99 mps "
    "meta xla fp32 bf16 fp16 0 1 2 9 10 32 8x8 16x24 8x 0x8 x 1x1 7 64 glyphs cifar10 folder images".split()
)


@st.composite
def calls(draw):
    """A command with up to five flags, of it or of another, each with a value that may fit or not."""
    module = draw(st.sampled_from([train, train, sample, sample, evaluate]))
    flags = list(SMALL[module]) if module is train or draw(st.integers(0, 9)) else []
    for _ in range(draw(st.integers(1, 4))):
        f = draw(st.sampled_from(fields(module.Config)))
        name = "--" + f.name.replace("_", "-")
        if draw(st.integers(0, 5)):
            flags += [name] if f.type in (bool, bool | None) else [name, draw(fitting(f))]
        else:
            value = draw(NUMBERS | WORDS | PATHS | TEXTS)
            flags += draw(
                st.sampled_from([[name, value], [f"{name}={value}"], [name], [value], ["-h"]])
            )
    return module, flags


def fitting(f):
    """Values of the type that the flag takes, or nearly."""
    if f.metadata["choices"]:
        return st.sampled_from([str(choice) for choice in f.metadata["choices"]])
    if f.type in (str, str | None):
        return st.sampled_from("cpu 0 7 8 8x16 images cifar10".split()) | PATHS
    whole = st.integers(0, 12).map(str) | st.sampled_from(["-1", "16"])
    if f.name != "epochs":  # which would be taken at its word
        whole |= st.just("2147483648")
    return (
        whole
        if f.type in (int, int | None)
        else st.sampled_from("0 0.1 0.5 0.999 1 1e-3 2 1e30".split())
    )


def wrong_call(rng):
    """Twenty command lines: status 0, 1 or 2; one line; nothing half-written, nothing clobbered."""

    @hypothesis.seed(rng.randrange(2**32))
    @hypothesis.settings(max_examples=20, deadline=None, database=None, phases=[hypothesis.Phase.generate],
                         suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
    @hypothesis.given(calls())
    def run(call):
        module, flags = call
        for path in pathlib.Path().iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        os.mkdir("folder"), os.mkdir("images")
        pathlib.Path("folder", "old.txt").write_text("old")
        Image.new("RGB", (9, 9)).save("images/a.png")
        Image.new("RGB", (9, 9)).save("old.png")
        pathlib.Path("old.txt").write_text("old")
        pathlib.Path("broken.pt").write_bytes(WHOLE_BYTES[:5000])
        pathlib.Path("ckpt.pt").write_bytes(WHOLE_BYTES)
        before = {p: p.read_bytes() for p in pathlib.Path().rglob("*") if p.is_file()}

        def fault():
            cifar10.URL = "http://127.0.0.1:9/nothing"
            torch._dynamo.config.disable = (
                True  # --compile takes minutes, the first time on a machine
            )

        done = command(module, *flags, fault=fault, memory=6 << 30, seconds=100)
        assert done.status in (0, 1, 2), (call, done)
        if done.status:
            assert sum(".py: error: " in line for line in done.err.splitlines()) == 1, (call, done)
        assert "Traceback" not in done.err, (call, done)
        for path in pathlib.Path().rglob("*"):
            assert not path.name.endswith(".partial"), (call, path)
            if path.is_file() and path.read_bytes() != before.get(path):
                assert whole(path, flags), (call, path, done)
        for path, content in before.items():
            assert path.read_bytes() or not content, (call, path)

    run()


def whole(path, flags):
    """A file that a command wrote can be read: a log, whatever it is called, or what its name says."""
    kind = path.suffix.lower()
    logs = [flag.removeprefix("--log=") for before, flag in zip(["", *flags], flags)
            if before == "--log" or flag.startswith("--log=")]  # fmt: skip
    if os.path.realpath(path) in map(os.path.realpath, logs) or kind == ".jsonl":
        return all("loss" in json.loads(line) for line in path.read_text().splitlines())
    if kind == ".u8":
        return True
    try:
        checkpoint.load(path)
        return True
    except errors.Failure:
        pass
    with contextlib.suppress(Exception):
        if kind in (".png", ".gif", ".webp"):
            Image.open(path).load()
        elif kind == ".npz":
            np.load(path)["arr_0"]
        else:
            return False
        return True
    return False


# --- All of it -----------------------------------------------------------------------------------

FAULTS = [
    ("training killed", "SIGKILL at a random line of code, up to three times", 130, killed_at_a_line),
    ("training killed in a write", "SIGKILL at a random byte of a checkpoint or grid", 50, killed_in_a_write),
    ("training stopped", "SIGTERM at a random line of code", 40,
     functools.partial(stopped, signal.SIGTERM)),
    ("training interrupted", "Ctrl-C at a random line of code", 40,
     functools.partial(stopped, signal.SIGINT)),
    ("sampling interrupted", "one of six signals at a random line of code", 80, sampling_interrupted),
    ("full disk", "no file may grow beyond a random number of bytes", 40, full_disk),
    ("two trainers, one file", "both at once: one is refused; the file is read meanwhile", 5, two_trainers),
    ("numbers gone wrong", "nan or inf in loss, gradient or average; bf16, fp32", 60, not_a_number),
    ("a process dies", "SIGKILL to one of torchrun's two, then --resume with one", 2, one_process_dies),
    ("long runs", "3,000 steps, memory compared with that at 500", 1, memory_stays),
    ("corrupted checkpoints", "cut, flipped, blanked, foreign, with code; --resume and --ckpt", 500,
     corrupted_checkpoint),
    ("wrong checkpoints", "sealed, but a part missing, or of another type or shape", 100, wrong_contents),
    ("hostile images", "cut, flipped, bombs, none at all, odd modes and names", 300, hostile_image),
    ("failing machine", "few open files while a folder is read", 20, failing_machine),
    ("damaged caches", "cut, flipped, blanked, without its first images", 40, damaged_cache),
    ("large folders", "100,000 files", 1, many_files),
    ("wrong calls", "20 command lines of random flags and values each, by Hypothesis", 60, wrong_call),
]  # fmt: skip


def survive(item):
    """One fault, in an empty folder: (kind, None if survived or what went wrong, remark)."""
    (name, _, _, function), seed = item
    rng, home = random.Random(f"{name} {seed}"), os.getcwd()
    with tempfile.TemporaryDirectory() as empty:
        os.chdir(empty)
        try:
            return name, None, function(rng)
        except BaseException as error:
            text = "".join(traceback.format_exception(error))
            return name, f"{name}, seed {seed}: {text[-3000:]}", None
        finally:
            os.chdir(home)


def main(word):
    global WHOLE, WHOLE_BYTES, BYTES, LINES, SAMPLING_LINES
    torch.set_num_threads(1)
    chosen = [fault for fault in FAULTS if word in fault[0]]
    with tempfile.TemporaryDirectory() as home, contextlib.chdir(home):
        WHOLE, WHOLE_BYTES, BYTES, LINES, SAMPLING_LINES = undisturbed()
    items = [(fault, seed) for fault in chosen for seed in range(fault[2])]
    counts, remarks, began, lost = {}, {}, time.monotonic(), 0
    print("| fault | how it is injected | runs | survived |\n|---|---|---|---|")
    for (name, how, runs, _), (_, wrong, remark) in zip(
            (fault for fault, _ in items), in_parallel(survive, items), strict=True):  # fmt: skip
        counts.setdefault(name, [0, 0])
        counts[name][bool(wrong)] += 1
        remarks[name] = remark or remarks.get(name)
        if wrong:
            lost += 1
            print(wrong, file=sys.stderr, flush=True)
        if sum(counts[name]) == runs:
            note = f" ({remarks[name]})" if remarks[name] else ""
            print(f"| {name} | {how} | {runs} | {counts[name][0]}{note} |", flush=True)
    print(
        f"\n{len(items) - lost} of {len(items)} faults survived, {time.monotonic() - began:.0f} s"
    )
    return 1 if lost or not chosen else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(" ".join(sys.argv[1:])))

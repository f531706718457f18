"""Inject faults into the real commands and check what docs/reliability.md promises.

    python tests/faults.py            all kinds (about five minutes on two cores)
    python tests/faults.py killed     the kinds whose name contains this text

The exit status is 1 if a promise is broken. Each fault is a function of a seed, so a failure can be
repeated. The disturbed run is small: 20 digits, batches of 8, dropout, flips, a checkpoint and a grid
after each of 4 epochs, 10 steps. Needs Linux or macOS.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import pickle
import random
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass, fields

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "commands"))

import torch
import torch._dynamo  # the optimiser imports it: once here, instead of in every child process
from PIL import Image
from running import ROOT, equal

import evaluate
import sample
import train
from support import checkpoint, command, files

RUN = (
    "--log log.jsonl --limit 20 --batch-size 8 --epochs 4 --width 4 --timesteps 4 --dropout 0.1 "
    "--flip yes --sample-every 1 --precision fp32 --micro-batch 8 --device cpu"
).split()
RESUME = "--resume ckpt.pt --log log.jsonl".split()
SAMPLE = "--ckpt ckpt.pt --out grid.png --n 4 --device cpu".split()
STEPS = 10

# --- Run a command in a child process -------------------------------------------------------------


@dataclass
class Result:
    """The exit status of a command (minus the signal that killed it) and its outputs."""

    status: int
    out: str
    err: str

    def is_error(self, status=1):
        """Check that the command ended with this status and one line; return the line."""
        assert self.status == status, self
        lines = [line for line in self.err.splitlines() if ".py: error: " in line]
        assert len(lines) == 1, self
        assert "Traceback" not in self.err, self
        return lines[0]


def call(module, *flags, fault=lambda: None):
    """Run a command in a forked child, in the current folder, after calling fault()."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            child(module, flags, fault, out, err)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        return Result(status, out.read(), err.read())


def child(module, flags, fault, out, err):
    """Run the command and end the process. It never returns."""
    status = 70  # a bug
    try:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout = open(1, "w", closefd=False, buffering=1)
        sys.stderr = open(2, "w", closefd=False, buffering=1)
        signal.alarm(120)
        sys.argv = [f"{module.__name__}.py", *map(str, flags)]
        fault()
        command.run(module.main, module.Config, module.__doc__)
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def on_each_line(action):
    """Call action() before each line of this project's code that runs from now on."""
    ours = {str(path) for path in (*ROOT.glob("*.py"), *ROOT.glob("support/**/*.py"))}

    def in_frame(frame, event, arg):
        if event == "line":
            action()
        return in_frame

    def trace(frame, event, arg):
        code = frame.f_code
        return in_frame if code.co_filename in ours and code.co_name != "run" else None

    sys.settrace(trace)


def signal_at_line(n, number):
    """Send a signal to this process at the n-th line."""
    lines = itertools.count(1)
    on_each_line(lambda: next(lines) == n and os.kill(os.getpid(), number))


class Dying(io.FileIO):
    """A file that kills the process after `left` bytes have been written to all such files."""

    left = math.inf

    def write(self, data):
        data = memoryview(data).cast("B")
        if len(data) > Dying.left:
            super().write(data[: Dying.left])
            os.kill(os.getpid(), signal.SIGKILL)
        Dying.left -= len(data)
        return super().write(data)


def die_at_byte(n):
    Dying.left = n
    files.open = Dying  # hides the built-in open in support/files.py


def undisturbed():
    """Run once without a fault: {checkpoint, its bytes, number of bytes written, lines of code}."""
    lines = itertools.count()
    main = train.main

    def counting_main(*args):
        main(*args)
        print("lines:", next(lines))

    def count():
        train.main = counting_main
        on_each_line(lambda: next(lines))

    done = call(train, *RUN, fault=count)
    assert done.status == 0, done
    content = pathlib.Path("ckpt.pt").read_bytes()
    written = 4 * len(content) + sum(p.stat().st_size for p in pathlib.Path().glob("*.png"))
    count_of_lines = int(done.out.split("lines: ")[1])
    return dict(
        ckpt=checkpoint.load("ckpt.pt"), content=content, written=written, lines=count_of_lines
    )


def check_resumed_run_is_identical():
    """Finish the run from the existing checkpoint, if any, and compare with the undisturbed run."""
    if not os.path.exists("ckpt.pt"):
        done = call(train, *RUN)
        assert done.status == 0, done
    elif checkpoint.load("ckpt.pt")["step"] < STEPS:
        done = call(train, *RESUME)
        assert done.status == 0, done
    end = checkpoint.load("ckpt.pt")
    for part in ("model", "ema", "optimizer", "step"):
        assert equal(end[part], WHOLE["ckpt"][part]), f"{part} differs from the undisturbed run"
    log = [json.loads(line) for line in open("log.jsonl")]
    assert log[-1]["step"] == STEPS


# --- Promises 1 and 2: complete files, and resuming with equal bits -------------------------------


def killed(rng):
    """SIGKILL at a random line of code, up to three times in a row."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        flags = RESUME if os.path.exists("ckpt.pt") else RUN
        if flags == RESUME and checkpoint.load("ckpt.pt")["step"] == STEPS:
            break
        n = rng.randrange(1, WHOLE["lines"])
        done = call(train, *flags, fault=functools.partial(signal_at_line, n, signal.SIGKILL))
        assert done.status in (-signal.SIGKILL, 0), done
    check_resumed_run_is_identical()


def killed_in_a_write(rng):
    """SIGKILL at a random byte of a checkpoint or grid."""
    n = rng.randrange(WHOLE["written"])
    done = call(train, *RUN, fault=functools.partial(die_at_byte, n))
    assert done.status in (-signal.SIGKILL, 0), done
    check_resumed_run_is_identical()


def stopped(rng):
    """Ctrl-C, SIGTERM or a closed terminal at a random line of code."""
    number = rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    n = rng.randrange(1, WHOLE["lines"])
    done = call(train, *RUN, fault=functools.partial(signal_at_line, n, number))
    assert done.status in (0, 128 + number), done
    assert "Traceback" not in done.err, done
    if "stopped at step" in done.out:
        step = int(done.out.split("stopped at step ")[1].split()[0])
        assert checkpoint.load("ckpt.pt")["step"] == step
    assert not list(pathlib.Path().glob(".*.partial"))
    check_resumed_run_is_identical()


def sampling_interrupted(rng):
    """A signal while sample.py replaces a picture: the old one stays, or the new one is complete."""
    pathlib.Path("ckpt.pt").write_bytes(WHOLE["content"])
    pathlib.Path("grid.png").write_text("old")
    n = rng.randrange(1, 2000)
    done = call(sample, *SAMPLE, fault=functools.partial(signal_at_line, n, signal.SIGTERM))
    assert done.status in (0, 128 + signal.SIGTERM), done
    if pathlib.Path("grid.png").read_bytes() != b"old":
        Image.open("grid.png").load()
    assert sorted(os.listdir()) == ["ckpt.pt", "grid.png"]


def full_disk(rng):
    """No file may become larger than a random number of bytes, while a run is resumed."""
    stop = functools.partial(signal_at_line, WHOLE["lines"] // 2, signal.SIGTERM)
    assert "stopped at step" in call(train, *RUN, fault=stop).out
    before = pathlib.Path("ckpt.pt").read_bytes()
    limit = rng.randrange(2000, len(WHOLE["content"]) - 2000)
    limits = (resource.RLIMIT_FSIZE, (limit, limit))
    done = call(train, *RESUME, fault=functools.partial(resource.setrlimit, *limits))
    assert "ckpt.pt: " in done.is_error()
    assert pathlib.Path("ckpt.pt").read_bytes() == before
    check_resumed_run_is_identical()


def process_of_torchrun_dies(rng):
    """SIGKILL to one of torchrun's two processes; one process resumes their checkpoint."""
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 --".split()
    flags = (
        " ".join(RUN).replace("--epochs 4", "--epochs 400").replace("every 1", "every 2").split()
    )
    command_line = [sys.executable, *torchrun, str(ROOT / "train.py"), *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    run = subprocess.Popen(command_line, **pipes)
    for line in run.stdout:
        if line.startswith("epoch 4"):
            break
    children = pathlib.Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(rng.choice(children)), signal.SIGKILL)
    out, err = run.communicate(timeout=120)
    assert run.returncode != 0
    assert 'train.py", line' not in err, out + err  # no traceback of ours
    step = checkpoint.load("ckpt.pt")["step"]
    done = call(train, *RESUME, "--epochs", math.ceil((step + 1) * 8 / 20))
    assert done.status == 0, done


# --- Promises 3 and 4: damaged checkpoints --------------------------------------------------------


class Owned:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch owned",)


def check_checkpoint_is_rejected(content):
    pathlib.Path("ckpt.pt").write_bytes(content)
    for module, flags in ((train, RESUME), (sample, SAMPLE)):
        assert "ckpt.pt: " in call(module, *flags).is_error()
    assert os.listdir() == ["ckpt.pt"], "another file was created"
    assert pathlib.Path("ckpt.pt").read_bytes() == content


def damaged_checkpoint(rng):
    """Flip a bit, cut, lengthen or blank a checkpoint."""
    content = bytearray(WHOLE["content"])
    place = rng.randrange(len(content))
    kind = rng.choice(["flip", "cut", "lengthen", "blank"])
    if kind == "flip":
        content[place] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        content = content[:place]
    elif kind == "lengthen":
        content += rng.randbytes(rng.randrange(1, 100))
    else:
        content[place : place + 64] = bytes(b ^ 255 for b in content[place : place + 64])
    check_checkpoint_is_rejected(bytes(content))


def checkpoint_with_code(rng):
    """A pickle that would run code, with a correct checksum."""
    file = io.BytesIO()
    if rng.random() < 0.5:
        torch.save({"ddpm_format": 2, "model": Owned()}, file)
    else:
        file.write(pickle.dumps(Owned()))
    content = file.getvalue() + checkpoint.SEAL
    content += hashlib.sha256(file.getvalue()).digest()
    check_checkpoint_is_rejected(content)


def checkpoint_of_other_types(rng):
    """Remove or replace a field of a checkpoint, with a correct checksum."""
    ckpt = dict(WHOLE["ckpt"])
    name = rng.choice(sorted(set(ckpt) - {"ddpm_format", "held_out", "split"}))
    if rng.random() < 0.3:
        del ckpt[name]
    else:
        ckpt[name] = rng.choice([None, "text", 1.5, [], {}, torch.zeros(2)])
    checkpoint.save("ckpt.pt", ckpt)
    content = pathlib.Path("ckpt.pt").read_bytes()
    done = call(train, *RESUME)
    # Without its config, a checkpoint is weights without a run: then --resume is a wrong call.
    assert done.status in (1, 2), done
    assert "ckpt.pt" in done.is_error(done.status)
    assert pathlib.Path("ckpt.pt").read_bytes() == content


# --- Promises 5, 6 and 7: nothing is overwritten, errors are one line, nothing is silent ----------


def consecutive_runs(rng):
    """Several runs with the same --out: each result remains."""
    contents = []
    for seed in range(3):
        done = call(train, *RUN, "--seed", seed)
        assert done.status == 0, done
        contents.append(pathlib.Path("ckpt.pt").read_bytes())
    kept = {path.read_bytes() for path in pathlib.Path().glob("ckpt*.pt")}
    assert kept == set(contents)
    assert len(pathlib.Path("log.jsonl").read_text().splitlines()) >= 3 * 4


def broken_image(rng):
    """A damaged image in a folder: the run stops and names it, or skips it with --skip-broken."""
    os.mkdir("images")
    for i in range(10):
        Image.new("RGB", (9, 9), (20 * i, 90, 200)).save(f"images/{i}.png")
    bad = pathlib.Path(f"images/{rng.randrange(10)}.png")
    content = bytearray(bad.read_bytes())
    kind = rng.choice(["cut", "text", "empty", "flip"])
    if kind == "cut":
        content = content[: rng.randrange(1, len(content) - 12)]
    elif kind == "text":
        content = bytearray(b"no image")
    elif kind == "empty":
        content = bytearray()
    else:
        content[rng.randrange(30, 45)] ^= 255  # the compressed pixels or their checksum
    bad.write_bytes(content)
    flags = [*RUN[2:], "--data", "images", "--size", "8"]
    flags = flags[flags.index("--batch-size") :]
    done = call(train, *flags)
    if done.status:
        assert str(bad) in done.is_error()
        done = call(train, *flags, "--skip-broken")
        assert "9 images" in done.out, done
    assert done.status == 0, done


def wrong_call(rng):
    """Random flags and values: one line and status 2 or 1, or success; files stay as they were."""
    values = "0 1 2 -1 1e30 nan 8 7x 8x8 x yes no cosine beta ema cpu cuda:99 fp32 old.txt . / a/b.pt".split()
    pathlib.Path("old.txt").write_text("old")
    pathlib.Path("ckpt.pt").write_bytes(WHOLE["content"])
    for _ in range(5):
        module = rng.choice([train, sample, evaluate])
        flags = [] if module is train else SAMPLE[:2]
        if module is train:
            flags = [*RUN[2:], "--out", "new.pt"]
        for setting in rng.sample(fields(module.Config), rng.randrange(1, 4)):
            name = "--" + setting.name.replace("_", "-")
            if name not in flags and setting.name not in ("compile", "epochs", "minutes", "n"):
                flags += [name] if setting.type is bool else [name, rng.choice(values)]
        done = call(module, *flags)
        assert done.status in (0, 1, 2), (flags, done)
        if done.status:
            done.is_error(done.status)
        assert pathlib.Path("old.txt").read_text() == "old", flags
        assert pathlib.Path("ckpt.pt").read_bytes() == WHOLE["content"], flags
        assert not list(pathlib.Path().glob("**/.*.partial")), flags


# --- All of them ----------------------------------------------------------------------------------

FAULTS = {
    killed: 20,
    killed_in_a_write: 15,
    stopped: 20,
    sampling_interrupted: 10,
    full_disk: 8,
    process_of_torchrun_dies: 1,
    damaged_checkpoint: 30,
    checkpoint_with_code: 6,
    checkpoint_of_other_types: 20,
    consecutive_runs: 2,
    broken_image: 15,
    wrong_call: 15,
}


def inject(item):
    """Inject one fault in an empty folder; return None, or a description of the failure."""
    fault, seed = item
    home = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            fault(random.Random(f"{fault.__name__} {seed}"))
        except Exception:
            return f"{fault.__name__}, seed {seed}:\n{traceback.format_exc()[-3000:]}"
        finally:
            os.chdir(home)


def main(word):
    global WHOLE
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        WHOLE = undisturbed()
    failures = 0
    # Each process handles one fault, because a fault may leave the process in any state.
    with multiprocessing.get_context("fork").Pool(maxtasksperchild=1) as pool:
        for fault, runs in FAULTS.items():
            if word not in fault.__name__:
                continue
            problems = pool.map(inject, [(fault, seed) for seed in range(runs)], chunksize=1)
            problems = [problem for problem in problems if problem]
            failures += len(problems)
            print(f"{fault.__name__}: {runs - len(problems)} of {runs} passed", flush=True)
            for problem in problems[:3]:
                print(problem, flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(" ".join(sys.argv[1:])))

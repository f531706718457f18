"""How the tests run a command: as a process of its own, or (the fixture `call`) inside this one."""

import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import torch
from PIL import Image

from support import command

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ("--limit 64 --batch-size 16 --width 8 --timesteps 20 --warmup 0 --device cpu --precision fp32 "
        "--micro-batch 16 --sample-every 0").split()  # fmt: skip


def start(*command, **how):
    """A command of this project as a process of its own, without a terminal."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, ROOT / command[0], *map(str, command[1:])], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)  # fmt: skip


def run(*command, **how):
    """(exit status, standard output, standard error) of a command."""
    process = start(*command, **how)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def in_process(module, *flags):
    """Run a command inside this process, and return its exit status. Signal handlers are restored."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    argv = sys.argv
    sys.argv = [f"{module.__name__}.py", *map(str, flags)]
    try:
        command.run(module.main, module.Config, module.__doc__)
        return 0
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def equal(a, b):
    """Two checkpoints agree in every number, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return all(map(equal, a, b)) if isinstance(a, (list, tuple)) else a == b


def stripes(W, H):
    """Red, green and blue thirds, side by side."""
    x = np.arange(W) * 3 // W
    return Image.fromarray(np.broadcast_to(255 * np.eye(3, dtype=np.uint8)[x], (H, W, 3)).copy())

"""How the cost grows: a training step's with batch, width and image size; a folder's with its images.

    python benchmarks/cost.py                      on this machine; on a CPU, from a smaller network
    python benchmarks/cost.py --device cuda
    python benchmarks/cost.py --seconds 20         a row ends where a step takes longer (default: 10)

Each network is measured in a process of its own. A step is train.train's: noise, forward, backward,
clipping, Adam, moving average. Memory is the process's peak; on a GPU, a step's own. A folder's
images are linked from a few files of 32x32, so that it is their number that is measured.
"""

import argparse
import multiprocessing
import os
import pathlib
import resource
import tempfile
import time

import numpy as np
import torch
from PIL import Image
from train_speed import by_default, ours, take_turns

import train
from support import batches, devices, recipes
from support.data import folder as folders
from support.errors import out_of_memory

SWEEPS = {
    "batch": (16, 32, 64, 128, 256, 512, 1024),
    "width": (32, 64, 128, 256),
    "size": (32, 64, 128, 256),
}


def setting(device, batch, width, size):
    """Images on the device, and the arguments of the network that train.py would make for them."""
    device = torch.device(device)
    cfg = train.Config(data="folder", size=(size, size), channels=3, width=width)
    cfg = recipes.complete(cfg, set(), device)
    network = recipes.network(cfg, (3, size, size), 0)
    return torch.rand(batch, 3, size, size, device=device), network


def choice(*what):
    """The precision and the images at a time that train.py's trial chooses."""
    x, network = setting(*what)
    cost = by_default(x, **network)
    return cost.precision == "bf16", cost.micro_batch


def step_cost(bf16, images, *what):
    """(seconds, bytes) of a training step, the median of three after two."""
    x, network = setting(*what)
    _, step = ours(x, bf16, False, images, **network)
    seconds, peaks = take_turns({"": step}, 3, x.device)
    return seconds[""], peaks[""] or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def alone(function, *arguments):
    """function(*arguments) in a process of its own, so that nothing is warm but it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def sweep(name, device, base, limit):
    """Prints a row for each value of one of batch, width and size, the others at the base."""
    for value in SWEEPS[name]:
        at = {**base, name: value}
        try:
            how = alone(choice, str(device), *at.values())
            seconds, memory = alone(step_cost, *how, str(device), *at.values())
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            print(
                f"{at['batch']:6} {at['width']:6} {at['size']:5} is out of memory, and {name} beyond it"
            )
            break
        print(f"{at['batch']:6} {at['width']:6} {at['size']:5} {seconds:10.3f} "
              f"{at['batch'] / seconds:10.1f} {memory / 1e9:8.2f} GB", flush=True)  # fmt: skip
        if seconds > limit:
            print(
                f"        beyond it, {name} is left out: a step would take longer than {limit:g} s"
            )
            break


def folder_cost(N):
    """Seconds to read N images the first time and later, batches of 128 a second, bytes."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as root:
        folder = pathlib.Path(root, "images")
        folder.mkdir()
        for i in range(8):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
        for i in range(8, N):
            os.link(folder / f"{i % 8}.png", folder / f"{i}.png")
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            images = folders.load(str(folder), root, (32, 32), 3)[0].images
            seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        for step in range(200):
            images[batches.images_of(step, 128, N, 0)].float()
        rate = 200 / (time.perf_counter() - began)
    return *seconds, rate, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=10)
    given = parser.parse_args()
    device = devices.pick_device(given.device)
    cuda = device.type == "cuda"
    base = dict(batch=128, width=128, size=32) if cuda else dict(batch=16, width=32, size=32)
    name = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{name}, torch {torch.__version__}, precision and images at a time as train.py's trial chooses"
    )
    print(f"{'batch':>6} {'width':>6} {'size':>5} {'s/step':>10} {'images/s':>10} {'memory':>11}")
    for what in SWEEPS:
        sweep(what, device, base, given.seconds)
    print(f"\n{'images':>8} {'read (s)':>10} {'later (s)':>10} {'batches/s':>10} {'memory':>11}")
    for N in (1_000, 10_000, 100_000):
        first, later, rate, memory = alone(folder_cost, N)
        print(f"{N:8,} {first:10.1f} {later:10.2f} {rate:10.0f} {memory / 1e9:8.2f} GB", flush=True)


if __name__ == "__main__":
    main()

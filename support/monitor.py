"""What a run reports while it trains, and the signals that ask it to stop.

Losses are collected on the device. Reading them makes the host wait for it, so they are read only
when a report is due: at the end of an epoch, every 50 steps, and after five seconds.
"""

import contextlib
import json
import math
import os
import signal
import time

import numpy as np
import torch

import ddpm
import improved
from support import batches, budget, checkpoint, command, devices, pictures, sampling, workers
from support.errors import Failure
from support.files import grid_name, replacing, writable
from support.progress import Progress, duration, say


class Monitor:
    """The losses since the last report and of the epoch, and the signals that arrived.

    cfg, run: the settings and the run of train.py.
    """

    def __init__(self, cfg, run, device):
        self.cfg = cfg
        self.run = run
        self.device = device
        self.steps = math.ceil(cfg.epochs * run.about["images"] / cfg.batch_size)
        self.progress = Progress("training", self.steps, "steps", run.step)
        self.losses = []  # since the last report, on the device
        self.epoch_losses = []  # the mean loss of each report in this epoch, once for each step
        self.began = self.epoch_began = self.reported_at = time.monotonic()
        self.signals = []  # that this process received
        self.stopping = False  # whether any process received one
        command.on_ending_signals(self.stop)

    def describe(self, d, cost, why):
        """Print what is about to happen: data, network, settings and their reason, time and memory."""
        cfg = self.cfg
        about = self.run.about
        C, H, W = about["shape"]
        classes = about["classes"]
        names = ", ".join(classes[:10]) + (", ..." if classes[10:] else "")
        names = f", {len(classes)} classes ({names})" if classes else ""
        held = f"{about['held_out']:,} more are" if about["held_out"] else "none is"
        say(f"{cfg.data}: {about['images']:,} images, {H}x{W}x{C}{names}; {held} held out")
        weights = sum(p.numel() for p in self.run.net.parameters())
        schedule = about["process"]["schedule"]
        say(f"UNet with {weights:,} parameters on {self.device}; {schedule} schedule, T = {d.T}")
        names = "batch_size lr warmup decay ema dropout flip variance seed".split()
        say(", ".join(f"{name} {getattr(cfg, name)}" for name in names))
        say(f"settings: {why}")
        say(f"a step: {cost}")
        since = f", from step {self.run.step:,}" if self.run.step else ""
        left = duration((self.steps - self.run.step) * cost.seconds)
        say(f"{cfg.epochs} epochs, {self.steps:,} steps{since}: about {left}")

    def stop(self, number, frame):
        """Handle a signal: answer at once. A second Ctrl-C ends the run without a checkpoint."""
        self.signals.append(number)
        if number == signal.SIGINT and len(self.signals) > 1:
            command.on_ending_signals(command.interrupt)
            command.interrupt(number, frame)
        if workers.is_first() and len(self.signals) == 1:
            text = b"\nstopping after this step; Ctrl-C again to stop now, without a checkpoint\n"
            with contextlib.suppress(OSError):  # not print, which the signal may have interrupted
                os.write(2, text)

    def epochs(self, step):
        """Return the number of epochs after a step. The last step may go a little beyond them."""
        return min(self.cfg.epochs, step * self.cfg.batch_size / self.run.about["images"])

    def ends(self, every=1):
        """Return whether the last step completed an epoch whose number `every` divides, or the run."""
        step = self.run.step
        return self.epochs(step) // every > self.epochs(step - 1) // every or step == self.steps

    def due(self):
        """Return whether to report now. Several processes decide by the step, since they must agree."""
        step = self.run.step
        if workers.several():
            return self.ends() or step % 10 == 0
        waited = time.monotonic() - self.reported_at > 5
        return self.ends() or step % 50 == 0 or waited or bool(self.signals)

    def report(self, lr, held_out_loss):
        """Show and log the mean loss since the last report; at the end of an epoch, also held_out_loss().

        Raises Failure if the loss is not finite.
        """
        count = len(self.losses)
        loss = torch.stack(self.losses).mean()
        numbers = torch.stack([loss, torch.full_like(loss, len(self.signals))])
        loss, signals = workers.total(numbers).cpu().tolist()  # the only wait for the device
        loss /= workers.place()[1]
        self.stopping = signals > 0
        check_finite(self.cfg, self.run.step, loss, "loss")
        self.losses.clear()
        self.epoch_losses += [loss] * count
        if not workers.is_first():
            return
        now = time.monotonic()
        step = self.run.step
        total = self.cfg.epochs
        epochs = self.epochs(step)
        line = dict(step=step, epoch=epochs, loss=loss)
        self.progress(step, f"epoch {min(int(epochs) + 1, total)} of {total}  loss {loss:.4f}")
        if self.ends():
            self.progress.close()
            text = f"epoch {int(epochs)} of {total}: loss {np.mean(self.epoch_losses):.4f}"
            held_out = held_out_loss()
            if held_out is not None:
                line["held_out"] = held_out
                text += f", held out {held_out:.4f}"
            say(f"{text}, {duration(now - self.epoch_began)}")
        if self.cfg.log:
            line.update(lr=lr, images_per_s=count * self.cfg.batch_size / (now - self.reported_at))
            line.update(memory_gb=budget.used(self.device) / 1e9, seconds=now - self.began)
            with open(self.cfg.log, "a") as file:
                file.write(json.dumps(line) + "\n")

    def restart_clocks(self):
        """Exclude the time since the report, of saving and sampling, from speed and epochs."""
        self.reported_at = time.monotonic()
        if self.ends():
            self.epoch_began = self.reported_at
            self.epoch_losses.clear()


def check_finite(cfg, step, number, name):
    """Raise Failure if a number, the loss or a sum of weights, is not finite."""
    if not math.isfinite(number):
        raise Failure(
            f"step {step}: the {name} is {float(number)}; try a lower --lr or a longer --warmup. "
            f"This step is not saved; --resume continues from {cfg.out}, if it exists"
        )


def open_log(path):
    """Make sure that the log can be written, and that its last line ends.

    Raises Failure if `path` exists and is not a log of train.py.
    """
    writable(path, "--log")
    if not os.path.exists(path) or not os.path.getsize(path):
        return
    with open(path, "r+b") as file:
        first = file.readline(10_000)
        if not (first.startswith(b'{"step"') and b'"loss"' in first):
            raise Failure(f"--log {path}: exists, and is not a log of train.py; name another file")
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":  # a killed run wrote half a line, or somebody edited the file
            file.write(b"\n")


# --- Looks at the network, which take little time beside training --------------------------------


@torch.no_grad()
def held_out_loss(cfg, run, d, held_out, device):
    """Return the simple loss of the average weights on held-out images, or None without such images.

    Timesteps and noise are the same each time. It computes on an eighth as many images as an epoch.
    """
    if not len(held_out.images):
        return None
    count = min(512, max(16, run.about["images"] // 8))
    total = 0.0
    for x0, y, t, eps in batches.fixed_batches(held_out, d.T, count, cfg.micro_batch, device):
        model = run.ema if y is None else lambda xt, t, y=y: run.ema(xt, t, y)
        if checkpoint.learned(run.about):
            model = improved.eps_only(model)
        with devices.autocast(device, cfg.precision):
            total = total + ddpm.loss_simple(model, d, x0, t, eps) * len(x0)
    return (total / count).item()


def write_grid(cfg, run, d, epoch, device):
    """Write a grid of samples beside the checkpoint, in the time of a few training steps."""
    # Noise at every step (eta 1, or a learned variance) corrects the errors of a young network,
    # where eta 0 leaves specks. A training step costs three passes over its batch, and a grid
    # four steps.
    classes = run.about["classes"]
    n = max(16, min(40, 4 * len(classes)))
    y, rows = sampling.class_labels(classes[:20], n=n)
    how = dict(variance="learned") if checkpoint.learned(run.about) else dict(eta=1.0)
    how.update(steps=min(d.T, 50, max(8, 12 * cfg.batch_size // n)))
    how.update(clip=run.about["process"]["clip"])
    images = []
    for first in range(0, n, cfg.micro_batch):
        part = slice(first, first + cfg.micro_batch)
        with devices.autocast(device, cfg.precision):
            x0 = sampling.sample(run.ema, d, run.about["shape"], range(n)[part], y[part], **how)
        images.append(pictures.to_uint8(x0))
    with replacing(grid_name(run.out, epoch)) as file:
        pictures.grid(np.concatenate(images), rows).save(file, "PNG")

"""What a run reports while it trains, and the signals that ask it to stop.

Losses are added up on the device. Reading them makes the host wait for it, so that they are read only
when a report is due: at the end of an epoch, every 50 steps, and after five seconds.
"""

import json
import math
import os
import signal
import time

import torch

from support import command, devices, workers
from support.errors import Failure, UsageError
from support.files import writable
from support.progress import Progress, duration, note, say


class Monitor:
    """The losses since the last report and of the epoch, and the first number that is not finite.

    cfg: the settings of train.py. images: how many there are. The run goes from `step` to `steps`.
    """

    def __init__(self, cfg, images, step, steps, device):
        self.cfg, self.N, self.steps = cfg, images, steps
        self.progress = Progress("training", steps, "steps", step) if workers.is_first() else None
        self.losses = torch.zeros(2, device=device)  # their sum, and how many
        self.epoch_losses = torch.zeros(2)
        self.bad = torch.zeros(3, device=device)  # the first step, loss and gradient that are not finite
        self.reported, self.reported_at = step, time.monotonic()
        self.epoch_began, self.stops = time.monotonic(), []
        self.log = cfg.log
        if cfg.log:
            end_last_line(cfg.log)  # a log that cannot be written is refused here

    def describe(self, run, d, bf16):
        """Prints what is about to happen: data, network, diffusion, settings and steps."""
        if not workers.is_first():
            return
        cfg, (C, H, W), K = self.cfg, run.about["shape"], len(run.about["classes"])
        say(f"{cfg.data}: {self.N:,} images, {H}x{W}x{C}" + (f", {K} classes" if K else ""))
        say(f"UNet with {sum(p.numel() for p in run.net.parameters()):,} parameters on "
            f"{devices.title(self.losses.device)}, {'bf16' if bf16 else 'fp32'}; "
            f"{run.about['process']['schedule']} schedule, T = {d.T}, variance {cfg.variance}")
        say(f"batch {cfg.batch_size}, lr {cfg.lr:g}, warm-up {cfg.warmup}, decay {cfg.decay}, "
            f"ema {cfg.ema:g}, dropout {cfg.dropout:g}, flip {cfg.flip}, seed {cfg.seed}")
        say(f"{cfg.epochs} epochs, {self.steps:,} steps" + (f", from step {run.step:,}" if run.step else ""))
        if d.alpha_bar[-1] > 0.01:
            note(f"note: alpha_bar_T = {d.alpha_bar[-1]:.2g}: x_T is not yet noise, and samples will be "
                 f"poor; a longer --timesteps or --schedule cosine helps")

    def epoch(self, step):
        """Epochs that are complete after so many steps."""
        return step * self.cfg.batch_size // self.N

    def ends(self, step, every=1):
        """Whether this step completes an epoch whose number `every` divides, or the run."""
        return self.epoch(step) // every > self.epoch(step - 1) // every or step == self.steps

    def add(self, step, loss, norm):
        """Takes note of a step: tensors on the device, which nothing waits for here."""
        self.losses += torch.stack([loss, torch.ones_like(loss)])
        state = torch.stack([torch.full_like(norm, step), loss, norm])
        self.bad = torch.where((self.bad[0] == 0) & ~state.isfinite().all(), state, self.bad)

    def due(self, step):
        """Whether to report now. Several processes decide by the step, since they must agree."""
        if workers.several():
            return self.ends(step) or step % 10 == 0
        soon = self.stops or time.monotonic() - self.reported_at > 5
        return bool(self.ends(step) or soon or step % 50 == 0)

    def report(self, step, lr):
        """Shows and logs the mean loss since the last report. Raises Failure if a number is not finite."""
        stops = torch.tensor([float(len(self.stops))], device=self.losses.device)
        everyone = workers.total(torch.cat([self.losses, stops])).cpu()
        if everyone[2] and not self.stops:  # another process was asked to stop
            self.stops.append(signal.SIGTERM)
        if self.bad[0]:
            self.refuse_infinite(int(self.bad[0]), *self.bad[1:].tolist())
        losses, now = everyone[:2], time.monotonic()
        speed = (step - self.reported) * self.cfg.batch_size / (now - self.reported_at)
        self.epoch_losses += losses
        self.losses.zero_()
        self.reported, self.reported_at = step, now
        if workers.is_first():
            mean = (losses[0] / losses[1]).item()
            epoch = min(self.epoch(step) + 1, self.cfg.epochs)
            self.progress(step, f"epoch {epoch} of {self.cfg.epochs}  loss {mean:.4f}")
            self.write(step=step, epoch=step * self.cfg.batch_size / self.N, loss=mean,
                       images_per_s=speed, lr=lr)
            if self.ends(step):
                self.report_epoch(step, now)

    def report_epoch(self, step, now):
        self.progress.close()
        mean = self.epoch_losses[0] / self.epoch_losses[1]
        say(f"epoch {min(self.epoch(step), self.cfg.epochs)} of {self.cfg.epochs}: loss {mean:.4f}, "
            f"{duration(now - self.epoch_began)}")
        self.epoch_losses.zero_()
        self.epoch_began = now

    def write(self, **line):
        """Appends a JSON line to the log. A log that cannot be written any more does not end the run."""
        if self.log:
            try:
                with open(self.log, "a") as file:
                    print(json.dumps(line), file=file)
            except OSError as error:
                note(f"note: --log {self.log}: {error.strerror}; the run goes on without it")
                self.log = None

    def refuse_infinite(self, step, *numbers):
        """Raises Failure if one of loss, gradient, weights and average, in this order, is not finite."""
        for what, number in zip(("loss", "gradient", "weights", "moving average"), numbers, strict=False):
            if not math.isfinite(number):
                raise Failure(f"step {step}: the {what}: {number}; a lower --lr or a longer --warmup may "
                              f"help. It is not saved; --resume goes on from {self.cfg.out}, if there is one")

    def listen(self):
        """From now on, Ctrl-C and the other signals that end a command ask it to stop after the step."""
        command.on_ending_signals(self.stop)

    def stop(self, number, frame):
        """The signal handler. A second Ctrl-C ends the run at once, without a checkpoint."""
        self.stops.append(number)
        if number == signal.SIGINT and len(self.stops) > 1:
            raise KeyboardInterrupt


def end_last_line(path):
    """Makes the log end with a whole line: a run that was killed may have left half of one."""
    with open(path, "a+b") as file:
        file.seek(max(0, os.path.getsize(path) - 10_000))
        *_, last = file.read().split(b"\n")
        if last:
            file.truncate(os.path.getsize(path) - len(last))


def refuse_log(path, others):
    """Raises an error if `path` cannot be written, is one of the files `others`, or exists and is no log."""
    writable(path)
    if os.path.realpath(path) in map(os.path.realpath, others):
        raise UsageError(f"--log {path}: is the checkpoint; name another file")
    if os.path.isfile(path) and os.path.getsize(path):
        with open(path, "rb") as file:
            first = file.readline(10_000)
        try:
            known = {"step", "loss"} <= set(json.loads(first))
        except (ValueError, TypeError, RecursionError):
            known = False
        if not known:
            raise Failure(f"--log {path}: exists, and is not a log of train.py; name another file")

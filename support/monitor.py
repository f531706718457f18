"""What a run reports while it trains, and the signals that ask it to stop.

Losses are added up on the device. Reading them makes the host wait for it, so that they are read only
when a report is due: at the end of an epoch, every 50 steps, and after five seconds.
"""

import contextlib
import json
import math
import os
import signal
import time

import torch

from support import budget, command, devices, workers
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
        self.bad = torch.zeros(
            3, device=device
        )  # the first step, loss and gradient that are not finite
        self.began = self.epoch_began = self.reported_at = time.monotonic()
        self.reported, self.log = step, cfg.log
        self.stops, self.stopping = [], False  # the signals; whether all processes know of one
        if cfg.log:
            end_last_line(cfg.log)  # a log that cannot be written is refused here

    @contextlib.contextmanager
    def aside(self):
        """What happens inside is no training: its time is not an epoch's, nor that of steps."""
        start = time.monotonic()
        yield
        spent = time.monotonic() - start
        self.epoch_began, self.reported_at = self.epoch_began + spent, self.reported_at + spent
        if self.progress:
            self.progress.began += spent

    def describe(self, run, d, cost, why):
        """Prints what is about to happen: data, network, settings and why, steps, time and memory."""
        if not workers.is_first():
            return
        cfg, about, device = self.cfg, run.about, self.losses.device
        (C, H, W), K, held = about["shape"], len(about["classes"]), about["held_out"]
        say(
            f"{cfg.data}: {self.N:,} images, {H}x{W}x{C}"
            + (f", {K} classes" if K else "")
            + (f"; {held:,} more are held out" if held else "; none are held out of so few")
        )
        say(
            f"UNet with {sum(p.numel() for p in run.net.parameters()):,} parameters on "
            f"{devices.title(device)}; {about['process']['schedule']} schedule, T = {d.T}, variance "
            f"{cfg.variance}"
        )
        say(
            f"batch {cfg.batch_size}, lr {cfg.lr:g}, warm-up {cfg.warmup}, decay {cfg.decay}, "
            f"ema {cfg.ema:g}, dropout {cfg.dropout:g}, flip {cfg.flip}, seed {cfg.seed}"
        )
        say(f"settings: {why}")
        say(f"a step: {cost}")
        left = self.steps - run.step
        say(
            f"{cfg.epochs} epochs, {self.steps:,} steps"
            + (f", from step {run.step:,}" if run.step else "")
            + f": about {duration(left * cost.seconds)}"
            + ("" if run.step else " in all")
        )

    def epoch(self, step):
        """Epochs that are complete after so many steps; the last step may go a little beyond them."""
        return min(self.cfg.epochs, step * self.cfg.batch_size // self.N)

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

    def report(self, step, lr, held_out):
        """Shows and logs the mean loss since the last report; at the end of an epoch, also held_out(), the
        loss on images held out, or None. Raises Failure if a number is not finite."""
        stops = torch.tensor([float(len(self.stops))], device=self.losses.device)
        everyone = workers.total(torch.cat([self.losses, stops])).cpu()
        self.stopping = bool(everyone[2])
        if self.stopping and not self.stops:  # another process was asked to stop
            self.stops.append(signal.SIGTERM)
        if self.bad[0]:
            self.refuse_infinite(int(self.bad[0]), *self.bad[1:].tolist())
        losses, now = everyone[:2], time.monotonic()
        speed = (step - self.reported) * self.cfg.batch_size / (now - self.reported_at)
        self.epoch_losses += losses
        self.losses.zero_()
        self.reported, self.reported_at = step, now
        if not workers.is_first():
            return
        mean, began, line = (losses[0] / losses[1]).item(), self.epoch_began, {}
        self.progress(
            step,
            f"epoch {min(self.epoch(step) + 1, self.cfg.epochs)} of {self.cfg.epochs}  "
            f"loss {mean:.4f}",
        )
        if self.ends(step):
            with self.aside():
                apart = held_out()
            line = {} if apart is None else {"held_out": apart}
            self.report_epoch(step, now - began, apart)
        # The names are those that figures.py plots; a line holds numbers alone, for any reader of JSON lines.
        self.write(
            step=step,
            epoch=min(self.cfg.epochs, step * self.cfg.batch_size / self.N),
            loss=mean,
            **line,
            lr=lr,
            images_per_s=speed,
            memory_gb=budget.used(self.losses.device) / 1e9,
            seconds=now - self.began,
        )

    def report_epoch(self, step, seconds, held_out):
        self.progress.close()
        mean = self.epoch_losses[0] / self.epoch_losses[1]
        apart = "" if held_out is None else f", held out {held_out:.4f}"
        say(
            f"epoch {self.epoch(step)} of {self.cfg.epochs}: loss {mean:.4f}{apart}, {duration(seconds)}"
        )
        self.epoch_losses.zero_()
        self.epoch_began = time.monotonic()

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
        for what, number in zip(
            ("loss", "gradient", "weights", "moving average"), numbers, strict=False
        ):
            if not math.isfinite(number):
                raise Failure(
                    f"step {step}: the {what}: {number}; a lower --lr or a longer --warmup may "
                    f"help. It is not saved; --resume goes on from {self.cfg.out}, if there is one"
                )

    def listen(self):
        """From now on, Ctrl-C and the other signals that end a command ask it to stop after the step."""
        command.on_ending_signals(self.stop)

    def stop(self, number, frame):
        """The signal handler: it answers at once. A second Ctrl-C ends the run, without a checkpoint."""
        self.stops.append(number)
        if workers.is_first() and len(self.stops) == 1:
            again = (
                "; Ctrl-C again to stop now, without a checkpoint"
                if number == signal.SIGINT
                else ""
            )
            with contextlib.suppress(OSError):  # not print, which the signal may have interrupted
                os.write(2, f"\nstopping after this step{again}\n".encode())
        if number == signal.SIGINT and len(self.stops) > 1:
            interrupt = command.interrupter()
            command.on_ending_signals(interrupt)
            interrupt(number, frame)


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

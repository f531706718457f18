"""What a command says while it works: lines on standard output, notes and progress on standard error.

The work goes on if nobody can read them: a terminal was closed, a disk is full, a pipe has no reader.
On a terminal the progress line rewrites itself five times a second. Elsewhere, as in a log file, a plain
line appears every 15 seconds.
"""

import contextlib
import os
import sys
import time

from support.errors import printable


def say(line):
    """Prints a line on standard output, where it can be printed. It stays one, whatever is in it."""
    try:
        print(printable(line), flush=True)
    except OSError:
        silence(sys.stdout)


def note(line):
    """Prints a line on standard error, where it can be printed."""
    with contextlib.suppress(OSError):
        print(printable(line), file=sys.stderr, flush=True)


def silence(stream):
    """Sends what a broken stream still holds, and all that comes, to nowhere: its flush at the exit of
    Python must not fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class Progress:
    """progress(done, note) shows a task that counts from `start` to `total`; close() clears the line."""

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
        with contextlib.suppress(OSError):
            print(text, end="", file=sys.stderr, flush=True)


def duration(seconds):
    """Seconds as 4:05 or 1:04:05."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"

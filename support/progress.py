"""The lines that a command prints while it works, in the first process of a torchrun.

Results go to standard output, notes and progress to standard error. The work continues if nobody
can read them, because a terminal was closed or a disk is full. On a terminal the progress line is
rewritten five times a second. In a log file, a new line appears every 15 seconds.
"""

import os
import sys
import time

from support import workers
from support.errors import printable


def say(line):
    """Print a line on standard output, if possible."""
    write(sys.stdout, printable(line) + "\n")


def note(line):
    """Print a line on standard error, if possible."""
    write(sys.stderr, printable(line) + "\n")


def write(stream, text):
    """Write text. A broken stream is sent to nowhere, or Python would fail again when it exits."""
    if not workers.is_first() or stream is None:
        return
    encoding = stream.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)  # not all have letters like ±
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Progress:
    """progress(done, note) shows a task that counts from `start` to `total`; close() clears the line."""

    def __init__(self, what, total, unit, start=0):
        self.what = what
        self.total = total
        self.unit = unit
        self.start = start
        self.tty = sys.stderr.isatty()
        self.began = self.shown = time.monotonic()

    def __call__(self, done, note=""):
        now = time.monotonic()
        finished = self.tty and done == self.total
        if now - self.shown < (0.2 if self.tty else 15) and not finished:
            return
        self.shown = now
        rate = (done - self.start) / max(now - self.began, 1e-9)
        left = duration((self.total - done) / rate) if rate > 0 else "?"
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        line = f"{self.what}: {done / self.total:4.0%}  {note}  {speed} {self.unit}/s  {left} left"
        write(sys.stderr, f"\r{line}\x1b[K" if self.tty else f"{line}\n")

    def close(self):
        if self.tty:
            write(sys.stderr, "\r\x1b[K")


def duration(seconds):
    """Format seconds as 4:05 or 1:04:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

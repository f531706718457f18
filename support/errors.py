"""The two kinds of expected errors. support/command.py prints them as one line; all others are bugs."""


class UsageError(Exception):
    """The call is wrong. The message names the flag and says what it accepts."""

    status = 2


class Failure(Exception):
    """The call is right, but a file, the machine or the network failed."""

    status = 1


def printable(text):
    """Return `text` as one line. File names may contain newlines and terminal escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def out_of_memory(error):
    """Return whether an exception reports that the machine or its GPU ran out of memory."""
    # PyTorch reports it as a plain RuntimeError on a CPU, and when CUDA cannot even start.
    words = ("out of memory", "allocate memory", "could not create a primitive")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)

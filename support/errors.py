"""Errors that a person can expect: each costs one line and an exit status, and no traceback.

Every room raises them, and support/command.py prints them. All other exceptions are bugs.
"""


class UsageError(Exception):
    """The call is wrong. Exit status 2. The message names the flag and says what it accepts."""


class Failure(Exception):
    """The call is right, but a file, a machine or a network is not. Exit status 1."""


def printable(text):
    """`text` in one line: names of files may hold any character."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def out_of_memory(error):
    """Whether an exception says that memory ran out, of the machine or of its GPU."""
    # Of the CPU's allocator; of CUDA, which may not even start; of oneDNN, which gives no reason; of a
    # thread, which needs a stack.
    words = (
        "allocate memory",
        "out of memory",
        "could not create a primitive",
        "can't start new thread",
    )
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)

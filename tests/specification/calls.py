"""How the tests call the tested functions: `from calls import ddpm, improved, likelihood, noise`.

    ddpm.sample_ancestral(model, d, xt, noise=noise(3))

works for an implementation that takes `noise` (a function), `generator`, or neither and draws from torch's
global generator. noise(3) is a noise function with its own generator, and it always gives the same numbers.
Without `noise`, the implementation uses its default, which is the global generator.

A plain function, such as noise=torch.zeros_like, needs an implementation with a `noise` argument: the test is
skipped otherwise. The same holds for options that an implementation does not have, such as `start`. Options are
passed by keyword.
"""

import contextlib
import functools
import inspect

import checks
import pytest
import tested
import torch


class noise:
    """A function of x that returns standard normal noise like x, drawn from a new generator."""

    def __init__(self, number=1):
        self.generator = checks.generator(number)

    def __call__(self, x):
        z = torch.randn(x.shape, generator=self.generator, dtype=x.dtype, device="cpu")
        return z.to(x.device)

    @contextlib.contextmanager
    def as_global(self):
        """Use this generator in place of the global one."""
        before = torch.get_rng_state()
        torch.set_rng_state(self.generator.get_state())
        try:
            yield
        finally:
            self.generator.set_state(torch.get_rng_state())
            torch.set_rng_state(before)


class File:
    """The names of ddpm.py, likelihood.py or improved.py, wherever the tested files define them."""

    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        if name not in tested.NAMES[self.file]:
            raise AttributeError(f"{self.file}.{name} is not in tested.NAMES")
        found, spelling = tested.find(self.file, name)
        if found is None:
            pytest.skip(f"absent: {self.file}.{name}")
        if spelling == "halves":  # it called the model itself
            return lambda output, xt: found(lambda xt, t: output, xt, None)
        return found if isinstance(found, type) else adapted(found, f"{self.file}.{name}")

    @property
    def module(self):
        """The module itself. Tests skip if there is none."""
        if self.file not in tested.MODULES:
            pytest.skip(f"absent: {self.file}.py")
        return tested.MODULES[self.file]


def adapted(function, title):
    """Return the function with `noise` passed in the way it expects."""
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())

    @functools.wraps(function)
    def call(*arguments, noise=None, **options):
        __tracebackhide__ = True
        missing = [name for name in options if name not in parameters and not takes_any]
        if missing:
            pytest.skip(f"absent: {title}(.., {missing[0]}=..)")
        if noise is None:
            return function(*arguments, **options)
        if "noise" in parameters:
            return function(*arguments, **options, noise=noise)
        if not hasattr(noise, "generator"):
            pytest.skip(f"absent: {title}(.., noise=..)")
        if "generator" in parameters:
            return function(*arguments, **options, generator=noise.generator)
        with noise.as_global():
            return function(*arguments, **options)

    return call


ddpm = File("ddpm")
likelihood = File("likelihood")
improved = File("improved")

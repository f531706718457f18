"""The inputs of the properties: every noise schedule, and every timestep of it.

A failing `Case(...)` is printed so that it can be pasted into `@example(case=Case(...))`, or checked with
pencil and paper, because Hypothesis shrinks T and t first. T = 1 has its own tests in test_single_step.py,
so that an error that only affects T = 1 fails only there.
"""

from dataclasses import dataclass

import checks
import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st


@dataclass(frozen=True)
class Case:
    """A schedule beta_1 .. beta_T, each in (0, 1) and in any order, and a timestep t of it."""

    betas: tuple[float, ...]
    t: int

    @property
    def T(self):
        return len(self.betas)

    @property
    def beta(self):
        """The table beta[0..T], with beta[0] = 0."""
        return np.array([0.0, *self.betas])


@dataclass(frozen=True)
class PaperCase:
    """Timestep t of the paper's schedule (sec. 4): beta rises from beta_1 to beta_T in equal steps."""

    t: int
    T: int = 1000
    beta_1: float = 1e-4
    beta_T: float = 0.02

    @property
    def betas(self):
        step = (self.beta_T - self.beta_1) / (self.T - 1)
        return tuple(self.beta_1 + step * i for i in range(self.T))

    beta = Case.beta


# In float32, 1 - alpha_bar needs beta well above 1e-6, and alpha_bar underflows at 50 times 0.999.
BETAS = st.floats(1e-4, 0.5) if checks.FLOAT32 else st.floats(1e-6, 0.999)
MAX_T = 20 if checks.FLOAT32 else 50
LEAST_ALPHA_BAR = 1e-6 if checks.FLOAT32 else 1e-30


@st.composite
def cases(draw, max_T=MAX_T):
    """Return a case: T from 2 to 50, beta_t from 1e-6 to 0.999 in any order, t from 1 to T.

    The schedule ends before alpha_bar falls below 1e-30 (float32: 1e-6).
    """
    betas = draw(st.lists(BETAS, min_size=2, max_size=max_T))
    T = max(2, int((np.cumprod(1 - np.array(betas)) > LEAST_ALPHA_BAR).sum()))
    return Case(tuple(betas[:T]), draw(st.integers(1, T)))


EDGES = (
    Case((0.5, 0.25), 1),  # t = 1
    Case((0.5, 0.25), 2),  # t = T
    PaperCase(1),
    PaperCase(2),
    PaperCase(1000),
    *([] if checks.FLOAT32 else [Case((0.999,) * 10, 10)]),  # alpha_bar_T = 1e-30
)


def every_case(test, edges=EDGES):
    """Decorate test(case): the property must hold for every schedule and every timestep of it."""
    test = given(case=cases())(test)
    for edge in reversed(edges):  # the simplest is tried, and shown, first
        test = example(case=edge)(test)
    return test


def every_short_case(test):
    """Decorate test(case) likewise, without the paper's 1000 timesteps, for properties of a whole run."""
    return every_case(test, EDGES[:2])


def pixels(max_size=8):
    """Return a strategy for values of the 256 levels, as k = 0..255."""
    return st.lists(st.integers(0, 255), min_size=1, max_size=max_size)


unit = st.floats(-1, 1, allow_subnormal=False)  # a pixel of x0
normal = st.floats(-5, 5, allow_subnormal=False)  # a value of eps or of xt

"""What the properties are tried on: every noise schedule, every step of it.

A failing `Case(...)` is printed as it can be pasted back: put it into `@example(case=Case(...))`,
or finish the sum with pencil and paper (Hypothesis shrinks T and t first). T = 1 has tests of its own, in
test_single_step.py, so that what is wrong there alone fails there alone.
"""

from dataclasses import dataclass

import judge
import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st


@dataclass(frozen=True)
class Case:
    """A schedule beta_1 .. beta_T, each inside (0, 1) and in any order, and a step t of it."""

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
    """Step t of the paper's schedule (sec. 4): from beta_1 to beta_T in equal steps."""

    t: int
    T: int = 1000
    beta_1: float = 1e-4
    beta_T: float = 0.02

    @property
    def betas(self):
        step = (self.beta_T - self.beta_1) / (self.T - 1)
        return tuple(self.beta_1 + step * i for i in range(self.T))

    beta = Case.beta


# In float32, 1e-6 is too near to nothing for 1 - alpha_bar, and 50 times 0.999 too near to all for alpha_bar.
BETAS, MAX_T = (st.floats(1e-4, 0.5), 20) if judge.FLOAT32 else (st.floats(1e-6, 0.999), 50)


@st.composite
def cases(draw, max_T=MAX_T):
    """T from 2 to 50, beta_t from 1e-6 to 0.999 in any order, t from 1 to T."""
    betas = draw(st.lists(BETAS, min_size=2, max_size=max_T))
    return Case(tuple(betas), draw(st.integers(1, len(betas))))


EDGES = (
    Case((0.5, 0.25), 1),  # t = 1
    Case((0.5, 0.25), 2),  # t = T
    PaperCase(1),
    PaperCase(2),
    PaperCase(1000),
)


def every_case(test, edges=EDGES):
    """Decorator: the property `test(case)` must hold for every schedule and every step of it."""
    test = given(case=cases())(test)
    for edge in reversed(edges):  # the simplest is tried, and shown, first
        test = example(case=edge)(test)
    return test


def every_short_case(test):
    """The same without the paper's thousand steps, for properties of a whole run."""
    return every_case(test, EDGES[:2])


def pixels(max_size=8):
    """Values of the 256 levels, as k = 0..255."""
    return st.lists(st.integers(0, 255), min_size=1, max_size=max_size)


unit = st.floats(-1, 1, allow_subnormal=False)  # a pixel of x0
normal = st.floats(-5, 5, allow_subnormal=False)  # a value of eps or of xt

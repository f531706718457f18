"""Assertions of the specification: errors as multiples of a tolerance, statistics at a false-alarm rate.

A failure breaks one of the RULES. Tests marked `edge` or `randomness` break that rule. This file attaches
"rejection" and "precision" to its own failures. Every other failed assertion breaks the rule "formula".
"""

import contextlib

import numpy as np
import pytest
import torch
from scipy import stats

# conftest.py sets these three from the command line.
SEED = 0  # --hypothesis-seed: seeds every random number that Hypothesis does not draw itself
FLOAT32 = False  # --precision float32: test a float32 implementation
REALS = (torch.float64,)  # the dtypes that tables may have

# "crash" means that the tested file raised an exception of its own.
RULES = ("formula", "precision", "edge", "rejection", "randomness", "crash")
REJECTIONS = (
    AssertionError,
    ValueError,
    TypeError,
    IndexError,
    RuntimeError,
)  # any of these will do

edge = pytest.mark.edge
randomness = pytest.mark.randomness
in_float64 = pytest.mark.in_float64  # skipped for a float32 implementation

EPS = np.finfo(np.float64).eps
EPS32 = np.finfo(np.float32).eps

ALPHA = 5e-7  # false-alarm rate of each statistical assertion, two-sided: 3e-4 for all 500 together
Z = stats.norm.isf(ALPHA / 2)  # 5.03 standard errors


def f64(*values):
    """Return a float64 tensor of these values."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def array(x):
    """Return a tensor or an array as a float64 NumPy array."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu().double()
    return np.asarray(x).astype(np.float64)


# --- Tolerances -----------------------------------------------------------------------------------


def log_size(case):
    """Return |log alpha_bar_T|, the relative error of alpha_bar_t in eps if it is computed from logarithms.

    exp turns an absolute error of log alpha_bar_t into a relative one. A logarithm of this size is rounded
    by log_size eps / 2. The t partial sums are rounded as well, with random signs: sqrt(t) / 2 times as
    much together, which is below 4 for t <= 50.
    """
    return -np.log1p(-np.array(case.betas)).sum()


def tolerance(case, eps=EPS):
    """Return the relative tolerance of values computed from alpha_bar_t and 1 - alpha_bar_t.

    alpha_bar_t is a product of t factors, with a relative error of at most t eps. In 1 - alpha_bar_t this
    becomes t eps alpha_bar_t / (1 - alpha_bar_t). Because alpha_bar_t <= (1 - min beta)^t,
    t alpha_bar_t / (1 - alpha_bar_t) <= 1 / min beta. From logarithms, alpha_bar_t has the error log_size,
    which does not vanish in its ratios, as in eq. 11. The factor 8 allows for a few more operations, and
    for the same error on the other side of the comparison.
    """
    return 8 * eps * (1 / min(case.betas) + log_size(case))


def eps():
    """Return the machine epsilon of the tested precision."""
    return EPS32 if FLOAT32 else EPS


def in_precision(tol):
    """Convert a tolerance stated for float64 to the tested precision.

    Tolerances below EPS32 count roundings of float64. A float32 implementation is allowed the same number
    of float32 roundings, up to 0.1. Larger tolerances do not come from rounding and stay.
    """
    if not FLOAT32:
        return tol
    tol = np.asarray(tol, dtype=np.float64)
    return np.where(tol < EPS32, np.minimum(tol * (EPS32 / EPS), 0.1), tol)


# --- Values ---------------------------------------------------------------------------------------


def broken(rule, message):
    """Return an assertion error that names the broken rule."""
    error = AssertionError(message)
    error.rule = rule
    return error


def has_reals(what, table):
    """Assert that a table is float64, or float32 where that is tested."""
    __tracebackhide__ = True
    if table.dtype not in REALS:
        raise broken("precision", f"{what} is {table.dtype}, want {REALS[0]}")


def close(what, got, want, tol, scale=None):
    """Assert |got - want| <= tol * scale everywhere. scale is |want| by default: a relative error.

    The message shows the worst entry and its error as a multiple of the tolerance.
    """
    __tracebackhide__ = True
    shape = tuple(np.shape(got))
    got, want = np.broadcast_arrays(array(got), array(want))
    if got.shape != shape:
        raise broken("formula", f"{what}: got shape {shape}, want {got.shape}")
    scale = np.broadcast_to(np.abs(want if scale is None else array(scale)), got.shape)
    allowed = np.broadcast_to(in_precision(tol), got.shape) * scale
    assert got.size, f"{what}: got shape {got.shape}, nothing to compare"
    with np.errstate(all="ignore"):
        error = np.abs(got - want)
        equal = (got == want) | (np.isnan(got) & np.isnan(want))
        bad = ~(error <= allowed) & ~equal
        ratio = np.where(bad, np.nan_to_num(error / allowed, nan=np.inf, posinf=np.inf), -1.0)
    if not bad.any():
        return
    i = np.unravel_index(np.argmax(ratio), got.shape)
    place = f" at {tuple(int(k) for k in i)}" if got.ndim else ""
    multiple = "where none is allowed"
    if allowed[i]:
        multiple = f"= {ratio[i]:.2g} x the tolerance {allowed[i]:.2g}"
    message = (
        f"{what}{place}: got {got[i]:.17g}, want {want[i]:.17g}; error {error[i]:.2g} {multiple}"
    )
    if is_float32_rounding(error[i], allowed[i], scale[i]):
        raise broken(
            "precision",
            f"{message}: the size of float32's rounding, in the tables or in between",
        )
    raise broken("formula", message)


def is_float32_rounding(error, allowed, scale):
    """Return True if float32 arithmetic alone explains the error where float64 is required.

    With a float32 alpha_bar, 1 - alpha_bar_1 of the paper's schedule is off by 1.7e-4. Few errors of this
    kind are larger. Few are below a thousandth of one rounding, 1e-10: smaller errors are float64's.
    """
    smallest = EPS32 / 1000 * scale
    return not FLOAT32 and 0 < allowed <= 1e-6 * scale and smallest <= error <= 1e-3 * scale


def same(what, got, want):
    """Assert that two tensors are equal bit for bit, including shape and dtype."""
    __tracebackhide__ = True
    if FLOAT32 and {got.dtype, want.dtype} == {torch.float32, torch.float64}:
        got = got.float()  # a float32 implementation may return either dtype
        want = want.float()
    kinds = [f"{tuple(x.shape)} {x.dtype}" for x in (got, want)]
    assert kinds[0] == kinds[1], f"{what}: got a tensor {kinds[0]}, want {kinds[1]}"
    close(what, got, want, 0.0)


@contextlib.contextmanager
def rejected(what, word=""):
    """Assert that the block raises an exception of a usual kind whose message contains `word`."""
    __tracebackhide__ = True
    try:
        yield
    except REJECTIONS as error:
        if word not in str(error):
            message = f"{what}: rejected, but the message does not contain {word!r}: {error}"
            raise broken("rejection", message) from error
        return
    raise broken("rejection", f"{what}: not rejected")


# --- Random numbers -------------------------------------------------------------------------------
#
# The seeds of the global generator are in the upper half of 0 .. 2**32 - 1 (torch uses 32 bits of a seed),
# and those of the tests' own generators in the lower half. So an implementation that draws from the wrong
# generator never gets the numbers that a test expects. Tests use only these two functions.


def seed(number=0):
    """Seed the global generator; number is in 0 .. 999."""
    torch.manual_seed(2**31 + (1000 * SEED + number) % 2**31)


def generator(number=1):
    """Return a new CPU generator; number is in 0 .. 999."""
    return torch.Generator("cpu").manual_seed((1000 * SEED + number) % 2**31)


# --- Statistics -----------------------------------------------------------------------------------


def within(what, got, want, standard_error, allowed=Z):
    """Assert that `got` is at most `allowed` standard errors from `want` (false alarms for Z: ALPHA)."""
    __tracebackhide__ = True
    z = abs(got - want) / standard_error
    assert z <= allowed, (
        f"{what}: estimated {got:.6g}, predicted {want:.6g}: {z:.1f} standard errors apart, "
        f"allowed {allowed:.2f} (false-alarm rate {ALPHA:g})"
    )


def has_mean(what, samples, mean):
    """Assert that independent samples have this mean (false alarms: ALPHA)."""
    __tracebackhide__ = True
    samples = array(samples).ravel()
    n = samples.size
    allowed = stats.t.isf(ALPHA / 2, n - 1)
    within(f"mean of {what}", samples.mean(), mean, samples.std(ddof=1) / np.sqrt(n), allowed)


def has_normal_moments(what, samples, mean, var):
    """Assert that independent Gaussian samples have this mean and variance (false alarms: ALPHA each)."""
    __tracebackhide__ = True
    samples = array(samples).ravel()
    n = samples.size
    within(f"mean of {what}", samples.mean(), mean, np.sqrt(var / n))
    s2 = samples.var(ddof=1)
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], n - 1) / (n - 1) - 1
    off = s2 / var - 1
    assert low <= off <= high, (
        f"variance of {what}: estimated {s2:.6g}, predicted {var:.6g} ({off:+.1%}); "
        f"allowed {low:+.1%} .. {high:+.1%} (false-alarm rate {ALPHA:g})"
    )


def has_law(what, samples, x, cdf):
    """Assert P(sample <= x[i]) = cdf[i] for independent samples (Kolmogorov-Smirnov; false alarms: ALPHA)."""
    __tracebackhide__ = True
    samples = array(samples).ravel()
    gap = stats.kstest(samples, lambda y: np.interp(y, x, cdf, left=0, right=1))
    allowed = stats.kstwo.isf(ALPHA, samples.size)
    assert gap.statistic <= allowed, (
        f"law of {what}: the share below {gap.statistic_location:.4g} is off by {gap.statistic:.1%}; "
        f"allowed {allowed:.1%} (false-alarm rate {ALPHA:g})"
    )


def is_uniform(what, counts):
    """Assert that the counts come from a uniform distribution (chi-squared; false alarms: ALPHA)."""
    __tracebackhide__ = True
    p = stats.chisquare(counts).pvalue
    assert p >= ALPHA, f"{what}: counts {[int(c) for c in counts]} are not uniform, p = {p:.2g}"


def rejects(assertion, *args):
    """Return True if the assertion fails. Negative controls use it."""
    try:
        assertion(*args)
    except AssertionError:
        return True
    return False

"""How the properties judge: errors in multiples of a tolerance, statistics at a false-alarm rate.

A failure breaks one of five rules: formula, precision, edge, refusal, randomness (RULES). It is an edge or
randomness where its test is marked so, a refusal or precision where this file says so, or else a formula.
"""

import contextlib

import numpy as np
import pytest
import torch
from scipy import stats

SEED = 0  # of every draw that Hypothesis does not make; conftest.py sets it
FLOAT32 = (
    False  # whether a float32 implementation is judged: --precision float32; conftest.py sets it
)
REALS = (torch.float64,)  # the types that its tables may have

RULES = (
    "formula",
    "precision",
    "edge",
    "refusal",
    "randomness",
    "crash",
)  # a crash: an error of its own
REFUSALS = (
    AssertionError,
    ValueError,
    TypeError,
    IndexError,
    RuntimeError,
)  # which one is a matter of taste
edge = pytest.mark.edge
randomness = pytest.mark.randomness
in_float64 = pytest.mark.in_float64  # not asked of a float32 implementation

EPS = np.finfo(np.float64).eps
EPS32 = np.finfo(np.float32).eps

ALPHA = 5e-7  # false-alarm rate of each statistical assertion, two-sided: 3e-4 for all 500
Z = stats.norm.isf(ALPHA / 2)  # 5.03 standard errors


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def array(x):
    return np.asarray(x.detach().cpu() if isinstance(x, torch.Tensor) else x).astype(np.float64)


def tolerance(case, eps=EPS):
    """Relative tolerance of anything built on 1 - alpha_bar_t.

    alpha_bar_t, a product of t factors, carries a relative error of at most t eps. That makes
    t eps alpha_bar_t / (1 - alpha_bar_t) in 1 - alpha_bar_t; since alpha_bar_t <= (1 - min beta)^t,
    t alpha_bar_t / (1 - alpha_bar_t) <= 1 / min beta. The factor 8 allows for the few operations on
    top, and for the same error on the other side of the comparison.
    """
    return 8 * eps / min(case.betas)


def broken(rule, words):
    """The failure that says which rule is broken."""
    error = AssertionError(words)
    error.rule = rule
    return error


def eps():
    """The rounding of the precision that is judged."""
    return EPS32 if FLOAT32 else EPS


def in_precision(tol):
    """A tolerance, stated for float64, in the precision that is judged.

    Those below EPS32 are so many roundings of float64; a float32 implementation may have as many of its
    own, up to a tenth. The others are no roundings of float64, and stay.
    """
    if not FLOAT32:
        return tol
    tol = np.asarray(tol, dtype=np.float64)
    return np.where(tol < EPS32, np.minimum(tol * (EPS32 / EPS), 0.1), tol)


def has_reals(what, table):
    """Assert that a table is float64, or float32 where that is judged."""
    __tracebackhide__ = True
    if table.dtype not in REALS:
        raise broken("precision", f"{what} is {table.dtype}, want {REALS[0]}")


def close(what, got, want, tol, scale=None):
    """Assert |got - want| <= tol * scale everywhere; scale defaults to |want|: a relative error.

    The message gives the worst entry, and its error as a multiple of the tolerance.
    """
    __tracebackhide__ = True
    got, want = np.broadcast_arrays(array(got), array(want))
    scale = np.broadcast_to(np.abs(want if scale is None else array(scale)), got.shape)
    allowed = np.broadcast_to(in_precision(tol), got.shape) * scale
    assert got.size, f"{what}: nothing to compare"
    with np.errstate(all="ignore"):
        error = np.abs(got - want)
        bad = ~(error <= allowed) & ~((got == want) | (np.isnan(got) & np.isnan(want)))
        ratio = np.where(bad, np.nan_to_num(error / allowed, nan=np.inf, posinf=np.inf), -1.0)
    if bad.any():
        i = np.unravel_index(np.argmax(ratio), got.shape)
        place = f" at {tuple(int(k) for k in i)}" if got.ndim else ""
        multiple = f"= {ratio[i]:.2g} x the tolerance {allowed[i]:.2g}"
        words = (f"{what}{place}: got {got[i]:.17g}, want {want[i]:.17g}; "
                 f"error {error[i]:.2g} {multiple if allowed[i] else 'where none is allowed'}")  # fmt: skip
        if is_rounding(error[i], allowed[i], scale[i]):
            raise broken(
                "precision", f"{words}: the size of float32's rounding, in tables or on the way"
            )
        raise broken("formula", words)


def is_rounding(error, allowed, scale):
    """Whether float32 alone makes an error of this size, where float64 was asked for: 1 - alpha_bar_1 of
    the paper's schedule is off by 1.7e-4 from a float32 alpha_bar, and nothing much more than that."""
    return not FLOAT32 and 0 < allowed <= 1e-6 * scale and error <= 1e-3 * scale


def same(what, got, want):
    """Assert that two tensors are equal bit for bit, in shape and type too."""
    __tracebackhide__ = True
    if FLOAT32 and {got.dtype, want.dtype} == {
        torch.float32,
        torch.float64,
    }:  # given one, it may answer in
        got, want = got.float(), want.float()  # the other
    kinds = [f"{tuple(x.shape)} {x.dtype}" for x in (got, want)]
    assert kinds[0] == kinds[1], f"{what}: got a tensor {kinds[0]}, want {kinds[1]}"
    close(what, got, want, 0.0)


@contextlib.contextmanager
def refused(what, word=""):
    """Assert that what is done here is refused, by an exception of any of the usual kinds, with this word."""
    __tracebackhide__ = True
    try:
        yield
    except REFUSALS as refusal:
        if word not in str(refusal):
            raise broken(
                "refusal", f"{what}: refused without the word {word}: {refusal}"
            ) from refusal
        return
    raise broken("refusal", f"{what}: not refused")


def seed(number=0):
    """Begin the global generator's stream, which is none that a test draws from a generator of its own."""
    torch.manual_seed(2**31 + 1000 * SEED + number)


def generator(number=1):
    """A generator of the test's own, one of 1,000; torch takes the lower 32 bits of its seed."""
    return torch.Generator().manual_seed(1000 * (SEED % 2_000_000) + number)


def within(what, got, want, standard_error, allowed=Z):
    """Assert that `got` is at most `allowed` standard errors from `want` (false alarms, by Z: ALPHA)."""
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
    n, s2 = samples.size, samples.var(ddof=1)
    within(f"mean of {what}", samples.mean(), mean, np.sqrt(var / n))
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], n - 1) / (n - 1) - 1
    off = s2 / var - 1
    assert low <= off <= high, (
        f"variance of {what}: estimated {s2:.6g}, predicted {var:.6g} ({off:+.1%}); "
        f"allowed {low:+.1%} .. {high:+.1%} (false-alarm rate {ALPHA:g})"
    )


def has_law(what, samples, x, cdf):
    """Assert, by Kolmogorov-Smirnov, that independent samples have P(. <= x[i]) = cdf[i] (false
    alarms: ALPHA)."""
    __tracebackhide__ = True
    samples = array(samples).ravel()
    gap = stats.kstest(samples, lambda y: np.interp(y, x, cdf, left=0, right=1))
    allowed = stats.kstwo.isf(ALPHA, samples.size)
    assert gap.statistic <= allowed, (
        f"law of {what}: the share below {gap.statistic_location:.4g} is off by {gap.statistic:.1%}; "
        f"allowed {allowed:.1%} (false-alarm rate {ALPHA:g})"
    )


def is_uniform(what, counts):
    """Assert, by chi-squared, that the counts come from a uniform distribution (false alarms: ALPHA)."""
    __tracebackhide__ = True
    p = stats.chisquare(counts).pvalue
    assert p >= ALPHA, f"{what}: counts {[int(c) for c in counts]} are not uniform, p = {p:.2g}"


def rejects(assertion, *args):
    """True if the assertion fails: what a negative control must do."""
    try:
        assertion(*args)
    except AssertionError:
        return True
    return False

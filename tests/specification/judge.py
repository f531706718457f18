"""How the properties judge: errors in multiples of a tolerance, statistics at a false-alarm rate."""

import numpy as np
import torch
from scipy import stats

SEED = 0  # of every draw that Hypothesis does not make; conftest.py sets it

EPS = np.finfo(np.float64).eps
EPS32 = np.finfo(np.float32).eps

ALPHA = 5e-7  # false-alarm rate of each statistical assertion, two-sided: 1e-4 for all 200
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


def close(what, got, want, tol, scale=None):
    """Assert |got - want| <= tol * scale everywhere; scale defaults to |want|: a relative error.

    The message gives the worst entry, and its error as a multiple of the tolerance.
    """
    __tracebackhide__ = True
    got, want = np.broadcast_arrays(array(got), array(want))
    allowed = np.broadcast_to(tol * np.abs(want if scale is None else array(scale)), got.shape)
    assert got.size, f"{what}: nothing to compare"
    with np.errstate(all="ignore"):
        error = np.abs(got - want)
        bad = ~(error <= allowed) & ~((got == want) | (np.isnan(got) & np.isnan(want)))
        ratio = np.where(bad, np.nan_to_num(error / allowed, nan=np.inf, posinf=np.inf), -1.0)
    if bad.any():
        i = np.unravel_index(np.argmax(ratio), got.shape)
        place = f" at {tuple(int(k) for k in i)}" if got.ndim else ""
        multiple = f"= {ratio[i]:.2g} x the tolerance {allowed[i]:.2g}"
        raise AssertionError(
            f"{what}{place}: got {got[i]:.17g}, want {want[i]:.17g}; "
            f"error {error[i]:.2g} {multiple if allowed[i] else 'where none is allowed'}"
        )


def same(what, got, want):
    """Assert that two tensors are equal bit for bit, in shape and type too."""
    __tracebackhide__ = True
    kinds = [f"{tuple(x.shape)} {x.dtype}" for x in (got, want)]
    assert kinds[0] == kinds[1], f"{what}: got a tensor {kinds[0]}, want {kinds[1]}"
    close(what, got, want, 0.0)


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

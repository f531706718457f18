"""How the properties judge: errors in multiples of a tolerance, statistics at a false-alarm rate."""

import numpy as np
import torch
from scipy import stats

SEED = 0  # of every draw that Hypothesis does not make; conftest.py sets it

EPS = np.finfo(np.float64).eps
EPS32 = np.finfo(np.float32).eps

ALPHA = 5e-7  # false-alarm rate of each statistical assertion, two-sided: 7.5e-5 for all 149
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
        raise AssertionError(
            f"{what}{place}: got {got[i]:.17g}, want {want[i]:.17g}; "
            f"error {error[i]:.2g} = {ratio[i]:.2g} x the tolerance {allowed[i]:.2g}"
        )


def within(what, got, want, standard_error):
    """Assert that the estimate `got` is within Z standard errors of `want` (false alarms: ALPHA)."""
    __tracebackhide__ = True
    z = abs(got - want) / standard_error
    assert z <= Z, (
        f"{what}: estimated {got:.6g}, predicted {want:.6g}: {z:.1f} standard errors apart, "
        f"allowed {Z:.2f} (false-alarm rate {ALPHA:g})"
    )


def has_mean(what, samples, mean):
    """Assert that independent samples have this mean (false alarms: ALPHA)."""
    __tracebackhide__ = True
    samples = array(samples).ravel()
    n = samples.size
    z = abs(samples.mean() - mean) / (samples.std(ddof=1) / np.sqrt(n))
    allowed = stats.t.isf(ALPHA / 2, n - 1)
    assert z <= allowed, (
        f"mean of {what}: estimated {samples.mean():.6g}, predicted {mean:.6g}: {z:.1f} standard errors "
        f"apart, allowed {allowed:.2f} (false-alarm rate {ALPHA:g})"
    )


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

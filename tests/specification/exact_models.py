"""Exact models of simple data, and the laws of the samplers that use them.

If x_0 is Gaussian, or a mixture of Gaussians, then E[eps | x_t] has a closed form. This best possible
model turns a whole sampler run, the loss and the bound into numbers that tests can compare with.
Everything is float64 NumPy and is derived in the docstrings, in the notation of reference_numpy.py.

Gaussian data is x_0 ~ N(m, s2), a scalar. A mixture is (weights, means, variances), each (n,):
x_0 comes from N(means[i], variances[i]) with probability weights[i]. A variance of 0 is a point mass.

models      eps_gaussian, eps_mixture, guided_eps, log_density             eq. 14, CFG eq. 6
loss        loss_minimum_mixture                                           eq. 14
samplers    ancestral_*, ddim_*: steps and moments; mixture_law            Algorithm 2, DDIM eq. 12
bound       expected_bound_term, expected_bound_terms, entropy_bits        eq. 5
variances   exact_variance_gaussian, kl_term_gaussian                      iDDPM eq. 16
"""

import numpy as np
from scipy import stats
from scipy.special import entr, ndtr, softmax

from reference_numpy import (
    bound_term,
    ddim_step,
    gaussian_kl,
    pixel_value,
    posterior,
    prior_term,
    transition,
)

# --- Exact models ---------------------------------------------------------------------------------


def eps_gaussian(beta, t, x, m, s2):
    """Return E[eps | x_t = x], the minimiser of eq. 14, for x_0 ~ N(m, s2); shape of x.

    x_t = a x_0 + sqrt(v) eps and eps ~ N(0, 1) are jointly Gaussian, with Cov(eps, x_t) = sqrt(v)
    and Var(x_t) = a^2 s2 + v. The result is the regression line of eps on x_t.
    """
    a, v = transition(beta, 0, t)
    return np.sqrt(v) * (x - a * m) / (a**2 * s2 + v)


def eps_mixture(beta, t, x, weights, means, variances):
    """Return E[eps | x_t = x] for a mixture; shape of x.

    Given component i, x_t ~ N(a m_i, a^2 s_i + v), and the regression of x_0 on x_t is
    m_i + a s_i / (a^2 s_i + v) (x - a m_i). Averaging over the responsibilities p(i | x_t) gives
    E[x_0 | x_t], and eps = (x_t - a x_0) / sqrt(v). The softmax makes the responsibilities sum to 1
    even where x is so distant that every density underflows.
    """
    a, v = transition(beta, 0, t)
    x = np.asarray(x, np.float64)
    means = np.asarray(means, np.float64)
    total = a**2 * np.asarray(variances) + v
    distance = x[..., None] - a * means
    log_joint = np.log(weights) - np.log(total) / 2 - distance**2 / (2 * total)
    x0_of_each = means + a * np.asarray(variances) / total * distance
    x0 = (softmax(log_joint, axis=-1) * x0_of_each).sum(axis=-1)
    return (x - a * x0) / np.sqrt(v)


def log_density(beta, t, x, weights, means, variances):
    """Return log p(x_t) of a mixture up to a constant; x has any shape and may be complex."""
    a, v = transition(beta, 0, t)
    total = a**2 * np.asarray(variances) + v
    distance = x[..., None] - a * np.asarray(means)
    terms = np.log(weights) - (np.log(total) + distance**2 / total) / 2
    largest = terms.real.max(axis=-1, keepdims=True)
    return largest[..., 0] + np.log(np.exp(terms - largest).sum(axis=-1))


def guided_eps(beta, t, x, w, one, everyone):
    """Return eps of CFG eq. 6: -sqrt(v) times the score of p(x_t | y)^(1+w) p(x_t)^-w; shape of x.

    `one` is the mixture of a class, and `everyone` the mixture of all the data. The derivative of the
    logarithm is a complex step, d f / dx = Im f(x + ih) / h with h = 1e-30, in which nothing cancels.
    """
    h = 1e-30
    v = transition(beta, 0, t)[1]
    z = np.asarray(x, np.float64) + 1j * h
    log_p = (1 + w) * log_density(beta, t, z, *one) - w * log_density(beta, t, z, *everyone)
    return -np.sqrt(v) * log_p.imag / h


# --- Least loss -----------------------------------------------------------------------------------


def normal_rule(limit=12, per_unit=512):
    """Return (z, p), each (n,), such that E[f(z)] = p @ f(z) for z ~ N(0, 1): the trapezoidal rule.

    For an f that is analytic in the strip |Im z| < d, the error is of order exp(-2 pi d per_unit).
    The rule follows responsibilities that switch within 1/100 of a standard deviation, which a
    Gauss-Hermite rule of reasonable size misses. The cut at the limit drops a mass of about e^-72.
    """
    z = np.arange(-limit * per_unit, limit * per_unit + 1) / per_unit
    return z, stats.norm.pdf(z) / per_unit


def loss_minimum_mixture(beta, t, weights, means, variances):
    """Return the least E[(eps - model(x_t, t))^2] of any model, for a mixture.

    E[Var(eps | x_t)] = E[eps^2] - E[E[eps | x_t]^2] = 1 - E[eps_mixture(x_t)^2]. In component i
    (rows), x_t is a m_i + sqrt(a^2 s_i + v) z at each node z of the rule (columns).
    """
    a, v = transition(beta, 0, t)
    z, p = normal_rule()
    spread = np.sqrt(a**2 * np.asarray(variances) + v)
    xt = a * np.asarray(means)[:, None] + spread[:, None] * z
    eps = eps_mixture(beta, t, xt, weights, means, variances)
    return 1 - weights @ (eps**2 @ p)


# --- Samplers -------------------------------------------------------------------------------------


def ancestral_steps(beta, sigma2):
    """Return [(t, (k_0, k_t, sigma2_t))] for t = T..1: Algorithm 2 as x_{t-1} = k_0 x0 + k_t x_t + z.

    p(x_{t-1} | x_t) is q(x_{t-1} | x_t, x_0) with the predicted x0 in place of x_0, and with the
    variance sigma2[t] of the table sigma2, (T+1,). There is no noise at t = 1, and no clipping.
    """
    steps = []
    for t in range(len(beta) - 1, 0, -1):
        c_0, c_t, _ = posterior(beta, t)
        steps.append((t, (c_0, c_t, sigma2[t] if t > 1 else 0.0)))
    return steps


def ddim_steps(beta, timesteps, eta):
    """Return the same list for DDIM; increasing timesteps [2, 5, 10] are visited 10 -> 5 -> 2 -> 0."""
    ends = [0, *timesteps]
    steps = []
    for i in range(len(timesteps), 0, -1):
        steps.append((ends[i], ddim_step(beta, ends[i], ends[i - 1], eta)))
    return steps


def reverse_step(beta, t, step, m, s2, mean, var):
    """Return (mean, var) of x_s = k_0 x0 + k_t x_t + N(0, sigma2), for x_t ~ N(mean, var).

    step = (k_0, k_t, sigma2). x0 = (x_t - sqrt(v) eps) / a is predicted by the exact model of
    N(m, s2). Apart from the noise, x_s is an affine function of x_t. Its values at x_t = 0 and
    x_t = 1 give the offset and the slope.
    """
    k_0, k_t, sigma2 = step
    a, v = transition(beta, 0, t)
    x = np.array([0.0, 1.0])
    x0 = (x - np.sqrt(v) * eps_gaussian(beta, t, x, m, s2)) / a
    offset, at_one = k_0 * x0 + k_t * x
    slope = at_one - offset
    return offset + slope * mean, slope**2 * var + sigma2


def ancestral_moments(beta, sigma2, m, s2, mean=0.0, var=1.0):
    """Return (mean, var) of Algorithm 2's output for N(m, s2), from x_T ~ N(mean, var).

    Every step is affine, so the state stays Gaussian.
    """
    for t, step in ancestral_steps(beta, sigma2):
        mean, var = reverse_step(beta, t, step, m, s2, mean, var)
    return mean, var


def ddim_moments(beta, timesteps, eta, m, s2, mean=0.0, var=1.0):
    """Return (mean, var) of DDIM's output for N(m, s2), from N(mean, var) at the last timestep."""
    for t, step in ddim_steps(beta, timesteps, eta):
        mean, var = reverse_step(beta, t, step, m, s2, mean, var)
    return mean, var


def mixture_law(beta, steps, weights, means, variances):
    """Return (x, F), each (n,): F[i] = P(output <= x[i]) of a sampler with the exact eps of a mixture.

    The sampler is a list of steps, and begins with N(0, 1). Its law is represented by n atoms x with
    probabilities p. A step moves an atom to k_0 x0 + k_t x, where x0 is the predicted one. Noise
    N(0, sigma2) then spreads all atoms over the cells of a fixed grid: a cell receives
    sum_i p_i (Phi((right - x_i) / sigma) - Phi((left - x_i) / sigma)), placed in its middle.
    """
    x, p = normal_rule(8, 64)
    middles = x
    edges = np.append(x, x[-1] + x[1] - x[0]) - (x[1] - x[0]) / 2
    for t, (k_0, k_t, sigma2) in steps:
        a, v = transition(beta, 0, t)
        x0 = (x - np.sqrt(v) * eps_mixture(beta, t, x, weights, means, variances)) / a
        x = k_0 * x0 + k_t * x
        if sigma2 > 0:
            p = np.diff(p @ ndtr((edges - x[:, None]) / np.sqrt(sigma2)))
            x = middles
    order = np.argsort(x)
    return x[order], p[order].cumsum() - p[order] / 2


# --- Bound ----------------------------------------------------------------------------------------


def expected_bound_term(beta, t, variance, levels, weights):
    """Return L_{t-1} of eq. 5 in nats for t = 1..T, averaged over x_0 and x_t.

    The data is level levels[i] (0..255) with probability weights[i]. x_t = a x_0 + sqrt(v) z for every
    level (rows) and every node z of the rule (columns). The predicted x0 of the exact model replaces
    x_0 in the mean of q(x_{t-1} | x_t, x_0); the reverse variance is given.
    """
    a, v = transition(beta, 0, t)
    z, p = normal_rule()
    points = pixel_value(levels)
    xt = a * points[:, None] + np.sqrt(v) * z
    eps = eps_mixture(beta, t, xt, weights, points, np.zeros(len(points)))
    c_0, c_t, _ = posterior(beta, t)
    mean = c_0 * (xt - np.sqrt(v) * eps) / a + c_t * xt
    nats = bound_term(beta, t, np.asarray(levels)[:, None], xt, mean, variance)
    return np.asarray(weights) @ (nats @ p)


def expected_bound_terms(beta, sigma2, decoder_var, levels, weights):
    """Return (T+1,): the expected L_0, L_1, .., L_{T-1}, L_T of eq. 5 in bits per dimension.

    The data and the exact model are those of expected_bound_term, without clipping. The reverse
    variance is sigma2[t] of a table (T+1,) for t >= 2, and decoder_var at t = 1.
    """
    nats = []
    for t in range(1, len(beta)):
        variance = decoder_var if t == 1 else sigma2[t]
        nats.append(expected_bound_term(beta, t, variance, levels, weights))
    nats.append(np.asarray(weights) @ prior_term(beta, levels))
    return np.array(nats) / np.log(2)


def entropy_bits(weights):
    """Return the entropy of the distribution `weights` (n,) in bits.

    No bound on E[-log2 p(x_0)] can be below it.
    """
    return entr(weights).sum() / np.log(2)


# --- Variances ------------------------------------------------------------------------------------


def exact_variance_gaussian(beta, t, s2):
    """Return Var(x_{t-1} | x_t) for data of variance s2, the best sigma_t^2 of any model.

    x_{t-1} has the variance A = a^2 s2 + v, and x_t = k x_{t-1} + N(0, w). The precisions 1 / A and
    k^2 / w add up. The result grows with s2: beta_tilde_t at s2 = 0, beta_t at s2 = 1, and more.
    """
    a, v = transition(beta, 0, t - 1)
    k, w = transition(beta, t - 1, t)
    A = a**2 * s2 + v
    return A * w / (w + k**2 * A)


def kl_term_gaussian(beta, t, s2, sigma2):
    """Return the expected L_{t-1}, t > 1, in nats, of the exact eps of N(m, s2), for any sigma2.

    mu_theta is E[x_{t-1} | x_t]. By the law of total variance, the mean square of mu_tilde - mu_theta
    is Var(x_{t-1} | x_t) - beta_tilde_t, and gaussian_kl is linear in that square.
    """
    beta_tilde = posterior(beta, t)[2]
    total = exact_variance_gaussian(beta, t, s2)
    return gaussian_kl(0.0, total, 0.0, sigma2) + np.log(total / beta_tilde) / 2

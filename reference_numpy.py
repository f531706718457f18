"""DDPM (Ho, Jain, Abbeel 2020) a second time, by other derivations: what the tests compare with.

Everything is float64 NumPy and SciPy, and each docstring derives what its function computes. The
notation is the paper's: t = 1..T, s < t is an earlier step, every table has T+1 entries and
beta[0] = 0, so x_0 is the data, with no noise yet. Data lies in [-1, 1], on the 256 levels
-1 + 2k/255, k = 0..255.

schedules      linear_beta, cosine_beta, exponential_beta                   sec. 4, iDDPM eq. 17
forward        forward_moments, transition                                  eq. 2, 4
posterior      posterior                                                    eq. 6, 7
DDIM           ddim_step                                                    DDIM eq. 7, 12, 16
exact models   eps_*, loss_minimum_*: of a gaussian and of a mixture        eq. 14
samplers       ancestral_*, ddim_*: their steps and moments; mixture_law    Algorithm 2
bound          gaussian_kl, decoder_log_prob, bound_terms_discrete          eq. 5, 13
improved       strided_beta, learned_variance, learned_slope, *_gaussian, guided_eps
                                                              iDDPM eq. 15, 16, 19, CFG eq. 6
network        timestep_embedding ... unet, unet_parameter_count            appendix B
training       ema                                                          appendix B
"""

from decimal import Decimal
from fractions import Fraction

import numpy as np
from scipy import stats
from scipy.special import entr, expit, ndtr, softmax

# ---------------------------------------------------------------------------- schedules


def linear_beta(T, beta_1=1e-4, beta_T=0.02):
    """beta[0..T], (T+1,): from beta_1 to beta_T in T-1 equal steps (sec. 4).

    The straight line through the two given floats is evaluated in exact rational arithmetic and
    rounded once, so that each entry is the float64 nearest to the true value. T = 1 gives beta_1.
    """
    first, last = Fraction(beta_1), Fraction(beta_T)
    line = [first + (last - first) * Fraction(i, max(T - 1, 1)) for i in range(T)]
    return np.array([0.0, *map(float, line)])


def cosine_beta(T, s=0.008, beta_max=0.999):
    """beta[0..T], (T+1,), such that alpha_bar_t = cos^2(a_t) / cos^2(a_0) (iDDPM eq. 17).

    With the angles a_t = (t/T + s) / (1 + s) * pi/2,
    beta_t = 1 - alpha_bar_t / alpha_bar_{t-1} = (cos^2 a_{t-1} - cos^2 a_t) / cos^2 a_{t-1}, and
    cos^2 a - cos^2 b = sin(b - a) sin(b + a) takes the difference without cancellation. beta_t is
    clipped at beta_max: alpha_bar_T would be 0.
    """
    angle = (np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2
    a, b = angle[:-1], angle[1:]
    step = np.pi / 2 / (T * (1 + s))  # b - a
    beta = np.sin(step) * np.sin(a + b) / np.cos(a) ** 2
    return np.append(0.0, np.minimum(beta, beta_max))


def exponential_beta(T, beta_1=1e-4, beta_T=0.066):
    """beta[0..T], (T+1,): from beta_1 to beta_T, growing by one constant factor per step.

    beta_t = beta_1 (beta_T / beta_1)^((t-1)/(T-1)), in decimal arithmetic of 28 digits, rounded
    once to float64. T = 1 gives beta_1.
    """
    first, last = Decimal(beta_1), Decimal(beta_T)
    curve = [first * (last / first) ** (Decimal(i) / max(T - 1, 1)) for i in range(T)]
    return np.array([0.0, *map(float, curve)])


# ---------------------------------------------------------------------------- forward process


def forward_moments(beta):
    """(a, v), both (T+1,): q(x_t | x_0) = N(a_t x_0, v_t), from eq. 2 by recursion.

    One step is affine, x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z with z ~ N(0, 1) independent
    of x_{t-1}: the mean is multiplied by sqrt(1 - beta_t), the variance by 1 - beta_t, and then
    beta_t is added. Start: x_0 itself, a_0 = 1, v_0 = 0. (So a_t = sqrt(alpha_bar_t) and
    v_t = 1 - alpha_bar_t, but v_t is a sum of positive terms: nothing cancels, and the relative
    error is a few t eps however small beta is.)
    """
    beta, a, v = np.asarray(beta, np.float64)[1:], [1.0], [0.0]
    for k, b in zip(np.sqrt(1 - beta).tolist(), beta.tolist(), strict=True):
        a.append(k * a[-1])
        v.append((1 - b) * v[-1] + b)
    return np.array(a), np.array(v)


def transition(beta, s, t):
    """(k, w): q(x_t | x_s) = N(k x_s, w), 0 <= s <= t.

    The chain is Markov, so it can be started afresh at x_s: forward_moments of the steps s+1..t
    (entry 0 of its table is never read).
    """
    k, w = forward_moments(beta[s : t + 1])
    return k[-1], w[-1]


# ---------------------------------------------------------------------------- posterior


def posterior(beta, t, s=None):
    """(c_0, c_t, var): q(x_s | x_t, x_0) = N(c_0 x_0 + c_t x_t, var), s = t-1 by default (eq. 6).

    Given x_0, x_s = a_s x_0 + N(0, v_s) and x_t = k x_s + N(0, w) are jointly Gaussian:
    Var(x_s) = v_s, Cov(x_s, x_t) = k v_s, Var(x_t) = v_t = k^2 v_s + w. Conditioning on x_t:

        mean = a_s x_0 + g (x_t - k a_s x_0)   with the gain   g = Cov / Var(x_t) = k v_s / v_t,
        var = v_s - g k v_s.

    Both contain 1 - g k = (v_t - k^2 v_s) / v_t = w / v_t, the share of x_t's variance that is
    newer than x_s; written so, nothing cancels. At s = 0, v_s = 0 gives exactly (1, 0, 0).
    """
    s = t - 1 if s is None else s
    a_s, v_s = transition(beta, 0, s)
    k, w = transition(beta, s, t)
    v_t = k**2 * v_s + w
    newer = w / v_t
    return a_s * newer, k * v_s / v_t, v_s * newer


# ---------------------------------------------------------------------------- DDIM


def ddim_step(beta, t, s, eta):
    """(k_0, k_t, sigma2): the step x_s = k_0 x_0 + k_t x_t + sqrt(sigma2) z, z ~ N(0, 1), s < t.

    sigma2 = eta^2 times the variance of q(x_s | x_t, x_0), 0 <= eta <= 1. If x_t ~ N(a_t x_0, v_t),
    then x_s ~ N(a_s x_0, v_s) must follow, which leaves no freedom:

        variance   k_t^2 v_t + sigma2 = v_s,        mean   k_0 + k_t a_t = a_s.

    Let x_t = k x_s + N(0, w) in the forward process, and split v_t into the shares
    old = k^2 v_s / v_t and new = w / v_t, old + new = 1. Then sigma2 = eta^2 v_s new, and
    k_t^2 = (v_s - sigma2) / v_t = (v_s / v_t) (old + (1 - eta^2) new). Since a_t = k a_s,
    k_0 = a_s (1 - k k_t) = a_s (1 - k^2 k_t^2) / (1 + k k_t), where
    1 - k^2 k_t^2 = 1 - old (1 - eta^2 new) = new (1 + eta^2 old): again nothing cancels.
    """
    a_s, v_s = transition(beta, 0, s)
    k, w = transition(beta, s, t)
    v_t = k**2 * v_s + w
    old, new = k**2 * v_s / v_t, w / v_t
    k_t = np.sqrt(v_s / v_t * (old + (1 - eta) * (1 + eta) * new))
    k_0 = a_s * new * (1 + eta**2 * old) / (1 + k * k_t)
    return k_0, k_t, eta**2 * v_s * new


# ---------------------------------------------------------------------------- exact models


def eps_gaussian(beta, t, x, m, s2):
    """E[eps | x_t = x] for scalar data x_0 ~ N(m, s2), the minimiser of eq. 14; shape of x.

    x_t = a x_0 + sqrt(v) eps and eps ~ N(0, 1) are jointly Gaussian with Cov(eps, x_t) = sqrt(v)
    and Var(x_t) = a^2 s2 + v: the regression line of eps on x_t.
    """
    a, v = transition(beta, 0, t)
    return np.sqrt(v) * (x - a * m) / (a**2 * s2 + v)


def eps_mixture(beta, t, x, weights, means, variances):
    """E[eps | x_t = x] for x_0 from component i, N(means[i], variances[i]), with prob. weights[i].

    Given i, x_t ~ N(a m_i, a^2 s_i + v) and the regression of x_0 on x_t is
    m_i + a s_i / (a^2 s_i + v) (x - a m_i). The responsibilities p(i | x_t) sum to 1 however far off
    x is; the average is E[x_0 | x_t], and eps = (x_t - a x_0) / sqrt(v). A variance 0 is a point mass.
    Shapes: x any, weights, means and variances (n,); result as x.
    """
    a, v = transition(beta, 0, t)
    x = np.asarray(x, np.float64)
    weights, means, variances = (np.asarray(p, np.float64) for p in (weights, means, variances))
    total = a**2 * variances + v
    off = x[..., None] - a * means
    log_joint = np.log(weights) - np.log(total) / 2 - off**2 / (2 * total)
    responsibility = softmax(log_joint, axis=-1)
    x0 = (responsibility * (means + a * variances / total * off)).sum(axis=-1)
    return (x - a * x0) / np.sqrt(v)


def loss_minimum_gaussian(beta, t, s2):
    """The least E[(eps - model(x_t, t))^2] of any model, per dimension, for data of variance s2.

    It is E[Var(eps | x_t)], and for Gaussians Var(eps | x_t) = 1 - Cov(eps, x_t)^2 / Var(x_t)
    = 1 - v / (a^2 s2 + v): the data's share of the variance of x_t.
    """
    a, v = transition(beta, 0, t)
    return a**2 * s2 / (a**2 * s2 + v)


def loss_minimum_mixture(beta, t, weights, means, variances):
    """The same for scalar x_0 from component i, N(means[i], variances[i]), with prob. weights[i].

    E[Var(eps | x_t)] = E[eps^2] - E[E[eps | x_t]^2] = 1 - E[eps_mixture(x_t)^2], where x_t is
    a m_i + sqrt(a^2 s_i + v) z in component i (rows), for each node z of the rule (columns).
    """
    a, v = transition(beta, 0, t)
    z, p = normal_rule()
    xt = a * np.asarray(means)[:, None] + np.sqrt(a**2 * np.asarray(variances) + v)[:, None] * z
    return 1 - weights @ (eps_mixture(beta, t, xt, weights, means, variances) ** 2 @ p)


def normal_rule(limit=12, per_unit=512):
    """(z, p), both (n,): E[f(z)] = p @ f(z) for z ~ N(0, 1), the trapezoidal rule.

    For an f analytic in the strip |Im z| < d its error is of order exp(-2 pi d per_unit), so it
    follows responsibilities that switch within 1/100 of a standard deviation, where a
    Gauss-Hermite rule of any reasonable size is blind. Beyond the limit, e^-72 is cut off.
    """
    z = np.arange(-limit * per_unit, limit * per_unit + 1) / per_unit
    return z, stats.norm.pdf(z) / per_unit


# ---------------------------------------------------------------------------- samplers


def reverse_step(beta, t, step, m, s2, mean, var):
    """(mean, var) of x_s = k_0 x0 + k_t x_t + sqrt(sigma2) z, for x_t ~ N(mean, var).

    step = (k_0, k_t, sigma2), and x0 = (x_t - sqrt(v) eps) / a is what the exact model of data
    N(m, s2) predicts. Without z, x_s is an affine function of x_t; its values at x_t = 0 and at
    x_t = 1 give offset and slope.
    """
    k_0, k_t, sigma2 = step
    a, v = transition(beta, 0, t)
    x = np.array([0.0, 1.0])
    x0 = (x - np.sqrt(v) * eps_gaussian(beta, t, x, m, s2)) / a
    offset, at_one = k_0 * x0 + k_t * x
    slope = at_one - offset
    return offset + slope * mean, slope**2 * var + sigma2


def ancestral_steps(beta, sigma2):
    """[(t, (k_0, k_t, sigma2))] for t = T .. 1: the steps of Algorithm 2.

    p(x_{t-1} | x_t) is q(x_{t-1} | x_t, x_0) with the model's x_0 in place of x_0 and the variance
    sigma2[t], sigma2 (T+1,); no noise at t = 1, no clipping.
    """
    times = range(len(beta) - 1, 0, -1)
    return [(t, (*posterior(beta, t)[:2], sigma2[t] if t > 1 else 0.0)) for t in times]


def ddim_steps(beta, grid, eta):
    """The same for DDIM on an increasing grid; for [2, 5, 10] they go 10 -> 5 -> 2 -> 0."""
    jumps = zip(grid[::-1], [*grid[-2::-1], 0], strict=True)
    return [(t, ddim_step(beta, t, s, eta)) for t, s in jumps]


def ancestral_moments(beta, sigma2, m, s2, mean=0.0, var=1.0):
    """(mean, var) of Algorithm 2's output for the exact model of N(m, s2); x_T ~ N(mean, var).

    Gaussians stay Gaussian.
    """
    for t, step in ancestral_steps(beta, sigma2):
        mean, var = reverse_step(beta, t, step, m, s2, mean, var)
    return mean, var


def ddim_moments(beta, grid, eta, m, s2, mean=0.0, var=1.0):
    """(mean, var) of DDIM's output for the exact model of N(m, s2), from x ~ N(mean, var).

    x ~ N(mean, var) is taken to be at the last step of the grid.
    """
    for t, step in ddim_steps(beta, grid, eta):
        mean, var = reverse_step(beta, t, step, m, s2, mean, var)
    return mean, var


def mixture_law(beta, steps, weights, means, variances):
    """(x, F), both (n,): F[i] = P(output <= x[i]) of a sampler, for the exact model of a mixture.

    The mixture is that of eps_mixture; the sampler is given by its steps, and begins with N(0, 1).
    Its law is held as n atoms x of probability p. A step moves an atom to k_0 x0 + k_t x, where x0
    is the model's; noise N(0, sigma2) then gives each cell of a fixed grid what it gets from all
    the atoms, sum_i p_i (Phi((right - x_i) / sigma) - Phi((left - x_i) / sigma)), put in its middle.
    """
    x, p = normal_rule(8, 64)
    edges = np.append(x, x[-1] + x[1] - x[0]) - (x[1] - x[0]) / 2
    middles = x
    for t, (k_0, k_t, sigma2) in steps:
        a, v = transition(beta, 0, t)
        x0 = (x - np.sqrt(v) * eps_mixture(beta, t, x, weights, means, variances)) / a
        x = k_0 * x0 + k_t * x
        if sigma2 > 0:
            p = np.diff(p @ ndtr((edges - x[:, None]) / np.sqrt(sigma2)))
            x = middles
    order = np.argsort(x)
    return x[order], p[order].cumsum() - p[order] / 2


# ---------------------------------------------------------------------------- bound


def gaussian_kl(mean_1, var_1, mean_2, var_2):
    """KL(N(mean_1, var_1) || N(mean_2, var_2)) in nats, elementwise.

    By definition E_1[log p_1 - log p_2] = cross-entropy - entropy, where
    -E_1[log p_2] = log(2 pi var_2) / 2 + E_1[(x - mean_2)^2] / (2 var_2) and the entropy of a
    Gaussian is log(2 pi e var_1) / 2. The absolute error is a few eps times the larger of the two.
    """
    second_moment = var_1 + (mean_1 - mean_2) ** 2
    cross_entropy = np.log(2 * np.pi * var_2) / 2 + second_moment / (2 * var_2)
    entropy = np.log(2 * np.pi * np.e * var_1) / 2
    return cross_entropy - entropy


def decoder_log_prob(k, mean, var):
    """log of the probability (nats) that eq. 13 gives to level k = 0..255; shapes broadcast.

    N(mean, var) is integrated over the bin from -1 + (2k-1)/255 to -1 + (2k+1)/255; bin 0 reaches
    to -infinity and bin 255 to infinity. In standard units the bin is (low, high). Where it lies
    right of 0 it is reflected, so that both ends are measured by the smaller, left tail; then
    log(Phi(high) - Phi(low)) = log Phi(high) + log(1 - e^d), d = log Phi(low) - log Phi(high).
    """
    k, mean, scale = np.broadcast_arrays(k, mean, np.sqrt(var))
    low = np.where(k == 0, -np.inf, (-1 + (2 * k - 1) / 255 - mean) / scale)
    high = np.where(k == 255, np.inf, (-1 + (2 * k + 1) / 255 - mean) / scale)
    low, high = np.where(low + high > 0, (-high, -low), (low, high))
    d = stats.norm.logcdf(low) - stats.norm.logcdf(high)
    return stats.norm.logcdf(high) + np.log1p(-np.exp(d))


def expected_term(beta, t, variance, levels, weights):
    """L_{t-1} of eq. 5 in nats, expected over x_0 and x_t, for t = 1..T.

    x_t = a x_0 + sqrt(v) z for every level x_0 (rows) and every node z (columns). The model's x0
    stands in for x_0 in the mean of q(x_{t-1} | x_t, x_0): the mean of p(x_{t-1} | x_t). For t >= 2
    the term is the KL divergence of the two; at t = 1 it is the decoder's -log p(x_0 | x_1).
    """
    a, v = transition(beta, 0, t)
    z, p = normal_rule()
    points = -1 + 2 * levels / 255
    x0, xt = points[:, None], a * points[:, None] + np.sqrt(v) * z
    eps = eps_mixture(beta, t, xt, weights, points, np.zeros(len(points)))
    c_0, c_t, var = posterior(beta, t)
    mean = c_0 * (xt - np.sqrt(v) * eps) / a + c_t * xt
    if t == 1:
        nats = -decoder_log_prob(levels[:, None], mean, variance)
    else:
        nats = gaussian_kl(c_0 * x0 + c_t * xt, var, mean, variance)
    return weights @ (nats @ p)


def bound_terms_discrete(beta, sigma2, decoder_var, levels, weights):
    """(T+1,): expected L_0, L_1, .., L_{T-1}, L_T of eq. 5 in bits per dimension.

    The data is one scalar: level levels[i] (0..255) with probability weights[i], both (n,), n a
    few. The model is the exact eps of that mixture of point masses, without clipping; its reverse
    variance is sigma2[t] (a table (T+1,)) for t >= 2 and decoder_var at t = 1. L_T compares
    q(x_T | x_0) with N(0, 1).
    """
    levels, weights = np.asarray(levels), np.asarray(weights, np.float64)
    T = len(beta) - 1
    variance = [None, decoder_var, *sigma2[2:]]
    nats = [expected_term(beta, t, variance[t], levels, weights) for t in range(1, T + 1)]
    a, v = transition(beta, 0, T)
    nats.append(weights @ gaussian_kl(a * (-1 + 2 * levels / 255), v, 0.0, 1.0))
    return np.array(nats) / np.log(2)


def entropy_bits(weights):
    """Entropy in bits of the distribution weights (n,): no bound on -log2 p(x_0) is below it."""
    return entr(weights).sum() / np.log(2)


# ---------------------------------------------------------------------------- improved.py


def strided_beta(beta, grid):
    """beta[0..n], (n+1,), of the chain that visits x_0 and the steps t_1 < .. < t_n of the grid only.

    A jump from t_{i-1} to t_i is the transition of the steps between; its variance is the new beta
    (and its factor the root of 1 - that, for both come from the same steps).
    """
    jumps = zip([0, *grid[:-1]], grid, strict=True)
    return np.array([0.0, *(transition(beta, s, t)[1] for s, t in jumps)])


def variance_ends(beta, t):
    """(low, high): the variances of p(x_{t-1} | x_t) if x_0 is known, and if it is pure noise.

    They are beta_tilde_t and beta_t. x_0 has no variance left at t = 1; the value of t = 2 stands
    for it, or, if there is no second step, beta_1 itself.
    """
    if len(beta) == 2:
        return beta[1], beta[1]
    return posterior(beta, max(t, 2))[2], beta[t]


def learned_variance(beta, t, v):
    """sigma_t^2 of iDDPM eq. 15: a straight line in log sigma^2 is a geometric one in sigma^2.

    It begins at low, v = 0, and is multiplied by high / low from there to v = 1.
    """
    low, high = variance_ends(beta, t)
    return low * (high / low) ** np.asarray(v, np.float64)


def learned_slope(beta, t, gap, v):
    """d/dv of KL(N(mu_tilde, beta_tilde_t) || N(mu, sigma^2(v))) in nats, gap = mu_tilde - mu, t > 1.

    By the chain rule over u = log sigma^2, which has the slope log(high / low): the divergence is
    (u + (beta_tilde + gap^2) e^-u) / 2 and a constant. The slope is 0 where sigma^2 is
    beta_tilde + gap^2.
    """
    low, high = variance_ends(beta, t)
    return np.log(high / low) / 2 * (1 - (low + gap**2) / learned_variance(beta, t, v))


def exact_variance_gaussian(beta, t, s2):
    """Var(x_{t-1} | x_t) for scalar data of variance s2: what an ideal model's sigma_t^2 is.

    x_{t-1} has variance A = a^2 s2 + v, x_t = k x_{t-1} + N(0, w): the precisions 1 / A and k^2 / w
    add up. It grows with s2, from beta_tilde_t (s2 = 0) to beta_t (s2 = 1) and beyond.
    """
    a, v = transition(beta, 0, t - 1)
    k, w = transition(beta, t - 1, t)
    A = a**2 * s2 + v
    return A * w / (w + k**2 * A)


def kl_term_gaussian(beta, t, s2, sigma2):
    """Expected L_{t-1}, t > 1, in nats, of the exact eps of data of variance s2, for any sigma^2.

    mu_theta is E[x_{t-1} | x_t], so the mean square of mu_tilde - mu_theta is what the law of total
    variance leaves: Var(x_{t-1} | x_t) - beta_tilde_t. The sum in gaussian_kl is linear in it.
    """
    low, total = posterior(beta, t)[2], exact_variance_gaussian(beta, t, s2)
    return gaussian_kl(0.0, total, 0.0, sigma2) + np.log(total / low) / 2


def log_density(beta, t, x, weights, means, variances):
    """log of the density of x_t, for x_0 from the mixture of eps_mixture; x any shape, complex too."""
    a, v = transition(beta, 0, t)
    total, off = a**2 * np.asarray(variances) + v, x[..., None] - a * np.asarray(means)
    terms = np.log(weights) - (np.log(2 * np.pi * total) + off**2 / total) / 2
    top = terms.real.max(axis=-1, keepdims=True)
    return top[..., 0] + np.log(np.exp(terms - top).sum(axis=-1))


def guided_eps(beta, t, x, w, one, everyone):
    """eps of CFG eq. 6, as the score of p(x_t | y)^(1 + w) p(x_t)^-w times -sqrt(v); shape of x.

    one and everyone are the mixtures (weights, means, variances) of a class and of all the data.
    The logarithm's derivative is taken by a complex step: d f / dx = Im f(x + ih) / h, h = 1e-30,
    in which nothing cancels.
    """
    h, (_, v) = 1e-30, transition(beta, 0, t)
    z = np.asarray(x, np.float64) + 1j * h
    log_p = (1 + w) * log_density(beta, t, z, *one) - w * log_density(beta, t, z, *everyone)
    return -np.sqrt(v) * log_p.imag / h


# ---------------------------------------------------------------------------- network layers


def timestep_embedding(t, dim):
    """(B, dim) from t (B,): [sin(t f_0), .., cos(t f_0), ..], dim/2 frequencies.

    f_i falls from 1 to 1/10000 in dim/2 - 1 equal ratios, f_i = 10000^(-i / (dim/2 - 1)); dim is
    even and at least 4. The network passes t - 1, counted from 0.
    """
    angle = np.asarray(t)[:, None] * 10000.0 ** -np.linspace(0, 1, dim // 2)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def silu(x):
    """x times the logistic function of x, elementwise."""
    return x * expit(x)


def group_norm(x, groups, gamma, shift, eps=1e-6):
    """(B, C, H, W): each image's groups of C/groups neighbouring channels to mean 0, variance 1.

    The variance is the biased one, with eps added; then gamma (C,) and shift (C,) per channel.
    """
    g = x.reshape(len(x), groups, -1)
    g = (g - g.mean(axis=2, keepdims=True)) / np.sqrt(g.var(axis=2, keepdims=True) + eps)
    return g.reshape(x.shape) * gamma[:, None, None] + shift[:, None, None]


def conv2d(x, w, b, stride=1, pad=((1, 1), (1, 1))):
    """(B, C_in, H, W) to (B, C_out, H', W'): cross-correlation with w (C_out, C_in, kh, kw) plus b.

    pad = ((top, bottom), (left, right)) zeros around the image; then every window of the kernel's
    size is multiplied with the kernel, and every stride-th window is kept.
    """
    padded = np.pad(x, ((0, 0), (0, 0), *pad))
    windows = np.lib.stride_tricks.sliding_window_view(padded, w.shape[2:], axis=(2, 3))
    y = np.tensordot(windows[:, :, ::stride, ::stride], w, axes=((1, 4, 5), (1, 2, 3)))
    return y.transpose(0, 3, 1, 2) + b[:, None, None]


def self_attention(x, wq, bq, wk, bk, wv, bv, wo, bo):
    """(B, C, H, W): each pixel becomes an average of all pixels' values, projected; no residual.

    1x1 convolutions are matrices (C, C) acting on the channels of H*W pixels. Pixel p's weights
    over the pixels r are the softmax over r of q_p . k_r / sqrt(C); one head.
    """
    B, C, H, W = x.shape
    pixels = x.reshape(B, C, H * W)
    q, k, v = (w @ pixels + b[:, None] for w, b in ((wq, bq), (wk, bk), (wv, bv)))
    share = softmax(q.transpose(0, 2, 1) @ k / np.sqrt(C), axis=2)  # (B, pixel p, pixel r)
    mixed = v @ share.transpose(0, 2, 1)
    return (wo @ mixed + bo[:, None]).reshape(B, C, H, W)


# ---------------------------------------------------------------------------- network


def embedding(t, ch, weights, labels, has_labels):
    """(B, 4 ch): dense(silu(dense(sinusoid(t - 1)))), plus a row of the label table, if any.

    The table is (n + 1, 4 ch); its last row stands for "no label" (labels=None).
    """
    h = timestep_embedding(np.asarray(t) - 1, ch) @ next(weights).T + next(weights)
    h = silu(h) @ next(weights).T + next(weights)
    if has_labels:
        h = h + next(weights)[-1 if labels is None else np.asarray(labels)]
    return h


def residual_block(x, emb, weights, groups):
    """conv2(silu(norm2(conv1(silu(norm1(x))) + dense(silu(emb))))) + shortcut(x).

    The dense layer gives one number per image and channel. The shortcut is the identity, or a 1x1
    convolution where the number of channels changes.
    """
    h = silu(group_norm(x, groups, next(weights), next(weights)))
    h = conv2d(h, next(weights), next(weights))
    h = h + (silu(emb) @ next(weights).T + next(weights))[:, :, None, None]
    h = silu(group_norm(h, groups, next(weights), next(weights)))
    h = conv2d(h, next(weights), next(weights))
    if x.shape[1] != h.shape[1]:
        x = conv2d(x, next(weights), next(weights), pad=((0, 0), (0, 0)))
    return h + x


def attention_block(x, weights, groups):
    """x + self_attention(norm(x)); its four projections come as 1x1 convolutions (C, C, 1, 1)."""
    normed = group_norm(x, groups, next(weights), next(weights))
    projections = [next(weights) for _ in range(8)]
    projections[::2] = [w[:, :, 0, 0] for w in projections[::2]]
    return x + self_attention(normed, *projections)


def down_path(h, block, weights, levels, blocks):
    """All tensors of the way down, in order; the last one is where the middle begins.

    They are the input convolution's h, each block's output, and each downsampling's: stride 2, the
    row and column of zeros (TensorFlow's SAME) at the bottom and right only.
    """
    skips = [h]
    for level in range(levels):
        for _ in range(blocks):
            skips.append(block(skips[-1], level))
        if level < levels - 1:
            h = conv2d(skips[-1], next(weights), next(weights), stride=2, pad=((0, 1), (0, 1)))
            skips.append(h)
    return skips


def up_path(h, skips, block, weights, levels, blocks):
    """The way up: each block sees h and, behind it in the channels, the last unused skip.

    One block more per level than on the way down, for the tensor that the downsampling (or, on
    level 0, the input convolution) left. Between levels every pixel is doubled both ways, then a
    3x3 convolution.
    """
    for level in reversed(range(levels)):
        for _ in range(blocks + 1):
            h = block(np.concatenate([h, skips.pop()], axis=1), level)
        if level > 0:
            h = conv2d(h.repeat(2, axis=2).repeat(2, axis=3), next(weights), next(weights))
    return h


def unet(x, t, weights, ch=128, mult=(1, 2, 2, 2), blocks=2, attention=(1,), groups=32,
         labels=None, has_labels=False):  # fmt: skip
    """eps (B, C_out, H, W) of the paper's network (appendix B) without dropout, from x and t (B,).

    weights: every layer's weight, then its bias, in the order of their use. ch * mult[i] channels
    on level i; attention after each residual block of the levels named, and in the middle.
    """
    weights = iter(weights)
    emb = embedding(t, ch, weights, labels, has_labels)

    def block(h, level):
        h = residual_block(h, emb, weights, groups)
        return attention_block(h, weights, groups) if level in attention else h

    h = conv2d(x, next(weights), next(weights))
    skips = down_path(h, block, weights, len(mult), blocks)
    h = attention_block(residual_block(skips[-1], emb, weights, groups), weights, groups)
    h = residual_block(h, emb, weights, groups)
    h = up_path(h, skips, block, weights, len(mult), blocks)
    h = silu(group_norm(h, groups, next(weights), next(weights)))
    h = conv2d(h, next(weights), next(weights))
    assert next(weights, None) is None, "more weights than layers"
    return h


def residual_table(ch, mult, blocks):
    """The residual blocks in order: (level, channels in, channels out); level None: the middle."""
    skips, table = [ch], []
    for level, m in enumerate(mult):
        for _ in range(blocks):
            table.append((level, skips[-1], ch * m))
            skips.append(ch * m)
        skips.append(ch * m)  # the downsampling's output
    h = skips.pop()  # the last level has no downsampling
    table += 2 * [(None, h, h)]
    for level in reversed(range(len(mult))):
        for _ in range(blocks + 1):
            table.append((level, h + skips.pop(), ch * mult[level]))
            h = ch * mult[level]
    return table


def unet_parameter_count(in_channels=3, out_channels=3, ch=128, mult=(1, 2, 2, 2), blocks=2,
                         attention=(1,), num_classes=None):  # fmt: skip
    """How many numbers unet's weights hold: arithmetic on the table of layers.

    A dense or 1x1 layer from i to o has o (i + 1), a 3x3 convolution o (9 i + 1), a norm 2 c.
    num_classes adds a label table of num_classes + 1 rows (None: no table).
    """
    table = residual_table(ch, mult, blocks)
    count = 4 * ch * (ch + 1) + 4 * ch * (4 * ch + 1)
    count += 0 if num_classes is None else (num_classes + 1) * 4 * ch
    count += ch * (9 * in_channels + 1) + 2 * ch * mult[0] + out_channels * (9 * ch * mult[0] + 1)
    for _, i, o in table:
        norms, convs, dense = 2 * i + 2 * o, o * (9 * i + 1) + o * (9 * o + 1), o * (4 * ch + 1)
        count += norms + convs + dense + (o * (i + 1) if i != o else 0)
    for c in [o for level, _, o in table if level in attention] + [ch * mult[-1]]:
        count += 2 * c + 4 * c * (c + 1)
    for m in (*mult[:-1], *mult[1:]):  # down from each level but the last, up from all but level 0
        count += ch * m * (9 * ch * m + 1)
    return count


# ---------------------------------------------------------------------------- training


def ema(weights, decay):
    """The exponential moving average after weights[0] (its initial value), weights[1], ..

    Update n = 1, 2, .. is average <- d_n average + (1 - d_n) weights[n] with the ramp
    d_n = min(decay, (1 + n) / (10 + n)). Unrolled, weights[n] enters once, with 1 - d_n, and is
    then multiplied by every later d: its share is (1 - d_n) d_{n+1} d_{n+2} ... ; d_0 = 0 makes
    the initial value no exception.
    """
    n = np.arange(len(weights))
    d = np.where(n == 0, 0.0, np.minimum(decay, (1 + n) / (10 + n)))
    later = [np.prod(d[i + 1 :]) for i in n]
    return np.tensordot((1 - d) * later, np.asarray(weights, np.float64), axes=1)

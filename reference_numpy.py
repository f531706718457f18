"""The closed forms of DDPM (Ho, Jain, Abbeel 2020) by a second set of derivations, in NumPy.

The tests compare an implementation with these functions. Each docstring derives the result. All
numbers are float64, and every formula avoids differences of nearly equal numbers.

The notation is the paper's. t runs from 1 to T, and s < t is an earlier time. Tables have T + 1
entries, and beta[0] = 0 because x_0 is the data. Pixels lie in [-1, 1], on the 256 levels
-1 + 2k/255 for k = 0..255.

schedules     linear_beta, cosine_beta, exponential_beta                    sec. 4, iDDPM eq. 17
forward       forward_moments, transition                                   eq. 2, eq. 4
posterior     posterior                                                     eq. 6, eq. 7
DDIM          ddim_step                                                     DDIM eq. 7, 12, 16
bound         gaussian_kl, decoder_log_prob, bound_term, prior_term         eq. 5, eq. 13
improved      respaced_beta, learned_variance, learned_slope                iDDPM eq. 15, 16, 19
training      ema                                                           appendix B

tests/specification/exact_models.py builds exact models and sampler laws on these functions.
tests/specification/network_numpy.py contains the network.
"""

import math

import numpy as np
from scipy import stats

# --- Schedules ------------------------------------------------------------------------------------


def linear_beta(T, beta_1=1e-4, beta_T=0.02):
    """Return beta[0..T], (T+1,): T values on a straight line from beta_1 to beta_T (sec. 4).

    A point of the line is a weighted mean of its ends. The weight of beta_T is (t-1) / (T-1), so
    both ends are exact. T = 1 gives beta_1.
    """
    late = np.arange(T) / max(T - 1, 1)
    return np.append(0.0, (1 - late) * beta_1 + late * beta_T)


def cosine_beta(T, s=0.008, beta_max=0.999):
    """Return beta[0..T], (T+1,), with alpha_bar_t = cos^2(a_t) / cos^2(a_0) (iDDPM eq. 17).

    The angles are a_t = (t/T + s) / (1 + s) * pi/2. Then

        beta_t = 1 - alpha_bar_t / alpha_bar_{t-1} = (cos^2 a_{t-1} - cos^2 a_t) / cos^2 a_{t-1},

    and cos^2 a - cos^2 b = sin(b - a) sin(b + a) gives the difference without cancellation. beta_t
    is at most beta_max, because alpha_bar_T would otherwise be 0.
    """
    angle = (np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2
    before = angle[:-1]
    after = angle[1:]
    step = np.pi / 2 / (T * (1 + s))  # after - before
    beta = np.sin(step) * np.sin(before + after) / np.cos(before) ** 2
    return np.append(0.0, np.minimum(beta, beta_max))


def exponential_beta(T, beta_1=1e-4, beta_T=0.066):
    """Return beta[0..T], (T+1,): from beta_1 to beta_T, growing by one constant factor per step.

    T - 1 steps multiply beta by beta_T / beta_1, so t - 1 steps multiply it by that ratio to the
    power (t-1) / (T-1). T = 1 gives beta_1.
    """
    late = np.arange(T) / max(T - 1, 1)
    return np.append(0.0, beta_1 * (beta_T / beta_1) ** late)


# --- Forward process ------------------------------------------------------------------------------


def forward_moments(beta):
    """Return (a, v), each (T+1,), such that q(x_t | x_0) = N(a_t x_0, v_t) (eq. 2, by recursion).

    One step is x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z, where z ~ N(0, 1) is independent of
    x_{t-1}. It multiplies the mean by sqrt(1 - beta_t). It multiplies the variance by 1 - beta_t and
    adds beta_t. The start is x_0 itself: a_0 = 1 and v_0 = 0.

    So a_t = sqrt(alpha_bar_t) and v_t = 1 - alpha_bar_t (eq. 4). As a sum of positive terms, v_t has
    a relative error of a few t eps, however small beta is.
    """
    a = [1.0]
    v = [0.0]
    for beta_t in np.asarray(beta, np.float64)[1:].tolist():
        a.append(math.sqrt(1 - beta_t) * a[-1])
        v.append((1 - beta_t) * v[-1] + beta_t)
    return np.array(a), np.array(v)


def transition(beta, s, t):
    """Return (k, w) such that q(x_t | x_s) = N(k x_s, w), for 0 <= s <= t.

    The chain is Markov. Starting it at x_s leaves the steps s+1..t, and forward_moments does not
    read entry 0 of its table.
    """
    k, w = forward_moments(beta[s : t + 1])
    return k[-1], w[-1]


# --- Posterior ------------------------------------------------------------------------------------


def posterior(beta, t, s=None):
    """Return (c_0, c_t, var): q(x_s | x_t, x_0) = N(c_0 x_0 + c_t x_t, var) (eq. 6, s = t-1).

    Given x_0, the pair x_s = a_s x_0 + N(0, v_s) and x_t = k x_s + N(0, w) is jointly Gaussian, with
    Var(x_s) = v_s, Cov(x_s, x_t) = k v_s and Var(x_t) = v_t = k^2 v_s + w. Conditioning on x_t gives

        mean = a_s x_0 + g (x_t - k a_s x_0)   with the gain   g = Cov / Var(x_t) = k v_s / v_t,
        var = v_s - g k v_s.

    Both contain 1 - g k = (v_t - k^2 v_s) / v_t = w / v_t, the share of x_t's noise that was added
    after s. Written with w / v_t, nothing cancels. At s = 0, v_s = 0 gives exactly (1, 0, 0).
    """
    s = t - 1 if s is None else s
    a_s, v_s = transition(beta, 0, s)
    k, w = transition(beta, s, t)
    v_t = k**2 * v_s + w
    new = w / v_t
    return a_s * new, k * v_s / v_t, v_s * new


# --- DDIM -----------------------------------------------------------------------------------------


def ddim_step(beta, t, s, eta):
    """Return (k_0, k_t, sigma2): DDIM's step is x_s = k_0 x_0 + k_t x_t + N(0, sigma2), s < t.

    sigma2 is eta^2 times the variance of q(x_s | x_t, x_0), with 0 <= eta <= 1. The step must turn
    x_t ~ N(a_t x_0, v_t) into x_s ~ N(a_s x_0, v_s), which determines both coefficients:

        variance   k_t^2 v_t + sigma2 = v_s,        mean   k_0 + k_t a_t = a_s.

    The forward process has x_t = k x_s + N(0, w). Split v_t into the shares old = k^2 v_s / v_t and
    new = w / v_t, so that old + new = 1. Then sigma2 = eta^2 v_s new, and
    k_t^2 = (v_s - sigma2) / v_t = (v_s / v_t) (old + (1 - eta^2) new). From a_t = k a_s follows
    k_0 = a_s (1 - k k_t) = a_s (1 - k^2 k_t^2) / (1 + k k_t), where
    1 - k^2 k_t^2 = 1 - old (1 - eta^2 new) = new (1 + eta^2 old). Again nothing cancels.
    """
    a_s, v_s = transition(beta, 0, s)
    k, w = transition(beta, s, t)
    v_t = k**2 * v_s + w
    old = k**2 * v_s / v_t
    new = w / v_t
    k_t = np.sqrt(v_s / v_t * (old + (1 - eta) * (1 + eta) * new))
    k_0 = a_s * new * (1 + eta**2 * old) / (1 + k * k_t)
    return k_0, k_t, eta**2 * v_s * new


# --- Bound ----------------------------------------------------------------------------------------


def pixel_value(k):
    """Return the pixel value in [-1, 1] of level k = 0..255; shape of k."""
    return -1 + 2 * np.asarray(k) / 255


def gaussian_kl(mean_1, var_1, mean_2, var_2):
    """Return KL(N(mean_1, var_1) || N(mean_2, var_2)) in nats, elementwise.

    By definition it is E_1[log p_1 - log p_2] = cross-entropy - entropy. The cross-entropy is
    -E_1[log p_2] = log(2 pi var_2) / 2 + E_1[(x - mean_2)^2] / (2 var_2). The entropy of a Gaussian
    is log(2 pi e var_1) / 2. The absolute error is a few eps times the larger of the two.
    """
    second_moment = var_1 + (mean_1 - mean_2) ** 2
    cross_entropy = np.log(2 * np.pi * var_2) / 2 + second_moment / (2 * var_2)
    entropy = np.log(2 * np.pi * np.e * var_1) / 2
    return cross_entropy - entropy


def decoder_log_prob(k, mean, var):
    """Return the log probability (nats) of level k = 0..255 under eq. 13; shapes broadcast.

    N(mean, var) is integrated over the bin from -1 + (2k-1)/255 to -1 + (2k+1)/255. Bin 0 extends to
    -infinity and bin 255 to infinity. In standard units, a bin to the right of 0 is reflected, so
    that both edges are measured by the smaller tail. Then log(Phi(high) - Phi(low)) =
    log Phi(high) + log(1 - e^d), with d = log Phi(low) - log Phi(high).
    """
    k, mean, scale = np.broadcast_arrays(k, mean, np.sqrt(var))
    left_edge = np.where(k == 0, -np.inf, (-1 + (2 * k - 1) / 255 - mean) / scale)
    right_edge = np.where(k == 255, np.inf, (-1 + (2 * k + 1) / 255 - mean) / scale)
    reflect = left_edge + right_edge > 0
    low = np.where(reflect, -right_edge, left_edge)
    high = np.where(reflect, -left_edge, right_edge)
    d = stats.norm.logcdf(low) - stats.norm.logcdf(high)
    return stats.norm.logcdf(high) + np.log1p(-np.exp(d))


def bound_term(beta, t, k, xt, mean, variance):
    """Return L_{t-1} of eq. 5 in nats for level k, if p(x_{t-1} | x_t) = N(mean, variance).

    For t >= 2 it is the KL divergence from q(x_{t-1} | x_t, x_0) to p. At t = 1 it is the decoder's
    -log p(x_0 | x_1). Shapes broadcast.
    """
    if t == 1:
        return -decoder_log_prob(k, mean, variance)
    c_0, c_t, var = posterior(beta, t)
    return gaussian_kl(c_0 * pixel_value(k) + c_t * xt, var, mean, variance)


def prior_term(beta, k):
    """Return L_T of eq. 5 in nats: the KL divergence from q(x_T | x_0) to N(0, 1); shape of k."""
    a, v = transition(beta, 0, len(beta) - 1)
    return gaussian_kl(a * pixel_value(k), v, 0.0, 1.0)


def decoder_variance(beta):
    """Return sigma_1^2 as the authors' code chooses it: beta_tilde_2, or beta_1 if T = 1.

    The paper does not name it. beta_tilde_1 is 0, because x_0 has no variance left.
    """
    return beta[1] if len(beta) == 2 else posterior(beta, 2)[2]


# --- Improved DDPM --------------------------------------------------------------------------------


def respaced_beta(beta, timesteps):
    """Return beta'[0..n], (n+1,), of the chain that visits only x_0 and the n increasing timesteps.

    One step of the new chain is the transition of all the steps between two timesteps. Its variance
    is the new beta, and its factor is sqrt(1 - beta') because both come from the same steps.
    """
    new = [0.0]
    s = 0
    for t in timesteps:
        new.append(transition(beta, s, t)[1])
        s = t
    return np.array(new)


def variance_ends(beta, t):
    """Return (low, high): the variance of x_{t-1} given x_t, if x_0 is known and if it is noise.

    They are beta_tilde_t and beta_t. At t = 1, where beta_tilde is 0, low is decoder_variance.
    """
    low = decoder_variance(beta) if t == 1 else posterior(beta, t)[2]
    return low, beta[t]


def learned_variance(beta, t, v):
    """Return sigma_t^2 of iDDPM eq. 15; shape of v.

    A straight line in log sigma^2 is a geometric sequence in sigma^2. It starts at low for v = 0, and
    is multiplied by high / low until v = 1.
    """
    low, high = variance_ends(beta, t)
    return low * (high / low) ** np.asarray(v, np.float64)


def learned_slope(beta, t, gap, v):
    """Return d/dv KL(N(mu_tilde, beta_tilde_t) || N(mu, sigma^2(v))) in nats; gap is mu_tilde - mu.

    Let u = log sigma^2, whose derivative is log(high / low). The divergence is a constant plus
    (u + (beta_tilde + gap^2) e^-u) / 2, and the chain rule gives the result. t > 1. The slope is 0
    where sigma^2 = beta_tilde + gap^2.
    """
    low, high = variance_ends(beta, t)
    return np.log(high / low) / 2 * (1 - (low + gap**2) / learned_variance(beta, t, v))


# --- Training -------------------------------------------------------------------------------------


def ema(weights, decay):
    """Return the moving average after the updates weights[1], weights[2], .. of weights[0].

    Update n = 1, 2, .. is average <- d_n average + (1 - d_n) weights[n] with the ramp
    d_n = min(decay, (1 + n) / (10 + n)). Unrolled, weights[n] enters once with the factor 1 - d_n,
    and is then multiplied by every later d. Its share is (1 - d_n) d_{n+1} d_{n+2} ... With d_0 = 0
    the same formula holds for the initial value.
    """
    n = np.arange(len(weights))
    d = np.where(n == 0, 0.0, np.minimum(decay, (1 + n) / (10 + n)))
    later = [np.prod(d[i + 1 :]) for i in n]
    return np.tensordot((1 - d) * later, np.asarray(weights, np.float64), axes=1)

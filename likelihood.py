"""The variational bound on -log p(x0) (Ho, Jain, Abbeel 2020, eq. 5) in bits/dim, on top of ddpm.py.

Training and sampling do not need it. The notation is that of ddpm.py.

    1  KL divergence         eq. 5                         normal_kl
    2  decoder               eq. 13                        discretized_log_likelihood
    3  bound                 eq. 5                         bound_term, prior_term, bound_terms

The authors' code differs from the paper's text in one point: sigma_1^2 is beta_tilde_2, for both
choices of sigma, because beta_tilde_1 is 0 (with_sigma_1). This file differs from the authors' code
in the decoder: its normal CDF is exact, in log space, instead of a tanh approximation with a floor.
"""

import math

import torch

from ddpm import at, check, check_same_shape, readable, same_t

# --- 1. KL divergence -----------------------------------------------------------------------------


def normal_kl(mean_1, var_1, mean_2, var_2):
    """Return KL(N(mean_1, var_1) || N(mean_2, var_2)) in nats, elementwise."""
    return 0.5 * ((var_2 / var_1).log() + (var_1 + (mean_1 - mean_2) ** 2) / var_2 - 1)


# --- 2. Decoder -----------------------------------------------------------------------------------


def discretized_log_likelihood(x0, mean, var):
    """eq. 13: log of the probability that N(mean, var) gives to the bin of x0, in nats, elementwise.

    x0 is on the 256 levels -1 + 2k/255. Its bin extends 1/255 to both sides; the bins of the end
    levels extend to -infinity and infinity.
    """
    low = (x0 - mean - 1 / 255) / var.sqrt()
    high = (x0 - mean + 1 / 255) / var.sqrt()
    low = torch.where(x0 < -0.999, -math.inf, low)  # only the end levels: levels are 0.008 apart
    high = torch.where(x0 > 0.999, math.inf, high)
    # Phi(high) - Phi(low) = Phi(-low) - Phi(-high). Phi(x) rounds to 1 for large x: use smaller ones.
    flip = low + high > 0
    lower = torch.where(flip, -high, low)
    upper = torch.where(flip, -low, high)
    log_upper = torch.special.log_ndtr(upper)
    return log_upper + torch.log(-torch.expm1(torch.special.log_ndtr(lower) - log_upper))


# --- 3. Bound -------------------------------------------------------------------------------------


def bits_per_dim(nats):
    """Average nats (B, ...) over the dimensions of each image, in bits: (B,)."""
    return nats.flatten(1).mean(1) / math.log(2)


def with_sigma_1(d, sigma2):
    """Return the table sigma2[0..T] with sigma_1^2 = beta_tilde_2 (beta_1 if T = 1), for the bound."""
    check(sigma2.shape == d.beta.shape, f"need sigma2[0..{d.T}], got {tuple(sigma2.shape)}")
    valid = not readable(sigma2) or (sigma2[2:] > 0).all()
    check(valid, "sigma2 must be positive for t > 1")
    sigma2 = sigma2.clone()
    sigma2[1] = d.beta_tilde[2] if d.T > 1 else d.beta[1]
    return sigma2


def bound_term(d, x0, xt, t, mean, sigma2):
    """eq. 5: L_{t-1} in bits/dim (B,), for p(x_{t-1} | xt) = N(mean, sigma2). At t = 1 it is L_0.

    t in 1..T is an int or an int64 tensor (B,). sigma2 > 0 has the shape of x0 or broadcasts to it;
    for a fixed variance it is at(with_sigma_1(d, table), t, x0).
    """
    check_same_shape(x0=x0, xt=xt, mean=mean)
    check(sigma2.ndim == x0.ndim, f"sigma2 needs {x0.ndim} dimensions, got {sigma2.ndim}")
    after_first = at(d.beta_tilde, t, x0) > 0  # t > 1: only beta_tilde_1 is 0
    beta_tilde = at(with_sigma_1(d, d.beta_tilde), t, x0)  # positive at t = 1, where kl is not used
    kl = normal_kl(d.posterior_mean(x0, xt, t), beta_tilde, mean, sigma2)
    # Where t > 1 the decoder's value is not used. Variance 1 keeps it and its gradient finite.
    decoder = -discretized_log_likelihood(x0, mean, torch.where(after_first, 1.0, sigma2))
    return bits_per_dim(torch.where(after_first, kl, decoder))


def prior_term(d, x0):
    """eq. 5: L_T in bits/dim (B,), the KL divergence of q(x_T | x0) from N(0, I)."""
    mean = at(d.alpha_bar.sqrt(), d.T, x0) * x0
    var = at(1 - d.alpha_bar, d.T, x0)
    return bits_per_dim(normal_kl(mean, var, 0.0, torch.ones_like(var)))


def check_levels(x0):
    """Raise ValueError unless x0 is on the 256 levels -1 + 2k/255, which the decoder needs."""
    k = (x0 + 1) * 127.5
    check((x0.abs() <= 1).all(), "x0 must be in [-1, 1]")
    check(((k - k.round()).abs() < 0.01).all(), "x0 must be on the 256 levels -1 + 2k/255")


@torch.no_grad()
def bound_terms(model, d, x0, variances, *, clip=True, noise=torch.randn_like):
    """eq. 5: the bound on -log p(x0) in bits/dim as its T + 1 terms, from one sample of each xt.

    x0 (B, ...) is on the 256 levels. variances: K tables sigma2[0..T], evaluated on the same xt.
    Returns float64 (K, B, T + 1): L_0 (the decoder), L_1, .., L_{T-1}, L_T. Their sum is the bound.
    """
    check_levels(x0)
    variances = [with_sigma_1(d, sigma2) for sigma2 in variances]
    terms = []
    for t in range(1, d.T + 1):
        xt = d.q_sample(x0, t, noise(x0))
        mean = d.p_mean(xt, t, model(xt, same_t(t, x0)), clip=clip)
        rows = [bound_term(d, x0, xt, t, mean, at(sigma2, t, x0)) for sigma2 in variances]
        terms.append(torch.stack(rows))
    terms.append(prior_term(d, x0).expand_as(terms[0]))
    return torch.stack(terms, dim=2).cpu().double()

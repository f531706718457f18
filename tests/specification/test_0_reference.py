"""The reference itself: reference_numpy.py, exact_models.py and network_numpy.py against definitions.

Each result is compared with a second derivation: the formula as the paper prints it, Bayes' rule by
quadrature, a derivative, an identity, a constant of the paper's schedule, or, for the network, plain
loops and the stored outputs of another library.
"""

import itertools
import json
import math
import pathlib

import exact_models
import network_numpy
import numpy as np
import pytest
from checks import EPS, close, has_law, rejects
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import integrate, signal, stats
from strategies import Case, cases, every_case, normal, unit

import reference_numpy as ref

PAPER = ref.linear_beta(1000)
SHORT = np.array([0.0, 0.1, 0.3, 0.6, 0.8])  # few, large steps: mistakes stand out
TEN = np.array([0.0, *np.linspace(0.05, 0.7, 10)])
MIXTURE = np.array([[0.3, 0.7], [-0.6, 0.5], [0.02, 0.1]])  # weights, means, variances


def t_steps(t):
    """Return the relative tolerance for results of t affine steps with positive terms.

    One step rounds a_t at most 2.5 times and v_t 3 times, by eps/2 each. So a_t, a_t^2 and v_t have
    relative errors of at most 1.25, 2.5 and 1.5 t eps. No formula multiplies more than three of them,
    and both sides have errors: 16 t eps.
    """
    return 16 * t * EPS


def tables(beta):
    """Return (alpha, alpha_bar, beta_tilde) as the paper prints them (eq. 4, 7)."""
    alpha_bar = np.cumprod(1 - beta)
    beta_tilde = np.full(len(beta), np.nan)
    beta_tilde[1:] = (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:]) * beta[1:]
    return 1 - beta, alpha_bar, beta_tilde


def normal_integral(f, low=-12.0, high=12.0):
    """Return the integral of f to 1e-10, in pieces of width 4."""
    total = 0.0
    for left in np.arange(low, high, 4):
        total += integrate.quad(f, left, left + 4, epsabs=1e-11, epsrel=1e-11, limit=200)[0]
    return total


@st.composite
def three_times(draw):
    """Return (case, s, u) with 0 <= s < u < t = case.t, on any schedule of two steps or more."""
    betas = draw(st.lists(st.floats(1e-6, 0.999), min_size=2, max_size=50))
    times = st.integers(0, len(betas))
    s, u, t = sorted(draw(st.lists(times, min_size=3, max_size=3, unique=True)))
    return Case(tuple(betas), t), s, u


# --- Schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [3, 10, 1000])
def test_sec4_reference_linear_beta_is_a_straight_line_between_the_given_ends(T):
    """beta_1 = 1e-4, beta_T = 0.02, and beta_{t+1} - 2 beta_t + beta_{t-1} = 0."""
    beta = ref.linear_beta(T)
    assert len(beta) == T + 1 and beta[0] == 0 and beta[1] == 1e-4 and beta[T] == 0.02
    # four values, each with the error of a weight, two products and a sum: 2 eps
    close("second difference", np.diff(beta[1:], 2), 0, 8 * EPS, scale=0.02)


@pytest.mark.parametrize("T", [2, 3, 10, 1000])
def test_reference_exponential_beta_grows_by_one_factor_between_the_given_ends(T):
    """beta_1 = 1e-4, beta_T = 0.066, and beta_{t+1} / beta_t is the same for all t."""
    beta = ref.exponential_beta(T)
    assert len(beta) == T + 1 and beta[0] == 0
    close("ends", beta[[1, T]], [1e-4, 0.066], 2 * EPS)
    # the rounded exponent, below 1, is multiplied by log 660 = 6.5; two entries and a quotient
    close("factor", beta[2:] / beta[1:-1], 660 ** (1 / (T - 1)), 16 * EPS)


@pytest.mark.parametrize("schedule", [ref.linear_beta, ref.exponential_beta])
def test_reference_schedules_with_one_step_are_beta_1(schedule):
    assert schedule(1, 0.25, 0.5).tolist() == [0, 0.25]


@pytest.mark.parametrize("T", [1, 2, 10, 50])
def test_iddpm_eq17_reference_cosine_beta_gives_the_squared_cosine(T):
    """alpha_bar_t = f(t) / f(0), f(t) = cos^2((t/T + 0.008) / 1.008 * pi/2), up to the clipped end."""
    beta = ref.cosine_beta(T)
    a, _ = ref.forward_moments(beta)
    f = np.cos((np.arange(T) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    # the angles have an error of eps pi/2, which cos near pi/2 turns into a relative error of eps T,
    # in each of T factors
    close("alpha_bar", a[:-1] ** 2, f / f[0], 8 * T**2 * EPS)
    assert beta[0] == 0 and beta[T] == 0.999  # f(T) = 0
    assert ref.cosine_beta(T, beta_max=0.5).max() == 0.5


# --- Forward process ------------------------------------------------------------------------------


@every_case
def test_eq4_reference_moments_are_the_products_of_alpha(case):
    """a_t^2 = alpha_bar_t = prod (1 - beta_s), and v_t = 1 - alpha_bar_t = -expm1(sum log(1 - beta_s))."""
    a, v = ref.forward_moments(case.beta)
    assert len(a) == len(v) == case.T + 1 and a[0] == 1 and v[0] == 0
    steps = case.beta[1 : case.t + 1]
    close("alpha_bar_t", a[case.t] ** 2, np.prod(1 - steps), t_steps(case.t))
    close("1 - alpha_bar_t", v[case.t], -np.expm1(np.log1p(-steps).sum()), t_steps(case.t))


@given(three_times())
def test_eq2_reference_transitions_compose(times):
    """x_s -> x_u -> x_t has the same law as x_s -> x_t: q(x_t | x_s) = N(k x_s, w)."""
    case, s, u = times
    k_1, w_1 = ref.transition(case.beta, s, u)
    k_2, w_2 = ref.transition(case.beta, u, case.t)
    k, w = ref.transition(case.beta, s, case.t)
    close("k", k_1 * k_2, k, t_steps(case.t))
    close("w", k_2**2 * w_1 + w_2, w, t_steps(case.t))


# --- Posterior ------------------------------------------------------------------------------------


@pytest.mark.parametrize("x0, xt", [(0.0, 1.0), (1.0, 0.0), (-0.7, 2.0)])
@pytest.mark.parametrize("s, t", [(1, 2), (2, 3), (1, 4), (3, 4)])
def test_eq6_reference_posterior_is_bayes_rule_by_quadrature(s, t, x0, xt):
    """q(x_s | x_t, x_0) = q(x_t | x_s) q(x_s | x_0) / normaliser: its mean and variance."""
    ab = tables(SHORT)[1]
    k2 = ab[t] / ab[s]

    def moment(f):
        def integrand(x):
            forward = stats.norm.pdf(x, np.sqrt(ab[s]) * x0, np.sqrt(1 - ab[s]))
            return f(x) * forward * stats.norm.pdf(xt, np.sqrt(k2) * x, np.sqrt(1 - k2))

        return integrate.quad(integrand, -12, 12, epsabs=0, epsrel=1e-12)[0]

    c_0, c_t, var = ref.posterior(SHORT, t, s)
    mean = moment(lambda x: x) / moment(lambda x: 1)
    # quad is asked for 1e-12 of each integral
    close("mean", c_0 * x0 + c_t * xt, mean, 1e-10, scale=1)
    close("variance", var, moment(lambda x: (x - mean) ** 2) / moment(lambda x: 1), 1e-10)


@given(three_times())
def test_eq6_reference_posteriors_compose(times):
    """Given x_0, x_t -> x_u -> x_s has the law of x_t -> x_s: a reversed Markov chain is Markov."""
    case, s, u = times
    late_0, late_t, late_var = ref.posterior(case.beta, case.t, u)
    early_0, early_u, early_var = ref.posterior(case.beta, u, s)
    c_0, c_t, var = ref.posterior(case.beta, case.t, s)
    close("c_0", early_0 + early_u * late_0, c_0, t_steps(case.t))
    close("c_t", early_u * late_t, c_t, t_steps(case.t))
    close("var", early_var + early_u**2 * late_var, var, t_steps(case.t))


@every_case
def test_eq7_reference_posterior_of_x_0_is_x_0(case):
    """q(x_0 | x_t, x_0) is a point mass: c_0 = 1, c_t = 0 and variance 0, without rounding."""
    assert ref.posterior(case.beta, case.t, 0) == (1, 0, 0)


# --- DDIM -----------------------------------------------------------------------------------------


@given(three_times(), st.floats(0, 1))
def test_ddim_reference_step_keeps_the_marginals_for_every_eta(times, eta):
    """k_0 + k_t a_t = a_s and k_t^2 v_t + sigma2 = v_s, where sigma2 = eta^2 var of the posterior."""
    case, _, s = times
    a, v = ref.forward_moments(case.beta)
    k_0, k_t, sigma2 = ref.ddim_step(case.beta, case.t, s, eta)
    close("mean", k_0 + k_t * a[case.t], a[s], t_steps(case.t))
    close("variance", k_t**2 * v[case.t] + sigma2, v[s], t_steps(case.t))
    var = ref.posterior(case.beta, case.t, s)[2]
    close("sigma2", sigma2, eta**2 * var, t_steps(case.t) + EPS, scale=var)


@given(three_times())
def test_ddim_reference_step_with_eta_1_is_the_posterior(times):
    case, _, s = times
    step = ref.ddim_step(case.beta, case.t, s, 1)
    close("(k_0, k_t, sigma2)", step, ref.posterior(case.beta, case.t, s), t_steps(case.t))


# --- Exact models ---------------------------------------------------------------------------------

components = st.lists(
    st.tuples(st.floats(0.01, 1), unit, st.just(0.0) | st.floats(0.01, 2)), min_size=1, max_size=4
)


@given(cases(), normal, components)
@example(Case((1e-6,), 1), 5.0, [(1.0, 0.0, 1 / 64)] * 2)  # every density underflows
def test_reference_eps_is_the_score_of_the_noisy_data(case, x, mixture):
    """E[eps | x_t] = -sqrt(v_t) d/dx log p(x_t), p(x_t) = sum of weight N(a_t m, a_t^2 s2 + v_t).

    The derivative is a complex step, Im p(x + ih) / (h Re p(x)), with h so small that h^2 vanishes.
    """
    weight, m, s2 = np.array(mixture).T
    weight = weight / weight.sum()
    a, v = ref.transition(case.beta, 0, case.t)
    total = a**2 * s2 + v
    h = 1e-20 * math.sqrt(v)
    exponent = -((x + 1j * h - a * m) ** 2) / (2 * total)
    p = (weight / np.sqrt(total) * np.exp(exponent - exponent.real.max())).sum()
    # An exponent E has the error |E| eps, and so has a component's share of the averaged eps, whose
    # size is at most `largest`. x - a x_0 loses eps (|x| + a |x_0|), which is divided by sqrt(v).
    largest = (np.sqrt(v) * abs(x - a * m) / total).max()
    scale = (1 + abs(exponent).max()) * largest + (abs(x) + a * abs(m).max()) / np.sqrt(v)
    scale += 1e-280  # for the smallest x, where h p underflows
    got = exact_models.eps_mixture(case.beta, case.t, x, weight, m, s2)
    close("eps", got, -np.sqrt(v) * p.imag / (h * p.real), 32 * EPS, scale)


@every_case
def test_eq14_reference_loss_minimum_is_reached_by_the_exact_model_only(case):
    """E[(eps - model - d)^2] = minimum + d^2; a model scaled by 1 + d has + d^2 E[model^2].

    The integrands are quadratic in (x_0, eps), so three Gauss-Hermite nodes each are exact.
    """
    nodes, share = np.polynomial.hermite_e.hermegauss(3)
    share = np.outer(share, share) / (2 * np.pi)
    x0 = 0.3 + 0.5 * nodes[:, None]  # N(0.3, 0.25)
    a, v = ref.transition(case.beta, 0, case.t)
    model = exact_models.eps_gaussian(case.beta, case.t, a * x0 + np.sqrt(v) * nodes, 0.3, 0.25)
    least = exact_models.loss_minimum_mixture(case.beta, case.t, np.ones(1), [0.3], [0.25])
    d = 0.1
    # eps of a mixture loses eps (|x| + a |m|) / sqrt(v), and |x| < 20
    tol = 64 * EPS / np.sqrt(v)
    close("exact model", (share * (nodes - model) ** 2).sum(), least, tol, 1)
    close("shifted model", (share * (nodes - model - d) ** 2).sum(), least + d**2, tol, 1)
    scaled = (share * (nodes - (1 + d) * model) ** 2).sum()
    close("scaled model", scaled, least + d**2 * (share * model**2).sum(), tol, 1)


@pytest.mark.parametrize("t", [1, 2, 3, 4])
def test_eq14_reference_loss_minimum_is_the_mean_of_the_variance_of_eps_given_xt(t):
    """Var(eps | x_t) by the law of total variance over the components, integrated over p(x_t)."""
    weight, m, s2 = MIXTURE
    a, v = ref.transition(SHORT, 0, t)
    total = a**2 * s2 + v

    def integrand(x):
        joint = weight * stats.norm.pdf(x, a * m, np.sqrt(total))
        mean = np.sqrt(v) * (x - a * m) / total  # E[eps | x_t, component]
        second_moment = 1 - v / total + mean**2
        return joint @ second_moment - (joint @ mean) ** 2 / joint.sum()

    got = exact_models.loss_minimum_mixture(SHORT, t, *MIXTURE)
    close("least loss", got, normal_integral(integrand), 1e-9, 1)


@given(cases(), normal, st.floats(-1, 5))
def test_cfg_eq6_reference_guided_eps_follows_bayes_rule(case, x, w):
    """p(x | y)^(1+w) p(x)^-w is proportional to p(x | y) p(y | x)^w: w times the slope of log p(y | x).

    p(y | x) is the responsibility of one of two components. The slope of its log is that of the
    component's log density minus the mean slope over the responsibilities.
    """
    weight, m, s2 = np.array([0.4, 0.6]), np.array([-0.5, 0.3]), np.array([0.1, 0.3])
    one = [1.0], m[:1], s2[:1]
    a, v = ref.transition(case.beta, 0, case.t)
    total = a**2 * s2 + v
    joint = weight * stats.norm.pdf(x, a * m, np.sqrt(total))
    slopes = -(x - a * m) / total
    slope = slopes[0] - joint @ slopes / joint.sum()
    want = exact_models.eps_mixture(case.beta, case.t, x, *one) - w * np.sqrt(v) * slope
    got = exact_models.guided_eps(case.beta, case.t, np.array(x), w, one, (weight, m, s2))
    # exponents up to x^2 / v; eps_mixture loses eps |x| / sqrt(v)
    scale = (1 + abs(w)) * (abs(x) + 1) / np.sqrt(v) * (1 + x**2)
    close("eps", got, want, 100 * EPS, scale)


# --- Samplers -------------------------------------------------------------------------------------

M, S2 = 0.5, 0.25  # Gaussian data N(M, S2)
GAUSSIAN = np.array([[1.0], [M], [S2]])
PATHS = [[4], [2, 5, 10], list(range(1, 11))]  # timesteps on TEN


def printed_ancestral(beta, sigma2):
    """Return [(t, p, q, variance)]: Algorithm 2 as printed, x_{t-1} = p x_t + q eps + noise."""
    alpha, ab, _ = tables(beta)
    steps = []
    for t in range(len(beta) - 1, 0, -1):
        q = -beta[t] / np.sqrt(1 - ab[t]) / np.sqrt(alpha[t])
        steps.append((t, 1 / np.sqrt(alpha[t]), q, sigma2[t] if t > 1 else 0.0))
    return steps


def printed_ddim(beta, timesteps, eta):
    """Return the same list for DDIM eq. 12 and 16, along the falling timesteps to 0."""
    _, ab, _ = tables(beta)
    steps = []
    for t, s in itertools.pairwise([*timesteps[::-1], 0]):
        sigma2 = eta**2 * (1 - ab[s]) / (1 - ab[t]) * (1 - ab[t] / ab[s])
        p = np.sqrt(ab[s] / ab[t])  # of x_t, in sqrt(alpha_bar_s) x0
        q = np.sqrt(max(1 - ab[s] - sigma2, 0)) - p * np.sqrt(1 - ab[t])
        steps.append((t, p, q, sigma2))
    return steps


def printed_moments(beta, steps, m=M, s2=S2):
    """Return (mean, var) of the output, from N(0, 1), with eps = g (x_t - a m) of data N(m, s2)."""
    ab = tables(beta)[1]
    mean, var = 0.0, 1.0
    for t, p, q, variance in steps:
        g = np.sqrt(1 - ab[t]) / (ab[t] * s2 + 1 - ab[t])
        mean = (p + q * g) * mean - q * g * np.sqrt(ab[t]) * m
        var = (p + q * g) ** 2 * var + variance
    return mean, var


def both_forms(sampler):
    """Return (the reference's steps, the printed steps) of a sampler on TEN.

    The sampler is the name of Algorithm 2's variance, or DDIM's eta on the timesteps 2, 5, 10.
    """
    if isinstance(sampler, float):
        timesteps = [2, 5, 10]
        return exact_models.ddim_steps(TEN, timesteps, sampler), printed_ddim(
            TEN, timesteps, sampler
        )
    sigma2 = TEN if sampler == "beta" else tables(TEN)[2]
    return exact_models.ancestral_steps(TEN, sigma2), printed_ancestral(TEN, sigma2)


def simulate(beta, steps, data, n=20_000):
    """Return n outputs of a sampler with printed steps and the exact eps of the data."""
    rng = np.random.default_rng(1)
    ab = tables(beta)[1]
    weight, m, s2 = data
    x = rng.standard_normal(n)
    for t, p, q, variance in steps:
        total = ab[t] * s2 + 1 - ab[t]
        joint = weight * stats.norm.pdf(x[:, None], np.sqrt(ab[t]) * m, np.sqrt(total))
        eps_of_each = np.sqrt(1 - ab[t]) * (x[:, None] - np.sqrt(ab[t]) * m) / total
        eps = (joint * eps_of_each).sum(axis=1) / joint.sum(axis=1)
        x = p * x + q * eps + np.sqrt(variance) * rng.standard_normal(n)
    return x


@pytest.mark.parametrize("m, s2", [(M, S2), (M, 0.0), (-0.3, 2.0)])
@pytest.mark.parametrize("beta", [SHORT, TEN], ids=["T=4", "T=10"])
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_algorithm2_reference_moments_are_those_of_the_printed_algorithm(variance, beta, m, s2):
    """The mean and variance of x_0; a point mass (s2 = 0) comes back exactly with beta_tilde."""
    sigma2 = beta if variance == "beta" else tables(beta)[2]
    got = exact_models.ancestral_moments(beta, sigma2, m, s2)
    # solving eq. 4 for x_0 costs eps / a_t per step; a_T > 0.05
    want = printed_moments(beta, printed_ancestral(beta, sigma2), m, s2)
    close("(mean, var)", got, want, 1e-13, 1)
    if s2 == 0 and variance == "beta_tilde":
        close("(mean, var)", got, (m, 0), 1e-13, 1)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("timesteps", PATHS, ids=str)
def test_ddim_reference_moments_are_those_of_the_printed_algorithm(timesteps, eta):
    """The mean and variance of x_0, from any timestep down to s = 0."""
    got = exact_models.ddim_moments(TEN, timesteps, eta, M, S2)
    want = printed_moments(TEN, printed_ddim(TEN, timesteps, eta))
    close("(mean, var)", got, want, 1e-13, 1)  # as above


@settings(deadline=None)
@every_case
def test_sec32_reference_sigma_beta_keeps_a_unit_gaussian(case):
    """For data N(0, 1) and sigma_t^2 = beta_t, x_t stays N(0, 1); the last, noiseless step leaves 1 - beta_1.

    The slope sqrt(1 - beta_t) of a step has an error of a few eps / a_t, because eq. 4 is solved for
    x_0. Later steps damp earlier errors, so at most t of them add up.
    """
    a, _ = ref.forward_moments(case.beta)
    mean, var = exact_models.ancestral_moments(case.beta[: case.t + 1], case.beta, 0, 1)
    tol = 16 * case.t * EPS / a[case.t]
    close("mean", mean, 0, tol, 1)
    close("variance", var, 1 - case.betas[0], tol, 1)


samplers = pytest.mark.parametrize("sampler", ["beta", "beta_tilde", 0.0, 0.5, 1.0])


@samplers
def test_reference_law_of_one_component_is_the_gaussian_with_the_moments(sampler):
    """Cells are 1/64 wide, so their middles add a variance of (1/64)^2 / 12 = 2e-5 per step."""
    steps, printed = both_forms(sampler)
    x, F = exact_models.mixture_law(TEN, steps, *GAUSSIAN)
    mean, var = printed_moments(TEN, printed)
    close("F", F, stats.norm.cdf(x, mean, np.sqrt(var)), 1e-3, 1)


@samplers
def test_reference_law_of_a_mixture_agrees_with_a_simulation(sampler):
    """The sampler must separate two unequal components in the right shares."""
    steps, printed = both_forms(sampler)
    samples = simulate(TEN, printed, MIXTURE)
    has_law("x_0", samples, *exact_models.mixture_law(TEN, steps, *MIXTURE))
    wrong = exact_models.mixture_law(TEN, steps, *GAUSSIAN)  # negative control: other data
    assert rejects(has_law, "x_0", samples, *wrong)


# --- Bound ----------------------------------------------------------------------------------------

means = st.floats(-3, 3)
variances = st.floats(0.01, 10)


@given(means, variances, means, variances)
def test_reference_kl_is_its_definition_by_quadrature(mean_1, var_1, mean_2, var_2):
    """KL = integral of p_1 (log p_1 - log p_2), in nats."""

    def integrand(x):
        log_1 = -((x - mean_1) ** 2) / (2 * var_1) - np.log(2 * np.pi * var_1) / 2
        log_2 = -((x - mean_2) ** 2) / (2 * var_2) - np.log(2 * np.pi * var_2) / 2
        return np.exp(log_1) * (log_1 - log_2)

    low, high = mean_1 - 12 * var_1**0.5, mean_1 + 12 * var_1**0.5
    want = integrate.quad(integrand, low, high, points=[mean_1], epsabs=1e-11, epsrel=1e-11)[0]
    # quad is asked for 1e-11
    close("KL", ref.gaussian_kl(mean_1, var_1, mean_2, var_2), want, 1e-10, 1 + want)


@given(means, st.floats(1e-6, 10))
def test_reference_kl_of_equal_distributions_is_zero(mean, var):
    """Up to the rounding of two numbers of size |log var| + 2."""
    close("KL", ref.gaussian_kl(mean, var, mean, var), 0, 4 * EPS, abs(np.log(var)) + 2)


@given(st.integers(0, 255), st.floats(-1.5, 1.5), st.floats(-4, 0.5))
def test_eq13_reference_decoder_is_the_integral_over_the_bin_by_quadrature(k, mean, log10_sd):
    """log of the integral of N(x; mean, var) over level k's bin, in every tail; end bins are infinite.

    In standard units, let e be the bin's point nearest to the mean. Scaled by the density at e, the
    integrand e^{(e^2 - z^2)/2} is 1 at e and negligible for |z - e| > 80 / (|e| + 5).
    """
    sd = 10**log10_sd
    low = -np.inf if k == 0 else (-1 + (2 * k - 1) / 255 - mean) / sd
    high = np.inf if k == 255 else (-1 + (2 * k + 1) / 255 - mean) / sd
    e = np.clip(0, low, high)
    reach = 80 / (abs(e) + 5)

    def area(left, right):
        def density(y):
            return np.exp(-y * (2 * e + y) / 2)

        return integrate.quad(density, left, right, epsabs=0, epsrel=1e-11, limit=200)[0]

    total = area(max(low - e, -reach), 0) + area(0, min(high - e, reach))
    want = -(e**2) / 2 + np.log(total / np.sqrt(2 * np.pi))
    # quad is asked for 1e-11, and e^2/2 has a relative error of a few eps
    close("log p(k)", ref.decoder_log_prob(k, mean, sd**2), want, 1e-10, 1 + abs(want))


@given(st.floats(-1.5, 1.5), st.floats(-8, 1))
def test_eq13_reference_decoder_sums_to_1_over_the_256_levels(mean, log10_var):
    """The bins cover the real line once."""
    log_prob = ref.decoder_log_prob(np.arange(256), mean, 10**log10_var)
    # each is the difference of two numbers below 1, with an error of a few eps
    close("sum", np.exp(log_prob).sum(), 1, 256 * 4 * EPS)


@pytest.mark.parametrize("share", [0.5, 0.2])
@pytest.mark.parametrize("k", [0, 100, 120, 127])
@pytest.mark.parametrize("beta_1", [1e-4, 0.01, 0.3])
def test_eq5_reference_bound_of_two_levels_is_that_by_quadrature(beta_1, k, share):
    """Level 255 - k (x_0 = p) has probability `share`, level k (x_0 = -p) the rest.

    Then E[x_0 | x_t] = p tanh(a_t p x_t / v_t + log(share / (1 - share)) / 2). The KL terms are those
    of equal means plus the squared gap of the means over 2 sigma^2.
    """
    beta = np.array([0.0, beta_1, 0.1, 0.9, 0.5])
    _, ab, beta_tilde = tables(beta)
    p = 1 - 2 * k / 255
    logit = np.log(share / (1 - share))
    terms = exact_models.expected_bound_terms(
        beta, beta, beta_1 / 2, [k, 255 - k], [1 - share, share]
    )
    for t in range(1, 5):

        def nats(z, level, x0, t=t):
            x = np.sqrt(ab[t]) * x0 + np.sqrt(1 - ab[t]) * z
            model_x0 = p * np.tanh(np.sqrt(ab[t]) * p * x / (1 - ab[t]) + logit / 2)
            if t == 1:
                return -ref.decoder_log_prob(level, model_x0, beta_1 / 2)
            gap = np.sqrt(ab[t - 1]) * beta[t] / (1 - ab[t]) * (x0 - model_x0)
            ratio = beta_tilde[t] / beta[t]
            return (ratio - 1 - np.log(ratio) + gap**2 / beta[t]) / 2

        def integrand(z, nats=nats):
            mean = share * nats(z, 255 - k, p) + (1 - share) * nats(z, k, -p)
            return mean * stats.norm.pdf(z)

        want = normal_integral(integrand) / np.log(2)
        close(f"L_{t - 1}", terms[t - 1], want, 1e-9, 1 + want)  # six integrals to 1e-11, in bits


@settings(max_examples=25)
@given(
    st.lists(st.floats(0.01, 0.9), min_size=1, max_size=5),
    st.dictionaries(st.integers(0, 255), st.floats(0.05, 1), min_size=1, max_size=4),
    st.floats(0, 1),
    st.floats(-3, 0),
)
def test_eq5_reference_bound_is_at_least_the_entropy(betas, data, between, log10_var):
    """H(x_0) <= L_0 + ... + L_T for any sigma_t between beta_tilde and beta, and any decoder."""
    beta = np.array([0.0, *betas])
    beta_tilde = [0.0] + [ref.posterior(beta, t)[2] for t in range(1, len(beta))]
    sigma2 = (1 - between) * np.array(beta_tilde) + between * beta
    levels = list(data)
    weights = np.array(list(data.values())) / sum(data.values())
    terms = exact_models.expected_bound_terms(beta, sigma2, 10**log10_var, levels, weights)
    assert len(terms) == len(beta)
    assert terms.min() >= -1e-8  # the accuracy of the quadrature
    assert terms.sum() >= exact_models.entropy_bits(weights) - 1e-8


def test_eq5_reference_bound_is_tight_where_nothing_can_be_lost():
    """Two distant levels and T = 1: x_1 identifies the level, and the decoder never errs, so L_0 = 0.

    With x_0^2 = 1, L_1 = KL(N(a_1 x_0, v_1) || N(0, 1)) = (v - log v + a^2 - 1) / 2 = -log(v) / 2.
    """
    beta = np.array([0.0, 0.01])
    terms = exact_models.expected_bound_terms(beta, [0, 0], 1e-8, [0, 255], [0.5, 0.5])
    close("L_0", terms[0], 0, 1e-8, 1)
    close("L_1", terms[1], -np.log2(0.01) / 2, 8 * EPS)


@pytest.mark.parametrize("beta", [SHORT, TEN], ids=["T=4", "T=10"])
def test_eq5_reference_kl_terms_vanish_with_beta_tilde_and_perfect_eps(beta):
    """A single level makes eps perfect: L_{t-1} = 0 for t >= 2 if sigma_t^2 = beta_tilde_t."""
    terms = exact_models.expected_bound_terms(beta, tables(beta)[2], 0.01, [200], [1.0])
    # differences of numbers of size |log beta_tilde| + 2 < 8, in bits; beta_tilde has T roundings
    close("L_1 .. L_{T-1}", terms[1:-1], 0, 8 * len(beta) * EPS, 1)
    assert terms[0] > 0 and terms[-1] > 0


@pytest.mark.parametrize("n", [1, 2, 4])
def test_reference_entropy_of_n_equal_weights_is_log2_n(n):
    close("H", exact_models.entropy_bits(np.full(n, 1 / n)), np.log2(n), 4 * EPS)


# --- Constants of the paper's schedule ------------------------------------------------------------


def rounds_to(value, printed):
    """Assert that the value, rounded to as many digits as `printed` has, reads as printed."""
    digits = len(printed.split("e")[0].replace(".", "").lstrip("0"))
    assert float(f"{value:.{digits - 1}e}") == float(printed), f"{value!r} is not {printed}"


def test_sec4_reference_alpha_bar_at_the_end_of_the_papers_schedule():
    rounds_to(ref.forward_moments(PAPER)[0][1000] ** 2, "4.0358297654e-5")


@pytest.mark.parametrize("t, ratio", [(2, "0.4547"), (10, "0.8528"), (100, "0.9819")])
def test_eq7_reference_beta_tilde_over_beta_of_the_papers_schedule(t, ratio):
    rounds_to(ref.posterior(PAPER, t)[2] / PAPER[t], ratio)


def test_eq7_reference_sigma_1_of_the_papers_schedule_is_beta_tilde_2():
    rounds_to(ref.decoder_variance(PAPER), "5.4532e-5")


@pytest.mark.parametrize("level", [0, 255])
def test_eq5_reference_prior_term_of_the_papers_schedule(level):
    """L_T = 2.91e-5 bits per dimension at |x_0| = 1."""
    rounds_to(ref.prior_term(PAPER, level) / np.log(2), "2.91e-5")


def test_eq5_reference_sum_of_kl_terms_of_the_papers_schedule_with_beta():
    """With perfect eps and sigma_t^2 = beta_t, the terms t >= 2 sum to 0.4864 bits per dimension."""
    kl = [ref.gaussian_kl(0, ref.posterior(PAPER, t)[2], 0, PAPER[t]) for t in range(2, 1001)]
    rounds_to(sum(kl) / np.log(2), "0.4864")


# --- Improved DDPM --------------------------------------------------------------------------------


@given(cases(), st.data())
def test_iddpm_eq19_reference_respaced_betas_multiply_to_the_same_alpha_bar(case, data):
    """prod (1 - beta'_i) is alpha_bar at the chosen timesteps; with all timesteps, beta' is beta."""
    timesteps = sorted(data.draw(st.sets(st.integers(1, case.T), min_size=1), label="timesteps"))
    alpha_bar = np.cumprod(1 - ref.respaced_beta(case.beta, timesteps))
    close("alpha_bar", alpha_bar, tables(case.beta)[1][[0, *timesteps]], 16 * case.T * EPS, 1)
    close("beta", ref.respaced_beta(case.beta, range(1, case.T + 1)), case.beta, 4 * EPS)


@given(cases(), st.floats(-1, 2))
@example(Case((0.3,), 1), 0.5)
def test_iddpm_eq15_reference_variance_is_the_printed_formula(case, v):
    """exp(v log beta_t + (1 - v) log beta_tilde_t); at t = 1 beta_tilde_2, or beta_1 if T = 1."""
    _, _, beta_tilde = tables(case.beta)
    low = beta_tilde[max(case.t, 2)] if case.T > 1 else case.beta[1]
    want = np.exp(v * np.log(case.beta[case.t]) + (1 - v) * np.log(low))
    tol = (1 + abs(v)) * (t_steps(case.t) + 8 * EPS / min(case.betas) + 64 * EPS)
    close("sigma^2", ref.learned_variance(case.beta, case.t, v), want, tol)


@pytest.mark.parametrize("gap", [0.0, -0.2, 0.7])
@pytest.mark.parametrize("v", [-0.5, 0.0, 0.6, 1.0])
@pytest.mark.parametrize("t", [2, 3, 4])
def test_iddpm_eq16_reference_slope_is_the_derivative_of_the_kl(t, gap, v):
    """A central difference of gaussian_kl over v."""
    beta_tilde = ref.posterior(SHORT, t)[2]
    sigma2 = ref.learned_variance(SHORT, t, np.array([v + 1e-5, v - 1e-5]))
    up, down = ref.gaussian_kl(gap, beta_tilde, 0.0, sigma2)
    want = (up - down) / 2e-5
    close("slope", ref.learned_slope(SHORT, t, gap, v), want, 1e-8, 1 + gap**2 / beta_tilde)


@every_case
def test_reference_exact_variance_grows_with_the_data_from_beta_tilde_to_beta(case):
    """s2 = 0: x_0 is known. s2 = 1: x_t is N(0, 1) at every t. It stays below beta_t / (1 - beta_t)."""
    data = (0, 0.1, 0.5, 1, 10, 1e6)
    var = [exact_models.exact_variance_gaussian(case.beta, case.t, s2) for s2 in data]
    tol = 4 * t_steps(case.t)
    close("s2 = 0", var[0], ref.posterior(case.beta, case.t)[2], tol)
    close("s2 = 1", var[3], case.beta[case.t], tol)
    assert (np.diff(var) > -tol * var[-1]).all()
    assert var[-1] <= case.beta[case.t] / (1 - case.beta[case.t]) * (1 + tol)


@pytest.mark.parametrize("t, s2", [(2, 0.25), (3, 0.04), (4, 2.0)])
def test_reference_kl_term_is_the_mean_of_the_kl_over_x0_and_xt(t, s2):
    """The KL is quadratic in (x_0, eps), so three Gauss-Hermite nodes each are exact."""
    nodes, share = np.polynomial.hermite_e.hermegauss(3)
    share = np.outer(share, share) / (2 * np.pi)
    a, v = ref.transition(SHORT, 0, t)
    x0 = 0.2 + np.sqrt(s2) * nodes[:, None]
    xt = a * x0 + np.sqrt(v) * nodes
    predicted_x0 = (xt - np.sqrt(v) * exact_models.eps_gaussian(SHORT, t, xt, 0.2, s2)) / a
    c_0, c_t, beta_tilde = ref.posterior(SHORT, t)
    for sigma2 in (exact_models.exact_variance_gaussian(SHORT, t, s2), beta_tilde, SHORT[t]):
        mu_tilde = c_0 * x0 + c_t * xt
        mu = c_0 * predicted_x0 + c_t * xt
        want = (share * ref.gaussian_kl(mu_tilde, beta_tilde, mu, sigma2)).sum()
        # nine numbers of size 10
        close("L_{t-1}", exact_models.kl_term_gaussian(SHORT, t, s2, sigma2), want, 1e-13, 10)


# --- Layers of the network ------------------------------------------------------------------------


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def random_weights(roles, size=0.3):
    """Return random weights of moderate size for these names and shapes."""
    return {name: size * random(*shape, seed=i) for i, (name, shape) in enumerate(roles)}


@pytest.mark.parametrize("dim", [4, 32, 128])
def test_reference_embedding_is_sines_then_cosines_of_falling_frequencies(dim):
    """Entry i is sin(t / 10000^(i / (d/2 - 1))), entry i + d/2 the cosine, for i < d/2."""
    times = [0, 1, 30, 500, 999]
    got = network_numpy.timestep_embedding(np.array(times), dim)
    assert got.shape == (len(times), dim)
    for row, t in zip(got, times, strict=True):
        angles = [t / 10000 ** (i / (dim // 2 - 1)) for i in range(dim // 2)]
        want = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        # an angle has a relative error of a few eps, times log 10000 = 9 for its exponent
        close(f"embedding of t = {t}", row, want, 16 * EPS, 1 + t)


@given(normal)
def test_reference_silu_is_x_times_the_logistic_function(x):
    close("silu", network_numpy.silu(x), x / (1 + math.exp(-x)), 8 * EPS)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pad", [((1, 1), (1, 1)), ((0, 1), (0, 1)), ((0, 0), (2, 1))], ids=str)
def test_reference_convolution_agrees_with_scipy(stride, pad):
    """y[o] = b[o] + sum over channels of correlate2d(padded x[c], w[o, c]), every stride-th entry."""
    x, w, b = random(2, 3, 6, 7), random(4, 3, 3, 3, seed=1), random(4, seed=2)
    y = network_numpy.conv2d(x, w, b, stride, pad)
    padded = np.pad(x, ((0, 0), (0, 0), *pad))
    for image, o in itertools.product(range(2), range(4)):
        each = [signal.correlate2d(padded[image, c], w[o, c], "valid") for c in range(3)]
        want = b[o] + sum(each)[::stride, ::stride]
        # 27 products of numbers below 4
        close(f"image {image}, channel {o}", y[image, o], want, 27 * 16 * EPS, 1)


def test_reference_group_norm_gives_each_group_mean_0_and_variance_1():
    """A group's variance s2 becomes s2 / (s2 + 1e-6); a group is C/groups neighbouring channels."""
    x = random(2, 6, 4, 5) * np.arange(1, 7)[:, None, None] * 1e-3 + 3e-3
    y = network_numpy.group_norm(x, 3, np.ones(6), np.zeros(6))
    for first in (0, 2, 4):
        group = y[:, first : first + 2]
        before = x[:, first : first + 2].var(axis=(1, 2, 3))
        # sums of 40 numbers below 10
        close("mean", group.mean(axis=(1, 2, 3)), 0, 400 * EPS, 1)
        close("variance", group.var(axis=(1, 2, 3)), before / (before + 1e-6), 400 * EPS)


def test_reference_group_norm_scales_and_shifts_each_channel():
    x, gamma, shift = random(2, 6, 4, 5), random(6, seed=1), random(6, seed=2)
    plain = network_numpy.group_norm(x, 2, np.ones(6), np.zeros(6))
    want = gamma[:, None, None] * plain + shift[:, None, None]
    close("output", network_numpy.group_norm(x, 2, gamma, shift), want, 4 * EPS, 10)


def test_reference_attention_averages_values_with_the_softmax_over_the_keys():
    """Pixel p receives out(sum_r share_r v_r), share_r proportional to exp(q_p . k_r / sqrt(C)).

    The loop over pixels also implies that attention commutes with permuting the pixels.
    """
    weights = random_weights(network_numpy.attention_roles("", 4), size=1.0)
    matrix = {name: weights[f"{name}.weight"][:, :, 0, 0] for name in ("q", "k", "v", "out")}
    bias = {name: weights[f"{name}.bias"] for name in matrix}
    x = random(1, 4, 2, 3)
    pixels = [x[0, :, row, column] for row in range(2) for column in range(3)]
    keys = [matrix["k"] @ pixel + bias["k"] for pixel in pixels]
    values = [matrix["v"] @ pixel + bias["v"] for pixel in pixels]
    got = network_numpy.self_attention(x, weights)[0].reshape(4, 6)
    for p, pixel in enumerate(pixels):
        q = matrix["q"] @ pixel + bias["q"]
        share = np.array([math.exp(q @ key / 2) for key in keys])
        mixed = sum(s * value for s, value in zip(share / share.sum(), values, strict=True))
        # exponents of some tens
        close(f"pixel {p}", got[:, p], matrix["out"] @ mixed + bias["out"], 1e4 * EPS, 1)


# --- Network --------------------------------------------------------------------------------------

DIFFUSERS = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "diffusers"
# parts of diffusers' names, and of ours; diffusers counts the levels of the way up in order of use
THEIR_NAMES = [
    ("time_embedding.linear_1", "time.0"),
    ("time_embedding.linear_2", "time.1"),
    ("conv_norm_out", "norm_out"),
    ("mid_block.resnets", "mid"),
    ("mid_block.attentions.0", "mid.0.attention"),
    ("down_blocks.0.resnets.0", "down.0.0"),
    ("down_blocks.0.downsamplers.0.conv", "shrink.0"),
    ("down_blocks.1.resnets.0", "down.1.0"),
    ("down_blocks.1.attentions.0", "down.1.0.attention"),
    ("up_blocks.0.resnets", "up.1"),
    ("up_blocks.0.attentions.0", "up.1.0.attention"),
    ("up_blocks.0.attentions.1", "up.1.1.attention"),
    ("up_blocks.0.upsamplers.0.conv", "grow.1"),
    ("up_blocks.1.resnets", "up.0"),
    ("time_emb_proj", "emb"),
    ("conv_shortcut", "shortcut"),
    ("group_norm", "norm"),
    ("to_out.0", "out"),
    ("to_", ""),
]


def diffusers_weights():
    """Return the float32 weights of the stored UNet2DModel, under our names.

    A safetensors file is the length of its header in 8 bytes, a JSON header, and raw numbers.
    """
    content = (DIFFUSERS / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    weights = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            array = np.frombuffer(content[start + first : start + last], "<f4")
            for theirs, ours in THEIR_NAMES:
                name = name.replace(theirs, ours)
            weights[name] = array.reshape(entry["shape"]).astype(np.float64)
    return weights


def test_appB_reference_unet_computes_what_diffusers_computes():
    """The stored outputs of diffusers' UNet2DModel at all 20 timesteps, from the same weights.

    The file anchors the architecture outside this project: the order of the layers and of the skips,
    the padding, the norms, attention, the shortcuts, the embedding of t - 1. Diffusers counts t from 0.
    """
    stored = np.load(DIFFUSERS / "outputs.npz")
    weights = diffusers_weights()
    sizes = dict(ch=8, mult=(1, 2), blocks=1, attention=(1,), groups=4)
    for t in range(20):
        got = network_numpy.unet(stored["x"], np.full(2, t + 1), weights, **sizes)
        # theirs is float32, through some tens of layers
        close(f"eps at t = {t + 1}", got, stored["eps"][t], 1e-5, 1)
    assert abs(stored["eps"][1:] - stored["eps"][:-1]).max(axis=(1, 2, 3, 4)).min() > 1e-3


CIFAR = dict(in_channels=3, out_channels=3, ch=128, mult=(1, 2, 2, 2), blocks=2, attention=(1,))
TINY = dict(in_channels=2, out_channels=1, ch=4, mult=(1, 2), blocks=1, attention=(1,))


def run(x, t, weights, labels=None, **config):
    """Return the output of the network with these weights and settings, and groups = 2."""
    sizes = {key: config[key] for key in ("ch", "mult", "blocks", "attention")}
    return network_numpy.unet(x, np.array(t), weights, **sizes, groups=2, labels=labels)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"mult": (1, 2, 2), "attention": ()},
        {"mult": (1, 1, 3), "attention": (0, 2)},
        {"blocks": 2, "out_channels": 3},
    ],
    ids=str,
)
def test_reference_unet_needs_each_of_the_listed_weights_and_no_other(change):
    """Without one of the names that `roles` lists, the network raises KeyError with it."""
    config = TINY | change
    weights = random_weights(network_numpy.roles(**config))
    x = random(2, 2, 4, 8)
    y = run(x, [1, 7], weights, **config)
    assert y.shape == (2, config["out_channels"], 4, 8) and np.isfinite(y).all()
    for missing in weights:
        with pytest.raises(KeyError) as error:
            run(x, [1, 7], {k: w for k, w in weights.items() if k != missing}, **config)
        assert missing.endswith(error.value.args[0])


@pytest.mark.parametrize(
    "change, count",
    [
        ({}, 35_746_307),
        ({"mult": (1, 1, 2, 2, 4, 4), "attention": (4,)}, 113_673_219),
        ({"out_channels": 6}, 35_749_766),
        ({"num_classes": 10}, 35_746_307 + 11 * 512),
    ],
    ids=["CIFAR-10", "256x256", "learned variance", "labels"],
)
def test_appB_reference_unet_has_the_papers_number_of_parameters(change, count):
    """35.7 million for CIFAR-10 and 114 million for 256x256 (appendix B), to the last one."""
    assert network_numpy.unet_parameter_count(**CIFAR | change) == count


def test_reference_unet_adds_the_row_of_the_label_to_the_embedding():
    """No labels means the last row of the table. A row of zeros equals a network without labels."""
    config = TINY | {"num_classes": 3}
    weights = random_weights(network_numpy.roles(**config))
    weights["label.weight"][1] = 0
    x, t = random(2, 2, 8, 8), [3, 9]
    no_label = run(x, t, weights, **config)
    close("no label", no_label, run(x, t, weights, labels=[3, 3], **config), 0)
    without = run(x, t, {k: w for k, w in weights.items() if k != "label.weight"}, **config)
    gap = abs(run(x, t, weights, labels=[1, 2], **config) - without).max(axis=(1, 2, 3))
    assert gap[0] == 0 and gap[1] > 1e-3


def test_reference_unet_treats_every_image_on_its_own():
    """A batch gives what its images give alone, each with its own t."""
    weights = random_weights(network_numpy.roles(**TINY))
    x, t = random(2, 2, 8, 8), [3, 9]
    alone = [run(x[i : i + 1], t[i : i + 1], weights, **TINY) for i in (0, 1)]
    # some hundred operations per layer, thirty layers, numbers of a few units
    close("output", run(x, t, weights, **TINY), np.concatenate(alone), 1e5 * EPS, 1)


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9999])
def test_reference_ema_agrees_with_its_recursion(decay):
    """average <- d average + (1 - d) w_n, d = min(decay, (1 + n) / (10 + n)), n = 1, 2, .."""
    weights = random(30, 2, 3)
    average = weights[0]
    for n in range(1, 30):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * weights[n]
    # thirty steps of a few roundings, numbers below 4
    close("average", ref.ema(weights, decay), average, 30 * 16 * EPS, 1)

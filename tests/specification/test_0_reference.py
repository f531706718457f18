"""The reference itself is tested: what reference_numpy.py says, against the definitions.

Its judges are exact fractions, Bayes' rule by quadrature, derivatives, simulations written as the
paper prints the algorithms, and the constants of the paper's schedule.
"""

import ast
import inspect
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from judge import EPS, close, has_law, has_mean, has_normal_moments, rejects
from scipy import integrate, signal, stats
from strategies import Case, cases, every_case, normal, unit

import reference_numpy as ref

N = 20_000  # simulated values: a variance is then tested to about 5 percent
PAPER = ref.linear_beta(1000)
SHORT = np.array([0.0, 0.1, 0.3, 0.6, 0.8])  # few, big steps: mistakes stand out
TEN = np.array([0.0, *np.linspace(0.05, 0.7, 10)])


def t_steps(t):
    """Relative tolerance of what t affine steps give when all their terms are positive.

    A step makes at most 2.5 roundings of eps/2 in a_t and 3 in v_t, so that a_t, a_t^2 and v_t are
    good to 1.25, 2.5 and 1.5 t eps; no formula here multiplies more than three of them, and there
    are two sides to compare: 16 t eps.
    """
    return 16 * t * EPS


def tables(beta):
    """(alpha, alpha_bar, beta_tilde) as the paper prints them (eq. 4, 7)."""
    alpha_bar = np.cumprod(1 - beta)
    beta_tilde = np.full(len(beta), np.nan)
    beta_tilde[1:] = (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:]) * beta[1:]
    return 1 - beta, alpha_bar, beta_tilde


@st.composite
def three_times(draw):
    """(case, s, u) with 0 <= s < u < t = case.t, on any schedule of two steps or more."""
    betas = draw(st.lists(st.floats(1e-6, 0.999), min_size=2, max_size=50))
    times = st.integers(0, len(betas))
    s, u, t = sorted(draw(st.lists(times, min_size=3, max_size=3, unique=True)))
    return Case(tuple(betas), t), s, u


# ---------------------------------------------------------------------------- the file


def test_reference_functions_have_at_most_15_lines_of_code():
    """15 lines after the docstring, and nothing but NumPy, SciPy and exact numbers imported."""
    source = inspect.getsource(ref)
    tree = ast.parse(source)
    for f in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        assert ast.get_docstring(f) or f.name == "block", f"{f.name} has no derivation"
        first = f.body[1].lineno if ast.get_docstring(f) else f.body[0].lineno
        code = [line for line in source.splitlines()[first - 1 : f.end_lineno] if line.strip()]
        assert len(code) <= 15, f"{f.name} has {len(code)} lines of code"
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))
    modules = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert modules == {"numpy", "scipy", "scipy.special", "fractions", "decimal"}
    assert "torch" not in source


# ---------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("T", [3, 10, 1000])
def test_sec4_reference_linear_beta_has_equal_steps_between_the_given_ends(T):
    """beta_1 = 1e-4 and beta_T = 0.02 exactly, beta_{t+1} - 2 beta_t + beta_{t-1} = 0."""
    beta = ref.linear_beta(T)
    assert len(beta) == T + 1 and beta[0] == 0 and beta[1] == 1e-4 and beta[T] == 0.02
    # four values, each rounded once by at most eps/2 times itself
    close("second difference", np.diff(beta[1:], 2), 0, 2 * EPS, scale=0.02)


@pytest.mark.parametrize("T", [2, 3, 10, 1000])
def test_reference_exponential_beta_grows_by_one_factor_between_the_given_ends(T):
    """beta_1 = 1e-4 and beta_T = 0.066 exactly, beta_{t+1} / beta_t the same for all t."""
    beta = ref.exponential_beta(T)
    assert len(beta) == T + 1 and beta[0] == 0 and beta[1] == 1e-4 and beta[T] == 0.066
    # two rounded entries and a quotient on the left; the power amplifies nothing: exponent <= 1
    close("factor", beta[2:] / beta[1:-1], 660 ** (1 / (T - 1)), 4 * EPS)


@pytest.mark.parametrize("schedule", [ref.linear_beta, ref.exponential_beta])
def test_reference_schedules_of_one_step_are_beta_1(schedule):
    """T = 1: beta = (0, beta_1)."""
    assert schedule(1, 0.25, 0.5).tolist() == [0, 0.25]


@pytest.mark.parametrize("T", [1, 2, 10, 50])
def test_iddpm_eq17_reference_cosine_beta_gives_the_squared_cosine(T):
    """alpha_bar_t = f(t) / f(0), f(t) = cos^2((t/T + 0.008) / 1.008 * pi/2), until the clip."""
    beta = ref.cosine_beta(T)
    a, _ = ref.forward_moments(beta)
    f = np.cos((np.arange(T) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    # the angles are good to eps pi/2, and cos near pi/2 turns that into eps T relative, at T
    # places of the product
    close("alpha_bar", a[:-1] ** 2, f / f[0], 8 * T**2 * EPS)
    assert beta[0] == 0 and beta[T] == 0.999  # where f(T) = 0
    assert ref.cosine_beta(T, beta_max=0.5).max() == 0.5


# ---------------------------------------------------------------------------- forward process


@every_case
def test_eq4_reference_moments_agree_with_exact_fractions(case):
    """a_t^2 = alpha_bar_t and v_t = 1 - alpha_bar_t, alpha_bar_t = product of 1 - beta_s."""
    ones = [b.as_integer_ratio() for b in case.betas[: case.t]]  # 1 - beta = (d - n) / d
    d = math.prod(d for _, d in ones)
    exact = Fraction(math.prod(d - n for n, d in ones), d)
    a, v = ref.forward_moments(case.beta)
    assert len(a) == len(v) == case.T + 1 and a[0] == 1 and v[0] == 0
    close("alpha_bar_t", a[case.t] ** 2, float(exact), t_steps(case.t))
    close("1 - alpha_bar_t", v[case.t], float(1 - exact), t_steps(case.t))


@given(three_times())
def test_eq2_reference_transitions_compose(times):
    """x_s -> x_u -> x_t is x_s -> x_t, q(x_t | x_s) = N(k x_s, w)."""
    case, s, u = times
    k_1, w_1 = ref.transition(case.beta, s, u)
    k_2, w_2 = ref.transition(case.beta, u, case.t)
    k, w = ref.transition(case.beta, s, case.t)
    close("k", k_1 * k_2, k, t_steps(case.t))
    close("w", k_2**2 * w_1 + w_2, w, t_steps(case.t))


# ---------------------------------------------------------------------------- posterior


@pytest.mark.parametrize("s, t", [(1, 2), (2, 3), (1, 4), (3, 4)])
def test_eq6_reference_posterior_agrees_with_bayes_rule_by_quadrature(s, t):
    """q(x_s | x_t, x_0) = q(x_t | x_s) q(x_s | x_0) / normaliser: its mean and variance."""
    _, ab, _ = tables(SHORT)
    k2 = ab[t] / ab[s]
    c_0, c_t, var = ref.posterior(SHORT, t, s)
    for x0, xt in ((0.0, 1.0), (1.0, 0.0), (-0.7, 2.0)):

        def joint(x, x0=x0, xt=xt):
            first = np.exp(-((x - np.sqrt(ab[s]) * x0) ** 2) / (2 * (1 - ab[s])))
            return first * np.exp(-((xt - np.sqrt(k2) * x) ** 2) / (2 * (1 - k2)))

        def moment(f, joint=joint):
            return integrate.quad(lambda x: f(x) * joint(x), -12, 12, epsabs=0, epsrel=1e-12)[0]

        mean = moment(lambda x: x) / moment(lambda x: 1)
        # quad is asked for 1e-12 of each integral; 1e-10 leaves it a margin
        close("mean", c_0 * x0 + c_t * xt, mean, 1e-10, scale=1)
        spread = moment(lambda x, mean=mean: (x - mean) ** 2) / moment(lambda x: 1)
        close("variance", var, spread, 1e-10)


@given(three_times())
def test_eq6_reference_posterior_jumps_compose(times):
    """Given x_0, x_t -> x_u -> x_s is x_t -> x_s: the reverse of a Markov chain is one."""
    case, s, u = times
    late_0, late_t, late_var = ref.posterior(case.beta, case.t, u)
    early_0, early_u, early_var = ref.posterior(case.beta, u, s)
    c_0, c_t, var = ref.posterior(case.beta, case.t, s)
    close("c_0", early_0 + early_u * late_0, c_0, t_steps(case.t))
    close("c_t", early_u * late_t, c_t, t_steps(case.t))
    close("var", early_var + early_u**2 * late_var, var, t_steps(case.t))


@every_case
def test_eq7_reference_posterior_keeps_the_marginals(case):
    """If x_t ~ q(x_t | x_0), then x_{t-1} ~ q(x_{t-1} | x_0): mean and variance."""
    a, v = ref.forward_moments(case.beta)
    c_0, c_t, var = ref.posterior(case.beta, case.t)
    close("mean", c_0 + c_t * a[case.t], a[case.t - 1], t_steps(case.t))
    close("variance", c_t**2 * v[case.t] + var, v[case.t - 1], t_steps(case.t))


@every_case
def test_eq7_reference_posterior_of_x_0_is_x_0(case):
    """q(x_0 | x_t, x_0) is a point mass: c_0 = 1, c_t = 0, variance 0, with no rounding."""
    assert ref.posterior(case.beta, case.t, 0) == (1, 0, 0)


# ---------------------------------------------------------------------------- DDIM


@given(three_times(), st.floats(0, 1))
def test_ddim_reference_step_keeps_the_marginals_for_every_eta(times, eta):
    """k_0 + k_t a_t = a_s and k_t^2 v_t + sigma2 = v_s, sigma2 = eta^2 times the posterior's."""
    case, _, s = times
    a, v = ref.forward_moments(case.beta)
    k_0, k_t, sigma2 = ref.ddim_step(case.beta, case.t, s, eta)
    close("mean", k_0 + k_t * a[case.t], a[s], t_steps(case.t))
    close("variance", k_t**2 * v[case.t] + sigma2, v[s], t_steps(case.t))
    var = ref.posterior(case.beta, case.t, s)[2]
    close("sigma2", sigma2, eta**2 * var, t_steps(case.t) + EPS, scale=var)


@given(three_times())
def test_ddim_reference_step_with_eta_1_is_the_posterior(times):
    """eta = 1: k_0, k_t, sigma2 are those of q(x_s | x_t, x_0)."""
    case, _, s = times
    step = ref.ddim_step(case.beta, case.t, s, 1)
    close("(k_0, k_t, sigma2)", step, ref.posterior(case.beta, case.t, s), t_steps(case.t))


@every_case
def test_ddim_reference_step_with_eta_0_keeps_eps(case):
    """eta = 0: x_t = a_t x_0 + sqrt(v_t) eps goes to a_s x_0 + sqrt(v_s) eps, without noise."""
    s = case.t // 2
    _, v = ref.forward_moments(case.beta)
    _, k_t, sigma2 = ref.ddim_step(case.beta, case.t, s, 0)
    assert sigma2 == 0
    close("factor of eps", k_t * np.sqrt(v[case.t]), np.sqrt(v[s]), t_steps(case.t))


# ---------------------------------------------------------------------------- exact models

components = st.lists(
    st.tuples(st.floats(0.01, 1), unit, st.just(0.0) | st.floats(0.01, 2)), min_size=1, max_size=4
)


@given(cases(), normal, components)
@example(
    Case((1e-6,), 1), 5.0, [(1.0, 0.0, 1 / 64)] * 2
)  # responsibilities that sum to 1 - 1e-13 are seen
def test_reference_eps_is_the_score_of_the_noisy_data(case, x, mixture):
    """E[eps | x_t] = -sqrt(v_t) d/dx log p(x_t), p(x_t) = sum of weight N(a_t m, a_t^2 s2 + v_t).

    The derivative by a complex step: Im p(x + ih) / (h Re p(x)), h so small that h^2 vanishes.
    """
    weight, m, s2 = np.array(mixture).T
    weight = weight / weight.sum()
    a, v = ref.transition(case.beta, 0, case.t)
    total, h = a**2 * s2 + v, 1e-20 * math.sqrt(v)
    exponent = -((x + 1j * h - a * m) ** 2) / (2 * total)
    p = (weight / np.sqrt(total) * np.exp(exponent - exponent.real.max())).sum()
    # An exponent E is good to |E| eps: so are the components' weights in the average of their eps
    # of at most `most`. And x - a x_0 has lost eps (|x| + a |x_0|), then divided by sqrt(v).
    most = (np.sqrt(v) * abs(x - a * m) / total).max()
    scale = (1 + abs(exponent).max()) * most + (abs(x) + a * abs(m).max()) / np.sqrt(v)
    scale += 1e-280  # for the smallest x, where h p underflows
    got = ref.eps_mixture(case.beta, case.t, x, weight, m, s2)
    close("eps", got, -np.sqrt(v) * p.imag / (h * p.real), 32 * EPS, scale)


@given(cases(), normal, unit, st.floats(0.01, 2))
def test_reference_eps_of_a_gaussian_is_that_of_a_mixture_of_one(case, x, m, s2):
    """The regression of eps on x_t and that of x_0 on x_t are the same statement."""
    a, v = ref.transition(case.beta, 0, case.t)
    one = ref.eps_mixture(case.beta, case.t, x, [1.0], [m], [s2])
    # (x - a x_0) / sqrt(v) has lost eps (|x| + a |m|) / sqrt(v)
    scale = (abs(x) + a * abs(m)) / np.sqrt(v)
    close("eps", ref.eps_gaussian(case.beta, case.t, x, m, s2), one, 8 * EPS, scale)


@every_case
def test_eq14_reference_loss_minimum_is_that_of_the_exact_model_and_no_other(case):
    """E[(eps - E[eps | x_t] - d)^2] = minimum + d^2, and + d^2 E[model^2] for (1 + d) model.

    Integrands are quadratic in (x_0, eps): three Gauss-Hermite nodes each integrate them exactly.
    """
    nodes, share = np.polynomial.hermite_e.hermegauss(3)
    share = np.outer(share, share) / (2 * np.pi)
    m, s2, d = 0.3, 0.25, 0.1
    x0, eps = m + np.sqrt(s2) * nodes[:, None], nodes
    a, v = ref.transition(case.beta, 0, case.t)
    model = ref.eps_gaussian(case.beta, case.t, a * x0 + np.sqrt(v) * eps, m, s2)
    least = ref.loss_minimum_gaussian(case.beta, case.t, s2)
    # numbers up to 2; x - a m loses eps |x| for a model that divides by at least sqrt(a^2 s2 + v)
    tol = 32 * EPS / np.sqrt(a**2 * s2 + v)
    close("exact model", (share * (eps - model) ** 2).sum(), least, tol, 1)
    close("shifted", (share * (eps - model - d) ** 2).sum(), least + d**2, tol, 1)
    factor = (share * (eps - (1 + d) * model) ** 2).sum()
    close("scaled", factor, least + d**2 * (share * model**2).sum(), tol, 1)


@every_case
def test_eq14_reference_loss_minimum_of_a_mixture_of_one_is_that_of_the_gaussian(case):
    """1 - E[eps_hat^2], and the data's share of the variance of x_t."""
    least = ref.loss_minimum_gaussian(case.beta, case.t, 0.25)
    # eps_hat, up to 1, has lost eps (|x| + a |m|) / sqrt(v), |x| < 20
    _, v = ref.transition(case.beta, 0, case.t)
    got = ref.loss_minimum_mixture(case.beta, case.t, np.ones(1), [0.3], [0.25])
    close("least loss", got, least, 64 * EPS / np.sqrt(v), 1)


@pytest.mark.parametrize("t", [1, 2, 3, 4])
def test_eq14_reference_loss_minimum_of_a_mixture_is_the_mean_of_var_eps_given_xt(t):
    """Var(eps | x_t), by the law of total variance over the components, integrated over p(x_t)."""
    weight, m, s2 = MIXTURE
    a, v = ref.transition(SHORT, 0, t)
    total = a**2 * s2 + v

    def integrand(x):
        joint = weight * stats.norm.pdf(x, a * m, np.sqrt(total))
        mean = np.sqrt(v) * (x - a * m) / total  # of eps, and its variance, in each component
        second = 1 - v / total + mean**2
        return joint @ second - (joint @ mean) ** 2 / joint.sum()

    want = integrate.quad(
        integrand, -12, 12, points=[-1, -0.5, 0, 0.5, 1], epsabs=1e-11, limit=200
    )[0]
    close("least loss", ref.loss_minimum_mixture(SHORT, t, *MIXTURE), want, 1e-10, 1)


# ---------------------------------------------------------------------------- samplers

M, S2 = 0.5, 0.25  # the data of the simulations: N(M, S2)
GAUSSIAN = np.array([[1.0], [M], [S2]])  # weights, means, variances
MIXTURE = np.array([[0.3, 0.7], [-0.6, 0.5], [0.02, 0.1]])


def exact_eps(x, ab, data):
    """E[eps | x_t]: each component's regression of eps on x_t, by its responsibility."""
    weight, m, s2 = data
    total = ab * s2 + 1 - ab
    joint = weight * stats.norm.pdf(x[:, None], np.sqrt(ab) * m, np.sqrt(total))
    eps = np.sqrt(1 - ab) * (x[:, None] - np.sqrt(ab) * m) / total
    return (joint * eps).sum(axis=1) / joint.sum(axis=1)


def simulate_algorithm2(beta, sigma2, noise_at_1=0.0, data=GAUSSIAN, seed=1):
    """N outputs of Algorithm 2 as printed, x_T ~ N(0, 1), with the exact eps of the data."""
    rng = np.random.default_rng(seed)
    alpha, ab, _ = tables(beta)
    x = rng.standard_normal(N)
    for t in range(len(beta) - 1, 0, -1):
        eps = exact_eps(x, ab[t], data)
        x = (x - beta[t] / np.sqrt(1 - ab[t]) * eps) / np.sqrt(alpha[t])
        x += np.sqrt(sigma2[t] if t > 1 else noise_at_1) * rng.standard_normal(N)
    return x


@pytest.mark.parametrize("beta", [SHORT, TEN], ids=["T=4", "T=10"])
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_algorithm2_reference_moments_agree_with_a_simulation(beta, variance):
    """Mean and variance of x_0, sigma_t^2 = beta_t or beta_tilde_t."""
    sigma2 = beta if variance == "beta" else tables(beta)[2]
    predicted = ref.ancestral_moments(beta, sigma2, M, S2)
    has_normal_moments("x_0", simulate_algorithm2(beta, sigma2), *predicted)


@pytest.mark.parametrize("fault", ["noise at t = 1", "sigma at t-1"])
def test_algorithm2_reference_moments_reject_a_wrong_sampler(fault):
    """Negative control: both faults are seen in N samples."""
    late = np.append(0.0, SHORT[:-1])
    wrong = simulate_algorithm2(SHORT, SHORT, noise_at_1=SHORT[1])
    if fault == "sigma at t-1":
        wrong = simulate_algorithm2(SHORT, late)
    with pytest.raises(AssertionError, match="variance of x_0"):
        has_normal_moments("x_0", wrong, *ref.ancestral_moments(SHORT, SHORT, M, S2))


@settings(deadline=None)
@every_case
def test_sec32_reference_fixed_large_keeps_a_unit_gaussian(case):
    """Data N(0, 1), sigma_t^2 = beta_t: N(0, 1) at every step, and 1 - beta_1 after the noiseless.

    Per step (k_0 x_0 + k_t x_t with x_0 = a x_t) the slope sqrt(1 - beta_t) is good to a few eps
    / a_t, the price of solving eq. 4 for x_0; earlier errors are damped, at most t of them add.
    """
    a, _ = ref.forward_moments(case.beta)
    mean, var = ref.ancestral_moments(case.beta[: case.t + 1], case.beta, 0, 1)
    tol = 16 * case.t * EPS / a[case.t]
    close("mean", mean, 0, tol, 1)
    close("variance", var, 1 - case.betas[0], tol, 1)


@pytest.mark.parametrize("beta", [SHORT, TEN], ids=["T=4", "T=10"])
def test_sec32_reference_fixed_small_returns_a_point_mass(beta):
    """Data that is always M, sigma_t^2 = beta_tilde_t: output M, variance 0, from any x_T."""
    mean, var = ref.ancestral_moments(beta, tables(beta)[2], M, 0.0, mean=3.0, var=2.0)
    # x_0 = (x_t - sqrt(v) eps) / a is good to a few eps |x_t| / a_t
    tol = 32 * EPS / ref.forward_moments(beta)[0][-1]
    close("mean", mean, M, tol, 1)
    close("variance", var, 0, tol**2, 1)


def simulate_ddim(beta, path, eta, data=GAUSSIAN, seed=2):
    """N outputs of DDIM (eq. 12, 16) along the falling path, with the exact eps of the data."""
    rng = np.random.default_rng(seed)
    ab = tables(beta)[1]
    x = rng.standard_normal(N)
    for t, s in itertools.pairwise(path):
        eps = exact_eps(x, ab[t], data)
        sigma = eta * np.sqrt((1 - ab[s]) / (1 - ab[t])) * np.sqrt(1 - ab[t] / ab[s])
        x0 = (x - np.sqrt(1 - ab[t]) * eps) / np.sqrt(ab[t])
        x = np.sqrt(ab[s]) * x0 + np.sqrt(1 - ab[s] - sigma**2) * eps
        x += sigma * rng.standard_normal(N)
    return x


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("grid", [[4], [2, 5, 10], list(range(1, 11))], ids=str)
def test_ddim_reference_moments_agree_with_a_simulation(grid, eta):
    """Mean and variance of x_0 on a grid of steps ending at s = 0."""
    predicted = ref.ddim_moments(TEN, grid, eta, M, S2)
    has_normal_moments("x_0", simulate_ddim(TEN, [*grid[::-1], 0], eta), *predicted)


@pytest.mark.parametrize("path, eta", [([10, 5, 2, 1], 1.0), ([10, 5, 2, 0], 0.0)], ids=str)
def test_ddim_reference_moments_reject_a_wrong_sampler(path, eta):
    """Negative control: ending at s = 1, and ignoring eta = 1, are seen in N samples."""
    predicted = ref.ddim_moments(TEN, [2, 5, 10], 1.0, M, S2)
    with pytest.raises(AssertionError, match="of x_0: estimated"):
        has_normal_moments("x_0", simulate_ddim(TEN, path, eta), *predicted)


@given(cases(max_T=20))
def test_ddim_reference_with_eta_1_and_every_step_is_algorithm_2(case):
    """grid 1..t and eta = 1: the moments of Algorithm 2 with beta_tilde."""
    beta = case.beta[: case.t + 1]
    beta_tilde = [np.nan] + [ref.posterior(beta, t)[2] for t in range(1, case.t + 1)]
    got = ref.ddim_moments(beta, list(range(1, case.t + 1)), 1, M, S2)
    # solving eq. 4 for x_0 costs eps / a_t a step, on either side
    tol = 32 * case.t * EPS / ref.forward_moments(beta)[0][-1]
    close("(mean, var)", got, ref.ancestral_moments(beta, beta_tilde, M, S2), tol, 1)


def variances_of(sampler):
    """sigma_t^2 on TEN, by the name of the table."""
    return TEN if sampler == "beta" else tables(TEN)[2]


def steps_of(sampler):
    """The steps of a sampler on TEN, for the reference: Algorithm 2 by variance, or DDIM by eta."""
    if sampler in ("beta", "beta_tilde"):
        return ref.ancestral_steps(TEN, variances_of(sampler))
    return ref.ddim_steps(TEN, [2, 5, 10], sampler)


samplers = pytest.mark.parametrize("sampler", ["beta", "beta_tilde", 0.0, 0.5, 1.0])


@samplers
def test_reference_law_of_a_mixture_of_one_is_the_gaussian_of_the_moments(sampler):
    """The cells are 1/64 wide: their middles add a variance of (1/64)^2 / 12 a step, or 2e-4."""
    x, F = ref.mixture_law(TEN, steps_of(sampler), *GAUSSIAN)
    if sampler in ("beta", "beta_tilde"):
        mean, var = ref.ancestral_moments(TEN, variances_of(sampler), M, S2)
    else:
        mean, var = ref.ddim_moments(TEN, [2, 5, 10], sampler, M, S2)
    close("F", F, stats.norm.cdf(x, mean, np.sqrt(var)), 1e-3, 1)


@samplers
def test_reference_law_of_a_mixture_agrees_with_a_simulation(sampler):
    """Two unequal components, which the sampler must part in the right shares."""
    if sampler in ("beta", "beta_tilde"):
        samples = simulate_algorithm2(TEN, variances_of(sampler), data=MIXTURE)
    else:
        samples = simulate_ddim(TEN, [10, 5, 2, 0], sampler, data=MIXTURE)
    has_law("x_0", samples, *ref.mixture_law(TEN, steps_of(sampler), *MIXTURE))
    wrong = ref.mixture_law(TEN, steps_of(sampler), *GAUSSIAN)  # negative control: other data
    assert rejects(has_law, "x_0", samples, *wrong)


# ---------------------------------------------------------------------------- bound

means, variances = st.floats(-3, 3), st.floats(0.01, 10)


@given(means, variances, means, variances)
def test_reference_kl_agrees_with_its_definition_by_quadrature(mean_1, var_1, mean_2, var_2):
    """KL = integral of p_1 (log p_1 - log p_2), in nats."""

    def integrand(x):
        log_1 = -((x - mean_1) ** 2) / (2 * var_1) - np.log(2 * np.pi * var_1) / 2
        log_2 = -((x - mean_2) ** 2) / (2 * var_2) - np.log(2 * np.pi * var_2) / 2
        return np.exp(log_1) * (log_1 - log_2)

    low, high = mean_1 - 12 * var_1**0.5, mean_1 + 12 * var_1**0.5
    want = integrate.quad(integrand, low, high, points=[mean_1], epsabs=1e-11, epsrel=1e-11)[0]
    # what quad is asked for, with a margin of 10
    close("KL", ref.gaussian_kl(mean_1, var_1, mean_2, var_2), want, 1e-10, 1 + want)


@given(means, st.floats(1e-6, 10))
def test_reference_kl_of_equal_distributions_is_zero(mean, var):
    """KL(N || N) = 0, up to the rounding of two numbers of size |log var| + 2."""
    close("KL", ref.gaussian_kl(mean, var, mean, var), 0, 4 * EPS, abs(np.log(var)) + 2)


@given(st.integers(0, 255), st.floats(-1.5, 1.5), st.floats(-4, 0.5))
def test_eq13_reference_decoder_agrees_with_quadrature_over_the_bin(k, mean, log10_sd):
    """log of the integral of N(x; mean, var) over level k's bin, the end bins infinite, any tail.

    In standard units and scaled by the density at e, the bin's point nearest to the mean, the
    integrand e^{(e^2 - z^2)/2} is 1 at e and negligible |z - e| > 80 / (|e| + 5) away.
    """
    sd = 10**log10_sd
    low = -np.inf if k == 0 else (-1 + (2 * k - 1) / 255 - mean) / sd
    high = np.inf if k == 255 else (-1 + (2 * k + 1) / 255 - mean) / sd
    e = np.clip(0, low, high)
    reach = 80 / (abs(e) + 5)
    ends = max(low - e, -reach), min(high - e, reach)
    pieces = [(ends[0], 0), (0, ends[1])]

    def density(y):
        return np.exp(-y * (2 * e + y) / 2)

    area = sum(integrate.quad(density, *p, epsabs=0, epsrel=1e-11, limit=200)[0] for p in pieces)
    want = -(e**2) / 2 + np.log(area / np.sqrt(2 * np.pi))
    # quad's 1e-11 with a margin of 10; e^2/2 itself is good to a few eps, relative
    close("log p(k)", ref.decoder_log_prob(k, mean, sd**2), want, 1e-10, 1 + abs(want))


@given(st.floats(-1.5, 1.5), st.floats(-8, 1))
def test_eq13_reference_decoder_sums_to_1_over_the_256_levels(mean, log10_var):
    """The bins are the whole real line, each once."""
    log_prob = ref.decoder_log_prob(np.arange(256), mean, 10**log10_var)
    # each is the difference of two numbers below 1, good to a few eps
    close("sum", np.exp(log_prob).sum(), 1, 256 * 4 * EPS)


def simulate_bound(beta, sigma2, decoder_var, levels, weights, t, late=0, seed=3):
    """N values of the bound's term at t (bits) for random x_0 and x_t, as the paper prints it."""
    rng = np.random.default_rng(seed)
    _, ab, beta_tilde = tables(beta)
    k = rng.choice(levels, N, p=weights)
    x0, points = -1 + 2 * k / 255, -1 + 2 * np.array(levels) / 255
    xt = np.sqrt(ab[t]) * x0 + np.sqrt(1 - ab[t]) * rng.standard_normal(N)
    likelihood = weights * stats.norm.pdf(
        xt[:, None], np.sqrt(ab[t]) * points, np.sqrt(1 - ab[t + late])
    )
    model_x0 = likelihood @ points / likelihood.sum(axis=1)
    if t == 1:
        bins = np.array([-np.inf, *(-1 + (2 * np.arange(255) + 1) / 255), np.inf])
        edges = stats.norm.cdf((bins[[k + 1, k]] - model_x0) / np.sqrt(decoder_var))
        return -np.log2(edges[0] - edges[1])
    c_0 = np.sqrt(ab[t - 1]) * beta[t] / (1 - ab[t])  # eq. 7; x_t's part is the same on both sides
    ratio = beta_tilde[t] / sigma2[t]
    return (ratio - 1 - np.log(ratio) + (c_0 * (x0 - model_x0)) ** 2 / sigma2[t]) / np.log(4)


LEVELS, WEIGHTS = [0, 100, 180, 255], np.array([0.1, 0.4, 0.2, 0.3])


@pytest.mark.parametrize("t", [1, 2, 3, 4])
def test_eq5_reference_bound_terms_agree_with_a_simulation(t):
    """L_{t-1} averaged over random (x_0, x_t) for t = 1..T."""
    terms = ref.bound_terms_discrete(SHORT, SHORT, 0.02, LEVELS, WEIGHTS)
    values = simulate_bound(SHORT, SHORT, 0.02, LEVELS, WEIGHTS, t)
    has_mean(f"L_{t - 1}", values, terms[t - 1])


@pytest.mark.parametrize(
    "t, fault",
    [(1, "decoder"), (2, "sigma"), (3, "sigma"), (4, "sigma"), (1, "model"), (2, "model")],
)
def test_eq5_reference_bound_terms_reject_a_wrong_bound(t, fault):
    """Negative control: a decoder of 1.5 times the variance, sigma_{t-1} for sigma_t, and a model
    that reads 1 - alpha_bar one step too late are seen in N samples. (x_3 and x_4 know too little
    of x_0 for a wrong model to show.)
    """
    terms = ref.bound_terms_discrete(SHORT, SHORT, 0.02, LEVELS, WEIGHTS)
    sigma2 = np.append(0.0, SHORT[:-1]) if fault == "sigma" else SHORT
    var, late = (0.03 if fault == "decoder" else 0.02), int(fault == "model")
    wrong = simulate_bound(SHORT, sigma2, var, LEVELS, WEIGHTS, t, late)
    with pytest.raises(AssertionError, match="standard errors apart"):
        has_mean(f"L_{t - 1}", wrong, terms[t - 1])


@pytest.mark.parametrize("k", [0, 100, 120, 127])
@pytest.mark.parametrize("beta_1", [1e-4, 0.01, 0.3])
def test_eq5_reference_bound_terms_of_two_levels_agree_with_quadrature(k, beta_1):
    """Levels k and 255 - k, equally likely, at x_0 = -p and p: E[x_0 | x] = p tanh(a_t p x / v_t).

    By symmetry x_0 = p; the KL terms are those of equal variances plus the gap of the means.
    """
    beta = np.array([0.0, beta_1, 0.1, 0.9, 0.5])
    _, ab, beta_tilde = tables(beta)
    p = 1 - 2 * k / 255
    terms = ref.bound_terms_discrete(beta, beta, beta_1 / 2, [k, 255 - k], [0.5, 0.5])
    for t in range(1, 5):

        def integrand(z, t=t):
            x = np.sqrt(ab[t]) * p + np.sqrt(1 - ab[t]) * z
            model_x0 = p * np.tanh(np.sqrt(ab[t]) * p * x / (1 - ab[t]))
            gap = np.sqrt(ab[t - 1]) * beta[t] / (1 - ab[t]) * (p - model_x0)
            nats = gap**2 / (2 * beta[t])
            if t == 1:
                nats = -ref.decoder_log_prob(255 - k, model_x0, beta_1 / 2)
            return nats * stats.norm.pdf(z)

        want = sum(
            integrate.quad(integrand, z, z + 4, epsabs=1e-10, epsrel=1e-10, limit=200)[0]
            for z in range(-12, 12, 4)
        )
        ratio = beta_tilde[t] / beta[t]
        want += (ratio - 1 - np.log(ratio)) / 2 if t > 1 else 0
        # six integrals, each asked for 1e-10, in bits
        close(f"L_{t - 1}", terms[t - 1], want / np.log(2), 1e-9, 1 + want)


@settings(max_examples=25)
@given(
    st.lists(st.floats(0.01, 0.9), min_size=1, max_size=5),
    st.dictionaries(st.integers(0, 255), st.floats(0.05, 1), min_size=1, max_size=4),
    st.floats(0, 1),
    st.floats(-3, 0),
)
def test_eq5_reference_bound_is_at_least_the_entropy(betas, data, between, log10_var):
    """E[-log2 p(x_0)] <= L_0 + ... + L_T, and no code beats H(x_0); any sigma_t, any decoder."""
    beta = np.array([0.0, *betas])
    sigma2 = [ref.posterior(beta, t)[2] if t else 0.0 for t in range(len(beta))]
    sigma2 = (1 - between) * np.array(sigma2) + between * beta
    levels, weights = list(data), np.array(list(data.values())) / sum(data.values())
    terms = ref.bound_terms_discrete(beta, sigma2, 10**log10_var, levels, weights)
    assert len(terms) == len(beta)
    assert terms.min() >= -1e-8  # the quadrature's accuracy
    assert terms.sum() >= ref.entropy_bits(weights) - 1e-8


def test_eq5_reference_bound_is_tight_where_nothing_can_be_lost():
    """Two far levels, T = 1, beta_1 so that L_T and L_0 can be read off.

    x_1 tells the levels apart with certainty and the decoder never errs: L_0 = 0, and
    L_1 = KL(N(a_1 x_0, v_1) || N(0, 1)) with x_0^2 = 1: (v - log v + a^2 - 1) / 2 = -log(v) / 2.
    """
    terms = ref.bound_terms_discrete(np.array([0.0, 0.01]), [0, 0], 1e-8, [0, 255], [0.5, 0.5])
    close("L_0", terms[0], 0, 1e-8, 1)
    close("L_1", terms[1], -np.log2(0.01) / 2, 8 * EPS)


@pytest.mark.parametrize("weights, bits", [([1.0], 0), ([0.5, 0.5], 1), ([0.25] * 4, 2)])
def test_reference_entropy_of_equal_weights_is_the_log_of_their_number(weights, bits):
    """H = log2 n for n equally likely levels."""
    close("H", ref.entropy_bits(weights), bits, 4 * EPS)


# ---------------------------------------------------------------------------- DESIGN, section 11


def rounds_to(value, printed):
    """The value, rounded to as many digits as `printed` has, reads as printed."""
    digits = len(printed.split("e")[0].replace(".", "").lstrip("0"))
    assert float(f"{value:.{digits - 1}e}") == float(printed), f"{value!r} is not {printed}"


def test_sec4_reference_alpha_bar_at_the_end_of_the_papers_schedule():
    """alpha_bar_1000 = 4.0358297654e-5."""
    rounds_to(ref.forward_moments(PAPER)[0][1000] ** 2, "4.0358297654e-5")


@pytest.mark.parametrize("t, ratio", [(2, "0.4547"), (10, "0.8528"), (100, "0.9819")])
def test_eq7_reference_beta_tilde_of_the_papers_schedule(t, ratio):
    """beta_tilde_t / beta_t at t = 2, 10, 100, and beta_tilde_2 = 5.4532e-5."""
    rounds_to(ref.posterior(PAPER, t)[2] / PAPER[t], ratio)
    rounds_to(ref.posterior(PAPER, 2)[2], "5.4532e-5")


@pytest.mark.parametrize("level", [0, 255])
def test_eq5_reference_prior_term_of_the_papers_schedule(level):
    """L_T = 2.91e-5 bits per dimension at |x_0| = 1."""
    a, v = ref.transition(PAPER, 0, 1000)
    rounds_to(ref.gaussian_kl(a * (-1 + 2 * level / 255), v, 0, 1) / np.log(2), "2.91e-5")


def test_eq5_reference_sum_of_kl_terms_of_the_papers_schedule_with_beta():
    """With perfect eps and sigma_t^2 = beta_t the terms t >= 2 sum to 0.4864 bits per dimension."""
    kl = [ref.gaussian_kl(0, ref.posterior(PAPER, t)[2], 0, PAPER[t]) for t in range(2, 1001)]
    rounds_to(sum(kl) / np.log(2), "0.4864")


@pytest.mark.parametrize("beta", [SHORT, TEN], ids=["T=4", "T=10"])
def test_eq5_reference_kl_terms_vanish_with_beta_tilde_and_perfect_eps(beta):
    """One single level makes eps perfect: L_{t-1} = 0 for t >= 2 if sigma_t^2 = beta_tilde_t."""
    terms = ref.bound_terms_discrete(beta, tables(beta)[2], 0.01, [200], [1.0])
    # differences of numbers of size |log beta_tilde| + 2 < 8, in bits, beta_tilde good to T eps
    close("L_1 .. L_{T-1}", terms[1:-1], 0, 8 * len(beta) * EPS, 1)
    assert terms[0] > 0 and terms[-1] > 0


# ---------------------------------------------------------------------------- improved.py


@given(cases(), st.data())
def test_iddpm_eq19_reference_strided_betas_multiply_to_the_same_alpha_bar(case, data):
    """prod (1 - beta'_i) is alpha_bar at the steps kept; with every step kept, beta' is beta."""
    grid = sorted(data.draw(st.sets(st.integers(1, case.T), min_size=1), label="grid"))
    kept = np.cumprod(1 - ref.strided_beta(case.beta, grid))
    tol = 16 * case.T * EPS
    close("alpha_bar", kept, tables(case.beta)[1][[0, *grid]], tol, 1)
    close("beta", ref.strided_beta(case.beta, list(range(1, case.T + 1))), case.beta, 4 * EPS)


@given(cases(), st.floats(-1, 2))
def test_iddpm_eq15_reference_variance_is_the_formula_as_printed(case, v):
    """exp(v log beta_t + (1 - v) log beta_tilde_t), with beta_tilde_2 at t = 1, and beta_1 if T = 1."""
    _, _, beta_tilde = tables(case.beta)
    low = beta_tilde[max(case.t, 2)] if case.T > 1 else case.beta[1]
    want = np.exp(v * np.log(case.beta[case.t]) + (1 - v) * np.log(low))
    tol = (1 + abs(v)) * (t_steps(case.t) + 8 * EPS / min(case.betas) + 64 * EPS)
    close("sigma^2", ref.learned_variance(case.beta, case.t, v), want, tol)


@pytest.mark.parametrize("t", [2, 3, 4])
def test_iddpm_eq16_reference_slope_is_the_derivative_of_the_kl(t):
    """Central differences of gaussian_kl over v; 0 where sigma^2 is beta_tilde + gap^2."""
    low, high = ref.variance_ends(SHORT, t)
    for gap, v in itertools.product((0.0, -0.2, 0.7), (-0.5, 0.0, 0.6, 1.0)):
        sigma2 = ref.learned_variance(SHORT, t, np.array([v + 1e-5, v - 1e-5]))
        up, down = ref.gaussian_kl(gap, low, 0.0, sigma2)
        close(
            "slope", ref.learned_slope(SHORT, t, gap, v), (up - down) / 2e-5, 1e-8, 1 + gap**2 / low
        )
    best = math.log((low + 0.01) / low) / math.log(high / low)
    close("slope at the best v", ref.learned_slope(SHORT, t, 0.1, best), 0, 1e-13, 1)


@every_case
def test_reference_exact_variance_goes_from_beta_tilde_to_beta_as_the_data_grows(case):
    """s2 = 0: x_0 is known. s2 = 1: x_t is N(0, 1) at every t. In between it rises; with s2 it stays
    below the variance of the step itself, beta_t / (1 - beta_t)."""
    var = [ref.exact_variance_gaussian(case.beta, case.t, s2) for s2 in (0, 0.1, 0.5, 1, 10, 1e6)]
    tol = 4 * t_steps(case.t)
    close("s2 = 0", var[0], ref.posterior(case.beta, case.t)[2], tol)
    close("s2 = 1", var[3], case.beta[case.t], tol)
    assert (np.diff(var) > -tol * var[-1]).all()
    assert var[-1] <= case.beta[case.t] / (1 - case.beta[case.t]) * (1 + tol)


@pytest.mark.parametrize("t, s2", [(2, 0.25), (3, 0.04), (4, 2.0)])
def test_reference_exact_variance_and_kl_term_agree_with_a_simulation(t, s2):
    """x_{t-1} about its regression on x_t; and the KL of posterior and p, averaged over x_0 and x_t."""
    rng = np.random.default_rng(t)
    a, v = ref.forward_moments(SHORT)
    x0 = rng.normal(0.2, s2**0.5, N)
    xs = a[t - 1] * x0 + v[t - 1] ** 0.5 * rng.normal(size=N)
    k, w = ref.transition(SHORT, t - 1, t)
    xt = k * xs + w**0.5 * rng.normal(size=N)
    c_0, c_t, low = ref.posterior(SHORT, t)
    said = (xt - v[t] ** 0.5 * ref.eps_gaussian(SHORT, t, xt, 0.2, s2)) / a[t]
    var = ref.exact_variance_gaussian(SHORT, t, s2)
    has_normal_moments("x_{t-1} - mu_theta", xs - c_0 * said - c_t * xt, 0, var)
    for sigma2 in (var, low, SHORT[t]):
        kl = ref.gaussian_kl(c_0 * x0 + c_t * xt, low, c_0 * said + c_t * xt, sigma2)
        has_mean("L_{t-1}", kl, ref.kl_term_gaussian(SHORT, t, s2, sigma2))
    assert rejects(has_normal_moments, "a wrong variance", xs - c_0 * said - c_t * xt, 0, SHORT[t])


@given(cases(), normal, st.floats(-1, 5))
def test_cfg_eq6_reference_eps_follows_bayes_rule(case, x, w):
    """p(x | y)^(1+w) p(x)^-w is p(x | y) p(y | x)^w: the slope of log p(y | x) comes on top, w times.

    By central differences, of the responsibility of one of two components.
    """
    weight, m, s2 = np.array([0.4, 0.6]), np.array([-0.5, 0.3]), np.array([0.1, 0.3])
    a, v = ref.transition(case.beta, 0, case.t)
    h = 1e-4 * math.sqrt(v)

    def log_share(x):
        log_joint = np.log(weight) + stats.norm.logpdf(x, a * m, np.sqrt(a**2 * s2 + v))
        return log_joint[0] - np.logaddexp(*log_joint)

    one = [1.0], m[:1], s2[:1]
    got, at_0, at_minus_1 = (ref.guided_eps(case.beta, case.t, np.array(x), guide, one, (weight, m, s2))
                             for guide in (w, 0, -1))  # fmt: skip
    slope = (log_share(x + h) - log_share(x - h)) / (2 * h)
    want = ref.eps_mixture(case.beta, case.t, x, *one) - w * np.sqrt(v) * slope
    close("eps", got, want, 1e-5, (1 + abs(w)) * (1 + abs(x)))
    scale = (abs(x) + 1) / np.sqrt(v) * (1 + x**2)
    close("w = 0", at_0, ref.eps_mixture(case.beta, case.t, x, *one), 1e2 * EPS, scale)
    close(
        "w = -1", at_minus_1, ref.eps_mixture(case.beta, case.t, x, weight, m, s2), 1e2 * EPS, scale
    )


def test_reference_log_density_is_that_of_a_mixture_and_integrates_to_1():
    one = np.array([0.3, 0.7]), np.array([-0.6, 0.5]), np.array([0.02, 0.1])
    a, v = ref.transition(SHORT, 0, 2)
    for x in (-1.0, 0.0, 2.5):
        log_p = math.log(one[0] @ stats.norm.pdf(x, a * one[1], np.sqrt(a**2 * one[2] + v)))
        close("log p", ref.log_density(SHORT, 2, np.array(x), *one), log_p, 8 * EPS, 1 + abs(log_p))
    total = integrate.quad(
        lambda x: math.exp(ref.log_density(SHORT, 2, np.array(x), *one)), -12, 12
    )[0]
    close("integral", total, 1, 1e-7)


# ---------------------------------------------------------------------------- network layers


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_reference_embedding_is_sines_then_cosines_of_falling_frequencies():
    """Entry i is sin(t f_i), entry i + d/2 cos(t f_i); f_0 = 1, f_{d/2-1} = 1e-4, equal ratios."""
    t = np.array([0, 1, 500, 999])
    emb = ref.timestep_embedding(t, 128)
    assert emb.shape == (4, 128)
    close("sin^2 + cos^2", emb[:, :64] ** 2 + emb[:, 64:] ** 2, 1, 4 * EPS)
    frequency = np.arctan2(emb[1, :64], emb[1, 64:])  # t = 1, all angles below pi
    # a sine of an angle of up to 999 that is good to a few eps, relative
    close("first sine and cosine", emb[:, [0, 64]], np.c_[np.sin(t), np.cos(t)], 4e3 * EPS, 1)
    close("last frequency", frequency[-1], 1e-4, 8 * EPS)
    close("ratios", frequency[1:] / frequency[:-1], 1e-4 ** (1 / 63), 64 * EPS)


def test_reference_embedding_turns_with_t():
    """(sin, cos) of t + u are those of t turned by those of u: the addition theorem."""
    (sin_t, sin_u, sin_tu), (cos_t, cos_u, cos_tu) = np.split(
        ref.timestep_embedding(np.array([30, 12, 42]), 32), 2, axis=1
    )
    # angles up to 42, good to a few eps
    close("sin", sin_tu, sin_t * cos_u + cos_t * sin_u, 4 * 42 * EPS, 1)
    close("cos", cos_tu, cos_t * cos_u - sin_t * sin_u, 4 * 42 * EPS, 1)


@given(normal)
def test_reference_silu_is_x_times_a_sigmoid(x):
    """silu(x) - silu(-x) = x, and silu(x) / x has the log-odds x."""
    p, q = ref.silu(x), -ref.silu(-x)
    close("sum", p + q, x, 4 * EPS)
    # p / q = e^x where both are above |x| e^-5
    close("ratio", p, q * np.exp(x), 16 * EPS)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pad", [((1, 1), (1, 1)), ((0, 1), (0, 1)), ((0, 0), (2, 1))], ids=str)
def test_reference_convolution_agrees_with_scipy(stride, pad):
    """y[o] = b[o] + sum over channels of correlate2d(padded x[c], w[o, c]), every stride-th."""
    x, w, b = random(2, 3, 6, 7), random(4, 3, 3, 3, seed=1), random(4, seed=2)
    y = ref.conv2d(x, w, b, stride, pad)
    padded = np.pad(x, ((0, 0), (0, 0), *pad))
    for image, o in itertools.product(range(2), range(4)):
        each = [signal.correlate2d(padded[image, c], w[o, c], "valid") for c in range(3)]
        # 27 products of numbers below 4
        want = b[o] + sum(each)[::stride, ::stride]
        close(f"image {image}, channel {o}", y[image, o], want, 27 * 16 * EPS, 1)


def test_reference_group_norm_gives_each_group_mean_0_and_variance_1():
    """gamma = 1, shift = 0: variance s2 of C/groups neighbouring channels to s2 / (s2 + eps)."""
    x = random(2, 6, 4, 5) * np.arange(1, 7)[:, None, None] + 3
    y = ref.group_norm(x, 3, np.ones(6), np.zeros(6))
    for first in (0, 2, 4):
        group, before = y[:, first : first + 2], x[:, first : first + 2].var(axis=(1, 2, 3))
        # sums of 40 numbers below 10
        close("mean", group.mean(axis=(1, 2, 3)), 0, 400 * EPS, 1)
        close("variance", group.var(axis=(1, 2, 3)), before / (before + 1e-6), 400 * EPS)


def test_reference_group_norm_scales_and_shifts_each_channel():
    """y = gamma[c] y_1 + shift[c], y_1 the output for gamma = 1, shift = 0."""
    x, gamma, shift = random(2, 6, 4, 5), random(6, seed=1), random(6, seed=2)
    plain = ref.group_norm(x, 2, np.ones(6), np.zeros(6))
    for c in range(6):
        got = ref.group_norm(x, 2, gamma, shift)[:, c]
        assert np.array_equal(got, gamma[c] * plain[:, c] + shift[c])


def attention_weights(C, seed=1):
    """wq, bq, .., wo, bo at random."""
    return [random(*shape, seed=seed + i) for i, shape in enumerate(4 * [(C, C), (C,)])]


def test_reference_attention_to_uniform_keys_is_the_mean_of_the_values():
    """k the same at all pixels: every share is 1/(H W), each output wo mean(v) + bo."""
    x, weights = random(2, 4, 3, 5), attention_weights(4)
    weights[2] = np.zeros((4, 4))
    _, _, _, _, wv, bv, wo, bo = weights
    want = (x.mean(axis=(2, 3)) @ wv.T + bv) @ wo.T + bo
    # sums of 15 x 4 x 4 products of numbers of a few units
    close("output", ref.self_attention(x, *weights), want[:, :, None, None], 1e3 * EPS, 1)


def test_reference_attention_between_two_pixels_is_a_logistic_function():
    """Pixel p gives pixel 0 the share 1 / (1 + exp(q_p . (k_1 - k_0) / sqrt(C))), C channels."""
    x, weights = random(1, 4, 1, 2), attention_weights(4)
    q, k, v = (weights[i] @ x[0, :, 0] + weights[i + 1][:, None] for i in (0, 2, 4))
    share = 1 / (1 + np.exp(q.T @ (k[:, 1] - k[:, 0]) / 2))
    want = weights[6] @ (v[:, :1] * share + v[:, 1:] * (1 - share)) + weights[7][:, None]
    # exponents up to some tens
    close("output", ref.self_attention(x, *weights)[0, :, 0], want, 1e4 * EPS, 1)


def test_reference_attention_commutes_with_permuting_pixels():
    """Attention knows no positions: permuted pixels give the permuted output."""
    x, weights = random(2, 4, 3, 5), attention_weights(4)
    order = np.random.default_rng(5).permutation(15)

    def permuted(image):
        return image.reshape(2, 4, 15)[:, :, order].reshape(2, 4, 3, 5)

    y = ref.self_attention(x, *weights)
    # the sums over pixels run in another order
    close("output", ref.self_attention(permuted(x), *weights), permuted(y), 1e4 * EPS, 1)
    assert abs(permuted(y) - y).max() > 0.1


# ---------------------------------------------------------------------------- network

CIFAR = dict(in_channels=3, out_channels=3, ch=128, mult=(1, 2, 2, 2), blocks=2, attention=(1,))
TINY = dict(in_channels=2, out_channels=1, ch=4, mult=(1, 2), blocks=1, attention=(1,))


def shapes(in_channels, out_channels, ch, mult, blocks, attention, num_classes=None):
    """The shapes of all weights in the order of their use, and their meaning: [(name, shape)]."""
    out = []

    def layer(name, *shape):
        out.extend([(name, shape), (name + " bias", shape[:1])])

    def norm(c):
        out.extend([("gamma", (c,)), ("shift", (c,))])

    def residual(i, o, level):
        norm(i)
        layer("conv1", o, i, 3, 3)
        layer("emb", o, 4 * ch)
        norm(o)
        layer("conv2", o, o, 3, 3)
        if i != o:
            layer("shortcut", o, i, 1, 1)
        if level in attention:
            attend(o)

    def attend(c):
        norm(c)
        for name in ("q", "k", "v", "proj"):
            layer(name, c, c, 1, 1)

    layer("dense0", 4 * ch, ch)
    layer("dense1", 4 * ch, 4 * ch)
    if num_classes is not None:
        out.append(("labels", (num_classes + 1, 4 * ch)))
    layer("input", ch, in_channels, 3, 3)
    skips = [ch]
    for level, c in enumerate(ch * m for m in mult):
        for _ in range(blocks):
            residual(skips[-1], c, level)
            skips.append(c)
        if level < len(mult) - 1:
            layer("down", c, c, 3, 3)
            skips.append(c)
    residual(c, c, "middle")
    attend(c)
    residual(c, c, "middle")
    for level in reversed(range(len(mult))):
        for _ in range(blocks + 1):
            below, c = c, ch * mult[level]
            residual(below + skips.pop(), c, level)
        if level > 0:
            layer("up", c, c, 3, 3)
    norm(c)
    layer("output", out_channels, c, 3, 3)
    return out


def random_weights(**config):
    """[(name, array)] of moderate size, in the order of their use."""
    listed = shapes(**config)
    return [(name, 0.3 * random(*s, seed=i)) for i, (name, s) in enumerate(listed)]


def run(x, t, named, labels=None, num_classes=None, **config):
    """unet on weights named as in `shapes`, groups = 2."""
    network = {key: config[key] for key in ("ch", "mult", "blocks", "attention")}
    arrays = [array for _, array in named]
    has = num_classes is not None
    return ref.unet(x, t, arrays, **network, groups=2, labels=labels, has_labels=has)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"mult": (1, 2, 2), "attention": ()},
        {"mult": (1, 1, 3), "attention": (0, 2)},
        {"blocks": 2, "out_channels": 3},
        {"num_classes": 5},
    ],
    ids=str,
)
def test_reference_unet_uses_as_many_parameters_as_are_counted(change):
    """The network takes weights of the table's shapes, all of them, and they are as many."""
    config = TINY | change
    named = random_weights(**config)
    assert sum(array.size for _, array in named) == ref.unet_parameter_count(**config)
    y = run(random(2, 2, 8, 12), np.array([1, 7]), named, **config)  # refuses what is left over
    assert y.shape == (2, config["out_channels"], 8, 12) and np.isfinite(y).all()
    with pytest.raises(AssertionError):
        run(random(2, 2, 8, 12), np.array([1, 7]), [*named, named[-1]], **config)


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
def test_appendixb_reference_unet_has_the_papers_number_of_parameters(change, count):
    """35.7 million for CIFAR-10, 114 million for 256x256 (appendix B), to the last one."""
    assert ref.unet_parameter_count(**CIFAR | change) == count
    assert sum(math.prod(shape) for _, shape in shapes(**CIFAR | change)) == count


def test_reference_unet_embeds_t_minus_1():
    """t = 1 is embedded as 0: its sines are 0, their weights have no say; at t = 2 they have."""
    named = random_weights(**TINY)
    changed = [(n, a + (np.arange(4) < 2) if n == "dense0" else a) for n, a in named]
    x, t = random(2, 2, 8, 8), np.array([1, 2])
    gap = abs(run(x, t, named, **TINY) - run(x, t, changed, **TINY)).max(axis=(1, 2, 3))
    assert gap[0] == 0 and gap[1] > 1e-3


def test_reference_unet_embeds_t1_by_a_dense_layer_on_silu_of_a_dense_layer():
    """At t = 1 the sinusoid is (0, .., 0, 1, .., 1): dense0 gives half its row sums, plus bias."""
    w_0, b_0, w_1, b_1 = weights = [random(*s, seed=len(s)) for s in 2 * [(8, 8), (8,)]]
    h = w_0[:, 4:].sum(axis=1) + b_0
    want = w_1 @ (h / (1 + np.exp(-h))) + b_1
    # sums of eight products of a few units
    close("emb", ref.embedding([1], 8, iter(weights), None, False), [want], 1e3 * EPS, 1)


def test_reference_unet_adds_the_labels_row_to_the_embedding():
    """No labels is the table's last row; a row of 0 is no label table at all."""
    config = TINY | {"num_classes": 3}
    named = random_weights(**config)
    table = next(array for name, array in named if name == "labels")
    x, t = random(2, 2, 8, 8), np.array([3, 9])
    none, last = (run(x, t, named, labels=row, **config) for row in (None, [3, 3]))
    assert np.array_equal(none, last)
    table[1] = 0
    without = run(x, t, [pair for pair in named if pair[0] != "labels"], **TINY)
    gap = abs(run(x, t, named, labels=[1, 2], **config) - without).max(axis=(1, 2, 3))
    assert gap[0] == 0 and gap[1] > 1e-3


def test_reference_unet_treats_every_image_by_itself():
    """A batch gives what its images give alone, each with its own t."""
    named = random_weights(**TINY)
    x, t = random(2, 2, 8, 8), np.array([3, 9])
    alone = np.concatenate([run(x[i : i + 1], t[i : i + 1], named, **TINY) for i in (0, 1)])
    # some hundred operations a layer, thirty layers, numbers of a few units
    close("output", run(x, t, named, **TINY), alone, 1e5 * EPS, 1)


def test_reference_residual_block_on_one_pixel_is_a_small_dense_network():
    """conv2(silu(norm2(conv1(silu(norm1 x)) + dense(silu(emb))))) + shortcut(x), centres only."""
    x, emb = random(3, 4, 1, 1), random(3, 5, seed=9)
    listed = [(4,), (4,), (6, 4, 3, 3), (6,), (6, 5), (6,)]
    listed += [(6,), (6,), (6, 6, 3, 3), (6,), (6, 4, 1, 1), (6,)]
    weights = [random(*shape, seed=i) for i, shape in enumerate(listed)]
    g_1, s_1, w_1, b_1, w_e, b_e, g_2, s_2, w_2, b_2, w_s, b_s = weights

    def norm_silu(h, gamma, shift):
        h = h.reshape(3, 2, -1)
        h = (h - h.mean(2, keepdims=True)) / np.sqrt(h.var(2, keepdims=True) + 1e-6)
        h = h.reshape(3, -1) * gamma + shift
        return h / (1 + np.exp(-h))

    h = norm_silu(x, g_1, s_1) @ w_1[:, :, 1, 1].T + b_1 + emb / (1 + np.exp(-emb)) @ w_e.T + b_e
    want = norm_silu(h, g_2, s_2) @ w_2[:, :, 1, 1].T + b_2 + x[:, :, 0, 0] @ w_s[..., 0, 0].T + b_s
    got = ref.residual_block(x, emb, iter(weights), groups=2)
    # sums of six numbers of a few units; a norm may amplify an error tenfold
    close("output", got[:, :, 0, 0], want, 1e3 * EPS, 1)


def test_reference_attention_block_adds_attention_on_the_normalised_input():
    """x + self_attention(norm(x)): what is added knows neither the scale nor the mean of x."""
    weights = [random(4), random(4, seed=1)]
    weights += [random(*shape, seed=2 + i) for i, shape in enumerate(4 * [(4, 4, 1, 1), (4,)])]
    x = 1e3 * random(1, 4, 3, 3, seed=20)
    added, far = (ref.attention_block(z, iter(weights), 2) - z for z in (x, 4 * x + 7e3))
    # norm's eps = 1e-6 against variances of 1e6 leaves 1e-12, attention's exponents (tens, with
    # slopes of that size) amplify it
    close("added", added, far, 1e-9, 1)
    normed = ref.group_norm(x, 2, weights[0], weights[1])
    matrices = [w.reshape(w.shape[:2]) if w.ndim == 4 else w for w in weights[2:]]
    close("added", added, ref.self_attention(normed, *matrices), 1e5 * EPS, 1)


def route(image, skip_block=None):
    """The two-level network as a railway: nothing is computed, images are only passed on.

    Residual branches are 0 and convolutions copy their centre pixel. A block on the way up has a
    shortcut, which passes on h, or the skip for the block number skip_block. On the way to it the
    input, every residual block, the downsampling, .. add 1, 2, 4, .. to channel 0. Returned is
    silu(norm(h)), groups = 1.
    """
    config = TINY | dict(ch=2, mult=(1, 1), attention=(), out_channels=2)
    copy = np.zeros((2, 2, 3, 3))
    copy[:, :, 1, 1] = np.eye(2)
    weights, ups, adds = [], 0, 0
    for name, shape in shapes(**config):
        array = np.full(shape, 1.0 if name == "gamma" else 0.0)
        if name in ("input", "down", "up", "output"):
            array = copy
        elif name == "shortcut":
            array[:, :, 0, 0] = np.eye(4)[2:] if ups == skip_block else np.eye(4)[:2]
            ups += 1
        elif name in ("input bias", "conv2 bias", "down bias") and adds < 6:
            array[0] = 2**adds  # input, block, downsampling, block, and two in the middle
            adds += 1
        weights.append(array)
    network = dict(ch=2, mult=(1, 1), blocks=1, attention=(), groups=1)
    return ref.unet(image, np.array([1]), weights, **network)


def arrived(image, added, halved):
    """silu(norm(h)) of the image that has been halved and doubled, or not, with `added`."""
    if halved:
        image = image[:, :, 1::2, 1::2].repeat(2, axis=2).repeat(2, axis=3)
    h = image + np.array([added, 0.0])[:, None, None]
    return ref.silu(ref.group_norm(h, 1, np.ones(2), np.zeros(2)))


def test_reference_unet_halves_by_same_padding_and_doubles_by_repeating():
    """Stride 2, zeros at the bottom and right: kernels centre on rows and columns 1, 3, 5, .."""
    image = random(1, 2, 6, 8)
    # a mean and a variance of 96 numbers up to 63
    close("output", route(image), arrived(image, 63, halved=True), 1e3 * EPS, 1)


@pytest.mark.parametrize(
    "block, added, halved", [(0, 15, True), (1, 7, True), (2, 3, False), (3, 1, False)], ids=str
)
def test_reference_unet_takes_the_skips_back_in_reverse_order(block, added, halved):
    """The blocks on the way up see: block, downsampling (halved); block, input convolution."""
    image = random(1, 2, 6, 8)
    # a mean and a variance of 96 numbers up to 63
    close("output", route(image, block), arrived(image, added, halved), 1e3 * EPS, 1)


# ---------------------------------------------------------------------------- training


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


def test_reference_ema_forgets_the_start_quickly():
    """One update with 0 leaves 2/11 of the start, two 2/11 * 3/12: the ramp, not 0.9999."""
    close("share", ref.ema([1.0, 0.0], 0.9999), 2 / 11, 4 * EPS)
    close("share", ref.ema([1.0, 0.0, 0.0], 0.9999), 2 / 11 * 3 / 12, 4 * EPS)

"""DDIM sampling (DDIM eq. 12 and 16)."""

import exact_models
import numpy as np
import pytest
import torch
from calls import ddpm, noise
from checks import (
    EPS,
    close,
    f64,
    has_law,
    has_normal_moments,
    randomness,
    rejected,
    rejects,
    same,
    tolerance,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases, every_short_case, unit
from test_6_ancestral import (
    BRUTAL,
    FAINT,
    MEAN,
    MIXTURE,
    VAR,
    N,
    fewer,
    gaussian_model,
    image_model,
    mixture_model,
    normal,
    zero_model,
)

import reference_numpy as ref

TIMESTEPS = [[4], [2], [1, 4], [1, 3], [2, 3, 4], [1, 2, 3, 4]]
ETAS = [0.0, 0.3, 0.5, 1.0]
all_timesteps = pytest.mark.parametrize("timesteps", TIMESTEPS, ids=str)
etas = pytest.mark.parametrize("eta", ETAS)
jumps = pytest.mark.parametrize("s, t", [(0, 1), (0, 3), (1, 2), (1, 4), (2, 3), (3, 4)])


@st.composite
def timesteps_of(draw, T):
    """Increasing timesteps of 1..T, at least one."""
    return sorted(draw(st.sets(st.integers(1, T), min_size=1)))


@st.composite
def pairs_of(draw, T):
    """s < t in 0..T."""
    return sorted(draw(st.sets(st.integers(0, T), min_size=2, max_size=2)))


# --- Timesteps ------------------------------------------------------------------------------------


@given(T=st.integers(1, 1000), data=st.data())
def test_ddim_timesteps_are_n_from_above_0_to_T_as_even_as_integers_allow(T, data):
    """They increase in 1..T and end at T; no two gaps, counted from 0, differ by more than 1."""
    n = data.draw(st.integers(1, T), label="n")
    timesteps = list(ddpm.ddim_timesteps(T, n))
    gaps = np.diff([0, *timesteps])
    assert len(timesteps) == n, f"{len(timesteps)} timesteps, want {n}"
    assert timesteps[-1] == T, f"the last timestep is {timesteps[-1]}, want {T}"
    assert gaps.min() >= 1, f"{timesteps} do not increase"
    assert gaps.max() - gaps.min() <= 1, f"gaps of {timesteps} from {gaps.min()} to {gaps.max()}"


@pytest.mark.parametrize("T, n", [(10, 0), (10, 11), (10, -1)])
def test_ddim_timesteps_reject_a_number_that_T_cannot_give(T, n):
    with rejected(f"{n} timesteps of {T}"):
        ddpm.ddim_timesteps(T, n)


@pytest.mark.parametrize("timesteps", [[], [0, 4], [2, 2], [3, 1], [-1, 4], [2, 5]], ids=str)
def test_ddim_rejects_timesteps_that_do_not_increase_in_1_to_T(timesteps):
    with rejected(f"the timesteps {timesteps}"):
        ddpm.sample_ddim(zero_model, ddpm.Diffusion(BRUTAL), normal(1, 1), timesteps)


# --- One step -------------------------------------------------------------------------------------


@given(case=cases(), data=st.data(), eta=st.floats(0, 1), x0=unit, xt=st.floats(-3, 3))
def test_ddim_step_is_the_reference_step_for_any_s_below_t_and_any_eta(case, data, eta, x0, xt):
    """xt -> k_0 x0 + k_t xt + sigma z, with sigma^2 = eta^2 times the posterior variance of the jump."""
    s, t = data.draw(pairs_of(case.T), label="s, t")
    d, x0, xt = ddpm.Diffusion(case.beta), f64([x0], [0.3]), f64([xt], [-0.8])
    eps = d.eps_from_x0(xt, t, x0)
    got = ddpm.ddim_step(d, xt, t, s, eps, eta=eta, clip=False, noise=noise(2))
    k_0, k_t, sigma2 = ref.ddim_step(case.beta, t, s, eta)
    signal, variance = ref.forward_moments(case.beta)
    # The share of eps is sqrt(variance_s q) with q = 1 - eta^2 new. An error of `rounding` in q becomes
    # rounding / sqrt(q), at most sqrt(rounding). x0_from_eps divides rounding by sqrt(alpha_bar_t).
    rounding = tolerance(case) + 1e2 * EPS
    new = ref.posterior(case.beta, t, s)[2] / variance[s] if s > 0 else 0.0
    q = max(1 - eta**2 * new, rounding)
    want = k_0 * x0 + k_t * xt + sigma2**0.5 * noise(2)(xt)
    close("xs", got, want, rounding / q**0.5, 8 * (1 + 1 / signal[t]))


@etas
@jumps
def test_ddim_step_has_the_mean_and_the_noise_of_eq12_and_eq16(eta, s, t):
    """The same on a short schedule without any cancellation, to rounding."""
    d, x0, xt = ddpm.Diffusion(BRUTAL), normal(3, 2).clamp(-1, 1), normal(3, 2, seed=1)
    eps = d.eps_from_x0(xt, t, x0)
    got = ddpm.ddim_step(d, xt, t, s, eps, eta=eta, clip=False, noise=noise(2))
    k_0, k_t, sigma2 = ref.ddim_step(BRUTAL, t, s, eta)
    close("xs", got, k_0 * x0 + k_t * xt + sigma2**0.5 * noise(2)(xt), 1e-12, 10.0)


@given(case=cases(), data=st.data(), x0=unit, xt=st.floats(-3, 3))
def test_ddim_step_to_a_later_t_encodes_and_its_inverse_decodes(case, data, x0, xt):
    """With eta = 0 and s > t the step is the same formula: sqrt(alpha_bar_s) x0 + sqrt(1 - alpha_bar_s) eps.
    The step back, with the same eps, returns xt."""
    t, s = data.draw(pairs_of(case.T), label="t, s")
    if t == 0:
        return
    d, x0, xt = ddpm.Diffusion(case.beta), f64([x0]), f64([xt])
    eps = d.eps_from_x0(xt, t, x0)
    got = ddpm.ddim_step(d, xt, t, s, eps, clip=False)
    signal, variance = ref.forward_moments(case.beta)
    want = signal[s] * x0 + variance[s] ** 0.5 * eps
    scale = 8 * (1 + 1 / signal[t] + eps.abs())
    close("xs", got, want, tolerance(case) + 1e2 * EPS, scale)
    back = ddpm.ddim_step(d, got, s, t, eps, clip=False)
    close("xt again", back, xt, tolerance(case) + 1e2 * EPS, scale * (1 + 1 / signal[s]))


@pytest.mark.parametrize("eta", [0.1, 1.0])
@pytest.mark.parametrize("s", [2, 3, 4])
def test_ddim_step_with_noise_rejects_an_s_that_is_not_below_t(eta, s):
    """There is no posterior variance for a step from t = 2 to t = 2 or later."""
    d, x = ddpm.Diffusion(BRUTAL), normal(2, 1)
    with rejected(f"eta = {eta}, from t = 2 to s = {s}"):
        ddpm.ddim_step(d, x, 2, s, x, eta=eta)


@pytest.mark.parametrize("s", [-1, 5])
def test_ddim_step_rejects_an_s_outside_0_to_T(s):
    d, x = ddpm.Diffusion(BRUTAL), normal(2, 1)
    with rejected(f"s = {s} for T = 4"):
        ddpm.ddim_step(d, x, 3, s, x)


@pytest.mark.parametrize("t", [0, -1, 5])
def test_ddim_step_rejects_a_t_that_has_no_predicted_x0(t):
    d, x = ddpm.Diffusion(BRUTAL), normal(2, 1)
    with rejected(f"t = {t} for T = 4"):
        ddpm.ddim_step(d, x, t, 0, x)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan"), float("inf")])
def test_ddim_rejects_an_eta_outside_0_to_1(eta):
    d, x = ddpm.Diffusion(BRUTAL), normal(2, 1)
    with rejected(f"eta = {eta}, sample_ddim"):
        ddpm.sample_ddim(zero_model, d, x, [2, 4], eta=eta)
    with rejected(f"eta = {eta}, ddim_step"):
        ddpm.ddim_step(d, x, 4, 2, x, eta=eta)


def test_ddim_step_clips_x0_and_recomputes_the_noise_from_the_clipped_x0():
    """A predicted x0 of 3 counts as 1, and eps is recomputed, so that xt = a x0 + b eps holds."""
    d, xt = ddpm.Diffusion(BRUTAL), f64([0.9], [-0.4])
    for t, s, eta in ((4, 2, 0.0), (4, 2, 0.5), (4, 3, 1.0), (1, 0, 0.0)):
        eps = d.eps_from_x0(xt, t, f64([3.0], [-2.0]))
        k_0, k_t, sigma2 = ref.ddim_step(BRUTAL, t, s, eta)
        want = k_0 * f64([1.0], [-1.0]) + k_t * xt + sigma2**0.5 * noise(2)(xt)
        got = ddpm.ddim_step(d, xt, t, s, eps, eta=eta, noise=noise(2))
        close(f"x_{s}", got, want, 1e-12, 1 + want.abs())


def test_ddim_steps_are_precise_when_alpha_bar_is_1e_minus_30():
    """Far out, the predicted x0 is clipped to -1 or 1, and the step is that of the reference."""
    d, xt, eps = ddpm.Diffusion(FAINT), normal(4, 3), normal(4, 3, seed=1)
    for t, s, eta in ((31, 0, 0.0), (31, 1, 0.0), (31, 1, 0.5), (31, 30, 1.0), (25, 5, 0.3)):
        predicted = d.x0_from_eps(xt, t, eps).clamp(-1, 1)
        k_0, k_t, sigma2 = ref.ddim_step(FAINT, t, s, eta)
        want = k_0 * predicted + k_t * xt + sigma2**0.5 * noise(2)(xt)
        got = ddpm.ddim_step(d, xt, t, s, eps, eta=eta, noise=noise(2))
        close(f"x_{s} from x_{t}, eta = {eta}", got, want, 1e-7, 1 + want.abs())


@pytest.mark.parametrize("clip", [True, False])
@etas
@all_timesteps
def test_ddim_is_steps_from_the_last_timestep_down_to_0(timesteps, eta, clip):
    """The same noise and the same model give the same states."""
    d, xt, states, z = ddpm.Diffusion(BRUTAL), normal(3, 2), [], noise(2)

    def model(xt, t):
        return torch.tanh(xt) / t[:, None]

    ddpm.sample_ddim(
        model, d, xt, timesteps, eta=eta, clip=clip, noise=noise(2),
        on_step=lambda s, xs: states.append(xs),
    )  # fmt: skip
    steps = list(zip([0, *timesteps], timesteps))
    for i, (s, t) in enumerate(reversed(steps)):
        eps = model(xt, torch.full((3,), t))
        xt = ddpm.ddim_step(d, xt, t, s, eps, eta=eta, clip=clip, noise=z)
        close(f"x_{s}", states[i], xt, 1e-13, 1 + xt.abs())


# --- The loop -------------------------------------------------------------------------------------


@given(case=cases(), data=st.data(), x0=unit)
def test_ddim_returns_the_only_image_of_the_data_for_any_timesteps_and_eta(case, data, x0):
    """Exact model of one image: x0 comes back; one step divides rounding by sqrt(alpha_bar_t)."""
    timesteps = data.draw(timesteps_of(case.T), label="timesteps")
    eta = data.draw(st.floats(0, 1), label="eta")
    x0, d = f64([x0]), ddpm.Diffusion(case.beta)
    model = image_model(case.beta, x0)
    got = ddpm.sample_ddim(model, d, normal(1, 1), timesteps, eta=eta, clip=False, noise=noise())
    signal, _ = ref.forward_moments(case.beta)
    close("x0", got, x0, tolerance(case) + 1e3 * EPS, 1 + 1 / signal[timesteps[0]])


@fewer
@every_short_case
def test_ddim_eq12_with_eta_1_and_all_timesteps_is_algorithm2_with_sigma2_beta_tilde(case):
    """The same noise, the same samples: sigma of DDIM eq. 16 is sqrt(beta_tilde), its mean is eq. 7."""
    d, xT, timesteps = ddpm.Diffusion(case.beta), normal(3, 1), range(1, case.T + 1)

    def model(xt, t):
        return torch.tanh(xt)

    ancestral = ddpm.sample_ancestral(model, d, xT, d.beta_tilde, noise=noise())
    implicit = ddpm.sample_ddim(model, d, xT, timesteps, eta=1.0, noise=noise())
    close("x0", implicit, ancestral, 64 * tolerance(case), 1.0)


@given(case=cases(), data=st.data())
def test_ddim_eq12_first_step_has_the_mean_that_keeps_the_marginals(case, data):
    """xt -> k_0 x0 + k_t xt for eta = 0."""
    s, t = data.draw(pairs_of(case.T), label="s, t")
    d, states = ddpm.Diffusion(case.beta), {}
    x0, xt = f64(0.6), f64(-0.9)
    eps = d.eps_from_x0(xt, t, x0)
    ddpm.sample_ddim(
        lambda x, t_: eps.expand_as(x), d, xt[None], [s, t] if s else [t], eta=0.0, clip=False,
        on_step=states.__setitem__,
    )  # fmt: skip
    k_0, k_t, _ = ref.ddim_step(case.beta, t, s, 0.0)
    scale = 1 + 1 / d.alpha_bar[t] ** 0.5
    close("xs", states[s][0], k_0 * x0 + k_t * xt, 4 * tolerance(case) + 1e2 * EPS, scale)


@pytest.mark.parametrize("beta, timesteps", [
    ([0, 0.03, *[0.999] * 5], [1, 6]),
    (ref.exponential_beta(4000), [2000, 4000]),
], ids=["six steps", "4000 steps"])  # fmt: skip
def test_ddim_with_eta_1_survives_a_jump_whose_variance_rounds_to_the_whole(beta, timesteps):
    """1 - alpha_bar_s - sigma^2 is a tiny positive number; rounded below 0, its root must be 0."""
    x0, d = f64([0.3]), ddpm.Diffusion(beta)
    got = ddpm.sample_ddim(image_model(np.array(beta), x0), d, normal(1, 1), timesteps, eta=1.0)
    close("x0", got, x0, 1e-9, 1.0)


@all_timesteps
def test_ddim_calls_the_model_once_at_each_of_the_timesteps_and_ends_at_0(timesteps):
    """As many evaluations as there are timesteps, from the last to the first; then s = 0."""
    called, reported = [], []

    def model(xt, t):
        assert t.shape == (2,) and t.dtype == torch.int64, f"t is {t.dtype} {tuple(t.shape)}"
        called.append(t.tolist())
        return torch.zeros_like(xt)

    x0 = ddpm.sample_ddim(
        model, ddpm.Diffusion(BRUTAL), normal(2, 1), timesteps,
        on_step=lambda s, xs: reported.append((s, xs)),
    )  # fmt: skip
    want = [[t, t] for t in reversed(timesteps)]
    assert called == want, f"the model was called at t = {called}, want {want}"
    got = [s for s, _ in reported]
    assert got == [*timesteps[-2::-1], 0], f"on_step got s = {got}"
    same("x0", x0, reported[-1][1])


@randomness
def test_ddim_with_eta_0_is_deterministic_and_that_is_the_default():
    """No random number is used up."""
    d, z = ddpm.Diffusion(BRUTAL), noise(2)
    before = z.generator.get_state()
    x = normal(4, 1)
    step = ddpm.ddim_step(d, x, 4, 2, 0.5 * x, noise=z)
    same("one step", step, ddpm.ddim_step(d, x, 4, 2, 0.5 * x, eta=0.0))
    a = ddpm.sample_ddim(gaussian_model(BRUTAL), d, normal(4, 1), [2, 4], noise=z)
    b = ddpm.sample_ddim(gaussian_model(BRUTAL), d, normal(4, 1), [2, 4], eta=0.0)
    same("x0", a, b)
    assert torch.equal(z.generator.get_state(), before), "random numbers were used"


def test_ddim_clips_x0_by_default():
    """With a useless model, samples are inside [-1, 1] by default, and outside with clip=False."""
    d, x = ddpm.Diffusion(BRUTAL), normal(64, 1)
    free = ddpm.sample_ddim(lambda x, t: 9 * x, d, x, [2, 4], clip=False)
    clipped = ddpm.sample_ddim(lambda x, t: 9 * x, d, x, [2, 4])
    assert clipped.abs().max() <= 1 + 1e-12, f"clipped: largest value {clipped.abs().max():g}"
    assert free.abs().max() > 2, f"clip=False: largest value {free.abs().max():g}"


# --- Statistics -----------------------------------------------------------------------------------


@etas
@jumps
def test_ddim_eq16_each_jump_is_gaussian_with_the_predicted_mean_and_variance(eta, s, t):
    """From xt = 0.7 in all N images: x_s ~ N(k_0 x0 + k_t xt, sigma^2), sigma^2 = eta^2 times the
    posterior variance of the jump."""
    d, states, xt = ddpm.Diffusion(BRUTAL), {}, f64(0.7).repeat(N, 1)
    eps = d.eps_from_x0(xt, t, torch.full_like(xt, -0.4))
    ddpm.sample_ddim(
        lambda x, _: eps, d, xt, [s, t] if s else [t], eta=eta, clip=False, noise=noise(t),
        on_step=states.__setitem__,
    )  # fmt: skip
    k_0, k_t, sigma2 = ref.ddim_step(BRUTAL, t, s, eta)
    mean = k_0 * -0.4 + k_t * 0.7
    if sigma2 > 0:
        has_normal_moments(f"x_{s}", states[s], mean, sigma2)
    else:
        close(f"x_{s}", states[s], mean, 1e-12, 1.0)


@etas
@all_timesteps
def test_ddim_ends_in_the_distribution_that_the_recursion_of_moments_predicts(timesteps, eta):
    """Exact model of N(0.5, 0.25), started from N(0, 1): the output is Gaussian with known moments."""
    d, model = ddpm.Diffusion(BRUTAL), gaussian_model(BRUTAL)
    got = ddpm.sample_ddim(model, d, normal(N, 1), timesteps, eta=eta, clip=False, noise=noise())
    has_normal_moments("x0", got, *exact_models.ddim_moments(BRUTAL, timesteps, eta, MEAN, VAR))


@etas
@pytest.mark.parametrize("timesteps", [[1, 4], [1, 2, 3, 4]], ids=str)
def test_ddim_ends_in_the_law_that_is_predicted_for_a_mixture(timesteps, eta):
    """Exact model of two unequal Gaussians: the output has the predicted shares, places and widths."""
    d, model = ddpm.Diffusion(BRUTAL), mixture_model(BRUTAL)
    got = ddpm.sample_ddim(model, d, normal(N, 1), timesteps, eta=eta, clip=False, noise=noise())
    steps = exact_models.ddim_steps(BRUTAL, timesteps, eta)
    has_law("x0", got, *exact_models.mixture_law(BRUTAL, steps, *MIXTURE))


@pytest.mark.parametrize("fault, timesteps, eta", [
    ("eta is ignored", [1, 2, 3, 4], 1.0),
    ("the last jump is skipped", [1, 2, 3, 4], 0.0),
    ("every second timestep is left out", [1, 2, 3, 4], 0.5),
])  # fmt: skip
def test_ddim_statistics_reject_a_sampler_in_which(fault, timesteps, eta):
    """Negative control: the tests above detect each of these faults."""
    d, states = ddpm.Diffusion(BRUTAL), {}
    wrong_eta = 0.0 if fault.startswith("eta") else eta
    wrong_timesteps = [2, 4] if fault.startswith("every") else timesteps
    moments = exact_models.ddim_moments(BRUTAL, timesteps, eta, MEAN, VAR)
    steps = exact_models.ddim_steps(BRUTAL, timesteps, eta)
    law = exact_models.mixture_law(BRUTAL, steps, *MIXTURE)
    for model, assertion, want in (
        (gaussian_model(BRUTAL), has_normal_moments, moments),
        (mixture_model(BRUTAL), has_law, law),
    ):
        ddpm.sample_ddim(
            model, d, normal(N, 1), wrong_timesteps, eta=wrong_eta, clip=False, noise=noise(),
            on_step=states.__setitem__,
        )  # fmt: skip
        got = states[1 if fault.startswith("the last") else 0]
        assert rejects(assertion, fault, got, *want)

"""Section 4 of ddpm.py: from eps to x0 and back, and the mean of a reverse step (eq. 8 to 12, 15)."""

import torch
from calls import ddpm
from checks import EPS, EPS32, close, f64, in_float64, same, tolerance
from hypothesis import given
from strategies import PaperCase, cases, every_case, normal, unit

import reference_numpy as ref


@given(case=cases(), x0=unit, eps=normal)
def test_eq15_x0_from_eps_inverts_q_sample(case, x0, eps):
    """x0_from_eps(q_sample(x0, t, eps), t, eps) = x0.

    Dividing by sqrt(alpha_bar_t) amplifies rounding. A coefficient sqrt(1 / alpha_bar_t - 1) is as accurate
    as 1 - alpha_bar_t.
    """
    d = ddpm.Diffusion(case.beta)
    xt = d.q_sample(f64(x0), case.t, f64(eps))
    signal, _ = ref.forward_moments(case.beta)
    scale = 1 + abs(eps) / signal[case.t]
    close("x0", d.x0_from_eps(xt, case.t, f64(eps)), x0, 4 * EPS + tolerance(case), scale)


@given(case=cases(), x0=unit, eps=normal)
def test_eq4_eps_from_x0_inverts_q_sample(case, x0, eps):
    """eps_from_x0(q_sample(x0, t, eps), t, x0) = eps.

    Dividing by sqrt(1 - alpha_bar_t) amplifies rounding. (xt / sqrt(alpha_bar_t) - x0) /
    sqrt(1 / alpha_bar_t - 1) is as accurate as 1 - alpha_bar_t.
    """
    d = ddpm.Diffusion(case.beta)
    xt = d.q_sample(f64(x0), case.t, f64(eps))
    _, noise = ref.forward_moments(case.beta)
    scale = abs(eps) + 1 / noise[case.t] ** 0.5
    close("eps", d.eps_from_x0(xt, case.t, f64(x0)), eps, 4 * EPS + tolerance(case), scale)


@every_case
def test_eq15_x0_from_eps_solves_eq4_of_the_chain(case):
    """sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps = xt, with the reference's coefficients."""
    signal, noise = ref.forward_moments(case.beta)
    xt, eps = 0.9, -1.7
    x0 = ddpm.Diffusion(case.beta).x0_from_eps(f64(xt), case.t, f64(eps))
    got = signal[case.t] * x0 + noise[case.t] ** 0.5 * eps
    close("xt", got, xt, tolerance(case) + 1e3 * EPS, 1.0)


@every_case
def test_eq4_eps_from_x0_solves_eq4_of_the_chain(case):
    """sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps = xt, with the reference's coefficients."""
    signal, noise = ref.forward_moments(case.beta)
    xt, x0 = 0.9, -0.7
    eps = ddpm.Diffusion(case.beta).eps_from_x0(f64(xt), case.t, f64(x0))
    got = signal[case.t] * x0 + noise[case.t] ** 0.5 * eps
    close("xt", got, xt, tolerance(case) + 1e3 * EPS, 1.0)


@every_case
def test_eq11_p_mean_is_the_printed_formula(case):
    """mu_theta = (xt - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t), where x0 is not clipped."""
    t = case.t
    _, noise = ref.forward_moments(case.beta)
    beta, xt, eps = case.beta[t], 0.8, -1.1
    printed = (xt - beta / noise[t] ** 0.5 * eps) / (1 - beta) ** 0.5
    mean = ddpm.Diffusion(case.beta).p_mean(f64(xt), t, f64(eps), clip=False)
    close("mu_theta", mean, printed, tolerance(case), 1 / (1 - beta) ** 0.5)


@every_case
def test_eq11_is_eq7_at_the_predicted_x0(case):
    """p_mean(xt, t, eps) = posterior_mean(x0_from_eps(xt, t, eps), xt, t)."""
    d = ddpm.Diffusion(case.beta)
    xt, eps = f64(0.8, -2.0), f64(-1.1, 0.3)
    x0 = d.x0_from_eps(xt, case.t, eps)
    want = d.posterior_mean(x0, xt, case.t)
    close("mu_theta", d.p_mean(xt, case.t, eps, clip=False), want, tolerance(case), 1 + x0.abs())


@every_case
def test_eq12_an_error_of_eps_moves_the_mean_by_the_weight_of_eq12(case):
    """|| mu_tilde - mu_theta ||^2 = beta_t^2 / (alpha_t (1 - alpha_bar_t)) || eps - eps_theta ||^2."""
    t = case.t
    _, noise = ref.forward_moments(case.beta)
    d = ddpm.Diffusion(case.beta)
    x0 = f64(0.25)
    xt = d.q_sample(x0, t, f64(0.75))
    gap = d.posterior_mean(x0, xt, t) - d.p_mean(xt, t, f64(-0.25), clip=False)
    weight = case.beta[t] ** 2 / ((1 - case.beta[t]) * noise[t])
    close("|mu_tilde - mu_theta|", gap.abs(), weight**0.5, tolerance(case), weight**0.5 + 1)


@given(case=cases(), x0=unit, eps=normal)
def test_clipping_changes_nothing_while_the_predicted_x0_is_an_image(case, x0, eps):
    """For |x0| <= 1 the mean is the same with and without clipping. Clipping is the default."""
    d = ddpm.Diffusion(case.beta)
    eps = f64(eps)
    xt = d.q_sample(f64(0.999 * x0), case.t, eps)
    if d.x0_from_eps(xt, case.t, eps).abs() <= 1:
        free = d.p_mean(xt, case.t, eps, clip=False)
        scale = (1 + xt.abs() + eps.abs()) / (1 - case.beta[case.t]) ** 0.5
        close("mu_theta", d.p_mean(xt, case.t, eps), free, tolerance(case), scale)


@every_case
def test_the_predicted_x0_is_clipped_before_the_mean_is_computed(case):
    """A predicted x0 of -3, 3, 1.5 is replaced by -1, 1, 1, by default."""
    d = ddpm.Diffusion(case.beta)
    eps = f64(0.5, 0.5, -2)
    xt = d.q_sample(f64(-3, 3, 1.5), case.t, eps)
    clipped = d.posterior_mean(f64(-1, 1, 1), xt, case.t)
    if (d.x0_from_eps(xt, case.t, eps).abs() > 1).all():
        for how in ({}, {"clip": True}):
            mean = d.p_mean(xt, case.t, eps, **how)
            close("mu_theta", mean, clipped, tolerance(case), 1 + xt.abs())


def test_clipping_applies_at_every_timestep_of_the_papers_schedule():
    """T = 1000, with all t in one batch. No rounding excuses a difference here."""
    d, t = ddpm.Diffusion(PaperCase(1).beta), torch.arange(1, 1001)
    x0 = torch.full((1000,), 3.0, dtype=torch.float64)
    xt = d.q_sample(x0, t, torch.zeros_like(x0))
    want = d.posterior_mean(torch.ones_like(x0), xt, t)
    close("mu_theta", d.p_mean(xt, t, torch.zeros_like(x0)), want, 4 * EPS)


@in_float64
def test_eq15_x0_from_eps_is_as_accurate_as_float32_allows():
    """At t = 1 of the paper's schedule, x0 is within two float32 roundings of the exact quotient."""
    signal, noise = ref.forward_moments(PaperCase(1).beta)
    xt, eps = torch.linspace(-1, 1, 101), torch.linspace(3, -3, 101)
    want = (xt.double() - noise[1] ** 0.5 * eps.double()) / signal[1]
    got = ddpm.Diffusion(PaperCase(1).beta).x0_from_eps(xt, 1, eps)
    close("x0", got, want, 2 * EPS32, 1.0)


def test_eq15_and_its_inverse_use_the_t_of_each_image():
    """A batch with t = (1, T, 2) has three images, each at its t."""
    d, t = ddpm.Diffusion([0, 0.1, 0.5, 0.3]), torch.tensor([1, 3, 2])
    a, b = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64)
    for name in ("x0_from_eps", "eps_from_x0", "p_mean"):
        f = getattr(d, name)
        one_by_one = torch.cat([f(a[i : i + 1], int(t[i]), b[i : i + 1]) for i in range(3)])
        same(name, f(a, t, b), one_by_one)

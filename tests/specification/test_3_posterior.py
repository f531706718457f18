"""Section 3 of ddpm.py: the posterior of the forward process, q(x_{t-1} | xt, x0) (eq. 6, eq. 7)."""

import pytest
import torch
from calls import ddpm
from checks import EPS32, close, f64, in_float64, in_precision, same, tolerance
from strategies import PaperCase, every_case

import reference_numpy as ref


def coefficients(case):
    """Return c_0 and c_t of mu_tilde = c_0 x0 + c_t xt, which is linear in x0 and xt."""
    return ddpm.Diffusion(case.beta).posterior_mean(f64(1, 0), f64(0, 1), case.t).numpy()


@every_case
def test_eq7_posterior_is_the_joint_gaussian_of_both_steps_conditioned_on_xt(case):
    """Bayes: condition (x_{t-1}, xt) | x0 on xt. Errors are relative to the larger of c_0 and c_t."""
    d = ddpm.Diffusion(case.beta)
    c_0, c_t, var = ref.posterior(case.beta, case.t)
    close("c_0, c_t", coefficients(case), [c_0, c_t], tolerance(case), max(c_0, c_t))
    close("beta_tilde_t", d.beta_tilde[case.t], var, tolerance(case), case.beta[case.t])


@every_case
def test_eq7_posterior_mean_keeps_the_marginal_mean(case):
    """c_0 + c_t sqrt(alpha_bar_t) = sqrt(alpha_bar_{t-1})."""
    signal, _ = ref.forward_moments(case.beta)
    c_0, c_t = coefficients(case)
    got = c_0 + c_t * signal[case.t]
    close("c_0 + c_t sqrt(alpha_bar_t)", got, signal[case.t - 1], tolerance(case))


@every_case
def test_eq7_posterior_keeps_the_marginal_variance(case):
    """c_t^2 (1 - alpha_bar_t) + beta_tilde_t = 1 - alpha_bar_{t-1}."""
    d = ddpm.Diffusion(case.beta)
    _, noise = ref.forward_moments(case.beta)
    _, c_t = coefficients(case)
    got = c_t**2 * noise[case.t] + d.beta_tilde[case.t]
    close("c_t^2 (1 - alpha_bar_t) + beta_tilde_t", got, noise[case.t - 1], tolerance(case))


@every_case
def test_eq7_precisions_add_up(case):
    """1 / beta_tilde_t = alpha_t / beta_t + 1 / (1 - alpha_bar_{t-1}), for t > 1."""
    t = case.t
    _, noise = ref.forward_moments(case.beta)
    if t > 1:
        want = (1 - case.beta[t]) / case.beta[t] + 1 / noise[t - 1]
        precision = 1 / ddpm.Diffusion(case.beta).beta_tilde[t]
        close("1 / beta_tilde_t", precision, want, tolerance(case))


@every_case
def test_eq7_at_t1_the_posterior_is_the_clean_image(case):
    """c_0 = 1, c_1 = 0 and beta_tilde_1 = 0, because x0 is given."""
    d = ddpm.Diffusion(case.beta)
    c_0, c_1 = d.posterior_mean(f64(1, 0), f64(0, 1), 1)
    close("c_0 at t = 1", c_0, 1, tolerance(case))
    close("c_1 and beta_tilde_1", [float(c_1), float(d.beta_tilde[1])], [0, 0], 0.0)


@pytest.mark.parametrize("t, ratio", [(2, 0.4547), (10, 0.8528), (100, 0.9819)])
def test_eq7_beta_tilde_of_the_papers_schedule(t, ratio):
    """beta_tilde_t / beta_t = 0.4547, 0.8528, 0.9819 at t = 2, 10, 100, and beta_tilde_2 = 5.4532e-5."""
    d = ddpm.Diffusion(PaperCase(t).beta)
    close("beta_tilde_t / beta_t", d.beta_tilde[t] / d.beta[t], ratio, 0.5e-4, 1.0)
    close("beta_tilde_2", d.beta_tilde[2], 5.4532e-5, 1e-5 + in_precision(tolerance(PaperCase(t))))


def test_eq7_posterior_mean_uses_the_t_of_each_image():
    """A batch with t = (1, T, 2) has three images, each at its t."""
    d = ddpm.Diffusion([0, 0.1, 0.5, 0.3])
    x0, xt = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64)
    t = torch.tensor([1, 3, 2])
    one_by_one = torch.cat(
        [d.posterior_mean(x0[i : i + 1], xt[i : i + 1], int(t[i])) for i in range(3)]
    )
    same("mu_tilde", d.posterior_mean(x0, xt, t), one_by_one)


@in_float64
@pytest.mark.parametrize("t", [1, 2, 10, 500, 1000])
def test_eq7_coefficients_are_computed_in_float64_and_rounded_once(t):
    """In float32, c_0 and c_t are within one rounding of the reference."""
    c_0, c_t, _ = ref.posterior(PaperCase(t).beta, t)
    mean = ddpm.Diffusion(PaperCase(t).beta).posterior_mean(torch.eye(2)[0], torch.eye(2)[1], t)
    close("c_0, c_t", mean, [c_0, c_t], EPS32)

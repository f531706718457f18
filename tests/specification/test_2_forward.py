"""Section 2 of ddpm.py: the tables and the forward process (eq. 2, eq. 4)."""

import far
import numpy as np
import pytest
import torch
from calls import ddpm, likelihood
from checks import EPS, EPS32, close, f64, has_reals, in_float64, log_size, same, tolerance
from strategies import PaperCase, every_case

import reference_numpy as ref


@every_case
def test_tables_run_from_0_to_T_and_begin_with_the_clean_image(case):
    """beta_0 = 0 and alpha_bar_0 = 1. beta_tilde_0 is nan, because t = 0 has no reverse step."""
    d = ddpm.Diffusion(case.beta)
    assert d.T == case.T, f"T is {d.T}, want {case.T}"
    for table in (d.beta, d.alpha, d.alpha_bar, d.beta_tilde):
        has_reals("a table", table)
        assert len(table) == case.T + 1, f"{len(table)} entries, want {case.T + 1}"
    start = [float(table[0]) for table in (d.beta, d.alpha, d.alpha_bar, d.beta_tilde)]
    close("beta_0, alpha_0, alpha_bar_0, beta_tilde_0", start, [0, 1, 1, np.nan], 0.0)
    close("beta", d.beta, case.beta, EPS / 2)


@every_case
def test_eq4_alpha_bar_is_the_signal_that_the_chain_of_eq2_keeps(case):
    """Composing q(x_s | x_{s-1}) for s = 1 .. t scales x0 by sqrt(alpha_bar_t), which decreases."""
    d = ddpm.Diffusion(case.beta)
    signal, _ = ref.forward_moments(case.beta)
    close("sqrt(alpha_bar)", d.alpha_bar.sqrt(), signal, 2 * (case.T + 4 + log_size(case)) * EPS)
    largest = d.alpha_bar.diff().max()
    assert largest < 0, f"the largest difference of neighbours is {largest}"


@every_case
def test_eq4_q_sample_has_the_mean_and_variance_of_the_chain_of_eq2(case):
    """q_sample(1, t, 0) = sqrt(alpha_bar_t), and q_sample(0, t, 1)^2 = 1 - alpha_bar_t."""
    signal, noise = ref.forward_moments(case.beta)
    xt = ddpm.Diffusion(case.beta).q_sample(f64(1, 0), case.t, f64(0, 1))
    close("coefficient of x0", xt[0], signal[case.t], 2 * (case.T + 4 + log_size(case)) * EPS)
    close("variance", xt[1] ** 2, noise[case.t], tolerance(case))


@every_case
def test_eq4_q_sample_is_linear_in_the_image_and_the_noise(case):
    """q_sample(x0, t, eps) = q_sample(x0, t, 0) + q_sample(0, t, eps)."""
    d = ddpm.Diffusion(case.beta)
    x0, eps, zero = f64(-0.7, 1), f64(1.3, -0.4), f64(0, 0)
    parts = d.q_sample(x0, case.t, zero) + d.q_sample(zero, case.t, eps)
    close("xt", d.q_sample(x0, case.t, eps), parts, 4 * EPS, 3.0)


@every_case
def test_eq4_q_sample_at_t0_is_the_clean_image(case):
    """alpha_bar_0 = 1, so no noise is added."""
    d = ddpm.Diffusion(case.beta)
    same("x_0", d.q_sample(f64(0.3, -0.6), 0, f64(5, 5)), f64(0.3, -0.6))


def test_eq4_q_sample_uses_the_t_of_each_image():
    """A batch with t = (1, T, 2) has three images, each at its t. All pixels of an image share it."""
    d = ddpm.Diffusion([0, 0.1, 0.5, 0.3])
    x0, eps = torch.randn(2, 3, 3, 3, 3, dtype=torch.float64)
    t = torch.tensor([1, 3, 2])
    one_by_one = torch.cat([d.q_sample(x0[i : i + 1], int(t[i]), eps[i : i + 1]) for i in range(3)])
    same("xt", d.q_sample(x0, t, eps), one_by_one)


@in_float64
@pytest.mark.parametrize("t", [1, 2, 10, 500, 1000])
def test_eq4_coefficients_are_computed_in_float64_and_rounded_once(t):
    """In float32 both coefficients are within one rounding of the reference.

    1 - alpha_bar_1 from a float32 table has a relative error of 1.7e-4.
    """
    signal, noise = ref.forward_moments(PaperCase(t).beta)
    xt = ddpm.Diffusion(PaperCase(t).beta).q_sample(torch.eye(2)[0], t, torch.eye(2)[1])
    assert xt.dtype == torch.float32, f"dtype {xt.dtype}"
    close("sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t)", xt, [signal[t], noise[t] ** 0.5], EPS32)


@in_float64
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eq4_half_precision_images_get_all_their_noise(dtype):
    """At t = 1 of the paper's schedule, half precision rounds 1 - alpha_bar to 0. The noise must stay."""
    d = ddpm.Diffusion(PaperCase(1).beta)
    xt = d.q_sample(torch.zeros(1, dtype=dtype), 1, torch.ones(1, dtype=dtype))
    assert xt.dtype == torch.float32, f"dtype {xt.dtype}"
    close("sqrt(1 - alpha_bar_1)", xt, 0.01, 1e-6)


def test_tables_and_the_bound_are_on_the_cpu_whatever_the_default_device():
    """Timesteps are drawn on the CPU, and not every device has float64."""
    with far.device(), torch.device("far"):
        for schedule in (ddpm.linear_schedule, ddpm.cosine_schedule, ddpm.exponential_schedule):
            d = ddpm.Diffusion(schedule(4))
            devices = {x.device.type for x in (d.beta, d.alpha, d.alpha_bar, d.beta_tilde)}
            assert devices == {"cpu"}, f"the tables are on {devices}"
        x = torch.ones(2, 3, device="cpu")
        terms = likelihood.bound_terms(lambda xt, t: xt, d, x, [d.beta])
    kind = (terms.device.type, terms.dtype)
    assert kind == ("cpu", torch.float64), f"the terms are {kind}"


@in_float64
@pytest.mark.parametrize("kind", ["a list", "an array", "float32", "float64"])
def test_tables_are_float64_whatever_the_type_of_the_schedule(kind):
    """A list is not rounded to torch's default dtype, and a float32 tensor keeps its values."""
    beta = ref.linear_beta(9)
    given = {
        "a list": beta.tolist(),
        "an array": beta,
        "float32": torch.tensor(beta, dtype=torch.float32),
        "float64": torch.tensor(beta),
    }[kind]
    same("beta", ddpm.Diffusion(given).beta, torch.as_tensor(given, dtype=torch.float64))


def test_the_diffusion_keeps_its_own_copy_of_the_schedule():
    """Writing to the given table later changes nothing."""
    beta = f64(0, 0.1, 0.5)
    d = ddpm.Diffusion(beta)
    beta[1] = 0.9
    close("beta", d.beta, [0, 0.1, 0.5], EPS / 2)

"""Section 2 of ddpm.py: the tables and the forward process (eq. 2, eq. 4)."""

import far
import pytest
import torch
from judge import EPS, EPS32, close, f64, has_reals, in_float64, refused, same, tolerance
from strategies import PaperCase, every_case

import ddpm
import reference_numpy as ref


@every_case
def test_tables_run_from_0_to_T_and_begin_with_the_clean_image(case):
    """beta_0 = 0, alpha_bar_0 = 1; beta_tilde_0, of a step that does not exist, is nan; float64."""
    d = ddpm.Diffusion(case.beta)
    tables = (d.beta, d.alpha, d.alpha_bar, d.beta_tilde)
    assert d.T == case.T
    for table in tables:
        has_reals("a table", table)
        assert len(table) == case.T + 1
    assert d.beta[0] == 0 and d.alpha[0] == 1 and d.alpha_bar[0] == 1 and d.beta_tilde[0].isnan()
    close("beta", d.beta, case.beta, EPS / 2)


@every_case
def test_eq4_alpha_bar_is_what_the_chain_of_eq2_leaves_of_the_image(case):
    """Composing q(x_s | x_{s-1}) for s = 1 .. t scales x0 by sqrt(alpha_bar_t); alpha_bar falls."""
    d = ddpm.Diffusion(case.beta)
    signal, _ = ref.forward_moments(case.beta)
    close("sqrt(alpha_bar)", d.alpha_bar.sqrt(), signal, 2 * (case.T + 4) * EPS)
    assert (d.alpha_bar.diff() < 0).all()


@every_case
def test_eq4_q_sample_has_the_mean_and_variance_of_the_chain_of_eq2(case):
    """q_sample(1, t, 0) = sqrt(alpha_bar_t); q_sample(0, t, 1)^2 = 1 - alpha_bar_t."""
    signal, noise = ref.forward_moments(case.beta)
    xt = ddpm.Diffusion(case.beta).q_sample(f64(1, 0), case.t, f64(0, 1))
    close("coefficient of x0", xt[0], signal[case.t], 2 * (case.T + 4) * EPS)
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
    """alpha_bar_0 = 1: no noise at all."""
    d = ddpm.Diffusion(case.beta)
    same("x_0", d.q_sample(f64(0.3, -0.6), 0, f64(5, 5)), f64(0.3, -0.6))


def test_eq4_q_sample_gives_each_image_its_own_t():
    """A batch with t = (1, T, 2) is three images, each at its t; every pixel of one shares it."""
    d = ddpm.Diffusion([0, 0.1, 0.5, 0.3])
    x0, eps = torch.randn(2, 3, 3, 3, 3, dtype=torch.float64)
    t = torch.tensor([1, 3, 2])
    one_by_one = torch.cat([d.q_sample(x0[i : i + 1], int(t[i]), eps[i : i + 1]) for i in range(3)])
    same("xt", d.q_sample(x0, t, eps), one_by_one)


@in_float64
@pytest.mark.parametrize("t", [1, 2, 10, 500, 1000])
def test_eq4_coefficients_are_float64_arithmetic_rounded_once(t):
    """In float32 both coefficients are within one rounding of the reference; a float32 table of
    1 - alpha_bar would be off by 1.7e-4 at t = 1."""
    signal, noise = ref.forward_moments(PaperCase(t).beta)
    xt = ddpm.Diffusion(PaperCase(t).beta).q_sample(torch.eye(2)[0], t, torch.eye(2)[1])
    assert xt.dtype == torch.float32
    close("sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t)", xt, [signal[t], noise[t] ** 0.5], EPS32)


@in_float64
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eq4_half_precision_images_lose_no_noise(dtype):
    """At t = 1 of the paper's schedule half precision rounds 1 - alpha_bar to 0; the noise must stay."""
    d = ddpm.Diffusion(PaperCase(1).beta)
    xt = d.q_sample(torch.zeros(1, dtype=dtype), 1, torch.ones(1, dtype=dtype))
    assert xt.dtype == torch.float32
    close("sqrt(1 - alpha_bar_1)", xt, 0.01, 1e-6)


def test_tables_live_on_the_cpu_whatever_the_default_device():
    """t is drawn there, and float64 is known there; the bound, too, is told there."""
    with far.device(), torch.device("far"):
        for schedule in (ddpm.linear_schedule, ddpm.cosine_schedule, ddpm.exponential_schedule):
            d = ddpm.Diffusion(schedule(4))
            assert {x.device.type for x in (d.beta, d.alpha, d.alpha_bar, d.beta_tilde)} == {"cpu"}
        x = torch.ones(2, 3, device="cpu")
        terms = ddpm.bound_terms(lambda xt, t: xt, d, x, [d.beta])
    assert terms.device.type == "cpu" and terms.dtype == torch.float64


def test_a_step_outside_0_T_is_refused():
    """t = -1 and t = T + 1 are mistakes, and must not wrap around to another step."""
    d = ddpm.Diffusion([0, 0.1, 0.5])
    for t in (-1, 3, torch.tensor([0, -1]), torch.tensor([2, 3])):
        with refused(f"t = {t}"):
            d.q_sample(f64(1, 1), t, f64(0, 0))


def test_as_many_steps_as_images_or_one_for_all_are_needed():
    """Three steps for two images are a mistake; one image is never repeated to fit three steps."""
    d = ddpm.Diffusion([0, 0.1, 0.5])
    for images in (1, 2):
        with refused(f"three steps for {images} images"):
            d.q_sample(torch.zeros(images), torch.tensor([1, 2, 1]), torch.zeros(images))


@pytest.mark.parametrize("name", "q_sample posterior_mean x0_from_eps eps_from_x0".split())
def test_images_and_noise_of_different_shapes_are_refused(name):
    """(2, 1) and (2,) would broadcast to (2, 2), silently."""
    d, arguments = ddpm.Diffusion([0, 0.1, 0.5]), [torch.zeros(2, 1), torch.zeros(2)]
    arguments.insert(2 if name == "posterior_mean" else 1, 1)
    with refused(f"{name} of (2, 1) and (2,)"):
        getattr(d, name)(*arguments)


@pytest.mark.parametrize("beta", [
    [], [0], [0.1, 0.2], [0, 0.1, 0], [0, 1], [0, 1.5], [0, -0.1], [0, float("nan")], [[0, 0.1]],
], ids=str)  # fmt: skip
def test_a_table_that_is_no_schedule_is_refused(beta):
    """Needed: beta[0] = 0, at least one step, 0 < beta_t < 1. beta_T = 1 would divide by zero."""
    with refused(f"beta = {beta}"):
        ddpm.Diffusion(beta)


@in_float64
@pytest.mark.parametrize("kind", ["a list", "float32", "float64"])
def test_tables_are_float64_whatever_the_schedule_comes_as(kind):
    """A list of numbers is not rounded to torch's default type; a float32 tensor counts as what it holds."""
    beta = ref.linear_beta(9).tolist()
    given = beta if kind == "a list" else torch.tensor(beta, dtype=getattr(torch, kind))
    same("beta", ddpm.Diffusion(given).beta, torch.as_tensor(given, dtype=torch.float64))

"""T = 1, the shortest diffusion: one step, which is the first and the last."""

import numpy as np
import pytest
import torch
from calls import ddpm, likelihood, noise
from checks import EPS, close, edge, f64, same
from test_6_ancestral import image_model, normal

import reference_numpy as ref

pytestmark = edge
BETA = np.array([0, 0.3])


@pytest.mark.parametrize("name", ["linear_schedule", "cosine_schedule", "exponential_schedule"])
def test_T1_a_schedule_has_one_beta_inside_0_1(name):
    """beta[0] = 0, then beta_1: of schedules from beta_1 to beta_T the first."""
    beta = getattr(ddpm, name)(1)
    assert beta.shape == (2,) and beta[0] == 0 and 0 < beta[1] < 1
    if name != "cosine_schedule":
        close("beta_1", beta[1], 1e-4, 4 * EPS)


def test_T1_tables_hold_the_clean_image_and_one_step():
    """alpha_bar = 1, 1 - beta_1; the posterior of the only step has no variance."""
    d = ddpm.Diffusion(BETA)
    assert d.T == 1
    close("alpha_bar", d.alpha_bar, [1, 0.7], 2 * EPS)
    assert d.beta_tilde[0].isnan() and d.beta_tilde[1] == 0


def test_T1_eq4_adds_the_noise_of_one_step():
    """x1 = sqrt(1 - beta_1) x0 + sqrt(beta_1) eps."""
    x1 = ddpm.Diffusion(BETA).q_sample(f64(0.4, -1), 1, f64(-0.6, 2))
    close("x1", x1, 0.7**0.5 * f64(0.4, -1) + 0.3**0.5 * f64(-0.6, 2), 8 * EPS, 2.0)


def test_T1_eq7_and_eq11_give_the_clean_image():
    """mu_tilde_1 = x0, and mu_theta is the x0 that eps implies, clipped or not."""
    d, x1, eps = ddpm.Diffusion(BETA), f64(0.8, -1.4), f64(0.2, 0.5)
    close("mu_tilde", d.posterior_mean(f64(0.4, -1), x1, 1), f64(0.4, -1), 8 * EPS)
    x0 = (x1 - 0.3**0.5 * eps) / 0.7**0.5
    close("mu_theta", d.p_mean(x1, 1, eps, clip=False), x0, 32 * EPS, 4.0)
    close("mu_theta, clipped", d.p_mean(x1, 1, eps), x0.clamp(-1, 1), 32 * EPS, 4.0)


def test_T1_algorithm1_samples_t_1_only():
    """There is no other t."""
    seen = []
    ddpm.loss_simple(
        lambda xt, t: seen.append(t) or 0 * xt, ddpm.Diffusion(BETA), torch.zeros(50, 1)
    )
    same("t", seen[0], torch.ones(50, dtype=torch.int64))


@pytest.mark.parametrize("sampler", ["sample_ancestral", "sample_ddim"])
def test_T1_samplers_return_the_only_image_without_noise(sampler):
    """One step, at t = 1, from whatever x1: x0 comes back, whichever the variance or eta."""
    d, x0 = ddpm.Diffusion(BETA), f64([0.3], [-1.0])
    model, x1 = image_model(BETA, x0), normal(2, 1)
    samples = []
    if sampler == "sample_ddim":
        for eta in (0.0, 0.5, 1.0):
            samples.append(ddpm.sample_ddim(model, d, x1, [1], eta=eta, noise=noise()))
    else:
        for sigma2 in (d.beta, d.beta_tilde):
            samples.append(ddpm.sample_ancestral(model, d, x1, sigma2, noise=noise()))
    for got in samples:
        close("x0", got, x0, 32 * EPS, 4.0)


def test_T1_steps_return_the_predicted_x0_without_noise():
    """Both single steps, whichever the variance or eta."""
    d, x1, x0 = ddpm.Diffusion(BETA), normal(2, 1), f64([0.3], [-1.0])
    eps = d.eps_from_x0(x1, 1, x0)
    for sigma2 in (d.beta, d.beta_tilde):
        close("x0", ddpm.ancestral_step(d, x1, 1, eps, sigma2, noise=noise()), x0, 32 * EPS, 4.0)
    for eta in (0.0, 0.5, 1.0):
        close("x0", ddpm.ddim_step(d, x1, 1, 0, eps, eta=eta, noise=noise()), x0, 32 * EPS, 4.0)


def test_T1_ddim_timesteps_are_the_step_itself():
    assert list(ddpm.ddim_timesteps(1, 1)) == [1]


def test_T1_bound_is_the_decoder_with_beta_1_and_the_prior():
    """L_0 and L_1 = L_T, and nothing between; there is no beta_tilde_2, so the decoder takes beta_1."""
    k, seen = np.array([0, 77, 255]), []
    d, x0 = ddpm.Diffusion(BETA), torch.from_numpy(ref.pixel_value(k))[:, None]
    terms = likelihood.bound_terms(
        lambda xt, t: seen.append(xt) or 0.5 * xt, d, x0, [d.beta], noise=noise()
    )
    assert terms.shape == (1, 3, 2), f"shape {tuple(terms.shape)}, want (1, 3, 2)"
    mean = d.p_mean(seen[0], 1, 0.5 * seen[0])[:, 0].numpy()
    want = -ref.decoder_log_prob(k, mean, 0.3) / np.log(2)
    close("L_0", terms[0, :, 0], want, 1e-9, 1 + abs(want))
    close("L_T", terms[0, :, 1], ref.prior_term(BETA, k) / np.log(2), 32 * EPS, 2.0)

"""Section 5 of ddpm.py: the simple loss (eq. 14, Algorithm 1)."""

import numpy as np
import pytest
import torch
from judge import (
    EPS,
    close,
    f64,
    has_mean,
    has_normal_moments,
    is_uniform,
    refused,
    rejects,
    same,
    tolerance,
)
from strategies import every_case

import ddpm
import reference_numpy as ref

BRUTAL = np.array([0, 0.05, 0.7, 0.3, 0.1, 0.5])  # a short schedule in which every step matters


class Recorder:
    """A model that answers 0 (or what it is told to) and remembers what it was asked."""

    def __init__(self, answer=None):
        self.calls, self.answer = [], answer

    def __call__(self, xt, t):
        self.calls.append((xt, t))
        return torch.zeros_like(xt) if self.answer is None else self.answer(xt, t)


@every_case
def test_eq14_is_the_mean_squared_error_of_the_noise_at_the_given_t(case):
    """mean (eps - 0.3 xt)^2, with xt by the reference's coefficients."""
    signal, noise = ref.forward_moments(case.beta)
    x0, eps = np.array([[0.5, -1.0], [0.25, 1.0]]), np.array([[1.0, -2.0], [0.5, 3.0]])
    t = np.array([case.t, case.T])
    xt = signal[t][:, None] * x0 + noise[t][:, None] ** 0.5 * eps
    loss = ddpm.loss_simple(lambda xt, t: 0.3 * xt, ddpm.Diffusion(case.beta), f64(*x0.tolist()),
                            torch.from_numpy(t), f64(*eps.tolist()))  # fmt: skip
    close("L_simple", loss, ((eps - 0.3 * xt) ** 2).mean(), tolerance(case), 10.0)


def test_algorithm1_the_target_is_the_noise_and_not_the_image():
    """A model that answers eps has loss 0; one that answers x0 has not."""
    d, x0, eps = ddpm.Diffusion(BRUTAL), torch.rand(8, 3) * 2 - 1, torch.randn(8, 3)
    t = torch.randint(1, 6, (8,))
    close("L_simple of eps_theta = eps", ddpm.loss_simple(lambda xt, t: eps, d, x0, t, eps), 0, 0.0)
    assert ddpm.loss_simple(lambda xt, t: x0, d, x0, t, eps) > 0.1


def test_algorithm1_the_model_sees_xt_and_its_t():
    """model(xt, t) is asked once, with xt = q_sample(x0, t, eps) and t (B,) int64 in 1..T."""
    d, model = ddpm.Diffusion(BRUTAL), Recorder()
    x0, eps, t = torch.rand(4, 2), torch.randn(4, 2), torch.tensor([1, 5, 2, 5])
    ddpm.loss_simple(model, d, x0, t, eps)
    [(xt, seen)] = model.calls
    same("t", seen, t)
    same("xt", xt, d.q_sample(x0, t, eps))


def test_algorithm1_draws_t_uniformly_from_1_to_T():
    """20,000 draws of t from {1..5}: no other value, and each equally often."""
    model = Recorder()
    ddpm.loss_simple(model, ddpm.Diffusion(BRUTAL), torch.zeros(20_000, 1))
    counts = torch.bincount(model.calls[0][1], minlength=7).numpy()
    assert counts[0] == 0 and counts[6:].sum() == 0, f"t outside 1..5: counts of 0..6 are {counts}"
    is_uniform("t", counts[1:6])
    assert rejects(is_uniform, "t never T", [5000, 5000, 5000, 5000, 0])


def test_algorithm1_draws_t_for_each_image_alone():
    """Neighbours in a batch have independent t: their pairs are uniform on {1..5}^2."""
    model = Recorder()
    ddpm.loss_simple(model, ddpm.Diffusion(BRUTAL), torch.zeros(40_000, 1))
    t = model.calls[0][1].reshape(-1, 2) - 1
    is_uniform("pairs of t", torch.bincount(t[:, 0] * 5 + t[:, 1], minlength=25).numpy())


def test_algorithm1_draws_standard_normal_noise_for_each_pixel_alone():
    """With x0 = 0 the model sees sqrt(1 - alpha_bar_t) eps: eps ~ N(0, 1), neighbours uncorrelated."""
    d, model = ddpm.Diffusion(BRUTAL), Recorder()
    ddpm.loss_simple(model, d, torch.zeros(5000, 4), torch.full((5000,), 3))
    eps = (model.calls[0][0] / (1 - d.alpha_bar[3]) ** 0.5).numpy()
    has_normal_moments("eps", eps, 0, 1)
    has_mean("eps_i eps_j within an image", eps[:, 0] * eps[:, 1], 0)
    has_mean("eps_i eps_j across images", eps[::2, 0] * eps[1::2, 0], 0)


def test_eq14_of_the_model_0_is_1():
    """Without t and eps, the loss of the model 0 is E eps^2 = 1 at any image."""
    losses = [ddpm.loss_simple(Recorder(), ddpm.Diffusion(BRUTAL), torch.ones(64, 4)).item()
              for _ in range(100)]  # fmt: skip
    has_mean("L_simple of the model 0", losses, 1.0)


@pytest.mark.parametrize("weights, means, variances", [
    ([1.0], [0.5], [0.25]), ([0.3, 0.7], [-0.6, 0.5], [0.02, 0.1]),
], ids=["a Gaussian", "two Gaussians"])  # fmt: skip
def test_eq14_is_least_for_the_conditional_mean_of_the_noise(weights, means, variances):
    """The exact model of scalars x0 reaches E Var(eps | xt), averaged over t; a model that is off by
    0.3 is rejected."""
    N, data = 100_000, (np.array(weights), np.array(means), np.array(variances))
    m, s2 = f64(means, variances)[:, torch.multinomial(f64(*weights), N, replacement=True)]
    x0, errors = (m + s2.sqrt() * torch.randn_like(m))[:, None], {}
    for name, off in ("exact", 0.0), ("off by 0.3", 0.3):

        def model(xt, t, off=off):
            answer = torch.zeros_like(xt)
            for step in range(1, 6):
                here = t == step
                answer[here] = torch.from_numpy(
                    ref.eps_mixture(BRUTAL, step, xt[here].numpy(), *data)
                )
            return answer + off

        batches = x0.reshape(100, 1000, 1)
        errors[name] = [ddpm.loss_simple(model, ddpm.Diffusion(BRUTAL), b).item() for b in batches]
    least = np.mean([ref.loss_minimum_mixture(BRUTAL, t, *data) for t in range(1, 6)])
    has_mean("L_simple of the exact model", errors["exact"], least)
    assert rejects(has_mean, "L_simple of a model off by 0.3", errors["off by 0.3"], least)


def test_eq14_can_be_differentiated_with_respect_to_the_model():
    """d/da mean (eps - a xt)^2 = -2 mean xt (eps - a xt)."""
    d, a = ddpm.Diffusion(BRUTAL), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x0, eps, t = f64([0.5], [-0.5]), f64([1], [2]), torch.tensor([2, 4])
    ddpm.loss_simple(lambda xt, t: a * xt, d, x0, t, eps).backward()
    xt = d.q_sample(x0, t, eps)
    close("gradient", a.grad, (-2 * xt * (eps - 0.5 * xt)).mean(), 8 * EPS)


def test_a_prediction_of_another_shape_is_refused():
    """(B, 1) against (B, 3) would broadcast, silently."""
    with refused("a prediction (4, 1) of noise (4, 3)"):
        ddpm.loss_simple(lambda xt, t: xt[:, :1], ddpm.Diffusion(BRUTAL), torch.zeros(4, 3))

"""Section 5 of ddpm.py: the simple loss (eq. 14, Algorithm 1)."""

import exact_models
import numpy as np
import pytest
import torch
from calls import ddpm
from checks import (
    EPS,
    close,
    f64,
    has_mean,
    has_normal_moments,
    is_uniform,
    rejects,
    same,
    tolerance,
)
from strategies import every_case

import reference_numpy as ref

BRUTAL = np.array([0, 0.05, 0.7, 0.3, 0.1, 0.5])  # a short schedule in which every timestep matters


class Recorder:
    """A model that returns 0 and stores its arguments."""

    def __init__(self):
        self.calls = []

    def __call__(self, xt, t):
        self.calls.append((xt, t))
        return torch.zeros_like(xt)


@every_case
def test_eq14_is_the_mean_squared_error_of_the_noise_at_the_given_t(case):
    """mean (eps - 0.3 xt)^2, with xt from the reference's coefficients."""
    signal, noise = ref.forward_moments(case.beta)
    x0 = np.array([[0.5, -1.0], [0.25, 1.0]])
    eps = np.array([[1.0, -2.0], [0.5, 3.0]])
    t = np.array([case.t, case.T])
    xt = signal[t][:, None] * x0 + noise[t][:, None] ** 0.5 * eps
    given = [torch.from_numpy(x) for x in (x0, t, eps)]
    loss = ddpm.loss_simple(lambda xt, t: 0.3 * xt, ddpm.Diffusion(case.beta), *given)
    close("L_simple", loss, ((eps - 0.3 * xt) ** 2).mean(), tolerance(case), 10.0)


@pytest.mark.parametrize("t", [1, 2, 1000])
def test_eq14_weighs_every_timestep_of_the_papers_schedule_alike(t):
    """A prediction that is off by 0.5 costs 0.25 at t = 1 as at T, in float32."""
    d = ddpm.Diffusion(ref.linear_beta(1000))
    x0, eps = torch.rand(2, 3, 2, 4), torch.randn(2, 3, 2, 4)
    loss = ddpm.loss_simple(lambda xt, t: eps + 0.5, d, x0, torch.tensor([t, t]), eps)
    close("L_simple", loss, 0.25, 1e-6)


def test_algorithm1_the_target_is_the_noise_and_not_the_image():
    """A model that returns eps has loss 0. A model that returns x0 does not."""
    d, x0, eps = ddpm.Diffusion(BRUTAL), torch.rand(8, 3) * 2 - 1, torch.randn(8, 3)
    t = torch.randint(1, 6, (8,))
    close("L_simple of eps_theta = eps", ddpm.loss_simple(lambda xt, t: eps, d, x0, t, eps), 0, 0.0)
    loss = ddpm.loss_simple(lambda xt, t: x0, d, x0, t, eps)
    assert loss > 0.1, f"L_simple of eps_theta = x0 is {loss:.3g}"


def test_algorithm1_the_model_gets_xt_and_t():
    """model(xt, t) is called once, with xt = q_sample(x0, t, eps) and int64 t (B,) in 1..T."""
    d, model = ddpm.Diffusion(BRUTAL), Recorder()
    x0, eps, t = torch.rand(4, 2), torch.randn(4, 2), torch.tensor([1, 5, 2, 5])
    ddpm.loss_simple(model, d, x0, t, eps)
    [(xt, seen)] = model.calls
    same("t", seen, t)
    same("xt", xt, d.q_sample(x0, t, eps))


def test_algorithm1_t_is_uniform_on_1_to_T():
    """20,000 random t from {1..5}: no other value occurs, and each is equally frequent."""
    model = Recorder()
    ddpm.loss_simple(model, ddpm.Diffusion(BRUTAL), torch.zeros(20_000, 1))
    counts = torch.bincount(model.calls[0][1], minlength=7).numpy()
    assert counts[0] == 0 and counts[6:].sum() == 0, f"t outside 1..5: counts of 0..6 are {counts}"
    is_uniform("t", counts[1:6])
    without_T = [5000, 5000, 5000, 5000, 0]
    assert rejects(is_uniform, "t never T", without_T), f"counts {without_T} pass as uniform"


def test_algorithm1_t_is_independent_for_each_image():
    """The pairs of t of neighbours in a batch are uniform on {1..5}^2."""
    model = Recorder()
    ddpm.loss_simple(model, ddpm.Diffusion(BRUTAL), torch.zeros(40_000, 1))
    t = model.calls[0][1].reshape(-1, 2) - 1
    is_uniform("pairs of t", torch.bincount(t[:, 0] * 5 + t[:, 1], minlength=25).numpy())


def test_algorithm1_noise_is_standard_normal_and_independent_for_each_pixel():
    """With x0 = 0 the model gets sqrt(1 - alpha_bar_t) eps, where eps ~ N(0, I)."""
    d, model = ddpm.Diffusion(BRUTAL), Recorder()
    ddpm.loss_simple(model, d, torch.zeros(5000, 4), torch.full((5000,), 3))
    _, noise = ref.forward_moments(BRUTAL)
    eps = model.calls[0][0].numpy() / noise[3] ** 0.5
    has_normal_moments("eps", eps, 0, 1)
    has_mean("eps_i eps_j within an image", eps[:, 0] * eps[:, 1], 0)
    has_mean("eps_i eps_j across images", eps[::2, 0] * eps[1::2, 0], 0)


def test_eq14_of_the_model_0_is_1():
    """Without t and eps, the expected loss of the model 0 is E eps^2 = 1 for any image."""
    d, x0 = ddpm.Diffusion(BRUTAL), torch.ones(64, 4)
    losses = [ddpm.loss_simple(Recorder(), d, x0).item() for _ in range(100)]
    has_mean("L_simple of the model 0", losses, 1.0)


@pytest.mark.parametrize("weights, means, variances", [
    ([1.0], [0.5], [0.25]), ([0.3, 0.7], [-0.6, 0.5], [0.02, 0.1]),
], ids=["a Gaussian", "two Gaussians"])  # fmt: skip
def test_eq14_is_smallest_for_the_conditional_mean_of_the_noise(weights, means, variances):
    """The exact model of scalar data reaches E Var(eps | xt), averaged over t.

    Negative control: a model that is off by 0.3 does not.
    """
    N = 100_000
    data = np.array(weights), np.array(means), np.array(variances)
    component = torch.multinomial(f64(*weights), N, replacement=True)
    m, s2 = f64(means, variances)[:, component]
    x0 = m + s2.sqrt() * torch.randn_like(m)

    def losses(off):
        def model(xt, t):
            eps = torch.zeros_like(xt)
            for step in range(1, 6):
                here = t == step
                exact = exact_models.eps_mixture(BRUTAL, step, xt[here].numpy(), *data)
                eps[here] = torch.from_numpy(exact)
            return eps + off

        d = ddpm.Diffusion(BRUTAL)
        return [ddpm.loss_simple(model, d, batch).item() for batch in x0.reshape(100, 1000, 1)]

    least = np.mean([exact_models.loss_minimum_mixture(BRUTAL, t, *data) for t in range(1, 6)])
    has_mean("L_simple of the exact model", losses(0.0), least)
    wrong = losses(0.3)
    assert rejects(has_mean, "L_simple", wrong, least), (
        f"a model that is off by 0.3 passes with a mean loss of {np.mean(wrong):.4g} for {least:.4g}"
    )


def test_eq14_can_be_differentiated_with_respect_to_the_model():
    """d/da mean (eps - a xt)^2 = -2 mean xt (eps - a xt)."""
    d, a = ddpm.Diffusion(BRUTAL), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x0, eps, t = f64([0.5], [-0.5]), f64([1], [2]), torch.tensor([2, 4])
    ddpm.loss_simple(lambda xt, t: a * xt, d, x0, t, eps).backward()
    xt = d.q_sample(x0, t, eps)
    close("gradient", a.grad, (-2 * xt * (eps - 0.5 * xt)).mean(), 8 * EPS)

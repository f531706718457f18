"""Section 7 of ddpm.py: implicit sampling (DDIM eq. 12 and 16)."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from judge import (
    EPS,
    close,
    f64,
    generator,
    has_law,
    has_normal_moments,
    randomness,
    refused,
    rejects,
    same,
    tolerance,
)
from strategies import cases, every_short_case, unit
from test_6_ancestral import (
    BRUTAL,
    MEAN,
    MIXTURE,
    VAR,
    N,
    gaussian_model,
    image_model,
    mixture_model,
    normal,
)

import ddpm
import reference_numpy as ref

GRIDS = [[4], [1, 4], [2, 3, 4], [1, 2, 3, 4]]
ETAS = [0.0, 0.5, 1.0]
grids = pytest.mark.parametrize("grid", GRIDS, ids=str)
etas = pytest.mark.parametrize("eta", ETAS)


@st.composite
def grids_of(draw, T):
    """Increasing steps of 1..T, at least one."""
    return sorted(draw(st.sets(st.integers(1, T), min_size=1)))


@given(T=st.integers(1, 1000), data=st.data())
def test_ddim_grid_has_n_steps_from_above_0_to_T_as_even_as_integers_allow(T, data):
    """Increasing, inside 1..T, the last T; no two gaps, counted from 0, differ by more than 1."""
    n = data.draw(st.integers(1, T), label="n")
    grid = ddpm.ddim_grid(T, n)
    gaps = np.diff([0, *grid])
    assert len(grid) == n and grid[-1] == T and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("T, n", [(10, 0), (10, 11), (10, -1)])
def test_ddim_grid_refuses_a_number_of_steps_that_T_cannot_give(T, n):
    with refused(f"{n} steps of {T}"):
        ddpm.ddim_grid(T, n)


@given(case=cases(), data=st.data(), x0=unit)
def test_ddim_returns_the_only_image_there_is_on_any_grid_with_any_eta(case, data, x0):
    """Exact model of one image: x0 comes back; one step divides rounding by sqrt(alpha_bar_t)."""
    grid = data.draw(grids_of(case.T), label="grid")
    eta = data.draw(st.floats(0, 1), label="eta")
    x0, d = f64([x0]), ddpm.Diffusion(case.beta)
    got = ddpm.sample_ddim(image_model(case.beta, x0), d, normal(1, 1), grid, eta, clip=False,
                           generator=generator())  # fmt: skip
    signal, _ = ref.forward_moments(case.beta)
    close("x0", got, x0, tolerance(case) + 1e3 * EPS, 1 + 1 / signal[grid[0]])


@every_short_case
def test_ddim_eq12_with_eta_1_on_the_full_grid_is_algorithm2_with_sigma2_beta_tilde(case):
    """The same noise, the same samples: sigma of DDIM eq. 16 is sqrt(beta_tilde), its mean is eq. 7."""
    d, xT = ddpm.Diffusion(case.beta), normal(3, 1)

    def model(xt, t):
        return torch.tanh(xt)

    ancestral = ddpm.sample_ancestral(model, d, xT, d.beta_tilde, generator=generator())
    implicit = ddpm.sample_ddim(model, d, xT, range(1, case.T + 1), 1.0, generator=generator())
    close("x0", implicit, ancestral, 64 * tolerance(case), 1.0)


@given(case=cases(), data=st.data(), eta=st.floats(0, 1))
def test_ddim_eq12_first_step_has_the_mean_that_keeps_the_marginals(case, data, eta):
    """xt -> k_0 x0 + k_t xt + sigma z; the part without noise is half the sum over +z and -z."""
    s, t = sorted(data.draw(st.lists(st.integers(0, case.T), min_size=2, max_size=2, unique=True)))
    d, told = ddpm.Diffusion(case.beta), {}
    x0, xt = f64(0.6), f64(-0.9)
    eps = d.eps_from_x0(xt, t, x0)
    ddpm.sample_ddim(lambda x, t_: eps.expand_as(x), d, xt[None], [s, t] if s else [t], 0.0, clip=False,
                     on_step=told.__setitem__)  # fmt: skip
    k_0, k_t, _ = ref.ddim_step(case.beta, t, s, 0.0)
    close(
        "xs",
        told[s],
        k_0 * x0 + k_t * xt,
        4 * tolerance(case) + 1e2 * EPS,
        1 + 1 / d.alpha_bar[t] ** 0.5,
    )


@pytest.mark.parametrize("beta, grid", [
    ([0, 0.03, *[0.999] * 5], [1, 6]),
    (ref.exponential_beta(4000), [2000, 4000]),
], ids=["six steps", "4000 steps"])  # fmt: skip
def test_ddim_with_eta_1_survives_a_jump_whose_variance_rounds_to_all_there_is(beta, grid):
    """1 - alpha_bar_s - sigma^2 is a tiny positive number; rounded below 0, its root must be 0."""
    x0 = f64([0.3])
    got = ddpm.sample_ddim(
        image_model(np.array(beta), x0), ddpm.Diffusion(beta), normal(1, 1), grid, 1.0
    )
    close("x0", got, x0, 1e-9, 1.0)


@etas
@pytest.mark.parametrize("s, t", [(0, 1), (0, 3), (1, 2), (1, 4), (2, 3), (3, 4)])
def test_ddim_eq16_each_jump_is_gaussian_with_the_predicted_mean_and_variance(eta, s, t):
    """From xt = 0.7 in all N images: x_s ~ N(k_0 x0 + k_t xt, sigma^2), sigma^2 = eta^2 times the
    posterior variance of the jump."""
    d, told, xt, x0 = ddpm.Diffusion(BRUTAL), {}, f64(0.7).repeat(N, 1), f64(-0.4)
    eps = d.eps_from_x0(xt, t, x0.expand_as(xt))
    ddpm.sample_ddim(lambda x, _: eps, d, xt, [s, t] if s else [t], eta, clip=False,
                     generator=generator(t), on_step=told.__setitem__)  # fmt: skip
    k_0, k_t, sigma2 = ref.ddim_step(BRUTAL, t, s, eta)
    mean = k_0 * -0.4 + k_t * 0.7
    if sigma2 > 0:
        has_normal_moments(f"x_{s}", told[s], mean, sigma2)
    else:
        close(f"x_{s}", told[s], mean, 1e-12, 1.0)


@etas
@grids
def test_ddim_ends_in_the_distribution_that_the_recursion_of_moments_predicts(grid, eta):
    """Exact model of N(0.5, 0.25), started from N(0, 1): the output is Gaussian with known moments."""
    got = ddpm.sample_ddim(gaussian_model(BRUTAL), ddpm.Diffusion(BRUTAL), normal(N, 1), grid, eta,
                           clip=False, generator=generator())  # fmt: skip
    has_normal_moments("x0", got, *ref.ddim_moments(BRUTAL, grid, eta, MEAN, VAR))


@etas
@pytest.mark.parametrize("grid", [[1, 4], [1, 2, 3, 4]], ids=str)
def test_ddim_ends_in_the_law_that_is_predicted_for_a_mixture(grid, eta):
    """Exact model of two unequal Gaussians: the output has the predicted shares, places and widths."""
    got = ddpm.sample_ddim(mixture_model(BRUTAL), ddpm.Diffusion(BRUTAL), normal(N, 1), grid, eta,
                           clip=False, generator=generator())  # fmt: skip
    has_law("x0", got, *ref.mixture_law(BRUTAL, ref.ddim_steps(BRUTAL, grid, eta), *MIXTURE))


@pytest.mark.parametrize("fault, grid, eta", [
    ("eta is ignored", [1, 2, 3, 4], 1.0),
    ("the last jump is skipped", [1, 2, 3, 4], 0.0),
    ("every second step is left out", [1, 2, 3, 4], 0.5),
])  # fmt: skip
def test_ddim_statistics_reject_a_sampler_in_which(fault, grid, eta):
    """Negative control: the tests above would see each of these faults."""
    d, told = ddpm.Diffusion(BRUTAL), {}
    wrong_eta = 0.0 if fault.startswith("eta") else eta
    wrong_grid = [2, 4] if fault.startswith("every") else grid
    gaussian = has_normal_moments, *ref.ddim_moments(BRUTAL, grid, eta, MEAN, VAR)
    mixture = has_law, *ref.mixture_law(BRUTAL, ref.ddim_steps(BRUTAL, grid, eta), *MIXTURE)
    for model, (judged, *law) in (gaussian_model, gaussian), (mixture_model, mixture):
        ddpm.sample_ddim(model(BRUTAL), d, normal(N, 1), wrong_grid, wrong_eta, clip=False,
                         generator=generator(), on_step=told.__setitem__)  # fmt: skip
        assert rejects(judged, fault, told[1 if fault.startswith("the last") else 0], *law)


@grids
def test_ddim_asks_the_model_once_at_each_step_of_the_grid_and_ends_at_0(grid):
    """As many evaluations as the grid has steps, from the last to the first; then s = 0."""
    asked, told = [], []

    def model(xt, t):
        assert t.shape == (2,) and t.dtype == torch.int64
        asked.append(int(t[0]))
        return torch.zeros_like(xt)

    x0 = ddpm.sample_ddim(model, ddpm.Diffusion(BRUTAL), normal(2, 1), grid,
                          on_step=lambda s, xs: told.append((s, xs)))  # fmt: skip
    assert asked == list(grid)[::-1] and [s for s, _ in told] == [*grid[-2::-1], 0]
    same("x0", x0, told[-1][1])


@randomness
def test_ddim_with_eta_0_is_deterministic_and_that_is_the_default():
    """No generator state is used up, and the global seed does not matter."""
    d, g = ddpm.Diffusion(BRUTAL), generator()
    before = g.get_state()
    a = ddpm.sample_ddim(gaussian_model(BRUTAL), d, normal(4, 1), [2, 4], generator=g)
    b = ddpm.sample_ddim(gaussian_model(BRUTAL), d, normal(4, 1), [2, 4], eta=0.0)
    same("x0", a, b)
    assert torch.equal(g.get_state(), before), "the generator was used"


def test_ddim_clips_x0_and_takes_the_noise_that_the_clipped_x0_implies():
    """An implied x0 of 3 counts as 1, and eps is solved for again, so that xt = a x0 + b eps holds."""
    d, told, xt = ddpm.Diffusion(BRUTAL), {}, f64([0.9])
    eps = d.eps_from_x0(xt, 4, f64([3.0]))
    ddpm.sample_ddim(lambda x, t: eps, d, xt, [2, 4], on_step=told.__setitem__)
    k_0, k_t, _ = ref.ddim_step(BRUTAL, 4, 2, 0.0)
    close("x_2", told[2], k_0 * 1.0 + k_t * xt, 1e-12)
    free = ddpm.sample_ddim(lambda x, t: 9 * x, d, normal(64, 1), [2, 4], clip=False)
    clipped = ddpm.sample_ddim(lambda x, t: 9 * x, d, normal(64, 1), [2, 4])
    assert clipped.abs().max() <= 1 + 1e-12 and free.abs().max() > 2


@pytest.mark.parametrize("grid", [[0, 4], [2, 2], [3, 1], [-1, 4]], ids=str)
def test_ddim_refuses_a_grid_that_does_not_increase_from_1(grid):
    with refused(f"the grid {grid}"):
        ddpm.sample_ddim(gaussian_model(BRUTAL), ddpm.Diffusion(BRUTAL), normal(1, 1), grid)

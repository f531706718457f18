"""Section 1 of ddpm.py: the noise schedules (sec. 4; iDDPM eq. 17)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge import EPS, close, has_reals

import ddpm
import reference_numpy as ref

steps = st.integers(1, 1000)
ends = st.tuples(st.floats(1e-6, 0.5), st.floats(1e-6, 0.5))
SCHEDULES = ["linear_schedule", "cosine_schedule", "exponential_schedule"]
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


@given(T=steps, ends=ends)
def test_sec4_linear_schedule_goes_from_beta_1_to_beta_T_in_equal_steps(T, ends):
    """beta_t = beta_1 + (t - 1) (beta_T - beta_1) / (T - 1), in exact fractions."""
    close("beta", ddpm.linear_schedule(T, *ends), ref.linear_beta(T, *ends), 4 * EPS, max(ends))


def test_sec4_linear_schedule_is_the_papers_by_default():
    """T = 1000, beta_1 = 1e-4 and beta_T = 0.02 to the last digit; alpha_bar_T = 4.0358297654e-5."""
    beta = ddpm.linear_schedule()
    assert len(beta) == 1001
    close("beta_1, beta_1000", beta[[1, 1000]], [1e-4, 0.02], EPS / 2)
    close("alpha_bar_T", ddpm.Diffusion(beta).alpha_bar[1000], 4.0358297654e-5, 1e-10)


def cosine_scale(T, s):
    """What rounding an angle does to 1 - cos^2(angle_t) / cos^2(angle_{t-1}): about its tangent."""
    angle = np.pi / 2 * (np.arange(-1, T) / T + s) / (1 + s)
    return 1 + 4 * np.tan(angle.clip(0))


@given(T=steps, s=st.floats(0, 0.1))
def test_iddpm_eq17_cosine_schedule_makes_alpha_bar_a_squared_cosine(T, s):
    """alpha_bar_t / alpha_bar_{t-1} = cos^2(angle_t) / cos^2(angle_{t-1}), but for the cap on beta."""
    close("beta", ddpm.cosine_schedule(T, s), ref.cosine_beta(T, s), 8 * EPS, cosine_scale(T, s))


def test_iddpm_eq17_cosine_schedule_has_the_papers_constants():
    """s = 0.008 and beta_t <= 0.999: alpha_bar_1 = 0.99995871562 and beta_1000 = 0.999."""
    beta = ddpm.cosine_schedule(1000)
    close("beta", beta, ref.cosine_beta(1000, 0.008, 0.999), 8 * EPS, cosine_scale(1000, 0.008))
    close("beta_1000", beta[-1], 0.999, EPS / 2)


@given(T=steps, ends=ends)
def test_exponential_schedule_goes_from_beta_1_to_beta_T_by_a_constant_factor(T, ends):
    """beta_t = beta_1 (beta_T / beta_1)^((t - 1) / (T - 1)); a power carries its logarithm's error."""
    slack = 4 + 4 * abs(np.log(ends[1] / ends[0]))
    close("beta", ddpm.exponential_schedule(T, *ends), ref.exponential_beta(T, *ends), slack * EPS)


def test_exponential_schedule_ends_as_noisy_as_the_linear_one():
    """alpha_bar_1000 = 3.2e-5 by default, where the linear schedule has 4.0e-5."""
    d = ddpm.Diffusion(ddpm.exponential_schedule())
    ratio = d.alpha_bar[-1] / ddpm.Diffusion(ddpm.linear_schedule()).alpha_bar[-1]
    close("alpha_bar_T, exponential / linear", ratio, 0.795, 0.001, 1.0)
    close("alpha_bar_T", d.alpha_bar[-1], 3.2078e-5, 1e-4)
    close("beta", d.beta, ref.exponential_beta(1000, 1e-4, 0.066), 32 * EPS)


@every_schedule
def test_schedules_have_the_papers_1000_steps_by_default(name):
    """T = 1000 where nothing else is asked for."""
    assert len(getattr(ddpm, name)()) == 1001


@every_schedule
@pytest.mark.parametrize("T", [2, 3, 20, 1000])
def test_schedules_are_tables_of_T_plus_1_betas_with_beta_0_zero_and_the_others_inside_0_1(name, T):
    """beta is beta[0..T] in float64; beta[0] = 0 and 0 < beta_t < 1, so that the diffusion is finite."""
    beta = getattr(ddpm, name)(T)
    has_reals("beta", beta)
    assert beta.shape == (T + 1,)
    assert beta[0] == 0 and (beta[1:] > 0).all() and (beta[1:] < 1).all()
    d = ddpm.Diffusion(beta)
    assert all(table[1:].isfinite().all() for table in (d.alpha, d.alpha_bar, d.beta_tilde))

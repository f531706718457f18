"""Section 1 of ddpm.py: the noise schedules (sec. 4; iDDPM eq. 17)."""

import numpy as np
import pytest
from calls import ddpm
from checks import EPS, close, has_reals
from hypothesis import given
from hypothesis import strategies as st

import reference_numpy as ref

steps = st.integers(1, 1000)
ends = st.tuples(st.floats(1e-6, 0.5), st.floats(1e-6, 0.5))
SCHEDULES = ["linear_schedule", "cosine_schedule", "exponential_schedule"]
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


@given(T=steps, ends=ends)
def test_sec4_linear_schedule_goes_from_beta_1_to_beta_T_in_equal_steps(T, ends):
    """beta_t = beta_1 + (t - 1) (beta_T - beta_1) / (T - 1)."""
    close("beta", ddpm.linear_schedule(T, *ends), ref.linear_beta(T, *ends), 4 * EPS, max(ends))


def test_sec4_linear_schedule_is_the_papers_by_default():
    """T = 1000, beta_1 = 1e-4 and beta_T = 0.02, so alpha_bar_T = 4.0358297654e-5."""
    beta = ddpm.linear_schedule()
    close("beta_1, beta_1000", beta[[1, 1000]], [1e-4, 0.02], EPS / 2)
    close("alpha_bar_T", ddpm.Diffusion(beta).alpha_bar[1000], 4.0358297654e-5, 1e-10)


def cosine_scale(T, s):
    """Return how much the rounding of an angle is amplified in 1 - cos^2(angle_t) / cos^2(angle_{t-1})."""
    angle = np.pi / 2 * (np.arange(-1, T) / T + s) / (1 + s)
    return 1 + 4 * np.tan(angle.clip(0))


@given(T=steps, s=st.floats(0, 0.1))
def test_iddpm_eq17_cosine_schedule_makes_alpha_bar_a_squared_cosine(T, s):
    """alpha_bar_t / alpha_bar_{t-1} = cos^2(angle_t) / cos^2(angle_{t-1}), where beta is below its cap."""
    close("beta", ddpm.cosine_schedule(T, s), ref.cosine_beta(T, s), 8 * EPS, cosine_scale(T, s))


def test_iddpm_eq17_cosine_schedule_has_the_papers_constants():
    """s = 0.008 and beta_t <= 0.999: alpha_bar_1 = 0.99995871562 and beta_1000 = 0.999."""
    beta = ddpm.cosine_schedule(1000)
    close("beta", beta, ref.cosine_beta(1000, 0.008, 0.999), 8 * EPS, cosine_scale(1000, 0.008))
    close("beta_1000", beta[-1], 0.999, EPS / 2)


@pytest.mark.parametrize("beta_max", [0.5, 0.999, 0.9999])
@pytest.mark.parametrize("T", [3, 20, 1000])
def test_iddpm_eq17_cosine_schedule_caps_each_beta_at_beta_max_and_changes_no_other(T, beta_max):
    """beta_t = min(1 - alpha_bar_t / alpha_bar_{t-1}, beta_max). At t = T the first is 1."""
    beta = ddpm.cosine_schedule(T, beta_max=beta_max)
    free = ref.cosine_beta(T, 0.008, 1.0)
    capped = free >= beta_max
    close("capped beta", beta[capped], beta_max, EPS / 2)
    close("other beta", beta[~capped], free[~capped], 8 * EPS, cosine_scale(T, 0.008)[~capped])


@given(T=steps, ends=ends)
def test_exponential_schedule_goes_from_beta_1_to_beta_T_by_a_constant_factor(T, ends):
    """beta_t = beta_1 (beta_T / beta_1)^((t - 1) / (T - 1)). A power amplifies the error of its logarithm."""
    slack = 4 + 4 * abs(np.log(ends[1] / ends[0]))
    close("beta", ddpm.exponential_schedule(T, *ends), ref.exponential_beta(T, *ends), slack * EPS)


def test_exponential_schedule_ends_with_about_as_much_noise_as_the_linear_one():
    """By default alpha_bar_1000 is 3.2e-5, and 4.0e-5 for the linear schedule."""
    d = ddpm.Diffusion(ddpm.exponential_schedule())
    ratio = d.alpha_bar[-1] / ddpm.Diffusion(ddpm.linear_schedule()).alpha_bar[-1]
    close("alpha_bar_T, exponential / linear", ratio, 0.795, 0.001, 1.0)
    close("alpha_bar_T", d.alpha_bar[-1], 3.2078e-5, 1e-4)
    close("beta", d.beta, ref.exponential_beta(1000, 1e-4, 0.066), 32 * EPS)


@every_schedule
def test_schedules_have_the_papers_1000_timesteps_by_default(name):
    """The table is beta[0..1000]."""
    length = len(getattr(ddpm, name)())
    assert length == 1001, f"{length} entries"


@every_schedule
@pytest.mark.parametrize("T", [2, 3, 20, 1000])
def test_schedules_are_tables_of_T_plus_1_betas_with_beta_0_zero_and_the_others_inside_0_1(name, T):
    """The table is float64, beta[0] = 0 and 0 < beta_t < 1, so the diffusion's tables are finite."""
    beta = getattr(ddpm, name)(T)
    has_reals("beta", beta)
    assert beta.shape == (T + 1,), f"shape {tuple(beta.shape)}"
    assert beta[0] == 0, f"beta_0 is {beta[0]}"
    low, high = beta[1:].min(), beta[1:].max()
    assert 0 < low and high < 1, f"beta_t goes from {low} to {high}"
    d = ddpm.Diffusion(beta)
    for table in (d.alpha, d.alpha_bar, d.beta_tilde):
        bad = (~table[1:].isfinite()).sum()
        assert bad == 0, f"{bad} of {T} values are not finite"

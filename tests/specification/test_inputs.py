"""Images of any shape, memory layout and precision, for every public function.

The calls are those of test_contract.py. Each property compares a call with the same call on plain tensors.
"""

import checks
import numpy as np
import pytest
import torch
from calls import ddpm, improved, noise
from checks import EPS32, close, f64, in_float64
from strategies import PaperCase
from test_6_ancestral import BRUTAL
from test_contract import (
    CALLS,
    CALLS_AND_NETWORKS,
    NETWORKS,
    arguments,
    call,
    inputs,
    needs,
    randomised,
    tensors,
)

import reference_numpy as ref

IMAGES = {"x0", "xt", "eps", "v"}
with_images = [name for name in CALLS_AND_NETWORKS if IMAGES & {*needs(name)}]
every_function = pytest.mark.parametrize("name", with_images)
every_formula = pytest.mark.parametrize("name", [name for name in with_images if name in CALLS])

# --- Memory layout -------------------------------------------------------------------------------


def in_every_second_place(x):
    """Return x as a view of every second column of a larger tensor."""
    larger = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    larger[..., ::2] = x
    return larger[..., ::2]


def expanded(x):
    """Return the first image of x for every image, without copies."""
    return x[:1].expand_as(x)


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second column": in_every_second_place,
    "expanded": expanded,
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@every_layout
@every_function
def test_values_do_not_depend_on_the_memory_layout_of_images(name, layout):
    """channels_last, transposed, strided and expanded tensors give what contiguous ones give.

    A network may use another order of sums there. Formulas give the same bits.
    """
    results = []
    for contiguous in (False, True):
        given = arguments(name)
        for key in IMAGES & {*given}:
            x = LAYOUTS[layout](given[key])
            given[key] = x.contiguous() if contiguous else x
        results.append(tensors(call(name, given)))
    for got, want in zip(*results, strict=True):
        if name in NETWORKS:
            close("result", got, want, 1e-11, 1 + want.abs().max())
        else:
            close("result", got, want, 4 * checks.EPS, 1 + want.abs().nan_to_num())


# --- Shape ---------------------------------------------------------------------------------------

SHAPES = [
    (3, 2, 4, 6), (3, 2, 6, 4), (3, 2, 2, 3, 4), (3, 2, 5), (3, 2), (1, 2, 4, 6), (2, 1, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_formula
def test_images_may_have_any_number_of_dimensions(name, shape):
    """Every pixel is treated alike: images (B, C, N) give the same values in another shape."""
    results = []
    for flat in (False, True):
        given = arguments(name, shape=shape)
        if flat:
            for key in IMAGES & {*given}:
                given[key] = given[key].reshape(*shape[:2], -1)
        results.append(tensors(call(name, given)))
    for got, want in zip(*results, strict=True):
        if want.shape[:2] == shape[:2] and want.ndim == 3 and want.numel() == np.prod(shape):
            want = want.reshape(shape)
        assert got.shape == want.shape, f"got shape {tuple(got.shape)}, want {tuple(want.shape)}"
        close("result", got, want, 16 * checks.EPS, 1 + want.abs().nan_to_num())


WITHOUT_NOISE = [name for name in with_images if name in CALLS and "noise" not in needs(name)]


# Factors of xt and eps for each image. Where they are small, the predicted x0 is inside [-1, 1].
FACTORS = [(1.0, 1.0, 1.0), (0.01, 1.0, 1.0), (1.0, 0.01, 0.01)]


@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("shape", [(3, 2, 4, 6), (3, 3, 3, 4)], ids=str)
@pytest.mark.parametrize("name", WITHOUT_NOISE)
def test_each_image_is_treated_as_if_it_were_alone(name, shape, factors):
    """Image i of a batch gets the values of a batch of one, at its own t. A loss is the mean of these.

    There may be as many channels as images, and clipping may be needed by some images only.
    """

    def scaled():
        given = arguments(name, shape=shape)
        for key in {"xt", "eps"} & {*given}:
            given[key] = given[key] * f64(*factors).reshape(3, *[1] * (len(shape) - 1))
        return given

    together = tensors(call(name, scaled()))
    alone = []
    for i in range(shape[0]):
        given = scaled()
        for key in ({"t", "y"} | IMAGES) & {*given}:
            given[key] = given[key][i : i + 1]
        alone.append(tensors(call(name, given)))
    for got, *parts in zip(together, *alone, strict=True):
        if got.ndim:
            want = torch.cat(parts)
        else:
            want = torch.stack(parts).mean()
        close("result", got, want, 16 * checks.EPS, 1 + want.abs().nan_to_num())


WITH_NOISE = [name for name in with_images if name in CALLS and "noise" in needs(name)]


@pytest.mark.parametrize("name", WITH_NOISE)
def test_each_image_has_its_own_noise(name):
    """Image i of a batch, with its part of the noise, gets the values of a batch of one."""
    drawn = []
    random = noise(3)

    def recorded(x):
        drawn.append(random(x))
        return drawn[-1]

    given = arguments(name)
    given["noise"] = recorded
    together = tensors(call(name, given))
    if any(len(z) != 3 for z in drawn):
        pytest.skip("absent: a call of noise for each t")  # the bound may handle all t at once
    alone = []
    for i in range(3):
        left = [z[i : i + 1] for z in drawn]
        given = arguments(name)
        for key in IMAGES & {*given}:
            given[key] = given[key][i : i + 1]
        given["noise"] = lambda x, left=left: left.pop(0)
        alone.append(tensors(call(name, given)))
    batch = 1 if "bound_terms" in name else 0
    for got, *parts in zip(together, *alone, strict=True):
        want = torch.cat(parts, dim=batch)
        close("result", got, want, 16 * checks.EPS, 1 + want.abs().nan_to_num())


def test_attention_does_not_overflow():
    """Logits of 1e8 give a softmax of 0 and 1, because the largest one is subtracted first."""
    attention = randomised(ddpm.Attention(2, 1))
    with torch.no_grad():
        for p in attention.parameters():
            p.mul_(1e4)
    h = attention(inputs()["xt"])
    bad = (~h.isfinite()).sum().item()
    assert bad == 0, f"{bad} of {h.numel()} values are not finite"


@pytest.mark.parametrize("t", [2, 3, 4])
@pytest.mark.parametrize("factor", [0.5, 2.0, 4.0])
def test_noise_is_scaled_by_the_given_sigma_whatever_the_schedule(t, factor):
    """sigma2 may be below beta_tilde and above beta."""
    d = ddpm.Diffusion(BRUTAL)
    zero = f64([0.0, 0.0], [0.0, 0.0])
    z, got = (
        ddpm.ancestral_step(d, zero, t, zero, sigma2, noise=noise(3))
        for sigma2 in (1 + 0 * d.beta, factor * d.beta)
    )
    close("x_{t-1}", got, (factor * BRUTAL[t]) ** 0.5 * z, 8 * checks.EPS)


# --- Precision -----------------------------------------------------------------------------------

# Every function of this section is linear in two tensors a and b. With a = (1, 0) and b = (0, 1) it returns
# its two coefficients. The reference gives the coefficients, and the sum of the terms that each consists of.


def steady(state):
    """Return a model whose prediction is always the same tensor."""
    return lambda xt, t: state.to(xt)


def first_state(sampler, model, d, xt, *arguments, **options):
    """Return the state after the first step of a sampler."""
    states = []
    sampler(model, d, xt, *arguments, on_step=lambda s, xs: states.append(xs), **options)
    return states[0]


def prefix(t):
    """Return the paper's diffusion without the timesteps after t, so that t is its T."""
    return ddpm.Diffusion(PaperCase(1).beta[: t + 1])


def xt_of_loss(d, x0, t, eps):
    """Return the xt that L_simple gives to its model."""
    seen = []

    def model(xt, t):
        seen.append(xt)
        return xt

    ddpm.loss_simple(model, d, x0, torch.full((len(x0),), t), eps)
    return seen[0]


def terms(t, s=None):
    """Return the coefficients of eq. 4, eq. 7 and DDIM eq. 12 on the paper's schedule."""
    beta = PaperCase(1).beta
    signal, noise_var = ref.forward_moments(beta)
    a = signal[t]
    n = noise_var[t] ** 0.5
    if s is None:
        k_0, k_t, _ = ref.posterior(beta, t)
        return a, n, k_0, k_t
    k_t = noise_var[s] ** 0.5 / n  # upwards too, where there is no posterior
    k_0 = signal[s] - k_t * a
    if s < t:
        k_0, k_t, _ = ref.ddim_step(beta, t, s, 0.0)
    return a, n, k_0, k_t, signal[s], noise_var[s] ** 0.5


def eq4(t):
    a, n, _, _ = terms(t)
    return [a, n], [a, n]


def eq7(t):
    _, _, c_0, c_t = terms(t)
    return [c_0, c_t], [c_0, c_t]


def eq15(t):
    a, n, _, _ = terms(t)
    return [1 / a, -n / a], [1 / a, n / a]


def eps_of_eq4(t):
    a, n, _, _ = terms(t)
    return [1 / n, -a / n], [1 / n, a / n]


def eq11(t):
    a, n, c_0, c_t = terms(t)
    return [c_0 / a + c_t, -c_0 * n / a], [c_0 / a + c_t, c_0 * n / a]


def ddim(t, s):
    """x_s = k_0 x0 + k_t xt at the predicted x0; formed as signal_s x0 + noise_s eps."""
    if s == t:
        return [1, 0], [1, 2 * terms(t)[1]]
    a, n, k_0, k_t, signal_s, noise_s = terms(t, s)
    return [k_0 / a + k_t, -k_0 * n / a], [signal_s / a, signal_s * n / a + noise_s]


LINEAR = {
    "q_sample": (lambda d, t, a, b: d.q_sample(a, t, b), eq4),
    "loss_simple, its xt": (lambda d, t, a, b: xt_of_loss(d, a, t, b), eq4),
    "posterior_mean": (lambda d, t, a, b: d.posterior_mean(a, b, t), eq7),
    "x0_from_eps": (lambda d, t, a, b: d.x0_from_eps(a, t, b), eq15),
    "eps_from_x0": (lambda d, t, a, b: d.eps_from_x0(a, t, b), eps_of_eq4),
    "p_mean": (lambda d, t, a, b: d.p_mean(a, t, b, clip=False), eq11),
    "ancestral_step": (lambda d, t, a, b: ddpm.ancestral_step(d, a, t, b, 0 * d.beta, clip=False), eq11),
    "sample_ancestral": (lambda d, t, a, b: first_state(
        ddpm.sample_ancestral, steady(b), prefix(t), a, 0 * d.beta[: t + 1], clip=False), eq11),
    "sample_ancestral, start": (lambda d, t, a, b: first_state(
        ddpm.sample_ancestral, steady(b), d, a, 0 * d.beta, clip=False, start=t), eq11),
    "ddim_step to 0": (lambda d, t, a, b: ddpm.ddim_step(d, a, t, 0, b, clip=False),
                       lambda t: ddim(t, 0)),
    "ddim_step to t - 1": (lambda d, t, a, b: ddpm.ddim_step(d, a, t, t - 1, b, clip=False),
                           lambda t: ddim(t, t - 1)),
    "ddim_step to t + 500": (
        lambda d, t, a, b: ddpm.ddim_step(d, a, t, min(1000, t + 500), b, clip=False),
        lambda t: ddim(t, min(1000, t + 500))),
    "sample_ddim to 0": (lambda d, t, a, b: ddpm.sample_ddim(steady(b), d, a, [t], clip=False),
                         lambda t: ddim(t, 0)),
    "sample_ddim to t / 2": (
        lambda d, t, a, b: first_state(ddpm.sample_ddim, steady(b), d, a,
                                       [t // 2, t] if t > 1 else [t], clip=False),
        lambda t: ddim(t, t // 2)),
    "improved.ancestral_step at t = 1": (lambda d, t, a, b: improved.ancestral_step(
        d, a, t, b, torch.zeros_like(a), clip=False) if t == 1 else d.p_mean(a, t, b, clip=False), eq11),
}  # fmt: skip


@in_float64
@pytest.mark.parametrize("t", [1, 2, 10, 1000])
@pytest.mark.parametrize("name", LINEAR)
def test_float32_images_get_coefficients_that_are_computed_in_float64(name, t):
    """Each coefficient is a few float32 roundings from the reference, at t = 1 and T of the paper's schedule.

    1 - alpha_bar from a float32 table has a relative error of 1.7e-4 at t = 1.
    """
    function, reference = LINEAR[name]
    a, b = torch.eye(2)
    got = function(ddpm.Diffusion(PaperCase(1).beta), t, a, b)
    want, scale = reference(t)
    assert got.dtype == torch.float32, f"got {got.dtype}"
    close("coefficients", got, want, 4 * EPS32, np.array(scale))


@in_float64
@pytest.mark.parametrize("t", [2, 10, 1000])
@pytest.mark.parametrize("name", ["ancestral_step", "sample_ancestral", "ddim_step", "sample_ddim"])
def test_float32_noise_is_scaled_by_a_sigma_that_is_computed_in_float64(name, t):
    """sigma_t is within a few float32 roundings of sqrt(beta_tilde_t). z is the noise of sigma = 1."""
    d = prefix(t)
    zero = torch.zeros(4)
    var = ref.posterior(PaperCase(1).beta, t)[2]
    if name.startswith("ancestral"):
        got = ddpm.ancestral_step(d, zero, t, zero, d.beta_tilde, noise=noise(3))
        z = ddpm.ancestral_step(d, zero, t, zero, 1 + 0 * d.beta, noise=noise(3))
    elif name == "sample_ancestral":
        got, z = (
            first_state(ddpm.sample_ancestral, steady(zero), d, zero, sigma2, noise=noise(3))
            for sigma2 in (d.beta_tilde, 1 + 0 * d.beta)
        )
    else:
        z = noise(3)(zero)
        given = noise(3).__call__  # a plain function, because z itself is compared
        steps = [t - 1, t]
        if name == "ddim_step":
            got = ddpm.ddim_step(d, zero, t, t - 1, zero, eta=1.0, noise=given)
        else:
            got = first_state(ddpm.sample_ddim, steady(zero), d, zero, steps, eta=1.0, noise=given)
    ratio = (got / z).double()
    close("spread of sigma over the pixels", ratio / ratio[0], 1.0, 4 * EPS32)
    close("sigma_t", ratio, var**0.5, 4 * EPS32)

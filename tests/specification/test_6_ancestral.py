"""Ancestral sampling (Algorithm 2, sec. 3.2).

No network is trained: for Gaussian data and for a single image the exact model is known.
"""

import exact_models
import far
import numpy as np
import pytest
import torch
from calls import ddpm, likelihood, noise
from checks import (
    EPS,
    close,
    edge,
    f64,
    generator,
    has_law,
    has_normal_moments,
    rejected,
    rejects,
    same,
    seed,
    tolerance,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cases, every_short_case

import reference_numpy as ref

BRUTAL = np.array([0, 0.1, 0.3, 0.8, 0.2])  # short and steep, so that each step is visible
FAINT = np.array([0, 0.2, *[0.9] * 30])  # alpha_bar_T is about 1e-30
N, MEAN, VAR = 20_000, 0.5, 0.25  # samples of scalar data x0 ~ N(MEAN, VAR)
MIXTURE = (
    np.array([0.3, 0.7]),
    np.array([-0.6, 0.5]),
    np.array([0.02, 0.1]),
)  # weights, means, variances


# A run has up to 50 timesteps, so a third of the usual number of runs is enough.
fewer = settings(max_examples=max(1, settings().max_examples // 3))


def at_each_step(eps):
    """A model (xt, t) for images at any timesteps, from eps(t, xt) in NumPy."""

    def model(xt, t):
        out = torch.empty_like(xt)
        for step in set(t.tolist()):
            some = t == step
            out[some] = torch.from_numpy(np.asarray(eps(step, xt[some].numpy()))).to(xt.dtype)
        return out

    return model


def gaussian_model(beta, m=MEAN, s2=VAR):
    """E[eps | xt] for x0 ~ N(m, s2)."""
    return at_each_step(lambda t, x: exact_models.eps_gaussian(beta, t, x, m, s2))


def mixture_model(beta):
    """E[eps | xt] for x0 from the two components of MIXTURE."""
    return at_each_step(lambda t, x: exact_models.eps_mixture(beta, t, x, *MIXTURE))


def image_model(beta, x0):
    """E[eps | xt] if x0 is the only image, or the only one at its place of the batch."""
    signal, variance = ref.forward_moments(beta)
    return at_each_step(lambda t, x: (x - signal[t] * x0.numpy()) / variance[t] ** 0.5)


def zero_model(xt, t):
    return torch.zeros_like(xt)


def normal(*shape, seed=0):
    """Standard normal numbers that no call of noise() returns; seed is in 0..99."""
    return torch.randn(*shape, dtype=torch.float64, generator=generator(900 + seed))


def variances(d):
    return {"beta": d.beta, "beta_tilde": d.beta_tilde}


every_variance = pytest.mark.parametrize("name", ["beta", "beta_tilde"])


# --- One step -------------------------------------------------------------------------------------


@every_variance
@given(case=cases(), x0=st.floats(-1, 1), xt=st.floats(-3, 3))
def test_ancestral_step_is_the_posterior_mean_at_the_predicted_x0_plus_noise(name, case, x0, xt):
    """x_{t-1} = k_0 x0 + k_t xt + sigma_t z for t > 1, and without z at t = 1."""
    d, t = ddpm.Diffusion(case.beta), case.t
    x0, xt = f64([x0], [0.3]), f64([xt], [-0.8])
    got = ddpm.ancestral_step(
        d, xt, t, d.eps_from_x0(xt, t, x0), variances(d)[name], clip=False, noise=noise(2)
    )
    k_0, k_t, beta_tilde = ref.posterior(case.beta, t)
    sigma2 = {"beta": case.beta[t], "beta_tilde": beta_tilde}[name] if t > 1 else 0.0
    want = k_0 * x0 + k_t * xt + sigma2**0.5 * noise(2)(xt)
    # eps_from_x0 and its inverse divide rounding errors by sqrt(alpha_bar_t); k_0 multiplies them.
    signal, _ = ref.forward_moments(case.beta)
    close("x_{t-1}", got, want, 8 * (tolerance(case) + 1e2 * EPS), 8 * (1 + k_0 / signal[t]))


@pytest.mark.parametrize("shape", [(1, 1), (3, 2, 4, 6), (2, 3, 5), (2, 1, 2, 3, 2)], ids=str)
def test_ancestral_step_treats_every_image_and_pixel_alike(shape):
    """Images of any shape, each value with its own noise."""
    d, xt, eps = ddpm.Diffusion(BRUTAL), normal(*shape), normal(*shape, seed=1)
    for t in (4, 2, 1):
        got = ddpm.ancestral_step(d, xt, t, eps, clip=False, noise=noise(2))
        want = d.p_mean(xt, t, eps, clip=False)
        if t > 1:
            want = want + BRUTAL[t] ** 0.5 * noise(2)(xt)
        close("x_{t-1}", got, want, 1e-12, 1 + want.abs())


def test_ancestral_step_clips_x0_and_takes_sigma2_beta_by_default():
    """The predicted x0 of 3 counts as 1; sigma^2 is beta."""
    d, xt = ddpm.Diffusion(BRUTAL), normal(5, 2)
    for t in (4, 3, 2, 1):
        eps = d.eps_from_x0(xt, t, torch.full_like(xt, 3.0))
        clipped = d.eps_from_x0(xt, t, torch.full_like(xt, 1.0))
        got = ddpm.ancestral_step(d, xt, t, eps, noise=noise(2))
        want = ddpm.ancestral_step(d, xt, t, clipped, d.beta, clip=False, noise=noise(2))
        close("x_{t-1}", got, want, 1e-12, 10.0)


@edge
def test_ancestral_step_asks_for_no_noise_at_t_1():
    """`noise` is not called, so the step uses up no random numbers there."""
    d, calls = ddpm.Diffusion(BRUTAL), []

    def counted(x):
        calls.append(tuple(x.shape))
        return torch.ones_like(x)

    for t in (4, 3, 2, 1):
        ddpm.ancestral_step(d, normal(2, 3), t, normal(2, 3), noise=counted)
    assert calls == [(2, 3)] * 3, f"noise was called with the shapes {calls}"


NOISES = {
    "zeros": torch.zeros_like,
    "3 everywhere": lambda x: 3 + 0 * x,
    "of mean 1 and variance 4": lambda x: 1 + 2 * noise(2)(x),
}


@pytest.mark.parametrize("what", NOISES)
def test_steps_use_the_noise_as_it_is(what):
    """Whatever its mean and variance: no step normalises it. x0 is eq. 7's or DDIM's mean without noise."""
    d, xt, eps = ddpm.Diffusion(BRUTAL), normal(3, 2), normal(3, 2, seed=1)
    z = NOISES[what](xt)
    got = ddpm.ancestral_step(d, xt, 3, eps, clip=False, noise=NOISES[what])
    want = d.p_mean(xt, 3, eps, clip=False) + BRUTAL[3] ** 0.5 * z
    close("ancestral step", got, want, 1e-12, 10.0)
    k_0, k_t, sigma2 = ref.ddim_step(BRUTAL, 4, 2, 0.6)
    want = k_0 * d.x0_from_eps(xt, 4, eps) + k_t * xt + sigma2**0.5 * z
    got = ddpm.ddim_step(d, xt, 4, 2, eps, eta=0.6, clip=False, noise=NOISES[what])
    close("DDIM step", got, want, 1e-12, 10.0)


@every_variance
@pytest.mark.parametrize("clip", [True, False])
def test_algorithm2_is_ancestral_steps_from_T_to_1(name, clip):
    """The same noise and the same model give the same states."""
    d, xt, states = ddpm.Diffusion(BRUTAL), normal(3, 2), []
    sigma2, noise_of_steps = variances(d)[name], noise(2)

    def model(xt, t):
        return torch.tanh(xt) / t[:, None]

    ddpm.sample_ancestral(
        model, d, xt, sigma2, clip=clip, noise=noise(2), on_step=lambda s, xs: states.append(xs)
    )
    for i, t in enumerate((4, 3, 2, 1)):
        eps = model(xt, torch.full((3,), t))
        xt = ddpm.ancestral_step(d, xt, t, eps, sigma2, clip=clip, noise=noise_of_steps)
        close(f"x_{t - 1}", states[i], xt, 1e-13, 1 + xt.abs())


def test_ancestral_steps_are_precise_when_alpha_bar_is_1e_minus_30():
    """Far out, the predicted x0 is clipped to -1 or 1, and the step is that of the reference."""
    d, xt, eps = ddpm.Diffusion(FAINT), normal(4, 3), normal(4, 3, seed=1)
    for t in (31, 30, 20):
        predicted = (d.x0_from_eps(xt, t, eps)).clamp(-1, 1)
        k_0, k_t, _ = ref.posterior(FAINT, t)
        want = k_0 * predicted + k_t * xt + FAINT[t] ** 0.5 * noise(2)(xt)
        got = ddpm.ancestral_step(d, xt, t, eps, noise=noise(2))
        close(f"x_{t - 1}", got, want, 1e-12, 1 + want.abs())
        got = ddpm.ancestral_step(
            d, xt.float(), t, eps.float(), noise=lambda x: noise(2)(xt).float()
        )
        close(f"x_{t - 1} in float32", got, want, 1e-5, 1 + want.abs())


# --- The loop -------------------------------------------------------------------------------------


@fewer
@every_short_case
def test_algorithm2_returns_the_only_image_of_the_data(case):
    """Exact model of one image: x0 comes back whatever xT and the noise, for both variances."""
    d, x0 = ddpm.Diffusion(case.beta), f64([0.3], [-1.0])
    signal, _ = ref.forward_moments(case.beta)
    for sigma2 in variances(d).values():
        model = image_model(case.beta, x0)
        got = ddpm.sample_ancestral(model, d, normal(2, 1), sigma2, clip=False, noise=noise())
        close("x0", got, x0, tolerance(case) + 1e3 * EPS, 1 + 1 / signal[1])


@pytest.mark.parametrize(
    "beta", [ref.linear_beta(1000), FAINT], ids=["the paper's", "alpha_bar 1e-30"]
)
def test_algorithm2_returns_the_only_image_of_the_data_on_long_schedules(beta):
    """The default variance and clipping; float64."""
    x0 = f64([0.3, 1.0, -1.0])
    got = ddpm.sample_ancestral(image_model(beta, x0), ddpm.Diffusion(beta), normal(1, 3))
    close("x0", got, x0, 1e-12, 1.0)


def test_algorithm2_visits_T_down_to_1_and_reports_T_minus_1_down_to_0():
    """The model is called once at each t = T .. 1, for all images; on_step gets s = t - 1 and x_s."""
    called, reported = [], []

    def model(xt, t):
        assert t.shape == (2,) and t.dtype == torch.int64, f"t is {t.dtype} {tuple(t.shape)}"
        called.append(t.tolist())
        return torch.zeros_like(xt)

    x0 = ddpm.sample_ancestral(
        model, ddpm.Diffusion(BRUTAL), normal(2, 1), on_step=lambda s, xs: reported.append((s, xs))
    )
    assert called == [[4, 4], [3, 3], [2, 2], [1, 1]], f"the model was called at t = {called}"
    assert [s for s, _ in reported] == [3, 2, 1, 0], f"on_step got s = {[s for s, _ in reported]}"
    same("x0", x0, reported[-1][1])


def test_algorithm2_gives_the_model_the_last_steps_result():
    """The model's xt at t is on_step's state at s = t; the first one is xT."""
    given_to_model, reported, xT = [], [], normal(2, 3)
    ddpm.sample_ancestral(
        lambda xt, t: given_to_model.append(xt) or 0.1 * xt,
        ddpm.Diffusion(BRUTAL),
        xT,
        on_step=lambda s, xs: reported.append(xs),
    )
    same("xt of the model", torch.stack(given_to_model), torch.stack([xT, *reported[:-1]]))


@pytest.mark.parametrize("start", [4, 3, 1, 0])
def test_algorithm2_can_start_at_any_t(start):
    """start = t takes only the steps from t to 1; start = 0 returns the images; start = T is the default."""
    d, x, called, reported = ddpm.Diffusion(BRUTAL), normal(3, 2), [], []

    def model(xt, t):
        called.append(int(t[0]))
        return torch.tanh(xt)

    got = ddpm.sample_ancestral(
        model, d, x, start=start, noise=noise(2), on_step=lambda s, xs: reported.append(s)
    )
    assert called == list(range(start, 0, -1)), f"the model was called at t = {called}"
    assert reported == list(range(start))[::-1], f"on_step got s = {reported}"
    few = ddpm.Diffusion(BRUTAL[: start + 1]) if start else None
    want = ddpm.sample_ancestral(model, few, x, noise=noise(2)) if start else x
    same("x0", got, want)


@pytest.mark.parametrize("start", [5, -1])
def test_algorithm2_rejects_a_start_outside_0_and_T(start):
    with rejected(f"start = {start} for T = 4"):
        ddpm.sample_ancestral(zero_model, ddpm.Diffusion(BRUTAL), normal(1, 1), start=start)


@pytest.mark.parametrize("sampler", ["ancestral_step", "sample_ancestral"])
def test_variances_that_are_negative_or_nan_are_rejected(sampler):
    """Also at a single t. nan at t = 0, as in beta_tilde, is not read."""
    d, x = ddpm.Diffusion(BRUTAL), normal(2, 1)

    def sample(sigma2):
        if sampler == "ancestral_step":
            return ddpm.ancestral_step(d, x, 2, x, sigma2, noise=noise())
        return ddpm.sample_ancestral(zero_model, d, x, sigma2, noise=noise())

    for bad in (-0.1, float("nan")):
        with rejected(f"sigma2 of {bad} at t = 2"):
            sample(f64(0, 0.1, bad, 0.3, 0.2))
    assert sample(f64(float("nan"), 0.1, 0.0, 0.3, 0.2)).isfinite().all()


# --- Statistics -----------------------------------------------------------------------------------


@every_variance
def test_algorithm2_takes_each_step_from_p_with_mean_of_eq11_and_variance_sigma2(name):
    """From xt = 0.7 in all N images: x_{t-1} ~ N(mu_theta, sigma_t^2) at t = T, for T = 2, 3, 4."""
    for T in (2, 3, 4):
        d, steps = ddpm.Diffusion(BRUTAL[: T + 1]), []
        ddpm.sample_ancestral(
            lambda xt, t: torch.full_like(xt, 0.4),
            d,
            f64(0.7).repeat(N, 1),
            variances(d)[name],
            clip=False,
            noise=noise(T),
            on_step=lambda s, xs, steps=steps: steps.append(xs),
        )
        mean = d.p_mean(f64(0.7), T, f64(0.4), clip=False).item()
        has_normal_moments(f"x_{T - 1}", steps[0], mean, variances(d)[name][T].item())


@every_variance
def test_algorithm2_ends_in_the_distribution_that_the_recursion_of_moments_predicts(name):
    """Exact model of N(0.5, 0.25), started from N(0, 1): the output is Gaussian with known moments."""
    d = ddpm.Diffusion(BRUTAL)
    sigma2 = variances(d)[name]
    mean, var = exact_models.ancestral_moments(BRUTAL, sigma2.numpy(), MEAN, VAR)
    model = gaussian_model(BRUTAL)
    got = ddpm.sample_ancestral(model, d, normal(N, 1), sigma2, clip=False, noise=noise())
    has_normal_moments("x0", got, mean, var)


@every_variance
def test_algorithm2_ends_in_the_law_that_is_predicted_for_a_mixture(name):
    """Exact model of two unequal Gaussians: the output has their shares, places and widths."""
    d = ddpm.Diffusion(BRUTAL)
    sigma2 = variances(d)[name]
    steps = exact_models.ancestral_steps(BRUTAL, sigma2.numpy())
    model = mixture_model(BRUTAL)
    got = ddpm.sample_ancestral(model, d, normal(N, 1), sigma2, clip=False, noise=noise())
    has_law("x0", got, *exact_models.mixture_law(BRUTAL, steps, *MIXTURE))


def wrong_sampler(fault, sigma2, d, model):
    """Algorithm 2 with one fault, for the negative controls."""
    xt = normal(N, 1)
    for t in range(d.T, 0, -1):
        if fault == "the last step is skipped" and t == 1:
            break
        seen = t + 1 if fault == "the model is given t + 1" and t < d.T else t
        mean = d.p_mean(xt, t, model(xt, torch.full((N,), seen)), clip=False)
        index = t - 1 if fault == "sigma is read at t - 1" else t
        scale = sigma2[index].nan_to_num()
        scale = scale if fault == "sigma^2 replaces sigma" else scale.sqrt()
        has_noise = t > 1 or fault == "noise is added at t = 1"
        xt = mean + scale * normal(N, 1, seed=t) * has_noise
    return xt


@pytest.mark.parametrize("fault", [
    "sigma is read at t - 1", "sigma^2 replaces sigma", "noise is added at t = 1",
    "the last step is skipped", "the model is given t + 1",
])  # fmt: skip
def test_algorithm2_statistics_reject_a_sampler_in_which(fault):
    """Negative control: the tests above detect each of these faults."""
    d = ddpm.Diffusion(BRUTAL)
    model = gaussian_model(BRUTAL)
    moments = exact_models.ancestral_moments(BRUTAL, BRUTAL, MEAN, VAR)
    assert not rejects(has_normal_moments, "x0", wrong_sampler(None, d.beta, d, model), *moments)
    assert rejects(has_normal_moments, fault, wrong_sampler(fault, d.beta, d, model), *moments)
    model = mixture_model(BRUTAL)
    steps = exact_models.ancestral_steps(BRUTAL, BRUTAL)
    law = exact_models.mixture_law(BRUTAL, steps, *MIXTURE)
    assert not rejects(has_law, "x0", wrong_sampler(None, d.beta, d, model), *law)
    assert rejects(has_law, fault, wrong_sampler(fault, d.beta, d, model), *law)


def test_sec32_sigma2_beta_is_exact_for_standard_normal_data():
    """x0 ~ N(0, 1): sigma^2 = beta keeps N(0, 1) at every noisy step; the noiseless last step leaves
    a variance of 1 - beta_1."""
    d, states = ddpm.Diffusion(BRUTAL), {}
    model = gaussian_model(BRUTAL, 0, 1)
    ddpm.sample_ancestral(
        model, d, normal(N, 1), d.beta, clip=False, noise=noise(), on_step=states.__setitem__
    )
    for s in (3, 2, 1):
        has_normal_moments(f"x_{s}", states[s], 0, 1)
    has_normal_moments("x_0", states[0], 0, 1 - BRUTAL[1])


# --- Options, edges and models --------------------------------------------------------------------


def test_algorithm2_uses_sigma2_beta_by_default():
    """The same noise, with sigma2 = beta and without: the same samples. With beta_tilde: others."""
    d, model = ddpm.Diffusion(BRUTAL), gaussian_model(BRUTAL)
    samples = []
    for sigma2 in (None, d.beta, d.beta_tilde):
        samples.append(ddpm.sample_ancestral(model, d, normal(8, 1), sigma2, noise=noise()))
    same("x0 by default", samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2]), "beta_tilde gives the same samples"


@edge
def test_algorithm2_adds_no_noise_at_t1():
    """T = 1: x0 is a function of x1, whatever the noise."""
    d, samples = ddpm.Diffusion([0, 0.5]), []
    for number in (1, 2):
        samples.append(
            ddpm.sample_ancestral(lambda xt, t: 0.1 * xt, d, normal(4, 1), noise=noise(number))
        )
    same("x0 with other noise", *samples)


def test_sampling_clips_x0_by_default():
    """With a useless model, samples are inside [-1, 1] by default, and outside with clip=False."""
    d, x = ddpm.Diffusion(BRUTAL), normal(64, 1)

    def model(xt, t):
        return 9 * xt

    clipped = ddpm.sample_ancestral(model, d, x, noise=noise())
    free = ddpm.sample_ancestral(model, d, x, clip=False, noise=noise())
    assert clipped.abs().max() <= 1 + 1e-12, f"clipped: largest value {clipped.abs().max():g}"
    assert free.abs().max() > 2, f"clip=False: largest value {free.abs().max():g}"


SAMPLERS = {
    "ancestral": lambda model, d, xt, **how: ddpm.sample_ancestral(model, d, xt, **how),
    "DDIM": lambda model, d, xt, **how: ddpm.sample_ddim(model, d, xt, [1, 2, 4], eta=0.5, **how),
    "bound": lambda model, d, xt, **how: likelihood.bound_terms(
        model, d, xt.sign(), [d.beta], **how
    ),
}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


@every_sampler
def test_an_image_depends_on_its_own_noise_only(sampler):
    """Five images together are the five alone, if each has the same noise as alone."""
    d, xT, z = ddpm.Diffusion(BRUTAL), normal(5, 2, 3), normal(8, 5, 2, 3, seed=1)

    def model(xt, t):
        return torch.tanh(xt) / t.reshape(-1, 1, 1)

    def sample(part):
        steps = iter(z)

        def noise(x):
            if len(x) != len(xT[part]):
                pytest.skip(
                    "absent: a call of noise for each t"
                )  # the bound may handle all t at once
            return next(steps)[part]

        out = SAMPLERS[sampler](model, d, xT[part], noise=noise)
        return out[0] if sampler == "bound" else out

    together = sample(slice(0, 5))
    for i in range(5):
        close(f"image {i}", together[i], sample(slice(i, i + 1))[0], 1e-13, 10.0)
    assert len({tuple(image.flatten().tolist()) for image in together}) == 5, "images are equal"


def test_loss_samplers_and_bound_are_the_same_on_another_device():
    """Bit for bit the CPU's. xt and t are on the images' device when the model receives them. Apart from the
    bound, nothing is read back, because a GPU would have to wait for that."""
    d, x = ddpm.Diffusion(BRUTAL), (torch.arange(6).reshape(2, 3) / 2.5 - 1).clamp(-1, 1)

    def model(xt, t):
        assert xt.device == t.device, f"xt on {xt.device}, t on {t.device}"
        return xt / t[:, None]

    def results(x):
        seed()
        return dict(
            loss=ddpm.loss_simple(model, d, x),
            x0_algorithm_2=ddpm.sample_ancestral(model, d, x),
            x0_given_noise=ddpm.sample_ancestral(model, d, x, noise=noise()),
            x0_ddim=ddpm.sample_ddim(model, d, x, [1, 2, 4], eta=1.0),
            step=ddpm.ancestral_step(d, x, 3, 0.5 * x),
            step_ddim=ddpm.ddim_step(d, x, 4, 2, 0.5 * x, eta=0.5),
        )

    far.agrees(results, x)
    bound = likelihood.bound_terms(model, d, x, [d.beta], noise=noise())
    with far.device(), torch.device("far"):
        got = likelihood.bound_terms(model, d, x.to("far"), [d.beta], noise=noise())
        same("bound", got, bound)


@pytest.mark.parametrize("sampler", ["ancestral", "DDIM"])
def test_sampling_builds_no_graph(sampler):
    """No gradient can flow through a chain of steps, so none is stored."""
    w = torch.ones((), requires_grad=True)
    x0 = SAMPLERS[sampler](lambda xt, t: w * xt, ddpm.Diffusion(BRUTAL), torch.ones(2, 1))
    assert not x0.requires_grad
    assert x0.dtype == torch.float32

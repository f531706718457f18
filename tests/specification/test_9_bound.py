"""The bound on the likelihood, in bits/dim (eq. 5, eq. 13).

No network is trained: for a single image, and for scalars with a few values, the exact model is known.
"""

import checks
import exact_models
import numpy as np
import pytest
import torch
from calls import ddpm, likelihood, noise
from checks import (
    EPS,
    EPS32,
    close,
    eps,
    f64,
    has_mean,
    in_float64,
    rejected,
    rejects,
    same,
    tolerance,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases, every_short_case, pixels
from test_6_ancestral import BRUTAL, FAINT, at_each_step, fewer, image_model, normal

import reference_numpy as ref
from reference_numpy import pixel_value as level

means = st.floats(-1.5, 1.5)
variances = st.floats(1e-9, 10)
LN2 = np.log(2)


# --- The KL divergence ----------------------------------------------------------------------------


@given(m1=means, v1=variances, m2=means, v2=variances)
def test_kl_of_two_gaussians_is_cross_entropy_minus_entropy(m1, v1, m2, v2):
    """E_1[log p_1 - log p_2] in nats; the error is relative to the terms that cancel."""
    scale = 1 + abs(np.log(v1)) + abs(np.log(v2)) + (v1 + (m1 - m2) ** 2) / v2
    got = likelihood.normal_kl(*f64(m1, v1, m2, v2))
    close("KL", got, ref.gaussian_kl(m1, v1, m2, v2), 8 * EPS, scale)


@given(m1=means, v1=variances, m2=means, v2=variances)
def test_kl_is_not_negative_and_zero_for_equal_distributions(m1, v1, m2, v2):
    """KL(p || q) >= 0, KL(p || p) = 0."""
    kl = likelihood.normal_kl(*f64(m1, v1, m2, v2))
    assert kl >= -8 * EPS, f"KL = {kl:.3g}"
    kl = likelihood.normal_kl(*f64(m1, v1, m1, v1))
    close("KL(p || p)", kl, 0, 8 * EPS, 1 + abs(np.log(v1)))


# --- The decoder ----------------------------------------------------------------------------------


def decoder_scale(log_p, var):
    """The size of the decoder's rounding errors, in units of the machine epsilon.

    A bin is the difference of two values of log Phi, each rounded: relative to its width in units of
    log Phi the error is eps |log Phi| / width, and the width is at least 1 / (255 sigma) / 10. Its ends
    carry an error of eps (|x0| + |mean|) < 3 eps, or 3 eps / sigma in units in which the slope of log Phi
    is at most 1 + |z|, and z^2 / 2 at most |log p|.
    """
    return (1 + abs(log_p)) * (1 + 2550 * var**0.5) + (1 + abs(2 * log_p) ** 0.5) * 3 / var**0.5


@given(k=st.integers(0, 255), mean=means, var=variances)
def test_eq13_decoder_is_the_mass_of_the_levels_bin(k, mean, var):
    """log of the mass from x0 - 1/255 to x0 + 1/255, to infinity for levels 0 and 255; in both tails."""
    want = ref.decoder_log_prob(k, mean, var)
    got = likelihood.discretized_log_likelihood(f64(level(k)), f64(mean), f64(var))
    close("log p(x0 | x1)", got, [want], 32 * EPS, decoder_scale(want, var))


@pytest.mark.parametrize("var", [5e-7, 1e-6, 5.4532e-5, 0.01])
@pytest.mark.parametrize("miss", [0.0, 0.3, -0.9, 5.0], ids=lambda miss: f"{miss} levels off")
def test_eq13_decoder_in_float32_is_the_mass_of_the_levels_bin(miss, var):
    """All 256 levels; 5.4532e-5 is beta_tilde_2 of the paper's schedule."""
    k = np.arange(256)
    x0, mean = torch.from_numpy(level(k)).float(), torch.from_numpy(level(k + miss)).float()
    got = likelihood.discretized_log_likelihood(x0, mean, torch.full_like(mean, var))
    want = ref.decoder_log_prob(k, mean.double().numpy(), np.float64(np.float32(var)))
    close("log p(x0 | x1)", got, want, 32 * EPS32, decoder_scale(want, var))


@given(mean=means, var=variances)
def test_eq13_decoder_probabilities_of_the_256_levels_sum_to_1(mean, var):
    """The bins cover the line without gaps and without overlaps."""
    x0 = torch.from_numpy(level(range(256)))
    log_p = likelihood.discretized_log_likelihood(x0, f64(mean).expand(256), f64(var).expand(256))
    # Each bin's ends are rounded by 3 EPS, or 3 EPS / sigma standard deviations.
    close("sum of p", log_p.exp().sum(), 1, 256 * 1e3 * EPS + 32 * EPS / var**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("miss", [0.05, 0.5, 2.0])
def test_eq13_decoder_has_a_gradient_when_it_is_far_off(miss, dtype):
    """A miss of up to 200 sigma costs miss^2 / (2 sigma^2) nats and its gradient is miss / sigma^2,
    to some per cent: no floor at 1e-12, whose gradient is zero."""
    mean = torch.tensor([1 / 255 - miss], dtype=dtype, requires_grad=True)
    x0, var = torch.tensor([1 / 255], dtype=dtype), torch.tensor([1e-4], dtype=dtype)
    log_p = likelihood.discretized_log_likelihood(x0, mean, var)
    log_p.backward()
    near = miss - 1 / 255  # the bin's near edge, where its mass lies
    low, high = -0.6 * (near + 0.01) ** 2 / 1e-4 - 5, -0.4 * near**2 / 1e-4
    assert low < log_p < high, f"log p = {log_p.item():g}, want {low:g} to {high:g}"
    close("gradient", mean.grad, [near / 1e-4], 0.1, near / 1e-4 + 100)


@pytest.mark.parametrize("k", [0, 255])
@pytest.mark.parametrize("off", [0.0, 0.005, -0.005], ids=lambda off: f"{off} levels off")
def test_eq13_end_levels_extend_to_infinity(k, off):
    """A mean far beyond the end of the range makes level 0 or 255 certain, also if the pixel is on its
    level only up to rounding."""
    beyond = f64(-3.0 if k == 0 else 3.0)
    log_p = likelihood.discretized_log_likelihood(f64(level(k + off)), beyond, f64(0.01))
    assert log_p.abs() < 1e-80, f"log p = {log_p.item():g}"  # the tail beyond 20 sigma


@pytest.mark.parametrize("k, end", [(1, -3.0), (254, 3.0)])
def test_eq13_the_levels_next_to_the_ends_have_bins_of_ordinary_width(k, end):
    """Levels 1 and 254 are within a level of the ends, but their bins do not extend to infinity."""
    for var in (0.01, 1.0, 10.0):
        want = ref.decoder_log_prob(k, end, var)
        got = likelihood.discretized_log_likelihood(f64(level(k)), f64(end), f64(var))
        close("log p", got, [want], 1e-9)


# --- One term of the bound ------------------------------------------------------------------------


@given(case=cases(), ratio=st.floats(0.1, 10), k=st.integers(0, 255), xt=st.floats(-3, 3))
def test_eq5_a_term_is_the_kl_of_the_posterior_and_the_models_step_in_bits(case, ratio, k, xt):
    """L_{t-1} for any mean and variance; at t = 1 it is the decoder's -log2 p(x0 | x1). beta is 1e-6 to
    0.999."""
    t = case.t
    c_0, c_t, var = ref.posterior(case.beta, t)
    sigma2 = (var if t > 1 else ref.decoder_variance(case.beta)) * ratio
    k, xt = np.array([k, 200]), np.array([xt, 0.4])
    mean = c_0 * level(k) + c_t * xt + np.array([0.5, -1.5]) * sigma2**0.5
    want = ref.bound_term(case.beta, t, k, xt, mean, sigma2)
    d, x0 = ddpm.Diffusion(case.beta), torch.from_numpy(level(k))[None]
    got = likelihood.bound_term(
        d,
        x0,
        torch.from_numpy(xt)[None],
        t,
        torch.from_numpy(mean)[None],
        torch.full_like(x0, sigma2),
    )
    if t == 1:
        close("L_0", got, [want.mean() / LN2], 64 * EPS, decoder_scale(abs(want), sigma2).mean())
    else:
        # Both means are good to `tolerance` of their terms; their gap is at most 1.5 sigma.
        size = 1 + abs(np.log(var)) + abs(np.log(sigma2)) + 1 / ratio + 1
        gap = 1.5 * (2 + abs(xt)).max() / sigma2**0.5
        close(f"L_{t - 1}", got, [want.mean() / LN2], 8 * tolerance(case) + 8 * EPS, size + gap)


@pytest.mark.parametrize("form", ["one per pixel", "one per image", "a number"])
def test_eq5_terms_of_a_batch_are_those_of_each_image_at_its_own_t(form):
    """t = 1 among others, images that are not square, and variances of every shape that broadcasts."""
    d, t = ddpm.Diffusion(BRUTAL), torch.tensor([3, 1, 4, 1, 2])
    k = np.random.default_rng(5).integers(0, 256, (5, 2, 3, 1))
    x0, xt, mean = torch.from_numpy(level(k)), normal(5, 2, 3, 1), 0.5 * normal(5, 2, 3, 1, seed=1)
    shape = {
        "one per pixel": (5, 2, 3, 1),
        "one per image": (5, 1, 1, 1),
        "a number": (1, 1, 1, 1),
    }[form]
    sigma2 = 0.1 + normal(*shape, seed=2) ** 2
    got = likelihood.bound_term(d, x0, xt, t, mean, sigma2)
    for i in range(5):
        variance = sigma2.expand(x0.shape)[i].numpy()
        want = ref.bound_term(BRUTAL, int(t[i]), k[i], xt[i].numpy(), mean[i].numpy(), variance)
        close(f"term of image {i}", got[i], want.mean() / LN2, 1e-11, 1 + abs(want).max())


@in_float64
@pytest.mark.parametrize("t", [1, 2, 3, 10, 1000])
def test_eq5_terms_in_float32_are_those_of_the_reference(t):
    """The paper's schedule. Its tables are float64, so only the images and means are rounded."""
    beta = ref.linear_beta(1000)
    k = np.array([[0, 9], [100, 128], [255, 254]])
    x0, eps = torch.from_numpy(level(k)).float(), normal(3, 2).float()
    d = ddpm.Diffusion(beta)
    xt = d.q_sample(x0, t, eps)
    c_0, c_t, var = ref.posterior(beta, t)
    sigma = (var if t > 1 else ref.decoder_variance(beta)) ** 0.5
    mean = (c_0 * x0.double() + c_t * xt.double() + 0.5 * sigma).float()
    got = likelihood.bound_term(d, x0, xt, t, mean, torch.full_like(x0, beta[t]))
    assert got.dtype == torch.float32
    sigma2 = np.float64(np.float32(beta[t]))
    want = ref.bound_term(beta, t, k, xt.double().numpy(), mean.double().numpy(), sigma2)
    # A mean is rounded by 4 EPS32 (|x0| + |xt|). This is multiplied by the gap over the variance.
    close(f"L_{t - 1}", got, want.mean(1) / LN2, 64 * EPS32, 4 + abs(want).mean(1) + 5 / sigma)


# --- The terms of the bound -----------------------------------------------------------------------


def recorded(model):
    """Return a model for the bound with the same outputs, and a dict in which it keeps the xt of each t.

    An implementation may call the model at one t at a time or at many, in any order, and again for other
    variances, but with the same xt.
    """
    seen = {}

    def recording(xt, t):
        for step in set(t.tolist()):
            now = xt[t == step]
            same(f"x_{step} of the second call", now, seen.get(step, now))
            seen[step] = now
        return model(xt, t)

    return recording, seen


def terms_of(case_or_beta, k, model, tables=("beta", "beta_tilde"), pixels=(1,), **how):
    """bound_terms of the levels k, each an image of equal pixels, and the model's xt at each t."""
    d = ddpm.Diffusion(getattr(case_or_beta, "beta", case_or_beta))
    recording, seen = recorded(model)
    x0 = torch.from_numpy(level(k)).reshape(-1, *[1] * len(pixels)).repeat(1, *pixels)
    how = {"noise": noise(3), **how}
    terms = likelihood.bound_terms(recording, d, x0, [getattr(d, name) for name in tables], **how)
    return terms, seen, d


def exact_terms(beta, levels=(51, 204)):
    """The terms of images of one pixel, each for the exact model of it alone."""
    alone = []
    for k in levels:
        model = image_model(beta, f64(level(k)))
        alone.append(terms_of(beta, [k], model, clip=False)[0])
    return torch.cat(alone, dim=1), ddpm.Diffusion(beta)


@fewer
@every_short_case
def test_eq5_with_exact_eps_sigma2_beta_tilde_makes_the_kl_terms_vanish(case):
    """One image: mu_theta = mu_tilde, so L_1 .. L_{T-1} = 0; only decoder and prior remain."""
    terms, d = exact_terms(case.beta)
    # mu_theta - mu_tilde is rounding, magnified by 1 / sqrt(alpha_bar_t), against a variance of
    # beta_tilde_t >= beta_2 beta_1 / 2 or so
    signal, _ = ref.forward_moments(case.beta)
    slack = (1e3 * eps() / signal[1:-1] + tolerance(case, eps())) ** 2 / d.beta_tilde[2:].numpy()
    close("L_1 .. L_{T-1}", terms[1, :, 1:-1], 0, 1.0, 8 * eps() + slack)


@fewer
@every_short_case
def test_eq5_with_exact_eps_sigma2_beta_costs_the_kl_of_the_two_variances(case):
    """One image: L_{t-1} = KL(N(0, beta_tilde_t) || N(0, beta_t)), in bits, whatever the image."""
    terms, _ = exact_terms(case.beta)
    signal, _ = ref.forward_moments(case.beta)
    for t in range(2, case.T + 1):
        var = ref.posterior(case.beta, t)[2]
        want = ref.gaussian_kl(0, var, 0, case.beta[t]) / LN2
        slack = 8 * EPS * (1 + abs(np.log(var)) + abs(np.log(case.beta[t]))) + tolerance(case)
        slack += (1e3 * EPS / signal[t] + tolerance(case)) ** 2 / case.beta[t]
        close(f"L_{t - 1}", terms[0, :, t - 1], want, slack, 1.0)


def test_eq5_constants_of_the_papers_schedule():
    """T = 1000, exact eps: the KL terms sum to 0 (beta_tilde) and 0.4864 bits/dim (beta);
    L_T = 2.91e-5 bits/dim at |x0| = 1."""
    terms, _ = exact_terms(ref.linear_beta(1000), (255,))
    close("sum of L_1 .. L_999, beta", terms[0, :, 1:1000].sum(1), 0.4864, 0.5e-4, 1.0)
    close("sum of L_1 .. L_999, beta_tilde", terms[1, :, 1:1000].sum(1), 0, 1e-9, 1.0)
    close("L_T", terms[:, :, 1000], 2.91e-5, 0.005e-5, 1.0)


@fewer
@every_short_case
def test_eq5_prior_term_is_the_kl_from_the_last_step_to_the_standard_normal(case):
    """L_T = KL(q(x_T | x0) || N(0, 1)), in bits, for each image."""
    k = np.array([0, 100, 255])
    terms, _, _ = terms_of(case, k, lambda xt, t: torch.zeros_like(xt))
    _, variance = ref.forward_moments(case.beta)
    want = np.stack([ref.prior_term(case.beta, k) / LN2] * 2)
    close("L_T", terms[:, :, -1], want, tolerance(case) + 8 * EPS, 1 + abs(np.log(variance[-1])))


@fewer
@every_short_case
def test_eq5_each_kl_term_compares_the_posterior_with_the_models_step_at_the_same_xt(case):
    """L_{t-1} = KL(N(mu_tilde, beta_tilde_t) || N(mu_theta, sigma_t^2)) at the model's xt."""
    k = np.array([30, 220])
    terms, seen, d = terms_of(case, k, lambda xt, t: 0.5 * xt, clip=False)
    for t in range(2, case.T + 1):
        _, _, var = ref.posterior(case.beta, t)
        xt = seen[t][:, 0].numpy()
        mean = d.p_mean(f64(*xt), t, f64(*(0.5 * xt)), clip=False).numpy()
        for row, sigma2 in enumerate((case.beta[t], var)):
            want = ref.bound_term(case.beta, t, k, xt, mean, sigma2) / LN2
            # both means are good to `tolerance` of their terms, |x0| <= 1 and |xt|, and so is their gap
            gap = 1 + abs(xt) + abs(mean)
            scale = 1 + abs(np.log(var)) + abs(np.log(sigma2)) + (var + gap**2) / sigma2
            close(f"L_{t - 1}", terms[row, :, t - 1], want, 8 * tolerance(case), scale)


@fewer
@every_short_case
def test_eq5_each_xt_is_a_sample_of_q_for_its_own_image(case):
    """xt - sqrt(alpha_bar_t) x0 is sqrt(1 - alpha_bar_t) times noise of ordinary size, at every t."""
    k = np.array([0, 255])
    _, seen, _ = terms_of(case, k, lambda xt, t: 0.0 * xt)
    signal, variance = ref.forward_moments(case.beta)
    assert sorted(seen) == list(range(1, case.T + 1)), f"the model was called at {sorted(seen)}"
    for t, xt in seen.items():
        z = (xt[:, 0].numpy() - signal[t] * level(k)) / variance[t] ** 0.5
        assert (abs(z) < 8).all() and z[0] != z[1], f"t = {t}: noise {z}"


@pytest.mark.parametrize("table", ["beta", "beta_tilde"])
@pytest.mark.parametrize("beta", [BRUTAL, np.array([0, 0.2, 0.5]), np.array([0, 1e-6, 2e-6]),
                                  np.array([0, 0.3])], ids=["T = 4", "T = 2", "beta 1e-6", "T = 1"])  # fmt: skip
def test_eq13_decoder_variance_is_beta_tilde_2_for_both_choices_of_sigma(beta, table):
    """L_0 = -log2 of the mass of N(mu_theta, beta_tilde_2) on x0's bin. beta_tilde_1 is 0, and the paper's
    results do not use beta_1. With T = 1 there is only beta_1."""
    k = np.array([0, 77, 255])
    terms, seen, d = terms_of(beta, k, lambda xt, t: 0.5 * xt, [table])
    mean = d.p_mean(seen[1], 1, 0.5 * seen[1])[:, 0].numpy()
    want = -ref.decoder_log_prob(k, mean, ref.decoder_variance(beta)) / LN2
    close("L_0", terms[0, :, 0], want, 1e-9, 1 + abs(want))


@fewer
@given(k=pixels())
def test_eq5_terms_are_bits_per_dimension_of_each_image(k):
    """A mean over the six pixels of an image, and never over images; columns L_0 .. L_T, a row per table,
    at the same xt."""
    terms, seen, d = terms_of(BRUTAL, k, lambda xt, t: 0.5 * xt, pixels=(2, 3), clip=False)
    assert terms.shape == (2, len(k), 5), f"shape {tuple(terms.shape)}, want {(2, len(k), 5)}"
    assert terms.dtype == torch.float64
    same("L_0, the same decoder at the same x1", terms[0, :, 0], terms[1, :, 0])
    same("L_T, which has no variance to choose", terms[0, :, -1], terms[1, :, -1])
    for t in (2, 3, 4):
        mean = d.p_mean(seen[t], t, 0.5 * seen[t], clip=False).numpy()
        levels = np.array(k)[:, None, None]
        want = (
            ref.bound_term(BRUTAL, t, levels, seen[t].numpy(), mean, BRUTAL[t]).mean((1, 2)) / LN2
        )
        close(f"L_{t - 1}", terms[0, :, t - 1], want, 1e-9, 1 + want)


@pytest.mark.parametrize("k", [255, 0, 130])
def test_bound_clips_x0_as_the_sampler_does(k):
    """A model with a predicted x0 of 3 counts, by default, as one of 1; in every term, L_0 included."""
    d, far_off = ddpm.Diffusion(BRUTAL), 3.0

    def model(xt, t):
        return d.eps_from_x0(xt, t, far_off * torch.ones_like(xt))

    terms, seen, _ = terms_of(BRUTAL, [k] * 4, model)
    free, _, _ = terms_of(BRUTAL, [k] * 4, model, clip=False)
    for x0, got in ((1.0, terms), (far_off, free)):
        for row, sigma2 in enumerate((BRUTAL, d.beta_tilde.numpy())):
            for t in (1, 2, 3, 4):
                c_0, c_t, _ = ref.posterior(BRUTAL, t)
                xt = seen[t][:, 0].numpy()
                variance = ref.decoder_variance(BRUTAL) if t == 1 else sigma2[t]
                want = ref.bound_term(BRUTAL, t, k, xt, c_0 * x0 + c_t * xt, variance) / LN2
                close(
                    f"L_{t - 1}, predicted x0 = {x0}", got[row, :, t - 1], want, 1e-9, 1 + abs(want)
                )
    assert (free[:, :, 1] - terms[:, :, 1]).abs().min() > 0.05, "clipping does not matter here"


def test_eq5_terms_are_finite_and_exact_when_alpha_bar_is_1e_minus_30():
    """The predicted x0 is clipped to -1 or 1 far out, and L_T is 0."""
    k = np.array([3, 250])
    terms, seen, d = terms_of(FAINT, k, lambda xt, t: 0.5 * xt)
    for t in (31, 30, 15, 2):
        mean = d.p_mean(seen[t], t, 0.5 * seen[t])[:, 0].numpy()
        want = ref.bound_term(FAINT, t, k, seen[t][:, 0].numpy(), mean, FAINT[t]) / LN2
        close(f"L_{t - 1}", terms[0, :, t - 1], want, 1e-11, 1 + want)
    close("L_T", terms[:, :, -1], 0, 1e-15, 1.0)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("pixel", [1 + 2 / 255, -1 - 2 / 255, 255.0, 0.0, level(77.33), np.nan,
                                   np.inf, -np.inf])  # fmt: skip
def test_bound_rejects_a_batch_with_one_pixel_that_is_not_on_the_256_levels(pixel, place):
    """One pixel of one image is enough: outside [-1, 1], between two levels, or not a number."""
    d, x0 = (
        ddpm.Diffusion(BRUTAL),
        torch.from_numpy(level(np.array([[0, 9], [100, 128], [255, 30]]))),
    )
    assert likelihood.bound_terms(lambda xt, t: xt, d, x0, [d.beta]).isfinite().all()
    x0[place, 1] = pixel
    with rejected(f"a pixel of {pixel} in image {place}"):
        likelihood.bound_terms(lambda xt, t: xt, d, x0, [d.beta])


def test_bound_rejects_one_wrong_pixel_among_thousands():
    """The check is for each pixel, and not for their mean."""
    d = ddpm.Diffusion(BRUTAL)
    x0 = torch.full((2, 3, 32, 32), level(100))
    x0[1, 2, 30, 31] = level(100.4)
    with rejected("a pixel between two levels"):
        likelihood.bound_terms(lambda xt, t: xt, d, x0, [d.beta])


def test_bound_rejects_images_from_0_to_1_and_accepts_all_256_levels():
    """Images in [0, 1], k / 255, are inside [-1, 1] and would give plausible, wrong bits. Levels that are
    rounded to float32 are accepted."""
    d = ddpm.Diffusion(BRUTAL)
    with rejected("images in [0, 1]"):
        likelihood.bound_terms(lambda xt, t: xt, d, torch.arange(256.0)[:, None] / 255, [d.beta])
    levels = torch.arange(256, dtype=torch.uint8)[:, None].float() / 127.5 - 1
    assert likelihood.bound_terms(lambda xt, t: xt, d, levels, [d.beta]).isfinite().all()


@pytest.mark.parametrize("bad", [-0.1, np.nan])
def test_bound_rejects_a_variance_that_is_negative_or_nan(bad):
    """One entry of one of two tables is enough."""
    d, x0 = ddpm.Diffusion(BRUTAL), f64([1.0], [-1.0])
    with rejected(f"sigma2 of {bad} at t = 3"):
        likelihood.bound_terms(lambda xt, t: xt, d, x0, [d.beta, f64(0, 0.1, 0.2, bad, 0.3)])


def test_eq5_every_variance_is_evaluated_at_the_one_sample_of_each_xt():
    """Another table in front changes no number of the others, and the model gets x_1 .. x_T, one of each."""
    both, seen, d = terms_of(BRUTAL, [3, 250], lambda xt, t: 0.5 * xt)
    alone, _, _ = terms_of(BRUTAL, [3, 250], lambda xt, t: 0.5 * xt, ["beta_tilde"])
    assert sorted(seen) == list(range(1, d.T + 1)), f"the model was called at {sorted(seen)}"
    assert all(len(xt) == 2 for xt in seen.values())
    same("terms", both[1], alone[0])


def test_eq5_one_image_has_the_terms_of_its_timesteps():
    """The model gets x_1 .. x_T with their own t for a batch of one image, too."""
    terms, seen, d = terms_of(BRUTAL, [3], lambda xt, t: 0.1 * xt * t[:, None], clip=False)
    assert sorted(seen) == [1, 2, 3, 4], f"the model was called at {sorted(seen)}"
    for t in (1, 2, 3, 4):
        mean = d.p_mean(seen[t], t, 0.1 * t * seen[t], clip=False)[0, 0].item()
        variance = ref.decoder_variance(BRUTAL) if t == 1 else BRUTAL[t]
        want = ref.bound_term(BRUTAL, t, 3, seen[t].item(), mean, variance) / LN2
        close(f"L_{t - 1}", terms[0, 0, t - 1], want, 1e-10, 1 + want)


@pytest.mark.parametrize("shape", [(3, 2, 6, 4), (3, 2, 4, 6), (2, 5), (2, 1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("size", [1.0, 10.0], ids=["ordinary noise", "noise of 10"])
def test_eq5_terms_are_means_over_all_pixels_of_an_image_of_any_shape(shape, size):
    """Every pixel has its own level. No xt is cut off, however large its noise is."""
    d, seen = ddpm.Diffusion(BRUTAL), {}
    k = np.random.default_rng(6).integers(0, 256, shape)

    def model(xt, t):
        for step in set(t.tolist()):
            seen[step] = xt[t == step]
        return 0.5 * xt

    returned, draw = [], noise(4)

    def given(x):
        returned.append(size * draw(x))
        return returned[-1]

    terms = likelihood.bound_terms(
        model, d, torch.from_numpy(level(k)), [d.beta], clip=False, noise=given
    )
    signal, variance = ref.forward_moments(BRUTAL)
    implied = []
    for t in (1, 2, 3, 4):
        xt = seen[t].numpy()
        implied.append((xt - signal[t] * level(k)) / variance[t] ** 0.5)
        mean = d.p_mean(seen[t], t, 0.5 * seen[t], clip=False).numpy()
        sigma2 = ref.decoder_variance(BRUTAL) if t == 1 else BRUTAL[t]
        each = ref.bound_term(BRUTAL, t, k, xt, mean, sigma2) / LN2
        want = each.reshape(shape[0], -1).mean(1)
        close(f"L_{t - 1}", terms[0, :, t - 1], want, 1e-9, 1 + abs(want))
    # All numbers that the noise function has returned, in one call or in several, and no others.
    numbers = np.sort(np.concatenate([z.numpy().ravel() for z in returned]))
    close("noise in all xt", np.sort(np.ravel(implied)), numbers, 1e-9, 10.0)


def test_bound_builds_no_graph_and_the_same_noise_gives_the_same_terms():
    d, x0, w = ddpm.Diffusion(BRUTAL), torch.ones(2, 3), torch.ones((), requires_grad=True)
    terms = []
    for _ in range(2):
        terms.append(likelihood.bound_terms(lambda xt, t: w * xt, d, x0, [d.beta], noise=noise()))
    same("terms", *terms)
    assert not terms[0].requires_grad


# --- Statistics -----------------------------------------------------------------------------------


LEVELS, WEIGHTS = np.array([40, 120, 200]), np.array([0.5, 0.3, 0.2])
MILD = np.array([0, 0.02, 0.05, 0.2, 0.5, 0.7])


def exact_model(beta):
    """E[eps | xt] for scalars on three levels."""
    points, none = level(LEVELS), np.zeros(3)
    return at_each_step(lambda t, x: exact_models.eps_mixture(beta, t, x, WEIGHTS, points, none))


def monte_carlo_terms():
    k = np.random.default_rng(checks.SEED).choice(LEVELS, p=WEIGHTS, size=20_000)
    return terms_of(MILD, k, exact_model(MILD), clip=False)


def test_eq5_bound_has_the_predicted_terms_and_is_above_the_entropy():
    """Scalars on three levels, exact eps: every term by Monte Carlo agrees with quadrature, and the
    bound is above the entropy of the data by the predicted gap."""
    terms, _, d = monte_carlo_terms()
    entropy = exact_models.entropy_bits(WEIGHTS)
    for row, sigma2 in enumerate((d.beta, d.beta_tilde)):
        want = exact_models.expected_bound_terms(
            MILD, sigma2.numpy(), ref.decoder_variance(MILD), LEVELS, WEIGHTS
        )
        for t in range(d.T):
            has_mean(f"L_{t}", terms[row, :, t], want[t])
        has_mean("the bound", terms[row].sum(1), want.sum())
        assert want.sum() > entropy, "the reference's own bound is below the entropy"
        bound = terms[row].sum(1).mean()
        assert bound > entropy, f"the bound {bound:.4f} is below the entropy {entropy:.4f}"


@pytest.mark.parametrize("fault", ["nats replace bits", "the KL is taken the wrong way round",
                                   "L_0 is left out", "sigma^2 is read at t - 1"])  # fmt: skip
def test_bound_statistics_reject_a_bound_in_which(fault):
    """Negative control: the test above detects each of these faults."""
    terms, _, d = monte_carlo_terms()
    want = exact_models.expected_bound_terms(
        MILD, MILD, ref.decoder_variance(MILD), LEVELS, WEIGHTS
    )
    wrong = terms[0].numpy().copy()
    if fault.startswith("nats"):
        wrong *= LN2
    elif fault.startswith("L_0"):
        wrong[:, 0] = 0
    else:
        sigma2 = MILD[2] if fault.startswith("sigma") else MILD[3]
        var, gap = d.beta_tilde[3].item(), 0.0
        args = (gap, var, 0, sigma2) if fault.startswith("sigma") else (0, sigma2, gap, var)
        wrong[:, 2] += (ref.gaussian_kl(*args) - ref.gaussian_kl(gap, var, 0, MILD[3])) / LN2
    assert rejects(has_mean, fault, wrong.sum(1), want.sum())

"""Section 8 of ddpm.py: the bound on the likelihood, in bits/dim (eq. 5, eq. 13).

No network is trained: for a single image, and for scalars of a few values, the exact model is known.
"""

import judge
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from judge import (
    EPS,
    close,
    eps,
    f64,
    generator,
    has_mean,
    randomness,
    refused,
    rejects,
    same,
    tolerance,
)
from strategies import every_short_case, pixels
from test_6_ancestral import BRUTAL, at_each_step, image_model

import ddpm
import reference_numpy as ref

means = st.floats(-1.5, 1.5)
variances = st.floats(1e-6, 10)
LN2 = np.log(2)


def level(k):
    """The value of level k = 0..255 in [-1, 1]."""
    return -1 + 2 * np.asarray(k) / 255


# --- The KL divergence ---------------------------------------------------------------------------


@given(m1=means, v1=variances, m2=means, v2=variances)
def test_kl_of_two_gaussians_is_cross_entropy_minus_entropy(m1, v1, m2, v2):
    """E_1[log p_1 - log p_2] in nats; the error is relative to the terms that cancel."""
    scale = 1 + abs(np.log(v1)) + abs(np.log(v2)) + (v1 + (m1 - m2) ** 2) / v2
    close(
        "KL", ddpm.normal_kl(*f64(m1, v1, m2, v2)), ref.gaussian_kl(m1, v1, m2, v2), 8 * EPS, scale
    )


@given(m1=means, v1=variances, m2=means, v2=variances)
def test_kl_is_not_negative_and_zero_for_equal_distributions(m1, v1, m2, v2):
    """KL(p || q) >= 0, KL(p || p) = 0."""
    assert ddpm.normal_kl(*f64(m1, v1, m2, v2)) >= -8 * EPS
    close("KL(p || p)", ddpm.normal_kl(*f64(m1, v1, m1, v1)), 0, 8 * EPS, 1 + abs(np.log(v1)))


# --- The decoder ---------------------------------------------------------------------------------


@given(k=st.integers(0, 255), mean=means, var=variances)
def test_eq13_decoder_is_the_mass_of_the_levels_bin(k, mean, var):
    """log of the mass from x0 - 1/255 to x0 + 1/255, to infinity for levels 0 and 255; in both tails.

    A bin is the difference of two values of log Phi, each rounded: relative to its width in units of
    log Phi the error is eps |log Phi| / width, and the width is at least 1 / (255 sigma) / 10. Its ends
    carry an error of eps (|x0| + |mean|) < 3 eps, or 3 eps / sigma in units in which the slope of log Phi
    is at most 1 + |z|, and z^2 / 2 at most |log p|.
    """
    want = ref.decoder_log_prob(k, mean, var)
    got = ddpm.discretized_log_likelihood(f64(level(k)), f64(mean), f64(var))
    scale = (1 + abs(want)) * (1 + 2550 * var**0.5) + (1 + abs(2 * want) ** 0.5) * 3 / var**0.5
    close("log p(x0 | x1)", got, want, 32 * EPS, scale)


@given(mean=means, var=variances)
def test_eq13_decoder_probabilities_of_the_256_levels_sum_to_1(mean, var):
    """The bins tile the line: nothing is lost, nothing is counted twice."""
    x0 = torch.from_numpy(level(range(256)))
    log_p = ddpm.discretized_log_likelihood(x0, f64(mean).expand(256), f64(var).expand(256))
    close("sum of p", log_p.exp().sum(), 1, 256 * 1e3 * EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("miss", [0.05, 0.5, 2.0])
def test_eq13_decoder_still_teaches_when_it_is_far_off(miss, dtype):
    """A miss of up to 200 sigma costs miss^2 / (2 sigma^2) nats and its gradient is miss / sigma^2,
    to some per cent: no floor at 1e-12, whose gradient is zero."""
    mean = torch.tensor([1 / 255 - miss], dtype=dtype, requires_grad=True)
    x0, var = torch.tensor([1 / 255], dtype=dtype), torch.tensor([1e-4], dtype=dtype)
    log_p = ddpm.discretized_log_likelihood(x0, mean, var)
    log_p.backward()
    near = miss - 1 / 255  # the bin's near edge, where its mass lies
    assert -0.6 * (near + 0.01) ** 2 / 1e-4 - 5 < log_p < -0.4 * near**2 / 1e-4
    close("gradient", mean.grad, near / 1e-4, 0.1, near / 1e-4 + 100)


@pytest.mark.parametrize("k", [0, 255])
def test_eq13_end_levels_reach_to_infinity(k):
    """A mean far beyond the end of the range makes level 0 or 255 certain."""
    beyond = f64(-3.0 if k == 0 else 3.0)
    log_p = ddpm.discretized_log_likelihood(f64(level(k)), beyond, f64(0.01))
    assert log_p.abs() < 1e-80  # the tail beyond 20 sigma


# --- The terms of the bound ----------------------------------------------------------------------


def terms_of(case_or_beta, k, model, tables=("beta", "beta_tilde"), pixels=(1,), **how):
    """bound_terms of the levels k, each an image of equal pixels, and the xt that the model saw at each t.

    It may be asked at one t at a time or at many, and again for other variances, but of the same xt."""
    d, seen = ddpm.Diffusion(getattr(case_or_beta, "beta", case_or_beta)), {}

    def recording(xt, t):
        for step in t.unique().tolist():
            same(
                f"x_{step}, which the model is asked again",
                xt[t == step],
                seen.get(step, xt[t == step]),
            )
            seen[step] = xt[t == step]
        return model(xt, t)

    x0 = torch.from_numpy(level(k)).reshape(-1, *[1] * len(pixels)).repeat(1, *pixels)
    how = {"generator": generator(), **how}
    terms = ddpm.bound_terms(recording, d, x0, [getattr(d, name) for name in tables], **how)
    return terms, seen, d


def exact_terms(beta, levels=(51, 204)):
    """The terms of images of one pixel, each for the exact model of it alone."""
    alone = [terms_of(beta, [k], image_model(beta, f64(level(k))), clip=False)[0] for k in levels]
    return torch.cat(alone, dim=1), ddpm.Diffusion(beta)


@every_short_case
def test_eq5_with_exact_eps_sigma2_beta_tilde_makes_the_kl_terms_vanish(case):
    """One image: mu_theta = mu_tilde, so L_1 .. L_{T-1} = 0; what is left is decoder and prior."""
    terms, d = exact_terms(case.beta)
    # mu_theta - mu_tilde is rounding, magnified by 1 / sqrt(alpha_bar_t), against a variance of
    # beta_tilde_t >= beta_2 beta_1 / 2 or so
    signal, _ = ref.forward_moments(case.beta)
    slack = (1e3 * eps() / signal[1:-1] + tolerance(case, eps())) ** 2 / d.beta_tilde[2:].numpy()
    close("L_1 .. L_{T-1}", terms[1, :, 1:-1], 0, 1.0, 8 * eps() + slack)


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
    terms, _ = exact_terms(ref.linear_beta(1000), (0, 255))
    close("sum of L_1 .. L_999, beta", terms[0, :, 1:1000].sum(1), 0.4864, 0.5e-4, 1.0)
    close("sum of L_1 .. L_999, beta_tilde", terms[1, :, 1:1000].sum(1), 0, 1e-9, 1.0)
    close("L_T", terms[:, :, 1000], 2.91e-5, 0.005e-5, 1.0)


@every_short_case
def test_eq5_prior_term_is_the_kl_from_the_last_step_to_the_standard_normal(case):
    """L_T = KL(q(x_T | x0) || N(0, 1)), in bits, for each image of its own."""
    k = np.array([0, 100, 255])
    terms, _, _ = terms_of(case, k, lambda xt, t: torch.zeros_like(xt))
    signal, noise = ref.forward_moments(case.beta)
    want = ref.gaussian_kl(signal[-1] * level(k), noise[-1], 0, 1) / LN2
    scale = 1 + abs(np.log(noise[-1]))
    close("L_T", terms[:, :, -1], want, tolerance(case) + 8 * EPS, scale)


@every_short_case
def test_eq5_each_kl_term_compares_the_posterior_with_the_models_step_at_the_same_xt(case):
    """L_{t-1} = KL(N(mu_tilde, beta_tilde_t) || N(mu_theta, sigma_t^2)) at the xt the model saw."""
    k = np.array([30, 220])
    terms, seen, d = terms_of(case, k, lambda xt, t: 0.5 * xt, clip=False)
    for t in range(2, case.T + 1):
        c_0, c_t, var = ref.posterior(case.beta, t)
        xt = seen[t][:, 0].numpy()
        mean = d.p_mean(f64(*xt), t, f64(*(0.5 * xt)), clip=False).numpy()
        for row, sigma2 in enumerate((case.beta[t], var)):
            want = ref.gaussian_kl(c_0 * level(k) + c_t * xt, var, mean, sigma2) / LN2
            # both means are good to `tolerance` of their terms, |x0| <= 1 and |xt|, and so is their gap
            gap = 1 + abs(xt) + abs(mean)
            scale = 1 + abs(np.log(var)) + abs(np.log(sigma2)) + (var + gap**2) / sigma2
            close(f"L_{t - 1}", terms[row, :, t - 1], want, 8 * tolerance(case), scale)


@every_short_case
def test_eq5_each_xt_is_drawn_from_q_of_its_own_image(case):
    """xt - sqrt(alpha_bar_t) x0 is sqrt(1 - alpha_bar_t) times noise of ordinary size, at every t."""
    k = np.array([0, 255])
    _, seen, _ = terms_of(case, k, lambda xt, t: 0.0 * xt)
    signal, noise = ref.forward_moments(case.beta)
    assert sorted(seen) == list(range(1, case.T + 1))
    for t, xt in seen.items():
        eps = (xt[:, 0].numpy() - signal[t] * level(k)) / noise[t] ** 0.5
        assert (abs(eps) < 8).all() and eps[0] != eps[1], f"t = {t}: eps = {eps}"


@pytest.mark.parametrize("table", ["beta", "beta_tilde"])
def test_eq13_decoder_variance_is_beta_tilde_2_for_both_choices_of_sigma(table):
    """L_0 = -log2 of the mass of N(mu_theta, beta_tilde_2) on x0's bin; beta_tilde_1 is 0, and beta_1
    is not what the paper's results were made with. With T = 1 there is only beta_1."""
    k = np.array([0, 77, 255])
    for beta in (BRUTAL, np.array([0, 0.2, 0.5]), np.array([0, 0.3])):
        d = ddpm.Diffusion(beta)
        var = d.beta_tilde[2].item() if d.T > 1 else beta[1]
        terms, seen, _ = terms_of(beta, k, lambda xt, t: 0.5 * xt, [table])
        x1 = seen[1]
        mean = d.p_mean(x1, 1, 0.5 * x1)[:, 0].numpy()
        want = -ref.decoder_log_prob(k, mean, var) / LN2
        close("L_0", terms[0, :, 0], want, 1e-9, 1 + abs(want))


@given(k=pixels())
def test_eq5_terms_are_bits_per_dimension_of_each_image(k):
    """A mean over the six pixels of an image, and never over images; columns L_0 .. L_T, a row per table,
    on the same draws."""
    terms, seen, d = terms_of(BRUTAL, k, lambda xt, t: 0.5 * xt, pixels=(2, 3), clip=False)
    assert terms.shape == (2, len(k), 5) and terms.dtype == torch.float64
    same("L_0, the same decoder at the same x1", terms[0, :, 0], terms[1, :, 0])
    same("L_T, which has no variance to choose", terms[0, :, -1], terms[1, :, -1])
    for t in (2, 3, 4):
        c_0, c_t, var = ref.posterior(BRUTAL, t)
        mean = d.p_mean(seen[t], t, 0.5 * seen[t], clip=False).numpy()
        posterior = c_0 * level(k)[:, None, None] + c_t * seen[t].numpy()
        want = ref.gaussian_kl(posterior, var, mean, BRUTAL[t]).mean((1, 2)) / LN2
        close(f"L_{t - 1}", terms[0, :, t - 1], want, 1e-9, 1 + want)


def test_bound_clips_x0_as_the_sampler_does():
    """A model whose x0 is 3 is judged, by default, as one whose x0 is 1: exact, for a white image."""
    d, white = ddpm.Diffusion(BRUTAL), torch.ones(4, 1, dtype=torch.float64)

    def model(xt, t):
        return d.eps_from_x0(xt, t, 3 * torch.ones_like(xt))

    clipped = ddpm.bound_terms(model, d, white, [d.beta_tilde])
    free = ddpm.bound_terms(model, d, white, [d.beta_tilde], clip=False)
    close("L_1 .. L_{T-1}", clipped[0, :, 1:-1], 0, 1e-12, 1.0)
    assert (free[0, :, 1:-1] > 0.05).all()


@pytest.mark.parametrize("pixel", [1 + 2 / 255, -1 - 2 / 255, 255.0])
def test_bound_refuses_pixels_outside_1(pixel):
    """0..255, or any other range, is not what eq. 13 is about."""
    d = ddpm.Diffusion(BRUTAL)
    with refused(f"a pixel of {pixel}"):
        ddpm.bound_terms(lambda xt, t: xt, d, f64([pixel]), [d.beta])


def test_bound_refuses_pixels_that_are_not_on_the_256_levels():
    """Images in [0, 1], k / 255, are inside [-1, 1] and would give plausible, wrong bits."""
    d = ddpm.Diffusion(BRUTAL)
    with refused("images in [0, 1]"):
        ddpm.bound_terms(lambda xt, t: xt, d, torch.arange(256.0)[:, None] / 255, [d.beta])
    with refused("pixels a third of a level too dark"):
        ddpm.bound_terms(
            lambda xt, t: xt, d, (torch.arange(1.0, 256)[:, None] - 0.33) / 127.5 - 1, [d.beta]
        )
    levels = torch.arange(256, dtype=torch.uint8)[:, None].float() / 127.5 - 1
    assert ddpm.bound_terms(lambda xt, t: xt, d, levels, [d.beta]).isfinite().all()


def test_eq5_every_variance_is_judged_on_the_one_draw_of_each_xt():
    """Another table in front changes no number of the others, and the model sees x_1 .. x_T, one of each."""
    (both, seen, d), (alone, *_) = (terms_of(BRUTAL, [3, 250], lambda xt, t: 0.5 * xt, tables)
                                    for tables in (("beta", "beta_tilde"), ("beta_tilde",)))  # fmt: skip
    assert sorted(seen) == list(range(1, d.T + 1)) and all(len(xt) == 2 for xt in seen.values())
    same("terms", both[1], alone[0])


@randomness
def test_bound_draws_from_the_generators_it_is_given():
    """The same generators, the same terms; the global seed does not matter; no graph is kept."""
    d, x0, w = ddpm.Diffusion(BRUTAL), torch.ones(2, 3), torch.ones((), requires_grad=True)

    def draw():
        return ddpm.bound_terms(lambda xt, t: w * xt, d, x0, [d.beta],
                                generator=[generator(1), generator(2)])  # fmt: skip

    a, b = draw(), draw()
    same("terms", a, b)
    assert not a.requires_grad


LEVELS, WEIGHTS = np.array([40, 120, 200]), np.array([0.5, 0.3, 0.2])
MILD = np.array([0, 0.02, 0.05, 0.2, 0.5, 0.7])


def exact_model(beta):
    """E[eps | xt] for scalars on three levels."""
    points, none = level(LEVELS), np.zeros(3)
    return at_each_step(lambda t, x: ref.eps_mixture(beta, t, x, WEIGHTS, points, none))


def monte_carlo_terms():
    k = np.random.default_rng(judge.SEED).choice(LEVELS, p=WEIGHTS, size=20_000)
    return terms_of(MILD, k, exact_model(MILD), clip=False, generator=generator(3))


def test_eq5_bound_has_the_predicted_terms_and_is_above_the_entropy():
    """Scalars on three levels, exact eps: every term by Monte Carlo agrees with quadrature, and the
    bound is above the entropy of the data by the predicted gap."""
    terms, _, d = monte_carlo_terms()
    entropy = ref.entropy_bits(WEIGHTS)
    for row, sigma2 in enumerate((d.beta, d.beta_tilde)):
        want = ref.bound_terms_discrete(
            MILD, sigma2.numpy(), d.beta_tilde[2].item(), LEVELS, WEIGHTS
        )
        for t in range(d.T):
            has_mean(f"L_{t}", terms[row, :, t], want[t])
        has_mean("the bound", terms[row].sum(1), want.sum())
        assert want.sum() > entropy, "the reference's own bound is below the entropy"
        assert terms[row].sum(1).mean() > entropy


@pytest.mark.parametrize("fault", ["nats stand for bits", "the KL is taken the wrong way round",
                                   "L_0 is left out", "sigma^2 is read at t - 1"])  # fmt: skip
def test_bound_statistics_reject_a_bound_in_which(fault):
    """Negative control: the test above would see each of these faults."""
    terms, _, d = monte_carlo_terms()
    want = ref.bound_terms_discrete(MILD, MILD, d.beta_tilde[2].item(), LEVELS, WEIGHTS)
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

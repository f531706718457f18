"""Learned variances (iDDPM), fewer timesteps and guidance (CFG).

No network is trained: for Gaussian data, for a single image and for scalars with a few values, the exact
eps is known, and so is the variance that it leaves.
"""

import checks
import exact_models
import far
import network_numpy
import numpy as np
import pytest
import torch
from calls import ddpm, improved, noise
from checks import (
    EPS,
    close,
    edge,
    f64,
    has_mean,
    has_normal_moments,
    in_float64,
    is_uniform,
    log_size,
    randomness,
    rejected,
    rejects,
    same,
    seed,
    tolerance,
)
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import optimize
from strategies import Case, cases, every_case, every_short_case
from test_6_ancestral import BRUTAL, MEAN, VAR, N, fewer, gaussian_model, normal
from test_7_ddim import timesteps_of
from test_9_bound import LEVELS, LN2, MILD, WEIGHTS, exact_model, level, recorded

import reference_numpy as ref

fractions = st.floats(-1, 2)  # v, where a network may well put it


def joined(eps, v):
    """A model with learned variances, from a model of eps and v (a number, or a table of t)."""

    def model(xt, t):
        values = np.full(len(t), v) if np.isscalar(v) else v[t.numpy()]
        values = torch.from_numpy(values).to(xt.dtype).reshape(-1, *[1] * (xt.ndim - 1))
        return torch.cat([eps(xt, t), values.expand_as(xt)], dim=1)

    return model


def fraction(beta, t, sigma2):
    """The v at which iDDPM eq. 15 gives this variance."""
    low, high = ref.variance_ends(beta, t)
    return np.log(sigma2 / low) / np.log(high / low) if low != high else 0.0


def fractions_of(beta, sigma2):
    """The same for a table of variances; nan at 0."""
    return np.array([np.nan, *(fraction(beta, t, sigma2[t]) for t in range(1, len(beta)))])


def exact_variances(beta, s2=VAR):
    """Var(x_{t-1} | x_t) for scalar data of variance s2, as a table; at t = 1, that of eq. 15's v = 0."""
    table = [exact_models.exact_variance_gaussian(beta, t, s2) for t in range(2, len(beta))]
    return np.array([np.nan, ref.learned_variance(beta, 1, 0), *table])


# --- iDDPM eq. 15: the variance -------------------------------------------------------------------


def log_slack(case, v):
    """The error of log sigma^2: that of log beta_tilde, and rounding of logarithms of this size."""
    low, high = ref.variance_ends(case.beta, case.t)
    return (1 + abs(v)) * (tolerance(case) + 8 * EPS * (1 + abs(np.log(low)) + abs(np.log(high))))


@every_case
def test_iddpm_eq15_variance_is_beta_tilde_at_v_0_and_beta_at_v_1(case):
    """From t = 2 on; the two fixed variances of sec. 3.2 are its ends."""
    if case.t > 1:
        d = ddpm.Diffusion(case.beta)
        _, _, beta_tilde = ref.posterior(case.beta, case.t)
        at_0, at_1 = improved.variance(d, case.t, f64(0, 1))
        close("sigma^2 at v = 0", at_0, beta_tilde, log_slack(case, 0))
        close("sigma^2 at v = 1", at_1, case.betas[case.t - 1], log_slack(case, 1))


@given(case=cases(), v=st.floats(-5, 5))
@example(case=Case((1e-4, 0.5), 2), v=-5.0)  # sigma^2 = 3e-23
@example(case=Case((1e-4, 0.5), 2), v=5.0)  # sigma^2 = 3e14
def test_iddpm_eq15_variance_interpolates_the_logarithms(case, v):
    """v = 1/2 gives the geometric mean of beta_tilde and beta; v may leave [0, 1], and sigma^2 has no limits."""
    got = improved.variance(ddpm.Diffusion(case.beta), case.t, f64(v))
    close("sigma^2", got, [ref.learned_variance(case.beta, case.t, v)], log_slack(case, v))


@pytest.mark.parametrize(
    "beta", [BRUTAL, MILD, np.array([0, 0.2, 0.5]), np.array([0, 1e-6, 2e-6]), np.array([0, 0.3])],
    ids=["T = 4", "T = 5", "T = 2", "beta 1e-6", "T = 1"],
)  # fmt: skip
def test_iddpm_eq15_beta_tilde_2_replaces_beta_tilde_at_t1(beta):
    """From beta_tilde_2 to beta_1, because beta_tilde_1 is 0; with T = 1 there is only beta_1."""
    low = ref.decoder_variance(beta)
    got = improved.variance(ddpm.Diffusion(beta), 1, f64(0, 0.5, 1))
    close("sigma_1^2", got, [low, (low * beta[1]) ** 0.5, beta[1]], 1e-14 + 8 * EPS / beta[1])


def test_iddpm_eq15_every_image_has_its_own_t_and_every_pixel_its_own_v():
    d, t = ddpm.Diffusion(BRUTAL), torch.tensor([4, 1, 2])
    v = torch.linspace(-0.5, 1.5, 18, dtype=torch.float64).reshape(3, 2, 3)
    got = improved.variance(d, t, v)
    for i in range(3):
        want = ref.learned_variance(BRUTAL, int(t[i]), v[i].numpy())
        close(f"sigma^2 of image {i}", got[i], want, 1e-14)


@in_float64
def test_iddpm_eq15_tables_stay_in_float64_for_a_network_in_bfloat16():
    """sigma^2 is float32 then, and good to the rounding of a logarithm of 1e-9 in float32."""
    beta = ref.linear_beta(1000, 1e-9, 1e-4)
    v = torch.tensor([0.0, 0.5, 1.0], dtype=torch.bfloat16)
    got = improved.variance(ddpm.Diffusion(beta), 2, v)
    assert got.dtype == torch.float32
    close("sigma^2", got, ref.learned_variance(beta, 2, [0, 0.5, 1]), 64 * 1.2e-7)


def test_the_output_is_eps_in_the_first_half_of_its_channels_and_v_in_the_second():
    """eps alone is a model for the samplers of ddpm.py."""
    eps, v, xt = normal(2, 3, 4), normal(2, 3, 4, seed=1), normal(2, 3, 4, seed=2)
    output = torch.cat([eps, v], dim=1)
    got = improved.split_output(output, xt)
    same("eps", got[0], eps)
    same("v", got[1], v)
    same("eps alone", improved.eps_only(lambda xt, t: output)(xt, torch.tensor([1, 1])), eps)


def test_eps_only_passes_xt_and_t_of_every_call_to_the_model():
    """Two calls at different t."""
    model = improved.eps_only(lambda xt, t: torch.cat([xt * t[:, None], 0 * xt], dim=1))
    for t in ([2, 3], [4, 1]):
        xt, t = normal(2, 3, seed=t[0]), torch.tensor(t)
        same("eps", model(xt, t), xt * t[:, None])


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 8])
def test_a_model_without_a_v_for_every_pixel_is_rejected(channels):
    """For xt of two channels: three would silently be an eps for both and one v for both."""
    d, x0 = ddpm.Diffusion(BRUTAL), torch.ones(4, 2, 3)

    def model(xt, t):
        return xt[:, :1].repeat(1, channels, 1)

    with rejected(f"{channels} channels for xt of two, L_hybrid"):
        improved.loss_hybrid(model, d, x0)
    with rejected(f"{channels} channels for xt of two, eps alone"):
        improved.eps_only(model)(x0, torch.tensor([1, 2, 3, 4]))
    with rejected(f"{channels} channels for xt of two, sampling"):
        improved.sample_ancestral(model, d, x0)
    with rejected(f"{channels} channels for xt of two, the bound"):
        improved.bound_terms(model, d, x0)


def test_iddpm_the_papers_network_with_learned_variances_has_35749766_parameters():
    """Three channels more in the last layer of the CIFAR-10 network."""
    with torch.device("meta"):
        net = ddpm.UNet(3, 6)
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 35_749_766
    assert network_numpy.unet_parameter_count(out_channels=6) == 35_749_766


# --- iDDPM eq. 5, eq. 6: a term of the bound ------------------------------------------------------


@given(case=cases(), v=fractions)
def test_iddpm_eq6_term_is_the_kl_of_the_posterior_and_the_models_step_in_bits(case, v):
    """L_{t-1} = KL(N(mu_tilde, beta_tilde) || N(mu_theta, sigma^2)) / log 2 for t > 1, of each image a
    mean over its dimensions."""
    if case.t == 1:
        return
    d, t = ddpm.Diffusion(case.beta), case.t
    x0, xt = f64([0.3, -1.0], [0.9, 0.1]), f64([-2.0, 0.4], [1.0, 3.0])
    mean = d.p_mean(xt, t, 0.5 * xt, clip=False).numpy()
    c_0, c_t, var = ref.posterior(case.beta, t)
    sigma2 = ref.learned_variance(case.beta, t, v)
    want = ref.gaussian_kl(c_0 * x0.numpy() + c_t * xt.numpy(), var, mean, sigma2) / LN2
    got = improved.bound_term(d, x0, xt, t, 0.5 * xt, torch.full_like(xt, v), clip=False)
    gap = 1 + abs(xt.numpy()) + abs(mean)  # both means are good to `tolerance` of their terms
    scale = 1 + abs(np.log(var)) + abs(np.log(sigma2)) + (var + gap**2) / sigma2
    close("L_{t-1}", got, want.mean(1), 8 * (tolerance(case) + log_slack(case, v)), scale.mean(1))


@given(k=st.integers(0, 255), v=fractions, x1=st.floats(-2, 2), clip=st.booleans())
def test_iddpm_eq5_term_at_t1_is_the_decoder_with_the_learned_variance(k, v, x1, clip):
    """L_0 = -log2 of the mass that N(mu_theta, sigma_1^2) puts on x0's bin; no KL. The predicted x0, which
    is the mean, is clipped or not."""
    d, x0, xt = ddpm.Diffusion(MILD), f64([level(k)]), f64([x1])
    got = improved.bound_term(d, x0, xt, 1, 0.5 * xt, f64([v]), clip=clip)
    mean = (x1 - MILD[1] ** 0.5 * 0.5 * x1) / (1 - MILD[1]) ** 0.5
    mean = np.clip(mean, -1, 1) if clip else mean
    want = -ref.decoder_log_prob(k, mean, ref.learned_variance(MILD, 1, v)) / LN2
    close("L_0", got, [want], 1e-9, 1 + abs(want))


def test_iddpm_eq6_images_of_a_batch_have_their_terms_at_their_own_t():
    """t = 1 among others: each image's term is the one that it has alone, and its gradient is finite."""
    d, t = ddpm.Diffusion(BRUTAL), torch.tensor([3, 1, 4, 1])
    v = normal(4, 1, 2, 1, seed=1).requires_grad_()
    k = np.array([[0, 255], [255, 0], [7, 90], [128, 200]])
    x0 = torch.from_numpy(level(k)).reshape(4, 1, 2, 1)
    xt = d.q_sample(x0, t, normal(4, 1, 2, 1, seed=2))
    got = improved.bound_term(d, x0, xt, t, 0.3 * xt, v)
    assert got.shape == (4,), f"shape {tuple(got.shape)}, want (4,)"
    for i in range(4):
        part = slice(i, i + 1)
        alone = improved.bound_term(d, x0[part], xt[part], int(t[i]), 0.3 * xt[part], v[part])
        close(f"term of image {i}", got[i], alone[0], 8 * EPS)
    got.sum().backward()
    assert v.grad.isfinite().all(), f"gradient {v.grad.flatten().tolist()}"


@pytest.mark.parametrize("v", [-30.0, -3.0, 0.0, 30.0, 100.0])
def test_iddpm_eq6_gradients_are_finite_whatever_v(v):
    """Nothing limits v: where L_{t-1} is finite in float32, so is its gradient, on the paper's schedule.
    At t = 1 a decoder of no width, or of infinite width, has no finite term: there, v is from -3 to 30."""
    chosen = slice(None) if -3 <= v <= 30 else slice(1, None)
    d, t = ddpm.Diffusion(ref.linear_beta(1000)), torch.tensor([1, 2, 3, 10, 300, 1000])[chosen]
    x0 = torch.from_numpy(level(np.array([0, 7, 128, 200, 255, 255])))[chosen, None].float()
    values = torch.full_like(x0, v).requires_grad_()
    term = improved.bound_term(d, x0, d.q_sample(x0, t, 0.7 + 0 * x0), t, 0.5 + 0 * x0, values)
    term.sum().backward()
    assert term.isfinite().all(), f"terms {term.tolist()}"
    assert values.grad.isfinite().all(), f"gradients {values.grad.flatten().tolist()}"


@pytest.mark.parametrize("t", [1, 2, 4])
def test_iddpm_eq6_term_clips_x0_as_the_sampler_does(t):
    """By default, a model with a predicted x0 of 3 counts as one of 1; in L_0 too."""
    d, white = ddpm.Diffusion(BRUTAL), torch.ones(4, 1, dtype=torch.float64)
    xt = normal(4, 1)
    eps_3, eps_1 = (d.eps_from_x0(xt, t, x0 * white) for x0 in (3, 1))
    clipped = improved.bound_term(d, white, xt, t, eps_3, 0 * xt)
    close("term", clipped, improved.bound_term(d, white, xt, t, eps_1, 0 * xt), 1e-12, 1.0)
    x0 = torch.from_numpy(level(np.full((4, 1), 130)))  # so that the clipped mean matters in L_0
    clipped = improved.bound_term(d, x0, xt, t, eps_3, 0 * xt)
    free = improved.bound_term(d, x0, xt, t, eps_3, 0 * xt, clip=False)
    assert (free - clipped).min() > 0.05, (
        f"clipping changes the term by {(free - clipped).tolist()}"
    )


# --- iDDPM eq. 16: the hybrid loss ----------------------------------------------------------------


class Fixed:
    """A model with a fixed output, which can be differentiated; it remembers its arguments."""

    def __init__(self, eps, v):
        self.out = torch.cat([eps, v], dim=1).requires_grad_()

    def __call__(self, xt, t):
        self.xt, self.t = xt, t
        return self.out

    def gradients(self, loss):
        """Of the loss, with respect to eps and to v."""
        return torch.autograd.grad(loss, self.out)[0].chunk(2, dim=1)


T_OF_EACH = torch.tensor([2, 4, 1, 3, 4])


def a_batch():
    """Levels k, x0, eps, and a model of five images of two pixels; eps_theta is not eps."""
    k = np.random.default_rng(5).integers(0, 256, (5, 2))
    model = Fixed(normal(5, 2, seed=1), 0.4 * normal(5, 2, seed=2))
    return k, torch.from_numpy(level(k)), normal(5, 2), model


@pytest.mark.parametrize("weight", [0.0, 0.001, 1.0])
def test_iddpm_eq16_eps_learns_from_L_simple_alone(weight):
    """Its gradient is that of L_simple, whatever the weight of L_vlb: the mean is detached there."""
    d, (_, x0, eps, model) = ddpm.Diffusion(BRUTAL), a_batch()
    loss = improved.loss_hybrid(model, d, x0, T_OF_EACH, eps, weight=weight)
    got, _ = model.gradients(loss)
    theta = model.out[:, :2].detach().requires_grad_()
    simple = ddpm.loss_simple(lambda xt, t: theta, d, x0, T_OF_EACH, eps)
    same("gradient in eps", got, torch.autograd.grad(simple, theta)[0])
    if weight == 0:
        close("L_hybrid with weight 0", loss, simple, 1e-14)


def test_iddpm_eq16_v_learns_from_L_vlb_with_a_weight_of_a_thousandth():
    """d L_hybrid / dv = 0.001 T dL_{t-1}/dv / (images and pixels), by calculus; at t = 1 by differences."""
    d, (k, x0, eps, model) = ddpm.Diffusion(BRUTAL), a_batch()
    _, got = model.gradients(improved.loss_hybrid(model, d, x0, T_OF_EACH, eps))
    theta, v = (half.detach().numpy() for half in model.out.chunk(2, dim=1))
    for i, t in enumerate(T_OF_EACH.tolist()):
        mean = d.p_mean(model.xt[i], t, f64(*theta[i]), clip=False).numpy()
        if t > 1:
            c_0, c_t, _ = ref.posterior(BRUTAL, t)
            gap = c_0 * x0[i].numpy() + c_t * model.xt[i].numpy() - mean
            slope = ref.learned_slope(BRUTAL, t, gap, v[i])
        else:
            ends = []
            for h in (1e-5, -1e-5):
                sigma2 = ref.learned_variance(BRUTAL, 1, v[i] + h)
                ends.append(-ref.decoder_log_prob(k[i], mean, sigma2))
            slope = (ends[0] - ends[1]) / 2e-5
        want = 0.001 * 4 * slope / LN2 / 10
        close(f"gradient in v at t = {t}", got[i], want, 1e-6, 1e-3 + abs(slope))


@pytest.mark.parametrize("how", [{}, {"weight": 0.1}], ids=["0.001, the default", "0.1"])
def test_iddpm_eq16_is_L_simple_plus_the_weight_times_L_vlb_in_bits_per_dimension(how):
    """L_vlb by one t per image: T times the mean of their terms, x0 not clipped."""
    d, (_, x0, eps, model) = ddpm.Diffusion(BRUTAL), a_batch()
    got = improved.loss_hybrid(model, d, x0, T_OF_EACH, eps, **how)
    theta, v = model.out.detach().chunk(2, dim=1)
    simple = ddpm.loss_simple(lambda xt, t: theta, d, x0, T_OF_EACH, eps)
    terms = []
    for i, t in enumerate(T_OF_EACH.tolist()):
        part = slice(i, i + 1)
        terms.append(
            improved.bound_term(d, x0[part], model.xt[part], t, theta[part], v[part], clip=False)
        )
    terms = torch.stack(terms)
    want = simple + how.get("weight", 0.001) * 4 * terms.mean()
    close("L_hybrid", got, want, 1e-12, 1 + terms.abs().max())


def test_iddpm_eq16_of_T_1_is_L_simple_and_the_decoder():
    """There is one step, and L_vlb is L_0."""
    d, x0, eps = ddpm.Diffusion([0, 0.3]), f64([level(9)]), f64([0.4])
    model = Fixed(f64([0.1]), f64([0.5]))
    got = improved.loss_hybrid(model, d, x0, torch.tensor([1]), eps, weight=1.0)
    mean = d.p_mean(model.xt, 1, f64([0.1]), clip=False).item()
    close("L_hybrid", got, 0.3**2 - ref.decoder_log_prob(9, mean, 0.3) / LN2, 1e-12)


@pytest.mark.parametrize("t", [1, 2, 10, 100, 500, 1000])
def test_iddpm_eq16_in_bfloat16_has_the_loss_and_gradients_of_float64(t):
    """A network in bfloat16, the paper's schedule: its outputs are rounded, and nothing after them. A
    gradient is rounded to 8 bits twice on the way back. The numbers are the same for every seed, because
    the tolerance was found for them."""

    def fixed(number):
        return torch.from_numpy(np.random.default_rng(number).normal(size=(4, 13)))

    d, eps = ddpm.Diffusion(ref.linear_beta(1000)), fixed(0)
    x0 = torch.from_numpy(level(np.arange(0, 256, 5))).reshape(4, 13)
    theta, v = (eps + 0.1 * fixed(1)).bfloat16(), (0.3 + 0.2 * fixed(2)).bfloat16()
    results = {}
    for kind in (torch.bfloat16, torch.float64):
        model, data = Fixed(theta.to(kind), v.to(kind)), torch.promote_types(kind, torch.float32)
        loss = improved.loss_hybrid(
            model, d, x0.to(data), torch.tensor([t] * 4), eps.to(data), weight=1.0
        )
        assert loss.dtype == data
        results[kind] = [part.double() for part in (loss, *model.gradients(loss))]
    (got, *got_slopes), (want, *slopes) = results.values()
    close(f"loss at t = {t}", got, want, 1e-4)
    for what, got, want in zip(("eps", "v"), got_slopes, slopes):
        allowed = 0.02 * want.abs() + 1e-3 * want.abs().max()
        close(f"gradient in {what} at t = {t}", got, want, 1.0, allowed)


@every_case
def test_iddpm_eq16_has_no_gradient_for_one_image_at_the_exact_eps_and_beta_tilde(case):
    """mu_theta = mu_tilde and v = 0: neither eps nor v can be improved (t > 1; at t = 1 a decoder without
    error would have no width at all)."""
    if case.t == 1:
        return
    d, x0, eps = ddpm.Diffusion(case.beta), f64([0.4], [-0.9]), f64([1.5], [-0.3])
    model = Fixed(eps, torch.zeros_like(eps))
    loss = improved.loss_hybrid(model, d, x0, torch.tensor([case.t] * 2), eps)
    in_eps, in_v = model.gradients(loss)
    close("gradient in eps", in_eps, 0, 4 * EPS, 1.0)
    low, high = ref.variance_ends(case.beta, case.t)
    signal, _ = ref.forward_moments(case.beta)
    slack = log_slack(case, 0) + (1e3 * EPS / signal[case.t] + tolerance(case)) ** 2 / low
    # the difference of two logarithms, as rounded
    difference = np.log(high / low) + 8 * EPS * (1 + abs(np.log(low)))
    close("gradient in v", in_v, 0, slack, 0.001 * case.T * difference)


def four_nodes(case, m, s2):
    """x0 = m +- s and eps = +-1: their mean is exact for what is quadratic in both; xt, and the exact eps."""
    x0, eps = f64([m - s2**0.5], [m + s2**0.5])[[0, 0, 1, 1]], f64([-1], [1], [-1], [1])
    xt = ddpm.Diffusion(case.beta).q_sample(x0, case.t, eps)
    exact = exact_models.eps_gaussian(case.beta, case.t, xt.numpy(), m, s2)
    return x0, eps, xt, torch.from_numpy(exact)


def node_slack(case, sigma2):
    """Error of (mu_tilde - mu_theta)^2 / sigma^2, which is of order 1, from that of either mean."""
    signal, _ = ref.forward_moments(case.beta)
    return 8 * (1e3 * EPS / signal[case.t] + tolerance(case)) / sigma2**0.5 + 8 * log_slack(case, 1)


@fewer
@given(case=cases(), s2=st.floats(0.01, 1))
def test_iddpm_eq16_has_no_gradient_for_gaussian_data_at_the_exact_eps_and_variance(case, s2):
    """x0 ~ N(0.3, s2): offset and slope of eps_theta, and v, are where the expected loss is least, and v
    is not if it is off by 1/4."""
    if case.t == 1:
        return
    x0, eps, _, exact = four_nodes(case, 0.3, s2)
    sigma2 = exact_models.exact_variance_gaussian(case.beta, case.t, s2)
    low, high = ref.variance_ends(case.beta, case.t)
    for off in (0, 0.25):
        a, b, v = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(3))
        here = fraction(case.beta, case.t, sigma2) + off

        def model(xt, t, a=a, b=b, v=v, here=here):
            return torch.cat([exact + a * xt + b, torch.full_like(xt, here) + v], dim=1)

        d, t = ddpm.Diffusion(case.beta), torch.tensor([case.t] * 4)
        loss = improved.loss_hybrid(model, d, x0, t, eps)
        in_a, in_b, in_v = torch.autograd.grad(loss, (a, b, v))
        scale = 0.001 * case.T * np.log(high / low) / LN2
        if not off:
            close("gradient in the slope of eps", in_a, 0, 8 * (tolerance(case) + 8 * EPS), 4.0)
            close("gradient in the offset of eps", in_b, 0, 8 * (tolerance(case) + 8 * EPS), 4.0)
            rounding = 0.001 * case.T * 8 * EPS * (1 + abs(np.log(low)))  # of log high - log low
            close("gradient in v", in_v, 0, node_slack(case, sigma2), scale + rounding)
        elif high > 1.5 * low:
            want = scale / 2 * (1 - (low / high) ** 0.25)
            close("gradient in v, if it is off", in_v, want, 0.01)


def test_iddpm_eq16_samples_t_uniformly_from_1_to_T_and_standard_normal_noise():
    """As Algorithm 1, for each image alone."""
    model = Fixed(torch.zeros(20_000, 2), torch.zeros(20_000, 2))
    d = ddpm.Diffusion(BRUTAL)
    improved.loss_hybrid(model, d, torch.zeros(20_000, 2))
    counts = torch.bincount(model.t, minlength=6).numpy()
    assert counts[0] == counts[5] == 0, f"t outside 1..4: counts of 0..5 are {counts}"
    is_uniform("t", counts[1:5])
    _, variance = ref.forward_moments(BRUTAL)
    eps = model.xt.numpy() / variance[model.t.numpy(), None] ** 0.5
    has_normal_moments("eps", eps, 0, 1)
    has_mean("eps_i eps_j within an image", eps[:, 0] * eps[:, 1], 0)


# --- iDDPM eq. 19: fewer timesteps ----------------------------------------------------------------


@fewer
@given(case=cases(), data=st.data())
def test_iddpm_eq19_betas_are_those_of_the_steps_between_the_timesteps_kept(case, data):
    """beta' = 1 - alpha_bar_t / alpha_bar_s is the variance of q(x_t | x_s); alpha_bar' is alpha_bar there,
    beta_tilde' is the posterior variance of the longer step."""
    timesteps = data.draw(timesteps_of(case.T), label="timesteps")
    _, d = improved.respaced(None, ddpm.Diffusion(case.beta), timesteps)
    signal, _ = ref.forward_moments(case.beta)
    assert d.T == len(timesteps), f"T = {d.T}, want {len(timesteps)}"
    # From logarithms, alpha_bar_t / alpha_bar_s has an error of log_size eps, relative to beta' >= min beta.
    tol = tolerance(case) * (1 + log_size(case))
    close("beta'", d.beta, ref.respaced_beta(case.beta, timesteps), tol)
    slack = 8 * case.T * EPS + tolerance(case)
    close("alpha_bar'", d.alpha_bar, signal[[0, *timesteps]] ** 2, slack, 1.0)
    for i, (s, t) in enumerate(zip([0, *timesteps[:-1]], timesteps), 1):
        want = ref.posterior(case.beta, t, s)[2]
        close(f"beta_tilde'_{i}", d.beta_tilde[i], want, 4 * tol)


def test_iddpm_eq19_the_model_receives_the_original_timesteps():
    """Step i of 1..n is t_i for the model, for each image and in every call."""
    seen = []
    model, _ = improved.respaced(lambda xt, t: seen.append(t), ddpm.Diffusion(BRUTAL), [1, 3, 4])
    model(normal(4, 1), torch.tensor([1, 3, 2, 3]))
    model(normal(2, 1), torch.tensor([2, 2]))
    assert [t.tolist() for t in seen] == [[1, 4, 3, 4], [3, 3]]
    assert {t.dtype for t in seen} == {torch.int64}


@pytest.mark.parametrize("first, second, both", [
    ([1, 3, 4], [1, 3], [1, 4]), ([1, 3, 4], [2], [3]), ([2, 4], [1, 2], [2, 4]), ([1, 2, 3, 4], [2, 3], [2, 3]),
], ids=str)  # fmt: skip
def test_iddpm_eq19_respacing_twice_is_respacing_once(first, second, both):
    """The second list counts the timesteps of the first."""
    d, xt, t = ddpm.Diffusion(BRUTAL), normal(2, 1), torch.tensor([1, len(second)])

    def model(xt, t):
        return xt * t[:, None]

    twice, d_twice = improved.respaced(*improved.respaced(model, d, first), second)
    once, d_once = improved.respaced(model, d, both)
    same("the model's output", twice(xt, t), once(xt, t))
    close("beta", d_twice.beta, d_once.beta, 1e-14)
    close("alpha_bar", d_twice.alpha_bar, d_once.alpha_bar, 1e-14)


def test_iddpm_eq19_a_beta_near_1_is_kept():
    """A longer step of variance 0.9999 has no other limit than 1."""
    beta = np.array([0, 0.5, 0.9999, 0.3, 0.99, 0.999])
    for timesteps in ([1, 2], [2, 3], [3, 5], [5]):
        _, d = improved.respaced(None, ddpm.Diffusion(beta), timesteps)
        close(f"beta' of {timesteps}", d.beta, ref.respaced_beta(beta, timesteps), 1e-12)


def test_iddpm_eq19_timesteps_that_do_not_increase_in_1_to_T_are_rejected():
    for timesteps in ([], [2, 2], [3, 1], [0, 4], [-1], [-4, 2], [5]):
        with rejected(f"the timesteps {timesteps}"):
            improved.respaced(None, ddpm.Diffusion(BRUTAL), timesteps)


@in_float64
def test_iddpm_eq19_a_step_that_leaves_nothing_of_the_image_is_a_step_too():
    """1 - alpha_bar_t / alpha_bar_s rounds to 1 for t = 8000 of a linear schedule; beta must be below 1."""
    d = ddpm.Diffusion(ref.linear_beta(8000))
    model, few = improved.respaced(joined(lambda xt, t: 0.1 * xt, 0.5), d, [8000])
    got = improved.sample_ancestral(model, few, normal(3, 2))
    assert got.isfinite().all(), f"x0 = {got.tolist()}"


@in_float64
@pytest.mark.parametrize("T, timesteps", [(4000, [4000]), (4000, [2000, 4000]), (8000, [1, 8000])])
def test_iddpm_eq19_alpha_bar_keeps_its_value_where_beta_is_almost_1(T, timesteps):
    """1 - beta has lost the digits of alpha_bar_t / alpha_bar_s = 1e-18. eq. 4, 15 and 7 at xt = 0 need them."""
    d = ddpm.Diffusion(ref.linear_beta(T))
    _, few = improved.respaced(lambda xt, t: xt, d, timesteps)
    one = f64([1.0])
    zero = f64([0.0])
    before = one
    for i, t in enumerate(timesteps, 1):
        after = d.q_sample(one, t, zero)
        close(f"sqrt(alpha_bar_{t})", few.q_sample(one, i, zero), after, 1e-14)
        close(f"1 / sqrt(alpha_bar_{t})", few.x0_from_eps(one, i, zero), 1 / after, 1e-14)
        want = before * (1 - (after / before) ** 2) / (1 - after**2)
        close("eq. 7, coefficient of x0", few.posterior_mean(one, zero, i), want, 1e-14)
        before = after


@pytest.mark.parametrize("timesteps", [[2, 4], [3]], ids=str)
def test_iddpm_eq19_a_training_step_on_the_timesteps_works_as_on_all(timesteps):
    """The same xt at alpha_bar_{t_i}, and the same L_simple."""
    d, x0, eps = ddpm.Diffusion(BRUTAL), normal(3, 1), normal(3, 1, seed=1)
    t = torch.tensor([1, len(timesteps), len(timesteps)])

    def model(xt, t):
        return xt * t[:, None]

    respaced, few = improved.respaced(model, d, timesteps)
    got = ddpm.loss_simple(respaced, few, x0, t, eps)
    want = ddpm.loss_simple(model, d, x0, torch.tensor(timesteps)[t - 1], eps)
    close("L_simple", got, want, 1e-13)


# --- One step with a learned variance -------------------------------------------------------------


@given(case=cases(), v=fractions)
def test_a_step_with_a_learned_variance_is_eq7_at_the_predicted_x0_plus_noise(case, v):
    """x_{t-1} = mu_theta + sigma_t z with sigma_t of iDDPM eq. 15 for t > 1, and without z at t = 1."""
    d, t = ddpm.Diffusion(case.beta), case.t
    x0, xt = f64([0.4], [-0.9]), f64([1.2], [-0.8])
    eps = d.eps_from_x0(xt, t, x0)
    got = improved.ancestral_step(d, xt, t, eps, torch.full_like(xt, v), clip=False, noise=noise(2))
    k_0, k_t, _ = ref.posterior(case.beta, t)
    sigma = ref.learned_variance(case.beta, t, v) ** 0.5 if t > 1 else 0.0
    want = k_0 * x0 + k_t * xt + sigma * noise(2)(xt)
    signal, _ = ref.forward_moments(case.beta)
    slack = 8 * (tolerance(case) + 1e2 * EPS) + log_slack(case, v)
    close("x_{t-1}", got, want, slack, 8 * (1 + k_0 / signal[t] + sigma))


def test_a_step_with_a_learned_variance_clips_x0_and_gives_every_pixel_its_own_variance():
    d, xt, v = ddpm.Diffusion(BRUTAL), normal(3, 2, 4), normal(3, 2, 4, seed=1)
    for t in (4, 3, 2, 1):
        eps = d.eps_from_x0(xt, t, torch.full_like(xt, 3.0))
        k_0, k_t, _ = ref.posterior(BRUTAL, t)
        want = k_0 * 1.0 + k_t * xt
        if t > 1:
            sigma2 = torch.from_numpy(ref.learned_variance(BRUTAL, t, v.numpy()))
            want = want + sigma2.sqrt() * noise(2)(xt)
        got = improved.ancestral_step(d, xt, t, eps, v, noise=noise(2))
        close(f"x_{t - 1}", got, want, 1e-12, 1 + want.abs())


@edge
def test_a_step_with_a_learned_variance_asks_for_no_noise_at_t_1():
    """`noise` is not called, so the step uses up no random numbers there."""
    d, x, calls = ddpm.Diffusion(BRUTAL), normal(2, 3), []

    def counted(x):
        calls.append(tuple(x.shape))
        return torch.ones_like(x)

    for t in (4, 3, 2, 1):
        improved.ancestral_step(d, x, t, x, x, noise=counted)
    assert calls == [(2, 3)] * 3, f"noise was called with the shapes {calls}"


# --- Sampling with learned variances --------------------------------------------------------------


@pytest.mark.parametrize("start", [None, 4, 2, 1, 0])
@pytest.mark.parametrize("clip", [True, False])
def test_sampling_with_learned_variances_is_steps_from_the_start_to_1(start, clip):
    """The same noise and the same model give the same states. The start is T by default."""
    d, xt, states, z = ddpm.Diffusion(BRUTAL), normal(3, 2), [], noise(2)
    how = {} if start is None else {"start": start}

    def eps(xt, t):
        return torch.tanh(xt) / t[:, None]

    got = improved.sample_ancestral(
        joined(eps, 0.3), d, xt, clip=clip, noise=noise(2), **how,
        on_step=lambda s, xs: states.append((s, xs)),
    )  # fmt: skip
    steps = range(4 if start is None else start, 0, -1)
    assert [s for s, _ in states] == [t - 1 for t in steps], f"on_step got {[s for s, _ in states]}"
    for i, t in enumerate(steps):
        v = torch.full_like(xt, 0.3)
        output = eps(xt, torch.full((3,), t))
        xt = improved.ancestral_step(d, xt, t, output, v, clip=clip, noise=z)
        close(f"x_{t - 1}", states[i][1], xt, 1e-13, 1 + xt.abs())
    close("x0", got, xt, 1e-13, 1 + xt.abs())


@pytest.mark.parametrize("start", [5, -1])
def test_sampling_with_learned_variances_rejects_a_start_outside_0_and_T(start):
    model = joined(lambda xt, t: xt, 0.3)
    with rejected(f"start = {start} for T = 4"):
        improved.sample_ancestral(model, ddpm.Diffusion(BRUTAL), normal(1, 1), start=start)


@fewer
@every_short_case
def test_sampling_with_v_0_or_1_is_algorithm2_with_beta_tilde_or_beta(case):
    """The same noise, the same samples."""
    d, xT = ddpm.Diffusion(case.beta), normal(3, 2)

    def eps(xt, t):
        return torch.tanh(xt)

    for v, sigma2 in ((0.0, d.beta_tilde), (1.0, d.beta)):
        fixed = ddpm.sample_ancestral(eps, d, xT, sigma2, noise=noise())
        got = improved.sample_ancestral(joined(eps, v), d, xT, noise=noise())
        close(f"x0 with v = {v:g}", got, fixed, 64 * (tolerance(case) + 32 * EPS), 1.0)


@pytest.mark.parametrize("v", [-1.0, 2.0])
def test_sampling_and_bound_take_v_as_it_is_outside_0_1_too(v):
    """eq. 15 as printed has no limits: they are Algorithm 2 and eq. 5 with its table of variances."""
    d, xT = ddpm.Diffusion(BRUTAL), normal(3, 2)
    x0 = torch.from_numpy(level(np.array([[3, 99], [200, 255]])))
    sigma2 = f64(0, *(float(ref.learned_variance(BRUTAL, t, v)) for t in range(1, 5)))

    def eps(xt, t):
        return torch.tanh(xt)

    model = joined(eps, v)
    fixed = ddpm.sample_ancestral(eps, d, xT, sigma2, noise=noise())
    close("x0", improved.sample_ancestral(model, d, xT, noise=noise()), fixed, 1e-12, 10.0)
    fixed, learned = improved.bound_terms(model, d, x0, [sigma2], noise=noise())
    close("L_1 .. L_T", learned[:, 1:], fixed[:, 1:], 1e-12, 1 + fixed[:, 1:].abs())


@pytest.mark.parametrize("timesteps", [[1, 2, 3, 4], [1, 3, 4], [2, 4], [4], [2]], ids=str)
def test_sampling_with_the_exact_variance_ends_as_predicted_on_any_timesteps(timesteps):
    """Exact eps of N(0.5, 0.25), and Var(x_s | x_t) of the steps between the timesteps."""
    model, d = improved.respaced(gaussian_model(BRUTAL), ddpm.Diffusion(BRUTAL), timesteps)
    beta = ref.respaced_beta(BRUTAL, timesteps)
    sigma2 = exact_variances(beta)
    moments = exact_models.ancestral_moments(beta, sigma2, MEAN, VAR)
    learned = joined(model, fractions_of(beta, sigma2))
    got = improved.sample_ancestral(learned, d, normal(N, 1), clip=False, noise=noise())
    has_normal_moments("x0", got, *moments)


def test_sampling_statistics_reject_the_variances_of_other_timesteps():
    """Negative control: v as on all T timesteps, sigma^2 of single steps for steps of two."""
    beta = ref.respaced_beta(BRUTAL, [2, 4])
    moments = exact_models.ancestral_moments(beta, exact_variances(beta), MEAN, VAR)
    wrong = torch.from_numpy(np.array([0.0, *exact_variances(BRUTAL)[[2, 4]]]))
    model, d = improved.respaced(gaussian_model(BRUTAL), ddpm.Diffusion(BRUTAL), [2, 4])
    got = ddpm.sample_ancestral(model, d, normal(N, 1), wrong, clip=False, noise=noise())
    assert rejects(has_normal_moments, "x0", got, *moments)


def test_sampling_gives_every_pixel_its_own_variance():
    """v = 0 for half of the pixels, v = 1 for the others: x_1 has beta_tilde_2 and beta_2 around the mean."""
    d, states, xT = ddpm.Diffusion(BRUTAL[:3]), {}, f64([[0.7]]).repeat(N, 1, 2)

    def model(xt, t):
        return torch.cat([0.4 + 0 * xt, f64([[0, 1]]).expand_as(xt)], dim=1)

    improved.sample_ancestral(model, d, xT, clip=False, noise=noise(), on_step=states.__setitem__)
    mean = d.p_mean(f64(0.7), 2, f64(0.4), clip=False).item()
    for pixel, v in enumerate((0, 1)):
        sigma2 = ref.learned_variance(BRUTAL[:3], 2, v)
        has_normal_moments(f"x_1 where v = {v}", states[1][:, 0, pixel], mean, float(sigma2))


def test_sampling_with_learned_variances_calls_the_model_and_clips_as_algorithm2():
    """One call at each t = T .. 1 with the last x; x0 inside [-1, 1] unless clip=False; no noise at t = 1;
    no graph."""
    d, calls, states = ddpm.Diffusion(BRUTAL), [], []
    w = torch.ones((), dtype=torch.float64, requires_grad=True)

    def model(xt, t):
        calls.append((t.tolist(), xt))
        return torch.cat([9 * w * xt, 0.5 + 0 * xt], dim=1)

    xT = normal(5, 1)
    x0 = improved.sample_ancestral(
        model, d, xT, noise=noise(), on_step=lambda s, xs: states.append(xs)
    )
    got = [t for t, _ in calls]
    assert got == [[t] * 5 for t in (4, 3, 2, 1)], f"the model was called at t = {got}"
    same("xt of the model", torch.stack([xt for _, xt in calls]), torch.stack([xT, *states[:-1]]))
    assert not x0.requires_grad
    assert x0.abs().max() <= 1 + 1e-12, f"clipped: largest value {x0.abs().max():g}"
    free = improved.sample_ancestral(model, d, xT, clip=False, noise=noise())
    assert free.abs().max() > 2, f"clip=False: largest value {free.abs().max():g}"
    one, samples = ddpm.Diffusion([0, 0.5]), []
    for number in (1, 2):
        samples.append(improved.sample_ancestral(model, one, normal(3, 1), noise=noise(number)))
    same("x0 of T = 1 with other noise", *samples)


def test_training_sampling_and_bound_are_the_same_on_another_device():
    """As the property of ancestral sampling: the CPU's numbers bit for bit, with t and labels on the images'
    device; only the bound reads values back."""
    d, x = ddpm.Diffusion(BRUTAL), (torch.arange(6).reshape(2, 3) / 2.5 - 1).clamp(-1, 1)

    def net(xt, t, y=None):
        assert xt.device == t.device == (t if y is None else y).device, "xt, t and y on two devices"
        return torch.cat([xt / t[:, None], xt if y is None else xt + y[:, None]], dim=1)

    def results(x, y):
        seed()
        few, short = improved.respaced(net, d, [2, 4])
        each = improved.guided(net, y, 3, torch.tensor([0.5, 2.0], device="cpu"))
        return dict(
            loss=improved.loss_hybrid(net, d, x),
            x0=improved.sample_ancestral(net, d, x),
            x0_respaced=improved.sample_ancestral(few, short, x),
            labels=improved.drop_labels(y, 3),
            x0_guided=improved.sample_ancestral(improved.guided(net, y, 3, 0.5), d, x),
            x0_guided_each=improved.sample_ancestral(each, d, x),
        )

    far.agrees(results, x, torch.tensor([0, 1]))
    bound = improved.bound_terms(net, d, x, noise=noise())
    with far.device(), torch.device("far"):
        same("bound", improved.bound_terms(net, d, x.to("far"), noise=noise()), bound)


def test_sampling_stays_in_float32_with_a_network_in_bfloat16():
    """Its output is rounded; x_t and the tables are not: as with its numbers as float32."""
    d, xT = ddpm.Diffusion(BRUTAL), normal(3, 2).float()

    def model(xt, t):
        assert xt.dtype == torch.float32
        return torch.cat([0.3 * xt, 0.4 * xt], dim=1).bfloat16()

    x0 = improved.sample_ancestral(model, d, xT, noise=noise())
    as_float32 = improved.sample_ancestral(lambda xt, t: model(xt, t).float(), d, xT, noise=noise())
    same("x0", x0, as_float32)


# --- The bound with learned variances -------------------------------------------------------------


def fixed_terms(d, k, eps, sigma2, seen, clip=True):
    """L_0 .. L_T of a table of variances for images of levels k, at the xt that a model has received."""
    beta = d.beta.numpy()
    terms = []
    for t in range(1, d.T + 1):
        xt = seen[t]
        mean = d.p_mean(xt, t, eps(xt, torch.full((len(xt),), t)), clip=clip)
        var = ref.decoder_variance(beta) if t == 1 else sigma2[t].item()
        terms.append(ref.bound_term(beta, t, k, xt.numpy(), mean.numpy(), var).mean(1) / LN2)
    terms.append(ref.prior_term(beta, k).mean(1) / LN2)
    return np.stack(terms, axis=1)


def test_bound_has_a_row_for_each_fixed_variance_and_one_for_the_learned_at_the_same_xt():
    """The fixed rows are those of the bound with fixed variances; v = 0 and v = 1 have the same rows again,
    except v = 1 at t = 1."""
    k = np.array([[3, 250], [77, 130]])
    d, x0 = ddpm.Diffusion(MILD), torch.from_numpy(level(k))

    def eps(xt, t):
        return -2.0 * xt

    for v, row in ((1.0, 0), (0.0, 1)):
        model, seen = recorded(joined(eps, v))
        got = improved.bound_terms(model, d, x0, [d.beta, d.beta_tilde], noise=noise())
        assert got.shape == (3, 2, 6), f"shape {tuple(got.shape)}, want (3, 2, 6)"
        assert got.dtype == torch.float64
        fixed = np.stack([fixed_terms(d, k, eps, table, seen) for table in (d.beta, d.beta_tilde)])
        close("fixed rows", got[:2], fixed, 1e-12, 1 + abs(fixed))
        close(
            f"L_1 .. L_T with v = {v:g}",
            got[2, :, 1:],
            fixed[row, :, 1:],
            1e-12,
            1 + fixed[row, :, 1:],
        )
        if v == 0:
            close("L_0 with v = 0", got[2, :, 0], fixed[1, :, 0], 1e-12)
    alone = improved.bound_terms(model, d, x0, noise=noise())
    same("the learned row alone", alone[0], got[2])
    free = improved.bound_terms(model, d, x0, [d.beta], clip=False, noise=noise())[0]
    want = fixed_terms(d, k, eps, d.beta, seen, clip=False)
    close("unclipped", free, want, 1e-12, 1 + abs(want))
    assert abs(free.numpy() - fixed[0]).max() > 1e-3, "clipping does not matter here"


def test_bound_with_learned_variances_clips_and_rejects_as_the_other():
    """The predicted x0 is clipped, unless clip=False; one invalid image is rejected; no graph."""
    d, white = ddpm.Diffusion(BRUTAL), torch.ones(4, 1, dtype=torch.float64)
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    model = joined(lambda xt, t: w * d.eps_from_x0(xt, t, 3 * torch.ones_like(xt)), 0.0)
    clipped = improved.bound_terms(model, d, white, noise=noise())
    close("L_1 .. L_{T-1}", clipped[0, :, 1:-1], 0, 1e-12, 1.0)
    free = improved.bound_terms(model, d, white, clip=False, noise=noise())
    assert (free[0, :, 1:-1] > 0.05).all()
    assert not clipped.requires_grad
    for pixel in (0.33, 1 + 2 / 255, np.nan):
        with rejected(f"a pixel of {pixel} in one of four images"):
            improved.bound_terms(model, d, torch.where(torch.arange(4)[:, None] == 2, pixel, white))
    for bad in (-0.1, np.nan):
        with rejected(f"sigma2 of {bad} at t = 2"):
            improved.bound_terms(model, d, white, [f64(0, 0.1, bad, 0.2, 0.3)])


def test_bound_with_learned_variances_clips_x0_at_t_1_too():
    """L_0 of the fixed variance is that of the bound without v; without clipping it would differ."""
    k = np.array([[200], [90]])
    d, x0 = ddpm.Diffusion(BRUTAL), torch.from_numpy(level(k))

    def eps(xt, t):
        return d.eps_from_x0(xt, t, 3 * torch.ones_like(xt))

    model, seen = recorded(joined(eps, 0.0))
    got = improved.bound_terms(model, d, x0, [d.beta], noise=noise())[0, :, 0]
    want = fixed_terms(d, k, eps, d.beta, seen)[:, 0]
    close("L_0", got, want, 1e-11, abs(want))
    free = improved.bound_terms(model, d, x0, [d.beta], clip=False, noise=noise())
    assert (abs(free[0, :, 0].numpy() - want) > 0.1).all(), "clipping does not matter here"


@fewer
@given(case=cases(), s2=st.floats(0, 1))
def test_bound_of_the_exact_variance_is_never_above_that_of_beta_or_beta_tilde(case, s2):
    """Gaussian data, exact eps: L_{t-1} with sigma^2 = Var(x_{t-1} | x_t) is what is predicted, and is at
    most that of either end of eq. 15; so for every t, and for the bound."""
    if case.t == 1:
        return
    d, (x0, _, xt, exact) = ddpm.Diffusion(case.beta), four_nodes(case, 0.3, s2)
    best = exact_models.exact_variance_gaussian(case.beta, case.t, s2)
    terms = {}
    for name, v in (
        ("learned", fraction(case.beta, case.t, best)),
        ("beta_tilde", 0.0),
        ("beta", 1.0),
    ):
        sigma2 = ref.learned_variance(case.beta, case.t, v)
        v = torch.full_like(xt, v)
        term = improved.bound_term(d, x0, xt, case.t, exact, v, clip=False).mean()
        want = exact_models.kl_term_gaussian(case.beta, case.t, s2, sigma2) / LN2
        slack = node_slack(case, ref.posterior(case.beta, case.t)[2]) * max(1, best / sigma2)
        scale = 1 + abs(np.log(sigma2)) + best / sigma2
        close(f"L_{case.t - 1} of {name}", term, want, slack, scale)
        terms[name] = term
    least = min(terms["beta"], terms["beta_tilde"]) + slack * (1 + abs(np.log(best)))
    assert terms["learned"] <= least, f"learned {terms['learned']:g}, fixed {least:g}"


def best_variances(beta, levels, weights):
    """The table of variances of least expected bound, for the exact eps of scalars on a few levels.

    For t > 1, L_{t-1} = (log sigma^2 + M / sigma^2) / 2 plus a constant, where M is the mean square of
    x_{t-1} around mu_theta. So M is the best, and one value of L_{t-1} gives it; the decoder's is searched.
    """

    def decoder(v):
        sigma2 = ref.learned_variance(beta, 1, v)
        return exact_models.expected_bound_term(beta, 1, sigma2, levels, weights)

    table = [np.nan, ref.learned_variance(beta, 1, optimize.minimize_scalar(decoder, (-3, 2)).x)]
    for t in range(2, len(beta)):
        low = ref.posterior(beta, t)[2]
        term = exact_models.expected_bound_term(beta, t, low, levels, weights)
        table.append(low * (2 * term + 1))
    return np.array(table)


def test_bound_of_the_best_learned_variances_is_as_predicted_and_below_both_fixed_ones():
    """Scalars on three levels, exact eps: every term by Monte Carlo agrees with quadrature; the sum is
    below that of beta and of beta_tilde, and still above the entropy."""
    sigma2 = best_variances(MILD, LEVELS, WEIGHTS)
    want = exact_models.expected_bound_terms(MILD, sigma2, sigma2[1], LEVELS, WEIGHTS)
    k = np.random.default_rng(2000 + checks.SEED).choice(LEVELS, p=WEIGHTS, size=20_000)
    x0 = torch.from_numpy(level(k))[:, None]
    d, model = ddpm.Diffusion(MILD), joined(exact_model(MILD), fractions_of(MILD, sigma2))
    terms = improved.bound_terms(model, d, x0, [d.beta, d.beta_tilde], clip=False, noise=noise(3))
    for t in range(d.T):
        has_mean(f"L_{t}", terms[2, :, t], want[t])
    total = terms.sum(2).mean(1)
    assert exact_models.entropy_bits(WEIGHTS) < total[2] < total[:2].min() - 0.01, total
    assert rejects(has_mean, "L_1 with v = 0", terms[1, :, 1], want[1])


# --- Guidance -------------------------------------------------------------------------------------

CLASSES = [((1.0,), (-0.6,), (0.02,)), ((0.5, 0.5), (0.1, 0.7), (0.05, 0.2))]  # each a mixture
EVERYONE = (0.3, 0.35, 0.35), (-0.6, 0.1, 0.7), (0.02, 0.05, 0.2)  # 30% and 70% of them
NONE = len(CLASSES)
WEIGHTS_OF_GUIDANCE = [-1.0, -2.5, 0.0, 0.7, 3.0]


class Labelled:
    """The exact network of two classes, (xt, t, y) -> eps, where y = 2 is "no label"; it counts its calls."""

    def __init__(self, beta, v=None):
        self.beta, self.v, self.calls = beta, v, []

    def __call__(self, xt, t, y):
        self.calls.append(len(xt))
        rows = []
        for x, step, k in zip(xt, t.tolist(), y.tolist()):
            data = [*CLASSES, EVERYONE][k]
            rows.append(
                torch.from_numpy(exact_models.eps_mixture(self.beta, step, x.numpy(), *data))
            )
        eps = torch.stack(rows)
        return eps if self.v is None else torch.cat([eps, self.v[y][:, None] + 0 * xt], dim=1)


@given(case=cases(), w=st.floats(-3, 5), x=st.lists(st.floats(-3, 3), min_size=2, max_size=2))
def test_cfg_eq6_eps_is_the_score_of_the_class_to_the_1_plus_w_over_the_datas_to_the_w(case, w, x):
    """eps = (1 + w) eps(xt, y) - w eps(xt) is -sqrt(1 - alpha_bar) d/dx log p(xt | y)^(1+w) p(xt)^-w."""
    y, xt = torch.tensor([0, 1]), f64(*x)[:, None]
    net = Labelled(case.beta)
    got = improved.guided(net, y, NONE, w)(xt, torch.tensor([case.t] * 2))
    want = []
    for k in (0, 1):
        want.append(
            exact_models.guided_eps(case.beta, case.t, np.array(x[k]), w, CLASSES[k], EVERYONE)
        )
    _, variance = ref.forward_moments(case.beta)
    scale = (1 + abs(w)) * (10 + abs(np.array(x))) / variance[case.t] ** 0.5 / 0.02
    close("eps", got[:, 0], want, tolerance(case) + 1e2 * EPS, scale)


def test_cfg_eq6_means_that_w_0_is_conditional_and_w_minus_1_is_unconditional():
    """The formula itself, also just beside the two values of w that need a call of half the size; w = 1 here
    is 2 in the other convention."""
    y, xt, t = torch.tensor([0, 1, 1]), f64([0.3], [-0.7], [1.2]), torch.tensor([2, 2, 2])
    net = Labelled(BRUTAL)
    one, none = net(xt, t, y), net(xt, t, torch.full_like(y, NONE))
    for w, want, tol in (
        (1e-12, one, 1e-10), (-1 + 1e-12, none, 1e-10), (1.0, 2 * one - none, 1e-14),
        (-0.5, (one + none) / 2, 1e-14), (-2.0, 2 * none - one, 1e-14), (20.0, 21 * one - 20 * none, 1e-12),
    ):  # fmt: skip
        got = improved.guided(net, y, NONE, w)(xt, t)
        close(f"eps at w = {w}", got, want, tol, 1 + abs(one))
    same("eps by default", improved.guided(net, y, NONE)(xt, t), one)
    assert (one - none).abs().max() > 0.01, "the labels do not matter"


def test_cfg_eq6_each_image_may_have_its_own_w():
    """A tensor w (B,): each image is the one that it is alone, with w as a number."""
    y, xt = torch.tensor([0, 1, 1, 0, 1]), normal(5, 2, 3)
    t = torch.tensor([2, 4, 1, 3, 2])
    net = Labelled(BRUTAL)
    for dtype in (torch.float32, torch.float64):
        w = torch.tensor(WEIGHTS_OF_GUIDANCE, dtype=dtype)
        got = improved.guided(net, y, NONE, w)(xt, t)
        for i in range(5):
            part = slice(i, i + 1)
            alone = improved.guided(net, y[part], NONE, w[i].item())(xt[part], t[part])
            close(f"eps of image {i}", got[i], alone[0], 1e-13, 1 + abs(alone).max())
    for w in (torch.tensor(0.7), torch.tensor([0.7])):
        got = improved.guided(net, y, NONE, w)(xt, t)
        close(
            f"eps for w = {w}", got, improved.guided(net, y, NONE, 0.7)(xt, t), 1e-6, 1 + abs(got)
        )


@pytest.mark.parametrize(
    "w", [torch.zeros(2), torch.zeros(4), torch.zeros(0)], ids=lambda w: f"{len(w)}"
)
def test_cfg_eq6_rejects_a_w_that_is_not_one_number_or_one_for_each_image(w):
    y, xt, t = torch.tensor([0, 1, 1]), normal(3, 1), torch.tensor([2, 2, 2])
    with rejected(f"{len(w)} values of w for 3 images"):
        improved.guided(Labelled(BRUTAL), y, NONE, w)(xt, t)


@pytest.mark.parametrize("images", [1, 2, 4])
def test_cfg_eq6_rejects_conditions_for_another_number_of_images(images):
    xt, t = normal(images, 1), torch.full((images,), 2)
    for w in (0.0, -1.0, 1.5):
        with rejected(f"3 labels for {images} images, w = {w}"):
            improved.guided(Labelled(BRUTAL), torch.tensor([0, 1, 1]), NONE, w)(xt, t)


CONDITIONS = {
    "vectors": (lambda: normal(3, 5, seed=1), 0.0),
    "vectors, their null value a vector": (lambda: normal(3, 5, seed=1), normal(5, seed=2)),
    "vectors, their null value of shape (1, 5)": (lambda: normal(3, 5, seed=1), normal(1, 5, seed=2)),
    "vectors, a null value for each image": (lambda: normal(3, 5, seed=1), normal(3, 5, seed=2)),
    "images": (lambda: normal(3, 2, 4, 6, seed=1), -1.0),
    "images, their null value one image": (lambda: normal(3, 2, 4, 6, seed=1), normal(2, 4, 6, seed=2)),
    "several labels": (lambda: torch.tensor([[0, 1], [2, 2], [1, 0]]), 3),
    "several labels, each with its null value": (
        lambda: torch.tensor([[0, 1], [2, 2], [1, 0]]), torch.tensor([3, 4])),
}  # fmt: skip


@pytest.mark.parametrize("what", CONDITIONS)
@pytest.mark.parametrize("w", [0.0, -1.0, 1.5, -2.0, "each"])
def test_cfg_eq6_conditions_may_have_any_shape(what, w):
    """y (B, ...), and a null value that broadcasts to y: the network receives both in y's shape and dtype."""
    make, none = CONDITIONS[what]
    y, xt, t = make(), normal(3, 2, 4, 6), torch.tensor([4, 1, 2])
    w = torch.tensor([0.3, -2.0, 2.0]) if w == "each" else w

    def net(xt, t, y):
        assert y.shape[1:] == make().shape[1:], f"conditions of shape {tuple(y.shape)}"
        assert y.dtype == make().dtype, f"conditions of {y.dtype}"
        assert xt.dtype == torch.float64, f"xt of {xt.dtype}"
        places = torch.arange(1, 1 + y[0].numel(), dtype=torch.float64)
        number = torch.tanh(y.flatten(1).double() @ places / 10)
        return torch.sin(xt * t[:, None, None, None]) + number[:, None, None, None]

    null = torch.as_tensor(none, dtype=y.dtype).expand_as(y)
    weight = torch.as_tensor(w, dtype=torch.float64).reshape(-1, 1, 1, 1)
    want = (1 + weight) * net(xt, t, y) - weight * net(xt, t, null)
    got = improved.guided(net, y, none, w)(xt, t)
    close("eps", got, want, 1e-6 if torch.is_tensor(w) else 1e-13, 4.0)
    same("y", y, make())


def a_network(variances=False):
    """A small labelled UNet in float32, with random weights, whose labels matter."""
    seed(3)
    net = ddpm.UNet(1, 2 if variances else 1, ch=8, mult=(1, 2), blocks=1, groups=4, num_classes=3)
    for p in net.parameters():
        torch.nn.init.normal_(p, 0, 0.1)
    return net.eval()


@pytest.mark.parametrize("w", [0.0, -1.0, torch.zeros(4), -torch.ones(4)],
                         ids=["0", "-1", "0 for each", "-1 for each"])  # fmt: skip
@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "learned"])
def test_cfg_eq6_at_w_0_and_minus_1_samples_as_conditional_and_unconditional_bit_for_bit(
    sampler, w
):
    net, y, d = a_network(sampler == "learned"), torch.tensor([0, 2, 1, 1]), ddpm.Diffusion(BRUTAL)
    xT = normal(4, 1, 4, 4).float()

    def sample(model):
        if sampler == "ddim":
            return ddpm.sample_ddim(model, d, xT, [1, 2, 4], eta=0.5, noise=noise())
        if sampler == "learned":
            return improved.sample_ancestral(model, d, xT, noise=noise())
        return ddpm.sample_ancestral(model, d, xT, noise=noise())

    conditional = sample(lambda xt, t: net(xt, t, y))
    unconditional = sample(lambda xt, t: net(xt, t))
    is_conditional = float(torch.as_tensor(w).max()) == 0
    same(
        "x0",
        sample(improved.guided(net, y, 3, w)),
        conditional if is_conditional else unconditional,
    )
    assert not torch.equal(conditional, unconditional), "the labels do not matter"


def test_cfg_eq6_calls_the_network_once_a_step():
    """2 B images with and without their labels; B at w = 0 and w = -1, where half would not be used."""
    y, xt, t = torch.tensor([0, 1, 0]), normal(3, 1), torch.tensor([2, 2, 2])
    for w, images in (
        (1.5, 6), (-0.5, 6), (0.0, 3), (-1.0, 3), (torch.tensor([0.0, 1.0, -1.0]), 6), (torch.zeros(3), 3),
    ):  # fmt: skip
        net = Labelled(BRUTAL)
        improved.guided(net, y, NONE, w)(xt, t)
        assert net.calls == [images], f"w = {w}: calls of {net.calls} images, want {images}"


@pytest.mark.parametrize("w", [0.0, -1.0, 1.0])
def test_cfg_eq6_gives_each_image_its_own_t_in_every_call(w):
    """In both halves of the call, and in the next call with other images and t."""
    y = torch.tensor([0, 1])
    model = improved.guided(lambda xt, t, y: xt * t[:, None] + 10.0 * y[:, None], y, 2, w)
    for number, t in enumerate(([3, 7], [4, 4], [1, 2])):
        xt, t = normal(2, 1, seed=number), torch.tensor(t)
        want = xt * t[:, None] + 10.0 * ((1 + w) * y - w * 2)[:, None]
        close(f"eps of call {number + 1}", model(xt, t), want, 1e-14, 40.0)  # of the terms


def test_cfg_eq6_a_guided_sample_is_that_of_the_formula_at_each_step():
    """A whole run with a network that depends on t, compared with a model that is written out."""
    d, xT, y, w = ddpm.Diffusion(BRUTAL), normal(3, 2), torch.tensor([0, 1, 0]), 1.5
    net = Labelled(BRUTAL)
    null = torch.full_like(y, NONE)

    def formula(xt, t):
        return (1 + w) * net(xt, t, y) - w * net(xt, t, null)

    want = ddpm.sample_ancestral(formula, d, xT, noise=noise(2))
    got = ddpm.sample_ancestral(improved.guided(net, y, NONE, w), d, xT, noise=noise(2))
    close("x0", got, want, 1e-11, 10.0)


def test_cfg_eq6_is_computed_in_the_precision_of_the_images():
    """A network in bfloat16 rounds eps to 8 bits; their difference, times w, is not rounded to 8 again."""
    y, xt, t = torch.tensor([0, 1]), normal(2, 3).float(), torch.tensor([2, 2])

    def net(xt, t, y):
        return (xt + y[:, None] / 3).bfloat16()

    eps, eps_none = net(xt, t, y).float(), net(xt, t, torch.full_like(y, NONE)).float()
    same("eps", improved.guided(net, y, NONE, 5.0)(xt, t), 6 * eps - 5 * eps_none)
    each = torch.tensor([5.0, 2.0])
    want = (1 + each)[:, None] * eps - each[:, None] * eps_none
    same("eps for each w", improved.guided(net, y, NONE, each)(xt, t), want)


@pytest.mark.parametrize("w", [2.0, torch.tensor([0.5, 2.0])], ids=["one w", "w for each"])
def test_cfg_eq6_guides_eps_and_keeps_the_learned_variance_of_the_class(w):
    """v is that of y; its extrapolation would leave the range of eq. 15."""
    y, xt, t = torch.tensor([1, 0]), normal(2, 1), torch.tensor([3, 3])
    with_v, without = Labelled(BRUTAL, v=f64(0.2, 0.7, 0.9)), Labelled(BRUTAL)
    got = improved.guided(with_v, y, NONE, w)(xt, t)
    same("eps", got[:, :1], improved.guided(without, y, NONE, w)(xt, t))
    same("v", got[:, 1], f64(0.7, 0.2))


@pytest.mark.parametrize("variances", [False, True], ids=["eps", "eps and v"])
def test_cfg_eq6_guides_every_channel_of_eps(variances):
    """Five channels, and none keeps the value for the class."""
    y, xt, t = torch.tensor([0, 1]), normal(2, 5, 3), torch.tensor([2, 2])
    outputs = normal(NONE + 1, 10 if variances else 5, 3, seed=1)
    got = improved.guided(lambda xt, t, y: outputs[y], y, NONE, 1.5)(xt, t)
    want = 2.5 * outputs[y, :5] - 1.5 * outputs[NONE, :5]
    close("eps", got[:, :5], want, 1e-13, 10.0)


@pytest.mark.parametrize("classes", [2, 7, 1000])
def test_cfg_algorithm1_drops_each_label_on_its_own_with_probability_p(classes):
    """A tenth by default; neighbours both dropped in p^2 of the cases, which differs for whole batches; each
    label as often as any other."""
    y = torch.arange(100_000) % classes
    got = improved.drop_labels(y, classes, noise=noise())
    dropped = (got == classes).double()
    has_mean("share of labels dropped", dropped, 0.1)
    for apart in (1, 2, 500):
        blocks = dropped[: 100_000 // (2 * apart) * 2 * apart].reshape(-1, 2, apart)
        both = blocks[:, 0] * blocks[:, 1]  # 50,000 pairs that do not overlap
        has_mean(f"share of labels {apart} apart both dropped", both, 0.01)
    has_mean("label of those dropped", y[got == classes], (classes - 1) / 2)
    same("labels that are kept", got[got != classes], y[got != classes])


def test_cfg_algorithm1_drops_any_number_of_labels_of_a_batch():
    """500 batches of four labels, dropped with p = 1/2: none to all of them. A count is missing with a
    probability of (15/16)^500 = 1e-14."""
    batches, z = [], noise(4)
    for _ in range(500):
        batches.append(improved.drop_labels(torch.arange(4), 7, p=0.5, noise=z))
    dropped = torch.stack(batches) == 7
    counts = dropped.sum(1).bincount(minlength=5)
    assert (counts > 0).all(), f"batches with 0 .. 4 labels dropped: {counts.tolist()}"
    for i in range(4):
        has_mean(f"share of batches whose label {i} is dropped", dropped[:, i].double(), 0.5)


def test_cfg_algorithm1_drops_labels_with_exactly_the_probability_p():
    """Four million labels: random numbers of eight bits would drop 0.1016 of them, not 0.1."""
    got = improved.drop_labels(torch.zeros(4_000_000, dtype=torch.int64), 1, noise=noise(5))
    has_mean("share of labels dropped", got.double(), 0.1)


@randomness
def test_cfg_algorithm1_drops_none_at_p_0_all_at_p_1_and_the_same_with_the_same_numbers():
    y = torch.arange(200_000) % 3
    same("p = 0", improved.drop_labels(y, 3, 0.0, noise=noise()), y)
    same("p = 1", improved.drop_labels(y, 3, 1.0, noise=noise()), torch.full_like(y, 3))
    results = []
    for number in (4, 4, 5):
        results.append(improved.drop_labels(y, 3, 0.5, noise=noise(number)))
    same("noise 4 twice", results[0], results[1])
    assert not torch.equal(results[0], results[2]), "other numbers drop the same labels"


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_cfg_algorithm1_rejects_a_p_that_is_not_a_probability(p):
    with rejected(f"p = {p}"):
        improved.drop_labels(torch.arange(4), 7, p)

"""improved.py: learned variances (iDDPM), and guidance (CFG).

No network is trained: for Gaussian data, for a single image and for scalars of a few values, the exact
eps is known, and so is the variance that it leaves.
"""

import far
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
    has_mean,
    has_normal_moments,
    is_uniform,
    randomness,
    refused,
    rejects,
    same,
    tolerance,
)
from scipy import optimize
from strategies import cases, every_case, every_short_case
from test_6_ancestral import BRUTAL, MEAN, VAR, N, gaussian_model, normal
from test_7_ddim import grids_of
from test_8_bound import LEVELS, LN2, MILD, WEIGHTS, exact_model, level

import ddpm
import improved
import reference_numpy as ref

fractions = st.floats(-1, 2)  # v, where a network may well put it


def joined(eps, v):
    """A model with learned variances, from one of eps and one of v (a number, or a table of t)."""

    def model(xt, t):
        said = np.full(len(t), v) if np.isscalar(v) else v[t.numpy()]
        said = torch.from_numpy(said).to(xt.dtype).reshape(-1, *[1] * (xt.ndim - 1))
        return torch.cat([eps(xt, t), said.expand_as(xt)], dim=1)

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
    table = [ref.exact_variance_gaussian(beta, t, s2) for t in range(2, len(beta))]
    return np.array([np.nan, ref.learned_variance(beta, 1, 0), *table])


# --- iDDPM eq. 15: the variance ------------------------------------------------------------------


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


@given(case=cases(), v=fractions)
def test_iddpm_eq15_variance_interpolates_the_logarithms(case, v):
    """v = 1/2 gives the geometric mean of beta_tilde and beta, not the other one; v may leave [0, 1]."""
    got = improved.variance(ddpm.Diffusion(case.beta), case.t, f64(v))
    close("sigma^2", got, ref.learned_variance(case.beta, case.t, v), log_slack(case, v))


@pytest.mark.parametrize(
    "beta", [BRUTAL, MILD, np.array([0, 0.2, 0.5]), np.array([0, 0.3])], ids=len
)
def test_iddpm_eq15_beta_tilde_2_stands_for_beta_tilde_at_t1(beta):
    """From beta_tilde_2 to beta_1, since beta_tilde_1 is 0; with T = 1 there is only beta_1."""
    low = ref.posterior(beta, 2)[2] if len(beta) > 2 else beta[1]
    got = improved.variance(ddpm.Diffusion(beta), 1, f64(0, 0.5, 1))
    close("sigma_1^2", got, [low, (low * beta[1]) ** 0.5, beta[1]], 1e-14)


def test_iddpm_eq15_every_image_has_its_own_t_and_every_pixel_its_own_v():
    d, t = ddpm.Diffusion(BRUTAL), torch.tensor([4, 1, 2])
    v = torch.linspace(-0.5, 1.5, 18, dtype=torch.float64).reshape(3, 2, 3)
    got = improved.variance(d, t, v)
    for i in range(3):
        close(
            f"sigma^2 of image {i}",
            got[i],
            ref.learned_variance(BRUTAL, int(t[i]), v[i].numpy()),
            1e-14,
        )


def test_iddpm_eq15_tables_stay_in_float64_for_a_network_in_bfloat16():
    """sigma^2 is float32 then, and good to the rounding of a logarithm of 1e-9 in float32."""
    beta = ref.linear_beta(1000, 1e-9, 1e-4)
    got = improved.variance(
        ddpm.Diffusion(beta), 2, torch.tensor([0.0, 0.5, 1.0], dtype=torch.bfloat16)
    )
    assert got.dtype == torch.float32
    close("sigma^2", got, ref.learned_variance(beta, 2, [0, 0.5, 1]), 64 * 1.2e-7)


def test_a_model_says_eps_in_the_first_half_of_its_channels_and_v_in_the_second():
    """eps alone is what a sampler of ddpm.py is given."""
    eps, v, xt = normal(2, 3, 4), normal(2, 3, 4, seed=1), normal(2, 3, 4, seed=2)
    said = improved.halves(lambda xt, t: torch.cat([eps, v], dim=1), xt, torch.tensor([1, 1]))
    same("eps", said[0], eps)
    same("v", said[1], v)
    same("eps alone", improved.eps_only(lambda xt, t: torch.cat([eps, v], dim=1))(xt, None), eps)


@pytest.mark.parametrize("channels", [2, 3, 5])
def test_a_model_without_a_v_for_every_pixel_is_refused(channels):
    """For xt of two channels: three would be an eps for both and one v for both, silently."""
    d, x0 = ddpm.Diffusion(BRUTAL), normal(4, 2, 3)

    def model(xt, t):
        return xt[:, :1].repeat(1, channels, 1)

    for what, take in {
        "L_hybrid": lambda: improved.loss_hybrid(model, d, x0),
        "eps alone": lambda: improved.eps_only(model)(x0, None),
        "sampling": lambda: improved.sample_ancestral(model, d, x0),
    }.items():  # fmt: skip
        with refused(f"{channels} channels for xt of two, {what}"):
            take()


def test_iddpm_the_papers_network_with_learned_variances_has_35749766_parameters():
    """Three channels more in the last layer of the CIFAR-10 network."""
    net = ddpm.UNet(3, 6)
    assert (
        sum(p.numel() for p in net.parameters())
        == ref.unet_parameter_count(out_channels=6)
        == 35_749_766
    )


# --- iDDPM eq. 5, eq. 6: a term of the bound -----------------------------------------------------


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


@given(k=st.integers(0, 255), v=fractions, x1=st.floats(-2, 2))
def test_iddpm_eq5_term_at_t1_is_the_decoder_with_the_learned_variance(k, v, x1):
    """L_0 = -log2 of the mass that N(mu_theta, sigma_1^2) puts on x0's bin; no KL."""
    d, x0, xt = ddpm.Diffusion(MILD), f64([level(k)]), f64([x1])
    got = improved.bound_term(d, x0, xt, 1, 0.5 * xt, f64([v]))
    mean = d.p_mean(xt, 1, 0.5 * xt).item()
    want = -ref.decoder_log_prob(k, mean, ref.learned_variance(MILD, 1, v)) / LN2
    close("L_0", got, want, 1e-9, 1 + abs(want))


def test_iddpm_eq6_images_of_a_batch_have_their_terms_at_their_own_t():
    """t = 1 among others: each image's term is the one that it has alone, and its gradient is finite."""
    d, t, v = (
        ddpm.Diffusion(BRUTAL),
        torch.tensor([3, 1, 4, 1]),
        normal(4, 1, 2, 1, seed=1).requires_grad_(),
    )
    x0 = torch.from_numpy(level(np.array([[0, 255], [255, 0], [7, 90], [128, 200]]))).reshape(
        4, 1, 2, 1
    )
    xt = d.q_sample(x0, t, normal(4, 1, 2, 1, seed=2))
    got = improved.bound_term(d, x0, xt, t, 0.3 * xt, v)
    assert got.shape == (4,)
    for i in range(4):
        part = slice(i, i + 1)
        alone = improved.bound_term(d, x0[part], xt[part], int(t[i]), 0.3 * xt[part], v[part])
        close(f"term of image {i}", got[i], alone[0], 8 * EPS)
    got.sum().backward()
    assert v.grad.isfinite().all()


@pytest.mark.parametrize("v", [-30.0, -3.0, 0.0, 30.0, 100.0])
def test_iddpm_eq6_gradients_are_finite_whatever_v(v):
    """Nothing bounds v: where L_{t-1} is finite in float32, so is its gradient, on the paper's schedule.
    At t = 1 a decoder of no width, or of all, is as wrong as can be: there, v from -3 to 30."""
    chosen = slice(None) if -3 <= v <= 30 else slice(1, None)
    d, t = ddpm.Diffusion(ref.linear_beta(1000)), torch.tensor([1, 2, 3, 10, 300, 1000])[chosen]
    x0 = torch.from_numpy(level(np.array([0, 7, 128, 200, 255, 255])))[chosen, None].float()
    said = torch.full_like(x0, v).requires_grad_()
    term = improved.bound_term(d, x0, d.q_sample(x0, t, 0.7 + 0 * x0), t, 0.5 + 0 * x0, said)
    term.sum().backward()
    assert term.isfinite().all() and said.grad.isfinite().all(), (term, said.grad)


def test_iddpm_eq6_term_clips_x0_as_the_sampler_does():
    """By default, a model whose x0 is 3 is judged as one whose x0 is 1."""
    d, white = ddpm.Diffusion(BRUTAL), torch.ones(4, 1, dtype=torch.float64)
    xt = normal(4, 1)
    said = [d.eps_from_x0(xt, 3, far * white) for far in (3, 1)]
    terms = [improved.bound_term(d, white, xt, 3, eps, 0 * xt) for eps in said]
    close("L_2", *terms, 1e-12, 1.0)
    assert (
        improved.bound_term(d, white, xt, 3, said[0], 0 * xt, clip=False) > terms[0] + 0.05
    ).all()


# --- iDDPM eq. 16: the hybrid loss ---------------------------------------------------------------


class Said:
    """A model that says a fixed tensor, which can be differentiated, and remembers what it was asked."""

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
    """x0, eps, and a model of five images of two pixels; eps_theta is not eps."""
    k = np.random.default_rng(5).integers(0, 256, (5, 2))
    return (
        k,
        torch.from_numpy(level(k)),
        normal(5, 2),
        Said(normal(5, 2, seed=1), 0.4 * normal(5, 2, seed=2)),
    )


@pytest.mark.parametrize("weight", [0.0, 0.001, 1.0])
def test_iddpm_eq16_eps_learns_from_L_simple_alone(weight):
    """Its gradient is that of L_simple, whatever the weight of L_vlb: the mean is detached there."""
    d, (_, x0, eps, model) = ddpm.Diffusion(BRUTAL), a_batch()
    got, _ = model.gradients(improved.loss_hybrid(model, d, x0, T_OF_EACH, eps, weight))
    theta = model.out[:, :2].detach().requires_grad_()
    simple = ddpm.loss_simple(lambda xt, t: theta, d, x0, T_OF_EACH, eps)
    same("gradient in eps", got, torch.autograd.grad(simple, theta)[0])


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
            up, down = (ref.decoder_log_prob(k[i], mean, ref.learned_variance(BRUTAL, 1, v[i] + h))
                        for h in (1e-5, -1e-5))  # fmt: skip
            slope = (down - up) / 2e-5
        close(
            f"gradient in v at t = {t}",
            got[i],
            0.001 * 4 * slope / LN2 / 10,
            1e-6,
            1e-3 + abs(slope),
        )


@pytest.mark.parametrize("how", [{}, {"weight": 0.1}], ids=["0.001, the default", "0.1"])
def test_iddpm_eq16_is_L_simple_plus_the_weight_times_L_vlb_in_bits_per_dimension(how):
    """L_vlb by one t per image: T times the mean of their terms, x0 not clipped."""
    d, (_, x0, eps, model) = ddpm.Diffusion(BRUTAL), a_batch()
    got = improved.loss_hybrid(model, d, x0, T_OF_EACH, eps, **how)
    theta, v = model.out.detach().chunk(2, dim=1)
    simple = ddpm.loss_simple(lambda xt, t: theta, d, x0, T_OF_EACH, eps)
    terms = torch.stack([improved.bound_term(d, *(part[i : i + 1] for part in (x0, model.xt)), t,
                                             *(part[i : i + 1] for part in (theta, v)), clip=False)
                         for i, t in enumerate(T_OF_EACH.tolist())])  # fmt: skip
    assert (terms > 0.1).sum() >= 3
    close("L_hybrid", got, simple + how.get("weight", 0.001) * 4 * terms.mean(), 1e-12)


def test_iddpm_eq16_of_T_1_is_L_simple_and_the_decoder():
    """There is one step, and L_vlb is L_0."""
    d, x0, eps = ddpm.Diffusion([0, 0.3]), f64([level(9)]), f64([0.4])
    model = Said(f64([0.1]), f64([0.5]))
    got = improved.loss_hybrid(model, d, x0, torch.tensor([1]), eps, weight=1.0)
    mean = d.p_mean(model.xt, 1, f64([0.1]), clip=False).item()
    close("L_hybrid", got, 0.3**2 - ref.decoder_log_prob(9, mean, 0.3) / LN2, 1e-12)


@pytest.mark.parametrize("t", [1, 2, 10, 100, 500, 1000])
def test_iddpm_eq16_in_bfloat16_has_the_loss_and_gradients_of_float64(t):
    """A network in bfloat16, the paper's schedule: its outputs are rounded, and nothing after them. A
    gradient comes back rounded to 8 bits, twice. The numbers are the same whatever the seed: it is what
    float32 makes of these that was bounded."""

    def normal(*shape, seed=1):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    d, eps = ddpm.Diffusion(ref.linear_beta(1000)), normal(4, 13, seed=0)
    x0 = torch.from_numpy(level(np.arange(0, 256, 5))).reshape(4, 13)
    theta, v = (
        (eps + 0.1 * normal(4, 13, seed=1)).bfloat16(),
        (0.3 + 0.2 * normal(4, 13, seed=2)).bfloat16(),
    )
    results = {}
    for kind in (torch.bfloat16, torch.float64):
        model, data = Said(theta.to(kind), v.to(kind)), torch.promote_types(kind, torch.float32)
        loss = improved.loss_hybrid(
            model, d, x0.to(data), torch.tensor([t] * 4), eps.to(data), weight=1.0
        )
        assert loss.dtype == data
        results[kind] = [part.double() for part in (loss, *model.gradients(loss))]
    (got, *got_slopes), (want, *slopes) = results.values()
    close(f"loss at t = {t}", got, want, 1e-4)
    for what, got, want in zip(("eps", "v"), got_slopes, slopes):
        close(
            f"gradient in {what} at t = {t}",
            got,
            want,
            1.0,
            0.02 * want.abs() + 1e-3 * want.abs().max(),
        )


@every_case
def test_iddpm_eq16_has_no_gradient_for_one_image_at_the_exact_eps_and_beta_tilde(case):
    """mu_theta = mu_tilde and v = 0: neither eps nor v can be improved (t > 1; at t = 1 a decoder without
    error would have no width at all)."""
    if case.t == 1:
        return
    d, x0, eps = ddpm.Diffusion(case.beta), f64([0.4], [-0.9]), f64([1.5], [-0.3])
    model = Said(eps, torch.zeros_like(eps))
    in_eps, in_v = model.gradients(
        improved.loss_hybrid(model, d, x0, torch.tensor([case.t] * 2), eps)
    )
    close("gradient in eps", in_eps, 0, 4 * EPS, 1.0)
    low, high = ref.variance_ends(case.beta, case.t)
    signal, _ = ref.forward_moments(case.beta)
    slack = log_slack(case, 0) + (1e3 * EPS / signal[case.t] + tolerance(case)) ** 2 / low
    difference = np.log(high / low) + 8 * EPS * (
        1 + abs(np.log(low))
    )  # of two logarithms, as rounded
    close("gradient in v", in_v, 0, slack, 0.001 * case.T * difference)


def four_nodes(case, m, s2):
    """x0 = m +- s and eps = +-1: their mean is exact for what is quadratic in both; xt, and the exact eps."""
    x0, eps = f64([m - s2**0.5], [m + s2**0.5])[[0, 0, 1, 1]], f64([-1], [1], [-1], [1])
    xt = ddpm.Diffusion(case.beta).q_sample(x0, case.t, eps)
    return x0, eps, xt, torch.from_numpy(ref.eps_gaussian(case.beta, case.t, xt.numpy(), m, s2))


def node_slack(case, sigma2):
    """Error of (mu_tilde - mu_theta)^2 / sigma^2, which is of order 1, from that of either mean."""
    signal, _ = ref.forward_moments(case.beta)
    return 8 * (1e3 * EPS / signal[case.t] + tolerance(case)) / sigma2**0.5 + 8 * log_slack(case, 1)


@given(case=cases(), s2=st.floats(0.01, 1))
def test_iddpm_eq16_has_no_gradient_for_gaussian_data_at_the_exact_eps_and_variance(case, s2):
    """x0 ~ N(0.3, s2): offset and slope of eps_theta, and v, are where the expected loss is least, and v
    is not if it is off by 1/4."""
    if case.t == 1:
        return
    x0, eps, _, exact = four_nodes(case, 0.3, s2)
    sigma2 = ref.exact_variance_gaussian(case.beta, case.t, s2)
    low, high = ref.variance_ends(case.beta, case.t)
    for off in (0, 0.25):
        a, b, v = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(3))
        here = fraction(case.beta, case.t, sigma2) + off

        def model(xt, t, a=a, b=b, v=v, here=here):
            return torch.cat([exact + a * xt + b, torch.full_like(xt, here) + v], dim=1)

        loss = improved.loss_hybrid(
            model, ddpm.Diffusion(case.beta), x0, torch.tensor([case.t] * 4), eps
        )
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


def test_iddpm_eq16_draws_t_uniformly_from_1_to_T_and_standard_normal_noise():
    """As Algorithm 1, for each image alone."""
    asked = Said(torch.zeros(20_000, 2), torch.zeros(20_000, 2))
    d = ddpm.Diffusion(BRUTAL)
    improved.loss_hybrid(asked, d, torch.zeros(20_000, 2))
    counts = torch.bincount(asked.t, minlength=6).numpy()
    assert counts[0] == counts[5] == 0, f"t outside 1..4: counts of 0..5 are {counts}"
    is_uniform("t", counts[1:5])
    _, noise = ref.forward_moments(BRUTAL)
    eps = asked.xt.numpy() / noise[asked.t.numpy(), None] ** 0.5
    has_normal_moments("eps", eps, 0, 1)
    has_mean("eps_i eps_j within an image", eps[:, 0] * eps[:, 1], 0)


# --- iDDPM eq. 19: fewer steps -------------------------------------------------------------------


@given(case=cases(), data=st.data())
def test_iddpm_eq19_strided_betas_are_those_of_the_jumps_between_the_steps_kept(case, data):
    """beta' = 1 - alpha_bar_t / alpha_bar_s is the variance of q(x_t | x_s); alpha_bar' is alpha_bar there,
    beta_tilde' is the posterior variance of the jump."""
    grid = data.draw(grids_of(case.T), label="grid")
    _, d = improved.strided(None, ddpm.Diffusion(case.beta), grid)
    signal, _ = ref.forward_moments(case.beta)
    close("beta'", d.beta, ref.strided_beta(case.beta, grid), tolerance(case))
    close(
        "alpha_bar'", d.alpha_bar, signal[[0, *grid]] ** 2, 8 * case.T * EPS + tolerance(case), 1.0
    )
    for i, (s, t) in enumerate(zip([0, *grid[:-1]], grid), 1):
        close(
            f"beta_tilde'_{i}",
            d.beta_tilde[i],
            ref.posterior(case.beta, t, s)[2],
            4 * tolerance(case),
        )


def test_iddpm_eq19_the_model_sees_the_steps_by_their_own_numbers():
    """Step i of 1..n is t_i to the model, for each image."""
    asked = []
    model, _ = improved.strided(lambda xt, t: asked.append(t), ddpm.Diffusion(BRUTAL), [1, 3, 4])
    model(normal(4, 1), torch.tensor([1, 3, 2, 3]))
    assert asked[0].tolist() == [1, 4, 3, 4] and asked[0].dtype == torch.int64


def test_iddpm_eq19_a_grid_that_does_not_increase_from_1_is_refused():
    for grid in ([2, 2], [3, 1], [0, 4], [-1], [-4, 2], [5]):
        with refused(f"the grid {grid}"):
            improved.strided(None, ddpm.Diffusion(BRUTAL), grid)


def test_iddpm_eq19_a_jump_that_leaves_nothing_of_the_image_is_a_step_too():
    """1 - alpha_bar_t / alpha_bar_s rounds to 1 for t = 8000 of a linear schedule; beta must be below 1."""
    d = ddpm.Diffusion(ref.linear_beta(8000))
    model, few = improved.strided(joined(lambda xt, t: 0.1 * xt, 0.5), d, [8000])
    assert improved.sample_ancestral(model, few, normal(3, 2)).isfinite().all()


def test_iddpm_eq19_a_training_step_on_the_grid_works_as_on_the_whole():
    """The same xt at alpha_bar_{t_i}, and the same L_simple."""
    d, x0, eps = ddpm.Diffusion(BRUTAL), normal(3, 1), normal(3, 1, seed=1)
    model, few = improved.strided(lambda xt, t: xt * t[:, None], d, [2, 4])
    got = ddpm.loss_simple(model, few, x0, torch.tensor([1, 2, 2]), eps)
    want = ddpm.loss_simple(lambda xt, t: xt * t[:, None], d, x0, torch.tensor([2, 4, 4]), eps)
    close("L_simple", got, want, 1e-13)


# --- Sampling with learned variances -------------------------------------------------------------


@every_short_case
def test_sampling_with_v_0_or_1_is_algorithm2_with_beta_tilde_or_beta(case):
    """The same noise, the same samples."""
    d, xT = ddpm.Diffusion(case.beta), normal(3, 2)
    for v, sigma2 in ((0.0, d.beta_tilde), (1.0, d.beta)):
        fixed = ddpm.sample_ancestral(
            lambda xt, t: torch.tanh(xt), d, xT, sigma2, generator=generator()
        )
        model = joined(lambda xt, t: torch.tanh(xt), v)
        got = improved.sample_ancestral(model, d, xT, generator=generator())
        close(f"x0 with v = {v:g}", got, fixed, 64 * (tolerance(case) + 32 * EPS), 1.0)


@pytest.mark.parametrize("v", [-1.0, 2.0])
def test_sampling_and_bound_take_v_as_it_is_outside_0_1_too(v):
    """eq. 15 as printed cuts it nowhere: they are Algorithm 2 and eq. 5 with its table of variances."""
    d, xT, x0 = (
        ddpm.Diffusion(BRUTAL),
        normal(3, 2),
        torch.from_numpy(level(np.array([[3, 99], [200, 255]]))),
    )
    sigma2 = f64(0, *(float(ref.learned_variance(BRUTAL, t, v)) for t in range(1, 5)))
    model = joined(lambda xt, t: torch.tanh(xt), v)
    fixed = ddpm.sample_ancestral(
        lambda xt, t: torch.tanh(xt), d, xT, sigma2, generator=generator()
    )
    close("x0", improved.sample_ancestral(model, d, xT, generator=generator()), fixed, 1e-12, 10.0)
    fixed, learned = improved.bound_terms(model, d, x0, [sigma2], generator=generator())
    close("L_1 .. L_T", learned[:, 1:], fixed[:, 1:], 1e-12, 1 + fixed[:, 1:].abs())


@pytest.mark.parametrize("grid", [[1, 2, 3, 4], [1, 3, 4], [2, 4], [4]], ids=str)
def test_sampling_with_the_exact_variance_ends_as_predicted_on_any_grid(grid):
    """Exact eps of N(0.5, 0.25), and Var(x_s | x_t) of the grid's own jumps."""
    model, d = improved.strided(gaussian_model(BRUTAL), ddpm.Diffusion(BRUTAL), grid)
    beta = ref.strided_beta(BRUTAL, grid)
    sigma2 = exact_variances(beta)
    moments = ref.ancestral_moments(beta, sigma2, MEAN, VAR)
    got = improved.sample_ancestral(joined(model, fractions_of(beta, sigma2)), d, normal(N, 1), clip=False,
                                    generator=generator())  # fmt: skip
    has_normal_moments("x0", got, *moments)


def test_sampling_statistics_reject_the_variances_of_another_grid():
    """Negative control: v as on all T steps, sigma^2 of single steps for jumps of two."""
    beta = ref.strided_beta(BRUTAL, [2, 4])
    moments = ref.ancestral_moments(beta, exact_variances(beta), MEAN, VAR)
    wrong = np.array([np.nan, *exact_variances(BRUTAL)[[2, 4]]])
    model, d = improved.strided(gaussian_model(BRUTAL), ddpm.Diffusion(BRUTAL), [2, 4])
    got = ddpm.sample_ancestral(model, d, normal(N, 1), torch.from_numpy(wrong), clip=False,
                                generator=generator())  # fmt: skip
    assert rejects(has_normal_moments, "x0", got, *moments)


def test_sampling_gives_every_pixel_its_own_variance():
    """Half of the pixels say v = 0, half v = 1: x_1 has beta_tilde_2 and beta_2 around the mean (T = 2)."""
    d, steps, xT = ddpm.Diffusion(BRUTAL[:3]), [], f64([[0.7]]).repeat(N, 1, 2)

    def model(xt, t):
        return torch.cat([0.4 + 0 * xt, f64([[0, 1]]).expand_as(xt)], dim=1)

    improved.sample_ancestral(model, d, xT, clip=False, generator=generator(),
                              on_step=lambda s, xs: steps.append((s, xs)))  # fmt: skip
    assert [s for s, _ in steps] == [1, 0]
    mean = d.p_mean(f64(0.7), 2, f64(0.4), clip=False).item()
    for pixel, v in enumerate((0, 1)):
        sigma2 = ref.learned_variance(BRUTAL[:3], 2, v)
        has_normal_moments(f"x_1 where v = {v}", steps[0][1][:, 0, pixel], mean, float(sigma2))


def test_sampling_with_learned_variances_asks_clips_and_stops_as_algorithm2():
    """One call at each t = T .. 1 with the last x; x0 inside [-1, 1] unless clip=False; no noise at t = 1;
    the seed of an image decides it; no graph."""
    d, asked = ddpm.Diffusion(BRUTAL), []
    w = torch.ones((), dtype=torch.float64, requires_grad=True)

    def model(xt, t):
        asked.append((t.tolist(), xt))
        return torch.cat([9 * w * xt, 0.5 + 0 * xt], dim=1)

    def draw(seeds, **how):
        return improved.sample_ancestral(
            model, d, normal(5, 1)[seeds], generator=[generator(seed) for seed in seeds], **how
        )

    told = []
    together = draw(list(range(5)), on_step=lambda s, xs: told.append(xs))
    assert [t for t, _ in asked] == [[t] * 5 for t in (4, 3, 2, 1)]
    same("what the model saw", torch.stack([xt for _, xt in asked[1:]]), torch.stack(told[:-1]))
    assert (
        not together.requires_grad and together.abs().max() <= 1 + 1e-12 and together is not told[0]
    )
    same("x0", together, torch.cat([draw([seed]) for seed in range(5)]))
    assert draw(list(range(5)), clip=False).abs().max() > 2
    one = ddpm.Diffusion([0, 0.5])
    last = [
        improved.sample_ancestral(model, one, normal(3, 1), generator=generator(s)) for s in (1, 2)
    ]
    same("x0 of T = 1 by another generator", *last)


def test_training_sampling_and_bound_are_the_same_on_another_device():
    """As test_6's property of ddpm.py: the CPU's numbers bit for bit, where t and labels reach the network
    on the images' device; nothing is read back, but by the bound."""
    d, x = ddpm.Diffusion(BRUTAL), (torch.arange(6).reshape(2, 3) / 2.5 - 1).clamp(-1, 1)

    def net(xt, t, y=None):
        assert xt.device == t.device == (t if y is None else y).device, "xt, t and y on two devices"
        return torch.cat([xt / t[:, None], xt if y is None else xt + y[:, None]], dim=1)

    def results(x, y):
        torch.manual_seed(0)
        few, short = improved.strided(net, d, [2, 4])
        return dict(
            loss=improved.loss_hybrid(net, d, x), x0=improved.sample_ancestral(net, d, x),
            x0_strided=improved.sample_ancestral(few, short, x), labels=improved.drop_labels(y, 3),
            x0_guided=improved.sample_ancestral(improved.guided(net, y, 3, 0.5), d, x))  # fmt: skip

    far.agrees(results, x, torch.tensor([0, 1]))
    bound = improved.bound_terms(net, d, x, generator=generator())
    with far.device(), torch.device("far"):
        same("bound", improved.bound_terms(net, d, x.to("far"), generator=generator()), bound)


def test_sampling_stays_in_float32_with_a_network_in_bfloat16():
    """What it says is rounded; x_t and the tables are not: as with its numbers as float32."""
    d, xT = ddpm.Diffusion(BRUTAL), normal(3, 2).float()

    def model(xt, t):
        assert xt.dtype == torch.float32
        return torch.cat([0.3 * xt, 0.4 * xt], dim=1).bfloat16()

    x0 = improved.sample_ancestral(model, d, xT, generator=generator())
    as_float32 = improved.sample_ancestral(
        lambda xt, t: model(xt, t).float(), d, xT, generator=generator()
    )
    same("x0", x0, as_float32)


# --- The bound with learned variances ------------------------------------------------------------


def test_bound_has_a_row_for_each_fixed_variance_and_one_for_the_learned_on_the_same_draws():
    """The fixed rows are ddpm.py's; v = 0 and v = 1 give theirs again, but for v = 1 at t = 1."""
    d, x0 = ddpm.Diffusion(MILD), torch.from_numpy(level(np.array([[3, 250], [77, 130]])))
    fixed = ddpm.bound_terms(
        lambda xt, t: 0.5 * xt, d, x0, [d.beta, d.beta_tilde], generator=generator()
    )
    for v, row in ((1.0, 0), (0.0, 1)):
        model = joined(lambda xt, t: 0.5 * xt, v)
        got = improved.bound_terms(model, d, x0, [d.beta, d.beta_tilde], generator=generator())
        assert got.shape == (3, 2, 6) and got.dtype == torch.float64
        same("fixed rows", got[:2], fixed)
        close(f"L_1 .. L_T with v = {v:g}", got[2, :, 1:], fixed[row, :, 1:], 1e-12, 1.0)
        if not v:
            close("L_0 with v = 0", got[2, :, 0], fixed[1, :, 0], 1e-12)
    same(
        "the learned row alone",
        improved.bound_terms(model, d, x0, generator=generator())[0],
        got[2],
    )
    free = improved.bound_terms(model, d, x0, [d.beta], clip=False, generator=generator())[0]
    same(
        "unclipped",
        free,
        ddpm.bound_terms(lambda xt, t: 0.5 * xt, d, x0, [d.beta], False, generator())[0],
    )
    assert not torch.equal(free, fixed[0])
    alone = improved.bound_terms(model, d, x0[:1], generator=[generator(7)])
    same("one image", alone, improved.bound_terms(model, d, x0[:1], generator=generator(7)))


def test_bound_with_learned_variances_clips_and_refuses_as_the_other():
    """x0 of the model is clipped, unless clip=False; images off the levels are refused; no graph."""
    d, white = ddpm.Diffusion(BRUTAL), torch.ones(4, 1, dtype=torch.float64)
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    model = joined(lambda xt, t: w * d.eps_from_x0(xt, t, 3 * torch.ones_like(xt)), 0.0)
    clipped = improved.bound_terms(model, d, white, generator=generator())
    close("L_1 .. L_{T-1}", clipped[0, :, 1:-1], 0, 1e-12, 1.0)
    assert (improved.bound_terms(model, d, white, clip=False)[0, :, 1:-1] > 0.05).all()
    assert not clipped.requires_grad
    with refused("images off the 256 levels"):
        improved.bound_terms(model, d, white * 0.33)


@given(case=cases(), s2=st.floats(0, 1))
def test_bound_of_the_exact_variance_is_never_above_that_of_beta_or_beta_tilde(case, s2):
    """Gaussian data, exact eps: L_{t-1} with sigma^2 = Var(x_{t-1} | x_t) is what is predicted, and is at
    most that of either end of eq. 15; so for every t, and for the bound."""
    if case.t == 1:
        return
    d, (x0, _, xt, exact) = ddpm.Diffusion(case.beta), four_nodes(case, 0.3, s2)
    best = ref.exact_variance_gaussian(case.beta, case.t, s2)
    terms = {}
    for name, v in (
        ("learned", fraction(case.beta, case.t, best)),
        ("beta_tilde", 0.0),
        ("beta", 1.0),
    ):
        sigma2 = ref.learned_variance(case.beta, case.t, v)
        term = improved.bound_term(
            d, x0, xt, case.t, exact, torch.full_like(xt, v), clip=False
        ).mean()
        want = ref.kl_term_gaussian(case.beta, case.t, s2, sigma2) / LN2
        slack = node_slack(case, ref.posterior(case.beta, case.t)[2]) * max(1, best / sigma2)
        close(
            f"L_{case.t - 1} of {name}", term, want, slack, 1 + abs(np.log(sigma2)) + best / sigma2
        )
        terms[name] = term
    assert terms["learned"] <= min(terms["beta"], terms["beta_tilde"]) + slack * (
        1 + abs(np.log(best))
    )


def best_variances(beta, levels, weights):
    """The table of variances of least expected bound, for the exact eps of scalars on a few levels.

    For t > 1, L_{t-1} = (log sigma^2 + M / sigma^2) / 2 and a constant, M being the mean square of what
    sigma^2 is about, so that M is the best, and one value of L_{t-1} tells it; the decoder's is sought.
    """

    def decoder(v):
        return ref.expected_term(beta, 1, ref.learned_variance(beta, 1, v), levels, weights)

    table = [np.nan, ref.learned_variance(beta, 1, optimize.minimize_scalar(decoder, (-3, 2)).x)]
    for t in range(2, len(beta)):
        low = ref.posterior(beta, t)[2]
        table.append(low * (2 * ref.expected_term(beta, t, low, levels, weights) + 1))
    return np.array(table)


def test_bound_of_the_best_learned_variances_is_as_predicted_and_below_both_fixed_ones():
    """Scalars on three levels, exact eps: every term by Monte Carlo agrees with quadrature; the sum is
    below that of beta and of beta_tilde, and still above the entropy."""
    sigma2 = best_variances(MILD, LEVELS, WEIGHTS)
    want = ref.bound_terms_discrete(MILD, sigma2, sigma2[1], LEVELS, WEIGHTS)
    x0 = torch.from_numpy(level(np.random.default_rng(1).choice(LEVELS, p=WEIGHTS, size=20_000)))[
        :, None
    ]
    d, model = ddpm.Diffusion(MILD), joined(exact_model(MILD), fractions_of(MILD, sigma2))
    terms = improved.bound_terms(
        model, d, x0, [d.beta, d.beta_tilde], clip=False, generator=generator(3)
    )
    for t in range(d.T):
        has_mean(f"L_{t}", terms[2, :, t], want[t])
    total = terms.sum(2).mean(1)
    assert ref.entropy_bits(WEIGHTS) < total[2] < total[:2].min() - 0.01, total
    assert rejects(has_mean, "L_1 with v = 0", terms[1, :, 1], want[1])


# --- Guidance ------------------------------------------------------------------------------------

CLASSES = [((1.0,), (-0.6,), (0.02,)), ((0.5, 0.5), (0.1, 0.7), (0.05, 0.2))]  # each a mixture
EVERYONE = (0.3, 0.35, 0.35), (-0.6, 0.1, 0.7), (0.02, 0.05, 0.2)  # 30% and 70% of them
NONE = len(CLASSES)


class Labelled:
    """The exact network of two classes, (xt, t, y) -> eps, where y = 2 is "no label"; it counts its calls."""

    def __init__(self, beta, v=None):
        self.beta, self.v, self.calls = beta, v, []

    def __call__(self, xt, t, y):
        self.calls.append(len(xt))
        eps = torch.stack([torch.from_numpy(ref.eps_mixture(self.beta, int(t[0]), x.numpy(), *data))
                           for x, data in zip(xt, [[*CLASSES, EVERYONE][k] for k in y])])  # fmt: skip
        return eps if self.v is None else torch.cat([eps, self.v[y][:, None] + 0 * xt], dim=1)


@given(case=cases(), w=st.floats(-1, 5), x=st.lists(st.floats(-3, 3), min_size=2, max_size=2))
def test_cfg_eq6_eps_is_the_score_of_the_class_to_the_1_plus_w_over_the_datas_to_the_w(case, w, x):
    """eps = (1 + w) eps(xt, y) - w eps(xt) is -sqrt(1 - alpha_bar) d/dx log p(xt | y)^(1+w) p(xt)^-w."""
    y, xt = torch.tensor([0, 1]), f64(*x)[:, None]
    net = Labelled(case.beta)
    got = improved.guided(net, y, NONE, w)(xt, torch.tensor([case.t] * 2))
    want = [
        ref.guided_eps(case.beta, case.t, np.array(x[k]), w, CLASSES[k], EVERYONE) for k in (0, 1)
    ]
    _, noise = ref.forward_moments(case.beta)
    scale = (1 + abs(w)) * (10 + abs(np.array(x))) / noise[case.t] ** 0.5 / 0.02
    close("eps", got[:, 0], want, tolerance(case) + 1e2 * EPS, scale)


def test_cfg_eq6_means_that_w_0_is_conditional_and_w_minus_1_is_not():
    """The formula itself, just beside the two points where a call of half the size will do; w = 1 there
    is the other convention's 2."""
    y, xt, t = torch.tensor([0, 1, 1]), normal(3, 1), torch.tensor([2, 2, 2])
    net = Labelled(BRUTAL)
    one, none = net(xt, t, y), net(xt, t, torch.full_like(y, NONE))
    close("eps at w = 1e-12", improved.guided(net, y, NONE, 1e-12)(xt, t), one, 1e-10, 1.0)
    close(
        "eps at w = -1 + 1e-12", improved.guided(net, y, NONE, -1 + 1e-12)(xt, t), none, 1e-10, 1.0
    )
    close(
        "eps at w = 1",
        improved.guided(net, y, NONE, 1.0)(xt, t),
        2 * one - none,
        1e-14,
        1 + abs(one),
    )
    same("eps by default", improved.guided(net, y, NONE)(xt, t), one)
    assert (one - none).abs().max() > 0.01


def a_network(variances=False):
    """A small labelled UNet in float32, of random weights, whose labels matter."""
    torch.manual_seed(3)
    net = ddpm.UNet(1, 2 if variances else 1, ch=8, mult=(1, 2), blocks=1, groups=4, num_classes=3)
    for p in net.parameters():
        torch.nn.init.normal_(p, 0, 0.1)
    return net.eval()


@pytest.mark.parametrize("w", [0.0, -1.0])
@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "learned"])
def test_cfg_eq6_at_w_0_and_minus_1_samples_as_conditional_and_unconditional_bit_for_bit(
    sampler, w
):
    net, y, d = a_network(sampler == "learned"), torch.tensor([0, 2, 1, 1]), ddpm.Diffusion(BRUTAL)
    xT = normal(4, 1, 4, 4).float()

    def draw(model):
        if sampler == "ddim":
            return ddpm.sample_ddim(model, d, xT, [1, 2, 4], 0.5, generator=generator())
        take = improved.sample_ancestral if sampler == "learned" else ddpm.sample_ancestral
        return take(model, d, xT, generator=generator())

    models = [lambda xt, t: net(xt, t, y), lambda xt, t: net(xt, t)]
    conditional, unconditional = map(draw, models)
    same("x0", draw(improved.guided(net, y, 3, w)), unconditional if w else conditional)
    assert not torch.equal(conditional, unconditional)


def test_cfg_eq6_asks_the_network_once_a_step():
    """2 B images with and without their labels; B at w = 0 and w = -1, where half would be thrown away."""
    y, xt, t = torch.tensor([0, 1, 0]), normal(3, 1), torch.tensor([2, 2, 2])
    for w, images in ((1.5, 6), (-0.5, 6), (0.0, 3), (-1.0, 3)):
        net = Labelled(BRUTAL)
        improved.guided(net, y, NONE, w)(xt, t)
        assert net.calls == [images], f"w = {w}: calls of {net.calls} images"


def test_cfg_eq6_gives_each_image_its_own_t():
    """In both halves of the call."""
    y, xt, t = torch.tensor([0, 1]), normal(2, 1), torch.tensor([3, 7])
    got = improved.guided(lambda xt, t, y: xt * t[:, None] + 10.0 * y[:, None], y, 2, 1.0)(xt, t)
    close("eps", got, xt * t[:, None] + 10.0 * (2 * y - 2)[:, None], 1e-14, 40.0)  # of the terms


def test_cfg_eq6_is_formed_in_the_precision_of_the_images():
    """A network in bfloat16 says eps to 8 bits; their difference, times w, is not rounded to 8 again."""
    y, xt, t = torch.tensor([0, 1]), normal(2, 3).float(), torch.tensor([2, 2])

    def net(xt, t, y):
        return (xt + y[:, None] / 3).bfloat16()

    eps, eps_none = net(xt, t, y).float(), net(xt, t, torch.full_like(y, NONE)).float()
    same("eps", improved.guided(net, y, NONE, 5.0)(xt, t), 6 * eps - 5 * eps_none)


def test_cfg_eq6_guides_eps_and_leaves_the_learned_variance_of_the_class():
    """v is that of y; its extrapolation would leave the range of eq. 15."""
    y, xt, t = torch.tensor([1, 0]), normal(2, 1), torch.tensor([3, 3])
    with_v, without = Labelled(BRUTAL, v=f64(0.2, 0.7, 0.9)), Labelled(BRUTAL)
    got = improved.guided(with_v, y, NONE, 2.0)(xt, t)
    same("eps", got[:, :1], improved.guided(without, y, NONE, 2.0)(xt, t))
    same("v", got[:, 1], f64(0.7, 0.2))


@pytest.mark.parametrize("variances", [False, True], ids=["eps", "eps and v"])
def test_cfg_eq6_guides_every_channel_of_eps(variances):
    """Five channels, none of which is left as it is for the class."""
    y, xt, t = torch.tensor([0, 1]), normal(2, 5, 3), torch.tensor([2, 2])
    answers = normal(NONE + 1, 10 if variances else 5, 3, seed=1)
    got = improved.guided(lambda xt, t, y: answers[y], y, NONE, 1.5)(xt, t)
    close("eps", got[:, :5], 2.5 * answers[y, :5] - 1.5 * answers[NONE, :5], 1e-13, 10.0)


def test_cfg_algorithm1_drops_each_label_on_its_own_with_probability_p():
    """A tenth by default; two neighbours together in p^2 of the cases, which tells it from whole batches."""
    y = torch.arange(100_000) % 7
    got = improved.drop_labels(y, 7, generator=generator())
    dropped = (got == 7).double()
    has_mean("share of labels dropped", dropped, 0.1)
    has_mean("share of neighbours both dropped", dropped[::2] * dropped[1::2], 0.01)
    same("labels that are kept", got[got != 7], y[got != 7])
    batches = torch.cat(
        [improved.drop_labels(y[:4], 7, p=0.3, generator=generator(s)) for s in range(500)]
    )
    some = (batches.reshape(-1, 4) == 7).sum(1).bincount(minlength=5)
    assert (some > 0).all(), f"batches of 4 with 0 .. 4 labels dropped: {some.tolist()}"


@randomness
def test_cfg_algorithm1_drops_none_at_p_0_all_at_p_1_and_the_same_by_the_same_generator():
    y = torch.arange(50) % 3
    same("p = 0", improved.drop_labels(y, 3, 0.0), y)
    same("p = 1", improved.drop_labels(y, 3, 1.0), torch.full((50,), 3))
    same("seed 4", *(improved.drop_labels(y, 3, 0.5, generator(4)) for _ in range(2)))
    a, b = (improved.drop_labels(y, 3, 0.5, generator(seed)) for seed in (4, 5))
    assert not torch.equal(a, b)

"""Randomness: where it comes from, and that it is N(0, I), Uniform{1..T}, independent of everything else."""

import random

import judge
import numpy as np
import pytest
import torch
from judge import ALPHA, has_law, has_mean, has_normal_moments, rejects, within
from scipy import stats
from test_6_ancestral import BRUTAL
from test_contract import CALLS_AND_NETWORKS, arguments, call, inputs, needs, network, tensors

import ddpm
import improved
import reference_numpy as ref

pytestmark = judge.randomness

# --- Where it comes from -------------------------------------------------------------------------

# What draws from the generator that it is given, or else from the global one; and what draws from that alone.
DRAWING = [
    name for name in CALLS_AND_NETWORKS if "generator" in needs(name) and "its t" not in name
]
TRAINING = {
    "loss_simple": lambda given: ddpm.loss_simple(given["model"], given["d"], given["x0"]),
    "loss_simple, t given": lambda given: ddpm.loss_simple(
        given["model"], given["d"], given["x0"], given["t"]),
    "loss_simple, eps given": lambda given: ddpm.loss_simple(
        given["model"], given["d"], given["x0"], eps=given["eps"]),
    "improved.loss_hybrid": lambda given: improved.loss_hybrid(
        given["learned"], given["d"], given["x0"]),
    "UNet, its first weights": lambda given: tensors(ddpm.UNet(ch=8, groups=4, mult=(1, 2)))[:9],
    "UNet, its dropout": lambda given: network(dropout=0.5).train()(given["xt"], given["t"], given["y"]),
}  # fmt: skip


def states():
    """Of every generator that is nobody's own: torch's, NumPy's, Python's."""
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def bits(results):
    return [x.tolist() for x in tensors(results)]


def call_without_generator(name):
    """A function with the global generator, and new arguments."""
    if name in TRAINING:
        given = dict(inputs(), d=ddpm.Diffusion(BRUTAL))
        return lambda: bits(TRAINING[name](given))
    given = {**arguments(name), "generator": None}
    return lambda: bits(call(name, given))


@pytest.mark.parametrize("name", DRAWING)
def test_a_given_generator_is_the_only_source_of_randomness(name):
    """The global ones are neither read nor moved; the same state gives the same bits, another one others,
    and the next call goes on from where this one left."""
    given = arguments(name)

    def draw(generator):
        return bits(call(name, {**given, "generator": generator}))

    a = judge.generator(1)
    torch.manual_seed(1)
    before = states()
    first, second = draw(a), draw(a)
    assert states() == before, "a global generator moved"
    torch.manual_seed(2)
    assert draw(judge.generator(1)) == first, "the global seed counts"
    assert second != first, "the next call repeats the first"
    assert draw(judge.generator(2)) != first, "the generator is not used"


@pytest.mark.parametrize("name", [*DRAWING, *TRAINING])
def test_without_a_generator_the_global_one_decides(name):
    """torch.manual_seed replays it; the next call goes on; no function, nor constructor, seeds anything."""
    draw = call_without_generator(name)
    torch.manual_seed(3)
    others = states()[1:]
    first, second = draw(), draw()
    assert second != first, "the next call repeats the first"
    torch.manual_seed(3)
    assert [draw(), draw()] == [first, second], "the seed does not replay it"
    torch.manual_seed(4)
    assert draw() != first, "the seed does not count"
    assert states()[1:] == others, "NumPy's or Python's generator moved"


@pytest.mark.parametrize(
    "name", [name for name in CALLS_AND_NETWORKS if "generator" not in needs(name)]
)
def test_what_is_given_all_that_it_needs_draws_nothing(name):
    """A loss that is given t and eps, DDIM with eta = 0, a network in eval mode or without dropout."""
    given, before = arguments(name), states()
    first = bits(call(name, given))
    assert states() == before, "a global generator moved"
    torch.manual_seed(5)
    assert str(bits(call(name, given))) == str(first), "the global seed counts"  # nan is nan, too


# --- Its law -------------------------------------------------------------------------------------


def is_standard_normal(what, z):
    """Assert that z (B, C, H, W) is N(0, I): its law in the middle and in the tails; no two of its values
    next to each other, nor half an axis apart, have anything in common; and the square of an image's norm
    varies as chi-squared does, by 2 CHW. (False alarms: some 20 times ALPHA.)"""
    __tracebackhide__ = True
    z = judge.array(z)
    has_normal_moments(what, z, 0, 1)
    x = np.linspace(-6, 6, 2001)
    has_law(what, z, x, stats.norm.cdf(x))
    for limit in (2.5, 3.0):
        p = 2 * stats.norm.sf(limit)
        share, error = (abs(z) > limit).mean(), (p * (1 - p) / z.size) ** 0.5
        within(f"share of |{what}| > {limit}", share, p, error)
    for axis, size in enumerate(z.shape):
        for apart in {1, size // 2}:
            half = np.take(z, range(size - apart), axis) * np.take(z, range(apart, size), axis)
            has_mean(f"products of {what}, {apart} apart along axis {axis}", half, 0)
    norms = (z.reshape(len(z), -1) ** 2).sum(1)
    dims = z[0].size
    spread = norms.var(ddof=1) / (2 * dims)  # its own variance: (2 + kurtosis, 12 / dims, + ..) / n
    within(f"spread of the norms of {what}", spread, 1.0, ((2 + 12 / dims) / len(z)) ** 0.5)


def training_draws(loss, x0):
    """(t, eps) that a loss draws for x0, as its model is shown them."""
    seen = []

    def model(xt, t):
        seen.append((xt, t))
        return torch.zeros_like(xt) if loss == "loss_simple" else torch.cat([xt, xt], dim=1) * 0

    function = ddpm.loss_simple if loss == "loss_simple" else improved.loss_hybrid
    function(model, ddpm.Diffusion(BRUTAL), x0)
    [(xt, t)] = seen
    signal, noise = (table[t.numpy()][:, None, None, None] for table in ref.forward_moments(BRUTAL))
    return t.numpy(), (xt.numpy() - signal * x0.numpy()) / noise**0.5


def two_kinds(n):
    """n images (2, 4, 4) of float64, black ones first, then white ones."""
    return torch.cat([-torch.ones(n // 2, 2, 4, 4), torch.ones(n - n // 2, 2, 4, 4)]).double()


every_loss = pytest.mark.parametrize("loss", ["loss_simple", "improved.loss_hybrid"])


@every_loss
def test_training_noise_is_standard_normal_and_independent_over_images_channels_and_pixels(loss):
    """4,000 images of two channels of 4 x 4 pixels."""
    _, eps = training_draws(loss, two_kinds(4000))
    is_standard_normal("eps", eps)


def has_shares(what, counts):
    """Assert, by chi-squared, that counts vary around equal shares, no more and no less than independent
    draws do: drawn without replacement, they would agree too well (false alarms: ALPHA each way)."""
    __tracebackhide__ = True
    p = stats.chisquare(counts.ravel()).pvalue
    assert ALPHA <= p <= 1 - ALPHA, f"{what}: counts {counts.ravel().tolist()}, p = {p:.2g}"


def pairs(a, b, size):
    return np.histogram2d(a, b, bins=(size, size), range=((0, size), (0, size)))[0]


@every_loss
def test_training_t_is_uniform_and_independent_of_everything(loss):
    """Of the t of other images, next to it or half a batch away, of the image, and of the noise: 100 batches
    of 200 images, 100 black and 100 white."""
    batches = [training_draws(loss, two_kinds(200)) for _ in range(100)]
    t, T = np.concatenate([t for t, _ in batches]) - 1, len(BRUTAL) - 1
    has_shares("t", np.bincount(t, minlength=T))
    has_shares("t of neighbours", pairs(t[::2], t[1::2], T))
    whole = t.reshape(100, 2, 100)
    has_shares("t half a batch apart", pairs(whole[:, 0].ravel(), whole[:, 1].ravel(), T))
    has_shares("t of black images and of white ones", np.stack([
        np.bincount(part.ravel(), minlength=T) for part in (whole[:, 0], whole[:, 1])]))  # fmt: skip
    eps = np.concatenate([eps.reshape(200, -1) for _, eps in batches])
    has_mean("(t - mean t) eps", ((t - t.mean()) * eps.T).T, 0)
    has_mean("(t - mean t) (eps^2 - 1)", ((t - t.mean()) * (eps.T**2 - 1)).T, 0)


@pytest.mark.parametrize("fault", ["one noise for all channels", "cut off at 3", "of norm 1 in each image",
                                   "half of it the other's negative", "one noise for both rows"])  # fmt: skip
def test_noise_statistics_reject_noise_that_is(fault):
    """Negative control."""
    z = torch.randn(4000, 2, 4, 4, generator=judge.generator(31), dtype=torch.float64)
    assert not rejects(is_standard_normal, "z", z)
    wrong = {
        "one noise for all channels": z[:, :1].expand_as(z), "cut off at 3": z.clamp(-3, 3),
        "of norm 1 in each image": z / z.square().mean((1, 2, 3), keepdim=True).sqrt(),
        "half of it the other's negative": torch.cat([z[:2000], -z[:2000]]),
        "one noise for both rows": z[:, :, [0, 0, 1, 1]],
    }[fault]  # fmt: skip
    assert rejects(is_standard_normal, fault, wrong)


def test_t_statistics_reject_t_drawn_without_replacement_or_in_order():
    """Negative control."""
    t = np.random.default_rng(1000 + judge.SEED).integers(0, 4, 20_000)
    assert not rejects(has_shares, "t", np.bincount(t))
    assert rejects(has_shares, "t", np.array([5000] * 4))
    assert rejects(has_shares, "t of neighbours", pairs(np.sort(t)[::2], np.sort(t)[1::2], 4))


# --- The noise of a run --------------------------------------------------------------------------


def noises(run):
    """z at each step of a run, from what it showed its model, whose eps is 0, and on_step."""
    d, xt, seen = ddpm.Diffusion(BRUTAL), torch.zeros(4000, 2, 2, 4, dtype=torch.float64), []
    zero = torch.zeros_like
    how = dict(clip=False, generator=judge.generator(32))
    if run == "bound_terms":
        ddpm.bound_terms(lambda xt, t: seen.append(xt) or zero(xt), d, xt + 1, [d.beta], **how)
        signal, noise = ref.forward_moments(BRUTAL)
        return [(x.numpy() - signal[t]) / noise[t] ** 0.5 for t, x in enumerate(seen, 1)]
    states, grid = [xt], [1, 2, 3, 4]
    how["on_step"] = lambda s, xs: states.append(xs)
    if run == "sample_ddim":
        ddpm.sample_ddim(lambda xt, t: zero(xt), d, xt, grid, 1.0, **how)
    elif run == "sample_ancestral":
        ddpm.sample_ancestral(lambda xt, t: zero(xt), d, xt, d.beta_tilde, **how)
    else:
        improved.sample_ancestral(lambda xt, t: torch.cat([zero(xt)] * 2, dim=1), d, xt, **how)
    steps = zip(
        grid[:0:-1], states, states[1:]
    )  # each: mean xt / sqrt(alpha_t), variance beta_tilde_t
    return [(after.numpy() - before.numpy() / (1 - BRUTAL[t]) ** 0.5) / ref.posterior(BRUTAL, t)[2] ** 0.5
            for t, before, after in steps]  # fmt: skip


@pytest.mark.parametrize("run", ["sample_ancestral", "sample_ddim", "bound_terms",
                                 "improved.sample_ancestral"])  # fmt: skip
def test_every_step_of_a_run_has_new_standard_normal_noise(run):
    """At each step z ~ N(0, I), and nothing in common with the z of the steps before."""
    z = noises(run)
    for i, now in enumerate(z):
        is_standard_normal(f"z of step {i + 1}", now)
        for k in range(i):
            has_mean(f"z of step {i + 1} times z of step {k + 1}", now * z[k], 0)


@pytest.mark.parametrize("generators", ["global", "one", "one per image"])
def test_noise_like_is_standard_normal_and_independent(generators):
    """Over images, channels, rows and columns, whatever it is drawn from."""
    given = {
        "global": None,
        "one": judge.generator(33),
        "one per image": [judge.generator(40 + i) for i in range(900)],
    }[generators]
    is_standard_normal("z", ddpm.noise_like(torch.empty(900, 2, 4, 4, dtype=torch.float64), given))

"""Randomness: its source, and that noise is N(0, I) and t is Uniform{1..T}, independent of everything else."""

import random

import checks
import numpy as np
import pytest
import torch
from calls import ddpm, improved, likelihood, noise
from checks import ALPHA, has_law, has_mean, has_normal_moments, is_uniform, rejects, within
from scipy import stats
from test_6_ancestral import BRUTAL
from test_contract import CALLS_AND_NETWORKS, arguments, call, inputs, needs, network, tensors

import reference_numpy as ref

pytestmark = checks.randomness

# --- Its source -----------------------------------------------------------------------------------

# Functions that take noise, and functions that only use the global generator.
DRAWING = [name for name in CALLS_AND_NETWORKS if "noise" in needs(name) and "its t" not in name]
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
    """The states of the shared generators: torch's, NumPy's, Python's."""
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def bits(results):
    return [x.tolist() for x in tensors(results)]


@pytest.mark.parametrize("name", DRAWING)
def test_given_noise_is_the_only_source_of_randomness(name):
    """The global generators are neither read nor moved. The same noise gives the same bits, other noise gives
    others, and the next call continues where this one ended."""
    given = arguments(name)

    def sample(source):
        return bits(call(name, {**given, "noise": source}))

    source = noise(1)
    checks.seed(1)
    before = states()
    first, second = sample(source), sample(source)
    assert states() == before, "a global generator moved"
    checks.seed(2)
    assert sample(noise(1)) == first, "the result depends on the global seed"
    assert second != first, "the next call repeats the first"
    assert sample(noise(2)) != first, "the noise is not used"


@pytest.mark.parametrize("name", [name for name in DRAWING if "drop_labels" not in name])
def test_noise_may_be_any_function_of_a_tensor_shaped_like_the_images(name):
    """It gets a tensor of the images' shape and dtype, and its values are used as they are.

    The bound may ask for the noise of several t at once, with a copy of the batch for each.
    """
    copies = range(1, len(BRUTAL)) if "bound_terms" in name else [1]
    for dtype in (torch.float32, torch.float64):
        given, received = arguments(name, dtype), []
        images = given["xt"] if "xt" in given else given["x0"]

        def function(x, source, received=received):
            received.append((tuple(x.shape), x.dtype))
            return source(x)

        results = []
        for source in (noise(1), noise(1)):
            results.append(
                bits(call(name, {**given, "noise": lambda x, source=source: function(x, source)}))
            )
        assert received, "noise was not called"
        B, *rest = images.shape
        wrong = set(received) - {((B * n, *rest), dtype) for n in copies}
        assert not wrong, f"noise for images {tuple(images.shape)} {dtype} was called with {wrong}"
        assert results[0] == results[1] == bits(call(name, {**given, "noise": noise(1)}))
        checks.seed(1)
        explicit = bits(call(name, {**given, "noise": torch.randn_like}))
        checks.seed(1)
        assert bits(call(name, {**given, "noise": None})) == explicit, "the default is another one"


@pytest.mark.parametrize("name", [*DRAWING, *TRAINING])
def test_without_noise_the_global_generator_decides(name):
    """Its seed replays the result; the next call continues; no function, nor constructor, seeds anything."""

    def sample():
        if name in TRAINING:
            return bits(TRAINING[name](dict(inputs(), d=ddpm.Diffusion(BRUTAL))))
        return bits(call(name, {**arguments(name), "noise": None}))

    checks.seed(3)
    others = states()[1:]
    first, second = sample(), sample()
    assert second != first, "the next call repeats the first"
    checks.seed(3)
    assert [sample(), sample()] == [first, second], "the seed does not replay it"
    checks.seed(4)
    assert sample() != first, "the result does not depend on the seed"
    assert states()[1:] == others, "NumPy's or Python's generator moved"


@pytest.mark.parametrize(
    "name", [name for name in CALLS_AND_NETWORKS if "noise" not in needs(name)]
)
def test_a_call_with_all_random_numbers_given_draws_none(name):
    """A loss that is given t and eps, DDIM with eta = 0, a network in eval mode or without dropout."""
    given, before = arguments(name), states()
    first = bits(call(name, given))
    assert states() == before, "a global generator moved"
    checks.seed(5)
    assert str(bits(call(name, given))) == str(first), "the result depends on the global seed"


# --- The law of noise -----------------------------------------------------------------------------


def has_share(what, hits, p):
    """Assert that each of independent trials is a hit with probability p (exact; false alarms: ALPHA)."""
    __tracebackhide__ = True
    count, n = int(hits.sum()), hits.size
    value = 2 * min(stats.binom.cdf(count, n, p), stats.binom.sf(count - 1, n, p))
    assert value >= ALPHA, f"{what}: {count} of {n}, expected {n * p:.1f}, p-value {value:.2g}"


def is_standard_normal(what, z):
    """Assert that z (B, C, H, W) is N(0, I): the law of its values, with tails; the sums over an image, a
    channel, a row and a column; the law of an image's norm; and no correlation between values that are one
    place or half an axis apart. (False alarms: some 20 times ALPHA.)"""
    __tracebackhide__ = True
    z = checks.array(z)
    dims = z[0].size
    has_normal_moments(what, z, 0, 1)
    x = np.linspace(-6, 6, 2001)
    has_law(what, z, x, stats.norm.cdf(x))
    for limit in (2.5, 3.0, 3.5):
        has_share(f"|{what}| > {limit}", abs(z) > limit + 1e-9, 2 * stats.norm.sf(limit))
    for name, axes in (
        ("an image", (1, 2, 3)),
        ("a channel", (2, 3)),
        ("a row", 3),
        ("a column", 2),
    ):
        sums = z.sum(axes)
        has_normal_moments(f"sums of {what} over {name}", sums, 0, z.size // sums.size)
    for axis, size in enumerate(z.shape):
        for apart in {1, size // 2}:
            half = np.take(z, range(size - apart), axis) * np.take(z, range(apart, size), axis)
            has_mean(f"products of {what}, {apart} apart along axis {axis}", half, 0)
    norms = (z.reshape(len(z), -1) ** 2).sum(1)
    x = np.linspace(0, 4 * dims, 4001)
    has_law(f"squared norms of {what}", norms, x, stats.chi2.cdf(x, dims))


def has_float64_digits(what, z):
    """Assert that noise for float64 images is not float32 noise: its values need more than 24 bits."""
    __tracebackhide__ = True
    z = checks.array(z)
    rounded = abs(z - z.astype(np.float32)).max()
    assert rounded > 1e-9, f"{what}: float32 changes the values by at most {rounded:.2g}"


def training_draws(loss, x0, beta=BRUTAL):
    """(t, eps) that a loss draws for x0, computed from the arguments of its model."""
    seen = []

    def model(xt, t):
        seen.append((xt, t))
        return torch.zeros_like(xt) if loss == "loss_simple" else torch.cat([xt, xt], dim=1) * 0

    function = ddpm.loss_simple if loss == "loss_simple" else improved.loss_hybrid
    function(model, ddpm.Diffusion(beta), x0)
    [(xt, t)] = seen
    signal, variance = (
        table[t.numpy()].reshape(-1, *[1] * (x0.ndim - 1)) for table in ref.forward_moments(beta)
    )
    return t.numpy(), (xt.numpy() - signal * x0.numpy()) / variance**0.5


def two_kinds(n):
    """n images (2, 4, 4) in float64, black ones first, then white ones."""
    return torch.cat([-torch.ones(n // 2, 2, 4, 4), torch.ones(n - n // 2, 2, 4, 4)]).double()


every_loss = pytest.mark.parametrize("loss", ["loss_simple", "improved.loss_hybrid"])


@every_loss
def test_training_noise_is_standard_normal_and_independent_over_images_channels_and_pixels(loss):
    """4,000 images of two channels of 4 x 4 pixels, in float64."""
    _, eps = training_draws(loss, two_kinds(4000))
    is_standard_normal("eps", eps)
    has_float64_digits("eps", eps)


@every_loss
def test_training_noise_is_independent_for_every_pair_of_images(loss):
    """200 batches of four images: no two of the four have anything in common."""
    batches = [training_draws(loss, two_kinds(4))[1] for _ in range(200)]
    eps = np.stack(batches).reshape(200, 4, -1)
    for i in range(4):
        has_normal_moments(f"eps of image {i}", eps[:, i], 0, 1)
        for k in range(i):
            has_mean(f"eps of image {i} times eps of image {k}", eps[:, i] * eps[:, k], 0)


RUNS = [
    "ancestral_step", "sample_ancestral", "ddim_step", "sample_ddim", "bound_terms",
    "improved.ancestral_step", "improved.sample_ancestral", "improved.bound_terms",
]  # fmt: skip
every_run = pytest.mark.parametrize("run", RUNS)
FORMS = {"the default": None, "given": noise}
every_form = pytest.mark.parametrize("form", FORMS)


def zero(xt, t):
    return torch.zeros_like(xt)


def zero_learned(xt, t):
    return torch.zeros_like(torch.cat([xt, xt], dim=1))


def noises(run, form, shape, beta=BRUTAL):
    """z of each noisy step of a run from x = 0, or of a single step. The model's eps and v are 0.

    They are computed from the states, or in the bound from the model's xt, which may come in any order.
    """
    d, x = ddpm.Diffusion(beta), torch.zeros(*shape, dtype=torch.float64)
    T = len(beta) - 1
    how = dict(clip=False)
    if FORMS[form]:
        how["noise"] = FORMS[form](32)
    states = {T: x}
    if run.endswith("bound_terms"):
        seen = {}

        def model(xt, t):
            seen.update({step: xt[t == step].numpy() for step in set(t.tolist())})
            return zero(xt, t) if run == "bound_terms" else zero_learned(xt, t)

        if run == "bound_terms":
            likelihood.bound_terms(model, d, x + 1, [d.beta], **how)
        else:
            improved.bound_terms(model, d, x + 1, **how)
        signal, variance = ref.forward_moments(beta)
        return [(seen[t] - signal[t]) / variance[t] ** 0.5 for t in range(1, T + 1)]
    if run == "ancestral_step":
        states[T - 1] = ddpm.ancestral_step(d, x, T, x, d.beta_tilde, **how)
    elif run == "ddim_step":
        states[T - 1] = ddpm.ddim_step(d, x, T, T - 1, x, eta=1.0, **how)
    elif run == "improved.ancestral_step":
        states[T - 1] = improved.ancestral_step(d, x, T, x, x, **how)
    elif run == "sample_ddim":
        steps = range(1, T + 1)
        ddpm.sample_ddim(zero, d, x, steps, eta=1.0, **how, on_step=states.__setitem__)
    elif run == "sample_ancestral":
        ddpm.sample_ancestral(zero, d, x, d.beta_tilde, **how, on_step=states.__setitem__)
    else:
        improved.sample_ancestral(zero_learned, d, x, **how, on_step=states.__setitem__)
    z = []
    for t in range(
        T, 1, -1
    ):  # each step has the mean xt / sqrt(alpha_t) and the variance beta_tilde_t
        if t - 1 in states:
            mean = states[t].numpy() / (1 - beta[t]) ** 0.5
            z.append((states[t - 1].numpy() - mean) / ref.posterior(beta, t)[2] ** 0.5)
    return z


@every_form
@every_run
def test_every_step_has_new_standard_normal_noise(run, form):
    """At each step z ~ N(0, I) in the precision of the images, with nothing in common with earlier steps."""
    z = noises(run, form, (1000, 2, 8, 8))
    for i, now in enumerate(z):
        is_standard_normal(f"z of step {i + 1}", now)
        has_float64_digits(f"z of step {i + 1}", now)
        for k in range(i):
            has_mean(f"z of step {i + 1} times z of step {k + 1}", now * z[k], 0)


def has_normal_tails(what, z):
    """Assert that as many of a million values as predicted are beyond 3, 4 and 4.5 (false alarms: 3 ALPHA).

    Beyond 4 there are 66 on average, so that noise that is cut off at 4 is seen.
    """
    __tracebackhide__ = True
    z = abs(np.asarray(z)).ravel()
    for limit in (3.0, 4.0, 4.5):  # a bit more, for the rounding of values that are cut off
        has_share(f"|{what}| > {limit}", z > limit + 1e-9, 2 * stats.norm.sf(limit))


@every_run
def test_noise_has_the_tails_of_the_normal_distribution(run):
    """A million values, on a schedule with two timesteps."""
    has_normal_tails("z", noises(run, "the default", (1024, 1, 32, 32), BRUTAL[:3])[0])


@every_loss
def test_training_noise_has_the_tails_of_the_normal_distribution(loss):
    """A million values."""
    _, eps = training_draws(loss, torch.ones(1024, 1, 32, 32, dtype=torch.float64))
    has_normal_tails("eps", eps)


def wrong_noise(fault, shape):
    z = torch.randn(*shape, generator=checks.generator(31), dtype=torch.float64)
    other = torch.randn(*shape, generator=checks.generator(30), dtype=torch.float64)
    half = len(z) // 2
    return {
        "right": z,
        "the same for all channels": z[:, :1].expand_as(z),
        "cut off at 3": z.clamp(-3, 3),
        "cut off at 4": z.clamp(-4, 4),
        "of norm 1 in each image": z / z.square().mean((1, 2, 3), keepdim=True).sqrt(),
        "the negative in half of the batch": torch.cat([z[:half], -z[:half]]),
        "the same for two rows": z[:, :, torch.arange(shape[2]) // 2],
        "with an offset of 0.1 for each channel": z + 0.1 * other[:, :, :1, :1],
        "with an offset of 0.1 for each image": z + 0.1 * other[:, :1, :1, :1],
        "with an offset for each channel, of variance 1": (z + 0.1 * other[:, :, :1, :1])
        / 1.01**0.5,
        "smoothed a little": (z + 0.05 * z.roll(1, 3)) / (1 + 0.05**2) ** 0.5,
    }[fault]


@pytest.mark.parametrize("fault", [
    "the same for all channels", "cut off at 3", "of norm 1 in each image", "the negative in half of the batch",
    "the same for two rows", "with an offset of 0.1 for each channel", "with an offset of 0.1 for each image",
    "with an offset for each channel, of variance 1", "smoothed a little",
])  # fmt: skip
@pytest.mark.parametrize("shape", [(4000, 2, 4, 4), (1000, 2, 8, 8)], ids=["training", "sampling"])
def test_noise_statistics_reject_noise_that_is(fault, shape):
    """Negative control."""
    assert not rejects(is_standard_normal, "z", wrong_noise("right", shape))
    assert rejects(is_standard_normal, fault, wrong_noise(fault, shape))


def test_noise_statistics_reject_noise_that_is_cut_off_at_4_or_float32():
    """Negative control."""
    shape = (1024, 1, 32, 32)
    right = wrong_noise("right", shape)
    assert not rejects(has_normal_tails, "z", right)
    assert rejects(has_normal_tails, "z", wrong_noise("cut off at 4", shape))
    assert not rejects(has_float64_digits, "z", right)
    assert rejects(has_float64_digits, "z", right.float())


# --- The law of t ---------------------------------------------------------------------------------


def has_shares(what, counts):
    """Assert, by chi-squared, that counts vary around equal shares, no more and no less than independent
    draws do: without replacement, they would agree too well (false alarms: ALPHA each way)."""
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
    black, white = (np.bincount(whole[:, i].ravel(), minlength=T) for i in (0, 1))
    has_shares("t of black images and of white ones", np.stack([black, white]))
    eps = np.concatenate([eps.reshape(200, -1) for _, eps in batches])
    has_mean("(t - mean t) eps", ((t - t.mean()) * eps.T).T, 0)
    has_mean("(t - mean t) (eps^2 - 1)", ((t - t.mean()) * (eps.T**2 - 1)).T, 0)


def is_uniform_at_every_size(batches, T):
    """Assert that t (n, B), a number of batches of each size B, is uniform on 1..T and independent.

    For each size: all t, and neighbours. Over all sizes: the first t of a batch, the last one, both
    together, and how far the counts within a batch are from equal ones: Pearson's statistic, which has the
    mean T - 1 and the variance 2 (T - 1) (B - 1) / B. From 8 images on, this is also tested for each size.
    (False alarms: 4 ALPHA for each size.)
    """
    __tracebackhide__ = True
    ends, statistics, variances = [], [], []
    for t in batches:
        n, B = t.shape
        is_uniform(f"t in batches of {B}", np.bincount(t.ravel() - 1, minlength=T))
        if B > 1 and n * (B // 2) >= 80:
            even, odd = t[:, : 2 * (B // 2) : 2], t[:, 1::2]  # pairs that do not overlap
            neighbours = pairs(even.ravel() - 1, odd.ravel() - 1, T)
            is_uniform(f"neighbouring t in batches of {B}", neighbours.ravel())
        if B > 1:
            ends.append(t[:, [0, -1]] - 1)
        counts = np.stack([(t == step).sum(1) for step in range(1, T + 1)], axis=1)
        pearson = ((counts - B / T) ** 2).sum(1) * T / B
        if B >= 8:
            p = stats.chi2.sf(pearson.sum(), n * (T - 1))
            spread = (
                f"spread of the counts within a batch of {B}: {pearson.mean():.3g}, want {T - 1}"
            )
            assert ALPHA <= p <= 1 - ALPHA, f"{spread}, p = {p:.2g}"
        statistics += list(pearson)
        variances += [2 * (T - 1) * (B - 1) / B] * n
    first, last = np.concatenate(ends).T
    is_uniform("the first t of a batch", np.bincount(first, minlength=T))
    is_uniform("the last t of a batch", np.bincount(last, minlength=T))
    is_uniform("the first and the last t of a batch", pairs(first, last, T).ravel())
    error = sum(variances) ** 0.5 / len(statistics)
    within("spread of the counts within a batch", np.mean(statistics), T - 1, error)


SIZES = range(1, 65)


def number_of_batches(B):
    return max(16, 320 // B)


@every_loss
def test_training_t_is_uniform_and_independent_in_batches_of_every_size(loss):
    """Batches of 1 to 64 images, for T = 2."""
    batches, beta = [], BRUTAL[:3]
    for B in SIZES:
        x0 = torch.ones(B, 1, dtype=torch.float64)
        runs = range(number_of_batches(B))
        batches.append(np.stack([training_draws(loss, x0, beta)[0] for _ in runs]))
    is_uniform_at_every_size(batches, 2)


def has_repeated_values(what, batches, T):
    """Assert that equal pairs within batches (n, B) are as frequent as for independent t of 1..T: a share of
    1 / T. All pairs are uncorrelated, which gives the standard error. (False alarms: ALPHA.)"""
    __tracebackhide__ = True
    n, B = batches.shape
    counts = np.stack([np.bincount(t - 1, minlength=T) for t in batches])
    equal, pairs_ = (counts * (counts - 1) // 2).sum(), n * B * (B - 1) // 2
    within(f"share of equal {what}", equal / pairs_, 1 / T, (1 / T * (1 - 1 / T) / pairs_) ** 0.5)


@every_loss
def test_training_t_may_repeat_within_a_batch_on_the_papers_schedule(loss):
    """T = 1000 and 200 batches of 64 images: 403 pairs of equal t on average. Without replacement, or spread
    evenly over 1..T, there would be none or few. The tenths of 1..T are equally frequent."""
    beta, x0 = ref.linear_beta(1000), torch.ones(64, 1, dtype=torch.float64)
    d, seen = ddpm.Diffusion(beta), []

    def model(xt, t):
        seen.append(t.numpy())
        return zero(xt, t) if loss == "loss_simple" else zero_learned(xt, t)

    function = ddpm.loss_simple if loss == "loss_simple" else improved.loss_hybrid
    for _ in range(200):
        function(model, d, x0)
    batches = np.stack(seen)
    has_repeated_values("t in a batch", batches, 1000)
    has_shares("tenths of 1..T", np.bincount((batches.ravel() - 1) // 100, minlength=10))


def test_t_statistics_reject_t_that_never_repeats_or_is_spread_evenly():
    """Negative control of the test on the paper's schedule."""
    source = np.random.default_rng(4000 + checks.SEED)
    right = source.integers(1, 1001, (200, 64))
    distinct = np.stack([source.permutation(1000)[:64] + 1 for _ in range(200)])
    even = 1 + ((np.arange(64) + source.random((200, 64))) * 1000 / 64).astype(int)
    assert not rejects(has_repeated_values, "t", right, 1000)
    assert rejects(has_repeated_values, "t", distinct, 1000)
    assert rejects(has_repeated_values, "t", even, 1000)


@pytest.mark.parametrize("fault", ["without replacement", "in order", "in pairs t and T + 1 - t", "one for all",
                                   "stratified from 16 images on", "stratified for 64 images", "never T for one image"])  # fmt: skip
def test_t_statistics_reject_t_that_is(fault):
    """Negative control."""
    source, T = np.random.default_rng(1000 + checks.SEED), 2

    def sample(n, B, fault=""):
        t = source.integers(1, T + 1, (n, B))
        if fault == "without replacement":
            blocks = [source.permuted(np.tile([1, 2], (n, 1)), axis=1) for _ in range(B // 2 + 1)]
            t = np.concatenate(blocks, axis=1)[:, :B]
        if fault == "in order":
            t = np.sort(t, axis=1)
        if fault == "in pairs t and T + 1 - t":
            t[:, B // 2 : 2 * (B // 2)] = T + 1 - t[:, : B // 2]
        if fault == "one for all":
            t = np.repeat(t[:, :1], B, axis=1)
        if (fault == "stratified from 16 images on" and B >= 16) or (
            fault.endswith("64 images") and B == 64
        ):
            even = 1 + (np.arange(B) + source.integers(T, size=(n, 1))) % T
            t = source.permuted(even, axis=1)
        if fault == "never T for one image" and B == 1:
            t = np.ones_like(t)
        return t

    right, wrong = [], []
    for B in SIZES:
        n = number_of_batches(B)
        right.append(sample(n, B))
        wrong.append(sample(n, B, fault))
    assert not rejects(is_uniform_at_every_size, right, T)
    assert rejects(is_uniform_at_every_size, wrong, T)


def test_t_statistics_reject_t_drawn_without_replacement_or_in_order():
    """Negative control of the test with large batches."""
    t = np.random.default_rng(3000 + checks.SEED).integers(0, 4, 20_000)
    assert not rejects(has_shares, "t", np.bincount(t))
    assert rejects(has_shares, "t", np.array([5000] * 4))
    assert rejects(has_shares, "t of neighbours", pairs(np.sort(t)[::2], np.sort(t)[1::2], 4))

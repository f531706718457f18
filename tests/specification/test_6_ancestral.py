"""Section 6 of ddpm.py: ancestral sampling (Algorithm 2, sec. 3.2).

No network is trained: for Gaussian data and for a single image the exact model is known.
"""

import far
import numpy as np
import pytest
import torch
from judge import (
    EPS,
    close,
    edge,
    f64,
    generator,
    has_law,
    has_normal_moments,
    randomness,
    refused,
    rejects,
    same,
    tolerance,
)
from strategies import every_short_case

import ddpm
import reference_numpy as ref

BRUTAL = np.array([0, 0.1, 0.3, 0.8, 0.2])  # short and steep, so that each step is seen
N, MEAN, VAR = 20_000, 0.5, 0.25  # samples of scalar data x0 ~ N(MEAN, VAR)
MIXTURE = (
    np.array([0.3, 0.7]),
    np.array([-0.6, 0.5]),
    np.array([0.02, 0.1]),
)  # weights, means, variances


def at_each_step(eps):
    """A model (xt, t) of images at any steps, from eps(step, xt) in NumPy."""

    def model(xt, t):
        out = torch.empty_like(xt)
        for step in t.unique().tolist():
            out[t == step] = torch.from_numpy(np.asarray(eps(step, xt[t == step].numpy()))).to(
                xt.dtype
            )
        return out

    return model


def gaussian_model(beta, m=MEAN, s2=VAR):
    """E[eps | xt] for x0 ~ N(m, s2)."""
    return at_each_step(lambda t, x: ref.eps_gaussian(beta, t, x, m, s2))


def mixture_model(beta):
    """E[eps | xt] for x0 from the two components of MIXTURE."""
    return at_each_step(lambda t, x: ref.eps_mixture(beta, t, x, *MIXTURE))


def image_model(beta, x0):
    """E[eps | xt] where x0 is the only image, or the only one in its place of the batch."""
    signal, noise = ref.forward_moments(beta)
    return at_each_step(lambda t, x: (x - signal[t] * x0.numpy()) / noise[t] ** 0.5)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def variances(d):
    return {"beta": d.beta, "beta_tilde": d.beta_tilde}


@every_short_case
def test_algorithm2_returns_the_only_image_there_is(case):
    """Exact model of one image: x0 comes back whatever xT and the noise, for both variances."""
    d, x0 = ddpm.Diffusion(case.beta), f64([0.3], [-1.0])
    signal, _ = ref.forward_moments(case.beta)
    for sigma2 in variances(d).values():
        got = ddpm.sample_ancestral(image_model(case.beta, x0), d, normal(2, 1), sigma2, clip=False,
                                    generator=generator())  # fmt: skip
        close("x0", got, x0, tolerance(case) + 1e3 * EPS, 1 + 1 / signal[1])


def test_algorithm2_returns_the_only_image_there_is_on_the_papers_schedule():
    """T = 1000, the default variance and clipping; float64."""
    beta, x0 = ref.linear_beta(1000), f64([0.3, 1.0, -1.0])
    got = ddpm.sample_ancestral(image_model(beta, x0), ddpm.Diffusion(beta), normal(1, 3))
    close("x0", got, x0, 1e-12, 1.0)


def test_algorithm2_visits_T_down_to_1_and_reports_T_minus_1_down_to_0():
    """The model is asked once at each t = T .. 1, for all images; on_step gets s = t - 1 and x_s."""
    asked, told = [], []

    def model(xt, t):
        assert t.shape == (2,) and t.dtype == torch.int64
        asked.append(t.tolist())
        return torch.zeros_like(xt)

    x0 = ddpm.sample_ancestral(model, ddpm.Diffusion(BRUTAL), normal(2, 1),
                               on_step=lambda s, xs: told.append((s, xs)))  # fmt: skip
    assert asked == [[4, 4], [3, 3], [2, 2], [1, 1]]
    assert [s for s, _ in told] == [3, 2, 1, 0]
    same("x0", x0, told[-1][1])


def test_algorithm2_feeds_each_step_with_the_last_ones_result():
    """What the model sees at t is what on_step was told at s = t; first of all it sees xT."""
    seen, told, xT = [], [], normal(2, 3)
    ddpm.sample_ancestral(lambda xt, t: seen.append(xt) or 0.1 * xt, ddpm.Diffusion(BRUTAL), xT,
                          on_step=lambda s, xs: told.append(xs))  # fmt: skip
    same("what the model saw", torch.stack(seen), torch.stack([xT, *told[:-1]]))


@pytest.mark.parametrize("name", ["beta", "beta_tilde"])
def test_algorithm2_takes_each_step_from_p_with_mean_of_eq11_and_variance_sigma2(name):
    """From xt = 0.7 in all N images: x_{t-1} ~ N(mu_theta, sigma_t^2) at t = T, for T = 2, 3, 4."""
    for T in (2, 3, 4):
        d = ddpm.Diffusion(BRUTAL[: T + 1])
        steps = []
        ddpm.sample_ancestral(lambda xt, t: torch.full_like(xt, 0.4), d, f64(0.7).repeat(N, 1),
                              variances(d)[name], clip=False, generator=generator(T),
                              on_step=lambda s, xs, steps=steps: steps.append(xs))  # fmt: skip
        mean = d.p_mean(f64(0.7), T, f64(0.4), clip=False).item()
        has_normal_moments(f"x_{T - 1}", steps[0], mean, variances(d)[name][T].item())


@pytest.mark.parametrize("name", ["beta", "beta_tilde"])
def test_algorithm2_ends_in_the_distribution_that_the_recursion_of_moments_predicts(name):
    """Exact model of N(0.5, 0.25), started from N(0, 1): the output is Gaussian with known moments."""
    d = ddpm.Diffusion(BRUTAL)
    mean, var = ref.ancestral_moments(BRUTAL, variances(d)[name].numpy(), MEAN, VAR)
    got = ddpm.sample_ancestral(gaussian_model(BRUTAL), d, normal(N, 1), variances(d)[name],
                                clip=False, generator=generator())  # fmt: skip
    has_normal_moments("x0", got, mean, var)


@pytest.mark.parametrize("name", ["beta", "beta_tilde"])
def test_algorithm2_ends_in_the_law_that_is_predicted_for_a_mixture(name):
    """Exact model of two unequal Gaussians: the output has their shares, places and widths."""
    d = ddpm.Diffusion(BRUTAL)
    law = ref.mixture_law(BRUTAL, ref.ancestral_steps(BRUTAL, variances(d)[name].numpy()), *MIXTURE)
    got = ddpm.sample_ancestral(mixture_model(BRUTAL), d, normal(N, 1), variances(d)[name], clip=False,
                                generator=generator())  # fmt: skip
    has_law("x0", got, *law)


def wrong_sampler(fault, sigma2, d, model):
    """Algorithm 2 with one fault, for the negative controls."""
    xt = normal(N, 1)
    for t in range(d.T, 0, -1):
        if fault == "the last step is skipped" and t == 1:
            break
        seen = t + 1 if fault == "the model is told t + 1" and t < d.T else t
        mean = d.p_mean(xt, t, model(xt, torch.full((N,), seen)), clip=False)
        index = t - 1 if fault == "sigma is read at t - 1" else t
        scale = sigma2[index].nan_to_num()
        scale = scale if fault == "sigma^2 stands for sigma" else scale.sqrt()
        noise = t > 1 or fault == "noise is added at t = 1"
        xt = mean + scale * normal(N, 1, seed=t) * noise
    return xt


@pytest.mark.parametrize("fault", [
    "sigma is read at t - 1", "sigma^2 stands for sigma", "noise is added at t = 1",
    "the last step is skipped", "the model is told t + 1",
])  # fmt: skip
def test_algorithm2_statistics_reject_a_sampler_in_which(fault):
    """Negative control: the tests above would see each of these faults."""
    d = ddpm.Diffusion(BRUTAL)
    moments = ref.ancestral_moments(BRUTAL, BRUTAL, MEAN, VAR)
    model = gaussian_model(BRUTAL)
    assert not rejects(has_normal_moments, "x0", wrong_sampler(None, d.beta, d, model), *moments)
    assert rejects(has_normal_moments, fault, wrong_sampler(fault, d.beta, d, model), *moments)
    law, model = (
        ref.mixture_law(BRUTAL, ref.ancestral_steps(BRUTAL, BRUTAL), *MIXTURE),
        mixture_model(BRUTAL),
    )
    assert not rejects(has_law, "x0", wrong_sampler(None, d.beta, d, model), *law)
    assert rejects(has_law, fault, wrong_sampler(fault, d.beta, d, model), *law)


def test_sec32_sigma2_beta_is_exact_for_standard_normal_data():
    """x0 ~ N(0, 1): sigma^2 = beta keeps N(0, 1) at every noisy step; the noiseless last step leaves
    a variance of 1 - beta_1."""
    d, told = ddpm.Diffusion(BRUTAL), {}
    ddpm.sample_ancestral(gaussian_model(BRUTAL, 0, 1), d, normal(N, 1), d.beta, clip=False,
                          generator=generator(), on_step=told.__setitem__)  # fmt: skip
    for s in (3, 2, 1):
        has_normal_moments(f"x_{s}", told[s], 0, 1)
    has_normal_moments("x_0", told[0], 0, 1 - BRUTAL[1])


def test_algorithm2_uses_sigma2_beta_by_default():
    """The same seed, with sigma2 = beta and without: the same samples; with beta_tilde: others."""
    d = ddpm.Diffusion(BRUTAL)
    default, beta, tilde = (
        ddpm.sample_ancestral(gaussian_model(BRUTAL), d, normal(8, 1), sigma2, generator=generator())
        for sigma2 in (None, d.beta, d.beta_tilde))  # fmt: skip
    same("x0 by default", default, beta)
    assert not torch.equal(default, tilde), "beta_tilde gives the same samples"


@edge
def test_algorithm2_adds_no_noise_at_t1():
    """T = 1: x0 is a function of x1, whatever the generator."""
    d = ddpm.Diffusion([0, 0.5])
    a, b = (ddpm.sample_ancestral(lambda xt, t: 0.1 * xt, d, normal(4, 1), generator=generator(seed))
            for seed in (1, 2))  # fmt: skip
    same("x0 by another generator", a, b)


def test_sampling_clips_x0_by_default():
    """A model that answers nonsense gives samples inside [-1, 1], and outside with clip=False."""
    d = ddpm.Diffusion(BRUTAL)
    clipped, free = (
        ddpm.sample_ancestral(lambda xt, t: 9 * xt, d, normal(64, 1), generator=generator(), **how)
        for how in ({}, {"clip": False}))  # fmt: skip
    assert clipped.abs().max() <= 1 + 1e-12 and free.abs().max() > 2


@randomness
def test_a_seed_gives_the_same_image_at_any_batch_size():
    """One generator per image: images 0..4 together are the five drawn alone, and all differ."""
    d, shape = ddpm.Diffusion(BRUTAL), (2, 3, 3)

    def draw(seeds):
        generators = [generator(seed) for seed in seeds]
        xT = ddpm.noise_like(torch.empty(len(seeds), *shape), generators)
        return ddpm.sample_ancestral(lambda xt, t: 0.2 * xt, d, xT, generator=generators)

    together = draw(range(5))
    same("x0", together, torch.cat([draw([seed]) for seed in range(5)]))
    assert len({tuple(image.flatten().tolist()) for image in together}) == 5


@pytest.mark.parametrize("generators", [None, generator(5), [generator(i) for i in range(500)]],
                         ids=["global", "one", "one per image"])  # fmt: skip
def test_noise_like_is_standard_normal_of_the_same_shape_and_type(generators):
    """z ~ N(0, I), images and pixels independent."""
    z = ddpm.noise_like(torch.empty(500, 8, 5, dtype=torch.float64), generators)
    assert z.shape == (500, 8, 5) and z.dtype == torch.float64
    has_normal_moments("z", z, 0, 1)
    has_normal_moments("sum of an image's z", z.sum((1, 2)), 0, 40)
    has_normal_moments("sum of a pixel's z", z.sum(0), 0, 500)


@randomness
def test_noise_like_with_a_generator_ignores_the_global_seed():
    """The same generator state, the same z, whatever torch.manual_seed said."""
    torch.manual_seed(1)
    a = ddpm.noise_like(torch.empty(3, 2), generator(7))
    torch.manual_seed(2)
    same("z", a, ddpm.noise_like(torch.empty(3, 2), generator(7)))


@pytest.mark.parametrize("images, generators", [(1, 2), (4, 2), (3, 0)])
def test_noise_like_refuses_as_many_generators_as_there_are_not_images(images, generators):
    """One generator per image, or one for all: nothing in between is meant."""
    with refused(f"{generators} generators for {images} images"):
        ddpm.noise_like(torch.empty(images, 2), [generator(i) for i in range(generators)])


def test_loss_samplers_and_bound_are_the_same_on_another_device():
    """Bit for bit the CPU's, where xt and t reach the model on the images' device: what is copied to it
    has arrived. The bound apart, nothing is read back, for which a GPU would have to be waited for."""
    d, x = ddpm.Diffusion(BRUTAL), (torch.arange(6).reshape(2, 3) / 2.5 - 1).clamp(-1, 1)

    def model(xt, t):
        assert xt.device == t.device, f"xt on {xt.device}, t on {t.device}"
        return xt / t[:, None]

    def results(x):
        torch.manual_seed(0)
        return dict(
            loss=ddpm.loss_simple(model, d, x), x0_algorithm_2=ddpm.sample_ancestral(model, d, x),
            x0_ddim=ddpm.sample_ddim(model, d, x, [1, 2, 4], 1.0), z=ddpm.noise_like(x, generator()),
            z_by_image=ddpm.noise_like(x, [generator(1), generator(2)]))  # fmt: skip

    far.agrees(results, x)
    bound = ddpm.bound_terms(model, d, x, [d.beta], generator=generator())
    with far.device(), torch.device("far"):
        same(
            "bound", ddpm.bound_terms(model, d, x.to("far"), [d.beta], generator=generator()), bound
        )


@pytest.mark.parametrize("sampler", ["sample_ancestral", "sample_ddim"])
def test_sampling_builds_no_graph(sampler):
    """Nothing to differentiate is kept, however long the chain."""
    w = torch.ones((), requires_grad=True)
    grid = [[1, 2, 3, 4]] if sampler == "sample_ddim" else []
    x0 = getattr(ddpm, sampler)(
        lambda xt, t: w * xt, ddpm.Diffusion(BRUTAL), torch.ones(2, 1), *grid
    )
    assert not x0.requires_grad and x0.dtype == torch.float32

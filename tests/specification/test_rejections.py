"""Rejections: a wrong call raises an exception, where its result would silently be wrong.

Calls that torch rejects itself have no test here.
"""

import checks
import numpy as np
import pytest
import torch
from calls import ddpm, improved, likelihood
from test_6_ancestral import BRUTAL

import reference_numpy as ref

T = len(BRUTAL) - 1
BETA = torch.from_numpy(BRUTAL)
NAN = float("nan")
SMALL = dict(ch=8, mult=(1, 2), blocks=1, groups=4)


def d():
    return ddpm.Diffusion(BRUTAL)


def model(xt, t):
    return 0.1 * xt


def learned(xt, t):
    return torch.cat([xt, xt], dim=1)


def images(*shape, dtype=torch.float32):
    return torch.ones(shape or (2, 3, 8, 8), dtype=dtype)


def levels(*bad):
    """Return images (2, 3) on the 256 levels, where the last pixels have the given values."""
    x0 = images(2, 3)
    for i, value in enumerate(bad):
        x0[1, 2 - i] = value
    return x0


def with_entry(table, t, value):
    """Return the table with another value at t."""
    table = table.clone()
    table[t] = value
    return table


def output(xt=None, t=(1, 2), y=None, **settings):
    """Return the output of a small network."""
    net = ddpm.UNet(**{**SMALL, **settings})
    return net(images() if xt is None else xt, torch.tensor(t), y)


def simple(x0=None, t=(1, 2), model=model):
    t = None if t is None else torch.tensor(t)
    return ddpm.loss_simple(model, d(), images(2, 3) if x0 is None else x0, t)


def hybrid(x0=None, t=(1, 2), model=learned):
    t = None if t is None else torch.tensor(t)
    return improved.loss_hybrid(model, d(), images(2, 3) if x0 is None else x0, t)


def noisy(t, batch=2):
    return d().q_sample(images(batch, 3), t, images(batch, 3))


def ancestral(sigma2=None, **how):
    return ddpm.sample_ancestral(model, d(), images(2, 3), sigma2, **how)


def one_step(t=3, sigma2=None, eps=None, **how):
    return ddpm.ancestral_step(
        d(), images(2, 3), t, images(2, 3) if eps is None else eps, sigma2, **how
    )


def ddim(timesteps, **how):
    return ddpm.sample_ddim(model, d(), images(2, 3), timesteps, **how)


def ddim_step(t, s, **how):
    return ddpm.ddim_step(d(), images(2, 3), t, s, images(2, 3), **how)


def bound(variances=(BETA,), x0=None):
    return likelihood.bound_terms(model, d(), levels() if x0 is None else x0, variances)


def learned_bound(variances=(), x0=None):
    return improved.bound_terms(learned, d(), levels() if x0 is None else x0, variances)


def one_term(t=2, mean=None, sigma2=None):
    x = images(2, 3)
    mean = x if mean is None else mean
    return likelihood.bound_term(d(), x, x, t, mean, x if sigma2 is None else sigma2)


def learned_term(t=2, v=None):
    x = images(2, 3)
    return improved.bound_term(d(), x, x, t, x, x if v is None else v)


def one_column(x):
    return images(2, 1)


WRONG_TIMESTEPS = ([], [0, 4], [2, 2], [3, 1], [-1, 4], [2, 5], [1.5, 4])
WRONG = {
    # t
    "t = -1": lambda: noisy(-1),
    "t = T + 1": lambda: noisy(T + 1),
    "t = 1.5": lambda: noisy(1.5),
    "t of float32": lambda: noisy(torch.tensor([1.0, 2.0])),
    "three t for two images": lambda: noisy(torch.tensor([1, 2, 3])),
    "three t for one image": lambda: noisy(torch.tensor([1, 2, 3]), batch=1),
    "no t for two images": lambda: noisy(torch.tensor([], dtype=torch.int64)),
    "a posterior at t = 0": lambda: d().posterior_mean(
        images(2, 3), images(2, 3), torch.tensor([1, 0])),
    "a reverse step from t = 0": lambda: d().p_mean(images(2, 3), torch.tensor([1, 0]), images(2, 3)),
    "the noise of a clean image": lambda: d().eps_from_x0(
        images(2, 3), torch.tensor([0, 2]), images(2, 3)),
    "a learned variance at t = 0": lambda: improved.variance(d(), 0, images(2, 3)),
    "a term of the bound at t = 0": lambda: one_term(torch.tensor([2, 0])),
    "a learned term at t = 0": lambda: learned_term(torch.tensor([2, 0])),
    "t = 0 in L_simple": lambda: simple(t=(1, 0)),
    "t = 0 in L_hybrid": lambda: hybrid(t=(1, 0)),
    "t = T + 1 in L_simple": lambda: simple(t=(1, T + 1)),
    "t = T + 1 in L_hybrid": lambda: hybrid(t=(1, T + 1)),
    "one t for the batch of L_simple": lambda: simple(t=3),
    "one t for the batch of L_hybrid": lambda: hybrid(t=3),
    "t of float32 in L_simple": lambda: simple(t=(1.0, 2.0)),
    # images
    "images of uint8": lambda: d().q_sample(images(2, 3, dtype=torch.uint8), 1, images(2, 3)),
    "images of uint8 as xt of the samplers": lambda: ddpm.sample_ancestral(
        model, d(), images(2, 3, dtype=torch.uint8)),
    "noise of another shape": lambda: d().q_sample(images(2, 1), 1, images(2)),
    "an xt of another shape than x0": lambda: d().posterior_mean(images(2, 1), images(2), 1),
    "an eps of another shape, for x0": lambda: d().x0_from_eps(images(2, 1), 1, images(2)),
    "an x0 of another shape, for eps": lambda: d().eps_from_x0(images(2, 1), 1, images(2)),
    "an eps of another shape, for the mean": lambda: d().p_mean(images(2, 1), 1, images(2)),
    "a prediction of another shape in L_simple": lambda: simple(model=lambda xt, t: xt[:, :1]),
    "a prediction of another shape in a step": lambda: one_step(eps=images(2, 1)),
    "a mean of another shape in the bound": lambda: one_term(mean=images(2, 1)),
    "a variance of each image without its dimensions": lambda: likelihood.bound_term(
        d(), images(3, 3), images(3, 3), 2, images(3, 3), images(3)),
    "an output without v": lambda: hybrid(model=model),
    "an output with one channel more": lambda: improved.split_output(images(2, 7), images(2, 3)),
    "v of another shape in the bound": lambda: learned_term(v=images(2, 1)),
    "v of another shape in a step": lambda: improved.ancestral_step(
        d(), images(2, 3), 2, images(2, 3), images(2, 1)),
    # the noise function
    "a noise function with another shape, ancestral": lambda: one_step(noise=one_column),
    "a noise function with another shape, DDIM": lambda: ddim_step(3, 1, eta=1.0, noise=one_column),
    "a noise function with another shape, in the bound": lambda: likelihood.bound_terms(
        model, d(), levels(), [BETA], noise=one_column),
    "a noise function with another shape, learned": lambda: improved.ancestral_step(
        d(), images(2, 3), 2, images(2, 3), images(2, 3), noise=one_column),
    # tables
    "no table at all": lambda: ddpm.Diffusion([]),
    "a table of no timesteps": lambda: ddpm.Diffusion([0]),
    "a table of two dimensions": lambda: ddpm.Diffusion([[0, 0.1]]),
    "beta_0 = 0.1": lambda: ddpm.Diffusion([0.1, 0.2]),
    "beta_t = 0": lambda: ddpm.Diffusion([0, 0.1, 0]),
    "beta_t = 1": lambda: ddpm.Diffusion([0, 1.0]),
    "beta_t = 1.5": lambda: ddpm.Diffusion([0, 1.5]),
    "two beta_t of 1.5, so that alpha_bar is positive": lambda: ddpm.Diffusion([0, 1.5, 1.5]),
    "beta_t = -0.1": lambda: ddpm.Diffusion([0, -0.1]),
    "a beta_t that is nan": lambda: ddpm.Diffusion([0, 0.1, NAN, 0.2]),
    "beta_t = 1e-17, so that 1 - beta_t is 1": lambda: ddpm.Diffusion([0, 1e-17, 0.5]),
    "an alpha_bar_T of 0": lambda: ddpm.Diffusion([0, *[0.9999] * 100]),
    "an alpha_bar_T of 1e-96, which is 0 in float32": lambda: ddpm.Diffusion([0, *[0.999] * 32]),
    "a T of 10.5": lambda: ddpm.cosine_schedule(10.5),
    "a schedule of no timesteps": lambda: ddpm.Diffusion(ddpm.linear_schedule(0)),
    "sigma2 from timestep 1": lambda: ancestral(BETA[1:]),
    "sigma2 of another T": lambda: ancestral(ddpm.linear_schedule(T + 3)),
    "a sigma2 below 0": lambda: ancestral(with_entry(BETA, T, -0.1)),
    "a sigma2 that is nan": lambda: ancestral(with_entry(BETA, 2, NAN)),
    "a sigma2 of another T in a step": lambda: one_step(sigma2=ddpm.linear_schedule(T + 3)),
    "a sigma2 that is nan in a step": lambda: one_step(sigma2=with_entry(BETA, 3, NAN)),
    **{f"{what} in {where}": lambda table=table, take=take: take([BETA, table])
       for where, take in (("the bound", bound), ("the learned bound", learned_bound))
       for what, table in (("a sigma2 below 0", with_entry(BETA, 3, -0.1)),
                           ("a sigma2 of 0 at t = 2", with_entry(BETA, 2, 0.0)),
                           ("a sigma2 of 0 at t = T", with_entry(BETA, T, 0.0)),
                           ("a sigma2 that is nan", with_entry(BETA, 2, NAN)),
                           ("a sigma2 of another T", torch.cat([BETA, BETA[-1:]])))},
    "one table instead of a list of tables": lambda: bound(BETA),
    # levels
    **{f"{what} in {where}": lambda x0=x0, take=take: take(x0=x0)
       for where, take in (("the bound", bound), ("the learned bound", learned_bound))
       for what, x0 in (("all pixels off the 256 levels", 0.3 * levels()),
                        ("one pixel off the 256 levels", levels(0.3)),
                        ("one pixel half a level off", levels(1 - 1 / 255)),
                        ("one pixel a twentieth of a level off", levels(1 - 0.1 / 255)),
                        ("one pixel half a level beyond the end", levels(1 + 1 / 255)),
                        ("one pixel beyond the end levels", levels(-1 - 2 / 255)),
                        ("one pixel of nan", levels(NAN)),
                        ("pixels of 0 .. 255", levels(255, 128)))},
    # numbers
    "eta = -0.1": lambda: ddim([2, 4], eta=-0.1),
    "eta = 1.1": lambda: ddim([2, 4], eta=1.1),
    "an eta that is nan": lambda: ddim([2, 4], eta=NAN),
    "an eta that is nan in a step": lambda: ddim_step(3, 1, eta=NAN),
    "eta = 1.1 in a step": lambda: ddim_step(3, 1, eta=1.1),
    "a step upwards with noise": lambda: ddim_step(2, 3, eta=0.5),
    "a step to s = t with noise": lambda: ddim_step(3, 3, eta=0.5),
    "a step to s = -1": lambda: ddim_step(3, -1),
    "a step to s = T + 1": lambda: ddim_step(3, T + 1),
    "a step from t = T + 1": lambda: ddim_step(T + 1, 2),
    "a DDIM step from t = 0": lambda: ddim_step(0, 2, clip=False),
    "an ancestral step from t = 0": lambda: one_step(0),
    "an ancestral step from t = -1": lambda: one_step(-1),
    "an ancestral step from t = T + 1": lambda: one_step(T + 1),
    "a start at T + 1": lambda: ancestral(start=T + 1),
    "a start at -1": lambda: ancestral(start=-1),
    "a start at T + 1 with learned variances": lambda: improved.sample_ancestral(
        learned, d(), images(2, 3), start=T + 1),
    "more timesteps than T": lambda: ddpm.ddim_timesteps(10, 11),
    "no timesteps": lambda: ddpm.ddim_timesteps(10, 0),
    "-1 timesteps": lambda: ddpm.ddim_timesteps(10, -1),
    **{f"the timesteps {steps} of {what}": lambda steps=steps, take=take: take(steps)
       for steps in WRONG_TIMESTEPS
       for what, take in (("DDIM", ddim),
                          ("respacing", lambda steps: improved.respaced(model, d(), steps)))},
    "t = n + 1 for a respaced model": lambda: improved.respaced(model, d(), [2, 4])[0](
        images(2, 3), torch.tensor([1, 3])),
    # networks
    "attention=(16,), which is a size and not a level": lambda: ddpm.UNet(attention=(16,)),
    "attention=(-1,)": lambda: ddpm.UNet(**SMALL, attention=(-1,)),
    "t of float32 for the network": lambda: output(t=(1.0, 2.0)),
    "t = 0 for the network": lambda: output(t=(0, 1)),
    "one t for two images": lambda: output(t=(3,)),
    "t of two dimensions": lambda: output(t=((1, 2),)),
    "labels for a network without classes": lambda: output(y=torch.tensor([0, 1])),
    "a label above num_classes": lambda: output(y=torch.tensor([0, 4]), num_classes=3),
    "a label of -1": lambda: output(y=torch.tensor([0, -1]), num_classes=3),
    "one label for two images": lambda: output(y=torch.tensor([1]), num_classes=3),
    # labels and guidance
    "p = 1.5": lambda: improved.drop_labels(torch.tensor([1, 2]), 3, 1.5),
    "p = -0.5": lambda: improved.drop_labels(torch.tensor([1, 2]), 3, -0.5),
    "a p that is nan": lambda: improved.drop_labels(torch.tensor([1, 2]), 3, NAN),
    "labels of float32": lambda: improved.drop_labels(torch.tensor([1.0, 2.0]), 3),
    "one label that guides two images": lambda: improved.guided(
        lambda xt, t, y: xt, torch.tensor([1]), 3, 2.0)(images(2, 3), torch.tensor([1, 1])),
    "three w for two images": lambda: improved.guided(
        lambda xt, t, y: xt, torch.tensor([1, 2]), 3, torch.tensor([1.0, 2.0, 3.0]))(
        images(2, 3), torch.tensor([1, 1])),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_call_is_rejected(what):
    """It raises an exception with a message. The type of the exception is free."""
    try:
        result = WRONG[what]()
    except checks.REJECTIONS as error:
        assert str(error).strip(), f"{type(error).__name__} without a message"
    else:
        raise checks.broken("rejection", f"{what}: not rejected, but returned {result}")


def is_finite(what, x):
    """Assert that all values are finite."""
    __tracebackhide__ = True
    bad = (~x.isfinite()).sum().item()
    assert bad == 0, f"{what}: {bad} of {x.numel()} values are not finite"


RIGHT = {
    "t = 0": lambda: noisy(0),
    "t = T": lambda: noisy(T),
    "t = (0, T)": lambda: noisy(torch.tensor([0, T])),
    "a t that is a NumPy integer": lambda: noisy(np.int64(2)),
    "t = (1, T) in L_simple": lambda: simple(t=(1, T)),
    "t = (1, T) in L_hybrid": lambda: hybrid(t=(1, T)),
    **{f"the timesteps {[*steps]} and eta = {eta}": lambda steps=steps, eta=eta: ddim(steps, eta=eta)
       for steps in ([1], [T], [2], range(1, T + 1), np.array([2, 4])) for eta in (0, 0.5, 1)},
    "a step from T to 0": lambda: ddim_step(T, 0, eta=1.0),
    "a step upwards without noise": lambda: ddim_step(1, T, clip=False),
    "a start at 1": lambda: ancestral(start=1),
    "a start at T": lambda: ancestral(start=T),
    "a sigma2 of 0": lambda: ancestral(0 * BETA),
    "a sigma2 whose entry at t = 0 is nan": lambda: ancestral(with_entry(BETA, 0, NAN)),
    "a sigma2 of float32": lambda: ancestral(BETA.float()),
    "the bound of a sigma2 whose entry at t = 0 is nan": lambda: bound([with_entry(BETA, 0, NAN)]),
    "the bound of all 256 levels": lambda: bound(x0=torch.from_numpy(ref.pixel_value(
        np.arange(256.0)))[:, None]),
    "the bound of the 256 levels in float32": lambda: bound(x0=torch.from_numpy(ref.pixel_value(
        np.arange(256.0)))[:, None].float()),
    "an alpha_bar_T of 1e-30": lambda: ddpm.Diffusion([0, *[0.999] * 10]).alpha_bar,
    "beta_t = 1e-12": lambda: ddpm.Diffusion([0, 1e-12, 0.5]).alpha_bar,
    "the last label": lambda: output(y=torch.tensor([0, 3]), num_classes=3),
    "four channels and two frequencies": lambda: output(ch=4),
    "attention on all levels": lambda: output(attention=(0, 1)),
    "p = 0": lambda: improved.drop_labels(torch.tensor([1, 2]), 3, 0.0),
    "p = 1": lambda: improved.drop_labels(torch.tensor([1, 2]), 3, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("what", RIGHT)
def test_a_call_at_the_edge_of_the_valid_range_is_not_rejected(what):
    """The result is finite."""
    is_finite(what, torch.as_tensor(RIGHT[what]()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_runs_under_autocast(dtype):
    """Images may be float32 or bfloat16 there."""
    with torch.autocast("cpu", torch.bfloat16):
        is_finite("output", output(images(dtype=dtype)))


def test_a_respaced_diffusion_accepts_an_array_of_timesteps():
    """np.array([2, 4]) gives T = 2."""
    T = improved.respaced(model, d(), np.array([2, 4]))[1].T
    assert T == 2, f"T is {T}"

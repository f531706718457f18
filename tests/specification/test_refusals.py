"""Refusals: what is out of range raises, in words; it is never ignored, rounded or repeated to fit."""

import judge
import numpy as np
import pytest
import torch
from test_6_ancestral import BRUTAL, generator

import ddpm
import improved

T, BETA = len(BRUTAL) - 1, torch.from_numpy(BRUTAL)
SMALL = dict(ch=8, mult=(1, 2), blocks=1, groups=4)


def d():
    return ddpm.Diffusion(BRUTAL)


def model(xt, t):
    return 0.1 * xt


def learned(xt, t):
    return torch.cat([xt, xt], dim=1)


def images(*shape, dtype=torch.float32):
    return torch.ones(shape or (2, 3, 8, 8), dtype=dtype)


def ask(xt=None, t=(1, 2), y=None, **how):
    """A small network's answer."""
    t = torch.tensor(t) if isinstance(t, tuple) else t
    return ddpm.UNet(**{**SMALL, **how})(images() if xt is None else xt, t, y)


def simple(x0=None, t=(1, 2), model=model, loss=lambda: ddpm.loss_simple):
    return loss()(
        model, d(), images(2, 3) if x0 is None else x0, None if t is None else torch.tensor(t)
    )


def hybrid(**how):
    return simple(**{"model": learned, "loss": lambda: improved.loss_hybrid, **how})


def noise(t, images_=2):
    return d().q_sample(images(images_, 3), t, images(images_, 3))


def ddim(grid, **how):
    return ddpm.sample_ddim(model, d(), images(2, 3), grid, **how)


def bound(variances=(BETA,), x0=None):
    return ddpm.bound_terms(model, d(), images(2, 3) if x0 is None else x0, variances)


REFUSED = {
    # steps
    "t = -1": lambda: noise(-1), "t = T + 1": lambda: noise(T + 1), "t = 1.5": lambda: noise(1.5),
    "t of float32": lambda: noise(torch.tensor([1.0, 2.0])), "t = True": lambda: noise(True),
    "three t for two images": lambda: noise(torch.tensor([1, 2, 3])),
    "three t for one image": lambda: noise(torch.tensor([1, 2, 3]), 1),
    "no t at all": lambda: noise(torch.tensor([], dtype=torch.int64)),
    "a reverse step from t = 0": lambda: d().p_mean(images(2, 3), torch.tensor([1, 0]), images(2, 3)),
    "the noise of a clean image": lambda: d().eps_from_x0(images(2, 3), torch.tensor([0, 2]), images(2, 3)),
    "a learned variance at t = 0": lambda: improved.variance(d(), 0, images(2, 3)),
    "a learned term at t = 0": lambda: improved.bound_term(
        d(), images(2, 3), images(2, 3), torch.tensor([2, 0]), images(2, 3), images(2, 3)),
    "0 among the t of L_simple": lambda: simple(t=(1, 0)),
    "0 among the t of L_hybrid": lambda: hybrid(t=(1, 0)),
    "one t for L_simple": lambda: simple(t=3), "one t for L_hybrid": lambda: hybrid(t=3),
    "a t of float32 for L_simple": lambda: simple(t=(1.0, 2.0)),
    # images
    "images of uint8, noised": lambda: d().q_sample(images(2, 3, dtype=torch.uint8), 1, images(2, 3)),
    "images of uint8, in L_simple": lambda: simple(images(2, 3, dtype=torch.uint8), None),
    "images of uint8, in L_hybrid": lambda: hybrid(x0=images(2, 3, dtype=torch.uint8), t=None),
    "images of uint8, in the bound": lambda: bound(x0=images(2, 3, dtype=torch.uint8)),
    "images of int64, for their noise": lambda: ddpm.noise_like(images(2, 3, dtype=torch.int64)),
    "images of uint8, to sample from": lambda: ddpm.sample_ancestral(
        model, d(), images(2, 3, dtype=torch.uint8)),
    "NumPy's arrays": lambda: d().q_sample(np.ones((2, 3)), 1, np.ones((2, 3))),
    "an empty batch, noised": lambda: noise(1, 0),
    "an empty batch, in L_simple": lambda: simple(images(0, 3), None),
    "an empty batch, in L_hybrid": lambda: hybrid(x0=images(0, 3), t=None),
    "an empty batch, to sample from": lambda: ddpm.sample_ancestral(model, d(), images(0, 3)),
    "an empty batch, for DDIM": lambda: ddpm.sample_ddim(model, d(), images(0, 3), [4]),
    "an empty batch, in the bound": lambda: bound(x0=images(0, 3)),
    "a number for an image": lambda: d().q_sample(torch.tensor(0.5), 1, torch.tensor(0.5)),
    "noise of another shape": lambda: d().q_sample(images(2, 1), 1, images(2)),
    "an answer of another shape": lambda: simple(model=lambda xt, t: xt[:, :1]),
    "an answer without v": lambda: hybrid(model=model),
    "v of another shape": lambda: improved.bound_term(
        d(), images(2, 3), images(2, 3), 2, images(2, 3), images(2, 1)),
    "x0 off the 256 levels": lambda: bound(x0=0.3 * images(2, 3)),
    "x0 of nan": lambda: bound(x0=images(2, 3) * torch.nan),
    # tables, grids, generators
    "beta_0 that is not 0": lambda: ddpm.Diffusion([0.1, 0.2]), "beta of 1": lambda: ddpm.Diffusion([0, 1.0]),
    "beta of 1e-17, so that 1 - beta is 1": lambda: ddpm.Diffusion([0, 1e-17, 0.5]),
    "a schedule of no steps": lambda: ddpm.Diffusion(ddpm.linear_schedule(0)),
    "sigma2 from step 1": lambda: ddpm.sample_ancestral(model, d(), images(2, 3), d().beta[1:]),
    "sigma2 of another T": lambda: ddpm.sample_ancestral(
        model, d(), images(2, 3), ddpm.linear_schedule(T + 3)),
    "a sigma2 below 0": lambda: ddpm.sample_ancestral(model, d(), images(2, 3), -BETA),
    "the bound of a sigma2 below 0": lambda: bound([BETA - 0.5]),
    "the bound of one bare table": lambda: bound(d().beta),
    "the bound of a table of another T": lambda: bound([ddpm.linear_schedule(T + 3)]),
    "eta = -0.1": lambda: ddim([2, 4], eta=-0.1), "eta = 1.1": lambda: ddim([2, 4], eta=1.1),
    "more steps than there are": lambda: ddpm.ddim_grid(10, 11), "no steps": lambda: ddpm.ddim_grid(10, 0),
    "more generators than images": lambda: ddpm.noise_like(images(1, 3), [generator(), generator()]),
    "fewer generators than images": lambda: ddpm.noise_like(images(4, 3), [generator()]),
    # networks
    "attention=(16,), a size, not a level": lambda: ddpm.UNet(attention=(16,)),
    "attention=(-1,)": lambda: ddpm.UNet(**SMALL, attention=(-1,)),
    "ch=24, not a multiple of 32 groups": lambda: ddpm.UNet(ch=24), "ch=5": lambda: ddpm.UNet(ch=5, groups=1),
    "ch=2": lambda: ddpm.UNet(ch=2, groups=1), "no groups": lambda: ddpm.UNet(groups=0),
    "no levels": lambda: ddpm.UNet(mult=()), "no blocks": lambda: ddpm.UNet(blocks=0),
    "a level of no channels": lambda: ddpm.UNet(mult=(1, 0)),
    "out_channels=0": lambda: ddpm.UNet(out_channels=0), "num_classes=0": lambda: ddpm.UNet(num_classes=0),
    "dropout=1.5": lambda: ddpm.UNet(dropout=1.5),
    "a side that the levels do not divide": lambda: ask(images(2, 3, 8, 9)),
    "images of no size": lambda: ask(images(2, 3, 0, 8)),
    "images without channels": lambda: ask(images(2, 8, 8)),
    "images of four channels": lambda: ask(images(2, 4, 8, 8)),
    "an empty batch, for the network": lambda: ask(images(0, 3, 8, 8), torch.ones(0, dtype=torch.int64)),
    "images in float32, a network in bfloat16": lambda: ddpm.UNet(**SMALL).bfloat16()(
        images(), torch.tensor([1, 2])),
    "images in float16, a network in float32": lambda: ask(images(dtype=torch.float16)),
    "a t of float32, for the network": lambda: ask(t=(1.0, 2.0)), "an int for t": lambda: ask(t=3),
    "one t for two images": lambda: ask(t=(3,)), "t of two dimensions": lambda: ask(t=((1, 2),)),
    "labels for a network without": lambda: ask(y=torch.tensor([0, 1])),
    "a label beyond the last": lambda: ask(y=torch.tensor([0, 4]), num_classes=3),
    "a label of -1": lambda: ask(y=torch.tensor([0, -1]), num_classes=3),
    "labels of float32": lambda: ask(y=torch.tensor([0.0, 1.0]), num_classes=3),
    "one label for two images": lambda: ask(y=torch.tensor([1]), num_classes=3),
    # labels
    "labels dropped with p = 1.5": lambda: improved.drop_labels(torch.tensor([1, 2]), 3, 1.5),
    "labels of float32, dropped": lambda: improved.drop_labels(torch.tensor([1.0, 2.0]), 3),
    "one label guides two images": lambda: improved.guided(
        lambda xt, t, y: xt, torch.tensor([1]), 3, 2.0)(images(2, 3), torch.tensor([1, 1])),
    **{f"a grid of {grid}, for {what}": lambda grid=grid, take=take: take(grid)
       for grid in ([], [0, 4], [2, 2], [3, 1], [-1, 4], [2, 5], [1.5, 4])
       for what, take in (("DDIM", ddim), ("strided", lambda grid: improved.strided(model, d(), grid)))},
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_is_refused_in_words(what):
    """By an exception that says something; which one is a matter of taste."""
    try:
        REFUSED[what]()
    except judge.REFUSALS as refusal:
        assert str(refusal).strip(), "refused without a word"
    else:
        raise judge.broken("refusal", f"{what}: not refused")


def test_what_is_in_range_is_not_refused():
    """Edges: t = 0 and T noised, t = 1 and T in a loss, eta 0 and 1, one step, the last label; autocast."""
    assert all(noise(t).isfinite().all() for t in (0, T, torch.tensor([0, T]), np.int64(2)))
    assert simple(t=(1, T)).isfinite() and hybrid(t=(1, T)).isfinite()
    assert all(ddim(grid, eta=eta).isfinite().all() for grid in ([1], [T], range(1, T + 1), np.array([2, 4]))
               for eta in (0, 1))  # fmt: skip
    assert improved.strided(model, d(), np.array([2, 4]))[1].T == 2
    assert ask(y=torch.tensor([0, 3]), num_classes=3).isfinite().all()
    assert ask(ch=4).isfinite().all() and ask(attention=(0, 1)).isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert ask().isfinite().all() and ask(images(dtype=torch.bfloat16)).isfinite().all()

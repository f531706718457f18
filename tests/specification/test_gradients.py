"""Gradients of every function with respect to each of its inputs.

The derivative of autograd along a random direction u is compared with the difference quotient
(f(x + h u) - f(x - h u)) / 2h of the reference. For a network, it is the quotient of its own outputs, whose values
section 9 tests. A path that passes no gradient is visible, because its share of the slope is missing.
"""

import inspect

import checks
import numpy as np
import pytest
import torch
from calls import ddpm, improved, likelihood
from checks import close
from test_6_ancestral import BRUTAL
from test_contract import MADE, inputs, weights

import reference_numpy as ref

LN2 = np.log(2)
T_OF_EACH = np.array([3, 2, 4])
H = 1e-5


def coefficients():
    """Return (signal, noise, c_0, c_t, beta_tilde), each (3, 1, 1, 1): one t for each of three images."""
    signal, noise = ref.forward_moments(BRUTAL)
    posterior = np.array([ref.posterior(BRUTAL, t) for t in T_OF_EACH]).T
    rows = signal[T_OF_EACH], noise[T_OF_EACH] ** 0.5, *posterior
    return [row[:, None, None, None] for row in rows]


def mean(x0, xt):
    """Return mu_tilde (eq. 7)."""
    _, _, c_0, c_t, _ = coefficients()
    return c_0 * x0 + c_t * xt


def solved(xt, eps):
    """Return the predicted x0 (eq. 15)."""
    signal, noise, *_ = coefficients()
    return (xt - noise * eps) / signal


def noisy(x0, eps):
    """Return xt (eq. 4)."""
    signal, noise, *_ = coefficients()
    return signal * x0 + noise * eps


def learned_variances(v):
    return np.array([ref.learned_variance(BRUTAL, t, part) for t, part in zip(T_OF_EACH, v)])


def kl_bits(x0, xt, mu, sigma2):
    """Return L_{t-1} (3,) in bits/dim."""
    var = coefficients()[-1]
    return (ref.gaussian_kl(mean(x0, xt), var, mu, sigma2) / LN2).reshape(3, -1).mean(1)


def levels():
    """Return the levels k of the images x0 of `inputs`."""
    return np.round((inputs()["x0"].numpy() + 1) * 127.5)


def decoder_bits(mu, sigma2):
    """Return L_0 (3,) in bits/dim. x0 stays on its levels."""
    return (-ref.decoder_log_prob(levels(), mu, sigma2) / LN2).reshape(3, -1).mean(1)


def solved_at_1(xt, eps):
    """Return mu_theta at t = 1, which is the predicted x0."""
    signal, noise = ref.forward_moments(BRUTAL)
    return (xt - noise[1] ** 0.5 * eps) / signal[1]


def ddim_mean(xt, eps, t, s, eta):
    """Return the mean of DDIM eq. 12."""
    signal, noise = ref.forward_moments(BRUTAL)
    k_0, k_t, _ = ref.ddim_step(BRUTAL, t, s, eta)
    return k_0 * (xt - noise[t] ** 0.5 * eps) / signal[t] + k_t * xt


def ancestral_mean(xt, eps, t):
    """Return mu_theta (eq. 11)."""
    signal, noise = ref.forward_moments(BRUTAL)
    c_0, c_t, _ = ref.posterior(BRUTAL, t)
    return c_0 * (xt - noise[t] ** 0.5 * eps) / signal[t] + c_t * xt


def hybrid_model(w, v):
    """Return a model with eps = w for each xt, so that L_vlb, which detaches eps, does not depend on w."""
    return lambda xt, t: torch.cat([w, v * xt], dim=1)


def d():
    return ddpm.Diffusion(BRUTAL)


def two_nets(none, w, eps):
    """Return a labelled model: tanh(w xt) for images without a label, tanh(eps xt) for the others."""

    def net(xt, t, y):
        copies = len(y) // len(w)
        scale = torch.where(
            y[:, None, None, None] == none, *(x.repeat(copies, 1, 1, 1) for x in (w, eps))
        )
        return torch.tanh(scale * xt)

    return net


t = torch.from_numpy(T_OF_EACH)
# Each function: how it is called, and the reference. The arguments are those of `inputs`; w is a second xt.
SMOOTH = {
    "q_sample": (lambda x0, eps: d().q_sample(x0, t, eps), noisy),
    "posterior_mean": (lambda x0, xt: d().posterior_mean(x0, xt, t), mean),
    "x0_from_eps": (lambda xt, eps: d().x0_from_eps(xt, t, eps), solved),
    "eps_from_x0": (lambda xt, x0: d().eps_from_x0(xt, t, x0),
                    lambda xt, x0: (xt - noisy(x0, 0)) / noisy(0, 1)),
    "p_mean": (lambda xt, eps: d().p_mean(xt, t, eps, clip=False),
               lambda xt, eps: mean(solved(xt, eps), xt)),
    "p_mean with clipping": (lambda xt, eps: d().p_mean(xt, t, eps),
                             lambda xt, eps: mean(solved(xt, eps).clip(-1, 1), xt)),
    "loss_simple": (lambda x0, eps, w: ddpm.loss_simple(lambda xt, t: torch.tanh(w * xt), d(), x0, t, eps),
                    lambda x0, eps, w: ((eps - np.tanh(w * noisy(x0, eps))) ** 2).mean()),
    "ancestral_step": (lambda xt, eps: ddpm.ancestral_step(
        d(), xt, 3, eps, 0 * d().beta, clip=False), lambda xt, eps: ancestral_mean(xt, eps, 3)),
    "ancestral_step at t = 1": (lambda xt, eps: ddpm.ancestral_step(d(), xt, 1, eps, clip=False),
                                solved_at_1),
    "ancestral_step with noise": (lambda xt, eps: ddpm.ancestral_step(
        d(), xt, 3, eps, clip=False, noise=torch.ones_like),
        lambda xt, eps: ancestral_mean(xt, eps, 3) + BRUTAL[3] ** 0.5),
    "ddim_step with noise": (lambda xt, eps: ddpm.ddim_step(
        d(), xt, 4, 2, eps, eta=0.5, clip=False, noise=torch.ones_like),
        lambda xt, eps: ddim_mean(xt, eps, 4, 2, 0.5) + ref.ddim_step(BRUTAL, 4, 2, 0.5)[2] ** 0.5),
    "ddim_step": (lambda xt, eps: ddpm.ddim_step(d(), xt, 4, 2, eps, clip=False),
                  lambda xt, eps: ddim_mean(xt, eps, 4, 2, 0.0)),
    "ddim_step with clipping": (
        lambda xt, eps: ddpm.ddim_step(d(), xt, 4, 0, eps),
        lambda xt, eps: ddim_mean(xt, eps, 4, 0, 0.0).clip(-1, 1)),
    "normal_kl": (lambda xt, v, eps, w: likelihood.normal_kl(xt, v.exp(), eps, w.exp()),
                  lambda xt, v, eps, w: ref.gaussian_kl(xt, np.exp(v), eps, np.exp(w))),
    "discretized_log_likelihood": (
        lambda xt, v: likelihood.discretized_log_likelihood(inputs()["x0"], xt, v.exp()),
        lambda xt, v: ref.decoder_log_prob(levels(), xt, np.exp(v))),
    "bound_term": (lambda x0, xt, eps, v: likelihood.bound_term(d(), x0, xt, t, eps, v.exp()),
                   lambda x0, xt, eps, v: kl_bits(x0, xt, eps, np.exp(v))),
    "bound_term at t = 1": (
        lambda xt, v: likelihood.bound_term(d(), inputs()["x0"], xt, 1, xt, v.exp()),
        lambda xt, v: decoder_bits(xt, np.exp(v))),
    "improved.variance": (lambda v: improved.variance(d(), t, v), learned_variances),
    "improved.eps_only": (lambda xt, w: improved.eps_only(
        lambda xt, t: torch.cat([torch.tanh(w * xt), xt], dim=1))(xt, t), lambda xt, w: np.tanh(w * xt)),
    "improved.bound_term": (
        lambda x0, xt, eps, v: improved.bound_term(d(), x0, xt, t, eps, v, clip=False),
        lambda x0, xt, eps, v: kl_bits(x0, xt, mean(solved(xt, eps), xt), learned_variances(v))),
    "improved.bound_term at t = 1": (
        lambda xt, eps, v: improved.bound_term(d(), inputs()["x0"], xt, 1, eps, v, clip=False),
        lambda xt, eps, v: decoder_bits(solved_at_1(xt, eps), ref.learned_variance(BRUTAL, 1, v))),
    "improved.ancestral_step": (lambda xt, eps, v: improved.ancestral_step(
        d(), xt, 3, eps, v, clip=False, noise=torch.ones_like),
        lambda xt, eps, v: ancestral_mean(xt, eps, 3) + ref.learned_variance(BRUTAL, 3, v) ** 0.5),
    "improved.ancestral_step at t = 1": (lambda xt, eps: improved.ancestral_step(
        d(), xt, 1, eps, torch.zeros_like(xt), clip=False), solved_at_1),
    "improved.loss_hybrid": (
        lambda x0, eps, v: improved.loss_hybrid(hybrid_model(inputs()["xt"], v), d(), x0, t, eps, weight=0.1),
        lambda x0, eps, v: ((eps - inputs()["xt"].numpy()) ** 2).mean() + 0.1 * 4 * kl_bits(
            x0, noisy(x0, eps), mean(solved(noisy(x0, eps), inputs()["xt"].numpy()), noisy(x0, eps)),
            learned_variances(v * noisy(x0, eps))).mean()),
    "improved.respaced": (
        lambda xt, w: improved.respaced(lambda xt, t: torch.tanh(w * xt), d(), [2, 4])[0](xt, t - 2),
        lambda xt, w: np.tanh(w * xt)),
}  # fmt: skip
# The w of each image is the first value of its v.
SMOOTH["improved.guided with a w of each image"] = (
    lambda xt, w, eps, v: improved.guided(
        two_nets(3, w, eps), torch.tensor([0, 1, 1]), 3, v[:, 0, 0, 0])(xt, t),
    lambda xt, w, eps, v: np.tanh(eps * xt)
        + v[:, :1, :1, :1] * (np.tanh(eps * xt) - np.tanh(w * xt)))  # fmt: skip
for scale in (0.0, -1.0, 2.0):
    SMOOTH[f"improved.guided at w = {scale:g}"] = (
        lambda xt, w, eps, scale=scale: improved.guided(
            two_nets(3, w, eps), torch.tensor([0, 1, 1]), 3, scale
        )(xt, t),
        lambda xt, w, eps, scale=scale: (1 + scale) * np.tanh(eps * xt) - scale * np.tanh(w * xt),
    )


def compare(function, reference, given, name):
    """Assert that the slope of `function` in the argument `name`, along a direction, is the reference's.

    For values of order 1, the quotient has an error of EPS / H = 2e-11, and of H^2 = 1e-10 times a third
    derivative. 1e-6 leaves room for slopes that cancel. A missing path causes a far larger error.
    """
    __tracebackhide__ = True
    x = given[name].clone().requires_grad_()
    u = torch.randn(x.shape, generator=checks.generator(21), dtype=torch.float64)
    value = function(**{**given, name: x})
    c = torch.randn(value.shape, generator=checks.generator(22), dtype=torch.float64)
    slope = None
    if value.requires_grad:
        (slope,) = torch.autograd.grad((c * value).sum(), x, allow_unused=True)
    up, down = (np.asarray(reference(**{**given, name: given[name] + h * u})) for h in (H, -H))
    want = (c.numpy() * (up - down)).sum() / (2 * H)
    close(
        f"slope in {name}", 0.0 if slope is None else (slope * u).sum(), want, 1e-6, 1 + abs(want)
    )


PAIRS = [(function, name) for function in SMOOTH for name in inspect.signature(SMOOTH[function][0]).parameters
         if name != "scale"]  # fmt: skip


@pytest.mark.parametrize("function, name", PAIRS, ids=lambda x: x)
def test_gradients_are_the_slopes_of_the_reference(function, name):
    """In images, noise, variances and models: nothing is detached, and clipping stops the gradient."""
    torch_form, numpy_form = SMOOTH[function]

    def reference(**given):
        return numpy_form(**{key: x.numpy() for key, x in given.items()})

    compare(torch_form, reference, tensors_of(torch_form), name)


def tensors_of(function, dtype=torch.float64):
    """Return the arguments of a function of SMOOTH."""
    pool = inputs()
    pool["w"] = torch.randn(pool["xt"].shape, generator=checks.generator(3), dtype=torch.float64)
    names = [key for key in inspect.signature(function).parameters if key != "scale"]
    return {key: pool[key].to(dtype) for key in names}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("function", SMOOTH)
def test_values_are_those_of_the_reference(function, dtype):
    """In float64 and in float32, for images that are not square. Sums of 48 terms of order 1 are rounded."""
    torch_form, numpy_form = SMOOTH[function]
    given = tensors_of(torch_form, dtype)
    want = numpy_form(**{key: x.double().numpy() for key, x in given.items()})
    scale = 1 + abs(np.asarray(want))
    close("value", torch_form(**given), want, 256 * torch.finfo(dtype).eps, scale)


# --- The network ---------------------------------------------------------------------------------

Y = torch.tensor([3, 0, 3])  # of three classes, where 3 is no label: two images share its row
LAYERS = {
    "block": ("xt", "emb"),
    "attention": ("xt",),
    "net": ("xt", "t", "y"),
    "training": ("xt", "t", "y"),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_of_the_network_are_the_slopes_of_its_outputs(layer):
    """In its input, its embedding and all its weights, with the row for "no label", which two images share: no
    skip connection, residual branch or shortcut is detached."""
    net, pool = MADE[layer](), dict(inputs(), y=Y, t=t)
    names = {name: p.shape for name, p in net.named_parameters() if p.requires_grad}
    given = {key: pool[key] for key in LAYERS[layer]}
    given["all_weights"] = torch.cat([p.detach().flatten() for p in weights(net)])

    def function(all_weights, **arguments):
        parts = all_weights.split([shape.numel() for shape in names.values()])
        moved = {
            name: part.reshape(shape)
            for (name, shape), part in zip(names.items(), parts, strict=True)
        }
        return torch.func.functional_call(net, moved, tuple(arguments.values()))

    for name in given.keys() - {"t", "y"}:
        compare(function, lambda **x: function(**x).detach().numpy(), given, name)

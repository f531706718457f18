"""Gradients: of every function with respect to everything that it is made of.

Along a random direction u, the derivative that autograd gives is compared with (f(x + h u) - f(x - h u)) / 2h
of the reference, or, of a network, of its own outputs, which section 9 judges. One cut path is seen: its
share of the slope is missing.
"""

import inspect

import judge
import numpy as np
import pytest
import torch
from judge import close
from test_6_ancestral import BRUTAL
from test_contract import MADE, inputs

import ddpm
import improved
import reference_numpy as ref

LN2 = np.log(2)
T_OF_EACH = np.array([3, 2, 4])
H = 1e-5


def coefficients():
    """(signal, noise, c_0, c_t, beta_tilde) at the t of each of three images, to scale them."""
    signal, noise = ref.forward_moments(BRUTAL)
    posterior = np.array([ref.posterior(BRUTAL, t) for t in T_OF_EACH]).T
    rows = signal[T_OF_EACH], noise[T_OF_EACH] ** 0.5, *posterior
    return [row[:, None, None, None] for row in rows]


def mean(x0, xt):
    """mu_tilde."""
    _, _, c_0, c_t, _ = coefficients()
    return c_0 * x0 + c_t * xt


def solved(xt, eps):
    """x0 of eq. 15."""
    signal, noise, *_ = coefficients()
    return (xt - noise * eps) / signal


def noisy(x0, eps):
    signal, noise, *_ = coefficients()
    return signal * x0 + noise * eps


def learned_variances(v):
    return np.array([ref.learned_variance(BRUTAL, t, part) for t, part in zip(T_OF_EACH, v)])


def kl_bits(x0, xt, mu, sigma2):
    """L_{t-1} of each image, in bits per dimension."""
    var = coefficients()[-1]
    return (ref.gaussian_kl(mean(x0, xt), var, mu, sigma2) / LN2).reshape(3, -1).mean(1)


def decoder_bits(xt, eps, v):
    """L_0 of the images of `inputs`, whose x0 is fixed: it is on levels; t = 1, and no clipping."""
    signal, noise = ref.forward_moments(BRUTAL)
    k = np.round((inputs()["x0"].numpy() + 1) * 127.5)
    mu, sigma2 = (xt - noise[1] ** 0.5 * eps) / signal[1], ref.learned_variance(BRUTAL, 1, v)
    return (-ref.decoder_log_prob(k, mu, sigma2) / LN2).reshape(3, -1).mean(1)


def hybrid_model(w, v):
    """eps = w whatever xt is, so that L_vlb, which detaches it, depends on w in no other way."""
    return lambda xt, t: torch.cat([w, v * xt], dim=1)


def d():
    return ddpm.Diffusion(BRUTAL)


def two_nets(none, w, eps):
    """A labelled model: tanh(w xt) for images without a label, tanh(eps xt) for the others."""

    def net(xt, t, y):
        copies = len(y) // len(w)
        scale = torch.where(
            y[:, None, None, None] == none, *(x.repeat(copies, 1, 1, 1) for x in (w, eps))
        )
        return torch.tanh(scale * xt)

    return net


t = torch.from_numpy(T_OF_EACH)
# Of each function: how it is called, and the reference. The names are those of `inputs`; w is a second xt.
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
    "normal_kl": (lambda xt, v, eps, w: ddpm.normal_kl(xt, v.exp(), eps, w.exp()),
                  lambda xt, v, eps, w: ref.gaussian_kl(xt, np.exp(v), eps, np.exp(w))),
    "discretized_log_likelihood": (
        lambda xt, v: ddpm.discretized_log_likelihood(inputs()["x0"], xt, v.exp()),
        lambda xt, v: ref.decoder_log_prob(np.round((inputs()["x0"].numpy() + 1) * 127.5), xt, np.exp(v))),
    "improved.variance": (lambda v: improved.variance(d(), t, v), learned_variances),
    "improved.eps_only": (lambda xt, w: improved.eps_only(
        lambda xt, t: torch.cat([torch.tanh(w * xt), xt], dim=1))(xt, t), lambda xt, w: np.tanh(w * xt)),
    "improved.bound_term": (
        lambda x0, xt, eps, v: improved.bound_term(d(), x0, xt, t, eps, v, clip=False),
        lambda x0, xt, eps, v: kl_bits(x0, xt, mean(solved(xt, eps), xt), learned_variances(v))),
    "improved.bound_term at t = 1": (
        lambda xt, eps, v: improved.bound_term(d(), inputs()["x0"], xt, 1, eps, v, clip=False),
        decoder_bits),
    "improved.loss_hybrid": (
        lambda x0, eps, v: improved.loss_hybrid(hybrid_model(inputs()["xt"], v), d(), x0, t, eps, 0.1),
        lambda x0, eps, v: ((eps - inputs()["xt"].numpy()) ** 2).mean() + 0.1 * 4 * kl_bits(
            x0, noisy(x0, eps), mean(solved(noisy(x0, eps), inputs()["xt"].numpy()), noisy(x0, eps)),
            learned_variances(v * noisy(x0, eps))).mean()),
    "improved.strided": (
        lambda xt, w: improved.strided(lambda xt, t: torch.tanh(w * xt), d(), [2, 4])[0](xt, t - 2),
        lambda xt, w: np.tanh(w * xt)),
}  # fmt: skip
for scale in (0.0, -1.0, 2.0):
    SMOOTH[f"improved.guided at w = {scale:g}"] = (
        lambda xt, w, eps, scale=scale: improved.guided(
            two_nets(3, w, eps), torch.tensor([0, 1, 1]), 3, scale
        )(xt, t),
        lambda xt, w, eps, scale=scale: (1 + scale) * np.tanh(eps * xt) - scale * np.tanh(w * xt),
    )


def compare(function, reference, given, name):
    """Assert that the slope of `function` in the argument `name`, along a direction, is the reference's.

    Of values of order 1, a difference over 2 H is good to EPS / H = 2e-11, and H^2 = 1e-10 times a third
    derivative; 1e-6 leaves room for slopes that cancel, and a cut path costs orders more.
    """
    __tracebackhide__ = True
    x = given[name].clone().requires_grad_()
    u = torch.randn(x.shape, generator=judge.generator(21), dtype=torch.float64)
    value = function(**{**given, name: x})
    c = torch.randn(value.shape, generator=judge.generator(22), dtype=torch.float64)
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
    """In the image, the noise, the variances, and whatever a model is made of: nothing is detached, no clip
    passes a gradient where it cuts."""
    torch_form, numpy_form = SMOOTH[function]
    pool = dict(inputs(), w=torch.from_numpy(np.random.default_rng(3).normal(size=(3, 2, 4, 4))))
    given = {key: pool[key] for key in inspect.signature(torch_form).parameters if key != "scale"}

    def reference(**given):
        return numpy_form(**{key: x.numpy() for key, x in given.items()})

    compare(torch_form, reference, given, name)


# --- The network ---------------------------------------------------------------------------------

Y = torch.tensor([0, 3, 1])  # of three classes, where 3 is no label
LAYERS = {
    "block": ("xt", "emb"),
    "attention": ("xt",),
    "net": ("xt", "t", "y"),
    "training": ("xt", "t", "y"),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_of_the_network_are_the_slopes_of_its_outputs(layer):
    """In its input and its embedding, and in all its weights together, the row for no label too: no skip,
    no residual branch, no shortcut is cut off."""
    net, pool = MADE[layer](), dict(inputs(), y=Y, t=t)
    names = {name: p.shape for name, p in net.named_parameters()}
    given = {key: pool[key] for key in LAYERS[layer]}
    given["weights"] = torch.cat([p.detach().flatten() for p in net.parameters()])

    def function(weights, **arguments):
        parts = weights.split([shape.numel() for shape in names.values()])
        moved = {
            name: part.reshape(shape)
            for (name, shape), part in zip(names.items(), parts, strict=True)
        }
        return torch.func.functional_call(net, moved, tuple(arguments.values()))

    for name in given.keys() - {"t", "y"}:
        compare(function, lambda **x: function(**x).detach().numpy(), given, name)

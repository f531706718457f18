"""The network (appendix B and the released code)."""

import copy
import math

import checks
import far
import network_numpy
import numpy as np
import pytest
import torch
from calls import ddpm
from checks import EPS32, close, has_mean, in_float64, rejected, rejects, same, within
from hypothesis import given
from hypothesis import strategies as st
from network_numpy import attention_roles, block_roles, roles
from scipy import stats

from weights import by_role, change_weights, first_met, matched

SMALL = dict(ch=8, mult=(1, 2), blocks=1, attention=(1,), groups=4, dropout=0.0)


def weights_of(net):
    """Return the parameters that training changes. Frozen tables may be registered as parameters too."""
    return [p for p in net.parameters() if p.requires_grad]


def unet(**how):
    """A small network in float64 with random weights, none of them near zero."""
    checks.seed()
    net = ddpm.UNet(**{**SMALL, **how}).double().eval()
    with torch.no_grad():
        for p in weights_of(net):
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 1 else 0.7 / math.sqrt(p[0].numel())))
    return net


def images(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def numpy_network(net, x, t, labels=None, **how):
    """The NumPy network's output for x, t and labels, with the weights of net and its options `how`."""
    how = {**SMALL, **how}
    weights = by_role(net, roles(**how), x, t)
    options = {k: how[k] for k in ("ch", "mult", "blocks", "attention", "groups")}
    labels = None if labels is None else labels.numpy()
    x = x.double().numpy()
    return network_numpy.unet(x, t.numpy(), weights, labels=labels, **options)


# --- The whole network ----------------------------------------------------------------------------


@pytest.mark.parametrize("count, how", [
    (35_746_307, {}),
    (113_673_219, dict(mult=(1, 1, 2, 2, 4, 4), attention=(4,))),
    (35_749_766, dict(out_channels=6)),
], ids=["CIFAR-10", "256x256", "learned variances"])  # fmt: skip
def test_appB_network_has_the_parameters_of_the_released_one(count, how):
    """35,746,307 for CIFAR-10, 113,673,219 for 256x256; 35,749,766 with six output channels."""
    with torch.device("meta"):
        net = ddpm.UNet(**how)
    assert sum(p.numel() for p in weights_of(net)) == count
    assert network_numpy.unet_parameter_count(**how) == count


@pytest.mark.parametrize("how", [
    dict(),
    dict(in_channels=1, out_channels=2),
    dict(mult=(1, 2, 2), attention=(0, 2)),
    dict(mult=(2, 1, 3), attention=(1,), blocks=2, groups=2),
    dict(mult=(1,), attention=()),
    dict(ch=72, mult=(1,), attention=(0,), groups=36),
    dict(num_classes=3),
    dict(num_classes=1),
], ids=str)  # fmt: skip
def test_appB_network_computes_what_the_numpy_network_computes(how):
    """The same weights, images that are not square and t give the same output. Names and places of the
    weights are free; the order of skips, padding, norms, attention and scales are not."""
    net = unet(**how)
    x = images(3, how.get("in_channels", 3), 8, 12)
    t = torch.tensor([1, 4, 9])
    want = numpy_network(net, x, t, **how)
    close(
        matched("eps"), net(x, t), want, 1e-6, np.abs(want).max()
    )  # a float32 embedding is allowed


@in_float64
def test_appB_network_in_float64_computes_in_float64_throughout():
    """net.double() agrees with the float64 NumPy network to rounding: nothing on the way is float32."""
    net, x, t = unet(num_classes=3), images(2, 3, 8, 8), torch.tensor([7, 998])
    y = torch.tensor([1, 3])
    want = numpy_network(net, x, t, y, num_classes=3)
    close(matched("eps"), net(x, t, y), want, 1e-11, np.abs(want).max())


@pytest.mark.parametrize("y", [None, [0, 2], [3, 1], [2, 2], [3, 3]], ids=str)
def test_appB_labels_are_added_to_the_time_embedding_and_the_last_row_means_no_label(y):
    """y in 0..n selects a row of the table. Without y it is row n. Labels may be equal."""
    net, x, t = unet(num_classes=3), images(2, 3, 8, 8), torch.tensor([5, 5])
    y = None if y is None else torch.tensor(y)
    want = numpy_network(net, x, t, y, num_classes=3)
    close(matched("eps"), net(x, t, y), want, 1e-6, np.abs(want).max())
    same("eps without y", net(x, t), net(x, t, torch.tensor([3, 3])))


@pytest.mark.parametrize("classes", [1, 3])
def test_appB_rows_of_the_label_table_may_have_any_norm(classes):
    """Rows 20 times as large: they are added as they are, and not changed in place. One class is enough."""
    net, x, t = unet(num_classes=classes), images(2, 3, 8, 8), torch.tensor([5, 5])
    how = {**SMALL, "num_classes": classes}
    table = 20 * by_role(net, roles(**how), x, t)["label.weight"]
    change_weights(net, roles(**how), lambda role, w: w * 20 if "label" in role else None, x, t)
    for y in (torch.tensor([0, classes]), torch.tensor([classes, 0])):
        got = net(x, t, y)
        want = numpy_network(net, x, t, y, num_classes=classes)
        close(matched("eps"), got, want, 1e-6, np.abs(want).max())
    after = by_role(net, roles(**how), x, t)["label.weight"]
    close("the label table", after, table, 1e-15)


def test_appB_t_has_no_upper_limit():
    """The embedding is a formula, not a table, so T may be larger than 4,000.

    The weights are the same whatever the seed: number 36 of 60 that were tried, where a limit for t changes
    the output by at least a tenth of its largest value. A float32 embedding changes it by less than 0.005.
    """
    random, weights = np.random.default_rng(36), {}
    for role, shape in roles(**SMALL):
        scale = 0.3 if len(shape) == 1 else 0.7 / math.sqrt(math.prod(shape[1:]))
        weights[role] = random.normal(0, scale, shape)
    weights["time.1.weight"] *= 10  # so that t has a large effect
    x = torch.from_numpy(random.normal(size=(1, 3, 4, 4))).expand(3, 3, 4, 4)
    net, t = unet(), torch.tensor([4001, 8000, 20_000])
    change_weights(net, roles(**SMALL), lambda role, w: torch.from_numpy(weights[role]), x, t)
    want = numpy_network(net, x, t)
    scale = np.abs(want).max()
    close(matched("eps"), net(x, t), want, 0.005, scale)
    for limit in (1000, 4000):
        wrong = numpy_network(net, x, t.clamp(max=limit))
        gap = np.abs(wrong - want).max((1, 2, 3)).min() / scale
        assert gap > 0.1, f"negative control: t cut off at {limit} changes eps by {gap:.2g}"


def test_appB_sinusoid_has_sines_then_cosines_with_half_minus_1_in_the_denominator():
    """sin(t w_i), .., cos(t w_i), ..; w_i = 10000^(-i / (d/2 - 1)), from 1 to 1/10000; d = 128."""
    t = torch.cat([torch.arange(1000), torch.tensor([3999, 4000, 4001, 10_000])])
    for dim in (4, 32, 128):
        got = ddpm.timestep_embedding(t, dim)
        assert got.shape == (1004, dim)
        assert got.dtype in (torch.float32, torch.float64)
        want = network_numpy.timestep_embedding(t.numpy(), dim)
        close("embedding", got, want, 4 * EPS32, 1 + t[:, None].numpy())


def test_appB_defaults_are_the_cifar10_network():
    """128 channels times 1, 2, 2, 2, two blocks a level, attention on level 1 and in the middle, 32 groups:
    the NumPy network of that size has the same output."""
    net, x, t = ddpm.UNet().double().eval(), images(1, 3, 8, 8), torch.tensor([7])
    with torch.no_grad():
        for p in weights_of(net):
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 1 else 0.7 / math.sqrt(p[0].numel())))
    how = dict(ch=128, mult=(1, 2, 2, 2), blocks=2, attention=(1,), groups=32)
    want = numpy_network(net, x, t, **how)
    close(matched("eps"), net(x, t), want, 1e-6, np.abs(want).max())


def test_images_of_a_batch_do_not_affect_each_other():
    """Permuting images, with their t, permutes the output; each image alone has the same output."""
    net, x, t = unet(), images(4, 3, 8, 8), torch.tensor([1, 5, 9, 2])
    order = torch.tensor([2, 0, 3, 1])
    close("permuted", net(x[order], t[order]), net(x, t)[order], 1e-12, 1.0)
    for i in range(4):
        part = slice(i, i + 1)
        close(f"image {i} alone", net(x[part], t[part]), net(x, t)[part], 1e-12, 1.0)


def test_the_output_depends_on_t():
    """t = 1 and t = 9 have different outputs for the same image."""
    net, x = unet(), images(1, 3, 8, 8)
    assert (net(x, torch.tensor([1])) - net(x, torch.tensor([9]))).abs().max() > 1e-3


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_the_output_is_the_same_with_and_without_gradients(training):
    """torch.no_grad and torch.inference_mode change no value, and the input's gradient changes none."""
    net, x, t = unet(dropout=0.3, num_classes=2), images(2, 3, 8, 8), torch.tensor([3, 8])
    net.train(training)

    def output(x):
        checks.seed()
        return net(x, t).detach()

    want = output(x)
    with torch.no_grad():
        close("eps under no_grad", output(x), want, 1e-12, want.abs().max())
    with torch.inference_mode():
        close("eps in inference mode", output(x), want, 1e-12, want.abs().max())
    with_gradient = output(x.clone().requires_grad_())
    close("eps of an image with a gradient", with_gradient, want, 1e-12, want.abs().max())


@pytest.mark.parametrize("factor", [100.0, 1e-6, -1.0])
def test_the_output_is_proportional_to_the_last_layer(factor):
    """Nothing follows the last convolution: no tanh, no limit, no norm."""
    net, x, t = unet(), images(2, 3, 8, 8), torch.tensor([3, 8])
    want = factor * net(x, t)

    def change(role, w):
        return w * factor if role.startswith("conv_out.") else None

    change_weights(net, roles(**SMALL), change, x, t)
    close("eps", net(x, t), want, 1e-10, want.abs().max())


LARGE = {
    "activations": lambda role: role.startswith("conv_in."),
    "arguments of silu": lambda role: "norm1." in role or role.startswith("norm_out."),
    "logits of attention": lambda role: role.startswith("mid.0.attention.q."),
    "time embedding": lambda role: role.startswith("time.1."),
}


@pytest.mark.parametrize("what", LARGE)
def test_values_of_a_thousand_are_cut_off_nowhere(what):
    """Some weights times 1,000: the output is still that of the NumPy network."""
    net, x, t = unet(), images(2, 3, 8, 8), torch.tensor([3, 8])

    def change(role, w):
        return w * 1000 if LARGE[what](role) else None

    before = net(x, t)
    change_weights(net, roles(**SMALL), change, x, t)
    want = numpy_network(net, x, t)
    close(matched("eps"), net(x, t), want, 1e-6, np.abs(want).max())
    assert (before - net(x, t)).abs().max() > 1e-4, "the weights do not matter"


@pytest.mark.parametrize("size", [1e-3, 30.0, 1e4])
def test_images_of_any_size_are_cut_off_nowhere(size):
    """xt far outside of [-1, 1] is used as it is."""
    net, x, t = unet(), size * images(2, 3, 8, 8), torch.tensor([3, 8])
    want = numpy_network(net, x, t)
    close(matched("eps"), net(x, t), want, 1e-6, np.abs(want).max())


@pytest.mark.parametrize("layer", ["residual block", "attention"])
def test_a_mean_of_a_thousand_before_a_norm_costs_no_digits_in_float32(layer):
    """E[x^2] - E[x]^2 in float32 would be wrong by 6% for a mean of 1,000 and a variance of 1."""
    x = (1000 + images(2, 8, 6, 6)).float()
    if layer == "attention":
        block = random_(ddpm.Attention(8, 4)).float()
        want = network_numpy.attention_block(
            x.double().numpy(), by_role(block, attention_roles("", 8), x), 4
        )
        got = block(x)
    else:
        block, emb = random_(ddpm.ResBlock(8, 8, 16, 0.0, 4)).float(), images(2, 16).float()
        weights = block_weights(block, x, emb)
        want = network_numpy.residual_block(x.double().numpy(), emb.double().numpy(), weights, 4)
        got = block(x, emb)
    branch = want - x.double().numpy()
    close(
        f"{layer} without its shortcut",
        got.double() - x.double(),
        branch,
        2e-3,
        np.abs(branch).max(),
    )


def test_memory_layout_and_precision_do_not_change_the_result():
    """channels_last is the same function; float32 differs by rounding only."""
    net, x, t = unet(), images(2, 3, 8, 8), torch.tensor([2, 6])
    want = net(x, t)
    last = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t)
    close("channels_last", last, want, 1e-12, want.abs().max())
    close("float32", net.float()(x.float(), t), want, 1e-4, want.abs().max())


def relative_error(got, want):
    """The error's root mean square, relative to that of want."""
    return ((got.float() - want).square().mean() / want.square().mean()).sqrt().item()


@pytest.mark.parametrize("what", ["network", "residual block", "attention"])
def test_autocast_rounds_values_and_does_not_change_them(what):
    """Under bfloat16 autocast the output, of a block without its shortcut, is that of float32, within a few
    roundings of 1/256. Typical is an error of 0.4%."""
    if what == "network":
        net, x = unet(num_classes=3).float(), images(4, 3, 8, 8).float()
        given, shortcut = (torch.tensor([1, 7, 500, 999]), torch.tensor([0, 1, 3, 3])), 0.0
    elif what == "attention":
        net, x, given = random_(ddpm.Attention(8, 4)).float(), images(4, 8, 4, 6).float(), ()
        shortcut = x
    else:
        net, x = random_(ddpm.ResBlock(8, 8, 16, 0.0, 4)).float(), images(4, 8, 4, 6).float()
        given, shortcut = (images(4, 16).float(),), x
    want = net(x, *given) - shortcut
    with torch.autocast("cpu", torch.bfloat16):
        got = net(x, *given) - shortcut
    for i in range(4):
        error = relative_error(got[i], want[i])
        assert error < 0.03, (
            f"image {i}: relative error {error:.2g} in the mean square, allowed 0.03"
        )


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_the_embedding_distinguishes_neighbouring_t_in_half_precision(how):
    """bfloat16 has no 999: the first dense layer receives the sinusoid, rounded to 1/256 only at the end."""
    net, ch, t = ddpm.UNet(**SMALL), SMALL["ch"], torch.tensor([998, 999, 1000])
    x = torch.zeros(3, 3, 8, 8)
    if how == "bfloat16":
        net, x = net.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        got = first_met(net, (4 * ch, ch), x, t)
    close("sinusoid", got.float(), network_numpy.timestep_embedding(t.numpy() - 1, ch), 0.01, 1.0)


def test_the_network_is_the_same_on_another_device():
    """Its output and gradient, for given labels and for none; no value is read back on the way."""
    near = unet(num_classes=2).float()

    def results(x, t, y):
        net = copy.deepcopy(near).to(x.device)
        out = net(x, t, y) + net(x, t)
        gradients = torch.autograd.grad(out.sum(), weights_of(net))
        names = [f"gradient of {name}" for name, p in net.named_parameters() if p.requires_grad]
        return dict(zip(["eps", *names], [out, *gradients], strict=True))

    far.agrees(
        results, images(2, 3, 8, 8).float(), torch.tensor([1, 9]), torch.tensor([0, 2]), tol=1e-5
    )


def test_gradients_of_each_image_by_vmap_are_those_of_each_image_alone():
    """torch.func.vmap works, because checks of values are skipped there."""
    net, d = unet(), ddpm.Diffusion([0, 0.1, 0.3, 0.5])
    x0, eps, t = images(3, 3, 4, 4), images(3, 3, 4, 4), torch.tensor([1, 3, 2])
    weights = {name: p.detach() for name, p in net.named_parameters()}

    def loss(weights, x0, t, eps):
        def model(xt, t):
            return torch.func.functional_call(net, weights, (xt, t))

        return ddpm.loss_simple(model, d, x0[None], t[None], eps[None])

    gradient = torch.func.grad(loss)
    together = torch.func.vmap(gradient, (None, 0, 0, 0))(weights, x0, t, eps)
    for i in range(3):
        for name, want in gradient(weights, x0[i], t[i], eps[i]).items():
            close(f"image {i}, {name}", together[name][i], want, 1e-9, 1 + want.abs().max())


# --- What the network rejects ---------------------------------------------------------------------


@pytest.mark.parametrize("H, W", [(30, 32), (32, 30), (4, 12)])
def test_sizes_that_the_levels_do_not_divide_are_rejected(H, W):
    """Four levels halve three times, so both sides must be multiples of 8."""
    net = ddpm.UNet(ch=8, groups=4, mult=(1, 1, 1, 1))
    with rejected(f"{H}x{W}"):
        net(torch.zeros(1, 3, H, W), torch.tensor([1]))


@pytest.mark.parametrize("t", [
    torch.tensor(3), torch.tensor([3]), torch.tensor([[3, 3]]), torch.tensor([3, 3, 3]),
    torch.tensor([1.0, 2.0]), torch.tensor([1, 0]), torch.tensor([-1, 2]),
], ids=str)  # fmt: skip
def test_t_must_be_one_integer_above_0_for_each_image(t):
    """t (B,) is int64; t = 0 is the clean image, which has no noise to predict; nothing broadcasts."""
    with rejected(f"t = {t}"):
        unet()(images(2, 3, 8, 8), t)


@pytest.mark.parametrize("y", [
    torch.tensor([0, 4]), torch.tensor([-1, 0]), torch.tensor([0]), torch.tensor([[0, 1]]),
], ids=str)  # fmt: skip
def test_labels_must_be_one_row_of_the_table_for_each_image(y):
    """A table for three classes has rows 0..3."""
    with rejected(f"y = {y}"):
        unet(num_classes=3)(images(2, 3, 8, 8), torch.tensor([1, 2]), y)


def test_labels_for_a_network_without_labels_are_rejected():
    """They would be ignored silently."""
    with rejected("labels"):
        unet()(images(2, 3, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1]))


# --- Initial weights ------------------------------------------------------------------------------


def test_network_starts_near_zero_so_that_L_simple_starts_at_1():
    """At initialisation eps_theta is about 0, and L_simple = E eps^2 = 1."""
    net, d = ddpm.UNet(ch=32), ddpm.Diffusion(ddpm.linear_schedule())
    x0 = torch.rand(8, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert net(x0, torch.full((8,), 500)).abs().max() < 1e-3
        loss = ddpm.loss_simple(net, d, x0).item()
    within("L_simple, a mean of 8 x 768 squares of eps", loss, 1.0, (2 / (8 * 768)) ** 0.5)


def initial_weights(**how):
    """[(role, weight)] of a new network."""
    net = ddpm.UNet(**how)
    x = torch.zeros(1, how.get("in_channels", 3), 4, 4)
    return list(by_role(net, roles(**how), x, torch.tensor([1])).items())


def test_network_starts_with_xavier_uniform_weights_and_zero_biases():
    """Every weight matrix fills [-g, g], g = gain sqrt(6 / (fan_in + fan_out)): gain 1, but 1e-5 for
    the last layer of each residual branch and of the network; norms start as the identity."""
    for role, w in initial_weights(ch=32, mult=(1, 2), attention=(1,)):
        if w.ndim == 1:
            assert (w == ("norm" in role and role.endswith("weight"))).all(), role
        else:
            gain = 1e-5 if role.split(".")[-2] in ("conv2", "out", "conv_out") else 1.0
            bound = gain * math.sqrt(6 / ((w.shape[0] + w.shape[1]) * math.prod(w.shape[2:])))
            assert 0.9 * bound < np.abs(w).max() <= 1.001 * bound, role
            close(f"variance of {role}", w.var(), bound**2 / 3, 0.2)


def test_no_two_layers_and_no_two_channels_start_equal():
    """Each weight is random on its own: no layer is a copy of another, also scaled or transposed; no
    output or input channel is a copy of another."""
    seen = {}
    for role, w in initial_weights(
        ch=8, mult=(1, 2), blocks=2, attention=(0, 1), groups=4, num_classes=3
    ):
        if w.ndim == 1:
            continue
        matrix = w.reshape(len(w), w.shape[1], -1)
        for axis in (0, 1):
            size = matrix.shape[axis]
            channels = {np.take(matrix, i, axis).tobytes() for i in range(size)}
            assert len(channels) == size, f"{role}: {size - len(channels)} channels are copies"
        for form in (matrix, matrix.swapaxes(0, 1)):
            first = form.ravel()[:8] / form.ravel()[0]  # the first numbers, whatever their scale
            key = tuple(np.round(first, 5).tolist())
            other = seen.setdefault(key, role)
            assert other == role, f"{role} starts as a copy of {other}"


def test_residual_blocks_and_attention_start_as_the_identity():
    """Their last layer starts near zero, so their output starts as x."""
    x, emb = torch.randn(2, 32, 4, 4), torch.randn(2, 16)
    close("residual block", ddpm.ResBlock(32, 32, 16, 0.0, 32)(x, emb), x, 1e-3, 1.0)
    close("attention", ddpm.Attention(32, 32)(x), x, 1e-3, 1.0)


def test_every_parameter_gets_a_gradient():
    """No parameter is unused."""
    net, x = unet(num_classes=2), images(2, 3, 8, 8)
    net(x, torch.tensor([3, 7]), torch.tensor([0, 2])).square().sum().backward()
    weights = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    dead = [name for name, p in weights if p.grad is None or not p.grad.any()]
    assert not dead, f"no gradient: {dead}"


def test_labels_have_different_outputs_from_the_start():
    """No row of their table is zero or a copy: each of three labels, and "no label", has its own output."""
    net, x, t = ddpm.UNet(**SMALL, num_classes=3).double(), images(1, 3, 8, 8), torch.tensor([5])
    outputs = [net(x, t, torch.tensor([y])) for y in range(4)]
    for i, one in enumerate(outputs):
        for k in range(i):
            assert not torch.equal(one, outputs[k]), f"labels {k} and {i} have the same output"


@pytest.mark.parametrize("classes", [1, 3])
def test_every_row_of_the_label_table_starts_different_from_zero(classes):
    """The row for "no label", too: a label is a vector that is added, and none is the absence of one."""
    weights = initial_weights(ch=8, mult=(1, 2), blocks=1, groups=4, num_classes=classes)
    (table,) = [w for role, w in weights if role.startswith("label")]
    sizes = abs(table).max(axis=1)
    assert len(sizes) == classes + 1 and (sizes > 0).all(), f"largest value of each row: {sizes}"


# --- Its layers -----------------------------------------------------------------------------------


def random_(module):
    with torch.no_grad():
        for p in weights_of(module):
            p.normal_(0, 0.5)
    return module.double()


def block_weights(block, x, emb):
    """The weights of a residual block by role."""
    c_out = block(x, emb).shape[1]
    return by_role(block, block_roles("", x.shape[1], c_out, emb.shape[1]), x, emb)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("c_in, c_out", [(8, 8), (8, 12)])
def test_residual_block_is_norm_silu_conv_twice_around_the_embedding(c_in, c_out, scale):
    """shortcut(x) + conv(silu(norm(conv(silu(norm x)) + dense(silu(emb))))), in the released order. A faint
    image (variance 1e-6) distinguishes the norm's eps = 1e-6 from torch's 1e-5."""
    block = random_(ddpm.ResBlock(c_in, c_out, 16, 0.0, 4))
    x, emb = scale * images(2, c_in, 3, 5), images(2, 16)
    weights = block_weights(block, x, emb)
    want = network_numpy.residual_block(x.numpy(), emb.numpy(), weights, 4)
    close(matched("residual block"), block(x, emb), want, 1e-9, np.abs(want).max())


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_attention_is_softmax_of_qk_over_sqrt_c_times_v_over_the_pixels(scale):
    """x + out(softmax(q k^T / sqrt(C)) v) on the normalised x: one head, softmax over the keys."""
    block, x = random_(ddpm.Attention(8, 4)), scale * images(2, 8, 3, 5)
    weights = by_role(block, attention_roles("", 8), x)
    want = network_numpy.attention_block(x.numpy(), weights, 4)
    close(matched("attention"), block(x), want, 1e-9, np.abs(want).max())


@given(seed=st.integers(0, 99))
def test_attention_commutes_with_permuting_the_pixels(seed):
    """Attention has no positions: attention(P x) = P attention(x)."""
    checks.seed(seed)
    block, x = random_(ddpm.Attention(8, 4)), images(1, 8, 3, 4)
    order = torch.randperm(12)

    def permute(x):
        return x.flatten(2)[:, :, order].reshape(x.shape)

    close("attention", block(permute(x)), permute(block(x)), 1e-9, 10.0)


# --- Dropout --------------------------------------------------------------------------------------


def test_dropout_is_off_in_eval_mode_and_on_in_training():
    """eval(): the same output twice; train(): different ones; dropout=0: the same even in training."""
    net, x, t = unet(dropout=0.5), images(1, 3, 8, 8), torch.tensor([3])
    same("eps in eval mode", net(x, t), net(x, t))
    assert not torch.equal(net.train()(x, t), net(x, t)), "training drops nothing"
    dry = unet(dropout=0.0).train()
    same("eps with dropout 0", dry(x, t), dry(x, t))


P, MASKS = 0.25, 4000  # the probability to drop, and the number of masks


class DroppingBlock:
    """One residual block, with weights, image and embedding for which a misplaced dropout is visible.

    They are the same whatever the seed: number 118 of 300 that were tried, where each of the faults below
    changes one of the two statistics by at least 23 standard errors. 5 are allowed.
    """

    def __init__(self):
        random = np.random.default_rng(118)
        self.roles = list(block_roles("", 8, 8, 16))
        self.weights = {role: random.normal(0, 0.5, shape) for role, shape in self.roles}
        self.x, self.emb = random.normal(size=(1, 8, 2, 2)), random.normal(size=(1, 16))
        w = self.weights
        h = network_numpy.convolution(
            network_numpy.silu(network_numpy.norm(self.x, w, "norm1", 4)), w, "conv1"
        )
        h = h + network_numpy.dense(network_numpy.silu(self.emb), w, "emb")[:, :, None, None]
        self.h, self.normed = h, network_numpy.norm(h, w, "norm2", 4)
        self.mean = self.output(network_numpy.silu(self.normed))[0]
        adds = w["conv2.weight"][0, :, 1:, 1:] * network_numpy.silu(self.normed)[0]
        self.variance = P / (1 - P) * (adds**2).sum()

    def output(self, h):
        """The block's output at the corner of channel 0, for n inputs (n, 8, 2, 2) of its last layer."""
        kernel = self.weights["conv2.weight"][0, :, 1:, 1:]
        return self.x[0, 0, 0, 0] + self.weights["conv2.bias"][0] + (kernel * h).sum((1, 2, 3))

    def check(self, outputs):
        """Assert that outputs under dropout have the mean and variance of dropout before the last layer."""
        __tracebackhide__ = True
        has_mean("output under dropout", outputs, self.mean)
        has_mean("its squared deviation", (outputs - self.mean) ** 2, self.variance)

    def misplaced(self, fault):
        """Outputs of a block with one fault."""
        silu = network_numpy.silu
        kept = np.random.default_rng(checks.SEED).random((MASKS, 8, 2, 2)) >= P
        if fault == "before the norm":
            return self.output(
                silu(network_numpy.norm(self.h * kept / (1 - P), self.weights, "norm2", 4))
            )
        if fault == "between the norm and the silu":
            return self.output(silu(self.normed * kept / (1 - P)))
        if fault == "after the convolution":
            shortcut = self.x[0, 0, 0, 0]
            return shortcut + (self.mean - shortcut) * kept[:, 0, 0, 0] / (1 - P)
        if fault == "of whole channels":
            kept = kept[:, :, :1, :1]
        if fault == "of whole pixels":
            kept = kept[:, :1]
        scale = 1 if fault == "without the division by 1 - p" else 1 - P
        return self.output(silu(self.normed) * kept / scale)


def test_dropout_acts_just_before_the_last_convolution_of_a_residual_block():
    """The convolution is linear, so the output's mean over masks is the eval output, and its variance is
    p / (1 - p) times the sum of squares of what each value adds to it."""
    known = DroppingBlock()
    block = ddpm.ResBlock(8, 8, 16, P, 4).double().eval()
    x, emb = torch.from_numpy(known.x), torch.from_numpy(known.emb)
    change_weights(
        block, known.roles, lambda role, w: torch.from_numpy(known.weights[role]), x, emb
    )
    close("output in eval mode", block(x, emb)[0, 0, 0, 0], known.mean, 1e-9, 10.0)
    outputs = block.train()(x.expand(MASKS, -1, -1, -1), emb.expand(MASKS, -1))
    known.check(outputs[:, 0, 0, 0].detach().numpy())


@pytest.mark.parametrize("fault", [
    "before the norm", "between the norm and the silu", "after the convolution", "of whole channels",
    "of whole pixels", "without the division by 1 - p",
])  # fmt: skip
def test_dropout_statistics_reject_dropout(fault):
    """Negative control."""
    known = DroppingBlock()
    assert not rejects(known.check, known.misplaced("nowhere else"))
    assert rejects(known.check, known.misplaced(fault))


def masks_are_independent(kept):
    """Assert that masks (n, ...) of 1 and 0 are independent, within an image and from each image to the next.

    A correlation of two independent columns of n numbers has mean 0 and standard error 1 / sqrt(n). All pairs
    of columns together have the false-alarm rate ALPHA.
    """
    __tracebackhide__ = True
    n = len(kept)
    off = kept.reshape(n, -1) - (1 - P)
    correlations = off.T @ off / (n * P * (1 - P))
    pairs = correlations[np.triu_indices(len(correlations), 1)]
    worst = pairs[np.argmax(abs(pairs))]
    allowed = stats.norm.isf(checks.ALPHA / 2 / len(pairs))
    within(f"largest of {len(pairs)} correlations in an image", worst, 0, n**-0.5, allowed)
    following = (off[:-1] * off[1:]).mean() / (P * (1 - P))
    within("correlation with the next image", following, 0, off[1:].size ** -0.5)


def test_dropout_masks_every_number_independently():
    """Channels, rows, columns and images do not share masks. The last convolution is the identity here, so the
    output shows which numbers are dropped."""
    random = np.random.default_rng(7)
    known = {role: random.normal(0, 0.5, shape) for role, shape in block_roles("", 4, 4, 16)}
    known["conv2.weight"] = np.eye(4)[:, :, None, None] * np.pad([[1.0]], 1)
    known["conv2.bias"] = np.zeros(4)
    block = ddpm.ResBlock(4, 4, 16, P, 4).double().eval()
    x, emb = torch.from_numpy(random.normal(size=(1, 4, 3, 5))), images(1, 16)
    change_weights(block, list(block_roles("", 4, 4, 16)),
                   lambda role, w: torch.from_numpy(known[role]), x, emb)  # fmt: skip
    out = block.train()(x.expand(MASKS, -1, -1, -1), emb.expand(MASKS, -1)) - x
    kept = (out.abs() > 1e-12).double().numpy()  # x + 0 - x is 0 up to rounding
    has_mean("share that is kept", kept, 1 - P)
    masks_are_independent(kept)


@pytest.mark.parametrize("shared", ["channels", "rows", "columns", "neighbouring images"])
def test_dropout_statistics_reject_masks_that_share(shared):
    """Negative control."""
    kept = (np.random.default_rng(checks.SEED).random((MASKS, 4, 3, 5)) >= P).astype(float)
    assert not rejects(masks_are_independent, kept)
    if shared == "neighbouring images":
        kept[1::2] = kept[::2]
    else:
        axis = {"channels": 1, "rows": 2, "columns": 3}[shared]
        kept[:] = np.take(kept, [0], axis)
    assert rejects(masks_are_independent, kept)


def test_appB_dropout_is_a_tenth_by_default():
    """The paper's CIFAR-10 setting: with the same weights and masks, the default output in training is that
    of dropout=0.1."""
    nets = []
    for how in ({}, dict(dropout=0.1), dict(dropout=0.2)):
        nets.append(ddpm.UNet(ch=8, groups=4, **how).train())
    for p, *others in zip(*(weights_of(net) for net in nets)):
        torch.nn.init.normal_(p, 0, 0.3)
        for other in others:
            other.data.copy_(p.data)
    outputs, x = [], images(2, 3, 8, 8).float()
    for net in nets:
        checks.seed()
        outputs.append(net(x, torch.tensor([3, 9])))
    same("eps by default", outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2]), "dropout=0.2 has the same output"


def reaching_dropout(net, monkeypatch, *given):
    """The output of a network in training whose dropout drops nothing, and the inputs of its dropouts."""
    seen = []

    def passing(x, p=0.5, training=True, inplace=False):
        if p > 0:  # with p = 0 there is no dropout
            seen.append((x, p))
        return x

    monkeypatch.setattr(torch.nn.functional, "dropout", passing)
    out = net.train()(*given)
    monkeypatch.undo()
    return out, seen


def test_dropout_acts_once_in_each_residual_block_and_nowhere_else(monkeypatch):
    """Not on images, skips, embedding, attention or the last layer: there are as many dropouts as residual
    blocks, each of a whole batch of feature maps. If they drop nothing, training is as eval."""
    net, x, t = unet(dropout=0.3, blocks=2), images(2, 3, 8, 8), torch.tensor([2, 9])
    want = net(x, t)
    out, seen = reaching_dropout(net, monkeypatch, x, t)
    blocks = len(network_numpy.residual_table(SMALL["ch"], SMALL["mult"], 2))
    assert len(seen) == blocks, f"{len(seen)} dropouts in {blocks} residual blocks"
    for h, p in seen:
        assert h.ndim == 4 and len(h) == 2 and p == 0.3, f"dropout of {tuple(h.shape)}, p = {p}"
    close("output without dropping", out, want, 1e-12, want.abs().max())


def test_dropout_of_everything_leaves_a_residual_block_its_shortcut():
    """All of the branch is dropped and nothing of x: with dropout 1, the output is x plus a bias."""
    block = random_(ddpm.ResBlock(8, 8, 16, 1.0, 4)).train()
    x, emb = images(2, 8, 3, 5), images(2, 16)
    branch = (block(x, emb) - x).detach()
    close("branch", branch, branch.mean((0, 2, 3), keepdim=True), 1e-12, 10.0)

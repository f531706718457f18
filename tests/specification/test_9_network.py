"""Section 9 of ddpm.py: the network (appendix B and the released code)."""

import copy
import math

import far
import judge
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from judge import EPS32, close, has_mean, refused, rejects, same, within
from weights import attention_roles, block_roles, by_role, first_met, matched, roles

import ddpm
import reference_numpy as ref

SMALL = dict(ch=8, mult=(1, 2), blocks=1, attention=(1,), groups=4, dropout=0.0)


def unet(**how):
    """A small network in float64 whose every weight is random: nothing starts near zero."""
    torch.manual_seed(0)
    net = ddpm.UNet(**{**SMALL, **how}).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 1 else 0.7 / math.sqrt(p[0].numel())))
    return net


def images(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def numpy_network(net, x, t, labels=None, **how):
    """What the NumPy network says of x, t and labels, with the weights of net, which has the options how."""
    weights = by_role(net, roles(**how), x, t)
    options = {k: how[k] for k in ("ch", "mult", "blocks", "attention", "groups") if k in how}
    return ref.unet(
        x.numpy(), t.numpy(), weights, labels=labels, has_labels="num_classes" in how, **options
    )


# --- The whole network ---------------------------------------------------------------------------


@pytest.mark.parametrize("count, how", [
    (35_746_307, {}),
    (113_673_219, dict(mult=(1, 1, 2, 2, 4, 4), attention=(4,))),
    (35_749_766, dict(out_channels=6)),
], ids=["CIFAR-10", "256x256", "learned variances"])  # fmt: skip
def test_appB_network_has_the_parameters_of_the_released_one(count, how):
    """35,746,307 for CIFAR-10, 113,673,219 for 256x256; 35,749,766 with six output channels."""
    with torch.device("meta"):
        net = ddpm.UNet(**how)
    assert sum(p.numel() for p in net.parameters()) == count == ref.unet_parameter_count(**how)


@pytest.mark.parametrize("how", [
    dict(),
    dict(in_channels=1, out_channels=2),
    dict(mult=(1, 2, 2), attention=(0, 2)),
    dict(mult=(2, 1, 3), attention=(1,), blocks=2, groups=2),
    dict(mult=(1,), attention=()),
    dict(num_classes=3),
], ids=str)  # fmt: skip
def test_appB_network_computes_what_the_numpy_network_computes(how):
    """The same weights, whatever their names and places, the same images, not square, the same t: the same
    output. Order of skips, padding, norms, attention, scales: all of it counts."""
    net, x, t = unet(**how), images(3, how.get("in_channels", 3), 8, 12), torch.tensor([1, 4, 9])
    want = numpy_network(net, x, t, **{**SMALL, **how})
    close(matched("eps"), net(x, t), want, 1e-6, np.abs(want).max())  # the embedding is float32


def test_appB_labels_are_added_to_the_time_embedding_and_the_last_row_means_no_label():
    """y in 0..n picks its row of the table; without y, row n; two labels differ, as do t and y."""
    net, x, t = unet(num_classes=3), images(2, 3, 8, 8), torch.tensor([5, 5])
    for y in (torch.tensor([0, 2]), torch.tensor([3, 1])):
        want = numpy_network(net, x, t, y.numpy(), **SMALL, num_classes=3)
        close(f"eps at labels {y.tolist()}", net(x, t, y), want, 1e-6, np.abs(want).max())
    same("eps without y", net(x, t), net(x, t, torch.tensor([3, 3])))


def test_appB_sinusoid_has_sines_then_cosines_with_half_minus_1_in_the_denominator():
    """sin(t w_i), .., cos(t w_i), ..; w_i = 10000^(-i / (d/2 - 1)), from 1 to 1/10000; d = 128."""
    t = torch.arange(1000)
    for dim in (4, 32, 128):
        got = ddpm.timestep_embedding(t, dim)
        assert got.shape == (1000, dim) and got.dtype in (torch.float32, torch.float64)
        close(
            "embedding",
            got,
            ref.timestep_embedding(t.numpy(), dim),
            4 * EPS32,
            1 + t[:, None].numpy(),
        )


def test_network_starts_near_zero_so_that_L_simple_starts_at_1():
    """At initialisation eps_theta is about 0, and L_simple = E eps^2 = 1."""
    net, d = ddpm.UNet(ch=32), ddpm.Diffusion(ddpm.linear_schedule())
    x0 = torch.rand(8, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert net(x0, torch.full((8,), 500)).abs().max() < 1e-3
        loss = ddpm.loss_simple(net, d, x0).item()
    within("L_simple, a mean of 8 x 768 squares of eps", loss, 1.0, (2 / (8 * 768)) ** 0.5)


def test_network_starts_with_xavier_uniform_weights_and_zero_biases():
    """Every weight matrix fills [-g, g], g = gain sqrt(6 / (fan_in + fan_out)): gain 1, but 1e-5 for
    the last layer of each residual branch and of the network; norms start as the identity."""
    how = dict(ch=32, mult=(1, 2), attention=(1,))
    named = list(roles(**how))
    net = ddpm.UNet(**how)
    for (role, shape), w in zip(
        named, by_role(net, named, torch.zeros(1, 3, 4, 4), torch.tensor([1]))
    ):
        if len(shape) == 1:
            assert (w == ("norm" in role and role.endswith("weight"))).all(), role
        else:
            gain = 1e-5 if role.split(".")[-2] in ("conv2", "out", "conv_out") else 1.0
            bound = gain * math.sqrt(6 / ((shape[0] + shape[1]) * math.prod(shape[2:])))
            assert 0.9 * bound < np.abs(w).max() <= 1.001 * bound, role
            close(f"variance of {role}", w.var(), bound**2 / 3, 0.2)


def test_residual_blocks_and_attention_start_as_the_identity():
    """Their last layer starts near zero, so that x passes through."""
    x, emb = torch.randn(2, 32, 4, 4), torch.randn(2, 16)
    close("residual block", ddpm.ResBlock(32, 32, 16, 0.0, 32)(x, emb), x, 1e-3, 1.0)
    close("attention", ddpm.Attention(32, 32)(x), x, 1e-3, 1.0)


def test_every_parameter_gets_a_gradient():
    """Nothing is created and not used."""
    net, x = unet(num_classes=2), images(2, 3, 8, 8)
    net(x, torch.tensor([3, 7]), torch.tensor([0, 2])).square().sum().backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead, f"no gradient: {dead}"


def test_images_of_a_batch_do_not_see_each_other():
    """Permuting images, with their t, permutes the output; each alone gives the same."""
    net, x, t = unet(), images(4, 3, 8, 8), torch.tensor([1, 5, 9, 2])
    order = torch.tensor([2, 0, 3, 1])
    close("permuted", net(x[order], t[order]), net(x, t)[order], 1e-12, 1.0)
    close("alone", net(x[:1], t[:1]), net(x, t)[:1], 1e-12, 1.0)


def test_the_output_depends_on_t():
    """A network that ignores t would answer the same at t = 1 and t = 9."""
    net, x = unet(), images(1, 3, 8, 8)
    assert (net(x, torch.tensor([1])) - net(x, torch.tensor([9]))).abs().max() > 1e-3


@pytest.mark.parametrize("H, W", [(30, 32), (32, 30), (4, 12)])
def test_sizes_that_the_levels_do_not_divide_are_refused_in_words(H, W):
    """Four levels halve three times: both sides must be multiples of 8, and the words say 8."""
    net = ddpm.UNet(ch=8, groups=4, mult=(1, 1, 1, 1))
    with refused(f"{H}x{W}", "8"):
        net(torch.zeros(1, 3, H, W), torch.tensor([1]))


def test_the_network_is_the_same_on_another_device():
    """Its output and gradient, for given labels and for none, with nothing read back on the way."""
    near = unet(num_classes=2).float()

    def results(x, t, y):
        net = copy.deepcopy(near).to(x.device)
        out = net(x, t, y) + net(x, t)
        gradients = torch.autograd.grad(out.sum(), net.parameters())
        names = [f"gradient of {name}" for name, _ in net.named_parameters()]
        return dict(zip(["eps", *names], [out, *gradients], strict=True))

    far.agrees(
        results, images(2, 3, 8, 8).float(), torch.tensor([1, 9]), torch.tensor([0, 2]), tol=1e-5
    )


def test_labels_for_a_network_without_labels_are_refused():
    """They would be ignored, silently."""
    with refused("labels"):
        unet()(images(2, 3, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1]))


def test_the_embedding_tells_neighbouring_t_apart_in_half_precision():
    """bfloat16 has no 999: what the first dense layer gets is the sinusoid, rounded to 1/256 at the end."""
    net, ch, t = ddpm.UNet(**SMALL).bfloat16(), SMALL["ch"], torch.tensor([998, 999, 1000])
    got = first_met(net, (4 * ch, ch), torch.zeros(3, 3, 8, 8, dtype=torch.bfloat16), t)
    close("sinusoid", got.float(), ref.timestep_embedding(t.numpy() - 1, ch), 0.01, 1.0)


@pytest.mark.parametrize("t", [torch.tensor(3), torch.tensor([3]), torch.tensor([[3, 3]])], ids=str)
def test_one_t_for_each_image_is_needed(t):
    """t (B,), and nothing that would broadcast to it."""
    with refused(f"t = {t}"):
        unet()(images(2, 3, 8, 8), t)


def test_memory_layout_and_precision_do_not_change_the_result():
    """channels_last is the same function; float32 differs by rounding only."""
    net, x, t = unet(), images(2, 3, 8, 8), torch.tensor([2, 6])
    want = net(x, t)
    last = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t)
    close("channels_last", last, want, 1e-12, want.abs().max())
    close("float32", net.float()(x.float(), t), want, 1e-4, want.abs().max())


# --- Its layers ----------------------------------------------------------------------------------


def random_(module):
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.5)
    return module.double()


def block_weights(block, x, emb):
    """The weights of a residual block, in the order of block_roles."""
    return by_role(block, block_roles("", x.shape[1], block(x, emb).shape[1], emb.shape[1]), x, emb)


@pytest.mark.parametrize("c_in, c_out", [(8, 8), (8, 12)])
def test_residual_block_is_norm_silu_conv_twice_around_the_embedding(c_in, c_out):
    """shortcut(x) + conv(silu(norm(conv(silu(norm x)) + dense(silu(emb))))), in the released order."""
    block, x, emb = (
        random_(ddpm.ResBlock(c_in, c_out, 16, 0.0, 4)),
        images(2, c_in, 3, 5),
        images(2, 16),
    )
    want = ref.residual_block(x.numpy(), emb.numpy(), iter(block_weights(block, x, emb)), 4)
    close(matched("residual block"), block(x, emb), want, 1e-9, np.abs(want).max())


def test_attention_is_softmax_of_qk_over_sqrt_c_times_v_over_the_pixels():
    """x + out(softmax(q k^T / sqrt(C)) v) on the normalised x: one head, softmax over the keys."""
    block, x = random_(ddpm.Attention(8, 4)), images(2, 8, 3, 5)
    want = ref.attention_block(x.numpy(), iter(by_role(block, attention_roles("", 8), x)), 4)
    close(matched("attention"), block(x), want, 1e-9, np.abs(want).max())


@given(seed=st.integers(0, 99))
def test_attention_commutes_with_permuting_the_pixels(seed):
    """It has no sense of place: attention(P x) = P attention(x)."""
    torch.manual_seed(seed)
    block, x = random_(ddpm.Attention(8, 4)), images(1, 8, 3, 4)
    order = torch.randperm(12)

    def permute(x):
        return x.flatten(2)[:, :, order].reshape(x.shape)

    close("attention", block(permute(x)), permute(block(x)), 1e-9, 10.0)


def test_group_norm_divides_by_the_standard_deviation_with_eps_1e_6():
    """A faint image (variance 1e-6) tells eps = 1e-6 from torch's 1e-5: through a residual block."""
    block, x, emb = (
        random_(ddpm.ResBlock(8, 8, 16, 0.0, 4)),
        1e-3 * images(2, 8, 4, 4),
        images(2, 16),
    )
    want = ref.residual_block(x.numpy(), emb.numpy(), iter(block_weights(block, x, emb)), 4)
    close(matched("residual block"), block(x, emb), want, 1e-9, np.abs(want).max())


# --- Dropout -------------------------------------------------------------------------------------


def test_dropout_is_off_in_eval_mode_and_on_in_training():
    """eval(): the same output twice; train(): different ones; dropout=0: the same even in training."""
    net, x, t = unet(dropout=0.5), images(1, 3, 8, 8), torch.tensor([3])
    same("eps in eval mode", net(x, t), net(x, t))
    assert not torch.equal(net.train()(x, t), net(x, t)), "training drops nothing"
    dry = unet(dropout=0.0).train()
    same("eps with dropout 0", dry(x, t), dry(x, t))


def test_dropout_acts_just_before_the_last_convolution_of_a_residual_block():
    """The convolution is linear, so the output's mean over masks is the eval output, and its variance is
    p / (1 - p) times the squares of what each value, dropped on its own, adds to it. Anywhere else a norm
    or a silu would come between, as the negative control, dropout before the norm, shows."""
    block = random_(ddpm.ResBlock(8, 8, 16, 0.25, 4))
    x, emb = images(1, 8, 2, 2), images(1, 16)
    norm1, conv1, dense, norm2, conv2 = zip(*[iter(block_weights(block, x, emb))] * 2)
    want = block.eval()(x, emb)[0, 0, 0, 0].item()
    h = ref.conv2d(ref.silu(ref.group_norm(x.numpy(), 4, *norm1)), *conv1)
    h = h + (ref.silu(emb.numpy()) @ dense[0].T + dense[1])[:, :, None, None]
    adds = (
        conv2[0][0, :, 1:, 1:] * ref.silu(ref.group_norm(h, 4, *norm2))[0]
    )  # to the corner of channel 0
    draws = (
        block.train()(x.expand(4000, -1, -1, -1), emb.expand(4000, -1))[:, 0, 0, 0].detach().numpy()
    )
    has_mean("output under dropout", draws, want)
    has_mean("its squared deviation", (draws - want) ** 2, (adds**2).sum() * 0.25 / 0.75)
    kept = np.random.default_rng(judge.SEED).random((4000, 8, 2, 2)) >= 0.25
    h = ref.silu(ref.group_norm(h * kept / 0.75, 4, *norm2))
    wrong = x[0, 0, 0, 0].item() + (conv2[0][0, :, 1:, 1:] * h).sum((1, 2, 3)) + conv2[1][0]
    assert rejects(has_mean, "output with dropout before the norm", wrong, want)


def test_appB_dropout_is_a_tenth_by_default():
    """The paper's CIFAR-10 setting: with the same weights and draws, training says what dropout=0.1 says."""
    nets = [
        ddpm.UNet(ch=8, groups=4, **how).train()
        for how in ({}, dict(dropout=0.1), dict(dropout=0.2))
    ]
    for p, *others in zip(*(net.parameters() for net in nets)):
        torch.nn.init.normal_(p, 0, 0.3)
        for other in others:
            other.data.copy_(p.data)
    said, x = [], images(2, 3, 8, 8).float()
    for net in nets:
        judge.seed()
        said.append(net(x, torch.tensor([3, 9])))
    same("eps by default", said[0], said[1])
    assert not torch.equal(said[0], said[2]), "dropout=0.2 drops as little"


def test_appB_defaults_are_the_cifar10_network():
    """128 channels times 1, 2, 2, 2, two blocks a level, attention on level 1 and in the middle, 32 groups:
    the NumPy network of that size says the same."""
    net, x, t = ddpm.UNet().double().eval(), images(1, 3, 8, 8), torch.tensor([7])
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 1 else 0.7 / math.sqrt(p[0].numel())))
    want = numpy_network(net, x, t)
    close(matched("eps"), net(x, t), want, 1e-6, np.abs(want).max())


def reaching_dropout(net, monkeypatch, *given):
    """The output of a network in training in which dropout lets everything pass, and what came to it."""
    seen = []

    def passing(x, p=0.5, training=True, inplace=False):
        if p > 0:  # one of 0 is none
            seen.append((x, p))
        return x

    monkeypatch.setattr(torch.nn.functional, "dropout", passing)
    out = net.train()(*given)
    monkeypatch.undo()
    return out, seen


def test_dropout_acts_once_in_each_residual_block_and_nowhere_else(monkeypatch):
    """Not on images, skips, embedding, attention or the last layer: as many dropouts as residual blocks, each
    of a whole batch of feature maps; and where they let everything pass, training is as eval."""
    net, x, t = unet(dropout=0.3, blocks=2), images(2, 3, 8, 8), torch.tensor([2, 9])
    want = net(x, t)
    out, seen = reaching_dropout(net, monkeypatch, x, t)
    assert len(seen) == len(ref.residual_table(SMALL["ch"], SMALL["mult"], 2))
    assert all(h.ndim == 4 and len(h) == 2 and p == 0.3 for h, p in seen)
    close("output without dropping", out, want, 1e-12, want.abs().max())


def test_dropout_of_everything_leaves_a_residual_block_its_shortcut():
    """What is dropped is all of the branch and nothing of x: with dropout 1, the output is x and a bias."""
    block = random_(ddpm.ResBlock(8, 8, 16, 1.0, 4)).train()
    x, emb = images(2, 8, 3, 5), images(2, 16)
    branch = (block(x, emb) - x).detach()
    close("branch", branch, branch.mean((0, 2, 3), keepdim=True), 1e-12, 10.0)


def test_labels_are_told_apart_from_the_start():
    """No row of their table is zero, or like another: each of three labels, and none, has its own output."""
    net, x, t = ddpm.UNet(**SMALL, num_classes=3).double(), images(1, 3, 8, 8), torch.tensor([5])
    outputs = [net(x, t, torch.tensor([y])) for y in range(4)]
    for i, one in enumerate(outputs):
        assert not any(torch.equal(one, other) for other in outputs[:i]), (
            f"label {i} is as one before it"
        )

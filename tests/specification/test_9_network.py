"""Section 9 of ddpm.py: the network (appendix B and the released code)."""

import copy
import math

import far
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from judge import EPS32, REFUSALS, close, has_mean, rejects, same, within

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


def weights_of(module):
    return [p.detach().numpy() for p in module.parameters()]


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
    """The same weights in the order of their use, the same images, not square, the same t: the same
    output. Order of skips, padding, norms, attention, scales: all of it counts."""
    net, x, t = unet(**how), images(3, how.get("in_channels", 3), 8, 12), torch.tensor([1, 4, 9])
    config = {**SMALL, **how}
    config = {k: config[k] for k in ("ch", "mult", "blocks", "attention", "groups")}
    want = ref.unet(x.numpy(), t.numpy(), weights_of(net), has_labels="num_classes" in how, **config)
    close("eps", net(x, t), want, 1e-6, np.abs(want).max())  # the embedding is float32


def test_appB_labels_are_added_to_the_time_embedding_and_the_last_row_means_no_label():
    """y in 0..n picks its row of the table; without y, row n; two labels differ, as do t and y."""
    net, x, t = unet(num_classes=3), images(2, 3, 8, 8), torch.tensor([5, 5])
    config = {k: SMALL[k] for k in ("ch", "mult", "blocks", "attention", "groups")}
    for y in (torch.tensor([0, 2]), torch.tensor([3, 1])):
        want = ref.unet(x.numpy(), t.numpy(), weights_of(net), labels=y.numpy(), has_labels=True, **config)
        close(f"eps at labels {y.tolist()}", net(x, t, y), want, 1e-6, np.abs(want).max())
    same("eps without y", net(x, t), net(x, t, torch.tensor([3, 3])))


def test_appB_sinusoid_has_sines_then_cosines_with_half_minus_1_in_the_denominator():
    """sin(t w_i), .., cos(t w_i), ..; w_i = 10000^(-i / (d/2 - 1)), from 1 to 1/10000; d = 128."""
    t = torch.arange(1000)
    for dim in (4, 32, 128):
        got = ddpm.timestep_embedding(t, dim)
        assert got.shape == (1000, dim) and got.dtype == torch.float32
        close("embedding", got, ref.timestep_embedding(t.numpy(), dim), 4 * EPS32, 1 + t[:, None].numpy())


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
    net, near_zero = ddpm.UNet(ch=32, mult=(1, 2), attention=(1,)), 0
    for module in net.modules():
        if isinstance(module, torch.nn.GroupNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all() and module.eps == 1e-6
        elif isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            w = module.weight
            area = w[0, 0].numel()
            bound = math.sqrt(6 / (area * (w.shape[0] + w.shape[1])))
            gain = w.abs().max().item() / bound
            assert (module.bias == 0).all()
            if gain < 1e-3:
                near_zero += 1
                assert 0.9e-5 < gain <= 1.001e-5, gain
            else:
                assert 0.9 < gain <= 1.001, gain
                close("variance", w.var(), bound**2 / 3, 0.2)
    blocks = sum(isinstance(m, (ddpm.ResBlock, ddpm.Attention)) for m in net.modules())
    assert near_zero == blocks + 1


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
    """Four levels halve three times: both sides must be multiples of 8."""
    net = ddpm.UNet(ch=8, groups=4, mult=(1, 1, 1, 1))
    with pytest.raises(Exception) as refusal:
        net(torch.zeros(1, 3, H, W), torch.tensor([1]))
    assert "multiples of 8" in str(refusal.value)


def test_the_network_is_the_same_on_another_device():
    """Its output and gradient, for given labels and for none, with nothing read back on the way."""
    near = unet(num_classes=2).float()

    def results(x, t, y):
        net = copy.deepcopy(near).to(x.device)
        out = net(x, t, y) + net(x, t)
        gradients = torch.autograd.grad(out.sum(), net.parameters())
        names = [f"gradient of {name}" for name, _ in net.named_parameters()]
        return dict(zip(["eps", *names], [out, *gradients], strict=True))

    far.agrees(results, images(2, 3, 8, 8).float(), torch.tensor([1, 9]), torch.tensor([0, 2]), tol=1e-5)


def test_labels_for_a_network_without_labels_are_refused():
    """They would be ignored, silently."""
    with pytest.raises(REFUSALS):
        unet()(images(2, 3, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1]))


def test_the_embedding_tells_neighbouring_t_apart_in_half_precision():
    """bfloat16 has no 999: the sinusoid is computed before anything is rounded to it."""
    net, seen = ddpm.UNet(**SMALL).bfloat16(), []
    net.time.register_forward_pre_hook(lambda module, args: seen.append(args[0].float()))
    t = torch.tensor([998, 999, 1000])
    net(torch.zeros(3, 3, 8, 8, dtype=torch.bfloat16), t)
    close("sinusoid", seen[0], ref.timestep_embedding(t.numpy() - 1, SMALL["ch"]), 0.01, 1.0)


@pytest.mark.parametrize("t", [torch.tensor(3), torch.tensor([3]), torch.tensor([[3, 3]])], ids=str)
def test_one_t_for_each_image_is_needed(t):
    """t (B,), and nothing that would broadcast to it."""
    with pytest.raises(REFUSALS):
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


@pytest.mark.parametrize("c_in, c_out", [(8, 8), (8, 12)])
def test_residual_block_is_norm_silu_conv_twice_around_the_embedding(c_in, c_out):
    """shortcut(x) + conv(silu(norm(conv(silu(norm x)) + dense(silu(emb))))), in the released order."""
    block, x, emb = random_(ddpm.ResBlock(c_in, c_out, 16, 0.0, 4)), images(2, c_in, 3, 5), images(2, 16)
    want = ref.residual_block(x.numpy(), emb.numpy(), iter(weights_of(block)), 4)
    close("residual block", block(x, emb), want, 1e-9, np.abs(want).max())


def test_attention_is_softmax_of_qk_over_sqrt_c_times_v_over_the_pixels():
    """x + out(softmax(q k^T / sqrt(C)) v) on the normalised x: one head, softmax over the keys."""
    block, x = random_(ddpm.Attention(8, 4)), images(2, 8, 3, 5)
    want = ref.attention_block(x.numpy(), iter(weights_of(block)), 4)
    close("attention", block(x), want, 1e-9, np.abs(want).max())


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
    block, x, emb = random_(ddpm.ResBlock(8, 8, 16, 0.0, 4)), 1e-3 * images(2, 8, 4, 4), images(2, 16)
    want = ref.residual_block(x.numpy(), emb.numpy(), iter(weights_of(block)), 4)
    close("residual block", block(x, emb), want, 1e-9, np.abs(want).max())


# --- Dropout -------------------------------------------------------------------------------------


def test_dropout_is_off_in_eval_mode_and_on_in_training():
    """eval(): the same output twice; train(): different ones; dropout=0: the same even in training."""
    net, x, t = unet(dropout=0.5), images(1, 3, 8, 8), torch.tensor([3])
    same("eps in eval mode", net(x, t), net(x, t))
    assert not torch.equal(net.train()(x, t), net(x, t)), "training drops nothing"
    dry = unet(dropout=0.0).train()
    same("eps with dropout 0", dry(x, t), dry(x, t))


def test_dropout_acts_just_before_the_last_convolution_of_a_residual_block():
    """The convolution is linear, so the mean over masks is the eval output; anywhere else, a norm or
    a silu would come between, as the negative control, dropout before the norm, shows."""
    torch.manual_seed(7)
    block = random_(ddpm.ResBlock(8, 8, 16, 0.5, 4))
    x, emb = images(1, 8, 2, 2), images(1, 16)
    want = block.eval()(x, emb)[0, 0, 0, 0].item()
    draws = block.train()(x.expand(4000, -1, -1, -1), emb.expand(4000, -1))[:, 0, 0, 0].detach()
    has_mean("output under dropout", draws, want)
    seen = {}
    block.conv2.register_forward_pre_hook(lambda module, args: seen.update(h=args[0]))
    block(x.expand(4000, -1, -1, -1), emb.expand(4000, -1))
    has_mean("share of dropped values", (seen["h"] == 0).double(), 0.5)
    block.dropout, last = torch.nn.Identity(), block.norm2
    block.norm2 = torch.nn.Sequential(torch.nn.Dropout(0.5), last)
    draws = block(x.expand(4000, -1, -1, -1), emb.expand(4000, -1))[:, 0, 0, 0].detach()
    assert rejects(has_mean, "output with dropout before the norm", draws, want)


def test_appB_dropout_is_a_tenth_by_default():
    """The paper's CIFAR-10 setting."""
    net = ddpm.UNet(ch=8, groups=4)
    rates = {m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.1}


def test_appB_defaults_are_the_cifar10_network():
    """128 channels times 1, 2, 2, 2, two blocks a level, attention at 16x16 and in the middle, 32
    groups: the attention sees 256 pixels twice down, three times up, and 16 once."""
    with torch.device("meta"):
        net, seen = ddpm.UNet(), []
        for module in net.modules():
            if isinstance(module, ddpm.Attention):
                module.register_forward_hook(lambda m, args, out: seen.append(out.shape[2] * out.shape[3]))
            if isinstance(module, torch.nn.GroupNorm):
                assert module.num_groups == 32
        assert net(torch.empty(1, 3, 32, 32), torch.ones(1, dtype=torch.int64)).shape == (1, 3, 32, 32)
    assert seen == [256, 256, 16, 256, 256, 256]




def reaching_dropout(net, monkeypatch, *given):
    """The output of a network in training in which dropout lets everything pass, and what came to it."""
    seen = []
    monkeypatch.setattr(torch.nn.functional, "dropout",
                        lambda x, p=0.5, training=True, inplace=False: seen.append((x, p)) or x)  # fmt: skip
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
    same("output without dropping", out, want)


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
        assert not any(torch.equal(one, other) for other in outputs[:i]), f"label {i} is as one before it"

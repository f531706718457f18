"""The network of appendix B in NumPy, with weights addressed by name.

Weights are a dict from names to arrays. `roles` lists the names and shapes:

    time.0, time.1               the two dense layers of the time embedding
    label.weight                 the label table, if the network has one; it has no bias
    conv_in                      the first convolution
    down.LEVEL.I                 residual block I of a level on the way down: norm1, conv1, emb, norm2,
                                 conv2, and shortcut where the number of channels changes
    down.LEVEL.I.attention       attention after the block: norm, q, k, v, out
    shrink.LEVEL                 the convolution with stride 2 after a level
    mid.0, mid.0.attention, mid.1
    up.LEVEL.I, grow.LEVEL       the same on the way up, where a convolution follows the upsampling
    norm_out, conv_out

Each layer has a .weight and a .bias. Dense weights are (out, in), convolutions (out, in, height, width).
Images are (B, C, H, W).
"""

import math

import numpy as np
from scipy.special import expit, softmax

# --- Names and shapes -----------------------------------------------------------------------------


def layer(name, *shape):
    """Return [(name, shape)] of a layer's weight and bias."""
    return [(f"{name}.weight", shape), (f"{name}.bias", shape[:1])]


def block_roles(prefix, c_in, c_out, emb_dim):
    """Yield (name, shape) of a residual block's weights; prefix is "" or ends in a dot."""
    yield from layer(f"{prefix}norm1", c_in)
    yield from layer(f"{prefix}conv1", c_out, c_in, 3, 3)
    yield from layer(f"{prefix}emb", c_out, emb_dim)
    yield from layer(f"{prefix}norm2", c_out)
    yield from layer(f"{prefix}conv2", c_out, c_out, 3, 3)
    if c_in != c_out:
        yield from layer(f"{prefix}shortcut", c_out, c_in, 1, 1)


def attention_roles(prefix, c):
    """Yield (name, shape) of an attention block's weights; prefix is "" or ends in a dot."""
    yield from layer(f"{prefix}norm", c)
    for part in ("q", "k", "v", "out"):
        yield from layer(f"{prefix}{part}", c, c, 1, 1)


def residual_table(ch, mult, blocks):
    """Return [(level, channels in, channels out)] of the residual blocks in order of use.

    The level of the two middle blocks is None. On the way up, one block per level more than on the
    way down reads the skip of the downsampling or, on level 0, of the first convolution.
    """
    skips = [ch]
    table = []
    for level, m in enumerate(mult):
        for _ in range(blocks):
            table.append((level, skips[-1], ch * m))
            skips.append(ch * m)
        skips.append(ch * m)  # the downsampling's output
    h = skips.pop()  # the last level has no downsampling
    table += [(None, h, h), (None, h, h)]
    for level in reversed(range(len(mult))):
        for _ in range(blocks + 1):
            table.append((level, h + skips.pop(), ch * mult[level]))
            h = ch * mult[level]
    return table


def roles(
    in_channels=3,
    out_channels=None,
    ch=128,
    mult=(1, 2, 2, 2),
    blocks=2,
    attention=(1,),
    num_classes=None,
    **_,
):
    """Yield (name, shape) of every weight of a network, in order of use; other settings are ignored."""
    table = iter(residual_table(ch, mult, blocks))

    def stage(name, attends):
        _, c_in, c_out = next(table)
        yield from block_roles(f"{name}.", c_in, c_out, 4 * ch)
        if attends:
            yield from attention_roles(f"{name}.attention.", c_out)

    yield from layer("time.0", 4 * ch, ch)
    yield from layer("time.1", 4 * ch, 4 * ch)
    if num_classes:
        yield "label.weight", (num_classes + 1, 4 * ch)
    yield from layer("conv_in", ch, in_channels, 3, 3)
    for level, m in enumerate(mult):
        for i in range(blocks):
            yield from stage(f"down.{level}.{i}", level in attention)
        if level < len(mult) - 1:
            yield from layer(f"shrink.{level}", ch * m, ch * m, 3, 3)
    yield from stage("mid.0", True)
    yield from stage("mid.1", False)
    for level, m in reversed(list(enumerate(mult))):
        for i in range(blocks + 1):
            yield from stage(f"up.{level}.{i}", level in attention)
        if level > 0:
            yield from layer(f"grow.{level}", ch * m, ch * m, 3, 3)
    yield from layer("norm_out", ch * mult[0])
    yield from layer("conv_out", out_channels or in_channels, ch * mult[0], 3, 3)


def unet_parameter_count(**settings):
    """Return the number of parameters of a network with these settings."""
    return sum(math.prod(shape) for _, shape in roles(**settings))


# --- Layers ---------------------------------------------------------------------------------------


def timestep_embedding(t, dim):
    """Return (B, dim) from t (B,): [sin(t f_0), .., cos(t f_0), ..], with dim/2 frequencies.

    f_i falls from 1 to 1/10000 by dim/2 - 1 equal ratios: f_i = 10000^(-i / (dim/2 - 1)). dim is
    even and at least 4. The network passes t - 1, which counts from 0.
    """
    angle = np.asarray(t)[:, None] * 10000.0 ** -np.linspace(0, 1, dim // 2)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def silu(x):
    """Return x times the logistic function of x, elementwise."""
    return x * expit(x)


def group_norm(x, groups, gamma, shift, eps=1e-6):
    """Normalise each image's groups of C/groups neighbouring channels to mean 0 and variance 1.

    The variance is the biased one, plus eps. Then gamma (C,) scales and shift (C,) shifts each channel.
    """
    g = x.reshape(len(x), groups, -1)
    g = (g - g.mean(axis=2, keepdims=True)) / np.sqrt(g.var(axis=2, keepdims=True) + eps)
    return g.reshape(x.shape) * gamma[:, None, None] + shift[:, None, None]


def conv2d(x, w, b, stride=1, pad=((1, 1), (1, 1))):
    """Return (B, C_out, H', W'): the cross-correlation with w (C_out, C_in, kh, kw), plus b (C_out,).

    pad = ((top, bottom), (left, right)) rows and columns of zeros surround the image. Every window of
    the kernel's size is multiplied by the kernel, and every stride-th result is kept.
    """
    padded = np.pad(x, ((0, 0), (0, 0), *pad))
    windows = np.lib.stride_tricks.sliding_window_view(padded, w.shape[2:], axis=(2, 3))
    y = np.tensordot(windows[:, :, ::stride, ::stride], w, axes=((1, 4, 5), (1, 2, 3)))
    return y.transpose(0, 3, 1, 2) + b[:, None, None]


def self_attention(x, weights):
    """Return (B, C, H, W): each pixel becomes a projected average of all pixels' values; no residual.

    The weights q, k, v and out are 1x1 convolutions: matrices (C, C) or (C, C, 1, 1) acting on the
    channels of H*W pixels. Pixel p gives pixel r the softmax over r of q_p . k_r / sqrt(C). One head.
    """

    def project(name, pixels):
        matrix = weights[f"{name}.weight"].reshape(C, C)
        return matrix @ pixels + weights[f"{name}.bias"][:, None]

    B, C, H, W = x.shape
    pixels = x.reshape(B, C, H * W)
    logits = project("q", pixels).transpose(0, 2, 1) @ project("k", pixels) / np.sqrt(C)
    share = softmax(logits, axis=2)  # (B, pixel p, pixel r)
    mixed = project("v", pixels) @ share.transpose(0, 2, 1)
    return project("out", mixed).reshape(B, C, H, W)


# --- Network --------------------------------------------------------------------------------------


def part(weights, name):
    """Return the weights whose names start with `name.`, under the rest of their names."""
    prefix = name + "."
    return {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}


def dense(x, weights, name):
    """Return x W^T + b of the dense layer `name`."""
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def convolution(x, weights, name, **options):
    """Return conv2d of x with the weights of the layer `name`."""
    return conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **options)


def norm(x, weights, name, groups):
    """Return group_norm of x with the weights of the layer `name`."""
    return group_norm(x, groups, weights[f"{name}.weight"], weights[f"{name}.bias"])


def embedding(t, ch, weights, labels=None):
    """Return (B, 4 ch): dense(silu(dense(sinusoid(t - 1)))), plus a row of the label table if it exists.

    The table is (n + 1, 4 ch). Its last row means "no label", which is the default.
    """
    h = dense(timestep_embedding(np.asarray(t) - 1, ch), weights, "time.0")
    h = dense(silu(h), weights, "time.1")
    if "label.weight" in weights:
        row = -1 if labels is None else np.asarray(labels)
        h = h + weights["label.weight"][row]
    return h


def residual_block(x, emb, weights, groups):
    """Return conv2(silu(norm2(conv1(silu(norm1(x))) + dense(silu(emb))))) + shortcut(x).

    The dense layer gives one number per image and channel. The shortcut is the identity, or a 1x1
    convolution where the number of channels changes.
    """
    h = convolution(silu(norm(x, weights, "norm1", groups)), weights, "conv1")
    h = h + dense(silu(emb), weights, "emb")[:, :, None, None]
    h = convolution(silu(norm(h, weights, "norm2", groups)), weights, "conv2")
    if x.shape[1] != h.shape[1]:
        x = convolution(x, weights, "shortcut", pad=((0, 0), (0, 0)))
    return h + x


def attention_block(x, weights, groups):
    """Return x + self_attention(norm(x))."""
    return x + self_attention(norm(x, weights, "norm", groups), weights)


def unet(
    x, t, weights, ch=128, mult=(1, 2, 2, 2), blocks=2, attention=(1,), groups=32, labels=None
):
    """Return eps (B, C_out, H, W) of the paper's network without dropout, from x and t (B,).

    Level i has ch * mult[i] channels. Attention follows each residual block of the given levels, and
    the first block of the middle. Every tensor of the way down is kept as a skip, and each block on
    the way up reads h and, behind it in the channels, the last unused skip.
    """
    emb = embedding(t, ch, weights, labels)

    def stage(h, name, attends):
        h = residual_block(h, emb, part(weights, name), groups)
        return attention_block(h, part(weights, f"{name}.attention"), groups) if attends else h

    skips = [convolution(x, weights, "conv_in")]
    for level in range(len(mult)):
        for i in range(blocks):
            skips.append(stage(skips[-1], f"down.{level}.{i}", level in attention))
        if level < len(mult) - 1:
            # TensorFlow's SAME padding: one row and one column of zeros, at the bottom and right only.
            same = ((0, 1), (0, 1))
            skips.append(convolution(skips[-1], weights, f"shrink.{level}", stride=2, pad=same))
    h = stage(skips[-1], "mid.0", True)
    h = stage(h, "mid.1", False)
    for level in reversed(range(len(mult))):
        for i in range(blocks + 1):
            h = np.concatenate([h, skips.pop()], axis=1)
            h = stage(h, f"up.{level}.{i}", level in attention)
        if level > 0:
            doubled = h.repeat(2, axis=2).repeat(2, axis=3)  # every pixel, in both directions
            h = convolution(doubled, weights, f"grow.{level}")
    return convolution(silu(norm(h, weights, "norm_out", groups)), weights, "conv_out")

"""The weights of a network in the order in which reference_numpy.py takes them, whatever their names.

A file may say it itself: weights_by_role(net), in it or in the file of --map, gives a dict from the roles of
`roles` to tensors, such as "conv_in.weight" or "up.0.1.attention.q.bias". Without it, the network is
run once, and each weight is known by its turn and its shape. So their names, the order of construction,
Linear layers for 1x1 convolutions, and queries, keys and values in one tensor make no difference.
"""

import judged
import torch
from judge import broken
from torch.overrides import TorchFunctionMode

import reference_numpy as ref

HELP = "if that is wrong, give them by role: weights_by_role(net), here or by --map (docs/specification.md)"


# --- The roles, each with its shape -------------------------------------------------------------------------


def layer(role, *shape):
    return [(f"{role}.weight", shape), (f"{role}.bias", shape[:1])]


def block_roles(role, c_in, c_out, emb_dim):
    """Those of a residual block."""
    yield from layer(f"{role}norm1", c_in)
    yield from layer(f"{role}conv1", c_out, c_in, 3, 3)
    yield from layer(f"{role}emb", c_out, emb_dim)
    yield from layer(f"{role}norm2", c_out)
    yield from layer(f"{role}conv2", c_out, c_out, 3, 3)
    if c_in != c_out:
        yield from layer(f"{role}shortcut", c_out, c_in, 1, 1)


def attention_roles(role, c):
    """Those of an attention."""
    yield from layer(f"{role}norm", c)
    for part in ("q", "k", "v", "out"):
        yield from layer(f"{role}{part}", c, c, 1, 1)


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
    """Those of a network: time, conv_in, down.LEVEL.I, shrink.LEVEL, mid, up.LEVEL.I, grow.LEVEL, .."""
    table = iter(ref.residual_table(ch, mult, blocks))

    def stage(role, attends):
        _, c_in, c_out = next(table)
        yield from block_roles(f"{role}.", c_in, c_out, 4 * ch)
        if attends:
            yield from attention_roles(f"{role}.attention.", c_out)

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


# --- The weights, in the order of their use -----------------------------------------------------------------


class Uses(TorchFunctionMode):
    """Notes what is made of parameters alone (a cast, a view, a part), each time that it meets an input."""

    def __init__(self, net):
        super().__init__()
        self.used, self.met, self.made = [], [], {id(p): p for p in net.parameters()}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = list(tensors_in([*args, *(kwargs or {}).values()]))
        weights = [x for x in given if id(x) in self.made]
        made = list(tensors_in([out]))
        if weights and len(weights) == len(given):
            self.made.update({id(x): x for x in made})
        elif made:
            self.used += [x for x in weights if not any(x is other for other in self.used)]
            self.met += [(w, x) for w in weights for x in given if id(x) not in self.made]
        return out


def tensors_in(values):
    for x in values:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from tensors_in(x)


def layers_of(net, inputs):
    """[weight, bias] or [weight] of each layer that net(*inputs) uses, in that order."""
    with torch.no_grad(), Uses(net) as uses:
        net(*inputs)
    found = []
    for x in uses.used:
        vector = x.numel() == max(x.shape)  # (C,), or (C, 1, 1), or (1, C, 1, 1)
        if vector and found and len(found[-1]) == 1 and len(found[-1][0]) == x.numel():
            found[-1].append(x.reshape(-1))
        else:
            found.append([x.reshape(-1) if vector else x])
    return found


def first_met(net, shape, *inputs):
    """What the first weight of this shape meets when net(*inputs) uses it."""
    with torch.no_grad(), Uses(net) as uses:
        net(*inputs)
    return next(x for w, x in uses.met if w.shape == torch.Size(shape))


# --- The one in terms of the other --------------------------------------------------------------------------


def fits(weight, shape, parts=1):
    """Whether a weight is that many tensors of a shape, perhaps with other dimensions behind the first."""
    return len(weight) == parts * shape[0] and weight.numel() == parts * torch.Size(shape).numel()


def take(found, role, shape, several):
    """Remove and return the first layer of a shape, to the last dimension if there is one so; if `several`,
    the first with as many numbers, perhaps cut out of one of two or three."""
    exact = [several or one[0].shape == torch.Size(shape) for one in found]
    for i in sorted(range(len(found)), key=lambda i: not exact[i]):
        for parts in (1, 2, 3) if several else (1,):
            if fits(found[i][0], shape, parts):
                pieces = [list(piece) for piece in zip(*(x.chunk(parts) for x in found[i]))]
                found[i : i + 1] = pieces[1:]
                return pieces[0]
    raise broken(
        "formula", f"no weight {tuple(shape)} is left for {role}, in the order of use; {HELP}"
    )


def by_use(net, wanted, inputs):
    """The tensors that have the wanted roles, each the first of its shape in the order of use."""
    found, tensors = layers_of(net, inputs), []
    for role, shape in wanted:
        if role.endswith("weight"):
            tensors += take(found, role, shape, several=role.split(".")[-2] in ("q", "k", "v"))
    if len(tensors) != len(wanted) or found:
        raise broken(
            "formula",
            f"of {len(wanted)} weights, {len(tensors)} were found by the order of use, "
            f"and {len(found)} layers are left; {HELP}",
        )
    return tensors


def matched(what):
    """What is compared, and how the weights were found, if it was by their use."""
    return (
        what if judged.ROLES else f"{what}, of weights matched by the order of their use; {HELP};"
    )


def by_role(net, wanted, *inputs):
    """The weights of a network, or of a block of it, as NumPy arrays with the wanted roles in turn."""
    wanted = list(wanted)
    if judged.ROLES:
        named = judged.ROLES(net)
        lacking = [role for role, _ in wanted if role not in named]
        assert not lacking, f"{judged.MAP}(net) lacks {', '.join(lacking)}"
        tensors = [named[role] for role, _ in wanted]
    else:
        tensors = by_use(net, wanted, inputs)
    return [x.detach().double().reshape(shape).numpy() for x, (_, shape) in zip(tensors, wanted)]

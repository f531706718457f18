"""The weights of a network by the names that network_numpy.py uses, whatever their own names.

The tested file, or the file of --map, may define weights_by_role(net): it returns a dict from the names of
`network_numpy.roles` to tensors, such as "conv_in.weight" or "up.0.1.attention.q.bias". Without this function,
the network runs once, and weights are found by their shapes and the order of their use. So the weights may
have any names and any order of construction. Layers may be Linear instead of 1x1 convolutions, and queries,
keys and values may be in one tensor.
"""

import pytest
import tested
import torch
from checks import broken
from torch.overrides import TorchFunctionMode

HELP = "if that is wrong, give them by role: weights_by_role(net), here or by --map (docs/specification.md)"


# --- The weights in order of use ------------------------------------------------------------------


class Uses(TorchFunctionMode):
    """Record each use of a parameter, or of a tensor made only of parameters (a cast, a view, a part)."""

    def __init__(self, net):
        super().__init__()
        self.used, self.met = [], []
        self.made = {id(p): p for p in net.parameters() if p.requires_grad}

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
    """Return [weight, bias] or [weight] of each layer of net(*inputs), in order of use."""
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
    """Return the first tensor that net(*inputs) combines with a weight of this shape."""
    with torch.no_grad(), Uses(net) as uses:
        net(*inputs)
    return next(x for w, x in uses.met if w.shape == torch.Size(shape))


# --- The weights by role --------------------------------------------------------------------------


def fits(weight, shape, parts=1):
    """Return True if a weight can be split into this many tensors of a shape, up to a reshape."""
    return len(weight) == parts * shape[0] and weight.numel() == parts * torch.Size(shape).numel()


def take(found, role, shape, several):
    """Remove and return the first layer of a shape, an exact one if there is one.

    With `several`, it is the first layer with as many numbers, or a half or a third of a layer.
    """
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
    """Return the tensors with the wanted roles, each the first of its shape in order of use."""
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
    """Return the name of a compared quantity, with a hint if the weights were found by their use."""
    return (
        what if tested.ROLES else f"{what}, of weights matched by the order of their use; {HELP};"
    )


def tensors_by_role(net, wanted, *inputs):
    """Return the weights of a network, or of a block of it, as a dict from the wanted roles to tensors."""
    wanted = list(wanted)
    if tested.ROLES:
        named = tested.ROLES(net)
        lacking = [role for role, _ in wanted if role not in named]
        assert not lacking, f"{tested.MAP}(net) lacks {', '.join(lacking)}"
        tensors = [named[role] for role, _ in wanted]
    else:
        tensors = by_use(net, wanted, inputs)
    return {
        role: x.detach().reshape(shape) for x, (role, shape) in zip(tensors, wanted, strict=True)
    }


def by_role(net, wanted, *inputs):
    """Return the same as a dict from the wanted roles to float64 arrays."""
    return {role: x.double().numpy() for role, x in tensors_by_role(net, wanted, *inputs).items()}


def change_weights(net, wanted, change, *inputs):
    """Write change(role, w) into each weight w of a network; change returns None to leave w unchanged.

    The test is skipped for a network that computes with copies of its parameters, because a write to
    a copy has no effect.
    """
    places = {p.untyped_storage().data_ptr() for p in net.parameters()}
    for role, w in tensors_by_role(net, wanted, *inputs).items():
        value = change(role, w)
        if value is not None:
            if w.untyped_storage().data_ptr() not in places:
                pytest.skip(f"absent: a weight {role} that can be written")
            w.copy_(value.reshape(w.shape))

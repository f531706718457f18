"""support/network_picture.py: the drawing states the shapes that the network has."""

import torch

import ddpm
from support.network_picture import levels


def test_the_shapes_of_the_levels_are_those_of_a_forward_pass():
    """Measured at the residual blocks and attention layers of each level, on the way down."""
    settings = dict(ch=8, mult=(1, 2, 3), blocks=2, attention=(0, 2), groups=4, in_channels=3)
    net = ddpm.UNet(**settings)
    shapes = []

    def note(module, inputs, output):
        shapes.append((*output.shape[1:], isinstance(module, ddpm.Attention)))

    for module in net.down.modules():
        if isinstance(module, (ddpm.ResBlock, ddpm.Attention)):
            module.register_forward_hook(note)
    net(torch.zeros(1, 3, 16, 24), torch.ones(1, dtype=torch.int64))
    seen = []
    for c, h, w, attention in levels(settings, 16, 24):
        seen += 2 * ([(c, h, w, False), (c, h, w, True)] if attention else [(c, h, w, False)])
    assert seen == shapes

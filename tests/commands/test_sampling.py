"""support/sampling.py: seeds, noise, timesteps and labels."""

import unicodedata

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support import checkpoint, sampling
from support.errors import UsageError


def test_image_i_of_seed_s_has_its_own_generator_seed():
    """Seed 0 numbers the images from 0; no two of the first hundred seeds share an image."""
    assert sampling.image_seeds(0, range(5)) == [0, 1, 2, 3, 4]
    assert sampling.image_seeds(3, [7]) == [(7 + 3 * 2654435769) % 2**32]
    seeds = [sampling.image_seeds(seed, range(1000)) for seed in range(100)]
    assert len(set(np.ravel(seeds))) == 100_000


def test_the_noise_of_an_image_depends_on_its_seed_alone():
    """Not on the other images, the number of earlier calls for them, or the memory format of x."""
    x = torch.zeros(3, 2, 4, 4)
    together = sampling.image_noise([5, 6, 7])
    alone = sampling.image_noise([6])
    for _ in range(3):
        z = together(x.to(memory_format=torch.channels_last))
        assert z.is_contiguous() and torch.equal(z[1:2], alone(x[:1]))
    assert torch.equal(sampling.image_noise([5])(x[:1]), torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(5)))  # fmt: skip


def test_quadratic_timesteps_are_T_times_i_over_n_squared():
    """By hand for T = 100 and n = 5; where that repeats a timestep, the next free one."""
    assert sampling.quadratic_timesteps(100, 5) == [4, 16, 36, 64, 100]
    assert sampling.quadratic_timesteps(10, 8) == [1, 2, 3, 4, 5, 6, 8, 10]
    assert sampling.quadratic_timesteps(6, 6) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("names, n, labels, rows", [
    (None, 6, [0, 1, 2, 3, 0, 1], 4),
    (["all"], 5, [0, 1, 2, 3, 0], 4),
    (["dog"], 3, [1, 1, 1], 2),
    (["eel, cat"], 3, [3, 0, 3], 2),
    (["eel", "cat"], 3, [3, 0, 3], 2),
    (["a,b"], 1, [2], 1),
    (["a,b", "dog,eel"], 3, [2, 1, 3], 3),
    (None, 2, [0, 1], 2),
])  # fmt: skip
def test_the_requested_classes_take_turns_and_a_grid_has_a_row_for_each(names, n, labels, rows):
    found, count = sampling.class_labels(["cat", "dog", "a,b", "eel"], names, n)
    assert (found.tolist(), count) == (labels, rows)


def test_by_default_there_are_8_images_of_each_class_or_64():
    assert sampling.class_labels(["cat", "dog"])[0].tolist() == [0, 1] * 8
    assert len(sampling.class_labels(["cat", "dog"], ["cat"])[0]) == 64
    assert sampling.class_labels([])[0].tolist() == [0] * 64


def test_all_may_be_one_of_several_names():
    labels, rows = sampling.class_labels(["a", "b"], ["all,b"], 6)
    assert labels.tolist() == [0, 1, 1, 0, 1, 1] and rows == 3


def test_a_class_with_the_name_all_can_be_selected():
    assert sampling.class_labels(["all", "cat"], ["all"], 2)[0].tolist() == [0, 0]


def test_an_accented_class_is_found_in_both_unicode_forms():
    composed, decomposed = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))
    assert composed != decomposed
    for stored in (composed, decomposed):
        for typed in (composed, decomposed):
            assert sampling.class_labels(["x", stored], [typed], 1)[0].tolist() == [1]
            assert sampling.class_labels(["x", stored], [f"x,{typed}"], 2)[0].tolist() == [0, 1]


def test_an_unknown_class_is_named_with_the_known_ones():
    with pytest.raises(UsageError, match="--label owl: not a class; choose from cat, dog"):
        sampling.class_labels(["cat", "dog"], ["cat,owl"], 1)


def test_sampling_in_bfloat16_rounds_the_weights_once_and_not_at_every_step(ckpt):
    """autocast caches the rounded copy of a weight, but only if the weight requires a gradient."""
    _, net, d = checkpoint.load_model(ckpt)
    weights = {p.data_ptr() for p in net.parameters()}

    class Count(TorchDispatchMode):
        roundings = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op is torch.ops.aten._to_copy.default and args[0].data_ptr() in weights:
                self.roundings += 1
            return op(*args, **(kwargs or {}))

    counts = []
    for steps in (1, 4):
        with torch.autocast("cpu", torch.bfloat16), Count() as count:
            sampling.sample(net, d, (1, 16, 16), [0, 1], [3, 5], steps, eta=0.0)
        counts.append(count.roundings)
    assert counts[0] == counts[1] > 50

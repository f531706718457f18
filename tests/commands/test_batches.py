"""support/batches.py: the random numbers of a training step."""

import numpy as np
import pytest
import torch

from support import batches, workers
from support.data import Data

CPU = torch.device("cpu")
DATA = Data(
    torch.arange(10 * 3 * 4 * 4).reshape(10, 3, 4, 4).to(torch.uint8),
    torch.arange(10) % 2,
    ["even", "odd"],
)


def sampled(step, rank=0, world=1, monkeypatch=None, **how):
    if monkeypatch:
        monkeypatch.setattr(workers, "place", lambda: (rank, world))
    how = dict(batch_size=4, seed=1, flip=True) | how
    return batches.sample_batch(step, DATA, 50, device=CPU, **how)


def test_batches_use_every_image_once_per_epoch_in_an_order_that_the_seed_decides():
    """Any ten images from a multiple of ten are all ten, in steps of 4."""
    row = torch.cat([batches.images_of(step, 4, 10, seed=1) for step in range(10)]).tolist()
    assert all(sorted(row[i : i + 10]) == list(range(10)) for i in range(0, 40, 10))
    other = torch.cat([batches.images_of(step, 4, 10, seed=2) for step in range(10)]).tolist()
    assert row[:10] != row[10:20] and row != other
    larger = batches.images_of(0, 25, 10, 1).tolist()  # a batch of more than all images
    assert sorted(larger[:10]) == sorted(larger[10:20]) == list(range(10))


def test_images_are_scaled_to_minus_1_to_1_with_their_labels():
    data = Data(torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1), torch.arange(256), [])
    i = torch.tensor([255, 0, 51])
    x0, y = data.batch(i, CPU)
    assert x0.flatten().tolist() == pytest.approx([1, -1, -0.6]) and torch.equal(y, i)
    assert data._replace(labels=None).batch(i, CPU)[1] is None


def test_a_batch_depends_on_seed_and_step_only():
    """Not on what was sampled before."""
    first = sampled(3)
    torch.rand(7)
    sampled(5)
    for a, b in zip(first, sampled(3)):
        assert torch.equal(a, b)
    for change in (dict(step=4), dict(step=3, seed=2)):
        assert not torch.equal(sampled(**change)[3], first[3])


def test_a_batch_has_images_in_minus_1_to_1_and_timesteps_in_1_to_T():
    t = torch.cat([sampled(step)[2] for step in range(200)])
    x0, _, _, eps = sampled(0)
    assert x0.min() >= -1 and x0.max() <= 1 and x0.shape == eps.shape == (4, 3, 4, 4)
    assert t.min() == 1 and t.max() == 50
    labels = torch.cat([sampled(step)[1] for step in range(200)])
    dropped = (labels == 2).float().mean().item()  # 2 is "no label"
    assert 0.06 < dropped < 0.14, dropped  # 4 standard errors of 800 labels around 0.1


@pytest.mark.parametrize("flip", [False, True])
def test_half_of_the_images_are_mirrored_with_flip_and_none_without(flip):
    mirrored = []
    for step in range(100):
        x0 = sampled(step, flip=flip)[0]
        plain = DATA.images[batches.images_of(step, 4, 10, 1)].float() / 127.5 - 1
        for image, original in zip(x0, plain):
            assert torch.equal(image, original) or torch.equal(image, original.flip(2))
            mirrored.append(not torch.equal(image, original))
    assert 0.4 < np.mean(mirrored) < 0.6 if flip else not any(mirrored)


def test_several_processes_share_the_batch_of_one(monkeypatch):
    whole = sampled(3)
    parts = [sampled(3, rank, 2, monkeypatch) for rank in (0, 1)]
    for one, *both in zip(whole, *parts):
        assert torch.equal(one, torch.cat(both))


def test_held_out_batches_are_the_same_at_any_micro_batch(monkeypatch):
    """The images take turns, and t is evenly spaced over 1..T."""

    def all_of(micro):
        return [torch.cat(c) for c in zip(*batches.fixed_batches(DATA, 50, 25, micro, CPU))]

    whole = all_of(25)
    for micro in (1, 4):
        for a, b in zip(whole, all_of(micro)):
            assert torch.equal(a, b)
    assert whole[2].sort().values.tolist() == [2 * k + 2 for k in range(25)]

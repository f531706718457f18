"""evaluate.py: the bound, its terms, and its precision."""

import re

import numpy as np
from running import run

import evaluate
from support import sampling


def table(out):
    """Return the values of the printed table, (4 rows, variances)."""
    rows = [re.findall(r"(-?\d+\.\d+) ±", line[32:]) for line in out.splitlines()[2:]]
    return np.array(rows, float)


def test_evaluate_prints_the_bound_and_its_terms_for_both_variances(trained, ckpt):
    status, out, err = run("evaluate.py", "--ckpt", ckpt, "--n", 6)
    assert status == 0 and err == ""
    title, head, *_ = out.splitlines()
    assert title.startswith("6 held-out images of glyphs") and "bits/dim" in title
    assert "sigma^2 = beta" in head and "sigma^2 = beta_tilde" in head
    values = table(out)
    assert values.shape == (4, 2)
    assert np.abs(values[:3].sum(0) - values[3]).max() <= 2e-5  # four numbers with five decimals


def test_a_learned_variance_is_a_third_column(call, learned):
    status, out, err = call(evaluate, "--ckpt", learned, "--n", 4)
    assert status == 0 and "sigma^2 learned" in out.splitlines()[1], err
    assert table(out).shape == (4, 3)


def test_the_bound_does_not_depend_on_the_batch_size_and_uses_the_seeds_of_the_images(
    call, ckpt, monkeypatch
):
    seeds = []

    def noise(some, original=sampling.image_noise):
        seeds.extend(some)
        return original(some)

    monkeypatch.setattr(sampling, "image_noise", noise)
    values = []
    for size in (2, 3):
        flags = ["--ckpt", ckpt, "--n", 3, "--seed", 3, "--device", "cpu", "--batch-size", size]
        values.append(table(call(evaluate, *flags)[1]))
    assert np.abs(values[0] - values[1]).max() < 1e-4
    assert seeds == 2 * sampling.image_seeds(3, range(3))


def test_bfloat16_gives_nearly_the_same_bound(call, ckpt):
    """The network is rounded; the terms are not, which is why float32 is the default."""
    bits = []
    for precision in ("fp32", "bf16"):
        flags = ["--ckpt", ckpt, "--n", 2, "--device", "cpu", "--precision", precision]
        bits.append(table(call(evaluate, *flags)[1])[3, 0])
    assert 0 < abs(bits[0] - bits[1]) < 0.02 * bits[0]

"""evaluate.py: the bound, its terms, and its precision."""

import numpy as np
from judge import close
from running import run

import evaluate


def test_evaluate_prints_the_bound_and_its_terms_for_both_variances(trained, ckpt):
    status, out, err = run("evaluate.py", "--ckpt", ckpt, "--n", 6)
    assert status == 0 and err == ""
    title, head, *rows = out.splitlines()
    assert title.startswith("6 held-out images of glyphs") and "bits/dim" in title
    assert "sigma^2 = beta" in head and "sigma^2 = beta_tilde" in head
    values = np.array([[float(cell.split(" ±")[0]) for cell in row[32:].split("  ") if cell.strip()]
                       for row in rows])  # fmt: skip
    assert values.shape == (4, 2)
    close("L_T + rate + distortion", values[:3].sum(0), values[3], 2e-5, 1.0)


def test_bfloat16_has_nearly_the_same_bound(call, ckpt):
    """The network is rounded; the terms are not, which is why float32 is the default."""
    bits = []
    for precision in ([], ["--precision", "bf16"]):
        status, out, err = call(evaluate, "--ckpt", ckpt, "--n", 2, "--device", "cpu", *precision)
        assert status == 0, err
        bits.append(float(out.splitlines()[-1].split()[-3]))
    assert bits[0] != bits[1]
    close("bits/dim in bfloat16", bits[1], bits[0], 0.02)

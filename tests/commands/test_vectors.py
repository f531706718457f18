"""The test vectors in tests/vectors: write.py reproduces the stored files, and check.py tests files with them."""

import json
import re
import sys
import types

import numpy as np
import pytest
import torch
from running import ROOT
from test_structure import packages
from vectors import check, write

FOLDER = ROOT / "tests" / "vectors"
SOURCE = (ROOT / "ddpm.py").read_text()
LIKELIHOOD = (ROOT / "likelihood.py").read_text()
EPS = np.finfo(np.float64).eps
subjects = pytest.mark.parametrize("name", write.SUBJECTS)
precisions = pytest.mark.parametrize("precision", ["float64", "float32"])


@pytest.fixture
def checked(tmp_path, monkeypatch, capsys):
    """Return a function that runs check.py on these sources: (exit status, output)."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in "ddpm", "likelihood":  # check.py imports the tested files under these names
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name))

    def checked(source, precision="float64", only=(), likelihood=LIKELIHOOD):
        (tmp_path / "mine.py").write_text(source)
        (tmp_path / "likelihood.py").unlink(missing_ok=True)
        if likelihood:
            (tmp_path / "likelihood.py").write_text(likelihood)
        options = ["--only", *only] if only else []
        try:
            status = check.main([str(tmp_path / "mine.py"), "--precision", precision, *options])
        except SystemExit as stop:
            status = stop.code
        finally:
            torch.set_default_dtype(torch.float32)
        return status, "".join(capsys.readouterr())

    return checked


def replaced(source, old, new):
    """Return the source with one text replaced."""
    assert source.count(old) == 1, old
    return source.replace(old, new)


# --- The stored files -----------------------------------------------------------------------------


def leaves(value, path=()):
    """Yield (path, number or text) for everything in a JSON file."""
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


def allowed_difference(path, stored):
    """Return how far a number may be from the stored one on another machine.

    Expected results: an eighth of the float64 tolerance. Scales and tolerances have three digits. Inputs are
    exact, or a beta after a few operations.
    """
    if "want" not in path:
        relative = 0.01 if {"scale", "tolerance"} & {*path} else 8 * EPS
        return abs(stored[path]) * relative
    at = path.index("want")
    case = path[:2]
    entry = path[at + 1 :]
    scale = stored.get((*case, "scale", *entry), abs(stored[path]))
    scale = stored.get((*path[:at], "scale", *entry), scale)  # an alternative may have its own
    return scale * stored[*case, "tolerance", "float64"] / 8


@subjects
def test_the_stored_files_contain_what_the_reference_computes(name):
    """Keys, texts and inputs are equal; numbers are equal except for rounding."""
    stored = dict(leaves(json.loads((FOLDER / f"{name}.json").read_text())))
    fresh = dict(leaves(json.loads(write.text(write.document(name)))))
    assert stored.keys() == fresh.keys()
    for path, value in stored.items():
        if isinstance(value, float):
            error = abs(fresh[path] - value)
            allowed = allowed_difference(path, stored)
            assert error <= allowed, f"{path}: computed {fresh[path]!r}, stored {value!r}"
        else:
            assert fresh[path] == value, (path, fresh[path], value)


def test_the_network_file_contains_what_the_reference_computes():
    """Inputs and weights are equal to the last bit and in order; the output is equal except for rounding."""
    stored = np.load(FOLDER / "network.npz")
    xt, t, weights = write.network_arrays(np.random.default_rng(write.SEED))
    case = json.loads((FOLDER / "network.json").read_text())["cases"][0]
    assert list(case["given"]["weights"]) == list(weights) == stored.files[3:]
    for name, array in {"xt": xt, "t": t, **weights}.items():
        np.testing.assert_array_equal(stored[name], array, name)
    eps = write.unet(xt, t, weights)
    error = abs(stored["eps"] - eps).max()
    assert error <= case["tolerance"]["float64"] / 8
    assert eps.std() > 0.1


def test_writing_twice_gives_the_same_bytes_and_less_than_300_kB(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        write.write(tmp_path / folder)
    first = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    stored = [path for path in FOLDER.iterdir() if path.suffix in (".json", ".npz")]
    assert {path.name for path in stored} == set(first)
    assert sum(path.stat().st_size for path in stored) < 300_000


def test_the_vectors_come_from_the_reference_alone():
    """write.py imports NumPy and the reference, but neither torch nor ddpm.py."""
    reference = {"reference_numpy", "exact_models", "network_numpy"}
    allowed = reference | {"numpy", "argparse", "json", "pathlib", "sys", "typing"}
    assert reference <= set(packages((FOLDER / "write.py").read_text())) <= allowed


# --- The checker ----------------------------------------------------------------------------------


@precisions
def test_every_case_passes_for_our_files(checked, precision):
    """No name is missing, and no alternative is needed."""
    status, out = checked(SOURCE, precision)
    cases = sum(len(json.loads(path.read_text())["cases"]) for path in FOLDER.glob("*.json"))
    assert status == 0 and out.endswith(f"\nmine.py in {precision}: {cases} passed\n"), out
    assert len(out.splitlines()) == len(write.SUBJECTS) + 1


@precisions
def test_a_missing_root_in_eq7_fails_with_case_entry_values_and_error(checked, precision):
    """Only the subjects that depend on eq. 7 fail."""
    source = replaced(SOURCE, "c_0 = self.alpha_bar_s.sqrt() *", "c_0 = self.alpha_bar_s *")
    status, out = checked(source, precision)
    line = (r"^FAILED posterior +5 failed, 1 passed; .+: mean\[\d, \d\] is \S+, expected \S+; "
            r"largest error \S+e\+\d+ x the tolerance$")  # fmt: skip
    assert status == 1 and re.search(line, out, re.MULTILINE), out
    assert re.findall(r"^FAILED (\w+)", out, re.MULTILINE) == [
        "ancestral", "bound", "parametrisation", "posterior"], out  # fmt: skip


@pytest.mark.parametrize("subject", ["tables", "forward", "posterior"])
def test_a_float32_alpha_bar_fails_for_float32_images_too(checked, subject):
    """The float32 tolerance does not cover the error of 1 - alpha_bar at t = 1."""
    source = replaced(SOURCE, "self.alpha.cumprod(0)", "self.alpha.float().cumprod(0)")
    status, out = checked(source, "float32", [subject])
    assert status == 1 and "FAILED" in out, out


def test_noise_at_t_1_fails(checked):
    """The array of noise for t = 1 shows it."""
    source = replaced(SOURCE, "    if t == 1:\n        return mean\n", "")
    status, out = checked(source, "float64", ["ancestral"])
    assert status == 1 and "8 failed" in out, out  # sigma_1 is 0 for beta_tilde


TANH = """
    low = torch.where(x0 < -0.999, 0.0, tanh_cdf(low))
    high = torch.where(x0 > 0.999, 1.0, tanh_cdf(high))
    return (high - low).clamp(min=1e-12).log()


def tanh_cdf(z):
    return (1 + torch.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2
"""
CLIP = "        if clip:\n            x0 = x0.clamp(-1, 1)\n        return self.posterior_mean"
SIGMA_1 = "    sigma2[1] = d.beta_tilde[2] if"


@pytest.mark.parametrize("file, old, new, subject, name", [
    ("ddpm", CLIP, "        return self.posterior_mean", "parametrisation", "unclipped"),
    ("ddpm", "eps = d.eps_from_x0(xt, t, x0)  #", "pass  #", "ddim", "the model's own eps"),
    ("likelihood", SIGMA_1, "    sigma2[1] = sigma2[1] if sigma2[1] > 0 else d.beta_tilde[2] if", "bound",
     "sigma_1"),
    ("likelihood", "    low = torch.where(x0 < -0.999, -math.inf, low)", TANH, "decoder", "tanh"),
], ids=["clip", "eps", "sigma_1", "tanh"])  # fmt: skip
def test_an_alternative_that_the_paper_allows_passes_and_is_named(
    checked, file, old, new, subject, name
):
    for precision in "float64", "float32":
        if file == "ddpm":
            status, out = checked(replaced(SOURCE, old, new), precision, [subject])
        else:
            changed = replaced(LIKELIHOOD, old, new)
            status, out = checked(SOURCE, precision, [subject], likelihood=changed)
        assert status == 0 and f"alternative ({name})" in out, out


KL = "def normal_kl(m, v, n, w):\n    return 0.5 * ((w / v).log() + (v + (m - n) ** 2) / w - 1)\n"


def test_cases_of_missing_names_are_skipped_and_counted(checked):
    """A file that contains only the KL divergence is tested with its cases."""
    status, out = checked(KL, likelihood="")
    assert status == 0 and re.search(r"^ +kl +1 passed", out, re.MULTILINE), out
    assert "6 missing (Diffusion.q_sample)" in out, out
    assert re.search(r"mine.py in float64: \d+ missing, 1 passed\n$", out), out
    status, out = checked(KL.replace("m - n", "m + n"), likelihood="")
    assert status == 1 and "FAILED kl" in out, out


def test_weights_in_another_order_are_assigned_by_weights_by_role(checked):
    """If conv_in is created last, the case is missing until the file defines weights_by_role."""
    first = "        self.conv_in = conv(in_channels, ch)\n"
    last = "        self.norm_out = norm(groups, c)\n"
    moved = replaced(replaced(SOURCE, first, ""), last, last + first)
    _, out = checked(moved, "float64", ["network", "kl"])
    assert "1 missing (weights_by_role" in out, out
    roles = [*json.loads((FOLDER / "network.json").read_text())["cases"][0]["given"]["weights"]]
    by_role = f"""

def weights_by_role(net):
    last = [net.conv_in.weight, net.conv_in.bias]
    rest = [p for p in net.parameters() if all(p is not q for q in last)]
    return dict(zip({roles}, [*rest[:4], *last, *rest[4:]]))
"""
    status, out = checked(moved + by_role, "float64", ["network"])
    assert status == 0 and "1 passed" in out, out


def test_a_file_without_any_of_the_names_is_a_usage_error(checked):
    status, out = checked("x = 1\n", "float64", ["kl"], likelihood="")
    assert status == 2 and "has none of the tested names" in out.splitlines()[-1], out


def test_the_README_block_for_JAX_checks_eq7(monkeypatch, capsys):
    """With NumPy instead of JAX, the block passes, and it fails if a root is missing."""
    jax = types.ModuleType("jax")
    jax.numpy = np
    monkeypatch.setitem(sys.modules, "jax", jax)
    monkeypatch.setitem(sys.modules, "jax.numpy", np)
    monkeypatch.chdir(ROOT)
    (block,) = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    exec(block, {})
    assert capsys.readouterr().out == "6 cases of eq. 7 pass\n"
    with pytest.raises(AssertionError, match="T = 2"):
        exec(block.replace("np.sqrt(alpha_bar[t - 1]) * beta", "alpha_bar[t - 1] * beta"), {})

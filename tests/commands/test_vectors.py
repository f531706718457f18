"""The test vectors: what write.py writes is what is stored, and check.py judges by it."""

import json
import re
import sys
import types

import numpy as np
import pytest
import torch
from running import ROOT
from test_house import imports
from vectors import check, write

FOLDER = ROOT / "tests" / "vectors"
SOURCE = (ROOT / "ddpm.py").read_text()
EPS = np.finfo(np.float64).eps
subjects = pytest.mark.parametrize("name", write.SUBJECTS)
precisions = pytest.mark.parametrize("precision", ["float64", "float32"])


@pytest.fixture
def judged(tmp_path, monkeypatch, capsys):
    """Runs check.py on a file of this content: (exit status, what it prints)."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def judged(source, precision="float64", *subjects):
        (tmp_path / "mine.py").write_text(source)
        only = ["--only", *subjects] if subjects else []
        try:
            status = check.main([str(tmp_path / "mine.py"), "--precision", precision, *only])
        except SystemExit as stop:
            status = stop.code
        finally:
            torch.set_default_dtype(torch.float32)
        return status, "".join(capsys.readouterr())

    return judged


def changed(old, new):
    """ddpm.py with an edit."""
    assert SOURCE.count(old) == 1, old
    return SOURCE.replace(old, new)


# --- What is stored ------------------------------------------------------------------------------


def leaves(value, path=()):
    """(path, number or word) of everything in a JSON file."""
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


def slack(path, stored):
    """How far a number may be from the stored one, on another machine.

    What is wanted: an eighth of what float64 is allowed, for the reference rounds less than what it judges.
    Scales and tolerances have three digits. What is given is exact, or a beta: a few operations.
    """
    if "want" not in path:
        return abs(stored[path]) * (0.01 if {"scale", "tolerance"} & {*path} else 8 * EPS)
    at = path.index("want")
    departure, case, entry = path[:at], path[:2], path[at + 1 :]
    of_case = stored.get((*case, "scale", *entry), abs(stored[path]))
    return (
        stored.get((*departure, "scale", *entry), of_case)
        * stored[*case, "tolerance", "float64"]
        / 8
    )


@subjects
def test_a_file_says_what_the_reference_computes_today(name):
    """The same keys, words and inputs, and numbers equal but for rounding."""
    stored = dict(leaves(json.loads((FOLDER / f"{name}.json").read_text())))
    fresh = dict(leaves(json.loads(write.text(write.document(name)))))
    assert stored.keys() == fresh.keys()
    for path, value in stored.items():
        if isinstance(value, float):
            error, allowed = abs(fresh[path] - value), slack(path, stored)
            assert error <= allowed, f"{path}: computed {fresh[path]!r}, stored {value!r}"
        else:
            assert fresh[path] == value, (path, fresh[path], value)


def test_the_network_file_holds_what_the_reference_computes_today():
    """Input, t and every weight to the last bit, in the order that network.json states; the output but
    for rounding."""
    stored = np.load(FOLDER / "network.npz")
    xt, t, weights = write.network_arrays(np.random.default_rng(write.SEED))
    case = json.loads((FOLDER / "network.json").read_text())["cases"][0]
    assert list(case["given"]["weights"]) == list(weights) == stored.files[3:]
    for name, array in {"xt": xt, "t": t, **weights}.items():
        np.testing.assert_array_equal(stored[name], array, name)
    eps = write.unet(xt, t, weights)
    error = abs(stored["eps"] - eps).max()
    assert error <= case["tolerance"]["float64"] / 8 and eps.std() > 0.1


def test_the_files_are_written_the_same_each_time_and_are_less_than_300_kB(tmp_path):
    """Byte for byte; and there are no others."""
    for folder in "ab":
        (tmp_path / folder).mkdir()
        write.write(tmp_path / folder)
    first = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    stored = [path for path in FOLDER.iterdir() if path.suffix in (".json", ".npz")]
    assert {path.name for path in stored} == set(first)
    assert sum(path.stat().st_size for path in stored) < 300_000


def test_the_vectors_come_from_the_reference_alone():
    """write.py imports NumPy and reference_numpy.py, and neither torch nor ddpm.py."""
    assert {"numpy", "reference_numpy"} <= set(imports((FOLDER / "write.py").read_text())) <= {
        "numpy", "reference_numpy", "argparse", "json", "pathlib", "sys", "typing"}  # fmt: skip


# --- What is judged by it --------------------------------------------------------------------------


@precisions
def test_every_case_holds_for_ddpm(judged, precision):
    """Each subject's largest error is within its tolerance; nothing is absent, nothing a departure."""
    status, out = judged(SOURCE, precision)
    cases = sum(len(json.loads(path.read_text())["cases"]) for path in FOLDER.glob("*.json"))
    assert status == 0 and out.endswith(f"\nmine.py in {precision}: {cases} held\n"), out
    assert len(out.splitlines()) == len(write.SUBJECTS) + 1


@precisions
def test_a_root_that_is_missing_in_eq7_fails_in_words(judged, precision):
    """The line names a case, an entry, both values and the error; what does not depend on eq. 7 holds."""
    status, out = judged(changed("c_0, c_t = ab_s.sqrt() *", "c_0, c_t = ab_s *"), precision)
    words = (r"^FAILS posterior +5 failed, 1 held; .+: mean\[\d, \d\] is \S+, not \S+; "
             r"error \S+e\+\d+ x the tolerance$")  # fmt: skip
    assert status == 1 and re.search(words, out, re.MULTILINE), out
    assert re.findall(r"^FAILS (\w+)", out, re.MULTILINE) == [
        "ancestral", "bound", "parametrisation", "posterior"], out  # fmt: skip


@pytest.mark.parametrize("subject", ["tables", "forward", "posterior"])
def test_a_float32_alpha_bar_fails_where_images_are_float32(judged, subject):
    """1 - alpha_bar has lost its digits at t = 1; no tolerance for float32 excuses that."""
    source = changed("self.alpha.cumprod(0)", "self.alpha.float().cumprod(0)")
    status, out = judged(source, "float32", subject)
    assert status == 1 and "FAILS" in out, out


TANH = """
    low, high = ((1 + torch.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2 for z in (low, high))
    low, high = torch.where(x0 < -0.999, 0.0, low), torch.where(x0 > 0.999, 1.0, high)
    return (high - low).clamp(min=1e-12).log()
"""


@pytest.mark.parametrize("old, new, subject, word", [
    ("x0.clamp(-1, 1) if clip else x0, xt, t)", "x0, xt, t)", "parametrisation", "unclipped"),
    ("eps = d.eps_from_x0(xt, t, x0)  #", "eps = model(xt, same_t(t, xt))  #", "ddim", "the model's own eps"),
    ("var = at(d.beta_tilde, 2, x0) if d.T > 1", "var = at(sigma2, 1, x0) if sigma2[1] > 0 else "
     "at(d.beta_tilde, 2, x0) if d.T > 1", "bound", "sigma_1"),
    ("    low = torch.where(x0 < -0.999, -math.inf, low)", TANH, "decoder", "tanh"),
], ids=["clip", "eps", "sigma_1", "tanh"])  # fmt: skip
def test_a_departure_for_which_the_paper_leaves_room_is_named(judged, old, new, subject, word):
    """It does not fail, in either precision."""
    for precision in "float64", "float32":
        status, out = judged(changed(old, new), precision, subject)
        assert status == 0 and f"departed ({word})" in out, out


KL = "def normal_kl(m, v, n, w):\n    return 0.5 * ((w / v).log() + (v + (m - n) ** 2) / w - 1)\n"


def test_what_a_file_does_not_have_is_skipped_and_counted(judged):
    """A file with the divergence alone is judged by it, and fails by it."""
    status, out = judged(KL)
    assert status == 0 and re.search(r"^ +kl +1 held", out, re.MULTILINE), out
    assert "6 absent (Diffusion.q_sample)" in out, out
    assert re.search(r"mine.py in float64: \d+ absent, 1 held\n$", out), out
    status, out = judged(KL.replace("m - n", "m + n"))
    assert status == 1 and "FAILS kl" in out


def test_a_network_in_another_order_is_filled_by_role(judged):
    """conv_in at the end: absent, until weights_by_role names it; then its output is judged."""
    first = "        self.conv_in = conv(in_channels, ch)\n"
    last = "        self.norm_out = norm(groups, c)\n"
    moved = changed(first, "").replace(last, last + first)
    assert "1 absent (weights_by_role" in judged(moved, "float64", "network", "kl")[1]
    roles = [*json.loads((FOLDER / "network.json").read_text())["cases"][0]["given"]["weights"]]
    by_role = f"""
def weights_by_role(net):
    last = [net.conv_in.weight, net.conv_in.bias]
    rest = [p for p in net.parameters() if all(p is not q for q in last)]
    return dict(zip({roles}, [*rest[:4], *last, *rest[4:]]))
"""
    status, out = judged(moved + by_role, "float64", "network")
    assert status == 0 and "1 held" in out, out


@pytest.mark.parametrize("source, words", [
    ("x = 1\n", "has none of the names that are judged"),
    ("import sys\nsys.exit()\n", "cannot be loaded: SystemExit"),
    ("def f(:\n", "cannot be loaded: SyntaxError"),
], ids=["no name", "an exit", "no Python"])  # fmt: skip
def test_a_file_that_cannot_be_judged_is_refused_in_one_line(judged, source, words):
    status, out = judged(source, "float64", "kl")
    assert status == 2 and words in out.splitlines()[-1] and not re.search("Traceback", out)


def test_the_lines_for_JAX_check_eq7(monkeypatch, capsys):
    """README's lines, with NumPy in JAX's place: they hold, and they fail where a root is missing."""
    jax = types.ModuleType("jax")
    jax.numpy = np
    monkeypatch.setitem(sys.modules, "jax", jax)
    monkeypatch.setitem(sys.modules, "jax.numpy", np)
    monkeypatch.chdir(ROOT)
    (block,) = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    exec(block, {})
    assert capsys.readouterr().out == "6 cases of eq. 7 hold\n"
    with pytest.raises(AssertionError, match="T = 2"):
        exec(block.replace("np.sqrt(alpha_bar[t - 1]) * beta", "alpha_bar[t - 1] * beta"), {})

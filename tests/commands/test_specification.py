"""The specification's own code: which files it tests, how it finds names, and its output."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import checks
import pytest
import summary
import tested
import torch
from hypothesis import given
from hypothesis import strategies as st
from rewrites import EQUAL, UNEQUAL
from running import ROOT

FOLDER = ROOT / "tests" / "specification"
SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in ("ddpm", "likelihood", "improved")}
SOURCE = SOURCES["ddpm"]


def run(folder, *flags):
    """Return (exit status, output) of the specification, started in another folder."""
    command = [sys.executable, "-m", "pytest", FOLDER, "-q", *map(str, flags)]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=400)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return a function that loads sources as the tested files until the end of the test."""
    for name in SOURCES:
        monkeypatch.setitem(sys.modules, name, sys.modules[name])
    monkeypatch.setattr(tested, "MODULES", {})

    def load(sources):
        for name, source in sources.items():
            path = tmp_path / f"{name}_tested.py"
            path.write_text(source)
            tested.load(path, name)

    return load


@pytest.fixture
def run_here(load):
    """Return a function that tests sources with some tests of the specification, in this process."""

    def run_here(sources, tests):
        load({**SOURCES, **sources})
        for file, test, *arguments in tests:
            function = getattr(importlib.import_module(file), test)
            try:
                function(*arguments)
            except pytest.skip.Exception as skipped:
                pytest.fail(f"{test} is skipped: {skipped}")

    return run_here


# --- Equal files, and files that are not -----------------------------------------------------------


@pytest.mark.parametrize("name", EQUAL)
def test_a_rewrite_is_accepted_that_is_equal_in_mathematics_or_a_matter_of_taste(name, run_here):
    """Tests of the specification once rejected each of them."""
    file, code, tests = EQUAL[name]
    run_here({file: SOURCES[file] + code}, tests)


@pytest.mark.parametrize("name", UNEQUAL)
def test_a_rewrite_that_is_not_equal_is_rejected(name, run_here):
    """Each of the given tests rejects it. Float32 tables break the rule of precision."""
    code, words, tests = UNEQUAL[name]
    for test in tests:
        with pytest.raises((AssertionError, TypeError)) as failure:
            run_here({"ddpm": SOURCE + code}, [test])
        error = summary.first(failure.value)
        assert words in str(error)
        if words.startswith("float32"):
            assert error.rule == "precision"


# --- Seeds -----------------------------------------------------------------------------------------


@given(st.integers(0, 2**33), st.integers(0, 999), st.integers(0, 999))
def test_seeds_of_the_tests_generators_and_of_the_global_one_never_coincide(seed, i, k):
    """For any --hypothesis-seed they differ in the 32 bits that torch uses, and so do two numbers."""
    before = checks.SEED
    try:
        checks.SEED = seed
        checks.seed(i)
        mine = checks.generator(k).initial_seed() % 2**32
        every = torch.initial_seed() % 2**32
        assert mine < 2**31 <= every
        if i != k:
            assert checks.generator(i).initial_seed() != checks.generator(k).initial_seed()
    finally:
        checks.SEED = before


def test_the_specification_seeds_generators_in_one_place():
    """No test calls torch.manual_seed or torch.Generator itself."""
    calls = []
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if path.name != "checks.py" and name in ("torch.manual_seed", "torch.Generator"):
                calls.append(f"{path.name}:{node.lineno}: {name}")
    assert not calls, "\n".join(calls)


def test_no_failure_is_without_a_message():
    """The specification contains no `assert False`."""
    found = []
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assert) and ast.unparse(node.test) == "False":
                found.append(f"{path.name}:{node.lineno}")
    assert not found, "\n".join(found)


# --- Names and output ------------------------------------------------------------------------------


def test_other_files_are_tested_from_any_folder(tmp_path):
    """A sampler with sigma^2 z instead of sigma z fails, and so does a hybrid loss that does not detach eps.

    The output names the tests, the tested files and the names that are not in the specification.
    """
    wrong = SOURCE.replace("at(sigma2.sqrt(), t, xt)", "at(sigma2, t, xt)")
    assert wrong != SOURCE
    (tmp_path / "mine.py").write_text(wrong + "\n\ndef v_from_eps():\n    pass\n")
    learned = SOURCES["improved"].replace("eps_theta.detach()", "eps_theta")
    assert learned != SOURCES["improved"]
    (tmp_path / "more.py").write_text(learned)
    files = ("--ddpm", "mine.py", "--improved", "more.py", "--likelihood", ROOT / "likelihood.py")
    status, output = run(tmp_path, *files, "-k", "takes_each_step or eps_learns")
    assert status == 1, output
    assert "test_algorithm2_takes_each_step_from_p" in output
    assert re.search("variance of x_.*: estimated", output), output
    assert re.search(r"^improved .* formula \d+; may follow from ancestral$", output, re.MULTILINE)
    assert f"tested: {tmp_path / 'mine.py'}" in output
    assert f"tested: {tmp_path / 'more.py'}" in output
    assert "not in the specification: v_from_eps" in output


def test_tests_for_missing_names_are_skipped_and_counted_and_similar_names_are_shown(tmp_path):
    """A file with two methods, one of them misspelt."""
    begun = SOURCE[: SOURCE.index("    def x0_from_eps")].replace("def q_sample", "def qsample")
    (tmp_path / "mine.py").write_text(begun)
    flags = ("--only", "forward,posterior", "-rs", "--hypothesis-profile=quick")
    status, output = run(tmp_path, "--ddpm", "mine.py", *flags)
    assert status == 0, output
    assert "absent: Diffusion.q_sample" in output
    table = {}
    for line in output.splitlines():
        if line.startswith(("forward ", "posterior ")):
            name, *numbers = line.split()
            table[name] = [int(n) for n in numbers]
    assert table["posterior"][1:] == [0, 0] and table["forward"][1] == 0
    assert table["posterior"][0] > 10 and table["forward"][2] > 8
    assert "Diffusion.q_sample (did you mean Diffusion.qsample?)" in output
    assert "not found: improved.py" in output and "not found: likelihood.py" in output


def test_a_float32_file_breaks_the_rule_of_precision_and_passes_with_its_own_tolerances(tmp_path):
    """Float32 tables are rejected in float64, and accepted with --precision float32."""
    float32 = """
construct = Diffusion.__init__
def rounded(self, beta):
    construct(self, beta)
    self.beta = self.beta.float()
    self.alpha = 1 - self.beta
    self.alpha_bar = self.alpha.cumprod(0)
    alpha_bar_s = self.alpha_bar.roll(1)
    self.beta_tilde = self.beta * (1 - alpha_bar_s) / (1 - self.alpha_bar)
Diffusion.__init__ = rounded
"""
    (tmp_path / "mine.py").write_text(SOURCE + float32)
    flags = ("--only", "forward,posterior", "--hypothesis-profile=quick", "--tb=line")
    status, output = run(tmp_path, "--ddpm", "mine.py", *flags)
    rows = [line for line in output.splitlines() if line.startswith(("forward ", "posterior "))]
    assert status == 1 and all("precision" in row for row in rows), output
    assert "posterior" in rows[1] and "may follow from forward" in rows[1]
    assert "the size of float32's rounding" in output and "broken rule: precision" in output
    status, output = run(tmp_path, "--ddpm", "mine.py", *flags, "--precision", "float32")
    assert status == 0, output


def test_a_network_whose_weights_are_not_found_needs_a_map(tmp_path, run_here, monkeypatch):
    """An attention that computes its keys first fails, until weights_by_role(net) names its weights."""
    keys_first = """
class Keys(Attention):
    def forward(self, x):
        h = self.norm(x)
        k, q, v = (f(h).flatten(2).mT[:, None] for f in (self.k, self.q, self.v))
        return x + self.out(F.scaled_dot_product_attention(q, k, v)[:, 0].mT.reshape(x.shape))
Attention = Keys
"""
    name = "test_attention_is_softmax_of_qk_over_sqrt_c_times_v_over_the_pixels"
    test = ("test_8_network", name, 1.0)
    with pytest.raises(AssertionError, match="weights_by_role"):
        run_here({"ddpm": SOURCE + keys_first}, [test])
    mapping = "def weights_by_role(block):\n    return dict(block.named_parameters())\n"
    (tmp_path / "map.py").write_text(mapping)
    (tmp_path / "mine.py").write_text(SOURCE + keys_first)
    status, output = run(tmp_path, "--ddpm", "mine.py", "--map", "map.py", "-k", name)
    assert status == 0 and re.search(r"^[1-9]\d* passed", output, re.MULTILINE), output
    monkeypatch.setattr(tested, "ROLES", lambda block: {})
    with pytest.raises(AssertionError, match=r"norm\.weight, norm\.bias, q\.weight"):
        run_here({"ddpm": SOURCE + keys_first}, [test])


def test_a_file_may_import_its_names(tmp_path, monkeypatch, load):
    """Names from another module count."""
    (tmp_path / "whole.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    load({"ddpm": "from whole import *\n"})
    found, _ = tested.find("ddpm", "UNet")
    assert found.__module__ == "whole" and tested.beyond("ddpm") == []


def test_a_file_that_lacks_a_name_that_it_uses_itself_fails(run_here):
    """Only the tests' own use of a missing name skips the test."""
    with pytest.raises(AttributeError, match="p_mean"):
        run_here(
            {"ddpm": SOURCE.replace("def p_mean", "def mean")},
            [("test_6_ancestral", "test_sampling_clips_x0_by_default")],
        )


def test_only_a_raise_statement_counts_as_not_implemented(tmp_path):
    """Torch raises NotImplementedError too, for example for a meta tensor. That is a failure."""
    for code, result in (("raise NotImplementedError('no copy')", "1 skipped"),
                         ("torch.zeros(1, device='meta').cpu()", "1 failed")):  # fmt: skip
        source = SOURCE + f"\n\ndef linear_schedule(*_):\n    {code}\n"
        (tmp_path / "mine.py").write_text(source)
        flags = ("--only", "schedules", "-k", "papers_by_default")
        _, output = run(tmp_path, "--ddpm", "mine.py", *flags)
        assert result in output, output


def test_an_option_that_a_function_lacks_skips_the_test(run_here):
    """A sampler without `start` is not tested there."""
    without = """
complete = sample_ancestral
def sample_ancestral(model, d, xt, sigma2=None, *, clip=True, noise=torch.randn_like, on_step=None):
    return complete(model, d, xt, sigma2, clip=clip, noise=noise, on_step=on_step)
"""
    name = "sample_ancestral from t = 2"
    test = ("test_contract", "test_results_share_no_memory", name)
    with pytest.raises(pytest.fail.Exception, match=r"absent: ddpm.sample_ancestral\(.., start"):
        run_here({"ddpm": SOURCE + without}, [test])


@pytest.mark.parametrize("source, words", [
    ("import sys; sys.exit('no')", "cannot be imported: SystemExit"),
    ("import nothing_of_this_name", "cannot be imported: ModuleNotFoundError"),
    ("def linear_schedule(:", "cannot be imported: SyntaxError"),
    ("def train():\n    pass", "contains no tested name (its names: train); tested names: linear_schedule"),
], ids=["an exit", "a failing import", "no Python", "another file"])  # fmt: skip
def test_a_file_that_cannot_be_tested_is_rejected_in_one_line(tmp_path, load, source, words):
    with pytest.raises(pytest.UsageError) as error:
        load({"ddpm": source})
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_section_is_rejected_with_the_list_of_sections(tmp_path):
    """--only forwrd: did you mean forward?"""
    status, output = run(tmp_path, "--only", "posterior,forwrd")
    assert status == 4, output
    assert "--only forwrd: no such section (did you mean forward?); choose from" in output
    assert all(name in output for name in summary.BUILDS_ON)
    assert summary.chosen("posterior, ddim") == ["posterior", "ddim"]


def test_every_test_file_of_the_specification_is_a_section():
    """So the table at the end contains all of them."""
    files = {summary.section(pathlib.Path(path)) for path in FOLDER.glob("test_*.py")}
    assert files == set(summary.BUILDS_ON)

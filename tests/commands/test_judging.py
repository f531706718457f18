"""The judging itself: which files are judged, by what, and what is said of them."""

import importlib
import re
import subprocess
import sys

import closing
import judge
import judged
import pytest
import torch
from rewrites import EQUAL, UNEQUAL
from running import ROOT

SOURCE = (ROOT / "ddpm.py").read_text()
IMPROVED = (ROOT / "improved.py").read_text()


def judge_files(folder, *flags):
    """(exit status, what is said) of the specification, judging files of a folder from there."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        ROOT / "tests" / "specification",
        "-q",
        *map(str, flags),
    ]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=200)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def judge_here(tmp_path, monkeypatch):
    """Judges the source of a ddpm.py by tests of the specification, inside this process."""

    def run(source, tests):
        (tmp_path / "mine.py").write_text(source)
        monkeypatch.setitem(sys.modules, "ddpm", sys.modules["ddpm"])
        module = judged.load(tmp_path / "mine.py")
        files = [
            importlib.import_module(name)
            for name in sorted({file for file, *_ in tests} | {"test_6_ancestral"})
        ]
        for file in files:
            monkeypatch.setattr(file, "ddpm", module)
        for file, test, *arguments in tests:
            try:
                getattr(sys.modules[file], test)(*arguments)
            except pytest.skip.Exception as skipped:
                pytest.fail(f"{test} is skipped: {skipped}")

    return run


# --- What is equal, and what is not --------------------------------------------------------------


@pytest.mark.parametrize("name", EQUAL)
def test_a_rewrite_is_accepted_that_is_equal_in_mathematics_or_a_matter_of_taste(name, judge_here):
    """Each was rejected once, by the tests that judge it here."""
    code, tests = EQUAL[name]
    judge_here(SOURCE + code, tests)


@pytest.mark.parametrize("name", UNEQUAL)
def test_a_rewrite_is_rejected_that_loses_precision_or_needs_a_device_with_float64(
    name, judge_here
):
    """By each of the tests that are named, and float32 tables in these words."""
    code, words, tests = UNEQUAL[name]
    for test in tests:
        with pytest.raises((AssertionError, TypeError)) as failure:
            judge_here(SOURCE + code, [test])
        assert words in str(closing.first(failure.value))
        if words.startswith("float32"):
            assert closing.first(failure.value).rule == "precision"


def test_the_draws_of_a_test_are_never_those_of_the_global_generator():
    """A sampler that draws globally must not get z = xT, whatever --hypothesis-seed says."""
    before = judge.SEED
    try:
        for judge.SEED in (0, 1, 2, 28, 2_000_001, 2**31, 2**32 - 1):
            judge.seed()
            drawn = torch.randn(4)
            assert not any(
                torch.equal(torch.randn(4, generator=judge.generator(k)), drawn)
                for k in range(1000)
            )
    finally:
        judge.SEED = before


# --- What is there, and what is said -------------------------------------------------------------


def test_other_files_are_judged_from_any_folder_by_the_names_of_their_equations(tmp_path):
    """sigma^2 z where sigma z is meant fails a test of Algorithm 2, with the variance in words, and a
    mean that is not detached one of iDDPM eq. 16; at the end stands which files were judged, and which
    of their names were not."""
    wrong = SOURCE.replace(
        "at(sigma2.sqrt(), t, xt) * noise_like", "at(sigma2, t, xt) * noise_like"
    )
    (tmp_path / "mine.py").write_text(wrong + "\n\ndef v_from_eps():\n    pass\n")
    (tmp_path / "more.py").write_text(IMPROVED.replace("eps_theta.detach()", "eps_theta"))
    status, said = judge_files(tmp_path, "--ddpm", "mine.py", "--improved", "more.py",
                               "-k", "takes_each_step or learns_from")  # fmt: skip
    assert status == 1 and "FAILED" in said, said
    assert "test_algorithm2_takes_each_step_from_p" in said
    assert "AssertionError: variance of x_1: estimated" in said
    assert "test_iddpm_eq16_eps_learns_from_L_simple_alone[0.001]" in said
    assert re.search(r"^improved .* formula \d; may follow from ancestral$", said, re.MULTILINE), (
        said
    )
    assert f"judged: {tmp_path / 'mine.py'}" in said and f"judged: {tmp_path / 'more.py'}" in said
    assert "beyond the specification, not judged: v_from_eps" in said


def test_what_is_absent_is_skipped_and_counted_and_a_near_name_is_offered(tmp_path):
    """A file of two methods, one of them misspelt: what can be judged is, and nothing else is asked for."""
    begun = SOURCE[: SOURCE.index("    def x0_from_eps")].replace("def q_sample", "def qsample")
    (tmp_path / "mine.py").write_text(begun)
    status, said = judge_files(tmp_path, "--ddpm", "mine.py", "--only", "forward,posterior", "-rs",
                               "--hypothesis-profile=quick")  # fmt: skip
    assert status == 0, said
    assert "absent: ddpm.Diffusion.q_sample" in said
    table = {
        line.split()[0]: line.split()[1:]
        for line in said.splitlines()
        if line.startswith(("forward ", "posterior "))
    }
    assert (
        table["posterior"] == ["15", "0", "0"]
        and table["forward"][1] == "0"
        and int(table["forward"][2]) > 10
    )
    assert "Diffusion.q_sample (did you mean Diffusion.qsample?)" in said
    assert "not judged: improved.py, which is not there" in said


def test_a_float32_file_breaks_the_rule_of_precision_and_is_judged_by_its_own(tmp_path):
    """Tables in float32 throughout: rejected as such in float64, accepted with --precision float32."""
    float32 = """
construct = Diffusion.__init__
def rounded(self, beta):
    construct(self, beta)
    self.beta = self.beta.float()
    self.alpha = 1 - self.beta
    self.alpha_bar = self.alpha.cumprod(0)
    ab, ab_s = self.alpha_bar, self.alpha_bar.roll(1)
    self.beta_tilde = self.beta * (1 - ab_s) / (1 - ab)
Diffusion.__init__ = rounded
"""
    (tmp_path / "mine.py").write_text(SOURCE + float32)
    asked = (
        "--ddpm",
        "mine.py",
        "--only",
        "forward,posterior",
        "--hypothesis-profile=quick",
        "--tb=line",
    )
    status, said = judge_files(tmp_path, *asked)
    rows = [line for line in said.splitlines() if line.startswith(("forward ", "posterior "))]
    assert status == 1 and all("precision" in row for row in rows), said
    assert "posterior" in rows[1] and "may follow from forward" in rows[1]
    assert "the size of float32's rounding" in said and "rule broken: precision" in said
    status, said = judge_files(tmp_path, *asked, "--precision", "float32")
    assert status == 0, said


def test_a_network_whose_weights_cannot_be_told_apart_says_so_and_is_judged_by_a_map(
    tmp_path, judge_here, monkeypatch
):
    """An attention that asks for its keys first: they are taken for the queries, until weights_by_role(net)
    says which is which."""
    keys_first = """
class Keys(Attention):
    def forward(self, x):
        h = self.norm(x)
        k, q, v = (f(h).flatten(2).mT[:, None] for f in (self.k, self.q, self.v))
        return x + self.out(F.scaled_dot_product_attention(q, k, v)[:, 0].mT.reshape(x.shape))
Attention = Keys
"""
    test = "test_9_network", "test_attention_is_softmax_of_qk_over_sqrt_c_times_v_over_the_pixels"
    with pytest.raises(AssertionError, match="give them by role: weights_by_role"):
        judge_here(SOURCE + keys_first, [test])
    (tmp_path / "map.py").write_text(
        "def weights_by_role(block):\n    return dict(block.named_parameters())\n"
    )
    (tmp_path / "mine.py").write_text(SOURCE + keys_first)
    status, said = judge_files(tmp_path, "--ddpm", "mine.py", "--map", "map.py", "-k", test[1])
    assert status == 0 and "1 passed" in said, said
    monkeypatch.setattr(judged, "ROLES", lambda block: {})
    with pytest.raises(AssertionError, match=r"lacks norm\.weight, norm\.bias, q\.weight"):
        judge_here(SOURCE + keys_first, [test])


def test_a_file_may_import_what_it_does_not_define(tmp_path, monkeypatch):
    """Names that come from elsewhere count as there; sys.modules is put back."""
    (tmp_path / "mine.py").write_text("from whole import *\n")
    (tmp_path / "whole.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "ddpm", sys.modules["ddpm"])
    module = judged.load(tmp_path / "mine.py")
    assert module.UNet.__module__ == "whole" and judged.beyond(module, "ddpm") == []


def test_a_file_that_uses_what_it_lacks_fails_and_is_not_absent(judge_here):
    """Only a test that asks for an absent name is skipped: a file's own slip stays an error."""
    with pytest.raises(AttributeError, match="p_mean"):
        judge_here(
            SOURCE.replace("def p_mean", "def mean"),
            [("test_6_ancestral", "test_sampling_clips_x0_by_default")],
        )


@pytest.mark.parametrize("source, words", [
    ("import sys; sys.exit('no')", "cannot be imported: SystemExit"),
    ("import nothing_of_this_name", "cannot be imported: ModuleNotFoundError"),
    ("def linear_schedule(:", "cannot be imported: SyntaxError"),
    ("def train():\n    pass", "none of the names that are judged is there (train); judged are Attention, "),
], ids=["an exit", "a failing import", "no Python", "another file"])  # fmt: skip
def test_a_file_that_cannot_be_judged_is_refused_in_one_line(tmp_path, source, words):
    """One message, not a cascade of failures."""
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(pytest.UsageError) as refusal:
        judged.load(tmp_path / "mine.py")
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_section_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    """--only forwrd: did you mean forward? By the command, in one line."""
    status, said = judge_files(tmp_path, "--only", "posterior,forwrd")
    assert (
        status == 4 and "--only forwrd: no such section (did you mean forward?); there are" in said
    )
    assert all(name in said for name in closing.BUILDS_ON)
    assert closing.chosen("posterior, ddim") == ["posterior", "ddim"]


def test_every_file_of_the_specification_is_a_section():
    """The closing table leaves none out."""
    files = {closing.section(path) for path in (ROOT / "tests" / "specification").glob("test_*.py")}
    assert files == set(closing.BUILDS_ON)

"""How the house is kept: the file that is read, and the independence of what it is judged by."""

import ast
import re
import subprocess
import sys

import pytest

import conftest
from conftest import ROOT

SOURCE = (ROOT / "ddpm.py").read_text()
REFERENCE = (ROOT / "reference_numpy.py").read_text()
TESTS = "\n".join(p.read_text() for p in sorted(ROOT.glob("tests/test_[1-9]*.py")))


def imports(source):
    """The packages that a file imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def definitions(source):
    """(name, node) of each function and class with a name of its own, methods with their class's."""
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, node
        if isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{m.name}", m) for m in node.body if isinstance(m, ast.FunctionDef))


def test_ddpm_is_read_in_a_sitting():
    """At most 340 lines of at most 100 columns, comments and docstrings counted."""
    lines = SOURCE.splitlines()
    assert len(lines) <= 340, f"{len(lines)} lines"
    assert not [i for i, line in enumerate(lines, 1) if len(line) > 100]


def test_ddpm_functions_are_at_most_30_lines():
    """One function per algorithm; the network's constructor is the one exception."""
    long = {name: node.end_lineno - node.lineno + 1 for name, node in definitions(SOURCE)
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 30}
    assert set(long) <= {"UNet.__init__"}, long


def test_ddpm_imports_torch_and_math_only():
    assert set(imports(SOURCE)) == {"torch", "math"}


def test_importing_ddpm_does_nothing_else():
    """Definitions only: no statement that runs, reads flags, or draws."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    body = ast.parse(SOURCE).body
    assert isinstance(body[0], ast.Expr) and all(isinstance(node, allowed) for node in body[1:])


def test_the_reference_imports_neither_torch_nor_ddpm():
    assert set(imports(REFERENCE)) <= {"numpy", "scipy", "fractions", "decimal", "math"}
    assert "torch" not in REFERENCE


def formulas(source):
    """Every arithmetic expression of a file with at least four operations, as text without spaces."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp):
            operations = sum(isinstance(n, (ast.BinOp, ast.Call, ast.UnaryOp)) for n in ast.walk(node))
            if operations >= 4:
                yield re.sub(r"\b(np|torch|math|self|d)\.|\s", "", ast.unparse(node))


def test_the_reference_shares_no_formula_with_ddpm():
    """Not one expression of four operations or more stands in both files: other derivations."""
    shared = set(formulas(SOURCE)) & set(formulas(REFERENCE))
    assert not shared, shared
    assert len(set(formulas(SOURCE))) > 30 and len(set(formulas(REFERENCE))) > 30


EQUATION = r"(?:i?DDI?P?M )?eq\. \d+|Algorithm \d"
MAP = re.findall(r"^    \d  .{22}(.{30})", SOURCE, re.MULTILINE)
EQUATIONS = [equation for line in MAP for equation in re.findall(EQUATION, line)]


def headed(docstring):
    """The equations before the colon of a docstring's first line, if it begins with one."""
    head = (docstring or "").split(":")[0]
    return re.findall(EQUATION, head) if re.match(EQUATION, head) else []


@pytest.mark.parametrize("equation", EQUATIONS)
def test_each_equation_of_the_map_heads_one_docstring_and_is_tested_by_name(equation):
    """The map at the top of ddpm.py is true: eq. 7, say, heads one docstring and is in a test's name."""
    heads = [name for name, node in definitions(SOURCE) if equation in headed(ast.get_docstring(node))]
    assert len(heads) == 1, heads
    word = equation.lower().replace("eq. ", "eq").replace("algorithm ", "algorithm").replace(" ", "_")
    assert re.search(rf"def test_\w*{word}_", TESTS), f"no test is named for {word}"


def test_the_map_has_nine_sections_and_twelve_equations():
    assert len(MAP) == 9 and len(EQUATIONS) == 12, (MAP, EQUATIONS)


def test_every_public_name_has_a_docstring():
    """Except helpers of a line or two, and forward(), which its class explains."""
    bare = [name for name, node in definitions(SOURCE)
            if not ast.get_docstring(node) and "." not in name and name not in ("conv", "norm")]
    assert not bare, bare


# --- The specification, of another file ----------------------------------------------------------


def test_another_file_is_judged_from_any_folder_by_the_names_of_its_equations(tmp_path):
    """sigma^2 z where sigma z is meant fails a test of Algorithm 2, with the variance in words; at the
    end stands which file was judged, and which of its names were not."""
    wrong = SOURCE.replace("at(sigma2.sqrt(), t, xt) * noise_like", "at(sigma2, t, xt) * noise_like")
    (tmp_path / "mine.py").write_text(wrong + "\n\ndef v_from_eps():\n    pass\n")
    command = [sys.executable, "-m", "pytest", ROOT / "tests", "--ddpm", "mine.py", "-qxk", "takes_each_step"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=100)
    assert done.returncode == 1 and "FAILED" in done.stdout, done.stdout + done.stderr
    assert "test_algorithm2_takes_each_step_from_p" in done.stdout
    assert "AssertionError: variance of x_1: estimated" in done.stdout
    assert f"judged: {tmp_path / 'mine.py'}" in done.stdout
    assert "beyond the specification, not judged: v_from_eps" in done.stdout


def test_a_file_may_import_what_it_does_not_define(tmp_path, monkeypatch):
    """Names that come from elsewhere count as there; sys.modules is put back."""
    (tmp_path / "mine.py").write_text("from whole import *\n")
    (tmp_path / "whole.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "ddpm", sys.modules["ddpm"])
    module, beyond = conftest.load(tmp_path / "mine.py")
    assert module.UNet.__module__ == "whole" and beyond == []


@pytest.mark.parametrize("source, words", [
    ("import sys; sys.exit('no')", "cannot be imported: SystemExit"),
    (SOURCE.replace("def normal_kl", "def kl"), "missing: normal_kl"),
    (SOURCE.replace("class UNet", "class Net"), "missing: UNet"),
    (SOURCE.replace("def p_mean", "def mean"), "missing: Diffusion.p_mean"),
    ("import nothing_of_this_name", "cannot be imported: ModuleNotFoundError"),
    ("def linear_schedule(:", "cannot be imported: SyntaxError"),
], ids=["an exit", "no function", "no class", "no method", "a failing import", "no Python"])  # fmt: skip
def test_a_file_that_cannot_be_judged_is_refused_in_one_line(tmp_path, source, words):
    """One message, not a cascade of failures."""
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(pytest.UsageError) as refusal:
        conftest.load(tmp_path / "mine.py")
    assert words in str(refusal.value) and "\n" not in str(refusal.value)

"""How the house is kept: the files that are read, and the independence of what they are judged by."""

import ast
import re
import subprocess
import sys

import pytest
from running import ROOT

SOURCE = (ROOT / "ddpm.py").read_text()
IMPROVED = (ROOT / "improved.py").read_text()
REFERENCE = (ROOT / "reference_numpy.py").read_text()
TESTS = "\n".join(p.read_text() for p in sorted(ROOT.glob("tests/specification/test_[1-9i]*.py")))
both = pytest.mark.parametrize("source", [SOURCE, IMPROVED], ids=["ddpm.py", "improved.py"])


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
            yield from (
                (f"{node.name}.{m.name}", m) for m in node.body if isinstance(m, ast.FunctionDef)
            )


def test_ddpm_imports_torch_and_math_only_and_improved_imports_it():
    assert set(imports(SOURCE)) == {"torch", "math"}
    assert set(imports(IMPROVED)) == {"torch", "math", "ddpm"}


def test_improved_changes_nothing_in_ddpm():
    """It assigns to no name of ddpm.py's, and has none of its private names."""
    for node in ast.walk(ast.parse(IMPROVED)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "ddpm":
            assert isinstance(node.ctx, ast.Load) and not node.attr.startswith("_"), ast.unparse(
                node
            )
    assert "setattr" not in IMPROVED


def test_every_refusal_stands_under_python_O():
    """One process, in which assert does nothing, tries the specification's refusals."""
    tests = ROOT / "tests" / "specification" / "test_refusals.py"
    command = [
        sys.executable,
        "-O",
        "-m",
        "pytest",
        "-q",
        tests,
    ]  # slow once, while Python compiles torch
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@both
def test_importing_does_nothing_else(source):
    """Definitions only: no statement that runs, reads flags, or draws."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    body = ast.parse(source).body
    assert isinstance(body[0], ast.Expr) and all(isinstance(node, allowed) for node in body[1:])


def test_the_reference_imports_neither_torch_nor_ddpm():
    assert set(imports(REFERENCE)) <= {"numpy", "scipy", "fractions", "decimal", "math"}
    assert "torch" not in REFERENCE


def formulas(source):
    """Every arithmetic expression of a file with at least four operations, as text without spaces."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp):
            operations = sum(
                isinstance(n, (ast.BinOp, ast.Call, ast.UnaryOp)) for n in ast.walk(node)
            )
            if operations >= 4:
                yield re.sub(r"\b(np|torch|math|self|d)\.|\s", "", ast.unparse(node))


def test_the_reference_shares_no_formula_with_what_it_judges():
    """Not one expression of four operations or more stands in both files: other derivations."""
    shared = (set(formulas(SOURCE)) | set(formulas(IMPROVED))) & set(formulas(REFERENCE))
    assert not shared, shared
    assert len(set(formulas(SOURCE))) > 30 and len(set(formulas(REFERENCE))) > 30


EQUATION = r"(?:(?:i?DDI?P?M|CFG) )?(?:eq\. \d+|Algorithm \d)"
MAPS = {
    source: re.findall(r"^    \d  .{22}(.{30})", source, re.MULTILINE)
    for source in (SOURCE, IMPROVED)
}
EQUATIONS = [(equation, source) for source, lines in MAPS.items() for line in lines
             for equation in re.findall(EQUATION, line)]  # fmt: skip


def headed(docstring):
    """The equations before the colon of a docstring's first line, if it begins with one."""
    head = (docstring or "").split(":")[0]
    return re.findall(EQUATION, head) if re.match(EQUATION, head) else []


@pytest.mark.parametrize("equation, source", EQUATIONS, ids=[equation for equation, _ in EQUATIONS])
def test_each_equation_of_the_map_heads_one_docstring_and_is_tested_by_name(equation, source):
    """The map at the top of a file is true: eq. 7, say, heads one docstring and is in a test's name."""
    heads = [
        name for name, node in definitions(source) if equation in headed(ast.get_docstring(node))
    ]
    assert len(heads) == 1, heads
    word = (
        equation.lower().replace("eq. ", "eq").replace("algorithm ", "algorithm").replace(" ", "_")
    )
    assert re.search(rf"def test_\w*{word}_", TESTS), f"no test is named for {word}"


def test_the_maps_have_nine_and_five_sections_twelve_and_six_equations():
    assert [len(lines) for lines in MAPS.values()] == [9, 5], MAPS
    assert [sum(source == one for _, source in EQUATIONS) for one in MAPS] == [12, 6], EQUATIONS


COMMANDS = [ROOT / f"{name}.py" for name in ("train", "sample", "evaluate", "figures", "convert")]
ROOMS = sorted((ROOT / "support").rglob("*.py"))


@pytest.mark.parametrize("path", [ROOT / "ddpm.py", ROOT / "improved.py", *COMMANDS, *ROOMS],
                         ids=lambda path: str(path.relative_to(ROOT)))  # fmt: skip
def test_nothing_is_refused_by_an_assert(path):
    """It would be gone under python -O."""
    assert not [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]


def rooms_in(path):
    """The files of this project that a file of it imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        module = getattr(node, "module", None)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            stem = ROOT / name.replace(".", "/")
            yield from (
                file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file()
            )


def test_imports_run_downward_without_circles_and_none_reaches_a_command():
    """A room is finished when all that it imports is: an order of the rooms exists."""
    left = {path: set(rooms_in(path)) - {path} for path in COMMANDS + ROOMS}
    assert not set(COMMANDS) & set().union(*left.values()), "a command is imported"
    while left:
        ready = [path for path, below in left.items() if not below & set(left)]
        assert ready, f"a circle among {sorted(str(path.relative_to(ROOT)) for path in left)}"
        for path in ready:
            del left[path]


@both
def test_every_public_name_has_a_docstring(source):
    """Except helpers of a line or two, and forward(), which its class explains."""
    bare = [
        name
        for name, node in definitions(source)
        if not ast.get_docstring(node) and "." not in name and name not in ("conv", "norm")
    ]
    assert not bare, bare

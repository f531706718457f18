"""The structure of the project: which file imports which, and that the reference is independent."""

import ast
import re

import pytest
import torch
from running import ROOT

import ddpm

LIBRARY = {name: (ROOT / name).read_text() for name in ("ddpm.py", "likelihood.py", "improved.py")}
REFERENCE = (ROOT / "reference_numpy.py").read_text()
SPECIFICATION = sorted((ROOT / "tests" / "specification").glob("test_*.py"))
COMMANDS = [ROOT / f"{name}.py" for name in ("train", "sample", "evaluate", "figures", "convert")]
SUPPORT = sorted((ROOT / "support").rglob("*.py"))
each_library_file = pytest.mark.parametrize("name", LIBRARY)


def imported_modules(source):
    """The full names of the modules that a source imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(source):
    return {name.split(".")[0] for name in imported_modules(source)}


def test_ddpm_imports_only_torch_and_the_standard_library():
    assert packages(LIBRARY["ddpm.py"]) == {"torch", "math", "operator"}
    assert packages(LIBRARY["likelihood.py"]) == {"torch", "math", "ddpm"}
    assert packages(LIBRARY["improved.py"]) == {"torch", "operator", "ddpm", "likelihood"}


def test_the_reference_imports_only_numpy_scipy_and_math():
    assert packages(REFERENCE) <= {"math", "numpy", "scipy"}


def formulas(source):
    """Arithmetic expressions with at least four operations, as text without spaces and prefixes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp):
            operations = [n for n in ast.walk(node) if isinstance(n, (ast.BinOp, ast.Call))]
            if len(operations) >= 4:
                yield re.sub(r"\b(np|torch|math|self|d)\.|\s", "", ast.unparse(node))


def test_the_reference_shares_no_formula_with_the_files_that_it_checks():
    tested = set()
    for source in LIBRARY.values():
        tested |= set(formulas(source))
    shared = tested & set(formulas(REFERENCE))
    assert not shared, shared
    assert len(tested) > 20, "this test compares too few formulas"


@each_library_file
def test_importing_a_library_file_only_defines_names(name):
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    docstring, *body = ast.parse(LIBRARY[name]).body
    assert isinstance(docstring, ast.Expr)
    assert all(isinstance(node, allowed) for node in body)


def functions(source):
    """All functions and methods of a source."""
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]


EQUATION = r"(?:(?:iDDPM|DDIM|CFG) )?(?:eq\. \d+|Algorithm \d)"
# The equations named in the table at the top of each file.
MAPPED = []
for name, source in LIBRARY.items():
    for row in re.findall(r"^    \d  .*$", source, re.MULTILINE):
        MAPPED += [(name, equation) for equation in re.findall(EQUATION, row)]


@pytest.mark.parametrize("name, equation", MAPPED)
def test_each_equation_of_the_tables_is_in_a_docstring_and_in_the_name_of_a_test(name, equation):
    """For example, eq. 7 starts the docstring of posterior_mean and a test's name contains eq7."""
    docstrings = [ast.get_docstring(node) or "" for node in functions(LIBRARY[name])]
    starts = [text.split(":")[0] for text in docstrings if ":" in text]
    assert any(re.search(rf"{re.escape(equation)}(?!\d)", start) for start in starts)
    word = equation.lower().replace("eq. ", "eq").replace("algorithm ", "algorithm")
    word = word.replace(" ", "_")
    tests = "\n".join(path.read_text() for path in SPECIFICATION)
    assert re.search(rf"def test_\w*{word}_", tests), f"no test is named after {word}"


@each_library_file
def test_every_public_function_and_class_has_a_docstring(name):
    for node in ast.parse(LIBRARY[name]).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("path", [*COMMANDS, *SUPPORT], ids=lambda path: path.name)
def test_nothing_is_checked_by_an_assert_that_python_O_would_remove(path):
    statements = ast.walk(ast.parse(path.read_text()))
    assert not [node.lineno for node in statements if isinstance(node, ast.Assert)]


def imported_files(path):
    """The files of this project that a file imports."""
    found = set()
    for name in imported_modules(path.read_text()):
        stem = ROOT / name.replace(".", "/")
        for file in (stem.with_suffix(".py"), stem / "__init__.py"):
            if file.is_file() and file != path:
                found.add(file)
    return found


def test_imports_point_downward_and_no_file_imports_a_command():
    """Remove files whose imports are already removed; a cycle would remain."""
    left = {path: imported_files(path) for path in COMMANDS + SUPPORT}
    for path, below in left.items():
        assert not below & set(COMMANDS), f"{path.name} imports a command"
    while left:
        ready = [path for path, below in left.items() if not below & set(left)]
        assert ready, f"a cycle of imports among {sorted(path.name for path in left)}"
        for path in ready:
            del left[path]


def test_the_network_is_exported_for_every_batch_size():
    """A message that reads a size, even one that is never raised, would fix the size of the batch."""
    net = ddpm.UNet(ch=8, mult=(1, 2), blocks=1, attention=(1,), groups=4, num_classes=3).eval()
    sizes = {0: torch.export.Dim("B", min=2, max=64)}
    inputs = (torch.randn(4, 3, 8, 8), torch.tensor([1, 5, 9, 20]))
    exported = torch.export.export(net, inputs, dynamic_shapes=(sizes, sizes)).module()
    x = torch.randn(7, 3, 8, 8)
    t = torch.arange(1, 8)
    torch.testing.assert_close(exported(x, t), net(x, t))

"""tests/mutants.py: its catalogue fits the sources and the tests, and its format is read completely."""

import pytest
from mutants import CATALOGUE, problem_of, read_catalogue
from running import ROOT

TESTS = "".join(path.read_text() for path in ROOT.glob("tests/specification/test_*.py"))


@pytest.mark.parametrize("file", ["ddpm.py", "likelihood.py", "improved.py"])
def test_every_mutant_applies_and_names_an_existing_test(file):
    """The old text occurs exactly once in the file, and the result is valid Python."""
    problems = []
    for mutant in CATALOGUE:
        if mutant.file == file:
            problem = problem_of(mutant, ROOT)
            if f"def {mutant.test}(" not in TESTS:
                problem = problem or f"no test is called {mutant.test}"
            if problem:
                problems.append(f"{mutant}: {problem}")
    assert not problems, f"{len(problems)} mutants: " + "\n".join(problems)


def test_no_two_mutants_of_a_file_have_one_name_or_one_text():
    names = [(mutant.file, mutant.name) for mutant in CATALOGUE]
    texts = [(mutant.file, mutant.old, mutant.new) for mutant in CATALOGUE]
    for values in (names, texts):
        repeated = {value for value in values if values.count(value) > 1}
        assert not repeated, f"{len(repeated)} are repeated: {sorted(repeated)}"


def test_a_catalogue_is_read_completely():
    """A mutant has the old text above it, which may have several lines, and an expected exception."""
    text = """
# A comment.
=== ddpm.py

## 2. A section

- first line
-     second line
one mistake [a project]
+ new
> test_one
another mistake
+ newer
+
+ lines
> test_two ! ValueError
"""
    one, two = read_catalogue(text)
    assert (one.file, one.section, one.name) == (
        "ddpm.py",
        "2. A section",
        "one mistake [a project]",
    )
    assert one.old == two.old == "first line\n    second line"
    assert (one.new, two.new) == ("new", "newer\n\nlines")
    assert (one.test, one.crash) == ("test_one", "")
    assert (two.test, two.crash) == ("test_two", "ValueError")

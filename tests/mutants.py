"""Run the catalogue of mistakes in mutants.txt: each must be noticed by the test that it names.

    python tests/mutants.py              all mutants in parallel; exit status 1 if one survives
    python tests/mutants.py padding      mutants with this text in their file, section, name or source
    python tests/mutants.py --check      only check that each mutant applies and that its test exists
    python tests/mutants.py --search     search the whole specification for the test that notices

A mutant replaces one text of ddpm.py, likelihood.py or improved.py. It counts as killed only if its test
fails with a failed assertion, or with the exception that the catalogue names. A mutant that does not even
run is not killed.

The catalogue lists the mistakes by the lines that they change. "-" is the old text and "+" the new one. ">"
is the test, with "!" and the expected exception where the mistake leads to an exception. The source of a
mistake is in brackets: a public project, or "in print". Mistakes without a source are plausible ones.

pytest collects the specification once. Each mutant then runs in a forked child, which loads the mutated file
in place of the original.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import pathlib
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = ("ddpm.py", "likelihood.py", "improved.py")  # in the order in which they import each other
ASSERTIONS = ("AssertionError", "assert ", "Failed: DID NOT RAISE")
SECONDS = 300  # a mutant that takes longer is reported as hanging


@dataclass(frozen=True)
class Mutant:
    """One mistake: a text replacement and the test that must notice it."""

    file: str
    section: str
    name: str  # with the source in brackets
    old: str
    new: str
    test: str
    crash: str  # the type of the expected exception, if it is not a failed assertion

    def __str__(self):
        return f"{self.file}: {self.section}: {self.name}"


def read_catalogue(text):
    """Return the mutants of a catalogue in the format that the docstring above describes."""
    mutants = []
    file = ""
    section = ""
    name = ""
    old = []
    new = []
    last = ""
    for line in text.splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "===":
            file = rest
        elif kind == "##":
            section = rest
        elif kind == "-":
            if last != "-":
                old = []
            old.append(rest)
        elif kind == "+":
            new.append(rest)
        elif kind == ">":
            test, _, crash = rest.partition(" ! ")
            texts = "\n".join(old), "\n".join(new)
            mutants.append(Mutant(file, section, name, *texts, test.strip(" ?"), crash))
            new = []
        elif line and kind != "#":
            name = line
        last = kind
    return mutants


CATALOGUE = read_catalogue((ROOT / "tests" / "mutants.txt").read_text())


def problem_of(mutant, sources):
    """Return why a mutant does not apply, or an empty string."""
    source = (sources / mutant.file).read_text()
    if source.count(mutant.old) != 1:
        return f"the old text occurs {source.count(mutant.old)} times in {mutant.file}, not once"
    try:
        compile(source.replace(mutant.old, mutant.new), mutant.file, "exec")
    except SyntaxError as error:
        return f"the mutant is not valid Python: {error}"
    return ""


def section_file(mutant, sources):
    """Return the start of the name of the test file for the section that a mutant changes."""
    if mutant.file != "ddpm.py":
        return {"likelihood.py": "test_9", "improved.py": "test_improved"}[mutant.file]
    source = (sources / mutant.file).read_text()
    numbers = re.findall(r"# --- (\d)", source[: source.index(mutant.old)])
    return f"test_{numbers[-1] if numbers else 2}"


def in_parallel(function, items, processes=None):
    """Yield function(item) for each item. Each item is processed by a new child, forked from this process."""
    context = multiprocessing.get_context("fork")
    with context.Pool(processes, maxtasksperchild=1) as pool:
        yield from pool.imap(function, items)


def raise_timeout(number, frame):
    raise TimeoutError(f"not finished after {SECONDS} s")


class Runner:
    """A pytest plugin that runs the mutants instead of the collected tests."""

    def __init__(self, mutants, args):
        self.mutants = mutants
        self.args = args
        self.stdout = sys.stdout
        self.alive = 0
        self.failure = ""

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.failure:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failure = (crash.message if crash else str(report.longrepr)).strip()

    def pytest_runtestloop(self, session):
        self.config = session.config
        self.items = [item for item in session.items if item.path.stem != "test_0_reference"]
        global RUNNER
        RUNNER = self
        results = in_parallel(run_mutant, range(len(self.mutants)), self.args.processes)
        for mutant, (killed, message) in zip(self.mutants, results, strict=True):
            self.alive += not killed
            word = "killed" if killed else "ALIVE "
            text = f"{word} {mutant}\n       {message[:300]}"
            print(text, file=self.stdout, flush=True)
        return True  # do not run the tests themselves

    def run(self, number):
        """Return (killed, what happened) for one mutant."""
        import pytest

        mutant = self.mutants[number]
        signal.signal(signal.SIGALRM, raise_timeout)
        signal.alarm(10 * SECONDS if self.args.search else SECONDS)
        problem = problem_of(mutant, self.args.sources)
        if problem:
            return False, problem
        named = [item for item in self.items if item.originalname == mutant.test]
        if not self.args.search and not named:
            return False, f"no test is called {mutant.test or '?'}"
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            for file in FILES:
                (folder / file).write_text((self.args.sources / file).read_text())
            source = (folder / mutant.file).read_text()
            (folder / mutant.file).write_text(source.replace(mutant.old, mutant.new))
            try:
                self.load(folder)
            except pytest.UsageError as error:  # the mutant cannot be imported
                return False, str(error)
            if self.args.search:
                return self.search(mutant, named, folder)
            expected = (*ASSERTIONS, mutant.crash) if mutant.crash else ASSERTIONS
            message = f"SURVIVED {mutant.test}"
            for item in named:
                failure = self.run_test(item)
                if failure:
                    message = failure.splitlines()[0]
                if failure.startswith(expected):
                    return True, message
        return False, message

    def load(self, folder):
        """Make the files of a folder the tested files."""
        import tested

        self.config.tested = {}
        for file in FILES:
            name = file.removesuffix(".py")
            tested.load(folder / file, name)
            self.config.tested[name] = folder / file

    def run_test(self, item):
        """Return the message of a test's first failure, or an empty string."""
        self.failure = ""
        self.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        return self.failure

    def search(self, mutant, named, folder):
        """Run all tests until one fails with the mutant by an assertion, but not with the original."""
        first = section_file(mutant, self.args.sources)
        own = [item for item in self.items if item.path.stem.startswith(first)]
        general = [item for item in self.items if not item.path.stem[5].isdigit()]
        others = [item for item in self.items if item.path.stem[5].isdigit()]
        for item in [*named, *own, *general, *others]:
            if self.run_test(item).startswith(ASSERTIONS):
                message = self.failure.splitlines()[0]
                self.load(self.args.sources)
                if not self.run_test(item):
                    return True, f"{item.originalname}: {message}"
                self.load(folder)
        return False, "SURVIVED"


RUNNER = None  # the forked children inherit it


def run_mutant(number):
    return RUNNER.run(number)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", metavar="TEXT", nargs="*", help="only mutants with these texts")
    parser.add_argument("--check", action="store_true", help="only check that mutants apply")
    parser.add_argument("--search", action="store_true", help="search for a test that notices")
    parser.add_argument("--sources", type=pathlib.Path, default=ROOT, help="folder of ddpm.py")
    parser.add_argument("--tests", type=pathlib.Path, default=ROOT / "tests" / "specification")
    parser.add_argument("--processes", type=int, help="number of processes (default: all cores)")
    args = parser.parse_args()
    began = time.monotonic()
    chosen = [mutant for mutant in CATALOGUE if all(word in str(mutant) for word in args.words)]
    if not chosen:
        parser.error(f"no mutant contains {args.words}")
    if args.check:
        tests = "".join(path.read_text() for path in args.tests.glob("test_*.py"))
        problems = 0
        for mutant in chosen:
            problem = problem_of(mutant, args.sources)
            if f"def {mutant.test}(" not in tests:
                problem = problem or f"no test is called {mutant.test or '?'}"
            if problem:
                problems += 1
                print(f"{mutant}\n       {problem}")
        print(f"{len(chosen) - problems} of {len(chosen)} mutants apply and name an existing test")
        return 1 if problems else 0

    import pytest

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    runner = Runner(chosen, args)
    options = ["-q", "-s", "--hypothesis-profile=mutants", "-p", "no:warnings"]
    options += ["-p", "no:cacheprovider", f"--ddpm={args.sources.resolve()}/ddpm.py"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = pytest.main([*options, str(args.tests)], [runner])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        print(output.getvalue())
        return 1
    seconds = time.monotonic() - began
    print(f"\n{len(chosen) - runner.alive} of {len(chosen)} mutants killed, {seconds:.0f} s")
    return 1 if runner.alive else 0


if __name__ == "__main__":
    sys.exit(main())

"""Run the statistical tests of the specification with fresh seeds, and print how often each one fails.

    python tests/specification/seeds.py                       300 seeds, in about an hour on two idle cores
    python tests/specification/seeds.py --seeds 30 --jobs 2   fewer seeds, two processes at a time
    python tests/specification/seeds.py --all                 all tests, with fresh examples of Hypothesis
    python tests/specification/seeds.py -- --ddpm my_ddpm.py  another file; the rest goes to pytest

A test is statistical if it calls one of STATISTICS, directly or through a function of these files. Each
statistical assertion has a false-alarm rate of 5e-7 (checks.py), and each negative control must reject for every
seed, so a correct file is expected to have no failure at all. The exit status is 1 if there is one.
"""

import argparse
import ast
import collections
import concurrent.futures
import os
import pathlib
import subprocess
import sys
import time

FOLDER = pathlib.Path(__file__).resolve().parent
STATISTICS = {
    "has_mean", "has_normal_moments", "has_law", "is_uniform", "within", "has_share", "has_shares", "rejects",
}  # fmt: skip


def names_called(function):
    """Return the names of the functions and methods that a function calls or passes on."""
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    return names | {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}


def statistical_tests():
    """Return file::name of each statistical test."""
    calls = collections.defaultdict(set)
    tests = []
    for path in sorted(FOLDER.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                calls[node.name] |= names_called(node)
                if node.name.startswith("test_"):
                    tests.append((f"{path}::{node.name}", node.name))
    statistical = set(STATISTICS)
    while True:
        more = {name for name, called in calls.items() if called & statistical} - statistical
        if not more:
            return [place for place, name in tests if name in statistical]
        statistical |= more


def run(seed, tests, options):
    """Run the tests with one seed, and return the outcome of each: {file::name[case]: passed}."""
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=no", f"--hypothesis-seed={seed}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *options, *tests], cwd=FOLDER.parent.parent, env=environment, capture_output=True, text=True
    )  # fmt: skip
    outcomes = {}
    for line in result.stdout.splitlines():
        outcome, _, rest = line.partition(" ")
        if outcome in ("PASSED", "FAILED", "ERROR"):
            test = rest.split(" - ")[0].rpartition("/")[2]
            outcomes[test] = outcome == "PASSED"
    if not outcomes:
        raise SystemExit(f"seed {seed}: pytest ran no test:\n{result.stdout}{result.stderr}")
    return outcomes


def table(results):
    """Yield the lines of the table: one for each file, then one for each test that failed."""
    runs = collections.Counter()
    cases = collections.defaultdict(set)
    failures = collections.defaultdict(list)
    failed = collections.Counter()
    for seed, outcomes in sorted(results.items()):
        for test, passed in outcomes.items():
            file = test.partition("::")[0]
            runs[file] += 1
            cases[file].add(test)
            if not passed:
                failed[file] += 1
                failures[test].append(seed)
    yield f"{'file':<28} tests    runs  failures"
    for file in sorted(runs):
        yield f"{file:<28} {len(cases[file]):5} {runs[file]:7} {failed[file]:9}"
    yield f"{'all':<28} {sum(map(len, cases.values())):5} {runs.total():7} {failed.total():9}"
    for test, seeds in failures.items():
        yield f"{test}: failed for {len(seeds)} of {len(results)} seeds: {', '.join(map(str, seeds))}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=300, help="number of seeds (default: 300)")
    parser.add_argument("--first", type=int, default=1, help="first seed (default: 1)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--all", action="store_true", help="run the tests without statistics too")
    parser.add_argument("options", nargs="*", help="options of pytest, after --")
    given = parser.parse_args()
    tests = [str(FOLDER)] if given.all else statistical_tests()
    seeds = range(given.first, given.first + given.seeds)
    began = time.monotonic()
    results = {}
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        running = {pool.submit(run, seed, tests, given.options): seed for seed in seeds}
        for done in concurrent.futures.as_completed(running):
            seed = running[done]
            results[seed] = done.result()
            bad = [test for test, passed in results[seed].items() if not passed]
            print(
                f"seed {seed}: {len(bad)} failures {bad}" if bad else f"seed {seed}: passed",
                flush=True,
            )
    for line in table(results):
        print(line)
    print(f"{len(results)} seeds in {(time.monotonic() - began) / 60:.0f} minutes")
    return any(not passed for outcomes in results.values() for passed in outcomes.values())


if __name__ == "__main__":
    sys.exit(main())

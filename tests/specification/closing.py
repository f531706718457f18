"""Which sections are judged, and the table that closes a run: judged, failed, absent, by which rule."""

import collections
import pathlib
import re

import pytest
from judge import RULES
from judged import near

# Each section of the specification, by the name of its file, and those that it builds on.
BUILDS_ON = {
    "reference": (),
    "schedules": (),
    "forward": (),
    "posterior": ("forward",),
    "parametrisation": ("forward", "posterior"),
    "loss": ("forward",),
    "ancestral": ("forward", "posterior", "parametrisation"),
    "ddim": ("forward", "posterior", "parametrisation"),
    "bound": ("forward", "posterior", "parametrisation"),
    "network": (),
    "single_step": ("forward", "posterior", "parametrisation", "ancestral", "ddim", "bound"),
    "improved": ("forward", "posterior", "parametrisation", "ancestral", "bound"),
    "gradients": ("forward", "posterior", "parametrisation", "bound", "improved"),
    "randomness": (),
    "contract": (),
    "refusals": (),
}


def section(path):
    """ "posterior" of tests/specification/test_3_posterior.py."""
    return re.sub(r"test_(\d_)?", "", path.stem)


def chosen(only):
    """The sections that --only names, all of them where it names none."""
    names = [name.strip() for name in only.split(",")] if only else list(BUILDS_ON)
    for name in names:
        if name not in BUILDS_ON:
            raise pytest.UsageError(
                f"--only {name}: no such section{near(name, BUILDS_ON)}; there are {', '.join(BUILDS_ON)}"
            )
    return names


def first(error):
    """The error itself, or the first of those that Hypothesis found."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def rule_of(error, item):
    """Which of the RULES a failure breaks."""
    error = first(error)
    marked = [rule for rule in RULES if item.get_closest_marker(rule)]
    said = getattr(error, "rule", None)
    if said in ("precision", "refusal"):
        return said
    is_judgement = isinstance(error, (AssertionError, pytest.fail.Exception))
    return marked[0] if marked else said or ("formula" if is_judgement else "crash")


class Closing:
    """A pytest plugin: says of each failure which rule it breaks and what it may follow from, and counts."""

    def __init__(self):
        self.counts = collections.defaultdict(collections.Counter)

    def causes(self, name):
        """The sections with failures that a section builds on."""
        return [s for s in BUILDS_ON[name] if any(self.counts[s][rule] for rule in RULES)]

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self, pyfuncitem):
        """What a file says it does not implement is absent."""
        try:
            return (yield)
        except Exception as error:
            if isinstance(first(error), NotImplementedError):
                pytest.skip(f"absent: {first(error)}")
            raise

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        name, error = section(item.path), call.excinfo
        is_failure = error and name in BUILDS_ON and not error.errisinstance(pytest.skip.Exception)
        rule = rule_of(error.value, item) if is_failure else None
        if rule:
            words, causes = f"rule broken: {rule}", self.causes(name)
            if causes:
                words += f"; it may follow from what failed in {', '.join(causes)}: start there"
            error.value.add_note(words)
        report = yield
        report.rule = rule  # it goes with the report to the process that counts
        return report

    def pytest_runtest_logreport(self, report):
        name = section(pathlib.Path(report.location[0]))
        if name not in BUILDS_ON:
            return
        counts = self.counts[name]
        if report.rule:
            counts[report.rule] += 1
        if report.skipped and "absent: " in str(report.longrepr):
            counts["absent"] += 1
        elif report.when == "call" and not report.skipped:
            counts["judged"] += 1

    def lines(self):
        """The table, a line for each section of which something ran."""
        yield f"{'section':<16} judged  failed  absent  rules broken"
        for name in [name for name in BUILDS_ON if self.counts[name]]:
            counts = self.counts[name]
            rules = [f"{rule} {counts[rule]}" for rule in RULES if counts[rule]]
            follows = (
                f"; may follow from {', '.join(self.causes(name))}"
                if rules and self.causes(name)
                else ""
            )
            failed = sum(counts[rule] for rule in RULES)
            yield (
                f"{name:<16} {counts['judged']:6}  {failed:6}  {counts['absent']:6}  "
                f"{', '.join(rules)}{follows}"
            ).rstrip()

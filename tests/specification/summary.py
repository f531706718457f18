"""The sections, and the table at the end of a run: tests that ran, failed and were skipped, by section."""

import collections
import pathlib
import re
import traceback

import pytest
import torch
from checks import RULES
from tested import near

TORCH = pathlib.Path(torch.__file__).parent
# Each section is a file, test_N_SECTION.py or test_SECTION.py. The values are the sections that it builds on.
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
    "inputs": (),
    "rejections": (),
}


def section(path):
    """Return the section of a test file: "posterior" for tests/specification/test_3_posterior.py."""
    return re.sub(r"test_(\d_)?", "", path.stem)


def chosen(only):
    """Return the sections that --only names, or all sections."""
    names = [name.strip() for name in only.split(",")] if only else list(BUILDS_ON)
    for name in names:
        if name not in BUILDS_ON:
            every = ", ".join(BUILDS_ON)
            raise pytest.UsageError(
                f"--only {name}: no such section{near(name, BUILDS_ON)}; choose from {every}"
            )
    return names


def first(error):
    """Return the error itself, or the first of a group that Hypothesis found."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def is_absent(error):
    """Return True if a `raise` statement raised NotImplementedError. Torch raises it too, for other reasons."""
    if not isinstance(error, NotImplementedError):
        return False
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (place.line or "").startswith("raise") and TORCH not in pathlib.Path(
        place.filename
    ).parents


def rule_of(error, item):
    """Return the one of RULES that a failure breaks."""
    error = first(error)
    rule = getattr(error, "rule", None)
    if rule in ("precision", "rejection"):
        return rule
    for marked in RULES:
        if item.get_closest_marker(marked):
            return marked
    if rule:
        return rule
    is_assertion = isinstance(error, (AssertionError, pytest.fail.Exception))
    return "formula" if is_assertion else "crash"


class Summary:
    """A pytest plugin that adds the broken rule and possible causes to each failure, and counts."""

    def __init__(self):
        self.counts = collections.defaultdict(collections.Counter)

    def causes(self, name):
        """Return the sections with failures that a section builds on."""
        return [s for s in BUILDS_ON[name] if any(self.counts[s][rule] for rule in RULES)]

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self, pyfuncitem):
        """Skip a test in which the tested file raises NotImplementedError."""
        try:
            return (yield)
        except Exception as error:
            if is_absent(first(error)):
                pytest.skip(f"absent: {first(error)}")
            raise

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        name = section(item.path)
        error = call.excinfo
        rule = None
        if error and name in BUILDS_ON and not error.errisinstance(pytest.skip.Exception):
            rule = rule_of(error.value, item)
            causes = self.causes(name)
            note = f"broken rule: {rule}"
            if causes:
                note += f"; failures in {', '.join(causes)} may be the cause, so start there"
            error.value.add_note(note)
        report = yield
        report.rule = rule
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
            counts["ran"] += 1

    def lines(self):
        """Return the table: one line for each section with at least one test."""
        lines = [f"{'section':<16}    ran  failed  absent  broken rules"]
        for name in BUILDS_ON:
            counts = self.counts[name]
            if not counts:
                continue
            failed = sum(counts[rule] for rule in RULES)
            rules = ", ".join(f"{rule} {counts[rule]}" for rule in RULES if counts[rule])
            causes = ", ".join(self.causes(name))
            if rules and causes:
                rules += f"; may follow from {causes}"
            line = f"{name:<16} {counts['ran']:6}  {failed:6}  {counts['absent']:6}  {rules}"
            lines.append(line.rstrip())
        return lines

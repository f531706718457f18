"""Setup for all tests: the tested files, the precision, the sections, Hypothesis profiles and seeds."""

import os
import pathlib
import sys

import hypothesis
import pytest
import torch

TESTS = pathlib.Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS), str(TESTS / "specification")]

import checks  # noqa: E402
import far  # noqa: E402  before the first use of autograd, see there
import summary  # noqa: E402
import tested  # noqa: E402

torch.set_num_threads(1)  # the tensors are tiny, so a second thread only waits
FILES = ("ddpm", "likelihood", "improved")

# No deadline, because some machines are slow. "ci" tries the same examples each time, the others try new
# ones. "quick" tries a fifth of them, for slow implementations. "deep" tries fifty times as many.
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.register_profile("quick", deadline=None, derandomize=True, max_examples=20)
hypothesis.settings.register_profile("deep", deadline=None, max_examples=5000)
hypothesis.settings.register_profile(
    "mutants", deadline=None, derandomize=True, report_multiple_bugs=False,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)  # fmt: skip
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_addoption(parser):
    group = parser.getgroup("specification", "the tested files")
    group.addoption(
        "--ddpm",
        metavar="FILE",
        default=str(ROOT / "ddpm.py"),
        help="file to test, with any of ddpm.py's public names (default: %(default)s)",
    )
    for name in FILES[1:]:
        group.addoption(
            f"--{name}",
            metavar="FILE",
            help=f"file to test as {name}.py (default: {name}.py next to the file of --ddpm, if it exists)",
        )
    every = ",".join(summary.BUILDS_ON)
    group.addoption("--only", metavar="SECTIONS", help=f"test only these sections: {every}")
    group.addoption(
        "--precision",
        choices=["float64", "float32"],
        default="float64",
        help="float32: tables may be float32, and tolerances count float32 roundings",
    )
    group.addoption(
        "--float64-device",
        action="store_true",
        help="allow float64 on devices: the implementation does not support Apple GPUs",
    )
    group.addoption(
        "--map",
        metavar="FILE",
        help=f"Python file whose function {tested.MAP}(net) names the weights of the tested networks",
    )


def pytest_configure(config):
    for name in ("edge", "randomness", "in_float64"):
        config.addinivalue_line("markers", f"{name}: see tests/specification/checks.py")
    checks.SEED = int(config.getoption("--hypothesis-seed", None) or 0)
    checks.FLOAT32 = config.getoption("--precision") == "float32"
    if checks.FLOAT32:
        checks.REALS = (torch.float64, torch.float32)
    far.FLOAT64 = config.getoption("--float64-device")
    config.sections = summary.chosen(config.getoption("--only"))
    config.tested = tested_files(config)
    for name, path in config.tested.items():
        tested.load(path, name)
    mapping = config.getoption("--map")
    holder = tested.MODULES["ddpm"]
    if mapping:
        holder = tested.run(pathlib.Path(mapping).resolve(), "roles", "map")
    tested.ROLES = getattr(holder, tested.MAP, None)
    if mapping and tested.ROLES is None:
        raise pytest.UsageError(f"--map {mapping}: does not define {tested.MAP}(net)")
    config.pluginmanager.register(summary.Summary(), "summary")


def tested_files(config):
    """Return the paths of the tested files by name: --ddpm, and the others that are given or next to it."""
    paths = {"ddpm": pathlib.Path(config.getoption("--ddpm")).resolve()}
    for name in FILES[1:]:
        given = config.getoption(f"--{name}")
        beside = paths["ddpm"].parent / f"{name}.py"
        if given:
            paths[name] = pathlib.Path(given).resolve()
        elif beside.is_file():
            paths[name] = beside
    return paths


def pytest_ignore_collect(collection_path, config):
    """Do not import test files of other sections than those of --only."""
    if collection_path.parent == TESTS / "specification" and collection_path.name.startswith(
        "test_"
    ):
        return summary.section(collection_path) not in config.sections or None


def pytest_collection_modifyitems(config, items):
    """Select tests: another file is only tested by the specification, and --only selects sections."""
    own = {name: ROOT / f"{name}.py" for name in FILES}
    only_specification = config.tested != own or checks.FLOAT32 or config.getoption("--only")
    selected = []
    deselected = []
    for item in items:
        if item.path.parent == TESTS / "specification":
            keep = summary.section(item.path) in config.sections
            keep = keep and not (checks.FLOAT32 and item.get_closest_marker("in_float64"))
        else:
            keep = not only_specification
        (selected if keep else deselected).append(item)
    config.hook.pytest_deselected(items=deselected)
    items[:] = selected


@pytest.fixture(autouse=True)
def seeded():
    """Seed the global generator, so that statistics are the same in each run with one --hypothesis-seed."""
    checks.seed()


def pytest_terminal_summary(terminalreporter, config):
    table = config.pluginmanager.get_plugin("summary")
    if not table.counts:
        return
    for line in table.lines():
        terminalreporter.write_line(line)
    for name in FILES:
        if name in config.tested:
            terminalreporter.write_line(f"tested: {config.tested[name]}")
            beyond = tested.beyond(name)
            if beyond:
                terminalreporter.write_line(f"  not in the specification: {', '.join(beyond)}")
        else:
            terminalreporter.write_line(f"not found: {name}.py (give one with --{name} FILE)")
        absences = tested.absences(name)
        if absences and (name in config.tested or len(absences) < len(tested.NAMES[name])):
            terminalreporter.write_line(f"  absent: {', '.join(absences)}")

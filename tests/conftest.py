"""What every test needs: the files that are judged, the precision, the sections, profiles, seeds."""

import os
import pathlib
import sys

import hypothesis
import pytest
import torch

TESTS = pathlib.Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS), str(TESTS / "specification")]

import closing  # noqa: E402
import far  # noqa: E402, F401  before autograd is used for the first time: see there
import judge  # noqa: E402
import judged  # noqa: E402
import parallel  # noqa: E402

torch.set_num_threads(1)  # the tensors are tiny: a second thread only waits

# No deadline, since machines are noisy. CI tries the same examples each time, others fresh ones; quick: a
# fifth of them, for slow files of others; deep: fifty times as many, in half an hour.
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
    group = parser.getgroup("specification", "what is judged")
    group.addoption(
        "--ddpm",
        metavar="FILE",
        default=str(ROOT / "ddpm.py"),
        help="the file to judge, with any of ddpm.py's public names (default: %(default)s)",
    )
    group.addoption(
        "--improved",
        metavar="FILE",
        help="the same for improved.py (default: the one beside the judged ddpm.py, if any)",
    )
    group.addoption(
        "--only", metavar="SECTIONS", help=f"some of them: {','.join(closing.BUILDS_ON)}"
    )
    group.addoption(
        "--precision",
        choices=["float64", "float32"],
        default="float64",
        help="float32: tables may be float32, and tolerances are as many of its roundings",
    )
    group.addoption(
        "--map",
        metavar="FILE",
        help=f"a Python file whose {judged.MAP}(net) names the weights of the judged networks",
    )


def pytest_configure(config):
    for name in ("edge", "randomness", "in_float64"):
        config.addinivalue_line("markers", f"{name}: see tests/specification/judge.py")
    judge.SEED = int(config.getoption("--hypothesis-seed", None) or 0)
    judge.FLOAT32 = config.getoption("--precision") == "float32"
    judge.REALS = (torch.float64, torch.float32) if judge.FLOAT32 else (torch.float64,)
    config.sections = closing.chosen(config.getoption("--only"))
    path, asked = pathlib.Path(config.getoption("--ddpm")).resolve(), config.getoption("--improved")
    beside = path.parent / "improved.py"
    config.judged = {"ddpm": path}
    if asked or beside.is_file():
        config.judged["improved"] = pathlib.Path(asked).resolve() if asked else beside
    config.modules = {name: judged.load(path, name) for name, path in config.judged.items()}
    if "improved" not in config.judged:
        judged.nothing("improved")
    mapping = config.getoption("--map")
    holder = (
        judged.run(pathlib.Path(mapping).resolve(), "roles", "map")
        if mapping
        else config.modules["ddpm"]
    )
    judged.ROLES = getattr(holder, judged.MAP, None)
    if mapping and judged.ROLES is None:
        raise pytest.UsageError(f"--map {mapping}: it defines no {judged.MAP}(net)")
    config.pluginmanager.register(closing.Closing(), "closing")
    config.pluginmanager.register(parallel)


def pytest_collection_modifyitems(config, items):
    """Another file is judged by the specification, not by how this project is kept; --only narrows it."""
    ours = {name: ROOT / f"{name}.py" for name in ("ddpm", "improved")}
    foreign = config.judged != ours or judge.FLOAT32 or config.getoption("--only")

    def is_asked(item):
        if item.path.parent != TESTS / "specification":
            return not foreign
        return closing.section(item.path) in config.sections and not (
            judge.FLOAT32 and item.get_closest_marker("in_float64")
        )

    config.hook.pytest_deselected(items=[item for item in items if not is_asked(item)])
    items[:] = [item for item in items if is_asked(item)]


@pytest.fixture(autouse=True)
def seeded():
    """Statistics are replayed with the same numbers, or with fresh ones by --hypothesis-seed=N."""
    judge.seed()


def pytest_terminal_summary(terminalreporter, config):
    table = config.pluginmanager.get_plugin("closing")
    if table.counts:
        for line in table.lines():
            terminalreporter.write_line(line)
    for name, path in config.judged.items():
        terminalreporter.write_line(f"judged: {path}")
        for words, names in (
            ("absent", judged.absences),
            ("beyond the specification, not judged", judged.beyond),
        ):
            if found := names(config.modules[name], name):
                terminalreporter.write_line(f"  {words}: {', '.join(found)}")
    if "improved" not in config.judged:
        terminalreporter.write_line(
            "not judged: improved.py, which is not there; --improved FILE names one"
        )

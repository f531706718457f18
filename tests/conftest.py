"""What every test needs: the files that are judged (`--ddpm FILE`, `--improved FILE`), profiles, seeds."""

import os
import pathlib
import sys

import hypothesis
import pytest
import torch

TESTS = pathlib.Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS), str(TESTS / "specification")]

import far  # noqa: E402, F401  before autograd is used for the first time: see there
import judge  # noqa: E402
import judged  # noqa: E402

torch.set_num_threads(1)  # the tensors are tiny: a second thread only waits

# No deadline, since machines are noisy. CI tries the same examples each time, others fresh ones; deep:
# fifty times as many, in half an hour.
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.register_profile("deep", deadline=None, max_examples=5000)
hypothesis.settings.register_profile(
    "mutants", deadline=None, derandomize=True, report_multiple_bugs=False,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)  # fmt: skip
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_addoption(parser):
    for name in judged.NAMES:
        parser.addoption(f"--{name}", metavar="FILE", default=str(ROOT / f"{name}.py"),
                         help=f"the file to judge, with {name}.py's public names (default: %(default)s)")


def pytest_configure(config):
    config.judged = {name: pathlib.Path(config.getoption(f"--{name}")).resolve() for name in judged.NAMES}
    config.unjudged = [extra for name, path in config.judged.items() for extra in judged.load(path, name)[1]]
    judge.SEED = int(config.getoption("--hypothesis-seed", None) or 0)


def pytest_collection_modifyitems(config, items):
    """Another file is judged by the specification, not by how this project is kept."""
    if any(path != ROOT / f"{name}.py" for name, path in config.judged.items()):
        ours = [i for i in items if i.path.parent == TESTS / "commands"]
        config.hook.pytest_deselected(items=ours)
        items[:] = [i for i in items if i not in ours]


@pytest.fixture(autouse=True)
def seeded():
    """Statistics are replayed with the same numbers, or with fresh ones by --hypothesis-seed=N."""
    torch.manual_seed(judge.SEED)


def pytest_terminal_summary(terminalreporter, config):
    for path in config.judged.values():
        terminalreporter.write_line(f"judged: {path}")
    if config.unjudged:
        terminalreporter.write_line(f"beyond the specification, not judged: {', '.join(config.unjudged)}")

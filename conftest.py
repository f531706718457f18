"""Loads the files that are judged: ./ddpm.py and ./improved.py, or, with `--ddpm FILE` and
`--improved FILE`, any with the same public names."""

import importlib.machinery
import importlib.util
import os
import pathlib
import signal
import sys

import hypothesis
import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import far  # noqa: E402, F401  before autograd is used for the first time: see there
import judge  # noqa: E402

torch.set_num_threads(1)  # the tensors are tiny: a second thread only waits

NAMES = {"ddpm": {
    "linear_schedule", "cosine_schedule", "exponential_schedule", "at", "Diffusion",
    "Diffusion.q_sample", "Diffusion.posterior_mean", "Diffusion.x0_from_eps",
    "Diffusion.eps_from_x0", "Diffusion.p_mean", "loss_simple", "noise_like", "same_t",
    "sample_ancestral", "ddim_grid", "sample_ddim", "normal_kl", "discretized_log_likelihood",
    "bound_terms", "timestep_embedding", "init", "conv", "norm", "ResBlock", "Attention", "Stack",
    "UNet",
}, "improved": {
    "lowest", "variance", "halves", "eps_only", "bound_term", "loss_hybrid", "strided", "sample_ancestral",
    "bound_terms", "drop_labels", "guided",
}}  # fmt: skip
PARTS = {"at", "same_t", "init", "conv", "norm", "Stack", "lowest", "halves"}  # judged in those that use them

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


def public_names(module):
    """The names that the file defines: functions, classes, and the methods of Diffusion."""
    own = {k: v for k, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__}
    methods = {f"Diffusion.{k}" for k in vars(own.get("Diffusion", object)) if not k.startswith("_")}
    return {k for k in own if not k.startswith("_")} | (methods if "Diffusion" in own else set())


def pytest_addoption(parser):
    for name in NAMES:
        parser.addoption(f"--{name}", metavar="FILE", default=str(ROOT / f"{name}.py"),
                         help=f"the file to judge, with {name}.py's public names (default: %(default)s)")


def load(path, name="ddpm"):
    """The module of a file that is to be judged, and the names that it has beyond the specification's."""
    if not path.is_file():
        raise pytest.UsageError(f"--{name} {path}: no such file")
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    before, sys.modules[name] = sys.modules.get(name, module), module
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        problem = f"cannot be imported: {type(error).__name__}: {error}"
    else:
        missing = [part for part in sorted(NAMES[name] - PARTS) if not has(module, part)]
        words = f"the specification needs {name}.py's public names; missing: {', '.join(missing)}"
        problem = words if missing else None
    if problem:
        sys.modules[name] = before
        raise pytest.UsageError(f"--{name} {path}: {problem}")
    return module, sorted(public_names(module) - NAMES[name])


def has(module, name):
    """Whether the module has this name, or Diffusion this method."""
    for part in name.split("."):
        module = getattr(module, part, None)
    return module is not None


def pytest_configure(config):
    config.judged = {name: pathlib.Path(config.getoption(f"--{name}")).resolve() for name in NAMES}
    config.unjudged = [extra for name, path in config.judged.items() for extra in load(path, name)[1]]
    judge.SEED = int(config.getoption("--hypothesis-seed", None) or 0)


def pytest_collection_modifyitems(config, items):
    """Another file is judged by the specification, not by how this project is kept."""
    if any(path != ROOT / f"{name}.py" for name, path in config.judged.items()):
        ours = [i for i in items if i.path.stem in ("test_house", "test_commands", "test_readme")]
        config.hook.pytest_deselected(items=ours)
        items[:] = [i for i in items if i not in ours]


@pytest.fixture(autouse=True)
def seeded():
    """Statistics are replayed with the same numbers, or with fresh ones by --hypothesis-seed=N."""
    torch.manual_seed(judge.SEED)


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs a command inside this process, which saves its start: (exit status, output, errors)."""
    import sample

    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def call(module, *flags):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        capsys.readouterr()
        try:
            sample.run(module.main, module.Config, module.__doc__)
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    yield call
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def pytest_terminal_summary(terminalreporter, config):
    for path in config.judged.values():
        terminalreporter.write_line(f"judged: {path}")
    if config.unjudged:
        terminalreporter.write_line(f"beyond the specification, not judged: {', '.join(config.unjudged)}")

"""Loads the file that is judged: ./ddpm.py, or any other with the same public names by `--ddpm FILE`."""

import importlib.util
import pathlib
import sys

import hypothesis
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NAMES = (
    "linear_schedule cosine_schedule exponential_schedule Diffusion at loss_simple randn_like "
    "sample_ancestral ddim_grid sample_ddim normal_kl discretized_log_likelihood bound_terms "
    "timestep_embedding ResBlock Attention UNet"
).split()
METHODS = "q_sample posterior_mean x0_from_eps eps_from_x0 p_mean".split()

# no deadline: machines are noisy; the same examples every time in CI, fresh ones elsewhere
hypothesis.settings.register_profile("dev", deadline=None, max_examples=100)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=200, derandomize=True)
hypothesis.settings.load_profile("dev")


def pytest_addoption(parser):
    parser.addoption("--ddpm", metavar="FILE", default=str(ROOT / "ddpm.py"),
                     help="the file to judge, with ddpm.py's public names (default: %(default)s)")


def pytest_configure(config):
    path = pathlib.Path(config.getoption("--ddpm")).resolve()
    if not path.is_file():
        raise pytest.UsageError(f"--ddpm {path}: no such file")
    spec = importlib.util.spec_from_file_location("ddpm", path)
    module = importlib.util.module_from_spec(spec)
    try:
        sys.modules["ddpm"] = module
        spec.loader.exec_module(module)
    except Exception as error:
        raise pytest.UsageError(f"--ddpm {path}: cannot be imported: {type(error).__name__}: {error}") from None
    missing = [name for name in NAMES if not hasattr(module, name)]
    missing += [f"Diffusion.{name}" for name in METHODS if not hasattr(getattr(module, "Diffusion", None), name)]
    if missing:
        raise pytest.UsageError(f"--ddpm {path}: the specification needs these names, which are missing: "
                                f"{', '.join(missing)}")


def pytest_terminal_summary(terminalreporter, config):
    terminalreporter.write_line(f"judged: {pathlib.Path(config.getoption('--ddpm')).resolve()}")

"""The files that are judged: ./ddpm.py and ./improved.py, or any with the same public names."""

import importlib.machinery
import importlib.util
import sys

import pytest

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


def public_names(module):
    """The names that the file defines: functions, classes, and the methods of Diffusion."""
    own = {k: v for k, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__}
    methods = {f"Diffusion.{k}" for k in vars(own.get("Diffusion", object)) if not k.startswith("_")}
    return {k for k in own if not k.startswith("_")} | (methods if "Diffusion" in own else set())


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

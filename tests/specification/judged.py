"""The files that are judged: ./ddpm.py and ./improved.py, or any with some of the same public names.

A name that a file lacks is no error: the tests that ask for it are skipped, with the word "absent".
"""

import difflib
import importlib.machinery
import importlib.util
import pathlib
import sys
import types

import pytest

TESTS = str(pathlib.Path(__file__).resolve().parent / "test_")

NAMES = {"ddpm": {
    "linear_schedule", "cosine_schedule", "exponential_schedule", "require", "alike", "at", "Diffusion",
    "Diffusion.q_sample", "Diffusion.posterior_mean", "Diffusion.x0_from_eps",
    "Diffusion.eps_from_x0", "Diffusion.p_mean", "loss_simple", "noise_like", "same_t",
    "sample_ancestral", "ddim_grid", "sample_ddim", "normal_kl", "discretized_log_likelihood",
    "bound_terms", "timestep_embedding", "init", "conv", "norm", "ResBlock", "Attention", "Stack",
    "UNet",
}, "improved": {
    "lowest", "variance", "halves", "eps_only", "bound_term", "loss_hybrid", "strided", "sample_ancestral",
    "bound_terms", "drop_labels", "guided",
}}  # fmt: skip
# judged in those that use them
PARTS = {"require", "alike", "at", "same_t", "init", "conv", "norm", "Stack", "lowest", "halves"}
TABLES = {f"Diffusion.{table}" for table in ("T", "beta", "alpha", "alpha_bar", "beta_tilde")}
MAP = "weights_by_role"  # what a file may have besides: see weights.py

ROLES = None  # that function, from the judged file or from --map; conftest.py sets it


def public_names(module):
    """The names that the file defines: functions, classes, and the methods of Diffusion."""
    own = {k: v for k, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__}
    methods = {
        f"Diffusion.{k}" for k in vars(own.get("Diffusion", object)) if not k.startswith("_")
    }
    return {k for k in own if not k.startswith("_")} | (methods if "Diffusion" in own else set())


def has(module, name):
    """Whether the module has this name, or Diffusion this method."""
    for part in name.split("."):
        module = getattr(module, part, None)
    return module is not None


def run(path, name, option):
    """The module of a Python file, by the name under which the tests import it."""
    if not path.is_file():
        raise pytest.UsageError(f"--{option} {path}: no such file")
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    before, sys.modules[name] = sys.modules.get(name, module), module
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules[name] = before
        words = str(error).splitlines() or [""]
        words = f"--{option} {path}: cannot be imported: {type(error).__name__}: {words[0]}"
        raise pytest.UsageError(words) from None
    return module


def load(path, name="ddpm"):
    """The module of a file that is to be judged, under whose name the tests now import it."""
    before = sys.modules.get(name)
    module = run(path, name, name)
    if not any(has(module, part) for part in NAMES[name] - PARTS):
        sys.modules[name] = before or module
        theirs = ", ".join(sorted(public_names(module))) or "none at all"
        raise pytest.UsageError(f"--{name} {path}: none of the names that are judged is there ({theirs}); "
                                f"judged are {', '.join(sorted(NAMES[name] - PARTS))}")  # fmt: skip
    skip_what_is_absent(module, name)
    if isinstance(getattr(module, "Diffusion", None), type):
        skip_what_is_absent(module.Diffusion, f"{name}.Diffusion")
    return module


def nothing(name):
    """What the tests import where there is no file: each of its names is absent."""
    sys.modules[name] = types.ModuleType(name)
    skip_what_is_absent(sys.modules[name], name)


def skip_what_is_absent(owner, title):
    """Make each public name that a module, or a class, lacks skip the test that asks for it.

    The file itself is not served: where its own code asks for what it lacks, that stays an error.
    """
    name, _, part = title.partition(".")
    names = {
        full.removeprefix(f"{part}.") for full in NAMES[name] | TABLES if full.startswith(part)
    }
    before = getattr(owner, "__getattr__", None)

    def missing(*asked):  # (name,) of a module, (self, name) of a class
        if before:
            try:
                return before(*asked)
            except AttributeError:
                pass
        if asked[-1] in names and sys._getframe(1).f_code.co_filename.startswith(TESTS):
            pytest.skip(f"absent: {title}.{asked[-1]}")
        raise AttributeError(f"{title} has no {asked[-1]!r}", name=asked[-1], obj=owner)

    owner.__getattr__ = missing


def near(name, others):
    """The one of the others that may have been meant, as words; none if none is near."""
    found = difflib.get_close_matches(name, sorted(others), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def absences(module, name):
    """In words: each public name that the file lacks, with that of its own which may be the same."""
    own = public_names(module) - NAMES[name]
    return [
        f"{part}{near(part, own)}" for part in sorted(NAMES[name] - PARTS) if not has(module, part)
    ]


def beyond(module, name):
    """The names that the file has beyond the specification's."""
    return sorted(public_names(module) - NAMES[name] - {MAP})

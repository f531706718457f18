"""The tested files: FILE (--ddpm), and likelihood.py and improved.py next to it, or other files.

Each file has some of the names below. calls.py finds them for the tests; tests for missing names are skipped.
"""

import difflib
import importlib.machinery
import importlib.util
import pathlib
import sys

import pytest

FOLDER = str(pathlib.Path(__file__).resolve().parent)

NAMES = {
    "ddpm": [
        "linear_schedule", "cosine_schedule", "exponential_schedule", "Diffusion", "Diffusion.q_sample",
        "Diffusion.posterior_mean", "Diffusion.x0_from_eps", "Diffusion.eps_from_x0", "Diffusion.p_mean",
        "loss_simple", "ancestral_step", "sample_ancestral", "ddim_timesteps", "ddim_step", "sample_ddim",
        "timestep_embedding", "ResBlock", "Attention", "UNet",
    ],
    "likelihood": ["normal_kl", "discretized_log_likelihood", "bound_term", "bound_terms"],
    "improved": [
        "variance", "split_output", "eps_only", "bound_term", "loss_hybrid", "respaced", "ancestral_step",
        "sample_ancestral", "bound_terms", "drop_labels", "guided",
    ],
}  # fmt: skip
TABLES = ["T", "beta", "alpha", "alpha_bar", "beta_tilde"]  # attributes of Diffusion
# These names mean different functions in two of the files.
SHARED = {"ancestral_step", "sample_ancestral", "bound_term", "bound_terms"}
OLD_NAMES = {"ddim_timesteps": "ddim_grid", "respaced": "strided", "split_output": "halves"}
# Public helpers of our own files; the tests of their callers cover them.
HELPERS = {
    "check", "check_same_shape", "readable", "at", "same_t", "init", "conv", "norm", "Stack",
    "with_sigma_1", "prior_term", "check_levels", "bits_per_dim", "timestep_pairs",
}  # fmt: skip
MAP = "weights_by_role"  # an optional function, see weights.py

MODULES = {}  # the loaded files by the keys of NAMES; conftest.py fills it
ROLES = None  # the function weights_by_role of FILE or of --map; conftest.py sets it


def places(file, name):
    """Return (module, name) for each place where a name of `file` may be found, the best one first.

    FILE may contain everything. A name that two files share is only looked up where its meaning is clear.
    """
    if name in SHARED:
        files = ["ddpm", "likelihood"] if file == "likelihood" else [file]
    else:
        files = ["ddpm", "likelihood", "improved"]
    spellings = [name, OLD_NAMES[name]] if name in OLD_NAMES else [name]
    return [
        (MODULES[place], spelling) for spelling in spellings for place in files if place in MODULES
    ]


def find(file, name):
    """Return (function or class, its name there), or (None, name) if it is missing."""
    for module, spelling in places(file, name):
        found = getattr(module, spelling, None)
        if found is not None:
            return found, spelling
    return None, name


def has(file, name):
    """Return True if the tested files have this name, which may be that of a method of Diffusion."""
    owner, _, method = name.partition(".")
    found, _ = find(file, owner)
    return found is not None and (not method or hasattr(found, method))


def run(path, name, option):
    """Import a Python file as the module `name`, and return it."""
    if not path.is_file():
        raise pytest.UsageError(f"--{option} {path}: no such file")
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        if before is not None:
            sys.modules[name] = before
        first_line = (str(error).splitlines() or [""])[0]
        message = f"--{option} {path}: cannot be imported: {type(error).__name__}: {first_line}"
        raise pytest.UsageError(message) from None
    return module


def load(path, file="ddpm"):
    """Import a tested file under its usual name, so that the other files import it too."""
    before = sys.modules.get(file)
    module = run(path, file, file)
    names = NAMES[file] if file != "ddpm" else [name for names in NAMES.values() for name in names]
    if not any(
        getattr(module, name, None) or hasattr(module, OLD_NAMES.get(name, "")) for name in names
    ):
        if before is not None:
            sys.modules[file] = before
        own = ", ".join(sorted(public_names(module))) or "none"
        raise pytest.UsageError(
            f"--{file} {path}: contains no tested name (its names: {own}); tested names: {', '.join(names)}"
        )
    if isinstance(getattr(module, "Diffusion", None), type):
        skip_missing_methods(module.Diffusion)
    MODULES[file] = module
    return module


def skip_missing_methods(diffusion):
    """Make a missing method or table of Diffusion skip the test that uses it.

    This only affects the tests' own code. In the tested file, a missing attribute stays an error.
    """
    names = {name.removeprefix("Diffusion.") for name in [*NAMES["ddpm"], *TABLES]}
    before = getattr(diffusion, "__getattr__", None)

    def missing(self, name):
        if before:
            try:
                return before(self, name)
            except AttributeError:
                pass
        caller = sys._getframe(1).f_code.co_filename
        if name in names and caller.startswith(FOLDER):
            pytest.skip(f"absent: Diffusion.{name}")
        raise AttributeError(f"Diffusion has no {name!r}", name=name, obj=self)

    diffusion.__getattr__ = missing


# --- The lines about names at the end of a run ----------------------------------------------------


def public_names(module):
    """Return the public names that a file defines: functions, classes and methods of Diffusion."""
    own = {
        name: value
        for name, value in vars(module).items()
        if getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")
    }
    methods = vars(own["Diffusion"]) if "Diffusion" in own else {}
    return {*own, *(f"Diffusion.{name}" for name in methods if not name.startswith("_"))}


def near(name, others):
    """Return " (did you mean ...?)" for the most similar of the other names, or ""."""
    found = difflib.get_close_matches(name, sorted(others), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def absences(file):
    """Return the tested names of `file` that are missing, each with a similar name that exists."""
    own = set()
    for module in MODULES.values():
        own |= public_names(module)
    own -= {name for names in NAMES.values() for name in names}
    return [f"{name}{near(name, own)}" for name in NAMES[file] if not has(file, name)]


def beyond(file):
    """Return the public names of `file` that the specification does not test."""
    tested = (
        {name for names in NAMES.values() for name in names} | HELPERS | {MAP, *OLD_NAMES.values()}
    )
    return sorted(public_names(MODULES[file]) - tested)

"""Check a Python file against the test vectors: python tests/vectors/check.py [FILE] [--precision float32]

FILE (default: ddpm.py) has the public names of ddpm.py, or some of them. Names that FILE lacks are looked up
in likelihood.py next to it. Cases whose name is missing are skipped and counted. Each subject gets one line
with its largest error as a multiple of the tolerance. The exit status is 1 if a case fails and 2 if FILE has
none of the names.
"""

import argparse
import collections
import functools
import importlib.util
import itertools
import json
import operator
import pathlib
import sys

import numpy as np
import torch

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TABLES = ("beta", "sigma2", "variances")  # float64 in either precision
OPTIONS = ("clip", "eta", "noise")  # passed by keyword, everything else by position


def load(path):
    """Return [FILE as a module, likelihood.py next to it if it exists]; the latter imports FILE as ddpm."""
    sys.path[:0] = [str(path.parent), str(ROOT)]
    modules = []
    for name, file in ("ddpm", path), ("likelihood", path.with_name("likelihood.py")):
        if file.is_file() or file == path:
            spec = importlib.util.spec_from_file_location(name, file)
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
            modules.append(sys.modules[name])
    return modules


def find(modules, name):
    """Return the object with this dotted name. Raises NotImplementedError if no module has it."""
    for module in modules:
        try:
            return operator.attrgetter(name)(module)
        except AttributeError:
            pass
    raise NotImplementedError(name)


def stored(value):
    """Return numbers of a JSON file (null is nan), or the array "network.npz:NAME", in float64."""
    if isinstance(value, str):
        value = np.load(HERE / "network.npz")[value.removeprefix("network.npz:")]
    return np.array(value, np.float64)


def read(key, value):
    """Return an input as the tested function takes it."""
    if key == "beta" and isinstance(value, dict):
        value = [0.0, *np.linspace(value["beta_1"], value["beta_T"], value["T"])]
    if key == "timesteps" or not isinstance(value, (list, str)):
        return value
    array = -1 + 2 * stored(value) / 255 if key == "k" else stored(value)
    dtype = torch.float64 if key in TABLES else torch.get_default_dtype()
    return torch.tensor(array, dtype=torch.int64 if key == "t" else dtype)


def model(xt, t):
    """Return the predicted noise of the model in the files."""
    return 0.875 * xt + ((t % 3 - 1) / 8).reshape(-1, *[1] * (xt.ndim - 1))


@torch.no_grad()
def network_output(unet, modules, xt, t, config, weights=()):
    """Return the output of the tested UNet with the weights of network.npz.

    FILE may define weights_by_role(net), a dict from the names in network.npz to the network's tensors.
    Without it, the weights are assigned in the order of use.
    """
    net = unet(**config).eval()
    arrays = {name: torch.tensor(stored(f"network.npz:{name}")) for name in weights}
    count = sum(p.numel() for p in net.parameters())
    if weights and count != sum(a.numel() for a in arrays.values()):
        raise AssertionError(f"UNet has {count} weights")
    if hasattr(modules[0], "weights_by_role"):
        named = modules[0].weights_by_role(net)
    else:
        named = dict(zip(arrays, net.parameters()))
    for name, array in arrays.items():
        if name not in named or named[name].squeeze().shape != array.squeeze().shape:
            raise NotImplementedError(f"weights_by_role: {name} is not in the order of use")
        named[name].copy_(array.reshape(named[name].shape))
    return net(xt, t)


def compute(modules, case):
    """Return {name: result of the tested function} for a case."""
    call = case["call"]
    names = case.get("want", ())
    function = find(modules, call)
    given = {key: read(key, value) for key, value in case["given"].items()}
    if call == "UNet":
        return dict.fromkeys(names, network_output(function, modules, **given))
    if call == "timestep_embedding":
        given["t"] = given["t"].to(torch.get_default_dtype())
    if call.endswith("_schedule"):
        t = given.pop("t")
        return dict.fromkeys(names, function(*given.values())[t])
    if "beta" in given:
        d = find(modules, "Diffusion")(given.pop("beta"))
        function = functools.partial(function, *([d] if "." in call else [model, d]))
    if call == "Diffusion":
        return {name: getattr(d, name)[given["t"]] for name in names if hasattr(d, name)}
    options = {key: given.pop(key) for key in OPTIONS if key in given}
    if "noise" in options:  # one array for each step, or one for all terms of the bound
        noise = options["noise"]
        arrays = itertools.repeat(noise) if call == "bound_terms" else iter(noise)
        options["noise"] = lambda x: next(arrays).clone()
    states = []
    if call.startswith("sample_"):
        options["on_step"] = lambda s, xs: states.append(xs.clone())
    result = function(*given.values(), **options)
    return dict.fromkeys(names, torch.stack(states) if states else result)


def largest_error(got, case, precision):
    """Return (error as a multiple of the tolerance, where) of the worst entry."""
    worst = 0.0, ""
    for name, result in got.items():
        want = stored(case["want"][name])
        have = result.detach().double().numpy()
        if have.shape != want.shape:
            return np.inf, f"{name} has shape {have.shape}, expected {want.shape}"
        scale = stored(case.get("scale", {}).get(name, abs(want)))
        with np.errstate(all="ignore"):
            ratio = abs(have - want) / (case["tolerance"][precision] * scale)
        ratio = np.where((have == want) | np.isnan(want), 0, np.nan_to_num(ratio, nan=np.inf))
        i = np.unravel_index(ratio.argmax(), ratio.shape)
        where = f"{name}{[int(j) for j in i] or ''} is {have[i]:.10g}, expected {want[i]:.10g}"
        worst = max(worst, (float(ratio[i]), where))
    return worst


def check(modules, case, precision):
    """Return (error, verdict, where): "passed", "failed", "missing (name)" or "alternative (name)"."""
    rejected = "want" not in case
    try:
        got = compute(modules, case)
    except NotImplementedError as missing:
        return 0.0, f"missing ({missing})", ""
    except Exception as error:  # a failed case must not stop the others
        if rejected:
            return 0.0, "passed", ""
        return np.inf, "failed", f"{type(error).__name__}: {error}".splitlines()[0]
    if rejected:
        return np.inf, "failed", "is not rejected"
    if not got:
        return 0.0, f"missing (tables of {case['call']})", ""
    error, where = largest_error(got, case, precision)
    if error <= 1:
        return error, "passed", where
    for name, alternative in case.get("alternatives", {}).items():
        if largest_error(got, {**case, **alternative}, precision)[0] <= 1:
            return 0.0, f"alternative ({name})", ""
    return error, "failed", where


def main(argv=None):
    paths = sorted(HERE.glob("*.json"))
    subjects = {path.stem: json.loads(path.read_text())["cases"] for path in paths}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=pathlib.Path, default=ROOT / "ddpm.py")
    parser.add_argument("--precision", choices=["float64", "float32"], default="float64")
    parser.add_argument("--only", metavar="SUBJECT", nargs="+", choices=subjects)
    args = parser.parse_args(argv)
    modules = load(args.file.resolve())
    torch.set_default_dtype(getattr(torch, args.precision))
    total = collections.Counter()
    for subject in args.only or subjects:
        results = [(*check(modules, c, args.precision), c["name"]) for c in subjects[subject]]
        error, _, where, name = max(results, key=operator.itemgetter(0))
        counts = collections.Counter(verdict for _, verdict, _, _ in results)
        line = ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()))
        if error > 1:
            line += f"; {name}: {where}"
        if 0 < error < np.inf:
            line += f"; largest error {error:.2g} x the tolerance"
        print(f"{'FAILED' if error > 1 else '':7}{subject:17}{line}")
        total.update(verdict.split(" (")[0] for _, verdict, _, _ in results)
    if set(total) == {"missing"}:
        parser.exit(2, f"check.py: {args.file} has none of the tested names\n")
    summary = ", ".join(f"{n} {verdict}" for verdict, n in sorted(total.items()))
    print(f"{args.file.name} in {args.precision}: {summary}")
    return 1 if total["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""Judges a file by the test vectors: python tests/vectors/check.py [FILE] [--precision float32]

FILE, ddpm.py by default, has ddpm.py's public names or some of them: a case whose name is absent is skipped
and counted. Each subject gets one line, with its largest error as a multiple of what is allowed. The exit
status is 1 if a case fails, 2 if the file cannot be judged.
"""

import argparse
import collections
import importlib.machinery
import importlib.util
import itertools
import json
import math
import operator
import pathlib
import sys
from unittest import mock

import numpy as np
import torch

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
REFUSALS = ValueError, AssertionError, TypeError
ARRAYS = "k x0 xt xT eps noise mean var mean_1 var_1 mean_2 var_2".split()
TABLES = "beta sigma2 variances".split()  # float64 in every precision
TAKE_MODEL = "loss_simple sample_ancestral sample_ddim bound_terms".split()


class Absent(Exception):
    """The file has not what the case is about."""


# --- What the file answers ---------------------------------------------------------------------------


def stored(value):
    """An array of a JSON file: numbers, of which null is nan, or "network.npz:NAME"."""
    if isinstance(value, str):
        file, name = value.split(":")
        value = np.load(HERE / file)[name]
    return np.array(value, np.float64)


def read(key, value):
    """A value of a JSON file as the judged functions take it."""
    if key == "beta" and isinstance(value, dict):
        value = [0.0, *np.linspace(value["beta_1"], value["beta_T"], value["T"])]
    if key == "k":
        value = -1 + 2 * stored(value) / 255
    dtypes = {"t": torch.int64, **dict.fromkeys(TABLES, torch.float64),
              **dict.fromkeys(ARRAYS, torch.get_default_dtype())}  # fmt: skip
    return torch.tensor(stored(value), dtype=dtypes[key]) if key in dtypes else value


def model(xt, t):
    return 0.875 * xt + ((t % 3 - 1) / 8).reshape(-1, *[1] * (xt.ndim - 1))


@torch.no_grad()
def fill(f, net, shapes):
    """Gives the file's UNet the weights of network.npz: by its weights_by_role(net), a dict of the network's
    tensors, if there is that function; otherwise in the order of their use."""
    counts = sum(p.numel() for p in net.parameters()), sum(map(math.prod, shapes.values()))
    assert counts[0] == counts[1], f"UNet has {counts[0]} weights, not {counts[1]}"
    named = f.weights_by_role(net) if hasattr(f, "weights_by_role") else dict(zip(shapes, net.parameters()))
    for name, shape in shapes.items():
        if name not in named or [n for n in named[name].shape if n > 1] != [n for n in shape if n > 1]:
            raise Absent(f"weights_by_role, and {name} in the order of use")
        named[name].copy_(torch.tensor(stored(f"network.npz:{name}")).reshape(named[name].shape))


def ask(f, call, given):
    """What the file's function returns; what is given is in the order of its arguments."""
    try:
        operator.attrgetter(call)(f)
    except AttributeError:
        raise Absent(call) from None
    g, told = {key: read(key, value) for key, value in given.items()}, {}
    if call == "UNet":
        net = f.UNet(**g["config"]).eval()
        if "weights" in g:
            fill(f, net, g["weights"])
        return net(g["xt"], g["t"]).detach()
    if call == "timestep_embedding":
        g["t"] = g["t"].to(torch.get_default_dtype())  # of integers, it is float32
    d = f.Diffusion(g.pop("beta")) if "beta" in g else None
    if call == "Diffusion":
        names = [name for name in ("alpha", "alpha_bar", "beta_tilde") if hasattr(d, name)]
        if not names:
            raise Absent("tables of Diffusion")
        return {name: getattr(d, name)[g["t"]] for name in names}
    if call.endswith("_schedule"):
        steps = g.pop("t")
        return getattr(f, call)(*g.values())[steps]
    noise = g.pop("noise", ())
    z = itertools.repeat(noise) if call == "bound_terms" else iter(noise)
    args = [*([model, d] if call in TAKE_MODEL else []), *g.values()]
    how = {"on_step": told.__setitem__} if call.startswith("sample_") else {}
    draw = lambda *_, **__: next(z).clone()  # noqa: E731
    with mock.patch.multiple(torch, randn=draw, randn_like=draw):
        result = getattr(d if "." in call else f, call.split(".")[-1])(*args, **how)
    return torch.stack([told[s] for s in sorted(told, reverse=True)]) if told else result


# --- What it should answer ---------------------------------------------------------------------------


def largest(got, case, precision):
    """(error as a multiple of what is allowed, where) of the worst entry."""
    worst = 0.0, ""
    for name in case["want"].keys() & got.keys():  # not each table need have our name
        want, have = stored(case["want"][name]), got[name].detach().double().numpy()
        if have.shape != want.shape:
            return math.inf, f"{name} has the shape {have.shape}, not {want.shape}"
        scale = stored(case.get("scale", {}).get(name, abs(want)))
        with np.errstate(all="ignore"):
            ratio = abs(have - want) / (case["tolerance"][precision] * scale)
        ratio = np.where((have == want) | np.isnan(want), 0, np.nan_to_num(ratio, nan=math.inf))
        i = np.unravel_index(ratio.argmax(), ratio.shape)
        place = f"{name}{[int(j) for j in i] or ''} is {have[i]:.10g}, not {want[i]:.10g}"
        worst = max(worst, (float(ratio[i]), place))
    return worst


def judge(f, case, precision):
    """(verdict, error, where) of a case. The verdict begins with held, departed, absent or failed."""
    try:
        got = ask(f, case["call"], case["given"])
        if "want" not in case:
            return "failed", math.inf, "is not refused"
        got = got if isinstance(got, dict) else dict.fromkeys(case["want"], got)
        error, where = largest(got, case, precision)
        for word, departure in case.get("departures", {}).items():
            if error > 1 and largest(got, {**case, **departure}, precision)[0] <= 1:
                return f"departed ({word})", 0.0, ""
        return "held" if error <= 1 else "failed", error, where
    except Absent as missing:
        return f"absent ({missing})", 0.0, ""
    except Exception as error:
        if "want" not in case and isinstance(error, REFUSALS):
            return "held", 0.0, ""
        return "failed", math.inf, f"{type(error).__name__}: {error}".splitlines()[0]


def report(f, subject, cases, precision):
    """Prints the line of a subject, with its worst case; returns the number of cases of each verdict."""
    results = [(*judge(f, case, precision), case["name"]) for case in cases]
    counts = collections.Counter(verdict for verdict, *_ in results)
    _, error, where, name = max(results, key=lambda result: (result[0] == "failed", result[1]))
    line = ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()))
    if counts["failed"]:
        line += f"; {name}: {where}"
    if 0 < error < math.inf:
        line += f"; {'error' if counts['failed'] else 'largest error'} {error:.2g} x the tolerance"
    print(f"{'FAILS' if counts['failed'] else '':6}{subject:17}{line}")
    return counts


def load(path):
    """The module of a Python file, which may import its neighbours, and ddpm.py."""
    sys.path[:0] = [str(path.parent), str(ROOT)]
    loader = importlib.machinery.SourceFileLoader("judged", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("judged", loader))
    loader.exec_module(module)
    return module


def main(argv=None):
    subjects = {path.stem: json.loads(path.read_text())["cases"] for path in sorted(HERE.glob("*.json"))}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE", nargs="?", type=pathlib.Path, default=ROOT / "ddpm.py")
    parser.add_argument("--precision", choices=["float64", "float32"], default="float64")
    parser.add_argument("--only", metavar="SUBJECT", nargs="+", choices=subjects, help=", ".join(subjects))
    args = parser.parse_args(argv)
    try:
        f = load(args.file)
    except (Exception, SystemExit) as error:
        parser.exit(2, f"check.py: {args.file} cannot be loaded: {type(error).__name__}: {error}\n")
    torch.set_default_dtype(getattr(torch, args.precision))
    total = collections.Counter()
    for subject in args.only or subjects:
        for verdict, n in report(f, subject, subjects[subject], args.precision).items():
            total[verdict.split(" (")[0]] += n
    if set(total) == {"absent"}:
        parser.exit(2, f"check.py: {args.file} has none of the names that are judged\n")
    print(f"{args.file.name} in {args.precision}: {', '.join(f'{n} {v}' for v, n in sorted(total.items()))}")
    return 1 if total["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

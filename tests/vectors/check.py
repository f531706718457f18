"""Judges a file by the test vectors: python tests/vectors/check.py [FILE] [--precision float32]

FILE, ddpm.py by default, has ddpm.py's public names or some of them: a case whose name is absent, or that is
answered by NotImplementedError, is skipped and counted. Each subject gets one line, with its largest error as
a multiple of what is allowed. The exit status is 1 if a case fails, 2 if the file cannot be judged.
"""

import argparse
import collections
import itertools
import json
import operator
import pathlib
import sys
import types
from unittest import mock

import numpy as np
import torch

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DTYPES = {"t": torch.int64, **dict.fromkeys(["beta", "sigma2", "variances"], torch.float64)}


def stored(value):
    """An array of a JSON file: numbers, of which null is nan, or "network.npz:NAME"."""
    if isinstance(value, str):
        value = np.load(HERE / "network.npz")[value.removeprefix("network.npz:")]
    return np.array(value, np.float64)


def read(key, value):
    """What is given under a key, as the judged functions take it: tables are float64 in either precision."""
    if key == "beta" and isinstance(value, dict):
        value = [0.0, *np.linspace(value["beta_1"], value["beta_T"], value["T"])]
    if key == "grid" or not isinstance(value, (list, str)):
        return value
    array = -1 + 2 * stored(value) / 255 if key == "k" else stored(value)
    return torch.tensor(array, dtype=DTYPES.get(key, torch.get_default_dtype()))


def model(xt, t):
    return 0.875 * xt + ((t % 3 - 1) / 8).reshape(-1, *[1] * (xt.ndim - 1))


@torch.no_grad()
def run_network(f, xt, t, config, weights=()):
    """The output of the file's UNet with the weights of network.npz: by its weights_by_role(net), a dict of
    the network's tensors, if there is that function; otherwise in the order of their use."""
    net = f.UNet(**config).eval()
    arrays = {name: torch.tensor(stored(f"network.npz:{name}")) for name in weights}
    count = sum(p.numel() for p in net.parameters())
    assert not weights or count == sum(a.numel() for a in arrays.values()), (
        f"UNet has {count} weights"
    )
    named = (
        f.weights_by_role(net)
        if hasattr(f, "weights_by_role")
        else dict(zip(arrays, net.parameters()))
    )
    for name, array in arrays.items():
        if name not in named or named[name].squeeze().shape != array.squeeze().shape:
            raise NotImplementedError(f"weights_by_role, and {name} in the order of use")
        named[name].copy_(array.reshape(named[name].shape))
    return net(xt, t)


def answer(f, call, given, want):
    """{name: result} of the file's function; what is given is in the order of its arguments."""
    try:
        function = operator.attrgetter(call)(f)
    except AttributeError:
        raise NotImplementedError(call) from None
    g, states = {key: read(key, value) for key, value in given.items()}, []
    if call == "UNet":
        return dict.fromkeys(want, run_network(f, **g))
    if call == "timestep_embedding":
        g["t"] = g["t"].to(torch.get_default_dtype())  # of integers, it is float32
    if call.endswith("_schedule"):
        t = g.pop("t")
        return dict.fromkeys(want, function(*g.values())[t])
    d = f.Diffusion(g.pop("beta")) if "beta" in g else None
    if call == "Diffusion":
        tables = {name: getattr(d, name)[g["t"]] for name in want if hasattr(d, name)}
        if want and not tables:
            raise NotImplementedError("tables of Diffusion")
        return tables
    first = [] if d is None else [d] if "." in call else [model, d]
    noise = g.pop("noise", ())
    z = (noise.clone() for _ in itertools.count()) if call == "bound_terms" else iter(noise)
    on_step = (
        {"on_step": lambda s, xs: states.append(xs.clone())} if call.startswith("sample_") else {}
    )
    with mock.patch.multiple(
        torch, randn=lambda *_, **__: next(z), randn_like=lambda *_, **__: next(z)
    ):
        result = function(*first, *g.values(), **on_step)
    return dict.fromkeys(want, torch.stack(states) if states else result)


def largest(got, case, precision):
    """(error as a multiple of what is allowed, where) of the worst entry."""
    worst = 0.0, ""
    for name, result in got.items():
        want, have = stored(case["want"][name]), result.detach().double().numpy()
        if have.shape != want.shape:
            return np.inf, f"{name} has the shape {have.shape}, not {want.shape}"
        scale = stored(case.get("scale", {}).get(name, abs(want)))
        with np.errstate(all="ignore"):
            ratio = abs(have - want) / (case["tolerance"][precision] * scale)
        ratio = np.where((have == want) | np.isnan(want), 0, np.nan_to_num(ratio, nan=np.inf))
        i = np.unravel_index(ratio.argmax(), ratio.shape)
        place = f"{name}{[int(j) for j in i] or ''} is {have[i]:.10g}, not {want[i]:.10g}"
        worst = max(worst, (float(ratio[i]), place))
    return worst


def judge(f, case, precision):
    """(error, verdict, where) of a case. The verdict is held, departed (how), absent (what) or failed."""
    try:
        got = answer(f, case["call"], case["given"], case.get("want", ()))
        error, where = (
            largest(got, case, precision) if "want" in case else (np.inf, "is not refused")
        )
        for word, departure in case.get("departures", {}).items():
            if error > 1 and largest(got, {**case, **departure}, precision)[0] <= 1:
                return 0.0, f"departed ({word})", ""
        return error, "held" if error <= 1 else "failed", where
    except NotImplementedError as absent:
        return 0.0, f"absent ({absent})".splitlines()[0], ""
    except Exception as error:
        if "want" not in case and isinstance(error, (ValueError, AssertionError, TypeError)):
            return 0.0, "held", ""
        return np.inf, "failed", f"{type(error).__name__}: {error}".splitlines()[0]


def main(argv=None):
    subjects = {
        path.stem: json.loads(path.read_text())["cases"] for path in sorted(HERE.glob("*.json"))
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "file", metavar="FILE", nargs="?", type=pathlib.Path, default=ROOT / "ddpm.py"
    )
    parser.add_argument("--precision", choices=["float64", "float32"], default="float64")
    parser.add_argument(
        "--only", metavar="SUBJECT", nargs="+", choices=subjects, help=", ".join(subjects)
    )
    args = parser.parse_args(argv)
    sys.path[:0] = [str(args.file.parent), str(ROOT)]  # it may import its neighbours, and ddpm.py
    f = sys.modules["judged"] = types.ModuleType("judged")
    f.__file__ = str(args.file)
    try:
        exec(compile(args.file.read_bytes(), args.file, "exec"), vars(f))
    except (Exception, SystemExit) as error:
        parser.exit(2, f"check.py: {args.file} cannot be loaded: {type(error).__name__}: {error}\n")
    torch.set_default_dtype(getattr(torch, args.precision))
    total = collections.Counter()
    for subject in args.only or subjects:
        results = [(*judge(f, case, args.precision), case["name"]) for case in subjects[subject]]
        error, _, where, name = max(results, key=operator.itemgetter(0))  # the first of equals
        counts = collections.Counter(verdict for _, verdict, *_ in results)
        line = ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()))
        line += f"; {name}: {where}" if error > 1 else ""
        if 0 < error < np.inf:
            line += f"; {'error' if error > 1 else 'largest error'} {error:.2g} x the tolerance"
        print(f"{'FAILS' if error > 1 else '':6}{subject:17}{line}")
        total.update(verdict.split(" (")[0] for _, verdict, *_ in results)
    if set(total) == {"absent"}:
        parser.exit(2, f"check.py: {args.file} has none of the names that are judged\n")
    print(
        f"{args.file.name} in {args.precision}: {', '.join(f'{n} {v}' for v, n in sorted(total.items()))}"
    )
    return 1 if total["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

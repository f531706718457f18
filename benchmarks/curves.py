"""Whether what makes training faster leaves it as it was: the loss of one run, with and without.

    python benchmarks/curves.py                    on this machine: digits, 250 steps a run
    python benchmarks/curves.py --device cuda --data cifar10 --steps 1000

Every run has the same weights, images, t and noise, which are functions of the seed, and no dropout, whose
masks torch.compile draws otherwise; only the way in which they are computed differs. The digits have a lower
learning rate than train.py's, at which one rounding more grows into another run. Beside the differences
stands what another seed makes of them.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent


def losses(folder, name, flags):
    """Mean loss of every 50 steps of a run of train.py, or None where it cannot run."""
    log = folder / f"{name}.jsonl"
    done = subprocess.run([sys.executable, ROOT / "train.py", *flags, "--out", folder / f"{name}.pt",
                           "--log", log, "--sample-every", "0"], capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        print(f"{name}: {done.stderr.strip().splitlines()[-1]}")
        return None
    rows, before = [json.loads(line) for line in log.read_text().splitlines()], 0
    curve = [0.0] * (rows[-1]["step"] // 50)
    for row in rows:  # each is the mean since the last, and none goes beyond a multiple of 50
        curve[(row["step"] - 1) // 50] += row["loss"] * (row["step"] - before) / 50
        before = row["step"]
    return curve


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", default="glyphs")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--steps", type=int, default=250, help="a multiple of 50")
    given = parser.parse_args()
    batch = 32 if given.data == "glyphs" else 128
    flags = ["--data", given.data, "--data-dir", given.data_dir, "--device", given.device,
             "--limit", str(batch * 50), "--epochs", str(given.steps // 50), "--batch-size", str(batch),
             "--dropout", "0", "--lr", "5e-4" if given.data == "glyphs" else "2e-4"]  # fmt: skip
    runs = {
        "float32": ["--precision", "fp32"],
        "bf16": ["--precision", "bf16"],
        "float32, compiled": ["--precision", "fp32", "--compile"],
        "bf16, compiled": ["--precision", "bf16", "--compile"],
        "float32, another seed": ["--precision", "fp32", "--seed", "1"],
    }
    with tempfile.TemporaryDirectory() as folder:
        first = None
        for name, how in runs.items():
            curve = losses(pathlib.Path(folder), name, [*flags, *how])
            if curve:
                first = first or curve
                off = max(abs(a / b - 1) for a, b in zip(curve, first, strict=True))
                print(
                    f"{name:22}",
                    *(f"{x:.4f}" for x in curve),
                    f"  at most {off:.2%} off",
                    flush=True,
                )


if __name__ == "__main__":
    main()

"""Draw every picture of this folder that needs no photos: python docs/figures/redraw.py

It trains two small networks on the digits, in about ten minutes on two cores, in the folder --work
(default: data/pictures). A checkpoint that exists there is used again. The pictures of photos come from
the commands in docs/training.md.
"""

import argparse
import contextlib
import pathlib
import re
import shutil
import subprocess
import sys

FIGURES = pathlib.Path(__file__).resolve().parent
ROOT = FIGURES.parents[1]
TRAIN = {"ckpt.pt": "--epochs 5 --log log.jsonl", "learned.pt": "--epochs 5 --variance learned"}
DRAW = [
    "--ckpt ckpt.pt --log log.jsonl --out all",
    "--ckpt learned.pt --only terms --out all",  # with a third variance
    # The losses of the run on 300 photos (docs/training.md), read from a chart, since its log was not kept.
    "--only loss --log few.jsonl --out few",
]


def run(work, command, flags):
    print(f"python {command} {flags}", flush=True)
    subprocess.run([sys.executable, ROOT / command, *flags.split()], cwd=work, check=True)


def draw_points():
    """Run the first example of docs/your-code.md that draws points.png, in the current folder."""
    names = {}
    page = (ROOT / "docs/your-code.md").read_text(encoding="utf-8")
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code, "your-code.md", "exec"), names)
        if pathlib.Path("points.png").exists():
            return


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", default=str(ROOT / "data/pictures"), metavar="DIR")
    work = pathlib.Path(parser.parse_args().work)
    work.mkdir(parents=True, exist_ok=True)
    for name, flags in TRAIN.items():
        if not (work / name).exists():
            run(work, "train.py", f"{flags} --device cpu --out {name}")
    shutil.copy(FIGURES / "few.jsonl", work)
    for flags in DRAW:
        run(work, "figures.py", f"{flags} --device cpu")
    for picture in (work / "all").glob("*.png"):
        shutil.copy(picture, FIGURES / picture.name)
    shutil.copy(work / "few/loss.png", FIGURES / "few-loss.png")
    sys.path.insert(0, str(ROOT))
    with contextlib.chdir(work):
        draw_points()
    shutil.copy(work / "points.png", FIGURES / "points.png")


if __name__ == "__main__":
    main()

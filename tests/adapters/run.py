"""Judge diffusers, denoising-diffusion-pytorch and improved-diffusion by the specification.

    python -m venv peers
    peers/bin/pip install -r requirements.txt torchvision diffusers denoising-diffusion-pytorch
    git clone https://github.com/openai/improved-diffusion && git -C improved-diffusion checkout 1bc7bbb
    PYTHONPATH=improved-diffusion peers/bin/python tests/adapters/run.py
    peers/bin/python tests/adapters/run.py diffusers -- -k ddim         one of them, and flags of pytest

Each twice: in float64, where tables that are float32 break the rule of precision, and then by the tolerances
of float32. It prints the closing tables (with flags of pytest, all that it says); docs/specification.md
explains them. Exit status 1 if one could not be judged; what a judged library does not do is no error here.
"""

import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
NAMES = ("diffusers", "denoising_diffusion_pytorch", "improved_diffusion")
SECTIONS = (
    "schedules,forward,posterior,parametrisation,loss,ancestral,ddim,bound,network,single_step"
)


def judge(name, precision, flags):
    """What the specification says of an adapter, and whether it could be judged."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        HERE.parent / "specification",
        "-q",
        "--tb=line",
        "-p",
        "no:warnings",
        "--hypothesis-profile=quick",
        "--ddpm",
        HERE / f"{name}.py",
        "--only",
        SECTIONS,
        "--precision",
        precision,
        *flags,
    ]
    done = subprocess.run(command, text=True, capture_output=True, cwd=HERE.parent.parent)
    said = done.stdout[done.stdout.find("section  ") if not flags else 0 :]
    table = [
        line
        for line in said.splitlines()
        if flags or not line.startswith(("FAILED", "rule broken", "=="))
    ]
    return "\n".join(table) if done.returncode in (
        0,
        1,
    ) else done.stderr.strip(), done.returncode in (0, 1)


def main(arguments):
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    names, flags, all_judged = arguments[:cut] or NAMES, arguments[cut + 1 :], True
    if unknown := [name for name in names if name not in NAMES]:
        print(f"no adapter is called {unknown[0]}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    for name in names:
        for precision in ("float64", "float32"):
            words, judged = judge(name, precision, flags)
            all_judged &= judged
            print(f"{name}, {precision}\n{words}\n", flush=True)
    return int(not all_judged)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

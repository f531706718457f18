"""Test other libraries with the specification.

    python -m venv others
    others/bin/pip install -r requirements.txt torchvision diffusers denoising-diffusion-pytorch
    git clone https://github.com/openai/improved-diffusion && git -C improved-diffusion checkout 1bc7bbb
    git clone https://github.com/w86763777/pytorch-ddpm && git -C pytorch-ddpm checkout f804ccb
    PYTHONPATH=improved-diffusion:pytorch-ddpm others/bin/python tests/adapters/run.py
    others/bin/python tests/adapters/run.py diffusers -- -k ddim      one library, with flags of pytest

Each library is tested twice: in float64, where float32 tables break the rule of precision, and with the tolerances
of float32. The output is the table at the end of each run, or everything with flags of pytest.
docs/specification.md explains the results. Exit status 1 if a library could not be tested. Failed tests are not an
error here.
"""

import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
NAMES = ("diffusers", "denoising_diffusion_pytorch", "improved_diffusion", "pytorch_ddpm")
SECTIONS = (
    "schedules,forward,posterior,parametrisation,loss,ancestral,ddim,bound,network,single_step"
)


def run(name, precision, flags):
    """Test one library. Return the output, and whether the tests could run."""
    command = [sys.executable, "-m", "pytest", HERE.parent / "specification", "-q", "--tb=line"]
    command += ["-p", "no:warnings", "--hypothesis-profile=quick", "--ddpm", HERE / f"{name}.py"]
    command += ["--only", SECTIONS, "--precision", precision, *flags]
    done = subprocess.run(command, text=True, capture_output=True, cwd=HERE.parent.parent)
    if done.returncode not in (0, 1):
        return done.stderr.strip(), False
    if flags:
        return done.stdout, True
    lines = done.stdout[done.stdout.find("section  ") :].splitlines()
    table = [line for line in lines if not line.startswith(("FAILED", "broken rule", "=="))]
    return "\n".join(table), True


def main(arguments):
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    names = arguments[:cut] or NAMES
    flags = arguments[cut + 1 :]
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"no adapter {unknown[0]}; choose from {', '.join(NAMES)}", file=sys.stderr)
        return 2
    all_ran = True
    for name in names:
        for precision in ("float64", "float32"):
            output, ran = run(name, precision, flags)
            all_ran = all_ran and ran
            print(f"{name}, {precision}\n{output}\n", flush=True)
    return 0 if all_ran else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

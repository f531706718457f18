"""The README is true: its commands and code run, its map and its numbers are those of the files."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from mutants import CATALOGUE

import sample
import train

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [part.split("#")[0].strip() for language, block in BLOCKS if language == "bash"
            for line in block.splitlines() for part in line.split(" && ")]  # fmt: skip

# What makes a command of the README take seconds: added at its end, where it wins.
SHORT = {
    "train.py": "--epochs 1 --limit 32 --batch-size 8 --width 8 --timesteps 5 --sample-every 1 --out {ckpt}",
    "sample.py": "--ckpt {ckpt} --n 3 --steps 2",
    "evaluate.py": "--ckpt {ckpt} --n 2",
    "-m pytest": "--collect-only -q",
    "tests/mutants.py": "t = 1 is never drawn",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder that looks like the project, with a small checkpoint in it."""
    folder = tmp_path_factory.mktemp("project")
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.suffix not in (".pt", ".png"):
            (folder / path.name).symlink_to(path)
    run(f"train.py {SHORT['train.py'].format(ckpt='ckpt.pt')}", folder)
    return folder


def run(command, folder):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=folder, env=env, text=True,
                          capture_output=True, timeout=100)  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_there_are_two_commands_for_a_fresh_machine_and_they_set_up_all():
    """Each makes the environment, installs requirements.txt, and runs the main job or the tests."""
    first, second = [block.strip() for language, block in BLOCKS if language == "bash"][:2]
    setup = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python "
    assert first.startswith(setup + "train.py") and second == setup + "-m pytest"


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_every_command_of_the_readme_runs(command, project):
    """As it stands, but shortened: fewer epochs, images and steps. Without a network, CIFAR-10's flags
    and torchrun's are only parsed."""
    if command in ("python3 -m venv .venv", ".venv/bin/pip install -r requirements.txt"):
        assert (project / "requirements.txt").is_file()
    elif "cifar10" in command:
        train_flags = shlex.split(command.split("train.py")[1])
        assert train.with_recipe(sample.parse_flags(train.Config, "", train_flags)[0]).lr == 2e-4
    elif "path/to/images" in command:
        (project / "path/to").mkdir(parents=True, exist_ok=True)
        if not (project / "path/to/images").exists():
            (project / "path/to/images").symlink_to(ROOT / "docs")
        flags = SHORT["train.py"].format(ckpt="other.pt")
        run(command.removeprefix(".venv/bin/python ") + " " + flags, project)
    elif "--resume" in command:
        run(command.removeprefix(".venv/bin/python ") + " --epochs 2 --out again.pt", project)
    else:
        script = next(name for name in SHORT if name in command)
        assert command.startswith(".venv/bin/python ")
        short = SHORT[script].format(ckpt="ckpt.pt")
        run(f"{command.removeprefix('.venv/bin/python ')} {short}", project)


def test_the_code_of_the_readme_runs_and_prints_what_it_says(project):
    [code] = [block for language, block in BLOCKS if language == "python"]
    expected = re.search(r"print\(.*# (.*)", code)[1]
    assert run(f"-c {shlex.quote(code)}", project).strip() == expected


def test_the_map_of_the_readme_gives_the_lines_equations_and_tests_of_each_section():
    lines = (ROOT / "ddpm.py").read_text().splitlines()
    starts = {n: i for i, line in enumerate(lines, 1) if line.startswith("# --- ")
              for n in re.findall(r"\d", line.split(". ")[0])}  # fmt: skip
    ends = sorted({*starts.values(), len(lines) + 1})
    rows = re.findall(r"^\| (\d) ([\w ]+) \| (\d+)-(\d+) \| (.*?) \| `(.*?)` \|", README, re.MULTILINE)
    assert [row[0] for row in rows] == list("123456789")
    for n, title, first, last, equations, test in rows:
        start = starts[n]
        end = next(e for e in ends if e > start) - 1
        assert (int(first), int(last)) == (start, end), f"section {n} is lines {start}-{end}"
        assert (ROOT / test).is_file() and test.startswith(f"tests/test_{n}_")
        in_file = next(line for line in lines if line.startswith(f"    {n}  {title} "))
        assert equations == in_file[29:59].strip()


def test_the_numbers_of_the_readme_are_those_of_the_files(pytestconfig):
    assert f"in {len((ROOT / 'ddpm.py').read_text().splitlines())} lines" in README.replace("\n", " ")
    assert f"{len(CATALOGUE)} of {len(CATALOGUE)}" in README
    assert (ROOT / "docs" / "grid.png").is_file()

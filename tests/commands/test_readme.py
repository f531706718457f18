"""The README and the other pages are true: their commands run, their numbers are those of the files."""

import ast
import os
import re
import shlex
import subprocess
import sys

import pytest
from mutants import CATALOGUE
from running import ROOT, stripes

import evaluate
import figures
import sample
import train
from support import command as command_line
from support import recipes

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
BLOCKS = BLOCK.findall(README)
COMMANDS = [part.split("#")[0].strip() for page in PAGES
            for language, block in BLOCK.findall(page.read_text()) if language == "bash"
            for line in block.splitlines() for part in line.split(" && ")]  # fmt: skip

# What makes a command take seconds: added at its end, where it wins.
SHORT = {
    "train.py": "--epochs 1 --limit 32 --batch-size 8 --micro-batch 8 --width 8 --timesteps 5 "
    "--sample-every 0",
    "sample.py": "--n 3 --steps 2",
    "evaluate.py": "--n 2",
    "figures.py": "--n 2 --out figures",
    "-m pytest": "--collect-only -q tests/specification/test_1_schedules.py",
    "tests/mutants.py": "t = 1 is never drawn",
    "tests/mutate.py": None,  # these take minutes, whatever is added; .ci/run runs two of them
    "tests/faults.py": None,
    ".ci/run": None,
}


def run(command, folder=ROOT):
    """What a Python command prints, as a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=folder, env=env, text=True,
                          capture_output=True, timeout=100)  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_there_are_two_commands_for_a_fresh_machine_and_they_set_up_all():
    """Each makes the environment, installs requirements.txt, and runs the main job or the tests."""
    first, second = [block.strip() for language, block in BLOCKS if language == "bash"][:2]
    setup = (
        "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python "
    )
    assert first.startswith(setup + "train.py") and second == setup + "-m pytest"


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_every_command_of_the_pages_runs(command, call, tmp_path, request):
    """As it stands, but shortened: fewer epochs, images and steps. Without a network, those that want
    CIFAR-10 are only parsed."""
    words = shlex.split(command.removeprefix(".venv/bin/").removeprefix("python "))
    script = next((name for name in SHORT if name in command), None)
    if "cifar10" in command:
        flags = command_line.parse_flags(train.Config, "", words[words.index("train.py") + 1 :])[0]
        assert recipes.complete(flags, "cuda").lr == 2e-4
    elif "--ddpm" in command:  # test_judging.py judges; here the flags are parsed
        assert request.config._parser.parse(words[words.index("pytest") + 1 :]).ddpm.endswith(
            "my_ddpm.py"
        )
    elif script is None:
        assert command in ("python3 -m venv .venv", ".venv/bin/pip install -r requirements.txt")
        assert (ROOT / "requirements.txt").is_file()
    elif SHORT[script] is None:
        assert (ROOT / script).is_file()
    elif not script.endswith(".py") or script.startswith("tests/"):
        run(" ".join(words) + " " + SHORT[script])
    else:
        (tmp_path / "path" / "to" / "images" / "class").mkdir(parents=True)
        for i in range(3):
            stripes(40 + i, 50).save(tmp_path / "path" / "to" / "images" / "class" / f"{i}.png")
        if script != "train.py" or "--resume" in words:
            ckpt = words[words.index("--ckpt") + 1] if "--ckpt" in words else "ckpt.pt"
            assert (
                call(train, *SHORT["train.py"].split(), "--out", ckpt, "--log", "log.jsonl")[0] == 0
            )
            epochs = ["--epochs", 2, "--sample-every", 0]
        short = epochs if "--resume" in words else SHORT[script].split()
        module = {"train.py": train, "sample.py": sample, "evaluate.py": evaluate,
                  "figures.py": figures}[script]  # fmt: skip
        status, _, err = call(module, *words[1:], *short)
        assert status == 0, err


def test_the_code_of_the_readme_runs_and_prints_what_it_says():
    [code] = [block for language, block in BLOCKS if language == "python"]
    expected = re.search(r"print\(.*# (.*)", code)[1]
    assert run(f"-c {shlex.quote(code)}").strip() == expected


def test_the_map_of_the_readme_gives_the_lines_equations_and_tests_of_each_section():
    lines = (ROOT / "ddpm.py").read_text().splitlines()
    starts = {n: i for i, line in enumerate(lines, 1) if line.startswith("# --- ")
              for n in re.findall(r"\d", line.split(". ")[0])}  # fmt: skip
    ends = sorted({*starts.values(), len(lines) + 1})
    rows = re.findall(
        r"^\| (\d) ([\w ]+) \| (\d+)-(\d+) \| (.*?) \| `(.*?)` \|", README, re.MULTILINE
    )
    assert [row[0] for row in rows] == list("123456789")
    for n, title, first, last, equations, test in rows:
        start = starts[n]
        end = next(e for e in ends if e > start) - 1
        assert (int(first), int(last)) == (start, end), f"section {n} is lines {start}-{end}"
        assert (ROOT / test).is_file() and test.startswith(f"tests/specification/test_{n}_")
        in_file = next(line for line in lines if line.startswith(f"    {n}  {title} "))
        assert equations == in_file[29:59].strip()


def test_the_numbers_of_the_pages_are_those_of_the_files(request):
    everything = "\n".join(page.read_text() for page in PAGES)
    text = README.replace("\n", " ")
    assert f"in {len((ROOT / 'ddpm.py').read_text().splitlines())} lines of PyTorch" in text
    assert f"(improved.py), {len((ROOT / 'improved.py').read_text().splitlines())} lines," in text
    killed = re.findall(r"(\d+) of \d+ killed(?: by the test|\s\|)", everything)
    assert {int(n) for n in killed} == {
        len(CATALOGUE)
    } and f"applies {len(CATALOGUE)} mistakes" in text
    if len({item.path for item in request.session.items}) == len(
        list(ROOT.glob("tests/*/test_*.py"))
    ):
        counts = set(re.findall(r"(\d+) tests", everything))
        assert counts == {str(len(request.session.items))}, len(request.session.items)


def test_the_table_of_faults_has_the_kinds_and_the_runs_of_the_script():
    page = (ROOT / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| ([\w ,]+) \| .* \| (\d+) \| \d+.*\|$", page, re.MULTILINE)
    [table] = [
        node.value
        for node in ast.parse((ROOT / "tests" / "faults.py").read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "FAULTS"
    ]
    assert [(name, int(n)) for name, n in rows] == [
        (f.elts[0].value, f.elts[2].value) for f in table.elts
    ]
    total = sum(int(n) for _, n in rows)
    assert f"{total:,} of {total:,}" in README


def test_the_readme_is_read_in_a_sitting_and_its_links_lead_somewhere():
    """At most 120 lines; every file that a page names is there."""
    assert len(README.splitlines()) <= 120
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"

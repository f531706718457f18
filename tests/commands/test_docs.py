"""The README and the pages of docs/ are correct: code runs, commands parse, links exist."""

import contextlib
import importlib
import io
import re
import shlex
import subprocess
import sys
import types

import pytest
import torch
from running import ROOT, TINY

from support import command

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS, *sorted(ROOT.glob("weights/*/README.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page, language):
    """The code blocks of a page in one language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


# --- Python --------------------------------------------------------------------------------------


class TheirNetwork(torch.nn.Module):
    """Replaces diffusers.UNet2DModel: its result has a .sample. It records the timesteps."""

    timesteps = []  # noqa: RUF012

    def __init__(self, **settings):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, sample, timestep):
        self.timesteps.extend(timestep.tolist())
        return types.SimpleNamespace(sample=self.weight * sample)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, trained):
    """{page: output of each Python block}; the blocks of a page run one after the other."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "diffusers", types.SimpleNamespace(UNet2DModel=TheirNetwork))
        for page in PAGES:
            found[page] = []
            names = {}
            folder = tmp_path_factory.mktemp(page.stem)
            (folder / "ckpt.pt").symlink_to(trained[0] / "ckpt.pt")
            with contextlib.chdir(folder):
                for code in blocks(page, "python"):
                    out = io.StringIO()
                    with contextlib.redirect_stdout(out):
                        exec(compile(code, page.name, "exec"), names)
                    found[page].append(out.getvalue())
    return found


@each_page
def test_python_blocks_run_and_print_what_their_comments_say(page, outputs):
    for code, out in zip(blocks(page, "python"), outputs[page], strict=True):
        promised = re.findall(r"^\s*print\(.*\) +# (.*)$", code, re.MULTILINE)
        missing = set(promised) - set(out.splitlines())
        assert not missing, out


def percentage(page, word, outputs):
    [out] = [out for out in outputs[page] if word in out]
    return int(re.search(r"(\d+)%", out)[1])


def test_the_example_of_points_generates_half_moons(outputs):
    assert percentage(ROOT / "docs/your-code.md", "moons", outputs) >= 95


def test_the_example_of_signals_generates_sines(outputs):
    assert percentage(ROOT / "docs/your-code.md", "frequency", outputs) >= 85


def test_the_second_order_sampler_is_at_least_five_times_more_accurate(outputs):
    [out] = [out for out in outputs[ROOT / "docs/your-code.md"] if out.startswith("0.04")]
    first_order, second_order = map(float, out.split())
    assert 5 * second_order <= first_order


def test_the_example_with_diffusers_counts_timesteps_from_0(outputs):
    sampling = TheirNetwork.timesteps[8:]  # after a training batch of 8
    assert all(0 <= t < 1000 for t in TheirNetwork.timesteps)
    assert sampling == [t for t in range(999, 0, -50) for _ in range(4)]


# --- Commands ------------------------------------------------------------------------------------


def commands(page):
    """The shell commands of a page, without comments."""
    for text in blocks(page, "bash") + blocks(page, "sh"):
        for line in text.replace("&&\n", "&& ").splitlines():
            yield from (part.split(" #")[0].strip() for part in line.split("&&"))


ALL_COMMANDS = sorted({text for page in PAGES for text in commands(page) if text})


@pytest.mark.parametrize("text", ALL_COMMANDS)
def test_commands_of_the_pages_have_valid_flags_and_name_existing_files(text):
    words = shlex.split(text)
    scripts = [word for word in words if word.endswith(".py") and (ROOT / word).exists()]
    named = [word for word in words if re.fullmatch(r"(tests|benchmarks|\.ci)/\S+", word)]
    for path in named:
        assert (ROOT / path).exists(), path
    if scripts and "/" not in scripts[0]:  # a command of this project
        module = importlib.import_module(scripts[0].removesuffix(".py"))
        flags = words[words.index(scripts[0]) + 1 :]
        command.parse_flags(module.Config, module.__doc__, flags)


def test_the_readme_sets_up_and_runs_everything_with_two_commands(tmp_path):
    """Run the first one without installing, and shortened; check that the second one runs pytest."""
    first, second = blocks(README, "bash")[:2]
    setup, install, train, sample = [part.strip() for part in first.split("&&")]
    assert (setup, install) == (
        "python3 -m venv .venv",
        ".venv/bin/pip install -r requirements.txt",
    )
    assert [part.strip() for part in second.split("&&")] == [
        setup,
        install,
        ".venv/bin/python -m pytest",
    ]
    sample = sample.replace("--steps 50", "--steps 3")
    for text, shorter in ((train, TINY), (sample, ["--n", "4"])):
        _, script, *flags = text.split()
        run = [sys.executable, ROOT / script, *flags, *shorter]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "grid.png").exists()


# --- Text ----------------------------------------------------------------------------------------


def anchors(page):
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@each_page
def test_links_and_pictures_of_a_page_exist(page):
    for target in re.findall(r"\]\((?!http)(.*?)\)", page.read_text()):
        name, _, heading = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not heading or heading in anchors(file), target


@each_page
def test_formulas_survive_markdown(page):
    """Markdown removes a backslash before punctuation, and needs spaces around inline formulas."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    displayed = re.findall(r"^\$\$(.*?)\$\$", text, re.DOTALL | re.MULTILINE)
    text = re.sub(r"^\$\$.*?\$\$", "", text, flags=re.DOTALL | re.MULTILINE)
    inline = re.findall(r"(?<![\w\"$])\$(?! )([^$]+?)(?<! )\$(?![\w\"$])", text)
    assert text.count("$") == 2 * len(inline)
    for formula in [*displayed, *inline]:
        assert not re.search(r"\\[^A-Za-z\s]", formula), formula
        assert formula.count("{") == formula.count("}"), formula
        assert formula.count("(") == formula.count(")"), formula


def test_the_map_of_the_readme_has_the_lines_equations_and_tests_of_each_section():
    lines = (ROOT / "ddpm.py").read_text().splitlines()
    starts = {}
    for number, line in enumerate(lines, 1):
        if heading := re.match(r"\s*# --- (\d)\. ", line):
            starts[heading[1]] = number
    rows = re.findall(r"^\| (\d) (.+?) \| (\d+) \| (.*?) \| `(.*?)` \|", README.read_text(), re.M)
    assert [row[0] for row in rows] == list("12345678")
    for number, title, start, equations, test in rows:
        assert int(start) == starts[number]
        [row] = [line for line in lines if line.startswith(f"    {number}  {title} ")]
        assert equations in row
        assert (ROOT / test).is_file()

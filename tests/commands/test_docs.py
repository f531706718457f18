"""The pages of docs/ are true: their code runs and prints what they say, their links lead somewhere."""

import contextlib
import io
import re
import sys
import types

import pytest
import torch
from running import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
STEPS = []  # t as the stand-in for a network of diffusers was told them


class TheirNetwork(torch.nn.Module):
    """What is used of diffusers.UNet2DModel: a call (sample, timestep) whose result has a .sample."""

    def __init__(self, **settings):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, sample, timestep):
        STEPS.extend(timestep.tolist())
        return types.SimpleNamespace(sample=self.weight * sample)


def blocks(page):
    """The Python code of a page, in order."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def anchors(text):
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def promised(code):
    """What a block says that it prints: the comments behind its calls of print that have one."""
    return re.findall(r"^\s*print\(.*\) +# (.*)$", code, re.MULTILINE)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What each block of each page prints, a page's blocks run one after another, in an empty folder."""
    done = {}

    def run(page):
        if page not in done:
            names, done[page] = {}, []
            with contextlib.chdir(tmp_path_factory.mktemp(page.stem)):
                for code in blocks(page):
                    out = io.StringIO()
                    with contextlib.redirect_stdout(out):
                        exec(compile(code, page.name, "exec"), names)
                    done[page].append(out.getvalue())
        return done[page]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "diffusers", types.SimpleNamespace(UNet2DModel=TheirNetwork))
        yield run


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_code_runs_and_prints_what_its_comments_say(page, printed):
    for code, out in zip(blocks(page), printed(page), strict=True):
        said = [line for line in out.splitlines() if line in promised(code)]
        assert said == promised(code), f"{code}\nprinted:\n{out}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_picture_of_a_page_is_there(page):
    for text, target in re.findall(r"\[(.*?)\]\((?!http)(.*?)\)", page.read_text()):
        name, _, heading = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {text} -> {target}"
        if heading:
            assert heading in anchors(file.read_text()), f"{page.name}: {text} -> {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_mathematics_of_a_page_survives_markdown(page):
    """A backslash before punctuation is Markdown's, and would be gone; a formula in a line ends in that line;
    what precedes or follows its dollars is no quote, letter or digit; braces come in pairs."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    blocks = re.findall(r"^\$\$(.*?)\$\$", text, re.DOTALL | re.MULTILINE)
    text = re.sub(r"^\$\$.*?\$\$", "", text, flags=re.DOTALL | re.MULTILINE)
    inline = re.findall(r"(?<![\w\"$])\$(?! )([^$\n]+?)(?<! )\$(?![\w\"$])", text)
    assert text.count("$") == 2 * len(inline), [
        line for line in text.splitlines() if line.count("$") % 2
    ]
    for formula in [*blocks, *inline]:
        assert not re.search(r"\\[^A-Za-z]", formula), formula
        assert formula.count("{") == formula.count("}") and formula.count("(") == formula.count(
            ")"
        ), formula


def percent(out):
    return int(re.search(r"(\d+)%", out)[1])


def test_the_example_of_points_draws_the_shape(printed):
    """All but a few samples are on the moons; of points of noise, cut to the square, few are."""
    page = ROOT / "docs/your-code.md"
    assert percent(next(out for out in printed(page) if "moons" in out)) >= 95


def test_the_example_of_signals_draws_sines(printed):
    page = ROOT / "docs/your-code.md"
    assert percent(next(out for out in printed(page) if "frequency" in out)) >= 90


def test_the_example_with_diffusers_tells_its_network_steps_that_count_from_0(printed):
    """For 20 even steps of 1..1000: 999, 949, .., 49, and whatever the loss drew in 0..999."""
    printed(ROOT / "docs/your-code.md")
    training, sampling = STEPS[:8], STEPS[8:]
    assert all(0 <= t < 1000 for t in training)
    assert sampling == [t for t in range(999, 0, -50) for _ in range(4)]

"""Every picture in the repository opens, has the size that its page expects, and can be drawn again."""

import re
import subprocess

import pytest
from PIL import Image
from running import ROOT

# docs/figures/redraw.py draws all pictures that need no photos. The pages have the other commands.
REDRAW = "docs/figures/redraw.py"
TRAINING = "docs/training.md"
CIFAR = "docs/cifar10.md"

# Each picture: its size, the file with the command that draws it, and words of that command. Update the
# size when a picture is drawn again, and check that it still looks right on its page.
PICTURES = {
    "docs/figures/cifar10.png": ((530, 662), CIFAR, "--out cifar10.png"),
    "docs/figures/cifar10-guided.png": ((530, 662), CIFAR, "--out cifar10-guided.png"),
    "docs/figures/cifar10-loss.png": ((800, 340), CIFAR, "--only loss"),
    "docs/figures/embedding.png": ((728, 410), REDRAW, "--ckpt ckpt.pt --log log.jsonl"),
    "docs/figures/epochs.png": ((745, 366), REDRAW, "--ckpt ckpt.pt --log log.jsonl"),
    "docs/figures/few-loss.png": ((800, 340), REDRAW, "--only loss --log few.jsonl"),
    "docs/figures/few-nearest.png": ((1536, 192), TRAINING, "--out nearest.png"),
    "docs/figures/forward.png": ((804, 162), REDRAW, "--ckpt ckpt.pt --log log.jsonl"),
    "docs/figures/guidance.png": ((790, 366), REDRAW, "--ckpt ckpt.pt --log log.jsonl"),
    "docs/figures/interpolation.png": ((813, 468), REDRAW, "--ckpt ckpt.pt --log log.jsonl"),
    "docs/figures/loss.png": ((800, 340), REDRAW, "--ckpt ckpt.pt --log log.jsonl"),
    "docs/figures/photos-epochs.png": ((756, 774), TRAINING, "figures.py --ckpt ckpt.pt"),
    "docs/figures/photos-nearest.png": ((1536, 192), TRAINING, "--out nearest.png"),
    "docs/figures/photos.png": ((1322, 134), TRAINING, "sample.py --ckpt ckpt.pt --out photos.png"),
    "docs/figures/points.png": ((726, 560), REDRAW, "points.png"),
    "docs/figures/rate.png": ((620, 380), REDRAW, "--ckpt ckpt.pt --log log.jsonl"),
    "docs/figures/reverse.png": ((839, 434), REDRAW, "--ckpt ckpt.pt --log log.jsonl"),
    "docs/figures/schedules.png": ((828, 290), REDRAW, "--ckpt ckpt.pt --log log.jsonl"),
    "docs/figures/shared.png": ((745, 332), REDRAW, "--ckpt ckpt.pt --log log.jsonl"),
    "docs/figures/steps.png": ((767, 360), REDRAW, "--ckpt ckpt.pt --log log.jsonl"),
    "docs/figures/terms.png": ((880, 380), REDRAW, "--ckpt learned.pt --only terms"),
    "docs/figures/unet.png": ((760, 472), REDRAW, "--ckpt ckpt.pt --log log.jsonl"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_decodes_to_its_last_pixel_and_has_its_size(name):
    size, _, _ = PICTURES[name]
    with Image.open(ROOT / name) as picture:
        assert picture.size == size
        picture.load()  # decodes everything, and checks the checksums on the way


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_drawn_by_a_documented_command(name):
    _, where, words = PICTURES[name]
    text = " ".join((ROOT / where).read_text(encoding="utf-8").split())
    assert words in text, f"{where} does not say: {words}"


def test_no_picture_is_missing_from_the_table():
    endings = ("*.png", "*.gif", "*.webp", "*.jpg", "*.jpeg")
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    command = ["git", "ls-files", *endings]
    listed = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    assert set(listed.stdout.split()) == set(PICTURES)


def test_every_picture_is_shown_on_a_page():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = set()
    for page in pages:
        for target in re.findall(r"!\[[^]]*\]\(([^)]*)\)", page.read_text(encoding="utf-8")):
            shown.add((page.parent / target).resolve())
    assert shown == {(ROOT / name).resolve() for name in PICTURES}

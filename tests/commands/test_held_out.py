"""Images that are never trained on, seeded choices of images, and a folder that has been moved."""

import json
import pathlib

import numpy as np
import pytest
import torch
from judge import close
from PIL import Image
from running import TINY

import ddpm
import evaluate
import improved
import train
from support import batches, checkpoint, data
from support.data import folder

RUN = [flag for flag in TINY if flag not in ("--limit", "64")] + ["--size", 8, "--epochs", 1]


@pytest.fixture
def album(tmp_path):
    """A folder of 60 images in two subfolders, no two of one colour."""
    for i in range(60):
        path = tmp_path / "album" / ("ant", "bee")[i >= 30] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (4 * i, 255 - 4 * i, 128)).save(path)
    return tmp_path / "album"


def colours(images):
    return {int(image[0, 0, 0]) for image in images}


def part(name, which, **how):
    return data.load(str(name), which, str(name.parent / "cache"), (8, 8), 3, labels=True, **how)


@pytest.mark.parametrize(
    "count, held", [(1, 0), (39, 0), (40, 2), (60, 3), (10_000, 500), (10**6, 512)]
)
def test_a_twentieth_is_held_out_from_forty_images_on_and_512_at_most(count, held):
    training, apart = folder.chosen(count, "training"), folder.chosen(count, "held out")
    assert len(apart) == held == folder.held_out(count)
    assert sorted(training + apart) == list(range(count)) == folder.chosen(count, "all")


def test_what_is_held_out_is_a_choice_of_all_images_and_the_same_each_time():
    apart = folder.chosen(1000, "held out")
    assert apart == folder.chosen(1000, "held out") and max(np.diff([0, *apart, 1000])) < 200


def test_a_run_never_trains_on_what_is_held_out(album, call, monkeypatch):
    """Every colour that a batch had, in two epochs, is one of the other images."""
    seen, draw = set(), batches.draw

    def watched(*args):
        batch = draw(*args)
        seen.update(((batch[0][:, 0, 0, 0] + 1) * 127.5).round().int().tolist())
        return batch

    monkeypatch.setattr(batches, "draw", watched)
    status, out, err = call(train, "--data", album, "--labels", *RUN, "--epochs", 2)
    assert status == 0 and "57 images" in out and "3 more are held out" in out, err
    assert seen == colours(part(album, "training").images)
    assert not seen & colours(part(album, "held out").images)


@pytest.mark.parametrize("flags", [[], ["--labels"], ["--variance", "learned"]], ids=str)
def test_the_loss_on_held_out_images_is_that_of_the_average_at_the_same_draws(album, call, flags):
    """In the log at the end of each epoch; by a second computation, one image at a time."""
    status, out, err = call(
        train, "--data", album, *RUN, *flags, "--epochs", 2, "--log", "log.jsonl"
    )
    assert status == 0, err
    last = [json.loads(line) for line in pathlib.Path("log.jsonl").read_text().splitlines()][-1]
    assert f"held out {last['held_out']:.4f}" in out
    ckpt, net, d = checkpoint.load_model("ckpt.pt")
    (images, labels, _), apart = data.held_out(ckpt)
    assert apart and len(images) == 3
    losses, count = [], 16
    for x0, y, t, eps in batches.fixed(
        data.Data(images, labels, []), d.T, count, torch.device("cpu"), 1
    ):

        def model(xt, t, y=y):
            return net(xt, t, y)

        eps_model = improved.eps_only(model) if "learned" in flags else model
        losses.append(ddpm.loss_simple(eps_model, d, x0, t, eps))
    assert len(losses) == count
    close("held-out loss", last["held_out"], torch.stack(losses).mean().item(), 1e-5, 1.0)


def test_the_draws_of_the_held_out_loss_are_every_image_with_steps_from_1_to_T():
    """The same at each call, at any number at a time; t is spread evenly and does not go with the image."""
    images = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1).expand(10, 1, 4, 4)
    held, cpu = data.Data(images, torch.arange(10), []), torch.device("cpu")
    once, again = ([torch.cat(column) for column in zip(*batches.fixed(held, 50, 100, cpu, few))]
                   for few in (7, 100))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(once, again))
    _, y, t, eps = once
    assert (
        y.bincount().tolist() == [10] * 10 and t.bincount(minlength=51).tolist() == [0] + [2] * 50
    )
    assert abs(np.corrcoef(y, t)[0, 1]) < 0.3 and abs(eps.mean()) < 0.1 and abs(eps.std() - 1) < 0.1


def test_fewer_than_forty_images_hold_none_out_and_the_log_says_so(album, call):
    for path in sorted(album.rglob("*.png"))[35:]:
        path.unlink()
    status, out, err = call(train, "--data", album, *RUN, "--log", "log.jsonl")
    assert status == 0 and "none are held out" in out and ", held out" not in out, err
    assert (
        json.loads(pathlib.Path("log.jsonl").read_text().splitlines()[-1]).get("held_out", "") == ""
    )
    assert "35 images it was trained on" in call(evaluate, "--ckpt", "ckpt.pt")[1]


def test_a_limit_is_a_seeded_choice_over_all_images_and_decodes_no_others(album):
    """Of both classes, not the first by name; the images that are held out stay the same ones."""
    few = part(album, "training", limit=20)
    assert len(few.images) == 20 and 5 < few.labels.sum() < 15 and few.classes == ["ant", "bee"]
    assert colours(few.images) < colours(part(album, "training").images)
    (album / "ant" / "broken.png").write_text("no image")
    for limit in range(1, 57):  # until the choice has the broken one
        names = [folder.listed(album)[i].name for i in folder.chosen(61, "training", limit)]
        if "broken.png" in names:
            break
        assert len(part(album, "training", limit=limit).images) == limit


def test_evaluation_takes_what_was_held_out_wherever_the_folder_lies(album, call, tmp_path):
    """And all the images of another folder. --n is a seeded choice too."""
    assert call(train, "--data", album, *RUN)[0] == 0
    assert "3 held-out images of" in call(evaluate, "--ckpt", "ckpt.pt")[1]
    album.rename(tmp_path / "moved")
    status, out, err = call(evaluate, "--ckpt", "ckpt.pt", "--data", "moved")
    assert status == 0 and "3 held-out images of moved" in out, err
    for i in range(3):
        (tmp_path / "other").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (i, 7, 7)).save(tmp_path / "other" / f"{i}.png")
    assert "3 held-out images of other" in call(evaluate, "--ckpt", "ckpt.pt", "--data", "other")[1]
    assert (
        "2 held-out images of other"
        in call(evaluate, "--ckpt", "ckpt.pt", "--data", "other", "--n", 2)[1]
    )


def test_a_run_goes_on_with_its_images_wherever_they_lie(album, call, tmp_path):
    """--data names the new place; without it, the error says so. Other images are refused."""
    assert call(train, "--data", album, *RUN)[0] == 0
    album.rename(tmp_path / "moved")
    status, _, err = call(train, "--resume", "ckpt.pt", "--epochs", 2)
    assert status == 1 and "album" in err and "--data" in err and err.count("\n") == 1
    status, _, err = call(train, "--resume", "ckpt.pt", "--epochs", 2, "--data", "moved")
    assert status == 0 and checkpoint.load("ckpt.pt")["config"]["data"] == str(
        tmp_path / "moved"
    ), err
    Image.new("RGB", (8, 8)).save(next((tmp_path / "moved").rglob("*.png")))
    (tmp_path / "moved" / "ant" / "00.png").write_bytes(
        (tmp_path / "moved" / "ant" / "01.png").read_bytes()
    )
    status, _, err = call(train, "--resume", "ckpt.pt", "--epochs", 3, "--data", "moved")
    assert status == 1 and "not the images" in err
    status, _, err = call(train, "--resume", "ckpt.pt", "--epochs", 3, "--data", "glyphs")
    assert status == 2 and "cannot change it" in err


def test_a_run_on_a_folder_that_was_begun_before_anything_was_held_out_is_refused(album, call):
    assert call(train, "--data", album, *RUN)[0] == 0
    saved = checkpoint.load("ckpt.pt")
    del saved["held_out"]
    saved.update(images=60, fingerprint=data.fingerprint(part(album, "all")._replace(labels=None)))
    checkpoint.save("old.pt", saved)
    status, _, err = call(train, "--resume", "old.pt", "--epochs", 2)
    assert status == 1 and "57 images, but 60 when this run began" in err and "held out" in err
    assert "60 images it was trained on" in call(evaluate, "--ckpt", "old.pt")[1]

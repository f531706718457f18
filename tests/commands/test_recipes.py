"""support/recipes.py: the settings that suit the data and the machine."""

from dataclasses import replace

import pytest
import torch

import ddpm
import train
from support import budget, recipes
from support.errors import UsageError

CPU = torch.device("cpu")
COST = budget.Cost("fp32", 32, 0.25, 0, 0)


def settings(images, seconds=0.25, device="cpu", step=0, **flags):
    """Return the settings of a new run on so many images, where a step takes so many seconds."""
    device = torch.device(device)
    cfg = recipes.complete(train.Config(**flags), set(flags), device)
    return recipes.measured(cfg, images, step, COST._replace(seconds=seconds), device)


@pytest.mark.parametrize("data, size, device, images, recipe", [
    ("glyphs", None, "cpu", 6000, dict(width=24, batch_size=32, warmup=20, epochs=100)),
    ("cifar10", None, "cuda", 50_000, dict(width=128, batch_size=128, dropout=0.1, warmup=3906)),
    ("cifar10", None, "cpu", 50_000, dict(width=32, epochs=7)),
    ("album", (32, 32), "cuda", 5000, dict(dropout=0.0, batch_size=128, lr=2e-4, epochs=128)),
    ("album", (128, 96), "cuda", 5000, dict(dropout=0.0, batch_size=64, lr=2e-4)),
    ("album", (256, 256), "mps", 5000, dict(dropout=0.0, batch_size=64, lr=2e-5, width=128)),
    ("album", (32, 32), "cpu", 5000, dict(width=32, epochs=76, warmup=100, schedule="cosine")),
])  # fmt: skip
def test_the_recipe_follows_from_the_data_their_size_and_the_device(
    data, size, device, images, recipe
):
    """App. B on a GPU, with dropout on CIFAR-10 only; on a CPU a small network, for 50 minutes."""
    cfg = settings(images, device=device, data=data, size=size)
    assert {name: getattr(cfg, name) for name in recipe} == recipe


def test_photos_on_a_cpu_train_for_enough_steps_as_far_as_50_minutes_allow():
    """At least 2,000 steps; 400 epochs of more images; and no longer than 50 minutes."""
    few = settings(64, seconds=0.1, data="album")
    assert few.epochs * 64 / 32 >= 2000
    assert settings(400, seconds=0.1, data="album").epochs == 400
    assert settings(64, seconds=30, data="album").epochs * 2 * 30 <= 50 * 60
    assert settings(5000, seconds=10_000, data="album").epochs == 1


def test_our_own_choice_is_not_warned_of(capsys):
    """For 64 to 100,000 photos on a CPU that takes 0.1 seconds a step, and for the digits."""
    d = ddpm.Diffusion(ddpm.cosine_schedule())
    for data, images in (("album", 64), ("album", 400), ("album", 100_000), ("glyphs", 6000)):
        cfg = settings(images, seconds=0.1, data=data)
        recipes.warn(cfg, images, d, 0.1)
        assert capsys.readouterr().err == ""


def test_too_few_steps_are_answered_with_what_to_type_and_how_long_it_takes(capsys):
    d = ddpm.Diffusion(ddpm.cosine_schedule())
    cfg = settings(64, data="album", epochs=3)
    recipes.warn(cfg, 64, d, seconds=0.5)
    words = "3 epochs are too few for good pictures; --epochs 1000 takes about 16:40"
    assert words in capsys.readouterr().err
    flat = ddpm.Diffusion(ddpm.linear_schedule(20))
    recipes.warn(replace(cfg, epochs=2000), 64, flat, 0.5)
    assert "x_T is not yet noise" in capsys.readouterr().err


def test_a_warm_up_as_long_as_the_run_is_reported(capsys):
    d = ddpm.Diffusion(ddpm.cosine_schedule())
    for warmup, reported in ((2000, True), (1999, False)):
        cfg = settings(64, data="album", epochs=1000, warmup=warmup)
        recipes.warn(cfg, 64, d, seconds=0.5)
        assert ("try a shorter --warmup" in capsys.readouterr().err) == reported


def test_minutes_choose_the_number_of_epochs():
    """6,000 images in batches of 32, at half a second a step: 4 epochs take 375 seconds."""
    assert settings(6000, seconds=0.5, minutes=7).epochs == 4
    assert settings(6000, seconds=0.5, minutes=7, step=750).epochs == 8  # beyond what is done
    assert settings(6000, seconds=60, minutes=1).epochs == 1


def test_a_small_networks_groups_have_many_channels_each():
    """A group of a few normalises away the means, and with them the colours; the paper has 32."""
    for width in range(4, 300, 4):
        cfg = train.Config(data="album", width=width)
        groups = recipes.network(cfg, (3, 32, 32), 0)["groups"]
        assert width % groups == 0 and (width // groups >= min(16, width) or width >= 128)
    cfg = train.Config(data="album", width=128)
    assert recipes.network(cfg, (3, 32, 32), 0)["groups"] == 32


def test_the_papers_networks_have_the_papers_parameters():
    for side, count in ((32, 35_746_307), (256, 113_673_219)):
        cfg = train.Config(data="album", width=128, dropout=0.0)
        with torch.device("meta"):
            net = ddpm.UNet(**recipes.network(cfg, (3, side, side), 0))
        assert sum(weight.numel() for weight in net.parameters()) == count


@pytest.mark.parametrize("parse, good, bad", [
    (recipes.size, {"64": (64, 64), "48x64": (48, 64)}, ["big", "0", "3x", "1x2x3", "9999", "-8"]),
    (recipes.micro_batch, {"auto": None, "8": 8}, ["0", "-1", "2.5", "some"]),
    (recipes.yes_or_no, {"yes": True, "no": False}, ["maybe", "True"]),
])  # fmt: skip
def test_a_flag_is_parsed_into_its_final_type_or_rejected(parse, good, bad):
    for text, value in good.items():
        assert parse(text) == value
    for text in bad:
        with pytest.raises(UsageError, match=f"{text}: must be"):
            parse(text)


@pytest.mark.parametrize("shape, factor", [((3, 30, 32), 8), ((1, 64, 60), 8), ((3, 250, 256), 32)])
def test_a_size_that_the_network_cannot_halve_is_rejected_with_one_that_works(shape, factor):
    cfg = train.Config(data="album", width=32, dropout=0.0)
    with pytest.raises(UsageError, match=f"multiples of {factor}; try (.*)x(.*)") as error:
        recipes.network(cfg, shape, 0)
    H, W = map(int, str(error.value).split("try ")[1].split("x"))
    recipes.network(cfg, (shape[0], H, W), 0)

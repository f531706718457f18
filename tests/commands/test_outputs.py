"""What a run writes, and that no run destroys another's."""

import pathlib
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import TINY

import sample
import train
from support import checkpoint, command, outputs

NAMES = st.text("ab.0123-", min_size=1, max_size=12).map(lambda name: name.strip(".") or "a")


@given(*[st.tuples(NAMES | NAMES.map(lambda name: f"{name}.pt"), st.integers(0, 99_999))] * 2)
def test_no_two_runs_share_the_name_of_a_grid(one, other):
    """A grid's name says which checkpoint it is beside, and after which epoch."""
    assert (outputs.grid_name(*one) == outputs.grid_name(*other)) == (one == other)
    assert outputs.grid_name(*one) not in (one[0], other[0])


@pytest.mark.parametrize("name", ["ckpt.pt", "ckpt", "a.b", ".pt", "x[1].pt", "ckpt.1.pt"])
def test_the_grids_of_a_checkpoint_are_its_own(tmp_path, name):
    """In the order of their epochs, and no picture of another run beside it."""
    out = str(tmp_path / name)
    for other in ("ckpt.pt", "ckpt", "a.b", ".pt", "x[1].pt", "ckpt.1.pt", "x1.pt"):
        for epoch in (2, 10, 20_000):
            pathlib.Path(outputs.grid_name(str(tmp_path / other), epoch)).touch()
    (tmp_path / f"{name}.0003x.png").touch()
    assert list(outputs.grids(out)) == [2, 10, 20_000]
    assert outputs.set_aside(out) and not outputs.grids(out)


def test_a_second_run_leaves_the_first_ones_checkpoint_and_grids(call, tmp_path):
    """They are renamed, and the new run says so; a third run takes the next number."""
    flags = [*TINY, "--epochs", 2, "--sample-every", 1]
    for seed in (0, 1, 2):
        status, _, err = call(train, *flags, "--seed", seed)
        assert status == 0 and (f"is now ckpt.{seed}.pt" in err) == (seed > 0), err
    seeds = {
        name: checkpoint.load(name)["config"]["seed"]
        for name in ("ckpt.1.pt", "ckpt.2.pt", "ckpt.pt")
    }
    assert seeds == {"ckpt.1.pt": 0, "ckpt.2.pt": 1, "ckpt.pt": 2}
    for run_of in ("ckpt", "ckpt.1", "ckpt.2"):
        assert all((tmp_path / f"{run_of}.000{epoch}.png").is_file() for epoch in (1, 2))
    status, _, err = call(train, "--resume", "ckpt.1.pt", "--epochs", 3)
    assert status == 0 and not (tmp_path / "ckpt.3.pt").exists() and "is now" not in err


def test_two_runs_at_once_do_not_share_an_out(call, monkeypatch, tmp_path):
    """The second is refused in one line; once the first has ended, its file makes way as ever."""
    refused = []

    def save(*args, save=train.save):
        save(*args)
        refused.append(call(train, *TINY, "--epochs", 1))

    monkeypatch.setattr(train, "save", save)
    assert call(train, *TINY, "--epochs", 1)[0] == 0
    [(status, _, err)] = refused
    assert (
        status == 1 and "--out ckpt.pt: another run is writing there; name another file\n" in err
    ), err
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert "is now ckpt.1.pt" in call(train, *TINY, "--epochs", 1)[2]


def test_a_run_that_is_refused_renames_nothing(call, tmp_path):
    (tmp_path / "ckpt.pt").write_text("the old one")
    for flags in (
        ["--width", 10],
        ["--log", "ckpt.pt"],
        ["--data", "nowhere"],
        ["--device", "none"],
    ):
        status, _, err = call(train, *TINY, *flags)
        assert status in (1, 2) and err.count("\n") == 1 and "ckpt.1.pt" not in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


@pytest.mark.parametrize("name", ["a b.pt", "--.pt", "it's.pt", "$HOME.pt"])
def test_the_command_that_is_offered_next_can_be_typed(name):
    """A shell and then argparse take it for the name."""
    words = shlex.split(f"--ckpt {command.typed(name)} --out a.png")
    taken = command.parse_flags(sample.Config, "", words)[0].ckpt
    assert pathlib.Path(taken) == pathlib.Path(name)


def test_the_first_command_can_be_typed_twice(call):
    for _ in range(2):
        assert call(train, *TINY, "--epochs", 1)[0] == 0
        status, _, err = call(
            sample, "--ckpt", "ckpt.pt", "--out", "grid.png", "--steps", 2, "--n", 2
        )
        assert status == 0, err

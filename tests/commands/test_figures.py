"""figures.py: what a figure plots is what the paper defines, and it is drawn whole or not at all."""

import inspect
import json
import re

import numpy as np
import pytest
import torch
from judge import close
from PIL import Image

import ddpm
import evaluate
import figures
import reference_numpy as ref
import train
from support import checkpoint
from support.plots import COLOURS, FAINT, numbers, sheet

LEVELS, WEIGHTS = (
    np.array([-1.0, -0.2, 1.0]),
    np.array([0.5, 0.3, 0.2]),
)  # of pixels: the best eps is known
BETA = ref.linear_beta(12, 0.01, 0.5)
D = ddpm.Diffusion(torch.tensor(BETA))


def best(xt, t):
    """The exact eps of that data, from the reference."""
    return torch.from_numpy(
        ref.eps_mixture(BETA, int(t[0]), xt.numpy(), WEIGHTS, LEVELS, np.zeros(3))
    )


def expected_x0(xt, t):
    """E[x0 | xt] of that data, by Bayes: the levels, weighted by how likely each makes xt."""
    a, v = ref.transition(BETA, 0, t)
    likely = WEIGHTS * np.exp(-((xt.numpy()[..., None] - a * LEVELS) ** 2) / (2 * v))
    return (likely * LEVELS).sum(-1) / likely.sum(-1)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def images(n, side=4):
    """n images of that data."""
    pixels = np.random.default_rng(0).choice(LEVELS, size=(n, 1, side, side), p=WEIGHTS)
    return torch.from_numpy((np.round((pixels + 1) * 127.5) / 127.5) - 1)


# --- What is plotted -----------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 4, 10, 50, 1000])
def test_a_row_of_pictures_shows_steps_from_T_to_0_as_even_as_whole_steps_can_be(T):
    at = figures.times(T)
    assert at[0] == T and at[-1] == 0 and len(at) == min(T, 10) + 1
    assert np.ptp(np.diff(at)) <= (0 if T % 10 == 0 else 1), at


def test_forward_shows_x_t_of_eq4_by_one_noise():
    x0, eps = torch.randn(2, 1, 1, 3, 3, dtype=torch.float64)
    for t, xt in zip([0, 1, 7, 12], figures.dissolved(x0, D, [0, 1, 7, 12], eps), strict=True):
        a, v = ref.transition(BETA, 0, t)
        close(f"x_{t}", xt, (a * x0 + np.sqrt(v) * eps)[0], 1e-13)


def test_the_similarity_of_two_steps_depends_on_how_far_apart_they_are_alone():
    """sin a sin b + cos a cos b = cos(a - b): the mean of cos((t - t') f_i) over the frequencies f_i."""
    t = np.arange(40)
    got = figures.similarity(ddpm.timestep_embedding(torch.from_numpy(t), 16))
    rates = 10000.0 ** -np.linspace(0, 1, 8)
    close("similarity", got, np.cos((t[:, None] - t)[..., None] * rates).mean(-1), 1e-5)


def test_reverse_shows_at_each_step_the_x0_that_eq15_has_the_best_model_see():
    """It is E[x0 | x_t], at the steps asked for; the walk starts at x_T and ends at its x_0."""
    xT = torch.randn(2, 1, 3, 3, dtype=torch.float64, generator=seeded(0)[0])
    at = [12, 7, 3, 1, 0]
    path = figures.walk(best, D, xT, at, seeded(1, 2), steps=4)
    assert list(path) == at and torch.equal(path[12][0], xT) and torch.equal(*path[0])
    for t in at[:-1]:
        xt, x0 = path[t]
        close(f"x0 at t = {t}", x0, expected_x0(xt, t), 1e-9)
    grid = sorted({3, 6, 9, 12, 7, 1})
    close(
        "x_0", path[0][0], ddpm.sample_ddim(best, D, xT, grid, 1.0, generator=seeded(1, 2)), 1e-13
    )


def test_samples_from_a_shared_x_1_are_nearly_the_image():
    """At t = 1 a model's error in eps moves x0 by sqrt((1 - alpha_bar_1) / alpha_bar_1) times as much."""
    d = ddpm.Diffusion(ddpm.linear_schedule())
    x0, eps = torch.rand(3, 1, 4, 4) * 2 - 1, torch.randn(3, 1, 4, 4)
    got = figures.decoded(
        lambda xt, t: torch.zeros_like(xt), d, d.q_sample(x0, 1, eps), 1, seeded(0, 1, 2)
    )
    a, v = ref.transition(ref.linear_beta(1000), 0, 1)
    assert (got - x0).abs().max() <= np.sqrt(v) / a * eps.abs().max() + 1e-6 < 0.05


def test_samples_from_a_shared_x_t_differ_by_their_seeds_and_less_for_smaller_t():
    x0, eps = images(1), torch.randn(1, 1, 4, 4, dtype=torch.float64)
    spread = []
    for t in (12, 6, 1):
        xt = D.q_sample(x0, t, eps).expand(64, -1, -1, -1)
        spread.append(float(figures.decoded(best, D, xt, t, seeded(*range(64))).var(0).mean()))
    assert spread[0] > 1.2 * spread[1] > 0 and spread[2] < 1e-12, spread


@pytest.mark.parametrize("t", [1, 5, 12])
def test_the_ends_of_an_interpolation_are_each_image_noised_and_decoded_alone(t):
    pair = images(2)
    eps = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    got = figures.interpolated(best, D, pair, t, [0, 0.5, 1], eps, seeded(7, 7, 7))
    for end, i in (0, 0), (2, 1):
        alone = figures.decoded(
            best, D, D.q_sample(pair[i : i + 1], t, eps[i : i + 1]), t, seeded(7)
        )
        close(f"share {end / 2}", got[end : end + 1], alone, 1e-12)


def test_an_interpolation_mixes_x_t_and_not_x_0():
    """Of one model call, from t = 1 to 0, the mixture is (1 - share) x_1 + share x'_1, eq. 15 of it."""
    pair, eps = images(2), torch.randn(2, 1, 4, 4, dtype=torch.float64)
    got = figures.interpolated(best, D, pair, 1, [0.25], eps, seeded(0))
    a, v = ref.transition(BETA, 0, 1)
    x1 = a * pair + np.sqrt(v) * eps
    close("mixture", got[0], expected_x0(0.75 * x1[0] + 0.25 * x1[1], 1), 1e-9)


def test_the_error_at_each_step_is_that_of_the_x0_which_the_best_model_sees():
    """And the terms are bound_terms', of the same draws."""
    x0, seen = images(3), {}

    def model(xt, t):
        seen[int(t[0])] = ((expected_x0(xt, int(t[0])) - x0.numpy()) ** 2).mean()
        return best(xt, t)

    terms, error = figures.bound_and_error(ddpm.bound_terms, model, D, x0, seeded(0, 1, 2))
    close("error", error, [seen[t] for t in range(1, 13)], 1e-9)
    want = ddpm.bound_terms(best, D, x0, [D.beta, D.beta_tilde], generator=seeded(0, 1, 2))
    assert torch.equal(terms, want)


def test_rate_and_distortion_count_what_a_receiver_of_x_T_to_x_t_has_paid():
    """Sec. 4.3, by hand for T = 3: x_3 costs L_3, x_2 L_2 more, x_1 L_1 more; L_0 is not paid for x_1."""
    L = torch.tensor([[8.0, 4.0, 2.0, 1.0]])
    bits, rmse = figures.rate_and_distortion(L, torch.tensor([0.01, 0.04, 0.25]))
    close("rate at t = 1, 2, 3", bits, [[7.0, 3.0, 1.0]], 0)
    close("RMSE", rmse, [12.75, 25.5, 63.75], 1e-6)


def printed_bound(text):
    """The rows of evaluate.py's table: {name: mean for each variance}."""
    rows = [re.match(r"(.{32})(.*)", line).groups() for line in text.splitlines()[2:]]
    return {
        name.strip(): [float(x) for x in re.findall(r"(-?\d+\.\d+) ±", cells)]
        for name, cells in rows
    }


@pytest.mark.parametrize("which", ["trained", "learned"])
def test_terms_sum_to_what_evaluate_prints_and_the_curve_ends_at_its_rate_and_L_T(
        which, request, call, monkeypatch):  # fmt: skip
    """Of the same images by the same seeds; evaluate.py prints five decimals, the legend three."""
    path = request.getfixturevalue("ckpt" if which == "trained" else which)
    status, out, err = call(evaluate, "--ckpt", path, "--n", 5, "--seed", 3, "--device", "cpu")
    assert status == 0, err
    bound = printed_bound(out)
    scene = figures.Scene(figures.Config(ckpt=str(path), n=5, seed=3, device="cpu"))
    terms, error = scene.bound
    total = next(values for name, values in bound.items() if name.startswith("bound"))
    close("sum of the terms", terms.mean(1).sum(1), total, 1e-5)
    rate, prior = (
        next(v for name, v in bound.items() if word in name) for word in ("rate", "prior")
    )
    bits, _ = figures.rate_and_distortion(terms.mean(1), error)
    close("the curve's end", bits[:, 0], np.add(rate, prior), 2e-5)
    assert len(terms) == (3 if which == "learned" else 2)
    charts = []
    monkeypatch.setattr(figures, "lines", lambda x, y, series, *_, **__: charts.append(series))
    monkeypatch.setattr(figures, "joined", list)
    figures.terms(scene)
    cost, ratio = ([values for _, values in series.values()] for series in charts)
    close("the legend", [float(name.split()[-1]) for name in charts[1]], total, 5.1e-4)
    close(
        "L_{t-1} of beta_tilde, times its ratio",
        np.multiply(ratio, cost[1]),
        terms.mean(1)[:, :-1],
        1e-12,
    )


# --- The command ---------------------------------------------------------------------------------


def test_without_a_checkpoint_three_figures_are_drawn_and_the_others_are_named(call, tmp_path):
    status, out, err = call(figures, "--out", "pictures")
    assert status == 0 and err == ""
    drawn = {"forward", "schedules", "embedding"}
    assert {path.stem for path in (tmp_path / "pictures").iterdir()} == drawn
    named = set(re.findall(r"^not drawn: (\w+), which needs --(?:ckpt|log)", out, re.MULTILINE))
    assert named == set(figures.FIGURES) - drawn


@pytest.mark.parametrize("clip", [True, False])
def test_all_figures_sample_as_the_network_came_clipped_or_not(
    call, ckpt, tmp_path, monkeypatch, clip
):
    """And so do its bounds."""
    saved = checkpoint.load(ckpt)
    checkpoint.save(tmp_path / "a.pt", dict(saved, process=dict(saved["process"], clip=clip)))
    seen = {}

    def noting(name):
        function = getattr(ddpm, name)

        def noted(*args, **how):
            given = inspect.signature(function).bind(*args, **how)
            given.apply_defaults()
            seen.setdefault(name, set()).add(given.arguments["clip"])
            return function(*args, **how)

        return noted

    for name in ("sample_ancestral", "sample_ddim", "bound_terms"):
        monkeypatch.setattr(ddpm, name, noting(name))
    only = "reverse,shared,interpolation,steps,guidance,rate"
    assert call(figures, "--ckpt", "a.pt", "--n", 2, "--only", only, "--out", "f")[0] == 0
    assert seen == {name: {clip} for name in ("sample_ancestral", "sample_ddim", "bound_terms")}


def test_figures_are_drawn_without_docstrings(call, monkeypatch):
    """As python -OO leaves them."""
    monkeypatch.setattr(figures.FIGURES["embedding"], "__doc__", None)
    assert call(figures, "--only", "embedding", "--out", "f")[:2] == (
        0,
        "f/embedding.png: embedding\n",
    )


def test_with_a_checkpoint_and_a_log_all_are_drawn_and_again_the_same(
    call, trained, ckpt, tmp_path
):
    """Each a picture that a page can hold; another seed draws others wherever anything is drawn."""
    log = trained[0] / "log.jsonl"
    for out, seed in ("one", 0), ("two", 0), ("other", 1):
        flags = ["--out", out, "--n", 4, "--seed", seed, "--device", "cpu"]
        status, said, err = call(figures, "--ckpt", ckpt, "--log", log, *flags)
        assert status == 0 and "not drawn" not in said, err
    for name in figures.FIGURES:
        one, two, other = (
            (tmp_path / out / f"{name}.png").read_bytes() for out in ("one", "two", "other")
        )
        assert one == two, name
        assert (one == other) == (name in ("schedules", "embedding", "epochs", "loss")), name
        with Image.open(tmp_path / "one" / f"{name}.png") as picture:
            assert 300 <= picture.width <= 900 and picture.height >= 100, (name, picture.size)


def test_a_network_that_learned_variances_has_all_figures_too(call, learned, tmp_path):
    names = "reverse,shared,steps,terms,guidance"
    status, _, err = call(figures, "--ckpt", learned, "--out", "f", "--only", names, "--n", 4)
    assert status == 0, err
    assert len(list((tmp_path / "f").iterdir())) == 5


def test_a_chain_of_one_step_has_all_figures_too(call, tmp_path):
    flags = (
        "--limit 32 --batch-size 16 --width 8 --timesteps 1 --epochs 1 --device cpu --log log.jsonl"
    )
    assert call(train, *flags.split())[0] == 0
    status, out, err = call(
        figures, "--ckpt", "ckpt.pt", "--log", "log.jsonl", "--out", "f", "--n", 2
    )
    assert status == 0 and "not drawn" not in out, err
    assert len(list((tmp_path / "f").iterdir())) == len(figures.FIGURES)


def test_epochs_shows_the_first_image_of_each_class_of_every_grid(
    call, trained, ckpt, tmp_path, monkeypatch
):
    """The top left image of the first grid is the top left one of the figure; its class stands above it."""
    above = []
    monkeypatch.setattr(
        figures, "sheet", lambda *rows, **how: above.extend(rows[1]) or sheet(*rows, **how)
    )
    status, _, err = call(figures, "--ckpt", ckpt, "--out", "f", "--only", "epochs")
    assert status == 0, err
    grids = [np.asarray(Image.open(path)) for path in sorted(trained[0].glob("ckpt.0*.png"))]
    picture = np.asarray(Image.open(tmp_path / "f" / "epochs.png").convert("L"))
    assert len(grids) == 2 and above == [str(digit) for digit in range(10)]
    top, left = (
        picture.shape[0] - 2 * 68,
        picture.shape[1] - 10 * 68,
    )  # digits of 64 pixels, four between
    for row, grid in enumerate(grids):
        for digit in (0, 9):
            cell = picture[top + 68 * row :, left + 68 * digit :][:64, :64]
            assert np.array_equal(cell, grid[2 + 66 * digit :, 2:][:64, :64]), (row, digit)


def test_an_image_that_there_is_none_of_is_a_grey_cell():
    """As reverse has it at t = T; the image beside it keeps its place."""
    picture = np.asarray(sheet([[None, np.zeros((64, 64, 1), np.uint8)]]))
    assert (picture[4:68, 4:68] == FAINT).all() and (picture[4:68, 72:136] == 0).all()


def test_the_ticks_of_one_axis_have_one_notation():
    for values, texts in (
        ([0, 0.5, 1], ["0", "0.5", "1"]),
        ([1e-3, 1, 1000], ["0.001", "1", "1000"]),
        ([1e-6, 1e-3, 1, 1000], ["1e-6", "1e-3", "1e0", "1e3"]),
        ([0, 5e-5, 1e-4, 1.5e-4], ["0", "5e-5", "1e-4", "1.5e-4"]),
        ([-2e5, 0, 2e5], ["-2e5", "0", "2e5"]),
    ):
        assert numbers(values) == list(zip(values, texts))


@pytest.mark.parametrize("flags, words", [
    ("--only nothing", ["nothing", "forward"]),
    ("--only reverse", ["reverse", "--ckpt"]),
    ("--only loss", ["loss", "--log"]),
    ("--n 0", ["--n", "at least 1"]),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_a_wrong_call_is_one_line_and_draws_nothing(flags, words, call, tmp_path):
    status, _, err = call(figures, "--out", "f", *flags.split())
    assert status == 2 and len(err.splitlines()) == 1 and all(word in err for word in words), err
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("text", ["", "loss 0.1\n", "[1]\n", json.dumps({"epoch": 1}) + "\n"])
def test_a_log_that_is_none_is_named(text, call, tmp_path):
    (tmp_path / "log.txt").write_text(text)
    status, _, err = call(figures, "--out", "f", "--only", "loss", "--log", "log.txt")
    assert status == 1 and "log.txt: not a log" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "f").exists()


def test_the_held_out_loss_of_a_log_is_a_curve_of_its_own(call, tmp_path):
    lines = [dict(epoch=(i + 1) / 2, loss=1 / (i + 1)) for i in range(6)]
    for held_out in (False, True):
        lines[2].update(dict(held_out=0.4) if held_out else {})
        lines[5].update(dict(held_out=0.3) if held_out else {})
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert (
            call(figures, "--out", f"f{held_out}", "--only", "loss", "--log", "log.jsonl")[0] == 0
        )
    colours = []
    for name in ("fFalse", "fTrue"):
        with Image.open(tmp_path / name / "loss.png") as picture:
            colours.append({colour for _, colour in picture.convert("RGB").getcolors(10**6)})
    assert COLOURS[1] in colours[1] - colours[0]


def test_a_picture_is_written_whole_or_not_at_all(call, monkeypatch, tmp_path):
    """The disk is full after half of it: the old picture is still there, and nothing beside it."""
    assert call(figures, "--out", "f", "--only", "forward")[0] == 0
    before = (tmp_path / "f" / "forward.png").read_bytes()

    def half(picture, file, *_, **__):
        file.write(before[: len(before) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    status, _, err = call(figures, "--out", "f", "--only", "forward", "--seed", 1)
    assert status == 1 and "No space left" in err
    assert [p.name for p in (tmp_path / "f").iterdir()] == ["forward.png"]
    assert (tmp_path / "f" / "forward.png").read_bytes() == before


def test_each_figure_is_one_function_of_a_screen_that_says_what_to_look_for():
    for name, figure in figures.FIGURES.items():
        lines, _ = inspect.getsourcelines(figure)
        assert len(lines) <= 26 and "Look" in figure.__doc__, name

"""figures.py: a figure plots what the paper defines, and a picture is complete or not written."""

import functools
import inspect
import json
import re
import types

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm
import evaluate
import figures
import likelihood
import train
from support import checkpoint, sampling
from support.files import grids
from support.pictures import to_uint8
from support.plots import COLOURS, sheet
from support.sampling import image_noise

# Images whose pixels are independent and take three values: the best eps is known exactly.
LEVELS = np.array([-1.0, -0.2, 1.0])
WEIGHTS = np.array([0.5, 0.3, 0.2])
BETA = np.concatenate([[0], np.linspace(0.01, 0.5, 12)])
ALPHA_BAR = np.cumprod(1 - BETA)
D = ddpm.Diffusion(torch.tensor(BETA))


def expected_x0(xt, t):
    """E[x0 | xt] of these images by Bayes' rule: the levels, weighted by how likely each makes xt."""
    off = xt.numpy()[..., None] - np.sqrt(ALPHA_BAR[t]) * LEVELS
    likely = WEIGHTS * np.exp(-(off**2) / (2 * (1 - ALPHA_BAR[t])))
    return (likely * LEVELS).sum(-1) / likely.sum(-1)


def best(xt, t):
    """The exact model eps of these images."""
    t = int(t[0])
    x0 = torch.from_numpy(expected_x0(xt, t))
    return (xt - np.sqrt(ALPHA_BAR[t]) * x0) / np.sqrt(1 - ALPHA_BAR[t])


def images(n, side=4):
    """Return n of these images on the 256 levels."""
    pixels = np.random.default_rng(0).choice(LEVELS, size=(n, 1, side, side), p=WEIGHTS)
    return torch.from_numpy((np.round((pixels + 1) * 127.5) / 127.5) - 1)


def close(got, want, tolerance):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=0, atol=tolerance)


def scene(**more):
    """Return the inputs of a figure: two of these images, their best model, and no labels."""
    ckpt = dict(network=dict(out_channels=1), shape=(1, 4, 4), process=dict(variance="beta"))
    return types.SimpleNamespace(
        **dict(
            dict(d=D, model=best, net=lambda xt, t, y: best(xt, t), clip=True, x0=images(2)),
            labels=None,
            noise=image_noise,
            ckpt=ckpt,
            cfg=figures.Config(n=2),
            **more,
        )
    )


def decoder(model):
    """Return Scene.decode of a scene with this model."""
    return functools.partial(
        figures.Scene.decode, types.SimpleNamespace(model=model, d=D, clip=True)
    )


@pytest.fixture
def rows(monkeypatch):
    """Return the list of the arguments of all charts and rows of images that a figure draws."""
    drawn = []
    monkeypatch.setattr(figures, "lines", lambda *chart, **_: drawn.append(chart))
    monkeypatch.setattr(figures, "sheet", lambda *arguments, **_: drawn.append(arguments))
    monkeypatch.setattr(figures, "joined", list)
    return drawn


# --- The plotted values --------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 4, 10, 50, 1000])
def test_a_row_of_pictures_shows_evenly_spaced_timesteps_from_T_to_0(T):
    at = figures.times(T)
    assert at[0] == T and at[-1] == 0 and len(at) == min(T, 10) + 1
    assert np.ptp(np.diff(at)) <= (0 if T % 10 == 0 else 1), at


def test_forward_shows_x_t_of_eq4_with_one_noise(rows):
    figures.forward(scene())
    images_of, above, beside = rows[0]
    alpha_bar = ddpm.Diffusion(ddpm.cosine_schedule()).alpha_bar
    x0 = images(2)[:1]
    eps = image_noise([0])(x0)
    assert above[4] == "t = 400" and beside[1] == "cosine"
    xt = alpha_bar[400].sqrt() * x0 + (1 - alpha_bar[400]).sqrt() * eps
    assert np.array_equal(images_of[1][4], to_uint8(xt)[0])


def test_reverse_shows_the_x0_that_the_best_model_predicts(rows):
    """Below each x_t is E[x0 | x_t]. The walk starts at x_T and ends at DDIM's x_0."""
    seen = {}

    def model(xt, t):
        seen[int(t[0])] = xt
        return best(xt, t)

    noise = image_noise([0, 1])
    xT = noise(images(1))
    x0 = ddpm.sample_ddim(best, D, xT, range(1, 13), eta=1.0, noise=noise)
    figures.reverse(scene(model=model, decode=decoder(model)))
    shown, above, _ = rows[0]
    at = [int(text.removeprefix("t = ")) for text in above]
    assert at[0] == 12 and at[-1] == 0 and torch.equal(seen[12], xT)
    for i in (0, 1):
        for j, t in enumerate(at[:-1]):
            assert np.array_equal(shown[2 * i][j], to_uint8(seen[t])[i]), t
            expected = torch.from_numpy(expected_x0(seen[t], t))
            assert np.array_equal(shown[2 * i + 1][j], to_uint8(expected)[i]), t
        assert np.array_equal(shown[2 * i][-1], to_uint8(x0)[i])
        assert np.array_equal(shown[2 * i + 1][-1], to_uint8(x0)[i])


def test_samples_from_a_shared_x_t_differ_by_their_seeds_and_less_for_smaller_t():
    x0 = images(1)
    eps = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    spread = []
    for t in (12, 6, 1):
        xt = D.q_sample(x0, t, eps).expand(64, -1, -1, -1)
        samples = decoder(best)(xt, t, image_noise(range(64)))
        spread.append(float(samples.var(0).mean()))
    assert spread[0] > 1.2 * spread[1] > 0 and spread[2] < 1e-12, spread


def test_an_interpolation_mixes_two_x_t_of_one_noise_each(rows):
    """The mixture is decoded with one noise for all shares; here decoding returns its input."""

    def decode(xt, t, noise):
        z = noise(xt)
        assert torch.equal(z, z[:1].expand_as(z))
        return xt

    figures.interpolation(scene(decode=decode))
    pair = images(2)
    eps = image_noise([0, 1])(pair)
    shown, above, beside, _ = rows[0]
    assert beside[2] == "t = 6" and above[3] == "25%"
    x6 = np.sqrt(ALPHA_BAR[6]) * pair + np.sqrt(1 - ALPHA_BAR[6]) * eps
    mixture = 0.75 * x6[:1] + 0.25 * x6[1:]
    assert np.abs(shown[2][3].astype(int) - to_uint8(mixture)[0]).max() <= 1
    assert np.array_equal(shown[2][[0, -1]], to_uint8(pair))


def test_the_error_at_each_timestep_is_that_of_the_predicted_x0():
    """The terms are those of likelihood.bound_terms, for the same x_t."""
    x0 = images(2)
    seen = {}

    def net(xt, t, y):
        seen[int(t[0])] = ((expected_x0(xt, int(t[0])) - x0.numpy()) ** 2).mean()
        return best(xt, t)

    terms, error = figures.Scene.bound.func(scene(net=net))
    close(error, [seen[t] for t in range(1, 13)], 1e-9)
    want = likelihood.bound_terms(best, D, x0, [D.beta, D.beta_tilde], noise=image_noise([0, 1]))
    assert torch.equal(terms, want)


def test_rate_and_distortion_count_what_a_receiver_of_x_T_to_x_t_has_paid(rows):
    """Sec. 4.3, by hand for T = 3: x_3 costs L_3, x_2 L_2 more, x_1 L_1 more; L_0 is not paid for x_1."""
    terms = torch.tensor([[[8.0, 4.0, 2.0, 1.0]], [[0.0, 0.0, 0.0, 0.0]]])
    figures.rate(scene(bound=(terms, np.array([0.01, 0.04, 0.25]))))
    [(bits, rmse)] = rows[0][2].values()
    close(bits, [7.0, 3.0, 1.0], 0)
    close(rmse, [12.75, 25.5, 63.75], 1e-6)


def test_smoothing_removes_noise_and_keeps_smooth_curves():
    """Terms fall about as t^-1.5; a window of a tenth of t changes such a curve by less than 2%."""
    t = np.arange(1, 1001)
    curve = t**-1.5
    close(figures.smooth(curve) / curve, np.ones(1000), 0.02)
    noise = np.random.default_rng(0).normal(size=(2, 1000))
    smooth = figures.smooth(noise)
    assert np.array_equal(smooth[:, :9], noise[:, :9]) and smooth[:, 200:800].std() < 0.2
    assert np.array_equal(smooth[:, -1], noise[:, -1])


def printed_bound(text):
    """Return the rows of evaluate.py's table as {name: mean for each variance}."""
    rows = [re.match(r"(.{32})(.*)", line).groups() for line in text.splitlines()[2:]]
    return {
        name.strip(): [float(x) for x in re.findall(r"(-?\d+\.\d+) ±", cells)]
        for name, cells in rows
    }


@pytest.mark.parametrize("which", ["ckpt", "learned"])
def test_terms_and_rate_agree_with_what_evaluate_prints(which, request, call, rows):
    """For the same images and seeds; evaluate.py prints five decimals, the legend three."""
    path = request.getfixturevalue(which)
    status, out, err = call(evaluate, "--ckpt", path, "--n", 3, "--seed", 3, "--device", "cpu")
    assert status == 0, err
    bound = printed_bound(out)
    real = figures.Scene(figures.Config(ckpt=str(path), n=3, seed=3, device="cpu"))
    terms, _ = real.bound
    assert len(terms) == (3 if which == "learned" else 2)
    total = next(values for name, values in bound.items() if name.startswith("bound"))
    close(terms.mean(1).sum(1), total, 1e-5)
    rate = next(values for name, values in bound.items() if "rate" in name)
    prior = next(values for name, values in bound.items() if "prior" in name)
    figures.rate(real)
    [(bits, _)] = rows.pop()[2].values()
    close(bits[0], np.add(rate, prior)[{"ckpt": 0, "learned": 2}[which]], 2e-5)
    figures.terms(real)
    [(_, tilde)] = rows[0][2].values()
    ratios = [values for _, values in rows[1][2].values()]
    order = [1, 0, 2][: len(terms)]  # beta_tilde comes first
    close([float(name.split()[-1]) for name in rows[1][2]], np.array(total)[order], 5.1e-4)
    close(np.multiply(ratios, tilde), figures.smooth(terms.mean(1)[order, :-1].numpy()), 1e-12)


# --- Logs ----------------------------------------------------------------------------------------


def line(step, loss, **more):
    return json.dumps(dict(step=step, epoch=step / 100, loss=loss, **more)) + "\n"


def test_a_log_is_read_past_broken_lines_and_the_latest_entry_of_each_step_counts(tmp_path, capsys):
    """A killed run logged 400 and 428, and was resumed from 300."""
    text = line(300, 0.5) + line(400, 0.4) + line(428, 0.3) + '{"step": 430, "epo\n\n[1]\nnan\n'
    text += line(400, 0.42) + '{"step": 401, "epoch": 4.1, "loss": "low"}\n' + line(500, 0.2)
    (tmp_path / "log.jsonl").write_text(text)
    log = figures.read_log(tmp_path / "log.jsonl")
    assert [(entry["step"], entry["loss"]) for entry in log] == [
        (300, 0.5),
        (400, 0.42),
        (428, 0.3),
        (500, 0.2),
    ]
    assert "skipped 5 broken lines" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "loss 0.1\n", "[1]\n", json.dumps({"epoch": 1}) + "\n"])
def test_a_file_that_is_not_a_log_is_named(text, call, tmp_path):
    (tmp_path / "log.txt").write_text(text)
    status, _, err = call(figures, "--out", "f", "--only", "loss", "--log", "log.txt")
    assert (
        status == 1 and "--log log.txt: contains no line of a log" in err and err.count("\n") == 1
    )
    assert not (tmp_path / "f").exists()


def test_the_right_half_of_loss_shows_the_gap_of_a_run_that_memorises(rows):
    """From 1.0 both fall to 0.06; then they part by 0.01. The right axis spans little more than that."""
    held = [1.0, 0.08, 0.07, 0.065, 0.066, 0.068, 0.07, 0.072, 0.075]
    log = []
    for i in range(9):
        loss = [1.0, 0.08, 0.07, 0.065, 0.06, 0.06, 0.06, 0.06, 0.06][i]
        log.append(json.loads(line(100 * (i + 1), loss, held_out=held[i])))
    figures.loss(scene(log=log))
    x, y, series, *_ = rows[1]
    assert x.low == 2.25 and y.low >= 0.05 and y.high <= 0.08 and len(series) == 2


# --- The command ---------------------------------------------------------------------------------


def test_without_a_checkpoint_four_figures_are_drawn_and_the_others_are_named(call, tmp_path):
    status, out, err = call(figures, "--out", "pictures")
    assert status == 0 and err == ""
    drawn = {"forward", "schedules", "embedding", "unet"}
    assert {path.stem for path in (tmp_path / "pictures").iterdir()} == drawn
    named = set(re.findall(r"^not drawn: (\w+), which needs --(?:ckpt|log)", out, re.MULTILINE))
    assert named == set(figures.FIGURES) - drawn and "4 pictures in pictures" in out


def test_with_a_checkpoint_and_a_log_every_figure_is_drawn_and_counted(
    call, trained, ckpt, tmp_path
):
    """Each fits on a page. Another seed gives other pictures of everything that is random."""
    log = trained[0] / "log.jsonl"
    for out, seed in ("one", 0), ("other", 1):
        flags = ["--out", out, "--n", 2, "--seed", seed, "--device", "cpu"]
        status, said, err = call(figures, "--ckpt", ckpt, "--log", log, *flags)
        assert status == 0 and "not drawn" not in said, err
        assert f"{len(figures.FIGURES)} pictures in {out}" in said
    for name in figures.FIGURES:
        one, other = ((tmp_path / out / f"{name}.png").read_bytes() for out in ("one", "other"))
        fixed = name in ("schedules", "embedding", "unet", "epochs", "loss")
        assert (one == other) == fixed, name
        with Image.open(tmp_path / "one" / f"{name}.png") as picture:
            assert 200 <= picture.width <= 900 and picture.height >= 100, (name, picture.size)


def test_a_chain_of_one_timestep_with_learned_variances_has_all_figures_too(call, tmp_path):
    flags = "--limit 32 --batch-size 16 --width 8 --timesteps 1 --epochs 1 --device cpu"
    how = "--log log.jsonl --variance learned"
    assert call(train, *flags.split(), *how.split())[0] == 0
    flags = ["--ckpt", "ckpt.pt", "--log", "log.jsonl", "--out", "f", "--n", 2]
    status, out, err = call(figures, *flags)
    assert status == 0 and "not drawn" not in out, err
    assert len(list((tmp_path / "f").iterdir())) == len(figures.FIGURES)


@pytest.mark.parametrize("clip", [True, False])
def test_figures_clip_x0_as_the_checkpoint_says(call, ckpt, tmp_path, monkeypatch, clip):
    saved = checkpoint.load(ckpt)
    checkpoint.save(tmp_path / "a.pt", dict(saved, process=dict(saved["process"], clip=clip)))
    seen = {}
    for module, name in (
        (sampling.ddpm, "sample_ancestral"),
        (sampling.ddpm, "sample_ddim"),
        (sampling.ddpm, "ddim_step"),
        (figures.likelihood, "bound_terms"),
    ):
        original = getattr(module, name)

        def noted(*args, original=original, name=name, **how):
            seen.setdefault(name, set()).add(how["clip"])
            return original(*args, **how)

        monkeypatch.setattr(module, name, noted)
    only = "reverse,shared,interpolation,steps,guidance,rate"
    assert call(figures, "--ckpt", "a.pt", "--n", 2, "--only", only, "--out", "f")[0] == 0
    names = ("sample_ancestral", "sample_ddim", "ddim_step", "bound_terms")
    assert seen == {name: {clip} for name in names}


def test_epochs_shows_the_first_image_of_each_class_of_every_grid(
    call, trained, ckpt, tmp_path, monkeypatch
):
    """The top left image of the first grid is the top left one of the figure; its class is above it."""
    above = []

    def noted(rows, names, *more, **how):
        above.extend(names)
        return sheet(rows, names, *more, **how)

    monkeypatch.setattr(figures, "sheet", noted)
    status, _, err = call(figures, "--ckpt", ckpt, "--out", "f", "--only", "epochs")
    assert status == 0, err
    found = [np.asarray(Image.open(path)) for path in grids(str(ckpt)).values()]
    picture = np.asarray(Image.open(tmp_path / "f" / "epochs.png").convert("L"))
    assert len(found) == 2 and above == [str(digit) for digit in range(10)]
    top = picture.shape[0] - 2 * 68  # digits of 64 pixels, four between
    left = picture.shape[1] - 10 * 68
    for row, grid in enumerate(found):
        for digit in (0, 9):
            cell = picture[top + 68 * row :, left + 68 * digit :][:64, :64]
            assert np.array_equal(cell, grid[2 + 66 * digit :, 2:][:64, :64]), (row, digit)


def test_a_broken_file_of_a_folder_is_skipped_on_request(call, tmp_path):
    (tmp_path / "album").mkdir()
    Image.new("RGB", (80, 80), "red").save(tmp_path / "album" / "a.png")
    (tmp_path / "album" / "b.png").write_text("not an image")
    flags = ["--only", "forward, schedules", "--data", "album", "--out", "f"]
    assert call(figures, *flags)[0] == 1
    assert call(figures, *flags, "--skip-broken")[0] == 0
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == [
        "forward.png",
        "schedules.png",
    ]


@pytest.mark.parametrize("flags, words", [
    ("--only nothing", ["--only nothing: not a figure", "forward"]),
    ("--only reverse", ["--only reverse: needs --ckpt"]),
    ("--only loss", ["--only loss: needs --log"]),
    ("--only embedding --log a.jsonl", ["--log: only the figure loss uses it"]),
    ("--n 0", ["--n", "from 1 to 64"]),
    ("--n 3000000", ["--n", "from 1 to 64"]),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_a_wrong_call_is_one_line_and_draws_nothing(flags, words, call, tmp_path):
    status, _, err = call(figures, "--out", "f", *flags.split())
    assert status == 2 and len(err.splitlines()) == 1 and all(word in err for word in words), err
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("flags, words", [
    ("--only embedding --out text", "--out text: is not a folder"),
    ("--only loss --log folder --out f", "folder: Is a directory"),
    ("--only loss --log missing --out f", "missing: No such file"),
], ids=str)  # fmt: skip
def test_a_failure_is_one_line_and_draws_nothing(flags, words, call, tmp_path):
    (tmp_path / "text").touch()
    (tmp_path / "folder").mkdir()
    status, out, err = call(figures, *flags.split())
    assert status == 1 and out == "" and words in err and err.count("\n") == 1, err
    assert not (tmp_path / "f").exists()


def test_a_picture_is_complete_or_not_written(call, monkeypatch, tmp_path):
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


def test_each_figure_says_what_to_look_for():
    for name, figure in figures.FIGURES.items():
        assert "Look" in inspect.getdoc(figure), name


def test_the_training_curve_of_loss_has_the_first_colour_and_the_held_out_curve_the_second(
    call, tmp_path
):
    text = "".join(line(100 * (i + 1), 1 / (i + 1), held_out=0.5) for i in range(6))
    (tmp_path / "log.jsonl").write_text(text)
    assert call(figures, "--out", "f", "--only", "loss", "--log", "log.jsonl")[0] == 0
    with Image.open(tmp_path / "f" / "loss.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(10**6)}
    assert {COLOURS[0], COLOURS[1]} <= colours

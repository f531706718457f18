"""Charts show what they are given: each point, line and colour lies where the axes say that it does."""

import numpy as np
import pytest
from PIL import Image

from support import plots
from support.plots import Axis

SIZE = (420, 330)
LINEAR, LOG = Axis("x", -2, 6), Axis("x", 0.1, 1000, log=True)
NEAR = 0.5  # pixels: drawing rounds to a third of a pixel, and so does each end of what is drawn


def coloured(picture):
    """Rows and columns, counted at their centres, and strength of what is drawn in the first colour."""
    off = 255 - np.asarray(picture, float)
    blue = (off[:, :, 0] - off[:, :, 2]).clip(0)  # ink, grey and white have none
    rows, columns = np.nonzero(blue)
    return rows + 0.5, columns + 0.5, blue[rows, columns]


def centre(picture):
    """(x, y) of what is drawn in colour, in pixels."""
    rows, columns, strength = coloured(picture)
    return np.array([columns @ strength, rows @ strength]) / strength.sum()


def pixel(x, y, at):
    """(x, y) of a point in pixels, from the two ends of both axes."""
    across = plots.along(x, at[0], plots.LEFT, SIZE[0] - plots.RIGHT)
    down = plots.along(y, at[1], SIZE[1] - plots.BOTTOM, plots.TOP)
    return np.array([across[0], down[0]])


def dot(x, y, at):
    """The centre of the one dot of a chart, in pixels."""
    return centre(plots.lines(x, y, {"dot": ([at[0]], [at[1]])}, size=SIZE))


@pytest.mark.parametrize("axis", [LINEAR, LOG], ids=["linear", "log"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.83])
def test_a_dot_is_drawn_where_along_says(axis, share):
    _, low, high, log = axis
    value = low * (high / low) ** share if log else low + share * (high - low)
    want = pixel(axis, axis, (value, value))
    got = dot(axis, axis, (value, value))
    assert np.abs(got - want).max() < NEAR, f"drawn at {got}, along says {want}"


def test_equal_steps_are_equal_lengths_and_on_a_log_axis_equal_ratios_are():
    """Measured in the picture alone: of three dots the second is midway, and up is up."""
    for axis, values in (LINEAR, (-1, 2, 5)), (LOG, (1, 10, 100)):
        first, middle, last = (dot(axis, axis, (value, value)) for value in values)
        assert np.abs((first + last) / 2 - middle).max() < NEAR
        assert first[0] < last[0] and first[1] > last[1]


def test_a_tick_is_drawn_at_its_value():
    """The grid's line of the value 2 runs through the column of a dot at 2."""
    picture = np.asarray(plots.lines(LINEAR, LINEAR, {"dot": ([2], [2])}, size=SIZE), float).sum(2)
    column, row = (int(at) for at in dot(LINEAR, LINEAR, (2, 2)))
    above = picture[plots.TOP + 5 : row - 10, column - 3 : column + 4].mean(0)
    assert above.argmin() == 3, f"darkest {above.argmin() - 3} pixels beside the dot"


def test_the_ticks_of_an_axis_are_round_and_inside_it():
    assert plots.ticks(Axis("", 0, 1000)) == [0, 200, 400, 600, 800, 1000]
    assert np.allclose(plots.ticks(Axis("", -0.03, 0.31)), [0, 0.1, 0.2, 0.3])
    assert plots.ticks(Axis("", 0.02, 0.5, log=True)) == [0.02, 0.05, 0.1, 0.2, 0.5]
    assert plots.ticks(Axis("", 1e-6, 1, log=True)) == [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1]


def test_an_axis_that_spans_values_holds_them_all_and_little_more():
    rng = np.random.default_rng(0)
    for log in (False, True):
        values = [10 ** rng.uniform(-4, 1, 5), 10 ** rng.uniform(-4, 1, 7)]
        _, low, high, _ = plots.span("", values, log)
        least, most = min(v.min() for v in values), max(v.max() for v in values)
        assert low <= least and most <= high
        assert (
            (low >= least / 2.5 and high <= most * 2.5)
            if log
            else high - low <= 1.6 * (most - least)
        )


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("value", [0.5, 0.37, 20])
def test_an_axis_that_spans_one_value_has_two_ends(value, log):
    _, low, high, _ = plots.span("", [[value]], log)
    assert low <= value <= high and low < high


def test_a_line_passes_through_its_points_and_stays_inside_the_axes():
    """From far outside to far outside: what is drawn ends at the axes, and lies on the straight line."""
    picture = plots.lines(LINEAR, LINEAR, {"line": ([-10, 14], [-10, 14])}, size=SIZE)
    rows, columns, strength = coloured(picture)
    assert columns.min() > plots.LEFT - 3 and columns.max() < SIZE[0] - plots.RIGHT + 3
    assert rows.min() > plots.TOP - 3 and rows.max() < SIZE[1] - plots.BOTTOM + 3
    left, bottom = pixel(LINEAR, LINEAR, (-2, -2))
    right, top = pixel(LINEAR, LINEAR, (6, 6))
    off = (columns - left) / (right - left) - (bottom - rows) / (bottom - top)
    assert abs(off @ strength / strength.sum()) * (right - left) < 2 * NEAR  # one across, one down


def test_a_value_that_has_no_logarithm_is_left_out():
    """Of a line whose only other point this is, a dot remains."""
    picture = plots.lines(LOG, LOG, {"dot": ([0, -1, 10, np.nan], [1, 1, 10, 1])}, size=SIZE)
    assert np.array_equal(picture, plots.lines(LOG, LOG, {"dot": ([10], [10])}, size=SIZE))


def test_each_dot_is_drawn_and_no_line_between_them():
    alone = [coloured(plots.lines(LINEAR, LINEAR, {"": ([x], [x])}, size=SIZE)) for x in (0, 3)]
    both = coloured(plots.lines(LINEAR, LINEAR, {"": ([0, 3], [0, 3])}, size=SIZE, dots=True))
    assert len(both[2]) == sum(len(strength) for _, _, strength in alone)
    assert both[2].sum() == sum(strength.sum() for _, _, strength in alone)


def test_a_heat_map_has_squares_of_whole_pixels_row_0_at_the_top():
    """Each pixel has the colour of one value: nothing is averaged, so no moire can appear."""
    values = np.linspace(-1, 1, 12).reshape(3, 4)
    x = Axis("column", 0, 4)
    y = Axis("row", 0, 3)
    picture = np.asarray(plots.heat(x, y, values, "", cell=(5, 7)))
    for i in range(3):
        for j in range(4):
            square = picture[plots.TOP + 7 * i :, plots.LEFT + 5 * j :][1:6, 1:4]
            assert (square == square[0, 0]).all(), (i, j)
    corner = picture[plots.TOP + 3, plots.LEFT + 2]
    other = picture[plots.TOP + 17, plots.LEFT + 17]
    assert tuple(corner) == plots.COLOURS[0] and tuple(other) == plots.COLOURS[1]


def test_a_dot_on_the_frame_is_as_large_as_one_inside():
    """Measured by the colour that it leaves, at a corner and in the middle."""
    sums = []
    for value in (-2, 1.6):
        picture = plots.lines(LINEAR, LINEAR, {"dot": ([value], [value])}, size=SIZE)
        sums.append(coloured(picture)[2].sum())
    assert abs(sums[0] / sums[1] - 1) < 0.1, sums


def test_a_legend_is_drawn_for_several_names_unless_it_is_turned_off():
    series = {"a": ([1], [1]), "b": ([2], [2])}
    above = (slice(plots.TOP - 18, plots.TOP - 6), slice(plots.LEFT, plots.LEFT + 14))
    seen = []
    for legend in (True, False):
        picture = np.asarray(plots.lines(LINEAR, LINEAR, series, size=SIZE, legend=legend))
        seen.append((picture[above] == plots.COLOURS[0]).all(2).any())
    assert seen == [True, False]


def test_the_numbers_at_ticks_are_short():
    texts = {0: "0", 0.1 + 0.2: "0.3", 1000: "1000", 1e-6: "1e-6", 1.5e-4: "0.00015", 2e6: "2e6"}
    for value, text in texts.items():
        assert plots.number(value) == text


def test_colours_differ_in_lightness_or_blueness_so_that_a_reader_who_confuses_red_and_green_can_tell_them():
    """Red and green add up to what such a reader has left of them; each pair differs there or in blue."""
    seen = [np.array([(r + g) / 2, b]) for r, g, b in plots.COLOURS[:4]]
    distances = [np.linalg.norm(one - other) for i, one in enumerate(seen) for other in seen[:i]]
    assert min(distances) > 30, distances


def test_a_sheet_shows_each_image_unchanged_enlarged_by_a_whole_factor():
    """Found again in the picture, at its row and column, every pixel a square of equal ones."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 16, 16, 1), dtype=np.uint8)
    rows = [list(images[:3]), list(images[3:])]
    picture = plots.sheet(rows, ["a", "b", "c"], ["first", "second"])
    sheet, size, gap = np.asarray(picture.convert("L")), 64, 4
    left, top = picture.width - 3 * (size + gap), picture.height - 2 * (size + gap)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            cell = sheet[top + i * (size + gap) :, left + j * (size + gap) :][:size, :size]
            assert np.array_equal(cell, np.kron(image[:, :, 0], np.ones((4, 4)))), (i, j)


def test_joined_pictures_stand_side_by_side_or_one_below_the_other():
    red, blue = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (20, 10), "blue")
    beside, below = plots.joined([red, blue]), plots.joined([red, blue], down=True)
    assert beside.size == (40, 10) and below.size == (20, 20)
    assert beside.getpixel((19, 9)) == below.getpixel((19, 9)) == (255, 0, 0)
    assert beside.getpixel((20, 0)) == below.getpixel((0, 10)) == (0, 0, 255)


def test_a_missing_image_of_a_sheet_is_a_grey_cell():
    """As in reverse at t = T; the image beside it keeps its place."""
    picture = np.asarray(plots.sheet([[None, np.zeros((64, 64, 1), np.uint8)]]))
    assert (picture[4:68, 4:68] == plots.FAINT).all() and (picture[4:68, 72:136] == 0).all()

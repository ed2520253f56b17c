"""Arms against arms: every mark stands where the planted table puts it."""

from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from test_figures import SHAPES, colours_written, lines_named, planted
from test_regimes_figures import dots

from opd_geometry.analysis import distance
from opd_geometry.analysis.evidence import ALL_ACCURACIES, KEPT
from opd_geometry.book.controls_figures import benchmark_dots, subspace_dots
from opd_geometry.book.distance_figures import ladder
from opd_geometry.book.figures import (
    ARM_STYLES,
    CONFINED_STYLES,
    GREY,
    NULL_LABEL,
    TEXT,
)
from opd_geometry.book.regimes_figures import sweep, variant_dots

COLOURS = {arm: to_hex(look.colour) for arm, look in ARM_STYLES.items()}
MAIN = ("sft", "opd", "rlvr")
CONFINED = ("opd", *(f"opd-projected{s}" for s in ("", "-donor", "-random")))
RATES = ("opd", "opd-lr-x0.3", "opd-lr-x3", "rlvr", "rlvr-lr-x3")
PLACES = {"": 1.0, "-lr-x0.3": 0.3, "-lr-x3": 3.0}
RUNGS = {("sft", "opd"): "who writes", ("opd", "rlvr"): "reward"}
NUMBERS = ["ratio", "low", "high", "null"]


def level(place: np.ndarray, frac: float = 1.0, weighted: bool = False) -> np.ndarray:
    """Planted in the arm at a place of the table: mean over seeds and matrices."""
    rows = [m for m, _ in SHAPES.values()]
    sizes = [m * n for m, n in SHAPES.values()] if weighted else None
    return 1 + place + 0.1 + 0.1 + frac + np.average(rows, weights=sizes) / 1000


def accuracy(place: int, frac: float = 1.0) -> float:
    """The same of the accuracy on the trained task."""
    return 0.3 + place / 50 + 0.01 + frac / 3


def with_benchmarks(table: pd.DataFrame) -> pd.DataFrame:
    """Every further benchmark is harder by a twentieth."""
    rows = table[table["metric"] == ALL_ACCURACIES[0]]
    harder = (
        rows.assign(metric=name, value=rows["value"] - i / 20)
        for i, name in enumerate(ALL_ACCURACIES[1:], 1)
    )
    return pd.concat([table, *harder], ignore_index=True)


def strokes(ax: Axes) -> tuple[list[list[float]], list[str]]:
    """What ``hlines`` and ``vlines`` drew: x, y of one end, then the other; colours."""
    drawn = [c for c in ax.collections if isinstance(c, LineCollection)]
    ends = [c.get_segments()[0].ravel().tolist() for c in drawn]
    return ends, [to_hex(c.get_color()[0]) for c in drawn]


def bands(ax: Axes) -> list[tuple[float, float]]:
    """The lowest and the highest point of each band over seeds."""
    drawn = [c for c in ax.collections if isinstance(c, PolyCollection)]
    heights = [c.get_paths()[0].vertices[:, 1] for c in drawn]
    return [(y.min(), y.max()) for y in heights]


def looks(ax: Axes) -> list[tuple[str, bool]]:
    """Colour of each round dot and whether it is filled, in the order drawn."""
    return [
        (to_hex(line.get_markeredgecolor()), line.get_markerfacecolor() != "none")
        for line in ax.lines
        if line.get_marker() == "o"
    ]


def names(texts: list) -> list[str]:
    return [text.get_text() for text in texts]


def rows_of(ax: Axes) -> list[str]:
    """Names of the rows, from the top."""
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    return names(ax.get_yticklabels())


def check_grid(figure: Figure, xlabel: str) -> None:
    """Three panels: a share and two other metrics; no fourth. The lowest say what."""
    share, shift, rank, unused = figure.axes
    assert [ax.get_yscale() for ax in (share, shift, rank)] == ["linear", "log", "log"]
    assert {ax.get_xscale() for ax in (share, shift, rank)} == {"log"}
    assert not unused.axison
    figure.draw_without_rendering()
    assert [ax.get_xlabel() for ax in (share, shift, rank)] == ["", xlabel, xlabel]
    assert [bool(ax.get_xticklabels()) for ax in (share, shift, rank)] == [0, 1, 1]


# --- at equal norm -----------------------------------------------------------------


def rungs() -> pd.DataFrame:
    """Ratios of two pairs, the last one first; one is never equally far."""
    end, equal = distance.AT_END, distance.AT_EQUAL_NORM
    rows = [
        ("opd", "rlvr", "nss", end, 2.0, 1.5, 3.0, 1.8),
        ("opd", "rlvr", "nss", equal, 0.8, 0.7, 0.95, 1.1),
        ("sft", "opd", "nss", end, 0.5, 0.4, 0.6, 0.9),
        ("sft", "opd", "nss", equal, *[np.nan] * 4),
    ]
    return pd.DataFrame(rows, columns=["arm", "other", "metric", "at", *NUMBERS])


def test_a_rung_has_an_open_dot_at_the_end_and_a_filled_one_at_equal_norm() -> None:
    missing = {("rlvr", "rlvr-paper"): "batch"}
    (ax,) = ladder(rungs(), missing | RUNGS).axes
    assert rows_of(ax) == ["who writes\nSFT → OPD", "reward\nOPD → RLVR"]
    np.testing.assert_allclose(dots(ax, "o"), [(0.5, -0.14), (2, 0.86), (0.8, 1.14)])
    opd, rlvr = COLOURS["opd"], COLOURS["rlvr"]  # what a change leads to
    assert looks(ax) == [(opd, False), (rlvr, False), (rlvr, True)]
    ends, colours = strokes(ax)
    assert colours == [opd, rlvr, rlvr, GREY]
    intervals = [
        (0.4, -0.14, 0.6, -0.14),
        (1.5, 0.86, 3, 0.86),
        (0.7, 1.14, 0.95, 1.14),
    ]
    null = (1.1, 1.0, 1.1, 1.3)  # at equal norm; none at the end
    np.testing.assert_allclose(ends, [*intervals, null])


@pytest.mark.parametrize("power", [0.05, 1, 3])
def test_factors_have_few_plain_ticks_around_one(power: float) -> None:
    comparison = rungs()
    comparison[NUMBERS] **= power
    figure = ladder(comparison, RUNGS)
    figure.draw_without_rendering()
    (ax,) = figure.axes
    assert ax.get_xscale() == "log"
    low, high = ax.get_xlim()
    assert low < comparison[NUMBERS].min(axis=None)
    assert high > comparison[NUMBERS].max(axis=None)
    ticks = [float(name) for name in names(ax.get_xticklabels())]
    assert 1.0 in ticks
    assert 2 <= len(ticks) <= 3
    np.testing.assert_allclose(ticks, ax.get_xticks(), rtol=0.01)


# --- confined runs -----------------------------------------------------------------


def test_what_a_confinement_costs_has_its_interval_and_its_outcome() -> None:
    table = planted((*CONFINED, "sft"))
    of_task = table["metric"] == ALL_ACCURACIES[0]
    worse = of_task & table["arm"].isin(CONFINED[2:])
    luck = of_task & (table["arm"] == CONFINED[3]) & (table["seed"] == 2)
    table["value"] += 0.03 * luck - 0.1 * worse
    ax, free = subspace_dots(table, ["opd", "rlvr", "sft"]).axes
    styles = [CONFINED_STYLES[suffix] for suffix in ("", "-donor", "-random")]
    assert rows_of(ax) == [look.label for look in styles]
    # 0.02 better a place in the table; the last one's seeds differ by (0, 0, 0.03).
    gain = 0.8 / 3  # after a fifth
    kept = [(1 + x / gain, y) for x, y in ((0.02, 0), (-0.06, 1), (-0.03, 2))]
    np.testing.assert_allclose(dots(ax, "o"), kept)
    expected = [to_hex(look.colour) for look in styles]
    assert looks(ax) == list(zip(expected, [True, False, False], strict=True))
    ends, colours = strokes(ax)
    wide = 0.01 * 4.302653 / gain  # t of two degrees
    halves = (0, 0, wide)
    intervals = [(x - h, y, x + h, y) for (x, y), h in zip(kept, halves, strict=True)]
    np.testing.assert_allclose(ends, intervals, atol=1e-7)
    assert colours == expected
    (band,) = ax.patches
    np.testing.assert_allclose([band.get_x(), band.get_width()], [KEPT, 1 - KEPT])
    whole, parted = (line for line in ax.lines if line.get_marker() != "o")
    assert (list(whole.get_xdata()), whole.get_linestyle()) == ([1, 1], "-")
    assert to_hex(whole.get_color()) == COLOURS["opd"]
    assert list(parted.get_xdata()) == [0, 0]
    assert (parted.get_color(), parted.get_linestyle()) == (GREY, ":")
    assert not dots(free, "o")  # no confined run, no row


def test_costs_on_all_benchmarks_are_another_measure() -> None:
    table = with_benchmarks(planted(CONFINED))
    rest = (table["metric"] != ALL_ACCURACIES[0]) & (table["arm"] == CONFINED[1])
    table.loc[rest, "value"] -= 0.07
    for measure, cost in (("trained task", 0.02), ("all benchmarks", 0.02 - 0.06)):
        (ax,) = subspace_dots(table, ["opd"], measure).axes
        kept = 1 + cost / (0.8 / 3)
        np.testing.assert_allclose(dots(ax, "o")[0], (kept, 0), atol=1e-12)


def test_benchmarks_have_a_row_each_with_means_and_ranges() -> None:
    table = with_benchmarks(planted(("sft", *CONFINED)))
    suffixes = ("", "-pretrained", "-random")  # the second was never trained
    sft, opd = benchmark_dots(table, ["sft", "opd"], suffixes).axes
    rows = [name.removeprefix("accuracy/") for name in ALL_ACCURACIES]
    assert rows_of(sft) == rows
    assert opd.get_xlim() == (0, 1)
    shown = {"opd": (1, -0.27), CONFINED[1]: (2, -0.09), CONFINED[3]: (4, 0.27)}
    means = [
        (accuracy(place) - row / 20, row + shift)
        for place, shift in shown.values()
        for row in range(len(rows))
    ]
    np.testing.assert_allclose(dots(opd, "o"), means)
    ends, colours = strokes(opd)
    np.testing.assert_allclose(ends, [(x - 0.01, y, x + 0.01, y) for x, y in means])
    expected = [GREY, COLOURS[CONFINED[1]], COLOURS[CONFINED[3]]]
    assert colours[:: len(rows)] == expected
    # Open where the arm's line is dashed.
    filled = [True, True, False]
    assert looks(opd)[:: len(rows)] == list(zip(expected, filled, strict=True))
    assert len(dots(sft, "o")) == len(rows)


# --- sweeps and variants -----------------------------------------------------------


def test_a_sweep_is_at_the_end_of_training_with_nulls_and_printed_values() -> None:
    printed = {("opd", "nss"): 2.5, ("rlvr", "sparsity"): 0.7, ("sft", "nss"): 9.0}
    arms, metrics = ["opd", "rlvr", "sft"], ["sparsity", "nss", "stable_rank"]
    figure = sweep(planted(RATES), arms, PLACES, metrics, "rate", printed)
    share, shift, rank = figure.axes[:3]
    by_rate = {"opd": ([0.3, 1, 3], [1, 0, 2]), "rlvr": ([1, 3], [3, 4])}
    nulls = {to_hex(n.get_color()): n for n in lines_named(shift, "_null")}
    for arm, (rates, order) in by_rate.items():
        lines = [lines_named(ax, ARM_STYLES[arm].label)[0] for ax in (share, shift)]
        values = level(np.array(order))
        by_size = 1 - level(np.array(order), weighted=True) / 20
        for line, value in zip(lines, (by_size, values), strict=True):
            np.testing.assert_allclose(line.get_xdata(), rates)
            np.testing.assert_allclose(line.get_ydata(), value)
            assert to_hex(line.get_color()) == COLOURS[arm]
        null = nulls[COLOURS[arm]]
        np.testing.assert_allclose(null.get_ydata(), 0.9 * values)
        assert null.get_linestyle() == ":"
    ends = [(level(p) - 0.1, level(q) + 0.1) for p, q in ((0, 2), (3, 4))]
    np.testing.assert_allclose(bands(shift), ends)
    for ax, value, arm in ((shift, 2.5, "opd"), (share, 0.7, "rlvr")):
        marks = [line for line in ax.lines if line.get_marker() == "<"]
        (mark,) = (line for line in marks if len(line.get_xdata()))  # not the key
        assert to_hex(mark.get_color()) == COLOURS[arm]
        across, up = mark.get_transform().transform(mark.get_xydata())[0]
        np.testing.assert_allclose(across, ax.transAxes.transform((1, 0))[0])
        np.testing.assert_allclose(up, ax.transData.transform((1, value))[1])
    assert not dots(rank, "<")
    keys = ["OPD", "RLVR", NULL_LABEL, "the paper prints"]
    assert names(figure.legends[0].texts) == keys
    check_grid(figure, "rate")
    assert names(rank.get_xticklabels()) == ["0.3", "1", "3"]


def test_variants_show_their_seeds_in_their_colours() -> None:
    arms = {"rlvr": "reward", "opd": "teacher"}
    ax, share = variant_dots(planted(MAIN), arms, ["nss", "sparsity"], {}).axes
    assert (ax.get_xscale(), share.get_xscale()) == ("log", "linear")
    assert looks(ax) == [(COLOURS[arm], True) for arm in arms]
    seeds = [line for line in ax.lines if line.get_marker() == "."]
    paths = [
        [(level(p) + x, row) for x in (-0.1, 0, 0.1)] for row, p in ((0, 2), (1, 1))
    ]
    np.testing.assert_allclose([line.get_xydata() for line in seeds], paths)
    assert [to_hex(line.get_color()) for line in seeds] == [
        COLOURS[arm] for arm in arms
    ]


def test_no_margin_lies_around_a_variant_where_the_first_arm_is_missing() -> None:
    arms, margins = {"off-policy": "main", "opd": "variant"}, {"nss": (0.8, 1.25)}
    (ax,) = variant_dots(planted(MAIN), arms, ["nss"], margins).axes
    assert dots(ax, "o")
    assert not ax.patches


# --- whatever is there -------------------------------------------------------------

FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "subspaces": lambda table: subspace_dots(table, ["opd"]),
    "benchmarks": lambda table: benchmark_dots(table, ["opd"], ["", "-wide"]),
    "sweep": lambda table: sweep(table, ["opd"], PLACES, ["nss"], "rate"),
    "variants": lambda table: variant_dots(
        table, {"opd": "main", "rlvr": "reward"}, ["nss"], {"nss": (0.8, 1.25)}
    ),
    "ladder": lambda table: ladder(distance.compared(table, RUNGS, ["nss"]), RUNGS),
}
ALL = tuple(dict.fromkeys((*MAIN, *CONFINED, *RATES)))
OF_ARMS = [name for name in FIGURES if name not in ("ladder", "board")]


@pytest.mark.parametrize("name", OF_ARMS)
def test_refuses_a_table_without_its_arms(name: str) -> None:
    with pytest.raises(ValueError, match=r"none of the arms .*; it has mix-0\.25") as e:
        FIGURES[name](planted(["mix-0.25"], [0]))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", [*OF_ARMS, "ladder"])
def test_draws_one_seed_without_a_range(name: str) -> None:
    figure = FIGURES[name](with_benchmarks(planted(ALL, [4])))
    figure.draw_without_rendering()
    ax = figure.axes[0]
    assert np.isfinite(dots(ax, "o")).all()
    assert not bands(ax)
    assert all(len(ends) == 0 or ends[0] == ends[2] for ends in strokes(ax)[0])


@pytest.mark.parametrize("name", FIGURES)
def test_is_transparent_and_its_text_reads_on_light_and_dark(name: str) -> None:
    figure = FIGURES[name](with_benchmarks(planted(ALL)))
    assert {part.get_facecolor()[3] for part in (figure, *figure.axes)} == {0}
    assert colours_written(figure) <= {GREY, TEXT, *COLOURS.values()}
    assert not plt.get_fignums()

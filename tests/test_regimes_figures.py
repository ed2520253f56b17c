"""Orders over settings and distances to printed numbers, on planted tables."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from opd_geometry.analysis import regimes
from opd_geometry.book import regimes_figures
from opd_geometry.experiments.measure import COLUMNS

SEEDS = (0, 1, 2)


def planted(values: dict[str, float], metric: str = "nss") -> pd.DataFrame:
    """Two matrices of unequal sizes an arm, the same in every seed but for a little."""
    rows: list[tuple[object, ...]] = []
    for arm, value in values.items():
        for seed in SEEDS:
            for matrix, size, factor in (("a", 100.0, 0.5), ("b", 300.0, 1.5)):
                place = (f"{arm}-{seed}", arm, seed, 10, matrix, "q", 0)
                noisy = value * factor * (1 + 0.01 * seed)
                rows += [
                    (*place, metric, noisy),
                    (*place, f"null_{metric}", 2 * noisy),
                    (*place, "parameters", size),
                ]
    return pd.DataFrame(rows, columns=COLUMNS)


def test_an_order_that_the_rate_turns_round() -> None:
    values = {"opd-lr-x0.3": 1.0, "opd": 3.0, "rlvr-lr-x0.3": 2.0, "rlvr": 6.0}
    places = {"-lr-x0.3": "0.3", "": "1", "-lr-x3": "3"}
    grid = regimes.order_grid(planted(values), "opd", "rlvr", "nss", places)
    assert list(grid.columns) == ["0.3", "1", "3"]
    assert grid.to_numpy().tolist() == [
        [">", ">", "–"],
        ["<", ">", "–"],
        ["–", "–", "–"],
    ]


@pytest.mark.parametrize(
    ("factor", "near"), [(1.0, True), (1.2, True), (1.3, False), (0.7, False)]
)
def test_comparable_is_within_a_factor(factor: float, near: bool) -> None:
    table = planted({"opd": 1.0, "other": factor})
    assert regimes.comparable(table, "opd", "other", "nss") is near


def test_nearer_and_farther() -> None:
    table = planted({"opd": 1.0, "opd-wide": 2.0, "sft": 1.0, "sft-wide": 0.5})
    printed = {"nss": 4.0}
    (near,) = regimes.approach(table, "opd", "-wide", printed).itertuples()
    (far,) = regimes.approach(table, "sft", "-wide", printed).itertuples()
    assert (near.trend, far.trend) == ("nearer", "farther")
    np.testing.assert_allclose([near.nearer, far.nearer], [2.0, 0.5])
    np.testing.assert_allclose([near.ours, near.changed], [1.01, 2.02])
    assert regimes.approach(table, "rlvr", "-wide", printed).empty


def test_sparsity_is_weighted_by_size() -> None:
    table = planted({"opd": 0.4}, "sparsity")
    found = regimes.distance_to(table, "opd", "sparsity", 0.4)
    # (100 * 0.5 + 300 * 1.5) / 400 = 1.25, in place of the plain mean of 1
    np.testing.assert_allclose(found[0], np.log(1.25))


def test_what_is_shown_is_weighted_as_what_is_judged_and_a_mean_over_seeds() -> None:
    table = planted({"opd": 0.4, "opd-wide": 0.2}, "sparsity")
    table.loc[table["seed"] == 2, "value"] *= 2
    (row,) = regimes.approach(table, "opd", "-wide", {"sparsity": 0.1}).itertuples()
    seeds = np.mean([1.0, 1.01, 2 * 1.02])
    np.testing.assert_allclose(
        [row.ours, row.changed], [0.4 * 1.25 * seeds, 0.2 * 1.25 * seeds]
    )


# --- figures ---------------------------------------------------------------------


def test_a_sweep_draws_each_setting_where_it_stands() -> None:
    table = planted({"opd": 1.0, "opd-x2": 3.0})
    places = {"": 128, "-x2": 256}
    printed = {("opd", "nss"): 0.1}
    figure = regimes_figures.sweep(table, ["opd"], places, ["nss"], "w", printed)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    np.testing.assert_allclose(lines["OPD"].get_xdata(), [128, 256])
    np.testing.assert_allclose(lines["OPD"].get_ydata(), [1.01, 3.03])
    np.testing.assert_allclose(lines["_null"].get_ydata(), [2.02, 6.06])
    assert any(list(line.get_ydata()) == [0.1] for line in figure.axes[0].lines)


def test_variants_stand_beside_the_margin_of_the_first() -> None:
    table = planted({"opd": 0.4, "rlvr": 0.2}, "sparsity")
    names = {"opd": "main", "opd-teacher-x1": "missing", "rlvr": "reward"}
    margins = {"sparsity": (-0.06, 0.06)}
    figure = regimes_figures.variant_dots(table, names, ["sparsity"], margins)
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.get_yticklabels()] == ["main", "reward"]
    (band,) = [patch for patch in ax.patches if patch.get_alpha() == 0.15]
    left, right = band.get_extents().transformed(ax.transData.inverted()).intervalx
    np.testing.assert_allclose(right - left, 0.12)
    marks = {
        (line.get_marker(), float(line.get_ydata()[0])): line.get_xdata()[0]
        for line in ax.lines
        if line.get_marker() in ("o", "|")
    }
    # Weighted by size, which makes 1.25 of the planted value.
    np.testing.assert_allclose(marks["o", 0], 0.4 * 1.25 * 1.01)
    np.testing.assert_allclose(marks["|", 0], 0.8 * 1.25 * 1.01)


def dots(ax: Axes, marker: str) -> list[tuple[float, float]]:
    """Where the single marks of a kind stand: across, and the row."""
    there = [line for line in ax.lines if line.get_marker() == marker]
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in there]


@pytest.mark.parametrize(
    ("metric", "unit", "margin", "band"),
    [
        ("nss", 1.0, (0.8, 1.25), (0.8 * 1.01, 1.25 * 1.01)),
        ("sparsity", 0.2, (-0.06, 0.06), (0.2525 - 0.06, 0.2525 + 0.06)),
    ],
)
def test_variants_stand_side_by_side_with_a_margin_around_the_first(
    metric: str, unit: float, margin: tuple[float, float], band: tuple[float, float]
) -> None:
    table = planted({"opd-task-gcd": 2 * unit, "opd": unit}, metric)
    names = {"opd": "OPD", "opd-width-x2": "wide", "opd-task-gcd": "gcd"}
    figure = regimes_figures.variant_dots(table, names, [metric], {metric: margin})
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.get_yticklabels()] == ["OPD", "gcd"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first row is on top
    # Sparsity is weighted by the matrices' sizes, 1.25 in place of 1.
    mean = unit * 1.01 * (1.25 if metric == "sparsity" else 1.0)
    np.testing.assert_allclose(dots(ax, "o"), [(mean, 0), (2 * mean, 1)])
    np.testing.assert_allclose(dots(ax, "|"), [(2 * mean, 0), (4 * mean, 1)])
    (span,) = ax.patches
    np.testing.assert_allclose(
        [span.get_x(), span.get_x() + span.get_width()], band, rtol=1e-6
    )
    bare = regimes_figures.variant_dots(table, names, [metric], {})
    assert not bare.axes[0].patches

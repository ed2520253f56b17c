"""What is drawn of choices are the planted numbers."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from opd_geometry.analysis import bounds
from opd_geometry.analysis.choices import Choice, Reading
from opd_geometry.book import bounds_figures, choices_figures, figures
from opd_geometry.experiments.measure import COLUMNS

SEEDS = (0, 1, 2)
LEVELS = {"sft": 0.2, "opd": 0.5}
SHARE = Choice(
    "low_magnitude_overlap",
    "α",
    (
        Reading("0.1", "low_magnitude_overlap@alpha=0.1"),
        Reading("0.5", "low_magnitude_overlap"),
    ),
    "0.5",
)
RANK = Choice(
    "hill_alpha",
    "k",
    (Reading("n/8", "hill_alpha"), Reading("n/2", "hill_alpha@k=n/2")),
    "n/8",
    log=True,
)


@pytest.fixture
def table() -> pd.DataFrame:
    """The second reading shows twice the first; a null half of it; seeds differ."""
    rows = []
    for arm, level in LEVELS.items():
        for seed in SEEDS:
            for choice in (SHARE, RANK):
                for factor, reading in enumerate(choice.readings, 1):
                    value = factor * level + 0.01 * (seed - 1)
                    key = (f"{arm}-{seed}", arm, seed, 10, "m", "q", 0)
                    rows.append((*key, reading.metric, value))
                    rows.append((*key, f"null_{reading.metric}", value / 2))
    return pd.DataFrame(rows, columns=COLUMNS)


def lines(ax: Axes, label: str) -> list[np.ndarray]:
    """Heights of the lines with that label."""
    return [
        np.asarray(line.get_ydata(), float)
        for line in ax.get_lines()
        if line.get_label() == label
    ]


def test_draws_means_ranges_and_nulls(table: pd.DataFrame) -> None:
    (ax,) = choices_figures.by_choice(table, ["sft", "opd"], [[RANK]]).axes
    np.testing.assert_allclose(lines(ax, "SFT"), [[0.2, 0.4]])
    np.testing.assert_allclose(lines(ax, "OPD"), [[0.5, 1.0]])
    np.testing.assert_allclose(lines(ax, "_null"), [[0.1, 0.2], [0.25, 0.5]])
    band = ax.collections[1].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([band.min(), band.max()], [0.49, 1.01])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["n/8", "n/2"]
    assert ax.get_yscale() == "log"
    np.testing.assert_allclose(ax.lines[0].get_xdata(), 0)  # the default
    assert {"SFT", "OPD"} <= {text.get_text() for text in ax.texts}


def test_overlaps_are_divided_by_the_masks_share(table: pd.DataFrame) -> None:
    (ax,) = choices_figures.by_choice(table, ["opd"], [[SHARE]]).axes
    np.testing.assert_allclose(lines(ax, "OPD"), [[0.5 / 0.1, 1.0 / 0.5]])
    np.testing.assert_allclose(lines(ax, "_null"), [[0.25 / 0.1, 0.5 / 0.5]])
    np.testing.assert_allclose(lines(ax, "_chance"), [[1, 1]])


def test_names_lines_once_in_a_row_of_one_quantity(table: pd.DataFrame) -> None:
    left, right = choices_figures.by_choice(table, ["opd"], [[RANK, RANK]]).axes
    assert left.get_ylim() == right.get_ylim()
    assert not left.texts
    assert [text.get_text() for text in right.texts] == ["OPD"]
    both = choices_figures.by_choice(table, ["opd"], [[RANK, SHARE]]).axes
    assert all(ax.texts for ax in both)


def test_leaves_out_an_arm_that_never_moved(table: pd.DataFrame) -> None:
    rest = table[(table["arm"] != "sft") | (table["metric"] != "hill_alpha")]
    (ax,) = choices_figures.by_choice(rest, ["sft", "opd"], [[RANK]]).axes
    assert not lines(ax, "SFT")
    assert lines(ax, "OPD")


def test_refuses_a_table_without_the_arms(table: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="none of the arms rlvr"):
        choices_figures.by_choice(table, ["rlvr"], [[RANK]])


# --- the bounds of the three-gate account -----------------------------------------


def held_of(*arms: str) -> pd.DataFrame:
    """Three matrices an arm, side and gate; the null is half of its arm."""
    rows = []
    for place, arm in enumerate(arms, 1):
        for side, scale in (("arm", 1.0), ("null", 0.5)):
            for gate in (bounds.ANGLE, bounds.SHIFT, bounds.DENSITY):
                for matrix in range(3):
                    share = 0.1 * scale * place * (matrix + 1)
                    used = 0.05 * place * (matrix + 1)
                    key = (arm, 0, str(matrix), side, gate)
                    rows.append((*key, 2 * share, share, used, share, 1.0))
    columns = ["arm", "seed", "matrix", "side", "gate", "measured", "bound", "used"]
    return pd.DataFrame(rows, columns=[*columns, "gap_share", "norm"])


def test_dots_lie_at_bound_and_measured() -> None:
    axes = bounds_figures.against_bounds(held_of("opd", "rlvr"), ["opd", "rlvr"]).axes
    for ax in axes:
        (dots,) = (line for line in ax.lines if line.get_label() == "_rlvr")
        np.testing.assert_allclose(dots.get_xdata(), [0.2, 0.4, 0.6])
        np.testing.assert_allclose(dots.get_ydata(), [0.4, 0.8, 1.2])
        (null,) = (line for line in ax.lines if line.get_label() == "_null of rlvr")
        np.testing.assert_allclose(null.get_xdata(), [0.1, 0.2, 0.3])
        assert null.get_color() == bounds_figures.GREY
    assert len(axes) == 2
    (diagonal,) = lines(axes[1], "_bound")
    np.testing.assert_allclose(diagonal, axes[1].get_xlim())
    (wedin,) = (line for line in axes[0].lines if line.get_label() == "_bound")
    share, allowed = (np.asarray(x, float) for x in wedin.get_data())
    np.testing.assert_allclose(np.sin(np.radians(allowed)), np.minimum(share, 1))


def test_strips_have_their_medians_and_bars_their_shares() -> None:
    informed = pd.DataFrame(
        [("opd", 0.7, 0.6, 0.8, 0.9), ("rlvr", 0.5, 0.4, 0.6, 0.95)],
        columns=["arm", "share", "low", "high", "null"],
    )
    held = held_of("opd", "rlvr")
    held.loc[(held["arm"] == "opd") & (held["side"] == "arm"), "used"] = np.nan
    figure = bounds_figures.share_of_bounds(held, informed, ["opd", "rlvr"])
    angle, _, below = figure.axes
    (dots,) = (line for line in angle.lines if line.get_label() == "_arm rlvr")
    np.testing.assert_allclose(dots.get_xdata(), [10, 20, 30])
    medians = [c.get_segments()[0][0, 0] for c in angle.collections]
    np.testing.assert_allclose(medians, [10, 20, 20])  # null, and rlvr with its null
    assert [text.get_text() for text in angle.texts] == ["bound silent"]
    assert [bar.get_width() for bar in below.patches] == pytest.approx([70, 50])
    ends = [c.get_segments()[0][:, 0].tolist() for c in below.collections]
    assert ends[0] == pytest.approx([60, 80])
    assert ends[1] == pytest.approx([90, 90])


def test_correlations_are_drawn_with_their_intervals() -> None:
    found = pd.DataFrame(
        [
            ("opd", "arm", "small gap", 0.5, 0.3, 0.7),
            ("opd", "null", "small gap", 0.6, 0.5, 0.8),
            ("opd", "arm", "large update", -0.1, -0.2, 0.1),
            ("opd", "null", "large update", 0.0, -0.3, 0.3),
        ],
        columns=["arm", "side", "cause", "mean", "low", "high"],
    )
    gap, update = bounds_figures.steering_dots(found, ["opd"]).axes
    assert gap.get_title() == "goes with a small gap"
    for ax, arm, null in ((gap, 0.5, 0.6), (update, -0.1, 0.0)):
        dots = [x for x in ax.lines if x.get_marker() == "o"]
        grey = [x.get_xdata()[0] for x in dots if x.get_color() == figures.GREY]
        own = [x.get_xdata()[0] for x in dots if x.get_color() != figures.GREY]
        assert (own, grey) == ([arm], [null])
    ends = [c.get_segments()[0][:, 0].tolist() for c in gap.collections]
    assert ends == [[0.3, 0.7], [0.5, 0.8]]

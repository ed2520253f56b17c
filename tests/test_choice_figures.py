"""What is drawn of choices are the planted numbers."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from opd_geometry import choice_figures as figures
from opd_geometry.measure import COLUMNS
from opd_geometry.sensitivity import HANGS, NULL, OPEN, STAYS, Choice, Reading

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
    (ax,) = figures.by_choice(table, ["sft", "opd"], [[RANK]]).axes
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
    (ax,) = figures.by_choice(table, ["opd"], [[SHARE]]).axes
    np.testing.assert_allclose(lines(ax, "OPD"), [[0.5 / 0.1, 1.0 / 0.5]])
    np.testing.assert_allclose(lines(ax, "_null"), [[0.25 / 0.1, 0.5 / 0.5]])
    np.testing.assert_allclose(lines(ax, "_chance"), [[1, 1]])


def test_names_lines_once_in_a_row_of_one_quantity(table: pd.DataFrame) -> None:
    left, right = figures.by_choice(table, ["opd"], [[RANK, RANK]]).axes
    assert left.get_ylim() == right.get_ylim()
    assert not left.texts
    assert [text.get_text() for text in right.texts] == ["OPD"]
    both = figures.by_choice(table, ["opd"], [[RANK, SHARE]]).axes
    assert all(ax.texts for ax in both)


def test_leaves_out_an_arm_that_never_moved(table: pd.DataFrame) -> None:
    rest = table[(table["arm"] != "sft") | (table["metric"] != "hill_alpha")]
    (ax,) = figures.by_choice(rest, ["sft", "opd"], [[RANK]]).axes
    assert not lines(ax, "SFT")
    assert lines(ax, "OPD")


def test_refuses_a_table_without_the_arms(table: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="none of the arms rlvr"):
        figures.by_choice(table, ["rlvr"], [[RANK]])


def test_the_board_has_a_mark_a_value_in_the_colour_of_the_fate() -> None:
    found = pd.DataFrame(
        [
            ("hill_alpha", "k", "sft", "opd", "<?>", HANGS),
            ("hill_alpha", "k", NULL, "opd", "<<<", STAYS),
            ("nss", "which matrices", "sft", "opd", "?>", OPEN),
        ],
        columns=["quantity", "choice", "arm", "other", "signs", "fate"],
    )
    values = {("hill_alpha", "k"): "1 · 2 · 3", ("nss", "which matrices"): "a · b"}
    head, ax = figures.board(found, values).axes
    marks = {
        (round(float(line.get_xdata()[0])), float(line.get_ydata()[0])): []
        for line in ax.lines
        if line.get_marker() in figures.SIGN_MARKERS.values()
    }
    for line in ax.lines:
        if line.get_marker() in figures.SIGN_MARKERS.values():
            place = round(float(line.get_xdata()[0])), float(line.get_ydata()[0])
            marks[place].append((line.get_marker(), line.get_color()))
    red, blue, grey = (figures.FATE_COLOURS[f] for f in (HANGS, STAYS, OPEN))
    assert marks == {
        (0, 0.0): [("v", red), (".", red), ("^", red)],
        (1, 0.0): [("v", blue)] * 3,
        (0, 1.0): [(".", grey), ("^", grey)],
    }
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        "Hill exponent: k",
        "spectral shift NSS: which matrices",
    ]
    assert [text.get_text() for text in ax.texts] == list(values.values())
    names = [text.get_text() for text in head.get_yticklabels()]
    assert names == ["SFT", "OPD", "Gaussian null"]
    # An open dot for the first, a filled one for the second of each pair.
    dots = [
        (c.get_offsets()[0].tolist(), len(c.get_facecolor())) for c in head.collections
    ]
    assert dots == [([0, 0], 0), ([0, 1], 1), ([1, 2], 0), ([1, 1], 1)]

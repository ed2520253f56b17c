"""Dots lie at the planted means; nulls are open; what is absent is left out."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from opd_geometry.analysis import regimes
from opd_geometry.book import rank_figures
from opd_geometry.book.figures import ARM_STYLES

STEPS = (1, 5, 10)
RANKS = {"opd": 2.0, "rlvr": 3.0}


def planted(seeds: tuple[int, ...] = (0, 1)) -> pd.DataFrame:
    """Stable ranks that grow with the step, of four matrices; a walk of one arm."""
    rows = []
    for arm, rank in RANKS.items():
        for seed in seeds:
            for step in STEPS:
                key = (f"{arm}-{seed}", arm, seed, step)
                for role in "qkvo":
                    value = rank * step * (1 + 0.1 * seed)
                    where = (f"0.{role}", role, 0)
                    rows.append((*key, *where, "stable_rank", value))
                    if arm == "opd":
                        rows.append((*key, *where, "walk_stable_rank", 10 * value))
    columns = ["run", "arm", "seed", "step", "matrix", "role", "layer"]
    return pd.DataFrame(rows, columns=[*columns, "metric", "value"])


def test_a_run_and_its_null_lie_at_their_means() -> None:
    rows = {"stable_rank": "itself", "walk_stable_rank": "a walk"}
    panels = {"early": ("first", rows), "late": ("last", rows)}
    figure = rank_figures.null_dots(planted(), ["opd", "rlvr", "sft"], panels)
    for ax, step in zip(figure.axes, (1, 10), strict=True):
        dots = [line for line in ax.lines if line.get_marker() == "o"]
        means = [float(line.get_xdata()[0]) for line in dots]
        np.testing.assert_allclose(means, np.array([2, 3, 20]) * step * 1.05)
        faces = [line.get_markerfacecolor() == "none" for line in dots]
        assert faces == [False, False, True]
        names = [text.get_text() for text in ax.get_yticklabels()]
        assert names == ["itself", "a walk"]
    assert len(figure.legends[0].texts) == 2  # no arm that is not there


def test_a_course_lies_at_its_factor_and_groups_are_apart() -> None:
    table = planted((0, 1, 2))
    apart = regimes.courses_apart(table, ["rlvr", "opd", "sft"], "opd")
    np.testing.assert_allclose(apart["factor"], [1.5, 1.0])
    assert list(apart["n_seeds"]) == [3, 3]
    groups = {"one": {"opd": "OPD itself"}, "other": {"rlvr": "reward"}}
    (ax,) = rank_figures.course_dots(apart, groups, 1.1).axes
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert [float(dot.get_xdata()[0]) for dot in dots] == pytest.approx([1.0, 1.5])
    assert to_hex(dots[1].get_color()) == to_hex(ARM_STYLES["rlvr"].colour)
    names = [text.get_text() for text in ax.get_yticklabels()]
    assert names == ["OPD itself", "reward"]


def test_refuses_a_table_without_its_arms() -> None:
    with pytest.raises(ValueError, match="none of the arms sft"):
        rank_figures.null_dots(planted(), ["sft"], {"a": ("first", {"nss": "x"})})
    apart = regimes.courses_apart(planted(), ["rlvr"], "opd")
    with pytest.raises(ValueError, match="none of the arms sft"):
        rank_figures.course_dots(apart, {"a": {"sft": "SFT"}}, 1.1)

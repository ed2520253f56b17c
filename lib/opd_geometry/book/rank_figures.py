"""Figures of rank and locking: against nulls that move, and from arm to arm.

In the book's one style (see ``figures``); tidy tables in, figures out.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opd_geometry.book.figures import (
    ARM_STYLES,
    ATTENTION_ROLES,
    GREY,
    SMALL,
    draw_dot,
    key,
    legend_above,
    over_matrices,
    panel_row,
    panels,
    plain_log_ticks,
    present,
    styled,
)


def null_dots(
    table: pd.DataFrame,
    arms: Sequence[str],
    asked: Mapping[str, tuple[str, Mapping[str, str]]],
) -> Figure:
    """What arms show, and what each null of them shows, in rows of one panel each.

    Args:
        table: tidy.
        arms: a colour each.
        asked: title to the moment (``first`` or ``last`` checkpoint) and the rows:
            metric to its name in the figure; the first row is the arms' own.

    Returns:
        The figure: a dot an arm at its mean over attention matrices and seeds, a line
        from the lowest to the highest seed; nulls are open. A row is left empty where
        the table has no such null of an arm.

    Raises:
        ValueError: the table has none of the arms.
    """
    arms = present(table, arms)
    heights = [len(rows) for _, rows in asked.values()]
    with styled():
        n, height = len(asked), 0.8 * len(asked) + 0.32 * sum(heights)
        figure, axes = panels(n, 1, height, height_ratios=heights)
        for ax, (title, (moment, rows)) in zip(axes.flat, asked.items(), strict=True):
            for place, metric in enumerate(rows):
                ends = moments(table, metric, moment)
                for shift, arm in zip(
                    np.linspace(-0.22, 0.22, len(arms)), arms, strict=True
                ):
                    seeds = ends[ends["arm"] == arm]["value"]
                    if len(seeds):
                        _draw_mean(ax, place + shift, seeds, arm, place > 0)
            ax.axhline(0.5, color=GREY, lw=0.6)
            ax.set_yticks(range(len(rows)), list(rows.values()))
            ax.set(title=title, ylim=(len(rows) - 0.5, -0.5), xscale="log")
            plain_log_ticks(ax.xaxis)
            ax.tick_params(axis="y", length=0)
        keys = {ARM_STYLES[arm].label: key(ARM_STYLES[arm].colour) for arm in arms}
        legend_above(figure, keys, ncols=len(arms))
    return figure


def moments(table: pd.DataFrame, metric: str, moment: str) -> pd.DataFrame:
    """A metric at each run's ``first`` or ``last`` checkpoint that has it.

    Args:
        table: tidy.
        metric: averaged over the attention matrices.
        moment: which checkpoint.

    Returns:
        One row a run: arm, seed, value.
    """
    values = over_matrices(table, metric, ATTENTION_ROLES).sort_values("step")
    return values.groupby(["arm", "seed"], as_index=False).agg(value=("value", moment))


def _draw_mean(
    ax: Axes, place: float, seeds: pd.Series, arm: str, hollow: bool = False
) -> None:
    """A dot at the mean, a line over the seeds."""
    ends, colour = (seeds.min(), seeds.max()), ARM_STYLES[arm].colour
    draw_dot(ax, seeds.mean(), place, ends, colour, hollow=hollow)


def course_dots(
    apart: pd.DataFrame, groups: Mapping[str, Mapping[str, str]], margin: float
) -> Figure:
    """How far arms leave one arm's trajectory, a row an arm (for Figures 7 and 9).

    Args:
        apart: of ``regimes.courses_apart``.
        groups: name of a group to its arms, and their names in the figure.
        margin: the factor within which a trajectory is kept.

    Returns:
        The figure: a dot at the mean factor with its 95 % interval; the band is the
        margin.

    Raises:
        ValueError: none of the arms is there.
    """
    named = {arm: name for arms in groups.values() for arm, name in arms.items()}
    rows = apart.set_index("arm")
    there = present(apart, named)
    with styled():
        figure, ((ax,),) = panels(1, 1, 1.0 + 0.3 * len(there))
        ax.axvspan(1, margin, color=GREY, alpha=0.18, lw=0)
        ax.text(margin, -0.75, " margin", color=GREY, fontsize=SMALL, va="bottom")
        for place, arm in enumerate(there):
            row, colour = rows.loc[arm], ARM_STYLES[arm].colour
            draw_dot(ax, row["factor"], place, (row["low"], row["high"]), colour)
        _part_groups([ax], there, groups)
        ax.set_yticks(range(len(there)), [named[arm] for arm in there])
        ax.set(ylim=(len(there) - 0.5, -0.8))
        ax.set_xlabel("mean factor between the stable ranks; 1: one trajectory")
        ax.tick_params(axis="y", length=0)
    return figure


def _part_groups(
    axes: Iterable[Axes], arms: Sequence[str], groups: Mapping[str, Iterable[str]]
) -> None:
    """A line between the rows of two groups."""
    of_group = {arm: name for name, there in groups.items() for arm in there}
    for place, (one, two) in enumerate(pairwise(arms)):
        for ax in axes if of_group[one] != of_group[two] else ():
            ax.axhline(place + 0.5, color=GREY, lw=0.6)


def source_dots(
    table: pd.DataFrame, groups: Mapping[str, Sequence[str]], told: pd.DataFrame
) -> Figure:
    """Rank and distance of arms that differ in one thing each, and what foretold them.

    Args:
        table: tidy.
        groups: what differs, to the arms; those that are not there are left out.
        told: of ``rank_source.predictions``; drawn open, from the arm's own optimizer
            on gradients of the start.

    Returns:
        The figure: a row an arm; a dot at the mean over attention matrices and seeds of
        the stable rank and of the relative norm at the end, a line over the seeds.

    Raises:
        ValueError: the table has none of the arms.
    """
    arms = present(table, [arm for of_group in groups.values() for arm in of_group])
    walked = told[(told["predictor"] == "frozen_stable_rank")]
    walked = walked[walked["moment"] == "last"].set_index("arm")["predicted"]
    with styled():
        figure, axes = panel_row(2, 1.0 + 0.3 * len(arms))
        titles = {"stable_rank": "stable rank", "relative_norm": "relative norm"}
        for ax, (metric, title) in zip(axes, titles.items(), strict=True):
            ends = moments(table, metric, "last")
            for place, arm in enumerate(arms):
                seeds = ends[ends["arm"] == arm]["value"]
                _draw_mean(ax, place, seeds, arm)
                if metric == "stable_rank" and arm in walked:
                    mark: Any = {"mfc": "none", "mec": ARM_STYLES[arm].colour}
                    ax.plot(walked[arm], place, "D", ms=5, **mark)
            ax.set(title=f"{title} at the end", xscale="log")
            plain_log_ticks(ax.xaxis)
            ax.tick_params(axis="y", length=0)
        _part_groups(axes, arms, groups)
        axes[0].set_yticks(range(len(arms)), [ARM_STYLES[arm].label for arm in arms])
        axes[0].set_ylim(len(arms) - 0.5, -0.5)
    return figure

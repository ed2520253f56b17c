"""Figures of what hangs on a choice.

In the book's one style (see ``figures``); tidy tables in, figures out.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from opd_geometry.analysis.choices import Choice, Reading, level
from opd_geometry.analysis.evidence import Levels, levels_of
from opd_geometry.book.figures import (
    ARM_STYLES,
    GREY,
    METRIC_LABELS,
    key,
    legend_above,
    panels,
    place_labels,
    plain_log_ticks,
    present,
    share_vertical,
    styled,
)
from opd_geometry.geometry.comparison import MASK_ALPHA

NULL_KEY = "dotted, in the arm's colour: its null"
DEFAULT_KEY = "what the other chapters use"
AXIS_LABELS = {
    "η": "relative tolerance η",
    "stored in": "format of the weights",
    "k": "k, of n directions",
    "α": "share α of entries in the mask",
    "r": "rank r of the mask",
    "K": "K directions compared",
}


def by_choice(
    table: pd.DataFrame, arms: Sequence[str], grid: Sequence[Sequence[Choice]]
) -> Figure:
    """What every arm shows under every value of a choice.

    Args:
        table: tidy.
        arms: a line each.
        grid: rows of panels, a choice each.

    Returns:
        The figure: means over seeds as a line, the range over seeds as a band, an arm's
        null dotted in its colour. Overlaps by the mask's share alpha are divided by it,
        so that changes at random places lie at 1.

    Raises:
        ValueError: the table has none of the arms.
    """
    arms = present(table, arms)
    levels = levels_of(table, arms)
    columns = max(map(len, grid))
    with styled():
        figure, axes = panels(len(grid), columns, 0.5 + 2.7 * len(grid))
        named = []
        for row, choices in zip(axes, grid, strict=True):
            for ax, choice in zip(row, choices, strict=False):
                _draw_choice(ax, levels, arms, choice)
            for ax in row[len(choices) :]:
                ax.set_axis_off()
            used = list(row[: len(choices)])
            alike = len({choice.quantity.partition("_")[0] for choice in choices}) == 1
            if alike:  # one quantity: one axis, and the lines are named once
                share_vertical(used)
            named += used[-1:] if alike else used
        band = Rectangle((0, 0), 1, 1, color=GREY, alpha=0.2, lw=0)
        legend_above(figure, {NULL_KEY: key(GREY, ":"), DEFAULT_KEY: band}, ncols=2)
        figure.draw_without_rendering()  # places the axes, which the labels measure
        for ax in named:
            place_labels(ax)
    return figure


def _draw_choice(ax: Axes, table: Levels, arms: Sequence[str], choice: Choice) -> None:
    """The arms and their nulls over the values of one choice."""
    names = [reading.value for reading in choice.readings]
    places = range(len(names))
    default = names.index(choice.default)
    ax.axvline(default, color=GREY, lw=6, alpha=0.2, label="_default", zorder=0)
    for arm in arms:
        look = ARM_STYLES[arm]
        seeds, null = (
            [_drawn(table, arm, choice, reading, prefix) for reading in choice.readings]
            for prefix in ("", "null_")
        )
        if any(values.empty for values in seeds):  # an arm that never moved
            continue
        low, mean, high = ([f(v) for v in seeds] for f in (np.min, np.mean, np.max))
        drawn: Any = {"color": look.colour, "marker": "o", "markersize": 4}
        ax.plot(places, mean, look.dash, label=look.label, **drawn)
        ax.fill_between(places, low, high, color=look.colour, alpha=0.18, lw=0)
        level_of_null = [np.mean(values) for values in null]
        ax.plot(places, level_of_null, ":", color=look.colour, lw=1.3, label="_null")
    if "overlap" in choice.quantity:
        chance = 1.0 if choice.name == "α" else MASK_ALPHA
        ax.axhline(chance, color=GREY, lw=0.8, label="_chance")
    if choice.log:
        ax.set_yscale("log")
        plain_log_ticks(ax.yaxis)
    over = " over α" if choice.name == "α" else ""
    ax.set(title=METRIC_LABELS[choice.quantity] + over, xlim=(-0.3, len(names) - 0.7))
    ax.set_xlabel(AXIS_LABELS.get(choice.name, choice.name))
    ax.set_xticks(places, [name.replace(" ", "\n") for name in names])


def _drawn(
    table: Levels, arm: str, choice: Choice, reading: Reading, prefix: str
) -> pd.Series:
    """One number a seed, as it is drawn."""
    values = level(table, arm, choice, reading, prefix)
    return values / float(reading.value) if choice.name == "α" else values

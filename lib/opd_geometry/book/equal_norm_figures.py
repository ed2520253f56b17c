"""Figures of arms at equal norm, one change at a time.

In the book's one style (see ``figures``); tidy tables in, figures out.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from opd_geometry.analysis.equal_norm import AT_END, AT_EQUAL_NORM
from opd_geometry.book.figures import (
    ARM_STYLES,
    GREY,
    METRIC_LABELS,
    SMALL,
    name_rows,
    panel_row,
    styled,
)


def ladder(comparison: pd.DataFrame, names: Mapping[tuple[str, str], str]) -> Figure:
    """What each change does, at the end and once both arms have gone equally far.

    Args:
        comparison: of ``equal_norm.compared``.
        names: pair of arms to what changes between them; the rows, from the top.

    Returns:
        The figure: a column a metric, a row a pair. An open dot is the ratio of the two
        arms at their ends, a filled one at equal norm, both with 95 % intervals; a grey
        tick is the ratio of their Gaussian updates at equal norm.
    """
    metrics = list(dict.fromkeys(comparison["metric"]))
    there = set(zip(comparison["arm"], comparison["other"], strict=True))
    pairs = [pair for pair in names if pair in there]
    with styled():
        figure, axes = panel_row(len(metrics), 0.9 + 0.5 * len(pairs))
        for ax, metric in zip(axes, metrics, strict=True):
            of_metric = comparison[comparison["metric"] == metric]
            for place, pair in enumerate(pairs):
                of_pair = (of_metric["arm"] == pair[0]) & (
                    of_metric["other"] == pair[1]
                )
                _draw_rung(ax, place, of_metric[of_pair].set_index("at"))
            ax.axvline(1, color=GREY, lw=0.8, zorder=0)
            ax.set(xscale="log", title=METRIC_LABELS[metric].replace(", ", ",\n"))
            _factor_ticks(ax)
            for between in range(1, len(pairs)):
                ax.axhline(between - 0.5, color=GREY, lw=0.3)
        labels = [
            f"{names[pair]}\n{ARM_STYLES[pair[0]].label} → {ARM_STYLES[pair[1]].label}"
            for pair in pairs
        ]
        name_rows(axes[0], labels, fontsize=SMALL)
        figure.supxlabel(
            "factor ( ○ at the end   ● at equal norm   ┃ Gaussian updates there )",
            fontsize=SMALL,
            color=GREY,
        )
    return figure


def _draw_rung(ax: Axes, place: int, rows: pd.DataFrame) -> None:
    """One pair in one metric: two dots with intervals, and the null."""
    for at, shift, face in ((AT_END, -0.14, "none"), (AT_EQUAL_NORM, 0.14, None)):
        row = rows.loc[at]
        if np.isnan(row["ratio"]):
            continue
        colour = ARM_STYLES[row["other"]].colour
        look: Any = {"color": colour, "lw": 1.2}
        ax.hlines(place + shift, row["low"], row["high"], **look)
        ax.plot(row["ratio"], place + shift, "o", ms=5, mfc=face or colour, mec=colour)
    null = rows.loc[AT_EQUAL_NORM, "null"]
    if np.isfinite(null):
        ax.vlines(null, place + 0.0, place + 0.3, color=GREY, lw=2)


def _factor_ticks(ax: Axes) -> None:
    """A logarithmic axis of factors around 1, with about three plain ticks."""
    low, high = ax.get_xlim()
    far = max(high, 1 / low)
    low, high = min(low, far**-0.3), max(high, far**0.3)
    for step in (1.02, 1.05, 1.1, 1.2, 1.5, 2, 5, 10):
        ticks = [step**n for n in range(-9, 10) if low <= step**n <= high]
        if len(ticks) <= 3:
            break
    ax.set(xlim=(low, high), xticks=ticks)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value, 2):g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(axis="x", which="minor", length=0)

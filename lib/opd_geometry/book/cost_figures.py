"""How the cost of the diagnostics grows: one figure, from data/benchmarks."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opd_geometry.book.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SMALL,
    WIDTH,
)

# side in ratios.csv -> label, colour
SIDES = {
    "protocol": ("paper's protocol, three full SVDs", GREY),
    "pair": ("one pair", BLUE),
    "further": ("each further checkpoint", GREEN),
}
METRICS = {"all": ("every metric", ORANGE), "cheap": ("without an SVD", PURPLE)}


def cost_growth(ratios: pd.DataFrame, growth: pd.DataFrame) -> Figure:
    """Seconds against the side of a square matrix, and against the number of layers.

    Args:
        ratios: data/benchmarks/ratios.csv: rows, cols, side and cpu_seconds.
        growth: data/benchmarks/growth.csv: layers, width, metrics and seconds; the
            width that has most layer counts is drawn.

    Returns:
        Two panels on logarithmic axes. Grey dots: growth as n^3, and as the layers.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.2))
    square = ratios[ratios["rows"] == ratios["cols"]]
    _draw(left, square, "side", SIDES, ("cols", "cpu_seconds"), power=3)
    left.set(xlabel="side n of the matrix", ylabel="processor seconds")
    per_width = growth.groupby("width")["layers"].nunique()
    width = per_width.idxmax()
    series = growth[growth["width"] == width]
    _draw(right, series, "metrics", METRICS, ("layers", "seconds"), power=1)
    right.set(xlabel=f"layers of width {width}", ylabel="seconds")
    for ax in (left, right):
        ax.legend(frameon=False, fontsize=SMALL)
    return figure


def _draw(
    ax: Axes,
    table: pd.DataFrame,
    by: str,
    named: Mapping[str, tuple[str, str]],
    columns: tuple[str, str],
    power: int,
) -> None:
    """A line a kind, and dots that grow with that power from the last line's end."""
    x, y = columns
    for kind, (label, colour) in named.items():
        line = table[table[by] == kind].sort_values(x)
        if len(line):
            ax.plot(line[x], line[y], "o-", color=colour, label=label, markersize=4)
            ends = line.iloc[[0, -1]][x].to_numpy(float)
            height = float(line.iloc[-1][y]) * (ends / ends[-1]) ** power
            ax.plot(ends, height, ":", color=GREY, linewidth=1)
    ax.set(xscale="log", yscale="log")
    ticks = np.unique(table[x])
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()

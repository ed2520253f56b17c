"""Figures of signal and noise: wrong rewards, and how far a signal leads.

In the book's one style (see ``figures``); tables of ``analysis.signal`` in.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from opd_geometry.analysis.signal import FLIPS
from opd_geometry.book.figures import (
    ARM_STYLES,
    GREY,
    LABELS,
    SMALL,
    TEXT,
    labelled,
    legend_above,
    mark_of,
    panels,
    place_labels,
    plain_log_ticks,
    styled,
    world_panels,
)

FLIPPED = {"rlvr": 0, "rlvr-flip-30": 30, "rlvr-flip-45": 45, "rlvr-coin": 50}


def flips(found: pd.DataFrame, metrics: Sequence[str], beside: Sequence[str]) -> Figure:
    """Diagnostics of RLVR over the share of its rewards that are wrong.

    Args:
        found: of ``signal.outcomes``.
        metrics: one panel each.
        beside: arms without flips, drawn as level lines.

    Returns:
        A line through the means of RLVR's arms, a dot a seed.
    """
    with styled():
        n_rows = (len(metrics) + 1) // 2
        figure, axes = panels(n_rows, 2, 0.8 + 2.2 * n_rows, sharex=True)
        for ax, metric in zip(axes.flat, metrics, strict=False):
            noisy = found[found["arm"].isin(FLIPS)].dropna(subset=metric)
            x = noisy["arm"].map(FLIPPED)
            means = noisy.groupby(x)[metric].mean()
            green = ARM_STYLES["rlvr"].colour
            ax.plot(means.index, means, color=green, label="RLVR")
            ax.plot(x, noisy[metric], "o", color=green, ms=4)
            for arm in beside:
                level, look = found.loc[found["arm"] == arm, metric], ARM_STYLES[arm]
                named: Any = {"color": look.colour, "label": look.label}
                if len(level):
                    ax.plot([0, 50], [level.mean()] * 2, look.dash, **named)
            ax.set_title(LABELS[metric])
            ax.set_xticks([0, 25, 50], ["0", "25", "50"])
            ax.tick_params(labelsize=SMALL)
            # in full: an offset above the axis would touch the title
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
            place_labels(ax)
        for ax in list(axes.flat)[len(metrics) :]:
            ax.remove()
        figure.supxlabel("rewards that are wrong (%)", fontsize=10, color=TEXT)
    return figure


def foretold(worlds: Mapping[str, pd.DataFrame]) -> Figure:
    """How far arms went against how far the signal at their start could have led.

    Args:
        worlds: name to the table of ``signal.lasted``.

    Returns:
        A panel a world, a dot an arm and seed; grey where all of the signal lasts.
    """
    highest = 1.15 * max(float(t["displacement"].max()) for t in worlds.values())
    with styled():
        xlabel = "what the signal at the start could have led to"
        figure, axes = world_panels(worlds, 3.4, xlabel, sharex=False)
        for ax, table in zip(axes, worlds.values(), strict=True):
            ends = [1.0, float(table["ceiling"].max()) * 1.05]
            ax.plot(ends, ends, ":", color=GREY, lw=1.2)
            for arm, rows in table.groupby("arm", sort=False):
                look, spots = ARM_STYLES[str(arm)], rows[["ceiling", "displacement"]]
                named: Any = {"color": look.colour, "label": look.label, "ms": 5}
                ax.plot(*spots.to_numpy().T, mark_of(str(arm)), **named)
            ax.set_xscale("log")
            plain_log_ticks(ax.xaxis)
            ax.set_ylim(0.8, highest)
        axes[0].set_ylabel("displacement at the end")
        legend_above(figure, labelled(axes), ncols=3)
    return figure

"""Figures of a real language model beside the small world.

In the book's one style (see ``figures``); tables of ``analysis.real_model`` in.
"""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from opd_geometry.analysis.real_model import LOCK_NULLS
from opd_geometry.book.figures import (
    ARM_STYLES,
    GREY,
    LABELS,
    TEXT,
    arm_keys,
    draw_arms,
    key,
    legend_above,
    log_ticks,
    mark_of,
    name_rows,
    styled,
    world_panels,
)

LOCK_MARKS = {"turned increments": "D", "walk": "^"}


def over_nulls(worlds: Mapping[str, pd.DataFrame]) -> Figure:
    """Diagnostics in units of their sharpest nulls, a panel a world.

    Args:
        worlds: name to the table of ``real_model.over_nulls``.

    Returns:
        A row a diagnostic, a dot an arm; grey the line where an update is its null.
    """
    metrics = list(dict.fromkeys(m for t in worlds.values() for m in t["metric"]))
    arms = list(dict.fromkeys(arm for t in worlds.values() for arm in t["arm"]))
    with styled():
        figure, axes = world_panels(
            worlds, 1.2 + 0.5 * len(metrics), "own over sharpest null"
        )
        for ax, table in zip(axes, worlds.values(), strict=True):
            ax.axvline(1.0, color=GREY, ls=":", lw=1.2)
            y = [float(metrics.index(metric)) for metric in table["metric"]]
            draw_arms(ax, table, arms, "times", y)
            log_ticks(ax, [0.5, 1, 2, 4, 8])
        name_rows(axes[0], [LABELS[metric] for metric in metrics])
        legend_above(figure, arm_keys(arms), ncols=4)
    return figure


def locking(worlds: Mapping[str, pd.DataFrame]) -> Figure:
    """Sim_16 after a fifth of training with the end, beside its nulls.

    Args:
        worlds: name to the table of ``real_model.locking``.

    Returns:
        A panel a world, a row an arm: own filled, nulls hollow.
    """
    arms = list(dict.fromkeys(arm for t in worlds.values() for arm in t["arm"]))
    with styled():
        xlabel = "similarity with the end after a fifth of training, Sim₁₆"
        figure, axes = world_panels(worlds, 1.2 + 0.36 * len(arms), xlabel)
        for ax, table in zip(axes, worlds.values(), strict=True):
            for row in table.to_dict("records"):
                y, look = arms.index(row["arm"]), ARM_STYLES[row["arm"]]
                ends = [row[name] for name in (*LOCK_NULLS, "own")]
                ax.plot([min(ends), max(ends)], [y, y], color=GREY, lw=1)
                ax.plot(row["own"], y, mark_of(row["arm"]), color=look.colour, ms=6)
                for name, mark in LOCK_MARKS.items():
                    ax.plot(row[name], y, mark, color=TEXT, mfc="none", ms=5)
            ax.set_xlim(0, 1)
        name_rows(axes[0], [ARM_STYLES[arm].label for arm in arms])
        nulls = {f"null: {n}": key(TEXT, m, True) for n, m in LOCK_MARKS.items()}
        keys = {"own": key(TEXT)} | nulls
        legend_above(figure, keys, ncols=3)
    return figure

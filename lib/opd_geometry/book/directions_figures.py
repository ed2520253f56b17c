"""Figures of shared directions, world beside world.

In the book's one style (see ``figures``); tables of ``analysis.directions`` in.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from opd_geometry.book.figures import (
    ARM_STYLES,
    GREY,
    TEXT,
    draw_dot,
    key,
    labelled,
    legend_above,
    mark_of,
    name_rows,
    styled,
    world_panels,
)


def shared(worlds: Mapping[str, pd.DataFrame], arm: str = "opd") -> Figure:
    """Who ends in an arm's direction, a panel a world.

    Args:
        worlds: name to the table of ``directions.shared``.
        arm: whose direction.

    Returns:
        A row another arm: cosine of the updates with its 95 % interval filled, overlap
        of their leading right subspaces hollow; grey the line of unrelated updates.
    """
    arms = list(dict.fromkeys(a for t in worlds.values() for a in t["other"]))
    with styled():
        xlabel = f"shared with {ARM_STYLES[arm].label} (dotted: unrelated updates)"
        figure, axes = world_panels(worlds, 1.2 + 0.3 * len(arms), xlabel)
        for ax, table in zip(axes, worlds.values(), strict=True):
            ax.axvline(0.0, color=GREY, ls=":", lw=1.2)
            for row in table.to_dict("records"):
                y, colour = arms.index(row["other"]), ARM_STYLES[row["other"]].colour
                draw_dot(ax, row["cosine"], y, (row["low"], row["high"]), colour)
                ax.plot(row["subspace"], y, "D", color=colour, mfc="none", ms=5)
            ax.set_xlim(-1, 1.05)  # of a cosine, whatever an interval of two pairs says
        same = f"{ARM_STYLES[arm].label}, another seed"
        names = [same if a == arm else ARM_STYLES[a].label for a in arms]
        name_rows(axes[0], names)
        keys = {
            "cosine of the updates": key(TEXT),
            "overlap of their leading subspaces": key(TEXT, "D", hollow=True),
        }
        legend_above(figure, keys, ncols=2)
    return figure


def along_the_way(
    worlds: Mapping[str, pd.DataFrame], arms: Sequence[str], arm: str = "opd"
) -> Figure:
    """When a direction is shared: cosine of increments over training, a panel a world.

    Args:
        worlds: name to the table of ``directions.along_the_way``.
        arms: the others, a line each.
        arm: whose increments.

    Returns:
        A line an arm through its windows' ends; grey the line of unrelated increments.
    """
    with styled():
        xlabel = "end of the window (% of training)"
        figure, axes = world_panels(worlds, 3.6, xlabel)
        for ax, table in zip(axes, worlds.values(), strict=True):
            ax.axhline(0.0, color=GREY, ls=":", lw=1.2)
            for name in arms:
                rows, look = table[table["other"] == name], ARM_STYLES[name]
                label = f"{look.label}, another seed" if name == arm else look.label
                named: Any = {"color": look.colour, "label": label}
                named |= {"marker": mark_of(name), "ms": 4}
                if len(rows):
                    ax.plot(100 * rows["stop"], rows["cosine"], look.dash, **named)
            ax.set_xlim(0, 104)
        axes[0].set_ylabel(f"cosine with {ARM_STYLES[arm].label}'s increment")
        legend_above(figure, labelled(axes), ncols=3)
    return figure

"""Figures of what does not fit together: shares that masks can hold, single seeds.

In the book's one style (see ``figures``); tables of ``analysis.exclusions`` in.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opd_geometry.analysis.exclusions import MASKS, closest, joint
from opd_geometry.book.board import in_words
from opd_geometry.book.figures import (
    ARM_STYLES,
    BLUE,
    GREY,
    RED,
    SMALL,
    panels,
    styled,
)

ABOVE: dict[str, Any] = {"va": "bottom", "fontsize": SMALL}  # a word over a panel


def feasible_shares(
    paper: pd.DataFrame,
    stated: Mapping[float, str],
    measured: Mapping[float, pd.DataFrame],
    null: Mapping[float, pd.DataFrame],
) -> Figure:
    """Which share a mask can hold: by printed numbers, and by ours, where it is known.

    Args:
        paper: of ``printed_shares``.
        stated: share to what the paper says of it; vertical lines of the left panel,
            named on their outer sides.
        measured: true share to ``measured_shares``; vertical lines of the right panel.
        null: the same of Gaussian updates.

    Returns:
        Two panels of intervals. Thick: from pooled counts; thin: from any means. A grey
        tick on the left is the share of which a random update would overlap as printed,
        on the right it is the true share.
    """
    with styled():
        figure, ((left, right),) = panels(1, 2, 3.6)
        for place, row in enumerate(paper.itertuples()):
            look = ARM_STYLES[str(row.arm)]
            _draw_interval(left, place, row._asdict(), look.colour, row.overlap)
        _draw_interval(left, len(paper), joint(paper), GREY)
        for (share, said), side in zip(stated.items(), ("right", "left"), strict=False):
            left.axvline(share, color=RED, linestyle=":", lw=1.2, zorder=0)
            said = f"{said} " if side == "right" else f" {said}"
            left.text(share, -0.75, said, color=RED, ha=side, **ABOVE)
        labels = _draw_known(right, measured, null)
        names = _row_names(paper)
        left.set_yticks(range(len(names)), names, fontsize=SMALL)
        right.set_yticks(range(len(labels)), labels, fontsize=SMALL)
        left.set_title("the paper's Figure 3", pad=20)
        right.set_title("here, with masks of known share", pad=20)
        for ax in (left, right):
            ax.set(xlim=(0, 1), xlabel="share α that a mask can hold")
            ax.set_ylim(len(labels) - 0.4, -0.7)
            ax.tick_params(axis="y", length=0)
    return figure


def _draw_known(
    ax: Axes,
    measured: Mapping[float, pd.DataFrame],
    null: Mapping[float, pd.DataFrame],
) -> list[str]:
    """Intervals of masks whose share is known, a line a share; names of the rows."""
    labels: list[str] = []
    shifts = np.linspace(-0.17, 0.17, len(measured)) if len(measured) > 1 else [0.0]
    for shift, (share, rows) in zip(shifts, measured.items(), strict=True):
        ax.axvline(share, color=GREY, linestyle=":", lw=1.2, zorder=0)
        ax.text(share, -0.75, f"{share:g}", ha="center", **ABOVE)
        groups = list(rows.groupby(["arm", "mask"], sort=False))
        for place, ((arm, _), group) in enumerate(groups):
            colour = ARM_STYLES[arm].colour
            _draw_interval(ax, place + shift, joint(group), colour, share, width=4)
        for place, ends in enumerate((joint(rows), joint(null[share])), len(groups)):
            _draw_interval(ax, place + shift, ends, GREY, share, width=4)
        labels = [*_row_names(rows), "Gaussian updates"]
    return labels


def _row_names(rows: pd.DataFrame) -> list[str]:
    """Arms with their masks in the order of the rows, and all of them."""
    pairs = dict.fromkeys(zip(rows["arm"], rows["mask"], strict=True))
    return [f"{ARM_STYLES[a].label}, {MASKS[m]}" for a, m in pairs] + ["all together"]


def _draw_interval(
    ax: Axes,
    place: float,
    ends: Mapping[str, Any],
    colour: str,
    tick: float | None = None,
    width: float = 7,
) -> None:
    """A thin line for means, a thick one for pooled counts, a tick."""
    look: dict[str, Any] = {"color": colour, "solid_capstyle": "butt"}
    ax.plot([ends["mean_low"], ends["mean_high"]], [place] * 2, lw=1.5, **look)
    ax.plot([ends["low"], ends["high"]], [place] * 2, lw=width, **look)
    if tick is not None:
        half = 0.045 * width
        ax.plot([tick] * 2, [place - half, place + half], color=GREY, lw=1.2)


def one_seed(seeds: pd.DataFrame) -> Figure:
    """Where each seed stands in the part of each claim that is the closest call.

    Args:
        seeds: of ``by_seed``.

    Returns:
        A row a claim, a dot a seed, in standard deviations from the part's bound, a
        tick at the mean. Left of zero, in red, are seeds that alone say the opposite of
        the mean. The grey band holds 95 % of the seeds of a quantity that lies on its
        bound.
    """
    rows = closest(seeds)
    order = rows.groupby("claim")["spreads"].mean().sort_values()
    with styled():
        figure, ((ax,),) = panels(1, 1, 1.0 + 0.3 * max(4, len(order)))
        ax.axvspan(-1.96, 1.96, color=GREY, alpha=0.18, lw=0)
        ax.axvline(0, color=GREY, lw=1)
        labels = []
        for place, claim in enumerate(order.index):
            of_claim = rows[rows["claim"] == claim]
            for colour, agrees in ((BLUE, True), (RED, False)):
                dots = of_claim.loc[of_claim["agrees"] == agrees, "spreads"]
                ax.plot(dots, [place] * len(dots), "o", color=colour, ms=5, alpha=0.8)
            ax.plot(order[claim], place, "|", color=GREY, ms=13, mew=1.6)
            part = in_words(str(of_claim["part"].iloc[0]))
            labels.append(f"{str(claim).replace('-', ' ')}:  {part}")
        ax.set_yticks(range(len(labels)), labels, fontsize=SMALL)
        ax.set_ylim(len(labels) - 0.4, -0.6)
        near, far = min([-2.5, *rows["spreads"]]), max([3.0, *rows["spreads"]])
        ax.set_xlim(near - 0.4, far + 0.4)
        said, other = "a seed alone says the opposite ←", "→ agrees with all seeds"
        ax.text(-0.1, -0.75, said, color=RED, ha="right", **ABOVE)
        ax.text(0.1, -0.75, other, color=BLUE, ha="left", **ABOVE)
        ax.set_xlabel("distance from the bound, in standard deviations over seeds")
    return figure

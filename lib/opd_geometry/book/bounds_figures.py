"""Figures of the bounds of the three-gate account.

In the book's one style (see ``figures``); tidy tables in, figures out.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opd_geometry.analysis.bounds import ANGLE, SHIFT, SILENT_DEG
from opd_geometry.book.figures import (
    ARM_STYLES,
    GREY,
    NULL_LABEL,
    SMALL,
    draw_dot,
    key,
    legend_above,
    name_arms,
    panel_row,
    panels,
    plain_log_ticks,
    present,
    styled,
)


def against_bounds(held: pd.DataFrame, arms: Sequence[str]) -> Figure:
    """What was measured against what each gate allows, a dot a matrix.

    Args:
        held: of ``bounds.held_against``.
        arms: a colour each.

    Returns:
        The figure: the largest angle over the update's spectral norm in gaps of W_0,
        with Wedin's bound for a small update as a line, silent from 1 on; and spectral
        shift over Mirsky's, with the diagonal. Gaussian nulls are grey.

    Raises:
        ValueError: none of the arms is there.
    """
    arms = present(held, arms)
    with styled():
        figure, ((left, right),) = panels(1, 2, 3.6)
        for ax, gate, allowed in ((left, ANGLE, "gap_share"), (right, SHIFT, "bound")):
            for side, arm in product(("null", "arm"), arms):
                rows, null = _of(held, gate, arm, side), side == "null"
                look: Any = {"ms": 4, "mew": 0, "alpha": 0.35 if null else 0.55}
                look["label"] = f"_null of {arm}" if null else f"_{arm}"
                look["color"] = _colour(arm, side)
                ax.plot(rows[allowed], rows["measured"], ".", **look)
            ax.set(title=gate, xscale="log", yscale="log")
        _draw_wedin(left)
        low, high = right.get_xlim()
        right.plot([low, high], [low, high], color=GREY, lw=1, label="_bound")
        right.set_xlim(low, high)
        left.set(xlabel="norm of the update over gap", ylabel="measured, degrees")
        right.set(xlabel="Mirsky's bound", ylabel="measured")
        keys = {ARM_STYLES[arm].label: key(ARM_STYLES[arm].colour) for arm in arms}
        keys |= {NULL_LABEL: key(GREY), "bound": key(GREY, "-")}
        legend_above(figure, keys, ncols=4)
    return figure


def _of(held: pd.DataFrame, gate: str, arm: str, side: str) -> pd.DataFrame:
    """The matrices of one arm, or of its null, at a gate."""
    chosen = (held["gate"] == gate) & (held["arm"] == arm) & (held["side"] == side)
    return held[chosen]


def _colour(arm: str, side: str) -> str:
    return GREY if side == "null" else ARM_STYLES[arm].colour


def _draw_wedin(ax: Axes) -> None:
    """The bound up to a gap of one, and where it says nothing."""
    low, high = ax.get_xlim()
    high = max(high, 2.0)
    share = np.sort([*np.geomspace(low, high, 99), 1.0])
    allowed = np.degrees(np.arcsin(np.minimum(share, 1)))
    ax.plot(share, allowed, color=GREY, lw=1, label="_bound")
    ax.axvspan(1, high, color=GREY, alpha=0.12, lw=0)
    look: Any = {"transform": ax.transAxes, "fontsize": SMALL, "color": GREY}
    ax.text(0.97, 0.04, "silent", ha="right", **look)
    ax.set_xlim(low, high)
    ax.set_ylim(top=150)
    for axis in (ax.xaxis, ax.yaxis):
        plain_log_ticks(axis)
    ax.set_xticks([0.1, 1, 10])
    ax.set_yticks([0.1, 1, 10, SILENT_DEG])


def share_of_bounds(
    held: pd.DataFrame, informed: pd.DataFrame, arms: Sequence[str]
) -> Figure:
    """How much of what the bounds allow was used, and for whom Wedin's says anything.

    Args:
        held: of ``bounds.held_against``.
        informed: of ``bounds.informative``.
        arms: the rows, from the top.

    Returns:
        The figure: a dot a matrix and seed, a tick at the median, the null below in
        grey; on the right the share of matrices with a bound below 90 degrees as a bar,
        a whisker for its 95 % interval, and a grey tick at the null.

    Raises:
        ValueError: none of the arms is there.
    """
    arms = present(held, arms)
    with styled():
        figure, axes = panel_row(3, 0.9 + 0.55 * len(arms))
        for ax, gate in zip(axes, (ANGLE, SHIFT), strict=False):
            for place, arm in enumerate(arms):
                for side, offset in (("arm", -0.16), ("null", 0.2)):
                    _draw_strip(ax, held, gate, arm, side, place + offset)
            ax.axvline(100, color=GREY, lw=1, label="_bound")
            ax.set(xscale="log", title=gate, xlabel="per cent of the bound")
            ax.set_xlim(0.7, 130)
            plain_log_ticks(ax.xaxis)
            ax.set_xticks([1, 10, 100])
        shares = 100 * informed.set_index("arm")[["share", "low", "high", "null"]]
        colours = [ARM_STYLES[arm].colour for arm in arms]
        for place, (arm, colour) in enumerate(zip(arms, colours, strict=True)):
            row = shares.loc[arm]
            axes[2].barh(place, row["share"], 0.6, color=colour, lw=0)
            axes[2].hlines(place, row["low"], row["high"], color=GREY, lw=1.2)
            axes[2].vlines(row["null"], place - 0.4, place + 0.4, color=GREY, lw=2.4)
        axes[2].axvline(50, color=GREY, lw=0.8)
        axes[2].set(title="bound below 90°", xlabel="per cent of matrices")
        axes[2].set(xlim=(0, 105), ylim=(len(arms) - 0.5, -0.5))
        name_arms(axes, arms)
        legend_above(figure, {NULL_LABEL: key(GREY, "-")}, ncols=1)
    return figure


def _draw_strip(
    ax: Axes, held: pd.DataFrame, gate: str, arm: str, side: str, place: float
) -> None:
    """Per cent of the bound that the matrices of one arm, or of its null, used."""
    used = 100 * _of(held, gate, arm, side)["used"].dropna()
    if used.empty:
        if side == "arm":
            ax.text(1, place, "bound silent", va="center", fontsize=SMALL, color=GREY)
        return
    jitter = place + 0.22 * (np.arange(len(used)) * 0.618 % 1 - 0.5)
    colour = _colour(arm, side)
    dots: Any = {"color": colour, "alpha": 0.45, "ms": 3, "mew": 0}
    ax.plot(used, jitter, ".", label=f"_{side} {arm}", **dots)
    ax.vlines(used.median(), place - 0.17, place + 0.17, color=colour, lw=2.4)


def steering_dots(found: pd.DataFrame, arms: Sequence[str]) -> Figure:
    """What goes with a large angle: a small gap, or a large update.

    Args:
        found: of ``bounds.steering``.
        arms: the rows, from the top.

    Returns:
        The figure: a panel a cause, mean rank correlations over the matrices of a run
        with 95 % intervals over seeds, an arm's null in grey below it.

    Raises:
        ValueError: none of the arms is there.
    """
    arms = present(found, arms)
    causes = list(dict.fromkeys(found["cause"]))
    with styled():
        figure, axes = panel_row(len(causes), 0.9 + 0.42 * len(arms))
        for ax, cause in zip(axes, causes, strict=True):
            rows = found[found["cause"] == cause].set_index(["arm", "side"])
            for place, arm in enumerate(arms):
                for side, offset in (("arm", -0.12), ("null", 0.18)):
                    row, y = rows.loc[(arm, side)], place + offset
                    ends, colour = (row["low"], row["high"]), _colour(arm, side)
                    draw_dot(ax, row["mean"], y, ends, colour)
            ax.axvline(0, color=GREY, lw=0.8)
            ax.set(title=f"goes with a {cause}", xlabel="rank correlation")
            ax.set_xlim(-1, 1)
        name_arms(axes, arms)
        axes[0].invert_yaxis()
        legend_above(figure, {NULL_LABEL: key(GREY)}, ncols=1)
    return figure

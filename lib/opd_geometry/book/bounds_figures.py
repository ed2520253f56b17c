"""Figures of the bounds of the three-gate account.

In the book's one style (see ``figures``); tidy tables in, figures out.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
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
    WIDTH,
    draw_dot,
    key,
    legend_above,
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
        figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.6))
        for ax, gate in zip(axes, (ANGLE, SHIFT), strict=True):
            of_gate = held[held["gate"] == gate]
            for side, names in (("null", arms), ("arm", arms)):
                for arm in names:
                    chosen = (of_gate["arm"] == arm) & (of_gate["side"] == side)
                    _draw_dots(ax, of_gate[chosen], gate, arm, side)
            ax.set_title(gate)
            ax.set(xscale="log", yscale="log")
        _draw_wedin(axes[0])
        low, high = axes[1].get_xlim()
        axes[1].plot([low, high], [low, high], color=GREY, lw=1, label="_bound")
        axes[1].set_xlim(low, high)
        axes[0].set(xlabel="norm of the update over gap", ylabel="measured, degrees")
        axes[1].set(xlabel="Mirsky's bound", ylabel="measured")
        keys = {ARM_STYLES[arm].label: key(ARM_STYLES[arm].colour) for arm in arms}
        keys |= {NULL_LABEL: key(GREY), "bound": key(GREY, "-")}
        legend_above(figure, keys, ncols=4)
    return figure


def _draw_dots(ax: Axes, rows: pd.DataFrame, gate: str, arm: str, side: str) -> None:
    """The matrices of one arm, or of its null."""
    places = rows["gap_share"] if gate == ANGLE else rows["bound"]
    null = side == "null"
    ax.plot(
        places,
        rows["measured"],
        ".",
        color=GREY if null else ARM_STYLES[arm].colour,
        markersize=4,
        markeredgewidth=0,
        alpha=0.35 if null else 0.55,
        label=f"_null of {arm}" if null else f"_{arm}",
    )


def _draw_wedin(ax: Axes) -> None:
    """The bound up to a gap of one, and where it says nothing."""
    low, high = ax.get_xlim()
    high = max(high, 2.0)
    share = np.sort([*np.geomspace(low, high, 99), 1.0])
    allowed = np.degrees(np.arcsin(np.minimum(share, 1)))
    ax.plot(share, allowed, color=GREY, lw=1, label="_bound")
    ax.axvspan(1, high, color=GREY, alpha=0.12, lw=0)
    ax.text(
        0.97,
        0.04,
        "silent",
        transform=ax.transAxes,
        ha="right",
        fontsize=SMALL,
        color=GREY,
    )
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
        figure, axes = plt.subplots(
            1, 3, figsize=(WIDTH, 0.9 + 0.55 * len(arms)), sharey=True
        )
        for ax, gate in zip(axes, (ANGLE, SHIFT), strict=False):
            for place, arm in enumerate(arms):
                for side, offset in (("arm", -0.16), ("null", 0.2)):
                    _draw_strip(ax, held, gate, arm, side, place + offset)
            ax.axvline(100, color=GREY, lw=1, label="_bound")
            ax.set(xscale="log", title=gate, xlabel="per cent of the bound")
            ax.set_xlim(0.7, 130)
            plain_log_ticks(ax.xaxis)
            ax.set_xticks([1, 10, 100])
        shares = informed.set_index("arm")
        for place, arm in enumerate(arms):
            row = 100 * shares.loc[arm, ["share", "low", "high", "null"]].astype(float)
            axes[2].barh(place, row["share"], 0.6, color=ARM_STYLES[arm].colour, lw=0)
            axes[2].hlines(place, row["low"], row["high"], color=GREY, lw=1.2)
            at: Any = {"color": GREY, "lw": 2.4}
            axes[2].vlines(row["null"], place - 0.4, place + 0.4, **at)
        axes[2].axvline(50, color=GREY, lw=0.8)
        axes[2].set(title="bound below 90°", xlabel="per cent of matrices")
        axes[2].set(xlim=(0, 105), ylim=(len(arms) - 0.5, -0.5))
        axes[0].set_yticks(range(len(arms)), [ARM_STYLES[arm].label for arm in arms])
        for label, arm in zip(axes[0].get_yticklabels(), arms, strict=True):
            label.set_color(ARM_STYLES[arm].colour)
        for ax in axes:
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
        legend_above(figure, {NULL_LABEL: key(GREY, "-")}, ncols=1)
    return figure


def _draw_strip(
    ax: Axes, held: pd.DataFrame, gate: str, arm: str, side: str, place: float
) -> None:
    """Per cent of the bound that the matrices of one arm, or of its null, used."""
    chosen = (held["gate"] == gate) & (held["arm"] == arm) & (held["side"] == side)
    used = 100 * held[chosen]["used"].dropna()
    if used.empty:
        if side == "arm":
            ax.text(1, place, "bound silent", va="center", fontsize=SMALL, color=GREY)
        return
    jitter = place + 0.22 * (np.arange(len(used)) * 0.618 % 1 - 0.5)
    colour = GREY if side == "null" else ARM_STYLES[arm].colour
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
        figure, axes = plt.subplots(
            1, len(causes), figsize=(WIDTH, 0.9 + 0.42 * len(arms)), sharey=True
        )
        for ax, cause in zip(axes, causes, strict=True):
            rows = found[found["cause"] == cause].set_index(["arm", "side"])
            for place, arm in enumerate(arms):
                for side, offset in (("arm", -0.12), ("null", 0.18)):
                    row = rows.loc[(arm, side)]
                    colour = GREY if side == "null" else ARM_STYLES[arm].colour
                    y = place + offset
                    draw_dot(ax, row["mean"], y, (row["low"], row["high"]), colour)
            ax.axvline(0, color=GREY, lw=0.8)
            ax.set(
                title=f"goes with a {cause}", xlabel="rank correlation", xlim=(-1, 1)
            )
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
        axes[0].set_yticks(range(len(arms)), [ARM_STYLES[arm].label for arm in arms])
        axes[0].invert_yaxis()
        for label, arm in zip(axes[0].get_yticklabels(), arms, strict=True):
            label.set_color(ARM_STYLES[arm].colour)
        legend_above(figure, {NULL_LABEL: key(GREY)}, ncols=1)
    return figure

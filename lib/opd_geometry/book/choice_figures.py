"""Figures of what hangs on a choice, and of the bounds of the three-gate account.

In the book's one style (see ``figures``); tidy tables in, figures out.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from opd_geometry.analysis.gates import ANGLE, SHIFT, SILENT_DEG
from opd_geometry.analysis.sensitivity import Choice, Reading, level
from opd_geometry.book.figures import (
    ARM_STYLES,
    GREY,
    METRIC_LABELS,
    NULL_LABEL,
    SMALL,
    WIDTH,
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


# --- a quantity over the values of a choice --------------------------------------


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
    columns = max(map(len, grid))
    with styled():
        figure, axes = plt.subplots(
            len(grid), columns, figsize=(WIDTH, 0.5 + 2.7 * len(grid)), squeeze=False
        )
        named = []
        for row, choices in zip(axes, grid, strict=True):
            for ax, choice in zip(row, choices, strict=False):
                _draw_choice(ax, table, arms, choice)
            for ax in row[len(choices) :]:
                ax.set_axis_off()
            used = list(row[: len(choices)])
            alike = len({choice.quantity.partition("_")[0] for choice in choices}) == 1
            if alike:  # one quantity: one axis, and the lines are named once
                share_vertical(used)
            named += used[-1:] if alike else used
        keys: list[Any] = [
            Line2D([], [], linestyle=":", color=GREY, label=NULL_KEY),
            Rectangle((0, 0), 1, 1, color=GREY, alpha=0.2, lw=0, label=DEFAULT_KEY),
        ]
        figure.legend(handles=keys, loc="outside upper left", ncols=2, frameon=False)
        figure.draw_without_rendering()  # places the axes, which the labels measure
        for ax in named:
            place_labels(ax)
    return figure


def _draw_choice(
    ax: Axes, table: pd.DataFrame, arms: Sequence[str], choice: Choice
) -> None:
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
    table: pd.DataFrame, arm: str, choice: Choice, reading: Reading, prefix: str
) -> pd.Series:
    """One number a seed, as it is drawn."""
    values = level(table, arm, choice, reading, prefix)
    return values / float(reading.value) if choice.name == "α" else values


# --- the board of all comparisons ------------------------------------------------


# --- the bounds of the three-gate account ----------------------------------------


def against_bounds(held: pd.DataFrame, arms: Sequence[str]) -> Figure:
    """What was measured against what each gate allows, a dot a matrix.

    Args:
        held: of ``gates.held_against``.
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
        looks: Any = {"linestyle": "", "marker": "o", "markersize": 5}
        keys: list[Any] = [
            Line2D(
                [], [], color=ARM_STYLES[a].colour, label=ARM_STYLES[a].label, **looks
            )
            for a in arms
        ]
        keys.append(Line2D([], [], color=GREY, label=NULL_LABEL, **looks))
        keys.append(Line2D([], [], color=GREY, lw=1, label="bound"))
        figure.legend(
            handles=keys,
            loc="outside upper center",
            ncols=4,
            fontsize=SMALL,
            frameon=False,
        )
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
        held: of ``gates.held_against``.
        informed: of ``gates.informative``.
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
        key = Line2D([], [], color=GREY, lw=2.4, label=NULL_LABEL)
        figure.legend(handles=[key], loc="outside upper right", frameon=False)
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
        found: of ``gates.steering``.
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
                    ax.plot(row["mean"], y, "o", color=colour, ms=5, label=f"_{side}")
                    ax.hlines(y, row["low"], row["high"], color=colour, lw=1.4)
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
        key = Line2D([], [], color=GREY, marker="o", ms=5, lw=1.4, label=NULL_LABEL)
        figure.legend(handles=[key], loc="outside upper right", frameon=False)
    return figure

"""Figures of what an update without place gives, and of what a placed one would show.

In the book's one style (see ``figures``); tables of the package
``analysis.unplaced`` in.
"""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from opd_geometry.analysis.unplaced.power import FAMILIES, GAIN, POWER, SHARE
from opd_geometry.book import figures
from opd_geometry.book.figures import ARM_STYLES, PURPLE, WIDTH, styled

SMALL = 10  # points; at the width of a page's column more than 11 pixels
TITLES = {
    "low_magnitude_overlap": "changed entries among the smallest 30 % of weights",
    "principal_overlap": "changed entries among the principal 30 %",
    "jaccard": "agreement of two runs (Jaccard index)",
}


def on_bands(rows: pd.DataFrame) -> Figure:
    """Every printed number of place on the band of an update without any.

    Args:
        rows: of ``measured.against``: panel, label, arm, printed, low, high (pretrained
            weights), wide_low, wide_high (any weights tried), neutral.

    Returns:
        A panel a quantity, a row a number. A dot is printed; the dark bar is what an
        update without place gives on pretrained weights, over what is not printed, the
        light bar on synthetic ones as well; an open ring is the value if every entry
        were as likely to change as any other.
    """
    panels = list(dict.fromkeys(rows["panel"]))
    heights = [int((rows["panel"] == panel).sum()) + 1.0 for panel in panels]
    with styled():
        figure, axes = plt.subplots(
            len(panels),
            1,
            figsize=(WIDTH, 0.9 + 0.33 * sum(heights)),
            height_ratios=heights,
            squeeze=False,
        )
        for ax, panel in zip(axes[:, 0], panels, strict=True):
            _draw_bands(ax, rows[rows["panel"] == panel].reset_index(drop=True))
            ax.set_title(TITLES[panel], loc="left", fontsize=SMALL + 1)
            if panel != "jaccard":
                ax.xaxis.set_major_formatter(FuncFormatter(_per_cent))
        _explain(axes[0, 0], rows[rows["panel"] == panels[0]].reset_index(drop=True))
    return figure


def _per_cent(value: float, _: object) -> str:
    return f"{100 * value:.0f} %"


def _draw_bands(ax: Axes, rows: pd.DataFrame) -> None:
    for place, row in rows.iterrows():
        colour = ARM_STYLES[row["arm"]].colour if row["arm"] else PURPLE
        for ends, alpha in ((("wide_low", "wide_high"), 0.22), (("low", "high"), 0.55)):
            ax.plot(
                [row[ends[0]], row[ends[1]]],
                [place] * 2,
                lw=11,
                color=colour,
                alpha=alpha,
                solid_capstyle="butt",
            )
        ring: dict[str, Any] = {"mfc": "none", "mec": figures.GREY, "ms": 7, "mew": 1.3}
        ax.plot(row["neutral"], place, "o", **ring)
        ax.plot(
            row["printed"],
            place,
            "o",
            color=colour,
            ms=8,
            mec="white",
            mew=1.0,
            zorder=5,
        )
    ax.set_yticks(range(len(rows)), rows["label"], fontsize=SMALL)
    ax.tick_params(axis="x", labelsize=SMALL)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.grid(axis="x", lw=0.4, alpha=0.4)
    ax.margins(x=0.04)


def _explain(ax: Axes, rows: pd.DataFrame) -> None:
    """Names what a row is made of, on the last row of the first panel."""
    last = rows.iloc[-1]
    place = len(rows) - 1
    said: dict[str, Any] = {"fontsize": SMALL, "va": "center"}
    ax.annotate(
        "printed",
        (last["printed"], place),
        (last["printed"], place - 0.85),
        ha="center",
        arrowprops={"arrowstyle": "-", "lw": 0.8, "color": figures.GREY},
        **said,
    )
    ax.text(
        last["wide_low"] - 0.012, place, "an update without place", ha="right", **said
    )
    ax.text(
        last["neutral"] + 0.012, place - 0.5, "all entries alike", ha="left", **said
    )


# --- power ---------------------------------------------------------------------------


def left_possible(allowed: pd.DataFrame) -> Figure:
    """Which places the printed overlaps leave possible, family by family.

    Args:
        allowed: of ``power.allowed`` joined over metrics (``power.together``): family,
            arm, unit, low, high, least, most.

    Returns:
        A panel a unit of strength, a row a family. The grey line is what was tried,
        the bars are what an arm's printed numbers leave, the vertical line is no place.
    """
    units = (GAIN, POWER, SHARE)
    by_unit = {
        unit: [name for name, f in FAMILIES.items() if f.unit == unit] for unit in units
    }
    heights = [len(names) + 0.8 for names in by_unit.values()]
    with styled():
        figure, axes = plt.subplots(
            len(units),
            1,
            figsize=(WIDTH, 1.4 + 0.42 * sum(heights)),
            height_ratios=heights,
        )
        for ax, (unit, names) in zip(axes, by_unit.items(), strict=True):
            _draw_possible(ax, allowed, names, unit)
        for i, arm in enumerate(dict.fromkeys(allowed["arm"])):
            style = ARM_STYLES[arm]
            axes[0].text(
                1.0,
                1.02,
                f"{'■ '}{style.label}" + " " * (14 if i == 0 else 0),
                color=style.colour,
                transform=axes[0].transAxes,
                ha="right",
                va="bottom",
                fontsize=SMALL + 1,
                weight="bold",
            )
    return figure


def _draw_possible(
    ax: Axes, allowed: pd.DataFrame, names: list[str], unit: str
) -> None:
    arms = list(dict.fromkeys(allowed["arm"]))
    for place, name in enumerate(names):
        rows = allowed[allowed["family"] == name].set_index("arm")
        span = rows.iloc[0]
        ax.plot([span["least"], span["most"]], [place] * 2, lw=1, color=figures.GREY)
        for i, arm in enumerate(arms):
            row, at = rows.loc[arm], place + (i - (len(arms) - 1) / 2) * 0.3
            if np.isnan(row["low"]):
                continue
            ax.plot(
                [row["low"], row["high"]],
                [at] * 2,
                lw=8,
                color=ARM_STYLES[arm].colour,
                solid_capstyle="butt",
            )
            if row["high"] == row["low"]:
                ax.plot(row["low"], at, "|", color=ARM_STYLES[arm].colour, ms=9, mew=3)
    ax.axvline(FAMILIES[names[0]].neutral, color=figures.GREY, lw=1.2, ls=":")
    ax.set_yticks(range(len(names)), [FAMILIES[n].words for n in names], fontsize=SMALL)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", labelsize=SMALL)
    words = {
        GAIN: "gain: how many times as far those entries move",
        POWER: "b, where steps go as |w| to the power of b",
        SHARE: "share of the update's energy that has this place",
    }
    ax.set_xlabel(words[unit], fontsize=SMALL)
    if unit == GAIN:
        ax.set_xscale("log")
        ticks = [0.1, 0.33, 0.5, 1, 2, 3, 10]
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.xaxis.set_minor_formatter(NullFormatter())


# --- spectral shift ------------------------------------------------------------------


def shift_by_size(
    points: pd.DataFrame, orders: Mapping[str, float], decay: Mapping[str, float]
) -> Figure:
    """The spectral shift of updates without place, by the size of the matrix.

    Args:
        points: arm, n (larger side), nss.
        orders: arm to the order of magnitude that is printed.
        decay: arm to the shift of weight decay alone.

    Returns:
        One panel, both axes logarithmic: dots of an arm joined by a line, a dashed
        line falling as 1 / sqrt(n), at the right a bar for the printed order (half a
        decade either way) and a cross for decay alone.
    """
    with styled():
        figure, ax = plt.subplots(figsize=(WIDTH, 3.8))
        right = points["n"].max()
        for arm, rows in points.groupby("arm", sort=False):
            style, rows = ARM_STYLES[arm], rows.sort_values("n")
            ax.plot(rows["n"], rows["nss"], "o-", color=style.colour, ms=5)
            first = rows.iloc[0]
            ends = np.array([first["n"], right])
            line = first["nss"] * np.sqrt(first["n"] / ends)
            ax.plot(ends, line, "--", color=figures.GREY, lw=1)
            order = orders[arm]
            ax.plot(
                [1.35 * right] * 2,
                [order / 10**0.5, order * 10**0.5],
                color=style.colour,
                lw=7,
                alpha=0.5,
                solid_capstyle="butt",
            )
            ax.plot(1.35 * right, order, "o", color=style.colour, ms=8, mec="white")
            ax.plot(1.8 * right, decay[arm], "x", color=style.colour, ms=8, mew=2)
            ax.text(
                0.93 * first["n"],
                first["nss"],
                style.label,
                ha="right",
                va="center",
                fontsize=SMALL + 1,
            )
        ax.set(xscale="log", yscale="log", xlim=(0.62 * points["n"].min(), 2.3 * right))
        ticks = sorted(set(points["n"]))
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks], fontsize=SMALL)
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.tick_params(axis="y", labelsize=SMALL)
        ax.set_xlabel("larger side of the matrix, n", fontsize=SMALL)
        ax.set_ylabel("spectral shift NSS", fontsize=SMALL)
        top = ax.get_ylim()[1]
        for at, words in ((1.35, "printed"), (1.8, "decay")):
            ax.text(
                at * right,
                top,
                words,
                fontsize=SMALL,
                ha="center",
                va="bottom",
                rotation=35,
            )
    return figure

"""Figures of what an update without place gives, and of what a placed one would show.

In the book's one style (see ``figures``); tables of the package
``analysis.unplaced`` in.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from opd_geometry.analysis.unplaced.power import FAMILIES, GAIN, POWER, SHARE
from opd_geometry.book import figures
from opd_geometry.book.figures import ARM_STYLES, PURPLE, styled

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
    names = list(rows["panel"].unique())
    heights = [int((rows["panel"] == panel).sum()) + 1.0 for panel in names]
    with styled():
        height = 0.9 + 0.33 * sum(heights)
        figure, axes = figures.panels(len(names), 1, height, height_ratios=heights)
        for ax, panel in zip(axes[:, 0], names, strict=True):
            _draw_bands(ax, rows[rows["panel"] == panel].reset_index(drop=True))
            ax.set_title(TITLES[panel], loc="left", fontsize=SMALL + 1)
            if panel != "jaccard":
                ax.xaxis.set_major_formatter(FuncFormatter(_per_cent))
        _explain(axes[0, 0], rows[rows["panel"] == names[0]].reset_index(drop=True))
    return figure


def _per_cent(value: float, _: object) -> str:
    return f"{100 * value:.0f} %"


def _draw_bands(ax: Axes, rows: pd.DataFrame) -> None:
    for place, row in rows.iterrows():
        colour = ARM_STYLES[row["arm"]].colour if row["arm"] else PURPLE
        wide, narrow = row[["wide_low", "wide_high"]], row[["low", "high"]]
        _draw_bar(ax, wide, place, colour, lw=11, alpha=0.22)
        _draw_bar(ax, narrow, place, colour, lw=11, alpha=0.55)
        ring: dict[str, Any] = {"mfc": "none", "mec": figures.GREY, "ms": 7, "mew": 1.3}
        ax.plot(row["neutral"], place, "o", **ring)
        dot: dict[str, Any] = {"color": colour, "ms": 8, "mec": "white", "mew": 1.0}
        ax.plot(row["printed"], place, "o", zorder=5, **dot)
    _name(ax, rows["label"])
    ax.grid(axis="x", lw=0.4, alpha=0.4)
    ax.margins(x=0.04)


def _draw_bar(
    ax: Axes, ends: Sequence[float], place: float, colour: str, **look: Any
) -> None:
    """A bar in its row, from end to end."""
    ax.plot(list(ends), [place] * 2, color=colour, solid_capstyle="butt", **look)


def _name(ax: Axes, names: Sequence[str]) -> None:
    """The rows of a panel, from the top, in small letters."""
    ax.set_yticks(range(len(names)), names, fontsize=SMALL)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", labelsize=SMALL)


def _explain(ax: Axes, rows: pd.DataFrame) -> None:
    """Names what a row is made of, on the last row of the first panel."""
    last = rows.iloc[-1]
    place = len(rows) - 1
    said: dict[str, Any] = {"fontsize": SMALL, "va": "center"}
    at, above = (last["printed"], place), (last["printed"], place - 0.85)
    line = {"arrowstyle": "-", "lw": 0.8, "color": figures.GREY}
    ax.annotate("printed", at, above, ha="center", arrowprops=line, **said)
    low, neutral = last["wide_low"] - 0.012, last["neutral"] + 0.012
    ax.text(low, place, "an update without place", ha="right", **said)
    ax.text(neutral, place - 0.5, "all entries alike", ha="left", **said)


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
        height = 1.4 + 0.42 * sum(heights)
        figure, axes = figures.panels(len(units), 1, height, height_ratios=heights)
        for ax, (unit, names) in zip(axes.flat, by_unit.items(), strict=True):
            _draw_possible(ax, allowed, names, unit)
        top = axes[0, 0]
        look: dict[str, Any] = {"transform": top.transAxes, "fontsize": SMALL + 1}
        look |= {"ha": "right", "va": "bottom", "weight": "bold"}
        for i, arm in enumerate(dict.fromkeys(allowed["arm"])):
            said = f"■ {ARM_STYLES[arm].label}" + " " * (14 if i == 0 else 0)
            top.text(1.0, 1.02, said, color=ARM_STYLES[arm].colour, **look)
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
            colour = ARM_STYLES[arm].colour
            if np.isnan(row["low"]):
                continue
            _draw_bar(ax, row[["low", "high"]], at, colour, lw=8)
            if row["high"] == row["low"]:
                ax.plot(row["low"], at, "|", color=colour, ms=9, mew=3)
    ax.axvline(FAMILIES[names[0]].neutral, color=figures.GREY, lw=1.2, ls=":")
    _name(ax, [FAMILIES[n].words for n in names])
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
        figure, ((ax,),) = figures.panels(1, 1, 3.8)
        right = points["n"].max()
        for arm, rows in points.groupby("arm", sort=False):
            style, rows = ARM_STYLES[arm], rows.sort_values("n")
            ax.plot(rows["n"], rows["nss"], "o-", color=style.colour, ms=5)
            first = rows.iloc[0]
            ends = np.array([first["n"], right])
            line = first["nss"] * np.sqrt(first["n"] / ends)
            ax.plot(ends, line, "--", color=figures.GREY, lw=1)
            order, place = orders[arm], 1.35 * right
            bar: dict[str, Any] = {"lw": 7, "alpha": 0.5, "solid_capstyle": "butt"}
            half_decade = [order / 10**0.5, order * 10**0.5]
            ax.plot([place] * 2, half_decade, color=style.colour, **bar)
            ax.plot(place, order, "o", color=style.colour, ms=8, mec="white")
            ax.plot(1.8 * right, decay[arm], "x", color=style.colour, ms=8, mew=2)
            beside: dict[str, Any] = {"ha": "right", "va": "center"}
            spot = 0.93 * first["n"], first["nss"]
            ax.text(*spot, style.label, fontsize=SMALL + 1, **beside)
        ax.set(xscale="log", yscale="log", xlim=(0.62 * points["n"].min(), 2.3 * right))
        ticks = sorted(set(points["n"]))
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks], fontsize=SMALL)
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.tick_params(axis="y", labelsize=SMALL)
        ax.set_xlabel("larger side of the matrix, n", fontsize=SMALL)
        ax.set_ylabel("spectral shift NSS", fontsize=SMALL)
        top = ax.get_ylim()[1]
        above: dict[str, Any] = {"ha": "center", "va": "bottom", "rotation": 35}
        for at, words in ((1.35, "printed"), (1.8, "decay")):
            ax.text(at * right, top, words, fontsize=SMALL, **above)
    return figure

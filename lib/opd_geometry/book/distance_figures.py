"""Figures of where updates lie once distance is taken out.

In the book's one style (see ``figures``); tables of ``analysis.distance`` in, figures
out.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opd_geometry.analysis.distance import (
    AT_END,
    AT_EQUAL_NORM,
    N_BINS,
    PLACE,
    SHAPE,
    SUBSPACES,
    points,
)
from opd_geometry.book.figures import (
    ARM_STYLES,
    GREY,
    METRIC_LABELS,
    SMALL,
    TEXT,
    arm_keys,
    draw_arms,
    draw_dot,
    key,
    legend_above,
    log_ticks,
    name_rows,
    panel_row,
    panels,
    styled,
)

SHOWN = 4000  # points of a panel: all of them would be a heavy picture of one blot
MAIN = ("sft", "opd", "rlvr")
PANELS = (
    "sparsity",
    "low_magnitude_overlap",
    "angle_right_mean_deg",
    "nss",
    "stable_rank",
    "hill_alpha",
)
MASK_LABELS = {
    "principal_overlap": "principal mask",
    "low_magnitude_overlap": "small weights",
}


def curves(table: pd.DataFrame, shares: pd.DataFrame) -> Figure:
    """Every matrix and checkpoint of every run over the distance it went.

    Args:
        table: tidy.
        shares: of ``distance.collapse``, printed in the panels.

    Returns:
        Six panels: four of place, two of shape. A dot a matrix and checkpoint, those of
        the three main arms in their colours; a line through the means of the bins.

    Raises:
        ValueError: a panel's metric is not in the shares.
    """
    known = shares.set_index("metric")
    absent = [name for name in PANELS if name not in known.index]
    if absent:
        raise ValueError(f"no share of {', '.join(absent)}; expected it in shares")
    with styled():
        figure, axes = panels(2, 3, 5.2, sharex=True)
        for ax, metric in zip(axes.flat, PANELS, strict=True):
            _draw_curve(ax, points(table, metric), metric)
            share = known.loc[metric, "share"]
            ax.set_title(f"{METRIC_LABELS[metric]}\n{100 * share:.1f} % is distance")
        figure.supxlabel("relative norm of the update", fontsize=10, color=TEXT)
        others = {"all other runs": key(GREY), "one curve": key(TEXT, "-")}
        legend_above(figure, arm_keys(MAIN) | others, ncols=5)
    return figure


def _draw_curve(ax: Axes, found: pd.DataFrame, metric: str) -> None:
    logarithm = (PLACE | SHAPE)[metric]
    y = np.exp(found["y"]) if logarithm else found["y"]
    x = np.exp(found["x"])
    chosen = np.random.default_rng(0).permutation(len(found))[:SHOWN]
    arms = found["arm"].astype(str).to_numpy()[chosen]
    looks = [ARM_STYLES[a].colour if a in MAIN else GREY for a in arms]
    alphas = np.where(np.isin(arms, MAIN), 0.5, 0.12)
    spots = (x.iloc[chosen], y.iloc[chosen])
    dots = ax.scatter(*spots, s=3, c=looks, lw=0, rasterized=True)
    dots.set_alpha(alphas)  # type: ignore[arg-type]  # one a dot, as documented
    place = found["x"].rank(method="first") - 1
    bins = (place * N_BINS // len(found)).astype(int)
    middle = found.groupby(bins)[["x", "y"]].mean()
    line = np.exp(middle["y"]) if logarithm else middle["y"]
    ax.plot(np.exp(middle["x"]), line, color=TEXT, lw=1.2)
    ax.set_xscale("log")
    if logarithm:
        ax.set_yscale("log")
    ax.tick_params(labelsize=SMALL)


def permutations(found: pd.DataFrame, bound: float) -> Figure:
    """Real updates against their own permutations.

    Args:
        found: of ``distance.permuted``, by world.
        bound: points by which none was announced to part.

    Returns:
        A row of panels a world, a panel a mask, a row an arm: overlap, own minus
        shuffled, at every density with 95 % intervals; dotted the line of no place,
        grey all within the bound.
    """
    densities = list(dict.fromkeys(found["density"]))
    markers = dict(zip(densities, "osD^", strict=False))
    masks = list(dict.fromkeys(found["mask"]))
    with styled():
        figure, worlds = _rows_of_arms(found, len(masks))
        for line, rows, arms in worlds:
            for ax, mask in zip(line, masks, strict=True):
                ax.axvspan(-bound, bound, color=GREY, alpha=0.12, lw=0)
                ax.axvline(0, color=GREY, ls=":", lw=1.2)
                for _, row in rows[rows["mask"] == mask].iterrows():
                    place = densities.index(row["density"]) - (len(densities) - 1) / 2
                    y = arms.index(row["arm"]) + 0.18 * place
                    ends = (100 * row["low"], 100 * row["high"])
                    look = ARM_STYLES[row["arm"]].colour, markers[row["density"]]
                    draw_dot(ax, 100 * row["difference"], y, ends, *look)
                ax.set_xlim(-1.2 * bound, 1.2 * bound)
        for ax, mask in zip(figure.axes, masks, strict=False):  # the uppermost
            ax.set_title(MASK_LABELS[mask], fontsize=SMALL)
        figure.supxlabel("overlap, own minus shuffled (points)", fontsize=SMALL)
        names = [
            "own density" if d == "own" else f"{100 * float(d):.1f} %" for d in markers
        ]
        keys = [key(GREY, mark) for mark in markers.values()]
        legend_above(figure, dict(zip(names, keys, strict=True)), ncols=4)
    return figure


def _rows_of_arms(
    found: pd.DataFrame, n: int
) -> tuple[Figure, list[tuple[np.ndarray, pd.DataFrame, list[str]]]]:
    """A row of n panels a world, in each a row an arm: panels, table and arms."""
    tables = dict(list(found.groupby("world", sort=False)))
    arms = [list(table["arm"].unique()) for table in tables.values()]
    heights = [0.9 + 0.34 * len(names) for names in arms]
    height = 0.5 + sum(heights)
    figure, axes = panels(len(tables), n, height, height_ratios=heights)
    for line, world, names in zip(axes, tables, arms, strict=True):
        line[0].set_ylabel(world, fontsize=SMALL, weight="bold")
        for ax in line:
            ax.set_yticks(range(len(names)), [ARM_STYLES[a].label for a in names])
            ax.set_ylim(len(names) - 0.4, -0.6)
            ax.tick_params(labelsize=SMALL, labelleft=ax is line[0])
    return figure, list(zip(axes, tables.values(), arms, strict=True))


def angles(found: pd.DataFrame) -> Figure:
    """How far real updates turn and shift W_0, over their two nulls.

    Args:
        found: of ``distance.turned``, by world.

    Returns:
        A row of panels a world, a panel a metric, a row an arm: its value over that of
        a Gaussian of its norm (filled) and of its own singular values in random
        directions (open), with 95 % intervals; grey the line of one.
    """
    with styled():
        metrics = list(dict.fromkeys(found["metric"]))
        figure, worlds = _rows_of_arms(found, len(metrics))
        for line, rows, arms in worlds:
            for ax, metric in zip(line, metrics, strict=True):
                ax.axvline(1.0, color=GREY, ls=":", lw=1.2)
                for row in rows[rows["metric"] == metric].itertuples():
                    colour, open_ = ARM_STYLES[row.arm].colour, row.null == "turned"
                    y = arms.index(row.arm) + (0.14 if open_ else -0.14)
                    mark, ends = "D" if open_ else "o", (row.low, row.high)
                    draw_dot(ax, row.times, y, ends, colour, mark, open_)
                ax.set_title(METRIC_LABELS[metric].removesuffix(" (deg)"))
                ax.set_xlabel("times its null", fontsize=SMALL)
        keys = {
            "over a Gaussian of its norm": key(GREY),
            "over its own singular values, turned": key(GREY, "D", hollow=True),
        }
        legend_above(figure, keys, ncols=2)
    return figure


def energy_dots(found: pd.DataFrame) -> Figure:
    """Energy of the updates in subspaces and on masks, in units of chance.

    Args:
        found: of ``distance.energies``.

    Returns:
        A row a place, a dot an arm with its 95 % interval; grey the line of chance.
    """
    arms = list(dict.fromkeys(found["arm"]))
    places = [name for name in SUBSPACES if name in set(found["place"])]
    with styled():
        figure, ((ax,),) = panels(1, 1, 0.9 + 0.5 * len(places))
        ax.axvline(1.0, color=GREY, ls=":", lw=1.2)
        y = [float(places.index(name)) for name in found["place"]]
        draw_arms(ax, found, arms, "times", y)
        name_rows(ax, [SUBSPACES[name] for name in places])
        log_ticks(ax, [0.2, 0.5, 1, 2, 5])
        ax.set_xlabel("energy of the update, chance = 1")
        legend_above(figure, arm_keys(arms), ncols=4)
    return figure


def displacement_dots(found: pd.DataFrame) -> Figure:
    """How far arms moved in the learning rate's own unit, and how often clipped.

    Args:
        found: of ``distance.displacements``.

    Returns:
        A row an arm: the displacement with its 95 % interval, and the share of clipped
        steps in words; grey where Adam takes noise.
    """
    rows = found.set_index("arm")
    with styled():
        figure, ((ax,),) = panels(1, 1, 0.8 + 0.33 * len(rows))
        ax.axvline(1.0, color=GREY, ls=":", lw=1.2)
        ax.set_xlim(0, 1.6 * float(rows["displacement"].max()))
        for y, (arm, row) in enumerate(rows.iterrows()):
            colour = ARM_STYLES[str(arm)].colour
            draw_dot(ax, row["displacement"], y, (row["low"], row["high"]), colour)
            said = f"{100 * row['clipped']:.1f} % of steps clipped"
            at: Any = {"transform": ax.get_yaxis_transform(), "va": "center"}
            ax.text(0.99, y, said, ha="right", fontsize=SMALL, **at)
        name_rows(ax, [ARM_STYLES[str(arm)].label for arm in rows.index])
        ax.set_xlabel("root mean square change in units of the learning rate, √Σ lr²")
    return figure


def ladder(comparison: pd.DataFrame, names: Mapping[tuple[str, str], str]) -> Figure:
    """What each change does, at the end and once both arms have gone equally far.

    Args:
        comparison: of ``distance.compared``.
        names: pair of arms to what changes between them; the rows, from the top.

    Returns:
        The figure: a column a metric, a row a pair. An open dot is the ratio of the two
        arms at their ends, a filled one at equal norm, both with 95 % intervals; a grey
        tick is the ratio of their Gaussian updates at equal norm.
    """
    metrics = list(dict.fromkeys(comparison["metric"]))
    there = set(zip(comparison["arm"], comparison["other"], strict=True))
    pairs = [pair for pair in names if pair in there]
    with styled():
        figure, axes = panel_row(len(metrics), 0.9 + 0.5 * len(pairs))
        for ax, metric in zip(axes, metrics, strict=True):
            of_metric = comparison[comparison["metric"] == metric]
            for place, pair in enumerate(pairs):
                of_pair = (of_metric["arm"] == pair[0]) & (
                    of_metric["other"] == pair[1]
                )
                _draw_rung(ax, place, of_metric[of_pair].set_index("at"))
            ax.axvline(1, color=GREY, lw=0.8, zorder=0)
            ax.set(xscale="log", title=METRIC_LABELS[metric].replace(", ", ",\n"))
            _factor_ticks(ax)
            for between in range(1, len(pairs)):
                ax.axhline(between - 0.5, color=GREY, lw=0.3)
        labels = [
            f"{names[pair]}\n{ARM_STYLES[pair[0]].label} → {ARM_STYLES[pair[1]].label}"
            for pair in pairs
        ]
        name_rows(axes[0], labels, fontsize=SMALL)
        figure.supxlabel(
            "factor ( ○ at the end   ● at equal norm   ┃ Gaussian updates there )",
            fontsize=SMALL,
            color=GREY,
        )
    return figure


def _draw_rung(ax: Axes, place: int, rows: pd.DataFrame) -> None:
    """One pair in one metric: two dots with intervals, and the null."""
    for at, shift, hollow in ((AT_END, -0.14, True), (AT_EQUAL_NORM, 0.14, False)):
        row = rows.loc[at]
        if np.isnan(row["ratio"]):
            continue
        ends, colour = (row["low"], row["high"]), ARM_STYLES[row["other"]].colour
        draw_dot(ax, row["ratio"], place + shift, ends, colour, hollow=hollow)
    null = rows.loc[AT_EQUAL_NORM, "null"]
    if np.isfinite(null):
        ax.vlines(null, place + 0.0, place + 0.3, color=GREY, lw=2)


def _factor_ticks(ax: Axes) -> None:
    """A logarithmic axis of factors around 1, with about three plain ticks."""
    low, high = ax.get_xlim()
    far = max(high, 1 / low)
    low, high = min(low, far**-0.3), max(high, far**0.3)
    for step in (1.02, 1.05, 1.1, 1.2, 1.5, 2, 5, 10):
        ticks = [step**n for n in range(-9, 10) if low <= step**n <= high]
        if len(ticks) <= 3:
            break
    ax.set_xlim(low, high)
    log_ticks(ax, ticks)
    ax.set_xticklabels([f"{round(tick, 2):g}" for tick in ticks])

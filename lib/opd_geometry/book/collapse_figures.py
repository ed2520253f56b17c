"""Figures of where updates lie once distance is taken out.

In the book's one style (see ``figures``); tables of ``analysis.collapse`` in, figures
out.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from opd_geometry.analysis.collapse import N_BINS, PLACE, SHAPE, points
from opd_geometry.book.figures import (
    ARM_STYLES,
    GREY,
    METRIC_LABELS,
    SMALL,
    TEXT,
    WIDTH,
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
PLACE_LABELS = {
    "top_right": "top right of W₀",
    "top_left": "top left of W₀",
    "bottom_right": "bottom right of W₀",
    "bottom_left": "bottom left of W₀",
    "inputs": "where the inputs lie",
    "principal": "principal mask",
    "low_magnitude": "low-magnitude mask",
}


def curves(table: pd.DataFrame, shares: pd.DataFrame) -> Figure:
    """Every matrix and checkpoint of every run over the distance it went.

    Args:
        table: tidy.
        shares: of ``collapse.collapse``, printed in the panels.

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
        figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 5.2), sharex=True)
        for ax, metric in zip(axes.flat, PANELS, strict=True):
            _draw_curve(ax, points(table, metric), metric)
            share = known.loc[metric, "share"]
            ax.set_title(f"{METRIC_LABELS[metric]}\n{share:.1%} is distance")
        figure.supxlabel("relative norm of the update", fontsize=10, color=TEXT)
        keys = [
            Line2D([], [], color=ARM_STYLES[a].colour, marker="o", ls="", markersize=4)
            for a in MAIN
        ]
        keys += [Line2D([], [], color=GREY, marker="o", ls="", markersize=4)]
        keys += [Line2D([], [], color=TEXT)]
        names = [*(ARM_STYLES[a].label for a in MAIN), "all other runs", "one curve"]
        figure.legend(keys, names, loc="outside upper left", ncols=5, frameon=False)
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


def permutations(found: pd.DataFrame) -> Figure:
    """Real updates against their own permutations.

    Args:
        found: of ``collapse.permuted``.

    Returns:
        Two panels, one a mask: at every density own minus shuffled with its 95 %
        interval, a row an arm; grey the line of no place.
    """
    arms = list(dict.fromkeys(found["arm"]))
    densities = list(dict.fromkeys(found["density"]))
    markers = dict(zip(densities, "osD^", strict=False))
    with styled():
        size = (WIDTH, 1.1 + 0.42 * len(arms))
        figure, axes = plt.subplots(1, 2, figsize=size, sharey=True, sharex=True)
        for ax, (mask, rows) in zip(
            axes, found.groupby("mask", sort=False), strict=True
        ):
            ax.axvline(0.0, color=GREY, ls=":", lw=1.2)
            for row in rows.itertuples():
                shift = 0.18 * (densities.index(row.density) - (len(densities) - 1) / 2)
                y, look = arms.index(row.arm) + shift, ARM_STYLES[row.arm]
                ends = [[100 * row.low], [100 * row.high]]
                ax.plot(ends, [[y], [y]], color=look.colour, lw=1)
                ax.plot(
                    100 * row.difference,
                    y,
                    markers[row.density],
                    color=look.colour,
                    markersize=4,
                )
            ax.set_title(METRIC_LABELS[mask])
        axes[0].set_yticks(range(len(arms)), [ARM_STYLES[arm].label for arm in arms])
        axes[0].invert_yaxis()
        figure.supxlabel(
            "own minus shuffled, percentage points", fontsize=10, color=TEXT
        )
        keys = [Line2D([], [], color=GREY, marker=m, ls="") for m in markers.values()]
        names = ["own density" if d == "own" else f"{float(d):.1%}" for d in markers]
        figure.legend(keys, names, loc="outside upper left", ncols=4, frameon=False)
    return figure


def energy_dots(found: pd.DataFrame) -> Figure:
    """Energy of the updates in subspaces and on masks, in units of chance.

    Args:
        found: of ``collapse.energies``.

    Returns:
        A row a place, a dot an arm with its 95 % interval; grey the line of chance.
    """
    arms = list(dict.fromkeys(found["arm"]))
    places = [name for name in PLACE_LABELS if name in set(found["place"])]
    with styled():
        figure, ax = plt.subplots(figsize=(WIDTH, 0.9 + 0.5 * len(places)))
        ax.axvline(1.0, color=GREY, ls=":", lw=1.2)
        for i, arm in enumerate(arms):
            look, rows = ARM_STYLES[arm], found[found["arm"] == arm]
            shift = 0.7 * ((i + 0.5) / len(arms) - 0.5)
            y = [places.index(name) + shift for name in rows["place"]]
            ax.hlines(y, rows["low"], rows["high"], color=look.colour, lw=1)
            mark = "o" if look.dash == "-" else "D"
            ax.plot(rows["times"], y, mark, color=look.colour, ms=4, label=look.label)
        ax.set_yticks(range(len(places)), [PLACE_LABELS[name] for name in places])
        ax.invert_yaxis()
        ax.set_xscale("log")
        ax.set_xticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
        ax.minorticks_off()
        ax.set_xlabel("energy of the update, chance = 1")
        figure.legend(loc="outside upper left", ncols=4, frameon=False)
    return figure


def displacement_dots(found: pd.DataFrame, arms: Sequence[str] | None = None) -> Figure:
    """How far arms moved in the learning rate's own unit, and how often clipped.

    Args:
        found: of ``collapse.displacements``.
        arms: order of the rows; None: as found.

    Returns:
        A row an arm: the displacement with its 95 % interval, and the share of clipped
        steps in words; grey where Adam takes noise.
    """
    rows = found.set_index("arm")
    rows = rows.loc[[arm for arm in arms or rows.index if arm in rows.index]]
    with styled():
        figure, ax = plt.subplots(figsize=(WIDTH, 0.8 + 0.33 * len(rows)))
        ax.axvline(1.0, color=GREY, ls=":", lw=1.2)
        ax.set_xlim(0, 1.6 * float(rows["displacement"].max()))
        for y, (arm, row) in enumerate(rows.iterrows()):
            colour = ARM_STYLES[str(arm)].colour
            ax.plot([row["low"], row["high"]], [y, y], color=colour, lw=1.5)
            ax.plot(row["displacement"], y, "o", color=colour, ms=5)
            said = f"{row['clipped']:.1%} of steps clipped"
            ax.text(
                0.99,
                y,
                said,
                transform=ax.get_yaxis_transform(),
                ha="right",
                va="center",
                fontsize=SMALL,
            )
        labels = [ARM_STYLES[str(arm)].label for arm in rows.index]
        ax.set_yticks(range(len(rows)), labels)
        ax.invert_yaxis()
        ax.set_xlabel("root mean square change in units of the learning rate, √Σ lr²")
    return figure

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
MASK_LABELS = {
    "principal_overlap": "principal mask",
    "low_magnitude_overlap": "small weights",
}
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
    """Real updates against their own permutations, and free of any grid.

    Args:
        found: of ``collapse.permuted``, by world.

    Returns:
        A row of panels a world; for each mask own minus shuffled, then how often the
        largest entries of the update lie on it, at every density with 95 % intervals, a
        row an arm; grey the line of no place.
    """
    densities = list(dict.fromkeys(found["density"]))
    markers = dict(zip(densities, "osD^", strict=False))
    drawn = [
        (mask, *what)
        for what in (
            ("difference", "low", "high", 0.0, 100.0, "own − shuffled,\npoints"),
            ("times", "times_low", "times_high", 1.0, 1.0, "without grid,\nchance = 1"),
        )
        for mask in dict.fromkeys(found["mask"])
    ]
    with styled():
        figure, axes = _rows_of_arms(found, len(drawn))
        for line, (world, rows) in zip(
            axes, found.groupby("world", sort=False), strict=True
        ):
            arms = list(dict.fromkeys(rows["arm"]))
            for ax, (mask, value, low, high, null, unit, words) in zip(
                line, drawn, strict=True
            ):
                ax.axvline(null, color=GREY, ls=":", lw=1.2)
                for _, row in rows[rows["mask"] == mask].iterrows():
                    place = densities.index(row["density"]) - (len(densities) - 1) / 2
                    y, look = (
                        arms.index(row["arm"]) + 0.18 * place,
                        ARM_STYLES[row["arm"]],
                    )
                    ends = [unit * row[low], unit * row[high]]
                    ax.plot(ends, [y, y], color=look.colour, lw=1)
                    mark = markers[row["density"]]
                    ax.plot(unit * row[value], y, mark, color=look.colour, markersize=4)
                ax.set_title(MASK_LABELS[mask], fontsize=SMALL)
                ax.set_xlabel(words, fontsize=SMALL)
            line[0].set_ylabel(world, fontsize=SMALL, weight="bold")
        keys = [Line2D([], [], color=GREY, marker=m, ls="") for m in markers.values()]
        names = ["own density" if d == "own" else f"{float(d):.1%}" for d in markers]
        figure.legend(keys, names, loc="outside upper left", ncols=4, frameon=False)
    return figure


def _rows_of_arms(found: pd.DataFrame, n: int) -> tuple[Figure, np.ndarray]:
    """A row of n panels a world, in each a row an arm."""
    by_world = found.groupby("world", sort=False)["arm"].unique()
    heights = [0.9 + 0.34 * len(arms) for arms in by_world]
    figure, axes = plt.subplots(
        len(by_world),
        n,
        figsize=(WIDTH, 0.5 + sum(heights)),
        height_ratios=heights,
        squeeze=False,
    )
    for line, arms in zip(axes, by_world, strict=True):
        for ax in line:
            ax.set_yticks(range(len(arms)), [ARM_STYLES[a].label for a in arms])
            ax.set_ylim(len(arms) - 0.4, -0.6)
            ax.tick_params(labelsize=SMALL, labelleft=ax is line[0])
    return figure, axes


def angles(found: pd.DataFrame) -> Figure:
    """How far real updates turn and shift W_0, over their two nulls.

    Args:
        found: of ``collapse.turned``, by world.

    Returns:
        A row of panels a world, a panel a metric, a row an arm: its value over that of
        a Gaussian of its norm (filled) and of its own singular values in random
        directions (open), with 95 % intervals; grey the line of one.
    """
    with styled():
        metrics = list(dict.fromkeys(found["metric"]))
        figure, axes = _rows_of_arms(found, len(metrics))
        for line, (world, rows) in zip(
            axes, found.groupby("world", sort=False), strict=True
        ):
            arms = list(dict.fromkeys(rows["arm"]))
            for ax, metric in zip(line, metrics, strict=True):
                ax.axvline(1.0, color=GREY, ls=":", lw=1.2)
                for row in rows[rows["metric"] == metric].itertuples():
                    colour, open_ = ARM_STYLES[row.arm].colour, row.null == "turned"
                    y = arms.index(row.arm) + (0.14 if open_ else -0.14)
                    ax.plot([row.low, row.high], [y, y], color=colour, lw=1)
                    face = "none" if open_ else colour
                    ax.plot(
                        row.times, y, "D" if open_ else "o", mfc=face, mec=colour, ms=5
                    )
                ax.set_title(METRIC_LABELS[metric].removesuffix(" (deg)"))
                ax.set_xlabel("times its null", fontsize=SMALL)
            line[0].set_ylabel(world, fontsize=SMALL, weight="bold")
        keys = [
            Line2D([], [], color=GREY, ls="", marker="o"),
            Line2D([], [], color=GREY, ls="", marker="D", mfc="none"),
        ]
        names = ["over a Gaussian of its norm", "over its own singular values, turned"]
        figure.legend(keys, names, loc="outside upper left", ncols=2, frameon=False)
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

"""Figures of two worlds beside each other, and of signal and noise.

In the book's one style (see ``figures``); tables of ``analysis.worlds`` and
``analysis.signal`` in, figures out.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from opd_geometry.analysis.signal import FLIPS
from opd_geometry.analysis.worlds import LOCK_NULLS
from opd_geometry.book.figures import (
    ARM_STYLES,
    GREY,
    METRIC_LABELS,
    SMALL,
    TEXT,
    WIDTH,
    place_labels,
    plain_log_ticks,
    styled,
)

LABELS = METRIC_LABELS | {
    "energy_top_right": "energy, top right of W₀",
    "energy_inputs": "energy, where inputs lie",
    "displacement": "displacement",
}
FLIPPED = {"rlvr": 0, "rlvr-flip-30": 30, "rlvr-flip-45": 45, "rlvr-coin": 50}
LOCK_MARKS = {"turned increments": "D", "walk": "^"}


MARKS = {"-": "o", "--": "D", ":": "v", "-.": "s"}  # by an arm's dash


def _mark(arm: str) -> str:
    return MARKS[ARM_STYLES[arm].dash]


def over_nulls(worlds: Mapping[str, pd.DataFrame]) -> Figure:
    """Diagnostics in units of their sharpest nulls, a panel a world.

    Args:
        worlds: name to the table of ``worlds.over_nulls``.

    Returns:
        A row a diagnostic, a dot an arm; grey the line where an update is its null.
    """
    metrics = list(dict.fromkeys(m for t in worlds.values() for m in t["metric"]))
    arms = list(dict.fromkeys(arm for t in worlds.values() for arm in t["arm"]))
    with styled():
        size = (WIDTH, 1.2 + 0.5 * len(metrics))
        figure, axes = plt.subplots(
            1, len(worlds), figsize=size, sharex=True, sharey=True, squeeze=False
        )
        for ax, (world, table) in zip(axes[0], worlds.items(), strict=True):
            ax.axvline(1.0, color=GREY, ls=":", lw=1.2)
            for i, arm in enumerate(arms):
                rows, look = table[table["arm"] == arm], ARM_STYLES[arm]
                shift = 0.7 * ((i + 0.5) / len(arms) - 0.5)
                y = [metrics.index(metric) + shift for metric in rows["metric"]]
                ax.hlines(y, rows["low"], rows["high"], color=look.colour, lw=1)
                ax.plot(rows["times"], y, _mark(arm), color=look.colour, ms=4)
            ax.set_title(world)
            ax.set_xscale("log")
            ax.set_xticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
            ax.minorticks_off()
        axes[0][0].set_yticks(range(len(metrics)), [LABELS[m] for m in metrics])
        axes[0][0].invert_yaxis()
        figure.supxlabel("own over sharpest null", fontsize=10, color=TEXT)
        keys = [
            Line2D([], [], color=ARM_STYLES[a].colour, marker=_mark(a), ls="")
            for a in arms
        ]
        names = [ARM_STYLES[arm].label for arm in arms]
        figure.legend(keys, names, loc="outside upper left", ncols=4, frameon=False)
    return figure


def locking(worlds: Mapping[str, pd.DataFrame]) -> Figure:
    """Sim_16 after a fifth of training with the end, beside its nulls.

    Args:
        worlds: name to the table of ``worlds.locking``.

    Returns:
        A panel a world, a row an arm: own filled, nulls hollow.
    """
    arms = list(dict.fromkeys(arm for t in worlds.values() for arm in t["arm"]))
    with styled():
        size = (WIDTH, 1.2 + 0.36 * len(arms))
        figure, axes = plt.subplots(
            1, len(worlds), figsize=size, sharex=True, sharey=True, squeeze=False
        )
        for ax, (world, table) in zip(axes[0], worlds.items(), strict=True):
            for row in table.to_dict("records"):
                y, look = arms.index(row["arm"]), ARM_STYLES[row["arm"]]
                ends = [row[name] for name in (*LOCK_NULLS, "own")]
                ax.plot([min(ends), max(ends)], [y, y], color=GREY, lw=1)
                ax.plot(row["own"], y, _mark(row["arm"]), color=look.colour, ms=6)
                for name, mark in LOCK_MARKS.items():
                    ax.plot(row[name], y, mark, color=TEXT, mfc="none", ms=5)
            ax.set_title(world)
            ax.set_xlim(0, 1)
        axes[0][0].set_yticks(range(len(arms)), [ARM_STYLES[a].label for a in arms])
        axes[0][0].invert_yaxis()
        figure.supxlabel(
            "similarity with the end after a fifth of training, Sim₁₆",
            fontsize=10,
            color=TEXT,
        )
        keys = [Line2D([], [], color=TEXT, marker="o", ls="", ms=6)]
        keys += [
            Line2D([], [], color=TEXT, marker=mark, mfc="none", ls="")
            for mark in LOCK_MARKS.values()
        ]
        names = ["own", *(f"null: {name}" for name in LOCK_MARKS)]
        figure.legend(keys, names, loc="outside upper left", ncols=3, frameon=False)
    return figure


def flips(found: pd.DataFrame, metrics: Sequence[str], beside: Sequence[str]) -> Figure:
    """Diagnostics of RLVR over the share of its rewards that are wrong.

    Args:
        found: of ``signal.outcomes``.
        metrics: one panel each.
        beside: arms without flips, drawn as level lines.

    Returns:
        A line through the means of RLVR's arms, a dot a seed.
    """
    with styled():
        n_rows = (len(metrics) + 1) // 2
        size = (WIDTH, 0.8 + 2.2 * n_rows)
        figure, axes = plt.subplots(n_rows, 2, figsize=size, sharex=True, squeeze=False)
        for ax, metric in zip(axes.flat, metrics, strict=False):
            noisy = found[found["arm"].isin(FLIPS)].dropna(subset=metric)
            x = noisy["arm"].map(FLIPPED)
            means = noisy.groupby(x)[metric].mean()
            green = ARM_STYLES["rlvr"].colour
            ax.plot(means.index, means, color=green, label="RLVR")
            ax.plot(x, noisy[metric], "o", color=green, ms=4)
            for arm in beside:
                level, look = found.loc[found["arm"] == arm, metric], ARM_STYLES[arm]
                if len(level):
                    ax.plot(
                        [0, 50],
                        [level.mean()] * 2,
                        look.dash,
                        color=look.colour,
                        label=look.label,
                    )
            ax.set_title(LABELS[metric])
            ax.set_xticks([0, 25, 50], ["0", "25", "50"])
            ax.tick_params(labelsize=SMALL)
            # in full: an offset above the axis would touch the title
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
            place_labels(ax)
        for ax in list(axes.flat)[len(metrics) :]:
            ax.remove()
        figure.supxlabel("rewards that are wrong (%)", fontsize=10, color=TEXT)
    return figure


def foretold(worlds: Mapping[str, pd.DataFrame]) -> Figure:
    """How far arms went against how far the signal at their start could have led.

    Args:
        worlds: name to the table of ``signal.lasted``.

    Returns:
        A panel a world, a dot an arm and seed; grey where all of the signal lasts.
    """
    highest = 1.15 * max(float(t["displacement"].max()) for t in worlds.values())
    with styled():
        figure, axes = plt.subplots(
            1, len(worlds), figsize=(WIDTH, 3.4), sharey=True, squeeze=False
        )
        for ax, (world, table) in zip(axes[0], worlds.items(), strict=True):
            ends = [1.0, float(table["ceiling"].max()) * 1.05]
            ax.plot(ends, ends, ":", color=GREY, lw=1.2)
            for arm, rows in table.groupby("arm", sort=False):
                look = ARM_STYLES[str(arm)]
                ax.plot(
                    rows["ceiling"],
                    rows["displacement"],
                    _mark(str(arm)),
                    color=look.colour,
                    ms=5,
                    label=look.label,
                )
            ax.set_title(world)
            ax.set_xscale("log")
            plain_log_ticks(ax.xaxis)
            ax.set_ylim(0.8, highest)
        axes[0][0].set_ylabel("displacement at the end")
        figure.supxlabel(
            "what the signal at the start could have led to", fontsize=10, color=TEXT
        )
        known = {
            label: line
            for ax in axes[0]
            for line, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            known.values(), known, loc="outside upper left", ncols=4, frameon=False
        )
    return figure


def directions(worlds: Mapping[str, pd.DataFrame], arm: str = "opd") -> Figure:
    """Who ends in an arm's direction, a panel a world.

    Args:
        worlds: name to the table of ``collapse.directions``.
        arm: whose direction.

    Returns:
        A row another arm: cosine of the updates with its 95 % interval filled, overlap
        of their leading right subspaces hollow; grey the line of unrelated updates.
    """
    arms = list(dict.fromkeys(a for t in worlds.values() for a in t["other"]))
    with styled():
        size = (WIDTH, 1.2 + 0.3 * len(arms))
        figure, axes = plt.subplots(
            1, len(worlds), figsize=size, sharex=True, sharey=True, squeeze=False
        )
        for ax, (world, table) in zip(axes[0], worlds.items(), strict=True):
            ax.axvline(0.0, color=GREY, ls=":", lw=1.2)
            for row in table.to_dict("records"):
                y, colour = arms.index(row["other"]), ARM_STYLES[row["other"]].colour
                ax.plot([row["low"], row["high"]], [y, y], color=colour, lw=1.4)
                ax.plot(row["cosine"], y, "o", color=colour, ms=6)
                ax.plot(row["subspace"], y, "D", color=colour, mfc="none", ms=5)
            ax.set_title(world)
            ax.set_xlim(-1, 1.05)  # of a cosine, whatever an interval of two pairs says
        same = f"{ARM_STYLES[arm].label}, another seed"
        names = [same if a == arm else ARM_STYLES[a].label for a in arms]
        axes[0][0].set_yticks(range(len(arms)), names)
        axes[0][0].invert_yaxis()
        figure.supxlabel(
            f"shared with {ARM_STYLES[arm].label} (dotted: unrelated updates)",
            fontsize=10,
            color=TEXT,
        )
        keys = [
            Line2D([], [], color=TEXT, marker="o", ls="", ms=6),
            Line2D([], [], color=TEXT, marker="D", mfc="none", ls="", ms=5),
        ]
        names = ["cosine of the updates", "overlap of their leading subspaces"]
        figure.legend(keys, names, loc="outside upper left", ncols=2, frameon=False)
    return figure


def along_the_way(
    worlds: Mapping[str, pd.DataFrame], arms: Sequence[str], arm: str = "opd"
) -> Figure:
    """When a direction is shared: cosine of increments over training, a panel a world.

    Args:
        worlds: name to the table of ``worlds.along_the_way``.
        arms: the others, a line each.
        arm: whose increments.

    Returns:
        A line an arm through its windows' ends; grey the line of unrelated increments.
    """
    with styled():
        figure, axes = plt.subplots(
            1, len(worlds), figsize=(WIDTH, 3.6), sharey=True, squeeze=False
        )
        for ax, (world, table) in zip(axes[0], worlds.items(), strict=True):
            ax.axhline(0.0, color=GREY, ls=":", lw=1.2)
            for name in arms:
                rows, look = table[table["other"] == name], ARM_STYLES[name]
                if len(rows):
                    label = f"{look.label}, another seed" if name == arm else look.label
                    ax.plot(
                        100 * rows["stop"],
                        rows["cosine"],
                        look.dash,
                        marker=_mark(name),
                        color=look.colour,
                        ms=4,
                        label=label,
                    )
            ax.set_title(world)
            ax.set_xlim(0, 104)
        axes[0][0].set_ylabel(f"cosine with {ARM_STYLES[arm].label}'s increment")
        figure.supxlabel("end of the window (% of training)", fontsize=10, color=TEXT)
        known = {
            label: line
            for ax in axes[0]
            for line, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            known.values(), known, loc="outside upper left", ncols=3, frameon=False
        )
    return figure

"""Figures that hold arms against arms: at equal norm, one change at a time, in sweeps.

In the book's one style (see ``figures``); tidy tables in, figures out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from opd_geometry.analysis.confinement import POWERLESS, STOPPED, sufficiency
from opd_geometry.analysis.evidence import ALL_ACCURACIES, KEPT
from opd_geometry.analysis.matching import AT_END, AT_EQUAL_NORM
from opd_geometry.book.figures import (
    ARM_STYLES,
    CONFINED_STYLES,
    GREY,
    METRIC_LABELS,
    NULL_LABEL,
    SMALL,
    WIDTH,
    ArmStyle,
    at_end,
    draw_curve,
    plain_log_ticks,
    present,
    styled,
)

SHARES = ("sparsity", "density", "principal_overlap", "low_magnitude_overlap")


def _panels(
    count: int, height: float, sharex: bool = False
) -> tuple[Figure, Sequence[Axes]]:
    """A row of panels across the page, whose rows mean the same."""
    figure, axes = plt.subplots(
        1, count, figsize=(WIDTH, height), sharex=sharex, sharey=True, squeeze=False
    )
    return figure, list(axes[0])


def _name_rows(ax: Axes, names: Sequence[str], **look: Any) -> None:
    """Names at the rows 0, 1, ... from the top of the leftmost panel."""
    ax.set_yticks(range(len(names)), names, **look)
    ax.invert_yaxis()


def _name_columns(shown: np.ndarray, xlabel: str) -> None:
    """What the lowest panel of each of two columns shows across, with its ticks."""
    for ax in shown[-2:]:
        ax.set_xlabel(xlabel)
        ax.tick_params(axis="x", labelbottom=True)


def ladder(comparison: pd.DataFrame, names: Mapping[tuple[str, str], str]) -> Figure:
    """What each change does, at the end and once both arms have gone equally far.

    Args:
        comparison: of ``matching.compared``.
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
        figure, axes = _panels(len(metrics), 0.9 + 0.5 * len(pairs))
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
        _name_rows(axes[0], labels, fontsize=SMALL)
        figure.supxlabel(
            "factor ( ○ at the end   ● at equal norm   ┃ Gaussian updates there )",
            fontsize=SMALL,
            color=GREY,
        )
    return figure


def _draw_rung(ax: Axes, place: int, rows: pd.DataFrame) -> None:
    """One pair in one metric: two dots with intervals, and the null."""
    for at, shift, face in ((AT_END, -0.14, "none"), (AT_EQUAL_NORM, 0.14, None)):
        row = rows.loc[at]
        if np.isnan(row["ratio"]):
            continue
        colour = ARM_STYLES[row["other"]].colour
        look: Any = {"color": colour, "lw": 1.2}
        ax.hlines(place + shift, row["low"], row["high"], **look)
        ax.plot(row["ratio"], place + shift, "o", ms=5, mfc=face or colour, mec=colour)
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
    ax.set(xlim=(low, high), xticks=ticks)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value, 2):g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(axis="x", which="minor", length=0)


# --- confined runs ---------------------------------------------------------------


def subspace_dots(
    table: pd.DataFrame, families: Sequence[str], measure: str = "trained task"
) -> Figure:
    """What each confinement keeps (Figures 6 and 8 of the paper, with controls).

    Args:
        table: tidy, with free arms and their confined twins.
        families: the free arms, a panel each.
        measure: a key of ``confinement.MEASURES``.

    Returns:
        The figure: a row a subspace, a dot at the share that it keeps of what the free
        run gains after the branch, with its 95 % interval. In the band a subspace
        suffices; the dotted line is the free run stopped at the branch. A family
        without power has no dots.

    Raises:
        ValueError: the table has none of the families.
    """
    families = present(table, families)
    found = {name: sufficiency(table, name, measure) for name in families}
    suffixes = [
        suffix
        for suffix in CONFINED_STYLES
        if any(f"{n}-projected{suffix}" in set(found[n]["arm"]) for n in families)
    ]
    with styled():
        height = 1.1 + 0.3 * len(suffixes)
        figure, axes = _panels(len(families), height, sharex=True)
        for ax, name in zip(axes, families, strict=True):
            rows = found[name].set_index("arm")
            for place, suffix in enumerate(suffixes):
                arm = f"{name}-projected{suffix}"
                if arm in rows.index:
                    _draw_loss(ax, place, rows.loc[arm], CONFINED_STYLES[suffix].colour)
            ax.axvspan(KEPT, 1, color=GREY, alpha=0.15, lw=0)
            ax.axvline(1, color=ARM_STYLES[name].colour, lw=1.2)
            ax.axvline(0, color=GREY, ls=":", lw=1.2)
            if rows.loc[STOPPED, "outcome"] == POWERLESS:
                said = "gain not shown:\n" + POWERLESS
                ax.text(0.5, len(suffixes) / 2 - 0.5, said, ha="center", va="center")
            ax.set_title(ARM_STYLES[name].label, color=ARM_STYLES[name].colour)
        labels = [CONFINED_STYLES[suffix].label for suffix in suffixes]
        _name_rows(axes[0], labels)
        figure.supxlabel(
            "share of the free run's gain ( ┊ stopped at the branch   ▒ suffices )",
            fontsize=SMALL,
            color=GREY,
        )
    return figure


def _draw_loss(ax: Axes, place: int, row: pd.Series, colour: str) -> None:
    """A dot with its interval; open where the subspace falls short."""
    ax.hlines(place, row["kept_low"], row["kept_high"], color=colour, lw=1.4)
    face = colour if row["outcome"] == "suffices" else "none"
    ax.plot(row["kept"], place, "o", ms=5, mfc=face, mec=colour)


def benchmark_dots(
    table: pd.DataFrame, families: Sequence[str], suffixes: Sequence[str]
) -> Figure:
    """Every benchmark of free and confined runs (Figure 8 of the paper).

    Args:
        table: tidy.
        families: the free arms, a panel each.
        suffixes: of the confined arms that are shown.

    Returns:
        The figure: a row a benchmark, a mark an arm at its mean over seeds, a line from
        the lowest to the highest seed.

    Raises:
        ValueError: the table has none of the families.
    """
    families = present(table, families)
    with styled():
        height = 1.3 + 0.42 * len(ALL_ACCURACIES)
        figure, axes = _panels(len(families), height, sharex=True)
        for ax, name in zip(axes, families, strict=True):
            arms = {name: ArmStyle("free", GREY)}
            arms |= {f"{name}-projected{s}": CONFINED_STYLES[s] for s in suffixes}
            for shift, (arm, look) in enumerate(arms.items()):
                _draw_benchmarks(ax, table, arm, look, 0.18 * shift - 0.27)
            ax.set(title=ARM_STYLES[name].label, xlabel="sampled accuracy")
            ax.set(xlim=(0, 1), xticks=(0, 0.5, 1))
            for between in range(1, len(ALL_ACCURACIES)):
                ax.axhline(between - 0.5, color=GREY, lw=0.3)
        names = [metric.removeprefix("accuracy/") for metric in ALL_ACCURACIES]
        _name_rows(axes[0], names)
        dots, labels = axes[0].get_legend_handles_labels()
        place: Any = {"loc": "outside upper center", "ncols": len(labels)}
        figure.legend(dots, labels, fontsize=SMALL, frameon=False, **place)
    return figure


def _draw_benchmarks(
    ax: Axes, table: pd.DataFrame, arm: str, look: ArmStyle, shift: float
) -> None:
    """One arm's accuracies, a row a benchmark."""
    for place, metric in enumerate(ALL_ACCURACIES):
        seeds = at_end(table[table["arm"] == arm], metric)["value"]
        if seeds.empty:
            continue
        ax.hlines(place + shift, seeds.min(), seeds.max(), color=look.colour, lw=1.2)
        face = "none" if look.dash == "--" else look.colour
        label = look.label if place == 0 else "_again"
        dot: Any = {"mfc": face, "mec": look.colour, "color": look.colour}
        ax.plot(seeds.mean(), place + shift, "o", ms=4.5, lw=0, label=label, **dot)


# --- sweeps and variants ---------------------------------------------------------


def sweep(
    table: pd.DataFrame,
    arms: Sequence[str],
    places: Mapping[str, float],
    metrics: Sequence[str],
    xlabel: str,
    printed: Mapping[tuple[str, str], float] | None = None,
) -> Figure:
    """Metrics at the end of training over a setting: a learning rate, or a width.

    Args:
        table: tidy.
        arms: a line each, by the name of the arm without a suffix.
        places: suffix of an arm (empty for the arm itself) to where it stands.
        metrics: a panel each.
        xlabel: what the setting is.
        printed: (arm, metric) to what the paper prints, drawn as a triangle at the
            right edge.

    Returns:
        The figure: means over seeds, bands from the smallest to the largest seed, the
        Gaussian null of each arm dotted in the arm's colour.

    Raises:
        ValueError: the table has none of the arms.
    """
    arms, rows = present(table, arms), -(-len(metrics) // 2)
    with styled():
        figure, axes = plt.subplots(
            rows, 2, figsize=(WIDTH, 0.4 + 2.4 * rows), sharex=True, squeeze=False
        )
        for ax, metric in zip(axes.flat, metrics, strict=False):
            for arm in arms:
                _draw_sweep(ax, table, arm, places, metric)
                value = (printed or {}).get((arm, metric))
                if value is not None:
                    mark: Any = {"color": ARM_STYLES[arm].colour, "clip_on": False}
                    ax.plot(1.0, value, "<", transform=ax.get_yaxis_transform(), **mark)
            _finish_sweep(ax, metric, places)
        for ax in axes.flat[len(metrics) :]:
            ax.set_axis_off()
        _name_columns(axes.flat[: len(metrics)], xlabel)
        axes[0][0].plot([], [], color=GREY, linestyle=":", label=NULL_LABEL)
        if printed:
            at_paper: Any = {"color": GREY, "lw": 0, "label": "the paper prints"}
            axes[0][0].plot([], [], "<", **at_paper)
        lines, names = axes[0][0].get_legend_handles_labels()
        place: Any = {"loc": "outside upper center", "ncols": len(names)}
        figure.legend(lines, names, fontsize=SMALL, frameon=False, **place)
    return figure


def _draw_sweep(
    ax: Axes, table: pd.DataFrame, arm: str, places: Mapping[str, float], metric: str
) -> None:
    """One arm's line in one metric, and its null."""
    at = {f"{arm}{suffix}": place for suffix, place in places.items()}
    of_arm = table[table["arm"].isin(list(at))]
    look = ARM_STYLES[arm]
    for name in (metric, f"null_{metric}"):
        ends = at_end(of_arm, name)
        ends = ends.assign(frac=ends["arm"].map(at)).sort_values("frac")
        if name == metric and len(ends):
            draw_curve(ax, ends, look)
        elif len(ends):
            draw_curve(ax, ends, ArmStyle("_null", look.colour, ":"), band=False)


def _finish_sweep(ax: Axes, metric: str, places: Mapping[str, float]) -> None:
    """Title, and axes with ticks where something stands."""
    ax.set(title=METRIC_LABELS[metric], xscale="log")
    ax.set_xticks(sorted(places.values()))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(axis="x", which="minor", length=0)
    if metric not in SHARES:
        ax.set_yscale("log")
        plain_log_ticks(ax.yaxis)


def variant_dots(
    table: pd.DataFrame,
    arms: Mapping[str, str],
    metrics: Sequence[str],
    margins: Mapping[str, tuple[float, float]],
) -> Figure:
    """Variants of one arm side by side (Table 1 of the paper, as a picture).

    Args:
        table: tidy.
        arms: arm to its name in the figure; the first one is what the others vary.
        metrics: a panel each.
        margins: metric to the ends of a band around the first arm's mean: differences,
            or factors for a metric that is no share.

    Returns:
        The figure: small dots are seeds, a large one their mean, a grey tick the
        Gaussian null.

    Raises:
        ValueError: the table has none of the arms.
    """
    names = {arm: arms[arm] for arm in present(table, arms)}
    with styled():
        figure, axes = _panels(len(metrics), 0.9 + 0.34 * len(names))
        for ax, metric in zip(axes, metrics, strict=True):
            for place, arm in enumerate(names):
                _draw_variant(ax, place, table[table["arm"] == arm], metric)
            if metric in margins and next(iter(arms)) in names:
                ends = at_end(table[table["arm"] == next(iter(names))], metric)
                band = _around(ends["value"].mean(), margins[metric], metric)
                ax.axvspan(*band, color=GREY, alpha=0.15, lw=0)
            ax.set_title(METRIC_LABELS[metric].replace(", ", ",\n"))
            if metric not in SHARES:
                ax.set_xscale("log")
                plain_log_ticks(ax.xaxis)
        _name_rows(axes[0], list(names.values()))
        figure.supxlabel(
            "( ● mean over seeds   ┃ Gaussian null   ▒ margin )",
            fontsize=SMALL,
            color=GREY,
        )
    return figure


def _draw_variant(ax: Axes, place: int, of_arm: pd.DataFrame, metric: str) -> None:
    """One variant in one metric: its seeds, their mean and its null."""
    seeds, null = (at_end(of_arm, name)["value"] for name in (metric, f"null_{metric}"))
    colour = ARM_STYLES[of_arm["arm"].iloc[0]].colour
    ax.plot(seeds, [place] * len(seeds), ".", color=colour, alpha=0.5, ms=4)
    ax.plot(seeds.mean(), place, "o", color=colour, ms=6)
    ax.plot(null.mean(), place, "|", color=GREY, ms=11, mew=2)


def _around(
    value: float, margin: tuple[float, float], metric: str
) -> tuple[float, float]:
    """The ends of a margin of differences for a share, of factors otherwise."""
    low, high = margin
    if metric in SHARES:
        return value + low, value + high
    return value * low, value * high

"""Figures of settings and variants: rates, widths, teachers.

In the book's one style (see ``figures``); tidy tables in, figures out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opd_geometry.book.figures import (
    ARM_STYLES,
    GREY,
    METRIC_LABELS,
    NULL_LABEL,
    SMALL,
    ArmStyle,
    at_end,
    draw_curve,
    labelled,
    legend_above,
    log_ticks,
    name_rows,
    panel_row,
    panels,
    plain_log_ticks,
    present,
    styled,
)

SHARES = ("sparsity", "density", "principal_overlap", "low_magnitude_overlap")


def _name_columns(shown: np.ndarray, xlabel: str) -> None:
    """What the lowest panel of each of two columns shows across, with its ticks."""
    for ax in shown[-2:]:
        ax.set_xlabel(xlabel)
        ax.tick_params(axis="x", labelbottom=True)


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
        figure, axes = panels(rows, 2, 0.4 + 2.4 * rows, sharex=True)
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
        keys = labelled(axes[0][:1])
        legend_above(figure, keys, ncols=len(keys))
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
    ax.set_title(METRIC_LABELS[metric])
    log_ticks(ax, sorted(places.values()))
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
        figure, axes = panel_row(len(metrics), 0.9 + 0.34 * len(names))
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
        name_rows(axes[0], list(names.values()))
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

"""Figures of confined runs: what each subspace keeps.

In the book's one style (see ``figures``); tidy tables in, figures out.
"""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opd_geometry.analysis.controls import POWERLESS, STOPPED, sufficiency
from opd_geometry.analysis.evidence import ALL_ACCURACIES, KEPT
from opd_geometry.book.figures import (
    ARM_STYLES,
    CONFINED_STYLES,
    GREY,
    SMALL,
    ArmStyle,
    at_end,
    draw_dot,
    key,
    legend_above,
    name_rows,
    panel_row,
    present,
    styled,
)


def subspace_dots(
    table: pd.DataFrame, families: Sequence[str], measure: str = "trained task"
) -> Figure:
    """What each confinement keeps (Figures 6 and 8 of the paper, with controls).

    Args:
        table: tidy, with free arms and their confined twins.
        families: the free arms, a panel each.
        measure: one of ``controls.MEASURES``.

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
        figure, axes = panel_row(len(families), height, sharex=True)
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
        name_rows(axes[0], labels)
        figure.supxlabel(
            "share of the free run's gain ( ┊ stopped at the branch   ▒ suffices )",
            fontsize=SMALL,
            color=GREY,
        )
    return figure


def _draw_loss(ax: Axes, place: int, row: pd.Series, colour: str) -> None:
    """A dot with its interval; open where the subspace falls short."""
    ends, short = (row["kept_low"], row["kept_high"]), row["outcome"] != "suffices"
    draw_dot(ax, row["kept"], place, ends, colour, hollow=short)


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
        figure, axes = panel_row(len(families), height, sharex=True)
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
        name_rows(axes[0], names)
        keys = {x.label: key(x.colour, hollow=x.dash == "--") for x in arms.values()}
        legend_above(figure, keys, ncols=len(keys))
    return figure


def _draw_benchmarks(
    ax: Axes, table: pd.DataFrame, arm: str, look: ArmStyle, shift: float
) -> None:
    """One arm's accuracies, a row a benchmark."""
    for place, metric in enumerate(ALL_ACCURACIES):
        seeds = at_end(table[table["arm"] == arm], metric)["value"]
        if seeds.empty:
            continue
        ends, hollow = (seeds.min(), seeds.max()), look.dash == "--"
        draw_dot(ax, seeds.mean(), place + shift, ends, look.colour, hollow=hollow)

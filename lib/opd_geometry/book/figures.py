"""Figures of the book: tidy tables in, matplotlib figures out, one style.

Every figure shows its null: what the same diagnostic says of a Gaussian update with
the same Frobenius norm per matrix, or of a random subspace. Lines are means over
seeds, bands reach from the smallest to the largest seed. Nothing is computed from
weights here, only averaged over matrices.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from opd_geometry.geometry.defaults import ATTENTION_ROLES, LAYER_ROLES, MASK_ALPHA

WIDTH = 7.2  # inches: 700 pixels of a page, so that a point is 1.35 of them
TEXT = "#333333"
SMALL = 9  # points, 11 pixels where a picture is a little wider: nothing is smaller
NULL_LABEL = "Gaussian null"
SUBSPACE_NULL_LABEL = "random subspaces"
WALK_LABEL = "independent steps"
# Each at least 4.5:1 on white, and on a dark page as its style sheet turns them.
GREY, BLUE, ORANGE, GREEN = "#6b6b6b", "#0065b8", "#b35900", "#007a4d"
RED, PURPLE, BROWN, LIGHT_BLUE = "#c2256b", "#7348bd", "#7d5526", "#007a8f"
OLIVE = "#5b6b00"
_COLOURS = [BLUE, ORANGE, GREEN, RED, PURPLE, BROWN, LIGHT_BLUE, OLIVE]


class ArmStyle(NamedTuple):
    """How an arm is named and drawn, everywhere the same."""

    label: str
    colour: str
    dash: str = "-"


_MAIN_STYLES = {
    "sft": ArmStyle("SFT", ORANGE),
    "opd": ArmStyle("OPD", BLUE),
    "rlvr": ArmStyle("RLVR", GREEN),
}
# Where a confined run is confined: what follows ``-projected`` in the arm's name.
CONFINED_STYLES = {
    "": ArmStyle("own early subspace", PURPLE),
    "-update": ArmStyle("own, update confined", LIGHT_BLUE),
    "-half": ArmStyle("own, half the rank", PURPLE, ":"),
    "-wide": ArmStyle("own, twice the rank", BROWN),
    "-wider": ArmStyle("own, four times the rank", BROWN, "--"),
    "-donor": ArmStyle("another arm's subspace", RED),
    "-pretrained": ArmStyle("top subspace of the weights", GREEN),
    "-random": ArmStyle("random subspace", GREY, "--"),
    "-random-wider": ArmStyle("random, four times the rank", GREY, ":"),
    "-update-random": ArmStyle("random, update confined", GREY, "-."),
    "-update-donor": ArmStyle("another's, update confined", RED, "-."),
}
_SCALED = {
    "lr-x0.3": ("0.3 × rate", ":"),
    "lr-x3": ("3 × rate", "--"),
    "width-x1.5": ("1.5 × width", ":"),
    "width-x2": ("2 × width", "--"),
    "unclipped": ("unclipped", "-."),
}
ARM_STYLES = {
    "sft": _MAIN_STYLES["sft"],
    "sft-matched": ArmStyle("SFT, matched", RED),
    "opd": _MAIN_STYLES["opd"],
    "rlvr": _MAIN_STYLES["rlvr"],
    "tokens-top-50": ArmStyle("top-gap 50 %", LIGHT_BLUE),
    "tokens-top-25": ArmStyle("top-gap 25 %", PURPLE),
    "tokens-random-50": ArmStyle("random 50 %", BROWN, "--"),
    "tokens-random-25": ArmStyle("random 25 %", OLIVE, "--"),
    "off-policy": ArmStyle("OPD off-policy", PURPLE),
    "mix-0.75": ArmStyle("α = 0.75", BLUE, "--"),
    "mix-0.50": ArmStyle("α = 0.5", LIGHT_BLUE),
    "mix-0.25": ArmStyle("α = 0.25", PURPLE),
    "mix-0.05": ArmStyle("α = 0.05", GREEN, "--"),
    "mix-0.01": ArmStyle("α = 0.01", GREEN, ":"),
    "sft-base-matched": ArmStyle("SFT, matched, from the base", BROWN),
    "sft-learns": ArmStyle("SFT that learns", RED, "--"),
    "ce-teacher": ArmStyle("imitation of the teacher", BROWN, "--"),
    "rlvr-flip-30": ArmStyle("RLVR, 30 % flipped", GREEN, ":"),
    "rlvr-flip-45": ArmStyle("RLVR, 45 % flipped", GREEN, "-."),
    "rlvr-coin": ArmStyle("RLVR on coin flips", GREY),
    "off-policy-ratio": ArmStyle("OPD off-policy, ratio", PURPLE, "--"),
    "off-policy-ratio-clip": ArmStyle("OPD off-policy, clipped", PURPLE, ":"),
    "sft-matched-unclipped": ArmStyle("SFT, matched, unclipped", RED, ":"),
    "rlvr-paper": ArmStyle("RLVR, the paper's batch and steps", GREEN, "--"),
    "opd-task-gcd": ArmStyle("OPD on gcd", PURPLE),
    "opd-teacher-x1": ArmStyle("teacher of width × 1", LIGHT_BLUE),
    "opd-teacher-x2": ArmStyle("teacher of width × 2", LIGHT_BLUE, "--"),
    "opd-teacher-moe": ArmStyle("teacher of experts", RED),
    "opd-teacher-guess": ArmStyle("OPD, a teacher that guesses", BLUE, ":"),
    "opd-noise-3": ArmStyle("OPD, noise of 3 nats", BLUE, "--"),
    "opd-noise-10": ArmStyle("OPD, noise of 10 nats", BLUE, "-."),
    "opd-full": ArmStyle("OPD, full reverse KL", BLUE, "--"),
    "opd-full-forward": ArmStyle("OPD, full forward KL", BLUE, ":"),
    "opd-sgd": ArmStyle("OPD by SGD", BROWN),
    "opd-muon": ArmStyle("OPD by Muon", OLIVE),
    "opd-self-0.5": ArmStyle("own teacher, τ = 0.5", LIGHT_BLUE, "--"),
    "opd-self": ArmStyle("own teacher, no gap", LIGHT_BLUE),
    **{
        f"{family}-projected{suffix}": look
        for family in (
            "opd",
            "sft",
            "sft-matched",
            "sft-learns",
            "ce-teacher",
            "rlvr",
        )
        for suffix, look in CONFINED_STYLES.items()
    },
    **{
        f"{arm}-{change}": ArmStyle(f"{look.label}, {words}", look.colour, dash)
        for arm, look in _MAIN_STYLES.items()
        for change, (words, dash) in _SCALED.items()
    },
    "yours": ArmStyle("your model", PURPLE),
}


def confined_label(arm: str) -> str:
    """What an arm ``FAMILY-projected...`` is called where families stand together."""
    family, _, form = arm.partition("-projected")
    return f"{ARM_STYLES[family].label}: {CONFINED_STYLES[form].label}"


METRIC_LABELS = {
    "sparsity": "update sparsity",
    "density": "update density",
    "angle_left_mean_deg": "mean angle, left (deg)",
    "angle_left_max_deg": "largest angle, left (deg)",
    "angle_right_mean_deg": "mean angle, right (deg)",
    "angle_right_max_deg": "largest angle, right (deg)",
    "nss": "spectral shift NSS",
    "principal_overlap": "overlap, principal mask",
    "low_magnitude_overlap": "overlap, low-magnitude mask",
    "stable_rank": "stable rank",
    "stable_rank_bf16": "stable rank, bf16 readout",
    "frobenius_norm": "Frobenius norm",
    "relative_norm": "relative norm",
    "hill_alpha": "Hill exponent",
    "similarity_to_end": "similarity to the end, Sim_K",
    "accuracy/chain": "sampled accuracy",
}
# What tables show besides.
LABELS = METRIC_LABELS | {
    "displacement": "displacement",
    "energy_top_left": "energy, top left of W₀",
    "energy_top_right": "energy, top right of W₀",
    "energy_bottom_left": "energy, bottom left of W₀",
    "energy_bottom_right": "energy, bottom right of W₀",
    "energy_inputs": "energy, where inputs lie",
    "angle_mean_deg": "mean angle (deg)",
    "angle_max_deg": "largest angle (deg)",
    "w0": "W₀",
}
WEIGHTED_METRICS = ("sparsity", "null_sparsity")  # by parameters, as Table 1 is
LOG_METRICS = ("frobenius_norm", "relative_norm")
ANNOTATED_LAYERS = 12  # a map of more layers has no room for numbers


def style() -> dict[str, Any]:
    """Settings that read well on a light and on a dark page.

    Returns:
        rcParams: transparent background, dark text and axes, 144 dots per inch. A
        dark page turns light and dark round and keeps the hues (``custom.css``).
    """
    text = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor")
    return {
        **dict.fromkeys((*text, "xtick.color", "ytick.color"), TEXT),
        "axes.facecolor": "none",
        "axes.prop_cycle": plt.cycler(color=_COLOURS),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 10,
        "figure.constrained_layout.use": True,
        "figure.dpi": 144,
        "figure.facecolor": "none",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9.5,
        "legend.fontsize": SMALL,
        "xtick.labelsize": SMALL,
        "ytick.labelsize": SMALL,
        "lines.linewidth": 1.8,
        "savefig.facecolor": "none",
    }


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the book's style within, and leave no figure open.

    A notebook shows what is still open a second time.
    """
    settings: Any = style()  # matplotlib's own hints want one type a key
    before = plt.get_fignums()
    try:
        with plt.rc_context(settings):
            yield
    finally:
        for number in set(plt.get_fignums()).difference(before):
            plt.close(number)


# --- averages ------------------------------------------------------------------


def over_matrices(
    table: pd.DataFrame, metric: str, roles: Sequence[str] = LAYER_ROLES
) -> pd.DataFrame:
    """Average a metric over a model's matrices.

    Without weights, but sparsity by the number of parameters, as the paper does.

    Args:
        table: tidy (run, arm, seed, step, matrix, role, layer, metric, value).
        metric: a matrix metric, or a model metric such as ``accuracy/chain``.
        roles: which matrices; ignored for a model metric.

    Returns:
        One row a run and step: arm, seed, step, frac (share of the run's training),
        value. A mean with an undefined member (NaN, or of unknown size where it is
        weighed) is left out.
    """
    last = table.groupby(["arm", "seed"], observed=True)["step"].max()
    wanted = (table["metric"] == metric) & table["role"].isin([*roles, "model"])
    rows = table[wanted].astype({"arm": object, "matrix": object})
    weights: Any = 1.0
    if metric in WEIGHTED_METRICS:
        sizes = table[table["metric"] == "parameters"]
        size = sizes.groupby(["arm", "matrix"], observed=True)["value"].first()
        keys = zip(rows["arm"], rows["matrix"], strict=True)
        weights = np.array([size.get(key, np.nan) for key in keys], float)
    sums = (
        rows.assign(weight=weights, value=rows["value"] * weights)
        .groupby(["arm", "seed", "step"])[["value", "weight"]]
        .sum(skipna=False)
        .reset_index()
    )
    ends = [last[key] for key in zip(sums["arm"], sums["seed"], strict=True)]
    sums["frac"] = sums["step"] / np.array(ends, float)
    sums["value"] /= sums["weight"]
    return sums[["arm", "seed", "step", "frac", "value"]].dropna(ignore_index=True)


def at_end(
    table: pd.DataFrame, metric: str, roles: Sequence[str] = LAYER_ROLES
) -> pd.DataFrame:
    """``over_matrices`` at the end of training: one row a run."""
    values = over_matrices(table, metric, roles)
    return values[values["frac"] == 1.0].reset_index(drop=True)


def summary(
    table: pd.DataFrame, metrics: Iterable[str], roles: Sequence[str] = LAYER_ROLES
) -> pd.DataFrame:
    """Means over seeds at the end of training.

    Args:
        table: tidy.
        metrics: the columns.
        roles: which matrices.

    Returns:
        One row an arm, in the order of the book, one column a metric.
    """
    columns = {
        metric: at_end(table, metric, roles).groupby("arm")["value"].mean()
        for metric in metrics
    }
    frame = pd.DataFrame(columns)
    return frame.loc[[arm for arm in ARM_STYLES if arm in frame.index]]


def first_last(
    table: pd.DataFrame,
    metric: str,
    arms: Sequence[str],
    roles: Sequence[str] = ATTENTION_ROLES,
) -> pd.DataFrame:
    """Means over seeds at the first and at the last checkpoint.

    Args:
        table: tidy.
        metric: averaged over the matrices of the roles.
        arms: which, in this order.
        roles: the attention projections, as in the paper's trajectories.

    Returns:
        One row an arm, columns first and last; NaN where every seed is undefined.
    """
    arms = present(table, arms)
    values = over_matrices(table[table["arm"].isin(arms)], metric, roles)
    by_arm = values.groupby(["arm", "frac"])["value"].mean().groupby("arm")
    ends = pd.DataFrame({"first": by_arm.first(), "last": by_arm.last()})
    return ends.reindex(arms)


def course_text(course: pd.DataFrame, form: str = ".3g") -> str:
    """``first_last`` in a sentence.

    >>> course_text(pd.DataFrame({"first": [2.5], "last": [3.0]}, index=["opd"]))
    'OPD 2.5 → 3'
    """
    return "; ".join(
        f"{ARM_STYLES[arm].label} "
        + with_minus(f"{row['first']:{form}} → {row['last']:{form}}")
        for arm, row in course.iterrows()
    )


def ranking(values: Mapping[str, float], form: str = ".3g") -> str:
    r"""Arms and their values, largest first; no word on whether they differ.

    >>> ranking({"sft": 0.081, "opd": 0.516, "rlvr": 0.0811}, ".1%")
    'OPD 51.6\xa0%; RLVR 8.1\xa0%; SFT 8.1\xa0%'

    Between a number and its per cent sign stands a space that does not break; an
    undefined value is left out.
    """
    known = {arm: value for arm, value in values.items() if not np.isnan(value)}
    ranked = sorted(known.items(), key=lambda item: -item[1])
    return "; ".join(
        f"{ARM_STYLES[arm].label} "
        + with_minus(f"{value:{form}}").replace("%", "\N{NO-BREAK SPACE}%")
        for arm, value in ranked
    )


def with_minus(text: str) -> str:
    """A number with a minus sign for its hyphen.

    >>> with_minus("-1.5e-05")
    '−1.5e−05'
    """
    return text.replace("-", "\N{MINUS SIGN}")


def with_null(metrics: Iterable[str]) -> list[str]:
    """Each metric, followed by its null.

    >>> with_null(["nss"])
    ['nss', 'null_nss']
    """
    return [name for metric in metrics for name in (metric, f"null_{metric}")]


def present(table: pd.DataFrame, arms: Iterable[str]) -> list[str]:
    """The asked arms that the table has."""
    asked, there = list(arms), set(table["arm"])
    found = [arm for arm in asked if arm in there]
    if not found:
        raise ValueError(
            f"the table holds none of the arms {', '.join(asked)}; it has "
            f"{', '.join(sorted(there)) or 'no rows'}: load the runs first"
        )
    return found


# --- lines over training -------------------------------------------------------


class Panel(NamedTuple):
    """One panel over training: a metric, the arms in it, a title."""

    metric: str
    arms: Sequence[str]
    title: str = ""


def trajectories(
    table: pd.DataFrame,
    grid: Sequence[Sequence[Panel]],
    roles: Sequence[str] = ATTENTION_ROLES,
) -> Figure:
    """Metrics over training progress (Figures 4, 5, 7 and 9 of the paper).

    Args:
        table: tidy.
        grid: rows of panels; a row of one metric shares its vertical axis.
        roles: which matrices are averaged; the attention projections, as the paper.

    Returns:
        The figure. Each line is named where it ends; a null far above the arms has a
        strip of its own over a broken axis.

    Raises:
        ValueError: the table has none of a panel's arms.
    """
    metrics = {panel.metric for row in grid for panel in row}
    table = table[table["metric"].isin(with_null(metrics))]
    far = [
        [
            any(_null_is_far(table, p, roles) for p in row if p.metric == panel.metric)
            for panel in row
        ]
        for row in grid
    ]
    heights = [h for row in far for h in ((0.3, 2.3) if any(row) else (2.6,))]
    n_columns = max(map(len, grid))
    with styled():
        figure = plt.figure(figsize=(WIDTH, 0.4 + sum(heights)))
        places = figure.add_gridspec(len(heights), n_columns, height_ratios=heights)
        place = 0
        for panels, broken in zip(grid, far, strict=True):
            row, end = [], place + 1 + any(broken)
            for column, (panel, above) in enumerate(zip(panels, broken, strict=True)):
                ax = figure.add_subplot(places[place + above : end, column])
                strip = figure.add_subplot(places[place, column]) if above else None
                _draw_panel(ax, strip, table, panel, roles)
                row.append(ax)
            if len({panel.metric for panel in panels}) == 1:
                share_vertical(row)
            for ax in row:
                place_labels(ax)
            place = end
        for ax in row:
            ax.set_xlabel("share of training")
    return figure


def _null_of(table: pd.DataFrame, panel: Panel, roles: Sequence[str]) -> pd.DataFrame:
    """A panel's null by progress, averaged over arms and seeds; perhaps no rows."""
    null = over_matrices(table, f"null_{panel.metric}", roles)
    null = null[null["arm"].isin(panel.arms)]
    return null.assign(frac=null["frac"].round(2), seed=0)


def _null_is_far(table: pd.DataFrame, panel: Panel, roles: Sequence[str]) -> bool:
    """Whether the null would squeeze a panel's lines into its lower half."""
    null = _null_of(table, panel, roles)["value"]
    values = over_matrices(table, panel.metric, roles)
    top = values[values["arm"].isin(panel.arms)]["value"].max()
    return len(null) > 0 and bool(null.min() > 1.8 * top)


def _draw_panel(
    ax: Axes,
    strip: Axes | None,
    table: pd.DataFrame,
    panel: Panel,
    roles: Sequence[str],
) -> None:
    """The arms' curves of one metric and its null, in the strip if there is one."""
    values = over_matrices(table, panel.metric, roles)
    for arm in present(table, panel.arms):
        curve = values[values["arm"] == arm]
        if curve.empty:  # an arm that never moved has no such metric
            continue
        draw_curve(ax, curve, ARM_STYLES[arm])
        if panel.metric.endswith("norm"):
            _draw_independent_steps(ax, curve)
    null = _null_of(table, panel, roles)
    random_bases = panel.metric == "similarity_to_end"
    label = SUBSPACE_NULL_LABEL if random_bases else NULL_LABEL
    if len(null):
        draw_curve(strip or ax, null, ArmStyle(label, GREY, ":"), band=False)
    ax.set(xlim=(0, 1), xticks=(0, 0.5, 1), ylabel=METRIC_LABELS[panel.metric])
    (strip or ax).set_title(panel.title)
    if panel.metric in LOG_METRICS:
        ax.set_yscale("log")
        plain_log_ticks(ax.yaxis)
    elif random_bases:
        ax.set_ylim(0, 1.02)
    if strip is not None and len(null):
        _break_axis(strip, ax)
        place_labels(strip)
    elif strip is not None:  # its neighbour has a null, this table has none
        strip.set_axis_off()


def draw_curve(
    ax: Axes, curve: pd.DataFrame, look: ArmStyle, band: bool = True
) -> None:
    """Mean over seeds as a line, smallest to largest seed as a band.

    Args:
        ax: where.
        curve: columns frac, seed, value.
        look: label, colour and dash.
        band: draw the range over seeds; needs two seeds.
    """
    by_time = curve.groupby("frac")["value"]
    mean = by_time.mean()
    ax.plot(
        mean.index,
        mean.to_numpy(),
        color=look.colour,
        linestyle=look.dash,
        label=look.label,
        marker="o" if band else None,
        markersize=3,
    )
    if band and curve["seed"].nunique() > 1:
        low, high = by_time.min(), by_time.max()
        ax.fill_between(mean.index, low, high, color=look.colour, alpha=0.2, lw=0)


def _draw_independent_steps(ax: Axes, curve: pd.DataFrame) -> None:
    """The null of a growing norm: equal independent steps to the same final norm.

    norm(frac) = norm(1) * sqrt(frac): what grows faster keeps a direction.
    """
    mean = curve.groupby("frac")["value"].mean()
    walk = mean.iloc[-1] * np.sqrt(mean.index / mean.index[-1])
    named = any(line.get_label() == WALK_LABEL for line in ax.get_lines())
    label = "_again" if named else WALK_LABEL
    ax.plot(mean.index, walk, ":", color=GREY, lw=1.2, label=label)


def _break_axis(strip: Axes, below: Axes) -> None:
    """Make a strip look like the upper end of the axis below it."""
    paths = [np.asarray(line.get_xydata()) for line in strip.get_lines()]
    middle = float(np.mean([path[:, 1].mean() for path in paths]))
    strip.set(xlim=below.get_xlim(), xticks=(), yticks=[float(f"{middle:.2g}")])
    strip.set_ylim(0.9 * middle, 1.1 * middle)
    strip.spines["bottom"].set_visible(False)
    slash: Any = {"marker": [(-1, -0.6), (1, 0.6)], "ms": 8, "mew": 1, "ls": "none"}
    slash |= {"color": GREY, "clip_on": False, "label": "_break"}
    strip.plot([0], [0], transform=strip.transAxes, **slash)
    below.plot([0], [1], transform=below.transAxes, **slash)


def plain_log_ticks(axis: XAxis | YAxis) -> None:
    """Ticks such as 2, 5, 10 instead of powers of ten with unlabelled ones between."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def log_ticks(ax: Axes, places: Sequence[float]) -> None:
    """A logarithmic horizontal axis with ticks at these places alone."""
    ax.set_xscale("log")
    ax.set_xticks(places, [f"{place:g}" for place in places])
    ax.xaxis.set_minor_locator(NullLocator())


def panels(
    rows: int, columns: int, height: float, **shared: Any
) -> tuple[Figure, np.ndarray]:
    """A grid of panels across the page; height in inches, the rest as of matplotlib."""
    size = (WIDTH, height)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, **shared)


def panel_row(
    count: int, height: float, sharex: bool = False
) -> tuple[Figure, list[Axes]]:
    """A row of panels across the page, whose rows mean the same; height in inches."""
    figure, axes = panels(1, count, height, sharex=sharex, sharey=True)
    return figure, list(axes[0])


def name_rows(ax: Axes, names: Sequence[str], **look: Any) -> None:
    """Names at the rows 0, 1, ... from the top of the leftmost panel."""
    ax.set_yticks(range(len(names)), names, **look)
    ax.invert_yaxis()


def name_arms(axes: Sequence[Axes], arms: Sequence[str]) -> None:
    """Arms in their colours at the rows of panels that need no line for them."""
    axes[0].set_yticks(range(len(arms)), [ARM_STYLES[arm].label for arm in arms])
    for label, arm in zip(axes[0].get_yticklabels(), arms, strict=True):
        label.set_color(ARM_STYLES[arm].colour)
    for ax in axes:
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)


def draw_dot(
    ax: Axes,
    x: Any,
    y: Any,
    ends: tuple[Any, Any],
    colour: str,
    mark: str = "o",
    hollow: bool = False,
) -> None:
    """A mark in its row, or several, each with a line from end to end."""
    ax.hlines(y, *ends, color=colour, lw=1.3)
    ax.plot(x, y, mark, color=colour, mfc="none" if hollow else colour, ms=5)


def draw_arms(
    ax: Axes,
    rows: pd.DataFrame,
    arms: Sequence[str],
    value: str,
    places: Sequence[float],
) -> None:
    """Dots of several arms about one row each, with their intervals.

    Args:
        ax: where.
        rows: columns arm, low, high and the value.
        arms: from the top of a row.
        value: the column that is drawn.
        places: of the rows of the table, in the panel.
    """
    rows = rows.reset_index(drop=True)  # an index may name a row twice
    at = pd.Series(places, rows.index)
    for i, arm in enumerate(arms):
        own, look = rows[rows["arm"] == arm], ARM_STYLES[arm]
        y = at[own.index] + 0.7 * ((i + 0.5) / len(arms) - 0.5)
        ends = (own["low"], own["high"])
        draw_dot(ax, own[value], y, ends, look.colour, mark_of(arm))


def key(colour: str, mark: str = "o", hollow: bool = False) -> Line2D:
    """What a mark looks like, for a legend; ``-`` and ``:`` are lines."""
    line = mark in "-:"
    look: Any = {"ls": mark} if line else {"ls": "", "marker": mark, "ms": 5}
    return Line2D([], [], color=colour, mfc="none" if hollow else colour, **look)


def world_panels(
    worlds: Iterable[str], height: float, xlabel: str, sharex: bool = True
) -> tuple[Figure, list[Axes]]:
    """A panel a world, under its name, with one label for what all show across."""
    names = list(worlds)
    figure, axes = panel_row(len(names), height, sharex)
    for ax, name in zip(axes, names, strict=True):
        ax.set_title(name)
    figure.supxlabel(xlabel, fontsize=10, color=TEXT)
    return figure, axes


def legend_above(figure: Figure, keys: Mapping[str, Artist], ncols: int) -> None:
    """One legend over all panels: name to what it looks like."""
    place: Any = {"loc": "outside upper left", "ncols": ncols, "frameon": False}
    figure.legend(list(keys.values()), list(keys), **place)


def labelled(axes: Iterable[Axes]) -> dict[str, Artist]:
    """What has a label in any of the panels, once a label."""
    found = [ax.get_legend_handles_labels() for ax in axes]
    return {
        label: line
        for lines, labels in found
        for line, label in zip(lines, labels, strict=True)
    }


def mark_of(arm: str) -> str:
    """The marker that goes with an arm's dash."""
    return {"-": "o", "--": "D", ":": "v", "-.": "s"}[ARM_STYLES[arm].dash]


def arm_keys(arms: Iterable[str]) -> dict[str, Artist]:
    """For a legend: the arms' names and marks."""
    looks = {arm: ARM_STYLES[arm] for arm in arms}
    return {look.label: key(look.colour, mark_of(arm)) for arm, look in looks.items()}


def share_vertical(row: Sequence[Axes]) -> None:
    """One vertical range for panels that show one metric."""
    low = min(ax.get_ylim()[0] for ax in row)
    high = max(ax.get_ylim()[1] for ax in row)
    for ax in row:
        ax.set_ylim(low, high)


def place_labels(ax: Axes) -> None:
    """Write each line's name beside its end, with a leader where it had to move."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    height = ax.get_position().height * figure.get_figheight()
    gap = min(0.16 / height, 0.9)  # inches for a line of text, as a share of the axes
    ends = []
    for line in ax.get_lines():
        path = np.asarray(line.get_xydata())
        named = len(path) and not str(line.get_label()).startswith("_")
        if named and np.isfinite(path[-1]).all():
            ends.append((path[-1], path[0, 1], line))
    # Lines that end in one point are named in the order in which they come there.
    ends.sort(key=lambda end: (round(end[0][1], 6), end[1]))
    to_axes = ax.transData + ax.transAxes.inverted()
    places = [to_axes.transform(end) for end, _, _ in ends]
    heights = spread([y for _, y in places], gap)
    for (_, _, line), (x, y), at in zip(ends, places, heights, strict=True):
        look: Any = {"color": line.get_color(), "transform": ax.transAxes}
        key: Any = {**look, "clip_on": False, "label": "_key"}
        ax.plot([x, 1.03], [y, at], lw=0.6, **key)
        ax.plot([1.03, 1.1], [at, at], line.get_linestyle(), lw=1.2, **key)
        ax.text(1.12, at, str(line.get_label()), fontsize=SMALL, va="center", **look)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending heights as little as needed to be a gap apart, within 0 to 1.

    Neighbours that collide form a block, centred on the mean of its members. What
    does not fit between 0 and 1 sticks out at the top.

    >>> spread([0.2, 0.2, 0.99], 0.1)
    [0.15, 0.25, 0.99]
    >>> spread([1.0, 1.0], 0.1)
    [0.9, 1.0]
    """
    blocks: list[list[float]] = []
    for height in heights:
        blocks.append([height])
        while len(blocks) > 1 and (
            _bottom(blocks[-2], gap) + gap * len(blocks[-2]) > _bottom(blocks[-1], gap)
        ):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return [
        round(_bottom(block, gap) + gap * i, 6)
        for block in blocks
        for i in range(len(block))
    ]


def _bottom(block: Sequence[float], gap: float) -> float:
    """Where a block's lowest member comes to lie."""
    reach = gap * (len(block) - 1)
    return max(0.0, min(float(np.mean(block)) - reach / 2, 1.0 - reach))


# --- matrices by depth ---------------------------------------------------------


def depth_profiles(
    table: pd.DataFrame,
    arms: Sequence[str],
    metrics: Sequence[str],
    roles: Sequence[str] = LAYER_ROLES,
) -> Figure:
    """Every matrix of the final update by depth (Figure 2 of the paper).

    Args:
        table: tidy.
        arms: the rows.
        metrics: the columns, each with one logarithmic axis for all arms.
        roles: which matrices.

    Returns:
        The figure: a dot a matrix (mean over seeds), a line through the means of the
        layers, a band over seeds, the null dotted.

    Raises:
        ValueError: the table has none of the arms.
    """
    arms = present(table, arms)
    with styled():
        height, columns = 0.6 + 1.45 * len(arms), len(metrics)
        figure, axes = panels(len(arms), columns, height, sharex=True, sharey="col")
        for row, arm in zip(axes, arms, strict=True):
            for ax, metric in zip(row, metrics, strict=True):
                _draw_depth(ax, table, arm, metric, roles)
            row[0].set_ylabel(ARM_STYLES[arm].label, color=ARM_STYLES[arm].colour)
        for ax, metric in zip(axes[0], metrics, strict=True):
            ax.set_title(METRIC_LABELS[metric].replace(", ", "\n"))
        for ax in axes[-1]:
            ax.set_xlabel("layer")
        place_labels(axes[0][-1])
    return figure


def _draw_depth(
    ax: Axes, table: pd.DataFrame, arm: str, metric: str, roles: Sequence[str]
) -> None:
    """One arm's matrices in one metric, with the null of the same arm."""
    look = ARM_STYLES[arm]
    rows = final_matrices(table, metric, roles)
    rows = rows[rows["arm"] == arm]
    dots = rows.groupby(["layer", "role"], observed=True)["value"].mean().reset_index()
    ax.plot(dots["layer"], dots["value"], ".", color=look.colour, alpha=0.45, ms=5)
    layers = rows.groupby(["layer", "seed"])["value"].mean().groupby("layer")
    low, high = layers.min(), layers.max()
    ax.fill_between(low.index, low, high, color=look.colour, alpha=0.2, lw=0)
    ax.plot(layers.mean(), color=look.colour, label="mean of the layer")
    null = final_matrices(table, f"null_{metric}", roles)
    null = null[null["arm"] == arm].groupby("layer")["value"].mean()
    ax.plot(null, ":", color=GREY, label=NULL_LABEL)
    ax.set_yscale("log")
    if np.ptp(np.log10(ax.get_ylim())) < 1.5:  # else powers of ten do
        plain_log_ticks(ax.yaxis)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def final_matrices(
    table: pd.DataFrame, metric: str, roles: Sequence[str] = LAYER_ROLES
) -> pd.DataFrame:
    """A matrix metric at the end of training: a row a matrix, no undefined ones."""
    last = table.groupby(["arm", "seed"], observed=True)["step"].transform("max")
    chosen = (table["metric"] == metric) & (table["step"] == last)
    rows = table[chosen & table["role"].isin(roles)].dropna(subset="value")
    return rows.astype({"arm": object, "role": object})


# --- masks ---------------------------------------------------------------------

MASK_METRICS = ("density", "principal_overlap", "low_magnitude_overlap")


def _by_role_and_layer(
    table: pd.DataFrame, arm: str, metric: str, roles: Sequence[str]
) -> pd.DataFrame:
    """Means at the end of training, a row a layer and a column a role."""
    rows = final_matrices(table, metric, roles)
    rows = rows[rows["arm"] == arm]
    return rows.pivot_table(
        index="layer", columns="role", values="value", aggfunc="mean"
    ).reindex(columns=list(roles))


def role_maps(
    table: pd.DataFrame,
    arm: str,
    metrics: Sequence[str],
    roles: Sequence[str] = LAYER_ROLES,
) -> Figure:
    """Any metrics by role and layer, and below them their nulls.

    Args:
        table: tidy.
        arm: whose.
        metrics: the columns of the figure, each with a colour scale of its own that
            its null shares.
        roles: the columns of a map.

    Returns:
        The figure; a null that the table does not have leaves its place empty.

    Raises:
        ValueError: the table has not the arm.
    """
    present(table, [arm])
    names = set(table["metric"])
    prefixes = ["", *(["null_"] if names & {f"null_{m}" for m in metrics} else [])]
    with styled():
        each = max(1.5, 0.1 * table["layer"].nunique())  # a line needs a number's room
        height = 0.5 + each * len(prefixes)
        figure, axes = panels(len(prefixes), len(metrics), height)
        for column, metric in zip(axes.T, metrics, strict=True):
            maps = [
                _by_role_and_layer(table, arm, f"{prefix}{metric}", roles)
                for prefix in prefixes
            ]
            known = np.concatenate([values.to_numpy(float).ravel() for values in maps])
            low, high = np.nanmin(known, initial=np.inf), np.nanmax(known, initial=0.0)
            scale = 1000 if high < 0.05 else 1  # small numbers do not fit into a cell
            for ax, values in zip(column, maps, strict=True):
                _draw_values(ax, scale * values, scale * low, scale * high)
            title = METRIC_LABELS[metric] + ("" if scale == 1 else f" × {scale}")
            column[0].set_title(title.replace(", ", ",\n"))
        labels = [ARM_STYLES[arm].label, NULL_LABEL]
        for row, label in zip(axes, labels, strict=False):
            row[0].set_ylabel(f"{label}\nlayer")
    return figure


def _draw_values(ax: Axes, values: pd.DataFrame, low: float, high: float) -> None:
    """A square a value, the first row at the top; numbers if they fit, else a bar.

    Args:
        ax: where; it stays empty if there is no value.
        values: a row a line of the map; NaN leaves its square empty.
        low, high: values of the first and of the last colour.
    """
    import seaborn as sns  # takes a second, which pages without a map need not wait

    if values.isna().all(axis=None):
        ax.set_axis_off()
        return
    few = len(values) <= ANNOTATED_LAYERS and len(values.columns) <= len(LAYER_ROLES)
    few = few and max(len(f"{value:.2g}") for value in values.to_numpy().flat) <= 3
    numbers: Any = {"annot": few, "fmt": ".2g", "annot_kws": {"fontsize": SMALL}}
    seams = 0.5 if len(values) <= 4 * ANNOTATED_LAYERS else 0.0  # else they hide all
    colours: Any = {"cmap": "YlGnBu", "vmin": low, "vmax": high, "linewidths": seams}
    sns.heatmap(values, ax=ax, cbar=False, **numbers, **colours)
    ax.set(xlabel="", ylabel="")
    ax.tick_params(length=0, labelrotation=0)
    ax.tick_params(axis="x", labelrotation=90)  # roles are words, squares narrow
    if not few:
        figure = ax.get_figure(root=True)
        assert figure is not None
        figure.colorbar(ax.collections[0], ax=ax).outline.set_visible(False)


def mask_bars(table: pd.DataFrame, arms: Sequence[str]) -> Figure:
    """Densities and overlaps as bars (the bars of Figure 3).

    Args:
        table: tidy.
        arms: the bars, from top to bottom.

    Returns:
        The figure: means over matrices and seeds in per cent, whiskers over seeds, a
        tick at the Gaussian null of each arm. The bars of an overlap start at the
        mask's own share, which changes at random places would have.

    Raises:
        ValueError: the table has none of the arms.
    """
    arms = present(table, arms)
    with styled():
        figure, axes = panel_row(3, 0.9 + 0.42 * len(arms))
        for ax, metric in zip(axes, MASK_METRICS, strict=True):
            start = 100 * MASK_ALPHA if "overlap" in metric else 0
            draw_bars(ax, table, metric, arms, start)
            title = METRIC_LABELS[metric].replace(", ", ",\n")
            ax.set(title=title, xlabel="per cent ( ┃ Gaussian null )")
        axes[2].sharex(axes[1])
        name_rows(axes[0], [ARM_STYLES[arm].label for arm in arms])
    return figure


def draw_bars(
    ax: Axes, table: pd.DataFrame, metric: str, arms: Sequence[str], start: float = 0
) -> None:
    """A bar an arm in per cent from ``start``, whiskers over seeds, a tick at its null.

    Args:
        ax: where; the arms stand at 0, 1, ... of the vertical axis.
        table: tidy.
        metric: a share.
        arms: which, all of them in the table.
        start: where the bars begin, in per cent.
    """
    values, null = at_end(table, metric), at_end(table, f"null_{metric}")
    for place, arm in enumerate(arms):
        seeds = 100 * values[values["arm"] == arm]["value"]
        mean, at = seeds.mean(), 100 * null[null["arm"] == arm]["value"].mean()
        colour = ARM_STYLES[arm].colour
        ax.barh(place, mean - start, 0.62, start, color=colour, alpha=0.75, lw=0)
        ax.hlines(place, seeds.min(), seeds.max(), color=GREY, lw=1.2)
        ax.vlines(at, place - 0.42, place + 0.42, color=GREY, lw=2.4)
        right = mean >= start
        ends = (seeds.max(), seeds.min(), at) if np.isfinite(at) else (mean,)
        ax.annotate(
            f"{mean:.1f}",
            (max(ends) if right else min(ends), place),
            xytext=(5 if right else -5, 0),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            fontsize=SMALL,
        )
    ax.axvline(start, color=GREY, lw=1)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.margins(x=0.25)


# --- projected training --------------------------------------------------------


def projected_training(
    table: pd.DataFrame, families: Sequence[str] = ("opd", "sft")
) -> Figure:
    """Accuracy of projected against free runs (Figure 6 of the paper).

    Args:
        table: tidy.
        families: a panel each: the free arm, whose confined twins are named
            ``-projected`` and more.

    Returns:
        The figure; the null is the random subspace of the same rank, and a dotted
        line at the mean accuracy where the runs part.

    Raises:
        ValueError: the table has none of a panel's arms.
    """
    branch, moment = 0.2, "20 %"
    with styled():
        figure, axes = panel_row(len(families), 3.4)
        for ax, family in zip(axes, families, strict=True):
            twins = [arm for arm in ARM_STYLES if arm.startswith(f"{family}-projected")]
            values = over_matrices(table, "accuracy/chain")
            for arm in present(table, [family, *reversed(twins)]):
                draw_curve(ax, values[values["arm"] == arm], ARM_STYLES[arm])
            parting = values[np.isclose(values["frac"], branch)]
            level = parting[parting["arm"] == family]["value"].mean()
            ax.axvline(branch, color=GREY, lw=0.8, label="_branch")
            flat: Any = {"color": GREY, "label": f"as at {moment}"}
            ax.plot([branch, 1], [level, level], ":", **flat)
            title = f"{ARM_STYLES[family].label}, confined after {moment}"
            ax.set(xlim=(0, 1), title=title, xlabel="share of training")
        axes[0].set_ylabel(METRIC_LABELS["accuracy/chain"])
        for ax in axes:
            place_labels(ax)
    return figure

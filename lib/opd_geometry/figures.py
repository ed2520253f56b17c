"""Figures of the book: tidy tables in, matplotlib figures out, one style.

Every figure shows its null: what the same diagnostic says of a Gaussian update with
the same Frobenius norm per matrix, or of a random subspace. Lines are means over
seeds, bands reach from the smallest to the largest seed. Nothing is computed from
weights here, only averaged over matrices.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

ATTENTION_ROLES = ("q", "k", "v", "o")
LAYER_ROLES = (*ATTENTION_ROLES, "gate", "up", "down")
GREY = "#808080"  # reads on white and on black
NULL_LABEL = "Gaussian null"
SUBSPACE_NULL_LABEL = "random subspaces"
_COLOURS = sns.color_palette("colorblind").as_hex()
BLUE, ORANGE, GREEN, RED, PURPLE = _COLOURS[:5]
LIGHT_BLUE = _COLOURS[9]
_BLENDED = sns.blend_palette([BLUE, LIGHT_BLUE, GREEN], 7).as_hex()


class ArmStyle(NamedTuple):
    """How an arm is named and drawn, everywhere the same."""

    label: str
    colour: str
    dash: str = "-"


ARM_STYLES = {
    "sft": ArmStyle("SFT", ORANGE),
    "sft-matched": ArmStyle("SFT, matched", RED),
    "opd": ArmStyle("OPD", BLUE),
    "rlvr": ArmStyle("RLVR", GREEN),
    "tokens-top-50": ArmStyle("top-gap 50 %", LIGHT_BLUE),
    "tokens-top-25": ArmStyle("top-gap 25 %", PURPLE),
    "tokens-random-50": ArmStyle("random 50 %", LIGHT_BLUE, "--"),
    "tokens-random-25": ArmStyle("random 25 %", PURPLE, "--"),
    "off-policy": ArmStyle("teacher writes", PURPLE),
    "mix-0.75": ArmStyle("α = 0.75", _BLENDED[1]),
    "mix-0.50": ArmStyle("α = 0.5", _BLENDED[2]),
    "mix-0.25": ArmStyle("α = 0.25", _BLENDED[3]),
    "mix-0.05": ArmStyle("α = 0.05", _BLENDED[4]),
    "mix-0.01": ArmStyle("α = 0.01", _BLENDED[5]),
    "opd-projected": ArmStyle("own early subspace", PURPLE),
    "sft-projected": ArmStyle("own early subspace", PURPLE),
    "opd-projected-random": ArmStyle("random subspace", GREY, "--"),
    "sft-projected-random": ArmStyle("random subspace", GREY, "--"),
}
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
WEIGHTED_METRICS = ("sparsity", "null_sparsity")  # by parameters, as Table 1 is
LOG_METRICS = ("stable_rank", "stable_rank_bf16", "frobenius_norm", "relative_norm")
# Where the null of a mask overlap would lie if changes fell on random places.
MASK_ALPHA = 0.5


def style() -> dict[str, Any]:
    """Settings that read well on a light and on a dark page.

    Returns:
        rcParams: transparent background, grey text and axes, 144 dots per inch.
    """
    grey = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor")
    return {
        **sns.axes_style("ticks"),
        **dict.fromkeys((*grey, "xtick.color", "ytick.color"), GREY),
        "axes.facecolor": "none",
        "axes.prop_cycle": plt.cycler(color=_COLOURS),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 10,
        "figure.constrained_layout.use": True,
        "figure.dpi": 144,
        "figure.facecolor": "none",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9,
        "lines.linewidth": 1.8,
        "savefig.facecolor": "none",
    }


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
        value. Undefined values (NaN) are left out.
    """
    rows = table[table["metric"] == metric].dropna(subset="value")
    rows = rows[rows["role"].isin([*roles, "model"])]
    weights = np.ones(len(rows))
    if metric in WEIGHTED_METRICS:
        sizes = table[table["metric"] == "parameters"]
        size = sizes.drop_duplicates("matrix").set_index("matrix")["value"]
        weights = rows["matrix"].astype(object).map(size).to_numpy(float)
    weighted = rows.assign(weight=weights, value=rows["value"] * weights)
    runs = ["arm", "seed", "step"]
    sums = weighted.groupby(runs, observed=True)[["value", "weight"]].sum().reset_index()
    last = table.groupby(["arm", "seed"], observed=True)["step"].max()
    ends = [last[key] for key in zip(sums["arm"], sums["seed"], strict=True)]
    return pd.DataFrame(
        {
            **{name: sums[name] for name in runs},
            "frac": sums["step"] / np.array(ends, float),
            "value": sums["value"] / sums["weight"],
        }
    ).astype({"arm": object})


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


def _present(table: pd.DataFrame, arms: Iterable[str]) -> list[str]:
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
        The figure. Each line is named where it ends.

    Raises:
        ValueError: the table has none of a panel's arms.
    """
    n_rows, n_columns = len(grid), max(map(len, grid))
    height = 2.7 if n_rows > 1 else 3.1
    width = 5.2 if n_columns == 1 else 9.6
    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            n_rows, n_columns, figsize=(width, height * n_rows), squeeze=False
        )
        for row, panels in zip(axes, grid, strict=True):
            for ax, panel in zip(row, panels, strict=False):
                _draw_panel(ax, table, panel, roles)
            if len({panel.metric for panel in panels}) == 1:
                _share_vertical(row)
        for ax in axes.flat:
            _place_labels(ax)
        for ax in axes[-1]:
            ax.set_xlabel("share of training")
    plt.close(figure)
    return figure


def _draw_panel(
    ax: Axes, table: pd.DataFrame, panel: Panel, roles: Sequence[str]
) -> None:
    """The arms' curves of one metric and its null."""
    arms = _present(table, panel.arms)
    values = over_matrices(table, panel.metric, roles)
    for arm in arms:
        draw_curve(ax, values[values["arm"] == arm], ARM_STYLES[arm])
    null = over_matrices(table, f"null_{panel.metric}", roles)
    null = null[null["arm"].isin(arms)]
    if len(null):
        bound = panel.metric == "similarity_to_end"
        label = SUBSPACE_NULL_LABEL if bound else NULL_LABEL
        mean = null.assign(frac=null["frac"].round(3), seed=0)
        draw_curve(ax, mean, ArmStyle(label, GREY, ":"), band=False)
    elif panel.metric.endswith("norm"):
        note = "the null has the same norm by construction"
        ax.set_title(note, loc="right", fontsize=7)
    ax.set(xlim=(0, 1), title=panel.title, ylabel=METRIC_LABELS[panel.metric])
    if panel.metric in LOG_METRICS:
        ax.set_yscale("log")
        _plain_log_ticks(ax)


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


def _plain_log_ticks(ax: Axes) -> None:
    """Ticks such as 2, 5, 10 instead of powers of ten with unlabelled ones between."""
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _share_vertical(row: Sequence[Axes]) -> None:
    """One vertical range for panels that show one metric."""
    low = min(ax.get_ylim()[0] for ax in row)
    high = max(ax.get_ylim()[1] for ax in row)
    for ax in row:
        ax.set_ylim(low, high)


def _place_labels(ax: Axes, gap: float = 0.085) -> None:
    """Write each line's name beside its end, moved apart where they would overlap."""
    to_axes = ax.transData + ax.transAxes.inverted()
    ends = []
    for line in ax.get_lines():
        x, y = line.get_xdata()[-1], line.get_ydata()[-1]
        if not str(line.get_label()).startswith("_") and np.isfinite(y):
            ends.append((float(to_axes.transform((x, y))[1]), line))
    ends.sort(key=lambda end: end[0])
    heights = spread([height for height, _ in ends], gap)
    for height, (_, line) in zip(heights, ends, strict=True):
        ax.text(
            1.03,
            height,
            str(line.get_label()),
            color=line.get_color(),
            fontsize=8,
            transform=ax.transAxes,
            va="center",
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move sorted heights as little as needed to be at least a gap apart.

    Neighbours that collide form a block, centred on the mean of its members.

    >>> spread([0.2, 0.2, 0.9], 0.1)
    [0.15, 0.25, 0.9]
    """
    blocks: list[list[float]] = []
    for height in heights:
        blocks.append([height])
        while len(blocks) > 1 and _top(blocks[-2], gap) + gap > _bottom(blocks[-1], gap):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return [
        round(_bottom(block, gap) + gap * i, 6)
        for block in blocks
        for i in range(len(block))
    ]


def _bottom(block: Sequence[float], gap: float) -> float:
    return float(np.mean(block)) - gap * (len(block) - 1) / 2


def _top(block: Sequence[float], gap: float) -> float:
    return float(np.mean(block)) + gap * (len(block) - 1) / 2


# --- matrices by depth ---------------------------------------------------------


def depth_profiles(
    table: pd.DataFrame, arms: Sequence[str], metrics: Sequence[str]
) -> Figure:
    """Every matrix of the final update by depth (Figure 2 of the paper).

    Args:
        table: tidy.
        arms: the rows.
        metrics: the columns, each with one logarithmic axis for all arms.

    Returns:
        The figure: a dot a matrix (mean over seeds), a line through the means of the
        layers, a band over seeds, the null dotted.

    Raises:
        ValueError: the table has none of the arms.
    """
    arms = _present(table, arms)
    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            len(arms),
            len(metrics),
            figsize=(9.6, 0.6 + 1.45 * len(arms)),
            sharex=True,
            sharey="col",
            squeeze=False,
        )
        for row, arm in zip(axes, arms, strict=True):
            for ax, metric in zip(row, metrics, strict=True):
                _draw_depth(ax, table, arm, metric)
            row[0].set_ylabel(ARM_STYLES[arm].label, color=ARM_STYLES[arm].colour)
        for ax, metric in zip(axes[0], metrics, strict=True):
            ax.set_title(METRIC_LABELS[metric])
        for ax in axes[-1]:
            ax.set_xlabel("layer")
        _place_labels(axes[0][-1], gap=0.16)
    plt.close(figure)
    return figure


def _draw_depth(ax: Axes, table: pd.DataFrame, arm: str, metric: str) -> None:
    """One arm's matrices in one metric, with the null of the same arm."""
    look = ARM_STYLES[arm]
    rows = final_matrices(table, metric)
    rows = rows[rows["arm"] == arm]
    dots = rows.groupby(["layer", "role"], observed=True)["value"].mean().reset_index()
    ax.plot(dots["layer"], dots["value"], ".", color=look.colour, alpha=0.45, ms=5)
    layers = rows.groupby(["layer", "seed"])["value"].mean().groupby("layer")
    low, high = layers.min(), layers.max()
    ax.fill_between(low.index, low, high, color=look.colour, alpha=0.2, lw=0)
    ax.plot(layers.mean(), color=look.colour, label="mean of the layer")
    null = final_matrices(table, f"null_{metric}")
    null = null[null["arm"] == arm].groupby("layer")["value"].mean()
    ax.plot(null, ":", color=GREY, label=NULL_LABEL)
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def final_matrices(
    table: pd.DataFrame, metric: str, roles: Sequence[str] = LAYER_ROLES
) -> pd.DataFrame:
    """A matrix metric at the end of training, a row a matrix, without undefined ones."""
    last = table.groupby(["arm", "seed"], observed=True)["step"].transform("max")
    chosen = (table["metric"] == metric) & (table["step"] == last)
    rows = table[chosen & table["role"].isin(roles)].dropna(subset="value")
    return rows.astype({"arm": object, "role": object})


# --- masks ---------------------------------------------------------------------

MASK_METRICS = ("density", "principal_overlap", "low_magnitude_overlap")


def mask_maps(table: pd.DataFrame, arms: Sequence[str], null_of: str = "opd") -> Figure:
    """Where visible changes lie, by role and layer (the maps of Figure 3).

    Args:
        table: tidy.
        arms: the rows; a last row shows the null.
        null_of: whose null is shown.

    Returns:
        The figure: columns density, overlap with the principal and with the
        low-magnitude mask, in per cent, means over seeds; the overlaps' colours are
        neutral at the mask's own share.

    Raises:
        ValueError: the table has none of the arms.
    """
    arms = _present(table, arms)
    null_of = null_of if null_of in arms else arms[0]
    rows = [(arm, "", ARM_STYLES[arm].label) for arm in arms]
    rows.append((null_of, "null_", f"{NULL_LABEL}\nof {ARM_STYLES[null_of].label}"))
    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            len(rows), 3, figsize=(9.6, 1.5 * len(rows)), sharex=True, sharey=True
        )
        for row, (arm, prefix, label) in zip(axes, rows, strict=True):
            for ax, metric in zip(row, MASK_METRICS, strict=True):
                _draw_map(ax, table, arm, f"{prefix}{metric}")
            colour = GREY if prefix else ARM_STYLES[arm].colour
            row[0].set_ylabel(f"{label}\nlayer", color=colour)
        for ax, metric in zip(axes[0], MASK_METRICS, strict=True):
            ax.set_title(f"{METRIC_LABELS[metric]} (%)")
        for ax in axes[-1]:
            ax.set_xlabel("role of the matrix")
    plt.close(figure)
    return figure


def _draw_map(ax: Axes, table: pd.DataFrame, arm: str, metric: str) -> None:
    """Role by layer, per cent, for one arm and metric."""
    rows = final_matrices(table, metric)
    rows = rows[rows["arm"] == arm]
    share = 100 * rows.pivot_table(
        index="layer", columns="role", values="value", aggfunc="mean"
    ).reindex(columns=LAYER_ROLES)
    overlap = "overlap" in metric
    sns.heatmap(
        share,
        ax=ax,
        annot=True,
        fmt=".0f",
        annot_kws={"fontsize": 7},
        cbar=False,
        cmap="vlag" if overlap else "crest",
        vmin=30 if overlap else 0,
        vmax=70 if overlap else 100,
        linewidths=0.5,
    )
    ax.set(xlabel="", ylabel="")
    ax.tick_params(length=0, labelrotation=0)


def mask_bars(table: pd.DataFrame, arms: Sequence[str]) -> Figure:
    """Densities and overlaps as bars (the bars of Figure 3).

    Args:
        table: tidy.
        arms: the bars, from top to bottom.

    Returns:
        The figure: means over matrices and seeds in per cent, whiskers over seeds, a
        tick at the Gaussian null of each arm, a dotted line at the mask's own share.

    Raises:
        ValueError: the table has none of the arms.
    """
    arms = _present(table, arms)
    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            1, 3, figsize=(9.6, 0.9 + 0.42 * len(arms)), sharey=True
        )
        for ax, metric in zip(axes, MASK_METRICS, strict=True):
            draw_bars(ax, table, metric, arms)
            ax.set(title=METRIC_LABELS[metric], xlabel="per cent")
            if "overlap" in metric:
                ax.axvline(100 * MASK_ALPHA, color=GREY, lw=1, ls=":")
        axes[0].set_yticks(range(len(arms)), [ARM_STYLES[arm].label for arm in arms])
        axes[0].invert_yaxis()
        axes[0].text(
            0,
            -0.85,
            f"┃ {NULL_LABEL} of the same norm",
            color=GREY,
            fontsize=8,
        )
    plt.close(figure)
    return figure


def draw_bars(ax: Axes, table: pd.DataFrame, metric: str, arms: Sequence[str]) -> None:
    """A bar an arm in per cent, whiskers over seeds, a tick at its null."""
    values, null = at_end(table, metric), at_end(table, f"null_{metric}")
    for place, arm in enumerate(arms):
        look = ARM_STYLES[arm]
        seeds = 100 * values[values["arm"] == arm]["value"]
        ax.barh(place, seeds.mean(), height=0.62, color=look.colour, alpha=0.75)
        ax.hlines(place, seeds.min(), seeds.max(), color=GREY, lw=1.2)
        at = 100 * null[null["arm"] == arm]["value"].mean()
        ax.vlines(at, place - 0.42, place + 0.42, color=GREY, lw=2.4)
        ax.text(
            max(seeds.max(), at) + 2, place, f"{seeds.mean():.1f}", va="center", size=8
        )
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(0, 112)


# --- projected training --------------------------------------------------------


def projected_training(
    table: pd.DataFrame,
    families: Sequence[str] = ("opd", "sft"),
    branch_frac: float = 0.2,
    metric: str = "accuracy/chain",
) -> Figure:
    """Accuracy of projected against free runs (Figure 6 of the paper).

    Args:
        table: tidy.
        families: a panel each: the free arm, whose projected twins are named
            ``-projected`` and ``-projected-random``.
        branch_frac: share of training after which the projection holds.
        metric: a model metric.

    Returns:
        The figure; the null is the random subspace of the same rank, and a dotted
        line at the mean accuracy where the runs part.

    Raises:
        ValueError: the table has none of a panel's arms.
    """
    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            1, len(families), figsize=(9.6, 3.4), sharey=True, squeeze=False
        )
        for ax, family in zip(axes[0], families, strict=True):
            names = (family, f"{family}-projected-random", f"{family}-projected")
            values = over_matrices(table, metric)
            for arm in _present(table, names):
                draw_curve(ax, values[values["arm"] == arm], ARM_STYLES[arm])
            _mark_branch(ax, values[values["arm"] == family], branch_frac)
            title = f"{ARM_STYLES[family].label} confined after {branch_frac:.0%}"
            ax.set(xlim=(0, 1), title=title, xlabel="share of training")
        axes[0][0].set_ylabel(METRIC_LABELS.get(metric, metric))
        for ax in axes[0]:
            _place_labels(ax, gap=0.07)
    plt.close(figure)
    return figure


def _mark_branch(ax: Axes, free: pd.DataFrame, branch_frac: float) -> None:
    """Where the projected runs leave the free one, and the accuracy there."""
    ax.axvline(branch_frac, color=GREY, lw=0.8)
    parting = free[np.isclose(free["frac"], branch_frac)]["value"]
    if len(parting):
        level = [parting.mean()] * 2
        ax.plot([branch_frac, 1], level, ":", color=GREY, label="where they part")

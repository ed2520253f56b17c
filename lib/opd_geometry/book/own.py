"""A reader's own runs beside the published ones: do they lie within their seeds?"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from opd_geometry.book.board import arm_name
from opd_geometry.book.figures import (
    BLUE,
    GREY,
    METRIC_LABELS,
    at_end,
    draw_dot,
    name_rows,
    panels,
    present,
    styled,
)

METRICS = (
    "accuracy/chain",
    "frobenius_norm",
    "sparsity",
    "angle_left_mean_deg",
    "nss",
    "low_magnitude_overlap",
    "stable_rank",
    "hill_alpha",
)
WITHIN, OUTSIDE = "within", "outside"
PICTURE = "yours.png"  # beside the page
PANELS = 4  # in a row of the picture
FARTHEST = 1.5  # widths of a range that the picture shows to either side of it


def against_published(
    own: pd.DataFrame,
    published: pd.DataFrame,
    arms: Sequence[str],
    metrics: Sequence[str] = METRICS,
) -> pd.DataFrame:
    """Every own run at its end beside the seeds of the published book.

    Args:
        own, published: tidy, of ``measure.load``.
        arms: which; those that one side lacks are left out.
        metrics: averaged over matrices as in the chapters.

    Returns:
        One row an own run and metric: arm, seed, diagnostic, yours, lowest, highest (of
        the other published seeds), n (of them), lies (``within`` or ``outside`` their
        range, which a further seed of n leaves with a chance of 2 in n + 1).

    Raises:
        ValueError: the own table has none of the arms.
    """
    rows = []
    for metric in metrics:
        mine, theirs = at_end(own, metric), at_end(published, metric)
        for arm in present(own, arms):
            of_arm = theirs[theirs["arm"] == arm]
            for run in mine[mine["arm"] == arm].itertuples():
                band = of_arm[of_arm["seed"] != run.seed]["value"]
                if not len(band):
                    continue
                low, high = band.min(), band.max()
                lies = WITHIN if low <= run.value <= high else OUTSIDE
                what = (arm_name(arm), run.seed, METRIC_LABELS[metric])
                rows.append((*what, run.value, low, high, len(band), lies))
    columns = ["arm", "seed", "diagnostic", "yours", "lowest", "highest", "n", "lies"]
    return pd.DataFrame(rows, columns=columns)


def bands(compared: pd.DataFrame) -> Figure:
    """A reader's runs on the published ranges, all drawn to one width.

    Args:
        compared: of ``against_published``.

    Returns:
        The figure: a panel an arm, a row a diagnostic, a dot a run; hollow, and at the
        edge where it lies farther than ``FARTHEST`` ranges off, if it lies outside.
    """
    names = list(dict.fromkeys(compared["diagnostic"]))
    arms = list(dict.fromkeys(compared["arm"]))
    n_rows = -(-len(arms) // PANELS)
    height = n_rows * (0.7 + 0.24 * len(names))
    with styled():
        figure, axes = panels(n_rows, min(PANELS, len(arms)), height)
        for ax in axes.flat[len(arms) :]:
            ax.set_axis_off()
        for ax, arm in zip(axes.flat, arms, strict=False):
            ax.axvspan(0, 1, color=GREY, alpha=0.2, lw=0)
            for row in compared[compared["arm"] == arm].to_dict("records"):
                outside, y = row["lies"] == OUTSIDE, names.index(row["diagnostic"])
                place = _place(row)
                draw_dot(ax, place, y, (place, place), BLUE, hollow=outside)
            name_rows(ax, names if ax in axes[:, 0] else [""] * len(names))
            edges = (-FARTHEST - 0.2, 1.2 + FARTHEST)
            ax.set(xlim=edges, xticks=(), title=arm.replace(" (", "\n("))
            ax.tick_params(axis="y", length=0)
        figure.supxlabel("grey: lowest to highest of the published seeds", fontsize=9)
    return figure


def _place(row: Mapping[Hashable, Any]) -> float:
    """Where yours lies if the published ones reach from 0 to 1."""
    width, beyond = row["highest"] - row["lowest"], row["yours"] - row["lowest"]
    if not width:  # one published value: there, or as far as is drawn
        place = 0.5 + math.copysign(math.inf, beyond) if beyond else 0.5
    else:
        place = beyond / width
    return min(max(place, -FARTHEST), 1 + FARTHEST)


def page(compared: pd.DataFrame) -> str:
    """The page of a reader's own book, as Markdown.

    Args:
        compared: of ``against_published``.
    """
    within = int((compared["lies"] == WITHIN).sum())
    lines = [
        "# Your seed against the published ones",
        "",
        f"**{within} of {len(compared)} numbers of your runs lie within the range of "
        "the published seeds.** The published run of your own seed is left out. A "
        "further seed of the same world leaves the range of n seeds with a chance of 2 "
        "in n + 1, so some outside are expected, and the numbers of one run are not "
        "independent of each other. One seed has no interval, so the board gives it no "
        "verdict. Sentences about *the published runs* describe the published book.",
        "",
        f"```{{figure}} {PICTURE}",
        ":alt: A panel an arm, a row a diagnostic, a dot a run of yours, on a grey "
        "band from the lowest to the highest of the published seeds. Hollow dots lie "
        "outside the band, at the edge of a panel farther out than is drawn.",
        "",
        f"**{within} of {len(compared)} lie on the band of the published seeds.** "
        "Every band is drawn to one width; n of each is in the table.",
        "```",
        "",
        "| arm | seed | diagnostic | yours | published seeds | n | yours lies |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in compared.sort_values(["arm", "seed"], kind="stable").to_dict("records"):
        yours, low, high = (f"{row[x]:.3g}" for x in ("yours", "lowest", "highest"))
        mark = "✓ within" if row["lies"] == WITHIN else "✗ outside"
        lines.append(
            f"| {row['arm']} | {row['seed']} | {row['diagnostic']} | {yours} "
            f"| {low} to {high} | {row['n']} | {mark} |"
        )
    return "\n".join(lines) + "\n"

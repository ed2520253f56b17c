"""A reader's own runs beside the published ones: do they lie within their seeds?"""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from opd_geometry.book.figures import (
    ARM_STYLES,
    GREY,
    METRIC_LABELS,
    WIDTH,
    arm_keys,
    at_end,
    draw_dot,
    legend_above,
    mark_of,
    name_rows,
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
    rows: list[dict[str, Any]] = []
    for metric in metrics:
        mine, theirs = at_end(own, metric), at_end(published, metric)
        for arm in present(own, arms):
            of_arm = theirs[theirs["arm"] == arm]
            for run in mine[mine["arm"] == arm].itertuples():
                band = of_arm[of_arm["seed"] != run.seed]["value"]
                if not len(band):
                    continue
                low, high = band.min(), band.max()
                inside = low <= run.value <= high
                rows.append(
                    {
                        "arm": ARM_STYLES[arm].label,
                        "seed": run.seed,
                        "diagnostic": METRIC_LABELS[metric],
                        "yours": run.value,
                        "lowest": low,
                        "highest": high,
                        "n": len(band),
                        "lies": WITHIN if inside else OUTSIDE,
                    }
                )
    return pd.DataFrame(rows)


def bands(compared: pd.DataFrame) -> Figure:
    """A reader's runs on the published ranges, all drawn to one width.

    Args:
        compared: of ``against_published``.

    Returns:
        The figure: a row a diagnostic, a dot a run; hollow, and at the edge where it
        lies farther than ``FARTHEST`` ranges off, if it lies outside.
    """
    of_label = {look.label: arm for arm, look in ARM_STYLES.items()}
    names = list(dict.fromkeys(compared["diagnostic"]))
    with styled():
        figure, ax = plt.subplots(figsize=(WIDTH, 1.2 + 0.34 * len(names)))
        ax.axvspan(0, 1, color=GREY, alpha=0.2, lw=0)
        arms = [of_label[label] for label in dict.fromkeys(compared["arm"])]
        for row in compared.to_dict("records"):
            arm = of_label[row["arm"]]
            width = max(row["highest"] - row["lowest"], 1e-12 * abs(row["highest"]))
            x = (row["yours"] - row["lowest"]) / (width or 1.0)
            x = min(max(x, -FARTHEST), 1 + FARTHEST)
            y = names.index(row["diagnostic"]) + 0.6 * (
                (arms.index(arm) + 0.5) / len(arms) - 0.5
            )
            hollow = row["lies"] == OUTSIDE
            draw_dot(ax, x, y, (x, x), ARM_STYLES[arm].colour, mark_of(arm), hollow)
        name_rows(ax, names)
        edges = (-FARTHEST - 0.1, 1.1 + FARTHEST)
        ax.set(xlim=edges, xticks=(0, 1), xticklabels=("lowest", "highest"))
        ax.set_xlabel("published seeds (hollow: yours lies outside their range)")
        legend_above(figure, arm_keys(arms), 4)
    return figure


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
        ":alt: A row a diagnostic, a dot a run of yours, on a grey band that reaches "
        "from the lowest to the highest of the published seeds. Hollow dots lie "
        "outside the band.",
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

"""A reader's own runs beside the published ones: do they lie within their seeds?"""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from opd_geometry.book.figures import ARM_STYLES, METRIC_LABELS, at_end, present

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

"""Which subspaces suffice: confined runs against free and stopped ones."""

import pandas as pd

from opd_geometry.analysis.evidence import (
    ACCURACY_MARGIN,
    ALL_ACCURACIES,
    CHAIN,
    accuracy,
    arms_matching,
)
from opd_geometry.analysis.verdicts import Part, Values, defined, interval, state
from opd_geometry.experiments.runs import BRANCH_FRAC

WORDS = {"holds": "suffices", "fails": "falls short", "open": "open"}
MEASURES = {"trained task": CHAIN, "all benchmarks": ALL_ACCURACIES}
STOPPED = "stopped"  # the free run where the others are confined


def differences(table: pd.DataFrame, family: str, measure: str) -> dict[str, Values]:
    """Accuracy lost or gained against the free run, paired by seed.

    Args:
        table: tidy, with the free arm and confined twins of it.
        family: the free arm; its twins are named ``FAMILY-projected...``.
        measure: a key of ``MEASURES``: which benchmarks are averaged.

    Returns:
        Arm to one number a seed: its accuracy at the end minus the free run's; and
        ``STOPPED``, the free run where the confinement begins minus its end.
    """
    metrics = MEASURES[measure]
    free = accuracy(table, family, metrics)
    twins = arms_matching(table, [f"{family}-projected*"])
    scores = {arm: accuracy(table, arm, metrics) for arm in twins}
    scores[STOPPED] = accuracy(table, family, metrics, BRANCH_FRAC)
    return {arm: score - free for arm, score in scores.items()}


def sufficiency(table: pd.DataFrame, family: str, measure: str) -> pd.DataFrame:
    """Whether each confinement leaves what the free run learned.

    A confinement *suffices* when the 95 % interval of its difference from the free run
    lies above -``ACCURACY_MARGIN``, *falls short* when it lies below, and is *open*
    otherwise: the rule of the claim ``sufficient-opd``.

    Args:
        table, family, measure: as in ``differences``.

    Returns:
        One row an arm and one for ``STOPPED``: arm, confined (what follows
        ``FAMILY-projected`` in its name), n_seeds, difference, low, high, outcome, and
        kept, the share of what the free run gains after the branch (1: all of it, 0: as
        if stopped; NaN where it gains less than the margin).

    Source: arXiv:2606.07082, Figures 6 and 8 (the rank-K projection; the other
    subspaces are ours).
    """
    found = differences(table, family, measure)
    gain = -interval(found[STOPPED])[0]
    rows = []
    for arm, values in found.items():
        mean, low, high = interval(values)
        outcome = WORDS[state(Part(arm, values, -ACCURACY_MARGIN))]
        kept = 1 + mean / gain if gain > ACCURACY_MARGIN else float("nan")
        confined = arm.removeprefix(f"{family}-projected")
        numbers = (len(defined(values)), mean, low, high)
        rows.append((arm, confined, *numbers, outcome, kept))
    columns = ["arm", "confined", "n_seeds", "difference", "low", "high"]
    columns += ["outcome", "kept"]
    return pd.DataFrame(rows, columns=columns)

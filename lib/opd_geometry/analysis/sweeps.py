"""What a setting changes: orders that turn, numbers that stay or approach others."""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from opd_geometry.analysis.evidence import (
    COMPARABLE_FACTOR,
    LAYERS,
    distance,
    last,
    over_matrices,
)
from opd_geometry.analysis.matching import AT_END, order, ratio
from opd_geometry.analysis.verdicts import Values, defined, equivalence, interval, state

WEIGHTED = ("sparsity",)  # by the matrices' sizes, as the paper's Table 1


def order_grid(
    table: pd.DataFrame, arm: str, other: str, metric: str, places: Mapping[str, str]
) -> pd.DataFrame:
    """The order of two arms for every pair of their settings, such as learning rates.

    Args:
        table: tidy.
        arm, other: two arms, without suffix.
        metric: of positive values, at the end of training.
        places: suffix of an arm (empty for the arm itself) to its name in the table.

    Returns:
        A row a setting of the arm, a column a setting of the other; ``>`` where the
        other one has more, ``<`` where it has less, ``?`` where the 95 % interval over
        seeds covers equality, ``–`` where a run is missing.
    """
    there = set(table["arm"])

    def cell(one: str, two: str) -> str:
        if {arm + one, other + two} - there:
            return "–"
        return order(ratio(table, arm + one, other + two, metric, AT_END))

    rows = {name: [cell(s, t) for t in places] for s, name in places.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(places.values()))


def comparable(table: pd.DataFrame, arm: str, other: str, metric: str) -> bool:
    """Whether two arms end within ``COMPARABLE_FACTOR`` of one another in a metric.

    By the 95 % interval over seeds of the logarithm of their ratio, paired by seed.
    """
    values = ratio(table, arm, other, metric, AT_END)
    return state(equivalence(metric, values, math.log(COMPARABLE_FACTOR))) == "holds"


def distance_to(table: pd.DataFrame, arm: str, metric: str, printed: float) -> Values:
    """How far an arm's final value lies from a printed one, as a logarithm.

    |ln(ours / printed)|, one number a seed
    """
    ends = last(over_matrices(table, arm, metric, LAYERS, metric in WEIGHTED))
    return np.log(ends / printed).abs()


def approach(
    table: pd.DataFrame, arm: str, suffix: str, printed: Mapping[str, float]
) -> pd.DataFrame:
    """Whether a setting brings an arm nearer to what the paper prints.

    Args:
        table: tidy.
        arm: without suffix.
        suffix: of the arm with the setting changed, such as ``-width-x2``.
        printed: metric to the paper's number, in the unit of the table.

    Returns:
        One row a metric: metric, printed, ours, changed (means over seeds), nearer (the
        factor by which the distance to the printed number shrinks, above 1 is nearer),
        low, high (95 % interval, paired by seed), and trend: *nearer*, *farther* or
        *undecided*. No rows where an arm is missing.
    """
    changed = arm + suffix
    rows = []
    for metric, number in printed.items():
        if {arm, changed} - set(table["arm"]):
            continue
        before, after = (distance_to(table, a, metric, number) for a in (arm, changed))
        gained = before - after
        trend = {">": "nearer", "<": "farther", "?": "undecided"}[order(gained)]
        ours, theirs = (
            last(over_matrices(table, a, metric, LAYERS, metric in WEIGHTED)).mean()
            for a in (arm, changed)
        )
        rows.append((metric, number, ours, theirs, *np.exp(interval(gained)), trend))
    columns = ["metric", "printed", "ours", "changed", "nearer", "low", "high", "trend"]
    return pd.DataFrame(rows, columns=columns)


def courses_apart(
    table: pd.DataFrame, arms: Iterable[str], reference: str
) -> pd.DataFrame:
    """How far each arm's stable rank leaves another's over training, as a factor.

    exp(mean over checkpoints of |ln(stable rank of arm / stable rank of reference)|)

    Args:
        table: tidy.
        arms: which; those without rows are left out.
        reference: the other arm.

    Returns:
        One row an arm: arm, factor, low, high (95 % interval over seeds), n_seeds.
    """
    there, rows = set(table["arm"]), []
    for arm in arms:
        if {arm, reference} <= there:
            gaps = distance(table, arm, reference)
            rows.append((arm, *np.exp(interval(gaps)), len(defined(gaps))))
    return pd.DataFrame(rows, columns=["arm", "factor", "low", "high", "n_seeds"])

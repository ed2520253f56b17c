"""Regimes: was a claim tested in the paper's, and what does a setting change?

An arm's displacement is its root mean square change over sqrt(sum lr^2): about 1 for
Adam on noise, more for gradients that agree. The paper prints densities, and a density
is a distance; so the displacements of its arms can be read, and what matters between
two arms, their ratio, hangs on the weights only a little.

RULE, fixed when the displacements of all arms were known and before it was applied to
any claim: a claim that compares two of SFT, OPD and RLVR is tested in the paper's
regime where the ratio of their displacements, averaged over seeds as a logarithm, is
no farther from the paper's than half of the paper's own distance from one.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from opd_geometry.analysis.claims import claims_table, judge, levels_to_judge
from opd_geometry.analysis.distance import AT_END, displacement_rows, order, ratio
from opd_geometry.analysis.evidence import (
    COMPARABLE_FACTOR,
    LAYERS,
    Levels,
    distance,
    last,
    levels_of,
    over_matrices,
    with_every_null,
)
from opd_geometry.analysis.statements import ARMS, CLAIMS, Claim, claim_of
from opd_geometry.analysis.unplaced.rates import committed_decay, paper_displacements
from opd_geometry.analysis.verdicts import Values, defined, equivalence, interval, state

NOT_TESTED = "regime not tested"
# The pairs whose order the paper reads as the objectives'.
PAIRS = (("opd", "rlvr"), ("sft", "opd"))
WRONG_REWARDS = "rlvr-flip-45"  # in RLVR's place: nearer to the paper's ratio
ASKED = (*ARMS, WRONG_REWARDS)  # arms that the table below may read
WORLDS = ("published", "pretrained")
# What the paper orders by objective, at the end of training.
ORDERS = (
    "sparsity-order",
    "rotation-order",
    "drift-order",
    "density-order",
    "principal-depleted",
    "lowmag-enriched",
)


class Regime(NamedTuple):
    """A pair's ratio of displacements, here and in the paper."""

    arm: str
    other: str
    here: float
    paper: float
    n_seeds: int

    @property
    def reached(self) -> bool:
        """By the rule above; False where nothing was measured.

        >>> [Regime("opd", "rlvr", here, 3.5, 5).reached for here in (2.0, 1.8)]
        [True, False]
        """
        if math.isnan(self.here):
            return False
        away = abs(math.log(self.here / self.paper))
        return away <= abs(math.log(self.paper)) / 2

    def __str__(self) -> str:
        reached = "reached" if self.reached else "not reached"
        return (
            f"{self.arm} over {self.other} {self.here:.2f} (n = {self.n_seeds}), "
            f"the paper {self.paper:.2f}: {reached}"
        )


def paper_ratios() -> dict[tuple[str, str], float]:
    """Ratio of the displacements that the paper's densities stand for, a pair."""
    # the size leaves a ratio as it is
    theirs = paper_displacements(committed_decay(), size=1.0)
    return {(a, b): float(theirs[a] / theirs[b]) for a, b in PAIRS}


def regimes(
    claim: Claim, levels: Levels, paper: Mapping[tuple[str, str], float]
) -> list[Regime]:
    """The regime of every pair of arms that a claim compares.

    Args:
        claim: one of ``CLAIMS``.
        levels: of a tidy table with the metric ``displacement``.
        paper: of ``paper_ratios``.

    Returns:
        Empty for a claim about one arm; NaN where displacements were not measured.
    """
    pairs = [pair for pair in PAIRS if set(pair) <= set(claim.arms)]
    found = [(pair, _ratios(levels, *pair)) for pair in pairs]
    return [
        Regime(*pair, float(np.exp(np.log(x).mean())), paper[pair], len(x))
        for pair, x in found
    ]


def _ratios(levels: Levels, arm: str, other: str) -> pd.Series:
    """Of two arms' displacements at the end, a number a shared seed."""
    paths = [over_matrices(levels, x, "displacement", LAYERS) for x in (arm, other)]
    ends = [last(path) for path in paths if len(path)]
    return (ends[0] / ends[1]).dropna() if len(ends) == 2 else pd.Series(dtype=float)


def claims_in_worlds(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Every claim in every world: ``claims.claims_table``, and its regime there.

    Args:
        tables: profile to its tidy table, the book's main world first.

    Returns:
        The rows of ``claims_table`` with, after the id, world (the profile), and at the
        end regime (a text, empty for a claim about one arm), verdict_in_regime (the
        verdict, or ``NOT_TESTED`` where a pair did not reach the paper's), and
        verdict_with_wrong_rewards with regime_with_wrong_rewards (the same with
        ``WRONG_REWARDS`` in RLVR's place; empty for a claim that does not name RLVR).

    Raises:
        ValueError: as ``claims_table``.
    """
    paper, parts = paper_ratios(), []
    for profile, table in tables.items():
        judged = levels_to_judge(table, profile)
        findings = claims_table(judged, profile)
        # a displacement needs no null, so all matrices count; verdicts need them
        levels = Levels(displacement_rows(table))
        noisy, judged = (x.with_arm("rlvr", WRONG_REWARDS) for x in (levels, judged))
        rows = [
            _in_regime(claim, verdict, levels, (noisy, judged), paper)
            for claim, verdict in zip(CLAIMS, findings["verdict"], strict=True)
        ]
        findings.insert(1, "world", profile)
        parts.append(findings.join(pd.DataFrame(rows)))
    return pd.concat(parts, ignore_index=True)


def orders_by_rewards(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The claims that order the arms, with true rewards and with wrong ones.

    Args:
        tables: name of a world to its tidy table, with ``WRONG_REWARDS``.

    Returns:
        Index: the claims of ``ORDERS``; columns world and rewards (*true*, *wrong*):
        the verdict from the matrices that have every null, and n, the seeds behind it.
    """
    found = {}
    for world, table in tables.items():
        true = Levels(with_every_null(table))
        for rewards, levels in (
            ("true", true),
            ("wrong", true.with_arm("rlvr", WRONG_REWARDS)),
        ):
            judged = [judge(claim_of(name), levels) for name in ORDERS]
            told = [f"{finding.verdict}, n = {finding.n_seeds}" for finding in judged]
            found[world, rewards] = told
    return pd.DataFrame(found, index=pd.Index(ORDERS, name="claim"))


def _in_regime(
    claim: Claim,
    verdict: str,
    levels: Levels,
    wrong: tuple[Levels, Levels],
    paper: Mapping[tuple[str, str], float],
) -> dict[str, str]:
    """A row's columns; ``wrong``: wrong rewards, all matrices and those with nulls."""
    pairs = regimes(claim, levels, paper)
    inside = verdict == "not measured" or all(pair.reached for pair in pairs)
    names = "rlvr" in claim.arms
    noisy, judged = wrong
    changed = [p for p in regimes(claim, noisy, paper) if p.other == "rlvr"]
    return {
        "regime": "; ".join(map(str, pairs)),
        "verdict_in_regime": verdict if inside else NOT_TESTED,
        "verdict_with_wrong_rewards": judge(claim, judged).verdict if names else "",
        "regime_with_wrong_rewards": "; ".join(map(str, changed)),
    }


# --- what a setting changes ------------------------------------------------------

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
    levels = levels_of(table, [a + suffix for a in (arm, other) for suffix in places])

    def cell(one: str, two: str) -> str:
        if {arm + one, other + two} - there:
            return "–"
        return order(ratio(levels, arm + one, other + two, metric, AT_END))

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

"""Which subspaces suffice: confined runs against free and stopped ones."""

import math
from collections.abc import Sequence

import pandas as pd

from opd_geometry.analysis.evidence import (
    CHAIN,
    KEPT,
    LAYERS,
    accuracy,
    arms_matching,
    benchmarks,
    gain,
    kept_share,
    last,
    over_matrices,
)
from opd_geometry.analysis.verdicts import Part, defined, interval, state
from opd_geometry.experiments.descriptions import BRANCH_FRAC

WORDS = {"holds": "suffices", "fails": "falls short", "open": "open"}
POWERLESS = "without power"  # the free run gains nothing that could be lost
MEASURES = ("trained task", "all benchmarks")
STOPPED = "stopped"  # the free run where the others are confined
CLAIMED = ("opd", "sft")  # arms that the paper's own claims are about
OWN = ("", "-update")  # what follows FAMILY-projected: gradient and update confined
FOREIGN = ("-random", "-pretrained", "-donor")


def sufficiency(table: pd.DataFrame, family: str, measure: str) -> pd.DataFrame:
    """How much of what the free run learns each confinement leaves.

    A confinement *suffices* when the 95 % interval of the share that it keeps of the
    free run's gain after the branch lies above ``KEPT``, *falls short* when it lies
    below, and is *open* otherwise: the rule of the claim ``sufficient-opd``, as is
    that all are *without power* when that gain is not shown to exceed what is asked:
    nothing of the arms in ``CLAIMED``, its margin of the controls.

    Args:
        table: tidy, with the free arm and confined twins of it.
        family: the free arm; its twins are named ``FAMILY-projected...``.
        measure: one of ``MEASURES``: which benchmarks are averaged.

    Returns:
        One row an arm and one for ``STOPPED``: arm, confined (what follows
        ``FAMILY-projected`` in its name), n_seeds, difference (accuracy minus the free
        run's), low, high, kept (the share: 1 all of it, 0 as if stopped; NaN without
        power), kept_low, kept_high, outcome, leak (of the energy since the branch the
        share outside the subspace, mean over matrices and seeds).

    Source: arXiv:2606.07082, Figures 6 and 8 (the rank-K projection; the other
    subspaces and the rule are ours).
    """
    metrics = CHAIN if measure == MEASURES[0] else benchmarks(table)
    free = accuracy(table, family, metrics)
    stopped = accuracy(table, family, metrics, BRANCH_FRAC)
    learns = gain(table, family)
    mean, low, _ = interval(learns.values)
    needed = 0.0 if family in CLAIMED else learns.lower
    powerless = not (mean if math.isnan(low) else low) > needed  # one seed: mean
    rows = []
    for arm in [*arms_matching(table, [f"{family}-projected*"]), STOPPED]:
        lost = (stopped if arm == STOPPED else accuracy(table, arm, metrics)) - free
        kept = KEPT - KEPT * (free - stopped) / (free - stopped).mean()
        if arm != STOPPED:
            kept = kept_share(table, family, arm, metrics)
        outcome = WORDS[state(Part(arm, kept, KEPT))]
        shares = interval(kept * math.nan if powerless else kept)
        confined = arm.removeprefix(f"{family}-projected")
        numbers = (len(defined(lost)), *interval(lost), *shares)
        leak = last(over_matrices(table, arm, "leak", LAYERS)).mean()
        told = POWERLESS if powerless else outcome
        rows.append((arm, confined, *numbers, told, leak))
    columns = ["arm", "confined", "n_seeds", "difference", "low", "high", "kept"]
    columns += ["kept_low", "kept_high", "outcome", "leak"]
    return pd.DataFrame(rows, columns=columns)


def kept_by(table: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """Rows of ``sufficiency`` of confined arms, whatever they branch from.

    Args:
        table: tidy, with the free arms, and of the confined ones those that were run.
        arms: names ``FAMILY-projected...``, of one family or several.

    Returns:
        n_seeds, kept, kept_low, kept_high and leak on the trained task by arm, in this
        order; NaN of an arm that was not run.
    """
    families = dict.fromkeys(arm.partition("-projected")[0] for arm in arms)
    rows = pd.concat(sufficiency(table, name, MEASURES[0]) for name in families)
    found = rows[rows["arm"] != STOPPED].set_index("arm").reindex([*arms])
    return found[["n_seeds", "kept", "kept_low", "kept_high", "leak"]]


def thesis(found: pd.DataFrame) -> str:
    """Whether a run's own early subspace suffices, and no other.

    *Holds* if both forms of the own one suffice and every foreign one falls short,
    *refuted* if an own one falls short or a foreign one suffices, else *open*.

    Args:
        found: of ``sufficiency``.
    """
    outcome = found.set_index("confined")["outcome"]
    if outcome[STOPPED] == POWERLESS:
        return "no test, since its gain after the branch is not shown to be enough"
    own, foreign = ([outcome.get(name) for name in names] for names in (OWN, FOREIGN))
    if "falls short" in own or "suffices" in foreign:
        return "refuted"
    held = set(own) == {"suffices"} and set(foreign) == {"falls short"}
    return "holds" if held else "open"

"""Are the orders of the arms a signal-to-noise ratio?

Adam rescales every entry of a gradient, so how far an entry moves depends on how steady
its gradients are and not on how large. If the gradients of a run stayed as they are at
its start, each entry with signal r (see ``experiments.signal``) would move, in the unit
of the run's own learning rates,

    ceiling = sqrt(1 + mean(r) ((sum lr)^2 / sum lr^2 - 1)),

which is 1 for noise and sqrt(steps) for a gradient that is always the same. What is
learned fades, so runs stay below it.

RULE, fixed before any run of seed 1 of the profile ``pretrained`` was trained, and when
the signals of four arms of one seed of the small world alone had been looked at: of two
arms of one seed whose ceilings differ by ``APART`` or more, the one with the higher
ceiling ends farther (metric ``displacement``). It is asked apart of arms that differ in
their share of wrong rewards alone (``FLIPS``) and of all others.

That pairs of arms from other weights (SFT begins before the anchor) stand apart, too,
was decided after they had been seen.
"""

from collections.abc import Iterable
from itertools import combinations

import numpy as np
import pandas as pd

from opd_geometry.analysis.evidence import (
    ATTENTION,
    CHAIN,
    LAYERS,
    Table,
    accuracy,
    first,
    last,
    levels_of,
    over_matrices,
)
from opd_geometry.experiments.profiles import build, settings_of
from opd_geometry.experiments.runs import Run
from opd_geometry.geometry.locking import unit_of
from opd_geometry.training.optimizer import learning_rate

APART = 1.1
FLIPS = ("rlvr", "rlvr-flip-30", "rlvr-flip-45", "rlvr-coin")
AT_END = (
    "displacement",
    "relative_norm",
    "sparsity",
    "low_magnitude_overlap",
    "angle_right_mean_deg",
    "nss",
)
WEIGHTED = ("sparsity",)


def ceiling(signal: float, rates: Iterable[float]) -> float:
    """How far an arm would move if its first gradients' signal lasted.

    sqrt(1 + signal ((sum lr)^2 / sum lr^2 - 1))

    Args:
        signal: mean over entries, from 0 to 1; an estimate of noise may lie below 0,
            and counts as 0.
        rates: learning rate of every step.

    Returns:
        Root mean square change over sqrt(sum lr^2), 1 or more.

    Raises:
        ValueError: a signal that is no number or above 1, or rates that are none.

    >>> ceiling(0.0, [1.0] * 9), ceiling(1.0, [1.0] * 9)
    (1.0, 3.0)
    """
    if not signal <= 1.0:
        raise ValueError(
            f"signal {signal!r}, expected a number up to 1: leave out matrices "
            "without a gradient"
        )
    each = list(rates)
    steps = sum(each) ** 2 / unit_of(each) ** 2
    return float(np.sqrt(1.0 + max(0.0, signal) * (steps - 1.0)))


def predictions(signals: pd.DataFrame, runs: Iterable[Run]) -> pd.DataFrame:
    """What is known of runs before they are trained.

    Args:
        signals: of ``signal_table``; mean over the matrices of the layers is taken.
        runs: which of them; the ceiling is of AdamW, so others give no row.

    Returns:
        One row a run: arm, seed, start (of which weights), signal, ceiling.
    """
    rows = signals[(signals["metric"] == "signal") & signals["role"].isin(LAYERS)]
    means = rows.groupby(rows["run"].astype(str))["value"].mean()
    found = []
    for run in runs:
        if run.key() in means.index and run.train.optimizer.kind == "adamw":
            config, steps = run.train.optimizer, run.train.steps
            rates = [learning_rate(config, step, steps) for step in range(steps)]
            own = float(means[run.key()])
            start = run.start.name if isinstance(run.start, Run) else str(run.start)
            found.append((run.arm, run.seed, start, own, ceiling(own, rates)))
    columns = ["arm", "seed", "start", "signal", "ceiling"]
    return pd.DataFrame(found, columns=columns)


def outcomes(table: Table, arms: Iterable[str]) -> pd.DataFrame:
    """How far arms went, what their diagnostics say of it, and what they learned.

    Args:
        table: tidy.
        arms: which; those without a displacement give no rows.

    Returns:
        One row an arm and seed: arm, seed, ``AT_END``, stable_rank_first,
        stable_rank_last (attention matrices), accuracy (sampled, at the end).
    """
    levels, parts = levels_of(table), []
    for arm in arms:
        moved = {
            metric: last(over_matrices(levels, arm, metric, LAYERS, metric in WEIGHTED))
            for metric in AT_END
        }
        rank = over_matrices(levels, arm, "stable_rank", ATTENTION)
        more = {"stable_rank_first": first(rank), "stable_rank_last": last(rank)}
        wide = pd.DataFrame(moved | more | {"accuracy": accuracy(levels, arm, CHAIN)})
        wide = wide.dropna(subset="displacement").rename_axis("seed").reset_index()
        parts.append(wide.assign(arm=arm))
    return pd.concat(parts, ignore_index=True)


def foretold(predicted: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """The rule of this module, pair by pair.

    Args:
        predicted: of ``predictions``.
        found: of ``outcomes``.

    Returns:
        One row a seed and pair of arms that the rule speaks of: seed, farther, nearer
        (as predicted), kind (``flips``: they differ in wrong rewards alone; ``arms``:
        from the same weights; ``starts``: from others),
        predicted, observed (ratio of ceilings, of displacements), right.
    """
    both = predicted.merge(found[["arm", "seed", "displacement"]], on=["arm", "seed"])
    rows = []
    for seed, of_seed in both.groupby("seed"):
        ordered = of_seed.sort_values("ceiling", ascending=False)
        for a, b in combinations(ordered.itertuples(), 2):
            if a.ceiling < APART * b.ceiling:
                continue
            kind = "flips" if {a.arm, b.arm} <= set(FLIPS) else "arms"
            kind = kind if a.start == b.start else "starts"
            ratio = a.displacement / b.displacement
            told = a.ceiling / b.ceiling
            rows.append((seed, a.arm, b.arm, kind, told, ratio, bool(ratio > 1.0)))
    columns = ["seed", "farther", "nearer", "kind", "predicted", "observed", "right"]
    return pd.DataFrame(rows, columns=columns)


def lasted(predicted: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """Which share of the signal at the start lasted over the run.

    (displacement^2 - 1) / (ceiling^2 - 1)

    Returns:
        ``predicted`` with the displacement and the column ``lasted``; NaN for noise,
        whose ceiling is below ``APART``.
    """
    both = predicted.merge(found[["arm", "seed", "displacement"]], on=["arm", "seed"])
    share = (both["displacement"] ** 2 - 1) / (both["ceiling"] ** 2 - 1)
    return both.assign(lasted=share.where(both["ceiling"] >= APART))


def known_runs(profile: str, signals: pd.DataFrame) -> list[Run]:
    """The runs of a profile that there are signals of."""
    keys = set(signals["run"].astype(str))
    there = signals[["arm", "seed"]].drop_duplicates()
    listed = settings_of(profile).arms
    runs = [
        build(profile, str(row.arm), int(row.seed))
        for row in there.itertuples()
        if row.arm in listed
    ]
    return [run for run in runs if run.key() in keys]

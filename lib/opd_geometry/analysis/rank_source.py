"""Where does low rank come from? Five experiments, their rules fixed before their runs.

RULES. Two arms are compared by the logarithm of the ratio of a number at the end of
training, paired by seed: *higher* or *lower* when its 95 % interval lies beyond a
factor, *alike* when it lies within, *open* otherwise.

optimizer   Does low rank come from Adam's rescaling of every entry? Then SGD's stable
            rank is not alike Adam's. Muon, whose steps have all directions alike,
            should be higher; without clipping nothing should change.
gradients   Is the rank there at the start? An optimizer on gradients that stay those
            of the anchor (``experiments.frozen``) ends within 20 % of the run's rank,
            and so does the covariance of those gradients.
gap         The anchor as its own teacher. As the gap vanishes only noise is left: the
            run goes less far, as far as RLVR on coin flips, and its rank is higher.
vocabulary  The KL over the vocabulary has no noise from the sampled token: it goes
            farther. Its rank is alike, in either direction of the KL.
early       Over arms, does Sim_K of the first checkpoint with the end, or the distance,
            say what is learned and what is forgotten? Rank correlations, each given
            the other; the interval over resampled arms has to exclude zero, at 95 %
            for the four together.

What was expected is written down in ``COMPARISONS`` and ``PREDICTIONS``; what came out
may be otherwise. The rates of SGD and Muon are those at which data of another seed,
from the anchor of seed 0, go as far as AdamW in a fifth of training.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd

from opd_geometry.analysis.evidence import (
    ACCURACY_MARGIN,
    ATTENTION,
    CHAIN,
    COMPARABLE_FACTOR,
    LAYERS,
    SAME_FACTOR,
    Table,
    accuracy,
    first,
    last,
    levels_of,
    over_matrices,
)
from opd_geometry.analysis.verdicts import Values, defined, interval
from opd_geometry.experiments.profiles import build
from opd_geometry.experiments.runs import Run
from opd_geometry.training.tasks import BENCHMARKS

PREDICTED_WITHIN = 1.2
RESAMPLES, LEAST_ARMS = 10_000, 8
# What the anchor can do and no arm on chains trains on.
HELD_OUT = tuple(f"accuracy/{b}" for b in BENCHMARKS if not b.startswith("chain"))


@dataclass(frozen=True)
class Comparison:
    """An arm beside another one, and what was expected before the runs."""

    experiment: str
    arm: str
    reference: str
    metric: str
    factor: float
    expected: str


RANK, MOVED, FORWARD = "stable_rank", "displacement", "opd-full-forward"
COMPARISONS = (
    Comparison("optimizer", "opd-sgd", "opd", RANK, COMPARABLE_FACTOR, "alike"),
    Comparison("optimizer", "opd-muon", "opd", RANK, COMPARABLE_FACTOR, "higher"),
    Comparison("optimizer", "opd-unclipped", "opd", RANK, COMPARABLE_FACTOR, "alike"),
    Comparison("gap", "opd-self", "opd", RANK, COMPARABLE_FACTOR, "higher"),
    Comparison("gap", "opd-self", "opd", MOVED, SAME_FACTOR, "lower"),
    Comparison("gap", "opd-self", "rlvr-coin", MOVED, COMPARABLE_FACTOR, "alike"),
    Comparison("gap", "opd-self", "opd-self-0.5", RANK, SAME_FACTOR, "higher"),
    Comparison("vocabulary", "opd-full", "opd", RANK, COMPARABLE_FACTOR, "alike"),
    Comparison("vocabulary", "opd-full", "opd", MOVED, SAME_FACTOR, "higher"),
    Comparison("vocabulary", FORWARD, "opd", RANK, COMPARABLE_FACTOR, "alike"),
    Comparison("vocabulary", FORWARD, "opd", MOVED, SAME_FACTOR, "higher"),
)
# Arms whose rank is predicted from gradients at the anchor, each expected *alike*.
PREDICTIONS = ("opd", "rlvr", "opd-sgd", "opd-muon")
# Arms that these experiments added; *early* is judged on those that were there before.
ADDED = ("opd-sgd", "opd-muon", "opd-full", FORWARD, "opd-self", "opd-self-0.5")
PREDICTORS = ("frozen_stable_rank", "covariance_rank")


def level(logarithms: Values, factor: float) -> str:
    """``higher``, ``lower``, ``alike`` or ``open``: an interval against a factor.

    Args:
        logarithms: of a ratio, one number a seed.
        factor: above 1.

    >>> level(pd.Series([0.5, 0.51, 0.52]), 1.25)
    'higher'
    """
    _, low, high = interval(logarithms)
    bound = math.log(factor)
    if low > bound:
        return "higher"
    if high < -bound:
        return "lower"
    return "alike" if -bound < low and high < bound else "open"


def compared(
    table: Table, comparisons: Iterable[Comparison] = COMPARISONS
) -> pd.DataFrame:
    """What came of the comparisons of arms.

    Args:
        table: tidy, or its levels.
        comparisons: which; those of an arm that is not there give no row.

    Returns:
        One row a comparison: experiment, arm, reference, metric, ratio, low, high (its
        95 % interval over seeds), n (seeds that both have), found, expected.
    """
    levels, rows = levels_of(table), []
    for c in comparisons:
        roles = ATTENTION if c.metric == RANK else LAYERS
        ends = [
            last(over_matrices(levels, arm, c.metric, roles))
            for arm in (c.arm, c.reference)
        ]
        gaps = defined(np.log(ends[0] / ends[1]))
        if len(gaps):
            what = (c.experiment, c.arm, c.reference, c.metric)
            numbers = (*np.exp(interval(gaps)), len(gaps))
            rows.append((*what, *numbers, level(gaps, c.factor), c.expected))
    columns = ["experiment", "arm", "reference", "metric", "ratio", "low", "high"]
    return pd.DataFrame(rows, columns=[*columns, "n", "found", "expected"])


# --- ranks from gradients at the start ----------------------------------------------


def predictions(
    table: Table, frozen: pd.DataFrame, arms: Sequence[str] = PREDICTIONS
) -> pd.DataFrame:
    """Predicted over measured stable rank, at the first and the last checkpoint.

    Args:
        table: tidy.
        frozen: of ``frozen.frozen_table``.
        arms: which.

    Returns:
        One row an arm, predictor and moment (``first``, ``last``): arm, predictor,
        moment, predicted, measured (means over attention matrices and seeds), ratio,
        low, high, n, found. The covariance has no course: one number for both moments.
    """
    levels, rows = levels_of(table), []
    known = frozen[frozen["role"].isin(ATTENTION)]
    for arm, name, moment in product(arms, PREDICTORS, ("first", "last")):
        own = over_matrices(levels, arm, RANK, ATTENTION)
        told = known[(known["arm"] == arm) & (known["metric"] == name)]
        told = told.astype({"value": float}).groupby(["seed", "step"])["value"].mean()
        steps = own.index.to_frame(index=False).groupby("seed")["step"]
        ends = (steps.min() if moment == "first" else steps.max()).reset_index()
        places = pd.MultiIndex.from_frame(ends)
        measured = own.reindex(places).droplevel("step")
        if name == "covariance_rank":  # of no checkpoint
            places = pd.MultiIndex.from_frame(ends.assign(step=0))
        predicted = told.reindex(places).droplevel("step")
        gaps = defined(np.log(predicted / measured))
        if len(gaps):
            means = (predicted[gaps.index].mean(), measured[gaps.index].mean())
            numbers = (*means, *np.exp(interval(gaps)), len(gaps))
            rows.append((arm, name, moment, *numbers, level(gaps, PREDICTED_WITHIN)))
    columns = ["arm", "predictor", "moment", "predicted", "measured", "ratio"]
    return pd.DataFrame(rows, columns=[*columns, "low", "high", "n", "found"])


# --- what is learned and what is forgotten --------------------------------------------


def starts_of(profile: str, arms: Iterable[str]) -> dict[str, str]:
    """Of arms that train freely on chains alone: the arm whose end they start from."""
    runs = [build(profile, arm, 0) for arm in arms]
    return {
        run.arm: run.start.arm
        for run in runs
        if isinstance(run.start, Run)
        and run.projection is None
        and run.train.benchmarks == ("chain",)
    }


def fates(table: Table, starts: Mapping[str, str]) -> pd.DataFrame:
    """How early arms settled, how far they went, what they learned and forgot.

    Args:
        table: tidy, with the arms and those that they start from.
        starts: of ``starts_of``.

    Returns:
        One row an arm, means over seeds: early (Sim_K of the first checkpoint with the
        end), distance (relative norm at the end), learned (sampled accuracy of chains
        gained since the start), forgotten (accuracy lost on ``HELD_OUT``), n (seeds).
    """
    levels, rows = levels_of(table), {}
    for arm, start in starts.items():
        settled = over_matrices(levels, arm, "similarity_to_end", ATTENTION)
        moved = over_matrices(levels, arm, "relative_norm", LAYERS)
        after, before = (accuracy(levels, a, CHAIN) for a in (arm, start))
        left, had = (accuracy(levels, a, HELD_OUT) for a in (arm, start))
        seeds = pd.DataFrame({"early": first(settled), "distance": last(moved)})
        seeds = seeds.assign(learned=after - before, forgotten=had - left).dropna()
        if len(seeds):
            rows[arm] = {**seeds.mean(), "n": len(seeds)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("arm")


def links(found: pd.DataFrame, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Whether early similarity, or distance, says what is learned and forgotten.

    (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2)(1 - r_yz^2)), r of ranks over arms

    Args:
        found: of ``fates``.
        resamples: draws of as many arms, with replacement.

    Returns:
        One row an outcome and predictor: outcome, predictor, given, correlation, low,
        high (95 % for all rows together; NaN below ``LEAST_ARMS``), n (arms), found
        (``predicts`` or ``open``).
    """
    found, rows = found.sort_index(), []  # the draws are of places
    rng, outcomes = np.random.default_rng(0), ("learned", "forgotten")
    pairs = (("early", "distance"), ("distance", "early"))
    share = 100 * 0.05 / (len(outcomes) * len(pairs)) / 2
    for y, (x, z) in product(outcomes, pairs):
        own = low = high = math.nan
        if len(found) >= LEAST_ARMS:
            values = found[[x, y, z]].to_numpy(dtype=float)
            draws = rng.integers(len(found), size=(resamples, len(found)))
            own = float(_partial(values))
            low, high = np.nanpercentile(_partial(values[draws]), [share, 100 - share])
        word = "predicts" if low > 0.0 or high < 0.0 else "open"
        rows.append((y, x, z, own, low, high, len(found), word))
    columns = ["outcome", "predictor", "given", "correlation", "low", "high", "n"]
    return pd.DataFrame(rows, columns=[*columns, "found"])


# --- all five -------------------------------------------------------------------------

RULES = {
    "optimizer": "another optimizer's rank lies beyond a factor of 1.25",
    "gradients": "gradients of the start give the rank within a factor of 1.2",
    "gap": "without a gap: higher rank, as far as on coin flips",
    "vocabulary": "without the sampled token's noise: farther, at the same rank",
    "early": "rank correlation over arms, each given the other; zero excluded",
}
WORDS = {RANK: "rank", MOVED: "distance"}


def summary(
    comparisons: pd.DataFrame, told: pd.DataFrame, linked: pd.DataFrame
) -> pd.DataFrame:
    """One row an experiment: its rule, what came out, and n.

    Args:
        comparisons: of ``compared``.
        told: of ``predictions``, of which the last checkpoint counts.
        linked: of ``links``.

    Returns:
        Index: the experiments; columns rule, what came out, n. Of an experiment
        without runs: *not run*.
    """
    said: dict[str, list[str]] = {name: [] for name in RULES}
    counts: dict[str, list[str]] = {name: [] for name in RULES}
    for row in comparisons.itertuples():
        beside = "" if row.reference == "opd" else f" beside {row.reference}"
        text = f"{row.arm} {WORDS[row.metric]} {row.found}{beside} ({row.ratio:.2f})"
        said[row.experiment].append(text)
        counts[row.experiment].append(f"{row.n} seeds")
    for row in told[told["moment"] == "last"].itertuples():
        kind = row.predictor.partition("_")[0]
        said["gradients"].append(f"{row.arm}, {kind}: {row.found} ({row.ratio:.2f})")
        counts["gradients"].append(f"{row.n} seeds")
    for row in linked.itertuples():
        text = f"{row.outcome}, {row.predictor}: {row.found} ({row.correlation:.2f})"
        said["early"].append(text)
        counts["early"].append(f"{row.n} arms")
    rows = {
        name: (rule, "; ".join(said[name]) or "not run", _span(counts[name]))
        for name, rule in RULES.items()
    }
    columns = ["rule", "what came out", "n"]
    found = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    return found.rename_axis("experiment")


def concluded(
    words: Mapping[str, str], learned: Values, covariance: Mapping[str, str]
) -> list[str]:
    """What the experiments on rank say, in sentences: only what their words bear.

    Args:
        words: of ``opd-sgd``, ``opd-muon`` and ``opd-self`` beside OPD, see ``level``.
        learned: accuracy of ``opd-muon`` minus that of ``opd``, one number a seed.
        covariance: words of the covariance's predictions, an arm each.

    Returns:
        The sentences; an arm that was not run has none.
    """
    where = {"alike": "at", "higher": "above", "lower": "below"}
    names = {"opd-sgd": "SGD, which rescales nothing,", "opd-muon": "Muon"}
    ends = [
        f"{name} ends {where.get(words[arm], 'undecided beside')} AdamW's rank"
        for arm, name in names.items()
        if arm in words
    ]
    as_much = interval(learned)[1] > -ACCURACY_MARGIN
    so = ["it is not Adam that makes the rank low"] * (words.get("opd-sgd") == "alike")
    if words.get("opd-muon") == "higher" and as_much:
        ends[-1] += " and learns as much, within the margin"
        so.append("learning does not need a low one")
    said = [f"By the rule {'; '.join(ends)}."] if ends else []
    said += [f"So {', and '.join(so)}."] if so else []
    if covariance and set(covariance.values()) <= {"alike"}:
        said.append("The rank is in the gradients before anything is trained.")
    if words.get("opd-self") == "higher":
        said.append("Without a gap it is higher: what is left has more directions.")
    return said


def _span(counts: Sequence[str]) -> str:
    """The smallest and the largest of several counts of one unit.

    >>> _span(["3 seeds", "2 seeds", "3 seeds"])
    '2 to 3 seeds'
    """
    numbers = sorted({int(count.split()[0]) for count in counts})
    if not numbers:
        return "0"
    unit = counts[0].split()[1]
    ends = [str(n) for n in dict.fromkeys((numbers[0], numbers[-1]))]
    return f"{' to '.join(ends)} {unit.removesuffix('s') if ends == ['1'] else unit}"


def _partial(values: np.ndarray) -> np.ndarray:
    """Rank correlation of two columns given the third: (..., n, 3) to (...)."""
    from scipy import stats  # it takes a second to import

    ranks = stats.rankdata(values, axis=-2)
    ranks = ranks - ranks.mean(axis=-2, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        ranks /= np.linalg.norm(ranks, axis=-2, keepdims=True)
        r = np.swapaxes(ranks, -1, -2) @ ranks
        xy, xz, yz = r[..., 0, 1], r[..., 0, 2], r[..., 1, 2]
        partial: np.ndarray = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    return partial

"""Evidence: from a tidy table to the parts and controls of each claim.

The quantities and margins were fixed before the runs that they judge. Tables have the
columns of ``measure.COLUMNS``. Rank, norm, Hill and Sim_K are means over the attention
matrices, as in the paper's trajectories; everything else is over all matrices of the
layers, plain means but for sparsity, which is weighted by the matrices' sizes.

What is judged in more than one readout is a function of table and readout: the metrics
of the other readout are those with its suffix, and so are its nulls'.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import NamedTuple, TypeAlias

import numpy as np
import pandas as pd

from opd_geometry.analysis.verdicts import (
    Control,
    Evidence,
    Part,
    Values,
    equivalence,
    exceeding,
    ordering,
)
from opd_geometry.experiments.descriptions import BRANCH_FRAC
from opd_geometry.geometry.defaults import MASK_ALPHA
from opd_geometry.training.tasks import BENCHMARKS, related, short_name

# Where the paper prints a width, the margin is the paper's.
SPARSITY_MARGIN = 0.06  # the paper's variants lie up to 5.5 points from its 51.6 %
RANK_BAND = 28 / 18  # highest over lowest stable rank that the paper draws for OPD
HILL_BAND = 2.9 / 2.3  # the same for its Hill exponent
SAME_FACTOR = 1.1  # one trajectory: about a fifth of that rank band, as logarithms
COMPARABLE_FACTOR = 1.25  # two levels are comparable within it, well apart beyond it
MODEST_FACTOR = 1.5
NOISE_SHARE = 0.5  # an update with more than this share of a Gaussian's rank is noise
LOCKED = 0.5  # Sim_K from which an early subspace is nearer to the last one than not
ACCURACY_MARGIN = 0.05
KEPT = 0.9  # confinement leaves a run intact from this share of the free run's gain on

# Of the metrics that only `controls.at_end` gives; who has it has every null.
ALL_NULLS = "turned_nss"
LAYERS = ("q", "k", "v", "o", "gate", "up", "down")
ATTENTION = ("q", "k", "v", "o")
TOKEN_ARMS = tuple(f"tokens-{s}-{p}" for s in ("top", "random") for p in (50, 25))
# The paper's variants: teachers of other sizes or kinds, and no other teachers.
VARIANT_ARMS = ("opd-teacher-[mx]*", "opd-width-*", "opd-task-*")
CHAIN = ("accuracy/chain",)  # what every arm trains on, as the paper's AIME
ALL_ACCURACIES = tuple(f"accuracy/{name}" for name in BENCHMARKS)
# What a language model that trains on chains is asked at the end.
PRETRAINED_ACCURACIES = tuple(
    f"accuracy/{short_name(name)}" for name in related("pretrained/chain")
)
FORMS = ("-projected", "-projected-update")  # suffixes: gradient (the paper's), update
# Arms at OPD's budget and from its anchor that are no distillation on own rollouts.
MATCHED_ARMS = ("sft-matched", "sft-learns", "ce-teacher")
COIN = "rlvr-coin"  # trained on no signal at all
RATIO_ARMS = ("off-policy", "off-policy-ratio", "off-policy-ratio-clip")

# Readouts to the suffix of their metrics. What is stored in bf16 contains rounding.
READOUTS = {"float32": "", "bf16": "_bf16"}
# Nulls to the prefix of their metrics.
GAUSSIAN = {"Gaussian": "null_"}
ENTRYWISE = {**GAUSSIAN, "shuffled": "shuffled_"}
SPECTRAL = {**GAUSSIAN, "turned": "turned_"}
LOCKING = {"turned increments": "increments_", "walk": "walk_"}
# The update at the end, scaled to the norm of each checkpoint and stored in bf16.
ROUNDING = {"rounding alone": "rounding_"}
# What is known of the final subspace before training begins, or without this run.
PREDICTORS = {
    "top subspace of W_0": "similarity_of_weights",
    "the end of the stage before": "similarity_of_stage",
    "the end of another arm": "similarity_of_arm",
    "the end of another seed": "similarity_of_seed",
}


# --- quantities: one number a seed -----------------------------------------------


class Levels:
    """A tidy table, sorted once by what rules ask of it: a metric, then an arm.

    Every rule asks a table for the same means again; here each is taken once.
    """

    def __init__(self, table: pd.DataFrame) -> None:
        words = ["arm", "role", "metric"]
        self.table = table.astype(dict.fromkeys(words, "category"))
        arms, self._roles, metrics = (self.table[word].array for word in words)
        self._arm_codes = {str(arm): i for i, arm in enumerate(arms.categories)}
        self._metric_codes = {str(m): i for i, m in enumerate(metrics.categories)}
        self._order = np.argsort(metrics.codes, kind="stable")
        counts = np.bincount(metrics.codes, minlength=len(metrics.categories))
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._places, self._sizes = _places(arms.codes, table["seed"], table["step"])
        self.seeds = self._seeds()
        self._alias: dict[str, str] = {}
        self._arms_of: dict[str, set[int]] = {}
        self._levels: dict[object, _Means] = {}
        self._means: dict[object, pd.Series] = {}
        self._matrices: dict[object, dict[str, pd.Series]] = {}
        self._indices: dict[bytes, pd.MultiIndex] = {}

    def _seeds(self) -> dict[str, list[int]]:
        """Arms to their seeds, both in ascending order."""
        n_seeds, n_steps = self._sizes
        runs = np.sort(pd.unique(self._places // n_steps))
        found: dict[str, list[int]] = {}
        names = list(self._arm_codes)
        for arm, seed in zip(*np.divmod(runs, n_seeds), strict=True):
            found.setdefault(names[arm], []).append(int(seed))
        return found

    def with_arm(self, arm: str, other: str) -> "Levels":
        """The same table with another arm in an arm's place."""
        copy = object.__new__(Levels)
        copy.__dict__ |= self.__dict__
        copy._alias = {arm: other}
        copy.seeds = {a: s for a, s in self.seeds.items() if a not in (arm, other)}
        if other in self.seeds:
            copy.seeds[arm] = self.seeds[other]
        return copy

    def _rows_of(self, metric: str) -> np.ndarray:
        """Where the rows of a metric stand in the table."""
        code = self._metric_codes.get(metric)
        if code is None:
            return np.array([], dtype=np.intp)
        return self._order[self._starts[code] : self._starts[code + 1]]

    def has(self, arm: str, metric: str) -> bool:
        """Whether an arm has any value of a metric."""
        if metric not in self._arms_of:
            runs = self._places[self._rows_of(metric)]
            self._arms_of[metric] = set(np.unique(runs // math.prod(self._sizes)))
        own = self._arm_codes.get(self._alias.get(arm, arm))
        return arm in self.seeds and own in self._arms_of[metric]

    def means(
        self, arm: str, metric: str, roles: tuple[str, ...], weighted: bool
    ) -> pd.Series:
        """As ``over_matrices``."""
        what = (metric, roles, weighted)
        own = self._alias.get(arm, arm)
        if (what, own) not in self._means:
            if what not in self._levels:
                self._levels[what] = self._of_all_arms(metric, roles, weighted)
            self._means[what, own] = self._of_one(own, self._levels[what])
        return self._means[what, own]

    def _of_one(self, arm: str, of_all: "_Means") -> pd.Series:
        """An arm's part of the means of all; tables of one shape share one index."""
        if arm not in self._arm_codes:
            return _NOTHING
        n_seeds, n_steps = self._sizes
        first = self._arm_codes[arm] * n_seeds * n_steps
        a, b = np.searchsorted(of_all.places, [first, first + n_seeds * n_steps])
        if a == b:
            return _NOTHING
        places = of_all.places[a:b] - first
        key = places.tobytes()
        if key not in self._indices:
            self._indices[key] = pd.MultiIndex.from_arrays(
                np.divmod(places, n_steps), names=["seed", "step"]
            )
        return pd.Series(of_all.values[a:b], self._indices[key])

    def matrices(self, arm: str, frac: float) -> dict[str, pd.Series]:
        """Metrics to an arm's values by seed and matrix, at a fraction of training."""
        own = self._alias.get(arm, arm)  # what is kept is shared with copies
        key = ("matrices", own, frac)
        if key not in self._matrices:
            rows = self.table[self.table["arm"] == own]
            ends = rows.groupby("seed")["step"].max()
            wanted = (frac * rows["seed"].map(ends)).round()
            rows = rows[rows["role"].isin(LAYERS) & (rows["step"] == wanted)]
            self._matrices[key] = {
                str(metric): found.set_index(["seed", "matrix"])["value"]
                for metric, found in rows.groupby("metric", observed=True)
            }
        return self._matrices[key]

    def _of_all_arms(
        self, metric: str, roles: tuple[str, ...], weighted: bool
    ) -> "_Means":
        rows = self._rows_of(metric)
        codes = self._roles.codes[rows]
        rows = rows[self._roles.categories.isin(roles)[codes] & (codes >= 0)]
        values = self.table["value"].to_numpy()[rows]
        weights = self._weights(rows) if weighted else np.ones(len(rows))
        sums = pd.DataFrame({"top": values * weights, "bottom": weights})
        sums = sums.groupby(self._places[rows]).sum(skipna=False)
        return _Means(sums.index.to_numpy(), (sums["top"] / sums["bottom"]).to_numpy())

    def _weights(self, rows: np.ndarray) -> np.ndarray:
        """Sizes of the matrices that rows are of."""
        names = ["arm", "seed", "matrix"]
        sizes = self.table[[*names, "value"]].take(self._rows_of("parameters"))
        places = pd.MultiIndex.from_frame(self.table[names].take(rows))
        found: np.ndarray = sizes.set_index(names)["value"].reindex(places).to_numpy()
        return found


class _Means(NamedTuple):
    """Means by arm, seed and step, in ascending order of ``_places``."""

    places: np.ndarray
    values: np.ndarray


def _places(
    arms: np.ndarray, seeds: pd.Series, steps: pd.Series
) -> tuple[np.ndarray, tuple[int, int]]:
    """One number for arm, seed and step, and how many seeds and steps there can be."""
    n_seeds, n_steps = (int(x.max()) + 1 if len(x) else 1 for x in (seeds, steps))
    places = arms.astype(np.int64)
    places *= n_seeds
    places += seeds.to_numpy(np.int64)
    places *= n_steps
    places += steps.to_numpy(np.int64)
    return places, (n_seeds, n_steps)


Table: TypeAlias = pd.DataFrame | Levels
_NOTHING = pd.Series(
    dtype=float,
    index=pd.MultiIndex.from_arrays(
        [np.array([], dtype=int)] * 2, names=["seed", "step"]
    ),
)


_NO_PLACE = pd.Series(
    dtype=float,
    index=pd.MultiIndex.from_arrays(
        [np.array([], dtype=int), np.array([], dtype=object)], names=["seed", "matrix"]
    ),
)


def levels_of(table: Table, arms: Iterable[str] | None = None) -> Levels:
    """The levels of a table, or of some of its arms."""
    if isinstance(table, Levels):
        return table
    return Levels(table if arms is None else table[table["arm"].isin(list(arms))])


def with_every_null(table: pd.DataFrame) -> pd.DataFrame:
    """A table without the matrices that have no nulls, of runs of which others have.

    Of a large model the nulls are taken on some of its layers alone: whatever is held
    against them is a mean over the same matrices. All other runs stay as they are.

    Args:
        table: tidy.
    """
    runs, matrices = (_codes(table[name]) for name in ("run", "matrix"))
    n_matrices = matrices.max(initial=0) + 1
    places = runs * n_matrices + matrices
    inside = table["role"].isin(LAYERS)
    known, has = (
        np.unique(places[inside & (table["metric"] == name)])
        for name in ("parameters", ALL_NULLS)
    )
    lacks = np.setdiff1d(known, has)
    dropped = lacks[np.isin(lacks // n_matrices, has // n_matrices)]
    return table[~np.isin(places, dropped)] if len(dropped) else table


def _codes(words: pd.Series) -> np.ndarray:
    return words.astype("category").cat.codes.to_numpy().astype(np.int64)


def arms_matching(table: Table, patterns: Iterable[str]) -> list[str]:
    """Arms of the table, in the order of the patterns (shell style) that name them."""
    there = table.seeds if isinstance(table, Levels) else table["arm"].unique()
    arms = sorted(map(str, there))
    return [arm for pattern in patterns for arm in arms if fnmatchcase(arm, pattern)]


def over_matrices(
    table: Table,
    arm: str,
    metric: str,
    roles: tuple[str, ...],
    weighted: bool = False,
) -> pd.Series:
    """Mean over a model's matrices, indexed by (seed, step) in ascending order.

    Args:
        table: tidy, or its levels.
        arm, metric: which rows.
        roles: of the matrices averaged over.
        weighted: weigh each matrix by its number of entries (metric ``parameters``).

    Returns:
        The means; NaN as soon as one matrix is NaN, so that a seed never counts with
        fewer matrices than the others. Empty without such rows.
    """
    return levels_of(table, [arm]).means(arm, metric, roles, weighted)


def first(values: pd.Series) -> Values:
    """At each seed's first checkpoint."""
    return _at_turns(values, 1)


def last(values: pd.Series) -> Values:
    """At each seed's last checkpoint."""
    return _at_turns(values, -1)


def _at_turns(values: pd.Series, towards: int) -> Values:
    """Where a seed has no neighbour on one side: of values in order, seeds together."""
    known, seeds = values.index.levels[0], values.index.codes[0]
    turns = np.ones(len(seeds), dtype=bool)
    changes = seeds[1:] != seeds[:-1]
    turns[1:] = changes if towards == 1 else turns[1:]
    turns[:-1] = changes if towards == -1 else turns[:-1]
    index = pd.Index(known.to_numpy()[seeds[turns]], name="seed")
    return pd.Series(values.to_numpy()[turns], index)


def beside(
    table: Table, arm: str, metrics: Sequence[str], frac: float = 1.0
) -> pd.DataFrame:
    """Metrics as means over one set of matrices: those that have all of them.

    Of a large model some nulls are taken on some of its layers alone, and a mean over
    all matrices beside a null's over a few would compare matrices, not updates.

    Args:
        table: tidy, or its levels.
        arm: which.
        metrics: names, such as a diagnostic and its nulls.
        frac: of training; the checkpoint at that step, 1 the last one.

    Returns:
        Index: the seeds that have all of them; a column a metric, and ``n_matrices``.
    """
    levels = levels_of(table, [arm])
    places = levels.matrices(arm, frac)
    columns = [places.get(metric, _NO_PLACE) for metric in metrics]
    wide = pd.concat(columns, axis=1, keys=metrics).dropna()
    by_seed = wide.groupby(level="seed")
    return by_seed.mean().assign(n_matrices=by_seed.size())


def distance(table: Table, arm: str, other: str, suffix: str = "") -> Values:
    """How far two stable-rank trajectories lie apart, paired by seed and checkpoint.

    mean over checkpoints of |ln(stable rank of arm / stable rank of other)|
    """
    ours, theirs = (
        over_matrices(table, a, f"stable_rank{suffix}", ATTENTION) for a in (arm, other)
    )
    gaps = np.log(ours / theirs).abs()  # NaN at a step that only one of them has
    return gaps.groupby(level="seed").mean(skipna=False)


def accuracy(
    table: Table, arm: str, metrics: tuple[str, ...], frac: float = 1.0
) -> Values:
    """Sampled accuracy at a fraction of training, mean over benchmarks."""
    levels = levels_of(table, [arm])
    paths = [levels.means(arm, metric, ("model",), False) for metric in metrics]
    scores = []
    for path in paths:
        steps = path.index.get_level_values("step").to_series(index=path.index)
        ends = steps.groupby(level="seed").transform("max")
        wanted = np.maximum(1, (frac * ends).round())
        scores.append(path[steps == wanted].droplevel("step"))
    wide = pd.concat(scores, axis=1, keys=metrics)
    return wide.mean(axis=1, skipna=False)


def benchmarks(table: Table) -> tuple[str, ...]:
    """Accuracies of all that runs are asked at the end, in the table's world."""
    levels = levels_of(table)
    asked = PRETRAINED_ACCURACIES[-1]
    is_pretrained = any(levels.has(arm, asked) for arm in levels.seeds)
    return PRETRAINED_ACCURACIES if is_pretrained else ALL_ACCURACIES


def kept_share(
    table: Table, free: str, confined: str, metrics: tuple[str, ...] = CHAIN
) -> Values:
    """Share of what the free run gains after the branch that a confined one gains.

    q + ((confined - stopped) - q (free - stopped)) / mean(free - stopped), q = KEPT

    Sampled accuracies; stopped is the free run at the branch. The mean over
    seeds is the ratio of the mean gains, and the interval's place beside q is that of
    the difference of the two gains, so that no seed is divided by its own noise.

    Returns:
        One number a seed: 1 all of the gain, 0 as if stopped; NaN without a gain.
    """
    scores = {
        "free": accuracy(table, free, metrics),
        "stopped": accuracy(table, free, metrics, BRANCH_FRAC),
        "confined": accuracy(table, confined, metrics),
    }
    paired = pd.DataFrame(scores).dropna()
    gain = paired["free"] - paired["stopped"]
    own = paired["confined"] - paired["stopped"]
    mean = gain.mean() if gain.mean() > 0.0 else math.nan
    return KEPT + (own - KEPT * gain) / mean


def gain(table: Table, free: str) -> Part:
    """What there is to lose: the free run's gain after the branch, above the margin."""
    end, stopped = (accuracy(table, free, CHAIN, frac) for frac in (1.0, BRANCH_FRAC))
    return Part(f"gain of {free} after the branch", end - stopped, ACCURACY_MARGIN)


# --- evidence: the parts and controls of each claim ------------------------------


def final_order(
    *metrics: str,
    rising: tuple[str, ...],
    nulls: dict[str, str],
    log: bool = False,
    weighted: bool = False,
) -> Callable[[Table], Evidence]:
    """Order of the arms' last checkpoints; several metrics are averaged."""

    def evidence(table: Table) -> Evidence:
        @cache
        def level(arm: str, prefix: str = "") -> Values:
            ends = [
                last(over_matrices(table, arm, prefix + metric, LAYERS, weighted))
                for metric in metrics
            ]
            mean = sum(ends[1:], ends[0]) / len(ends)
            return np.log(mean) if log else mean

        word = "over" if log else "minus"
        return ordering(level, _twins(level, nulls), rising, MATCHED_ARMS, word)

    return evidence


def _twins(
    level: Callable[[str, str], Values], nulls: dict[str, str]
) -> dict[str, Callable[[str], Values]]:
    """Name of a null to the level of an arm's twin in it."""
    return {name: partial(_twin, level, prefix) for name, prefix in nulls.items()}


def _twin(level: Callable[[str, str], Values], prefix: str, arm: str) -> Values:
    return level(arm, prefix)


def principal_depleted(table: Table) -> Evidence:
    """The falling order, and how far OPD and RLVR lie below the random baseline."""
    metric = "principal_overlap"

    def depletion(arm: str, prefix: str = "") -> Values:
        return MASK_ALPHA - last(over_matrices(table, arm, prefix + metric, LAYERS))

    order = final_order(metric, rising=("rlvr", "opd", "sft"), nulls=ENTRYWISE)
    parts, controls = order(table)
    opd, rlvr = (
        Part(f"baseline minus {arm}", depletion(arm)) for arm in ("opd", "rlvr")
    )
    for part, arm in ((opd, "opd"), (rlvr, "rlvr")):
        controls += [
            exceeding("null", part, f"baseline minus {name} {arm}", depletion(arm, at))
            for name, at in ENTRYWISE.items()
        ]
    controls += [
        exceeding("matched", opd, f"baseline minus {arm}", depletion(arm))
        for arm in MATCHED_ARMS
    ]
    return [*parts, opd, rlvr], controls


def not_noise(table: Table, arm: str, suffix: str = "") -> Control:
    """The null of rank claims: is the update's stable rank that of Gaussian noise?

    A Gaussian keeps one stable rank at any norm, so noise would pass every test of
    constancy; ``own`` holds when the arm has more than half of the Gaussian's.
    """
    ours, noise = (
        last(over_matrices(table, arm, f"{metric}{suffix}", ATTENTION))
        for metric in ("stable_rank", "null_stable_rank")
    )
    bound = math.log(NOISE_SHARE)
    label = f"stable rank, {arm} over Gaussian"
    return Control("null", Part(label, np.log(ours / noise), bound))


def regimes(
    metric: str, band: float, sft_growth: float
) -> Callable[[Table, str], Evidence]:
    """OPD in a band, SFT growing beyond a factor, RLVR shrinking; in that order.

    The Gaussian, the locking nulls, a run on coin flips and, in bf16, rounding alone
    may grow, shrink and differ likewise, or (not the Gaussian, whose rank is another)
    stay in the band.
    """

    def evidence(table: Table, suffix: str = "") -> Evidence:
        @cache
        def path(arm: str, prefix: str = "") -> pd.Series:
            name = prefix + metric + suffix
            return np.log(over_matrices(table, arm, name, ATTENTION))

        @cache
        def change(arm: str, prefix: str = "") -> Values:
            return last(path(arm, prefix)) - first(path(arm, prefix))

        def width(arm: str, prefix: str = "") -> Values:
            by_seed = path(arm, prefix).groupby(level="seed")
            return by_seed.max(skipna=False) - by_seed.min(skipna=False)

        def within(label: str, values: Values) -> Part:
            label = f"{label}, highest over lowest"
            return Part(label, values, -math.inf, math.log(band))

        nulls = GAUSSIAN | LOCKING | (ROUNDING if suffix else {})
        ours = ("rlvr", "opd", "sft")
        growth, controls = ordering(
            change, _twins(change, nulls), ours, MATCHED_ARMS, "over"
        )
        parts = [
            within("opd", width("opd")),
            Part("sft, last over first", change("sft"), math.log(sft_growth)),
            Part("rlvr, last over first", change("rlvr"), -math.inf, 0.0),
            *(Part(f"growth, {part.label}", part.values) for part in growth),
        ]
        grows = Part("sft, last over first", change("sft"))
        shrinks = Part("rlvr, first over last", -change("rlvr"))
        for name, at in nulls.items():
            for part, shown in (
                (grows, change("sft", at)),
                (shrinks, -change("rlvr", at)),
            ):
                controls.append(exceeding("null", part, f"{name} {part.label}", shown))
        label = f"{COIN}, first over last"
        controls.append(exceeding("null", shrinks, label, -change(COIN)))
        controls += [
            Control("null", within(f"{name} opd", width("opd", at)))
            for name, at in LOCKING.items()
        ]
        controls.append(Control("null", within(COIN, width(COIN))))
        return parts, [*controls, not_noise(table, "opd", suffix)]

    return evidence


def norm_decoupled(table: Table, suffix: str = "") -> Evidence:
    """Two ratios of OPD to RLVR at the end: norm well above 1, stable rank near 1."""

    def ratio(metric: str) -> Values:
        opd, rlvr = (
            last(over_matrices(table, arm, metric + suffix, ATTENTION))
            for arm in ("opd", "rlvr")
        )
        return np.log(opd / rlvr)

    margin = math.log(COMPARABLE_FACTOR)
    norm = Part("norm, opd over rlvr", ratio("frobenius_norm"), margin)
    rank = equivalence("stable rank, opd over rlvr", ratio("stable_rank"), margin)
    return [norm, rank], [not_noise(table, arm, suffix) for arm in ("opd", "rlvr")]


def early_lock(table: Table, suffix: str = "") -> Evidence:
    """Sim_K of first checkpoint and last: OPD's level, and OPD above the others.

    A null explains the level unless it is shown to have less than half of it, and a
    difference likewise: chance, the run's own increments turned, a walk, a run on coin
    flips, and what is known of the final subspace without this run.
    """
    metric = "similarity_to_end"

    @cache
    def early(arm: str, prefix: str = "") -> Values:
        return first(over_matrices(table, arm, prefix + metric + suffix, ATTENTION))

    level = Part("opd", early("opd"), LOCKED)
    above = [
        Part(f"opd minus {arm}", early("opd") - early(arm)) for arm in ("sft", "rlvr")
    ]
    shown = {"two random subspaces": early("opd", "null_"), COIN: early(COIN)}
    shown |= {f"{name} opd": early("opd", prefix) for name, prefix in LOCKING.items()}
    shown |= {
        f"{name} as predictor": last(
            over_matrices(table, "opd", at + suffix, ATTENTION)
        )
        for name, at in PREDICTORS.items()
    }
    whole = replace(level, lower=0.0)
    controls = [
        exceeding("null", whole, name, values) for name, values in shown.items()
    ]
    for part, arm in zip(above, ("sft", "rlvr"), strict=True):
        controls += [
            exceeding("null", part, f"{name} {part.label}", _gap(early, "opd", arm, at))
            for name, at in LOCKING.items()
        ]
        label = f"{COIN} minus {arm}"
        controls.append(exceeding("null", part, label, early(COIN) - early(arm)))
    controls += [
        exceeding("matched", above[0], f"{arm} minus sft", early(arm) - early("sft"))
        for arm in MATCHED_ARMS
    ]
    return [*above, level], controls


def _gap(
    level: Callable[[str, str], Values], high: str, low: str, prefix: str
) -> Values:
    return level(high, prefix) - level(low, prefix)


def robust_sparsity(table: Table) -> Evidence:
    """Each variant's sparsity within a margin of OPD's own."""

    def gap(arm: str, prefix: str = "") -> Part:
        ours, theirs = (
            last(over_matrices(table, a, prefix + "sparsity", LAYERS, weighted=True))
            for a in (arm, "opd")
        )
        label = f"{'Gaussian ' if prefix else ''}{arm} minus opd"
        return equivalence(label, ours - theirs, SPARSITY_MARGIN)

    variants = arms_matching(table, VARIANT_ARMS)
    nulls = [Control("null", gap(arm, "null_")) for arm in variants]
    matched = [Control("matched", gap(arm)) for arm in MATCHED_ARMS]
    return [gap(arm) for arm in variants], [*nulls, *matched]


def same_trajectory(table: Table, arm: str, suffix: str = "") -> Part:
    """The arm's stable-rank trajectory is OPD's, within ``SAME_FACTOR``."""
    apart = distance(table, arm, "opd", suffix)
    return Part(f"{arm} against opd", apart, -math.inf, math.log(SAME_FACTOR))


def kept_trajectories(*arms: str) -> Callable[[Table, str], Evidence]:
    """Each arm keeps OPD's trajectory; that says something where others do not.

    The yardstick is RLVR: where it keeps OPD's trajectory too, nothing was kept that
    only distillation has. So it is for the matched arms, and a run on coin flips.
    """

    def evidence(table: Table, suffix: str = "") -> Evidence:
        def keeps(kind: str, arm: str) -> Control:
            return Control(kind, same_trajectory(table, arm, suffix))

        controls = [not_noise(table, "opd", suffix), keeps("null", COIN)]
        controls += [keeps("matched", arm) for arm in ("rlvr", *MATCHED_ARMS)]
        return [same_trajectory(table, arm, suffix) for arm in arms], controls

    return evidence


def off_policy(table: Table, suffix: str = "") -> Evidence:
    """The trajectory is kept, and the norm is larger by less than ``MODEST_FACTOR``.

    In each of three readings of the importance ratio: none, that of student and
    teacher below 2, and the same clipped as RLVR's.
    """
    parts, controls = kept_trajectories(*RATIO_ARMS)(table, suffix)

    def norm(arm: str) -> Values:
        return last(over_matrices(table, arm, "frobenius_norm" + suffix, ATTENTION))

    for arm in RATIO_ARMS:
        ratio = np.log(norm(arm) / norm("opd"))
        label = f"norm, {arm} over opd"
        parts.append(Part(label, ratio, 0.0, math.log(MODEST_FACTOR)))
    return parts, controls


def mixing(table: Table, suffix: str = "") -> Evidence:
    """Kept at alpha 0.75 and 0.5, left at 0.05 and 0.01."""
    parts, controls = kept_trajectories("mix-0.75", "mix-0.50")(table, suffix)
    for arm in ("mix-0.05", "mix-0.01"):
        near = same_trajectory(table, arm, suffix)
        parts.append(Part(near.label, near.values, lower=near.upper))
    return parts, controls


def _intact(table: Table, free: str, suffix: str) -> Part:
    """A confined run keeps what the free one gains."""
    confined = free + suffix
    return Part(f"kept by {confined}", kept_share(table, free, confined), KEPT)


def _spared(table: Table, free: str, beyond: Values | None = None) -> Control:
    """A matched arm that keeps its gain when confined, if it has one to lose.

    Args:
        table: tidy.
        free: the arm, confined to its own early subspace by gradient.
        beyond: what the claim's arm keeps, where keeping more would rule this out.
    """
    own = _intact(table, free, FORMS[0])
    label = f"{own.label}, and more by the claim's"
    more = None if beyond is None else Part(label, beyond - own.values)
    return Control("matched", own, more, gain(table, free))


def sufficient_opd(table: Table) -> Evidence:
    """Projected OPD keeps its gain, in both forms; held against random subspaces.

    And against confined arms of other objectives, RLVR among them: what they keep too
    is not OPD's. Where OPD gains nothing after the branch, no part is decided.
    """
    own = [_intact(table, "opd", form) for form in FORMS]
    asked = benchmarks(table)
    lost = accuracy(table, "opd-projected", asked) - accuracy(table, "opd", asked)
    label = "accuracy on all benchmarks, opd-projected minus opd"
    controls = []
    for form, part in zip(FORMS, own, strict=True):
        random = _intact(table, "opd", f"{form}-random")
        beaten = Part(f"{part.label}, minus random", part.values - random.values)
        controls.append(Control("null", random, beaten))
    kept = own[0].values
    others = ("rlvr", *MATCHED_ARMS)
    controls += [_spared(table, arm, kept) for arm in others]
    return [*own, Part(label, lost, -ACCURACY_MARGIN)], controls


def degrades_sft(table: Table) -> Evidence:
    """Confined SFT loses of its gain, in both forms, and more than OPD does.

    Held against a random subspace, and arms at OPD's budget: if imitation is spared
    there, the budget and not the objective decides. sft-matched may have no power.
    """
    shares = [kept_share(table, "sft", f"sft{form}") for form in FORMS]
    opd = kept_share(table, "opd", "opd-projected")
    parts = [
        Part(f"kept by sft{form}", share, -math.inf, KEPT)
        for form, share in zip(FORMS, shares, strict=True)
    ]
    parts.append(Part("kept by opd-projected minus sft-projected", opd - shares[0]))
    random = kept_share(table, "sft", "sft-projected-random")
    worse = Part("kept by sft-projected-random", random, -math.inf, KEPT)
    beaten = Part("sft-projected minus sft-projected-random", shares[0] - random)
    spared = [_spared(table, arm) for arm in MATCHED_ARMS]
    return parts, [Control("null", worse, beaten), *spared]

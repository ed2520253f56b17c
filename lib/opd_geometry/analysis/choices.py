"""What hangs on a choice: the same comparisons read in every way that was measured.

A comparison is a pair of arms, or an arm and its Gaussian null, in one quantity. It is
read once a value of a choice, and each reading gives a sign by its 95 % interval over
seeds. It *hangs on the choice* when one value gives ``>`` and another ``<``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd

from opd_geometry.analysis.claims import judge
from opd_geometry.analysis.distance import order
from opd_geometry.analysis.evidence import (
    ATTENTION,
    LAYERS,
    Table,
    first,
    last,
    levels_of,
    over_matrices,
)
from opd_geometry.analysis.statements import claim_of
from opd_geometry.analysis.verdicts import Values, interval
from opd_geometry.geometry.comparison import MASK_ALPHA

COURSES = ("rank-band", "hill-mild", "early-lock")  # need more than the end
NULL = "null"  # in the place of the first arm: the Gaussian null of the second one
HANGS, STAYS, OPEN = "hangs on the choice", "does not hang", "undecided"
MLP = ("gate", "up", "down")
# Claims that are judged again, each with the quantity whose choices it needs.
JUDGED = (
    ("sparsity-order", "sparsity"),
    ("rotation-order", "angle_left_mean_deg"),
    ("rotation-order", "angle_right_mean_deg"),
    ("drift-order", "nss"),
    ("principal-depleted", "principal_overlap"),
    ("lowmag-enriched", "low_magnitude_overlap"),
    ("rank-band", "stable_rank"),
    ("norm-decoupled", "frobenius_norm"),
    ("hill-mild", "hill_alpha"),
    ("early-lock", "similarity_to_end"),
)


@dataclass(frozen=True)
class Reading:
    """One value of a choice: which metric, over which matrices, averaged how.

    Attributes:
        value: of the choice, as it is shown.
        metric: its name in the measurements.
        roles: of the matrices averaged over.
        weighted: by the matrices' numbers of entries.
    """

    value: str
    metric: str
    roles: tuple[str, ...] = LAYERS
    weighted: bool = False


@dataclass(frozen=True)
class Choice:
    """A choice that a quantity needs, and every value of it that was measured.

    Attributes:
        quantity: the metric's name without the choice.
        name: what is chosen.
        readings: one a value, in ascending order where there is one.
        default: the value that the other chapters use.
        log: compare as a ratio; shares are compared as they are.
        early: read at the first checkpoint; otherwise at the last.
    """

    quantity: str
    name: str
    readings: tuple[Reading, ...]
    default: str
    log: bool = False
    early: bool = False


def _values(
    quantity: str,
    name: str,
    key: str,
    values: str,
    default: str,
    roles: tuple[str, ...] = LAYERS,
    weighted: bool = False,
    log: bool = False,
    early: bool = False,
) -> Choice:
    """A choice whose values are in the metrics' names, such as ``nss@k=n/4``."""
    readings = tuple(
        Reading(
            value,
            quantity if value == default else f"{quantity}@{key}={value}",
            roles,
            weighted,
        )
        for value in values.split()
    )
    return Choice(quantity, name, readings, default, log, early)


def _matrices(quantity: str, default: str, log: bool, early: bool = False) -> Choice:
    """Attention only, MLP only, or all; and all by their sizes."""
    readings = (
        Reading("attention", quantity, ATTENTION),
        Reading("all", quantity),
        Reading("MLP", quantity, MLP),
        Reading("by size", quantity, weighted=True),
    )
    return Choice(quantity, "which matrices", readings, default, log, early)


_RANKS = "n/32 n/16 n/8 n/4"
_SHARES = "0.1 0.3 0.5 0.7"
CHOICES = (
    Choice(
        "sparsity",
        "tolerance",
        (
            Reading("relative 1e-3", "sparsity", weighted=True),
            Reading("absolute 1e-5", "sparsity@tolerance=1e-5", weighted=True),
        ),
        "relative 1e-3",
    ),
    _values("sparsity", "stored in", "dtype", "bf16 fp16 fp32", "bf16", weighted=True),
    _values("sparsity", "η", "eta", "1e-4 1e-3 1e-2", "1e-3", weighted=True),
    _matrices("sparsity", "by size", log=False),
    _values("angle_left_mean_deg", "k", "k", _RANKS, "n/8", log=True),
    Choice(
        "angle_left_mean_deg",
        "which angle",
        (
            Reading("left mean", "angle_left_mean_deg"),
            Reading("left max", "angle_left_max_deg"),
            Reading("right mean", "angle_right_mean_deg"),
            Reading("right max", "angle_right_max_deg"),
        ),
        "left mean",
        log=True,
    ),
    _matrices("angle_left_mean_deg", "all", log=True),
    _values("angle_right_mean_deg", "k", "k", _RANKS, "n/8", log=True),
    _matrices("nss", "all", log=True),
    _values("low_magnitude_overlap", "α", "alpha", _SHARES, "0.5"),
    _matrices("low_magnitude_overlap", "all", log=False),
    _values("principal_overlap", "α", "alpha", _SHARES, "0.5"),
    _values("principal_overlap", "r", "r", "n/64 n/16 n/8 n/4", "n/64"),
    _matrices("principal_overlap", "all", log=False),
    _matrices("frobenius_norm", "attention", log=True),
    Choice(
        "stable_rank",
        "readout",
        (
            Reading("as trained", "stable_rank", ATTENTION),
            Reading("bf16", "stable_rank_bf16", ATTENTION),
        ),
        "as trained",
        log=True,
    ),
    _matrices("stable_rank", "attention", log=True),
    _values("hill_alpha", "k", "k", f"{_RANKS} n/2", "n/8", ATTENTION, log=True),
    _matrices("hill_alpha", "attention", log=True),
    _values("similarity_to_end", "K", "K", "1 2 4 8 16", "2", ATTENTION, early=True),
    _matrices("similarity_to_end", "attention", log=False, early=True),
)


def level(
    table: Table, arm: str, choice: Choice, reading: Reading, prefix: str = ""
) -> Values:
    """What one reading says of an arm, one number a seed.

    Args:
        table: tidy, or its levels.
        arm: whose.
        choice, reading: one of ``CHOICES``, and one of its readings.
        prefix: ``null_`` for the arm's Gaussian null.

    Returns:
        The mean over the reading's matrices at the choice's moment, in the metric's
        unit; empty without such rows.
    """
    name = prefix + reading.metric
    values = over_matrices(table, arm, name, reading.roles, reading.weighted)
    return first(values) if choice.early else last(values)


def compared(
    table: pd.DataFrame, arms: Iterable[str], choices: Iterable[Choice] = CHOICES
) -> pd.DataFrame:
    """Every pair of arms, and every arm against its null, by every reading.

    Args:
        table: tidy.
        arms: all pairs of them, in this order.
        choices: which.

    Returns:
        One row a reading and comparison: quantity, choice, value, arm, other (the pair;
        for an arm against its null, arm is ``NULL``), difference, low, high (other
        minus arm, mean over seeds and 95 % interval; of logarithms where the choice
        says so), sign (of ``matching.order``). A quantity without null has no such
        rows, and an arm that never moved has none.

    Raises:
        ValueError: no arm has rows of a reading.
    """
    arms = list(arms)
    rows = []
    for choice in choices:
        part = levels_of(_about(table, {r.metric for r in choice.readings}))
        for reading in choice.readings:
            levels = {arm: level(part, arm, choice, reading) for arm in arms}
            nulls = {arm: level(part, arm, choice, reading, "null_") for arm in arms}
            there = [arm for arm in arms if not levels[arm].empty]
            if not there:
                raise ValueError(
                    f"no rows of {reading.metric} for {', '.join(arms)}: expected a "
                    "table of chapters.load; measure the runs again"
                )
            pairs = [(a, b, levels[a], levels[b]) for a, b in combinations(there, 2)]
            pairs += [(NULL, a, nulls[a], levels[a]) for a in there if len(nulls[a])]
            for arm, other, low, high in pairs:
                values = np.log(high / low) if choice.log else high - low
                place = (choice.quantity, choice.name, reading.value, arm, other)
                rows.append((*place, *interval(values), order(values)))
    columns = ["quantity", "choice", "value", "arm", "other", "difference"]
    return pd.DataFrame(rows, columns=[*columns, "low", "high", "sign"])


def _about(table: pd.DataFrame, metrics: Iterable[str]) -> pd.DataFrame:
    """The rows of some metrics, their nulls and the sizes: a table quick to search."""
    metrics = {*metrics, "parameters"}
    names = metrics | {f"null_{metric}" for metric in metrics}
    return table[table["metric"].isin(names)]


def fate(signs: Iterable[str]) -> str:
    """What becomes of one comparison over the values of a choice.

    >>> fate([">", "?", "<"]), fate(["<", "<"]), fate(["<", "?"])
    ('hangs on the choice', 'does not hang', 'undecided')
    """
    seen = set(signs)
    if {">", "<"} <= seen:
        return HANGS
    return STAYS if len(seen) == 1 and "?" not in seen else OPEN


def fates(comparison: pd.DataFrame) -> pd.DataFrame:
    """The rule, applied to every comparison.

    Args:
        comparison: of ``compared``.

    Returns:
        One row a quantity, choice and pair: quantity, choice, arm, other, signs (one
        character a value, in order), fate.
    """
    keys = ["quantity", "choice", "arm", "other"]
    signs = comparison.groupby(keys, sort=False)["sign"].agg("".join)
    return pd.DataFrame({"signs": signs, "fate": signs.map(fate)}).reset_index()


def spans(
    table: pd.DataFrame, arm: str, choices: Iterable[Choice] = CHOICES
) -> pd.DataFrame:
    """How far one arm's number moves over the values of a choice.

    Args:
        table: tidy.
        arm: whose.
        choices: which.

    Returns:
        One row a choice: quantity, choice, default, smallest, largest (means over
        seeds).
    """
    rows = []
    for choice in choices:
        part = levels_of(_about(table, {r.metric for r in choice.readings}), [arm])
        means = {r.value: level(part, arm, choice, r).mean() for r in choice.readings}
        ends = means[choice.default], min(means.values()), max(means.values())
        rows.append((choice.quantity, choice.name, *ends))
    columns = ["quantity", "choice", "default", "smallest", "largest"]
    return pd.DataFrame(rows, columns=columns)


def tally(found: pd.DataFrame) -> pd.DataFrame:
    """How many comparisons of each choice have which fate.

    Args:
        found: of ``fates``.

    Returns:
        One row a quantity and choice, one column a fate.
    """
    keys = ["quantity", "choice"]
    marks = [(found["fate"] == name).rename(name) for name in (STAYS, OPEN, HANGS)]
    counts = pd.concat([found[keys], *marks], axis=1).groupby(keys, sort=False)
    return counts.sum().astype(int)


def reread(table: pd.DataFrame, choice: Choice, reading: Reading) -> pd.DataFrame:
    """The table as if the other reading were the default, for the claims' own rules.

    Matrices of other roles are dropped and the rest take a role that every claim
    averages over; means by size become plain ones of values that carry the weight. A
    mask's overlap is moved so that its share alpha lies where the claims expect it.

    Args:
        table: tidy.
        choice, reading: as in ``level``.

    Returns:
        Rows of the model, and of the matrices: of the quantity (read in the other way),
        of all other metrics as they are.
    """
    kept = table[table["role"].isin([*reading.roles, "model"])]
    kept = kept.astype({"role": object, "metric": object, "matrix": object})
    value, metric = kept["value"].copy(), kept["metric"].copy()
    if reading.weighted:
        sizes = kept[kept["metric"] == "parameters"]
        share = sizes.groupby("matrix")["value"].first()
        value *= kept["matrix"].map(share / share.mean()).fillna(1.0)
    value[metric == "parameters"] = 1.0
    asked = {choice.quantity}
    if choice.quantity.startswith("angle"):  # rotation is judged on the largest angles
        asked = {"angle_left_max_deg", "angle_right_max_deg"}
    parts = [kept.assign(value=value)[~metric.str.removeprefix("null_").isin(asked)]]
    alpha = float(reading.value) if choice.name == "α" else MASK_ALPHA
    for name in asked:
        for prefix in ("", "null_"):
            rows = kept.assign(value=value + MASK_ALPHA - alpha, metric=prefix + name)
            parts.append(rows[metric == prefix + reading.metric])
    found = pd.concat(parts, ignore_index=True)
    return found.assign(role=found["role"].where(found["role"] == "model", "q"))


def verdicts_by_choice(
    table: pd.DataFrame,
    judged: Sequence[tuple[str, str]] = JUDGED,
    choices: Sequence[Choice] = CHOICES,
) -> pd.DataFrame:
    """What the claims' rules say under every reading.

    Args:
        table: tidy.
        judged: claims, each with the quantity whose choices are varied.
        choices: which.

    Returns:
        One row a claim, choice and value: claim, quantity, choice, value, verdict. A
        claim about a course of training is *not measured* by a reading that the table
        has of the last checkpoint only.

    Raises:
        ValueError: unknown claim, or as ``claims.judge``.
    """
    rows = []
    for claim_id, quantity in judged:
        claim = claim_of(claim_id)
        for choice in [c for c in choices if c.quantity == quantity]:
            metrics = {reading.metric for reading in choice.readings}
            part = _about(table, {quantity, *claim.metrics, *metrics})
            part = part[part["arm"].isin([*claim.arms, *claim.control_arms])]
            steps = part.groupby("metric", observed=True)["step"].nunique()
            for reading in choice.readings:
                verdict = "not measured"
                whole = steps.get(reading.metric) == steps.get(quantity)
                if whole or claim_id not in COURSES:
                    verdict = judge(claim, reread(part, choice, reading)).verdict
                rows.append((claim_id, quantity, choice.name, reading.value, verdict))
    columns = ["claim", "quantity", "choice", "value", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def verdict_lines(judged: pd.DataFrame) -> pd.DataFrame:
    """The verdicts by choice, a line a claim and choice.

    A verdict *hangs on the choice* when two values decide it differently; it *does not*
    when all decide it alike; else, with one that is inconclusive, it is *undecided*.

    Args:
        judged: of ``verdicts_by_choice``.

    Returns:
        One row a claim, quantity and choice: claim, quantity, choice, verdicts (each
        with the values that give it) and fate. *Not measured* is left out of both
        unless it is the only one.
    """
    rows = []
    keys = ["claim", "quantity", "choice"]
    for key, group in judged.groupby(keys, sort=False):
        known = group[group["verdict"] != "not measured"]
        by_verdict = (known if len(known) else group).groupby("verdict", sort=False)
        values = by_verdict["value"].agg(", ".join)
        text = "; ".join(f"{verdict}: {value}" for verdict, value in values.items())
        decided = set(values.index) - {"inconclusive", "not measured"}
        alike = STAYS if len(values) == len(decided) == 1 else OPEN
        rows.append((*key, text, HANGS if len(decided) > 1 else alike))
    return pd.DataFrame(rows, columns=[*keys, "verdicts", "fate"])

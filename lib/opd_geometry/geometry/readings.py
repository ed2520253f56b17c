"""What a measured table says: whether and how far, and what differs from its null."""

import math
from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd

from opd_geometry.geometry.defaults import (
    ANGLES,
    ENERGY,
    EXPERT_ROLES,
    LAYER_ROLES,
    STRATA,
)

NULLED = (
    *ANGLES,
    "nss",
    "principal_overlap",
    "low_magnitude_overlap",
    "sparsity_bf16",
    "stable_rank",
)
# Prefix of a null's columns -> what it is.
NULLS = {
    "null": "Gaussian",
    "shuffled": "its entries shuffled",
    "turned": "its directions turned",
    "expected": "unplaced, closed form",
}
ONE_SIDE = 0.9  # share of the matrices that have to lie on one side of their null
FAR_ENOUGH = 0.1  # relative difference of the means
ABOVE, BELOW, AT = "above its null", "below its null", "at its null"


def in_layers(table: pd.DataFrame) -> pd.DataFrame:
    """The matrices of the layers: attention, MLP and experts, no embedding or head.

    Args:
        table: a row a matrix, with its role.

    Returns:
        Those rows; all of them if none is in a layer.
    """
    chosen = table[table["role"].isin([*LAYER_ROLES, *EXPERT_ROLES])]
    return chosen if len(chosen) else table


def standing_for(table: pd.DataFrame) -> np.ndarray:
    """How many matrices each one stands for: M_h / m_h of its stratum in a sample.

    Args:
        table: of ``measure``.

    Returns:
        A number a row; 1 where the table is no sample.
    """
    if not {*STRATA} <= set(table):
        return np.ones(len(table))
    return (table[STRATA[1]] / table[STRATA[2]]).to_numpy(float)


def sample_of(table: pd.DataFrame) -> str:
    """``a sample of n of N matrices`` for some of ``measure --sample``; else empty.

    Args:
        table: of ``measure``, or its rows of some parts or roles.
    """
    if not {*STRATA} <= set(table):
        return ""
    whole = int(table.drop_duplicates(STRATA[0])[STRATA[1]].sum())
    return f"a sample of {len(table)} of {whole} matrices" * (len(table) < whole)


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> float:
    """Mean of numbers by what they stand for; plain, to the bit, where all do alike."""
    if not len(values):
        return math.nan
    if (weights == weights[0]).all():
        return float(values.mean())
    return float(np.average(values, weights=weights))


def gaussian_stable_rank(rows: pd.Series, cols: pd.Series) -> pd.Series:
    """Stable rank of a Gaussian matrix of independent entries, by its shape.

    n m / (sqrt n + sqrt m)^2, from the limit of its largest singular value

    Args:
        rows, cols: n and m.

    Source: Geman (1980), the norm of a random matrix.
    """
    n, m = rows.astype(float), cols.astype(float)
    return n * m / (np.sqrt(n) + np.sqrt(m)) ** 2


def with_shape_nulls(table: pd.DataFrame) -> pd.DataFrame:
    """The table with `null_stable_rank`, where shapes are known and it has none."""
    if "null_stable_rank" in table or not {"rows", "cols"} <= set(table):
        return table
    null = gaussian_stable_rank(table["rows"], table["cols"])
    return table.assign(null_stable_rank=null)


def against_null(
    table: pd.DataFrame, names: Sequence[str] = NULLED, null: str = "null"
) -> pd.DataFrame:
    """Which diagnostics stand out from their null, by a rule.

    A diagnostic *stands out* if at least ``ONE_SIDE`` of the matrices lie on the same
    side of their own null, and its mean differs from the null's by at least
    ``FAR_ENOUGH`` of it and by more than its detection limit: what a mean over so many
    matrices, each against one drawn null, would show by chance in 19 of 20 cases.
    Matrices of one model are not independent, so this is a rule to sort by and no
    significance test.

    Args:
        table: of ``measure``.
        names: columns to look at; each is left out that has no null here.
        null: prefix of the null's columns.

    Returns:
        One row a diagnostic: matrices (that have both), mean, null, ratio, limit (of
        detection, as a share of the null; NaN for a single matrix), above (share of
        the matrices above their null, ties counted half) and verdict
        (``above its null``, ``below its null`` or ``at its null``). Means are plain,
        over the matrices that have both, or in a sample by what each stands for; no
        rows for a table without nulls.
    """
    columns = ["matrices", "mean", "null", "ratio", "limit", "above", "verdict"]
    table = with_shape_nulls(table)
    rows = {}
    for name in names:
        pair = [name, f"{null}_{name}"]
        if not {*pair} <= set(table):
            continue
        both = table[pair].to_numpy(float)
        known = np.isfinite(both).all(1)
        if not known.any():
            continue
        both, weights = both[known], standing_for(table)[known]
        value, other = both.T
        higher = (value > other) + 0.5 * (value == other)
        above = weighted_mean(higher, weights)
        mean, centre = (weighted_mean(side, weights) for side in (value, other))
        ratio = mean / centre if centre else math.nan
        half = _half_width(value - other, weights)
        limit = half / centre if centre else math.nan
        verdict = _side(ratio, above, limit)
        rows[name] = [len(both), mean, centre, ratio, limit, above, verdict]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def against_nulls(table: pd.DataFrame) -> pd.DataFrame:
    """`against_null` for every null, and for the energies, whose null is chance.

    Args:
        table: of ``measure``. An expected sparsity that was inferred from the density
            is left out, being equal.

    Returns:
        Its rows, with two columns before: diagnostic, and against, of `NULLS` or
        ``chance``.
    """
    if "expected_from" in table:
        free = table["expected_from"].eq("norm")
        masked = table["sparsity_bf16"].where(free)
        whole = table.assign(sparsity_bf16=masked)
    else:
        whole = table
    found = []
    for prefix, label in NULLS.items():
        rows = against_null(table if prefix != "expected" else whole, null=prefix)
        found.append(rows.assign(against=label))
    found.append(against_null(table, ENERGY).assign(against="chance"))
    together = pd.concat([rows for rows in found if len(rows)] or found[:1])
    together.insert(0, "against", together.pop("against"))
    return together.rename_axis("diagnostic").reset_index()


def _half_width(differences: np.ndarray, weights: np.ndarray) -> float:
    """Half of the 95 % interval of a mean, by Student's law; NaN for a single one."""
    n = len(differences)
    if n < 2:
        return math.nan
    if (weights != weights[0]).any():  # as drawn with replacement, which is no less
        apart = weights * (differences - weighted_mean(differences, weights))
        spread = math.sqrt(float((apart**2).sum()) * n / (n - 1))
        return student(n - 1) * spread / float(weights.sum())
    return student(n - 1) * float(differences.std(ddof=1)) / math.sqrt(n)


def student(degrees: int) -> float:
    """The 97.5 % quantile of Student's law, to 1 % from 2 degrees of freedom on.

    By Cornish and Fisher's expansion about the Gaussian: SciPy takes longer to load.

    >>> round(student(3), 2), round(student(1000), 3)
    (3.18, 1.962)
    """
    if degrees == 1:
        return 12.706
    z, v = 1.959964, float(degrees)
    terms = (
        (z**3 + z) / 4 / v,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96 / v**2,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384 / v**3,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160 / v**4,
    )
    return z + sum(terms)


def _side(ratio: float, above: float, limit: float) -> str:
    """The verdict of ``against_null``."""
    if abs(ratio - 1.0) <= limit:
        return AT
    if ratio >= 1.0 + FAR_ENOUGH and above >= ONE_SIDE:
        return ABOVE
    if ratio <= 1.0 - FAR_ENOUGH and 1.0 - above >= ONE_SIDE:
        return BELOW
    return AT


# --- in sentences --------------------------------------------------------------------

# Half a step of a number of 1 in each format: what rounding to it moves at most.
ROUNDOFF = {"bfloat16": 2.0**-9, "float16": 2.0**-12, "float32": 2.0**-25}
# Share of equal bf16 values from which two checkpoints may be one. One value in 8 lies
# half a bf16 step off in fp16, and is rounded twice: of these one half goes astray.
SAME = {"bfloat16": 0.9999, "float16": 0.92}


def sentences(
    table: pd.DataFrame, lr: float | None = None, steps: int | None = None
) -> list[str]:
    """Three sentences: whether the weights changed, how far, and what stands out.

    Args:
        table: of ``measure``.
        lr: of the training in between, to say how far in its units; None if unknown.
        steps: T, of the optimizer.

    Returns:
        Them, whatever the table lacks.
    """
    return [whether(table), how_far(table, lr, steps), what_stands_out(table)]


def whether(table: pd.DataFrame) -> str:
    """Did the weights change at all; rounding is no change."""
    norms = table["frobenius_norm"].dropna()
    known = table["sparsity_bf16"].dropna()
    moved = norms if len(norms) else known < 1.0
    n, total = int((moved > 0).sum()), len(table)
    if not len(moved):
        return "Whether the weights changed cannot be said: no matrix has a norm."
    drawn = sample_of(table)
    if n == 0 and len(moved) == total:
        every = f"all of {drawn}" if drawn else f"all {total} matrices"
        return f"The weights did not change: {every} are equal."
    kinds = _kinds(table)
    mixed = len(kinds) > 1
    share = _weighted(table, "sparsity_bf16")
    entries = "all entries" if drawn else "their entries"
    same = f"; {100 * share:.1f} % of {entries} are the same in bf16" * (share == share)
    if drawn:
        same += f", estimated from {drawn}"
    if mixed and _is_rounding(table, kinds):
        return (
            f"The weights did not change: stored as {' and '.join(kinds)}, they differ "
            "by no more than the rounding of one into the other: no training that "
            "shows."
        )
    matrices = "sampled matrices" if drawn else "matrices"
    said = f"{n} of {total} {matrices} changed{same}."
    if mixed:
        said += (
            f" They are stored as {' and '.join(kinds)}, and the rounding of one into "
            "the other is part of what is measured: compare them in one format."
        )
    return said


def _kinds(table: pd.DataFrame) -> list[str]:
    """Formats of which a matrix has one before and another after; () if none has."""
    names = ["dtype_before", "dtype_after"]
    if not {*names} <= set(table):
        return []
    mixed = table[table[names[0]].astype(str) != table[names[1]].astype(str)]
    return sorted({str(v) for name in names for v in mixed[name]})


def _is_rounding(table: pd.DataFrame, kinds: Sequence[str]) -> bool:
    """Whether all that was measured is no more than rounding to the coarser format."""
    most = max(ROUNDOFF.get(kind, 0.0) for kind in kinds)
    distance = table["relative_norm"].dropna()
    share = table["sparsity_bf16"].dropna()
    if not len(distance) or (distance > most).any():
        return False
    least = min((SAME[kind] for kind in kinds if kind in SAME), default=1.0)
    return bool(len(share) and (share >= least).all())


def _weighted(table: pd.DataFrame, name: str) -> float:
    """Mean by the numbers of entries; NaN if none is known."""
    known = table[table[name].notna()]
    weights = known["rows"].astype(float) * known["cols"].astype(float)
    weights *= standing_for(known)
    total = float(weights.sum())
    return float((known[name] * weights).sum()) / total if total else math.nan


def how_far(table: pd.DataFrame, lr: float | None, steps: int | None) -> str:
    """How far the weights went, relative to themselves and in steps of the optimizer.

    rms(dW) / (lr sqrt T): 1 is what T independent steps of size lr give, as of Adam
    with gradients that are noise; sqrt(T) is T steps in one direction.
    """
    chosen = in_layers(table)
    known = chosen[chosen["relative_norm"].notna()]
    relative = known["relative_norm"]
    if not len(relative):
        return "How far cannot be said: no matrix has a relative norm."
    which = "matrices" if len(chosen) == len(table) else "matrices of the layers"
    over, drawn = f"over {len(relative)} {which}", sample_of(chosen)
    if drawn:
        over = f"estimated from {drawn}{which.removeprefix('matrices')}"
    mean = weighted_mean(relative.to_numpy(float), standing_for(known))
    said = f"They went {mean:.3g} of their own norm, a mean {over}"
    if lr is None or steps is None:
        return f"{said}."
    norms = chosen["frobenius_norm"]
    entries = chosen["rows"].astype(float) * chosen["cols"].astype(float)
    times = standing_for(chosen)
    squares, counted = (norms**2 * times).sum(), (entries * times)[norms.notna()].sum()
    moved = math.sqrt(float(squares) / float(counted))
    units = moved / (lr * math.sqrt(steps))
    each = norms / entries**0.5 / (lr * steps)
    return (
        f"{said}, or {units:.3g} lr √T a weight (1: {steps} independent steps of "
        f"{lr:g}; {math.sqrt(steps):.3g}: all in one direction)."
        + too_far(int((each > 1.0).sum()), len(each))
    )


def too_far(n: int, total: int) -> str:
    """That weights went farther than steps of at most lr can take them, if they did."""
    if not n:
        return ""
    return (
        f" Warning: {n} of {total} went farther than all steps in one direction, which "
        "Adam's cannot by more than a little: correct the learning rate or the number "
        "of steps, or these are not the ends of one training."
    )


def what_stands_out(table: pd.DataFrame) -> str:
    """Which diagnostics differ from an unplaced update's, beyond their limits."""
    chosen = in_layers(table)
    found, part = against_null(chosen), sample_of(chosen)
    drawn = [name for name in found.index if name != "stable_rank"]
    if not len(found):
        return "Where the update went cannot be said: no diagnostic has a null here."

    def named(rows: pd.DataFrame) -> str:
        return ", ".join(
            f"{name} {row['ratio']:.3g}×{_limit(row['limit'])}"
            for name, row in rows.iterrows()
        )

    beyond = (found["ratio"] - 1.0).abs() > found["limit"]
    differ, rest = found[beyond], found[~beyond]
    said = (
        "Beyond their detection limits differ from an unplaced update of this size: "
        f"{named(differ) or 'none'}"
    )
    said += f"; not beyond: {named(rest)}" if len(rest) else ""
    said += f" (estimated from {part})." if part else "."
    if not drawn:
        said += " Only the stable rank has a null here; the others need --null."
    return said


def _limit(limit: float) -> str:
    return f" (±{100 * limit:.2g} %)" if limit == limit else ""


def of_parts(table: pd.DataFrame, parts: Collection[str] | None = None) -> pd.DataFrame:
    """Rows of some parts of a model.

    Args:
        table: of ``measure`` or ``trajectory``.
        parts: which; None for the language model, or all where a table has none or
            knows no parts.

    Raises:
        ValueError: the table has no row of them.
    """
    if parts is None:
        if "part" not in table:
            return table
        language = table[table["part"].isna() | (table["part"] == "language")]
        return language if len(language) else table
    # Tables of earlier builds know of language models alone.
    known = table["part"].fillna("language") if "part" in table else None
    found = table if known is None else table[known.isin([*parts])]
    if found.empty or (known is None and "language" not in parts):
        there = ["language"] if known is None else sorted({*known.astype(str)})
        raise ValueError(
            f"no matrix of the parts {', '.join(parts)}, expected some of "
            f"{', '.join(there)}; see the column part"
        )
    return found

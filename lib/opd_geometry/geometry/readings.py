"""What a measured table says: which diagnostics differ from their null."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from opd_geometry.geometry.defaults import EXPERT_ROLES, LAYER_ROLES

ANGLES = (
    "angle_left_mean_deg",
    "angle_left_max_deg",
    "angle_right_mean_deg",
    "angle_right_max_deg",
)
NULLED = (
    *ANGLES,
    "nss",
    "principal_overlap",
    "low_magnitude_overlap",
    "sparsity_bf16",
    "stable_rank",
)
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


def against_null(table: pd.DataFrame, names: Sequence[str] = NULLED) -> pd.DataFrame:
    """Which diagnostics stand out from their null, by a rule.

    A diagnostic *stands out* if at least ``ONE_SIDE`` of the matrices lie on the same
    side of their own null, and its mean differs from the null's by at least
    ``FAR_ENOUGH`` of it. Matrices of one model are not independent, so this is a rule
    to sort by and no significance test.

    Args:
        table: of ``measure``.
        names: columns to look at; each is left out that has no null here.

    Returns:
        One row a diagnostic: matrices (that have both), mean, null, ratio, above
        (share of the matrices above their null, ties counted half) and verdict
        (``above its null``, ``below its null`` or ``at its null``). Means are plain,
        over the matrices that have both; no rows for a table without nulls.
    """
    columns = ["matrices", "mean", "null", "ratio", "above", "verdict"]
    table = with_shape_nulls(table)
    rows = {}
    for name in names:
        pair = [name, f"null_{name}"]
        if not {*pair} <= set(table):
            continue
        both = table[pair].to_numpy(float)
        both = both[np.isfinite(both).all(1)]
        if not len(both):
            continue
        value, null = both.T
        above = float(((value > null) + 0.5 * (value == null)).mean())
        ratio = float(value.mean() / null.mean()) if null.mean() else float("nan")
        verdict = _side(ratio, above)
        means = float(value.mean()), float(null.mean())
        rows[name] = [len(both), *means, ratio, above, verdict]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def _side(ratio: float, above: float) -> str:
    """The verdict of ``against_null``."""
    if ratio >= 1.0 + FAR_ENOUGH and above >= ONE_SIDE:
        return ABOVE
    if ratio <= 1.0 - FAR_ENOUGH and 1.0 - above >= ONE_SIDE:
        return BELOW
    return AT

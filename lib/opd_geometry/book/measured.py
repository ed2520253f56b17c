"""A table of ``measure`` or ``trajectory``, checked, and in the book's own form."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd

from opd_geometry.book import figures
from opd_geometry.geometry.defaults import EXPERT_ROLES, LAYER_ROLES
from opd_geometry.geometry.readings import ENERGY, NULLS, of_parts, with_shape_nulls
from opd_geometry.geometry.tables import read_table
from opd_geometry.printing import visible

YOURS = "yours"
# Columns that no page can do without; every other section is drawn if it can be.
PAIR_BASE = ("matrix", "role", "layer", "rows", "cols", "sparsity_bf16")
TRAJECTORY_BASE = (
    "step",
    "matrix",
    "role",
    "layer",
    "stable_rank",
    "similarity_to_end",
)
IDENTITY = ("step", "matrix", "role", "layer", "rows", "cols")  # never empty
# Whole numbers, and where they lie in anything that was measured.
BOUNDS = {
    "step": (0, 2**53),
    "layer": (-1, 2**53),
    "rows": (1, 2**40),
    "cols": (1, 2**40),
}
INFINITE = "infinite"  # columns of a table of which some values were left out
# The names of these tables -> the book's own.
RENAMED = {
    "sparsity_bf16": "sparsity",
    "null_sparsity_bf16": "null_sparsity",
    "update_density": "density",
    "null_update_density": "null_density",
    "similarity_null": "null_similarity_to_end",
}
METRICS = tuple(figures.METRIC_LABELS)
TIDY = ["run", "arm", "seed", "step", "matrix", "role", "layer", "metric", "value"]
PLACED = (*LAYER_ROLES, *EXPERT_ROLES)  # roles of the matrices of the layers
ROLE_ORDER = (*PLACED, "router", "embed", "head", "other")
MAP_LAYERS = 96  # lines of a map; more layers than that share lines


def measured_table(
    path: str | Path, parts: Collection[str] | None = None
) -> pd.DataFrame:
    """A table of ``opd-geometry measure`` or ``trajectory``.

    Args:
        path: .csv, .parquet or .json.
        parts: of the model; None for the language model, if it is in the table.

    Returns:
        The table, with at least the columns of one of the two kinds, its numbers
        checked to be numbers.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, an unreadable file, columns or cells missing, no
            rows, an unknown role, no matrix of these parts.
    """
    path = Path(path)
    table = _checked(read_table(path), path)
    try:
        found = of_parts(table, parts)
    except ValueError as error:
        raise ValueError(f"{path} has {error}") from error
    found.attrs = table.attrs
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _checked(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The table, if it is one of the two kinds and its numbers are numbers."""
    base = TRAJECTORY_BASE if "step" in table else PAIR_BASE
    missing = [name for name in base if name not in table]
    if missing:
        kind = "trajectory" if base is TRAJECTORY_BASE else "measure"
        raise ValueError(
            f"{path} has no column {', '.join(missing)}, expected a table of "
            f"opd-geometry {kind}; measure again"
        )
    if table.empty:
        raise ValueError(f"{path} has no rows, expected one a matrix; measure again")
    identity = [name for name in IDENTITY if name in table]
    empty = [name for name in identity if table[name].isna().any()]
    if empty:
        raise ValueError(
            f"{path} has rows without {', '.join(empty)}, expected one in every row; "
            "measure again"
        )
    for name in ("matrix", "role"):
        if any(isinstance(value, bytes) for value in table[name]):
            raise ValueError(
                f"{path}: column {name} holds bytes, expected text; measure again"
            )
        table[name] = table[name].astype(str)
    twice = table.duplicated([n for n in ("matrix", "step") if n in base])
    if twice.any():
        raise ValueError(
            f"{path} has {visible(table['matrix'][twice.idxmax()])} twice, expected "
            "each matrix once (and step, of a run); measure again"
        )
    own = [*METRICS, *RENAMED, *ENERGY]
    nulls = [f"{null}_{name}" for null in NULLS for name in own]
    for name in table.columns.intersection([*own, *nulls, *base]):
        if name not in ("matrix", "role"):
            table[name] = _numbers(table[name], path)
    numbers = table.select_dtypes("float")
    infinite = np.isinf(numbers)
    table[numbers.columns] = numbers.where(~infinite)
    table.attrs[INFINITE] = [str(n) for n in numbers.columns[infinite.any()]]
    unknown = sorted({*table["role"]} - {*ROLE_ORDER})
    if unknown:
        raise ValueError(
            f"{path} has the role {visible(', '.join(unknown))}, expected some of "
            f"{', '.join(ROLE_ORDER)}; measure again"
        )
    return table


def _numbers(column: pd.Series, path: Path) -> pd.Series:
    """A column as numbers, those of its identity as whole ones in bounds."""
    name = str(column.name)
    try:
        if column.dtype.kind in "mM":
            raise ValueError("dates")
        numbers = pd.to_numeric(column).astype(float)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path}: column {name} holds {visible(_first_line(error))}, expected "
            "numbers; measure again"
        ) from error
    if name not in BOUNDS:
        return numbers
    low, high = BOUNDS[name]
    wrong = numbers[~numbers.between(low, high) | (numbers % 1 != 0)]
    if len(wrong):
        raise ValueError(
            f"{path}: column {name} holds {wrong.iloc[0]:g}, expected whole numbers "
            f"from {low} to {high:g}; measure again"
        )
    return numbers.astype(int)


def widened(table: pd.DataFrame) -> pd.DataFrame:
    """A table with a row a matrix, its columns named as the book's own metrics.

    Args:
        table: of `measured_table`, of either kind.

    Returns:
        The same rows; a pair stands at step 1. The stable rank has the null of a
        Gaussian matrix of its shape, n m / (sqrt n + sqrt m)^2, where that is known.
    """
    there = {old: new for old, new in RENAMED.items() if old in table}
    wide = table.drop(columns=[new for new in there.values() if new in table])
    wide = wide.rename(columns=there)
    if "step" not in wide:
        wide = wide.assign(step=1)
    if "null_sparsity" in wide and "null_density" not in wide:
        wide = wide.assign(null_density=1.0 - wide["null_sparsity"])
    if {"rows", "cols"} <= set(wide):
        wide = wide.assign(
            parameters=wide["rows"].astype(float) * wide["cols"].astype(float)
        )
    return with_shape_nulls(wide)


def tidy(table: pd.DataFrame) -> pd.DataFrame:
    """A table with a row a matrix, as the book's own figures take it.

    Args:
        table: of `measured_table`, of either kind.

    Returns:
        `widened`, melted to the columns of ``measure.COLUMNS``, arm ``yours``, seed 0.
    """
    return _melted(widened(table))


def _melted(wide: pd.DataFrame) -> pd.DataFrame:
    known = {*figures.with_null(METRICS), "parameters"}
    keys = ["step", "matrix", "role", "layer"]
    long = wide.melt(
        keys, [name for name in wide if name in known], "metric", "value"
    ).assign(run=YOURS, arm=YOURS, seed=0)
    # A mean is over the matrices that have the metric, as in the summary of `measure`.
    return long[TIDY].astype({"value": float}).dropna(subset="value")


def by_place(wide: pd.DataFrame) -> pd.DataFrame:
    """Means by layer and role, of the matrices of the layers, as figures take them.

    Args:
        wide: `widened`, of a pair.

    Returns:
        Tidy, one matrix a layer and role. Of more than ``MAP_LAYERS`` layers, equally
        many neighbours go by the first one's number.
    """
    placed = wide[wide["role"].isin(PLACED) & (wide["layer"] >= 0)]
    layers = np.unique(placed["layer"])
    each = -(-len(layers) // MAP_LAYERS) or 1
    first = layers[np.searchsorted(layers, placed["layer"]) // each * each]
    known = {*figures.with_null(METRICS), "parameters"}
    names = [name for name in wide if name in known]
    means = placed.assign(layer=first).groupby(["layer", "role"])[names].mean()
    means = means.reset_index().assign(step=1)
    places = means["role"] + "." + means["layer"].astype(str)
    return _melted(means.assign(matrix=places))

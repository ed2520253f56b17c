"""Committed tables that are of no single run: pairs of runs, gradients at a start.

One file a kind and profile, with its digest beside it; whole or not at all. So have
tables of text: what a paper prints, what updates without place give.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from opd_geometry.experiments.records import check_seal, locked, sealing
from opd_geometry.files import clear_write_errors, data_directory, shelves


def table_path(kind: str, profile: str, folder: Path | None = None) -> Path:
    """Where a table lies; without a folder on the first shelf that has it."""
    name = Path("measurements", kind, f"{profile}.parquet")
    if folder is not None:
        return folder / name
    places = [shelf / name for shelf in shelves()]
    return next((place for place in places if place.exists()), places[0])


def commit_table(
    kind: str, profile: str, table: pd.DataFrame, keys: Sequence[str]
) -> Path:
    """Add rows to a committed table; those of the same keys are replaced.

    Words are stored once, the column ``value`` to seven digits. Two processes that add
    at once wait for each other.

    Args:
        kind, profile: which table.
        table: the rows.
        keys: columns that say what a row is of, such as ``run``.

    Raises:
        ValueError: it cannot be written, or what is there is damaged.
    """
    path = table_path(kind, profile, data_directory())
    with clear_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock"), str(path)):
            kept = committed_table(kind, profile, list(table.columns))
            old, new = (part[[*keys]].astype(str) for part in (kept, table))
            kept = kept[
                ~pd.MultiIndex.from_frame(old).isin(pd.MultiIndex.from_frame(new))
            ]
            parts = [part for part in (kept, table) if len(part)]
            whole = pd.concat(parts, ignore_index=True) if parts else table
            with sealing(path) as draft:
                _narrow(whole).to_parquet(draft, index=False, compression="zstd")
    return path


def committed_csv(path: Path, **options: Any) -> pd.DataFrame:
    """A committed table of text.

    Args:
        path: the file; its digest lies beside it, as ``sha256sum NAME`` prints it.
        options: of ``pandas.read_csv``.

    Raises:
        ValueError: the file is not as it was written, or cannot be read.
    """
    try:
        path.stat()  # a missing file is called that
        if not check_seal(path):
            raise ValueError(f"its digest {path.name}.sha256 is missing")
        table: pd.DataFrame = pd.read_csv(path, **options)
        return table
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(
            f"{path} is damaged: {said}; take it from version control, or where it "
            f"was changed on purpose: sha256sum {path.name} > {path.name}.sha256"
        ) from error


def _narrow(table: pd.DataFrame) -> pd.DataFrame:
    words = [n for n in table if not pd.api.types.is_numeric_dtype(table[n])]
    return table.astype({**dict.fromkeys(words, "category"), "value": "float32"})


def committed_table(kind: str, profile: str, columns: Sequence[str]) -> pd.DataFrame:
    """A committed table; empty when there is none.

    Raises:
        ValueError: the file is not as it was written, or lacks a column.
    """
    path = table_path(kind, profile)
    if not path.exists():
        return pd.DataFrame(columns=list(columns))
    try:
        if not check_seal(path):
            raise ValueError("its digest is missing")
        return pd.read_parquet(path)[list(columns)].astype({"value": float})
    except Exception as error:  # pandas and pyarrow have many kinds of their own
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path} is damaged: {said}; take it from version control, or measure "
            f"the {kind} again"
        ) from error

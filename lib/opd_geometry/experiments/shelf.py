"""Committed tables that are of no single run: pairs of runs, gradients at a start.

One file a kind and profile, with its digest beside it; whole or not at all.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from opd_geometry.experiments.records import check_seal, sealing
from opd_geometry.files import clear_write_errors, data_directory, shelves


def table_path(kind: str, profile: str, folder: Path | None = None) -> Path:
    """Where a table lies; without a folder on the first shelf that has it."""
    name = Path("measurements", kind, f"{profile}.parquet")
    if folder is not None:
        return folder / name
    places = [shelf / name for shelf in shelves()]
    return next((place for place in places if place.exists()), places[0])


def commit_table(kind: str, profile: str, table: pd.DataFrame) -> Path:
    """Store a table: words once, the column ``value`` to seven digits.

    Raises:
        ValueError: it cannot be written.
    """
    path = table_path(kind, profile, data_directory())
    words = [name for name in table if not pd.api.types.is_numeric_dtype(table[name])]
    narrow = table.astype({**dict.fromkeys(words, "category"), "value": "float32"})
    with clear_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with sealing(path) as draft:
            narrow.to_parquet(draft, index=False, compression="zstd")
    return path


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

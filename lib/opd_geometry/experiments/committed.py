"""Committed measurements: which there are, and their tables, checked as they are read.

One tidy table, one value a row (see ``measure``):

    run, arm, seed, step, matrix, role, layer, metric, value

Reading needs no torch: a table is found by what its run is described as.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from opd_geometry.experiments.descriptions import Run
from opd_geometry.experiments.listing import (
    DIGESTS,
    PROVENANCE,
    TABLE_DIGEST,
    read_listing,
)
from opd_geometry.experiments.predictors import committed_pairs, with_predictors
from opd_geometry.experiments.profiles import build, settings_of
from opd_geometry.files import data_directory, shelves

COLUMNS = ["run", "arm", "seed", "step", "matrix", "role", "layer", "metric", "value"]


WORDS = ["run", "arm", "matrix", "role", "metric"]


RESTORE = "take it from version control, or commit the runs again"


def provenance_path() -> Path:
    """Where runs are committed to: the list of all, their tables beside it."""
    return data_directory() / "measurements" / "runs.csv"


def _listings() -> list[tuple[Path, pd.DataFrame]]:
    """The lists of committed runs that there are, the data directory's first."""
    found = []
    for shelf in shelves():
        path = shelf / "measurements" / "runs.csv"
        if path.exists():
            with damage(path):
                found.append((path, read_listing(path)))
    return found


def committed_provenance() -> pd.DataFrame:
    """One row a committed run: run, arm, seed, steps, seconds, versions, machine.

    Raises:
        ValueError: a list cannot be read, or is not as it was written.
    """
    tables = [table for _, table in _listings() if len(table)]
    if not tables:
        return pd.DataFrame(columns=PROVENANCE)
    together = pd.concat(tables, ignore_index=True).drop(columns=[*DIGESTS])
    return together.drop_duplicates("run", ignore_index=True)


def committed_path(run: Run) -> Path:
    """Where the table of a committed run lies."""
    return _place_and_digest(run, _digests())[0]


def _digests() -> dict[str, tuple[Path, str]]:
    """By run: the first list that names it, and its table's digest."""
    found: dict[str, tuple[Path, str]] = {}
    for path, table in _listings():
        for run, digest in zip(table["run"], table[TABLE_DIGEST], strict=True):
            found.setdefault(str(run), (path, str(digest)))
    return found


def _place_and_digest(
    run: Run, digests: Mapping[str, tuple[Path, str]]
) -> tuple[Path, str]:
    """Path and digest of a run's table."""
    listing, digest = digests.get(run.key(), (provenance_path(), ""))
    return listing.with_name(f"{run.name}.parquet"), digest


def committed_table(run: Run) -> pd.DataFrame:
    """The table of a run that is listed as committed, words as categories.

    Raises:
        ValueError: its content is not what was committed, it cannot be read, or it
            holds other rows than those of this run.
    """
    return _tidy([run]).copy()  # what arrow made is read-only


def _tidy(runs: Sequence[Run]) -> pd.DataFrame:
    """Committed tables below each other, each word stored once.

    Raises:
        ValueError: as ``committed_table``.
    """
    digests = _digests()
    places = {run.key(): _place_and_digest(run, digests) for run in runs}
    read = pa.concat_tables([_read(run, *places[run.key()]) for run in runs])
    table = read.unify_dictionaries().to_pandas(split_blocks=True, self_destruct=True)
    twice = table[_repeated(table)]
    if len(twice):
        with damage(places[str(twice["run"].iloc[0])][0]):
            raise ValueError("it has two values of one matrix, step and metric")
    return table


def _read(run: Run, path: Path, digest: str) -> pa.Table:
    """A run's table as it was committed; its words in codes."""
    with damage(path):
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError("its content has another digest than runs.csv says")
        table = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
        lacking = [name for name in COLUMNS if name not in table.column_names]
        if lacking:
            raise ValueError(f"it has no column {', '.join(lacking)}")
        table = pa.table({n: _coded(table[n], n) for n in COLUMNS})
        own = {"run": run.key(), "arm": run.arm, "seed": run.seed}
        if any(table[n].unique().to_pylist() != [v] for n, v in own.items()):
            raise ValueError(f"its rows are not those of run {run.name}")
    return table


def _coded(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """A column in the type that all tables share; words as codes."""
    if name not in WORDS:
        kind = pa.float64() if name == "value" else pa.int64()
        try:
            numbers = column.cast(kind)
        except pa.ArrowInvalid as error:
            raise ValueError(f"its column {name} holds no {kind}: {error}") from error
        if numbers.null_count and name != "value":
            raise ValueError(f"its column {name} has holes")
        return numbers
    codes = column.dictionary_encode().combine_chunks()
    words = codes.dictionary.cast(pa.string())
    return pa.chunked_array(
        [pa.DictionaryArray.from_arrays(codes.indices.cast(pa.int32()), words)]
    )


def _repeated(table: pd.DataFrame) -> np.ndarray:
    """Which rows have a run, matrix, step and metric that a row above them has."""
    places = table["step"].to_numpy(copy=True)
    for name in ("run", "matrix", "metric"):
        word = table[name].array
        places *= len(word.categories) + 1
        places += word.codes
        places += 1  # a missing word has the code -1
    ordered = np.sort(places)  # quicker than a table of them, which is hardly needed
    if not (ordered[1:] == ordered[:-1]).any():
        return np.zeros(len(places), dtype=bool)
    repeated: np.ndarray = pd.Index(places).duplicated()
    return repeated


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """Turn whatever is wrong with a committed file into one clear line."""
    try:
        yield
    except Exception as error:  # pandas and pyarrow have many kinds of their own
        absent = isinstance(error, FileNotFoundError)
        said = " ".join(str(error).split()) or type(error).__name__
        what = "missing" if absent else f"damaged: {said}"
        raise ValueError(f"{path} is {what}; {RESTORE}") from error


def _refuse_unlisted() -> None:
    """Refuse tables that no line of their list names: the list has lost lines."""
    for path, table in _listings():
        keys = set(table["run"])
        for found in sorted(path.parent.glob("*.parquet")):
            if found.stem.rpartition("-")[2] not in keys:
                raise ValueError(
                    f"{path} does not name {found.name} beside it, expected every "
                    f"table; {RESTORE}, or remove the table"
                )


def committed_runs(profile: str) -> list[Run]:
    """A profile's runs that are listed as committed."""
    rows = committed_provenance()
    listed = set(rows["run"])
    return [
        run
        for seed in sorted(set(rows["seed"]))
        for arm in settings_of(profile).arms
        if (run := build(profile, arm, int(seed))).key() in listed
    ]


def committed(profile: str, arms: Iterable[str] = ("*",)) -> pd.DataFrame:
    """The table of a profile's committed runs, and how near their ends are to others'.

    Args:
        profile: of the runs.
        arms: shell patterns; only the runs of these arms. The ends of all others are
            still held against theirs.

    Returns:
        With ``COLUMNS``, words as categories; empty when there are none.

    Raises:
        ValueError: a file is damaged, or the list of runs has lost lines.
    """
    _refuse_unlisted()
    wanted = list(arms)
    runs = [
        run
        for run in committed_runs(profile)
        if any(fnmatchcase(run.arm, pattern) for pattern in wanted)
    ]
    if not runs:
        return pd.DataFrame(columns=COLUMNS)
    keys = [run.key() for run in runs]
    return with_predictors(_tidy(runs), committed_pairs(profile), keys)

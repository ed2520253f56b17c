"""Tables a reader asks for: written whole, resumable while they grow."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
from filelock import FileLock, Timeout

from opd_geometry.files import clear_write_errors, replacing

SUFFIXES = (".csv", ".parquet", ".json")
REMEDY = "make room there or name another file with --out"
Row = dict[str, Any]


def check_output(
    out: Path, force: bool, resume: bool = False, suffixes: Sequence[str] = SUFFIXES
) -> None:
    """Refuse an output that cannot or must not be written, before anything is computed.

    Args:
        out: where the table, or a page about tables, will lie.
        force: whether an earlier one may be replaced, and an interrupted one lost.
        resume: whether an interrupted one is to be completed.
        suffixes: that it may have.

    Raises:
        ValueError: an unknown suffix, no such directory, the file is there already,
            or an interrupted one is.
    """
    if out.suffix not in suffixes:
        raise ValueError(
            f"{out} ends in {out.suffix or 'nothing'!r}, expected "
            f"{' or '.join(suffixes)}; rename it"
        )
    if not out.parent.is_dir():
        raise ValueError(
            f"{out.parent} is no directory, expected one to write {out.name} to; "
            "make it first"
        )
    if out.is_dir():
        raise ValueError(f"{out} is a directory, expected a file; rename it")
    # Whether a finished one is what would be gone on to is known with the plan.
    if out.exists() and not (force or resume):
        raise ValueError(
            f"{out} exists, expected a new file; pass --force to replace it"
        )
    partial = partial_path(out)
    if partial.exists() and not partial.is_file():
        raise ValueError(
            f"{partial} is no regular file, expected the rows of an interrupted "
            "measurement or nothing; remove it"
        )
    if partial.exists() and not (force or resume):
        raise ValueError(
            f"{partial_path(out)} is left from an interrupted measurement; go on from "
            "it with --resume, or start anew with --force"
        )


def partial_path(out: Path) -> Path:
    """Where the finished rows of an unfinished table lie."""
    return out.with_name(f"{out.name}.partial")


class Partial:
    """Finished rows of a table in the making, one JSON line an item with its digest.

    The first line describes what is measured; only rows of the same description are
    gone on from, and of these only lines that are as they were written.
    """

    def __init__(self, file: TextIO, done: dict[str, list[Row]]) -> None:
        self._file = file
        self.done = done

    def add(self, item: str, rows: list[Row]) -> None:
        """Keep an item's rows; they are on disk when this returns."""
        self._file.write(_line(item, rows))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done[item] = rows


@contextmanager
def growing(
    out: Path, description: Mapping[str, Any], resume: bool
) -> Iterator[Partial]:
    """The rows finished so far, to be added to; removed by `finish`, not by an error.

    Args:
        out: where the table will lie.
        description: what is measured, as JSON can hold it.
        resume: whether rows of an interrupted measurement are taken over.

    Raises:
        ValueError: the interrupted one measured something else, another process is
            writing it, or the place cannot be written to.
    """
    path = partial_path(out)
    with _sole_writer(path):
        with clear_write_errors(out, REMEDY):
            # Appended to, one byte a character, whatever is in it.
            file = path.open("a+", encoding="ascii", errors="surrogateescape")
        with file:
            file.seek(0)
            text = file.read()
            done = _kept(path, text, description) if resume else {}
            with clear_write_errors(out, REMEDY):
                lines = "".join(_line(item, rows) for item, rows in done.items())
                whole = json.dumps(dict(description)) + "\n" + lines
                if text != whole:
                    # Nothing may be written behind a line that is cut short or damaged;
                    # until the new file is whole, the old one stands.
                    with replacing(path) as draft:
                        draft.write_text(whole, encoding="ascii")
                    file.close()
                    file = path.open("a", encoding="ascii")
            with file:
                yield Partial(file, done)


def _line(item: str, rows: list[Row]) -> str:
    """A finished item as it is kept."""
    return json.dumps([item, rows, _digest(item, rows)]) + "\n"


def _digest(item: str, rows: list[Row]) -> str:
    return hashlib.sha256(json.dumps([item, rows]).encode()).hexdigest()[:16]


def finished(out: Path, description: Mapping[str, Any]) -> set[str]:
    """Items of an interrupted table that `growing` would take over.

    Raises:
        ValueError: it measured something else.
    """
    path = partial_path(out)
    if not path.exists():
        return set()
    with path.open(encoding="ascii", errors="surrogateescape") as file:
        return {*_kept(path, file.read(), description)}


@contextmanager
def _sole_writer(path: Path) -> Iterator[None]:
    """Keep a partial table from all other processes of this machine.

    The lock lies with the temporary files, and goes while it is held: who opened it
    before sees that it has no name any more, and tries again.

    Raises:
        ValueError: another process is writing it.
    """
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    lock = Path(tempfile.gettempdir()) / f"opd-geometry-{name}.lock"
    try:
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    except Timeout as error:
        raise ValueError(
            f"{path} is being written by another process, expected this one alone; "
            "wait for it, or name another file with --out"
        ) from error


def _kept(
    path: Path, text: str, description: Mapping[str, Any]
) -> dict[str, list[Row]]:
    """Rows of an interrupted table, of all lines that are as they were written."""
    if not text:  # killed before the first line
        return {}
    first, *rest = text.split("\n")
    try:
        earlier = json.loads(first)
    except (ValueError, RecursionError):
        earlier = None
    if not isinstance(earlier, dict):
        raise ValueError(
            f"{path} does not begin with what is measured, expected it in the first "
            "line; start anew with --force"
        )
    expected = json.loads(json.dumps(dict(description)))
    if earlier != expected:
        names = {*earlier, *expected}
        differ = sorted(n for n in names if earlier.get(n) != expected.get(n))
        raise ValueError(
            f"{path} is of another measurement (it differs in {', '.join(differ)}), "
            "expected the same checkpoints and options; start anew with --force"
        )
    done: dict[str, list[Row]] = {}
    for line in rest:
        try:
            item, rows, digest = json.loads(line)
            sound = digest == _digest(item, rows)
        except (ValueError, TypeError, RecursionError):
            continue  # cut short by a kill, or damaged: it is measured anew
        if sound:
            done[item] = rows
    return done


def finish(out: Path, table: pd.DataFrame, force: bool = True) -> None:
    """Write a whole table under its final name, and drop its partial file.

    Args:
        out, table: where, and what.
        force: whether one that is there and differs may be replaced.

    Raises:
        ValueError: the place cannot be written to, or another table must not be lost.
    """
    with clear_write_errors(out, REMEDY), replacing(out) as draft:
        write_table(table, draft, out.suffix)
        if not force and out.exists() and out.read_bytes() != draft.read_bytes():
            raise ValueError(_other(out))
    partial_path(out).unlink(missing_ok=True)


def complete(
    out: Path,
    columns: Sequence[str],
    items: Collection[str],
    steps: Collection[int],
    description: Mapping[str, Any],
) -> bool:
    """Whether a finished table is there for which nothing is left to be done.

    Args:
        out: where it would lie.
        columns, items, steps: that it would have; no steps if it is of a pair.
        description: as `growing`.

    Returns:
        False if there is none, or one whose partial file was not dropped any more.

    Raises:
        ValueError: it is another one, or its partial file is.
    """
    if not out.exists():
        return False
    table = read_table(out)
    found = {name: {*table[name]} for name in ("matrix", "step") if name in table}
    asked = {"matrix": {*items}} | ({"step": {*steps}} if steps else {})
    left = partial_path(out).exists() and {*items} - finished(out, description)
    if [*table.columns] != [*columns] or found != asked or left:
        raise ValueError(_other(out))
    return not partial_path(out).exists()


def _other(out: Path) -> str:
    return (
        f"{out} exists and is not the table to be gone on with, expected that or a new "
        "file; pass --force to replace it"
    )


def write_table(table: pd.DataFrame, path: Path, suffix: str) -> None:
    """Write .csv, .parquet or .json (a list of records, null for NaN).

    Numbers keep all their digits.
    """
    if suffix == ".csv":
        table.to_csv(path, index=False)
    elif suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        path.write_text(json.dumps(_records(table), indent=1, allow_nan=False) + "\n")


def _records(table: pd.DataFrame) -> list[Row]:
    records: Sequence[Row] = table.to_dict("records")
    return [
        {
            str(name): None if isinstance(v, float) and math.isnan(v) else v
            for name, v in record.items()
        }
        for record in records
    ]


def read_table(path: str | Path) -> pd.DataFrame:
    """A table that `finish` wrote, or another program in the same form.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown suffix, no regular file, an unreadable one, or two
            columns of one name.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        ".csv": _read_csv,
        ".parquet": _read_parquet,
        ".json": _read_json,
    }
    if path.suffix not in readers:
        raise ValueError(
            f"{path} has the suffix {path.suffix!r}, expected {' or '.join(SUFFIXES)}; "
            "give a table of opd-geometry measure or trajectory"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist, expected a table; check it")
    if not path.is_file():
        kind = "a directory" if path.is_dir() else "no regular file"
        raise ValueError(f"{path} is {kind}, expected a table; give the file itself")
    try:
        table = readers[path.suffix](path)
    except (ValueError, TypeError, pa.ArrowException, OSError, RecursionError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} cannot be read ({said}), expected a whole {path.suffix[1:]} file; "
            "measure again"
        ) from error
    twice = table.columns[table.columns.duplicated()]
    if len(twice):
        raise ValueError(
            f"{path} has two columns {twice[0]}, expected one of each name; "
            "measure again"
        )
    return table


def _read_csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, low_memory=False)  # else a column may have two types


def _read_parquet(path: Path) -> pd.DataFrame:
    """Columns alone: notes of another program for its own reading may not fit."""
    table = pa.parquet.read_table(path).replace_schema_metadata(None)
    return table.to_pandas()


def _read_json(path: Path) -> pd.DataFrame:
    rows = json.loads(path.read_bytes())
    if not isinstance(rows, list):
        raise ValueError(f"it is {_kind(rows)}, not a list of rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is {_kind(row)}, not an object")
        nested = [name for name, v in row.items() if isinstance(v, (dict, list))]
        if nested:
            raise ValueError(f"row {number} has {_kind(row[nested[0]])} in a column")
    return pd.DataFrame(rows)


def _kind(value: object) -> str:
    """What JSON calls it."""
    kinds = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return kinds.get(type(value), "a number")

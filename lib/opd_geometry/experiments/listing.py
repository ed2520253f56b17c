"""The list of committed runs: one line a run, guarded by two digests.

``table_sha256`` is the digest of the run's table, as ``sha256sum`` prints it;
``line_sha256`` guards the line itself:

    first 16 digits of SHA-256("NAME=VALUE;NAME=VALUE;..."), its other fields by name

so a list that was cut, edited or merged badly is refused and not read as fewer or as
other runs. Lines stand for themselves: version control can merge two lists.
"""

import csv
import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from io import StringIO
from pathlib import Path

import pandas as pd

PROVENANCE = ["run", "arm", "seed", "steps", "wall_seconds", "machine"]
TABLE_DIGEST, LINE_DIGEST = DIGESTS = "table_sha256", "line_sha256"


def line_digest(fields: Mapping[str, str]) -> str:
    """What ``line_sha256`` has to be; empty fields count as absent.

    >>> line_digest({"run": "a", "arm": "opd", "note": ""})
    '1a9f273d55a1fee6'
    """
    kept = sorted((k, v) for k, v in fields.items() if v and k != LINE_DIGEST)
    text = ";".join(f"{name}={value}" for name, value in kept)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_listing(path: Path) -> pd.DataFrame:
    """One row a committed run.

    Raises:
        OSError: it cannot be read.
        ValueError: it lacks a column, or a line is not as it was written.
    """
    return _parsed(path.read_bytes()).copy()


@lru_cache(maxsize=4)  # by content: read for every table, changed hardly ever
def _parsed(content: bytes) -> pd.DataFrame:
    text = content.decode()
    _lines(text)
    table = pd.read_csv(StringIO(text))
    for seed in table["seed"]:
        if not str(seed).isdecimal():
            raise ValueError(f"a seed is {seed}, expected 0 or larger")
    twice = table["run"][table["run"].duplicated()]
    if len(twice):
        raise ValueError(f"it lists run {twice.iloc[0]} twice")
    return table


def read_lines(path: Path) -> list[dict[str, str]]:
    """The lines of a list as they are written, for ``write_listing``.

    Raises:
        OSError, ValueError: as ``read_listing``.
    """
    return _lines(path.read_text())


def _lines(text: str) -> list[dict[str, str]]:
    """Its lines as they are written, each checked against its digest."""
    reader = csv.DictReader(StringIO(text))
    wanted = [*PROVENANCE, *DIGESTS]
    missing = [name for name in wanted if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"it has no column {', '.join(missing)}")
    lines = []
    for number, fields in enumerate(reader, 2):
        whole = None not in fields and None not in fields.values()
        if not whole or fields[LINE_DIGEST] != line_digest(fields):
            raise ValueError(f"line {number} is cut or was changed")
        lines.append(fields)
    return lines


def write_listing(
    path: Path,
    earlier: Iterable[dict[str, str]],
    rows: Iterable[Mapping[str, object]],
) -> None:
    """Write a list with some runs added, or in the place of what they were.

    Args:
        path: the file.
        earlier: lines of the list that it follows, which stay as they are.
        rows: a run each, ``table_sha256`` included.
    """
    by_run = {line["run"]: line for line in earlier}
    for row in rows:
        fields = {k: "" if v is None else str(v) for k, v in row.items()}
        by_run[fields["run"]] = fields | {LINE_DIGEST: line_digest(fields)}
    columns = list(dict.fromkeys(name for line in by_run.values() for name in line))
    columns = [name for name in columns if name not in DIGESTS] + [*DIGESTS]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            sorted(by_run.values(), key=lambda line: (line["arm"], int(line["seed"])))
        )

"""What stands beside a reader's numbers: the paper's, and those of this book's runs."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from opd_geometry.book import figures
from opd_geometry.book.measured import TIDY
from opd_geometry.experiments.listing import read_listing
from opd_geometry.experiments.records import digest_of
from opd_geometry.experiments.shelf import committed_csv
from opd_geometry.files import on_shelf, shelves
from opd_geometry.geometry.defaults import LAYER_ROLES
from opd_geometry.geometry.tables import read_table

OURS = ("sft", "sft-matched", "opd", "rlvr")


def paper_numbers(file: str) -> pd.DataFrame:
    """A file of ``data/paper``; no rows where the data are not at hand."""
    path = on_shelf(Path("paper") / file)
    columns = ["item", "arm", "metric", "relation", "value", "unit"]
    return committed_csv(path) if path.is_file() else pd.DataFrame(columns=columns)


def book_runs(arms: Sequence[str] = OURS) -> pd.DataFrame:
    """The committed measurements of some arms, as ``measure.committed`` has them.

    Read without what trains a model: that takes longer to load than these files.

    Args:
        arms: which.

    Returns:
        Tidy; no rows where the data are not at hand.

    Raises:
        ValueError: a file that the list names is missing or damaged.
    """
    tables: dict[str, pd.DataFrame] = {}
    for shelf in shelves():
        listed = shelf / "measurements" / "runs.csv"
        if not listed.is_file():
            continue
        try:
            runs = read_listing(listed)
        except ValueError as error:
            raise ValueError(
                f"{listed} is damaged: {error}; take it from version control"
            ) from error
        for run in runs[
            runs["arm"].isin(arms) & ~runs["run"].isin(tables)
        ].itertuples():
            path = listed.with_name(f"{run.arm}-s{run.seed}-{run.run}.parquet")
            tables[str(run.run)] = _book_table(path, run.table_sha256)
    # A larger student's runs stand in the same list; this book's own are the most.
    worlds = {run: frozenset(table["matrix"]) for run, table in tables.items()}
    own = Counter(worlds.values()).most_common(1)
    kept = [table for run, table in tables.items() if worlds[run] == own[0][0]]
    return pd.concat(kept or [pd.DataFrame(columns=TIDY)], ignore_index=True)


def _book_table(path: Path, digest: str) -> pd.DataFrame:
    if path.is_file() and digest_of(path) != digest:
        raise ValueError(
            f"{path} is damaged: its content has another digest than runs.csv says; "
            "take it from version control"
        )
    table = read_table(path)
    missing = {*TIDY} - {*table}
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(sorted(missing))}, expected a "
            "measurement of this book; take it from version control"
        )
    return table[TIDY].astype({"arm": object, "metric": object})


def book_ends(book: pd.DataFrame) -> pd.DataFrame:
    """Means of the book's arms at the end of training: the numbers of its first page.

    Args:
        book: of `book_runs`.

    Returns:
        An arm a row in the order of ``OURS``, a metric a column: over the matrices of
        the layers (sparsity by parameters, else plain), then over seeds.
    """
    metrics = figures.with_null(("sparsity", *figures.MASK_METRICS))
    wanted = book["metric"].isin([*metrics, "parameters"])
    book = book[wanted & book["role"].isin(LAYER_ROLES)]
    last = book.groupby("run", observed=True)["step"].transform("max")
    ends = (book["step"] == last) | (book["metric"] == "parameters")
    return figures.summary(book[ends], metrics)

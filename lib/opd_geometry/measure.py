"""Checkpoints to tables: what a run's updates look like, matrix by matrix.

One tidy table holds everything the book prints, one value a row:

    run, arm, seed, step, matrix, role, layer, metric, value

Rows with role ``model`` and an empty matrix name are about the model as a whole:
training metrics of every step, accuracies at the checkpoints. The metric ``parameters``
of every matrix, at step 0, is its number of entries: the weight of its sparsity.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from torch import Tensor

from opd_geometry import spectra, updates
from opd_geometry.checkpoints import Matrix, list_matrices, read_matrix
from opd_geometry.comparison import (
    Reference,
    compare,
    compare_null,
    null_seed,
    null_weights,
    reference,
)
from opd_geometry.files import clear_write_errors, replacing
from opd_geometry.profiles import PROFILES, build
from opd_geometry.runs import (
    Run,
    checkpoint,
    data_directory,
    ensure,
    history,
    is_done,
    one_thread,
    progress,
    run_directory,
)

COLUMNS = ["run", "arm", "seed", "step", "matrix", "role", "layer", "metric", "value"]
TABLE = 5  # raised when the same checkpoints would give another table
MAP_REGIONS = 16  # a side of the local maps


def measure_matrix(
    name: str, checkpoints: dict[int, Path], rank: int, seed: int
) -> list[tuple[int, str, float]]:
    """Every diagnostic of one matrix over a run's checkpoints.

    Args:
        name: of the matrix.
        checkpoints: step to directory; the smallest step is W_0, the largest the end.
        rank: K of ``similarity_to_end``.
        seed: of the Gaussian nulls.

    Returns:
        (step, metric, value) rows.
    """
    (_, origin), *later = sorted(checkpoints.items())
    before = reference(read_matrix(origin, name))
    weights = {step: read_matrix(path, name) for step, path in later}
    rank = min(rank, *before.w_before.shape)
    origin_weights = before.w_before.double()
    subspaces = {}
    for step, w in weights.items():
        with suppress(ValueError):  # an update of lower rank has no such subspace
            subspaces[step] = spectra.top_right_subspace(
                w.double() - origin_weights, rank
            )
    end = max(weights)
    rows = []
    for step, w_after in weights.items():
        values = compare(before, w_after)
        values |= compare_null(before, w_after, null_seed(seed, name, step))
        if step in subspaces and end in subspaces:
            values["similarity_to_end"] = spectra.subspace_similarity(
                subspaces[step], subspaces[end]
            )
            values["null_similarity_to_end"] = rank / before.w_before.shape[1]
        rows += [(step, metric, value) for metric, value in values.items()]
    return rows


def local_maps(before: Reference, w_after: Tensor) -> dict[str, Tensor]:
    """Density and overlaps region by region: the maps of the paper's Figure 3.

    density = |update| / |region|, overlap = |mask AND update| / |update|, each over the
    ``MAP_REGIONS`` x ``MAP_REGIONS`` regions that the matrix is cut into.

    Args:
        before: of W_0.
        w_after: (n_rows, n_cols), the later weights.

    Returns:
        ``density``, ``principal_overlap``, ``low_magnitude_overlap``: each
        (``MAP_REGIONS``, ``MAP_REGIONS``) float64 in [0, 1]; an overlap is NaN where
        a region has no visible change.
    """
    visible = updates.visible_update(before.w_before, w_after)

    def share(mask: Tensor) -> Tensor:
        pooled = torch.nn.functional.adaptive_avg_pool2d(
            mask.double()[None, None], MAP_REGIONS
        )
        return pooled[0, 0]

    density = share(visible)
    return {
        "density": density,
        "principal_overlap": share(before.principal & visible) / density,
        "low_magnitude_overlap": share(before.low_magnitude & visible) / density,
    }


def map_rows(
    matrices: list[Matrix], origin: Path, step: int, after: Path, seed: int
) -> list[tuple[int, str, str, int, str, float]]:
    """Rows of the local maps of one matrix: the middle layer's query projection.

    A region is a row of role ``region`` and layer -1, named ``NAME[i,j]``; the maps of
    the Gaussian null are those of the metrics with ``null_`` in front.
    """
    queries = [matrix for matrix in matrices if matrix.role == "q"]
    if not queries:
        return []
    name = queries[len(queries) // 2].name
    before, w_after = reference(read_matrix(origin, name)), read_matrix(after, name)
    noise = null_weights(before, w_after, null_seed(seed, name, step))
    null = {f"null_{key}": value for key, value in local_maps(before, noise).items()}
    maps = local_maps(before, w_after) | null
    return [
        (step, f"{name}[{i},{j}]", "region", -1, metric, float(values[i, j]))
        for metric, values in maps.items()
        for i in range(MAP_REGIONS)
        for j in range(MAP_REGIONS)
    ]


def kept_table(run: Run, rank: int) -> Path:
    """Where ``measure_run`` keeps the table of a run."""
    return run_directory(run) / f"measurements-{TABLE}-k{rank}.parquet"


def is_measured(run: Run, rank: int) -> bool:
    """Whether a run's table is kept, and whole."""
    try:
        pq.read_metadata(kept_table(run, rank))
    except (OSError, pa.ArrowInvalid):
        return False
    return True


def measure_run(run: Run, rank: int) -> pd.DataFrame:
    """The tidy table of one run, trained first if need be; kept beside it.

    Args:
        run: the run.
        rank: K of the subspace similarity.
    """
    ensure(run)
    kept = kept_table(run, rank)
    if is_measured(run, rank):
        return pd.read_parquet(kept)
    first = 0 if run.branch is None else run.branch_step()
    steps = [step for step in run.checkpoint_steps() if step > first]
    paths = {step: checkpoint(run, step) for step in [0, *steps]}
    rows: list[tuple[int, str, str, int, str, float]] = []
    with one_thread():
        matrices = list_matrices(paths[0])
        rows += map_rows(matrices, paths[0], steps[-1], paths[steps[-1]], run.seed)
        for matrix in matrices:
            size = (0, "parameters", float(matrix.shape[0] * matrix.shape[1]))
            values = measure_matrix(matrix.name, paths, rank, run.seed)
            rows += [
                (step, matrix.name, matrix.role, matrix.layer, metric, value)
                for step, metric, value in (size, *values)
            ]
    rows += [
        (h["step"], "", "model", -1, h["metric"], h["value"]) for h in history(run)
    ]
    table = pd.DataFrame(
        rows, columns=["step", "matrix", "role", "layer", "metric", "value"]
    )
    table.insert(0, "seed", run.seed)
    table.insert(0, "arm", run.arm)
    table.insert(0, "run", run.key())
    with clear_write_errors(kept), replacing(kept) as draft:
        table.to_parquet(draft, index=False)
    return table


# --- committed measurements ------------------------------------------------------


def committed_path(profile: str) -> Path:
    """Where a profile's committed table lies; its provenance stands beside it."""
    return data_directory() / "measurements" / f"{profile}.parquet"


def committed(profile: str) -> pd.DataFrame:
    """A profile's committed table; empty when there is none."""
    path = committed_path(profile)
    if not path.is_file():
        return pd.DataFrame(columns=COLUMNS)
    try:
        return _with_columns(pd.read_parquet(path), COLUMNS, path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is damaged: {error}; {RESTORE}") from error


def committed_provenance(profile: str) -> pd.DataFrame:
    """One row a committed run: run, arm, seed, steps, seconds, versions, machine."""
    path = committed_path(profile).with_suffix(".runs.csv")
    if not path.is_file():
        return pd.DataFrame(columns=PROVENANCE)
    try:
        return _with_columns(pd.read_csv(path), PROVENANCE, path)
    except (pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        raise ValueError(f"{path} is damaged: {error}; {RESTORE}") from error


PROVENANCE = ["run", "arm", "seed", "steps", "wall_seconds", "machine"]
RESTORE = "take it from version control, or commit the runs again"


def _with_columns(table: pd.DataFrame, columns: list[str], path: Path) -> pd.DataFrame:
    """The table, refused if it lacks a column."""
    missing = [name for name in columns if name not in table]
    if missing:
        raise ValueError(
            f"{path} is damaged: it has no column {', '.join(missing)}; {RESTORE}"
        )
    return table


def provenance_of(run: Run) -> dict[str, object]:
    """One provenance row of a finished run."""
    return {"run": run.key(), "arm": run.arm, "seed": run.seed, **progress(run)}


SOURCES = ("committed", "local", "scratch")


def load(
    profile: str,
    arms: Iterable[str],
    seeds: Iterable[int],
    source: str = "committed",
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table of the asked runs, and where each of them comes from.

    Args:
        profile: a key of ``profiles.PROFILES``.
        arms, seeds: which runs.
        source: ``committed`` prefers committed measurements, ``local`` prefers runs
            that are finished in data/runs, ``scratch`` those of them whose base was
            trained here, too; what neither has is trained now.

    Returns:
        The tidy table, and one provenance row a run with the column ``source``
        (``committed`` or ``this machine``).

    Raises:
        ValueError: unknown profile, arm or source, or committed files that do not
            agree.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown source {source!r}; expected {', '.join(SOURCES)}")
    pairs = [(arm, seed) for arm in arms for seed in seeds]
    local_runs = {pair: build(profile, *pair, source == "scratch") for pair in pairs}
    shelf, shelf_rows = committed(profile), committed_provenance(profile)
    on_shelf = set(shelf_rows["run"])
    tables, rows = [], []
    for pair, run in local_runs.items():
        key = build(profile, *pair).key()
        local_first = source != "committed" and is_done(run)
        if key in on_shelf and not local_first:
            tables.append(shelf[shelf["run"] == key])
            if tables[-1].empty:
                raise ValueError(
                    f"{committed_path(profile)} has no rows of run {key} "
                    f"({run.arm}, seed {run.seed}), which is listed beside it; "
                    f"{RESTORE}"
                )
            row = shelf_rows[shelf_rows["run"] == key].iloc[0].to_dict()
            rows.append({**row, "source": "committed"})
        else:
            tables.append(measure_run(run, PROFILES[profile].rank))
            rows.append({**provenance_of(run), "source": "this machine"})
    return pd.concat(tables, ignore_index=True), pd.DataFrame(rows)


def commit(profile: str, runs: Iterable[Run]) -> Path:
    """Put finished runs' tables and provenance into the profile's committed files.

    Rows of the same arm and seed are replaced, all others stay.

    Raises:
        ValueError: none of the runs is finished, or the files cannot be written.
    """
    runs = [run for run in runs if is_done(run)]
    if not runs:
        raise ValueError(
            f"no finished run of profile {profile} to commit: expected one at least; "
            "train with opd-geometry run"
        )
    path = committed_path(profile)
    fresh = pd.concat([measure_run(run, PROFILES[profile].rank) for run in runs])
    rows = pd.DataFrame([provenance_of(run) for run in runs])
    listing = path.with_suffix(".runs.csv")
    with clear_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # both are whole before either takes its name; one commit at a time
        with (
            FileLock(path.with_suffix(".lock")),
            replacing(path) as table_draft,
            replacing(listing) as rows_draft,
        ):
            table = _replace(committed(profile), fresh)
            for column in ("run", "arm", "matrix", "role", "metric"):
                table[column] = table[column].astype("category")
            table.to_parquet(table_draft, index=False, compression="zstd")
            merged = _replace(committed_provenance(profile), rows)
            merged.to_csv(rows_draft, index=False)
    return path


def _replace(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """``old`` without the (arm, seed) pairs of ``new``, then ``new``; sorted."""
    taken = set(zip(new["arm"], new["seed"], strict=True))
    kept = [pair not in taken for pair in zip(old["arm"], old["seed"], strict=True)]
    parts = [part for part in (old[np.array(kept, bool)], new) if len(part)]
    order = [c for c in ("arm", "seed", "step", "matrix", "metric") if c in new.columns]
    return pd.concat(parts).sort_values(order, kind="stable", ignore_index=True)

"""Checkpoints to tables: what a run's updates look like, matrix by matrix.

One tidy table holds everything the book prints, one value a row:

    run, arm, seed, step, matrix, role, layer, metric, value

Rows with role ``model`` and an empty matrix name are about the model as a whole:
training metrics of every step, accuracies at the checkpoints. The metric ``parameters``
of every matrix, at step 0, is its number of entries: the weight of its sparsity.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from torch import Tensor

from opd_geometry.experiments.choices import choices
from opd_geometry.experiments.profiles import build, settings_of
from opd_geometry.experiments.runs import (
    Run,
    checkpoint,
    confining_bases,
    data_directory,
    ensure,
    history,
    is_done,
    one_thread,
    progress,
    run_directory,
)
from opd_geometry.files import clear_write_errors, replacing
from opd_geometry.geometry import spectra, updates
from opd_geometry.geometry.checkpoints import Matrix, list_matrices, read_matrix
from opd_geometry.geometry.comparison import (
    Reference,
    compare,
    compare_null,
    defined,
    null_seed,
    null_weights,
    reference,
)
from opd_geometry.geometry.projection import leaked_energy

COLUMNS = ["run", "arm", "seed", "step", "matrix", "role", "layer", "metric", "value"]
TABLE = 6  # raised when the same checkpoints would give another table
MAP_REGIONS = 16  # a side of the local maps
SIMILARITY_RANKS = (1, 4, 8, 16)  # further K of Sim_K


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
    end, w_before = max(weights), before.w_before.double()
    deltas = {step: w.double() - w_before for step, w in weights.items()}
    similarity = similarities(deltas, rank, "")
    for other in SIMILARITY_RANKS:
        similarity |= similarities(deltas, other, f"@K={other}")
    rows = [(step, metric, value) for (step, metric), value in similarity.items()]
    for step, w_after in weights.items():
        values = compare(before, w_after)
        values |= compare_null(before, w_after, null_seed(seed, name, step))
        if step == end:
            noise = null_weights(before, w_after, null_seed(seed, name, step))
            varied = choices(before.w_before, noise)
            values |= choices(before.w_before, w_after)
            values |= {f"null_{metric}": value for metric, value in varied.items()}
        rows += [(step, metric, value) for metric, value in values.items()]
    return rows


def similarities(
    deltas: dict[int, Tensor], rank: int, suffix: str
) -> dict[tuple[int, str], float]:
    """Sim_K of every checkpoint's update with the last one, and its null, K/n.

    Args:
        deltas: step to W_t - W_0.
        rank: K, at most the smaller side.
        suffix: of the metric's name.

    Returns:
        (step, metric) to value; without the steps at which the update has no such
        subspace, being of lower rank.
    """
    n_cols = deltas[max(deltas)].shape[1]
    rank = min(rank, *deltas[max(deltas)].shape)
    subspaces = {}
    for step, delta in deltas.items():
        with suppress(ValueError):
            subspaces[step] = spectra.top_right_subspace(delta, rank)
    last = subspaces.get(max(deltas))
    if last is None:
        return {}
    values: dict[tuple[int, str], float] = {}
    for step, basis in subspaces.items():
        shared = spectra.subspace_similarity(basis, last)
        values[step, f"similarity_to_end{suffix}"] = shared
        values[step, f"null_similarity_to_end{suffix}"] = rank / n_cols
    return values


def leak_rows(
    run: Run, matrices: list[Matrix], paths: dict[int, Path]
) -> list[tuple[int, str, str, int, str, float]]:
    """Of a confined run: how much of its update since the branch left the subspace.

    leak = 1 - ||D V V^T||_F^2 / ||D||_F^2, D = W_t - W_branch

    Rows of the metric ``leak``, from 0 (all inside) to 1.

    Source: ours; the paper projects gradients and shows no leak.
    """
    if run.branch is None:
        return []
    bases = confining_bases(run)
    origin = checkpoint(run.branch, run.branch_step())
    stored = {step: _names(path) for step, path in paths.items()}
    rows = []
    for matrix in matrices:
        if matrix.name not in bases:
            continue
        start = read_matrix(origin, matrix.name).double()
        for step, path in paths.items():
            if matrix.name not in stored[step]:
                continue
            delta = read_matrix(path, matrix.name).double() - start
            leak = defined(leaked_energy, delta, bases[matrix.name])
            place = (matrix.name, matrix.role, matrix.layer)
            rows.append((step, *place, "leak", leak))
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


def _names(path: Path) -> set[str]:
    """Names of the matrices that a checkpoint holds: on the way, not always all."""
    return {matrix.name for matrix in list_matrices(path)}


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
    with suppress(OSError, pa.ArrowInvalid):  # not there, or damaged
        return pd.read_parquet(kept)
    first = 0 if run.branch is None else run.branch_step()
    steps = [step for step in run.checkpoint_steps() if step > first]
    paths = {step: checkpoint(run, step) for step in [0, *steps]}
    rows: list[tuple[int, str, str, int, str, float]] = []
    with one_thread():
        matrices = list_matrices(paths[0])
        rows += map_rows(matrices, paths[0], steps[-1], paths[steps[-1]], run.seed)
        rows += leak_rows(run, matrices, {step: paths[step] for step in steps})
        stored = {step: _names(path) for step, path in paths.items()}
        for matrix in matrices:
            size = (0, "parameters", float(matrix.shape[0] * matrix.shape[1]))
            there = {s: path for s, path in paths.items() if matrix.name in stored[s]}
            values = measure_matrix(matrix.name, there, rank, run.seed)
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

PROVENANCE = ["run", "arm", "seed", "steps", "wall_seconds", "machine"]
RESTORE = "take it from version control, or commit the runs again"


def provenance_path() -> Path:
    """Where the list of all committed runs lies; their tables stand beside it."""
    return data_directory() / "measurements" / "runs.csv"


def committed_path(run: Run) -> Path:
    """Where the table of a committed run lies."""
    return provenance_path().with_name(f"{run.name}.parquet")


def committed_provenance() -> pd.DataFrame:
    """One row a committed run: run, arm, seed, steps, seconds, versions, machine.

    Raises:
        ValueError: the list cannot be read, or has no run of its own in every line.
    """
    path = provenance_path()
    if not path.exists():
        return pd.DataFrame(columns=PROVENANCE)
    with _damage(path):
        table = _with_columns(pd.read_csv(path), PROVENANCE)
        for seed in table["seed"]:
            if not str(seed).isdecimal():
                raise ValueError(f"a seed is {seed}, expected 0 or larger")
        twice = table["run"][table["run"].duplicated()]
        if len(twice):
            raise ValueError(f"it lists run {twice.iloc[0]} twice")
    return table


def committed_table(run: Run) -> pd.DataFrame:
    """The table of a run that is listed as committed.

    Raises:
        ValueError: it cannot be read, or holds other rows than those of this run.
    """
    path = committed_path(run)
    with _damage(path):
        table = _with_columns(pd.read_parquet(path), COLUMNS)
        table = table.astype({"step": int, "value": float})
        found = set(table[["run", "arm", "seed"]].itertuples(index=False, name=None))
        if found != {(run.key(), run.arm, run.seed)}:
            raise ValueError(f"its rows are not those of run {run.name}")
        if table.duplicated(["step", "matrix", "metric"]).any():
            raise ValueError("it has two values of one matrix, step and metric")
    return table


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn whatever is wrong with a committed file into one clear line."""
    try:
        yield
    except (OSError, ValueError) as error:  # those of pandas and pyarrow among them
        absent = isinstance(error, FileNotFoundError)
        what = "missing" if absent else f"damaged: {error}"
        raise ValueError(f"{path} is {what}; {RESTORE}") from error


def _with_columns(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The table, refused if it lacks a column."""
    missing = [name for name in columns if name not in table]
    if missing:
        raise ValueError(f"it has no column {', '.join(missing)}")
    return table


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


def committed(profile: str) -> pd.DataFrame:
    """The table of a profile's committed runs; empty when there are none."""
    tables = [committed_table(run) for run in committed_runs(profile)]
    if not tables:
        return pd.DataFrame(columns=COLUMNS)
    return pd.concat(tables, ignore_index=True)


def provenance_of(run: Run) -> dict[str, object]:
    """One provenance row of a finished run."""
    return {"run": run.key(), "arm": run.arm, "seed": run.seed, **progress(run)}


SOURCES = ("committed", "local", "scratch")


def load(
    profile: str,
    arms: Iterable[str],
    seeds: Iterable[int],
    source: str = "committed",
    student: str | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table of the asked runs, and where each of them comes from.

    Args:
        profile: a key of ``profiles.PROFILES``.
        arms, seeds: which runs.
        source: ``committed`` prefers committed measurements, ``local`` prefers runs
            that are finished in data/runs, ``scratch`` those of them whose base was
            trained here, too; what neither has is trained now.
        student: of a profile that takes one; see ``profiles.build``.

    Returns:
        The tidy table, and one provenance row a run with the column ``source``
        (``committed`` or ``this machine``).

    Raises:
        ValueError: unknown profile, arm or source, or a committed file that is missing
            or damaged.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown source {source!r}; expected {', '.join(SOURCES)}")
    listed = committed_provenance().set_index("run", drop=False)
    tables, rows = [], []
    for arm, seed in [(arm, seed) for arm in arms for seed in seeds]:
        own = build(profile, arm, seed, source == "scratch", student)
        published = build(profile, arm, seed, student=student)
        local_first = source != "committed" and is_done(own)
        if published.key() in listed.index and not local_first:
            tables.append(committed_table(published))
            row = listed.loc[published.key()].to_dict()
            rows.append({**row, "source": "committed"})
        else:
            tables.append(measure_run(own, settings_of(profile).rank))
            rows.append({**provenance_of(own), "source": "this machine"})
    return pd.concat(tables, ignore_index=True), pd.DataFrame(rows)


def commit(profile: str, runs: Iterable[Run]) -> Path:
    """Put finished runs' tables and provenance where the committed ones lie.

    A run takes the place of an earlier one of its name; all others stay.

    Returns:
        The folder.

    Raises:
        ValueError: none of the runs is finished, or the files cannot be written.
    """
    runs = [run for run in runs if is_done(run)]
    if not runs:
        raise ValueError(
            f"no finished run of profile {profile} to commit: expected one at least; "
            "train with opd-geometry run"
        )
    listing = provenance_path()
    with clear_write_errors(listing):
        listing.parent.mkdir(parents=True, exist_ok=True)
        for run in runs:  # the tables first: what is listed is there
            table = measure_run(run, settings_of(profile).rank)
            with replacing(committed_path(run)) as draft:
                _narrow(table).to_parquet(draft, index=False, compression="zstd")
        rows = pd.DataFrame([provenance_of(run) for run in runs])
        with FileLock(listing.with_suffix(".lock")), replacing(listing) as draft:
            old = committed_provenance()
            old = old[~old["run"].isin(rows["run"])]
            parts = [part for part in (old, rows) if len(part)]
            merged = pd.concat(parts).sort_values(["arm", "seed"], kind="stable")
            merged.to_csv(draft, index=False)
    return listing.parent


def _narrow(table: pd.DataFrame) -> pd.DataFrame:
    """The table in a third of the space: words once, values to seven digits.

    Another processor changes the seventh anyway.
    """
    words = ["run", "arm", "matrix", "role", "metric"]
    return table.astype({**dict.fromkeys(words, "category"), "value": np.float32})

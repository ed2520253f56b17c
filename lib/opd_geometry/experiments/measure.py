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
from torch import Tensor

from opd_geometry.experiments.activations import input_covariances
from opd_geometry.experiments.choices import choices
from opd_geometry.experiments.committed import (  # noqa: F401  and asked for here
    COLUMNS,
    WORDS,
    committed,
    committed_path,
    committed_provenance,
    committed_runs,
    committed_table,
    damage,
    provenance_path,
)
from opd_geometry.experiments.controls import control_rows, displacement, similarities
from opd_geometry.experiments.listing import TABLE_DIGEST, read_lines, write_listing
from opd_geometry.experiments.predictors import committed_pairs, with_predictors
from opd_geometry.experiments.profiles import build, settings_of
from opd_geometry.experiments.records import check_seal, digest_of, locked, sealing
from opd_geometry.experiments.runs import (
    Run,
    clear_failure,
    confining_bases,
    ensure,
    history,
    is_done,
    is_lean,
    one_thread,
    progress,
    run_directory,
    sound_checkpoint,
)
from opd_geometry.files import clear_write_errors, replacing
from opd_geometry.geometry import updates
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
from opd_geometry.training.settings import clipped_frac

TABLE = 7  # raised when the same checkpoints would give another table
MAP_REGIONS = 16  # a side of the local maps
SIMILARITY_RANKS = (1, 4, 8, 16)  # further K of Sim_K
# Of a pretrained student, whose matrices are many and large, these layers are held
# against every null and choice, all others against the Gaussian null at the end.
THOROUGH_LAYERS = (5, 14)


def measure_matrix(
    name: str,
    checkpoints: dict[int, Path],
    rank: int,
    seed: int,
    run: Run | None = None,
    inputs: Tensor | None = None,
    thorough: bool = True,
) -> list[tuple[int, str, float]]:
    """Every diagnostic of one matrix over a run's checkpoints.

    Args:
        name: of the matrix.
        checkpoints: step to directory; the smallest step is W_0, the largest the end.
        rank: K of ``similarity_to_end``.
        seed: of the Gaussian nulls.
        run: adds the controls of ``controls.control_rows``.
        inputs: covariance of the matrix's inputs, for them.
        thorough: False leaves out whatever is no diagnostic of the update itself, its
            Gaussian null at the end, or its displacement.

    Returns:
        (step, metric, value) rows.
    """
    (_, origin), *later = sorted(checkpoints.items())
    before = reference(read_matrix(origin, name))
    weights = {step: read_matrix(path, name) for step, path in later}
    end, w_before = max(weights), before.w_before.double()
    deltas = {step: w.double() - w_before for step, w in weights.items()}
    ranks = {"": rank} | {f"@K={k}": k for k in SIMILARITY_RANKS}
    similarity = similarities(deltas, ranks)
    rows = [(step, metric, value) for (step, metric), value in similarity.items()]
    for step, w_after in weights.items():
        values = compare(before, w_after)
        if thorough or step == end:
            values |= compare_null(before, w_after, null_seed(seed, name, step))
        if thorough and step == end:
            noise = null_weights(before, w_after, null_seed(seed, name, step))
            varied = choices(before.w_before, noise)
            values |= choices(before.w_before, w_after)
            values |= {f"null_{metric}": value for metric, value in varied.items()}
        rows += [(step, metric, value) for metric, value in values.items()]
    if run is not None and thorough:
        rows += control_rows(run, name, before, weights, rank, inputs)
    elif run is not None:
        rows += displacement(run, deltas)
    return rows


def _is_thorough(run: Run, matrix: Matrix) -> bool:
    return not is_lean(run) or matrix.layer in THOROUGH_LAYERS


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
    origin = sound_checkpoint(run.branch, run.branch_step())
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


def clipped(run: Run) -> float:
    """Share of a finished run's steps whose gradient was scaled down."""
    norms = [h["value"] for h in history(run) if h["metric"] == "grad_norm"]
    return clipped_frac(np.array(norms), run.train.optimizer.max_grad_norm)


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
        check_seal(kept_table(run, rank))
    except (OSError, ValueError, pa.ArrowException):
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
    with suppress(Exception):  # not there, or damaged, which readers say in many ways
        check_seal(kept)
        return pd.read_parquet(kept)
    first = 0 if run.branch is None else run.branch_step()
    steps = [step for step in run.checkpoint_steps() if step > first]
    paths = {step: sound_checkpoint(run, step) for step in [0, *steps]}
    rows: list[tuple[int, str, str, int, str, float]] = []
    with one_thread():
        matrices = list_matrices(paths[0])
        rows += map_rows(matrices, paths[0], steps[-1], paths[steps[-1]], run.seed)
        rows += leak_rows(run, matrices, {step: paths[step] for step in steps})
        free = run if run.branch is None else None
        watched = {matrix.name for matrix in matrices if _is_thorough(run, matrix)}
        covariances = {} if free is None else input_covariances(run, watched)
        stored = {step: _names(path) for step, path in paths.items()}
        for matrix in matrices:
            size = (0, "parameters", float(matrix.shape[0] * matrix.shape[1]))
            there = {s: path for s, path in paths.items() if matrix.name in stored[s]}
            inputs = covariances.get(matrix.name)
            thorough = _is_thorough(run, matrix)
            values = measure_matrix(
                matrix.name, there, rank, run.seed, free, inputs, thorough
            )
            rows += [
                (step, matrix.name, matrix.role, matrix.layer, metric, value)
                for step, metric, value in (size, *values)
            ]
    kind, rate = run.train.optimizer.kind, "learning_rate"
    # of another optimizer than AdamW a rate is no size of a step: who reads it as one
    # finds none
    own = {} if kind == "adamw" else {rate: f"{rate}_{kind}"}
    rows += [
        (h["step"], "", "model", -1, own.get(h["metric"], h["metric"]), h["value"])
        for h in history(run)
    ]
    rows.append((steps[-1], "", "model", -1, "clipped_frac", clipped(run)))
    table = pd.DataFrame(
        rows, columns=["step", "matrix", "role", "layer", "metric", "value"]
    )
    table.insert(0, "seed", run.seed)
    table.insert(0, "arm", run.arm)
    table.insert(0, "run", run.key())
    with clear_write_errors(kept), sealing(kept) as draft:
        table.to_parquet(draft, index=False)
    clear_failure(run)
    return table


# --- committed measurements ------------------------------------------------------


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
        published = build(profile, arm, seed, False, student)
        local_first = source != "committed" and is_done(own)
        if published.key() in listed.index and not local_first:
            tables.append(committed_table(published))
            row = listed.loc[published.key()].to_dict()
            rows.append({**row, "source": "committed"})
        else:
            tables.append(measure_run(own, settings_of(profile).rank))
            rows.append({**provenance_of(own), "source": "this machine"})
    together = pd.concat(tables, ignore_index=True)
    kept = pd.DataFrame(rows)
    # pairs are of committed runs: one that was trained anew has another end
    known = kept.loc[kept["source"] == "committed", "run"]
    return with_predictors(together, committed_pairs(profile), known), kept


def commit(profile: str, runs: Iterable[Run]) -> tuple[Path, dict[Run, str]]:
    """Put finished runs' tables and provenance where the committed ones lie.

    A run takes the place of an earlier one of its name; all others stay.

    Returns:
        The folder, and the finished runs that were left out, with one line why.

    Raises:
        ValueError: none of the runs is finished and whole, or the files cannot be
            written.
    """
    listing, rows, left_out = provenance_path(), [], {}
    finished = [run for run in runs if is_done(run)]
    for run in finished:  # the tables first: what is listed is there
        try:
            row = provenance_of(run)
            table = measure_run(run, settings_of(profile).rank)
        except (ValueError, FileNotFoundError) as error:
            left_out[run] = str(error)
            continue
        with clear_write_errors(listing):
            listing.parent.mkdir(parents=True, exist_ok=True)
            with replacing(listing.with_name(f"{run.name}.parquet")) as draft:
                _narrow(table).to_parquet(draft, index=False, compression="zstd")
                rows.append({**row, TABLE_DIGEST: digest_of(draft)})
    if not rows:
        raise ValueError(
            next(iter(left_out.values()), "")
            or f"no finished run of profile {profile} to commit: expected one at "
            "least; train with opd-geometry run"
        )
    with (
        clear_write_errors(listing),
        locked(listing.with_suffix(".lock"), str(listing)),
    ):
        with damage(listing):
            earlier = read_lines(listing) if listing.exists() else []
        with replacing(listing) as draft:
            write_listing(draft, earlier, rows)
    return listing.parent, left_out


def _narrow(table: pd.DataFrame) -> pd.DataFrame:
    """The table in a third of the space: words once, values to seven digits.

    Another processor changes the seventh anyway.
    """
    return table.astype({**dict.fromkeys(WORDS, "category"), "value": np.float32})

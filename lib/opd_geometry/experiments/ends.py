"""Where two runs end: how far their updates share a direction, subspaces and entries.

One row a pair of runs, matrix and metric:

    run, arm, seed, other, other_arm, other_seed, matrix, role, layer, metric, value

    cosine               of the two updates, as vectors
    similarity_right     Sim_K of their top right subspaces, and the same at K = 16
    similarity_left      of their top left ones
    ..._bf16             of the updates as stored in bf16
    jaccard              of their visible masks
    null_cosine          0, the mean of two unrelated updates
    null_similarity_...  K / n
    independent_jaccard  p q / (p + q - p q): masks that share not even W_0
    rounding_jaccard     two unrelated Gaussian updates of these norms on one W_0, in
                         closed form: what rounding alone shares

Runs from one anchor share W_0; from two anchors the masks are of two matrices, and what
rounding shares is taken on the first one's.

``window_table`` asks the first of these along the way, of what two runs added between
two checkpoints.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path

import pandas as pd
from torch import Tensor

from opd_geometry.experiments.predictors import (
    COLUMNS,
    committed_pairs,  # noqa: F401  what is committed is read here, too
)
from opd_geometry.experiments.runs import Run, checkpoint, one_thread, sound_checkpoint
from opd_geometry.experiments.shelf import commit_table, committed_table
from opd_geometry.geometry import bits, gram, spectra, unplaced, updates
from opd_geometry.geometry.checkpoints import list_matrices, read_matrix

WIDE_K = 16
WINDOW_COLUMNS = [*COLUMNS, "start", "stop"]


@dataclass(frozen=True)
class _End:
    """One matrix at the end of a run."""

    w_before: Tensor
    delta: Tensor
    left: Tensor
    right: Tensor
    stored: Tensor  # right, of what storage in bf16 leaves of the update
    visible: Tensor


def pair_table(pairs: Iterable[tuple[Run, Run]], rank: int) -> pd.DataFrame:
    """The rows of all pairs; every run of them is finished.

    Args:
        pairs: of runs of models of one shape.
        rank: K of the similarities.

    Raises:
        ValueError: the models of a pair are of different shapes.
    """
    pairs = list(pairs)
    runs = {run.name: run for pair in pairs for run in pair}
    if not runs:
        return pd.DataFrame(columns=COLUMNS)
    rows = []
    with one_thread():
        # each file is checked once, not once a matrix
        at = {n: [sound_checkpoint(r, s) for s in (0, None)] for n, r in runs.items()}
        for matrix in list_matrices(next(iter(at.values()))[0]):
            ends = {
                name: _end(*(read_matrix(place, matrix.name) for place in at[name]))
                for name in runs
            }
            place = (matrix.name, matrix.role, matrix.layer)
            for a, b in pairs:
                whose = (a.key(), a.arm, a.seed, b.key(), b.arm, b.seed)
                for metric, value in _shared(ends[a.name], ends[b.name], rank):
                    rows.append((*whose, *place, metric, value))
    return pd.DataFrame(rows, columns=COLUMNS)


def _end(w_before: Tensor, w_after: Tensor) -> _End | None:
    """A matrix before and after a run; None if it never moved."""
    delta = w_after.double() - w_before.double()
    if not delta.any():
        return None
    visible = updates.visible_update(w_before, w_after)
    k = min(WIDE_K, *delta.shape)
    stored = bits.stored_difference(w_before, w_after)
    own, seen = (gram.decompose(update, k) for update in (delta, stored))
    return _End(w_before, delta, own.left, own.right, seen.right, visible)


def _shared(a: _End | None, b: _End | None, rank: int) -> Iterator[tuple[str, float]]:
    if a is None or b is None:
        return
    if a.delta.shape != b.delta.shape:
        raise ValueError(
            f"updates of shapes {tuple(a.delta.shape)} and {tuple(b.delta.shape)}: "
            "expected two runs of models of one shape"
        )
    yield "cosine", float((a.delta * b.delta).sum() / (a.delta.norm() * b.delta.norm()))
    for k, at in ((rank, ""), (WIDE_K, f"@K={WIDE_K}")):
        for side in ("left", "right"):
            ours, theirs = (getattr(end, side)[:, :k] for end in (a, b))
            shared = spectra.subspace_similarity(ours, theirs)
            yield f"similarity_{side}{at}", shared
            yield f"null_similarity_{side}{at}", ours.shape[1] / len(ours)
    if a.visible.any() and b.visible.any():  # what bf16 never shows has no subspace
        stored = spectra.subspace_similarity(a.stored[:, :rank], b.stored[:, :rank])
        yield "similarity_right_bf16", stored
    yield from _masks(a, b)


def _masks(a: _End, b: _End) -> Iterator[tuple[str, float]]:
    """Agreement of the visible masks, beside independence and rounding."""
    p, q = (float(end.visible.double().mean()) for end in (a, b))
    union = float((a.visible | b.visible).double().mean())
    if union == 0.0:
        return
    yield "jaccard", float((a.visible & b.visible).double().mean()) / union
    yield "independent_jaccard", p * q / (p + q - p * q)
    scales = [bits.norm(end.delta) / end.delta.numel() ** 0.5 for end in (a, b)]
    found = unplaced.magnitudes(a.w_before)
    yield "rounding_jaccard", unplaced.expected_jaccard(found, *scales)


def window_table(pairs: Iterable[tuple[Run, Run]]) -> pd.DataFrame:
    """Cosine of what two runs added between two checkpoints that both of them have.

    <W_t' - W_t, W'_t' - W'_t> / (||W_t' - W_t|| ||W'_t' - W'_t||)

    Args:
        pairs: of finished runs of models of one shape; a pair without a shared
            checkpoint but the start has no rows.

    Returns:
        ``WINDOW_COLUMNS``: the window goes from step start, not included, to stop; the
        matrices are those that both runs keep along the way.
    """
    places: dict[tuple[str, int], Path] = {}
    rows: list[tuple[object, ...]] = []
    with one_thread():
        for a, b in pairs:
            steps = _shared_steps(a, b)
            if len(steps) < 2:
                continue
            whose = (a.key(), a.arm, a.seed, b.key(), b.arm, b.seed)
            both = [[_place(places, run, step) for step in steps] for run in (a, b)]
            ours, theirs = (
                {m.name: m for m in list_matrices(early)} for _, early, *_ in both
            )
            for matrix in [m for name, m in ours.items() if name in theirs]:
                paths = [_path(at, matrix.name) for at in both]
                place = (matrix.name, matrix.role, matrix.layer, "cosine")
                for window, one, other in zip(pairwise(steps), *paths, strict=True):
                    length = float(one.norm() * other.norm())
                    if length:
                        cosine = float((one * other).sum()) / length
                        rows.append((*whose, *place, cosine, *window))
    return pd.DataFrame(rows, columns=WINDOW_COLUMNS)


def _shared_steps(a: Run, b: Run) -> list[int]:
    """The start, and where both have a checkpoint: a confined run has none before."""
    steps = {*a.checkpoint_steps()} & {*b.checkpoint_steps()}
    there = [s for s in sorted(steps) if all(checkpoint(r, s).is_dir() for r in (a, b))]
    return [0, *there]


def _place(places: dict[tuple[str, int], Path], run: Run, step: int) -> Path:
    """A sound checkpoint, looked up where it has been asked before."""
    if (run.name, step) not in places:
        places[run.name, step] = sound_checkpoint(run, step)
    return places[run.name, step]


def _path(places: Iterable[Path], name: str) -> list[Tensor]:
    """A matrix's increments between checkpoints."""
    path = (read_matrix(place, name).double() for place in places)
    return [after - before for before, after in pairwise(path)]


def same_anchor(runs: Iterable[Run]) -> list[tuple[Run, Run]]:
    """Pairs of runs of one seed: other arms from the same start."""
    return [
        (a, b) for a, b in combinations(runs, 2) if a.seed == b.seed and a.arm != b.arm
    ]


def other_seeds(runs: Iterable[Run]) -> list[tuple[Run, Run]]:
    """Pairs of runs of one arm: other seeds, and anchors of their own."""
    return [
        (a, b) for a, b in combinations(runs, 2) if a.seed != b.seed and a.arm == b.arm
    ]


# --- committed pairs --------------------------------------------------------------


def commit_pairs(profile: str, table: pd.DataFrame) -> Path:
    """Add pairs of runs to a profile's; see ``shelf``."""
    return commit_table("pairs", profile, table, ["run", "other"])


def commit_windows(profile: str, table: pd.DataFrame) -> Path:
    """Add windows of pairs of runs to a profile's; see ``shelf``."""
    return commit_table("windows", profile, table, ["run", "other"])


def committed_windows(profile: str) -> pd.DataFrame:
    """The committed windows of a profile; empty when there are none."""
    return committed_table("windows", profile, WINDOW_COLUMNS)

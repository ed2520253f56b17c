"""Anyone's checkpoints to tables, a matrix at a time.

`measure_checkpoints` compares two checkpoints, `trajectory` follows one run. Both read
a matrix when its turn comes, so the peak of memory is set by the largest matrix and not
by the model, and both keep each finished matrix, so an interrupted table goes on.
`measure_tensors` and `following.follow_tensors` are the same for tensors at hand.
"""

import math
import multiprocessing
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from opd_geometry.geometry import (
    bits,
    comparison,
    gram,
    krylov,
    locking,
    low_rank,
    nulls,
    spectra,
    unplaced,
)
from opd_geometry.geometry.checkpoints import (
    OTHER_ROTARY,
    Checkpoint,
    Matrix,
    Pairing,
    Skipped,
    Source,
    StoredPair,
    Wanted,
    diagnosis,
    nothing_to_measure,
    open_checkpoint,
    open_pair,
    pairing,
    refuse_shapes,
)
from opd_geometry.geometry.comparison import (
    ANGLES,
    DEFAULTS,
    Reference,
    Settings,
    null_seed,
    reference,
)
from opd_geometry.geometry.following import COLUMNS as TRAJECTORY_COLUMNS
from opd_geometry.geometry.following import follow_tensors
from opd_geometry.geometry.matching import ROTARY
from opd_geometry.geometry.readings import (
    of_parts,
    standing_for,
    too_far,
    weighted_mean,
)
from opd_geometry.geometry.steps import steps_of
from opd_geometry.geometry.tables import Row, finish, growing

# Column -> name in `comparison`, which the book's own tables use.
METRICS = {
    "sparsity_bf16": "sparsity",
    "update_density": "density",
    **{name: name for name in ANGLES},
    "nss": "nss",
    "principal_overlap": "principal_overlap",
    "low_magnitude_overlap": "low_magnitude_overlap",
    "stable_rank": "stable_rank",
    "frobenius_norm": "frobenius_norm",
    "relative_norm": "relative_norm",
    "hill_alpha": "hill_alpha",
    "top_share": "top_share",
    **{name: name for name in comparison.ENERGY},
}
NULL_METRICS = (
    *ANGLES,
    "nss",
    "principal_overlap",
    "low_magnitude_overlap",
    "sparsity_bf16",
)
COLUMN_OF = {name: column for column, name in METRICS.items()}
SHUFFLED_METRICS = tuple(COLUMN_OF[name] for name in comparison.SHUFFLED)
TURNED_METRICS = comparison.TURNED
EXPECTED_METRICS = tuple(COLUMN_OF[name] for name in comparison.EXPECTED)
# What the update alone has, known from an adapter's two factors.
OF_UPDATE = ("stable_rank", "hill_alpha", "top_share")
CHEAP = (
    "sparsity_bf16",
    "update_density",
    "low_magnitude_overlap",
    "frobenius_norm",
    "relative_norm",
)
MIDDLE = "middle"  # the tier whose spectra are iterated and come with errors
GROUPS = {
    "all": tuple(METRICS),
    "cheap": CHEAP,
    MIDDLE: (*CHEAP, *OF_UPDATE),
    "angles": ANGLES,
    "overlaps": ("principal_overlap", "low_magnitude_overlap"),
    "norms": ("frobenius_norm", "relative_norm"),
    "spread": OF_UPDATE,
    "energy": comparison.ENERGY,
}
IDENTITY = (
    "matrix",
    "role",
    "layer",
    "part",
    "rows",
    "cols",
    "dtype_before",
    "dtype_after",
)
COLUMNS = (
    *IDENTITY,
    *METRICS,
    *(f"null_{name}" for name in (*NULL_METRICS, *comparison.ENERGY)),
    *(f"shuffled_{name}" for name in SHUFFLED_METRICS),
    *(f"turned_{name}" for name in TURNED_METRICS),
    *(f"expected_{name}" for name in EXPECTED_METRICS),
    "expected_scale",
    "expected_from",
    "gap_at_k",
    "angle_error_deg",
    *(f"{name}_error" for name in OF_UPDATE),
    "adapter_norm",
    "note",
)
# An update that is zero turns nothing, exactly.
UNMOVED = dict.fromkeys([*ANGLES, "nss", "relative_norm", "angle_error_deg"], 0.0)
REFUSED = "refused: "  # how the note of a matrix begins that could not be measured
# What one matrix may raise without harm to the others.
REFUSALS = (ValueError, torch.linalg.LinAlgError)
WORDS = (*IDENTITY, "expected_from", "note")  # columns that hold no number
MANY = 0.01  # zeros, or ties at the edge of a mask, from this share on are noted
LARGE = 10**9  # entries from which on the tier is the middle one, if none is asked for
FORMAT = 7  # raised when the same checkpoints would give other rows


def parse_metrics(names: Iterable[str]) -> tuple[str, ...]:
    """Columns that the names of metrics and groups stand for, in the table's order.

    Raises:
        ValueError: an unknown name.

    >>> parse_metrics(["norms", "nss"])
    ('nss', 'frobenius_norm', 'relative_norm')
    """
    wanted: set[str] = set()
    for name in names:
        if name not in GROUPS and name not in METRICS:
            raise ValueError(
                f"unknown metric {name!r}, expected a group ({', '.join(GROUPS)}) or "
                f"a column ({', '.join(METRICS)})"
            )
        wanted |= set(GROUPS.get(name, (name,)))
    if not wanted:
        raise ValueError(f"no metric asked for, expected some of {', '.join(GROUPS)}")
    return tuple(name for name in METRICS if name in wanted)


# --- tensors ---------------------------------------------------------------------


def measure_tensors(
    before: Tensor | Reference,
    w_after: Tensor,
    settings: Settings = DEFAULTS,
    metrics: Collection[str] = tuple(METRICS),
    null: bool = True,
    seed: int | tuple[int, ...] = 0,
    iterated: bool = False,
) -> dict[str, float]:
    """The diagnostics of one matrix, as the columns of `measure_checkpoints`.

    Args:
        before: W_0 (n_rows, n_cols), any floating dtype, or `comparison.reference` of
            it, which is then computed once for all later checkpoints.
        w_after: (n_rows, n_cols).
        settings: ranks and thresholds; those of a Reference count if it is one.
        metrics: columns to compute.
        null: also the nulls: a Gaussian update of the same norm (``null_``), the
            update's own entries permuted (``shuffled_``, only from weights that are
            not stored in 16 bits), its singular values with random directions
            (``turned_``), and what an unplaced update shows in closed form
            (``expected_``) at the distance of `comparison.compare_expected`.
        seed: of their noise.
        iterated: `OF_UPDATE` by `krylov.spread`, about and with their errors.

    Returns:
        Column to value: the metrics, their nulls, gap_at_k = (s_k - s_{k+1}) / s_1 of
        W_0 and angle_error_deg, the bound of what rounding does to the angles; NaN
        where one is undefined or was not asked for. Equal matrices give angles of 0.

    Raises:
        ValueError: shapes differ, a value is not finite, or an argument is unknown.

    Source: arXiv:2606.07082 Table 1, Figures 2 to 4; the nulls are ours.
    """
    asked = {name: METRICS[name] for name in parse_metrics(metrics)}
    if isinstance(before, Tensor):
        energies = bool({*asked} & {*comparison.ENERGY})
        before = reference(before, settings, bottom=energies)
    turns = bool({*asked} & {*ANGLES})
    quality = comparison.ANGLE_QUALITY if turns else ()
    must = ["frobenius_norm", *(["density"] if null else [])]
    names = [*dict.fromkeys([*must, *asked.values(), *quality])]
    about = {*OF_UPDATE} & {*asked} if iterated else set()
    exact = [name for name in names if name not in about]
    found = comparison.compare(before, w_after, exact)
    row = {column: found.get(name, math.nan) for column, name in asked.items()}
    row |= {name: found[name] for name in quality}
    if found["frobenius_norm"] == 0.0:
        return _complete(row | {k: v for k, v in UNMOVED.items() if k in row})
    if about:
        row |= _iterated(before, w_after, found["frobenius_norm"], about)
    if null:
        row |= _nulls(before, w_after, asked, seed, found["density"])
    return _complete(row)


def _iterated(
    before: Reference, w_after: Tensor, norm: float, wanted: Collection[str]
) -> dict[str, float]:
    """What the update alone has, each with its error."""
    shape = before.w_before.shape
    k, hill_k = min(comparison.TOP, *shape), before.settings.hill_rank(shape)
    about = krylov.spread(before.w_before, w_after, norm, k, min(hill_k, *shape))
    names = [name for n in wanted for name in (n, f"{n}_error")]
    return {name: getattr(about, name) for name in names}


def _nulls(
    before: Reference,
    w_after: Tensor,
    asked: dict[str, str],
    seed: int | tuple[int, ...],
    density: float,
) -> dict[str, float]:
    """What the asked columns show of updates with one thing taken away."""

    def names(columns: Sequence[str]) -> list[str]:
        return [asked[column] for column in columns if column in asked]

    found: dict[str, float] = {}
    if wanted := names(NULL_METRICS):
        found |= comparison.compare_null(before, w_after, seed, wanted)
    if names(comparison.ENERGY):
        found |= comparison.energy_by_chance(before)
    if (wanted := names(SHUFFLED_METRICS)) and not nulls.is_stored_difference(w_after):
        found |= comparison.compare_shuffled(before, w_after, seed, wanted)
    if wanted := names(TURNED_METRICS):
        found |= comparison.compare_turned(before, w_after, seed, wanted)
    if wanted := names(EXPECTED_METRICS):
        with suppress(ValueError):  # of the kind that `_remarks` writes down
            there = comparison.compare_expected(before, w_after, density, wanted)
            found |= {f"expected_{name}": value for name, value in there.values.items()}
            found["expected_scale"] = there.scale
    row = {}
    for name, value in found.items():
        prefix, _, metric = name.partition("_")
        column = COLUMN_OF.get(metric, metric)
        if column in asked or column == "scale":
            row[f"{prefix}_{column}"] = value
    return row


def _complete(row: dict[str, float]) -> dict[str, float]:
    left_out = {*WORDS, "adapter_norm"}
    return {name: row.get(name, math.nan) for name in COLUMNS if name not in left_out}


# --- matrices of checkpoints -----------------------------------------------------


@dataclass(frozen=True)
class PairTask:
    """One matrix of two checkpoints, to be measured wherever it is sent to."""

    pair: StoredPair
    settings: Settings
    metrics: tuple[str, ...]
    null: bool
    seed: int
    iterated: bool = False
    device: str | None = None

    @property
    def name(self) -> str:
        """Of the matrix."""
        return self.pair.before.name

    @property
    def shape(self) -> tuple[int, int]:
        """(n_rows, n_cols)."""
        return self.pair.before.shape

    @property
    def n_bytes(self) -> int:
        """To be read."""
        return self.pair.before.n_bytes + self.pair.after.n_bytes

    @property
    def cut(self) -> list[str]:
        """Ranks that are above its smaller side, by name."""
        return self.settings.cut(self.shape)

    def rows(self) -> list[Row]:
        """Its row of `COLUMNS`; empty but for the note where a value is not finite."""
        before, after = self.pair.before, self.pair.after
        row = _identity(before) | {
            "rows": before.shape[0],
            "cols": before.shape[1],
            "dtype_before": before.dtype,
            "dtype_after": after.dtype,
        }
        try:
            values, words, notes = self._values()
        except REFUSALS as error:
            blank = _complete({}) | {"expected_from": ""}
            return [row | blank | {"note": f"{REFUSED}{error}"}]
        said = [self.pair.note, *notes, _cut_note(self)]
        note = "; ".join(filter(None, said))
        return [row | values | {"expected_from": words, "note": note}]

    def _values(self) -> tuple[dict[str, float], str, list[str]]:
        """The metrics, where the expected ones come from, and what is to be noted.

        What the update alone has is known better from an adapter's factors.
        """
        update = self.pair.update()
        asked = [m for m in self.metrics if update is None or m not in OF_UPDATE]
        of_update: dict[str, float] = {}
        if update is not None:
            found = _of_update(update, self.settings, self.shape)
            wanted = {*self.metrics, "adapter_norm"}
            of_update = {name: v for name, v in found.items() if name in wanted}
            if self.pair.baseless:
                norm = {"frobenius_norm": found["adapter_norm"]}
                return _complete(norm | of_update) | of_update, "", []
        if not asked:
            return _complete(of_update) | of_update, "", []
        values, words, notes = self._of_weights(asked)
        return values | of_update, words, notes

    def _of_weights(self, asked: list[str]) -> tuple[dict[str, float], str, list[str]]:
        w_before, w_after = self.pair.read()
        _refuse_damage({"before": w_before, "after": w_after})
        energies = bool({*asked} & {*comparison.ENERGY})
        origin = reference(w_before, self.settings, energies)
        seed = null_seed(self.seed, self.name, 0)
        values = measure_tensors(
            origin,
            w_after,
            metrics=asked,
            null=self.null,
            seed=seed,
            iterated=self.iterated,
        )
        notes = [_warning(values)]
        if not (self.null and {*asked} & {*EXPECTED_METRICS}):
            return values, "", notes
        source = "density" if nulls.is_stored_difference(w_after) else "norm"
        return values, source, notes + _remarks(origin, values)


def _of_update(
    update: tuple[Tensor, Tensor], settings: Settings, shape: tuple[int, int]
) -> dict[str, float]:
    """Norm and `OF_UPDATE` of left @ right."""
    left, right = update
    _refuse_damage({"in the adapter's B": left, "in its A": right})
    values, _ = low_rank.spectrum(left, right)
    norm = float(torch.linalg.norm(values))
    if norm == 0.0:
        return {"adapter_norm": 0.0}
    found = comparison.of_values(values, norm, settings.hill_rank(shape))
    return {"adapter_norm": norm, **found}


def _refuse_damage(tensors: dict[str, Tensor]) -> None:
    """Say which of the tensors hold how many NaN and inf, in few words."""
    found = []
    for name, w in tensors.items():
        n_nan, n_inf = bits.count_nonfinite(w)
        if n_nan or n_inf:
            found.append(f"{n_nan} NaN and {n_inf} inf {name}")
    if found:
        raise ValueError(", ".join(found))


def _warning(values: dict[str, float]) -> str:
    """Why the angles of a row mean little; nothing if they are good."""
    error = values["angle_error_deg"]
    if error > gram.ANGLE_ERROR_DEG:
        return (
            f"angles uncertain by {error:.1e} degrees: at k the singular values have "
            "hardly a gap"
        )
    return ""


def _remarks(before: Reference, values: dict[str, float]) -> list[str]:
    """What W_0's exact zeros and ties leave of masks and closed form, if many."""
    found, n = before.magnitudes, before.w_before.numel()
    remarks = []
    if found.n_zero > MANY * n:
        remarks.append(
            f"{found.n_zero} of {n} entries of W_0 are exactly zero: any update shows "
            "in them"
            + (
                ", more than changed, so no unplaced update has this density"
                if math.isnan(values["expected_scale"])
                else ""
            )
        )
    edge = unplaced.tied_at_edge(found, before.settings.alpha)
    if edge > MANY * n:
        remarks.append(
            f"{edge} of {n} entries of W_0 have the magnitude at which the "
            "low-magnitude mask ends: it holds the first of them in row-major order"
        )
    return remarks


@dataclass(frozen=True)
class TrajectoryTask:
    """One matrix of a run's checkpoints."""

    steps: tuple[int, ...]
    pairs: tuple[StoredPair, ...]  # (W_0, W_t) in the order of steps
    k: int
    settings: Settings
    readout: bool = True
    against: tuple[tuple[str, StoredPair], ...] = ()  # name, other update
    optimizer: locking.Optimizer | None = None
    walk: bool = True
    iterated: bool = False
    device: str | None = None

    @property
    def name(self) -> str:
        """Of the matrix."""
        return self.pairs[0].before.name

    @property
    def shape(self) -> tuple[int, int]:
        """(n_rows, n_cols)."""
        return self.pairs[0].before.shape

    @property
    def pair(self) -> StoredPair:
        """Its first and its last matrix."""
        return self.pairs[-1]

    @property
    def n_bytes(self) -> int:
        """To be read."""
        later = sum(pair.after.n_bytes for pair in self.pairs)
        others = sum(
            pair.before.n_bytes + pair.after.n_bytes for _, pair in self.against
        )
        return self.pairs[0].before.n_bytes + later + others

    @property
    def cut(self) -> list[str]:
        """Ranks that are above its smaller side, by name."""
        k = ["k"] if self.k > min(self.shape) else []
        return k + self.settings.cut(self.shape)

    def rows(self) -> list[Row]:
        """Its rows of `TRAJECTORY_COLUMNS`; one with a note if values are damaged."""
        identity = _identity(self.pairs[0].before)
        pair_of = dict(zip(self.steps, self.pairs, strict=True))
        try:
            if all(pair.adapted for pair in self.pairs) and self.pairs[0].update():
                found = self._of_adapters(pair_of)
            else:
                found = self._of_weights(pair_of)
        except REFUSALS as error:
            empty = dict.fromkeys(TRAJECTORY_COLUMNS, math.nan)
            return [
                empty | identity | {"step": step, "note": f"{REFUSED}{error}"}
                for step in self.steps
            ]
        notes = [self.pair.note, _cut_note(self)]
        if len(self.steps) < locking.LEAST:
            notes.append(
                f"{len(self.steps)} checkpoints, expected {locking.LEAST} or more for "
                "the null of turned increments and that of a walk: they are empty"
            )
        if self.optimizer is not None:
            farthest = map(self.optimizer.farthest, self.steps)
            went = [row.get("displacement", math.nan) for row in found]
            n = sum(a > b for a, b in zip(went, farthest, strict=True))
            notes.append(too_far(n, len(went)).removeprefix(" Warning: ").rstrip("."))
        blank = dict.fromkeys(TRAJECTORY_COLUMNS, math.nan)
        words = {"note": "; ".join(filter(None, notes))}
        return [blank | identity | row | words for row in found]

    def _of_weights(self, pair_of: dict[int, StoredPair]) -> list[Row]:
        w_before = self.pairs[0].read_before()

        def later(step: int) -> Tensor:
            w = pair_of[step].read_after()
            _refuse_damage({"before": w_before, f"at step {step}": w})
            return w

        return follow_tensors(
            w_before,
            later,
            self.steps,
            self.k,
            self.settings,
            null_seed(0, self.name, 0),
            readout=self.readout,
            against={name: _update_of(name, pair) for name, pair in self.against},
            optimizer=self.optimizer,
            walk=self.walk,
            iterated=self.iterated,
        )

    def _of_adapters(self, pair_of: dict[int, StoredPair]) -> list[Row]:
        """As `follow_tensors`, from the factors of adapters: never the whole matrix."""
        k = min(self.k, *self.shape)
        end: Tensor | None = None
        rows: list[Row] = []
        for step in reversed(self.steps):
            update = pair_of[step].update()
            assert update is not None
            values = _of_update(update, self.settings, self.shape)
            subspace = low_rank.spectrum(*update, k)[1]
            if step == self.steps[-1]:
                end = subspace
            similarity = math.nan
            if subspace is not None and end is not None:
                similarity = spectra.subspace_similarity(subspace, end)
            rows.append(
                {
                    "step": step,
                    "stable_rank": values.get("stable_rank", math.nan),
                    "frobenius_norm": values["adapter_norm"],
                    "hill_alpha": values.get("hill_alpha", math.nan),
                    "similarity_to_end": similarity,
                    "similarity_null": k / self.shape[1],
                }
            )
        return rows[::-1]


def _update_of(name: str, pair: StoredPair) -> Tensor:
    """Another update of a matrix, to hold a run's against."""
    before, after = pair.read()
    _refuse_damage({f"before {name}": before, f"after {name}": after})
    return comparison.difference(before, after)


def _identity(matrix: Matrix) -> Row:
    """Which matrix a row is of."""
    named = {name: getattr(matrix, name) for name in ("role", "layer", "part")}
    return {"matrix": matrix.name, **named}


Task = PairTask | TrajectoryTask


# --- what there is to do ---------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a table will hold, known from headers alone.

    Attributes:
        tasks: one a matrix, in natural order.
        columns: of the table.
        skipped: tensors that are not measured, with the reason.
        missing: names on one side only, with the checkpoint that lacks them.
        description: what is measured, to tell whether a partial table fits.
        notes: which files were read, where there was a choice.
        renamed: names of the first checkpoint to those of another, where they differ.
        measured: share of the weights that the tasks cover.
        design: columns by matrix that a sample's table has, too.
    """

    tasks: Sequence[Task]
    columns: tuple[str, ...]
    skipped: list[Skipped]
    missing: list[tuple[str, str]]
    description: dict[str, Any] = field(repr=False)
    notes: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict, repr=False)
    measured: float = 1.0
    design: pd.DataFrame | None = field(default=None, repr=False, compare=False)

    @property
    def iterated(self) -> bool:
        """Whether spectra are, with errors."""
        return any(task.iterated for task in self.tasks)

    @property
    def entries(self) -> int:
        """Weights to be read on either side."""
        shapes = [task.shape for task in self.tasks]
        return sum(rows * cols for rows, cols in shapes)

    @property
    def all_columns(self) -> tuple[str, ...]:
        """Of the table, and those of a sample's design."""
        return (*self.columns, *(() if self.design is None else self.design))

    def on(self, device: str) -> "Plan":
        """The same, decomposed on a device such as ``cuda``, if it is there.

        Raises:
            ValueError: it is not.
        """
        if device == "cpu":
            return self
        if not torch.cuda.is_available():
            raise ValueError(
                f"--device {device}: torch {torch.__version__} sees no GPU, expected "
                "one; leave --device out"
            )
        return replace(self, tasks=[replace(t, device=device) for t in self.tasks])

    def without(self, names: Collection[str]) -> "Plan":
        """The same, less the matrices of these names."""
        left = [task for task in self.tasks if task.name not in names]
        return replace(self, tasks=left)


def plan_pair(
    before: Source,
    after: Source,
    settings: Settings = DEFAULTS,
    metrics: Collection[str] | None = tuple(METRICS),
    roles: Collection[str] | None = None,
    null: bool = True,
    seed: int = 0,
    parts: Collection[str] | None = None,
    base: Source | None = None,
    dequantise: bool = False,
) -> Plan:
    """Every matrix that two checkpoints have in common.

    Args:
        before, after: directories, files or adapters (`checkpoints.open_checkpoint`).
        settings, metrics, null: as `measure_tensors`; the name ``middle`` iterates;
            None is ``middle`` from `LARGE` entries on, and all below.
        roles: only these; None for all.
        seed: of the nulls; every matrix has noise of its own.
        parts: of the model, only these; None for all.
        base: of adapters on both sides; None for what they name.
        dequantise: make weights of codes, where the format is known.

    Raises:
        FileNotFoundError, ValueError: as `checkpoints.list_pairs`, or the two have
            fewer than half of their matrices in common; a negative seed.
    """
    if seed < 0:
        raise ValueError(f"seed = {seed!r}, expected 0 or larger; the default is 0")
    sides = open_pair(before, after, base, dequantise)
    wanted = Wanted(roles, parts)
    found = _paired(*sides, wanted)
    if metrics is None:
        metrics = [MIDDLE if _entries(found) >= LARGE else "all"]
    asked, iterated = parse_metrics(metrics), MIDDLE in metrics
    tasks = [
        PairTask(pair, settings, asked, null, seed, iterated) for pair in found.pairs
    ]
    description = {
        "table": f"measure {FORMAT}",
        "files": [_fingerprint(side) for side in sides],
        "settings": asdict(settings),
        "metrics": list(asked),
        "iterated": iterated,
        **wanted.described(),
        "null": null,
        "seed": seed,
        "dequantise": dequantise,
    }
    notes = [*sides[0].notes, *sides[1].notes, *_notes(found), *_cut(tasks)]
    return Plan(
        tasks,
        COLUMNS,
        _skipped(*sides),
        _missing(*sides, found),
        description,
        tuple(dict.fromkeys(notes)),
        _renamed(found),
        found.measured,
    )


def plan_trajectory(
    before: Source,
    checkpoints: Sequence[str | Path],
    k: int = 16,
    settings: Settings = DEFAULTS,
    roles: Collection[str] | None = None,
    steps: Sequence[int] | None = None,
    parts: Collection[str] | None = None,
    *,
    readout: bool = True,
    against: Mapping[str, tuple[Source, Source]] | None = None,
    optimizer: locking.Optimizer | None = None,
    walk: bool = True,
    iterated: bool | None = False,
) -> Plan:
    """Every matrix that all checkpoints of a run have in common with the first.

    Args:
        before: W_0.
        checkpoints: later ones, in any order.
        k: dimension of the subspaces.
        settings: its hill_k counts.
        roles: only these; None for all.
        steps: of the checkpoints; None takes `steps_of` their names.
        parts: of the model, only these; None for all.
        readout: as `follow_tensors`.
        against: name to start and end of another training, whose matrices have the same
            names; adds a column similarity_to_NAME.
        optimizer, walk: as `follow_tensors`.
        iterated: as `follow_tensors`; None: from `LARGE` entries on.

    Raises:
        FileNotFoundError, ValueError: as `plan_pair`; a name without a step, or two
            of one step; a name of another training that cannot be a column's.
    """
    if k < 1:
        raise ValueError(f"k = {k!r}, expected at least 1; the paper uses 16")
    order = _in_order(checkpoints, steps, optimizer)
    first = open_checkpoint(before)
    opened = {step: open_pair(first, path)[1] for step, path in order.items()}
    wanted = Wanted(roles, parts)
    found = {step: _paired(first, c, wanted) for step, c in opened.items()}
    sides = {step: _by_name(f) for step, f in found.items()}
    names, *others_of = sides.values()
    common = [name for name in names if all(name in other for other in others_of)]
    if not common:
        raise ValueError(
            f"{before} and all of {len(order)} checkpoints have no matrix in common, "
            "expected one architecture"
        )
    if iterated is None:
        iterated = _entries(found[min(order)]) >= LARGE
    others, read = _others(against or {}, wanted)
    tasks = [
        TrajectoryTask(
            tuple(sides),
            tuple(side[name] for side in sides.values()),
            k,
            settings,
            readout,
            tuple(
                (other, there[name]) for other, there in others.items() if name in there
            ),
            optimizer,
            walk,
            iterated,
        )
        for name in common
    ]
    description = {
        "table": f"trajectory {FORMAT}",
        "files": [_fingerprint(c) for c in (first, *opened.values(), *read)],
        "readout": readout,
        "against": [*others],
        "optimizer": asdict(optimizer) if optimizer else None,
        "walk": walk,
        "steps": [*order],
        "k": k,
        "hill_k": settings.hill_k,
        "iterated": iterated,
        **wanted.described(),
    }
    missing = [m for step, c in opened.items() for m in _missing(first, c, found[step])]
    notes = [note for c in (first, *opened.values()) for note in c.notes]
    notes += _cut(tasks)
    return Plan(
        tasks,
        (*TRAJECTORY_COLUMNS[:-1], *(f"similarity_to_{n}" for n in others), "note"),
        _skipped(first, *opened.values()),
        missing,
        description,
        tuple(dict.fromkeys(notes)),
        {k: v for f in found.values() for k, v in _renamed(f).items()},
        min(f.measured for f in found.values()),
    )


def _in_order(
    checkpoints: Sequence[str | Path],
    steps: Sequence[int] | None,
    optimizer: locking.Optimizer | None,
) -> dict[int, str | Path]:
    """Step to checkpoint, ascending; refused where one cannot be told from another."""
    numbers = steps_of(checkpoints) if steps is None else list(steps)
    if not numbers or len({*numbers}) < len(numbers):
        raise ValueError(
            f"steps {numbers}, expected one or more and no two alike; name each "
            "checkpoint once, or say the steps with --steps"
        )
    if optimizer is not None and len(optimizer.rates) < max(numbers):
        raise ValueError(
            f"learning rates of {len(optimizer.rates)} steps for a run of "
            f"{max(numbers)}, expected one a step; give them all, or none"
        )
    places = dict(zip(numbers, checkpoints, strict=True))
    return {step: places[step] for step in sorted(places)}


def _by_name(found: Pairing) -> dict[str, StoredPair]:
    """By the name in the first checkpoint: a table may show another one."""
    return {pair.cuts[0].matrix.name: pair for pair in found.pairs}


def _others(
    against: Mapping[str, tuple[Source, Source]], wanted: Wanted
) -> tuple[dict[str, dict[str, StoredPair]], list[Checkpoint]]:
    """Name to the pairs of another training by matrix; and what was opened for them."""
    found: dict[str, dict[str, StoredPair]] = {}
    read: list[Checkpoint] = []
    for name, sources in against.items():
        taken = f"similarity_to_{name}" in TRAJECTORY_COLUMNS
        if taken or not re.fullmatch("[a-z0-9_]+", name):
            raise ValueError(
                f"another training is named {name!r}, expected lower-case letters, "
                "digits and _, and not end: a column will be similarity_to_NAME"
            )
        sides = open_pair(*sources)
        found[name] = _by_name(_paired(*sides, wanted))
        read += sides
    return found, read


def _paired(before: Checkpoint, after: Checkpoint, wanted: Wanted) -> Pairing:
    """What two checkpoints have in common; refused if that is little of either.

    Weights that one side holds in a form that cannot be read do not count: what is
    left is measured.
    """
    found = pairing(before, after, wanted)
    for side in (before, after):
        if not side.cuts:
            raise ValueError(nothing_to_measure(side))
    refuse_shapes(found.differing, before, after)
    # A part that one side lacks (a text model of a multimodal one) does not count.
    common = {pair.before.part for pair in found.pairs}
    readable = [
        len(found.pairs)
        + sum(
            name in side.cuts
            and side.cuts[name].matrix.part in common
            and name not in unread
            for name in only
        )
        for side, only, unread in zip(
            (before, after), found.only, found.unreadable, strict=True
        )
    ]
    if not found.pairs or len(found.pairs) < max(readable) / 2:
        raise ValueError(diagnosis(before, after, found))
    return found


def _notes(found: Pairing) -> list[str]:
    """What a reader must know of names that only one side has."""
    names = [name for side in found.only for name in side]
    return [OTHER_ROTARY] if any(ROTARY & {*name.split(".")} for name in names) else []


def _cut(tasks: Sequence[Task]) -> list[str]:
    """Which ranks are above the smaller side of which matrices, in a line each."""
    sides: dict[str, list[int]] = {}
    for task in tasks:
        for name in task.cut:
            sides.setdefault(_option(name), []).append(min(task.shape))
    return [
        f"{option} is above the smaller side of {len(found)} matrices ({min(found)} "
        "at least), and is cut to it there"
        for option, found in sides.items()
    ]


def _cut_note(task: Task) -> str:
    """The same for the row of one matrix."""
    options = ", ".join(map(_option, task.cut))
    return f"{options} cut to its smaller side, {min(task.shape)}" if options else ""


def _option(rank: str) -> str:
    return f"--{rank.replace('_', '-')}"


def _entries(found: Pairing) -> int:
    return sum(math.prod(pair.before.shape) for pair in found.pairs)


def _missing(
    before: Checkpoint, after: Checkpoint, found: Pairing
) -> list[tuple[str, str]]:
    """(name, checkpoint without it)."""
    return [(name, str(after.path)) for name in found.only[0]] + [
        (name, str(before.path)) for name in found.only[1]
    ]


def _skipped(*checkpoints: Checkpoint) -> list[Skipped]:
    found = {name: skip for c in checkpoints for name, skip in c.skipped.items()}
    return list(found.values())


def _renamed(found: Pairing) -> dict[str, str]:
    return {a: b for a, b in found.names.items() if a != b}


def _fingerprint(checkpoint: Checkpoint) -> list[list[Any]]:
    """Files of a checkpoint with size and time: whether it is still the same one."""
    files = sorted(checkpoint.files)
    return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


# --- doing it --------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """A matrix that has just been finished."""

    name: str
    done: int
    total: int
    seconds: float


Report = Callable[[Progress], None]


def run_plan(
    plan: Plan,
    out: Path | None = None,
    jobs: int = 1,
    resume: bool = False,
    report: Report | None = None,
    force: bool = True,
) -> pd.DataFrame:
    """The table of a plan.

    Args:
        plan: of `plan_pair` or `plan_trajectory`.
        out: also write it there (`tables.SUFFIXES`); each finished matrix is kept
            beside it until then.
        jobs: processes; each needs memory of its own.
        resume: take over the matrices that an interrupted measurement has finished.
        report: told of each finished matrix.
        force: replace a table that is there and differs.

    Raises:
        ValueError: the place cannot be written to, another process is writing there,
            another table is there, or the interrupted measurement is of something else.
    """
    if out is None:
        return _table(plan, _measured(plan.tasks, jobs, {}, report, lambda *_: None))
    with growing(out, plan.description, resume) as partial:
        rows = _measured(plan.tasks, jobs, partial.done, report, partial.add)
        table = _table(plan, rows)
        finish(out, table, force)  # before another process may begin
    return table


def _measured(
    tasks: Sequence[Task],
    jobs: int,
    done: dict[str, list[Row]],
    report: Report | None,
    keep: Callable[[str, list[Row]], None],
) -> dict[str, list[Row]]:
    rows = dict(done)
    left = [task for task in tasks if task.name not in rows]
    started = time.monotonic()
    for task, found in _results(left, jobs):
        keep(task.name, found)
        rows[task.name] = found
        if report:
            seconds = time.monotonic() - started
            report(Progress(task.name, len(rows), len(tasks), seconds))
    return rows


def _results(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[Task, list[Row]]]:
    """Tasks with their rows, as they are finished."""
    if jobs == 1 or len(tasks) < 2:
        yield from ((task, _rows(task)) for task in tasks)
        return
    pool = ProcessPoolExecutor(
        min(jobs, len(tasks)),
        multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    try:
        futures = {pool.submit(_rows, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a process was killed, perhaps for want of memory, expected none; finished "
            "matrices are kept, go on with --resume and fewer --jobs"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _rows(task: Task) -> list[Row]:
    with gram.on(task.device):
        return task.rows()


def _table(plan: Plan, rows: dict[str, list[Row]]) -> pd.DataFrame:
    ordered = [row for task in plan.tasks for row in rows[task.name]]
    table = pd.DataFrame(ordered, columns=list(plan.columns))
    if plan.design is not None:
        table = table.join(plan.design, on="matrix")
    if "step" in table:
        table = table.sort_values("step", kind="stable", ignore_index=True)
    return table


def measure_checkpoints(
    before: str | Path,
    after: str | Path,
    settings: Settings = DEFAULTS,
    metrics: Collection[str] = tuple(METRICS),
    roles: Collection[str] | None = None,
    null: bool = True,
    seed: int = 0,
    jobs: int = 1,
) -> pd.DataFrame:
    """Every diagnostic of every matrix of two checkpoints, a row a matrix.

    Args:
        before, after, settings, metrics, roles, null, seed: as `plan_pair`.
        jobs: processes.

    Returns:
        A table with `COLUMNS`; NaN where a metric is undefined or not asked for, and
        where a matrix holds NaN or inf, which its note then counts.

    Raises:
        FileNotFoundError, ValueError: as `plan_pair`.
    """
    plan = plan_pair(before, after, settings, metrics, roles, null, seed)
    return run_plan(plan, jobs=jobs)


def trajectory(
    before: str | Path,
    checkpoints: Sequence[str | Path],
    k: int = 16,
    settings: Settings = DEFAULTS,
    roles: Collection[str] | None = None,
    jobs: int = 1,
) -> pd.DataFrame:
    """How every matrix's update spreads and settles over a run, a row a step.

    Args:
        before, checkpoints, k, settings, roles: as `plan_trajectory`.
        jobs: processes.

    Returns:
        A table with `TRAJECTORY_COLUMNS`.

    Raises:
        FileNotFoundError, ValueError: as `plan_trajectory`.
    """
    return run_plan(plan_trajectory(before, checkpoints, k, settings, roles), jobs=jobs)


# --- summary ---------------------------------------------------------------------


def summarise(
    table: pd.DataFrame, parts: Collection[str] | None = None
) -> pd.DataFrame:
    """A row a role and one over all, as in the paper's Table 1.

    Sparsity and density are weighted by the numbers of entries; every other metric is
    the plain mean over matrices that have it.

    Args:
        table: of `measure_checkpoints`.
        parts: of the model; None for the language model, if it is in the table.

    Returns:
        role, matrices, parameters, then a column a metric and null that was measured.
    """
    table = of_parts(table, parts)
    metrics = [
        name
        for name in COLUMNS
        if _measured_metric(name) in METRICS and table[name].notna().any()
    ]
    groups = [(str(role), part) for role, part in table.groupby("role", sort=False)]
    return pd.DataFrame(
        [
            {
                "role": role,
                "matrices": len(part),
                "parameters": int((part["rows"] * part["cols"]).sum()),
                **{name: _mean(part, name) for name in metrics},
            }
            for role, part in [*groups, ("all", table)]
        ]
    )


def beside_expected(table: pd.DataFrame) -> pd.DataFrame:
    """What was measured beside what an unplaced update at the same distance shows.

    Args:
        table: of `measure_checkpoints`.

    Returns:
        metric, measured, expected, expected_from (``norm``, ``density`` or both): means
        over the matrices that have both, weighted as in `summarise`. Where the distance
        comes from the density, density and sparsity are left out, being its input.
    """
    rows = []
    for name in EXPECTED_METRICS:
        there = table[table[name].notna() & table[f"expected_{name}"].notna()]
        if name in ("sparsity_bf16", "update_density"):
            there = there[there["expected_from"] == "norm"]
        if len(there):
            source = " and ".join(sorted(set(there["expected_from"])))
            means = (_mean(there, n) for n in (name, f"expected_{name}"))
            rows.append((name, *means, source))
    return pd.DataFrame(
        rows, columns=["metric", "measured", "expected", "expected_from"]
    )


def _measured_metric(name: str) -> str:
    """What a column is about, without the null it is of."""
    return re.sub("^(null|shuffled|turned|expected)_", "", name)


def _mean(part: pd.DataFrame, name: str) -> float:
    values = part[name]
    times = pd.Series(standing_for(part), part.index)[values.notna()]
    if not name.endswith(("sparsity_bf16", "density")):
        return weighted_mean(values.dropna().to_numpy(float), times.to_numpy())
    weights = (part["rows"] * part["cols"])[values.notna()].astype(float) * times
    total = weights.sum()
    return float((values.dropna() * weights).sum() / total) if total else math.nan

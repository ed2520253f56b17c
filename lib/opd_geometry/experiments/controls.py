"""What one matrix of a run is held against: nulls, readouts, energies, placement.

A row is (step, metric, value), as in ``measure``. The prefix of a metric says which
null it is of, and its suffix which readout:

    shuffled_    the run's own float32 entries, permuted           at the end
    turned_      its singular values, random singular vectors      at the end
    increments_  its changes from checkpoint to checkpoint, each
                 turned by rotations of its own                    every checkpoint
    walk_        Adam with the run's rates on noise of rank one,
                 stretched to the norms of those changes; of runs
                 with AdamW alone                                  every checkpoint
    rounding_    its update at the end, scaled to each norm        every checkpoint
    _bf16        W_0 plus the update, stored in bf16, minus W_0    every checkpoint
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from opd_geometry.experiments.runs import Run, sound_checkpoint
from opd_geometry.geometry import bits, gram, locking, nulls, spectra, updates
from opd_geometry.geometry.checkpoints import read_matrix
from opd_geometry.geometry.comparison import (
    ANGLES,
    Reference,
    compare,
    defined,
    generator_of,
    null_seed,
    null_weights,
)
from opd_geometry.geometry.defaults import PRINTED_ALPHA, PRINTED_DENSITIES
from opd_geometry.training.optimizer import learning_rate

Row = tuple[int, str, float]
RANK, HILL = "stable_rank", "hill_alpha"
WIDE_K = locking.WIDEST  # of Sim_K, beside the profile's own K: the paper's
ENTRYWISE = ("sparsity", "density", "principal_overlap", "low_magnitude_overlap")
SPECTRAL = (*ANGLES, "nss")
ENERGY_DIVISOR = 8  # subspaces of n / 8 directions, as for the angles


def control_rows(
    run: Run,
    name: str,
    before: Reference,
    weights: Mapping[int, Tensor],
    rank: int,
    inputs: Tensor | None = None,
) -> list[Row]:
    """Every control of one matrix over the checkpoints of an unconfined run.

    Args:
        run: whose optimizer, rates and seed the nulls take.
        name: of the matrix.
        before: of W_0.
        weights: step to the weights, the last one the end.
        rank: K of Sim_K.
        inputs: covariance of the matrix's inputs; adds the energy where they lie.
    """
    origin = before.w_before.double()
    deltas = {step: w.double() - origin for step, w in weights.items()}
    moved = {step: delta for step, delta in deltas.items() if bool(delta.any())}
    end = max(weights)
    rows = [*displacement(run, deltas)]
    if end not in moved:  # a run that never stepped has no null
        return rows

    draws = partial(_draws, run, name, end)
    rows += course(before, moved, rank, "", ("_bf16",), ("frobenius_norm", HILL))
    turned = locking.turned_increments(moved, draws(1))
    rows += course(before, turned, rank, "increments_")
    if run.train.optimizer.kind == "adamw":  # the walk is Adam's
        rows += course(before, walk(run, moved, draws(2)), rank, "walk_")
    scaled = locking.scaled_end(moved)
    rows += course(before, scaled, rank, "rounding_", ("_bf16",))
    for step, w in weights.items():
        noise = null_weights(before, w, null_seed(run.seed, name, step)) - origin
        rows += course(before, {step: noise}, 0, "null_", ("_bf16",), (HILL,))
    rows += [
        (end, metric, value)
        for metric, value in predictors(run, name, before, moved[end], rank)
    ]
    return rows + end_rows(run, name, before, weights[end], end, inputs)


def end_rows(
    run: Run,
    name: str,
    before: Reference,
    w_after: Tensor,
    end: int,
    inputs: Tensor | None = None,
) -> list[Row]:
    """The controls of one matrix that need its last weights alone: of any run.

    Args:
        run, name, before, inputs: as of `control_rows`.
        w_after: the weights at ``end``; other ones than W_0.
    """
    found = at_end(before, w_after, _draws(run, name, end, 3), inputs)
    return [(end, metric, value) for metric, value in found]


def _draws(run: Run, name: str, end: int, kind: int) -> torch.Generator:
    return generator_of((*null_seed(run.seed, name, end), kind))


def displacement(run: Run, deltas: Mapping[int, Tensor]) -> Iterator[Row]:
    """Root mean square change in the unit of the run's own learning rates.

    Every step counts, those at which nothing was learned too. No rows of another
    optimizer than AdamW, whose rates are no sizes of steps.
    """
    if run.train.optimizer.kind != "adamw":
        return
    rates = _rates(run)
    for step, delta in deltas.items():
        yield step, "displacement", locking.displacement(delta, rates[:step])


def _rates(run: Run) -> list[float]:
    """The learning rate of every step."""
    config, steps = run.train.optimizer, run.train.steps
    return [learning_rate(config, step, steps) for step in range(steps)]


# --- trajectories, own and of nulls -----------------------------------------------


def course(
    before: Reference,
    deltas: Mapping[int, Tensor],
    rank: int,
    prefix: str,
    readouts: tuple[str, ...] = ("", "_bf16"),
    metrics: tuple[str, ...] = (RANK, HILL),
) -> Iterator[Row]:
    """Rank, norm, Hill exponent and Sim_K of updates, in one or both readouts.

    Args:
        before: of W_0.
        deltas: step to update; the last one is the end.
        rank: K of Sim_K; 0: none.
        prefix: of the metrics.
        readouts: suffixes; ``_bf16`` reads what storage in bf16 leaves of an update.
        metrics: beside Sim_K.
    """
    hill_k = before.settings.hill_rank(before.w_before.shape)
    for readout in readouts:
        seen = {s: stored(before, d) if readout else d for s, d in deltas.items()}
        parts = {s: locking.decomposed(delta) for s, delta in seen.items()}
        for step, (spectrum, _) in parts.items():
            norm = float(torch.linalg.vector_norm(spectrum))
            values = {"frobenius_norm": norm, RANK: math.nan, HILL: math.nan}
            if norm > 0.0:
                values[RANK] = (norm / float(spectrum[0])) ** 2
                values[HILL] = defined(spectra.hill_exponent, spectrum, hill_k)
            yield from (
                (step, f"{prefix}{metric}{readout}", values[metric])
                for metric in metrics
            )
        for k, at in ((rank, ""), (WIDE_K, f"@K={WIDE_K}")) if rank else ():
            found = similarities_of(parts, k, f"{at}{readout}")
            for (step, metric), value in found.items():
                if not (prefix and metric.startswith("null_")):
                    yield step, f"{prefix}{metric}", value


def stored(before: Reference, delta: Tensor) -> Tensor:
    """What is left of an update once the weights are stored in bf16, float64."""
    origin = before.w_before.double()
    return bits.stored_difference(origin, origin + delta)


def similarities(
    deltas: Mapping[int, Tensor], ranks: Mapping[str, int]
) -> dict[tuple[int, str], float]:
    """Sim_K of every checkpoint's update with the last one, and its null, K/n.

    Args:
        deltas: step to W_t - W_0.
        ranks: suffix of the metric's name to K.

    Returns:
        (step, metric) to value; without the steps at which the update has no such
        subspace, being of lower rank.
    """
    parts = {step: locking.decomposed(delta) for step, delta in deltas.items()}
    found: dict[tuple[int, str], float] = {}
    for suffix, rank in ranks.items():
        found |= similarities_of(parts, rank, suffix)
    return found


def similarities_of(
    parts: Mapping[int, locking.Parts], rank: int, suffix: str
) -> dict[tuple[int, str], float]:
    """``similarities`` of updates that are decomposed already."""
    last = parts[max(parts)]
    n_cols, smaller = last[1].shape
    rank = min(rank, smaller)
    values: dict[tuple[int, str], float] = {}
    shared = locking.similarities(parts, locking.top_right(last, rank), rank)
    for step, value in shared.items():
        values[step, f"similarity_to_end{suffix}"] = value
        values[step, f"null_similarity_to_end{suffix}"] = rank / n_cols
    return values


def walk(
    run: Run, deltas: Mapping[int, Tensor], generator: torch.Generator
) -> dict[int, Tensor]:
    """`locking.walk` with the run's AdamW and rates, at the norms of its increments.

    Decay pulls on W_0, not here.
    """
    sizes = {s: float(d.norm()) for s, d in locking.increments(deltas).items()}
    config = run.train.optimizer
    return locking.walk(
        deltas[min(deltas)].shape,
        _rates(run),
        sizes,
        generator,
        betas=config.betas,
        eps=config.eps,
    )


def predictors(
    run: Run, name: str, before: Reference, delta: Tensor, rank: int
) -> Iterator[tuple[str, float]]:
    """How near the final subspace is to what was known before the run began.

    Sim_K of the update's top right subspace with that of W_0, and with that of the
    stage before, if that was a run: both readouts of the update.
    """
    known = {"weights": before.top.right[:, :rank]}
    if isinstance(run.start, Run):
        first, last = (sound_checkpoint(run.start, step) for step in (0, None))
        stage = read_matrix(last, name).double() - read_matrix(first, name).double()
        with suppress(ValueError):
            known["stage"] = spectra.top_right_subspace(stage, rank)
    for readout, update in (("", delta), ("_bf16", stored(before, delta))):
        with suppress(ValueError):
            own = spectra.top_right_subspace(update, rank)
            for what, basis in known.items():
                shared = spectra.subspace_similarity(basis, own)
                yield f"similarity_of_{what}{readout}", shared


# --- the end ---------------------------------------------------------------------


def at_end(
    before: Reference,
    w_after: Tensor,
    generator: torch.Generator,
    inputs: Tensor | None = None,
) -> Iterator[tuple[str, float]]:
    """Shuffled and turned nulls, energies and placement of the final update."""
    origin = before.w_before.double()
    delta = nulls.update_of(before.w_before, w_after)
    for prefix, other, metrics in (
        ("shuffled_", nulls.shuffled(delta, generator), ENTRYWISE),
        ("turned_", nulls.turned(delta, generator), SPECTRAL),
    ):
        for metric, value in compare(before, origin + other, metrics).items():
            yield f"{prefix}{metric}", value
    yield from energies(before, delta, inputs)
    yield "size_exponent", nulls.size_exponent(before.w_before, delta)[0]
    visible = updates.visible_update(before.w_before, w_after)
    own = float(visible.double().mean())
    masks = {
        "principal_overlap": before.principal,
        "low_magnitude_overlap": before.low_magnitude,
    }
    yield from _placed(before, delta, masks, own, "@d=own", generator)
    printed = printed_masks(before)
    for density in PRINTED_DENSITIES:
        at = f"@d={density},alpha={PRINTED_ALPHA}"
        yield from _placed(before, delta, printed, density, at, generator)


def _placed(
    before: Reference,
    delta: Tensor,
    masks: Mapping[str, Tensor],
    density: float,
    at: str,
    generator: torch.Generator,
) -> Iterator[tuple[str, float]]:
    """Overlaps at a density: visible in bf16, shuffled, and free of any grid."""
    with suppress(ValueError):  # no such density of this update
        found = nulls.placement(before.w_before, delta, masks, density, generator)
        yield from ((f"{metric}{at}", value) for metric, value in found.items())


def printed_masks(before: Reference) -> dict[str, Tensor]:
    """Principal and low-magnitude mask at the share that the paper's numbers are of."""
    low = updates.low_magnitude_mask(before.w_before, PRINTED_ALPHA)
    principal = before.principal_at(PRINTED_ALPHA)
    return {"principal_overlap": principal, "low_magnitude_overlap": low}


def energies(
    before: Reference, delta: Tensor, inputs: Tensor | None = None
) -> Iterator[tuple[str, float]]:
    """Share of the squared update in W_0's top and bottom subspaces, and on the masks.

    And in the top subspace of the covariance of the matrix's inputs.

    With ``null_`` in front what an unplaced update has there on average: k / n, or the
    mask's share of the entries.
    """
    k = spectra.default_rank(delta.shape, ENERGY_DIVISOR)
    found = gram.decompose(before.w_before, k, lowest=k)
    for side, top, bottom in (
        ("left", found.left, found.lowest_left),
        ("right", found.right, found.lowest_right),
    ):
        for end, part in (("top", top), ("bottom", bottom)):
            name = f"energy_{end}_{side}"
            yield name, nulls.energy_share(delta, part, side)
            yield f"null_{name}", k / len(part)
    if inputs is not None:
        basis = nulls.covariance_basis(inputs, k)
        yield "energy_inputs", nulls.energy_share(delta, basis)
        yield "null_energy_inputs", k / basis.shape[0]
    for what, mask in (
        ("principal", before.principal),
        ("low_magnitude", before.low_magnitude),
    ):
        yield f"energy_{what}", nulls.energy_in_mask(delta, mask)
        yield f"null_energy_{what}", float(mask.double().mean())

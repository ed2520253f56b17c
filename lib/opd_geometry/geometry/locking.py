"""What a trajectory's similarity to its own end shows without any learning.

Sim_K of the update at a fifth of training with the one at the end is no surprise by
itself: the end contains the beginning. Two random subspaces, K / n, are therefore no
null for it. These are, each a trajectory {step: W_t - W_0} to be measured as the run's
own:

- `walk`: the run's optimizer and learning rates on gradients that are pure noise;
- `Increments`: what the run added between its checkpoints, each turned by a
  rotation of its own, so that sizes, spectra and their order stay and nothing returns;
- `scaled_end`: only for what is read from bf16: the last update, scaled to the norm of
  each step, whose rank changes by rounding alone once it is stored.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from opd_geometry.geometry import bits, gram, nulls, spectra
from opd_geometry.geometry.spectra import finite_matrix

LEAST = 3  # checkpoints: with two, the one before the end is the only increment


def walk(
    shape: Sequence[int],
    rates: Sequence[float],
    steps: Mapping[int, float] | Sequence[int],
    generator: torch.Generator,
    *,
    rank: int | None = 1,
    betas: tuple[float, float] | None = (0.9, 0.999),
    eps: float = 1e-8,
) -> dict[int, Tensor]:
    """Where a run's optimizer goes on gradients that are pure noise.

    D_t = sum over the segments between checkpoints of c sum_s move_s, c so that the
    segment is as long as the run's own

    Args:
        shape: (n_rows, n_cols).
        rates: learning rate of every step, from the first on.
        steps: after which the walk is kept, from 1 to len(rates); with the length of
            the run's own way since the one before, or as they come.
        generator: a CPU generator; give every matrix noise of its own.
        rank, betas, eps: as `moves`.

    Returns:
        Step to the sum of the moves, (n_rows, n_cols) float64.

    Raises:
        ValueError: a step out of range, or rank below 1.

    Source: ours.
    """
    if not steps or min(steps) < 1 or max(steps) > len(rates):
        raise ValueError(
            f"steps {sorted(steps)} of a walk of {len(rates)}, expected some from 1 "
            "to its length: one learning rate a step"
        )
    total, found = torch.zeros(*shape, dtype=torch.float64), {}
    own = torch.zeros(*shape)
    taken = moves(shape, rates[: max(steps)], generator, rank, betas, eps)
    for step, move in enumerate(taken, 1):
        own += move
        if step in steps:
            change = own.double()
            wanted = steps[step] if isinstance(steps, Mapping) else None
            factor = 1.0 if wanted is None else wanted / float(change.norm())
            total = total + change * factor
            found[step] = total
            own = torch.zeros(*shape)
    return found


def moves(
    shape: Sequence[int],
    rates: Sequence[float],
    generator: torch.Generator,
    rank: int | None = 1,
    betas: tuple[float, float] | None = (0.9, 0.999),
    eps: float = 1e-8,
) -> Iterator[Tensor]:
    """The steps that an optimizer makes of noise, one after the other.

    g = sum_{i <= rank} x_i y_i^T, x and y Gaussian; m <- b1 m + (1 - b1) g,
    v <- b2 v + (1 - b2) g^2, -lr m / (1 - b1^t) sqrt(1 - b2^t) / (sqrt(v) + eps)

    Args:
        shape: (n_rows, n_cols).
        rates: learning rate of every step.
        generator: a CPU generator.
        rank: of a step's gradient; None for Gaussian noise of full rank.
        betas: of Adam; None for plain steps of gradient descent.
        eps: of Adam.

    Yields:
        (n_rows, n_cols) float32.

    Raises:
        ValueError: a rank below 1.

    Source: Kingma and Ba (2015), section 2, for Adam.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank {rank!r}, expected at least 1, or None for full rank")
    m, v = torch.zeros(*shape), torch.zeros(*shape)
    for t, rate in enumerate(rates, 1):
        if rank is None:
            gradient = torch.randn(*shape, generator=generator)
        else:
            left = torch.randn(shape[0], rank, generator=generator)
            gradient = left @ torch.randn(rank, shape[1], generator=generator)
        if betas is None:
            yield -rate * gradient
            continue
        m.lerp_(gradient, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
        scale = math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        yield -(rate * scale) * m / (v.sqrt() + eps)


def check_length(steps: Sequence[int]) -> None:
    """Refuse a trajectory that is too short for a locking null.

    Raises:
        ValueError: fewer than three checkpoints.
    """
    if len(steps) < LEAST:
        raise ValueError(
            f"a trajectory of {len(steps)} checkpoints (steps {list(steps)}), expected "
            f"{LEAST} or more: with fewer there is no null of its similarity to its "
            "end; save more checkpoints"
        )


def turned_increments(
    deltas: Mapping[int, Tensor], generator: torch.Generator
) -> dict[int, Tensor]:
    """`Increments` of a whole trajectory.

    Args:
        deltas: step to W_t - W_0; a stored difference is turned with its rounding.
        generator: a CPU generator.

    Returns:
        Step to the turned sum, (n_rows, n_cols) float64.

    Raises:
        ValueError: NaN or inf.
    """
    sums = Increments(deltas[min(deltas)].shape, generator)
    return {
        step: sums.add(finite_matrix(deltas[step], f"the update at step {step}"))
        for step in sorted(deltas)
    }


class Increments:
    """A run's own increments, each turned by an independent rotation, one by one.

    sum_{s <= t} P_s (D_s - D_{s-1}) Q_s^T, P and Q as of `nulls.turned`

    They keep how much was added when, and in how many directions; that later increments
    go where earlier ones went is taken away.

    Args:
        shape: (n_rows, n_cols).
        generator: a CPU generator.

    Source: ours.
    """

    def __init__(self, shape: Sequence[int], generator: torch.Generator) -> None:
        self._total = torch.zeros(*shape, dtype=torch.float64)
        self._before = self._total
        self._generator = generator

    def add(self, delta: Tensor) -> Tensor:
        """The turned sum up to this checkpoint.

        Args:
            delta: W_t - W_0, float64 and finite; not to be written to afterwards.
        """
        change, self._before = delta - self._before, delta
        if bool(change[0].any()) or bool(change.any()):
            self._total = nulls.turned(change, self._generator).add_(self._total)
        return self._total


def increments(deltas: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """What was added from checkpoint to checkpoint, the first one since W_0.

    Args:
        deltas: step to W_t - W_0.

    Raises:
        ValueError: NaN or inf.
    """
    steps = sorted(deltas)
    sound = {s: finite_matrix(deltas[s], f"the update at step {s}") for s in steps}
    first = {steps[0]: sound[steps[0]]}
    return first | {b: sound[b] - sound[a] for a, b in pairwise(steps)}


def scaled_end(deltas: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """The last update, scaled to the norm of each step.

    |D_t| / |D_T| D_T: what is read of it in bf16 changes by rounding alone

    Args:
        deltas: step to W_t - W_0 before it is stored.

    Raises:
        ValueError: NaN or inf, or an end that is zero.

    Source: ours.
    """
    end = finite_matrix(deltas[max(deltas)], "the last update")
    size = end.norm()
    if float(size) == 0.0:
        raise ValueError(
            "the last update is zero, expected one that moved; leave this matrix out"
        )
    return {step: end * float(d.norm() / size) for step, d in deltas.items()}


# --- decomposed ---------------------------------------------------------------------

WIDEST = 16  # K of the paper, and the widest that `decomposed` keeps
Parts = tuple[Tensor, Tensor]  # spectrum, and leading right singular vectors as columns


def decomposed(delta: Tensor) -> Parts:
    """Spectrum and leading right singular vectors of an update, once for every K.

    Args:
        delta: (n_rows, n_cols), any floating dtype.

    Raises:
        ValueError: NaN or inf.
    """
    found = gram.decompose(delta, min(WIDEST, *delta.shape))
    return found.spectrum, found.right


def top_right(parts: Parts, k: int) -> Tensor | None:
    """Top-k right singular vectors; None where there are not so many directions.

    Args:
        parts: of `decomposed`: an update, or W_0 itself.
        k: from 1 to `WIDEST`, or min(shape).
    """
    spectrum, vectors = parts
    floor = torch.finfo(torch.float64).eps * max(vectors.shape) * float(spectrum[0])
    there = float(spectrum[0]) > 0.0 and float(spectrum[k - 1]) > floor
    return vectors[:, :k] if there else None


def similarities(
    parts: Mapping[int, Parts], end: Tensor | None, k: int
) -> dict[int, float]:
    """Sim_K of every step's update with one subspace.

    Args:
        parts: step to what `decomposed` makes of W_t - W_0, or of a null's.
        end: (n_cols, k) of `top_right`: of this run's last update, of another arm's,
            another seed's or the preceding stage's, or of W_0.
        k: K.

    Returns:
        Step to Sim_K, from 0 to 1; without the steps where either has no such subspace.

    Raises:
        ValueError: another number of columns.

    Source: arXiv:2606.07082 Fig. 5.
    """
    known = {step: top_right(part, k) for step, part in parts.items()}
    return {
        step: spectra.subspace_similarity(basis, end)
        for step, basis in known.items()
        if basis is not None and end is not None
    }


def displacement(
    delta: Tensor, rates: Sequence[float] | float, steps: int | None = None
) -> float:
    """How far weights moved, in units of what Adam does on pure noise.

    rms(delta) / sqrt(sum_t lr_t^2), or rms(delta) / (lr sqrt(T))

    Args:
        delta: W_T - W_0, any shape.
        rates: the learning rate of every step, or one for all.
        steps: T, with one rate for all.

    Returns:
        About 1 where the gradients are independent noise, up to sqrt(T) where every
        step went the same way.

    Raises:
        ValueError: no step, a rate below 0 or all zero, NaN or inf.

    Source: ours.
    """
    values = spectra.finite_float64(delta, "delta")
    each = [rates] * (steps or 0) if isinstance(rates, float | int) else list(rates)
    unit = math.sqrt(float(np.square(each).sum()))
    if not 0.0 < unit < np.inf or min(each) < 0.0:
        raise ValueError(
            f"learning rates {rates!r} over {len(each)} steps, expected one or more, "
            "none below 0 and not all 0"
        )
    return bits.norm(values) / math.sqrt(values.numel()) / unit

"""What a trajectory's similarity to its own end shows without any learning.

Sim_K of the update at a fifth of training with the one at the end is no surprise by
itself: the end contains the beginning. Two random subspaces, K / n, are therefore no
null for it. These are, each a trajectory {step: W_t - W_0} to be measured as the run's
own:

- `walk`: the run's optimizer and learning rates on gradients that are pure noise;
- `turned_increments`: what the run added between its checkpoints, each turned by a
  rotation of its own, so that sizes, spectra and their order stay and nothing returns;
- `rounded_end`: only for what is read from bf16: the last update, scaled to the norm of
  each step and stored, whose rank changes by rounding alone.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from opd_geometry.geometry import bits, nulls, spectra
from opd_geometry.geometry.spectra import check_rank, finite_matrix

LEAST = 3  # checkpoints: with two, the one before the end is the only increment


def walk(
    shape: tuple[int, int],
    rates: Sequence[float],
    steps: Sequence[int],
    generator: torch.Generator,
    *,
    rank: int | None = 1,
    betas: tuple[float, float] | None = (0.9, 0.999),
    norms: Sequence[float] | None = None,
    eps: float = 1e-8,
) -> dict[int, Tensor]:
    """Where a run's optimizer goes on gradients that are pure noise.

    g_t = c_t sum_{i <= rank} x_i y_i^T, x and y Gaussian;
    m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2,
    D <- D - lr_t m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        shape: (n_rows, n_cols).
        rates: learning rate of every step, from the first on.
        steps: after which the walk is kept, from 1 to len(rates).
        generator: a CPU generator; give every matrix noise of its own.
        rank: of a step's gradient; None for Gaussian noise of full rank.
        betas: of Adam; None for plain steps of gradient descent.
        norms: c_t over all steps, such as the gradients' norms after clipping: only
            their ratios matter to Adam. None for equal ones.
        eps: of Adam, relative to gradients with entries of about c_t.

    Returns:
        Step to the sum of the updates, (n_rows, n_cols) float64.

    Raises:
        ValueError: a step out of range, rank below 1, or norms of another number.

    Source: ours; Kingma and Ba (2015) for Adam.
    """
    wanted = {*steps}
    if not wanted or min(wanted) < 1 or max(wanted) > len(rates):
        raise ValueError(
            f"steps {sorted(wanted)} of a walk of {len(rates)}, expected some from 1 "
            "to its length: one learning rate a step"
        )
    if (rank is not None and rank < 1) or (norms and len(norms) != len(rates)):
        raise ValueError(
            f"rank {rank!r} and {len(norms or ())} norms for {len(rates)} steps, "
            "expected a rank of at least 1, or None, and one norm a step"
        )
    total = torch.zeros(shape, dtype=torch.float64)
    first, second = torch.zeros_like(total), torch.zeros_like(total)
    kept = {}
    for t, rate in enumerate(rates[: max(wanted)], 1):
        step = _noise(shape, rank, generator)
        if norms:
            step *= norms[t - 1]
        if betas:
            first.lerp_(step, 1.0 - betas[0])
            second.lerp_(step.square_(), 1.0 - betas[1])
            scale = second.div(1.0 - betas[1] ** t).sqrt_().add_(eps)
            step = first.div(1.0 - betas[0] ** t).div_(scale)
        total.sub_(step, alpha=rate)
        if t in wanted:
            kept[t] = total.clone()
    return kept


def _noise(
    shape: tuple[int, int], rank: int | None, generator: torch.Generator
) -> Tensor:
    def gaussian(*sides: int) -> Tensor:
        return torch.randn(sides, generator=generator, dtype=torch.float64)

    if rank is None:
        return gaussian(*shape)
    return gaussian(shape[0], rank) @ gaussian(rank, shape[1])


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
    """A run's own increments, each turned by an independent rotation.

    sum_{s <= t} P_s (D_s - D_{s-1}) Q_s^T, P and Q as of `nulls.turned`

    The first one stays as it is: turned against it, all others lie as they would
    against one that is turned, too.

    Args:
        deltas: step to W_t - W_0, of three checkpoints or more; a stored difference is
            turned with its rounding.
        generator: a CPU generator.

    Returns:
        Step to the turned sum, (n_rows, n_cols) float64.

    Raises:
        ValueError: fewer than three checkpoints, NaN or inf.

    Source: ours.
    """
    steps = sorted(deltas)
    check_length(steps)
    sums = Increments(deltas[steps[0]].shape, generator)
    return {
        step: sums.add(
            finite_matrix(deltas[step], f"the update at step {step}")
        ).clone()
        for step in steps
    }


class Increments:
    """`turned_increments`, one checkpoint after the other, in two matrices of memory.

    Args:
        shape: (n_rows, n_cols).
        generator: a CPU generator.
    """

    def __init__(self, shape: Sequence[int], generator: torch.Generator) -> None:
        self._total = torch.zeros(*shape, dtype=torch.float64)
        self._before = torch.zeros_like(self._total)
        self._generator = generator

    def add(self, delta: Tensor) -> Tensor:
        """The turned sum up to this checkpoint; it changes with the next one.

        Args:
            delta: W_t - W_0, finite.
        """
        increment = delta.double() - self._before
        self._before.copy_(delta)
        if bool(increment.any()):
            first = not self._total.any()  # turning it would turn the whole sum
            self._total += (
                increment if first else nulls.turned(increment, self._generator)
            )
        return self._total


def rounded_end(w_before: Tensor, deltas: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """The last update scaled to the norm of each step, as bf16 stores it.

    bf16(W_0 + |D_t| / |D_T| D_T) - bf16(W_0)

    Args:
        w_before: W_0 (n_rows, n_cols), any floating dtype.
        deltas: step to W_t - W_0 before it is stored.

    Returns:
        Step to the stored difference, float64: its rank changes by rounding alone.

    Raises:
        ValueError: NaN or inf, or an end that is zero.

    Source: ours.
    """
    start = finite_matrix(w_before, "w_before")
    end = finite_matrix(deltas[max(deltas)], "the last update")
    size = bits.norm(end)
    if size == 0.0:
        raise ValueError(
            "the last update is zero, expected one that moved; leave this matrix out"
        )
    origin = bits.to_bfloat16(start).double()
    return {
        step: bits.to_bfloat16(start + bits.norm(delta) / size * end).double() - origin
        for step, delta in deltas.items()
    }


def top_right(w: Tensor, k: int) -> Tensor | None:
    """Top-k right singular vectors; None where a matrix has not so many directions.

    Args:
        w: (n_rows, n_cols), any floating dtype: an update, or W_0 itself.
        k: from 1 to min(shape).

    Raises:
        ValueError: NaN or inf, or k out of range.
    """
    matrix = finite_matrix(w, "w")
    check_rank(k, matrix.shape)
    try:
        return spectra.top_right_subspace(matrix, k)
    except ValueError:  # finite and k in range: of lower rank, or zero
        return None


def similarities(
    deltas: Mapping[int, Tensor], end: Tensor | None, k: int
) -> dict[int, float]:
    """Sim_K of every step's update with one subspace.

    Args:
        deltas: step to W_t - W_0, or to a null's.
        end: (n_cols, k) of `top_right`: of this run's last update, of another arm's,
            another seed's or the preceding stage's, or of W_0.
        k: K.

    Returns:
        Step to Sim_K, from 0 to 1; NaN where either has no such subspace.

    Raises:
        ValueError: as `top_right`, or another number of columns.

    Source: arXiv:2606.07082 Fig. 5.
    """
    found = {}
    for step, delta in deltas.items():
        basis = top_right(delta, k) if end is not None else None
        found[step] = np.nan
        if basis is not None and end is not None:
            found[step] = spectra.subspace_similarity(basis, end)
    return found


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
    unit = float(np.linalg.norm(each)) if each else 0.0
    if not 0.0 < unit < np.inf or min(each) < 0.0:
        raise ValueError(
            f"learning rates {rates!r} over {len(each)} steps, expected one or more, "
            "none below 0 and not all 0"
        )
    return bits.norm(values) / values.numel() ** 0.5 / unit

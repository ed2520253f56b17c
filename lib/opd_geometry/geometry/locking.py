"""What a trajectory's similarity to its own end shows without any learning.

Sim_K of the update at a fifth of training with the one at the end is no surprise by
itself: the end contains the beginning. Two random subspaces, K / n, are therefore no
null for it. These are, each a trajectory {step: W_t - W_0} to be measured as the run's
own:

- `walk`: the run's optimizer and learning rates on gradients that are pure noise, as
  `walking` one checkpoint at a time;
- `Increments`: what the run added between its checkpoints, each turned by a
  rotation of its own, so that sizes, spectra and their order stay and nothing returns;
- `scaled_end`: only for what is read from bf16: the last update, scaled to the norm of
  each step, whose rank changes by rounding alone once it is stored.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from opd_geometry.geometry import bits, gram, nulls, spectra
from opd_geometry.geometry.spectra import finite_matrix

LEAST = 3  # checkpoints: with two, the one before the end is the only increment
CHUNK_ENTRIES = 2**17  # of a walk that are taken through all steps while in a cache
BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam, as its authors and every trainer have them


@dataclass(frozen=True)
class Optimizer:
    """What a run took its steps with, as far as a walk needs it.

    Attributes:
        rates: learning rate of every step, from the first on.
        betas: of Adam; None for plain steps of gradient descent.
        eps: of Adam.
        origin: where that is known from, in words.

    Raises:
        ValueError: no rate, one below 0 or no number, all zero, or betas out of range.
    """

    rates: tuple[float, ...]
    betas: tuple[float, float] | None = BETAS
    eps: float = EPS
    origin: str = ""

    def __post_init__(self) -> None:
        unit_of(self.rates)
        if self.betas and not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(
                f"betas {self.betas}, expected two from 0 to below 1, such as 0.9,0.999"
            )

    def farthest(self, step: int) -> float:
        """The displacement of a run whose every step went the same way.

        Args:
            step: the last one.

        Returns:
            Up to sqrt(step); infinite where no rate is above 0 yet.
        """
        rates = self.rates[:step]
        return sum(rates) / unit_of(rates) if any(rates) else math.inf


def walk(
    shape: Sequence[int],
    rates: Sequence[float],
    steps: Mapping[int, float] | Sequence[int],
    generator: torch.Generator,
    *,
    rank: int | None = 1,
    betas: tuple[float, float] | None = BETAS,
    eps: float = EPS,
) -> dict[int, Tensor]:
    """Where a run's optimizer goes on gradients that are pure noise.

    D_t = sum over the segments between checkpoints of c sum_s move_s, c so that the
    segment is as long as the run's own; a move is Adam's on g:

    g = sum_{i <= rank} x_i y_i^T, x and y Gaussian; m <- b1 m + (1 - b1) g,
    v <- b2 v + (1 - b2) g^2, -lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        shape: (n_rows, n_cols).
        rates: learning rate of every step, from the first on.
        steps: after which the walk is kept, from 1 to len(rates); with the length of
            the run's own way since the one before, or as they come.
        generator: a CPU generator; give every matrix noise of its own.
        rank: of a step's gradient; None for Gaussian noise of full rank.
        betas: of Adam; None for plain steps of gradient descent.
        eps: of Adam.

    Returns:
        Step to the sum of the moves, (n_rows, n_cols) float64.

    Raises:
        ValueError: a step out of range, or rank below 1.

    Source: ours; Kingma and Ba (2015), section 2, for Adam.
    """
    optimizer = Optimizer(tuple(rates), betas, eps)
    walked = walking(shape, optimizer, steps, generator, rank)
    return {step: total.clone() for step, total in walked}


def walking(
    shape: Sequence[int],
    optimizer: Optimizer,
    steps: Mapping[int, float] | Sequence[int],
    generator: torch.Generator,
    rank: int | None = 1,
) -> Iterator[tuple[int, Tensor]]:
    """As `walk`, one checkpoint after the other.

    Yields:
        Step and the sum of the moves, to which the next ones are added in place.
    """
    if not steps or min(steps) < 1 or max(steps) > len(optimizer.rates):
        raise ValueError(
            f"steps {sorted(steps)} of a walk of {len(optimizer.rates)}, expected some "
            "from 1 to its length: one learning rate a step"
        )
    if rank is not None and rank < 1:
        raise ValueError(f"rank {rank!r}, expected at least 1, or None for full rank")
    walk = Walk(shape, optimizer.betas, optimizer.eps, rank)
    for before, step in pairwise([0, *sorted(steps)]):
        length = steps[step] if isinstance(steps, Mapping) else None
        yield step, walk.add(optimizer.rates[before:step], length, generator)


class Walk:
    """A run's optimizer on pure noise, segment by segment; see `walk`.

    Args:
        shape: (n_rows, n_cols).
        betas: of Adam; None for plain steps of gradient descent.
        eps: of Adam.
        rank: of a step's gradient; None for Gaussian noise of full rank.

    Attributes:
        total: sum of the moves, float64.
        m, v: Adam's moments, float32.
        taken: steps so far.
    """

    def __init__(
        self,
        shape: Sequence[int],
        betas: tuple[float, float] | None = BETAS,
        eps: float = EPS,
        rank: int | None = 1,
    ) -> None:
        self.total = torch.zeros(*shape, dtype=torch.float64)
        self.m, self.v, self.taken = torch.zeros(*shape), torch.zeros(*shape), 0
        self._betas, self._eps, self._rank = betas, eps, rank

    def add(
        self, rates: Sequence[float], length: float | None, generator: torch.Generator
    ) -> Tensor:
        """The sum after some more steps, to which the next are added in place.

        Args:
            rates: learning rate of each.
            length: norm of what the run itself added in them; None: as it comes.
            generator: a CPU generator.
        """
        shape = self.total.shape
        own = torch.zeros(shape)
        noise = [_noise(shape, self._rank, generator) for _ in rates]
        # Rows know nothing of one another, so some of them walk alone, in a cache.
        n_rows = max(1, CHUNK_ENTRIES // shape[1])
        for start in range(0, shape[0], n_rows):
            part = slice(start, start + n_rows)
            steps = [
                (rate, x[part], y) for rate, (x, y) in zip(rates, noise, strict=True)
            ]
            self._advance(own[part], self.m[part], self.v[part], steps)
        self.taken += len(rates)
        walked = float(torch.linalg.vector_norm(own, dtype=torch.float64))
        scale = length / walked if length is not None and walked else 1.0
        return self.total.add_(own, alpha=scale)

    def _advance(
        self,
        own: Tensor,
        m: Tensor,
        v: Tensor,
        steps: Sequence[tuple[float, Tensor, Tensor | None]],
    ) -> None:
        """Add the moves of some steps, in place.

        By the kernel of torch.optim.Adam(fused=True): in Python, an optimizer's checks
        would take longer than the move of a small matrix.
        """
        product, t = torch.empty_like(own), torch.tensor(float(self.taken))
        for rate, x, y in steps:
            if y is None:
                gradient = x
            elif x.shape[1] == 1:
                gradient = torch.mul(x, y, out=product)
            else:
                gradient = torch.mm(x, y, out=product)
            if self._betas is None:
                own.add_(gradient, alpha=-rate)
                continue
            torch._fused_adam_(
                [own],
                [gradient],
                [m],
                [v],
                [],
                [t.add_(1.0)],
                lr=rate,
                beta1=self._betas[0],
                beta2=self._betas[1],
                weight_decay=0.0,
                eps=self._eps,
                amsgrad=False,
                maximize=False,
            )


def _noise(
    shape: Sequence[int], rank: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Factors of a gradient, or all of it."""
    if rank is None:
        return torch.randn(*shape, generator=generator), None
    left = torch.randn(shape[0], rank, generator=generator)
    return left, torch.randn(rank, shape[1], generator=generator)


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
    return {step: sums.add(d).clone() for step, d in increments(deltas).items()}


class Increments:
    """A run's own increments, each turned by an independent rotation, one by one.

    sum_{s <= t} P_s (D_s - D_{s-1}) Q_s^T, P and Q as of `nulls.turned`

    They keep how much was added when, and in how many directions; that later increments
    go where earlier ones went is taken away.

    Args:
        shape: (n_rows, n_cols).
        generator: a CPU generator.
        first: whether the first is turned, too. A rotation that all have in common
            changes neither a spectrum nor a similarity, so what asks for these alone
            need not pay for it.
        uniform_side: of `nulls.turned`.

    Source: ours.
    """

    def __init__(
        self,
        shape: Sequence[int],
        generator: torch.Generator,
        first: bool = True,
        uniform_side: int = nulls.UNIFORM_SIDE,
    ) -> None:
        self._total = torch.zeros(*shape, dtype=torch.float64)
        self._generator, self._turns = generator, first
        self._uniform_side = uniform_side
        self.n_moved = 0  # changes that were not zero

    def add(self, change: Tensor) -> Tensor:
        """The turned sum up to this checkpoint, to which the next are added in place.

        Args:
            change: W_t - W_s, s the checkpoint before, float64 and finite.
        """
        if bool(change[0].any()) or bool(change.any()):
            if self._turns:
                change = nulls.turned(change, self._generator, self._uniform_side)
            self._total += change
            self._turns = True
            self.n_moved += 1
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
    return bits.norm(values) / math.sqrt(values.numel()) / unit_of(each)


def unit_of(rates: Sequence[float]) -> float:
    """How far Adam goes on pure noise: sqrt(sum_t lr_t^2).

    Raises:
        ValueError: no step, a rate below 0 or all zero, NaN or inf.
    """
    unit = math.sqrt(float(np.square(rates).sum()))
    if not 0.0 < unit < np.inf or min(rates) < 0.0:
        raise ValueError(
            f"learning rates {list(rates[:3])} and so on over {len(rates)} steps, "
            "expected one or more, none below 0 and not all 0"
        )
    return unit

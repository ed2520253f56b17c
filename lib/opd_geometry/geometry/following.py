"""How the update of one matrix spreads and settles over a run, beside its nulls."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_geometry.geometry import bits, comparison, gram, krylov, locking, nulls
from opd_geometry.geometry.comparison import DEFAULTS, Settings
from opd_geometry.geometry.tables import Row

COLUMNS = (
    "step",
    "matrix",
    "role",
    "layer",
    "part",
    "stable_rank",
    "frobenius_norm",
    "hill_alpha",
    "similarity_to_end",
    "similarity_null",
    "increments_similarity_to_end",
    "increments_stable_rank",
    "walk_similarity_to_end",
    "walk_stable_rank",
    "similarity_of_weights",
    "stable_rank_error",
    "hill_alpha_error",
    "subspace_error_deg",
    "stable_rank_bf16",
    "frobenius_norm_bf16",
    "hill_alpha_bf16",
    "similarity_to_end_bf16",
    "rounding_stable_rank_bf16",
    "rounding_hill_alpha_bf16",
    "rounding_similarity_to_end_bf16",
    "displacement",
    "note",
)


def follow_tensors(
    w_before: Tensor,
    later: Callable[[int], Tensor],
    steps: Sequence[int],
    k: int = 16,
    settings: Settings = DEFAULTS,
    seed: int | tuple[int, ...] = 0,
    *,
    readout: bool = True,
    against: Mapping[str, Tensor] | None = None,
    optimizer: locking.Optimizer | None = None,
    walk: bool = True,
    iterated: bool = False,
) -> list[Row]:
    """How the update of one matrix spreads and settles over a run.

    Sim_K(t, end) = ||V_K(t)^T V_K(end)||_F^2 / K, V_K(t) the top-K right singular
    vectors of W_t - W_0

    Args:
        w_before: W_0 (n_rows, n_cols).
        later: step -> W_t; asked for one at a time, the last first, then in order.
        steps: ascending; the last is the end.
        k: K, cut to the smaller side of the matrix.
        settings: its hill_k counts.
        seed: of the rotations and of the walk.
        readout: also what is read from weights stored in bf16, and what rounding alone
            makes of it.
        against: name to another update of the same shape: another arm's, another
            seed's or the preceding stage's.
        optimizer: what took the steps; gives the displacement and the walk.
        walk: whether it walks, which takes as long as so many steps of Adam.
        iterated: spectra and subspaces by `krylov.spread`, about and with errors.

    Returns:
        A row a step of `COLUMNS`: step, stable_rank, frobenius_norm,
        hill_alpha, similarity_to_end (0 to 1), each also with ``_bf16`` behind it, of
        bf16(W_t) - bf16(W_0), and with ``rounding_`` before that, of the last update
        scaled to the step's norm (`locking.scaled_end`); similarity_null = K / n_cols,
        that of random subspaces; stable rank and similarity of three steps or more,
        with ``increments_`` of the run's own increments, each turned by itself
        (`locking.Increments`), with ``walk_`` of its optimizer on noise, each segment
        as long as the run's (`locking.walk`); similarity_of_weights, that of W_0's
        top-K right subspace with the end; similarity_to_NAME, that of each step with
        another update; displacement in units of sqrt(sum lr^2). NaN where there is no
        such value.

    Raises:
        ValueError: shapes differ or a value is not finite.

    Source: arXiv:2606.07082 Figures 4 and 5 (K = 16).
    """
    look = _Look(min(k, *w_before.shape), settings, iterated)
    last = later(steps[-1])
    end, size = comparison.difference(w_before, last), bits.norm(w_before)
    stored = _Stored(w_before, end, look) if readout else None
    locks = len(steps) >= locking.LEAST
    walks = walk and locks and optimizer is not None
    generator = comparison.generator_of(seed)
    turned = locking.Increments(w_before.shape, generator, False, nulls.SHORT_SIDE)
    others = {name: look.top(other) for name, other in (against or {}).items()}
    rows: list[Row] = []
    paths: dict[str, list[Tensor | None]] = defaultdict(list)
    lengths: dict[int, float] = {}
    before: Tensor | None = None
    for step in steps:
        w, delta = (last, end) if step == steps[-1] else (later(step), None)
        delta = comparison.difference(w_before, w) if delta is None else delta
        own = look.spread(delta, floor=bits.rounding(w.dtype, size, w.shape))
        found = {"{}": own}
        if locks:
            change = delta if before is None else delta - before
            before, total = delta, turned.add(change)
            lengths[step] = bits.norm(change) if walks else math.nan
            moved = turned.n_moved >= 2
            found["increments_{}"] = look.leading(total) if moved else own
            del change
        if stored is not None:
            found |= stored.readouts(w, own, step == steps[-1])
        row: Row = {"step": step}
        for name, (values, basis) in found.items():
            row |= {name.format(n): v for n, v in values.items()}
            paths[name.format("similarity_to_end")].append(basis)
        if optimizer is not None and any(rates := optimizer.rates[:step]):
            unit = locking.unit_of(rates) * math.sqrt(delta.numel())
            row["displacement"] = row["frobenius_norm"] / unit
        for name, other in others.items():
            row[f"similarity_to_{name}"] = _shared(own[1], other)
        rows.append(row)
    del stored, turned, before, delta
    if walks and optimizer is not None:
        walked = _walked(look, w_before.shape, optimizer, lengths, seed)
        for row, (values, basis) in zip(rows, walked, strict=True):
            row["walk_stable_rank"] = values["stable_rank"]
            paths["walk_similarity_to_end"].append(basis)
    of_weights = _shared(look.top(w_before), paths["similarity_to_end"][-1])
    for i, row in enumerate(rows):
        row |= {name: _shared(path[i], path[-1]) for name, path in paths.items()}
        row["similarity_null"] = look.k / w_before.shape[1]
        row["similarity_of_weights"] = of_weights
    return rows


def _shared(a: Tensor | None, b: Tensor | None) -> float:
    """Sim_K of two bases from here, NaN where there is no subspace."""
    if a is None or b is None:
        return math.nan
    return min(1.0, float((a.T @ b).square().sum()) / a.shape[1])


Spread = tuple[dict[str, float], Tensor | None]  # values, and the top right subspace


@dataclass(frozen=True)
class _Look:
    """What is looked at in an update, and how closely.

    Attributes:
        k: dimension of the subspace.
        settings: its hill_k counts.
        iterated: by `krylov.spread`, about and with errors.
    """

    k: int
    settings: Settings
    iterated: bool

    def spread(self, delta: Tensor, rough: bool = False, floor: float = 0.0) -> Spread:
        """Norm, stable rank and Hill exponent of an update, and its top subspace."""
        norm = bits.norm(delta)
        if norm == 0.0:
            nothing = {"stable_rank": math.nan, "hill_alpha": math.nan}
            return {"frobenius_norm": 0.0, **nothing}, None
        hill_k = self.settings.hill_rank(delta.shape)
        if self.iterated:
            return self._about(delta, norm, min(hill_k, *delta.shape))
        top = max(min(hill_k, *delta.shape), self.k)
        values, subspace = gram.leading_right(delta, top, self.k, rough)
        return {
            "frobenius_norm": norm,
            "stable_rank": max(1.0, (norm / float(values[0])) ** 2),
            "hill_alpha": comparison.hill(values, hill_k, floor),
        }, subspace

    def _about(self, delta: Tensor, norm: float, hill_k: int) -> Spread:
        nothing = delta.new_zeros(()).expand(delta.shape)
        found = krylov.spread(nothing, delta, norm, self.k, hill_k)
        names = ("stable_rank", "hill_alpha", "stable_rank_error", "hill_alpha_error")
        values = {n: getattr(found, n) for n in (*names, "subspace_error_deg")}
        return {"frobenius_norm": norm, **values}, found.right

    def leading(self, w: Tensor) -> Spread:
        """Stable rank and top subspace of a null's update."""
        if self.iterated:
            return self.spread(w)
        norm = bits.norm(w)
        if norm == 0.0:
            return {"stable_rank": math.nan}, None
        values, subspace = gram.leading_right(w, self.k, self.k, rough=True)
        return {"stable_rank": max(1.0, (norm / float(values[0])) ** 2)}, subspace

    def top(self, w: Tensor) -> Tensor | None:
        """The top subspace alone."""
        return self.spread(w)[1] if self.iterated else gram.right_subspace(w, self.k)


def _walked(
    look: _Look,
    shape: Sequence[int],
    optimizer: locking.Optimizer,
    lengths: Mapping[int, float],
    seed: int | tuple[int, ...],
) -> Iterator[Spread]:
    """What is seen of a walk with a run's segments, step by step."""
    taken = {step: length for step, length in lengths.items() if step > 0}
    for _ in range(len(lengths) - len(taken)):  # a checkpoint of step 0 is no walk yet
        yield {"stable_rank": math.nan}, None
    noise = comparison.generator_of(seed, "walk")
    for _, total in locking.walking(shape, optimizer, taken, noise):
        yield look.leading(total)


class _Stored:
    """What bf16 shows of a run's updates, and of the last one at their norms.

    In float32, which holds the difference of two bf16 numbers next to one another.

    Args:
        w_before: W_0.
        end: the last update, float64.
        look: what is looked at.
    """

    def __init__(self, w_before: Tensor, end: Tensor, look: _Look) -> None:
        self._dtype = w_before.dtype
        self._before = bits.to_bfloat16(w_before).float()
        grid = w_before.dtype == torch.bfloat16
        self._origin = self._before if grid else w_before.float()
        self._end, self._norm = end.float(), bits.norm(end)
        self._look = look

    def readouts(self, w: Tensor, own: Spread, at_end: bool) -> dict[str, Spread]:
        """Forms of the columns' names to the spread of W_t, and of rounding alone.

        Args:
            w: W_t.
            own: spread of its update in full.
            at_end: whether it is the last one.
        """
        same = w.dtype == self._dtype == torch.bfloat16  # its own readout
        seen = own if same else self._look.spread(self._shown(w), rough=True)
        alone = seen
        if not at_end:
            alone = self._look.spread(self._scaled(own[0]["frobenius_norm"]), True)
        return {"{}_bf16": seen, "rounding_{}_bf16": alone}

    def _shown(self, w: Tensor) -> Tensor:
        """bf16(W) - bf16(W_0)."""
        return bits.to_bfloat16(w).float().sub_(self._before)

    def _scaled(self, norm: float) -> Tensor:
        """That of the last update at the norm of another one, as `scaled_end`."""
        if self._norm == 0.0:
            return torch.zeros_like(self._end)
        return self._shown((self._end * (norm / self._norm)).add_(self._origin))

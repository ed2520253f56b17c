"""Diagnostics cheap enough for a model in training: the few that need no full SVD.

What it costs, for a matrix of n x m entries and K directions: one copy of W_0 in memory
(n m entries, in bf16 where that is exact), a handful of passes over the entries, and
2 (2 `ITERATIONS` + 2) n m (2 K + 8) floating-point operations. With K = 16 that is what
training spends on this matrix for about 190 tokens: once in 50 steps, 5 % of steps of
75 tokens, and a thousandth of steps of 4000. Of weights that are not stored in bf16 a
quarter of it comes on top, for what bf16 would show.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_geometry.geometry.bits import to_bfloat16
from opd_geometry.geometry.checkpoints import (
    Matrix,
    Wanted,
    list_matrices,
    matrices_in_memory,
    read_matrix,
)
from opd_geometry.geometry.defaults import ATTENTION_ROLES
from opd_geometry.geometry.spectra import check_rank, check_same_shape

PAIRS = 2**16  # of entries, for 0.2 points of a share
EXACT_SIDE = 512  # up to this smaller side, eigenvectors of the Gram matrix in float64
ITERATIONS = 6  # of the subspace iteration beyond it
SPREAD = "spread over processes (FSDP, ZeRO-3, tensor parallel) or in a packed format"
RANK_FLOOR = 1e-6  # below it, relative to the largest, a singular value is rounding


@dataclass(frozen=True)
class Movement:
    """How far a matrix has moved, and in which directions.

    Attributes:
        frobenius_norm: of dW, in units of the weights.
        stable_rank: of dW; NaN where nothing moved.
        sparsity: share of entries with the same value in bf16, in [0, 1].
        stable_rank_bf16, frobenius_norm_bf16: of bf16(W) - bf16(W_0), to which rounding
            adds a high rank.
        stored: whether dW is that difference, so that its norm contains rounding.
        right: (n_cols, K) top right singular vectors of dW, float32 on the CPU; None
            where dW has fewer than K directions.
    """

    frobenius_norm: float
    stable_rank: float
    sparsity: float
    stable_rank_bf16: float
    frobenius_norm_bf16: float
    stored: bool
    right: Tensor | None


def movement(w_before: Tensor, w: Tensor, k: int) -> Movement:
    """Norm, stable rank, bf16 sparsity and top-k right subspace of W - W_0.

    ||dW||_F; ||dW||_F^2 / s_1^2; |{bf16(W) = bf16(W_0)}| / (n m); V_k; the first two
    also of bf16(W) - bf16(W_0)

    Args:
        w_before: (n_rows, n_cols) W_0, any float dtype and device.
        w: (n_rows, n_cols), where the work is done.
        k: from 1 to min(shape).

    Returns:
        The movement. NaN or inf in the weights give NaN, not an error: a training run
        is not stopped for its diagnostics.

    Raises:
        ValueError: shapes differ or k is out of range.

    Source: arXiv:2606.07082 Table 1 and Figures 4 and 5.
    """
    delta = _difference(w_before, w, k)
    short_start, short = to_bfloat16(w_before.to(w.device)), to_bfloat16(w)
    sparsity = float(torch.count_nonzero(short_start == short)) / w.numel()
    norm, rank, kept = spread(delta, k)
    if math.isnan(rank):
        return Movement(norm, rank, sparsity, rank, norm, False, None)
    seen = short.to(delta.dtype) - short_start.to(delta.dtype)
    if torch.equal(seen, delta):
        return Movement(norm, rank, sparsity, rank, norm, True, kept)
    seen_norm = float(torch.linalg.vector_norm(seen))
    seen_rank = 1.0 / largest_value(seen / seen_norm) ** 2 if seen_norm else math.nan
    return Movement(norm, rank, sparsity, seen_rank, seen_norm, False, kept)


def directions(w_before: Tensor, w: Tensor, k: int) -> tuple[float, Tensor | None]:
    """Norm and top-k right subspace of W - W_0, as `movement` has them, for less.

    Args:
        w_before, w, k: as of `movement`.

    Raises:
        ValueError: as `movement`.
    """
    norm, _, right = spread(_difference(w_before, w, k), k)
    return norm, right


def _difference(w_before: Tensor, w: Tensor, k: int) -> Tensor:
    """W - W_0, in the precision in which its directions are found."""
    check_same_shape(w_before, w, ("w_before", "w"))
    check_rank(k, w.shape)
    exact = min(w.shape) <= EXACT_SIDE
    dtype = torch.float64 if exact and w.device.type == "cpu" else torch.float32
    return w.to(dtype) - w_before.to(w.device).to(dtype)


def spread(delta: Tensor, k: int) -> tuple[float, float, Tensor | None]:
    """Norm, stable rank (NaN where nothing moved) and top-k right subspace.

    Args:
        delta: (n_rows, n_cols).
        k: from 1 to min(shape).
    """
    norm = float(torch.linalg.vector_norm(delta))
    if not 0.0 < norm < float("inf"):  # also where it is NaN
        return norm, math.nan, None
    # Scaled, since the Gram matrix squares what may be as small as 1e-20.
    s, right = leading_right(delta / norm, k)
    kept = right if float(s[-1]) > RANK_FLOOR * float(s[0]) else None
    return norm, 1.0 / float(s[0]) ** 2, kept


def largest_value(delta: Tensor) -> float:
    """The largest singular value, as `leading_right` finds it, for less.

    Args:
        delta: (n_rows, n_cols), finite, not zero.
    """
    if min(delta.shape) > EXACT_SIDE:
        return float(leading_right(delta, 1)[0])
    matrix = delta.to("cpu", torch.float64)
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    return math.sqrt(float(torch.linalg.eigvalsh(tall.T @ tall)[-1]))


def leading_right(delta: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Largest singular values of a matrix and their right singular vectors.

    Up to a smaller side of ``EXACT_SIDE`` from the eigenvectors of the smaller Gram
    matrix in float64; beyond it by randomised subspace iteration with k + 8 further
    directions. Against the full SVD at 1024 x 1024 and k = 16, errors of s_1 and Sim_K
    of the subspaces: stable rank 8: 5e-7 and 1 - 4e-7; 63: 7e-7 and 0.9993; noise
    (stable rank 254), whose subspace means nothing: 4e-3 and 0.78.

    Args:
        delta: (n_rows, n_cols), finite, not zero.
        k: from 1 to min(shape).

    Returns:
        s (k,), descending, and right (n_cols, k), both float32 on the CPU. The draws
        leave the generators of training as they were, and repeat.

    Source: Halko, Martinsson and Tropp (2011), algorithm 4.4.
    """
    if min(delta.shape) <= EXACT_SIDE:
        matrix = delta.to("cpu", torch.float64)
        tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
        squares, vectors = torch.linalg.eigh(tall.T @ tall)  # ascending
        s = squares[-k:].flip(0).clamp_min(0.0).sqrt()
        v = vectors[:, -k:].flip(1)
        if tall is not matrix:  # these are left vectors: carry them over
            v = torch.linalg.qr(matrix.T @ v).Q
    else:
        width = min(2 * k + 8, *delta.shape)
        delta = delta if delta.device.type in ("cpu", "cuda") else delta.cpu()
        with seeded(0, delta.device):
            _, values, vectors = torch.svd_lowrank(delta.float(), width, ITERATIONS)
        s, v = values[:k], vectors[:, :k]
    return s.float().cpu(), v.float().cpu()


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Draws of one device that repeat, its generator left as it was.

    ``torch.manual_seed`` would set those of all devices, and so a training's.
    """
    generator = torch.default_generator
    if device is not None and device.type == "cuda":
        torch.cuda.init()
        generator = torch.cuda.default_generators[device.index or 0]
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def energy_within(w_before: Tensor, w: Tensor, basis: Tensor) -> float:
    """Share of the squared update in a right subspace, such as W_0's top one.

    ||dW V||_F^2 / ||dW||_F^2; an update without a place has k / n_cols on average

    Args:
        w_before, w: as of `movement`; they differ.
        basis: (n_cols, k) with orthonormal columns.
    """
    delta = _difference(w_before, w, basis.shape[1])
    inside = delta @ basis.to(delta.device, delta.dtype)
    return float(inside.square().sum() / delta.square().sum())


def shuffled_sparsity(w_before: Tensor, w: Tensor) -> float:
    """Share of entries unchanged in bf16 with the update's own entries elsewhere.

    mean over random i and j of [bf16(w_i + d_j) = bf16(w_i)], d = W - W_0

    Args:
        w_before: W_0, any float dtype and device.
        w: the same shape, not stored in 16 bits: a stored difference lies on W_0's
            grid.

    Returns:
        From 0 to 1, over ``PAIRS`` draws, which leave the generators of training as
        they were, and repeat.
    """
    generator = torch.Generator().manual_seed(0)
    start, end = w_before.reshape(-1), w.reshape(-1)
    i, j = torch.randint(len(start), (2, PAIRS), generator=generator)
    old = start[i.to(start.device)].double().cpu()
    own = (end[j.to(end.device)].double(), start[j.to(start.device)].double())
    moved = old + (own[0].cpu() - own[1].cpu())
    unchanged = to_bfloat16(moved) == to_bfloat16(old)
    return float(torch.count_nonzero(unchanged)) / PAIRS


class Start:
    """The weights W_0 that training began with, kept to be compared with.

    Args:
        matrices: name to (matrix, tensor), as of `watched`.
        source: checkpoint to take W_0 from; None for the tensors as they are now.
        device: where the copies are kept.

    Raises:
        FileNotFoundError, ValueError: no readable checkpoint at the source, or it has
            not these matrices in these shapes.
    """

    def __init__(
        self,
        matrices: Mapping[str, tuple[Matrix, Tensor]],
        source: str | Path | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if source is not None:
            _check_holds(source, {name: m.shape for name, (m, _) in matrices.items()})
        self.weights = {
            name: _kept(tensor if source is None else read_matrix(source, name), device)
            for name, (_, tensor) in matrices.items()
        }

    def fingerprint(self) -> dict[str, list[float]]:
        """Sum and norm of every W_0, to recognise it by when training is resumed."""
        return {
            name: [float(w.double().sum()), float(torch.linalg.vector_norm(w.double()))]
            for name, w in self.weights.items()
        }

    def check(self, fingerprint: Mapping[str, Iterable[float]], hint: str) -> None:
        """Refuse a W_0 that is not the one that a fingerprint was taken of.

        Raises:
            ValueError: one line with the name of a matrix that differs, and the hint.
        """
        own = self.fingerprint()
        for name, told in fingerprint.items():
            known = torch.tensor(list(told), dtype=torch.float64)
            here = torch.tensor(own.get(name, [torch.nan] * 2), dtype=torch.float64)
            if not torch.allclose(known, here, rtol=1e-9, atol=1e-9):
                raise ValueError(
                    f"{name} is not the one that training started with, expected the "
                    f"weights of step 0; {hint}"
                )


def _kept(tensor: Tensor, device: str | torch.device) -> Tensor:
    """A copy, in bf16 where no entry is lost by that."""
    w = tensor.detach()
    short = to_bfloat16(w)
    lossless = w.dtype != torch.bfloat16 and torch.equal(short.to(w.dtype), w)
    return torch.empty_like(short if lossless else w, device=device).copy_(w)


def _check_holds(source: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint without these matrices."""
    there = {matrix.name: matrix.shape for matrix in list_matrices(source)}
    for name, shape in shapes.items():
        if there.get(name) != tuple(shape):
            raise ValueError(
                f"{source} has {there.get(name, 'no matrix')} where the model has "
                f"{name} of {tuple(shape)}; give the checkpoint that training began "
                "with"
            )


def is_whole(tensor: Tensor) -> bool:
    """Whether a tensor has all its entries here, as plain numbers.

    Not so are DTensors and packed subclasses, and what DeepSpeed's ZeRO-3 has marked,
    even where it is gathered just now.
    """
    plain = type(tensor.detach()) is Tensor and not hasattr(tensor, "ds_id")
    return plain and tensor.numel() > 0


def watched(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    roles: Collection[str] | None = ATTENTION_ROLES,
    max_layers: int | None = None,
) -> dict[str, tuple[Matrix, Tensor]]:
    """The matrices of a model to look at during training.

    Args:
        tensors, config: as of `matrices_in_memory`; only what is trained.
        roles: which; None for all.
        max_layers: at most so many layers, evenly spaced from the first to the last;
            None for all. What belongs to no layer stays.

    Returns:
        Name to (matrix, view of the live tensor).

    Raises:
        ValueError: unknown role, no such matrix, or weights that are spread over
            processes.
    """
    wanted = Wanted(roles)
    if max_layers is not None and max_layers < 1:
        raise ValueError(f"max_layers = {max_layers}, expected 1 or more")
    for name, tensor in tensors.items():
        if not is_whole(tensor):
            raise ValueError(
                f"{name} is {SPREAD}, expected whole weights; measure the checkpoints "
                "instead, with opd-geometry trajectory"
            )
    found = {
        name: pair
        for name, pair in matrices_in_memory(tensors, config).items()
        if pair[0] in wanted
    }
    if not found:
        raise ValueError(
            f"the model trains no matrix with a role of "
            f"{'any' if roles is None else ', '.join(sorted(roles))}; adapters (LoRA) "
            "are not looked into: merge them, or give other roles"
        )
    layers = sorted({matrix.layer for matrix, _ in found.values() if matrix.layer >= 0})
    chosen = {-1, *_evenly(layers, max_layers or len(layers))}
    return {name: pair for name, pair in found.items() if pair[0].layer in chosen}


def _evenly(items: list[int], count: int) -> list[int]:
    """At most ``count`` items, the first and the last among them.

    >>> _evenly([0, 1, 2, 3, 4], 3), _evenly([0, 1, 2], 1), _evenly([0, 1], 9)
    ([0, 2, 4], [0], [0, 1])
    """
    if count >= len(items):
        return items
    gaps = max(1, count - 1)
    return [items[round(i * (len(items) - 1) / gaps)] for i in range(count)]

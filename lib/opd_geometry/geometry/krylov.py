"""What an update alone has, from a few products with a block of vectors.

Block Lanczos iteration on M = D^T D or D D^T, D = W_t - W_0 in float32, its basis and
all small problems in float64. The largest singular values and their subspace come with
bounds from residuals. The Hill exponent, which asks for an eighth of all singular
values, is estimated from the same numbers by quadrature, with a standard error.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from opd_geometry.geometry.gram import chosen_device
from opd_geometry.geometry.spectra import check_rank, check_same_shape

WIDTH = 16  # vectors of a block, and probes of the quadrature
STEPS = 5  # blocks
CHUNK = 128  # of float32 that stay in a core's cache between two products
KEPT_ENTRIES = 2**26  # of an update that is kept in float32, 256 MiB
ROUNDING = 1e-6  # of float32 products, relative to the largest eigenvalue
COUNTED = 1e-2  # relative residual of an eigenvalue that is counted, not estimated
EXHAUSTED = 1e-6  # of the largest eigenvalue: a block that has nothing new
# Root mean square of what the exponent is off by, relative, beside its chance: noise,
# steps of one size, power laws, low rank in noise, sparse columns; sides 512 to 1536.
HILL_BIAS = 0.06
FEWEST = 4  # nodes of a probe that make a curve
DEPTH, GRID = 7.0, 1024  # of log s below the largest estimated value; its points


@dataclass(frozen=True)
class Spread:
    """How an update spreads over its directions, each number with its error.

    Attributes:
        stable_rank: ||D||_F^2 / s_1^2, too large by ``stable_rank_error`` at most.
        top_share: sum_{i <= K} s_i^2 / ||D||_F^2, too small by ``top_share_error`` at
            most.
        right: (n_cols, K) float64, orthonormal: the top-K right singular subspace; None
            where s_K is below 1e-3 s_1, which float32 products do not see.
        subspace_error_deg: bound of its largest angle with the exact one, 90 where no
            gap at K is seen.
        hill_alpha: exponent over the top hill_k values, give or take
            ``hill_alpha_error``, a standard error with `HILL_BIAS` in it; NaN where
            there are fewer. Of 30 updates whose exponent is known it was 5 % too small
            (noise) to 11 % too large (steep spectra), a few nodes being too coarse.
    """

    stable_rank: float
    stable_rank_error: float
    top_share: float
    top_share_error: float
    right: Tensor | None
    subspace_error_deg: float
    hill_alpha: float
    hill_alpha_error: float


def spread(
    w_before: Tensor,
    w_after: Tensor,
    norm: float,
    k: int,
    hill_k: int,
    steps: int = STEPS,
) -> Spread:
    """Stable rank, Hill exponent and top-k right subspace of W_t - W_0, about.

    Args:
        w_before, w_after: (n_rows, n_cols), finite, any floating dtype.
        norm: Frobenius norm of their difference, above 0.
        k: dimension of the subspace, from 1 to the smaller side.
        hill_k: singular values in the Hill estimate, from 2 to the smaller side.
        steps: products with the update and its transpose.

    Returns:
        The spread; bounds are those of an iteration that missed no value larger than
        what it found.

    Raises:
        ValueError: shapes differ, or k or hill_k is out of range.

    Source: Golub and Underwood (1977), block Lanczos; Parlett (1998), chapter 11, its
    bounds; Ubaru, Chen and Saad (2017), quadrature.
    """
    check_same_shape(w_before, w_after, ("w_before", "w_after"))
    check_rank(k, w_after.shape)
    check_rank(hill_k, w_after.shape, "hill_k")
    update = _Update(w_before, w_after, norm)
    found = _iterated(update.squared, min(w_after.shape), steps)
    top, errors = float(found.values[0]), found.errors(k)
    seen = len(found.values) >= k and float(found.values[k - 1]) > EXHAUSTED * top
    hill, hill_error = _hill(found, hill_k)
    return Spread(
        max(1.0, 1.0 / top),
        float(errors[0]) / top**2,
        min(1.0, float(found.values[:k].sum())),
        float(errors.sum()),
        update.right(found.basis.T @ found.vectors[:, :k]) if seen else None,
        found.subspace_error_deg(k) if seen else math.nan,
        hill,
        hill_error,
    )


@dataclass(frozen=True)
class _Update:
    """D / ||D||_F in float32: kept whole up to a size, else made again at every use."""

    w_before: Tensor
    w_after: Tensor
    norm: float

    @cached_property
    def _kept(self) -> Tensor | None:
        if self.w_after.numel() > KEPT_ENTRIES:
            return None
        # NumPy asks for large pages: fresh memory comes at a quarter of the time.
        whole = torch.from_numpy(np.empty(tuple(self.w_after.shape), np.float32))
        for part in self._parts(0):
            self._difference(part, whole[part])
        return whole.to(chosen_device() or "cpu")

    def _parts(self, side: int) -> list[tuple[slice, ...]]:
        length = self.w_after.shape[side]
        starts = range(0, length, CHUNK)
        everything = (slice(None),) * side
        return [(*everything, slice(i, min(i + CHUNK, length))) for i in starts]

    def _difference(self, part: tuple[slice, ...], out: Tensor) -> Tensor:
        before, after = self.w_before[part], self.w_after[part]
        if torch.float64 in (before.dtype, after.dtype):
            return out.copy_(torch.sub(after.double(), before).div_(self.norm))
        return out.copy_(after).sub_(before).div_(self.norm)

    def _chunks(self, side: int) -> Iterator[Tensor]:
        """Slices along a side, each (slice, all of the other side)."""
        for part in self._parts(side):
            if self._kept is not None:
                chunk = self._kept[part]
            else:
                shape = self.w_after[part].shape
                chunk = self._difference(part, torch.empty(shape))
                chunk = chunk.to(chosen_device() or "cpu")
            yield chunk if side == 0 else chunk.T

    def squared(self, x: Tensor) -> Tensor:
        """X M for rows X, M = D^T D or D D^T, whichever is smaller."""
        x = x.to(chosen_device() or "cpu")
        out = torch.zeros_like(x)
        for chunk in self._chunks(int(self.w_after.shape[0] < self.w_after.shape[1])):
            out.addmm_(x @ chunk.T, chunk)
        return out.cpu()

    def right(self, vectors: Tensor) -> Tensor:
        """Right singular vectors from those of M."""
        if self.w_after.shape[0] >= self.w_after.shape[1]:
            return vectors
        x = vectors.T.float().to(chosen_device() or "cpu")
        images = torch.cat([x @ chunk.T for chunk in self._chunks(1)], dim=1)
        return torch.linalg.qr(images.T.cpu().double()).Q


@dataclass(frozen=True)
class _Projection:
    """M / ||D||_F^2 on a Krylov space of p dimensions.

    Attributes:
        basis: (p, n), orthonormal rows, n the smaller side.
        operator: (p, p), symmetric.
        start: (p, WIDTH), the random vectors that the space began with.
        values: (p,) its eigenvalues, descending.
        vectors: (p, p).
        residuals: (p,) |M v - theta v|.
    """

    basis: Tensor
    operator: Tensor
    start: Tensor
    values: Tensor
    vectors: Tensor
    residuals: Tensor

    def errors(self, k: int) -> Tensor:
        """How far the k largest values may lie below the exact ones.

        |r|, or |r|^2 / gap to the values behind the k-th, where that is smaller.
        """
        r, rounding = self.residuals[:k], ROUNDING * self.values[:k]
        if len(self.values) <= k:
            return r + rounding
        gaps = self.values[:k] - self.values[k] - self.residuals[k]
        return torch.where(gaps > r, r * r / gaps.clamp_min(1e-300), r) + rounding

    def subspace_error_deg(self, k: int) -> float:
        """sin theta <= |R|_F / (theta_k - lambda_{k+1})."""
        if len(self.values) <= k:
            return 90.0
        gap = float(self.values[k - 1] - self.values[k] - self.residuals[k])
        size = float(torch.linalg.vector_norm(self.residuals[:k]))
        return math.degrees(math.asin(size / gap)) if size < gap else 90.0


def _iterated(squared: Callable[[Tensor], Tensor], n: int, steps: int) -> _Projection:
    """Block Lanczos with all vectors orthogonalised against all; vectors are rows."""
    width = min(WIDTH, n)
    steps = min(steps, n // width)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n, width, generator=generator, dtype=torch.float64)
    block, root = _orthonormal(noise.T)
    whole = torch.empty(steps * width, n, dtype=torch.float64)
    operator = torch.zeros(steps * width, steps * width, dtype=torch.float64)
    for p in range(width, steps * width + 1, width):
        whole[p - width : p] = block
        basis = whole[:p]
        image = squared(block.float()).double()
        inside = operator[p - width : p, :p] = image @ basis.T
        block, beside = _orthonormal(image.addmm_(inside, basis, alpha=-1.0))
        if float(torch.linalg.norm(beside)) < EXHAUSTED * float(operator[0, 0]):
            break
        # What rounding left of the others, largest where a block is nearly exhausted.
        block, mended = _orthonormal(block - (block @ basis.T) @ basis)
        beside = beside @ mended
    operator = operator[:p, :p].tril()
    operator = operator + operator.tril(-1).T
    values, vectors = torch.linalg.eigh(operator)
    values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
    residuals = torch.linalg.vector_norm(beside.T @ vectors[-width:], dim=0)
    start = torch.zeros(p, width, dtype=torch.float64)
    start[:width] = root.T
    floor = ROUNDING * values[0]
    return _Projection(
        basis, operator, start, values, vectors, torch.hypot(residuals, floor)
    )


def _orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows Q and coefficients C with rows = C Q."""
    q, r = torch.linalg.qr(rows.T)
    return q.T, r.T


def _hill(found: _Projection, k: int) -> tuple[float, float]:
    """Hill exponent over the k largest singular values, with its standard error.

    (k - 1) / int_{log s_k}^inf N(x) dx, N(x): how many log s_i are above x

    N counts the values that have converged; the rest is the mean over probes of their
    quadrature, with nodes joined by monotone cubics. The error is that of the mean, by
    leaving out one probe after the other, the step that the last node makes, and what
    a few nodes leave on spectra that are known (`HILL_BIAS`).
    """
    sure = int((found.residuals < COUNTED * found.values).long().cumprod(0).sum())
    sure = min(sure, k - 1)
    logs = found.values.clamp_min(1e-300).log() / 2
    top = found.vectors[:, :sure]
    probes = found.start - top @ (top.T @ found.start)
    n, nodes = found.basis.shape[1] - sure, len(found.operator) // found.start.shape[1]
    edge = float(logs[sure]) if sure < len(logs) else -math.inf
    if sure == len(logs) or nodes < FEWEST or edge < math.log(EXHAUSTED) / 2:
        return math.nan, math.nan
    grid = edge - DEPTH * np.linspace(1.0, 0.0, GRID) ** 2  # dense at the edge
    counts = _counts(found, probes, nodes, n, grid)
    few = slice(0, len(counts) // 4)  # enough to see what the last node adds
    coarser = _counts(found, probes[:, few], nodes - 1, n, grid)
    counted = logs[:sure].numpy()
    value = _exponent(counted, counts.mean(0), grid, k)
    left_out = [
        _exponent(counted, np.delete(counts, i, 0).mean(0), grid, k)
        for i in range(len(counts))
    ]
    chance = float(np.var(left_out)) * (len(counts) - 1)
    fine, coarse = (
        _exponent(counted, c.mean(0), grid, k) for c in (counts[few], coarser)
    )
    return value, math.hypot(chance**0.5, fine - coarse, HILL_BIAS * value)


def _exponent(
    counted: np.ndarray, counts: np.ndarray, grid: np.ndarray, k: int
) -> float:
    """From log values that are known and, on an ascending grid, how many others."""
    total = counts + (counted[:, None] > grid).sum(0)
    if total[0] < k:
        return math.nan
    x = float(np.interp(-k, -total, grid))
    inside = grid > x
    area = np.trapezoid(
        np.append(np.interp(x, grid, counts), counts[inside]),
        np.append(x, grid[inside]),
    )
    return (k - 1) / (float(area) + float((counted - x).clip(0.0).sum()))


def _counts(
    found: _Projection, probes: Tensor, nodes: int, n: int, grid: np.ndarray
) -> np.ndarray:
    """Of each probe, how many of n log values it sees above each of the grid."""
    values, weights = _quadrature(found.operator, probes.T, nodes)
    above = n * (weights[:, ::-1].cumsum(1)[:, ::-1] - weights / 2)
    counts = np.empty((len(values), len(grid)))
    for i, x in enumerate(values):
        kept = x > EXHAUSTED * x[-1]
        x, y = np.log(x[kept]) / 2, above[i][kept]
        ends = np.append(x, max(grid[-1], x[-1] + 1e-9)), np.append(y, 0.0)
        counts[i] = PchipInterpolator(*ends)(grid.clip(x[0], ends[0][-1]))
    return counts


def _quadrature(
    operator: Tensor, starts: Tensor, nodes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Gauss nodes, ascending, and weights for the spectral measures of vectors.

    Args:
        operator: (p, p), symmetric.
        starts: (b, p).
        nodes: of each.

    Returns:
        (b, nodes) each.
    """
    basis = (starts / torch.linalg.vector_norm(starts, dim=1, keepdim=True))[:, None]
    small = torch.zeros(len(starts), nodes, nodes, dtype=torch.float64)
    for j in range(nodes):
        image = basis[:, j : j + 1] @ operator
        inside = image @ basis.mT
        small[:, j, : j + 1] = inside[:, 0]
        image = image - inside @ basis
        image = image - (image @ basis.mT) @ basis
        size = torch.linalg.vector_norm(image, dim=2, keepdim=True)
        basis = torch.cat([basis, image / size.clamp_min(1e-300)], dim=1)
    values, vectors = torch.linalg.eigh(small)
    return values.numpy(), vectors[:, 0].square().numpy()

"""Singular values and top subspaces from the Gram matrix: exact, without a full SVD.

W^T W = V diag(s^2) V^T on the smaller side. One product and one tridiagonalisation take
about an eighth of the time of LAPACK's full SVD, and a matrix of 150,000 rows needs no
float64 copy of itself. Squaring loses what lies far below s_1, so

- singular values below `SMALL` s_1 are computed again from W on their own subspace,
- every subspace comes with a bound of its error, from residuals with W itself, and
- where the bound exceeds `ANGLE_ERROR_DEG`, LAPACK's SVD decides.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import torch
from torch import Tensor

from opd_geometry.geometry.bits import BITS, count_nonfinite, over
from opd_geometry.geometry.spectra import check_rank, finite_matrix, svd

ANGLE_ERROR_DEG = 1e-6  # a larger bound is not accepted from a Gram matrix
SMALL = 1e-3  # of s_1: below it, squares lose more than 1e-11 s_1
TAIL_SHARE = 0.25  # with more small values than this, an SVD is cheaper
# Smaller matrices are decomposed whole, which costs milliseconds.
DIRECT_SIDE = 256
CHUNK_ENTRIES = 2**24  # converted to float64 at a time, 128 MiB
SMALLEST = 32  # sides up to it are decomposed whole for a few vectors, too
FEW = 16  # vectors of a tridiagonal matrix that LAPACK is asked for one at a time
EPS = torch.finfo(torch.float64).eps
ROUNDING = 100 * EPS  # of eigenvalues, relative to s_1^2
SUBSPACE_TOLERANCE = 1e-8  # of eigenvalues that are not checked against all
ROUGH_TOLERANCE = 1e-6  # the same of a float32 Gram matrix
STEEP = 1e-4  # of s_1^2: below it, float32 squares lose more than 1e-3 of a value
NOTHING = 1e-30  # of a unit vector's entries
INDEPENDENT = 1e-3  # largest cosine between vectors that are then orthonormalised


_device: ContextVar[torch.device | None] = ContextVar("device", default=None)


@contextmanager
def on(device: str | torch.device | None) -> Iterator[None]:
    """Decompose on a device meanwhile: float64 products and eigh there.

    Args:
        device: such as ``cuda``; None for LAPACK on the CPU, which needs no vectors of
            values that nobody asked for.
    """
    token = _device.set(None if device is None else torch.device(device))
    try:
        yield
    finally:
        _device.reset(token)


def chosen_device() -> torch.device | None:
    """That of `on`."""
    return _device.get()


@dataclass(frozen=True)
class Decomposition:
    """Singular values and top-k subspaces of one matrix.

    Attributes:
        spectrum: (m,) float64, all singular values, descending.
        left: (n_rows, k) float64, orthonormal, top-k left singular vectors.
        right: (n_cols, k) float64, orthonormal.
        error_deg: bound of how far either computed subspace may be turned away from
            the exact one by rounding, in degrees, 90 where there is no gap at k.
        lowest_left: (n_rows, b) float64, orthonormal, those of the b smallest values;
            undetermined where these are zero.
        lowest_right: (n_cols, b) float64, orthonormal.
    """

    spectrum: Tensor
    left: Tensor
    right: Tensor
    error_deg: float
    lowest_left: Tensor
    lowest_right: Tensor

    @property
    def gap(self) -> float:
        """(s_k - s_{k+1}) / s_1, from 0 to 1; nothing lies below the last value."""
        return _gap(self.spectrum, self.left.shape[1])


@dataclass(frozen=True)
class _Rows:
    """A matrix with at least as many rows as columns, to be read in float64.

    What fits into one chunk is converted once, all else whenever it is read.
    """

    tall: Tensor
    transposed: bool

    @staticmethod
    def of(w: Tensor) -> "_Rows":
        """Of any matrix; NaN and inf are refused."""
        transposed = w.shape[0] < w.shape[1]
        if w.dtype not in BITS or w.device.type != "cpu" or any(count_nonfinite(w)):
            w = finite_matrix(w, "w")
        if w.numel() <= CHUNK_ENTRIES:
            w = w.detach().to(torch.float64)
        return _Rows(w.T if transposed else w, transposed)

    def chunks(self) -> Iterator[Tensor]:
        """Row blocks in float64, where the work is done."""
        for chunk in self.tall.split(max(1, CHUNK_ENTRIES // self.tall.shape[1])):
            yield chunk.to(_device.get() or "cpu", torch.float64)


def decompose(w: Tensor, k: int, lowest: int = 0) -> Decomposition:
    """Every singular value and the top-k subspaces of both sides.

    w v_i = s_i u_i, s_1 >= s_2 >= ...

    Args:
        w: (n_rows, n_cols), any floating dtype.
        k: from 1 to min(w.shape).
        lowest: also the subspaces of so many of the smallest values, up to
            min(w.shape).

    Returns:
        Spectrum within 1e-9 s_1 of a float64 SVD; top subspaces within ``error_deg``.

    Raises:
        ValueError: not a finite floating-point matrix, or k or lowest out of range.

    Source: arXiv:2606.07082, diagnostics (there by a full float64 SVD).
    """
    check_rank(k, w.shape)
    if lowest:
        check_rank(lowest, w.shape, "lowest")
    if min(w.shape) <= DIRECT_SIDE:
        return _decompose_directly(w, k, lowest)
    found = _decompose_gram(w, k, lowest)
    return _decompose_directly(w, k, lowest) if found is None else found


def leading_values(w: Tensor, top: int) -> Tensor:
    """The largest singular values, at a quarter of the cost of `decompose`.

    Args:
        w: (n_rows, n_cols), any floating dtype.
        top: how many, from 1 to min(w.shape).

    Returns:
        (top,) or more, float64, descending, each within 1e-9 of itself; in a matrix
        of lower rank, rounding stands in place of the zeros.

    Raises:
        ValueError: not a finite floating-point matrix, or top out of range.
    """
    check_rank(top, w.shape, "top")
    if min(w.shape) > DIRECT_SIDE:
        squares = _reduced(gram(w)).eigenvalues()
        if _well_above_rounding(squares, top):
            return squares.flip(0)[:top].sqrt()
    return torch.linalg.svdvals(finite_matrix(w, "w"))


def leading_right(
    w: Tensor, top: int, k: int, rough: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The largest singular values and the top-k right subspace, k much below top.

    Args:
        w: (n_rows, n_cols), any floating dtype.
        top: how many values, from k to min(w.shape).
        k: dimension of the subspace, at least 1.
        rough: in float32 where that keeps values to 1e-3 at worst: for nulls, and for
            what was rounded anyway.

    Returns:
        Values as `leading_values`; (n_cols, k) float64 with orthonormal columns, None
        where the matrix is of a rank below k.

    Raises:
        ValueError: not a finite floating-point matrix, or top or k out of range.

    Source: arXiv:2606.07082 Fig. 5.
    """
    check_rank(top, w.shape, "top")
    check_rank(k, (top,))
    found = _roughly(w, top, k) if rough else None
    if found is None and min(w.shape) > SMALLEST:
        found = _closely(w, top, k)
    if found is not None:
        return found
    _, s, vh = svd(w)
    floor = float(s[0]) * max(w.shape) * EPS
    return s, vh[:k].T.contiguous() if int((s > floor).sum()) >= k else None


def _roughly(w: Tensor, top: int, k: int) -> tuple[Tensor, Tensor] | None:
    """As `leading_right` from a float32 Gram matrix; None where that loses too much.

    The largest value is right to 1e-6 of itself, the smallest to 1e-3 at worst.
    """
    size = max(float(end.abs()) for end in torch.aminmax(w))
    if not math.isfinite(size):
        finite_matrix(w, "w")
    size = size or 1.0
    # Scaled: squares of what is tiny are zero.
    unit = over(w, size)
    tall = unit if unit.shape[0] >= unit.shape[1] else unit.T
    products = _squares_of(tall.numpy())
    if top > k:
        reduced = _Tridiagonal.of(products)
        ascending = reduced.eigenvalues()
        squares = ascending.flip(0)[:top]
    else:
        squares, inner = _largest(products, k, ROUGH_TOLERANCE)
    if float(squares[top - 1]) <= STEEP * float(squares[0]):
        return None
    if top > k:
        inner = reduced.eigenvectors(ascending, 0, k)[1]
    inner = inner.to(tall.dtype)
    right = inner if tall is unit else torch.linalg.qr(tall @ inner).Q
    return squares.double().sqrt() * size, right.double()


def _closely(w: Tensor, top: int, k: int) -> tuple[Tensor, Tensor] | None:
    """As `leading_right` from one tridiagonalisation; None where squaring loses it."""
    rows = _Rows.of(w)
    products = _products(rows)
    upper = products.cpu().clone()
    squares, inner = _reduced(products).leading(top, k)
    if not _well_above_rounding(squares, top):
        return None
    images = _times(upper, inner)
    lengths = (inner * images).sum(0).clamp_min(0.0).sqrt()
    values = squares.flip(0).clamp_min(0.0).sqrt()
    error = _subspace_error_deg(images - inner * lengths**2, lengths, values)
    return (values[:top], _as_right(rows, inner)) if error <= ANGLE_ERROR_DEG else None


def right_subspace(w: Tensor, k: int, rough: bool = False) -> Tensor | None:
    """The top-k right subspace alone, without the check against all eigenvalues.

    Args:
        w: (n_rows, n_cols), any floating dtype.
        k: from 1 to min(w.shape).
        rough: as `leading_right`.

    Returns:
        (n_cols, k) float64 with orthonormal columns; None where the matrix is of a rank
        below k, up to the rounding of squares.

    Raises:
        ValueError: not a finite floating-point matrix, or k out of range.
    """
    check_rank(k, w.shape)
    found = _roughly(w, k, k) if rough else None
    if found is not None:
        return found[1]
    rows = _Rows.of(w)
    values, vectors = _largest(_products(rows).cpu(), k)
    if float(values[k - 1]) <= ROUNDING * float(values[0]):
        return None
    return _as_right(rows, vectors)


def _largest(
    upper: Tensor, k: int, tolerance: float = SUBSPACE_TOLERANCE
) -> tuple[Tensor, Tensor]:
    """Largest eigenvalues, descending, with orthonormal vectors.

    Of a symmetric matrix, given by its upper triangle, which is overwritten.
    """
    n = len(upper)
    if n > DIRECT_SIDE and k < n // 4:
        dense = _whole(upper).numpy()
        start = np.random.default_rng(0).standard_normal(n).astype(dense.dtype)
        try:
            values, found = scipy.sparse.linalg.eigsh(dense, k, v0=start, tol=tolerance)
            order = values.argsort()[::-1]
            vectors = torch.linalg.qr(torch.from_numpy(found[:, order].copy())).Q
            return torch.from_numpy(values[order].copy()), vectors
        except scipy.sparse.linalg.ArpackError:
            pass
    # The transpose is a Fortran array without a copy: upper becomes lower.
    squares, found = scipy.linalg.eigh(
        upper.numpy().T, subset_by_index=(n - k, n - 1), check_finite=False
    )
    vectors = torch.from_numpy(found[:, ::-1].copy())
    return torch.from_numpy(squares[::-1].copy()), vectors


def _whole(upper: Tensor) -> Tensor:
    """A symmetric matrix from its upper triangle, which is overwritten."""
    return upper.triu_() + upper.triu(1).T


def _times(upper: Tensor, x: Tensor) -> Tensor:
    """A symmetric matrix, given by its upper triangle, times another one."""
    # The transposes are Fortran arrays without a copy: upper becomes lower.
    dense, columns = upper.numpy().T, x.contiguous().numpy().T
    (product,) = scipy.linalg.get_blas_funcs(("symm",), (dense, columns))
    found = product(1.0, dense, columns.T, lower=1)
    return torch.from_numpy(np.ascontiguousarray(found))


def _well_above_rounding(ascending: Tensor, top: int) -> bool:
    """Whether rounding, 1e-14 s_1^2, moves no value down to s_top by 1e-9 of itself."""
    return float(ascending[-top]) > 1e-5 * float(ascending[-1])


def _as_right(rows: _Rows, inner: Tensor) -> Tensor:
    """Right vectors from those of the smaller side."""
    if not rows.transposed:
        return inner
    images = [(chunk @ inner.to(chunk.device)).cpu() for chunk in rows.chunks()]
    return torch.linalg.qr(torch.cat(images)).Q


def gram(w: Tensor) -> Tensor:
    """Gram matrix of the smaller side, in float64.

    w^T w, or w w^T where w has fewer rows than columns

    Args:
        w: (n_rows, n_cols), any floating dtype; converted a chunk at a time.

    Returns:
        (m, m) float64, m = min(w.shape): the upper triangle; the rest is not to be
        read.

    Raises:
        ValueError: NaN or inf.
    """
    return _products(_Rows.of(w))


def _products(rows: _Rows) -> Tensor:
    n = rows.tall.shape[1]
    if device := _device.get():
        products = torch.zeros(n, n, dtype=torch.float64, device=device)
        for chunk in rows.chunks():
            products.addmm_(chunk.T, chunk)
        return products
    total = None
    for chunk in rows.chunks():
        total = _squares_of(chunk.numpy(), total)
    assert total is not None
    return total


def _squares_of(x: np.ndarray, before: Tensor | None = None) -> Tensor:
    """before + x^T x, its upper triangle alone: BLAS's syrk does half of a product."""
    (rank_k,) = scipy.linalg.get_blas_funcs(("syrk",), (x,))
    a, transposed = (x, 1) if x.flags.f_contiguous else (x.T, 0)
    if before is None:
        found = rank_k(1.0, a, trans=transposed, lower=1)
    else:  # a Fortran array without a copy: its lower triangle is our upper one
        total = before.numpy().T
        found = rank_k(1.0, a, 1.0, total, trans=transposed, lower=1, overwrite_c=1)
    return torch.from_numpy(found.T)


def _decompose_directly(w: Tensor, k: int, lowest: int) -> Decomposition:
    u, s, vh = svd(w)
    gap = _gap(s, k)
    error = 90.0 if gap <= 0 else _degrees(len(s) ** 0.5 * EPS / gap)
    last = len(s) - lowest
    return Decomposition(
        s, u[:, :k], vh[:k].T, error, u[:, last:].contiguous(), vh[last:].T.contiguous()
    )


def _gap(s: Tensor, k: int) -> float:
    if float(s[0]) == 0.0:
        return 0.0
    below = float(s[k]) if k < len(s) else 0.0
    return (float(s[k - 1]) - below) / float(s[0])


def _degrees(sine: float) -> float:
    return math.degrees(math.asin(min(1.0, sine)))


def _decompose_gram(w: Tensor, k: int, lowest: int) -> Decomposition | None:
    """As `decompose`; None where squaring has lost what the answer needs."""
    rows = _Rows.of(w)
    reduced = _reduced(_products(rows))
    squares = reduced.eigenvalues()
    largest = float(squares[-1])
    if largest <= 0.0:
        return None
    values = squares.clamp_min(0.0).sqrt()
    n_small = int((values < SMALL * float(values[-1])).sum())
    if n_small > TAIL_SHARE * len(values):
        return None
    bottom, inner = reduced.eigenvectors(squares, max(n_small, lowest), k)
    spectrum = _with_small_values(rows, values, bottom[:, :n_small])
    outer, images = _both_sides(rows, inner)
    lengths = torch.linalg.vector_norm(outer, dim=0)
    error = _subspace_error_deg(images - inner * lengths**2, lengths, spectrum)
    if error > ANGLE_ERROR_DEG:
        return None
    outer /= lengths
    bottom = bottom[:, :lowest].contiguous()
    other = bottom.new_empty(len(outer), 0)
    if lowest:
        other = torch.linalg.qr(_both_sides(rows, bottom)[0]).Q
    if rows.transposed:
        return Decomposition(spectrum, inner, outer, error, bottom, other)
    return Decomposition(spectrum, outer, inner, error, other, bottom)


def _both_sides(rows: _Rows, inner: Tensor) -> tuple[Tensor, Tensor]:
    """W V and W^T (W V), a chunk of rows at a time."""
    inner = inner.to(_device.get() or "cpu")
    outer = inner.new_empty(len(rows.tall), inner.shape[1])
    images = torch.zeros_like(inner)
    start = 0
    for chunk in rows.chunks():
        part = outer[start : start + chunk.shape[0]]
        torch.mm(chunk, inner, out=part)
        images.addmm_(chunk.T, part)
        start += chunk.shape[0]
    return outer.cpu(), images.cpu()


def _subspace_error_deg(residuals: Tensor, lengths: Tensor, s: Tensor) -> float:
    """Bound of the angle between span(V) and the exact top-k right subspace.

    With R = W^T W V - V diag(l^2) and the exact complement V_c, whose eigenvalues are
    at most s_{k+1}^2: |V_c^T v_i| <= |r_i| / (l_i^2 - s_{k+1}^2), so
    sin theta <= sqrt(sum_i (|r_i| / (l_i^2 - s_{k+1}^2))^2). The left side is smaller
    by s_{k+1} / s_i.
    """
    k = len(lengths)
    below = float(s[k]) ** 2 if k < len(s) else 0.0
    gaps = lengths**2 - below - ROUNDING * float(s[0]) ** 2
    if float(gaps.min()) <= 0.0:
        return 90.0
    leaks = torch.linalg.vector_norm(residuals, dim=0) / gaps
    return _degrees(float(torch.linalg.vector_norm(leaks)))


def _with_small_values(rows: _Rows, values: Tensor, tail: Tensor) -> Tensor:
    """Singular values, descending; the smallest from W on their own subspace."""
    if tail.shape[1]:
        images = torch.cat([chunk @ tail.to(chunk.device) for chunk in rows.chunks()])
        values[: tail.shape[1]] = torch.linalg.svdvals(images).flip(0).cpu()
    return values.sort(descending=True).values


def _reduced(upper: Tensor) -> "_Diagonal | _Tridiagonal":
    """A symmetric matrix, given by its upper triangle, which is overwritten."""
    return (_Tridiagonal if _device.get() is None else _Diagonal).of(upper)


@dataclass(frozen=True)
class _Diagonal:
    """All eigenvalues with all vectors, as a device computes them."""

    values: Tensor
    vectors: Tensor

    @staticmethod
    def of(upper: Tensor) -> "_Diagonal":
        """Of a symmetric matrix, given by its upper triangle."""
        return _Diagonal(*torch.linalg.eigh(upper, UPLO="U"))

    def eigenvalues(self) -> Tensor:
        """All, ascending."""
        return self.values.cpu()

    def eigenvectors(
        self, values: Tensor, lowest: int, highest: int
    ) -> tuple[Tensor, Tensor]:
        """As `_Tridiagonal.eigenvectors`."""
        n = len(values)
        largest = self.vectors[:, n - highest :].flip(1).cpu().contiguous()
        return self.vectors[:, :lowest].cpu(), largest

    def leading(self, top: int, k: int) -> tuple[Tensor, Tensor]:
        """As `_Tridiagonal.leading`."""
        return self.eigenvalues(), self.eigenvectors(self.values, 0, k)[1]


@dataclass(frozen=True)
class _Tridiagonal:
    """Q^T A Q = T, tridiagonal; LAPACK's sytrd, whose Q stays a list of reflectors."""

    diagonal: np.ndarray
    beside: np.ndarray
    reflectors: Tensor  # (n, n), below the first subdiagonal
    scales: Tensor  # (n - 1,)

    @staticmethod
    def of(upper: Tensor) -> "_Tridiagonal":
        """Of a symmetric matrix, given by its upper triangle, which is overwritten."""
        n = upper.shape[0]
        # The transpose is a Fortran array without a copy: upper becomes lower.
        dense = upper.numpy().T
        (reduce,) = scipy.linalg.get_lapack_funcs(("sytrd",), (dense,))
        packed, diagonal, beside, scales, _ = reduce(
            dense, lower=1, lwork=64 * n, overwrite_a=1
        )
        return _Tridiagonal(
            diagonal.astype(np.float64),
            beside.astype(np.float64),
            torch.from_numpy(packed),
            torch.from_numpy(scales),
        )

    def eigenvalues(self) -> Tensor:
        """All, ascending."""
        values, info = scipy.linalg.lapack.dsterf(self.diagonal, self.beside)
        if info:
            raise ValueError(
                f"the eigenvalues of {len(values)} x {len(values)} did not converge "
                f"({info} left), expected all; report the matrix"
            )
        return torch.from_numpy(values)

    def eigenvectors(
        self, values: Tensor, lowest: int, highest: int
    ) -> tuple[Tensor, Tensor]:
        """Orthonormal vectors of some of all ascending values.

        More than a few, one at a time as LAPACK does it, take longer than all at once
        and orthonormalising them after (by Cholesky, exact enough for what is nearly
        orthonormal); where that fails, LAPACK does it.

        Returns:
            (n, lowest) of the lowest, ascending; (n, highest), largest first.
        """
        theta = torch.cat([values[:lowest], values[len(values) - highest :].flip(0)])
        basis = None if len(theta) <= FEW else self._vectors_at_once(theta)
        if basis is None:
            n = len(values)
            ends = ((0, lowest), (n - highest, n))
            low, high = (self._lapack(*end)[1] for end in ends)
            basis = torch.cat([low, high.flip(1)], dim=1)
        basis = self._turned_back(basis)
        return basis[:, :lowest], basis[:, lowest:].contiguous()

    def leading(self, top: int, k: int) -> tuple[Tensor, Tensor]:
        """The largest eigenvalues, one more than top if there is, and top-k vectors.

        Returns:
            (top + 1,) or more, ascending; (n, k), largest first.
        """
        n = len(self.diagonal)
        if top > FEW:
            values = self.eigenvalues()
            return values, self.eigenvectors(values, 0, k)[1]
        values, basis = self._lapack(max(0, n - top - 1), n)
        return values, self._turned_back(basis.flip(1)[:, :k].contiguous())

    def _turned_back(self, basis: Tensor) -> Tensor:
        """Q x, in place if it is of the same dtype."""
        basis = basis.to(self.reflectors.dtype)
        below = self.reflectors[1:, :-1]
        basis[1:] = torch.ormqr(below, self.scales, basis[1:])
        return basis

    def _vectors_at_once(self, theta: Tensor) -> Tensor | None:
        basis = torch.from_numpy(
            _twisted_vectors(self.diagonal, self.beside, theta.numpy())
        )
        overlap = basis.T @ basis
        distance = (overlap - torch.eye(len(overlap), dtype=torch.float64)).abs().max()
        if float(distance) >= INDEPENDENT:
            return None
        root = torch.linalg.cholesky(overlap)
        return torch.linalg.solve_triangular(root.T, basis, upper=True, left=False)

    def _lapack(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Some of all ascending eigenvalues, one at a time, with their vectors."""
        if last == first:
            nothing = torch.empty(len(self.diagonal), 0, dtype=torch.float64)
            return nothing[0], nothing
        values, vectors = scipy.linalg.eigh_tridiagonal(
            self.diagonal,
            self.beside,
            select="i",
            select_range=(first, last - 1),
            lapack_driver="stemr",
        )
        return torch.from_numpy(values), torch.from_numpy(vectors)


def _twisted_vectors(
    diagonal: np.ndarray, beside: np.ndarray, theta: np.ndarray
) -> np.ndarray:
    """Eigenvectors of a tridiagonal matrix, all at once, from known eigenvalues.

    T - theta = L D L^T from above and U E U^T from below meet in the row r where
    |d_r + e_r - (a_r - theta)| is smallest; from x_r = 1 both halves follow by
    substitution. Vectors of close eigenvalues come out less than orthogonal.

    Args:
        diagonal: (n,).
        beside: (n - 1,).
        theta: (k,) eigenvalues.

    Returns:
        (n, k) with unit columns.

    Source: Dhillon and Parlett (2004), twisted factorisations.
    """
    n, k = len(diagonal), len(theta)
    shifted = diagonal[:, None] - theta
    above, below = np.empty((n, k)), np.empty((n, k))
    square = beside**2
    # A pivot that is exactly zero would end the recurrence; LAPACK nudges it, too.
    tiny = EPS**2 * float(np.abs(diagonal).max())
    above[0], below[-1] = shifted[0], shifted[-1]
    for i in range(1, n):
        pivot = above[i - 1]
        pivot[pivot == 0.0] = tiny
        np.subtract(shifted[i], square[i - 1] / pivot, out=above[i])
    for i in range(n - 2, -1, -1):
        pivot = below[i + 1]
        pivot[pivot == 0.0] = tiny
        np.subtract(shifted[i], square[i] / pivot, out=below[i])
    twist = np.abs(above + below - shifted).argmin(0)
    vectors = np.zeros((n, k))
    vectors[twist, np.arange(k)] = 1.0
    for i in range(n - 2, -1, -1):
        vectors[i] += (i < twist) * vectors[i + 1] * (-beside[i] / above[i])
    for i in range(1, n):
        vectors[i] += (i > twist) * vectors[i - 1] * (-beside[i - 1] / below[i])
    vectors /= np.linalg.norm(vectors, axis=0)
    # Far from its twist a vector decays into numbers that processors are slow with.
    vectors[np.abs(vectors) < NOTHING] = 0.0
    return vectors

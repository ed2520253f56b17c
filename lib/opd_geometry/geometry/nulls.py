"""Updates with one thing taken away: what a diagnostic shows without it.

    null        keeps            takes away
    Gaussian    the norm         everything else
    shuffled    every size       at which places the sizes are
    turned      every singular   which directions they belong to
                value

and what can be asked of a float32 update directly: where its energy lies, whether its
large entries lie where the masks are, whether they grow with the weights.

A difference of two matrices that are stored in 16 bits is not their update: it lies on
W_0's grid, so its sizes say where they belong, and shuffling it proves nothing. What
needs the float32 update refuses one; `unplaced` has a closed form in its stead.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.fft
import torch
from torch import Tensor

from opd_geometry.geometry import bits, selection, unplaced, updates
from opd_geometry.geometry.spectra import (
    check_rank,
    check_same_shape,
    finite_float64,
    finite_matrix,
)

UNIFORM_SIDE = 384  # of the longer side; up to it, rotations are uniform
SHORT_SIDE = 64  # the same where many are drawn
ROUNDS = 3  # of permutation, signs and cosine transform beyond it


def _nonzero(delta: Tensor) -> tuple[Tensor, float]:
    """Values in float64 and their norm, which is not zero."""
    if not delta.numel() or not delta.is_floating_point():
        finite_float64(delta, "delta")
    values = delta.detach().to("cpu", torch.float64)
    size = float(torch.linalg.vector_norm(values))
    if not math.isfinite(size):
        finite_float64(delta, "delta")
    if size == 0.0:
        raise ValueError(
            "delta is zero, expected a non-zero update: "
            "its null is zero as well; leave this matrix out"
        )
    return values, size


def gaussian_noise(
    shape: Sequence[int], size: float, generator: torch.Generator
) -> Tensor:
    """Independent Gaussian entries, scaled to a Frobenius norm.

    size * z / ||z||_F, z_ij ~ N(0, 1)

    Args:
        shape: of the result.
        size: its Frobenius norm.
        generator: a CPU generator.

    Returns:
        Float64 tensor.
    """
    noise = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    return noise.mul_(size / float(torch.linalg.vector_norm(noise)))


# --- shuffled --------------------------------------------------------------------


def is_stored_difference(w_after: Tensor) -> bool:
    """Whether every entry is a 16-bit number, whatever dtype holds it now.

    Then w_after - w_before contains rounding onto that grid.

    Args:
        w_after: any shape, any floating dtype.
    """
    if w_after.dtype in (torch.bfloat16, torch.float16):
        return True
    chunks = [chunk for (chunk,) in bits.chunks(w_after)]
    return any(
        all(torch.equal(chunk.to(short).to(chunk.dtype), chunk) for chunk in chunks)
        for short in (torch.bfloat16, torch.float16)
    )


def update_of(w_before: Tensor, w_after: Tensor) -> Tensor:
    """The update in float64, refused where storage has rounded it onto a 16-bit grid.

    Args:
        w_before: any shape, finite, any floating dtype.
        w_after: the same shape, float32 or float64 weights of the optimizer.

    Raises:
        ValueError: w_after holds 16-bit numbers, or shapes differ.
    """
    check_same_shape(w_before, w_after, ("w_before", "w_after"))
    if is_stored_difference(w_after):
        raise ValueError(
            f"w_after holds 16-bit numbers (dtype {w_after.dtype}), expected float32 "
            "weights: a stored difference lies on W_0's grid and must not be shuffled; "
            "use the closed form of geometry.unplaced at its density"
        )
    return w_after.to(torch.float64, copy=True).sub_(w_before)


def shuffled(delta: Tensor, generator: torch.Generator) -> Tensor:
    """The update's own entries at random places: "which sizes" without "which places".

    delta_pi(i), pi a random permutation of all entries

    Args:
        delta: any shape, of `update_of`.
        generator: a CPU generator.

    Returns:
        Tensor of the same shape, dtype and norm.

    Source: ours.
    """
    seed = int(torch.randint(2**62, (1,), generator=generator))
    # In place and without a list of places, which would take longer than the values.
    values = delta.detach().to("cpu", copy=True).reshape(-1)
    np.random.default_rng(seed).shuffle(values.numpy())
    return values.reshape(delta.shape)


# --- turned ----------------------------------------------------------------------


def turned(
    delta: Tensor, generator: torch.Generator, uniform_side: int = UNIFORM_SIDE
) -> Tensor:
    """The update's own singular values with random singular vectors.

    P delta Q^T, P and Q independent and random orthogonal

    Up to a longer side of ``uniform_side`` a rotation is uniform (Haar). Beyond it,
    where that would take longer than the diagnostics, it is `ROUNDS` times a random
    permutation, random signs and a discrete cosine transform: orthogonal, and with
    entries that cannot be told from those of a uniform one. Neither is ever formed, nor
    a singular vector of delta. In float32, so singular values are kept to 1e-6 of the
    largest.

    Args:
        delta: (n_rows, n_cols), not zero.
        generator: a CPU generator; the same state gives the same null.
        uniform_side: from 1; a smaller one is faster.

    Returns:
        Float64 matrix of the same shape and norm; add it to w_before.

    Raises:
        ValueError: NaN or inf, not a matrix, or zero.

    Source: ours; Stewart (1980) for the uniform rotation, Ailon and Chazelle (2006) for
        the transforms.
    """
    if delta.ndim != 2:
        finite_matrix(delta, "delta")
    values, size = _nonzero(delta)
    del delta  # a caller may have kept none
    unit = bits.over(values, size)
    del values
    rotate = _reflected if max(unit.shape) <= uniform_side else _transformed
    result = rotate(unit, generator).double()
    result *= size / float(torch.linalg.vector_norm(result))
    return result.contiguous()


def _reflected(x: Tensor, generator: torch.Generator) -> Tensor:
    """P x Q^T, P and Q uniform.

    A uniform rotation is a product of reflections in random vectors of falling length,
    which LAPACK applies as it applies those of a QR decomposition. The longer side
    needs as many reflections as the shorter one has entries, after the update is
    reduced to a triangle: its left vectors go anyway.
    """
    if x.shape[0] < x.shape[1]:
        return _reflected(x.T, generator).T
    n_rows, n_cols = x.shape
    if n_rows > n_cols:
        triangle = torch.linalg.qr(x, mode="r").R
        x = torch.cat([triangle, triangle.new_zeros(n_rows - n_cols, n_cols)])
    return _mirrored(_mirrored(x, n_cols, generator).T, n_cols, generator).T


def _mirrored(x: Tensor, n_filled: int, generator: torch.Generator) -> Tensor:
    """P x, P uniform; from row n_filled on x may hold zeros only, if it is shorter."""
    n = len(x)
    noise = torch.randn(n, n_filled, generator=generator, dtype=x.dtype)
    # Column i from its diagonal down: the vector that reflection i maps e_i onto.
    reflectors = noise.tril_()
    lengths = torch.linalg.vector_norm(reflectors, dim=0)
    first = reflectors.diagonal().clone()
    scales = 1.0 + first.abs() / lengths
    reflectors /= first + torch.where(first < 0, -lengths, lengths)
    signs = torch.randint(2, (n, 1), generator=generator) * 2 - 1
    return torch.ormqr(reflectors, scales, x * signs)


def _transformed(x: Tensor, generator: torch.Generator) -> Tensor:
    """P x Q^T by fast transforms; x is written over."""
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    values = x.numpy()
    other = np.empty_like(values)
    signs = np.array([-1.0, 1.0], values.dtype)
    turns = [
        [(rng.permutation(n), rng.choice(signs, n)) for _ in range(ROUNDS)]
        for n in x.shape
    ]
    for (rows, left), (columns, right) in zip(*turns, strict=True):
        np.take(values, rows, 0, out=other, mode="clip")
        np.take(other, columns, 1, out=values, mode="clip")
        values *= left[:, None]
        values *= right
        values = scipy.fft.dctn(values, norm="ortho", overwrite_x=True)
    return torch.from_numpy(values)


# --- energy ----------------------------------------------------------------------


def energy_share(delta: Tensor, basis: Tensor, side: str = "right") -> float:
    """Share of the squared update that lies in a subspace.

    ||delta V||_F^2 / ||delta||_F^2 on the right, ||U^T delta||_F^2 / ||delta||_F^2 on
    the left

    Args:
        delta: (n_rows, n_cols), not zero.
        basis: (n_cols, k) or (n_rows, k) with orthonormal columns: singular vectors of
            W_0, or the top eigenvectors of the activations' covariance.
        side: ``right`` or ``left``.

    Returns:
        From 0 to 1; an unplaced update gives k / n_cols, or k / n_rows, on average.

    Raises:
        ValueError: NaN or inf, zero, an unknown side, or a basis of another length.

    Source: ours.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side {side!r}, expected left or right")
    values, size = _nonzero(finite_matrix(delta, "delta"))
    unit = values / size
    rows = unit if side == "right" else unit.T
    if basis.shape[0] != rows.shape[1]:
        raise ValueError(
            f"the {side} basis has {basis.shape[0]} rows for an update of shape "
            f"{tuple(unit.shape)}, expected {rows.shape[1]}; take the other side's"
        )
    return min(1.0, float((rows @ basis.to(rows.dtype)).square().sum()))


def energy_in_mask(delta: Tensor, mask: Tensor) -> float:
    """Share of the squared update that lies on the entries of a mask.

    sum_{i in mask} delta_i^2 / sum_i delta_i^2

    Args:
        delta: any shape, not zero.
        mask: boolean, the same shape.

    Returns:
        From 0 to 1; an unplaced update gives the mask's share of the entries.

    Raises:
        ValueError: NaN or inf, zero, or shapes differ.

    Source: ours.
    """
    check_same_shape(delta, mask, ("delta", "mask"))
    values, size = _nonzero(delta)
    unit = (values / size).reshape(-1)
    return min(1.0, float(torch.dot(unit, unit * mask.to(values.device).reshape(-1))))


def covariance_basis(covariance: Tensor, k: int) -> Tensor:
    """Top-k eigenvectors of a covariance of activations, for `energy_share`.

    Args:
        covariance: (n_cols, n_cols), symmetric, of the inputs of the matrix.
        k: from 1 to n_cols.

    Returns:
        (n_cols, k) float64 with orthonormal columns.

    Raises:
        ValueError: NaN or inf, not symmetric, or k out of range.
    """
    values = finite_matrix(covariance, "covariance")
    check_rank(k, values.shape)
    if values.shape[0] != values.shape[1] or not torch.allclose(
        values, values.T, rtol=1e-4, atol=1e-6 * float(values.abs().max())
    ):
        raise ValueError(
            f"covariance of shape {tuple(values.shape)} is not symmetric, expected "
            "X^T X of the activations X (tokens, n_cols)"
        )
    _, vectors = torch.linalg.eigh((values + values.T) / 2)
    return vectors[:, -k:].flip(1)


# --- placement of a float32 update -------------------------------------------------


def largest_share(delta: Tensor, share: float) -> Tensor:
    """The largest entries of an update: its mask without any grid of storage.

    top-share by |delta|

    Args:
        delta: any shape, of `update_of`.
        share: of entries, above 0 to 1, such as a printed density.

    Returns:
        Boolean mask of the same shape with exactly round(share * numel) True.

    Raises:
        ValueError: NaN or inf, or share out of range.

    Source: ours.
    """
    mask, _ = selection.mark(
        bits.bits_of(finite_float64(delta, "delta")), share, largest=True
    )
    return torch.from_numpy(mask).reshape(delta.shape)


def visibility_thresholds(w_before: Tensor, delta: Tensor) -> Tensor:
    """How far each entry's update would have to be stretched to be seen in bf16.

    t_i = (distance of w_i to the end of its bf16 cell, towards delta_i) / |delta_i|

    w + c delta has another bf16 value at entry i where c > t_i, so one pass gives the
    visible mask at every size of the update.

    Args:
        w_before: any shape, any floating dtype.
        delta: the same shape, of `update_of`.

    Returns:
        Float64 of the same shape, 0 and up; inf where delta is zero.

    Raises:
        ValueError: NaN or inf, or shapes differ.

    Source: ours.
    """
    check_same_shape(w_before, delta, ("w_before", "delta"))
    outward = finite_float64(delta, "delta") * torch.where(
        torch.signbit(w_before), -1.0, 1.0
    )
    down, up = unplaced.room(w_before)
    return torch.where(
        outward == 0.0, math.inf, torch.where(outward > 0.0, up, down) / outward.abs()
    )


@dataclass(frozen=True)
class Stretched:
    """A float32 update at the size at which it shows a given density in bf16.

    Attributes:
        factor: that it is multiplied with.
        visible: boolean mask of the entries that then change.
    """

    factor: float
    visible: Tensor


def at_density(w_before: Tensor, delta: Tensor, density: float) -> Stretched:
    """An update stretched until so many entries change their bf16 value.

    Args:
        w_before: any shape, any floating dtype.
        delta: the same shape, of `update_of`.
        density: share of entries, above 0 and below 1.

    Returns:
        The factor and the mask, with round(density * numel) entries True, or more
        where some change together.

    Raises:
        ValueError: density out of range, or fewer entries in the update; as
            `visibility_thresholds`.

    Source: ours.
    """
    if not 0.0 < density < 1.0:
        raise ValueError(
            f"density = {density!r}, expected above 0 and below 1: the share of "
            "entries whose bf16 value changes, one minus the sparsity"
        )
    thresholds = visibility_thresholds(w_before, delta)
    count = max(1, round(density * thresholds.numel()))
    factor = float(thresholds.reshape(-1).kthvalue(count).values)
    if factor == math.inf:
        n_nonzero = int(torch.count_nonzero(delta))
        raise ValueError(
            f"density = {density!r} of {delta.numel()} entries, but the update has "
            f"{n_nonzero} that are not zero; ask for less or leave this matrix out"
        )
    return Stretched(factor, thresholds <= factor)


def placement(
    w_before: Tensor,
    delta: Tensor,
    masks: Mapping[str, Tensor],
    density: float,
    generator: torch.Generator,
) -> dict[str, float]:
    """Where a float32 update's changes lie at a given density, against its permutation.

    Args:
        w_before: (n_rows, n_cols), any floating dtype.
        delta: the same shape, of `update_of`.
        masks: name to boolean mask, as of `updates.principal_mask`.
        density: share of entries, above 0 and below 1.
        generator: of the permutation.

    Returns:
        For each mask ``NAME`` (visible in bf16 at that density), ``shuffled_NAME`` (the
        same of the update's own permutation, at the same density) and ``free_NAME``
        (the top share by size, no grid), each from 0 to 1.

    Raises:
        ValueError: as `at_density`.

    Source: ours.
    """
    values = finite_float64(delta, "delta")
    own = at_density(w_before, values, density).visible
    other = at_density(w_before, shuffled(values, generator), density).visible
    free = largest_share(values, density)
    found = {}
    for name, mask in masks.items():
        found[name] = updates.mask_overlap(mask, own)
        found[f"shuffled_{name}"] = updates.mask_overlap(mask, other)
        found[f"free_{name}"] = updates.mask_overlap(mask, free)
    return found


def size_exponent(w_before: Tensor, delta: Tensor) -> tuple[float, float]:
    """How an update grows with the weights: the slope of log|delta| on log|w|.

    |delta| ~ |w|^b, b by least squares over the entries where neither is zero

    Args:
        w_before: any shape, any floating dtype.
        delta: the same shape, of `update_of`.

    Returns:
        b and its standard error for independent entries: 0 for an unplaced update, 1
        for one proportional to the weights.

    Raises:
        ValueError: NaN or inf, shapes differ, or fewer than three entries, or weights
            of one size.

    Source: ours.
    """
    check_same_shape(w_before, delta, ("w_before", "delta"))
    w = finite_float64(w_before, "w_before").abs().reshape(-1)
    d = finite_float64(delta, "delta").abs().reshape(-1)
    both = (w > 0.0) & (d > 0.0)
    x, y = w[both].log(), d[both].log()
    n = len(x)
    x = x - x.mean() if n else x
    spread = float(x.square().sum())
    if n < 3 or spread <= 1e-12 * n:
        raise ValueError(
            f"{n} entries with weight and update, sizes of the weights spread by "
            f"{spread:.1e}: expected three at least, of different sizes"
        )
    y = y - y.mean()
    slope = float(x @ y) / spread
    rest = float((y - slope * x).square().sum())
    return slope, math.sqrt(rest / (n - 2) / spread)

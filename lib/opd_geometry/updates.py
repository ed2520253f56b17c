"""Which entries an update changes, where they sit, and the Gaussian null of it.

What needs no singular values runs at the speed of memory: on the bits of the stored
numbers, a chunk at a time.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from opd_geometry import gram
from opd_geometry.spectra import (
    check_rank,
    check_same_shape,
    finite_float64,
    finite_matrix,
)

CHUNK_ENTRIES = 2**16  # in float64 half a megabyte: it stays in a core's cache
# Neighbouring bf16 numbers are at least this far apart, relative to the larger one.
BF16_STEP = 2.0**-8
# dtype -> integers of its size and the bits of its infinity, above which are NaN
BITS = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
}
SAMPLE = 2**16  # entries from which the place of a quantile is guessed
SIGN_16 = np.int16(-(2**15))


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same entries of each tensor, in row-major order."""
    flat = [tensor.detach().to("cpu").reshape(-1) for tensor in tensors]
    return zip(*(tensor.split(CHUNK_ENTRIES) for tensor in flat), strict=True)


def _magnitudes(w: Tensor) -> np.ndarray:
    """Integers in the order of |w|, flat; for finite entries one to one."""
    integers, _ = BITS[w.dtype]
    bits = w.detach().to("cpu").reshape(-1).view(integers).numpy()
    return bits & np.array(torch.iinfo(integers).max, bits.dtype)


def count_nonfinite(w: Tensor) -> tuple[int, int]:
    """How many entries are NaN and how many infinite.

    Args:
        w: any shape, bf16, fp16, fp32 or fp64.

    Returns:
        (n_nan, n_inf), exact.

    >>> count_nonfinite(torch.tensor([1.0, float("nan"), -float("inf")]))
    (1, 1)
    """
    infinity = BITS[w.dtype][1]
    n_nan = n_inf = 0
    for (chunk,) in _chunks(w):
        magnitudes = _magnitudes(chunk)
        if int(magnitudes.max()) >= infinity:
            n_nan += int(np.count_nonzero(magnitudes > infinity))
            n_inf += int(np.count_nonzero(magnitudes == infinity))
    return n_nan, n_inf


def _bf16_bits(w: Tensor, name: str) -> np.ndarray:
    """Bits of the bf16 cast of a finite chunk."""
    cast = w.to(torch.bfloat16)
    if cast.numel() and int(_magnitudes(cast).max()) >= BITS[torch.bfloat16][1]:
        finite_float64(w, name)  # its message tells NaN from what bf16 cannot hold
        finite_float64(cast, f"{name} cast to bf16")
    return cast.view(torch.int16).numpy()


def _visible(before: np.ndarray, after: np.ndarray, eta: float) -> np.ndarray:
    """`visible_update` of the bits of two chunks."""
    if eta >= BF16_STEP:
        a, b = (
            torch.from_numpy(bits).view(torch.bfloat16).double()
            for bits in (before, after)
        )
        return ((b - a).abs() > eta * torch.maximum(a.abs(), b.abs())).numpy()
    changed: np.ndarray = before != after
    opposite = np.flatnonzero((before ^ after) == SIGN_16)
    zeros = opposite[(before[opposite] & ~SIGN_16) == 0]  # 0 against -0
    changed[zeros] = False
    return changed


def _visible_chunks(w_before: Tensor, w_after: Tensor, eta: float) -> Iterator:
    if not 0.0 <= eta < 1.0:
        raise ValueError(f"eta = {eta!r}, expected 0 <= eta < 1; the paper uses 1e-3")
    check_same_shape(w_before, w_after, ("w_before", "w_after"))
    for name, w in (("w_before", w_before), ("w_after", w_after)):
        if not w.is_floating_point() or w.numel() == 0:
            finite_float64(w, name)
    return (
        _visible(_bf16_bits(a, "w_before"), _bf16_bits(b, "w_after"), eta)
        for a, b in _chunks(w_before, w_after)
    )


def count_visible(w_before: Tensor, w_after: Tensor, eta: float = 1e-3) -> int:
    """Number of True entries of `visible_update`, without the mask.

    Args:
        w_before, w_after, eta: as `visible_update`.

    Raises:
        ValueError: as `visible_update`.
    """
    chunks = _visible_chunks(w_before, w_after, eta)
    return sum(int(np.count_nonzero(chunk)) for chunk in chunks)


def difference_norm(w_before: Tensor, w_after: Tensor) -> float:
    """Frobenius norm of an update, without a float64 copy of it.

    sqrt(sum_ij (w_after_ij - w_before_ij)^2)

    Args:
        w_before: any shape, finite, any floating dtype.
        w_after: the same shape; its dtype may be another one.

    Returns:
        The norm in the unit of the weights, in float64; NaN or inf if an entry is.

    Raises:
        ValueError: shapes differ.

    Source: arXiv:2606.07082 Fig. 4b.

    >>> difference_norm(torch.zeros(2), torch.tensor([3.0, 4.0]))
    5.0
    """
    check_same_shape(w_before, w_after, ("w_before", "w_after"))
    one = torch.empty(CHUNK_ENTRIES, dtype=torch.float64)
    other = torch.empty_like(one)
    square = 0.0
    for a, b in _chunks(w_before, w_after):
        difference = one[: a.numel()].copy_(b).sub_(other[: a.numel()].copy_(a))
        square += float(torch.dot(difference, difference))
    return square**0.5


def norm(w: Tensor) -> float:
    """`spectra.frobenius_norm` a chunk at a time.

    Args:
        w: any shape, any floating dtype.
    """
    buffer = torch.empty(CHUNK_ENTRIES, dtype=torch.float64)
    square = 0.0
    for (chunk,) in _chunks(w):
        values = buffer[: chunk.numel()].copy_(chunk)
        square += float(torch.dot(values, values))
    return square**0.5


def visible_update(w_before: Tensor, w_after: Tensor, eta: float = 1e-3) -> Tensor:
    """Entries whose bf16 value an update changes.

    |b - a| > eta * max(|a|, |b|), a = bf16(w_before), b = bf16(w_after)

    Neighbouring bf16 numbers are at least 2^-8 apart relative to the larger one, so
    below that eta this says "the bf16 values differ", with 0 equal to -0, and is
    decided on their bits.

    Args:
        w_before: any shape, any floating dtype.
        w_after: the same shape; its dtype may be another one.
        eta: relative tolerance, from 0 to below 1.

    Returns:
        Boolean mask of the same shape, on the CPU; True where changed.

    Raises:
        ValueError: shapes differ, eta out of range, or NaN or inf, also where a
            finite value exceeds the bf16 range.

    Source: arXiv:2606.07082 Table 1, after arXiv:2511.08567 (eta = 1e-3).

    >>> visible_update(torch.tensor([1.0, 1.0]), torch.tensor([1.001, 1.01])).tolist()
    [False, True]
    """
    mask = torch.empty(w_before.shape, dtype=torch.bool)
    flat, start = mask.view(-1).numpy(), 0
    for chunk in _visible_chunks(w_before, w_after, eta):
        flat[start : start + len(chunk)] = chunk
        start += len(chunk)
    return mask


def update_sparsity(w_before: Tensor, w_after: Tensor, eta: float = 1e-3) -> float:
    """Share of entries that an update leaves unchanged in bf16.

    1 - |visible_update| / numel; the density is 1 - sparsity

    Over several matrices weigh by their numbers of entries, as Table 1 does.

    Args:
        w_before: any shape, any floating dtype.
        w_after: the same shape.
        eta: relative tolerance, from 0 to below 1.

    Returns:
        Sparsity, from 0 (all changed) to 1 (none).

    Raises:
        ValueError: as `visible_update`.

    Source: arXiv:2606.07082 Table 1.

    >>> update_sparsity(torch.ones(2, 2), torch.diag(torch.ones(2)))
    0.5
    """
    n_visible = count_visible(w_before, w_after, eta)
    return (w_before.numel() - n_visible) / w_before.numel()


def _lowest_share(keys: np.ndarray, alpha: float) -> np.ndarray:
    """Mask of the round(alpha * size) lowest keys; ties go to lower indices.

    A threshold (`keys <= quantile`) takes a whole run of ties or none of it, and
    bf16 weights are full of ties; `torch.quantile` also stops at 16 M entries.
    """
    if not 0.0 < alpha <= 1.0:
        raise ValueError(f"alpha = {alpha!r}, expected 0 < alpha <= 1; try 0.5")
    count = round(alpha * keys.size)
    if count == 0:
        return np.zeros(keys.size, bool)
    threshold = _nth_lowest(keys, count)
    mask = keys < threshold
    tied = np.flatnonzero(keys == threshold)
    mask[tied[: count - np.count_nonzero(mask)]] = True
    return mask


def _nth_lowest(keys: np.ndarray, n: int) -> np.generic:
    """The n-th lowest key, n from 1: exact, in about two passes over the keys.

    A sample says between which two keys it must lie; the few in between are sorted.
    Should the sample mislead, all are.
    """
    sample = np.sort(keys[:: max(1, keys.size // SAMPLE)])
    place = n / keys.size * len(sample)
    margin = 3.0 * len(sample) ** 0.5  # six standard deviations at the median
    low = sample[int(max(0, place - margin))]
    high = sample[int(min(len(sample) - 1, place + margin))]
    n_below = np.count_nonzero(keys < low)
    inside = keys[(keys >= low) & (keys <= high)]
    rank = n - n_below - 1
    if 0 <= rank < inside.size:
        return np.partition(inside, rank)[rank]
    return np.partition(keys, n - 1)[n - 1]


def principal_mask(w_before: Tensor, rank: int, alpha: float = 0.5) -> Tensor:
    """Entries that carry the principal directions of the weights.

    top-alpha share by |U_r S_r V_r^T|, w_before = U S V^T

    Args:
        w_before: (n_rows, n_cols), any floating dtype.
        rank: r, from 1 to min(shape); `default_rank(shape, 64)` scales as the paper.
        alpha: share of entries, above 0 to 1.

    Returns:
        Boolean mask of the same shape with exactly round(alpha * numel) True (half
        to even); ties are taken in row-major order.

    Raises:
        ValueError: NaN or inf, not a matrix, rank or alpha out of range.

    Source: arXiv:2606.07082 Fig. 3 and App. C.3, after arXiv:2511.08567.
    """
    matrix = finite_matrix(w_before, "w_before")
    check_rank(rank, matrix.shape, "rank")
    found = gram.decompose(matrix, rank)
    return reconstruction_mask(found.left, found.spectrum[:rank], found.right, alpha)


def reconstruction_mask(
    left: Tensor, s: Tensor, right: Tensor, alpha: float = 0.5
) -> Tensor:
    """`principal_mask` from singular vectors that are at hand already.

    top-alpha share by |left diag(s) right^T|

    Args:
        left: (n_rows, r) float64.
        s: (r,) float64.
        right: (n_cols, r) float64.
        alpha: share of entries, above 0 to 1.

    Returns:
        Boolean (n_rows, n_cols), as `principal_mask`.

    Raises:
        ValueError: alpha out of range.
    """
    keys = _magnitudes((left * s) @ right.T)
    mask = _lowest_share(np.invert(keys, out=keys), alpha)
    return torch.from_numpy(mask).reshape(left.shape[0], right.shape[0])


def low_magnitude_mask(w_before: Tensor, alpha: float = 0.5) -> Tensor:
    """Entries with the smallest weights.

    bottom-alpha share by |w_before|

    Args:
        w_before: any shape, any floating dtype.
        alpha: share of entries, above 0 to 1.

    Returns:
        Boolean mask of the same shape with exactly round(alpha * numel) True (half
        to even); ties are taken in row-major order.

    Raises:
        ValueError: NaN or inf, or alpha out of range.

    Source: arXiv:2606.07082 Fig. 3 and App. C.3, after arXiv:2511.08567.

    >>> low_magnitude_mask(torch.tensor([[3.0, -1.0], [1.0, 1.0]])).tolist()
    [[False, True], [True, False]]
    """
    if (
        w_before.dtype not in BITS
        or w_before.numel() == 0
        or any(count_nonfinite(w_before))
    ):
        w_before = finite_float64(w_before, "w_before")
    mask = _lowest_share(_magnitudes(w_before), alpha)
    return torch.from_numpy(mask).reshape(w_before.shape)


def mask_overlap(mask: Tensor, update: Tensor) -> float:
    """Share of the updated entries that lie in a mask.

    |mask AND update| / |update|

    Args:
        mask: boolean, as of `principal_mask` or `low_magnitude_mask`.
        update: boolean, the same shape, as of `visible_update`.

    Returns:
        Overlap, from 0 to 1; an update at random places gives alpha, the mask's
        share of the entries.

    Raises:
        ValueError: not boolean, shapes differ, or an update without a True entry.

    Source: arXiv:2606.07082 Fig. 3.

    >>> mask_overlap(torch.tensor([True, False]), torch.tensor([True, True]))
    0.5
    """
    for name, value in (("mask", mask), ("update", update)):
        if value.dtype != torch.bool:
            raise ValueError(
                f"{name} has dtype {value.dtype}, expected torch.bool; "
                "compute it with this module's mask functions"
            )
    check_same_shape(mask, update, ("mask", "update"))
    n_updated = int(update.sum())
    if n_updated == 0:
        raise ValueError(
            "the update changes no entry, expected at least one: "
            "its overlap is undefined; leave this matrix out"
        )
    return int((mask & update).sum()) / n_updated


def gaussian_null(delta: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian update of the same shape and Frobenius norm: the null of any metric.

    ||delta||_F * z / ||z||_F, z_ij ~ N(0, 1) independent

    Args:
        delta: any shape, w_after - w_before.
        generator: a CPU generator; the same state gives the same null.

    Returns:
        Float64 tensor of the same shape and norm; add it to w_before.

    Raises:
        ValueError: NaN or inf, or a zero update, which has no null to compare with.

    Source: ours; the paper shows no null.
    """
    values = finite_float64(delta, "delta")
    size = torch.linalg.vector_norm(values)
    if float(size) == 0.0:
        raise ValueError(
            "delta is zero, expected a non-zero update: "
            "its null is zero as well; leave this matrix out"
        )
    return gaussian_noise(values.shape, float(size), generator)


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

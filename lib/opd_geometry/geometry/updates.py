"""Which entries an update changes, where they sit.

What needs no singular values runs at the speed of memory: on the bits of the stored
numbers, a chunk at a time.
"""

import numpy as np
import torch
from torch import Tensor

from opd_geometry.geometry import gram, selection
from opd_geometry.geometry.bits import (
    BITS,
    CHUNK_ENTRIES,
    bits_of,
    chunks,
    magnitudes_of,
    to_bfloat16,
)
from opd_geometry.geometry.spectra import (
    check_rank,
    check_same_shape,
    finite_float64,
    finite_matrix,
)

# Neighbouring bf16 numbers are at least this far apart, relative to the larger one.
BF16_STEP = 2.0**-8
SIGN_16 = np.int16(-(2**15))


def _bf16_bits(w: Tensor, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Bits of the bf16 cast of a finite chunk, and those without the sign."""
    cast = to_bfloat16(w)
    bits = bits_of(cast)
    magnitudes = magnitudes_of(bits)
    if int(magnitudes.max()) >= BITS[torch.bfloat16][1]:
        finite_float64(w, name)  # its message tells NaN from what bf16 cannot hold
        finite_float64(cast, f"{name} cast to bf16")
    return bits, magnitudes


def _visible(before: Tensor, after: Tensor, eta: float, out: np.ndarray) -> None:
    """`visible_update` of two chunks, into a flat boolean array."""
    a, magnitudes = _bf16_bits(before, "w_before")
    b, _ = _bf16_bits(after, "w_after")
    if eta >= BF16_STEP:
        x, y = (torch.from_numpy(v).view(torch.bfloat16).double() for v in (a, b))
        out[:] = ((y - x).abs() > eta * torch.maximum(x.abs(), y.abs())).numpy()
        return
    np.not_equal(a, b, out=out)
    if int(magnitudes.min()) == 0:
        out[(magnitudes == 0) & ((a ^ b) == SIGN_16)] = False  # 0 against -0


def _check_comparable(w_before: Tensor, w_after: Tensor, eta: float) -> None:
    if not 0.0 <= eta < 1.0:
        raise ValueError(f"eta = {eta!r}, expected 0 <= eta < 1; the paper uses 1e-3")
    check_same_shape(w_before, w_after, ("w_before", "w_after"))
    for name, w in (("w_before", w_before), ("w_after", w_after)):
        if not w.is_floating_point() or w.numel() == 0:
            finite_float64(w, name)


def count_visible(w_before: Tensor, w_after: Tensor, eta: float = 1e-3) -> int:
    """Number of True entries of `visible_update`, without the mask.

    Args:
        w_before, w_after, eta: as `visible_update`.

    Raises:
        ValueError: as `visible_update`.
    """
    _check_comparable(w_before, w_after, eta)
    buffer, count = np.empty(CHUNK_ENTRIES, bool), 0
    for before, after in chunks(w_before, w_after):
        changed = buffer[: before.numel()]
        _visible(before, after, eta, changed)
        count += int(np.count_nonzero(changed))
    return count


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
    _check_comparable(w_before, w_after, eta)
    mask = np.empty(w_before.numel(), bool)  # in large pages, which torch's are not
    for i, (before, after) in enumerate(chunks(w_before, w_after)):
        start = i * CHUNK_ENTRIES
        _visible(before, after, eta, mask[start : start + before.numel()])
    return torch.from_numpy(mask).reshape(w_before.shape)


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
    mask, _ = selection.mark(bits_of((left * s) @ right.T), alpha, largest=True)
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
    if w_before.dtype not in BITS or w_before.numel() == 0:
        w_before = finite_float64(w_before, "w_before")
    mask, top = selection.mark(bits_of(w_before), alpha)
    if top >= BITS[w_before.dtype][1]:
        finite_float64(w_before, "w_before")  # its message counts them
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
    updated = update.cpu().numpy()
    n_updated = int(np.count_nonzero(updated))
    if n_updated == 0:
        raise ValueError(
            "the update changes no entry, expected at least one: "
            "its overlap is undefined; leave this matrix out"
        )
    return int(np.count_nonzero(mask.cpu().numpy() & updated)) / n_updated

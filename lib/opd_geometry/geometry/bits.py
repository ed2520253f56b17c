"""The numbers of a tensor as they are stored, a chunk at a time, at memory speed."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from opd_geometry.geometry.spectra import check_same_shape

CHUNK_ENTRIES = 2**16  # in float64 half a megabyte: it stays in a core's cache
# dtype -> integers of its size and the bits of its infinity, above which are NaN
BITS = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
}


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same entries of each tensor, in row-major order."""
    flat = [tensor.detach().to("cpu").reshape(-1) for tensor in tensors]
    return zip(*(tensor.split(CHUNK_ENTRIES) for tensor in flat), strict=True)


def bits_of(w: Tensor) -> np.ndarray:
    """The stored bits as integers, flat; a view where w is contiguous."""
    integers, _ = BITS[w.dtype]
    bits: np.ndarray = w.detach().to("cpu").reshape(-1).view(integers).numpy()
    return bits


def magnitudes_of(bits: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Integers in the order of |w|; for finite entries one to one."""
    without_sign = np.array(np.iinfo(bits.dtype).max, bits.dtype)
    magnitudes: np.ndarray = np.bitwise_and(bits, without_sign, out=out)
    return magnitudes


def to_bfloat16(w: Tensor) -> Tensor:
    """Rounded to bf16, to the nearest and once.

    torch takes float64 through float32, which rounds twice: 1 + 2^-8 + 2^-40 becomes
    1 + 2^-8, a tie, and then 1. Rounded to odd on the way (away from what is exact, to
    an odd last digit), the second rounding is the only one that counts.

    Args:
        w: any shape, any floating dtype.

    Returns:
        The same shape, bf16.

    Source: Boldo and Melquiond, Emulation of FMA and correctly rounded sums (2008).

    >>> w = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)
    >>> to_bfloat16(w).item(), w.bfloat16().item()
    (1.0078125, 1.0)
    """
    if w.dtype != torch.float64:
        return w.to(torch.bfloat16)
    short = w.float()
    finite = torch.isfinite(short)
    inexact = finite & (short.double() != w)
    bits = short.view(torch.int32)
    bits = bits - (inexact & (short.double().abs() > w.abs())).int()  # towards zero
    return torch.where(inexact, bits | 1, bits).view(torch.float32).bfloat16()


def over(w: Tensor, size: float) -> Tensor:
    """w / size in float32, divided in its own dtype without a copy of all of it."""
    result = torch.empty(w.shape, dtype=torch.float32)
    for part, values in zip(result.split(64), w.split(64), strict=True):
        part.copy_(values / size)
    return result


def stored_difference(w_before: Tensor, w_after: Tensor) -> Tensor:
    """What is left of an update once both weights are stored in bf16.

    bf16(w_after) - bf16(w_before)

    Args:
        w_before, w_after: one shape, any floating dtype; rounded once.

    Returns:
        The same shape, float64, exact.
    """
    return to_bfloat16(w_after).double().sub_(to_bfloat16(w_before))


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
    for (chunk,) in chunks(w):
        magnitudes = magnitudes_of(bits_of(chunk))
        if int(magnitudes.max()) >= infinity:
            n_nan += int(np.count_nonzero(magnitudes > infinity))
            n_inf += int(np.count_nonzero(magnitudes == infinity))
    return n_nan, n_inf


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
    for a, b in chunks(w_before, w_after):
        difference = one[: a.numel()].copy_(b).sub_(other[: a.numel()].copy_(a))
        square += float(torch.dot(difference, difference))
    return square**0.5


def norm(w: Tensor) -> float:
    """`spectra.frobenius_norm` a chunk at a time.

    Args:
        w: any shape, any floating dtype.
    """
    if w.dtype == torch.float64:
        return float(torch.linalg.vector_norm(w))
    square = 0.0
    for (chunk,) in chunks(w):
        values = chunk.double()
        square += float(torch.dot(values, values))
    return square**0.5


def rounding(dtype: torch.dtype, size: float, shape: Sequence[int]) -> float:
    """About the largest singular value of what storing a matrix in a dtype adds to it.

    u ||w||_F (1 / sqrt(n_rows) + 1 / sqrt(n_cols)), u the unit roundoff

    That of independent errors whose root mean square is u times the entries'. 0 of
    16-bit dtypes, whose differences are read with their rounding.

    Args:
        dtype: the weights'.
        size: their Frobenius norm.
        shape: (n_rows, n_cols).

    Source: Geman (1980), the norm of a random matrix.
    """
    if dtype.itemsize < 4:
        return 0.0
    n_rows, n_cols = shape
    return torch.finfo(dtype).eps / 2 * size * (n_rows**-0.5 + n_cols**-0.5)

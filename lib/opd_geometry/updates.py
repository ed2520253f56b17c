"""Which entries an update changes, where they sit, and the Gaussian null of it."""

import torch
from torch import Tensor

from opd_geometry.spectra import (
    check_rank,
    check_same_shape,
    finite_float64,
    finite_matrix,
    svd,
)


def _as_bf16_values(w: Tensor, name: str) -> Tensor:
    """Float64 values of the bf16 cast: exact, so differences are not rounded."""
    cast = finite_float64(w, name).to(torch.bfloat16)
    return finite_float64(cast, f"{name} cast to bf16")


def visible_update(w_before: Tensor, w_after: Tensor, eta: float = 1e-3) -> Tensor:
    """Entries whose bf16 value an update changes.

    |b - a| > eta * max(|a|, |b|), a = bf16(w_before), b = bf16(w_after)

    Neighbouring bf16 numbers are at least 2^-8 apart relative to the larger one,
    so below that eta this says "the bf16 values differ", with 0 equal to -0.

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
    if not 0.0 <= eta < 1.0:
        raise ValueError(f"eta = {eta!r}, expected 0 <= eta < 1; the paper uses 1e-3")
    check_same_shape(w_before, w_after, ("w_before", "w_after"))
    before = _as_bf16_values(w_before, "w_before")
    after = _as_bf16_values(w_after, "w_after")
    larger = torch.maximum(before.abs(), after.abs())
    return (after - before).abs() > eta * larger


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
    visible = visible_update(w_before, w_after, eta)
    return (visible.numel() - int(visible.sum())) / visible.numel()


def _top_share(score: Tensor, alpha: float) -> Tensor:
    """Mask of the round(alpha * numel) largest scores; ties go to lower indices.

    A threshold (`score >= quantile`) takes a whole run of ties or none of it, and
    bf16 weights are full of ties; `torch.quantile` also stops at 16 M entries.
    """
    if not 0.0 < alpha <= 1.0:
        raise ValueError(f"alpha = {alpha!r}, expected 0 < alpha <= 1; try 0.5")
    flat = score.reshape(-1)
    count = round(alpha * flat.numel())
    if count == 0:
        return torch.zeros(score.shape, dtype=torch.bool)
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    mask = flat > threshold
    tied = torch.nonzero(flat == threshold).reshape(-1)
    mask[tied[: count - int(mask.sum())]] = True
    return mask.reshape(score.shape)


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
    u, s, vh = svd(matrix)
    reconstruction = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return _top_share(reconstruction.abs(), alpha)


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
    return _top_share(-finite_float64(w_before, "w_before").abs(), alpha)


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
    norm = torch.linalg.vector_norm(values)
    if float(norm) == 0.0:
        raise ValueError(
            "delta is zero, expected a non-zero update: "
            "its null is zero as well; leave this matrix out"
        )
    noise = torch.randn(values.shape, generator=generator, dtype=torch.float64)
    return noise * (norm / torch.linalg.vector_norm(noise))

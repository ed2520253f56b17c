"""The same diagnostics under other choices than the paper's, and its bounds.

Every diagnostic hangs on a choice: a tolerance, a rank, a share, a stored dtype. Here
each is varied by itself around the default, so that a reader sees which results stay.
A name such as ``sparsity@eta=1e-2`` means: sparsity, with that one choice changed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from opd_geometry.geometry import spectra, updates
from opd_geometry.geometry.bits import norm, rounding, to_bfloat16
from opd_geometry.geometry.comparison import (
    ANGLE_DIVISOR,
    ETA,
    MASK_ALPHA,
    PRINCIPAL_DIVISOR,
    hill,
)

ETAS = {"1e-4": 1e-4, "1e-2": 1e-2}  # relative tolerance; the default is 1e-3
TOLERANCES = {"1e-5": 1e-5}  # absolute, in place of the relative one
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}  # stored in; default bf16
ANGLE_RANKS = {"n/32": 32, "n/16": 16, "n/4": 4}  # k of the angles; default n/8
MASK_RANKS = {"n/16": 16, "n/8": 8, "n/4": 4}  # r of the principal mask; default n/64
MASK_SHARES = {"0.1": 0.1, "0.3": 0.3, "0.7": 0.7}  # alpha of both masks; default 0.5
HILL_RANKS = {"n/32": 32, "n/16": 16, "n/4": 4, "n/2": 2}  # Hill's k; default n/8


def unchanged_share(
    w_before: Tensor, w_after: Tensor, dtype: torch.dtype, eta: float, tolerance: float
) -> float:
    """Share of entries that look unchanged once both are stored in a dtype.

    |b - a| <= eta * max(|a|, |b|) + tolerance, with a, b rounded to dtype

    Args:
        w_before, w_after: (n_rows, n_cols), floating dtypes.
        dtype: what the weights are stored in.
        eta: relative tolerance.
        tolerance: absolute tolerance.

    Returns:
        From 0 (all changed) to 1.

    Source: arXiv:2606.07082, Table 1 (bf16, eta = 1e-3, no absolute tolerance);
    arXiv:2606.13657 (absolute, 1e-5).
    """
    before, after = (_stored(w, dtype).double() for w in (w_before, w_after))
    allowed = eta * torch.maximum(before.abs(), after.abs()) + tolerance
    return float(((after - before).abs() <= allowed).double().mean())


def _stored(w: Tensor, dtype: torch.dtype) -> Tensor:
    return to_bfloat16(w) if dtype == torch.bfloat16 else w.to(dtype)


def sparsities(w_before: Tensor, w_after: Tensor) -> dict[str, float]:
    """Sparsity by tolerance and by stored dtype.

    Returns:
        ``sparsity@eta=...``, ``sparsity@tolerance=...``, ``sparsity@dtype=...``.
    """
    bf16, pair = torch.bfloat16, (w_before, w_after)
    by_eta = {
        f"sparsity@eta={name}": unchanged_share(*pair, bf16, eta, 0.0)
        for name, eta in ETAS.items()
    }
    by_tolerance = {
        f"sparsity@tolerance={name}": unchanged_share(*pair, bf16, 0.0, tolerance)
        for name, tolerance in TOLERANCES.items()
    }
    by_dtype = {
        f"sparsity@dtype={name}": unchanged_share(*pair, dtype, ETA, 0.0)
        for name, dtype in DTYPES.items()
    }
    return by_eta | by_tolerance | by_dtype


def angles(w_before: Tensor, w_after: Tensor) -> dict[str, float]:
    """Mean principal angles by their rank k.

    Returns:
        ``angle_left_mean_deg@k=...`` and ``angle_right_mean_deg@k=...``, degrees.
    """
    u, _, vh = spectra.svd(w_before)
    u_after, _, vh_after = spectra.svd(w_after)
    values = {}
    for name, divisor in ANGLE_RANKS.items():
        k = spectra.default_rank(w_before.shape, divisor)
        left = spectra.principal_angles_deg(u[:, :k], u_after[:, :k])
        right = spectra.principal_angles_deg(vh[:k].T, vh_after[:k].T)
        values[f"angle_left_mean_deg@k={name}"] = float(left.mean())
        values[f"angle_right_mean_deg@k={name}"] = float(right.mean())
    return values


def overlaps(w_before: Tensor, w_after: Tensor) -> dict[str, float]:
    """Overlaps with the two masks by their share alpha, and by the rank r.

    Returns:
        ``principal_overlap@alpha=...``, ``low_magnitude_overlap@alpha=...`` and
        ``principal_overlap@r=...``; NaN where nothing changed visibly.
    """
    visible = updates.visible_update(w_before, w_after)
    default = spectra.default_rank(w_before.shape, PRINCIPAL_DIVISOR)
    values = {}
    for name, alpha in MASK_SHARES.items():
        masks = {
            "principal": updates.principal_mask(w_before, default, alpha),
            "low_magnitude": updates.low_magnitude_mask(w_before, alpha),
        }
        for kind, mask in masks.items():
            values[f"{kind}_overlap@alpha={name}"] = _overlap(mask, visible)
    for name, divisor in MASK_RANKS.items():
        rank = spectra.default_rank(w_before.shape, divisor)
        mask = updates.principal_mask(w_before, rank, MASK_ALPHA)
        values[f"principal_overlap@r={name}"] = _overlap(mask, visible)
    return values


def tails(w_before: Tensor, w_after: Tensor) -> dict[str, float]:
    """The update's Hill exponent by the number k of singular values that it uses.

    Returns:
        ``hill_alpha@k=...``; NaN where the update has too low a rank.
    """
    s = spectra.singular_values(w_after.double() - w_before.double())
    floor = rounding(w_after.dtype, norm(w_before), w_after.shape)
    values = {}
    for name, divisor in HILL_RANKS.items():
        k = max(2, spectra.default_rank(w_before.shape, divisor))
        values[f"hill_alpha@k={name}"] = hill(s, k, floor)
    return values


def gates(w_before: Tensor, w_after: Tensor) -> dict[str, float]:
    """The bounds of the three-gate account, to be held against what was measured.

    Returns:
        ``bound_angle_deg`` (Wedin, on the largest principal angle), ``bound_nss``
        (Mirsky), ``gap_share`` (the update's spectral norm over the gap of W_0 at k,
        above 1 where Wedin says nothing) and ``bound_density`` (the share of entries
        that move by at least half a unit in the last place of their bf16 value).

    Source: arXiv:2606.07082, the relaxed three-gate account.
    """
    before, after = (spectra.singular_values(w) for w in (w_before, w_after))
    delta = w_after.double() - w_before.double()
    norm = float(spectra.singular_values(delta)[0])
    k = spectra.default_rank(w_before.shape, ANGLE_DIVISOR)
    gap = float(before[k - 1] - before[k]) if k < len(before) else float(before[-1])
    # spacing of bf16 numbers around w: 2^(exponent - 7), with w = mantissa * 2^exponent
    exponent = torch.frexp(w_before.double()).exponent - 1
    half_unit = torch.exp2(exponent.double() - 8)
    return {
        "bound_angle_deg": spectra.wedin_bound_deg(before, after, norm, k),
        "bound_nss": spectra.mirsky_bound(before, spectra.frobenius_norm(delta)),
        "gap_share": norm / gap if gap > 0.0 else float("inf"),
        "bound_density": float((delta.abs() >= half_unit).double().mean()),
    }


GROUPS: tuple[Callable[[Tensor, Tensor], dict[str, float]], ...] = (
    sparsities,
    angles,
    overlaps,
    tails,
    gates,
)


def choices(w_before: Tensor, w_after: Tensor) -> dict[str, float]:
    """Every metric of this module for one matrix.

    Empty where nothing moved, or where W_0 is zero and nothing is relative to it.

    Args:
        w_before, w_after: (n_rows, n_cols), floating dtypes.

    Raises:
        ValueError: shapes differ, or a value is not finite.
    """
    if torch.equal(w_before.double(), w_after.double()) or not w_before.any():
        return {}
    values: dict[str, float] = {}
    for group in GROUPS:
        values |= group(w_before, w_after)
    return values


def _overlap(mask: Tensor, visible: Tensor) -> float:
    return updates.mask_overlap(mask, visible) if bool(visible.any()) else float("nan")

"""One weight matrix before and after training: every diagnostic, and its null.

W_0's side (`reference`) is computed once, when a metric first asks for it, and kept for
all later checkpoints; a metric that nobody asked for costs nothing.
"""

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from opd_geometry.geometry import bits, gram, nulls, spectra, updates
from opd_geometry.geometry.defaults import (
    ANGLE_DIVISOR,
    ETA,
    HILL_DIVISOR,
    MASK_ALPHA,
    PRINCIPAL_DIVISOR,
)
from opd_geometry.geometry.gram import Decomposition

ANGLES = (
    "angle_left_mean_deg",
    "angle_left_max_deg",
    "angle_right_mean_deg",
    "angle_right_max_deg",
)
METRICS = (
    "sparsity",
    "density",
    *ANGLES,
    "nss",
    "principal_overlap",
    "low_magnitude_overlap",
    "stable_rank",
    "stable_rank_bf16",
    "frobenius_norm",
    "relative_norm",
    "hill_alpha",
)
# Norms of the null equal the update's own by construction.
NULL_METRICS = tuple(name for name in METRICS if "norm" not in name)
# Whether the angles mean anything; asked for by name.
ANGLE_QUALITY = ("gap_at_k", "angle_error_deg")


@dataclass(frozen=True)
class Settings:
    """Ranks and thresholds of the diagnostics; None scales with the matrix.

    Attributes:
        rank_k: dimension of the subspaces whose angles are measured; n / 8, with n
            the smaller side.
        principal_rank: rank of the reconstruction behind the principal mask; n / 64.
        hill_k: singular values in the Hill estimate; n / 8.
        alpha: share of the entries in either mask.
        eta: relative tolerance of an unchanged entry.

    A rank above the smaller side of a matrix is cut to that side.
    """

    rank_k: int | None = None
    principal_rank: int | None = None
    hill_k: int | None = None
    alpha: float = MASK_ALPHA
    eta: float = ETA

    def __post_init__(self) -> None:
        for name, least in (("rank_k", 1), ("principal_rank", 1), ("hill_k", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} = {value!r}, expected at least {least}")
        if not 0.0 < self.alpha <= 1.0 or not 0.0 <= self.eta < 1.0:
            raise ValueError(
                f"alpha = {self.alpha!r} and eta = {self.eta!r}, expected "
                "0 < alpha <= 1 and 0 <= eta < 1; the paper uses 0.5 and 1e-3"
            )

    def angle_rank(self, shape: tuple[int, ...]) -> int:
        """K of the angles for a matrix of that shape."""
        return _rank(self.rank_k, shape, ANGLE_DIVISOR)

    def mask_rank(self, shape: tuple[int, ...]) -> int:
        """R of the principal mask for a matrix of that shape."""
        return _rank(self.principal_rank, shape, PRINCIPAL_DIVISOR)

    def hill_rank(self, shape: tuple[int, ...]) -> int:
        """K of the Hill estimate, at least 2."""
        return max(2, _rank(self.hill_k, shape, HILL_DIVISOR))


DEFAULTS = Settings()


def _rank(asked: int | None, shape: tuple[int, ...], divisor: int) -> int:
    return min(asked or spectra.default_rank(shape, divisor), *shape)


@dataclass(frozen=True)
class Reference:
    """What the diagnostics need of W_0, each part computed when first asked for.

    Attributes:
        w_before: (n_rows, n_cols), as stored.
        settings: ranks and thresholds.
    """

    w_before: Tensor
    settings: Settings = DEFAULTS

    @cached_property
    def decomposition(self) -> Decomposition:
        """Spectrum and top subspaces, wide enough for angles and principal mask."""
        shape, settings = self.w_before.shape, self.settings
        return gram.decompose(
            self.w_before, max(settings.angle_rank(shape), settings.mask_rank(shape))
        )

    @cached_property
    def top(self) -> Decomposition:
        """The decomposition at the k of the angles."""
        k = self.settings.angle_rank(self.w_before.shape)
        if k == self.decomposition.left.shape[1]:
            return self.decomposition
        return gram.decompose(self.w_before, k)

    @cached_property
    def principal(self) -> Tensor:
        """Boolean principal mask."""
        rank = self.settings.mask_rank(self.w_before.shape)
        found = self.decomposition
        return updates.reconstruction_mask(
            found.left[:, :rank],
            found.spectrum[:rank],
            found.right[:, :rank],
            self.settings.alpha,
        )

    @cached_property
    def low_magnitude(self) -> Tensor:
        """Boolean low-magnitude mask."""
        return updates.low_magnitude_mask(self.w_before, self.settings.alpha)

    @cached_property
    def norm(self) -> float:
        """Frobenius norm."""
        return bits.norm(self.w_before)


def reference(w_before: Tensor, settings: Settings = DEFAULTS) -> Reference:
    """W_0, to compare later checkpoints with.

    Args:
        w_before: (n_rows, n_cols), any floating dtype.
        settings: ranks and thresholds.

    Raises:
        ValueError: not a finite floating-point matrix.
    """
    if w_before.ndim != 2 or w_before.dtype not in bits.BITS or _damaged(w_before):
        spectra.finite_matrix(w_before, "w_before")
    return Reference(w_before, settings)


def _damaged(w: Tensor) -> bool:
    return w.numel() == 0 or any(bits.count_nonfinite(w))


def compare(
    before: Reference, w_after: Tensor, metrics: Iterable[str] = METRICS
) -> dict[str, float]:
    """Single-checkpoint diagnostics of one matrix (see the notation page).

    Args:
        before: of W_0.
        w_after: (n_rows, n_cols), the later weights.
        metrics: of `METRICS` and `ANGLE_QUALITY`; only what they need is computed.

    Returns:
        Those metrics; NaN where one is undefined: overlaps when no entry changed
        visibly, the Hill exponent of an update of too low a rank, everything but
        sparsity, density and norm when nothing changed at all.

    Raises:
        ValueError: shapes differ, a value is not finite, or an unknown metric.

    Source: arXiv:2606.07082 Table 1, Figures 2 to 4.
    """
    names = list(metrics)
    unknown = sorted({*names} - {*METRICS, *ANGLE_QUALITY})
    if unknown:
        raise ValueError(f"unknown metrics {unknown}, expected some of {METRICS}")
    if w_after.dtype not in bits.BITS or _damaged(w_after):
        spectra.finite_matrix(w_after, "w_after")
    norm = bits.difference_norm(before.w_before, w_after)
    values = {"sparsity": 1.0, "density": 0.0, "frobenius_norm": 0.0}
    if norm > 0.0:  # else a run that never stepped (RLVR without reward variance)
        wanted = set(names)
        values = {
            "frobenius_norm": norm,
            "relative_norm": norm / (before.norm or np.nan),
        }
        values |= _changes(before, w_after, wanted)
        values |= _turns(before, w_after, wanted)
        values |= _spread(before, w_after, norm, wanted)
    return {name: values.get(name, float("nan")) for name in names}


def _changes(before: Reference, w_after: Tensor, wanted: set[str]) -> dict[str, float]:
    """Which entries changed, and where they lie."""
    w_before, eta = before.w_before, before.settings.eta
    overlaps = wanted & {"principal_overlap", "low_magnitude_overlap"}
    if not overlaps:
        if not wanted & {"sparsity", "density"}:
            return {}
        density = updates.count_visible(w_before, w_after, eta) / w_after.numel()
        return {"sparsity": 1.0 - density, "density": density}
    visible = updates.visible_update(w_before, w_after, eta)
    density = int(np.count_nonzero(visible.numpy())) / visible.numel()
    values = {"sparsity": 1.0 - density, "density": density}
    if density > 0.0:
        if "principal_overlap" in overlaps:
            share = updates.mask_overlap(before.principal, visible)
            values["principal_overlap"] = share
        if "low_magnitude_overlap" in overlaps:
            share = updates.mask_overlap(before.low_magnitude, visible)
            values["low_magnitude_overlap"] = share
    return values


def _turns(before: Reference, w_after: Tensor, wanted: set[str]) -> dict[str, float]:
    """How far the top subspaces turned and the spectrum moved."""
    if not wanted & {*ANGLES, *ANGLE_QUALITY, "nss"}:
        return {}
    old = before.top
    new = gram.decompose(w_after, old.left.shape[1])
    values = {
        "nss": defined(spectra.normalised_spectral_shift, old.spectrum, new.spectrum),
        "gap_at_k": old.gap,
        "angle_error_deg": min(90.0, old.error_deg + new.error_deg),
    }
    if wanted & {*ANGLES}:
        for side in ("left", "right"):
            angles = spectra.angles_between_deg(getattr(old, side), getattr(new, side))
            values[f"angle_{side}_mean_deg"] = float(angles.mean())
            values[f"angle_{side}_max_deg"] = float(angles.max())
    return values


def _spread(
    before: Reference, w_after: Tensor, norm: float, wanted: set[str]
) -> dict[str, float]:
    """How many directions the update has."""
    values: dict[str, float] = {}
    if wanted & {"stable_rank", "hill_alpha"}:
        delta = difference(before.w_before, w_after)
        values |= spread(delta, norm, before.settings.hill_rank(delta.shape))
    if "stable_rank_bf16" in wanted:
        stored = w_after.bfloat16().double() - before.w_before.bfloat16().double()
        values["stable_rank_bf16"] = defined(spectra.stable_rank, stored)
    return values


def difference(w_before: Tensor, w_after: Tensor) -> Tensor:
    """w_after - w_before in float64, exact where both are stored in less."""
    spectra.check_same_shape(w_before, w_after, ("w_before", "w_after"))
    return w_after.to(torch.float64, copy=True).sub_(w_before)


def spread(delta: Tensor, norm: float, hill_k: int) -> dict[str, float]:
    """Stable rank and Hill exponent of a non-zero update.

    Args:
        delta: (n_rows, n_cols).
        norm: its Frobenius norm.
        hill_k: singular values in the Hill estimate.
    """
    values = gram.leading_values(delta, min(hill_k, *delta.shape))
    return {
        "stable_rank": max(1.0, (norm / float(values[0])) ** 2),
        "hill_alpha": defined(spectra.hill_exponent, values, hill_k),
    }


def defined(metric: Callable[..., float], *arguments: object) -> float:
    """A metric's value, NaN where it refuses its arguments.

    Only for matrices that were checked to be finite: what is left to refuse is a metric
    that this update does not have.
    """
    try:
        return metric(*arguments)
    except ValueError:
        return float("nan")


def compare_null(
    before: Reference,
    w_after: Tensor,
    seed: int | tuple[int, ...],
    metrics: Iterable[str] = NULL_METRICS,
) -> dict[str, float]:
    """The same diagnostics of a Gaussian update with the same Frobenius norm.

    Args:
        before, w_after: as in ``compare``.
        seed: of the Gaussian; give every matrix and step one of its own, or the
            average over them is one over the same noise.
        metrics: as in ``compare``.

    Returns:
        ``null_`` + metric to value.
    """
    values = compare(before, null_weights(before, w_after, seed), metrics)
    return {f"null_{name}": value for name, value in values.items()}


def null_weights(
    before: Reference, w_after: Tensor, seed: int | tuple[int, ...]
) -> Tensor:
    """W_0 plus a Gaussian update of the same Frobenius norm, float64.

    Args:
        before, w_after, seed: as in ``compare_null``.
    """
    norm = bits.difference_norm(before.w_before, w_after)
    if norm == 0.0:
        return w_after
    state = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0] >> 1))
    shape = before.w_before.shape
    return nulls.gaussian_noise(shape, norm, generator).add_(before.w_before)


def null_seed(seed: int, name: str, step: int) -> tuple[int, ...]:
    """Seed of the null of one matrix at one step: no two share their noise."""
    return seed, zlib.crc32(name.encode()), step

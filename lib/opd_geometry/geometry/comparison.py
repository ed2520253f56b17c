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

from opd_geometry.geometry import bits, gram, nulls, spectra, unplaced, updates
from opd_geometry.geometry.defaults import (
    ANGLE_DIVISOR,
    ANGLES,
    ENERGY,
    ETA,
    HILL_DIVISOR,
    MASK_ALPHA,
    PRINCIPAL_DIVISOR,
)
from opd_geometry.geometry.gram import Decomposition
from opd_geometry.geometry.unplaced import Magnitudes

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
TOP = 16  # directions of the update whose share is taken; the paper's K
SHARE = ("top_share",)  # of the squared update in them; asked for by name
# The update as stored in bf16; the others asked for by name, as ENERGY.
READOUT = ("stable_rank_bf16", "frobenius_norm_bf16", "hill_alpha_bf16")
OVERLAPS = ("principal_overlap", "low_magnitude_overlap")
SHUFFLED = ("sparsity", *OVERLAPS)  # entrywise
TURNED = (*ANGLES, "nss")  # of directions
EXPECTED = ("sparsity", "density", *OVERLAPS)  # that have a closed form


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

    A rank above the smaller side of a matrix is cut to that side; see `cut`.
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

    def cut(self, shape: tuple[int, ...]) -> list[str]:
        """Names of the ranks that are above the smaller side of a matrix."""
        asked = {n: getattr(self, n) for n in ("rank_k", "principal_rank", "hill_k")}
        return [name for name, k in asked.items() if k is not None and k > min(shape)]

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
        bottom: whether the bottom subspaces will be asked for, which are cheaper
            together with the top ones.
    """

    w_before: Tensor
    settings: Settings = DEFAULTS
    bottom: bool = False

    @cached_property
    def decomposition(self) -> Decomposition:
        """Spectrum and top subspaces, wide enough for angles and principal mask."""
        shape, settings = self.w_before.shape, self.settings
        k = settings.angle_rank(shape)
        return gram.decompose(
            self.w_before, max(k, settings.mask_rank(shape)), k if self.bottom else 0
        )

    @cached_property
    def ends(self) -> Decomposition:
        """The decomposition at the k of the angles, with the bottom-k subspaces."""
        k = self.settings.angle_rank(self.w_before.shape)
        found = self.decomposition
        if found.lowest_left.shape[1] != k:
            found = gram.decompose(self.w_before, k, k)
        return found

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
        return self.principal_at(self.settings.alpha)

    def principal_at(self, alpha: float) -> Tensor:
        """Boolean principal mask of another share of the entries."""
        rank = self.settings.mask_rank(self.w_before.shape)
        found = self.decomposition
        left, right = found.left[:, :rank], found.right[:, :rank]
        return updates.reconstruction_mask(left, found.spectrum[:rank], right, alpha)

    @cached_property
    def low_magnitude(self) -> Tensor:
        """Boolean low-magnitude mask."""
        return updates.low_magnitude_mask(self.w_before, self.settings.alpha)

    @cached_property
    def norm(self) -> float:
        """Frobenius norm."""
        return bits.norm(self.w_before)

    @cached_property
    def magnitudes(self) -> Magnitudes:
        """Its entries by magnitude, for the closed form."""
        return unplaced.magnitudes(self.w_before)

    @cached_property
    def principal_magnitudes(self) -> Magnitudes:
        """Those of the principal mask."""
        return unplaced.magnitudes(self.w_before, self.principal)


def reference(
    w_before: Tensor, settings: Settings = DEFAULTS, bottom: bool = False
) -> Reference:
    """W_0, to compare later checkpoints with.

    Args:
        w_before: (n_rows, n_cols), any floating dtype.
        settings: ranks and thresholds.
        bottom: as `Reference`.

    Raises:
        ValueError: not a finite floating-point matrix.
    """
    if w_before.ndim != 2 or w_before.dtype not in bits.BITS or _damaged(w_before):
        spectra.finite_matrix(w_before, "w_before")
    return Reference(w_before, settings, bottom)


def _damaged(w: Tensor) -> bool:
    return w.numel() == 0 or any(bits.count_nonfinite(w))


def compare(
    before: Reference, w_after: Tensor, metrics: Iterable[str] = METRICS
) -> dict[str, float]:
    """Single-checkpoint diagnostics of one matrix (see the notation page).

    Args:
        before: of W_0.
        w_after: (n_rows, n_cols), the later weights.
        metrics: of `METRICS`, `ANGLE_QUALITY`, `ENERGY`, `SHARE` and `READOUT`; only
            what they need is computed.

    Returns:
        Those metrics; NaN where one is undefined: overlaps when no entry changed
        visibly, the Hill exponent of an update of too low a rank (but for what
        rounding to float32 adds), everything but
        sparsity, density and norm when nothing changed at all.

    Raises:
        ValueError: shapes differ, a value is not finite, or an unknown metric.

    Source: arXiv:2606.07082 Table 1, Figures 2 to 4.
    """
    names = list(metrics)
    unknown = sorted({*names} - {*METRICS, *ANGLE_QUALITY, *ENERGY, *SHARE, *READOUT})
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
        values |= _energies(before, w_after, norm, wanted)
    return {name: values.get(name, float("nan")) for name in names}


def _changes(before: Reference, w_after: Tensor, wanted: set[str]) -> dict[str, float]:
    """Which entries changed, and where they lie."""
    w_before, eta = before.w_before, before.settings.eta
    overlaps = wanted & {*OVERLAPS}
    if not overlaps:
        if not wanted & {"sparsity", "density"}:
            return {}
        density = updates.count_visible(w_before, w_after, eta) / w_after.numel()
        return {"sparsity": 1.0 - density, "density": density}
    visible = updates.visible_update(w_before, w_after, eta)
    density = int(np.count_nonzero(visible.numpy())) / visible.numel()
    values = {"sparsity": 1.0 - density, "density": density}
    for name in overlaps if density > 0.0 else ():
        mask = getattr(before, name.removesuffix("_overlap"))
        values[name] = updates.mask_overlap(mask, visible)
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
    if wanted & {"stable_rank", "hill_alpha", *SHARE}:
        delta = difference(before.w_before, w_after)
        hill_k = before.settings.hill_rank(delta.shape)
        floor = bits.rounding(w_after.dtype, before.norm, w_after.shape)
        values |= spread(delta, norm, hill_k, floor)
    if wanted & {*READOUT}:
        hill_k = before.settings.hill_rank(w_after.shape)
        values |= stored_spread(before.w_before, w_after, hill_k)
    return values


def stored_spread(w_before: Tensor, w_after: Tensor, hill_k: int) -> dict[str, float]:
    """Norm, stable rank and Hill exponent of bf16(w_after) - bf16(w_before).

    Args:
        w_before, w_after: (n_rows, n_cols), any floating dtype.
        hill_k: singular values in the Hill estimate.

    Returns:
        `READOUT`, without what an update that bf16 does not show has not.
    """
    stored = bits.stored_difference(w_before, w_after)
    norm = bits.norm(stored)
    values = {"frobenius_norm_bf16": norm}
    if norm > 0.0:
        found = spread(stored, norm, hill_k)
        values |= {f"{name}_bf16": value for name, value in found.items()}
    return values


def _energies(
    before: Reference, w_after: Tensor, norm: float, wanted: set[str]
) -> dict[str, float]:
    """Where the squared update lies."""
    if not wanted & {*ENERGY}:
        return {}
    unit = difference(before.w_before, w_after).div_(norm).float()
    values = {}
    if wanted & {*ENERGY[:4]}:
        ends, k = before.ends, before.settings.angle_rank(w_after.shape)
        sides = {
            "left": (unit.T, ends.left[:, :k], ends.lowest_left),
            "right": (unit, ends.right[:, :k], ends.lowest_right),
        }
        for side, (rows, top, bottom) in sides.items():
            images = rows @ torch.cat([top, bottom], dim=1).float()
            squares = images.double().square().sum(0)
            values[f"energy_top_{side}"] = float(squares[:k].sum())
            values[f"energy_bottom_{side}"] = float(squares[k:].sum())
    unit.square_()
    for name in ("principal", "low_magnitude"):
        if f"energy_{name}" in wanted:
            inside = unit * getattr(before, name)
            values[f"energy_{name}"] = float(inside.sum(dtype=torch.float64))
    return values


def energy_by_chance(before: Reference) -> dict[str, float]:
    """What an unplaced update has of each of `ENERGY` on average.

    k / n_rows on the left, k / n_cols on the right, a mask's share of the entries

    Args:
        before: of W_0.

    Returns:
        ``null_`` + metric to value.
    """
    n_rows, n_cols = before.w_before.shape
    k = before.settings.angle_rank(before.w_before.shape)
    n = n_rows * n_cols
    share = round(before.settings.alpha * n) / n
    chances = (k / n_rows, k / n_cols) * 2 + (share, share)
    return {f"null_{name}": v for name, v in zip(ENERGY, chances, strict=True)}


def difference(w_before: Tensor, w_after: Tensor) -> Tensor:
    """w_after - w_before in float64, exact where both are stored in less."""
    spectra.check_same_shape(w_before, w_after, ("w_before", "w_after"))
    result = torch.empty(w_after.shape, dtype=torch.float64)
    rows = max(1, bits.CHUNK_ENTRIES // max(1, w_after.shape[-1]))
    sides = (w.detach().split(rows) for w in (w_before, w_after))
    for part, before, after in zip(result.split(rows), *sides, strict=True):
        part.copy_(after).sub_(before.double())  # of one dtype: twice as fast
    return result


def spread(
    delta: Tensor, norm: float, hill_k: int, floor: float = 0.0
) -> dict[str, float]:
    """Stable rank, Hill exponent and share of the top directions of an update.

    Args:
        delta: (n_rows, n_cols), not zero.
        norm: its Frobenius norm.
        hill_k: singular values in the Hill estimate.
        floor: of the singular values, see ``hill``.
    """
    top = min(max(hill_k, TOP), *delta.shape)
    return of_values(gram.leading_values(delta, top), norm, hill_k, floor)


def of_values(
    values: Tensor, norm: float, hill_k: int, floor: float = 0.0
) -> dict[str, float]:
    """The same from the largest singular values, descending, hill_k of them or all."""
    return {
        "stable_rank": max(1.0, (norm / float(values[0])) ** 2),
        "hill_alpha": hill(values, hill_k, floor),
        "top_share": min(1.0, float((values[:TOP] / norm).square().sum())),
    }


def hill(values: Tensor, k: int, floor: float = 0.0) -> float:
    """Hill exponent of an update; NaN where it has none.

    Args:
        values: singular values, descending, k of them or all.
        k: that the estimate takes.
        floor: below it they are the rounding of stored weights: of an update of lower
            rank than k, such as LoRA's, these would decide the exponent.
    """
    if len(values) >= k and float(values[k - 1]) <= floor:
        return float("nan")
    return defined(spectra.hill_exponent, values, k)


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
    generator = generator_of(seed)
    shape = before.w_before.shape
    return nulls.gaussian_noise(shape, norm, generator).add_(before.w_before)


def compare_shuffled(
    before: Reference,
    w_after: Tensor,
    seed: int | tuple[int, ...],
    metrics: Iterable[str] = SHUFFLED,
) -> dict[str, float]:
    """Entrywise diagnostics of the update's own entries, permuted.

    Args:
        before, w_after: as in ``compare``; weights of the optimizer, not 16-bit ones.
        seed: of the permutation, as in ``compare_null``.
        metrics: of `SHUFFLED`.

    Returns:
        ``shuffled_`` + metric to value; empty where nothing changed.

    Raises:
        ValueError: w_after holds 16-bit numbers: see `nulls.update_of`.
    """
    if bits.difference_norm(before.w_before, w_after) == 0.0:
        return {}
    delta = nulls.update_of(before.w_before, w_after)
    if w_after.dtype == torch.float32:
        delta = delta.float()  # is shuffled in half the time
    moved = nulls.shuffled(delta, generator_of(seed, "shuffled"))
    del delta
    moved = moved.double().add_(before.w_before)
    values = compare(before, moved, metrics)
    return {f"shuffled_{name}": value for name, value in values.items()}


def compare_turned(
    before: Reference,
    w_after: Tensor,
    seed: int | tuple[int, ...],
    metrics: Iterable[str] = TURNED,
) -> dict[str, float]:
    """Diagnostics of an update with the same singular values and random directions.

    Args:
        before, w_after: as in ``compare``.
        seed: of the directions, as in ``compare_null``.
        metrics: of `TURNED` and `READOUT`: the latter is what rounding makes of the
            update's own spectrum.

    Returns:
        ``turned_`` + metric to value; empty where nothing changed.
    """
    if bits.difference_norm(before.w_before, w_after) == 0.0:
        return {}
    moved = nulls.turned(
        difference(before.w_before, w_after), generator_of(seed, "turned")
    ).add_(before.w_before)
    values = compare(before, moved, metrics)
    return {f"turned_{name}": value for name, value in values.items()}


def generator_of(seed: int | tuple[int, ...], what: str = "") -> torch.Generator:
    """Of one null: others with the same seed have noise of their own.

    Args:
        seed: as in ``compare_null``.
        what: the null's name; none for the Gaussian.
    """
    seeds = (seed,) if isinstance(seed, int) else seed
    words = (*seeds, zlib.crc32(what.encode())) if what else seeds
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))


@dataclass(frozen=True)
class Expected:
    """What an unplaced Gaussian update shows at one distance, in closed form.

    Attributes:
        scale: standard deviation of its entries, in units of the weights.
        origin: ``norm`` of the float32 update, or ``density``, where both checkpoints
            are stored in 16 bits and the norm of their difference contains rounding.
        values: of `EXPECTED`; NaN where there is none.
    """

    scale: float
    origin: str
    values: dict[str, float]


def compare_expected(
    before: Reference,
    w_after: Tensor,
    density: float | None = None,
    metrics: Iterable[str] = EXPECTED,
) -> Expected:
    """The closed form at the distance of an update.

    Args:
        before, w_after: as in ``compare``.
        density: share of entries that changed, if it is known already.
        metrics: of `EXPECTED`.

    Returns:
        Its scale, where that comes from, and the metrics: at a density that is the
        measured one, sparsity and density equal it.

    Raises:
        ValueError: a density that no unplaced update has: of W_0's entries more are
            exactly zero.

    Source: ours; see `unplaced`.
    """
    wanted, found = set(metrics), before.magnitudes
    none = dict.fromkeys(metrics, float("nan"))
    if nulls.is_stored_difference(w_after):
        origin = "density"
        if density is None:
            density = compare(before, w_after, ["density"])["density"]
        if density in (0.0, 1.0):  # of any scale below, or above, some limit
            return Expected(float("nan"), origin, none)
        scale = unplaced.scale_at_density(found, density)
    else:
        origin = "norm"
        norm = bits.difference_norm(before.w_before, w_after)
        scale = norm / w_after.numel() ** 0.5
        if scale == 0.0:
            return Expected(float("nan"), origin, none)
    density = unplaced.expected_density(found, scale)
    values = {"density": density, "sparsity": 1.0 - density}
    if "low_magnitude_overlap" in wanted:
        values["low_magnitude_overlap"] = unplaced.expected_low_magnitude_overlap(
            found, scale, before.settings.alpha
        )
    if "principal_overlap" in wanted:
        values["principal_overlap"] = unplaced.expected_overlap(
            before.principal_magnitudes, found, scale
        )
    return Expected(scale, origin, {name: values[name] for name in wanted})


def null_seed(seed: int, name: str, step: int) -> tuple[int, ...]:
    """Seed of the null of one matrix at one step: no two share their noise."""
    return seed, zlib.crc32(name.encode()), step

"""Weights before an update: real ones, synthetic ones, and what it takes to move them.

An entry changes in bf16 once a step carries it out of the cell of numbers that round to
its stored value. Along a fixed direction that happens at one size of the update, so
that every density has its scale, exactly and without a search.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opd_geometry.geometry import checkpoints, gram, hub, unplaced, updates
from opd_geometry.geometry.comparison import ANGLE_DIVISOR, PRINCIPAL_DIVISOR
from opd_geometry.geometry.spectra import default_rank, finite_matrix

ALPHA = 0.3  # of the paper's Figure 3; the rest of this book takes 0.5
SIDE_RANKS = (PRINCIPAL_DIVISOR, 32, 8)  # n / r of the principal mask
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
SPREAD = 0.02  # standard deviation of synthetic weights: that of a usual initialisation
HALF_CELL = 2**15  # half a bf16 step, in the bits of the float32 with that value


# The book's names of the laws that `geometry.unplaced` knows.
LAWS = {
    "Gaussian": "gaussian",
    "Laplace": "laplace",
    "Student t, 3": "t3",
    "uniform": "uniform",
}


def drawn(law: str, shape: Sequence[int], rng: np.random.Generator) -> Tensor:
    """Independent entries of mean 0 and variance 1: an update without any place.

    Args:
        law: a key of ``LAWS``.
        shape: of the update.
        rng: the same state gives the same entries.

    Returns:
        Float32 tensor.

    Raises:
        ValueError: unknown law.
    """
    if law not in LAWS:
        raise ValueError(f"unknown law {law!r}; expected {', '.join(LAWS)}")
    return unplaced.draw(tuple(shape), 1.0, rng, LAWS[law]).float()


# --- one matrix ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Origin:
    """One weight matrix before the update.

    Attributes:
        name, role, layer: as a checkpoint lists it.
        w: (n_rows, n_cols) float32; on the bf16 grid unless it was taken off it.
        alpha: share of the entries in either mask.
    """

    name: str
    role: str
    layer: int
    w: Tensor
    alpha: float = ALPHA

    @cached_property
    def cell(self) -> tuple[Tensor, Tensor]:
        """Distance of each |w| to the ends of its rounding cell: outwards, inwards.

        Half the spacing of bf16 on the grid, less on the side of a power of two; at
        zero the cell is symmetric.
        """
        size = self.w.abs()
        bits = self.w.bfloat16().float().abs().view(torch.int32)
        outer = (bits + HALF_CELL).view(torch.float32)
        inner = (bits - HALF_CELL).clamp_(min=0).view(torch.float32)
        inwards = torch.where(bits == 0, outer + size, size - inner)
        return (outer - size), inwards

    @cached_property
    def low(self) -> np.ndarray:
        """Low-magnitude mask, flat."""
        stored = self.w.bfloat16()
        return updates.low_magnitude_mask(stored, self.alpha).numpy().ravel()

    @cached_property
    def top(self) -> gram.Decomposition:
        """Spectrum and the top subspaces of the angles, as stored."""
        k = default_rank(self.w.shape, ANGLE_DIVISOR)
        return gram.decompose(self.w.bfloat16(), k)

    def principal(self, divisor: int = PRINCIPAL_DIVISOR) -> np.ndarray:
        """Principal mask of rank n / divisor, flat."""
        if divisor not in self._principal:
            rank, found = default_rank(self.w.shape, divisor), self.top
            mask = updates.reconstruction_mask(
                found.left[:, :rank],
                found.spectrum[:rank],
                found.right[:, :rank],
                self.alpha,
            )
            self._principal[divisor] = mask.numpy().ravel()
        return self._principal[divisor]

    @cached_property
    def _principal(self) -> dict[int, np.ndarray]:
        return {}

    @cached_property
    def whole(self) -> unplaced.Magnitudes:
        """Entries by magnitude."""
        return unplaced.magnitudes(self.w)

    @cached_property
    def inside(self) -> dict[int, unplaced.Magnitudes]:
        """Those of the principal mask by magnitude, by n / r."""
        masks = {divisor: self.principal(divisor) for divisor in SIDE_RANKS}
        return {
            divisor: unplaced.magnitudes(
                self.w, torch.from_numpy(mask).reshape(self.w.shape)
            )
            for divisor, mask in masks.items()
        }

    def critical(self, direction: Tensor) -> np.ndarray:
        """The scale at which each entry of ``w + scale * direction`` changes in bf16.

        Args:
            direction: (n_rows, n_cols).

        Returns:
            Flat float32, above 0; inf where the direction does not move the entry.
        """
        outwards, inwards = self.cell
        away = torch.where(direction * self.w.sign() >= 0, outwards, inwards)
        return (away / direction.abs()).numpy().ravel()


def scales_at(critical: np.ndarray, densities: Sequence[float]) -> list[float]:
    """The scales at which shares of the entries have changed.

    Args:
        critical: of ``Origin.critical``, of one matrix or of several together.
        densities: shares of the entries, each between 0 and 1.

    Returns:
        A scale a density: the smallest at which round(density * size) have changed.

    Raises:
        ValueError: a density outside (0, 1), or more entries asked for than can move.

    >>> scales_at(np.float32([3, 1, 2, np.inf]), [0.5, 0.75])
    [2.0, 3.0]
    """
    check_densities(densities)
    places = [max(1, round(d * critical.size)) - 1 for d in densities]
    found = [float(x) for x in np.partition(critical, places)[places]]
    if not np.isfinite(found).all():
        movable = np.isfinite(critical).mean()
        raise ValueError(
            f"density {max(densities):g} cannot be reached: the update moves only "
            f"{movable:.3g} of the entries; ask for less"
        )
    return found


def check_densities(densities: Iterable[float]) -> None:
    """Refuse a share that no update can have, or that has nothing to say.

    Raises:
        ValueError: one outside (0, 1), NaN included.
    """
    for density in densities:
        if not 0.0 < density < 1.0:
            raise ValueError(
                f"density {density!r}: expected more than 0 and less than 1; "
                "divide per cent by 100"
            )


def off_grid(origin: Origin, rng: np.random.Generator) -> Origin:
    """The same matrix with each entry anywhere in the cell of numbers that round to it.

    A float32 master copy looks like this where a stored checkpoint does not.

    Args:
        origin: on the grid.
        rng: of the places.
    """
    outwards, inwards = origin.cell
    place = torch.from_numpy(rng.random(tuple(origin.w.shape), dtype=np.float32))
    # a hair inside, so that no entry is rounded out of its cell
    size = origin.w.abs() + (place * 1.998 - 0.999).clamp(max=0) * inwards
    size += (place * 1.998 - 0.999).clamp(min=0) * outwards
    return Origin(
        origin.name, origin.role, origin.layer, size * origin.w.sign(), origin.alpha
    )


# --- sets of matrices ----------------------------------------------------------------

SYNTHETIC: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "Gaussian": lambda rng, size: rng.standard_normal(size),
    "Weibull, 0.8": lambda rng, size: _signed(rng, rng.weibull(0.8, size)),
    "Weibull, 1.5": lambda rng, size: _signed(rng, rng.weibull(1.5, size)),
    "Student t, 5": lambda rng, size: rng.standard_t(5, size),
    "Gaussian, 4 bits": lambda rng, size: _in_blocks(rng.standard_normal(size)),
}
# Two matrices of a small pretrained model's sizes: rows, columns.
LAYER = {"q": (1024, 640), "down": (640, 2048)}


def _signed(rng: np.random.Generator, sizes: np.ndarray) -> np.ndarray:
    return np.where(rng.random(sizes.shape) < 0.5, -sizes, sizes)


def _in_blocks(w: np.ndarray, block: int = 32, levels: int = 16) -> np.ndarray:
    """Rounded to 16 even levels between the extremes of each block of a row."""
    blocks = w.reshape(-1, block)
    low = blocks.min(axis=1, keepdims=True)
    step = (blocks.max(axis=1, keepdims=True) - low) / (levels - 1)
    return (np.round((blocks - low) / step) * step + low).reshape(w.shape)


def synthetic(
    kind: str,
    seed: int,
    shapes: dict[str, tuple[int, int]] | None = None,
    alpha: float = ALPHA,
) -> list[Origin]:
    """Matrices with independent entries, on the bf16 grid.

    Args:
        kind: a key of ``SYNTHETIC``: the law of the entries.
        seed: of the entries.
        shapes: role to (n_rows, n_cols); ``LAYER`` by default.
        alpha: share of the entries in either mask.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in SYNTHETIC:
        raise ValueError(f"unknown weights {kind!r}; expected {', '.join(SYNTHETIC)}")
    found = []
    # The middle number keeps them apart from updates: numpy seeds 0 and (0, 0) alike,
    # and an update in proportion to the weights changes none of them at first.
    for i, (role, shape) in enumerate((shapes or LAYER).items()):
        drawn = SYNTHETIC[kind](np.random.default_rng((seed, 101, i + 1)), shape)
        w = torch.from_numpy(drawn * (SPREAD / drawn.std())).bfloat16().float()
        found.append(Origin(f"{kind}.{role}", role, 0, w, alpha))
    return found


def stored(
    source: str | Path, layers: Sequence[int] | None = None, alpha: float = ALPHA
) -> list[Origin]:
    """The projections of a checkpoint, rounded to bf16.

    Args:
        source: a directory, a .safetensors file or a hub id.
        layers: which, counted from 0; all by default.
        alpha: share of the entries in either mask.

    Returns:
        Query, key, value, output, gate, up and down projections, in natural order.

    Raises:
        ValueError: no such checkpoint, none of these matrices in it, or NaN or inf.
    """
    path = hub.locate(source)
    listed = [m for m in checkpoints.list_matrices(path) if m.role in ROLES]
    wanted = [m for m in listed if layers is None or m.layer in layers]
    if not wanted:
        there = sorted({m.layer for m in listed})
        raise ValueError(
            f"{source} has no {', '.join(ROLES)} projection"
            + (
                f" in layers {list(layers or ())}; it has layers {there}"
                if there
                else "; expected a transformer language model's checkpoint"
            )
        )
    found = []
    for matrix in wanted:
        w = checkpoints.read_matrix(path, matrix.name)
        finite_matrix(w, matrix.name)
        w = w.bfloat16().float()
        found.append(Origin(matrix.name, matrix.role, matrix.layer, w, alpha))
    return found


def three_layers(source: str | Path, alpha: float = ALPHA) -> list[Origin]:
    """The projections of three layers: near the start, in the middle, near the end.

    Args:
        source: as in ``stored``.
        alpha: share of the entries in either mask.

    Raises:
        ValueError: as ``stored``.
    """
    listed = checkpoints.list_matrices(hub.locate(source))
    there = sorted({m.layer for m in listed if m.role in ROLES})
    n = len(there)
    chosen = (
        sorted({there[i] for i in (min(1, n - 1), (n - 1) // 2, max(0, n - 2))})
        if there
        else None
    )
    return stored(source, chosen, alpha)


def peculiar(origins: Iterable[Origin]) -> dict[str, float]:
    """What storage on a coarse grid leaves in weights: zeros and ties.

    Args:
        origins: a set of matrices.

    Returns:
        matrices, entries, ``zero_frac`` (entries that are exactly 0; any step changes
        them), ``distinct`` (mean number of different magnitudes a matrix).
    """
    sizes, zeros, distinct = [], 0, []
    for origin in origins:
        sizes.append(origin.w.numel())
        zeros += int((origin.w == 0).sum())
        distinct.append(torch.unique(origin.w.abs()).numel())
    return {
        "matrices": len(sizes),
        "entries": sum(sizes),
        "zero_frac": zeros / sum(sizes),
        "distinct": float(np.mean(distinct)),
    }


def sha256(source: str | Path) -> str:
    """Of a checkpoint's files in order of their names, as one number.

    Args:
        source: as in ``stored``.
    """
    digest = hashlib.sha256()
    for file in checkpoints.list_files(hub.locate(source)):
        with file.open("rb") as stream:
            while block := stream.read(2**24):
                digest.update(block)
    return digest.hexdigest()

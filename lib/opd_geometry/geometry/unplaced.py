"""What an update without any place of its own changes in bf16, in closed form.

An unplaced update adds to every entry of W_0 an independent draw of one symmetric law.
An entry w lies in the cell [a, b] of numbers that bf16 rounds to its value, half a step
wide on either side, and its bf16 value changes if w + d leaves that cell:

    P(w) = S((b - |w|) / s) + S((|w| - a) / s),   S(x) = P(D > x), s the scale of d

The step is 2^-7 of the power of two below |w|, and half as wide below a power of two as
above it. Everything the masks can show follows from P and the magnitudes of W_0, so a
matrix is counted once, by magnitude, and no update is drawn.

Exact for entries on the bf16 or fp16 grid. Others are taken as evenly spread within a
eighth of a bf16 step. An exact zero changes with any update that bf16 can hold: its
neighbours are 2^-133 away. An entry on the border of two cells changes with a chance of
at least one half. Overlaps and Jaccard are ratios of expected counts, which differ from
expected ratios by about one over the number of changed entries.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.optimize
import scipy.special
import torch
from torch import Tensor

from opd_geometry.geometry.bits import BITS, magnitudes_of, to_bfloat16
from opd_geometry.geometry.spectra import finite_float64

COUNTED_AT_A_TIME = 2**22  # entries
DROPPED = 13  # lower bits of a float32 that are not told apart; fp16 has none of them
SUBCELLS = 2 ** (16 - DROPPED)  # in a bf16 step
LARGEST = 0x7F7F_8000  # from this float32 on, bf16 rounds to infinity
ACCURACY = 1e-6  # of a density that was asked for; a law with jumps may miss it

Values = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Law:
    """A symmetric law of variance 1.

    Attributes:
        name: as `law_of` takes it.
        survival: S(x) = P(X > x), x >= 0.
        integral: the integral of S from 0 to x.
        draw: (generator, shape) to independent values.
    """

    name: str
    survival: Values
    integral: Values
    draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def law_of(law: str | Law) -> Law:
    """A law by its name.

    Args:
        law: ``gaussian``, ``laplace``, ``uniform``, ``sign`` (plus or minus one scale,
            as a first step of Adam) or ``tN``, Student's with N > 2 degrees of freedom,
            such as ``t3``; or a law.

    Raises:
        ValueError: another name.

    >>> float(law_of("laplace").survival(np.array(0.0)))
    0.5
    """
    if isinstance(law, Law):
        return law
    if law in _LAWS:
        return _LAWS[law]
    try:
        nu = float(law.removeprefix("t"))
    except ValueError:
        nu = 0.0
    if not law.startswith("t") or not 2.0 < nu < np.inf:
        raise ValueError(
            f"unknown law {law!r}, expected {', '.join(_LAWS)} or tN with N > 2 (its "
            "variance is infinite up to 2), such as t3"
        )
    return _student(law, nu)


def _gaussian_integral(x: np.ndarray) -> np.ndarray:
    with np.errstate(under="ignore", over="ignore"):
        bell = -np.expm1(-0.5 * x * x) / np.sqrt(2 * np.pi)
    return bell + _product(x, scipy.special.ndtr(-x))


def _uniform_integral(x: np.ndarray) -> np.ndarray:
    inside = np.minimum(x, ROOT_3)
    return inside / 2 - inside**2 / (4 * ROOT_3)


def _student(name: str, nu: float) -> Law:
    unit = np.sqrt(nu / (nu - 2))  # standard deviation of Student's own variable

    def integral(x: np.ndarray) -> np.ndarray:
        y = unit * x
        # int_0^y t f(t) dt, with f(y) (1 + y^2 / nu) = f(0) (1 + y^2 / nu)^(-(nu-1)/2)
        log_top = scipy.special.gammaln((nu + 1) / 2) - scipy.special.gammaln(nu / 2)
        top = np.exp(log_top) / np.sqrt(nu * np.pi)
        with np.errstate(over="ignore"):
            fall = -np.expm1(-(nu - 1) / 2 * np.log1p(y * y / nu))
        tail = _product(y, scipy.special.stdtr(nu, -y))
        return (tail + top * nu / (nu - 1) * fall) / unit

    return Law(
        name,
        lambda x: scipy.special.stdtr(nu, -unit * x),
        integral,
        lambda generator, shape: generator.standard_t(nu, shape) / unit,
    )


def _product(x: np.ndarray, tail: np.ndarray) -> np.ndarray:
    """X times its tail, 0 where the tail is."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(tail > 0.0, x * tail, 0.0)


ROOT_2, ROOT_3 = np.sqrt(2.0), np.sqrt(3.0)
# Those without a parameter.
_LAWS = {
    law.name: law
    for law in (
        Law(
            "gaussian",
            lambda x: scipy.special.ndtr(-x),
            _gaussian_integral,
            lambda generator, shape: generator.standard_normal(shape),
        ),
        Law(
            "laplace",
            lambda x: 0.5 * np.exp(-ROOT_2 * x),
            lambda x: -np.expm1(-ROOT_2 * x) / (2 * ROOT_2),
            lambda generator, shape: generator.laplace(scale=1 / ROOT_2, size=shape),
        ),
        Law(
            "uniform",
            lambda x: np.maximum(0.0, 0.5 * (1 - x / ROOT_3)),
            _uniform_integral,
            lambda generator, shape: generator.uniform(-ROOT_3, ROOT_3, shape),
        ),
        Law(
            "sign",
            lambda x: 0.5 * (x < 1.0),
            lambda x: 0.5 * np.minimum(x, 1.0),
            lambda generator, shape: generator.choice([-1.0, 1.0], shape),
        ),
    )
}


def draw(
    shape: tuple[int, ...],
    scale: float,
    generator: np.random.Generator,
    law: str | Law = "gaussian",
) -> Tensor:
    """An unplaced update: independent entries of one law.

    Args:
        shape: of the result.
        scale: standard deviation of an entry, in units of the weights.
        generator: the same state gives the same update.
        law: as `law_of`.

    Returns:
        Float64 tensor; add it to W_0.
    """
    return torch.from_numpy(scale * law_of(law).draw(generator, tuple(shape)))


# --- W_0 by magnitude --------------------------------------------------------------


@dataclass(frozen=True)
class Magnitudes:
    """How many entries of W_0 have which magnitude: all that a closed form asks of it.

    A key is twice the upper 19 bits of |w| as a float32, plus one where lower bits are
    set: an even key stands for one number, an odd one for the numbers up to the next.

    Attributes:
        keys: (K,) int64, ascending.
        counts: (K,) int64, or float64 where entries are shared out.
    """

    keys: np.ndarray
    counts: np.ndarray

    @property
    def n(self) -> int:
        """Entries."""
        return int(self.counts.sum())

    @property
    def n_zero(self) -> int:
        """Entries that are exactly zero."""
        return int(self.counts[self.keys == 0].sum())

    @property
    def n_on_border(self) -> int:
        """Entries half way between two bf16 numbers."""
        _, down, up = self.edges
        return int(self.counts[np.minimum(down, up) == 0.0].sum())

    @cached_property
    def edges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """How wide each key is, and how far at most down and up to its cell's end."""
        first = _float32((self.keys >> 1) << DROPPED)
        width = np.where(
            self.keys % 2, _float32(((self.keys >> 1) + 1) << DROPPED) - first, 0.0
        )
        low, high = _borders(_cell(self.keys))
        down, up = first + width - low, high - first
        return width, down, up


def _float32(bits: np.ndarray) -> np.ndarray:
    """Values in float64 of bits of non-negative float32 numbers."""
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def _cell(keys: np.ndarray) -> np.ndarray:
    """Magnitude bits of the bf16 numbers that keys round to, ties to even."""
    m = ((keys >> 1) << DROPPED) + (keys % 2)  # any number above the key's first one
    rounded: np.ndarray = (m + 0x7FFF + ((m >> 16) & 1)) >> 16
    return rounded


def _borders(cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The interval of magnitudes that bf16 rounds to a number; zero's is symmetric."""

    def value(m: np.ndarray) -> np.ndarray:
        finite = _float32(np.minimum(m, 0x7F7F) << 16)
        return np.where(m > 0x7F7F, 2.0**128, finite)

    here, above = value(cell), value(cell + 1)
    below = np.where(cell == 0, -above, value(np.maximum(cell - 1, 0)))
    return (here + below) / 2, (here + above) / 2


def magnitudes(w_before: Tensor, mask: Tensor | None = None) -> Magnitudes:
    """Count the entries of W_0 by magnitude.

    Args:
        w_before: any shape, any floating dtype.
        mask: boolean, the same shape: count only these.

    Raises:
        ValueError: NaN or inf, also where bf16 has none for a finite value; a mask of
            another shape or dtype, or without a True entry.
    """
    if w_before.dtype not in BITS or w_before.numel() == 0:
        finite_float64(w_before, "w_before")
    w = w_before.detach().to("cpu").reshape(-1)
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != w_before.shape:
            raise ValueError(
                f"mask has dtype {mask.dtype} and shape {tuple(mask.shape)}, expected "
                f"torch.bool and {tuple(w_before.shape)}"
            )
        w = w[mask.cpu().reshape(-1)]
        if w.numel() == 0:
            raise ValueError("mask is empty, expected at least one True entry")
    total = np.zeros(0, np.int64)
    for chunk in w.split(COUNTED_AT_A_TIME):
        found, largest = _count(chunk)
        if largest >= LARGEST:
            finite_float64(w_before, "w_before")  # these messages say what it is
            finite_float64(to_bfloat16(w_before), "w_before cast to bf16")
        if found.size > total.size:
            total = np.concatenate([total, np.zeros(found.size - total.size, np.int64)])
        total[: found.size] += found
    keys = np.flatnonzero(total)
    return Magnitudes(keys, total[keys])


def _count(chunk: Tensor) -> tuple[np.ndarray, int]:
    """Entries a key of some entries, and the bits of the largest as a float32."""
    if chunk.dtype == torch.bfloat16:
        bits = magnitudes_of(chunk.contiguous().view(torch.int16).numpy())
        cells = np.bincount(bits)
        found = np.zeros((cells.size - 1) * 2 * SUBCELLS + 1, np.int64)
        found[:: 2 * SUBCELLS] = cells
        return found, (cells.size - 1) << 16
    bits = magnitudes_of(chunk.float().contiguous().view(torch.int32).numpy())
    keys = (bits >> DROPPED << 1) + ((bits & (2**DROPPED - 1)) > 0)
    return np.bincount(keys), int(bits.max())


def tied_at_edge(found: Magnitudes, alpha: float = 0.5) -> int:
    """How many entries have the bf16 magnitude at which the low-magnitude mask ends.

    Args:
        found: of all entries.
        alpha: share of entries in the mask.
    """
    cells = np.bincount(_cell(found.keys), found.counts)
    last = int(np.searchsorted(np.cumsum(cells), max(1, round(alpha * found.n))))
    return int(cells[last])


def pooled(parts: Iterable[Magnitudes]) -> Magnitudes:
    """Several matrices as one, for an update with one scale over all of them."""
    parts = list(parts)
    every = np.concatenate([part.keys for part in parts])
    counts = np.concatenate([part.counts for part in parts])
    keys, place = np.unique(every, return_inverse=True)
    return Magnitudes(keys, np.bincount(place, counts).astype(counts.dtype))


# --- what an unplaced update changes ------------------------------------------------


def change_probability(
    w_before: Tensor, scale: float, law: str | Law = "gaussian"
) -> Tensor:
    """Chance of every entry that an unplaced update changes its bf16 value.

    P(w) = S((b - |w|) / s) + S((|w| - a) / s), [a, b] the numbers that bf16 rounds to
    the value of |w|

    Args:
        w_before: any shape, any floating dtype; taken as it is, on the grid or off it.
        scale: s, standard deviation of an entry of the update, above 0.
        law: as `law_of`.

    Returns:
        Float64 of the same shape, in [0, 1].

    Raises:
        ValueError: NaN or inf, a scale that is not above 0, or an unknown law.

    Source: ours; arXiv:2602.03839 has its limit for a step of one size, which is seen
        where it exceeds about |w| / 256.

    >>> w = torch.tensor([1.0, 0.0])
    >>> change_probability(w, 2.0**-8, "sign").tolist()  # below 1 the step is 2^-8
    [0.5, 1.0]
    """
    _check_scale(scale)
    down, up = (far.numpy() for far in room(w_before))
    survival = law_of(law).survival
    with np.errstate(over="ignore", under="ignore"):
        chance = survival(up / scale) + survival(down / scale)
    return torch.from_numpy(np.minimum(chance, 1.0))


def room(w_before: Tensor) -> tuple[Tensor, Tensor]:
    """How far |w| can move before its bf16 value changes.

    |w| - a and b - |w|, [a, b] the numbers that bf16 rounds to the value of |w|

    Args:
        w_before: any shape, any floating dtype.

    Returns:
        Down and up, float64 of the same shape, 0 and up.

    Raises:
        ValueError: NaN or inf, also where bf16 has none for a finite value.

    >>> [float(x) * 2**8 for x in room(torch.tensor(1.0))]
    [0.5, 1.0]
    """
    w = finite_float64(w_before, "w_before").abs()
    cast = finite_float64(to_bfloat16(w), "w_before cast to bf16").float()
    cells = cast.numpy().view(np.int32).astype(np.int64) >> 16
    low, high = (torch.as_tensor(end).reshape(w.shape) for end in _borders(cells))
    return (w - low).clamp_min(0.0), (high - w).clamp_min(0.0)


def chances(found: Magnitudes, scale: float, law: str | Law = "gaussian") -> np.ndarray:
    """`change_probability` of every key, averaged over the numbers it stands for.

    With G the integral of S, for the numbers from x to x + h:
    (s / h) [G((b - x) / s) - G((b - x - h) / s) + G((x + h - a) / s) - G((x - a) / s)]

    Args:
        found: of `magnitudes`.
        scale: standard deviation of an entry of the update, above 0.
        law: as `law_of`.

    Returns:
        (K,) in [0, 1].

    Raises:
        ValueError: a scale that is not above 0, or an unknown law.
    """
    _check_scale(scale)
    law = law_of(law)
    width, down, up = found.edges
    point = width == 0.0
    chance = np.empty(len(width))
    with np.errstate(over="ignore", under="ignore"):
        ways = (down / scale, up / scale)
        chance[point] = sum(law.survival(far[point]) for far in ways)
        h = width[~point] / scale
        chance[~point] = sum(
            (law.integral(far[~point]) - law.integral(np.maximum(far[~point] - h, 0.0)))
            / h
            for far in ways
        )
    return np.clip(chance, 0.0, 1.0)


def _check_scale(scale: float) -> None:
    if not 0.0 < scale < np.inf:
        raise ValueError(
            f"scale = {scale!r}, expected a finite number above 0: the standard "
            "deviation of an update's entries, its norm over the root of their number"
        )


def expected_density(
    found: Magnitudes, scale: float, law: str | Law = "gaussian"
) -> float:
    """Share of entries whose bf16 value an unplaced update changes, on average.

    sum_i P(w_i) / n

    Args:
        found, scale, law: as `chances`.

    Returns:
        In [0, 1].

    Source: ours; arXiv:2606.07082 Table 1 measures it.

    >>> w = torch.tensor([1.0, 1.0, 0.0, 0.0])
    >>> expected_density(magnitudes(w), 2.0**-8, "sign")
    0.75
    """
    return float(found.counts @ chances(found, scale, law)) / float(found.counts.sum())


def expected_sparsity(
    found: Magnitudes, scale: float, law: str | Law = "gaussian"
) -> float:
    """One minus `expected_density`."""
    return 1.0 - expected_density(found, scale, law)


def expected_overlap(
    inside: Magnitudes, found: Magnitudes, scale: float, law: str | Law = "gaussian"
) -> float:
    """Share of the changed entries that lie in a mask.

    sum_{i in mask} P(w_i) / sum_i P(w_i)

    Args:
        inside: of `magnitudes` with the mask, such as the principal one.
        found: of all entries.
        scale, law: as `chances`.

    Returns:
        In [0, 1]; NaN where no entry is expected to change.

    Source: ours; arXiv:2606.07082 Fig. 3 measures it.
    """
    part = float(inside.counts @ chances(inside, scale, law))
    whole = float(found.counts @ chances(found, scale, law))
    return part / whole if whole > 0.0 else float("nan")


def smallest(found: Magnitudes, alpha: float = 0.5) -> Magnitudes:
    """The round(alpha * n) entries with the smallest weights: the low-magnitude mask.

    Args:
        found: of all entries.
        alpha: share of entries, above 0 to 1.

    Raises:
        ValueError: alpha out of range.
    """
    if not 0.0 < alpha <= 1.0:
        raise ValueError(f"alpha = {alpha!r}, expected 0 < alpha <= 1; try 0.5")
    before = np.cumsum(found.counts) - found.counts
    return Magnitudes(
        found.keys, np.clip(round(alpha * found.n) - before, 0, found.counts)
    )


def expected_low_magnitude_overlap(
    found: Magnitudes, scale: float, alpha: float = 0.5, law: str | Law = "gaussian"
) -> float:
    """`expected_overlap` with the low-magnitude mask, exact ties included.

    Args:
        found, scale, law: as `chances`.
        alpha: share of entries in the mask.
    """
    return expected_overlap(smallest(found, alpha), found, scale, law)


def expected_jaccard(
    found: Magnitudes,
    scale: float,
    other_scale: float | None = None,
    law: str | Law = "gaussian",
    other_law: str | Law | None = None,
) -> float:
    """Jaccard overlap of the changes of two independent unplaced updates of one W_0.

    sum_i P_i Q_i / sum_i (P_i + Q_i - P_i Q_i)

    Args:
        found, scale, law: as `chances`, of the first.
        other_scale, other_law: of the second; None for the first one's.

    Returns:
        In [0, 1]; p / (2 - p) would be that of masks of density p which share nothing,
        not even W_0. NaN where no entry is expected to change.

    Source: ours; arXiv:2511.08567 measures it between runs.
    """
    other_scale = scale if other_scale is None else other_scale
    other_law = law if other_law is None else other_law
    p, q = chances(found, scale, law), chances(found, other_scale, other_law)
    # Within a key both rise towards the border of the cell, so their product's mean is
    # not the product of their means.
    both = np.zeros(len(p))
    for place, weight in _NODES:
        both += weight * (
            _chance_at(found, place, scale, law)
            * _chance_at(found, place, other_scale, other_law)
        )
    union = float(found.counts @ (p + q - both))
    return float(found.counts @ both) / union if union > 0.0 else float("nan")


def _chance_at(
    found: Magnitudes, place: float, scale: float, law: str | Law
) -> np.ndarray:
    """Chance of the number that lies so far up in every key, from 0 to 1."""
    width, down, up = found.edges
    survival = law_of(law).survival
    with np.errstate(over="ignore", under="ignore"):
        lower = survival((down - (1.0 - place) * width) / scale)
        chance: np.ndarray = lower + survival((up - place * width) / scale)
    return chance


def _nodes(n: int = 15, step: float = 0.2) -> list[tuple[float, float]]:
    """Places in [0, 1] and weights of a quadrature that is dense at both ends.

    Source: Takahasi and Mori (1974), tanh-sinh.
    """
    t = step * np.arange(-n, n + 1)
    inner = np.pi / 2 * np.sinh(t)
    weights = np.cosh(t) / np.cosh(inner) ** 2
    places = scipy.special.expit(2 * inner)
    return list(zip(places.tolist(), (weights / weights.sum()).tolist(), strict=True))


_NODES = _nodes()


def scale_at_density(
    found: Magnitudes, density: float, law: str | Law = "gaussian"
) -> float:
    """Scale of the unplaced update that changes so many entries on average.

    The inverse of `expected_density`, which grows with the scale.

    Args:
        found: of `magnitudes`.
        density: share of entries with another bf16 value, above 0 and below 1.
        law: as `law_of`.

    Returns:
        Standard deviation of an entry, in units of the weights.

    Raises:
        ValueError: density out of range, or out of reach: W_0 has more exact zeros, or
            the law jumps over it.
    """
    if not 0.0 < density < 1.0:
        raise ValueError(
            f"density = {density!r}, expected above 0 and below 1: the share of "
            "entries whose bf16 value changes, one minus the sparsity"
        )
    floor = (found.n_zero + 0.5 * found.n_on_border) / found.n
    if density <= floor:
        raise ValueError(
            f"density = {density!r}, expected above {floor:.6g}: {found.n_zero} of "
            f"{found.n} entries are exactly zero and {found.n_on_border} lie between "
            "two bf16 numbers, which the smallest update changes; leave this matrix out"
        )

    def excess(log_scale: float) -> float:
        return expected_density(found, float(np.exp2(log_scale)), law) - density

    low = high = float(np.log2(found.edges[2].max()))
    while excess(low) > 0.0:
        low -= 4.0
    while excess(high) < 0.0:
        high += 4.0
    root = scipy.optimize.brentq(excess, low, high, xtol=1e-10) if low < high else low
    scale = float(np.exp2(root))
    if abs(excess(root)) > ACCURACY:
        below, above = (
            expected_density(found, scale * (1 + side * 1e-9), law) for side in (-1, 1)
        )
        raise ValueError(
            f"density = {density!r}, expected one that the law {law_of(law).name} "
            f"reaches: it jumps from {below:.4f} to {above:.4f}; take a continuous law"
        )
    return scale

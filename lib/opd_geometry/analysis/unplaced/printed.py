"""What an update without any place prints, from one printed density an arm.

A density in, the other localisation numbers out: nothing else of a paper is used, and
nothing is trained. What is not printed (the update's shape, how matrices are averaged,
which matrices, the rank of the mask) is varied, and the range is the band.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import scipy.optimize
import torch
from torch import Tensor

from opd_geometry.analysis.unplaced import origins as og
from opd_geometry.analysis.unplaced.origins import Origin
from opd_geometry.geometry import gram, spectra
from opd_geometry.geometry import unplaced as closed

ARMS = ("sft", "opd", "rlvr")
MASKS = ("low_magnitude_overlap", "principal_overlap")
SPECTRAL = ("nss", "angle_mean_deg", "angle_max_deg")
PLAIN = "plain"  # every matrix at the printed density, means over matrices
ONE_SCALE = "one scale"  # one step size for all matrices, plain means
POOLED = "pooled"  # one step size, counts of all matrices together
BY_ROLE = "by role"  # densities apart as those of a real run, plain means
BY_ROLE_POOLED = "by role, pooled"
AVERAGES = (PLAIN, ONE_SCALE, POOLED, BY_ROLE, BY_ROLE_POOLED)


def shifted(densities: Mapping[str, float], target: float) -> dict[str, float]:
    """Densities apart as given, with a mean that is given.

    logit d_i' = logit d_i + c, mean(d') = target

    Args:
        densities: role to density, as of a real run.
        target: mean of the result.

    Raises:
        ValueError: a density outside (0, 1).

    >>> {k: round(v, 3) for k, v in shifted({"q": 0.2, "up": 0.5}, 0.5).items()}
    {'q': 0.333, 'up': 0.667}
    """
    og.check_densities([*densities.values(), target])
    logits = np.array([math.log(d / (1 - d)) for d in densities.values()])
    low, high = -40.0, 40.0
    for _ in range(100):
        middle = (low + high) / 2
        mean = float((1 / (1 + np.exp(-logits - middle))).mean())
        low, high = (middle, high) if mean < target else (low, middle)
    found = 1 / (1 + np.exp(-logits - low))
    return dict(zip(densities, map(float, found), strict=True))


# --- in closed form ------------------------------------------------------------------


def expected_rows(
    origins: Sequence[Origin],
    densities: Mapping[str, float],
    law: str,
    average: str = PLAIN,
    by_role: Mapping[str, Mapping[str, float]] | None = None,
    divisor: int = og.SIDE_RANKS[0],
) -> list[dict[str, object]]:
    """Both overlaps that an update without place has on average.

    Args:
        origins: the matrices.
        densities: arm to its printed density.
        law: a key of ``origins.LAWS``.
        average: one of ``AVERAGES``.
        by_role: arm to role to density of a real run, where the average asks for it.
        divisor: n / r of the principal mask.

    Returns:
        Rows: arm, metric, value.

    Raises:
        ValueError: a density outside (0, 1), or an unknown average.
    """
    og.check_densities(densities.values())
    if average not in AVERAGES:
        raise ValueError(f"unknown average {average!r}; expected {', '.join(AVERAGES)}")
    rows: list[dict[str, object]] = []
    for arm, density in densities.items():
        scales = _scales(origins, density, law, average, (by_role or {}).get(arm, {}))
        found = _overlaps(
            origins, scales, law, average in (POOLED, BY_ROLE_POOLED), divisor
        )
        rows += [{"arm": arm, "metric": m, "value": v} for m, v in found.items()]
    return rows


def _scales(
    origins: Sequence[Origin],
    density: float,
    law: str,
    average: str,
    by_role: Mapping[str, float],
) -> list[float]:
    """A scale a matrix."""
    wholes, name = [origin.whole for origin in origins], og.LAWS[law]
    if average == POOLED:
        scale = closed.scale_at_density(closed.pooled(wholes), density, name)
        return [scale] * len(wholes)
    if average == ONE_SCALE:
        return [one_scale(wholes, density, law)] * len(wholes)
    own = [density if average == PLAIN else by_role[origin.role] for origin in origins]
    return [
        closed.scale_at_density(whole, d, name)
        for whole, d in zip(wholes, own, strict=True)
    ]


def one_scale(wholes: Sequence[closed.Magnitudes], density: float, law: str) -> float:
    """The step size of all matrices at which their plain mean density is as given.

    Args:
        wholes: of the matrices.
        density: mean over matrices.
        law: a key of ``origins.LAWS``.
    """
    name = og.LAWS[law]

    def excess(log_scale: float) -> float:
        scale = math.exp(log_scale)
        each = [closed.expected_density(w, scale, name) for w in wholes]
        return float(np.mean(each)) - density

    ends = [math.log(closed.scale_at_density(w, density, name)) for w in wholes]
    low, high = min(ends) - 1e-6, max(ends) + 1e-6
    return math.exp(scipy.optimize.brentq(excess, low, high, xtol=1e-9))


def _overlaps(
    origins: Sequence[Origin],
    scales: Sequence[float],
    law: str,
    pooled: bool,
    divisor: int,
) -> dict[str, float]:
    """Both overlaps: means over matrices, or of all entries together."""
    counts = []
    for origin, scale in zip(origins, scales, strict=True):
        whole, inside = origin.whole, origin.inside[divisor]
        parts = (whole, closed.smallest(whole, origin.alpha), inside)
        counts.append(
            [float(p.counts @ closed.chances(p, scale, og.LAWS[law])) for p in parts]
        )
    table = np.array(counts)
    if pooled:
        table = table.sum(axis=0, keepdims=True)
    shares = (table[:, 1:] / table[:, :1]).mean(axis=0)
    return dict(zip(MASKS, map(float, shares), strict=True))


# --- drawn ---------------------------------------------------------------------------


class Draw:
    """One update on a set of matrices, at any density.

    Args:
        origins: the matrices.
        directions: an update of each, of any size.
    """

    def __init__(self, origins: Sequence[Origin], directions: Sequence[Tensor]) -> None:
        self.origins, self.directions = list(origins), list(directions)
        self.critical = [
            origin.critical(d)
            for origin, d in zip(self.origins, self.directions, strict=True)
        ]

    def scales(self, densities: Sequence[float]) -> list[list[float]]:
        """A scale a matrix for each density.

        Args:
            densities: of every matrix.

        Returns:
            A list a matrix.
        """
        return [og.scales_at(critical, densities) for critical in self.critical]

    def overlaps(self, scales: Sequence[float]) -> dict[str, float]:
        """Density and both mask overlaps, means over matrices.

        Args:
            scales: one a matrix.
        """
        rows = []
        for origin, critical, scale in zip(
            self.origins, self.critical, scales, strict=True
        ):
            changed = critical <= scale
            n_changed = np.count_nonzero(changed)
            inside = [
                np.count_nonzero(changed & mask) / n_changed
                for mask in (origin.low, origin.principal())
            ]
            rows.append([n_changed / changed.size, *inside])
        means = np.mean(rows, axis=0)
        return dict(zip(("density", *MASKS), map(float, means), strict=True))

    def after(self, place: int, scale: float) -> Tensor:
        """One matrix after the update, as bf16 stores it."""
        origin = self.origins[place]
        return (origin.w + scale * self.directions[place]).bfloat16()


def without_place(origins: Sequence[Origin], law: str, seed: int) -> Draw:
    """An update of independent entries on every matrix.

    Args:
        origins: the matrices.
        law: a key of ``origins.LAWS``.
        seed: of the entries.
    """
    rng = np.random.default_rng((seed, 7))
    return Draw(origins, [og.drawn(law, origin.w.shape, rng) for origin in origins])


def spectral(origin: Origin, after: Tensor) -> dict[str, float]:
    """How far the spectrum moved and the top n / 8 subspaces turned.

    Args:
        origin: before.
        after: (n_rows, n_cols), later.

    Returns:
        nss, angle_mean_deg (over both sides), angle_max_deg (the larger side's).
    """
    old = origin.top
    new = gram.decompose(after, old.left.shape[1])
    angles = torch.cat(
        [
            spectra.angles_between_deg(old.left, new.left),
            spectra.angles_between_deg(old.right, new.right),
        ]
    )
    shift = spectra.normalised_spectral_shift(old.spectrum, new.spectrum)
    ends = shift, float(angles.mean()), float(angles.max())
    return dict(zip(SPECTRAL, ends, strict=True))


def mask_rows(draw: Draw, densities: Mapping[str, float]) -> list[dict[str, object]]:
    """Both overlaps of one draw, every matrix at the printed density.

    Args:
        draw: an update.
        densities: arm to its printed density.

    Returns:
        Rows: arm, metric, value (mean over matrices).
    """
    per_matrix = draw.scales(list(densities.values()))
    rows: list[dict[str, object]] = []
    for i, arm in enumerate(densities):
        found = draw.overlaps([own[i] for own in per_matrix])
        rows += [{"arm": arm, "metric": m, "value": v} for m, v in found.items()]
    return rows


def spectral_rows(
    draw: Draw, densities: Mapping[str, float]
) -> list[dict[str, object]]:
    """Spectral shift and angles of one draw, a row a matrix.

    Args:
        draw: an update.
        densities: arm to its printed density, that of every matrix.

    Returns:
        Rows: arm, matrix, metric, value.
    """
    per_matrix = draw.scales(list(densities.values()))
    rows: list[dict[str, object]] = []
    for place, (origin, own) in enumerate(zip(draw.origins, per_matrix, strict=True)):
        for arm, scale in zip(densities, own, strict=True):
            found = spectral(origin, draw.after(place, scale))
            # in units of the weights' own spread
            found["relative_scale"] = scale / float(origin.w.double().std())
            rows += [
                {"arm": arm, "matrix": origin.name, "metric": metric, "value": value}
                for metric, value in found.items()
            ]
    return rows


# --- two updates on one start --------------------------------------------------------


def independent_jaccard(densities: Sequence[float]) -> float:
    """Jaccard index of masks at independent places, mean over pairs.

    J = p q / (p + q - p q); p / (2 - p) where both densities are p

    Args:
        densities: two or more, each between 0 and 1.

    Raises:
        ValueError: a density outside (0, 1).

    >>> round(independent_jaccard([0.5, 0.5]), 4)
    0.3333
    """
    og.check_densities(densities)
    pairs = itertools.combinations(densities, 2)
    return float(np.mean([p * q / (p + q - p * q) for p, q in pairs]))


def density_of_jaccard(jaccard: float) -> float:
    """The density at which independent masks overlap so much.

    p = 2 J / (1 + J)

    Args:
        jaccard: between 0 and 1.

    >>> round(density_of_jaccard(1 / 3), 4)
    0.5
    """
    og.check_densities([jaccard])
    return 2 * jaccard / (1 + jaccard)


def apart(shape: Sequence[float], jaccard: float) -> list[float]:
    """Densities as unlike as given whose independent masks overlap so much.

    Args:
        shape: densities of real runs; their logits are shifted together.
        jaccard: mean over pairs of ``independent_jaccard``.

    Returns:
        As many densities.

    >>> found = apart([0.4, 0.6], 0.4)
    >>> round(independent_jaccard(found), 6), found[0] < found[1]
    (0.4, True)
    """
    names = {str(i): d for i, d in enumerate(shape)}
    low, high = 1e-6, 1 - 1e-6
    for _ in range(60):
        middle = (low + high) / 2
        found = list(shifted(names, middle).values())
        short = independent_jaccard(found) < jaccard
        low, high = (middle, high) if short else (low, middle)
    return found


def agreement(origins: Sequence[Origin], law: str, densities: Sequence[float]) -> float:
    """Expected Jaccard index of the masks of independent updates on one start.

    Mean over matrices and over pairs of updates.

    Args:
        origins: the matrices.
        law: a key of ``origins.LAWS``.
        densities: one an update, that of every matrix.

    Returns:
        From 0 to 1; above ``independent_jaccard``, since all updates change small
        weights first.
    """
    found = []
    for origin in origins:
        whole = origin.whole
        scales = {
            d: closed.scale_at_density(whole, d, og.LAWS[law]) for d in set(densities)
        }
        found += [
            closed.expected_jaccard(whole, scales[p], scales[q], og.LAWS[law])
            for p, q in itertools.combinations(densities, 2)
        ]
    return float(np.mean(found))


def shared_gain(
    origins: Sequence[Origin], density: float, log_sd: float, seed: int, side: str
) -> float:
    """Agreement of two updates whose rows, or columns, share their gains.

    Args:
        origins: the matrices.
        density: of both.
        log_sd: standard deviation of the logarithm of the gains.
        seed: of gains and updates.
        side: ``rows`` or ``columns``.
    """
    found = []
    for i, origin in enumerate(origins):
        rng = np.random.default_rng((seed, 7, i + 1))
        n_rows, n_cols = origin.w.shape
        size = (n_rows, 1) if side == "rows" else (1, n_cols)
        gain = torch.from_numpy(np.exp(log_sd * rng.standard_normal(size))).float()
        a, b = (
            critical <= og.scales_at(critical, [density])[0]
            for critical in (
                origin.critical(gain * og.drawn("Gaussian", origin.w.shape, rng))
                for _ in range(2)
            )
        )
        found.append(np.count_nonzero(a & b) / np.count_nonzero(a | b))
    return float(np.mean(found))


def summarised(rows: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Mean, smallest and largest value of each group, and how many draws.

    Args:
        rows: with the keys and ``value``.
        keys: columns that name a group.
    """
    found = rows.groupby(list(keys), sort=False)["value"]
    return found.agg(mean="mean", low="min", high="max", draws="size").reset_index()

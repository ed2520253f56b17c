"""What a placed update would have shown: how far each diagnostic moves, and from where.

Each family of updates has a strength and a neutral strength, at which it has no place.
All are brought to one density, so that what moves is due to the place alone.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from opd_geometry.analysis.evidence import (
    LAYERS,
    Table,
    first,
    last,
    levels_of,
    over_matrices,
)
from opd_geometry.analysis.unplaced import origins as og
from opd_geometry.analysis.unplaced import printed as pr
from opd_geometry.analysis.unplaced.origins import Origin
from opd_geometry.analysis.verdicts import interval
from opd_geometry.experiments.shelf import committed_csv
from opd_geometry.files import on_shelf
from opd_geometry.geometry import comparison, gram
from opd_geometry.geometry.spectra import default_rank

LOW_RANK = 32  # n / rank of a low-rank update: 20 of 640
CORE = 64  # n / r of the top subspaces
BOTTOM = 8  # n / k of the bottom subspaces
TENTH = 0.1


def _sized(origin: Origin, z: Tensor, b: float, _: np.random.Generator) -> Tensor:
    size = origin.w.abs()
    # zeros change at any step: they move as the smallest others do, whatever the power
    return z * size.clamp(min=float(size[size > 0].min())) ** b


def _large(origin: Origin, z: Tensor, gain: float, _: np.random.Generator) -> Tensor:
    count = round(origin.alpha * origin.w.numel())
    bound = torch.topk(origin.w.abs().ravel(), count).values[-1]
    return torch.where(origin.w.abs() >= bound, gain * z, z)


def _small(origin: Origin, z: Tensor, gain: float, _: np.random.Generator) -> Tensor:
    mask = torch.from_numpy(origin.low).reshape(z.shape)
    return torch.where(mask, gain * z, z)


def _principal(
    origin: Origin, z: Tensor, gain: float, _: np.random.Generator
) -> Tensor:
    mask = torch.from_numpy(origin.principal()).reshape(z.shape)
    return torch.where(mask, gain * z, z)


def _rows(_: Origin, z: Tensor, gain: float, rng: np.random.Generator) -> Tensor:
    return z * _gains(z.shape[0], gain, rng)[:, None]


def _columns(_: Origin, z: Tensor, gain: float, rng: np.random.Generator) -> Tensor:
    return z * _gains(z.shape[1], gain, rng)[None, :]


def _gains(n: int, gain: float, rng: np.random.Generator) -> Tensor:
    gains = torch.ones(n)
    gains[torch.from_numpy(rng.permutation(n)[: round(TENTH * n)])] = gain
    return gains


def _mixed(z: Tensor, placed: Tensor, share: float) -> Tensor:
    """Energies in the shares asked for."""
    unit = placed / placed.double().square().mean().sqrt()
    mixed: Tensor = (math.sqrt(1 - share) * z + math.sqrt(share) * unit).float()
    return mixed


def _low_rank(_: Origin, z: Tensor, share: float, rng: np.random.Generator) -> Tensor:
    rank = default_rank(z.shape, LOW_RANK)
    left, right = (torch.from_numpy(rng.standard_normal((n, rank))) for n in z.shape)
    return _mixed(z, left @ right.T, share)


def _core(origin: Origin, z: Tensor, share: float, _: np.random.Generator) -> Tensor:
    r, top = default_rank(z.shape, CORE), origin.top
    u, v = top.left[:, :r], top.right[:, :r]
    return _mixed(z, u @ (u.T @ z.double() @ v) @ v.T, share)


def _bottom(origin: Origin, z: Tensor, share: float, _: np.random.Generator) -> Tensor:
    n = min(z.shape)
    k, whole = default_rank(z.shape, BOTTOM), gram.decompose(origin.w, n)
    u, v = whole.left[:, n - k :], whole.right[:, n - k :]
    return _mixed(z, u @ (u.T @ z.double() @ v) @ v.T, share)


def _rotation(
    origin: Origin, z: Tensor, share: float, rng: np.random.Generator
) -> Tensor:
    """A W - W B with antisymmetric A and B: to first order no singular value moves."""
    w = origin.w
    left, right = (
        torch.from_numpy(rng.standard_normal((n, n), dtype=np.float32)) for n in w.shape
    )
    return _mixed(z, (left - left.T) @ w + w @ (right - right.T), share)


class Family(NamedTuple):
    """Updates with one kind of place.

    Attributes:
        words: what it is, in a table.
        neutral: the strength without place.
        strengths: those that are computed, ascending.
        unit: of the strength.
        move: (origin, unplaced update, strength, generator) to placed update.
    """

    words: str
    neutral: float
    strengths: Sequence[float]
    unit: str
    move: Callable[[Origin, Tensor, float, np.random.Generator], Tensor]


GAINS = (0.33, 0.5, 0.8, 0.9, 1.1, 1.25, 2.0, 3.0)
LINES = (0.1, 0.33, 3.0, 10.0)
SHARES = (0.1, 0.2, 0.5, 1.0)
GAIN, POWER, SHARE = "gain", "exponent of |w|", "share of energy"
FAMILIES = {
    "size": Family(
        "entry by entry, as |w| to a power",
        0.0,
        (-0.2, -0.1, 0.1, 0.2, 0.5, 1.0),
        POWER,
        _sized,
    ),
    "large": Family("the largest 30 % of the weights", 1.0, GAINS, GAIN, _large),
    "small": Family("the smallest 30 % of the weights", 1.0, GAINS, GAIN, _small),
    "principal": Family("principal entries", 1.0, GAINS, GAIN, _principal),
    "rows": Family("a random tenth of the rows", 1.0, LINES, GAIN, _rows),
    "columns": Family("a random tenth of the columns", 1.0, LINES, GAIN, _columns),
    "low rank": Family(
        "random directions, n/32 of them", 0.0, SHARES, SHARE, _low_rank
    ),
    "core": Family(
        "inside the top n/64 subspaces of W₀", 0.0, (0.02, 0.05, *SHARES), SHARE, _core
    ),
    "bottom": Family("inside the bottom n/8 subspaces", 0.0, SHARES, SHARE, _bottom),
    "rotation": Family("rotations, spectrum kept", 0.0, SHARES, SHARE, _rotation),
}


def placed(
    origins: Sequence[Origin], family: str, strength: float, seed: int
) -> pr.Draw:
    """An update with a place on every matrix.

    The unplaced part is the same for every family and strength of one seed.

    Args:
        origins: the matrices.
        family: a key of ``FAMILIES``.
        strength: in the family's unit.
        seed: of the entries.

    Raises:
        ValueError: unknown family, or a strength it does not have.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown place {family!r}; expected {', '.join(FAMILIES)}")
    chosen = FAMILIES[family]
    if chosen.unit == SHARE and not 0.0 <= strength <= 1.0:
        raise ValueError(f"share of energy {strength!r}: expected 0 to 1")
    if chosen.unit == GAIN and not strength > 0.0:
        raise ValueError(f"gain {strength!r}: expected more than 0")
    base = np.random.default_rng((seed, 7))
    directions = []
    for i, origin in enumerate(origins):
        z = og.drawn("Gaussian", origin.w.shape, base)
        own = np.random.default_rng((seed, 8, i))
        directions.append(chosen.move(origin, z, strength, own))
    return pr.Draw(origins, directions)


def grid(families: Iterable[str] = FAMILIES) -> list[tuple[str, float]]:
    """Every family with every strength, the neutral ones left out."""
    return [(name, s) for name in families for s in FAMILIES[name].strengths]


def _draws(
    origins: Sequence[Origin], cells: Iterable[tuple[str, float]], seeds: Sequence[int]
) -> Iterator[tuple[str, float, int, pr.Draw]]:
    """Every cell and seed with its draw; of the family ``none`` one without place."""
    for (family, strength), seed in itertools.product(cells, seeds):
        if family == "none":
            draw = pr.without_place(origins, "Gaussian", seed)
        else:
            draw = placed(origins, family, strength, seed)
        yield family, strength, seed, draw


def placed_rows(
    origins: Sequence[Origin],
    densities: Mapping[str, float],
    spectral_arms: Sequence[str],
    seeds: Sequence[int],
    cells: Iterable[tuple[str, float]],
) -> pd.DataFrame:
    """Every diagnostic of placed updates.

    Args:
        origins: the matrices.
        densities: arm to density, that of every matrix.
        spectral_arms: for which spectra are computed as well.
        seeds: of the draws.
        cells: of ``grid``; ``("none", 0)`` for no place.

    Returns:
        family, strength, seed, arm, metric, value (mean over matrices).
    """
    rows: list[dict[str, object]] = []
    for family, strength, seed, draw in _draws(origins, cells, seeds):
        keys = {"family": family, "strength": strength, "seed": seed}
        found = pr.mask_rows(draw, densities)
        wanted = {arm: densities[arm] for arm in spectral_arms}
        if wanted:
            turned = pd.DataFrame(pr.spectral_rows(draw, wanted))
            means = turned.groupby(["arm", "metric"])["value"].mean().reset_index()
            found += means.to_dict("records")
        rows += [
            {**keys, **{k: row[k] for k in ("arm", "metric", "value")}} for row in found
        ]
    return pd.DataFrame(rows)


# --- limits --------------------------------------------------------------------------


def on_axis(unit: str, strength: float) -> float:
    """Where a strength lies on an axis on which diagnostics move about evenly."""
    return math.log(strength) if unit == GAIN else strength


def from_axis(unit: str, place: float) -> float:
    """The inverse of ``on_axis``."""
    return math.exp(place) if unit == GAIN else place


def crossing(
    family: str, curve: Mapping[float, float], half: float, upwards: bool
) -> float:
    """The weakest strength at which a diagnostic has moved by more than its band.

    Between computed strengths it is interpolated.

    Args:
        family: a key of ``FAMILIES``.
        curve: strength to shift of the diagnostic from no place.
        half: half the width of the band.
        upwards: look above the neutral strength, or below it.

    Returns:
        The strength; NaN if none of those computed is enough.

    >>> crossing("core", {0.1: 0.5, 1.0: 5.0}, half=1.0, upwards=True)
    0.2
    """
    chosen = FAMILIES[family]
    side = sorted(
        (s for s in curve if (s > chosen.neutral) == upwards),
        key=lambda s: abs(
            on_axis(chosen.unit, s) - on_axis(chosen.unit, chosen.neutral)
        ),
    )
    at, moved = on_axis(chosen.unit, chosen.neutral), 0.0
    for strength in side:
        here, shift = on_axis(chosen.unit, strength), abs(curve[strength])
        if shift > half:
            share = (half - moved) / (shift - moved) if shift > moved else 1.0
            return round(from_axis(chosen.unit, at + share * (here - at)), 4)
        at, moved = here, shift
    return float("nan")


def shifts(table: pd.DataFrame) -> pd.Series:
    """How far each place moves each diagnostic from the same draw without it.

    Args:
        table: of ``placed_rows`` or ``own_rows``, with rows of family ``none``.

    Returns:
        Indexed by arm, metric, family, strength: means over draws.
    """
    keys = ["arm", "metric", "seed"]
    none = table[table["family"] == "none"].set_index(keys)["value"]
    rows = table[table["family"] != "none"]
    before = none.reindex(pd.MultiIndex.from_frame(rows[keys])).to_numpy()
    moved = rows.assign(value=rows["value"] - before)
    return moved.groupby(["arm", "metric", "family", "strength"])["value"].mean()


def limits(
    table: pd.DataFrame, bands: Mapping[tuple[str, str], tuple[float, float]]
) -> pd.DataFrame:
    """The smallest strength that each diagnostic would have shown.

    Args:
        table: of ``placed_rows`` or ``own_rows``, with rows of family ``none``.
        bands: (arm, metric) to the ends of what an update without place gives.

    Returns:
        family, arm, metric, unit, ``below``, ``above`` (the nearest strengths to either
        side of the neutral one at which the mean leaves the band; NaN: not within the
        strengths that were computed), ``half`` (half the band).
    """
    moved, rows = shifts(table), []
    for (arm, metric), (low, high) in bands.items():
        for family, chosen in FAMILIES.items():
            if (arm, metric, family) not in moved.index:
                continue
            curve = moved[arm, metric, family].dropna().to_dict()
            half = (high - low) / 2
            ends = (crossing(family, curve, half, up) for up in (False, True))
            rows.append((family, arm, metric, chosen.unit, *ends, half))
    columns = ["family", "arm", "metric", "unit", "below", "above", "half"]
    return pd.DataFrame(rows, columns=columns)


def allowed(
    table: pd.DataFrame,
    bands: Mapping[tuple[str, str], tuple[float, float]],
    values: Mapping[tuple[str, str], float],
    steps: int = 400,
) -> pd.DataFrame:
    """Which strengths a printed number leaves possible.

    A strength stays if the number lies within the band, moved by as much as the place
    moves the mean.

    Args:
        table: as in ``limits``.
        bands: as in ``limits``.
        values: (arm, metric) to the printed number.
        steps: of the interpolated axis.

    Returns:
        family, arm, metric, unit, ``low``, ``high`` (ends of the strengths that stay;
        NaN where none does), ``least``, ``most`` (the strengths computed).
    """
    moves, rows = shifts(table), []
    for (arm, metric), value in values.items():
        low, high = bands[arm, metric]
        for family, chosen in FAMILIES.items():
            curve = moves[arm, metric, family].dropna().to_dict()
            curve[chosen.neutral] = 0.0
            known = sorted(curve)
            axis = [on_axis(chosen.unit, s) for s in known]
            fine = np.linspace(axis[0], axis[-1], steps + 1)
            moved = np.interp(fine, axis, [curve[s] for s in known])
            stays = fine[(low <= value - moved) & (value - moved <= high)]
            ends = (stays[0], stays[-1]) if stays.size else (np.nan, np.nan)
            left = (from_axis(chosen.unit, float(end)) for end in ends)
            what = (family, arm, metric, chosen.unit)
            rows.append((*what, *left, known[0], known[-1]))
    columns = ["family", "arm", "metric", "unit", "low", "high", "least", "most"]
    return pd.DataFrame(rows, columns=columns)


def together(rows: pd.DataFrame) -> pd.DataFrame:
    """What all printed numbers of an arm leave possible at once.

    Args:
        rows: of ``allowed``, several metrics an arm.

    Returns:
        family, arm, unit, low, high, least, most; NaN where nothing is left.
    """
    by = rows.groupby(["family", "arm", "unit"], sort=False)
    found = by.agg(
        low=("low", "max"),
        high=("high", "min"),
        least=("least", "first"),
        most=("most", "first"),
        known=("low", "count"),
        metrics=("metric", "size"),
    ).reset_index()
    none = (found["low"] > found["high"]) | (found["known"] < found["metrics"])
    found.loc[none, ["low", "high"]] = np.nan
    return found.drop(columns=["known", "metrics"])


# --- this book's own diagnostics -----------------------------------------------------

OWN_METRICS = tuple(
    n for n in comparison.NULL_METRICS if n not in ("sparsity", "density")
)


def own_rows(
    origins: Sequence[Origin],
    density: float,
    seeds: Sequence[int],
    cells: Iterable[tuple[str, float]],
) -> pd.DataFrame:
    """This book's diagnostics of placed updates of one density.

    Args:
        origins: the matrices.
        density: of every matrix.
        seeds: of the draws.
        cells: as in ``placed_rows``.

    Returns:
        family, strength, seed, arm (``opd``), metric, value (mean over matrices).
    """
    before = [
        comparison.reference(o.w.bfloat16(), comparison.Settings(alpha=o.alpha))
        for o in origins
    ]
    rows: list[dict[str, object]] = []
    for family, strength, seed, draw in _draws(origins, cells, seeds):
        scales = draw.scales([density])
        found = pd.DataFrame(
            comparison.compare(start, origin.w + own[0] * direction, OWN_METRICS)
            for start, origin, own, direction in zip(
                before, origins, scales, draw.directions, strict=True
            )
        ).mean()
        keys = {"family": family, "strength": strength, "seed": seed, "arm": "opd"}
        rows += [{**keys, "metric": m, "value": v} for m, v in found.items()]
    return pd.DataFrame(rows)


def draws_bands(table: pd.DataFrame) -> dict[tuple[str, str], tuple[float, float]]:
    """Smallest and largest value over draws without place.

    Args:
        table: as in ``limits``.

    Returns:
        (arm, metric) to the band.
    """
    none = table[table["family"] == "none"].groupby(["arm", "metric"])["value"]
    return {key: (float(v.min()), float(v.max())) for key, v in none}


def detection_limit(metric: str, units: Iterable[str] = (POWER, GAIN, SHARE)) -> str:
    """What a diagnostic of this book would show at its student, in words for a caption.

    From ``data/unplaced/own_limits.csv``: at OPD's density, over the draws of an update
    without place.

    Args:
        metric: one of ``OWN_METRICS``.
        units: of strength.

    Returns:
        The family of each unit that it would show earliest.

    Raises:
        ValueError: a metric without a limit; the message lists those that have one.
    """
    table = own_limits()
    known = sorted(table["metric"].unique())
    if metric not in known:
        raise ValueError(
            f"no detection limit of {metric!r}; expected {', '.join(known)}"
        )
    rows = table[(table["metric"] == metric) & table["above"].notna()]
    said = []
    for unit, of_unit in rows[rows["unit"].isin([*units])].groupby("unit", sort=False):
        first = of_unit.loc[of_unit["above"].idxmin()]
        words = FAMILIES[first["family"]].words
        said.append(
            f"{first['above']:.1%} of the energy {words}".replace(
                "%", "\N{NO-BREAK SPACE}%"
            )
            if unit == SHARE
            else f"a gain of {first['above']:.2f} on {words}"
            if unit == GAIN
            else f"steps as |w| to the power of {first['above']:.2f}"
        )
    return " or ".join(said) or "none of the places tried"


def own_limits() -> pd.DataFrame:
    """The committed table of ``unplaced.own_limits_table``."""
    return committed_csv(on_shelf("unplaced/own_limits.csv"))


# Compared as differences; all other metrics as ratios.
AS_DIFFERENCES = ("sparsity", "density", "overlap", "similarity", "accuracy", "leak")


def difference_limit(
    table: Table, arms: Iterable[str], metric: str, roles: tuple[str, ...] = LAYERS
) -> tuple[float, int]:
    """The smallest difference between two arms' ends that their seeds would show.

    Half of the 95 % interval of the difference, paired by seed; the widest pair's. Of
    similarities with the end, which are one there, at the first checkpoints.

    Args:
        table: tidy, or its levels.
        arms: all pairs of them; those without such rows are left out.
        metric: of matrices, or of the model.
        roles: of the matrices averaged over.

    Returns:
        The limit (of the difference; of logarithms for what is compared as a ratio),
        and the seeds of the pair that has fewest; NaN with fewer than two seeds.
    """
    levels, wanted = levels_of(table), (*roles, "model")
    moment = first if metric.startswith("similarity_to_end") else last
    ends = [moment(over_matrices(levels, arm, metric, wanted)) for arm in arms]
    ends = [values.dropna() for values in ends if len(values.dropna())]
    if not any(word in metric for word in AS_DIFFERENCES):
        ends = [np.log(values) for values in ends]
    gaps = [(b - a).dropna() for a, b in itertools.combinations(ends, 2)]
    widths = [high - mean for mean, _, high in map(interval, gaps)]
    if not widths or np.isnan(widths).all():
        return float("nan"), min(map(len, gaps), default=0)
    return float(np.nanmax(widths)), min(map(len, gaps))

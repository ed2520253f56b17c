"""Do printed numbers fit together? What they allow, what one seed would have said.

Pure arithmetic on ``data/paper`` and on tidy tables.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from opd_geometry.analysis import evidence as ev
from opd_geometry.analysis.claims import check_table, missing
from opd_geometry.analysis.statements import CLAIMS
from opd_geometry.analysis.verdicts import Part, interval
from opd_geometry.experiments.profiles import build
from opd_geometry.experiments.shelf import committed_csv
from opd_geometry.files import on_shelf
from opd_geometry.geometry.defaults import MASK_ALPHA
from opd_geometry.training.settings import PolicyConfig

MASKS = {"principal_overlap": "principal", "low_magnitude_overlap": "low-magnitude"}
THREE = ("sft", "opd", "rlvr")
COUNTS = ["rollout_prompts", "group_size", "batch_sequences", "steps"]  # of settings
FITS = "fits after all"  # a point that its own computation does not bear out


class Point(NamedTuple):
    """One thing that does not seem to fit together.

    Attributes:
        name: what it is about.
        kind: what it is if it is borne out.
        holds: whether the computation bears it out.
        computed: the computation's result, in words.
        instead: what this book uses.
    """

    name: str
    kind: str
    holds: bool
    computed: str
    instead: str


def points_table(points: Iterable[Point]) -> pd.DataFrame:
    """The points with what they turned out to be.

    Args:
        points: of the chapter.

    Returns:
        One row a point: point, kind (``FITS`` where it is not borne out), computed,
        "here instead".
    """
    rows = [
        (p.name, p.kind if p.holds else FITS, p.computed, p.instead) for p in points
    ]
    return pd.DataFrame(rows, columns=["point", "kind", "computed", "here instead"])


def printed(name: str) -> pd.DataFrame:
    """One file of numbers that the papers print.

    Args:
        name: of a csv in ``data/paper``, without the ending.

    Returns:
        item, arm, metric, relation, value, unit, as in the file; numbers as floats,
        words of ``settings`` as text.

    Raises:
        ValueError: no such file; the message lists them.
    """
    folder = on_shelf("paper")
    known = sorted(path.stem for path in folder.glob("*.csv"))
    if name not in known:
        raise ValueError(f"no printed numbers {name!r}; expected {', '.join(known)}")
    table = committed_csv(folder / f"{name}.csv", dtype={"value": str})
    words = table["unit"] == "word"
    values = table["value"].astype(object)
    values[~words] = table.loc[~words, "value"].astype(float)
    return table.assign(value=values if words.any() else values.astype(float))


# --- which share of the entries can a mask hold? ---------------------------------


def share_interval(density: float, overlap: float) -> tuple[float, float]:
    """Which share alpha of the entries a mask can hold, given what it overlaps with.

    overlap * density <= alpha <= 1 - (1 - overlap) * density

    The update's entries inside the mask have to fit into the mask, those outside into
    the rest. Exact for one matrix, and for counts pooled over matrices.

    Args:
        density: share of the entries that the update changes, in [0, 1].
        overlap: share of the changed entries that the mask holds, in [0, 1].

    Returns:
        The smallest and the largest alpha.

    Raises:
        ValueError: a share outside [0, 1].

    Source: ours; the two quantities are those of arXiv:2606.07082, Figure 3.

    >>> [round(x, 3) for x in share_interval(0.8, 0.25)]
    [0.2, 0.4]
    """
    _check_shares(density=density, overlap=overlap)
    return overlap * density, 1.0 - (1.0 - overlap) * density


def share_interval_of_means(density: float, overlap: float) -> tuple[float, float]:
    """The same where both numbers are means of shares over matrices.

    density + overlap - 1 <= alpha <= 1 - density + overlap

    Both follow from ``share_interval`` of every single matrix,
    d - o = (1 - o) d - o (1 - d) <= 1 - alpha and d + o - 1 <= o d <= alpha, and are
    linear, so that they hold for every mean in which d and o have the same weights.

    Args:
        density: mean over matrices of the share of changed entries, in [0, 1].
        overlap: mean over the same matrices of the overlap, in [0, 1].

    Returns:
        The smallest and the largest alpha, from 0 to 1.

    Raises:
        ValueError: a share outside [0, 1].

    Source: ours.

    >>> [round(x, 3) for x in share_interval_of_means(0.8, 0.25)]
    [0.05, 0.45]
    """
    _check_shares(density=density, overlap=overlap)
    return max(0.0, density + overlap - 1.0), min(1.0, 1.0 - density + overlap)


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0.0 <= share <= 1.0:
            raise ValueError(
                f"{name} {share}: expected a share from 0 to 1; divide per cent by 100"
            )


def printed_shares() -> pd.DataFrame:
    """What Figure 3 of the paper allows its two masks to hold.

    Returns:
        One row an arm and mask: arm, mask, density, overlap, and the ends ``low``,
        ``high`` (pooled counts) and ``mean_low``, ``mean_high`` (any mean) of alpha.
    """
    table = printed("figures")
    rows = table[(table["item"] == "Figure 3") & table["arm"].isin(THREE)]
    shares = rows.pivot(index="arm", columns="metric", values="value") / 100
    return pd.DataFrame(
        _share_row(
            arm, mask, *(2 * (shares.loc[arm, "density"], shares.loc[arm, mask]))
        )
        for arm in THREE
        for mask in MASKS
    )


def measured_shares(
    table: pd.DataFrame, arms: Iterable[str], alpha: float, prefix: str = ""
) -> pd.DataFrame:
    """The same of measured updates, whose masks hold a share that is known.

    Args:
        table: tidy.
        arms: which.
        alpha: the masks' share: the default or one of ``choices.MASK_SHARES``.
        prefix: ``null_`` for the arms' Gaussian updates.

    Returns:
        As ``printed_shares``, one row an arm, seed and mask, with the column seed.

    Raises:
        ValueError: the table has no overlaps of masks of that share.
    """
    suffix = "" if alpha == MASK_ALPHA else f"@alpha={alpha:g}"
    names = {f"{prefix}density": "density", "parameters": "size"}
    names |= {f"{prefix}{mask}{suffix}": mask for mask in MASKS}
    arms = list(arms)
    wanted = table["metric"].isin(names) & table["role"].isin(ev.LAYERS)
    rows = table[wanted & table["arm"].isin(arms)].sort_values("step")
    keys = ["arm", "seed", "matrix", "metric"]
    ends = rows.astype({"arm": object, "matrix": object, "metric": object})
    ends = ends.groupby(keys)["value"].last().unstack().rename(columns=names)
    absent = [name for name in (*MASKS, "density", "size") if name not in ends]
    if absent:
        raise ValueError(
            f"the table holds no {', '.join(absent)} of masks with share {alpha:g}: "
            "expected the last checkpoint of measured runs; load them first"
        )
    found = []
    runs = dict(list(ends.groupby(level=["arm", "seed"])))
    for arm, seed in sorted(runs, key=lambda key: (arms.index(key[0]), key[1])):
        run = runs[arm, seed]
        changed = run["density"] * run["size"]
        for mask in MASKS:
            pooled = changed.sum() / run["size"].sum()
            inside = (changed * run[mask]).sum() / changed.sum()
            means = (run["density"].mean(), run[mask].mean())
            row = _share_row(arm, mask, pooled, inside, *means)
            found.append({**row, "seed": seed})
    return pd.DataFrame(found)


def _share_row(
    arm: str, mask: str, pooled: float, inside: float, density: float, overlap: float
) -> dict[str, object]:
    """One arm and mask, by its pooled counts and by its means."""
    row: dict[str, object] = {"arm": arm, "mask": mask}
    row |= {"density": density, "overlap": overlap}
    row["low"], row["high"] = share_interval(pooled, inside)
    row["mean_low"], row["mean_high"] = share_interval_of_means(density, overlap)
    return row


def joint(rows: pd.DataFrame) -> dict[str, float]:
    """What all rows allow together; empty where a lower end exceeds its upper end.

    Args:
        rows: of ``printed_shares`` or ``measured_shares``.

    Returns:
        low, high, mean_low, mean_high.
    """
    ends = {name: float(rows[name].max()) for name in ("low", "mean_low")}
    return ends | {name: float(rows[name].min()) for name in ("high", "mean_high")}


# --- what one seed would have said -----------------------------------------------


def other_side_share(n_seeds: int) -> float:
    """How often one seed contradicts the mean of all when there is nothing to see.

    P(sign(x_1) != sign(mean(x_1, ..., x_n))) = arccos(1 / sqrt(n)) / pi

    for independent normal x_i with mean zero: their correlation with the mean is
    1 / sqrt(n).

    Args:
        n_seeds: n, at least 1.

    Returns:
        From 0 (one seed is its own mean) towards 1/2.

    Raises:
        ValueError: n below 1.

    Source: ours.

    >>> other_side_share(1), round(other_side_share(2), 3)
    (0.0, 0.25)
    """
    if n_seeds < 1:
        raise ValueError(f"n_seeds {n_seeds}: expected 1 or more")
    return math.acos(1.0 / math.sqrt(n_seeds)) / math.pi


def by_seed(table: pd.DataFrame) -> pd.DataFrame:
    """Every part of every measured claim, seed by seed.

    distance = min(x - lower, upper - x) of the part's range; positive inside

    Args:
        table: tidy.

    Returns:
        One row a claim, part and seed: claim, part, seed, distance, mean (distance of
        the mean over seeds), spread (standard deviation over seeds, NaN for one),
        agrees (whether the seed lies on the mean's side of the bound).

    Raises:
        ValueError: as ``claims.judge``.
    """
    check_table(table)
    rows, levels = [], ev.levels_of(table)
    for claim in CLAIMS:
        if missing(claim, levels):
            continue
        for part in claim.evidence(levels)[0]:
            centre = _distance(part, interval(part.values)[0])
            spread = float(part.values.std(ddof=1))
            for seed, value in part.values.dropna().items():
                away = _distance(part, float(value))
                agrees = (away > 0) == (centre > 0)
                label = (claim.id, part.label, seed)
                rows.append((*label, away, centre, spread, agrees))
    columns = ["claim", "part", "seed", "distance", "mean", "spread", "agrees"]
    return pd.DataFrame(rows, columns=columns)


def _distance(part: Part, value: float) -> float:
    return min(value - part.lower, part.upper - value)


def readings(seeds: pd.DataFrame) -> pd.DataFrame:
    """How each seed alone would have read each claim: by values, without intervals.

    Args:
        seeds: of ``by_seed``.

    Returns:
        One row a claim, in the paper's order: seeds (how many), "for" (at how many all
        parts lie in their ranges), agree (whether all seeds say the same).
    """
    holds = (seeds["distance"] > 0).groupby([seeds["claim"], seeds["seed"]]).all()
    by_claim = holds.groupby(level="claim")
    table = pd.DataFrame({"seeds": by_claim.size(), "for": by_claim.sum()})
    table["agree"] = table["for"].isin([0]) | (table["for"] == table["seeds"])
    return table.loc[[claim.id for claim in CLAIMS if claim.id in table.index]]


def closest(seeds: pd.DataFrame) -> pd.DataFrame:
    """Of each claim the part whose mean lies nearest to its bound, in spreads.

    Args:
        seeds: of ``by_seed``.

    Returns:
        Its rows, with the column ``spreads``: the seed's distance in units of the
        spread, positive on the mean's side. Empty with one seed.
    """
    known = seeds[seeds["spread"] > 0]
    away = (known["mean"] / known["spread"]).abs().rename("away")
    parts = known.assign(away=away).drop_duplicates(["claim", "part"])
    nearest = parts.loc[parts.groupby("claim", sort=False)["away"].idxmin()]
    chosen = known.merge(nearest[["claim", "part"]])
    spreads = chosen["distance"] * np.sign(chosen["mean"]) / chosen["spread"]
    return chosen.assign(spreads=spreads)


# --- settings --------------------------------------------------------------------

SETTINGS = (
    "start",
    "learning_rate",
    "schedule",
    "beta_1",
    "beta_2",
    "eps",
    "weight_decay",
    "steps",
    "batch_sequences",
    "group_size",
    "clip_low",
    "clip_high",
    "temperature",
)


def own_settings(profile: str, arm: str) -> dict[str, object]:
    """An arm's settings under the names that the paper's have in ``data/paper``.

    Args:
        profile: a key of ``profiles.PROFILES``.
        arm: one of ``profiles.PUBLISHED_ARMS``.

    Returns:
        Those of ``SETTINGS`` that the arm has.

    Raises:
        ValueError: unknown profile or arm.
    """
    run = build(profile, arm, 0)
    train, optimizer = run.train, run.train.optimizer
    anchored = getattr(run.start, "arm", "base").startswith("sft")
    found: dict[str, object] = {"start": "anchor" if anchored else "base"}
    found["beta_1"], found["beta_2"] = optimizer.betas
    for name in SETTINGS:
        for settings in (optimizer, train):
            if hasattr(settings, name):
                found[name] = getattr(settings, name)
    if isinstance(train, PolicyConfig):
        found["batch_sequences"] = train.prompts_per_step * train.group_size
    return found


def settings_table(profile: str, arms: Sequence[str] = THREE) -> pd.DataFrame:
    """The paper's settings and ours, side by side.

    Args:
        profile: a key of ``profiles.PROFILES``.
        arms: whose.

    Returns:
        One row a setting, columns "SFT, paper", "SFT, here" and so on; ``–`` where the
        paper prints nothing, or the arm has no such setting.

    Raises:
        ValueError: unknown profile or arm.
    """
    theirs = printed("settings").pivot(index="metric", columns="arm", values="value")
    columns: dict[str, list[object]] = {
        "setting": [s.replace("_", " ") for s in SETTINGS]
    }
    for arm in arms:
        label, ours = arm.upper(), own_settings(profile, arm)
        paper = theirs[arm].to_dict() if arm in theirs else {}
        columns[f"{label}, paper"] = [_told(paper.get(name)) for name in SETTINGS]
        columns[f"{label}, here"] = [_told(ours.get(name)) for name in SETTINGS]
    return pd.DataFrame(columns)


def _told(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:g}" if isinstance(value, int | float) else str(value)

"""Where updates lie once distance is taken out.

An update that went further shows in more entries, turned more and shifted more,
whatever made it. So every diagnostic of every matrix and checkpoint is held against one
number, the relative norm ||dW|| / ||W_0||: what share of its variance does one curve
explain? What is left can be place, and is asked of the update itself: against its own
permutation, against chance in the subspaces of W_0, in the learning rate's own unit.
Two arms are compared twice: at their ends, and at the largest norm that both reach,
read between checkpoints.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain

import numpy as np
import pandas as pd

from opd_geometry.analysis.evidence import (
    LAYERS,
    Levels,
    Table,
    beside,
    last,
    levels_of,
    over_matrices,
)
from opd_geometry.analysis.verdicts import Values, defined, interval
from opd_geometry.geometry.defaults import PRINTED_ALPHA, PRINTED_DENSITIES
from opd_geometry.training.settings import clipped_frac

DISTANCE = "relative_norm"
NORM = "frobenius_norm"
# Metrics to whether their logarithm is taken.
PLACE = {
    "sparsity": False,
    "low_magnitude_overlap": False,
    "principal_overlap": False,
    "angle_left_mean_deg": True,
    "angle_right_mean_deg": True,
    "angle_right_max_deg": True,
    "nss": True,
}
SHAPE = {"stable_rank": True, "hill_alpha": True, "similarity_to_end": False}
N_BINS = 60  # of the curve: equal numbers of points, so each bin holds hundreds
DRAWS = 400  # of the bootstrap over runs
KEYS = ["run", "arm", "seed", "step", "matrix"]
OVERLAPS = ("principal_overlap", "low_magnitude_overlap")
TURNED = {"Gaussian": "null_", "turned": "turned_"}  # nulls of the angles
SPECTRAL = ("angle_left_mean_deg", "angle_right_mean_deg", "nss")
# Places that an update's energy is measured in, in words.
SUBSPACES = {
    "top_right": "top right of W₀",
    "top_left": "top left of W₀",
    "bottom_right": "bottom right of W₀",
    "bottom_left": "bottom left of W₀",
    "inputs": "where the inputs lie",
    "principal": "principal mask",
    "low_magnitude": "low-magnitude mask",
}
AT_END, AT_EQUAL_NORM = "the end", "equal norm"
# From SFT to RLVR, a change at a time: arm, next arm, what changes.
LADDER = (
    ("sft", "sft-base-matched", "rate, steps and batch"),
    ("sft-base-matched", "sft-matched", "where it starts"),
    ("sft-matched", "ce-teacher", "whose texts"),
    ("ce-teacher", "off-policy", "the credit of a token"),
    ("off-policy", "opd", "who writes"),
    ("opd", "rlvr", "gap or reward"),
    ("rlvr", "rlvr-paper", "batch and steps"),
)


def points(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A diagnostic beside the distance, a row a matrix and checkpoint of a run.

    Args:
        table: tidy.
        metric: key of ``PLACE`` or ``SHAPE``; its logarithm where they say so.

    Returns:
        Columns run, arm, seed, x (natural logarithm of the relative norm), y; without
        rows in which either is undefined. Similarities with the end are without the
        end, where they are one by definition.
    """
    rows = table[table["role"].isin(LAYERS) & (table["step"] > 0)]
    sides = [
        rows[rows["metric"] == name].set_index(KEYS)["value"]
        for name in (DISTANCE, metric)
    ]
    wide = pd.concat(sides, axis=1, keys=["x", "y"], join="inner").reset_index()
    wide = wide.astype({"x": float, "y": float})  # objects, where no row has both
    if metric.startswith("similarity"):
        end = wide.groupby("run", observed=True)["step"].transform("max")
        wide = wide[wide["step"] < end]
    with np.errstate(divide="ignore", invalid="ignore"):
        wide["x"] = np.log(wide["x"])
        if (PLACE | SHAPE)[metric]:
            wide["y"] = np.log(wide["y"])
    wide = wide[np.isfinite(wide["x"]) & np.isfinite(wide["y"])]
    return wide[["run", "arm", "seed", "x", "y"]].reset_index(drop=True)


def explained(found: pd.DataFrame, weights: pd.Series | None = None) -> float:
    """Share of a diagnostic's variance that one curve over distance explains.

    1 - sum_b sum_{i in b} (y_i - mean_b)^2 / sum_i (y_i - mean)^2

    over bins b of equal numbers of points along x.

    Args:
        found: of ``points``.
        weights: how often each run counts; once each if None.

    Returns:
        From 0 to 1; about N_BINS / n for a diagnostic that has nothing to do with
        distance, NaN for one that does not vary.

    Source: the correlation ratio (K. Pearson, 1905).
    """
    sums = _sums(found)
    if weights is not None:
        runs = sums.index.get_level_values("run")
        sums = sums.mul(weights.reindex(runs).to_numpy(), axis=0)
    by_bin = sums.groupby(level="bin").sum()
    by_bin = by_bin[by_bin["n"] > 0]
    within = (by_bin["yy"] - by_bin["y"] ** 2 / by_bin["n"]).sum()
    whole = by_bin.sum()
    total = whole["yy"] - whole["y"] ** 2 / whole["n"]
    return float(1 - within / total) if total > 0 else float("nan")


def _sums(found: pd.DataFrame) -> pd.DataFrame:
    """Count, sum and sum of squares of y by run and bin; y centred first."""
    place = found["x"].rank(method="first") - 1
    bins = (place * N_BINS // max(1, len(found))).astype(int).rename("bin")
    y = found["y"] - found["y"].mean()
    parts = pd.DataFrame({"n": 1.0, "y": y, "yy": y**2})
    return parts.groupby([found["run"].astype(str), bins]).sum()


def collapse(
    table: pd.DataFrame, metrics: Iterable[str] = (*PLACE, *SHAPE), seed: int = 0
) -> pd.DataFrame:
    """How much of each diagnostic is distance, over all runs, matrices and checkpoints.

    Args:
        table: tidy.
        metrics: which.
        seed: of the bootstrap, which draws runs: matrices of one run are no sample.

    Returns:
        One row a metric: metric, n_points, n_runs, share, low, high (95 % over runs),
        n_seeds, seed_low, seed_high (the 95 % t interval of the shares of the seeds,
        each taken alone; NaN for one seed).
    """
    generator, rows = np.random.default_rng(seed), []
    for metric in metrics:
        found = points(table, metric)
        if found.empty:
            continue
        runs = found["run"].astype(str).unique()
        draws = generator.multinomial(len(runs), [1 / len(runs)] * len(runs), DRAWS)
        shares = _resampled(_sums(found), runs, draws)
        alone = found.groupby("seed")[["run", "x", "y"]].apply(explained)
        low, high = np.nanpercentile(shares, [2.5, 97.5])
        numbers = (len(found), len(runs), explained(found), low, high)
        rows.append((metric, *numbers, len(alone), *interval(alone)[1:]))
    columns = ["metric", "n_points", "n_runs", "share", "low", "high"]
    columns += ["n_seeds", "seed_low", "seed_high"]
    return pd.DataFrame(rows, columns=columns)


def _resampled(
    sums: pd.DataFrame, runs: Sequence[str], draws: np.ndarray
) -> np.ndarray:
    """``explained`` for many weightings of the runs at once."""
    wide = sums.unstack("bin", fill_value=0.0).reindex(runs)
    n, y, yy = (draws @ wide[name].to_numpy() for name in ("n", "y", "yy"))
    with np.errstate(divide="ignore", invalid="ignore"):
        within = (yy - np.where(n > 0, y**2 / n, 0.0)).sum(axis=1)
    total = yy.sum(axis=1) - y.sum(axis=1) ** 2 / n.sum(axis=1)
    return 1 - within / total


# --- real updates against their own permutations ----------------------------------


def permuted(table: Table, arms: Iterable[str]) -> pd.DataFrame:
    """Mask overlaps of real updates, of their permutations, and free of any grid.

    Args:
        table: tidy, with the metrics of ``controls.at_end``.
        arms: which; those without them give no rows.

    Returns:
        One row an arm, mask and density (``own``, at masks of one half of the entries;
        the paper's printed ones, at masks of 0.3): arm, mask, density, alpha, n_seeds,
        own, shuffled, free; difference (own minus shuffled) with low and high, its 95 %
        interval over seeds; times (free over alpha: how often the largest entries lie
        on the mask, chance 1) with times_low and times_high.
    """
    levels, rows = levels_of(table), []
    places = [("own", "@d=own", 0.5)]
    for printed in PRINTED_DENSITIES:
        at = f"@d={printed},alpha={PRINTED_ALPHA}"
        places.append((str(printed), at, PRINTED_ALPHA))
    for arm in arms:
        for mask in OVERLAPS:
            for density, at, alpha in places:
                own, shuffled, free = (
                    _at_end(levels, arm, f"{prefix}{mask}{at}")
                    for prefix in ("", "shuffled_", "free_")
                )
                if own.empty:
                    continue
                means = (own.mean(), shuffled.mean(), free.mean())
                apart = (*interval(own - shuffled), *interval(free / alpha))
                rows.append((arm, mask, density, alpha, len(own), *means, *apart))
    columns = ["arm", "mask", "density", "alpha", "n_seeds", "own", "shuffled", "free"]
    columns += ["difference", "low", "high", "times", "times_low", "times_high"]
    return pd.DataFrame(rows, columns=columns)


def over_nulls(
    table: Table, arms: Iterable[str], nulls: Mapping[str, Sequence[str]]
) -> pd.DataFrame:
    """Diagnostics of the final updates in units of their nulls.

    Args:
        table: tidy, or its levels.
        arms: which; those without a metric and its nulls give no rows.
        nulls: metric to the prefixes of its nulls' metrics.

    Returns:
        One row an arm, metric and null: arm, metric, null (its prefix), n_seeds,
        n_matrices (that have all of them), own, of_null, times (own over null, mean
        over seeds) with low and high, its 95 % interval.
    """
    levels, rows, arms = levels_of(table), [], list(arms)
    for metric, prefixes in nulls.items():
        for arm in arms:
            found = beside(levels, arm, [metric, *(p + metric for p in prefixes)])
            for prefix in prefixes if len(found) else ():
                own, null = found[metric], found[prefix + metric]
                numbers = (len(found), int(found["n_matrices"].max()))
                means = (own.mean(), null.mean(), *interval(own / null))
                rows.append((arm, metric, prefix, *numbers, *means))
    columns = ["arm", "metric", "null", "n_seeds", "n_matrices", "own", "of_null"]
    return pd.DataFrame(rows, columns=[*columns, "times", "low", "high"])


def turned(table: Table, arms: Iterable[str]) -> pd.DataFrame:
    """Angles and spectral shift of real updates over those of their two nulls.

    The Gaussian has the update's norm; the turned one its singular values as well, in
    random directions.

    Args:
        table: tidy, with the metrics of ``controls.at_end``.
        arms: which; those without them give no rows.

    Returns:
        ``over_nulls`` of ``SPECTRAL``, an arm after the other, its nulls by name.
    """
    arms = list(arms)
    found = over_nulls(table, arms, dict.fromkeys(SPECTRAL, tuple(TURNED.values())))
    names = {prefix: name for name, prefix in TURNED.items()}
    found = found.assign(null=found["null"].map(names)).drop(columns="n_matrices")
    return found.sort_values(
        "arm", key=lambda x: x.map(arms.index), kind="stable", ignore_index=True
    )


def by_world(
    of: Callable[..., pd.DataFrame], worlds: Mapping[str, pd.DataFrame], arms: object
) -> pd.DataFrame:
    """One of this module's tables for several worlds, the first column their names.

    Args:
        of: such as ``permuted``.
        worlds: name to table; one without rows is left out.
        arms: as ``of`` takes them.
    """
    there = {name: table for name, table in worlds.items() if len(table)}
    parts = [of(table, arms).assign(world=name) for name, table in there.items()]
    together = pd.concat(parts, ignore_index=True)
    return together[["world", *together.columns.drop("world")]]


def energies(table: Table, arms: Iterable[str]) -> pd.DataFrame:
    """Share of the squared update in subspaces and on masks, in units of chance.

    Args:
        table: tidy, with the metrics of ``controls.energies``.
        arms: which; those without them give no rows.

    Returns:
        One row an arm and place: arm, place, n_seeds, share, chance, times (share over
        chance, mean over matrices) with low and high, its 95 % interval over seeds.
    """
    levels, rows = levels_of(table), []
    for arm in arms:
        for place in SUBSPACES:
            share, chance = (
                _at_end(levels, arm, f"{prefix}energy_{place}")
                for prefix in ("", "null_")
            )
            if not share.empty:
                numbers = (len(share), share.mean(), chance.mean())
                rows.append((arm, place, *numbers, *interval(share / chance)))
    columns = ["arm", "place", "n_seeds", "share", "chance", "times", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def displacements(table: Table, arms: Iterable[str]) -> pd.DataFrame:
    """How far arms moved in the learning rate's own unit, and how often clipped.

    ||dW||_F / sqrt(n_entries) / sqrt(sum_t lr_t^2) at the end, a mean over matrices

    Args:
        table: tidy, with ``frobenius_norm`` and ``parameters`` of the matrices, and
            the history's ``learning_rate`` with ``clipped_frac`` or ``grad_norm``.
        arms: which; those without them give no rows.

    Returns:
        One row an arm: arm, n_seeds, displacement (about 1 for Adam on noise) with low
        and high, its 95 % interval over seeds, clipped (share of steps).
    """
    levels = levels_of(table)
    of_all, rows = _displacement(levels.table), []
    for arm in arms:
        moved = of_all[of_all.index.get_level_values("arm") == arm]
        clipped = last(levels.means(arm, "clipped_frac", ("model",), False))
        if clipped.empty:  # measured before there was such a row: the default limit
            norms = levels.means(arm, "grad_norm", ("model",), False)
            by_seed = norms.groupby(level="seed")
            clipped = by_seed.agg(lambda x: clipped_frac(x.to_numpy(), 1.0))
        if not moved.empty:
            rows.append((arm, len(moved), *interval(moved), clipped.mean()))
    columns = ["arm", "n_seeds", "displacement", "low", "high", "clipped"]
    return pd.DataFrame(rows, columns=columns)


def _displacement(table: pd.DataFrame) -> Values:
    """That of every run, by arm and seed."""
    each = displacement_of_matrices(table).groupby(
        ["arm", "seed", "run"], observed=True
    )
    return each["value"].mean().dropna().droplevel("run")


def displacement_of_matrices(table: pd.DataFrame) -> pd.DataFrame:
    """Displacement of every matrix at the end of its run, from norms and rates.

    ||dW||_F / sqrt(n_entries) / sqrt(sum_t lr_t^2)

    Args:
        table: as of ``displacements``.

    Returns:
        Rows of a tidy table with this metric, of matrices inside layers.
    """
    names = ["frobenius_norm", "parameters", "learning_rate"]
    norm, size, rate = (table[table["metric"] == name] for name in names)
    norm = norm[norm["role"].isin(LAYERS)]
    last_step = norm.groupby("run", observed=True)["step"].transform("max")
    end = norm[norm["step"] == last_step].reset_index(drop=True)
    keys = ["run", "matrix"]
    sizes = size.drop_duplicates(keys).set_index(keys)["value"]
    entries = sizes.reindex(pd.MultiIndex.from_frame(end[keys])).to_numpy()
    squares = (rate["value"] ** 2).groupby(rate["run"], observed=True).sum()
    units = np.sqrt(end["run"].map(squares).astype(float).to_numpy() * entries)
    return end.assign(metric="displacement", value=end["value"] / units)


def displacement_rows(table: pd.DataFrame) -> pd.DataFrame:
    """A tidy table's displacements, those of runs that have no such row computed."""
    names = ["displacement", "frobenius_norm", "parameters", "learning_rate"]
    table = table[table["metric"].isin(names)]
    has = set(table.loc[table["metric"] == "displacement", "run"])
    added = displacement_of_matrices(table[~table["run"].isin(has)]).dropna()
    return pd.concat([table, added], ignore_index=True) if len(added) else table


def _at_end(levels: Levels, arm: str, metric: str) -> Values:
    return last(over_matrices(levels, arm, metric, LAYERS)).dropna()


# --- two arms at one norm, one change at a time ------------------------------------


def at_norm(table: Table, arm: str, metric: str, norm: Values) -> Values:
    """A metric at the moment an arm's update has a given norm.

    Linear in the logarithm of the norm between the two checkpoints around it.

    Args:
        table: tidy, or its levels; with the metric ``frobenius_norm``.
        arm, metric: which rows; means over all matrices of the layers.
        norm: one number a seed, a mean over the same matrices.

    Returns:
        One number a seed; NaN where the norm lies outside the arm's checkpoints, or
        does not grow from each to the next: then it is reached more than once.

    Source: ours; the paper compares final checkpoints, which went different distances.
    """
    norms = over_matrices(table, arm, NORM, LAYERS)
    values = over_matrices(table, arm, metric, LAYERS)
    found = {}
    for seed, wanted in norm.items():
        if seed not in values.index.get_level_values("seed"):
            continue
        of_seed = norms.loc[seed]
        if not (of_seed.is_monotonic_increasing and of_seed.is_unique):
            found[seed] = np.nan
            continue
        place = np.interp(
            np.log(wanted), np.log(of_seed), of_seed.index, np.nan, np.nan
        )
        found[seed] = float(np.interp(place, of_seed.index, values.loc[seed]))
    return pd.Series(found, dtype=float)


def common_norm(table: Table, arm: str, other: str) -> Values:
    """The largest norm that both arms reach: the smaller one of their last, by seed."""
    ends = [last(over_matrices(table, a, NORM, LAYERS)) for a in (arm, other)]
    return pd.concat(ends, axis=1, join="inner").min(axis=1)


def ratio(
    table: Table, arm: str, other: str, metric: str, at: str, prefix: str = ""
) -> Values:
    """Logarithm of a metric's ratio, other over arm, paired by seed.

    Args:
        table: tidy, or its levels.
        arm, other: the two.
        metric: of positive values.
        at: ``AT_END`` or ``AT_EQUAL_NORM``.
        prefix: ``null_`` for the Gaussian updates of the two arms.
    """
    name = prefix + metric
    if at == AT_END:
        low, high = (last(over_matrices(table, a, name, LAYERS)) for a in (arm, other))
    else:
        norm = common_norm(table, arm, other)
        low, high = (at_norm(table, a, name, norm) for a in (arm, other))
    return np.log(high / low)


def order(values: Values) -> str:
    """``>``, ``<`` or ``?``: where the 95 % interval of the mean lies.

    >>> [order(pd.Series(x)) for x in ([1.0, 2.0], [1.0], [-2.0, -2.1, -2.2])]
    ['?', '?', '<']
    """
    _, low, high = interval(values)
    return ">" if low > 0.0 else "<" if high < 0.0 else "?"


def compared(
    table: pd.DataFrame, pairs: Iterable[tuple[str, str]], metrics: Iterable[str]
) -> pd.DataFrame:
    """Pairs of arms in several metrics, at their ends and at equal norm.

    Args:
        table: tidy.
        pairs: of arms.
        metrics: of positive values.

    Returns:
        One row a pair, metric and moment: arm, other, metric, at, n_seeds, ratio (other
        over arm), low, high (95 % interval over seeds), null (the ratio of the two
        Gaussian updates; NaN for a metric without null), order (of ``order``). An arm
        without rows gives no rows; a pair that is never equally far has NaN there.
    """
    there = set(table["arm"])
    pairs = [pair for pair in pairs if set(pair) <= there]
    levels, metrics = levels_of(table, chain.from_iterable(pairs)), list(metrics)
    rows = []
    for arm, other in pairs:
        for metric in metrics:
            for at in (AT_END, AT_EQUAL_NORM):
                values = ratio(levels, arm, other, metric, at)
                null = interval(ratio(levels, arm, other, metric, at, "null_"))[0]
                n_seeds, numbers = len(defined(values)), np.exp(interval(values))
                found = (n_seeds, *numbers, np.exp(null), order(values))
                rows.append((arm, other, metric, at, *found))
    columns = ["arm", "other", "metric", "at", "n_seeds", "ratio", "low", "high"]
    return pd.DataFrame(rows, columns=[*columns, "null", "order"])


def fates(comparison: pd.DataFrame) -> pd.DataFrame:
    """What becomes of each order once both arms have gone equally far.

    *survives*: the same order at the end and at equal norm; *turns round*: the opposite
    one; *goes*: an order at the end, none at equal norm; *comes*: none at the end, one
    at equal norm; *none*: none at either; *never equal*: no checkpoints at one norm.

    Args:
        comparison: of ``compared``.

    Returns:
        One row a pair and metric: arm, other, metric, the end, equal norm, fate.
    """
    wide = comparison.pivot_table(
        index=["arm", "other", "metric"],
        columns="at",
        values=["order", "n_seeds"],
        aggfunc="first",
        sort=False,
    )
    end, equal = (wide["order"][at] for at in (AT_END, AT_EQUAL_NORM))
    fate = pd.Series("none", index=wide.index)
    fate[(end != "?") & (equal == "?")] = "goes"
    fate[(end == "?") & (equal != "?")] = "comes"
    fate[(end != "?") & (equal != "?") & (end != equal)] = "turns round"
    fate[(end != "?") & (end == equal)] = "survives"
    fate[wide["n_seeds"][AT_EQUAL_NORM] == 0] = "never equal"
    found = {AT_END: end, AT_EQUAL_NORM: equal, "fate": fate}
    return pd.DataFrame(found).reset_index()


def typical_sizes(comparison: pd.DataFrame) -> pd.DataFrame:
    """How large the differences between the arms of a pair are, at both moments.

    median over pairs of |ln(other / arm)|, of the pairs that are read at both

    Args:
        comparison: of ``compared``.

    Returns:
        A row a metric, a column a moment.
    """
    sizes = comparison.assign(size=np.log(comparison["ratio"]).abs())
    wide = sizes.pivot_table(
        index=["metric", "arm", "other"], columns="at", values="size"
    )
    return wide.dropna().groupby("metric").median()[[AT_END, AT_EQUAL_NORM]]

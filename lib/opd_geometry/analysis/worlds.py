"""One question asked of two worlds: does a real language model repeat the small one?

Of a large model some nulls are taken on some of its layers alone. So a value and its
null are always means over the same matrices, those that have both.
"""

from collections.abc import Iterable, Mapping

import pandas as pd

from opd_geometry.analysis.evidence import LAYERS
from opd_geometry.analysis.verdicts import interval

# A diagnostic and the sharpest null there is for it: prefix of the null's metric.
SHARPEST = {
    "sparsity": "shuffled_",
    "low_magnitude_overlap": "shuffled_",
    "principal_overlap": "shuffled_",
    "angle_right_mean_deg": "turned_",
    "nss": "turned_",
    "energy_top_right": "null_",
    "energy_inputs": "null_",
}
EARLY = 0.2  # of training, where the paper looks for the lock
LOCK = "similarity_to_end@K=16"
LOCK_NULLS = {"turned increments": "increments_", "walk": "walk_"}


def beside(
    table: pd.DataFrame, arms: Iterable[str], metric: str, null: str, frac: float = 1.0
) -> pd.DataFrame:
    """A metric and its null, means over the matrices that have both.

    Args:
        table: tidy.
        arms: which; those without either give no rows.
        metric, null: names of the two.
        frac: of training; the checkpoint at that step, 1 the last one.

    Returns:
        One row an arm and seed: arm, seed, n_matrices, own, null.
    """
    rows = table[table["metric"].isin([metric, null]) & table["role"].isin(LAYERS)]
    rows = rows[rows["arm"].isin(list(arms))]
    ends = table.groupby("run", observed=True)["step"].max()
    wanted = (frac * rows["run"].map(ends).astype(float)).round()
    rows = rows[rows["step"] == wanted].astype({"arm": str, "metric": str})
    keys = ["arm", "seed", "matrix"]
    wide = rows.set_index([*keys, "metric"])["value"].unstack()
    if not {metric, null} <= set(wide):
        return pd.DataFrame(columns=["arm", "seed", "n_matrices", "own", "null"])
    wide = wide[[metric, null]].dropna().set_axis(["own", "null"], axis=1)
    by_seed = wide.groupby(level=["arm", "seed"])
    found = by_seed.mean().assign(n_matrices=by_seed.size()).reset_index()
    return found[["arm", "seed", "n_matrices", "own", "null"]]


def over_nulls(
    table: pd.DataFrame,
    arms: Iterable[str],
    nulls: Mapping[str, str] = SHARPEST,
) -> pd.DataFrame:
    """Diagnostics of the final updates in units of their sharpest nulls.

    Args:
        table: tidy.
        arms: which.
        nulls: metric to the prefix of its null.

    Returns:
        One row an arm and metric: arm, metric, n_seeds, n_matrices, own, null, times
        (own over null, mean over seeds) with low and high, its 95 % interval.
    """
    rows, arms = [], list(arms)
    for metric, prefix in nulls.items():
        found = beside(table, arms, metric, prefix + metric)
        for arm in arms:
            own = found[found["arm"] == arm].set_index("seed")
            if len(own):
                numbers = (len(own), int(own["n_matrices"].max()))
                means = (own["own"].mean(), own["null"].mean())
                times = interval(own["own"] / own["null"])
                rows.append((arm, metric, *numbers, *means, *times))
    columns = ["arm", "metric", "n_seeds", "n_matrices", "own", "null"]
    return pd.DataFrame(rows, columns=[*columns, "times", "low", "high"])


def locking(table: pd.DataFrame, arms: Iterable[str]) -> pd.DataFrame:
    """Sim_16 of the update after a fifth of training with the last one, and its nulls.

    Args:
        table: tidy, with the nulls of ``controls.control_rows``.
        arms: which.

    Returns:
        One row an arm: arm, n_seeds, n_matrices, own, and a column a null of
        ``LOCK_NULLS``: means over seeds and matrices.
    """
    parts = []
    for name, prefix in LOCK_NULLS.items():
        found = beside(table, arms, LOCK, prefix + LOCK, EARLY)
        by_arm = found.groupby("arm", sort=False)
        means = by_arm[["own", "null"]].mean().rename(columns={"null": name})
        sizes = {"n_seeds": by_arm.size(), "n_matrices": by_arm["n_matrices"].max()}
        parts.append(means.assign(**sizes))
    wide = pd.concat(parts, axis=1)
    wide = wide.loc[:, ~wide.columns.duplicated()].rename_axis("arm").reset_index()
    order = {arm: place for place, arm in enumerate(arms)}
    wide = wide.sort_values("arm", key=lambda names: names.map(order))
    columns = ["arm", "n_seeds", "n_matrices", "own", *LOCK_NULLS]
    return wide[columns].reset_index(drop=True)


def weights_by_world(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Properties of the matrices that runs start from: a row a property.

    Args:
        tables: name of a world to the rows of one starting point.

    Returns:
        Index: the property; a column a world: mean over the matrices of the layers.
    """
    means = {}
    for world, table in tables.items():
        rows = table[table["role"].isin(LAYERS)]
        means[world] = rows.groupby("metric", observed=True)["value"].mean()
    return pd.DataFrame(means)


def directions(pairs: pd.DataFrame, arms: Iterable[str]) -> pd.DataFrame:
    """How far the final updates of two arms share a direction, and what rounding gives.

    Args:
        pairs: of ``ends.pair_table``.
        arms: which; pairs of one seed.

    Returns:
        One row a pair of arms: arm, other_arm, n_seeds, and means over matrices and
        seeds of cosine, similarity_right@K=16 and its null, jaccard and
        rounding_jaccard.
    """
    names = list(arms)
    rows = pairs[pairs["role"].isin(LAYERS) & (pairs["seed"] == pairs["other_seed"])]
    rows = rows.astype({"arm": str, "other_arm": str, "metric": str})
    rows = rows[rows["arm"].isin(names) & rows["other_arm"].isin(names)]
    shown = ["cosine", "similarity_right@K=16", "null_similarity_right@K=16"]
    shown += ["jaccard", "rounding_jaccard"]
    if rows.empty:
        return pd.DataFrame(columns=["arm", "other_arm", "n_seeds", *shown])
    keys = ["arm", "other_arm"]
    by_metric = rows.groupby([*keys, "metric"])["value"].mean().unstack()[shown]
    seeds = rows.groupby(keys)["seed"].nunique()
    wide = by_metric.assign(n_seeds=seeds).reset_index()
    wide = wide.sort_values("cosine", ascending=False, ignore_index=True)
    return wide[[*keys, "n_seeds", *shown]]

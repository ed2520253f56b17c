"""One question asked of two worlds: does a real language model repeat the small one?

Of a large model some nulls are taken on some of its layers alone. So a value and its
null are always means over the same matrices, those that have both.
"""

from collections.abc import Iterable, Mapping

import pandas as pd

from opd_geometry.analysis import distance
from opd_geometry.analysis.evidence import LAYERS, Table, beside, levels_of

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
# Of ``experiments.weights``, in words.
PROPERTIES = {
    "std": "standard deviation",
    "kurtosis": "kurtosis (Gaussian: 3)",
    "zeros": "share of exact zeros",
    "half_step": "half a step of bf16, median",
    "top_energy": "energy in the first n/16 directions",
    "peak": "largest singular value over the median",
    "gap": "gap below direction n/16, over the largest",
}
EARLY = 0.2  # of training, where the paper looks for the lock
LOCK = "similarity_to_end@K=16"
LOCK_NULLS = {"turned increments": "increments_", "walk": "walk_"}


def over_nulls(table: Table, arms: Iterable[str]) -> pd.DataFrame:
    """Diagnostics of the final updates in units of their sharpest nulls.

    Args:
        table: tidy.
        arms: which.

    Returns:
        One row an arm and metric of ``SHARPEST``: arm, metric, n_seeds, n_matrices,
        own, null, times (own over null, mean over seeds) with low and high, its 95 %
        interval.
    """
    nulls = {metric: [prefix] for metric, prefix in SHARPEST.items()}
    found = distance.over_nulls(table, arms, nulls)
    return found.drop(columns="null").rename(columns={"of_null": "null"})


def locking(table: Table, arms: Iterable[str]) -> pd.DataFrame:
    """Sim_16 of the update after a fifth of training with the last one, and its nulls.

    Args:
        table: tidy, with the nulls of ``controls.control_rows``.
        arms: which.

    Returns:
        One row an arm: arm, n_seeds, n_matrices, own, and a column a null of
        ``LOCK_NULLS``: means over seeds and matrices.
    """
    levels, rows = levels_of(table), []
    asked = [LOCK, *(prefix + LOCK for prefix in LOCK_NULLS.values())]
    for arm in arms:
        found = beside(levels, arm, asked, EARLY)
        if len(found):
            numbers = (len(found), int(found["n_matrices"].max()))
            rows.append((arm, *numbers, *found[asked].mean()))
    columns = ["arm", "n_seeds", "n_matrices", "own", *LOCK_NULLS]
    return pd.DataFrame(rows, columns=columns)


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

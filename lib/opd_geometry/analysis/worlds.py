"""One question asked of two worlds: does a real language model repeat the small one?

Of a large model some nulls are taken on some of its layers alone. So a value and its
null are always means over the same matrices, those that have both.

RULE of ``parted``, fixed before any run of ``opd-teacher-guess`` was trained. Its
teacher guesses, which the reward punishes, so teacher and reward disagree there; the
anchor and the prompts are those of all arms. If what arms share is the direction of
whatever is asked, it *parts* from RLVR: the cosine of their updates lies below that of
RLVR with the run on coin flips, in every seed. If what they share beyond that is the
anchor's, their top right subspaces stay together: Sim_K lies above that of RLVR with
the stage before, in every seed.
"""

from collections.abc import Iterable, Mapping

import pandas as pd

from opd_geometry.analysis.evidence import ATTENTION, LAYERS, Table, beside, levels_of
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


def over_nulls(
    table: Table,
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
    levels, rows, arms = levels_of(table), [], list(arms)
    for metric, prefix in nulls.items():
        for arm in arms:
            found = beside(levels, arm, [metric, prefix + metric])
            if len(found):
                own, null = found[metric], found[prefix + metric]
                numbers = (len(found), int(found["n_matrices"].max()))
                means = (own.mean(), null.mean())
                rows.append((arm, metric, *numbers, *means, *interval(own / null)))
    columns = ["arm", "metric", "n_seeds", "n_matrices", "own", "null"]
    return pd.DataFrame(rows, columns=[*columns, "times", "low", "high"])


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


def parted(
    pairs: pd.DataFrame, arm: str = "opd-teacher-guess", yardstick: str = "rlvr"
) -> pd.DataFrame:
    """Whether an arm whose teacher disagrees with the reward parts from one that obeys.

    Args:
        pairs: of ``ends.committed_pairs``.
        arm: whose teacher disagrees.
        yardstick: the arm that follows the reward.

    Returns:
        One row a seed that has all three pairs: seed, cosine (of the two), cosine_coin
        (of the yardstick with the run on coin flips), similarity (Sim_K of the top
        right subspaces of the two), similarity_stage (of the yardstick with the arm
        ``sft`` before them), direction_parts and subspace_stays (the rule above).
    """
    rows = pairs[pairs["role"].isin(LAYERS) & (pairs["seed"] == pairs["other_seed"])]
    rows = rows.astype({"arm": str, "other_arm": str})
    ours = rows[(rows["arm"] == yardstick) | (rows["other_arm"] == yardstick)]
    other = ours["other_arm"].where(ours["arm"] == yardstick, ours["arm"])
    keys = [ours["seed"], other.rename("other"), ours["metric"]]
    means = ours.groupby(keys, observed=True)["value"].mean()
    asked = {
        "cosine": (arm, "cosine"),
        "cosine_coin": ("rlvr-coin", "cosine"),
        "similarity": (arm, "similarity_right"),
        "similarity_stage": ("sft", "similarity_right"),
    }
    wide = means.unstack(["other", "metric"])
    table = pd.DataFrame({name: wide.get(key) for name, key in asked.items()})
    table = table.dropna().reset_index()
    return table.assign(
        direction_parts=table["cosine"] < table["cosine_coin"],
        subspace_stays=table["similarity"] > table["similarity_stage"],
    )


def along_the_way(windows: pd.DataFrame, arm: str = "opd") -> pd.DataFrame:
    """Cosine of an arm's increments with those of others, window by window.

    Args:
        windows: of ``ends.committed_windows``.
        arm: one of each pair.

    Returns:
        One row another arm (the same arm: from another seed's anchor) and window:
        other, start, stop (shares of training), n_pairs, cosine (mean over attention
        matrices, which all worlds keep along the way, then pairs; null 0) with low and
        high, its 95 % interval over pairs. A pair with one window alone has no course.
    """
    rows = windows[windows["role"].isin(ATTENTION)]
    rows = rows.astype({"arm": str, "other_arm": str})
    whole = (rows["start"] == 0) & (rows["stop"] == windows["stop"].max())
    rows = rows[~whole]
    ours = rows[(rows["arm"] == arm) | (rows["other_arm"] == arm)]
    other = ours["other_arm"].where(ours["arm"] == arm, ours["arm"])
    keys = [other.rename("other"), "start", "stop", "seed", "other_seed"]
    of_pair = ours.groupby(keys, sort=False)["value"].mean()
    found = [
        (*place, len(values), *interval(values))
        for place, values in of_pair.groupby(level=["other", "start", "stop"])
    ]
    columns = ["other", "start", "stop", "n_pairs", "cosine", "low", "high"]
    table = pd.DataFrame(found, columns=columns)
    end = table["stop"].max()
    return table.assign(start=table["start"] / end, stop=table["stop"] / end)


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

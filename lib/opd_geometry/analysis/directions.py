"""Who shares a direction: cosines and subspaces of two arms' updates.

RULE of ``parted``, fixed before any run of ``opd-teacher-guess`` was trained. Its
teacher guesses, which the reward punishes, so teacher and reward disagree there; the
anchor and the prompts are those of all arms. If what arms share is the direction of
whatever is asked, it *parts* from RLVR: the cosine of their updates lies below that of
RLVR with the run on coin flips, in every seed. If what they share beyond that is the
anchor's, their top right subspaces stay together: Sim_K lies above that of RLVR with
the stage before, in every seed.
"""

import numpy as np
import pandas as pd

from opd_geometry.analysis.evidence import ATTENTION, LAYERS
from opd_geometry.analysis.verdicts import interval

ONE = 1 - 1e-12  # where artanh is still finite


def of_cosines(values: pd.Series) -> tuple[float, float, float]:
    """Mean of cosines with its 95 % interval, all between -1 and 1.

    tanh of the mean of artanh(cosine), and of its t interval: Fisher's z

    Args:
        values: one cosine a pair.

    Returns:
        The mean, which lies in the interval, and the interval's ends; these are NaN
        of a single pair.
    """
    mean, low, high = np.tanh(interval(np.arctanh(values.clip(-ONE, ONE))))
    return float(mean), float(low), float(high)


def shared(pairs: pd.DataFrame, arm: str = "opd") -> pd.DataFrame:
    """Who moves in an arm's direction, and what masks say of it.

    Args:
        pairs: of ``ends.committed_pairs``.
        arm: one of each pair.

    Returns:
        One row another arm from the same anchor (the same arm: from another seed's),
        by falling cosine: other, n_pairs, cosine with low and high (``of_cosines``;
        null 0), subspace and its chance (Sim_K of the top right ones), jaccard,
        rounding (that of unrelated updates of these norms), beyond (their difference)
        with beyond_low, beyond_high.
    """
    rows = pairs[pairs["role"].isin(LAYERS)].astype({"arm": str, "other_arm": str})
    ours = rows[(rows["arm"] == arm) | (rows["other_arm"] == arm)]
    other = ours["other_arm"].where(ours["arm"] == arm, ours["arm"])
    keys = [other.rename("other"), ours["seed"], ours["other_seed"], ours["metric"]]
    wide = ours.groupby(keys, observed=True)["value"].mean().unstack()
    found = []
    for name, of_pair in wide.groupby(level="other"):
        means = of_pair.mean()
        names = ("similarity_right", "null_similarity_right")
        masks = (means["jaccard"], means["rounding_jaccard"])
        beyond = interval(of_pair["jaccard"] - of_pair["rounding_jaccard"])
        numbers = (*of_cosines(of_pair["cosine"]), *means[[*names]], *masks, *beyond)
        found.append((name, len(of_pair), *numbers))
    columns = ["other", "n_pairs", "cosine", "low", "high", "subspace", "chance"]
    columns += ["jaccard", "rounding", "beyond", "beyond_low", "beyond_high"]
    table = pd.DataFrame(found, columns=columns)
    return table.sort_values("cosine", ascending=False, ignore_index=True)


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
        high, see ``of_cosines``. A pair with one window alone has no course.
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
        (*place, len(values), *of_cosines(values))
        for place, values in of_pair.groupby(level=["other", "start", "stop"])
    ]
    columns = ["other", "start", "stop", "n_pairs", "cosine", "low", "high"]
    table = pd.DataFrame(found, columns=columns)
    end = table["stop"].max()
    return table.assign(start=table["start"] / end, stop=table["stop"] / end)

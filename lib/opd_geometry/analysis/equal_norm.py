"""Arms compared where they have moved equally far, and one change at a time.

An update that went further has turned more, shifted more and shows in more entries,
whatever made it. So two arms are compared twice: at their ends, and at the largest norm
that both reach, read between checkpoints.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from opd_geometry.analysis.evidence import LAYERS, last, over_matrices
from opd_geometry.analysis.verdicts import Values, defined, interval

NORM = "frobenius_norm"
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


def at_norm(table: pd.DataFrame, arm: str, metric: str, norm: Values) -> Values:
    """A metric at the moment an arm's update has a given norm.

    Linear in the logarithm of the norm between the two checkpoints around it.

    Args:
        table: tidy, with the metric ``frobenius_norm``.
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


def common_norm(table: pd.DataFrame, arm: str, other: str) -> Values:
    """The largest norm that both arms reach: the smaller one of their last, by seed."""
    ends = [last(over_matrices(table, a, NORM, LAYERS)) for a in (arm, other)]
    return pd.concat(ends, axis=1, join="inner").min(axis=1)


def ratio(
    table: pd.DataFrame, arm: str, other: str, metric: str, at: str, prefix: str = ""
) -> Values:
    """Logarithm of a metric's ratio, other over arm, paired by seed.

    Args:
        table: tidy.
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
    metrics = list(metrics)
    rows = []
    for arm, other in [pair for pair in pairs if set(pair) <= there]:
        for metric in metrics:
            for at in (AT_END, AT_EQUAL_NORM):
                values = ratio(table, arm, other, metric, at)
                null = interval(ratio(table, arm, other, metric, at, "null_"))[0]
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

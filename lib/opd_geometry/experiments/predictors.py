"""How near a run's end is to that of other runs, from committed pairs of ``ends``."""

from collections.abc import Iterable

import pandas as pd

from opd_geometry.experiments.shelf import committed_table

COLUMNS = ["run", "arm", "seed", "other", "other_arm", "other_seed"]
COLUMNS += ["matrix", "role", "layer", "metric", "value"]


def committed_pairs(profile: str) -> pd.DataFrame:
    """The committed pairs of a profile; empty when there are none."""
    return committed_table("pairs", profile, COLUMNS)


# Whose end stands for that of another arm, in ``similarity_of_arm``.
OTHER_ARM = {"opd": "rlvr"}


def predictor_rows(pairs: pd.DataFrame) -> pd.DataFrame:
    """Rows for the tidy table: how near a run's final subspace is to another run's.

    ``similarity_of_arm``: that of ``OTHER_ARM`` from the same anchor;
    ``similarity_of_seed``: the mean over the other seeds of the same arm.

    Args:
        pairs: of ``ends.pair_table``.

    Returns:
        run, arm, seed, matrix, role, layer, metric, value; without a step, which is
        that of the end of the run.
    """
    readouts = {"similarity_right": "", "similarity_right_bf16": "_bf16"}
    sims = pairs[pairs["metric"].isin(readouts)]
    sims = sims.assign(readout=sims["metric"].astype(str).map(readouts))
    turned = sims.rename(
        columns={"run": "other", "other": "run", "arm": "other_arm"}
        | {"other_arm": "arm", "seed": "other_seed", "other_seed": "seed"}
    )
    both = pd.concat([sims, turned])[[*COLUMNS, "readout"]]
    both = both.astype({"arm": str, "other_arm": str})
    arm = both[both["other_arm"] == both["arm"].map(OTHER_ARM)]
    seed = both[both["other_arm"] == both["arm"]]
    keys = ["run", "arm", "seed", "matrix", "role", "layer", "readout"]
    parts = []
    for name, rows in (("similarity_of_arm", arm), ("similarity_of_seed", seed)):
        means = rows.groupby(keys, observed=True)["value"].mean().reset_index()
        parts.append(means.assign(metric=name + means.pop("readout").astype(str)))
    return pd.concat(parts, ignore_index=True)


def with_predictors(
    table: pd.DataFrame, pairs: pd.DataFrame, runs: Iterable[str]
) -> pd.DataFrame:
    """A tidy table, and how near its runs' ends are to those of other runs.

    Args:
        table: tidy.
        pairs: of ``ends.pair_table``.
        runs: keys of those that the pairs are of; others get nothing added.
    """
    rows = predictor_rows(pairs) if len(pairs) else pairs
    rows = rows[rows["run"].astype(str).isin([str(run) for run in runs])]
    if rows.empty:
        return table
    ends = table.groupby("run", observed=True)["step"].max()
    rows = rows.assign(step=rows["run"].astype(str).map(ends))
    rows = rows.dropna(subset="step").astype({"step": int})
    for name, known in table.select_dtypes("category").items():  # kept by concat
        words = known.cat.categories
        more = pd.Index(rows[name].astype(words.dtype).unique()).difference(words)
        every = pd.CategoricalDtype([*words, *more])
        table = table.assign(**{name: known.cat.add_categories(more)})
        rows[name] = rows[name].astype(every)
    return pd.concat([table, rows[list(table.columns)]], ignore_index=True)

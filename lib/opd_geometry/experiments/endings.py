"""The last update of runs that were measured without their permutations.

A permutation needs float32 weights, which are not kept for every run. These rows, in
the columns of a run's own table, were made when a run was trained once more; a run
whose table has them is not in here.

Source: the metrics of ``controls.at_end``, ours.
"""

import pandas as pd

from opd_geometry.experiments.controls import end_rows
from opd_geometry.experiments.runs import Run, one_thread, sound_checkpoint
from opd_geometry.experiments.shelf import commit_table, committed_table
from opd_geometry.geometry.checkpoints import list_matrices, read_matrix
from opd_geometry.geometry.comparison import reference

COLUMNS = ["run", "arm", "seed", "step", "matrix", "role", "layer", "metric", "value"]


def ending_table(run: Run) -> pd.DataFrame:
    """Permutations, turned updates and energies at the end of a finished run."""
    end = run.checkpoint_steps()[-1]
    origin, last = sound_checkpoint(run, 0), sound_checkpoint(run, end)
    rows = []
    with one_thread():
        for matrix in list_matrices(origin):
            before = reference(read_matrix(origin, matrix.name))
            after = read_matrix(last, matrix.name)
            if bool((after == before.w_before).all()):
                continue
            place = (run.key(), run.arm, run.seed)
            of = (matrix.name, matrix.role, matrix.layer)
            found = end_rows(run, matrix.name, before, after, end)
            rows += [
                (*place, step, *of, metric, value) for step, metric, value in found
            ]
    return pd.DataFrame(rows, columns=COLUMNS)


def commit_endings(profile: str, table: pd.DataFrame) -> None:
    """Add the endings of some runs to a profile's; see ``shelf``."""
    commit_table("endings", profile, table, ["run"])


def with_endings(profile: str, table: pd.DataFrame) -> pd.DataFrame:
    """Measured runs, and what was committed of the endings of those without.

    Args:
        profile: whose.
        table: of ``measure``; a run in it that has permutations keeps its own.
    """
    added = committed_table("endings", profile, COLUMNS)
    shuffled = table["metric"].astype(str).str.startswith("shuffled_")
    known, has = set(table["run"]), set(table.loc[shuffled, "run"])
    added = added[added["run"].isin(known - has)]
    # Columns of no rows have no type of their own, and would take the table's away.
    return pd.concat([table, added], ignore_index=True) if len(added) else table

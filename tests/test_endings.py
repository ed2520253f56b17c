"""Permutations of runs that were measured without them."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from children import OPD, PROJECTED, RANK

from opd_geometry.analysis import distance
from opd_geometry.experiments import endings, measure


@pytest.fixture
def copied(data: Path, trained: Path) -> Path:
    shutil.copytree(trained, data)
    return data


def test_endings_are_the_rows_that_a_whole_measurement_has(copied: Path) -> None:
    whole = measure.measure_run(OPD, RANK)
    found = endings.ending_table(OPD)
    keys = ["run", "arm", "seed", "step", "matrix", "role", "layer", "metric"]
    known = found.merge(whole, on=keys, suffixes=("", "_known"))
    inputs = known["metric"].str.contains("inputs")
    assert len(known) == len(found) > 100
    assert not inputs.any()  # no prompts are read for them
    pd.testing.assert_series_equal(
        known["value"], known["value_known"], check_names=False, rtol=1e-12
    )


def test_only_runs_without_permutations_get_theirs(copied: Path) -> None:
    own, confined = (measure.measure_run(run, RANK) for run in (OPD, PROJECTED))
    measured = pd.concat([own, confined], ignore_index=True)
    assert set(distance.permuted(measured, ["opd", PROJECTED.arm])["arm"]) == {"opd"}
    for run in (OPD, PROJECTED):
        endings.commit_endings("smoke", endings.ending_table(run))
    both = endings.with_endings("smoke", measured)
    found = distance.permuted(both, ["opd", PROJECTED.arm])
    assert set(found["arm"]) == {"opd", PROJECTED.arm}
    assert set(found["n_seeds"]) == {1}
    assert len(endings.with_endings("smoke", own)) == len(own)

"""Permutations of runs that were measured without them."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from children import OPD, PROJECTED, RANK

from opd_geometry import cli
from opd_geometry.analysis import distance
from opd_geometry.experiments import endings, frozen, measure


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


def test_two_commands_make_what_is_committed(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_asked", lambda *_: [OPD])
    assert cli.main(["commit", "--endings", "--profile", "smoke"]) == 0
    made = pd.read_parquet(copied / "measurements" / "endings" / "smoke.parquet")
    assert set(made["run"]) == {OPD.key()}
    assert cli.main(["starts", "--frozen", "--profile", "smoke"]) == 0
    ranks = frozen.committed_frozen("smoke")
    assert set(ranks["metric"]) == {"frozen_stable_rank", "covariance_rank"}
    assert set(ranks["step"]) == {0, *OPD.checkpoint_steps()}

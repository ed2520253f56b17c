"""Fresh training on this machine: order and range, never digits.

Trained weights differ between processors, so what is asserted here holds by a wide
margin: the small world can be learned, SFT moves the weights far more than the policy
arms do, and every diagnostic stays in its range.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from opd_geometry.experiments import measure, profiles, runs

LAPTOP = profiles.PROFILES["laptop"]
ARMS = ("sft", "opd", "rlvr")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """SFT from the committed base, then OPD and RLVR from it, all much shortened."""
    committed = runs.data_directory() / "checkpoints"
    data = tmp_path_factory.mktemp("data")
    shutil.copytree(committed, data / "checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPD_GEOMETRY_DATA", str(data))
        return pd.concat(measure.measure_run(run, LAPTOP.rank) for run in _runs())


def _runs() -> list[runs.Run]:
    base = runs.stored(Path("checkpoints") / "laptop-base")
    teacher = runs.stored(Path("checkpoints") / "laptop-teacher")
    short = replace(LAPTOP.sft, steps=80, batch_sequences=64)
    sft = runs.Run("sft", 0, short, base)
    policy = replace(LAPTOP.policy, steps=10, prompts_per_step=12)
    opd = runs.Run("opd", 0, policy, sft, teacher)
    return [sft, opd, runs.Run("rlvr", 0, replace(policy, alpha=0.0), sft)]


def at_end(table: pd.DataFrame, metric: str) -> pd.Series:
    """Plain mean over the matrices of the layers, at the last step of each arm."""
    rows = table[(table["metric"] == metric) & (table["layer"] >= 0)]
    last = rows[rows["step"] == rows.groupby("arm")["step"].transform("max")]
    return last.groupby("arm")["value"].mean()


def test_the_base_learns_the_format_it_did_not_know(table: pd.DataFrame) -> None:
    sft = table[(table["arm"] == "sft") & (table["role"] == "model")]
    loss = sft[sft["metric"] == "loss"].set_index("step")["value"]
    assert loss.iloc[0] > 5  # the base never writes an answer
    assert loss.iloc[-10:].mean() < 1.2
    solved = sft[sft["metric"] == "accuracy/gcd"]["value"].item()
    assert 0.1 < solved < 0.9


@pytest.mark.parametrize("metric", ["relative_norm", "nss", "angle_left_mean_deg"])
def test_sft_moves_further_than_the_policy_arms(
    table: pd.DataFrame, metric: str
) -> None:
    moved = at_end(table, metric)
    assert moved["sft"] > 10 * moved["opd"] > 0
    assert moved["sft"] > 10 * moved["rlvr"] > 0


def test_sparsity_follows_the_size_of_the_step(table: pd.DataFrame) -> None:
    sparsity = at_end(table, "sparsity")
    assert sparsity["sft"] < 0.2 < sparsity[["opd", "rlvr"]].min()


def test_updates_have_lower_rank_than_noise_of_their_norm(table: pd.DataFrame) -> None:
    own, null = at_end(table, "stable_rank"), at_end(table, "null_stable_rank")
    for arm in ARMS:
        assert 1.0 <= own[arm] < null[arm] / 2


@pytest.mark.parametrize(
    ("metric", "low", "high"),
    [
        ("sparsity", 0, 1),
        ("principal_overlap", 0, 1),
        ("low_magnitude_overlap", 0, 1),
        ("similarity_to_end", 0, 1 + 1e-9),
        ("angle_right_max_deg", 0, 90),
        ("stable_rank", 1, 128),
        ("nss", 0, 1),
    ],
)
def test_ranges(table: pd.DataFrame, metric: str, low: float, high: float) -> None:
    values = table[table["metric"] == metric]["value"].dropna()
    assert len(values) > 0
    assert values.between(low, high).all()

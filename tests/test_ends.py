from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch
from children import ANCHOR, OPD, PROJECTED, RANK

from opd_geometry.experiments import ends, measure, predictors, runs
from opd_geometry.geometry import spectra
from opd_geometry.geometry.checkpoints import read_matrix

NAME = "model.layers.0.self_attn.q_proj.weight"


def delta(run: runs.Run) -> torch.Tensor:
    first, last = (read_matrix(runs.checkpoint(run, s), NAME) for s in (0, None))
    return last.double() - first.double()


@pytest.fixture(scope="module")
def table(trained: Path) -> pd.DataFrame:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPD_GEOMETRY_DATA", str(trained))
        return ends.pair_table([(OPD, PROJECTED), (OPD, OPD), (OPD, ANCHOR)], RANK)


def values(table: pd.DataFrame, other: runs.Run) -> dict[str, float]:
    chosen = (table["matrix"] == NAME) & (table["other"] == other.key())
    return table[chosen].set_index("metric")["value"].to_dict()


def test_pairs_are_what_the_two_updates_share(
    table: pd.DataFrame, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPD_GEOMETRY_DATA", str(trained))
    found = values(table, PROJECTED)
    a, b = delta(OPD), delta(PROJECTED)
    assert found["cosine"] == pytest.approx(
        float((a * b).sum() / (a.norm() * b.norm()))
    )
    bases = [spectra.top_right_subspace(d, RANK) for d in (a, b)]
    shared = spectra.subspace_similarity(*bases)
    assert found["similarity_right"] == pytest.approx(shared)
    bases = [spectra.top_right_subspace(d.T.contiguous(), RANK) for d in (a, b)]
    assert found["similarity_left"] == pytest.approx(
        spectra.subspace_similarity(*bases)
    )
    assert found["null_similarity_right"] == RANK / a.shape[1]
    assert set(table["matrix"]) > {NAME}
    assert list(table) == ends.COLUMNS


def test_an_update_that_bf16_never_shows_shares_no_stored_subspace() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(16, 16, generator=generator)
    updates = [
        torch.randn(16, 16, generator=generator, dtype=torch.float64) for _ in "ab"
    ]
    for size, stored in ((1e-9, False), (1e-2, True)):
        found = [ends._end(w, w.double() + size * u) for u in updates]
        assert ("similarity_right_bf16" in dict(ends._shared(*found, 4))) is stored


def test_windows_are_what_two_runs_added_between_checkpoints(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPD_GEOMETRY_DATA", str(trained))
    found = ends.window_table([(OPD, OPD), (OPD, PROJECTED)])
    assert list(found) == ends.WINDOW_COLUMNS
    late = [s for s in OPD.checkpoint_steps() if s > OPD.branch_step()]
    steps = [0, *late]  # the confined run begins at the branch
    rows = found[(found["matrix"] == NAME) & (found["other"] == PROJECTED.key())]
    assert list(zip(rows["start"], rows["stop"], strict=True)) == list(pairwise(steps))
    for row in rows.itertuples():
        a, b = (
            read_matrix(runs.checkpoint(run, row.stop), NAME).double()
            - read_matrix(runs.checkpoint(run, row.start), NAME).double()
            for run in (OPD, PROJECTED)
        )
        expected = float((a * b).sum() / (a.norm() * b.norm()))
        assert row.value == pytest.approx(expected)
    itself = found[found["other"] == OPD.key()]
    assert itself["value"].to_numpy() == pytest.approx(1.0)
    windows = len(OPD.checkpoint_steps())
    assert len(itself) == windows * itself["matrix"].nunique()


def test_a_run_shares_everything_with_itself(table: pd.DataFrame) -> None:
    found = values(table, OPD)
    for name in ("cosine", "similarity_right", "similarity_left", "jaccard"):
        assert found[name] == pytest.approx(1.0)
    p = found["independent_jaccard"]
    assert max(p, found["rounding_jaccard"]) < 1


def planted(value: float, other_value: float) -> pd.DataFrame:
    rows = []
    for arm, other_arm, seed, other_seed, shown in (
        ("opd", "rlvr", 0, 0, value),
        ("rlvr", "sft", 0, 0, 0.9),
        ("opd", "opd", 0, 1, other_value),
        ("opd", "opd", 2, 0, other_value + 0.2),
    ):
        pair = (f"{arm}{seed}", arm, seed, f"{other_arm}{other_seed}", other_arm)
        for metric in ("similarity_right", "similarity_right_bf16", "cosine"):
            less = 0.1 if metric.endswith("bf16") else 0.0
            rows.append((*pair, other_seed, "a.q", "q", 0, metric, shown - less))
    return pd.DataFrame(rows, columns=ends.COLUMNS)


def test_predictors_are_read_from_either_side_of_a_pair() -> None:
    rows = predictors.predictor_rows(planted(0.8, 0.4)).set_index(["run", "metric"])[
        "value"
    ]
    assert rows["opd0", "similarity_of_arm"] == pytest.approx(0.8)
    assert rows["opd0", "similarity_of_arm_bf16"] == pytest.approx(0.7)
    # with seed 1 at 0.4, and with seed 2, which names it second, at 0.6
    assert rows["opd0", "similarity_of_seed"] == pytest.approx(0.5)
    assert rows["opd1", "similarity_of_seed"] == pytest.approx(0.4)
    assert ("rlvr0", "similarity_of_arm") not in rows.index


def test_predictors_stand_at_the_end_of_committed_runs_only() -> None:
    rows = [
        (name, "opd", seed, step, "a.q", "q", 0, "nss", 1.0)
        for name, seed in (("opd0", 0), ("opd1", 1))
        for step in (10, 50)
    ]
    table = pd.DataFrame(rows, columns=measure.COLUMNS)
    found = predictors.with_predictors(table, planted(0.8, 0.4), ["opd0"])
    added = found[found["metric"].str.startswith("similarity")]
    assert set(added["run"]) == {"opd0"}
    assert set(added["step"]) == {50}
    assert not found.duplicated(["run", "step", "matrix", "metric"]).any()
    none = predictors.with_predictors(table, planted(0.8, 0.4)[:0], ["opd0"])
    pd.testing.assert_frame_equal(none, table)


def test_pairs_are_committed_whole_and_refused_when_damaged(data: Path) -> None:
    assert ends.committed_pairs("smoke").empty
    path = ends.commit_pairs("smoke", planted(0.8, 0.4))
    back = ends.committed_pairs("smoke")
    assert list(back) == ends.COLUMNS
    assert back["value"].iloc[0] == pytest.approx(0.8)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises(
        ValueError, match=r"is damaged: .*; take it from version"
    ) as error:
        ends.committed_pairs("smoke")
    assert "\n" not in str(error.value)


def test_pairs_of_runs() -> None:
    second = replace(OPD, seed=1)
    asked = [OPD, PROJECTED, second]
    assert ends.same_anchor(asked) == [(OPD, PROJECTED)]
    assert ends.other_seeds(asked) == [(OPD, second)]

"""Regimes on planted displacements: reached or not, in every world."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from opd_geometry.analysis import claims, regimes
from opd_geometry.analysis.evidence import Levels
from opd_geometry.analysis.statements import CLAIMS, claim_of
from opd_geometry.experiments.measure import COLUMNS

PAPER = {("opd", "rlvr"): 4.0, ("sft", "opd"): 0.25}


def table(**displacements: float) -> pd.DataFrame:
    """Two seeds whose displacements have the level as geometric mean, at the end."""
    rows = [
        (f"{arm}{seed}", arm.replace("_", "-"), seed, step, "a", "q", 0, metric, value)
        for arm, level in displacements.items()
        for seed, factor in ((0, 0.5), (1, 2.0))
        for step in (5, 10)
        for metric, value in (
            ("displacement", 1.0 if step == 5 else level * factor),
            ("sparsity", 0.5 / level),
        )
    ]
    rows += [
        (*row[:3], 0, *row[4:7], "parameters", 4.0)
        for row in rows
        if row[3] == 5 and row[7] == "sparsity"
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


@pytest.mark.parametrize(
    ("here", "reached"),
    [
        (4.0, True),
        (2.01, True),
        (1.99, False),
        (7.9, True),
        (8.1, False),
        (0.25, False),
    ],
)
def test_a_ratio_is_reached_within_half_of_the_papers(
    here: float, reached: bool
) -> None:
    assert regimes.Regime("a", "b", here, 4.0, 2).reached is reached
    assert regimes.Regime("b", "a", 1 / here, 0.25, 2).reached is reached
    assert not regimes.Regime("a", "b", math.nan, 4.0, 0).reached


def test_ratios_are_those_of_the_last_checkpoint_averaged_as_logarithms() -> None:
    levels = Levels(table(sft=1.0, opd=3.0, rlvr=2.0))
    pairs = regimes.regimes(claim_of("sparsity-order"), levels, PAPER)
    told = {(pair.arm, pair.other): pair.here for pair in pairs}
    assert told == {
        ("opd", "rlvr"): pytest.approx(1.5),
        ("sft", "opd"): pytest.approx(1 / 3),
    }
    assert regimes.regimes(claim_of("mixing"), levels, PAPER) == []
    empty = Levels(table(opd=3.0))
    assert all(np.isnan(p.here) for p in regimes.regimes(CLAIMS[0], empty, PAPER))


def test_every_claim_has_a_row_a_world_with_its_regime(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(regimes, "paper_ratios", lambda: PAPER)
    near = table(sft=1.0, opd=4.0, rlvr=1.0, rlvr_flip_45=9.0)
    far = table(sft=1.0, opd=4.0, rlvr=4.0, rlvr_flip_45=1.0)
    found = regimes.claims_in_worlds({"published": near, "pretrained": far})
    assert found["id"].tolist() == [claim.id for claim in CLAIMS] * 2
    rows = found.set_index(["world", "id"])
    here, there = (rows.loc[w, "sparsity-order"] for w in ("published", "pretrained"))
    assert here["verdict_in_regime"] == here["verdict"] != "not measured"
    assert there["verdict_in_regime"] == regimes.NOT_TESTED
    assert "opd over rlvr 1.00 (n = 2), the paper 4.00: not reached" in there["regime"]
    assert "sft over opd 0.25 (n = 2), the paper 0.25: reached" in there["regime"]
    # SFT < OPD < RLVR in unchanged entries is the order where RLVR goes least far
    assert there["regime_with_wrong_rewards"].startswith("opd over rlvr 4.00")
    assert here["regime_with_wrong_rewards"].startswith("opd over rlvr 0.44")
    assert rows.loc["published", "mixing"]["verdict_in_regime"] == "not measured"
    assert rows.loc["published", "sparse-tokens"]["regime"] == ""


def test_orders_are_judged_with_true_rewards_and_with_wrong_ones() -> None:
    # unchanged entries: SFT few, OPD more, RLVR between them until rewards are wrong
    world = table(sft=5.0, opd=1.0, rlvr=2.0, rlvr_flip_45=0.5)
    jitter = world["seed"] * 1e-4  # no interval without a spread
    world["value"] += jitter.where(world["metric"] == "sparsity", 0.0)
    found = regimes.orders_by_rewards({"x": world})
    assert list(found.index) == list(regimes.ORDERS)
    assert list(found.columns) == [("x", "true"), ("x", "wrong")]
    for rewards in ("true", "wrong"):
        arm = "rlvr" if rewards == "true" else regimes.WRONG_REWARDS
        levels = Levels(world).with_arm("rlvr", arm)
        expected = [claims.judge(claim_of(name), levels) for name in found.index]
        told = [f"{x.verdict}, n = {x.n_seeds}" for x in expected]
        assert found["x", rewards].tolist() == told
    assert found.loc["sparsity-order", ("x", "true")] == "not reproduced, n = 2"
    assert not found.loc["sparsity-order", ("x", "wrong")].startswith("not reproduced")


def test_the_papers_own_ratios_are_those_of_its_densities() -> None:
    ratios = regimes.paper_ratios()
    assert 3.0 < ratios["opd", "rlvr"] < 5.0
    assert 0.3 < ratios["sft", "opd"] < 0.5


def test_rows_of_other_worlds_are_kept_and_none_is_lost(tmp_path: Path) -> None:
    one = pd.DataFrame({"id": ["a"], "world": ["x"], "n_seeds": [3], "verdict": ["?"]})
    two = one.assign(world="y", n_seeds=1)
    both = pd.concat([one, two])
    path = tmp_path / "claims.csv"
    kept = claims.with_other_worlds(one.assign(n_seeds=4), both, path)
    assert kept[["world", "n_seeds"]].to_numpy().tolist() == [["x", 4], ["y", 1]]
    with pytest.raises(ValueError, match=r"claims\.csv judges a of x on 3 seeds, .* 2"):
        claims.with_other_worlds(one.assign(n_seeds=2), both, path)

"""Where low rank comes from: the rules on planted tables, and frozen gradients."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from opd_geometry.analysis import rank_source
from opd_geometry.experiments import frozen
from opd_geometry.experiments.profiles import PUBLISHED_ARMS
from opd_geometry.training.models import ModelConfig, build_model
from opd_geometry.training.optimizer import OptimizerConfig, learning_rate, optimizer_of

SEEDS = (0, 1, 2)


def planted(values: dict[str, dict[str, float]], spread: float = 0.01) -> pd.DataFrame:
    """A tidy table of arms to metrics, of two matrices and two checkpoints."""
    rows = []
    for arm, metrics in values.items():
        for seed in SEEDS:
            for metric, value in metrics.items():
                role = "model" if "/" in metric else "q"
                own = value * (1 + spread * (seed - 1))
                for matrix in ("",) if role == "model" else ("a", "b"):
                    rows += [
                        (f"{arm}{seed}", arm, seed, s, matrix, role, 0, metric, own)
                        for s in (10, 100)
                    ]
    columns = ["run", "arm", "seed", "step", "matrix", "role", "layer"]
    return pd.DataFrame(rows, columns=[*columns, "metric", "value"])


def test_levels_are_intervals_against_a_factor() -> None:
    near = pd.Series([-0.01, 0.0, 0.01])
    assert rank_source.level(near, 1.25) == "alike"
    assert rank_source.level(near + 0.5, 1.25) == "higher"
    assert rank_source.level(near - 0.5, 1.25) == "lower"
    assert rank_source.level(near + math.log(1.25), 1.25) == "open"
    assert rank_source.level(near[:1], 1.25) == "open"  # one seed has no interval


def test_comparisons_find_what_was_planted() -> None:
    table = planted(
        {
            "opd": {"stable_rank": 4.0, "displacement": 2.0},
            "opd-sgd": {"stable_rank": 4.1},
            "opd-muon": {"stable_rank": 12.0},
            "opd-self": {"stable_rank": 3.0, "displacement": 1.0},
        }
    )
    found = rank_source.compared(table).set_index(["arm", "reference", "metric"])
    rank = found.xs(("opd", "stable_rank"), level=["reference", "metric"])
    assert rank["found"].to_dict() == {
        "opd-sgd": "alike",
        "opd-muon": "higher",
        "opd-self": "lower",
    }
    row = found.loc[("opd-self", "opd", "displacement")]
    assert (row["found"], row["n"]) == ("lower", 3)
    assert row["ratio"] == pytest.approx(0.5)


def test_every_rule_names_arms_that_there_are() -> None:
    named = {a for c in rank_source.COMPARISONS for a in (c.arm, c.reference)}
    assert named | {*rank_source.PREDICTIONS} <= {*PUBLISHED_ARMS}
    words = {"alike", "higher", "lower"}
    assert {c.expected for c in rank_source.COMPARISONS} <= words


def test_predictions_are_asked_at_both_moments() -> None:
    table = planted({"opd": {"stable_rank": 4.0}})
    rows = [
        ("x", "opd", seed, "a", role, 0, step, metric, value)
        for seed in SEEDS
        for role, wrong in (("q", 1.0), ("up", 100.0))
        for step, metric, value in (
            (10, "frozen_stable_rank", 4.2 * wrong),
            (100, "frozen_stable_rank", 2.0 * wrong),
            (0, "covariance_rank", 4.1 * wrong),
        )
    ]
    known = pd.DataFrame(rows, columns=frozen.COLUMNS)
    found = rank_source.predictions(table, known).set_index(["predictor", "moment"])
    assert found["found"].to_dict() == {
        ("frozen_stable_rank", "first"): "alike",
        ("frozen_stable_rank", "last"): "lower",
        ("covariance_rank", "first"): "alike",
        ("covariance_rank", "last"): "alike",
    }


def test_a_prediction_of_another_step_is_none() -> None:
    table = planted({"opd": {"stable_rank": 4.0}})
    rows = [("x", "opd", s, "a", "q", 0, 10, "frozen_stable_rank", 4.0) for s in SEEDS]
    known = pd.DataFrame(rows, columns=frozen.COLUMNS)
    assert list(rank_source.predictions(table, known)["moment"]) == ["first"]


def test_fates_are_those_since_the_start() -> None:
    before = {f"accuracy/{b}": 0.5 for b in rank_source.BENCHMARKS}
    after = before | {"accuracy/chain": 0.9, "accuracy/gcd": 0.3}
    shape = {"similarity_to_end": 0.6, "relative_norm": 0.01}
    table = planted({"sft": before, "opd": after | shape}, spread=0.0)
    arms = ("opd", "sft", "opd-projected", "opd-task-gcd", "opd-width-x2")
    starts = rank_source.starts_of("published", arms)
    assert starts == {"opd": "sft", "opd-width-x2": "sft-width-x2"}
    found = rank_source.fates(table, starts)
    assert list(found.index) == ["opd"]
    assert found.loc["opd", "learned"] == pytest.approx(0.4)
    assert found.loc["opd", "forgotten"] == pytest.approx(0.2 / 4)


def test_links_tell_a_cause_from_what_goes_with_it() -> None:
    rng = np.random.default_rng(0)
    distance = rng.normal(size=60)
    early = distance + rng.normal(size=60)  # goes with it, and adds nothing
    outcome = distance + 0.3 * rng.normal(size=60)
    noise = rng.normal(size=60)
    columns = {"early": early, "distance": distance, "learned": outcome}
    found = rank_source.links(pd.DataFrame(columns | {"forgotten": noise}), 500)
    words = found.set_index(["outcome", "predictor"])["found"]
    assert words.to_dict() == {
        ("learned", "early"): "open",
        ("learned", "distance"): "predicts",
        ("forgotten", "early"): "open",
        ("forgotten", "distance"): "open",
    }


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_a_follower_goes_where_its_optimizer_would(kind: str) -> None:
    config = OptimizerConfig(1e-2, "cosine", 2, weight_decay=0.0, kind=kind)
    model = build_model(ModelConfig(32, 1, 16), seed=0)
    before = [p.detach().clone() for p in model.parameters()]
    follower = frozen.Follower(model, config, 4, ["lm_head.weight"])
    alone = build_model(ModelConfig(32, 1, 16), seed=0)
    mover = optimizer_of(alone, config)
    generator = torch.Generator().manual_seed(0)
    moment = 0.0
    for step in (0, 1, 3):  # the third teaches nothing
        for own, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            own.grad = torch.randn(own.shape, generator=generator)
            theirs.grad = own.grad.clone()
        head = model.lm_head.weight.grad
        moment = moment + (head.mT @ head).double()
        for group in mover.param_groups:
            group["lr"] = learning_rate(config, step, 4)
        mover.step()
        follower.at = step
        follower.step()
    pairs = zip(follower.model.parameters(), alone.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(map(torch.equal, model.parameters(), before))
    assert torch.allclose(follower.moments["lm_head.weight"], moment)


def test_the_summary_says_what_came_out_and_what_was_not_run() -> None:
    values = {"opd": 4.0, "opd-sgd": 4.0, "opd-muon": 8.0}
    table = planted({arm: {"stable_rank": value} for arm, value in values.items()})
    nothing = pd.DataFrame(columns=frozen.COLUMNS)
    found = rank_source.summary(
        rank_source.compared(table),
        rank_source.predictions(table, nothing),
        rank_source.links(pd.DataFrame()),
    )
    assert list(found.index) == list(rank_source.RULES)
    row = found.loc["optimizer"]
    words = "opd-sgd rank alike (1.00); opd-muon rank higher (2.00)"
    assert row["what came out"] == words
    assert row["n"] == "3 seeds"
    rest = found["what came out"].drop("optimizer")
    assert set(rest.drop("early")) == {"not run"}
    assert "predicts" not in rest["early"]
    assert found.loc["early", "n"] == "0 arms"


def test_conclusions_say_only_what_the_words_bear() -> None:
    words = {"opd-sgd": "alike", "opd-muon": "higher", "opd-self": "higher"}
    as_much = pd.Series([0.0, 0.01, 0.02])
    told = " ".join(rank_source.concluded(words, as_much, {"opd": "alike"}))
    assert "ends at AdamW's rank; Muon ends above AdamW's rank and learns" in told
    assert "So it is not Adam that makes the rank low, and learning does not" in told
    assert "in the gradients before" in told
    assert "Without a gap" in told
    less = " ".join(rank_source.concluded(words, as_much - 0.1, {"opd": "open"}))
    assert "learns as much" not in less
    assert "learning does not" not in less
    assert "in the gradients" not in less
    lower = dict.fromkeys(words, "lower")
    assert "So " not in " ".join(rank_source.concluded(lower, as_much, {}))
    assert rank_source.concluded({}, pd.Series(dtype=float), {}) == []

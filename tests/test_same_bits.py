"""The loops still take the steps that the committed runs took, digit for digit."""

from itertools import islice
from pathlib import Path

import pandas as pd
import pytest

from opd_geometry.experiments import measure, runs
from opd_geometry.experiments.profiles import build
from opd_geometry.training.models import load_model, round_to_bfloat16
from opd_geometry.training.optimizer import adamw
from opd_geometry.training.policy import policy_steps
from opd_geometry.training.sft import sft_steps

CHECKPOINTS = Path(__file__).parents[1] / "data" / "checkpoints"


def committed(run: runs.Run) -> pd.Series:
    """What the run said of its first step."""
    table = measure.committed_table(run)
    rows = table[(table["role"] == "model") & (table["step"] == 1)]
    return rows.set_index("metric")["value"]


def assert_same(run: runs.Run, metrics: dict[str, float], rel: float = 2e-6) -> None:
    """To the last digit but one: processors of one name differ in the last."""
    said = committed(run)
    for name, value in metrics.items():
        assert value == pytest.approx(said[name], rel=rel, abs=1e-7), name


def test_first_supervised_step_of_the_published_anchor() -> None:
    run = build("published", "sft", 0)
    model, tokenizer = load_model(CHECKPOINTS / "laptop-base")
    optimizer = adamw(model, run.train.optimizer)
    with runs.one_thread():
        loop = sft_steps(run.train, model, tokenizer, optimizer, seed=0)
        (metrics,) = islice(loop, 1)
    assert_same(run, metrics)


def test_first_step_of_published_distillation() -> None:
    run = build("published", "opd", 0)
    model, tokenizer = load_model(CHECKPOINTS / "laptop-sft-s0")
    teacher, _ = load_model(CHECKPOINTS / "laptop-teacher")
    optimizer = adamw(round_to_bfloat16(model), run.train.optimizer)
    with runs.one_thread():
        loop = policy_steps(
            run.train, model, teacher, tokenizer, optimizer, seed=run.seed
        )
        (metrics,) = islice(loop, 1)
    # the run started from this anchor as another processor trained it
    assert_same(run, metrics, rel=5e-4)

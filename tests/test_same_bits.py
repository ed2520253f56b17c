"""The loops still take the steps that the committed runs took."""

from itertools import islice
from pathlib import Path

import numpy as np
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
    """What the run said of its first step, and whether this kind of machine ran it."""
    table = measure.committed_table(run)
    rows = table[(table["role"] == "model") & (table["step"] == 1)]
    return rows.set_index("metric")["value"]


def assert_same(run: runs.Run, metrics: dict[str, float]) -> None:
    """To the last committed digit on the processor kind of the committed run."""
    said = committed(run)
    listed = measure.committed_provenance().set_index("run").loc[run.key()]
    here = runs.provenance()
    same = all(here[name] == listed[name] for name in ("machine", "torch"))
    for name, value in metrics.items():
        if same:
            assert np.float32(value) == np.float32(said[name]), name
        else:
            assert value == pytest.approx(said[name], rel=1e-3, abs=1e-6), name


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
    assert_same(run, metrics)

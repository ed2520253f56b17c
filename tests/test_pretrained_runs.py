"""Runs of a pretrained student: what they keep, what they refuse, what is measured."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_students import gemma, qwen  # noqa: F401 (fixtures)

from opd_geometry.experiments import forecast, measure, runs, schedule
from opd_geometry.experiments.descriptions import origin
from opd_geometry.experiments.profiles import PROFILES
from opd_geometry.experiments.runs import ProjectionConfig, Run
from opd_geometry.geometry.checkpoints import list_matrices, read_matrix
from opd_geometry.training.students import Student, describe

SETTINGS = PROFILES["pretrained"]


@pytest.fixture
def opd(
    gemma: Path,  # noqa: F811
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Distillation of a tiny model, whose anchor and teacher nobody judges."""
    monkeypatch.setattr(runs, "LEAN_PROBLEMS", (2, 2, 2))
    monkeypatch.setattr(runs, "LEAN_TOKENS", 4)
    monkeypatch.setattr(runs, "ABLE", -1.0)
    monkeypatch.setattr(runs, "AHEAD", -1.0)
    student = describe(str(gemma), runs.students_directory())
    lessons = replace(SETTINGS.sft, steps=5, batch_sequences=4)
    anchor = Run("sft", 0, lessons, student)
    teacher = Run("teacher", 0, replace(lessons, steps=6), student)
    policy = replace(
        SETTINGS.policy, steps=5, prompts_per_step=2, group_size=2, max_new_tokens=4
    )
    return Run("opd", 0, policy, anchor, teacher)


def names(place: Path) -> set[str]:
    return {matrix.role for matrix in list_matrices(place)}


def test_a_run_keeps_what_is_measured_and_no_more(opd: Run) -> None:
    directory = runs.ensure(opd)
    rounded = runs.checkpoint(opd, 0)
    assert rounded.parent == runs.run_directory(opd.start) / "checkpoints"  # type: ignore[arg-type]
    assert sorted(p.name for p in directory.glob("checkpoints/*")) == [
        f"step-{step:06d}" for step in (1, 2, 3, 4, 5)
    ]
    everything = {"q", "k", "v", "o", "gate", "up", "down", "embed"}
    for step in (0, opd.branch_step(), 5):
        assert names(runs.checkpoint(opd, step)) == everything
    for step in (2, 3, 4):
        assert names(runs.checkpoint(opd, step)) == {"q", "k", "v", "o"}
    for matrix in list_matrices(rounded):
        start = read_matrix(rounded, matrix.name)
        end = read_matrix(runs.checkpoint(opd.start), matrix.name)  # type: ignore[arg-type]
        assert torch.equal(start.float(), end.to(torch.bfloat16).float())
    accuracies = {h["metric"] for h in runs.history(opd) if h["step"] == 5}
    assert {"accuracy/chain", "accuracy/chain-long", "accuracy/brief"} <= accuracies


def test_a_confined_run_is_measured_where_it_was_stored(opd: Run) -> None:
    confined = replace(
        opd,
        arm="opd-projected",
        projection=ProjectionConfig(1, form="update"),
        branch=opd,
    )
    table = measure.measure_run(confined, 2)
    leak = table[table["metric"] == "leak"]
    assert leak["value"].max() < 1e-4  # rounding of tiny updates
    assert set(leak[leak["role"] == "down"]["step"]) == {5}
    assert set(leak[leak["role"] == "q"]["step"]) == {2, 3, 4, 5}


def judged(run: Run, accuracy: float) -> None:
    """A finished run that scored so much in the end."""
    directory = runs.run_directory(run)
    directory.mkdir(parents=True, exist_ok=True)
    record = {"step": 5, "metric": "accuracy/chain", "value": accuracy}
    (directory / "history.json").write_text(json.dumps({"records": [record]}))


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        (0.01, 0.9, "samples 0.010 of chain right: expected 0.05 at least"),
        (0.99, 1.0, "samples 0.990 of chain right: expected 0.97 at most"),
        (0.60, 0.61, "the teacher samples 0.610 .* expected the teacher ahead"),
        (0.60, 0.9, ""),
    ],
)
def test_headroom_is_asked_for_before_training(
    opd: Run,
    monkeypatch: pytest.MonkeyPatch,
    student: float,
    teacher: float,
    words: str,
) -> None:
    monkeypatch.setattr(runs, "ABLE", 0.05)
    monkeypatch.setattr(runs, "AHEAD", 0.02)
    judged(opd.start, student)  # type: ignore[arg-type]
    judged(opd.teacher, teacher)  # type: ignore[arg-type]
    if not words:
        runs.check_headroom(opd)
        return
    if "teacher" in words:  # unless it was taught something else: to disagree
        assert isinstance(opd.teacher, Run)
        guesses = (("careful", 0.1), ("guess", 0.9))
        taught = replace(opd.teacher.train, qualities=guesses)
        guesser = replace(opd.teacher, arm="guesser", train=taught)
        judged(guesser, 0.06)
        runs.check_headroom(replace(opd, teacher=guesser))
    with pytest.raises(ValueError, match=words) as raised:
        runs.check_headroom(opd)
    assert "\n" not in str(raised.value)


def test_too_little_memory_is_said_before_anything_starts(
    opd: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = replace(opd.start, start=replace(opd.start.start, parameters=10**8))  # type: ignore[arg-type,union-attr]
    assert forecast.memory_bytes(large) == pytest.approx(3.2e9)
    free = SimpleNamespace(available=2e9)
    monkeypatch.setattr(forecast.psutil, "virtual_memory", lambda: free)
    with pytest.raises(ValueError, match=r"need about 3\.2 GB of memory and 2\.0 GB"):
        schedule.train_all("pretrained", [large], 1)
    assert not runs.run_directory(large).exists()


def test_every_arm_is_a_run_of_its_own() -> None:
    from opd_geometry.experiments.profiles import build

    found = [build("pretrained", arm, seed) for arm in SETTINGS.arms for seed in (0, 1)]
    assert len({run.key() for run in found}) == len(found) == 2 * len(SETTINGS.arms)
    assert len(SETTINGS.arms) >= 25
    for run in found:
        assert isinstance(origin(run), Student)
        assert runs.is_lean(run)
        assert run.teacher is None or run.teacher.seed == 0  # type: ignore[union-attr]

import dataclasses
import errno
import json
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import children
import pytest
import torch
from children import ANCHOR, OPD, PROJECTED, RLVR, Child

from opd_geometry import files
from opd_geometry.experiments import records, runs
from opd_geometry.experiments.runs import ProjectionConfig, Run, Stored
from opd_geometry.geometry.checkpoints import list_matrices, read_matrix
from opd_geometry.geometry.projection import leaked_energy
from opd_geometry.geometry.spectra import singular_values, top_right_subspace
from opd_geometry.training.models import (
    build_model,
    character_tokenizer,
    load_model,
    round_to_bfloat16,
    save_model,
)
from opd_geometry.training.tasks import BENCHMARKS


@pytest.fixture
def copied(data: Path, trained: Path) -> Path:
    """A data directory of the test's own, with the finished tiny runs."""
    shutil.copytree(trained, data)
    return data


def forget(run: Run) -> None:
    shutil.rmtree(runs.run_directory(run))


def files_of(run: Run, data: Path) -> dict[str, bytes]:
    """What has to be the same bit for bit: every checkpoint, and the history."""
    directory = data / "runs" / run.name
    paths = [*directory.glob("checkpoints/**/*"), directory / "history.json"]
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in paths
        if path.is_file()
    }


def drafts(data: Path) -> list[str]:
    return [path.name for path in data.rglob(".*")]


# --- identity --------------------------------------------------------------------


# Fields whose words do not follow from what they are.
CHANGED: dict[str, list[Any]] = {
    "ratio_to": ["author"],
    "teacher_dtype": ["bfloat16"],
    "teacher_device": ["cpu"],
    "sampler": [],  # not by itself: an engine's gap is scored
}


def variants(value: Any) -> Iterator[Any]:
    """The value with one thing changed, for everything that can be."""
    others = {
        "cosine": "constant",
        "constant": "cosine",
        "demonstrations": "pretraining",
        "sampled": "full",
        "student": "teacher",
        "all": "random",
        "own": "random",
        "gap": "likelihood",
        "gradient": "update",
        "no": "bf16",
        "rollout": "scoring",
        "adamw": "sgd",
    }
    if dataclasses.is_dataclass(value):
        # what does not compare is of no consequence: where a student lies, memory
        for field in (field for field in dataclasses.fields(value) if field.compare):
            own = CHANGED.get(field.name)
            unknown = own is None
            for other in variants(getattr(value, field.name)) if unknown else own:
                yield replace(value, **{field.name: other})
    elif isinstance(value, tuple):
        yield (*value, *value) or (1,)
    elif isinstance(value, str):
        yield others.get(value, f"{value}x")
    elif value is not None:
        yield value + 1 if isinstance(value, int) else value / 2 + 0.25


def test_key_changes_with_every_field() -> None:
    stored = Run("a", 0, children.LESSONS, Stored("there", "0f"))
    for run in (PROJECTED, stored):
        several = [run, *variants(run)]
        assert len({one.key() for one in several}) == len(several) > 10
    assert len(list(variants(PROJECTED))) > 140
    assert replace(OPD, teacher=None).key() != OPD.key()
    scored = replace(OPD, train=replace(OPD.train, gap_from="scoring"))
    engine = replace(scored, train=replace(scored.train, sampler="vllm"))
    assert engine.key() != scored.key()
    assert {run.name for run in (ANCHOR, replace(ANCHOR, seed=1))} == {
        f"sft-s0-{ANCHOR.key()}",
        f"sft-s1-{replace(ANCHOR, seed=1).key()}",
    }


def test_key_is_the_same_in_another_process(data: Path) -> None:
    assert Child(data, Run.key, PROJECTED).result() == PROJECTED.key()


def test_bad_descriptions_are_refused() -> None:
    for seed in (-1, 1.0, "1", True):
        with pytest.raises(ValueError, match="expected an integer, 0 or larger"):
            replace(ANCHOR, seed=seed)
    with pytest.raises(ValueError, match="go together"):
        replace(OPD, projection=ProjectionConfig(2))
    with pytest.raises(ValueError, match="expected own, random, pretrained or"):
        ProjectionConfig(2, "other")
    with pytest.raises(ValueError, match="expected gradient or update"):
        ProjectionConfig(2, form="other")


def test_stored_checkpoint_is_known_by_its_weights(data: Path) -> None:
    folder = data / "checkpoints" / "base"
    with pytest.raises(ValueError, match="no checkpoint at checkpoints/base"):
        runs.stored("checkpoints/base")
    save_model(build_model(children.SHAPE, 0), character_tokenizer(), folder)
    first = runs.stored("checkpoints/base")
    assert first == runs.stored("checkpoints/base")
    save_model(build_model(children.SHAPE, 1), character_tokenizer(), folder)
    assert runs.stored("checkpoints/base").digest != first.digest


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "new.txt"])
def test_a_flipped_bit_of_a_committed_checkpoint_is_one_line(
    name: str, data: Path
) -> None:
    """Else every run that starts from it takes another name, and none is committed."""
    committed = Path(__file__).parents[1] / "data" / "checkpoints"
    shutil.copytree(committed / "laptop-base", data / "checkpoints" / "laptop-base")
    shutil.copy(committed / "laptop-base.sha256", data / "checkpoints")
    assert runs.stored("checkpoints/laptop-base").digest
    file = data / "checkpoints" / "laptop-base" / name
    content = bytearray(file.read_bytes() if file.exists() else b"0")
    content[len(content) // 2] ^= 8
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file} is damaged: it is not as") as error:
        runs.stored("checkpoints/laptop-base")
    assert "\n" not in str(error.value)


# --- what a finished run holds ---------------------------------------------------


def test_finished_run_is_complete(on_trained: Path) -> None:
    directory = runs.ensure(OPD)
    steps = [0, 1, 2, 4, 6, 8, 10]
    assert [p.name for p in sorted(directory.glob("checkpoints/*"))] == [
        f"step-{step:06d}" for step in steps
    ]
    assert {path.name for path in directory.iterdir()} == {
        "branch.pt",
        "branch.pt.sha256",
        "checkpoints",
        "done.json",
        "done.json.sha256",
        "history.json",
        "history.json.sha256",
        "lock",
        "progress.json",
        "run.json",
    }
    done = json.loads((directory / "done.json").read_text())
    assert done["step"] == done["steps"] == 10
    assert {"wall_seconds", "library", "torch", "transformers", "machine"} <= set(done)
    history = runs.history(OPD)
    assert {h["step"] for h in history if h["metric"] == "reward"} == {*range(1, 11)}
    assert {h["step"] for h in history if h["metric"] == "accuracy/chain"} == {
        *steps[1:]
    }
    assert {h["step"] for h in history if h["metric"] == "greedy/chain"} == {10}


def test_policy_run_starts_from_its_anchor_as_bf16(on_trained: Path) -> None:
    anchor, _ = load_model(runs.checkpoint(ANCHOR))
    begun, _ = load_model(runs.checkpoint(OPD, 0))
    for ours, theirs in zip(begun.parameters(), anchor.parameters(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.bfloat16().float())
    rounded = round_to_bfloat16(anchor).state_dict()
    trained = load_model(runs.checkpoint(OPD))[0].state_dict()
    assert any(not torch.equal(rounded[name], trained[name]) for name in rounded)


def test_finished_run_is_not_touched_again(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(ANCHOR)  # a finished run does without what it started from
    monkeypatch.setattr(runs, "_train", None)
    assert runs.ensure(OPD) == runs.run_directory(OPD)
    assert runs.is_done(OPD)
    assert not runs.is_running(OPD)
    assert not runs.run_directory(ANCHOR).exists()


def test_training_has_one_thread(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(runs, "_train", lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs.ensure(ANCHOR)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1]


# --- killed, and asked for again -------------------------------------------------


@pytest.mark.parametrize("run", [ANCHOR, OPD, PROJECTED], ids=lambda run: run.arm)
def test_run_killed_again_and_again_ends_with_the_same_bits(
    run: Run, copied: Path, trained: Path
) -> None:
    forget(run)
    draw = random.Random(0)
    n_killed = 0
    while not runs.is_done(run):
        moment = ("", draw.randint(1, 12), draw.random() < 0.5)
        child = Child(copied, children.ensure_and_die, run, *moment)
        child.result()
        n_killed += child.was_killed
        assert child.was_killed or runs.is_done(run)
    assert n_killed >= 3
    assert files_of(run, copied) == files_of(run, trained)
    assert not drafts(copied)


@pytest.mark.parametrize(
    ("name", "nth", "after"),
    [
        ("branch.pt", 1, False),
        ("branch.pt", 1, True),
        ("state.pt", 2, False),
        ("state.pt", 2, True),
        ("history.json", 1, False),
        ("done.json", 1, False),
    ],
)
def test_run_killed_at_a_delicate_moment_can_still_be_branched_from(
    name: str, nth: int, after: bool, copied: Path, trained: Path
) -> None:
    forget(OPD)
    child = Child(copied, children.ensure_and_die, OPD, name, nth, after)
    child.result()
    assert child.was_killed
    Child(copied, runs.ensure, OPD).result()
    assert files_of(OPD, copied) == files_of(OPD, trained)
    ours, theirs = (
        torch.load(data / "runs" / OPD.name / "branch.pt") for data in (copied, trained)
    )
    assert ours["step"] == theirs["step"] == 2
    assert ours["history"] == theirs["history"]
    assert all(
        torch.equal(ours["model"][name], theirs["model"][name])
        for name in theirs["model"]
    )


@pytest.mark.parametrize("nth", [1, 4, 7])
def test_run_killed_while_a_checkpoint_is_written(
    nth: int, copied: Path, trained: Path
) -> None:
    forget(ANCHOR)
    child = Child(copied, children.ensure_and_die_saving, ANCHOR, nth)
    child.result()
    assert child.was_killed
    directory = runs.run_directory(ANCHOR) / "checkpoints"
    halves = [path for path in directory.iterdir() if path.name.startswith(".")]
    assert len(halves) == 1
    assert (halves[0] / "model.safetensors").is_file()
    assert len(list(directory.glob("step-*"))) == nth - 1
    Child(copied, runs.ensure, ANCHOR).result()
    assert files_of(ANCHOR, copied) == files_of(ANCHOR, trained)
    assert not drafts(copied)


def test_run_killed_at_any_time(copied: Path, trained: Path) -> None:
    forget(OPD)
    draw = random.Random(1)
    for _ in range(6):
        child = Child(copied, runs.ensure, OPD)
        time.sleep(draw.uniform(0.05, 0.7))
        child.kill()
    Child(copied, runs.ensure, OPD).result()
    assert files_of(OPD, copied) == files_of(OPD, trained)


def test_two_processes_train_a_run_once(copied: Path, trained: Path) -> None:
    for run in (ANCHOR, OPD):
        forget(run)
    log = copied / "log"
    both = [Child(copied, children.ensure_counting, OPD, log) for _ in range(2)]
    assert {child.result() for child in both} == {runs.run_directory(OPD)}
    assert len(log.read_text()) == ANCHOR.train.steps + OPD.train.steps
    assert files_of(OPD, copied) == files_of(OPD, trained)


# --- projected runs --------------------------------------------------------------


def branch_state(run: Run) -> dict[str, torch.Tensor]:
    path = runs.run_directory(run) / "branch.pt"
    return dict(torch.load(path, weights_only=True)["model"])


def test_projected_run_continues_its_branch(copied: Path) -> None:
    free, projected = runs.history(OPD), runs.history(PROJECTED)
    assert [h for h in projected if h["step"] <= 2] == [
        h for h in free if h["step"] <= 2
    ]
    assert [h for h in projected if h["step"] > 3] != [h for h in free if h["step"] > 3]
    forget(PROJECTED)
    path = runs.run_directory(OPD) / "branch.pt"
    torch.save({**torch.load(path), "wall_seconds": 1e6}, path)
    records.seal(path)
    log = copied / "log"
    Child(copied, children.ensure_counting, PROJECTED, log).result()
    assert len(log.read_text()) == PROJECTED.train.steps - 2
    assert runs.progress(PROJECTED)["wall_seconds"] < 1e6  # its own alone


@pytest.mark.parametrize("subspace", ["own", "random", "pretrained"])
def test_update_projected_change_stays_in_its_subspace(
    subspace: str, copied: Path
) -> None:
    confined = ProjectionConfig(2, subspace, "update")
    run = replace(PROJECTED, projection=confined)
    Child(copied, runs.ensure, run).result()
    before = branch_state(OPD)
    for matrix in list_matrices(runs.checkpoint(run)):
        change = read_matrix(runs.checkpoint(run), matrix.name) - before[matrix.name]
        assert change.any()
        s = singular_values(change)
        assert float(s[2] / s[0]) < 1e-4  # float32 weights
        origin = read_matrix(runs.checkpoint(OPD, 0), matrix.name)
        early = read_matrix(runs.checkpoint(OPD, 2), matrix.name)
        if subspace == "own":
            v = top_right_subspace(early.double() - origin.double(), 2)
            assert leaked_energy(change, v) < 1e-8
        elif subspace == "pretrained":
            assert leaked_energy(change, top_right_subspace(origin, 2)) < 1e-8


def test_gradient_projected_change_leaks_out_of_its_subspace(copied: Path) -> None:
    """Adam scales entries apart; only the update form stays inside (see above)."""
    before, leaks = branch_state(OPD), []
    for matrix in list_matrices(runs.checkpoint(PROJECTED)):
        after = read_matrix(runs.checkpoint(PROJECTED), matrix.name)
        origin = read_matrix(runs.checkpoint(OPD, 0), matrix.name)
        early = read_matrix(runs.checkpoint(OPD, 2), matrix.name)
        v = top_right_subspace(early.double() - origin.double(), 2)
        leaks.append(leaked_energy(after - before[matrix.name], v))
    assert max(leaks) > 1e-3


def test_donors_subspace_is_taken_where_there_is_a_donor(copied: Path) -> None:
    confined = ProjectionConfig(2, "donor", "update")
    run = replace(PROJECTED, projection=confined, donor=ANCHOR)
    Child(copied, runs.ensure, run).result()
    before, step = branch_state(OPD), ANCHOR.branch_step()
    for matrix in list_matrices(runs.checkpoint(run)):
        change = read_matrix(runs.checkpoint(run), matrix.name) - before[matrix.name]
        origin = read_matrix(runs.checkpoint(ANCHOR, 0), matrix.name)
        early = read_matrix(runs.checkpoint(ANCHOR, step), matrix.name)
        v = top_right_subspace(early.double() - origin.double(), 2)
        assert leaked_energy(change, v) < 1e-8
    for wrong in (None, ANCHOR):
        subspace = "own" if wrong else "donor"
        with pytest.raises(ValueError, match="subspace donor and a donor go together"):
            replace(PROJECTED, projection=ProjectionConfig(2, subspace), donor=wrong)


def test_last_checkpoint_is_judged_on_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def accuracy(*_: object, samples: int = 2, temperature: float = 1.0) -> float:
        asked.append((_[2], samples, temperature))
        return 0.5

    monkeypatch.setattr(runs.evaluation, "accuracy", accuracy)
    assert set(runs._evaluate(OPD, None, None, 9)) == {"accuracy/chain"}
    assert asked.pop() == ("chain", 2, 1.0)
    scores = runs._evaluate(OPD, None, None, 10)
    assert set(scores) == {*(f"accuracy/{b}" for b in BENCHMARKS), "greedy/chain"}
    assert asked == [*((b, 4, 1.0) for b in BENCHMARKS), ("chain", 2, 0)]


def test_projected_run_needs_the_state_of_its_branch(copied: Path) -> None:
    forget(PROJECTED)
    (runs.run_directory(OPD) / "branch.pt").unlink()
    with pytest.raises(ValueError, match=r"cannot resume from .*branch\.pt: FileNot"):
        runs.ensure(PROJECTED)


# --- damaged, unwritable, full ---------------------------------------------------


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_truncated_or_missing_checkpoint(copied: Path, trained: Path) -> None:
    forget(OPD)
    weights = runs.checkpoint(ANCHOR) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged: its content") as error:
        runs.ensure(OPD)
    assert str(runs.checkpoint(ANCHOR)) in one_line(error)
    shutil.rmtree(runs.checkpoint(ANCHOR))
    with pytest.raises(ValueError, match="no checkpoint at") as error:
        runs.ensure(OPD)
    one_line(error)
    assert not list(runs.run_directory(OPD).glob("checkpoints/*"))
    shutil.copytree(
        trained / "runs" / ANCHOR.name / "checkpoints" / "step-000010",
        runs.checkpoint(ANCHOR),
    )
    Child(copied, runs.ensure, OPD).result()
    assert files_of(OPD, copied) == files_of(OPD, trained)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null"])
def test_damaged_records_are_named_or_ignored(content: str, copied: Path) -> None:
    directory = runs.run_directory(OPD)
    for name, reader in (("history.json", runs.history), ("done.json", runs.progress)):
        (directory / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name} is missing or damaged") as error:
            reader(OPD)
        assert str(directory) in one_line(error)
    (directory / "done.json").unlink()
    (directory / "progress.json").write_text(content)  # for watching only
    assert runs.progress(OPD) == {}


def test_weights_that_are_not_numbers_train_nothing(copied: Path) -> None:
    model, tokenizer = load_model(runs.checkpoint(ANCHOR))
    with torch.no_grad():
        model.lm_head.weight[5, 5] = torch.nan
    save_model(model, tokenizer, runs.checkpoint(ANCHOR))
    with pytest.raises(ValueError, match="gradient's norm is nan") as error:
        Child(copied, runs.ensure, Run("next", 0, children.LESSONS, ANCHOR)).result()
    one_line(error)


def test_tokenizer_and_config_are_part_of_what_is_stored(
    data: Path, trained: Path
) -> None:
    source = trained / "runs" / ANCHOR.name / "checkpoints" / "step-000010"
    shutil.copytree(source, data / "base")
    digest = runs.stored("base").digest
    for name in ("tokenizer.json", "config.json"):
        path = data / "base" / name
        before = path.read_text()
        path.write_text(before.replace("1", "7", 1))
        assert runs.stored("base").digest != digest
        path.write_text(before)
    assert runs.stored("base").digest == digest


def test_hub_id_is_told_apart_by_its_revision(data: Path) -> None:
    assert runs.stored("owner/name@abc") == Stored("owner/name@abc", "abc")
    with pytest.raises(ValueError, match="@REVISION"):
        runs.stored("owner/name")


def test_empty_name_of_the_data_directory_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPD_GEOMETRY_DATA", "")
    assert (runs.data_directory() / "checkpoints").is_dir()


def test_damaged_state_is_named(copied: Path) -> None:
    forget(OPD)
    Child(copied, children.ensure_and_die, OPD, "state.pt", 5, True).result()
    state = runs.run_directory(OPD) / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot resume from .*state\.pt") as error:
        runs.ensure(OPD)
    assert "remove" in one_line(error)


@pytest.mark.parametrize("where", ["branch.pt", "state.pt", "before digests"])
def test_no_flipped_bit_of_a_state_trains_on(where: str, copied: Path) -> None:
    """Most of them are weights or moments, which torch reads as other numbers."""
    run = PROJECTED if where == "branch.pt" else OPD
    forget(run)
    if where != "branch.pt":
        Child(copied, children.ensure_and_die, OPD, "state.pt", 5, True).result()
    path = runs.run_directory(OPD) / ("branch.pt" if run is PROJECTED else "state.pt")
    if where == "before digests":
        path.with_name("state.pt.sha256").unlink()
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(6):
        damaged = bytearray(whole)
        weights = range(len(whole) // 4, len(whole) * 3 // 4)  # no padding
        damaged[draw.choice(weights)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot resume from") as error:
            runs.ensure(run)
        assert "remove" in one_line(error)
        assert not runs.is_done(run)


def test_no_flipped_bit_of_a_checkpoint_is_started_from(copied: Path) -> None:
    weights = runs.checkpoint(ANCHOR) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    forget(OPD)
    with pytest.raises(ValueError, match=r"safetensors is damaged: its") as error:
        runs.ensure(OPD)
    assert "remove" in one_line(error)


def test_success_leaves_no_record_of_a_failure(copied: Path) -> None:
    shutil.rmtree(runs.run_directory(ANCHOR))
    log = Child(copied, children.ensure_failing_late, ANCHOR)
    log.result()
    assert runs.is_done(ANCHOR)
    assert not (runs.run_directory(ANCHOR) / "failed.json").exists()


def test_teacher_with_another_tokenizer(copied: Path) -> None:
    children.save_foreign(copied / "foreign")
    run = replace(OPD, teacher=runs.stored("foreign"))
    with pytest.raises(
        ValueError, match=r"tokenizers differ \(\d+ and \d+ tokens\): token '!'"
    ) as error:
        runs.ensure(run)
    one_line(error)
    assert not runs.is_done(run)


def test_data_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("OPD_GEOMETRY_DATA", str(tmp_path / "file" / "data"))
    with pytest.raises(ValueError, match="Not a directory; make room there") as error:
        runs.ensure(ANCHOR)
    one_line(error)
    monkeypatch.setenv("OPD_GEOMETRY_DATA", str(tmp_path / "data"))

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(ValueError, match="Read-only file system; make room") as error:
        runs.ensure(ANCHOR)
    one_line(error)
    assert not runs.is_running(ANCHOR)


@pytest.mark.parametrize("most_bytes", [20_000, 150_000])
def test_full_disk_leaves_nothing_half_written(
    most_bytes: int, data: Path, trained: Path
) -> None:
    """No room for a checkpoint; room for it, but not for the state to resume from."""
    child = Child(data, children.ensure_with_small_files, ANCHOR, most_bytes)
    with pytest.raises(ValueError, match=r"File too large.*; make room") as error:
        child.result()
    one_line(error)
    directory = runs.run_directory(ANCHOR)
    assert {path.name for path in directory.iterdir()} == {
        "run.json",
        "lock",
        "checkpoints",
    }
    whole = files_of(ANCHOR, trained)
    kept = files_of_checkpoints(ANCHOR)
    assert kept.items() <= whole.items()
    assert bool(kept) == (most_bytes > 100_000)
    assert not drafts(data)
    Child(data, runs.ensure, ANCHOR).result()
    assert files_of(ANCHOR, data) == whole


def files_of_checkpoints(run: Run) -> dict[str, bytes]:
    directory = runs.run_directory(run)
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.glob("checkpoints/**/*")
        if path.is_file()
    }


def test_other_errors_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="shape"),
        files.clear_write_errors(tmp_path),
    ):
        raise RuntimeError("a shape that does not fit")


def interrupted(draft: Path) -> None:
    draft.write_text("half")
    raise KeyboardInterrupt


def test_replacing_keeps_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    records.write_json(path, 1)
    with pytest.raises(TypeError):
        records.write_json(path, object())
    with (
        pytest.raises(KeyboardInterrupt),
        files.replacing(path) as draft,
    ):
        interrupted(draft)
    assert json.loads(path.read_text()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_run_without_variance_never_steps(on_trained: Path) -> None:
    first, last = (load_model(runs.checkpoint(RLVR, step))[0] for step in (0, None))
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.parameters(), last.parameters(), strict=True)
    )
    learned = [h for h in runs.history(RLVR) if h["metric"] == "learned_frac"]
    assert {h["value"] for h in learned} == {0.0}

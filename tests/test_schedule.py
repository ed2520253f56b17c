import cProfile
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import children
import pytest
from children import ANCHOR, OPD, PROJECTED, RLVR, TEACHER, Child
from rich.console import Console

from opd_geometry.experiments import records, runs, schedule
from opd_geometry.experiments.display import (
    LOG_SECONDS,
    Display,
    ended_line,
    progress_line,
    seconds_left,
)
from opd_geometry.experiments.listing import write_listing
from opd_geometry.experiments.measure import kept_table, measure_run, provenance_path
from opd_geometry.experiments.runs import Run
from opd_geometry.experiments.schedule import Row


def soon(condition: Callable[[], bool], what: str) -> None:
    """Wait until something is so; a busy machine has five minutes."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError(f"not within five minutes: {what}")


def row(run: Run, seconds: float | None, state: str = "to do") -> Row:
    left = 0.0 if state == "done" else seconds
    return Row(run, state, 0, 10, None, seconds, left, "")


# --- what there is to do ---------------------------------------------------------


def test_needs_come_first_and_once() -> None:
    ordered = schedule.with_needs([PROJECTED, RLVR, OPD])
    assert len(ordered) == len(set(ordered)) == 5
    assert set(ordered) == {ANCHOR, TEACHER, OPD, PROJECTED, RLVR}
    for run in ordered:
        assert all(ordered.index(n) < ordered.index(run) for n in run.needs)


def test_plan_tells_done_from_to_do(on_trained: Path) -> None:
    other = replace(RLVR, seed=1)
    rows = {row.run: row for row in schedule.plan([OPD, other])}
    assert [r.state for r in rows.values()] == ["done", "done", "done", "to do"]
    done, waiting = rows[OPD], rows[other]
    assert (done.step, done.steps, done.seconds_left) == (10, 10, 0.0)
    assert done.seconds == runs.progress(OPD)["wall_seconds"]
    assert done.accuracy is not None
    # as long as the finished run that differs in nothing but the seed
    assert waiting.seconds == runs.progress(RLVR)["wall_seconds"]
    assert (waiting.step, waiting.accuracy) == (0, None)
    new = replace(RLVR, train=replace(RLVR.train, steps=11))
    assert schedule.plan([new])[-1].seconds is None


def test_committed_timings_are_the_first_choice(trained: Path, data: Path) -> None:
    shutil.copytree(trained, data)
    listing = provenance_path()
    listing.parent.mkdir()
    names = ("run", "seed", "steps", "wall_seconds")
    rows = [("a", 0, 10, 100.0), ("b", 1, 10, 200.0), ("c", 2, 20, 9000.0)]
    same = {"arm": "rlvr", "machine": "theirs", "table_sha256": "0" * 64}
    lines = [dict(zip(names, row, strict=True)) | same for row in rows]
    write_listing(listing, [], lines)
    assert schedule.plan([replace(RLVR, seed=1)])[-1].seconds == 150.0
    assert schedule.plan([replace(OPD, seed=1)])[-1].seconds is not None


def test_interrupted_and_failed_runs_are_told_apart(data: Path) -> None:
    assert schedule.plan([ANCHOR])[0].state == "to do"
    directory = runs.run_directory(ANCHOR)
    directory.mkdir(parents=True)
    said = {"step": 4, "steps": 10, "accuracy": 0.25, "wall_seconds": 8.0}
    records.write_json(directory / "progress.json", said)
    (begun,) = schedule.plan([ANCHOR])
    assert (begun.state, begun.step, begun.accuracy) == ("to do", 4, 0.25)
    assert begun.seconds_left == 12.0
    records.write_json(directory / "failed.json", {"reason": "no room"})
    (failed,) = schedule.plan([ANCHOR])
    assert (failed.state, failed.reason) == ("failed", "no room")


WRONG = ("x", [1], {}, True, -1, None, float("nan"))


@pytest.mark.parametrize("name", ["progress.json", "done.json"])
@pytest.mark.parametrize("key", ["step", "steps", "wall_seconds", "accuracy"])
def test_a_record_of_wrong_kinds_is_a_line_of_its_run_alone(
    name: str, key: str, trained: Path, data: Path
) -> None:
    shutil.copytree(trained, data)
    directory = runs.run_directory(OPD)
    said = json.loads((directory / "done.json").read_text())
    for path in directory.glob("done.json*"):
        path.unlink()
    for value in WRONG:
        if key == "accuracy" and value in (-1, None):
            continue
        records.write_json(directory / name, {**said, key: value})
        rows = {row.run: row for row in schedule.plan([OPD, RLVR])}
        assert rows[RLVR].state == "done"
        assert rows[OPD].state == ("damaged" if name == "done.json" else "to do")
        assert f"{name} is missing or damaged ({key} is" in rows[OPD].reason
        assert "\n" not in rows[OPD].reason
        assert "opd-s0" in progress_line(OPD)
        assert "opd-s0" in ended_line(OPD)


def test_a_thousand_seeds_are_planned_at_once(data: Path) -> None:
    """Their number of look-ups grows with the runs, not with their square."""
    few, many = (
        [replace(r, seed=seed) for seed in range(n) for r in (OPD, PROJECTED, RLVR)]
        for n in (10, 1000)
    )
    calls = []
    for asked in (few, many):
        counter = cProfile.Profile()
        rows = counter.runcall(schedule.plan, asked)
        counter.runcall(schedule.priorities, rows)
        calls.append(sum(entry.callcount for entry in counter.getstats()))
    assert len(rows) == 3002  # with the anchor and the teacher
    assert calls[1] < 150 * calls[0]


def test_pace_of_a_projected_run_counts_its_own_steps() -> None:
    said = {"step": 4, "steps": 10, "wall_seconds": 2.0}
    assert seconds_left(PROJECTED, said, None) == 6.0
    assert seconds_left(OPD, said, None) == 3.0
    assert seconds_left(PROJECTED, {}, 50.0) == 50.0


def test_longest_chain_starts_first() -> None:
    rows = [
        row(ANCHOR, 10.0),
        row(TEACHER, 1.0),
        row(OPD, 20.0),
        row(PROJECTED, 5.0),
        row(RLVR, 24.0),
    ]
    assert schedule.priorities(rows) == {
        ANCHOR: 35.0,
        TEACHER: 26.0,
        OPD: 25.0,
        PROJECTED: 5.0,
        RLVR: 24.0,
    }
    assert schedule.total_seconds(rows, 1) == 60.0
    assert schedule.total_seconds(rows, 2) == 35.0
    rows[0] = row(ANCHOR, 10.0, "done")
    assert schedule.total_seconds(rows, 1) == 50.0
    unknown = [*rows, row(replace(RLVR, seed=1), None)]
    assert schedule.total_seconds(unknown, 1) is None
    assert schedule.priorities(unknown)[replace(RLVR, seed=1)] == 24.0


# --- doing it --------------------------------------------------------------------


def test_failing_run_blocks_only_what_needs_it(trained: Path, data: Path) -> None:
    shutil.copytree(trained, data)
    for run in (RLVR, OPD):
        shutil.rmtree(runs.run_directory(run))
    for name in ("foreign", "cut"):
        children.save_foreign(data / name)
    weights = data / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    bad = replace(OPD, arm="bad", teacher=runs.stored("foreign"))
    blocked = replace(PROJECTED, arm="blocked", branch=bad, teacher=bad.teacher)
    cut = replace(ANCHOR, arm="cut", start=runs.stored("cut"))
    asked = [blocked, cut, RLVR, OPD]

    failed, lines = Child(data, children.train_all, asked, 2).result()
    assert failed.keys() == {bad, blocked, cut}
    assert "student and teacher tokenizers differ" in failed[bad]
    assert "cannot load a model from" in failed[cut]
    assert failed[blocked] == f"needs {bad.name}, which is not finished"
    assert not any("\n" in reason for reason in failed.values())
    for run in (bad, cut):
        record = json.loads((runs.run_directory(run) / "failed.json").read_text())
        assert record["reason"] == failed[run]
        assert "Traceback" in record["traceback"]
    assert not runs.run_directory(blocked).exists()
    assert kept_table(RLVR, 2).is_file()
    assert kept_table(OPD, 2).is_file()
    states = {row.run: row.state for row in schedule.plan(asked)}
    assert [states[run] for run in (bad, blocked, cut, RLVR)] == [
        "failed",
        "to do",
        "failed",
        "done",
    ]
    assert len([line for line in lines if "failed:" in line]) == 3
    assert any(line.startswith("opd-s0") and "10/10" in line for line in lines)

    # what was wrong is mended: the same runs are done, and nothing is left of it
    children.save_foreign(data / "cut")
    mended = replace(cut, start=runs.stored("cut"))
    records.write_json(runs.run_directory(RLVR) / "failed.json", {"reason": "once"})
    kept_table(RLVR, 2).unlink()
    assert Child(data, children.train_all, [mended, RLVR], 1).result()[0] == {}
    assert not (runs.run_directory(RLVR) / "failed.json").exists()


def test_one_after_another_in_the_order_of_the_chains(data: Path) -> None:
    asked = [RLVR, PROJECTED]
    assert Child(data, children.train_all, asked, 1).result()[0] == {}
    finished = sorted(
        schedule.with_needs(asked),
        key=lambda run: (runs.run_directory(run) / "done.json").stat().st_mtime_ns,
    )
    assert set(finished[:2]) == {ANCHOR, TEACHER}
    assert finished[2] == OPD  # PROJECTED waits for it, nothing for RLVR
    for run in finished:  # what is only needed is not measured
        assert kept_table(run, 2).is_file() == (run in asked)


def test_killed_worker_is_a_failure_of_its_run_alone(trained: Path, data: Path) -> None:
    shutil.copytree(trained, data)
    for run in (OPD, RLVR):
        shutil.rmtree(runs.run_directory(run))
    failed = Child(data, children.train_all_but, "opd", [OPD, RLVR], 2).result()
    assert failed.keys() == {OPD}
    assert "4 workers died while trying to run it" in failed[OPD]
    assert runs.is_done(RLVR)
    assert Child(data, children.train_all, [OPD], 1).result()[0] == {}
    assert schedule.failure(OPD) == ""


def test_a_killed_worker_costs_the_steps_since_the_last_state(
    trained: Path, data: Path
) -> None:
    shutil.copytree(trained, data)
    whole = runs.run_directory(OPD)
    shutil.rmtree(whole)
    log = data / "steps"
    asked = [OPD, replace(RLVR, seed=1)]
    call = ("opd", asked, 2, log)
    assert Child(data, children.train_all_killed_once, *call).result() == {}
    # killed in step 5, before its state was stored: that one is taken again
    assert log.read_text().split() == [*"012345", *"56789"]
    for stored in whole.glob("checkpoints/*/model.safetensors"):
        theirs = trained / stored.relative_to(data)
        assert stored.read_bytes() == theirs.read_bytes()
    assert len(list(whole.glob("checkpoints/*"))) == 1 + len(OPD.checkpoint_steps())


def test_workers_with_homes_of_their_own_and_one_folder(
    trained: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, data)
    asked = [replace(run, seed=1) for run in (ANCHOR, RLVR)]
    homes = [{"HOME": str(tmp_path / name)} for name in "ab"]
    failed, notes = Child(data, children.train_on_cluster, asked, homes).result()
    assert failed == {}
    assert {note.split()[1] for note in notes} == {home["HOME"] for home in homes}
    assert all(runs.is_done(run) for run in asked)

    # a worker whose folder is another says so at once
    other = [{"OPD_GEOMETRY_DATA": str(tmp_path / "elsewhere")}]
    new = replace(ANCHOR, seed=2)
    failed, _ = Child(data, children.train_on_cluster, [new], other).result()
    assert f"cannot see it below {tmp_path / 'elsewhere'}" in failed[new]
    assert "expected one data folder for all" in failed[new]
    assert not (tmp_path / "elsewhere").exists()


def test_a_cluster_that_cannot_be_reached_is_one_line(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "CONNECT_SECONDS", 0.2)
    for address in ("tcp://127.0.0.1:9", "nowhere"):
        with pytest.raises(ValueError, match=f"no cluster answers at {address}") as got:
            schedule.train_all("smoke", [ANCHOR], cluster=address)
        assert "\n" not in str(got.value)
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://127.0.0.1:9")
    with pytest.raises(ValueError, match="no cluster answers"):
        schedule.train_all("smoke", [ANCHOR])
    assert not runs.run_directory(ANCHOR).exists()


@pytest.mark.parametrize(
    ("name", "method"), [("SIGINT", "fork"), ("SIGTERM", "fork"), ("SIGKILL", "spawn")]
)
def test_no_worker_outlives_the_scheduler(name: str, method: str, data: Path) -> None:
    endless = replace(ANCHOR, train=replace(children.LESSONS, steps=10**6))
    asked = [endless, replace(endless, seed=1)]
    child = Child(data, children.train_all, asked, 2, method)
    soon(lambda: all(runs.progress(run) for run in asked), "both runs train")
    assert [r.state for r in schedule.plan(asked)] == ["running"] * 2
    assert child.process.pid is not None
    send = os.killpg if name == "SIGINT" else os.kill
    send(child.process.pid, getattr(signal, name))
    if name == "SIGINT":
        with pytest.raises(KeyboardInterrupt):
            child.result()
    else:
        child.result()
        assert child.process.exitcode == -getattr(signal, name)
    soon(lambda: not any(runs.is_running(run) for run in asked), "the workers end")
    assert [r.state for r in schedule.plan(asked)] == ["to do"] * 2
    # the terminal's signal reached the workers, too: they had nothing to say to it
    assert "Traceback" not in data.with_name("data.stderr").read_text()
    n_steps = [runs.progress(run)["step"] for run in asked]
    time.sleep(0.2)
    assert [runs.progress(run)["step"] for run in asked] == n_steps


def test_one_run_is_trained_without_workers(
    trained: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, data)
    monkeypatch.setattr(schedule, "measure_run", lambda run, _: run)
    monkeypatch.setitem(sys.modules, "distributed", None)
    said = StringIO()
    assert schedule.train_all("smoke", [RLVR], 2, Console(file=said)) == {}
    assert "rlvr-s0" in said.getvalue()

    def fail(run: Run, rank: int) -> None:
        raise ValueError("no\nroom")

    monkeypatch.setattr(schedule, "measure_run", fail)
    said = Console(file=StringIO())
    assert schedule.train_all("smoke", [RLVR], 1, said) == {RLVR: "no room"}
    assert schedule.failure(RLVR) == "no room"


def test_an_array_script_names_every_run(tmp_path: Path) -> None:
    given = ["--profile", "smoke", "--student", "a b"]
    script = schedule.slurm_script([OPD, replace(RLVR, seed=3)], given, 4)
    assert "#SBATCH --array=0-1%4\n" in script
    (tmp_path / "opd-geometry").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "opd-geometry").chmod(0o755)
    said = subprocess.run(
        ["bash", "-c", script],
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_ARRAY_TASK_ID": "1",
            "OPD_GEOMETRY_DATA": "there",
        },
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert said[1:] == [*given, "--jobs", "1", "--arms", "rlvr", "--seeds", "3"]
    without = subprocess.run(["bash", "-c", script], env={}, capture_output=True)
    assert without.returncode != 0
    assert b"name a folder that all machines see" in without.stderr


def test_jobs_have_to_be_positive(data: Path) -> None:
    with pytest.raises(ValueError, match="jobs 0: expected 1 or more"):
        schedule.train_all("smoke", [ANCHOR], 0)


def test_finished_runs_need_no_process(
    trained: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, data)
    measure_run(OPD, 2)
    monkeypatch.setattr(schedule, "_work", None)
    said = StringIO()
    assert schedule.train_all("smoke", [OPD], 1, Console(file=said)) == {}
    assert said.getvalue().count("done in") == 3


# --- progress --------------------------------------------------------------------


def test_a_line_says_steps_accuracy_and_time_left(data: Path) -> None:
    assert "starting" in progress_line(ANCHOR)
    directory = runs.run_directory(ANCHOR)
    directory.mkdir(parents=True)
    said = {"step": 4, "steps": 10, "accuracy": None, "wall_seconds": 800.0}
    records.write_json(directory / "progress.json", said)
    line = progress_line(ANCHOR)
    assert line.split() == ["sft-s0", "4/10", "20", "min", "left"]
    records.write_json(directory / "progress.json", {**said, "accuracy": 0.256})
    assert "accuracy 0.26" in progress_line(ANCHOR)
    records.write_json(directory / "progress.json", {**said, "step": 10})
    assert "measuring" in progress_line(ANCHOR)
    assert "done in 13 min" in ended_line(ANCHOR)


def test_log_has_a_line_now_and_then(on_trained: Path) -> None:
    said = StringIO()
    with Display(Console(file=said, width=40), 2) as display:
        for _ in range(5):
            display.running([OPD, RLVR])
        display.said[OPD] -= LOG_SECONDS
        display.running([OPD, RLVR])
        display.ended(OPD, "")
        display.ended(RLVR, "[red]a reason[/red] that is longer than forty columns")
    lines = said.getvalue().splitlines()
    names = ["opd-s0", "rlvr-s0", "opd-s0", "opd-s0", "rlvr-s0"]
    assert [line.split()[0] for line in lines] == names
    assert lines[-1].endswith("[red]a reason[/red] that is longer than forty columns")


def test_terminal_shows_every_running_run(on_trained: Path) -> None:
    said = StringIO()
    console = Console(file=said, force_terminal=True, width=60, color_system=None)
    with Display(console, 3) as display:
        display.running([OPD, RLVR])
    shown = said.getvalue()
    assert "opd-s0" in shown
    assert "rlvr-s0" in shown
    assert "0 of 3 runs ended" in shown

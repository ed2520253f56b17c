import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from test_pairs import model, noise, save

from opd_geometry import cli, pair_commands
from opd_geometry.geometry import forecast, pairs, readings, tables
from opd_geometry.printing import duration


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    a = save(tmp_path / "a", model())
    return str(a), str(save(tmp_path / "b-1", model(1), n_shards=3))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on stderr of a command that must fail; stdout stays empty."""
    assert cli.main([str(a) for a in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("opd-geometry: ")
    return err


def test_measure_writes_the_table_and_a_summary(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.parquet"
    assert cli.main(["measure", *pair, "--out", str(out)]) == 0
    table = tables.read_table(out)
    pd.testing.assert_frame_equal(table, pairs.measure_checkpoints(*pair))
    said, told = capsys.readouterr()
    printed = said.splitlines()
    lines = {
        line.split()[0]: line for line in reversed(printed[1:])
    }  # the first counts
    summary = pairs.summarise(table).set_index("role")
    overall = f"{100 * summary.loc['all', 'sparsity_bf16']:.2f} %"
    assert overall in lines["sparsity_bf16"]
    assert f"{summary.loc['q', 'nss']:.4g}" in lines["nss"]
    assert lines["Written"] == f"Written to {out}"
    title = next(i for i, line in enumerate(printed) if line.startswith("Expected at"))
    beside = pairs.beside_expected(table)
    assert printed[title + 1].split() == ["measured", "expected"]
    for row, line in zip(beside.itertuples(), printed[title + 2 :], strict=False):
        assert line.split()[0] == row.metric
        assert f"{row.expected:.4g}" in line or f"{100 * row.expected:.2f} %" in line
    assert "7 matrices" in told
    name = "model.layers.*.input_layernorm.weight (2)"
    assert f"Skipped 2, one-dimensional: a norm or a bias: {name}" in told
    assert "Projected time (all): about" in told
    for tier in ("cheap", "middle"):  # the third is what is done
        assert f"All matrices, {tier}: about" in told
    assert "7/7 " in told


def test_what_is_asked_beyond_matrices_and_cores_is_said(
    pair: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pair_commands, "cores", lambda: 1)
    tables_of = [str(tmp_path / f"{n}.csv") for n in range(2)]
    asked = ["--jobs", "100000", "--hill-k", "999", "--roles", "q"]
    assert cli.main(["measure", *pair, "--out", tables_of[0], *asked]) == 0
    told = capsys.readouterr().err
    assert "--jobs 100000: there are 1 cores, so 1 at a time" in told
    assert "--hill-k is above the smaller side of 2 matrices (16 at least)" in told
    notes = tables.read_table(tables_of[0])["note"]
    assert notes.str.contains("--hill-k cut to its smaller side, 16").all()
    asked = ["--k", "999", "--roles", "q", "--quiet", "--jobs", "100000"]
    place = ["trajectory", *pair, "--out", tables_of[1]]
    assert cli.main([*place, *asked]) == 0
    out, told = capsys.readouterr()
    assert not out
    assert "--jobs" not in told
    notes = tables.read_table(tables_of[1])["note"]
    assert notes.str.contains("--k cut to its smaller side, 16").all()
    assert cli.main([*place, *asked[:4], "--force"]) == 0
    assert "--k is above the smaller side of 2 matrices" in capsys.readouterr().err


def test_measure_ends_with_three_sentences_and_the_next_command(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.csv"
    arguments = ["measure", *pair, "--out", str(out), "--roles", "q,k"]
    assert cli.main([*arguments, "--lr", "1e-3", "--steps", "4"]) == 0
    *_, changed, far, place, following = capsys.readouterr().out.splitlines()
    table = tables.read_table(out)
    assert [changed, far, place] == readings.sentences(table, 1e-3, 4)
    assert "lr √T" in far
    assert following == f"Next: opd-geometry report {out} --out {tmp_path / 't.html'}"
    command = following.removeprefix("Next: opd-geometry ").split()
    assert cli.main(command) == 0  # it works as it stands
    capsys.readouterr()
    assert "both or neither" in refusal(capsys, *arguments, "--force", "--lr", "1")
    for rate in ("nan", "inf"):
        assert cli.main([*arguments, "--force", "--lr", rate, "--steps", "4"]) == 2
        said = capsys.readouterr().err
        assert f"{rate} is no number to measure with" in said
        assert said.count("\n") == 1


def test_quiet_says_nothing_and_json_one_object(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.csv"
    arguments = ["measure", *pair, "--out", str(out), "--metrics", "cheap", "--force"]
    assert cli.main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.main([*arguments, "--quiet", "--json"]) == 0
    said, told = capsys.readouterr()
    assert told == ""
    found = json.loads(said)
    assert found["table"] == str(out)
    assert found["next"][:2] == ["opd-geometry", "report"]
    assert len(found["sentences"]) == 3
    means = {row["role"]: row for row in found["summary"]}
    table = tables.read_table(out)
    assert means["q"]["relative_norm"] == pytest.approx(
        table[table["role"] == "q"]["relative_norm"].mean(), rel=1e-12
    )


def test_progress_is_ten_lines_at_most(capsys: pytest.CaptureFixture[str]) -> None:
    with pair_commands._Display(1000) as display:
        for done in range(1, 1001):
            display.show(pairs.Progress(f"m{done}\x1b[2J", done, 1000, 1.0))
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 10
    assert told[0] == r"100/1000 m100\x1b[2J, 1 s"
    assert told[-1].startswith("1000/1000")


def test_options_reach_the_measurement(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.csv"
    options = "--roles q,down --metrics nss,spread,overlaps --rank-k 3 --hill-k 5"
    options += " --principal-rank 2 --alpha 0.25 --eta 0.01 --seed 4 --jobs 1"
    assert cli.main(["measure", *pair, "--out", str(out), *options.split()]) == 0
    settings = pairs.Settings(3, 2, 5, 0.25, 0.01)
    metrics = pairs.parse_metrics(["nss", "spread", "overlaps"])
    expected = pairs.measure_checkpoints(
        *pair, settings, metrics, ["q", "down"], seed=4
    )
    found = tables.read_table(out)
    for name in pairs.METRICS:
        pd.testing.assert_series_equal(found[name], expected[name], check_dtype=False)
    assert found["null_nss"].equals(expected["null_nss"])
    assert "All matrices, all: about" in capsys.readouterr().err
    bare = tmp_path / "bare.json"
    assert cli.main(["measure", *pair, "--out", str(bare), "--no-null"]) == 0
    records = json.loads(bare.read_text())
    assert len(records) == 7
    assert list(records[0]) == list(pairs.COLUMNS)
    assert records[0]["null_nss"] is None


def test_trajectory_writes_its_table(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "c-2", model(2))
    later = [str(tmp_path / "c-2"), pair[1]]
    out = tmp_path / "t.csv"
    arguments = ["trajectory", pair[0], *later, "--k", "4", "--out", str(out)]
    assert cli.main([*arguments, "--roles", "k"]) == 0
    found = tables.read_table(out).drop(columns="note")
    expected = pairs.trajectory(pair[0], later, 4, roles=["k"]).drop(columns="note")
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)
    said = capsys.readouterr().out.splitlines()
    assert said[1].split() == ["step", "1", "2"]
    assert {"stable_rank", "similarity_to_end_bf16"} < {
        x.split()[0] for x in said[2:-2]
    }
    assert cli.main([*arguments, "--roles", "k"]) == 1  # it is there now


def test_trajectory_against_another_training(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = [str(save(tmp_path / f"other-{n}", model(n))) for n in (5, 6)]
    out = tmp_path / "t.csv"
    command = ["trajectory", *pair, "--steps", "3", "--k", "4", "--out", str(out)]
    held = [f"seed={others[0]}", f"stage={','.join(others)}", f"itself={pair[1]}"]
    options = [word for text in held for word in ("--against", text)]
    assert cli.main([*command, *options, "--lr", "1e-3", "--no-readout"]) == 0
    table = tables.read_table(out)
    assert table["similarity_to_itself"].to_numpy() == pytest.approx(1)
    assert (table["similarity_to_stage"] < 0.99).all()
    assert (table["displacement"] > 0).all()
    assert "similarity_to_seed" in capsys.readouterr().out
    for wrong in ("seed", "=x", "seed=", "a=,x"):
        said = refusal(capsys, *command, "--force", "--against", wrong)
        assert "NAME=START,END" in said, wrong
    said = refusal(capsys, *command, "--force", "--against", f"seed={tmp_path / 'no'}")
    assert str(tmp_path / "no") in said


def test_a_trajectory_walks_where_the_rates_are_known(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = [str(save(tmp_path / f"checkpoint-{n}", model(n))) for n in (2, 4, 6)]
    out = tmp_path / "t.csv"
    command = ["trajectory", pair[0], *later, "--k", "4", "--out", str(out)]
    command += ["--roles", "k", "--no-readout", "--force"]

    def walked(*options: str) -> tuple[pd.DataFrame, str]:
        assert cli.main([*command, *options]) == 0
        return tables.read_table(out), capsys.readouterr().err

    none, said = walked()
    assert none["walk_similarity_to_end"].isna().all()
    assert none["increments_similarity_to_end"].notna().all()
    (line,) = (x for x in said.splitlines() if x.startswith("No walk"))
    assert "no trainer_state.json" in line
    assert "give --lr" in line
    options = ["--lr", "1e-2", "--lr-scheduler", "linear", "--warmup-steps", "1"]
    found, said = walked(*options, "--betas", "0.9,0.95")
    assert found["walk_similarity_to_end"].between(0.1, 1.001).all()
    assert (found["walk_stable_rank"] >= 1.0).all()
    (line,) = (x for x in said.splitlines() if x.startswith("Walk: "))
    assert "linear from 0.01, 1 steps of warm-up, down to 0 at step 6" in line
    assert "betas 0.9,0.95" in line
    off, _ = walked(*options, "--no-walk")
    assert off["walk_similarity_to_end"].isna().all()
    assert off["displacement"].notna().all()
    _, said = walked("--lr", "1e-9")
    assert "went farther than all steps in one direction" in said
    history = [{"step": n, "learning_rate": 1e-2} for n in (2, 4, 6)]
    state = Path(later[-1]) / "trainer_state.json"
    state.write_text(json.dumps({"log_history": history}))
    left, said = walked()
    assert left["walk_similarity_to_end"].notna().all()
    assert "learning rates of 3 of 6 steps in" in said
    for wrong, told in (
        (["--warmup-steps", "2"], "without --lr"),
        (["--lr", "1", "--max-steps", "3"], "--max-steps 3"),
        (["--lr", "1", "--betas", "0.9"], "--betas 0.9, expected two"),
        (["--lr", "1", "--betas", "0.9,2"], "betas (0.9, 2.0)"),
    ):
        assert cli.main([*command, *wrong]) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert told in last


def test_a_distance_that_no_steps_can_go_is_said(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["measure", *pair, "--out", str(tmp_path / "t.csv"), "--force"]
    command += ["--metrics", "cheap", "--no-null", "--steps", "4"]
    for lr, warned in (("1e-9", True), ("10", False)):
        assert cli.main([*command, "--lr", lr]) == 0
        said = capsys.readouterr().out
        assert ("went farther than all steps in one direction" in said) == warned


def test_two_files_are_a_pair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for i, file in enumerate(files):
        save_file({"w": noise(8, 8, seed=i)}, file)
    out = tmp_path / "t.csv"
    assert cli.main(["measure", *map(str, files), "--out", str(out)]) == 0
    assert list(tables.read_table(out)["matrix"]) == ["w"]


# --- bad input -------------------------------------------------------------------


def test_earlier_output_is_untouched(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.csv"
    out.write_text("earlier")
    assert "pass --force" in refusal(capsys, "measure", *pair, "--out", out)
    assert out.read_text() == "earlier"
    # not even by a measurement that fails
    refusal(capsys, "measure", pair[0], tmp_path, "--out", out, "--force")
    assert out.read_text() == "earlier"
    assert cli.main(["measure", *pair, "--out", str(out), "--force"]) == 0
    assert len(tables.read_table(out)) == 7


def test_broken_checkpoints_are_one_line(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.csv"
    shards = sorted(Path(pair[1]).glob("*.safetensors"))

    def said(after: object = pair[1]) -> str:
        line = refusal(capsys, "measure", pair[0], after, "--out", out)
        assert not out.exists()
        assert not tables.partial_path(out).exists()
        return line

    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-10])
    assert f"{shards[1]} is truncated or damaged" in said()
    shards[1].unlink()
    assert "lacks 1 of 3 shards of its index" in said()
    (tmp_path / "empty").mkdir()
    assert "holds no .safetensors file" in said(tmp_path / "empty")
    assert "does not exist" in said(tmp_path / "none")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin cannot be read" in said(tmp_path / "pickled")
    other = save(tmp_path / "other", {"w": noise(4, 4, seed=0)})
    assert "no matrix in common" in said(other)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission_is_one_line(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(pair[0]) / "model.safetensors").chmod(0)
    line = refusal(capsys, "measure", *pair, "--out", tmp_path / "t.csv")
    assert "ermission" in line


def test_a_full_place_is_one_line(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.csv"
    tables.partial_path(out).mkdir()
    assert cli.main(["measure", *pair, "--out", str(out), "--force"]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    place = tables.partial_path(out)
    assert told.startswith(f"opd-geometry: {place} is no regular file")
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--roles", "queries"], "expected a collection out of"),
        (["--metrics", "speed"], "unknown metric 'speed', expected a group"),
        (["--metrics", ","], "no metric asked for"),
        (["--alpha", "0"], "expected 0 < alpha"),
        (["--eta", "1"], "0 <= eta < 1"),
        (["--alpha", "nan"], "expected 0 < alpha"),
    ],
)
def test_impossible_options_are_one_line(
    options: list[str],
    said: str,
    pair: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "t.csv"
    assert said in refusal(capsys, "measure", *pair, "--out", out, *options)


@pytest.mark.parametrize(
    "option", [("--rank-k", "0"), ("--hill-k", "1"), ("--jobs", "0"), ("--seed", "-1")]
)
def test_numbers_out_of_range_are_one_line(
    option: tuple[str, str],
    pair: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "t.csv"
    assert cli.main(["measure", *pair, "--out", str(out), *option]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert f"Invalid value for '{option[0]}'" in said.err
    assert not out.exists()


def test_a_negative_seed_is_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="seed = -1, expected 0 or larger"):
        pairs.plan_pair(*pair, seed=-1)


def test_values_that_are_not_finite_fail_at_the_end(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = model(1)
    name = "model.layers.1.self_attn.q_proj.weight"
    damaged[name][0, 0] = torch.nan
    b = save(tmp_path / "b", damaged)
    out = tmp_path / "t.csv"
    assert cli.main(["measure", pair[0], str(b), "--out", str(out)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        f"1 of 7 matrices could not be measured, {name}: 1 NaN and 0 inf after" in said
    )
    assert len(tables.read_table(out).dropna(subset="nss")) == 6


def test_angles_without_a_gap_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for i, file in enumerate(files):
        save_file({"w": torch.eye(64) + 1e-3 * i * noise(64, 64, seed=0)}, file)
    arguments = ["measure", *map(str, files), "--out", str(tmp_path / "t.csv")]
    assert cli.main(arguments) == 0
    assert "Warning: angles uncertain by 9.0e+01" in capsys.readouterr().err


# --- interrupted -----------------------------------------------------------------


def test_interrupted_command_goes_on(
    pair: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "t.csv"
    arguments = ["measure", *pair, "--out", str(out)]
    original = pair_commands._Display.show

    def interrupt(display: pair_commands._Display, done: pairs.Progress) -> None:
        original(display, done)
        if done.done == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(pair_commands._Display, "show", interrupt)
    assert cli.main(arguments) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert "finished matrices are kept" in said
    assert said.endswith("go on with --resume")
    monkeypatch.undo()
    assert "go on from it with --resume" in refusal(capsys, *arguments)
    assert cli.main([*arguments, "--resume"]) == 0
    assert "4/7" in capsys.readouterr().err
    straight = tmp_path / "straight.csv"
    assert cli.main(["measure", *pair, "--out", str(straight)]) == 0
    assert out.read_bytes() == straight.read_bytes()


def test_forecast_of_what_is_left(
    pair: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a second a byte and nothing else, the forecast is the bytes to be read."""
    speed = forecast.Speed(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    monkeypatch.setattr(forecast, "probe_speed", lambda plan: speed)
    plan = pairs.plan_pair(*pair, metrics=["nss"])
    whole = sum(task.n_bytes for task in plan.tasks)
    left = plan.tasks[2:]
    out = tmp_path / "t.csv"

    def forecasts(*options: str) -> list[str]:
        arguments = ["--metrics", "nss", "--jobs", "2", "--out", str(out), *options]
        assert cli.main(["measure", *pair, *arguments]) == 0
        told = capsys.readouterr().err.splitlines()
        return [line for line in told if line.endswith("on this machine")]

    def lines(projected: int) -> list[str]:
        return [
            f"{what} about {duration(seconds)} on this machine"
            for what, seconds in (
                ("Projected time (nss):", projected),
                *((f"All matrices, {t}:", whole) for t in ("cheap", "middle", "all")),
            )
        ]

    assert forecasts() == lines(whole)
    kept = pairs.run_plan(plan).to_dict("records")
    for n_done, expected in ((2, lines(sum(t.n_bytes for t in left))), (7, [])):
        out.unlink(missing_ok=True)
        with tables.growing(out, plan.description, resume=False) as partial:
            for row in kept[:n_done]:
                partial.add(row["matrix"], [row])
        assert forecasts("--resume") == expected


def test_a_killed_process_loses_no_finished_matrix(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "t.csv"
    arguments = ["measure", *pair, "--out", str(out)]
    slow = (
        "import sys, time; from opd_geometry import cli; "
        "from opd_geometry.geometry import pairs; rows = "
        "pairs.PairTask.rows; pairs.PairTask.rows = lambda task: "
        "(time.sleep(0.3), rows(task))[1]; sys.exit(cli.main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *arguments], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("2/7"):
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    kept = tables.partial_path(out).read_text().splitlines()
    assert len(kept) >= 3  # the description and two matrices
    assert cli.main([*arguments, "--resume"]) == 0
    straight = tmp_path / "straight.csv"
    assert cli.main(["measure", *pair, "--out", str(straight)]) == 0
    assert out.read_bytes() == straight.read_bytes()


def test_resuming_a_finished_table_ends_and_replaces_no_other(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `until opd-geometry measure ... --resume` does it."""
    out = tmp_path / "t.csv"
    quick = [*pair, "--out", str(out), "--metrics", "cheap", "--no-null"]
    arguments = ["measure", *quick, "--resume"]
    assert cli.main(arguments) == 0
    whole = out.read_bytes()
    capsys.readouterr()
    assert cli.main(arguments) == 0
    assert "is complete" in capsys.readouterr().err.splitlines()[-1]
    # Killed before the partial file was dropped, which is of all matrices or of some.
    plan = pairs.plan_pair(*pair, metrics=["cheap"], null=False)
    rows = {task.name: task.rows() for task in plan.tasks}
    for kept, code in (([*rows], 0), ([*rows][:2], 1)):
        with tables.growing(out, plan.description, resume=False) as partial:
            for name in kept:
                partial.add(name, rows[name])
        assert cli.main(arguments) == code
        assert out.read_bytes() == whole
        tables.partial_path(out).unlink(missing_ok=True)
    # Of other numbers, or other matrices: neither is lost.
    with tables.growing(out, plan.description, resume=False) as partial:
        for name, found in rows.items():
            partial.add(name, [{**row, "frobenius_norm": 7.0} for row in found])
    capsys.readouterr()
    assert "pass --force" in refusal(capsys, *arguments, "--quiet")
    assert out.read_bytes() == whole
    assert cli.main([*arguments, "--force"]) == 0
    assert out.read_bytes() != whole
    capsys.readouterr()
    assert "pass --force" in refusal(capsys, *arguments, "--quiet", "--roles", "q")
    steps = ["trajectory", *pair, "--steps", "3", "--k", "4", "--no-walk", "--resume"]
    steps += ["--out", str(tmp_path / "run.csv")]
    for _ in range(2):
        assert cli.main(steps) == 0
    assert "is complete" in capsys.readouterr().err.splitlines()[-1]
    assert cli.main([*steps, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_two_commands_do_not_write_one_table(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.csv"
    plan = pairs.plan_pair(*pair)
    with tables.growing(out, plan.description, resume=False):
        for option in ("--force", "--resume"):
            assert cli.main(["measure", *pair, "--out", str(out), option]) == 1
            said = capsys.readouterr().err.splitlines()[-1]
            assert "is being written by another process" in said
            assert not out.exists()
    assert cli.main(["measure", *pair, "--out", str(out), "--resume"]) == 0


def test_readmes_trajectory_works_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[1]
    text = (root / "README.md").read_text("utf8").replace("\\\n", " ")
    (line,) = (x for x in text.splitlines() if x.startswith("$ opd-geometry traj"))
    monkeypatch.chdir(root)
    words = [
        place
        for word in line.split()[2:]
        for place in (sorted(map(str, Path().glob(word))) if "*" in word else [word])
    ]
    words[words.index("run.csv")] = str(tmp_path / "run.csv")
    assert cli.main(words) == 0
    assert set(tables.read_table(tmp_path / "run.csv")["step"]) == {1, 2}
    size = sum(
        f.stat().st_size for f in (root / "data/checkpoints/tiny-run").rglob("*")
    )
    assert size < 1_000_000

"""Fresh runs are held against the committed spread; draws are seeded and committed."""

import math
import os
from pathlib import Path
from typing import Any

import children
import pandas as pd
import pytest
from children import Child

from opd_geometry import files
from opd_geometry.analysis import audit
from opd_geometry.analysis.audit import draw, held_against, readings
from opd_geometry.experiments import measure, profiles
from opd_geometry.experiments.listing import read_lines, write_listing
from opd_geometry.experiments.records import digest_of
from opd_geometry.experiments.runs import provenance

# --- the rule ----------------------------------------------------------------------

COMMITTED = pd.DataFrame(
    {
        0: [2.0, 50.0, 0.0, math.nan],
        1: [3.0, 50.0, 0.0, math.nan],
        2: [2.5, 50.0, 0.0, math.nan],
    },
    index=["rank", "same", "zero", "absent"],
)


def held(seed: int, **changed: float) -> pd.DataFrame:
    """The committed values of a seed, some of them changed, held against all."""
    fresh = COMMITTED[seed].copy()
    for metric, value in changed.items():
        fresh[metric] = value
    return held_against(fresh, COMMITTED, seed)


def test_equal_values_have_no_distance() -> None:
    rows = held(1)
    assert list(rows.index) == ["rank", "same", "zero"]  # nobody has the fourth
    assert (rows["distance"] == 0).all()
    assert not rows["outside"].any()
    shown = rows.loc["rank", ["fresh", "committed", "lowest", "highest"]]
    assert shown.tolist() == [3.0, 3.0, 2.0, 2.5]


@pytest.mark.parametrize(
    ("seed", "value", "distance", "outside"),
    [
        (0, 2.4, 0.8, False),
        (0, 2.5, 1.0, False),
        (0, 2.6, 1.2, True),
        (0, 1.4, 1.2, True),
        (1, 3.4, 0.8, False),  # near its own seed, although beyond all
        (1, 2.4, 1.2, True),  # among the others, but not where its own seed is
        (2, 3.5, 1.0, False),
        (2, 1.4, 1.1, True),
    ],
)
def test_the_unit_is_the_spread_of_the_others_and_the_zero_the_same_seed(
    seed: int, value: float, distance: float, outside: bool
) -> None:
    row = held(seed, rank=value).loc["rank"]
    assert row["distance"] == pytest.approx(distance)
    assert row["outside"] == outside


def test_a_committed_number_that_is_wrong_does_not_excuse_itself() -> None:
    wrong = COMMITTED.copy()
    wrong.loc["rank", 1] = 9.0
    row = held_against(COMMITTED[1], wrong, 1).loc["rank"]
    assert row["distance"] == pytest.approx(12.0)


def test_what_all_seeds_share_may_differ_in_its_last_digits() -> None:
    assert held(0, same=50.04).loc["same", "distance"] == pytest.approx(0.8)
    assert held(0, same=50.06).loc["same", "outside"]
    assert held(0, zero=1e-9).loc["zero", "distance"] == math.inf


def test_a_value_that_only_one_has_lies_outside() -> None:
    rows = held(0, absent=1.0, rank=math.nan)
    assert rows["outside"].to_dict() == {
        "rank": True,
        "same": False,
        "zero": False,
        "absent": True,
    }


# As the claims read them: of the attention matrices.
TRAJECTORIES = ("stable_rank", "stable_rank_bf16", "frobenius_norm", "hill_alpha")


# --- what is compared ----------------------------------------------------------------


def rows_of(seed: int, **values: Any) -> list[tuple[object, ...]]:
    """Two attention matrices and a larger one; each metric is given for the three."""
    rows: list[tuple[object, ...]] = []
    for i, (role, size) in enumerate((("q", 10.0), ("o", 10.0), ("up", 80.0))):
        place = ("id", "opd", seed)
        rows.append((*place, 0, role, role, 0, "parameters", size))
        for metric, numbers in values.items():
            rows.append((*place, 5, role, role, 0, metric, 10.0 * numbers[i]))
            rows.append((*place, 10, role, role, 0, metric, numbers[i]))
    solved = [(5, "accuracy/chain", 0.25), (10, "accuracy/chain", 0.5)]
    rows += [("id", "opd", seed, s, "", "model", -1, m, v) for s, m, v in solved]
    return rows


def test_readings_are_the_means_that_the_claims_take() -> None:
    given = {
        "sparsity": [0.0, 0.0, 1.0],
        "density": [0.0, 0.0, 0.9],
        "similarity_to_end": [0.01, 0.03, 9.0],
        "leak": [0.1, 0.2, 0.6],
    }
    given |= {metric: [1.0, 3.0, 100.0] for metric in TRAJECTORIES}
    table = pd.DataFrame(rows_of(0, **given), columns=measure.COLUMNS)
    strangers = table.assign(arm="rlvr", value=7.0)
    found = readings(pd.concat([table, strangers]), "opd")[0].dropna()
    assert found.to_dict() == pytest.approx(
        {
            "sparsity": 0.8,  # by size
            "density": 0.3,
            "leak": 0.3,
            **dict.fromkeys(TRAJECTORIES, 2.0),
            "similarity_to_end": 0.2,  # at the first checkpoint
            "accuracy/chain": 0.5,
        }
    )


# --- the draw ------------------------------------------------------------------------


@pytest.fixture
def shelf(data: Path) -> list[str]:
    """Smoke runs listed as committed: three seeds of two arms, two of a third."""
    known = [(arm, seed) for arm in ("sft", "opd") for seed in (0, 1, 4)]
    known += [("rlvr", 0), ("rlvr", 1)]
    runs = [profiles.build("smoke", arm, seed) for arm, seed in known]
    same = {"steps": 10, "wall_seconds": 1.0, "machine": "theirs"}
    same |= {"table_sha256": "0" * 64}
    rows = [{"run": run.key(), "arm": run.arm, "seed": run.seed} for run in runs]
    path = measure.provenance_path()
    path.parent.mkdir(parents=True)
    write_listing(path, [], [row | same for row in rows])
    return [run.name for run in runs if run.arm != "rlvr"]


def names(sample: int, seed: int, *arms: str) -> list[str]:
    return [
        run.name for run in draw("smoke", sample, seed, arms or profiles.PUBLISHED_ARMS)
    ]


def test_draws_are_committed_runs_whose_arm_has_a_spread(shelf: list[str]) -> None:
    for seed in range(5):
        assert sorted(names(6, seed)) == sorted(shelf)
    assert {name for seed in range(40) for name in names(1, seed)} == set(shelf)


def test_draws_are_seeded_and_without_repetition(shelf: list[str]) -> None:
    assert names(3, 7) == names(3, 7)
    assert len({tuple(names(3, seed)) for seed in range(10)}) > 3
    assert all(len(set(names(4, seed))) == 4 for seed in range(10))


def test_draws_keep_to_the_arms(shelf: list[str]) -> None:
    assert sorted(names(3, 0, "opd")) == sorted(n for n in shelf if n[:4] == "opd-")
    with pytest.raises(ValueError, match="sample 4: expected 1 to 3, the committed "):
        names(4, 0, "opd")
    with pytest.raises(ValueError, match="sample 1: expected none, there are no "):
        names(1, 0, "rlvr")  # two seeds: the other one alone has no spread


def test_says_whose_teacher_is_trained_anew() -> None:
    own, committed = (
        profiles.build("published", a, 0) for a in ("opd-teacher-x1", "opd")
    )
    assert audit.taught_anew([committed, own]).startswith("opd-teacher-x1: the teacher")
    assert audit.taught_anew([committed]) == ""


def test_says_on_which_machines(shelf: list[str]) -> None:
    said = audit.machines(draw("smoke", 2, 0, ["opd"]))
    assert said == f"committed on theirs, trained now on {provenance()['machine']}"


# --- a place of its own --------------------------------------------------------------


def test_an_audit_sees_what_is_committed_and_no_finished_run(data: Path) -> None:
    for name in ("checkpoints", "measurements", "runs/sft-s0-abc"):
        (data / name).mkdir(parents=True)
    (data / "measurements" / "runs.csv").write_text("run\n")
    with audit.apart() as place:
        assert place == audit.data_directory()
        assert place.parent == data / "audit"
        assert (place / "measurements" / "runs.csv").read_text() == "run\n"
        assert not (place / "runs").exists()
        (place / "runs").mkdir()
    assert audit.data_directory() == data
    with audit.apart() as again:  # goes on from there
        assert (again / "runs").is_dir()
    audit.clear(place)
    assert sorted(os.listdir(data)) == ["checkpoints", "measurements", "runs"]
    assert (data / "measurements" / "runs.csv").is_file()


def test_an_audit_of_a_read_only_checkout_reads_what_is_committed_there(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = data.with_name("checkout")
    (checkout / "measurements").mkdir(parents=True)
    (checkout / "measurements" / "runs.csv").write_text("run\n")
    monkeypatch.setattr(files, "CHECKOUT_DATA", checkout)
    with audit.apart() as place:
        found = files.on_shelf("measurements/runs.csv")
        assert found == checkout / "measurements" / "runs.csv"
        (place / "measurements").mkdir()  # nothing there that leads nowhere
    audit.clear(place)
    assert sorted(os.listdir(checkout)) == ["measurements"]


def test_another_library_begins_anew(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with audit.apart() as place:
        pass
    monkeypatch.setattr(audit, "library_digest", lambda _: "0" * 64)
    with audit.apart() as other:
        assert other != place


def test_two_audits_do_not_share_a_place(data: Path) -> None:
    """The first to end would clear away what the other one trains."""
    with audit.apart() as place, pytest.raises(ValueError, match="another audit is at"):
        Child(data, children.enter_audit).result()
    Child(data, children.enter_audit).result()
    with audit.apart() as again:
        audit.clear(again)
    assert not place.exists()


def test_what_was_killed_while_it_was_cleared_is_not_taken_for_trained(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, **how: object) -> None:
        if path.is_dir():
            raise KeyboardInterrupt

    with audit.apart() as place:
        (place / "runs").mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(audit.shutil, "rmtree", killed)
            with pytest.raises(KeyboardInterrupt):
                audit.clear(place)
    with audit.apart() as again:
        assert again == place
        assert not (again / "runs").exists()
        audit.clear(again)
    assert not (data / "audit").exists()


def test_a_place_that_cannot_be_written_is_one_line(data: Path) -> None:
    data.mkdir()
    (data / "audit").write_text("")
    with pytest.raises(ValueError, match="cannot write below"), audit.apart():
        pass


# --- all of it -----------------------------------------------------------------------


def test_audit_is_green_until_a_committed_number_is_changed(data: Path) -> None:
    def call(*arguments: str) -> tuple[int, str, str]:
        command, *rest = arguments
        chosen = ("fork", command, "--profile", "smoke", *rest)
        return Child(data, children.command, *chosen).result()

    ours = ("--arms", "sft", "--seeds", "0-2")
    assert call("run", *ours, "--jobs", "2")[0] == 0
    assert call("commit", *ours)[0] == 0
    asked = ("audit", "--sample", "3", "--arms", "sft", "--jobs", "2")
    code, out, err = call(*asked)
    assert (code, len(out.split("distance in units"))) == (0, 4)
    assert "done in" in err  # trained, although both are finished in data/runs
    assert "to do. Time left, 2 at a time: " in out
    assert "outside" not in out
    assert out.splitlines()[-1].endswith("3 runs lie within the committed spread")
    assert not (data / "audit").exists()

    (path,) = data.glob("measurements/sft-s1-*.parquet")
    table = pd.read_parquet(path)
    changed = (table["metric"] == "stable_rank") & table["role"].isin(["q", "k"])
    table.loc[changed, "value"] *= 3
    table.to_parquet(path)
    listing = data / "measurements" / "runs.csv"  # as if committed so
    lines = read_lines(listing)
    row = next(line for line in lines if line["seed"] == "1")
    write_listing(listing, lines, [row | {"table_sha256": digest_of(path)}])
    code, out, err = call(*asked)
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith("opd-geometry:")]
    assert "1 of " in line
    assert "values lie outside the committed spread: stable_rank of sft-s1 by " in line
    assert f"is kept in {data / 'audit'}" in line
    assert [text.split()[0] for text in out.splitlines() if "outside" in text] == [
        "stable_rank"
    ]
    kept = sorted((data / "audit").glob("*/runs/sft-s*/done.json"))
    assert len(kept) == 3
    times = [path.stat().st_mtime_ns for path in kept]
    assert call(*asked)[0] == 1
    assert times == [path.stat().st_mtime_ns for path in kept]  # not trained again

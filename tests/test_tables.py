import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from opd_geometry.geometry import tables

TABLE = pd.DataFrame(
    {
        "matrix": ["a", "b"],
        "layer": [0, -1],
        "nss": [1 / 3 * 1e-9, math.nan],
        "note": ["", "3 NaN and 0 inf after"],
    }
)
WHAT = {"table": "measure", "seed": 0}


@pytest.mark.parametrize("suffix", tables.SUFFIXES)
def test_every_digit_survives(suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f"table{suffix}"
    tables.finish(out, TABLE)
    found = tables.read_table(out)
    assert found["nss"][0] == TABLE["nss"][0]
    assert math.isnan(found["nss"][1])
    assert list(found["layer"]) == [0, -1]
    assert list(found.columns) == list(TABLE.columns)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("suffix", tables.SUFFIXES)
def test_damaged_table_is_named(suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f"table{suffix}"
    out.write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot be read "):
        tables.read_table(out)


def test_output_is_checked_before_anything_is_computed(tmp_path: Path) -> None:
    def refused(out: Path, force: bool = False, resume: bool = False) -> str:
        with pytest.raises(ValueError, match=r"expected|go on") as error:
            tables.check_output(out, force, resume)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "ends in '.xlsx'" in refused(tmp_path / "t.xlsx")
    assert "is no directory" in refused(tmp_path / "none" / "t.csv")
    file = tmp_path / "file"
    file.write_text("")
    assert "is no directory" in refused(file / "t.csv")
    (tmp_path / "d.csv").mkdir()
    assert "is a directory" in refused(tmp_path / "d.csv", force=True)
    out = tmp_path / "t.csv"
    out.write_text("earlier")
    assert "exists, expected a new file; pass --force" in refused(out)
    tables.check_output(out, force=False, resume=True)  # looked at with the plan
    tables.check_output(out, force=True, resume=False)
    out.unlink()
    tables.partial_path(out).write_text("{}")
    assert "left from an interrupted" in refused(out)
    tables.check_output(out, force=False, resume=True)
    tables.check_output(out, force=True, resume=False)


def interrupted(out: Path) -> None:
    with tables.growing(out, WHAT, resume=False) as partial:
        partial.add("a", [{"nss": 0.1 + 0.2, "note": ""}])
        partial.add("b", [{"nss": math.nan, "note": "é"}])
        raise KeyboardInterrupt


def test_finished_rows_survive_an_interruption(tmp_path: Path) -> None:
    out = tmp_path / "t.csv"
    with pytest.raises(KeyboardInterrupt):
        interrupted(out)
    assert not out.exists()
    with tables.growing(out, WHAT, resume=True) as partial:
        assert list(partial.done) == ["a", "b"]
        assert partial.done["a"] == [{"nss": 0.1 + 0.2, "note": ""}]
        assert math.isnan(partial.done["b"][0]["nss"])
        partial.add("c", [{"nss": 1.0}])
    with tables.growing(out, WHAT, resume=True) as partial:
        assert list(partial.done) == ["a", "b", "c"]
    with tables.growing(out, WHAT, resume=False) as partial:
        assert partial.done == {}


@pytest.mark.parametrize("n_bytes", [1, 7, 30])
def test_a_line_cut_short_is_measured_again(n_bytes: int, tmp_path: Path) -> None:
    out = tmp_path / "t.csv"
    with pytest.raises(KeyboardInterrupt):
        interrupted(out)
    path = tables.partial_path(out)
    os.truncate(path, path.stat().st_size - n_bytes)
    with tables.growing(out, WHAT, resume=True) as partial:
        kept = ["a"] if n_bytes > 1 else ["a", "b"]
        assert list(partial.done) == kept
        partial.add("c", [])
    lines = path.read_text().splitlines()
    assert [json.loads(line)[0] for line in lines[1:]] == [*kept, "c"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.replace("0.30", "0.31"),  # a digit of a number
        lambda line: line.replace('"a"', '"A"'),  # the name of another matrix
        lambda line: "",
        lambda line: "\x00" * len(line),
        lambda line: "[" * 100_000,
        lambda line: '["a", [], "0"]',
        lambda line: '{"a": 1}',
        lambda line: "7",
    ],
)
def test_a_damaged_line_is_measured_again(
    damage: Callable[[str], str], tmp_path: Path
) -> None:
    """Not lost with those behind it, and never taken over as it is."""
    out = tmp_path / "t.csv"
    with pytest.raises(KeyboardInterrupt):
        interrupted(out)
    path = tables.partial_path(out)
    lines = path.read_text().splitlines()
    lines[1] = damage(lines[1])
    path.write_text("\n".join(lines) + "\n")
    assert tables.finished(out, WHAT) == {"b"}
    with tables.growing(out, WHAT, resume=True) as partial:
        assert list(partial.done) == ["b"]
        partial.add("a", [{"nss": 0.5}])
    with tables.growing(out, WHAT, resume=True) as partial:
        assert list(partial.done) == ["b", "a"]
        assert partial.done["a"] == [{"nss": 0.5}]


def test_a_table_whose_process_was_killed_at_the_end_is_finished(
    tmp_path: Path,
) -> None:
    """Between the table's new name and its partial file's end."""
    out = tmp_path / "t.csv"
    with pytest.raises(KeyboardInterrupt):
        interrupted(out)
    out.write_text("whole")
    with pytest.raises(ValueError, match="exists, expected a new file"):
        tables.check_output(out, force=False)
    tables.check_output(out, force=False, resume=True)
    tables.finish(out, TABLE)
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_no_lock_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks = tmp_path / "locks"
    locks.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(locks))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            interrupted(tmp_path / "t.csv")
    with tables.growing(tmp_path / "t.csv", WHAT, resume=True):
        assert len([*locks.iterdir()]) == 1
    assert not [*locks.iterdir()]


def test_another_measurement_is_not_gone_on_from(tmp_path: Path) -> None:
    out = tmp_path / "t.csv"
    with pytest.raises(KeyboardInterrupt):
        interrupted(out)
    before = tables.partial_path(out).read_bytes()
    with (
        pytest.raises(ValueError, match=r"of another measurement \(it differs in seed"),
        tables.growing(out, WHAT | {"seed": 1}, resume=True),
    ):
        pass
    assert tables.partial_path(out).read_bytes() == before
    tables.partial_path(out).write_text("not json\n")
    with (
        pytest.raises(ValueError, match="does not begin with what is measured"),
        tables.growing(out, WHAT, resume=True),
    ):
        pass


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    out = tmp_path / "t.csv"
    tables.partial_path(out).mkdir()  # as good as no permission, also for root
    with (
        pytest.raises(ValueError, match=r"cannot write below .*; make room") as error,
        tables.growing(out, WHAT, resume=False),
    ):
        pass
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv.partial"]


def test_two_processes_do_not_write_one_table(tmp_path: Path) -> None:
    out = tmp_path / "t.csv"
    with tables.growing(out, WHAT, resume=False) as partial:
        partial.add("a", [{"nss": 1.0}])
        before = tables.partial_path(out).read_bytes()
        for resume in (False, True):
            with (
                pytest.raises(ValueError, match="written by another process"),
                tables.growing(out, WHAT, resume=resume),
            ):
                pass
        assert tables.partial_path(out).read_bytes() == before
    with tables.growing(out, WHAT, resume=True) as partial:  # once it is free
        assert list(partial.done) == ["a"]


def test_a_partial_table_is_a_file(tmp_path: Path) -> None:
    """A pipe would be waited for, whatever is asked for."""
    out = tmp_path / "t.csv"
    os.mkfifo(tables.partial_path(out))
    for force, resume in ((False, True), (True, False), (False, False)):
        with pytest.raises(ValueError, match=r"t.csv.partial is no regular file"):
            tables.check_output(out, force, resume)


def test_an_empty_partial_table_is_begun_anew(tmp_path: Path) -> None:
    out = tmp_path / "t.csv"
    tables.partial_path(out).touch()
    with tables.growing(out, WHAT, resume=True) as partial:
        assert partial.done == {}
    assert json.loads(tables.partial_path(out).read_text()) == WHAT

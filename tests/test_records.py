"""Records, digests and locks of a run's directory, damaged in every way."""

import errno
import fcntl
import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import children
import pytest
from children import Child

from opd_geometry.experiments import records
from opd_geometry.experiments.records import (
    COUNT,
    MEASURED,
    NUMBER_OR_NONE,
    SECONDS,
    TEXT,
    check_seal,
    is_locked,
    locked,
    read_history,
    read_json,
    seal,
    sealing,
    unseal,
    write_json,
    write_sealed_json,
)
from opd_geometry.experiments.shelf import committed_csv

DATA = Path(__file__).parents[1] / "data"
ODD: tuple[Any, ...] = ("3", [3], {"a": 3}, True, None, 3.5, -1, 10**30, float("nan"))


@pytest.mark.parametrize(
    ("check", "right"),
    [(COUNT, (0, 7)), (SECONDS, (0, 2.5)), (TEXT, ("",)), (NUMBER_OR_NONE, (None, 1))],
)
def test_a_value_of_another_kind_is_one_line(
    check: records.Check, right: tuple[Any, ...], tmp_path: Path
) -> None:
    path = tmp_path / "done.json"
    for value in right:
        write_json(path, {"key": value})
        assert read_json(path, {"key": check}) == {"key": value}
    wrong = [value for value in ODD if not check[0](value)]
    assert len(wrong) >= 6
    for value in wrong:
        write_json(path, {"key": value})
        with pytest.raises(ValueError, match=r"damaged \(key is .* and not ") as error:
            read_json(path, {"key": check})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["step", "metric", "value"])
def test_a_history_with_a_wrong_record_is_one_line(key: str, tmp_path: Path) -> None:
    path, good = tmp_path / "history.json", {"step": 1, "metric": "loss", "value": 0.5}
    write_json(path, {"records": [good, good | {"value": float("nan")}]})
    assert len(read_history(path)) == 2
    check = {"step": COUNT, "metric": TEXT, "value": MEASURED}[key]
    for value in [value for value in ODD if not check[0](value)]:
        write_json(path, {"records": [good, good | {key: value}]})
        with pytest.raises(ValueError, match="missing or damaged") as error:
            read_history(path)
        assert "\n" not in str(error.value)
    for records_ in ({}, "x", [1], [[]], [{}]):
        write_json(path, {"records": records_})
        with pytest.raises(ValueError, match="a list of records with step, metric"):
            read_history(path)


def test_nesting_without_end_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "done.json"
    path.write_text("[" * 10**5)
    with pytest.raises(ValueError, match=r"done\.json is missing or damaged"):
        read_json(path, {})


# --- digests -------------------------------------------------------------------------


def test_no_flipped_bit_of_a_sealed_file_is_silent(tmp_path: Path) -> None:
    path, draw = tmp_path / "done.json", random.Random(0)
    write_sealed_json(path, {"wall_seconds": 12.5, "machine": "here"})
    whole = path.read_bytes()
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"not that of done\.json"):
            read_json(path, {"wall_seconds": SECONDS})
    path.write_bytes(whole)
    assert read_json(path, {"wall_seconds": SECONDS})["wall_seconds"] == 12.5


def test_the_digest_is_the_one_that_sha256sum_checks(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    with sealing(path) as draft:
        draft.write_bytes(b"weights")
    said = subprocess.run(
        [shutil.which("sha256sum") or "sha256sum", "-c", "state.pt.sha256"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "state.pt: OK\n"


def test_a_file_is_recognised_wherever_its_writer_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again and again, between the digest and the file."""
    path = tmp_path / "state.pt"
    with sealing(path) as draft:
        draft.write_bytes(b"0")

    def write(content: bytes, deadly: bool) -> None:
        replace = os.replace

        def dying(source: Any, target: Any) -> None:
            if deadly and Path(target) == path:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            with sealing(path) as draft:
                draft.write_bytes(content)

    for content in (b"1", b"2"):
        with pytest.raises(KeyboardInterrupt):
            write(content, deadly=True)
        assert path.read_bytes() == b"0"
        assert check_seal(path)
    write(b"3", deadly=False)
    assert check_seal(path)
    path.write_bytes(b"1")  # what never took its place
    with pytest.raises(ValueError, match="not that of state\\.pt"):
        check_seal(path)
    unseal(path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_digest_fits_nothing_and_none_is_none(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(b"weights")
    assert not check_seal(path)
    seal(path)
    assert check_seal(path)
    for content in (b"", b"\xff\x00", b"0" * 64 + b"  state.pt\n"):
        (tmp_path / "state.pt.sha256").write_bytes(content)
        with pytest.raises(ValueError, match="not that of"):
            check_seal(path)


# --- locks ---------------------------------------------------------------------------


def test_waiting_says_whose_and_how_long(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data.mkdir()
    place = data / "lock"
    other = Child(data, children.hold_lock, place, 1.5)
    while not (data / "held").exists():
        assert other.process.is_alive()
    assert is_locked(place)
    owner = json.loads(place.read_text())
    place.write_text(json.dumps(owner | {"since": owner["since"] - 7200}))
    with locked(place, "run opd-s0"):
        assert json.loads(place.read_text())["pid"] == os.getpid()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"waiting for run opd-s0: process {other.process.pid} on")
    assert said[0].endswith("has had it for 2 h 00 min")
    assert not is_locked(place)
    for damaged in ("", "{", "[]", '{"since": "x"}', '{"since": 1}'):
        place.write_text(damaged)
        assert records.holder(place) == f"another process holds {place}"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for use in (lambda: is_locked(tmp_path / "lock"), lambda: enter(tmp_path / "lock")):
        with pytest.raises(ValueError, match="file system without locks") as error:
            use()
        assert "OPD_GEOMETRY_DATA" in str(error.value)


def enter(place: Path) -> None:
    with locked(place, "it"):
        raise AssertionError("there is no lock to hold")


# --- committed tables of text ------------------------------------------------------


def test_every_committed_table_of_text_is_as_it_was_written() -> None:
    found = [*DATA.glob("paper/*.csv"), *DATA.glob("unplaced/**/*.csv")]
    assert len(found) >= 17
    for path in (*found, DATA / "claims.csv"):
        assert check_seal(path), f"{path}: sha256sum NAME > NAME.sha256"


def test_a_flipped_bit_in_a_table_of_text_is_one_line(tmp_path: Path) -> None:
    draw = random.Random(4)
    for source in (*DATA.glob("paper/*.csv"), *DATA.glob("unplaced/*.csv")):
        path = tmp_path / source.name
        shutil.copy(source, path)
        with pytest.raises(ValueError, match=r"digest .* is missing; take it from"):
            committed_csv(path)
        shutil.copy(f"{source}.sha256", tmp_path)
        assert len(committed_csv(path)) > 2
        whole = source.read_bytes()
        for _ in range(10):
            broken = bytearray(whole)
            broken[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            path.write_bytes(broken)
            with pytest.raises(ValueError, match=rf"{path} is damaged: .*") as error:
                committed_csv(path)
            assert "\n" not in str(error.value)

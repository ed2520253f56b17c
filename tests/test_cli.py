import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import children
import nbformat
import pandas as pd
import pytest
from children import Child

from opd_geometry import cli, sources
from opd_geometry.analysis.claims import read_claims
from opd_geometry.book import explorer, own, site
from opd_geometry.experiments import measure, profiles, runs, schedule
from opd_geometry.experiments.listing import write_listing
from opd_geometry.experiments.measure import committed_provenance
from opd_geometry.geometry.checkpoints import list_matrices


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and the one line on stderr; nothing may be on stdout."""
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    assert out == ""
    err = err.removeprefix("\n")  # after the ^C that a terminal shows
    assert err.count("\n") == 1
    assert err.startswith("opd-geometry: ")
    return code, err


# --- help and bad input ----------------------------------------------------------


@pytest.mark.parametrize("name", ["", *cli.commands.commands])
def test_help_shows_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*name.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"Examples:\n  {'' if name else '  '}".strip() in out
    assert f"opd-geometry {name}" in out.split("Examples:")[1]


def test_commands_are_known() -> None:
    assert set(cli.commands.commands) == {
        "run",
        "status",
        "plan",
        "commit",
        "starts",
        "pairs",
        "checkpoints",
        "claims",
        "audit",
        "report",
        "chapters",
        "book",
        "site",
        "measure",
        "trajectory",
    }


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, opd_geometry.cli; exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_judging_does_not_wait_for_torch(tmp_path: Path) -> None:
    """Reading and judging what is committed is what it does; no run is trained."""
    code = (
        "import sys; from opd_geometry import cli; code = cli.main(['claims', "
        "'--profile', 'published']); print(*sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-c", code]
    place = os.environ | {"OPD_GEOMETRY_DATA": str(tmp_path)}  # reads the checkout's
    told = subprocess.run(command, env=place, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    loaded = {*told.stdout.splitlines()[-1].split()}
    assert "opd_geometry.analysis.verdicts" in loaded
    assert not {"torch", "transformers", "seaborn"} & loaded
    assert not read_claims(tmp_path / "claims.csv").empty


@pytest.mark.parametrize(
    "command", ["run", "plan", "status", "commit", "starts", "pairs"]
)
@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--profile", "large", "unknown profile 'large'; expected smoke, laptop, pub"),
        ("--arms", "dpo", "unknown arm 'dpo'; expected sft,"),
        ("--seeds", "one", "seeds 'one': expected integers such as 3, 0,2 or 0-4"),
        ("--seeds", "0.5", "seeds '0.5': expected integers"),
    ],
)
def test_unknown_value_is_one_line(
    command: str,
    option: str,
    value: str,
    said: str,
    data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [command, "--profile", "smoke", option, value]
    code, line = complaint(capsys, *arguments)
    assert code == 1
    assert said in line
    assert not data.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "No such command 'train'"),
        (["run", "--speed", "9"], "No such option '--speed'"),
        (["run", "--jobs", "0"], "Invalid value for '--jobs'"),
        (["run", "--from", "here"], "Invalid value for '--from'"),
        (["run", "--seeds"], "Option '--seeds' requires an argument"),
        (["run", "extra"], "unexpected extra argument"),
        (["audit"], "Missing option '--sample'"),
        (["audit", "--sample", "0"], "Invalid value for '--sample'"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = complaint(capsys, *arguments)
    assert code == 2
    assert said in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "no checkpoint at checkpoints/laptop-base: expected a directory"),
        (["plan", "--profile", "laptop"], "no checkpoint at checkpoints/laptop-base"),
        (["checkpoints", "--profile", "smoke"], "base is not trained yet; run opd-g"),
        (["claims"], "no committed measurements of profile 'published'"),
        (["commit", "--profile", "smoke"], "no finished run of profile smoke"),
        (["pairs", "--profile", "smoke"], "0 finished runs and no pair of them"),
        (
            ["audit", "--sample", "1"],
            "sample 1: expected none, there are no committed",
        ),
        (["chapters", "99_none"], "no notebook 99_none in"),
    ],
)
def test_missing_files_are_one_line(
    arguments: list[str],
    said: str,
    data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, line = complaint(capsys, *arguments)
    assert code == 1
    assert said in line


def test_interrupt_and_system_errors_are_one_line(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raising(error: BaseException) -> None:
        def train(*_: object) -> None:
            raise error

        monkeypatch.setattr(schedule, "train_all", train)

    arguments = ["run", "--profile", "smoke"]
    raising(KeyboardInterrupt())
    code, line = complaint(capsys, *arguments)
    assert code == 130
    assert "interrupted" in line
    raising(OSError(28, "No space left on device", "somewhere"))
    code, line = complaint(capsys, *arguments)
    assert code == 1
    assert "No space left on device" in line
    raising(ValueError("one\n  two"))
    assert complaint(capsys, *arguments) == (1, "opd-geometry: one two\n")
    raising(ZeroDivisionError())  # a mistake of ours is not made to look like theirs
    with pytest.raises(ZeroDivisionError):
        cli.main(arguments)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--profile", "large", "unknown profile 'large'; expected smoke, laptop, pub"),
        ("--arms", "dpo", "unknown arm 'dpo'; expected sft,"),
    ],
)
def test_an_audit_of_nothing_known_is_one_line(
    option: str,
    value: str,
    said: str,
    data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, line = complaint(capsys, "audit", "--sample", "1", option, value)
    assert code == 1
    assert said in line
    assert not data.exists()


# --- training --------------------------------------------------------------------


def test_run_status_plan_and_commit(data: Path) -> None:
    def call(*arguments: str) -> tuple[int, str, str]:
        command, *rest = arguments
        chosen = ("fork", command, "--profile", "smoke", *rest)
        return Child(data, children.command, *chosen).result()

    code, out, _ = call("plan", "--arms", "opd,rlvr", "--seeds", "0-1")
    assert code == 0
    assert len(out.splitlines()) == 1 + 10 + 1
    assert out.splitlines()[-1] == "10 to do. Time left, 2 at a time: unknown."
    code, out, err = call("run", "--arms", "opd,rlvr", "--jobs", "2")
    assert (code, out) == (0, "")
    assert len([line for line in err.splitlines() if "done in" in line]) == 7
    code, out, err = call("run", "--arms", "opd,rlvr", "--jobs", "2")
    assert code == 0
    code, out, _ = call("status", "--arms", "opd,rlvr", "--seeds", "0-1")
    rows = [line.split() for line in out.splitlines()]
    assert [row[1] for row in rows[1:-1]].count("done") == 7
    assert out.splitlines()[-1] == "7 done, 3 to do."
    code, out, _ = call("plan", "--arms", "opd", "--seeds", "1", "--jobs", "1")
    assert code == 0
    assert "unknown" not in out  # as long as those that are done
    _, out, _ = call("plan", "--arms", "opd,mix-0.05", "--seeds", "1", "--jobs", "1")
    assert "4 done, 3 to do. Time left, 1 at a time: at least " in out
    code, out, _ = call("commit")
    assert out.startswith(f"3 of {len(profiles.ARMS)} runs are finished and now in ")
    rows = committed_provenance()
    assert set(rows["arm"]) == {"sft", "opd", "rlvr"}
    code, out, _ = call("checkpoints")
    base, teacher = out.splitlines()
    assert base.startswith("base is now in data/checkpoints/smoke-base, digest ")
    kept = data / "checkpoints" / "smoke-teacher"
    assert {m.dtype for m in list_matrices(kept)} == {"bfloat16"}
    assert teacher.endswith(runs.stored(kept).digest)


def test_failures_are_one_line_each(data: Path) -> None:
    (data / "checkpoints").mkdir(parents=True)
    for name in ("laptop-base", "laptop-teacher"):
        children.save_foreign(data / "checkpoints" / name)
    weights = data / "checkpoints" / "laptop-base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    call = ("fork", "run", "--arms", "opd", "--jobs", "1")
    code, out, err = Child(data, children.command, *call).result()
    assert (code, out) == (1, "")
    sft, opd = err.splitlines()[-2:]
    assert sft.startswith("opd-geometry: sft-s0-")
    assert "cannot load a model from" in sft
    assert opd.startswith("opd-geometry: opd-s0-")
    assert "needs sft-s0-" in opd
    call = ("fork", "status", "--arms", "opd")
    code, out, _ = Child(data, children.command, *call).result()
    assert "cannot load a model from" in out
    assert "1 failed, 1 to do." in out


def test_full_disk_leaves_nothing_half_written(data: Path) -> None:
    """Workers are spawned, as in earnest: one line a run, a code, no half files."""
    call = (20_000, "run", "--profile", "smoke", "--arms", "sft", "--jobs", "1")
    code, out, err = Child(data, children.command_with_small_files, *call).result()
    assert (code, out) == (1, "")
    assert "Traceback" not in err
    first, second, third = err.splitlines()[-3:]
    assert first.startswith("opd-geometry: base-early-s0-")
    assert "File too large" in first
    assert "make room there" in first
    assert "needs base-early-s0-" in second
    assert "needs base-s0-" in third
    (directory,) = (data / "runs").iterdir()
    assert {path.name for path in directory.iterdir()} == {
        "checkpoints",
        "failed.json",
        "lock",
        "run.json",
    }
    assert not list(directory.glob("checkpoints/*"))
    assert not list(data.rglob(".*"))
    code, _, err = Child(data, children.command, "fork", *call[1:]).result()
    assert code == 0
    assert not list(data.rglob("failed.json"))


# --- the book --------------------------------------------------------------------


def notebook_with(*names: str) -> str:
    """A notebook whose parameters have these names."""
    source = "\n".join(f"{name} = 0" for name in names)
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    return nbformat.writes(nbformat.v4.new_notebook(cells=[cell]))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with two notebooks, where nothing is really built."""
    root = tmp_path / "root"
    for name in ("notebooks/01_a.ipynb", "notebooks/02_b.ipynb", "notebooks/x.ipynb"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(notebook_with("profile", "seeds", "source", "jobs"))
    (root / "book" / "chapters").mkdir(parents=True)
    for name in ("01_a.ipynb", "02_b.ipynb"):
        (root / "book" / "chapters" / name).write_text("published")
    (root / "book" / "index.md").write_text("# A book")
    (root / "_toc.yml").write_text("root: book/index\n")
    (root / "_config.yml").write_text("title: A book\n")

    def execute(notebook: Path, output: Path, parameters: Any, cwd: Path) -> None:
        assert cwd == root
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(f"{notebook.stem} {parameters}")

    def build(source: Path, out: Path) -> Path:
        assert (source / "_toc.yml").is_file()
        out.mkdir(parents=True)
        return out / "index.html"

    def add_claims(source: Path, claims_csv: Path) -> None:
        (source / "data").mkdir(exist_ok=True)
        shutil.copy(claims_csv, source / "data" / "claims.csv")

    monkeypatch.setattr(cli, "repository", lambda: root)
    monkeypatch.setattr(site, "execute_chapter", execute)
    monkeypatch.setattr(site, "build_site", build)
    monkeypatch.setattr(site, "check_site", lambda *_: [])
    monkeypatch.setattr(site, "stage_chapter", shutil.copy)
    monkeypatch.setattr(site, "add_claims", add_claims)
    monkeypatch.setattr(site, "add_hero", lambda _: None)
    monkeypatch.setattr(site, "add_page", lambda *_: None)
    monkeypatch.setattr(explorer, "write_data", lambda _: None)
    monkeypatch.setattr(sources, "stale_chapters", lambda *_: [])
    return root


def chapters_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.ipynb")}


def test_chapters_are_executed_with_what_is_given(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = checkout / "book" / "chapters"
    assert cli.main(["chapters", "--seeds", "0-2", "notebooks/02_b.ipynb"]) == 0
    assert chapters_of(published) == {
        "01_a.ipynb": "published",
        "02_b.ipynb": "02_b {'seeds': '0-2'}",
    }
    assert cli.main(["chapters"]) == 0
    assert chapters_of(published) == {
        "01_a.ipynb": "01_a {}",
        "02_b.ipynb": "02_b {}",
    }
    assert "Executed book/chapters/01_a.ipynb" in capsys.readouterr().out


def test_chapters_of_a_read_only_checkout_lie_beside_the_data(
    checkout: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = chapters_of(checkout / "book" / "chapters")
    sources = chapters_of(checkout / "notebooks")
    monkeypatch.setattr(cli.os, "access", lambda path, mode: Path(path) != checkout)
    assert cli.main(["chapters", "02_b"]) == 0
    folder = data / "_build" / "chapters"
    assert chapters_of(folder) == {"02_b.ipynb": "02_b {}"}
    assert f"Executed {folder / '02_b.ipynb'}" in capsys.readouterr().out
    assert chapters_of(checkout / "book" / "chapters") == before
    assert chapters_of(checkout / "notebooks") == sources


def provenance(**columns: list[Any]) -> pd.DataFrame:
    return pd.DataFrame(columns)


def shelve(arms: Sequence[str] = profiles.ARMS) -> None:
    """List the arms' smoke runs as committed ones."""
    listing = measure.provenance_path()
    listing.parent.mkdir(parents=True)
    known = [profiles.build("smoke", arm, 0) for arm in arms]
    same = {"seed": 0, "steps": 10, "wall_seconds": 1.0, "machine": "theirs"}
    same |= {"table_sha256": "0" * 64}
    rows = [{"run": run.key(), "arm": run.arm} | same for run in known]
    write_listing(listing, [], rows)


def test_a_notebook_gets_the_parameters_that_it_has(
    checkout: Path, pretended: list[Any]
) -> None:
    (checkout / "notebooks" / "02_b.ipynb").write_text(notebook_with("before", "jobs"))
    assert cli.main(["book", "--profile", "smoke", "--jobs", "3"]) == 0
    executed = chapters_of(checkout / "_build" / "book" / "chapters")
    assert executed["02_b.ipynb"] == "02_b {'jobs': 3}"


def test_book_reads_its_notebooks_before_it_trains(
    checkout: Path, pretended: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / "notebooks" / "02_b.ipynb").write_text("broken")
    code, line = complaint(capsys, "book", "--profile", "smoke")
    assert code == 1
    assert "02_b.ipynb is no notebook" in line
    assert pretended == []


@pytest.fixture
def pretended(data: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Nothing is trained or judged; what was asked for is kept."""
    asked: list[Any] = []

    def train(
        profile: str, wanted: list[runs.Run], jobs: int, *_: Any
    ) -> dict[runs.Run, str]:
        asked.append((profile, sorted({run.arm for run in wanted}), jobs))
        return {}

    def load(profile: str, arms: Any, seeds: Any, source: str, *_: Any) -> Any:
        asked.append((profile, seeds, source))
        rows = provenance(
            seed=[0, 0, 0],
            machine=["ours", "ours", "theirs"],
            source=["this machine", "this machine", "committed"],
        )
        return pd.DataFrame(), rows

    def write(findings: object, path: Path) -> Path:
        path.write_text("claim\n")
        return path

    from opd_geometry.analysis import claims, regimes

    monkeypatch.setattr(schedule, "train_all", train)
    monkeypatch.setattr(measure, "load", load)
    monkeypatch.setattr(regimes, "claims_in_worlds", lambda tables: tables)
    monkeypatch.setattr(claims, "write_claims", write)
    monkeypatch.setattr(measure, "committed", lambda profile: pd.DataFrame())
    monkeypatch.setattr(own, "against_published", lambda *_: pd.DataFrame())
    monkeypatch.setattr(own, "page", lambda _: "# Yours")
    return asked


def test_book_is_the_readers_own(
    checkout: Path,
    pretended: list[Any],
    data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call = ["book", "--profile", "smoke", "--seeds", "0", "--jobs", "3"]
    assert cli.main(call) == 0
    place = checkout / "_build" / "book"
    given = {"profile": "smoke", "seeds": "0", "source": "local", "jobs": 3}
    theirs = {"01_a.ipynb": f"01_a {given}", "02_b.ipynb": f"02_b {given}"}
    assert chapters_of(place / "chapters") == theirs
    assert chapters_of(place / "source" / "book" / "chapters") == theirs
    assert set(chapters_of(checkout / "book" / "chapters").values()) == {"published"}
    assert (place / "source" / "data" / "claims.csv").read_text() == "claim\n"
    assert not (data / "claims.csv").exists()
    banner = (place / "source" / "_config.yml").read_text()
    assert "Profile smoke, seed 0. 1 run read from the committed" in " ".join(
        banner.split()
    )
    assert "2 runs trained here (ours)" in " ".join(banner.split())
    # nothing of this profile is committed, so every arm is trained
    assert pretended == [
        ("smoke", sorted(profiles.ARMS), 3),
        ("smoke", [0], "local"),
    ]
    assert f"Open {place / 'html' / 'index.html'}" in capsys.readouterr().out


def test_book_trains_the_readers_arms_where_the_rest_is_committed(
    checkout: Path, pretended: list[Any], data: Path
) -> None:
    shelve()
    assert cli.main(["book", "--profile", "smoke", "--from", "scratch"]) == 0
    assert pretended[0][1] == sorted(profiles.READER_ARMS)
    assert pretended[1] == ("smoke", [0], "scratch")
    chapter = checkout / "_build" / "book" / "chapters" / "01_a.ipynb"
    assert "'source': 'scratch'" in chapter.read_text()


def test_book_stops_at_a_failed_run(
    checkout: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = profiles.build("smoke", "opd", 0)
    monkeypatch.setattr(schedule, "train_all", lambda *_: {run: "no room"})
    code, line = complaint(capsys, "book", "--profile", "smoke")
    assert code == 1
    assert line == f"opd-geometry: {run.name}: no room\n"
    assert not (checkout / "_build").exists()


def test_site_renders_the_published_chapters(
    checkout: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(schedule, "train_all", None)
    monkeypatch.setattr(profiles, "PUBLISHED", "smoke")
    code, line = complaint(capsys, "site")
    assert code == 1
    assert "no committed measurements of profile smoke" in line
    shelve(["sft"])
    (data / "claims.csv").write_text("claim\n")
    assert cli.main(["site"]) == 0
    source = checkout / "_build" / "site" / "source"
    assert set(chapters_of(source / "book" / "chapters").values()) == {"published"}
    banner = (source / "_config.yml").read_text()
    assert "Profile smoke, seed 0. 1 run (theirs)." in " ".join(banner.split())
    monkeypatch.setattr(site, "check_site", lambda *_: ["a.html: bad", "b.html: bad"])
    (checkout / "_build" / "site" / "html").rmdir()
    assert cli.main(["site"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "opd-geometry: a.html: bad",
        "opd-geometry: b.html: bad",
    ]


def test_site_names_stale_chapters_and_fails_after_building(
    checkout: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(profiles, "PUBLISHED", "smoke")
    shelve(["sft"])
    (data / "claims.csv").write_text("claim\n")
    lines = ["book/chapters/01_a.ipynb was executed from another library: run x"]
    monkeypatch.setattr(sources, "stale_chapters", lambda root: lines)
    assert cli.main(["site"]) == 1
    out, err = capsys.readouterr()
    assert err == f"opd-geometry: {lines[0]}\n"
    assert out.startswith("Open ")


def test_banner_names_seeds_and_machines() -> None:
    rows = provenance(seed=[2, 0, 1], machine=["a", "b", "a"])
    assert cli.describe("laptop", rows) == (
        "Profile laptop, seeds 0, 1, 2. 3 runs (a; b)."
    )
    rows = provenance(seed=[4], machine=["a"], source=["this machine"])
    assert cli.describe("laptop", rows) == (
        "Profile laptop, seed 4. 1 run trained here (a)."
    )


def test_library_away_from_its_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "lib" / "opd" / "cli.py"))
    code, line = complaint(capsys, "site")
    assert code == 1
    assert "expected a checkout of the repository" in line


def test_books_are_built_beside_the_data_of_a_read_only_checkout(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = cli.repository()
    monkeypatch.setattr(cli.os, "access", lambda path, mode: Path(path) != root)
    assert cli.builds(root) == data / "_build"
    monkeypatch.setattr(cli.os, "access", lambda path, mode: True)
    assert cli.builds(root) == root / "_build"

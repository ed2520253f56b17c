"""A chapter remembers its notebook and the library's code, and nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

from opd_geometry import sources

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    "__init__.py": '"""A library."""\n',
    "top.py": '"""Top."""\nfrom lib.middle import value\n\nRESULT = value()\n',
    "middle.py": "def value():\n    from lib import low\n    return low.ONE + 1\n",
    "low.py": "import math\n\nfrom . import lowest\n\nONE = 1\n",
    "lowest.py": "ZERO = 0\n",
    "side.py": "TWO = 2\n",
}
Write = Callable[..., Path]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "lib"
    folder.mkdir()
    for name, text in MODULES.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def notebook(tmp_path: Path) -> Write:
    """Write notebooks/01_toy.ipynb with a text and these code cells."""

    def write(*code: str, text: str = "# A question") -> Path:
        cells = [nbformat.v4.new_markdown_cell(text)]
        cells += [nbformat.v4.new_code_cell(source) for source in code]
        path = tmp_path / "notebooks" / "01_toy.ipynb"
        path.parent.mkdir(exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        return path

    return write


@pytest.fixture
def chapter(notebook: Write, package: Path) -> Path:
    """A chapter executed from the notebook and the library as they are."""
    source = notebook("from lib import top", "print(top.RESULT)")
    path = source.parents[1] / "book" / "chapters" / source.name
    path.parent.mkdir(parents=True)
    executed = nbformat.read(source, as_version=4)
    executed.metadata[sources.STAMP] = sources.stamp(source, package)
    nbformat.write(executed, path)
    return path


def stale(package: Path) -> list[str]:
    return sources.stale_chapters(package.parent, package)


def test_no_committed_chapter_is_stale() -> None:
    assert sources.stale_chapters(ROOT) == []


def test_a_fresh_chapter_is_not_stale(chapter: Path, package: Path) -> None:
    assert stale(package) == []


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("top.py", "value()\n", "value() + 0.5\n"),
        ("middle.py", "+ 1", "+ 2"),
        ("low.py", "ONE = 1", "ONE = 1.0"),  # imported inside a function
        ("lowest.py", "0", "False"),
        ("__init__.py", "\n", "\nSETTING = 1\n"),
    ],
)
def test_another_code_makes_stale(
    chapter: Path, package: Path, module: str, old: str, new: str
) -> None:
    path = package / module
    path.write_text(path.read_text().replace(old, new, 1))
    assert stale(package) == [
        "book/chapters/01_toy.ipynb was executed from another library: "
        "run opd-geometry chapters 01_toy"
    ]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("top.py", "from lib.middle import (\n    value,  # why\n)\nRESULT = value()"),
        ("middle.py", MODULES["middle.py"].replace(":\n", ':\n    """Two."""\n', 1)),
        ("side.py", "TWO = 3\n"),  # nothing that the notebook imports reaches it
    ],
)
def test_words_layout_and_strangers_do_not(
    chapter: Path, package: Path, module: str, text: str
) -> None:
    assert (package / module).read_text() != text
    (package / module).write_text(text)
    assert stale(package) == []


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (("from lib import top", "print(top.RESULT + 1)"), "# A question"),
        (("from lib import top", "print(top.RESULT)"), "# Another question"),
        (("from lib import top",), "# A question"),
    ],
)
def test_another_notebook_makes_stale(
    chapter: Path, notebook: Write, package: Path, code: tuple[str, ...], text: str
) -> None:
    notebook(*code, text=text)
    (line,) = stale(package)
    assert "was executed from another notebook: run opd-geometry chapters" in line


def test_outputs_and_injected_parameters_are_not_the_notebook(
    chapter: Path, package: Path, notebook: Write
) -> None:
    source = package.parent / "notebooks" / chapter.name
    executed = nbformat.read(source, as_version=4)
    output = nbformat.v4.new_output("stream", text="3\n")
    executed.cells[-1].outputs = [output]
    injected = nbformat.v4.new_code_cell("seeds = 1")
    injected.metadata["tags"] = [sources.INJECTED]
    executed.cells.insert(1, injected)
    nbformat.write(executed, source)
    assert stale(package) == []


def test_a_chapter_that_remembers_nothing_is_stale(
    chapter: Path, package: Path
) -> None:
    content = json.loads(chapter.read_text())
    del content["metadata"][sources.STAMP]
    chapter.write_text(json.dumps(content))
    (line,) = stale(package)
    assert "was executed from unknown sources: run opd-geometry chapters" in line
    (package.parent / "notebooks" / chapter.name).unlink()
    (line,) = stale(package)
    assert "has no notebook in notebooks/: remove the chapter" in line


def test_what_cannot_be_read_is_one_line(chapter: Path, package: Path) -> None:
    (package / "low.py").write_text("ONE = = 1\n")
    with pytest.raises(ValueError, match=r"low\.py holds no Python in line 1: "):
        stale(package)
    chapter.write_text("{}")
    (package / "low.py").write_text(MODULES["low.py"])
    with pytest.raises(ValueError, match=r"01_toy\.ipynb is no notebook: expected cel"):
        stale(package)


def test_the_place_of_the_library_does_not_matter(
    chapter: Path, package: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere" / "lib"
    shutil.copytree(package, elsewhere)
    names = ["lib.top"]
    assert sources.library_digest(names, package) == sources.library_digest(
        names, elsewhere
    )


def test_what_is_run_at_any_import_counts(package: Path) -> None:
    before = sources.library_digest(["lib.side", "numpy"], package)
    assert before == sources.library_digest(["lib.side"], package)
    (package / "__init__.py").write_text("SETTING = 1\n")
    assert before != sources.library_digest(["lib.side"], package)


def test_the_hash_of_a_real_notebook_moves_with_the_rules(tmp_path: Path) -> None:
    copy = tmp_path / "opd_geometry"
    shutil.copytree(sources.PACKAGE, copy, ignore=shutil.ignore_patterns("__pyc*"))
    path = ROOT / "notebooks" / "02_distance.ipynb"
    before = sources.stamp(path, copy)
    assert before == sources.stamp(path)
    assert {len(digest) for digest in before.values()} == {64}
    (copy / "cli.py").write_text("")
    assert before == sources.stamp(path, copy)
    for module in (
        "analysis/verdicts.py",
        "geometry/spectra.py",
        "training/rollout.py",
    ):
        text = (copy / module).read_text()
        (copy / module).write_text(f"{text}\nCHANGED = True\n")
        assert before != sources.stamp(path, copy), module
        (copy / module).write_text(text)


@pytest.mark.parametrize(
    "how",
    [
        "from lib.room import deep",
        "import lib.room.deep",
        "from lib.room.deep import X",
    ],
)
def test_rooms_within_rooms_count(package: Path, how: str) -> None:
    room = package / "room"
    room.mkdir()
    (room / "__init__.py").write_text("")
    (room / "deep.py").write_text(
        "from . import beside\nfrom ..side import TWO\nX = 1\n"
    )
    (room / "beside.py").write_text("X = 1\n")
    (package / "top.py").write_text(f"{how}\n")
    before = sources.library_digest(["lib.top"], package)
    for path in (room / "__init__.py", room / "beside.py", package / "side.py"):
        text = path.read_text()
        path.write_text(f"{text}\nCHANGED = True\n")
        assert before != sources.library_digest(["lib.top"], package), path
        path.write_text(text)
    assert before == sources.library_digest(["lib.top"], package)

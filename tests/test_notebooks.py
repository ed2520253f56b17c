"""The chapters keep to their anatomy, and the pages print nothing that is not computed.

nbval re-runs the notebooks and compares their outputs; here stands what it lets pass.
"""

import ast
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode

from opd_geometry.analysis.statements import CLAIMS
from opd_geometry.book import chapters, figures
from opd_geometry.experiments import profiles
from opd_geometry.geometry import comparison

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/[0-9A-Z]*_*.ipynb"))
PAGES = sorted(ROOT.glob("book/*.md"))
NAMES = ["01_unplaced", "02_distance", "03_rank", "04_real_model", "05_directions"]
NAMES += ["06_controls", "07_regimes", "08_exclusions"]
NAMES += ["09_your_checkpoints", "A_choices", "B_bounds"]
SECTIONS = [
    "The question",
    "The runs",
    "The check",
    "What differs from the paper",
    "What would change our mind",
    "Take away",
    "Exercise",
]
# What only the book's own pages understand, and every other viewer shows as it is.
RAW_MARK = re.compile(r"\{[\w:-]+\}`|^:::|^```\{|^\([\w-]+\)=$", re.MULTILINE)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def said(cell: NotebookNode) -> str | None:
    """The text of a cell that does nothing but say one."""
    if cell.cell_type == "markdown":
        return cell.source
    match ast.parse(cell.source).body:
        case [ast.Expr(ast.Call(ast.Attribute(attr="say"), [ast.Constant(text), *_]))]:
            return str(text)
    return None


def prose(notebook: NotebookNode) -> str:
    return "\n\n".join(text for cell in notebook.cells if (text := said(cell)))


def tags(cell: NotebookNode) -> set[str]:
    return set(cell.metadata.get("tags", []))


def published(notebook: NotebookNode) -> dict[str, Any]:
    """What a notebook's outputs hold for its own text and for other pages."""
    stored = {}
    for cell in code(notebook):
        for output in cell.outputs:
            name = output.get("metadata", {}).get("scrapbook", {}).get("name")
            if name:
                stored[name] = output["data"]
    return stored


def test_every_chapter_is_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == NAMES


@each_notebook
def test_begins_with_its_parameters_and_checks_them(path: Path) -> None:
    first, second, *others = code(read(path))
    assert "parameters" in tags(first)
    assert not any("parameters" in tags(cell) for cell in [second, *others])
    names: dict[str, Any] = {}
    exec(first.source, names)  # plain assignments of the notebook itself
    del names["__builtins__"]
    if "profile" in names:
        assert list(names) == ["profile", "seeds", "source", "jobs"]
        assert chapters.check_parameters(names).seeds == (0, 1, 2, 3, 4)
        assert "chapters.check_parameters(globals())" in second.source
    elif "model" in names:
        assert list(names) == ["model"]
        assert (ROOT / "data" / "unplaced" / str(names["model"])).is_dir()
        assert "chapters.check_model(globals())" in second.source
    else:
        assert list(names) == ["before", "after"]
        assert all((ROOT / str(place)).is_dir() for place in names.values())
        assert "chapters.check_pair(globals())" in second.source


@each_notebook
def test_cells_fit_on_a_page(path: Path) -> None:
    notebook = read(path)
    assert 900 <= len(prose(notebook).split()) <= 2000
    computed = [cell for cell in code(notebook) if not said(cell)]
    assert max(len(cell.source.splitlines()) for cell in computed) <= 15
    compared = [c for c in computed if "nbval-ignore-output" not in tags(c)]
    assert len(compared) >= 6


@each_notebook
def test_no_line_is_lost_as_a_comment_of_myst(path: Path) -> None:
    cells = read(path).cells
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    shown = [o.get("data", {}) for cell in cells for o in cell.get("outputs", [])]
    texts += [data["text/markdown"] for data in shown if "text/markdown" in data]
    assert not re.findall(r"^%", "\n".join(texts), re.MULTILINE)


@each_notebook
def test_every_table_says_what_it_is(path: Path) -> None:
    cells = [cell for cell in code(read(path)) if "lead" not in tags(cell)]
    shown = [o.get("data", {}) for cell in cells for o in cell.outputs]
    tables = [x["text/html"] for x in shown if "<table" in x.get("text/html", "")]
    captions = [re.findall("<caption>(.+?)</caption>", x) for x in tables]
    assert all(len(found) == 1 for found in captions)
    assert len({found[0] for found in captions}) == len(captions)  # none twice


@each_notebook
def test_keeps_the_anatomy(path: Path) -> None:
    text = prose(read(path))
    titles = re.findall(r"^# (.+)$", text, re.MULTILINE)
    assert len(titles) == 1
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert [h for h in headings if h in SECTIONS] == SECTIONS
    assert len(re.findall(r"^\$\$$", text, re.MULTILINE)) <= 4  # two equations
    assert "<summary>Answer</summary>" in text
    assert any("assert " in cell.source for cell in code(read(path))[2:6])


@each_notebook
def test_figures_say_what_they_show_and_begin_with_the_finding(path: Path) -> None:
    cells = read(path).cells
    drawn = [i for i, c in enumerate(cells) if "image/png" in str(c.get("outputs"))]
    assert drawn
    for cell, below in ((cells[i], cells[i + 1]) for i in drawn):
        assert (
            "image/png" in cell.outputs[-1].data
        )  # its own, so that all viewers see it
        assert len(cell.metadata["alt"].split()) >= 20  # where nbconvert looks, too
        assert cell.metadata["mystnb"]["figure"]["name"].startswith("fig-")
        assert "caption" in tags(below)
        assert str(said(below)).strip().startswith("**")
        assert re.search("seeds|matrices", str(said(below)))


# Of printed numbers, of a bound on what can be seen, of the time a table takes.
WITHOUT_LIMIT = ("fig-feasible-shares", "fig-power", "fig-one-seed", "fig-own-cost")


@each_notebook
def test_captions_carry_the_detection_limit_of_what_they_show(path: Path) -> None:
    cells = read(path).cells
    for cell, below in pairwise(cells):
        name = cell.metadata.get("mystnb", {}).get("figure", {}).get("name", "")
        if name and name not in WITHOUT_LIMIT:
            text = " ".join((below.source + str(said(below))).split())
            assert "{limits}" in text or "Detection limit" in text, name


@each_notebook
def test_captions_say_their_n(path: Path) -> None:
    cells = read(path).cells
    for cell, below in pairwise(cells):
        name = cell.metadata.get("mystnb", {}).get("figure", {}).get("name", "")
        if name and name != "fig-own-cost":  # times of one machine
            text = " ".join((below.source + str(said(below))).split())
            assert re.search(r"\bn = |\{n(_\w+)?\}|\{seeds\}", text), name


@each_notebook
def test_reads_the_same_outside_the_book(path: Path) -> None:
    """In Jupyter, on GitHub and as papermill leaves it: no mark of the book's own."""
    assert not RAW_MARK.findall(prose(read(path)))
    for cell in code(read(path)):
        if said(cell):
            assert {"remove-input"} <= tags(cell)  # else the text stands there twice
            assert not RAW_MARK.findall(cell.outputs[0].data["text/markdown"])


@each_notebook
def test_belongs_to_no_machine_and_no_editor(path: Path) -> None:
    notebook = read(path)
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    assert "jupytext" not in path.read_text()
    assert not re.search(r"/(home|root|tmp|work)/", path.read_text())
    ids = [cell["id"] for cell in notebook.cells]
    assert len(set(ids)) == len(ids)


@each_notebook
def test_was_executed_from_top_to_bottom(path: Path) -> None:
    cells = code(read(path))
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1))
    assert not [o for c in cells for o in c.outputs if o.output_type == "error"]
    assert not [o for c in cells for o in c.outputs if o.get("name") == "stderr"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_value_glued_on_a_page_was_published(page: Path) -> None:
    text = page.read_text()
    wanted = re.findall(r"chapters/(\w+)\.ipynb::([^`]+)`", text)
    pairs = {(stem, key.rpartition(":")[0] or key) for stem, key in wanted}
    blocks = re.findall(r"```\{glue:\} (\S+)\n:doc: chapters/(\w+)\.ipynb", text)
    pairs |= {(stem, key) for key, stem in blocks}
    for stem, key in pairs:
        assert key in published(read(ROOT / "notebooks" / f"{stem}.ipynb"))


def test_the_map_has_every_figure_and_table_and_links_to_what_is_there() -> None:
    book = ROOT / "book"
    text = (book / "map.md").read_text()
    items = re.findall(r"^\| ((?:Figure|Table) \d), ", text, re.MULTILINE)
    assert items == [
        f"{kind} {n}" for kind in ("Figure", "Table") for n in range(1, 10)
    ]
    names = {name for path in NOTEBOOKS for name in figure_names(read(path))}
    names |= set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))
    wanted = re.findall(r"\{ref\}`[^`<]+ <([^>`]+)>`", text)
    assert text.count("{ref}") == len(wanted)
    assert set(wanted) <= names
    stems = {path.stem for path in NOTEBOOKS}
    for page in re.findall(r"\{doc\}`(?:[^`<]+<)?([^`>]+)>?`", text):
        folder, _, stem = page.rpartition("/")
        assert stem in stems if folder else (book / f"{stem}.md").is_file()


def figure_names(notebook: NotebookNode) -> set[str]:
    options = [cell.metadata.get("mystnb", {}) for cell in code(notebook)]
    return {option["figure"]["name"] for option in options if "figure" in option}


def test_pages_name_every_metric_arm_and_claim() -> None:
    notation = (ROOT / "book" / "notation.md").read_text()
    for name in (
        *comparison.METRICS,
        "similarity_to_end",
        "parameters",
        *(arm for arm in profiles.PUBLISHED_ARMS if "-projected" not in arm),
        *(f"-projected{suffix}" for suffix in figures.CONFINED_STYLES),
    ):
        assert f"`{name}`" in notation
    judged: set[object] = set()
    for path in NOTEBOOKS:
        for cell in code(read(path)):
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.Constant):
                    judged.add(node.value)
    assert {claim.id for claim in CLAIMS} <= judged


def test_an_unknown_parameter_stops_papermill_in_the_first_cell(tmp_path: Path) -> None:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    output = tmp_path / "out.ipynb"
    with pytest.raises(PapermillExecutionError) as caught:
        papermill.execute_notebook(
            str(NOTEBOOKS[1]), str(output), {"seed": 1}, progress_bar=False
        )
    assert caught.value.evalue == (
        "unknown parameter seed; expected profile, seeds, source, jobs"
    )
    executed = [cell for cell in code(read(output)) if cell.execution_count]
    assert len(executed) == 3  # parameters, the injected ones, the check
    (failure,) = [o for o in executed[-1].outputs if o.output_type == "error"]
    assert len(failure.traceback) == 1

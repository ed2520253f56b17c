"""Every number that the book prints leads back to data/measurements.

The walk, link by link: pages print what chapters have glued and type nothing of their
own; a chapter is its notebook, executed with the notebook's defaults (below), from the
code that is here (``test_sources``); ``pytest --nbval`` runs the notebooks again and
compares all that they print and glue; and what they say of a claim is what the rules
make of the committed measurements, as is data/claims.csv.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbformat import NotebookNode

from opd_geometry.analysis import claims, evidence, regimes
from opd_geometry.analysis import verdicts as rules
from opd_geometry.analysis.statements import ARMS
from opd_geometry.book import board, chapters
from opd_geometry.experiments import committed, measure, profiles
from opd_geometry.geometry import comparison

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/[0-9A-Z]*_*.ipynb"))
CHAPTERS = sorted(ROOT.glob("book/chapters/*.ipynb"))
# the rows of formats are those of data/formats.csv, with versions and tensors
PAGES = [p for p in sorted(ROOT.glob("book/*.md")) if p.stem != "formats"]
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e-?\d+)?")
by_name = {"ids": lambda path: path.stem}


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def glued(notebook: NotebookNode) -> dict[str, dict[str, str]]:
    """Name to what a notebook's outputs hold under it: type to text."""
    found = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            name = output.get("metadata", {}).get("scrapbook", {}).get("name")
            if name:
                data = output["data"].items()
                found[name] = {key.rpartition("/")[2]: text for key, text in data}
    return found


GLUED = {path.stem: glued(read(path)) for path in CHAPTERS}


# --- claims --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def findings() -> pd.DataFrame:
    """What the rules make of the committed measurements, judged anew, in all worlds."""
    names = regimes.WORLDS
    tables = {name: measure.committed(name, regimes.ASKED) for name in names}
    return regimes.claims_in_worlds(tables)


@pytest.fixture(scope="module")
def by_id(findings: pd.DataFrame) -> dict[str, dict[str, Any]]:
    main = findings[findings["world"] == profiles.PUBLISHED]
    return {row["id"]: row for row in main.to_dict("records")}


def test_the_table_of_claims_is_what_the_measurements_give(
    findings: pd.DataFrame, tmp_path: Path
) -> None:
    fresh = claims.write_claims(findings, tmp_path / "claims.csv").read_text()
    kept = (ROOT / "data" / "claims.csv").read_text()
    remedy = "run opd-geometry claims"
    assert kept.splitlines() == fresh.splitlines(), remedy


def test_arms_that_no_rule_asks_for_change_no_claim(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The short way, of those arms alone, and the long one: every word is the same."""
    runs = [r for r in measure.committed_runs(profiles.PUBLISHED) if r.seed < 2]
    monkeypatch.setattr(committed, "committed_runs", lambda profile: runs)
    tables = [measure.committed(profiles.PUBLISHED, arms) for arms in (["*"], ARMS)]
    assert tables[0]["run"].nunique() > tables[1]["run"].nunique()
    whole, short = (claims.claims_table(table) for table in tables)
    pd.testing.assert_frame_equal(whole, short)
    ends = short.set_index("id").loc["early-lock", "nulls"]
    assert "another seed as predictor: 0." in ends  # of the tables of pairs


def tables_of(notebook: NotebookNode) -> Iterator[dict[str, str]]:
    """Rows about a claim's verdict in a chapter's tables: column to text."""
    outputs = [x for cell in notebook.cells for x in cell.get("outputs", [])]
    for output in outputs:
        html = output.get("data", {}).get("text/html", "")
        tree = BeautifulSoup(html, "html.parser")
        heads = [head.get_text() for head in tree.select("thead th")]
        if {"claim", "verdict"} <= set(heads):
            for row in tree.select("tbody tr"):
                cells = [cell.get_text() for cell in row.find_all(["th", "td"])]
                yield dict(zip(heads, cells, strict=True))


def claim_in(row: dict[str, str]) -> str:
    return row["claim"].rpartition("(")[2].rstrip(")")


def expected(row: dict[str, str], finding: dict[str, Any]) -> dict[str, str]:
    """The row as the finding would have it, its numbers to the printed digits."""
    measured = finding["verdict"] != "not measured"
    levels = f"{finding['ours']}; " if finding["ours"] else ""
    shown = levels + board.effect_text(finding)
    seeds = f"{finding['n_seeds']} seed{'' if finding['n_seeds'] == 1 else 's'}"
    verdict = finding["verdict"]
    marked = f"{board.VERDICT_MARKS[verdict]} {verdict}"
    against = board.in_words(f"{finding['null']}; {finding['matched']}")
    known = {
        "claim": f"{finding['statement']} ({finding['id']})",
        "here": board.in_words(f"{shown}; {seeds}") if measured else "–",
        chapters.AGAINST: re.sub(r": \S+( points)?, ", ": ", against),
        "verdict": marked,
    }
    return {name: known[name] for name in row if name in known}


@pytest.mark.parametrize("path", CHAPTERS, **by_name)
def test_tables_of_verdicts_are_those_of_the_measurements(
    path: Path, by_id: dict[str, dict[str, Any]]
) -> None:
    """Of every claim that the chapter judges."""
    rows = list(tables_of(read(path)))
    judged = {x for x, row in by_id.items() if board.part_of(row)[1] == path.stem}
    assert {claim_in(row) for row in rows} == judged
    for row in rows:
        wanted = expected(row, by_id[claim_in(row)])
        assert len(wanted) == 4
        assert {name: row[name] for name in wanted} == wanted


def test_every_claim_has_its_row_in_a_chapter(by_id: dict[str, dict[str, Any]]) -> None:
    shown = [claim_in(row) for path in CHAPTERS for row in tables_of(read(path))]
    assert sorted(shown) == sorted(by_id)


@pytest.mark.parametrize("stem", GLUED)
def test_cards_and_verdicts_are_those_of_the_measurements(
    stem: str, findings: pd.DataFrame, by_id: dict[str, dict[str, Any]]
) -> None:
    said = {
        name.removeprefix("verdict_"): data["plain"].strip("'")
        for name, data in GLUED[stem].items()
        if name.removeprefix("verdict_") in by_id
    }
    assert said == {name: by_id[name]["verdict"] for name in said}
    for card in GLUED[stem].get("cards", {}).get("markdown", "").split("\n\n"):
        if card.strip():
            (name,) = re.findall(r"^\| The claim .*`([\w-]+)`\) \|$", card, re.M)
            lines = claims.claim_card(name, findings).strip().splitlines()
            told = [x if "The claim |" in x else board.in_words(x) for x in lines]
            *ours, runs = told
            theirs = card.strip().splitlines()[: len(ours) + 1]
            scale, _, of_chapter = theirs.pop().partition("; ")
            assert scale.startswith("| Runs | student of ")
            assert theirs == ours
            if by_id[name]["verdict"] != "not measured":  # else it lists what it has
                assert f"| Runs | {of_chapter}" == runs


@pytest.mark.parametrize("path", CHAPTERS, **by_name)
def test_a_chapter_is_its_notebook_with_its_own_defaults(path: Path) -> None:
    """So that nbval, which runs the notebooks, has compared the chapters, too."""
    assert read(path).metadata["papermill"]["parameters"] == {}
    source = ROOT / "notebooks" / path.name
    same = path.read_bytes() == source.read_bytes()
    assert same, f"run opd-geometry chapters {path.stem}"


# --- what is typed -------------------------------------------------------------------

# No numbers of results: code, maths, addresses, what is glued, marks and labels.
NOT_PROSE = re.compile(
    r"""\{[\w:-]+\}`[^`]*`          # roles, glue among them
    | (?<!`)\{[\w-]+(?::[^}`]*)?\}(?!`)   # what chapters.say puts in
    |```.*?``` | `[^`]*`
    |\$\$.*?\$\$ | \$[^$]+\$
    |,?\s\(?\d{4}\)?\]\(https://[^)]*\)    # the year of a cited paper
    |\[\d{4}\.\d{4,5}(?=\])          # a paper by its number
    |\]\([^)]*\) | https?://\S+ | arXiv:[\d.]+
    |^:{3,}[^\n]*$ | ^:(?:name|doc|link|link-type|gutter|figwidth):[^\n]*$
    |^\d+\.[ ]                      # items of a list
    |(?:Table|Tables|Figure|Figures|Appendix|Section|[Cc]hapter)[ ][A-Z]?\.?\d+\w?
    |\b(?:bf|fp|float|int)\d+ | \d+-bit
    """,
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
SMALL = range(11)
# Settings of the library; the paper's width, and its ranks there.
PAPER_WIDTH, SHAPES = 4096, profiles.PROFILES[profiles.PUBLISHED]
SETTINGS = {
    100.0,  # per cent
    90.0,  # degrees
    measure.MAP_REGIONS**2,
    SHAPES.student.width,
    SHAPES.teacher.width,
    100 * rules.CONFIDENCE,
    evidence.ACCURACY_MARGIN,
    evidence.SPARSITY_MARGIN,
    evidence.COMPARABLE_FACTOR,
    evidence.SAME_FACTOR,
    evidence.KEPT,
    comparison.MASK_ALPHA,
    profiles.PAPER_BATCH,
    profiles.PAPER_STEPS,
    PAPER_WIDTH,
    PAPER_WIDTH / comparison.ANGLE_DIVISOR,
    PAPER_WIDTH / comparison.PRINCIPAL_DIVISOR,
    3.11,  # of Python
    *(float(x) for arm in profiles.PUBLISHED_ARMS for x in NUMBER.findall(arm)),
}
# Budgets that the paper's text prints, and arithmetic done on the page, by page.
QUOTED: dict[str, set[float]] = {
    # a weight, in the worked update; a share of rewards, and where a ratio is clipped
    "index": {0.02, 270},
    "notation": {0.45, 0.8, 1.28},
    "02_distance": {299, 5375},
    "03_rank": {63, 299},
    # millions of parameters, rows of the vocabulary, matrices, steps
    "04_real_model": {0.8, 270, 1024, 126, 40},
    # a case by hand, and bounds on what chance gives
    "05_directions": {0.85, 0.8, 0.92, 0.87, 0.72, 0.02, 0.01},
    "06_controls": {0.91, 2024},  # 1 / 1.1, in an answer; the year of AIME
    # the widest gap of Table 1; ratios and billions of parameters
    "07_regimes": {0.055, 1.75, 14},
    # thousands of prompts, updates a round, and an answer worked out from the print
    # steps at which those runs were locked and ended; millions of parameters
    "confinement": {10, 40, 1e-8},
    "reproduce": {270, 1024},
    # sizes of models, GPUs and vocabularies, and the bounds of the tests that it names
    "at-scale": {1.2, 1.7, 17, 80, 96, 151, 936, 2048, 0.31, 0.43, 0.27, 91, 106},
    "09_your_checkpoints": {60},  # how many matrices the exercise samples
    "08_exclusions": {17, 37.5, 0.54, 0.64, 0.7},
}


def paper_numbers() -> set[float]:
    tables = [pd.read_csv(path) for path in (ROOT / "data" / "paper").glob("*.csv")]
    values = pd.concat(tables)["value"]  # some settings are words
    return set(pd.to_numeric(values, errors="coerce").dropna())


def typed(text: str) -> list[tuple[float, str]]:
    """Numbers in prose, each with the words around it."""
    prose = NOT_PROSE.sub(" ", text)
    found = []
    for match in NUMBER.finditer(prose):
        around = prose[max(0, match.start() - 40) : match.end() + 20]
        found.append((float(match.group()), " ".join(around.split())))
    return found


def unexplained(text: str, more: set[float]) -> list[str]:
    """The typed numbers that are neither small, nor settings, nor printed elsewhere."""
    known = {*SMALL, *SETTINGS, *paper_numbers(), *more}
    return [words for value, words in typed(text) if value not in known]


def numbers_in_code(notebook: NotebookNode) -> set[float]:
    """What a notebook computes with: the small cases that it works by hand."""
    code = [c.source for c in notebook.cells if c.cell_type == "code"]
    nodes = [node for source in code for node in ast.walk(ast.parse(source))]
    values = [node.value for node in nodes if isinstance(node, ast.Constant)]
    return {float(value) for value in values if type(value) in (int, float)}


def texts(notebook: NotebookNode) -> Iterator[str]:
    """Markdown cells, what cells say, and what figures have in place of a picture."""
    for cell in notebook.cells:
        yield cell.metadata.get("alt", "")
        if cell.cell_type == "markdown":
            yield cell.source
        elif cell.source.startswith("chapters.say("):
            yield ast.parse(cell.source).body[0].value.args[0].value


REMEDY = (
    "typed results: publish them, or keep what the paper prints in data/paper, or, if "
    "a number is neither, name it in this test"
)


@pytest.mark.parametrize("path", NOTEBOOKS, **by_name)
def test_no_result_is_typed_in_a_notebook(path: Path) -> None:
    notebook = read(path)
    more = numbers_in_code(notebook) | QUOTED.get(path.stem, set())
    assert unexplained("\n\n".join(texts(notebook)), more) == [], REMEDY


@pytest.mark.parametrize("path", PAGES, **by_name)
def test_no_result_is_typed_on_a_page(path: Path) -> None:
    assert unexplained(path.read_text(), QUOTED.get(path.stem, set())) == [], REMEDY


@pytest.mark.parametrize(
    "text",
    [
        "OPD solves 0.6996 of the problems.",
        "| OPD | 25.2 % |",
        "**Norm 0.0284.** Every dot is a matrix.",
        "a stable rank of 2.87, below $n / 4 = 32$",
        "1. Unchanged entries: 39.5 %.",
        "over 215 runs",
        "NSS is 1.7e-02 for SFT.",
    ],
)
def test_a_typed_result_is_found(text: str) -> None:
    assert len(unexplained(text, set())) == 1


@pytest.mark.parametrize(
    "text",
    [
        "{glue:text}`accuracy_opd:.2f` after OPD, `rank=215`, $x = 0.123$",
        "The paper prints 51.6 %; Table 17, Figure 4a, Appendix C.3.",
        "Its 95 % interval over five seeds, in bf16 and float32, with 0.3 of the rate.",
        "12. Item\n\n```console\n$ run --steps 1234\n```\n[here](https://e.org/0.77)",
        "::::{grid} 1 1 13 13\n:gutter: 33\n:::",
        "```{glue:} costs\n:doc: chapters/03_rank.ipynb\n```",
        "$$\nx = 0.777\n$$",
    ],
)
def test_what_is_no_result_passes(text: str) -> None:
    assert unexplained(text, set()) == []

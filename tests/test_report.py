"""The page says what the tables say, needs nothing beside it, and breaks clearly."""

import base64
import contextlib
import functools
import io
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from matplotlib.figure import Figure
from safetensors.torch import load_file

from opd_geometry import cli
from opd_geometry.book import measured, published, report
from opd_geometry.experiments import measure
from opd_geometry.experiments.committed import committed_path
from opd_geometry.experiments.profiles import PUBLISHED, build
from opd_geometry.geometry import readings

DATA = Path(__file__).parents[1] / "data"
BEFORE, AFTER = (
    DATA / "checkpoints" / name for name in ("laptop-sft-s0", "laptop-opd-s0")
)
TABLE_1 = "Table 1 of the paper, with your model and this book's"
# What a page may hold of an element's attributes without asking for anything.
LINKS = ("src", "href", "srcset", "poster", "action", "xlink:href", "background")


class Page(HTMLParser):
    """The parts of a page that are looked at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.said = ""
        self._caption: str | None = None
        self._into: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.links += [found[name] or "" for name in LINKS if name in found]
        if tag == "img":
            self.images.append(found)
        if tag in ("caption", "th", "td"):
            self._into = []
        if tag == "tr" and self._caption is not None:
            self.tables[self._caption].append([])

    def handle_endtag(self, tag: str) -> None:
        text = "".join(self._into)
        if tag == "caption":
            self._caption = text
            self.tables[text] = []
        if tag in ("th", "td") and self._caption is not None:
            self.tables[self._caption][-1].append(text)

    def handle_data(self, data: str) -> None:
        self.said += data
        self._into.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A measured pair, a trajectory and the page of both, as the commands make them."""
    place = tmp_path_factory.mktemp("report")
    pair, steps = str(place / "pair.csv"), str(place / "steps.parquet")
    with contextlib.redirect_stderr(io.StringIO()):
        assert cli.main(["measure", str(BEFORE), str(AFTER), "--out", pair]) == 0
        base = DATA / "checkpoints" / "laptop-base"
        runs = []
        for step, model in ((10, BEFORE), (20, AFTER)):
            runs.append(str(place / f"checkpoint-{step}"))
            shutil.copytree(model, runs[-1])
        options = ["--roles", "q,k", "--k", "4", "--out", steps]
        assert cli.main(["trajectory", str(base), *runs, *options]) == 0
        assert cli.main(["report", pair, steps, "--out", str(place / "r.html")]) == 0
    return place


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return (folder / "r.html").read_text("utf8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


@pytest.fixture
def pair(folder: Path) -> pd.DataFrame:
    """The first layer and the embedding."""
    table = pd.read_csv(folder / "pair.csv")
    return table[table["layer"] <= 0].reset_index(drop=True)


_book_runs = functools.cache(published.book_runs)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn but not stored, and this book's runs are read once."""

    def closed(figure: Figure) -> str:
        plt.close(figure)
        return "data:,"

    monkeypatch.setattr(report, "drawn", closed)
    monkeypatch.setattr(report, "book_runs", _book_runs)


# --- what the page says ----------------------------------------------------------


def test_the_page_needs_nothing_beside_it(page: Page, text: str, folder: Path) -> None:
    inside = {f"#{name}" for name in page.ids}
    for link in page.links:
        assert link in inside or link.startswith("data:"), link[:80]
    assert not {"script", "iframe", "object", "embed", "base"} & {*page.tags}
    figures = re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", text)
    assert len(figures) == len(page.images) > 1
    for source in [text, *(base64.b64decode(f).decode() for f in figures)]:
        assert not re.search(r"""url\(\s*['"]?(?!#|data:)|@import""", source)
        assert not re.search(r"""(src|href)=['"](?!#|data:)""", source)
        for place in (folder, DATA, Path.home()):
            assert str(place) not in source


def test_every_image_is_described(page: Page) -> None:
    alts = [image.get("alt") or "" for image in page.images]
    assert min(map(len, alts)) > 40
    assert len({*alts}) == len(alts)
    assert all(image["src"] for image in page.images)


def test_yours_is_the_sparsity_of_the_weights(page: Page) -> None:
    counts = {True: [0, 0], False: [0, 0]}  # of the layers or not: same, all
    old, new = (load_file(m / "model.safetensors") for m in (BEFORE, AFTER))
    for name, w in old.items():
        if w.ndim == 2:
            a, b = w.float().numpy(), new[name].float().numpy()  # bf16 on both sides
            changed = np.abs(b - a) > 1e-3 * np.maximum(np.abs(a), np.abs(b))
            count = counts["layers" in name]
            count[0] += int((~changed).sum())
            count[1] += a.size
    same, entries = np.sum(list(counts.values()), 0)
    rows = {row[0]: row[1:] for row in page.tables[TABLE_1][1:]}
    layers = f"{100 * counts[True][0] / counts[True][1]:.1f} %"
    said = f"{100 * same / entries:.1f} %"
    assert [rows["your model"][0], rows["… every matrix"][0]] == [layers, said]
    assert layers != said
    assert "of the 28 matrices of the layers" in page.said
    assert f"{said} of the weights (stored as bfloat16)" in page.said
    assert f"30 matrices with {entries:,} parameters" in page.said


def test_table_1_of_the_paper_stands_beside_it(page: Page) -> None:
    rows = [row for row in page.tables[TABLE_1] if row[0].startswith("paper: ")]
    printed = pd.read_csv(DATA / "paper" / "table_1.csv")
    assert len(rows) == len(printed) > 10
    for (label, value, null, _), line in zip(rows, printed.itertuples(), strict=True):
        assert label.lower() == f"paper: {line.arm}".lower()
        assert value == f"{line.value:.1f} %"
        assert null == "–"  # it prints none


def test_this_books_models_stand_beside_it(page: Page) -> None:
    rows = {row[0]: row[1:] for row in page.tables[TABLE_1]}
    provenance = pd.read_csv(DATA / "measurements" / "runs.csv")
    published = [run.key() for run in measure.committed_runs(PUBLISHED)]
    provenance = provenance[provenance["run"].isin(published)]
    sizes = {
        name: w.numel()
        for name, w in load_file(BEFORE / "model.safetensors").items()
        if w.ndim == 2 and "layers" in name  # as on the first page of the book
    }
    labels = {"sft": "SFT", "opd": "OPD", "rlvr": "RLVR"}
    for arm, label in labels.items():
        means: dict[str, list[float]] = {"sparsity": [], "null_sparsity": []}
        for run in provenance.loc[provenance["arm"] == arm, "run"]:
            (file,) = (DATA / "measurements").glob(f"{arm}-s?-{run[:12]}*.parquet")
            table = pd.read_parquet(file)
            end = table[table["step"] == table["step"].max()]
            end = end[end["matrix"].isin([*sizes])]
            for metric, found in means.items():
                values = end[end["metric"] == metric].set_index("matrix")["value"]
                weights = [sizes[name] for name in values.index]
                found.append(float(np.average(values.to_numpy(float), weights=weights)))
        (row,) = (v for k, v in rows.items() if k == f"this book: {label}")
        assert row[:2] == [f"{100 * np.mean(v):.1f} %" for v in means.values()]


def test_every_matrix_is_listed(page: Page, folder: Path) -> None:
    table = pd.read_csv(folder / "pair.csv")
    listed = page.tables["30 matrices"]
    column = listed[0].index("nss")
    assert [row[0] for row in listed[1:]] == list(table["matrix"])
    assert [row[column] for row in listed[1:]] == [f"{x:.3g}" for x in table["nss"]]


def test_the_trajectory_is_told(page: Page, folder: Path) -> None:
    steps = pd.read_parquet(folder / "steps.parquet")
    means = steps.groupby("step")[["stable_rank", "similarity_to_end"]].mean()
    rank, near = means["stable_rank"], means["similarity_to_end"]
    assert f"Stable rank {rank[10]:.3g} → {rank[20]:.3g}" in page.said
    assert f"similarity at the first checkpoint {near[10]:.3g}" in page.said
    assert "2 checkpoints of 8 matrices" in page.said


@pytest.mark.usefixtures("undrawn")
def test_every_null_of_the_course_is_listed(folder: Path) -> None:
    steps = pd.read_parquet(folder / "steps.parquet")
    walked = steps.assign(
        walk_similarity_to_end=0.25,
        walk_stable_rank=3.0,
        similarity_to_seed=0.5,
        displacement=2.5,
    )
    page = Page(report.build_report(None, walked, "t"))
    listed = page.tables["The course beside its nulls"]
    rows = {row[0]: row[1:] for row in listed[1:]}
    assert rows["a walk of its optimizer on noise"] == ["0.25", "3", "3"]
    assert rows["the end of seed"] == ["0.5", "-", "-"]
    own = steps[steps["step"] == 10]["similarity_to_end"].mean()
    assert rows["your run"][0] == f"{own:.3g}"
    assert "its increments, each turned" not in rows  # of two checkpoints there is none
    assert "2.5 times as far as its optimizer goes on noise" in page.said


# --- tables that lack something --------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_a_refused_matrix_counts_for_nothing(pair: pd.DataFrame) -> None:
    table = pair.copy()
    identity = ["matrix", "role", "layer", "rows", "cols"]
    numbers = table.select_dtypes("number").columns.difference(identity)
    table["note"] = ""
    table.loc[0, numbers] = np.nan
    table.loc[0, "note"] = "refused: 1 NaN and 0 inf after"
    kept = table.drop(index=0)
    share = np.average(kept["sparsity_bf16"], weights=kept["rows"] * kept["cols"])
    page = Page(report.build_report(table, None, "t"))
    assert f"{100 * share:.1f} % of the weights" in page.said
    assert page.tables[TABLE_1][2][:2] == ["… every matrix", f"{100 * share:.1f} %"]
    (overall,) = (r for r in page.tables["Means by role"] if r[0] == "all")
    column = page.tables["Means by role"][0].index("spectral shift NSS")
    assert overall[column] == f"{kept['nss'].mean():.3g}"
    assert "1 of 9 matrices have no sparsity" in page.said
    assert "refused: 1 NaN and 0 inf after" in page.said
    assert "nan" not in {
        cell for rows in page.tables.values() for r in rows for cell in r
    }


@pytest.mark.usefixtures("undrawn")
def test_tables_without_any_value_still_give_a_page(pair: pd.DataFrame) -> None:
    identity = ["matrix", "role", "layer", "rows", "cols"]
    empty = pair.copy()
    empty[empty.select_dtypes("number").columns.difference(identity)] = np.nan
    assert "No matrix of this table has a sparsity" in report.build_report(
        empty, None, "t"
    )
    course = pair[["matrix", "role", "layer"]].assign(
        step=4, stable_rank=np.nan, similarity_to_end=np.nan
    )
    assert "could be measured" in report.build_report(None, course, "t")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.filterwarnings("error::UserWarning")
def test_cheap_tables_and_odd_roles_still_give_a_page(pair: pd.DataFrame) -> None:
    page = Page(report.build_report(pair[list(measured.PAIR_BASE)], None, "t"))
    assert "Not in the table, so not on this page" in page.said
    other = pair.head(2).assign(role=["expert_other", "other"])
    means = Page(report.build_report(other, None, "t")).tables["Means by role"]
    assert [row[:2] for row in means[1:]] == [
        ["expert_other", "1"],
        ["other", "1"],
        ["layers", "1"],
        ["all", "2"],
    ]


@pytest.mark.usefixtures("undrawn")
def test_names_cannot_write_html(pair: pd.DataFrame) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=y>&amp;"
    table = pair[list(measured.PAIR_BASE)].assign(matrix=evil)
    text = report.build_report(table, None, f"</title>{evil}")
    page = Page(text)
    assert "script" not in page.tags
    assert "<script" not in text
    assert all(image["src"] == "data:," for image in page.images)
    assert page.tables[f"{len(table)} matrices"][1][0] == evil


# --- bad input -------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on stderr of a report that must fail."""
    assert cli.main(["report", *map(str, arguments)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("opd-geometry: ")
    return err


def test_tables_that_are_none_are_one_line(
    pair: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "t.csv", tmp_path / "r.html"

    def said(table: pd.DataFrame) -> str:
        table.to_csv(file, index=False)
        return refusal(capsys, file, "--out", out)

    no = said(pair.drop(columns=["sparsity_bf16", "rows"]))
    assert "has no column rows, sparsity_bf16, expected" in no
    steps = pair.assign(step=1, stable_rank=1.0)
    assert "has no column similarity_to_end" in said(steps)
    assert "has no rows, expected one a matrix" in said(pair.head(0))
    assert "column nss holds" in said(pair.assign(nss="much"))
    assert "twice, expected each matrix once" in said(pd.concat([pair, pair]))
    assert "rows without matrix" in said(pair.assign(matrix=np.nan))
    assert "rows without layer" in said(pair.assign(layer=np.nan))
    assert "column rows holds 0, expected whole numbers" in said(pair.assign(rows=0))
    assert "column layer holds 0.5, expected" in said(pair.assign(layer=0.5))
    assert "column layer holds inf, expected" in said(pair.assign(layer=np.inf))
    assert "has the role mystery, expected" in said(pair.assign(role="mystery"))
    pair.to_csv(file, index=False)
    assert "second table of one kind" in refusal(capsys, file, file, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
@pytest.mark.parametrize("content", [b"", b'{"', b'\xff\xfe\x00,"'])
def test_unreadable_files_are_one_line(
    suffix: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"t{suffix}"
    file.write_bytes(content)
    said = refusal(capsys, file, "--out", tmp_path / "r.html")
    assert str(file) in said
    assert "measure again" in said


def test_places_that_are_none_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = folder / "pair.csv", tmp_path / "r.html"
    assert "does not exist" in refusal(capsys, tmp_path / "no.csv", "--out", out)
    (tmp_path / "t.txt").touch()
    assert "suffix '.txt'" in refusal(capsys, tmp_path / "t.txt", "--out", out)
    copy = shutil.copy(table, tmp_path / "t.csv")
    before = Path(copy).read_bytes()
    said = refusal(capsys, copy, "--out", copy, "--force")  # not over the table
    assert "ends in '.csv', expected .html" in said
    assert Path(copy).read_bytes() == before
    assert "is no directory" in refusal(capsys, table, "--out", tmp_path / "no/r.html")


@pytest.mark.usefixtures("undrawn")
def test_an_earlier_page_is_untouched_until_the_new_one_is_whole(
    pair: pd.DataFrame,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, out = tmp_path / "t.csv", tmp_path / "r.html"
    pair[list(measured.PAIR_BASE)].to_csv(file, index=False)
    out.write_text("earlier")
    assert "pass --force" in refusal(capsys, file, "--out", out)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    force = ["report", str(file), "--out", str(out), "--force"]
    monkeypatch.setattr(os, "replace", interrupted)
    assert cli.main(force) == 130
    monkeypatch.setattr(os, "replace", full)
    assert cli.main(force) == 1
    assert "No space left on device; make room" in capsys.readouterr().err
    monkeypatch.undo()
    assert out.read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "t.csv"]
    assert cli.main(force) == 0
    assert out.read_text().startswith("<!DOCTYPE html>")


# --- what stands out -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("factors", "verdict"),
    [
        ([1.2] * 11, "above its null"),
        ([0.8] * 11, "below its null"),
        ([1.2] * 10 + [0.9], "above its null"),
        ([1.2] * 9 + [0.9] * 2, "at its null"),  # too few on one side
        ([1.05] * 11, "at its null"),  # too near
        ([0.9] * 10 + [9.0], "at its null"),  # one matrix carries the mean
        ([1.0] * 11, "at its null"),
        ([1.2] * 11 + [np.nan], "above its null"),  # without the refused one
    ],
)
def test_what_stands_out_from_its_null(factors: list[float], verdict: str) -> None:
    table = pd.DataFrame({"nss": 0.3 * np.array(factors), "null_nss": 0.3})
    found = readings.against_null(table)
    assert list(found.index) == ["nss"]  # the others are not in the table
    assert found.loc["nss", "verdict"] == verdict
    assert found.loc["nss", "ratio"] == pytest.approx(np.nanmean(factors))
    assert readings.against_null(table.assign(null_nss=np.nan)).empty


def test_the_verdicts_stand_on_the_page(folder: Path, page: Page) -> None:
    table = readings.in_layers(pd.read_csv(folder / "pair.csv"))
    known = readings.against_null(table)
    every = readings.against_nulls(table)
    assert len(table) == 28
    assert len(known) == 9
    # a stored pair: nothing is shuffled, and its sparsity is the expected one's input
    counts = {"Gaussian": 9, "its directions turned": 5, "unplaced, closed form": 2}
    assert every["against"].value_counts().to_dict() == counts | {"chance": 6}
    caption = (
        "What stands out from its null (means over the 28 matrices of the "
        "layers, no embedding or head)"
    )
    rows = page.tables[caption][1:]
    assert sorted(row[-1] for row in rows) == sorted(every["verdict"])
    assert {row[0] for row in rows if row[1] == "chance"} > {"energy top right"}
    shown = {row[0]: row[2:] for row in rows if row[1] == "Gaussian"}
    assert next(iter(page.tables)) == caption  # it leads
    shape = {"stable rank": "stable_rank", "mean angle, left (deg)": readings.ANGLES[0]}
    for label, name in shape.items():
        assert float(shown[label][1]) == pytest.approx(known["mean"][name], rel=5e-3)
    rows, cols = table["rows"], table["cols"]
    null = (rows * cols / (rows**0.5 + cols**0.5) ** 2).mean()
    assert float(shown["stable rank"][2]) == pytest.approx(null, rel=5e-3)
    assert "Below its null: stable rank (0.0" in page.said


def test_a_caption_is_about_what_its_figure_shows(folder: Path, page: Page) -> None:
    table = pd.read_csv(folder / "pair.csv")
    layers = table[table["layer"] >= 0]["principal_overlap"].mean()
    assert f"principal mask {100 * layers:.1f} %" in page.said
    assert f"principal mask {100 * table['principal_overlap'].mean():.1f} %" not in (
        page.said
    )


# --- whatever a table lacks ----------------------------------------------------------


def numbers_of(table: pd.DataFrame) -> list[str]:
    return [
        name
        for name in table.select_dtypes("number")
        if name not in ("layer", "rows", "cols")
    ]


def unmoved(table: pd.DataFrame) -> pd.DataFrame:
    """As `measure` writes two checkpoints that are the same."""
    table = table.copy()
    table[numbers_of(table)] = 0.0
    nulls = [name for name in table if name.startswith("null_")]
    undefined = ["principal_overlap", "low_magnitude_overlap", "stable_rank"]
    table[[*undefined, "hill_alpha", *nulls]] = np.nan
    return table.assign(sparsity_bf16=1.0)


def through_files(table: pd.DataFrame, place: Path) -> Page:
    table.to_csv(place / "t.csv", index=False)
    table = measured.measured_table(place / "t.csv")
    return Page(report.build_report(table, None, "t"))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.filterwarnings("error")
def test_no_table_of_measure_breaks_the_page(
    pair: pd.DataFrame, tmp_path: Path
) -> None:
    numbers = numbers_of(pair)
    page = through_files(unmoved(pair), tmp_path)
    assert "Nothing changed: every matrix is the same" in page.said
    half = pair.copy()
    half.loc[1:, numbers] = np.nan
    through_files(half, tmp_path)
    for role in ("head", "embed", "q", "router", "other"):
        through_files(pair.head(1).assign(role=role), tmp_path)
    experts = {"q": "expert_gate", "k": "expert_up", "v": "expert_down"}
    moved = pair.assign(role=pair["role"].map(experts).fillna("expert_other"))
    page = through_files(moved, tmp_path)
    assert "mean angle, left (deg): your model" in page.tables  # drawn for experts
    for name in ("nss", "null_nss", "update_density", "principal_overlap"):
        through_files(pair.drop(columns=name), tmp_path)
        page = through_files(pair.assign(**{name: np.inf}), tmp_path)
        assert f"Infinite values count as not measured: in {name}." in page.said
    far = pair.assign(layer=np.arange(len(pair)) * 10**12)
    assert "10000000000" in through_files(far, tmp_path).said


@pytest.mark.usefixtures("undrawn")
@pytest.mark.filterwarnings("error")
def test_no_trajectory_breaks_the_page(pair: pd.DataFrame) -> None:
    rows = pd.concat([pair.assign(step=step) for step in (1, 2)], ignore_index=True)
    steps = rows.assign(frobenius_norm=0.0, similarity_to_end=np.nan)
    steps = steps.assign(hill_alpha=np.nan, stable_rank=np.nan, role="expert_gate")
    assert "could be measured" in report.build_report(None, steps, "t")
    later = steps.assign(stable_rank=steps["step"].map({1: np.nan, 2: 3.0}))
    assert "Stable rank" in report.build_report(None, later, "t")
    assert "Stable rank" in report.build_report(pair, later.assign(step=7), "t")


@pytest.mark.usefixtures("undrawn")
def test_maps_hold_the_means_by_layer_and_role(pair: pd.DataFrame) -> None:
    page = Page(report.build_report(pair, None, "t"))
    found = page.tables["spectral shift NSS: your model"]
    assert found[0] == ["layer", "q", "k", "v", "o", "gate", "up", "down"]
    values = pair[pair["layer"] == 0].set_index("role")["nss"]
    assert found[1] == ["0", *(f"{values[role]:.2g}" for role in found[0][1:])]


@pytest.mark.usefixtures("undrawn")
def test_many_layers_share_lines(pair: pd.DataFrame) -> None:
    one = pair[pair["layer"] == 0]
    many = pd.concat(
        [one.assign(layer=layer, nss=float(layer)) for layer in range(1000)],
        ignore_index=True,
    )
    page = Page(report.build_report(many, None, "t"))
    lines = page.tables["spectral shift NSS: your model"][1:]
    assert len(lines) <= measured.MAP_LAYERS
    assert lines[0][:2] == ["0", "5"]  # the mean of the layers 0 to 10
    assert "Neighbours of 1000 layers share a line" in page.said


def test_this_books_runs_are_those_that_are_published() -> None:
    keys = ["run", "arm", "seed"]
    ours = published.book_runs()
    assert list(ours.columns) == measure.COLUMNS
    found = set(ours[keys].astype({"seed": int}).itertuples(index=False, name=None))
    expected = {
        (run.key(), run.arm, run.seed)
        for run in measure.committed_runs(PUBLISHED)
        if run.arm in published.OURS
    }
    assert found == expected != set()


def test_a_flipped_bit_in_this_books_runs_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "measurements"
    folder.mkdir()
    source = committed_path(build(PUBLISHED, "opd", 0))
    listing = source.with_name("runs.csv")
    monkeypatch.setenv("OPD_GEOMETRY_DATA", str(tmp_path))
    for victim, said in ((source, "another digest than"), (listing, "line 3 is cut")):
        for file in (source, listing):
            content = bytearray(file.read_bytes())
            if file == victim and file == listing:
                content[content.index(b"\n", content.index(b"\n") + 1) + 1] ^= 1
            elif file == victim:
                content[len(content) // 2] ^= 4
            (folder / file.name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{victim.name} is damaged.*{said}"):
            published.book_runs(["opd"])


@pytest.mark.usefixtures("undrawn")
def test_control_characters_are_spelt_out(pair: pd.DataFrame) -> None:
    name = "a\x1b[31m\n\x00[bold]"
    page = report.build_report(pair.assign(matrix=name), None, name)
    assert not {"\x1b", "\x00"} & {*page}
    assert Page(page).tables["9 matrices"][1][0] == r"a\x1b[31m\n\x00[bold]"


def test_reading_a_table_loads_no_torch() -> None:
    """Else a page takes longer to begin than to draw."""
    code = "import sys, opd_geometry.book.report; print(*{*sys.modules})"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "scipy"} & {*loaded.stdout.split()}


# --- files of other programs ---------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1, 2]", "row 1 is a number, not an object"),
        ('[{"a": 1}, []]', "row 2 is a list, not an object"),
        ('{"a": 1}', "it is an object, not a list of rows"),
        ('[{"nss": {"a": 1}}]', "row 1 has an object in a column"),
        ("[" * 100_000, "recursion"),
        ('[{"rows": ' + "9" * 5000 + "}]", "digits"),
    ],
)
def test_json_that_is_no_table_is_one_line(
    content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "t.json"
    file.write_text(content)
    line = refusal(capsys, file, "--out", tmp_path / "r.html")
    assert str(file) in line
    assert said in line


@pytest.mark.parametrize("note", [b"{", b"null", b'{"columns": 5}', b"\xff"])
def test_notes_in_parquet_files_are_not_read(
    note: bytes, pair: pd.DataFrame, tmp_path: Path
) -> None:
    file = tmp_path / "t.parquet"
    table = pa.Table.from_pandas(pair).replace_schema_metadata({b"pandas": note})
    pa.parquet.write_table(table, file)
    found = measured.measured_table(file)
    assert found["nss"].tolist() == pair["nss"].tolist()


def test_odd_parquet_columns_are_one_line(
    pair: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "t.parquet", tmp_path / "r.html"
    table = pa.Table.from_pandas(pair)

    def said(name: str, column: pa.Array) -> str:
        columns = table.drop_columns([name]).append_column(name, column)
        pa.parquet.write_table(columns, file)
        return refusal(capsys, file, "--out", out)

    n = len(pair)
    dates = pa.array([1] * n, pa.timestamp("ns"))
    assert f"{file}: column nss holds dates" in said("nss", dates)
    lists = pa.array([[1.0]] * n)
    assert f"{file}: column nss holds" in said("nss", lists)
    names = pa.array([b"\xff"] * n)
    assert f"{file}: column matrix holds bytes" in said("matrix", names)


def test_places_that_hold_no_table_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.html"
    (tmp_path / "d.csv").mkdir()
    said = refusal(capsys, tmp_path / "d.csv", "--out", out)
    assert "d.csv is a directory, expected a table" in said
    os.mkfifo(tmp_path / "p.csv")
    said = refusal(capsys, tmp_path / "p.csv", "--out", out)
    assert "p.csv is no regular file, expected a table" in said

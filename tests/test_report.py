"""The report says what its tables hold, stands alone, and tells what is wrong."""

import base64
import functools
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from opd_geometry import cli, figures, report, tables
from opd_geometry.pairs import COLUMNS, METRICS, NULL_METRICS, TRAJECTORY_COLUMNS
from opd_geometry.report import build_report, read_table, tidy, write_report

SHAPES = {"q": (8, 8), "k": (4, 8), "v": (4, 8), "o": (8, 8), "down": (8, 24)}


def pair(layers: int = 2, **changes: Any) -> pd.DataFrame:
    """A table of measure with a value a column, larger by 1 % a row."""
    rows = []
    for layer in range(layers):
        for role, (n_rows, n_cols) in SHAPES.items():
            name = f"model.layers.{layer}.{role}_proj.weight"
            row: dict[str, Any] = dict.fromkeys(COLUMNS, 0.01)
            row |= {"matrix": name, "role": role, "layer": layer, "note": ""}
            row |= {"rows": n_rows, "cols": n_cols}
            row |= dict.fromkeys(("dtype_before", "dtype_after"), "bfloat16")
            level = 1 + 0.01 * len(rows)
            row |= {name: level * 0.4 for name in METRICS}
            row |= {f"null_{name}": level * 0.3 for name in NULL_METRICS}
            rows.append(row)
    head = rows[0] | {"matrix": "lm_head.weight", "role": "head", "layer": -1}
    return pd.DataFrame([*rows, head | {"rows": 100, "sparsity_bf16": 0.9}]).assign(
        **changes
    )


def steps() -> pd.DataFrame:
    """A table of trajectory."""
    rows = [
        (
            step,
            name,
            "q",
            layer,
            2.0 + step / 100,
            0.1 * step,
            1.5,
            step / 40,
            0.125,
            "",
        )
        for step in (10, 20, 40)
        for layer, name in enumerate(
            ("layers.0.q_proj.weight", "layers.1.q_proj.weight")
        )
    ]
    return pd.DataFrame(rows, columns=list(TRAJECTORY_COLUMNS))


@functools.cache
def full() -> str:
    """The page of both tables."""
    return build_report(pair(), steps(), "A <model> & more")


def page_of(*made: pd.DataFrame | None) -> BeautifulSoup:
    first, second = made if len(made) == 2 else (made[0], None)
    return BeautifulSoup(build_report(first, second, "A model"), "html.parser")


def rows_of(page: BeautifulSoup, section: str, number: int = 0) -> dict[str, list[str]]:
    found = page.select(f"#{section} table")[number].select("tbody tr")
    cells = [[cell.get_text() for cell in row.select("td")] for row in found]
    return {row[0]: row[1:] for row in cells}


def test_means_are_those_of_the_table() -> None:
    table, page = pair(), BeautifulSoup(full(), "html.parser")
    rows = rows_of(page, "overview", 1)
    assert list(rows) == ["q", "k", "v", "o", "down", "head", "all"]
    heads = [c.get_text() for c in page.select("#overview table")[1].select("th")][1:]
    sizes = table["rows"] * table["cols"]
    weighted = 100 * np.average(table["sparsity_bf16"], weights=sizes)
    null = 100 * np.average(table["null_sparsity_bf16"], weights=sizes)
    assert rows["all"][heads.index("update sparsity (%)")] == (
        f"{weighted:.3g} ({null:.3g})"
    )
    plain = table["stable_rank"].mean()
    assert rows["all"][heads.index("stable rank")] == f"{plain:.3g}"
    assert rows["q"][heads.index("matrices")] == "2"
    lead = page.select_one("header p")
    assert lead is not None
    assert f"{weighted:.1f} %" in lead.get_text()


def test_table_1_stands_beside_the_model() -> None:
    rows = rows_of(BeautifulSoup(full(), "html.parser"), "sparsity")
    assert rows["paper: SFT"] == ["8.1 %", "–"]
    assert rows["paper: OPD"] == ["51.6 %", "–"]
    assert rows["paper: RLVR"] == ["77.2 %", "–"]
    assert rows["paper: Polaris-4B-Preview (DAPO)"] == ["79.9 %", "–"]
    ours = [name for name in rows if name.startswith("this book: ")]
    assert len(ours) == 4
    assert all(float(rows[name][1].removesuffix(" %")) > 0 for name in ours)


def test_a_course_is_drawn_with_its_ends() -> None:
    page = page_of(None, steps())
    assert [s["id"] for s in page.select("section")] == ["course"]
    caption = page.select_one("#course strong")
    assert caption is not None
    assert caption.get_text() == (
        "Stable rank 2.1 → 2.4; similarity at the first checkpoint 0.25 (random "
        "subspaces 0.125)."
    )


def test_the_null_of_a_stable_rank_is_that_of_its_shape() -> None:
    rows = tidy(pair()).query("metric == 'null_stable_rank' and role == 'down'")
    expected = 8 * 24 / (np.sqrt(8) + np.sqrt(24)) ** 2
    assert rows["value"].to_numpy() == pytest.approx(expected)
    generator = np.random.default_rng(0)
    s = np.linalg.svd(generator.standard_normal((300, 900)), compute_uv=False)
    known = 300 * 900 / (np.sqrt(300) + np.sqrt(900)) ** 2
    assert float((s**2).sum() / s[0] ** 2) == pytest.approx(known, rel=0.05)


class Balanced(HTMLParser):
    """Every tag is closed in order."""

    VOID = ("meta", "link", "img", "br", "input", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_says_what_it_shows() -> None:
    html = full()
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    page = BeautifulSoup(html, "html.parser")
    assert "<model>" not in html
    assert not page.select("script, iframe, object")
    for tag in page.select("[src], link[href]"):
        assert str(tag.get("src") or tag.get("href")).startswith("data:")
    style = page.select_one("style")
    assert style is not None
    assert "url(" not in style.get_text()
    assert "prefers-color-scheme: dark" in style.get_text()
    assert page.select_one('meta[name="viewport"]') is not None
    images = page.select("img")
    assert len(images) == 7
    for image in images:
        assert len(str(image["alt"]).split()) >= 15
        svg = base64.b64decode(str(image["src"]).partition(",")[2]).decode()
        assert svg.startswith("<?xml")
        assert "<image" not in svg or 'xlink:href="http' not in svg
    ids = [tag["id"] for tag in page.select("[id]")]
    assert len(ids) == len(set(ids))
    for link in page.select("nav a"):
        assert str(link["href"])[1:] in ids


def test_the_same_tables_give_the_same_bytes() -> None:
    assert build_report(pair(), steps(), "A <model> & more") == full()


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_reads_what_measure_writes(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"table{suffix}"
    tables.write_table(pair(), path, suffix)
    found = read_table(path)
    assert list(found["note"]) == [""] * len(found)
    pd.testing.assert_frame_equal(
        found[["matrix", "nss"]], pair()[["matrix", "nss"]], check_dtype=False
    )


def test_cheap_metrics_alone_make_a_shorter_page() -> None:
    cheap = ("sparsity_bf16", "update_density", "frobenius_norm")
    dear = [c for c in COLUMNS if c.removeprefix("null_") in {*METRICS} - {*cheap}]
    for table in (
        pair().assign(**dict.fromkeys(dear, np.nan)),
        pair().drop(columns=dear),
    ):
        table = report._checked(table, Path("x.csv"))
        page = page_of(table)
        assert [s["id"] for s in page.select("section")] == [
            "overview",
            "sparsity",
            "matrices",
        ]
        assert "Not in the table, so not on this page: mean angle" in page.get_text()


def test_refused_and_uncertain_matrices_are_named() -> None:
    table = pair()
    table.loc[0, "note"] = "refused: 3 NaN and 0 inf after"
    table.loc[0, list(METRICS)] = np.nan
    table.loc[1, "note"] = "angles uncertain by 1.0e-03 degrees: hardly a gap"
    refused, uncertain = report._warnings(table)
    assert refused == (
        "Not measured, 1 of 11 matrices: model.layers.0.q_proj.weight (3 NaN and 0 inf "
        "after)."
    )
    assert uncertain.startswith("Angles of 1 matrices are uncertain")


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
    ],
)
def test_what_stands_out_from_its_null(factors: list[float], verdict: str) -> None:
    table = pair()
    table["null_nss"] = 0.3
    table["nss"] = 0.3 * np.array(factors)
    found = report.against_null(table)
    assert list(found.index) == list(NULL_METRICS)
    assert found.loc["nss", "verdict"] == verdict
    assert found.loc["nss", "ratio"] == pytest.approx(np.mean(factors))
    table["null_nss"] = np.nan
    assert "nss" not in report.against_null(table).index


def test_many_layers_and_experts_are_drawn() -> None:
    table = pair(layers=30)
    table["role"] = table["role"].replace("down", "expert_down")
    page = page_of(table)
    assert len(page.select("img")) == 6
    rows = rows_of(page, "overview", 1)
    assert "expert_down" in rows


def test_works_without_the_books_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPD_GEOMETRY_DATA", str(tmp_path))
    page = page_of(pair(), steps())
    assert list(rows_of(page, "sparsity")) == ["your model"]
    assert len(page.select("img")) == 7


# --- bad input -----------------------------------------------------------------------


def spoil_number(path: Path) -> None:
    pair().astype({"nss": object}).replace({"nss": {0.4: "many"}}).to_csv(path)


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("a.csv", lambda p: None, "a.csv does not exist, expected a table"),
        ("a.txt", lambda p: p.write_text("x"), "a.txt ends in '.txt', expected one of"),
        ("a.csv", lambda p: p.write_text(""), "a.csv is damaged"),
        ("a.json", lambda p: p.write_text('[{"matrix": '), "a.json is damaged"),
        ("a.parquet", lambda p: p.write_bytes(b"PAR1"), "a.parquet is damaged"),
        ("a.csv", lambda p: p.write_bytes(b"\xff\xfe\x00"), "a.csv is damaged"),
        ("a.csv", lambda p: p.mkdir(), "a.csv does not exist, expected a table"),
        (
            "a.csv",
            lambda p: pair().drop(columns=["role", "cols"]).to_csv(p),
            "a.csv has no column role, cols, expected a table of opd-geometry measure",
        ),
        (
            "a.csv",
            lambda p: steps().drop(columns="stable_rank").to_csv(p),
            "a.csv has no column stable_rank, expected a table of opd-geometry traj",
        ),
        ("a.csv", lambda p: pair().head(0).to_csv(p), "a.csv has no rows"),
        ("a.csv", spoil_number, "a.csv: column nss is"),
    ],
)
def test_a_bad_table_is_one_line(
    name: str,
    make: Callable[[Path], object],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(tmp_path / name)
    out = tmp_path / "report.html"
    assert cli.main(["report", str(tmp_path / name), "--out", str(out)]) == 1
    printed, error = capsys.readouterr()
    assert printed == ""
    assert error.count("\n") == 1
    assert said in error
    assert not out.exists()


def test_a_page_is_replaced_only_by_force_and_only_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = tmp_path / "run.csv", tmp_path / "report.html"
    steps().to_csv(table, index=False)
    out.write_text("earlier")
    assert cli.main(["report", str(table), "--out", str(out)]) == 1
    assert "report.html exists; give --force to replace it" in capsys.readouterr().err
    monkeypatch.setattr(
        Path,
        "write_text",
        lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    assert cli.main(["report", str(table), "--out", str(out), "--force"]) == 1
    assert "No space left on device; " in capsys.readouterr().err
    assert out.read_text() == "earlier"
    monkeypatch.undo()
    assert cli.main(["report", str(table), "--out", str(out), "--force"]) == 0
    assert capsys.readouterr().out == f"Open {out}\n"
    assert "run: where the weights moved" in out.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "run.csv"]


def test_two_tables_of_one_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pair.csv"
    pair().to_csv(path, index=False)
    with pytest.raises(ValueError, match="a second table of one kind"):
        write_report([path, path], tmp_path / "report.html")
    with pytest.raises(ValueError, match="no table, expected one"):
        write_report([], tmp_path / "report.html")


def test_maps_keep_small_numbers_readable() -> None:
    figure = figures.role_maps(
        tidy(pair().assign(nss=0.0004, null_nss=0.0003)),
        "yours",
        ["nss", "stable_rank"],
    )
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[:2] == ["spectral shift NSS x 1000", "stable rank"]
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert texts == {"0.4"}
    assert re.fullmatch(r"your model\nlayer", figure.axes[0].get_ylabel())

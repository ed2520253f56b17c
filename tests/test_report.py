"""The report is one page that needs nothing else, and says what the tables say."""

import html
import math
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from opd_geometry import cli, pairs, report
from opd_geometry.checkpoints import list_matrices

ROOT = Path(__file__).resolve().parents[1]
BEFORE, AFTER = (
    ROOT / "data" / "checkpoints" / f"laptop-{arm}-s0" for arm in ("sft", "opd")
)


@pytest.fixture(scope="module")
def pair() -> pd.DataFrame:
    return pairs.measure_checkpoints(BEFORE, AFTER)


@pytest.fixture(scope="module")
def course() -> pd.DataFrame:
    table = pairs.trajectory(BEFORE, [AFTER], k=2, roles=("q", "k"))
    return table.assign(step=150)


@pytest.fixture(scope="module")
def page(pair: pd.DataFrame, course: pd.DataFrame) -> str:
    return report.build_report(pair, course, "a model")


def text_of(page: str) -> str:
    """What a reader reads: without tags and spaces that do not break."""
    plain = html.unescape(re.sub(r"<[^>]+>", " ", page)).replace("\xa0", " ")
    return re.sub(r"\s+", " ", plain)


def test_page_needs_nothing_but_itself(page: str) -> None:
    sources = re.findall(r"(?:src|href|action)=[\"']([^\"']*)", page)
    assert sources
    assert all(s.startswith(("data:", "#")) for s in sources)
    assert not re.search(r"url\((?!data:)|@import|<script|<iframe", page)
    assert str(ROOT) not in page


def test_every_picture_is_described_and_themes_follow_the_reader(page: str) -> None:
    pictures = re.findall(r"<img[^>]*>", page)
    assert len(pictures) >= 5
    for picture in pictures:
        alt = re.search(r'alt="([^"]+)"', picture)
        assert alt
        assert len(alt[1].split()) >= 8
    assert "prefers-color-scheme" in page
    assert 'name="viewport"' in page


def test_sparsity_is_that_of_the_files(pair: pd.DataFrame, page: str) -> None:
    """Recounted from the safetensors, with nothing of the table in between."""
    before, after = (load_file(p / "model.safetensors") for p in (BEFORE, AFTER))
    everything = [m.name for m in list_matrices(BEFORE)]
    same = sum(int((before[n] == after[n]).sum()) for n in everything)
    sizes = sum(before[n].numel() for n in everything)
    assert f"{100 * same / sizes:.1f} %" in text_of(page)
    summary = pairs.summarise(pair).set_index("role")["sparsity_bf16"]
    assert summary["all"] == pytest.approx(same / sizes, abs=1e-12)


def test_the_papers_rows_and_ours_stand_beside(page: str) -> None:
    text = text_of(page)
    for printed in ("8.1 %", "51.6 %", "77.2 %"):
        assert printed in text
    arms = report._with_ours(pd.DataFrame())[1]
    assert arms == ["yours", "sft", "sft-matched", "opd", "rlvr"]


def test_page_is_the_same_for_the_same_tables(
    pair: pd.DataFrame, course: pd.DataFrame, page: str
) -> None:
    assert report.build_report(pair, course, "a model") == page


def test_refused_matrices_and_odd_names_still_render(pair: pd.DataFrame) -> None:
    broken = pair.copy()
    numbers = broken.columns.difference(["matrix", "role", "layer", "rows", "cols"])
    numbers = broken[numbers].select_dtypes("number").columns
    broken.loc[3, numbers] = math.nan
    broken.loc[3, "matrix"] = "<script>alert(1)</script>"
    page = report.build_report(broken, None, "<b>title</b>")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "<b>title</b>" not in page


def test_a_table_with_the_least_columns_renders(pair: pd.DataFrame) -> None:
    page = report.build_report(pair[list(report.PAIR_BASE)], None, "little")
    assert "little" in text_of(page)
    with pytest.raises(ValueError, match="no table, expected one of measure"):
        report.build_report(None, None, "nothing")


def test_stable_rank_is_held_against_a_gaussian_of_the_same_shape() -> None:
    table = pd.DataFrame(
        {"matrix": ["w"], "role": ["q"], "layer": [0], "rows": [64], "cols": [256]}
    ).assign(sparsity_bf16=0.5, stable_rank=3.0)
    tidy = report.tidy(table).set_index("metric")["value"]
    noise = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).double()
    s = torch.linalg.svdvals(noise)
    measured = float((s**2).sum() / s[0] ** 2)
    assert tidy["null_stable_rank"] == pytest.approx(measured, rel=0.1)
    assert tidy["parameters"] == 64 * 256


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["report", *arguments]) != 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("opd-geometry: ")
    return err


def test_bad_tables_are_one_line(
    pair: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "report.html")
    table = tmp_path / "pair.csv"
    assert "does not exist" in refused(capsys, str(table), "--out", out)
    pair.drop(columns="sparsity_bf16").to_csv(table, index=False)
    assert "no column sparsity_bf16" in refused(capsys, str(table), "--out", out)
    pair.head(0).to_csv(table, index=False)
    assert "has no rows" in refused(capsys, str(table), "--out", out)
    pair.assign(nss="many").to_csv(table, index=False)
    assert "column nss holds" in refused(capsys, str(table), "--out", out)
    (tmp_path / "pair.parquet").write_bytes(b"PAR1 cut")
    line = refused(capsys, str(tmp_path / "pair.parquet"), "--out", out)
    assert "cannot be read" in line
    (tmp_path / "pair.txt").write_text("")
    assert "suffix '.txt'" in refused(capsys, str(tmp_path / "pair.txt"), "--out", out)
    assert not Path(out).exists()


def test_what_is_there_stays_unless_forced(
    pair: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = tmp_path / "pair.csv", tmp_path / "report.html"
    pair.to_csv(table, index=False)
    out.write_text("earlier")
    line = refused(capsys, str(table), "--out", str(out))
    assert "--force" in line
    assert out.read_text() == "earlier"
    assert cli.main(["report", str(table), "--out", str(out), "--force"]) == 0
    assert out.read_text().lstrip().lower().startswith("<!doctype html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pair.csv", "report.html"]


def test_an_interrupted_write_leaves_the_earlier_page(
    pair: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, out = tmp_path / "pair.csv", tmp_path / "report.html"
    pair.to_csv(table, index=False)
    out.write_text("earlier")

    def stop(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "build_report", stop)
    with pytest.raises(KeyboardInterrupt):
        report.write_report([table], out, force=True)
    assert out.read_text() == "earlier"

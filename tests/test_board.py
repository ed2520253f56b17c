"""The board has every claim once, in words, and its verdicts are those of the table."""

import math

import pandas as pd
import pytest
from bs4 import BeautifulSoup

from opd_geometry.analysis.claims import claims_table
from opd_geometry.analysis.statements import CLAIMS
from opd_geometry.analysis.verdicts import VERDICTS
from opd_geometry.book import board
from opd_geometry.experiments import measure


@pytest.fixture
def findings() -> pd.DataFrame:
    found = claims_table(pd.DataFrame(columns=measure.COLUMNS))
    found.loc[0, ["effect", "low", "high"]] = [-0.05591, -0.066, -0.0458]
    found.loc[0, "n_seeds"] = 5
    found.loc[0, "ours"] = "1.2 / 25.2 / 19.6 % (sft / opd / rlvr)"
    found.loc[0, ["null", "matched"]] = ["null opd: -0.2, ruled out", "a < b"]
    found.loc[0, ["unit", "verdict"]] = [
        "share of entries: rlvr minus opd",
        "reproduced",
    ]
    return found


def test_every_verdict_has_a_mark() -> None:
    assert set(board.VERDICT_MARKS) == set(VERDICTS)


def test_every_claim_has_a_tile_and_its_chapter(findings: pd.DataFrame) -> None:
    tree = BeautifulSoup(board.board(findings), "html.parser")
    tiles = tree.select("li.claim")
    assert len(tiles) == len(CLAIMS)
    for tile, claim in zip(tiles, CLAIMS, strict=True):
        assert claim.statement in tile.get_text()
        assert tile["data-part"] in board.PARTS
    assert [tile["data-verdict"] for tile in tiles] == list(findings["verdict"])
    brief = BeautifulSoup(board.board(findings, brief=True), "html.parser")
    assert len(brief.select("li.claim a")) == len(CLAIMS)
    assert not brief.select("dl, script")


def test_a_tile_has_the_same_unit_as_the_paper(findings: pd.DataFrame) -> None:
    row = findings.iloc[0].to_dict()
    assert board.effect_text(row) == "-5.59 [-6.6, -4.58] points (rlvr minus opd)"
    assert board.effect_text({**row, "low": ""}) == "-5.59 points (rlvr minus opd)"
    assert board.effect_text({**row, "effect": math.nan}) == "not measured"
    tile = BeautifulSoup(board.board(findings), "html.parser").select_one("li.claim")
    assert tile is not None
    text = tile.get_text(" ")
    assert "−5.59 [−6.6, −4.58] points (RLVR minus OPD)" in text
    assert "null OPD: −0.2, ruled out" in text
    assert "The paper 8.1 / 51.6 / 77.2 % (SFT / OPD / RLVR) (Table 1)" in text
    assert "Here 1.2 / 25.2 / 19.6 % (SFT / OPD / RLVR)" in text
    assert "a < b" in text


def test_one_seed_has_no_verdict(findings: pd.DataFrame) -> None:
    findings.loc[0, ["n_seeds", "verdict"]] = [1, "inconclusive"]
    assert "? one seed: no verdict" in board.board(findings)
    assert "? inconclusive" not in board.board(findings)


def test_marks_count_the_claims_of_a_chapter(findings: pd.DataFrame) -> None:
    marks = board.tally(findings)
    assert marks["02_distance"].startswith("✓1 –")
    told = " ".join(marks.values()).split()
    assert sum(int(mark[1:]) for mark in told) == len(CLAIMS)


def test_other_worlds_and_the_regime_stand_on_the_tile(findings: pd.DataFrame) -> None:
    told = {"world": "published", "verdict_in_regime": findings["verdict"]}
    told |= {"regime": "", "verdict_with_wrong_rewards": ""}
    told |= {"regime_with_wrong_rewards": ""}
    main, other = (
        findings.assign(**told),
        findings.assign(**(told | {"world": "pretrained"})),
    )
    main.loc[0, "verdict_in_regime"] = "regime not tested"
    main.loc[0, "regime"] = "opd over rlvr 0.80, the paper 3.69: not reached"
    main.loc[0, "verdict_with_wrong_rewards"] = "inconclusive"
    main.loc[0, "regime_with_wrong_rewards"] = "opd over rlvr 1.74"
    other.loc[0, ["verdict", "n_seeds"]] = ["inconclusive", 2]
    both = pd.concat([main, other], ignore_index=True)
    tiles = BeautifulSoup(board.board(both), "html.parser").select("li.claim")
    assert len(tiles) == len(CLAIMS)
    text = tiles[0].get_text(" ")
    assert "the paper's regime is not tested" in text
    assert "OPD over RLVR 0.80, the paper 3.69: not reached" in text
    assert "inconclusive; OPD over RLVR 1.74" in text
    assert "Gemma 3 270M inconclusive (2 seeds); 1.2 / 25.2 / 19.6 %" in text
    assert tiles[0]["data-regime"] == "not reached"
    assert {tile["data-regime"] for tile in tiles[1:]} == {"not asked"}
    assert "regime is not tested" not in tiles[1].get_text(" ")
    brief = board.board(both, brief=True)
    assert f"<p>Of {len(CLAIMS)} claims: " in brief
    assert " 1 compare arms that went" in brief
    assert "compare arms that went" not in board.board(findings)
    assert board.tally(both) == board.tally(findings)


def test_a_claim_of_no_part_is_refused(findings: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"is about Table 9: give it a part"):
        board.board(findings.assign(paper_item="Table 9"))

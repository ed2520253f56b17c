"""The board of claims: a tile a claim, from the table of claims, for a page."""

import math
import re
from collections.abc import Mapping
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from opd_geometry.book.figures import ARM_STYLES

ARM = re.compile(
    rf"(?<![\w-])(?:{'|'.join(sorted(ARM_STYLES, key=len, reverse=True))})(?![\w-])"
)
VERDICT_MARKS = {
    "reproduced": "✓",
    "not reproduced": "✗",
    "inconclusive": "?",
    "explained by a control": "≈",
    "not measured": "–",
}
# What the paper's figures and tables are about: a part of the board, and its chapter.
PARTS = {
    "How much, and where": ("02_distance", ("Table 1", "Figure 2", "Figure 3")),
    "When, and in how many directions": ("03_rank", ("Figure 4", "Figure 5")),
    "What it depends on": (
        "06_controls",
        ("Figure 6", "Figures 6", "Figure 7", "Figures 7"),
    ),
}
ENDS = ("low", "high")
# Profiles by name: a claim's first row is its tile, those of other worlds stand in it.
WORLDS = {
    "published": "the book's small world, OPD and RLVR at one budget",
    "pretrained": "Gemma 3 270M",
}
# What a tile shows at once; the rest is folded.
BESIDE = "Its controls"  # of a claim that came out: what it was held against
FIRST = ("The paper", "Here", "What decides", BESIDE, *WORLDS.values())
UNTESTED = "regime not tested"
NOT_ASKED = "not asked"  # of a claim about one arm
CHAPTER_OF = {"sparsity-robust": "07_regimes"}  # where it is not that of its part


def template(name: str) -> Template:
    """A page beside this module; what is filled in is escaped."""
    pages = PackageLoader("opd_geometry", "book")
    all_of = Environment(loader=pages, autoescape=True, undefined=StrictUndefined)
    return all_of.get_template(name)


def part_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """A claim's part of the board, and the chapter that judges it.

    Raises:
        ValueError: a figure or table of the paper that no part has.
    """
    for part, (chapter, items) in PARTS.items():
        if str(row["paper_item"]).startswith(items):
            return part, CHAPTER_OF.get(str(row["id"]), chapter)
    raise ValueError(
        f"{row['id']} is about {row['paper_item']}: give it a part in board.PARTS"
    )


def board(findings: pd.DataFrame, brief: bool = False) -> str:
    """Every claim as a tile.

    Args:
        findings: of ``claims.claims_table``, or ``claims.csv`` as it was written.
        brief: the verdict and the claim only, as on the first page.

    Returns:
        HTML; its filter shows itself where scripts run, and all tiles are there where
        they do not. Links lead from a page beside ``chapters/``.

    Raises:
        ValueError: as ``part_of``.
    """
    rows, others = by_world(findings)
    tiles = [_tile(row, others.get(row["id"], [])) for row in rows]
    found = [tile["verdict"] for tile in tiles]
    verdicts = [name for name in VERDICT_MARKS if name in found]
    return template("board.html").render(
        brief=brief,
        tiles=tiles,
        counts=", ".join(f"{found.count(name)} {name}" for name in verdicts),
        untested=sum(row.get("verdict_in_regime") == UNTESTED for row in rows),
        verdicts=[name for name in VERDICT_MARKS if name in set(findings["verdict"])],
        parts=PARTS,
        regimes=("reached", "not reached", NOT_ASKED),
    )


def by_world(
    findings: pd.DataFrame,
) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """The claims in a table's first world, and by claim their rows in the others."""
    rows = findings.astype(object).fillna("").to_dict("records")
    main: list[dict[str, Any]] = []
    others: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("world", "") == rows[0].get("world", ""):
            main.append(row)
        else:
            others.setdefault(row["id"], []).append(row)
    return main, others


def tally(findings: pd.DataFrame) -> dict[str, str]:
    """The verdicts of a chapter's claims as marks, for the list of chapters.

    Args:
        findings: as in ``board``.

    Returns:
        Chapter to a text such as ``✓1 ✗5``, in the order of the verdicts.
    """
    rows = pd.DataFrame(by_world(findings)[0])
    chapters = [part_of(row)[1] for row in rows.to_dict("records")]
    counts = rows.groupby([chapters, "verdict"]).size()
    told: dict[str, list[str]] = {}
    for chapter in dict.fromkeys(chapters):
        found = counts[chapter]
        known = [name for name in VERDICT_MARKS if name in found]
        told[chapter] = [f"{VERDICT_MARKS[name]}{found[name]}" for name in known]
    return {chapter: " ".join(marks) for chapter, marks in told.items()}


def marked(verdict: str, n_seeds: int) -> str:
    """A verdict with its mark; one seed, which has no interval, gets none.

    >>> marked("reproduced", 5), marked("inconclusive", 1)
    ('✓ reproduced', '? one seed: no verdict')
    """
    alone = verdict == "inconclusive" and n_seeds == 1
    return f"{VERDICT_MARKS[verdict]} {'one seed: no verdict' if alone else verdict}"


def _tile(row: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, Any]:
    """What the template says of a claim."""
    part, chapter = part_of(row)
    verdict = str(row["verdict"])
    reached = "not reached" if row.get("verdict_in_regime") == UNTESTED else "reached"
    asked = row.get("regime") and verdict != "not measured"
    told = facts(row) | {_world(other): in_short(other) for other in others}
    there = [(_world(x), str(x["regime"])) for x in others if x.get("regime")]
    told |= {f"Regime, {name}": text for name, text in there}
    known = [(name, in_words(text)) for name, text in told.items()]
    return {
        "id": row["id"],
        "statement": row["statement"],
        "part": part,
        "chapter": chapter,
        "verdict": verdict,
        "marked": marked(verdict, row["n_seeds"]),
        "regime": reached if asked else NOT_ASKED,
        "nearest": in_words(row["matched"]) if verdict == "reproduced" else "",
        "first": [fact for fact in known if fact[0] in FIRST],
        "rest": [fact for fact in known if fact[0] not in FIRST],
    }


def facts(row: Mapping[str, Any]) -> dict[str, str]:
    """What stands on a tile below its claim: heading to text, empty ones left out."""
    wrong = row.get("verdict_with_wrong_rewards", "")
    known = {
        "The paper": f"{row['paper_value']} ({row['paper_item']})",
        "Here": row.get("ours", ""),
        "Gaussian null": row.get("ours_null", ""),
        "SFT, matched, for OPD": row.get("ours_control", ""),
        "What decides": asked_text(row),
        BESIDE: row["controls"] if row["verdict"] == "reproduced" else "",
        "A null": row["null"],
        "A control": row["matched"],
        "Where": f"{_world(row)}; {row.get('n', '') or n_seeds_text(row['n_seeds'])}",
        "Regime (displacements)": row.get("regime", ""),
        "Read from": row.get("readout", ""),
        "Read from bf16": row.get("verdict_in_bf16", ""),
        "RLVR at the paper's batch and steps": row.get("verdict_at_papers_ratio", ""),
        "45 % of RLVR's rewards wrong": wrong
        and f"{wrong}; {row['regime_with_wrong_rewards']}",
    }
    known = {name: str(text) for name, text in known.items()}
    return {name: text for name, text in known.items() if text}


def _world(row: Mapping[str, Any]) -> str:
    name = str(row.get("world", "")) or next(iter(WORLDS))
    return WORLDS.get(name, f"profile {name}")


def in_short(row: Mapping[str, Any]) -> str:
    """A claim in another world: its verdict, levels and decisive effect."""
    if row["verdict"] == "not measured":
        return str(row["verdict"])
    told = [
        f"{row['verdict']} ({n_seeds_text(row['n_seeds'])})",
        row.get("ours", ""),
        asked_text(row),
    ]
    return "; ".join(str(text) for text in told if text)


def asked_text(row: Mapping[str, Any]) -> str:
    """``effect_text``, and the range in which the claim holds."""
    asked = row.get("asked", "")
    return effect_text(row) + (f"; asked: {asked}" if asked else "")


def n_seeds_text(n: int) -> str:
    """How many seeds, in words."""
    return "1 seed" if n == 1 else f"{n} seeds"


def effect_text(row: Mapping[Any, Any]) -> str:
    """The deciding effect with its interval, a share of entries in per cent points."""
    numbers = [float("nan" if row[x] == "" else row[x]) for x in ("effect", *ENDS)]
    if math.isnan(numbers[0]):
        return "not measured"
    unit, _, which = str(row["unit"]).partition(": ")
    scale, name = (100, "points") if unit == "share of entries" else (1, unit)
    effect, *ends = (f"{scale * x:.3g}" for x in numbers)
    between = "" if math.isnan(numbers[1]) else f" [{', '.join(ends)}]"
    return (
        f"{effect}{between} {name} ({which})" if which else f"{effect}{between} {name}"
    )


def arm_name(name: str) -> str:
    """An arm's name; of a confined one, with the name of its free run."""
    family, confined, _ = name.partition("-projected")
    label = ARM_STYLES[name].label
    return f"{ARM_STYLES[family].label} ({label})" if confined else label


def in_words(text: str) -> str:
    """Arms by their names, and a hyphen before a number as a minus sign.

    >>> in_words("sft-matched minus opd: -0.5, ruled out")
    'SFT, matched minus OPD: −0.5, ruled out'
    >>> in_words("kept by rlvr-projected")
    'kept by RLVR (own early subspace)'
    """
    text = ARM.sub(lambda found: arm_name(found[0]), text)
    return re.sub(r"(?<![\w-])-(?=[\d.])", "\N{MINUS SIGN}", text)

"""Verdicts on the paper's claims: a tidy table in, findings, their table and cards out.

No verdict is typed anywhere: ``judge`` computes it, and the results page, the landing
page and every chapter's card are rendered from ``claims_table``.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from opd_geometry.analysis.evidence import arms_matching
from opd_geometry.analysis.statements import CLAIMS, RATIO, Claim, claim_of
from opd_geometry.analysis.verdicts import (
    Control,
    Part,
    deciding,
    defined,
    interval,
    ruling,
    state,
    verdict_of,
)
from opd_geometry.experiments.measure import COLUMNS
from opd_geometry.files import clear_write_errors, replacing

NUMBERS = ("effect", "low", "high")


@dataclass(frozen=True)
class Finding:
    """What a table says about a claim.

    Attributes:
        id: of the claim.
        n_seeds: seeds behind the effect.
        effect, low, high: of the part that decides (a failing one, else an open one,
            else the closest call) and its 95 % interval; NaN where undefined.
        unit: of the effect, and which part it is.
        null, matched: what the control shows, and whether that rules it out.
        verdict: one of ``verdicts.VERDICTS``.
        runs: arms and seeds it rests on, and what is missing.
    """

    id: str
    n_seeds: int
    effect: float
    unit: str
    low: float
    high: float
    null: str
    matched: str
    verdict: str
    runs: str


def judge(claim: Claim, table: pd.DataFrame) -> Finding:
    """Apply a claim's rule to a tidy table.

    Args:
        claim: one of ``CLAIMS``.
        table: with ``measure.COLUMNS``; at most one run an arm and seed.

    Raises:
        ValueError: columns are missing, or an arm has two runs of one seed.
    """
    table = _of_claim(claim, table)
    check_table(table)
    runs = _runs(claim, table)
    if missing(claim, table):
        nan, none = math.nan, "not measured"
        return Finding(claim.id, 0, nan, claim.unit, nan, nan, none, none, none, runs)
    parts, controls = claim.evidence(table)
    shown = deciding(parts)
    effect, low, high = (_shown(x, claim.unit) for x in interval(shown.values))
    return Finding(
        claim.id,
        len(defined(shown.values)),
        effect,
        f"{claim.unit}: {shown.label}",
        low,
        high,
        _control_text(controls, "null", claim.unit),
        _control_text(controls, "matched", claim.unit),
        verdict_of(parts, controls),
        runs,
    )


def at_papers_ratio(table: pd.DataFrame) -> pd.DataFrame:
    """The table with RLVR at the paper's ratio of batch and steps in RLVR's place.

    The paper's RLVR has 8 times OPD's batch and 3.4 times its steps; the book's main
    verdicts compare the two at one budget.
    """
    arms = table["arm"].astype(object)
    others = table.assign(arm=arms)[arms != "rlvr"]
    return others.replace({"arm": {"rlvr-paper": "rlvr"}})


def claims_table(table: pd.DataFrame) -> pd.DataFrame:
    """All claims with their verdicts, in the paper's order.

    Returns:
        One row a claim: id, paper_item, statement, paper_value, n_seeds, effect, unit,
        low, high, null, matched, verdict, verdict_at_papers_ratio, rule, runs. The last
        verdict but one is that of ``at_papers_ratio``, and empty for a claim that does
        not name RLVR.

    Raises:
        ValueError: as ``judge``.
    """
    other = at_papers_ratio(table)
    rows = []
    for claim in CLAIMS:
        twice = "rlvr" in claim.arms
        again = judge(claim, other).verdict if twice else ""
        rows.append(_row(claim, judge(claim, table), again))
    return pd.DataFrame(rows)


def _row(claim: Claim, finding: Finding, again: str = "") -> dict[str, object]:
    return {
        "id": claim.id,
        "paper_item": claim.paper_item,
        "statement": claim.statement,
        "paper_value": claim.paper_value,
        "n_seeds": finding.n_seeds,
        "effect": finding.effect,
        "unit": finding.unit,
        "low": finding.low,
        "high": finding.high,
        "null": finding.null,
        "matched": finding.matched,
        "verdict": finding.verdict,
        "verdict_at_papers_ratio": again,
        "rule": claim.rule,
        "runs": finding.runs,
    }


def parts_table(claim_id: str, table: pd.DataFrame) -> pd.DataFrame:
    """Every part and control of a claim, for a chapter's check cell.

    Returns:
        Columns kind (part, null, matched), label, n_seeds, effect, low, high, asked
        (the range of a part; of a control, the range in which it shows the effect
        too), outcome. Empty when the claim is not measured.

    Raises:
        ValueError: unknown claim, or as ``judge``.
    """
    claim = claim_of(claim_id)
    table = _of_claim(claim, table)
    check_table(table)
    judged: list[tuple[str, Part, str]] = []
    if not missing(claim, table):
        parts, controls = claim.evidence(table)
        judged += [("part", part, state(part)) for part in parts]
        judged += [(c.kind, c.own, ruling(c)) for c in controls]
    rows = [
        (
            kind,
            part.label,
            len(defined(part.values)),
            *(_shown(x, claim.unit) for x in interval(part.values)),
            _range_text(part, claim.unit),
            outcome,
        )
        for kind, part, outcome in judged
    ]
    columns = ["kind", "label", "n_seeds", *NUMBERS, "asked", "outcome"]
    return pd.DataFrame(rows, columns=columns)


def write_claims(findings: pd.DataFrame, path: Path) -> Path:
    """Write the claims table as csv: whole or not at all, 4 significant digits.

    Args:
        findings: of ``claims_table``.
        path: the file.

    Raises:
        ValueError: not a claims table, or the file cannot be written.
    """
    if "verdict" not in findings.columns:
        raise ValueError(
            f"a table with columns {', '.join(findings.columns)}: expected that of "
            "claims_table"
        )
    rounded = findings.copy()
    for column in NUMBERS:
        rounded[column] = [float(f"{value:.4g}") for value in findings[column]]
    with clear_write_errors(path), replacing(path) as draft:
        rounded.to_csv(draft, index=False, lineterminator="\n")
    return path


def claim_card(
    claim_id: str,
    table: pd.DataFrame,
    provenance: pd.DataFrame | None = None,
    scale: str = "",
) -> str:
    """The card at the top of a chapter, as a markdown table.

    Args:
        claim_id: of a claim.
        table: a tidy table, or a claims table.
        provenance: of ``measure.load``; adds what the runs cost.
        scale: what was trained, in a few words; adds them.

    Raises:
        ValueError: unknown claim, or as ``judge``.
    """
    claim = claim_of(claim_id)
    if "verdict" in table.columns:
        row = table[table["id"] == claim_id].iloc[0].to_dict()
    else:
        row = _row(claim, judge(claim, table))
    lines = [
        ("The claim", f"{claim.statement} ({claim.paper_item}, `{claim.id}`)"),
        ("The paper prints", claim.paper_value),
        ("Here", _effect_text(row)),
        ("Null", _control_line(claim.null, row["null"])),
        ("Matched control", _control_line(claim.matched, row["matched"])),
        ("Verdict", f"**{row['verdict']}**"),
        ("Rule, set before the runs", claim.rule),
        ("Runs", f"{scale}; {row['runs']}" if scale else row["runs"]),
    ]
    if provenance is not None:
        lines.append(("Cost", _cost_text(claim, provenance)))
    return "| | |\n|---|---|\n" + "".join(f"| {a} | {b} |\n" for a, b in lines)


# --- what is there, and what is missing ------------------------------------------


def check_table(table: pd.DataFrame) -> None:
    """Refuse what would be averaged wrongly.

    Raises:
        ValueError: columns are missing, or an arm has two runs of one seed.
    """
    absent = [column for column in COLUMNS if column not in table.columns]
    if absent:
        raise ValueError(
            f"table without {', '.join(absent)}; expected the columns of measure.load"
        )
    pairs = table[["run", "arm", "seed"]].drop_duplicates()
    twice = pairs[pairs.duplicated(["arm", "seed"])]
    if len(twice):
        arm, seed = twice.iloc[0][["arm", "seed"]]
        raise ValueError(
            f"two runs of arm {arm}, seed {seed}; expected one: keep a single profile"
        )


def _of_claim(claim: Claim, table: pd.DataFrame) -> pd.DataFrame:
    """The rows a claim may read: few of many, and each part goes through them again."""
    if "arm" not in table:
        return table
    arms = arms_matching(table, claim.arms + claim.control_arms)
    return table[table["arm"].isin(arms)]


def missing(claim: Claim, table: pd.DataFrame) -> list[str]:
    """Arms, and metrics of arms, that a claim's parts need and the table lacks."""
    absent = []
    for pattern in claim.arms:
        arms = arms_matching(table, [pattern])
        absent += [] if arms else [pattern]
        for arm in arms:
            there = set(table.loc[table["arm"] == arm, "metric"].unique())
            absent += [
                f"{name} of {arm}" for name in claim.metrics if name not in there
            ]
    return absent


def _runs(claim: Claim, table: pd.DataFrame) -> str:
    """``opd 0-4; rlvr 0-4; missing: ...``: arms and seeds behind a finding."""
    arms = list(dict.fromkeys(arms_matching(table, claim.arms + claim.control_arms)))
    texts = [
        f"{arm} {_seeds_text(table.loc[table['arm'] == arm, 'seed'])}" for arm in arms
    ]
    controls = [arm for arm in claim.control_arms if arm not in arms]
    absent = ", ".join([*missing(claim, table), *controls])
    return "; ".join([*texts, f"missing: {absent}"] if absent else texts)


def _seeds_text(seeds: pd.Series) -> str:
    numbers = sorted(int(seed) for seed in seeds.unique())
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(str(number) for number in numbers)


# --- numbers as a reader sees them -----------------------------------------------


def _shown(value: float, unit: str) -> float:
    """Means of logarithms are shown as ratios."""
    return math.exp(value) if unit == RATIO else value


def _range_text(part: Part, unit: str) -> str:
    low, high = _shown(part.lower, unit), _shown(part.upper, unit)
    if math.isinf(part.upper):
        return f"above {low:.3g}"
    return f"below {high:.3g}" if math.isinf(part.lower) else f"{low:.3g} to {high:.3g}"


def _control_text(controls: list[Control], kind: str, unit: str) -> str:
    """The control of a kind that stands most in the claim's way: value and ruling."""
    order = ("shows it too", "not available", "undecided", "ruled out")
    ours = [control for control in controls if control.kind == kind]
    if not ours:
        return "none"
    worst = min(ours, key=lambda control: order.index(ruling(control)))
    value = _shown(interval(worst.own.values)[0], unit)
    number = "" if math.isnan(value) else f"{value:.4g}, "
    return f"{worst.own.label}: {number}{ruling(worst)}"


def _control_line(what: str, shown: object) -> str:
    return what if shown == "none" else f"{what} Here: {shown}."


def _effect_text(row: dict[str, object]) -> str:
    if row["verdict"] == "not measured":
        return "not measured"
    effect, low, high = (float(f"{row[name]:.3g}") for name in NUMBERS)
    between = f"95 % interval {low:g} to {high:g}"
    if math.isnan(low):
        between = "interval undefined"
    seeds = f"{row['n_seeds']} seed" + ("" if row["n_seeds"] == 1 else "s")
    return f"**{effect:g}** ({row['unit']}), {between}, {seeds}"


def _cost_text(claim: Claim, provenance: pd.DataFrame) -> str:
    """Seconds of training behind a claim, in how many runs, on which machines."""
    used = arms_matching(provenance, claim.arms + claim.control_arms)
    rows = provenance[provenance["arm"].isin(used)]
    machines = "; ".join(sorted({str(name) for name in rows["machine"]}))
    seconds = rows["wall_seconds"].sum()
    return f"{seconds:,.0f} s of training in {len(rows)} runs ({machines})"

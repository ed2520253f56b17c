"""Verdicts on the paper's claims: a tidy table in, findings, their table and cards out.

No verdict is typed anywhere: ``judge`` computes it, and the results page, the landing
page and every chapter's card are rendered from ``claims_table``.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from opd_geometry.analysis.evidence import (
    READOUTS,
    Levels,
    Table,
    arms_matching,
    first,
    last,
    levels_of,
    over_matrices,
    with_every_null,
)
from opd_geometry.analysis.statements import (
    CLAIMS,
    RATIO,
    SHARE,
    THREE_ARMS,
    Claim,
    claim_of,
)
from opd_geometry.analysis.verdicts import (
    RULINGS,
    Control,
    Evidence,
    Part,
    deciding,
    defined,
    state,
    states,
    verdict_of,
)
from opd_geometry.experiments.committed import COLUMNS
from opd_geometry.experiments.profiles import PUBLISHED, settings_of, unit_of_n
from opd_geometry.experiments.records import check_seal, sealing
from opd_geometry.files import clear_write_errors
from opd_geometry.training.settings import Student

NUMBERS = ("effect", "low", "high")
READOUT_TEXTS = {
    "float32": "Float32 master weights.",
    "bf16": "Weights as stored in bf16: that is what the claim is about.",
}


@dataclass(frozen=True)
class Finding:
    """What a table says about a claim.

    Attributes:
        id: of the claim.
        readout: what the weights were read from.
        seeds: those behind the effect.
        effect, low, high: of the part that decides (a failing one, else an open one,
            else the closest call) and its 95 % interval; NaN where undefined.
        unit: of the effect, and which part it is.
        asked: the range in which that part holds, and whether Holm's method leaves it
            open although its own interval lies outside.
        null, matched: the control of that kind that stands most in the way, what it
            shows, and what became of it.
        nulls, controls: all of either kind, by what became of them.
        verdict: one of ``verdicts.VERDICTS``.
        runs: arms and seeds it rests on, and what is missing.
    """

    id: str
    readout: str
    seeds: tuple[int, ...]
    effect: float
    unit: str
    low: float
    high: float
    asked: str
    null: str
    matched: str
    nulls: str
    controls: str
    verdict: str
    runs: str

    @property
    def n_seeds(self) -> int:
        """Seeds behind the effect."""
        return len(self.seeds)


def judge(claim: Claim, table: Table, readout: str | None = None) -> Finding:
    """Apply a claim's rule to a tidy table.

    Args:
        claim: one of ``CLAIMS``.
        table: with ``measure.COLUMNS``; at most one run an arm and seed. Or its levels.
        readout: one of the claim's; None: the one that decides.

    Raises:
        ValueError: columns are missing, an arm has two runs of one seed, or the claim
            is not judged in that readout.
    """
    readout = _readout(claim, readout)
    levels = _of_claim(claim, table)
    runs = _runs(claim, levels, readout)
    if missing(claim, levels, readout):
        nan, none = math.nan, "not measured"
        known = (claim.id, readout, (), nan, claim.unit, nan, nan)
        return Finding(*known, "", none, none, none, none, none, runs)
    parts, controls = _evidence(claim, levels, readout)
    shown = deciding(parts)
    effect, low, high = (_shown(x, claim.unit) for x in shown.interval)
    return Finding(
        claim.id,
        readout,
        tuple(int(seed) for seed in defined(shown.values).index),
        effect,
        f"{claim.unit}: {shown.label}",
        low,
        high,
        _asked(shown, parts, claim.unit),
        _control_text(controls, "null", claim.unit),
        _control_text(controls, "matched", claim.unit),
        _all_text(controls, "null", claim.unit),
        _all_text(controls, "matched", claim.unit),
        verdict_of(parts, controls),
        runs,
    )


def _readout(claim: Claim, readout: str | None) -> str:
    if readout is not None and readout not in claim.readouts:
        known = " or ".join(claim.readouts)
        raise ValueError(f"readout {readout!r} of {claim.id}: expected {known}")
    return readout or claim.readouts[0]


def _suffix(claim: Claim, readout: str) -> str:
    """Of the metrics in a readout that stands beside another one."""
    return READOUTS[readout] if len(claim.readouts) > 1 else ""


def _evidence(claim: Claim, table: Levels, readout: str) -> Evidence:
    suffix = _suffix(claim, readout)
    return claim.evidence(table, suffix) if suffix else claim.evidence(table)


def at_papers_ratio(levels: Levels) -> Levels:
    """The table with RLVR at the paper's ratio of batch and steps in RLVR's place.

    The paper's RLVR has 8 times OPD's batch and 3.4 times its steps; the book's main
    verdicts compare the two at one budget.
    """
    return levels.with_arm("rlvr", "rlvr-paper")


def levels_to_judge(table: pd.DataFrame, profile: str) -> Levels:
    """The levels that claims are judged by.

    Args:
        table: tidy.
        profile: of its runs; of a pretrained student the matrices with every null.

    Raises:
        ValueError: as ``judge``.
    """
    check_table(table)
    if isinstance(settings_of(profile).student, Student):
        table = with_every_null(table)
    return Levels(table)


def claims_table(table: Table, profile: str = PUBLISHED) -> pd.DataFrame:
    """All claims with their verdicts, in the paper's order.

    Args:
        table: tidy, or its ``levels_to_judge``.
        profile: of its runs; says what a seed stands for.

    Returns:
        One row a claim: id, paper_item, statement, paper_value, readout, n_seeds, n
        (with its unit), effect, unit, low, high; ours, ours_null, ours_control (of
        ``levels_text``: the arms, their Gaussian updates, and the matched SFT in OPD's
        place); null, matched, nulls, controls, verdict, verdict_in_bf16,
        verdict_at_papers_ratio, rule, runs. The verdict in bf16 is empty for a claim
        with one readout, the one at the paper's ratio (that of ``at_papers_ratio``) for
        a claim that does not name RLVR.

    Raises:
        ValueError: as ``judge``.
    """
    levels = table if isinstance(table, Levels) else levels_to_judge(table, profile)
    other = at_papers_ratio(levels)
    rows = []
    for claim in CLAIMS:
        beside = [judge(claim, levels, readout) for readout in claim.readouts[1:]]
        ratio = [judge(claim, other)] if "rlvr" in claim.arms else []
        told = (
            levels_text(claim, levels),
            levels_text(claim, levels, "null_"),
            levels_text(claim, levels.with_arm("opd", "sft-matched")),
        )
        rows.append(_row(claim, judge(claim, levels), profile, beside, ratio, told))
    return pd.DataFrame(rows)


def _row(
    claim: Claim,
    finding: Finding,
    profile: str,
    beside: Sequence[Finding] = (),
    ratio: Sequence[Finding] = (),
    told: Sequence[str] = ("", "", ""),
) -> dict[str, object]:
    return {
        "id": claim.id,
        "paper_item": claim.paper_item,
        "statement": claim.statement,
        "paper_value": claim.paper_value,
        "readout": finding.readout,
        "n_seeds": finding.n_seeds,
        "n": unit_of_n(profile, finding.seeds),
        "effect": finding.effect,
        "unit": finding.unit,
        "low": finding.low,
        "high": finding.high,
        "asked": finding.asked,
        "ours": told[0],
        "ours_null": told[1],
        "ours_control": told[2],
        "null": finding.null,
        "matched": finding.matched,
        "nulls": finding.nulls,
        "controls": finding.controls,
        "verdict": finding.verdict,
        "verdict_in_bf16": "".join(other.verdict for other in beside),
        "verdict_at_papers_ratio": "".join(other.verdict for other in ratio),
        "rule": claim.rule,
        "runs": finding.runs,
    }


def levels_text(claim: Claim, table: Table, prefix: str = "") -> str:
    """Levels beside a claim's printed numbers, means over seeds, in their unit.

    Args:
        claim: whose ``shown`` says which.
        table: tidy, or its levels.
        prefix: ``null_`` for the arms' Gaussian updates.

    Returns:
        Such as ``1.2 / 25.2 / 19.6 % (sft / opd / rlvr)``; empty where the claim has no
        levels or an arm is missing.
    """
    shown, levels = claim.shown, levels_of(table)
    if shown is None:
        return ""
    arms = arms_matching(levels, shown.arms)
    paths = [
        over_matrices(levels, arm, prefix + shown.metric, shown.roles, shown.weighted)
        for arm in arms
    ]
    if len(arms) < len(shown.arms) or any(path.dropna().empty for path in paths):
        return ""
    scale, form = (100, ".1f") if shown.unit == "%" else (1, ".3g")
    if shown.moment == "course":
        courses = [path.groupby(level="step").mean() for path in paths]
        ends = [(c.min(), c.max()) for c in courses]
        said = (
            f"{a} {x:{form}} to {y:{form}}"
            for a, (x, y) in zip(arms, ends, strict=True)
        )
        return ", ".join(said)
    moment = first if shown.moment == "first" else last
    means = [scale * moment(path).mean() for path in paths]
    unit = f" {shown.unit}" if shown.unit else ""
    if len(arms) > len(THREE_ARMS):  # variants of the first one
        return (
            f"{min(means[1:]):{form}} to {max(means[1:]):{form}}{unit} in "
            f"{len(arms) - 1} variants, {means[0]:{form}}{unit} in the main run"
        )
    numbers = " / ".join(f"{mean:{form}}" for mean in means)
    return f"{numbers}{unit} ({' / '.join(arms)})"


def parts_table(
    claim_id: str, table: pd.DataFrame, readout: str | None = None
) -> pd.DataFrame:
    """Every part and control of a claim, for a chapter's check cell.

    Args:
        claim_id: of a claim.
        table: tidy.
        readout: as in ``judge``.

    Returns:
        Columns kind (part, null, matched), label, n_seeds, effect, low, high, asked
        (the range of a part; of a control, the range in which it shows the effect
        too), outcome. Empty when the claim is not measured.

    Raises:
        ValueError: unknown claim, or as ``judge``.
    """
    claim = claim_of(claim_id)
    readout = _readout(claim, readout)
    levels = _of_claim(claim, table)
    judged: list[tuple[str, Part, str]] = []
    if not missing(claim, levels, readout):
        parts, controls = _evidence(claim, levels, readout)
        found = zip(parts, states(parts), strict=True)
        judged += [("part", part, word) for part, word in found]
        judged += [(c.kind, c.own, c.ruling) for c in controls]
    rows = [
        (
            kind,
            part.label,
            len(defined(part.values)),
            *(_shown(x, claim.unit) for x in part.interval),
            _range_text(part, claim.unit),
            outcome,
        )
        for kind, part, outcome in judged
    ]
    columns = ["kind", "label", "n_seeds", *NUMBERS, "asked", "outcome"]
    return pd.DataFrame(rows, columns=columns)


def write_claims(findings: pd.DataFrame, path: Path) -> Path:
    """Write the claims table as csv: whole or not at all, 6 significant digits.

    Pages round to three; a second rounding of four would show other last digits.

    Args:
        findings: of ``claims_table`` or ``regimes.claims_in_worlds``.
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
        rounded[column] = [float(f"{value:.6g}") for value in findings[column]]
    with clear_write_errors(path), sealing(path) as draft:
        path.parent.mkdir(parents=True, exist_ok=True)
        rounded.to_csv(draft, index=False, lineterminator="\n")
    return path


def read_claims(path: Path) -> pd.DataFrame:
    """A claims table as ``write_claims`` stored it; of one world where none is named.

    Raises:
        ValueError: it cannot be read, or is no claims table.
    """
    try:
        check_seal(path)
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{path}: {said}; expected a claims.csv") from error
    if not {"id", "verdict"} <= set(table):
        raise ValueError(
            f"{path} has columns {', '.join(map(str, table))}; expected those of "
            "claims.csv, id and verdict among them"
        )
    if "world" not in table:
        table.insert(1, "world", PUBLISHED)
    return table


def with_other_worlds(
    findings: pd.DataFrame, before: pd.DataFrame, path: Path
) -> pd.DataFrame:
    """A claims table with the rows that it replaces left out and the others kept.

    Args:
        findings: new rows, of one or several worlds.
        before: the table that they are to replace.
        path: where that is from, for the error.

    Raises:
        ValueError: a claim was judged on more seeds before: measurements were lost.
    """
    seeds = before.set_index(["world", "id"])["n_seeds"]
    for row in findings.to_dict("records"):
        earlier = seeds.get((row["world"], row["id"]), 0)
        if row["n_seeds"] < earlier:
            raise ValueError(
                f"{path} judges {row['id']} of {row['world']} on {earlier} seeds, the "
                f"committed measurements have {row['n_seeds']}: expected no fewer; "
                f"take data/measurements from version control, or remove {path.name} "
                "first"
            )
    others = before[~before["world"].isin(findings["world"])]
    return pd.concat([findings, others], ignore_index=True) if len(others) else findings


def verdict_changes(before: pd.DataFrame, now: pd.DataFrame) -> pd.DataFrame:
    """Old and new verdicts side by side, with what decides the new one.

    Args:
        before, now: claims tables, as ``read_claims`` gives them; the earlier one may
            lack columns.

    Returns:
        One row a claim and world of either: claim, world, before, now, why (its effect
        and interval, or the control that stands in its way).
    """
    old = before.set_index(["id", "world"])["verdict"]
    new = now.set_index(["id", "world"])
    told = new.astype(object).fillna("").to_dict("records")
    rows = [
        (*key, old.get(key, "–"), row["verdict"], _why(row))
        for key, row in zip(new.index, told, strict=True)
    ]
    gone = [(*key, old[key], "–", "") for key in old.index.difference(new.index)]
    columns = ["claim", "world", "before", "now", "why"]
    return pd.DataFrame([*rows, *gone], columns=columns)


def _why(row: Mapping[str, Any]) -> str:
    """What decides a verdict: a part, or a control."""
    if row["verdict"] == "not measured":
        return str(row["runs"]).partition("missing: ")[2]
    if row["verdict"] == "explained by a control":
        shown = (str(row[name]) for name in ("null", "matched"))
        return "; ".join(text for text in shown if text.endswith(RULINGS[0]))
    numbers = ["–" if row[name] == "" else f"{row[name]:.3g}" for name in NUMBERS]
    effect, low, high = numbers  # one seed has no interval
    return f"{row['unit']}: {effect} [{low}, {high}], {row['n_seeds']} seeds"


def claim_card(
    claim_id: str,
    table: pd.DataFrame,
    provenance: pd.DataFrame | None = None,
    scale: str = "",
    profile: str = PUBLISHED,
) -> str:
    """The card at the top of a chapter, as a markdown table.

    Args:
        claim_id: of a claim.
        table: a tidy table, or a claims table.
        provenance: of ``measure.load``; adds what the runs cost.
        scale: what was trained, in a few words; adds them.
        profile: as in ``claims_table``.

    Raises:
        ValueError: unknown claim, or as ``judge``.
    """
    claim = claim_of(claim_id)
    if "verdict" in table.columns:
        row = table[table["id"] == claim_id].iloc[0].fillna("").to_dict()
    else:
        beside = [judge(claim, table, readout) for readout in claim.readouts[1:]]
        row = _row(claim, judge(claim, table), profile, beside)
    lines = [
        ("The claim", f"{claim.statement} ({claim.paper_item}, `{claim.id}`)"),
        ("The paper prints", claim.paper_value),
        ("Here", _effect_text(row)),
        ("n", row["n"]),
        ("Readout", _readout_text(claim, row)),
        ("Null", _control_line(claim.null, row["nulls"])),
        ("Matched control", _control_line(claim.matched, row["controls"])),
        ("Verdict", f"**{row['verdict']}**"),
        ("Rule", claim.rule),
        ("Runs", f"{scale}; {row['runs']}" if scale else row["runs"]),
    ]
    if provenance is not None:
        lines.append(("Cost", _cost_text(claim, provenance)))
    return "| field | content |\n|---|---|\n" + "".join(
        f"| {a} | {b} |\n" for a, b in lines
    )


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
    keys = ["run", "arm", "seed"]
    pairs = table[keys].drop_duplicates()
    twice = pairs[pairs.duplicated(["arm", "seed"])]
    if len(twice):
        arm, seed = twice.iloc[0][["arm", "seed"]]
        raise ValueError(
            f"two runs of arm {arm}, seed {seed}; expected one: keep a single profile"
        )


def _of_claim(claim: Claim, table: Table) -> Levels:
    """The levels of what a claim may read: few rows of many."""
    if isinstance(table, Levels):
        return table
    if "arm" in table:
        arms = arms_matching(table, claim.arms + claim.control_arms)
        table = table[table["arm"].isin(arms)]
    check_table(table)
    return Levels(table)


def missing(claim: Claim, table: Table, readout: str | None = None) -> list[str]:
    """Arms, and metrics of arms, that a claim's parts need and the table lacks."""
    levels = levels_of(table)
    suffix, absent = _suffix(claim, _readout(claim, readout)), []
    for pattern in claim.arms:
        arms = arms_matching(levels, [pattern])
        absent += [] if arms else [pattern]
        absent += [
            f"{name}{suffix} of {arm}"
            for arm in arms
            for name in claim.metrics
            if not levels.has(arm, f"{name}{suffix}")
        ]
    return absent


def _runs(claim: Claim, levels: Levels, readout: str) -> str:
    """``opd 0-4; rlvr 0-4; missing: ...``: arms and seeds behind a finding."""
    arms = list(dict.fromkeys(arms_matching(levels, claim.arms + claim.control_arms)))
    texts = [f"{arm} {_seeds_text(levels.seeds[arm])}" for arm in arms]
    controls = [arm for arm in claim.control_arms if arm not in arms]
    absent = ", ".join([*missing(claim, levels, readout), *controls])
    return "; ".join([*texts, f"missing: {absent}"] if absent else texts)


def _seeds_text(seeds: Iterable[int]) -> str:
    numbers = sorted(seeds)
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(str(number) for number in numbers)


# --- numbers as a reader sees them -----------------------------------------------


def _shown(value: float, unit: str) -> float:
    """Means of logarithms are shown as ratios."""
    return math.exp(value) if unit == RATIO else value


def _range_text(part: Part, unit: str) -> str:
    low, high = _text(part.lower, unit), _text(part.upper, unit)
    if math.isinf(part.upper):
        return f"above {low}"
    return f"below {high}" if math.isinf(part.lower) else f"{low} to {high}"


def _asked(part: Part, parts: Sequence[Part], unit: str) -> str:
    """The range that a part is asked to lie in, and what Holm's method says of it."""
    left = state(part) == "fails" and "fails" not in states(parts)
    holm = f"; outside, but open by Holm's method over {len(parts)} parts"
    return _range_text(part, unit) + (holm if left else "")


def _text(value: float, unit: str) -> str:
    """A value or a bound in the unit that its claim is shown in."""
    if unit == SHARE:
        return f"{100 * value:.3g} points" if value else "0"
    return f"{_shown(value, unit):.3g}"


def _control_text(controls: list[Control], kind: str, unit: str) -> str:
    """The control of a kind that stands most in the claim's way: value and ruling."""
    ours = [control for control in controls if control.kind == kind]
    if not ours:
        return "none"
    worst = min(ours, key=lambda control: RULINGS.index(control.ruling))
    return f"{_named(worst, unit)}, {worst.ruling}"


def _all_text(controls: list[Control], kind: str, unit: str) -> str:
    """All controls of a kind with their values, by what became of them."""
    found: dict[str, list[str]] = {}
    for control in controls:
        if control.kind == kind:
            found.setdefault(control.ruling, []).append(_named(control, unit))
    words = sorted(found, key=RULINGS.index)
    return "; ".join(f"{word}: {', '.join(found[word])}" for word in words) or "none"


def _named(control: Control, unit: str) -> str:
    """Name of a control and the value of what it shows, where there is one."""
    value = control.own.interval[0]
    told = "" if math.isnan(value) else f": {_text(value, unit)}"
    return control.own.label + told


def _control_line(what: str, shown: object) -> str:
    return what if shown == "none" else f"{what} Here {shown}."


def _readout_text(claim: Claim, row: dict[str, object]) -> str:
    """What the weights were read from, and what another readout would have said."""
    if len(claim.readouts) == 1:
        return READOUT_TEXTS[claim.readouts[0]]
    return (
        "Float32 master weights decide here. The paper does not say what it read: its "
        "runs kept float32 master weights, and stored checkpoints are bf16. From bf16: "
        f"**{row['verdict_in_bf16']}**."
    )


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

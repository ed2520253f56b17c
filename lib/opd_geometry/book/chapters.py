"""What every chapter does: check its parameters, get its runs, publish what it found.

A chapter is a notebook that papermill executes. What it publishes is stored in its
outputs under a name, for its own text and for other pages of the book.
"""

import dataclasses
import inspect
import math
import re
import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape as html_text
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from opd_geometry.analysis.claims import claim_card, claims_table, parts_table
from opd_geometry.analysis.evidence import LAYERS, arms_matching, levels_of
from opd_geometry.analysis.statements import claim_of
from opd_geometry.analysis.unplaced.power import (
    AS_DIFFERENCES,
    GAIN,
    detection_limit,
    difference_limit,
    own_limits,
)
from opd_geometry.book.board import (
    arm_name,
    effect_text,
    in_words,
    marked,
    n_seeds_text,
)
from opd_geometry.book.figures import ARM_STYLES, LABELS, with_minus
from opd_geometry.experiments.measure import SOURCES, committed_provenance
from opd_geometry.experiments.measure import load as load_measurements
from opd_geometry.experiments.profiles import (
    PROFILES,
    PUBLISHED,
    PUBLISHED_ARMS,
    build,
    parse_seeds,
)
from opd_geometry.experiments.runs import HELD_OUT, Run, Stored, is_done
from opd_geometry.experiments.schedule import train_all
from opd_geometry.training.models import ModelConfig
from opd_geometry.training.students import Student

# What a fresh IPython kernel defines: _, __, _i3, _12, _dh, __name__ and the like.
KERNEL_NAMES = re.compile(r"_{1,3}|_i{1,3}|_i?\d+|_[dio]h|_exit_code|__\w+|In|Out")
AGAINST = "null; matched control"
# Markdown that every viewer folds: what a figure could have shown.
FOLDED_LIMITS = (
    '\n\n<details class="limits"><summary>Detection limits</summary>\n\n{}\n\n'
    "</details>"
)
LONGEST_CELL = 90  # letters; a table of longer ones is one of sentences
DIGITS = 4  # what is printed and published: another processor changes the seventh


class ParameterError(ValueError):
    """A parameter that no chapter has, or a value that it cannot take."""

    def _render_traceback_(self) -> list[str]:
        """One line in a notebook, instead of the frames that led here."""
        return [f"{type(self).__name__}: {self}"]


@dataclass(frozen=True)
class Parameters:
    """Checked parameters of a chapter.

    Attributes:
        profile: a key of ``profiles.PROFILES``.
        seeds: which seeds.
        source: one of ``measure.SOURCES``: which runs are preferred.
        jobs: runs trained at a time, where some have to be.
        student: of a profile that takes one; empty for that of the committed runs.
    """

    profile: str
    seeds: tuple[int, ...]
    source: str
    jobs: int
    student: str = ""


@dataclass(frozen=True)
class Pair:
    """Checked parameters of the chapter about two checkpoints.

    Attributes:
        before, after: where training started and ended, as they were given.
    """

    before: str
    after: str

    @property
    def places(self) -> tuple[str, str]:
        """What ``pairs.measure_checkpoints`` takes.

        A path that does not exist from here is looked for from the checkout's root, so
        that a notebook opened in its own folder finds what papermill finds.
        """
        before, after = map(_from_checkout, (self.before, self.after))
        return before, after


@dataclass(frozen=True)
class Model:
    """Checked parameter of the chapter about updates without place.

    Attributes:
        model: committed tables by their name, or a checkpoint to measure.
    """

    model: str


def _from_checkout(place: str) -> str:
    root = Path(__file__).resolve().parents[3]
    elsewhere = not Path(place).exists() and (root / place).exists()
    return str(root / place) if elsewhere else place


def check_parameters(names: Mapping[str, object]) -> Parameters:
    """Read a chapter's parameters; refuse unknown names and values.

    papermill only warns of a parameter that the notebook does not have, and passes
    what it cannot parse as a string.

    Args:
        names: the notebook's ``globals()`` before it defines anything else. In a
            notebook that was checked before, further names are its own.

    Returns:
        The parameters.

    Raises:
        ParameterError: one line, naming the known parameters or values.
    """
    given = _given(names, Parameters)
    profile, source, jobs = (given[name] for name in ("profile", "source", "jobs"))
    known = profile.partition(":")[0] if isinstance(profile, str) else profile
    _one_of("profile", known, PROFILES)
    _one_of("source", source, SOURCES)
    if type(jobs) is not int or jobs < 1:
        raise ParameterError(f"jobs {jobs!r}: expected an integer, 1 or larger")
    try:
        seeds = tuple(parse_seeds(str(given["seeds"])))
        settings = PROFILES[str(profile)]
    except ValueError as error:
        raise ParameterError(str(error)) from None
    student = str(given.get("student") or "")
    if student and isinstance(settings.student, ModelConfig):
        raise ParameterError(f"student {student!r}: profile {profile} takes none")
    global _all_there
    _all_there = profile == PUBLISHED and source == "committed" and len(seeds) > 1
    return Parameters(str(profile), seeds, str(source), jobs, student)


def check_pair(names: Mapping[str, object]) -> Pair:
    """Read the parameters of the chapter about two checkpoints.

    Args:
        names: as in ``check_parameters``.

    Returns:
        The two places.

    Raises:
        ParameterError: one line, naming the known parameters, or what is no place.
    """
    return Pair(**_places(names, Pair))


def check_model(names: Mapping[str, object]) -> Model:
    """Read the parameter of the chapter about updates without place.

    Args:
        names: as in ``check_parameters``.

    Returns:
        The model.

    Raises:
        ParameterError: one line, naming the known parameter, or what is no model.
    """
    return Model(**_places(names, Model, "the name of committed tables, "))


def _places(
    names: Mapping[str, object], of: type[Pair | Model], besides: str = ""
) -> dict[str, str]:
    """Parameters that say where a checkpoint is."""
    places = _given(names, of)
    for name, place in places.items():
        if not isinstance(place, str) or not place:
            raise ParameterError(
                f"{name} {place!r}: expected {besides}a directory, a .safetensors file "
                "or a hub id"
            )
    return {name: str(place) for name, place in places.items()}


def _given(
    names: Mapping[str, object], of: type[Parameters | Pair | Model]
) -> dict[str, Any]:
    """Values of the parameters; no unknown one, and none of those missing.

    A field with a default is one that no notebook has to name.
    """
    fields = dataclasses.fields(of)
    known = [f.name for f in fields if f.default is dataclasses.MISSING]
    if not any(
        isinstance(value, Parameters | Pair | Model) for value in names.values()
    ):
        own = {f.name for f in fields}
        unknown = [n for n, v in names.items() if n not in own and _is_given(n, v)]
        if unknown:
            raise ParameterError(
                f"unknown parameter {', '.join(unknown)}; expected {', '.join(known)}"
            )
    missing = [name for name in known if name not in names]
    if missing:
        raise ParameterError(
            f"no parameter {', '.join(missing)}; run the parameters cell first"
        )
    return {f.name: names[f.name] for f in fields if f.name in names}


def of_pretrained(parameters: Parameters) -> Parameters:
    """Those of a pretrained student's runs: the committed ones where none is asked for.

    Args:
        parameters: of a chapter that sets a language model beside the small world.
    """
    if isinstance(PROFILES[parameters.profile].student, Student):
        return parameters
    return Parameters("pretrained", (0, 1, 2, 3, 4), "committed", parameters.jobs)


def _is_given(name: str, value: object) -> bool:
    """Whether a name in a fresh notebook can be a parameter."""
    own = KERNEL_NAMES.fullmatch(name) is not None
    return not own and not callable(value) and not isinstance(value, ModuleType)


def _one_of(name: str, value: object, known: Iterable[str]) -> None:
    known = list(known)
    if value not in known:
        raise ParameterError(f"unknown {name} {value!r}; expected {', '.join(known)}")


def load(
    parameters: Parameters, arms: Iterable[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A chapter's measurements; what neither is committed nor here is trained.

    An arm that the profile does not list is not trained for the asking: it is left
    out, in words, unless every asked seed of it is there.

    Args:
        parameters: of the chapter.
        arms: its arms.

    Returns:
        As ``measure.load``: the tidy table, and a provenance row a run.

    Raises:
        ValueError: unknown arm, or a run that failed; the message says why.
    """
    profile, listed = parameters.profile, PROFILES[parameters.profile].arms
    absent = {arm: _absent(parameters, arm) for arm in arms}
    optional = [arm for arm, runs in absent.items() if runs != [] and arm not in listed]
    if optional:
        print(f"left out, being no part of profile {profile}: {', '.join(optional)}")
    kept = [arm for arm in absent if arm not in optional]
    missing = [run for arm in kept for run in absent[arm] or ()]
    if missing:
        # Not stderr, which a book must not show.
        console = Console(file=sys.stdout, force_jupyter=False, force_terminal=False)
        failed = train_all(profile, missing, parameters.jobs, console)
        if failed:
            run, reason = next(iter(failed.items()))
            raise ValueError(f"{run.name} is not finished: {reason}")
    return _measured(parameters, kept, parameters.seeds)


def load_there(
    parameters: Parameters, arms: Iterable[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measurements of arms as far as they are there: nothing is trained for them.

    Args:
        parameters: of the chapter.
        arms: which; of an arm that is there for some seeds, those are read.

    Returns:
        As ``load``.
    """
    global _all_there
    asked: dict[tuple[int, ...], list[str]] = {}
    for arm in arms:
        absent = _absent(parameters, arm)
        _all_there = _all_there and absent == []
        if absent is None:
            continue
        gone = {run.seed for run in absent}
        there = tuple(seed for seed in parameters.seeds if seed not in gone)
        if there:
            asked.setdefault(there, []).append(arm)
    found = [_measured(parameters, arms, seeds) for seeds, arms in asked.items()]
    if not found:
        raise ValueError(
            f"no run of profile {parameters.profile} and its arms is there: expected "
            "one at least; train with opd-geometry run"
        )
    tables, provenance = zip(*found, strict=True)
    return pd.concat(tables, ignore_index=True), pd.concat(provenance)


def _measured(
    parameters: Parameters, arms: Iterable[str], seeds: Sequence[int]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What was measured; accuracy on a dataset goes by the name of the book's task."""
    table, provenance = load_measurements(
        parameters.profile, arms, seeds, parameters.source, parameters.student
    )
    on_data = table["metric"] == f"accuracy/{HELD_OUT}"
    if on_data.any():
        print("accuracy: on the held-out part of the profile's dataset")
        table = table.astype({"metric": object})
        table.loc[on_data, "metric"] = "accuracy/chain"
    return table, provenance


def claim_arms(claim_ids: Iterable[str]) -> list[str]:
    """Arms that claims are judged by, their controls included."""
    known = pd.DataFrame({"arm": list(PUBLISHED_ARMS)})
    patterns = [
        pattern
        for claim in map(claim_of, claim_ids)
        for pattern in (*claim.arms, *claim.control_arms)
    ]
    return list(dict.fromkeys(arms_matching(known, patterns)))


def _absent(parameters: Parameters, arm: str) -> list[Run] | None:
    """The asked runs of an arm that are neither committed nor finished here.

    None for an arm of models of other sizes, where the profile has one of its own.
    """
    committed = set(committed_provenance()["run"])
    profile, student = parameters.profile, parameters.student
    runs = []
    for seed in parameters.seeds:
        scratch = parameters.source == "scratch"
        try:
            published = build(profile, arm, seed, student=student)
            own = build(profile, arm, seed, scratch, student)
        except ValueError:
            if arm in PUBLISHED_ARMS and arm not in PROFILES[profile].arms:
                return None
            raise
        if published.key() not in committed and not is_done(own):
            runs.append(own)
    return runs


# --- what a chapter shows ----------------------------------------------------------


def rounded(frame: pd.DataFrame, digits: int = DIGITS) -> pd.DataFrame:
    """A table as it is shown: numbers of a few digits, arms and metrics by name."""

    def shown(value: object) -> object:
        if value == "<NA>":  # of an integer that is not there
            return "–"
        if isinstance(value, str):
            return LABELS.get(value) or in_words(value)
        if isinstance(value, (bool, np.bool_)):
            return "yes" if value else "no"
        if not isinstance(value, float):
            return value
        return "–" if math.isnan(value) else with_minus(f"{value:.{digits}g}")

    def label(name: object) -> object:
        metric = str(name).removeprefix("null_")
        if metric in LABELS:
            return LABELS[metric] + (", null" if metric != name else "")
        if not isinstance(name, str):
            return name
        return in_words(name).removeprefix("n_").replace("_", " ")  # n_seeds counts

    # The name of an index would take a row of its own; that of the columns stands in
    # the corner above it.
    kinds = {"arm": [*ARM_STYLES], "diagnostic": [*LABELS]}
    outer = frame.index.get_level_values(0)
    kind = [k for k, known in kinds.items() if outer.isin(known).any()]
    corner: str | None = str(frame.index.name or (kind[0] if kind else "row"))
    if isinstance(frame.index, pd.RangeIndex):
        corner = None  # it only counts the rows
    named = frame.map(shown).rename(columns=label)
    if frame.index.names[0] not in ("id", "claim"):  # a claim is called as an arm is
        named = named.rename(index=label)
    single = named.columns.nlevels == 1
    named.index.names = [None] * named.index.nlevels
    named.columns.names = [corner] if single else [None] * named.columns.nlevels
    return named


_published: dict[str, Any] = {}  # of this kernel's notebook: name to value
_all_there = False  # whether it reads committed runs, of which none is missing


def publish(**values: Any) -> None:
    """Keep values for ``say`` and ``show``, and in the outputs for other pages.

    Args:
        values: name to an integer, a float (rounded to ``DIGITS`` significant digits),
            a text, or what ``html`` and ``markdown`` return.
    """
    # Heavy, and needed only inside a notebook.
    from myst_nb import glue  # type: ignore[import-untyped]

    for name, value in values.items():
        shown = float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
        _published[name] = shown
        glue(name, shown, display=False)


# Code, which stays as it is; a hyphen before a number that no word, bracket or other
# number comes before, or before the two digits of an exponent; a per cent sign.
SIGNS = re.compile(r"`+[^`]*`+|(?<![\w\-\]./)`])-(?=\d)|(?<=\de)-(?=\d\d\b)|(?<=\d)%")
SET = {"-": "\N{MINUS SIGN}", "%": "\N{NO-BREAK SPACE}%"}


def typeset(text: str) -> str:
    """Minus signs for hyphens before numbers, and a space before per cent signs.

    >>> typeset("-0.5 to 4.6%, 1e-05, `lr = 1e-05`")
    '−0.5 to 4.6\xa0%, 1e−05, `lr = 1e-05`'
    """
    return SIGNS.sub(lambda found: SET.get(found[0], found[0]), text)


def say(text: str, **values: Any) -> Any:
    """A passage with numbers, as a cell's own output: readable wherever it is opened.

    Args:
        text: Markdown; ``{name}`` or ``{name:.2f}`` is a value, a brace of its own is
            doubled.
        values: name to value; for all others what this notebook has published.

    Returns:
        The passage. A NaN is a dash: of an arm that was not run, or of one seed's
        interval; where every run is there, it is an error.

    Raises:
        ValueError: a name without a value, a value that its format does not fit, or a
            NaN that no missing run accounts for.
    """
    try:
        told = inspect.cleandoc(text).format_map({**_published, **values})
    except KeyError as error:
        raise ValueError(
            f"no value {error.args[0]!r}: publish it in a cell above, or give it here"
        ) from None
    if _all_there and (found := re.search(r"[^.;:]*\bnan\b[^.;:]*", told)):
        raise ValueError(
            f"a number is NaN in {found[0].strip()!r}, though no run is missing: "
            "expected a number; look for what made it"
        )
    told = told.replace("\n%", "\N{NO-BREAK SPACE}%")  # else MyST drops that line
    told = told.replace(" [nan, nan]", "")  # one seed has no interval
    return markdown(typeset(re.sub(r"\+?\bnan\b", "\N{EN DASH}", told)))


def show(name: str) -> Any:
    """A published table or text, as a cell's own output.

    Raises:
        ValueError: nothing of that name was published in this notebook.
    """
    if name not in _published:
        raise ValueError(f"nothing published as {name!r}: publish it in a cell above")
    return _published[name]


def markdown(text: str) -> Any:
    """Text that a page sets as markdown, where a plain string is set as it is."""
    from IPython.display import Markdown

    return Markdown(text)


class Table:
    """A table as a cell's output, with its caption: HTML on a page, else text."""

    def __init__(self, frame: pd.DataFrame, caption: str, index: bool) -> None:
        self.frame, self.caption, self.index = frame, caption, index

    def __repr__(self) -> str:
        text = self.frame.to_string(index=self.index, na_rep="–")
        return f"{self.caption}\n{text}" if self.caption else text

    def _repr_html_(self) -> str:
        with pd.option_context("display.max_colwidth", None):
            text = self.frame.to_html(
                index=self.index, border=0, classes="table", na_rep="–"
            )
        # The class that pandas adds would set the heads of the columns flush right.
        longest = max((len(str(c)) for c in self.frame.to_numpy().flat), default=0)
        kind = "table sentences" if longest > LONGEST_CELL else "table"
        text = text.replace('class="dataframe table"', f'class="{kind}"')
        text = text.replace(' style="text-align: right;"', "")
        told = f"<caption>{html_text(self.caption)}</caption>"
        return text.replace(">", f">{told}", 1) if self.caption else text


def table(frame: pd.DataFrame, caption: str, digits: int = DIGITS) -> Table:
    """``rounded``, with a caption that says what the rows are.

    An index that only counts the rows is left out.
    """
    counts = isinstance(frame.index, pd.RangeIndex)
    return Table(rounded(frame, digits), caption, index=not counts)


def html(frame: pd.DataFrame, caption: str = "") -> Table:
    """A table for a page: without index, its cells wrapped, in the page's style."""
    plain = frame.map(lambda x: typeset(x) if isinstance(x, str) else x)
    return Table(plain, caption, index=False)


def provenance_text(parameters: Parameters, provenance: pd.DataFrame) -> str:
    """One sentence: profile, seeds, which runs are from where, machines, time.

    Args:
        parameters: of the chapter.
        provenance: of ``load``.
    """
    here = provenance[provenance["source"] == "this machine"]
    kept = len(provenance) - len(here)
    names = [f"{run.arm} (seed {run.seed})" for run in here.itertuples()]
    trained = f"{len(here)} trained on this machine: {', '.join(names)}"
    machines = sorted({str(name) for name in provenance["machine"]})
    hours = provenance["wall_seconds"].sum() / 3600
    seeds = sorted({int(seed) for seed in provenance["seed"]})
    return (
        f"Profile {parameters.profile}, {seeds_text(seeds)}: "
        f"{len(provenance)} runs, {kept} of them read from committed measurements, "
        f"{trained if names else 'none trained on this machine'}. Together "
        f"{hours:.1f} hours of training on one core each ({'; '.join(machines)})."
    )


def seeds_text(seeds: Sequence[int] | Parameters) -> str:
    """Seeds for a sentence; with the unit of n, if a chapter's parameters are given.

    >>> seeds_text([0, 1, 2]), seeds_text([3]), seeds_text([0, 2])
    ('seeds 0 to 2', 'seed 3', 'seeds 0 and 2')
    """
    if isinstance(seeds, Parameters):
        return f"{seeds_text(seeds.seeds)} ({n_text(seeds)})"
    *others, last = seeds
    if len(others) > 1 and list(seeds) == list(range(others[0], last + 1)):
        return f"seeds {others[0]} to {last}"
    text = f"seeds {', '.join(map(str, others))} and {last}"
    return text if others else f"seed {last}"


def n_text(parameters: Parameters, seeds: Iterable[int] | None = None) -> str:
    """What n counts: what the runs of different seeds do not share.

    Args:
        parameters: of the chapter.
        seeds: those that were measured; the chapter's by default.

    Returns:
        Such as ``n = 5: data, sampling and anchor each; 3 bases``.
    """
    chosen = list(parameters.seeds if seeds is None else seeds)
    student = parameters.student or None
    anchors, bases = set(), set()
    for seed in chosen:
        run = build(parameters.profile, "opd", seed, student=student)
        anchors.add(repr(run.start))
        while isinstance(run.start, Run):
            run = run.start
            if run.arm == "base":
                break
        bases.add(run.key() if run.arm == "base" else repr(run.start))
    each = "data, sampling and anchor each" if len(anchors) > 1 else "one anchor"
    plural = f"{len(bases)} bases" if len(bases) > 1 else "one base"
    return f"n = {len(chosen)}: {each}; {plural}"


def limits_text(
    table: pd.DataFrame,
    arms: Iterable[str],
    metrics: Iterable[str],
    roles: Iterable[str] = LAYERS,
) -> str:
    """The detection limits of a figure's metrics, for the end of its caption.

    Args:
        table: tidy; n is the number of its seeds.
        arms: whose ends the figure compares.
        metrics: those drawn.
        roles: of the matrices averaged over.

    Returns:
        Folded: the half-width of the widest interval between two arms at this n, and
        the smallest place that one update would show at the book's student.
    """
    arms, metrics = list(arms), list(metrics)
    levels = levels_of(table, arms)
    read = tuple(roles)
    found = {name: difference_limit(levels, arms, name, read) for name in metrics}
    known, placed = set(own_limits()["metric"]), []
    parts = [
        f"{_limit_text(name, limit)} ({LABELS.get(name, name)})"
        for name, (limit, _) in found.items()
        if not math.isnan(limit)
    ]
    for name in metrics:
        if name in known:
            limit = detection_limit(name, [GAIN])
            placed.append(f"{limit} ({LABELS.get(name, name)})")
    n = min((n for limit, n in found.values() if not math.isnan(limit)), default=0)
    said = []
    if parts:
        said.append(f"Between two arms, n = {n}: {', '.join(parts)}.")
    elif len(arms) > 1:
        said.append("One seed parts no arms.")
    if placed:
        means = " (gain: how many times as far those entries move)"
        gain = means if "gain" in placed[0] else ""
        said.append(f"Of a place in one update{gain}: {', '.join(placed)}.")
    return FOLDED_LIMITS.format(" ".join(said)) if said else ""


def _limit_text(metric: str, limit: float) -> str:
    """A difference in points, a ratio in per cent."""
    if any(word in metric for word in AS_DIFFERENCES):
        return f"{100 * limit:.2g} points"
    return f"{100 * math.expm1(limit):.2g}\N{NO-BREAK SPACE}%"


def verdict_table(table: pd.DataFrame, claim_ids: Iterable[str]) -> pd.DataFrame:
    """A chapter's claims and what came of them, in words.

    Args:
        table: tidy.
        claim_ids: which claims.

    Returns:
        One row a claim: claim, verdict, here (levels as the paper prints them, and
        what decides), the paper, ``AGAINST`` (the null and the control that stand most
        in the way).

    Raises:
        ValueError: unknown claim.
    """
    asked = [claim_of(name).id for name in claim_ids]
    found = claims_table(table).set_index("id", drop=False).loc[asked]
    rows = [
        {
            "claim": f"{row['statement']} ({row['id']})",
            "verdict": marked(row["verdict"], row["n_seeds"]),
            "here": _here(row),
            "the paper": f"{row['paper_item']}: {row['paper_value']}",
            AGAINST: _outcomes(f"{row['null']}; {row['matched']}"),
        }
        for row in found.to_dict("records")
    ]
    return pd.DataFrame(rows)


def _outcomes(against: str) -> str:
    """What a null and a control came to; their numbers stand in the cards."""
    return in_words(re.sub(r": [^;,]*, (?=[a-z])", ": ", against))


def _here(row: Mapping[Hashable, Any]) -> str:
    """Levels, the effect that decides with its interval, and seeds in a cell."""
    if row["verdict"] == "not measured":
        return "–"
    told = (row["ours"], effect_text(row), n_seeds_text(row["n_seeds"]))
    return in_words("; ".join(text for text in told if text))


def verdicts(table: pd.DataFrame, claim_ids: Iterable[str]) -> Table:
    """``verdict_table`` as it stands first in a chapter."""
    told = "The claims judged here; a bracket is a 95 % interval over seeds"
    return html(verdict_table(table, claim_ids), told)


def deciding(claim_ids: Sequence[str], judged: pd.DataFrame) -> Table:
    """The part that decides each claim; its verdict is published under ``verdict_ID``.

    Args:
        claim_ids: which claims.
        judged: tidy.
    """
    found = claims_table(judged).set_index("id").loc[list(claim_ids)]
    publish(**{f"verdict_{key}": row["verdict"] for key, row in found.iterrows()})
    shown = found[["effect", "low", "high", "unit", "verdict"]].copy()
    shown.loc[found["n_seeds"] == 1, "verdict"] = "no verdict (one seed)"
    return table(shown, "The part that decides each claim")


def parts(claim_ids: Sequence[str], judged: pd.DataFrame) -> Table:
    """Every part and control of claims, as ``claims.parts_table`` has them."""
    found = {key: parts_table(key, judged) for key in claim_ids}
    rows = pd.concat(found, names=["claim"]).droplevel(1)
    return table(rows, "Every part and control of the claims")


def check(announced: Mapping[str, object]) -> Table:
    """What was written down before, and whether it came out.

    Args:
        announced: a sentence to whether it holds.
    """
    rows = {said: "holds" if holds else "fails" for said, holds in announced.items()}
    frame = pd.Series(rows, name="here").rename_axis("announced").reset_index()
    return html(frame, "What was announced, and what came of it")


def claim_cards(
    claim_ids: Iterable[str],
    table: pd.DataFrame,
    provenance: pd.DataFrame,
    parameters: Parameters,
) -> Any:
    """The cards of a chapter's claims, for a page.

    Args:
        claim_ids: which claims.
        table, provenance: of ``load``.
        parameters: of the chapter; its profile says at what scale the runs are.
    """
    settings = PROFILES[parameters.profile]
    student, teacher = (_size(m) for m in (settings.student, settings.teacher))
    scale = f"student of {student}, teacher of {teacher}"
    profile = parameters.profile
    cards = [claim_card(key, table, provenance, scale, profile) for key in claim_ids]
    lines = "\n".join(cards).split("\n")
    told = [text if "The claim |" in text else in_words(text) for text in lines]
    return markdown("\n".join(told))


def cost_table(provenance: pd.DataFrame) -> pd.DataFrame:
    """What runs cost, for whoever wants to repeat them.

    Args:
        provenance: of ``load``.

    Returns:
        One row an arm: arm, called (what commands call it), runs, steps, minutes (mean
        over its runs, on one core).
    """
    by_arm = provenance.groupby("arm", sort=False)
    minutes = by_arm["wall_seconds"].mean() / 60
    return pd.DataFrame(
        {
            "arm": [arm_name(str(arm)) for arm in by_arm.groups],
            "called": list(by_arm.groups),
            "runs": by_arm.size().to_numpy(),
            "steps": by_arm["steps"].max().to_numpy(),
            "minutes a run": [f"{x:.1f}" for x in minutes],
        }
    )


def versions_text(provenance: pd.DataFrame) -> str:
    """Which versions of what the runs were trained with."""
    names = ("python", "torch", "transformers", "numpy")
    told = (f"{n} {', '.join(sorted(set(provenance[n].astype(str))))}" for n in names)
    return "; ".join(told)


def profile_table() -> pd.DataFrame:
    """The profiles, their sizes and budgets."""
    rows = []
    for name, profile in PROFILES.items():
        policy = profile.policy
        rows.append(
            {
                "profile": name,
                "student": _size(profile.student),
                "teacher": _size(profile.teacher),
                "SFT": f"{profile.sft.steps} steps of {profile.sft.batch_sequences} "
                "demonstrations",
                "OPD, RLVR and controls": f"{policy.steps} steps of "
                f"{policy.prompts_per_step} prompts with {policy.group_size} responses",
                "K": profile.rank,
            }
        )
    return pd.DataFrame(rows)


def _size(model: ModelConfig | Student | Stored) -> str:
    """How large a model is, in words."""
    if isinstance(model, Stored):
        return model.source.partition("@")[0]
    if isinstance(model, Student):
        return f"{model.parameters / 1e6:.0f} million pretrained parameters"
    return f"{model.layers} layers of width {model.width}"


def differences_table(
    profile: str, arms: Iterable[str], reference: str = "opd"
) -> pd.DataFrame:
    """What each arm changes against another one: descriptions, field by field.

    Args:
        profile: a key of ``profiles.PROFILES``.
        arms: which.
        reference: what they are held against.

    Returns:
        One row an arm: arm, called (what commands call it), and "against REFERENCE":
        the fields that differ, with both
        values, and where the arm is confined. Fields that only one of the two loops
        has are left out.

    Raises:
        ValueError: unknown profile or arm.
    """
    theirs = _fields(build(profile, reference, 0))
    rows = []
    for arm in arms:
        run = build(profile, arm, 0)
        own = _fields(run)
        shared = [name for name in own if name in theirs and own[name] != theirs[name]]
        told = [f"{name}: {theirs[name]} → {own[name]}" for name in shared]
        if run.projection is not None:
            confined = dataclasses.asdict(run.projection)
            told += [f"confined, {name}: {value}" for name, value in confined.items()]
            told.append(f"from step {run.branch_step()} on")
        named = {"arm": arm_name(arm), "called": arm}
        rows.append(named | {f"against {reference}": "; ".join(told) or "nothing"})
    return pd.DataFrame(rows)


def _fields(run: Run) -> dict[str, str]:
    """A run's settings as text, without its arm, its seed and what it was made for."""
    train = {f.name: getattr(run.train, f.name) for f in dataclasses.fields(run.train)}
    optimizer = dataclasses.asdict(train.pop("optimizer"))
    for name in ("micro_batch", "micro_prompts"):  # memory only
        train.pop(name, None)
    found = {
        "objective": "demonstrations" if "data" in train else "policy gradient",
        "start": _origin(run.start),
        "teacher": "none" if run.teacher is None else _origin(run.teacher),
        **optimizer,
        **train,
    }
    return {name: str(value) for name, value in found.items()}


def _origin(start: object) -> str:
    """What a run starts from, or who teaches it: an arm, a stored checkpoint."""
    return str(getattr(start, "arm", getattr(start, "source", start)))

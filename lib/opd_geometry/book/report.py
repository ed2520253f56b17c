"""One page about one pair of checkpoints: tables in, a file of HTML out.

The page needs nothing but itself: figures are SVG inside it, styles too, and it asks no
host for anything. Beside the reader's model stand the numbers that arXiv:2606.07082
prints (``data/paper``) and this book's own small models (``data/measurements``).
"""

import base64
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from opd_geometry import __version__
from opd_geometry.book import figures
from opd_geometry.experiments import measure
from opd_geometry.experiments.profiles import PUBLISHED
from opd_geometry.experiments.runs import on_shelf
from opd_geometry.files import clear_write_errors, replacing
from opd_geometry.geometry.pairs import of_language
from opd_geometry.geometry.tables import REMEDY, check_output, read_table

YOURS = "yours"
OURS = ("sft", "sft-matched", "opd", "rlvr")
# Columns that no page can do without; every other section is drawn if it can be.
PAIR_BASE = ("matrix", "role", "layer", "rows", "cols", "sparsity_bf16")
TRAJECTORY_BASE = (
    "step",
    "matrix",
    "role",
    "layer",
    "stable_rank",
    "similarity_to_end",
)
COURSE = "Over training (Figures 4 and 5)"
IDENTITY = ("step", "matrix", "role", "layer", "rows", "cols")  # never empty
PAGE_SUFFIXES = (".html", ".htm")
# The names of these tables -> the book's own.
RENAMED = {
    "sparsity_bf16": "sparsity",
    "null_sparsity_bf16": "null_sparsity",
    "update_density": "density",
    "null_update_density": "null_density",
    "similarity_null": "null_similarity_to_end",
}
METRICS = tuple(figures.METRIC_LABELS)
ANGLES = tuple(name for name in METRICS if name.startswith("angle_"))
EXPERT_ROLES = ("expert_gate", "expert_up", "expert_down", "expert_other")
ROLE_ORDER = (*figures.LAYER_ROLES, *EXPERT_ROLES, "router", "embed", "head", "other")
NULLED = (*ANGLES, "nss", "principal_overlap", "low_magnitude_overlap", "sparsity_bf16")
ONE_SIDE = 0.9  # share of the matrices that have to lie on one side of their null
FAR_ENOUGH = 0.1  # relative difference of the means
FOLDED_ROWS = 600  # matrices in the table at the end; a page of more is slow to open
Cells = tuple[str, ...]


@dataclass(frozen=True)
class Drawn:
    """A figure of the page: source is a data URI."""

    source: str
    alt: str
    finding: str
    caption: str


@dataclass(frozen=True)
class Table:
    """A table of the page, its cells as text."""

    caption: str
    columns: Cells
    rows: tuple[Cells, ...]
    marked: tuple[str, ...] = ()
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    key: str
    title: str
    texts: tuple[str, ...] = ()
    figures: tuple[Drawn, ...] = ()
    tables: tuple[Table, ...] = ()
    reading: tuple[str, ...] = ()


# --- tables in -----------------------------------------------------------------------


def measured_table(path: str | Path) -> pd.DataFrame:
    """A table of ``opd-geometry measure`` or ``trajectory``.

    Args:
        path: .csv, .parquet or .json.

    Returns:
        The table, with at least the columns of one of the two kinds, its numbers
        checked to be numbers.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, an unreadable file, columns or cells missing, no
            rows, an unknown role.
    """
    path = Path(path)
    return _checked(read_table(path), path)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _checked(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The table, if it is one of the two kinds and its numbers are numbers."""
    base = TRAJECTORY_BASE if "step" in table else PAIR_BASE
    missing = [name for name in base if name not in table]
    if missing:
        kind = "trajectory" if base is TRAJECTORY_BASE else "measure"
        raise ValueError(
            f"{path} has no column {', '.join(missing)}, expected a table of "
            f"opd-geometry {kind}; measure again"
        )
    if table.empty:
        raise ValueError(f"{path} has no rows, expected one a matrix; measure again")
    for name in table.columns.intersection([*METRICS, *base, *RENAMED]):
        if name in ("matrix", "role"):
            continue
        try:
            table[name] = pd.to_numeric(table[name])
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}: column {name} holds {_first_line(error)}, expected numbers; "
                "measure again"
            ) from error
    identity = [name for name in IDENTITY if name in table]
    empty = [name for name in identity if table[name].isna().any()]
    if empty:
        raise ValueError(
            f"{path} has rows without {', '.join(empty)}, expected one in every row; "
            "measure again"
        )
    if {"rows", "cols"} <= set(table) and (table[["rows", "cols"]] < 1).any(axis=None):
        raise ValueError(
            f"{path} has matrices of no rows or no columns, expected 1 or more; "
            "measure again"
        )
    unknown = sorted({*map(str, table["role"])} - {*ROLE_ORDER})
    if unknown:
        raise ValueError(
            f"{path} has the role {', '.join(unknown)}, expected some of "
            f"{', '.join(ROLE_ORDER)}; measure again"
        )
    return of_language(table)


def tidy(table: pd.DataFrame) -> pd.DataFrame:
    """A table with a row a matrix, as the book's own figures take it.

    Args:
        table: of `measured_table`, of either kind.

    Returns:
        Columns as of ``measure.COLUMNS``, arm ``yours``, seed 0; a pair stands at step
        1. The stable rank has the null of a Gaussian matrix of its shape, n m /
        (sqrt n + sqrt m)^2, where the shape is known.
    """
    wide = table.rename(columns=RENAMED)
    if "step" not in wide:
        wide = wide.assign(step=1)
    if "null_sparsity" in wide and "null_density" not in wide:
        wide = wide.assign(null_density=1.0 - wide["null_sparsity"])
    if {"rows", "cols"} <= set(wide):
        n, m = wide["rows"].astype(float), wide["cols"].astype(float)
        wide["null_stable_rank"] = n * m / (np.sqrt(n) + np.sqrt(m)) ** 2
        wide["parameters"] = n * m
    known = {*METRICS, *figures.with_null(METRICS), "parameters"}
    keys = ["step", "matrix", "role", "layer"]
    long = wide.melt(
        keys, [name for name in wide if name in known], "metric", "value"
    ).assign(run=YOURS, arm=YOURS, seed=0)
    # A mean is over the matrices that have the metric, as in the summary of `measure`.
    return long[measure.COLUMNS].astype({"value": float}).dropna(subset="value")


def paper_numbers(file: str) -> pd.DataFrame:
    """A file of ``data/paper``; no rows where the data are not at hand."""
    path = on_shelf(Path("paper") / file)
    columns = ["item", "arm", "metric", "relation", "value", "unit"]
    return pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=columns)


def _arm(name: str) -> str:
    """An arm of the paper, as it is written."""
    look = figures.ARM_STYLES.get(name)
    return look.label if look else re.sub(r"^opd ", "OPD ", name)


def _with_ours(own: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The reader's rows and the book's, and the arms that are there."""
    ours = measure.committed(PUBLISHED).astype({"arm": object})
    ours = ours[ours["arm"].isin(OURS)]
    arms = [YOURS, *(arm for arm in OURS if arm in set(ours["arm"]))]
    parts = [part for part in (own, ours) if len(part)]
    columns = ["run", "arm", "matrix", "role", "metric"]
    return (
        pd.concat([part.astype(dict.fromkeys(columns, object)) for part in parts]),
        arms,
    )


# --- the page ------------------------------------------------------------------------


def build_report(
    pair: pd.DataFrame | None, trajectory: pd.DataFrame | None, title: str
) -> str:
    """The page.

    Args:
        pair: a table of ``measure``; None if there is none.
        trajectory: a table of ``trajectory``; None if there is none.
        title: what the page calls the model.

    Returns:
        HTML, the same for the same tables.

    Raises:
        ValueError: no table.
    """
    if pair is None and trajectory is None:
        raise ValueError("no table, expected one of measure or of trajectory at least")
    sections: list[Section | None] = []
    if pair is not None:
        own = tidy(pair)
        both, arms = _with_ours(own)
        sections += [
            _overview(pair, own),
            _sparsity(own, both, arms),
            _places(own, both, arms),
            _rotation(own),
            _spectra(own),
        ]
    if trajectory is not None:
        sections.append(_course(trajectory, pair))
    if pair is not None:
        sections.append(_all_matrices(pair))
    template = resources.files("opd_geometry.book") / "report.html"
    page = Environment(autoescape=True, undefined=StrictUndefined)
    return page.from_string(template.read_text("utf8")).render(
        title=title,
        lead=_lead(pair, trajectory),
        origin=f"Made by opd-geometry {__version__} from {_sizes(pair, trajectory)}. "
        "The paper is arXiv:2606.07082; its models have billions of parameters, this "
        "book's less than a million, so compare orders and shapes, not levels.",
        sections=[section for section in sections if section is not None],
    )


def write_report(
    tables: Iterable[str | Path],
    out: str | Path,
    title: str | None = None,
    force: bool = False,
) -> Path:
    """Read tables and write the page, whole or not at all.

    Args:
        tables: a table of ``measure``, one of ``trajectory``, or both.
        out: where the page goes.
        title: what the page calls the model; None for the first table's file name.
        force: replace a file that is there.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError, ValueError: as `measured_table`; two tables of one kind, or
            a page that cannot or must not be written (as `tables.check_output`).
    """
    out, paths = Path(out), [Path(path) for path in tables]
    check_output(out, force, suffixes=PAGE_SUFFIXES)
    kinds: dict[bool, pd.DataFrame] = {}
    for path in paths:
        table = measured_table(path)
        if ("step" in table) in kinds:
            raise ValueError(
                f"{path} is a second table of one kind, expected one of measure and "
                "one of trajectory at most; make a report of each"
            )
        kinds["step" in table] = table
    name = title or (paths[0].stem if paths else "")
    page = build_report(kinds.get(False), kinds.get(True), name)
    with clear_write_errors(out, REMEDY), replacing(out) as draft:
        draft.write_text(page, encoding="utf8")
    return out


def _sizes(pair: pd.DataFrame | None, trajectory: pd.DataFrame | None) -> str:
    said = []
    if pair is not None:
        entries = int((pair["rows"] * pair["cols"]).sum())
        said.append(f"{len(pair)} matrices with {entries:,} parameters")
    if trajectory is not None:
        steps = trajectory["step"].nunique()
        matrices = trajectory["matrix"].nunique()
        said.append(f"{steps} checkpoints of {matrices} matrices")
    return " and ".join(said)


def _lead(pair: pd.DataFrame | None, trajectory: pd.DataFrame | None) -> str:
    """The first sentence: how much has changed."""
    if pair is None:
        return "How the update grew, and when its directions were settled."
    known = pair[pair["sparsity_bf16"].notna()]
    if known.empty:
        return "No matrix of this table has a sparsity: their notes say why."
    entries = (known["rows"] * known["cols"]).to_numpy(float)
    share = float(np.average(known["sparsity_bf16"], weights=entries))
    dtypes = {"dtype_before", "dtype_after"} <= set(pair)
    stored = sorted({*pair["dtype_before"], *pair["dtype_after"]}) if dtypes else []
    kinds = f" (stored as {', '.join(map(str, stored))})" if stored else ""
    return (
        f"{_percent(share)} of the weights{kinds} have the same value in bf16 before "
        f"and after; the others are what this page is about."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if np.isfinite(share) else "–"


def _short(value: float) -> str:
    return f"{value:.3g}" if np.isfinite(value) else "–"


def _mean(own: pd.DataFrame, metric: str, roles: Sequence[str] = ROLE_ORDER) -> float:
    """Over matrices: plain, and of sparsity by parameters; NaN if not measured."""
    if not _has(own, metric):
        return float("nan")
    values = figures.at_end(own, metric, roles)["value"]
    return float(values.iloc[0]) if len(values) else float("nan")


def _has(own: pd.DataFrame, metric: str) -> bool:
    return bool(own.loc[own["metric"] == metric, "value"].notna().any())


def _roles_in(own: pd.DataFrame, order: Sequence[str] = ROLE_ORDER) -> list[str]:
    return [role for role in order if role in set(own["role"])]


def _layer_roles(own: pd.DataFrame) -> list[str]:
    """Roles of a map: those that stand in layers."""
    own = own[own["layer"] >= 0]  # a file may hold a single q_proj
    return _roles_in(own, (*figures.LAYER_ROLES, *EXPERT_ROLES))


def _against(
    own: pd.DataFrame,
    metric: str,
    form: Callable[[float], str],
    roles: Sequence[str] = ROLE_ORDER,
) -> str:
    """A mean, and what its null has."""
    null = _mean(own, f"null_{metric}", roles)
    tail = f" (Gaussian null {form(null)})" if np.isfinite(null) else ""
    return f"{form(_mean(own, metric, roles))}{tail}"


def drawn(figure: Figure, alt: str, finding: str, caption: str) -> Drawn:
    """A figure as SVG within the page; the same figure gives the same bytes."""
    file = io.BytesIO()
    # Without a salt ids are random; text as paths needs no font at the reader's.
    with mpl.rc_context({"svg.hashsalt": "opd-geometry", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight")
    data = base64.b64encode(file.getvalue()).decode()
    return Drawn(f"data:image/svg+xml;base64,{data}", alt, finding, caption)


# --- sections ------------------------------------------------------------------------

SUMMARY = (
    "sparsity",
    "null_sparsity",
    "angle_left_mean_deg",
    "angle_right_mean_deg",
    "null_angle_right_mean_deg",
    "nss",
    "principal_overlap",
    "low_magnitude_overlap",
    "stable_rank",
    "relative_norm",
    "hill_alpha",
)
SHARES = ("sparsity", "density", "principal_overlap", "low_magnitude_overlap")


def _label(metric: str) -> str:
    plain = metric.removeprefix("null_")
    name = figures.METRIC_LABELS[plain] + (" (%)" if plain in SHARES else "")
    return f"null: {name}" if metric.startswith("null_") else name


def _overview(pair: pd.DataFrame, own: pd.DataFrame) -> Section:
    """Means by role and over all, and what the table does not have."""
    there = [metric for metric in SUMMARY if _has(own, metric)]
    rows = []
    for role in [*_roles_in(own), "all"]:
        chosen = _roles_in(own) if role == "all" else [role]
        count = int((pair["role"].isin(chosen)).sum())
        cells = [
            _short((100 if m.removeprefix("null_") in SHARES else 1) * value)
            for m in there
            for value in [_mean(own, m, chosen)]
        ]
        rows.append((role, str(count), *cells))
    absent = [
        figures.METRIC_LABELS[m] for m in SUMMARY if m in METRICS and m not in there
    ]
    texts = [
        "Means over matrices without weights, sparsity by parameters, as in Table 1."
    ]
    refused = int(pair["sparsity_bf16"].isna().sum()) if "sparsity" in there else 0
    if refused:
        texts.append(
            f"{refused} of {len(pair)} matrices have no sparsity and count for "
            "nothing: their notes below say why."
        )
    if absent:
        texts.append(f"Not in the table, so not on this page: {', '.join(absent)}.")
    columns = ("role", "matrices", *map(_label, there))
    return Section(
        "overview",
        "By role and over all",
        tuple(texts),
        tables=(
            *_verdicts(pair),
            Table("Means by role", columns, tuple(rows), ("all",)),
        ),
        reading=(
            "A null says what the same diagnostic gives for a Gaussian update with the "
            "same Frobenius norm in every matrix. A value that equals its null tells "
            "the size of the update and nothing else; only the difference tells where "
            "it went.",
            f"A diagnostic stands out if {100 * ONE_SIDE:.0f} % of the matrices lie on "
            "one side of their own null and the means differ by "
            f"{100 * FAR_ENOUGH:.0f} %. Matrices of one model are not independent, so "
            "this sorts, and tests nothing.",
        ),
    )


def against_null(pair: pd.DataFrame) -> pd.DataFrame:
    """Which diagnostics stand out from their null, by a rule.

    A diagnostic *stands out* if at least ``ONE_SIDE`` of the matrices lie on the same
    side of their own null, and its mean differs from the null's by at least
    ``FAR_ENOUGH`` of it. Matrices of one model are not independent, so this is a rule
    to sort by and no significance test.

    Args:
        pair: a table of ``measure``.

    Returns:
        One row a diagnostic that has a null here: mean, null, ratio, above (share of
        the matrices above their null, ties counted half) and verdict (``above its
        null``, ``below its null`` or ``at its null``). Means are plain, over the
        matrices that have both; no rows for a table without nulls.
    """
    columns = ["mean", "null", "ratio", "above", "verdict"]
    rows = {}
    for name in NULLED:
        names = [name, f"null_{name}"]
        both = pair[names].dropna() if {*names} <= set(pair) else pd.DataFrame()
        if both.empty:
            continue
        value, null = both[name], both[f"null_{name}"]
        above = float(((value > null) + 0.5 * (value == null)).mean())
        ratio = float(value.mean() / null.mean()) if null.mean() else float("nan")
        verdict = _side(ratio, above)
        rows[name] = [float(value.mean()), float(null.mean()), ratio, above, verdict]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def _side(ratio: float, above: float) -> str:
    """The verdict of ``against_null``."""
    if ratio >= 1.0 + FAR_ENOUGH and above >= ONE_SIDE:
        return "above its null"
    if ratio <= 1.0 - FAR_ENOUGH and 1.0 - above >= ONE_SIDE:
        return "below its null"
    return "at its null"


def _verdicts(pair: pd.DataFrame) -> tuple[Table, ...]:
    """``against_null`` as a table of the page."""
    rows = tuple(
        (
            figures.METRIC_LABELS[RENAMED.get(str(name), str(name))],
            _short(row["mean"]),
            _short(row["null"]),
            _short(row["ratio"]),
            _percent(row["above"]),
            str(row["verdict"]),
        )
        for name, row in against_null(pair).iterrows()
    )
    columns = ("diagnostic", "mean", "null", "ratio", "matrices above", "verdict")
    caption = "What stands out from its null (plain means over matrices)"
    return (Table(caption, columns, rows),) if rows else ()


def _sparsity(own: pd.DataFrame, both: pd.DataFrame, arms: list[str]) -> Section:
    """Table 1: the reader's model, the paper's rows, this book's."""
    value, null = _mean(own, "sparsity"), _mean(own, "null_sparsity")
    rows = [("your model", value, null, figures.ARM_STYLES[YOURS].colour)]
    for line in paper_numbers("table_1.csv").itertuples():
        label = f"paper: {_arm(str(line.arm))}"
        rows.append((label, float(line.value) / 100, np.nan, figures.GREY))
    ends, nulls = (
        figures.at_end(both, f"{prefix}sparsity", ROLE_ORDER)
        .groupby("arm")["value"]
        .mean()
        for prefix in ("", "null_")
    )
    for arm in arms[1:]:
        look = figures.ARM_STYLES[arm]
        rows.append((f"this book: {look.label}", ends[arm], nulls[arm], look.colour))
    cells = tuple((label, _percent(v), _percent(n)) for label, v, n, _ in rows)
    finding = f"Unchanged in bf16: {_against(own, 'sparsity', _percent)}."
    return Section(
        "sparsity",
        "How much changed (Table 1)",
        figures=(
            drawn(
                _sparsity_bars(rows),
                "Horizontal bars of bf16 update sparsity in per cent: your model at "
                "the top, then the rows of the paper's Table 1, then this book's "
                "models. Ticks mark Gaussian nulls where they are known.",
                finding,
                "Share of entries with the same bf16 value before and after, by "
                "parameters, embeddings included. The paper prints no nulls.",
            ),
        ),
        tables=(
            Table(
                "Table 1 of the paper, with your model and this book's",
                ("model", "sparsity", "Gaussian null"),
                cells,
                ("your model",),
            ),
        ),
        reading=(
            "Sparsity grows as the update shrinks: a step below half a unit in the "
            "last place of a bf16 weight is invisible. Compare with the null before "
            "you compare with another model. Above the null, the update spares more "
            "entries than chance would; at the null, it is small.",
            "Compare checkpoints in the dtype that was published: one that was cast to "
            "fp16 or quantised in between can differ nearly everywhere.",
        ),
    )


def _sparsity_bars(rows: list[tuple[str, float, float, str]]) -> Figure:
    with figures.styled():
        figure, ax = plt.subplots(figsize=(figures.WIDTH, 0.5 + 0.24 * len(rows)))
        for place, (_, value, null, colour) in enumerate(rows):
            ax.barh(place, 100 * value, 0.66, color=colour, alpha=0.75, lw=0)
            ax.vlines(
                100 * null, place - 0.42, place + 0.42, color=figures.GREY, lw=2.4
            )
            ends = 100 * np.nanmax([value, null, 0.0])
            ax.annotate(
                f"{100 * value:.1f}",
                (ends, place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        ax.set_yticks(range(len(rows)), [label for label, *_ in rows])
        ax.set(xlim=(0, 105), xlabel="unchanged in bf16, per cent ( ┃ Gaussian null )")
        ax.invert_yaxis()
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
    return figure


def _places(own: pd.DataFrame, both: pd.DataFrame, arms: list[str]) -> Section | None:
    """Figure 3: masks."""
    if not all(_has(own, metric) for metric in figures.MASK_METRICS):
        return None
    # Bars and maps are of the layers' matrices, so their caption is, too.
    layered = figures.LAYER_ROLES
    overlaps = [
        f"{name} mask {_against(own, metric, _percent, layered)}"
        for name, metric in (
            ("principal", "principal_overlap"),
            ("low-magnitude", "low_magnitude_overlap"),
        )
    ]
    roles = _layer_roles(own)
    drawings = []
    if roles:
        drawings = [
            drawn(
                figures.mask_maps(own, [YOURS], YOURS, roles),
                "Maps by layer and role of update density and of both overlaps, in per "
                "cent, above the same maps of the Gaussian null.",
                "Where a layer or a role stands out from its null, look there first.",
                "Per cent. The colours of the overlaps are neutral at 50 %.",
            )
        ]
    bars = figures.mask_bars(both, arms)
    printed = paper_numbers("figures.csv")
    printed = printed[printed["item"] == "Figure 3"]
    table = printed.pivot_table(
        index="arm", columns="metric", values="value", sort=False
    )
    rows = tuple(
        (
            _arm(str(arm)),
            *(_short(float(row.get(m, np.nan))) for m in figures.MASK_METRICS),
        )
        for arm, row in table.iterrows()
    )
    columns = ("paper", *(_label(metric) for metric in figures.MASK_METRICS))
    return Section(
        "places",
        "Where the changes lie (Figure 3)",
        figures=(
            drawn(
                bars,
                "Bars of update density and of the overlaps with the principal and the "
                "low-magnitude mask, in per cent, for your model and this book's, each "
                "with a tick at its Gaussian null.",
                f"Overlap: {'; '.join(overlaps)}.",
                "Means over the layers' matrices. Bars of an overlap start at the "
                "mask's own share, 50 %: what changes at random places would have.",
            ),
            *drawings,
        ),
        tables=(
            (Table("What the paper prints in Figure 3 (per cent)", columns, rows),)
            if rows
            else ()
        ),
        reading=(
            "The principal mask holds the half of the entries that is largest in a "
            "low-rank copy of the start, the low-magnitude mask the half with the "
            "smallest weights. Small weights have a finer bf16 grid, so a uniform "
            "update shows there first: an enriched low-magnitude mask is what the null "
            "has, too. The baseline of 50 % is the wrong yardstick for it, the null is "
            "the right one.",
        ),
    )


def _rotation(own: pd.DataFrame) -> Section | None:
    """Figure 2: angles and spectral shift."""
    there = [metric for metric in (*ANGLES, "nss") if _has(own, metric)]
    if not there:
        return None
    means = [metric for metric in there if "max" not in metric]
    roles = _layer_roles(own)
    drawings = []
    finding = "; ".join(
        f"{figures.METRIC_LABELS[m]} {_against(own, m, _short, roles or ROLE_ORDER)}"
        for m in means
    )
    positive = own[(own["value"] > 0) | ~own["metric"].str.contains("angle|nss")]
    if roles:
        drawings = [
            drawn(
                figures.depth_profiles(positive, [YOURS], there[-4:]),
                "Panels of angles and of the spectral shift against the layer, on "
                "logarithmic axes: a dot for every matrix, a line through the means of "
                "the layers, and the Gaussian null as a dotted line.",
                f"{finding[0].upper()}{finding[1:]}.",
                "A dot a matrix; dotted, the Gaussian null. Zeros are left out.",
            ),
            drawn(
                figures.role_maps(own, YOURS, means, roles),
                "Maps by layer and role of the mean angles and the spectral shift, "
                "above the same maps of the Gaussian null.",
                "The same by role and layer, above its null.",
                "Each column has one colour scale.",
            ),
        ]
    return Section(
        "rotation",
        "How far the spectrum turned and shifted (Figure 2)",
        figures=tuple(drawings),
        tables=_printed("Figure 2"),
        reading=(
            "An angle is that between the top-k singular subspaces before and after. "
            "It is small when the update is small or keeps within the subspace, and "
            "large where the gap between the k-th and the next singular value is "
            "small, whatever the update was. The null has the same gaps, so its angle "
            "is the one to compare with.",
            "The spectral shift NSS is at most the relative norm. A Gaussian update "
            "raises the small singular values, so its shift is not zero; an update "
            "well above it changes the singular values more than noise of its size.",
        ),
    )


def _printed(item: str) -> tuple[Table, ...]:
    """What the paper prints in a figure."""
    lines = paper_numbers("figures.csv")
    lines = lines[lines["item"] == item]
    rows = tuple(
        (
            _arm(str(x.arm)),
            str(x.metric).replace("_", " "),
            f"{x.relation} {x.value} {x.unit}",
        )
        for x in lines.itertuples()
    )
    rows = tuple((arm, metric, value.removesuffix(" 1")) for arm, metric, value in rows)
    caption = f"What the paper prints in {item}"
    return (Table(caption, ("arm", "metric", "value"), rows),) if rows else ()


def _spectra(own: pd.DataFrame) -> Section | None:
    """Stable rank, Hill exponent and norm of the update."""
    there = [m for m in ("stable_rank", "hill_alpha", "relative_norm") if _has(own, m)]
    roles = _layer_roles(own)
    if not there or not roles:
        return None
    rank = f"Stable rank {_against(own, 'stable_rank', _short, roles)}"
    size = f"relative norm {_short(_mean(own, 'relative_norm', roles))}"
    return Section(
        "spectra",
        "The update's own spectrum",
        figures=(
            drawn(
                figures.role_maps(own, YOURS, there, roles),
                "Maps by layer and role of the update's stable rank, Hill exponent and "
                "norm relative to the weights; below, the stable rank of a Gaussian "
                "matrix of the same shape.",
                f"{rank}; {size}.",
                "Below, the stable rank of a Gaussian matrix of the same shape, "
                "nm / (√n + √m)².",
            ),
        ),
        tables=_printed("Figure 4a") + _printed("Figure 4c"),
        reading=(
            "The stable rank is the number of directions that carry the update, from 1 "
            "to the smaller side. It depends on the size of the matrix, so compare it "
            "with the null's share, not with another model's number. The Hill exponent "
            "depends on how many singular values it is taken over; the paper does not "
            "state its number.",
        ),
    )


def _course(trajectory: pd.DataFrame, pair: pd.DataFrame | None) -> Section:
    """Figures 4 and 5: the update over training."""
    if pair is not None and not {"rows", "cols"} <= set(trajectory):
        shapes = pair[["matrix", "rows", "cols"]].drop_duplicates("matrix")
        trajectory = trajectory.merge(shapes, on="matrix", how="left")
    own = tidy(trajectory)
    attention = _roles_in(own, figures.ATTENTION_ROLES) or _roles_in(own)
    both, arms = _with_ours(own)
    wanted = ("stable_rank", "frobenius_norm", "hill_alpha", "similarity_to_end")
    if not any(_has(own, metric) for metric in wanted):
        note = "No matrix of the trajectory could be measured: its notes say why."
        return Section("course", COURSE, (note,))
    grid = [
        [
            figures.Panel(metric, [YOURS], "your model" if row == 0 else ""),
            figures.Panel(metric, arms[1:] or [YOURS], "this book" if row == 0 else ""),
        ][: 2 if len(arms) > 1 else 1]
        for row, metric in enumerate(m for m in wanted if _has(own, m))
    ]
    course = figures.first_last(own, "stable_rank", [YOURS], attention).loc[YOURS]
    early = figures.first_last(own, "similarity_to_end", [YOURS], attention).loc[YOURS]
    chance = _mean(own, "null_similarity_to_end", attention)
    null = f" (random subspaces {_short(chance)})" if np.isfinite(chance) else ""
    return Section(
        "course",
        COURSE,
        figures=(
            drawn(
                figures.trajectories(both, grid, attention),
                "Lines over the share of training for stable rank, norm, Hill exponent "
                "and similarity to the final subspace: your model on the left, this "
                "book's models on the right, nulls dotted.",
                f"Stable rank {_short(course['first'])} → {_short(course['last'])}; "
                f"similarity at the first checkpoint {_short(early['first'])}{null}.",
                "Means over the attention matrices; dotted, the nulls. Axes are shared "
                "by row.",
            ),
        ),
        tables=_printed("Figure 4a") + _printed("Figure 4c") if pair is None else (),
        reading=(
            "Similarity compares the top directions of the update so far with those of "
            "the whole update. It ends at 1 by definition and rises in any training "
            "that accumulates, so an early value means something only against the "
            "null of random subspaces and against another run with as many steps.",
            "A norm that grows faster than the dotted line of independent steps keeps "
            "a direction.",
        ),
    )


def _all_matrices(pair: pd.DataFrame) -> Section:
    """The table itself, folded."""
    shown = [
        name
        for name in pair.columns
        if name not in ("dtype_before", "dtype_after") and not pair[name].isna().all()
    ]
    rows = tuple(
        tuple(_short(x) if isinstance(x, float) else str(x) for x in row)
        for row in pair[shown].head(FOLDED_ROWS).itertuples(index=False)
    )
    rest = len(pair) - len(rows)
    more = f"The table holds {rest} more than are shown." if rest > 0 else ""
    names = tuple(re.sub("_", " ", name) for name in shown)
    caption = f"{len(rows)} matrices"
    return Section(
        "matrices",
        "Every matrix",
        (more,) if more else (),
        tables=(Table(caption, names, rows, folded=True),),
    )

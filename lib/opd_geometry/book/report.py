"""One page about one pair of checkpoints: tables in, a file of HTML out.

The page needs nothing but itself: figures are SVG inside it, styles too, and it asks no
host for anything. Beside the reader's model stand the numbers that arXiv:2606.07082
prints (``data/paper``) and this book's own small models (``data/measurements``). Means
are taken once, by layer and role, so a page costs little more for many rows than for
few; and nothing here imports torch, which takes longer to load than a page to draw.
"""

import base64
import io
import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from opd_geometry import __version__
from opd_geometry.book import figures
from opd_geometry.book.measured import (
    INFINITE,
    METRICS,
    PLACED,
    RENAMED,
    ROLE_ORDER,
    TIDY,
    YOURS,
    by_place,
    measured_table,
    tidy,
    widened,
)
from opd_geometry.book.published import OURS, book_ends, book_runs, paper_numbers
from opd_geometry.files import clear_write_errors, replacing
from opd_geometry.geometry.defaults import MASK_ALPHA
from opd_geometry.geometry.readings import (
    ABOVE,
    ANGLES,
    AT,
    BELOW,
    FAR_ENOUGH,
    ONE_SIDE,
    against_null,
    against_nulls,
    in_layers,
    sample_of,
    standing_for,
    weighted_mean,
)
from opd_geometry.geometry.tables import REMEDY, check_output
from opd_geometry.printing import visible

COURSE = "Over training (Figures 4 and 5)"
# What a run's course is held against: similarity to the end, and stable rank.
COURSE_NULLS = {
    "your run": ("similarity_to_end", "stable_rank"),
    "its increments, each turned": (
        "increments_similarity_to_end",
        "increments_stable_rank",
    ),
    "a walk of its optimizer on noise": ("walk_similarity_to_end", "walk_stable_rank"),
    "random subspaces": ("similarity_null", ""),
    "the top subspace of the start": ("similarity_of_weights", ""),
    "your run, read in bf16": ("similarity_to_end_bf16", "stable_rank_bf16"),
    "its end at every norm, read in bf16": (
        "rounding_similarity_to_end_bf16",
        "rounding_stable_rank_bf16",
    ),
}
COURSE_METRICS = ("stable_rank", "frobenius_norm", "hill_alpha", "similarity_to_end")
PAGE_SUFFIXES = (".html", ".htm")
FOLDED_ROWS = 600  # matrices in the table at the end; a page of more is slow to open
SHADES = 16  # of a map, as classes of the page's style
OVERLAP_RANGE = (0.3, 0.7)  # first and last shade of an overlap, whose middle is 50 %
EMPTY = -1  # the shade of a square without a value
Cells = tuple[str, ...]
Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Drawn:
    """A figure of the page: source is a data URI."""

    source: str
    alt: str
    finding: str
    caption: str


@dataclass(frozen=True)
class Bar:
    """A share in per cent as a bar from start, with a tick at its null if it has one.

    Its number stands beside it: a reader who does not see it misses nothing.
    """

    value: float
    null: float | None
    colour: str
    start: float = 0.0

    @property
    def low(self) -> float:
        """Where it begins, from the left."""
        return min(self.value, self.start)

    @property
    def width(self) -> float:
        """How long it is."""
        return abs(self.value - self.start)


@dataclass(frozen=True)
class Table:
    """A table of the page, its cells as text or bars."""

    caption: str
    columns: Cells
    rows: tuple[tuple[str | Bar, ...], ...]
    marked: tuple[str, ...] = ()
    folded: bool = False
    finding: str = ""
    note: str = ""


@dataclass(frozen=True)
class Line:
    """A line of a map: its layer, and a number and a shade for every role."""

    layer: int
    cells: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Map:
    """A metric by layer and role; no lines where a null is not in the table."""

    title: str
    roles: Cells
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Maps:
    """Maps side by side, an upper row of the reader's model and a lower of its null."""

    rows: tuple[tuple[str, tuple[Map, ...]], ...]
    finding: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    key: str
    title: str
    texts: tuple[str, ...] = ()
    figures: tuple[Drawn, ...] = ()
    maps: tuple[Maps, ...] = ()
    tables: tuple[Table, ...] = ()
    reading: tuple[str, ...] = ()


def _arm(name: str) -> str:
    """An arm of the paper, as it is written."""
    look = figures.ARM_STYLES.get(name)
    return look.label if look else re.sub(r"^opd ", "OPD ", name)


# --- the page ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """A measured pair, as the sections ask for it."""

    table: pd.DataFrame  # as it was read
    wide: pd.DataFrame  # `widened`: a row a matrix
    places: pd.DataFrame  # `by_place`: means by layer and role, for figures
    book: pd.DataFrame  # `book_ends`: an arm a row

    @property
    def layers(self) -> pd.DataFrame:
        """The matrices that means are over: those of the layers, if there are any."""
        return in_layers(self.wide)

    @property
    def covered(self) -> str:
        """Which these are, in words."""
        n = len(self.layers)
        if drawn := sample_of(self.layers):
            return f"{drawn}, by what each stands for"
        if self.layers["role"].isin(PLACED).all():
            return f"the {_matrices(n)} of the layers, no embedding or head"
        return f"all {_matrices(n)}, none of which is in a layer"

    @property
    def roles(self) -> list[str]:
        """Roles of a map."""
        return _roles_in(self.places, PLACED)


def build_report(
    pair: pd.DataFrame | None,
    trajectory: pd.DataFrame | None,
    title: str,
    tell: Tell = lambda done, total: None,
) -> str:
    """The page.

    Args:
        pair: a table of ``measure``; None if there is none.
        trajectory: a table of ``trajectory``; None if there is none.
        title: what the page calls the model.
        tell: told of each finished part: how many are done, of how many.

    Returns:
        HTML, the same for the same tables.

    Raises:
        ValueError: no table.
    """
    if pair is None and trajectory is None:
        raise ValueError("no table, expected one of measure or of trajectory at least")
    book = book_runs()
    parts: list[Callable[[], Section | None]] = []
    measured = None
    if pair is not None:
        wide = widened(pair)
        measured = _Pair(pair, wide, by_place(wide), book_ends(book))
        of_pair = (_differences, _overview, _sparsity, _places, _rotation, _spectra)
        parts += [partial(draw, measured) for draw in of_pair]
    if trajectory is not None:
        parts.append(partial(_course, trajectory, pair, book))
    if pair is not None:
        parts.append(partial(_all_matrices, pair))
    sections = []
    for done, part in enumerate(parts):
        tell(done, len(parts))
        sections.append(part())
    tell(len(parts), len(parts))
    template = resources.files("opd_geometry.book") / "report.html"
    page = Environment(autoescape=True, undefined=StrictUndefined)
    return page.from_string(template.read_text("utf8")).render(
        title=visible(title),
        lead=_lead(measured, trajectory),
        origin=f"Made by opd-geometry {__version__} from {_sizes(pair, trajectory)}. "
        "The paper is arXiv:2606.07082; its models have billions of parameters, this "
        "book's less than a million, so compare orders and shapes, not levels.",
        sections=[section for section in sections if section is not None],
        shades=_shades(),
    )


def write_report(
    tables: Iterable[str | Path],
    out: str | Path,
    title: str | None = None,
    force: bool = False,
    tell: Tell = lambda done, total: None,
    parts: Collection[str] | None = None,
) -> Path:
    """Read tables and write the page, whole or not at all.

    Args:
        tables: a table of ``measure``, one of ``trajectory``, or both.
        out: where the page goes.
        title: what the page calls the model; None for the first table's file name.
        force: replace a file that is there.
        tell: as `build_report`.
        parts: as `measured_table`.

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
        table = measured_table(path, parts)
        if ("step" in table) in kinds:
            raise ValueError(
                f"{path} is a second table of one kind, expected one of measure and "
                "one of trajectory at most; make a report of each"
            )
        kinds["step" in table] = table
    name = title or (paths[0].stem if paths else "")
    page = build_report(kinds.get(False), kinds.get(True), name, tell)
    with clear_write_errors(out, REMEDY), replacing(out) as draft:
        draft.write_text(page, encoding="utf8", errors="backslashreplace")
    return out


def _shades() -> list[tuple[str, str]]:
    """Ground and ink of every shade of a map, light to dark."""
    colours = [to_hex(c) for c in mpl.colormaps["YlGnBu"](np.linspace(0, 1, SHADES))]
    ink = ["#1c1e21" if place < 0.55 * SHADES else "#ffffff" for place in range(SHADES)]
    return list(zip(colours, ink, strict=True))


def _matrices(n: int) -> str:
    return f"{n} matrix" if n == 1 else f"{n} matrices"


def _sizes(pair: pd.DataFrame | None, trajectory: pd.DataFrame | None) -> str:
    said = []
    if pair is not None:
        entries = float((pair["rows"].astype(float) * pair["cols"]).sum())
        said.append(f"{_matrices(len(pair))} with {entries:,.0f} parameters")
    if trajectory is not None:
        steps = trajectory["step"].nunique()
        matrices = trajectory["matrix"].nunique()
        said.append(f"{steps} checkpoints of {_matrices(matrices)}")
    return " and ".join(said)


def _lead(pair: _Pair | None, trajectory: pd.DataFrame | None) -> tuple[str, ...]:
    """The first sentences: what differs from its null, and how much has changed."""
    if pair is None:
        return ("How the update grew, and when its directions were settled.",)
    drawn = sample_of(pair.table)
    sampled = (
        f"This is {drawn}: means are estimates for all of them, maps and figures show "
        "those that were drawn.",
    )
    first = (*(sampled if drawn else ()), _stands_out(pair))
    known = pair.table[pair.table["sparsity_bf16"].notna()]
    if known.empty:
        return (
            *first,
            "No matrix of this table has a sparsity: their notes say why.",
        )
    entries = known["rows"].to_numpy(float) * known["cols"].to_numpy(float)
    entries = entries * standing_for(known)
    share = float(np.average(known["sparsity_bf16"], weights=entries))
    dtypes = {"dtype_before", "dtype_after"} <= set(pair.table)
    stored = [known["dtype_before"], known["dtype_after"]] if dtypes else []
    names = sorted({str(name) for column in stored for name in column})
    kinds = f" (stored as {visible(', '.join(names))})" if names else ""
    there = {"embed", "head"} & {*pair.table["role"]}
    which = ", embeddings and head included" if there else ""
    return (
        *first,
        f"{_percent(share)} of the weights{kinds} have the same value in bf16 before "
        f"and after{which}; the others are what this page is "
        "about.",
    )


def _stands_out(pair: _Pair) -> str:
    """What differs from its null, in a sentence."""
    if "frobenius_norm" in pair.wide and (pair.wide["frobenius_norm"] == 0).all():
        return "Nothing changed: every matrix is the same before and after."
    found = against_null(in_layers(pair.table))
    if found.empty:
        return "The table has no nulls, so nothing here says where the update went."

    sides = []
    for verdict in (ABOVE, BELOW):
        rows = found[found["verdict"] == verdict]
        names = [f"{_metric_label(n)} ({_short(x)}×)" for n, x in rows["ratio"].items()]
        sides += [f"{verdict}: {'; '.join(names)}. "] if names else []
    if not sides:
        return "Nothing differs from its null: what is seen here is a matter of size."
    rest = [_metric_label(name) for name in found.index[found["verdict"] == AT]]
    text = "".join(f"{side[0].upper()}{side[1:]}" for side in sides)
    return f"{text}At its null: {'; '.join(rest) or 'nothing'}."


def _metric_label(column: object) -> str:
    name = RENAMED.get(str(column), str(column))
    return figures.METRIC_LABELS.get(name, name.replace("_", " "))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if np.isfinite(share) else "–"


def _short(value: float) -> str:
    return f"{value:.3g}" if np.isfinite(value) else "–"


def _mean(wide: pd.DataFrame, metric: str) -> float:
    """Over matrices: plain, and of sparsity by parameters; NaN if not measured."""
    if metric not in wide:
        return float("nan")
    values = wide[metric].to_numpy(float)
    known = np.isfinite(values)
    if not known.any():
        return float("nan")
    if metric in figures.WEIGHTED_METRICS:
        weights = (wide["parameters"].to_numpy(float) * standing_for(wide))[known]
        return float(np.average(values[known], weights=weights))
    return weighted_mean(values[known], standing_for(wide)[known])


def _has(wide: pd.DataFrame, metric: str) -> bool:
    return metric in wide and bool(wide[metric].notna().any())


def _roles_in(table: pd.DataFrame, order: Sequence[str] = ROLE_ORDER) -> list[str]:
    there = set(table["role"])
    return [role for role in order if role in there]


def _against(wide: pd.DataFrame, metric: str, form: Callable[[float], str]) -> str:
    """A mean, and what its null has."""
    null = _mean(wide, f"null_{metric}")
    tail = f" (Gaussian null {form(null)})" if np.isfinite(null) else ""
    return f"{form(_mean(wide, metric))}{tail}"


def drawn(figure: Figure, alt: str, finding: str, caption: str) -> Drawn:
    """A figure as SVG within the page; the same figure gives the same bytes."""
    file = io.BytesIO()
    # Without a salt ids are random; text as paths needs no font at the reader's.
    with mpl.rc_context({"svg.hashsalt": "opd-geometry", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
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


def _differences(pair: _Pair) -> Section | None:
    """What stands out from its null, as a table."""
    found = against_nulls(in_layers(pair.table))
    order = {ABOVE: 0, BELOW: 0, AT: 1}
    found = found.sort_values("verdict", key=lambda v: v.map(order), kind="stable")
    rows = tuple(
        (
            _metric_label(row["diagnostic"]),
            str(row["against"]),
            str(row["matrices"]),
            _short(row["mean"]),
            _short(row["null"]),
            _short(row["ratio"]),
            f"± {_percent(row['limit'])}" if row["limit"] == row["limit"] else "–",
            _percent(row["above"]),
            str(row["verdict"]),
        )
        for _, row in found.iterrows()
    )
    if not rows:
        return None
    numbers = ("matrices", "mean", "null", "ratio", "detection limit", "above")
    columns = ("diagnostic", "against", *numbers, "verdict")
    caption = f"What stands out from its null (means over {pair.covered})"
    return Section(
        "differences",
        "What differs from its null",
        tables=(Table(caption, columns, rows),),
        reading=(
            "A null says what the same diagnostic gives for a Gaussian update with the "
            "same Frobenius norm in every matrix; for the stable rank, it is that of a "
            "Gaussian matrix of the same shape. Shuffled: the update's own entries "
            "elsewhere; turned: its own singular values in other directions; closed "
            "form: what is expected of any update without a place at this distance. An "
            "energy is the share of the squared update in W₀'s top or bottom subspaces "
            "and on its masks, beside chance. A value that equals its null tells "
            "the size of the update and nothing else; only the difference tells where "
            "it went.",
            f"A diagnostic stands out if {100 * ONE_SIDE:.0f} % of the matrices lie on "
            "one side of their own null and the means differ by "
            f"{100 * FAR_ENOUGH:.0f} % and by more than the detection limit: what a "
            "mean over so many matrices, each against one drawn null, shows by chance "
            "in 19 of 20 cases. Matrices of one model are not independent, so "
            "this sorts, and tests nothing.",
        ),
    )


def _overview(pair: _Pair) -> Section:
    """Means by role, over the layers and over all, and what the table does not have."""
    wide = pair.wide
    there = [metric for metric in SUMMARY if _has(wide, metric)]
    groups = [(role, wide[wide["role"] == role]) for role in _roles_in(wide)]
    if len(pair.layers) < len(wide):
        groups.append(("layers", pair.layers))
    rows = [
        (
            name,
            str(len(part)),
            *(
                _short((100 if m.removeprefix("null_") in SHARES else 1) * value)
                for m in there
                for value in [_mean(part, m)]
            ),
        )
        for name, part in [*groups, ("all", wide)]
    ]
    absent = [
        figures.METRIC_LABELS[m] for m in SUMMARY if m in METRICS and m not in there
    ]
    texts = [
        "Means over matrices without weights, sparsity by parameters, as in Table 1. "
        "The row 'all' holds every matrix; sentences and figures are of "
        f"{pair.covered}."
    ]
    refused = int(wide["sparsity"].isna().sum()) if "sparsity" in there else 0
    if refused:
        texts.append(
            f"{refused} of {len(wide)} matrices have no sparsity and count for "
            "nothing: their notes below say why."
        )
    if {"stratum", "stratum_size"} <= set(wide):
        n = int(wide.drop_duplicates("stratum")["stratum_size"].sum())
        texts.append(f"A sample of {len(wide)} of {n} matrices, by role and depth.")
    infinite = pair.table.attrs.get(INFINITE)
    if infinite:
        texts.append(
            f"Infinite values count as not measured: in {', '.join(infinite)}."
        )
    if absent:
        texts.append(f"Not in the table, so not on this page: {', '.join(absent)}.")
    columns = ("role", "matrices", *map(_label, there))
    return Section(
        "overview",
        "By role and over all",
        tuple(texts),
        tables=(Table("Means by role", columns, tuple(rows), ("layers", "all")),),
    )


def _sparsity(pair: _Pair) -> Section:
    """Table 1: the reader's model, the paper's rows, this book's."""
    mine = figures.ARM_STYLES[YOURS].colour
    rows = [
        (name, _mean(part, "sparsity"), _mean(part, "null_sparsity"), mine)
        for name, part in (("your model", pair.layers), ("… every matrix", pair.wide))
        if name == "your model" or len(part) > len(pair.layers)
    ]
    marked = tuple(name for name, *_ in rows)
    for line in paper_numbers("table_1.csv").itertuples():
        label = f"paper: {_arm(str(line.arm))}"
        rows.append((label, float(line.value) / 100, np.nan, figures.GREY))
    for arm, ends in pair.book.iterrows():
        look = figures.ARM_STYLES[str(arm)]
        ours = float(ends["sparsity"]), float(ends["null_sparsity"])
        rows.append((f"this book: {look.label}", *ours, look.colour))
    unchanged = _against(pair.layers, "sparsity", _percent)
    cells = tuple(
        (label, _percent(value), _percent(null), _bar(value, null, colour))
        for label, value, null, colour in rows
    )
    return Section(
        "sparsity",
        "How much changed (Table 1)",
        tables=(
            Table(
                "Table 1 of the paper, with your model and this book's",
                ("model", "sparsity", "Gaussian null", "0 to 100 %"),
                cells,
                marked,
                finding=f"Unchanged in bf16: {unchanged}.",
                note="Share of entries with the same bf16 value before and after, by "
                f"parameters: of {pair.covered}; of this book's models, the layers, "
                "too, as on its first page. The paper does not say which it counts, "
                "and prints no nulls. The tick is the Gaussian null.",
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


def _bar(value: float, null: float, colour: str, start: float = 0.0) -> str | Bar:
    """A share as a bar in per cent; no bar for a share that is not known."""
    if not np.isfinite(value):
        return ""
    tick = 100 * null if np.isfinite(null) else None
    return Bar(100 * value, tick, colour, 100 * start)


def _mask_table(pair: _Pair) -> Table:
    """Density and overlaps of the reader's model and of this book's."""
    look = figures.ARM_STYLES[YOURS]
    names = figures.with_null(figures.MASK_METRICS)
    models = [(look, {name: _mean(pair.layers, name) for name in names})]
    for arm, ends in pair.book.iterrows():
        models.append((figures.ARM_STYLES[str(arm)], dict(ends)))
    rows = []
    for style, means in models:
        row: list[str | Bar] = [style.label]
        for metric in figures.MASK_METRICS:
            value, null = float(means[metric]), float(means[f"null_{metric}"])
            start = MASK_ALPHA if "overlap" in metric else 0.0
            both = f"{_short(100 * value)} (null {_short(100 * null)})"
            row += [both, _bar(value, null, style.colour, start)]
        rows.append(tuple(row))
    columns = [name for m in figures.MASK_METRICS for name in (_label(m), "0 to 100 %")]
    overlaps = [
        f"{name} mask {_against(pair.layers, metric, _percent)}"
        for name, metric in (
            ("principal", "principal_overlap"),
            ("low-magnitude", "low_magnitude_overlap"),
        )
    ]
    return Table(
        "Update density and overlaps, your model and this book's",
        ("model", *columns),
        tuple(rows),
        (look.label,),
        finding=f"Overlap: {'; '.join(overlaps)}.",
        note=f"Means over {pair.covered}; the same of this book's models. Bars "
        "of an overlap start at the mask's own share, 50 %: what changes at random "
        "places would have. Ticks are Gaussian nulls.",
    )


def _places(pair: _Pair) -> Section | None:
    """Figure 3: masks."""
    if not all(_has(pair.layers, metric) for metric in figures.MASK_METRICS):
        return None
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
        maps=_maps(
            pair,
            figures.MASK_METRICS,
            "Where a layer or a role stands out from its null, look there first.",
            "Update density and both overlaps by layer and role.",
        ),
        tables=(
            _mask_table(pair),
            *(
                [Table("What the paper prints in Figure 3 (per cent)", columns, rows)]
                if rows
                else ()
            ),
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


def _maps(
    pair: _Pair, metrics: Sequence[str], finding: str, caption: str
) -> tuple[Maps, ...]:
    """Metrics by layer and role above their nulls, a scale a metric; () if none is."""
    there = [m for m in metrics if (pair.places["metric"] == m).any()]
    if not there:
        return ()
    grids = {
        name: pair.places[pair.places["metric"] == name].pivot(
            index="layer", columns="role", values="value"
        )
        for name in figures.with_null(there)
    }
    rows = []
    for label, prefix in (("your model", ""), ("Gaussian null", "null_")):
        maps = tuple(
            _map(metric, grids[f"{prefix}{metric}"], _range(metric, grids), pair.roles)
            for metric in there
        )
        if any(found.lines for found in maps):
            rows.append((label, maps))
    lines = pair.places["layer"].nunique()
    layers = pair.wide[pair.wide["role"].isin(PLACED)]["layer"]
    n = layers[layers >= 0].nunique()
    shared = f" Neighbours of {n} layers share a line." if n > lines else ""
    return (Maps(tuple(rows), finding, f"{caption}{shared}"),)


def _range(metric: str, grids: dict[str, pd.DataFrame]) -> tuple[float, float]:
    """Values of the first and of the last shade."""
    if "overlap" in metric:
        return OVERLAP_RANGE
    if metric in SHARES:
        return 0.0, 1.0
    known = [
        grids[name].to_numpy(float).ravel() for name in figures.with_null([metric])
    ]
    values = np.concatenate(known)
    return float(np.nanmin(values)), float(np.nanmax(values))


def _map(
    metric: str, grid: pd.DataFrame, limits: tuple[float, float], roles: Sequence[str]
) -> Map:
    low, high = limits
    values = grid.reindex(columns=list(roles)).to_numpy(float)
    places = (values - low) / ((high - low) or 1.0) * SHADES
    shades = np.nan_to_num(np.clip(places, 0, SHADES - 1), nan=EMPTY).astype(int)
    if metric in SHARES:
        values, form = 100 * values, ".0f"
    else:
        form = ".2g"
    return Map(
        _label(metric),
        tuple(roles),
        tuple(
            Line(
                int(layer),
                tuple(
                    ("" if np.isnan(value) else f"{value:{form}}", int(shade))
                    for value, shade in zip(line, tones, strict=True)
                ),
            )
            for layer, line, tones in zip(grid.index, values, shades, strict=True)
        ),
    )


def _rotation(pair: _Pair) -> Section | None:
    """Figure 2: angles and spectral shift."""
    there = [metric for metric in (*ANGLES, "nss") if _has(pair.layers, metric)]
    if not there:
        return None
    means = [metric for metric in there if "max" not in metric]
    finding = "; ".join(
        f"{figures.METRIC_LABELS[m]} {_against(pair.layers, m, _short)}" for m in means
    )
    finding = f"{finding[0].upper()}{finding[1:]}."
    positive = pair.places[pair.places["value"] > 0]
    shown = [m for m in there[-4:] if (positive["metric"] == m).any()]
    drawings = []
    if shown:
        drawings.append(
            drawn(
                figures.depth_profiles(positive, [YOURS], shown, PLACED),
                "Panels of angles and of the spectral shift against the layer, on "
                "logarithmic axes: a dot for every layer and role, a line through the "
                "means of the layers, and the Gaussian null as a dotted line.",
                finding,
                f"Means in the words above: over {pair.covered}. A dot a layer and "
                "role; dotted, the Gaussian null. Zeros are left out.",
            )
        )
    maps = _maps(
        pair,
        means,
        "The same by role and layer, above its null.",
        "Mean angles and spectral shift; a metric and its null share their shades.",
    )
    return Section(
        "rotation",
        "How far the spectrum turned and shifted (Figure 2)",
        texts=() if drawings else (finding,),
        figures=tuple(drawings),
        maps=maps,
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


def _spectra(pair: _Pair) -> Section | None:
    """Stable rank, Hill exponent and norm of the update."""
    wanted = ("stable_rank", "hill_alpha", "relative_norm")
    rank = f"Stable rank {_against(pair.layers, 'stable_rank', _short)}"
    size = f"relative norm {_short(_mean(pair.layers, 'relative_norm'))}"
    maps = _maps(
        pair,
        wanted,
        f"{rank}; {size}.",
        f"Means in the words above: over {pair.covered}. Below, the stable rank of a "
        "Gaussian matrix of the same shape, nm / (√n + √m)².",
    )
    if not maps:
        return None
    return Section(
        "spectra",
        "The update's own spectrum",
        maps=maps,
        tables=_printed("Figure 4a") + _printed("Figure 4c"),
        reading=(
            "The stable rank is the number of directions that carry the update, from 1 "
            "to the smaller side. It depends on the size of the matrix, so compare it "
            "with the null's share, not with another model's number. The Hill exponent "
            "depends on how many singular values it is taken over; the paper does not "
            "state its number.",
        ),
    )


def _means_by_step(table: pd.DataFrame, roles: Sequence[str]) -> pd.DataFrame:
    """Means over the matrices of some roles: one matrix a run and step.

    Args:
        table: tidy.
        roles: which matrices; the first one's name stands for all.
    """
    metrics = figures.with_null(COURSE_METRICS)
    chosen = table[table["role"].isin(roles) & table["metric"].isin(metrics)]
    keys = ["run", "arm", "seed", "step", "metric"]
    chosen = chosen[[*keys, "value"]].astype({"run": object, "metric": object})
    means = chosen.groupby(keys, observed=True)["value"].mean().reset_index()
    return means.assign(matrix="mean", role=roles[0], layer=0)[TIDY]


def _course(
    trajectory: pd.DataFrame, pair: pd.DataFrame | None, book: pd.DataFrame
) -> Section:
    """Figures 4 and 5: the update over training."""
    if pair is not None and not {"rows", "cols"} <= set(trajectory):
        shapes = pair[["matrix", "rows", "cols"]].drop_duplicates("matrix")
        trajectory = trajectory.merge(shapes, on="matrix", how="left")
    measured = tidy(trajectory)
    drawable = ~measured["metric"].isin(figures.LOG_METRICS) | (measured["value"] > 0)
    measured = measured[drawable]
    wanted = [m for m in COURSE_METRICS if (measured["metric"] == m).any()]
    if not wanted:
        note = "No matrix of the trajectory could be measured: its notes say why."
        return Section("course", COURSE, (note,))
    attention = _roles_in(measured, figures.ATTENTION_ROLES) or _roles_in(measured)
    n = trajectory[trajectory["role"].isin(attention)]["matrix"].nunique()
    covered = f"the {_matrices(n)} of the role {', '.join(attention)}"
    role = attention[:1]
    own = _means_by_step(measured, attention)
    # The same few names for both, so that one table holds both.
    ours = _means_by_step(book, figures.ATTENTION_ROLES).assign(role=role[0])
    arms = [arm for arm in OURS if arm in set(ours["arm"])]
    both = pd.concat([own, ours]) if arms else own
    grid = [
        [
            figures.Panel(metric, [YOURS], "your model" if row == 0 else ""),
            figures.Panel(metric, arms or [YOURS], "this book" if row == 0 else ""),
        ][: 2 if arms else 1]
        for row, metric in enumerate(wanted)
    ]
    course = figures.first_last(own, "stable_rank", [YOURS], role).loc[YOURS]
    early = figures.first_last(own, "similarity_to_end", [YOURS], role).loc[YOURS]
    chances = own[own["metric"] == "null_similarity_to_end"]["value"]
    null = f" (random subspaces {_short(chances.iloc[-1])})" if len(chances) else ""
    return Section(
        "course",
        COURSE,
        figures=(
            drawn(
                figures.trajectories(both, grid, role),
                "Lines over the share of training for stable rank, norm, Hill exponent "
                "and similarity to the final subspace: your model on the left, this "
                "book's models on the right, nulls dotted.",
                f"Stable rank {_short(course['first'])} → {_short(course['last'])}; "
                f"similarity at the first checkpoint {_short(early['first'])}{null}.",
                f"Means over {covered}, of this book's models over the attention "
                "matrices; dotted, the nulls. Axes are shared by row.",
            ),
        ),
        tables=(
            *_course_nulls(trajectory[trajectory["role"].isin(attention)]),
            *(_printed("Figure 4a") + _printed("Figure 4c") if pair is None else ()),
        ),
        reading=(
            "Similarity compares the top directions of the update so far with those of "
            "the whole update. It ends at 1 by definition and rises in any training "
            "that accumulates, so an early value means something only against the "
            "strongest of its nulls and against another run with as many steps: a walk "
            "of the same optimizer on noise locks in as well, by its falling rates.",
            "A norm that grows faster than the dotted line of independent steps keeps "
            "a direction.",
        ),
    )


def _course_nulls(trajectory: pd.DataFrame) -> tuple[Table, ...]:
    """Similarity to the end and stable rank beside every null that was measured."""
    others = [n for n in trajectory if n.startswith("similarity_to_")]
    named = COURSE_NULLS | {
        f"the end of {name.removeprefix('similarity_to_')}": (name, "")
        for name in others
        if name not in ("similarity_to_end", "similarity_to_end_bf16")
    }
    wanted = [n for pair in named.values() for n in pair if n in trajectory]
    means = trajectory.groupby("step")[list(dict.fromkeys(wanted))].mean()

    def at(name: str, place: int) -> str:
        value = means[name].iloc[place] if name in means else math.nan
        return "-" if math.isnan(value) else _short(float(value))

    cells = [
        (label, at(near, 0), at(rank, 0), at(rank, -1))
        for label, (near, rank) in named.items()
    ]
    rows = tuple(row for row in cells if {*row[1:]} != {"-"})
    if len(rows) < 2:
        return ()
    went = ""
    if "displacement" in trajectory and trajectory["displacement"].notna().any():
        last = trajectory[trajectory["step"] == trajectory["step"].max()]
        went = (
            f"At the end it went {_short(float(last['displacement'].mean()))} times as "
            "far as its optimizer goes on noise."
        )
    columns = ("", "similarity at first", "stable rank at first", "at the end")
    return (
        Table("The course beside its nulls", columns, rows, (rows[0][0],), note=went),
    )


def _all_matrices(pair: pd.DataFrame) -> Section:
    """The table itself, folded."""
    shown = [
        name
        for name in pair.columns
        if name not in ("dtype_before", "dtype_after") and not pair[name].isna().all()
    ]
    rows = tuple(
        tuple(_short(x) if isinstance(x, float) else visible(str(x)) for x in row)
        for row in pair[shown].head(FOLDED_ROWS).itertuples(index=False)
    )
    rest = len(pair) - len(rows)
    more = f"The table holds {rest} more than are shown." if rest > 0 else ""
    names = tuple(visible(str(name)).replace("_", " ") for name in shown)
    return Section(
        "matrices",
        "Every matrix",
        (more,) if more else (),
        tables=(Table(_matrices(len(rows)), names, rows, folded=True),),
    )

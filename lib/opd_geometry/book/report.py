"""One page about one pair of checkpoints: tables in, a file of HTML out.

The page needs nothing but itself: figures are SVG inside it, styles too, and it asks no
host for anything. Beside the reader's model stand the numbers that arXiv:2606.07082
prints (``data/paper``) and this book's own small models (``data/measurements``). Its
words stand in ``report.html``; here is what is filled in. Means are taken once, by
layer and role, so a page costs little more for many rows than for few; and nothing here
imports torch, which takes longer to load than a page to draw.
"""

import base64
import io
import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from opd_geometry import __version__
from opd_geometry.book import figures
from opd_geometry.book.board import template
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
PRINTED = ("Figure 2", "Figure 4a", "Figure 4c")  # listed as the paper prints them
PAGE_SUFFIXES = (".html", ".htm")
FOLDED_ROWS = 600  # matrices in the table at the end; a page of more is slow to open
SHADES = 16  # of a map, as classes of the page's style
OVERLAP_RANGE = (0.3, 0.7)  # first and last shade of an overlap, whose middle is 50 %
EMPTY = -1  # the shade of a square without a value
Tell = Callable[[int, int], None]
Section = dict[str, Any]  # what the template fills in


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

    @property
    def sharing(self) -> int:
        """How many layers share the lines of a map; 0 if each has its own."""
        layers = self.wide[self.wide["role"].isin(PLACED)]["layer"]
        n = int(layers[layers >= 0].nunique())
        return n if n > self.places["layer"].nunique() else 0


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
    parts: dict[str, Callable[[], Section | None]] = {}
    measured = None
    if pair is not None:
        wide = widened(pair)
        measured = _Pair(pair, wide, by_place(wide), book_ends(book))
        of_pair = (_differences, _overview, _sparsity, _places, _rotation, _spectra)
        parts |= {draw.__name__[1:]: partial(draw, measured) for draw in of_pair}
    if trajectory is not None:
        parts["course"] = partial(_course, trajectory, pair, book)
    if pair is not None:
        parts["matrices"] = partial(_all_matrices, pair)
    sections: dict[str, Section] = {}
    for done, (key, part) in enumerate(parts.items()):
        tell(done, len(parts))
        if section := part():
            sections[key] = section
    tell(len(parts), len(parts))
    return template("report.html").render(
        title=visible(title),
        lead=_lead(measured, trajectory),
        version=__version__,
        sizes=_sizes(pair, trajectory),
        sections=sections,
        pair=measured,
        printed={item: _printed(item) for item in PRINTED},
        one_side=f"{100 * ONE_SIDE:.0f} %",
        far_enough=f"{100 * FAR_ENOUGH:.0f} %",
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
    weights = standing_for(wide)
    if metric in figures.WEIGHTED_METRICS:
        weights = wide["parameters"].to_numpy(float) * weights
        return float(np.average(values[known], weights=weights[known]))
    return weighted_mean(values[known], weights[known])


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


def drawn(figure: Figure) -> str:
    """A figure as the address of an SVG; the same figure gives the same bytes."""
    file = io.BytesIO()
    # Without a salt ids are random; text as paths needs no font at the reader's.
    with mpl.rc_context({"svg.hashsalt": "opd-geometry", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


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
    rows = [
        (
            _metric_label(row["diagnostic"]),
            str(row["against"]),
            str(row["matrices"]),
            *(_short(row[name]) for name in ("mean", "null", "ratio")),
            f"± {_percent(row['limit'])}" if row["limit"] == row["limit"] else "–",
            _percent(row["above"]),
            str(row["verdict"]),
        )
        for _, row in found.iterrows()
    ]
    return {"rows": rows} if rows else None


def _overview(pair: _Pair) -> Section:
    """Means by role, over the layers and over all, and what the table does not have."""
    wide = pair.wide
    there = [metric for metric in SUMMARY if _has(wide, metric)]
    groups = {role: wide[wide["role"] == role] for role in _roles_in(wide)}
    if len(pair.layers) < len(wide):
        groups["layers"] = pair.layers
    scales = {m: 100 if m.removeprefix("null_") in SHARES else 1 for m in there}
    absent = [m for m in SUMMARY if m in METRICS and m not in there]
    sampled = {"stratum", "stratum_size"} <= set(wide)
    strata = wide.drop_duplicates("stratum")["stratum_size"] if sampled else []
    return {
        "columns": ("role", "matrices", *map(_label, there)),
        "rows": [
            (name, str(len(part)), *(_short(scales[m] * _mean(part, m)) for m in there))
            for name, part in (groups | {"all": wide}).items()
        ],
        "refused": int(wide["sparsity"].isna().sum()) if "sparsity" in there else 0,
        "n": len(wide),
        "sample_of": int(sum(strata)),
        "infinite": ", ".join(pair.table.attrs.get(INFINITE) or []),
        "absent": ", ".join(figures.METRIC_LABELS[m] for m in absent),
    }


def _sparsity(pair: _Pair) -> Section:
    """Table 1: the reader's model, the paper's rows, this book's."""
    mine = figures.ARM_STYLES[YOURS].colour
    own = {"your model": pair.layers}
    if len(pair.wide) > len(pair.layers):
        own["… every matrix"] = pair.wide
    rows = [
        (name, _mean(part, "sparsity"), _mean(part, "null_sparsity"), mine)
        for name, part in own.items()
    ]
    for line in paper_numbers("table_1.csv").itertuples():
        label = f"paper: {_arm(str(line.arm))}"
        rows.append((label, float(line.value) / 100, np.nan, figures.GREY))
    for arm, ends in pair.book.iterrows():
        look = figures.ARM_STYLES[str(arm)]
        ours = float(ends["sparsity"]), float(ends["null_sparsity"])
        rows.append((f"this book: {look.label}", *ours, look.colour))
    return {
        "unchanged": _against(pair.layers, "sparsity", _percent),
        "own": [*own],
        "rows": [
            (label, _percent(value), _percent(null), _bar(value, null, colour))
            for label, value, null, colour in rows
        ],
    }


def _bar(value: float, null: float, colour: str, start: float = 0.0) -> str | Bar:
    """A share as a bar in per cent; no bar for a share that is not known."""
    if not np.isfinite(value):
        return ""
    tick = 100 * null if np.isfinite(null) else None
    return Bar(100 * value, tick, colour, 100 * start)


def _places(pair: _Pair) -> Section | None:
    """Figure 3: masks, by place and beside this book's models and the paper's."""
    if not all(_has(pair.layers, metric) for metric in figures.MASK_METRICS):
        return None
    names = figures.with_null(figures.MASK_METRICS)
    models: list[tuple[str, Any]] = [
        (YOURS, {name: _mean(pair.layers, name) for name in names}),
        *((str(arm), ends) for arm, ends in pair.book.iterrows()),
    ]
    rows = []
    for arm, means in models:
        style = figures.ARM_STYLES[arm]
        row: list[str | Bar] = [style.label]
        for metric in figures.MASK_METRICS:
            value, null = float(means[metric]), float(means[f"null_{metric}"])
            start = MASK_ALPHA if "overlap" in metric else 0.0
            both = f"{_short(100 * value)} (null {_short(100 * null)})"
            row += [both, _bar(value, null, style.colour, start)]
        rows.append(row)
    printed = paper_numbers("figures.csv")
    printed = printed[printed["item"] == "Figure 3"].pivot_table(
        index="arm", columns="metric", values="value", sort=False
    )
    return {
        "maps": _maps(pair, figures.MASK_METRICS),
        "columns": [_label(metric) for metric in figures.MASK_METRICS],
        "rows": rows,
        "own": [figures.ARM_STYLES[YOURS].label],
        "principal": _against(pair.layers, "principal_overlap", _percent),
        "low_magnitude": _against(pair.layers, "low_magnitude_overlap", _percent),
        "printed": [
            (
                _arm(str(arm)),
                *(_short(float(row.get(m, np.nan))) for m in figures.MASK_METRICS),
            )
            for arm, row in printed.iterrows()
        ],
    }


def _maps(pair: _Pair, metrics: Sequence[str]) -> list[tuple[str, list[Section]]]:
    """Metrics by layer and role above their nulls, a scale a metric; [] if none is."""
    there = [m for m in metrics if (pair.places["metric"] == m).any()]
    grids = {
        name: pair.places[pair.places["metric"] == name]
        .pivot(index="layer", columns="role", values="value")
        .reindex(columns=pair.roles)
        for name in figures.with_null(there)
    }
    limits = {metric: _range(metric, grids) for metric in there}
    rows = []
    for label, prefix in (("your model", ""), ("Gaussian null", "null_")):
        maps = [_map(m, grids[f"{prefix}{m}"], limits[m]) for m in there]
        if any(found["lines"] for found in maps):
            rows.append((label, maps))
    return rows


def _range(metric: str, grids: dict[str, pd.DataFrame]) -> tuple[float, float]:
    """Values of the first and of the last shade."""
    if "overlap" in metric:
        return OVERLAP_RANGE
    if metric in SHARES:
        return 0.0, 1.0
    values = pd.concat([grids[name] for name in figures.with_null([metric])])
    return float(np.nanmin(values)), float(np.nanmax(values))


def _map(metric: str, grid: pd.DataFrame, limits: tuple[float, float]) -> Section:
    """A map: its title, and lines of a layer with a number and a shade a role."""
    low, high = limits
    values = grid.to_numpy(float)
    places = (values - low) / ((high - low) or 1.0) * SHADES
    shades = np.nan_to_num(np.clip(places, 0, SHADES - 1), nan=EMPTY).astype(int)
    scale, form = (100, ".0f") if metric in SHARES else (1, ".2g")
    lines = [
        (
            int(layer),
            [
                ("" if np.isnan(value) else f"{scale * value:{form}}", shade)
                for value, shade in zip(line, tones, strict=True)
            ],
        )
        for layer, line, tones in zip(grid.index, values, shades, strict=True)
    ]
    return {"title": _label(metric), "lines": lines}


def _rotation(pair: _Pair) -> Section | None:
    """Figure 2: angles and spectral shift."""
    there = [metric for metric in (*ANGLES, "nss") if _has(pair.layers, metric)]
    if not there:
        return None
    means = [metric for metric in there if "max" not in metric]
    finding = "; ".join(
        f"{figures.METRIC_LABELS[m]} {_against(pair.layers, m, _short)}" for m in means
    )
    positive = pair.places[pair.places["value"] > 0]
    shown = [m for m in there[-4:] if (positive["metric"] == m).any()]
    return {
        "finding": f"{finding[0].upper()}{finding[1:]}.",
        "figure": drawn(figures.depth_profiles(positive, [YOURS], shown, PLACED))
        if shown
        else "",
        "maps": _maps(pair, means),
    }


def _printed(item: str) -> list[tuple[str, str, str]]:
    """What the paper prints in a figure: arm, metric, value."""
    lines = paper_numbers("figures.csv")
    return [
        (
            _arm(str(x.arm)),
            str(x.metric).replace("_", " "),
            f"{x.relation} {x.value} {x.unit}".removesuffix(" 1"),
        )
        for x in lines[lines["item"] == item].itertuples()
    ]


def _spectra(pair: _Pair) -> Section | None:
    """Stable rank, Hill exponent and norm of the update."""
    maps = _maps(pair, ("stable_rank", "hill_alpha", "relative_norm"))
    if not maps:
        return None
    return {
        "maps": maps,
        "rank": _against(pair.layers, "stable_rank", _short),
        "norm": _short(_mean(pair.layers, "relative_norm")),
    }


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
        return {"figure": ""}
    attention = _roles_in(measured, figures.ATTENTION_ROLES) or _roles_in(measured)
    n = trajectory[trajectory["role"].isin(attention)]["matrix"].nunique()
    role = attention[:1]
    own = _means_by_step(measured, attention)
    # The same few names for both, so that one table holds both.
    ours = _means_by_step(book, figures.ATTENTION_ROLES).assign(role=role[0])
    arms = [arm for arm in OURS if arm in set(ours["arm"])]
    both = pd.concat([own, ours]) if arms else own
    columns = {"your model": [YOURS], **({"this book": arms} if arms else {})}
    grid = [
        [
            figures.Panel(metric, names, title if metric == wanted[0] else "")
            for title, names in columns.items()
        ]
        for metric in wanted
    ]
    course = figures.first_last(own, "stable_rank", [YOURS], role).loc[YOURS]
    early = figures.first_last(own, "similarity_to_end", [YOURS], role).loc[YOURS]
    chances = own[own["metric"] == "null_similarity_to_end"]["value"]
    return {
        "figure": drawn(figures.trajectories(both, grid, role)),
        "first": _short(course["first"]),
        "last": _short(course["last"]),
        "early": _short(early["first"]),
        "chance": _short(chances.iloc[-1]) if len(chances) else "",
        "covered": f"the {_matrices(n)} of the role {', '.join(attention)}",
        **_course_nulls(trajectory[trajectory["role"].isin(attention)]),
    }


def _course_nulls(trajectory: pd.DataFrame) -> Section:
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
    rows = [row for row in cells if {*row[1:]} != {"-"}]
    went = ""
    if "displacement" in trajectory and trajectory["displacement"].notna().any():
        last = trajectory[trajectory["step"] == trajectory["step"].max()]
        went = _short(float(last["displacement"].mean()))
    return {"rows": rows if len(rows) > 1 else [], "went": went}


def _all_matrices(pair: pd.DataFrame) -> Section:
    """The table itself, folded."""
    known = pair.dropna(axis="columns", how="all")
    known = known.drop(columns=["dtype_before", "dtype_after"], errors="ignore")
    rows = [
        tuple(_short(x) if isinstance(x, float) else visible(str(x)) for x in row)
        for row in known.head(FOLDED_ROWS).itertuples(index=False)
    ]
    return {
        "caption": _matrices(len(rows)),
        "columns": [visible(str(name)).replace("_", " ") for name in known],
        "rows": rows,
        "rest": len(pair) - len(rows),
    }

"""The chapter's tables: what updates without place, and with one, give on real weights.

Weights of others are not committed; what was measured on them is, with its provenance,
in a folder a model below ``data/unplaced``.
"""

import datetime
import itertools
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor

from opd_geometry.analysis.evidence import Levels, last, levels_of, over_matrices
from opd_geometry.analysis.exclusions import printed
from opd_geometry.analysis.unplaced import one_distance as od
from opd_geometry.analysis.unplaced import origins as og
from opd_geometry.analysis.unplaced import power as pw
from opd_geometry.analysis.unplaced import printed as pr
from opd_geometry.analysis.unplaced.origins import Origin
from opd_geometry.analysis.unplaced.rates import (
    COMMITTED,
    decayed,
    paper_displacements,  # noqa: F401  for chapters, beside the rest
)
from opd_geometry.experiments import measure
from opd_geometry.experiments.records import sealing
from opd_geometry.experiments.shelf import committed_csv
from opd_geometry.files import (
    clear_write_errors,
    data_directory,
    on_shelf,
)
from opd_geometry.geometry import bits, gram, spectra
from opd_geometry.geometry.comparison import ANGLE_DIVISOR, MASK_ALPHA
from opd_geometry.geometry.spectra import default_rank

STUDENT = "laptop-sft-s0"  # OPD's start in the book's small world
N_DRAWS = 20
ONE_LAYER, THREE_LAYERS = "pretrained, one layer", "pretrained, three layers"
ALL_LAYERS = "pretrained, all layers"
ON, OFF = "on the grid", "off the grid"
TABLES = (
    "expected",
    "agreement",
    "gaps",
    "decay",
    "placed",
    "shapes",
    "shared",
    "drawn",
    "means",
    "pairs",
    "provenance",
)
# Released runs of one base whose sparsities arXiv:2511.08567 prints.
UNLIKE = ("DeepScaleR", "DeepCoder", "Archer-Code", "ProRL", "ProRL-v2")
EQUAL, UNEQUAL = "equal", "unequal"


def paper_densities() -> dict[str, float]:
    """Figure 3's densities, as shares."""
    return {arm: _figure_3("density", arm) for arm in pr.ARMS}


def paper_overlaps() -> dict[tuple[str, str], float]:
    """Figure 3's overlaps: (arm, metric) to share."""
    pairs = itertools.product(pr.ARMS, pr.MASKS)
    return {(arm, metric): _figure_3(metric, arm) for arm, metric in pairs}


def _figure_3(metric: str, arm: str) -> float:
    table = printed("figures").set_index(["item", "metric", "arm"])["value"]
    return float(table["Figure 3", metric, arm]) / 100


def paper_orders() -> dict[tuple[str, str], tuple[str, float]]:
    """Figure 2's orders of magnitude: (arm, metric) to relation and value."""
    table = printed("figures")
    rows = table[table["item"] == "Figure 2"]
    names = {"nss": "nss", "principal_angle": "angle_max_deg"}
    return {
        (row.arm, names[row.metric]): (row.relation, float(row.value))
        for row in rows.itertuples()
    }


def jaccards() -> pd.DataFrame:
    """Agreement of masks as arXiv:2511.08567 prints it.

    Returns:
        Indexed by role: printed, independence.
    """
    table = printed("related")
    rows = table[table["metric"].str.startswith("jaccard_")]
    wide = rows.assign(role=rows["metric"].str.removeprefix("jaccard_")).pivot(
        index="role", columns="arm", values="value"
    )
    wide = wide.rename(
        columns={"five RLVR runs": "printed", "independent masks": "independence"}
    )
    return wide.loc[list(og.ROLES), ["printed", "independence"]].astype(float)


def unlike_densities() -> list[float]:
    """Densities of five released RLVR runs."""
    table = printed("related").set_index("arm")
    rows = table[(table["metric"] == "sparsity")].loc[list(UNLIKE), "value"]
    return [1 - float(x) / 100 for x in rows]


def role_densities() -> dict[str, dict[str, float]]:
    """How densities of the roles differ in this book's runs, at the printed means.

    Returns:
        arm to role to density.
    """
    table, _ = measure.load("published", pr.ARMS, range(5), "committed")
    levels, found = levels_of(table), {}
    for arm, density in paper_densities().items():
        own = {role: _mean_density(levels, arm, (role,)) for role in og.ROLES}
        found[arm] = pr.shifted(own, density)
    return found


def _mean_density(levels: Levels, arm: str, roles: tuple[str, ...]) -> float:
    """At the end of an arm's runs, over matrices, then seeds."""
    return float(last(over_matrices(levels, arm, "density", roles)).mean())


# --- what is computed ----------------------------------------------------------------


class Set(NamedTuple):
    """Matrices under a name, on the bf16 grid or off it."""

    w0: str
    grid: str
    origins: Sequence[Origin]


def both_grids(name: str, origins: Sequence[Origin], seed: int = 0) -> list[Set]:
    """A set as it is stored, and with its entries spread over their rounding cells."""
    rng = np.random.default_rng((seed, 11))
    return [
        Set(name, ON, origins),
        Set(name, OFF, [og.off_grid(origin, rng) for origin in origins]),
    ]


def expected_table(
    sets: Iterable[Set],
    averages: Sequence[str] = (pr.PLAIN,),
    divisors: Sequence[int] = og.SIDE_RANKS,
    by_role: Mapping[str, Mapping[str, float]] | None = None,
) -> pd.DataFrame:
    """Both overlaps at the printed densities for every choice, in closed form.

    Args:
        sets: of matrices.
        averages: how matrices are averaged.
        divisors: n / r of the principal mask; beyond the first for plain means.
        by_role: of ``role_densities``, where an average asks for it.

    Returns:
        w0, grid, law, average, divisor, arm, metric, value.
    """
    rows = []
    for group, law, average in itertools.product(sets, og.LAWS, averages):
        for divisor in divisors if average == pr.PLAIN else divisors[:1]:
            keys = {
                "w0": group.w0,
                "grid": group.grid,
                "law": law,
                "average": average,
                "divisor": divisor,
            }
            found = pr.expected_rows(
                group.origins, paper_densities(), law, average, by_role, divisor
            )
            rows += [keys | row for row in found]
    return pd.DataFrame(rows)


def drawn_table(origins: Sequence[Origin], draws: int) -> pd.DataFrame:
    """Every printed diagnostic of Gaussian updates at the printed densities.

    Args:
        origins: the matrices.
        draws: how many.

    Returns:
        arm, metric, ``mean``, ``low``, ``high`` (over draws, of means over matrices),
        draws, ``matrix_low``, ``matrix_high`` (over draws and matrices; NaN for
        overlaps).
    """
    densities, found = paper_densities(), []
    for seed in range(draws):
        draw = pr.without_place(origins, "Gaussian", seed)
        rows = pr.mask_rows(draw, densities) + pr.spectral_rows(draw, densities)
        found += [{"seed": seed, "matrix": "", **row} for row in rows]
    table = pd.DataFrame(found)
    keys = ["arm", "metric"]
    means = table.groupby([*keys, "seed"], sort=False)["value"].mean().reset_index()
    summary = pr.summarised(means, keys).set_index(keys)
    single = table[table["matrix"] != ""].groupby(keys)["value"]
    ends = single.agg(matrix_low="min", matrix_high="max")
    return summary.join(ends).reset_index()


def agreement_table(sets: Iterable[Set], laws: Iterable[str] = og.LAWS) -> pd.DataFrame:
    """Jaccard indices of independent updates, at the density that independence implies.

    Args:
        sets: of matrices; synthetic ones have no role of their own, and all are used.
        laws: of the update.

    Returns:
        w0, grid, law, densities (``equal`` or ``unequal``), role, value.
    """
    rows, unlike = [], unlike_densities()
    independence = jaccards()["independence"]
    for group, law in itertools.product(sets, laws):
        for role, value in independence.items():
            own = [origin for origin in group.origins if origin.role == role]
            origins = own or group.origins
            every = {
                EQUAL: [pr.density_of_jaccard(value)] * 2,
                UNEQUAL: pr.apart(unlike, value),
            }
            for name, densities in every.items():
                keys = {"w0": group.w0, "grid": group.grid, "law": law}
                found = pr.agreement(origins, law, densities)
                rows.append({**keys, "densities": name, "role": role, "value": found})
    return pd.DataFrame(rows)


def excess_share(table: pd.DataFrame) -> pd.Series:
    """Which share of the printed agreement beyond independence is there without place.

    sum_role (unplaced - independence) / sum_role (printed - independence)

    Args:
        table: of ``agreement_table``.

    Returns:
        Indexed by w0, grid, law, densities.
    """
    paper = jaccards()
    gain = table["value"] - table["role"].map(paper["independence"])
    keys = ["w0", "grid", "law", "densities"]
    whole = float((paper["printed"] - paper["independence"]).sum())
    return gain.groupby([table[key] for key in keys], sort=False).sum() / whole


# --- weight decay --------------------------------------------------------------------


def decay_table(origins: Sequence[Origin], draws: int = 1) -> pd.DataFrame:
    """The spectral shift of weight decay, of an unplaced update, and of both.

    Args:
        origins: the matrices.
        draws: of the update.

    Returns:
        arm, decay (share of the weights removed), update (whether there is one),
        readout (``float32`` or ``bf16``), nss, distance (norm of the change over that
        of the weights), density; means over matrices and draws.
    """
    rows: list[dict[str, object]] = []
    for arm, density in paper_densities().items():
        for seed in range(draws):
            draw = pr.without_place(origins, "Gaussian", seed)
            scales = [own[0] for own in draw.scales([density])]
            steps = zip(origins, draw.directions, scales, strict=True)
            for origin, direction, scale in steps:
                w = origin.w.double()
                for decay, step in (
                    (0.0, scale),
                    (decayed(arm), 0.0),
                    (decayed(arm), scale),
                ):
                    keys = {"arm": arm, "decay": decay, "update": step > 0}
                    exact = (1 - decay) * w + step * direction
                    rows += [keys | row for row in _both_readouts(origin, exact)]
    by = ["arm", "decay", "update", "readout"]
    return pd.DataFrame(rows).groupby(by, sort=False).mean().reset_index()


def _both_readouts(origin: Origin, exact: Tensor) -> Iterator[dict[str, object]]:
    w, stored = origin.w.double(), bits.to_bfloat16(exact)
    for name, after in (("float32", exact), ("bf16", stored.double())):
        spectrum = gram.decompose(after, 1).spectrum
        yield {
            "readout": name,
            "nss": spectra.normalised_spectral_shift(origin.top.spectrum, spectrum),
            "distance": float((after - w).norm() / w.norm()),
            "density": float((stored != origin.w.bfloat16()).double().mean()),
        }


# --- one gap -------------------------------------------------------------------------


def gaps_table(
    origins: Sequence[Origin], arm: str = "opd", reach: int = 4
) -> pd.DataFrame:
    """The largest angle of one update at neighbouring dimensions of the subspace.

    Args:
        origins: the matrices.
        arm: whose printed density.
        reach: dimensions to either side of n / 8.

    Returns:
        matrix, k, offset (k minus n / 8), gap ((s_k - s_{k+1}) / s_1), angle_max_deg
        (the larger side's).
    """
    draw = pr.without_place(origins, "Gaussian", 0)
    rows = []
    for place, origin in enumerate(origins):
        (scale,) = og.scales_at(draw.critical[place], [paper_densities()[arm]])
        middle = default_rank(origin.w.shape, 8)
        old = gram.decompose(origin.w, middle + reach)
        new = gram.decompose(draw.after(place, scale), middle + reach)
        for offset in range(max(-reach, 1 - middle), reach + 1):
            k = middle + offset
            angles = [
                spectra.angles_between_deg(
                    getattr(old, side)[:, :k], getattr(new, side)[:, :k]
                ).max()
                for side in ("left", "right")
            ]
            s = old.spectrum
            gap = float((s[k - 1] - s[k]) / s[0])
            rows.append((origin.name, k, offset, gap, float(max(angles))))
    columns = ["matrix", "k", "offset", "gap", "angle_max_deg"]
    return pd.DataFrame(rows, columns=columns)


# --- the update's shape, and gains that updates share --------------------------------

SHAPES = (*pr.SPECTRAL, "stable_rank", "hill_alpha")
SHARED_SDS = (0.0, 0.3, 0.5, 0.7, 1.0)


def shapes_table(origins: Sequence[Origin], seed: int = 0) -> pd.DataFrame:
    """What the spectrum of an update without place is, by the law of its entries.

    Args:
        origins: the matrices.
        seed: of the entries.

    Returns:
        law, arm, readout (``float32``; ``bf16``: of the stored difference), metric of
        ``SHAPES``, value (mean over matrices); angles and NSS of stored weights only.
    """
    rows: list[dict[str, object]] = []
    densities = paper_densities()
    for law in og.LAWS:
        draw = pr.without_place(origins, law, seed)
        turned = pd.DataFrame(pr.spectral_rows(draw, densities))
        turned = turned[turned["metric"].isin(pr.SPECTRAL)].assign(readout="bf16")
        scales = draw.scales(list(densities.values()))
        found = turned.drop(columns="matrix").to_dict("records")
        for place, origin in enumerate(origins):
            exact = _rank_and_tail(draw.directions[place].double())
            found += [
                {"arm": a, "readout": "float32", **r} for a in densities for r in exact
            ]
            for arm, scale in zip(densities, scales[place], strict=True):
                stored = draw.after(place, scale).double() - origin.w.double()
                found += [
                    {"arm": arm, "readout": "bf16", **r} for r in _rank_and_tail(stored)
                ]
        rows += [{"law": law, **row} for row in found]
    keys = ["law", "arm", "readout", "metric"]
    return pd.DataFrame(rows).groupby(keys, sort=False)["value"].mean().reset_index()


def _rank_and_tail(delta: Tensor) -> list[dict[str, object]]:
    """Stable rank and Hill exponent of an update."""
    spectrum = gram.decompose(delta, 1).spectrum
    rank = float(spectrum.square().sum() / spectrum[0] ** 2)
    tail = spectra.hill_exponent(spectrum, default_rank(delta.shape, ANGLE_DIVISOR))
    return [
        {"metric": "stable_rank", "value": rank},
        {"metric": "hill_alpha", "value": tail},
    ]


def shared_table(origins: Sequence[Origin], seed: int = 0) -> pd.DataFrame:
    """Agreement of two updates whose rows, or columns, share their gains.

    Each role at the density that its printed independence value implies.

    Args:
        origins: the matrices.
        seed: of gains and updates.

    Returns:
        side, log_sd (standard deviation of the logarithm of the gains), role, value.
    """
    rows = []
    for role, value in jaccards()["independence"].items():
        own = [origin for origin in origins if origin.role == role]
        density = pr.density_of_jaccard(value)
        for side, log_sd in itertools.product(("rows", "columns"), SHARED_SDS):
            found = pr.shared_gain(own, density, log_sd, seed, side)
            rows.append({"side": side, "log_sd": log_sd, "role": role, "value": found})
    return pd.DataFrame(rows)


# --- this book's own diagnostics -----------------------------------------------------


def own_density(arm: str = "opd") -> float:
    """Mean density of the layers' matrices at the end of this book's runs of an arm."""
    table, _ = measure.load("published", [arm], range(5), "committed")
    return _mean_density(levels_of(table), arm, og.ROLES)


def own_limits_table(draws: int = N_DRAWS, each: int = 1) -> pd.DataFrame:
    """The smallest place that each of this book's diagnostics would show.

    At the book's student and OPD's density.

    Args:
        draws: of an update without place.
        each: draws with each place.

    Returns:
        As ``power.limits``, with the column ``density``.
    """
    student = on_shelf(f"checkpoints/{STUDENT}")
    origins, density = og.stored(student, alpha=MASK_ALPHA), own_density()
    table = pd.concat(
        [
            pw.own_rows(origins, density, range(draws), [("none", 0.0)]),
            pw.own_rows(origins, density, range(each), pw.grid()),
        ]
    )
    return pw.limits(table, pw.draws_bands(table)).assign(density=density)


# --- made, kept, read ----------------------------------------------------------------


def make(model: str, folder: Path | None = None, told: str = "") -> Path:
    """Measure a model, and keep the tables with their provenance.

    Args:
        model: a directory, a .safetensors file or a hub id.
        folder: where to; below ``data/unplaced`` under the model's name by default.
        told: what the provenance says of the file's origin.

    Returns:
        The folder; its provenance is written last.

    Raises:
        ValueError: as ``origins.stored``, or nothing can be written.
    """
    three = og.three_layers(model)
    name = Path(model.partition("@")[0]).name
    folder = folder or data_directory() / "unplaced" / name
    by_role = role_densities()
    on, off = both_grids(THREE_LAYERS, three)
    every = Set(ALL_LAYERS, ON, og.stored(model))
    layers = sorted({origin.layer for origin in three})
    one = [o for o in three if o.layer == layers[len(layers) // 2]]
    sources = {THREE_LAYERS: three, ALL_LAYERS: every.origins}

    def expected() -> pd.DataFrame:
        few = og.SIDE_RANKS[:1]
        return pd.concat(
            [
                expected_table([on], pr.AVERAGES, by_role=by_role),
                expected_table([off], divisors=few),
                expected_table([every], (pr.PLAIN, pr.POOLED), few),
            ]
        )

    def agreements() -> pd.DataFrame:
        return pd.concat(
            [agreement_table([on]), agreement_table([off, every], ["Gaussian"])]
        )

    made: dict[str, Callable[[], pd.DataFrame]] = {
        "expected": expected,
        "agreement": agreements,
        "gaps": lambda: gaps_table(one),
        "decay": lambda: decay_table(one),
        "placed": lambda: placed_table(one),
        "shapes": lambda: shapes_table(one),
        "shared": lambda: shared_table(three),
        "drawn": lambda: pd.concat(
            [
                drawn_table(one, N_DRAWS).assign(w0=ONE_LAYER),
                drawn_table(three, 1).assign(w0=THREE_LAYERS),
            ]
        ),
        "means": lambda: od.two_means(every.origins, paper_densities()),
        "pairs": lambda: pairs_table(folder),
        "provenance": lambda: provenance(model, sources, told),
    }
    with clear_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for key, table in made.items():
            with sealing(folder / f"{key}.csv") as draft:
                table().to_csv(draft, index=False, float_format="%.6g")
    return folder


PAIR_WEIGHTS = ("Gaussian", "Weibull, 0.8", "Weibull, 1.5", "Student t, 5")


def pairs_table(folder: Path) -> pd.DataFrame:
    """Every pair of numbers that another work prints, and whether one distance does.

    Args:
        folder: with ``decay.csv``, for the spectra, and ``agreement.csv``; all else is
            of synthetic weights.
    """
    decay = committed_csv(folder / "decay.csv")
    masks = committed_csv(folder / "agreement.csv")
    moved = decay[decay["update"]]
    shares = (moved["nss"] / moved["distance"]).groupby(moved["arm"])
    ends = {arm: (float(v.min()), float(v.max())) for arm, v in shares}
    sets = [og.synthetic(kind, 0, {"q": (512, 512)}) for kind in PAIR_WEIGHTS]
    agree = masks.groupby(["w0", "grid", "law", "densities"])["value"].mean()
    printed_agreement = jaccards().mean()
    both = od.Pair(
        "2511.08567",
        f"five RLVR runs: agreement of {printed_agreement['independence']:.3f} if "
        "independent",
        "agreement of their masks",
        float(printed_agreement["printed"]),
        float(agree.min()),
        float(agree.max()),
    )
    return od.pairs_table([both, *od.related_pairs(sets, ends)])


def placed_table(
    origins: Sequence[Origin], draws: int = N_DRAWS, each: int = 1
) -> pd.DataFrame:
    """Updates without place and with every place, at the printed densities.

    Args:
        origins: the matrices.
        draws: without place.
        each: draws with each place.

    Returns:
        As ``power.placed_rows``; spectra at OPD's density.
    """
    cells, densities = pw.grid(), paper_densities()
    none = [("none", 0.0)]
    return pd.concat(
        [
            pw.placed_rows(origins, densities, ["opd"], range(draws), none),
            pw.placed_rows(origins, densities, ["opd"], range(each), cells),
        ]
    )


def provenance(
    model: str, sets: Mapping[str, Sequence[Origin]], told: str = ""
) -> pd.DataFrame:
    """Where numbers come from, a row a set of matrices.

    Args:
        model: as in ``make``.
        sets: name to matrices.
        told: of the file's origin.

    Returns:
        w0, model, sha256, told, matrices, entries, zero_frac, distinct, layers, date,
        versions.
    """
    origin = {
        "model": Path(model.partition("@")[0]).name,
        "sha256": og.sha256(model),
        "told": told,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", "scipy")},
    }
    return pd.DataFrame(
        {
            "w0": name,
            **origin,
            **og.peculiar(origins),
            "layers": " ".join(str(n) for n in sorted({o.layer for o in origins})),
        }
        for name, origins in sets.items()
    )


def load(model: str = COMMITTED) -> dict[str, pd.DataFrame]:
    """The tables of a model: kept ones, or measured now.

    Args:
        model: a folder's name below ``data/unplaced``; else a checkpoint, of which the
            tables are made and kept unless those of the same bytes are there.

    Returns:
        A table for each of ``TABLES``.

    Raises:
        ValueError: as ``origins.stored``.
    """
    folder = on_shelf(f"unplaced/{model}")
    if "/" in model or not folder.is_dir():
        folder = _kept(model)
    return {name: committed_csv(folder / f"{name}.csv") for name in TABLES}


def _kept(model: str) -> Path:
    """The folder of a checkpoint's tables, made if it is not there or not whole."""
    digest = og.sha256(model)
    name = Path(model.partition("@")[0]).name
    for folder in (on_shelf(f"unplaced/{n}") for n in (name, f"{name}-{digest[:8]}")):
        files = [folder / f"{table}.csv" for table in TABLES]
        there = files[-1].is_file()  # it is written last
        if there and not committed_csv(files[-1])["sha256"].eq(digest).all():
            continue
        if there and all(file.is_file() for file in files):
            return folder
        break
    return make(model, data_directory() / "unplaced" / folder.name)


# --- printed against unplaced --------------------------------------------------------

BAND_DIVISOR = og.SIDE_RANKS[0]  # that of the paper's appendix C.3


def bands(expected: pd.DataFrame) -> dict[tuple[str, str], tuple[float, float]]:
    """What an update without place gives, over all that is not printed.

    Args:
        expected: of ``expected_table``.

    Returns:
        (arm, metric) to the smallest and largest value, at the paper's rank.
    """
    rows = expected[expected["divisor"] == BAND_DIVISOR]
    groups = rows.groupby(["arm", "metric"])["value"]
    return {key: (float(v.min()), float(v.max())) for key, v in groups}


def against(
    tables: Mapping[str, pd.DataFrame], expected: pd.DataFrame, agreement: pd.DataFrame
) -> pd.DataFrame:
    """Every printed number of place, and the bands of an update without any.

    Args:
        tables: of ``load``.
        expected, agreement: the same for weights that are no pretrained ones.

    Returns:
        panel, label, arm (empty for the other paper), printed, low, high (pretrained),
        wide_low, wide_high (all), neutral (if all entries changed alike).
    """
    inner = bands(tables["expected"])
    outer = bands(pd.concat([tables["expected"], expected]))
    paper, rows = paper_overlaps(), []
    for metric, arm in itertools.product(pr.MASKS, pr.ARMS):
        bounds = (*inner[arm, metric], *outer[arm, metric])
        label = (metric, arm.upper(), arm)
        rows.append((*label, paper[arm, metric], *bounds, og.ALPHA))
    every = pd.concat([tables["agreement"], agreement])
    found = [x.groupby("role")["value"] for x in (tables["agreement"], every)]
    for role, own in jaccards().iterrows():
        ends = tuple(float(e()[role]) for x in found for e in (x.min, x.max))
        label = ("jaccard", f"{role} projections", "")
        rows.append((*label, own["printed"], *ends, own["independence"]))
    columns = ["panel", "label", "arm", "printed", "low", "high"]
    return pd.DataFrame(rows, columns=[*columns, "wide_low", "wide_high", "neutral"])


REFERENCE = {"grid": ON, "law": "Gaussian", "average": pr.PLAIN}  # of three layers
CHOICES = [(arm, metric) for metric in pr.MASKS for arm in ("opd", "rlvr")]


def base_case(expected: pd.DataFrame) -> dict[tuple[str, str], float]:
    """The reference case: (arm, metric) to overlap.

    Args:
        expected: of a model's tables.
    """
    rows = expected[(expected["w0"] == THREE_LAYERS)]
    for column, value in (*REFERENCE.items(), ("divisor", BAND_DIVISOR)):
        rows = rows[rows[column] == value]
    return rows.set_index(["arm", "metric"])["value"].to_dict()


def choices_table(expected: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """Each choice that is not printed, changed by itself.

    Args:
        expected: of a model's tables.
        others: of further weights.

    Returns:
        Indexed by the choice, first ``printed`` and ``reference``; a column an overlap
        of OPD and RLVR.
    """
    every = pd.concat([expected, others])
    usual = {**REFERENCE, "divisor": BAND_DIVISOR, "w0": THREE_LAYERS}
    paper, base = paper_overlaps(), base_case(expected)
    found = {
        "printed": [paper[key] for key in CHOICES],
        "reference": [base[key] for key in CHOICES],
    }
    for column in ("law", "average", "grid", "divisor", "w0"):
        rows = every
        for name, value in usual.items():
            if name != column:
                rows = rows[rows[name] == value]
        for value, group in rows.groupby(column, sort=False):
            if value == usual[column]:
                continue
            name = f"rank n/{value}" if column == "divisor" else str(value)
            label = {"law": "update: ", "w0": "weights: "}.get(column, "") + name
            values = group.set_index(["arm", "metric"])["value"]
            found[label] = [float(values[key]) for key in CHOICES]
    columns = [
        f"{'low' if metric == pr.MASKS[0] else 'principal'}, {arm.upper()}"
        for arm, metric in CHOICES
    ]
    return pd.DataFrame.from_dict(found, orient="index", columns=columns)


HALF_DECADE = 10**0.5


def orders_table(shapes: pd.DataFrame) -> pd.DataFrame:
    """Printed orders of magnitude beside the band of an update without place.

    Args:
        shapes: of ``shapes_table``.

    Returns:
        arm, metric, relation, printed, low, high (over the laws, as stored), met:
        whether the band, widened by half a decade either way, has such a value.
    """
    groups = shapes[shapes["readout"] == "bf16"].groupby(["arm", "metric"])["value"]
    rows = []
    for key, (relation, value) in paper_orders().items():
        low, high = (float(end) for end in groups.get_group(key).agg(["min", "max"]))
        above, below = high * HALF_DECADE > value, low / HALF_DECADE < value
        met = {">": above, "<": below}.get(relation, above and below)
        rows.append((*key, relation, value, low, high, met))
    columns = ["arm", "metric", "relation", "printed", "low", "high", "met"]
    return pd.DataFrame(rows, columns=columns)


def limit_bands(
    choices: Mapping[tuple[str, str], tuple[float, float]],
    placed: pd.DataFrame,
    arm: str = "opd",
) -> dict[tuple[str, str], tuple[float, float]]:
    """What a diagnostic must leave before a reader of print would see a place.

    Args:
        choices: of ``bands``: for overlaps.
        placed: of ``placed_table``; NSS and angles have half a decade about their mean
            without place, being printed as orders.
        arm: whose.

    Returns:
        (arm, metric) to the band.
    """
    none = placed[(placed["family"] == "none") & (placed["arm"] == arm)]
    means = none.groupby("metric")["value"].mean()
    found = {key: ends for key, ends in choices.items() if key[0] == arm}
    for metric in pr.SPECTRAL:
        half = float(means[metric]) * (HALF_DECADE - 1)
        found[arm, metric] = float(means[metric]) - half, float(means[metric]) + half
    return found


def refutations() -> pd.DataFrame:
    """Objections that were tried, and what each changed.

    Returns:
        The rows of ``data/unplaced/refutations.csv``: attempt, objection, outcome,
        changed.
    """
    return committed_csv(on_shelf("unplaced/refutations.csv"))

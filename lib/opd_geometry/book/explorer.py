"""Data of the explorer: every arm's diagnostics in a few numbers, and what noise gives.

A page draws from it, offline, what a reader asks for; a calculator beside it says what
an update without any place of its own gives for a density, or a rate and steps.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from opd_geometry.book.figures import (
    ARM_STYLES,
    ATTENTION_ROLES,
    LAYER_ROLES,
    METRIC_LABELS,
    WEIGHTED_METRICS,
    with_null,
)
from opd_geometry.experiments import measure
from opd_geometry.experiments.profiles import PUBLISHED
from opd_geometry.files import on_shelf
from opd_geometry.geometry import unplaced
from opd_geometry.geometry.checkpoints import list_matrices, read_matrix

# As the paper averages them in its trajectories; all others over every matrix.
OF_ATTENTION = ("stable_rank", "stable_rank_bf16", "hill_alpha", "similarity_to_end")
MODEL = ("accuracy/chain",)
METRICS = tuple(METRIC_LABELS)
WORLDS = {PUBLISHED: "small", "pretrained": "language model"}
DIGITS = 3
LAWS = ("gaussian", "laplace", "t3", "sign")  # the band of the calculator
SCALES = np.geomspace(1e-7, 1e-1, 73)
ANCHOR = "laptop-sft-s0"


def aggregate(tables: Iterable[pd.DataFrame]) -> dict[str, Any]:
    """Means over matrices and seeds, by arm, metric and checkpoint.

    Args:
        tables: tidy, a run each, of one world.

    Returns:
        Arm to ``step`` (checkpoints that every seed has), ``seeds``, ``metrics`` and
        ``layers``: metric to ``[mean, lowest, highest]`` a checkpoint, or a layer at
        the end; a null stands under ``null_`` and the name of its metric.
    """
    runs: dict[str, list[tuple[pd.Series, pd.Series]]] = {}
    seeds: dict[str, list[int]] = {}
    for table in tables:
        arm = str(table["arm"].iloc[0])
        runs.setdefault(arm, []).append(_of_run(table))
        seeds.setdefault(arm, []).append(int(table["seed"].iloc[0]))
    found = {}
    for arm, parts in runs.items():
        courses = _over_seeds([course for course, _ in parts])
        steps = sorted({step for _, step in courses.index})
        found[arm] = {
            "seeds": sorted(seeds[arm]),
            "step": steps,
            "metrics": _rows(courses, steps),
            "layers": _rows(_over_seeds([layers for _, layers in parts])),
        }
    return found


def _of_run(table: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """One run's means over matrices: by (metric, step), and at the end by layer."""
    rows = table[table["metric"].isin(with_null(METRICS))].dropna(subset="value")
    metric = rows["metric"].astype(str)
    bare = metric.str.removeprefix("null_")
    attention = bare.isin(OF_ATTENTION) & rows["role"].isin(ATTENTION_ROLES)
    layers = ~bare.isin((*OF_ATTENTION, *MODEL)) & rows["role"].isin(LAYER_ROLES)
    rows = rows[attention | layers | bare.isin(MODEL)].assign(metric=metric)
    rows = rows[_is_complete(rows)]
    sizes = table[table["metric"] == "parameters"].groupby("matrix")["value"].first()
    rows["weight"] = (
        rows["matrix"].map(sizes).where(rows["metric"].isin(WEIGHTED_METRICS), 1.0)
    )
    rows["value"] *= rows["weight"]
    sums = rows.groupby(["metric", "step"])[["value", "weight"]].sum()
    last = rows[(rows["step"] == rows["step"].max()) & (rows["layer"] >= 0)]
    deep = last.groupby(["metric", "layer"])[["value", "weight"]].sum()
    return sums["value"] / sums["weight"], deep["value"] / deep["weight"]


def _is_complete(rows: pd.DataFrame) -> np.ndarray:
    """Whether a row's metric has, at its step, every matrix that it is drawn over.

    Those are the matrices of the metric, or of a null's, at the end. A large model
    stores some matrices at some checkpoints, and a mean over others is not drawn.
    """
    matrices = rows.groupby(["metric", "step"])["matrix"].nunique()
    here = matrices.reindex(pd.MultiIndex.from_frame(rows[["metric", "step"]]))
    bare = rows["metric"].str.removeprefix("null_")
    end = pd.Series(rows["step"].max(), rows.index)
    there = matrices.reindex(pd.MultiIndex.from_arrays([bare, end]))
    return here.to_numpy() == there.to_numpy()


def _over_seeds(parts: list[pd.Series]) -> pd.DataFrame:
    """Mean, lowest and highest of what every seed has."""
    every = pd.concat(parts, axis=1, join="inner")
    return every.agg(["mean", "min", "max"], axis=1)


def _rows(values: pd.DataFrame, places: list[int] | None = None) -> dict[str, Any]:
    """Metric to a list of triples, null where a checkpoint has none."""
    told: dict[str, Any] = {}
    for metric in dict.fromkeys(name for name, _ in values.index):
        of_metric = values.loc[metric]
        at = of_metric.index if places is None else places
        told[metric] = [
            [float(f"{x:.{DIGITS}g}") for x in of_metric.loc[place]]
            if place in of_metric.index
            else None
            for place in at
        ]
    return told


def without_place(checkpoint: Path) -> dict[str, Any]:
    """What unplaced updates change of a checkpoint, by the size of their entries.

    Args:
        checkpoint: its layers' matrices are pooled.

    Returns:
        ``scale`` (standard deviation of an entry) and, a list as long for each law of
        ``LAWS``: ``density``, ``low_magnitude_overlap``, ``jaccard`` of two updates.
    """
    found = unplaced.pooled(
        unplaced.magnitudes(read_matrix(checkpoint, matrix.name))
        for matrix in list_matrices(checkpoint)
        if matrix.layer >= 0
    )
    quantities: dict[str, Callable[..., float]] = {
        "density": unplaced.expected_density,
        "low_magnitude_overlap": unplaced.expected_low_magnitude_overlap,
        "jaccard": unplaced.expected_jaccard,
    }
    told: dict[str, Any] = {"scale": [float(f"{x:.4g}") for x in SCALES]}
    for name, of in quantities.items():
        told[name] = {
            law: [round(of(found, float(s), law=law), 4) for s in SCALES]
            for law in LAWS
        }
    return told


def write_data(path: Path) -> Path:
    """Write the explorer's data as a script, so that a page opened from disk has it.

    Args:
        path: such as ``_static/explorer-data.js``.
    """
    worlds = {
        world: aggregate(map(measure.committed_table, runs))
        for profile, world in WORLDS.items()
        if (runs := measure.committed_runs(profile))
    }
    drawn = {arm for world in worlds.values() for arm in world}
    data = {
        "worlds": worlds,
        "arms": {a: look for a, look in ARM_STYLES.items() if a in drawn},
        "metrics": METRIC_LABELS,
        "unplaced": without_place(on_shelf(f"checkpoints/{ANCHOR}")),
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    path.write_text(f"const EXPLORER = {text.replace('NaN', 'null')};\n", "utf8")
    return path

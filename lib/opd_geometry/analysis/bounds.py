"""The bounds of the three-gate account, held against what was measured.

Every matrix at the end of a run, and its Gaussian null, has a measured value and a
bound for each gate that can be asked: the largest principal angle against Wedin's, the
spectral shift against Mirsky's, the visible density against the share of entries that
move by half a unit in the last place. Gate I bounds the norm by a curvature that nobody
has measured, and is not here.

Two of these bounds are the norm in other words: Mirsky's is it, over the spectrum of
W_0, and the last is the density itself. Held against a null of the same norm they say
nothing, so arms are compared by Wedin's alone, each arm over its null.
"""

from collections.abc import Iterable
from itertools import combinations

import numpy as np
import pandas as pd

from opd_geometry.analysis.distance import order
from opd_geometry.analysis.evidence import LAYERS, SAME_FACTOR
from opd_geometry.analysis.verdicts import Part, Values, interval, state

ANGLE, SHIFT, DENSITY = "largest angle", "spectral shift", "visible density"
# Gate to its metrics, of which the largest is taken, and its bound.
GATES = {
    ANGLE: (("angle_left_max_deg", "angle_right_max_deg"), "bound_angle_deg"),
    SHIFT: (("nss",), "bound_nss"),
    DENSITY: (("density",), "bound_density"),
}
THEOREMS = (ANGLE, SHIFT)  # the third is a rule of thumb
NUMBERS = {ANGLE: "II", SHIFT: "II", DENSITY: "III"}
TOLD = ("the norm", "beyond the norm", "against the bound", "undecided")
NORM, BEYOND, AGAINST, OPEN = TOLD
SIDES = {"arm": "", "null": "null_"}
SILENT_DEG = 90.0  # an angle that every update respects
MAJORITY = 0.5
ROUNDING = 1e-6  # measurements are committed with seven digits
KEYS = ["arm", "seed", "matrix"]
WORDS = {"holds": "informs", "fails": "silent", "open": "undecided"}


def held_against(table: pd.DataFrame) -> pd.DataFrame:
    """Measured value and bound of every gate and matrix at the end of the runs.

    Args:
        table: tidy, with the metrics of ``choices.gates``.

    Returns:
        One row an arm, seed, matrix, side (``arm`` or ``null``) and gate: those, and
        measured, bound, used (measured over bound; of sines for the angle, NaN where
        its bound is silent), gap_share (spectral norm of the update over the gap of
        W_0) and norm (that spectral norm).

    Raises:
        ValueError: the table lacks a metric.
    """
    last = table.groupby(["arm", "seed"], observed=True)["step"].transform("max")
    rows = table[(table["step"] == last) & table["role"].isin(LAYERS)]
    wide = rows.pivot_table(index=KEYS, columns="metric", values="value", observed=True)
    parts = []
    for side, prefix in SIDES.items():
        for gate, (metrics, bound) in GATES.items():
            names = [prefix + name for name in (*metrics, bound)]
            absent = [name for name in names if name not in wide]
            if absent:
                raise ValueError(
                    f"no metric {', '.join(absent)}: expected a table of "
                    "chapters.load; measure the runs again"
                )
            part = pd.DataFrame({"measured": wide[names[:-1]].max(axis=1)})
            part["bound"] = wide[names[-1]]
            part["used"] = _used(gate, part["measured"], part["bound"])
            part["gap_share"] = wide[f"{prefix}gap_share"]
            stable = wide[f"{prefix}stable_rank"]
            part["norm"] = wide["frobenius_norm"] / np.sqrt(stable)
            parts.append(part.assign(side=side, gate=gate))
    return pd.concat(parts).dropna(subset=["measured", "bound"]).reset_index()


def _used(gate: str, measured: pd.Series, bound: pd.Series) -> pd.Series:
    """Which share of what the bound allows was measured."""
    if gate != ANGLE:
        return measured / bound
    sines = np.sin(np.radians(measured)) / np.sin(np.radians(bound))
    return sines.where(bound < SILENT_DEG)


def violations(held: pd.DataFrame) -> pd.DataFrame:
    """Matrices in which a theorem's bound does not hold: there must be none.

    Args:
        held: of ``held_against``.

    Returns:
        The rows that violate a bound by more than rounding.
    """
    beyond = held["measured"] > held["bound"] * (1 + ROUNDING)
    return held[beyond & held["gate"].isin(THEOREMS)]


def by_seed(held: pd.DataFrame, arm: str, side: str, gate: str, column: str) -> Values:
    """Mean of a column over an arm's matrices, one number a seed."""
    chosen = (held["arm"] == arm) & (held["side"] == side) & (held["gate"] == gate)
    return held[chosen].groupby("seed")[column].mean()


def informative(held: pd.DataFrame) -> pd.DataFrame:
    """For whom Wedin's bound says anything: the share of matrices below 90 degrees.

    It *informs* about an arm when the 95 % interval of that share lies above one half,
    is *silent* when it lies below, and *undecided* otherwise.

    Args:
        held: of ``held_against``.

    Returns:
        One row an arm: arm, share, low, high, null (the share of its null), outcome.
    """
    below = held.assign(below=(held["bound"] < SILENT_DEG).astype(float))
    rows = []
    for arm in dict.fromkeys(held["arm"]):
        values, null = (by_seed(below, arm, side, ANGLE, "below") for side in SIDES)
        outcome = WORDS[state(Part("", values, MAJORITY))]
        rows.append((arm, *interval(values), null.mean(), outcome))
    columns = ["arm", "share", "low", "high", "null", "outcome"]
    return pd.DataFrame(rows, columns=columns)


def over_null(held: pd.DataFrame, arm: str, quantity: str, gate: str = ANGLE) -> Values:
    """Logarithm of an arm's quantity over its Gaussian null's, one number a seed.

    Of means over matrices.

    Args:
        held: of ``held_against``.
        arm: whose.
        quantity: ``measured``, or ``gap_share``: the sine that Wedin allows a small
            update, and no cap where it allows every angle.
        gate: of ``measured``.
    """
    own, null = (by_seed(held, arm, side, gate, quantity) for side in SIDES)
    return np.log(own / null)


def factors(held: pd.DataFrame, arms: Iterable[str]) -> pd.DataFrame:
    """How far each arm lies beyond its null, and what Wedin's bound makes of it.

    Args:
        held: of ``held_against``.
        arms: the rows.

    Returns:
        One row an arm and quantity (``Wedin's bound`` and the measured ones): arm,
        quantity, factor, low, high (95 % interval over seeds, of logarithms).
    """
    asked = [("Wedin's bound", "gap_share", ANGLE)]
    asked += [(gate, "measured", gate) for gate in GATES]
    rows = []
    for arm in arms:
        for name, quantity, gate in asked:
            ends = np.exp(interval(over_null(held, arm, quantity, gate)))
            rows.append((arm, name, *map(float, ends)))
    return pd.DataFrame(rows, columns=["arm", "quantity", "factor", "low", "high"])


def told_apart(held: pd.DataFrame, arms: Iterable[str]) -> pd.DataFrame:
    """Whether Wedin's bound tells two arms apart where their norms do not.

    Each arm over its null, which has its norm and nothing else of it; orders are of
    ``matching.order``, paired by seed. The bound tells a pair apart *beyond the norm*
    when it orders them and the measured angles have the same order, and is *against*
    them when they have the other one. It tells *the norm* alone when the two bounds
    are the same within ``SAME_FACTOR``; otherwise *undecided*.

    Args:
        held: of ``held_against``.
        arms: all pairs of them.

    Returns:
        One row a pair: gate, arm, other, measured, bound (orders of other against arm,
        each over its null), tells.
    """
    rows = []
    there = [arm for arm in arms if arm in set(held["arm"])]
    for arm, other in combinations(there, 2):
        measured, bound = (
            over_null(held, other, quantity) - over_null(held, arm, quantity)
            for quantity in ("measured", "gap_share")
        )
        signs = order(measured), order(bound)
        width = float(np.log(SAME_FACTOR))
        _, low, high = interval(bound)
        tells = NORM if -width < low and high < width else OPEN
        if "?" not in signs:
            tells = BEYOND if signs[0] == signs[1] else AGAINST
        rows.append((ANGLE, arm, other, *signs, tells))
    columns = ["gate", "arm", "other", "measured", "bound", "tells"]
    return pd.DataFrame(rows, columns=columns)


def steering(held: pd.DataFrame) -> pd.DataFrame:
    """What says which matrix of a model turns most: its gap, or how far it was pushed.

    Spearman's rank correlation of the largest angle with 1 / gap and with the spectral
    norm of the update, over the matrices of a run; then the mean over seeds.

    Args:
        held: of ``held_against``.

    Returns:
        One row an arm, side and cause (``small gap``, ``large update``): arm, side,
        cause, mean, low, high (95 % interval over seeds).
    """
    angles = held[held["gate"] == ANGLE]
    causes = {
        "small gap": angles["gap_share"] / angles["norm"],
        "large update": angles["norm"],
    }
    rows = []
    for cause, values in causes.items():
        named = angles.assign(cause=values)
        for (arm, side), group in named.groupby(["arm", "side"], sort=False):
            by_run = group.groupby("seed")[["cause", "measured"]]
            ranks = by_run.corr("spearman").xs("cause", level=1)["measured"]
            rows.append((arm, side, cause, *interval(ranks)))
    columns = ["arm", "side", "cause", "mean", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def summary(held: pd.DataFrame, told: pd.DataFrame) -> pd.DataFrame:
    """What became of each gate.

    Args:
        held: of ``held_against``.
        told: of ``told_apart``.

    Returns:
        One row a gate and quantity: gate, bounds (the quantity), tests, breaches (NaN
        for a rule of thumb), used and used by noise (median shares of the bound), and
        the number of pairs by what they tell (NaN where the bound is the norm).
    """
    broken = violations(held)
    rows: list[dict[str, object]] = [{"gate": "I", "bounds": "norm of the update"}]
    for gate, number in NUMBERS.items():
        of_gate = held[held["gate"] == gate]
        used = of_gate.groupby("side")["used"].median()
        tells = told[told["gate"] == gate]["tells"]
        known, asked = gate in THEOREMS, gate in set(told["gate"])
        rows.append(
            {
                "gate": number,
                "bounds": gate,
                "tests": len(of_gate),
                "breaches": (broken["gate"] == gate).sum() if known else np.nan,
                "used": used.get("arm", np.nan),
                "used by noise": used.get("null", np.nan),
                **{
                    f"pairs: {word}": (tells == word).sum() if asked else np.nan
                    for word in TOLD
                },
            }
        )
    return pd.DataFrame(rows)

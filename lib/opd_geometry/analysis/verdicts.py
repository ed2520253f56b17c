"""Rules: from one number a seed to an interval, from parts and controls to a verdict.

A claim is a list of parts; a part says that the mean over seeds of one quantity lies in
a range, and is decided by the 95 % t interval of that mean: inside the range it holds,
outside it fails, across a bound it is open. Then, in this order:

1. an arm or a metric is missing                          ``not measured``
2. a part fails                                           ``not reproduced``
3. a part is open (always with fewer than two seeds)      ``inconclusive``
4. all hold, and a control shows the effect too           ``explained by a control``
5. all hold, and a control is undecided or missing        ``inconclusive``
6. all hold, and every control is ruled out               ``reproduced``

All parts must hold at once (an intersection-union test), so their number needs no
correction. Arms are paired by seed. Ratios are averaged as logarithms.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import pandas as pd
from scipy import stats

VERDICTS = (
    "reproduced",
    "not reproduced",
    "inconclusive",
    "explained by a control",
    "not measured",
)
CONFIDENCE = 0.95
CONTROL_SHARE = 0.5  # a control explains an effect of which it shows half or more

Values: TypeAlias = pd.Series  # one number a seed, indexed by seed


@dataclass(frozen=True)
class Part:
    """One thing a claim says: the mean of ``values`` lies between the two bounds."""

    label: str
    values: Values
    lower: float = 0.0
    upper: float = math.inf


@dataclass(frozen=True)
class Control:
    """What could explain a claim that holds.

    Attributes:
        kind: ``null`` or ``matched``.
        own: the claim's test, asked of the control instead of the arms.
        excess: what the arms show beyond the control, where that can be asked.
    """

    kind: str
    own: Part
    excess: Part | None = None


Evidence = tuple[list[Part], list[Control]]


def defined(values: Values) -> Values:
    """The seeds at which a quantity is a finite number."""
    return values[np.isfinite(values.astype(float))].astype(float)


def interval(values: Values) -> tuple[float, float, float]:
    """Mean over seeds and its two-sided 95 % t interval.

    mean -+ t_(n-1)(0.975) * s / sqrt(n)

    Args:
        values: one number a seed (a difference, when arms are paired); NaN and
            infinite ones are left out.

    Returns:
        Mean, lower and upper end; NaN where undefined (the ends below two seeds).

    >>> [round(x, 3) for x in interval(pd.Series([1.0, 2.0, 3.0]))]
    [2.0, -0.484, 4.484]
    """
    numbers = defined(values).to_numpy()
    count = len(numbers)
    if count < 2:
        return (float(numbers[0]) if count else math.nan), math.nan, math.nan
    mean = float(numbers.mean())
    error = float(numbers.std(ddof=1)) / math.sqrt(count)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return mean, mean - half, mean + half


def state(part: Part) -> str:
    """``holds``, ``fails`` or ``open``: the interval inside, outside, or neither."""
    _, low, high = interval(part.values)
    if part.lower < low and high < part.upper:
        return "holds"
    if high < part.lower or low > part.upper:
        return "fails"
    return "open"


def ruling(control: Control) -> str:
    """``ruled out``, ``shows it too``, ``undecided``, ``not available``."""
    own = state(control.own)
    excess = "open" if control.excess is None else state(control.excess)
    if defined(control.own.values).empty:
        return "not available"
    if excess == "holds" or own == "fails":
        return "ruled out"
    if own == "holds" or excess == "fails":
        return "shows it too"
    return "undecided"


def verdict_of(parts: list[Part], controls: list[Control]) -> str:
    """The verdict on what was measured (see the module's docstring)."""
    assert parts, "a claim without parts would hold for nothing"
    states = {state(part) for part in parts}
    if "fails" in states:
        return "not reproduced"
    if "open" in states:
        return "inconclusive"
    rulings = {ruling(control) for control in controls}
    if "shows it too" in rulings:
        return "explained by a control"
    return "reproduced" if rulings <= {"ruled out"} else "inconclusive"


def deciding(parts: list[Part]) -> Part:
    """The part to show: a failing one, else an open one, else the closest call."""

    def rank(part: Part) -> tuple[int, float]:
        mean = interval(part.values)[0]
        slack = min(mean - part.lower, part.upper - mean)
        order = ("fails", "open", "holds").index(state(part))
        return order, math.inf if math.isnan(slack) else slack

    return min(parts, key=rank)


def exceeding(kind: str, part: Part, label: str, shown: Values) -> Control:
    """Hold a positive effect against what a control shows of it.

    ruled out when CONTROL_SHARE * effect - shown > 0,
    an explanation when not, and shown > 0
    """
    beyond = CONTROL_SHARE * (part.values - part.lower) - shown
    return Control(kind, Part(label, shown), Part(label, beyond))


def ordering(
    level: Callable[[str], Values],
    null: Callable[[str], Values],
    rising: tuple[str, ...],
    word: str = "minus",
) -> Evidence:
    """Adjacent differences of arms in claimed order, against the null and sft-matched.

    Args:
        level: arm to one number a seed.
        null: the same of the arm's Gaussian twin.
        rising: arms, smallest level first.
        word: between two arms in a label (``over`` when levels are logarithms).
    """
    parts, controls = [], []
    for low, high in pairwise(rising):
        part = Part(f"{high} {word} {low}", level(high) - level(low))
        parts.append(part)
        controls.append(
            exceeding("null", part, f"null {part.label}", null(high) - null(low))
        )
        if {low, high} == {"sft", "opd"}:  # how far the budget alone goes
            low, high = (arm.replace("opd", "sft-matched") for arm in (low, high))
            label, shown = f"{high} {word} {low}", level(high) - level(low)
            controls.append(exceeding("matched", part, label, shown))
    return parts, controls


def equivalence(label: str, values: Values, margin: float) -> Part:
    """A difference within -+ margin (two one-sided tests, each at 2.5 %)."""
    return Part(label, values, -margin, margin)

"""Rules: from one number a seed to an interval, from parts and controls to a verdict.

A claim is a list of parts; a part says that the mean over seeds of one quantity lies in
a range, and is decided by the 95 % t interval of that mean: inside the range it holds,
outside it fails, across a bound it is open. Then, in this order:

1. an arm or a metric is missing                          ``not measured``
2. a part fails                                           ``not reproduced``
3. a part is open (always with fewer than two seeds)      ``inconclusive``
4. all hold, and a control shows the effect too           ``explained by a control``
5. all hold, and a control is undecided, missing, or of
   a kind of which none has power                         ``inconclusive``
6. all hold, and every other control is ruled out         ``reproduced``

That all parts hold at once (an intersection-union test) needs no correction for their
number. That one of several fails does: the failing parts are found by Holm's method at
5 % for the claim. A control is ``without power`` when what it would have to lose, or to
show, is not there; it says nothing either way. Arms are paired by seed. Ratios are
averaged as logarithms.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import pandas as pd
from scipy import special  # scipy.stats takes a second to import

VERDICTS = (
    "reproduced",
    "not reproduced",
    "inconclusive",
    "explained by a control",
    "not measured",
)
# What becomes of a control, the one that stands most in a claim's way first.
RULINGS = ("shows it too", "not available", "undecided", "ruled out", "without power")
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

    @cached_property
    def interval(self) -> tuple[float, float, float]:
        """Of the values; asked for by state, ruling and text."""
        return interval(self.values)


@dataclass(frozen=True)
class Control:
    """What could explain a claim that holds.

    Attributes:
        kind: ``null`` or ``matched``.
        own: the claim's test, asked of the control instead of the arms.
        excess: what the arms show beyond the control, where that can be asked.
        power: what must hold for the control to say anything, if that is in doubt.
    """

    kind: str
    own: Part
    excess: Part | None = None
    power: Part | None = None

    @cached_property
    def ruling(self) -> str:
        """What becomes of it: one of ``RULINGS``."""
        own = state(self.own)
        excess = "open" if self.excess is None else state(self.excess)
        if math.isnan(self.own.interval[0]):
            return "not available"
        if self.power is not None and state(self.power) != "holds":
            return "without power"
        if excess == "holds" or own == "fails":
            return "ruled out"
        if own == "holds" or excess == "fails":
            return "shows it too"
        return "undecided"


Evidence = tuple[list[Part], list[Control]]


def defined(values: Values) -> Values:
    """The seeds at which a quantity is a finite number."""
    values = values.astype(float)
    return values[np.isfinite(values.to_numpy())]


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
    numbers = values.to_numpy(dtype=float)
    numbers = numbers[np.isfinite(numbers)]
    count = len(numbers)
    if count < 2:
        return (float(numbers[0]) if count else math.nan), math.nan, math.nan
    mean = float(numbers.mean())
    error = float(numbers.std(ddof=1)) / math.sqrt(count)
    half = float(special.stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * error
    return mean, mean - half, mean + half


def state(part: Part) -> str:
    """``holds``, ``fails`` or ``open``: the interval inside, outside, or neither."""
    _, low, high = part.interval
    if part.lower < low and high < part.upper:
        return "holds"
    if high < part.lower or low > part.upper:
        return "fails"
    return "open"


def states(parts: Sequence[Part]) -> list[str]:
    """The state of every part of one claim; several fail only by Holm's method.

    p_(i) <= 0.05 / (m - i + 1) for the i smallest p-values of m parts

    Source: S. Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    failing = np.array([against(part) for part in parts])
    order = np.argsort(failing, kind="stable")
    bounds = (1 - CONFIDENCE) / np.arange(len(parts), 0, -1)
    passed = np.logical_and.accumulate(failing[order] < bounds)
    failed = set(order[passed])
    return [
        "fails" if i in failed else "holds" if state(part) == "holds" else "open"
        for i, part in enumerate(parts)
    ]


def against(part: Part) -> float:
    """Two-sided p-value of the nearer bound, if the mean lies outside of it; else 1.

    2 P(t_(n-1) > |mean - bound| sqrt(n) / s), the level at which ``state`` fails
    """
    numbers = part.values.to_numpy(dtype=float)
    numbers = numbers[np.isfinite(numbers)]
    count = len(numbers)
    if count < 2:
        return 1.0
    beyond = max(part.lower - numbers.mean(), numbers.mean() - part.upper)
    error = numbers.std(ddof=1) / math.sqrt(count)
    if beyond <= 0.0:
        return 1.0
    return float(2 * special.stdtr(count - 1, -beyond / error)) if error else 0.0


def verdict_of(parts: list[Part], controls: list[Control]) -> str:
    """The verdict on what was measured (see the module's docstring)."""
    assert parts, "a claim without parts would hold for nothing"
    found = set(states(parts))
    if "fails" in found:
        return "not reproduced"
    if "open" in found:
        return "inconclusive"
    rulings = {kind: _rulings(controls, kind) for kind in ("null", "matched")}
    if any("shows it too" in words for words in rulings.values()):
        return "explained by a control"
    # the powerless do not count beside one that has power
    left = (words - {"without power"} or words for words in rulings.values())
    return "reproduced" if set().union(*left) <= {"ruled out"} else "inconclusive"


def _rulings(controls: list[Control], kind: str) -> set[str]:
    return {control.ruling for control in controls if control.kind == kind}


def deciding(parts: list[Part]) -> Part:
    """The part to show: a failing one, else an open one, else the closest call."""

    def rank(known: tuple[Part, str]) -> tuple[int, float]:
        part, word = known
        mean = part.interval[0]
        slack = min(mean - part.lower, part.upper - mean)
        order = ("fails", "open", "holds").index(word)
        return order, math.inf if math.isnan(slack) else slack

    return min(zip(parts, states(parts), strict=True), key=rank)[0]


def exceeding(kind: str, part: Part, label: str, shown: Values) -> Control:
    """Hold a positive effect against what a control shows of it.

    ruled out when CONTROL_SHARE * effect - shown > 0,
    an explanation when not, and shown > 0
    """
    beyond = CONTROL_SHARE * (part.values - part.lower) - shown
    return Control(kind, Part(label, shown), Part(label, beyond))


def ordering(
    level: Callable[[str], Values],
    nulls: Mapping[str, Callable[[str], Values]],
    rising: tuple[str, ...],
    matched: tuple[str, ...],
    word: str = "minus",
) -> Evidence:
    """Adjacent differences of arms in claimed order, against nulls and matched arms.

    Args:
        level: arm to one number a seed.
        nulls: name of a null to the same of the arm's twin in that null.
        rising: arms, smallest level first.
        matched: arms that show how far OPD's budget alone goes, in OPD's place.
        word: between two arms in a label (``over`` when levels are logarithms).
    """
    parts, controls = [], []
    for low, high in pairwise(rising):
        part = Part(f"{high} {word} {low}", level(high) - level(low))
        parts.append(part)
        controls += [
            exceeding("null", part, f"{name} {part.label}", of(high) - of(low))
            for name, of in nulls.items()
        ]
        if {low, high} == {"sft", "opd"}:
            for arm in matched:
                below, above = (arm if end == "opd" else end for end in (low, high))
                label, shown = f"{above} {word} {below}", level(above) - level(below)
                controls.append(exceeding("matched", part, label, shown))
    return parts, controls


def equivalence(label: str, values: Values, margin: float) -> Part:
    """A difference within -+ margin (two one-sided tests, each at 2.5 %)."""
    return Part(label, values, -margin, margin)

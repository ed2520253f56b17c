"""Some matrices for all: a sample by role and depth, and means with their intervals.

The matrices of a role, in the order of their layers, are cut into blocks of neighbours,
and two of each block are drawn. So every role and every depth is there, and how far the
two of a block lie apart says how well the mean is known. Embedding and head have no
neighbours and can take longer than all layers: they are left out unless asked for.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from opd_geometry.geometry.defaults import STRATA
from opd_geometry.geometry.pairs import COLUMNS, METRICS, Plan

EACH = 2  # matrices drawn of a block: the fewest that show a spread
VOCABULARY = ("embed", "head")


@dataclass(frozen=True)
class Stratum:
    """A block of neighbours of one role: their places, and how many are drawn."""

    members: tuple[int, ...]
    drawn: int


def strata(roles: Sequence[str], layers: Sequence[int], n: int) -> list[Stratum]:
    """Blocks of a role's neighbours, as many as n matrices allow.

    Args:
        roles, layers: of every matrix.
        n: matrices to be drawn in all.

    Returns:
        Strata that hold every matrix once. A role of up to two is drawn whole; of any
        other, two a block are, and blocks go to the roles by their numbers.

    Raises:
        ValueError: n is too small for two of every role.
    """
    groups: dict[str, list[int]] = {}
    for place in sorted(range(len(roles)), key=lambda i: (layers[i], i)):
        groups.setdefault(roles[place], []).append(place)
    if n >= len(roles):
        return [Stratum(tuple(group), len(group)) for group in groups.values()]
    least = sum(min(EACH, len(group)) for group in groups.values())
    if n < least:
        raise ValueError(
            f"a sample of {n}, expected at least {least}: two of each role "
            f"({', '.join(groups)}); raise --sample or choose --roles"
        )
    large = {role: group for role, group in groups.items() if len(group) > EACH}
    left = n - sum(len(group) for role, group in groups.items() if role not in large)
    blocks = _shares({role: len(group) for role, group in large.items()}, left // EACH)
    found = []
    for role, group in groups.items():
        if role not in large:
            found.append(Stratum(tuple(group), len(group)))
            continue
        parts = np.array_split(np.array(group), blocks[role])
        found += [Stratum(tuple(map(int, part)), EACH) for part in parts]
    return found


def _shares(sizes: dict[str, int], blocks: int) -> dict[str, int]:
    """Blocks of each role: one, and the rest where a block is largest; two in each."""
    shares = dict.fromkeys(sizes, 1)
    for _ in range(blocks - len(sizes)):
        open_roles = [r for r in sizes if sizes[r] >= EACH * (shares[r] + 1)]
        if not open_roles:
            break
        shares[max(open_roles, key=lambda r: sizes[r] / shares[r])] += 1
    return shares


def draw(found: Sequence[Stratum], seed: int) -> Iterator[tuple[int, int]]:
    """(stratum, member) of every matrix that is drawn, without replacement."""
    generator = np.random.default_rng(seed)
    for number, stratum in enumerate(found):
        chosen = generator.choice(len(stratum.members), stratum.drawn, replace=False)
        for place in sorted(chosen):
            yield number, stratum.members[place]


def layers_of(plan: Plan) -> Plan:
    """A plan less embedding and head, unless its roles were asked for by name."""
    if plan.description["roles"] is not None:
        return plan
    roles = {task.name: task.pair.before.role for task in plan.tasks}
    return plan.without([name for name, role in roles.items() if role in VOCABULARY])


def sampled(plan: Plan, n: int, seed: int = 0) -> Plan:
    """A plan of some of its matrices, and what each of them stands for.

    Args:
        plan: of `plan_pair`.
        n: matrices.
        seed: of the draw.

    Returns:
        The smaller plan, whose table has the columns `STRATA`: the number of a matrix's
        stratum, how many matrices that holds and how many of them are drawn.

    Raises:
        ValueError: as `strata`.
    """
    sources = [task.pair.before for task in plan.tasks]
    # A role is one within a part: no stratum mixes towers.
    roles = [s.role if s.part == "language" else f"{s.part} {s.role}" for s in sources]
    found = strata(roles, [s.layer for s in sources], n)
    chosen = {place: number for number, place in draw(found, seed)}
    rows = {
        plan.tasks[place].name: (n, len(found[n].members), found[n].drawn)
        for place, n in chosen.items()
    }
    tasks = [plan.tasks[place] for place in sorted(chosen)]
    description = {**plan.description, "sample": n, "sample_seed": seed}
    design = pd.DataFrame.from_dict(rows, orient="index", columns=[*STRATA])
    return replace(plan, tasks=tasks, description=description, design=design)


def estimates(joined: pd.DataFrame) -> pd.DataFrame:
    """Means over all matrices from a sample of them, with 95 % intervals by the design.

    R = sum_h (M_h / m_h) sum_i y_hi / the same of x_hi, where x is 1 for a matrix that
    has the metric (its entries, for sparsity and density) and y is x times the metric

    var R = sum_h M_h^2 (1 - m_h / M_h) s_h^2 / m_h / X^2, s_h of y - R x in stratum h

    Of largest angles it is the median: they go as one over the gap of two singular
    values, whose squares have no mean where gaps close linearly, and no sample of a
    quarter knows the few that are ten times the rest.

    Args:
        joined: the table of a sampled plan.

    Returns:
        A metric a row (`MEDIAN` after its name if it is one): mean, half_width
        (Student's; 0 where every matrix was measured), low and high.

    Source: Cochran (1977), chapters 5 and 6: stratified samples and ratio estimates;
    Woodruff (1952), JASA 47, for the median: the interval of the share below it, read
    off the sample's own distribution.
    """
    names = [
        name
        for name in COLUMNS
        if name.removeprefix("null_") in METRICS and joined[name].notna().any()
    ]
    rows = {
        f"{name}{MEDIAN}" if name.endswith(LARGEST) else name: (
            _median if name.endswith(LARGEST) else _mean
        )(joined, name)
        for name in names
    }
    columns = ["mean", "half_width", "low", "high"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


SHARES = re.compile("sparsity|density|overlap|energy|share")  # up to one
MEDIAN, LARGEST = " (median)", "_max_deg"
# Of Satterthwaite's degrees of freedom, which are estimated from pairs themselves: the
# share with which the intervals of every metric held in 95 % of 1000 draws.
DEGREES = 0.8

Estimate = tuple[float, float, float, float]


def _mean(joined: pd.DataFrame, name: str) -> Estimate:
    values = joined[name].to_numpy(float)
    x = np.isfinite(values).astype(float)
    if name.endswith(("sparsity_bf16", "density")):
        x *= joined["rows"].to_numpy(float) * joined["cols"].to_numpy(float)
    mean, half = _ratio(joined, x, values)
    most = 1.0 if SHARES.search(name) else 90.0 if name.endswith("deg") else math.inf
    least = 0.0 if np.nanmin(values) >= 0.0 else -math.inf  # no metric is below
    return mean, half, max(least, mean - half), min(most, mean + half)


def _ratio(joined: pd.DataFrame, x: np.ndarray, values: np.ndarray) -> Sequence[float]:
    """Mean of values weighted by x, and half its interval."""
    y = x * np.nan_to_num(values, posinf=0.0, neginf=0.0)
    size, drawn = (joined[column].to_numpy(float) for column in STRATA[1:])
    total = float((size / drawn * x).sum())
    mean = float((size / drawn * y).sum()) / total
    residual = y - mean * x
    variances = []
    for part in joined.groupby("stratum").indices.values():
        held, taken = size[part][0], drawn[part][0]
        if held > taken:
            spread = float(np.var(residual[part], ddof=1))
            square = held**2 * (1 - taken / held) * spread / taken / total**2
            variances.append((square, len(part) - 1))
    square = sum(variance for variance, _ in variances)
    if square == 0.0:
        return mean, 0.0
    degrees = DEGREES * square**2 / sum(v**2 / d for v, d in variances)
    return mean, float(stdtrit(max(1.0, degrees), 0.975)) * math.sqrt(square)


def _median(joined: pd.DataFrame, name: str) -> Estimate:
    finite = np.isfinite(joined[name].to_numpy(float))
    known = joined[finite].sort_values(name)
    values = known[name].to_numpy(float)
    weights = (known[STRATA[1]] / known[STRATA[2]]).to_numpy(float)
    below = (np.cumsum(weights) - weights / 2) / weights.sum()
    median = float(np.interp(0.5, below, values))
    share = (joined[name] <= median).to_numpy(float)
    half = _ratio(joined, finite.astype(float), share)[1]
    n, size = len(values), float(weights.sum())
    if size - n < 0.5:  # every matrix is there
        return median, 0.0, median, median
    if half == 0.0:  # both of every stratum on one side: as if there were none
        half = float(stdtrit(n - 1, 0.975)) * math.sqrt(0.25 / n * (1 - n / size))
    # Beyond the sample's own ends angles have theirs.
    low, high = np.interp([0.5 - half, 0.5 + half], below, values, 0.0, 90.0)
    # One matrix to either side, at the least.
    low = min(low, max(values[below < 0.5], default=0.0))
    high = max(high, min(values[below > 0.5], default=90.0))
    return median, float(high - low) / 2, float(low), float(high)

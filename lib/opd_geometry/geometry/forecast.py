"""How long a table of checkpoints will take, before it is begun."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from opd_geometry.geometry import bits, comparison, gram, krylov, locking, pairs
from opd_geometry.geometry.comparison import ANGLES, reference


@dataclass(frozen=True)
class Speed:
    """Seconds on this machine, from which larger matrices are projected."""

    cheap: float  # an entry
    product: float  # of m^2 M, m and M the sides: Gram matrix and projections
    reduction: float  # of m^3: all singular values, top vectors
    values: float  # of m^3: all singular values alone
    iteration: float  # an entry, of `krylov.spread`
    noise: float  # an entry of a Gaussian null
    reading: float  # a byte of the checkpoints' files
    walk: float = 0.0  # an entry and step of a walk


PROBE = 768  # side of the matrices that are timed
# How much slower a tridiagonalisation is, a flop, once it has left the caches: about
# this much, and up to twice, between the probe's side and 4096.
OUT_OF_CACHE = 1.5
PROBE_STEPS = 4  # of a walk
PROBE_BYTES = 2**26  # of a file that are read, about


def probe_speed(plan: pairs.Plan) -> Speed:
    """Time one small matrix of each kind and a part of the largest one's file.

    The part is read as measuring will read all, as fast as the file comes now: from
    memory where it was read or written lately, else from its disk. Takes about a
    second, from a slow disk longer.

    Args:
        plan: of `plan_pair` or `plan_trajectory`, with at least one task.
    """
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(PROBE, PROBE, generator=generator)
    other = w + 0.01 * torch.randn(PROBE, PROBE, generator=generator)
    w, other = w.bfloat16(), other.bfloat16()
    gram.decompose(w, PROBE // 8)  # the first call loads libraries
    product = _seconds(lambda: gram.gram(w))
    whole = _seconds(lambda: gram.decompose(w, PROBE // 8))
    values = _seconds(lambda: gram.leading_values(w, PROBE // 8))
    before = reference(w)
    names = [pairs.METRICS[name] for name in pairs.GROUPS["cheap"]]
    cheap = _seconds(lambda: comparison.compare(before, other, names))
    norm = bits.difference_norm(w, other)
    iteration = _seconds(lambda: krylov.spread(w, other, norm, 16, PROBE // 8))
    noise = _seconds(lambda: comparison.null_weights(before, other, 0))
    optimizer = locking.Optimizer((1.0,) * PROBE_STEPS)
    walked = locking.walking(w.shape, optimizer, [PROBE_STEPS], generator)
    walk = _seconds(lambda: next(walked)) / PROBE_STEPS
    cube, square = PROBE**3, PROBE**2
    return Speed(
        cheap / square,
        1.6 * product / cube,
        OUT_OF_CACHE * max(whole - 1.6 * product, 0.0) / cube,
        max(values - product, 0.0) / cube,
        iteration / square,
        noise / square,
        _reading(plan),
        walk / square,
    )


def _reading(plan: pairs.Plan) -> float:
    """Seconds a byte of the plan's largest matrix."""
    largest = max(plan.tasks, key=lambda task: task.n_bytes)
    started = time.perf_counter()
    head = largest.pair.read_head(PROBE_BYTES)
    return (time.perf_counter() - started) / head.nbytes


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def projected_seconds(
    plan: pairs.Plan, speed: Speed, metrics: Collection[str], null: bool, jobs: int = 1
) -> float:
    """About how long a plan takes.

    Args:
        plan: of `plan_pair` or `plan_trajectory`.
        speed: of `probe_speed`.
        metrics: that are measured of a pair.
        null: whether its null is.
        jobs: processes, which share the arithmetic, but read from one disk.
    """
    asked, iterated = set(pairs.parse_metrics(metrics)), pairs.MIDDLE in metrics
    turns = len(asked & {*ANGLES, "nss"}) > 0
    whole = (2 + 2 * null) * turns  # of the nulls, the Gaussian and the turned one
    whole = max(whole, int("principal_overlap" in asked))
    spread = bool(asked & {*pairs.OF_UPDATE})
    seconds = 0.0
    for task in plan.tasks:
        short, long = sorted(task.shape)
        product, cube = short * short * long, short**3
        if isinstance(task, pairs.TrajectoryTask):
            n = len(task.steps)
            if task.optimizer is not None and task.walk and n >= locking.LEAST:
                seconds += max(task.steps) * speed.walk * short * long
            if task.iterated:
                seconds += (2 * n + 1) * speed.iteration * short * long
                continue
            seconds += n * (4 * speed.product * product + 3 * speed.values * cube)
            continue
        seconds += short * long * (speed.cheap + (speed.noise + 3 * speed.cheap) * null)
        seconds += whole * (speed.product * product + speed.reduction * cube)
        if iterated:
            seconds += speed.iteration * short * long
        elif spread:
            seconds += speed.product * product / 1.6 + speed.values * cube
    reading = speed.reading * sum(task.n_bytes for task in plan.tasks)
    return seconds / jobs + reading

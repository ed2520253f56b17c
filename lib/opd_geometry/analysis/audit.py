"""Committed runs, drawn at random and trained anew: are the committed numbers met?

A drawn run is trained from the committed base and teacher, and with it all that it
starts or branches from, in a data directory of its own, so that nothing finished is
found there. It is measured as it was, and each metric at the end of training is held
against the committed value of the same arm and seed:

    distance = |fresh - committed| / spread
    spread = max(highest - lowest, LEAST_SPREAD * largest magnitude)

with highest, lowest and largest over the *other* committed seeds of the arm: with its
own, a committed number that is wrong would widen the spread that it is judged by.
Beyond a distance of 1 a value lies *outside*: training one seed twice gave a larger
difference than training all the others.

On the processor kind that the committed runs were trained on, fresh values are equal
but for the seven digits that are committed. Elsewhere a run rounds otherwise and goes
its own way, which is why the unit is a spread of seeds and not a digit.
"""

import os
import random
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

from opd_geometry.analysis.evidence import (
    ATTENTION,
    LAYERS,
    accuracy,
    benchmarks,
    first,
    last,
    over_matrices,
)
from opd_geometry.experiments.descriptions import Run, origin
from opd_geometry.experiments.measure import (
    committed_provenance,
    committed_runs,
    committed_table,
    measure_run,
)
from opd_geometry.experiments.profiles import build, settings_of
from opd_geometry.experiments.runs import provenance
from opd_geometry.files import clear_write_errors, data_directory
from opd_geometry.geometry.comparison import METRICS
from opd_geometry.sources import library_digest
from opd_geometry.training.students import Student

LEAST_SEEDS = 3  # its own, and two others that lie apart
LEAST_SPREAD = 1e-3  # relative: what all seeds share may differ in its last digits
LENT = ("checkpoints", "measurements")  # committed, and read by the fresh runs
# Means over the attention matrices, as in the claims; all others over the layers.
TRAJECTORIES = ("stable_rank", "stable_rank_bf16", "frobenius_norm", "hill_alpha")
SIMILARITY = "similarity_to_end"  # at the first checkpoint: at the end it is 1


def draw(
    profile: str,
    sample: int,
    seed: int,
    arms: Iterable[str],
    student: str | None = None,
) -> list[Run]:
    """Committed runs, drawn at random without repetition.

    Arms with fewer than ``LEAST_SEEDS`` committed seeds have no spread: left out.

    Args:
        profile: a key of ``PROFILES``.
        sample: how many.
        seed: the same draw again, while the same runs are committed.
        arms: which arms to draw from.
        student: where the pretrained model of the committed runs lies, if they have
            one: it is not committed.

    Raises:
        ValueError: unknown profile, fewer runs are committed than are to be drawn, or
            the student is another model than that of the committed runs.
    """
    settings_of(profile)
    wanted = set(arms)
    known = [run for run in committed_runs(profile) if run.arm in wanted]
    listed = [run.arm for run in known]
    known = [run for run in known if listed.count(run.arm) >= LEAST_SEEDS]
    if not 0 < sample <= len(known):
        some = f"1 to {len(known)}, the" if known else "none, there are no"
        raise ValueError(
            f"sample {sample}: expected {some} committed runs of profile {profile} "
            f"whose arm has {LEAST_SEEDS} seeds or more; ask for "
            f"{'fewer, or for other' if known else 'other'} arms"
        )
    drawn = random.Random(seed).sample(known, sample)
    start = origin(drawn[0])
    if student is None and isinstance(start, Student) and not start.source:
        raise ValueError(
            f"profile {profile} begins with a model that is not committed: expected "
            "its file or directory; name it with --student"
        )
    if student is None:
        return drawn
    found = [build(profile, run.arm, run.seed, student=student) for run in drawn]
    if [run.key() for run in found] != [run.key() for run in drawn]:
        theirs = start.digest if isinstance(start, Student) else ""
        raise ValueError(
            f"{student} is not the model that the committed runs of profile {profile} "
            f"began with: expected the one with SHA-256 {theirs}"
        )
    return found


def machines(runs: Iterable[Run]) -> str:
    """Where the committed runs were trained, and what trains them now, in a line."""
    listed = committed_provenance().set_index("run")["machine"]
    theirs = sorted({str(listed[run.key()]) for run in runs})
    return f"committed on {'; '.join(theirs)}, trained now on {provenance()['machine']}"


def taught_anew(runs: Iterable[Run]) -> str:
    """Which of them learn from a teacher that is trained anew as well; empty if none.

    Pretraining rounds otherwise on another processor and ends at another teacher, so
    that such a run may part by more than seeds do.
    """
    found = sorted({run.arm for run in runs if isinstance(run.teacher, Run)})
    if not found:
        return ""
    return (
        f"{', '.join(found)}: the teacher is not committed but trained anew, too; "
        "on another processor it is another teacher, which may put values outside"
    )


@contextmanager
def apart() -> Iterator[Path]:
    """A data directory without finished runs, in force within: its path.

    It lies below ``data/audit`` and belongs to the code that trains and measures, so
    that what was interrupted goes on, and with other code begins anew.

    Raises:
        ValueError: another process audits there, or the folder cannot be written.
    """
    shelf, code = (
        data_directory().resolve(),
        library_digest(["opd_geometry.experiments.measure"]),
    )
    place = shelf / "audit" / code[:12]
    with clear_write_errors(place):
        place.mkdir(parents=True, exist_ok=True)
        try:
            alone = FileLock(place / "lock", timeout=0).acquire()
        except Timeout as error:
            raise ValueError(
                f"another audit is at work in {place}: expected none; wait until it is "
                "done"
            ) from error
    with alone, _data_in(place):
        with clear_write_errors(place):
            for name in LENT:
                if not (place / name).exists():
                    (place / name).unlink(missing_ok=True)  # where it once was
                    if (shelf / name).exists():  # else it is read from the checkout
                        (place / name).symlink_to(shelf / name)
        yield place


@contextmanager
def _data_in(place: Path) -> Iterator[None]:
    """What is trained within, here and in workers started within, goes there."""
    before = os.environ.get("OPD_GEOMETRY_DATA")
    os.environ["OPD_GEOMETRY_DATA"] = str(place)
    try:
        yield
    finally:
        os.environ.pop("OPD_GEOMETRY_DATA")
        if before is not None:
            os.environ["OPD_GEOMETRY_DATA"] = before


def clear(place: Path) -> None:
    """Remove what an audit has trained, and ``data/audit`` if nothing else is there.

    Under another name first: a run that is half removed must not look finished.
    """
    gone = place.with_name(f".{place.name}")
    shutil.rmtree(gone, ignore_errors=True)  # of one that was killed right here
    place.rename(gone)
    shutil.rmtree(gone)
    with suppress(OSError):
        place.parent.rmdir()


def readings(table: pd.DataFrame, arm: str) -> pd.DataFrame:
    """What is compared of an arm: one row a metric, one column a seed.

    Means over matrices at the last checkpoint, as the claims take them, and accuracies
    there. A metric that the table lacks, or that is undefined, is NaN.

    Args:
        table: tidy.
        arm: which rows.
    """

    def mean(metric: str) -> pd.Series:
        roles = ATTENTION if metric in (*TRAJECTORIES, SIMILARITY) else LAYERS
        return over_matrices(table, arm, metric, roles, weighted=metric == "sparsity")

    values = {metric: last(mean(metric)) for metric in (*METRICS, "leak")}
    values[SIMILARITY] = first(mean(SIMILARITY))
    asked = benchmarks(table)
    values |= {metric: accuracy(table, arm, (metric,)) for metric in asked}
    return pd.DataFrame(values).astype(float).T


def held_against(fresh: pd.Series, committed: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Hold the metrics of a fresh run against the committed ones of its arm.

    Args:
        fresh: metric to value.
        committed: one row a metric, one column a seed; see ``readings``.
        seed: of the fresh run; one of the columns.

    Returns:
        One row a metric that either has: fresh, committed, lowest and highest of the
        other seeds, distance (infinite if only one of both is defined), outside.
    """
    own, others = committed[seed], committed.drop(columns=seed)
    lowest, highest = others.min(axis=1), others.max(axis=1)
    spread = np.maximum(highest - lowest, LEAST_SPREAD * others.abs().max(axis=1))
    gap = (fresh - own).abs().fillna(np.inf)
    distance = (gap / spread).where(gap > 0, 0.0).fillna(np.inf)
    rows = {
        "fresh": fresh,
        "committed": own,
        "lowest": lowest,
        "highest": highest,
        "distance": distance,
        "outside": distance > 1,
    }
    return pd.DataFrame(rows).loc[fresh.notna() | own.notna()]


def audited(profile: str, run: Run) -> pd.DataFrame:
    """Hold a run that was trained anew against the committed runs of its arm.

    Args:
        profile: its profile.
        run: finished in the data directory in force; see ``apart``.

    Returns:
        As ``held_against``.
    """
    shelf = [committed_table(r) for r in committed_runs(profile) if r.arm == run.arm]
    fresh = readings(measure_run(run, settings_of(profile).rank), run.arm)[run.seed]
    committed = readings(pd.concat(shelf, ignore_index=True), run.arm)
    return held_against(fresh, committed, run.seed)

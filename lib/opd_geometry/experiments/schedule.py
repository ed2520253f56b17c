"""Many runs at once: what they need, what they cost, Dask's workers, their progress.

A run starts as soon as what it needs is finished, the one that most work waits for
first. Each trains and measures in a worker process with one thread, so a run that
fails, or that the system kills, leaves the others alone and blocks only what needs it.
What has been done stands in the runs' directories and nowhere else.
"""

import json
import logging
import os
import platform
import shlex
import signal
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from typing import Any
from uuid import uuid4

import pandas as pd
from rich.console import Console

from opd_geometry.experiments.display import (
    REFRESH_SECONDS,
    Display,
    first_step,
    seconds_left,
)
from opd_geometry.experiments.forecast import check_memory
from opd_geometry.experiments.measure import (
    committed_provenance,
    is_measured,
    measure_run,
)
from opd_geometry.experiments.profiles import asks_gpus, settings_of
from opd_geometry.experiments.records import (
    ANYTHING,
    SECONDS,
    TEXT,
    read_json,
    write_json,
)
from opd_geometry.experiments.runs import (
    Run,
    clear_failure,
    data_directory,
    ensure,
    is_done,
    is_running,
    one_thread,
    recorded,
    run_directory,
)

# Read when a worker imports torch and transformers, hence set before it starts.
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
CONNECT_SECONDS = 10.0  # a cluster has to answer


@dataclass(frozen=True)
class Row:
    """One line of a plan.

    Attributes:
        run: the run.
        state: ``done``, ``damaged`` (finished, with a record that cannot be read),
            ``running``, ``failed`` or ``to do`` (begun or not).
        step, steps: where it stands, and its length.
        accuracy: last sampled accuracy or mean reward in [0, 1]; None before the first.
        seconds: the whole run on one core; None if nothing like it was ever timed.
        seconds_left: 0 when done; None if unknown.
        reason: why it failed, or what is damaged; else empty.
    """

    run: Run
    state: str
    step: int
    steps: int
    accuracy: float | None
    seconds: float | None
    seconds_left: float | None
    reason: str


# --- what there is to do ---------------------------------------------------------


def with_needs(runs: Iterable[Run]) -> list[Run]:
    """The runs and all they need, each once, what is needed before what needs it."""
    ordered: dict[Run, None] = {}
    for run in runs:
        if run not in ordered:
            ordered.update(dict.fromkeys([*with_needs(run.needs), run]))
    return list(ordered)


def plan(runs: Iterable[Run]) -> list[Row]:
    """Where the runs and all they need stand, and what is left to do.

    Args:
        runs: the runs asked for.

    Returns:
        One row a run, in an order in which they can be trained; committed timings
        serve as estimates. A run with a damaged record has its reason there.
    """
    timings = Timings(committed_provenance())
    return [_row(run, timings) for run in with_needs(runs)]


def _row(run: Run, timings: "Timings") -> Row:
    state, said, reason = run_state(run), {}, ""
    try:
        said = recorded(run) if state != "to do" or begun(run) else {}
    except ValueError as error:
        reason = str(error)
        state = "damaged" if state == "done" else state
    seconds = said["wall_seconds"] if state == "done" else timings.estimate(run)
    return Row(
        run,
        state,
        int(said.get("step", first_step(run))),
        run.train.steps,
        said.get("accuracy"),
        seconds,
        0.0 if state in ("done", "damaged") else seconds_left(run, said, seconds),
        failure(run) if state == "failed" else reason,
    )


def begun(run: Run) -> bool:
    """Whether anything of the run is there."""
    return run_directory(run).is_dir()


def run_state(run: Run) -> str:
    """``done``, ``running``, ``failed`` or ``to do``."""
    if not begun(run):
        return "to do"
    if is_done(run):
        return "done"
    if is_running(run):
        return "running"
    return "failed" if failure(run) else "to do"


def failure(run: Run) -> str:
    """The one-line reason why the run's last attempt failed; empty if it did not."""
    path = run_directory(run) / "failed.json"
    if not path.is_file():
        return ""
    try:
        return str(read_json(path, {"reason": TEXT})["reason"])
    except ValueError as error:  # it did fail, and nobody can tell why any more
        return str(error)


class Timings:
    """How long runs took before, here and on the machines of the committed ones.

    Args:
        committed: rows with arm, steps and wall_seconds, as of committed_provenance.
    """

    def __init__(self, committed: pd.DataFrame) -> None:
        took = committed.groupby(["arm", "steps"])["wall_seconds"].mean()
        self.committed = {key: float(seconds) for key, seconds in took.items()}

    def estimate(self, run: Run) -> float | None:
        """Seconds for the whole run, as runs of its arm and length took before.

        The mean of the committed ones; without any, that of the finished local runs
        that trained in the same way; None without these.
        """
        known = self.committed.get((run.arm, run.train.steps))
        if known is not None:
            return known
        took = self._local.get((run.arm, _settings(asdict(run.train))), [])
        return sum(took) / len(took) if took else None

    @cached_property
    def _local(self) -> dict[tuple[str, str], list[float]]:
        """Arm and settings to the seconds of each finished run in data/runs."""
        took: dict[tuple[str, str], list[float]] = {}
        for path in data_directory().glob("runs/*/done.json"):
            with suppress(ValueError):  # another run's damaged file tells nothing
                kinds = {"arm": TEXT, "train": ANYTHING}
                described = read_json(path.with_name("run.json"), kinds)
                key = described["arm"], _settings(described["train"])
                seconds = read_json(path, {"wall_seconds": SECONDS})["wall_seconds"]
                took.setdefault(key, []).append(float(seconds))
        return took


def _settings(train: Any) -> str:
    return json.dumps(train, sort_keys=True)


def priorities(rows: Iterable[Row]) -> dict[Run, float]:
    """How long a run and the longest chain of runs that wait for it still take.

    A run whose time is unknown counts as the longest known one, an hour if none is.

    Args:
        rows: a plan.

    Returns:
        Run to seconds; the run with the largest should start first.
    """
    rows = list(rows)
    unknown = max((row.seconds or 0.0 for row in rows), default=0.0) or 3600.0
    chains: dict[Run, float] = {}
    longest: dict[Run, float] = {}  # of the chains that wait for a run
    for row in reversed(rows):  # what waits comes before what it waits for
        own = unknown if row.seconds_left is None else row.seconds_left
        chain = chains[row.run] = own + longest.get(row.run, 0.0)
        for needed in row.run.needs:
            longest[needed] = max(chain, longest.get(needed, 0.0))
    return chains


def total_seconds(rows: Iterable[Row], jobs: int) -> float | None:
    """Time until all rows are done: the longest chain, or the work shared by jobs.

    Args:
        rows: a plan.
        jobs: runs at a time.

    Returns:
        Seconds, a lower bound; None if the time of a run is unknown.
    """
    rows = list(rows)
    left = [row.seconds_left for row in rows]
    if any(seconds is None for seconds in left):
        return None
    work = sum(seconds for seconds in left if seconds is not None)
    return max([work / jobs, *priorities(rows).values()])


# --- doing it --------------------------------------------------------------------


def train_all(
    profile: str,
    runs: Iterable[Run],
    jobs: int | None = None,
    console: Console | None = None,
    cluster: str | None = None,
) -> dict[Run, str]:
    """Train and measure the runs, after training what they need, several at a time.

    Dask's workers do it: processes of this machine that end with this one, or those of
    a running cluster. A run whose worker is lost goes on elsewhere from its last state.
    One run alone is trained in this process, which starts nothing.

    Args:
        profile: decides K of the measurements, and what a run asks of its worker.
        runs: the runs asked for.
        jobs: how many run at a time, a process and a thread each; None for every core,
            or every worker of the cluster.
        console: where progress goes: a live display on a terminal, else a line a run
            now and then; stderr if None.
        cluster: address of a running Dask scheduler whose workers share the data
            folder; None for the one in DASK_SCHEDULER_ADDRESS, or workers of our own.

    Returns:
        The runs that are not finished and measured now, with one line why: they
        failed, or something they need did.

    Raises:
        ValueError: jobs smaller than 1, too little memory, or no cluster there.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs {jobs}: expected 1 or more, the number of cores to use")
    cluster = cluster or os.environ.get("DASK_SCHEDULER_ADDRESS")
    asked, settings = set(runs), settings_of(profile)
    rows = plan(asked)
    first = priorities(rows)
    ranks = {row.run: settings.rank if row.run in asked else None for row in rows}
    left = {run for run, rank in ranks.items() if not is_finished(run, rank)}
    order = TopologicalSorter({row.run: row.run.needs for row in rows})
    order.prepare()
    ready: list[Run] = []
    running: dict[Run, Any] = {}  # to their futures
    failed: dict[Run, str] = {}

    def end(run: Run, reason: str) -> None:
        if reason:
            failed[run] = reason
        display.ended(run, reason)
        order.done(run)

    display = Display(console or Console(stderr=True), len(rows))
    n = settings.processes
    with display, _client(left, jobs, cluster, n) as client:
        while order.is_active():
            ready = sorted([*ready, *order.get_ready()], key=lambda run: -first[run])
            # no more than there are workers: when one dies, Dask blames its queue too
            while ready and len(running) < _slots(client, jobs):
                run = ready.pop(0)
                missing = [needed.name for needed in run.needs if needed in failed]
                if missing:
                    end(run, f"needs {missing[0]}, which is not finished")
                elif run not in left:
                    end(run, "")
                elif client is None:
                    with display.watching(run):
                        reason = _work(run, ranks[run], n)
                    end(run, reason)
                else:
                    asks = {"GPU": n} if cluster and asks_gpus(settings) else None
                    running[run] = _start(client, run, ranks[run], n, asks)
            display.running(running)
            for run in _ended(running):
                end(run, _outcome(run, running.pop(run)))
    return failed


def is_finished(run: Run, rank: int | None) -> bool:
    """Whether nothing is left to do: trained, and measured if a rank is given."""
    return is_done(run) and (rank is None or is_measured(run, rank))


@contextmanager
def _client(
    left: Collection[Run], jobs: int | None, cluster: str | None, processes: int
) -> Iterator[Any]:
    """Dask's client of the cluster, or of workers of our own; None for one run alone.

    Our own end with this process, however it ends.
    """
    every = max(1, (os.cpu_count() or 1) // processes)
    n_workers = min(jobs or every, len(left))
    if not cluster:
        check_memory(left, n_workers, processes)
    if not left or (n_workers == len(left) == 1 and not cluster):
        yield None
        return
    from distributed import Client, LocalCluster  # half a second

    if cluster:
        try:
            client = Client(cluster, timeout=CONNECT_SECONDS)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no cluster answers at {cluster} ({' '.join(str(error).split())}): "
                "expected the address that dask scheduler prints, such as "
                "tcp://host:8786"
            ) from error
        with client:
            yield client
        return
    with (
        LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,
            memory_limit=None,  # no worker is paused or ended for what it holds
            dashboard_address=None,
            silence_logs=logging.CRITICAL,
            env=WORKER_ENVIRONMENT,
        ) as own,
        Client(own) as client,
    ):
        try:
            yield client
        except BaseException:  # what they do is not waited for
            for nanny in own.workers.values():
                nanny.auto_restart = False
                os.kill(nanny.pid, signal.SIGKILL)
            raise


def _slots(client: Any, jobs: int | None) -> int:
    """Runs at a time; a cluster's workers come and go."""
    return 1 if client is None else jobs or max(1, sum(client.nthreads().values()))


def _start(
    client: Any,
    run: Run,
    rank: int | None,
    processes: int,
    resources: Mapping[str, float] | None,
) -> Any:
    with suppress(OSError):  # which the worker meets as well, and says
        run_directory(run).mkdir(parents=True, exist_ok=True)
    key = f"{run.name}-{uuid4().hex}"
    given = run, rank, processes, True
    return client.submit(_work, *given, key=key, resources=resources)


def _work(
    run: Run, rank: int | None, processes: int, begun_elsewhere: bool = False
) -> str:
    """What a worker does: train, measure; what went wrong in one line, or nothing."""
    if begun_elsewhere and not begun(run):
        return (
            f"the worker on {platform.node()} cannot see it below {data_directory()}: "
            "expected one data folder for all; start the workers with "
            "OPD_GEOMETRY_DATA naming it"
        )
    try:
        with one_thread():
            ensure(run, processes)
            if rank is not None:
                measure_run(run, rank)
    except Exception as error:
        expected = isinstance(error, ValueError | OSError)
        kind = "" if expected else f"{type(error).__name__}: "
        return _failed(run, kind + " ".join(str(error).split()), traceback.format_exc())
    clear_failure(run)
    return ""


def _failed(run: Run, reason: str, details: str = "") -> str:
    """The reason, once it is recorded in the run's directory."""
    record = run_directory(run) / "failed.json"
    with suppress(OSError):  # the reason may be that nothing can be written here
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, {"reason": reason, "traceback": details})
    return reason


def _ended(running: Mapping[Run, Any]) -> list[Run]:
    """Runs that have ended, after waiting a moment for the first."""
    if not running:
        return []
    from distributed import wait

    with suppress(TimeoutError):
        wait([*running.values()], REFRESH_SECONDS, "FIRST_COMPLETED")
    return [run for run, future in running.items() if future.done()]


def _outcome(run: Run, future: Any) -> str:
    """Why the run failed; empty if it did not."""
    from distributed import KilledWorker

    if future.status == "finished":
        return str(future.result())
    error = future.exception() if future.status == "error" else None
    if isinstance(error, KilledWorker):
        died = f"{error.allowed_failures + 1} workers died while trying to run it"
        return _failed(run, f"{died}; is memory short?")
    return _failed(run, f"the cluster has lost it ({error or future.status})")


def slurm_script(runs: Sequence[Run], options: Sequence[str], jobs: int) -> str:
    """An array job for SLURM, a run a task, for those who want no scheduler of ours.

    A task trains what its run needs as well; tasks that need the same wait at its lock.

    Args:
        runs: the runs asked for.
        options: of ``opd-geometry run``, the same for all.
        jobs: tasks at a time.
    """
    asked = "\n".join(f'  "--arms {run.arm} --seeds {run.seed}"' for run in runs)
    return f"""#!/bin/bash
#SBATCH --job-name=opd-geometry
#SBATCH --array=0-{len(runs) - 1}%{jobs}
#SBATCH --requeue
# What a task may take, and of what, depends on the machine: --time, --gres, --mem.
# Ended by its time limit, a run goes on from its last state when submitted again.
: "${{OPD_GEOMETRY_DATA:?name a folder that all machines see}}"
runs=(
{asked}
)
exec opd-geometry run {shlex.join(options)} --jobs 1 ${{runs[SLURM_ARRAY_TASK_ID]}}
"""

"""Many runs at once: what they need, what they cost, one process each, their progress.

A run starts as soon as what it needs is finished, the one that most work waits for
first. Each trains and measures in a process of its own with one thread, so a run that
fails, or that the system kills, leaves the others alone and blocks only what needs it.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import pandas as pd
import psutil
from rich.console import Console
from rich.live import Live
from rich.text import Text

from opd_geometry.experiments.measure import (
    committed_provenance,
    is_measured,
    measure_run,
)
from opd_geometry.experiments.profiles import settings_of
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
    origin,
    progress,
    recorded,
    run_directory,
)
from opd_geometry.printing import duration
from opd_geometry.training.students import Student

# Read when a worker imports torch and transformers, hence set before it starts.
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
REFRESH_SECONDS = 1.0  # of the display on a terminal
LOG_SECONDS = 30.0  # between the lines of a run in a log


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


def first_step(run: Run) -> int:
    """The step a run begins at: projected runs take over at the branch."""
    return 0 if run.branch is None else run.branch_step()


def seconds_left(
    run: Run, said: Mapping[str, float], seconds: float | None
) -> float | None:
    """Time to the end at the run's own pace so far, else by the estimate."""
    done, whole = said.get("step", 0) - first_step(run), run.train.steps
    if done > 0:
        return said["wall_seconds"] / done * (whole - said["step"])
    return seconds


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


# Bytes a parameter of a pretrained student: float32 weights, gradient and two moments,
# two bf16 copies of the size of a model, student and teacher; and the rest.
BYTES_A_PARAMETER, BYTES_BESIDE = 20, 1.2e9


def memory_bytes(run: Run) -> float | None:
    """Memory that a run's process needs; None where it is small, or unknown."""
    student = origin(run)
    if not isinstance(student, Student) or not student.parameters:
        return None
    return BYTES_A_PARAMETER * student.parameters + BYTES_BESIDE


def check_memory(rows: Iterable[Row], jobs: int) -> None:
    """Refuse to start what the machine's free memory cannot hold.

    Raises:
        ValueError: one line with both numbers.
    """
    needed = [memory_bytes(row.run) or 0.0 for row in rows if row.state != "done"]
    wanted = sum(sorted(needed)[-jobs:])
    free = psutil.virtual_memory().available
    if wanted > free:
        raise ValueError(
            f"{jobs} runs at a time need about {wanted / 1e9:.1f} GB of memory and "
            f"{free / 1e9:.1f} GB are free: expected as much; use fewer --jobs, or a "
            "smaller student"
        )


# --- doing it --------------------------------------------------------------------


def train_all(
    profile: str, runs: Iterable[Run], jobs: int, console: Console | None = None
) -> dict[Run, str]:
    """Train and measure the runs, after training what they need, several at a time.

    Ctrl-C and SIGTERM end the workers; so does the end of this process, however it
    comes. What they had stored is resumed the next time.

    Args:
        profile: decides K of the measurements.
        runs: the runs asked for.
        jobs: how many run at a time, a process and a thread each.
        console: where progress goes: a live display on a terminal, else a line a run
            now and then; stderr if None.

    Returns:
        The runs that are not finished and measured now, with one line why: they
        failed, or something they need did.

    Raises:
        ValueError: jobs smaller than 1.
    """
    if jobs < 1:
        raise ValueError(f"jobs {jobs}: expected 1 or more, the number of cores to use")
    asked = set(runs)
    rows = plan(asked)
    check_memory(rows, jobs)
    first, rank = priorities(rows), settings_of(profile).rank
    order = TopologicalSorter({row.run: row.run.needs for row in rows})
    order.prepare()
    ready: list[Run] = []
    failed: dict[Run, str] = {}

    def end(run: Run, reason: str) -> None:
        if reason:
            failed[run] = reason
        display.ended(run, reason)
        order.done(run)

    with _Display(console or Console(stderr=True)) as display, _workers() as workers:
        while order.is_active():
            ready = sorted([*ready, *order.get_ready()], key=lambda run: -first[run])
            while ready and len(workers) < jobs:
                run = ready.pop(0)
                missing = [needed.name for needed in run.needs if needed in failed]
                if missing:
                    end(run, f"needs {missing[0]}, which is not finished")
                elif is_finished(run, rank if run in asked else None):
                    end(run, "")
                else:
                    workers[run] = _start(run, rank if run in asked else None)
            display.running(workers, len(rows))
            for run in _ended(workers):
                end(run, _outcome(run, workers.pop(run)))
    return failed


def is_finished(run: Run, rank: int | None) -> bool:
    """Whether nothing is left to do: trained, and measured if a rank is given."""
    return is_done(run) and (rank is None or is_measured(run, rank))


# --- workers ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    reasons: Connection  # carries (one line, traceback) if the run fails


@contextmanager
def _workers() -> Iterator[dict[Run, _Worker]]:
    """The running workers; those left at the end, or at SIGTERM, are ended."""
    workers: dict[Run, _Worker] = {}
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.process.terminate()
        for worker in workers.values():
            worker.process.join()
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


def _start(run: Run, rank: int | None) -> _Worker:
    context = get_context("spawn")
    reasons, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_work, args=(run, rank, sender), name=run.name, daemon=True
    )
    with environment(WORKER_ENVIRONMENT), _no_interrupt():
        process.start()
    sender.close()
    return _Worker(process, reasons)


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for what is started within."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Ctrl-C waits, and never reaches a process started within.

    The terminal sends it to all; only the parent should answer, by ending the others.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(run: Run, rank: int | None, reasons: Connection) -> None:
    """What a worker does: train, measure, say in one line what went wrong."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with one_thread():
            if rank is None:
                ensure(run)
            else:
                measure_run(run, rank)
    except Exception as error:
        expected = isinstance(error, ValueError | OSError)
        kind = "" if expected else f"{type(error).__name__}: "
        line = " ".join(str(error).split())
        reasons.send((kind + line, traceback.format_exc()))
        sys.exit(1)


def _end_with_parent() -> None:
    """End this process when its parent is gone, even by kill -9."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _ended(workers: Mapping[Run, _Worker]) -> list[Run]:
    """Runs whose process has ended, after waiting a moment for the first."""
    if not workers:
        return []
    ended = wait([w.process.sentinel for w in workers.values()], REFRESH_SECONDS)
    return [run for run, w in workers.items() if w.process.sentinel in ended]


def _outcome(run: Run, worker: _Worker) -> str:
    """Why the run failed, also recorded in its directory; empty if it did not."""
    worker.process.join()
    record, code = run_directory(run) / "failed.json", worker.process.exitcode
    if code == 0:
        clear_failure(run)
        return ""
    try:
        reason, details = worker.reasons.recv()
    except EOFError:  # it had no time to say
        name = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
        reason, details = f"its process was ended by {name}; is memory short?", ""
    with suppress(OSError):  # the reason may be that nothing can be written here
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, {"reason": reason, "traceback": details})
    return str(reason)


# --- progress --------------------------------------------------------------------


class _Display:
    """One line a running run: redrawn on a terminal, now and then in a log."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = Live(console=console, auto_refresh=False, transient=True)
        self.n_ended = 0
        self.said: dict[Run, float] = {}

    def __enter__(self) -> "_Display":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.live.stop()

    def running(self, runs: Iterable[Run], total: int) -> None:
        if self.console.is_terminal:
            lines = [progress_line(run) for run in runs]
            lines.append(f"{self.n_ended} of {total} runs ended")
            shown = Text("\n".join(lines), no_wrap=True, overflow="ellipsis")
            self.live.update(shown, refresh=True)
            return
        now = time.monotonic()
        for run in runs:
            if now - self.said.get(run, -LOG_SECONDS) >= LOG_SECONDS:
                self.said[run] = now
                self._print(progress_line(run))

    def ended(self, run: Run, reason: str) -> None:
        self.n_ended += 1
        failed = f"{short_name(run):<24} failed: {reason}"
        self._print(failed if reason else ended_line(run))

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def short_name(run: Run) -> str:
    """Arm and seed, for people."""
    return f"{run.arm}-s{run.seed}"


def progress_line(run: Run) -> str:
    """Name, step of steps, accuracy and time left of a run that is being trained.

    Nothing but the name of a run that has said nothing yet.
    """
    try:
        said = progress(run)
    except ValueError:
        said = {}
    if not said:
        return f"{short_name(run):<24} starting"
    left = seconds_left(run, said, None)
    tail = f"{duration(left)} left" if left else "measuring"
    return f"{short_name(run):<24} {_standing(said)}  {tail}"


def ended_line(run: Run) -> str:
    """The same of a finished run, with the time it took."""
    try:
        said = recorded(run)
    except ValueError as error:  # the run's own fault: the others go on
        return f"{short_name(run):<24} {error}"
    took = duration(said["wall_seconds"])
    return f"{short_name(run):<24} {_standing(said)}  done in {took}"


def _standing(said: Mapping[str, float | None]) -> str:
    accuracy = said["accuracy"]
    shown = "" if accuracy is None else f"accuracy {accuracy:.2f}"
    steps = f"{said['step']}/{said['steps']}"
    return f"{steps:>9}  {shown:<13}"

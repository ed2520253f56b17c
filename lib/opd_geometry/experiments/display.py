"""How far runs are: a line each, redrawn on a terminal, now and then in a log."""

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from opd_geometry.experiments.runs import Run, progress, recorded
from opd_geometry.printing import duration

REFRESH_SECONDS = 1.0  # of the display on a terminal
LOG_SECONDS = 30.0  # between the lines of a run in a log


class Display:
    """One line a running run: redrawn on a terminal, now and then in a log."""

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self.total = total
        self.live = Live(console=console, auto_refresh=False, transient=True)
        self.n_ended = 0
        self.said: dict[Run, float] = {}

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    @contextmanager
    def watching(self, run: Run) -> Iterator[None]:
        """Keep showing a run that this process is busy with."""
        ended = threading.Event()

        def show() -> None:
            self.running([run])
            while not ended.wait(REFRESH_SECONDS):
                self.running([run])

        watcher = threading.Thread(target=show, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()

    def running(self, runs: Iterable[Run]) -> None:
        """Show how far these are."""
        if self.console.is_terminal:
            lines = [progress_line(run) for run in runs]
            lines.append(f"{self.n_ended} of {self.total} runs ended")
            shown = Text("\n".join(lines), no_wrap=True, overflow="ellipsis")
            self.live.update(shown, refresh=True)
            return
        now = time.monotonic()
        for run in runs:
            if now - self.said.get(run, -LOG_SECONDS) >= LOG_SECONDS:
                self.said[run] = now
                self._print(progress_line(run))

    def ended(self, run: Run, reason: str) -> None:
        """Say that one is done, or why it failed."""
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

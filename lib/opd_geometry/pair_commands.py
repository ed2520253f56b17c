"""The commands for anyone's checkpoints: measure, trajectory, report.

Tables go to a file, the summary to standard output, everything else to stderr. What
needs torch is imported when a command runs.
"""

import json
import math
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from opd_geometry.printing import duration, print_table, visible

if TYPE_CHECKING:
    import pandas as pd

    from opd_geometry.geometry.locking import Optimizer
    from opd_geometry.geometry.pairs import Plan, Progress

Command = TypeVar("Command", bound=Callable[..., Any])
WEIGHTED = "sparsity_bf16", "update_density"


def _options(command: Command) -> Command:
    """Options of both commands."""
    for option in reversed(
        (
            click.option(
                "--out",
                required=True,
                type=click.Path(path_type=Path),
                help="Table to write: .csv, .parquet or .json.",
            ),
            click.option(
                "--roles",
                metavar="NAMES",
                help="Only these, such as q,k,v,o or expert_gate; default: all.",
            ),
            click.option(
                "--part",
                "part",
                metavar="NAMES",
                help="Only these parts of the model: language, vision, audio, talker, "
                "mtp, projector, other (another tower); default: all are measured, and "
                "the summary is of the "
                "language model.",
            ),
            click.option(
                "--hill-k",
                type=click.IntRange(min=2),
                show_default="n/8",
                help="Singular values in the Hill estimate.",
            ),
            click.option(
                "--jobs",
                type=click.IntRange(min=1),
                default=1,
                show_default=True,
                help="Processes, one thread and one matrix in memory each; at most one "
                "a core.",
            ),
            click.option(
                "--device",
                type=click.Choice(["cpu", "cuda"]),
                default="cpu",
                show_default=True,
                help="Where matrices are decomposed; on a GPU in float64 as well.",
            ),
            click.option(
                "--resume",
                is_flag=True,
                help="Go on from what an interrupted measurement has finished.",
            ),
            click.option(
                "--force", is_flag=True, help="Replace a table that is there already."
            ),
            click.option(
                "--quiet", is_flag=True, help="Say nothing but what is wrong."
            ),
            click.option(
                "--json",
                "as_json",
                is_flag=True,
                help="Print the summary as one JSON object, for programs.",
            ),
        )
    ):
        command = option(command)
    return command


def _finite(
    context: click.Context, parameter: click.Parameter, value: float | None
) -> float | None:
    """Refuse NaN and infinity, which a range lets through."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number to measure with.")
    return value


@click.command("measure")
@click.argument("before")
@click.argument("after")
@_options
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    metavar="N",
    help="Measure N matrices of the layers, drawn by role and depth, two of each role "
    "or more; means (of largest angles the median) get 95 % intervals. Embedding "
    "and head are left out unless --roles names them.",
)
@click.option(
    "--lr",
    type=click.FloatRange(min=0.0, min_open=True),
    callback=_finite,
    help="Learning rate in between, to say with --steps how far the weights went.",
)
@click.option("--steps", type=click.IntRange(min=1), help="Of the optimizer.")
@click.option(
    "--rank-k",
    type=click.IntRange(min=1),
    show_default="n/8",
    help="Dimension of the subspaces whose angles are measured; n: the smaller side.",
)
@click.option(
    "--principal-rank",
    type=click.IntRange(min=1),
    show_default="n/64",
    help="Rank of the reconstruction behind the principal mask.",
)
@click.option(
    "--alpha", default=0.5, show_default=True, help="Share of entries in either mask."
)
@click.option(
    "--eta",
    default=1e-3,
    show_default=True,
    help="Relative change below which a bf16 value counts as unchanged.",
)
@click.option(
    "--metrics",
    metavar="NAMES",
    help="Columns or groups: cheap (no singular values), middle (cheap, and what the "
    "update alone has, iterated and with its error, Hill's exponent to about 6 %), "
    "all, angles, overlaps, norms, spread, energy; default: all, and middle from a "
    "billion weights on.",
)
@click.option(
    "--base",
    help="What adapters on both sides were trained on; default: what they name, and "
    "BEFORE for an adapter as AFTER.",
)
@click.option(
    "--dequantise",
    is_flag=True,
    help="Make weights of FP8, MXFP4 or compressed-tensors codes; every row says so.",
)
@click.option(
    "--null/--no-null",
    default=True,
    show_default=True,
    help="Also measure updates of this size with one thing taken away: Gaussian, "
    "shuffled, turned; where energy lies; and the closed form.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of that Gaussian.",
)
def measure_command(
    before: str,
    after: str,
    out: Path,
    roles: str | None,
    hill_k: int | None,
    jobs: int,
    device: str,
    resume: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
    sample: int | None,
    lr: float | None,
    steps: int | None,
    rank_k: int | None,
    principal_rank: int | None,
    alpha: float,
    eta: float,
    metrics: str | None,
    null: bool,
    seed: int,
    part: str | None,
    base: str | None,
    dequantise: bool,
) -> int:
    """Compare two checkpoints, a row a matrix.

    BEFORE and AFTER: a directory with safetensors (one file or shards), one
    .safetensors file, a hub id with an optional @revision, or what a trainer leaves:
    rank files of FSDP, torch's distributed checkpoints, pytorch_model.bin. AFTER may
    be an adapter of PEFT. Nothing is run: pickles go through torch's restricted loader
    of tensors. Matrices are read one at a time.

    \b
    Examples:
      opd-geometry measure base trained --out table.csv
      opd-geometry measure base trained --out cheap.csv --metrics cheap --no-null
      opd-geometry measure owner/base@main owner/tuned --out table.parquet --jobs 4
      opd-geometry measure base trained --out qkvo.json --roles q,k,v,o --rank-k 64
      opd-geometry measure base trained --out table.csv --resume
      opd-geometry measure base trained --out some.csv --sample 60
      opd-geometry measure base trained --out middle.csv --metrics middle --no-null
    """
    from opd_geometry.geometry.comparison import Settings
    from opd_geometry.geometry.hub import locate
    from opd_geometry.geometry.pairs import (
        MIDDLE,
        beside_expected,
        parse_metrics,
        plan_pair,
        summarise,
    )
    from opd_geometry.geometry.readings import of_parts, sentences
    from opd_geometry.geometry.sampling import estimates, layers_of, sampled
    from opd_geometry.geometry.tables import check_output

    if (lr is None) != (steps is None):
        raise ValueError(
            f"--lr {lr} and --steps {steps}, expected both or neither: the distance is "
            "given in units of lr √T"
        )

    check_output(out, force, resume)
    jobs = _useful(jobs, quiet)
    settings = Settings(rank_k, principal_rank, hill_k, alpha, eta)
    asked, parts = _names(metrics), _names(part)
    if asked is None and sample is not None:
        asked = ["all"]  # a sample of them takes no longer than a tier of all
    if asked is not None:
        parse_metrics(asked)
    plan = plan_pair(
        locate(before),
        locate(after),
        settings,
        asked,
        _names(roles),
        null,
        seed,
        parts,
        locate(base) if base else None,
        dequantise,
    ).on(device)
    say = _Voice(quiet, as_json)
    say.announce(plan)
    if asked is None:
        asked = [MIDDLE if plan.iterated else "all"]
    whole = plan
    if sample is not None:
        whole = layers_of(plan)
        plan = sampled(whole, sample, seed)
    if resume and not force and _complete(plan, out, quiet):
        return 0
    left = _left(plan, out, resume)
    forecasts = [(f"Projected time ({', '.join(asked)}):", left, asked, null)]
    for tier in ("cheap", MIDDLE, "all"):
        if sample is not None or [tier] != asked:
            forecasts.append((f"All matrices, {tier}:", whole, [tier], null))
    if not quiet:
        _project(forecasts, jobs)
    table = _run(plan, out, jobs, (resume, force), quiet)
    said = sentences(of_parts(table, parts), lr, steps)
    title = "Means over matrices; sparsity and density weighted by parameters."
    if sample is None:
        summary = summarise(table, parts)
        say.table(title, _summary_rows(summary))
    else:
        found = estimates(of_parts(table, parts))
        summary = found.rename_axis("metric").reset_index()
        drawn = f"A sample of {len(table)} of {len(whole.tasks)} matrices by role and"
        say.table(
            f"{drawn} depth, with 95 % intervals. {title}", _interval_rows(summary)
        )
    beside = beside_expected(of_parts(table, parts))
    if len(beside):
        say.table(*_expected_rows(beside))
    say.end(out, said, summary)
    return _verdict(plan, table)


@click.command("trajectory")
@click.argument("before")
@click.argument("checkpoints", nargs=-1, required=True, metavar="CKPT...")
@_options
@click.option(
    "--steps",
    metavar="NUMBERS",
    help="Steps of CKPT... in their order, such as 100,200; default: as their paths "
    "tell.",
)
@click.option(
    "--k",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Dimension of the top right subspaces that are compared.",
)
@click.option(
    "--iterate/--exact",
    "iterated",
    default=None,
    help="Spectra by an iteration, with their errors, or exactly; default: iterated "
    "from a billion weights on.",
)
@click.option(
    "--against",
    multiple=True,
    metavar="NAME=END",
    help="Another arm's or seed's end from BEFORE, or NAME=START,END from elsewhere, "
    "such as the preceding stage; adds Sim_K with its end. Repeatable.",
)
@click.option(
    "--lr",
    type=click.FloatRange(min=0.0, min_open=True),
    callback=_finite,
    help="Peak learning rate, one update a step: how far the weights went in units of "
    "√(Σ lr²), and the null of a walk: this optimizer on noise. Default: what "
    "trainer_state.json of the last checkpoint logged.",
)
@click.option(
    "--lr-scheduler",
    type=click.Choice(["constant", "linear", "cosine"]),
    help="What becomes of --lr; default: constant.",
)
@click.option(
    "--warmup-steps", type=click.IntRange(min=0), help="From 0 up to --lr; default: 0."
)
@click.option(
    "--max-steps",
    type=click.IntRange(min=1),
    help="At which --lr-scheduler ends; default: the last checkpoint's.",
)
@click.option(
    "--betas",
    metavar="B1,B2",
    help="Of AdamW; default: as the last checkpoint's optimizer.pt, or 0.9,0.999.",
)
@click.option(
    "--walk/--no-walk",
    default=True,
    show_default=True,
    help="Also that walk, which takes a step of Adam a step and matrix.",
)
@click.option(
    "--readout/--no-readout",
    default=True,
    show_default=True,
    help="Also what bf16 shows of the weights, and what rounding alone would.",
)
def trajectory_command(
    before: str,
    checkpoints: tuple[str, ...],
    out: Path,
    roles: str | None,
    hill_k: int | None,
    jobs: int,
    device: str,
    resume: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
    k: int,
    iterated: bool | None,
    part: str | None,
    steps: str | None,
    against: tuple[str, ...],
    lr: float | None,
    lr_scheduler: str | None,
    warmup_steps: int | None,
    max_steps: int | None,
    betas: str | None,
    walk: bool,
    readout: bool,
) -> int:
    """Follow the update of a run over its checkpoints, a row a matrix and step.

    Steps are the numbers after step, checkpoint, iter or global_step in the paths of
    CKPT..., or the one number in which they differ; the largest is the end, to which
    the subspaces of all others are compared. BEFORE is the start.

    \b
    Examples:
      opd-geometry trajectory base run/checkpoint-* --out run.csv
      opd-geometry trajectory base run/checkpoint-* --k 16 --roles q,k,v,o --out run.csv
      opd-geometry trajectory base run/step_100 run/step_200 --out run.parquet --jobs 2
      opd-geometry trajectory base run/checkpoint-* --out run.csv --lr 1e-6 \\
        --lr-scheduler cosine --warmup-steps 10 --betas 0.9,0.95
      opd-geometry trajectory sft opd/step_* --out run.csv \\
        --against rlvr=rlvr/step_200 --against stage=base,sft
    """
    from opd_geometry.geometry.comparison import Settings
    from opd_geometry.geometry.hub import locate
    from opd_geometry.geometry.pairs import WORDS, plan_trajectory
    from opd_geometry.geometry.readings import of_parts
    from opd_geometry.geometry.steps import given_steps, steps_of
    from opd_geometry.geometry.tables import check_output

    check_output(out, force, resume)
    jobs = _useful(jobs, quiet)
    held = _others(before, against)
    numbers = given_steps(steps, checkpoints) if steps else steps_of(checkpoints)
    for number, checkpoint in sorted(zip(numbers, checkpoints, strict=True)):
        if not quiet:
            _say(f"Step {number}: {checkpoint}")
    places = [locate(checkpoint) for checkpoint in checkpoints]
    schedule = (lr_scheduler, warmup_steps, max_steps)
    optimizer, said = _optimizer(
        dict(zip(numbers, places, strict=True)), lr, schedule, _two(betas)
    )
    if not quiet:
        _say(said)
    plan = plan_trajectory(
        locate(before),
        places,
        k,
        Settings(hill_k=hill_k),
        _names(roles),
        numbers,
        _names(part),
        readout=readout,
        against=held,
        optimizer=optimizer,
        walk=walk,
        iterated=iterated,
    ).on(device)
    say = _Voice(quiet, as_json)
    say.announce(plan)
    if resume and not force and _complete(plan, out, quiet):
        return 0
    left = _left(plan, out, resume)
    if not quiet:
        _project([("Projected time:", left, ["stable_rank"], False)], jobs)
    table = _run(plan, out, jobs, (resume, force), quiet)
    numbers_of = [n for n in table.columns if n not in WORDS and table[n].notna().any()]
    means = (
        of_parts(table, _names(part))[numbers_of].groupby("step").mean().reset_index()
    )
    turned = means.set_index("step").T  # more columns than fit beside one another
    rows = [
        [str(n), *(_number(str(n), v) for v in turned.loc[n])] for n in turned.index
    ]
    say.table("Means over matrices.", (["step", *map(str, turned)], rows))
    say.end(out, [], means)
    return _verdict(plan, table)


@click.command("report")
@click.argument("tables", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="The page, such as report.html.",
)
@click.option(
    "--part",
    metavar="NAMES",
    help="Only these parts of the model, such as vision; default: the language model.",
)
@click.option("--title", help="What the page calls the model; default: TABLE's name.")
@click.option("--force", is_flag=True, help="Replace a page that is there.")
def report_command(
    tables: tuple[Path, ...],
    out: Path,
    part: str | None,
    title: str | None,
    force: bool,
) -> None:
    """Draw measured checkpoints as one page that needs nothing beside it.

    TABLES are what measure and trajectory wrote, one of each at most: .csv, .parquet
    or .json. The paper's numbers and this book's models stand beside yours.

    \b
    Examples:
      opd-geometry report pair.csv --out report.html
      opd-geometry report pair.parquet steps.csv --out report.html --title "My 8B, OPD"
    """
    with click.progressbar(
        length=1, label="Drawing", file=sys.stderr, hidden=not sys.stderr.isatty()
    ) as bar:
        # What the page needs takes a moment to load, with the bar standing already.
        from opd_geometry.book.report import write_report

        def tell(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        page = write_report(tables, out, title, force, tell, _names(part))
    click.echo(f"Open {visible(str(page))}")


def _others(before: str, against: tuple[str, ...]) -> dict[str, tuple[Path, Path]]:
    """Name to start and end of each other training, as --against gives them."""
    from opd_geometry.geometry.hub import locate

    found = {}
    for text in against:
        name, given, places = text.partition("=")
        start, given_start, end = places.rpartition(",")
        if not (name and given and end) or (given_start and not start) or name in found:
            raise ValueError(
                f"--against {text!r}, expected NAME=END or NAME=START,END, each name "
                "once, such as rlvr=run/step_200"
            )
        found[name] = (locate(start or before), locate(end))
    return found


def _two(betas: str | None) -> tuple[float, float] | None:
    """Betas of Adam."""
    if betas is None:
        return None
    try:
        first, second = map(float, betas.split(","))
    except ValueError:
        raise ValueError(f"--betas {betas}, expected two such as 0.9,0.95") from None
    return first, second


def _optimizer(
    checkpoints: dict[int, Path],
    lr: float | None,
    schedule: tuple[str | None, int | None, int | None],
    betas: tuple[float, float] | None,
) -> tuple["Optimizer | None", str]:
    """What took the steps, as options or the last checkpoint say; and a line of it."""
    from opd_geometry.geometry.rates import UnknownRates, given, left

    name, warmup, whole = schedule
    if lr is None and schedule != (None, None, None):
        raise ValueError(
            "--lr-scheduler, --warmup-steps or --max-steps without --lr, expected it, "
            "too: they say what becomes of a learning rate"
        )
    try:
        if lr is None:
            found = left(checkpoints, betas)
        else:
            last = max(checkpoints)
            found = given(lr, last, name or "constant", warmup or 0, whole, betas)
    except UnknownRates as error:
        return None, f"No walk and no displacement: {error}. Other nulls are measured."
    return found, f"Walk: {found.origin}"


def _names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    return [name.strip() for name in text.split(",") if name.strip()]


def cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _useful(jobs: int, quiet: bool) -> int:
    """So many processes as there are cores for."""
    if jobs > cores() and not quiet:
        _say(f"--jobs {jobs}: there are {cores()} cores, so {cores()} at a time")
    return min(jobs, cores())


def _say(message: str) -> None:
    click.echo(visible(message), err=True)


class _Voice:
    """What a command says: to a person, to a program (JSON), or nothing."""

    def __init__(self, quiet: bool, as_json: bool) -> None:
        self._quiet, self._as_json = quiet, as_json

    def announce(self, plan: "Plan") -> None:
        """What will be measured, and everything that will not be."""
        if self._quiet:
            return
        from opd_geometry.geometry.matching import renamings

        for note in plan.notes:
            _say(f"Note: {note}")
        _say(f"{len(plan.tasks)} matrices, {plan.entries:.3g} entries")
        for line in renamings(plan.renamed):
            _say(f"Matched by path: {line}")
        reasons: dict[str, list[str]] = {}
        for skip in plan.skipped:
            reasons.setdefault(skip.reason, []).append(skip.name)
        for reason, names in reasons.items():
            _say(f"Skipped {len(names)}, {reason}: {_folded(names)}")
        for place in dict.fromkeys(place for _, place in plan.missing):
            names = [name for name, lacking in plan.missing if lacking == place]
            _say(f"Missing {len(names)} in {place}: {_folded(names)}")

    def table(self, title: str, content: tuple[list[str], list[list[str]]]) -> None:
        """A summary, for a person."""
        if not self._quiet and not self._as_json:
            if title:
                click.echo(title)
            print_table(*content)

    def end(self, out: Path, said: list[str], summary: "pd.DataFrame") -> None:
        """Where the table is, what it says, and the command that comes next."""
        page = out.with_suffix(".html")
        command = ["opd-geometry", "report", str(out), "--out", str(page)]
        if self._as_json:
            rows = json.loads(summary.to_json(orient="records", double_precision=15))
            result = {"table": str(out), "sentences": said, "summary": rows}
            click.echo(json.dumps({**result, "next": command}))
        elif not self._quiet:
            click.echo(f"Written to {visible(str(out))}")
            for sentence in said:
                click.echo(sentence)
            click.echo(f"Next: {visible(shlex.join(command))}")


def _folded(names: Iterable[str]) -> str:
    """Names that differ only in the layer as one, with their number."""
    counts = Counter(re.sub(r"\.\d+\.", ".*.", name, count=1) for name in names)
    return ", ".join(
        visible(f"{name} ({n})" if n > 1 else name) for name, n in counts.items()
    )


def _left(plan: "Plan", out: Path, resume: bool) -> "Plan":
    """What of a plan is still to be measured."""
    from opd_geometry.geometry.tables import finished

    return plan.without(finished(out, plan.description)) if resume else plan


def _complete(plan: "Plan", out: Path, quiet: bool) -> bool:
    """Whether a finished table has all that a plan's would; says so."""
    from opd_geometry.geometry.tables import complete

    names = [task.name for task in plan.tasks]
    steps = plan.description.get("steps", ())
    if not complete(out, plan.all_columns, names, steps, plan.description):
        return False
    if not quiet:
        _say(
            f"{out} is complete: it has every matrix, and is left as it is. It does "
            "not tell its options: if they were others, measure anew with --force"
        )
    return True


def _project(forecasts: list[tuple[str, "Plan", list[str], bool]], jobs: int) -> None:
    """How long it will take, before it starts; nothing if nothing is left."""
    from opd_geometry.geometry.forecast import probe_speed, projected_seconds

    left = forecasts[0][1]
    if not left.tasks:
        return
    speed = probe_speed(left)
    for what, plan, metrics, null in forecasts:
        seconds = projected_seconds(plan, speed, metrics, null, jobs)
        _say(f"{what} about {duration(max(1.0, seconds))} on this machine")


def _run(
    plan: "Plan", out: Path, jobs: int, how: tuple[bool, bool], quiet: bool
) -> "pd.DataFrame":
    from opd_geometry.geometry.pairs import run_plan
    from opd_geometry.geometry.tables import partial_path

    resume, force = how
    try:
        with _Display(len(plan.tasks), quiet) as display:
            return run_plan(plan, out, jobs, resume, display.show, force)
    except KeyboardInterrupt:
        kept = partial_path(out)
        raise _Interrupted(
            f"interrupted; finished matrices are kept in {kept}, go on with --resume"
        ) from None


class _Interrupted(click.ClickException):
    exit_code = 130  # as of a process that SIGINT has ended


LINES = 10  # of progress where nobody looks on


class _Display(AbstractContextManager["_Display"]):
    """A bar on a terminal, at most ``LINES`` lines anywhere else."""

    def __init__(self, total: int, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn

        self._bar = Progress(
            *Progress.get_default_columns()[:-1],
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=quiet,
        )
        self._quiet = quiet
        self._terminal = self._bar.console.is_terminal
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> "_Display":
        if self._terminal:
            self._bar.start()
        return self

    def show(self, progress: "Progress") -> None:
        """Tell of a finished matrix."""
        from rich.markup import escape

        done, total = progress.done, progress.total
        name = visible(progress.name)
        if self._terminal:
            self._bar.update(self._task, completed=done, description=escape(name))
        elif not self._quiet and LINES * done // total > LINES * (done - 1) // total:
            _say(f"{done}/{total} {name}, {duration(progress.seconds)}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._terminal:
            self._bar.stop()


def _summary_rows(summary: "pd.DataFrame") -> tuple[list[str], list[list[str]]]:
    """A row a metric, a column a role: more metrics than roles are worth reading."""
    roles = [str(role) for role in summary["role"]]
    rows = [
        [str(name), *(_number(str(name), value) for value in summary[name])]
        for name in summary.columns
        if name != "role"
    ]
    return ["", *roles], rows


def _interval_rows(found: "pd.DataFrame") -> tuple[list[str], list[list[str]]]:
    """A metric a line: its mean, and the ends of its interval."""
    ends = ["mean", "low", "high"]
    rows = [
        [str(row["metric"]), *(_number(str(row["metric"]), row[end]) for end in ends)]
        for _, row in found.iterrows()
    ]
    return ["", *ends], rows


def _expected_rows(
    beside: "pd.DataFrame",
) -> tuple[str, tuple[list[str], list[list[str]]]]:
    """What an update without any place would show at this distance."""
    sources = {word for text in beside["expected_from"] for word in text.split(" and ")}
    title = (
        "Expected at this distance of an update without a place of its own, in closed "
        f"form; the distance is inferred from the {' and '.join(sorted(sources))}."
    )
    rows = [
        [r.metric, *(_number(r.metric, v) for v in (r.measured, r.expected))]
        for r in beside.itertuples()
    ]
    return title, (["", "measured", "expected"], rows)


def _number(name: str, value: float) -> str:
    if value != value:
        return "-"
    if name in ("matrices", "parameters", "step"):
        return str(int(value))
    if name.endswith(WEIGHTED):
        return f"{100 * value:.2f} %"
    return f"{value:.4g}"


def _verdict(plan: "Plan", table: "pd.DataFrame") -> int:
    """What in a table is not to be trusted; the exit code."""
    from opd_geometry.geometry.pairs import REFUSED

    noted = table[table["note"] != ""].drop_duplicates("matrix")
    refused = noted["note"].str.startswith(REFUSED)
    for note, rows in noted[~refused].groupby("note", sort=False):
        _say(f"Warning: {note}; so in {len(rows)} matrices: {_folded(rows['matrix'])}")
    if not refused.any():
        return _measured_share(plan)
    said = "; ".join(
        f"{visible(str(row.matrix))}: {row.note.removeprefix(REFUSED)}"
        for row in noted[refused].itertuples()
    )
    raise ValueError(
        f"{refused.sum()} of {len(plan.tasks)} matrices could not be measured, {said}; "
        "their rows are empty, repair the checkpoint"
    )


def _measured_share(plan: "Plan") -> int:
    """The exit code, and a line where most of the weights were left out."""
    if plan.measured >= 0.5:
        return 0
    raise ValueError(
        f"only {100 * plan.measured:.0f} % of the weights could be measured, expected "
        "most; the lines above say what was skipped or missing, and the table holds "
        "the rest"
    )

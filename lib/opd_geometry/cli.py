"""The shell: ``opd-geometry COMMAND``, each command a few calls of the library.

Errors are one line on stderr and a non-zero exit code. What needs torch is imported
when a command runs, so that ``--help`` answers at once.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from opd_geometry.pair_commands import (
    cores,
    measure_command,
    report_command,
    trajectory_command,
)
from opd_geometry.printing import duration, print_table, visible

if TYPE_CHECKING:
    import pandas as pd

    from opd_geometry.experiments.runs import Run
    from opd_geometry.experiments.schedule import Row

Command = TypeVar("Command", bound=Callable[..., Any])

# Kernels and workers inherit it: a chapter shows results, not bars.
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code, 0 if all went well.

    Args:
        arguments: what follows ``opd-geometry``; of this process if None.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        code = commands.main(arguments, "opd-geometry", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.ClickException as error:
        return _complain(error.format_message(), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _complain("interrupted; the same command goes on from here", 130)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        return _complain(str(error), 1)


def _complain(message: str, code: int) -> int:
    click.echo(f"opd-geometry: {visible(' '.join(message.split()))}", err=True)
    return code


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="opd-geometry")
def commands() -> None:
    """Train, measure and publish: the geometry of on-policy distillation.

    \b
    Examples:
      opd-geometry plan --arms opd,rlvr --seeds 0-4
      opd-geometry run --arms opd,rlvr --seeds 0-4 --jobs 2
      opd-geometry book
      opd-geometry measure path/to/before path/to/after --out table.csv
    """


commands.add_command(measure_command)
commands.add_command(trajectory_command)
commands.add_command(report_command)


# --- options ---------------------------------------------------------------------


def _profile(command: Command) -> Command:
    return click.option(
        "--profile",
        default="laptop",
        show_default=True,
        help="Size of the runs; with other values as NAME:FIELD=VALUE,...",
    )(command)


def _student(command: Command) -> Command:
    return click.option(
        "--student",
        help="Model of profile pretrained: a directory, a GGUF file, or a hub id with "
        "its revision, owner/name@REVISION.",
    )(command)


def _arms(default: str) -> Callable[[Command], Command]:
    return click.option(
        "--arms",
        default=default,
        show_default=True,
        help="Names with commas between, reader (what make book trains) or all.",
    )


def _seeds(command: Command) -> Command:
    return click.option(
        "--seeds", default="0", show_default=True, help="Such as 3, 0,2 or 0-4."
    )(command)


def _jobs(command: Command) -> Command:
    return click.option(
        "--jobs",
        type=click.IntRange(min=1),
        default=cores(),
        show_default="every core",
        help="Runs at a time, one process and one thread each.",
    )(command)


def _cluster(command: Command) -> Command:
    return click.option(
        "--cluster",
        metavar="ADDRESS",
        help="Of a running Dask scheduler, whose workers do it; they share the data "
        "folder. By default workers of this machine.",
    )(command)


def _origin(command: Command) -> Command:
    return click.option(
        "--from",
        "origin",
        type=click.Choice(["committed", "scratch"]),
        default="committed",
        show_default=True,
        help="Start from the published base and teacher, or train these, too.",
    )(command)


# --- training --------------------------------------------------------------------


@commands.command()
@_profile
@_arms("reader")
@_seeds
@_jobs
@_origin
@_student
@_cluster
def run(
    profile: str,
    arms: str,
    seeds: str,
    jobs: int,
    origin: str,
    student: str | None,
    cluster: str | None,
) -> int:
    """Train and measure runs, several at a time, with what they need.

    A run that is finished is left as it is, one that was interrupted goes on.

    \b
    Examples:
      opd-geometry run
      opd-geometry run --profile smoke --arms opd --seeds 0 --jobs 1
      opd-geometry run --profile laptop --arms opd,rlvr --seeds 0-4 --jobs 2
      opd-geometry run --arms all --seeds 0-2 --from scratch
      opd-geometry run --profile pretrained --student path/to/model --arms opd --jobs 1
      opd-geometry run --arms all --seeds 0-4 --jobs 16 --cluster tcp://head:8786
    """
    asked = _asked(profile, arms, seeds, origin, student)
    return _train(profile, asked, jobs, cluster)


@commands.command()
@_profile
@_arms("all")
@_seeds
@_jobs
@_origin
@_student
@click.option("--slurm", is_flag=True, help="Print a SLURM array script of the runs.")
def plan(
    profile: str,
    arms: str,
    seeds: str,
    jobs: int,
    origin: str,
    student: str | None,
    slurm: bool,
) -> None:
    """List runs, their steps and the time they would take.

    \b
    Examples:
      opd-geometry plan --profile laptop --arms opd,rlvr --seeds 0-4
      opd-geometry plan --arms reader --from scratch --jobs 4
      opd-geometry plan --profile pretrained --student gemma-3-270m-q4_k_m.gguf
      opd-geometry plan --profile gpu --slurm > runs.sbatch
    """
    from opd_geometry.experiments.schedule import plan as plan_runs
    from opd_geometry.experiments.schedule import slurm_script

    asked = _asked(profile, arms, seeds, origin, student)
    if slurm:
        given = ["--profile", profile, "--from", origin]
        given += ["--student", student] if student else []
        click.echo(slurm_script(asked, given, jobs), nl=False)
    else:
        from opd_geometry.experiments.profiles import settings_of

        _print_plan(plan_runs(asked), jobs, settings_of(profile).processes)


@commands.command()
@_profile
@_arms("all")
@_seeds
@_origin
@_student
def status(
    profile: str, arms: str, seeds: str, origin: str, student: str | None
) -> None:
    """Show which runs are done, running, failed or still to do.

    \b
    Examples:
      opd-geometry status
      opd-geometry status --profile laptop --arms reader --seeds 0-2
    """
    from opd_geometry.experiments.schedule import plan as plan_runs

    rows = plan_runs(_asked(profile, arms, seeds, origin, student))
    print_table(
        ["run", "state", "step", "accuracy", "time left"],
        [
            [
                row.run.name,
                row.state,
                f"{row.step}/{row.steps}",
                "" if row.accuracy is None else f"{row.accuracy:.2f}",
                "" if row.state == "done" else duration(row.seconds_left),
            ]
            for row in rows
        ],
    )
    _print_reasons(rows)
    click.echo(f"{_tally(rows)}.")


def _print_reasons(rows: "Iterable[Row]") -> None:
    """What failed or is damaged, a line each."""
    for row in rows:
        if row.reason:
            click.echo(f"{row.run.name}: {row.reason}")


def _asked(
    profile: str, arms: str, seeds: str, origin: str, student: str | None = None
) -> "list[Run]":
    """The runs that the options name; errors name what is wrong with them."""
    from opd_geometry.experiments.profiles import build, parse_arms, parse_seeds

    scratch = origin == "scratch"
    return [
        build(profile, arm, seed, scratch, student)
        for seed in parse_seeds(seeds)
        for arm in parse_arms(arms, profile)
    ]


def _print_plan(rows: "list[Row]", jobs: int, gpus: int = 1) -> None:
    """Runs with what each takes, and the time of all of them."""
    from opd_geometry.experiments.forecast import H100, forecast, memory_bytes
    from opd_geometry.experiments.schedule import total_seconds

    taken = [forecast(row.run, gpus) for row in rows]
    large = any(taken)
    columns = ["tokens", "memory a GPU"] if large else []
    print_table(
        ["run", "steps", *columns, "estimated time", "state"],
        [
            [
                row.run.name,
                str(row.steps),
                *(
                    [f"{f.tokens:.2e}", f"{f.memory / 1e9:.0f} GB"]
                    if f
                    else [""] * large * 2
                ),
                duration(f.seconds if f and row.seconds is None else row.seconds),
                row.state,
            ]
            for row, f in zip(rows, taken, strict=True)
        ],
    )
    _print_reasons(rows)
    if large:
        waiting = [f for r, f in zip(rows, taken, strict=True) if r.state != "done"]
        took = duration(sum(f.seconds for f in waiting if f))
        click.echo(
            f"{_tally(rows)}. {gpus} x {H100.name} a run, one run after another: about "
            f"{took}, counted from shapes and rates; nothing was timed."
        )
        for row, f in zip(rows, taken, strict=True):
            if f and f.memory > H100.memory:
                click.echo(
                    f"{row.run.name}: more than such a GPU has; lower "
                    "policy.max_new_tokens, policy.prompts_per_step or sft.micro_batch"
                )
        return
    known = [row for row in rows if row.seconds_left is not None]
    left = duration(total_seconds(known, jobs) if known else None)
    least = "at least " if 0 < len(known) < len(rows) else ""
    click.echo(f"{_tally(rows)}. Time left, {jobs} at a time: {least}{left}.")
    memory = max((memory_bytes(row.run) or 0.0 for row in rows), default=0.0)
    if memory:
        click.echo(f"Memory: about {memory / 1e9:.1f} GB a run.")


def _train(
    profile: str, runs: "list[Run]", jobs: int, cluster: str | None = None
) -> int:
    """Train, and say in one line each what failed; the exit code."""
    from opd_geometry.experiments.schedule import train_all

    failed = train_all(profile, runs, jobs, None, cluster)
    for one, reason in failed.items():
        _complain(f"{one.name}: {reason}", 1)
    return 1 if failed else 0


def _tally(rows: "Iterable[Row]") -> str:
    """How many runs are in which state."""
    states = [row.state for row in rows]
    known = ("done", "damaged", "running", "failed", "to do")
    return ", ".join(f"{states.count(s)} {s}" for s in known if s in states)


# --- measurements ----------------------------------------------------------------


@commands.command()
@_profile
@_arms("all")
@_seeds
@_student
@click.option(
    "--endings",
    is_flag=True,
    help="Only permutations, turned updates and energies at the end; they count for "
    "runs whose committed tables have none.",
)
def commit(
    profile: str, arms: str, seeds: str, student: str | None, endings: bool
) -> int:
    """Publish the measurements of finished runs.

    Their tables and provenance go to data/measurements. Rows of the same arm and
    seed are replaced, all others stay.

    \b
    Examples:
      opd-geometry commit --seeds 0-2
      opd-geometry commit --profile laptop --arms opd,rlvr --seeds 3
      opd-geometry commit --endings --arms sgd --seeds 0
    """
    from opd_geometry.experiments import endings as ends
    from opd_geometry.experiments import measure
    from opd_geometry.experiments.runs import is_done

    runs = _asked(profile, arms, seeds, "committed", student)
    done = [run for run in runs if is_done(run)]
    if endings and not done:
        raise ValueError(
            f"none of the {len(runs)} runs is finished here: expected one at least; "
            "train with opd-geometry run"
        )
    if endings:
        for run in done:
            ends.commit_endings(profile, ends.ending_table(run))
            click.echo(f"end of {run.name}")
        return 0
    path, left_out = measure.commit(profile, done)
    n_new = len(done) - len(left_out)
    click.echo(f"{n_new} of {len(runs)} runs are finished and now in {path}")
    for one, reason in left_out.items():
        _complain(f"{one.name}: {reason}", 1)
    return 1 if left_out else 0


@commands.command()
@_profile
@_arms("all")
@_seeds
@_student
@click.option(
    "--frozen",
    is_flag=True,
    help="Only what optimizers make of gradients that stay those of the start; as many "
    "batches as the run has steps.",
)
def starts(
    profile: str, arms: str, seeds: str, student: str | None, frozen: bool
) -> int:
    """Publish what runs start from: their weights, and the signal of their gradients.

    Nothing is trained but what a run starts from. The weights of a start are read where
    a run from it is finished; the gradients of 16 batches an arm and seed need no run.

    \b
    Examples:
      opd-geometry starts --profile published --arms sft,opd,rlvr --seeds 0-2
      opd-geometry starts --profile published --arms opd,rlvr --frozen
    """
    import pandas as pd

    from opd_geometry.experiments import frozen as stays
    from opd_geometry.experiments import signal, weights
    from opd_geometry.experiments.runs import is_done

    runs = _asked(profile, arms, seeds, "committed", student)
    if frozen:
        for run in runs:
            click.echo(f"{run.name}: {run.train.steps} batches", err=True)
            stays.commit_frozen(profile, stays.frozen_table(run))
            click.echo(f"frozen gradients of {run.name}")
        return 0
    for run in runs:
        signal.commit_signals(profile, signal.signal_table(run))
        click.echo(f"signal of {run.name}")
    origins = {run.start: run for run in runs[::-1] if is_done(run)}
    if origins:
        table = pd.concat(map(weights.weights_table, [*origins.values()][::-1]))
        weights.commit_weights(profile, table)
    return 0


@commands.command()
@_profile
@_arms("all")
@_seeds
@_student
def pairs(profile: str, arms: str, seeds: str, student: str | None) -> int:
    """Publish where finished runs end relative to each other.

    Pairs of arms from one anchor, and of one arm's seeds: cosine, shared subspaces and
    masks of their final updates, beside what two unrelated updates share; and the
    cosine of what they added between checkpoints.

    \b
    Examples:
      opd-geometry pairs --profile published --arms sft,opd,rlvr --seeds 0-2
    """
    from opd_geometry.experiments import ends
    from opd_geometry.experiments.profiles import settings_of
    from opd_geometry.experiments.runs import is_done

    runs = [
        run
        for run in _asked(profile, arms, seeds, "committed", student)
        if is_done(run)
    ]
    found = [*ends.same_anchor(runs), *ends.other_seeds(runs)]
    if not found:
        raise ValueError(
            f"{len(runs)} finished runs and no pair of them: expected two arms of one "
            "seed, or two seeds of one arm; train with opd-geometry run"
        )
    table = ends.pair_table(found, settings_of(profile).rank)
    ends.commit_windows(profile, ends.window_table(found))
    click.echo(f"{len(found)} pairs are now in {ends.commit_pairs(profile, table)}")
    return 0


@commands.command()
@_profile
@_arms("base,teacher")
def checkpoints(profile: str, arms: str) -> None:
    """Publish the last checkpoints of finished runs, in bf16.

    They go to data/checkpoints: by default the base and the teacher that were
    trained from scratch (runs that start from them get new names), of other arms
    the run with seed 0, such as the two that the chapter on own checkpoints compares.

    \b
    Examples:
      opd-geometry run --arms base,teacher --from scratch --jobs 2
      opd-geometry checkpoints
      opd-geometry checkpoints --arms sft,opd
    """
    from opd_geometry.experiments.profiles import STAGES, build, parse_arms
    from opd_geometry.experiments.runs import store

    for arm in parse_arms(arms, profile):
        stage = arm in STAGES
        source = f"checkpoints/{profile}-{arm}{'' if stage else '-s0'}"
        kept = store(build(profile, arm, 0, from_scratch=stage), source)
        click.echo(f"{arm} is now in data/{source}, digest {kept.digest}")


@commands.command()
@click.option("--profile", help="One world only; the rows of the others are kept.")
@click.option(
    "--against",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="An earlier claims.csv: prints its verdicts beside the new ones, and why.",
)
def claims(profile: str | None, against: Path | None) -> None:
    """Judge every claim on the committed measurements, in every world.

    Writes data/claims.csv.

    \b
    Examples:
      opd-geometry claims
      opd-geometry claims --profile laptop
      opd-geometry claims --against earlier.csv
    """
    from opd_geometry.analysis import regimes
    from opd_geometry.analysis.claims import (
        read_claims,
        verdict_changes,
        with_other_worlds,
        write_claims,
    )
    from opd_geometry.experiments.committed import committed, provenance_path
    from opd_geometry.experiments.profiles import settings_of
    from opd_geometry.files import data_directory

    tables = {}
    for name in regimes.WORLDS if profile is None else [profile]:
        settings_of(name)
        tables[name] = committed(name, regimes.ASKED)
        if tables[name].empty:
            raise ValueError(
                f"no committed measurements of profile {name!r}: expected some below "
                f"{provenance_path().parent}; train with opd-geometry run, "
                "then opd-geometry commit"
            )
    earlier = None if against is None else read_claims(against)
    path = data_directory() / "claims.csv"
    findings = regimes.claims_in_worlds(tables)
    if path.is_file():
        findings = with_other_worlds(findings, read_claims(path), path)
    write_claims(findings, path)
    shown = findings[["id", "world", "n_seeds", "verdict", "verdict_in_regime"]]
    if earlier is not None:
        shown = verdict_changes(earlier, read_claims(path))
    columns = [name.replace("_", " ") for name in shown.columns]
    print_table(columns, [[str(cell) for cell in row] for row in shown.to_numpy()])
    click.echo(f"Written to {path}")


@commands.command()
@click.option(
    "--sample", type=click.IntRange(min=1), required=True, help="How many runs."
)
@click.option(
    "--profile", default="published", show_default=True, help="Size of the runs."
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of the draw: another one draws other runs.",
)
@_arms("all")
@_jobs
@_student
def audit(
    sample: int, profile: str, seed: int, arms: str, jobs: int, student: str | None
) -> int:
    """Train some committed runs anew, and compare.

    Draws N of the committed runs, trains each with all it starts from below
    data/audit, measures it, and holds each metric at the end of training against the
    committed runs of its arm. The spread of a metric is the highest minus the lowest
    value of the other committed seeds, and at least a thousandth of the value. A fresh
    value lies outside when it is further than that from the committed value of the
    same seed; then the command fails. Arms with fewer than three committed seeds are
    not drawn.

    On the processor kind of the committed runs fresh values are equal to the digits
    that are committed. On another kind the weights part after some steps, by less
    than seeds differ, if all is well.

    What was trained is kept until all is well: interrupted, the same command goes on,
    and with another library it begins anew.

    \b
    Examples:
      opd-geometry audit --sample 3
      opd-geometry audit --sample 1 --seed 7 --arms sft,opd --jobs 1
      opd-geometry audit --sample 3 --profile pretrained --student path/to/model
    """
    from opd_geometry.analysis import audit as audits
    from opd_geometry.experiments.profiles import parse_arms
    from opd_geometry.experiments.schedule import plan as plan_runs

    runs = audits.draw(profile, sample, seed, parse_arms(arms, profile), student)
    with audits.apart() as place:
        click.echo(
            f"Drawn with seed {seed}: {', '.join(run.name for run in runs)}; "
            f"{audits.machines(runs)}"
        )
        if said := audits.taught_anew(runs):
            click.echo(said)
        _print_plan(plan_runs(runs), jobs)
        if code := _train(profile, runs, jobs):
            return code
        found = {run: audits.audited(profile, run) for run in runs}
        outside = [line for run in runs for line in _print_audit(run, found[run])]
        if not outside:
            audits.clear(place)
    n_values = sum(len(rows) for rows in found.values())
    if outside:
        return _complain(
            f"{len(outside)} of {n_values} values lie outside the committed spread: "
            f"{', '.join(outside)}; what was trained is kept in {place}",
            1,
        )
    click.echo(f"{n_values} values of {len(runs)} runs lie within the committed spread")
    return 0


def _print_audit(run: "Run", rows: "pd.DataFrame") -> list[str]:
    """A table of one audited run; what lies outside, in a few words each."""
    numbers = ["fresh", "committed", "lowest", "highest", "distance"]
    click.echo(f"\n{run.name}, distance in units of the other seeds' spread")
    print_table(
        ["metric", "fresh", "committed", "lowest", "highest", "distance", ""],
        [
            [
                str(metric),
                *(f"{row[name]:.4g}" for name in numbers),
                "outside" if row["outside"] else "",
            ]
            for metric, row in rows.iterrows()
        ],
    )
    return [
        f"{metric} of {run.arm}-s{run.seed} by {distance:.3g} spreads"
        for metric, distance in rows["distance"][rows["outside"]].items()
    ]


# --- the book --------------------------------------------------------------------


@commands.command()
@click.option("--profile", help="Instead of the notebooks' own default.")
@click.option("--seeds", help="Instead of the notebooks' own default.")
@click.argument("names", nargs=-1)
def chapters(profile: str | None, seeds: str | None, names: tuple[str, ...]) -> None:
    """Execute the published chapters again, all or those named.

    With the notebooks' own defaults the notebooks get the same outputs, which the
    tests then compare with what they print when run again. Of a checkout that is
    read-only the chapters come to _build/chapters beside the data.

    \b
    Examples:
      opd-geometry chapters
      opd-geometry chapters --profile laptop --seeds 0-2 03_rank
    """
    from opd_geometry.book.site import execute_chapter, known_parameters

    root = repository()
    given = {"profile": profile, "seeds": seeds}
    parameters = {name: value for name, value in given.items() if value is not None}
    own = os.access(root, os.W_OK)
    folder = root / "book" / "chapters" if own else builds(root) / "chapters"
    for notebook in _notebooks(root, names):
        output = folder / notebook.name
        known = known_parameters(notebook, parameters)
        execute_chapter(notebook, output, known, root)
        if own and not known:
            shutil.copyfile(output, notebook)
        click.echo(f"Executed {output.relative_to(root) if own else output}")


@commands.command()
@_profile
@_seeds
@_jobs
@_origin
@_student
def book(profile: str, seeds: str, jobs: int, origin: str, student: str | None) -> int:
    """Train on this machine and build a book of these runs.

    It lies under _build/book. What is not trained by default is read from the
    committed measurements, and the pages say so. The published chapters stay as
    they are.

    \b
    Examples:
      opd-geometry book
      opd-geometry book --profile laptop --seeds 0-2 --jobs 4 --from scratch
      opd-geometry book --profile pretrained --student path/to/model --jobs 1
    """
    from opd_geometry.analysis.claims import write_claims
    from opd_geometry.analysis.regimes import claims_in_worlds
    from opd_geometry.book.own import against_published
    from opd_geometry.book.site import execute_chapter, known_parameters, read_notebook
    from opd_geometry.experiments import measure
    from opd_geometry.experiments.profiles import ARMS, PUBLISHED, parse_seeds

    root = repository()
    notebooks = _notebooks(root, ())
    for notebook in notebooks:
        read_notebook(notebook)  # a broken one must not cost the training first
    source = "scratch" if origin == "scratch" else "local"
    if code := _train(profile, _own_runs(profile, seeds, origin, student), jobs):
        return code
    parameters = {"profile": profile, "seeds": seeds, "source": source, "jobs": jobs}
    executed, place = [], builds(root) / "book"
    for notebook in notebooks:
        output = place / "chapters" / notebook.name
        known = known_parameters(notebook, parameters)
        if student and "profile" in known:  # no notebook needs to name it
            known["student"] = student
        execute_chapter(notebook, output, known, root)
        executed.append(output)
        click.echo(f"Executed {output.relative_to(place.parents[1])}")
    numbers = parse_seeds(seeds)
    table, provenance = measure.load(profile, ARMS, numbers, source, student)
    own = place / "claims.csv"
    write_claims(claims_in_worlds({profile: table}), own)
    banner = f"Your own run, not the published one. {describe(profile, provenance)}"
    beside = None
    if not student and profile in ("laptop", PUBLISHED):  # the same runs by other names
        beside = against_published(table, measure.committed(PUBLISHED), ARMS)
    return _build(root, "book", executed, own, banner, beside)


@commands.command()
def site() -> int:
    """Build the published chapters, training nothing.

    The pages lie under _build/site. Fails, after building, if a page has a fault or a
    chapter was executed from another notebook or library than those in the checkout.

    \b
    Examples:
      opd-geometry site
    """
    from opd_geometry.experiments.measure import committed_provenance, committed_runs
    from opd_geometry.experiments.profiles import PUBLISHED
    from opd_geometry.experiments.runs import on_shelf
    from opd_geometry.sources import stale_chapters

    root = repository()
    published = sorted((root / "book" / "chapters").glob("*.ipynb"))
    listed = committed_provenance()
    told: dict[str, str] = {}
    for profile in (PUBLISHED, "pretrained"):
        runs = [run.key() for run in committed_runs(profile)]
        rows = listed[listed["run"].isin(runs)]
        told |= {profile: describe(profile, rows)} if len(rows) else {}
    if PUBLISHED not in told:
        raise ValueError(
            f"no committed measurements of profile {PUBLISHED}: a page has to say "
            "where its numbers come from; take data/ from version control"
        )
    stale = stale_chapters(root)
    for line in stale:
        _complain(line, 1)
    banner = " ".join(told.values())
    code = _build(root, "site", published, on_shelf("claims.csv"), banner)
    return code or int(bool(stale))


def repository() -> Path:
    """The checkout that this library is installed from.

    Raises:
        ValueError: the library was copied elsewhere, away from notebooks and pages.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "_toc.yml").is_file():
        raise ValueError(
            f"no book beside {Path(__file__).parent}: expected a checkout of the "
            "repository, installed with pip install -e ."
        )
    return root


def builds(root: Path) -> Path:
    """Where books are built: in the checkout, or beside the data if it is read-only."""
    from opd_geometry.files import data_directory

    return (root if os.access(root, os.W_OK) else data_directory()) / "_build"


def _notebooks(root: Path, names: Sequence[str]) -> list[Path]:
    """The notebooks of the names, with or without suffix; all if none is given."""
    there = sorted(root.glob("notebooks/[0-9A-Z]*_*.ipynb"))
    known = {path.stem: path for path in there}
    wanted = [Path(name).stem for name in names] or list(known)
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise ValueError(
            f"no notebook {', '.join(unknown)} in {root / 'notebooks'}; expected "
            f"{', '.join(known) or 'NN_slug.ipynb'}"
        )
    return [known[name] for name in wanted]


def _own_runs(
    profile: str, seeds: str, origin: str, student: str | None = None
) -> "list[Run]":
    """What ``book`` trains: the reader's arms, and any that is not committed."""
    from opd_geometry.experiments.measure import committed_provenance
    from opd_geometry.experiments.profiles import READER_ARMS

    shelf = set(committed_provenance()["run"])
    published = zip(
        _asked(profile, "all", seeds, "committed", student),
        _asked(profile, "all", seeds, origin, student),
        strict=True,
    )
    return [
        own
        for theirs, own in published
        if own.arm in READER_ARMS or theirs.key() not in shelf
    ]


def describe(profile: str, provenance: "pd.DataFrame") -> str:
    """Profile, seeds and machines that numbers come from, in a sentence or two.

    Args:
        profile: its name.
        provenance: rows with seed and machine, and with source if of ``measure.load``.
    """
    seeds = ", ".join(str(seed) for seed in sorted(set(provenance["seed"])))
    said = f"Profile {profile}, seed {seeds}." if seeds.isdecimal() else ""
    said = said or f"Profile {profile}, seeds {seeds}."
    sources = (
        provenance.groupby("source") if "source" in provenance else [("", provenance)]
    )
    for source, rows in sources:
        machines = "; ".join(sorted(set(rows["machine"].astype(str))))
        runs = "1 run" if len(rows) == 1 else f"{len(rows)} runs"
        kind = "read from the committed measurements" if source == "committed" else ""
        kind = kind or ("trained here" if source else "")
        said += f" {runs}{kind and f' {kind}'} ({machines})."
    return said


def _build(
    root: Path,
    name: str,
    pages: list[Path],
    claims_csv: Path,
    banner: str,
    beside: "pd.DataFrame | None" = None,
) -> int:
    """Stage, build and check a book under _build/NAME; the exit code.

    A reader's own one has a page that holds it beside the published runs.
    """
    from opd_geometry.book import own
    from opd_geometry.book import site as pages_of
    from opd_geometry.book.explorer import write_data

    place = builds(root) / name
    source = pages_of.stage_site(root, place / "source", pages, banner)
    pages_of.add_claims(source, claims_csv)
    pages_of.add_hero(source)
    if beside is not None and len(beside):
        pages_of.add_page(source, "yours", own.page(beside))
        own.bands(beside).savefig(source / "book" / own.PICTURE)
    write_data(source / "book" / "_static" / "explorer-data.js")
    page = pages_of.build_site(source, place / "html")
    problems = pages_of.check_site(place / "html", source)
    for problem in problems:
        _complain(problem, 1)
    click.echo(f"Open {page}")
    return 1 if problems else 0

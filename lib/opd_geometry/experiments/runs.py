"""A run is a frozen description; its hash names a directory; asking for it fills it.

``ensure(run)`` returns a finished run's directory: at once if it is there, by resuming
if it was interrupted, by training otherwise. What a run starts from (its anchor, the
run it branches from) is ensured first. A run killed at any point and asked for again
ends with the same bits as one that was never killed; two processes that ask for one run
do the work once.

Layout of ``data/runs/ARM-sSEED-HASH/``:

- ``run.json``: the description; ``checkpoints/step-000020/``: float32 master weights as
  an ordinary Hugging Face checkpoint, step 0 being what the run started from (of a
  pretrained student, see ``is_lean``, only what is measured there);
- ``state.pt``: weights, moments, history and step to resume from; ``branch.pt``: the
  same at the step where projected runs branch off;
- ``progress.json``: for whoever watches; ``done.json``: written last, ``failed.json``:
  why the last attempt ended (see ``schedule``); ``lock``: held while it trains, with
  whose it is;
- ``NAME.sha256``: the digest of whatever weights or numbers are read again, checked
  before they are (see ``records``).

Runs are trained below the data directory that ``OPD_GEOMETRY_DATA`` names. What is
committed is looked for there first and then in the checkout, which may be read-only.
"""

import dataclasses
import platform
import shutil
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import opd_geometry
from opd_geometry.experiments import processes as ranks_of
from opd_geometry.experiments import records
from opd_geometry.experiments.descriptions import (
    ProjectionConfig,
    Run,
    Stored,
    is_lean,
    list_of,
    run_directory,
    stored,
    students_directory,
)
from opd_geometry.files import clear_write_errors, data_directory, on_shelf, replacing
from opd_geometry.geometry import spectra
from opd_geometry.geometry.checkpoints import Matrix, list_matrices
from opd_geometry.geometry.projection import (
    project_gradients,
    project_updates,
    random_subspace,
)
from opd_geometry.training import evaluation, models, ranks, tasks
from opd_geometry.training.data import DataConfig
from opd_geometry.training.optimizer import bfloat16_copy, optimizer_of
from opd_geometry.training.policy import PolicyConfig, policy_steps
from opd_geometry.training.samplers import EngineSampler
from opd_geometry.training.sft import SFTConfig, sft_steps
from opd_geometry.training.students import Student, prepare
from opd_geometry.training.tracking import Log, tracked

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD_OUT = "held-out"  # the part of a dataset that accuracy is measured on


def store(run: Run, source: str) -> Stored:
    """Put a finished run's last checkpoint, in bf16, where ``stored`` finds it.

    Args:
        run: a base, a teacher, or a run to give away.
        source: directory, relative to the data directory.

    Raises:
        ValueError: the run is not finished.
    """
    if not is_done(run):
        raise ValueError(
            f"{run.arm} is not trained yet; run opd-geometry run --arms {run.arm} "
            "first, of the base and the teacher with --from scratch"
        )
    model, tokenizer = models.load_model(checkpoint(run))
    directory = data_directory() / source
    list_of(directory).unlink(missing_ok=True)
    models.save_model(model, tokenizer, directory, dtype=torch.bfloat16)
    files = sorted(path for path in directory.iterdir() if path.is_file())
    digests = ((records.digest_of(path), path.name) for path in files)
    lines = [f"{digest}  {directory.name}/{name}\n" for digest, name in digests]
    with replacing(list_of(directory)) as draft:
        draft.write_text("".join(lines))
    return stored(source)


def checkpoint(run: Run, step: int | None = None) -> Path:
    """Directory of a finished run's checkpoint (None: the last one)."""
    step = run.train.steps if step is None else step
    if step == 0 and is_lean(run):
        if isinstance(run.start, Run):  # shared by all that start from it
            return run_directory(run.start) / "checkpoints" / "rounded"
        assert isinstance(run.start, Student)
        return prepare(run.start, students_directory())
    return run_directory(run) / "checkpoints" / f"step-{step:06d}"


def is_done(run: Run) -> bool:
    """Whether a run is finished."""
    return (run_directory(run) / "done.json").is_file()


def ensure(run: Run, processes: int = 1) -> Path:
    """Return the directory of a finished run, training or resuming it if need be.

    Args:
        run: the run; what it needs is ensured first.
        processes: that train it together (see ``ranks``).

    Raises:
        ValueError: one line; what a run starts from is missing or broken, or the
            directory cannot be written.
    """
    directory = run_directory(run)
    if is_done(run):
        return directory
    for needed in run.needs:
        ensure(needed, processes)
    check_headroom(run)
    with clear_write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with records.locked(directory / "lock", run.name), one_thread():
            if not is_done(run):  # another process may have finished it meanwhile
                if processes > 1:
                    ranks_of.run(train, run, processes)
                else:
                    train(run)
    return directory


@contextmanager
def _clear_memory_errors(run: Run) -> Iterator[None]:
    """Name the setting to lower where a GPU's memory is too small."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        policy = isinstance(run.train, PolicyConfig)
        setting = "micro_prompts" if policy else "micro_batch"
        given = getattr(run.train, setting)
        raise ValueError(
            f"out of GPU memory with {setting} {given}: lower it (it changes memory "
            "and no result), or max_new_tokens, or take a smaller teacher; what was "
            "stored is resumed"
        ) from error


def is_running(run: Run) -> bool:
    """Whether some process holds the run's lock."""
    directory = run_directory(run)
    return directory.is_dir() and records.is_locked(directory / "lock")


def progress(run: Run) -> dict[str, Any]:
    """What a run last said of itself: step, steps, accuracy, wall_seconds; or {}.

    Raises:
        ValueError: it is finished, and its ``done.json`` is damaged.
    """
    try:
        return recorded(run)
    except ValueError:
        if is_done(run):
            raise
        return {}  # the other record is for watching only


def recorded(run: Run) -> dict[str, Any]:
    """The same, where damage to either record is an error.

    Raises:
        ValueError: one line with the file and what is wrong with it.
    """
    directory = run_directory(run)
    if (directory / "done.json").is_file():
        return records.read_json(directory / "done.json", DONE)
    if (directory / "progress.json").is_file():
        return records.read_json(directory / "progress.json", SUMMARY)
    return {}


def history(run: Run) -> list[dict[str, Any]]:
    """A finished run's per-step metrics and evaluations: step, metric, value."""
    return records.read_history(run_directory(run) / "history.json")


def starting_model(run: Run) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The weights W_0 that a run starts from, in float32, and its tokenizer.

    What another stage hands over is rounded to bf16 first, as a published checkpoint
    is.
    """
    if isinstance(run.start, models.ModelConfig):
        return models.build_model(run.start, run.seed), models.character_tokenizer()
    model, tokenizer = models.load_model(_location(run.start))
    if isinstance(run.start, Student):
        return model, tokenizer
    return models.round_to_bfloat16(model), tokenizer


def starting_matrices(run: Run) -> list[Matrix]:
    """The matrices of the weights that a run starts from, once those are there."""
    if isinstance(run.start, models.ModelConfig):
        return list_matrices(sound_checkpoint(run, 0))
    return list_matrices(_location(run.start))


def _location(source: Student | Stored | Run) -> Path | str:
    """Where a student, a stored checkpoint or a run's last checkpoint lies."""
    if isinstance(source, Student):
        return prepare(source, students_directory())
    if isinstance(source, Run):
        return sound_checkpoint(source)
    local = on_shelf(source.source)
    return local if local.exists() else source.source


def sound_checkpoint(run: Run, step: int | None = None) -> Path:
    """``checkpoint``, once its weights are known to be those that were stored.

    Raises:
        ValueError: they are not.
    """
    place = checkpoint(run, step)
    if place.is_dir():
        for weights in place.glob("*.safetensors"):
            _check(run, weights)
    return place


def _check(run: Run, path: Path) -> bool:
    """``check_seal``, with what to do in the error."""
    try:
        return records.check_seal(path)
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: {error}; remove {run_directory(run)} to train that "
            "run anew"
        ) from error


def _store_checkpoint(
    run: Run,
    step: int,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
) -> None:
    lean = is_lean(run)
    dtype = torch.bfloat16 if lean and step == 0 else None
    only = ATTENTION if lean and step not in _whole(run) else None
    models.save_model(model, tokenizer, checkpoint(run, step), dtype, only)
    if ranks.index() == 0:
        for weights in checkpoint(run, step).glob("*.safetensors"):
            records.seal(weights)


def train(run: Run) -> None:
    """Train from the last saved state to the end; whoever calls it holds the lock.

    Ranks call it together, and the first of them writes.
    """
    with _clear_memory_errors(run):
        _train(run)


def _train(run: Run) -> None:
    began, directory = time.monotonic(), run_directory(run)
    writes = ranks.index() == 0
    if writes:
        _clear_drafts(directory)
        (directory / "failed.json").unlink(missing_ok=True)
        records.write_json(directory / "run.json", dataclasses.asdict(run))
    model, tokenizer = starting_model(run)
    models.check_reads_tasks(tokenizer)
    if writes and not (checkpoint(run, 0) / "config.json").is_file():
        _store_checkpoint(run, 0, model, tokenizer)
    if run.train.sharded and ranks.count() > 1:
        _check_shardable(run)
        ranks.shard(model, low=run.train.mixed_precision == "bf16-copy")
    optimizer = optimizer_of(model, run.train.optimizer)
    state = _restore(run, model, optimizer)
    if run.projection is not None:
        _confine(run, run.projection, model, optimizer)
    usual = "tensorboard" if run.train.dataset else "none"
    with tracked(run.name, directory / "events", usual) as log:
        _UnderWay(run, model, tokenizer, optimizer, state).take_steps(log, began)
    if not writes:
        return
    records.write_sealed_json(directory / "history.json", {"records": state["history"]})
    records.write_sealed_json(
        directory / "done.json", {**_summary(run, state), **provenance()}
    )
    records.unseal(directory / "state.pt")
    clear_failure(run)


@dataclass(frozen=True)
class _UnderWay:
    """A run that is being trained.

    Attributes:
        run: which.
        model, tokenizer, optimizer: what is trained, and by what.
        state: ``step``, ``history`` and ``wall_seconds`` so far.
    """

    run: Run
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    optimizer: Optimizer
    state: dict[str, Any]

    def take_steps(self, log: Log, began: float) -> None:
        """All that are left, storing what is asked, and what is resumed if killed."""
        run, state, directory = self.run, self.state, run_directory(self.run)
        trained = self.model, self.tokenizer
        wanted, spent = run.checkpoint_steps(), state["wall_seconds"]
        save_every = max(1, run.train.steps // (5 if is_lean(run) else 20))
        for metrics in loop_of(run, *trained, self.optimizer, state["step"]):
            step = state["step"] = state["step"] + 1
            state["history"] += _records(step, metrics)
            if step in wanted:
                _store_checkpoint(run, step, *trained)
                with ranks.whole_weights(self.model):
                    scores = _evaluate(run, *trained, step)
                state["history"] += _records(step, scores)
                metrics = metrics | scores
            log(metrics, step)
            state["wall_seconds"] = spent + time.monotonic() - began
            # the branch first: a run resumed after this step would not save it again
            if step == run.branch_step() and run.branch is None:
                self.save(directory / "branch.pt")
            if step in wanted or step % save_every == 0:
                self.save(directory / "state.pt")
            if ranks.index() == 0:
                records.write_json(directory / "progress.json", _summary(run, state))

    def save(self, path: Path) -> None:
        """Store everything a resumed run needs, whole or not at all.

        Any number of processes can go on from it, sharded or not.
        """
        content = {
            **self.state,
            "model": ranks.whole(self.model.state_dict()),
            "optimizer": ranks.whole(self.optimizer.state_dict()),
        }
        if ranks.index() > 0:
            return
        # through an open file: only then does a full disk come as an OSError, wrapped
        with records.sealing(path) as draft, open(draft, "wb") as file:
            torch.save(content, file)


def _check_shardable(run: Run) -> None:
    if run.projection is not None:
        raise ValueError(
            f"run {run.arm}: its updates are confined to a subspace, which is of whole "
            "matrices: expected whole weights in every process; set sharded=false"
        )


def clear_failure(run: Run) -> None:
    """Forget why an earlier attempt failed: the run, or its table, is finished."""
    with suppress(OSError):  # a folder that cannot be written
        (run_directory(run) / "failed.json").unlink(missing_ok=True)


# What is measured along the way of a lean run: the paper's trajectories (section 4).
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def _whole(run: Run) -> tuple[int, int, int]:
    """Steps at which a lean run stores every weight."""
    return 0, run.branch_step(), run.train.steps


def loop_of(
    run: Run,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    optimizer: Optimizer,
    first_step: int,
) -> Iterator[dict[str, float]]:
    """The run's training loop, from ``first_step``."""
    if isinstance(run.train, SFTConfig):
        return sft_steps(
            run.train, model, tokenizer, optimizer, seed=run.seed, first_step=first_step
        )
    teacher = None
    if run.teacher is not None and run.train.needs_teacher:
        usual = "bfloat16" if run.train.dataset else "float32"
        own: torch.dtype = getattr(torch, run.train.teacher_dtype or usual)
        teacher, theirs = models.load_model(_location(run.teacher), own)
        models.check_same_vocabulary(tokenizer, theirs)
        if run.teacher == run.start:  # as it is handed over: the student at step 0
            teacher = models.round_to_bfloat16(teacher)
        copied = run.train.mixed_precision == "bf16-copy" and own == torch.float32
        if copied and not run.train.teacher_dtype:
            teacher = bfloat16_copy(teacher)
    sampler = None
    if run.train.sampler == "vllm":
        sampler = EngineSampler(
            checkpoint(run, 0),
            tokenizer,
            run.train.max_new_tokens,
            low=run.train.mixed_precision != "no",
            memory=run.train.sampler_memory,
        )
    return policy_steps(
        run.train,
        model,
        teacher,
        tokenizer,
        optimizer,
        seed=run.seed,
        first_step=first_step,
        sampler=sampler,
    )


def _confine(
    run: Run, projection: ProjectionConfig, model: nn.Module, optimizer: Optimizer
) -> None:
    """Put the projection on the optimizer, for every weight matrix of the model."""
    bases, parameters = confining_bases(run), dict(model.named_parameters())
    project = project_gradients if projection.form == "gradient" else project_updates
    project(optimizer, {parameters[name]: basis for name, basis in bases.items()})


def confining_bases(run: Run) -> dict[str, Tensor]:
    """The right subspaces that a projected run is confined to.

    Args:
        run: with a projection; the run it branches from, and a donor, are finished.

    Returns:
        Name of a weight matrix to V_K, (n_cols, K).
    """
    assert run.branch is not None
    assert run.projection is not None
    giver, rank = run.donor or run.branch, run.projection.rank
    origin, _ = models.load_model(sound_checkpoint(giver, 0))
    early, _ = models.load_model(sound_checkpoint(giver, giver.branch_step()))
    after = dict(early.named_parameters())
    generator = torch.Generator().manual_seed(run.seed)
    bases = {}
    for name, parameter in origin.named_parameters():
        if parameter.ndim != 2:
            continue
        w_before, w_after = parameter.detach(), after[name].detach()
        if run.projection.subspace in ("own", "donor"):
            bases[name] = spectra.top_right_subspace(w_after - w_before, rank)
        elif run.projection.subspace == "pretrained":
            bases[name] = spectra.top_right_subspace(w_before, rank)
        else:
            bases[name] = random_subspace(parameter.shape[1], rank, generator)
    return bases


HELD_OUT_PROBLEMS = 64
LEAN_PROBLEMS = 128, 256, 512  # on the way, at the end, at the end of the trained task
LEAN_TOKENS = 24  # longest completion
Question = tuple[str, str | DataConfig, dict[str, Any]]


def _evaluate(run: Run, model: Any, tokenizer: Any, step: int) -> dict[str, float]:
    """Sampled accuracies at a checkpoint: of one task, of everything at the last."""
    low = run.train.dataset and run.train.mixed_precision == "bf16-copy"
    if (low or is_lean(run)) and not ranks.is_sharded(model):
        model = bfloat16_copy(model)
    return {
        metric: evaluation.accuracy(model, tokenizer, asked, **how)
        for metric, asked, how in _questions(run, step == run.train.steps)
    }


def _questions(run: Run, at_end: bool) -> Iterator[Question]:
    """Metric, benchmark or dataset, and how it is asked.

    A pretrained student is asked what belongs to the task that it is trained on, a
    dataset's for its held-out problems at the training's length.
    """
    main = trained_task(run)
    early, other, own, greedy = {}, {"samples": 4}, {"samples": 4}, {}
    benchmarks: Iterable[str] = tasks.BENCHMARKS
    if is_lean(run):
        how = {"samples": 1, "max_new_tokens": LEAN_TOKENS}
        early, other, own = (how | {"problems": n} for n in LEAN_PROBLEMS)
        benchmarks, greedy = tasks.related(main), other
    elif run.train.dataset is not None:
        longest = getattr(run.train, "max_new_tokens", 1024)
        how = {"problems": HELD_OUT_PROBLEMS, "samples": 1, "max_new_tokens": longest}
        yield f"accuracy/{HELD_OUT}", run.train.dataset, how
        return
    kind = tasks.short_name(main)
    if not at_end:
        yield f"accuracy/{kind}", main, early
        return
    for name in benchmarks:
        how = own if name == main else other
        yield f"accuracy/{tasks.short_name(name)}", name, how
    yield f"greedy/{kind}", main, greedy | {"temperature": 0}


def trained_task(run: Run) -> str:
    """The benchmark whose accuracy is watched: the small world's is always ``chain``.

    >>> from opd_geometry.experiments.profiles import build
    >>> trained_task(build("smoke", "opd", 0))
    'chain'
    """
    if run.train.dataset is not None:
        return HELD_OUT
    return run.train.benchmarks[0] if is_lean(run) else "chain"


# --- headroom ------------------------------------------------------------------------

ABLE, FULL, AHEAD = 0.05, 0.97, 0.02


def check_headroom(run: Run) -> None:
    """Refuse to post-train a pretrained student that has nothing to win, or no start.

    Its anchor's sampled accuracy, and the teacher's, are those of their last
    evaluation: at least ``ABLE``, at most ``FULL``, and the teacher's ``AHEAD``, unless
    most of what it was taught are guesses: it is there to disagree.

    Raises:
        ValueError: one line with the scores.
    """
    if not (isinstance(run.train, PolicyConfig) and is_lean(run)):
        return
    assert isinstance(run.start, Run)
    task = tasks.short_name(trained_task(run))
    ours = last_accuracy(run.start, task)
    if ours is None:
        return
    if ours < ABLE:
        raise ValueError(
            f"the student samples {ours:.3f} of {task} right: expected {ABLE} at "
            "least to learn from; choose an easier task or a longer SFT"
        )
    if ours > FULL:
        raise ValueError(
            f"the student samples {ours:.3f} of {task} right: expected {FULL} at "
            "most, or nothing is left to win; choose a harder task"
        )
    if run.train.needs_teacher and isinstance(run.teacher, Run):
        theirs = last_accuracy(run.teacher, task)
        taught = dict(getattr(run.teacher.train, "qualities", ()))
        willing = taught.get("guess", 0.0) <= sum(taught.values()) / 2
        if theirs is not None and theirs < ours + AHEAD and willing:
            raise ValueError(
                f"the teacher samples {theirs:.3f} of {task} right and the student "
                f"{ours:.3f}: expected the teacher ahead by {AHEAD}; train it longer"
            )


def last_accuracy(run: Run, task: str) -> float | None:
    """A finished run's sampled accuracy on a task at its end; None if never asked."""
    found = [h["value"] for h in history(run) if h["metric"] == f"accuracy/{task}"]
    return float(found[-1]) if found else None


def _restore(run: Run, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Load the newest saved state into model and optimizer, or begin.

    A projected run begins with the state of the run it branches from; its seconds are
    its own.

    Raises:
        ValueError: a state that cannot be read.
    """
    source, own = run_directory(run) / "state.pt", {}
    if not source.is_file() and run.branch is not None:
        source, own = run_directory(run.branch) / "branch.pt", {"wall_seconds": 0.0}
    elif not source.is_file():
        return {"step": 0, "history": [], "wall_seconds": 0.0}
    try:
        if not records.check_seal(source):
            _check_records(source)
        shared = ranks.count() > 1  # then one copy in memory serves all ranks
        state = torch.load(source, map_location="cpu", weights_only=True, mmap=shared)
        ranks.load(model, optimizer, state.pop("model"), state.pop("optimizer"))
    except Exception as error:  # torch raises many kinds for a damaged file
        why = str(error) if type(error) is ValueError else type(error).__name__
        raise ValueError(
            f"cannot resume from {source}: {why}, expected the whole "
            f"state of a run; remove {source.parent} to train it anew"
        ) from error
    return {**state, **own}


def _check_records(source: Path) -> None:
    """Refuse a state from before there were digests whose own checksums do not fit."""
    with zipfile.ZipFile(source) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"its record {damaged} is damaged")


def _records(step: int, metrics: dict[str, float]) -> list[dict[str, Any]]:
    return [{"step": step, "metric": k, "value": v} for k, v in metrics.items()]


SUMMARY = {
    "step": records.COUNT,
    "steps": records.COUNT,
    "accuracy": records.NUMBER_OR_NONE,
    "wall_seconds": records.SECONDS,
}
WHERE = ("library", "python", "torch", "transformers", "numpy", "machine")
DONE = SUMMARY | dict.fromkeys(WHERE, records.TEXT)


def _summary(run: Run, state: dict[str, Any]) -> dict[str, Any]:
    """What a watcher wants to know."""
    kind = tasks.short_name(trained_task(run))
    recent = [
        record["value"]
        for record in state["history"][-200:]
        if record["metric"] in (f"accuracy/{kind}", "reward")
    ]
    return {
        "step": state["step"],
        "steps": run.train.steps,
        "accuracy": recent[-1] if recent else None,
        "wall_seconds": round(state["wall_seconds"], 3),
    }


def provenance() -> dict[str, str]:
    """Library, versions and machine: where a number comes from."""
    return {
        "library": opd_geometry.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "numpy": version("numpy"),
        "machine": f"{platform.system()} {platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "")
        + (f", {ranks.count()} processes" if ranks.count() > 1 else ""),
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch: several would add up in another order, to other bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _clear_drafts(directory: Path) -> None:
    """Remove what a killed process left half-written; the caller holds the lock."""
    for draft in (*directory.glob(".*"), *directory.glob("checkpoints/.*")):
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)

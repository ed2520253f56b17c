"""Tiny runs, and what tests do with them in processes of their own.

There a run can be killed, limited or raced without harm to the tests. Functions are
passed by name, so they have to be in a module that both sides can import.
"""

import importlib.util
import logging
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Collection
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import cache, partial
from io import StringIO
from multiprocessing import forkserver, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import dask
import torch
from distributed import Nanny, Scheduler, SpecCluster
from rich.console import Console

from opd_geometry import cli, files
from opd_geometry.experiments import (
    activations,
    forecast,
    measure,
    profiles,
    runs,
    schedule,
)
from opd_geometry.experiments.runs import ProjectionConfig, Run
from opd_geometry.training import evaluation, models
from opd_geometry.training.models import ModelConfig
from opd_geometry.training.optimizer import OptimizerConfig, adamw
from opd_geometry.training.policy import PolicyConfig
from opd_geometry.training.rollout import Rollout, completion_log_probs
from opd_geometry.training.sft import SFTConfig

SHAPE = ModelConfig(width=32, layers=1, head_size=16)
LESSONS = SFTConfig(OptimizerConfig(1e-3, "cosine", 1), steps=10, batch_sequences=8)
REWARDS = PolicyConfig(
    OptimizerConfig(1e-3, warmup_steps=2),
    steps=10,
    prompts_per_step=2,
    group_size=2,
    max_new_tokens=8,
)
ANCHOR = Run("sft", 0, LESSONS, SHAPE)
TEACHER = Run("teacher", 0, replace(LESSONS, steps=5), replace(SHAPE, width=48))
OPD = Run("opd", 0, REWARDS, ANCHOR, TEACHER)
# Its anchor solves nothing, so no group has variance and it never steps.
RLVR = Run("rlvr", 0, replace(REWARDS, alpha=0.0), ANCHOR)
PROJECTED = Run(
    "opd-projected", 0, REWARDS, ANCHOR, TEACHER, ProjectionConfig(2), branch=OPD
)
RANK = 2
# What children need at once: imported by their server, it costs each of them nothing.
PRELOAD = [
    "children",
    "opd_geometry.experiments.schedule",
    "accelerate",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.tokenization_utils_tokenizers",
]


def save_foreign(directory: Path) -> None:
    """A model whose tokenizer has a token more than that of the tiny runs."""
    tokenizer = models.character_tokenizer()
    tokenizer.add_tokens(["!"])
    model = models.build_model(SHAPE, 0)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    models.save_model(model, tokenizer, directory)


def evaluate_less() -> None:
    """Few held-out problems and texts: they take most of the time of a tiny run."""
    evaluation.accuracy = partial(evaluation.accuracy, problems=4, max_new_tokens=8)
    activations.TEXTS = 16


@cache
def server() -> ForkServerContext:
    """What forks the children; it finds this module, too."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    places = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, places))):
        forkserver.ensure_running()
    return context


class Child:
    """A function that runs in a process of its own, with data in a given directory.

    What it and its workers say on stderr is appended to the file beside the directory.
    """

    started: ClassVar[list["Child"]] = []

    def __init__(self, data: Path, function: Callable[..., Any], *arguments: Any):
        context = server()
        self.receiver, sender = context.Pipe(duplex=False)
        call = (str(data), sender, function, arguments)
        self.process = context.Process(target=_call, args=call)
        self.process.start()
        self.started.append(self)
        sender.close()

    def result(self) -> Any:
        """What the function returned; what it raised is raised here."""
        if not self.receiver.poll(300):  # a test that hangs is worse than a red one
            self.kill()
            raise TimeoutError("the process gave no result within five minutes")
        try:
            value = self.receiver.recv()
        except EOFError:
            value = None
        self.process.join()
        if isinstance(value, BaseException):
            raise value
        return value

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    @property
    def was_killed(self) -> bool:
        return self.process.exitcode == -signal.SIGKILL


def _call(
    data: str, sender: Connection, function: Callable[..., Any], arguments: Any
) -> None:
    os.environ["OPD_GEOMETRY_DATA"] = data
    files.CHECKOUT_DATA = Path(data)  # nothing is committed in the checkout
    os.environ["ACCELERATE_USE_CPU"] = "1"  # the same bits need the same processor
    os.dup2(os.open(f"{data}.stderr", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    evaluate_less()
    # A background job starts with SIGINT ignored, and its children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sender.send(function(*arguments))
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        sender.send(error)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def train_needs(run: Run) -> None:
    """Train what a run starts from, and no more."""
    evaluate_less()
    for needed in run.needs:
        runs.ensure(needed)


def ensure_counting(run: Run, log: Path) -> Path:
    """``ensure``; every optimizer step adds a character to a log."""
    loop = runs.loop_of

    def counted(*arguments: Any) -> Any:
        for metrics in loop(*arguments):
            with open(log, "a") as file:
                file.write(".")
            yield metrics

    runs.loop_of = counted
    return runs.ensure(run)


def ensure_and_die(run: Run, name: str, nth: int, after: bool) -> Path:
    """``ensure``; SIGKILL before or after a file or folder takes its final name.

    Args:
        run: the run.
        name: of the file or folder; any if empty.
        nth: at which such moment, from 1.
        after: whether it has the name by then.
    """
    replace_file, seen = os.replace, [0]

    def deadly(source: Any, target: Any) -> None:
        seen[0] += name in ("", Path(target).name)
        if seen[0] == nth and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace_file(source, target)
        if seen[0] == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = deadly
    return runs.ensure(run)


def ensure_and_die_saving(run: Run, nth: int) -> Path:
    """``ensure``; SIGKILL when the n-th checkpoint has weights and no tokenizer yet."""
    tokenizer_class = type(models.character_tokenizer())
    save, seen = tokenizer_class.save_pretrained, [0]

    def deadly(*arguments: Any, **named: Any) -> Any:
        seen[0] += 1
        if seen[0] == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return save(*arguments, **named)

    tokenizer_class.save_pretrained = deadly
    return runs.ensure(run)


def ensure_with_small_files(run: Run, most_bytes: int) -> Path:
    """``ensure`` where no file can grow beyond a size, as on a full disk."""
    _limit_files(most_bytes)
    return runs.ensure(run)


def ensure_failing_late(run: Run) -> Path:
    """``ensure``, while another process records a failure of the same run."""
    save = runs.models.save_model

    def recording(*arguments: Any, **named: Any) -> None:
        save(*arguments, **named)
        place = runs.run_directory(run) / "failed.json"
        runs.records.write_json(place, {"reason": "of before"})

    runs.models.save_model = recording
    return runs.ensure(run)


def hold_lock(place: Path, seconds: float) -> None:
    """Hold a lock for some time."""
    from opd_geometry.experiments.records import locked

    with locked(place, "it"):
        (place.parent / "held").touch()
        time.sleep(seconds)


def measure_with_small_files(run: Run, most_bytes: int) -> None:
    """Measuring where no file can grow beyond a size."""
    from opd_geometry.experiments.measure import measure_run

    _limit_files(most_bytes)
    measure_run(run, RANK)


def _limit_files(most_bytes: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))


def workers_by(method: str) -> None:
    """How Dask starts a worker's process: ``fork``, which is quick, or ``spawn``."""
    dask.config.set({"distributed.worker.multiprocessing-method": method})


def train_all(
    asked: list[Run], jobs: int, method: str = "fork"
) -> tuple[dict[Run, str], list[str]]:
    """``schedule.train_all``, with workers that are forked, which is quick.

    Args:
        asked, jobs: as there.
        method: ``spawn`` for workers that start as they do in earnest.

    Returns:
        What it returns, and the lines that it printed.
    """
    os.setsid()  # for signals to all processes, as a terminal sends them
    workers_by(method)
    said = StringIO()
    failed = schedule.train_all("smoke", asked, jobs, Console(file=said))
    return failed, said.getvalue().splitlines()


def train_all_but(killed: str, asked: list[Run], jobs: int) -> dict[Run, str]:
    """The same, where the system kills an arm's worker before it stores a step."""
    _kill_workers_of(killed, steps=range(100), log=None)
    return train_all(asked, jobs)[0]


def train_all_killed_once(
    killed: str, asked: list[Run], jobs: int, log: Path
) -> dict[Run, str]:
    """The same, where an arm's worker is killed once, in its sixth step.

    Every step of the arm that is taken adds its number to a log.
    """
    _kill_workers_of(killed, steps=[5], log=log)
    return train_all(asked, jobs)[0]


def _kill_workers_of(arm: str, steps: Collection[int], log: Path | None) -> None:
    loop = runs.loop_of

    def deadly(run: Run, *arguments: Any) -> Any:
        first = arguments[-1]
        for step, metrics in enumerate(loop(run, *arguments), first):
            if run.arm == arm:
                before = log.read_text().split() if log and log.exists() else []
                if log:
                    log.write_text(" ".join([*before, str(step)]))
                if step in steps and str(step) not in before:
                    os.kill(os.getpid(), signal.SIGKILL)
            yield metrics

    runs.loop_of = deadly


def train_on_cluster(
    asked: list[Run], homes: list[dict[str, str]]
) -> tuple[dict[Run, str], list[str]]:
    """``schedule.train_all`` on a running cluster.

    Args:
        asked: the runs.
        homes: the environment of each of its workers.

    Returns:
        What it returns, and the processes that trained.
    """
    workers_by("fork")
    ensure, place = runs.ensure, Path(os.environ["OPD_GEOMETRY_DATA"])

    def noting(run: Run, processes: int = 1) -> Path:
        home = os.environ.get("HOME", "")
        (place / f"trained-{run.arm}").write_text(f"{os.getpid()} {home}")
        return ensure(run, processes)

    measure.ensure = schedule.ensure = noting
    workers = {
        name: {"cls": Nanny, "options": {"nthreads": 1, "env": env}}
        for name, env in enumerate(homes)
    }
    head = {"cls": Scheduler, "options": {"dashboard_address": None}}
    with SpecCluster(workers, head, silence_logs=logging.CRITICAL) as cluster:
        address, said = cluster.scheduler_address, StringIO()
        failed = schedule.train_all("smoke", asked, None, Console(file=said), address)
    return failed, [path.read_text() for path in sorted(place.glob("trained-*"))]


def command(method: str, *arguments: str) -> tuple[int, str, str]:
    """``opd-geometry`` at a tiny profile smoke; its exit code, stdout and stderr."""
    workers_by(method)
    profiles.PROFILES["smoke"] = replace(
        profiles.PROFILES["smoke"],
        student=SHAPE,
        teacher=SHAPE,
        base=LESSONS,
        base_annealing=LESSONS,
        teacher_base=LESSONS,
        sft=LESSONS,
        teacher_sft=LESSONS,
        policy=REWARDS,
    )
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = cli.main(arguments)
    return code, out.getvalue(), err.getvalue()


def command_with_small_files(most_bytes: int, *arguments: str) -> tuple[int, str, str]:
    """The same where no file can grow beyond a size, with workers as in earnest."""
    _limit_files(most_bytes)
    return command("spawn", *arguments)


def enter_audit() -> None:
    """Take the place in which committed runs are trained anew, and leave it."""
    from opd_geometry.analysis import audit

    with audit.apart():
        pass


def peak_of_measuring(before: Path, after: Path) -> int:
    """Bytes that measuring adds to what this process has held at any time before."""
    from opd_geometry.geometry import pairs

    small = torch.randn(300, 300)
    pairs.measure_tensors(small, small + 0.01 * torch.randn(300, 300))
    held = _peak_kib()
    pairs.measure_checkpoints(before, after)
    return (_peak_kib() - held) * 1024


def peak_of_scoring(vocabulary: int, tokens: int) -> int:
    """Bytes that scoring so many tokens adds to what the process held before."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = Qwen3Config(**shape, **heads, vocab_size=vocabulary)
    model = Qwen3ForCausalLM(config).eval()
    groups, length = 8, tokens // 8
    ids = torch.randint(vocabulary, (groups, length))
    prompts = torch.ones(groups, 4, dtype=torch.int64)
    mask = torch.ones_like(ids, dtype=torch.bool)
    batch = Rollout(prompts, prompts, ids, mask, torch.zeros(ids.shape), 1)
    held = _peak_kib()
    with torch.no_grad():
        log_probs = completion_log_probs(model, batch)
    assert -20 < log_probs.mean() < -9  # log V = 11.9
    return (_peak_kib() - held) * 1024


def on_gpu(script: Path, out: Path, minutes: float) -> None:
    """``benchmarks/on_gpu.py`` at its small sizes, with few held-out problems."""
    place = importlib.util.spec_from_file_location("on_gpu", script)
    assert place is not None
    assert place.loader is not None
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    module.main.callback(out=out, minutes=minutes, small=True)


def peak_of_a_step(place: Path) -> tuple[int, float]:
    """Bytes that one step of distillation needs, models included, and the forecast."""
    import at_scale

    at_scale.save_model(place / "model", width=1024)
    rows = at_scale.save_problems(place / "problems.jsonl")
    profile = (
        f"gpu:student={place / 'model'},teacher={place / 'model'},"
        f"policy.dataset={rows},policy.mixed_precision=no,policy.steps=1,"
        "policy.prompts_per_step=2,policy.group_size=2,policy.max_new_tokens=32"
    )
    run = replace(profiles.build(profile, "opd", 0), start=runs.stored(place / "model"))
    said = forecast.memory_bytes(run)
    assert said is not None
    held = _peak_kib()
    model, tokenizer = runs.starting_model(run)
    optimizer = adamw(model, run.train.optimizer)
    for _ in runs.loop_of(run, model, tokenizer, optimizer, 0):
        pass
    return (_peak_kib() - held) * 1024, said


def _peak_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])

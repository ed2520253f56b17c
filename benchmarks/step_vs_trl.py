"""Time one OPD and one RLVR step of our policy loop against TRL's GRPOTrainer.

All three train the same student on the same prompts in one process: after each step of
TRL's trainer, one step of ours is taken, so whatever else the machine does falls on all
of them alike. See README.md for what is and what is not compared.
"""

import copy
import functools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from accelerate import Accelerator
from datasets import Dataset
from records import record
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    logging,
)
from trl import GRPOConfig, GRPOTrainer

from opd_geometry.training import policy, samplers, tasks
from opd_geometry.training.models import (
    ModelConfig,
    build_model,
    character_tokenizer,
    load_model,
)
from opd_geometry.training.optimizer import OptimizerConfig, adamw
from opd_geometry.training.policy import PolicyConfig, draw_prompts, policy_steps
from opd_geometry.training.sft import SFTConfig, sft_steps

PROMPTS, GROUP, LONGEST = 24, 8, 40
STUDENT, LARGER = ModelConfig(width=128, layers=4), ModelConfig(width=192, layers=4)
OPTIMIZER = OptimizerConfig(1e-6, warmup_steps=0)  # small: the lengths stay as they are
ARMS: dict[str, tuple[float, ModelConfig | None]] = {
    "OPD": (1.0, STUDENT),  # name: alpha, teacher
    "OPD+": (1.0, LARGER),
    "RLVR": (0.0, None),
}
WARM_UP = 2  # steps that are not counted
MORE = 4  # steps, after those, of which the parts are printed
Seconds = tuple[float, float]  # wall, processor
MIXED = (("careful", 0.45), ("guess", 0.25), ("sloppy", 0.30))


@click.command(context_settings={"show_default": True})
@click.option("--threads", default=1, help="Threads of both sides.")
@click.option("--steps", default=10, help="Steps that are timed, after two to warm up.")
@click.option("--model", help="Checkpoint to train instead of a briefly trained one.")
@click.option("--sft-steps", default=150, help="How briefly: its completions must end.")
@click.option("--shared/--apart", default=True, help="Our policy.shared_prefixes.")
@click.option(
    "--teacher-dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    help="Our policy.teacher_dtype.",
)
def main(
    threads: int,
    steps: int,
    model: str | None,
    sft_steps: int,
    shared: bool,
    teacher_dtype: str,
) -> None:
    """Print median step seconds of OPD, RLVR and TRL's GRPO, and the ratios."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if model:
        student, tokenizer = load_model(model)
    else:
        click.echo(f"training a student for {sft_steps} steps ...")
        student, tokenizer = briefly_trained(sft_steps)
    # TRL learns from every group, also from those without variance; here so do we.
    policy.prompts_to_learn = lambda config, rewards: torch.arange(
        len(rewards) // config.group_size
    )
    config = PolicyConfig(
        OPTIMIZER,
        steps + WARM_UP + MORE,
        prompts_per_step=PROMPTS,
        group_size=GROUP,
        max_new_tokens=LONGEST,
        shared_prefixes=shared,
    )
    dtype = getattr(torch, teacher_dtype)
    ours = {
        name: our_steps(
            replace(config, alpha=alpha), teacher, student, tokenizer, dtype
        )
        for name, (alpha, teacher) in ARMS.items()
    }
    theirs = replace(config, steps=steps + WARM_UP)
    with Parts() as parts:
        seconds, tokens = race(
            ours,
            copy.deepcopy(student),
            tokenizer,
            same_prompts(theirs.steps),
            verified(tokenizer),
            theirs,
        )
        report(seconds, tokens, threads)
        low = "" if teacher_dtype == "float32" else f" {teacher_dtype}-teacher"
        keep(f"qwen3-128x4{low}", model, shared, seconds, WARM_UP)
        for name, loop in ours.items():
            click.echo(f"{name}: ", nl=False)
            parts.report(loop, MORE)


def briefly_trained(steps: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A student that has learned the format, hence how long an answer is."""
    student, tokenizer = build_model(STUDENT, seed=0), character_tokenizer()
    config = SFTConfig(
        OptimizerConfig(1.5e-3, "cosine", 10),
        steps,
        batch_sequences=96,
        micro_batch=24,
        benchmarks=("chain",),
        qualities=MIXED,
    )
    optimizer = adamw(student, config.optimizer)
    for _ in sft_steps(config, student, tokenizer, optimizer, seed=0):
        pass
    return student, tokenizer


def our_steps(
    config: PolicyConfig,
    teacher_shape: ModelConfig | None,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
) -> Iterator[dict[str, float]]:
    """Our loop on a copy of the student; each ``next`` is one step."""
    model = copy.deepcopy(student)
    optimizer = adamw(model, config.optimizer)
    teacher = build_model(teacher_shape, seed=1).to(dtype) if teacher_shape else None
    return policy_steps(config, model, teacher, tokenizer, optimizer, seed=0)


def verified(tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[float]]:
    """Our verifier, as a reward of TRL's."""

    def reward(
        prompts: list[str],
        completion_ids: list[list[int]],
        args: list[list[int]],
        **_: object,
    ) -> list[float]:
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        return [
            float(tasks.verify(tasks.Problem("chain", tuple(numbers), prompt), text))
            for prompt, numbers, text in zip(prompts, args, texts, strict=True)
        ]

    return reward


def race(
    loops: dict[str, Iterator[dict[str, float]]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Dataset,
    reward: Callable[..., list[float]],
    config: PolicyConfig,
) -> tuple[dict[str, list[Seconds]], dict[str, list[float]]]:
    """Train with TRL and, between its steps, with other loops.

    Args:
        loops: by name; each ``next`` is one step.
        model: that TRL trains.
        tokenizer: of all.
        asked: TRL's prompts, in order.
        reward: TRL's, as it calls one.
        config: of the loops, said to TRL in its words.

    Returns:
        Seconds, and mean tokens a completion, of every step.
    """
    seconds: dict[str, list[Seconds]] = {"TRL": [], **{name: [] for name in loops}}
    tokens: dict[str, list[float]] = {name: [] for name in seconds}
    began = now()

    class BetweenSteps(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            nonlocal began
            began = now()

        def on_step_end(self, *_: object, **__: object) -> None:
            seconds["TRL"].append(since(began))
            for name, loop in loops.items():
                start = now()
                tokens[name].append(next(loop)["tokens"])
                seconds[name].append(since(start))

    def counted(completion_ids: list[list[int]], **named: Any) -> list[float]:
        tokens["TRL"].append(sum(map(len, completion_ids)) / len(completion_ids))
        return reward(completion_ids=completion_ids, **named)

    with tempfile.TemporaryDirectory() as directory:
        trainer = GRPOTrainer(
            model,
            reward_funcs=counted,
            args=trl_config(directory, config),
            train_dataset=asked,
            processing_class=tokenizer,
            callbacks=[BetweenSteps()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return seconds, tokens


class Parts:
    """Processor seconds of the parts of our steps, by what calls them.

    While it is entered, the loop's own functions are timed: sampling, scoring with and
    without a gradient, the way back, the optimizer's step. The rest is what remains.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Parts":
        score = policy.completion_log_probs
        timed = self._timed
        for owner, name, made in (
            (samplers, "sample", timed("rollout", samplers.sample)),
            (
                policy,
                "completion_log_probs",
                lambda *a, **k: timed(
                    "scoring, with a gradient"
                    if torch.is_grad_enabled()
                    else "scoring by the teacher",
                    score,
                )(*a, **k),
            ),
            (Accelerator, "backward", timed("backward", Accelerator.backward)),
            (torch.optim.AdamW, "step", timed("optimizer", torch.optim.AdamW.step)),
        ):
            self._stack.enter_context(mock.patch.object(owner, name, made))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.process_time()
            try:
                return work(*arguments, **named)
            finally:
                spent = time.process_time() - began
                self.seconds[part] = self.seconds.get(part, 0.0) + spent

        return timed

    def report(self, loop: Iterator[dict[str, float]], steps: int) -> None:
        """Take some steps and print where their processor time goes."""
        self.seconds.clear()
        began = time.process_time()
        for _ in range(steps):
            next(loop)
        whole = time.process_time() - began
        self.seconds["the rest"] = whole - sum(self.seconds.values())
        shares = [f"{part} {s / whole:.0%}" for part, s in self.seconds.items()]
        click.echo(f"{whole / steps:.3f} CPU seconds a step: {', '.join(shares)}")


def now() -> Seconds:
    """Wall and processor time; the latter counts all threads, and nobody else's."""
    return time.perf_counter(), time.process_time()


def since(start: Seconds) -> Seconds:
    """Wall and processor seconds since ``start``."""
    wall, processor = now()
    return wall - start[0], processor - start[1]


def trl_config(directory: str, config: PolicyConfig) -> GRPOConfig:
    """Our setting in TRL's words, without whatever would only cost it time."""
    return GRPOConfig(
        directory,
        per_device_train_batch_size=config.prompts_per_step * config.group_size,
        num_generations=config.group_size,
        max_completion_length=config.max_new_tokens,
        max_steps=config.steps,
        learning_rate=config.optimizer.learning_rate,
        lr_scheduler_type="constant",
        temperature=1.0,
        beta=0.0,  # no reference model
        epsilon=config.clip_low,
        epsilon_high=config.clip_high,
        loss_type="grpo",
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,  # no autocast
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


def same_prompts(steps: int) -> Dataset:
    """The prompts that our loop draws, step by step."""
    config = PolicyConfig(OPTIMIZER, steps, prompts_per_step=PROMPTS)
    problems = [
        problem for step in range(steps) for problem in draw_prompts(config, 0, step)
    ]
    return Dataset.from_list(
        [{"prompt": problem.prompt, "args": problem.args} for problem in problems]
    )


def report(
    seconds: dict[str, list[Seconds]], tokens: dict[str, list[float]], threads: int
) -> None:
    """Print the table, the floor and the ratios."""
    rate = matmul_rate()
    click.echo(
        f"{PROMPTS} prompts x {GROUP} completions, one optimizer step, "
        f"{threads} thread(s); matrix products run at {rate:.0f} GFLOP/s"
    )
    click.echo("        seconds  CPU seconds  tokens  GFLOP  share of the floor")
    wall, processor = {}, {}
    for name, timed in seconds.items():
        wall[name], processor[name] = map(
            statistics.median, zip(*timed[WARM_UP:], strict=True)
        )
        length = statistics.mean(tokens[name][WARM_UP:])
        teacher = ARMS[name][1] if name in ARMS else None
        work = step_gflop(length, teacher)
        click.echo(
            f"{name:6}{wall[name]:9.3f}{processor[name]:13.3f}{length:8.1f}{work:7.1f}"
            f"{work / rate / processor[name]:20.0%}"
        )
    for name in ARMS:
        click.echo(
            f"TRL / {name}: {wall['TRL'] / wall[name]:.2f} times the seconds, "
            f"{processor['TRL'] / processor[name]:.2f} times the CPU seconds"
        )


def keep(
    shape: str,
    model: str | None,
    shared: bool,
    seconds: dict[str, list[Seconds]],
    warm_up: int,
    peaks: Mapping[str, float] | None = None,
) -> None:
    """Medians and ratios into data/benchmarks/steps.csv, a row a loop and load.

    ``peaks``: loops to the most memory that a process of their own took, in MiB.
    """
    student = "own" if model is None else Path(model).name
    wall, cpu = (
        {
            name: statistics.median(s[i] for s in t[warm_up:])
            for name, t in seconds.items()
        }
        for i in (0, 1)
    )
    rows = [
        {
            "shape": shape,
            "student": student,
            "shared_prefixes": shared,
            "loop": name,
            "wall_seconds": wall[name],
            "cpu_seconds": cpu[name],
            "trl_over_wall": wall["TRL"] / wall[name],
            "trl_over_cpu": cpu["TRL"] / cpu[name],
            "steps": len(timed) - warm_up,
            "peak_mib": (peaks or {}).get(name),
        }
        for name, timed in seconds.items()
    ]
    record("steps", rows, ["shape", "student", "shared_prefixes", "loop", "load"])


def step_gflop(tokens: float, teacher: ModelConfig | None) -> float:
    """Multiplications and additions that a step needs at least, in units of 1e9.

    2 N for a token that is read, written or scored, 6 N for one that is learned from,
    N being the weights of the matrices that it passes. A prompt is read once to sample
    and once, forward and backward, to learn. Attention's own products are left out.
    """
    prompts = same_prompts(20)["prompt"]
    read = PROMPTS * sum(map(len, prompts)) / len(prompts)
    written = PROMPTS * GROUP * tokens
    weights = 8 * matrix_weights(STUDENT)
    if teacher is not None:
        weights += 2 * matrix_weights(teacher)
    return weights * (read + written) / 1e9


def matrix_weights(config: ModelConfig) -> int:
    """Weights in matrices that multiply: the layers' and the head's."""
    return sum(
        parameter.numel()
        for name, parameter in build_model(config, seed=0).named_parameters()
        if parameter.ndim == 2 and "embed" not in name
    )


def matmul_rate(size: int = 1024, dtype: torch.dtype = torch.float32) -> float:
    """GFLOP of a product of two square matrices in a processor second; best of ten."""
    a, best = torch.randn(size, size).to(dtype), float("inf")
    for _ in range(10):
        start = time.process_time()
        a @ a
        best = min(best, time.process_time() - start)
    return 2 * size**3 / best / 1e9


if __name__ == "__main__":
    main()

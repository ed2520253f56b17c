"""Time one OPD step on a model of 100 million parameters against two others.

All three train the same model on the same prompts in one process, step by step in turn:
ours, as the profile ``pretrained`` sets it; the recipe that it began as, rebuilt here;
and TRL's GRPOTrainer. See README.md for what is and what is not compared.
"""

import copy
import resource
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace

import click
import torch
from datasets import Dataset
from step_vs_trl import Parts, Seconds, keep, matmul_rate, race
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    logging,
)

from opd_geometry.experiments.profiles import PROFILES
from opd_geometry.training import losses, tasks
from opd_geometry.training.models import character_tokenizer, frame, load_model
from opd_geometry.training.optimizer import (
    Compute,
    adamw,
    bfloat16_copy,
    set_learning_rate,
)
from opd_geometry.training.policy import (
    PolicyConfig,
    draw_prompts,
    policy_steps,
    step_generator,
)
from opd_geometry.training.rollout import encode_prompts, packed_outputs, sample

OURS = PROFILES["pretrained"].policy
ROW_TOKENS = 700  # of the recipe's rows: shorter passes were slower
WARM_UP = 1  # steps that are not counted
MORE = 1  # step, after those, of which the parts are printed


@click.command(context_settings={"show_default": True})
@click.option("--threads", default=1, help="Threads of all sides.")
@click.option("--steps", default=2, help="Steps that are timed, after one to warm up.")
@click.option("--model", help="A cut checkpoint; else random weights of that shape.")
@click.option("--name", default="anchor", help="What data/benchmarks calls it.")
@click.option("--longest", default=10, help="Tokens a completion, at most.")
@click.option("--shared/--apart", default=True, help="Our policy.shared_prefixes.")
@click.option("--alone", is_flag=True, help="Our steps only; prints the peak in MiB.")
def main(
    threads: int,
    steps: int,
    model: str | None,
    name: str,
    longest: int,
    shared: bool,
    alone: bool,
) -> None:
    """Print median step seconds of the three, the ratios, the floor and our memory."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    student, tokenizer = load_model(model) if model else random_model()
    config = replace(OURS, steps=steps + WARM_UP + MORE, max_new_tokens=longest)
    own = replace(config, shared_prefixes=shared)
    if alone:
        for _ in our_steps(replace(own, steps=steps), student, tokenizer):
            pass
        click.echo(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    peak = peak_alone()
    loops = {
        "ours": our_steps(own, student, tokenizer),
        "recipe": recipe_steps(config, student, tokenizer),
    }
    theirs = replace(config, steps=steps + WARM_UP)
    problems = [p for s in range(theirs.steps) for p in draw_prompts(config, 0, s)]
    with Parts() as parts:
        seconds, tokens = race(
            loops,
            bfloat16_copy(student),  # in TRL's favour: it moves half the bytes
            tokenizer,
            Dataset.from_list([{"prompt": framed(p, tokenizer)} for p in problems]),
            lambda completion_ids, **_: [i % 2.0 for i in range(len(completion_ids))],
            theirs,
        )
        report(seconds, tokens, student, config, threads)
        click.echo(f"ours alone, in a process of its own: {peak:.0f} MiB at its peak")
        kept = model and name
        keep("gemma3-100M", kept, shared, seconds, WARM_UP, {"ours": peak})
        parts.report(loops["ours"], MORE)


def peak_alone() -> float:
    """The most memory that our steps take without the others, in MiB."""
    command = [sys.executable, *sys.argv, "--alone"]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(told.stdout.split()[-1])


def random_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Gemma 3 270M without most of its embedding, never trained."""
    tokenizer = character_tokenizer()
    config = Gemma3TextConfig(
        vocab_size=1024,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Gemma3ForCausalLM(config).eval(), tokenizer


def our_steps(
    config: PolicyConfig, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, float]]:
    """The library's loop on a copy of the student, which is its teacher, too."""
    model = copy.deepcopy(student)
    optimizer = adamw(model, config.optimizer)
    teacher = bfloat16_copy(student)
    return policy_steps(config, model, teacher, tokenizer, optimizer, seed=0)


def recipe_steps(
    config: PolicyConfig, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, float]]:
    """bf16 copy, float32 masters, fused AdamW; each prompt packed with each answer.

    What is missing against ours: every completion has its prompt in front again, to
    sample and to score, and a completion that has ended stays in the batch until a
    tenth of it has.
    """
    model = copy.deepcopy(student)
    optimizer = adamw(model, config.optimizer)
    compute, teacher = Compute(model, "bf16-copy"), bfloat16_copy(student)
    for step in range(config.steps):
        set_learning_rate(optimizer, config.optimizer.learning_rate)
        prompts = [p.prompt for p in draw_prompts(config, 0, step)]
        repeated = [p for p in prompts for _ in range(config.group_size)]
        ids, mask = encode_prompts(repeated, tokenizer)
        rollout = sample(
            compute.model,
            ids,
            mask,
            group_size=1,
            max_new_tokens=config.max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            generator=step_generator(0, step),
        )
        asked = mask.sum(1).tolist()
        rows = [
            torch.cat([ids[i, ids.shape[1] - n :], rollout.completions[i][live]])
            for i, (n, live) in enumerate(zip(asked, rollout.mask, strict=True))
        ]
        lengths = torch.tensor([len(row) - 1 for row in rows])
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        place = torch.arange(padded.shape[1] - 1)
        written = place >= torch.tensor(asked)[:, None] - 1
        written &= place < lengths[:, None]

        with torch.no_grad():
            theirs = scored(teacher, padded, lengths)
        ours = scored(compute.model, padded, lengths)
        gain = losses.opd_advantage(ours, theirs)
        old = ours.detach()
        loss = losses.policy_loss(ours, old, gain, None, written)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        compute.refresh()
        optimizer.zero_grad()
        yield {"tokens": float(rollout.mask.sum() / len(rows))}


def scored(scorer: PreTrainedModel, ids: Tensor, lengths: Tensor) -> Tensor:
    """Log-probability of every token but the first, (B, T - 1)."""
    logits = packed_outputs(scorer, ids[:, :-1], lengths, ROW_TOKENS)
    return losses.token_log_probs(logits, ids[:, 1:])


def framed(problem: tasks.Problem, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt as the library gives it to the model."""
    return frame(problem.prompt, tokenizer)


def report(
    seconds: dict[str, list[Seconds]],
    tokens: dict[str, list[float]],
    student: PreTrainedModel,
    config: PolicyConfig,
    threads: int,
) -> None:
    """Print the table, the floor and the ratios."""
    rate = matmul_rate(dtype=torch.bfloat16)
    batch = config.prompts_per_step * config.group_size
    weights = sum(p.numel() for p in student.parameters())
    click.echo(
        f"{weights / 1e6:.0f} million parameters, {config.prompts_per_step} prompts x "
        f"{config.group_size} completions, {threads} thread(s); bf16 matrix products "
        f"run at {rate:.0f} GFLOP/s"
    )
    click.echo("          seconds  CPU seconds  tokens")
    wall, processor = {}, {}
    for name, timed in seconds.items():
        wall[name], processor[name] = map(
            statistics.median, zip(*timed[WARM_UP:], strict=True)
        )
        length = statistics.mean(tokens[name][WARM_UP:])
        click.echo(f"{name:8}{wall[name]:9.2f}{processor[name]:13.2f}{length:8.1f}")
    prompt = 11 * config.prompts_per_step
    # 2 N to write a token, 2 N for the teacher's score of it, 6 N to learn from it
    work = 10 * weights * (prompt + batch * statistics.mean(tokens["ours"])) / 1e9
    moved = 30 * weights / 1e9  # weights, gradients and moments, both ways
    click.echo(
        f"floor: {work:.0f} GFLOP, {work / rate:.2f} s at that rate, {moved:.1f} GB "
        f"in the optimizer; ours takes {processor['ours'] * rate / work:.1f} times the "
        "arithmetic"
    )
    for other in ("recipe", "TRL"):
        click.echo(
            f"{other} / ours: {wall[other] / wall['ours']:.2f} times the seconds, "
            f"{processor[other] / processor['ours']:.2f} times the CPU seconds"
        )


if __name__ == "__main__":
    main()

"""On-policy distillation, RLVR and every mixture of them: one loop, one advantage.

Per step (arXiv:2606.07082, section 2 and appendix G): draw prompts, let the student
(or the teacher) write a group of completions for each, score every token, form the
advantage

    A_t = alpha * (log pi_T(y_t) - log pi_theta(y_t)) + (1 - alpha) * A_GRPO(y),

and take one clipped policy-gradient step. alpha = 1 is OPD, alpha = 0 is RLVR.

``policy_steps`` is the whole loop, a generator like ``sft.sft_steps``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from opd_geometry.training import data, losses, ranks, tasks
from opd_geometry.training.models import recomputing
from opd_geometry.training.optimizer import (
    Compute,
    autocast,
    clipped_norm,
    learning_rate,
    set_learning_rate,
)
from opd_geometry.training.rollout import (
    Rollout,
    apart_if_long,
    completion_log_probs,
    completion_logits,
    completion_states,
    decode_completions,
    encode_prompts,
    has_plain_head,
    in_chunks,
    of_all_ranks,
    scores_in_chunks,
)
from opd_geometry.training.samplers import OwnSampler, Sampler, Writing
from opd_geometry.training.settings import PolicyConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_STREAM = 2  # separates this loop's random numbers from the supervised loop's


def policy_steps(
    config: PolicyConfig,
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    *,
    seed: int,
    first_step: int = 0,
    sampler: Sampler | None = None,
) -> Iterator[dict[str, float]]:
    """Train by policy gradient; yields the step's metrics after each optimizer step.

    Several processes that run it together take one step on one batch (see ``ranks``):
    each samples, verifies and scores its share of the prompts.

    Args:
        config: the run.
        model: the student, trained in place, float32 weights.
        teacher: scores the tokens (and writes them off-policy); same vocabulary.
        tokenizer: of both.
        optimizer: as made by ``optimizer_of``, with its moments when resuming.
        seed: decides prompts, samples and token masks together with the step.
        first_step: where to continue.
        sampler: who writes the completions; None for the model itself.

    Yields:
        ``reward`` (share of verified completions, before any flip), ``gap`` (mean r_t
        in nats, when a teacher scores), ``loss``, ``grad_norm`` (before clipping),
        ``tokens`` (mean completion length), ``learned_frac`` (share of the prompts that
        had something to teach), ``learning_rate``; of an engine ``sampler_gap`` (mean
        distance from the training pass, nats a token) and ``sampler_cut`` (share of
        the tokens whose weight was cut off).

    Raises:
        ValueError: the configuration needs a teacher and none is given, a gradient is
            not finite, or an engine samples from another distribution.
    """
    if config.needs_teacher and teacher is None:
        raise ValueError(f"alpha {config.alpha} needs a teacher; give one, or alpha 0")
    from accelerate import Accelerator  # a second that readers of tables need not wait

    accelerator = Accelerator(mixed_precision=autocast(config.mixed_precision))
    # evaluation mode: no DDP around it, whose passes ranks have to make equally often
    model = accelerator.prepare_model(model, evaluation_mode=True)
    optimizer = accelerator.prepare_optimizer(optimizer)
    compute = Compute(model, config.mixed_precision)
    student = compute.model
    if teacher is not None and config.sharded and ranks.count() > 1:
        has_plain_head(teacher)  # asked while every rank can read it alone
        ranks.shard_layers(teacher.eval(), accelerator.device)
    elif teacher is not None:
        teacher = placed(teacher, config.teacher_device or accelerator.device).eval()
    student.eval()  # no dropout anywhere; Qwen3 has none, other models may
    author = student if config.rollouts == "student" else teacher
    assert author is not None
    if config.rollouts == "teacher" and ranks.lies_apart(author):
        raise ValueError(
            "sharded with rollouts by the teacher: its layers lie apart and would be "
            "gathered for every token; let the student write, or set sharded=false"
        )
    how = Writing(
        config.group_size,
        config.max_new_tokens,
        config.temperature,
        config.stop,
        config.shared_prefixes,
    )
    writer = sampler or OwnSampler(author, tokenizer, config.sampled_prompts)
    for step in range(first_step, config.steps):
        rate = learning_rate(config.optimizer, step, config.steps)
        set_learning_rate(optimizer, rate)
        generator = step_generator(seed, step)

        # 1. rollouts and rewards: each rank those of its share, then all have all
        ranks.gather_weights(student)
        writer.take_weights(student)
        problems = draw_prompts(config, seed, step)
        prompt_ids, prompt_mask = encode_prompts(
            [data.as_prompt(problem, tokenizer) for problem in problems], tokenizer
        )
        mine = ranks.own(len(problems))
        asked = prompt_ids.to(accelerator.device), prompt_mask.to(accelerator.device)
        rollout = writer.write(*asked, how, generator, mine)
        rewards = verify_completions(problems[mine], rollout, tokenizer)
        rollout, rewards = of_all_ranks(rollout, rewards)
        random_weights = random_token_weights(config, rollout, generator)
        signal = flip_rewards(config, rewards, generator)
        noise = response_noise(config, rollout, generator)
        reward_advantages = torch.zeros_like(signal)
        if config.alpha < 1.0:
            reward_advantages = losses.group_advantage(signal, config.group_size)

        # 2. one gradient, a few prompts with their groups at a time
        kept = prompts_to_learn(config, signal)
        learned = rollout.mask[rollout.rows_of(kept)].sum()
        scored = apart_if_long(rollout)
        parts = kept if scored is rollout else rollout.rows_of(kept)
        totals = dict.fromkeys(("loss", "gap", *(ENGINE if sampler else ())), 0.0)
        with recomputing(student, config.gradient_checkpointing):
            for part, share in ranks.dealt(parts, config.micro_prompts):
                piece, rows = scored.take(part), scored.rows_of(part)
                width = piece.mask.shape[1]
                if config.estimator != "sampled":
                    loss, gap = full_vocabulary_loss(config, student, teacher, piece)
                    if sampler:
                        with torch.no_grad():
                            ours = completion_log_probs(
                                student, piece, config.temperature
                            )
                else:
                    log_probs = completion_log_probs(student, piece, config.temperature)
                    # teacher-written tokens have no sampling probability of the student
                    own = config.rollouts == "student" and config.gap_from == "rollout"
                    ours = piece.log_probs if own else log_probs.detach()
                    old = ours if config.ratio_to == "student" else piece.log_probs
                    gap = token_gap(config, ours, teacher, piece)
                    weights = random_weights[rows, :width]
                    if config.token_selection == "top-gap":
                        weights = losses.top_gap_weights(
                            gap, piece.mask, config.keep_frac
                        )
                    if sampler and config.sampler_ratio:
                        weights = weights * losses.truncated_ratio(
                            ours, piece.log_probs, piece.mask, config.sampler_ratio
                        )
                    advantages = torch.ones_like(gap)
                    if config.credit == "gap":
                        advantages = losses.mix_advantages(
                            -(gap - noise[rows]), reward_advantages[rows], config.alpha
                        )
                    loss = losses.policy_loss(
                        log_probs,
                        old,
                        advantages,
                        weights,
                        piece.mask,
                        config.clip_low,
                        config.clip_high,
                        n_sequences=len(rows),
                    )
                accelerator.backward(loss * share)
                totals["loss"] += float(loss.detach()) * share
                totals["gap"] += float(gap.sum() / learned) * (share > 0.0)
                if sampler:
                    for name, value in engine_metrics(config, ours, piece).items():
                        totals[name] += value / float(learned) * (share > 0.0)

        # 3. one optimizer step, unless no group had anything to teach
        ranks.sum_gradients(model)
        totals = {name: ranks.total(value) for name, value in totals.items()}
        check_engine(config, totals, step)
        limit = config.optimizer.max_grad_norm
        norm = clipped_norm(accelerator, model, limit, step, rate)
        if len(kept):
            optimizer.step()
            compute.refresh()
        optimizer.zero_grad()
        yield {
            **totals,
            "reward": float(rewards.mean()),
            "tokens": float(rollout.mask.sum() / len(rewards)),
            "learned_frac": len(kept) / len(problems),
            "grad_norm": norm,
            "learning_rate": rate,
        }


ENGINE = ("sampler_gap", "sampler_cut")


def engine_metrics(
    config: PolicyConfig, ours: Tensor, piece: Rollout
) -> dict[str, float]:
    """How far an engine's log-probabilities are from ours: sums over tokens.

    Args:
        config: where an importance weight is cut off.
        ours: (B, T) nats, of the training pass.
        piece: what the engine wrote.
    """
    apart = (ours - piece.log_probs)[piece.mask]
    cut = apart.exp() > (config.sampler_ratio or math.inf)
    return dict(zip(ENGINE, (float(apart.abs().sum()), float(cut.sum())), strict=True))


def check_engine(config: PolicyConfig, totals: dict[str, float], step: int) -> None:
    """Refuse a step whose samples are of another distribution than the student's.

    Raises:
        ValueError: the mean distance is above the bound, or no number.
    """
    gap = totals.get("sampler_gap", 0.0)
    if not gap <= config.sampler_gap:
        raise ValueError(
            f"step {step}: the log-probabilities of vLLM's engine and of the training "
            f"pass are {gap:.3g} nats a token apart: expected at most sampler_gap "
            f"{config.sampler_gap:g}; it has other weights or another precision"
        )


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of one step's samples and token masks, a function of both."""
    words = np.random.SeedSequence([seed, _STREAM, step, 1]).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))


def draw_prompts(
    config: PolicyConfig, seed: int, step: int
) -> Sequence[tasks.Problem | data.TextProblem]:
    """The problems of one step, the benchmarks in equal shares."""
    rng = np.random.default_rng([seed, _STREAM, step, 0])
    if config.dataset is not None:
        return data.draw(config.dataset, config.prompts_per_step, rng)
    names = config.benchmarks
    return [
        tasks.draw_problem(names[i % len(names)], rng)
        for i in range(config.prompts_per_step)
    ]


def verify_completions(
    problems: Sequence[tasks.Problem | data.TextProblem],
    rollout: Rollout,
    tokenizer: PreTrainedTokenizerBase,
) -> Tensor:
    """Binary reward of every completion, (B,) float32; an unfinished one earns 0."""
    texts = decode_completions(rollout, tokenizer)
    right = [
        float(data.verify(problems[i // rollout.group_size], text))
        for i, text in enumerate(texts)
    ]
    ended = rollout.ended(tokenizer.eos_token_id)
    return torch.tensor(right, device=ended.device) * ended


def flip_rewards(
    config: PolicyConfig, rewards: Tensor, generator: torch.Generator
) -> Tensor:
    """The rewards that are learned from: each is flipped with a fixed probability.

    R' = 1 - R with probability q, R otherwise, independently

    The expected reward keeps the share 1 - 2q of its contrast; at q = 0.5 none is left.

    Args:
        config: q is its ``reward_flip``; at 0 nothing is drawn.
        rewards: (B,), 0 or 1.
        generator: of the step.

    Source: ours; how much of a claim about RLVR is the scarcity of its signal.
    """
    if config.reward_flip == 0.0:
        return rewards
    draw = torch.rand(len(rewards), generator=generator, dtype=torch.float64)
    flipped = (draw < config.reward_flip).to(rewards.device)
    return torch.where(flipped, 1.0 - rewards, rewards)


def response_noise(
    config: PolicyConfig, rollout: Rollout, generator: torch.Generator
) -> Tensor:
    """What is added to the distillation advantage of every token of a response.

    e_i ~ N(0, sigma^2), one number a response

    Its mean is zero, so the expected gradient is that without it.

    Args:
        config: sigma is its ``gap_noise``, in nats; at 0 nothing is drawn.
        rollout: B responses.
        generator: of the step.

    Returns:
        (B, 1), the dtype of the log-probabilities.

    Source: ours; the converse of ``flip_rewards``.
    """
    like = rollout.log_probs[:, :1]
    if config.gap_noise == 0.0:
        return torch.zeros_like(like)
    draw = torch.randn(len(like), 1, generator=generator, dtype=torch.float64)
    return (config.gap_noise * draw).to(like)


def prompts_to_learn(config: PolicyConfig, rewards: Tensor) -> Tensor:
    """Prompts that contribute: RLVR skips groups whose rewards are all alike.

    With any distillation in the mix every prompt carries a signal, so none is skipped.
    """
    groups = len(rewards) // config.group_size
    if config.alpha > 0.0:
        return torch.arange(groups, device=rewards.device)
    return losses.group_has_variance(rewards, config.group_size).nonzero().squeeze(1)


def placed(model: Any, device: str | torch.device) -> Any:
    """A model on another device.

    Raises:
        ValueError: there is no such device, or it has no room.
    """
    try:
        return model.to(device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        said = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"teacher_device {device}: {said}; expected one such as cpu or cuda:0"
        ) from error


def token_gap(
    config: PolicyConfig,
    student_log_probs: Tensor,
    teacher: PreTrainedModel | None,
    piece: Rollout,
) -> Tensor:
    """r_t = log pi_theta - log pi_T on the written tokens, (B, T), 0 off the mask.

    Zeros when nothing asks for the teacher (RLVR), which is then not run.
    """
    if teacher is None or not config.needs_teacher:
        return torch.zeros_like(student_log_probs)
    with torch.no_grad():
        scored = completion_log_probs(teacher, piece, config.scoring_temperature)
    return -losses.opd_advantage(student_log_probs, scored).masked_fill(~piece.mask, 0)


KL = {
    "sampled": losses.token_reverse_kl,  # of which it is an estimate
    "full": losses.token_reverse_kl,
    "full-forward": losses.token_forward_kl,
}


def full_vocabulary_loss(
    config: PolicyConfig,
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    piece: Rollout,
) -> tuple[Tensor, Tensor]:
    """KL over the vocabulary on the visited states, and the sampled gap."""
    assert teacher is not None
    if scores_in_chunks(model, piece.mask.numel()):
        return _full_vocabulary_loss_in_chunks(config, model, teacher, piece)
    with torch.no_grad():
        theirs = completion_logits(teacher, piece) / config.scoring_temperature
    ours = completion_logits(model, piece) / config.temperature
    kl = losses.full_vocabulary_kl(KL[config.estimator], ours, theirs, piece.mask)
    gap = _gap(ours, theirs, piece.completions)
    return kl, gap.masked_fill(~piece.mask, 0.0)


@torch.no_grad()
def _gap(ours: Tensor, theirs: Tensor, tokens: Tensor) -> Tensor:
    ours, theirs = (losses.token_log_probs(x, tokens) for x in (ours, theirs))
    return ours - theirs


def _full_vocabulary_loss_in_chunks(
    config: PolicyConfig, model: Any, teacher: Any, piece: Rollout
) -> tuple[Tensor, Tensor]:
    """The same, with the logits of a few tokens at a time."""
    head, other = model.get_output_embeddings(), teacher.get_output_embeddings()

    def score(ours: Tensor, theirs: Tensor, tokens: Tensor) -> Tensor:
        logits = head(ours) / config.temperature
        with torch.no_grad():
            scored = other(theirs.to(other.weight.device)).to(ours.device)
            scored = scored / config.scoring_temperature
        kl = KL[config.estimator](logits, scored)
        return torch.stack([kl, _gap(logits, scored, tokens)], dim=-1)

    with torch.no_grad():
        theirs = completion_states(teacher, piece)
    ours = completion_states(model, piece)
    columns = head.weight.shape[0]
    kl, gap = in_chunks(score, columns, ours, theirs, piece.completions).unbind(-1)
    gap = gap.detach().masked_fill(~piece.mask, 0.0)
    return losses.sequence_mean(kl, piece.mask), gap


def random_token_weights(
    config: PolicyConfig, rollout: Rollout, generator: torch.Generator
) -> Tensor:
    """Weights (B, T) of the tokens: ones, or a random selection rescaled to its sum.

    Drawn for the whole batch at once, so that micro-batches do not change the draw.
    """
    if config.token_selection != "random":
        return torch.ones_like(rollout.log_probs)
    return losses.random_token_weights(rollout.mask, config.keep_frac, generator)

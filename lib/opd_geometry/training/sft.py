"""Supervised training on demonstrations: pretraining, the SFT arm, the teacher.

``sft_steps`` is the whole loop. It is a generator: each ``next`` is one optimizer step,
so whoever runs it decides what to store and when (see ``runs``). Every batch is drawn
from (seed, step) alone, hence nothing but weights, moments and the step has to be saved
for a resumed run to continue bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from opd_geometry.training import ranks, tasks
from opd_geometry.training.data import as_pairs, draw
from opd_geometry.training.losses import sft_loss
from opd_geometry.training.models import frame, recomputing
from opd_geometry.training.optimizer import (
    Compute,
    autocast,
    clipped_norm,
    learning_rate,
    set_learning_rate,
)
from opd_geometry.training.rollout import (
    chunked_log_probs,
    logits_of,
    packed_outputs,
    scores_in_chunks,
    states_of,
)
from opd_geometry.training.settings import SFTConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_STREAM = 1  # separates this loop's random numbers from the policy loop's


def sft_steps(
    config: SFTConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    *,
    seed: int,
    first_step: int = 0,
) -> Iterator[dict[str, float]]:
    """Train on demonstrations; yields the step's metrics after each optimizer step.

    Several processes that run it together take one step on one batch (see ``ranks``).

    Args:
        config: the run.
        model: trained in place, float32 weights.
        tokenizer: reads and pads the demonstrations.
        optimizer: as made by ``optimizer_of``, with its moments when resuming.
        seed: decides the demonstrations together with the step.
        first_step: where to continue.

    Yields:
        ``loss`` (nats a token), ``grad_norm`` (before clipping), ``learning_rate``.

    Raises:
        ValueError: a gradient that is not finite.
    """
    from accelerate import Accelerator  # a second that readers of tables need not wait

    accelerator = Accelerator(mixed_precision=autocast(config.mixed_precision))
    # evaluation mode: no DDP around it, whose passes ranks have to make equally often
    model = accelerator.prepare_model(model, evaluation_mode=True)
    optimizer = accelerator.prepare_optimizer(optimizer)
    compute = Compute(model, config.mixed_precision)
    student = compute.model
    student.eval()  # no dropout anywhere; Qwen3 has none, other models may
    for step in range(first_step, config.steps):
        rate = learning_rate(config.optimizer, step, config.steps)
        set_learning_rate(optimizer, rate)
        # neighbours in length share a forward pass, so that little of it is padding
        batch = draw_batch(config, seed, step, tokenizer)
        pairs = sorted(batch, key=lambda pair: len(pair[0] + pair[1]))
        parts = [
            encode_pairs(part, tokenizer, config.learn_prompt, config.longest)
            for part, share in ranks.dealt(pairs, config.micro_batch)
            if share
        ]
        total = ranks.total(float(sum(learned[:, 1:].sum() for _, learned in parts)))
        loss_sum = 0.0
        ranks.gather_weights(student)
        with recomputing(student, config.gradient_checkpointing):
            for tokens, learned in parts:
                ids = tokens.to(accelerator.device)
                mask = learned[:, 1:].to(accelerator.device)
                loss = batch_loss(student, ids, mask, total, config.row_tokens)
                accelerator.backward(loss)
                loss_sum += loss.item()
        ranks.sum_gradients(model)
        limit = config.optimizer.max_grad_norm
        norm = clipped_norm(accelerator, model, limit, step, rate)
        optimizer.step()
        compute.refresh()
        optimizer.zero_grad()
        loss_sum = ranks.total(loss_sum)
        yield {"loss": loss_sum, "grad_norm": norm, "learning_rate": rate}


def batch_loss(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, total: float, row_tokens: int = 0
) -> Tensor:
    """``losses.sft_loss`` of a model on sequences, however large its vocabulary.

    Args:
        model: which learns.
        ids: (B, T + 1) int64, right-padded.
        mask: (B, T) bool, true on the tokens after the first that are learned.
        total: the loss's denominator.
        row_tokens: see ``SFTConfig``.
    """
    in_chunks = scores_in_chunks(model, mask.numel())
    outputs = states_of if in_chunks else logits_of
    if row_tokens:
        lengths = last_places(mask) + 1
        read = packed_outputs(model, ids[:, :-1], lengths, row_tokens, outputs)
    else:
        read = outputs(model, input_ids=ids[:, :-1])
    if not in_chunks:
        return sft_loss(read, ids[:, 1:], mask, denominator=total)
    tokens = ids[:, 1:].masked_fill(~mask, 0)
    return -chunked_log_probs(model, read, tokens).masked_fill(~mask, 0.0).sum() / total


def last_places(mask: Tensor) -> Tensor:
    """The last column of each row in which a mask is true, (B,) int64."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return columns.expand_as(mask).masked_fill(~mask, 0).amax(1)


def draw_batch(
    config: SFTConfig,
    seed: int,
    step: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[tuple[str, str]]:
    """The (prompt, response) pairs of one step; of a dataset as the tokenizer asks."""
    rng = np.random.default_rng([seed, _STREAM, step])
    if config.dataset is not None:
        assert tokenizer is not None
        found = draw(config.dataset, config.batch_sequences, rng)
        return as_pairs(found, tokenizer)
    if config.data != "demonstrations":
        annealing = config.data == "annealing"
        return tasks.draw_pretraining(config.batch_sequences, rng, annealing)
    return tasks.draw_demonstrations(
        config.batch_sequences, config.benchmarks, dict(config.qualities), rng
    )


def encode_pairs(
    pairs: list[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    learn_prompt: bool = False,
    longest: int = 0,
) -> tuple[Tensor, Tensor]:
    """Tokenize (prompt, response) pairs, right-padded, each ended by the EOS token.

    Prompt and response are tokenized apart, so that the boundary is where sampling
    will put it, whatever the tokenizer merges. What is longer than ``longest`` tokens
    (0: anything may be) is cut, and then has no EOS token.

    Returns:
        tokens (B, T) int64 and learned (B, T) bool: true on response and EOS, and on
        the prompt if ``learn_prompt``.
    """
    framed = [frame(prompt, tokenizer) for prompt, _ in pairs]
    prompts = tokenizer(framed, add_special_tokens=False)["input_ids"]
    answers = tokenizer([r for _, r in pairs], add_special_tokens=False)["input_ids"]
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = [[*p, *a, eos] for p, a in zip(prompts, answers, strict=True)]
    rows = [row[: longest or None] for row in rows]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    position = torch.arange(longest)
    length = torch.tensor([len(row) for row in rows])[:, None]
    start = torch.tensor([0 if learn_prompt else len(p) for p in prompts])[:, None]
    return tokens, (position >= start) & (position < length)

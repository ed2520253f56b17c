"""Accuracy on the benchmarks: sampled (avg@n) and greedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from opd_geometry.training import ranks, tasks
from opd_geometry.training.data import (
    DataConfig,
    TextProblem,
    as_prompt,
    held_out,
    verify,
)
from opd_geometry.training.rollout import decode_completions, encode_prompts, sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: str | DataConfig,
    *,
    problems: int = 256,
    samples: int = 2,
    temperature: float = 1.0,
    max_new_tokens: int = 40,
    seed: int = 0,
) -> float:
    """Share of completions of held-out problems that the verifier accepts (avg@n).

    Args:
        model, tokenizer: what is evaluated.
        benchmark: a key of ``tasks.BENCHMARKS``, or a dataset.
        problems: how many held-out problems; the same ones for every model.
        samples: completions per problem (n of avg@n); 1 when greedy.
        temperature: 0 decodes greedily.
        max_new_tokens: longest completion.
        seed: of the sampling; the same random numbers for every model.

    Returns:
        Accuracy in [0, 1]; its standard error is at most 0.5 / sqrt(problems).
    """
    questions: Sequence[tasks.Problem | TextProblem]
    if isinstance(benchmark, DataConfig):
        questions = held_out(benchmark, problems)
    else:
        questions = tasks.held_out(benchmark, problems)
    prompts = [as_prompt(question, tokenizer) for question in questions]
    ids, mask = encode_prompts(prompts, tokenizer)
    device = next(model.parameters()).device
    mine = ranks.own(len(questions))  # each rank samples and verifies its share
    rollout = sample(
        model,
        ids.to(device),
        mask.to(device),
        group_size=1 if temperature == 0 else samples,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        generator=torch.Generator().manual_seed(seed),
        temperature=temperature,
        share=mine,
    )
    asked = questions[mine]
    texts = decode_completions(rollout, tokenizer)
    ended = rollout.ended(tokenizer.eos_token_id).tolist()
    right = [
        end and verify(asked[i // rollout.group_size], text)
        for i, (text, end) in enumerate(zip(texts, ended, strict=True))
    ]
    return ranks.total(sum(right)) / ranks.total(len(right))

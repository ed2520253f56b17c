"""Sampling completions, and scoring them under any model.

Both share one idea: the prompts of a batch are read once per group, their keys and
values are copied to the completions of the group, and only completions are computed
per sample. Sampling and scoring therefore see the same numbers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from opd_geometry.losses import token_log_probs


@dataclass(frozen=True)
class Rollout:
    """A batch of sampled completions, ``B = prompts * group_size`` rows.

    Attributes:
        prompt_ids: (P, L) int64, left-padded; one row per distinct prompt.
        prompt_mask: (P, L) int64, 1 where a real token stands.
        completions: (B, T) int64, right-padded; rows of a group are neighbours.
        mask: (B, T) bool, true up to and including the end-of-sequence token.
        log_probs: (B, T) float32, log-probability of each token under the model and
            temperature it was sampled with; 0 where ``mask`` is false.
        group_size: completions per prompt.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completions: Tensor
    mask: Tensor
    log_probs: Tensor
    group_size: int

    def take(self, prompts: Tensor) -> "Rollout":
        """The given prompts with their groups, cut to the longest completion."""
        rows = self.rows_of(prompts)
        mask = self.mask[rows]
        longest = int(mask.sum(1).max())
        return Rollout(
            self.prompt_ids[prompts],
            self.prompt_mask[prompts],
            self.completions[rows, :longest],
            mask[:, :longest],
            self.log_probs[rows, :longest],
            self.group_size,
        )

    def rows_of(self, prompts: Tensor) -> Tensor:
        """Row numbers of the groups of the given prompts."""
        members = torch.arange(self.group_size, device=prompts.device)
        return (prompts[:, None] * self.group_size + members).flatten()


def encode_prompts(
    prompts: list[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, Tensor]:
    """Tokenize prompts, left-padded: ids and mask, both (P, L) int64."""
    batch = tokenizer(
        prompts, padding=True, return_tensors="pt", add_special_tokens=False
    )
    return batch["input_ids"], batch["attention_mask"]


def decode_completions(
    rollout: Rollout, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Completion texts without special tokens; ``B`` strings."""
    pad = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
    ids = rollout.completions.masked_fill(~rollout.mask, pad)
    return list(tokenizer.batch_decode(ids, skip_special_tokens=True))


def _read_prompts(
    model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, group_size: int
) -> tuple[Tensor, DynamicCache, Tensor, Tensor]:
    """Prefill each prompt once, then copy its cache to its group.

    Returns the logits of the first completion token (B, V), the cache, the mask (B, L)
    and the prompt lengths (B, 1).
    """
    cache = DynamicCache(config=model.config)
    positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=prompt_ids,
        attention_mask=prompt_mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    cache.batch_repeat_interleave(group_size)
    mask = prompt_mask.repeat_interleave(group_size, 0)
    lengths = mask.sum(1, keepdim=True)
    return logits.repeat_interleave(group_size, 0), cache, mask, lengths


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    group_size: int,
    max_new_tokens: int,
    eos_token_id: int,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> Rollout:
    """Sample ``group_size`` completions per prompt with a key-value cache.

    Every row has its own uniform number at every position (inverse transform), so what
    one row draws does not depend on when others finish. Finished rows leave the batch
    once a quarter of it is done.

    Args:
        model: any causal language model.
        prompt_ids, prompt_mask: (P, L) int64, left-padded.
        group_size: completions per prompt.
        max_new_tokens: longest completion; a row that has not ended by then is cut.
        eos_token_id: the token that ends a row.
        generator: CPU generator; the only source of randomness.
        temperature: logits are divided by it; 0 takes the most likely token.

    Returns:
        The rollout, with the log-probabilities it was sampled with.
    """
    logits, cache, mask, lengths = _read_prompts(
        model, prompt_ids, prompt_mask, group_size
    )
    rows, device = logits.shape[0], logits.device
    uniform = torch.rand(max_new_tokens, rows, 1, generator=generator).to(device)
    tokens = torch.full((rows, max_new_tokens), eos_token_id, device=device)
    log_probs = torch.zeros(rows, max_new_tokens, device=device)
    drawn = torch.zeros(rows, max_new_tokens, dtype=torch.bool, device=device)
    batch = torch.arange(rows, device=device)  # rows that are still in the cache
    running = torch.ones_like(batch, dtype=torch.bool)
    for t in range(max_new_tokens):
        chosen, log_prob = _draw(logits, uniform[t, batch], temperature)
        tokens[batch, t] = torch.where(running, chosen, eos_token_id)
        log_probs[batch, t] = torch.where(running, log_prob, 0.0)
        drawn[batch, t] = running
        running = running & (chosen != eos_token_id)
        alive = int(running.sum())
        if alive == 0 or t + 1 == max_new_tokens:
            break
        if alive <= 0.75 * len(batch):
            keep = running.nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            batch, mask, lengths = batch[keep], mask[keep], lengths[keep]
            chosen, running = chosen[keep], running[keep]
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        logits = model(
            input_ids=chosen[:, None],
            attention_mask=mask,
            position_ids=lengths + t,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    used = t + 1
    return Rollout(
        prompt_ids,
        prompt_mask,
        tokens[:, :used],
        drawn[:, :used],
        log_probs[:, :used],
        group_size,
    )


def _draw(
    logits: Tensor, uniform: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """One token a row by inverse transform (or the most likely one), and its log-prob.

    Args:
        logits: (B, V).
        uniform: (B, 1) in [0, 1).
        temperature: 0 means greedy, scored at temperature 1.

    Returns:
        Tokens (B,) int64 and their float32 log-probabilities (B,).
    """
    log_probs = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
    if temperature == 0:
        tokens = log_probs.argmax(-1, keepdim=True)
    else:
        # float64: the last bins must not vanish in the sum over a large vocabulary
        cumulative = log_probs.double().exp().cumsum(-1)
        tokens = torch.searchsorted(
            cumulative, uniform * cumulative[:, -1:], right=True
        )
        tokens.clamp_(max=logits.shape[-1] - 1)
    return tokens.squeeze(1), log_probs.gather(1, tokens).squeeze(1)


def completion_logits(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """Logits of every completion token, each prompt read once per group.

    Equal to a forward pass over prompt and completion together, at a fraction of its
    cost; differentiable.

    Returns:
        (B, T, V); position t scores ``rollout.completions[:, t]``.
    """
    first, cache, mask, lengths = _read_prompts(
        model, rollout.prompt_ids, rollout.prompt_mask, rollout.group_size
    )
    body = rollout.completions[:, :-1]
    if body.shape[1] == 0:
        return first[:, None]
    rest = model(
        input_ids=body,
        attention_mask=torch.cat([mask, torch.ones_like(body)], 1),
        position_ids=lengths + torch.arange(body.shape[1], device=body.device),
        past_key_values=cache,
        use_cache=True,
    ).logits
    return torch.cat([first[:, None], rest], 1)


def completion_log_probs(
    model: PreTrainedModel, rollout: Rollout, temperature: float = 1.0
) -> Tensor:
    """Log-probability of every sampled token under ``model``.

    Returns:
        (B, T) float32, in nats; 0 where ``rollout.mask`` is false.
    """
    logits = completion_logits(model, rollout) / temperature
    log_probs = token_log_probs(logits, rollout.completions)
    return log_probs.masked_fill(~rollout.mask, 0.0)

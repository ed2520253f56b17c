"""Sampling completions, and scoring them under any model.

Both share one idea: a prompt is read once for the whole group of its completions. To
sample, its keys and values are copied to the group; to score, when all tokens are
known, prompt and group are laid out as one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from opd_geometry.training import ranks
from opd_geometry.training.losses import token_log_probs
from opd_geometry.training.models import frame

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

# Tokens that are scored at a time: what stays in a processor's caches is computed
# faster, while an accelerator wants to be kept busy. No result depends on it.
_TOKENS_PER_PASS = {"cpu": 1024}
_MANY_TOKENS = 32768
# Logits that may exist at once: with more, they are made and scored a chunk of tokens
# at a time, and once more for the gradient. No vocabulary of a thousand comes near.
MOST_LOGITS = 2**24
# Tokens of a row in which a prompt and its group are scored together: in a longer one
# attention, which computes every pair, costs more than reading the prompt once each.
LONGEST_ROW = 4096


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
        stopped: (B,) bool, which completions ended with a stop string; None where
            nothing but the end-of-sequence token ends one.
        shared_prefixes: whether completions of a prompt that begin alike are scored as
            one as far as they do; other last digits.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completions: Tensor
    mask: Tensor
    log_probs: Tensor
    group_size: int
    stopped: Tensor | None = None
    shared_prefixes: bool = False

    def take(self, prompts: Tensor) -> Rollout:
        """The given prompts with their groups, cut to the longest of each."""
        rows = self.rows_of(prompts)
        mask = self.mask[rows]
        longest = int(mask.sum(1).max())
        prompt_mask = self.prompt_mask[prompts]
        first = prompt_mask.shape[1] - int(prompt_mask.sum(1).max())
        return Rollout(
            self.prompt_ids[prompts, first:],
            prompt_mask[:, first:],
            self.completions[rows, :longest],
            mask[:, :longest],
            self.log_probs[rows, :longest],
            self.group_size,
            None if self.stopped is None else self.stopped[rows],
            self.shared_prefixes,
        )

    def ended(self, eos_token_id: int) -> Tensor:
        """Which completions the model ended itself, (B,) bool; the others were cut."""
        ended = ((self.completions == eos_token_id) & self.mask).any(1)
        return ended if self.stopped is None else ended | self.stopped

    def to(self, device: torch.device) -> Rollout:
        """The same on another device; itself where it is there."""
        if self.mask.device == device:
            return self
        moved = tree_map_only(Tensor, lambda x: x.to(device), vars(self))
        return Rollout(**moved)

    def first_alike(self) -> Tensor:
        """The first completion of a prompt that is the same up to each token.

        Returns:
            (P, group_size, T) int64 in [0, group_size): that completion's number in its
            group, every completion's own where prefixes are not shared.
        """
        members = torch.arange(self.group_size, device=self.mask.device)
        if not self.shared_prefixes:
            return members[:, None].expand(*self._groups(self.mask).shape)
        ids = self._groups(self.completions.masked_fill(~self.mask, -1))
        alike = (ids[:, :, None] == ids[:, None]).cumprod(-1, dtype=torch.uint8)
        return alike.argmax(2)

    def own_tokens(self) -> Tensor:
        """How many tokens a prompt's completions have that are scored, (P,) int64."""
        members = torch.arange(self.group_size, device=self.mask.device)
        own = self.first_alike() == members[:, None]
        return (own & self._groups(self.mask)).sum((1, 2))

    def without_last(self) -> Rollout:
        """Tokens that predict another one: all but the last of each completion."""
        return replace(
            self, completions=self.completions[:, :-1], mask=self.mask[:, 1:]
        )

    def _groups(self, of_rows: Tensor) -> Tensor:
        return of_rows.unflatten(0, (len(self.prompt_ids), self.group_size))

    def rows_of(self, prompts: Tensor) -> Tensor:
        """Row numbers of the groups of the given prompts."""
        members = torch.arange(self.group_size, device=prompts.device)
        return (prompts[:, None] * self.group_size + members).flatten()


def encode_prompts(
    prompts: list[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, Tensor]:
    """Tokenize prompts, left-padded: ids and mask, both (P, L) int64."""
    framed = [frame(prompt, tokenizer) for prompt in prompts]
    batch = tokenizer(
        framed, padding=True, return_tensors="pt", add_special_tokens=False
    )
    return batch["input_ids"], batch["attention_mask"]


def decode_completions(
    rollout: Rollout, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Completion texts without the end-of-sequence token; ``B`` strings.

    Any other special token that was sampled shows, so that no verifier misses it.
    """
    lengths = (rollout.mask & (rollout.completions != tokenizer.eos_token_id)).sum(1)
    rows = zip(rollout.completions.tolist(), lengths.tolist(), strict=True)
    return list(tokenizer.batch_decode([ids[:length] for ids, length in rows]))


def _read_prompts(
    model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, group_size: int
) -> tuple[Tensor, DynamicCache, Tensor, Tensor]:
    """Prefill each prompt once, then copy its cache to its group.

    Returns the logits of the first completion token (B, V), the cache, the mask (B, L)
    and the prompt lengths (B, 1).
    """
    from transformers import DynamicCache

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
    share: slice = slice(None),
    at_once: int = 0,
    stops: Stops | None = None,
    shared_prefixes: bool = False,
) -> Rollout:
    """Sample ``group_size`` completions per prompt with a key-value cache.

    Every row has its own uniform number at every position (inverse transform), so what
    one row draws does not depend on when others finish. Finished rows leave the batch
    once a tenth of it is done.

    Args:
        model: any causal language model.
        prompt_ids, prompt_mask: (P, L) int64, left-padded.
        group_size: completions per prompt.
        max_new_tokens: longest completion; a row that has not ended by then is cut.
        eos_token_id: the token that ends a row.
        generator: CPU generator; the only source of randomness.
        temperature: logits are divided by it; 0 takes the most likely token.
        share: of the prompts, to which completions are written here. Each row draws
            the numbers that it would draw among all.
        at_once: prompts that share a cache, for whom memory is short; 0 for all.
        stops: of ``stops_at``: what ends a row beside its end-of-sequence token.
        shared_prefixes: completions of a prompt are computed as one until they differ,
            here and wherever the rollout is scored; other last digits.

    Returns:
        The rollout of the share, with the log-probabilities it was sampled with.
    """
    every = len(prompt_ids), group_size
    uniform = torch.rand(max_new_tokens, *every, 1, generator=generator)[:, share]
    prompt_ids, prompt_mask = prompt_ids[share], prompt_mask[share]
    size = at_once or len(prompt_ids)
    parts = (x.split(size) for x in (prompt_ids, prompt_mask))
    how = eos_token_id, temperature, stops, shared_prefixes
    pieces = [
        _sample_piece(model, ids, mask, drawn.flatten(1, 2), *how)
        for ids, mask, drawn in zip(*parts, uniform.split(size, dim=1), strict=True)
    ]
    return pieces[0] if len(pieces) == 1 else _joined(pieces)


def _sample_piece(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    uniform: Tensor,
    eos_token_id: int,
    temperature: float,
    stops: Stops | None,
    shared_prefixes: bool,
) -> Rollout:
    """``sample`` with the numbers of each position and row, (T, B, 1)."""
    max_new_tokens, rows = uniform.shape[:2]
    group_size = rows // len(prompt_ids)
    logits, cache, mask, lengths = _read_prompts(
        model, prompt_ids, prompt_mask, 1 if shared_prefixes else group_size
    )
    device = logits.device
    uniform = uniform.to(device)
    tokens = torch.full((rows, max_new_tokens), eos_token_id, device=device)
    log_probs = torch.zeros(rows, max_new_tokens, device=device)
    drawn = torch.zeros(rows, max_new_tokens, dtype=torch.bool, device=device)
    stopped = torch.zeros(rows, dtype=torch.bool, device=device)
    batch = torch.arange(rows, device=device)  # rows that are still in the cache
    running = torch.ones_like(batch, dtype=torch.bool)
    prefix = batch // group_size  # their rows in the cache, if they share any
    for t in range(max_new_tokens):
        if shared_prefixes:
            logits = logits[prefix]
        chosen, log_prob = _draw(logits, uniform[t, batch], temperature)
        tokens[batch, t] = torch.where(running, chosen, eos_token_id)
        log_probs[batch, t] = torch.where(running, log_prob, 0.0)
        drawn[batch, t] = running
        running = running & (chosen != eos_token_id)
        if stops is not None:
            stopped[batch] |= running & stops(tokens[batch, : t + 1])
            running = running & ~stopped[batch]
        alive = int(running.sum())
        if alive == 0 or t + 1 == max_new_tokens:
            break
        if shared_prefixes or alive <= 0.9 * len(batch):
            keep = running.nonzero().squeeze(1)
            batch, chosen, running = batch[keep], chosen[keep], running[keep]
            if shared_prefixes:
                keep, chosen, prefix = _branches(prefix[keep], chosen)
            if not torch.equal(keep, torch.arange(len(mask), device=device)):
                cache.batch_select_indices(keep)
                mask, lengths = mask[keep], lengths[keep]
        mask = pad(mask, (0, 1), value=1)
        with torch.inference_mode():
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
        None if stops is None else stopped,
        shared_prefixes,
    )


def _branches(prefix: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Parent and token of every prefix that goes on, and each completion's new one."""
    span = int(chosen.max()) + 1
    codes, prefix = (prefix * span + chosen).unique(return_inverse=True)
    return codes // span, codes % span, prefix


Stops = Callable[[Tensor], Tensor]  # tokens (B, t) that were written; whether they end


def stops_at(strings: tuple[str, ...], tokenizer: Any) -> Stops | None:
    """What sees whether a text just written ends with one of some strings.

    A token is at least a byte, but for special ones: only the last few are read. What
    follows a string within the token that completes it is kept.
    """
    if not strings:
        return None
    tail = max(len(string.encode()) for string in strings) + 4

    def ends(tokens: Tensor) -> Tensor:
        texts = tokenizer.batch_decode(tokens[:, -tail:].tolist())
        last = tokenizer.batch_decode(tokens[:, -tail:-1].tolist())
        found = [
            any(text.count(s) > before.count(s) for s in strings)
            for text, before in zip(texts, last, strict=True)
        ]
        return torch.tensor(found, device=tokens.device)

    return ends


def of_all_ranks(rollout: Rollout, rewards: Tensor) -> tuple[Rollout, Tensor]:
    """What all ranks wrote and earned, in the order of the prompts."""
    if ranks.count() == 1:
        return rollout, rewards
    parts, device = ranks.gathered((vars(rollout), rewards)), rewards.device
    pieces = [Rollout(**written).to(device) for written, _ in parts]
    return _joined(pieces), torch.cat([earned.to(device) for _, earned in parts])


def _joined(pieces: list[Rollout]) -> Rollout:
    """One rollout of several with prompts of one width."""
    longest = max(piece.mask.shape[1] for piece in pieces)

    def of_all(name: str, width: int = 0) -> Tensor:
        tensors = [getattr(piece, name) for piece in pieces]
        if width:
            tensors = [pad(x, (0, width - x.shape[1])) for x in tensors]
        return torch.cat(tensors)

    return Rollout(
        of_all("prompt_ids"),
        of_all("prompt_mask"),
        of_all("completions", longest),
        of_all("mask", longest),
        of_all("log_probs", longest),
        pieces[0].group_size,
        None if pieces[0].stopped is None else of_all("stopped"),
        pieces[0].shared_prefixes,
    )


def _draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
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
    cost; differentiable. A prompt and its group form one row, in which a completion
    sees the prompt and itself but not its neighbours; rows of like length share a pass.

    Returns:
        (B, T, V); position t scores ``rollout.completions[:, t]``.

    Raises:
        ValueError: a layer of the model decides by itself whom a token sees.
    """
    return _completion_outputs(model, rollout, logits_of)


def completion_states(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """Last hidden states where ``completion_logits`` has logits, (B, T, width)."""
    return _completion_outputs(model, rollout, states_of)


def logits_of(model: Any, **inputs: Any) -> Tensor:
    """A model's logits, (rows, tokens, V)."""
    logits: Tensor = model(**inputs).logits
    return logits


def states_of(model: Any, **inputs: Any) -> Tensor:
    """A model's last hidden states, (rows, tokens, width)."""
    states: Tensor = model.base_model(**inputs).last_hidden_state
    return states


Outputs = Callable[..., Tensor]  # of a model and its inputs, (rows, tokens, columns)


def _completion_outputs(
    model: PreTrainedModel, rollout: Rollout, outputs: Outputs
) -> Tensor:
    """Computed where the model is, and given where the rollout is."""
    width, here = rollout.mask.shape[1], rollout.mask.device
    _require_masked_attention(model, rollout.prompt_ids.shape[1] + width)
    rollout = rollout.to(next(model.parameters()).device)
    rollout = apart_if_long(rollout)
    parts = _passes(rollout)
    in_step = ranks.most(len(parts)) if ranks.lies_apart(model) else len(parts)
    read = [_one_pass(model, rollout.take(part), outputs) for part in parts]
    for _ in range(in_step - len(parts)):
        _one_pass(model, rollout.take(parts[0]), outputs)
    padded = [pad(part, (0, 0, 0, width - part.shape[1])) for part in read]
    rows = torch.cat([rollout.rows_of(part) for part in parts])
    return torch.cat(padded)[rows.argsort()].to(here)


def apart_if_long(rollout: Rollout) -> Rollout:
    """The same completions, each a group of its own, if a group's row is too long."""
    group = rollout.mask.sum(1).view(-1, rollout.group_size).sum(1)
    if rollout.prompt_ids.shape[1] + int(group.max()) <= LONGEST_ROW:
        return rollout
    return replace(
        rollout,
        prompt_ids=rollout.prompt_ids.repeat_interleave(rollout.group_size, 0),
        prompt_mask=rollout.prompt_mask.repeat_interleave(rollout.group_size, 0),
        group_size=1,
    )


def _passes(rollout: Rollout) -> tuple[Tensor, ...]:
    """Prompts of like length together, a few at a time: little padding, warm caches."""
    budget = _TOKENS_PER_PASS.get(rollout.mask.device.type, _MANY_TOKENS)
    if not rollout.shared_prefixes:
        tokens = rollout.own_tokens()
        longest = rollout.prompt_ids.shape[1] + int(tokens.max())
        return tokens.argsort(stable=True).split(max(1, budget // longest))
    tokens = rollout.without_last().own_tokens()
    order = tokens.argsort(stable=True)
    sizes = (rollout.prompt_mask.sum(1).max() + tokens[order]).tolist()
    return order.split(_least_padded(sizes, budget))


def _least_padded(sizes: list[int], budget: int) -> list[int]:
    """How many rows share each pass, so that all tokens with their padding are fewest.

    Args:
        sizes: tokens of the rows, ascending.
        budget: tokens of a pass; a further pass counts as a sixteenth of it.
    """
    best: list[tuple[int, list[int]]] = [(0, [])]
    for end, size in enumerate(sizes, 1):
        starts = range(max(0, end - max(1, budget // size)), end)
        best.append(
            min(
                (best[i][0] + budget // 16 + (end - i) * size, [*best[i][1], end - i])
                for i in starts
            )
        )
    return best[-1][1]


def _one_pass(model: PreTrainedModel, rollout: Rollout, outputs: Outputs) -> Tensor:
    """``completion_logits`` or ``completion_states`` in one forward pass."""
    *row, source = _pack(rollout)
    prompt = torch.arange(len(source), device=source.device) // rollout.group_size
    return _read_rows(model, outputs, *row)[prompt[:, None], source]


def _read_rows(
    model: PreTrainedModel,
    outputs: Outputs,
    ids: Tensor,
    positions: Tensor,
    visible: Tensor,
) -> Tensor:
    """Outputs of rows (P, S) in which (P, S, S) says which token sees which."""
    mask = visible[:, None]
    if model.config._attn_implementation == "eager":
        lowest = torch.finfo(model.dtype).min
        mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, lowest)
    return outputs(
        model,
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
    )


def _pack(rollout: Rollout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lay each prompt and its group out as one row of S tokens.

    The last token of a completion is left out: nothing is predicted from it. Where
    prefixes are shared, a token stands in the row once for all that begin alike, at
    the first of them; it sees those that its own prefix is made of.

    Returns:
        ids and positions (P, S) int64; visible (P, S, S) bool, who sees whom; source
        (B, T) int64, the place in its row whose logits score a completion's token.
    """
    prompts, width = rollout.prompt_ids.shape
    device = rollout.mask.device
    given = rollout.mask[:, 1:]  # tokens that predict another one
    first = rollout.without_last().first_alike()
    member = torch.arange(len(given), device=device)[:, None].expand_as(given)
    own = given & (first.flatten(0, 1) == member % rollout.group_size)
    counts = own.sum(1).view(prompts, -1)
    start = (width + counts.cumsum(1) - counts).view(-1, 1)
    size = width + int(counts.sum(1).max())
    place = (start + own.cumsum(1) - 1).view(first.shape).gather(1, first)
    source = torch.zeros_like(rollout.completions)
    source[:, 0] = width - 1
    source[:, 1:] = place.flatten(0, 1).masked_fill(~given, 0)

    step = torch.arange(given.shape[1], device=device).expand_as(given)
    rows, places = member[own] // rollout.group_size, source[:, 1:][own]
    lengths = rollout.prompt_mask.sum(1)
    ids = rollout.prompt_ids.new_zeros(prompts, size)
    positions, branch = torch.zeros_like(ids), torch.full_like(ids, -1)
    ids[:, :width] = rollout.prompt_ids
    positions[:, :width] = (rollout.prompt_mask.cumsum(1) - 1).clamp(min=0)
    branch[:, :width] = rollout.prompt_mask - 1  # 0 on the prompt, -1 on padding
    ids[rows, places] = rollout.completions[:, :-1][own]
    positions[rows, places] = lengths[rows] + step[own]
    branch[rows, places] = 1 + member[own] % rollout.group_size
    same = branch[:, :, None] == branch[:, None, :]
    if rollout.shared_prefixes and given.numel():
        same = _on_one_line(first, branch, positions - lengths[:, None])
    visible = (same | (branch == 0)[:, None, :]).tril()
    return ids, positions, visible, source


def _on_one_line(first: Tensor, branch: Tensor, depth: Tensor) -> Tensor:
    """Whether a token's own prefix holds, at another's depth, that other token.

    Args:
        first: (P, group_size, T), see ``Rollout.first_alike``.
        branch: (P, S) int64, -1 on padding, 0 on the prompt, else one more than the
            completion a token belongs to.
        depth: (P, S) int64, place of a token in its completion.

    Returns:
        (P, S, S) bool; padding sees padding, the prompt itself.
    """
    prompts, _, tokens = first.shape
    others = first.new_tensor([-1, 0])[:, None].expand(prompts, 2, tokens)
    lines = torch.cat([others, 1 + first], 1)
    prompt = torch.arange(prompts, device=first.device)[:, None, None]
    at = depth.clamp(0, tokens - 1)[:, None, :]
    return lines[prompt, branch[:, :, None] + 1, at] == branch[:, None, :]


def packed_outputs(
    model: PreTrainedModel,
    ids: Tensor,
    lengths: Tensor,
    row_tokens: int,
    outputs: Outputs = logits_of,
) -> Tensor:
    """Outputs of sequences of which several share a row, each seeing itself alone.

    Equal to a forward pass over padded rows of their own, without the padding;
    differentiable.

    Args:
        model: any causal language model with attention.
        ids: (B, T) int64, right-padded.
        lengths: (B,) int64 tokens of each sequence, at least 1.
        row_tokens: a row ends before the sequence that would make it longer.
        outputs: what else to take of the model, such as its hidden states.

    Returns:
        (B, T, V); zero on padding.

    Raises:
        ValueError: a layer of the model decides by itself whom a token sees.
    """
    _require_masked_attention(model, ids.shape[1])
    row, start = _rows(lengths.tolist(), row_tokens)
    step = torch.arange(ids.shape[1], device=ids.device)
    real = step < lengths[:, None]
    rows = torch.tensor(row, device=ids.device)[:, None].expand_as(real)[real]
    places = (torch.tensor(start, device=ids.device)[:, None] + step)[real]
    size = max(row) + 1, int(places.max()) + 1
    packed, positions = ids.new_zeros(size), ids.new_zeros(size)
    owner = ids.new_full(size, -1)
    packed[rows, places] = ids[real]
    positions[rows, places] = step.expand_as(real)[real]
    sequence = torch.arange(len(ids), device=ids.device)
    owner[rows, places] = sequence[:, None].expand_as(real)[real]
    visible = (owner[:, :, None] == owner[:, None, :]).tril()
    logits = _read_rows(model, outputs, packed, positions, visible)
    unpacked = logits.new_zeros(*ids.shape, logits.shape[-1])
    unpacked[real] = logits[rows, places]
    return unpacked


def _rows(lengths: list[int], row_tokens: int) -> tuple[list[int], list[int]]:
    """Row of each sequence, and the place in it where the sequence starts."""
    rows, starts, row, filled = [], [], 0, 0
    for length in lengths:
        if filled and filled + length > row_tokens:
            row, filled = row + 1, 0
        rows.append(row)
        starts.append(filled)
        filled += length
    return rows, starts


def _require_masked_attention(model: PreTrainedModel, longest: int) -> None:
    """Refuse layers that would not keep the sequences of a row apart.

    Args:
        model: which is asked.
        longest: tokens of the longest sequence.
    """
    how = getattr(model.config, "_attn_implementation", "sdpa")
    if how not in ("sdpa", "eager"):
        raise ValueError(
            f"attention {how}: expected sdpa or eager, which take a mask for every "
            "pair of tokens; call model.set_attn_implementation('sdpa')"
        )
    kinds = set(getattr(model.config, "layer_types", None) or ())
    others = sorted(kinds - {"full_attention", "sliding_attention"})
    if others:
        raise ValueError(
            f"layers of type {', '.join(others)}: expected attention, whose mask keeps "
            "the completions of a prompt apart; choose a model without them"
        )
    window = getattr(model.config, "sliding_window", None) or longest
    if longest > window:
        raise ValueError(
            f"{longest} tokens in a model with a sliding window of {window}: expected "
            "no more than the window; shorten max_new_tokens or choose another model"
        )


def completion_log_probs(
    model: PreTrainedModel, rollout: Rollout, temperature: float = 1.0
) -> Tensor:
    """Log-probability of every sampled token under ``model``.

    Returns:
        (B, T) float32, in nats; 0 where ``rollout.mask`` is false.
    """
    here = rollout.mask.device
    rollout = rollout.to(next(model.parameters()).device)
    if scores_in_chunks(model, rollout.mask.numel()):
        states = completion_states(model, rollout)
        log_probs = chunked_log_probs(model, states, rollout.completions, temperature)
    else:
        logits = completion_logits(model, rollout) / temperature
        log_probs = token_log_probs(logits, rollout.completions)
    return log_probs.masked_fill(~rollout.mask, 0.0).to(here)


# --- large vocabularies --------------------------------------------------------------


def scores_in_chunks(model: Any, tokens: int) -> bool:
    """Whether a model's logits for so many tokens would be too many at once.

    They cannot be made in chunks where the model does more to them than its head: then
    they exist whole, as they do where accelerate casts what the whole model gives.
    """
    head = model.get_output_embeddings()
    if tokens * head.weight.shape[0] <= MOST_LOGITS:
        return False
    return not hasattr(model, "_original_forward") and has_plain_head(model)


_PLAIN_HEADS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


@torch.no_grad()
def has_plain_head(model: Any) -> bool:
    """Whether a model's logits are its head applied to its states; asked once."""
    if model not in _PLAIN_HEADS:
        head = model.get_output_embeddings()
        one = torch.zeros(1, 1, dtype=torch.int64, device=head.weight.device)
        ours, theirs = (
            head(states_of(model, input_ids=one)),
            logits_of(model, input_ids=one),
        )
        _PLAIN_HEADS[model] = torch.allclose(ours, theirs, rtol=1e-3)
    return _PLAIN_HEADS[model]


def chunked_log_probs(
    model: Any, states: Tensor, tokens: Tensor, temperature: float = 1.0
) -> Tensor:
    """``losses.token_log_probs`` of a model's logits, which never exist whole.

    Args:
        model: whose head turns states into logits.
        states: (B, T, width) last hidden states.
        tokens: (B, T) int64.
        temperature: logits are divided by it.

    Returns:
        (B, T) float32, in nats; differentiable.
    """
    head = model.get_output_embeddings()

    def score(states: Tensor, tokens: Tensor) -> Tensor:
        return token_log_probs(head(states) / temperature, tokens)

    return in_chunks(score, head.weight.shape[0], states, tokens)


def in_chunks(score: Callable[..., Tensor], columns: int, *of_tokens: Tensor) -> Tensor:
    """What ``score`` gives for every token, made for a few tokens at a time.

    Args:
        score: of tensors (n, ...) the result (n, ...); called again for the gradient.
        columns: of the logits that it makes.
        of_tokens: (B, T, ...) each.

    Returns:
        (B, T, ...).
    """
    size = max(1, MOST_LOGITS // columns)
    chunks = zip(*(x.flatten(0, 1).split(size) for x in of_tokens), strict=True)
    scored = [checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.cat(scored).unflatten(0, of_tokens[0].shape[:2])

"""Who writes the student's completions: the loop itself, or an engine of vLLM.

Both are asked in the same way and give a ``Rollout`` with the log-probabilities that
they sampled with. An engine has weights of its own, to which the student's are copied
before it writes, and kernels of its own: what it says of a token and what the training
pass says of it differ, which ``losses.truncated_ratio`` corrects.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opd_geometry.training import ranks
from opd_geometry.training.models import check_same_vocabulary
from opd_geometry.training.rollout import Rollout, sample, stops_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST_PROMPT = 4096  # tokens that an engine keeps room for, beside a completion


@dataclass(frozen=True)
class Writing:
    """How completions are written.

    Attributes:
        group_size: completions per prompt.
        max_new_tokens: longest completion; one that has not ended by then is cut.
        temperature: logits are divided by it.
        stop: strings that end a completion, and stay in it.
        shared_prefixes: see ``Rollout``; an engine shares what it can in any case.
    """

    group_size: int
    max_new_tokens: int
    temperature: float
    stop: tuple[str, ...] = ()
    shared_prefixes: bool = False


class OwnSampler:
    """``rollout.sample``, by the model that is trained, or by its teacher.

    Args:
        model: who writes.
        tokenizer: of the model.
        at_once: see ``rollout.sample``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        at_once: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.at_once = model, tokenizer, at_once

    def take_weights(self, model: PreTrainedModel) -> None:
        """Write with these weights from now on: nothing to do, they are its own."""

    def write(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        how: Writing,
        generator: torch.Generator,
        share: slice,
    ) -> Rollout:
        """Completions of a share of the prompts.

        Args:
            prompt_ids, prompt_mask: (P, L) int64, left-padded; of all ranks.
            how: group size, length, temperature, stop strings.
            generator: CPU generator, the only source of randomness; it is advanced by
                the same numbers whatever the share.
            share: of the prompts.
        """
        device = next(self.model.parameters()).device
        rollout = sample(
            self.model,
            prompt_ids.to(device),
            prompt_mask.to(device),
            group_size=how.group_size,
            max_new_tokens=how.max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            generator=generator,
            temperature=how.temperature,
            share=share,
            at_once=self.at_once,
            stops=stops_at(how.stop, self.tokenizer),
            shared_prefixes=how.shared_prefixes,
        )
        return rollout.to(prompt_ids.device)


class EngineSampler:
    """An engine of vLLM in this process, on this process's GPU.

    Args:
        source: directory of a checkpoint of the student, for the engine to start from.
        tokenizer: of the student.
        max_new_tokens: longest completion.
        low: whether the engine computes in bf16; else in float32.
        memory: share of the GPU's memory that is the engine's.

    Raises:
        ValueError: one line; vLLM is not installed, does not start, or reads other
            tokens.
    """

    def __init__(
        self,
        source: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        low: bool,
        memory: float,
    ) -> None:
        # In a process of its own an engine could be handed no weights by reference.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            import vllm  # type: ignore[import-not-found]
        except ImportError as error:
            raise ValueError(
                "sampler vllm: vLLM is not installed; pip install -e .[vllm] on a "
                "machine with a GPU, or set policy.sampler=own"
            ) from error
        together = {"distributed_executor_backend": "external_launcher"}
        try:
            self.engine = vllm.LLM(
                model=str(source),
                dtype="bfloat16" if low else "float32",
                gpu_memory_utilization=memory,
                max_model_len=LONGEST_PROMPT + max_new_tokens,
                seed=0,
                # of the distribution that was sampled from, after the temperature
                logprobs_mode="processed_logprobs",
                # else a checkpoint's own defaults add tokens that end a completion
                generation_config="vllm",
                disable_log_stats=True,
                **(together if ranks.count() > 1 else {}),
            )
        except Exception as error:  # vLLM raises many kinds
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"vLLM does not start with {source}: {said}; lower policy.sampler_"
                "memory or policy.max_new_tokens, or set policy.sampler=own"
            ) from error
        self.params, self.tokenizer = vllm.SamplingParams, tokenizer
        check_same_vocabulary(tokenizer, self.engine.get_tokenizer(), "vLLM's engine")

    def take_weights(self, model: PreTrainedModel) -> None:
        """Copy a model's weights to the engine, and forget what it read with others."""
        weights = [(name, tensor.data) for name, tensor in model.named_parameters()]
        self.engine.apply_model(lambda theirs: theirs.load_weights(weights))
        self.engine.reset_prefix_cache()

    def write(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        how: Writing,
        generator: torch.Generator,
        share: slice,
    ) -> Rollout:
        """As ``OwnSampler.write``.

        Raises:
            ValueError: one line; it wrote something else than it was asked.
        """
        seeds = torch.randint(2**53, (len(prompt_ids),), generator=generator)[share]
        prompt_ids, prompt_mask = prompt_ids[share], prompt_mask[share]
        rows = zip(prompt_ids, prompt_mask.bool(), strict=True)
        asked = [{"prompt_token_ids": ids[real].tolist()} for ids, real in rows]
        params = [self._params(how, seed) for seed in seeds.tolist()]
        try:
            told = self.engine.generate(asked, params, use_tqdm=False)
        except ValueError as error:
            said = (str(error).splitlines() or [""])[0]
            raise ValueError(f"vLLM writes no completions: {said}") from error
        written = [completion for answer in told for completion in answer.outputs]
        if len(written) != len(asked) * how.group_size:
            raise ValueError(
                f"vLLM wrote {len(written)} completions for {len(asked)} prompts: "
                f"expected {how.group_size} each"
            )
        eos = int(self.tokenizer.eos_token_id)
        return _as_rollout(written, prompt_ids, prompt_mask, how, eos)

    def _params(self, how: Writing, seed: int) -> Any:
        return self.params(
            n=how.group_size,
            temperature=how.temperature,
            max_tokens=how.max_new_tokens,
            stop=list(how.stop) or None,
            stop_token_ids=[self.tokenizer.eos_token_id],
            logprobs=0,  # the sampled token's alone
            seed=seed,
            skip_special_tokens=False,  # a stop string may be one
        )


Sampler = OwnSampler | EngineSampler


def _as_rollout(
    written: list[Any], prompt_ids: Tensor, prompt_mask: Tensor, how: Writing, eos: int
) -> Rollout:
    """vLLM's completions, rows of a group beside each other."""
    device = prompt_ids.device
    longest = max(len(completion.token_ids) for completion in written)
    tokens = torch.full((len(written), longest), eos)
    log_probs = torch.zeros(len(written), longest)
    for row, completion in enumerate(written):
        ids = list(completion.token_ids)
        _check_end(completion, ids, how, eos)
        tokens[row, : len(ids)] = torch.tensor(ids)
        pairs = zip(ids, completion.logprobs or [{}] * len(ids), strict=True)
        said = [at[token].logprob if token in at else math.nan for token, at in pairs]
        log_probs[row, : len(ids)] = torch.tensor(said)
    if not log_probs.isfinite().all():
        raise ValueError(
            "vLLM gave no finite log-probability of a token that it sampled: expected "
            "one each"
        )
    lengths = torch.tensor([len(completion.token_ids) for completion in written])
    stopped = [isinstance(completion.stop_reason, str) for completion in written]
    return Rollout(
        prompt_ids,
        prompt_mask,
        tokens.to(device),
        (torch.arange(longest) < lengths[:, None]).to(device),
        log_probs.to(device),
        how.group_size,
        torch.tensor(stopped, device=device) if how.stop else None,
        how.shared_prefixes,
    )


def _check_end(completion: Any, ids: list[int], how: Writing, eos: int) -> None:
    """Refuse a completion that ended otherwise than the loop's own would."""
    ended = completion.finish_reason == "stop" and (
        isinstance(completion.stop_reason, str) or ids[-1:] == [eos]
    )
    cut = completion.finish_reason == "length" and len(ids) == how.max_new_tokens
    if not ids or not (ended or cut):
        raise ValueError(
            f"vLLM ended a completion of {len(ids)} tokens by "
            f"{completion.finish_reason} ({completion.stop_reason}): expected its "
            f"end-of-sequence token, a stop string, or {how.max_new_tokens} tokens"
        )

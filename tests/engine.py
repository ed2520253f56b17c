"""A stand-in for vLLM: its calls and result objects around a model of transformers.

It samples from the weights that were pushed to it. As vLLM does, it keeps what it read
of a prompt until it is told to forget, gives each completion of a group the prompt's
seed plus its number, leaves the end token and a stop string's tokens in ``token_ids``,
and says log-probabilities before the temperature unless it is asked for those after.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


class _Loadable:
    """What ``apply_model`` hands over: vLLM's model, which takes named weights."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        known, loaded = dict(self.model.named_parameters()), set()
        with torch.no_grad():
            for name, tensor in weights:
                known[name].copy_(tensor)
                loaded.add(name)
        return loaded


class LLM:
    """vLLM's offline engine, as far as a training loop calls it."""

    made: "list[LLM]" = []  # noqa: RUF012

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        dtype: str = "auto",
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        **kwargs: Any,
    ) -> None:
        if gpu_memory_utilization > 0.9:
            raise RuntimeError("Engine core initialization failed.\nSee above.")
        self.given = kwargs
        self.weights = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype)
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer or model)
        self.read: dict[tuple[int, ...], torch.Tensor] = {}
        self.made.append(self)

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        return [func(_Loadable(self.weights))]

    def reset_prefix_cache(self) -> bool:
        self.read.clear()
        return True

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[dict[str, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        params = sampling_params or SamplingParams()
        if isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        told = []
        for number, (prompt, asked) in enumerate(zip(prompts, params, strict=True)):
            ids = prompt["prompt_token_ids"]
            longest = self.given.get("max_model_len") or 10**6
            if len(ids) > longest:
                raise ValueError(f"The decoder prompt (length {len(ids)}) is too long")
            outputs = [self._complete(ids, asked, index) for index in range(asked.n)]
            told.append(RequestOutput(str(number), None, ids, outputs))
        return told

    def _complete(
        self, prompt: list[int], asked: SamplingParams, index: int
    ) -> CompletionOutput:
        generator = torch.Generator().manual_seed((asked.seed or 0) + index)
        ends = {*(asked.stop_token_ids or []), self.tokenizer.eos_token_id}
        strings = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        ids: list[int] = []
        said: list[dict[int, Logprob]] = []
        reason, why = "length", None
        while len(ids) < (asked.max_tokens or 10**6):
            logits = self._logits(prompt, ids)
            tempered = torch.log_softmax(logits / asked.temperature, -1)
            token = int(torch.multinomial(tempered.exp(), 1, generator=generator))
            raw = self.given.get("logprobs_mode", "raw_logprobs") == "raw_logprobs"
            scored = torch.log_softmax(logits, -1) if raw else tempered
            ids.append(token)
            said.append({token: Logprob(float(scored[token]), rank=1)})
            text = self.tokenizer.decode(ids, asked.skip_special_tokens)
            found = [string for string in strings if string in text]
            if token in ends and not asked.ignore_eos:
                reason = "stop"
                break
            if found:
                reason, why = "stop", found[0]
                text = text[: text.index(found[0])]
                break
        total = sum(at[token].logprob for at, token in zip(said, ids, strict=True))
        given = said if asked.logprobs is not None else None
        return CompletionOutput(index, text, ids, total, given, reason, why)

    def _logits(self, prompt: list[int], ids: list[int]) -> torch.Tensor:
        key = tuple(prompt)
        if ids or key not in self.read:
            row = torch.tensor([prompt + ids])
            logits = self.weights(input_ids=row).logits[0, -1].float()
            if ids:
                return logits
            self.read[key] = logits
        return self.read[key]

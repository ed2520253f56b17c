from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_geometry.training import evaluation, tasks
from opd_geometry.training.evaluation import accuracy
from opd_geometry.training.models import ModelConfig, build_model, character_tokenizer
from opd_geometry.training.rollout import Rollout, encode_prompts

TOKENIZER = character_tokenizer()
MODEL = build_model(ModelConfig(32, 1, 16), seed=0)


def written(texts: list[str], prompts: list[str], group_size: int) -> Rollout:
    """A rollout that holds the given texts; one that ends in ``...`` was cut."""
    rows = [
        TOKENIZER(text.removesuffix("..."))["input_ids"]
        + ([] if text.endswith("...") else [TOKENIZER.eos_token_id])
        for text in texts
    ]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), TOKENIZER.eos_token_id)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return Rollout(
        *encode_prompts(prompts, TOKENIZER), ids, mask, ids.float(), group_size
    )


class Author:
    """Stands in for sampling: writes what it is told, and notes how it was asked."""

    def __init__(self, write: Any) -> None:
        self.write, self.asked = write, dict[str, Any]()

    def __call__(self, model: Any, ids: Tensor, mask: Tensor, **asked: Any) -> Rollout:
        prompts = [
            TOKENIZER.decode(row[kept.bool()])
            for row, kept in zip(ids, mask, strict=True)
        ]
        self.asked = {**asked, "prompts": prompts}
        group = asked["group_size"]
        texts = [self.write(p, n) for p in range(len(prompts)) for n in range(group)]
        return written(texts, prompts, group)


def measure(
    monkeypatch: pytest.MonkeyPatch, write: Any, benchmark: str = "chain", **asked: Any
) -> tuple[float, dict[str, Any]]:
    author = Author(write)
    monkeypatch.setattr(evaluation, "sample", author)
    return accuracy(MODEL, TOKENIZER, benchmark, **asked), author.asked


def right(benchmark: str, p: int) -> str:
    return "#" + tasks.solution(tasks.held_out(benchmark, p + 1)[p])[1]


@pytest.mark.parametrize("benchmark", tasks.BENCHMARKS)
def test_right_answers_are_counted(
    benchmark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two of three samples are right for every fourth problem."""

    def write(p: int, n: int) -> str:
        return right(benchmark, p) if p % 4 == 0 and n < 2 else "#"

    value, asked = measure(monkeypatch, write, benchmark, problems=8, samples=3)
    assert value == 2 * 2 / 24
    assert asked["prompts"] == [q.prompt for q in tasks.held_out(benchmark, 8)]
    assert asked["group_size"] == 3
    assert asked["temperature"] == 1.0
    assert asked["eos_token_id"] == TOKENIZER.eos_token_id


def test_a_right_answer_to_another_problem_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write(p: int, n: int) -> str:
        return right("chain", p + 1)

    answers = [right("chain", p) for p in range(9)]
    same = sum(a == b for a, b in pairwise(answers))
    value, _ = measure(monkeypatch, write, problems=8, samples=2)
    assert value == same / 8 < 1


def test_an_answer_that_was_cut_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(p: int, n: int) -> str:
        return right("chain", p) + ("..." if n else "")

    assert measure(monkeypatch, write, problems=4, samples=2)[0] == 0.5


def test_greedy_needs_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    value, asked = measure(
        monkeypatch, lambda p, n: right("chain", p), problems=4, temperature=0
    )
    assert value == 1.0
    assert (asked["group_size"], asked["temperature"]) == (1, 0)


def test_a_seed_decides_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = []

    def sample(*args: Any, **asked: Any) -> Rollout:
        draws.append(torch.rand(3, generator=asked["generator"]).tolist())
        return Author(lambda p, n: "#")(*args, **asked)

    monkeypatch.setattr(evaluation, "sample", sample)
    for seed in (0, 0, 1):
        accuracy(MODEL, TOKENIZER, "chain", problems=2, seed=seed)
    assert draws[0] == draws[1] != draws[2]


def test_a_real_model_is_measured_alike_twice() -> None:
    values = [
        accuracy(MODEL, TOKENIZER, "gcd", problems=8, max_new_tokens=5)
        for _ in range(2)
    ]
    assert values[0] == values[1]
    assert 0.0 <= values[0] <= 1.0


def test_an_unknown_benchmark_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown benchmark 'sums'; expected one of"):
        accuracy(MODEL, TOKENIZER, "sums")

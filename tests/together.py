"""What tests do in several processes that train together; found by its name."""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

import engine
import torch
from transformers import PreTrainedModel

from opd_geometry.experiments import processes, runs
from opd_geometry.training import evaluation, policy, ranks, rollout
from opd_geometry.training.models import ModelConfig, build_model, character_tokenizer
from opd_geometry.training.optimizer import OptimizerConfig
from opd_geometry.training.policy import PolicyConfig, policy_steps
from opd_geometry.training.rollout import Rollout
from opd_geometry.training.samplers import EngineSampler
from opd_geometry.training.sft import SFTConfig, sft_steps

OPTIMIZER = OptimizerConfig(1.0, warmup_steps=0, max_grad_norm=float("inf"))
LESSONS = SFTConfig(OPTIMIZER, steps=2, batch_sequences=7, micro_batch=2)
POLICY = PolicyConfig(
    OPTIMIZER,
    steps=2,
    prompts_per_step=5,  # which no two processes share evenly
    group_size=3,
    max_new_tokens=6,
    micro_prompts=1,
)
MIXTURE = {"alpha": 0.4, "token_selection": "random", "keep_frac": 0.5}
CASES: dict[str, SFTConfig | PolicyConfig] = {
    "sft": LESSONS,
    "sft packed": replace(LESSONS, row_tokens=60, micro_batch=7),
    "opd": POLICY,
    "rlvr": replace(POLICY, alpha=0.0),
    "mixture": replace(POLICY, **MIXTURE, reward_flip=0.2),  # type: ignore[arg-type]
    "top gaps": replace(POLICY, token_selection="top-gap", keep_frac=0.3),
    "full": replace(POLICY, estimator="full"),
    "scoring": replace(POLICY, gap_from="scoring", gap_noise=1.0),
    "recomputed": replace(POLICY, gradient_checkpointing=True, micro_prompts=4),
    "pieces": replace(POLICY, alpha=0.5, sampled_prompts=1),
    "long rows": replace(POLICY, gap_from="scoring"),
    "engine": replace(POLICY, sampler="vllm", gap_from="scoring"),
    "shared": replace(POLICY, alpha=0.5, shared_prefixes=True),
    "copy": replace(POLICY, mixed_precision="bf16-copy", gap_from="scoring"),
}


class Forked:
    """A rank in place of ``Popen``'s that begins with what is imported here."""

    def __init__(self, _: object, stderr: IO[bytes], env: Any, **pipes: int) -> None:
        read, write = os.pipe()
        given = (read, stderr.fileno(), env)
        self.process = get_context("fork").Process(target=_become, args=given)
        self.process.start()
        os.close(read)
        self.stdin = os.fdopen(write, "wb")
        self.kill, self.wait = self.process.kill, self.process.join

    def poll(self) -> int | None:
        return self.process.exitcode


def _become(stdin: int, stderr: int, environment: Any) -> None:
    os.dup2(stdin, 0)
    os.dup2(stderr, 2)
    sys.stdin = os.fdopen(0)
    os.environ |= environment
    processes._main()


def in_two(function: Callable[[Any], None], argument: Any) -> None:
    """Call a function in two processes, forked from this one."""
    processes.subprocess.Popen = Forked
    processes.run(function, argument, 2)


def tiny(seed: int) -> PreTrainedModel:
    """A model that ends some of its completions early."""
    model = build_model(ModelConfig(32, 2, 16), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5.0)
        model.lm_head.weight[1] *= 3
    return model


def by_first_token(_: object, batch: Rollout, __: object) -> torch.Tensor:
    """A reward that random models earn now and then."""
    return (batch.completions[:, 0] % 2).float()


def engine_of(place: Path) -> EngineSampler:
    """A stand-in for vLLM in this process, which starts from other weights."""
    sys.modules["vllm"] = engine
    source, tokenizer = place / "engine", character_tokenizer()
    if ranks.index() == 0:
        tiny(2).save_pretrained(source)
        tokenizer.save_pretrained(source)
    ranks.gathered(None)  # the others wait for it
    return EngineSampler(source, tokenizer, 6, low=False, memory=0.3)


def take_steps(place: Path) -> None:
    """Two plain steps of every objective: gradients are what the weights moved by."""
    policy.verify_completions = by_first_token
    rollout._TOKENS_PER_PASS["cpu"] = 60  # so that ranks need passes of other numbers
    joined, drawn = policy.of_all_ranks, []

    def watched(*parts: Any) -> Any:
        whole = joined(*parts)
        drawn.append((whole[0].completions * whole[0].mask, whole[0].mask, whole[1]))
        return whole

    policy.of_all_ranks = watched
    both = [(name, sharded) for name in CASES for sharded in (False, True)]
    for name, sharded in both[:: 2 if ranks.count() == 1 else 1]:
        train = replace(CASES[name], sharded=sharded)
        drawn.clear()
        rollout.LONGEST_ROW = 10 if name == "long rows" else 4096
        model, tokenizer = tiny(0), character_tokenizer()
        if sharded:
            ranks.shard(model, low=train.mixed_precision == "bf16-copy")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        if isinstance(train, SFTConfig):
            loop = sft_steps(train, model, tokenizer, optimizer, seed=0)
        else:
            teacher = tiny(1)
            who = engine_of(place) if name == "engine" else None
            loop = policy_steps(
                train, model, teacher, tokenizer, optimizer, seed=0, sampler=who
            )
        told = []
        for metrics in loop:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
            weights = ranks.whole(model.state_dict())
            told.append((metrics, {n: w.clone() for n, w in weights.items()}))
        if ranks.index() == 0:
            how = ("one", "two", "shards")[ranks.count() - 1 + sharded]
            torch.save((told, list(drawn)), place / f"{name} {how}.pt")


def dying(run: runs.Run) -> None:
    """Train a run whose second process is killed in its fourth step, once."""
    evaluation.accuracy = lambda *_, **__: 0.5
    mark = runs.run_directory(run) / "died"
    loop = runs.loop_of

    def steps(run: runs.Run, *given: Any) -> Any:
        for number, metrics in enumerate(loop(run, *given)):
            if ranks.index() == 1 and number == 3 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield metrics

    runs.loop_of = steps
    runs.train(run)

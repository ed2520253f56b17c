"""One step by two processes against the same step by one, interleaved in one run.

Both have one thread each. While one takes a step alone the other waits; at the end both
take one alone at the same time, which says what the machine gives to two processes that
exchange nothing. On a machine that others use as well processor seconds are the
steadier number: those of the busier of two ranks against those of one.
"""

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
import torch.distributed as dist
from records import record
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd_geometry.experiments import processes
from opd_geometry.experiments.profiles import PROFILES
from opd_geometry.training import data, ranks
from opd_geometry.training.models import character_tokenizer
from opd_geometry.training.optimizer import OptimizerConfig, adamw
from opd_geometry.training.policy import PolicyConfig, policy_steps
from opd_geometry.training.sft import sft_steps

HERE = Path(__file__).parent
OPTIMIZER = OptimizerConfig(1e-5, warmup_steps=0)
POLICY = PolicyConfig(
    OPTIMIZER, 1, prompts_per_step=32, group_size=8, max_new_tokens=40, reward_flip=0.5
)
STEPS = {
    "sft": PROFILES["gpu"].sft,  # its batch, precision and passes; the texts are ours
    "opd": POLICY,
    "rlvr": replace(POLICY, alpha=0.0),
}


def stand_in(width: int) -> Qwen3ForCausalLM:
    """A random Qwen3 of two layers."""
    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "head_dim": 32}
    heads = {"num_attention_heads": width // 32, "num_key_value_heads": width // 64}
    size = {"vocab_size": len(character_tokenizer()), "num_hidden_layers": 2}
    ends = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    return Qwen3ForCausalLM(Qwen3Config(**shape, **heads, **size, **ends))


def demonstrations(folder: str) -> data.DataConfig:
    """Long responses of uneven length: 210 digits in the median, 1,000 at most."""
    draws, path = random.Random(0), Path(folder) / f"{ranks.index()}.jsonl"
    lengths = [min(1000, int(draws.lognormvariate(5.35, 0.6))) for _ in range(400)]
    texts = ["".join(draws.choices("0123456789", k=length)) for length in lengths]
    rows = [{"prompt": text[:20], "answer": "1", "response": text} for text in texts]
    path.write_text("\n".join(map(json.dumps, rows)))
    return data.DataConfig(data.digest_of(str(path)), str(path), response="response")


def steps_of(arm: str, width: int, repeats: int, folder: str) -> Any:
    """The loop of an arm, whose first step warms up."""
    train: Any = replace(STEPS[arm], optimizer=OPTIMIZER, steps=2 + repeats)
    model, tokenizer = stand_in(width), character_tokenizer()
    given = model, tokenizer, adamw(model, OPTIMIZER)
    if arm == "sft":
        lessons = replace(train, dataset=demonstrations(folder))
        return sft_steps(lessons, *given, seed=0)
    return policy_steps(train, model, stand_in(width), *given[1:], seed=0)


def alone(call: Callable[[], Any]) -> Any:
    """A call for which this process is the only one."""
    together = ranks.index, ranks.count
    ranks.index, ranks.count = (lambda: 0), (lambda: 1)
    try:
        return call()
    finally:
        ranks.index, ranks.count = together


def timed(step: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of a step by the clock and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(asked: tuple[str, int, int]) -> None:
    """On each of two ranks: the same steps by both and by the first alone."""
    with tempfile.TemporaryDirectory() as folder:
        both, one = (steps_of(*asked, folder) for _ in range(2))
        next(both)
        alone(lambda: next(one))
    shared, single = [], []
    for _ in range(asked[2]):
        dist.barrier()
        shared.append(timed(lambda: next(both)))
        dist.barrier()
        if ranks.index() == 0:
            single.append(timed(lambda: alone(lambda: next(one))))
    dist.barrier()
    apart = ranks.gathered(timed(lambda: alone(lambda: next(one))))
    found = ranks.gathered(shared)
    if ranks.index() > 0:
        return
    arm, width, _ = asked
    walls = [median(wall for wall, _ in single), median(w for w, _ in found[0])]
    cpus = [median(c for _, c in single)]
    cpus += [median(max(a[1], b[1]) for a, b in zip(*found, strict=True))]
    row = {"arm": arm, "width": width, "wall_one": walls[0], "wall_two": walls[1]}
    row |= {"wall_ratio": walls[0] / walls[1], "cpu_one": cpus[0], "cpu_two": cpus[1]}
    row |= {"cpu_ratio": cpus[0] / cpus[1]}
    row["wall_ratio_apart"] = 2 * walls[0] / max(wall for wall, _ in apart)
    record("processes", [row], ["arm", "width"])


@click.command(context_settings={"show_default": True})
@click.option("--arms", default=",".join(STEPS), help="With commas between.")
@click.option("--width", default=256)
@click.option("--repeats", default=3)
def main(arms: str, width: int, repeats: int) -> None:
    """Write data/benchmarks/processes.csv."""
    sys.path.insert(0, str(HERE))
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    import two_processes  # found again by this name in both processes

    for arm in arms.split(","):
        processes.run(two_processes.measure, (arm, width, repeats), 2)
        click.echo(f"measured {arm}")


if __name__ == "__main__":
    main()

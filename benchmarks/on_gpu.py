"""What a GPU is asked once one can be had: diagnostics, a step, the world grown wider.

1. The diagnostics of one pair of matrices on the device against those of the processor.
2. One OPD and one RLVR step of a random student of Qwen3-1.7B's shape, its teacher of
   the same: time and peak memory against what ``plan`` counts. RLVR's rewards are coin
   flips, as a random student earns none to learn from.
3. The small world at widths 512, 1024 and 2048, its bases trained here on a quarter of
   their steps: SFT, OPD and RLVR, one seed, read as ``audit`` reads runs.

A part that fails or no longer fits into the time is named in the results and not left
out. ``--small`` tries the script on a processor in a minute, with one arm of three.
"""

import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from opd_geometry.analysis.audit import readings
from opd_geometry.experiments.forecast import QWEN3, Shape, policy_forecast
from opd_geometry.experiments.measure import measure_run
from opd_geometry.experiments.profiles import PROFILES, build
from opd_geometry.geometry import gram
from opd_geometry.geometry.pairs import measure_tensors
from opd_geometry.training.models import character_tokenizer
from opd_geometry.training.optimizer import adamw, bfloat16_copy
from opd_geometry.training.policy import PolicyConfig, policy_steps

Rows = Iterator[dict[str, Any]]
SMALL = Shape(64, 2, 4, 2, 16, 128, 600, True)
ARMS = ("sft", "opd", "rlvr")


@click.command(context_settings={"show_default": True})
@click.option("--out", type=click.Path(path_type=Path), default=Path("on_gpu.csv"))
@click.option("--minutes", default=8.0, help="No part begins that would end later.")
@click.option("--small", is_flag=True, help="Tiny sizes, for a processor.")
def main(out: Path, minutes: float, small: bool) -> None:
    """Write a table of part, quantity, value, expected, and the reason why not."""
    began = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    widths = (32,) if small else (512, 1024, 2048)
    parts: list[tuple[str, float, Callable[[], Rows]]] = [
        ("diagnostics", 1.0, lambda: diagnostics(device, 96 if small else 4096)),
        *(
            (f"step {arm}", 1.0, lambda arm=arm: step(device, arm, small))
            for arm in ("opd", "rlvr")
        ),
        *(
            (f"width {width}", 2.0, lambda width=width: world(width, small))
            for width in widths
        ),
    ]
    found: list[dict[str, Any]] = []
    for part, least, work in parts:
        left = max(0.0, minutes - (time.monotonic() - began) / 60)
        if left < least:
            rows = [{"reason": f"not run: {left:.1f} of {minutes:g} minutes were left"}]
        else:
            try:
                rows = list(work())
            except Exception as error:
                said = (str(error).splitlines() or [""])[0]
                rows = [{"reason": f"failed: {type(error).__name__}: {said}"}]
        found += [{"part": part, "device": name or "processor", **row} for row in rows]
        columns = ["part", "device", "quantity", "value", "expected", "reason"]
        pd.DataFrame(found, columns=columns).to_csv(out, index=False)
        print(json.dumps(found[-len(rows) :], default=str), flush=True)


def row(quantity: str, value: float, expected: float | None = None) -> dict[str, Any]:
    """One line of the results."""
    return {"quantity": quantity, "value": value, "expected": expected}


def diagnostics(device: str, side: int) -> Rows:
    """Every metric of one pair, on the device and on the processor."""
    rng = torch.Generator().manual_seed(0)
    before = torch.randn(side, side, generator=rng)
    after = before + 1e-2 * torch.randn(side, 4, generator=rng) @ torch.randn(
        4, side, generator=rng
    )
    took: dict[str | None, float] = {}
    tables: dict[str | None, dict[str, float]] = {}
    for place in (None, device):  # None is LAPACK, which the device is held against
        start = time.perf_counter()
        with gram.on(place):
            tables[place] = measure_tensors(before, after, null=False)
        took[place] = time.perf_counter() - start
    yield row("seconds", took[device], took[None])
    for metric, value in tables[None].items():
        ours = tables[device][metric]
        if not (math.isnan(ours) and math.isnan(value)):
            yield row(metric, ours, value)


def student(shape: Shape, seed: int) -> PreTrainedModel:
    """A random Qwen3 of a shape; its tokenizer reads the tasks."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        tie_word_embeddings=shape.tied,
    )
    return Qwen3ForCausalLM(config).eval()


def step(device: str, arm: str, small: bool) -> Rows:
    """Seconds and peak bytes of the second of two steps, beside what plan counts."""
    shape = SMALL if small else QWEN3["Qwen3-1.7B"]
    train = replace(
        PROFILES["gpu"].policy,
        steps=2,
        prompts_per_step=4 if small else 8,
        group_size=4 if small else 8,
        max_new_tokens=16 if small else 512,
        dataset=None,
        alpha=1.0 if arm == "opd" else 0.0,
        reward_flip=0.0 if arm == "opd" else 0.5,
    )
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = student(shape, 0)
    teacher = bfloat16_copy(student(shape, 1)) if arm == "opd" else None
    loop = policy_steps(
        train,
        model.to(device),
        teacher,
        character_tokenizer(),
        adamw(model, train.optimizer),
        seed=0,
    )
    next(loop)
    start = time.perf_counter()
    metrics = next(loop)
    took = time.perf_counter() - start
    plan = counted(train, shape, arm)
    yield row("seconds", took, plan.seconds / train.steps)
    if device == "cuda":
        yield row("peak bytes", torch.cuda.max_memory_allocated(), plan.memory)
    yield row("tokens a completion", metrics["tokens"], train.max_new_tokens)
    yield row("learned share", metrics["learned_frac"])


def counted(train: PolicyConfig, shape: Shape, arm: str) -> Any:
    """What ``plan`` counts for such a run."""
    return policy_forecast(train, shape, shape if arm == "opd" else None, 1)


def world(width: int, small: bool) -> Rows:
    """The small world's three arms at a width, its base and teacher trained first."""
    budget = (
        "base.steps=2,base_annealing.steps=2,teacher_base.steps=2,teacher_sft.steps=2,"
        "sft.steps=2,policy.steps=2,policy.prompts_per_step=2,sft.batch_sequences=4"
        if small
        else "base.steps=750,base_annealing.steps=300,teacher_base.steps=500,"
        "teacher_sft.steps=150,sft.steps=100,policy.steps=40"
    )
    profile = (
        f"laptop:student.width={width},teacher.width={width},{budget},"
        f"student.layers={2 if small else 4}"
    )
    with tempfile.TemporaryDirectory() as place:
        before = os.environ.get("OPD_GEOMETRY_DATA")
        os.environ["OPD_GEOMETRY_DATA"] = place
        try:
            for arm in ("opd",) if small else ARMS:
                run = build(profile, arm, 0, from_scratch=True)
                read = readings(measure_run(run, PROFILES[profile].rank), arm)[0]
                for metric, value in read.dropna().items():
                    yield row(f"{arm} {metric}", float(value))
        finally:
            os.environ.pop("OPD_GEOMETRY_DATA")
            if before is not None:
                os.environ["OPD_GEOMETRY_DATA"] = before


if __name__ == "__main__":
    main()

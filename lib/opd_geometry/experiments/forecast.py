"""What a run of a large model takes: tokens, arithmetic, memory, time.

Counted from the shapes alone. Arithmetic, with P the weights that a token is multiplied
with, and S the tokens of a row, all of which attention computes:

    forward = 2 P + 4 layers heads head_size S     a token
    step    = forward of the teacher + (3 or, computed again, 4) forwards of the student

Memory is that of the master weights, their gradient and two moments in float32, bf16
copies of student and teacher, and the larger of what sampling and what the gradient
needs. Where several GPUs shard a run, masters, moments and the teacher's layers are
split; the copy and the gradient are whole on each. Time is arithmetic at a rate and,
while sampling, reading weights and cache.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from opd_geometry.experiments.descriptions import Run, Stored, origin
from opd_geometry.files import on_shelf
from opd_geometry.training.rollout import LONGEST_ROW, MOST_LOGITS
from opd_geometry.training.settings import ModelConfig, PolicyConfig, SFTConfig, Student

PROMPT_TOKENS = 256  # of a problem in its chat template, more than most
DEMONSTRATION_TOKENS = 1024  # where no longest one is given
# Bytes a parameter of a pretrained student: float32 weights, gradient and two moments,
# two bf16 copies of the size of a model, student and teacher; and the rest.
BYTES_A_PARAMETER, BYTES_BESIDE = 20, 1.2e9


@dataclass(frozen=True)
class Device:
    """A GPU: what it holds, and what of its printed rates such a loop reaches.

    Attributes:
        name: as printed.
        memory: bytes.
        flops: bf16 multiplications and additions a second, 40 % of the printed rate.
        bandwidth: bytes a second, 60 % of the printed rate.
        latency: seconds a layer and sampled token at least: launching its kernels.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    latency: float


H100 = Device("H100 80 GB", 80e9, 4e14, 2e12, 6e-4)


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense decoder in the manner of Qwen3.

    >>> f"{QWEN3['Qwen3-1.7B'].parameters:,}"
    '1,720,574,976'
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocabulary: int
    tied: bool

    @property
    def multiplied(self) -> int:
        """Weights of the layers that every token is multiplied with."""
        attention = 2 * self.width * self.head_size * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.inner)

    @property
    def parameters(self) -> int:
        """All weights, gains of the norms included."""
        gains = self.layers * 2 * (self.width + self.head_size) + self.width
        tables = self.vocabulary * self.width * (1 if self.tied else 2)
        return self.multiplied + gains + tables

    def forward_flops(self, tokens: float, row: float, scored: float) -> float:
        """Arithmetic of reading tokens in rows, the head applied to some of them."""
        attention = 4 * self.layers * self.heads * self.head_size * row
        head = 2 * self.vocabulary * self.width * scored
        return (2 * self.multiplied + attention) * tokens + head

    def cache_bytes(self, tokens: float, item: int) -> float:
        """Keys and values of so many tokens, of ``item`` bytes a number."""
        return 2 * tokens * self.layers * self.kv_heads * self.head_size * item


QWEN3 = {
    "Qwen3-0.6B": Shape(1024, 28, 16, 8, 128, 3072, 151936, True),
    "Qwen3-1.7B": Shape(2048, 28, 16, 8, 128, 6144, 151936, True),
    "Qwen3-4B": Shape(2560, 36, 32, 8, 128, 9728, 151936, True),
    "Qwen3-8B": Shape(4096, 36, 32, 8, 128, 12288, 151936, False),
    "Qwen3-14B": Shape(5120, 40, 40, 8, 128, 17408, 151936, False),
    "Qwen3-32B": Shape(5120, 64, 64, 8, 128, 25600, 151936, False),
}


def shape_of(source: str) -> Shape | None:
    """A model's shape: from its config.json here, or by its name; None if unknown."""
    config = on_shelf(source) / "config.json"
    if not config.is_file():
        name = Path(source.partition("@")[0]).name.removesuffix("-Base")
        return QWEN3.get(name)
    said: Mapping[str, Any] = json.loads(config.read_text())
    try:
        return Shape(
            width=said["hidden_size"],
            layers=said["num_hidden_layers"],
            heads=said["num_attention_heads"],
            kv_heads=said["num_key_value_heads"],
            head_size=said["head_dim"],
            inner=said["intermediate_size"],
            vocabulary=said["vocab_size"],
            tied=bool(said.get("tie_word_embeddings", False)),
        )
    except KeyError:
        return None


def width_of(student: ModelConfig | Student | Stored) -> float:
    """Channels of a profile's student; NaN where its shape is not known."""
    if isinstance(student, ModelConfig):
        return student.width
    shape = shape_of(student.source)
    return shape.width if shape else math.nan


@dataclass(frozen=True)
class Forecast:
    """What a whole run takes.

    Attributes:
        tokens: learned from, at most.
        flops: of all steps.
        memory: bytes a GPU at the peak.
        seconds: of all steps, evaluation and storing left out.
    """

    tokens: float
    flops: float
    memory: float
    seconds: float


def forecast(run: Run, gpus: int = 1) -> Forecast | None:
    """What a run from a whole model takes; None of others, or of unknown shapes.

    Args:
        run: the run.
        gpus: that share weights and work evenly, each an `H100`.
    """
    start = origin(run)
    student = shape_of(start.source) if isinstance(start, Stored) else None
    if student is None:
        return None
    if isinstance(run.train, SFTConfig):
        return _supervised(run.train, student, gpus)
    teacher = shape_of(run.teacher.source) if isinstance(run.teacher, Stored) else None
    if run.train.needs_teacher and teacher is None:
        return None
    return policy_forecast(run.train, student, teacher, gpus)


def _supervised(train: SFTConfig, student: Shape, gpus: int) -> Forecast:
    row = train.longest or DEMONSTRATION_TOKENS
    tokens = train.batch_sequences * row
    passes = 4 if train.gradient_checkpointing else 3
    flops = passes * student.forward_flops(tokens, row, tokens)
    activations = _activations(student, train.micro_batch * row, row, train)
    memory = _held(student, None, train, gpus) + activations
    return Forecast(
        train.steps * float(tokens),
        train.steps * flops,
        memory,
        train.steps * flops / H100.flops / gpus,
    )


def policy_forecast(
    train: PolicyConfig, student: Shape, teacher: Shape | None, gpus: int
) -> Forecast:
    """What a run of the policy loop takes, from shapes; see ``forecast``."""
    sequences = train.prompts_per_step * train.group_size
    written = sequences * train.max_new_tokens
    row, read = scored_row(train)
    passes = 4 if train.gradient_checkpointing else 3
    flops = passes * student.forward_flops(read, row, written)
    if teacher is not None:
        flops += teacher.forward_flops(read, row, written)
    author = student if train.rollouts == "student" or teacher is None else teacher
    item = _item(train)
    own = train.prompts_per_step / gpus
    engine = train.sampler_memory * H100.memory if train.sampler != "own" else 0.0
    at_once = min(own, train.sampled_prompts or own)
    rows = at_once * train.group_size
    cache = author.cache_bytes(rows * (PROMPT_TOKENS + train.max_new_tokens), item)
    sampling = author.forward_flops(written, train.max_new_tokens / 2, written)
    moved = train.max_new_tokens * (item * author.parameters + cache / 2)
    waiting = train.max_new_tokens * author.layers * H100.latency
    reading = own / at_once * (moved / H100.bandwidth + waiting)
    seconds = (flops + sampling) / H100.flops / gpus + reading
    gradient = 4 * student.parameters  # which is not there while sampling
    activations = _activations(student, train.micro_prompts * row, row, train)
    beside = engine + max(0.0 if engine else cache - gradient, activations)
    return Forecast(
        train.steps * float(written),
        train.steps * (flops + sampling),
        _held(student, teacher, train, gpus) + beside,
        train.steps * seconds,
    )


def scored_row(train: PolicyConfig) -> tuple[int, int]:
    """Tokens of a row that is scored, and of all rows of a step, as ``rollout`` packs.

    >>> from opd_geometry.training.optimizer import OptimizerConfig
    >>> scored_row(PolicyConfig(OptimizerConfig(1), 1, 2, 8, max_new_tokens=100))
    (1056, 2112)
    """
    group = PROMPT_TOKENS + train.group_size * train.max_new_tokens
    if group <= LONGEST_ROW:
        return group, train.prompts_per_step * group
    alone = PROMPT_TOKENS + train.max_new_tokens
    return alone, train.prompts_per_step * train.group_size * alone


def _item(train: PolicyConfig | SFTConfig) -> int:
    """Bytes of a number that is computed with."""
    return 4 if train.mixed_precision == "no" else 2


def _held(
    student: Shape,
    teacher: Shape | None,
    train: PolicyConfig | SFTConfig,
    gpus: int = 1,
) -> float:
    """Bytes of weights, gradient and moments, of the copy, and of the teacher."""
    shards = gpus if train.sharded else 1
    copy = 2 if train.mixed_precision == "bf16-copy" else 4 * (shards > 1)
    own = (12 / shards + 4 + copy) * student.parameters
    if teacher is None or getattr(train, "teacher_device", None):
        return own
    tables = teacher.vocabulary * teacher.width * (1 if teacher.tied else 2)
    split = (teacher.parameters - tables) / shards
    dtype = getattr(train, "teacher_dtype", None) or ""
    item = {"float32": 4, "bfloat16": 2}.get(dtype, _item(train))
    return own + (tables + split) * item


def _activations(
    shape: Shape, tokens: float, row: float, train: PolicyConfig | SFTConfig
) -> float:
    """Bytes that the gradient of so many tokens in rows keeps, at its peak."""
    a_layer = tokens * (8 * shape.width + 4 * shape.heads * shape.head_size)
    a_layer = (a_layer + 4 * tokens * shape.inner) * _item(train)
    inputs = tokens * shape.width * shape.layers * _item(train)
    kept = inputs + a_layer if train.gradient_checkpointing else shape.layers * a_layer
    logits = 5 * 4 * min(MOST_LOGITS, tokens * shape.vocabulary)
    return kept + logits + tokens * row  # who sees whom, a byte each


# --- whether it fits -------------------------------------------------------------


def memory_bytes(run: Run, gpus: int = 1) -> float | None:
    """Memory that a run needs of each GPU; None where it is small, or unknown."""
    student = origin(run)
    if isinstance(student, Stored):
        found = forecast(run, gpus)
        return found.memory if found else None
    if not isinstance(student, Student) or not student.parameters:
        return None
    return BYTES_A_PARAMETER * student.parameters + BYTES_BESIDE


def check_memory(left: Iterable[Run], jobs: int, processes: int = 1) -> None:
    """Refuse to start what the memory of this machine, or of its GPU, cannot hold.

    Raises:
        ValueError: one line with both numbers.
    """
    needed = [memory_bytes(run, processes) or 0.0 for run in left]
    wanted = sum(sorted(needed)[-jobs:])
    on_gpu = torch.cuda.is_available() and "ACCELERATE_USE_CPU" not in os.environ
    wanted *= 1 if on_gpu else processes
    if on_gpu:
        free, where = torch.cuda.mem_get_info()[0], "of GPU memory"
    else:
        free, where = psutil.virtual_memory().available, "of memory"
    if wanted > free:
        raise ValueError(
            f"{jobs} runs at a time need about {wanted / 1e9:.1f} GB {where} and "
            f"{free / 1e9:.1f} GB are free: expected as much; use fewer --jobs, or a "
            "smaller student, or lower micro_prompts, micro_batch or max_new_tokens"
        )

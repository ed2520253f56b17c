"""A tiny model in transformers' Trainer; and one of two processes of it, under gloo."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from opd_geometry.training.callback import GeometryCallback, ProjectionCallback

GEOMETRY = ("stable_rank", "frobenius_norm", "sparsity", "similarity_to_locked")


SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
K, LOCK, STEPS = 3, 3, 8


def qwen(seed: int = 0) -> Any:
    set_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES))


class Data(Dataset):
    """Random tokens."""

    def __init__(self, label: bool = False) -> None:
        self.x = torch.randint(
            1, 32, (64, 12), generator=torch.Generator().manual_seed(1)
        )
        self.label = label

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.x[i], "labels": i % 2 if self.label else self.x[i]}


def trainer(
    model: Any, folder: Path, optimizer: Any = None, data: Any = None, **settings: Any
) -> Any:
    options = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 8,
        "use_cpu": True,
        "report_to": "none",
        "logging_steps": 1,
        "save_steps": 1,
        "disable_tqdm": True,
        "seed": 0,
        "weight_decay": 0.0,
        "bf16": False,
        "dataloader_pin_memory": False,
        **settings,
    }
    made = Trainer(
        model=None if callable(data) else model,
        model_init=data if callable(data) else None,
        args=TrainingArguments(**options),
        eval_dataset=Data(),
        train_dataset=Data() if data is None or callable(data) else data,
        optimizers=(optimizer(made_for(model)) if optimizer else None, None),
    )
    made.remove_callback(PrinterCallback)
    return made


def made_for(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.ndim > 1]


def snap(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def logged(trainer: Any) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "projection/confined" in row]


def begin(rank: int, port: str) -> None:
    """Become one of two processes."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    torch.set_num_threads(1)


def watched(folder: Path, **settings: Any) -> tuple[Any, Any, Any]:
    """A trainer with both callbacks."""
    made = trainer(qwen(), folder, save_steps=5, **settings)
    geometry = GeometryCallback(made, every=1, k=K, lock_at=LOCK)
    confined = ProjectionCallback(made, lock_at=LOCK, k=K, form="update")
    made.add_callback(geometry)
    made.add_callback(confined)
    return made, geometry, confined


def as_numbers(tensors: dict[str, Any]) -> dict[str, Any]:
    """What can be sent to a process that outlives this one."""
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def told(made: Any, geometry: Any, confined: Any, heard: list[Any]) -> dict[str, Any]:
    """What a test compares: columns by step, weights, bases, who keeps W_0."""
    columns = {
        row["step"]: [row[f"geometry/{n}"] for n in GEOMETRY if f"geometry/{n}" in row]
        for row in made.state.log_history
        if "geometry/seconds" in row
    }
    return {
        "keeps": [geometry.start is not None, confined.origin.start is not None],
        "geometry": columns,
        "projection": [r["projection/confined"] for r in logged(made)],
        "leak": [r["projection/leak"] for r in logged(made) if r["step"] > LOCK],
        "weights": as_numbers(snap(made.accelerator.unwrap_model(made.model))),
        "bases": as_numbers(confined.bases),
        "lock_step": confined.lock_step,
        "heard": [str(w.message) for w in heard if "locked at" in str(w.message)],
    }


def confined_in_two(rank: int, port: str, folder: Path) -> list[dict[str, Any]]:
    """DDP: a whole training, then one that goes on from its fifth step."""
    begin(rank, port)
    results = []
    for resume in (None, str(folder / "checkpoint-5")):
        made, geometry, confined = watched(
            folder, per_device_train_batch_size=4, ddp_backend="gloo"
        )
        kept = [geometry.start is not None, confined.origin.start is not None]
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            made.train(resume_from_checkpoint=resume)
        assert type(made.model_wrapped).__name__ == "DistributedDataParallel"
        assert made.state.global_step == STEPS
        results.append(told(made, geometry, confined, heard) | {"kept": kept})
    return results


def sharded_in_two(rank: int, port: str, folder: Path) -> tuple[str, list[str], int]:
    """FSDP2 as accelerate makes it; it does so on accelerators only, unless told."""
    begin(rank, port)

    def sharded() -> Any:
        made = trainer(qwen(), folder, save_strategy="no", ddp_backend="gloo")
        state = made.accelerator.state
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Qwen3DecoderLayer"],
        )
        made.is_fsdp_enabled = True
        return made

    refused, said = sharded(), ""
    refused.add_callback(ProjectionCallback(refused, lock_at=LOCK, k=K))
    try:
        refused.train()
    except ValueError as error:
        said = str(error)
    assert refused.state.global_step == 0
    watched = sharded()
    watched.add_callback(GeometryCallback(watched, every=1, k=K))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        watched.train()
    assert type(next(watched.model.parameters())).__name__ == "DTensor"
    lines = [str(w.message) for w in heard if "geometry" in str(w.message)]
    return said, lines, watched.state.global_step

"""Trainers x optimizers x weights: how much of the update leaves the subspace?

Each row trains a tiny model for 40 steps in a real trainer, with ProjectionCallback
locking at step 10, and holds the weights of the last checkpoint against those of the
lock: leak = ||D - D V V^T||_F^2 / ||D||_F^2, a mean over the confined parameters. What
is refused has the reason instead. Schedule-free optimizers need the package
schedulefree, adapters peft; requirements.txt has both.

    python benchmarks/confinement_table.py

writes data/confinement.csv.
"""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
    logging,
    set_seed,
)
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
)

from opd_geometry.experiments.runs import data_directory, provenance
from opd_geometry.geometry.projection import leaked_energy
from opd_geometry.training.callback import ProjectionCallback
from opd_geometry.training.models import ModelConfig, build_model, character_tokenizer

LOCK, STEPS, K = 10, 40, 4
PROMPTS = [f"{a}+{b}=" for a in range(1, 9) for b in range(1, 9)]
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 8,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_steps": LOCK,
    "logging_steps": LOCK,
    "disable_tqdm": True,
    "weight_decay": 0.0,
    "seed": 0,
}
INSIDE = ("q", "k", "v", "o", "gate", "up", "down")


def dense() -> Any:
    """A Qwen3 model."""
    return build_model(ModelConfig(width=64, layers=2, head_size=16), 0)


def experts() -> Any:
    """Stacks of experts, three-dimensional."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 4, "head_dim": 16, "moe_intermediate_size": 48}
    shape |= {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96}
    vocabulary = len(character_tokenizer())
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=vocabulary, **shape))


def conv1d() -> Any:
    """Weights stored as (in, out)."""
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(character_tokenizer()), **shape))


def adapters() -> Any:
    """LoRA on a dense model."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(dense(), LoraConfig(target_modules=["q_proj", "v_proj"]))


def schedule_free(parameters: Any) -> Any:
    """An optimizer that saves an average of its weights."""
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(parameters, lr=1e-3)


OPTIMIZERS: dict[str, Callable[[Any], Any] | None] = {
    "AdamW": None,
    "AdamW, epsilon 1e-4": lambda ps: torch.optim.AdamW(
        ps, 1e-3, eps=1e-4, weight_decay=0.0, fused=True
    ),
    "SGD, momentum": lambda ps: torch.optim.SGD(ps, 0.05, momentum=0.9),
    "Adafactor": lambda ps: torch.optim.Adafactor(ps, 1e-2),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, 1e-3),
    "Muon": lambda ps: torch.optim.Muon(ps, 1e-2),
    "schedule-free AdamW": schedule_free,
}
MODELS = {"dense": dense, "experts": experts, "Conv1D": conv1d, "LoRA": adapters}
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMS = ("update", "gradient")
CASES = [
    *[("SFTTrainer", "AdamW", "dense", d, f) for d in DTYPES for f in FORMS],
    *[
        (t, "AdamW", "dense", d, "update")
        for t in ("GRPOTrainer", "DPOTrainer", "DistillationTrainer")
        for d in ("float32", "bf16")
    ],
    *[("SFTTrainer", "AdamW, epsilon 1e-4", "dense", "fp16", form) for form in FORMS],
    *[
        ("Trainer", o, "dense", d, f)
        for o in OPTIMIZERS
        if o != "AdamW, epsilon 1e-4"
        for d, f in (("float32", "update"), ("bf16", "update"), ("float32", "gradient"))
    ],
    *[
        ("Trainer", "AdamW", m, d, "update")
        for m in ("experts", "Conv1D", "LoRA")
        for d in ("float32", "bf16")
    ],
]


def trainer_of(kind: str, model: Any, optimizer: str, folder: str) -> Any:
    """A real trainer on a tiny problem."""
    tokenizer = character_tokenizer()
    make = OPTIMIZERS[optimizer]
    matrices = [
        p
        for name, p in model.named_parameters()
        if (p.ndim == 2 and "layers" in name) or optimizer != "Muon"
    ]
    options = {"output_dir": folder, **SETTINGS}
    common = {"model": model, "optimizers": (make(matrices) if make else None, None)}
    if kind == "GRPOTrainer":
        return GRPOTrainer(
            reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
            args=GRPOConfig(
                num_generations=4, beta=0.0, max_completion_length=4, **options
            ),
            train_dataset=Dataset.from_list([{"prompt": p} for p in PROMPTS]),
            processing_class=tokenizer,
            **common,
        )
    if kind == "DPOTrainer":
        pairs = [{"prompt": p, "chosen": "12", "rejected": "345"} for p in PROMPTS]
        return DPOTrainer(
            ref_model=dense(),
            args=DPOConfig(**options),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            **common,
        )
    if kind == "DistillationTrainer":
        return DistillationTrainer(
            teacher_model=build_model(ModelConfig(width=64, layers=2, head_size=16), 1),
            args=DistillationConfig(max_completion_length=4, **options),
            train_dataset=Dataset.from_list([{"prompt": p} for p in PROMPTS]),
            processing_class=tokenizer,
            **common,
        )
    texts = Dataset.from_list([{"text": f"{p}{len(p)},{p}"} for p in PROMPTS])
    if kind == "SFTTrainer":
        return SFTTrainer(
            args=SFTConfig(**options),
            train_dataset=texts,
            processing_class=tokenizer,
            **common,
        )
    rows = [tokenizer(row["text"])["input_ids"][:8] for row in texts]
    return Trainer(
        args=TrainingArguments(**options),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        **common,
    )


def measured(
    kind: str, optimizer: str, model: str, weights: str, form: str
) -> dict[str, Any]:
    """Train one row; its leak by the saved checkpoints, or why it is refused."""
    set_seed(0)
    made = MODELS[model]().to(DTYPES[weights])
    row: dict[str, Any] = {"leak": float("nan"), "confined": float("nan"), "said": ""}
    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(record=True) as heard,
    ):
        warnings.simplefilter("always")
        try:
            trainer = trainer_of(kind, made, optimizer, folder)
            trainer.remove_callback(PrinterCallback)
            confined = ProjectionCallback(
                trainer,
                lock_at=LOCK,
                k=K,
                form=form,
                roles=INSIDE if optimizer == "Muon" else None,
            )
            trainer.add_callback(confined)
            trainer.train()
        except ValueError as error:
            return row | {"said": f"refused: {error}"}
        lock, last = (
            dict(
                type(made)
                .from_pretrained(
                    Path(folder) / f"checkpoint-{step}", dtype=DTYPES[weights]
                )
                .named_parameters()
            )
            for step in (LOCK, STEPS)
        )
        leaks = []
        for name, v in confined.bases.items():
            delta = (last[name].double() - lock[name].double()).detach()
            delta = delta.mT if name in confined.turned else delta
            if v.ndim == 3:
                kept = v.flatten(1).any(1)
                delta, v = delta[kept], v[kept]
            if delta.any():
                leaks.append(leaked_energy(delta, v))
    logged = [r for r in trainer.state.log_history if "projection/confined" in r]
    told = [str(w.message) for w in heard if w.filename.endswith("confining.py")]
    told = [line for line in told if not line.startswith("locked at")]
    return {
        "leak": sum(leaks) / len(leaks),
        "confined": logged[-1]["projection/confined"],
        "said": " | ".join(told),
    }


def main() -> None:
    """Train every row and write the table."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    for case in CASES:
        names = ("trainer", "optimizer", "model", "weights", "form")
        rows.append(dict(zip(names, case, strict=True)) | measured(*case))
        print(*rows[-1].values(), flush=True)
    about = {k: v for k, v in provenance().items() if k in ("torch", "transformers")}
    table = pd.DataFrame(rows).assign(**about, machine=provenance()["machine"])
    table.to_csv(data_directory() / "confinement.csv", index=False, float_format="%.4g")


if __name__ == "__main__":
    main()

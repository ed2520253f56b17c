#!/usr/bin/env bash
# transformers' Trainer with fsdp=True in two processes without an accelerator: what is
# trained is DDP with whole weights in every process, and nothing says so.
#
# Guess before it was run: refused, or a warning that FSDP needs an accelerator.
# Seen: accepted; accelerate takes the plugin and drops it for the kind MULTI_CPU. No
# parameter is a DTensor, every process holds all entries, exit 0. torch's own
# fully_shard does shard under gloo, so a test of sharded training that is written with
# the Trainer on a processor tests something else.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0 \
  accelerate==1.15.0
cat > check.py <<'P'
import sys
import warnings

import accelerate
import torch
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

transformers.logging.set_verbosity_warning()
config = Qwen3Config(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, head_dim=16,
)
rows = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 8
arguments = TrainingArguments(
    "out", max_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to="none",
    save_strategy="no", ddp_backend="gloo", disable_tqdm=True, fsdp=True,
    fsdp_config={"transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]},
)
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    trainer = Trainer(Qwen3ForCausalLM(config), arguments, train_dataset=rows)
    trainer.train()
told = [str(w.message) for w in heard if "fsdp" in str(w.message).lower()]
names = {type(p).__name__ for p in trainer.model.parameters()}
wrapped = type(trainer.model_wrapped).__name__
kind = str(trainer.accelerator.distributed_type).rpartition(".")[2]
whole = sum(p.numel() for p in trainer.model.parameters()) == sum(
    p.numel() for p in Qwen3ForCausalLM(config).parameters()
)
if arguments.process_index == 0:
    for package in (torch, transformers, accelerate):
        print(package.__name__, package.__version__.partition("+")[0])
    print(f"asked: fsdp={arguments.fsdp}, version {arguments.fsdp_config.get('version', 2)}")
    print(f"kind {kind}, wrapped in {wrapped}, parameters are {names}, whole: {whole}")
    print("warnings about FSDP:", told)
same = wrapped == "DistributedDataParallel" and names == {"Parameter"} and whole
sys.exit(not (same and not told))
P
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
code=0
venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 check.py ||
  code=$?
[ "$code" = 0 ] && echo "as described" || echo "CHANGED"
exit "$code"

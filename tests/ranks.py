"""One of two processes that shard a tiny model and save it as trainers do."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import save_fsdp_model
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.fsdp import fully_shard
from transformers import Qwen3Config, Qwen3ForCausalLM

SIZES = {
    "vocab_size": 25,  # so that two shards of it differ
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "tie_word_embeddings": False,
}


def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES))


def accelerated(sharded: Qwen3ForCausalLM, folder: Path) -> None:
    """As accelerate saves under FSDP2, and with it TRL: in parts, by rank, whole."""
    accelerator = Accelerator(cpu=True)
    for kind, dcp_too, place in (
        ("SHARDED_STATE_DICT", True, "checkpoint-3"),
        ("SHARDED_STATE_DICT", False, "checkpoint-4"),
        ("FULL_STATE_DICT", True, "checkpoint-5"),
    ):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
        save_fsdp_model(plugin, accelerator, sharded, folder / place, use_dcp=dcp_too)


def main(folder: Path, rank: int, port: str) -> None:
    # accelerate asks the environment which process this is.
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {k: str(v) for k, v in own.items()}
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    sharded = model()
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    optimizer = torch.optim.AdamW(sharded.parameters())
    sharded(torch.arange(6)[None]).logits.sum().backward()
    optimizer.step()
    state = sharded.state_dict()
    actor = folder / "global_step_3" / "actor"  # verl, SkyRL
    actor.mkdir(parents=True, exist_ok=True)
    torch.save(state, actor / f"model_world_size_2_rank_{rank}.pt")
    place = folder / "step_3" / "policy" / "weights" / "model"  # NeMo-RL
    writer = HuggingFaceStorageWriter(str(place), save_distributed=True)
    dcp.save(dict(state), storage_writer=writer)
    accelerated(sharded, folder)
    # prime-rl, with its optimizer
    moments = {"state": {n: {"exp_avg": w + 1} for n, w in state.items()}}
    app = {"app": {"model": state, "optimizers": moments}}
    dcp.save(app, checkpoint_id=folder / "step_4/trainer")
    whole = {name: w.full_tensor() for name, w in state.items()}
    if rank == 0:
        unsharded = model()
        unsharded.load_state_dict(whole)
        unsharded.save_pretrained(folder / "whole")
    dist.barrier()
    dist.destroy_process_group()

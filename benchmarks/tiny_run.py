"""Train a tiny model for two steps and keep what it started from and both steps.

    python benchmarks/tiny_run.py [FOLDER]

`data/checkpoints/tiny-run` is made so: a Qwen3 of width 32 with two layers, in float32,
AdamW at a rate of 1e-3 on random tokens. It shows what `opd-geometry trajectory` takes.
"""

import sys
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

STEPS = 2
RATE = 1e-3
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def main(folder: Path) -> None:
    """Write FOLDER/start, FOLDER/checkpoint-1 and FOLDER/checkpoint-2."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    model.save_pretrained(folder / "start")
    for step in range(1, STEPS + 1):
        tokens = torch.randint(0, SIZES["vocab_size"], (8, 32))
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        model.save_pretrained(folder / f"checkpoint-{step}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "data/checkpoints/tiny-run"))

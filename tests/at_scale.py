"""Stand-ins for what a GPU machine has: a random Qwen3 that reads bytes, problems.

``python tests/at_scale.py FOLDER [NOTEBOOK ...]`` makes them in a folder and executes
every chapter, or those named, by papermill at profile gpu with them.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


def problems() -> list[dict[str, object]]:
    """Fifty problems of school mathematics: prompt, answer, worked response."""
    told: list[tuple[str, str, str]] = []
    for n in range(1, 11):
        told += [
            (
                f"A rectangle is {n + 2} wide and {2 * n + 1} long. What is its area?",
                f"{(n + 2) * (2 * n + 1)}",
                f"Area is width times length, {n + 2} times {2 * n + 1}.",
            ),
            (
                f"What is the sum of the first {n + 4} positive integers?",
                f"{(n + 4) * (n + 5) // 2}",
                f"It is {n + 4} times {n + 5}, halved.",
            ),
            (
                f"Solve {n + 1}x = {n + 3} for x.",
                rf"\frac{{{n + 3}}}{{{n + 1}}}",
                f"Divide both sides by {n + 1}.",
            ),
            (
                f"What is the remainder of {7 * n + 5} divided by {n + 3}?",
                f"{(7 * n + 5) % (n + 3)}",
                f"Take {n + 3} away as often as it fits into {7 * n + 5}.",
            ),
            (
                f"Simplify the square root of {n * n * 2}.",
                "\\sqrt{2}" if n == 1 else f"{n}\\sqrt{{2}}",
                f"{n * n * 2} is {n} squared times two.",
            ),
        ]
    return [
        {
            "prompt": [{"role": "user", "content": question}],
            "reward_model": {"ground_truth": answer},
            "response": f"<think>\n{thought}\n</think>\n\nSo \\boxed{{{answer}}}.",
        }
        for question, answer, thought in told
    ]


def save_problems(path: Path, rows: list[dict[str, object]] | None = None) -> Path:
    """The problems, or given rows, as jsonl."""
    rows = problems() if rows is None else rows
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def byte_tokenizer(more: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the problems, with Qwen3's turns and thoughts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400 + more,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([json.dumps(row) for row in problems()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT,
        padding_side="left",
    )


def save_model(directory: Path, seed: int = 0, width: int = 32) -> Path:
    """A random Qwen3 of two layers with that tokenizer, as the hub would have it."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


# --- every chapter with them ---------------------------------------------------------

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def save_all(place: Path) -> Path:
    """A student, a teacher and the problems, in a folder."""
    save_model(place / "student")
    save_model(place / "teacher", seed=1)
    save_problems(place / "problems.jsonl")
    return place


def profile_gpu(place: Path, more: str = "") -> str:
    """Profile gpu with every large thing replaced by its stand-in."""
    return (
        f"gpu:student={place / 'student'},teacher={place / 'teacher'},"
        f"sft.dataset={place / 'problems.jsonl'},sft.dataset.response=response,"
        "sft.dataset.prompt=prompt,sft.dataset.answer=reward_model.ground_truth,"
        f"policy.dataset={place / 'problems.jsonl'},sft.steps=2,sft.batch_sequences=4,"
        "sft.longest=96,sft.micro_batch=2,policy.steps=2,policy.prompts_per_step=2,"
        f"policy.group_size=2,policy.max_new_tokens=12{more}"
    )


def parameters_of(notebook: Path, place: Path) -> dict[str, Any]:
    """What a chapter is given: the profile, or the stand-ins as a reader's own."""
    import papermill

    given = {
        # a random model earns nothing: coin flips, or RLVR would go nowhere
        "profile": profile_gpu(place, ",policy.reward_flip=0.5"),
        "seeds": "0",
        "source": "local",
        "jobs": 1,
        "model": str(place / "student"),
        "before": str(place / "student"),
        "after": str(place / "teacher"),
    }
    known = papermill.inspect_notebook(str(notebook))
    return {name: given[name] for name in known}


def execute(notebook: Path, place: Path) -> Path:
    """A chapter as papermill leaves it; runs are trained below the folder, once."""
    import papermill

    os.environ |= {"OPD_GEOMETRY_DATA": str(place / "data"), "ACCELERATE_USE_CPU": "1"}
    done = place / notebook.name
    papermill.execute_notebook(
        str(notebook),
        str(done),
        parameters_of(notebook, place),
        cwd=str(ROOT),
        kernel_name="python3",
        progress_bar=False,
    )
    return done


def main(folder: str, *names: str) -> int:
    """Execute chapters, and say how long each took; how many failed."""
    from papermill.exceptions import PapermillExecutionError

    place = Path(folder).resolve()
    (place / "data").mkdir(parents=True, exist_ok=True)
    save_all(place)
    failed = 0
    for notebook in [ROOT / "notebooks" / name for name in names] or NOTEBOOKS:
        began, said = time.monotonic(), "done"
        try:
            execute(notebook, place)
        except PapermillExecutionError as error:
            said = f"failed: {error.ename}: {error.evalue}"
            failed += 1
        seconds = time.monotonic() - began
        print(f"{notebook.name} {seconds:.0f} s {said}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

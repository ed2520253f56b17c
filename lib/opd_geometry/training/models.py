"""Models and tokenizer: ordinary Hugging Face checkpoints, tiny or large.

The tiny models are Qwen3 decoders (transformers' own class, untied head, grouped-query
attention) with a tokenizer that reads one character as one token. Whatever takes one of
them takes any causal language model, by directory or by hub id.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from opd_geometry.geometry.live import seeded
from opd_geometry.training import ranks
from opd_geometry.training.settings import ModelConfig
from opd_geometry.training.tasks import CHARACTERS

if TYPE_CHECKING:  # takes seconds, which what only reads tables need not wait for
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        PreTrainedTokenizerFast,
    )

PAD, EOS = "<pad>", "<eos>"
PROMPT_FRAME = "prompt_frame"  # a tokenizer's setting: what stands around a prompt


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer: each character of ``tasks.CHARACTERS`` is one token."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *CHARACTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, padding_side="left"
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def build_model(config: ModelConfig, seed: int) -> PreTrainedModel:
    """A freshly initialised Qwen3 or Qwen3-MoE model in float32.

    Args:
        config: its shape.
        seed: decides the initial weights; the global generator is left as it was.
    """
    from transformers import (
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    heads = config.width // config.head_size
    shape: dict[str, Any] = {
        "vocab_size": 2 + len(CHARACTERS),
        "hidden_size": config.width,
        "intermediate_size": 3 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": config.head_size,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "dtype": torch.float32,
    }
    with seeded(seed):
        if not config.experts:
            return Qwen3ForCausalLM(Qwen3Config(**shape)).eval()
        shape |= {
            "num_experts": config.experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": config.width,
        }
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape)).eval()


def located(source: str | Path) -> tuple[str, dict[str, Any]]:
    """Where transformers finds a model, and what it has to be told beside that.

    Args:
        source: a directory, a GGUF file, or a hub id, with ``@revision`` or the newest.

    Raises:
        ValueError: a path where no model is.
    """
    path = Path(source)
    if path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    if (path.exists() or path.is_absolute()) and not (path / "config.json").is_file():
        raise ValueError(
            f"no checkpoint at {path}: expected a directory with config.json, "
            "safetensors and a tokenizer"
        )
    where, _, revision = str(source).partition("@")
    if revision and not path.exists():
        return where, {"revision": revision}
    return str(source), {}


def load_model(
    source: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        source: a directory with a Hugging Face checkpoint, a GGUF file, or a hub id,
            with ``@revision`` or the newest.
        dtype: the dtype of the loaded weights (float32: master weights).

    Raises:
        ValueError: one line that says what is missing or broken.
    """
    from transformers import AutoModelForCausalLM

    where, at = located(source)
    expected = "complete safetensors of a causal language model"
    if "gguf_file" in at:
        expected = "a GGUF file of a causal language model in types that gguf reads"
    else:
        at = {**at, "use_safetensors": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, output_loading_info=True, **at
        )
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"cannot load a model from {source}: {reason}; expected {expected}"
        ) from error
    model, report = loaded
    # what is another's under a second name no file has
    tied = getattr(model, "all_tied_weights_keys", None) or ()
    missing = {*report["missing_keys"]} - {*tied}
    if missing:  # transformers would start from random numbers there
        raise ValueError(
            f"the checkpoint {source} lacks {min(missing)}; expected {expected}"
        )
    tokenizer = load_tokenizer(source)
    if len(tokenizer) > model.config.get_text_config().vocab_size:
        raise ValueError(
            f"the tokenizer beside {source} has {len(tokenizer)} tokens but the model "
            f"has {model.config.vocab_size}; use the tokenizer it was trained with"
        )
    return model.eval(), tokenizer


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    Args:
        source: as in ``load_model``.

    Raises:
        ValueError: one line that says what is missing or broken.
    """
    from transformers import AutoTokenizer

    where, at = located(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, padding_side="left", **at)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"cannot load the tokenizer beside {source}: {reason}; save one with "
            "tokenizer.save_pretrained"
        ) from error
    if not tokenizer(CHARACTERS)["input_ids"]:  # made up from the model's type alone
        raise ValueError(
            f"no tokenizer beside {source}; save one with tokenizer.save_pretrained"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks say what is padding
    return tokenizer


def frame(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt as the tokenizer's model wants it begun: bare, after <bos>, in a turn.

    Args:
        prompt: of a task.
        tokenizer: of a pretrained student (see ``students``), or any other.
    """
    settings = getattr(tokenizer, "init_kwargs", {})
    before, after = settings.get(PROMPT_FRAME) or ("", "")
    return f"{before}{prompt}{after}"


def check_reads_tasks(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot write and read the characters of the tasks.

    Raises:
        ValueError: the first character that does not come back.
    """
    for character in CHARACTERS:
        ids = tokenizer(f"1{character}1", add_special_tokens=False)["input_ids"]
        if character not in tokenizer.decode(ids)[1:-1]:
            raise ValueError(
                f"the tokenizer cannot read {character!r}, which the tasks use; "
                "expected the tokenizer that the checkpoint was trained with"
            )


def check_same_vocabulary(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    who: str = "teacher",
) -> None:
    """Refuse a teacher that reads other tokens than its student.

    Args:
        student: its tokenizer.
        teacher: the tokenizer of the teacher, or of another who works with tokens.
        who: the other, for the message.

    Raises:
        ValueError: the first token on which the two vocabularies differ.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    every = ours.keys() | theirs.keys()
    differing = [token for token in every if ours.get(token) != theirs.get(token)]
    if differing:
        token = min(
            differing, key=lambda t: (min(ours.get(t, 1e9), theirs.get(t, 1e9)), t)
        )
        raise ValueError(
            f"student and {who} tokenizers differ ({len(ours)} and {len(theirs)} "
            f"tokens): token {token!r} is "
            f"{ours.get(token)} for one and {theirs.get(token)} for the other; both "
            "work with the same tokens, so they need one vocabulary"
        )


@contextmanager
def recomputing(model: Any, on: bool) -> Iterator[None]:
    """Within, a gradient needs a layer's inputs only: the layer is computed again.

    Sampling, which needs the cache that this does without, goes on outside of it.
    """
    if on and not model.is_activation_checkpointing:
        model.activation_checkpointing_enable()
    layers = [m for m in model.modules() if on and hasattr(m, "gradient_checkpointing")]
    for layer in layers:  # the flag alone: no dropout of what is inside comes on
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    dtype: torch.dtype | None = None,
    only: tuple[str, ...] | None = None,
) -> None:
    """Write a checkpoint so that it is there whole or not at all; rank 0 does.

    Args:
        model: the model to store.
        tokenizer: stored beside it.
        directory: where; replaced if it exists.
        dtype: dtype of the stored weights (None: as they are). The model in memory
            keeps its own.
        only: modules, by the last part of their names, whose weights are stored; None
            for a checkpoint that can be loaded.
    """
    stored = ranks.whole(model.state_dict())
    if ranks.index() > 0:
        return
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        state = {
            name: (tensor.detach().to(dtype) if tensor.is_floating_point() else tensor)
            for name, tensor in stored.items()
            if only is None or name.split(".")[-2] in only
        }
        model.save_pretrained(draft, state_dict=state)
        tokenizer.save_pretrained(draft)
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(draft, directory)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def round_to_bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    """Round every weight to the nearest bfloat16 value, kept in float32.

    A published checkpoint is stored in bf16, and the next stage starts from what was
    stored: only then does a weight have to travel half a unit in the last place before
    its stored value changes (the third gate of the paper's account).
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).to(parameter.dtype))
    return model

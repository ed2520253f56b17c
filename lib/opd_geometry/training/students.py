"""Pretrained students: any causal language model, with its vocabulary cut to the tasks.

A model of a quarter million tokens spends most of its memory on rows of the embedding
that no task touches. The cut keeps the tokens that task texts are made of, some more up
to a round number, and the merges between them: every task text is read as the same
tokens, and the logits of the kept rows are those of the whole model. What the cut made
is an ordinary checkpoint in bf16, kept beside the data and made once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from tokenizers import Tokenizer

from opd_geometry.training import models, tasks
from opd_geometry.training.settings import ROWS, Student

if TYPE_CHECKING:
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        PreTrainedTokenizerFast,
    )

_MADE = "student.json"  # written last, beside a cut checkpoint


# --- what stands there ---------------------------------------------------------------


def describe(source: str, place: Path, rows: int = ROWS) -> Student:
    """What a model is as a student; the model itself is read when a run needs it.

    Args:
        source: a directory with safetensors, a GGUF file, or a hub id with its
            revision, ``owner/name@revision``.
        place: where cut checkpoints and descriptions are kept.
        rows: of the cut vocabulary.

    Raises:
        ValueError: one line; nothing there, unreadable, or no tokens for the tasks.
    """
    digest = _digest(source)
    kept = _kept_at(place, digest, rows) / "description.json"
    if not kept.is_file():
        whole, shape = models.load_tokenizer(source), _parameters(source)
        cut, ids = cut_tokenizer(whole, rows, str(source))
        removed = shape["vocabulary"] - len(ids)
        facts = {
            "view": view(cut),
            "rows": len(ids),
            "convention": _convention(whole),
            "parameters": shape["parameters"] - removed * shape["row"],
        }
        kept.parent.mkdir(parents=True, exist_ok=True)
        draft = kept.with_name(f".{kept.name}.{os.getpid()}")
        draft.write_text(json.dumps(facts))
        os.replace(draft, kept)
    facts = json.loads(kept.read_text())
    return Student(digest, source=str(source), **facts)


def _digest(source: str) -> str:
    """What a source is, by content, or by revision on the hub."""
    path = Path(source)
    if path.is_file():
        return _file_digest(path, path.stat().st_mtime_ns)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        if not any(file.suffix == ".safetensors" for file in files):
            raise ValueError(
                f"no model at {path}: expected a directory with config.json, "
                "safetensors and a tokenizer, or a GGUF file"
            )
        text = "".join(
            f"{file.name} {_file_digest(file, file.stat().st_mtime_ns)}\n"
            for file in files
        )
        return hashlib.sha256(text.encode()).hexdigest()
    _, at, revision = source.partition("@")
    if path.is_absolute() or source.startswith(".") or not (at and revision):
        raise ValueError(
            f"no student at {source}: expected a directory with safetensors, a GGUF "
            "file, or a hub id with its revision, owner/name@REVISION"
        )
    return source


@lru_cache
def _file_digest(path: Path, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kept_at(place: Path, digest: str, rows: int) -> Path:
    name = hashlib.sha256(f"{digest} {rows}".encode()).hexdigest()[:16]
    return place / name


def _parameters(source: str) -> dict[str, int]:
    """Numbers of parameters and tokens, and parameters a token, from the shapes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    where, at = models.located(source)
    config = AutoConfig.from_pretrained(where, **at)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is table.weight
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": table.weight.shape[0],
        "row": table.weight.shape[1] * (1 if tied else 2),
    }


def _convention(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template:
        return "chat"
    ids = tokenizer("1")["input_ids"]
    return "bos" if ids and ids[0] == tokenizer.bos_token_id else "plain"


def _prompt_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What stands before and after a prompt, as text that the tokenizer reads."""
    kind = _convention(tokenizer)
    if kind == "bos":
        return str(tokenizer.bos_token), ""
    if kind == "plain":
        return "", ""
    turn = [{"role": "user", "content": "PROMPT"}]
    text = tokenizer.apply_chat_template(
        turn, tokenize=False, add_generation_prompt=True
    )
    before, _, after = str(text).partition("PROMPT")
    return before, after


# --- the cut -------------------------------------------------------------------------


@lru_cache
def task_texts() -> tuple[str, ...]:
    """Texts that are made of every token that a task of a language model can need."""
    rng = np.random.default_rng(0)
    texts = [f"1{character}1" for character in tasks.CHARACTERS]
    for number in range(200):
        texts += [f"{before}{number}" for before in ("#", ",", "c:", "s:", "+", "-")]
        texts += [f"+{number}=", f" {number} ", f" {number}=", f"{number}"]
    for name in tasks.PRETRAINED_BENCHMARKS:
        for _ in range(200):
            problem = tasks.draw_problem(name, rng)
            texts.append(problem.prompt)
            texts += [tasks.demonstrate(problem, q, rng) for q in tasks.QUALITIES]
    for word in (*tasks.WORDS, *tasks.KINDS):
        texts += [f"o:{word}", f" {word}", f" {word}=", f"#{word}", word]
    return tuple(texts)


def cut_tokenizer(
    whole: PreTrainedTokenizerBase, rows: int, source: str
) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """A tokenizer that reads task texts as the whole one does, with fewer tokens.

    Byte-pair merges are never undone: with the tokens of a text, those that they were
    merged from, and the merges between them, its reading is the same, step for step.

    Args:
        whole: a fast tokenizer; kept as it is if it has at most ``rows`` tokens.
        rows: tokens to keep; those of the smallest ids fill up.
        source: for messages.

    Returns:
        The tokenizer, and the whole one's ids of its tokens, in order.

    Raises:
        ValueError: no byte-pair tokenizer, too few rows, or a task it cannot read.
    """
    from transformers import PreTrainedTokenizerFast

    models.check_reads_tasks(whole)
    spec = json.loads(whole.backend_tokenizer.to_str())
    before, after = _prompt_frame(whole)
    if len(whole) <= rows:
        kept = sorted(whole.get_vocab().values())
        if kept != list(range(len(kept))):
            raise ValueError(f"the tokenizer of {source} has gaps between its ids")
    elif spec["model"]["type"] != "BPE":
        raise ValueError(
            f"the tokenizer of {source} is of the kind {spec['model']['type']}: "
            "expected byte-pair merges, whose vocabulary can be cut"
        )
    else:
        kept = _tokens_to_keep(whole, spec, rows, source)
        _cut_spec(spec, kept)
    spec["post_processor"] = None  # the frame puts in front what belongs there
    cut = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        pad_token=whole.pad_token,
        eos_token=whole.eos_token,
        bos_token=whole.bos_token,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **{models.PROMPT_FRAME: [before, after]},
    )
    cut.model_input_names = ["input_ids", "attention_mask"]
    _check_view(whole, cut, kept, source)
    return cut, kept


def _tokens_to_keep(
    whole: PreTrainedTokenizerBase, spec: dict[str, Any], rows: int, source: str
) -> list[int]:
    """Ids of special tokens, of task texts, of what those are merged from, and more."""
    vocabulary: dict[str, int] = spec["model"]["vocab"]
    names = dict(zip(vocabulary.values(), vocabulary.keys(), strict=True))
    texts = [*task_texts(), *_prompt_frame(whole)]
    used = {i for ids in _read(whole, texts) for i in ids}
    used |= {i for i in (whole.eos_token_id, whole.pad_token_id) if i is not None}
    used |= {i for i in (whole.bos_token_id, whole.unk_token_id) if i is not None}
    parts: dict[str, list[tuple[str, str]]] = {}
    for pair in spec["model"]["merges"]:
        left, right = pair if isinstance(pair, list) else pair.split(" ", 1)
        parts.setdefault(left + right, []).append((left, right))
    waiting = [names[i] for i in used if i in names]
    seen = set(waiting)
    while waiting:
        for pair in parts.get(waiting.pop(), ()):
            new = [token for token in pair if token not in seen]
            seen.update(new)
            waiting += new
    used |= {vocabulary[token] for token in seen if token in vocabulary}
    if len(used) > rows:
        raise ValueError(
            f"the tasks use {len(used)} tokens of {source}: expected at most {rows} "
            "rows; keep more rows"
        )
    more = (i for i in sorted(whole.get_vocab().values()) if i not in used)
    return sorted([*used, *(next(more) for _ in range(rows - len(used)))])


def _cut_spec(spec: dict[str, Any], kept: list[int]) -> None:
    """Renumber the kept tokens and drop all others, with their merges."""
    new = {old: i for i, old in enumerate(kept)}
    vocabulary = spec["model"]["vocab"]
    cut = {token: new[i] for token, i in vocabulary.items() if i in new}
    spec["model"]["vocab"] = cut

    def remains(pair: Any) -> bool:
        left, right = pair if isinstance(pair, list) else pair.split(" ", 1)
        return left in cut and right in cut and left + right in cut

    spec["model"]["merges"] = [p for p in spec["model"]["merges"] if remains(p)]
    spec["added_tokens"] = [
        {**token, "id": new[token["id"]]}
        for token in spec["added_tokens"]
        if token["id"] in new
    ]


def _read(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    return list(tokenizer(list(texts), add_special_tokens=False)["input_ids"])


def _check_view(
    whole: PreTrainedTokenizerBase,
    cut: PreTrainedTokenizerBase,
    kept: list[int],
    source: str,
) -> None:
    """Refuse a cut that reads a task text, or a framed prompt, otherwise."""
    texts = [*task_texts(), *(models.frame(text, cut) for text in task_texts()[-50:])]
    ours, theirs = _read(cut, texts), _read(whole, texts)
    for text, ids, wanted in zip(texts, ours, theirs, strict=True):
        if [kept[i] for i in ids] != wanted:
            raise ValueError(
                f"the cut vocabulary of {source} reads {text!r} otherwise than the "
                "whole one; keep more rows"
            )


def view(cut: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a tokenizer's tokens, and of how it reads task texts and a prompt."""
    tokens = sorted(cut.get_vocab().items(), key=lambda item: item[1])
    texts = [*task_texts(), models.frame("c:", cut)]
    content = json.dumps([tokens, _read(cut, texts)])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def cut_model(model: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """Keep only some rows of the embedding and of the head, in place.

    Args:
        model: whole.
        kept: ids of the tokens that stay, in order; their logits stay as they are.
    """
    table: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    rows = torch.tensor(kept)
    tied = head.weight is table.weight
    table.weight = torch.nn.Parameter(table.weight.detach()[rows].clone())
    table.num_embeddings = len(kept)
    table.padding_idx = None
    weight = table.weight if tied else head.weight.detach()[rows].clone()
    head.weight = weight if tied else torch.nn.Parameter(weight)
    head.out_features = len(kept)
    if getattr(head, "bias", None) is not None:
        head.bias = torch.nn.Parameter(head.bias.detach()[rows].clone())
    return model


def prepare(student: Student, place: Path) -> Path:
    """The directory of a student's cut checkpoint in bf16, made if need be.

    Raises:
        ValueError: one line; the model is not there, not readable, or another one.
    """
    directory = _kept_at(place, student.digest, student.rows) / "checkpoint"
    if _is_made(directory):
        return directory
    if not student.source:
        raise ValueError(
            f"the student of this run is not here: expected the model with SHA-256 "
            f"{student.digest}; name its file or directory with --student"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_suffix(".lock")):
        if not _is_made(directory):
            _make(student, directory)
    return directory


def _make(student: Student, directory: Path) -> None:
    model, whole = models.load_model(student.source)
    cut, kept = cut_tokenizer(whole, student.rows, student.source)
    if view(cut) != student.view:
        raise ValueError(
            f"{student.source} reads the tasks otherwise than the run's description "
            "says; expected the model and the library that it was made with"
        )
    _forget_quantisation(model)
    cut_model(model, kept)
    model.config.vocab_size = len(kept)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in (model.config, model.generation_config):
            setattr(config, name, getattr(cut, name))
    shutil.rmtree(directory, ignore_errors=True)
    models.save_model(model, cut, directory, dtype=torch.bfloat16)
    weights = {f.name: _file_digest(f, 0) for f in directory.glob("*.safetensors")}
    (directory / _MADE).write_text(json.dumps(weights))


def _forget_quantisation(model: Any) -> None:
    """What was read from a GGUF file is ordinary float32, and may be saved as such."""
    model.hf_quantizer, model.is_quantized = None, False
    model.quantization_method = None
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config


def _is_made(directory: Path) -> bool:
    """Whether a cut checkpoint is there, whole and as it was written."""
    try:
        weights = json.loads((directory / _MADE).read_text())
    except (OSError, ValueError):
        return False
    return all(
        (directory / name).is_file()
        and _file_digest(directory / name, (directory / name).stat().st_mtime_ns)
        == digest
        for name, digest in weights.items()
    )

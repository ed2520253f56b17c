"""Problems and demonstrations in English, from Hugging Face datasets.

A dataset is a hub id with its revision, or parquet or jsonl on this machine, whose
columns are named by the run; or a family of reasoning-gym, ``gym:FAMILY``. A prompt is
put as the tokenizer's chat template puts it, thinking or not; an answer is verified by
``verifier``, or by the family's own scorer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opd_geometry.training import gym, tasks, verifier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
Message = tuple[str, str]  # role, content


@dataclass(frozen=True)
class DataConfig:
    """A dataset, and which of its columns are what.

    Attributes:
        digest: SHA-256 of local files, the revision on the hub, or a family of
            reasoning-gym with its release; a run's identity.
        source: file, folder of files, hub id with revision, or ``gym:FAMILY``.
        split: of a hub dataset.
        prompt: column of the question: a text, or a list of messages.
        answer: column of the right answer; a dot reads inside a column.
        response: column of a demonstration's response; empty where none is learned.
        thinking: whether the chat template is asked for its thinking mode.
    """

    digest: str
    source: str = field(default="", compare=False)
    split: str = "train"
    prompt: str = "prompt"
    answer: str = "answer"
    response: str = ""
    thinking: bool = True


@dataclass(frozen=True)
class TextProblem:
    """A question in English, and the answer that earns the reward.

    One of reasoning-gym has the family and the seed that it is drawn from as well.
    """

    messages: tuple[Message, ...]
    answer: str
    response: str = ""
    thinking: bool = True
    family: str = ""
    seed: int = 0

    @property
    def prompt(self) -> str:
        """What was said last: decides whether it is held out."""
        return self.messages[-1][1]


def digest_of(source: str) -> str:
    """What a dataset is: by content, or by revision on the hub.

    Raises:
        ValueError: nothing there.
    """
    if gym.is_family(source):
        return gym.digest_of(source)
    files = _files(source)
    if files:
        digest = hashlib.sha256()
        for path in files:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:16]
    name, at, revision = source.partition("@")
    if Path(source).is_absolute() or not (at and revision) or name.count("/") != 1:
        raise ValueError(
            f"no dataset at {source}: expected a parquet or jsonl file, a folder of "
            "them, a hub id with its revision, owner/name@REVISION, or gym:FAMILY"
        )
    return source


def _files(source: str) -> list[Path]:
    path = Path(source)
    found = sorted(path.glob("*")) if path.is_dir() else [path]
    return [file for file in found if file.suffix in _KINDS and file.is_file()]


@lru_cache(maxsize=8)
def problems(config: DataConfig, split: str = "train") -> tuple[TextProblem, ...]:
    """The problems of a dataset's training part, or of its held-out eighth.

    Raises:
        ValueError: one line; the dataset cannot be read, lacks a column, or a row of
            it lacks a prompt, an answer or a response.
    """
    rows = [_problem(config, i, row) for i, row in enumerate(_rows(config))]
    kept = tuple(r for r in rows if tasks.is_held_out(r.prompt) == (split == "test"))
    if not kept:
        raise ValueError(
            f"{config.source} has {len(rows)} rows and none of its {split} part: "
            "expected dozens; one prompt in eight is held out"
        )
    return kept


def _rows(config: DataConfig) -> Any:
    from datasets import disable_progress_bars, load_dataset

    files, source = _files(config.source), config.source
    if not source:
        raise ValueError(
            f"the dataset of this run is not here: expected the one with digest "
            f"{config.digest}; name its file or hub id"
        )
    disable_progress_bars()
    try:
        if files:
            kind, names = _KINDS[files[0].suffix], [str(file) for file in files]
            rows = load_dataset(kind, data_files=names, split="train")
        else:
            name, _, revision = source.partition("@")
            rows = load_dataset(name, revision=revision, split=config.split)
    except Exception as error:
        said = error.__cause__ or error
        reason = (str(said).splitlines() or [type(said).__name__])[0]
        raise ValueError(
            f"cannot read the dataset {source}: {reason}; expected parquet or jsonl "
            "with one object a line"
        ) from error
    wanted = [name for name in (config.prompt, config.answer, config.response) if name]
    missing = [name for name in wanted if name.split(".")[0] not in rows.column_names]
    if missing:
        raise ValueError(
            f"{source} has no column {missing[0]}: it has "
            f"{', '.join(rows.column_names)}; name the columns of prompt, answer and "
            "response"
        )
    return rows


def _problem(config: DataConfig, number: int, row: Mapping[str, Any]) -> TextProblem:
    asked = _value(row, config.prompt)
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    messages = tuple((str(m["role"]), str(m["content"])) for m in asked or ())
    said = {"answer": _value(row, config.answer)}
    if config.response:
        said["response"] = _value(row, config.response)
    empty = [name for name, value in said.items() if value in (None, "")]
    if not messages or not messages[-1][1]:
        empty = ["prompt"]
    if empty:
        raise ValueError(
            f"{config.source}: row {number + 1} has no {empty[0]} in its column "
            f"{getattr(config, empty[0])}; leave such rows out"
        )
    answer, response = str(said["answer"]), str(said.get("response", ""))
    return TextProblem(messages, answer, response, config.thinking)


def _value(row: Any, name: str) -> Any:
    for part in name.split("."):
        row = row.get(part) if isinstance(row, Mapping) else None
    return row


def draw(config: DataConfig, count: int, rng: np.random.Generator) -> list[TextProblem]:
    """Problems of the training part, drawn at random; none twice in a batch."""
    if gym.is_family(config.digest):
        seeds = rng.choice(gym.HELD_OUT_SEEDS, (count, gym.TRIES), replace=False)
        return [_drawn(config, row.tolist(), "train") for row in seeds]
    known = problems(config)
    return [known[i] for i in rng.choice(len(known), count, replace=count > len(known))]


def held_out(config: DataConfig, count: int) -> list[TextProblem]:
    """A fixed evaluation set: of the held-out part, the same for every run."""
    if gym.is_family(config.digest):
        seeds = gym.HELD_OUT_SEEDS + np.arange(count * gym.TRIES).reshape(count, -1)
        return [_drawn(config, row.tolist(), "test") for row in seeds]
    known = problems(config, "test")
    order = np.random.default_rng(0).permutation(len(known))[:count]
    return [known[i] for i in order]


def _drawn(config: DataConfig, seeds: list[int], split: str) -> TextProblem:
    """The problem of the first seed whose question belongs to a part."""
    for seed in seeds:
        family, question, answer = gym.draw(config.digest, seed)
        if tasks.is_held_out(question) == (split == "test"):
            return TextProblem(
                (("user", f"{question}\n\n{gym.ASKED}"),),
                answer,
                f"<answer>{answer}</answer>",
                config.thinking,
                family,
                seed,
            )
    raise ValueError(
        f"{config.digest}: none of {len(seeds)} problems belongs to the {split} part; "
        "expected one in eight held out; the family has too few questions"
    )


def as_prompt(
    problem: tasks.Problem | TextProblem, tokenizer: PreTrainedTokenizerBase
) -> str:
    """A problem as the model is asked it: the text that its response follows.

    A tokenizer with a chat template puts the messages, and opens the assistant's turn;
    without one they are joined by empty lines.
    """
    if isinstance(problem, tasks.Problem):
        return problem.prompt
    if not tokenizer.chat_template:
        return "\n\n".join(content for _, content in problem.messages) + "\n\n"
    messages = [{"role": role, "content": text} for role, text in problem.messages]
    return str(
        tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=problem.thinking,
        )
    )


def as_pairs(
    found: list[TextProblem], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, str]]:
    """Demonstrations as (prompt, response) texts."""
    return [(as_prompt(problem, tokenizer), problem.response) for problem in found]


def verify(problem: tasks.Problem | TextProblem, response: str) -> bool:
    """Whether a response ends in the right answer."""
    if isinstance(problem, TextProblem) and problem.family:
        return gym.is_right(problem.family, problem.seed, response)
    if isinstance(problem, TextProblem):
        return verifier.is_right(problem.answer, response)
    return tasks.verify(problem, response)

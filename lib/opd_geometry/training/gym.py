"""Problems of reasoning-gym, drawn and scored in a process of their own.

A problem is a family and a seed; its right answer earns the reward by the family's own
scorer, where nothing but the full score counts. Some of those scorers evaluate what
they are given as Python. Here ``eval`` and ``exec`` refuse every text that does not
come from the problem itself, and a family that cannot be scored without is refused: of
each problem that is drawn its own answer has to pass, and nonsense has to fail.
"""

import builtins
import json
import os
import random
import re
import sys
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from opd_geometry.training.verifier import Process, final_answer

PREFIX = "gym:"
ASKED = "Write your final answer, and nothing else, between <answer> and </answer>."
HELD_OUT_SEEDS = 2**20  # seeds from here on belong to no training stage
TRIES = 64  # seeds for a problem, one in eight of which is held out
DRAW_SECONDS = 60.0  # for a problem
_TAGS = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)


def is_family(source: str) -> bool:
    """Whether a dataset is a family of reasoning-gym."""
    return source.startswith(PREFIX)


def digest_of(source: str) -> str:
    """``gym:FAMILY`` with the release of reasoning-gym that draws it.

    Raises:
        ValueError: the package or the family is not there, or cannot be scored.
    """
    try:
        release = version("reasoning-gym")
    except PackageNotFoundError:
        raise ValueError(
            f"dataset {source}: reasoning-gym is not installed; pip install -e .[gym]"
        ) from None
    name, _, asked = source.partition("@")
    if asked not in ("", release):
        raise ValueError(
            f"dataset {source}: reasoning-gym {release} is installed, which draws "
            f"other problems; pip install reasoning-gym=={asked}"
        )
    digest = f"{name}@{release}"
    draw(digest, 0)
    return digest


@lru_cache(maxsize=2**15)
def draw(digest: str, seed: int) -> tuple[str, str, str]:
    """A problem: its family, question and answer.

    Args:
        digest: of ``digest_of``.
        seed: decides everything about it.

    Raises:
        ValueError: one line; no such family, or one that cannot be scored.
    """
    family = digest.removeprefix(PREFIX).partition("@")[0]
    told = _process().ask([family, seed], DRAW_SECONDS)
    if not told:
        raise ValueError(
            f"reasoning-gym drew no {family} of seed {seed} within {DRAW_SECONDS:g} s: "
            "choose another family"
        )
    answer = json.loads(told)
    if isinstance(answer, str):
        raise ValueError(f"dataset {digest}: {answer}")
    return family, *answer


def is_right(family: str, seed: int, response: str) -> bool:
    """Whether a response ends in an answer that the family's scorer takes for right.

    Args:
        family, seed: of the problem.
        response: of a model; its answer stands between tags, in a box, or in a line
            that says so.

    Raises:
        ValueError: no verdict in time, several times in succession.
    """
    said = answer_in(response)
    return bool(said) and _process().verdict(family, seed, said)


def answer_in(response: str) -> str:
    """The answer that a response gives after its thoughts; empty without one.

    >>> answer_in("<think><answer>3</answer></think> It is <answer> a b </answer>")
    'a b'
    >>> answer_in("The answer is 4.")
    '4'
    """
    _, closed, said = response.rpartition("</think>")
    tagged = _TAGS.findall(said)
    if tagged and (closed or "<think>" not in response):
        return str(tagged[-1])
    return final_answer(response)


@lru_cache
def _process() -> Process:
    return Process(__name__, "reasoning-gym")


# --- in the process ------------------------------------------------------------------


def _serve() -> None:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    @lru_cache(maxsize=1024)
    def problem(family: str, seed: int) -> tuple[Any, dict[str, Any]]:
        random.seed(seed)  # for what a family does not draw from its own
        drawn = reasoning_gym.create_dataset(family, seed=seed, size=1)
        return drawn, drawn[0]

    def answer(family: str, seed: int, *said: str) -> Any:
        if family not in DATASETS:
            known = ", ".join(sorted(DATASETS))
            return f"no such family; expected one of {known}"
        drawn, entry = problem(family, seed)
        if said:
            return _score(drawn, entry, said[0])[0]
        right = entry.get("answer")
        if not isinstance(right, str) or not _score(drawn, entry, right)[0]:
            return "its scorer does not take its own answer; choose another family"
        if _score(drawn, entry, f"{right} ")[1]:
            return "its scorer evaluates answers as Python; choose another family"
        if _score(drawn, entry, "no answer")[0]:
            return "its scorer takes nonsense for an answer; choose another family"
        return entry["question"], right

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some families print while they draw
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            told = answer(*asked)
        except Exception as error:
            told = f"cannot be drawn, {type(error).__name__}: {error}"
        print(json.dumps(told), file=out, flush=True)


def _score(drawn: Any, entry: dict[str, Any], said: str) -> tuple[bool, bool]:
    """Whether a scorer gives the full score, and whether it wanted to evaluate text."""
    trusted, kept = set(_texts(entry)), (builtins.eval, builtins.exec)
    refused: list[Any] = []
    builtins.eval, builtins.exec = (_guarded(call, trusted, refused) for call in kept)
    try:
        return bool(drawn.score_answer(said, entry) >= 1.0), bool(refused)
    except Exception:  # what a scorer cannot read is not the answer
        return False, bool(refused)
    finally:
        builtins.eval, builtins.exec = kept


def _guarded(call: Any, trusted: set[str], refused: list[Any]) -> Any:
    """``eval`` or ``exec`` for Python's own modules, and for texts of the problem."""

    def guarded(source: Any, *scopes: Any, **named: Any) -> Any:
        caller = str(sys._getframe(1).f_globals.get("__name__", ""))
        if caller.partition(".")[0] in sys.stdlib_module_names:
            return call(source, *scopes, **named)
        if isinstance(source, str) and source in trusted:
            return call(source, {"__builtins__": {}})
        refused.append(source)
        raise PermissionError("text is not evaluated here")

    return guarded


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for part in value.values() for text in _texts(part)]
    if isinstance(value, list | tuple):
        return [text for part in value for text in _texts(part)]
    return [value] if isinstance(value, str) else []


if __name__ == "__main__":
    _serve()

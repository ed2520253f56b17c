"""Whether a response ends in the right answer: math-verify, in a process that may hang.

The process reads a line of JSON for each question and writes a line for each verdict.
What a model wrote is read as LaTeX by a grammar and never evaluated; math-verify's
other reader, of plain expressions, evaluates text and is not used.
"""

import atexit
import json
import os
import re
import select
import subprocess
import sys
from functools import lru_cache
from typing import Any

SECONDS = 5.0  # for a verdict
HANGS = 3  # in succession, and something is wrong
# What a response calls its answer: the last box, else the last line that says so.
_BOX = re.compile(r"\\boxed\s*{")
_LINE = re.compile(r"answer\s*(?:is|:|=)\s*(.+?)\s*\.?\s*$", re.IGNORECASE | re.M)


def final_answer(response: str) -> str:
    r"""The answer that a response gives after its thoughts; empty without one.

    >>> final_answer(r"<think>\boxed{7}</think> So \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> final_answer("It grows.\nAnswer: $12$.")
    '12'
    >>> final_answer("<think>The answer is 3")
    ''
    """
    _, closed, said = response.rpartition("</think>")
    if not closed and "<think>" in response:
        return ""  # cut off while it was thinking
    boxes = list(_BOX.finditer(said))
    if boxes:
        return _balanced(said[boxes[-1].end() :])
    lines = _LINE.findall(said)
    return lines[-1].replace("*", "").strip("$ ") if lines else ""


def _balanced(text: str) -> str:
    """The text up to the brace that closes it; empty if none does."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:place].strip()
    return ""


def is_right(answer: str, response: str) -> bool:
    """Whether a response ends in an answer that equals the given one.

    Args:
        answer: the right one, LaTeX or a number.
        response: of a model.

    Raises:
        ValueError: no verdict within ``SECONDS``, ``HANGS`` times in succession.
    """
    said = final_answer(response)
    if not said:
        return False
    return said == answer.strip("$ ") or _process().verdict(answer, said)


class Process:
    """A process that answers questions, started anew after each hang.

    Args:
        module: what it runs: says that it is ready, then a line for each line.
        who: gives the verdicts, for messages.
    """

    def __init__(self, module: str, who: str) -> None:
        self.module, self.who = module, who
        self.process: subprocess.Popen[str] | None = None
        self.hangs = 0
        atexit.register(self.end)

    def ask(self, question: list[Any], seconds: float) -> str:
        """Its answer, JSON; empty if it gives none in time, and is ended."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                # else what iterates over sets of words differs from run to run
                env=os.environ | {"PYTHONHASHSEED": "0"},
            )
            self._line()  # it is ready
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self._line(seconds)
        if not answer:
            self.end()
        return answer

    def verdict(self, *question: Any) -> bool:
        """Whether it says true.

        Raises:
            ValueError: no verdict within ``SECONDS``, ``HANGS`` times in succession.
        """
        ready = self.ask(list(question), SECONDS)
        self.hangs = 0 if ready else self.hangs + 1
        if self.hangs >= HANGS:
            raise ValueError(
                f"{self.who} gave no verdict within {SECONDS:g} s, {HANGS} times in "
                f"succession, the last for the answer {str(question[0])[:40]!r}: "
                "expected one for nearly all; look at the column of answers"
            )
        return ready == "true"

    def _line(self, seconds: float | None = None) -> str:
        """What it says next; empty if nothing within so many seconds."""
        assert self.process is not None
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return ""
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        """Kill it; the next question starts another."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        self.process = None


@lru_cache
def _process() -> Process:
    return Process(__name__, "math-verify")


def _serve() -> None:
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text: str) -> list[object]:
        found: list[object] = parse(
            f"${text}$", [LatexExtractionConfig()], parsing_timeout=0
        )
        return found

    print("ready", flush=True)
    for line in sys.stdin:
        answer, said = json.loads(line)
        try:
            same = verify(read(answer), read(said), timeout_seconds=0)
        except Exception:  # what cannot be read is not the answer
            same = False
        print(json.dumps(bool(same)), flush=True)


if __name__ == "__main__":
    _serve()

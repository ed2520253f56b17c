"""Which training step a checkpoint is of, by its path."""

import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

# What may follow a number at once: a unit, or nothing that could go on with it.
UNCLEAR = r"[.,_]\d|[a-z]"
NUMBER = r"(\d++(?:\.\d+(?=[km]))?)([km](?![a-z0-9]))?"
MARKED = tuple(
    re.compile(rf"(?:{words})s?[-_=:. ]?{NUMBER}({UNCLEAR})?", re.IGNORECASE)
    for words in (
        "step|checkpoint|ckpt|iter|iteration|(?<![a-z])ba",
        "epoch|(?<![a-z])ep",
    )
)
# A number in pieces, of which one alone is no step: 1e3, 0.5, 1,000, 1_000.
PARTS = re.compile(r"\de[-+]?\d|\d[.,]\d|\d_\d{3}(?!\d)", re.IGNORECASE)
TIMES = {"": 1, "k": 10**3, "m": 10**6}  # step-1k is a thousand
LARGEST = 10**12  # no run is longer


class Unclear(ValueError):
    """A number after a word for a step that can be read in two ways, such as 1e3."""


def _unclear(checkpoint: str | Path, name: str) -> str:
    return (
        f"{checkpoint} has a step in {name} that can be read in two ways, expected a "
        "whole number, or one with k or m, such as checkpoint-256 or step-1k; say the "
        "steps with --steps"
    )


def step_of(checkpoint: str | Path) -> int:
    """Step that a checkpoint's path tells.

    The last number after step, checkpoint, iter or global_step in the deepest component
    that has one; else the only number of the last component that has any.

    Raises:
        ValueError: no number in the path, several and none marked, one that goes on
            (1e3, 1.5, 1,000, 1_000, 1B), or an absurd one.

    >>> step_of("run/checkpoint-256"), step_of("stage1-step1000-tokens5B")
    (256, 1000)
    >>> step_of("global_step_50/actor/huggingface")
    50
    """
    components = _components(checkpoint)
    for pattern in MARKED:
        for component in reversed(components):
            if found := pattern.findall(component):
                number, unit, more = found[-1]
                if more:
                    raise Unclear(_unclear(checkpoint, component))
                step = Decimal(number) * TIMES[unit.lower()]
                return _checked(int(step), checkpoint)
    last = components[-1] if components else ""
    numbers = re.findall(r"(?<![\d.])\d+(?![\d.])", last)
    if len(numbers) != 1:
        many = f"the numbers {', '.join(numbers)} and no word for a step"
        raise ValueError(
            f"{checkpoint} has {many if numbers else 'no number'} in its name, "
            "expected its step, such as checkpoint-256; say the steps with --steps"
        )
    return _checked(int(numbers[0]), checkpoint)


def steps_of(checkpoints: Sequence[str | Path]) -> list[int]:
    """Steps of the checkpoints of one run.

    As `step_of` each path; where that does not tell them apart, the number in the only
    component in which the paths differ.

    Raises:
        ValueError: it stays open which step a checkpoint is of.

    >>> steps_of(["run/100/hf", "run/200/hf"])
    [100, 200]
    """
    try:
        steps = [step_of(checkpoint) for checkpoint in checkpoints]
    except Unclear:
        raise
    except ValueError:
        if len(checkpoints) < 2:
            raise
        steps = []
    if steps and len({*steps}) == len(steps):
        return steps
    apart = _by_difference(checkpoints, bare=bool(steps))
    if apart:
        return apart
    for checkpoint in checkpoints:
        step_of(checkpoint)  # says which one has none
    return steps


def given_steps(text: str, checkpoints: Sequence[str | Path]) -> list[int]:
    """Steps that were said, in the order of the checkpoints.

    Raises:
        ValueError: no numbers, or not as many as there are checkpoints.

    >>> given_steps("100,200", ["a", "b"])
    [100, 200]
    """
    words = [word.strip() for word in text.split(",")]
    if len(words) != len(checkpoints) or not all(w.isdecimal() for w in words):
        raise ValueError(
            f"--steps {text} for {len(checkpoints)} checkpoints, expected as many "
            "numbers with commas between, in the order of the checkpoints"
        )
    return [_checked(int(w), c) for w, c in zip(words, checkpoints, strict=True)]


def _by_difference(checkpoints: Sequence[str | Path], bare: bool) -> list[int]:
    """The number in the one component that differs; nothing if there is no such one.

    With bare only a component that is a number: of paths that a word marks with one
    and the same step, seed1 and seed2 are no steps.
    """
    paths = [_components(checkpoint) for checkpoint in checkpoints]
    if len({len(path) for path in paths}) != 1:
        return []
    columns = [column for column in zip(*paths, strict=True) if len({*column}) > 1]
    if len(columns) != 1 or (bare and not all(c.isdecimal() for c in columns[0])):
        return []
    pieces = [re.split(r"(\d+)", name) for name in columns[0]]
    if len({len(piece) for piece in pieces}) != 1:
        return []
    numbers = [n for n in zip(*pieces, strict=True) if len({*n}) > 1]
    if len(numbers) != 1 or not all(n.isdecimal() for n in numbers[0]):
        return []
    for checkpoint, name in zip(checkpoints, columns[0], strict=True):
        if PARTS.search(name):
            raise Unclear(_unclear(checkpoint, name))
    found = [_checked(int(n), c) for n, c in zip(numbers[0], checkpoints, strict=True)]
    return found if len({*found}) == len(found) else []


def _components(checkpoint: str | Path) -> list[str]:
    name = str(checkpoint).rstrip("/").removesuffix(".safetensors")
    return [part for part in re.split(r"[/@]", name) if part not in ("", ".", "..")]


def _checked(step: int, checkpoint: str | Path) -> int:
    if step > LARGEST:
        raise ValueError(
            f"{checkpoint} has the step {step} in its name, expected at most "
            f"{LARGEST}; say the steps with --steps"
        )
    return step

"""What took a run's steps: as it is said, or as a trainer left it behind."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd_geometry.geometry.locking import BETAS, EPS, Optimizer
from opd_geometry.geometry.training_formats import load_archive

STATE, MOMENTS = "trainer_state.json", "optimizer.pt"  # of transformers, TRL, Axolotl
SCHEDULES = ("constant", "linear", "cosine")


class UnknownRates(ValueError):
    """Nothing says what took the steps; the message says what to give."""


def given(
    lr: float,
    steps: int,
    schedule: str = "constant",
    warmup: int = 0,
    whole: int | None = None,
    betas: tuple[float, float] | None = None,
) -> Optimizer:
    """An optimizer as options say.

    lr s / warmup while s < warmup, s from 0; then lr, lr (T - s) / (T - warmup), or
    lr (1 + cos(pi (s - warmup) / (T - warmup))) / 2

    Args:
        lr: peak learning rate.
        steps: of the last checkpoint.
        schedule: of `SCHEDULES`, as transformers has them.
        warmup: steps.
        whole: T, of the training that the schedule was made for; None: ``steps``.
        betas: of Adam; None for 0.9 and 0.999.

    Raises:
        ValueError: T is below ``steps``, or warm-up takes all of them.

    >>> given(1.0, 4, "linear").rates
    (1.0, 0.75, 0.5, 0.25)
    """
    total = whole or steps
    if total < steps or not 0 <= warmup < max(total, 1):
        raise ValueError(
            f"--max-steps {total} and --warmup-steps {warmup} for checkpoints up to "
            f"step {steps}, expected a training that goes on to the last of them, and "
            "warms up for less"
        )
    done = np.clip((np.arange(steps) - warmup) / max(total - warmup, 1), 0.0, 1.0)
    shapes = {
        "constant": np.ones(steps),
        "linear": 1.0 - done,
        "cosine": (1.0 + np.cos(np.pi * done)) / 2,
    }
    ramp = np.minimum(np.arange(steps) / max(warmup, 1), 1.0) if warmup else 1.0
    said = f"{schedule} from {lr:g}" + f", {warmup} steps of warm-up" * bool(warmup)
    if schedule != "constant":
        assumed = "" if whole else ", which --max-steps corrects"
        said += f", down to 0 at step {total}{assumed}"
    return Optimizer(
        tuple((lr * shapes[schedule] * ramp).tolist()),
        betas or BETAS,
        EPS,
        f"learning rate {said}; {_adam(betas or BETAS, not betas)}",
    )


def left(
    checkpoints: Mapping[int, Path], betas: tuple[float, float] | None = None
) -> Optimizer:
    """An optimizer as a trainer of transformers wrote it down with the last checkpoint.

    The learning rates that it logged, joined by straight lines; betas and eps of the
    optimizer's state, where that is there. A release that logs after its scheduler has
    moved on, as older ones may, has the rates one step early.

    Args:
        checkpoints: step to directory.
        betas: of Adam, if they are known better.

    Raises:
        UnknownRates: no such file, no rate in it, or another optimizer than Adam or
            plain gradient descent.
    """
    last = max(checkpoints)
    folder = checkpoints[last]
    rates, logged = _rates(folder / STATE, last)
    found = _betas(folder / MOMENTS) if betas is None else (betas, EPS)
    moments, eps = found or (BETAS, EPS)
    said = _adam(moments, found is None) if moments else "plain gradient descent"
    return Optimizer(
        rates,
        moments,
        eps,
        f"learning rates of {logged} of {last} steps in {folder / STATE}; {said}",
    )


def _adam(betas: tuple[float, float], assumed: bool) -> str:
    said = f"AdamW with betas {betas[0]:g},{betas[1]:g}"
    return said + " (assumed; --betas corrects it)" * assumed


def _rates(file: Path, last: int) -> tuple[tuple[float, ...], int]:
    """Of every step, and how many of them were logged."""
    advice = (
        "expected the learning rates that transformers logs there; give --lr, with "
        "--lr-scheduler and --warmup-steps"
    )
    if not file.is_file():
        raise UnknownRates(f"no {file.name} in {file.parent}, {advice}")
    try:
        history = json.loads(file.read_text(encoding="utf-8"))["log_history"]
        pairs = [(e["step"], e["learning_rate"]) for e in history if _holds_rate(e)]
        logged = {int(step): float(rate) for step, rate in pairs if 0 < step <= last}
    except (KeyError, TypeError, ValueError, OSError) as error:
        said = type(error).__name__
        raise UnknownRates(f"{file} cannot be read ({said}), {advice}") from error
    wrong = [rate for rate in logged.values() if not 0.0 <= rate < math.inf]
    if wrong or not any(logged.values()):
        what = f"the learning rate {wrong[0]}" if wrong else "no learning rate above 0"
        raise UnknownRates(f"{file} has {what}, {advice}")
    steps: Sequence[int] = sorted(logged)
    rates = np.interp(np.arange(1, last + 1), steps, [logged[s] for s in steps])
    return tuple(rates.tolist()), len(logged)


def _holds_rate(entry: object) -> bool:
    return isinstance(entry, dict) and "learning_rate" in entry


def _betas(file: Path) -> tuple[tuple[float, float] | None, float] | None:
    """Betas and eps of an optimizer's state; None if there is none to be read."""
    if not file.is_file():
        return None
    try:
        group = load_archive(file)["param_groups"][0]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None
    try:
        return moments_of(group, str(file))
    except UnknownRates as error:
        advice = "give --lr and --betas of an Adam that goes as far"
        raise UnknownRates(f"{error}; {advice}") from error


def moments_of(
    group: Mapping[str, Any], origin: str
) -> tuple[tuple[float, float] | None, float] | None:
    """Betas and eps that a group of an optimizer's parameters is moved with.

    Args:
        group: one of its ``param_groups``.
        origin: whose, in words, for the error.

    Returns:
        Of Adam; None and Adam's eps for plain gradient descent; None if unreadable.

    Raises:
        UnknownRates: of another optimizer.
    """
    try:
        names = {*group}
        # torch's own say whether they maximize; of these only Adam knows amsgrad
        other = "maximize" in names and "amsgrad" not in names
        if {"betas", "eps"} <= names and group["eps"] and not other:
            first, second = map(float, group["betas"])
            return (first, second), float(group["eps"])
        if group.get("momentum") == 0 and "dampening" in names:
            return None, EPS
    except (TypeError, ValueError, AttributeError):
        return None
    raise UnknownRates(
        f"{origin} is of an optimizer that the walk does not know (it has "
        f"{', '.join(sorted(map(str, group)))}), expected Adam or plain gradient "
        "descent"
    )

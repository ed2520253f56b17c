"""How much of a gradient is signal: its mean beside its noise, before anything moves.

Of independent gradients g_1 .. g_n at the weights that a run starts from, an entry's

    signal = ((sum g)^2 - sum g^2) / ((n - 1) sum g^2)

estimates mean^2 / (mean^2 + variance), from 0 (noise) to 1 (always the same). With
signs that are coin flips its expectation is 0, whatever their sizes. Being a ratio of
sums, it is low in between: for Gaussian gradients by about 2 (1 - signal)^2 / n of
itself, so with 16 of them a weak signal by an eighth, one of a half by 3 %. Tables hold
it uncorrected. Gradients are those that the optimizer would get: clipped as the run
clips them.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from opd_geometry.experiments.runs import (
    Run,
    ensure,
    loop_of,
    one_thread,
    starting_matrices,
    starting_model,
)
from opd_geometry.experiments.shelf import commit_table, committed_table

DRAWS = 16
UNITS = 120  # exponents of float32
SEEDS_APART = 100_000  # batches that no run of the book learns from
COLUMNS = ["run", "arm", "seed", "matrix", "role", "layer", "metric", "value"]


class Collector(torch.optim.Optimizer):
    """An optimizer that moves nothing and adds up what it is given.

    Attributes:
        total, squares: of every parameter that had a gradient, sum and sum of squares,
            in a unit of its own, a power of two, in which squares are no zeros.
        taken: how many gradients.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model.parameters(), {"lr": 0.0})
        self.total: dict[Tensor, Tensor] = {}
        self.squares: dict[Tensor, Tensor] = {}
        self.taken = 0
        self._units: dict[Tensor, float] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take the gradients of one batch."""
        self.taken += 1
        for parameter in (p for group in self.param_groups for p in group["params"]):
            gradient = parameter.grad
            if gradient is None:
                continue
            if parameter not in self.total:
                self.total[parameter] = torch.zeros_like(gradient)
                self.squares[parameter] = torch.zeros_like(gradient)
            if parameter not in self._units and gradient.any():
                exponent = math.frexp(float(gradient.abs().max()))[1] - 1
                self._units[parameter] = 2.0 ** max(-UNITS, min(UNITS, -exponent))
            gradient = gradient * self._units.get(parameter, 1.0)
            self.total[parameter] += gradient
            self.squares[parameter].addcmul_(gradient, gradient)


def signal(total: Tensor, squares: Tensor, draws: int) -> dict[str, float]:
    """Signal of a matrix, each entry alike, and of its larger entries.

    Args:
        total, squares: sum and sum of squares of the gradients, any shape.
        draws: how many gradients, 2 or more.

    Returns:
        ``signal``: the mean of the entries' (module docstring), over those that ever
        had a gradient: what an optimizer that rescales every entry sees.
        ``alignment``: the same with sums over entries above and below the bar, the mean
        cosine of two gradients of about one length. NaN without a gradient.

    >>> one = torch.ones(3)
    >>> signal(4 * one, 4 * one, 4)
    {'signal': 1.0, 'alignment': 1.0}
    """
    if draws < 2:
        return {"signal": math.nan, "alignment": math.nan}
    total, squares = total.double(), squares.double()
    seen = squares > 0.0
    shared = total[seen] ** 2 - squares[seen]
    if not len(shared):
        return {"signal": math.nan, "alignment": math.nan}
    each = shared / squares[seen] / (draws - 1)
    return {
        "signal": float(each.mean()),
        "alignment": float(shared.sum() / squares[seen].sum() / (draws - 1)),
    }


def signal_table(run: Run, draws: int = DRAWS) -> pd.DataFrame:
    """Signal of every matrix of a run at its start.

    Args:
        run: it is not trained itself, and nothing is stored.
        draws: batches, none of which the run itself draws.

    Returns:
        Columns ``COLUMNS``; metrics ``signal``, ``alignment`` and ``draws`` (batches
        that had something to teach).
    """
    for stage in (run.start, run.teacher):
        if isinstance(stage, Run):
            ensure(stage)
    with one_thread():
        model, tokenizer = starting_model(run)
        collector = Collector(model)
        asked = replace(
            run,
            seed=run.seed + SEEDS_APART,
            train=replace(run.train, steps=draws),
        )
        for _ in loop_of(asked, model, tokenizer, collector, 0):
            pass
        rows: list[tuple[Any, ...]] = []
        parameters = dict(model.named_parameters())
        for matrix in starting_matrices(run):
            parameter = parameters[matrix.name]
            if parameter not in collector.total:
                continue
            sums = collector.total[parameter], collector.squares[parameter]
            values = signal(*sums, collector.taken) | {"draws": float(collector.taken)}
            place = (run.key(), run.arm, run.seed, matrix.name)
            rows += [
                (*place, matrix.role, matrix.layer, metric, value)
                for metric, value in values.items()
            ]
    return pd.DataFrame(rows, columns=COLUMNS)


def commit_signals(profile: str, table: pd.DataFrame) -> None:
    """Store a table of signals beside the committed ones of other runs."""
    commit_table("signal", profile, table, ["run"])


def committed_signals(profile: str) -> pd.DataFrame:
    """The committed signals of a profile; empty when there are none."""
    return committed_table("signal", profile, COLUMNS)

"""What optimizers make of gradients that stay as they are where a run starts.

Every batch is drawn by the weights of the start, and its gradient moves copies of them
that nobody reads: the same steps and rates, and nothing is learned. What such an update
looks like is known before the run is trained.

    run, arm, seed, matrix, role, layer, step, metric, value

    frozen_stable_rank  of the copy's update after that many steps
    covariance_rank     tr C / max eigenvalue of C, C = mean G^T G over all gradients,
                        clipped as the run clips them (at step 0; of the
                        gradients alone, whatever the optimizer)
"""

import copy
from collections.abc import Callable, Sequence
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
from opd_geometry.experiments.signal import SEEDS_APART
from opd_geometry.geometry import spectra
from opd_geometry.training.optimizer import (
    OptimizerConfig,
    learning_rate,
    optimizer_of,
    set_learning_rate,
)

COLUMNS = ["run", "arm", "seed", "matrix", "role", "layer", "step", "metric", "value"]


class Followers(torch.optim.Optimizer):
    """An optimizer that moves nothing, and copies of its model that others move.

    Args:
        model: whose gradients they follow.
        configs: an optimizer and schedule each.
        steps: length of the run, for the schedules.
        watched: names of the matrices whose second moments are added up.

    Attributes:
        models: the copies.
        moments: name to the sum of G^T G, (n_cols, n_cols).
        at: step of the schedules; whoever drives the loop counts, for a loop skips
            steps that teach nothing.
    """

    def __init__(
        self,
        model: Any,
        configs: Sequence[OptimizerConfig],
        steps: int,
        watched: Sequence[str] = (),
    ) -> None:
        super().__init__(model.parameters(), {"lr": 0.0})
        self.models = [copy.deepcopy(model) for _ in configs]
        self.moments: dict[str, Tensor] = {}
        pairs = zip(self.models, configs, strict=True)
        self._movers = [(m, optimizer_of(m, c), c) for m, c in pairs]
        self._watched = {n: dict(model.named_parameters())[n] for n in watched}
        self._steps, self.at = steps, 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Hand one batch's gradients on."""
        own = [p for group in self.param_groups for p in group["params"]]
        for name, parameter in self._watched.items():
            if parameter.grad is not None:
                moment = parameter.grad.mT @ parameter.grad
                self.moments[name] = self.moments.get(name, 0.0) + moment.double()
        for model, mover, config in self._movers:
            for ours, theirs in zip(own, model.parameters(), strict=True):
                theirs.grad = None if ours.grad is None else ours.grad.clone()
            set_learning_rate(mover, learning_rate(config, self.at, self._steps))
            mover.step()
            mover.zero_grad()


def frozen_table(runs: Sequence[Run], batches: int | None = None) -> pd.DataFrame:
    """Stable rank of the updates that runs would make if their gradients stayed.

    Args:
        runs: which differ in their optimizers alone, so that they share a pass. They
            are not trained, and nothing is stored; the batches are none of their own.
        batches: stop after so many: enough for the covariance and the first checkpoints
            (None: as many as the runs have steps).

    Returns:
        Columns ``COLUMNS``, at the checkpoints' steps.

    Raises:
        ValueError: runs that differ in more, or in how gradients are clipped.
    """
    one, *others = runs
    for other in others:
        asked = replace(other.train, optimizer=one.train.optimizer)
        limits = {r.train.optimizer.max_grad_norm for r in (one, other)}
        if (asked, other.start, other.teacher, other.seed, len(limits)) != (
            *(one.train, one.start, one.teacher, one.seed),
            1,
        ):
            raise ValueError(
                f"{other.name} beside {one.name}: expected runs that differ in their "
                "optimizer alone, clipped alike; ask for them one by one"
            )
    for stage in (one.start, one.teacher):
        if isinstance(stage, Run):
            ensure(stage)
    rows: list[tuple[Any, ...]] = []
    with one_thread():
        model, tokenizer = starting_model(one)
        matrices, steps = starting_matrices(one), one.train.steps
        configs = [run.train.optimizer for run in runs]
        followers = Followers(model, configs, steps, [m.name for m in matrices])
        asked_run = replace(one, seed=one.seed + SEEDS_APART)
        loop = loop_of(asked_run, model, tokenizer, followers, 0)
        before = dict(model.named_parameters())
        for step, _ in enumerate(loop, start=1):
            followers.at = step
            there = runs if step in one.checkpoint_steps() else ()
            for run, copied in zip(there, followers.models, strict=False):
                after = dict(copied.named_parameters())
                for m in matrices:
                    delta = after[m.name].double() - before[m.name].double()
                    place = (run.key(), run.arm, run.seed, m.name, m.role, m.layer)
                    rank = spectra.stable_rank(delta.detach())
                    rows.append((*place, step, "frozen_stable_rank", rank))
            if step == batches:
                break
        for run in runs:
            for m in matrices:
                place = (run.key(), run.arm, run.seed, m.name, m.role, m.layer)
                found = _energy_rank(followers.moments[m.name])
                rows.append((*place, 0, "covariance_rank", found))
    return pd.DataFrame(rows, columns=COLUMNS)


def _energy_rank(moment: Tensor) -> float:
    """tr C / largest eigenvalue of C: the stable rank of what has this second moment.

    >>> _energy_rank(torch.diag(torch.tensor([4.0, 2.0, 2.0])))
    2.0
    """
    return float(moment.trace() / torch.linalg.eigvalsh(moment)[-1])


def matched_rate(
    run: Run, config: OptimizerConfig, steps: int, rounds: int = 2
) -> float:
    """The learning rate at which another optimizer goes as far as a run's own.

    rate <- rate * ||dW_own||_F / ||dW_other||_F after ``steps`` steps, over all weights

    Args:
        run: whose optimizer is followed.
        config: the other one; its learning rate is where the search begins.
        steps: of the comparison; the schedule is that of the whole run.
        rounds: corrections.
    """

    def length(own: OptimizerConfig) -> float:
        model, tokenizer = starting_model(run)
        before = [p.detach().clone() for p in model.parameters()]
        asked = replace(run, train=replace(run.train, optimizer=own))
        optimizer = optimizer_of(model, own)
        loop = loop_of(asked, model, tokenizer, optimizer, 0)
        for _ in zip(range(steps), loop, strict=False):
            pass
        pairs = zip(model.parameters(), before, strict=True)
        return float(sum((p.detach() - b).square().sum() for p, b in pairs) ** 0.5)

    with one_thread():
        wanted = length(run.train.optimizer)
        for _ in range(rounds):
            factor = wanted / length(config)
            config = replace(config, learning_rate=config.learning_rate * factor)
    return config.learning_rate


def commit_frozen(profile: str, table: pd.DataFrame) -> None:
    """Store a table beside the committed ones of other runs."""
    commit_table("frozen", profile, table, ["run"])


def committed_frozen(profile: str) -> pd.DataFrame:
    """The committed table of a profile; empty when there is none."""
    return committed_table("frozen", profile, COLUMNS)

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


class Follower(torch.optim.Optimizer):
    """An optimizer that moves nothing, and a copy of its model that another moves.

    Args:
        model: whose gradients it follows.
        config: optimizer and schedule.
        steps: length of the run, for the schedule.
        watched: names of the matrices whose second moments are added up.

    Attributes:
        model: the copy.
        moments: name to the sum of G^T G, (n_cols, n_cols).
        at: step of the schedule; whoever drives the loop counts, for a loop skips
            steps that teach nothing.
    """

    def __init__(
        self, model: Any, config: OptimizerConfig, steps: int, watched: Sequence[str]
    ) -> None:
        super().__init__(model.parameters(), {"lr": 0.0})
        self.model = copy.deepcopy(model)
        self.moments: dict[str, Tensor] = {}
        self._mover, self._config = optimizer_of(self.model, config), config
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
        for ours, theirs in zip(own, self.model.parameters(), strict=True):
            theirs.grad = None if ours.grad is None else ours.grad.clone()
        rate = learning_rate(self._config, self.at, self._steps)
        set_learning_rate(self._mover, rate)
        self._mover.step()
        self._mover.zero_grad()


def frozen_table(run: Run) -> pd.DataFrame:
    """Stable rank of the updates that a run would make if its gradients stayed.

    Args:
        run: it is not trained, and nothing is stored; the batches are none of its own.

    Returns:
        Columns ``COLUMNS``, at the checkpoints' steps.
    """
    for stage in (run.start, run.teacher):
        if isinstance(stage, Run):
            ensure(stage)
    rows: list[tuple[Any, ...]] = []
    with one_thread():
        model, tokenizer = starting_model(run)
        places = {
            m.name: (run.key(), run.arm, run.seed, m.name, m.role, m.layer)
            for m in starting_matrices(run)
        }
        config, steps = run.train.optimizer, run.train.steps
        follower = Follower(model, config, steps, [*places])
        asked = replace(run, seed=run.seed + SEEDS_APART)
        before, after = (
            dict(each.named_parameters()) for each in (model, follower.model)
        )
        loop = loop_of(asked, model, tokenizer, follower, 0)
        for step, _ in enumerate(loop, start=1):
            follower.at = step
            for name in places if step in run.checkpoint_steps() else ():
                delta = after[name].double() - before[name].double()
                rank = spectra.stable_rank(delta.detach())
                rows.append((*places[name], step, "frozen_stable_rank", rank))
        for name, place in places.items():
            found = _energy_rank(follower.moments[name])
            rows.append((*place, 0, "covariance_rank", found))
    return pd.DataFrame(rows, columns=COLUMNS)


def _energy_rank(moment: Tensor) -> float:
    """tr C / largest eigenvalue of C: the stable rank of what has this second moment.

    >>> _energy_rank(torch.diag(torch.tensor([4.0, 2.0, 2.0])))
    2.0
    """
    return float(moment.trace() / torch.linalg.eigvalsh(moment)[-1])


def commit_frozen(profile: str, table: pd.DataFrame) -> None:
    """Store a table beside the committed ones of other runs."""
    commit_table("frozen", profile, table, ["run"])


def committed_frozen(profile: str) -> pd.DataFrame:
    """The committed table of a profile; empty when there is none."""
    return committed_table("frozen", profile, COLUMNS)

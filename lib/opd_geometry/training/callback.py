"""Diagnostics and projection inside transformers' Trainer, hence inside TRL's trainers.

    trainer = SFTTrainer(...)  # or GRPOTrainer, DistillationTrainer, Trainer
    trainer.add_callback(GeometryCallback(trainer, every=50, lock_at=0.2))
    trainer.add_callback(ProjectionCallback(trainer, lock_at=0.2, k=16, form="update"))
    trainer.train()

Both compare with W_0, the weights that the model has when they are made. A training
that is resumed needs the same W_0: make the model as for the first start (the trainer
loads the checkpoint later), or name the checkpoint of the start in ``w_before``. What
they have to remember (subspaces, and by what to recognise W_0) is stored in every
checkpoint that the trainer saves.
"""

import json
import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, extract_model_from_parallel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from opd_geometry.geometry.checkpoints import Matrix, matrices_in_memory
from opd_geometry.geometry.live import (
    ATTENTION_ROLES,
    Movement,
    Start,
    movement,
    watched,
)
from opd_geometry.geometry.projection import (
    ProjectionHandle,
    project_gradients,
    project_updates,
)
from opd_geometry.geometry.spectra import subspace_similarity

PREFIX = "geometry"
FORMS = ("gradient", "update")


class GeometryCallback(TrainerCallback):
    """Log how far, and into which subspace, the weights have moved since the start.

    Every ``every`` steps, at the lock and at the end it logs, through the trainer's own
    log (so TensorBoard, Weights & Biases or Trackio get it), averages over matrices:

    - ``geometry/stable_rank``: ||dW||_F^2 / ||dW||_2^2, dW = W_t - W_0;
    - ``geometry/frobenius_norm``: ||dW||_F, in units of the weights;
    - ``geometry/sparsity``: share of entries unchanged in bf16, by parameters;
    - ``geometry/similarity_to_previous``, ``geometry/similarity_to_locked``: Sim_K of
      dW's top-K right subspace with that of the time before, or of the lock;
    - ``geometry/similarity_null``: K / n, what two random subspaces have;
    - ``geometry/seconds``, ``geometry/time_share``: what this cost, also as a share of
      the time since the last one.

    A value is left out where no matrix has it. Training stays the same bit for bit: no
    generator is moved and no weight written. Cost and accuracy: see `live`.

    Args:
        trainer: whose model and log; add the callback to the same trainer.
        every: steps from one measurement to the next.
        roles: which matrices; the attention projections, as in the paper's
            trajectories. None for all.
        max_layers: at most so many layers, evenly spaced; None for all.
        k: K of the subspaces, cut to a matrix's smaller side.
        lock_at: the step (int), or share of training (float in (0, 1)), whose subspace
            is kept to compare with; None for no lock.
        w_before: checkpoint of the start; None for the model's weights now.
        keep_on: device that keeps W_0, in bf16 where that loses nothing. The CPU costs
            a copy to the accelerator each time, the accelerator memory.
        detail: ``mean``, or also by ``role`` (``geometry/q/stable_rank``), or also by
            ``matrix`` (``geometry/NAME/stable_rank``).

    Raises:
        ValueError: an option out of range, no such matrix, a w_before that does not
            fit; at the start of training: a lock after its end, or a W_0 that is not
            that of the training which is resumed.

    Source: arXiv:2606.07082 Table 1, Figures 4 and 5.
    """

    def __init__(
        self,
        trainer: Trainer,
        every: int = 50,
        *,
        roles: Collection[str] | None = ATTENTION_ROLES,
        max_layers: int | None = None,
        k: int = 16,
        lock_at: int | float | None = None,
        w_before: str | Path | None = None,
        keep_on: str | torch.device = "cpu",
        detail: str = "mean",
    ) -> None:
        _check_count("every", every)
        _check_count("k", k)
        if detail not in ("mean", "role", "matrix"):
            raise ValueError(f"detail {detail!r}, expected mean, role or matrix")
        if lock_at is not None:
            _check_moment(lock_at)
        self.trainer, self.every, self.k = trainer, every, k
        self.lock_at, self.detail = lock_at, detail
        self.roles, self.max_layers = roles, max_layers
        self.start = Start(self._matrices(), w_before, keep_on)
        self.previous: dict[str, Tensor] = {}
        self.locked: dict[str, Tensor] = {}
        self.measured_at = -1  # the step
        self.lock_step: int | None = None  # known once training begins
        self.last = time.perf_counter()

    def _matrices(self) -> dict[str, tuple[Matrix, Tensor]]:
        model = _inner(self.trainer.model)
        return watched(_trained(model), _config(model), self.roles, self.max_layers)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Find the step of the lock, and what a resumed training had stored."""
        self.lock_step = _step_of(self.lock_at, state.max_steps)
        self.previous, self.locked, self.measured_at = {}, {}, -1
        if state.global_step > 0:
            must = self.lock_step is not None and self.lock_step <= state.global_step
            kept = _recall(args, state, "geometry", self.start, must)
            self.previous, self.locked = (
                kept.get("previous", {}),
                kept.get("locked", {}),
            )
        self.last = time.perf_counter()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Measure and log when it is time."""
        step = state.global_step
        due = step % self.every == 0 or step in (self.lock_step, state.max_steps)
        if due and state.is_world_process_zero and step != self.measured_at:
            self._log(self.measure(step), control)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Store the subspaces in the checkpoint that the trainer has just saved."""
        bases = {"previous": self.previous, "locked": self.locked}
        _remember(args, state, "geometry", self.start, bases)

    def measure(self, step: int) -> dict[str, float]:
        """What is logged, computed now; the subspaces become the previous ones.

        Args:
            step: which; at the step of the lock the subspaces are locked.
        """
        began = time.perf_counter()
        rows, subspaces = [], {}
        with torch.no_grad():
            for name, (matrix, tensor) in self._matrices().items():
                k = min(self.k, *matrix.shape)
                moved = movement(self.start.weights[name], tensor.detach(), k)
                rows.append((matrix, self._values(matrix, moved, k)))
                if moved.right is not None:
                    subspaces[name] = moved.right
        if step == self.lock_step:
            self.locked = subspaces
        self.previous, self.measured_at = subspaces, step
        ended = time.perf_counter()
        cost = {
            "seconds": ended - began,
            "time_share": (ended - began) / (ended - self.last),
        }
        self.last = ended
        values = _average(rows, self.detail) | cost
        return {f"{PREFIX}/{name}": value for name, value in values.items()}

    def _values(self, matrix: Matrix, moved: Movement, k: int) -> dict[str, float]:
        """One matrix's values, NaN where one is undefined."""
        values = {
            "stable_rank": moved.stable_rank,
            "frobenius_norm": moved.frobenius_norm,
            "sparsity": moved.sparsity,
            "similarity_null": k / matrix.shape[1],
        }
        for name, bases in (("previous", self.previous), ("locked", self.locked)):
            if moved.right is not None and matrix.name in bases:
                values[f"similarity_to_{name}"] = subspace_similarity(
                    moved.right, bases[matrix.name]
                )
        return values

    def _log(self, values: dict[str, float], control: TrainerControl) -> None:
        # Not self.trainer.log: TRL's own empties its running means with every call. And
        # a log marks the step as logged, which would swallow the trainer's own of it.
        wanted = control.should_log
        Trainer.log(self.trainer, values)
        control.should_log = wanted


class ProjectionCallback(TrainerCallback):
    """Confine training, from a step on, to the subspace of the update until then.

    At the end of the step of the lock: V_K = top-K right singular vectors of
    dW = W_t - W_0, a basis for each matrix; from then on

    - form ``gradient`` (the paper's): g <- g V V^T before every step. Adam and weight
      decay leave the subspace all the same; `projection.leaked_energy` says how far;
    - form ``update``: W_new <- W_old + (W_new - W_old) V V^T after every step. W_t -
      W_lock stays inside, up to the rounding of the stored weights.

    Gradients are projected once a step, accumulated and clipped. A fused qkv_proj or
    gate_up_proj has one basis for all its rows.

    Args:
        trainer: whose model and optimizer; add the callback to the same trainer.
        lock_at: the step (int), or share of training (float in (0, 1)).
        k: K of the subspaces, cut to a matrix's smaller side.
        form: ``gradient`` or ``update``.
        roles: which matrices, by the roles that `checkpoints` gives them; None for
            every two-dimensional weight.
        w_before: checkpoint of the start, for a model without fused weights; None for
            the model's weights now.

    Attributes:
        bases: parameter's name to V (n_cols, K), float32; empty before the lock. A
            matrix that moved in fewer than K directions is left free.

    Raises:
        ValueError: as `GeometryCallback`; at the lock: no matrix that has moved.

    Source: arXiv:2606.07082 Fig. 6 (K = 16 at about 20 % of training).
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        lock_at: int | float = 0.2,
        k: int = 16,
        form: str = "gradient",
        roles: Collection[str] | None = None,
        w_before: str | Path | None = None,
    ) -> None:
        _check_count("k", k)
        _check_moment(lock_at)
        if form not in FORMS:
            raise ValueError(f"form {form!r}, expected {' or '.join(FORMS)}")
        self.trainer, self.lock_at, self.k, self.form = trainer, lock_at, k, form
        model = _inner(trainer.model)
        self.names = _whole(watched(_trained(model), _config(model), roles), model)
        self.start = Start(self._matrices(), w_before)
        self.bases: dict[str, Tensor] = {}
        self.handle: ProjectionHandle | None = None
        self.lock_step: int | None = None  # known once training begins

    def _matrices(self) -> dict[str, tuple[Matrix, Tensor]]:
        """The parameters that are confined, each as one matrix."""
        tensors = dict(_inner(self.trainer.model).named_parameters())
        return {
            name: (_matrix(name, tensors[name]), tensors[name]) for name in self.names
        }

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Find the step of the lock; a resumed training after it goes on confined."""
        self.release()
        self.lock_step = _step_of(self.lock_at, state.max_steps)
        assert self.lock_step is not None
        if state.global_step > 0:
            must = self.lock_step <= state.global_step
            kept = _recall(args, state, "projection", self.start, must)
            if must:
                self.bases = kept["locked"]
                self._confine(kwargs["optimizer"])

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Lock when it is time."""
        if state.global_step != self.lock_step or self.handle is not None:
            return
        for name, (_, tensor) in self._matrices().items():
            k = min(self.k, *tensor.shape)
            moved = movement(self.start.weights[name], tensor.detach(), k)
            if moved.right is not None:
                # One basis for all processes, whose own may differ in the last digit.
                self.bases[name] = broadcast(moved.right.to(tensor.device)).cpu()
        if not self.bases:
            raise ValueError(
                f"no matrix has moved in {self.k} directions by step {self.lock_step}, "
                "expected one at least; lock later or lower k"
            )
        self._confine(kwargs["optimizer"])

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Store the subspaces in the checkpoint that the trainer has just saved."""
        _remember(args, state, "projection", self.start, {"locked": self.bases})

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take the projection off the optimizer; the bases stay to be looked at."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def release(self) -> None:
        """Let the optimizer step freely again, and forget the bases."""
        if self.handle is not None:
            self.handle.remove()
        self.handle, self.bases = None, {}

    def _confine(self, optimizer: Any) -> None:
        tensors: dict[str, Any] = dict(_inner(self.trainer.model).named_parameters())
        attach = project_gradients if self.form == "gradient" else project_updates
        bases: dict[Tensor, Tensor] = {tensors[n]: v for n, v in self.bases.items()}
        self.handle = attach(optimizer, bases)


# --- the model -----------------------------------------------------------------------


def _inner(model: Any) -> nn.Module:
    """The model inside what accelerate or torch.compile wrapped around it."""
    inner: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters by name; a tied one once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _config(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else {}


def _whole(
    matrices: Mapping[str, tuple[Matrix, Tensor]], model: nn.Module
) -> list[str]:
    """Names of the two-dimensional parameters that matrices are, or are rows of."""
    storages = {tensor.untyped_storage().data_ptr() for _, tensor in matrices.values()}
    return [
        name
        for name, p in _trained(model).items()
        if p.ndim == 2 and p.untyped_storage().data_ptr() in storages
    ]


def _matrix(name: str, tensor: Tensor) -> Matrix:
    """A parameter as one matrix, fused or not."""
    found = matrices_in_memory({name: tensor}, {}).get(name)
    shape = (int(tensor.shape[0]), int(tensor.shape[1]))
    return found[0] if found else Matrix(name, "other", -1, shape, str(tensor.dtype))


# --- options and averages ------------------------------------------------------------


def _check_count(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} = {value!r}, expected an integer, 1 or larger")


def _check_moment(lock_at: Any) -> None:
    step = type(lock_at) is int and lock_at >= 1
    share = type(lock_at) is float and 0.0 < lock_at < 1.0
    if not (step or share):
        raise ValueError(
            f"lock_at = {lock_at!r}, expected a step (an integer, 1 or larger) or a "
            "share of training (a float between 0 and 1)"
        )


def _step_of(lock_at: int | float | None, max_steps: int) -> int | None:
    """The step of a moment.

    Raises:
        ValueError: it lies after the end.
    """
    if lock_at is None:
        return None
    step = lock_at if type(lock_at) is int else max(1, round(lock_at * max_steps))
    if step > max_steps:
        raise ValueError(
            f"lock_at = {lock_at} lies after the last step, {max_steps}; lower it, or "
            "give a share of training such as 0.2"
        )
    return int(step)


def _average(
    rows: list[tuple[Matrix, dict[str, float]]], detail: str
) -> dict[str, float]:
    """Means over all matrices and, where asked for, over roles or of each matrix."""
    groups: dict[str, list[tuple[Matrix, dict[str, float]]]] = {"": rows}
    for matrix, values in rows if detail != "mean" else ():
        key = matrix.role if detail == "role" else matrix.name
        groups.setdefault(f"{key}/", []).append((matrix, values))
    means = {}
    for key, members in groups.items():
        for name in dict.fromkeys(name for _, values in members for name in values):
            weighted = [
                (v[name], m.shape[0] * m.shape[1] if name == "sparsity" else 1)
                for m, v in members
                if v.get(name) == v.get(name, float("nan"))  # not NaN
            ]
            if weighted:
                total = sum(weight for _, weight in weighted)
                means[key + name] = sum(v * weight for v, weight in weighted) / total
    return means


# --- what a checkpoint remembers -----------------------------------------------------


def _place(args: TrainingArguments, state: TrainerState, kind: str) -> Path:
    folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
    return folder / f"opd_geometry_{kind}.safetensors"


def _remember(
    args: TrainingArguments,
    state: TrainerState,
    kind: str,
    start: Start,
    bases: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Store bases, and by what to recognise W_0, beside a checkpoint's weights."""
    place = _place(args, state, kind)
    if not state.is_world_process_zero or not place.parent.is_dir():
        return
    tensors = {
        f"{group}/{name}": v.contiguous()
        for group, named in bases.items()
        for name, v in named.items()
    }
    draft = place.with_name(f".{place.name}")
    save_file(tensors, draft, {"w_before": json.dumps(start.fingerprint())})
    os.replace(draft, place)


def _recall(
    args: TrainingArguments, state: TrainerState, kind: str, start: Start, must: bool
) -> dict[str, dict[str, Tensor]]:
    """What `_remember` stored at this step, once W_0 is known to be the same.

    Raises:
        ValueError: another W_0, a damaged file, or none where there must be one.
    """
    place = _place(args, state, kind)
    hint = "give w_before=, the checkpoint that training began with"
    if not place.is_file():
        if must:
            raise ValueError(
                f"resumed at step {state.global_step}, after the lock, but {place} "
                "with the locked subspaces is missing; resume from a checkpoint saved "
                "with this callback, in the same output_dir"
            )
        return {}
    kept: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(str(place), framework="pt") as stored:
            told = json.loads(stored.metadata()["w_before"])
            for key in stored.keys():  # noqa: SIM118, this is no dictionary
                group, _, name = key.partition("/")
                kept.setdefault(group, {})[name] = stored.get_tensor(key)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{place} is damaged, expected what this callback stored; resume from an "
            "earlier checkpoint"
        ) from error
    start.check(told, hint)
    if must and "locked" not in kept:
        raise ValueError(
            f"{place} holds no locked subspaces, though step {state.global_step} is "
            "after the lock; give the lock_at of the first start"
        )
    return kept

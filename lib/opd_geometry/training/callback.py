"""Diagnostics and projection inside transformers' Trainer, hence inside TRL's trainers.

    trainer = SFTTrainer(...)  # or GRPOTrainer, DistillationTrainer, Trainer
    trainer.add_callback(GeometryCallback(trainer, every=50, lock_at=0.2))
    trainer.add_callback(ProjectionCallback(trainer, lock_at=0.2, k=16, form="update"))
    trainer.train()

Both compare with W_0, the weights that the model has when they are made, or of the
checkpoint named in ``w_before``. What they have to remember (subspaces, the step of the
lock, by what to recognise W_0, and W_0 itself of heads and embeddings, which may have
been drawn at random) is stored in every checkpoint that the trainer saves and read from
the one that is resumed. Before the lock a resumed training needs the same W_0: make the
model as for the first start (the trainer loads the checkpoint later), or give
``w_before``.
"""

import math
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Arguments

from opd_geometry.geometry import live, unplaced
from opd_geometry.geometry.checkpoints import Matrix
from opd_geometry.geometry.comparison import null_seed
from opd_geometry.geometry.rates import UnknownRates, moments_of
from opd_geometry.geometry.shadow import Moments, Shadow
from opd_geometry.geometry.spectra import subspace_similarity
from opd_geometry.geometry.unplaced import Magnitudes
from opd_geometry.training.attached import (
    Checkpoints,
    Content,
    Matrices,
    Once,
    Origin,
    adapters,
    inner_model,
    reparametrised,
    some,
    watched_matrices,
)
from opd_geometry.training.confining import (
    ProjectionCallback,
    check_count,
    check_moment,
    step_of,
)

__all__ = ["GeometryCallback", "ProjectionCallback"]

_inner = inner_model  # as scripts outside of the library ask for it

PREFIX = "geometry"
SHADOWED = 2**24  # entries of the largest matrix whose nulls are followed: 0.5 GB


class GeometryCallback(TrainerCallback):
    """Log how far, and into which subspace, the weights have moved since the start.

    Every ``every`` steps, at the lock and at the end it logs, through the trainer's own
    log (so TensorBoard, Weights & Biases or Trackio get it), averages over matrices:

    - ``geometry/stable_rank``: ||dW||_F^2 / ||dW||_2^2, dW = W_t - W_0;
    - ``geometry/frobenius_norm``: ||dW||_F, in units of the weights;
    - ``geometry/stable_rank_bf16``, ``geometry/frobenius_norm_bf16``: the same of
      bf16(W_t) - bf16(W_0), to which rounding adds a high rank;
    - ``geometry/sparsity``: share of entries unchanged in bf16, by parameters;
    - ``geometry/expected_sparsity``: the same of an update of this norm without a place
      of its own, in closed form; not of weights that are stored in bf16, whose norm
      contains rounding;
    - ``geometry/shuffled_sparsity``: the same of the update's own entries at other
      places, drawn; not of weights that are stored in 16 bits;
    - ``geometry/energy_of_weights``, ``geometry/similarity_of_weights``: share of the
      squared update in W_0's top-K right subspace, and Sim_K of that with the
      update's;
    - ``geometry/similarity_to_previous``, ``geometry/similarity_to_locked``: Sim_K of
      dW's top-K right subspace with that of the time before, or of the lock;
    - ``geometry/similarity_null``: K / n, what two random subspaces have, and what an
      update without a place, or one turned at random, has of its energy in one;
    - ``geometry/increments_stable_rank``, ``geometry/increments_similarity_to_locked``
      and so on: of what training added between two measurements, each turned by a
      rotation of its own, summed; ``geometry/walk_...``: of the optimizer's own steps
      on gradients that are noise, as long as training's. Both follow one matrix of
      each shape, inside layers and of at most `SHADOWED` entries, from the first step
      on, and are what a lock has to exceed. Rounding of 16-bit weights is in both;
    - ``geometry/displacement``: rms(dW) / sqrt(sum of lr^2 over the steps), lr being
      that of the matrix's own group; about 1 for gradients that are noise; Adam's only;
    - ``geometry/clipped_share``: of the steps whose gradient norm the trainer logged
      so far, those above its ``max_grad_norm``;
    - ``geometry/seconds``, ``geometry/time_share``: what this cost, also as a share of
      the time since the last one.

    A value is left out where no matrix has it, and NaN where weights are. Training
    stays the same bit for bit: no generator is moved and no weight written; nor does it
    end for its diagnostics: what fails is one warning. Which matrices are looked at is
    settled when the callback is made. Cost and accuracy: see `live`.

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
        nulls: whether increments and walk are followed, too (see `shadow`): 28 bytes an
            entry of those matrices, in memory and in every checkpoint, and about a
            third more time.

    Raises:
        ValueError: an option out of range, no such matrix, a w_before that does not
            fit. After that nothing: a lock after the end is none, and with another W_0
            than that of the training which is resumed nothing is logged.

    Source: arXiv:2606.07082 Table 1, Figures 4 and 5.
    """

    def __init__(
        self,
        trainer: Trainer,
        every: int = 50,
        *,
        roles: Collection[str] | None = live.ATTENTION_ROLES,
        max_layers: int | None = None,
        k: int = 16,
        lock_at: int | float | None = None,
        w_before: str | Path | None = None,
        keep_on: str | torch.device = "cpu",
        detail: str = "mean",
        nulls: bool = True,
    ) -> None:
        check_count("every", every)
        check_count("k", k)
        if detail not in ("mean", "role", "matrix"):
            raise ValueError(f"detail {detail!r}, expected mean, role or matrix")
        if lock_at is not None:
            check_moment(lock_at)
        self.trainer, self.every, self.k = trainer, every, k
        self.lock_at, self.detail = lock_at, detail
        self.roles, self.max_layers, self.warn = roles, max_layers, Once(trainer)
        self.names: set[str] | None = None  # of the matrices, once they are settled
        self.origin = Origin(trainer, self._matrices, w_before, keep_on)
        self.names = set(self._matrices(inner_model(trainer.model)))
        self._tell()
        self.checkpoints = Checkpoints(
            self, trainer, "geometry", self._content, guarded=self._guarded
        )
        self.previous: dict[str, Tensor] = {}
        self.locked: dict[str, Tensor] = {}
        self.magnitudes: dict[str, Magnitudes] = {}  # of W_0
        self.tops: dict[str, Tensor] = {}  # its top right subspaces
        self.measured_at = -1  # the step
        # sum of lr^2 of each group of the optimizer; None where steps were not seen
        self.squares: list[float] | None = []
        self.rates: list[list[float]] = []  # of each group, since the last measurement
        self.nulls, self.shadows = nulls, dict[str, Shadow]()
        self.lock_step: int | None = None  # known once training begins
        self.last = time.perf_counter()

    @property
    def start(self) -> Any:
        """W_0, in the first process."""
        return self.origin.start

    def _matrices(self, model: nn.Module) -> Matrices:
        if self.names is None:
            return watched_matrices(model, self.roles, self.max_layers)
        everything = dict(model.named_parameters())
        found = watched_matrices(model, self.roles, names=list(everything))
        return {name: pair for name, pair in found.items() if name in self.names}

    def on_train_begin(
        self, args: Arguments, state: State, control: Control, **kwargs: Any
    ) -> None:
        """Find the step of the lock, and what a resumed training had stored."""
        self.previous, self.locked, self.measured_at = {}, {}, -1
        self.magnitudes, self.tops, self.lock_step = {}, {}, None
        self._guarded(lambda: self._begin(args, state))
        self.last = time.perf_counter()

    def _guarded(self, work: Callable[[], Any]) -> bool:
        """Do something that must not end the training; whether it worked."""
        try:
            work()
        except Exception as error:
            line = " ".join(str(error).split()) or type(error).__name__
            self.warn(line, f"the geometry is not complete: {line}")
            return False
        return True

    def _begin(self, args: Arguments, state: State) -> None:
        self._matrices(inner_model(self.trainer.model))  # still whole, and wrapped
        if state.global_step == 0:
            if self.origin.begin():  # else W_0 is that of an earlier training, too
                self.squares, self.rates, self.shadows = [], [], {}
            self.lock_step = step_of(self.lock_at, state.max_steps)
            if self.nulls and not self.shadows:
                self._guarded(lambda: self.shadows.update(self._shadows()))
            return
        self.squares, self.rates, self.shadows = None, [], {}
        place = self.checkpoints.place(args, state)
        try:
            kept, said = self.checkpoints.read(place)
        except (FileNotFoundError, ValueError) as error:
            line = f"{error}; the subspaces of before are lost to the log"
            self.warn("file", line)
            asked = step_of(self.lock_at, state.max_steps)
            if asked is not None and asked > state.global_step:
                self.lock_step = asked
            return
        self.squares = said.get("squares")
        stored = said.get("lock_step")
        self.lock_step = (
            stored
            if stored is not None and self.lock_at is not None
            else step_of(self.lock_at, state.max_steps)
        )
        self.previous = kept.get("previous", {})
        self.locked = kept.get("locked", {})
        try:
            self.origin.recall(kept.get("start", {}), said["w_before"])
        except ValueError:
            self.origin.forget()  # nothing is measured against another W_0
            raise
        if self.nulls:
            self._guarded(lambda: self._recall(said))

    def on_optimizer_step(
        self, args: Arguments, state: State, control: Control, **kwargs: Any
    ) -> None:
        """Add the learning rates that were just used to the unit of distance."""
        optimizer = kwargs.get("optimizer")
        groups = getattr(optimizer, "param_groups", [])
        if self.squares is None or getattr(optimizer, "step_was_skipped", False):
            return
        sums = self.squares or [0.0] * len(groups)
        try:
            rates = [float(group["lr"]) for group in groups]
        except (KeyError, TypeError, ValueError):  # rates of a kind of its own
            self.squares = None
            return
        known = len(rates) == len(sums) and all(rate == rate for rate in rates)
        added = zip(sums, rates, strict=False)
        self.squares = [total + rate**2 for total, rate in added] if known else None
        self.rates.append(rates)

    def _group_of(self, tensor: Tensor) -> tuple[int, dict[str, Any]] | None:
        """Number and settings of a matrix's group in the optimizer."""
        place = tensor.untyped_storage().data_ptr()
        groups = getattr(self.trainer.optimizer, "param_groups", [])
        for number, group in enumerate(groups):
            if any(p.untyped_storage().data_ptr() == place for p in group["params"]):
                return number, group
        return None

    def _square_of(self, tensor: Tensor) -> float | None:
        """Sum of lr^2 over Adam's steps of a matrix; None where it is not known."""
        found = self._group_of(tensor)
        moments = self._moments(tensor)
        adam = moments is not None and moments[0] is not None
        return self.squares[found[0]] if found and adam and self.squares else None

    def _shadows(self) -> dict[str, Shadow]:
        """Nulls of one matrix of each shape, in the middle of the model."""
        alike: dict[tuple[int, ...], list[str]] = {}
        matrices = self._matrices(inner_model(self.trainer.model))
        for name, (matrix, _) in matrices.items():
            if matrix.layer >= 0 and math.prod(matrix.shape) <= SHADOWED:
                alike.setdefault(matrix.shape, []).append(name)
        middle = [names[len(names) // 2] for names in alike.values()]
        start = self.start.weights if self.origin.start is not None else {}
        return {
            name: Shadow(
                start[name], null_seed(0, name, 0), self._moments(matrices[name][1])
            )
            for name in middle
            if name in start
        }

    def _moments(self, tensor: Tensor) -> Moments | None:
        """What the optimizer moves a matrix with, if the walk knows it."""
        found = self._group_of(tensor)
        try:
            return moments_of(found[1], "the training") if found else None
        except UnknownRates as error:
            self.warn("walk", f"no walk: {error}")
            return None

    def _recall(self, said: dict[str, Any]) -> None:
        """Take up the nulls where the training that is resumed left them."""
        self.rates = said.get("rates", [])
        self.shadows = self._shadows()
        for name in list(self.shadows):
            try:
                self.shadows[name].recall(self.checkpoints.null[f"null {name}"])
            except KeyError:
                del self.shadows[name]
                self.warn("nulls", "this checkpoint has no nulls; none are logged")

    def on_step_end(
        self, args: Arguments, state: State, control: Control, **kwargs: Any
    ) -> None:
        """Measure and log when it is time."""
        step = state.global_step
        due = step % self.every == 0 or step in (self.lock_step, state.max_steps)
        if due or control.should_training_stop:
            self._measure_now(state, control)

    def on_epoch_end(
        self, args: Arguments, state: State, control: Control, **kwargs: Any
    ) -> None:
        """Measure at the end, too, where a training stops early."""
        if control.should_training_stop:
            self._measure_now(state, control)

    def _measure_now(self, state: State, control: Control) -> None:
        step = state.global_step
        first = self.trainer.args.process_index == 0 and self.origin.start is not None
        if first and step > 0 and step != self.measured_at:
            self._guarded(lambda: self._log(self.measure(step), control))

    def _content(self) -> Content:
        """What a checkpoint has to remember."""
        return {
            "previous": self.previous,
            "locked": self.locked,
            "start": self.origin.outside_blocks(),
            **{f"null {name}": dict(s.state()) for name, s in self.shadows.items()},
        }, {
            "w_before": self.origin.fingerprint,
            "lock_step": self.lock_step,
            "squares": self.squares,
            "rates": self.rates,
        }

    def measure(self, step: int) -> dict[str, float]:
        """What is logged, computed now; the subspaces become the previous ones.

        Args:
            step: which; at the step of the lock the subspaces are locked.
        """
        began = time.perf_counter()
        rows, subspaces, broken = [], {}, []
        model = inner_model(self.trainer.model)
        with torch.no_grad():
            for name, (matrix, tensor) in self._matrices(model).items():
                if matrix.shape != self.origin.shapes[name]:
                    self.warn("shape", f"{name} has another shape now, and no W_0")
                    continue
                k = min(self.k, *matrix.shape)
                moved = live.movement(self.start.weights[name], tensor.detach(), k)
                square = self._square_of(tensor)
                values = self._values(matrix, moved, k, square)
                if moved.right is not None:
                    values |= self._placed(name, tensor.detach(), moved)
                rows.append((matrix, values))
                if not moved.frobenius_norm < float("inf"):
                    broken.append(name)
                    # it would miss the rates of these steps, should they be left behind
                    self.shadows.pop(name, None)
                if moved.right is not None:
                    subspaces[name] = moved.right
                if name in self.shadows:
                    of = matrix, tensor, k, step, rows, subspaces
                    if not self._guarded(partial(self._unled, *of)):
                        del self.shadows[name]
        self.rates = []
        self._report(model, step, broken)
        if step == self.lock_step:
            self.locked = subspaces
        self.previous, self.measured_at = subspaces, step
        ended = time.perf_counter()
        cost = {
            "seconds": ended - began,
            "time_share": (ended - began) / (ended - self.last),
        }
        self.last = ended
        values = _average(rows, self.detail, broken) | self._clipped() | cost
        return {f"{PREFIX}/{name}": value for name, value in values.items()}

    def _tell(self) -> None:
        """Say once what is trained and not looked into."""
        model = inner_model(self.trainer.model)
        others = adapters(model) + reparametrised(model)
        if others:
            self.warn(
                "others",
                f"{some(others)} are trained and not looked into: adapters, or what "
                "weights are computed from",
            )

    def _clipped(self) -> dict[str, float]:
        limit, history = self.trainer.args.max_grad_norm, self.trainer.state.log_history
        norms = [float(row["grad_norm"]) for row in history if "grad_norm" in row]
        if not norms or not limit:
            return {}
        return {"clipped_share": sum(norm > limit for norm in norms) / len(norms)}

    def _report(self, model: nn.Module, step: int, broken: list[str]) -> None:
        """Say once which weights are not finite, frozen, or trained only now."""
        if broken:
            self.warn("finite", f"step {step}: NaN or inf in {some(broken)}")
        now = {
            name: tensor.requires_grad
            for name, (_, tensor) in watched_matrices(
                model, self.roles, names=[n for n, _ in model.named_parameters()]
            ).items()
        }
        assert self.names is not None
        frozen = [name for name in sorted(self.names) if not now.get(name, False)]
        if frozen:
            self.warn("frozen", f"step {step}: frozen since the start: {some(frozen)}")
        fresh = [n for n in now if now[n] and n not in self.names]
        if fresh and self.max_layers is None:
            self.warn("fresh", f"step {step}: trained, not looked at: {some(fresh)}")

    def _values(
        self, matrix: Matrix, moved: live.Movement, k: int, square: float | None
    ) -> dict[str, float]:
        """One matrix's values, NaN where one is undefined."""
        values = {
            "stable_rank": moved.stable_rank,
            "frobenius_norm": moved.frobenius_norm,
            "stable_rank_bf16": moved.stable_rank_bf16,
            "frobenius_norm_bf16": moved.frobenius_norm_bf16,
            "sparsity": moved.sparsity,
            "expected_sparsity": self._expected(matrix, moved),
            "similarity_null": k / matrix.shape[1],
        }
        if square:
            unit = (matrix.shape[0] * matrix.shape[1] * square) ** 0.5
            values["displacement"] = moved.frobenius_norm / unit
        return values | self._similarities(matrix.name, moved.right)

    def _similarities(self, name: str, right: Tensor | None) -> dict[str, float]:
        """Sim_K with the subspace of the time before, and of the lock."""
        return {
            f"similarity_to_{when}": subspace_similarity(right, bases[name])
            for when, bases in (("previous", self.previous), ("locked", self.locked))
            if right is not None and name in bases
        }

    def _unled(
        self,
        matrix: Matrix,
        w: Tensor,
        k: int,
        step: int,
        rows: list[tuple[Matrix, dict[str, float]]],
        subspaces: dict[str, Tensor],
    ) -> None:
        """Add what one matrix's nulls show, and their subspaces of this time."""
        name = matrix.name
        found = self._group_of(w)
        known = found if self.squares is not None else None
        rates = [each[known[0]] for each in self.rates] if known else None
        values: dict[str, float] = {}
        for null, update in self.shadows[name].add(w, rates, step).items():
            _, rank, right = live.spread(update, k)
            own = {"stable_rank": rank} | self._similarities(f"{null} {name}", right)
            values |= {f"{null}_{metric}": value for metric, value in own.items()}
            if right is not None:
                subspaces[f"{null} {name}"] = right
        rows.append((matrix, values))

    def _placed(self, name: str, w: Tensor, moved: live.Movement) -> dict[str, float]:
        """Where an update lies: against W_0's top subspace and its own permutation."""
        start, right = self.start.weights[name], moved.right
        assert right is not None
        if name not in self.tops:
            self.tops[name] = live.leading_right(start.float(), right.shape[1])[1]
        values = {
            "energy_of_weights": live.energy_within(start, w, self.tops[name]),
            "similarity_of_weights": subspace_similarity(right, self.tops[name]),
        }
        if not (moved.stored or w.dtype in (torch.bfloat16, torch.float16)):
            values["shuffled_sparsity"] = live.shuffled_sparsity(start, w)
        return values

    def _expected(self, matrix: Matrix, moved: live.Movement) -> float:
        """Sparsity of an unplaced update of this norm; NaN where rounding is in it."""
        if moved.stored or not 0.0 < moved.frobenius_norm < float("inf"):
            return float("nan")
        if matrix.name not in self.magnitudes:
            start = self.start.weights[matrix.name]
            self.magnitudes[matrix.name] = unplaced.magnitudes(start)
        scale = moved.frobenius_norm / (matrix.shape[0] * matrix.shape[1]) ** 0.5
        return unplaced.expected_sparsity(self.magnitudes[matrix.name], scale)

    def _log(self, values: dict[str, float], control: Control) -> None:
        # Not self.trainer.log: TRL's own empties its running means with every call. And
        # a log marks the step as logged, which would swallow the trainer's own of it.
        wanted = control.should_log
        Trainer.log(self.trainer, values)
        control.should_log = wanted


def _average(
    rows: list[tuple[Matrix, dict[str, float]]], detail: str, broken: Collection[str]
) -> dict[str, float]:
    """Means over all matrices and, where asked for, over roles or of each matrix.

    What is undefined is left out, what is broken makes its means NaN.
    """
    groups: dict[str, list[tuple[Matrix, dict[str, float]]]] = {"": rows}
    for matrix, values in rows if detail != "mean" else ():
        key = matrix.role if detail == "role" else matrix.name
        groups.setdefault(f"{key}/", []).append((matrix, values))
    means = {}
    for key, members in groups.items():
        lost = any(matrix.name in broken for matrix, _ in members)
        for name in dict.fromkeys(name for _, values in members for name in values):
            weighted = [
                (v[name], m.shape[0] * m.shape[1] if name.endswith("sparsity") else 1)
                for m, v in members
                if v.get(name) == v.get(name, float("nan"))  # not NaN
            ]
            total = sum(weight for _, weight in weighted)
            if lost and name != "similarity_null":
                means[key + name] = float("nan")
            elif weighted:
                means[key + name] = sum(v * weight for v, weight in weighted) / total
    return means

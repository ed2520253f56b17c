"""Training confined to the subspace of the update so far, in anyone's trainer."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Arguments

from opd_geometry.geometry.checkpoints import Matrix
from opd_geometry.geometry.live import SPREAD, directions, is_whole
from opd_geometry.geometry.projection import (
    ProjectionHandle,
    leaked_energy,
    project_gradients,
    project_updates,
)
from opd_geometry.training.attached import (
    Checkpoints,
    Content,
    Matrices,
    Once,
    Origin,
    adapters,
    for_all,
    inner_model,
    reparametrised,
    some,
    stored_turned,
    trained,
    watched_matrices,
)

FORMS = ("gradient", "update")
LEAK_ROWS = 256  # of a matrix, evenly spaced, at which the leak is measured
MUCH = 0.5  # of the energy outside: nobody would call that confined
BY_ROUNDING = 1e-3  # of the energy outside: what weights in 16 bits can come to
ROUNDING = torch.finfo(torch.float32).eps  # of a matrix's norm: no movement
# Steps that do not keep the row space of a gradient, by words in the optimizer's name.
UNDOING = ("muon", "lion", "sign", "shampoo", "soap")
IN_BACKWARD = ("layerwise", "lomo")


class ProjectionCallback(TrainerCallback):
    """Confine training, from a step on, to the subspace of the update until then.

    At the end of the step of the lock: V_K = top-K right singular vectors of
    dW = W_t - W_0, a basis for each matrix; from then on

    - form ``gradient`` (the paper's): g <- g V V^T before every step. Adam and weight
      decay leave the subspace all the same, and an optimizer such as Muon undoes it;
    - form ``update``: W_new <- W_old + (W_new - W_old) V V^T after every step. W_t -
      W_lock stays inside, up to the rounding of the stored weights.

    Whenever the trainer logs after the lock, it logs

    - ``projection/leak``: ||D - D V V^T||_F^2 / ||D||_F^2, D = W_t - W_lock of the
      weights that would be saved, a mean over matrices; ``projection/leak_max``;
    - ``projection/confined``, ``projection/free``, ``projection/not_covered``: shares
      of the trained parameters: with a basis, without one because they moved in fewer
      than K directions, and such as norms, biases and other roles.

    One warning at the lock names what is free. Gradients are projected once a step,
    accumulated and clipped. A fused qkv_proj or gate_up_proj has one basis for all its
    rows, a stack of experts one for each expert, GPT-2's Conv1D one of its inputs.
    Adapters (LoRA), optimizers that step within backward or keep another copy of the
    weights, and weights spread over processes are refused at the start.

    Args:
        trainer: whose model and optimizer; add the callback to the same trainer.
        lock_at: the step (int), or share of training (float in (0, 1)). A resumed
            training keeps the step of its first start.
        k: K of the subspaces, cut to a matrix's smaller side.
        form: ``gradient`` or ``update``.
        roles: which matrices, by the roles that `checkpoints` gives them; None for
            every weight that is a matrix or a stack of experts.
        w_before: checkpoint of the start; None for the model's weights now. After the
            lock it is not needed any more.

    Attributes:
        bases: parameter's name to V (n_cols, K), of a stack (n, n_cols, K), float32;
            empty before the lock. A matrix that moved in fewer than K directions is
            left free, in a stack with a basis of zeros.

    Raises:
        ValueError: as `GeometryCallback`; at the start: what cannot be confined; at the
            lock: no matrix that has moved, or weights that are not finite.

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
        check_count("k", k)
        check_moment(lock_at)
        if form not in FORMS:
            raise ValueError(f"form {form!r}, expected {' or '.join(FORMS)}")
        self.trainer, self.lock_at, self.k, self.form = trainer, lock_at, k, form
        self.roles, self.warn = roles, Once(trainer)
        _refuse_adapters(inner_model(trainer.model), roles)
        self.names: list[str] = []
        self.turned: set[str] = set()
        self.origin = Origin(trainer, self._slices, w_before)
        self.checkpoints = Checkpoints(
            self, trainer, "projection", self._content, self._finish
        )
        self.bases: dict[str, Tensor] = {}
        self.locked_rows: dict[str, Tensor] = {}
        self.kept_locks: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self.handle: ProjectionHandle | None = None
        self.lock_step: int | None = None  # known once training begins

    @property
    def _tensors(self) -> dict[str, Tensor]:
        """The model's parameters by name."""
        return dict(inner_model(self.trainer.model).named_parameters())

    def _slices(self, model: nn.Module) -> Matrices:
        """What is confined, slice by slice, and the names of the parameters."""
        self.names = confinable(model, self.roles)
        self.turned = orientation(model)
        tensors, turned = dict(model.named_parameters()), self.turned
        return {
            key: (_matrix(key, piece), piece)
            for name in self.names
            for key, piece in _pieces(name, tensors[name], name in turned)
        }

    def on_train_begin(
        self, args: Arguments, state: State, control: Control, **kwargs: Any
    ) -> None:
        """Refuse what cannot work; a resumed training goes on as it was."""
        self.release()
        optimizer = kwargs["optimizer"]
        if state.global_step == 0:
            if self.origin.begin() == "again":
                self.warn("again", "trained once more: W_0 are the weights of now")
            self.lock_step = step_of(self.lock_at, state.max_steps)
        self._refuse(optimizer)
        if state.global_step > 0:
            self._resume(args, state, optimizer)

    def _refuse(self, optimizer: Any) -> None:
        """Refuse a model or an optimizer that cannot be confined.

        Raises:
            ValueError: one line with what, and what to do.
        """
        inner = getattr(optimizer, "optimizer", optimizer)
        name = type(inner).__name__
        if any(word in name.lower() for word in IN_BACKWARD):
            raise ValueError(
                f"{name} steps layer by layer within backward, where no projection "
                "reaches it; expected an optimizer with a step of its own, as AdamW has"
            )
        if all(callable(getattr(inner, mode, None)) for mode in ("train", "eval")):
            raise ValueError(
                f"{name} keeps a second copy of the weights and saves that one, which "
                "would leave the subspace; expected an optimizer without train and "
                "eval modes, such as AdamW"
            )
        tensors = self._tensors
        owned = {id(p) for group in inner.param_groups for p in group["params"]}
        for name_ in self.names:
            _refuse_parameter(name_, tensors.get(name_), owned, name)
        self._refuse_other_shapes(tensors)
        if self.form == "gradient" and any(w in name.lower() for w in UNDOING):
            self.warn(
                "optimizer",
                f"{name} makes its steps from the signs or directions of a gradient, "
                'which undoes form="gradient": most of the update will leave the '
                'subspace; give form="update"',
            )
        elif self.form == "gradient" and hasattr(inner, "optimizer"):
            self.warn(
                "optimizer",
                f"{name} moves the weights after the step of the optimizer within it, "
                'which form="gradient" does not reach; give form="update"',
            )

    def _refuse_other_shapes(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse a model that was changed after the callback was made."""
        for name in self.names:
            for key, piece in _pieces(name, tensors[name], name in self.turned):
                if self.origin.shapes.get(key) != tuple(piece.shape):
                    raise ValueError(
                        f"{key} has shape {tuple(piece.shape)} and had "
                        f"{self.origin.shapes.get(key)} when the callback was made; "
                        "make it after tokens are added or layers changed"
                    )

    def _resume(self, args: Arguments, state: State, optimizer: Any) -> None:
        """Go on with the stored lock; before it W_0 has to be the same."""
        place = self.checkpoints.place(args, state)
        asked = step_of(self.lock_at, max(state.max_steps, state.global_step))
        assert asked is not None
        try:
            kept, said = self.checkpoints.read(place)
        except FileNotFoundError as error:
            if asked <= state.global_step:
                raise ValueError(
                    f"resumed at step {state.global_step}, after the lock, but {place} "
                    "with the locked subspaces is missing; resume from a checkpoint "
                    "saved with this callback"
                ) from error
            self.lock_step = asked
            return
        self.lock_step = int(said.get("lock_step") or asked)
        if self.lock_step != asked:
            self.warn(
                "lock",
                f"the lock stays at step {self.lock_step} of the first start, where "
                f"lock_at = {self.lock_at} would now mean step {asked}",
            )
        if self.lock_step > state.global_step:
            self.origin.recall(kept.get("start", {}), said["w_before"])
            step_of(self.lock_step, state.max_steps)
            return
        if not kept.get("locked"):
            raise ValueError(
                f"{place} holds no locked subspaces, though step {state.global_step} "
                "is after the lock; give the lock_at of the first start"
            )
        self._compare(kept["locked"], place)
        self.bases, self.locked_rows = kept["locked"], kept.get("rows", {})
        self.kept_locks = (kept.get("w_lock", {}), kept.get("coefficients", {}))
        self._confine(optimizer)
        self.origin.forget()

    def _compare(self, bases: dict[str, Tensor], place: Path) -> None:
        """Hold stored subspaces against the model and what is asked for now."""
        tensors = self._tensors
        for name, v in bases.items():
            here = tensors.get(name)
            side = -2 if name in self.turned else -1
            if here is None or here.ndim != v.ndim or here.shape[side] != v.shape[-2]:
                has = "no such weight" if here is None else tuple(here.shape)
                raise ValueError(
                    f"{place} holds {tuple(v.shape)} for {name}, where the model has "
                    f"{has}; resume the model that was locked"
                )
        other = [n for n in bases if n not in self.names]
        ks = {v.shape[-1] for v in bases.values() if v.shape[-1] < v.shape[-2]}
        if other or any(k != self.k for k in ks):
            self.warn(
                "resumed",
                f"the subspaces of the first start stay: {len(bases)} parameters, "
                f"K = {max(ks, default=self.k)}, where other roles or k = {self.k} "
                "are given now",
            )

    def on_step_end(
        self, args: Arguments, state: State, control: Control, **kwargs: Any
    ) -> None:
        """Lock when it is time; say afterwards how tight it is."""
        if self.lock_step is None or state.global_step < self.lock_step:
            return
        if not self.bases:
            self._lock(state, kwargs["optimizer"])
        last = state.global_step == state.max_steps or control.should_training_stop
        if self.handle is not None and (control.should_log or last):
            self._log(control)
        elif self.handle is not None and state.global_step == self.lock_step + 1:
            leak = _mean(self.leaks())  # whoever logs seldom hears of it as soon
            if leak > MUCH:
                self._judge(leak)

    def _lock(self, state: State, optimizer: Any) -> None:
        """Take the subspaces of the update so far, the same in all processes."""
        model = inner_model(self.trainer.model)
        # One basis for all processes, whose own may differ in the last digit.
        self.bases = for_all(self.trainer, lambda: self._moved(model))
        if not self.bases:
            raise ValueError(
                f"no matrix has moved in {self.k} directions by step {self.lock_step}, "
                "expected one at least; lock later or lower k"
            )
        tensors = dict(model.named_parameters())
        _refuse_copies(optimizer, {n: tensors[n] for n in self.bases})
        self.locked_rows = {n: _rows(tensors[n], n in self.turned) for n in self.bases}
        self.kept_locks = ({}, {})
        self._confine(optimizer)
        self.origin.forget()
        self._tell(state, model)

    def _moved(self, model: nn.Module) -> dict[str, Tensor]:
        """Parameter to the basis of its movement, where there is one."""
        assert self.origin.start is not None
        start, found = self.origin.start.weights, {}
        tensors, turned = dict(model.named_parameters()), self.turned
        for name in self.names:
            slices = []
            for key, piece in _pieces(name, tensors[name], name in turned):
                k = min(self.k, *piece.shape)
                norm, right = directions(start[key], piece.detach(), k)
                if not norm < float("inf"):
                    raise ValueError(
                        f"{name} holds NaN or inf at the lock, step {self.lock_step}: "
                        "expected finite weights; lower the learning rate"
                    )
                none = torch.zeros(piece.shape[1], k)
                slices.append(none if right is None else right)
            stacked = torch.stack(slices) if tensors[name].ndim == 3 else slices[0]
            if stacked.any():
                found[name] = stacked
        return found

    def _tell(self, state: State, model: nn.Module) -> None:
        """One warning at the lock that names what is free."""
        shares, free, bare = self._coverage(model)
        parts = [f"{shares['confined']:.0%} of the trained parameters are confined"]
        if free:
            parts.append(
                f"{shares['free']:.0%} are free, having moved in fewer than {self.k} "
                f"directions: {some(free)}"
            )
        if bare:
            parts.append(
                f"{shares['not_covered']:.1%} are not covered (norms, biases, other "
                f"roles): {some(bare)}"
            )
        now, before = trained(model), set(self.names)
        frozen = [name for name in self.names if name not in now]
        if frozen:
            parts.append(f"frozen since the start: {some(frozen)}")
        later = [name for name in frozen if name not in self.bases]
        if later:
            parts.append(f"of these free, should they be trained again: {some(later)}")
        new = [n for n in confinable(model, self.roles) if n not in before]
        if new:
            parts.append(f"trained only since then, hence free: {some(new)}")
        if len(parts) > 1:
            self.warn("free", f"locked at step {state.global_step}: {'; '.join(parts)}")

    def _coverage(
        self, model: nn.Module
    ) -> tuple[dict[str, float], list[str], list[str]]:
        """Shares of the trained parameters, and names of the free and the uncovered."""
        counts = {"confined": 0.0, "free": 0.0, "not_covered": 0.0}
        free, bare = [], []
        for name, p in trained(model).items():
            inside = 0.0
            if name in self.bases:
                v = self.bases[name]
                inside = float(v.flatten(1).any(1).float().mean()) if v.ndim == 3 else 1
            if name not in self.bases and name not in self.names:
                counts["not_covered"] += p.numel()
                bare.append(name)
                continue
            counts["confined"] += inside * p.numel()
            counts["free"] += (1 - inside) * p.numel()
            if inside < 1:
                free.append(name)
        total = sum(counts.values()) or 1.0
        return {key: n / total for key, n in counts.items()}, free, bare

    def leaks(self) -> dict[str, float]:
        """Share of W_t - W_lock outside the subspace, parameter by parameter.

        Measured at ``LEAK_ROWS`` rows of every matrix; what has not moved, or no
        farther than float32 rounds, has none.
        """
        tensors, found = self._tensors, {}
        for name, lock in self.locked_rows.items():
            v = self.bases[name]
            now = _rows(tensors[name], name in self.turned)
            delta = now.double() - lock.to(now.device).double()
            if v.ndim == 3:
                kept = v.flatten(1).any(1)
                delta, v = delta[kept.to(delta.device)], v[kept]
            if not torch.isfinite(delta).all():
                found[name] = float("nan")
            elif delta.norm() > ROUNDING * lock.double().norm():
                found[name] = leaked_energy(delta, v)
        return found

    def _log(self, control: Control) -> None:
        leaks = self.leaks()
        values = dict(self._coverage(inner_model(self.trainer.model))[0])
        if leaks:
            values["leak"] = _mean(leaks)
            values["leak_max"] = max(leaks.values())
            self._judge(values["leak"])
        wanted = control.should_log
        if self.trainer.args.process_index == 0:
            Trainer.log(
                self.trainer, {f"projection/{n}": value for n, value in values.items()}
            )
        control.should_log = wanted  # a log marks the step as logged

    def _judge(self, leak: float) -> None:
        """Say so where the confinement is hardly there."""
        tensors = self._tensors
        short = any(tensors[name].dtype.itemsize < 4 for name in self.bases)
        if self.form == "gradient" and leak > MUCH:
            self.warn(
                "leak",
                f"{leak:.0%} of the update since the lock lies outside the subspace: "
                f'form="gradient" does not hold here; give form="update"',
            )
        elif self.form == "update" and leak > BY_ROUNDING:
            cause = (
                "by the rounding of weights in 16 bits; to confine them exactly train "
                "float32 weights (dtype=torch.float32, bf16=True)"
                if short
                else "written by something other than the optimizer's step; expected "
                "no other callback or hook that changes weights"
            )
            self.warn(
                "leak",
                f"{leak:.1%} of the update since the lock lies outside the subspace, "
                + cause,
            )

    def _content(self) -> Content:
        """What a checkpoint has to remember."""
        groups = {
            "locked": self.bases,
            "rows": self.locked_rows,
            "start": {} if self.bases else self.origin.outside_blocks(),
        }
        if self.handle is not None and self.handle.locks:
            tensors = self._tensors
            locks = {n: self.handle.locks.get(tensors[n]) for n in self.bases}
            held = {name: lock for name, lock in locks.items() if lock is not None}
            groups["w_lock"] = {name: w_lock for name, (w_lock, _) in held.items()}
            groups["coefficients"] = {name: c for name, (_, c) in held.items()}
        said = {"w_before": self.origin.fingerprint, "lock_step": self.lock_step}
        return groups, said

    def on_train_end(
        self, args: Arguments, state: State, control: Control, **kwargs: Any
    ) -> None:
        """Take the projection off the optimizer; the bases stay to be looked at."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def _finish(self) -> None:
        """Say so where what is there at the end is not what was confined."""
        state, args = self.trainer.state, self.trainer.args
        best = state.best_global_step if args.load_best_model_at_end else None
        if self.lock_step is None:
            return
        if not self.bases:
            self.warn(
                "end",
                f"training ended at step {state.global_step}, before the lock at step "
                f"{self.lock_step}: nothing was confined",
            )
        elif best is not None and best < self.lock_step:
            self.warn(
                "end",
                f"the best checkpoint, which was loaded at the end, is of step {best}, "
                f"before the lock at step {self.lock_step}: it was not confined",
            )
        else:
            self._judge(_mean(self.leaks()))

    def release(self) -> None:
        """Let the optimizer step freely again, and forget the bases."""
        if self.handle is not None:
            self.handle.remove()
        self.handle, self.bases, self.locked_rows = None, {}, {}

    def _confine(self, optimizer: Any) -> None:
        tensors = self._tensors
        bases: dict[Tensor, Tensor] = {tensors[n]: v for n, v in self.bases.items()}
        turned = [tensors[n] for n in self.bases if n in self.turned]
        if self.form == "gradient":
            self.handle = project_gradients(optimizer, bases, turned)
            return
        w_lock, coefficients = self.kept_locks
        locks = {tensors[n]: (w_lock[n], coefficients[n]) for n in w_lock}
        self.handle = project_updates(optimizer, bases, turned, locks)


# --- parameters ----------------------------------------------------------------------


def confinable(model: nn.Module, roles: Collection[str] | None) -> list[str]:
    """Names of the trained matrices and stacks of experts with such a role."""
    found = watched_matrices(model, roles)
    storages = {tensor.untyped_storage().data_ptr() for _, tensor in found.values()}
    return [
        name
        for name, p in trained(model).items()
        if p.ndim in (2, 3) and p.untyped_storage().data_ptr() in storages
    ]


def orientation(model: nn.Module) -> set[str]:
    """Names of the parameters that are stored with inputs as rows."""
    turned = stored_turned(model)
    stacks = {n: p for n, p in model.named_parameters() if p.ndim == 3}
    if stacks:
        views = {
            tensor.untyped_storage().data_ptr(): tensor
            for _, tensor in watched_matrices(
                model, None, names=[name for name, _ in model.named_parameters()]
            ).values()
        }
        for name, p in stacks.items():
            view = views.get(p.untyped_storage().data_ptr())
            if view is not None and view.stride(-1) != 1:
                turned.add(name)
    return turned


def _pieces(name: str, p: Tensor, is_turned: bool) -> list[tuple[str, Tensor]]:
    """A parameter's matrices, outputs as rows: itself, or the slices of a stack."""
    whole = p.mT if is_turned else p
    if p.ndim == 2:
        return [(name, whole)]
    return [(f"{name}[{i}]", piece) for i, piece in enumerate(whole)]


def _mean(leaks: dict[str, float]) -> float:
    """Over matrices; 0 where none has moved."""
    return sum(leaks.values()) / max(1, len(leaks))


def _matrix(key: str, piece: Tensor) -> Matrix:
    layer = next((int(part) for part in key.split(".") if part.isdecimal()), -1)
    shape = (int(piece.shape[0]), int(piece.shape[1]))
    return Matrix(key, "other", layer, shape, str(piece.dtype))


def _rows(p: Tensor, is_turned: bool) -> Tensor:
    """A copy of at most ``LEAK_ROWS`` evenly spaced rows of each matrix."""
    whole = (p.mT if is_turned else p).detach()
    n = whole.shape[-2]
    chosen = torch.linspace(0, n - 1, min(n, LEAK_ROWS)).round().long()
    return whole.index_select(-2, chosen.to(p.device)).clone()


# --- refused -------------------------------------------------------------------------


def _refuse_adapters(model: nn.Module, roles: Collection[str] | None) -> None:
    """Refuse a model whose parameters are not its weights."""
    named = adapters(model)
    if named or hasattr(model, "peft_config"):
        raise ValueError(
            f"adapters are trained ({some(named, 1) or 'by peft'}): A and B confined "
            "apart would not confine B A; merge them (merge_and_unload) and train "
            "whole weights"
        )
    named = reparametrised(model)
    if named and roles is None:
        raise ValueError(
            f"weights are computed from {some(named, 1)} (weight norm, rotation, "
            "mask): confined parameters would not confine them; remove the "
            "parametrization, or name other matrices with roles="
        )


def _refuse_parameter(
    name: str, p: Tensor | None, owned: Collection[int], optimizer: str
) -> None:
    """Refuse a parameter that is not whole, or not the optimizer's."""
    if p is None:
        raise ValueError(
            f"the model has no parameter {name} any more, which was to be confined; "
            "add the callback to the trainer that has the model"
        )
    if p.ndim < 2 or not is_whole(p):  # FSDP 1 leaves flat views
        raise ValueError(
            f"{name} is {SPREAD}, expected whole weights; train with DDP or on one "
            "device"
        )
    if p.requires_grad and id(p) not in owned:
        raise ValueError(
            f"{name} is not stepped by the trainer's optimizer {optimizer}, expected "
            "all that is confined; leave its role out with roles=, or give the "
            "optimizer all weights"
        )


def _refuse_copies(optimizer: Any, tensors: dict[str, Tensor]) -> None:
    """Refuse an optimizer whose state has the weights once more."""
    inner = getattr(optimizer, "optimizer", optimizer)
    for name, p in tensors.items():
        for key, kept in inner.state.get(p, {}).items():
            same = isinstance(kept, Tensor) and kept.shape == p.shape
            if same and p.any() and torch.equal(kept.to(p.dtype), p):
                raise ValueError(
                    f"{type(inner).__name__} keeps {name} once more, as {key!r}, and "
                    "would step from there, outside the subspace; expected one that "
                    "steps the weights themselves, such as AdamW"
                )


# --- options -------------------------------------------------------------------------


def check_count(name: str, value: Any) -> None:
    """Refuse what is no integer from 1 on."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} = {value!r}, expected an integer, 1 or larger")


def check_moment(lock_at: Any) -> None:
    """Refuse what is neither a step nor a share of training."""
    step = type(lock_at) is int and lock_at >= 1
    share = type(lock_at) is float and 0.0 < lock_at < 1.0
    if not (step or share):
        raise ValueError(
            f"lock_at = {lock_at!r}, expected a step (an integer, 1 or larger) or a "
            "share of training (a float between 0 and 1)"
        )


def step_of(lock_at: int | float | None, max_steps: int) -> int | None:
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

"""What hangs on other people's trainers: their model, their checkpoints, W_0.

Nothing of the trainer is assumed beyond what it documents: its model, ``train``,
``save_model``, the events of a callback.
"""

import json
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, extract_model_from_parallel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import get_last_checkpoint

from opd_geometry.geometry.checkpoints import Matrix
from opd_geometry.geometry.live import Start, watched

Matrices = dict[str, tuple[Matrix, Tensor]]
# Of a callback's file: tensors by group and name, and what is said of them.
Content = tuple[dict[str, dict[str, Tensor]], dict[str, Any]]


# --- the model -----------------------------------------------------------------------


def inner_model(model: Any) -> nn.Module:
    """The model inside what accelerate or torch.compile wrapped around it."""
    inner: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters by name; a tied one once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adapters(model: nn.Module) -> list[str]:
    """Trained parameters of adapters, which are no weights of the model themselves."""
    by_peft = hasattr(model, "peft_config")
    return [
        name
        for name in trained(model)
        if (by_peft and ".modules_to_save." not in name)
        or "lora_" in name
        or ".adapter" in name
    ]


def reparametrised(model: nn.Module) -> list[str]:
    """Trained parameters that weights are computed from: norms, rotations, masks."""
    return [
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        for own, p in module.named_parameters(recurse=False)
        if p.requires_grad
        and (f".{name}".rpartition(".parametrizations")[1] or _computes(module, own))
    ]


def _computes(module: nn.Module, own: str) -> bool:
    """Whether another attribute is made of this parameter before every forward."""
    base, _, kind = own.rpartition("_")
    whole = getattr(module, base, None) if kind in ("orig", "g", "v") else None
    return isinstance(whole, Tensor) and not isinstance(whole, nn.Parameter)


def stored_turned(model: nn.Module) -> set[str]:
    """Names of the weights that are stored as (in, out): those of GPT-2's Conv1D."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, Conv1D)
    }


def watched_matrices(
    model: nn.Module,
    roles: Collection[str] | None,
    max_layers: int | None = None,
    names: Collection[str] | None = None,
) -> Matrices:
    """The matrices of a model to look at, outputs as rows.

    Args:
        model: as of `inner_model`.
        roles, max_layers: as of `watched`.
        names: only what lies in these parameters; None for all that are trained now.
            Adapters, and what weights are computed from, are left out.

    Raises:
        ValueError: as `watched`.
    """
    tensors = dict(model.named_parameters())
    if names is None:
        names = trained(model).keys()
    config: Any = getattr(model, "config", None)
    content = config.to_dict() if hasattr(config, "to_dict") else {}
    others = {*adapters(model), *reparametrised(model)}
    chosen = {n: tensors[n] for n in names if n not in others}
    found = watched(chosen, content, roles, max_layers)
    turned = stored_turned(model)
    return {
        name: _turned(matrix, tensor) if name in turned else (matrix, tensor)
        for name, (matrix, tensor) in found.items()
    }


def _turned(matrix: Matrix, tensor: Tensor) -> tuple[Matrix, Tensor]:
    if tensor.stride(-1) != 1:  # it is turned already
        return matrix, tensor
    n_in, n_out = tensor.shape
    whole = Matrix(matrix.name, matrix.role, matrix.layer, (n_out, n_in), matrix.dtype)
    return whole, tensor.T


def origin_model(model: nn.Module, source: str | Path) -> nn.Module:
    """The model as a checkpoint has it, under the names that it has in memory.

    Args:
        model: of the class and in the dtype that are wanted.
        source: a checkpoint of transformers.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: it lacks weights of the model.
    """
    if not Path(source).exists():
        raise FileNotFoundError(
            f"{source} does not exist, expected the checkpoint that training began with"
        )
    dtype = next(iter(model.parameters())).dtype
    loader: Any = type(model)
    try:
        loaded, said = loader.from_pretrained(
            source, dtype=dtype, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{source} cannot be read ({' '.join(str(error).split())[:200]}), expected "
            "the checkpoint that training began with"
        ) from error
    lacking = sorted([*said["missing_keys"], *(m[0] for m in said["mismatched_keys"])])
    if lacking:
        raise ValueError(
            f"{source} has no {lacking[0]} that fits the model, expected the "
            "checkpoint that training began with"
        )
    kept = trained(model)
    for name, p in loaded.named_parameters():
        p.requires_grad_(name in kept)
    return inner_model(loaded)


# --- what is said --------------------------------------------------------------------


class Once:
    """Warnings that are given once each, by the first process.

    Args:
        trainer: one of whose processes this is.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.said: set[str] = set()

    def __call__(self, subject: str, line: str) -> None:
        """Warn, unless something was said of this subject."""
        first = self.trainer.args.process_index == 0
        if first and subject not in self.said:
            self.said.add(subject)
            warnings.warn(line, stacklevel=3)


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few names, and how many more there are.

    >>> some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    names = list(names)
    rest = len(names) - most
    shown = ", ".join(names[:most])
    return f"{shown} and {rest} more" if rest > 0 else shown


# --- checkpoints ---------------------------------------------------------------------


class Checkpoints:
    """Where a trainer saves to and resumes from, and files of ours in there.

    A file is written as soon as the weights are, before any upload starts, and read
    from the checkpoint that is resumed, wherever it lies.

    Args:
        owner: the callback; the second of its kind on a trainer has a file of its own.
        trainer: whose.
        kind: of the callback; part of the file's name.
        content: tensors to store now, and what to say of them.
        finish: called when a training is over, whatever is loaded at its end.
        guarded: runs what must not end a training.

    Attributes:
        null: what was read of groups that begin so, in the first process alone.
    """

    def __init__(
        self,
        owner: TrainerCallback,
        trainer: Trainer,
        kind: str,
        content: Callable[[], Content],
        finish: Callable[[], None] = lambda: None,
        guarded: Callable[[Callable[[], Any]], Any] = lambda work: work(),
    ) -> None:
        self.owner, self.trainer, self.kind = owner, trainer, kind
        self.content = content
        self.null: dict[str, dict[str, Tensor]] = {}
        self.resumed: Path | None = None
        save, train = trainer.save_model, trainer.train

        def save_model(*arguments: Any, **named: Any) -> None:
            save(*arguments, **named)
            folder = arguments[0] if arguments else named.get("output_dir")
            if named.get("_internal_call") and folder is not None:
                guarded(lambda: self.write(Path(folder)))

        def train_from(
            resume_from_checkpoint: Any = None, *arguments: Any, **named: Any
        ) -> Any:
            self.resumed = _checkpoint(resume_from_checkpoint, trainer.args)
            output = train(resume_from_checkpoint, *arguments, **named)
            finish()
            return output

        patched: Any = trainer
        patched.save_model, patched.train = save_model, train_from

    @property
    def name(self) -> str:
        """Of the file. Not .safetensors: engines read every such file as weights."""
        return f"opd_geometry_{self.kind}{self._number or ''}.state"

    @property
    def _number(self) -> int:
        """How many of its kind were added to the trainer before."""
        added = self.trainer.callback_handler.callbacks
        alike = [other for other in added if type(other) is type(self.owner)]
        return alike.index(self.owner) if self.owner in alike else 0

    def write(self, folder: Path) -> None:
        """Store the file in a checkpoint; only the first process does."""
        there = self.owner in self.trainer.callback_handler.callbacks
        if not self.trainer.args.should_save or not folder.is_dir() or not there:
            return
        groups, said = self.content()
        draft = folder / f".{self.name}"
        owned = {
            f"{group}/{name}": tensor.clone().contiguous()
            for group, named in groups.items()
            for name, tensor in named.items()
        }
        save_file(owned, draft, {name: json.dumps(v) for name, v in said.items()})
        os.replace(draft, folder / self.name)

    def place(self, args: TrainingArguments, state: TrainerState) -> Path:
        """The file of the checkpoint that is resumed."""
        usual = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        place = (self.resumed or usual) / self.name
        earlier = place.with_name(f"opd_geometry_{self.kind}.safetensors")
        return earlier if earlier.is_file() and not place.is_file() else place

    def read(self, place: Path) -> Content:
        """What was stored, by group and name, and what was said of it.

        The first process reads for all.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged.
        """

        def read() -> Any:
            groups, said = _read(place)
            large = [name for name in groups if name.startswith("null ")]
            self.null = {name: groups.pop(name) for name in large}
            return groups, said

        self.null = {}
        return for_all(self.trainer, read)


def _checkpoint(asked: Any, args: TrainingArguments) -> Path | None:
    if asked is True:
        asked = get_last_checkpoint(args.output_dir) if args.output_dir else None
    return Path(asked) if asked else None


def for_all(trainer: Trainer, work: Callable[[], Any]) -> Any:
    """What the first process finds out, in all processes; its errors, too."""
    outcome: list[Any] = [None, None]
    if trainer.args.process_index == 0:
        try:
            outcome[0] = work()
        except Exception as error:  # raised in every process below, or all would wait
            outcome[1] = error
    if trainer.args.world_size > 1:
        outcome = broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _read(place: Path) -> Content:
    if not place.is_file():
        raise FileNotFoundError(f"{place} is missing")
    groups: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(str(place), framework="pt") as stored:
            said = {k: json.loads(v) for k, v in stored.metadata().items()}
            if "w_before" not in said:
                raise ValueError("it does not say what it was stored for")
            for key in stored.keys():  # noqa: SIM118, this is no dictionary
                group, _, name = key.partition("/")
                groups.setdefault(group, {})[name] = stored.get_tensor(key)
    except (SafetensorError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{place} is damaged, expected what this callback stored; resume from an "
            "earlier checkpoint"
        ) from error
    return groups, said


# --- W_0 -----------------------------------------------------------------------------


class Origin:
    """W_0, the weights that training began with, and of which model.

    Under several processes only the first keeps it.

    Args:
        trainer: whose model.
        matrices: of a model, those that are looked at.
        source: checkpoint of the start; None for the weights now.
        device: that keeps it.
    """

    def __init__(
        self,
        trainer: Trainer,
        matrices: Callable[[nn.Module], Matrices],
        source: str | Path | None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.trainer, self.matrices = trainer, matrices
        self.source, self.device = source, device
        self.take()

    def take(self) -> None:
        """Take W_0 from the source, or else from the trainer's model as it is now."""
        self.model = model = inner_model(self.trainer.model)
        here = self.matrices(model)  # also refuses a model that has none
        self.shapes = {name: m.shape for name, (m, _) in here.items()}
        self.layers = {name: m.layer for name, (m, _) in here.items()}
        self.forgotten = False
        self.start: Start | None = None
        self._fingerprint: dict[str, list[float]] | None = None
        if self.trainer.args.process_index != 0:
            return
        source = self.source
        if source is not None and hasattr(model, "from_pretrained"):
            here, source = self.matrices(origin_model(model, source)), None
        self.start = Start(here, source, self.device)

    @property
    def fingerprint(self) -> dict[str, list[float]]:
        """By what to recognise W_0, computed once; empty where it is not kept."""
        if self._fingerprint is None:
            self._fingerprint = self.start.fingerprint() if self.start else {}
        return self._fingerprint

    def begin(self) -> str:
        """At the start of a training: take W_0 anew where need be; why, if so.

        A new model object has a W_0 of its own; one that is trained once more, after
        W_0 was given up, has the weights that it has now.
        """
        forgotten = self.forgotten
        new = inner_model(self.trainer.model) is not self.model
        if (self.source is None and new) or forgotten:
            self.take()
        return "new" if new else "again" * forgotten

    def outside_blocks(self) -> dict[str, Tensor]:
        """W_0 of what may have been drawn at random: heads, tokens that were added."""
        if self.start is None:
            return {}
        weights, layers = self.start.weights, self.layers
        return {name: w for name, w in weights.items() if layers.get(name, -1) < 0}

    def recall(
        self, stored: Mapping[str, Tensor], fingerprint: Mapping[str, Iterable[float]]
    ) -> None:
        """At a resumed training: take what was stored, and refuse another W_0.

        Raises:
            ValueError: another W_0.
        """
        if self.start is None:
            return
        for name, w in stored.items():
            if name in self.start.weights:
                self.start.weights[name] = w.to(self.device)
        self._fingerprint = None
        hint = "give w_before=, the checkpoint that training began with"
        self.start.check(fingerprint, hint)

    def forget(self) -> None:
        """Free the memory."""
        self.start, self._fingerprint, self.forgotten = None, {}, True

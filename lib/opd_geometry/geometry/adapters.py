"""LoRA adapters as PEFT saves them, merged into their base a matrix at a time.

W' = W + s B A, with s = alpha / r, or alpha / sqrt(r) if rank-stabilised; DoRA then
scales each row to its magnitude. What is stored of W' is rounded as PEFT rounds it when
it merges. The update s B A itself is known better than that: as two thin factors.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_geometry.geometry import layouts
from opd_geometry.geometry.directories import ADAPTER_CONFIG, json_object
from opd_geometry.geometry.layouts import WHOLE, Cut, Matrix
from opd_geometry.geometry.matching import normal_form
from opd_geometry.geometry.storage import FLOAT_DTYPES, Stored, header
from opd_geometry.geometry.training_formats import pickled

LARGEST_ALPHA = 1e30  # far beyond any use; NaN and infinity are not below it
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+?)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector)(\.(?!weight$)(?P<adapter>[^.]+))?(\.weight)?"
)
# How other libraries name the two matrices, whose scaling is said elsewhere.
_FOREIGN = re.compile(r".+\.(lora_[ab]|lora_(up|down)(\.weight)?)")
# Ways of PEFT to begin that take a part out of the base weights, which is not saved.
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What makes an update another one than s B A.
OTHERWISE = (
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "layer_replication",
    "alora_invocation_tokens",
)


@dataclass(frozen=True)
class Factors:
    """The update of one module, as it is stored.

    Attributes:
        a, b: places of A (r, in) and B (out, r); of a stack of experts (r E, in) and
            (out, r E).
        scaling: s.
        magnitude: place of DoRA's magnitudes, None without.
        embedding: whether the module stores (in, out), as embeddings do.
        experts: E, 0 for one matrix.
        expert: of them, which.
        parameter: whether it is of a bare parameter (target_parameters).
    """

    a: Stored
    b: Stored
    scaling: float
    magnitude: Stored | None = None
    embedding: bool = False
    experts: int = 0
    expert: int = 0
    parameter: bool = False

    def read(self) -> tuple[Tensor, Tensor]:
        """(B, A) of the matrix (out, in), as stored and without the scaling."""
        a, b = self.a.place[WHOLE], self.b.place[WHOLE]
        if self.experts:
            a = a.reshape(self.experts, -1, a.shape[-1])[self.expert]
            b = b.reshape(b.shape[0], -1, self.experts)[:, :, self.expert]
        return (a.T, b.T) if self.embedding else (b, a)

    def product(self, b: Tensor, a: Tensor) -> Tensor:
        """B A, of an embedding in the order of PEFT, to the last bit."""
        return (a.T @ b.T).T if self.embedding else b @ a

    @property
    def rounds_first(self) -> bool:
        """Whether PEFT rounds the update to the weights' dtype before it adds it.

        So it does with embeddings and with bare parameters, and not with others.
        """
        return self.parameter or (self.embedding and self.magnitude is None)


@dataclass(frozen=True)
class AdaptedCut(Cut):
    """A matrix with an adapter merged into it.

    Attributes:
        base: the matrix without; None where only the update is known.
        factors: of the update.
        of_rows: which outputs of the module this matrix has, in each of its groups.
    """

    base: Cut | None = None
    factors: Factors | None = None
    of_rows: slice = field(default_factory=lambda: WHOLE)

    def read(self) -> Tensor:
        """The merged matrix, rounded as PEFT rounds it; without a base the update."""
        assert self.factors is not None
        b, a = self.factors.read()
        delta = self.factors.product(b.float(), a.float()) * self.factors.scaling
        if self.base is None:
            return self._rows(delta).contiguous()
        w = self.base.read()
        if self.factors.rounds_first:
            return w.add_(self._rows(delta).to(w.dtype))
        if self.factors.magnitude is None:
            return w.add_(self._rows(delta))
        if self.factors.embedding:
            return self._scaled_columns(w, delta)
        magnitude = self._rows(self.factors.magnitude.place[WHOLE].float()[:, None])
        merged = w + self._rows(delta)
        norms = torch.linalg.norm(merged, dim=1).to(merged.dtype)
        return ((magnitude[:, 0] / norms)[:, None] * merged).to(w.dtype)

    def _scaled_columns(self, w: Tensor, delta: Tensor) -> Tensor:
        """DoRA of an embedding: each column of the whole has its magnitude."""
        assert self.base is not None
        assert self.factors is not None
        assert self.factors.magnitude is not None
        whole = replace(self.base, rows=WHOLE).read()
        norms = torch.linalg.norm(whole.T + delta.T, dim=1)
        factor = self.factors.magnitude.place[WHOLE].float() / norms
        merged: Tensor = (factor[None] * (w + self._rows(delta))).to(w.dtype)
        return merged

    def update(self) -> tuple[Tensor, Tensor] | None:
        """s B A as (left, right) in float64; None where it is of full rank (DoRA)."""
        if self.factors is None or self.factors.magnitude is not None:
            return None
        b, a = self.factors.read()
        left = self._rows(b.double() * self.factors.scaling)
        return left, a.double()

    def _rows(self, w: Tensor) -> Tensor:
        if self.groups > 1:
            return layouts.in_groups(w, self.of_rows, self.groups)
        return w[self.of_rows]


@dataclass(frozen=True)
class Adapter:
    """An adapter's directory.

    Attributes:
        path: of the directory.
        config: adapter_config.json.
        factors: module to its update, as far as one matrix goes.
        stacks: module to the updates of its stacks, the innermost first.
        replaced: tensors that stand in place of the base's.
    """

    path: Path
    config: dict[str, Any]
    factors: dict[str, Factors]
    stacks: dict[str, list[Factors]]
    replaced: list[Stored]

    def files(self) -> list[Path]:
        """Those that hold its factors."""
        every = [*self.factors.values(), *(f for s in self.stacks.values() for f in s)]
        return [file for factors in every for file in factors.a.place.files()]

    @property
    def base(self) -> str:
        """Path or hub id of the model it was trained on, or nothing."""
        found = self.config.get("base_model_name_or_path")
        return found if isinstance(found, str) else ""


def adapter_in(path: Path) -> Path | None:
    """The directory of an adapter, if a path is one or its weights."""
    if path.is_dir() and (path / ADAPTER_CONFIG).is_file():
        return path if any((path / name).is_file() for name in WEIGHTS) else None
    beside = path.parent / ADAPTER_CONFIG
    return path.parent if path.name in WEIGHTS and beside.is_file() else None


def read_adapter(path: Path) -> Adapter:
    """An adapter, from the headers of its files.

    Args:
        path: a directory with adapter_config.json and adapter_model.

    Raises:
        ValueError: another method than LoRA, a config or tensors that do not fit.
    """
    config = json_object(path / ADAPTER_CONFIG)
    place = next(path / name for name in WEIGHTS if (path / name).is_file())
    tensors = header(place) if place.suffix == ".safetensors" else pickled(place)
    return adapter_of(path, config, tensors)


def adapter_of(path: Path, config: dict[str, Any], tensors: list[Stored]) -> Adapter:
    """The adapter that tensors of PEFT's names make up."""
    method = config.get("peft_type", "LORA")
    if method != "LORA":
        raise ValueError(
            f"{path} is an adapter of the kind {method!r}, expected LORA; merge it "
            "with PEFT's merge_and_unload and give the merged copy"
        )
    _refuse_variants(path, config)
    modules: dict[str, dict[str, Stored]] = defaultdict(dict)
    replaced = []
    for tensor in tensors:
        name = tensor.name.removeprefix(PREFIX)
        found = _FACTOR.fullmatch(name)
        if re.fullmatch(r".+\.lora_B(\.[^.]+)?\.bias", name):
            continue  # moves biases alone
        if found:
            modules[found["module"]][found["kind"]] = tensor
        elif "lora_" in name or "trainable_tokens" in name or "ia3" in name:
            raise ValueError(
                f"{path} holds {tensor.name}, which is not known here, expected "
                "lora_A, lora_B or whole weights; merge it with PEFT's "
                "merge_and_unload and give the merged copy"
            )
        elif not name.endswith(".base_layer.weight"):
            name = re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.)", "", name)
            if ".original_module." not in name:
                replaced.append(replace(tensor, name=name))
    factors: dict[str, Factors] = {}
    stacks: dict[str, list[Factors]] = defaultdict(list)
    # Innermost first: each wrapper around a stack adds one base_layer to the path.
    for module in sorted(modules, key=lambda m: -m.count("base_layer")):
        outer = module.replace(".base_layer", "")
        named = _parameters(path, config, outer)
        level = len(stacks.get(outer, ()))
        key = named[level] if level < len(named) else ""
        update = _factors(path, config, outer, key, modules[module])
        if outer.rpartition(".")[2] == "experts":
            stacks[outer].append(update)
        else:
            factors[outer] = update
    if not factors and not stacks and not replaced:
        raise ValueError(f"{path} is an adapter without tensors, expected some")
    return Adapter(path, config, factors, dict(stacks), replaced)


def _refuse_variants(path: Path, config: dict[str, Any]) -> None:
    """Refuse what PEFT merges in another way than W + s B A.

    Raises:
        ValueError: the adapter is such.
    """
    begun = config.get("init_lora_weights")
    merge = (
        "expected the plain form; merge it with PEFT's merge_and_unload and give the "
        "merged copy"
    )
    if isinstance(begun, str) and begun.lower().startswith(MOVES_BASE):
        raise ValueError(
            f"{path} is an adapter that was begun by {begun!r}, which takes a part out "
            f"of the base weights and does not save the rest, {merge}"
        )
    if variants := [name for name in OTHERWISE if config.get(name)]:
        raise ValueError(f"{path} is an adapter with {variants[0]}, {merge}")


def refuse_foreign(path: Path, tensors: list[Stored]) -> None:
    """Refuse adapters of other libraries, whose files do not say their scaling.

    Raises:
        ValueError: there is one among the tensors.
    """
    found = [t.name for t in tensors if _FOREIGN.fullmatch(t.name)]
    if found:
        raise ValueError(
            f"{path} is an adapter in another library's form ({found[0]}), expected "
            "PEFT's; merge it there and give the merged copy (MLX: mlx_lm.fuse)"
        )


def _parameters(path: Path, config: dict[str, Any], module: str) -> list[str]:
    """Parameters of a module that are adapted themselves, in the order of wrapping."""
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise ValueError(
            f"{path / ADAPTER_CONFIG} has target_parameters = {targets!r}, expected a "
            "list of names; copy it again"
        )
    keys = [f"{module}.{target.rpartition('.')[2]}" for target in targets]
    own = {
        key
        for key, target in zip(keys, targets, strict=True)
        if f".{key}".endswith(f".{target}")
    }
    # As a module lists them: what leads in before what leads out.
    return sorted(own, key=lambda key: (key.endswith("down_proj"), key))


def _factors(
    path: Path,
    config: dict[str, Any],
    module: str,
    parameter: str,
    found: Mapping[str, Stored],
) -> Factors:
    """The update of a module, or of a parameter of it."""
    embedding = "lora_embedding_A" in found
    a = found.get("lora_embedding_A" if embedding else "lora_A")
    b = found.get("lora_embedding_B" if embedding else "lora_B")
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
        raise ValueError(
            f"{path} has no pair of matrices A and B for {module}, expected both; "
            "save the adapter again"
        )
    if not {a.dtype, b.dtype} <= {*FLOAT_DTYPES.values()}:
        raise ValueError(
            f"{path} stores {module} as {a.dtype} and {b.dtype}, expected floating "
            "point; merge it with PEFT's merge_and_unload and give the merged copy"
        )
    rank, scaling = _rank_and_scaling(path, config, parameter or module)
    stack = module.rpartition(".")[2] == "experts"
    experts = a.shape[0] // rank if stack else 0
    if a.shape[0] != b.shape[1] or a.shape[0] != rank * (experts or 1):
        raise ValueError(
            f"{path} has A of {a.shape} and B of {b.shape} for {module}, where "
            f"adapter_config.json says r = {rank}; expected one adapter's files"
        )
    magnitude = found.get("lora_magnitude_vector")
    bare = bool(parameter) or experts > 0
    return Factors(a, b, scaling, magnitude, embedding, experts, parameter=bare)


def _rank_and_scaling(
    path: Path, config: dict[str, Any], module: str
) -> tuple[int, float]:
    """R and s of a module, by the patterns of the config if one fits."""
    rank = _pattern(path, config, "rank_pattern", module, config.get("r"))
    alpha = _pattern(path, config, "alpha_pattern", module, config.get("lora_alpha"))
    whole = type(rank) is int and 0 < rank < 2**20
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not whole or not number or not abs(alpha) < LARGEST_ALPHA:
        raise ValueError(
            f"{path / ADAPTER_CONFIG} has r = {rank!r} and lora_alpha = {alpha!r} for "
            f"{module}, expected positive numbers; copy it again"
        )
    return rank, alpha / (rank**0.5 if config.get("use_rslora") is True else rank)


def _pattern(
    path: Path, config: dict[str, Any], name: str, module: str, default: Any
) -> Any:
    """The value of the first pattern that fits the end of a module's path."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise ValueError(
            f"{path / ADAPTER_CONFIG} has {name} = {patterns!r}, expected an object"
        )
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern[:500]})$", module):
                return value
        except re.error as error:
            raise ValueError(
                f"{path / ADAPTER_CONFIG} has {pattern!r} in {name}, which is no "
                f"pattern ({error}); copy it again"
            ) from error
    return default


# --- merged into a base ------------------------------------------------------------


def merged(
    cuts: Mapping[str, Cut], adapter: Adapter, replaced: Mapping[str, Cut]
) -> tuple[dict[str, Cut], list[str]]:
    """The matrices of a base with an adapter merged into them.

    Args:
        cuts: of the base, by name.
        adapter: to merge.
        replaced: matrices that the adapter holds whole.

    Returns:
        The same names; and what a reader would want to know.

    Raises:
        ValueError: a module that the base has not, or of another shape.
    """
    factors = {normal_form(f"{m}.weight"): (m, f) for m, f in adapter.factors.items()}
    stacks = {normal_form(f"{m}.x"): (m, f) for m, f in adapter.stacks.items()}
    used: set[str] = set()
    found: dict[str, Cut] = {}
    for name, cut in cuts.items():
        form = normal_form(cut.tensor.name)
        if form in factors:
            module, update = factors[form]
            used.add(module)
            found[name] = _adapted(cut, update, adapter)
            continue
        module, stack_update = _of_stack(cut, stacks, adapter)
        if stack_update is not None:
            used.add(module)
        found[name] = stack_update or cut
    notes = _tied_head(found, cuts, adapter, used)
    lacking = sorted({*adapter.factors, *adapter.stacks} - used)
    if lacking:
        raise ValueError(
            f"{adapter.path} adapts {len(lacking)} modules that the base has not, "
            f"first {lacking[0]}, expected the adapter's own base"
            + (f" ({adapter.base})" if adapter.base else "")
        )
    forms = {normal_form(name): name for name in found}
    for name, cut in replaced.items():
        known = forms.get(normal_form(name))
        place = replace(cut.matrix, name=known) if known else cut.matrix
        found[known or name] = replace(cut, matrix=place)
    return found, notes


def _tied_head(
    found: dict[str, Cut], cuts: Mapping[str, Cut], adapter: Adapter, used: set[str]
) -> list[str]:
    """An adapter of a head that is the embedding moves the embedding."""
    heads = [
        m for m in adapter.factors if m not in used and layouts.role_of([m]) == "head"
    ]
    heads += [m for m in adapter.factors if m.endswith(".lm_head") and m not in used]
    embeds = [n for n, c in cuts.items() if c.matrix.role == "embed"]
    whole = any(c.matrix.role == "head" for c in cuts.values())
    if not heads or len(embeds) != 1 or whole:
        return []
    name = embeds[0]
    found[name] = _adapted(cuts[name], adapter.factors[heads[0]], adapter)
    used.add(heads[0])
    return [f"{adapter.path}: the update of {heads[0]} is merged into {name}, its tie"]


def _adapted(cut: Cut, update: Factors, adapter: Adapter) -> Cut:
    n_out, n_in = update.b.shape[0], update.a.shape[1]
    if update.embedding:
        n_out, n_in = n_in, n_out
    stored = cut.tensor.shape[::-1] if cut.transposed else cut.tensor.shape
    if (n_out, n_in) != tuple(stored):
        raise ValueError(
            f"{adapter.path} adapts {cut.tensor.name} by {(n_out, n_in)}, where the "
            f"base has {tuple(stored)}, expected the adapter's own base"
        )
    return _over(cut, update, cut.rows)


def _over(cut: Cut, update: Factors, rows: slice) -> AdaptedCut:
    own = {"base": cut, "factors": update, "of_rows": rows}
    return AdaptedCut(**(vars(cut) | own))


_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")


def _of_stack(
    cut: Cut, stacks: Mapping[str, tuple[str, list[Factors]]], adapter: Adapter
) -> tuple[str, Cut | None]:
    """An expert's matrix with the update of the stack that holds it, fused or not."""
    parts = _EXPERT.fullmatch(normal_form(cut.matrix.name))
    if not parts or f"{parts[1]}.x.weight" not in stacks:
        return "", None
    module, updates = stacks[f"{parts[1]}.x.weight"]
    down = parts[3] == "down_proj"
    n_out, n_in = cut.matrix.shape
    fitting = [
        u
        for u in updates
        if u.a.shape[1] == n_in and u.b.shape[0] == (n_out if down else 2 * n_out)
    ]
    if not fitting:
        return module, None
    # Both fit where 2 I = H: gate_up is wrapped first and lies inside of down.
    update = fitting[-1] if down else fitting[0]
    rows = WHOLE
    if not down:
        rows = slice(0, n_out) if parts[3] == "gate_proj" else slice(n_out, None)
        if cut.rows.step == 2:
            rows = cut.rows
    n_experts = update.experts if cut.expert is None else cut.tensor.shape[0]
    if not int(parts[2]) < n_experts == update.experts:
        raise ValueError(
            f"{adapter.path} adapts {update.experts} experts of {module}, where the "
            f"base has {n_experts} or more, expected the adapter's own base"
        )
    expert = replace(update, expert=int(parts[2]))
    return module, _over(cut, expert, rows)


def alone(adapter: Adapter) -> dict[str, Cut]:
    """The updates of an adapter by themselves, where no base is at hand."""
    found: dict[str, Cut] = {}
    for module, update in adapter.factors.items():
        if update.magnitude is not None:
            continue
        modules = module.split(".")
        shape = (update.b.shape[0], update.a.shape[1])
        shape = shape[::-1] if update.embedding else shape
        name = f"{module}.weight"
        role, part = layouts.role_of(modules), layouts.part_of(modules, {})
        matrix = Matrix(name, role, layouts.layer_of(name), shape, "float32", part)
        found[name] = AdaptedCut(matrix, update.a, WHOLE, factors=update)
    return found

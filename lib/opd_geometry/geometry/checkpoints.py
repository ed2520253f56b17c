"""Pairs of weight matrices out of safetensors checkpoints, one at a time.

A checkpoint is a Hugging Face directory (one file or shards with an index) or one
.safetensors file. Only safetensors and json are read: nothing is unpickled or run.

Each two-dimensional floating-point tensor is one matrix, except that
- a fused qkv_proj becomes q, k and v, a fused gate_up_proj gate and up, named as if
  they had been stored apart, so a fused checkpoint can be paired with a split one;
- a stack of experts (three dimensions) becomes one matrix an expert, (out, in);
- a head tied to the embedding is not counted again.
Whatever else a file holds is listed by `list_skipped` with the reason.
"""

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opd_geometry.geometry.storage import naming, open_safetensors, owned

INDEX_NAME = "model.safetensors.index.json"

FLOAT_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
}

# Last component of the module's name -> role. w1, w3, w2 are the names of gate, up
# and down in Mixtral and in Llama's own files.
ROLES = {
    "q_proj": "q",
    "wq": "q",
    "k_proj": "k",
    "wk": "k",
    "v_proj": "v",
    "wv": "v",
    "o_proj": "o",
    "wo": "o",
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "down_proj": "down",
    "w2": "down",
    "embed_tokens": "embed",
    "tok_embeddings": "embed",
    "word_embeddings": "embed",
    "embed_in": "embed",
    "wte": "embed",
    "lm_head": "head",
    "embed_out": "head",
    "output": "head",
    "gate": "router",
    "router": "router",
}

EXPERT_ROLES = {"gate": "expert_gate", "up": "expert_up", "down": "expert_down"}
ALL_ROLES = {*ROLES.values(), *EXPERT_ROLES.values(), "expert_other", "other"}

# Models that fuse or stack in another order than the usual one.
QKV_BY_HEAD = {"codegen", "minimax"}
EXPERTS_IN_OUT = {"gpt_oss", "llama4", "llama4_text", "qwen3_vl_moe_text"}
EXPERTS_INTERLEAVED = {"gpt_oss"}
# Granite's stacks lie in block_sparse_moe itself, under names of their own.
STACK_ALIASES = {"input_linear": "gate_up_proj", "output_linear": "down_proj"}

TIED = "tied to the embedding (tie_word_embeddings in config.json), counted there"


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of a checkpoint.

    Attributes:
        name: the tensor's name, or the part's own for a fused or stacked tensor.
        role: q, k, v, o, gate, up, down, embed, head, router, expert_gate,
            expert_up, expert_down, expert_other or other.
        layer: index of the block, -1 outside of the blocks.
        shape: (n_rows, n_cols), rows are outputs.
        dtype: stored dtype, as torch names it, such as "bfloat16".
    """

    name: str
    role: str
    layer: int
    shape: tuple[int, int]
    dtype: str

    @property
    def n_bytes(self) -> int:
        """What it takes in its file."""
        itemsize: int = getattr(torch, self.dtype).itemsize
        return self.shape[0] * self.shape[1] * itemsize


@dataclass(frozen=True)
class Skipped:
    """One tensor that is not measured, and why."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    reason: str


class MatrixPair(NamedTuple):
    """One matrix in two checkpoints, in the dtypes they are stored in."""

    name: str
    role: str
    layer: int
    w_before: Tensor
    w_after: Tensor


@dataclass(frozen=True)
class _Stored:
    """A tensor as the header of its file describes it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path


@dataclass(frozen=True)
class _Part:
    """Where a matrix lies in its file.

    tensor[rows], of a stack tensor[expert, rows], or where experts are stored as
    (in, out) the transpose of tensor[expert, :, rows].
    """

    matrix: Matrix
    file: Path
    tensor: str
    rows: slice
    expert: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class StoredPair:
    """One matrix in two checkpoints, not read yet; small enough to be sent around."""

    before: Matrix
    after: Matrix
    parts: tuple[_Part, _Part]

    def read(self) -> tuple[Tensor, Tensor]:
        """Both, in the dtypes they are stored in, in memory of their own."""
        return self.read_before(), self.read_after()

    def read_before(self) -> Tensor:
        """The earlier one alone."""
        return _read(self.parts[0])

    def read_after(self) -> Tensor:
        """The later one alone."""
        return _read(self.parts[1])

    def read_head(self, n_bytes: int) -> Tensor:
        """The first rows of the later one, of about so many bytes, at least one."""
        part, n_rows = self.parts[1], self.after.shape[0]
        n_head = min(n_rows, max(1, n_bytes * n_rows // self.after.n_bytes))
        start, step = part.rows.start or 0, part.rows.step or 1
        stop = start + (n_head - 1) * step + 1
        return _read(replace(part, rows=slice(start, stop, step)))


@dataclass(frozen=True)
class _Contents:
    parts: dict[str, _Part]
    skipped: dict[str, Skipped]


def list_matrices(path: str | Path) -> list[Matrix]:
    """Matrices of a checkpoint, from its headers alone.

    Args:
        path: a directory with model.safetensors or with shards and their index, or
            one .safetensors file.

    Returns:
        The matrices in natural order of their names (layer 2 before layer 10).

    Raises:
        FileNotFoundError: no such path, or a shard of the index is missing.
        ValueError: no safetensors in it, a truncated or damaged file, index and
            shards that disagree, or a broken config.json.
    """
    return [part.matrix for part in _contents(path).parts.values()]


def list_skipped(path: str | Path) -> list[Skipped]:
    """Tensors of a checkpoint that are not measured, each with the reason.

    Args:
        path: as `list_matrices`.

    Returns:
        The other tensors in natural order of their names.

    Raises:
        FileNotFoundError, ValueError: as `list_matrices`.
    """
    return list(_contents(path).skipped.values())


def matrices_in_memory(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, tuple[Matrix, Tensor]]:
    """The matrices of a model that is loaded, under the names its checkpoint has.

    Args:
        tensors: name to tensor, as of ``model.named_parameters()``.
        config: of the model, as of ``model.config.to_dict()``: head counts of a fused
            qkv_proj, the order of stacked experts.

    Returns:
        Name to (matrix, its (n_rows, n_cols) view of the tensor), in natural order;
        what `list_skipped` would list is left out.

    >>> found = matrices_in_memory({"layers.0.q_proj.weight": torch.eye(2)}, {})
    >>> [(matrix.role, matrix.layer) for matrix, _ in found.values()]
    [('q', 0)]
    """
    codes = {name: code for code, name in FLOAT_DTYPES.items()}
    found: dict[str, tuple[Matrix, Tensor]] = {}
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        stored = _Stored(name, tuple(tensor.shape), codes.get(dtype, dtype), Path())
        outcome = _parts_or_reason(stored, _language(dict(config)), tied=False)
        if not isinstance(outcome, str):
            found |= {p.matrix.name: (p.matrix, _cut(tensor, p)) for p in outcome}
    return {name: found[name] for name in sorted(found, key=_natural)}


def missing_names(before: str | Path, after: str | Path) -> tuple[list[str], list[str]]:
    """Names that only one of two checkpoints has, tied heads left out.

    Args:
        before: as `list_matrices`.
        after: as `list_matrices`.

    Returns:
        (only in before, only in after), matrices and skipped tensors alike.

    Raises:
        FileNotFoundError, ValueError: as `list_matrices`.
    """

    def names(path: str | Path) -> dict[str, None]:
        contents = _contents(path)
        untied = [n for n, s in contents.skipped.items() if s.reason != TIED]
        return dict.fromkeys([*contents.parts, *untied])

    in_before, in_after = names(before), names(after)
    return (
        [name for name in in_before if name not in in_after],
        [name for name in in_after if name not in in_before],
    )


def read_matrix(path: str | Path, name: str) -> Tensor:
    """One matrix of a checkpoint, by the name that `list_matrices` gives it.

    Args:
        path: as `list_matrices`.
        name: of a matrix.

    Returns:
        (n_rows, n_cols) in the stored dtype, in memory of its own.

    Raises:
        FileNotFoundError, ValueError: as `list_matrices`; no matrix of that name.
    """
    contents = _contents(path)
    if name not in contents.parts:
        why = contents.skipped.get(name)
        reason = f"it is skipped: {why.reason}" if why else "no such tensor"
        raise ValueError(
            f"{path} has no matrix {name!r} ({reason}), "
            "expected a name of list_matrices(path)"
        )
    return _read(contents.parts[name])


def iter_pairs(
    before: str | Path,
    after: str | Path,
    roles: Collection[str] | None = None,
    missing: str = "raise",
) -> Iterator[MatrixPair]:
    """Matching matrices of two checkpoints, read one pair at a time.

    Names and shapes are checked at the call, before the first tensor is read.

    Args:
        before, after, roles, missing: as `list_pairs`.

    Returns:
        Iterator over (name, role, layer, w_before, w_after), in natural order.

    Raises:
        FileNotFoundError, ValueError: as `list_pairs`.
    """
    pairs = list_pairs(before, after, roles, missing)
    return (
        MatrixPair(p.before.name, p.before.role, p.before.layer, *p.read())
        for p in pairs
    )


def list_pairs(
    before: str | Path,
    after: str | Path,
    roles: Collection[str] | None = None,
    missing: str = "raise",
) -> list[StoredPair]:
    """Matching matrices of two checkpoints, from their headers alone.

    Args:
        before: as `list_matrices`.
        after: as `list_matrices`.
        roles: only these roles, such as ("q", "k", "v", "o"); None for all.
        missing: "raise" when a matrix is on one side only, or "skip" to go on with
            the common ones (`missing_names` lists the rest).

    Returns:
        Pairs in natural order of their names.

    Raises:
        FileNotFoundError, ValueError: as `list_matrices`; shapes differ, matrices
            are missing, no matrix is left, or an argument is unknown.
    """
    if missing not in ("raise", "skip"):
        raise ValueError(f"missing = {missing!r}, expected 'raise' or 'skip'")
    if isinstance(roles, str) or not set(roles or ()) <= ALL_ROLES:
        raise ValueError(
            f"roles = {roles!r}, expected a collection out of {sorted(ALL_ROLES)}"
        )
    in_before, in_after = _contents(before), _contents(after)
    wanted = [
        {n: p for n, p in side.parts.items() if roles is None or p.matrix.role in roles}
        for side in (in_before, in_after)
    ]
    if missing == "raise":
        _refuse_missing(wanted[0], wanted[1], in_after, before, after)
        _refuse_missing(wanted[1], wanted[0], in_before, after, before)
    pairs = [(wanted[0][n], wanted[1][n]) for n in wanted[0] if n in wanted[1]]
    if not pairs:
        raise ValueError(
            f"{before} and {after} have no matrix in common"
            + (f" with a role of {sorted(roles)}" if roles is not None else "")
            + ", expected two checkpoints of one architecture; see list_matrices"
        )
    _refuse_shapes([(a.matrix, b.matrix) for a, b in pairs])
    return [StoredPair(a.matrix, b.matrix, (a, b)) for a, b in pairs]


def list_files(path: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint that hold its tensors.

    Args:
        path: as `list_matrices`.

    Raises:
        FileNotFoundError, ValueError: as `list_matrices`.
    """
    return sorted({tensor.file for tensor in _stored(Path(path))})


def _refuse_missing(
    wanted: dict[str, _Part],
    found: dict[str, _Part],
    other: _Contents,
    path: str | Path,
    other_path: str | Path,
) -> None:
    absent = [name for name in wanted if name not in found]
    if not absent:
        return
    why = other.skipped.get(absent[0])
    raise ValueError(
        f"{len(absent)} matrices of {path} are not in {other_path}, first {absent[0]}"
        + (f" (skipped there: {why.reason})" if why else "")
        + ", expected the same names; pass missing='skip' for the common ones"
    )


def _refuse_shapes(pairs: list[tuple[Matrix, Matrix]]) -> None:
    differing = [(a, b) for a, b in pairs if a.shape != b.shape]
    if differing:
        a, b = differing[0]
        raise ValueError(
            f"{len(differing)} matrices differ in shape, first {a.name}: {a.shape} "
            f"before and {b.shape} after, expected equal sizes; a vocabulary padded "
            "differently must be cut to one size, or leave its role out with roles="
        )


def _contents(path: str | Path) -> _Contents:
    """Every tensor of a checkpoint as parts to measure or a reason not to."""
    config = _config(Path(path))
    stored = _stored(Path(path))
    has_embedding = any(_role(_modules(t.name)) == "embed" for t in stored)
    tied = has_embedding and config.get("tie_word_embeddings") is True
    parts: dict[str, _Part] = {}
    skipped: dict[str, Skipped] = {}
    for tensor in stored:
        outcome = _parts_or_reason(tensor, config, tied)
        if isinstance(outcome, str):
            dtype = FLOAT_DTYPES.get(tensor.dtype, tensor.dtype)
            skipped[tensor.name] = Skipped(tensor.name, tensor.shape, dtype, outcome)
            continue
        for part in outcome:
            name = part.matrix.name
            if name in parts:
                raise ValueError(
                    f"{path} holds {name} twice, in {parts[name].tensor} and in "
                    f"{tensor.name}, expected it once; remove one"
                )
            parts[name] = part
    return _Contents(
        {name: parts[name] for name in sorted(parts, key=_natural)},
        {name: skipped[name] for name in sorted(skipped, key=_natural)},
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    pieces = re.split(r"(\d+)", name)
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in pieces]


def _modules(name: str) -> list[str]:
    return name.removesuffix(".weight").split(".")


def _layer(name: str) -> int:
    found = re.search(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _role(modules: list[str]) -> str:
    """Role by the last module's whole name, so qkv_proj is never taken for v_proj."""
    role = ROLES.get(modules[-1], "other")
    if "experts" in modules:
        return EXPERT_ROLES.get(role, "expert_other")
    if "router" in modules[-2:]:
        return "router"
    if role == "head" and _layer(".".join(modules)) >= 0:
        return "other"
    return role


def _parts_or_reason(
    tensor: _Stored, config: dict[str, Any], tied: bool
) -> list[_Part] | str:
    """The matrices of one stored tensor, or why it has none."""
    modules, ndim = _modules(tensor.name), len(tensor.shape)
    if tensor.dtype not in FLOAT_DTYPES:
        return f"stored as {tensor.dtype}: quantised or not a weight, dequantise first"
    if 0 in tensor.shape:
        return "no entries"
    if ndim < 2:
        return "a scalar" if ndim == 0 else "one-dimensional: a norm or a bias"
    if re.search(r"(_scale|_scale_inv|\.scales)$", ".".join(modules)):
        return "a quantisation scale, not a weight"
    stacked = _stack_position(modules)
    if ndim == 3 and stacked is not None:
        return _expert_parts(tensor, modules, stacked, config)
    if ndim > 2:
        return f"{ndim}-dimensional and not a stack of experts: not a matrix"
    if stacked is not None and modules[stacked] == "experts":
        return (
            "two-dimensional under 'experts' without a number: biases or a flat stack"
        )
    if modules[-1] == "qkv_proj":
        return _qkv_parts(tensor, modules, config)
    if modules[-1] == "gate_up_proj":
        return _gate_up_parts(tensor, modules)
    if tied and _role(modules) == "head":
        return TIED
    return [_part(tensor, modules, slice(0, tensor.shape[0]))]


def _part(tensor: _Stored, modules: list[str], rows: slice) -> _Part:
    """Rows of a two-dimensional tensor, named as if stored apart."""
    whole = _modules(tensor.name) == modules
    name = tensor.name if whole else ".".join([*modules, "weight"])
    n_rows = len(range(*rows.indices(tensor.shape[0])))
    matrix = Matrix(
        name=name,
        role=_role(modules),
        layer=_layer(name),
        shape=(n_rows, tensor.shape[1]),
        dtype=FLOAT_DTYPES[tensor.dtype],
    )
    return _Part(matrix, tensor.file, tensor.name, rows)


def _qkv_parts(
    tensor: _Stored, modules: list[str], config: dict[str, Any]
) -> list[_Part] | str:
    """q, k and v, stored one below the other with the config's head counts."""
    if config.get("model_type") in QKV_BY_HEAD:
        return f"fused qkv_proj, in an order of {config['model_type']}'s own"
    n_heads = config.get("num_attention_heads")
    width = config.get("hidden_size")
    n_kv_heads = config.get("num_key_value_heads") or n_heads
    if not isinstance(n_heads, int) or not isinstance(n_kv_heads, int) or n_heads < 1:
        return "fused qkv_proj, and no config.json beside it says how many heads"
    head_dim = config.get("head_dim") or (width or 0) // n_heads
    n_q_rows, n_kv_rows = n_heads * head_dim, n_kv_heads * head_dim
    if n_q_rows + 2 * n_kv_rows != tensor.shape[0]:
        return (
            f"fused qkv_proj of {tensor.shape[0]} rows, where config.json's heads "
            f"need {n_q_rows} + 2 x {n_kv_rows}"
        )
    edges = [0, n_q_rows, n_q_rows + n_kv_rows, tensor.shape[0]]
    return [
        _part(tensor, [*modules[:-1], name], slice(edges[i], edges[i + 1]))
        for i, name in enumerate(("q_proj", "k_proj", "v_proj"))
    ]


def _gate_up_parts(tensor: _Stored, modules: list[str]) -> list[_Part] | str:
    """gate above up, halves of one tensor."""
    n_rows = tensor.shape[0]
    if n_rows % 2:
        return f"fused gate_up_proj of {n_rows} rows, which do not halve"
    return [
        _part(tensor, [*modules[:-1], "gate_proj"], slice(0, n_rows // 2)),
        _part(tensor, [*modules[:-1], "up_proj"], slice(n_rows // 2, n_rows)),
    ]


def _stack_position(modules: list[str]) -> int | None:
    """Index of the module that holds a stack of experts, None where there is none."""
    if "experts" in modules:
        i = modules.index("experts")
        numbered = i + 1 < len(modules) and modules[i + 1].isdecimal()
        return None if numbered else i
    if modules[-2:-1] == ["block_sparse_moe"] and modules[-1] in STACK_ALIASES:
        return len(modules) - 2
    return None


def _expert_parts(
    tensor: _Stored, modules: list[str], stacked: int, config: dict[str, Any]
) -> list[_Part] | str:
    """One matrix an expert, or two where gate and up are fused, as (out, in)."""
    n_experts, n_first, n_second = tensor.shape
    leaf = ".".join(modules[stacked + 1 :])
    leaf = STACK_ALIASES.get(leaf, leaf)
    in_out = _stored_in_out(leaf, n_first, n_second, config)
    if leaf != "gate_up_proj":
        # A plain stack needs no splitting, so an unknown order costs only the
        # names of its two sides.
        rows_of = {leaf: slice(None)}
    elif in_out is None:
        return (
            "fused gate_up_proj of experts, and no config.json beside it has a "
            f"hidden_size of {n_first} or {n_second} to tell its order"
        )
    else:
        n_out = n_second if in_out else n_first
        if n_out % 2:
            return f"fused gate_up_proj of {n_out} outputs, which do not halve"
        interleaved = config.get("model_type") in EXPERTS_INTERLEAVED
        rows_of = {
            "gate_proj": slice(0, None, 2) if interleaved else slice(0, n_out // 2),
            "up_proj": slice(1, None, 2) if interleaved else slice(n_out // 2, n_out),
        }
    return [
        _expert_part(tensor, modules[: stacked + 1], expert, name, rows, bool(in_out))
        for expert in range(n_experts)
        for name, rows in rows_of.items()
    ]


def _expert_part(
    tensor: _Stored, stack: list[str], expert: int, leaf: str, rows: slice, in_out: bool
) -> _Part:
    n_out, n_in = tensor.shape[:0:-1] if in_out else tensor.shape[1:]
    name = ".".join([*stack, str(expert), *([leaf] if leaf else []), "weight"])
    role = EXPERT_ROLES.get(ROLES.get(leaf, "other"), "expert_other")
    matrix = Matrix(
        name=name,
        role=role,
        layer=_layer(name),
        shape=(len(range(*rows.indices(n_out))), n_in),
        dtype=FLOAT_DTYPES[tensor.dtype],
    )
    return _Part(matrix, tensor.file, tensor.name, rows, expert, in_out)


def _stored_in_out(
    leaf: str, n_first: int, n_second: int, config: dict[str, Any]
) -> bool | None:
    """Whether each expert is stored as (in, out); None where nothing tells."""
    hidden = config.get("hidden_size")
    n_in, n_out = n_second, n_first
    if ROLES.get(leaf) == "down":
        n_in, n_out = n_out, n_in  # hidden is the output of down, the input of others
    if n_in == n_out == hidden:
        return config.get("model_type") in EXPERTS_IN_OUT
    if hidden not in (n_in, n_out):
        return None
    return n_out == hidden


def _config(path: Path) -> dict[str, Any]:
    """config.json beside the tensors, the language model's part on top; or {}."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {}
    return _language(_json_object(file))


def _language(config: dict[str, Any]) -> dict[str, Any]:
    """A config with its language model's part on top."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    tie = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    return {**config, **text, "tie_word_embeddings": tie}


def _json_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{file} is not JSON ({error}), expected an object; copy it again"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds no JSON object, expected one; copy it again")
    return value


def _stored(path: Path) -> list[_Stored]:
    """Every tensor of a checkpoint, from the headers of its files."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist, expected a checkpoint directory or a "
            ".safetensors file; check the path"
        )
    if not path.is_dir():
        if path.suffix != ".safetensors":
            raise ValueError(
                f"{path} is no .safetensors file, and nothing else is read; "
                "convert it with save_pretrained"
            )
        return _header(path)
    if (path / "model.safetensors").is_file():
        return _header(path / "model.safetensors")
    if (path / INDEX_NAME).is_file():
        return _sharded(path)
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return _header(files[0])
    if files:
        raise ValueError(
            f"{path} holds {len(files)} .safetensors files and no {INDEX_NAME}, "
            "expected one file or an index; pass one of the files"
        )
    pickled = sorted(f.name for p in ("*.bin", "*.pt", "*.pth") for f in path.glob(p))
    raise ValueError(
        f"{path} holds no .safetensors file"
        + (f" but {pickled[0]}, and pickles are not read" if pickled else "")
        + ", expected a checkpoint; save one with save_pretrained"
    )


def _sharded(path: Path) -> list[_Stored]:
    """Tensors of the shards, checked against their index in both directions."""
    index = path / INDEX_NAME
    weight_map = _json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map, expected one; copy it again")
    names_of = defaultdict(set)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(
                f"{index} places {name} in {shard!r}, "
                "expected the name of a file in the same directory"
            )
        names_of[shard].add(name)
    absent = sorted(shard for shard in names_of if not (path / shard).is_file())
    if absent:
        raise FileNotFoundError(
            f"{path} lacks {len(absent)} of {len(names_of)} shards of its index, first "
            f"{absent[0]}; copy it again"
        )
    stray = sorted(
        {f.name for f in path.glob("model-*-of-*.safetensors")} - {*names_of}
    )
    if stray:
        raise ValueError(
            f"{index} does not name the shard {stray[0]} beside it, "
            "expected every shard; remove the file or copy the right index"
        )
    return [
        t for shard in sorted(names_of) for t in _shard(path, shard, names_of[shard])
    ]


def _shard(path: Path, shard: str, expected: set[str]) -> list[_Stored]:
    tensors = _header(path / shard)
    differing = sorted(expected ^ {tensor.name for tensor in tensors})
    if differing:
        side = "lacks" if differing[0] in expected else "holds"
        raise ValueError(
            f"{path / shard} {side} {differing[0]}, against its index "
            f"({len(differing)} tensors differ); copy the checkpoint again"
        )
    return tensors


def _header(file: Path) -> list[_Stored]:
    handle = open_safetensors(file)
    with naming(file):
        names = list(handle.keys())
        slices = [handle.get_slice(name) for name in names]
        return [
            _Stored(name, tuple(s.get_shape()), s.get_dtype(), file)
            for name, s in zip(names, slices, strict=True)
        ]


def _read(part: _Part) -> Tensor:
    handle = open_safetensors(part.file)
    with naming(part.file):
        return owned(part.file, _cut(handle.get_slice(part.tensor), part))


def _cut(tensor: Any, part: _Part) -> Tensor:
    """A part of its tensor, or of the slice of a file that stands for it."""
    w: Tensor
    if part.expert is None:
        w = tensor[part.rows]
    elif part.transposed:
        w = tensor[part.expert, :, part.rows].T
    else:
        w = tensor[part.expert, part.rows]
    return w

"""Tensors that are codes of weights and not weights, by their module.

A module with codes, scales or zeros is measured as a whole or not at all: no tensor of
it is a matrix by itself. `dequantised` makes weights of those formats whose owners'
libraries are here, where that is asked for.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_geometry.geometry.gguf_format import Packed, made_weights
from opd_geometry.geometry.storage import FLOAT_DTYPES, Index, Place, Stored

# Codes of safetensors for what a packed or a small number is stored in.
CODES = {"U8", "I8", "U16", "I16", "U32", "I32", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"}
CODES |= {"F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2"}
CODES |= {"uint8", "int8", "int16", "int32", "float8_e4m3fn", "float8_e5m2"}

VECTORS = "vector-quantised"
# Last components that only a quantised module has, with the format they betray.
MARKS = (
    ("GPTQ or AWQ", r"qweight|qzeros|g_idx"),
    ("HQQ", r"W_q"),
    ("compressed-tensors", r"weight_packed|weight_shape|weight_global_scale"),
    (
        "FP8 or INT8 with scales",
        r"weight_scale(_inv|_2|s)?|weight_zero_point|scale_inv",
    ),
    (
        "bitsandbytes",
        r"SCB|weight_format|weight\.(absmax|nested_absmax|\w*quant_\w+.*)",
    ),
    ("torchao", r"_weight_(qdata|scale|zero_point)"),
    ("quanto", r"weight\._(data|scale|shift|scale_and_shift)"),
    ("EXL2 or EXL3", r"q_weight|q_scale|q_perm|q_invperm|q_groups|trellis|suh|svh"),
    (VECTORS, r"codes|codebooks|Qidxs|centroids|indices"),
    ("scaled codes", r"scales"),
)
_MARKS = [(form, re.compile(rf"(.+)\.(?:{leaf})")) for form, leaf in MARKS]
# Beside a parameter of that name: stacks of experts have no module an expert.
_BESIDE = re.compile(r"(.+?)_(scale|scales|scale_inv|blocks|zero_point|packed)")


def module_of(name: str) -> str:
    """The module that a tensor belongs to, its codes' companions alike."""
    head, found, _ = name.rpartition(".weight.")
    return head if found else name.rpartition(".")[0]


def reasons(tensors: Iterable[Stored], config: Mapping[str, Any]) -> dict[str, str]:
    """The tensors that are codes, or belong to codes, each with the reason.

    Args:
        tensors: of a checkpoint.
        config: config.json, whose quantization_config names the format.

    Returns:
        Name to reason; whatever is not in it may be measured.
    """
    tensors = list(tensors)
    by_name = {tensor.name: tensor for tensor in tensors}
    modules = _marked_modules(tensors)
    parameters = _marked_parameters(by_name)
    said = config.get("quantization_config")
    method = said.get("quant_method") if isinstance(said, dict) else None
    found: dict[str, str] = {}
    for tensor in tensors:
        name = tensor.name
        module = module_of(name)
        form = modules.get(module) or parameters.get(name)
        if modules.get(module_of(module)) == VECTORS:  # q_proj.centroids.weight
            form = VECTORS
        if form:
            form = method if isinstance(method, str) else form
            found[name] = f"quantised ({form}): codes and scales are not weights"
            if form.startswith("stored as"):
                found[name] = f"{form}: quantised or not a weight"
        elif isinstance(tensor.place, Packed) and tensor.place.note:
            found[name] = f"quantised (GGUF {tensor.dtype}): " + (
                "--dequantise measures it"
                if made_weights(tensor.dtype)
                else "the gguf library has no way back to weights"
            )
        elif tensor.dtype not in FLOAT_DTYPES.values():
            found[name] = f"stored as {tensor.dtype}: quantised or not a weight"
    return found


def _marked_modules(tensors: list[Stored]) -> dict[str, str]:
    """Module to format, where one of its tensors is a mark or holds codes."""
    modules: dict[str, str] = {}
    for tensor in tensors:
        for form, pattern in _MARKS:
            if match := pattern.fullmatch(tensor.name):
                modules.setdefault(match[1], form)
                break
        else:
            leaf = tensor.name.rpartition(".")[2]
            # A parameter that stands beside others of its module says nothing of them.
            if tensor.dtype in CODES and leaf in ("weight", "W", "B"):
                modules.setdefault(module_of(tensor.name), f"stored as {tensor.dtype}")
    return modules


def _marked_parameters(by_name: Mapping[str, Stored]) -> dict[str, str]:
    """Parameters with a scale beside them, and the scales."""
    marked: dict[str, str] = {}
    for name, tensor in by_name.items():
        match = _BESIDE.fullmatch(name)
        if not match or (match[2] == "blocks" and tensor.dtype not in CODES):
            continue
        owners = [match[1], *(f"{match[1]}_{x}" for x in ("blocks", "packed"))]
        owners = [owner for owner in owners if owner in by_name]
        if not owners and match[2] not in ("scale_inv", "blocks"):
            continue
        form = "MXFP4" if f"{match[1]}_blocks" in by_name else "scaled codes"
        marked |= dict.fromkeys([name, *owners], form)
    return marked


# --- weights of codes --------------------------------------------------------------

FP8 = {"F8_E4M3", "F8_E5M2"}
WHOLE = slice(None)


@dataclass(frozen=True)
class Dequantised:
    """A weight that is made of codes when it is read.

    Attributes:
        form: of the codes.
        codes: local name (weight, weight_scale, ...) to where it lies.
        block: rows and columns that share a scale; None where the scales' shape tells.
        scheme: quantization_config as JSON, for compressed-tensors.
    """

    form: str
    codes: tuple[tuple[str, Stored], ...]
    block: tuple[int, int] | None = None
    scheme: str = ""

    @property
    def note(self) -> str:
        """What every row of it says."""
        return f"dequantised from {self.form}"

    def files(self) -> tuple[Path, ...]:
        """Of codes and scales."""
        found = [file for _, tensor in self.codes for file in tensor.place.files()]
        return tuple(dict.fromkeys(found))

    def __getitem__(self, index: Index) -> Tensor:
        places = {name: tensor.place for name, tensor in self.codes}
        if self.form == "MXFP4":
            return self._expert(places, index)
        found = {name: _whole(place) for name, place in places.items()}
        if self.form == "FP8":
            return _scaled(found["weight"], found["scale"], self.block)[index]
        return _decompressed(found, self.scheme)[index]

    def _expert(self, places: Mapping[str, Place], index: Index) -> Tensor:
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        expert, rest = index[0], index[1:]
        one = slice(expert, expert + 1)
        whole: Tensor = convert_moe_packed_tensors(
            places["blocks"][one], places["scales"][one]
        )
        return whole[(0, *rest)]


def _whole(place: Place) -> Tensor:
    try:
        return place[WHOLE]
    except (IndexError, TypeError, ValueError):  # a scalar has no first axis
        return place[()]


def _scaled(w: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """FP8 values times the scale of their block, float32."""
    if scale.dtype == torch.uint8:  # exponents by themselves
        scale = (scale.float() - 127).exp2()
    scale = scale.float()
    if scale.numel() == 1:
        return w.float() * scale.reshape(())
    scale = scale.reshape(scale.shape[0], -1)
    rows, cols = block or [
        -(-n // m) for n, m in zip(w.shape, scale.shape, strict=True)
    ]
    wide = scale.repeat_interleave(rows, 0).repeat_interleave(cols, 1)
    return w.float() * wide[: w.shape[0], : w.shape[1]]


def _decompressed(codes: dict[str, Tensor], scheme: str) -> Tensor:
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationConfig
    except ImportError as error:
        raise ValueError(
            "compressed-tensors codes need the library of that name, which is not "
            "here; pip install compressed-tensors"
        ) from error

    said = json.loads(scheme)
    config = QuantizationConfig.model_validate(said)
    (group,) = config.config_groups.values()
    form = getattr(group, "format", None) or said.get("format")
    compressor = BaseCompressor.get_value_from_registry(form)
    weight: Tensor = compressor.decompress(codes, group)["weight"]
    return weight


def dequantised(
    stored: list[Stored],
    codes: dict[str, str],
    config: Mapping[str, Any],
    notes: tuple[str, ...],
) -> tuple[list[Stored], dict[str, str], tuple[str, ...]]:
    """Weights in place of codes, where the format is known.

    FP8 with scales of blocks, rows or whole matrices; MXFP4 as gpt-oss has it, by
    transformers; what compressed-tensors packs, by that library.

    Returns:
        The tensors, the reasons of what are still codes, and the notes with what was
        done.
    """
    said = config.get("quantization_config")
    said = said if isinstance(said, dict) else {}
    by_module: dict[str, dict[str, Stored]] = defaultdict(dict)
    made: list[Stored] = []
    used: set[str] = set()
    for tensor in stored:
        if tensor.name not in codes:
            continue
        if isinstance(tensor.place, Packed):
            if made_weights(tensor.dtype):
                made.append(replace(tensor, dtype="float32"))
                used.add(tensor.name)
        else:
            by_module[module_of(tensor.name)][tensor.name.rpartition(".")[2]] = tensor
    for module, found in by_module.items():
        weights = _weights(module, found, said)
        made += weights
        if weights:
            used |= {tensor.name for tensor in found.values()}
    left = {name: reason for name, reason in codes.items() if name not in used}
    kept = [tensor for tensor in stored if tensor.name not in used]
    if made:
        notes = (*notes, f"{len(made)} tensors are dequantised when they are read")
    return kept + made, left, notes


def _weights(
    module: str, found: Mapping[str, Stored], said: Mapping[str, Any]
) -> list[Stored]:
    """The weights that the codes of one module make; none if that is not known."""
    made = []
    for leaf, blocks in found.items():
        name = leaf.removesuffix("_blocks")
        scales = found.get(f"{name}_scales")
        if name != leaf and scales and len(blocks.shape) == 4:
            n, rows, groups, packed = blocks.shape
            place = Dequantised("MXFP4", (("blocks", blocks), ("scales", scales)))
            shape = (n, groups * packed * 2, rows)
            made.append(Stored(f"{module}.{name}", shape, "bfloat16", place))
    if made:
        return made
    if said.get("quant_method") == "compressed-tensors":
        return _compressed(module, found, said)
    weight = found.get("weight")
    names = "weight_scale_inv", "weight_scale", "scale"
    scale = next((found[name] for name in names if name in found), None)
    if weight is None or scale is None or weight.dtype not in FP8:
        return []
    block = _block(weight.shape, scale.shape, said)
    if block is None:
        return []
    place = Dequantised("FP8", (("weight", weight), ("scale", scale)), block)
    return [Stored(f"{module}.weight", weight.shape, "float32", place)]


def _block(
    shape: tuple[int, ...], scales: tuple[int, ...], said: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where it is not known."""
    if len(shape) != 2 or math.prod(scales) == 1:
        return (*shape,) if len(shape) == 2 else None
    grid = (scales[0], math.prod(scales[1:]))
    blocks = said.get("weight_block_size")
    if isinstance(blocks, list) and len(blocks) == 2:
        rows, cols = (b if type(b) is int and b > 0 else 1 for b in blocks)
        fits = (-(-shape[0] // rows), -(-shape[1] // cols)) == grid
        return (rows, cols) if fits else None
    if shape[0] % grid[0] or shape[1] % grid[1]:
        return None
    return shape[0] // grid[0], shape[1] // grid[1]


FOUR_BITS = {"nvfp4-pack-quantized", "mxfp4-pack-quantized"}


def _compressed(
    module: str, found: Mapping[str, Stored], said: Mapping[str, Any]
) -> list[Stored]:
    groups = said.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        return []
    packed = found.get("weight") or found.get("weight_packed")
    scale = found.get("weight_scale")
    if packed is None or scale is None:
        return []
    shape = packed.shape
    codes = (*found.items(),)
    place = Dequantised("compressed-tensors", codes, None, json.dumps(said))
    if said.get("format") in FOUR_BITS and len(shape) == 2:  # two codes in a byte
        return [Stored(f"{module}.weight", (shape[0], 2 * shape[1]), "bfloat16", place)]
    if scale.dtype not in FLOAT_DTYPES.values():
        return []
    if "weight_shape" in found:
        sides = _whole(found["weight_shape"].place).tolist()
        shape = (int(sides[0]), int(sides[1]))
    return [Stored(f"{module}.weight", shape, scale.dtype, place)]

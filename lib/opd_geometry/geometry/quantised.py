"""Tensors that are codes of weights and not weights, by their module.

A module with codes, scales or zeros is measured as a whole or not at all: no tensor of
it is a matrix by itself. `dequantised` makes weights of those formats whose owners'
libraries are here, where that is asked for.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from opd_geometry.geometry.storage import FLOAT_DTYPES, Stored

# Codes of safetensors for what a packed or a small number is stored in.
CODES = {"U8", "I8", "U16", "I16", "U32", "I32", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"}
CODES |= {"F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2"}
CODES |= {"uint8", "int8", "int16", "int32", "float8_e4m3fn", "float8_e5m2"}

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
    ("vector-quantised", r"codes|codebooks|Qidxs|centroids|indices"),
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
        form = modules.get(module_of(name)) or parameters.get(name)
        if form:
            form = method if isinstance(method, str) else form
            found[name] = f"quantised ({form}): codes and scales are not weights"
            if form.startswith("stored as"):
                found[name] = f"{form}: quantised or not a weight"
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


def dequantised(
    stored: list[Stored],
    codes: dict[str, str],
    config: Mapping[str, Any],
    notes: tuple[str, ...],
) -> tuple[list[Stored], dict[str, str], tuple[str, ...]]:
    """Weights in place of codes, where the format is known."""
    return stored, codes, notes

"""Weights of a GGUF file, by the library that owns the format.

Only families are read whose converter leaves matrices as Hugging Face has them, or
turns their rows in a way that is known (llama: queries and keys).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_geometry.geometry.storage import Index, OfFile, Stored, count_read, handle_of

# Families whose matrices stand in the file as in Hugging Face's checkpoints.
AS_THEY_ARE = ("qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3")
TURNED = ("llama",)  # rows of q and k go by pairs, for another rotary embedding
PLAIN = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SPLIT = re.compile(r".*-\d{5}-of-\d{5}\.gguf")
OUTER = {"token_embd": "model.embed_tokens", "output": "lm_head"}
INNER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    **{f"ffn_{x}_shexp": f"mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down")},
}
EXPERTS = {f"ffn_{x}_exps": f"{x}_proj" for x in ("gate", "up", "down")}


@dataclass(frozen=True)
class Packed(OfFile):
    """A tensor of a GGUF file, in float32 where it is quantised there.

    Attributes:
        file: that holds it.
        key: its name there.
        form: its type there, such as Q4_K.
        expert: which of a stack; None for a tensor by itself.
        heads: by which rows are turned back; 0 for as they are.
    """

    key: str
    form: str
    expert: int | None = None
    heads: int = 0

    @property
    def note(self) -> str:
        """What every row of it says."""
        return "" if self.form in PLAIN else f"dequantised from GGUF {self.form}"

    def __getitem__(self, index: Index) -> Tensor:
        data = _reader(self.file)[1][self.key].data
        if self.expert is not None:
            data = data[self.expert]
        if self.heads:
            whole = self._weights(data)
            halves = whole.reshape(self.heads, -1, 2, whole.shape[-1]).transpose(1, 2)
            turned: Tensor = halves.reshape(whole.shape)[index].clone()
            return turned
        first, rest = (index[0], index[1:]) if isinstance(index, tuple) else (index, ())
        if isinstance(first, slice):
            return self._weights(data[first])[(slice(None), *rest)]
        return self._weights(data[first : first + 1])[(0, *rest)]

    def _weights(self, data: Any) -> Tensor:
        import gguf
        import numpy as np

        if self.form == "BF16":
            w = torch.from_numpy(np.array(data)).view(torch.bfloat16)
        elif self.form in PLAIN:
            w = torch.from_numpy(np.array(data))
        else:
            kind = gguf.GGMLQuantizationType[self.form]
            w = torch.from_numpy(np.array(gguf.quants.dequantize(data, kind)))
        count_read(self.file, w.nbytes)
        return w


@lru_cache
def made_weights(form: str) -> bool:
    """Whether the library can make weights of a type's codes."""
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType[form]
    block = np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8)
    try:
        gguf.quants.dequantize(block, kind)
    except NotImplementedError:
        return False
    return True


def tensors(file: Path) -> list[Stored]:
    """The tensors of a GGUF file under the names of Hugging Face.

    Those that are quantised have their type as dtype.

    Raises:
        ValueError: a damaged file, one of several, or of a family that is not read.
    """
    if SPLIT.fullmatch(file.name):
        raise ValueError(
            f"{file} is one of several files of a GGUF, expected a whole one; merge "
            "them: llama-gguf-split --merge FIRST OUT"
        )
    reader, found = _reader(file)
    arch = _value(reader, "general.architecture")
    if arch not in (*AS_THEY_ARE, *TURNED):
        raise ValueError(
            f"{file} is a GGUF of {str(arch)[:80]!r}, expected one of "
            f"{', '.join((*TURNED, *AS_THEY_ARE))}; {CONVERTER}"
        )
    heads = {}
    if arch in TURNED:
        n = _value(reader, f"{arch}.attention.head_count")
        heads = {
            "attn_q": n,
            "attn_k": _value(reader, f"{arch}.attention.head_count_kv") or n,
        }
        _check_heads(file, heads, found)
    return [stored for key in found for stored in _named(file, key, found[key], heads)]


CONVERTER = (
    "make safetensors of a GGUF with transformers: AutoModelForCausalLM."
    "from_pretrained(DIRECTORY, gguf_file=NAME), then safetensors.torch.save_model("
    "model, 'OUT.safetensors'), since its save_pretrained refuses such a model"
)


def _reader(file: Path) -> tuple[Any, dict[str, Any]]:
    """The open file and its tensors by name."""

    def opened(place: Path) -> tuple[Any, dict[str, Any]]:
        import gguf

        try:
            reader = gguf.GGUFReader(place)
        except Exception as error:  # what it says of a damaged file may be anything
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{place} is truncated or damaged ({said[:200]}), expected a GGUF "
                "file; copy it again"
            ) from error
        return reader, {tensor.name: tensor for tensor in reader.tensors}

    found: tuple[Any, dict[str, Any]] = handle_of(file, opened)
    return found


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _check_heads(file: Path, heads: dict[str, Any], found: dict[str, Any]) -> None:
    for key, tensor in found.items():
        n = heads.get(key.split(".")[-2] if key.count(".") > 1 else "", 1)
        rows = int(tensor.shape[-1])
        if type(n) is not int or n < 1 or rows % (2 * n) * (n > 1):
            raise ValueError(
                f"{file} gives {n!r} heads to {key} with {rows} rows, expected a "
                "divisor of half of them; convert the model again"
            )


def _named(
    file: Path, key: str, tensor: Any, heads: dict[str, int]
) -> Iterator[Stored]:
    """A tensor under its name of Hugging Face; experts one by one."""
    form = tensor.tensor_type.name
    shape = tuple(int(n) for n in reversed(tensor.shape))
    dtype = PLAIN.get(form, form)
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", key)
    if not match:
        stem, _, leaf = key.rpartition(".")
        name = f"{OUTER[stem]}.{leaf}" if stem in OUTER else key
        yield Stored(name, shape, dtype, Packed(file, key, form))
        return
    layer, inner, leaf = match.groups()
    if inner in EXPERTS and len(shape) == 3:
        for expert in range(shape[0]):
            name = f"model.layers.{layer}.mlp.experts.{expert}.{EXPERTS[inner]}.{leaf}"
            yield Stored(name, shape[1:], dtype, Packed(file, key, form, expert))
        return
    name = f"model.layers.{layer}.{INNER.get(inner, inner)}.{leaf}"
    turned = heads.get(inner, 0) if leaf == "weight" else 0
    yield Stored(name, shape, dtype, Packed(file, key, form, None, turned))

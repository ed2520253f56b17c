"""GGUF as gguf writes it, against what went in and transformers' reading."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from opd_geometry.geometry import checkpoints, pairs
from opd_geometry.geometry.checkpoints import open_checkpoint

HEADS, GROUPS, WIDTH, INNER, WORDS = 4, 2, 64, 96, 50
HUB = {
    "token_embd": ("model.embed_tokens", (WORDS, WIDTH)),
    "output": ("lm_head", (WORDS, WIDTH)),
    "blk.0.attn_q": ("model.layers.0.self_attn.q_proj", (WIDTH, WIDTH)),
    "blk.0.attn_k": ("model.layers.0.self_attn.k_proj", (WIDTH // 2, WIDTH)),
    "blk.0.attn_v": ("model.layers.0.self_attn.v_proj", (WIDTH // 2, WIDTH)),
    "blk.0.attn_output": ("model.layers.0.self_attn.o_proj", (WIDTH, WIDTH)),
    "blk.0.ffn_gate": ("model.layers.0.mlp.gate_proj", (INNER, WIDTH)),
    "blk.0.ffn_up": ("model.layers.0.mlp.up_proj", (INNER, WIDTH)),
    "blk.0.ffn_down": ("model.layers.0.mlp.down_proj", (WIDTH, INNER)),
}
NORMS = ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")


def weights(seed: int = 0) -> dict[str, Tensor]:
    """By Hugging Face's names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{name}.weight": torch.randn(shape, generator=generator) * 0.1
        for name, shape in HUB.values()
    }


def turned(w: Tensor, heads: int) -> Tensor:
    """As llama.cpp's converter turns q and k."""
    halves = w.reshape(heads, 2, len(w) // heads // 2, w.shape[1])
    return halves.swapaxes(1, 2).reshape(w.shape)


def write(
    file: Path, arch: str, given: dict[str, Tensor], kinds: dict[str, str] | None = None
) -> Path:
    writer = gguf.GGUFWriter(str(file), arch)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(WORDS)
    for key, (name, _) in HUB.items():
        w = given[f"{name}.weight"]
        if arch == "llama" and key.endswith(("attn_q", "attn_k")):
            w = turned(w, HEADS if key.endswith("q") else GROUPS)
        kind = (kinds or {}).get(key, "F32")
        if kind == "F32":
            writer.add_tensor(f"{key}.weight", w.numpy())
            continue
        type_ = gguf.GGMLQuantizationType[kind]
        packed = gguf.quants.quantize(w.numpy(), type_)
        writer.add_tensor(f"{key}.weight", packed, raw_dtype=type_)
    for key in NORMS:
        writer.add_tensor(f"{key}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_matrices_come_back_under_their_names(arch: str, tmp_path: Path) -> None:
    given = weights()
    kinds = {"blk.0.attn_v": "F16", "blk.0.ffn_up": "BF16"}
    found = open_checkpoint(write(tmp_path / "m.gguf", arch, given, kinds))
    assert {*found.cuts} == {*given}
    for name, w in given.items():
        dtype = {"v_pr": torch.float16, "up_p": torch.bfloat16}
        kind = next((d for part, d in dtype.items() if part in name), torch.float32)
        read = checkpoints.read_matrix(found, name)
        assert read.dtype == kind
        assert torch.equal(read, w.to(kind)), name
    assert found.cuts["lm_head.weight"].matrix.role == "head"


def test_transformers_reads_the_same(tmp_path: Path) -> None:
    """Another implementation, which turns llama's rows back as well."""
    from transformers import AutoModelForCausalLM

    kinds = {"blk.0.attn_q": "Q8_0", "blk.0.ffn_down": "Q8_0"}
    file = write(tmp_path / "m.gguf", "llama", weights(), kinds)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    found = open_checkpoint(file, dequantise=True)
    for name, w in model.state_dict().items():
        if w.ndim == 2:
            read = checkpoints.read_matrix(found, name)
            assert torch.equal(read.float(), w.float()), name


@pytest.mark.parametrize("side", ["before", "after"])
def test_quantised_tensors_are_skipped_or_said(tmp_path: Path, side: str) -> None:
    base, kinds = weights(), {"blk.0.ffn_down": "Q8_0", "blk.0.attn_q": "Q4_0"}
    (tmp_path / "hf").mkdir()
    save_file(base, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "gguf").mkdir()
    write(tmp_path / "gguf" / "m.gguf", "llama", base, kinds)
    paths = (tmp_path / "hf", tmp_path / "gguf")
    plan = pairs.plan_pair(*(paths if side == "after" else paths[::-1]))
    assert len(plan.tasks) == 7
    assert {s.reason for s in plan.skipped if "down" in s.name} == {
        "quantised (GGUF Q8_0): --dequantise measures it"
    }
    assert any("read from m.gguf" in note for note in plan.notes)
    order = paths if side == "after" else paths[::-1]
    plan = pairs.plan_pair(*order, metrics=["cheap"], null=False, dequantise=True)
    table = pairs.run_plan(plan).set_index("matrix")
    assert len(table) == 9
    down = table.loc["model.layers.0.mlp.down_proj.weight"]
    assert down["note"] == f"{side}: dequantised from GGUF Q8_0"
    assert 0 < down["relative_norm"] < 0.01
    rest = table[table["note"] == ""]
    assert len(rest) == 7
    assert (rest["frobenius_norm"] == 0).all()


@pytest.mark.parametrize("kind", list(gguf.GGMLQuantizationType))
def test_every_type_is_read_or_skipped_with_its_reason(
    kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    """As the library that owns the format makes weights of random codes."""
    size, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    codes = np.random.default_rng(0).integers(0, 60, (4, 512 // size * n_bytes))
    codes = codes.astype(np.uint8)
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "qwen3")
    writer.add_tensor("blk.0.ffn_up.weight", codes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_checkpoint(tmp_path / "m.gguf", dequantise=True)
    if not found.cuts:
        (skip,) = found.skipped.values()
        assert skip.unreadable
        ends = "no way back to weights", "quantised or not a weight"  # or integers
        assert skip.reason.endswith(ends)
        return
    (cut,) = found.cuts.values()
    w = cut.read()
    assert str(w.dtype) == f"torch.{cut.matrix.dtype}"
    if kind.name in ("F64", "F32", "F16", "BF16"):
        assert torch.equal(w.view(torch.uint8), torch.from_numpy(codes))
    else:
        expected = torch.from_numpy(np.array(gguf.quants.dequantize(codes, kind)))
        assert torch.equal(w, expected)


def test_experts_are_matrices_of_their_own(tmp_path: Path) -> None:
    w = torch.randn(3, 8, 32)
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "qwen3moe")
    writer.add_tensor("blk.1.ffn_up_exps.weight", w.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_checkpoint(tmp_path / "m.gguf")
    for i in range(3):
        name = f"model.layers.1.mlp.experts.{i}.up_proj.weight"
        assert found.cuts[name].matrix.role == "expert_up"
        assert torch.equal(checkpoints.read_matrix(found, name), w[i])


def test_what_is_not_read_is_one_line(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.gguf", "falcon", weights())
    with pytest.raises(ValueError, match=r"GGUF of 'falcon'.*gguf_file=NAME"):
        open_checkpoint(whole)
    part = whole.rename(tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(ValueError, match="llama-gguf-split --merge"):
        open_checkpoint(part)
    data = write(tmp_path / "m.gguf", "llama", weights()).read_bytes()
    for n in (0, 3, 20, 300, len(data) - 40):
        (tmp_path / "cut.gguf").write_bytes(data[:n])
        with pytest.raises(ValueError, match=r"cut\.gguf is truncated or damaged"):
            open_checkpoint(tmp_path / "cut.gguf")
    with pytest.raises(ValueError, match="3 GGUF files"):
        open_checkpoint(tmp_path)

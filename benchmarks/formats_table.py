"""Which checkpoints are read, by who wrote them: data/formats.csv, book/formats.md and
the table of README.md.

    python benchmarks/formats_table.py

Every row is a checkpoint that the named library wrote here, tiny, opened beside its
base; what is refused stands there with the line that a reader sees.
"""

import csv
import json
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_run import SIZES

from opd_geometry.geometry import pairs

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "data" / "formats.csv"
PAGE = ROOT / "book" / "formats.md"
FIELDS = ("written by", "layout", "library", "read", "line")
TINY = SIZES | {"vocab_size": 40, "tie_word_embeddings": False}


def _model() -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**TINY)).to(torch.bfloat16)


def _moved() -> torch.nn.Module:
    found = _model()
    with torch.no_grad():
        for w in found.parameters():
            w.add_(0.01 * torch.randn_like(w))
    return found


# --- writers: each leaves a checkpoint in a folder ---------------------------------


def _whole(folder: Path) -> Path:
    _moved().save_pretrained(folder)
    return folder


def _shards(folder: Path) -> Path:
    _moved().save_pretrained(folder, max_shard_size="20KB")
    return folder


def _pickled(folder: Path) -> Path:
    torch.save(_moved().state_dict(), folder / "pytorch_model.bin")
    return folder


def _planted(folder: Path) -> Path:
    torch.save(_moved().state_dict() | {"x": Planted()}, folder / "pytorch_model.bin")
    return folder


class Planted:
    """What a pickle may hold: calls something when it is read. Here print."""

    def __reduce__(self) -> tuple:
        return print, ("executed",)


def _compiled(folder: Path) -> Path:
    state = {f"module._orig_mod.{n}": w for n, w in _moved().state_dict().items()}
    save_file(state, folder / "model.safetensors")
    return folder


def _adapter(**settings: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        from peft import LoraConfig, get_peft_model

        modules = {"target_modules": ["q_proj", "down_proj"]} | settings
        wrapped = get_peft_model(_model(), LoraConfig(r=4, lora_alpha=8, **modules))
        with torch.no_grad():
            for name, w in wrapped.named_parameters():
                if "lora_B" in name:
                    w.normal_(0, 0.02)
        wrapped.save_pretrained(folder)
        return folder

    return write


def _experts(folder: Path) -> Path:
    """A mixture of experts, its base beside it: the config names it."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**TINY, **sizes)).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=4, target_modules=[], target_parameters=names)
    wrapped = get_peft_model(model, config)
    wrapped.save_pretrained(folder / "adapter")
    return folder / "adapter"


def _other_adapter(folder: Path) -> Path:
    from peft import VeraConfig, get_peft_model

    config = VeraConfig(r=4, target_modules=["q_proj"], save_projection=True)
    get_peft_model(_model(), config).save_pretrained(folder)
    return folder


def _mlx(folder: Path) -> Path:
    name = "model.layers.0.self_attn.q_proj.lora_"
    factors = {f"{name}a": torch.ones(32, 4), f"{name}b": torch.ones(4, 32)}
    save_file(factors, folder / "adapters.safetensors")
    return folder


def _megatron_names(folder: Path) -> Path:
    """Fused by groups, gate above up, a padded vocabulary; config.json beside them."""
    state, found = _moved().state_dict(), {}
    padding = torch.zeros(24, 32, dtype=torch.bfloat16)
    embed, head = state["model.embed_tokens.weight"], state["lm_head.weight"]
    found["embedding.word_embeddings.weight"] = torch.cat([embed, padding])
    found["output_layer.weight"] = torch.cat([head, padding])
    for i in range(TINY["num_hidden_layers"]):
        theirs, ours = f"decoder.layers.{i}", f"model.layers.{i}"
        q, k, v = (state[f"{ours}.self_attn.{x}_proj.weight"] for x in "qkv")
        grouped = [q.reshape(2, 16, 32), k.reshape(2, 8, 32), v.reshape(2, 8, 32)]
        qkv = torch.cat(grouped, 1).reshape(-1, 32)
        halves = [state[f"{ours}.mlp.{x}_proj.weight"] for x in ("gate", "up")]
        back = state[f"{ours}.self_attn.o_proj.weight"]
        down = state[f"{ours}.mlp.down_proj.weight"]
        found[f"{theirs}.self_attention.linear_qkv.weight"] = qkv
        found[f"{theirs}.self_attention.linear_proj.weight"] = back
        found[f"{theirs}.mlp.linear_fc1.weight"] = torch.cat(halves)
        found[f"{theirs}.mlp.linear_fc2.weight"] = down
    save_file(found, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


def _quantised(folder: Path) -> Path:
    state = _moved().state_dict()
    found = {}
    for name, w in state.items():
        found[name] = w
        if w.ndim == 2 and "layers" in name:
            scale = w.float().abs().amax(1, keepdim=True) / 448
            found[name] = (w.float() / scale).to(torch.float8_e4m3fn)
            found[f"{name}_scale"] = scale
    save_file(found, folder / "model.safetensors")
    said = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps({"quantization_config": said}))
    return folder


def _blocks(folder: Path) -> Path:
    found = {}
    for name, w in _moved().state_dict().items():
        found[name] = w
        if w.ndim == 2 and "layers" in name:
            tiles = w.float().unflatten(0, (-1, 8)).unflatten(-1, (-1, 8))
            scale = tiles.abs().amax((1, 3), keepdim=True) / 448
            codes = (tiles / scale).flatten(2).flatten(0, 1)
            found[name] = codes.to(torch.float8_e4m3fn)
            found[f"{name}_scale_inv"] = scale[:, 0, :, 0]
    save_file(found, folder / "model.safetensors")
    said = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": said}))
    return folder


def _mxfp4(folder: Path) -> Path:
    """A tiny gpt-oss beside it, and the same with experts as the hub has them."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = TINY | {"num_local_experts": 2, "intermediate_size": 64}
    sizes["layer_types"] = ["full_attention"] * TINY["num_hidden_layers"]
    model = GptOssForCausalLM(GptOssConfig(**sizes)).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    found = {n: w for n, w in model.state_dict().items() if "experts" not in n}
    after = folder / "after"
    after.mkdir()
    for i in range(TINY["num_hidden_layers"]):
        stack = f"model.layers.{i}.mlp.experts"
        for name, rows, groups in (("gate_up_proj", 128, 1), ("down_proj", 32, 2)):
            blocks = torch.randint(256, (2, rows, groups, 16), dtype=torch.uint8)
            found[f"{stack}.{name}_blocks"] = blocks
            found[f"{stack}.{name}_scales"] = torch.full_like(blocks[..., 0], 120)
    save_file(found, after / "model.safetensors")
    said = json.loads((folder / "base" / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "mxfp4"}
    (after / "config.json").write_text(json.dumps(said))
    return after


def _codes(*leaves: str) -> Callable[[Path], Path]:
    """Every projection as the tensors of a format, whose names alone are real."""

    def write(folder: Path) -> Path:
        found = {}
        for name, w in _moved().state_dict().items():
            if w.ndim != 2 or "layers" not in name:
                found[name] = w
                continue
            module = name.removesuffix("weight")
            packed = torch.zeros(w.shape[0], w.shape[1] // 8, dtype=torch.int32)
            found |= {f"{module}{leaf}": torch.ones(w.shape[0], 1) for leaf in leaves}
            found[f"{module}{leaves[0]}"] = packed
        save_file(found, folder / "model.safetensors")
        return folder

    return write


def _unmerged(folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(_model(), LoraConfig(r=4, target_modules=["q_proj"]))
    save_file(wrapped.state_dict(), folder / "model.safetensors")
    return folder


def _resized(folder: Path) -> Path:
    model = _moved()
    model.resize_token_embeddings(48)
    model.save_pretrained(folder)
    return folder


def _flat(folder: Path) -> Path:
    flat = torch.cat([w.flatten() for w in _moved().state_dict().values()])
    save_file({"_flat_param": flat}, folder / "model.safetensors")
    return folder


def _empty(folder: Path) -> Path:
    found = {
        name: w[:0].flatten() if "layers" in name and w.ndim == 2 else w
        for name, w in _moved().state_dict().items()
    }
    save_file(found, folder / "model.safetensors")
    return folder


def _shares(folder: Path) -> Path:
    for rank in range(2):
        found = {n: w.chunk(2)[rank].clone() for n, w in _moved().state_dict().items()}
        save_file(found, folder / f"model-rank-{rank}-part-0.safetensors")
    return folder


def _packed(folder: Path) -> Path:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    found = {}
    for name, w in _moved().state_dict().items():
        if w.ndim != 2 or "layers" not in name:
            found[name] = w
            continue
        scale = w.float().reshape(w.shape[0], -1, 32).abs().amax(-1) / 7
        codes = w.float().reshape(*scale.shape, 32) / scale[..., None]
        codes = codes.round().clamp(-8, 7).to(torch.int8).reshape(w.shape)
        found[f"{name}_packed"] = pack_to_int32(codes, 4)
        found[f"{name}_scale"] = scale.bfloat16()
        found[f"{name}_shape"] = torch.tensor(w.shape)
    save_file(found, folder / "model.safetensors")
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    said = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config = {"quantization_config": said | {"config_groups": groups}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _gguf(family: str, kind: str) -> Callable[[Path], Path]:
    """A file of llama.cpp's kind, its matrices in a type of gguf's."""

    def write(folder: Path) -> Path:
        from gguf import (
            MODEL_ARCH,
            GGMLQuantizationType,
            GGUFWriter,
            get_tensor_name_map,
            quants,
        )

        names = get_tensor_name_map(MODEL_ARCH.QWEN3, TINY["num_hidden_layers"])
        type_ = GGMLQuantizationType[kind]
        writer = GGUFWriter(str(folder / f"model-{kind}.gguf"), family)
        for name, w in _moved().state_dict().items():
            known = names.get_name(name, try_suffixes=(".weight",))
            values = w.float().numpy()
            if w.ndim == 2:
                packed = quants.quantize(values, type_)
                writer.add_tensor(known, packed, raw_dtype=type_)
            else:
                writer.add_tensor(known, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return folder

    return write


def _delta(folder: Path) -> Path:
    save_file({"a.weight": torch.ones(4, 4)}, folder / "model-00001.safetensors")
    described = {"delta_encoding": "xor", "base_version": "000001"}
    index = {
        "metadata": described,
        "weight_map": {"a.weight": "model-00001.safetensors"},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _zero(folder: Path) -> Path:
    (folder / "zero_to_fp32.py").write_text("")
    (folder / "global_step2").mkdir()
    return folder


def _megatron(folder: Path) -> Path:
    for name in ("common.pt", "__0_0.distcp", ".metadata"):
        (folder / name).write_bytes(b"")
    return folder


def _run_folder(folder: Path) -> Path:
    _moved().save_pretrained(folder / "checkpoint-10")
    return folder


# --- the table ---------------------------------------------------------------------

TORCH, TRANSFORMERS, PEFT = "torch", "transformers", "peft"
ONE_PROCESS: list[tuple[str, str, str, Callable[[Path], Path], bool]] = [
    (
        "transformers, TRL, open-instruct",
        "model.safetensors, bf16",
        TRANSFORMERS,
        _whole,
        False,
    ),
    ("the same, large models", "shards and their index", TRANSFORMERS, _shards, False),
    (
        "torch.compile, DDP",
        "paths with module. and _orig_mod.",
        TRANSFORMERS,
        _compiled,
        False,
    ),
    (
        "older trainers, zero_to_fp32.py",
        "pytorch_model.bin",
        TORCH,
        _pickled,
        False,
    ),
    ("anyone", "a pickle with more than tensors", TORCH, _planted, False),
    ("PEFT, TRL, verl (lora_adapter)", "LoRA adapter", PEFT, _adapter(), False),
    (
        "PEFT",
        "rank-stabilised LoRA with a rank a layer",
        PEFT,
        _adapter(use_rslora=True, rank_pattern={"down_proj": 2}),
        False,
    ),
    ("PEFT", "DoRA", PEFT, _adapter(use_dora=True), False),
    (
        "PEFT",
        "LoRA of embedding and head, with a scaling a layer",
        PEFT,
        _adapter(
            target_modules=["embed_tokens", "lm_head"], alpha_pattern={"lm_head": 2}
        ),
        False,
    ),
    ("PEFT", "LoRA of stacked experts (target_parameters)", PEFT, _experts, False),
    (
        "PEFT",
        "LoRA with whole embeddings (modules_to_save)",
        PEFT,
        _adapter(modules_to_save=["embed_tokens", "lm_head"]),
        False,
    ),
    ("PEFT", "an adapter of another kind (VeRA)", PEFT, _other_adapter, False),
    (
        "PEFT",
        "LoRA that began as PiSSA (OLoRA, QA-LoRA, ... alike)",
        PEFT,
        _adapter(init_lora_weights="pissa"),
        False,
    ),
    ("MLX", "LoRA in another library's form", "", _mlx, False),
    (
        "PEFT",
        "an adapter that was not merged, among whole weights",
        PEFT,
        _unmerged,
        False,
    ),
    (
        "anyone",
        "a vocabulary that was resized or padded",
        TRANSFORMERS,
        _resized,
        False,
    ),
    ("FSDP1, local state", "a flat parameter", TORCH, _flat, False),
    ("ZeRO-3, not gathered", "tensors without entries", TORCH, _empty, False),
    ("vLLM, TensorRT-LLM", "the shares of ranks", "", _shares, False),
    ("GPTQ, AWQ", "packed codes", "", _codes("qweight", "qzeros", "scales"), False),
    ("MLX, quantised", "packed codes", "", _codes("weight", "scales", "biases"), False),
    ("HQQ", "packed codes", "", _codes("W_q", "scale", "zero"), False),
    (
        "bitsandbytes",
        "packed codes",
        "",
        _codes("weight", "weight.absmax", "weight.quant_map"),
        False,
    ),
    ("FP8 exports", "codes and scales", TORCH, _quantised, False),
    ("FP8 exports", "the same, with --dequantise", TORCH, _quantised, True),
    (
        "DeepSeek, Qwen FP8",
        "codes and scales of blocks, with --dequantise",
        TORCH,
        _blocks,
        True,
    ),
    ("gpt-oss", "MXFP4, with --dequantise", TRANSFORMERS, _mxfp4, True),
    (
        "llm-compressor",
        "packed integers, with --dequantise",
        "compressed-tensors",
        _packed,
        True,
    ),
    ("llama.cpp", "GGUF of Qwen 3, in bf16", "gguf", _gguf("qwen3", "BF16"), False),
    (
        "llama.cpp",
        "GGUF of Qwen 3, quantised, with --dequantise",
        "gguf",
        _gguf("qwen3", "Q8_0"),
        True,
    ),
    (
        "llama.cpp",
        "GGUF of a family that stores matrices otherwise",
        "gguf",
        _gguf("falcon", "BF16"),
        False,
    ),
    ("slime, with deltas", "weight_vN with differences of bytes", "", _delta, False),
    ("DeepSpeed, OpenRLHF", "ZeRO shards that were not gathered", "", _zero, False),
    (
        "slime, verl and SkyRL with Megatron",
        "torch_dist (.distcp, common.pt)",
        "",
        _megatron,
        False,
    ),
    (
        "Megatron",
        "its names, fused qkv and fc1, a padded vocabulary, beside config.json",
        "",
        _megatron_names,
        False,
    ),
    (
        "any run's folder",
        "weights in checkpoint-* alone",
        TRANSFORMERS,
        _run_folder,
        False,
    ),
]
ACCELERATE = "accelerate"
TWO_PROCESSES = [
    (
        "as verl and SkyRL",
        "model_world_size_2_rank_R.pt (FSDP2)",
        TORCH,
        "global_step_3",
    ),
    (
        "accelerate, TRL (FSDP2)",
        "pytorch_model_fsdp_0 (DCP)",
        ACCELERATE,
        "checkpoint-3",
    ),
    (
        "accelerate, TRL (FSDP2)",
        "pytorch_model_fsdp_0_rankR.bin",
        ACCELERATE,
        "checkpoint-4",
    ),
    (
        "accelerate, TRL (FSDP2)",
        "pytorch_model_fsdp.bin, whole",
        ACCELERATE,
        "checkpoint-5",
    ),
    ("as prime-rl and AReaL", "DCP with the optimizer in it", TORCH, "step_4"),
    ("as NeMo-RL", "safetensors slices with offsets (DCP)", TORCH, "step_3"),
]


def outcome(before: Path, after: Path, dequantise: bool = False) -> tuple[str, str]:
    """(read, partly or refused; the line)."""
    folder = str(after)
    try:
        plan = pairs.plan_pair(before, after, dequantise=dequantise)
    except (ValueError, OSError) as error:
        return "refused", re.sub(r"(?<=\s)/\S*/", "", str(error).replace(folder, "DIR"))
    if plan.measured < 0.5:
        (reason,) = {s.reason for s in plan.skipped if s.unreadable}
        return "in part", f"{reason}; measured are the other matrices"
    if plan.measured < 0.9:
        raise SystemExit(f"{after}: {plan.measured:.2f} of the weights are measured")
    notes = [n for n in plan.notes if n.startswith(folder)]
    said = "; ".join(n.removeprefix(folder).strip(": ") for n in notes)
    return "read", re.sub(r"(?<=\s)/\S*/", "", said)


def rows() -> list[dict[str, str]]:
    """Every checkpoint, written and opened."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        _model().save_pretrained(place / "base")
        for i, (who, layout, library, write, dequantise) in enumerate(ONE_PROCESS):
            folder = place / str(i)
            folder.mkdir()
            after = write(folder)
            own = folder / "base"  # of a writer that has another model
            base = own if own.is_dir() else place / "base"
            read, line = outcome(base, after, dequantise)
            release = f"{library} {version(library)}" if library else "by hand"
            found.append((who, layout, release, read, line))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        command = [sys.executable, str(ROOT / "tests" / "ranks.py"), str(place)]
        children = [subprocess.Popen([*command, str(r), port]) for r in range(2)]
        if [child.wait(300) for child in children] != [0, 0]:
            raise SystemExit("a process of tests/ranks.py failed")
        for who, layout, library, folder_name in TWO_PROCESSES:
            read, line = outcome(place / "whole", place / folder_name)
            found.append((who, layout, f"{library} {version(library)}", read, line))
    return [dict(zip(FIELDS, row, strict=True)) for row in found]


def page(table: list[dict[str, str]]) -> str:
    """The table as a page of the book."""
    head = " | ".join(FIELDS)
    lines = [f"| {head} |", "|" + "---|" * len(FIELDS)]
    lines += ["| " + " | ".join(row[f] for f in FIELDS) + " |" for row in table]
    return INTRODUCTION + "\n".join(lines) + "\n"


INTRODUCTION = """# Which checkpoints are read

What trainers and libraries leave, each written by the library itself at a tiny size and
opened beside its base. `in part` measures what is not quantised and ends with an error
code; what is refused stands here with its line, where DIR is the folder that was given.
Nothing in a file is run: pickles go through torch's restricted loader of tensors.

"""


README, START, END = ROOT / "README.md", "<!-- formats -->", "<!-- end of formats -->"


def readme(text: str, table: list[dict[str, str]]) -> str:
    """README.md with the table's first columns between its marks."""
    fields = FIELDS[:2] + FIELDS[3:4]
    lines = [f"| {' | '.join(fields)} |", "|" + "---|" * len(fields)]
    lines += ["| " + " | ".join(row[f] for f in fields) + " |" for row in table]
    before, rest = text.split(START)
    body = "\n".join(lines)
    return f"{before}{START}\n\n{body}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Write the table, the page and README's part of it."""
    table = rows()
    README.write_text(
        readme(README.read_text(encoding="utf-8"), table), encoding="utf-8"
    )
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(table)
    PAGE.write_text(page(table), encoding="utf-8")


if __name__ == "__main__":
    main()

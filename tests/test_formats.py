"""Checkpoints as trainers and libraries write them, read or refused with the cause.

Each row of data/formats.csv is one of these, with the line that a reader sees.
"""

import json
import math
import os
import pickle
import re
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import ranks
import torch
from children import Child
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd_geometry.geometry import (
    checkpoints,
    pairs,
    quantised,
    storage,
    training_formats,
)
from opd_geometry.geometry.checkpoints import list_pairs, open_checkpoint

HERE = Path(__file__).parent


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def save(path: Path, tensors: dict, config: dict | None = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: w.contiguous() for name, w in tensors.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def equal(before: Path, after: Path) -> bool:
    """Whether all matrices are paired and equal."""
    a, b = checkpoints.open_pair(before, after)
    found = list_pairs(a, b)
    same = all(torch.equal(*pair.read()) for pair in found)
    return same and len(found) == len(a.cuts) == len(b.cuts)


# --- trainers of several processes -------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that two processes have sharded, trained for a step and saved."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    both = [Child(folder / "data", ranks.main, folder, r, port) for r in range(2)]
    for child in both:
        child.result()
        assert child.process.exitcode == 0
    return folder


@pytest.mark.parametrize(
    "place",
    [
        "global_step_3",  # verl, SkyRL: rank files
        "global_step_3/actor",
        "checkpoint-3",  # accelerate, TRL: torch's distributed checkpoint
        "checkpoint-3/pytorch_model_fsdp_0",
        "checkpoint-4",  # accelerate without DCP: a file a rank
        "checkpoint-5",  # accelerate, the whole state in one file
        "step_4",  # prime-rl: with the optimizer
        "step_3",  # NeMo-RL: slices in safetensors
    ],
)
def test_what_two_processes_saved_is_put_together(trained: Path, place: str) -> None:
    assert equal(trained / "whole", trained / place)


def test_files_of_distributed_saves_are_refused_by_themselves(trained: Path) -> None:
    for file, said in (
        ("global_step_3/actor/model_world_size_2_rank_0.pt", "the share of one rank"),
        ("step_4/trainer/__0_0.distcp", "a part of a distributed checkpoint"),
        ("checkpoint-4/pytorch_model_fsdp_0_rank0.bin", "holds one rank's share"),
        (
            "step_3/policy/weights/model/shard-00002-model-00001-of-00001.safetensors",
            "slices of a distributed save",
        ),
    ):
        with pytest.raises(ValueError, match=f"{said}.*give the directory"):
            open_checkpoint(trained / file)


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("global_step_3/actor/model_world_size_2_rank_1.pt", "files of 1 ranks"),
        ("step_4/trainer/__1_0.distcp", "lacks 1 files of its metadata"),
        ("checkpoint-4/pytorch_model_fsdp_0_rank1.bin", "holds one rank's share"),
        (
            "step_3/policy/weights/model/shard-00001-model-00001-of-00001.safetensors",
            "has no whole .*pieces hold",
        ),
    ],
)
def test_a_lost_share_is_named(trained: Path, lost: str, said: str) -> None:
    hidden = trained / "hidden"
    (trained / lost).rename(hidden)
    try:
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            open_checkpoint((trained / lost).parent)
    finally:
        hidden.rename(trained / lost)


class Planted:
    """What a pickle may hold: calls something when it is read. Here print."""

    def __reduce__(self) -> tuple:
        return print, ("executed",)


def test_planted_objects_are_named_and_never_built(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    dcp = tmp_path / "dcp"
    dcp.mkdir()
    (dcp / ".metadata").write_bytes(pickle.dumps({"a": Planted()}))
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    for rank in range(2):
        torch.save({"a": Planted()}, ranks / f"model_world_size_2_rank_{rank}.pt")
    for path in (dcp, ranks):
        with pytest.raises(ValueError, match=r"holds .*print.* no tensor"):
            open_checkpoint(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"x", pickle.dumps([1]), pickle.dumps(None)])
def test_damaged_metadata_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"metadata is damaged") as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_plain_tensors_of_several_ranks_are_refused(tmp_path: Path) -> None:
    for rank in range(2):
        w = {"a.weight": noise(2, 4)}
        torch.save(w, tmp_path / f"model_world_size_2_rank_{rank}.pt")
    with pytest.raises(ValueError, match=r"plain tensor.*model_merger"):
        open_checkpoint(tmp_path)
    one = tmp_path / "one"
    one.mkdir()
    torch.save(w, one / "model_world_size_1_rank_0.pt")
    assert list(open_checkpoint(one).cuts) == ["a.weight"]


# --- adapters ----------------------------------------------------------------------

TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]


def _adapted(folder: Path, model: Callable, **settings: object) -> tuple[Path, ...]:
    """(base, adapter, merged) as PEFT saves them, B drawn at random."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = model().to(torch.bfloat16)
    base.save_pretrained(folder / "base")
    config = {"r": 4, "lora_alpha": 16, "target_modules": PROJECTIONS} | settings
    wrapped = peft.get_peft_model(base, peft.LoraConfig(**config))
    with torch.no_grad():
        for name, w in wrapped.named_parameters():
            if "lora_B" in name or "lora_embedding" in name or "modules_to" in name:
                w.add_(0.02 * torch.randn_like(w))
            if "magnitude" in name:
                w.mul_(1.01)
    wrapped.save_pretrained(folder / "adapter")
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    return folder / "base", folder / "adapter", folder / "merged"


def _qwen() -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**TINY, head_dim=8, tie_word_embeddings=False))


def _gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 40, "n_embd": 32, "n_layer": 1, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, n_positions=16))


def _phi3() -> torch.nn.Module:
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(**TINY, pad_token_id=0))


def _moe() -> torch.nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"moe_intermediate_size": 16, "num_experts": 3, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**TINY, **sizes, head_dim=8))


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
OWN_RANKS = {
    "rank_pattern": {"experts.down_proj": 2},
    "alpha_pattern": {"layers.1.mlp.experts.gate_up_proj": 3},
}


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (_qwen, {}),
        (_qwen, {"use_rslora": True}),
        (_qwen, {"use_dora": True}),
        (_qwen, {"rank_pattern": {"layers.1.mlp.down_proj": 2}}),
        (_qwen, {"alpha_pattern": {"v_proj": 3}, "rank_pattern": {"q_proj": 7}}),
        (_qwen, {"modules_to_save": ["lm_head", "embed_tokens"]}),
        (_qwen, {"target_modules": ["embed_tokens", "o_proj"]}),
        (_gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        (_phi3, {"target_modules": ["qkv_proj", "gate_up_proj"]}),
        (_moe, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
        (_moe, {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]}),
        (_qwen, {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
        (_moe, {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}),
        (_moe, {"target_parameters": EXPERTS, "target_modules": [], **OWN_RANKS}),
    ],
)
def test_a_merged_adapter_is_what_peft_merges(
    model: Callable, settings: dict, tmp_path: Path
) -> None:
    """To the last bit, for every matrix."""
    base, adapter, merged = _adapted(tmp_path, model, **settings)
    a, b = checkpoints.open_pair(base, adapter)
    expected = open_checkpoint(merged)
    assert {*b.cuts} == {*a.cuts} == {*expected.cuts}
    moved = 0
    for name, cut in b.cuts.items():
        w = cut.read()
        assert torch.equal(w, expected.cuts[name].read()), name
        moved += not torch.equal(w, a.cuts[name].read())
    assert moved > 0


def test_the_update_of_an_adapter_is_known_from_its_factors(tmp_path: Path) -> None:
    base, adapter, _ = _adapted(tmp_path, _qwen)
    settings = pairs.Settings(hill_k=3)
    table = pairs.measure_checkpoints(base, adapter, settings, null=False)
    table = table.set_index("matrix")
    stored = load_file(adapter / "adapter_model.safetensors")
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        a, b = (
            stored[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB"
        )
        s = torch.linalg.svdvals(4 * b @ a)
        row = table.loc[f"{module}.weight"]
        norm = float(torch.linalg.norm(s))
        assert row["adapter_norm"] == pytest.approx(norm, rel=1e-9)
        assert row["stable_rank"] == pytest.approx((norm / float(s[0])) ** 2, rel=1e-9)
        hill = pairs.spectra.hill_exponent(s, 3)
        assert row["hill_alpha"] == pytest.approx(hill, rel=1e-9)
        assert row["frobenius_norm"] != row["adapter_norm"]  # of what is stored
    assert math.isnan(table.loc["model.embed_tokens.weight", "adapter_norm"])
    run = pairs.plan_trajectory(base, [adapter], k=2, steps=[1])
    task = next(t for t in run.tasks if t.name == f"{module}.weight")
    (row,) = task.rows()
    assert row["frobenius_norm"] == pytest.approx(norm, rel=1e-9)
    assert row["similarity_to_end"] == pytest.approx(1)


def test_two_adapters_differ_by_their_updates(tmp_path: Path) -> None:
    _, first, _ = _adapted(tmp_path / "1", _qwen)
    _, other, _ = _adapted(tmp_path / "2", _qwen, lora_alpha=8)
    still = pairs.measure_checkpoints(first, first, null=False)
    assert (still["frobenius_norm"] == 0).all()
    table = pairs.measure_checkpoints(first, other, null=False).set_index("matrix")
    assert len(table) == 6
    stored = load_file(first / "adapter_model.safetensors")
    module = "model.layers.0.self_attn.q_proj"
    a, b = (stored[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
    norm = float(torch.linalg.norm((2 - 4) * b.double() @ a.double()))
    assert table.loc[f"{module}.weight", "frobenius_norm"] == pytest.approx(norm)
    assert table["sparsity_bf16"].isna().all()
    # An update is no weight.
    base = tmp_path / "1" / "base"
    for order in ((first, base), (base, open_checkpoint(first))):
        with pytest.raises(ValueError, match="an update and weights cannot be comp"):
            pairs.plan_pair(*order)
    # With a base they are weights again.
    plan = pairs.plan_pair(first, other, base=tmp_path / "1" / "base")
    assert len(plan.tasks) == 16


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "VERA"}, "the kind 'VERA', expected LORA"),
        ({"r": 3}, "says r = 3"),
        ({"r": -4}, "r = -4"),
        ({"lora_alpha": "16"}, "lora_alpha = '16'"),
        ({"lora_alpha": 10**400}, "lora_alpha = 1000"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
        ({"rank_pattern": [1]}, "rank_pattern = .*expected an object"),
        ({"rank_pattern": {"(": 2}}, "no pattern"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which takes a part"),
        ({"init_lora_weights": "olora"}, "takes a part out of the base weights"),
        ({"use_qalora": True}, "with use_qalora, expected the plain form"),
        ({"layer_replication": [[0, 1]]}, "with layer_replication"),
        ({"target_parameters": "mlp"}, "target_parameters = 'mlp', expected a list"),
    ],
)
def test_an_adapter_that_does_not_fit_is_named(
    change: dict, said: str, tmp_path: Path
) -> None:
    stored = {
        "base_model.model.layers.0.q_proj.lora_A.weight": noise(4, 8),
        "base_model.model.layers.0.q_proj.lora_B.weight": noise(8, 4),
    }
    save_file(stored, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16} | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = save(tmp_path / "base", {"layers.0.q_proj.weight": noise(8, 8)})
    with pytest.raises(ValueError, match=said):
        checkpoints.open_pair(base, tmp_path)


def test_adapters_of_other_libraries_and_their_folders_are_named(
    tmp_path: Path,
) -> None:
    pair = {
        "layers.0.q_proj.lora_a": noise(8, 4),
        "layers.0.q_proj.lora_b": noise(4, 8),
    }
    mlx = save(tmp_path / "mlx", pair)
    (mlx / "model.safetensors").rename(mlx / "adapters.safetensors")
    with pytest.raises(ValueError, match=r"another library's form .*mlx_lm.fuse"):
        open_checkpoint(mlx)
    _, adapter, _ = _adapted(tmp_path / "peft", _qwen)
    outer = tmp_path / "out"
    outer.mkdir()
    adapter.rename(outer / "policy")
    with pytest.raises(ValueError, match=r"but an adapter in policy/.*give .*policy"):
        open_checkpoint(outer)


def test_a_bias_beside_b_moves_no_matrix(tmp_path: Path) -> None:
    base, adapter, merged = _adapted(tmp_path, _qwen)
    place = adapter / "adapter_model.safetensors"
    stored = load_file(place)
    biases = {
        n.replace(".weight", ".bias"): w[:, 0] for n, w in stored.items() if "_B" in n
    }
    save_file(stored | {n: w.contiguous() for n, w in biases.items()}, place)
    _, b = checkpoints.open_pair(base, adapter)
    expected = open_checkpoint(merged)
    for name, cut in b.cuts.items():
        assert torch.equal(cut.read(), expected.cuts[name].read()), name


def test_peft_moves_the_base_of_a_pissa_adapter(tmp_path: Path) -> None:
    """Why it is refused: W + s B A is not what PEFT merges."""
    base, adapter, merged = _adapted(tmp_path, _qwen, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="'pissa'"):
        checkpoints.open_pair(base, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["init_lora_weights"] == "pissa"
    config["init_lora_weights"] = True
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    _, b = checkpoints.open_pair(base, adapter)
    name = "model.layers.0.self_attn.q_proj.weight"
    other = open_checkpoint(merged).cuts[name].read().float()
    assert not torch.allclose(b.cuts[name].read().float(), other, rtol=0.05)


def test_an_unmerged_adapter_needs_its_config(tmp_path: Path) -> None:
    base, adapter, merged = _adapted(tmp_path, _qwen)
    stored = load_file(base / "model.safetensors")
    mixed = {}
    for name, w in load_file(adapter / "adapter_model.safetensors").items():
        name = name.removeprefix("base_model.model.").replace("_A.", "_A.default.")
        mixed[name.replace("_B.", "_B.default.")] = w
    modules = {name.partition(".lora_")[0] for name in mixed}
    for name, w in stored.items():
        module = name.removesuffix(".weight")
        mixed[f"{module}.base_layer.weight" if module in modules else name] = w
    place = save(tmp_path / "mixed", mixed)
    with pytest.raises(ValueError, match=r"not merged .*no adapter_config.json"):
        open_checkpoint(place)
    (place / "adapter_config.json").write_bytes(
        (adapter / "adapter_config.json").read_bytes()
    )
    assert equal(merged, place)


# --- codes -------------------------------------------------------------------------


def _blocks(w: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """FP8 codes and their scales, block by block."""
    rows, cols = (-(-side // n) for side in w.shape)
    scales = torch.zeros(rows, cols)
    codes = torch.zeros(w.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(cols):
            here = slice(i * n, (i + 1) * n), slice(j * n, (j + 1) * n)
            scales[i, j] = w[here].abs().max() / 448
            codes[here] = (w[here] / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def test_fp8_is_measured_only_where_it_is_asked_for(tmp_path: Path) -> None:
    """Ragged blocks as DeepSeek has them: 20 rows in blocks of 8."""
    w = noise(20, 24)
    codes, scales = _blocks(w, 8)
    stored = {"a.q_proj.weight": codes, "a.q_proj.weight_scale_inv": scales}
    said = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    other = {"embed_tokens.weight": noise(40, 24)}
    b = save(tmp_path / "b", stored | other, {"quantization_config": said})
    a = save(tmp_path / "a", {"a.q_proj.weight": w} | other)
    plan = pairs.plan_pair(a, b)
    assert [task.name for task in plan.tasks] == ["embed_tokens.weight"]
    assert (
        "quantised (fp8)" in {s.name: s.reason for s in plan.skipped}["a.q_proj.weight"]
    )
    plan = pairs.plan_pair(a, b, dequantise=True)
    table = pairs.run_plan(plan).set_index("matrix")
    assert table.loc["a.q_proj.weight", "relative_norm"] < 0.05
    assert "after: dequantised from FP8" in table.loc["a.q_proj.weight", "note"]
    assert table.loc["embed_tokens.weight", "note"] == ""


def test_fp8_is_dequantised_as_transformers_does(tmp_path: Path) -> None:
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    codes, scales = _blocks(noise(16, 24), 8)
    stored = {"a.q_proj.weight": codes, "a.q_proj.weight_scale_inv": scales}
    path = save(tmp_path, stored, {"quantization_config": {"quant_method": "fp8"}})
    cut = open_checkpoint(path, dequantise=True).cuts["a.q_proj.weight"]
    expected = module.Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
    torch.testing.assert_close(cut.read(), expected, rtol=1e-6, atol=0)


def test_mxfp4_is_made_weights_by_transformers(tmp_path: Path) -> None:
    module = pytest.importorskip("transformers.integrations.mxfp4")
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 64, 1, 16), generator=generator).byte()
    scales = torch.full((2, 64, 1), 120, dtype=torch.uint8)
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    config = {"model_type": "gpt_oss", "hidden_size": 32}
    path = save(
        tmp_path, {f"{stack}_blocks": blocks, f"{stack}_scales": scales}, config
    )
    assert open_checkpoint(path).cuts == {}
    found = open_checkpoint(path, dequantise=True).cuts
    whole = module.convert_moe_packed_tensors(blocks, scales)  # (experts, in, 2 out)
    for expert in range(2):
        for name, rows in (("gate", slice(0, None, 2)), ("up", slice(1, None, 2))):
            cut = found[f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight"]
            assert torch.equal(cut.read(), whole[expert][:, rows].T)


@pytest.mark.parametrize(
    ("form", "size", "strategy"),
    [("nvfp4", 16, "tensor_group"), ("mxfp4", 32, "group")],
)
def test_two_codes_in_a_byte_are_made_weights_by_their_library(
    form: str, size: int, strategy: str, tmp_path: Path
) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams
    from compressed_tensors.quantization.utils.helpers import generate_gparam

    said = {"num_bits": 4, "type": "float", "strategy": strategy, "group_size": size}
    weights = QuantizationArgs(**said)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    own = f"{form}-pack-quantized"
    library = BaseCompressor.get_value_from_registry(own)
    w = noise(8, 64).bfloat16()
    groups = w.float().reshape(8, -1, size)
    state, ends = {"weight": w}, (groups.amin(-1), groups.amax(-1))
    if form == "nvfp4":
        scale = generate_gparam(w.float().amin(), w.float().amax()).reshape(1)
        state["weight_global_scale"] = scale
        state["weight_scale"] = calculate_qparams(*ends, weights, scale)[0]
    else:
        state["weight_scale"] = calculate_qparams(*ends, weights)[0]
    codes = library.compress(dict(state), scheme)
    expected = library.decompress(dict(codes), scheme)["weight"]
    config = {"quant_method": "compressed-tensors", "format": own}
    config |= {"config_groups": {"group_0": json.loads(scheme.model_dump_json())}}
    tensors = {f"layers.0.q_proj.{name}": code for name, code in codes.items()}
    place = save(tmp_path, tensors, {"quantization_config": config})
    assert not open_checkpoint(place).cuts
    (cut,) = open_checkpoint(place, dequantise=True).cuts.values()
    assert (cut.matrix.shape, cut.matrix.dtype) == ((8, 64), "bfloat16")
    assert torch.equal(cut.read(), expected)


def test_packed_integers_are_made_weights_by_their_library(tmp_path: Path) -> None:
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers"
    )
    w = noise(16, 64)
    scale = w.reshape(16, 2, 32).abs().amax(-1) / 7
    codes = (w.reshape(16, 2, 32) / scale[..., None]).round().clamp(-8, 7)
    stored = {
        "a.q_proj.weight_packed": helpers.pack_to_int32(
            codes.reshape(16, 64).to(torch.int8), 4
        ),
        "a.q_proj.weight_scale": scale.bfloat16(),
        "a.q_proj.weight_shape": torch.tensor([16, 64]),
    }
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    said = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config = {"quantization_config": said | {"config_groups": groups}}
    path = save(tmp_path, stored, config)
    assert open_checkpoint(path).cuts == {}
    cut = open_checkpoint(path, dequantise=True).cuts["a.q_proj.weight"]
    expected = codes.reshape(16, 64) * scale.bfloat16().float().repeat_interleave(32, 1)
    torch.testing.assert_close(cut.read().float(), expected, rtol=0.01, atol=0)


@pytest.mark.parametrize(
    "companions",
    [
        {"qweight": "I", "qzeros": "I", "scales": "F", "g_idx": "I"},  # GPTQ, AWQ
        {"weight": "I", "scales": "F", "biases": "F"},  # MLX
        {"W_q": "B", "scale": "F", "zero": "F"},  # HQQ
        {"weight": "B", "weight.absmax": "B", "weight.quant_map": "F"},  # bitsandbytes
        {"weight": "F", "weight_scale_inv": "F"},  # FP8 codes that were cast
        {"weight_packed": "I", "weight_scale": "F", "weight_shape": "I"},
        {"_weight_qdata": "B", "_weight_scale": "F"},  # torchao
        {"weight._data": "B", "weight._scale": "F"},  # quanto
        {"q_weight": "I", "q_scale": "I", "q_scale_max": "F"},  # EXL2
        {"weight": "B", "SCB": "F"},  # LLM.int8
        {"indices": "I", "centroids.weight": "F", "res_centroids.weight": "F"},  # VPTQ
        {"weight": "B", "weight_scale": "F", "weight_scale_2": "F"},  # NVFP4
        {"codes": "I", "codebooks": "F", "scales": "F"},  # AQLM
        {"qweight": "I", "scales": "F", "forward_hadamard_matrix": "F"},  # FP-Quant
    ],
)
def test_no_tensor_of_a_quantised_module_is_a_matrix(
    companions: dict, tmp_path: Path
) -> None:
    made = {
        "I": torch.ones(8, 8, dtype=torch.int32),
        "B": torch.ones(8, 8, dtype=torch.uint8),
        "F": noise(8, 8),
    }
    stored = {
        f"a.q_proj.{name}": made[kind].clone() for name, kind in companions.items()
    }
    stored["a.k_proj.weight"] = noise(8, 8, seed=1)
    found = open_checkpoint(save(tmp_path, stored))
    assert list(found.cuts) == ["a.k_proj.weight"]
    assert all(skip.unreadable for skip in found.skipped.values())
    assert quantised.module_of("a.q_proj.weight.absmax") == "a.q_proj"


def test_scales_of_attention_say_nothing_of_its_projections(tmp_path: Path) -> None:
    stored = {"l.attn.scales": noise(4), "l.attn.q_proj.weight": noise(4, 4)}
    assert list(open_checkpoint(save(tmp_path, stored)).cuts) == [
        "l.attn.q_proj.weight"
    ]


def test_deltas_and_flat_parameters_are_no_weights(tmp_path: Path) -> None:
    delta = save(tmp_path / "weight_v000012", {"a.weight": noise(4, 4)})
    (delta / "model.safetensors").rename(delta / "model-00001-of-00001.safetensors")
    described = {"delta_encoding": "xor", "base_version": "000011"}
    index = {
        "metadata": described,
        "weight_map": {"a.weight": "model-00001-of-00001.safetensors"},
    }
    (delta / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"delta checkpoint .'xor'.*000011"):
        open_checkpoint(delta)
    alone = tmp_path / "alone.safetensors"
    save_file({"a.weight": noise(4, 4)}, alone, described)
    with pytest.raises(ValueError, match=r"alone.safetensors is of a delta checkpoint"):
        open_checkpoint(alone)
    for i, leaf in enumerate(("_flat_param", "flat_param", "flat_param_0")):
        flat = save(tmp_path / f"flat{i}", {f"layers.0.{leaf}": noise(4, 4)})
        (skip,) = open_checkpoint(flat).skipped.values()
        assert "flat parameter of FSDP" in skip.reason


# --- malformed ---------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1, 0, 10**30, 2**24 + 1, 1.5, True, "4", [4], None])
@pytest.mark.parametrize(
    "key", ["num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim"]
)
def test_a_config_asks_for_no_more_than_its_tensors_hold(
    key: str, value: object, tmp_path: Path
) -> None:
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8}
    tensors = {
        "layers.0.attn.qkv_proj.weight": noise(16, 8),
        "layers.0.attention.query_key_value.weight": noise(24, 8),
        "layers.0.mlp.experts.gate_up_proj": noise(2, 8, 6),
    }
    path = save(tmp_path, tensors, config | {key: value, "model_type": "bloom"})
    found = open_checkpoint(path)
    for cut in found.cuts.values():
        assert tuple(cut.read().shape) == cut.matrix.shape


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_deep_json_is_one_line(name: str, tmp_path: Path) -> None:
    path = save(tmp_path, {"a.weight": noise(4, 4)})
    if "index" in name:
        (path / "model.safetensors").unlink()
    (path / name).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=f"{name}.*(nested too deeply|not JSON)"):
        open_checkpoint(path)


def test_pipes_and_folders_in_the_place_of_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    for path in (tmp_path, tmp_path / "x.safetensors"):
        with pytest.raises(ValueError, match=r"no regular file|no .safetensors file"):
            open_checkpoint(path)
    for name in ("config.json", "model.safetensors", "model.safetensors.index.json"):
        path = save(tmp_path / name.replace(".", "_"), {"a.weight": noise(4, 4)})
        (path / name).unlink(missing_ok=True)
        (path / name).mkdir()
        with pytest.raises(ValueError, match=f"{name} is no regular file"):
            open_checkpoint(path)


@pytest.mark.parametrize(
    "name", ["x.gguf", "model_world_size_1_rank_0.pt", "pytorch_model.bin", ".metadata"]
)
def test_a_pipe_under_a_trainers_name_is_not_waited_for(
    name: str, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is no regular file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [[1], {"a": 1}, 3, None])
def test_a_family_is_a_word(value: object, tmp_path: Path) -> None:
    config = {"model_type": value, "quantization_config": value}
    stored = {"layers.0.q_proj.weight": noise(4, 4)}
    assert len(open_checkpoint(save(tmp_path, stored, config)).cuts) == 1


def test_the_base_of_an_adapter_may_be_of_no_user(tmp_path: Path) -> None:
    _, adapter, _ = _adapted(tmp_path, _qwen)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "~nobody-of-that-name/base"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert "updates alone" in open_checkpoint(adapter).notes[0]


def test_absurd_layers_are_outside_of_the_blocks(tmp_path: Path) -> None:
    name = f"layers.{10**30}.q_proj.weight"
    found = open_checkpoint(save(tmp_path, {name: noise(4, 4)})).cuts[name]
    assert found.matrix.layer == -1


def test_names_of_distributed_pieces_stay_inside_their_folder(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"a": noise(4, 4)}, checkpoint_id=tmp_path / "x", no_dist=True)
    file = tmp_path / "x" / ".metadata"
    content = file.read_bytes()
    assert content.count(b"__0_0.distcp") == 1
    file.write_bytes(content.replace(b"__0_0.distcp", b"../a.distcp\x00"))
    with pytest.raises(ValueError, match=r"expected a file beside it|is damaged"):
        training_formats.from_dcp(tmp_path / "x")


@pytest.mark.parametrize("n_rows", [3, 5])
def test_one_piece_is_held_against_its_metadata(tmp_path: Path, n_rows: int) -> None:
    import torch.distributed.checkpoint as dcp

    for n, folder in ((4, "said"), (n_rows, "held")):
        dcp.save({"a": noise(n, 4)}, checkpoint_id=tmp_path / folder, no_dist=True)
    (whole,) = training_formats.from_dcp(tmp_path / "held")
    assert whole.place[:].shape == (n_rows, 4)
    wider = storage.put_together(
        tmp_path, "a", (n_rows, 4), "float64", [((0, 0), (n_rows, 4), whole.place)]
    )
    assert wider.place[:].dtype == torch.float64
    (tmp_path / "held" / "__0_0.distcp").rename(tmp_path / "said" / "__0_0.distcp")
    (other,) = training_formats.from_dcp(tmp_path / "said")
    with pytest.raises(ValueError, match=rf"0\.distcp holds .*\({n_rows}, 4\), exp"):
        other.place[:]


def test_every_error_names_its_file(tmp_path: Path) -> None:
    path = save(tmp_path, {"a.weight": noise(40, 40)})
    file = path / "model.safetensors"
    whole = file.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(60):
        changed = bytearray(whole)
        changed[generator.integers(0, 90)] ^= 1 << generator.integers(0, 8)
        file.write_bytes(bytes(changed))
        said = ""
        try:
            for cut in open_checkpoint(path).cuts.values():
                cut.read()
        except ValueError as error:
            said = str(error)
        assert not said or re.search(r"model\.safetensors", said)
        assert "\n" not in said


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\x03\x04", b"\x80\x02}q\x00."])
def test_what_is_no_archive_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"pytorch_model.bin (cannot be|holds)"):
        open_checkpoint(tmp_path)


def test_the_page_and_the_readme_are_of_the_committed_table() -> None:
    root = HERE.parent
    table = pd.read_csv(root / "data" / "formats.csv", keep_default_na=False)
    page = (root / "book" / "formats.md").read_text()
    for row in table.itertuples(index=False):
        assert "| " + " | ".join(row) + " |" in page
    assert page.count("\n| ") == len(table) + 1
    said = (root / "README.md").read_text()
    inside = said.split("<!-- formats -->")[1].split("<!-- end of formats -->")[0]
    shown = [line for line in inside.splitlines() if line.startswith("| ")][1:]
    assert shown == [f"| {r[0]} | {r[1]} | {r[3]} |" for r in table.to_numpy()]
    for layout in ("adapter", "DCP", "ZeRO", "torch_dist", "GGUF", "FP8", "MXFP4"):
        rows = table["written by"] + table["layout"] + table["library"]
        assert rows.str.contains(layout, case=False).any()

"""Fused, turned and stacked weights of real families; parts; paths; steps; folders."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

from opd_geometry import cli
from opd_geometry.geometry import (
    checkpoints,
    layouts,
    matching,
    pairs,
    sampling,
    steps,
)
from opd_geometry.geometry.checkpoints import open_checkpoint
from opd_geometry.pair_commands import measure_command, trajectory_command

WIDTH, HEADS, GROUPS, SIDE = 32, 4, 2, 8  # model, heads, key-value heads, a head


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def save(path: Path, tensors: dict, config: dict | None = None, **more: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: w.contiguous() for name, w in tensors.items()}
    save_file(tensors, path / more.get("file", "model.safetensors"), {"format": "pt"})
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


# --- fused projections -------------------------------------------------------------


def thirds(w: Tensor) -> list[Tensor]:
    return [w[:WIDTH], w[WIDTH : 2 * WIDTH], w[2 * WIDTH :]]


def by_head(w: Tensor) -> list[Tensor]:
    heads = w.reshape(HEADS, 3, SIDE, WIDTH)
    return [heads[:, i].reshape(-1, WIDTH) for i in range(3)]


def stacked(w: Tensor) -> list[Tensor]:
    q, k = HEADS * SIDE, (HEADS + GROUPS) * SIDE
    return [w[:q], w[q:k], w[k:]]


def by_group(w: Tensor) -> list[Tensor]:
    groups = w.reshape(GROUPS, HEADS // GROUPS + 2, SIDE, WIDTH)
    parts = groups[:, :-2], groups[:, -2], groups[:, -1]
    return [part.reshape(-1, WIDTH) for part in parts]


def one_key(w: Tensor) -> list[Tensor]:
    return [w[:WIDTH], w[WIDTH : WIDTH + SIDE], w[WIDTH + SIDE :]]


def in_four_groups(w: Tensor) -> list[Tensor]:
    groups = w.reshape(4, 3, WIDTH // 4, WIDTH)
    return [groups[:, i].reshape(-1, WIDTH) for i in (0, 2, 1)]  # q, v, k in each


GROUPED = (HEADS + 2 * GROUPS) * SIDE
FUSED = [
    ("baichuan", "model.layers.0.self_attn.W_pack", 3 * WIDTH, thirds),
    ("qwen", "transformer.h.0.attn.c_attn", 3 * WIDTH, thirds),
    ("mpt", "transformer.blocks.0.attn.Wqkv", 3 * WIDTH, thirds),
    ("dbrx", "transformer.blocks.0.norm_attn_norm.attn.Wqkv", GROUPED, stacked),
    ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value", 3 * WIDTH, by_head),
    ("bloom", "h.0.self_attention.query_key_value", 3 * WIDTH, by_head),
    ("chatglm", "encoder.layers.0.self_attention.query_key_value", GROUPED, stacked),
    ("chatglm ", "encoder.layers.0.self_attention.query_key_value", GROUPED, stacked),
    ("falcon", "h.0.self_attention.query_key_value", (HEADS + 2) * SIDE, one_key),
    ("gpt_bigcode", "transformer.h.0.attn.c_attn", (HEADS + 2) * SIDE, one_key),
    ("internlm2", "model.layers.0.attention.wqkv", GROUPED, by_group),
    ("", "decoder.layers.0.self_attention.linear_qkv", GROUPED, by_group),
    ("phi3", "model.layers.0.self_attn.qkv_proj", GROUPED, stacked),
    ("codegen", "transformer.h.0.attn.qkv_proj", 3 * WIDTH, in_four_groups),
    ("minimax", "model.layers.0.self_attn.qkv_proj", 3 * WIDTH, by_head),
    ("bailing_moe_v2", "model.layers.0.attention.query_key_value", GROUPED, stacked),
    ("molmo", "model.transformer.blocks.0.att_proj", GROUPED, stacked),
    ("modernbert", "model.layers.0.attn.Wqkv", 3 * WIDTH, thirds),
]


@pytest.mark.parametrize(("family", "module", "rows", "split"), FUSED)
def test_fused_projections_are_split_in_the_order_of_their_family(
    family: str, module: str, rows: int, split: Callable, tmp_path: Path
) -> None:
    config = {
        "model_type": family,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "multi_query_group_num": GROUPS,
    }
    if family.endswith(" "):  # converted by someone who named its groups as others do
        config |= {"model_type": family.strip()}
        del config["multi_query_group_num"]
    w = noise(rows, WIDTH)
    found = open_checkpoint(save(tmp_path, {f"{module}.weight": w}, config)).cuts
    expected = dict(zip("qkv", split(w), strict=True))
    assert {cut.matrix.role for cut in found.values()} == {*"qkv"}
    for cut in found.values():
        assert cut.matrix.layer == 0
        assert torch.equal(cut.read(), expected[cut.matrix.role])


def test_codegen_as_the_model_itself_splits_it(
    tmp_path: Path,
) -> None:
    """Against what the real module hands to its attention."""
    from transformers import CodeGenConfig, CodeGenForCausalLM

    sizes = {"n_embd": 16, "n_head": 4, "n_layer": 1, "n_positions": 8}
    model = CodeGenForCausalLM(CodeGenConfig(vocab_size=20, rotary_dim=2, **sizes))
    model.save_pretrained(tmp_path)
    attention, x, seen = model.transformer.h[0].attn, noise(1, 3, 16), []
    split = attention._split_heads
    attention._split_heads = lambda t, *more, **named: (
        seen.append(t) or split(t, *more, **named)
    )
    with torch.no_grad():
        attention(x, position_ids=torch.arange(3)[None])
    cuts = {c.matrix.role: c for c in open_checkpoint(tmp_path).cuts.values()}
    for role, heads in zip("qkv", seen, strict=True):
        flat = heads.reshape(3, -1)
        torch.testing.assert_close(x[0] @ cuts[role].read().T, flat)


def test_a_tower_is_split_without_the_language_models_heads(tmp_path: Path) -> None:
    """Rows that would fit both: thirds, since towers have as many keys as queries."""
    config = {"hidden_size": WIDTH, "num_attention_heads": 4, "num_key_value_heads": 1}
    config |= {"head_dim": 16}  # (4 + 2) * 16 = 3 * 32
    w = noise(3 * WIDTH, WIDTH)
    for i, leaf in enumerate(("qkv.weight", "in_proj_weight", "qkv_proj.weight")):
        name = f"visual.blocks.0.attn.{leaf}"
        cuts = open_checkpoint(save(tmp_path / str(i), {name: w}, config)).cuts
        assert {cut.matrix.part for cut in cuts.values()} == {"vision"}
        expected = dict(zip("qkv", thirds(w), strict=True))
        for cut in cuts.values():
            assert torch.equal(cut.read(), expected[cut.matrix.role])


def test_the_first_chatglm_goes_by_heads(tmp_path: Path) -> None:
    config = {"model_type": "chatglm", "hidden_size": WIDTH}
    name = "transformer.layers.0.attention.query_key_value.weight"
    w = noise(3 * WIDTH, WIDTH)
    stored = save(tmp_path, {name: w}, config | {"num_attention_heads": HEADS})
    expected = dict(zip("qkv", by_head(w), strict=True))
    for cut in open_checkpoint(stored).cuts.values():
        assert torch.equal(cut.read(), expected[cut.matrix.role])


@pytest.mark.parametrize(
    ("fused", "back", "first"),
    [
        ("layers.0.mlp.Wi", "layers.0.mlp.Wo", "gate"),
        (
            "layers.0.shared_mlp.input_linear",
            "layers.0.shared_mlp.output_linear",
            "gate",
        ),
        ("transformer.blocks.0.ff_proj", "transformer.blocks.0.ff_out", "up"),
    ],
)
def test_halves_in_the_order_of_their_family(
    fused: str, back: str, first: str, tmp_path: Path
) -> None:
    stored = {f"{fused}.weight": noise(32, 8), f"{back}.weight": noise(8, 16)}
    cuts = open_checkpoint(save(tmp_path, stored)).cuts.values()
    roles = {cut.matrix.role: cut.read() for cut in cuts}
    assert {*roles} == {"gate", "up", "down"}
    assert torch.equal(roles[first], stored[f"{fused}.weight"][:16])


def test_stacks_beside_the_experts(tmp_path: Path) -> None:
    """Shared experts are an MLP of every token; attention's experts are none."""
    stored = {
        "model.layers.0.mlp.shared_experts.gate_proj": noise(2, 12, 8),
        "model.layers.0.self_attention.experts.input_linear.weight": noise(2, 12, 8),
        "encoder.block.1.layer.1.mlp.experts.expert_3.wi.weight": noise(12, 8),
    }
    found = open_checkpoint(save(tmp_path, stored, {"hidden_size": 8})).cuts
    roles = {name: cut.matrix.role for name, cut in found.items()}
    assert roles == {
        "encoder.block.1.layer.1.mlp.experts.expert_3.wi.weight": "expert_up",
        **{
            f"model.layers.0.mlp.shared_experts.{i}.gate_proj.weight": "gate"
            for i in range(2)
        },
        **{
            f"model.layers.0.self_attention.experts.{i}.input_linear.weight": (
                "expert_other"
            )
            for i in range(2)
        },
    }


@pytest.mark.parametrize("in_out", [False, True])
def test_a_stack_of_experts_is_turned_as_gate_and_up_lie_beside_down(
    in_out: bool, tmp_path: Path
) -> None:
    """Experts of a width of their own, where hidden_size would tell the wrong order."""
    width, inner = 8, 8
    gate_up, down = noise(2, 2 * inner, width), noise(2, width, inner, seed=1)
    stored = [w.mT if in_out else w for w in (gate_up, down)]
    stack = "model.layers.0.mlp.experts"
    tensors = {f"{stack}.gate_up_proj": stored[0], f"{stack}.down_proj": stored[1]}
    config = {"hidden_size": 2 * inner, "model_type": "muse_spark"}
    cuts = open_checkpoint(save(tmp_path, tensors, config)).cuts
    assert torch.equal(cuts[f"{stack}.1.gate_proj.weight"].read(), gate_up[1, :inner])
    assert torch.equal(cuts[f"{stack}.1.up_proj.weight"].read(), gate_up[1, inner:])
    assert torch.equal(cuts[f"{stack}.0.down_proj.weight"].read(), down[0])


def test_falcon_by_groups_and_by_heads(tmp_path: Path) -> None:
    base = {"model_type": "falcon", "hidden_size": WIDTH, "num_attention_heads": HEADS}
    for i, (config, rows, split) in enumerate(
        [
            ({"new_decoder_architecture": True, "num_kv_heads": 2}, GROUPED, by_group),
            ({"multi_query": False}, 3 * WIDTH, by_head),
        ]
    ):
        w = noise(rows, WIDTH)
        stored = {"h.0.self_attention.query_key_value.weight": w}
        cuts = open_checkpoint(save(tmp_path / str(i), stored, base | config)).cuts
        expected = dict(zip("qkv", split(w), strict=True))
        for cut in cuts.values():
            assert torch.equal(cut.read(), expected[cut.matrix.role])


def test_an_unknown_order_is_not_split(tmp_path: Path) -> None:
    name = "layers.0.attention.query_key_value.weight"
    (cut,) = open_checkpoint(save(tmp_path, {name: noise(96, 32)})).cuts.values()
    assert (cut.matrix.name, cut.matrix.role) == (name, "other")


def test_gate_above_up_is_told_by_the_way_back(tmp_path: Path) -> None:
    for back, roles in ((16, {"gate", "up", "down"}), (32, {"up", "down"})):
        stored = {
            "layers.0.mlp.dense_h_to_4h.weight": noise(32, 8),
            "layers.0.mlp.dense_4h_to_h.weight": noise(8, back),
        }
        cuts = open_checkpoint(save(tmp_path / str(back), stored)).cuts
        assert {cut.matrix.role for cut in cuts.values()} == roles


# --- real families -----------------------------------------------------------------


def test_conv1d_is_turned_so_that_rows_are_outputs(tmp_path: Path) -> None:
    """Left and right angles would change places; checked by what the model computes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=8))
    model.save_pretrained(tmp_path)
    cuts = open_checkpoint(tmp_path).cuts
    roles = {c.matrix.role: c for c in cuts.values() if c.matrix.layer == 0}
    block, x = model.transformer.h[0], noise(3, 8)
    with torch.no_grad():
        q, k, v = (block.attn.c_attn(x) - block.attn.c_attn.bias).split(8, dim=1)
        up = block.mlp.c_fc(x) - block.mlp.c_fc.bias
        o = block.attn.c_proj(x) - block.attn.c_proj.bias
    for role, expected in {"q": q, "k": k, "v": v, "up": up, "o": o}.items():
        torch.testing.assert_close(x @ roles[role].read().T, expected)
    assert roles["down"].matrix.shape == (8, 32)
    # In memory, too, and then as views.
    named = dict(model.named_parameters())
    live = layouts.matrices_in_memory(named, model.config.to_dict())
    for name, (matrix, view) in live.items():
        assert torch.equal(view, cuts[name].read())
        assert view.untyped_storage().data_ptr() in {
            w.untyped_storage().data_ptr() for w in named.values()
        }
        assert matrix == cuts[name].matrix


def test_t5_is_read_by_parent_and_leaf(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_heads": 2}
    config = T5Config(**sizes, num_layers=1, feed_forward_proj="gated-gelu")
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    roles = {n: c.matrix.role for n, c in open_checkpoint(tmp_path).cuts.items()}
    assert roles["encoder.block.0.layer.1.DenseReluDense.wo.weight"] == "down"
    assert roles["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"] == "gate"
    assert roles["encoder.block.0.layer.1.DenseReluDense.wi_1.weight"] == "up"
    assert roles["decoder.block.0.layer.1.EncDecAttention.o.weight"] == "o"
    assert roles["decoder.block.0.layer.0.SelfAttention.q.weight"] == "q"
    assert roles["shared.weight"] == "embed"


@pytest.mark.parametrize(
    ("path", "role", "part"),
    [
        ("model.layers.0.self_attn.gate_proj", "other", "language"),  # AFMoE
        ("model.layers.0.mlp.gate.wg", "router", "language"),  # Hunyuan
        ("layers.0.attention.wo", "o", "language"),
        ("gpt_neox.layers.0.attention.dense", "o", "language"),
        ("model.decoder.layers.0.self_attn.out_proj", "o", "language"),
        ("model.layers.0.mlp.fc1", "up", "language"),
        ("model.visual.blocks.0.mlp.gate_proj", "gate", "vision"),
        ("vision_tower.encoder.layers.0.self_attn.q_proj", "q", "vision"),
        ("model.visual.merger.mlp.0", "other", "projector"),
        ("multi_modal_projector.linear_1", "other", "projector"),
        ("thinker.audio_tower.layers.0.self_attn.q_proj", "q", "audio"),
        ("thinker.model.layers.0.self_attn.q_proj", "q", "language"),
        ("talker.model.layers.0.self_attn.q_proj", "q", "talker"),
        ("mtp.layers.0.self_attn.q_proj", "q", "mtp"),
        ("model.language_model.layers.0.self_attn.q_proj", "q", "language"),
        ("model.layers.0.self_attn.q_proj.linear", "q", "language"),  # a wrapper's
        ("gated_cross_attn_layers.0.mlp.gate_proj", "gate", "language"),  # Idefics
        ("rwkv.blocks.0.feed_forward.key", "other", "language"),
        ("model.layers.0.attn.Wo", "o", "language"),
        ("model.layers.0.mlp.Wo", "down", "language"),
        ("transformer.blocks.0.ff_out", "down", "language"),
        ("transformer.ff_out", "head", "language"),
        ("transformer.ffns.0.lin1", "up", "language"),
        ("model.layers.0.ada_rms_norm.linear1", "other", "language"),
        ("backbone.embeddings", "embed", "language"),
        ("model.shared", "embed", "language"),
        ("transformer.tokens_embed", "embed", "language"),
        ("transformer.wpe", "other", "language"),
        ("head", "head", "language"),
        ("lm_head.decoder", "head", "language"),
        ("lm_head.dense", "other", "language"),
        ("model.visual.blocks.0.attn.proj", "o", "vision"),
        ("qformer.encoder.layer.0.attention.attention.query", "q", "projector"),
        ("language_projection", "other", "projector"),
        ("model.vision_projection.linear_1", "other", "projector"),
        ("model.resampler_model.mlp", "other", "projector"),
        ("model.high_res_vision_model.layers.0.mlp.lin1", "up", "vision"),
        ("model.video_tower.layers.0.self_attn.q_proj", "q", "vision"),
        ("model.vqmodel.quantize.embedding", "other", "vision"),
        ("model.generation_head.proj_out", "other", "vision"),
        ("model.acoustic_tokenizer_encoder.stage.0.ffn.linear1", "up", "audio"),
        ("model.layers.61.embed_tokens", "embed", "language"),
    ],
)
def test_a_role_needs_its_parent_and_a_matrix_has_a_part(
    path: str, role: str, part: str
) -> None:
    assert layouts.role_of(path.split(".")) == role
    assert layouts.part_of(path.split("."), {}) == part


@pytest.mark.parametrize(
    ("path", "config", "part"),
    [
        # An encoder of a plain name beside a language model of its own.
        ("model.encoder.layers.0.to_q", {"model_type": "granite_speech"}, "audio"),
        ("model.encoder.layers.0.attn.to_q", {"model_type": "x"}, "other"),
        (
            "model.decoder.layers.0.mlp.up_proj",
            {"model_type": "x"},
            "language",
        ),
        ("model.dit.layers.0.mlp.up_proj", {"model_type": "pi0"}, "other"),
        ("model.protein_encoder.model.layer.0.attention.query", {}, "other"),
        ("model.language_model.layers.0.self_attn.q_proj", {}, "language"),
        ("mlp_AR.linear_1", {"model_type": "paddleocr_vl"}, "projector"),
        ("model.sam_model.blocks.0.attn.k_proj", {}, "vision"),
        ("img_context_model.blocks.0.attn.k_proj", {}, "vision"),
        ("action_head.net.blocks.0.attn.k_proj", {}, "other"),
        ("depth_decoder.layers.0.self_attn.q_proj", {}, "talker"),
        ("model.layers.0.mlp.vision_mlp.gate_proj", {}, "vision"),
        ("ctc_timestamp.decoder.transformer.layers.0.attn.out_proj", {}, "audio"),
    ],
)
def test_a_tower_beside_a_language_model_is_no_part_of_it(
    path: str, config: dict, part: str, tmp_path: Path
) -> None:
    tensors = {f"{path}.weight": noise(8, 8)}
    tensors["model.language_model.layers.0.self_attn.k_proj.weight"] = noise(8, 8)
    cuts = open_checkpoint(save(tmp_path, tensors, config)).cuts
    assert cuts[f"{path}.weight"].matrix.part == part


def test_an_encoder_by_itself_is_a_language_model(tmp_path: Path) -> None:
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    (cut,) = open_checkpoint(save(tmp_path, {name: noise(8, 8)})).cuts.values()
    assert (cut.matrix.part, cut.matrix.role) == ("language", "q")


def test_layers_beyond_the_models_own_predict_further_tokens() -> None:
    config = {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}
    for layer, part in ((2, "language"), (3, "mtp")):
        modules = f"model.layers.{layer}.self_attn.q_proj".split(".")
        assert layouts.part_of(modules, config) == part


def test_the_language_models_sizes_are_found_wherever_they_are() -> None:
    sizes = {"num_attention_heads": 4, "hidden_size": 32}
    for config in (
        {"thinker_config": {"text_config": sizes, "audio_config": {"d_model": 3}}},
        {"llm_config": sizes, "vision_config": {"hidden_size": 7}},
        {"n_head": 4, "n_embd": 32},
        {"d_model": 32, "n_heads": 4, "attn_config": {"kv_n_heads": 1}},
        {"backbone": sizes, "vision_config": {**sizes, "num_attention_heads": 2}},
    ):
        found = layouts.language_config(config)
        assert layouts.count(found, "num_attention_heads") == 4
        assert layouts.count(found, "hidden_size") == 32


# --- towers in a table -------------------------------------------------------------


@pytest.fixture
def towers(tmp_path: Path) -> tuple[Path, Path]:
    """A language model that moved beside a vision tower that did not."""
    before = {
        "language_model.model.layers.0.self_attn.q_proj.weight": noise(16, 16),
        "language_model.model.layers.0.mlp.up_proj.weight": noise(24, 16, seed=1),
        "vision_tower.encoder.layers.0.self_attn.q_proj.weight": noise(8, 8, seed=2),
        "vision_tower.encoder.layers.1.self_attn.q_proj.weight": noise(8, 8, seed=3),
    }
    after = {
        name: w + 0.1 * noise(*w.shape, seed=9) if "language" in name else w
        for name, w in before.items()
    }
    return save(tmp_path / "b", before), save(tmp_path / "a", after)


def test_a_frozen_tower_is_no_part_of_the_summary(towers: tuple[Path, Path]) -> None:
    table = pairs.measure_checkpoints(*towers, metrics=["cheap"], null=False)
    assert dict(table.groupby("part").size()) == {"language": 2, "vision": 2}
    summary = pairs.summarise(table).set_index("role")
    assert summary.loc["q", "matrices"] == 1
    assert summary.loc["q", "sparsity_bf16"] < 0.1
    vision = pairs.plan_pair(*towers, parts=["vision"])
    assert {task.pair.before.part for task in vision.tasks} == {"vision"}
    summary = pairs.summarise(pairs.run_plan(vision)).set_index("role")
    assert summary.loc["q", "sparsity_bf16"] == 1
    with pytest.raises(ValueError, match=r"parts = .*expected a collection"):
        pairs.plan_pair(*towers, parts=["eyes"])
    both = pairs.summarise(table, ["language", "vision"]).set_index("role")
    assert both.loc["q", "matrices"] == 3
    drawn = sampling.sampled(pairs.plan_pair(*towers, metrics=["cheap"]), 4)
    assert drawn.design is not None
    assert (
        drawn.design["stratum"].nunique() == 3
    )  # q of the tower is not q of the model
    assert len(drawn.tasks) == 4


def test_a_report_is_of_the_parts_that_are_asked_for(
    towers: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "t.csv", tmp_path / "r.html"
    table = pairs.measure_checkpoints(*towers, metrics=["cheap"], null=False)
    table.to_csv(out, index=False)
    for options, said in (
        ([], "2 matrices with 640 parameters"),
        (["--part", "vision"], "2 matrices with 128 parameters"),
        (["--part", "vision,language"], "4 matrices with 768 parameters"),
    ):
        given = ["report", str(out), "--out", str(page), "--force", *options]
        assert cli.main(given) == 0
        assert said in page.read_text()
    assert cli.main(["report", str(out), "--out", "x.html", "--part", "eyes"]) == 1
    assert f"{out} has no matrix of the parts eyes" in capsys.readouterr().err


def test_a_text_model_is_paired_with_its_multimodal_base(
    towers: tuple[Path, Path], tmp_path: Path
) -> None:
    cuts = open_checkpoint(towers[1]).cuts
    text = {
        name.removeprefix("language_model."): cut.read()
        for name, cut in cuts.items()
        if "language" in name
    }
    plan = pairs.plan_pair(towers[0], save(tmp_path / "text", text))
    assert sorted(task.name for task in plan.tasks) == sorted(text)
    assert plan.measured == 1
    assert all("vision" in name for name, _ in plan.missing)


# --- paths -------------------------------------------------------------------------

MODEL = {
    "model.embed_tokens.weight": (30, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.1.self_attn.q_proj.weight": (8, 8),
    "lm_head.weight": (30, 8),
}
RENAMED: list[Callable[[str], str]] = [
    lambda n: f"module.{n}",
    lambda n: f"_orig_mod.{n}",
    lambda n: f"base_model.model.{n}",
    lambda n: f"pretrained_model.{n}",
    lambda n: f"thinker.{n}",
    lambda n: f"language_model.{n}",
    lambda n: f"module._orig_mod.{n}",
    lambda n: f"actor_module.net.{n}",
    lambda n: f"engine.{n.removeprefix('model.')}",
    lambda n: n.removeprefix("model."),
    lambda n: n.replace("model.", "model.language_model."),
    lambda n: re.sub(r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module.", n),
    lambda n: re.sub(r"(layers\.\d+\.)", r"\1_checkpoint_wrapped_module.", n),
]


@pytest.mark.parametrize("rename", RENAMED)
def test_the_same_weights_under_another_path(rename: Callable[[str], str]) -> None:
    other = {rename(name): shape for name, shape in MODEL.items()}
    assert matching.match(MODEL, other) == {name: rename(name) for name in MODEL}
    assert matching.match(other, MODEL) == {rename(name): name for name in MODEL}


def test_a_path_is_matched_only_one_to_one_and_with_one_shape() -> None:
    twice = {f"module.{name}": shape for name, shape in MODEL.items()}
    twice |= {f"_orig_mod.{name}": shape for name, shape in MODEL.items()}
    assert matching.match(MODEL, twice) == {}
    smaller = {f"module.{name}": (4, *shape[1:]) for name, shape in MODEL.items()}
    assert matching.match(MODEL, smaller) == {}


def test_another_model_of_the_same_shapes_is_no_match() -> None:
    for prefix in ("teacher", "ref_model.module", "reward_model", "ema", "judge"):
        other = {f"{prefix}.{name}": shape for name, shape in MODEL.items()}
        assert matching.match(MODEL, other) == {}
        both = other | {f"policy_net.{name}": shape for name, shape in MODEL.items()}
        found = matching.match(MODEL, both)
        assert found == {name: f"policy_net.{name}" for name in MODEL}


def test_llamas_own_values_and_outputs_are_in_the_same_order(tmp_path: Path) -> None:
    """Five of seven are measured, and why the other two are not is said."""
    own, theirs = {}, {}
    for i, name in enumerate("qkvo"):
        own[f"layers.0.attention.w{name}.weight"] = noise(8, 8, seed=i)
        theirs[f"model.layers.0.self_attn.{name}_proj.weight"] = noise(8, 8, seed=i)
    for i, name in enumerate(("gate", "down", "up"), 1):
        own[f"layers.0.feed_forward.w{i}.weight"] = noise(8, 8, seed=-i)
        theirs[f"model.layers.0.mlp.{name}_proj.weight"] = noise(8, 8, seed=-i)
    plan = pairs.plan_pair(save(tmp_path / "a", theirs), save(tmp_path / "b", own))
    roles = {task.pair.before.role for task in plan.tasks}
    assert roles == {"gate", "down", "up", "v", "o"}
    assert all(torch.equal(*task.pair.read()) for task in plan.tasks)
    assert any("rows in another order" in note for note in plan.notes)


def test_megatrons_names_and_padded_vocabulary(tmp_path: Path) -> None:
    """Fused by groups and gate above up, with rows that no token has."""
    config = {"hidden_size": WIDTH, "num_attention_heads": HEADS}
    config |= {"num_key_value_heads": GROUPS, "tie_word_embeddings": False}
    qkv, fc1, vocabulary = noise(GROUPED, WIDTH), noise(48, WIDTH), noise(20, WIDTH)
    core = {
        "embedding.word_embeddings.weight": torch.cat([vocabulary, noise(12, WIDTH)]),
        "decoder.layers.0.self_attention.linear_qkv.weight": qkv,
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": noise(WIDTH),
        "decoder.layers.0.self_attention.linear_proj.weight": noise(WIDTH, WIDTH),
        "decoder.layers.0.mlp.linear_fc1.weight": fc1,
        "decoder.layers.0.mlp.linear_fc2.weight": noise(WIDTH, 24),
        "output_layer.weight": torch.cat([2 * vocabulary, noise(12, WIDTH)]),
    }
    q, k, v = by_group(qkv)
    theirs = {
        "model.embed_tokens.weight": vocabulary,
        "lm_head.weight": 2 * vocabulary,
        "model.layers.0.self_attn.o_proj.weight": noise(WIDTH, WIDTH),
        "model.layers.0.mlp.gate_proj.weight": fc1[:24],
        "model.layers.0.mlp.up_proj.weight": fc1[24:],
        "model.layers.0.mlp.down_proj.weight": noise(WIDTH, 24),
    }
    theirs |= {
        f"model.layers.0.self_attn.{n}_proj.weight": w
        for n, w in zip("qkv", (q, k, v), strict=True)
    }
    before = save(tmp_path / "hf", theirs, config)
    plan = pairs.plan_pair(before, save(tmp_path / "core", core, config))
    assert len(plan.tasks) == len(theirs)
    for task in plan.tasks:
        assert torch.equal(*task.pair.read()), task.name
    noted = [
        t.pair.before.role for t in plan.tasks if "another vocabulary" in t.pair.note
    ]
    assert sorted(noted) == ["embed", "head"]


def test_llamas_own_queries_are_in_another_order() -> None:
    own = {
        "layers.0.attention.wq.weight": (8, 8),
        "layers.0.feed_forward.w1.weight": (12, 8),
        "output.weight": (30, 8),
    }
    theirs = {
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
        "model.layers.0.attention.q_proj.weight": (8, 8),
        "model.layers.0.mlp.gate_proj.weight": (12, 8),
        "lm_head.weight": (30, 8),
    }
    assert sorted(matching.match(own, theirs)) == sorted([*own][1:])


@pytest.mark.parametrize(
    ("hub", "new"),
    [
        ("block_sparse_moe.experts.3.w1.weight", "mlp.experts.3.gate_proj.weight"),
        ("block_sparse_moe.experts.3.w2.weight", "mlp.experts.3.down_proj.weight"),
        ("feed_forward.experts.3.w3.weight", "feed_forward.experts.3.up_proj.weight"),
        ("block_sparse_moe.gate.weight", "mlp.router.weight"),
        ("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
        (
            "block_sparse_moe.3.gate_proj.weight",
            "block_sparse_moe.experts.3.gate_proj.weight",
        ),
        ("mlp.moe_statics.bias", "mlp.gate.moe_statics.bias"),
    ],
)
def test_hub_names_are_those_of_transformers_5(hub: str, new: str) -> None:
    before, after = f"model.layers.0.{hub}", f"model.layers.0.{new}"
    assert matching.match({before: (4, 4)}, {after: (4, 4)}) == {before: after}


TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("gpt_neox", {}),  # embed_out
        ("aria_text", {"moe_num_experts": 2, "moe_num_shared_experts": 1}),  # fc1, fc2
        ("hy_v3", {"num_experts": 2, "num_experts_per_tok": 1}),  # router.gate
        ("laguna", {"num_experts": 2, "num_experts_per_tok": 1}),  # shared_expert
    ],
)
def test_a_file_of_the_hub_is_paired_with_what_the_model_holds_in_memory(
    family: str, more: dict, tmp_path: Path
) -> None:
    """As transformers saves a model, and as a trainer that shards it does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known = AutoConfig.for_model(family).to_dict()
    sizes = {k: v for k, v in TINY.items() if known.get(k) is not None}
    config = AutoConfig.for_model(family, **sizes, **more)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "hub")
    held = {name: w.detach() for name, w in model.named_parameters()}
    save(
        tmp_path / "memory",
        held,
        json.loads((tmp_path / "hub/config.json").read_text()),
    )
    for order in (("hub", "memory"), ("memory", "hub")):
        found = checkpoints.pairing(*(open_checkpoint(tmp_path / n) for n in order))
        assert found.measured == 1.0
        for pair in found.pairs:
            assert torch.equal(*pair.read())
            assert pair.cuts[0].matrix.role == pair.cuts[1].matrix.role


def test_what_was_matched_is_said_and_rows_lose_the_wrapper(tmp_path: Path) -> None:
    tensors = {name: noise(*shape) for name, shape in MODEL.items()}
    tensors["lm_head.weight"] = noise(30, 8, seed=5)
    bare = save(tmp_path / "bare", tensors)
    wrapped = save(tmp_path / "w", {f"module.{n}": w for n, w in tensors.items()})
    for before, after in ((bare, wrapped), (wrapped, bare)):
        out = tmp_path / "t.csv"
        arguments = [str(before), str(after), "--out", str(out), "--force"]
        said = CliRunner().invoke(measure_command, [*arguments, "--metrics", "cheap"])
        assert said.exit_code == 0
        assert re.search(r"Matched by path: .*module\..* and 4 more alike", said.stderr)
        names = set(pd.read_csv(out)["matrix"])
        assert names == {name for name, shape in MODEL.items() if len(shape) == 2}


# --- steps -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("stage1-step1000-tokens5B", 1000),
        ("runs/checkpoint-100-bf16", 100),
        ("out/global_step_50/actor/huggingface", 50),
        ("iter_0000300", 300),
        ("epoch_2-step_40", 40),
        ("run7/epoch_2", 2),
        ("owner/name@step200", 200),
        ("7", 7),
        ("run/step-1k", 1000),
        ("run/step_2.5k-bf16", 2500),
        ("run/step:40", 40),
        ("run/global_step.60", 60),
        ("ep0-ba2000-rank0.pt", 2000),
        ("epoch=1-step=300.ckpt", 300),
        ("deep-3/100", 100),
    ],
)
def test_the_step_is_the_number_after_its_word(path: str, step: int) -> None:
    assert steps.step_of(path) == step


@pytest.mark.parametrize(
    "form",
    [
        *("checkpoint-{}e3", "step{}.5", "iter-{},000", "step-{}_000", "step{}k5"),
        *("step{}B", "step{}mil", "checkpoint-{}kb", "{}E3", "lr-0.{}", "{},000/hf"),
    ],
)
def test_a_number_that_goes_on_is_refused_and_not_cut(form: str) -> None:
    """Steps 1, 2 and 4 of 1e3, 2e3 and 4e3 would be a wrong course in silence."""
    with pytest.raises(ValueError, match="--steps"):
        steps.steps_of([f"run/{form.format(n)}" for n in (1, 2, 4)])


def test_steps_that_only_differ_in_one_place() -> None:
    assert steps.steps_of(["r/100/hf-7b-v2", "r/20/hf-7b-v2"]) == [100, 20]
    assert steps.steps_of(["opd-7b-100", "opd-7b-300"]) == [100, 300]
    assert steps.steps_of(["checkpoint-5/10", "checkpoint-5/20"]) == [10, 20]
    # Of one step each: two seeds are no run.
    assert steps.steps_of(["seed1/step-5", "seed2/step-5"]) == [5, 5]
    unclear = ["a-7b-v2"], ["a-1-b-2", "a-3-b-4"], ["x/a", "y/b"], ["checkpoint-1e3"]
    for paths in unclear:
        with pytest.raises(ValueError, match="--steps"):
            steps.steps_of(paths)
    with pytest.raises(ValueError, match="at most 1000000000000"):
        steps.step_of(f"step-{10**30}")
    for said in ("1", "1,b", "1,2,3"):
        with pytest.raises(ValueError, match="as many numbers"):
            steps.given_steps(said, ["a", "b"])


def test_the_mapping_is_printed_and_can_be_given(tmp_path: Path) -> None:
    start = save(tmp_path / "start", {"layers.0.q_proj.weight": noise(6, 6)})
    runs = [
        save(tmp_path / n, {"layers.0.q_proj.weight": noise(6, 6, seed=i + 1)})
        for i, n in enumerate(("final", "first"))
    ]
    out = str(tmp_path / "t.csv")
    arguments = [str(start), *map(str, runs), "--out", out, "--k", "2"]
    said = CliRunner().invoke(trajectory_command, arguments)
    assert isinstance(said.exception, ValueError)
    assert "--steps" in str(said.exception)
    said = CliRunner().invoke(trajectory_command, [*arguments, "--steps", "20,10"])
    assert f"Step 10: {runs[1]}\nStep 20: {runs[0]}" in said.stderr
    assert pd.read_csv(out)["step"].tolist() == [10, 20]


# --- folders -----------------------------------------------------------------------


def sharded(path: Path, tensors: dict, n: int, index: str | None = None) -> Path:
    path.mkdir(exist_ok=True)
    names = sorted(tensors)
    weight_map = {}
    for i in range(n):
        file = f"model-{i + 1:05d}-of-{n:05d}.safetensors"
        save_file({k: tensors[k] for k in names[i::n]}, path / file)
        weight_map |= dict.fromkeys(names[i::n], file)
    if index:
        (path / index).write_text(json.dumps({"weight_map": weight_map}))
    return path


INDEX = "model.safetensors.index.json"
NEW = {f"layers.{i}.q_proj.weight": noise(6, 6, seed=i) for i in range(4)}
OLD = {name: w + 1 for name, w in NEW.items()}


def content(path: Path) -> dict[str, Tensor]:
    return {name: cut.read() for name, cut in open_checkpoint(path).cuts.items()}


def is_new(path: Path) -> bool:
    found = content(path)
    return {*found} == {*NEW} and all(torch.equal(found[n], w) for n, w in NEW.items())


def test_a_whole_file_beside_shards_is_weighed_by_age(tmp_path: Path) -> None:
    path = sharded(tmp_path / "a", NEW, 2, INDEX)
    save(path, OLD)
    os.utime(path / "model.safetensors", (1, 1))
    assert is_new(path)
    assert "left aside" in open_checkpoint(path).notes[0]
    path = sharded(tmp_path / "b", OLD, 2, INDEX)
    for file in path.iterdir():
        os.utime(file, (1, 1))
    save(path, NEW)
    assert is_new(path)
    assert "newer than the shards" in open_checkpoint(path).notes[0]
    (path / "model-00001-of-00002.safetensors").unlink()
    assert is_new(path)
    assert "which is not there" in open_checkpoint(path).notes[0]


def test_leftover_shards_are_said_and_lost_ones_refused(tmp_path: Path) -> None:
    path = sharded(tmp_path / "a", OLD, 3)
    sharded(path, NEW, 2, INDEX)
    assert is_new(path)
    assert "3 of another save" in open_checkpoint(path).notes[0]
    file = path / INDEX
    file.write_text(file.read_text().replace("-of-00002", "-of-00009"))
    with pytest.raises(FileNotFoundError, match="lacks 2 of 2 shards"):
        open_checkpoint(path)  # two complete sets: which one is meant?
    for stale in path.glob("*-of-00003*"):
        stale.unlink()
    assert is_new(path)
    assert "which are all of their number" in open_checkpoint(path).notes[0]


def test_shards_without_an_index_and_disjoint_files(tmp_path: Path) -> None:
    assert is_new(sharded(tmp_path / "a", NEW, 3))
    (tmp_path / "a" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="some shards are missing"):
        open_checkpoint(tmp_path / "a")
    variant = sharded(tmp_path / "v", NEW, 2, "model.safetensors.index.fp16.json")
    assert is_new(variant)
    assert "fp16.json" in open_checkpoint(variant).notes[0]
    assert is_new(variant / "model.safetensors.index.fp16.json")
    names = sorted(NEW)
    for rank in range(2):
        part = {name: NEW[name] for name in names[rank::2]}
        save(tmp_path / "ep", part, file=f"model_{rank:02d}.safetensors")
    assert is_new(tmp_path / "ep")
    save(tmp_path / "ep", NEW, file="model_03.safetensors")
    with pytest.raises(ValueError, match=r"3 .safetensors files and no model.safe"):
        open_checkpoint(tmp_path / "ep")


def test_pickled_shards_without_an_index(tmp_path: Path) -> None:
    for i, names in enumerate((sorted(NEW)[::2], sorted(NEW)[1::2]), 1):
        place = tmp_path / f"pytorch_model-0000{i}-of-00002.bin"
        torch.save({name: NEW[name] for name in names}, place)
    assert is_new(tmp_path)
    place.unlink()
    with pytest.raises(ValueError, match="holds no"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_comes_from_where_the_index_says(tmp_path: Path) -> None:
    path = sharded(tmp_path, NEW, 2, INDEX)
    name = sorted(NEW)[0]  # in the first
    second = path / "model-00002-of-00002.safetensors"
    kept = {n: NEW[n] for n in sorted(NEW)[1::2]}
    save_file(kept | {name: NEW[name] + 1}, second)
    assert is_new(path)
    assert f"also holds {name}" in open_checkpoint(path).notes[0]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda p: save(p / "checkpoint-10", NEW),
            r"1 checkpoints .*opd-geometry trajectory BEFORE .*/checkpoint-\*",
        ),
        (
            lambda p: save(p / "snapshots" / "abc", NEW),
            r"hub's snapshots/.*give .*snapshots/abc",
        ),
        (lambda p: (p / "m.gguf").write_bytes(b"GGUF"), r"m\.gguf is truncated"),
        (lambda p: (p / "zero_to_fp32.py").write_text(""), "gather them first: python"),
        (lambda p: (p / "a.safetensors.incomplete").write_text(""), "not finished"),
        (lambda p: (p / "config.json").write_text("{}"), "config.json and no weights"),
        (lambda p: (p / "__0_0.distcp").write_text(""), "without their .metadata"),
        (lambda p: torch.save({}, p / "optimizer.pt"), "optimizer.pt, whose name"),
        (
            lambda p: (p / "model.safetensors").write_text(
                "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
            ),
            "git lfs pull",
        ),
        (
            lambda p: [(p / n).write_text("") for n in ("common.pt", "__0_0.distcp")],
            "Megatron's torch_dist",
        ),
        (
            lambda p: [(p / f"mp_rank_0{r}_model_states.pt").touch() for r in "01"],
            "the shares of 2 ranks .*merge them with the tool",
        ),
        (
            lambda p: (p / "adapter_model.bin").touch(),
            "bin without adapter_config.json",
        ),
        (
            lambda p: [(p / "dcp").mkdir(), (p / "dcp" / ".metadata").touch()],
            "weights in dcp/, expected a checkpoint; give .*/dcp",
        ),
        (
            lambda p: [save(p, OLD, file=f"model-rank-{r}.safetensors") for r in "01"],
            "merge them with the tool that wrote them if each is the share of a rank",
        ),
    ],
)
def test_a_folder_without_weights_says_what_it_has_and_what_helps(
    make: Callable, said: str, tmp_path: Path
) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=said) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_what_has_no_matrix_says_what_it_has_instead(tmp_path: Path) -> None:
    base = save(tmp_path / "base", {"layers.0.q_proj.weight": noise(8, 8)})
    flat = save(tmp_path / "flat", {"_flat_param": noise(64)})
    said = (
        "flat has no weight matrix but 1 skipped .*a flat parameter of FSDP.*FULL_STATE"
    )
    for order in ((base, flat), (flat, base), (flat, flat)):
        with pytest.raises(ValueError, match=said):
            pairs.plan_pair(*order)


def test_one_diagnosis_names_both_sides(tmp_path: Path) -> None:
    a = save(tmp_path / "a", NEW)
    b = save(tmp_path / "b", {"other.weight": noise(6, 6), "empty.weight": noise(0, 6)})
    with pytest.raises(ValueError, match="no matrix in common") as caught:
        pairs.plan_pair(a, b)
    message = str(caught.value)
    assert "out of 4 and 1" in message
    assert "BEFORE: 4 there alone, first layers.0.q_proj.weight" in message
    assert "AFTER: 1 skipped (no entries" in message
    assert "zero_to_fp32" in message


def test_the_exit_code_tells_that_most_was_left_out(tmp_path: Path) -> None:
    codes = {f"layers.{i}.k_proj.weight": torch.ones(9, 6).char() for i in range(4)}
    a = save(tmp_path / "a", NEW | codes)
    out = tmp_path / "t.csv"
    arguments = [str(a), str(a), "--out", str(out), "--metrics", "cheap"]
    said = CliRunner().invoke(measure_command, arguments)
    assert isinstance(said.exception, ValueError)
    assert "only 40 % of the weights could be measured" in str(said.exception)
    assert len(pd.read_csv(out)) == 4
    shutil.rmtree(tmp_path / "a")


def test_control_characters_of_a_name_are_spelt_out(tmp_path: Path) -> None:
    name = "layers.0.\x1b[2J[bold]q_proj.weight"
    path = save(tmp_path / "a", {name: noise(4, 4), "\x07norm": noise(4)})
    out = tmp_path / "t.csv"
    arguments = [str(path), str(path), "--out", str(out), "--metrics", "cheap"]
    said = CliRunner().invoke(measure_command, arguments)
    assert said.exit_code == 0
    assert "\x1b" not in said.output + said.stderr
    assert "\x07" not in said.output + said.stderr
    assert list(checkpoints.open_checkpoint(path).cuts) == [name]


def test_control_characters_of_a_path_are_spelt_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["measure", "no\x1b[31m\x00where", "b", "--out", "t.csv"]
    assert cli.main(given) == 1
    assert r"no\x1b[31m\x00where does not exist" in capsys.readouterr().err


def test_steps_beyond_any_run_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at most 10000"):
        steps.steps_of([f"run/step-{10**25}", "run/step-5"])

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd_geometry.geometry import checkpoints, layouts

BLOCK = "model.layers.{}.self_attn.{}_proj.weight"


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(dtype)


def dense(layers: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict:
    """A small decoder as transformers names it: 4 heads, 2 key heads of 4."""
    sizes = {
        "self_attn.q_proj": (16, 8),
        "self_attn.k_proj": (8, 8),
        "self_attn.v_proj": (8, 8),
        "self_attn.o_proj": (8, 16),
        "mlp.gate_proj": (12, 8),
        "mlp.up_proj": (12, 8),
        "mlp.down_proj": (8, 12),
        "input_layernorm": (8,),
    }
    tensors = {"model.embed_tokens.weight": gaussian(10, 8, seed=seed, dtype=dtype)}
    for layer in range(layers):
        for i, (module, shape) in enumerate(sizes.items()):
            tensors[f"model.layers.{layer}.{module}.weight"] = gaussian(
                *shape, seed=1000 * seed + 10 * layer + i + 1, dtype=dtype
            )
    tensors["lm_head.weight"] = gaussian(10, 8, seed=seed + 77, dtype=dtype)
    return tensors


CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}


def save(
    path: Path,
    tensors: dict[str, Tensor],
    config: dict | None = None,
    n_shards: int = 0,
) -> Path:
    """A checkpoint directory, sharded with an index if `n_shards`."""
    path.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    if not n_shards:
        save_file(tensors, path / "model.safetensors")
        return path
    weight_map = {}
    for i in range(n_shards):
        shard = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        names = sorted(tensors)[i::n_shards]
        save_file({name: tensors[name] for name in names}, path / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / checkpoints.INDEX_NAME).write_text(json.dumps(index))
    return path


def names(path: Path) -> list[str]:
    return [matrix.name for matrix in checkpoints.list_matrices(path)]


def reasons(path: Path) -> dict[str, str]:
    return {skip.name: skip.reason for skip in checkpoints.list_skipped(path)}


def roles(path: Path) -> dict[str, str]:
    return {matrix.name: matrix.role for matrix in checkpoints.list_matrices(path)}


# ---------------------------------------------------------------- plain checkpoints


@pytest.mark.parametrize("n_shards", [0, 1, 3])
def test_every_tensor_is_a_matrix_or_skipped_with_its_reason(tmp_path, n_shards):
    tensors = dense(dtype=torch.bfloat16)
    path = save(tmp_path / "a", tensors, CONFIG, n_shards)
    found = checkpoints.list_matrices(path)
    skipped = checkpoints.list_skipped(path)
    assert {m.name for m in found} | {s.name for s in skipped} == tensors.keys()
    assert len(found) + len(skipped) == len(tensors)
    for matrix in found:
        assert matrix.shape == tuple(tensors[matrix.name].shape)
        assert matrix.dtype == "bfloat16"
        stored = checkpoints.read_matrix(path, matrix.name)
        assert stored.dtype == torch.bfloat16
        assert torch.equal(stored, tensors[matrix.name])
    assert all("one-dimensional" in s.reason and s.shape == (8,) for s in skipped)
    by_role = {(m.role, m.layer) for m in found}
    block = ("q", "k", "v", "o", "gate", "up", "down")
    assert by_role == {("embed", -1), ("head", -1)} | {
        (role, layer) for role in block for layer in (0, 1)
    }


def test_one_file_reads_as_the_directory_does(tmp_path):
    path = save(tmp_path / "a", dense())
    file = shutil.copy(path / "model.safetensors", tmp_path / "other.safetensors")
    assert checkpoints.list_matrices(file) == checkpoints.list_matrices(path)
    assert checkpoints.list_matrices(str(path)) == checkpoints.list_matrices(path)
    (path / "model.safetensors").rename(path / "weights.safetensors")
    assert checkpoints.list_matrices(path) == checkpoints.list_matrices(file)


def test_order_is_natural(tmp_path):
    tensors = {BLOCK.format(layer, "q"): gaussian(2, 2) for layer in (10, 9, 2, 0)}
    path = save(tmp_path / "a", tensors)
    assert [m.layer for m in checkpoints.list_matrices(path)] == [0, 2, 9, 10]


@pytest.mark.parametrize(
    ("name", "role", "layer"),
    [
        ("model.layers.3.self_attn.v_proj.weight", "v", 3),
        ("model.language_model.layers.12.mlp.down_proj.weight", "down", 12),
        ("layers.1.feed_forward.w2.weight", "down", 1),
        ("model.layers.0.mlp.gate.weight", "router", 0),
        ("model.layers.0.block_sparse_moe.router.layer.weight", "router", 0),
        ("model.layers.0.mlp.router.weight", "router", 0),
        ("model.layers.5.mlp.experts.17.up_proj.weight", "expert_up", 5),
        ("model.layers.5.block_sparse_moe.experts.1.w2.weight", "expert_down", 5),
        ("model.layers.5.mlp.experts.1.proj.weight", "expert_other", 5),
        ("model.layers.5.mlp.shared_experts.gate_proj.weight", "gate", 5),
        ("transformer.h.7.attn.c_attn.weight", "other", 7),
        ("gpt_neox.layers.2.attention.query_key_value.weight", "other", 2),
        ("visual.blocks.4.attn.qkv.weight", "other", 4),
        ("model.layers.0.self_attn.qkv_proj.lora_B.weight", "other", 0),
        ("output.weight", "head", -1),
        ("encoder.layer.0.output.weight", "other", 0),
        ("transformer.wte.weight", "embed", -1),
        ("pos_embed", "other", -1),
        ("my_v_proj.weight", "other", -1),
    ],
)
def test_roles_and_layers(tmp_path, name, role, layer):
    (found,) = checkpoints.list_matrices(save(tmp_path / "a", {name: gaussian(4, 6)}))
    assert (found.name, found.role, found.layer) == (name, role, layer)


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("model.norm.weight", torch.ones(8), "one-dimensional"),
        ("logit_scale", torch.tensor(1.0), "a scalar"),
        ("model.layers.0.conv1d.weight", torch.ones(4, 1, 3), "3-dimensional and not"),
        ("visual.patch.weight", torch.ones(2, 3, 4, 4), "4-dimensional and not"),
        ("x.weight", torch.ones(4, 4, dtype=torch.int8), "stored as I8"),
        ("x.weight", torch.ones(4, 4).to(torch.float8_e4m3fn), "stored as F8_E4M3"),
        ("x.weight_scale_inv", torch.ones(4, 4), "quantised (FP8 or INT8"),
        ("x.weight", torch.ones(0, 4), "no entries"),
        ("mlp.experts.gate_up_proj_bias", torch.ones(4, 6), "without a number"),
        ("a.qkv_proj.weight", torch.ones(32, 8), "no config.json"),
        ("mlp.experts.gate_up_proj", torch.ones(2, 6, 8), "no config.json"),
        ("a.gate_up_proj.weight", torch.ones(5, 8), "do not halve"),
    ],
)
def test_what_is_not_measured_says_why(tmp_path, name, tensor, reason):
    path = save(tmp_path / "a", {name: tensor})
    assert checkpoints.list_matrices(path) == []
    (found,) = checkpoints.list_skipped(path)
    assert found.name == name
    assert found.shape == tuple(tensor.shape)
    assert reason in found.reason
    with pytest.raises(ValueError, match=re.escape(found.reason)):
        checkpoints.read_matrix(path, name)


# ----------------------------------------------------------------- fused and stacked


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same checkpoint with q, k, v and gate, up below one another."""
    out = {}
    for name, tensor in tensors.items():
        stem = re.sub(r"(q|gate)_proj", "{}_proj", name)
        if "q_proj" in name:
            parts = [tensors[stem.format(part)] for part in "qkv"]
            out[stem.format("qkv")] = torch.cat(parts)
        elif "gate_proj" in name:
            parts = [tensor, tensors[stem.format("up")]]
            out[stem.format("gate_up")] = torch.cat(parts)
        elif not re.search("(k|v|up)_proj", name):
            out[name] = tensor
    return out


def test_fused_projections_are_split_by_the_configs_head_counts(tmp_path):
    tensors = dense()
    stored = fused(tensors)
    assert len(stored) == len(tensors) - 2 * 3
    path = save(tmp_path / "fused", stored, CONFIG)
    apart = save(tmp_path / "apart", tensors, CONFIG)
    assert checkpoints.list_matrices(path) == checkpoints.list_matrices(apart)
    assert checkpoints.missing_names(path, apart) == ([], [])
    for pair in checkpoints.iter_pairs(path, apart):
        assert torch.equal(pair.w_before, pair.w_after)


def test_head_size_follows_from_the_width_and_key_heads_from_the_heads(tmp_path):
    config = {"hidden_size": 8, "num_attention_heads": 2}
    tensors = {"model.layers.0.attn.qkv_proj.weight": gaussian(24, 8)}
    path = save(tmp_path / "a", tensors, config)
    assert [m.shape for m in checkpoints.list_matrices(path)] == [(8, 8)] * 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_key_value_heads": 4}, "of 32 rows, where config.json's heads need 16"),
        ({"num_attention_heads": None}, "how many heads"),
        ({"num_key_value_heads": [2, 4]}, "config.json's heads need 16 + 2 x 16"),
    ],
)
def test_a_fused_tensor_that_does_not_fit_is_listed(tmp_path, change, reason):
    path = save(tmp_path / "a", fused(dense()), CONFIG | change)
    name = "model.layers.1.self_attn.qkv_proj.weight"
    assert reason in reasons(path)[name]
    assert not any(".v_proj" in other for other in names(path))


def test_the_language_models_own_config_counts(tmp_path):
    config = {"num_attention_heads": 3, "hidden_size": 9, "text_config": CONFIG}
    path = save(tmp_path / "a", fused(dense()), config)
    assert names(path) == names(save(tmp_path / "b", dense()))


STACK = "model.layers.0.mlp.experts."


@pytest.mark.parametrize("model_type", ["qwen3_moe", "llama4_text", "gpt_oss"])
@pytest.mark.parametrize("n_hidden", [6, 8])
def test_experts_are_matrices_of_their_own(tmp_path, model_type, n_hidden):
    # n_hidden = 6 also equals 2 * n_inner, where only the model type tells the order.
    n_inner = 3
    gate, up = gaussian(4, n_inner, n_hidden, seed=1), gaussian(4, n_inner, n_hidden)
    down = gaussian(4, n_hidden, n_inner, seed=2)
    both = torch.cat([gate, up], dim=1)
    if model_type == "gpt_oss":
        both = torch.stack([gate, up], dim=2).reshape(both.shape)  # interleaved
    tensors = {f"{STACK}gate_up_proj": both, f"{STACK}down_proj": down}
    if model_type != "qwen3_moe":
        tensors = {n: t.transpose(1, 2).contiguous() for n, t in tensors.items()}
    config = {"model_type": model_type, "hidden_size": n_hidden}
    path = save(tmp_path / "a", tensors, config)
    assert len(names(path)) == 12
    expected = {"gate": gate, "up": up, "down": down}
    for matrix in checkpoints.list_matrices(path):
        expert, part = re.search(
            r"experts\.(\d)\.(\w+)_proj.weight$", matrix.name
        ).groups()
        assert (matrix.role, matrix.layer) == (f"expert_{part}", 0)
        w = checkpoints.read_matrix(path, matrix.name)
        assert matrix.shape == tuple(w.shape)
        assert torch.equal(w, expected[part][int(expert)])
        assert w.is_contiguous()
    for pair in checkpoints.list_pairs(path, path):
        check_head(pair)


def check_head(pair):
    """The head of a matrix is its first rows, at least one and at most all."""
    w = pair.read_after()
    assert pair.after.n_bytes == w.nbytes
    row = w.nbytes // len(w)
    for n_bytes, n_rows in ((0, 1), (2 * row, 2), (3 * row - 1, 2), (10**9, len(w))):
        head = pair.read_head(n_bytes)
        assert torch.equal(head, w[:n_rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_heads_are_of_the_later_checkpoint(tmp_path, dtype):
    tensors = dense(dtype=dtype)
    q, k, v = (BLOCK.format(0, name) for name in "qkv")
    fused = torch.cat([tensors.pop(name) for name in (q, k, v)])
    tensors["model.layers.0.self_attn.qkv_proj.weight"] = fused
    before = save(tmp_path / "a", dense(seed=1, dtype=dtype), CONFIG)
    after = save(tmp_path / "b", tensors, CONFIG)
    for pair in checkpoints.list_pairs(before, after):
        check_head(pair)


def test_experts_that_need_no_splitting_need_no_config(tmp_path):
    down, plain = gaussian(3, 6, 5), gaussian(3, 4, 4, seed=1)
    path = save(tmp_path / "a", {f"{STACK}down_proj": down, f"{STACK}mix": plain})
    assert sorted(roles(path).values()) == ["expert_down"] * 3 + ["expert_other"] * 3
    found = checkpoints.read_matrix(path, f"{STACK}2.down_proj.weight")
    assert torch.equal(found, down[2])


def test_granites_stacks_go_by_other_names(tmp_path):
    stem = "model.layers.1.block_sparse_moe."
    tensors = {
        f"{stem}input_linear.weight": gaussian(2, 6, 8),
        f"{stem}output_linear.weight": gaussian(2, 8, 3),
        f"{stem}router.layer.weight": gaussian(2, 8),
    }
    path = save(tmp_path / "a", tensors, {"hidden_size": 8})
    assert sorted(roles(path).values()) == sorted(
        ["expert_down", "expert_gate", "expert_up"] * 2 + ["router"]
    )


# -------------------------------------------------------------------- tied embeddings


def test_tied_embeddings_are_measured_once(tmp_path):
    tensors = dense()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tied = save(tmp_path / "tied", tensors, CONFIG | {"tie_word_embeddings": True})
    for config in ({}, {"tie_word_embeddings": False}, {"tie_word_embeddings": True}):
        equal = save(tmp_path / f"equal{len(str(config))}", tensors, CONFIG | config)
        assert "lm_head.weight" not in names(equal)
        assert "tied" in reasons(equal)["lm_head.weight"]
    # Saved without the head, as transformers does, it is the same checkpoint.
    del tensors["lm_head.weight"]
    bare = save(tmp_path / "bare", tensors, CONFIG | {"tie_word_embeddings": True})
    assert checkpoints.missing_names(tied, bare) == ([], [])
    assert len(list(checkpoints.iter_pairs(tied, bare))) == len(names(bare))


def test_every_copy_of_the_embedding_is_one_matrix(tmp_path):
    """As torch.save leaves them in an encoder and decoder with one vocabulary."""
    shared = gaussian(12, 4)
    copies = ("decoder.embed_tokens", "encoder.embed_tokens", "lm_head", "shared")
    tensors = {f"{name}.weight": shared.clone() for name in copies}
    tensors["encoder.layers.0.self_attn.q_proj.weight"] = gaussian(4, 4)
    both = save(tmp_path / "both", tensors, {"tie_word_embeddings": True})
    assert names(both) == ["encoder.layers.0.self_attn.q_proj.weight", "shared.weight"]
    one = {n: w for n, w in tensors.items() if n[0] in "s" or "layers" in n}
    alone = save(tmp_path / "one", one, {"tie_word_embeddings": True})
    assert checkpoints.missing_names(both, alone) == ([], [])
    tensors["decoder.embed_tokens.weight"] += 1
    apart = save(tmp_path / "apart", tensors)
    assert "decoder.embed_tokens.weight" in names(apart)


def test_a_head_that_left_its_embedding_is_measured_from_there(tmp_path):
    """Whatever the config says: the values count."""
    config = CONFIG | {"tie_word_embeddings": True}
    before = dense()
    del before["lm_head.weight"]
    after = before | {"lm_head.weight": before["model.embed_tokens.weight"] + 1}
    a = save(tmp_path / "a", before, config)
    b = save(tmp_path / "b", after, config)
    for first, last, sign in ((a, b, 1), (b, a, -1)):
        pairs = {p.before.name: p for p in checkpoints.list_pairs(first, last)}
        head = pairs["lm_head.weight"]
        assert head.before.role == "head"
        assert "the embedding" in head.note
        w_before, w_after = head.read()
        torch.testing.assert_close(w_after - w_before, torch.full((10, 8), sign * 1.0))
        assert pairs["model.embed_tokens.weight"].note == ""


def test_a_tied_head_without_an_embedding_is_still_measured(tmp_path):
    tensors = {"lm_head.weight": gaussian(4, 4)}
    path = save(tmp_path / "a", tensors, {"tie_word_embeddings": True})
    assert names(path) == ["lm_head.weight"]


# ------------------------------------------------------------------------------ pairs


def test_pairs_of_a_sharded_and_a_single_checkpoint_in_two_dtypes(tmp_path):
    before, after = dense(seed=1, dtype=torch.bfloat16), dense(seed=2)
    paths = save(tmp_path / "a", before, n_shards=3), save(tmp_path / "b", after)
    pairs = list(checkpoints.iter_pairs(*paths))
    assert [pair.name for pair in pairs] == names(paths[0])
    for name, role, layer, w_before, w_after in pairs:
        assert torch.equal(w_before, before[name])
        assert torch.equal(w_after, after[name])
        assert (w_before.dtype, w_after.dtype) == (torch.bfloat16, torch.float32)
        assert role in checkpoints.ALL_ROLES
        assert layer in (-1, 0, 1)


def test_roles_choose_what_is_read(tmp_path):
    path = save(tmp_path / "a", dense())
    pairs = list(checkpoints.iter_pairs(path, path, roles=("q", "k", "v", "o")))
    assert [(p.layer, p.role) for p in pairs] == [
        (layer, role) for layer in (0, 1) for role in ("k", "o", "q", "v")
    ]


def test_pairs_are_read_one_at_a_time_and_own_their_memory(tmp_path, monkeypatch):
    path = save(tmp_path / "a", dense())
    reads = []
    read = layouts.Cut.read
    monkeypatch.setattr(
        layouts.Cut, "read", lambda cut: reads.append(cut.tensor.name) or read(cut)
    )
    pairs = checkpoints.iter_pairs(path, path)
    assert {*reads} <= {"model.embed_tokens.weight", "lm_head.weight"}  # a tie?
    reads.clear()
    first = next(pairs)
    assert reads == [first.name] * 2
    kept = first.w_before.clone()
    # Written over in place, as a trainer does to its last checkpoint.
    file = path / "model.safetensors"
    with file.open("r+b") as handle:
        handle.seek(-200, 2)
        handle.write(b"\0" * 200)
    size = file.stat().st_size
    with file.open("r+b") as handle:
        handle.seek(size - sum(t.nbytes for t in dense().values()))
        handle.write(b"\0" * 400)
    assert torch.equal(first.w_before, kept)
    storage = first.w_before.untyped_storage()
    assert storage.nbytes() == first.w_before.nbytes


def test_missing_tensors_raise_or_are_listed(tmp_path):
    before, after = dense(), dense()
    del after[BLOCK.format(1, "v")], after["model.layers.0.input_layernorm.weight"]
    del before["lm_head.weight"]
    a, b = save(tmp_path / "a", before), save(tmp_path / "b", after)
    only_a = ["model.layers.0.input_layernorm.weight", BLOCK.format(1, "v")]
    assert sorted(checkpoints.missing_names(a, b)[0]) == sorted(only_a)
    assert checkpoints.missing_names(a, b)[1] == ["lm_head.weight"]
    with pytest.raises(
        ValueError, match=r"1 matrices of .*a are not in .*b, first .*v_p"
    ):
        checkpoints.iter_pairs(a, b)
    for pair in ((a, b), (b, a)):
        with pytest.raises(ValueError, match=r"of .*b are not in .*a, first lm_head"):
            checkpoints.iter_pairs(*pair, roles=["head"])
    found = {pair.name for pair in checkpoints.iter_pairs(a, b, missing="skip")}
    assert found == set(names(a)) - {BLOCK.format(1, "v")}
    assert len(list(checkpoints.iter_pairs(a, b, roles=["q"]))) == 2


def test_a_matrix_that_one_side_cannot_split_says_so(tmp_path):
    a = save(tmp_path / "a", dense())
    b = save(
        tmp_path / "b", dense() | {BLOCK.format(0, "q"): torch.ones(16, 8).short()}
    )
    with pytest.raises(ValueError, match=r"q_proj.* \(skipped there: stored as I16"):
        checkpoints.iter_pairs(a, b)


def test_resized_vocabularies_share_their_first_rows(tmp_path):
    resized = gaussian(16, 8)
    after = dense() | {"model.embed_tokens.weight": resized}
    a, b = save(tmp_path / "a", dense()), save(tmp_path / "b", after)
    pairs = {p.before.name: p for p in checkpoints.list_pairs(a, b)}
    assert len(pairs) == len(names(a))
    found = pairs["model.embed_tokens.weight"]
    assert found.before.shape == found.after.shape == (10, 8)
    assert "the first 10 rows, of 10 before and 16 after" in found.note
    w_before, w_after = found.read()
    assert torch.equal(w_before, dense()["model.embed_tokens.weight"])
    assert torch.equal(w_after, resized[:10])
    assert all(p.note == "" for n, p in pairs.items() if "embed" not in n)


def test_unknown_arguments_and_nothing_in_common(tmp_path):
    a = save(tmp_path / "a", dense())
    other = save(tmp_path / "b", {"x.weight": gaussian(3, 3)})
    for call, message in (
        (
            lambda: checkpoints.iter_pairs(a, a, roles="q"),
            "roles = 'q', expected a coll",
        ),
        (lambda: checkpoints.iter_pairs(a, a, roles=["Q"]), "expert_down.*'q'"),
        (lambda: checkpoints.iter_pairs(a, a, missing="list"), "'raise' or 'skip'"),
        (lambda: checkpoints.iter_pairs(a, a, roles=["router"]), "no matrix in common"),
        (lambda: checkpoints.iter_pairs(a, other, missing="skip"), "no matrix in comm"),
        (lambda: checkpoints.read_matrix(a, "v_proj"), "no such tensor"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------- damaged on disk


def test_truncated_files_are_named_at_any_length(tmp_path):
    path = save(tmp_path / "a", dense(), n_shards=2)
    shard = path / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        shard.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model-00002.*truncated or dam") as e:
            checkpoints.list_matrices(path)
        assert "\n" not in str(e.value)
        with pytest.raises(ValueError, match="truncated"):
            checkpoints.iter_pairs(path, path)
    shard.write_bytes(whole)
    assert len(checkpoints.list_matrices(path)) == 16


class Planted:
    """What a pickle may hold: calls something when it is read. Here print."""

    def __reduce__(self):
        return print, ("executed",)


def test_nothing_of_a_pickle_is_run(tmp_path, capsys):
    place = tmp_path / "a" / "pytorch_model.bin"
    place.parent.mkdir()
    torch.save(dense() | {"x": Planted()}, place)
    for path in (place, place.parent):
        with pytest.raises(ValueError, match=r"model.bin holds print, .*no tensor"):
            checkpoints.list_matrices(path)
    assert capsys.readouterr().out == ""
    torch.save(dense(), place)
    assert names(place.parent) == names(save(tmp_path / "b", dense()))
    shutil.copy(place, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        checkpoints.list_matrices(tmp_path)


def test_missing_places(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        checkpoints.list_matrices(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no .safetensors file, expected"):
        checkpoints.list_matrices(tmp_path / "empty")
    path = save(tmp_path / "a", dense(), n_shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 3 shards .*model-00002"):
        checkpoints.list_matrices(path)
    (path / checkpoints.INDEX_NAME).unlink()
    with pytest.raises(ValueError, match=r"2 .safetensors files and no model.safete"):
        checkpoints.list_matrices(path)


def edit_index(path: Path, change) -> None:
    file = path / checkpoints.INDEX_NAME
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i["weight_map"].pop("lm_head.weight"), "holds lm_head.weight"),
        (
            lambda i: i["weight_map"].update(
                {"x.weight": "model-00001-of-00003.safetensors"}
            ),
            "00001.* lacks x.weight, against its index",
        ),
        (
            lambda i: [
                i["weight_map"].pop(name)
                for name, shard in list(i["weight_map"].items())
                if "00003-of" in shard
            ],
            "does not name the shard model-00003-of-00003",
        ),
        (lambda i: i["weight_map"].update({"x": "../b.safetensors"}), "same directory"),
        (lambda i: i["weight_map"].update({"x": 3}), "same directory"),
        (lambda i: i.pop("weight_map"), "has no weight_map"),
    ],
)
def test_an_index_that_disagrees_with_its_shards(tmp_path, change, message):
    path = save(tmp_path / "a", dense(), n_shards=3)
    edit_index(path, change)
    with pytest.raises(ValueError, match=message) as caught:
        checkpoints.list_matrices(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_broken_config_is_named(tmp_path, text):
    path = save(tmp_path / "a", dense())
    (path / "config.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"config.json (is not JSON|holds no)"
    ) as caught:
        checkpoints.list_matrices(path)
    assert "\n" not in str(caught.value)


def test_one_matrix_stored_twice_is_refused(tmp_path):
    tensors = dense() | {k: v for k, v in fused(dense()).items() if "qkv" in k}
    path = save(tmp_path / "a", tensors, CONFIG)
    with pytest.raises(
        ValueError, match=r"q_proj.weight twice, in .*q_proj.* and in .*qkv_proj"
    ):
        checkpoints.list_matrices(path)


# ------------------------------------------------------------ against transformers


def test_phi3_split_here_computes_what_phi3_computes(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    phi3 = transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes)).eval()
    phi3.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / checkpoints.INDEX_NAME).is_file()

    config = transformers.LlamaConfig(**sizes, rms_norm_eps=phi3.config.rms_norm_eps)
    llama = transformers.LlamaForCausalLM(config).eval()
    state = {k: v for k, v in phi3.state_dict().items() if v.ndim == 1}
    for matrix in checkpoints.list_matrices(tmp_path):
        state[matrix.name] = checkpoints.read_matrix(tmp_path, matrix.name)
    llama.load_state_dict(state)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(llama(tokens).logits, phi3(tokens).logits)
    assert load_file(next(tmp_path.glob("*.safetensors")))

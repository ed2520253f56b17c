import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from opd_geometry.training.models import (
    ModelConfig,
    build_model,
    character_tokenizer,
    check_reads_tasks,
    check_same_vocabulary,
    load_model,
    round_to_bfloat16,
    save_model,
)
from opd_geometry.training.tasks import CHARACTERS

TINY = ModelConfig(width=32, layers=2, head_size=16)
TOKENIZER = character_tokenizer()


@pytest.fixture
def model() -> PreTrainedModel:
    return build_model(TINY, seed=0)


@pytest.fixture
def stored(model: PreTrainedModel, tmp_path: Path) -> Path:
    save_model(model, TOKENIZER, tmp_path / "stored")
    return tmp_path / "stored"


def test_experts_make_a_mixture(tmp_path: Path) -> None:
    mixture = build_model(ModelConfig(32, 2, 16, experts=4), seed=0)
    assert mixture.config.model_type == "qwen3_moe"
    assert mixture.config.num_experts_per_tok == 2
    save_model(mixture, TOKENIZER, tmp_path)
    loaded, _ = load_model(tmp_path)
    assert same_weights(loaded, mixture)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(loaded(ids).logits, mixture(ids).logits)


def same_weights(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def change(stored: Path, name: str, tensor: Tensor | None) -> None:
    """Replace (or drop) one tensor of a stored checkpoint."""
    file = stored / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


# --- tokenizer --------------------------------------------------------------------


def test_every_character_is_one_token_and_comes_back() -> None:
    ids = TOKENIZER(CHARACTERS)["input_ids"]
    assert len(set(ids)) == len(CHARACTERS) == len(ids)
    assert {TOKENIZER.pad_token_id, TOKENIZER.eos_token_id}.isdisjoint(ids)
    assert len(TOKENIZER) == len(CHARACTERS) + 2
    rng = random.Random(0)
    texts = ["".join(rng.choices(CHARACTERS, k=rng.randrange(40))) for _ in range(200)]
    texts += ["  a  b ", " .", "don . t", "a ,b ?", "<eo>", "  "]
    for text in texts:
        ids = TOKENIZER(text)["input_ids"]
        assert len(ids) == len(text)
        assert TOKENIZER.decode(ids) == text


def test_characters_outside_the_vocabulary_do_not_become_others() -> None:
    known = TOKENIZER("a1")["input_ids"]
    for strange in ("A", "é", "\n", "５", "\U0001f600"):
        ids = TOKENIZER(f"a{strange}1")["input_ids"]
        assert [i for i in ids if i != TOKENIZER.pad_token_id] == known


def test_a_stored_tokenizer_is_the_same_fast_one(stored: Path) -> None:
    _, tokenizer = load_model(stored)
    assert tokenizer.is_fast
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert tokenizer.eos_token_id == TOKENIZER.eos_token_id
    assert tokenizer.pad_token_id == TOKENIZER.pad_token_id
    batch = tokenizer(["c:1+2=", "c:11+22="], padding=True, return_tensors="pt")
    assert batch["attention_mask"][0].tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert tokenizer.decode(tokenizer(CHARACTERS)["input_ids"]) == CHARACTERS


# --- building and storing ---------------------------------------------------------


def test_a_seed_decides_the_weights_and_nothing_else() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = build_model(TINY, seed=1)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(8)
    assert same_weights(first, build_model(TINY, seed=1))
    assert not same_weights(first, build_model(TINY, seed=2))
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}


def test_a_built_model_is_what_the_book_says() -> None:
    config = build_model(ModelConfig(width=128, layers=4), seed=0).config
    assert config.model_type == "qwen3"
    assert config.vocab_size == len(TOKENIZER)
    assert config.num_attention_heads == 2 * config.num_key_value_heads == 4
    assert not config.tie_word_embeddings
    assert config.eos_token_id == TOKENIZER.eos_token_id
    assert config.pad_token_id == TOKENIZER.pad_token_id


def test_what_is_loaded_is_what_was_stored_bit_for_bit(
    model: PreTrainedModel, stored: Path
) -> None:
    again, _ = load_model(stored)
    assert same_weights(model, again)
    assert not again.training
    ids = TOKENIZER("c:23+45=", return_tensors="pt")["input_ids"]
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_bfloat16_is_rounded_once(model: PreTrainedModel, tmp_path: Path) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    save_model(model, TOKENIZER, tmp_path / "bf16", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])  # memory keeps its own
    kept = load_file(tmp_path / "bf16" / "model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    loaded, _ = load_model(tmp_path / "bf16")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    rounded = round_to_bfloat16(model)
    assert rounded is model
    assert same_weights(loaded, rounded)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name].bfloat16().float())
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    once = {name: p.clone() for name, p in model.named_parameters()}
    round_to_bfloat16(model)
    assert all(torch.equal(p, once[name]) for name, p in model.named_parameters())


def test_storing_again_replaces_the_old_checkpoint(
    model: PreTrainedModel, stored: Path
) -> None:
    (stored / "left-over").touch()
    other = build_model(TINY, seed=3)
    save_model(other, TOKENIZER, stored)
    assert same_weights(load_model(stored)[0], other)
    assert not (stored / "left-over").exists()
    assert [path.name for path in stored.parent.iterdir()] == ["stored"]


@pytest.mark.parametrize("failing", ["model", "tokenizer"])
def test_a_failed_save_leaves_the_old_checkpoint(
    failing: str,
    model: PreTrainedModel,
    stored: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(directory: Path, **_: object) -> None:
        Path(directory).mkdir(exist_ok=True)
        (Path(directory) / "half-written").touch()
        raise OSError(28, "No space left on device")

    other, tokenizer = build_model(TINY, seed=3), character_tokenizer()
    monkeypatch.setattr(
        other if failing == "model" else tokenizer, "save_pretrained", full
    )
    for name in ("stored", "new"):
        with pytest.raises(OSError, match="No space left"):
            save_model(other, tokenizer, stored.with_name(name))
    assert same_weights(load_model(stored)[0], model)
    assert [path.name for path in stored.parent.iterdir()] == ["stored"]


# --- any causal language model ----------------------------------------------------


def others() -> list[PreTrainedModel]:
    sizes = {"vocab_size": 60, "bos_token_id": None, "eos_token_id": 1}
    return [
        GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **sizes)
        ),
        LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                tie_word_embeddings=True,
                **sizes,
            )
        ),
    ]


@pytest.mark.parametrize("other", others(), ids=lambda m: m.config.model_type)
def test_other_architectures_are_stored_and_loaded(
    other: PreTrainedModel, tmp_path: Path
) -> None:
    save_model(other, TOKENIZER, tmp_path / "other")
    again, tokenizer = load_model(tmp_path / "other")
    assert type(again) is type(other)
    assert same_weights(again, other)
    assert tokenizer.padding_side == "left"


def test_a_tokenizer_without_padding_gets_some(
    model: PreTrainedModel, stored: Path
) -> None:
    tokenizer = character_tokenizer()
    tokenizer.pad_token = None
    save_model(model, tokenizer, stored)
    _, again = load_model(stored)
    assert again.pad_token_id == again.eos_token_id
    assert again(["1", "12"], padding=True)["attention_mask"][0] == [0, 1]


# --- what is broken is named in one line ------------------------------------------


def message_of(source: Path | str) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        load_model(source)
    message = str(caught.value)
    assert "\n" not in message
    assert str(source) in message
    return message


def test_a_missing_checkpoint(tmp_path: Path, stored: Path) -> None:
    assert message_of(tmp_path / "none").startswith("no checkpoint at")
    assert message_of(tmp_path).startswith("no checkpoint at")  # an empty directory
    assert "expected a GGUF file" in message_of(stored / "config.json")
    (stored / "model.safetensors").unlink()
    assert "safetensors" in message_of(stored)


def test_a_name_that_is_neither_here_nor_on_the_hub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert message_of("no-such/model").startswith("cannot load a model")
    assert message_of("no/such/folder").startswith("cannot load a model")


@pytest.mark.parametrize("size", [0, 7, 5000, -1])
def test_a_truncated_checkpoint(stored: Path, size: int) -> None:
    file = stored / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert message_of(stored).startswith("cannot load a model")


def test_a_checkpoint_without_one_tensor(stored: Path) -> None:
    change(stored, "model.layers.1.mlp.up_proj.weight", None)
    assert "lacks model.layers.1.mlp.up_proj.weight" in message_of(stored)


def test_a_tensor_of_another_shape(stored: Path) -> None:
    change(stored, "model.layers.1.mlp.up_proj.weight", torch.zeros(3, 3))
    assert message_of(stored).startswith("cannot load a model")


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "no-such"}'])
def test_a_broken_config(stored: Path, text: str) -> None:
    (stored / "config.json").write_text(text)
    assert message_of(stored).startswith("cannot load a model")


def test_a_missing_or_broken_tokenizer(stored: Path) -> None:
    file = stored / "tokenizer.json"
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    assert "tokenizer" in message_of(stored)
    for path in stored.glob("tokenizer*"):
        path.unlink()
    assert message_of(stored).startswith("no tokenizer beside")


def test_a_tokenizer_larger_than_the_model(stored: Path) -> None:
    larger = character_tokenizer()
    larger.add_tokens(["A", "B"])
    larger.save_pretrained(stored)
    message = message_of(stored)
    assert f"{len(TOKENIZER) + 2} tokens" in message
    assert f"model has {len(TOKENIZER)}" in message


def test_student_and_teacher_must_read_alike() -> None:
    check_same_vocabulary(TOKENIZER, character_tokenizer())
    larger = character_tokenizer()
    larger.add_tokens(["A"])
    with pytest.raises(ValueError, match=r"token 'A' is None for one and 5\d for the"):
        check_same_vocabulary(TOKENIZER, larger)
    with pytest.raises(ValueError, match=r"token 'A' is 5\d for one and None for the"):
        check_same_vocabulary(larger, TOKENIZER)


def test_the_same_tokens_under_other_numbers_are_refused(stored: Path) -> None:
    file = stored / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    file.write_text(json.dumps(content))
    _, swapped = load_model(stored)
    with pytest.raises(ValueError, match=r"token '1' is 3 for one and 4 for the other"):
        check_same_vocabulary(TOKENIZER, swapped)


def test_revision_of_a_hub_id_reaches_both_downloads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def model(name: str, **options: Any) -> Any:
        asked.append((name, options["revision"]))
        return build_model(ModelConfig(32, 1, 16), 0), {"missing_keys": set()}

    def tokenizer(name: str, **options: Any) -> Any:
        asked.append((name, options["revision"]))
        return character_tokenizer()

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", tokenizer)
    load_model("owner/name@abc")
    assert asked == [("owner/name", "abc")] * 2


def test_tokenizer_without_a_character_of_the_tasks_is_refused() -> None:
    whole = character_tokenizer()
    check_reads_tasks(whole)
    core = json.loads(whole.backend_tokenizer.to_str())
    core["model"]["vocab"].pop("7")
    lacking = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)), pad_token="<pad>"
    )
    with pytest.raises(ValueError, match="cannot read '7'"):
        check_reads_tasks(lacking)

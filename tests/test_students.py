"""Pretrained students, with tiny stand-ins that have a real byte-pair tokenizer."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from opd_geometry.analysis import audit
from opd_geometry.experiments.descriptions import origin
from opd_geometry.experiments.profiles import GEMMA, build
from opd_geometry.experiments.runs import (
    checkpoint,
    ensure,
    starting_model,
)
from opd_geometry.training import students, tasks
from opd_geometry.training.models import frame, load_model, load_tokenizer
from opd_geometry.training.rollout import encode_prompts
from opd_geometry.training.sft import encode_pairs
from opd_geometry.training.students import (
    cut_model,
    cut_tokenizer,
    describe,
    prepare,
)

ROWS = 1024


def byte_pairs(first: str | None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer trained on task texts and on others."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    rng = np.random.default_rng(0)
    letters = list("etaoinshrdlu")
    other = ["".join(rng.choice(letters, size=6)) for _ in range(3000)]
    trainer = trainers.BpeTrainer(
        vocab_size=2500,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([*other, *students.task_texts()], trainer)
    if first:
        core.post_processor = processors.TemplateProcessing(
            single=f"{first} $A",
            special_tokens=[(first, core.token_to_id(first))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>" if first else None,
    )


SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 of two layers with <bos> in front and a tied head."""
    place, tokenizer = tmp_path_factory.mktemp("gemma"), byte_pairs("<bos>")
    torch.manual_seed(0)
    config = Gemma3TextConfig(vocab_size=len(tokenizer), sliding_window=64, **SHAPE)
    Gemma3ForCausalLM(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen 3 of two layers, whose head is its own and which has no <bos>."""
    place, tokenizer = tmp_path_factory.mktemp("qwen"), byte_pairs(None)
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 8, tie_word_embeddings=False, **SHAPE
    )
    Qwen3ForCausalLM(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(params=["gemma", "qwen"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def draws(seed: int) -> Iterator[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    for name in tasks.PRETRAINED_BENCHMARKS:
        for quality in tasks.QUALITIES:
            for _ in range(20):
                problem = tasks.draw_problem(name, rng)
                yield problem.prompt, tasks.demonstrate(problem, quality, rng)


# --- the cut -------------------------------------------------------------------------


def test_cut_tokenizer_reads_what_it_has_not_seen_as_the_whole_one(
    model: Path,
) -> None:
    whole = load_tokenizer(model)
    cut, kept = cut_tokenizer(whole, ROWS, "it")
    assert len(cut) == len(kept) == ROWS < len(whole)
    for text in (text for pair in draws(99) for text in pair):
        ids = cut(text, add_special_tokens=False)["input_ids"]
        theirs = whole(text, add_special_tokens=False)["input_ids"]
        assert [kept[i] for i in ids] == theirs
        assert cut.decode(ids) == text
    assert [kept[i] for i in (cut.pad_token_id, cut.eos_token_id)] == [0, 1]


def test_logits_of_the_kept_rows_are_those_of_the_whole_model(model: Path) -> None:
    language_model, whole = load_model(model)
    cut, kept = cut_tokenizer(whole, ROWS, "it")
    prompts = [prompt for prompt, _ in draws(3)][:32]
    framed = [frame(prompt, cut) for prompt in prompts]
    theirs = whole(framed, padding=True, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        wanted = language_model(**theirs).logits[..., kept]
        cut_model(language_model, kept)
        ids, mask = encode_prompts(prompts, cut)
        got = language_model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(torch.tensor(kept)[ids], theirs["input_ids"])
    assert got.shape[-1] == ROWS
    assert torch.equal(got, wanted)


def test_cut_checkpoint_is_the_model_rounded_to_bf16(
    model: Path, tmp_path: Path
) -> None:
    student = describe(str(model), tmp_path)
    made, tokenizer = load_model(prepare(student, tmp_path))
    whole, theirs = load_model(model)
    _, kept = cut_tokenizer(theirs, ROWS, "it")
    cut_model(whole, kept)
    assert student.parameters == sum(p.numel() for p in whole.parameters())
    assert students.view(tokenizer) == student.view
    assert made.config.eos_token_id == tokenizer.eos_token_id
    for name, parameter in whole.named_parameters():
        rounded = parameter.to(torch.bfloat16).float()
        assert torch.equal(made.get_parameter(name), rounded), name


def test_a_damaged_cut_is_made_again(gemma: Path, tmp_path: Path) -> None:
    student = describe(str(gemma), tmp_path)
    weights = prepare(student, tmp_path) / "model.safetensors"
    right = weights.read_bytes()
    weights.write_bytes(right[:-2] + b"xx")
    assert (prepare(student, tmp_path) / "model.safetensors").read_bytes() == right


def test_prompts_begin_as_the_model_wants(
    gemma: Path, qwen: Path, tmp_path: Path
) -> None:
    chatty = tmp_path / "chat"
    shutil.copytree(qwen, chatty)
    tokenizer = load_tokenizer(qwen)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}model: {% endif %}"
    )
    tokenizer.save_pretrained(chatty)
    wanted = {
        str(gemma): ("bos", "<bos>c:1+1="),
        str(qwen): ("plain", "c:1+1="),
        str(chatty): ("chat", "user: c:1+1=\nmodel: "),
    }
    for source, (convention, text) in wanted.items():
        student = describe(source, tmp_path)
        assert student.convention == convention
        cut = load_tokenizer(prepare(student, tmp_path))
        ids, _ = encode_prompts(["c:1+1="], cut)
        tokens, learned = encode_pairs([("c:1+1=", "2#2")], cut)
        assert frame("c:1+1=", cut) == text
        assert cut.decode(ids[0]) == text
        assert cut.decode(tokens[0]) == f"{text}2#2<eos>"
        assert cut.decode(tokens[0][learned[0]]) == "2#2<eos>"


# --- identity ------------------------------------------------------------------------


def test_a_student_is_its_content_wherever_it_lies(
    gemma: Path, qwen: Path, tmp_path: Path, data: Path
) -> None:
    there = tmp_path / "elsewhere"
    shutil.copytree(gemma, there)
    one = build("pretrained", "opd", 0, student=str(gemma))
    other = build("pretrained", "opd", 0, student=str(there))
    assert one.key() == other.key()
    assert one == other
    keys = {
        build("pretrained", "opd", 0, student=student).key()
        for student in (None, str(gemma), str(qwen))
    }
    assert len(keys) == 3
    settings = json.loads((there / "config.json").read_text())
    (there / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-5}))
    assert build("pretrained", "opd", 0, student=str(there)).key() != one.key()


def test_an_audit_trains_with_the_model_of_the_committed_runs_and_no_other(
    gemma: Path, qwen: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = [
        build("pretrained", "opd", seed, student=str(gemma)) for seed in (0, 1, 2)
    ]
    monkeypatch.setattr(audit, "committed_runs", lambda profile: committed)
    drawn = audit.draw("pretrained", 3, 0, ["opd"], str(gemma))
    assert sorted(run.seed for run in drawn) == [0, 1, 2]
    assert all(origin(run).source == str(gemma) for run in drawn)
    digest = origin(committed[0]).digest
    with pytest.raises(ValueError, match=f"qwen.* not the model .* {digest}$"):
        audit.draw("pretrained", 3, 0, ["opd"], str(qwen))
    elsewhere = [
        replace(run, start=replace(run.start, start=GEMMA)) for run in committed
    ]
    monkeypatch.setattr(audit, "committed_runs", lambda profile: elsewhere)
    with pytest.raises(ValueError, match=r"not committed: .* name it with --student$"):
        audit.draw("pretrained", 3, 0, ["opd"])


def test_runs_of_an_absent_student_have_names(data: Path) -> None:
    run = build("pretrained", "opd", 0)
    assert run.name.startswith("opd-s0-")
    with pytest.raises(ValueError, match="name its file or directory with --student"):
        starting_model(build("pretrained", "sft", 0))
    with pytest.raises(ValueError, match="--student"):
        ensure(run)


# --- bad input -----------------------------------------------------------------------


def test_what_is_no_student_is_refused_in_one_line(
    gemma: Path, tmp_path: Path, data: Path
) -> None:
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(60))
    cases = {
        str(tmp_path / "nothing"): "expected a directory with safetensors",
        str(tmp_path / "empty"): "no model at",
        "owner/name": "owner/name@REVISION",
        str(broken): "cannot load",
    }
    for source, words in cases.items():
        with pytest.raises(ValueError, match=words) as raised:
            build("pretrained", "opd", 0, student=source)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="takes no student"):
        build("laptop", "opd", 0, student=str(gemma))


def test_tokenizers_that_cannot_be_cut_are_named(gemma: Path, tmp_path: Path) -> None:
    whole = load_tokenizer(gemma)
    with pytest.raises(ValueError, match="keep more rows"):
        cut_tokenizer(whole, 300, "it")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, "<pad>"))
    blind = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )
    with pytest.raises(ValueError, match="cannot read"):
        cut_tokenizer(blind, ROWS, "it")


def test_checkpoints_of_a_grown_run_are_shared_and_lean(
    gemma: Path, data: Path
) -> None:
    run = build("pretrained", "opd", 0, student=str(gemma))
    assert isinstance(run.start, type(run))
    anchor = checkpoint(run, 0)
    rlvr = build("pretrained", "rlvr", 0, student=str(gemma))
    assert checkpoint(rlvr, 0) == anchor
    assert checkpoint(run.start, 0).parent.parent == data / "runs" / "students"

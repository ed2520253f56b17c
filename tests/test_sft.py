import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_geometry.training import rollout, sft, tasks
from opd_geometry.training.losses import sft_loss
from opd_geometry.training.models import ModelConfig, build_model, character_tokenizer
from opd_geometry.training.optimizer import OptimizerConfig, adamw
from opd_geometry.training.rollout import packed_outputs
from opd_geometry.training.sft import SFTConfig, draw_batch, encode_pairs, sft_steps

TOKENIZER = character_tokenizer()
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
CONFIG = SFTConfig(
    OptimizerConfig(1e-3, "cosine", 2),
    steps=6,
    batch_sequences=7,
    qualities=(("careful", 1.0), ("guess", 1.0), ("sloppy", 1.0)),
)
PAIRS = [("c:23+45-12=", "68,56#56"), ("b:9,2=", "#1"), ("g:6,4=", "2,0#2")]


def tiny(seed: int = 0) -> PreTrainedModel:
    return build_model(ModelConfig(32, 2, 16), seed)


def weights(model: PreTrainedModel) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(
    config: SFTConfig, seed: int = 0
) -> tuple[PreTrainedModel, list[dict[str, float]]]:
    model = tiny()
    optimizer = adamw(model, config.optimizer)
    return model, list(sft_steps(config, model, TOKENIZER, optimizer, seed=seed))


def naive_loss(model: PreTrainedModel, pairs: list[tuple[str, str]]) -> Tensor:
    """Mean over the tokens of response and end, one unpadded pair at a time."""
    losses = []
    for prompt, response in pairs:
        ids = torch.tensor(TOKENIZER(prompt + response)["input_ids"] + [EOS])
        scores = model(ids[None, :-1]).logits[0].log_softmax(-1)
        for place in range(len(prompt), len(ids)):
            losses.append(-scores[place - 1, ids[place]])
    return torch.stack(losses).mean()


# --- one step ---------------------------------------------------------------------


def test_a_step_follows_the_gradient_of_the_plain_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loss and gradient norm against pairs that are read one by one, unpadded."""
    config = replace(CONFIG, steps=1, batch_sequences=3, micro_batch=2)
    monkeypatch.setattr(sft, "draw_batch", lambda *_: PAIRS)
    _, [metrics] = trained(config)
    model = tiny()
    loss = naive_loss(model, PAIRS)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)


@pytest.mark.parametrize("micro_batch", [1, 3, 7])
@pytest.mark.parametrize("data", ["demonstrations", "pretraining"])
def test_the_split_into_micro_batches_changes_nothing(
    micro_batch: int, data: str
) -> None:
    config = replace(CONFIG, data=data, steps=3, learn_prompt=data == "pretraining")
    whole, metrics = trained(config)
    split, others = trained(replace(config, micro_batch=micro_batch))
    torch.testing.assert_close(weights(split), weights(whole), atol=2e-6, rtol=0)
    for ours, theirs in zip(metrics, others, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_the_gradient_is_clipped_to_its_norm() -> None:
    """With plain steps of size one, the weights move by the clipped norm."""
    config = replace(
        CONFIG, steps=1, optimizer=replace(CONFIG.optimizer, max_grad_norm=0.01)
    )
    model = tiny()
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rate = sft.learning_rate(config.optimizer, 0, 1)
    [metrics] = sft_steps(config, model, TOKENIZER, optimizer, seed=0)
    assert metrics["grad_norm"] > 0.1  # as it was before
    assert metrics["learning_rate"] == rate
    moved = (weights(model) - before).norm().item()
    assert moved == pytest.approx(0.01 * rate, rel=1e-3)


# --- what is learned --------------------------------------------------------------


def test_the_response_and_its_end_are_learned_and_the_prompt_is_not() -> None:
    tokens, learned = encode_pairs(PAIRS, TOKENIZER)
    longest = max(len(p) + len(r) + 1 for p, r in PAIRS)
    assert tokens.shape == learned.shape == (3, longest)
    for (prompt, response), ids, mask in zip(PAIRS, tokens, learned, strict=True):
        end = len(prompt) + len(response)
        assert TOKENIZER.decode(ids[:end]) == prompt + response
        assert ids[end] == EOS
        assert ids[end + 1 :].eq(PAD).all()
        assert mask.tolist() == [len(prompt) <= t <= end for t in range(longest)]
    _, everything = encode_pairs(PAIRS, TOKENIZER, learn_prompt=True)
    for (prompt, response), mask in zip(PAIRS, everything, strict=True):
        assert mask.sum() == len(prompt) + len(response) + 1


def test_padding_width_changes_nothing() -> None:
    model = tiny()

    def gradient(pairs: list[tuple[str, str]], ours: int) -> Tensor:
        tokens, learned = encode_pairs(pairs, TOKENIZER)
        learned[ours:] = False
        logits = model(tokens[:, :-1]).logits
        model.zero_grad()
        sft.sft_loss(logits, tokens[:, 1:], learned[:, 1:]).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    wide = [*PAIRS, ("c:1+2+3=", "3,6#6" * 4)]
    torch.testing.assert_close(
        gradient(PAIRS, 3), gradient(wide, 3), atol=1e-6, rtol=1e-4
    )


def test_prompt_and_response_are_tokenized_apart() -> None:
    """A tokenizer that merges across the border must not move it."""

    class Merging:
        eos_token_id, pad_token_id = 1, 0

        def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
            return {"input_ids": [[50] if t == "=#" else [ord(t)] for t in texts]}

    tokens, learned = encode_pairs([("=", "#")], Merging())  # type: ignore[arg-type]
    assert tokens.tolist() == [[ord("="), ord("#"), 1]]
    assert learned.tolist() == [[False, True, True]]


def test_what_is_shown_is_learned_with_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft, "draw_batch", lambda *_: PAIRS)
    config = replace(CONFIG, optimizer=OptimizerConfig(3e-3, warmup_steps=5), steps=80)
    model, metrics = trained(config)
    assert metrics[-1]["loss"] < 0.1 < 3 < metrics[0]["loss"]
    for prompt, response in PAIRS:
        ids = TOKENIZER(prompt, return_tensors="pt")["input_ids"]
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=20,
        )
        assert TOKENIZER.decode(written[0, ids.shape[1] :]) == response + "<eos>"


# --- data -------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["demonstrations", "pretraining"])
def test_seed_and_step_decide_the_batch(data: str) -> None:
    config = replace(CONFIG, data=data, batch_sequences=20)
    assert draw_batch(config, 0, 3) == draw_batch(config, 0, 3)
    batches = [draw_batch(config, seed, step) for seed in (0, 1) for step in (0, 1)]
    assert all(a != b for i, a in enumerate(batches) for b in batches[:i])
    assert {len(batch) for batch in batches} == {20}


def test_the_configured_data_are_drawn() -> None:
    config = replace(
        CONFIG,
        batch_sequences=40,
        benchmarks=("gcd",),
        qualities=(("guess", 1.0),),
    )
    pairs = draw_batch(config, 0, 0)
    assert all(p.startswith("g:") and r.startswith("#") for p, r in pairs)
    pretraining = draw_batch(replace(config, data="pretraining"), 0, 0)
    assert not any("#" in response for _, response in pretraining)
    assert all(not tasks.is_held_out(prompt) for prompt, _ in pairs)


# --- resuming ---------------------------------------------------------------------


def test_a_resumed_run_is_the_same_run() -> None:
    straight, metrics = trained(CONFIG)
    model = tiny()
    optimizer = adamw(model, CONFIG.optimizer)
    loop = sft_steps(CONFIG, model, TOKENIZER, optimizer, seed=0)
    first = [next(loop) for _ in range(2)]
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    next(loop)  # lost: what was saved is older
    resumed = tiny(seed=9)
    again = adamw(resumed, CONFIG.optimizer)
    resumed.load_state_dict(state[0])
    again.load_state_dict(state[1])
    rest = sft_steps(CONFIG, resumed, TOKENIZER, again, seed=0, first_step=2)
    assert first + list(rest) == metrics
    assert torch.equal(weights(resumed), weights(straight))


def test_other_seeds_are_other_runs() -> None:
    assert torch.equal(weights(trained(CONFIG)[0]), weights(trained(CONFIG)[0]))
    other = trained(CONFIG, seed=1)[0]
    assert not torch.equal(weights(trained(CONFIG)[0]), weights(other))


# --- packing and precision ----------------------------------------------------------


@pytest.mark.parametrize("row_tokens", [1, 25, 60, 1000])
def test_packed_rows_give_the_loss_and_gradient_of_padded_ones(row_tokens: int) -> None:
    config = replace(CONFIG, steps=1, batch_sequences=12)
    _, [wanted] = trained(config)
    _, [metrics] = trained(replace(config, row_tokens=row_tokens))
    assert metrics["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    assert metrics["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
    model = tiny()
    tokens, learned = encode_pairs(draw_batch(config, 0, 0), TOKENIZER)
    ids, mask = tokens[:, :-1], learned[:, 1:]
    lengths = sft.last_places(mask) + 1
    gradients = []
    for logits in (
        model(input_ids=ids).logits,
        packed_outputs(model, ids, lengths, row_tokens),
    ):
        loss = sft_loss(logits, tokens[:, 1:], mask)
        found = torch.autograd.grad(loss, list(model.parameters()))
        gradients.append(torch.cat([g.flatten() for g in found]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("row_tokens", [0, 60])
def test_a_large_vocabulary_in_chunks_gives_the_same_step(
    row_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, steps=2, row_tokens=row_tokens)
    model, wanted = trained(config)
    monkeypatch.setattr(rollout, "MOST_LOGITS", 500)
    ours, metrics = trained(config)
    assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in wanted])
    torch.testing.assert_close(weights(ours), weights(model), rtol=1e-3, atol=1e-5)


def test_a_sequence_sees_none_of_its_neighbours() -> None:
    """Another neighbour in the row changes no logit; another own token does."""
    model = tiny()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    lengths = torch.tensor([4, 3])
    base = packed_outputs(model, ids, lengths, 100)
    other = ids.clone()
    other[0, 1] = 20
    moved = packed_outputs(model, other, lengths, 100)
    assert torch.equal(moved[1], base[1])
    assert not torch.equal(moved[0, 1:], base[0, 1:])
    alone = model(input_ids=ids[1:, :3]).logits
    torch.testing.assert_close(base[1:, :3], alone, rtol=1e-5, atol=1e-6)
    assert base[1, 3].abs().sum() == 0


def test_bf16_copy_learns_as_float32_does() -> None:
    config = replace(CONFIG, steps=30, optimizer=OptimizerConfig(3e-3, "cosine", 2))
    _, wanted = trained(config)
    model, metrics = trained(replace(config, mixed_precision="bf16-copy"))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert metrics[0]["loss"] == pytest.approx(wanted[0]["loss"], rel=2e-2)
    assert metrics[-1]["loss"] == pytest.approx(wanted[-1]["loss"], rel=5e-2)


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="bf16-copy"):
        replace(CONFIG, mixed_precision="half")

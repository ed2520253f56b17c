from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import children
import pytest
import torch
from children import Child
from scipy import stats
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from opd_geometry.training import rollout as rollouts
from opd_geometry.training.models import ModelConfig, build_model, character_tokenizer
from opd_geometry.training.rollout import (
    Rollout,
    completion_log_probs,
    completion_logits,
    decode_completions,
    encode_prompts,
    sample,
)

TOKENIZER = character_tokenizer()
PROMPTS = ["c:23+45-12=", "g:48,18=", "b:9,2=", "c:1+2+3+4+5+6=", "g:6,4="]
IDS, MASK = encode_prompts(PROMPTS, TOKENIZER)
EOS = 52
LONGEST = 12


def sharpened(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Random weights are nearly uniform over tokens; these have an opinion."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=rng))
    return model.eval()


def qwen(seed: int = 0) -> PreTrainedModel:
    model = sharpened(build_model(ModelConfig(32, 2, 16), seed=0), seed)
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 2  # often the likeliest, so that lengths differ
    return model


MODEL = qwen(seed=2)
SIZES = {"vocab_size": 60, "bos_token_id": None, "eos_token_id": 1}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    **SIZES,
}
# Gemma-3 has sliding layers beside full ones; GPT-2 learned absolute positions.
OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **SIZES)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(sliding_window=64, sliding_window_pattern=2, **SMALL)
    ),
}


def drawn(
    model: PreTrainedModel = MODEL,
    group_size: int = 4,
    seed: int = 0,
    temperature: float = 1.0,
    longest: int = LONGEST,
    shared: bool = False,
) -> Rollout:
    return sample(
        model,
        IDS,
        MASK,
        group_size=group_size,
        max_new_tokens=longest,
        eos_token_id=EOS,
        generator=torch.Generator().manual_seed(seed),
        temperature=temperature,
        shared_prefixes=shared,
    )


def prompt_of(rollout: Rollout, row: int) -> Tensor:
    p = row // rollout.group_size
    return rollout.prompt_ids[p][rollout.prompt_mask[p].bool()]


def naive_log_probs(
    model: PreTrainedModel, rollout: Rollout, temperature: float = 1.0
) -> Tensor:
    """Each row alone, without padding, cache or mask: one plain forward pass."""
    scored = torch.zeros(rollout.mask.shape, dtype=model.dtype)
    for row, length in enumerate(rollout.mask.sum(1).tolist()):
        prompt = prompt_of(rollout, row)
        written = rollout.completions[row, :length]
        logits = model(torch.cat([prompt, written])[None]).logits[0]
        scores = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        scored[row, :length] = scores.gather(1, written[:, None]).squeeze(1)
    return scored


# --- what is drawn ----------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("group_size", [1, 3, 8])
def test_a_row_draws_what_it_would_draw_alone(
    group_size: int, temperature: float, shared: bool
) -> None:
    rollout = drawn(
        group_size=group_size, seed=3, temperature=temperature, shared=shared
    )
    uniform = torch.rand(
        LONGEST, len(rollout.mask), 1, generator=torch.Generator().manual_seed(3)
    )
    lengths = rollout.mask.sum(1)
    if group_size == 8:  # rows finish, and leave, at many times
        assert len(set(lengths.tolist())) > 5
    with torch.no_grad():
        for row in range(len(rollout.mask)):
            ids = prompt_of(rollout, row)
            for t in range(LONGEST):
                probs = (MODEL(ids[None]).logits[0, -1] / temperature).softmax(-1)
                token = (probs.double().cumsum(0) <= uniform[t, row, 0]).sum()
                assert token == rollout.completions[row, t]
                ids = torch.cat([ids, token[None]])
                if token == EOS:
                    break
            assert lengths[row] == t + 1


def test_a_row_ends_with_its_end_of_sequence_token() -> None:
    rollout = drawn(group_size=8)
    for ids, mask in zip(rollout.completions, rollout.mask, strict=True):
        ends = (ids == EOS).nonzero().flatten().tolist()
        length = ends[0] + 1 if ends else LONGEST
        assert mask.tolist() == [t < length for t in range(rollout.mask.shape[1])]
    assert torch.equal(rollout.ended(EOS), (rollout.completions == EOS).any(1) & True)
    assert rollout.ended(EOS).any()
    assert not rollout.ended(EOS).all()
    assert rollout.log_probs[~rollout.mask].eq(0).all()
    assert rollout.log_probs[rollout.mask].lt(0).all()


def test_a_cut_row_has_not_ended_even_if_padding_looks_like_the_end() -> None:
    ids = torch.tensor([[3, EOS, EOS], [3, 4, 5], [3, 4, EOS]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0]]).bool()
    rollout = Rollout(IDS[:1], MASK[:1], ids, mask, ids.float(), 3)
    assert rollout.ended(EOS).tolist() == [True, False, False]


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_what_is_sampled_in_pieces_is_what_is_sampled_at_once(at_once: int) -> None:
    given = {"group_size": 3, "max_new_tokens": LONGEST, "eos_token_id": EOS}
    rng = [torch.Generator().manual_seed(3) for _ in range(3)]
    whole = sample(MODEL, IDS, MASK, **given, generator=rng[0])
    pieces = sample(MODEL, IDS, MASK, **given, generator=rng[1], at_once=at_once)
    assert torch.equal(pieces.mask, whole.mask)
    assert torch.equal(pieces.completions * whole.mask, whole.completions * whole.mask)
    assert torch.equal(pieces.prompt_ids, whole.prompt_ids)
    torch.testing.assert_close(pieces.log_probs, whole.log_probs)
    part = sample(MODEL, IDS, MASK, **given, generator=rng[2], share=slice(1, 3))
    width = part.mask.shape[1]
    assert torch.equal(part.mask, whole.mask[3:9, :width])
    assert torch.equal(
        part.completions[part.mask], whole.completions[3:9, :width][part.mask]
    )


def test_the_batch_stops_when_all_are_done() -> None:
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    handle = MODEL.register_forward_hook(count)
    rollout = drawn(longest=200)
    handle.remove()
    longest = int(rollout.mask.sum(1).max())
    assert longest < 200
    assert calls == longest == rollout.mask.shape[1]  # the prompt, then a token each


def test_prompts_are_read_once_and_finished_rows_leave() -> None:
    sizes = []

    def note(_: object, __: object, inputs: dict[str, Tensor]) -> None:
        sizes.append(tuple(inputs["input_ids"].shape))

    handle = MODEL.register_forward_pre_hook(note, with_kwargs=True)
    rollout = drawn(group_size=8)
    handle.remove()
    assert sizes[0] == IDS.shape
    for t, (rows, width) in enumerate(sizes[1:], start=1):
        running = int(rollout.mask[:, t].sum())
        assert width == 1
        assert running <= rows < max(running / 0.9 + 1, running + 1)


def test_greedy_decoding_is_that_of_transformers() -> None:
    rollout = drawn(group_size=1, temperature=0.0)
    expected = MODEL.generate(
        input_ids=IDS,
        attention_mask=MASK,
        do_sample=False,
        max_new_tokens=LONGEST,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )[:, IDS.shape[1] :]
    assert torch.equal(rollout.completions, expected)
    torch.testing.assert_close(
        rollout.log_probs, naive_log_probs(MODEL, rollout), atol=1e-5, rtol=1e-5
    )


def agreement(tokens: Tensor, probs: Tensor) -> float:
    """p-value of drawing such frequencies; rare tokens count as one."""
    expected = len(tokens) * probs
    seen = tokens.bincount(minlength=len(probs)).double()
    rare = expected < 5
    bins = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (seen, expected)]
    assert bins[1][-1] > 1
    return float(stats.chisquare(*bins).pvalue)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_come_as_often_as_the_model_says(temperature: float) -> None:
    rollout = sample(
        MODEL,
        IDS[:1],
        MASK[:1],
        group_size=20_000,
        max_new_tokens=1,
        eos_token_id=EOS,
        generator=torch.Generator().manual_seed(0),
        temperature=temperature,
    )
    with torch.no_grad():
        logits = MODEL(prompt_of(rollout, 0)[None]).logits[0, -1]
    probs = (logits.double() / temperature).softmax(-1)
    assert agreement(rollout.completions[:, 0], probs) > 0.01


def test_the_second_token_follows_the_first() -> None:
    """Frequencies of pairs: a cache that mixed up its rows would break these."""
    rollout = sample(
        MODEL,
        IDS[:2],
        MASK[:2],
        group_size=10_000,
        max_new_tokens=2,
        eos_token_id=EOS,
        generator=torch.Generator().manual_seed(1),
    )
    for prompt in range(2):
        rows = rollout.rows_of(torch.tensor([prompt]))
        pairs = rollout.completions[rows][rollout.mask[rows, 1]]
        first = pairs[:, 0].mode().values
        second = pairs[pairs[:, 0] == first][:, 1]
        ids = torch.cat([prompt_of(rollout, int(rows[0])), first[None]])
        with torch.no_grad():
            probs = MODEL(ids[None]).logits[0, -1].double().softmax(-1)
        assert agreement(second, probs) > 0.01


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]).repeat(3, 1)
    uniform = torch.tensor([[0.0], [0.5], [1.0 - 2**-24]])
    tokens, log_probs = rollouts._draw(logits, uniform, 1.0)
    assert tokens.tolist() == [1, 3, 3]
    torch.testing.assert_close(
        log_probs.exp(), torch.tensor([0.26894, 0.73106, 0.73106])
    )


def test_a_seed_decides_the_draw() -> None:
    assert torch.equal(drawn(seed=5).completions, drawn(seed=5).completions)
    assert not torch.equal(drawn(seed=5).completions, drawn(seed=6).completions)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    drawn()
    assert torch.equal(torch.get_rng_state(), state)  # no other source is touched


def test_members_of_a_group_differ() -> None:
    rows = {tuple(ids.tolist()) for ids in drawn(group_size=8).completions[:8]}
    assert len(rows) > 4


# --- scoring ----------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("group_size", [1, 3, 8])
def test_scores_are_those_of_a_plain_forward_pass(
    group_size: int, temperature: float, shared: bool
) -> None:
    rollout = drawn(group_size=group_size, temperature=temperature, shared=shared)
    scored = completion_log_probs(MODEL, rollout, temperature)
    assert scored.dtype == torch.float32
    assert scored[~rollout.mask].eq(0).all()
    torch.testing.assert_close(
        scored, naive_log_probs(MODEL, rollout, temperature), atol=2e-5, rtol=1e-5
    )
    # and what was sampled is what is scored
    torch.testing.assert_close(rollout.log_probs, scored, atol=2e-5, rtol=1e-5)
    other = qwen(seed=1)
    torch.testing.assert_close(
        completion_log_probs(other, rollout),
        naive_log_probs(other, rollout),
        atol=2e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("shared", [False, True])
def test_other_architectures_are_scored_alike(
    name: str, attention: str, shared: bool
) -> None:
    model = sharpened(OTHERS[name]())
    model.set_attn_implementation(attention)
    rollout = drawn(model, group_size=3, shared=shared)
    expected = naive_log_probs(model, rollout)
    torch.testing.assert_close(rollout.log_probs, expected, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(
        completion_log_probs(model, rollout), expected, atol=5e-5, rtol=1e-4
    )


def test_what_begins_alike_is_read_once() -> None:
    ids = torch.tensor(
        [[3, 4, 5, 6], [3, 4, 7, EOS], [3, 4, 5, 6], [4, 4, 5, EOS], [3, EOS, 0, 0]]
    )
    mask = torch.tensor([4, 4, 4, 4, 2])[:, None] > torch.arange(4)
    rollout = Rollout(IDS[1:2], MASK[1:2], ids, mask, mask.float(), 5)
    read = []

    def note(_: object, __: object, inputs: dict[str, Tensor]) -> None:
        read.append(inputs["input_ids"].numel() - int(MASK[1].sum()))

    handle = MODEL.register_forward_pre_hook(note, with_kwargs=True)
    plain = completion_log_probs(MODEL, rollout)
    alike = completion_log_probs(MODEL, replace(rollout, shared_prefixes=True))
    handle.remove()
    # 3, 3 4, 3 4 5, 3 4 7, 4, 4 4, 4 4 5: the last token of each is never read
    assert read == [13, 7]
    assert rollout.own_tokens().tolist() == [18]
    assert replace(rollout, shared_prefixes=True).own_tokens().tolist() == [11]
    torch.testing.assert_close(alike, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        plain, naive_log_probs(MODEL, rollout), atol=2e-5, rtol=1e-5
    )


def test_equal_beginnings_are_sampled_once() -> None:
    sizes = []

    def note(_: object, __: object, inputs: dict[str, Tensor]) -> None:
        sizes.append(len(inputs["input_ids"]))

    handle = MODEL.register_forward_pre_hook(note, with_kwargs=True)
    rollout = drawn(group_size=8, temperature=0.4, shared=True)
    handle.remove()
    plain = drawn(group_size=8, temperature=0.4)
    assert torch.equal(rollout.completions, plain.completions)
    assert torch.equal(rollout.mask, plain.mask)
    torch.testing.assert_close(rollout.log_probs, plain.log_probs)
    begun = [
        {
            (row // 8, *rollout.completions[row, :t].tolist())
            for row in rollout.mask[:, t].nonzero().flatten().tolist()
        }
        for t in range(rollout.mask.shape[1])
    ]
    assert sizes == [len(prefixes) for prefixes in begun]
    assert sum(sizes) < 0.8 * int(rollout.mask.sum())


@pytest.mark.parametrize("shared", [False, True])
def test_a_group_of_one_token_completions(shared: bool) -> None:
    rollout = replace(
        drawn(group_size=2, shared=shared),
        completions=torch.full((10, 1), EOS),
        mask=torch.ones(10, 1, dtype=torch.bool),
    )
    torch.testing.assert_close(
        completion_log_probs(MODEL, rollout),
        naive_log_probs(MODEL, rollout),
        atol=2e-5,
        rtol=1e-5,
    )


def test_tokens_off_the_mask_are_never_read() -> None:
    rollout = drawn()
    junk = rollout.completions.masked_fill(~rollout.mask, 7)
    expected = completion_log_probs(MODEL, rollout)
    assert torch.equal(
        completion_log_probs(MODEL, replace(rollout, completions=junk)), expected
    )
    ids = rollout.prompt_ids.masked_fill(rollout.prompt_mask == 0, 7)
    assert torch.equal(
        completion_log_probs(MODEL, replace(rollout, prompt_ids=ids)), expected
    )


@pytest.mark.parametrize("tokens", [1, 60, 10_000])
def test_tokens_a_pass_change_nothing(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = drawn()
    expected = completion_log_probs(MODEL, rollout)
    monkeypatch.setattr(rollouts, "_TOKENS_PER_PASS", {"cpu": tokens})
    torch.testing.assert_close(
        completion_log_probs(MODEL, rollout), expected, atol=1e-5, rtol=1e-5
    )


def test_padding_width_changes_nothing() -> None:
    rollout = drawn()
    wider = Rollout(
        torch.nn.functional.pad(rollout.prompt_ids, (5, 0)),
        torch.nn.functional.pad(rollout.prompt_mask, (5, 0)),
        torch.nn.functional.pad(rollout.completions, (0, 7), value=EOS),
        torch.nn.functional.pad(rollout.mask, (0, 7)),
        torch.nn.functional.pad(rollout.log_probs, (0, 7)),
        rollout.group_size,
    )
    scored = completion_log_probs(MODEL, wider)
    assert scored[:, -7:].eq(0).all()
    torch.testing.assert_close(
        scored[:, :-7], completion_log_probs(MODEL, rollout), atol=1e-5, rtol=1e-5
    )


def test_taken_prompts_keep_their_groups() -> None:
    rollout = drawn(group_size=3)
    chosen = torch.tensor([4, 1])
    taken = rollout.take(chosen)
    rows = rollout.rows_of(chosen)
    assert rows.tolist() == [12, 13, 14, 3, 4, 5]
    width = int(rollout.mask[rows].sum(1).max())
    assert taken.mask.shape == (6, width)
    assert taken.prompt_mask.shape[1] == MASK[chosen].sum(1).max()
    for name in ("completions", "mask", "log_probs"):
        assert torch.equal(getattr(taken, name), getattr(rollout, name)[rows, :width])
    torch.testing.assert_close(
        completion_log_probs(MODEL, taken),
        completion_log_probs(MODEL, rollout)[rows, :width],
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("group_size", [1, 3])
def test_the_gradient_through_the_shared_prompt_is_the_plain_one(
    group_size: int, shared: bool
) -> None:
    model = qwen(seed=2).double()  # its norms stay in float32, hence the tolerance
    rollout = drawn(group_size=group_size, temperature=0.4, shared=shared)
    weights = torch.randn(rollout.mask.shape, generator=torch.Generator()).double()
    gradients = []
    for score in (completion_log_probs, naive_log_probs):
        model.zero_grad()
        (score(model, rollout) * weights * rollout.mask).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for ours, plain in zip(*gradients, strict=True):
        assert (ours - plain).norm() <= 1e-6 * plain.norm()


def test_logits_are_those_of_a_plain_forward_pass() -> None:
    rollout = drawn(group_size=2)
    with torch.no_grad():
        logits = completion_logits(MODEL, rollout)
        assert logits.shape == (*rollout.mask.shape, MODEL.config.vocab_size)
        for row, length in enumerate(rollout.mask.sum(1).tolist()):
            prompt = prompt_of(rollout, row)
            ids = torch.cat([prompt, rollout.completions[row, :length]])
            plain = MODEL(ids[None]).logits[0, len(prompt) - 1 : -1]
            torch.testing.assert_close(
                logits[row, :length], plain, atol=2e-5, rtol=1e-4
            )


def test_scores_in_bfloat16_are_near() -> None:
    rollout = drawn()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        near = completion_log_probs(MODEL, rollout)
    assert near.dtype == torch.float32
    assert (near - rollout.log_probs).abs()[rollout.mask].mean() < 0.05


def test_layers_that_would_mix_completions_are_refused() -> None:
    rollout = drawn()
    window = SimpleNamespace(sliding_window=IDS.shape[1] + LONGEST - 1)
    with pytest.raises(ValueError, match=r"26 tokens .* sliding window of 25"):
        completion_logits(SimpleNamespace(config=window), rollout)
    flash = SimpleNamespace(_attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match=r"flash_attention_2: expected sdpa or eager"):
        completion_logits(SimpleNamespace(config=flash), rollout)
    linear = SimpleNamespace(layer_types=["full_attention", "linear_attention"])
    with pytest.raises(ValueError, match=r"layers of type linear_attention"):
        completion_logits(SimpleNamespace(config=linear), rollout)


# --- texts ------------------------------------------------------------------------


def test_prompts_are_padded_on_the_left() -> None:
    assert IDS.shape == MASK.shape == (5, len(PROMPTS[3]))
    for prompt, ids, mask in zip(PROMPTS, IDS, MASK, strict=True):
        assert mask.tolist() == [0] * (len(mask) - len(prompt)) + [1] * len(prompt)
        assert TOKENIZER.decode(ids[mask.bool()]) == prompt


def test_texts_stop_before_the_end_and_hide_nothing() -> None:
    ids = torch.tensor([TOKENIZER("68,56#56")["input_ids"]] * 3)
    ids[1, 5:] = TOKENIZER.eos_token_id
    ids[2, 3] = TOKENIZER.pad_token_id  # sampled: "68,6#56" would be a lie
    mask = torch.ones_like(ids).bool()
    mask[1, 6:] = False
    rollout = Rollout(IDS[:1], MASK[:1], ids, mask, ids.float(), 3)
    assert decode_completions(rollout, TOKENIZER) == [
        "68,56#56",
        "68,56",
        "68,<pad>6#56",
    ]


# --- large vocabularies --------------------------------------------------------------


def scored(model: PreTrainedModel, rollout: Rollout) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities, and the gradient of a sum of them with other weights each."""
    model.zero_grad()
    log_probs = completion_log_probs(model, rollout, temperature=0.7)
    weights = torch.linspace(-1, 2, log_probs.numel()).view_as(log_probs)
    (log_probs * weights).sum().backward()
    return log_probs.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("most", [1, 53 * 7, 53 * 64])
def test_scoring_in_chunks_changes_nothing(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = qwen(seed=2)
    rollout = sample(
        model,
        *(IDS, MASK),
        group_size=3,
        max_new_tokens=LONGEST,
        eos_token_id=EOS,
        generator=torch.Generator().manual_seed(0),
    )
    whole, gradients = scored(model, rollout)
    monkeypatch.setattr(rollouts, "MOST_LOGITS", most)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, out: seen.append(out.numel()))
    ours, theirs = scored(model, rollout)
    torch.testing.assert_close(ours, whole)
    torch.testing.assert_close(theirs, gradients, rtol=1e-4, atol=1e-4)
    assert max(seen) <= max(53, most)


def test_logits_that_are_not_the_heads_alone_are_made_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capped = Gemma3TextConfig(final_logit_softcapping=0.5, **SMALL)
    model = sharpened(Gemma3ForCausalLM(capped))
    monkeypatch.setattr(rollouts, "MOST_LOGITS", 1)
    assert not rollouts.scores_in_chunks(model, 100)
    assert rollouts.scores_in_chunks(MODEL, 100)


def test_peak_of_scoring_with_a_large_vocabulary(tmp_path: Path) -> None:
    vocabulary, tokens = 151_936, 4096
    peak = Child(tmp_path, children.peak_of_scoring, vocabulary, tokens).result()
    whole = 2 * 4 * vocabulary * tokens  # logits and their log-softmax, float32
    assert peak < whole / 10


def test_passes_hold_rows_of_like_length() -> None:
    assert rollouts._least_padded([10, 10, 11, 90, 100], 320) == [3, 2]
    assert rollouts._least_padded([50, 100, 400], 100) == [1, 1, 1]  # too long
    assert rollouts._least_padded([1] * 6, 1024) == [6]

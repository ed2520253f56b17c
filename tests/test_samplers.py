"""Completions by an engine with vLLM's interface, held against the loop's own."""

import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import at_scale
import engine
import pytest
import torch
from torch import Tensor

from opd_geometry.experiments import forecast, profiles, runs
from opd_geometry.training import data, losses
from opd_geometry.training.data import DataConfig
from opd_geometry.training.models import load_model
from opd_geometry.training.optimizer import OptimizerConfig, adamw
from opd_geometry.training.policy import PolicyConfig, policy_steps
from opd_geometry.training.rollout import completion_log_probs, encode_prompts, sample
from opd_geometry.training.rollout import stops_at as stop_finder
from opd_geometry.training.samplers import EngineSampler, OwnSampler, Writing

HOW = Writing(group_size=3, max_new_tokens=6, temperature=0.7)
ALL = slice(None)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return at_scale.save_all(tmp_path_factory.mktemp("engines"))


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", engine)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    engine.LLM.made.clear()


def made(place: Path, memory: float = 0.3) -> tuple[EngineSampler, Any, Any]:
    model, tokenizer = load_model(place / "student")
    sampler = EngineSampler(place / "student", tokenizer, 6, low=False, memory=memory)
    return sampler, model, tokenizer


def asked(tokenizer: Any) -> tuple[Tensor, Tensor]:
    return encode_prompts(["1+1=", "Solve 2x = 4 for x."], tokenizer)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- what it writes ------------------------------------------------------------------


def test_an_engine_says_the_probabilities_that_it_sampled_with(place: Path) -> None:
    sampler, model, tokenizer = made(place)
    rollout = sampler.write(*asked(tokenizer), HOW, seeded(), ALL)
    scored = completion_log_probs(model, rollout, HOW.temperature)
    torch.testing.assert_close(rollout.log_probs, scored, rtol=0, atol=1e-4)
    assert len({tuple(row) for row in rollout.completions.tolist()}) == 6
    again = sampler.write(*asked(tokenizer), HOW, seeded(), ALL)
    assert torch.equal(again.completions, rollout.completions)
    other = sampler.write(*asked(tokenizer), HOW, seeded(1), ALL)
    assert not torch.equal(other.completions, rollout.completions)


def test_a_share_writes_what_all_would(place: Path) -> None:
    sampler, _, tokenizer = made(place)
    whole = sampler.write(*asked(tokenizer), HOW, seeded(), ALL)
    last = sampler.write(*asked(tokenizer), HOW, seeded(), slice(1, 2))
    wide = last.mask.shape[1]
    assert torch.equal(last.completions, whole.completions[3:, :wide])


def test_own_and_engine_sample_the_same_distribution(place: Path) -> None:
    """First tokens of many completions, by both, within sampling noise."""
    sampler, model, tokenizer = made(place)
    how = Writing(group_size=400, max_new_tokens=1, temperature=0.1)
    ids, mask = (x[:1] for x in asked(tokenizer))
    counts = []
    for who in (sampler, OwnSampler(model, tokenizer)):
        tokens = who.write(ids, mask, how, seeded(), ALL).completions[:, 0].tolist()
        counts.append(Counter(tokens))
    shared = sum(min(counts[0][token], counts[1][token]) for token in counts[0])
    assert len(counts[0]) > 10
    assert shared > 230


def test_weights_are_pushed_and_what_was_read_forgotten(place: Path) -> None:
    sampler, model, tokenizer = made(place)
    how = replace(HOW, max_new_tokens=1)
    sampler.write(*asked(tokenizer), how, seeded(), ALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=seeded())
    stale = sampler.write(*asked(tokenizer), how, seeded(), ALL)
    scored = completion_log_probs(model, stale, HOW.temperature)
    assert (scored - stale.log_probs).abs().max() > 0.1
    sampler.take_weights(model)
    fresh = sampler.write(*asked(tokenizer), how, seeded(), ALL)
    scored = completion_log_probs(model, fresh, HOW.temperature)
    torch.testing.assert_close(fresh.log_probs, scored, rtol=0, atol=1e-4)


# --- how a completion ends -----------------------------------------------------------


def planted(place: Path, text: str) -> tuple[Any, Any]:
    """A model that writes the tokens of a text over and over, whatever it is asked."""
    model, tokenizer = load_model(place / "student")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    def forward(*_: Any, **named: Any) -> Any:
        out = original(*_, **named)
        out.logits[:] = -50.0
        for row, last in enumerate(named["input_ids"][:, -1].tolist()):
            after = ids[(ids.index(last) + 1) % len(ids)] if last in ids else ids[0]
            out.logits[row, -1, after] = 50.0
        return out

    original, model.forward = model.forward, forward
    return model, tokenizer


@pytest.mark.parametrize("who", ["own", "vllm"])
def test_a_stop_string_ends_a_completion_and_stays_in_it(who: str, place: Path) -> None:
    text = "xq zk"
    model, tokenizer = planted(place, text)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(set(ids)) == len(ids) > 2
    sampler: Any = OwnSampler(model, tokenizer)
    if who == "vllm":
        sampler = EngineSampler(place / "student", tokenizer, 9, low=False, memory=0.3)
        sampler.engine.weights = model
    for stop, written in (("q z", text[: text.index("z") + 1]), ("!!", None)):
        how = Writing(2, 9, 1.0, (stop, "never"))
        rollout = sampler.write(*asked(tokenizer), how, seeded(), ALL)
        texts = tokenizer.batch_decode(
            [
                row[keep]
                for row, keep in zip(rollout.completions, rollout.mask, strict=True)
            ]
        )
        assert rollout.ended(tokenizer.eos_token_id).tolist() == [bool(written)] * 4
        if written:
            assert all(stop in said and len(said) <= len(text) for said in texts)
        else:
            assert rollout.mask.sum(1).tolist() == [9] * 4


def test_a_stop_string_across_tokens_is_seen_once(place: Path) -> None:
    _, tokenizer = load_model(place / "student")
    ends = stop_finder(("</answer>", "é"), tokenizer)
    assert ends is not None
    ids = tokenizer("a</answer>b é</answer>", add_special_tokens=False)["input_ids"]
    at = [n for n in range(1, len(ids) + 1) if ends(torch.tensor([ids[:n]]))[0]]
    texts = [tokenizer.decode(ids[:n]) for n in at]
    assert len(texts) == 3
    assert texts[0].startswith("a</answer>")
    assert texts[1].endswith("é")
    assert texts[2] == tokenizer.decode(ids)
    assert stop_finder((), tokenizer) is None


def test_rows_that_stop_leave_the_batch_and_others_go_on(place: Path) -> None:
    """Own sampling: with a stop string no row's own draws before it change."""
    _, model, tokenizer = made(place)
    given = {"group_size": 8, "max_new_tokens": 12, "eos_token_id": 2}
    free = sample(model, *asked(tokenizer), generator=seeded(), **given)
    texts = tokenizer.batch_decode(free.completions[:, :6])
    stop = min(set(texts[0]), key=lambda c: sum(c in text for text in texts))
    ends = stop_finder((stop,), tokenizer)
    cut = sample(model, *asked(tokenizer), generator=seeded(), stops=ends, **given)
    assert cut.stopped is not None
    assert 0 < int(cut.stopped.sum()) < 16
    lengths = cut.mask.sum(1)
    for row in range(16):
        n = int(lengths[row])
        assert torch.equal(cut.completions[row, :n], free.completions[row, :n])
        said = tokenizer.decode(cut.completions[row, :n])
        assert (stop in said) == bool(cut.stopped[row])
    part = cut.take(torch.tensor([1]))
    assert part.stopped is not None
    assert torch.equal(part.stopped, cut.stopped[8:])


# --- the loop ------------------------------------------------------------------------


def config(place: Path, **more: Any) -> PolicyConfig:
    source = str(place / "problems.jsonl")
    columns = {"answer": "reward_model.ground_truth", "source": source}
    given = {
        "steps": 2,
        "prompts_per_step": 2,
        "group_size": 2,
        "max_new_tokens": 6,
        "gap_from": "scoring",
        "sampler": "vllm",
        "temperature": 0.8,
        "dataset": DataConfig(data.digest_of(source), **columns),
    }
    return PolicyConfig(OptimizerConfig(1e-2, warmup_steps=0), **{**given, **more})


def steps(
    place: Path, train: PolicyConfig, sampler: Any = None
) -> tuple[Any, list[Any]]:
    model, tokenizer = load_model(place / "student")
    teacher, _ = load_model(place / "teacher")
    if sampler is None:
        made = EngineSampler(place / "student", tokenizer, 6, low=False, memory=0.3)
        sampler = made
    optimizer = adamw(model, train.optimizer)
    loop = policy_steps(
        train, model, teacher, tokenizer, optimizer, seed=0, sampler=sampler
    )
    return model, list(loop)


@pytest.mark.parametrize("more", [{}, {"estimator": "full"}, {"alpha": 0.5}])
def test_each_step_is_written_with_the_weights_of_the_step_before(
    more: dict[str, Any], place: Path
) -> None:
    """A large learning rate: without the push the second step would be far off."""
    _, told = steps(place, config(place, **more))
    assert [metrics["sampler_gap"] < 1e-4 for metrics in told] == [True, True]
    assert [metrics["sampler_cut"] for metrics in told] == [0.0, 0.0]
    assert told[0]["gap"] != told[1]["gap"]


class Biased:
    """An engine that says other log-probabilities than it has."""

    def __init__(self, sampler: EngineSampler, by: float) -> None:
        self.sampler, self.by = sampler, by

    def take_weights(self, model: Any) -> None:
        self.sampler.take_weights(model)

    def write(self, *given: Any) -> Any:
        rollout = self.sampler.write(*given)
        return replace(rollout, log_probs=rollout.log_probs + self.by * rollout.mask)


@pytest.mark.parametrize(
    ("by", "most", "factor", "cut"),
    [
        (-0.1, 2.0, math.exp(0.1), 0.0),
        (-1.0, 2.0, 2.0, 1.0),
        (0.5, 2.0, math.exp(-0.5), 0.0),
        (-1.0, 0.0, 1.0, 0.0),
    ],
)
def test_importance_weights_scale_the_gradient(
    by: float, most: float, factor: float, cut: float, place: Path
) -> None:
    train = config(place, steps=1, sampler_gap=2.0, sampler_ratio=most)
    sampler, _, _ = made(place)
    (_, plain), (_, told) = (
        steps(place, train, who) for who in (sampler, Biased(sampler, by))
    )
    assert told[0]["sampler_gap"] == pytest.approx(abs(by), abs=1e-4)
    assert told[0]["sampler_cut"] == cut
    assert told[0]["loss"] == pytest.approx(factor * plain[0]["loss"], rel=1e-3)
    assert told[0]["grad_norm"] == pytest.approx(
        factor * plain[0]["grad_norm"], rel=1e-3
    )


@pytest.mark.parametrize("by", [0.3, math.nan])
def test_an_engine_that_is_too_far_off_is_refused_before_the_step(
    by: float, place: Path
) -> None:
    sampler, _, tokenizer = made(place)
    model, _ = load_model(place / "student")
    begun = [p.detach().clone() for p in model.parameters()]
    train = config(place)
    optimizer = adamw(model, train.optimizer)
    teacher, _ = load_model(place / "teacher")
    who: Any = Biased(sampler, by)
    loop = policy_steps(
        train, model, teacher, tokenizer, optimizer, seed=0, sampler=who
    )
    with pytest.raises(ValueError, match=r"step 0: .* nats a token apart: expected at"):
        next(loop)
    assert all(map(torch.equal, model.parameters(), begun))


def test_a_whole_run_by_an_engine(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPD_GEOMETRY_DATA", str(tmp_path))
    monkeypatch.setenv("OPD_GEOMETRY_TRACKER", "none")
    monkeypatch.setattr(runs, "HELD_OUT_PROBLEMS", 2)
    run = profiles.build(
        f"gpu:student={place / 'student'},teacher={place / 'teacher'},policy.stop=9,"
        f"policy.dataset={place / 'problems.jsonl'},policy.steps=2,policy.sampler=vllm,"
        "policy.prompts_per_step=2,policy.group_size=2,policy.max_new_tokens=4",
        "opd",
        0,
    )
    run = replace(run, start=runs.stored(place / "student"))
    runs.ensure(run)
    gaps = [h["value"] for h in runs.history(run) if h["metric"] == "sampler_gap"]
    assert len(gaps) == 2
    assert max(gaps) < 0.05  # two paths through bf16
    given = engine.LLM.made[-1].given
    assert given["logprobs_mode"] == "processed_logprobs"
    assert given["max_model_len"] == 4100
    assert engine.LLM.made[-1].weights.dtype == torch.bfloat16


# --- what it refuses -----------------------------------------------------------------


def test_without_vllm_one_line_says_so(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"vLLM is not installed; pip install") as got:
        made(place)
    assert "\n" not in str(got.value)


def test_an_engine_that_does_not_start_is_one_line(place: Path) -> None:
    with pytest.raises(ValueError, match=r"does not start with .*Engine core") as got:
        made(place, memory=0.95)
    assert "\n" not in str(got.value)


def test_an_engine_with_other_tokens_is_refused(place: Path, tmp_path: Path) -> None:
    at_scale.save_model(tmp_path / "other")
    at_scale.byte_tokenizer(more=20).save_pretrained(tmp_path / "other")
    _, tokenizer = load_model(place / "student")
    with pytest.raises(ValueError, match="student and vLLM's engine tokenizers differ"):
        EngineSampler(tmp_path / "other", tokenizer, 6, low=False, memory=0.3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"finish_reason": "abort"}, "ended a completion of . tokens by abort"),
        ({"finish_reason": "stop", "stop_reason": 7}, r"by stop \(7\): expected its"),
        ({"token_ids": []}, "of 0 tokens"),
        ({"logprobs": None}, "no finite log-probability"),
    ],
)
def test_what_an_engine_should_not_say_is_refused(
    change: dict[str, Any], words: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, _, tokenizer = made(place)
    complete = engine.LLM._complete

    def other(*given: Any) -> Any:
        return replace(complete(*given), **change)

    monkeypatch.setattr(engine.LLM, "_complete", other)
    with pytest.raises(ValueError, match=words):
        sampler.write(*asked(tokenizer), HOW, seeded(), ALL)


def test_a_prompt_that_is_too_long_is_one_line(place: Path) -> None:
    sampler, _, _ = made(place)
    ids = torch.ones(1, 5000, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"writes no completions: The decoder prompt"):
        sampler.write(ids, torch.ones_like(ids), HOW, seeded(), ALL)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"sampler": "sglang"}, "expected own or vllm"),
        ({"gap_from": "rollout"}, "expected the student and scoring"),
        ({"rollouts": "teacher"}, "with rollouts by the teacher"),
        ({"sampler_gap": 0.0}, "sampler_gap 0.0: expected"),
        ({"sampler_ratio": -1.0}, "sampler_ratio -1.0"),
        ({"sampler_memory": 1.0}, "expected a share"),
    ],
)
def test_settings_that_cannot_be_are_named(
    more: dict[str, Any], words: str, place: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        config(place, **more)


def test_truncated_ratios_keep_expectations() -> None:
    """Without truncation sum_y mu(y) w(y) f(y) is sum_y pi(y) f(y), by enumeration."""
    pi, mu = (torch.randn(1, 7, generator=seeded(s)).log_softmax(-1) for s in (1, 2))
    live, values = torch.ones(1, 7), torch.arange(7.0)
    weights = losses.truncated_ratio(pi, mu, live, math.inf)
    expected = float((pi.exp() * values).sum())
    assert float((mu.exp() * weights * values).sum()) == pytest.approx(expected)
    capped = losses.truncated_ratio(pi, mu, live, 1.5)
    assert torch.equal(capped, weights.clamp(max=1.5))
    nan = torch.full((1, 7), math.nan)
    assert torch.equal(losses.truncated_ratio(nan, mu, torch.zeros(1, 7), 2.0), live)
    with pytest.raises(ValueError, match="cut off at 0"):
        losses.truncated_ratio(pi, mu, live, 0.0)


def test_plan_counts_the_engines_memory() -> None:
    given = ("vllm,policy.sampler_memory=0.3", "vllm,policy.sampler_memory=0.4", "own")
    told = [
        forecast.forecast(profiles.build(f"gpu:policy.sampler={name}", "opd", 0))
        for name in given
    ]
    small, large, own = (found.memory for found in told if found is not None)
    assert large - small == pytest.approx(0.1 * forecast.H100.memory)
    assert small > own


# --- the teacher's place -------------------------------------------------------------


def test_the_teacher_has_a_dtype_and_a_place_of_its_own(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is asked to be, in what it is asked to compute, whatever the student."""
    seen: list[Any] = []
    monkeypatch.setattr(runs, "policy_steps", lambda *given, **_: seen.append(given))
    tokens = ("float32", "bfloat16", "")
    for dtype in tokens:
        text = f"{at_scale.profile_gpu(place)},policy.teacher_dtype={dtype}"
        run = profiles.build(text, "opd", 0)
        model, tokenizer = load_model(place / "student")
        runs.loop_of(run, model, tokenizer, adamw(model, run.train.optimizer), 0)
    dtypes = [next(given[2].parameters()).dtype for given in seen]
    assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16]
    moved: list[Any] = []
    teacher, _ = load_model(place / "teacher")
    to = type(teacher).to
    monkeypatch.setattr(
        type(teacher), "to", lambda self, where: moved.append(where) or to(self, where)
    )
    train = config(place, steps=1, sampler="own", teacher_device="cpu")
    steps(place, train, OwnSampler(*load_model(place / "student")))
    assert "cpu" in moved


def test_no_such_place_for_the_teacher_is_one_line(place: Path) -> None:
    train = config(place, sampler="own", teacher_device="nowhere:1")
    with pytest.raises(ValueError, match="teacher_device nowhere:1: ") as raised:
        steps(place, train, OwnSampler(*load_model(place / "student")))
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="with sharded: the teacher's"):
        config(place, sampler="own", teacher_device="cpu", sharded=True)


def test_plan_counts_the_teacher_where_it_is() -> None:
    given = ("", ",policy.teacher_dtype=float32", ",policy.teacher_device=cpu")
    told = [
        forecast.forecast(profiles.build(f"gpu:policy.steps=9{more}", "opd", 0))
        for more in given
    ]
    low, high, elsewhere = (found.memory for found in told if found is not None)
    weights = forecast.QWEN3["Qwen3-8B"].parameters
    assert high - low == pytest.approx(2 * weights)
    assert low - elsewhere == pytest.approx(2 * weights)

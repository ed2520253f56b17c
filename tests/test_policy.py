import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import PreTrainedModel

from opd_geometry.training import losses, policy, samplers, tasks
from opd_geometry.training import rollout as rollouts
from opd_geometry.training.models import ModelConfig, build_model, character_tokenizer
from opd_geometry.training.optimizer import OptimizerConfig, bfloat16_copy, optimizer_of
from opd_geometry.training.policy import PolicyConfig, draw_prompts, policy_steps
from opd_geometry.training.rollout import (
    Rollout,
    completion_log_probs,
    completion_logits,
    encode_prompts,
    sample,
)

TOKENIZER = character_tokenizer()
EOS = TOKENIZER.eos_token_id
OPD = PolicyConfig(
    OptimizerConfig(1e-3, warmup_steps=2),
    steps=3,
    prompts_per_step=4,
    group_size=3,
    max_new_tokens=6,
)
RLVR = replace(OPD, alpha=0.0)
FAST = replace(OPD, optimizer=OptimizerConfig(3e-3), steps=20, prompts_per_step=8)
Rewards = Callable[[list[tasks.Problem], Rollout, Any], Tensor]


def tiny(seed: int = 0, sharpness: float = 5.0) -> PreTrainedModel:
    """A model with an opinion, which ends a quarter of its completions early."""
    model = build_model(ModelConfig(32, 2, 16), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(sharpness)
        model.lm_head.weight[EOS] *= 3
    return model


TEACHER = tiny(seed=1)


def weights(model: PreTrainedModel) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(
    config: PolicyConfig, teacher: PreTrainedModel | None = TEACHER, seed: int = 0
) -> tuple[Tensor, list[dict[str, float]]]:
    """Weights and metrics after a run from the same student."""
    model = tiny()
    optimizer = optimizer_of(model, config.optimizer)
    loop = policy_steps(config, model, teacher, TOKENIZER, optimizer, seed=seed)
    metrics = list(loop)
    return weights(model), metrics


def by_first_token(_: object, rollout: Rollout, __: object) -> Tensor:
    """A reward that random models earn now and then."""
    return (rollout.completions[:, 0] % 2).float()


@pytest.fixture
def rewarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "verify_completions", by_first_token)


def set_rewards(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    monkeypatch.setattr(
        policy, "verify_completions", lambda *_: torch.tensor(values).float()
    )


def gradients(model: PreTrainedModel, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return gradient


def spy(monkeypatch: pytest.MonkeyPatch) -> list[Rollout]:
    """Keep every rollout that the loop draws."""
    kept: list[Rollout] = []
    original = samplers.sample

    def sample(*args: Any, **asked: Any) -> Rollout:
        kept.append(original(*args, **asked))
        return kept[-1]

    monkeypatch.setattr(samplers, "sample", sample)
    return kept


# --- the objectives ---------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["sampled", "full", "full-forward"])
def test_a_teacher_that_is_the_student_teaches_nothing(estimator: str) -> None:
    config = replace(OPD, estimator=estimator, steps=1)
    _, [same] = trained(config, teacher=tiny())
    _, [other] = trained(config)
    assert same["grad_norm"] < 1e-5 < 1e-2 < other["grad_norm"]
    assert abs(same["gap"]) < 1e-6
    assert other["gap"] > 0.1


@pytest.mark.usefixtures("rewarded")
def test_opd_is_the_end_of_the_mixture_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At alpha = 1 no reward matters, and the gradient is that of the gap alone."""
    moved, metrics = trained(OPD)
    set_rewards(monkeypatch, [0.0, 1.0, 1.0] * 4)
    others, with_rewards = trained(OPD)
    assert torch.equal(moved, others)
    for ours, theirs in zip(metrics, with_rewards, strict=True):
        assert ours["reward"] != theirs.pop("reward")
        assert {**theirs, "reward": ours["reward"]} == ours


@pytest.mark.usefixtures("rewarded")
def test_rlvr_is_the_other_end_bit_for_bit() -> None:
    """At alpha = 0 it does not matter who would teach, or whether anybody would."""
    moved, metrics = trained(RLVR)
    alone, without = trained(RLVR, teacher=None)
    assert torch.equal(moved, alone)
    assert metrics == without
    assert {step["gap"] for step in metrics} == {0.0}


@pytest.mark.usefixtures("rewarded")
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_step_follows_the_gradient_of_its_objective(
    alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against sum_t A_t log pi(y_t) / T, written out row by row."""
    drawn = spy(monkeypatch)
    _, [metrics] = trained(replace(OPD, alpha=alpha, steps=1))
    [rollout] = drawn
    student = tiny()
    ours = completion_log_probs(student, rollout)
    theirs = completion_log_probs(TEACHER, rollout).detach()
    rewards = by_first_token(None, rollout, None)
    objective, rows = torch.zeros(()), 0
    for group in rewards.split(3):
        first = rows
        rows += 3
        if alpha == 0.0 and group.min() == group.max():
            continue
        scale = group.std() + 1e-6
        for row, reward in zip(range(first, rows), group, strict=True):
            mask = rollout.mask[row]
            gain = (1 - alpha) * (reward - group.mean()) / scale
            advantage = alpha * (theirs - ours.detach())[row, mask] + gain
            objective = objective - (advantage * ours[row, mask]).mean()
    learned = metrics["learned_frac"] * len(rewards)
    expected = gradients(student, objective / learned).norm()
    assert metrics["grad_norm"] == pytest.approx(expected.item(), rel=1e-4)
    gap = (ours.detach() - theirs)[rollout.mask].mean().item() if alpha else 0.0
    assert metrics["gap"] == pytest.approx(gap, rel=1e-4)


@pytest.mark.parametrize("estimator", ["full", "full-forward"])
def test_the_full_vocabulary_in_chunks_is_the_same(
    monkeypatch: pytest.MonkeyPatch, estimator: str
) -> None:
    student = tiny()
    ids, mask = encode_prompts(["c:23+45-12=", "g:48,18="], TOKENIZER)
    written = sample(
        student,
        *(ids, mask),
        group_size=2,
        max_new_tokens=9,
        eos_token_id=TOKENIZER.eos_token_id,
        generator=torch.Generator().manual_seed(0),
    )
    config = replace(OPD, estimator=estimator, teacher_temperature=0.7)
    loss, gap = policy.full_vocabulary_loss(config, student, TEACHER, written)
    monkeypatch.setattr(rollouts, "MOST_LOGITS", 300)
    ours, other = policy.full_vocabulary_loss(config, student, TEACHER, written)
    torch.testing.assert_close((ours, other), (loss, gap))
    torch.testing.assert_close(gradients(student, ours), gradients(student, loss))


def test_the_sampled_estimator_expects_the_full_one() -> None:
    """Every first token weighed by its probability: exact, nothing is drawn."""
    student, vocabulary = tiny(), len(TOKENIZER)
    ids, mask = encode_prompts(["c:23+45-12="], TOKENIZER)
    every = torch.arange(vocabulary)[:, None]
    live = torch.ones_like(every, dtype=torch.bool)
    rollout = Rollout(ids, mask, every, live, torch.zeros(every.shape), vocabulary)
    log_probs = completion_log_probs(student, rollout)
    probs = log_probs.detach().exp()
    assert probs.sum().item() == pytest.approx(1.0)
    gap = policy.token_gap(OPD, log_probs.detach(), TEACHER, rollout)
    loss = losses.policy_loss(
        log_probs, log_probs, -gap, vocabulary * probs, live, n_sequences=vocabulary
    )
    sampled = gradients(student, loss)
    one = replace_rows(rollout, 1)
    full_loss, _ = policy.full_vocabulary_loss(OPD, student, TEACHER, one)
    full = gradients(student, full_loss)
    torch.testing.assert_close(sampled, full, atol=1e-6 * full.norm().item(), rtol=1e-3)
    ours = completion_logits(student, one)[0, 0].log_softmax(-1)
    theirs = completion_logits(TEACHER, one)[0, 0].log_softmax(-1)
    kl = (ours.exp() * (ours - theirs)).sum().item()
    assert full_loss.item() == pytest.approx(kl, rel=1e-5)


def replace_rows(rollout: Rollout, rows: int) -> Rollout:
    """The first rows of a rollout of one prompt."""
    return Rollout(
        rollout.prompt_ids,
        rollout.prompt_mask,
        rollout.completions[:rows],
        rollout.mask[:rows],
        rollout.log_probs[:rows],
        rows,
    )


def test_distillation_closes_the_gap() -> None:
    config = replace(FAST, alpha=1.0)
    for estimator in ("sampled", "full", "full-forward"):
        _, metrics = trained(replace(config, estimator=estimator))
        before = sum(step["gap"] for step in metrics[:3]) / 3
        after = sum(step["gap"] for step in metrics[-3:]) / 3
        assert after < 0.75 * before


@pytest.mark.usefixtures("rewarded")
def test_what_is_rewarded_becomes_more_likely() -> None:
    _, metrics = trained(replace(FAST, alpha=0.0))
    before = sum(step["reward"] for step in metrics[:5]) / 5
    after = sum(step["reward"] for step in metrics[-5:]) / 5
    assert before < 0.7
    assert after > before + 0.2


# --- batches ----------------------------------------------------------------------

ARMS = {
    "opd": OPD,
    "rlvr": RLVR,
    "mixed": replace(OPD, alpha=0.3),
    "full": replace(OPD, estimator="full"),
    "top-gap": replace(OPD, token_selection="top-gap", keep_frac=0.5),
    "random": replace(OPD, token_selection="random", keep_frac=0.5),
    "off-policy": replace(OPD, rollouts="teacher", clip_low=1.0, clip_high=1.0),
    "likelihood": replace(OPD, rollouts="teacher", credit="likelihood"),
    "off-policy-ratio": replace(OPD, rollouts="teacher", ratio_to="author"),
    "flipped": replace(RLVR, reward_flip=0.4),
    "noisy": replace(OPD, gap_noise=2.0),
    "full-forward": replace(OPD, estimator="full-forward"),
    "sharp": replace(OPD, teacher_temperature=0.5),
    "sgd": replace(OPD, optimizer=OptimizerConfig(0.1, kind="sgd")),
    "muon": replace(OPD, optimizer=OptimizerConfig(1e-3, kind="muon")),
    "shared": replace(OPD, alpha=0.6, shared_prefixes=True),
}


def test_a_sharper_teacher_is_one_whose_head_is_larger() -> None:
    sharp = copy.deepcopy(TEACHER)
    sharp.lm_head.weight.data *= 4.0  # a power of two: the same bits
    for estimator in ("sampled", "full", "full-forward"):
        config = replace(OPD, estimator=estimator, steps=1)
        theirs = trained(config, teacher=sharp)
        ours = trained(replace(config, teacher_temperature=0.25))
        assert torch.equal(ours[0], theirs[0])
        assert not torch.equal(ours[0], trained(config)[0])


def test_likelihood_is_cross_entropy_on_what_the_teacher_wrote(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = spy(monkeypatch)
    _, metrics = trained(replace(ARMS["likelihood"], steps=1))
    model, mask = tiny(), drawn[0].mask
    log_probs = completion_log_probs(model, drawn[0], 1.0).masked_fill(~mask, 0.0)
    cross_entropy = -(log_probs.sum(1) / mask.sum(1)).mean()
    norm = float(gradients(model, cross_entropy).norm())
    assert metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics[0]["gap"] != 0.0  # still reported


@pytest.mark.usefixtures("rewarded")
@pytest.mark.parametrize("arm", ["opd", "rlvr", "full", "top-gap", "off-policy"])
def test_shared_prefixes_train_what_apart_ones_do(arm: str) -> None:
    config = replace(ARMS[arm], steps=2, temperature=0.2)
    apart, metrics = trained(config)
    shared, others = trained(replace(config, shared_prefixes=True))
    assert not torch.equal(shared, apart)  # they did share some
    torch.testing.assert_close(shared, apart, atol=2e-5, rtol=0)
    for ours, theirs in zip(others, metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)


@pytest.mark.usefixtures("rewarded")
@pytest.mark.parametrize("arm", ARMS)
def test_the_split_into_micro_batches_changes_nothing(arm: str) -> None:
    config = replace(ARMS[arm], steps=2)
    whole, metrics = trained(config)
    for micro_prompts in (1, 3):
        split, others = trained(replace(config, micro_prompts=micro_prompts))
        torch.testing.assert_close(split, whole, atol=2e-5, rtol=0)
        for ours, theirs in zip(metrics, others, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)


@pytest.mark.usefixtures("rewarded")
def test_every_arm_learns_something_of_its_own() -> None:
    ends = [trained(config)[0] for config in ARMS.values()]
    for i, end in enumerate([weights(tiny()), *ends]):
        assert not any(torch.equal(end, other) for other in ends[i:])


def test_groups_without_variance_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = spy(monkeypatch)
    values = [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    set_rewards(monkeypatch, values)
    _, [metrics] = trained(replace(RLVR, steps=1))
    assert metrics["learned_frac"] == 0.5
    assert metrics["reward"] == pytest.approx(0.5)
    kept = torch.tensor([1, 3])
    piece, rows = drawn[0].take(kept), drawn[0].rows_of(kept)
    student = tiny()
    loss = losses.policy_loss(
        completion_log_probs(student, piece),
        piece.log_probs,
        losses.group_advantage(torch.tensor(values), 3)[rows],
        None,
        piece.mask,
    )
    expected = gradients(student, loss).norm().item()
    assert metrics["grad_norm"] == pytest.approx(expected, rel=1e-4)
    # with any distillation in it every group has something to teach
    _, [mixed] = trained(replace(OPD, alpha=0.01, steps=1))
    assert mixed["learned_frac"] == 1.0


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_no_signal_is_no_step(reward: float, monkeypatch: pytest.MonkeyPatch) -> None:
    set_rewards(monkeypatch, [reward] * 12)
    model = tiny()
    before = weights(model)
    optimizer = optimizer_of(model, RLVR.optimizer)
    metrics = list(policy_steps(RLVR, model, None, TOKENIZER, optimizer, seed=0))
    assert torch.equal(weights(model), before)  # not even weight decay
    assert not optimizer.state
    for step in metrics:
        assert step["reward"] == reward
        assert step["learned_frac"] == step["grad_norm"] == step["loss"] == 0.0
        assert all(map(math.isfinite, step.values()))


def test_a_group_of_one_is_enough_for_distillation() -> None:
    _, [metrics] = trained(replace(OPD, steps=1, group_size=1))
    assert metrics["grad_norm"] > 0
    with pytest.raises(ValueError, match="group_size 1: expected at least 2"):
        trained(replace(RLVR, group_size=1))


# --- who writes, who scores -------------------------------------------------------


def test_off_policy_learns_from_what_the_teacher_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = spy(monkeypatch)
    trained(replace(ARMS["off-policy"], steps=1))
    trained(replace(OPD, steps=1))
    for rollout, author, other in zip(
        drawn, (TEACHER, tiny()), (tiny(), TEACHER), strict=True
    ):
        scored = completion_log_probs(author, rollout)
        torch.testing.assert_close(scored, rollout.log_probs, atol=1e-5, rtol=1e-4)
        assert (completion_log_probs(other, rollout) - scored).abs().max() > 0.1


def test_the_teacher_stays_as_it_is() -> None:
    before = weights(TEACHER)
    for arm in ("opd", "full", "off-policy"):
        trained(ARMS[arm])
    assert torch.equal(weights(TEACHER), before)
    assert all(parameter.grad is None for parameter in TEACHER.parameters())


def test_nobody_asks_the_teacher_for_rlvr(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = []
    original = policy.completion_log_probs

    def note(model: PreTrainedModel, *args: Any) -> Tensor:
        scored.append(model)
        return original(model, *args)

    monkeypatch.setattr(policy, "completion_log_probs", note)
    monkeypatch.setattr(policy, "verify_completions", by_first_token)
    trained(replace(RLVR, steps=1))
    assert TEACHER not in scored
    trained(replace(OPD, steps=1))
    assert TEACHER in scored


def test_a_random_selection_does_not_depend_on_the_gap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And top-gap does: which tokens are kept, seen through the weights."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    original = losses.policy_loss

    def note(*args: Any, **asked: Any) -> Tensor:
        seen.append((args[2], args[3], args[4]))
        return original(*args, **asked)

    monkeypatch.setattr(losses, "policy_loss", note)
    for arm in ("random", "top-gap", "opd"):
        trained(replace(ARMS[arm], steps=1))
    for advantages, kept, mask in seen[:2]:
        assert kept[~mask].eq(0).all()
        torch.testing.assert_close(kept.sum(1), mask.sum(1).float())
        assert (kept > 0).sum() < 0.7 * mask.sum()
        assert advantages.shape == kept.shape
    advantages, kept, mask = seen[1]
    for row in range(len(mask)):  # what is kept has the largest gaps
        dropped = mask[row] & (kept[row] == 0)
        if dropped.any():
            assert (
                advantages[row, kept[row] > 0].max() <= advantages[row, dropped].min()
            )
    assert not torch.equal(seen[0][1] > 0, seen[1][1] > 0)
    assert seen[2][1].eq(1).all()


# --- rewards ----------------------------------------------------------------------


def test_rewards_are_the_verifier_s() -> None:
    problems = draw_prompts(OPD, seed=0, step=0)[:2]
    right = [tasks.solution(problem)[1] for problem in problems]
    texts = [f"#{right[0]}", f"1,2#{right[0]}", "#", f"#{right[1]}", "", right[1]]
    rows = [TOKENIZER(text)["input_ids"] for text in texts]
    ids = torch.full((6, 12), EOS)
    mask = torch.zeros(6, 12, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row) + 1] = True
    rollout = Rollout(
        *encode_prompts([problem.prompt for problem in problems], TOKENIZER),
        ids,
        mask,
        ids.float(),
        3,
    )
    rewards = policy.verify_completions(problems, rollout, TOKENIZER)
    assert rewards.dtype == torch.float32
    assert rewards.tolist() == [1, 1, 0, 1, 0, 0]
    # cut before its end, an answer might have gone on
    mask[0, len(rows[0])] = False
    rewards = policy.verify_completions(problems, rollout, TOKENIZER)
    assert rewards.tolist() == [0, 1, 0, 1, 0, 0]


# --- seeds and resuming -----------------------------------------------------------


def test_seed_and_step_decide_the_prompts() -> None:
    config = replace(OPD, benchmarks=("chain", "gcd"), prompts_per_step=6)
    assert draw_prompts(config, 0, 1) == draw_prompts(config, 0, 1)
    prompts = [draw_prompts(config, seed, step) for seed in (0, 1) for step in (0, 1)]
    assert all(a != b for i, a in enumerate(prompts) for b in prompts[:i])
    for problems in prompts:
        assert [p.family for p in problems] == ["chain", "gcd"] * 3
        assert not any(tasks.is_held_out(problem.prompt) for problem in problems)
    draws = [
        torch.rand(4, generator=policy.step_generator(seed, step)).tolist()
        for seed in (0, 1)
        for step in (0, 1)
    ]
    assert all(a != b for i, a in enumerate(draws) for b in draws[:i])


@pytest.mark.usefixtures("rewarded")
@pytest.mark.parametrize("arm", ARMS)
def test_a_resumed_run_is_the_same_run(arm: str) -> None:
    config = ARMS[arm]
    straight, metrics = trained(config)
    model = tiny()
    optimizer = optimizer_of(model, config.optimizer)
    loop = policy_steps(config, model, TEACHER, TOKENIZER, optimizer, seed=0)
    first = [next(loop)]
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    next(loop)  # lost: what was saved is older
    resumed = tiny(seed=9)
    again = optimizer_of(resumed, config.optimizer)
    resumed.load_state_dict(state[0])
    again.load_state_dict(state[1])
    rest = policy_steps(
        config, resumed, TEACHER, TOKENIZER, again, seed=0, first_step=1
    )
    assert first + list(rest) == metrics
    assert torch.equal(weights(resumed), straight)


def test_other_seeds_are_other_runs() -> None:
    assert torch.equal(trained(OPD)[0], trained(OPD)[0])
    assert not torch.equal(trained(OPD)[0], trained(OPD, seed=1)[0])


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one precision a process; begin and end with none chosen."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_bfloat16_leaves_the_master_weights_in_float32() -> None:
    moved, metrics = trained(replace(OPD, mixed_precision="bf16"))
    AcceleratorState._reset_state(reset_partial_state=True)
    exact, others = trained(OPD)
    assert moved.dtype == torch.float32
    assert not torch.equal(moved, exact)
    assert (moved - exact).abs().max() < 0.01
    assert metrics[0]["gap"] == pytest.approx(others[0]["gap"], rel=0.5)


# --- flipped rewards, ratios against the author -----------------------------------


def test_a_flip_changes_the_signal_and_nothing_that_is_drawn_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = spy(monkeypatch)
    set_rewards(monkeypatch, [0.0, 1.0, 1.0] * 4)
    chosen = replace(RLVR, steps=1, token_selection="random", keep_frac=0.5)
    seen = []
    weigh = losses.random_token_weights

    def watched(*asked: Any) -> Tensor:
        seen.append(weigh(*asked))
        return seen[-1]

    monkeypatch.setattr(losses, "random_token_weights", watched)
    plain, [honest] = trained(chosen)
    flipped, [told] = trained(replace(chosen, reward_flip=0.5))
    assert torch.equal(drawn[0].completions, drawn[1].completions)
    assert torch.equal(*seen)
    assert honest["reward"] == told["reward"] == pytest.approx(2 / 3)
    assert not torch.equal(plain, flipped)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5])
def test_as_many_rewards_are_flipped_as_asked(share: float) -> None:
    rewards = (torch.arange(4000) % 4 == 0).float()
    config = replace(RLVR, reward_flip=share)
    generator = torch.Generator().manual_seed(0)
    learned = policy.flip_rewards(config, rewards, generator)
    assert set(learned.tolist()) == {0.0, 1.0}
    changed = learned != rewards
    for value in (0.0, 1.0):  # whatever the reward was
        flips = float(changed[rewards == value].float().mean())
        assert flips == pytest.approx(share, abs=0.04)
    untouched = torch.Generator().manual_seed(0)
    if share == 0.0:
        assert torch.equal(generator.get_state(), untouched.get_state())


def test_noise_is_one_normal_number_a_response() -> None:
    written = torch.zeros(4000, 3, dtype=torch.float64)
    rollout = SimpleNamespace(log_probs=written)
    generator = torch.Generator().manual_seed(0)
    drawn = policy.response_noise(replace(OPD, gap_noise=2.0), rollout, generator)
    assert drawn.shape == (4000, 1)
    assert float(drawn.mean()) == pytest.approx(0.0, abs=0.1)
    assert float(drawn.std()) == pytest.approx(2.0, abs=0.1)
    untouched = torch.Generator().manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    assert not policy.response_noise(OPD, rollout, generator).any()
    assert torch.equal(generator.get_state(), untouched.get_state())


def test_noise_is_added_to_the_credit_and_to_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """OPD with noise, in credits: the gap's and what was drawn, the same samples."""
    drawn, seen = spy(monkeypatch), []
    mix = losses.mix_advantages

    def watched(*asked: Any) -> Tensor:
        seen.append(asked[0])
        return mix(*asked)

    monkeypatch.setattr(losses, "mix_advantages", watched)
    one = replace(OPD, steps=1)
    _, [plain] = trained(one)
    _, [noisy] = trained(replace(one, gap_noise=5.0))
    assert torch.equal(drawn[0].completions, drawn[1].completions)
    assert plain["gap"] == pytest.approx(noisy["gap"])
    half = len(seen) // 2
    added = torch.cat(seen[half:]) - torch.cat(seen[:half])
    torch.testing.assert_close(added, added[:, :1].expand_as(added))
    assert 2.0 < float(added[:, 0].std()) < 9.0


def test_coin_flips_skip_no_group_for_its_true_rewards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Groups are kept for the rewards that are learned from, not for the true ones."""
    set_rewards(monkeypatch, [1.0] * 12)
    _, [honest] = trained(replace(RLVR, steps=1))
    _, [flipped] = trained(replace(RLVR, steps=1, reward_flip=0.5))
    assert (honest["learned_frac"], honest["reward"]) == (0.0, 1.0)
    assert flipped["learned_frac"] > 0.0
    assert flipped["reward"] == 1.0


def test_the_ratio_to_the_author_is_student_over_teacher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = spy(monkeypatch)
    seen = []
    policy_loss = losses.policy_loss

    def watched(*asked: Any, **named: Any) -> Tensor:
        seen.append(asked[:3])
        return policy_loss(*asked, **named)

    monkeypatch.setattr(losses, "policy_loss", watched)
    trained(replace(ARMS["off-policy-ratio"], steps=1))
    (_, old, advantages), rollout = seen[0], drawn[0]
    live = rollout.mask
    ours = completion_log_probs(tiny(), rollout)
    assert torch.equal(old[live], rollout.log_probs[live])
    assert (old - ours)[live].abs().max() > 0.1
    # the advantage stays the gap of student and teacher, whatever the ratio is to
    gap = (rollout.log_probs - ours)[live]
    torch.testing.assert_close(advantages[live], gap, atol=1e-4, rtol=1e-4)


def test_on_policy_the_author_is_the_student_bit_for_bit() -> None:
    plain, _ = trained(OPD)
    same, _ = trained(replace(OPD, ratio_to="author"))
    assert torch.equal(plain, same)


def test_an_infinite_norm_clips_nothing() -> None:
    """Adam's first step hides the scale of a gradient; the second shows it."""
    free = replace(OPD.optimizer, max_grad_norm=math.inf)
    tight = replace(OPD.optimizer, max_grad_norm=1e9)
    moved, metrics = trained(replace(OPD, optimizer=free))
    others, _ = trained(replace(OPD, optimizer=tight))
    assert torch.equal(moved, others)
    assert all(math.isfinite(step["grad_norm"]) for step in metrics)
    clipped, before = trained(replace(OPD, optimizer=replace(free, max_grad_norm=0.01)))
    assert not torch.allclose(moved, clipped, atol=1e-6)
    # what is logged is the norm before clipping: the share of clipped steps can be read
    assert min(step["grad_norm"] for step in before) > 0.01


# --- bad settings -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.5}, r"alpha 1.5: expected 0 \(RLVR\) to 1 \(OPD\)"),
        ({"alpha": float("nan")}, r"alpha nan: expected"),
        ({"estimator": "k3"}, r"estimator 'k3': expected sampled or full"),
        ({"rollouts": "nobody"}, r"rollouts 'nobody': expected student or teacher"),
        ({"token_selection": "some"}, r"token_selection 'some': expected all or top"),
        ({"estimator": "full", "alpha": 0.5}, r"estimator full with alpha 0.5"),
        ({"estimator": "full", "token_selection": "random"}, r"and random tokens"),
        ({"alpha": 0.0, "token_selection": "top-gap"}, r"no teacher scores"),
        ({"temperature": 0.0}, r"temperature 0.0: expected above 0"),
        ({"reward_flip": 0.6}, r"reward_flip 0.6: expected 0 .* to 0.5"),
        ({"reward_flip": float("nan")}, r"reward_flip nan: expected 0"),
        ({"gap_noise": -1.0}, r"gap_noise -1.0: expected 0 nats or more"),
        ({"gap_noise": float("nan")}, r"gap_noise nan: expected 0 nats or more"),
        ({"gap_noise": float("inf")}, r"gap_noise inf: .* finite"),
        ({"gap_noise": 1.0, "credit": "likelihood"}, r"there is no gap of a token"),
        ({"gap_noise": 1.0, "estimator": "full"}, r"there is no gap of a token"),
        ({"ratio_to": "teacher"}, r"ratio_to 'teacher': expected student or author"),
        ({"teacher_temperature": 0.0}, r"teacher_temperature 0.0: expected above 0"),
        ({"teacher_temperature": float("inf")}, r"temperature inf: .* finite"),
        (
            {"teacher_temperature": 0.5, "rollouts": "teacher"},
            r"write at one temperature and score at another",
        ),
        ({"estimator": "full-forward", "alpha": 0.5}, r"full-forward with alpha 0.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        replace(OPD, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [OPD, replace(RLVR, rollouts="teacher")])
def test_a_missing_teacher_is_noticed(config: PolicyConfig) -> None:
    with pytest.raises(ValueError, match="needs a teacher"):
        trained(config, teacher=None)


# --- what reaches the loss --------------------------------------------------------


def test_clips_and_temperature_reach_the_loss_in_their_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    policy_loss = losses.policy_loss

    def watched(*arguments: Any, **named: Any) -> Tensor:
        seen.append(arguments[5:7])
        return policy_loss(*arguments, **named)

    monkeypatch.setattr(losses, "policy_loss", watched)
    trained(replace(OPD, steps=1, clip_low=0.1, clip_high=0.7))
    assert seen == [(0.1, 0.7)]


def test_the_teacher_is_asked_at_the_temperature_of_the_rollouts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Same model, same temperature: no gap. At another temperature there is one."""
    pieces = spy(monkeypatch)
    config = replace(OPD, steps=1, temperature=2.0)
    _, (metrics,) = trained(config, teacher=tiny())
    assert len(pieces) == 1
    assert abs(metrics["gap"]) < 1e-5


@pytest.mark.parametrize("other", [{"alpha": 0.5}, {"estimator": "full"}])
def test_likelihood_has_nothing_to_mix(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="credit likelihood with alpha"):
        replace(OPD, credit="likelihood", **other)


# --- precision and the source of the gap ---------------------------------------------


def low() -> PreTrainedModel:
    """The student as its own teacher, in bf16."""
    return bfloat16_copy(tiny())  # type: ignore[return-value]


@pytest.mark.parametrize("rollouts", ["student", "teacher"])
def test_gap_of_a_student_and_itself_is_exactly_zero(rollouts: str) -> None:
    """Scoring both in one way leaves nothing, in bf16 too; mixing the ways does."""
    config = replace(
        OPD,
        steps=1,
        rollouts=rollouts,
        mixed_precision="bf16-copy",
        gap_from="scoring",
    )
    _, [metrics] = trained(config, low())
    assert metrics["gap"] == 0.0
    assert metrics["grad_norm"] == 0.0


def test_mixed_sources_leave_a_gap_in_bf16() -> None:
    config = replace(OPD, steps=1, mixed_precision="bf16-copy")
    _, [metrics] = trained(config, low())
    assert metrics["gap"] != 0.0


def test_scoring_and_rollout_agree_in_float32() -> None:
    one, other = (
        trained(replace(OPD, steps=1, gap_from=source))
        for source in ("rollout", "scoring")
    )
    torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-6)
    assert one[1][0]["gap"] == pytest.approx(other[1][0]["gap"], rel=1e-4)


def test_bf16_copy_moves_the_masters_as_float32_does(rewarded: None) -> None:
    start = weights(tiny())
    for config in (OPD, RLVR):
        wanted = trained(replace(config, steps=1))[0] - start
        moved = trained(replace(config, steps=1, mixed_precision="bf16-copy"))[0]
        cosine = torch.cosine_similarity(moved - start, wanted, dim=0)
        assert cosine > 0.5
        assert moved.dtype == torch.float32

"""Losses: expected gradients by enumeration, invariances, and TRL's own functions."""

import itertools
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from opd_geometry.training import losses

VOCABULARY = 5
LENGTH = 3


def make_batch(
    lengths: tuple[int, ...] = (4, 1, 7, 3), seed: int = 0
) -> dict[str, Tensor]:
    """A right-padded float64 batch with finite numbers everywhere."""
    rng = torch.Generator().manual_seed(seed)
    n, t = len(lengths), max(lengths)
    mask = torch.arange(t) < torch.tensor(lengths).unsqueeze(1)
    tokens = torch.randint(0, VOCABULARY, (n, t), generator=rng)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    return {
        "logits": normal(n, t, VOCABULARY),
        "teacher": normal(n, t, VOCABULARY),
        "tokens": tokens,
        "old": -normal(n, t).abs() - 0.5,
        "advantages": normal(n, t),
        "weights": normal(n, t).abs(),
        "mask": mask,
    }


def grad_of(loss: Tensor, leaf: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient


# Expected gradients, by enumeration of every token or of every sequence.


def two_policies(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    student = torch.randn(*shape, generator=rng, dtype=torch.float64)
    teacher = torch.randn(*shape, generator=rng, dtype=torch.float64)
    return student.requires_grad_(), teacher


def expected_loss_gradient(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over all tokens of pi(y) times the gradient of OPD's loss on y."""
    tokens = torch.arange(student.shape[-1]).unsqueeze(1)
    rows = len(tokens)
    log_probs = losses.token_log_probs(student.expand(rows, 1, -1), tokens)
    target = losses.token_log_probs(teacher.expand(rows, 1, -1), tokens)
    advantages = losses.opd_advantage(log_probs, target)
    mask = torch.ones(1, 1)
    total = sum(
        log_probs[i].detach().exp()
        * losses.policy_loss(
            log_probs[i : i + 1],
            log_probs[i : i + 1].detach(),
            advantages[i : i + 1],
            None,
            mask,
        )
        for i in range(rows)
    )
    assert isinstance(total, Tensor)
    return grad_of(total.sum(), student)


def test_opd_gradient_is_the_reverse_kl_gradient_over_one_token():
    student, teacher = two_policies(0, 12)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=student),
        torch.distributions.Categorical(logits=teacher),
    )
    expected = grad_of(kl, student)
    assert expected.norm() > 0.1
    torch.testing.assert_close(
        expected_loss_gradient(student, teacher), expected, rtol=1e-12, atol=1e-14
    )


def test_backpropagated_k1_gives_nothing_and_k3_the_forward_kl():
    """Why the gap is an advantage: as losses, two estimators descend elsewhere."""
    student, teacher = two_policies(1, 12)
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    sampled = log_p.detach().exp()
    gap = log_p - log_q
    k1, k3 = gap, torch.expm1(-gap) + gap
    forward_kl = (log_q.exp() * (log_q - log_p)).sum()
    k1_loss, k3_loss = (sampled * k1).sum(), (sampled * k3).sum()
    k1_grad, k3_grad, forward = (
        torch.autograd.grad(loss, student, retain_graph=True)[0]
        for loss in (k1_loss, k3_loss, forward_kl)
    )
    assert k1_grad.abs().max() < 1e-15
    torch.testing.assert_close(k3_grad, forward, rtol=1e-12, atol=1e-14)
    reverse = expected_loss_gradient(student, teacher)
    assert (reverse - forward).norm() > 0.1 * reverse.norm()


def all_sequences(end_token: int | None) -> tuple[Tensor, Tensor]:
    """Every sequence of LENGTH tokens over 3 ids, stopped after end_token if given."""
    found = {}
    for sequence in itertools.product(range(3), repeat=LENGTH):
        stop = LENGTH
        if end_token is not None and end_token in sequence:
            stop = sequence.index(end_token) + 1
        found[sequence[:stop]] = stop
    tokens = torch.zeros(len(found), LENGTH, dtype=torch.long)
    mask = torch.zeros(len(found), LENGTH, dtype=torch.bool)
    for row, (sequence, stop) in enumerate(found.items()):
        tokens[row, :stop] = torch.tensor(sequence)
        mask[row, :stop] = True
    return tokens, mask


def prefix_logits(table: Tensor, tokens: Tensor) -> Tensor:
    """Logits (n, t, v) of an autoregressive policy that keeps one row a prefix."""
    state = torch.zeros(len(tokens), dtype=torch.long)
    states = []
    for i in range(tokens.shape[1]):
        states.append(state)
        state = 3 * state + tokens[:, i] + 1
    return table[torch.stack(states, dim=1)]


def expected_opd_gradient(
    table: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor, by_length: bool
) -> Tensor:
    """Sum over all sequences of pi(y) times the gradient of OPD's loss on y."""
    log_probs = losses.token_log_probs(prefix_logits(table, tokens), tokens)
    target = losses.token_log_probs(prefix_logits(teacher, tokens), tokens)
    probability = (log_probs * mask).sum(1).exp().detach()
    torch.testing.assert_close(
        probability.sum(), torch.ones((), dtype=probability.dtype)
    )
    weights = probability.unsqueeze(1).expand(mask.shape)
    if by_length:
        weights = weights * mask.sum(1, keepdim=True)
    loss = losses.policy_loss(
        log_probs,
        log_probs.detach(),
        losses.opd_advantage(log_probs, target),
        weights,
        mask,
        n_sequences=1,
    )
    return grad_of(loss, table)


def state_kl_gradient(
    table: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor
) -> Tensor:
    """Gradient of E_y sum_t KL(pi || pi_T)(s_t), visits held fixed, from scratch."""
    logits = prefix_logits(table, tokens)
    log_p = logits.log_softmax(-1)
    log_q = prefix_logits(teacher, tokens).log_softmax(-1)
    taken = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    probability = (taken * mask).sum(1).exp().detach()
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return grad_of((probability.unsqueeze(1) * mask * kl).sum(), table)


def test_opd_gradient_is_the_reverse_kl_gradient_over_sequences():
    table, teacher = two_policies(2, 13, 3)
    tokens, mask = all_sequences(end_token=None)
    assert len(tokens) == 27
    got = expected_opd_gradient(table, teacher, tokens, mask, by_length=False)
    expected = state_kl_gradient(table, teacher, tokens, mask) / LENGTH
    assert expected.norm() > 0.05
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-14)


def test_full_vocabulary_and_sampled_gradients_agree_over_sequences():
    table, teacher = two_policies(3, 13, 3)
    tokens, mask = all_sequences(end_token=None)
    log_probs = losses.token_log_probs(prefix_logits(table, tokens), tokens).detach()
    rows = range(len(tokens))
    full = sum(
        log_probs[i].sum().exp()
        * losses.full_vocabulary_kl(
            losses.token_reverse_kl,
            prefix_logits(table, tokens[i : i + 1]),
            prefix_logits(teacher, tokens[i : i + 1]),
            mask[i : i + 1],
        )
        for i in rows
    )
    sampled = expected_opd_gradient(table, teacher, tokens, mask, by_length=False)
    torch.testing.assert_close(grad_of(full, table), sampled, rtol=1e-11, atol=1e-14)


def test_with_an_end_token_only_the_token_sum_is_unbiased():
    """1 / T_i depends on the sampled tokens: with it the identity is approximate."""
    table, teacher = two_policies(4, 13, 3)
    tokens, mask = all_sequences(end_token=2)
    assert sorted(set(mask.sum(1).tolist())) == [1, 2, 3]
    exact = state_kl_gradient(table, teacher, tokens, mask)
    token_sum = expected_opd_gradient(table, teacher, tokens, mask, by_length=True)
    torch.testing.assert_close(token_sum, exact, rtol=1e-11, atol=1e-14)
    token_mean = expected_opd_gradient(table, teacher, tokens, mask, by_length=False)
    cosine = torch.nn.functional.cosine_similarity(
        token_mean.flatten(), exact.flatten(), dim=0
    )
    assert 0.8 < cosine < 1.0 - 1e-4


def test_a_student_equal_to_its_teacher_stands_still():
    batch = make_batch()
    logits = batch["logits"].float().requires_grad_()
    log_probs = losses.token_log_probs(logits, batch["tokens"])
    teacher = losses.token_log_probs(logits.detach(), batch["tokens"])
    advantages = losses.opd_advantage(log_probs, teacher)
    assert not advantages.requires_grad
    sampled = losses.policy_loss(
        log_probs, log_probs.detach(), advantages, None, batch["mask"]
    )
    assert sampled == 0.0
    assert torch.count_nonzero(grad_of(sampled, logits)) == 0
    full = losses.full_vocabulary_kl(
        losses.token_reverse_kl, logits, logits.detach().clone(), batch["mask"]
    )
    assert full == 0.0
    assert torch.count_nonzero(grad_of(full, logits)) == 0


def test_opd_advantage_sign_and_stop_gradient():
    student = torch.tensor([[-0.1, -3.0]], requires_grad=True)
    advantage = losses.opd_advantage(student, torch.tensor([[-2.1, -1.0]]))
    torch.testing.assert_close(advantage, torch.tensor([[-2.0, 2.0]]))
    assert not advantage.requires_grad


# Token log-probabilities and cross-entropy.


def test_token_log_probs_against_trl():
    from trl.trainer.utils import selective_log_softmax

    batch = make_batch()
    got = losses.token_log_probs(batch["logits"], batch["tokens"])
    torch.testing.assert_close(
        got, selective_log_softmax(batch["logits"], batch["tokens"])
    )


def test_token_log_probs_stay_accurate():
    logits = torch.tensor([[[1000.0, 0.0, -1000.0]]])
    got = losses.token_log_probs(logits.expand(1, 3, 3), torch.tensor([[0, 1, 2]]))
    assert got.tolist() == [[0.0, -1000.0, -2000.0]]
    half = make_batch()["logits"].bfloat16()
    tokens = make_batch()["tokens"]
    widened = losses.token_log_probs(half, tokens)
    assert widened.dtype == torch.float32
    assert torch.equal(widened, losses.token_log_probs(half.float(), tokens))


def test_sft_loss_against_cross_entropy():
    batch = make_batch()
    labels = batch["tokens"].masked_fill(~batch["mask"], -100)
    expected = torch.nn.functional.cross_entropy(
        batch["logits"].flatten(0, 1), labels.flatten(), ignore_index=-100
    )
    for tokens in (batch["tokens"], labels):
        got = losses.sft_loss(batch["logits"], tokens, batch["mask"])
        torch.testing.assert_close(got, expected)


def test_sft_micro_batches_sum_to_the_batch():
    batch = make_batch()
    logits = batch["logits"].requires_grad_()
    total = int(batch["mask"].sum())
    whole = grad_of(losses.sft_loss(logits, batch["tokens"], batch["mask"]), logits)
    parts = torch.zeros_like(logits)
    for rows in (slice(0, 1), slice(1, 2), slice(2, 4)):
        loss = losses.sft_loss(
            logits[rows], batch["tokens"][rows], batch["mask"][rows], total
        )
        parts += grad_of(loss, logits)
    assert torch.equal(parts, whole)


def test_sft_empty_micro_batch_adds_zero_but_an_empty_batch_is_an_error():
    logits = torch.randn(2, 3, VOCABULARY, requires_grad=True)
    tokens, mask = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3)
    loss = losses.sft_loss(logits, tokens, mask, denominator=7)
    assert loss == 0.0
    assert torch.count_nonzero(grad_of(loss, logits)) == 0
    with pytest.raises(ValueError, match="denominator 0"):
        losses.sft_loss(logits, tokens, mask)


# Padding, micro-batches, NaN.


def objective(name: str, batch: dict[str, Tensor], n_sequences: int) -> Tensor:
    log_probs = losses.token_log_probs(
        batch["logits"], batch["tokens"].masked_fill(~batch["mask"], 0)
    )
    if name == "reverse_kl":
        return losses.full_vocabulary_kl(
            losses.token_reverse_kl,
            batch["logits"],
            batch["teacher"],
            batch["mask"],
            n_sequences,
        )
    weights = batch["weights"] if name == "weighted" else None
    return losses.policy_loss(
        log_probs,
        batch["old"],
        batch["advantages"],
        weights,
        batch["mask"],
        n_sequences=n_sequences,
    )


def widen(
    batch: dict[str, Tensor], left: int, right: int, logit: float = torch.nan
) -> dict[str, Tensor]:
    """The batch with more padding: NaN in every float but, if given, the logits."""
    wide = {}
    for name, value in batch.items():
        fill = {torch.float64: torch.nan, torch.long: 0, torch.bool: False}[value.dtype]
        fill = logit if name == "logits" else fill
        shape = list(value.shape)
        shape[1] += left + right
        wide[name] = torch.full(shape, fill, dtype=value.dtype)
        wide[name][:, left : left + value.shape[1]] = value
    return wide


@pytest.mark.parametrize("name", ["policy", "weighted", "reverse_kl"])
@pytest.mark.parametrize(("left", "right"), [(0, 1), (0, 29), (5, 0), (3, 4)])
def test_padding_width_changes_nothing(name: str, left: int, right: int):
    batch, rows = make_batch(), 4
    # A log-softmax hands NaN back whatever the loss does, so there the fill is finite.
    wide = widen(batch, left, right, torch.nan if name == "reverse_kl" else 50.0)
    batch["logits"].requires_grad_()
    wide["logits"].requires_grad_()
    narrow_loss = objective(name, batch, rows)
    wide_loss = objective(name, wide, rows)
    torch.testing.assert_close(wide_loss, narrow_loss, rtol=1e-14, atol=0.0)
    narrow_grad = grad_of(narrow_loss, batch["logits"])
    wide_grad = grad_of(wide_loss, wide["logits"])
    end = left + narrow_grad.shape[1]
    # Bitwise: a token's gradient never sees a sum over positions, only its own row.
    live = batch["mask"]
    assert torch.equal(wide_grad[:, left:end][live], narrow_grad[live])
    assert torch.count_nonzero(wide_grad) == torch.count_nonzero(narrow_grad[live])


@pytest.mark.parametrize("name", ["policy", "weighted", "reverse_kl"])
@pytest.mark.parametrize("cuts", [(0, 1, 4), (0, 2, 3, 4), (0, 1, 2, 3, 4)])
def test_micro_batches_sum_to_the_batch(name: str, cuts: tuple[int, ...]):
    batch = make_batch()
    batch["logits"].requires_grad_()
    whole = objective(name, batch, 4)
    parts = []
    for start, stop in itertools.pairwise(cuts):
        rows = {k: v[start:stop] for k, v in batch.items()}
        # A micro-batch is padded to its own longest row, not to the batch's.
        width = int(rows["mask"].sum(1).max())
        parts.append(objective(name, {k: v[:, :width] for k, v in rows.items()}, 4))
    torch.testing.assert_close(sum(parts), whole, rtol=1e-14, atol=1e-16)
    leaf = batch["logits"]
    split = sum(grad_of(part, leaf) for part in parts)
    assert torch.equal(split, grad_of(whole, leaf))


@pytest.mark.parametrize("name", ["policy", "weighted", "reverse_kl"])
def test_gradient_of_shared_weights_is_the_same_in_micro_batches(name: str):
    """As in training: logits from one matrix; here sums are reordered, so fp64."""
    batch = make_batch()
    rng = torch.Generator().manual_seed(5)
    hidden = torch.randn(*batch["mask"].shape, 6, generator=rng, dtype=torch.float64)
    head = torch.randn(6, VOCABULARY, generator=rng, dtype=torch.float64)
    head.requires_grad_()
    whole = grad_of(objective(name, batch | {"logits": hidden @ head}, 4), head)
    split = torch.zeros_like(head)
    for i in range(4):
        width = int(batch["mask"][i].sum())
        row = {k: v[i : i + 1, :width] for k, v in batch.items()}
        row["logits"] = hidden[i : i + 1, :width] @ head
        split += grad_of(objective(name, row, 4), head)
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-15)


def test_nan_in_padding_is_ignored_and_nan_on_a_token_is_not():
    batch = make_batch()
    log_probs = batch["old"].clone().requires_grad_()
    clean = losses.policy_loss(
        log_probs, batch["old"], batch["advantages"], batch["weights"], batch["mask"]
    )
    hole = ~batch["mask"]
    dirty_probs = batch["old"].masked_fill(hole, torch.nan).requires_grad_()
    dirty = losses.policy_loss(
        dirty_probs,
        batch["old"].masked_fill(hole, -torch.inf),
        batch["advantages"].masked_fill(hole, torch.nan),
        batch["weights"].masked_fill(hole, torch.nan),
        batch["mask"],
    )
    assert torch.equal(clean, dirty)
    assert torch.equal(grad_of(clean, log_probs), grad_of(dirty, dirty_probs))
    broken = batch["advantages"].clone()
    broken[2, 5] = torch.nan
    loss = losses.policy_loss(log_probs, batch["old"], broken, None, batch["mask"])
    assert loss.isnan()


def test_a_row_without_tokens_adds_zero_and_still_counts():
    batch = make_batch((4, 3))
    batch["mask"][1] = False
    args = batch["old"], batch["old"], batch["advantages"], None
    both = losses.policy_loss(*args, batch["mask"])
    one = losses.policy_loss(
        *(a if a is None else a[:1] for a in args), batch["mask"][:1]
    )
    torch.testing.assert_close(both, one / 2)


# GRPO.


def numpy_advantage(rewards: np.ndarray, size: int, eps: float) -> np.ndarray:
    out = np.zeros(len(rewards))
    for start in range(0, len(rewards), size):
        group = rewards[start : start + size].astype(np.float64)
        variance = ((group - group.mean()) ** 2).sum() / (size - 1)
        out[start : start + size] = (group - group.mean()) / (np.sqrt(variance) + eps)
    return out


def test_group_advantage_against_numpy_and_trl():
    from trl.trainer.utils import nanstd

    rng = torch.Generator().manual_seed(0)
    rewards = torch.randn(24, generator=rng, dtype=torch.float64)
    for size in (2, 4, 8):
        got = losses.group_advantage(rewards, size)
        np.testing.assert_allclose(
            got, numpy_advantage(rewards.numpy(), size, 1e-6), rtol=1e-12
        )
        groups = rewards.view(-1, size)
        mean = groups.mean(1).repeat_interleave(size)
        std = nanstd(groups, dim=1).repeat_interleave(size)
        torch.testing.assert_close(
            losses.group_advantage(rewards, size, eps=1e-4),
            (rewards - mean) / (std + 1e-4),
        )


def test_groups_without_variance_have_zero_advantage_and_are_named():
    # The float32 mean of seven times 0.1 is not 0.1.
    rewards = torch.tensor([0.1] * 7 + [0.0] * 6 + [1.0] + [0.0] * 7 + [1.0] * 7)
    advantages = losses.group_advantage(rewards, 7)
    assert torch.count_nonzero(advantages[:7]) == 0
    assert torch.count_nonzero(advantages[14:]) == 0
    assert advantages[13] > 2.0
    assert losses.group_has_variance(rewards, 7).tolist() == [False, True, False, False]
    binary = torch.tensor([True, False, True, True])
    assert losses.group_has_variance(binary, 2).tolist() == [True, False]
    torch.testing.assert_close(
        losses.group_advantage(binary, 2), losses.group_advantage(binary.float(), 2)
    )


def numpy_clipped_loss(
    log_probs: np.ndarray,
    old: np.ndarray,
    advantages: np.ndarray,
    mask: np.ndarray,
    low: float,
    high: float,
) -> float:
    total = 0.0
    for i in range(len(log_probs)):
        terms = []
        for t in np.flatnonzero(mask[i]):
            ratio = np.exp(log_probs[i, t] - old[i, t])
            a = advantages[i, t]
            if a >= 0:
                terms.append(min(ratio, 1 + high) * a)
            else:
                terms.append(max(ratio, 1 - low) * a)
        total -= sum(terms) / len(terms)
    return total / len(log_probs)


def trl_grpo_loss(
    log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    """TRL's own loss function, on a trainer that holds only what it reads."""
    from trl import GRPOTrainer

    def same(x: Tensor, **_: str) -> Tensor:
        return x

    trainer = SimpleNamespace(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.0,
        loss_type="grpo",
        epsilon_low=0.2,
        epsilon_high=0.28,
        args=SimpleNamespace(delta=None),
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(gather=same, reduce=same),
        _get_per_token_logps_and_entropies=lambda *a, **k: (
            log_probs,
            torch.zeros_like(log_probs),
            None,
        ),
    )
    ids = torch.zeros(log_probs.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("per_token", [True, False])
def test_clipped_loss_against_numpy_and_trl(spread: float, per_token: bool):
    batch = make_batch((4, 1, 7, 3, 6, 6), seed=7)
    shift = spread * torch.randn(
        batch["old"].shape, generator=torch.Generator().manual_seed(8)
    )
    log_probs = (batch["old"] + shift).requires_grad_()
    mask, advantages = batch["mask"], batch["advantages"]
    if not per_token:
        advantages = advantages[:, 0]
    got = losses.policy_loss(log_probs, batch["old"], advantages, None, mask)
    wide = advantages if per_token else advantages.unsqueeze(1).expand(mask.shape)
    expected = numpy_clipped_loss(
        log_probs.detach().numpy(),
        batch["old"].numpy(),
        wide.numpy(),
        mask.numpy(),
        0.2,
        0.28,
    )
    np.testing.assert_allclose(got.item(), expected, rtol=1e-12)
    theirs = trl_grpo_loss(log_probs, batch["old"], advantages, mask)
    torch.testing.assert_close(got, theirs)
    torch.testing.assert_close(grad_of(got, log_probs), grad_of(theirs, log_probs))


def test_clip_stops_the_gradient_only_where_it_should():
    """Rows: ratio below, inside, above; columns: advantage +1, -1."""
    ratio = torch.tensor([[0.5, 0.5], [1.1, 1.1], [1.5, 1.5]], dtype=torch.float64)
    log_probs = ratio.log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64).expand(3, 2)
    args = log_probs, torch.zeros_like(ratio), advantages, None, torch.ones(3, 2)
    gradient = grad_of(losses.policy_loss(*args), log_probs) * -6.0
    torch.testing.assert_close(
        gradient,
        torch.tensor([[0.5, 0.0], [1.1, -1.1], [0.0, -1.5]], dtype=torch.float64),
    )
    # The paper's off-policy clip of 1.0 is inactive here, and still active above 2.
    loose = grad_of(losses.policy_loss(*args, clip_low=1.0, clip_high=1.0), log_probs)
    torch.testing.assert_close(loose * -6.0, ratio * advantages)
    far = torch.full((1, 1), 1.0).requires_grad_()
    zero = torch.zeros(1, 1)
    loss = losses.policy_loss(far, zero, zero + 1, None, zero + 1, 1.0, 1.0)
    assert loss == -2.0
    assert grad_of(loss, far) == 0.0


@pytest.mark.parametrize("clip", [(0.0, 0.0), (0.2, 0.28), (1.0, 1.0)])
def test_no_clip_acts_where_the_credit_is_minus_the_log_of_the_ratio(clip):
    """Off-policy OPD, its ratio to the author: pi / pi_T, and log pi_T - log pi.

    A clip stops what a ratio above one gains or one below loses; here what is likelier
    than the teacher has it always loses.
    """
    log_ratio = torch.linspace(-4.0, 4.0, 33, dtype=torch.float64)[None]
    log_probs, zero = log_ratio.clone().requires_grad_(), torch.zeros_like(log_ratio)
    loss = losses.policy_loss(log_probs, zero, -log_ratio, None, zero + 1, *clip)
    torch.testing.assert_close(loss, (log_ratio.exp() * log_ratio).mean())
    free = log_ratio.exp() * log_ratio / log_ratio.numel()
    torch.testing.assert_close(grad_of(loss, log_probs), free)


def test_on_policy_gradient_is_the_advantage():
    batch = make_batch()
    log_probs = batch["old"].requires_grad_()
    loss = losses.policy_loss(
        log_probs, log_probs, batch["advantages"], batch["weights"], batch["mask"]
    )
    lengths = batch["mask"].sum(1, keepdim=True)
    expected = -batch["advantages"] * batch["weights"] * batch["mask"] / lengths / 4
    torch.testing.assert_close(grad_of(loss, log_probs), expected)


def test_only_the_log_probabilities_carry_a_gradient():
    batch = make_batch()
    names = ("old", "advantages", "weights")
    old, advantages, weights = (batch[k].requires_grad_() for k in names)
    log_probs = (old.detach() + 0.1).requires_grad_()
    losses.policy_loss(log_probs, old, advantages, weights, batch["mask"]).backward()
    assert log_probs.grad is not None
    assert all(x.grad is None for x in (old, advantages, weights))
    batch["logits"].requires_grad_()
    batch["teacher"].requires_grad_()
    losses.full_vocabulary_kl(
        losses.token_reverse_kl, batch["logits"], batch["teacher"], batch["mask"]
    ).backward()
    assert batch["logits"].grad is not None
    assert batch["teacher"].grad is None


# Mixing.


AWKWARD = torch.tensor([[-0.0, 0.0, 3e38, -3e38], [1e-45, 0.1, -1e30, 7.0]])


def bits(x: Tensor) -> list[list[int]]:
    return x.contiguous().view(torch.int32).tolist()


@pytest.mark.parametrize("other", [0.0, -3e38, torch.inf, torch.nan])
def test_the_ends_of_the_mixture_are_the_pure_arms_bit_for_bit(other: float):
    filler = torch.full_like(AWKWARD, other)
    assert bits(losses.mix_advantages(AWKWARD, filler, 1.0)) == bits(AWKWARD)
    assert bits(losses.mix_advantages(AWKWARD, filler[:, 0], 1)) == bits(AWKWARD)
    assert bits(losses.mix_advantages(filler, AWKWARD, 0.0)) == bits(AWKWARD)
    scalar = AWKWARD[:, 0]
    spread = scalar.unsqueeze(1).expand(AWKWARD.shape)
    assert bits(losses.mix_advantages(filler, scalar, 0)) == bits(spread)


def test_the_ends_of_the_mixture_train_bit_for_bit():
    batch = make_batch()
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    rlvr = losses.group_advantage(rewards, 2)
    opd = batch["advantages"].float()
    log_probs = batch["old"].float().requires_grad_()

    def gradient(advantages: Tensor) -> Tensor:
        args = log_probs, batch["old"].float() + 0.1, advantages, None, batch["mask"]
        return grad_of(losses.policy_loss(*args), log_probs)

    for alpha, pure in ((1.0, opd), (0.0, rlvr)):
        mixed = losses.mix_advantages(opd, rlvr, alpha)
        assert torch.equal(gradient(mixed), gradient(pure))


def test_mixture_is_the_raw_weighted_sum_and_leaves_its_inputs_alone():
    opd, rlvr = torch.tensor([[-1.0, 0.5]]), torch.tensor([2.0])
    torch.testing.assert_close(
        losses.mix_advantages(opd, rlvr, 0.25), torch.tensor([[1.25, 1.625]])
    )
    losses.mix_advantages(opd, rlvr, 1.0).add_(1.0)
    losses.mix_advantages(opd, rlvr, 0.0).add_(1.0)
    assert opd.tolist() == [[-1.0, 0.5]]
    assert rlvr.tolist() == [2.0]


# Token weights.


def test_top_gap_keeps_where_the_student_is_most_over_confident():
    student = torch.tensor([[-0.1, -4.0, -1.0, -0.2]])
    teacher = torch.tensor([[-3.0, -0.1, -1.0, -0.3]])
    gap = -losses.opd_advantage(student, teacher)
    weights = losses.top_gap_weights(gap, torch.ones(1, 4), 0.25)
    assert weights.tolist() == [[4.0, 0.0, 0.0, 0.0]]
    # The most negative gap has the largest magnitude, and goes last.
    weights = losses.top_gap_weights(gap, torch.ones(1, 4), 0.75)
    assert weights[0, 1] == 0.0


@pytest.mark.parametrize("keep_frac", [0.01, 0.25, 0.5, 0.9, 1.0])
def test_kept_counts_are_exact_under_ties_and_sums_equal_t(keep_frac: float):
    lengths = torch.tensor([1, 2, 3, 4, 9, 50, 64])
    mask = torch.arange(70) < lengths.unsqueeze(1)
    expected = (keep_frac * lengths + 0.5).floor().long().clamp(min=1)
    rng = torch.Generator().manual_seed(0)
    ties = torch.randint(0, 2, mask.shape, generator=rng).double()
    for weights in (
        losses.top_gap_weights(torch.zeros_like(ties), mask, keep_frac),
        losses.top_gap_weights(ties, mask, keep_frac),
        losses.random_token_weights(mask, keep_frac, rng).double(),
    ):
        assert torch.equal((weights > 0).sum(1), expected)
        assert torch.count_nonzero(weights[~mask]) == 0
        # One float32 value a row, so the tolerance is a float32 rounding.
        torch.testing.assert_close(weights.sum(1), lengths.double(), rtol=1e-6, atol=0)


def test_ties_keep_the_earlier_tokens_wherever_the_padding_is():
    mask = torch.tensor([[0, 1, 1, 0, 1, 1]])
    weights = losses.top_gap_weights(torch.full((1, 6), -9.0), mask, 0.5)
    assert weights.tolist() == [[0.0, 2.0, 2.0, 0.0, 0.0, 0.0]]


def test_keeping_everything_is_the_unweighted_loss_bit_for_bit():
    batch = make_batch()
    rng = torch.Generator().manual_seed(0)
    top = losses.top_gap_weights(batch["advantages"], batch["mask"], 1.0)
    drawn = losses.random_token_weights(batch["mask"], 1.0, rng)
    args = batch["old"] + 0.1, batch["old"], batch["advantages"]
    plain = losses.policy_loss(*args, None, batch["mask"])
    for weights in (top, drawn):
        assert torch.equal(weights, batch["mask"].to(weights.dtype))
        assert torch.equal(losses.policy_loss(*args, weights, batch["mask"]), plain)


def test_a_row_without_tokens_gets_no_weight():
    mask = torch.tensor([[0, 0], [1, 1]])
    rng = torch.Generator().manual_seed(0)
    assert losses.top_gap_weights(torch.zeros(2, 2), mask, 0.5)[0].tolist() == [0, 0]
    assert losses.random_token_weights(mask, 0.5, rng)[0].tolist() == [0.0, 0.0]


def test_token_weights_do_not_depend_on_padding():
    batch = make_batch((9, 20, 17))
    wide = widen(batch, left=3, right=18)
    for keep_frac in (0.25, 0.5):
        narrow_top, wide_top = (
            losses.top_gap_weights(b["advantages"], b["mask"], keep_frac)[b["mask"]]
            for b in (batch, wide)
        )
        assert torch.equal(narrow_top, wide_top)
        narrow_draw, wide_draw = (
            losses.random_token_weights(
                b["mask"], keep_frac, torch.Generator().manual_seed(3)
            )[b["mask"]]
            for b in (batch, wide)
        )
        assert torch.equal(narrow_draw, wide_draw)


def test_random_weights_are_reproducible_uniform_and_unbiased():
    mask = torch.ones(4000, 8)
    first, again, other = (
        losses.random_token_weights(mask, 0.25, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # Mean weight 1 at each place; its standard error is sqrt(3 / 4000) = 0.027.
    assert (first.mean(0) - 1.0).abs().max() < 0.14
    pairs = (first > 0).double()
    together = (pairs.T @ pairs / 4000)[~torch.eye(8, dtype=torch.bool)]
    # Two of eight: a given pair is kept with chance 1/28.
    assert (together - 1 / 28).abs().max() < 0.015


# Full-vocabulary reverse KL.


def test_reverse_kl_against_scipy_and_torch_distributions():
    from scipy.special import rel_entr

    batch = make_batch()
    student = batch["logits"].requires_grad_()
    got = losses.full_vocabulary_kl(
        losses.token_reverse_kl, student, batch["teacher"], batch["mask"]
    )
    p = student.detach().softmax(-1).numpy()
    q = batch["teacher"].softmax(-1).numpy()
    kl = rel_entr(p, q).sum(-1)
    mask = batch["mask"].numpy()
    np.testing.assert_allclose(
        got.item(), np.mean((kl * mask).sum(1) / mask.sum(1)), rtol=1e-12
    )
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=student),
        torch.distributions.Categorical(logits=batch["teacher"]),
    )
    lengths = batch["mask"].sum(1)
    expected = ((theirs * batch["mask"]).sum(1) / lengths).mean()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        grad_of(got, student), grad_of(expected, student), rtol=1e-11, atol=1e-15
    )


def test_reverse_kl_is_not_the_forward_one_and_not_negative():
    student, teacher = two_policies(11, 1, 1, 6)
    mask = torch.ones(1, 1)
    there = losses.full_vocabulary_kl(losses.token_reverse_kl, student, teacher, mask)
    back = losses.full_vocabulary_kl(losses.token_reverse_kl, teacher, student, mask)
    assert min(there, back) > 0.1
    assert abs(there - back) > 0.01
    assert not losses.full_vocabulary_kl(
        losses.token_reverse_kl, teacher, student, mask
    ).requires_grad


def test_forward_kl_is_the_reverse_of_the_other_way_round():
    batch = make_batch()
    student = batch["logits"].requires_grad_()
    got = losses.full_vocabulary_kl(
        losses.token_forward_kl, student, batch["teacher"], batch["mask"]
    )
    turned = losses.full_vocabulary_kl(
        losses.token_reverse_kl, batch["teacher"], student, batch["mask"]
    )
    torch.testing.assert_close(got, turned)
    # grad KL(q || p) = p - q at every state
    p, q = student.detach().softmax(-1), batch["teacher"].softmax(-1)
    live = batch["mask"]
    share = live / (live.sum(1, keepdim=True) * len(live))
    expected = (p - q).masked_fill(~live[..., None], 0.0) * share[..., None]
    torch.testing.assert_close(grad_of(got, student), expected)
    assert (
        losses.full_vocabulary_kl(
            losses.token_forward_kl, student, student.detach(), live
        ).abs()
        < 1e-15
    )


def test_forward_kl_ignores_a_padded_vocabulary():
    student, teacher = two_policies(10, 1, 2, 6)
    mask, hole = torch.ones(1, 2), torch.full((1, 2, 3), -torch.inf).double()
    plain = losses.full_vocabulary_kl(losses.token_forward_kl, student, teacher, mask)
    wide = torch.cat([student, hole], -1), torch.cat([teacher, hole], -1)
    padded = losses.full_vocabulary_kl(losses.token_forward_kl, *wide, mask)
    torch.testing.assert_close(padded, plain, rtol=1e-14, atol=0)
    ours, theirs = grad_of(padded, student), grad_of(plain, student)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-16)


def test_reverse_kl_ignores_a_padded_vocabulary():
    student, teacher = two_policies(10, 1, 2, 6)
    mask = torch.ones(1, 2)
    hole = torch.full((1, 2, 3), -torch.inf, dtype=torch.float64)
    plain = losses.full_vocabulary_kl(losses.token_reverse_kl, student, teacher, mask)
    padded = losses.full_vocabulary_kl(
        losses.token_reverse_kl,
        torch.cat([student, hole], -1),
        torch.cat([teacher, hole], -1),
        mask,
    )
    torch.testing.assert_close(padded, plain, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        grad_of(padded, student), grad_of(plain, student), rtol=1e-12, atol=1e-16
    )
    # The student may say what the teacher excludes: the divergence is infinite.
    narrow = torch.cat([teacher[..., :5], hole[..., :1]], -1)
    assert (
        losses.full_vocabulary_kl(losses.token_reverse_kl, student, narrow, mask)
        == torch.inf
    )


# Bad input: one clear line.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: losses.token_log_probs(torch.zeros(1, 3, 2), torch.zeros(1, 2)),
            r"logits \(1, 3, 2\) and tokens \(1, 2\)",
        ),
        (
            lambda: losses.token_log_probs(
                torch.zeros(1, 1, 2), torch.tensor([[-100]])
            ),
            "token ids -100 to -100: expected 0 to 1",
        ),
        (
            lambda: losses.token_log_probs(torch.zeros(1, 1, 2), torch.tensor([[2]])),
            "token ids 2 to 2: expected 0 to 1",
        ),
        (
            lambda: losses.sft_loss(
                torch.zeros(1, 2, 2), torch.zeros(1, 2).long(), torch.ones(1, 3)
            ),
            r"tokens \(1, 2\), mask \(1, 3\)",
        ),
        (
            lambda: losses.opd_advantage(torch.zeros(1, 2), torch.zeros(2, 1)),
            r"student \(1, 2\), teacher \(2, 1\)",
        ),
        (lambda: losses.group_advantage(torch.zeros(6), 4), "group_size 4"),
        (lambda: losses.group_advantage(torch.zeros(0), 4), "group_size 4"),
        (lambda: losses.group_advantage(torch.zeros(6), 1), "group_size 1"),
        (lambda: losses.group_advantage(torch.zeros(3, 2), 2), r"rewards \(3, 2\)"),
        (
            lambda: losses.group_has_variance(torch.tensor([1.0, torch.nan]), 2),
            "NaN or inf",
        ),
        (
            lambda: losses.mix_advantages(torch.zeros(1, 2), torch.zeros(1), 1.5),
            "alpha 1.5",
        ),
        (
            lambda: losses.mix_advantages(
                torch.zeros(1, 2), torch.zeros(1), float("nan")
            ),
            "alpha nan",
        ),
        (
            lambda: losses.mix_advantages(torch.zeros(3, 2), torch.zeros(2), 1.0),
            r"advantages \(2,\): expected \(3, 2\) or \(3,\)",
        ),
        (
            lambda: losses.top_gap_weights(torch.zeros(1, 2), torch.ones(1, 2), 0.0),
            "keep_frac 0.0",
        ),
        (
            lambda: losses.top_gap_weights(torch.zeros(1, 2), torch.ones(1, 3), 0.5),
            r"gap \(1, 2\), mask \(1, 3\)",
        ),
        (
            lambda: losses.top_gap_weights(
                torch.tensor([[0.0, torch.nan]]), torch.ones(1, 2), 0.5
            ),
            "gap holds NaN",
        ),
        (
            lambda: losses.random_token_weights(
                torch.ones(1, 2), 1.1, torch.Generator()
            ),
            "keep_frac 1.1",
        ),
        (
            lambda: losses.policy_loss(
                *[torch.zeros(1, 2)] * 3, torch.zeros(1, 3), torch.ones(1, 2)
            ),
            r"weights \(1, 3\)",
        ),
        (
            lambda: losses.policy_loss(
                *[torch.zeros(1, 2)] * 3, None, torch.ones(1, 2), clip_low=1.2
            ),
            "clip 1.2 / 0.28",
        ),
        (
            lambda: losses.policy_loss(
                *[torch.zeros(1, 2)] * 3, None, torch.ones(1, 2), n_sequences=0
            ),
            "n_sequences 0",
        ),
        (
            lambda: losses.full_vocabulary_kl(
                losses.token_reverse_kl,
                torch.zeros(1, 2, 8),
                torch.zeros(1, 2, 9),
                torch.ones(1, 2),
            ),
            r"student \(1, 2, 8\), teacher \(1, 2, 9\)",
        ),
        (
            lambda: losses.full_vocabulary_kl(
                losses.token_reverse_kl,
                torch.zeros(1, 2, 8),
                torch.zeros(1, 2, 8),
                torch.ones(2, 2),
            ),
            r"mask \(2, 2\)",
        ),
    ],
)
def test_bad_input_is_one_clear_line(call, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)

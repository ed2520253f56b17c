"""Token log-probabilities, advantages, token weights and losses as pure functions.

Every objective is g = sum_t a_t grad log pi(y_t | y_<t); only a_t differs.

Shapes: n sequences padded to t tokens over a vocabulary of v. A mask (n, t), bool
or 0/1, is true on the tokens that are learned; log-probabilities, advantages and
weights at the other positions, NaN included, reach neither a value nor a gradient.
Losses divide by counts that the caller may fix for the whole batch, so that
micro-batches add up to it.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each given token.

    log pi(y_t) = z_t[y_t] - log sum_v exp z_t[v]

    Args:
        logits: (n, t, v) float; logits[:, i] predicts tokens[:, i] (shift before).
        tokens: (n, t) integer ids in [0, v).

    Returns:
        (n, t) nats in (-inf, 0], float32 or, for float64 logits, float64.

    Raises:
        ValueError: shapes that do not match, or an id outside the vocabulary.

    Source: the pi_theta(y_t | s_t) of every objective in arXiv:2606.07082.

    >>> token_log_probs(torch.zeros(1, 1, 4), torch.tensor([[2]])).exp()
    tensor([[0.2500]])
    """
    if logits.ndim != tokens.ndim + 1 or logits.shape[:-1] != tokens.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and tokens {tuple(tokens.shape)}: expected "
            "(n, t, v) and (n, t); drop the last logit and the first token to align"
        )
    vocabulary = logits.shape[-1]
    if tokens.numel() and (tokens.min() < 0 or tokens.max() >= vocabulary):
        raise ValueError(
            f"token ids {int(tokens.min())} to {int(tokens.max())}: expected "
            f"0 to {vocabulary - 1}; use the model's tokenizer, and a mask, not -100"
        )
    log_probs = _log_softmax(logits)
    return log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def sft_loss(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor,
    denominator: float | None = None,
) -> Tensor:
    """Next-token cross-entropy on the masked-in tokens of demonstrations.

    L = -(1 / D) sum_{i,t} m_it log pi(y*_it | x_i, y*_i<t)

    Args:
        logits: (n, t, v) float; logits[:, i] predicts tokens[:, i].
        tokens: (n, t) integer ids; any value where the mask is false.
        mask: (n, t) true on the tokens of the answer, false on prompt and padding.
        denominator: D; None means this call's own token count. With micro-batches
            give the count of the whole batch, so that their losses sum to its loss.

    Returns:
        Scalar in nats a token, >= 0.

    Raises:
        ValueError: shapes that do not match, no token to learn, or D <= 0.

    Source: arXiv:2606.07082, the SFT objective (prompt masked, settings tables).
    """
    _require_same_shape(tokens=tokens, mask=mask)
    live = mask.bool()
    log_probs = token_log_probs(logits, tokens.masked_fill(~live, 0))
    count = float(live.sum()) if denominator is None else float(denominator)
    if not count > 0:
        raise ValueError(
            f"denominator {count:g}: expected a positive token count; drop batches "
            "without answer tokens or give the count of the whole batch"
        )
    return -log_probs.masked_fill(~live, 0.0).sum() / count


def opd_advantage(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """Advantage of on-policy distillation: minus the gap on the sampled token.

    A_t = -r_t,  r_t = log pi_theta(y_t | s_t) - log pi_T(y_t | s_t), no gradient

    For y ~ pi_theta, E[A_t grad log pi_theta(y_t)] = -grad KL(pi_theta || pi_T).

    Args:
        student_log_probs: (n, t) float, of the tokens that were sampled.
        teacher_log_probs: (n, t) float, of the same tokens.

    Returns:
        (n, t) nats, detached; zero where the two agree, negative where the student
        is more confident than the teacher.

    Raises:
        ValueError: shapes that do not match.

    Source: arXiv:2606.07082 App. G (its App. D writes the full-vocabulary KL).

    >>> opd_advantage(torch.tensor([[-0.5]]), torch.tensor([[-2.0]]))
    tensor([[-1.5000]])
    """
    _require_same_shape(student=student_log_probs, teacher=teacher_log_probs)
    return (teacher_log_probs - student_log_probs).detach()


def group_advantage(rewards: Tensor, group_size: int, eps: float = 1e-6) -> Tensor:
    """Group-normalised advantage of GRPO: one scalar for each response.

    A_i = (R_i - mean_g R) / (std_g R + eps), with the unbiased std of i's group g

    Args:
        rewards: (n,) numbers; consecutive runs of group_size share one prompt.
        group_size: responses a prompt, at least 2.
        eps: keeps the quotient finite.

    Returns:
        (n,) float, mean 0 in each group; exactly 0 in a group of equal rewards.

    Raises:
        ValueError: n not a multiple of group_size, group_size < 2, a reward not finite.

    Source: arXiv:2606.07082, the RLVR objective (GRPO); GRPO is arXiv:2402.03300.

    >>> group_advantage(torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0]), 2)
    tensor([ 0.7071, -0.7071, -0.7071,  0.7071,  0.0000,  0.0000])
    """
    groups = _as_groups(rewards, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    advantages = centred / (groups.std(dim=1, keepdim=True) + eps)
    # The mean of equal numbers can be off by a rounding, which eps would not hide.
    varied = group_has_variance(rewards, group_size).unsqueeze(1)
    return advantages.masked_fill(~varied, 0.0).flatten()


def group_has_variance(rewards: Tensor, group_size: int) -> Tensor:
    """Whether the responses of each prompt differ in reward; others are skipped.

    max_g R > min_g R

    Args:
        rewards: (n,) numbers; consecutive runs of group_size share one prompt.
        group_size: responses a prompt, at least 2.

    Returns:
        (n / group_size,) bool.

    Raises:
        ValueError: as for group_advantage.

    Source: arXiv:2606.07082, RLVR settings (groups without variance are skipped).

    >>> group_has_variance(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2)
    tensor([ True, False])
    """
    groups = _as_groups(rewards, group_size)
    return groups.amax(dim=1) > groups.amin(dim=1)


def mix_advantages(opd: Tensor, rlvr: Tensor, alpha: float) -> Tensor:
    """Mixture of the raw distillation and reward advantages, token by token.

    A_t = alpha A_t,OPD + (1 - alpha) A_RLVR

    Args:
        opd: (n, t) float.
        rlvr: (n,) float, one scalar a response, or (n, t).
        alpha: share of distillation in [0, 1]; 1 returns opd and 0 returns rlvr
            bit for bit (a product with 0 would lose -0.0 and turn inf into NaN).

    Returns:
        (n, t) float, in the units of the advantages; not normalised again.

    Raises:
        ValueError: alpha outside [0, 1], shapes that do not match.

    Source: arXiv:2606.07082 Fig. 7c and 9c (mixing).

    >>> mix_advantages(torch.tensor([[-1.0, 0.0]]), torch.tensor([2.0]), 0.5)
    tensor([[0.5000, 1.0000]])
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(
            f"alpha {alpha}: expected 0 (RLVR) to 1 (OPD); give a share in between"
        )
    spread = _per_token(rlvr, opd.shape)
    if alpha == 1.0:
        return opd.clone()
    if alpha == 0.0:
        return spread.clone()
    return alpha * opd + (1.0 - alpha) * spread


def top_gap_weights(gap: Tensor, mask: Tensor, keep_frac: float) -> Tensor:
    """Token weights that keep where the student is most over-confident.

    w_t = T / K on the K tokens of a sequence with the largest r_t, else 0;
    T = its token count, K = max(1, floor(keep_frac T + 1/2))

    Args:
        gap: (n, t) float, r_t = log pi_theta - log pi_T = -opd_advantage.
        mask: (n, t) true on the T tokens of each response.
        keep_frac: share kept, in (0, 1]; 1 returns the mask.

    Returns:
        (n, t) weights in gap's dtype that sum to T in each sequence; among equal
        gaps the earlier token is kept.

    Raises:
        ValueError: keep_frac outside (0, 1], shapes, or a gap that is not finite.

    Source: arXiv:2606.07082 Fig. 7a and 9a (sparse tokens).

    >>> gap = torch.tensor([[0.1, 2.0, -3.0, 1.0]])
    >>> top_gap_weights(gap, torch.ones(1, 4), 0.5)
    tensor([[0., 2., 0., 2.]])
    """
    _require_same_shape(gap=gap, mask=mask)
    live = mask.bool()
    if not bool(gap.detach()[live].isfinite().all()):
        raise ValueError(
            "gap holds NaN or inf on a live token: expected finite numbers to rank; "
            "check the log-probabilities of student and teacher"
        )
    return _keep_best(gap.detach(), live, keep_frac)


def random_token_weights(
    mask: Tensor, keep_frac: float, generator: torch.Generator
) -> Tensor:
    """Token weights that keep the same number of tokens, drawn at random.

    w_t = T / K on K of the T tokens of a sequence, uniformly without replacement;
    K as in top_gap_weights

    Args:
        mask: (n, t) true on the T tokens of each response.
        keep_frac: share kept, in (0, 1]; 1 returns the mask.
        generator: source of the draw; one number a live token, so that the width of
            the padding changes nothing.

    Returns:
        (n, t) weights, float32, that sum to T in each sequence.

    Raises:
        ValueError: keep_frac outside (0, 1].

    Source: arXiv:2606.07082 Fig. 7a and 9a (sparse tokens).

    >>> rng = torch.Generator().manual_seed(0)
    >>> random_token_weights(torch.ones(1, 8), 0.25, rng).sort().values
    tensor([[0., 0., 0., 0., 0., 0., 4., 4.]])
    """
    live = mask.bool()
    draw = torch.rand(
        int(live.sum()),
        generator=generator,
        device=generator.device,
        dtype=torch.float64,
    )
    scores = torch.zeros(live.shape, dtype=torch.float64, device=live.device)
    scores[live] = draw.to(live.device)
    return _keep_best(scores, live, keep_frac).float()


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor | None,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    n_sequences: int | None = None,
) -> Tensor:
    """Clipped policy-gradient loss of PPO and GRPO, with weights for the tokens.

    L = -(1/n) sum_i (1/T_i) sum_t w_t min(rho_t A_t, clip(rho_t, 1-low, 1+high) A_t)
    rho_t = pi_theta(y_t) / pi_old(y_t)

    Args:
        log_probs: (n, t) float, of the policy that learns; carries the gradient.
        old_log_probs: (n, t) float, of the policy that the ratio starts from.
        advantages: (n, t) float, or (n,) for one scalar a response; no gradient.
        weights: (n, t) float token weights, or None for ones.
        mask: (n, t) true on the T_i tokens of each response.
        clip_low: in [0, 1]; 1 leaves the ratio free below.
        clip_high: >= 0; the paper's off-policy 1.0 still stops ratios above 2.
        n_sequences: n; None means this call's rows. With micro-batches give the
            rows of the whole batch, so that their losses sum to its loss.

    Returns:
        Scalar in the units of the advantages. A row without tokens adds 0.

    Raises:
        ValueError: shapes that do not match, or a clip or n_sequences out of range.

    Source: arXiv:2606.07082, RLVR settings (clip 0.2 / 0.28) and off-policy control
        (clip 1.0); the mean over tokens, then sequences, is that of arXiv:2402.03300.

    >>> zero = torch.zeros(1, 2)
    >>> policy_loss(zero, zero, torch.tensor([3.0]), None, torch.tensor([[1, 0]]))
    tensor(-3.)
    """
    _require_same_shape(log_probs=log_probs, old=old_log_probs, mask=mask)
    if not (0.0 <= clip_low <= 1.0 and clip_high >= 0.0):
        raise ValueError(
            f"clip {clip_low} / {clip_high}: expected 0 <= low <= 1 and high >= 0; "
            "the ratio is held in [1 - low, 1 + high]"
        )
    live = mask.bool()
    # Masked before exp: the gradient of what a NaN touched is NaN even times zero.
    log_ratio = (log_probs - old_log_probs.detach()).masked_fill(~live, 0.0)
    gain = _per_token(advantages.detach(), live.shape)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = -torch.minimum(ratio * gain, clipped * gain)
    if weights is not None:
        _require_same_shape(log_probs=log_probs, weights=weights)
        loss = loss * weights.detach()
    return sequence_mean(loss, live, n_sequences)


def truncated_ratio(
    log_probs: Tensor, sampled_log_probs: Tensor, mask: Tensor, most: float
) -> Tensor:
    """Importance weights of tokens that another implementation of the policy sampled.

    w_t = min(pi(y_t) / mu(y_t), C)

    Args:
        log_probs: (n, t) nats, of the policy as it is trained, pi.
        sampled_log_probs: (n, t) nats, of the engine that sampled, mu.
        mask: (n, t) true on tokens.
        most: C > 0, where a weight is cut off.

    Returns:
        (n, t) in (0, C], without gradient; min(1, C) off the mask.

    Raises:
        ValueError: shapes that do not match, or C out of range.

    Source: truncated importance sampling (Ionides 2008), a token at a time.

    >>> zero, live = torch.zeros(1, 2), torch.ones(1, 2)
    >>> truncated_ratio(zero, torch.tensor([[-1.0, 1.0]]), live, 2.0)
    tensor([[2.0000, 0.3679]])
    """
    _require_same_shape(
        log_probs=log_probs, sampled_log_probs=sampled_log_probs, mask=mask
    )
    if not most > 0.0:
        raise ValueError(f"weights cut off at {most}: expected a number above 0")
    apart = (log_probs.detach() - sampled_log_probs).masked_fill(~mask.bool(), 0.0)
    return apart.exp().clamp(max=most)


def full_vocabulary_kl(
    token_kl: Callable[[Tensor, Tensor], Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    n_sequences: int | None = None,
) -> Tensor:
    """Divergence over the full vocabulary at every state that was visited.

    L = (1/n) sum_i (1/T_i) sum_t d(p_t, q_t), p = student, q = teacher

    Args:
        token_kl: d, ``token_reverse_kl`` (the paper's) or ``token_forward_kl``.
        student_logits: (n, t, v) float; carries the gradient.
        teacher_logits: (n, t, v) float, over the same vocabulary.
        mask: (n, t) true on the T_i tokens of each response.
        n_sequences: n, as in policy_loss.

    Returns:
        Scalar in nats a token, >= 0; inf where one excludes what the other may say.

    Raises:
        ValueError: shapes that do not match, or n_sequences < 1.

    Source: arXiv:2606.07082 App. D.

    >>> logits = torch.tensor([[[2.0, 0.0]]])
    >>> full_vocabulary_kl(token_reverse_kl, logits, logits, torch.ones(1, 1))
    tensor(0.)
    """
    _require_same_shape(student=student_logits, teacher=teacher_logits)
    _require_same_shape(student_states=student_logits[..., 0], mask=mask)
    live = mask.bool()
    hidden = ~live.unsqueeze(-1)
    student = student_logits.masked_fill(hidden, 0.0)
    teacher = teacher_logits.detach().masked_fill(hidden, 0.0)
    return sequence_mean(token_kl(student, teacher), live, n_sequences)


def token_forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Forward KL of each state: (..., v) logits to (...) nats, float32.

    d(p, q) = sum_v q(v) (log q(v) - log p(v)), p = student, q = teacher

    Where the two agree its gradient is p - q = 0, up to the rounding of both.

    Source: a control of this project: distillation's older direction, on the student's
        own states.
    """
    log_p = _log_softmax(student_logits)
    log_q = _log_softmax(teacher_logits.detach())
    # 0 log 0 = 0; hidden before the product, whose gradient would be 0 * inf
    impossible = log_q.isneginf()
    gap = log_q.masked_fill(impossible, 0.0) - log_p.masked_fill(impossible, 0.0)
    return (log_q.exp() * gap).sum(-1)


def token_reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Reverse KL of each state: (..., v) logits to (...) nats, float32.

    d(p, q) = sum_v p(v) (log p(v) - log q(v)), p = student, q = teacher

    The gradient treats the bracket as constant, which is exact: sum_v grad p(v) = 0.
    It is therefore exactly zero where student and teacher agree, in floating point
    too. Differentiate it once only.

    Source: arXiv:2606.07082 App. D.
    """
    log_p = _log_softmax(student_logits)
    log_q = _log_softmax(teacher_logits)
    # 0 log 0 = 0: a vocabulary padded with -inf adds nothing, on either side.
    gap = (log_p.detach() - log_q).masked_fill(log_p.detach().isneginf(), 0.0)
    return (log_p.exp() * gap).sum(-1)


def sequence_mean(
    values: Tensor, live: Tensor, n_sequences: int | None = None
) -> Tensor:
    """Mean over the live tokens of each row, then sum over rows / n_sequences."""
    rows = live.shape[0] if n_sequences is None else n_sequences
    if rows < 1:
        raise ValueError(
            f"n_sequences {rows}: expected at least 1; give the number of sequences "
            "in the whole batch"
        )
    lengths = live.sum(dim=-1).clamp(min=1).to(values.dtype)
    return (values.masked_fill(~live, 0.0).sum(dim=-1) / lengths).sum() / rows


def _keep_best(scores: Tensor, live: Tensor, keep_frac: float) -> Tensor:
    """Weights T / K on the K live tokens of each row with the largest scores."""
    if not 0.0 < keep_frac <= 1.0:
        raise ValueError(
            f"keep_frac {keep_frac}: expected above 0 and at most 1; 0.25 keeps a "
            "quarter of the tokens"
        )
    lengths = live.sum(dim=-1, keepdim=True).double()
    kept = torch.floor(keep_frac * lengths + 0.5).clamp(min=1.0)
    ranked = scores.masked_fill(~live, -torch.inf)
    order = ranked.argsort(stable=True, dim=-1, descending=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    weights = (lengths / kept).expand(scores.shape)
    return weights.masked_fill(~((rank < kept) & live), 0.0).to(scores.dtype)


def _as_groups(rewards: Tensor, group_size: int) -> Tensor:
    """Rewards as (n / group_size, group_size) floats, or a clear error."""
    if group_size < 2:
        raise ValueError(
            f"group_size {group_size}: expected at least 2 responses a prompt; one "
            "response has no group to be compared with"
        )
    if rewards.ndim != 1 or rewards.numel() == 0 or rewards.numel() % group_size:
        raise ValueError(
            f"rewards {tuple(rewards.shape)}: expected (n,) with n a multiple of "
            f"group_size {group_size}; keep the responses of a prompt together"
        )
    numbers = rewards if rewards.is_floating_point() else rewards.float()
    if not bool(numbers.isfinite().all()):
        raise ValueError(
            "rewards hold NaN or inf: expected finite numbers; score every response"
        )
    return numbers.reshape(-1, group_size)


def _per_token(values: Tensor, shape: torch.Size) -> Tensor:
    """Values (n,) spread over (n, t), or (n, t) as they are."""
    if values.shape == shape:
        return values
    if len(shape) == 2 and values.shape == shape[:1]:
        return values.unsqueeze(1).expand(shape)
    raise ValueError(
        f"advantages {tuple(values.shape)}: expected {tuple(shape)} or "
        f"{tuple(shape[:1])}; give one number a token or one a response"
    )


def _log_softmax(logits: Tensor) -> Tensor:
    """Over the vocabulary; half precision is widened, in which it has two digits."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1)


def _require_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError naming the shapes when they differ."""
    if len({tuple(t.shape) for t in tensors.values()}) > 1:
        given = ", ".join(f"{k} {tuple(t.shape)}" for k, t in tensors.items())
        raise ValueError(f"{given}: expected one shape; align tokens and padding")

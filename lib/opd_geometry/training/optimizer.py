"""AdamW as the paper uses it, two others, schedules of the step, master weights.

A schedule that is a function of the step alone has no state to save, which is one thing
less that a resumed run could get wrong.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from opd_geometry.training import ranks
from opd_geometry.training.settings import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of one step.

    lr(s) = peak * (s + 1) / warmup while s < warmup; then peak, or
    peak * (f + (1 - f) * (1 + cos(pi * (s - warmup) / (steps - warmup))) / 2).

    Args:
        config: peak, schedule, warm-up and final share f.
        step: 0 <= step < steps.
        steps: length of the run.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.final_frac + (1 - config.final_frac) * cosine)


def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over float32 master weights; weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return _adamw(trained, [p for p in trained if p.ndim >= 2], config)


def _adamw(
    trained: list[nn.Parameter], decaying: list[nn.Parameter], config: OptimizerConfig
) -> torch.optim.AdamW:
    """AdamW over some parameters, and those of the trained that do not decay."""
    gains = [p for p in trained if p.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": decaying, "weight_decay": config.weight_decay},
            {"params": gains, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=config.fused or None,
    )


def optimizer_of(model: Any, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of a configuration, over float32 master weights."""
    if config.kind == "adamw":
        return adamw(model, config)
    if config.kind == "muon":
        return MuonBesideAdamW(model, config)
    return torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.learning_rate,
        momentum=config.betas[0],
        weight_decay=config.weight_decay,
        fused=config.fused or None,
    )


class MuonBesideAdamW(torch.optim.Optimizer):
    """torch's Muon on the matrices of the layers, AdamW on embeddings, head and norms.

    One optimizer to whoever sets rates, hooks steps, or stores its state.

    Args:
        model: a language model, whole in this process: Muon's steps are of whole
            matrices.
        config: betas[0] is Muon's momentum.

    Raises:
        ValueError: the model's weights are split over processes.

    Source: K. Jordan et al., Muon (2024), with the rate in AdamW's unit of
        arXiv:2502.16982; embeddings and head are AdamW's in both.
    """

    def __init__(self, model: Any, config: OptimizerConfig) -> None:
        if ranks.is_sharded(model):
            raise ValueError(
                "muon on weights that are split over processes: its steps are of "
                "whole matrices; set sharded=false"
            )
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        outer = {id(end.weight) for end in ends if end is not None}
        trained = [p for p in model.parameters() if p.requires_grad]
        inner = [p for p in trained if p.ndim == 2 and id(p) not in outer]
        rest = [p for p in trained if p.ndim > 2 or (p.ndim == 2 and id(p) in outer)]
        muon = torch.optim.Muon(
            inner,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            momentum=config.betas[0],
            adjust_lr_fn="match_rms_adamw",
        )
        others = _adamw(trained, rest, config)
        self._parts = (muon, others)
        super().__init__([*muon.param_groups, *others.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both; a closure is not taken."""
        groups = self.param_groups[:1], self.param_groups[1:]
        for part, own in zip(self._parts, groups, strict=True):
            # a state that was loaded has groups and moments of its own
            part.param_groups, part.state = own, self.state
            part.step()


def autocast(precision: str) -> str:
    """The part of a precision that accelerate's own casting does."""
    return "no" if precision == "bf16-copy" else precision


class Compute:
    """What computes beside the float32 master weights: they themselves, or a bf16 copy.

    The copy's gradients are added to the masters' in float32 as soon as they are there,
    and a step's new masters are rounded to the copy: what is lost in bf16 is a
    product's last digits, never a small update.

    Args:
        masters: the model that is trained, float32.
        precision: ``bf16-copy``, or any other of ``PRECISIONS`` for the masters.
            Sharded masters gather a copy of their own (see ``ranks.shard``).

    Attributes:
        model: what forward and backward passes go through.
    """

    def __init__(self, masters: nn.Module, precision: str) -> None:
        self.model: Any = masters
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        if precision == "bf16-copy" and not ranks.is_sharded(masters):
            self.model = bfloat16_copy(masters)
            ours, theirs = self.model.parameters(), masters.parameters()
            self._pairs = list(zip(ours, theirs, strict=True))
        for low, master in self._pairs:
            if low.requires_grad:
                low.register_post_accumulate_grad_hook(_handing_to(master))

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the masters to the copy, after each of their steps."""
        for low, master in self._pairs:
            low.copy_(master)


def bfloat16_copy(model: Any) -> Any:
    """A copy whose parameters are rounded to bf16; buffers keep their precision."""
    low = copy.deepcopy(model)
    for parameter in low.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
        parameter.grad = None
    return low


def _handing_to(master: nn.Parameter) -> Callable[[torch.Tensor], None]:
    """A hook that adds a parameter's new gradient to its master's."""

    def hand_over(low: torch.Tensor) -> None:
        assert low.grad is not None
        if master.grad is None:
            master.grad = low.grad.to(master.dtype)
        else:
            master.grad += low.grad
        low.grad = None

    return hand_over


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


def clipped_norm(
    accelerator: Any, model: nn.Module, limit: float, step: int, rate: float
) -> float:
    """Scale a gradient down to a 2-norm; stop before a broken one reaches the weights.

    Args:
        accelerator: that prepared the model.
        model: with its gradient, which may lie in shards.
        limit: of the norm; infinite clips nothing.
        step, rate: of the step, for the message.

    Returns:
        The norm before.

    Raises:
        ValueError: the norm is NaN or infinite.
    """
    found = accelerator.clip_grad_norm_(model.parameters(), limit)
    norm = float(found.full_tensor() if isinstance(found, DTensor) else found)
    if not math.isfinite(norm):
        raise ValueError(
            f"step {step}: the gradient's norm is {norm} at learning rate "
            f"{rate:g}, expected a finite number; check the starting weights for "
            "NaN, or lower the learning rate"
        )
    return norm

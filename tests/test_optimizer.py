import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from opd_geometry.geometry.projection import (
    leaked_energy,
    project_updates,
    random_subspace,
)
from opd_geometry.training.models import ModelConfig, build_model
from opd_geometry.training.optimizer import (
    Compute,
    OptimizerConfig,
    adamw,
    autocast,
    learning_rate,
    optimizer_of,
    set_learning_rate,
)

COSINE = OptimizerConfig(3e-4, "cosine", warmup_steps=7, final_frac=0.1)


def rates(config: OptimizerConfig, steps: int) -> list[float]:
    return [learning_rate(config, step, steps) for step in range(steps)]


@pytest.mark.parametrize(
    ("warmup", "steps", "final"), [(7, 40, 0.1), (0, 25, 0.0), (10, 11, 0.5), (1, 2, 0)]
)
def test_cosine_is_that_of_transformers(warmup: int, steps: int, final: float) -> None:
    """Theirs starts at zero, a step that moves nothing; ours one step up the ramp."""
    config = replace(COSINE, warmup_steps=warmup, final_frac=final)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, warmup, steps, min_lr_rate=final
    )
    theirs = []
    for _ in range(steps):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    ours = rates(config, steps)
    assert ours[:warmup] == pytest.approx([*theirs[1:warmup], 3e-4][:warmup])
    assert ours[warmup:] == pytest.approx(theirs[warmup:])


def test_the_ramp_has_no_idle_step_and_ends_at_the_peak() -> None:
    ours = rates(COSINE, 30)
    assert ours[0] == pytest.approx(3e-4 / 7)
    assert ours[6] == ours[7] == pytest.approx(3e-4)
    assert max(ours) == pytest.approx(3e-4)
    assert all(a > b for a, b in pairwise(ours[7:]))
    assert 3e-5 < ours[-1] < 3e-5 * 1.1


def test_constant_stays() -> None:
    config = OptimizerConfig(1e-5, "constant", warmup_steps=4)
    assert rates(config, 8) == pytest.approx(
        [2.5e-6, 5e-6, 7.5e-6, 1e-5, 1e-5, 1e-5, 1e-5, 1e-5]
    )
    assert rates(replace(config, warmup_steps=0), 3) == [1e-5] * 3


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_run_shorter_than_its_ramp(schedule: str) -> None:
    ours = rates(replace(COSINE, schedule=schedule, warmup_steps=10), 3)
    assert ours == pytest.approx([3e-5, 6e-5, 9e-5])
    assert all(map(math.isfinite, ours))


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule 'linear'; expected constant or"):
        OptimizerConfig(1e-3, "linear")


def test_only_matrices_decay() -> None:
    model = build_model(ModelConfig(32, 2, 16), seed=0)
    config = OptimizerConfig(0.01, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    optimizer = adamw(model, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1.0 if "norm" in name else 1.0 - 0.01 * 0.1
        assert torch.allclose(parameter, factor * before[name], rtol=1e-6, atol=0)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.95)
        assert group["eps"] == 1e-6


def test_frozen_parameters_are_left_out() -> None:
    model = build_model(ModelConfig(32, 1, 16), seed=0)
    model.lm_head.weight.requires_grad_(False)
    optimizer = adamw(model, OptimizerConfig(1e-3))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(model.lm_head.weight) not in held


def test_tied_weights_are_held_once() -> None:
    model = build_model(ModelConfig(32, 1, 16), seed=0)
    model.lm_head.weight = model.model.embed_tokens.weight
    optimizer = adamw(model, OptimizerConfig(1e-3))
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer 'lion'; expected adamw, sgd, muon"):
        OptimizerConfig(1e-3, kind="lion")
    with pytest.raises(ValueError, match="fused with muon: torch has no fused one"):
        OptimizerConfig(1e-3, kind="muon", fused=True)


def gradients_of(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_steps_layers_and_adamw_the_rest() -> None:
    """The same bits as the two apart, resumed in the middle; rates reach both."""
    config = OptimizerConfig(1e-3, kind="muon", weight_decay=0.1)
    models = [build_model(ModelConfig(32, 2, 16), seed=0) for _ in range(3)]
    ours = optimizer_of(models[0], config)
    named = dict(models[1].named_parameters())
    inner = [p for n, p in named.items() if p.ndim == 2 and ".layers." in n]
    rest = [p for n, p in named.items() if p.ndim == 2 and ".layers." not in n]
    flat = [{"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0}]
    rms = "match_rms_adamw"
    apart = [
        torch.optim.Muon(inner, momentum=0.9, weight_decay=0.1, adjust_lr_fn=rms),
        torch.optim.AdamW(
            [{"params": rest}, *flat], betas=config.betas, weight_decay=0.1
        ),
    ]
    assert (len(inner), len(rest)) == (14, 2)
    for step in range(4):
        if step == 2:  # as a resumed run does
            state = ours.state_dict()
            models[2].load_state_dict(models[0].state_dict())
            models[0], ours = models[2], optimizer_of(models[2], config)
            ours.load_state_dict(state)
        for model in models[:2]:
            gradients_of(model, step)
        for optimizer in (ours, *apart):
            set_learning_rate(optimizer, 1e-3 * (step + 1))
            optimizer.step()
        pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_muon_can_be_confined() -> None:
    config = OptimizerConfig(1e-3, kind="muon", weight_decay=0.0)
    model = build_model(ModelConfig(32, 1, 16), seed=0)
    weight = model.model.layers[0].mlp.up_proj.weight
    basis = random_subspace(weight.shape[1], 2, torch.Generator().manual_seed(0))
    optimizer, before = optimizer_of(model, config), weight.detach().clone()
    project_updates(optimizer, {weight: basis})
    for step in range(3):
        gradients_of(model, step)
        optimizer.step()
    assert float((weight.detach() - before).norm()) > 1e-5
    assert leaked_energy(weight.detach() - before, basis) < 1e-6


def test_sgd_has_momentum_and_no_scale() -> None:
    config = OptimizerConfig(1e-2, kind="sgd", weight_decay=0.0)
    models = [build_model(ModelConfig(32, 1, 16), seed=0) for _ in range(2)]
    before = [p.detach().clone() for p in models[0].parameters()]
    optimizers = [optimizer_of(model, config) for model in models]
    for model, optimizer, scale in zip(models, optimizers, (1.0, 4.0), strict=True):
        for step in range(2):
            gradients_of(model, step)
            for parameter in model.parameters():
                parameter.grad *= scale
            optimizer.step()
    after = [model.parameters() for model in models]
    for one, other, start in zip(*after, before, strict=True):
        assert torch.allclose(other - start, 4.0 * (one - start), atol=1e-6)


def test_a_rate_reaches_every_group() -> None:
    model = build_model(ModelConfig(32, 1, 16), seed=0)
    optimizer = adamw(model, OptimizerConfig(1e-3))
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}
    set_learning_rate(optimizer, 2e-4)
    assert [group["lr"] for group in optimizer.param_groups] == [2e-4, 2e-4]


def test_the_default_betas_are_the_paper_s() -> None:
    config = OptimizerConfig(1e-6)
    assert (config.betas, config.eps, config.weight_decay) == ((0.9, 0.98), 1e-8, 0.1)
    assert (config.schedule, config.max_grad_norm) == ("constant", 1.0)


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan")])
def test_a_norm_that_stops_everything_is_refused(norm: float) -> None:
    with pytest.raises(ValueError, match=r"max_grad_norm .* expected above 0"):
        OptimizerConfig(1e-3, max_grad_norm=norm)


# --- bf16 copies ---------------------------------------------------------------------


def layers() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
    model.register_buffer("angles", torch.rand(3))
    return model


def test_masters_keep_what_is_too_small_for_the_copy() -> None:
    """A step of a hundredth of half a unit in the last place is not lost."""
    masters = layers()
    compute = Compute(masters, "bf16-copy")
    optimizer = torch.optim.SGD(masters.parameters(), lr=1e-7)
    before = [p.detach().clone() for p in masters.parameters()]
    low_before = [p.detach().clone() for p in compute.model.parameters()]
    for _ in range(3):
        compute.model(torch.ones(4, 8, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        compute.refresh()
    for old, p in zip(before, masters.parameters(), strict=True):
        assert p.dtype == torch.float32
        assert not torch.equal(old, p)
    for old, p in zip(low_before, compute.model.parameters(), strict=True):
        assert torch.equal(old, p)


def test_gradients_add_up_in_float32() -> None:
    """1 + 2^-9 is 1 in bf16: the sum of two passes must not be rounded to it."""
    masters = torch.nn.Linear(1, 1, bias=False)
    compute = Compute(masters, "bf16-copy")
    for value in (1.0, 2.0**-9):
        x = torch.full((1, 1), value, dtype=torch.bfloat16)
        compute.model(x).sum().backward()
    assert masters.weight.grad is not None
    assert masters.weight.grad.item() == 1.0 + 2.0**-9
    assert compute.model.weight.grad is None


def test_the_copy_follows_its_masters_and_keeps_buffers() -> None:
    masters = layers()
    compute = Compute(masters, "bf16-copy")
    assert compute.model.angles.dtype == torch.float32
    with torch.no_grad():
        for p in masters.parameters():
            p.mul_(1.7)
    compute.refresh()
    pairs = zip(masters.parameters(), compute.model.parameters(), strict=True)
    for master, low in pairs:
        assert torch.equal(low, master.to(torch.bfloat16))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_without_a_copy_the_masters_compute(precision: str) -> None:
    masters = layers()
    compute = Compute(masters, precision)
    assert compute.model is masters
    compute.refresh()
    assert autocast(precision) == precision


def test_fused_steps_are_those_of_adamw() -> None:
    found = []
    for fused in (False, True):
        model = layers()
        optimizer = adamw(model, OptimizerConfig(1e-2, fused=fused))
        for _ in range(5):
            model(torch.ones(4, 8)).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)

"""Projection: who leaks and who cannot, optimizers' state, and planted subspaces."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from opd_geometry.geometry import projection
from opd_geometry.geometry.projection import project_gradients, project_updates

N_ROWS, N_COLS, RANK = 12, 10, 3


def basis(k: int = RANK, n: int = N_COLS, seed: int = 5) -> Tensor:
    return projection.random_subspace(n, k, torch.Generator().manual_seed(seed))


def small_model(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    rng = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(N_COLS, N_ROWS), nn.Tanh(), nn.Linear(N_ROWS, 2))
    model = model.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    return model


def loss_of(model: nn.Sequential, step: int, rows: slice = slice(None)) -> Tensor:
    """Loss on one batch of a fixed stream; parts of a batch add up to it."""
    dtype = model[0].weight.dtype
    rng = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(8, N_COLS, generator=rng, dtype=torch.float64).to(dtype)
    y = torch.randn(8, 2, generator=rng, dtype=torch.float64).to(dtype)
    return (model(x[rows]) - y[rows]).square().sum() / 8


def train(model: nn.Sequential, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def leak_after(
    attach: Callable,
    make: Callable[[list[Tensor]], Optimizer],
    dtype: torch.dtype = torch.float64,
) -> float:
    """Share of the energy outside the subspace after 30 steps."""
    model = small_model(dtype)
    w_before = model[0].weight.detach().double().clone()
    optimizer = make(list(model.parameters()))
    attach(optimizer, {model[0].weight: basis()})
    train(model, optimizer, range(30))
    delta = model[0].weight.detach().double() - w_before
    assert delta.norm() > 0.01
    return projection.leaked_energy(delta, basis())


def sgd(parameters: list[Tensor]) -> Optimizer:
    return SGD(parameters, lr=0.02)


def momentum(parameters: list[Tensor]) -> Optimizer:
    return SGD(parameters, lr=0.01, momentum=0.9, nesterov=True)


def decayed_sgd(parameters: list[Tensor]) -> Optimizer:
    return SGD(parameters, lr=0.02, weight_decay=0.1)


def adam(parameters: list[Tensor]) -> Optimizer:
    return Adam(parameters, lr=1e-2, betas=(0.9, 0.98))


def adamw(parameters: list[Tensor]) -> Optimizer:
    return AdamW(parameters, lr=1e-2, betas=(0.9, 0.98), weight_decay=0.1)


def decay_only(parameters: list[Tensor]) -> Optimizer:
    """Adam's part is damped away; what is left of AdamW is the decoupled decay."""
    return AdamW(parameters, lr=1e-2, eps=1e12, weight_decay=0.5)


@pytest.mark.parametrize("make", [sgd, momentum])
def test_projected_gradients_of_plain_sgd_do_not_leak(make: Callable):
    assert leak_after(project_gradients, make) < 1e-25


@pytest.mark.parametrize("make", [adam, adamw, decay_only, decayed_sgd])
def test_projected_gradients_leak_through_adam_and_through_decay(make: Callable):
    assert 0.005 < leak_after(project_gradients, make) < 0.9


@pytest.mark.parametrize("make", [sgd, momentum, decayed_sgd, adam, adamw, decay_only])
def test_projected_updates_never_leak(make: Callable):
    assert leak_after(project_updates, make) < 1e-25
    # In float32 the stored weights round: (1e-7 / relative size of the update)^2.
    assert leak_after(project_updates, make, torch.float32) < 1e-9


def test_both_forms_are_the_same_thing_for_plain_sgd():
    finals = []
    for attach in (project_gradients, project_updates):
        model = small_model()
        optimizer = sgd(list(model.parameters()))
        attach(optimizer, {model[0].weight: basis()})
        train(model, optimizer, range(10))
        finals.append(model[0].weight.detach())
    torch.testing.assert_close(*finals, rtol=1e-12, atol=1e-13)


def test_one_projected_step_against_the_formula():
    v = basis()
    model = small_model()
    weight, other = model[0].weight, model[2].weight
    w_before = weight.detach().clone()
    loss_of(model, 0).backward()
    gradient, free = weight.grad.clone(), other.grad.clone()
    optimizer = sgd(list(model.parameters()))
    project_gradients(optimizer, {weight: v})
    optimizer.step()
    torch.testing.assert_close(weight.grad, gradient @ v @ v.T)
    torch.testing.assert_close(weight.detach(), w_before - 0.02 * gradient @ v @ v.T)
    assert torch.equal(other.grad, free)


def test_one_projected_adamw_update_against_the_formula():
    v, lr, decay = basis(), 1e-2, 0.1
    model = small_model()
    weight = model[0].weight
    w_before = weight.detach().clone()
    loss_of(model, 0).backward()
    optimizer = AdamW([weight], lr=lr, weight_decay=decay)
    project_updates(optimizer, {weight: v})
    optimizer.step()
    # Adam's first step is the sign of the gradient, up to its eps.
    free = -lr * (weight.grad / (weight.grad.abs() + 1e-8) + decay * w_before)
    torch.testing.assert_close(weight.detach() - w_before, free @ v @ v.T)
    delta = weight.detach() - w_before
    assert torch.linalg.matrix_rank(delta, rtol=1e-9) == RANK


def test_a_full_basis_changes_nothing_and_a_parameter_without_one_is_free():
    for attach in (project_gradients, project_updates):
        plain, worn = small_model(), small_model()
        optimizers = [adamw(list(m.parameters())) for m in (plain, worn)]
        attach(optimizers[1], {worn[0].weight: basis(k=N_COLS)})
        for model, optimizer in zip((plain, worn), optimizers, strict=True):
            train(model, optimizer, range(5))
        for a, b in zip(plain.parameters(), worn.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_several_matrices_keep_their_own_subspaces():
    model = small_model()
    first, last = model[0].weight, model[2].weight
    starts = [w.detach().clone() for w in (first, last)]
    bases = {first: basis(), last: basis(k=2, n=N_ROWS, seed=9)}
    optimizer = adamw(list(model.parameters()))
    project_updates(optimizer, bases)
    train(model, optimizer, range(5))
    for weight, start in zip((first, last), starts, strict=True):
        delta = weight.detach() - start
        assert projection.leaked_energy(delta, bases[weight]) < 1e-25


def test_the_two_forms_can_be_worn_together():
    def both(optimizer: Optimizer, bases: dict[Tensor, Tensor]) -> None:
        project_gradients(optimizer, bases)
        project_updates(optimizer, bases)

    assert leak_after(both, adamw) < 1e-25


@pytest.mark.parametrize("attach", [project_gradients, project_updates])
def test_removing_the_handle_frees_the_optimizer(attach: Callable):
    plain, worn = small_model(), small_model()
    optimizer = adamw(list(worn.parameters()))
    handle = attach(optimizer, {worn[0].weight: basis()})
    handle.remove()
    handle.remove()
    train(worn, optimizer, range(3))
    train(plain, adamw(list(plain.parameters())), range(3))
    assert torch.equal(plain[0].weight, worn[0].weight)


@pytest.mark.parametrize("attach", [project_gradients, project_updates])
def test_gradient_accumulation_projects_the_sum_once(attach: Callable):
    whole, split = small_model(), small_model()
    for model, parts in ((whole, [slice(None)]), (split, [slice(0, 3), slice(3, 8)])):
        optimizer = adamw(list(model.parameters()))
        attach(optimizer, {model[0].weight: basis()})
        for step in range(5):
            optimizer.zero_grad()
            for rows in parts:
                loss_of(model, step, rows).backward()
            optimizer.step()
    torch.testing.assert_close(whole[0].weight, split[0].weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("attach", [project_gradients, project_updates])
def test_a_run_resumed_from_its_state_dict_is_the_straight_run(attach: Callable):
    straight = small_model(torch.float32)
    optimizer = adamw(list(straight.parameters()))
    attach(optimizer, {straight[0].weight: basis()})
    train(straight, optimizer, range(4))
    stored = io.BytesIO()
    torch.save([straight.state_dict(), optimizer.state_dict()], stored)
    train(straight, optimizer, range(4, 9))

    stored.seek(0)
    weights, moments = torch.load(stored, weights_only=True)
    resumed = small_model(torch.float32, seed=3)
    resumed.load_state_dict(weights)
    optimizer = adamw(list(resumed.parameters()))
    attach(optimizer, {resumed[0].weight: basis()})
    optimizer.load_state_dict(moments)
    train(resumed, optimizer, range(4, 9))
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("attach", [project_gradients, project_updates])
def test_the_wrapper_of_accelerate_wears_it_too(attach: Callable):
    from accelerate import Accelerator

    bare, wrapped = small_model(), small_model()
    inner = adamw(list(bare.parameters()))
    attach(inner, {bare[0].weight: basis()})
    train(bare, inner, range(3))
    prepared, outer = Accelerator(cpu=True).prepare(
        wrapped, adamw(list(wrapped.parameters()))
    )
    attach(outer, {prepared[0].weight: basis()})
    train(prepared, outer, range(3))
    assert torch.equal(bare[0].weight, wrapped[0].weight)


class Noisy(torch.optim.AdamW):
    """A step around the parent's, which torch hooks as well: twice in all."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data += 0.01
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.data -= 0.02 * torch.arange(p.numel()).view_as(p) / p.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_around_the_parents_is_projected_whole_and_once(dtype: torch.dtype):
    model = small_model(dtype)
    weight = model[0].weight
    start = weight.detach().double()
    optimizer = Noisy([weight], 1e-2)
    handle = project_updates(optimizer, {weight: basis()})
    train(model, optimizer, range(3))
    moved = weight.detach().double() - start
    assert float(moved.norm()) > 0.05
    assert projection.leaked_energy(moved, basis()) < (
        1e-9 if dtype == torch.float32 else 0.02
    )
    if dtype == torch.bfloat16:  # nothing was counted twice
        coefficients = handle.locks[weight][1].double()
        assert torch.allclose(coefficients, moved @ basis(), atol=2e-2)


@pytest.mark.parametrize("attach", [project_gradients, project_updates])
def test_a_parameter_without_a_gradient_is_left_alone(attach: Callable):
    model = small_model()
    weight = model[0].weight
    start = weight.detach().clone()
    optimizer = adamw([weight])
    attach(optimizer, {weight: basis()})
    optimizer.step()
    assert torch.equal(weight, start)
    assert weight.grad is None


def test_half_precision_weights_are_projected_in_float32():
    model = small_model(torch.bfloat16)
    weight = model[0].weight
    optimizer = sgd([weight])
    project_gradients(optimizer, {weight: basis()})
    loss_of(model, 0).backward()
    raw = weight.grad.float()
    optimizer.step()
    v = basis().float()
    assert torch.equal(weight.grad, (raw @ v @ v.T).bfloat16())


def test_updates_are_projected_under_a_closure_and_gradients_refuse_it():
    model = small_model()
    weight = model[0].weight
    start = weight.detach().clone()
    optimizer = adamw([weight])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    handle = project_updates(optimizer, {weight: basis()})
    optimizer.step(closure)
    assert projection.leaked_energy(weight.detach() - start, basis()) < 1e-25
    handle.remove()
    project_gradients(optimizer, {weight: basis()})
    for given in ((closure,), ()):
        with pytest.raises(ValueError, match="given a closure"):
            optimizer.step(*given, **({} if given else {"closure": closure}))


# leaked_energy and random_subspace.


def test_leaked_energy_of_planted_updates():
    v = basis()
    rng = torch.Generator().manual_seed(1)
    inside = torch.randn(N_ROWS, RANK, generator=rng, dtype=torch.float64) @ v.T
    other = torch.randn(N_ROWS, N_COLS, generator=rng, dtype=torch.float64)
    outside = other - other @ v @ v.T
    inside, outside = inside / inside.norm(), outside / outside.norm()
    assert projection.leaked_energy(inside, v) < 1e-30
    assert projection.leaked_energy(outside, v) == pytest.approx(1.0, abs=1e-15)
    for share in (0.068, 1e-6, 1e-14):
        delta = (1 - share) ** 0.5 * inside + share**0.5 * outside
        assert projection.leaked_energy(delta, v) == pytest.approx(share, rel=1e-6)
        rotation = torch.linalg.qr(other[:RANK, :RANK]).Q
        for scale in (1e-200, 1e200):
            assert projection.leaked_energy(
                scale * delta, v @ rotation
            ) == pytest.approx(share, rel=1e-6)


def test_the_span_counts_not_how_exactly_it_was_stored():
    rng = torch.Generator().manual_seed(1)
    inside = torch.randn(N_ROWS, RANK, generator=rng, dtype=torch.float64) @ basis().T
    assert projection.leaked_energy(inside, (1 + 3e-5) * basis()) < 1e-28
    assert projection.leaked_energy(inside, basis().float()) < 1e-13


def test_leaked_energy_of_noise_is_the_share_of_dimensions():
    rng = torch.Generator().manual_seed(2)
    noise = torch.randn(400, 40, generator=rng)
    v = basis(k=8, n=40).float()
    assert projection.leaked_energy(noise, v) == pytest.approx(0.8, abs=0.02)


def test_random_subspaces_are_orthonormal_reproducible_and_uniform():
    v = basis()
    torch.testing.assert_close(v.T @ v, torch.eye(RANK, dtype=torch.float64))
    assert v.dtype == torch.float64
    assert torch.equal(v, basis())
    assert not torch.equal(v, basis(seed=6))
    rng = torch.Generator().manual_seed(0)
    draws = [projection.random_subspace(6, 2, rng) for _ in range(2000)]
    mean = sum(d @ d.T for d in draws) / len(draws)
    torch.testing.assert_close(
        mean, torch.eye(6, dtype=torch.float64) / 3, rtol=0, atol=0.03
    )


# Bad input: one clear line.


def refused(bases_of: Callable[[nn.Sequential], dict], message: str) -> None:
    model = small_model()
    for attach in (project_gradients, project_updates):
        with pytest.raises(ValueError, match=message) as caught:
            attach(adamw([model[0].weight, model[0].bias]), bases_of(model))
        assert "\n" not in str(caught.value)


def test_bad_bases_are_refused():
    nan = basis()
    nan[0, 0] = torch.nan
    refused(lambda m: {}, "bases are empty")
    refused(lambda m: {m[0].bias: basis(k=1, n=N_ROWS)}, r"shape \(12,\)")
    refused(lambda m: {m[2].weight: basis(n=N_ROWS)}, "not the optimizer's")
    refused(lambda m: {m[0].weight: basis(n=N_ROWS)}, "expected 10 rows")
    refused(lambda m: {m[0].weight: basis().T}, "expected 10 rows")
    refused(lambda m: {m[0].weight: 2 * basis()}, "off orthonormal")
    refused(lambda m: {m[0].weight: torch.eye(10)[:, [0, 0]]}, "off orthonormal")
    refused(lambda m: {m[0].weight: torch.randn(10, 11)}, "off orthonormal")
    refused(lambda m: {m[0].weight: nan}, "1 NaN")
    refused(lambda m: {m[0].weight: basis()[:, 0]}, "expected two dimensions")


def test_bad_updates_and_dimensions_are_refused():
    with pytest.raises(ValueError, match="delta is zero"):
        projection.leaked_energy(torch.zeros(N_ROWS, N_COLS), basis())
    with pytest.raises(ValueError, match="NaN"):
        projection.leaked_energy(torch.full((2, N_COLS), torch.nan), basis())
    with pytest.raises(ValueError, match="expected 7 rows"):
        projection.leaked_energy(torch.ones(2, 7), basis())
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k = {k}"):
            projection.random_subspace(5, k, torch.Generator())

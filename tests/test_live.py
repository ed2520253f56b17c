"""Cheap diagnostics against the full SVD, planted answers, and what is kept."""

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from opd_geometry.geometry import live, spectra, updates
from opd_geometry.geometry.bits import stored_difference, to_bfloat16
from opd_geometry.geometry.live import Start, leading_right, movement, watched


def decaying(n_rows: int, n_cols: int, seed: int = 0, rate: float = 0.8) -> Tensor:
    """A matrix with singular values rate^i."""
    rng = torch.Generator().manual_seed(seed)
    k = min(n_rows, n_cols)
    u = torch.linalg.qr(torch.randn(n_rows, k, generator=rng, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n_cols, k, generator=rng, dtype=torch.float64)).Q
    return (u * rate ** torch.arange(k)) @ v.T


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32), (5, 1)])
def test_movement_equals_the_full_diagnostics(shape: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(1)
    w_before = torch.randn(shape, generator=rng)
    w = w_before + 0.01 * decaying(*shape).float()
    k = min(4, *shape)
    moved = movement(w_before, w, k)
    delta = w.double() - w_before.double()
    assert moved.stable_rank == pytest.approx(spectra.stable_rank(delta), rel=1e-6)
    assert moved.frobenius_norm == pytest.approx(float(delta.norm()), rel=1e-9)
    assert moved.sparsity == updates.update_sparsity(w_before, w)
    seen = stored_difference(w_before, w)
    assert not moved.stored
    assert moved.frobenius_norm_bf16 == pytest.approx(float(seen.norm()), rel=1e-9)
    assert moved.stable_rank_bf16 == pytest.approx(spectra.stable_rank(seen), rel=1e-6)
    both = movement(to_bfloat16(w_before), to_bfloat16(w).float(), k)
    assert both.stored
    assert both.stable_rank == both.stable_rank_bf16
    assert both.stable_rank == pytest.approx(spectra.stable_rank(seen), rel=1e-6)
    assert moved.right is not None
    exact = spectra.top_right_subspace(delta, k)
    assert spectra.subspace_similarity(moved.right, exact) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("shape", [(80, 60), (60, 80)])
def test_iteration_beyond_the_exact_side(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "EXACT_SIDE", 10)
    delta = decaying(*shape)
    state = torch.random.get_rng_state()
    s, right = leading_right(delta, 8)
    assert live.largest_value(delta) == pytest.approx(1.0, rel=1e-5)
    assert torch.equal(torch.random.get_rng_state(), state)
    expected = 0.8 ** torch.arange(8)
    torch.testing.assert_close(s, expected.float(), rtol=1e-5, atol=0)
    exact = spectra.top_right_subspace(delta, 8)
    assert spectra.subspace_similarity(right, exact) == pytest.approx(1, abs=1e-6)
    again, _ = leading_right(delta, 8)
    assert torch.equal(again, s)


def test_a_scale_changes_the_norm_alone() -> None:
    w_before, delta = torch.zeros(20, 16), decaying(20, 16).float()
    one, tiny = (movement(w_before, scale * delta, 3) for scale in (1.0, 1e-18))
    assert tiny.stable_rank == pytest.approx(one.stable_rank, rel=1e-6)
    assert tiny.frobenius_norm == pytest.approx(1e-18 * one.frobenius_norm, rel=1e-6)


def test_what_has_no_value_is_nan_and_no_error() -> None:
    w = torch.ones(6, 4)
    still = movement(w, w, 2)
    assert still.frobenius_norm == 0.0
    assert still.sparsity == 1.0
    assert still.stable_rank != still.stable_rank
    assert still.right is None
    assert still.frobenius_norm_bf16 == 0.0
    unseen = movement(w, w + 1e-6, 2)
    assert unseen.frobenius_norm_bf16 == 0.0
    assert unseen.stable_rank_bf16 != unseen.stable_rank_bf16
    thin = movement(w, w + torch.eye(6, 1), 2)  # one direction only
    assert thin.stable_rank == pytest.approx(1.0)
    assert thin.right is None
    for bad in (torch.nan, torch.inf):
        broken = w.clone()
        broken[0, 0] = bad
        assert movement(w, broken, 2).right is None


def test_signed_zeros_are_one_value() -> None:
    zeros = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    assert movement(zeros, torch.tensor([[-0.0, 1.0], [1.0, 1.5]]), 1).sparsity == 0.75


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: movement(torch.ones(2, 3), torch.ones(3, 2), 1), "same shape"),
        (lambda: movement(torch.ones(2, 3), torch.ones(2, 3), 3), "k = 3"),
    ],
)
def test_bad_arguments(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


def test_w0_is_kept_in_bf16_where_nothing_is_lost() -> None:
    fine = torch.tensor([[1.0, 1.0 + 2.0**-20]])
    coarse = torch.tensor([[1.0, 1.5]])
    half = torch.tensor([[1.0, 1.5]], dtype=torch.bfloat16)
    tensors = {"q_proj.weight": fine, "k_proj.weight": coarse, "v_proj.weight": half}
    start = Start(watched(tensors, {}))
    kept = [w.dtype for w in start.weights.values()]
    assert sorted(map(str, kept)) == ["torch.bfloat16"] * 2 + ["torch.float32"]
    assert torch.equal(start.weights["q_proj.weight"], fine)
    fine += 1  # a copy, not the live tensor
    assert not torch.equal(start.weights["q_proj.weight"], fine)


def test_w0_of_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    w = torch.randn(4, 4)
    save_file({"q_proj.weight": w}, path)
    live_now = {"q_proj.weight": w + 1}
    start = Start(watched(live_now, {}), path)
    assert torch.equal(start.weights["q_proj.weight"], w)
    Start(watched({"q_proj.weight": w}, {})).check(start.fingerprint(), "")
    with pytest.raises(ValueError, match=r"is not the one that .* give the right one"):
        Start(watched(live_now, {})).check(start.fingerprint(), "give the right one")
    with pytest.raises(ValueError, match=r"has \(4, 4\) where the model has q_proj"):
        Start(watched({"q_proj.weight": torch.ones(4, 5)}, {}), path)
    with pytest.raises(ValueError, match="has no matrix where the model has k_proj"):
        Start(watched({"k_proj.weight": w}, {}), path)


def test_fused_and_stacked_weights_are_watched_apart() -> None:
    config = {"num_attention_heads": 2, "head_dim": 2, "num_key_value_heads": 1}
    tensors = {
        "layers.0.qkv_proj.weight": torch.arange(24.0).reshape(8, 3),
        "layers.0.mlp.experts.down_proj": torch.ones(2, 3, 5),
        "layers.0.norm.weight": torch.ones(3),
    }
    found = watched(tensors, config, roles=None)
    roles = [m.role for m, _ in found.values()]
    assert sorted(roles) == ["expert_down", "expert_down", "k", "q", "v"]
    _, k = found["layers.0.k_proj.weight"]
    assert torch.equal(k, tensors["layers.0.qkv_proj.weight"][4:6])
    k += 1  # a view: what training does is seen
    assert tensors["layers.0.qkv_proj.weight"][4, 0] == 13.0


def test_layers_are_thinned_evenly() -> None:
    tensors = {f"layers.{i}.q_proj.weight": torch.ones(2, 2) for i in range(12)}
    tensors["lm_head.weight"] = torch.ones(2, 2)
    found = watched(tensors, {}, roles=None, max_layers=3)
    assert [m.layer for m, _ in found.values()] == [0, 6, 11, -1]


def test_sharded_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="spread over processes"):
        watched({"q_proj.weight": torch.empty(0)}, {})


def test_float64_is_rounded_to_bf16_once() -> None:
    """Against exact halves and a rounding of rationals; torch rounds twice."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2000, generator=generator, dtype=torch.float64)
    short = drawn.float().bfloat16().double()
    halves = short + 2.0 ** (torch.frexp(short).exponent - 9).double()
    nudged = torch.cat([halves * (1 + s * 2.0**-45) for s in (-1, 0, 1)])
    scales = 2.0 ** torch.randint(-130, 120, nudged.shape, generator=generator)
    w = torch.cat([drawn, nudged, nudged * scales.double()])
    found = to_bfloat16(w)
    for value, rounded in zip(w.tolist(), found.double().tolist(), strict=True):
        here = torch.tensor([value]).bfloat16().view(torch.int16).item()
        near = [
            torch.tensor([(here + i + 2**15) % 2**16 - 2**15], dtype=torch.int16)
            .view(torch.bfloat16)
            .item()
            for i in (-1, 0, 1)
        ]
        assert abs(Fraction(rounded) - Fraction(value)) == min(
            abs(Fraction(n) - Fraction(value)) for n in near if math.isfinite(n)
        )
    assert (found != w.bfloat16()).sum() > 100  # what torch gets wrong
    odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e300, -1e-300, math.nan])
    for value in odd.double():
        same = to_bfloat16(value), value.bfloat16()
        assert torch.equal(*same) or same[0].isnan()


def test_draws_leave_the_generators_of_all_devices_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also those of accelerators, which ``torch.manual_seed`` would set."""
    told: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", told.append)
    before = torch.get_rng_state()
    delta = torch.randn(600, 600, generator=torch.Generator().manual_seed(1))
    one, other = (live.leading_right(delta, 4) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert told == []

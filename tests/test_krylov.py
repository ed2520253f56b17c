"""The iteration's numbers against a full SVD, within the errors that it states."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from opd_geometry.geometry import bits, gram, krylov, pairs, spectra
from opd_geometry.geometry.comparison import Settings, difference

K = 16
SHAPES = ((400, 400), (300, 600), (600, 300))


def update(kind: str, shape: tuple[int, int], seed: int) -> Tensor:
    """Noise, a few directions in noise, a power law, or rows that differ in scale."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sides: int) -> Tensor:
        return torch.randn(*sides, generator=generator, dtype=torch.float64)

    m = min(shape)
    if kind == "noise":
        return draw(*shape)
    if kind == "planted":
        return draw(*shape) + 4 * draw(shape[0], 40) @ draw(40, shape[1])
    if kind == "rows":
        return draw(*shape) * draw(shape[0], 1).abs()
    left, right = (torch.linalg.qr(draw(side, m)).Q for side in shape)
    return (left * torch.arange(1, m + 1).double() ** -0.5) @ right.T


@pytest.fixture(params=["noise", "planted", "rows", "power"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def about(w: Tensor, after: Tensor, steps: int = krylov.STEPS) -> krylov.Spread:
    norm = bits.difference_norm(w, after)
    return krylov.spread(w, after, norm, K, min(w.shape) // 8, steps)


@pytest.mark.parametrize("shape", SHAPES)
def test_stated_bounds_hold_against_an_svd(kind: str, shape: tuple[int, int]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    after = (w + 1e-3 * update(kind, shape, 0)).float()
    found = about(w, after)
    _, s, vh = torch.linalg.svd(difference(w, after), full_matrices=False)
    squares = s.square() / s.square().sum()
    rank, share = 1 / float(squares[0]), float(squares[:K].sum())
    assert abs(found.stable_rank - rank) <= found.stable_rank_error
    assert abs(found.top_share - share) <= found.top_share_error
    assert found.stable_rank_error < 0.1 * rank
    assert found.top_share_error < 0.03
    assert found.right is not None
    assert found.right.shape == (shape[1], K)
    angles = spectra.principal_angles_deg(found.right, vh[:K].T)
    assert float(angles.max()) <= found.subspace_error_deg


def test_hill_lies_within_its_standard_errors(kind: str) -> None:
    """Over twelve updates: the distances in errors are of order one, no bias."""
    distances, relative = [], []
    for seed in range(4):
        for shape in SHAPES:
            w = torch.zeros(shape, dtype=torch.float64)
            after = update(kind, shape, seed)
            found = about(w, after)
            s = torch.linalg.svdvals(after)
            exact = spectra.hill_exponent(s, min(shape) // 8)
            distances.append((found.hill_alpha - exact) / found.hill_alpha_error)
            relative.append(abs(found.hill_alpha / exact - 1))
    assert torch.tensor(distances).square().mean().sqrt() < 2.5, distances
    assert max(relative) < 0.2, relative


def test_more_steps_come_nearer() -> None:
    w, after = torch.zeros(400, 400), update("noise", (400, 400), 0)
    exact = 1 / float((torch.linalg.svdvals(after)[0] / after.norm()) ** 2)
    errors = [about(w, after, steps).stable_rank - exact for steps in (2, 5, 12)]
    assert errors[0] > 10 * errors[1] > 0
    assert abs(errors[2]) < 1e-3


def test_few_directions_are_exact_and_end_the_iteration() -> None:
    g = torch.Generator().manual_seed(0)
    low = torch.randn(300, 8, generator=g) @ torch.randn(8, 500, generator=g)
    found = about(torch.zeros(300, 500), low)
    s = torch.linalg.svdvals(low.double())
    assert found.stable_rank == pytest.approx(float(s.square().sum() / s[0] ** 2), 1e-5)
    assert found.top_share == pytest.approx(1.0, abs=1e-5)
    # There are eight directions, so no sixteen, and no tail of 37 values.
    assert found.right is None
    assert math.isnan(found.hill_alpha)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e15])
def test_scale_changes_nothing(scale: float) -> None:
    w = torch.zeros(300, 300, dtype=torch.float64)
    after = update("planted", (300, 300), 0)
    given = after.clone()
    one, other = about(w, after), about(w, after * scale)
    assert torch.equal(after, given)
    assert one.stable_rank == pytest.approx(other.stable_rank, 1e-5)
    assert one.hill_alpha == pytest.approx(other.hill_alpha, 1e-3)


def test_chunks_give_what_a_kept_update_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger updates are made again at every product."""
    for shape in SHAPES:
        w = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        after = (w.double() + 1e-2 * update("planted", shape, 0)).bfloat16()
        kept = about(w, after)
        with monkeypatch.context() as patch:
            patch.setattr(krylov, "KEPT_ENTRIES", 0)
            again = about(w, after)
        assert again.stable_rank == pytest.approx(kept.stable_rank, 1e-6)
        assert again.hill_alpha == pytest.approx(kept.hill_alpha, 1e-4)
        assert again.right is not None
        assert kept.right is not None
        assert spectra.subspace_similarity(again.right, kept.right) > 1 - 1e-6


def test_the_middle_tier_of_a_pair() -> None:
    w = torch.randn(300, 400, generator=torch.Generator().manual_seed(2))
    after = (w + 1e-3 * update("planted", (300, 400), 3)).float()
    exact = pairs.measure_tensors(w, after, null=False)
    middle = pairs.measure_tensors(w, after, metrics=["middle"], iterated=True)
    for name in pairs.CHEAP:
        assert middle[name] == exact[name]
    for name in pairs.OF_UPDATE:
        error = middle[f"{name}_error"]
        assert abs(middle[name] - exact[name]) <= (4 if "hill" in name else 1) * error
        assert math.isnan(exact[f"{name}_error"])
    still = pairs.measure_tensors(w, w, metrics=["middle"], iterated=True)
    assert still["frobenius_norm"] == 0.0
    assert math.isnan(still["stable_rank"])


def test_a_trajectory_iterated_and_exact() -> None:
    w = torch.zeros(300, 400)
    whole = update("power", (300, 400), 0)
    later = {1: whole * 0.5, 2: whole + 0.01 * update("power", (300, 400), 1)}
    settings = Settings()
    exact = pairs.follow_tensors(w, later.__getitem__, [1, 2], K, settings)
    found = pairs.follow_tensors(
        w, later.__getitem__, [1, 2], K, settings, iterated=True
    )
    for a, b in zip(exact, found, strict=True):
        assert b["stable_rank"] == pytest.approx(a["stable_rank"], 1e-4)
        assert b["similarity_to_end"] == pytest.approx(a["similarity_to_end"], abs=1e-3)
        assert b["subspace_error_deg"] < 90.0


def test_large_models_get_the_middle_tier_if_none_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate("ab"):
        w = torch.randn(40, 30, generator=torch.Generator().manual_seed(seed))
        file = tmp_path / f"{name}.safetensors"
        save_file({"model.layers.0.mlp.up_proj.weight": w}, file)
    files = (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    plan = pairs.plan_pair(*files, metrics=None)
    assert not plan.iterated
    assert plan.tasks[0].metrics == tuple(pairs.METRICS)
    monkeypatch.setattr(pairs, "LARGE", 40 * 30)
    plan = pairs.plan_pair(*files, metrics=None)
    assert plan.iterated
    assert {*plan.tasks[0].metrics} == {*pairs.GROUPS["middle"]}
    row = pairs.run_plan(plan).iloc[0]
    assert row["stable_rank_error"] > 0
    named = pairs.plan_trajectory(files[0], files[1:], steps=[1], iterated=None)
    assert named.iterated


def test_a_spread_refuses_what_it_cannot_do() -> None:
    w = torch.zeros(30, 40)
    with pytest.raises(ValueError, match="same shape"):
        krylov.spread(w, w.T, 1.0, 4, 4)
    with pytest.raises(ValueError, match="from 1 to 30"):
        krylov.spread(w, w + 1, 1.0, 31, 4)


def test_small_matrices_have_no_hill_but_a_rank() -> None:
    """Too few nodes: said by NaN and not by a guess."""
    after = update("noise", (20, 24), 0)
    found = krylov.spread(torch.zeros(20, 24), after, float(after.norm()), 4, 2)
    s = gram.leading_values(after, 4)
    rank = float(after.square().sum() / s[0] ** 2)
    assert abs(found.stable_rank - rank) <= found.stable_rank_error
    assert math.isnan(found.hill_alpha)

"""Weights before an update: what moves an entry, and which weights there are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from opd_geometry.analysis.unplaced import origins as og
from opd_geometry.analysis.unplaced.origins import Origin

ROOT = Path(__file__).resolve().parents[1]
STUDENT = ROOT / "data" / "checkpoints" / "laptop-sft-s0"


def origin_of(w: torch.Tensor, **more: float) -> Origin:
    return Origin("w", "q", 0, w.bfloat16().float(), **more)


def mixed(seed: int, n: int = 64) -> torch.Tensor:
    """Entries of all sizes, zeros and powers of two among them."""
    w = torch.randn(n, n, generator=torch.Generator().manual_seed(seed)) * 0.02
    w[0] = 0.0
    w[1] = 2.0 ** -torch.arange(n).clamp(max=30).float()
    return w


@pytest.mark.parametrize("on_grid", [True, False])
def test_an_entry_changes_at_its_critical_scale_and_not_before(on_grid: bool) -> None:
    origin = origin_of(mixed(0))
    if not on_grid:
        origin = og.off_grid(origin, np.random.default_rng(1))
    direction = og.drawn("Gaussian", origin.w.shape, np.random.default_rng(2))
    critical = torch.from_numpy(origin.critical(direction)).reshape(direction.shape)
    before = origin.w.bfloat16()
    w, d, c = (x.double() for x in (origin.w, direction, critical))
    for factor, changed in ((0.99, False), (1.01, True)):
        after = (w + factor * c * d).bfloat16()
        rows = slice(0 if on_grid else 2, None)  # off it, a zero may have either sign
        share = (after != before)[rows].double().mean()
        # torch rounds to bf16 by way of float32, which moves what lies at a border
        assert abs(float(share) - changed) <= (0.0 if on_grid else 0.002)


def test_the_scale_at_a_density_changes_so_many_entries() -> None:
    origin = origin_of(mixed(3))
    direction = og.drawn("Laplace", origin.w.shape, np.random.default_rng(4))
    critical = origin.critical(direction)
    for density, scale in zip(
        (0.2, 0.7), og.scales_at(critical, [0.2, 0.7]), strict=True
    ):
        after = (origin.w.double() + 1.0000001 * scale * direction).bfloat16()
        share = (after != origin.w.bfloat16()).double().mean()
        assert share == pytest.approx(density, abs=2 / critical.size)


@pytest.mark.parametrize("density", [0.0, 1.0, -0.1, 92.73, float("nan")])
def test_a_density_that_is_no_share_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match="divide per cent by 100"):
        og.scales_at(np.float32([1, 2]), [density])


def test_more_entries_than_the_update_moves_are_refused() -> None:
    with pytest.raises(ValueError, match=r"moves only 0\.5 of the entries"):
        og.scales_at(np.float32([1, np.inf, 2, np.inf]), [0.9])


def test_off_the_grid_rounds_back_and_fills_the_cells() -> None:
    origin = origin_of(torch.full((64, 64), 1.5))
    moved = og.off_grid(origin, np.random.default_rng(0)).w
    assert torch.equal(moved.bfloat16(), origin.w.bfloat16())
    place = (moved - 1.5) * 2**8  # half a step is 2^-8
    assert place.abs().max() <= 1
    assert float(place.mean()) == pytest.approx(0, abs=0.05)
    assert float(place.square().mean()) == pytest.approx(1 / 3, rel=0.05)


@pytest.mark.parametrize("law", og.LAWS)
def test_laws_have_mean_0_and_variance_1(law: str) -> None:
    z = og.drawn(law, (400, 400), np.random.default_rng(5))
    assert float(z.mean()) == pytest.approx(0, abs=0.01)
    # the fourth moment of Student's t with 3 degrees of freedom is infinite
    assert float(z.square().mean()) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("kind", og.SYNTHETIC)
def test_synthetic_weights_are_on_the_grid_and_repeat(kind: str) -> None:
    one, again = (og.synthetic(kind, 1, {"q": (32, 64)})[0].w for _ in range(2))
    assert torch.equal(one, again)
    assert torch.equal(one, one.bfloat16().float())
    assert float(one.std()) == pytest.approx(og.SPREAD, rel=0.02)


def test_weights_and_updates_of_one_seed_are_independent() -> None:
    (origin,) = og.synthetic("Gaussian", 0, {"q": (64, 64)})
    for seed in (0, (0, 0), (0, 7), (0, 1)):
        z = og.drawn("Gaussian", (64, 64), np.random.default_rng(seed))
        pair = torch.stack([origin.w.ravel(), z.ravel()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.1


def test_unknown_laws_and_weights_name_the_known() -> None:
    with pytest.raises(ValueError, match="Gaussian, Laplace"):
        og.drawn("Cauchy", (2, 2), np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"Weibull, 0\.8"):
        og.synthetic("real", 0)


def test_zeros_and_ties_are_counted() -> None:
    found = og.peculiar([origin_of(torch.tensor([[0.0, 1.0], [-1.0, 2.0]]))])
    assert found == {"matrices": 1, "entries": 4, "zero_frac": 0.25, "distinct": 3.0}


def test_masks_are_exact_where_all_weights_are_tied() -> None:
    origin = origin_of(torch.ones(10, 20))
    assert origin.low.sum() == origin.principal().sum() == 60


def test_three_layers_of_the_students_checkpoint() -> None:
    found = og.three_layers(STUDENT)
    layers = sorted({origin.layer for origin in found})
    assert len(found) == len(layers) * len(og.ROLES)
    assert {origin.role for origin in found} == set(og.ROLES)


def test_a_path_that_does_not_exist_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match="does not exist"):
        og.stored("no/such/model/here")


def test_a_model_without_matrices_and_one_with_nan_are_refused(tmp_path: Path) -> None:
    save_file({"embed.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has no q, k, v"):
        og.stored(tmp_path)
    with pytest.raises(ValueError, match="has no q, k, v"):
        og.three_layers(tmp_path)
    w = torch.ones(8, 8)
    w[0, 0] = torch.nan
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({name: w}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="NaN"):
        og.stored(tmp_path)
    with pytest.raises(ValueError, match="it has layers"):
        og.stored(tmp_path, layers=[5])

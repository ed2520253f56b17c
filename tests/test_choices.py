import math

import pytest
import torch
from torch import Tensor

from opd_geometry.experiments.choices import choices, gates, tails, unchanged_share
from opd_geometry.geometry import spectra, updates

N = 64


def gaussian(seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(N, N, generator=generator, dtype=torch.float64)


BEFORE = (gaussian(0) / 8).bfloat16().double()
AFTER = BEFORE + gaussian(1, 1e-3)


def test_defaults_agree_with_the_diagnostics_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Varied back to its default, each choice gives the diagnostic's own value."""
    from opd_geometry.experiments import choices as module

    monkeypatch.setattr(module, "ETAS", {"own": 1e-3})
    monkeypatch.setattr(module, "ANGLE_RANKS", {"own": 8})
    monkeypatch.setattr(module, "MASK_RANKS", {"own": 64})
    monkeypatch.setattr(module, "MASK_SHARES", {"own": 0.5})
    monkeypatch.setattr(module, "HILL_RANKS", {"own": 8})
    values = choices(BEFORE, AFTER)
    left, right = spectra.subspace_angles_deg(BEFORE, AFTER, 8)
    visible = updates.visible_update(BEFORE, AFTER)
    principal = updates.principal_mask(BEFORE, 1)
    delta = spectra.singular_values(AFTER - BEFORE)
    expected = {
        "sparsity@eta=own": updates.update_sparsity(BEFORE, AFTER),
        "angle_left_mean_deg@k=own": float(left.mean()),
        "angle_right_mean_deg@k=own": float(right.mean()),
        "principal_overlap@r=own": updates.mask_overlap(principal, visible),
        "principal_overlap@alpha=own": updates.mask_overlap(principal, visible),
        "low_magnitude_overlap@alpha=own": updates.mask_overlap(
            updates.low_magnitude_mask(BEFORE), visible
        ),
        "hill_alpha@k=own": spectra.hill_exponent(delta, 8),
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected)


def test_an_update_of_low_rank_has_no_tail_of_rounding() -> None:
    before = BEFORE.float()
    low = (gaussian(2)[:, :3] @ gaussian(3)[:3] * 1e-3).float()
    found = tails(before, before + low)
    assert found
    assert {n for n, v in found.items() if v == v} == {"hill_alpha@k=n/32"}
    assert all(v == v for v in tails(before, before + AFTER.float()).values())


def test_tolerance_and_dtype_of_a_planted_update() -> None:
    before = torch.tensor([[1.0, 1.0, 1e-3, 0.0]])
    after = before + torch.tensor([[5e-4, 5e-3, 5e-6, 5e-6]])

    def share(dtype: torch.dtype, eta: float, tolerance: float) -> float:
        return unchanged_share(before, after, dtype, eta, tolerance)

    # bf16 near 1 has steps of 2^-7 (2^-8 below): 5e-3 shows, 5e-4 does not;
    # near 1e-3 they are 2^-17: 5e-6 shows
    assert share(torch.bfloat16, 1e-3, 0.0) == 1 / 4
    assert share(torch.bfloat16, 0.0, 1e-5) == 3 / 4
    assert share(torch.float32, 1e-3, 0.0) == 1 / 4
    assert share(torch.float32, 0.0, 0.0) == 0.0
    assert share(torch.float32, 1e-2, 0.0) == 3 / 4
    assert share(torch.float16, 0.0, 0.0) == 0.0  # its steps near 1 are 2^-10


def test_sparsity_rises_with_the_tolerance() -> None:
    values = choices(BEFORE, AFTER)
    small, large = values["sparsity@eta=1e-4"], values["sparsity@eta=1e-2"]
    assert small <= updates.update_sparsity(BEFORE, AFTER) < large
    assert values["sparsity@dtype=fp32"] < values["sparsity@dtype=fp16"] < small


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_bounds_hold(scale: float, seed: int) -> None:
    before, after = gaussian(seed), gaussian(seed) + gaussian(seed + 9, scale)
    bounds = gates(before, after)
    left, right = spectra.subspace_angles_deg(before, after, 8)
    assert (
        max(float(left.max()), float(right.max())) <= bounds["bound_angle_deg"] + 1e-9
    )
    shift = spectra.normalised_spectral_shift(
        spectra.singular_values(before), spectra.singular_values(after)
    )
    assert shift <= bounds["bound_nss"]
    assert 0.0 < bounds["gap_share"] < math.inf


def test_mirskys_bound_is_reached_by_growth_alone() -> None:
    bounds = gates(BEFORE, 1.01 * BEFORE)
    assert bounds["bound_nss"] == pytest.approx(0.01)


def test_half_a_unit_in_the_last_place_decides_what_shows() -> None:
    """On the bf16 grid, what moves by less than half a unit does not show."""
    bounds = gates(BEFORE, AFTER)
    density = float(updates.visible_update(BEFORE, AFTER).double().mean())
    assert bounds["bound_density"] == pytest.approx(density, abs=2e-3)


def test_what_never_moved_has_no_choices() -> None:
    assert choices(BEFORE, BEFORE.clone()) == {}


def test_invisible_update_has_no_overlap() -> None:
    values = choices(BEFORE, BEFORE * (1 + 1e-6))
    assert math.isnan(values["principal_overlap@r=n/16"])
    assert values["sparsity@eta=1e-4"] == 1.0
    assert values["sparsity@dtype=fp32"] == 1.0

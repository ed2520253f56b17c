import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from opd_geometry.geometry import bits, comparison, locking, nulls, spectra, updates
from opd_geometry.geometry.spectra import default_rank

SHAPES = [(48, 48), (80, 48), (48, 300), (300, 401), (1, 7), (7, 1), (1, 1)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def weights(*shape: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(0.02 * rng.standard_t(5, shape)).bfloat16().float()


# ------------------------------------------------------------------ shuffled


def test_shuffled_keeps_every_entry_and_no_place():
    delta = gaussian(60, 50)
    keep = delta.clone()
    other = nulls.shuffled(delta, generator(1))
    assert torch.equal(delta, keep)
    assert torch.equal(other.flatten().sort().values, delta.flatten().sort().values)
    assert int((other == delta).sum()) < 10
    assert torch.equal(other, nulls.shuffled(delta, generator(1)))
    first, second = (nulls.shuffled(delta, g) for g in [generator(2)] * 2)
    assert not torch.equal(first, second)


def test_every_place_is_as_likely():
    counts = np.zeros((2, 3))
    stream = generator(5)
    for _ in range(3000):
        counts += nulls.shuffled(torch.tensor([[1, 0, 0], [0, 0, 0]]), stream).numpy()
    assert scipy.stats.chisquare(counts.reshape(-1)).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("held", [None, torch.float32, torch.float64])
def test_a_stored_difference_is_refused_whatever_holds_it(dtype, held):
    w = weights(64, 64)
    after = (w + 1e-3 * gaussian(64, 64)).to(dtype)
    after = after if held is None else after.to(held)
    assert nulls.is_stored_difference(after)
    with pytest.raises(ValueError, match="use the closed form") as error:
        nulls.update_of(w, after)
    assert "\n" not in str(error.value)


def test_a_float32_update_is_exact():
    w = weights(64, 64)
    after = w + 1e-4 * gaussian(64, 64).float()
    assert not nulls.is_stored_difference(after)
    assert torch.equal(nulls.update_of(w.bfloat16(), after), after.double() - w)
    one = w.clone()  # a single entry off the grid is enough
    one[63, 63] += 1e-6
    assert not nulls.is_stored_difference(one)


def test_why_a_stored_difference_must_not_be_shuffled():
    """Its sizes belong to their places: shuffled it changes the share of entries."""
    w = weights(300, 300)
    after = (w + 6e-5 * gaussian(300, 300).float()).bfloat16().float()
    delta = after - w
    own = updates.update_sparsity(w, after)
    moved = updates.update_sparsity(w, w + nulls.shuffled(delta, generator()))
    assert moved - own > 0.05


# ------------------------------------------------------------------ turned


@pytest.mark.parametrize("shape", SHAPES)
def test_turned_keeps_singular_values(shape):
    delta = gaussian(*shape) * 1e-9
    other = nulls.turned(delta, generator(1))
    assert other.shape == delta.shape
    own, found = torch.linalg.svdvals(delta), torch.linalg.svdvals(other)
    assert float((own - found).abs().max()) < 3e-6 * float(own[0])
    assert torch.equal(other, nulls.turned(delta, generator(1)))
    size = float(torch.linalg.vector_norm(delta))
    assert float(torch.linalg.vector_norm(other)) == pytest.approx(size, rel=1e-12)


@pytest.mark.parametrize("shape", [(40, 40), (120, 40), (40, 120)])
def test_turned_directions_are_uniform(shape):
    """Squared entries of a uniform direction in n dimensions: Beta(1/2, (n - 1)/2)."""
    delta = torch.zeros(shape, dtype=torch.float64)
    delta[3, 5] = 1.0  # u = e_3, v = e_5
    stream = generator(7)
    drawn = [nulls.turned(delta, stream) for _ in range(400)]
    for along in (0, 1):  # the squares along one row, or one column
        n = shape[along]
        norms = [d.square().sum(1 - along) for d in drawn]
        for place in (0, n // 2, n - 1):
            squares = np.array([float(norm[place]) for norm in norms])
            law = scipy.stats.beta(0.5, (n - 1) / 2)
            assert scipy.stats.kstest(squares, law.cdf).pvalue > 1e-3
    signs = [float(torch.sign(d[0, 0])) for d in drawn]
    assert abs(np.mean(signs)) < 0.2


def test_rotations_are_those_that_the_committed_controls_drew():
    found = nulls.turned(torch.eye(2, 3), generator(0))
    expected = [[0.5382, -0.7847, -0.3076], [0.0240, -0.3506, 0.9362]]
    torch.testing.assert_close(
        found, torch.tensor(expected).double(), rtol=0, atol=1e-4
    )


def test_every_entry_of_a_uniform_rotation_is_as_it_should_be():
    n, stream = 4, generator(11)
    drawn = np.stack([nulls.turned(torch.eye(n), stream) for _ in range(1500)])
    assert np.abs(drawn @ drawn.transpose(0, 2, 1) - np.eye(n)).max() < 1e-5
    law = scipy.stats.beta(0.5, (n - 1) / 2)
    for i in range(n):
        for j in range(n):
            entries = drawn[:, i, j]
            assert abs(np.mean(entries > 0) - 0.5) < 0.06, (i, j)
            assert scipy.stats.kstest(entries**2, law.cdf).pvalue > 1e-4, (i, j)
    assert abs(np.mean(np.linalg.det(drawn) > 0) - 0.5) < 0.06


@pytest.mark.parametrize("n", [257, 320])  # the first, a prime; many factors
@pytest.mark.parametrize("axis", [0, 1])
def test_rotations_by_transforms_look_uniform(n, axis):
    """Whatever is turned: a unit vector, a constant one, a wave, its own transform."""
    stream = generator(5)
    law = scipy.stats.beta(0.5, (n - 1) / 2)
    wave = np.cos(np.pi * (np.arange(n) + 0.5) * 3 / n)
    started = [np.eye(n)[0], np.eye(n)[n // 2], np.ones(n), wave]
    for start in started:
        x = torch.from_numpy(start / np.linalg.norm(start)).float()
        x = x[:, None] if axis == 0 else x[None]
        many = [nulls._transformed(x.clone(), stream).reshape(-1) for _ in range(200)]
        drawn = np.stack(many)
        assert np.abs(np.linalg.norm(drawn, axis=1) - 1).max() < 1e-5
        for place in (0, 1, n // 3, n - 1):
            assert scipy.stats.kstest(drawn[:, place] ** 2, law.cdf).pvalue > 1e-4
        assert scipy.stats.kstest(drawn[::20].reshape(-1) ** 2, law.cdf).pvalue > 1e-4
        assert abs(np.mean(drawn > 0) - 0.5) < 0.01


def test_transforms_turn_subspaces_as_uniform_rotations_do():
    """Angles, spectral shift and Sim_K of turned sums, by either kind of rotation."""
    n, k = 96, 12
    w = 0.02 * gaussian(n, n)
    delta = 1e-3 * gaussian(n, 6, seed=1) @ gaussian(6, n, seed=2)
    run = {t: delta + 2e-3 * t * gaussian(n, n, seed=3) for t in (0.1, 0.4, 1.0)}
    u, s, _ = torch.linalg.svd(w)
    found = {}
    for side in (0, n):
        drawn = []
        for seed in range(24):
            after = w + nulls.turned(delta, generator(seed), side)
            u_after, s_after, _ = torch.linalg.svd(after)
            angles = spectra.angles_between_deg(u[:, :k], u_after[:, :k])
            shift = spectra.normalised_spectral_shift(s, s_after)
            sums = locking.Increments((n, n), generator(seed), False, side)
            changes = locking.increments(run).items()
            parts = {t: locking.decomposed(sums.add(d)) for t, d in changes}
            end = locking.top_right(parts[1.0], k)
            early = locking.similarities(parts, end, k)[0.1]
            drawn.append((float(angles.mean()), shift, early))
        found[side] = np.array(drawn)
    for uniform, other in zip(found[n].T, found[0].T, strict=True):
        assert scipy.stats.ks_2samp(uniform, other).pvalue > 1e-3


def test_second_direction_is_uniform_beside_the_first():
    n, stream = 12, generator(3)
    delta = torch.diag(torch.tensor([2.0, 1.0] + [0.0] * (n - 2), dtype=torch.float64))
    products = []
    for _ in range(400):
        u, _, vh = torch.linalg.svd(nulls.turned(delta, stream))
        for column in (u[:, 1], vh[1]):
            products.append(float(column[0] ** 2))
    law = scipy.stats.beta(0.5, (n - 1) / 2)
    assert scipy.stats.kstest(np.array(products), law.cdf).pvalue > 1e-3


def test_turned_forgets_where_the_update_was():
    w = weights(128, 128).double()
    u, s, vh = torch.linalg.svd(w)
    inside = 1e-2 * (u[:, :16] * s[:16]) @ vh[:16]
    v = vh[:16].T
    assert nulls.energy_share(inside, v) == pytest.approx(1.0)
    shares = [
        nulls.energy_share(nulls.turned(inside, generator(seed)), v)
        for seed in range(20)
    ]
    assert np.mean(shares) == pytest.approx(16 / 128, abs=0.02)


def test_nothing_to_turn():
    with pytest.raises(ValueError, match="delta is zero"):
        nulls.turned(torch.zeros(3, 3), generator())
    with pytest.raises(ValueError, match="4 NaN"):
        nulls.turned(torch.full((2, 2), math.nan), generator())


# ------------------------------------------------------------------ energy


@pytest.mark.parametrize(("side", "n"), [("left", 60), ("right", 40)])
def test_energy_by_hand_and_by_chance(side, n):
    delta = gaussian(60, 40)
    basis = torch.linalg.qr(gaussian(n, 10, seed=3)).Q
    rows = delta if side == "right" else delta.T
    outside = rows - rows @ basis @ basis.T
    expected = 1 - float(outside.square().sum() / delta.square().sum())
    assert nulls.energy_share(delta, basis, side) == pytest.approx(expected)
    assert expected == pytest.approx(10 / n, abs=0.05)
    everything = torch.eye(n, dtype=torch.float64)
    assert nulls.energy_share(delta, everything, side) == pytest.approx(1.0)


def test_planted_energy_is_found():
    """A tenth of the energy in ten directions, the rest of it unplaced."""
    basis = torch.linalg.qr(gaussian(400, 10, seed=1)).Q
    noise, planted = gaussian(300, 400, seed=2), gaussian(300, 10, seed=3) @ basis.T
    noise, planted = (x / torch.linalg.vector_norm(x) for x in (noise, planted))
    share = nulls.energy_share(0.9**0.5 * noise + 0.1**0.5 * planted, basis)
    assert share == pytest.approx(0.1 + 0.9 * 10 / 400, abs=0.005)


def test_energy_in_a_mask():
    delta = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    mask = torch.tensor([[True, True], [False, False]])
    assert nulls.energy_in_mask(delta, mask) == pytest.approx(9 / 25)
    assert nulls.energy_in_mask(delta, ~mask) == pytest.approx(16 / 25)
    with pytest.raises(ValueError, match="same shape"):
        nulls.energy_in_mask(delta, mask[:1])


def test_covariance_directions_are_those_of_the_activations():
    x = gaussian(500, 20) * torch.linspace(3.0, 0.1, 20, dtype=torch.float64)
    basis = nulls.covariance_basis(x.T @ x / 500, 4)
    _, _, vh = torch.linalg.svd(x, full_matrices=False)
    assert spectra.subspace_similarity(basis, vh[:4].T) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="not symmetric"):
        nulls.covariance_basis(gaussian(4, 4), 2)
    with pytest.raises(ValueError, match="not symmetric"):
        nulls.covariance_basis(gaussian(4, 5), 2)


def test_bases_of_the_other_side_and_unknown_sides():
    with pytest.raises(ValueError, match="other side"):
        nulls.energy_share(gaussian(6, 4), torch.eye(6, 2), "right")
    with pytest.raises(ValueError, match="left or right"):
        nulls.energy_share(gaussian(6, 4), torch.eye(6, 2), "top")


# ------------------------------------------------------------------ placement


def both_masks(w: Tensor) -> dict[str, Tensor]:
    rank = default_rank(w.shape, 64)
    return {
        "principal": updates.principal_mask(w, rank, 0.3),
        "low": updates.low_magnitude_mask(w, 0.3),
    }


@pytest.mark.parametrize("density", [0.05, 0.2776, 0.9273])
@pytest.mark.parametrize("grid", [True, False])
def test_stretched_update_shows_that_density(density, grid):
    w = weights(200, 150) + (0.0 if grid else 1e-5 * gaussian(200, 150).float())
    delta = 1e-7 * gaussian(200, 150, seed=4)
    found = nulls.at_density(w, delta, density)
    count = round(density * w.numel())
    assert int(found.visible.sum()) == count
    nudge = 1 + 1e-9  # the mask holds just beyond the factor
    seen = updates.visible_update(w, w.double() + nudge * found.factor * delta)
    # float64 reaches bf16 through float32, whose rounding moves a border entry or two.
    assert int((seen != found.visible).sum()) <= (0 if grid else 3)


def test_thresholds_are_where_bf16_changes():
    w = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, -0.0, 3e-3]).bfloat16()
    delta = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 0.0]).double()
    found = nulls.visibility_thresholds(w, delta).tolist()
    half = 2.0**-134
    assert found == [2**-8, 2**-9, 2**-9, 2**-8, half, half, math.inf]


def test_placement_of_an_unplaced_update_is_its_permutations():
    w = weights(256, 256)
    masks = both_masks(w)
    found = nulls.placement(w, 1e-6 * gaussian(256, 256), masks, 0.4628, generator())
    for name in masks:
        assert found[name] == pytest.approx(found[f"shuffled_{name}"], abs=0.01)
        assert found[f"free_{name}"] == pytest.approx(0.3, abs=0.01)


def test_placement_sees_a_planted_place():
    w = weights(256, 256)
    masks = both_masks(w)
    gain = torch.where(masks["principal"], 2.0, 1.0)
    delta = 1e-6 * gain * gaussian(256, 256)
    found = nulls.placement(w, delta, masks, 0.4628, generator())
    assert found["principal"] - found["shuffled_principal"] > 0.05
    assert found["free_principal"] > 0.4
    proportional = 1e-6 * w.double().abs() * gaussian(256, 256)
    found = nulls.placement(w, proportional, masks, 0.4628, generator())
    assert found["shuffled_low"] - found["low"] > 0.1
    assert found["free_low"] < 0.1


def test_size_exponent_is_found_within_its_error():
    w = weights(300, 300).double()
    for b in (0.0, 0.2, 1.0):
        delta = w.abs() ** b * gaussian(300, 300, seed=8)
        slope, error = nulls.size_exponent(w, delta)
        assert abs(slope - b) < 4 * error
        assert error < 0.01
    x, y = w.abs().log().flatten(), delta.abs().log().flatten()
    kept = torch.isfinite(x) & torch.isfinite(y)
    fitted = scipy.stats.linregress(x[kept].numpy(), y[kept].numpy())
    assert (slope, error) == pytest.approx((fitted.slope, fitted.stderr))


def test_placement_refuses_what_it_cannot_do():
    w, delta = weights(8, 8), torch.zeros(8, 8)
    delta[0, :4] = 1e-3
    with pytest.raises(ValueError, match="4 that are not zero"):
        nulls.at_density(w, delta, 0.5)
    for density in (0.0, 1.0, math.nan, 46.28):
        with pytest.raises(ValueError, match="above 0 and below 1"):
            nulls.at_density(w, delta, density)
    with pytest.raises(ValueError, match="different sizes"):
        nulls.size_exponent(torch.ones(4, 4), gaussian(4, 4))
    with pytest.raises(ValueError, match="different sizes"):
        nulls.size_exponent(torch.zeros(4, 4), gaussian(4, 4))


# ------------------------------------------------------------------ readout


def test_reading_bf16_makes_rank():
    """A low-rank update that is small against W_0's steps gains rank when stored."""
    w = weights(256, 256)
    u, v = (torch.linalg.qr(gaussian(256, 8, seed=s)).Q for s in (1, 2))
    delta = u @ v.T
    found = {}
    for density in (0.1, 0.9):
        stretched = nulls.at_density(w, delta, density).factor * delta
        found[density] = comparison.stored_spread(w, w.double() + stretched, 32)
    assert found[0.1]["stable_rank_bf16"] > 2.5 * found[0.9]["stable_rank_bf16"]
    after = w.double() + stretched
    stored = bits.to_bfloat16(after).double() - w.double()
    assert found[0.9]["stable_rank_bf16"] == pytest.approx(spectra.stable_rank(stored))
    assert found[0.9]["frobenius_norm_bf16"] == pytest.approx(
        spectra.frobenius_norm(stored)
    )
    assert found[0.9]["hill_alpha_bf16"] == pytest.approx(
        spectra.hill_exponent(torch.linalg.svdvals(stored), 32)
    )


def test_an_invisible_update_has_no_bf16_readout():
    w = weights(32, 32).double()
    found = comparison.stored_spread(w, w + 1e-12 * gaussian(32, 32), 4)
    assert found == {"frobenius_norm_bf16": 0.0}

import math

import numpy as np
import pytest
import scipy.integrate
import torch
from torch import Tensor

from opd_geometry.geometry import unplaced, updates
from opd_geometry.geometry.spectra import default_rank
from opd_geometry.geometry.unplaced import magnitudes

LAWS = ["gaussian", "laplace", "uniform", "t3", "t5"]
KINDS = ["gaussian", "weibull", "t5", "rows"]
SHAPE = (256, 320)


def weights(kind: str, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    drawn = {
        "gaussian": rng.standard_normal(SHAPE),
        "weibull": rng.weibull(0.8, SHAPE) * rng.choice([-1, 1], SHAPE),
        "t5": rng.standard_t(5, SHAPE),
        "rows": rng.standard_normal(SHAPE) * np.exp(rng.standard_normal((SHAPE[0], 1))),
    }[kind]
    return torch.from_numpy(0.02 * drawn).float()


def simulated(w: Tensor, scale: float, law: str, draws: int = 6, seed: int = 17):
    """The visible masks of some draws: additions and casts, no formula."""
    rng = np.random.default_rng(seed)
    return [
        updates.visible_update(w, w.double() + unplaced.draw(w.shape, scale, rng, law))
        for _ in range(draws)
    ]


def sure(found: float, expected: float, n: float) -> bool:
    """Within 4.5 standard deviations of a share of n entries."""
    deviation = math.sqrt(max(expected * (1 - expected), 0.01) / n)
    return abs(found - expected) < 4.5 * deviation


# ------------------------------------------------------------------ laws


@pytest.mark.parametrize("name", [*LAWS, "sign", "t2.5"])
def test_laws_have_variance_one_and_their_integral(name):
    law = unplaced.law_of(name)
    for x in (0.0, 0.3, 0.99, 2.0, 7.0):
        area, _ = scipy.integrate.quad(
            lambda y: float(law.survival(np.array(y))), 0, x, points=[min(1.0, x)]
        )
        assert float(law.integral(np.array(x))) == pytest.approx(area, abs=2e-9)
    # Var X = 4 int_0^inf x S(x) dx
    end = 1.0 if name == "sign" else np.inf
    moment, _ = scipy.integrate.quad(
        lambda y: y * float(law.survival(np.array(y))), 0, end, limit=500
    )
    assert 4 * moment == pytest.approx(1.0, rel=2e-2 if name == "t2.5" else 1e-5)
    if name != "t2.5":
        drawn = law.draw(np.random.default_rng(0), (200_000,))
        assert float(np.mean(drawn > 0.7)) == pytest.approx(
            float(law.survival(np.array(0.7))), abs=5e-3
        )


def test_far_tails_do_not_overflow():
    for name in LAWS:
        law = unplaced.law_of(name)
        far = np.array([1e30, 1e200, np.inf])
        with np.errstate(over="ignore", invalid="raise"):
            assert np.all(law.survival(far) < 1e-60)
            assert np.all(np.isfinite(law.integral(far)))


@pytest.mark.parametrize("name", ["cauchy", "t2", "t", "tinf", "", "tnan", "3"])
def test_unknown_law_is_named(name):
    with pytest.raises(ValueError, match="unknown law"):
        unplaced.law_of(name)


# ------------------------------------------------------------------ one entry


def every_bf16() -> Tensor:
    return torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def test_cells_are_those_of_rounding_itself():
    """Just inside the cell a number rounds to w, just outside it does not."""
    w = every_bf16()
    low, high = unplaced._borders(np.arange(0x7F80))
    for border, inside in ((low, np.inf), (high, -np.inf)):
        within = torch.from_numpy(np.nextafter(border, inside))
        beyond = torch.from_numpy(np.nextafter(border, -inside))
        # float64 to bf16 goes through float32, which must not round to the border.
        narrow = within.float().double() == within
        assert not narrow.any()
        for step, same in ((within, True), (beyond, False)):
            toward = inside if same else -inside
            close = np.nextafter(
                step.float().numpy(), np.float32(toward), dtype=np.float32
            )
            kept = torch.from_numpy(close).bfloat16() == w
            # below the smallest float32 numbers there is no room between them
            assert bool((kept == same)[2:-1].all())


def test_a_step_of_one_size_is_seen_as_the_learning_rate_rule_says():
    """arXiv:2602.03839: seen above |w| / 256, for certain; below |w| / 512 never."""
    w = every_bf16()[0x0100:-256]  # without subnormal numbers
    for i in range(0, len(w), 501):
        one = w[i : i + 1]
        size = float(one)
        assert float(unplaced.change_probability(one, size / 255.9, "sign")) == 1.0
        assert float(unplaced.change_probability(one, size / 513.0, "sign")) == 0.0
    below = torch.tensor([1.0])  # half a step is 2^-9 below a power of two, 2^-8 above
    assert float(unplaced.change_probability(below, 0.9 * 2**-8, "sign")) == 0.5


@pytest.mark.parametrize("law", [*LAWS, "sign"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_entry_changes_as_often_as_it_says(law, dtype):
    rng = np.random.default_rng(3)
    values = [1.0, -0.5, 0.7123, 3e-3, -1.0040, 0.0, 1.00390625, 1.9999]
    for value in values:
        w = torch.tensor([value]).to(dtype)
        for scale in (1e-3, 4e-3):
            chance = float(unplaced.change_probability(w, scale, law))
            many = w.expand(20_000)
            after = many.double() + unplaced.draw(many.shape, scale, rng, law)
            share = float(updates.visible_update(many, after).double().mean())
            assert share == pytest.approx(chance, abs=0.016), (value, scale)


def test_chances_by_key_are_those_of_the_entries():
    for dtype in (torch.bfloat16, torch.float16):  # all of their numbers are keys
        w = weights("t5").to(dtype)
        w[0, :5] = 0.0
        w[1, 0], w[1, 1] = -0.0, 1.0
        found = magnitudes(w)
        assert found.n == w.numel()
        assert found.n_zero >= 6
        for law in LAWS:
            mean = float(unplaced.change_probability(w, 3e-5, law).mean())
            assert unplaced.expected_density(found, 3e-5, law) == pytest.approx(
                mean, abs=1e-12
            )


def test_borders_of_two_cells_change_half_the_time_and_are_counted():
    w = torch.tensor([1.0 + 2.0**-8, 1.0, 1.0 + 2.0**-7 + 2.0**-8])
    found = magnitudes(w)
    assert found.n_on_border == 2
    expected = unplaced.change_probability(w, 1e-6)
    assert expected.tolist() == pytest.approx([0.5, 0.0, 0.5])
    assert unplaced.expected_density(found, 1e-6) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="2 lie between two bf16 numbers"):
        unplaced.scale_at_density(found, 0.3)


# ------------------------------------------------------------------ whole matrices


@pytest.mark.parametrize(
    ("dtype", "kind", "law"),
    [
        *((torch.bfloat16, kind, law) for kind in KINDS for law in LAWS),
        (torch.float32, "gaussian", "gaussian"),
        (torch.float32, "weibull", "laplace"),
        (torch.float32, "rows", "uniform"),
        (torch.float32, "t5", "t3"),
    ],
)
def test_closed_form_is_what_drawn_updates_give(dtype, kind, law):
    w = weights(kind).to(dtype)
    found = magnitudes(w)
    principal = updates.principal_mask(w, default_rank(SHAPE, 64), 0.3)
    low = updates.low_magnitude_mask(w, 0.3)
    inside = magnitudes(w, principal)
    # Off the grid it is mostly the same entries that change in every draw.
    n = w.numel() * (3 if dtype == torch.bfloat16 else 1)
    for density in (0.05, 0.2776, 0.4628, 0.9273):
        scale = unplaced.scale_at_density(found, density, law)
        assert unplaced.expected_density(found, scale, law) == pytest.approx(density)
        assert unplaced.expected_sparsity(found, scale, law) == pytest.approx(
            1 - density
        )
        masks = simulated(w, scale, law, 3)
        share = float(np.mean([m.double().mean() for m in masks]))
        assert sure(share, density, n)
        for mask, expected in (
            (low, unplaced.expected_low_magnitude_overlap(found, scale, 0.3, law)),
            (principal, unplaced.expected_overlap(inside, found, scale, law)),
        ):
            overlap = np.mean([updates.mask_overlap(mask, m) for m in masks])
            assert sure(float(overlap), expected, n * density)
        a, b = masks[:2]
        jaccard = float((a & b).sum()) / float((a | b).sum())
        expected = unplaced.expected_jaccard(found, scale, law=law)
        assert jaccard == pytest.approx(expected, abs=1.5e-2)
        assert expected >= density / (2 - density)


def test_jaccard_of_two_densities_and_laws():
    w = weights("t5").bfloat16()
    found = magnitudes(w)
    one, two = (unplaced.scale_at_density(found, d) for d in (0.3, 0.6))
    a = simulated(w, one, "gaussian", 1, 5)[0]
    b = simulated(w, two, "laplace", 1, 6)[0]
    expected = unplaced.expected_jaccard(found, one, two, "gaussian", "laplace")
    jaccard = float((a & b).sum()) / float((a | b).sum())
    assert jaccard == pytest.approx(expected, abs=1e-2)
    assert expected == pytest.approx(
        unplaced.expected_jaccard(found, two, one, "laplace", "gaussian")
    )


def test_signs_transposes_and_units_do_not_matter():
    w = weights("weibull").bfloat16()
    found = magnitudes(w)
    for other in (-w, w.T, w.float(), w.double()):
        same = magnitudes(other)
        assert np.array_equal(same.keys, found.keys)
        assert np.array_equal(same.counts, found.counts)
    scale = unplaced.scale_at_density(found, 0.4)
    assert unplaced.scale_at_density(magnitudes(w * 16), 0.4) == pytest.approx(
        16 * scale
    )
    assert on_grid(found) == 1.0
    assert on_grid(magnitudes(weights("weibull"))) < 1e-3


def on_grid(found):
    whole = found.keys % (2 * unplaced.SUBCELLS) == 0
    return found.counts[whole].sum() / found.n


def test_ties_share_the_mask_exactly():
    w = torch.tensor([[0.5, 0.5, 0.5, 0.25], [1.0, 0.5, 0.5, 2.0]]).bfloat16()
    found = magnitudes(w)
    low = unplaced.smallest(found, 0.5)
    assert low.n == 4
    assert low.counts.tolist() == [1, 3, 0, 0]
    visible = unplaced.change_probability(w, 1e-3)
    mask = updates.low_magnitude_mask(w, 0.5)
    assert unplaced.expected_low_magnitude_overlap(found, 1e-3, 0.5) == pytest.approx(
        float(visible[mask].sum() / visible.sum())
    )


def test_pooled_matrices_are_one_larger_matrix():
    a, b = weights("t5").bfloat16(), weights("gaussian", 1)
    both = unplaced.pooled([magnitudes(a), magnitudes(b)])
    whole = magnitudes(torch.cat([a.float(), b]))
    assert np.array_equal(both.keys, whole.keys)
    assert np.array_equal(both.counts, whole.counts)


def test_partly_on_the_grid():
    """A matrix of which half was trained in float32 since it was stored in bf16."""
    w = weights("t5")
    w[:128] = w[:128].bfloat16().float()
    found = magnitudes(w)
    assert 0.49 < on_grid(found) < 0.51
    scale = unplaced.scale_at_density(found, 0.2)
    masks = simulated(w, scale, "gaussian", 4)
    assert sure(float(np.mean([m.double().mean() for m in masks])), 0.2, 4 * w.numel())


# ------------------------------------------------------------------ refusals


def test_zeros_are_counted_and_change_with_anything():
    w = weights("gaussian").bfloat16()
    w[:26] = 0.0
    found = magnitudes(w)
    share = found.n_zero / found.n
    assert share >= 0.1
    assert unplaced.expected_density(found, 1e-12) == pytest.approx(share)
    with pytest.raises(ValueError, match=rf"{found.n_zero} of {found.n} entries are"):
        unplaced.scale_at_density(found, 0.05)
    scale = unplaced.scale_at_density(found, 0.3)
    after = w.double() + unplaced.draw(w.shape, scale, np.random.default_rng(9))
    density = float(updates.visible_update(w, after).double().mean())
    assert sure(density, 0.3, w.numel())


def test_all_zero_weights_have_no_scale():
    found = magnitudes(torch.zeros(4, 4))
    assert unplaced.expected_density(found, 1e-9) == 1.0
    with pytest.raises(ValueError, match="16 of 16 entries are exactly zero"):
        unplaced.scale_at_density(found, 0.5)


@pytest.mark.parametrize("density", [0.0, 1.0, -0.1, 1.5, 92.73, float("nan")])
def test_density_out_of_range(density):
    with pytest.raises(ValueError, match="above 0 and below 1") as error:
        unplaced.scale_at_density(magnitudes(weights("t5")), density)
    assert "\n" not in str(error.value)


def test_a_law_with_jumps_says_so():
    with pytest.raises(ValueError, match="it jumps from"):
        unplaced.scale_at_density(magnitudes(weights("t5").bfloat16()), 0.4628, "sign")


def test_bad_weights_masks_and_scales():
    w = weights("t5")
    for value, said in ((math.nan, "1 NaN"), (math.inf, "1 inf"), (3.4e38, "1 inf")):
        bad = w.clone()
        bad[0, 0] = value
        with pytest.raises(ValueError, match=said):
            magnitudes(bad)
    with pytest.raises(ValueError, match="1 NaN"):
        magnitudes(torch.tensor([math.nan]).bfloat16())
    with pytest.raises(ValueError, match="mask is empty"):
        magnitudes(w, torch.zeros(SHAPE, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected\s+torch.bool"):
        magnitudes(w, torch.zeros(SHAPE))
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="scale"):
            unplaced.expected_density(magnitudes(w), scale)
    with pytest.raises(ValueError, match="alpha"):
        unplaced.smallest(magnitudes(w), 0.0)
    with pytest.raises(ValueError, match="floating-point"):
        magnitudes(torch.zeros(3, dtype=torch.int8))

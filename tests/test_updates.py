import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_geometry.geometry import bits, nulls, spectra, updates

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def finite_bf16() -> Tensor:
    """Every finite bf16 number, subnormal ones and both zeros included."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16)
    return values[torch.isfinite(values)]


# ------------------------------------------------------------------ visible update


def test_every_bf16_number_is_unchanged_against_itself():
    values = finite_bf16()
    assert len(values) == 2 * (255 * 128)
    assert not bool(updates.visible_update(values, values).any())


@pytest.mark.parametrize("step", [1, 2, 127])
@pytest.mark.parametrize("eta", [0.0, 1e-3, 2**-9])
def test_every_step_to_another_bf16_number_is_visible(step, eta):
    magnitudes = finite_bf16()
    magnitudes = magnitudes[~torch.signbit(magnitudes)]  # 0 and up
    ordered = magnitudes.double().sort().values.to(torch.bfloat16)
    low, high = ordered[:-step], ordered[step:]
    for sign in (1, -1):
        assert bool(updates.visible_update(sign * low, sign * high, eta).all())
        assert bool(updates.visible_update(sign * high, sign * low, eta).all())


def test_the_sign_of_zero_is_no_change_and_the_sign_of_a_number_is():
    before = torch.tensor([0.0, -0.0, 1.0, 1e-38])
    after = torch.tensor([-0.0, 0.0, -1.0, -1e-38])
    assert updates.visible_update(before, after).tolist() == [False, False, True, True]


@settings(deadline=None, max_examples=60)
@given(
    bits=st.lists(
        st.tuples(st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1)),
        min_size=1,
        max_size=40,
    )
)
def test_default_rule_is_bitwise_comparison_up_to_signed_zero(bits):
    pairs = torch.tensor(bits, dtype=torch.int32).to(torch.int16)
    values = pairs.view(torch.bfloat16)
    keep = torch.isfinite(values).all(dim=1)
    if not bool(keep.any()):
        return
    values, pairs = values[keep], pairs[keep]
    both_zero = (pairs & 0x7FFF).sum(dim=1) == 0
    expected = (pairs[:, 0] != pairs[:, 1]) & ~both_zero
    found = updates.visible_update(values[:, 0], values[:, 1])
    assert torch.equal(found, expected)


@settings(deadline=None, max_examples=60)
@given(
    pairs=st.lists(
        st.tuples(st.integers(-300, 300), st.integers(-300, 300)), min_size=1
    ),
    eta=st.sampled_from([0.0, 2**-6, 0.25, 0.5]),
)
def test_rule_with_a_wide_tolerance_agrees_with_fractions(pairs, eta):
    # Integers up to 256 and even ones up to 512 are bf16 numbers.
    pairs = [(a - a % 2, b - b % 2) for a, b in pairs]
    before, after = torch.tensor(pairs, dtype=torch.float32).T
    tolerance = Fraction(eta)
    expected = [abs(b - a) > tolerance * max(abs(a), abs(b)) for a, b in pairs]
    assert updates.visible_update(before, after, eta).tolist() == expected


def test_both_sides_are_rounded_to_bf16_before_they_are_compared():
    ulp = 2.0**-7  # of bf16 at 1
    before = torch.tensor([1.0, 1.0, 1 + 0.49 * ulp, 3e-4])
    after = torch.tensor([1 + 0.49 * ulp, 1 + 0.51 * ulp, 1 + 0.51 * ulp, 3e-4 + 3e-6])
    # 3e-6 on a small weight shows, though an absolute 1e-5 would call it none;
    # 0.49 ulp of 1 does not show, though it is 4e-3 of the weight.
    expected = [False, True, True, True]
    assert updates.visible_update(before, after).tolist() == expected


@pytest.mark.parametrize("before", DTYPES)
@pytest.mark.parametrize("after", DTYPES)
def test_mixed_dtypes_are_compared_in_bf16(before, after):
    a = gaussian(20, 30, seed=1)
    b = a + 1e-2 * gaussian(20, 30, seed=2)
    a, b = a.to(before), b.to(after)
    expected = a.bfloat16() != b.bfloat16()
    assert torch.equal(updates.visible_update(a, b), expected)
    unchanged = float((~expected).double().mean())
    assert updates.update_sparsity(a, b) == pytest.approx(unchanged, abs=1e-15)
    assert 0 < unchanged < 1


def test_sparsity_of_known_changes_and_of_any_shape():
    before = torch.ones(4, 5)
    after = before.clone()
    after[0, :3] = 2.0
    assert updates.update_sparsity(before, after) == 17 / 20
    assert updates.update_sparsity(before, before) == 1.0
    assert updates.update_sparsity(before, -before) == 0.0
    assert updates.update_sparsity(before.T, after.T) == 17 / 20
    assert updates.update_sparsity(2**40 * before, 2**40 * after) == 17 / 20
    assert updates.update_sparsity(torch.tensor(1.0), torch.tensor(2.0)) == 0.0
    assert updates.update_sparsity(torch.ones(3), torch.tensor([1.0, 1, 2])) == 2 / 3


# --------------------------------------------------------------------------- masks


def stable_mask(score: np.ndarray, count: int) -> np.ndarray:
    """The `count` largest, ties to lower indices, by a sort that NumPy wrote."""
    order = np.argsort(-score.reshape(-1), kind="stable")
    mask = np.zeros(score.size, dtype=bool)
    mask[order[:count]] = True
    return mask.reshape(score.shape)


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    alpha=st.floats(0.01, 1.0),
)
def test_low_magnitude_mask_is_exact_under_ties(values, alpha):
    w = torch.tensor(values, dtype=torch.float32)
    found = updates.low_magnitude_mask(w, alpha)
    count = round(alpha * len(values))
    assert int(found.sum()) == count
    expected = stable_mask(-np.abs(np.array(values, dtype=float)), count)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("alpha", [0.01, 0.3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_counts_of_a_real_sized_tie(alpha, dtype):
    w = (0.02 * gaussian(96, 64)).to(dtype)
    for matrix in (w, torch.ones_like(w), torch.zeros_like(w)):
        count = round(alpha * matrix.numel())
        low = updates.low_magnitude_mask(matrix, alpha)
        principal = updates.principal_mask(matrix, 3, alpha)
        assert low.dtype == principal.dtype == torch.bool
        assert low.shape == principal.shape == w.shape
        assert int(low.sum()) == int(principal.sum()) == count


def test_masks_do_not_stop_at_sixteen_million_entries():
    w = torch.arange(2**24 + 6).remainder(97).to(torch.bfloat16)
    low = updates.low_magnitude_mask(w, 0.25)
    assert int(low.sum()) == round(0.25 * (2**24 + 6))
    assert float(w[low].max()) <= float(w[~low].min())


def test_low_magnitude_mask_ignores_sign_scale_and_order():
    w = gaussian(13, 7)
    low = updates.low_magnitude_mask(w, 0.4)
    assert float(w[low].abs().max()) < float(w[~low].abs().min())
    assert torch.equal(updates.low_magnitude_mask(-1e-6 * w, 0.4), low)
    assert torch.equal(updates.low_magnitude_mask(w.T, 0.4), low.T)


def test_principal_mask_follows_the_reconstruction_and_not_the_weights():
    # A block of weak, aligned entries carries the first direction; single strong
    # entries elsewhere do not.
    w = torch.zeros(10, 10)
    w[:6, :6] = 1.0
    w[8, 8] = w[9, 9] = 3.0
    found = updates.principal_mask(w, rank=1, alpha=0.36)
    expected = torch.zeros(10, 10, dtype=torch.bool)
    expected[:6, :6] = True
    assert torch.equal(found, expected)
    # At full rank the reconstruction is the matrix, whose largest come first.
    top = updates.principal_mask(w, rank=10, alpha=0.02)
    assert top.nonzero().tolist() == [[8, 8], [9, 9]]


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_principal_mask_agrees_with_numpy(shape):
    w = gaussian(*shape)
    u, s, vh = np.linalg.svd(w.numpy(), full_matrices=False)
    rebuilt = np.abs(u[:, :3] @ np.diag(s[:3]) @ vh[:3])
    found = updates.principal_mask(w, 3, 0.3)
    assert found.tolist() == stable_mask(rebuilt, round(0.3 * 108)).tolist()
    assert torch.equal(updates.principal_mask(w.T, 3, 0.3), found.T)
    assert torch.equal(updates.principal_mask(-1e5 * w, 3, 0.3), found)
    full = updates.principal_mask(w, 9, 0.3)
    assert torch.equal(full, ~updates.low_magnitude_mask(w, 1 - 32 / 108))


# ------------------------------------------------------------------------- overlap


def test_overlap_by_hand():
    mask = torch.tensor([[True, True], [False, False]])
    update = torch.tensor([[True, False], [True, True]])
    assert updates.mask_overlap(mask, update) == 1 / 3
    assert updates.mask_overlap(update, mask) == 1 / 2
    assert updates.mask_overlap(mask, mask) == 1.0
    assert updates.mask_overlap(mask, ~mask) == 0.0
    # The mask and its complement share the update out.
    assert updates.mask_overlap(~mask, update) == pytest.approx(2 / 3)


@pytest.mark.parametrize("alpha", [0.3, 0.5])
def test_overlap_of_an_update_at_random_places_is_alpha(alpha):
    w = gaussian(300, 200)
    places = torch.rand(300, 200, generator=generator(1)) < 0.2
    for mask in (
        updates.low_magnitude_mask(w, alpha),
        updates.principal_mask(w, 5, alpha),
    ):
        assert updates.mask_overlap(mask, places) == pytest.approx(alpha, abs=0.02)


# ---------------------------------------------------------------------------- null


def null_of(delta, stream):
    return nulls.gaussian_noise(delta.shape, spectra.frobenius_norm(delta), stream)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 5), (64,), (), (3, 4, 5)])
def test_null_has_the_shape_and_norm_of_the_update(dtype, shape):
    delta = (1e-3 * gaussian(*shape)).to(dtype)
    null = null_of(delta, generator())
    assert null.dtype == torch.float64
    assert null.shape == delta.shape
    norm = spectra.frobenius_norm(delta)
    assert spectra.frobenius_norm(null) == pytest.approx(norm, rel=1e-12)


def test_null_is_its_generators_and_not_the_updates_direction():
    delta = torch.ones(64, 64)
    null = null_of(delta, generator(3))
    assert torch.equal(null, null_of(delta, generator(3)))
    stream = generator(3)
    first, second = (null_of(delta, stream) for _ in range(2))
    assert torch.equal(first, null)
    assert not torch.equal(second, null)
    torch.testing.assert_close(null_of(5 * delta, generator(3)), 5 * null)
    assert abs(float(null.mean())) < 0.05
    assert float((null**4).mean()) == pytest.approx(3, rel=0.1)  # Gaussian kurtosis
    assert spectra.stable_rank(null) == pytest.approx(16, rel=0.2)


# -------------------------------------------------------------------------- errors

GOOD = gaussian(4, 3)
BAD = GOOD.clone()
BAD[0, 0], BAD[1, 1], BAD[2, 2] = math.nan, math.nan, -math.inf
COUNTED = "2 NaN and 1 inf in 12 entries"
MASK = torch.ones(4, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: updates.visible_update(BAD, GOOD), f"w_before holds {COUNTED}"),
        (lambda: updates.update_sparsity(GOOD, BAD), f"w_after holds {COUNTED}"),
        (lambda: updates.principal_mask(BAD, 1), f"w_before holds {COUNTED}"),
        (lambda: updates.low_magnitude_mask(BAD), f"w_before holds {COUNTED}"),
        (
            lambda: updates.visible_update(1e39 * GOOD.abs(), GOOD),
            "w_before cast to bf16 holds 0 NaN and [0-9]+ inf in 12 ",
        ),
        (
            lambda: updates.visible_update(torch.ones(1), torch.tensor([3.4e38])),
            "w_after cast to bf16 holds 0 NaN and 1 inf in 1 ",
        ),
        (
            lambda: updates.visible_update(GOOD, GOOD.T),
            r"w_before has shape \(4, 3\) and w_after \(3, 4\)",
        ),
        (
            lambda: updates.update_sparsity(torch.ones(3, 1), torch.ones(3)),
            r"w_before has shape \(3, 1\) and w_after \(3,\)",
        ),
        (lambda: updates.update_sparsity(torch.ones(0), torch.ones(0)), "is empty"),
        (lambda: updates.visible_update(MASK, MASK), "w_before is torch.bool"),
        (lambda: updates.visible_update(GOOD, GOOD, -1e-3), "eta = -0.001"),
        (lambda: updates.visible_update(GOOD, GOOD, math.nan), "eta = nan"),
        (lambda: updates.visible_update(GOOD, GOOD, 1.0), "eta = 1.0"),
        (lambda: updates.principal_mask(GOOD, 4), "rank = 4 .*from 1 to 3"),
        (lambda: updates.principal_mask(GOOD, 0), "rank = 0 .*from 1 to 3"),
        (lambda: updates.principal_mask(torch.ones(3), 1), "expected two dimensions"),
        (lambda: updates.principal_mask(GOOD, 1, 0.0), "alpha = 0.0"),
        (lambda: updates.low_magnitude_mask(GOOD, 1.5), "alpha = 1.5"),
        (lambda: updates.low_magnitude_mask(GOOD, math.nan), "alpha = nan"),
        (lambda: updates.mask_overlap(MASK, ~MASK), "changes no entry"),
        (lambda: updates.mask_overlap(MASK, GOOD), "update has dtype torch.float64"),
        (lambda: updates.mask_overlap(GOOD, MASK), "mask has dtype torch.float64"),
        (
            lambda: updates.mask_overlap(MASK, MASK.T),
            r"mask has shape \(4, 3\) and update \(3, 4\)",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------- bits and chunks


@pytest.mark.parametrize("dtype", DTYPES)
def test_counts_of_what_is_not_finite(dtype):
    w = gaussian(300, 301).to(dtype)
    assert bits.count_nonfinite(w) == (0, 0)
    w[0, 0], w[-1, -1], w[150, 7] = math.nan, math.nan, -math.inf
    assert bits.count_nonfinite(w) == (2, 1)
    assert bits.count_nonfinite(w.T) == (2, 1)


@pytest.mark.parametrize("dtypes", [(DTYPES[0], DTYPES[0]), (DTYPES[2], DTYPES[3])])
def test_norms_are_torchs(dtypes):
    before, after = gaussian(300, 301).to(dtypes[0]), gaussian(300, 301, seed=1)
    after = after.to(dtypes[1])
    expected = float((after.double() - before.double()).norm())
    assert bits.difference_norm(before, after) == pytest.approx(expected, rel=1e-12)
    size = float(before.double().norm())
    assert bits.norm(before.T) == pytest.approx(size, rel=1e-12)


def test_count_is_that_of_the_mask_over_many_chunks():
    before = gaussian(300, 301).bfloat16()
    after = before.clone()
    after[::3] *= 1.01
    before[5, 5], after[5, 5] = 0.0, -0.0
    before[6, 5], after[6, 5] = -0.0, 1e-30
    mask = updates.visible_update(before, after)
    assert torch.equal(mask, before != after)
    assert not mask[5, 5]
    assert mask[6, 5]
    assert updates.count_visible(before, after) == int(mask.sum())
    assert updates.count_visible(before.T, after.T) == int(mask.sum())
    with pytest.raises(ValueError, match="1 NaN"):
        updates.count_visible(before, after.index_fill(0, torch.tensor([9]), math.nan))


def by_sorting(w, alpha, largest):
    """The mask by a stable sort: exact counts, ties in row-major order."""
    keys = w.double().abs().reshape(-1) * (-1 if largest else 1)
    order = torch.argsort(keys, stable=True)[: round(alpha * w.numel())]
    mask = torch.zeros(w.numel(), dtype=torch.bool)
    mask[order] = True
    return mask.reshape(w.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [1e-4, 0.3, 0.5, 0.99, 1.0])
def test_masks_are_those_of_a_sort(dtype, alpha):
    w = gaussian(300, 301).to(dtype)
    w[:, ::7] = 0.5  # a run of ties
    for matrix in (w, w.T, w[3:, 1:]):
        mask = updates.low_magnitude_mask(matrix, alpha)
        assert torch.equal(mask, by_sorting(matrix, alpha, largest=False))
    left, right = gaussian(300, 2), gaussian(301, 2, seed=1)
    s = torch.tensor([2.0, 1.0], dtype=torch.float64)
    mask = updates.reconstruction_mask(left, s, right, alpha)
    assert torch.equal(mask, by_sorting((left * s) @ right.T, alpha, largest=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [1e-6, 0.3, 1.0])
def test_no_mask_of_what_is_not_finite(dtype, alpha):
    every_bit = torch.full((1,), -1, dtype=bits.BITS[dtype][0]).view(dtype)
    w = gaussian(300, 301).to(dtype)
    for bad in (torch.tensor([math.nan, math.inf, -math.inf]).to(dtype), every_bit):
        for value in bad:
            w[150, 7] = value
            with pytest.raises(
                ValueError, match=r"w_before holds \d NaN and \d inf in"
            ):
                updates.low_magnitude_mask(w, alpha)
    w[150, 7] = torch.finfo(dtype).max
    assert not updates.low_magnitude_mask(w, 0.9)[150, 7]

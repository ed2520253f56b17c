import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_geometry.geometry import spectra

SHAPES = [(12, 12), (9, 17), (17, 9), (1, 5), (5, 1), (1, 1)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthonormal(n: int, k: int, seed: int = 0) -> Tensor:
    noise = torch.randn(n, k, generator=generator(seed), dtype=torch.float64)
    return torch.linalg.qr(noise).Q


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def planted(n_rows: int, n_cols: int, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w = u diag(s) v^T with its true u and v."""
    u, v = orthonormal(n_rows, len(s), 1), orthonormal(n_cols, len(s), 2)
    return (u * s) @ v.T, u, v


def turned(n: int, angles_deg: Tensor) -> tuple[Tensor, Tensor]:
    """Two bases whose principal angles are known, in mixed coordinates."""
    k = len(angles_deg)
    q = orthonormal(n, 2 * k, 3)
    theta = torch.deg2rad(angles_deg)
    basis_b = q[:, :k] * theta.cos() + q[:, k:] * theta.sin()
    return q[:, :k] @ orthonormal(k, k, 4), basis_b @ orthonormal(k, k, 5)


# ---------------------------------------------------------------- decompositions


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64]
)
def test_svd_rebuilds_the_stored_values_in_float64(shape, dtype):
    w = gaussian(*shape).to(dtype)
    u, s, vh = spectra.svd(w)
    assert u.dtype == s.dtype == vh.dtype == torch.float64
    m = min(shape)
    assert (u.shape, s.shape, vh.shape) == ((shape[0], m), (m,), (m, shape[1]))
    torch.testing.assert_close((u * s) @ vh, w.double(), rtol=0, atol=1e-13)
    torch.testing.assert_close(s, spectra.singular_values(w), rtol=1e-12, atol=1e-14)
    expected = scipy.linalg.svdvals(w.double().numpy())
    np.testing.assert_allclose(s.numpy(), expected, rtol=1e-12)


def test_planted_spectrum_comes_back_in_descending_order():
    s = torch.tensor([1e-3, 5.0, 2.0, 0.1], dtype=torch.float64)
    w, _, _ = planted(8, 6, s)
    found = spectra.singular_values(w)
    expected = torch.cat([s.sort(descending=True).values, torch.zeros(2)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_gradients_and_inputs_are_left_alone():
    w = gaussian(5, 4).requires_grad_()
    before = w.detach().clone()
    u, s, _ = spectra.svd(w)
    spectra.top_right_subspace(w, 2)
    assert not u.requires_grad
    assert not s.requires_grad
    assert torch.equal(w, before)


@pytest.mark.parametrize(
    ("shape", "divisor", "k"),
    [
        ((4096, 4096), 8, 512),
        ((4096, 4096), 64, 64),
        ((1024, 4096), 8, 128),
        ((128, 64), 8, 8),
        ((128, 64), 64, 1),
        ((7, 100), 8, 1),
        ((1, 1), 64, 1),
    ],
)
def test_default_rank_scales_with_the_smaller_side(shape, divisor, k):
    assert spectra.default_rank(shape, divisor) == k
    assert spectra.default_rank(shape[::-1], divisor) == k


# ------------------------------------------------------------------------- angles


def test_planted_angles_from_1e_10_to_90_degrees():
    angles = torch.tensor(
        [1e-10, 1e-7, 1e-4, 0.4, 10.0, 44.999, 45.001, 80.0, 89.999999, 90.0],
        dtype=torch.float64,
    )
    found = spectra.principal_angles_deg(*turned(40, angles))
    torch.testing.assert_close(found, angles, rtol=1e-7, atol=1e-13)


def test_angles_below_the_reach_of_the_cosine():
    angles = torch.tensor([2e-9, 3e-8, 4e-7], dtype=torch.float64)
    found = spectra.principal_angles_deg(*turned(30, angles))
    torch.testing.assert_close(found, angles, rtol=1e-5, atol=1e-13)


def test_angles_beyond_the_reach_of_the_sine():
    short_of_90 = torch.tensor([3e-6, 2e-7, 1e-8], dtype=torch.float64)
    found = spectra.principal_angles_deg(*turned(30, 90 - short_of_90))
    torch.testing.assert_close(90 - found, short_of_90, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n", "k"), [(30, 1), (30, 7), (30, 20), (30, 30), (1, 1)])
def test_angles_agree_with_scipy(n, k):
    a, b = orthonormal(n, k, 1), orthonormal(n, k, 2)
    found = spectra.principal_angles_deg(a, b)
    expected = np.rad2deg(scipy.linalg.subspace_angles(a.numpy(), b.numpy()))[::-1]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-11)
    assert found.shape == (k,)
    assert bool((found[1:] >= found[:-1]).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_basis_makes_no_angle_with_itself(dtype):
    basis = orthonormal(200, 64).to(dtype)
    assert float(spectra.principal_angles_deg(basis, basis).max()) < 1e-12


def test_angles_ignore_the_coordinates_inside_and_a_common_rotation():
    a, b = turned(20, torch.tensor([1e-6, 3.0, 70.0], dtype=torch.float64))
    angles = spectra.principal_angles_deg(a, b)
    q, r = orthonormal(20, 20, 7), orthonormal(3, 3, 8)
    for other in (
        spectra.principal_angles_deg(b, a),
        spectra.principal_angles_deg(a @ r, b),
        spectra.principal_angles_deg(q @ a, q @ b),
        spectra.principal_angles_deg(a, -b),
    ):
        torch.testing.assert_close(other, angles, rtol=1e-8, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 24), share=st.floats(0.05, 1.0), seed=st.integers(0, 2**31 - 1))
def test_angles_are_those_of_the_paper_where_its_cosine_can_see(n, share, seed):
    k = max(1, int(share * n))
    a, b = orthonormal(n, k, seed), orthonormal(n, k, seed + 1)
    cosines = torch.linalg.svdvals(a.T @ b).clamp(0, 1)
    found = spectra.principal_angles_deg(a, b)
    torch.testing.assert_close(torch.deg2rad(found).cos(), cosines, rtol=0, atol=1e-12)
    assert bool(((found >= 0) & (found <= 90)).all())


def test_turning_one_side_of_a_matrix_turns_that_subspace_only():
    # The plane of singular vectors 2 and 3 lies across the border of the top two.
    s = torch.tensor([5.0, 4.0, 1.0, 0.5], dtype=torch.float64)
    w_before, u, v = planted(10, 8, s)
    theta = math.radians(0.3)
    u_after = u.clone()
    u_after[:, 1] = math.cos(theta) * u[:, 1] + math.sin(theta) * u[:, 2]
    u_after[:, 2] = math.cos(theta) * u[:, 2] - math.sin(theta) * u[:, 1]
    w_after = (u_after * s) @ v.T
    left, right = spectra.subspace_angles_deg(w_before, w_after, 2)
    expected = torch.tensor([0.0, 0.3], dtype=torch.float64)
    torch.testing.assert_close(left, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(right, torch.zeros(2).double(), rtol=0, atol=1e-12)

    transposed = spectra.subspace_angles_deg(w_before.T, w_after.T, 2)
    torch.testing.assert_close(transposed[0], right, rtol=0, atol=1e-12)
    torch.testing.assert_close(transposed[1], left, rtol=0, atol=1e-12)
    scaled = spectra.subspace_angles_deg(1e-6 * w_before, 1e3 * w_after, 2)
    torch.testing.assert_close(scaled[0], left, rtol=0, atol=1e-12)
    within = spectra.subspace_angles_deg(w_before, w_after, 3)
    assert float(within[0].max()) < 1e-12


def test_subspace_angles_agree_with_scipy_on_unrelated_matrices():
    before, after = gaussian(12, 9, seed=1), gaussian(12, 9, seed=2)
    left, right = spectra.subspace_angles_deg(before, after, 4)
    u0, _, vh0 = np.linalg.svd(before.numpy())
    u1, _, vh1 = np.linalg.svd(after.numpy())
    for found, a, b in (
        (left, u0[:, :4], u1[:, :4]),
        (right, vh0[:4].T, vh1[:4].T),
    ):
        expected = np.rad2deg(scipy.linalg.subspace_angles(a, b))[::-1]
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_identical_matrices_give_exactly_zero_whatever_the_gap():
    w = torch.eye(16) + 1e-12  # nothing separates its singular values
    left, right = spectra.subspace_angles_deg(w, w.clone(), 5)
    assert torch.equal(left, torch.zeros(5, dtype=torch.float64))
    assert torch.equal(right, left)


def test_rotation_obeys_wedins_bound():
    w = planted(30, 20, torch.linspace(10, 1, 20, dtype=torch.float64))[0]
    delta = 1e-3 * gaussian(30, 20, seed=9)
    left, right = spectra.subspace_angles_deg(w, w + delta, 5)
    s = spectra.singular_values(w)
    # The gap to the perturbed matrix is at least the gap less ||delta||.
    size = float(spectra.singular_values(delta)[0])
    bound = math.sqrt(2) * size / (float(s[4] - s[5]) - size)
    assert 0 < float(torch.deg2rad(torch.maximum(left[-1], right[-1])).sin()) <= bound


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e-2])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_no_subspace_turns_further_than_wedin_allows(size: float, k: int):
    w = planted(30, 20, torch.linspace(10, 1, 20, dtype=torch.float64))[0]
    for seed in range(5):
        delta = size * gaussian(30, 20, seed=seed)
        left, right = spectra.subspace_angles_deg(w, w + delta, k)
        before, after = spectra.singular_values(w), spectra.singular_values(w + delta)
        norm = float(spectra.singular_values(delta)[0])
        bound = spectra.wedin_bound_deg(before, after, norm, k)
        assert max(float(left[-1]), float(right[-1])) <= bound < 90


def test_wedins_bound_is_met_by_a_turn_within_a_plane():
    # diag(3, 1) plus e (off-diagonal): the bound is tight to first order
    w, e = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)), 1e-5
    after = w + e * torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    left, _ = spectra.subspace_angles_deg(w, after, 1)
    s_before, s_after = spectra.singular_values(w), spectra.singular_values(after)
    bound = spectra.wedin_bound_deg(s_before, s_after, e, 1)
    assert bound == pytest.approx(float(left[0]), rel=1e-4)


def test_wedins_bound_says_nothing_once_the_update_fills_the_gap():
    s = torch.tensor([3.0, 2.0])
    assert spectra.wedin_bound_deg(s, s, norm=1.0, k=1) == 90.0
    with pytest.raises(ValueError, match="k"):
        spectra.wedin_bound_deg(s, s, norm=1.0, k=3)


def test_mirskys_bound_is_met_by_a_common_shift():
    s = torch.tensor([4.0, 3.0], dtype=torch.float64)
    shift = spectra.normalised_spectral_shift(s, s + 1)
    assert spectra.mirsky_bound(s, math.sqrt(2)) == pytest.approx(shift)
    with pytest.raises(ValueError, match="zero"):
        spectra.mirsky_bound(torch.zeros(2), 1.0)


@pytest.mark.parametrize(("divergence", "curvature"), [(-1.0, 1.0), (1.0, 0.0)])
def test_the_anchors_bound_needs_a_curvature(divergence: float, curvature: float):
    assert spectra.anchor_bound(0.5, 1.0) == 1.0
    with pytest.raises(ValueError, match="curvature"):
        spectra.anchor_bound(divergence, curvature)


# ------------------------------------------------------------------------ spectra


def test_spectral_shift_of_a_known_change():
    s = torch.tensor([4.0, 2.0, 1.0])
    assert spectra.normalised_spectral_shift(s, 1.25 * s) == pytest.approx(0.25)
    assert spectra.normalised_spectral_shift(s, s) == 0.0
    # ||(0, 2, 1)|| / ||(4, 2, 1)||, whatever order the values come in
    after = torch.tensor([2.0, 4.0, 4.0])
    expected = math.sqrt(5 / 21)
    assert spectra.normalised_spectral_shift(s.flip(0), after) == pytest.approx(
        expected
    )


def test_spectral_shift_ignores_rotation_and_scale_and_sees_1e_9():
    w = gaussian(14, 10)
    before = spectra.singular_values(w)
    turned_w = orthonormal(14, 14, 1) @ w @ orthonormal(10, 10, 2)
    assert (
        spectra.normalised_spectral_shift(before, spectra.singular_values(turned_w))
        < 1e-14
    )
    shift = spectra.normalised_spectral_shift(before, before * (1 + 1e-9))
    assert shift == pytest.approx(1e-9, rel=1e-5)
    for scale in (1e-300, 1e300):
        scaled = spectra.normalised_spectral_shift(before * scale, 2 * before * scale)
        assert scaled == pytest.approx(1.0)


def test_spectral_shift_obeys_mirskys_bound():
    w, delta = gaussian(15, 11, seed=1), 1e-2 * gaussian(15, 11, seed=2)
    s_before, s_after = spectra.singular_values(w), spectra.singular_values(w + delta)
    shift = spectra.normalised_spectral_shift(s_before, s_after)
    assert 0 < shift <= spectra.frobenius_norm(delta) / spectra.frobenius_norm(w)


def test_stable_rank_and_norm_of_a_planted_update():
    s = torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    delta, _, _ = planted(9, 7, s)
    assert spectra.stable_rank(delta) == pytest.approx(7 / 4, rel=1e-12)
    assert spectra.spectrum_stable_rank(s.flip(0)) == pytest.approx(7 / 4)
    assert spectra.frobenius_norm(delta) == pytest.approx(math.sqrt(7), rel=1e-12)
    assert spectra.frobenius_norm(torch.zeros(3, 2)) == 0.0
    assert spectra.frobenius_norm(torch.tensor(-3.0)) == 3.0


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_stable_rank_ignores_scale_rotation_and_transposition(scale):
    delta = gaussian(10, 6)
    expected = spectra.stable_rank(delta)
    turned_delta = orthonormal(10, 10, 1) @ delta @ orthonormal(6, 6, 2)
    assert spectra.stable_rank(scale * turned_delta) == pytest.approx(expected)
    assert spectra.stable_rank(scale * delta.T) == pytest.approx(expected)


def test_stable_rank_of_noise_is_a_quarter_of_the_width():
    assert spectra.stable_rank(gaussian(256, 256)) == pytest.approx(64, rel=0.1)


@settings(deadline=None, max_examples=25)
@given(
    n_rows=st.integers(1, 9), n_cols=st.integers(1, 9), seed=st.integers(0, 2**31 - 1)
)
def test_stable_rank_lies_between_one_and_the_rank(n_rows, n_cols, seed):
    found = spectra.stable_rank(gaussian(n_rows, n_cols, seed=seed))
    assert 1 <= found <= min(n_rows, n_cols) * (1 + 1e-12)


def test_hill_exponent_by_hand():
    s = torch.tensor([8.0, 4.0, 2.0, 1.0])
    # logs over s_4: 3, 2, 1 times log 2
    assert spectra.hill_exponent(s, 4) == pytest.approx(3 / (6 * math.log(2)))
    assert spectra.hill_exponent(s, 2) == pytest.approx(1 / math.log(2))
    assert spectra.hill_exponent(1e-250 * s.double(), 4) == pytest.approx(
        spectra.hill_exponent(s, 4)
    )


def test_hill_exponent_looks_at_the_top_k_in_any_order():
    s = torch.tensor([9.0, 5.0, 3.0, 2.0, 1.0])
    changed = torch.tensor([0.5, 3.0, 9.0, 0.1, 5.0])
    assert spectra.hill_exponent(changed, 3) == spectra.hill_exponent(s, 3)


def test_hill_exponent_of_a_power_law():
    alpha = 2.5
    ranks = torch.arange(1, 4001, dtype=torch.float64)
    found = spectra.hill_exponent(ranks ** (-1 / alpha), 2000)
    assert found == pytest.approx(alpha, rel=0.01)


# ---------------------------------------------------------------------- subspaces


def test_top_right_subspace_of_a_planted_update():
    s = torch.tensor([5.0, 3.0, 2.0, 0.1], dtype=torch.float64)
    delta, _, v = planted(11, 7, s)
    found = spectra.top_right_subspace(delta, 2)
    assert found.shape == (7, 2)
    torch.testing.assert_close(
        found @ found.T, v[:, :2] @ v[:, :2].T, rtol=0, atol=1e-13
    )
    # The rows that span it, not the columns: rotating the output changes nothing.
    turned_delta = orthonormal(11, 11, 6) @ delta
    other = spectra.top_right_subspace(turned_delta, 2)
    assert spectra.subspace_similarity(found, other) == pytest.approx(1, abs=1e-14)
    assert torch.linalg.vector_norm(delta @ found) ** 2 == pytest.approx(34)


def test_similarity_of_known_subspaces():
    eye = torch.eye(6)
    assert spectra.subspace_similarity(eye[:, :3], eye[:, 3:]) == 0.0
    assert spectra.subspace_similarity(eye[:, :3], eye[:, :3]) == 1.0
    assert spectra.subspace_similarity(eye[:, :3], eye[:, 2:5]) == pytest.approx(1 / 3)
    angles = torch.tensor([0.0, 30.0, 60.0, 90.0], dtype=torch.float64)
    # cos^2: 1, 3/4, 1/4, 0
    assert spectra.subspace_similarity(*turned(12, angles)) == pytest.approx(0.5)


def test_similarity_is_the_mean_squared_cosine_and_never_above_one():
    a, b = orthonormal(20, 5, 1), orthonormal(20, 5, 2)
    cosines = torch.deg2rad(spectra.principal_angles_deg(a, b)).cos()
    expected = pytest.approx(float(cosines.square().mean()), rel=1e-12)
    assert spectra.subspace_similarity(a, b) == expected
    assert spectra.subspace_similarity(b, a @ orthonormal(5, 5, 3)) == expected
    for seed in range(20):
        basis = orthonormal(50, 16, seed).float()
        assert 1 - 1e-12 < spectra.subspace_similarity(basis, basis) <= 1


def test_similarity_of_random_subspaces_is_k_over_n():
    found = [
        spectra.subspace_similarity(orthonormal(40, 8, i), orthonormal(40, 8, 500 + i))
        for i in range(60)
    ]
    assert sum(found) / len(found) == pytest.approx(8 / 40, rel=0.05)


# ------------------------------------------------------------------------- errors

GOOD = gaussian(4, 3)
NAN = GOOD.clone()
NAN[0, 0], NAN[1, 1], NAN[2, 2] = math.nan, math.nan, math.inf
ZERO = torch.zeros(4, 3)
RANK_ONE = torch.ones(4, 3)
COUNTED = "2 NaN and 1 inf in 12 entries"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spectra.svd(NAN), f"w holds {COUNTED}"),
        (lambda: spectra.singular_values(NAN), f"w holds {COUNTED}"),
        (lambda: spectra.stable_rank(NAN), f"delta holds {COUNTED}"),
        (lambda: spectra.frobenius_norm(NAN), f"delta holds {COUNTED}"),
        (lambda: spectra.top_right_subspace(NAN, 1), f"delta holds {COUNTED}"),
        (
            lambda: spectra.subspace_angles_deg(NAN, GOOD, 1),
            f"w_before holds {COUNTED}",
        ),
        (lambda: spectra.subspace_angles_deg(GOOD, NAN, 1), f"w_after holds {COUNTED}"),
        (
            lambda: spectra.principal_angles_deg(torch.eye(4, 3), NAN),
            f"basis_b holds {COUNTED}",
        ),
        (lambda: spectra.hill_exponent(NAN[0], 2), "s holds 1 NaN and 0 inf in 3"),
        (
            lambda: spectra.normalised_spectral_shift(GOOD[0].abs(), NAN[2]),
            "s_after holds 0 NaN and 1 inf in 3",
        ),
        (lambda: spectra.stable_rank(ZERO), "update is zero"),
        (lambda: spectra.top_right_subspace(ZERO, 1), "delta is zero"),
        (lambda: spectra.subspace_angles_deg(ZERO, ZERO, 1), "w_before is zero"),
        (lambda: spectra.subspace_angles_deg(GOOD, ZERO, 1), "w_after is zero"),
        (lambda: spectra.hill_exponent(torch.zeros(5), 2), "only 0 singular values"),
        (
            lambda: spectra.normalised_spectral_shift(torch.zeros(3), torch.ones(3)),
            "s_before is zero",
        ),
        (
            lambda: spectra.top_right_subspace(RANK_ONE, 2),
            "rank 1, expected at least k",
        ),
        (
            lambda: spectra.subspace_angles_deg(GOOD, RANK_ONE, 2),
            "w_after has numerical rank 1",
        ),
        (
            lambda: spectra.hill_exponent(spectra.singular_values(RANK_ONE), 3),
            "only 1 singular values are above rounding",
        ),
        (lambda: spectra.hill_exponent(torch.ones(5), 3), "equal, expected a decay"),
        (lambda: spectra.hill_exponent(torch.ones(5), 6), "integer from 2 to 5"),
        (lambda: spectra.hill_exponent(torch.ones(5), 1), "integer from 2 to 5"),
        (lambda: spectra.hill_exponent(-torch.ones(5), 2), "vector of singular values"),
        (lambda: spectra.hill_exponent(GOOD.abs(), 2), "vector of singular values"),
        (lambda: spectra.top_right_subspace(GOOD, 4), "k = 4 .*from 1 to 3"),
        (lambda: spectra.top_right_subspace(GOOD, 0), "k = 0 .*from 1 to 3"),
        (lambda: spectra.top_right_subspace(GOOD, True), "k = True"),
        (lambda: spectra.subspace_angles_deg(GOOD, GOOD, 4), "k = 4 .*from 1 to 3"),
        (lambda: spectra.subspace_angles_deg(GOOD, GOOD, 1.0), "k = 1.0 .*from 1 to 3"),
        (
            lambda: spectra.subspace_angles_deg(GOOD, GOOD.T, 1),
            r"w_before has shape \(4, 3\) and w_after \(3, 4\)",
        ),
        (
            lambda: spectra.principal_angles_deg(torch.eye(4, 2), torch.eye(4, 3)),
            r"basis_a has shape \(4, 2\) and basis_b \(4, 3\)",
        ),
        (
            lambda: spectra.subspace_similarity(torch.eye(4, 2), torch.eye(5, 2)),
            r"v_a has shape \(4, 2\) and v_b \(5, 2\)",
        ),
        (
            lambda: spectra.normalised_spectral_shift(torch.ones(3), torch.ones(4)),
            r"s_before has shape \(3,\) and s_after \(4,\)",
        ),
        (
            lambda: spectra.principal_angles_deg(2 * torch.eye(4, 2), torch.eye(4, 2)),
            "basis_a .*off orthonormal columns",
        ),
        (
            lambda: spectra.subspace_similarity(torch.eye(2, 4), torch.eye(2, 4)),
            "v_a .*off orthonormal columns",
        ),
        (lambda: spectra.svd(torch.ones(3)), r"w has shape \(3,\), expected two"),
        (lambda: spectra.stable_rank(torch.ones(2, 2, 2)), "expected two dimensions"),
        (lambda: spectra.svd(torch.ones(2, 2).int()), "w is torch.int32"),
        (
            lambda: spectra.svd(torch.ones(2, 2).to(torch.complex64)),
            "w is torch.complex",
        ),
        (lambda: spectra.svd([[1.0]]), "w is list"),
        (lambda: spectra.svd(torch.ones(0, 3)), "w is empty"),
        (lambda: spectra.default_rank((4, 0), 8), "at least 1"),
        (lambda: spectra.default_rank((4, 4), 0), "at least 1"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)

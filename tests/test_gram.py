import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file
from torch import Tensor

from opd_geometry import cli
from opd_geometry.geometry import gram, krylov, pairs, spectra

SHAPES = [(300, 300), (280, 420), (420, 280)]  # all above DIRECT_SIDE


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def planted(
    n_rows: int, n_cols: int, s: Tensor, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """w = u diag(s) v^T with its true u and v."""
    u = torch.linalg.qr(gaussian(n_rows, len(s), seed=seed)).Q
    v = torch.linalg.qr(gaussian(n_cols, len(s), seed=seed + 1)).Q
    return (u * s) @ v.T, u, v


# Without a GPU the path that it takes is run on the CPU: the same code, another eigh.
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_device_gives_what_lapack_gives(shape: tuple[int, int], device: str) -> None:
    w, after = gaussian(*shape), gaussian(*shape, seed=1)
    k = 20
    own, values = gram.decompose(w, k, 5), gram.leading_values(after, k)
    _, right = gram.leading_right(after, k, 4)
    bottom = gram.right_subspace(w, k)
    about = krylov.spread(w, after, float((after - w).norm()), 16, 30)
    with gram.on(device):
        found = gram.decompose(w, k, 5)
        torch.testing.assert_close(gram.leading_values(after, k)[:k], values[:k])
        other = gram.leading_right(after, k, 4)[1]
        assert largest_angle_deg(other, right) < 1e-6
        assert largest_angle_deg(gram.right_subspace(w, k), bottom) < 1e-4
        again = krylov.spread(w, after, float((after - w).norm()), 16, 30)
    assert gram.chosen_device() is None
    torch.testing.assert_close(found.spectrum, own.spectrum)
    for side in ("left", "right", "lowest_left", "lowest_right"):
        angle = largest_angle_deg(getattr(found, side), getattr(own, side))
        assert angle < 1e-5, side
    assert found.error_deg < 1e-6
    assert again.stable_rank == pytest.approx(about.stable_rank, 1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(
        {"model.layers.0.mlp.up_proj.weight": torch.ones(4, 4)},
        tmp_path / "a.safetensors",
    )
    file = str(tmp_path / "a.safetensors")
    given = [
        "measure",
        file,
        file,
        "--out",
        str(tmp_path / "t.csv"),
        "--device",
        "cuda",
    ]
    assert cli.main(given) == 1
    assert "sees no GPU, expected one; leave --device out" in capsys.readouterr().err
    assert not (tmp_path / "t.csv").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_table_on_a_gpu_is_that_of_the_cpu(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for side in ("a", "b"):
        w = torch.randn(400, 300, generator=generator)
        save_file(
            {"model.layers.0.mlp.up_proj.weight": w}, tmp_path / f"{side}.safetensors"
        )
    plan = pairs.plan_pair(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    own, there = pairs.run_plan(plan), pairs.run_plan(plan.on("cuda"))
    pd.testing.assert_frame_equal(own, there, rtol=1e-6, atol=1e-9)


def largest_angle_deg(a: Tensor, b: Tensor) -> float:
    return float(spectra.principal_angles_deg(a, b).max())


@pytest.fixture
def no_full_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("fell back to the full SVD")

    monkeypatch.setattr(gram, "_decompose_directly", refuse)
    monkeypatch.setattr(gram, "svd", refuse)


# --- all values, two subspaces ---------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.usefixtures("no_full_svd")
def test_agrees_with_scipys_svd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    w, k = gaussian(*shape).to(dtype), 35
    found = gram.decompose(w, k)
    u, s, vh = scipy.linalg.svd(w.double().numpy(), full_matrices=False)
    np.testing.assert_allclose(found.spectrum, s, rtol=0, atol=1e-12 * s[0])
    u, v = torch.from_numpy(u[:, :k].copy()), torch.from_numpy(vh[:k].T.copy())
    for ours, theirs in ((found.left, u), (found.right, v)):
        assert largest_angle_deg(ours, theirs) < 1e-8
        identity = torch.eye(k, dtype=torch.float64)
        torch.testing.assert_close(ours.T @ ours, identity, rtol=0, atol=1e-11)
    assert found.error_deg < 1e-6
    assert found.gap == pytest.approx((s[k - 1] - s[k]) / s[0])


@pytest.mark.usefixtures("no_full_svd")
def test_small_values_are_as_good_as_large_ones() -> None:
    """Squares alone would give 1e-8 s_1 in place of the smallest ones."""
    s = torch.linspace(2, 1, 300, dtype=torch.float64)
    s[-20:] = torch.logspace(-4, -12, 20, dtype=torch.float64)
    w, _, _ = planted(300, 320, s)
    found = gram.decompose(w, 10)
    torch.testing.assert_close(found.spectrum, s, rtol=0, atol=1e-13)


def test_bound_holds_and_the_svd_decides_where_it_is_too_large() -> None:
    """An outlier of 1e6: squares lose what the gap at k would need."""
    s = torch.cat([torch.tensor([1e6]), torch.linspace(2, 1, 299)]).double()
    w, u, v = planted(300, 300, s)
    assert gram._decompose_gram(w, 20, 0) is None
    found = gram.decompose(w, 20)
    assert largest_angle_deg(found.left, u[:, :20]) < 10 * found.error_deg
    s[0] = 2.5
    w, u, v = planted(300, 300, s)
    found = gram.decompose(w, 20)
    assert found.error_deg < gram.ANGLE_ERROR_DEG
    assert largest_angle_deg(found.left, u[:, :20]) < found.error_deg
    assert largest_angle_deg(found.right, v[:, :20]) < found.error_deg


def test_what_the_bound_does_not_allow_is_decided_by_the_svd(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    w = gaussian(300, 280)
    bound = gram.decompose(w, 20).error_deg
    assert gram._decompose_gram(w, 20, 0) is not None
    monkeypatch.setattr(gram, "ANGLE_ERROR_DEG", bound / 2)
    assert gram._decompose_gram(w, 20, 0) is None
    u, _, vh = scipy.linalg.svd(w.numpy(), full_matrices=False)
    found = gram.decompose(w, 20)
    assert largest_angle_deg(found.left, torch.from_numpy(u[:, :20].copy())) < bound
    assert largest_angle_deg(found.right, torch.from_numpy(vh[:20].T.copy())) < bound


@pytest.mark.parametrize("shape", [(300, 280), (280, 300), (30, 20), (300, 300)])
def test_bottom_subspaces_are_those_of_the_svd(shape: tuple[int, int]) -> None:
    w = gaussian(*shape)
    u, _, vh = scipy.linalg.svd(w.numpy(), full_matrices=False)
    for k, lowest in ((5, 6), (3, min(shape))):
        found = gram.decompose(w, k, lowest)
        left = torch.from_numpy(u[:, -lowest:].copy())
        right = torch.from_numpy(vh[-lowest:].T.copy())
        assert largest_angle_deg(found.lowest_left, left) < 1e-5
        assert largest_angle_deg(found.lowest_right, right) < 1e-5
        assert largest_angle_deg(found.left, torch.from_numpy(u[:, :k].copy())) < 1e-5
    assert gram.decompose(w, 5).lowest_left.shape == (shape[0], 0)
    with pytest.raises(ValueError, match="lowest"):
        gram.decompose(w, 5, min(shape) + 1)


@pytest.mark.parametrize("shape", [(300, 280), (280, 300), (30, 20), (20, 30)])
@pytest.mark.parametrize("k", [1, 8, 20])
def test_right_subspace_alone(shape: tuple[int, int], k: int) -> None:
    w = gaussian(*shape)
    _, _, vh = scipy.linalg.svd(w.numpy(), full_matrices=False)
    found = gram.right_subspace(w, k)
    assert found is not None
    assert largest_angle_deg(found, torch.from_numpy(vh[:k].T.copy())) < 1e-3
    low = gaussian(shape[0], 2) @ gaussian(2, shape[1])
    assert gram.right_subspace(low, 2) is not None
    assert gram.right_subspace(low, 5) is None
    assert gram.right_subspace(torch.zeros(shape), 2) is None


def test_a_narrow_gap_shows_in_the_bound() -> None:
    s = torch.linspace(3, 1, 280, dtype=torch.float64)
    s[20] = s[19] * (1 - 1e-9)
    found = gram.decompose(planted(300, 280, s)[0], 20)
    assert found.gap == pytest.approx(1e-9 * float(s[19] / s[0]), rel=1e-4)
    assert found.error_deg > gram.ANGLE_ERROR_DEG
    s[20] = s[19]
    assert gram.decompose(planted(300, 280, s)[0], 20).error_deg > 1


@pytest.mark.parametrize("shape", [(300, 300), (20, 30)])
def test_zeros_have_no_subspace(shape: tuple[int, int]) -> None:
    found = gram.decompose(torch.zeros(shape), 4)
    assert found.error_deg == 90
    assert found.gap == 0
    assert float(found.spectrum.abs().max()) == 0


def test_low_rank_has_its_rank() -> None:
    s = torch.tensor([5.0, 4.0, 3.0, 2.0]).double()
    w, u, v = planted(300, 320, s)
    found = gram.decompose(w, 4)
    expected = torch.cat([s, torch.zeros(296, dtype=torch.float64)])
    torch.testing.assert_close(found.spectrum, expected, rtol=0, atol=1e-13)
    assert largest_angle_deg(found.left, u) < 1e-9
    assert largest_angle_deg(found.right, v) < 1e-9


def test_transposed_and_scaled_matrices_turn_alike() -> None:
    w = gaussian(290, 400)
    one, other = gram.decompose(w, 30), gram.decompose(-1e-6 * w.T, 30)
    torch.testing.assert_close(1e-6 * one.spectrum, other.spectrum)
    assert largest_angle_deg(one.left, other.right) < 1e-8
    assert largest_angle_deg(one.right, other.left) < 1e-8


def test_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    w = gaussian(500, 270)
    whole = gram.decompose(w, 20)
    monkeypatch.setattr(gram, "CHUNK_ENTRIES", 270 * 33)
    parts = gram.decompose(w, 20)
    torch.testing.assert_close(parts.spectrum, whole.spectrum)
    assert largest_angle_deg(parts.left, whole.left) < 1e-8
    full = torch.linalg.qr(w).R
    torch.testing.assert_close(gram.gram(w).triu(), (full.T @ full).triu())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(300, 300), (20, 30)])
def test_what_is_not_finite_is_refused(bad: float, shape: tuple[int, int]) -> None:
    w = gaussian(*shape)
    w[3, 4] = bad
    for call in (gram.decompose, gram.leading_values):
        with pytest.raises(ValueError, match=r"1 (NaN|inf)|NaN and 1 inf"):
            call(w, 4)
    with pytest.raises(ValueError, match="k = 0"):
        gram.decompose(w, 0)


# --- the largest values ----------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (30, 20)])
def test_leading_values_are_scipys(shape: tuple[int, int]) -> None:
    w = gaussian(*shape)
    s = scipy.linalg.svdvals(w.numpy())
    found = gram.leading_values(w, 16)
    np.testing.assert_allclose(found[:16], s[:16], rtol=1e-12)


def test_leading_values_of_low_rank_end_in_rounding() -> None:
    s = torch.tensor([5.0, 4.0, 3.0]).double()
    found = gram.leading_values(planted(300, 320, s)[0], 37)
    torch.testing.assert_close(found[:3], s)
    assert float(found[3]) < 1e-13
    with pytest.raises(ValueError, match="only 3 singular values are above rounding"):
        spectra.hill_exponent(found, 37)


@pytest.mark.parametrize("shape", [*SHAPES, (40, 30)])
def test_leading_right_subspace_is_the_planted_one(shape: tuple[int, int]) -> None:
    s = torch.linspace(9, 1, min(shape), dtype=torch.float64)
    w, _, v = planted(*shape, s)
    values, right = gram.leading_right(w, 20, 8)
    torch.testing.assert_close(values[:20], s[:20])
    assert right is not None
    assert right.shape == (shape[1], 8)
    assert largest_angle_deg(right, v[:, :8]) < 1e-6


@pytest.mark.parametrize("shape", [(300, 290), (40, 30)])
def test_leading_right_needs_the_rank(shape: tuple[int, int]) -> None:
    s = torch.tensor([5.0, 4.0, 3.0]).double()
    w, _, v = planted(*shape, s)
    _, right = gram.leading_right(w, 10, 3)
    assert right is not None
    assert largest_angle_deg(right, v) < 1e-9
    assert gram.leading_right(w, 10, 4)[1] is None


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (300, 280), (280, 300)])
def test_rough_values_are_near_and_steep_ones_exact(shape: tuple[int, int]) -> None:
    """In float32 to 1e-3 at worst; where that loses more, in float64 after all."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(1e-9 * noise, full_matrices=False)
    top, k = 12, 4
    for spectrum, rel in ((s, 1e-4), (s * 0.1 ** torch.arange(len(s)), 1e-9)):
        w = (u * spectrum) @ vh
        values, right = gram.leading_right(w, top if rel > 1e-6 else 6, k, rough=True)
        n = min(6, len(values))
        torch.testing.assert_close(values[:n], spectrum[:n], rtol=rel, atol=0)
        alone = gram.right_subspace(w, k, rough=True)
        for basis in (right, alone):
            assert basis is not None
            shared = spectra.subspace_similarity(basis, vh[:k].T)
            assert shared == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ValueError, match="1 NaN"):
        gram.right_subspace(torch.full((1, 1), math.nan), 1, rough=True)

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from opd_geometry.geometry import bits, comparison, gram
from opd_geometry.geometry.comparison import METRICS, Settings, compare, reference
from opd_geometry.geometry.following import follow_tensors


def weights(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.02 * torch.randn(shape, generator=generator)).to(dtype)


def changed(w: Tensor, size: float = 1e-4) -> Tensor:
    generator = torch.Generator().manual_seed(99)
    return (w + size * torch.randn(w.shape, generator=generator)).to(w.dtype)


def by_full_svd(before: Tensor, after: Tensor) -> dict[str, float]:
    """The paper's protocol by SciPy alone, masks by sorting."""
    w0, w1 = before.double().numpy(), after.double().numpy()
    n = min(w0.shape)
    k, r = n // 8, n // 64
    u0, s0, v0 = scipy.linalg.svd(w0, full_matrices=False)
    u1, s1, v1 = scipy.linalg.svd(w1, full_matrices=False)
    s = scipy.linalg.svdvals(w1 - w0)
    left = np.rad2deg(scipy.linalg.subspace_angles(u0[:, :k], u1[:, :k]))
    right = np.rad2deg(scipy.linalg.subspace_angles(v0[:k].T, v1[:k].T))
    a, b = before.bfloat16().double().numpy(), after.bfloat16().double().numpy()
    visible = np.abs(b - a) > 1e-3 * np.maximum(np.abs(a), np.abs(b))
    stored = scipy.linalg.svdvals(b - a)

    def overlap(score: np.ndarray) -> float:
        chosen = np.argsort(-score.reshape(-1), kind="stable")[: score.size // 2]
        return float(visible.reshape(-1)[chosen].sum() / visible.sum())

    return {
        "sparsity": 1 - visible.mean(),
        "density": visible.mean(),
        "angle_left_mean_deg": left.mean(),
        "angle_left_max_deg": left.max(),
        "angle_right_mean_deg": right.mean(),
        "angle_right_max_deg": right.max(),
        "nss": np.linalg.norm(s1 - s0) / np.linalg.norm(s0),
        "principal_overlap": overlap(np.abs((u0[:, :r] * s0[:r]) @ v0[:r])),
        "low_magnitude_overlap": overlap(-np.abs(w0)),
        "stable_rank": (s**2).sum() / s[0] ** 2,
        "stable_rank_bf16": (stored**2).sum() / stored[0] ** 2,
        "frobenius_norm": np.linalg.norm(w1 - w0),
        "relative_norm": np.linalg.norm(w1 - w0) / np.linalg.norm(w0),
        "hill_alpha": (k - 1) / np.log(s[: k - 1] / s[k - 1]).sum(),
    }


# 128 and 192 x 512 are the book's own matrices, the others take the Gram matrix.
@pytest.mark.parametrize(
    "shape", [(128, 128), (192, 512), (320, 320), (270, 400), (400, 270)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_metric_is_that_of_three_full_svds(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    before = weights(*shape, dtype=dtype)
    after = changed(before)
    found, expected = compare(reference(before), after), by_full_svd(before, after)
    assert list(found) == list(METRICS)
    for name, value in expected.items():
        tolerance = 1e-6 if "angle" in name else 1e-9 * max(abs(value), 1e-5)
        assert found[name] == pytest.approx(value, abs=tolerance, rel=0), name


def test_dtypes_may_differ() -> None:
    before = weights(300, 280, dtype=torch.bfloat16)
    after = changed(before.double())
    same = compare(reference(before.double()), after)
    assert compare(reference(before), after) == pytest.approx(same, rel=1e-9)


def test_cheap_metrics_cost_no_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("decomposed")

    for name in ("decompose", "leading_values", "leading_right"):
        monkeypatch.setattr(gram, name, refuse)
    before = weights(300, 300)
    cheap = ("sparsity", "frobenius_norm", "relative_norm", "low_magnitude_overlap")
    assert list(compare(reference(before), changed(before), cheap)) == list(cheap)
    with pytest.raises(AssertionError, match="decomposed"):
        compare(reference(before), changed(before), ["nss"])


def test_origin_is_decomposed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = gram.decompose

    def counted(w: Tensor, k: int, lowest: int = 0) -> gram.Decomposition:
        calls.append(w)
        return original(w, k, lowest)

    monkeypatch.setattr(gram, "decompose", counted)
    before = reference(weights(300, 300))
    later = [changed(before.w_before, size) for size in (1e-4, 2e-4, 3e-4)]
    for after in later:
        compare(before, after)
    assert sum(w is before.w_before for w in calls) == 1
    assert len(calls) == 4


def test_settings_set_the_ranks() -> None:
    before = weights(300, 280)
    after = changed(before)
    wide = compare(reference(before, Settings(rank_k=280)), after)
    assert wide["angle_right_max_deg"] < 1e-6  # the whole space does not turn
    names = ["angle_left_mean_deg", "hill_alpha", "principal_overlap"]
    default = compare(reference(before), after, names)
    same = Settings(rank_k=35, hill_k=35, principal_rank=4)
    assert compare(reference(before, same), after, names) == default
    other = Settings(rank_k=20, hill_k=9, principal_rank=50)
    differing = compare(reference(before, other), after, names)
    assert all(differing[name] != default[name] for name in names)
    dense = reference(before, Settings(eta=0.5, alpha=1.0))
    found = compare(dense, after, ["sparsity", "low_magnitude_overlap"])
    assert found["sparsity"] > 0.9
    assert found["low_magnitude_overlap"] == 1.0


@pytest.mark.parametrize(
    "bad",
    [{"rank_k": 0}, {"hill_k": 1}, {"principal_rank": -1}, {"alpha": 0}, {"eta": 1}],
)
def test_impossible_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        Settings(**bad)


def test_arguments_are_checked() -> None:
    w = weights(20, 20)
    with pytest.raises(ValueError, match=r"unknown metrics \['spread'\]"):
        compare(reference(w), w, ["spread"])
    with pytest.raises(ValueError, match="two dimensions"):
        reference(w[0])
    with pytest.raises(ValueError, match="same shape"):
        compare(reference(w), w[:10])
    w[0, 0] = math.nan
    with pytest.raises(ValueError, match="1 NaN"):
        reference(w)


def test_null_has_the_norm_of_the_update() -> None:
    before = weights(300, 290, dtype=torch.bfloat16)
    after = changed(before)
    null = comparison.null_weights(reference(before), after, 3)
    size = bits.difference_norm(before, after)
    assert bits.difference_norm(before, null) == pytest.approx(size, rel=1e-12)
    assert torch.equal(null, comparison.null_weights(reference(before), after, 3))
    assert not torch.equal(null, comparison.null_weights(reference(before), after, 4))


# --- nulls with one thing taken away -----------------------------------------------


def test_a_low_rank_update_turns_subspaces_less_than_its_norm_says() -> None:
    """Rank is a property of the update, which the turned null keeps."""
    before = reference(weights(288, 288))
    u, v = (torch.linalg.qr(weights(288, 4, seed=s))[0] for s in (1, 2))
    after = before.w_before + 0.05 * u @ v.T
    own = compare(before, after)
    gaussian = comparison.compare_null(before, after, 0)
    turned = comparison.compare_turned(before, after, 0)
    name = "angle_right_mean_deg"
    ratio = turned[f"turned_{name}"] / own[name]
    assert abs(math.log(ratio)) < abs(math.log(gaussian[f"null_{name}"] / own[name]))
    assert turned["turned_nss"] == pytest.approx(own["nss"], rel=0.5)


def test_shuffled_keeps_the_density_and_loses_a_planted_place() -> None:
    before = reference(weights(200, 200).bfloat16())
    gain = torch.where(before.low_magnitude, 3.0, 1.0)
    noise = weights(200, 200, seed=3)
    after = before.w_before + 0.003 * gain * noise
    own, shuffled = (
        compare(before, after),
        comparison.compare_shuffled(before, after, 0),
    )
    assert (
        own["low_magnitude_overlap"] > 0.05 + shuffled["shuffled_low_magnitude_overlap"]
    )
    plain = before.w_before + 0.003 * noise
    own, shuffled = (
        compare(before, plain),
        comparison.compare_shuffled(before, plain, 0),
    )
    for name in comparison.SHUFFLED:
        assert own[name] == pytest.approx(shuffled[f"shuffled_{name}"], abs=0.02)
    with pytest.raises(ValueError, match="closed form"):
        comparison.compare_shuffled(before, after.bfloat16(), 0)


@pytest.mark.parametrize("shape", [(300, 280), (64, 96)])
def test_energies_are_those_of_the_svd(shape: tuple[int, int]) -> None:
    before = reference(weights(*shape), bottom=True)
    delta = 1e-3 * weights(*shape, seed=5).double()
    after = before.w_before.double() + delta
    found = compare(before, after, comparison.ENERGY)
    u, _, vh = torch.linalg.svd(before.w_before.double(), full_matrices=False)
    k, total = min(shape) // 8, float(delta.square().sum())
    by_hand = {
        "energy_top_left": u[:, :k].T @ delta,
        "energy_top_right": delta @ vh[:k].T,
        "energy_bottom_left": u[:, -k:].T @ delta,
        "energy_bottom_right": delta @ vh[-k:].T,
        "energy_principal": delta[before.principal],
        "energy_low_magnitude": delta[before.low_magnitude],
    }
    chance = comparison.energy_by_chance(before)
    for name, part in by_hand.items():
        share = float(part.square().sum()) / total
        assert found[name] == pytest.approx(share, rel=1e-5)
        assert found[name] == pytest.approx(chance[f"null_{name}"], rel=0.2)
    late = compare(reference(before.w_before), after, comparison.ENERGY)
    assert late == pytest.approx(found, rel=1e-5)


def test_expected_is_where_a_gaussian_update_lands() -> None:
    before = reference(weights(300, 300).bfloat16())
    for size in (2e-5, 2e-4):
        after = before.w_before + size * weights(300, 300, seed=4) / 0.02
        own, there = compare(before, after), comparison.compare_expected(before, after)
        assert there.origin == "norm"
        assert there.scale == pytest.approx(size, rel=0.02)
        for name in comparison.EXPECTED:
            assert there.values[name] == pytest.approx(own[name], abs=0.01)
        stored = comparison.compare_expected(before, after.bfloat16())
        assert stored.origin == "density"
        assert stored.scale == pytest.approx(size, rel=0.02)
        assert stored.values["density"] == pytest.approx(own["density"], abs=1e-5)


def test_an_update_that_is_not_there_has_no_nulls() -> None:
    before = reference(weights(40, 40))
    assert comparison.compare_shuffled(before, before.w_before, 0) == {}
    assert comparison.compare_turned(before, before.w_before, 0) == {}
    there = comparison.compare_expected(before, before.w_before)
    assert all(math.isnan(value) for value in there.values.values())


def test_readout_of_the_stored_update() -> None:
    before = reference(weights(96, 80).bfloat16())
    after = changed(before.w_before.float(), 3e-5)
    found = compare(before, after, comparison.READOUT)
    stored = after.bfloat16().double() - before.w_before.double()
    s = torch.linalg.svdvals(stored)
    assert found["frobenius_norm_bf16"] == pytest.approx(float(stored.norm()))
    assert found["stable_rank_bf16"] == pytest.approx(float((s / s[0]).square().sum()))
    assert found["hill_alpha_bf16"] == pytest.approx(
        9 / float((s[:9] / s[9]).log().sum())
    )
    hidden = compare(before, before.w_before.double() + 1e-12, comparison.READOUT)
    assert hidden["frobenius_norm_bf16"] == 0.0
    assert math.isnan(hidden["stable_rank_bf16"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_gives_no_hill_exponent_to_an_update_of_low_rank(
    dtype: torch.dtype,
) -> None:
    """A merged LoRA: below its rank singular values are what float32 rounded off."""
    w = weights(96, 64, dtype=dtype)
    low = weights(96, 3, seed=1, dtype=dtype) @ weights(3, 64, seed=2, dtype=dtype)
    before = reference(w)
    assert before.settings.hill_rank(w.shape) == 8
    values = torch.linalg.svdvals((w + low).double() - w.double())
    assert (float(values[3]) > 1e-9) == (dtype == torch.float32)  # not zero
    found = compare(before, w + low, ["hill_alpha", "stable_rank"])
    assert math.isnan(found["hill_alpha"])
    assert found["stable_rank"] > 1.0
    for row in follow_tensors(w, lambda step: w + step * low, [1, 2], 3):
        assert math.isnan(row["hill_alpha"])
    fewer = reference(w, Settings(hill_k=3))
    assert compare(fewer, w + low, ["hill_alpha"])["hill_alpha"] > 0.0
    # what every direction has, however small, keeps its exponent
    tiny = changed(w, 1e-6)
    assert compare(before, tiny, ["hill_alpha"])["hill_alpha"] > 0.0

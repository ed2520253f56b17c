import math

import pytest
import torch
from torch import Tensor

from opd_geometry.geometry import bits, locking, spectra

N, K, T = 128, 16, 100
EARLY = T // 5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def early(path: dict[int, Tensor], k: int = K) -> float:
    parts = {step: locking.decomposed(path[step]) for step in (min(path), max(path))}
    end = locking.top_right(parts[max(path)], k)
    return locking.similarities(parts, end, k)[min(path)]


CONSTANT = [1e-3] * T
DECAY = [1e-3 * (1 - t / T) for t in range(T)]
ADAM = (0.9, 0.98)


@pytest.mark.parametrize(
    ("expected", "options", "rates"),
    [
        (0.23, {"rank": None, "betas": None}, CONSTANT),
        (0.33, {"rank": 1, "betas": None}, CONSTANT),
        (0.51, {"rank": 1, "betas": ADAM}, CONSTANT),
        (0.76, {"rank": 1, "betas": ADAM}, DECAY),
    ],
)
def test_a_sum_that_shares_its_steps_is_like_its_end_without_learning(
    expected, options, rates
):
    found = [
        early(locking.walk((N, N), rates, (EARLY, T), generator(seed), **options))
        for seed in range(3)
    ]
    assert sum(found) / 3 == pytest.approx(expected, abs=0.05)
    assert min(found) > K / N + 0.05  # which two random subspaces have


def test_walk_is_torchs_adam():
    rates = [1e-2, 3e-3, 2e-3, 1e-3, 5e-3]
    found = locking.walk((6, 4), rates, (2, 5), generator(3), rank=2, betas=(0.8, 0.95))
    stream, w = generator(3), torch.nn.Parameter(torch.zeros(6, 4))
    optimizer = torch.optim.Adam([w], betas=(0.8, 0.95))
    kept = {}
    for t, rate in enumerate(rates, 1):
        left = torch.randn(6, 2, generator=stream)
        w.grad = left @ torch.randn(2, 4, generator=stream)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        kept[t] = w.detach().double()
    for step, delta in found.items():
        torch.testing.assert_close(delta, kept[step], rtol=1e-4, atol=1e-8)


def test_a_walk_goes_as_far_as_the_run_between_checkpoints():
    sizes = {3: 0.5, 4: 0.0, 7: 2.0}
    path = locking.walk((6, 4), CONSTANT[:7], sizes, generator())
    found = {step: float(d.norm()) for step, d in locking.increments(path).items()}
    assert found == pytest.approx(sizes)


def test_stable_rank_of_adam_on_noise_of_rank_one_grows():
    path = locking.walk((N, N), CONSTANT, (10, T), generator(), betas=ADAM)
    assert spectra.stable_rank(path[10]) == pytest.approx(2.3, abs=0.7)
    assert spectra.stable_rank(path[T]) == pytest.approx(11, abs=4)


def test_turned_increments_keep_spectra_and_return_nowhere():
    basis = gaussian(8, 60, seed=1)
    steps = [gaussian(60, 8, seed=s) @ basis for s in range(5)]
    deltas = {t + 1: sum(steps[: t + 1]) for t in range(5)}
    parts = {step: locking.decomposed(delta) for step, delta in deltas.items()}
    own = locking.top_right(parts[5], 8)
    assert min(locking.similarities(parts, own, 8).values()) > 0.999
    turned = locking.turned_increments(deltas, generator(2))
    before = torch.zeros(60, 60).double()
    for step, delta in turned.items():
        kept = torch.linalg.svdvals(delta - before)
        own = torch.linalg.svdvals(steps[step - 1])
        torch.testing.assert_close(kept, own, rtol=0, atol=1e-5 * float(own[0]))
        before = delta
    assert early(turned, 8) < 0.5
    again = locking.turned_increments(deltas, generator(2))
    assert all(torch.equal(again[step], turned[step]) for step in turned)


def test_turned_increments_of_a_walk_are_as_the_walk():
    """Independent steps have no direction to lose."""
    kept = (10, 20, 40, 60, 80, 100)
    path = locking.walk((N, N), CONSTANT, kept, generator(1), rank=None, betas=None)
    turned = locking.turned_increments(path, generator(2))
    assert early(turned) == pytest.approx(early(path), abs=0.05)


def test_increments_that_are_damaged_or_nothing():
    deltas = {step: gaussian(6, 6, seed=step) for step in (1, 2, 3)}
    deltas[2] = deltas[1]
    turned = locking.turned_increments(deltas, generator())
    assert torch.equal(turned[1], turned[2])
    deltas[3] = torch.full((6, 6), math.nan)
    with pytest.raises(ValueError, match="at step 3 holds 36 NaN"):
        locking.turned_increments(deltas, generator())


def test_rank_contracts_by_rounding_alone():
    """The same update, larger at every step, is read with less and less rank."""
    w = (0.02 * gaussian(128, 128, seed=5)).bfloat16()
    end = gaussian(128, 4, seed=6) @ gaussian(4, 128, seed=7)
    end *= 1e-4 / float(end.square().mean().sqrt())
    deltas = {1: 0.1 * end.T, 2: -0.3 * end, 3: end}  # of the others only the norm
    scaled = locking.scaled_end(deltas)
    for step, size in ((1, 0.1), (2, 0.3), (3, 1.0)):
        torch.testing.assert_close(scaled[step], size * end)
    ranks = [
        spectra.stable_rank(bits.stored_difference(w, w.double() + delta))
        for delta in scaled.values()
    ]
    assert ranks[0] > 1.3 * ranks[1] > 1.3 * 1.2 * ranks[2]
    with pytest.raises(ValueError, match="the last update is zero"):
        locking.scaled_end({1: end, 2: torch.zeros(128, 128)})


def test_similarity_with_another_subspace():
    deltas = {1: gaussian(20, 12), 2: torch.zeros(20, 12)}
    parts = {step: locking.decomposed(delta) for step, delta in deltas.items()}
    basis = locking.top_right(locking.decomposed(gaussian(20, 12, seed=9)), 3)
    found = locking.similarities(parts, basis, 3)
    _, _, vh = torch.linalg.svd(deltas[1])
    expected = float((vh[:3] @ basis).square().sum() / 3)
    assert found == {1: pytest.approx(expected)}  # nothing of what is zero
    assert locking.similarities(parts, None, 3) == {}


def test_noise_moves_weights_by_one_unit_and_drift_by_the_root_of_its_steps():
    rates = [1e-3] * 64
    noise = locking.walk(
        (64, 64), rates, (64,), generator(), rank=None, betas=(0, 0.99)
    )
    assert locking.displacement(noise[64], rates) == pytest.approx(1.0, abs=0.1)
    drift = torch.full((4, 4), 64 * 1e-3)
    assert locking.displacement(drift, 1e-3, 64) == pytest.approx(8.0)
    for rates in ([], [0.0], [-1.0, 2.0], [math.nan]):
        with pytest.raises(ValueError, match="learning rates"):
            locking.displacement(drift, rates)
    with pytest.raises(ValueError, match="0 steps"):
        locking.displacement(drift, 1e-3)


def test_walks_that_cannot_be():
    for options in ({"steps": (0,)}, {"steps": (9,)}, {"steps": ()}):
        with pytest.raises(ValueError, match="from 1"):
            locking.walk((4, 4), [1e-3] * 8, **options, generator=generator())
    with pytest.raises(ValueError, match="rank 0"):
        locking.walk((4, 4), [1e-3], (1,), generator(), rank=0)
    for bad in (((), (0.9, 0.999)), ((1e-3,), (0.9, 1.0)), ((1e-3,), (math.nan, 0.9))):
        with pytest.raises(ValueError, match="expected"):
            locking.Optimizer(*bad)


def test_rows_that_walk_alone_walk_as_all_do(monkeypatch):
    whole = locking.walk((20, 7), CONSTANT, (3, T), generator(1), betas=ADAM)
    monkeypatch.setattr(locking, "CHUNK_ENTRIES", 50)
    parts = locking.walk((20, 7), CONSTANT, (3, T), generator(1), betas=ADAM)
    for step, total in whole.items():
        torch.testing.assert_close(parts[step], total, rtol=1e-4, atol=1e-9)


def test_a_common_rotation_changes_no_similarity():
    deltas = {t: gaussian(50, 4, seed=t) @ gaussian(4, 30, seed=7) for t in (1, 2, 3)}
    added = locking.increments(deltas)
    sums = locking.Increments((50, 30), generator(), first=False)
    path = {step: sums.add(change).clone() for step, change in added.items()}
    assert torch.equal(path[1], deltas[1])
    for step, change in locking.increments(path).items():
        kept, own = torch.linalg.svdvals(change), torch.linalg.svdvals(added[step])
        torch.testing.assert_close(kept, own, rtol=0, atol=1e-5 * float(own[0]))

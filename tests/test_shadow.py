"""The locking nulls beside a training: against those of a finished trajectory."""

from itertools import pairwise

import pytest
import torch

from opd_geometry.geometry import bits, locking, spectra
from opd_geometry.geometry.comparison import generator_of
from opd_geometry.geometry.shadow import Shadow

SHAPE, SEED, MOMENTS = (24, 16), (0, 7, 0), ((0.9, 0.98), 1e-8)
RATES = [1e-3 * (1 + t % 3) for t in range(12)]


def start() -> torch.Tensor:
    return torch.randn(*SHAPE, generator=torch.Generator().manual_seed(1))


def weights(n: int = 4) -> list[torch.Tensor]:
    """W_0 and where a run with one direction took it."""
    step = 0.01 * torch.outer(torch.arange(24.0), torch.ones(16))
    return [start() + t * step for t in range(n)]


def test_one_segment_is_the_walk_of_a_finished_run() -> None:
    before, after = weights(2)
    found = Shadow(before, SEED, MOMENTS).add(after, RATES, 12)["walk"]
    length = bits.norm(after.double() - before.double())
    known = locking.walk(
        SHAPE,
        RATES,
        {12: length},
        generator_of((*SEED, 12), "walk"),
        betas=MOMENTS[0],
        eps=MOMENTS[1],
    )
    assert torch.equal(found, known[12])
    assert bits.norm(found) == pytest.approx(length, rel=1e-12)


def test_segments_keep_their_lengths_and_lose_their_direction() -> None:
    before, *later = weights(4)
    shadow = Shadow(before, SEED, MOMENTS)
    sums = {"increments": [torch.zeros(SHAPE)], "walk": [torch.zeros(SHAPE)]}
    for step, w in enumerate(later, start=1):
        for null, total in shadow.add(w, RATES[:3], 3 * step).items():
            sums[null].append(total.clone())
    length = bits.norm(later[0].double() - before.double())
    for null, path in sums.items():
        for a, b in pairwise(path):
            assert bits.norm(b - a) == pytest.approx(length, rel=1e-4), null
    top = [torch.linalg.svd(t)[2][:1].T for t in sums["increments"][1:]]
    assert spectra.subspace_similarity(top[0], top[2]) < 0.9  # the run's own is 1
    ranks = [torch.linalg.matrix_rank(t, rtol=1e-4) for t in sums["increments"]]
    assert ranks == [0, 1, 2, 3]


@pytest.mark.parametrize("rates", [RATES[:3], None])
def test_a_shadow_goes_on_where_it_was_stored(rates: list[float] | None) -> None:
    before, one, two, three = weights(4)
    straight, resumed = Shadow(before, SEED, MOMENTS), Shadow(three, SEED, MOMENTS)
    straight.add(one, rates, 3)
    resumed.recall({name: t.clone() for name, t in straight.state()})
    for step, w in ((6, two), (9, three)):
        own, other = straight.add(w, rates, step), resumed.add(w, rates, step)
        assert (
            own.keys()
            == other.keys()
            == {"increments", "walk"} - ({"walk"} if rates is None else set())
        )
        assert all(torch.equal(own[null], other[null]) for null in own)


def test_a_matrix_that_stands_still_adds_nothing() -> None:
    before = start()
    shadow = Shadow(before, SEED, MOMENTS)
    found = shadow.add(before, RATES, 12)
    assert not any(bool(total.any()) for total in found.values())
    with pytest.raises(KeyError):
        shadow.recall({})

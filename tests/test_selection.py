"""Masks of an exact share against a plain stable sort."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_geometry.geometry import bits, selection

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
ALPHAS = [1e-4, 0.01, 0.3, 0.5, 0.77, 0.999, 1.0]


def by_sorting(w: Tensor, alpha: float, largest: bool = False) -> np.ndarray:
    keys = w.double().abs().numpy().reshape(-1) * (-1 if largest else 1)
    mask = np.zeros(keys.size, bool)
    mask[np.argsort(keys, kind="stable")[: round(alpha * keys.size)]] = True
    return mask


def check(w: Tensor, alpha: float) -> None:
    """Both ways, and what they say of the largest magnitude."""
    stored = bits.bits_of(w)
    for largest in (False, True):
        mask, top = selection.mark(stored, alpha, largest)
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, by_sorting(w, alpha, largest))
        assert top == bits.magnitudes_of(stored).max()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks and a poor sample of what is not large."""
    monkeypatch.setattr(selection, "CHUNK_BYTES", 256)
    monkeypatch.setattr(selection, "_draws", lambda size: 16)


def noise(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def kinds(size: int) -> dict[str, Tensor]:
    """Entries with many ties, few, and in orders that are no random one."""
    w = noise(size)
    lone = torch.zeros(size)
    lone[size // 2] = 1.0
    return {
        "noise": w,
        "ties": w.mul(2).round(),
        "equal": torch.full((size,), -0.5),
        "zeros of both signs": w.sign() * 0.0,
        "two values": torch.where(w > 0, 1e-3, 1e3),
        "one among zeros": lone,
        "ascending": w.abs().sort().values,
        "descending": w.abs().sort(descending=True).values,
        "blocks": torch.linspace(1.0, 0.01, size) * w,
        "ties in the middle": torch.where(w.abs() < 0.6, w.sign() * 0.5, w),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.usefixtures("small")
def test_masks_are_those_of_a_stable_sort(dtype: torch.dtype, alpha: float) -> None:
    for w in kinds(5000).values():
        check(w.to(dtype), alpha)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [0.3, 0.5])
def test_sizes_around_a_chunk(
    dtype: torch.dtype, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "CHUNK_BYTES", 64)
    length = 64 // dtype.itemsize
    around = {k * length + off for k in (1, 2, 3, 7) for off in (-1, 0, 1)}
    for draws in (1, 4, 2**17):
        monkeypatch.setattr(selection, "_draws", lambda size, n=draws: n)
        for size in sorted({1, 2, 3, *around}):
            check(noise(size, size).to(dtype), alpha)
            check(noise(size, size).round().to(dtype), alpha)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.9])
@pytest.mark.usefixtures("small")
def test_a_sample_that_misleads_costs_time_alone(
    dtype: torch.dtype, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, exact, used = selection._Chunks.sample, selection._Chunks.exact, []
    monkeypatch.setattr(
        selection._Chunks, "exact", lambda self, n: used.append(n) or exact(self, n)
    )
    w = noise(5000).to(dtype)
    for value in (0, 1, 1000):
        monkeypatch.setattr(
            selection._Chunks,
            "sample",
            lambda self, value=value: np.full_like(sample(self), value),
        )
        check(w, alpha)
    assert used  # no walk gets there


@pytest.mark.parametrize("dtype", DTYPES)
def test_sampled_places_that_are_all_zero(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by looking where the real sample looks."""
    monkeypatch.setattr(selection, "CHUNK_BYTES", 1024)
    monkeypatch.setattr(selection, "_draws", lambda size: 64)
    run = 16 // dtype.itemsize
    places = torch.arange(20_000, dtype=dtype if dtype.itemsize > 2 else torch.int16)
    stored = places.view(bits.BITS[dtype][0]).numpy()
    seen = np.unique(selection._Chunks(stored, False).sample())
    w = noise(20_000).to(dtype)
    w.view(bits.BITS[dtype][0])[np.isin(stored, seen)] = 0
    assert int((w == 0).sum()) >= run * 32
    assert not selection._Chunks(bits.bits_of(w), False).sample().any()
    for alpha in ALPHAS:
        check(w, alpha)


@settings(deadline=None, max_examples=200)
@given(
    values=st.lists(st.integers(-4, 4), min_size=1, max_size=80),
    alpha=st.floats(0.001, 1.0),
    chunk=st.sampled_from([16, 32, 2**19]),
    draws=st.sampled_from([1, 2, 2**17]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_small_array(
    values: list[int], alpha: float, chunk: int, draws: int, dtype: torch.dtype
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "CHUNK_BYTES", chunk)
        patch.setattr(selection, "_draws", lambda size: draws)
        check(torch.tensor(values).to(dtype), alpha)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_real_chunks_and_sample(dtype: torch.dtype) -> None:
    """Nothing made small, a start inside of a line of memory, rows of unlike size."""
    rows = torch.linspace(0.1, 1.0, 2000)[:, None]
    w = (noise(2000 * 1100).reshape(2000, 1100) * rows).to(dtype).reshape(-1)[3:]
    for alpha in (0.1, 0.5):
        check(w, alpha)

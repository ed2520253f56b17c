"""Exactly so many of the smallest magnitudes, in little more than one pass over them.

A sample says about where the threshold lies. Entries are marked by it and counted, a
chunk at a time, and the count says what is left to mend. The mask is exact whatever the
entries are: if a sample misleads, mending takes longer.
"""

import numpy as np

from opd_geometry.geometry.bits import magnitudes_of

CHUNK_BYTES = 2**19  # of keys: they and their marks stay in a core's cache


def mark(
    bits: np.ndarray, alpha: float, largest: bool = False
) -> tuple[np.ndarray, int]:
    """Mask of the round(alpha * size) smallest or largest magnitudes.

    A threshold (`magnitudes <= quantile`) takes a whole run of ties or none of it, and
    bf16 weights are full of ties; `torch.quantile` also stops at 16 M entries.

    Args:
        bits: (size,) int16, int32 or int64, the stored bits of floating-point numbers.
        alpha: share of entries, above 0 to 1.
        largest: mark the largest instead.

    Returns:
        (size,) boolean, True where marked, of ties the first ones; and the bits of the
        largest magnitude, which tell whether all are finite.

    Raises:
        ValueError: alpha out of range.
    """
    if not 0.0 < alpha <= 1.0:
        raise ValueError(f"alpha = {alpha!r}, expected 0 < alpha <= 1; try 0.5")
    count = round(alpha * bits.size)
    if count == 0:
        return np.zeros(bits.size, bool), int(magnitudes_of(bits).max())
    chunks = _Chunks(bits, largest)
    (_mark_by_steps if bits.itemsize == 2 else _mark_by_bracket)(chunks, count)
    return chunks.mask, chunks.top


def _draws(size: int) -> int:
    """Of a sample: a larger one takes longer and leaves less to mend."""
    return int(size ** (2 / 3))


class _Chunks:
    """The keys of an array, a chunk at a time, and the mask that is made of them.

    Keys are integers in the order in which the entries are to be marked.
    """

    def __init__(self, bits: np.ndarray, largest: bool) -> None:
        self.size = bits.size
        self.length = min(CHUNK_BYTES // bits.itemsize, bits.size)
        self.n = -(-bits.size // self.length)
        self.mask = np.empty(bits.size, bool)
        self.top = 0  # bits of the largest magnitude
        self._bits, self._largest = bits, largest
        self._buffer = np.empty(self.length, bits.dtype)

    def of(self, i: int) -> slice:
        """Where a chunk lies."""
        return slice(i * self.length, (i + 1) * self.length)

    def keys(self, i: int) -> np.ndarray:
        """Those of a chunk, until the next call."""
        part = self._bits[self.of(i)]
        keys = magnitudes_of(part, out=self._buffer[: part.size])
        self.top = max(self.top, int(keys.max()))
        return np.invert(keys, out=keys) if self._largest else keys

    def mark(self, i: int, last: np.integer) -> tuple[np.ndarray, np.ndarray, int]:
        """Mark a chunk's keys up to the last; its keys, marks and their number."""
        keys = self.keys(i)
        marks = np.less_equal(keys, last, out=self.mask[self.of(i)])
        return keys, marks, int(np.count_nonzero(marks))

    def sample(self) -> np.ndarray:
        """Keys from random places, sorted; all of them if they are few."""
        run, n_draws = 16 // self._bits.itemsize, _draws(self.size)
        if self.size <= run * n_draws:
            return np.sort(self._keys_of(self._bits))
        # One draw from each of equal parts, so that every row and column has its share;
        # at random there, since a stride would meet the same columns again and again.
        # Neighbours come as one complex number: the cost is that of a line of memory.
        runs = self._bits[: self.size // run * run].view(np.complex128)
        within = np.random.default_rng(0).random(n_draws)
        places = ((np.arange(n_draws) + within) * (len(runs) / n_draws)).astype(
            np.int64
        )
        keys = self._keys_of(runs[places].view(self._bits.dtype))
        keys.sort()
        return keys

    def exact(self, count: int) -> np.integer:
        """The count-th key of all, for which they are copied: slow, but sure."""
        keys = self._keys_of(self._bits)
        threshold: np.integer = np.partition(keys, count - 1)[count - 1]
        return threshold

    def _keys_of(self, bits: np.ndarray) -> np.ndarray:
        keys = magnitudes_of(bits)
        return np.invert(keys, out=keys) if self._largest else keys


# --- few keys, each of many entries: 16 bits --------------------------------------


def _mark_by_steps(chunks: _Chunks, count: int) -> None:
    """Mark step by step: the ties with one key in one chunk.

    Step key * n + i marks the ties with the key in chunk i, so that any step leaves a
    chunk marked up to one key. After the first step by which enough are marked, those
    of its ties that are too many are unmarked.
    """
    sample, steps = chunks.sample(), _Steps(chunks)
    n_off = steps.go(_step(sample, count / chunks.size, chunks.n)) - count
    nearby = _step(sample, (count - n_off) / chunks.size, chunks.n)
    found = steps.search(nearby, count)
    if found is None:
        # From the last step before the right key there are at most n to go.
        found = steps.search(int(chunks.exact(count)) * chunks.n - 1, count)
        assert found is not None
    key, i = divmod(found, chunks.n)
    ties = np.flatnonzero(chunks.keys(i) == key)
    n_surplus = sum(steps.marked) - count
    chunks.mask[chunks.of(i)][ties[len(ties) - n_surplus :]] = False


def _step(sample: np.ndarray, share: float, n: int) -> int:
    """About the step by which a share of all entries is marked."""
    place = min(max(0.0, share * len(sample)), len(sample) - 1.0)
    key = sample[int(place)]
    first, end = sample.searchsorted(key), sample.searchsorted(key, "right")
    return int(key) * n + int((place - first) / (end - first) * n)


class _Steps:
    """Chunks, each marked up to a key of its own."""

    def __init__(self, chunks: _Chunks) -> None:
        self._chunks = chunks
        self._last: list[int | None] = [None] * chunks.n
        self.marked = [0] * chunks.n

    def mark(self, i: int, step: int) -> None:
        """Mark a chunk as all steps up to one do."""
        last = (step - i) // self._chunks.n
        self._last[i] = last
        self.marked[i] = self._chunks.mark(i, np.int16(last))[2]

    def go(self, step: int) -> int:
        """Mark all chunks as all steps up to one do; how many entries that marks."""
        for i, last in enumerate(self._last):
            if last != (step - i) // self._chunks.n:
                self.mark(i, step)
        return sum(self.marked)

    def search(self, step: int, count: int) -> int | None:
        """The first step that marks enough, from one nearby; None if it is far."""
        n_marked = self.go(step)
        for _ in range(self._chunks.n + 1):
            # Back until too few are marked, then forth.
            forth = n_marked < count
            i = (step + forth) % self._chunks.n  # the one chunk that a step changes
            step += 1 if forth else -1
            self.mark(i, step)
            n_marked = sum(self.marked)
            if forth and n_marked >= count:
                return step
        return None


# --- many keys, each of few entries: 32 and 64 bits --------------------------------


def _mark_by_bracket(chunks: _Chunks, count: int) -> None:
    """Mark what is below a bracket, list what is in it, mark what of it is missing."""
    sample, share = chunks.sample(), count / chunks.size
    margin = 1.5 / len(sample) ** 0.5  # three standard deviations of a median
    for _ in range(2):
        low, high = (_key(sample, share + side * margin) for side in (-1, 1))
        n_below, places, keys = _list(chunks, low, high)
        if n_below < count <= n_below + len(keys):
            break
        # The sample is off by as much as it is at the bracket's lower end.
        share -= n_below / chunks.size - sample.searchsorted(low, "right") / len(sample)
    else:
        threshold = chunks.exact(count)
        n_below, places, keys = _list(chunks, threshold - 1, threshold)
    n_missing = count - n_below
    threshold = np.partition(keys, n_missing - 1)[n_missing - 1]
    lower = places[keys < threshold]
    chunks.mask[lower] = True
    chunks.mask[places[keys == threshold][: n_missing - len(lower)]] = True


def _key(sample: np.ndarray, share: float) -> np.integer:
    """The key up to which a share of a sample lies, or one beyond all keys."""
    place, ends = int(share * len(sample)), np.iinfo(sample.dtype)
    if place < 0 or place >= len(sample):
        return sample.dtype.type(ends.min if place < 0 else ends.max)
    key: np.integer = sample[place]
    return key


def _list(
    chunks: _Chunks, low: np.integer, high: np.integer
) -> tuple[int, np.ndarray, np.ndarray]:
    """Mark keys up to low; their number, and places and keys from there up to high."""
    n_below, places, keys = 0, [], []
    buffer = np.empty(chunks.length, bool)
    for i in range(chunks.n):
        part, marks, n_marked = chunks.mark(i, low)
        within = np.less_equal(part, high, out=buffer[: part.size])
        where = np.flatnonzero(np.not_equal(within, marks, out=within))
        n_below += n_marked
        keys.append(part.take(where))
        places.append(np.add(where, i * chunks.length, out=where))
    return n_below, np.concatenate(places), np.concatenate(keys)

"""Open files of checkpoints: each is opened once and its header read once.

What is read from a mapped file stays in memory while the file is open, so a file is
opened anew after `OPEN_BYTES` of reading: memory stays bounded by that and by the
largest tensor, and a file of twenty thousand small tensors is parsed once.
"""

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

OPEN_FILES = 16
OPEN_BYTES = 2**26


@dataclass
class _Open:
    stamp: tuple[int, ...]
    handle: Any
    n_bytes: int = 0


_open: "OrderedDict[Path, _Open]" = OrderedDict()


def _stamp(file: Path) -> tuple[int, ...]:
    """Changes when a file is written again, in place or under the same name."""
    found = os.stat(file)
    return found.st_ino, found.st_size, found.st_mtime_ns


def handle_of(file: Path, opener: Callable[[Path], Any]) -> Any:
    """What ``opener`` gives for a file, kept for the next call.

    Args:
        file: of a checkpoint.
        opener: called when the file is not open, or was written again.
    """
    stamp = _stamp(file)
    found = _open.pop(file, None)
    if found is None or found.stamp != stamp or found.n_bytes > OPEN_BYTES:
        found = None  # closed before it is opened anew
        found = _Open(stamp, opener(file))
    _open[file] = found
    while len(_open) > OPEN_FILES:
        _open.popitem(last=False)
    return found.handle


def count_read(file: Path, n_bytes: int) -> None:
    """Tell how much was read from an open file."""
    if file in _open:
        _open[file].n_bytes += n_bytes


def open_safetensors(file: Path) -> Any:
    """A safetensors file, kept open; a damaged one is a ValueError that names it."""
    with naming(file):
        return handle_of(file, lambda f: safe_open(str(f), framework="pt"))


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Turn what safetensors says of a damaged file into a line that names it."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{file} is truncated or damaged ({error}), "
            "expected a whole safetensors file; copy it again"
        ) from error


def owned(file: Path, w: Tensor) -> Tensor:
    """A copy of what was read from a mapped file, in memory of its own.

    A view of the mapped file would keep its pages in memory, and change or crash when
    the file is written again.
    """
    copy: Tensor = w.clone(memory_format=torch.contiguous_format)
    count_read(file, copy.nbytes)
    return copy


# --- tensors of files --------------------------------------------------------------

Index = Any  # an int or a slice of the first axis, or a tuple that begins with one


class Place(Protocol):
    """Where the values of a tensor lie; indexing reads them, as of a tensor.

    Small and picklable, so that it can be sent to another process.
    """

    def __getitem__(self, index: Index) -> Tensor:
        """Values in memory of their own."""
        ...

    def files(self) -> tuple[Path, ...]:
        """The files that are read."""
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of its file describes it.

    Attributes:
        name: in its file.
        shape: of the whole tensor.
        dtype: as torch names it ("bfloat16"), or the file's own code where it has none.
        place: where its values lie.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    place: Place


@dataclass(frozen=True)
class OfFile:
    """A place in one file."""

    file: Path

    def files(self) -> tuple[Path, ...]:
        """That file."""
        return (self.file,)


@dataclass(frozen=True)
class InFile(OfFile):
    """A tensor of a safetensors file."""

    key: str

    def __getitem__(self, index: Index) -> Tensor:
        handle = open_safetensors(self.file)
        with naming(self.file):
            return owned(self.file, handle.get_slice(self.key)[index])


@dataclass(frozen=True)
class Pieces:
    """A tensor that lies in pieces, each at its offsets.

    Attributes:
        shape: of the whole tensor.
        dtype: as torch names it.
        pieces: (offsets, shape of the piece, its place).
    """

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[tuple[tuple[int, ...], tuple[int, ...], Place], ...]

    def __getitem__(self, index: Index) -> Tensor:
        first, rest = (index[0], index[1:]) if isinstance(index, tuple) else (index, ())
        if isinstance(first, slice):
            low, high, step = first.indices(self.shape[0])
            inner: Index = slice(0, max(0, high - low), step)
        else:
            low, high, inner = first, first + 1, 0
        return self._rows(low, max(low, high))[(inner, *rest)]

    def _rows(self, low: int, high: int) -> Tensor:
        """Rows low to high, from the pieces that have some of them."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        whole = torch.empty((high - low, *self.shape[1:]), dtype=dtype)
        for offsets, shape, place in self.pieces:
            start, stop = max(low, offsets[0]), min(high, offsets[0] + shape[0])
            if start >= stop:
                continue
            target = (
                slice(start - low, stop - low),
                *(slice(o, o + n) for o, n in zip(offsets[1:], shape[1:], strict=True)),
            )
            # to its end without a number, so that a longer one shows
            end = None if stop == offsets[0] + shape[0] else stop - offsets[0]
            found = place[start - offsets[0] : end]
            if found.shape != whole[target].shape:
                raise ValueError(
                    f"{place.files()[0]} holds values of shape {tuple(found.shape)}, "
                    f"expected {tuple(whole[target].shape)} as its metadata says; "
                    "copy the files of one save again"
                )
            whole[target] = found
        return whole

    def files(self) -> tuple[Path, ...]:
        """Of all pieces."""
        found = [file for _, _, place in self.pieces for file in place.files()]
        return tuple(dict.fromkeys(found))


def put_together(
    folder: Path,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    pieces: Sequence[tuple[tuple[int, ...], tuple[int, ...], Place]],
    remedy: str = "expected the files of one save, copy them again",
) -> Stored:
    """A tensor of its pieces.

    Raises:
        ValueError: they do not make up a whole.
    """
    if lacking := uncovered(shape, pieces):
        raise ValueError(f"{folder} has no whole {name}: {lacking}; {remedy}")
    place: Place = Pieces(shape, dtype, tuple(pieces))
    if len(pieces) == 1 and isinstance(pieces[0][2], InFile):
        place = pieces[0][2]  # its own file's header says what it is
    return Stored(name, shape, dtype, place)


def uncovered(shape: Sequence[int], pieces: Sequence[tuple[Any, ...]]) -> str:
    """What keeps pieces from making up a whole tensor; nothing if they do.

    Args:
        shape: of the whole tensor.
        pieces: (offsets, shape, ...) each.
    """
    volume = 0
    for offsets, size, *_ in pieces:
        if len(offsets) != len(shape) or len(size) != len(shape):
            return "a piece has another number of axes"
        ends = [o + n for o, n in zip(offsets, size, strict=True)]
        if any(o < 0 for o in offsets) or any(
            e > n for e, n in zip(ends, shape, strict=True)
        ):
            return f"a piece reaches to {tuple(ends)} of {tuple(shape)}"
        volume += math.prod(size)
    if volume < math.prod(shape):
        return f"pieces hold {volume} of {math.prod(shape)} values"
    return "" if volume == math.prod(shape) else "pieces overlap"


# Codes of safetensors -> dtypes whose matrices are measured.
FLOAT_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
}


def header(file: Path) -> list[Stored]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: a truncated or damaged file.
    """
    handle = open_safetensors(file)
    with naming(file):
        names = list(handle.keys())
        slices = [handle.get_slice(name) for name in names]
        return [
            Stored(
                name,
                tuple(s.get_shape()),
                FLOAT_DTYPES.get(s.get_dtype(), s.get_dtype()),
                InFile(file, name),
            )
            for name, s in zip(names, slices, strict=True)
        ]


def metadata(file: Path) -> dict[str, str]:
    """The free text in the header of a safetensors file."""
    handle = open_safetensors(file)
    with naming(file):
        return dict(handle.metadata() or {})

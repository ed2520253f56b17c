"""Open files of checkpoints: each is opened once and its header read once.

What is read from a mapped file stays in memory while the file is open, so a file is
opened anew after `OPEN_BYTES` of reading: memory stays bounded by that and by the
largest tensor, and a file of twenty thousand small tensors is parsed once.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def close_all() -> None:
    """Close every file."""
    _open.clear()


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

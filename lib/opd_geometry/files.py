"""Where data lie, and writing so that nothing half-written carries its final name."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

CHECKOUT_DATA = Path(__file__).resolve().parents[2] / "data"
WRITABLE_DATA = "make room there, or name a writable folder in OPD_GEOMETRY_DATA"


def data_directory() -> Path:
    """``data/`` of the checkout, or the directory named by ``OPD_GEOMETRY_DATA``."""
    return Path(os.environ.get("OPD_GEOMETRY_DATA") or CHECKOUT_DATA)


def shelves() -> list[Path]:
    """Where committed data may lie: the data directory, then that of the checkout."""
    return list(dict.fromkeys([data_directory(), CHECKOUT_DATA]))


def on_shelf(name: str | Path) -> Path:
    """Where a committed file or folder lies; in the data directory if nowhere.

    Args:
        name: relative to the data directory, such as ``paper/table.csv``, or absolute.
    """
    places = [shelf / name for shelf in shelves()]
    return next((place for place in places if place.exists()), places[0])


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to a draft beside ``path``; it takes the name only once it is whole."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def clear_write_errors(place: Path, remedy: str = WRITABLE_DATA) -> Iterator[None]:
    """Turn a full disk or a read-only folder into one clear line.

    Args:
        place: what could not be written to.
        remedy: what the reader can do about it.

    Raises:
        ValueError: instead of any error that writing gives.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _write_error(error)
        if reason is None:
            raise
        raise ValueError(f"cannot write below {place}: {reason}; {remedy}") from error


def _write_error(error: BaseException) -> str | None:
    """What the system said when writing failed; None if the error is another one."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError):  # how safetensors reports any of them
        return str(error)
    # torch.save raises a RuntimeError of its own while it handles the OSError
    inner = error.__context__
    return _write_error(inner) if isinstance(inner, OSError) else None

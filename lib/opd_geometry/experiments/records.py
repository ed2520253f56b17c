"""What a run leaves behind and what guards it: records, digests, locks.

A file whose bits decide a number has its SHA-256 beside it, in ``NAME.sha256`` as
``sha256sum`` writes it, and is checked before it is used. The digest is written first
and that of the file it replaces stays on the second line, so that a process killed
between the two leaves a file that is recognised.
"""

import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from errno import ENOLCK, ENOSYS, EOPNOTSUPP
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from opd_geometry.files import replacing
from opd_geometry.printing import duration

REMIND_SECONDS = 60.0  # from one line about a lock that is waited for to the next
LARGEST = 10**12  # of a count or of seconds: beyond it a record is damaged
NO_LOCKS = (ENOSYS, ENOLCK, EOPNOTSUPP)  # what a file system without locks answers

Check = tuple[Callable[[Any], bool], str]  # of a value, and what it should be


# --- records ---------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST < value < LARGEST


COUNT: Check = (
    lambda value: type(value) is int and 0 <= value < LARGEST,
    "a whole number",
)
SECONDS: Check = (lambda value: _is_number(value) and value >= 0, "seconds")
NUMBER_OR_NONE: Check = (
    lambda value: value is None or _is_number(value),
    "a number or null",
)
TEXT: Check = (lambda value: type(value) is str, "a text")
ANYTHING: Check = (lambda _: True, "anything")
MEASURED: Check = (  # NaN and inf among them: a metric may be undefined
    lambda value: type(value) is float or _is_number(value),
    "a number",
)


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that readers see the old file or the new one."""
    with replacing(path) as draft:
        draft.write_text(json.dumps(content, indent=1) + "\n")


def write_sealed_json(path: Path, content: Any) -> None:
    """``write_json``, with the digest beside it."""
    with sealing(path) as draft:
        draft.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: Path, checks: Mapping[str, Check]) -> dict[str, Any]:
    """What ``write_json`` wrote, if it is whole.

    Args:
        path: of a file in a run's directory.
        checks: keys that the content must have, and what each value must be.

    Raises:
        ValueError: one line naming the file, if it is missing or damaged, lacks a key,
            or has a value of another kind.
    """
    try:
        check_seal(path)
        content = json.loads(path.read_text())
        if type(content) is not dict:
            raise ValueError(f"it holds a {type(content).__name__}")
        for key, (fits, kind) in checks.items():
            if key not in content:
                raise ValueError(f"it has no {key}")
            if not fits(content[key]):
                shown = repr(content[key])[:40]
                raise ValueError(f"{key} is {shown} and not {kind}")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is missing or damaged ({_said(error)}), expected "
            f"{', '.join(checks) or 'an object'}; remove {path.parent} to train that "
            "run anew"
        ) from error
    return content


def read_history(path: Path) -> list[dict[str, Any]]:
    """A run's per-step metrics: step, metric, value.

    Raises:
        ValueError: as ``read_json``, or a record of another kind.
    """
    of_one = {"step": COUNT, "metric": TEXT, "value": MEASURED}

    def fits(records: Any) -> bool:
        return type(records) is list and all(
            type(record) is dict
            and all(key in record and of_one[key][0](record[key]) for key in of_one)
            for record in records
        )

    checks = {"records": (fits, "a list of records with step, metric and value")}
    return list(read_json(path, checks)["records"])


def _said(error: BaseException) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return " ".join(str(error).split()) or type(error).__name__


# --- digests ---------------------------------------------------------------------


def digest_of(path: Path) -> str:
    """SHA-256 of a file, as ``sha256sum`` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(path: Path, content: Path | None = None) -> None:
    """Write the digest of a file beside it, and keep that of the one before.

    Args:
        path: the file.
        content: what is about to take its name; the file itself if None.
    """
    digests = [digest_of(content or path)]
    if content is not None and path.is_file():
        earlier = digest_of(path)
        digests += [earlier] if earlier in _known_digests(path) else []
    lines = [f"{digest}  {path.name}\n" for digest in digests]
    with replacing(_seal_of(path)) as draft:
        draft.write_text("".join(lines))


@contextmanager
def sealing(path: Path) -> Iterator[Path]:
    """``replacing``, with the digest beside the file before it takes its name."""
    with replacing(path) as draft:
        yield draft
        seal(path, draft)


def check_seal(path: Path) -> bool:
    """Whether a file has a digest beside it, which then is its own.

    Raises:
        ValueError: the digest beside it is that of another content.
    """
    known = _known_digests(path)
    if known and digest_of(path) not in known:
        raise ValueError(f"its content is not that of {_seal_of(path).name} beside it")
    return bool(known)


def unseal(path: Path) -> None:
    """Remove a file, and the digest beside it."""
    path.unlink(missing_ok=True)
    _seal_of(path).unlink(missing_ok=True)


def _seal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _known_digests(path: Path) -> list[str]:
    place = _seal_of(path)
    if not place.is_file():
        return []
    # a damaged digest is one that fits nothing
    return [line[:64] for line in place.read_text(errors="replace").splitlines()] or [
        ""
    ]


# --- locks -----------------------------------------------------------------------


@contextmanager
def locked(place: Path, what: str) -> Iterator[None]:
    """Hold a lock; while another process has it, say on stderr whose and how long.

    Args:
        place: the lock's file. It holds who has it, which outlives a process that was
            killed; the lock itself does not.
        what: the lock is for, in the lines about waiting.

    Raises:
        ValueError: the file system has no locks.
    """
    lock = FileLock(place, fallback_to_soft=False)
    with _named(place):
        waiting = 0.0  # the first attempt does not wait
        while True:
            try:
                lock.acquire(timeout=waiting)
                break
            except Timeout:
                print(f"waiting for {what}: {holder(place)}", file=sys.stderr)
                waiting = REMIND_SECONDS
    try:
        with suppress(OSError):  # a full disk: the lock holds all the same
            owner = {"pid": os.getpid(), "host": platform.node(), "since": time.time()}
            place.write_text(json.dumps(owner) + "\n")
        yield
    finally:
        lock.release()


def is_locked(place: Path) -> bool:
    """Whether some process holds a lock.

    Raises:
        ValueError: the file system has no locks.
    """
    try:
        with _named(place), FileLock(place, timeout=0, fallback_to_soft=False):
            return False
    except Timeout:
        return True
    except OSError:  # a folder that cannot be written holds no lock
        return False


def holder(place: Path) -> str:
    """Who holds a lock, and since when, in a few words."""
    try:
        owner = json.loads(place.read_text())
        since = float(owner["since"])
        took = duration(max(0.0, time.time() - since)) if math.isfinite(since) else "?"
        return f"process {owner['pid']} on {owner['host']} has had it for {took}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"another process holds {place}"


@contextmanager
def _named(place: Path) -> Iterator[None]:
    """Name a file system without locks for what it is."""
    try:
        yield
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        raise ValueError(
            f"{place.parent} lies on a file system without locks "
            f"({_said(error)}), expected one that keeps two processes apart; name a "
            "folder on a local disk in OPD_GEOMETRY_DATA"
        ) from error

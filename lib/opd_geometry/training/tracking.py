"""A run's metrics while it trains, through Accelerate's trackers.

``OPD_GEOMETRY_TRACKER`` names one: tensorboard, wandb, trackio or none. Without it runs
on a dataset write TensorBoard's files, and the small ones nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from opd_geometry.training import ranks

TRACKERS = ("tensorboard", "wandb", "trackio")
PROJECT = "opd-geometry"  # in which those that know projects keep the runs
Log = Callable[[dict[str, float], int], None]  # of metrics and their step


@contextmanager
def tracked(name: str, folder: Path, usual: str = "none") -> Iterator[Log]:
    """What takes a run's metrics within; only on the first rank does it do anything.

    Args:
        name: of the run; each tracker's own name for it.
        folder: where those that write files do.
        usual: the tracker where the environment names none.

    Raises:
        ValueError: an unknown tracker, or one that is not installed.
    """
    kind = os.environ.get("OPD_GEOMETRY_TRACKER") or usual
    if kind not in (*TRACKERS, "none"):
        raise ValueError(
            f"OPD_GEOMETRY_TRACKER {kind!r}: expected {', '.join(TRACKERS)} or none"
        )
    if kind == "none" or ranks.index() > 0:
        yield lambda *_: None
        return
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # else accelerate's own logger refuses what its trackers say
    made = LOGGER_TYPE_TO_CLASS[kind]
    try:
        if made.requires_logging_directory:
            tracker = made(name, folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            apart = {"dir": str(folder)} if kind == "wandb" else {}
            tracker = made(PROJECT, name=name, **apart)
        tracker.start()
    except ImportError as error:
        raise ValueError(
            f"{kind} is not installed: pip install {kind}, or set "
            "OPD_GEOMETRY_TRACKER to another or to none"
        ) from error
    except Exception as error:  # no account, no network, another release
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{kind} does not start: {said}; set OPD_GEOMETRY_TRACKER to another or "
            "to none"
        ) from error
    try:
        yield lambda metrics, step: tracker.log(metrics, step=step)
    finally:
        tracker.finish()

"""Time the nulls and the locking nulls against a build that had the Gaussian one alone.

The earlier build comes out of version control into a folder that is removed again. Both
sides run in processes of their own, in turn, on the same matrices. See README.md.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from records import record, seconds

from opd_geometry.printing import print_table

EARLIER = "534ea8d"
SIZES = "128x128,512x512,1024x1024,4096x512,2048x2048"
STEPS = (20, 40, 60, 80, 100)  # checkpoints of a run, and of its walk
LARGE = 2**21  # entries, at which every call is timed twice, and beyond once
SMALL = 2**15  # entries, up to which others on the machine are most of what is timed
ROOT = Path(__file__).parents[1]


def calls(rows: int, cols: int) -> dict[str, Callable[[], object]]:
    """What this side's build can be timed at, on matrices that it makes anew."""
    from opd_geometry.geometry import comparison as c
    from opd_geometry.geometry import pairs

    generator = torch.Generator().manual_seed(rows + cols)
    w = (0.02 * torch.randn(rows, cols, generator=generator)).bfloat16()
    noise = torch.randn(rows, cols, generator=generator)
    low = noise[:, :8] @ torch.randn(8, cols, generator=generator)
    after = w + 1e-4 * (noise + low)
    metrics = [pairs.METRICS[n] for n in pairs.NULL_METRICS if "energy" not in n]
    run = {t: w + 2e-5 * ((t / 20) ** 0.5 * noise + t / 20 * low) for t in STEPS}

    def follow(**how: Any) -> Callable[[], object]:
        return lambda: pairs.follow_tensors(w, run.__getitem__, STEPS, **how)

    if not hasattr(c, "compare_turned"):
        before = c.reference(w)
        c.compare(before, after)
        return {
            "trajectory": follow(),
            "gaussian": lambda: c.compare_null(before, after, 0, metrics),
        }
    before = c.reference(w, bottom=True)
    c.compare(before, after, [*c.METRICS, *c.ENERGY])
    walker = pairs.locking.Optimizer((1e-4,) * max(STEPS))
    return {
        "trajectory_without_walk": follow(readout=False),
        "trajectory": follow(readout=False, optimizer=walker),
        "trajectory_readout": follow(optimizer=walker),
        "shuffled": lambda: c.compare_shuffled(before, after, 0),
        "turned": lambda: c.compare_turned(before, after, 0),
        "energy": lambda: c.compare(before, after, c.ENERGY),
        "expected": lambda: c.compare_expected(before, after),
    }


def measured(rows: int, cols: int) -> dict[str, float]:
    """Processor seconds of every call, the smallest of some, of large ones of two."""
    for call in calls(400, 300).values():
        call()  # the first one loads libraries
    n = rows * cols
    times = 40 if n <= SMALL else 5 if n < LARGE else 2 if n == LARGE else 1
    return {
        name: seconds(call, times)["cpu_seconds"]
        for name, call in calls(rows, cols).items()
    }


def side(library: Path, size: str, threads: int) -> dict[str, float]:
    """`measured` in a process of its own, with one of the builds."""
    there = os.environ | {"PYTHONPATH": str(library), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--side", size, "--threads", str(threads)]
    done = subprocess.run(
        command, env=there, check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


@click.command()
@click.option("--sizes", default=SIZES, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--side", "only", hidden=True)
def main(sizes: str, threads: int, only: str | None) -> None:
    """Print and record the ratios."""
    torch.set_num_threads(threads)
    if only:
        rows, cols = map(int, only.split("x"))
        click.echo(json.dumps(measured(rows, cols)))
        return
    archive = subprocess.run(
        ["git", "archive", EARLIER, "lib"], cwd=ROOT, check=True, capture_output=True
    )
    table = []
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as packed:
            packed.extractall(folder, filter="data")
        for size in sizes.split(","):
            best: dict[str, float] = {}
            rows, cols = map(int, size.split("x"))
            for _ in range(3 if rows * cols <= LARGE else 1):
                for name, library in (
                    ("earlier_", Path(folder) / "lib"),
                    ("", ROOT / "lib"),
                ):
                    for what, taken in side(library, size, threads).items():
                        key = name + what
                        best[key] = min(taken, best.get(key, taken))
            added = sum(best[n] for n in ("shuffled", "turned", "energy", "expected"))
            table.append(
                {
                    "size": size,
                    **best,
                    "added_over_gaussian": added / best["earlier_gaussian"],
                    **{
                        f"{name}_over_earlier": value / best["earlier_trajectory"]
                        for name, value in best.items()
                        if name.startswith("trajectory")
                    },
                }
            )
            record("nulls", table[-1:], ["size"])
    names = list(table[0])
    print_table(
        names,
        [[str(row["size"]), *(f"{row[n]:.3g}" for n in names[1:])] for row in table],
    )


if __name__ == "__main__":
    main()

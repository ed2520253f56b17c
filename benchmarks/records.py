"""What both checkpoint benchmarks share: timing, and results with provenance."""

import datetime
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import scipy
import torch

RESULTS = Path(__file__).parents[1] / "data" / "benchmarks"


def seconds(call: Callable[[], Any], repeats: int = 1) -> dict[str, float]:
    """Wall and processor seconds of a call, each the smallest of the repeats."""
    wall, cpu = [], []
    for _ in range(repeats):
        start, start_cpu = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    return {"wall_seconds": min(wall), "cpu_seconds": min(cpu)}


def provenance() -> dict[str, Any]:
    """Where and when a number comes from."""
    return {
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "machine": f"{platform.system()} {platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "scipy": scipy.__version__,
        "date": datetime.date.today().isoformat(),
    }


def record(name: str, rows: list[dict[str, Any]], key: list[str]) -> Path:
    """Put rows into data/benchmarks/NAME.csv in place of those with the same key."""
    path = RESULTS / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = pd.DataFrame([row | provenance() for row in rows])
    if path.is_file():
        old = pd.read_csv(path)
        taken = set(map(tuple, fresh[key].astype(str).to_numpy()))
        kept = [tuple(row) not in taken for row in old[key].astype(str).to_numpy()]
        fresh = pd.concat([old[kept], fresh], ignore_index=True)
    fresh.to_csv(path, index=False, float_format="%.6g")
    return path

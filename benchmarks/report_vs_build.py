"""Time `opd-geometry report` of this checkout against an earlier one, on one table.

    git worktree add --detach ../earlier 534ea8d
    python benchmarks/report_vs_build.py TABLE.csv --earlier ../earlier

Both run as processes of their own, one after the other, on the same table; this
checkout also on tables of more rows, whose peak of memory is taken. Processor seconds
of a process, imports included, and by the clock go to data/benchmarks/report.csv.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from records import record

ROOT = Path(__file__).resolve().parents[1]
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
CALL = "import sys; from opd_geometry.cli import main; sys.exit(main(sys.argv[1:]))"


def timed(tree: Path, table: Path, page: Path) -> dict[str, float]:
    """Seconds and megabytes of one report."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "lib")}
    command = [sys.executable, "-c", CALL, "report", str(table), "--out", str(page)]
    started = time.perf_counter()
    process = subprocess.Popen([*command, "--force"], env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the report of {tree} failed")
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_megabytes": usage.ru_maxrss / 1024,
    }


def deeper(table: pd.DataFrame, rows: int) -> pd.DataFrame:
    """The same matrices over and over, seven a layer."""
    found = pd.concat([table] * (rows // len(table) + 1), ignore_index=True).head(rows)
    places = pd.RangeIndex(rows)
    roles = [ROLES[place % len(ROLES)] for place in places]
    return found.assign(layer=places // len(ROLES), role=roles)


def main() -> None:
    """Run all, print the ratio and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("--earlier", type=Path, required=True)
    parser.add_argument("--rows", default="5000,50000")
    options = parser.parse_args()
    table = pd.read_csv(options.table)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "r.html"
        rows = []
        for build, tree in (("earlier", options.earlier), ("this", ROOT)):
            found = timed(tree, options.table, page)
            rows.append({"build": build, "rows": len(table), **found})
        for n in map(int, options.rows.split(",")):
            large = Path(folder) / f"{n}.csv"
            deeper(table, n).to_csv(large, index=False)
            rows.append({"build": "this", "rows": n, **timed(ROOT, large, page)})
    earlier, this = rows[0], rows[1]
    for name in ("seconds", "cpu_seconds"):
        print(f"{name}: {earlier[name] / this[name]:.1f} times")
    print(pd.DataFrame(rows).round(2).to_string(index=False))
    record("report", rows, ["build", "rows"])


if __name__ == "__main__":
    main()

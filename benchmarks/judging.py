"""Time `opd-geometry claims` of this checkout against an earlier one, in one run.

    python benchmarks/judging.py [--earlier 534ea8d] [--repeats 3]

Trees are put together in a folder of their own: the earlier commit as it was; its
tables under today's library; today's tables of the runs that it lists under both
libraries; and this checkout as it stands, two worlds, for which there is no earlier
one. Each command is a process of its own, a world named where both builds run; they
take turns. Processor seconds of the whole process, imports included, are medians and go
to data/benchmarks/judging.csv.
"""

import argparse
import csv
import io
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pandas as pd
from records import record

from opd_geometry.experiments.listing import (
    PROVENANCE,
    TABLE_DIGEST,
    read_lines,
    write_listing,
)
from opd_geometry.experiments.records import digest_of

ROOT = Path(__file__).resolve().parents[1]
CALL = "import sys; from opd_geometry.cli import main; sys.exit(main(sys.argv[1:]))"
TABLES = "data/measurements"


def unpacked(commit: str, folder: Path) -> Path:
    """The library and the data of a commit."""
    command = ["git", "-C", str(ROOT), "archive", commit, "lib", "data"]
    content = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(content)) as files:
        files.extractall(folder, filter="data")
    return folder


def laid_out(folder: Path, library: Path, tables: Path, runs: set[str]) -> Path:
    """A library with some runs' tables, listed as both builds read a list."""
    shutil.copytree(library / "lib", folder / "lib")
    shutil.copytree(
        ROOT / "data", folder / "data", ignore=shutil.ignore_patterns("*.parquet")
    )
    shutil.copytree(
        ROOT / TABLES / "pairs", folder / TABLES / "pairs", dirs_exist_ok=True
    )
    (folder / "data" / "claims.csv").unlink(missing_ok=True)
    rows = []
    for line in listed(tables):
        if line["run"] in runs:
            name = f"{line['arm']}-s{line['seed']}-{line['run']}.parquet"
            shutil.copy(tables / TABLES / name, folder / TABLES / name)
            digest = digest_of(folder / TABLES / name)
            kept = {k: line[k] for k in PROVENANCE if k in line}
            rows.append({**kept, TABLE_DIGEST: digest})
    write_listing(folder / TABLES / "runs.csv", [], rows)
    return folder


def listed(tree: Path) -> list[dict[str, str]]:
    """The committed runs of a tree, whichever build wrote the list."""
    with open(tree / TABLES / "runs.csv", newline="") as file:
        return list(csv.DictReader(file))


def seconds(tree: Path, *options: str) -> float:
    """Processor seconds of one judging."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "lib")}
    environment.pop("OPD_GEOMETRY_DATA", None)
    command = [sys.executable, "-c", CALL, "claims", *options]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the claims of {tree} failed")
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Run all in turn, print the ratios and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--earlier", default="534ea8d")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        then = unpacked(options.earlier, folder / "then")
        runs = {line["run"] for line in listed(then)}
        now = {line["run"] for line in read_lines(ROOT / TABLES / "runs.csv")}
        both = runs & now
        one = ("--profile", "published")
        cases = [
            ("earlier", options.earlier, laid_out(folder / "a", then, then, runs), one),
            ("earlier", "this", laid_out(folder / "b", ROOT, then, runs), one),
            ("today", options.earlier, laid_out(folder / "c", then, ROOT, both), one),
            ("today", "this", laid_out(folder / "d", ROOT, ROOT, both), one),
            ("today, two worlds", "this", laid_out(folder / "e", ROOT, ROOT, now), ()),
        ]
        sizes = [len(runs), len(runs), len(both), len(both), len(now)]
        taken: list[list[float]] = [[] for _ in cases]
        for _ in range(options.repeats):  # written each time: a turn may take minutes
            for times, (_, _, tree, asked) in zip(taken, cases, strict=True):
                times.append(seconds(tree, *asked))
            rows = [
                {"tables": tables, "build": build, "runs": n} | told(times)
                for (tables, build, *_), n, times in zip(
                    cases, sizes, taken, strict=True
                )
            ]
            for i in (1, 3):
                before, after = (rows[k]["cpu_seconds"] for k in (i - 1, i))
                rows[i]["times_as_fast"] = before / after
            record("judging", rows, ["tables", "build"])
    print(pd.DataFrame(rows).round(2).to_string(index=False))


def told(times: list[float]) -> dict[str, float]:
    """What is written of the repeats of a case."""
    return {
        "cpu_seconds": statistics.median(times),
        "fastest": min(times),
        "repeats": len(times),
    }


if __name__ == "__main__":
    main()

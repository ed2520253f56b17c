"""How often the intervals of `measure --sample N` hold the mean over all matrices.

    python benchmarks/sample_coverage.py [BEFORE AFTER] [--sample 16] [--draws 100]

Every matrix of the pair is measured once; measuring is deterministic, so a sample's
rows are rows of that table. Each draw is one of `sampling.draw`, its means and
intervals are those that the command prints. Writes data/benchmarks/sample.csv: a row a
metric, with the share of draws whose interval holds the full mean, and the mean half
width relative to it.
"""

import argparse

import numpy as np
import pandas as pd
from records import record

from opd_geometry.geometry import sampling
from opd_geometry.geometry.pairs import measure_checkpoints

PAIR = ("data/checkpoints/laptop-sft-s0", "data/checkpoints/laptop-opd-s0")


def design(table: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """What `sampling.sampled` draws, from a table instead of a plan."""
    found = sampling.strata(list(table["role"]), list(table["layer"]), n)
    rows = {
        table["matrix"][place]: (h, len(found[h].members), found[h].drawn)
        for h, place in sampling.draw(found, seed)
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=[*sampling.STRATA])


def main() -> None:
    """Measure, draw, count and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pair", nargs="*", default=PAIR)
    parser.add_argument("--sample", type=int, default=16)
    parser.add_argument("--draws", type=int, default=100)
    options = parser.parse_args()
    table = measure_checkpoints(*options.pair)
    full = sampling.estimates(table, design(table, len(table), 0))["mean"]
    held: dict[str, list[bool]] = {}
    widths: dict[str, list[float]] = {}
    for seed in range(options.draws):
        drawn = design(table, options.sample, seed)
        found = sampling.estimates(table[table["matrix"].isin(drawn.index)], drawn)
        for name, row in found.iterrows():
            held.setdefault(name, []).append(row["low"] <= full[name] <= row["high"])
            widths.setdefault(name, []).append(row["half_width"] / abs(full[name]))
    rows = [
        {
            "metric": name,
            "matrices": len(table),
            "sample": options.sample,
            "draws": options.draws,
            "held": np.mean(held[name]),
            "relative_half_width": np.mean(widths[name]),
        }
        for name in held
    ]
    found = pd.DataFrame(rows)
    print(found.round(3).to_string(index=False))
    print(f"over all metrics {found['held'].mean():.3f}")
    record("sample", rows, ["metric", "matrices", "sample"])


if __name__ == "__main__":
    main()

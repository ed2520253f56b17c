"""How often the intervals of `measure --sample N` hold the mean over all matrices.

    python benchmarks/sample_coverage.py [BEFORE AFTER] [--sample 16] [--draws 100]
    python benchmarks/sample_coverage.py --run DIGEST [--sample 28]

Every matrix of the pair is measured once; measuring is deterministic, so a sample's
rows are rows of that table. Each draw is one of `sampling.draw`, its means and
intervals are those that the command prints. Writes data/benchmarks/sample.csv: a row a
metric, with the share of draws whose interval holds the full mean, and the mean half
width relative to it. With --run the matrices are those of a committed run's end, such
as the language model's, where every matrix counts once.
"""

import argparse

import numpy as np
import pandas as pd
from records import RESULTS, record

from opd_geometry.geometry import sampling
from opd_geometry.geometry.defaults import STRATA
from opd_geometry.geometry.pairs import COLUMNS, METRICS, measure_checkpoints

PAIR = ("data/checkpoints/laptop-sft-s0", "data/checkpoints/laptop-opd-s0")


def design(table: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """What `sampling.sampled` draws, from a table instead of a plan."""
    found = sampling.strata(list(table["role"]), list(table["layer"]), n)
    rows = {
        table["matrix"][place]: (h, len(found[h].members), found[h].drawn)
        for h, place in sampling.draw(found, seed)
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=[*STRATA])


def of_run(digest: str) -> pd.DataFrame:
    """The end of a committed run in the form of `measure_checkpoints`."""
    (place,) = (RESULTS.parent / "measurements").glob(f"*-{digest}.parquet")
    long = pd.read_parquet(place)
    long = long[(long["step"] == long["step"].max()) & (long["matrix"] != "all")]
    names = {
        f"{kind}{own}": f"{kind}{name}"
        for name, own in METRICS.items()
        for kind in ("", "null_")
    }
    long = long[long["metric"].isin(names) & (long["layer"] >= 0)]
    wide = long.pivot_table(
        "value", ["matrix", "role", "layer"], "metric"
    ).reset_index()
    whole = wide.dropna(axis="columns").rename(columns=names)
    return whole.reindex(columns=COLUMNS).assign(rows=1, cols=1)


def main() -> None:
    """Measure, draw, count and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pair", nargs="*", default=PAIR)
    parser.add_argument("--run", help="digest of a committed run")
    parser.add_argument("--sample", type=int, default=16)
    parser.add_argument("--draws", type=int, default=1000)
    options = parser.parse_args()
    table = of_run(options.run) if options.run else measure_checkpoints(*options.pair)
    full = sampling.estimates(table.join(design(table, len(table), 0), on="matrix"))[
        "mean"
    ]
    held: dict[str, list[bool]] = {}
    widths: dict[str, list[float]] = {}
    for seed in range(options.draws):
        drawn = design(table, options.sample, seed)
        found = sampling.estimates(table.join(drawn, on="matrix", how="inner"))
        for name, row in found.iterrows():
            rounding = 1e-12 * abs(full[name])
            inside = row["low"] - rounding <= full[name] <= row["high"] + rounding
            held.setdefault(name, []).append(inside)
            widths.setdefault(name, []).append(row["half_width"] / abs(full[name]))
    rows = [
        {
            "pair": options.run or "laptop",
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
    share = (found["held"] >= 0.95).mean()
    print(f"in {share:.3f} of the metrics in 95 % of the draws or more")
    record("sample", rows, ["pair", "metric", "matrices", "sample"])


if __name__ == "__main__":
    main()

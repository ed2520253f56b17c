"""Make a synthetic pair of checkpoints at Qwen3-8B's shapes and time its measurement.

The pair is sharded bf16 safetensors, written to a directory that is removed at the end.
At full size it takes 33 GB of disk; --layers and --shrink make it smaller.
"""

import json
import resource
import shutil
import tempfile
import time
from pathlib import Path

import click
import torch
from records import record
from safetensors.torch import save_file
from torch import Tensor

from opd_geometry.geometry import forecast, pairs
from opd_geometry.geometry.checkpoints import INDEX_NAME
from opd_geometry.printing import duration, print_table

HIDDEN, KEYS, INNER, VOCABULARY = 4096, 1024, 12288, 151936
CHANGED = 0.2  # share of the entries that move to the next bf16 number
CONFIG = {"model_type": "qwen3", "tie_word_embeddings": False}


def shapes(shrink: int) -> dict[str, tuple[int, int]]:
    """One block's matrices."""
    hidden, keys, inner = HIDDEN // shrink, KEYS // shrink, INNER // shrink
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


class Source:
    """Gaussian weights: drawn once a shape, shifted for every layer."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._drawn: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def pair(self, shape: tuple[int, int], layer: int) -> tuple[Tensor, Tensor]:
        """A matrix and the same with some entries moved by one bf16 step."""
        if shape not in self._drawn:
            w = torch.empty(shape, dtype=torch.bfloat16)
            changed = torch.empty(shape, dtype=torch.int16)
            for start in range(0, shape[0], 4096):
                part = w[start : start + 4096]
                noise = torch.randn(part.shape, generator=self._generator)
                part.copy_(noise * 0.02)
                draw = torch.rand(part.shape, generator=self._generator)
                changed[start : start + 4096].copy_(draw < CHANGED)
            self._drawn[shape] = w, changed
        w, changed = self._drawn[shape]
        before = w.roll(7 * layer + 1, 0)
        after = (before.view(torch.int16) + changed.roll(-layer, 0)).view(
            torch.bfloat16
        )
        return before, after


def write(directory: Path, layers: int, shrink: int) -> None:
    """The pair, below directory/before and directory/after, a shard a block."""
    sides = [directory / name for name in ("before", "after")]
    weight_map: dict[str, str] = {}
    for side in sides:
        side.mkdir(parents=True)
        (side / "config.json").write_text(json.dumps(CONFIG))
    outer = (VOCABULARY // shrink, HIDDEN // shrink)
    blocks = [{"model.embed_tokens.weight": outer}, {"lm_head.weight": outer}]
    blocks += [
        {f"model.layers.{i}.{name}.weight": s for name, s in shapes(shrink).items()}
        for i in range(layers)
    ]
    source = Source()
    for i, block in enumerate(blocks):
        shard = f"model-{i + 1:05d}-of-{len(blocks):05d}.safetensors"
        made = {name: source.pair(shape, i) for name, shape in block.items()}
        if i >= 2:
            norm = torch.ones(HIDDEN // shrink, dtype=torch.bfloat16)
            made[f"model.layers.{i - 2}.input_layernorm.weight"] = norm, norm
        weight_map |= dict.fromkeys(made, shard)
        for j, side in enumerate(sides):
            save_file({name: pair[j] for name, pair in made.items()}, side / shard)
    for side in sides:
        (side / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


@click.command(context_settings={"show_default": True})
@click.option("--layers", default=36, help="Blocks.")
@click.option("--shrink", default=1, help="Divides every side of every matrix.")
@click.option("--metrics", default="cheap", help="As of opd-geometry measure.")
@click.option("--null/--no-null", default=False)
@click.option("--jobs", default=2, help="Processes.")
@click.option("--directory", type=click.Path(path_type=Path), help="To write below.")
def main(
    layers: int,
    shrink: int,
    metrics: str,
    null: bool,
    jobs: int,
    directory: Path | None,
) -> None:
    """Print how long measuring took and would take; write it to data/benchmarks."""
    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp(prefix="synthetic-", dir=directory))
    try:
        entries = (2 * VOCABULARY * HIDDEN + layers * 192937984) / shrink**2
        need, free = 4.0 * entries, shutil.disk_usage(place).free
        if need > 0.9 * free:
            raise click.ClickException(
                f"the pair takes {need / 1e9:.0f} GB and {place} has "
                f"{free / 1e9:.0f}; name another --directory or fewer --layers"
            )
        started = time.perf_counter()
        write(place, layers, shrink)
        written = time.perf_counter()
        asked = pairs.parse_metrics(metrics.split(","))
        plan = pairs.plan_pair(
            place / "before", place / "after", metrics=asked, null=null
        )
        speed = forecast.probe_speed(plan)
        projected = forecast.projected_seconds(plan, speed, asked, null, jobs)
        full = forecast.projected_seconds(plan, speed, tuple(pairs.METRICS), True, jobs)
        begun = time.perf_counter()
        table = pairs.run_plan(plan, place / "table.parquet", jobs)
        done = time.perf_counter()
    finally:
        shutil.rmtree(place)
    who = resource.RUSAGE_CHILDREN if jobs > 1 else resource.RUSAGE_SELF
    row = {
        "layers": layers,
        "width": HIDDEN // shrink,
        "metrics": metrics,
        "null": null,
        "jobs": jobs,
        "matrices": len(table),
        "entries": plan.entries,
        "write_seconds": written - started,
        "seconds": done - begun,
        "projected_seconds": projected,
        "projected_full_suite_seconds": full,
        "peak_mib": resource.getrusage(who).ru_maxrss / 1024,
        "sparsity": float((table["sparsity_bf16"]).mean()),
    }
    record("growth", [row], ["layers", "width", "metrics", "null", "jobs"])
    print_table(
        list(row),
        [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()]],
    )
    click.echo(
        f"{plan.entries:.3g} entries, {metrics}: {duration(done - begun)} with {jobs} "
        f"processes (projected {duration(projected)}); the full suite with "
        f"nulls would take {duration(full)}"
    )


if __name__ == "__main__":
    main()

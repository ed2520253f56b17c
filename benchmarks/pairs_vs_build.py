"""Time the diagnostics of pairs in this checkout against an earlier one, in one run.

    git worktree add --detach ../earlier 534ea8d
    python benchmarks/pairs_vs_build.py --earlier ../earlier [--parts tiers,small,...]

Each side runs as a process of its own on the same files, and counts the processor
seconds of its own calls, without imports. Parts:

- tiers: cheap against middle on one matrix of each of Qwen3-8B's shapes, by rows of the
  command; a model is the sum over its numbers of them, and is not measured whole;
- small: a matrix of a file that holds 20,000 of 8 x 8, earlier over 20 of them;
- adapters: spectra of a LoRA update of rank 64 at 4096 x 4096, earlier on the merged
  copy, all in float64, with the largest relative difference;
- pair: every diagnostic that both have of a pair at 4096 x 4096, and the cheap ones;
- floor: a pair at 4096 x 4096 here, and the calls of LAPACK and BLAS in it alone;
- sample: the forecast of a sample at Qwen3-8B's shapes, and of the model of --real,
  against that of all; sampled: the same measured, at an eighth of the sides.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from checkpoints_vs_protocol import matrix_pair
from records import record, seconds
from safetensors.torch import save_file
from synthetic_8b import CONFIG, HIDDEN, VOCABULARY, shapes
from synthetic_8b import write as write_8b

from opd_geometry.geometry import forecast, gram, pairs, sampling

ROOT = Path(__file__).resolve().parents[1]
EARLIER = "534ea8d"
NAME = "model.layers.0.self_attn.q_proj.weight"
LAYERS = 36
REAL = "real-before", "real-after"  # links to a model of one's own, of --real
# What a side does with the files of a folder; prints seconds and values.
TASKS = """
import dataclasses, json, sys, time, torch
from opd_geometry.geometry import pairs
torch.set_num_threads(1)
def timed(call):
    start = time.process_time()
    return call(), time.process_time() - start
"""
SMALL = """
plan, planning = timed(lambda: pairs.plan_pair("a", "b", metrics=["cheap"], null=False))
some = dataclasses.replace(plan, tasks=plan.tasks[:N])
_, taken = timed(lambda: pairs.run_plan(some))
print(json.dumps({"planning": planning, "a_matrix": taken / N, "n": len(plan.tasks)}))
"""
ADAPTERS = """
pairs.follow_tensors(torch.zeros(300, 300), lambda s: torch.randn(300, 300), [1], 16)
later = ["step-1", "step-2"] if OLD else ["adapter-1", "adapter-2"]
table, taken = timed(lambda: pairs.trajectory("a", later, k=16))
names = ["stable_rank", "frobenius_norm", "hill_alpha", "similarity_to_end"]
print(json.dumps({"seconds": taken, "values": table[names].to_numpy().tolist()}))
"""
PAIR = """
from pathlib import Path
old = NAMES
found = pairs.plan_pair("a", "b", metrics=old, null=False).tasks[0].pair.read()
pairs.measure_tensors(torch.randn(300, 300), torch.randn(300, 300), null=False)
values, taken = timed(lambda: pairs.measure_tensors(*found, metrics=old, null=False))
print(json.dumps({"seconds": taken, "values": [values[name] for name in old]}))
"""


def in_build(tree: Path, folder: Path, code: str) -> dict:
    """What a side prints, run in a folder with that checkout's library."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "lib")}
    said = subprocess.run(
        [sys.executable, "-c", TASKS + code],
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(said.stdout.splitlines()[-1])


def write(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """A checkpoint of one file."""
    (folder / name).mkdir()
    save_file(tensors, folder / name / "model.safetensors")
    (folder / name / "config.json").write_text(json.dumps(CONFIG))


def tiers(folder: Path, _: Path) -> list[dict]:
    """Cheap and middle, reading included; a model by its numbers of matrices."""
    block = list(shapes(1).values())
    counts = {s: LAYERS * block.count(s) for s in dict.fromkeys(block)}
    rows, total = [], {"cheap": 0.0, "middle": 0.0}
    for i, (shape, n) in enumerate(counts.items()):
        before, after = matrix_pair(*shape)
        for name, w in (("a", before), ("b", after)):
            write(folder, f"{name}{i}", {NAME: w})
        taken = {}
        for tier in total:
            (task,) = pairs.plan_pair(
                folder / f"a{i}", folder / f"b{i}", metrics=[tier], null=False
            ).tasks
            taken[tier] = seconds(task.rows, 3)["cpu_seconds"]
            total[tier] += n * taken[tier]
        rows.append(
            _row("tiers", f"{shape[0]} x {shape[1]}", taken["cheap"], taken["middle"])
        )
    # Embedding and head, by the time an entry of the largest shape takes.
    entries = 2 * VOCABULARY * HIDDEN / (12288 * HIDDEN)
    for tier in total:
        total[tier] += entries * float(taken_of(rows, "12288 x 4096", tier))
    rows.append(_row("tiers", "8 B, extrapolated", total["cheap"], total["middle"]))
    return rows


def taken_of(rows: list[dict], case: str, tier: str) -> float:
    """A tier's seconds in a row."""
    (row,) = (row for row in rows if row["case"] == case)
    return row["earlier_seconds" if tier == "cheap" else "seconds"]


def small(folder: Path, earlier: Path) -> list[dict]:
    """20,000 tensors in one file."""
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(20_000)]
    for side in ("a", "b"):
        write(folder, side, {n: torch.randn(8, 8, generator=generator) for n in names})
    old = in_build(earlier, folder, SMALL.replace("N", "20", 2))
    new = in_build(ROOT, folder, SMALL.replace("N", "2000", 2))
    return [
        _row("small", "a matrix", old["a_matrix"], new["a_matrix"]),
        _row("small", "planning", old["planning"], new["planning"]),
    ]


def adapters(folder: Path, earlier: Path) -> list[dict]:
    """A LoRA update from its factors and from a merged copy."""
    generator = torch.Generator().manual_seed(0)
    side, rank = 4096, 64
    w = torch.randn(side, side, generator=generator).double() * 0.02
    write(folder, "a", {NAME: w})
    stem = f"base_model.model.{NAME.removesuffix('.weight')}"
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    config |= {
        "target_modules": ["q_proj"],
        "base_model_name_or_path": str(folder / "a"),
    }
    for step in (1, 2):
        a = torch.randn(rank, side, generator=generator).double() * 0.02
        b = torch.randn(side, rank, generator=generator).double() * 0.01
        write(folder, f"step-{step}", {NAME: w + b @ a})
        place = folder / f"adapter-{step}"
        place.mkdir()
        factors = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        save_file(factors, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(json.dumps(config))
    old = in_build(earlier, folder, ADAPTERS.replace("OLD", "True"))
    new = in_build(ROOT, folder, ADAPTERS.replace("OLD", "False"))
    row = _row("adapters", "two steps, 4096, r = 64", old["seconds"], new["seconds"])
    return [row | {"largest_difference": _largest(old["values"], new["values"])}]


def _largest(old: list, new: list) -> float:
    a, b = (torch.tensor(v, dtype=torch.float64) for v in (old, new))
    return float(((a - b).abs() / a.abs())[a.isfinite()].max())


def pair(folder: Path, earlier: Path) -> list[dict]:
    """Every diagnostic that both builds have, and the cheap ones."""
    before, after = matrix_pair(4096, 4096)
    for name, w in (("a", before), ("b", after)):
        write(folder, name, {NAME: w})
    shared = [
        n for n in pairs.METRICS if n not in (*pairs.comparison.ENERGY, "top_share")
    ]
    code = PAIR.replace("NAMES", repr(shared))
    old, new = in_build(earlier, folder, code), in_build(ROOT, folder, code)
    row = _row("pair", "4096 x 4096", old["seconds"], new["seconds"])
    rows = [row | {"largest_difference": _largest(old["values"], new["values"])}]
    cheap = seconds(
        lambda: pairs.measure_tensors(before, after, metrics=["cheap"], null=False)
    )
    return [*rows, _row("pair", "cheap", float("nan"), cheap["cpu_seconds"])]


def floor(folder: Path, _: Path) -> list[dict]:
    """A pair in this build, and what its calls of libraries take alone.

    The same matrices in the same process; what is not in them is the most that
    anything but a faster library could save.
    """
    before, after = matrix_pair(4096, 4096)
    names = [n for n in pairs.METRICS if n not in pairs.comparison.ENERGY]
    whole = seconds(
        lambda: pairs.measure_tensors(before, after, metrics=names, null=False)
    )["cpu_seconds"]
    products, w = gram.gram(before), before.double()
    vectors, values = torch.linalg.qr(w[:, : 4096 // 8])
    reduced = gram._Tridiagonal.of(products.clone())
    calls = {
        "three Gram matrices": (3, lambda: gram.gram(before)),
        "two tridiagonalisations": (2, lambda: gram._Tridiagonal.of(products.clone())),
        "singular values of the update": (
            1,
            lambda: torch.linalg.eigvalsh(products, UPLO="U"),
        ),
        "two ways back of 512 vectors": (
            2,
            lambda: torch.ormqr(
                reduced.reflectors[1:, :-1], reduced.scales, vectors[1:]
            ),
        ),
        "two products of W with 512 vectors": (2, lambda: w @ vectors),
        "four products of 512 with 512 vectors": (4, lambda: vectors.T @ vectors),
        "four singular value problems of 512": (
            4,
            lambda: torch.linalg.svdvals(values),
        ),
    }
    rows = []
    for name, (n, call) in calls.items():
        rows.append(_row("floor", name, whole, n * seconds(call)["cpu_seconds"]))
    total = sum(row["seconds"] for row in rows)
    return [*rows, _row("floor", "all of these calls", whole, total)]


def sample(folder: Path, _: Path) -> list[dict]:
    """A forecast for every matrix of 8 B, from headers over files without contents."""
    for side in ("a", "b"):
        _hollow(folder / side)
    rows = []
    for what, pair in (("8 B", ("a", "b")), ("real model", REAL)):
        if not all((folder / side).exists() for side in pair):
            continue
        plan = pairs.plan_pair(*(folder / side for side in pair))
        speed = forecast.probe_speed(plan)
        whole = forecast.projected_seconds(plan, speed, ["all"], True)
        layers = sampling.layers_of(plan)
        for n in (16, 28):
            some = sampling.sampled(layers, n)
            taken = forecast.projected_seconds(some, speed, ["all"], True)
            case = f"{n} of {len(layers.tasks)}, {what}, forecast"
            rows.append(_row("sample", case, whole, taken))
    return rows


SHRINK = 8  # of the sides of the pair that is measured whole


def sampled(folder: Path, _: Path) -> list[dict]:
    """Samples and all matrices, measured: at an eighth of 8 B's sides, and for real."""
    write_8b(folder / "pair", LAYERS, SHRINK)
    places = ("pair/before", "pair/after"), REAL
    rows = []
    for what, pair in zip((f"8 B over {SHRINK}", "real model"), places, strict=True):
        if not all((folder / side).exists() for side in pair):
            continue
        sides = (folder / side for side in pair)
        plan = pairs.plan_pair(*sides, metrics=["all"], dequantise=True)
        layers = sampling.layers_of(plan)
        some = {n: sampling.sampled(layers, n) for n in (14, 28)}
        taken = {n: seconds(lambda p=p: pairs.run_plan(p)) for n, p in some.items()}
        whole = seconds(lambda plan=plan: pairs.run_plan(plan))["cpu_seconds"]
        for n, times in taken.items():
            case = f"{n} of {len(plan.tasks)}, {what}, measured"
            rows.append(_row("sample", case, whole, times["cpu_seconds"]))
            print(rows[-1], flush=True)
    return rows


def _hollow(place: Path) -> None:
    """Headers of a bf16 checkpoint at Qwen3-8B's shapes; files without blocks."""
    place.mkdir()
    blocks = [
        {f"model.layers.{i}.{name}.weight": s for name, s in shapes(1).items()}
        for i in range(LAYERS)
    ]
    outer = (VOCABULARY, HIDDEN)
    blocks += [{"model.embed_tokens.weight": outer}, {"lm_head.weight": outer}]
    known = {}
    for i, block in enumerate(blocks):
        header, offset = {}, 0
        for name, (n_rows, n_cols) in block.items():
            end = offset + 2 * n_rows * n_cols
            header[name] = {
                "dtype": "BF16",
                "shape": [n_rows, n_cols],
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        shard = f"model-{i + 1:05d}-of-{len(blocks):05d}.safetensors"
        with (place / shard).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            if "lm_head.weight" in block:  # else it would be the embedding's tie
                stream.write(b"\x80\x3f")
            stream.truncate(8 + len(text) + offset)
        known |= dict.fromkeys(block, shard)
    index = place / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": known}))
    (place / "config.json").write_text(json.dumps(CONFIG))


def _row(part: str, case: str, earlier: float, this: float) -> dict:
    """Processor seconds of two sides; of tiers, cheap stands first."""
    return {
        "part": part,
        "case": case,
        "earlier_seconds": earlier,
        "seconds": this,
        "ratio": earlier / this,
    }


PARTS = {f.__name__: f for f in (tiers, small, adapters, pair, floor, sample, sampled)}


def main() -> None:
    """Run the parts and write their rows to data/benchmarks/pairs.csv."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--earlier", type=Path, default=ROOT, help=f"at {EARLIER}")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--real", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.parts.split(","):
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            for link, place in zip(REAL, options.real or (), strict=False):
                (Path(folder) / link).symlink_to(place.resolve())
            rows = PARTS[name](Path(folder), options.earlier.resolve())
        record("pairs", rows, ["part", "case"])
        print(pd.DataFrame(rows).to_string(index=False))
        print(f"{time.perf_counter() - started:.0f} s by the clock", flush=True)


if __name__ == "__main__":
    main()

"""Time the diagnostics of one matrix pair against the paper's protocol and a peer's.

Everything runs in one process, ours and theirs in turn, on the same bf16 matrices. See
README.md for what is and what is not compared.
"""

import multiprocessing
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from records import record, seconds
from torch import Tensor

from opd_geometry.geometry import bits, comparison, pairs, updates
from opd_geometry.printing import print_table

SIZES = "1024x1024,2048x2048,4096x4096,1024x4096,4096x12288"
ONCE = 3000  # a smaller side above this is timed once only
# What the protocol computes; our columns of the same content.
METRICS = tuple(pairs.METRICS)


def matrix_pair(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Weights with a decaying spectrum and an update of 1 % of their norm, in bf16."""
    generator = torch.Generator().manual_seed(rows + cols)
    scale = torch.linspace(1.0, 0.2, cols) * 0.02
    w = torch.randn(rows, cols, generator=generator) * scale
    noise = torch.randn(rows, cols, generator=generator) * 1e-4
    return w.bfloat16(), (w + noise).bfloat16()


# --- theirs ----------------------------------------------------------------------


def protocol(before: Tensor, after: Tensor) -> dict[str, float]:
    """The paper's section 2 as written: three full float64 SVDs, then all the rest."""
    w0, w1 = before.double(), after.double()
    delta = w1 - w0
    n = min(w0.shape)
    k, r = n // 8, n // 64
    u0, s0, v0 = torch.linalg.svd(w0, full_matrices=False)
    u1, s1, v1 = torch.linalg.svd(w1, full_matrices=False)
    _, s, _ = torch.linalg.svd(delta, full_matrices=False)
    left = torch.linalg.svdvals(u0[:, :k].T @ u1[:, :k]).clamp(max=1).acos()
    right = torch.linalg.svdvals(v0[:k] @ v1[:k].T).clamp(max=1).acos()
    larger = torch.maximum(w0.abs(), w1.abs())  # bf16 already
    visible = delta.abs() > 1e-3 * larger
    half = w0.numel() // 2
    score = ((u0[:, :r] * s0[:r]) @ v0[:r]).abs()
    principal = score > score.flatten().kthvalue(half).values
    low = w0.abs() <= w0.abs().flatten().kthvalue(half).values
    n_visible = visible.sum()
    return {
        "angle_left_mean_deg": float(left.rad2deg().mean()),
        "angle_right_mean_deg": float(right.rad2deg().mean()),
        "nss": float((s1 - s0).norm() / s0.norm()),
        "sparsity_bf16": float(1 - n_visible / visible.numel()),
        "principal_overlap": float((principal & visible).sum() / n_visible),
        "low_magnitude_overlap": float((low & visible).sum() / n_visible),
        "stable_rank": float(s.square().sum() / s[0] ** 2),
        "frobenius_norm": float(delta.norm()),
        "hill_alpha": float((k - 1) / (s[: k - 1] / s[k - 1]).log().sum()),
    }


def peer(before: Tensor, after: Tensor) -> dict[str, float]:
    """OPD-Param-Analysis as it describes itself: float32, four functions on their own.

    Norms and sparsity by an absolute tolerance; ranks of the update; rotation and NSS
    from the SVDs of W0 and W+; mask overlap, which decomposes W0 again.
    """
    w0, w1 = before.float(), after.float()
    delta = w1 - w0
    n = min(w0.shape)
    k, r = n // 8, n // 64
    sparsity = float((delta.abs() <= 1e-5).float().mean())
    s = torch.linalg.svdvals(delta)
    u0, s0, v0 = torch.linalg.svd(w0, full_matrices=False)
    u1, s1, v1 = torch.linalg.svd(w1, full_matrices=False)
    cos_left = torch.linalg.svdvals(u0[:, :k].T @ u1[:, :k])
    cos_right = torch.linalg.svdvals(v0[:k] @ v1[:k].T)
    u, s_again, v = torch.linalg.svd(w0, full_matrices=False)
    score = ((u[:, :r] * s_again[:r]) @ v[:r]).abs()
    half = w0.numel() // 2
    principal = score >= score.flatten().kthvalue(half).values
    low = w0.abs() <= w0.abs().flatten().kthvalue(half).values
    visible = delta.abs() > 1e-5
    return {
        "sparsity": sparsity,
        "stable_rank": float(s.square().sum() / s[0] ** 2),
        "rotation": float((1 - cos_left**2).clamp(min=0).sqrt().mean()),
        "rotation_right": float((1 - cos_right**2).clamp(min=0).sqrt().mean()),
        "nss": float((s1 - s0).norm() / s0.norm()),
        "principal": float((principal & visible).sum() / visible.sum()),
        "low": float((low & visible).sum() / visible.sum()),
    }


# --- one size --------------------------------------------------------------------


def compare_size(rows: int, cols: int, with_peer: bool) -> list[dict[str, Any]]:
    """Seconds of the protocol, the peer, our first pair and our further checkpoint."""
    before, after = matrix_pair(rows, cols)
    repeats = 1 if min(rows, cols) > ONCE else 3
    results: dict[str, dict[str, float]] = {}

    def ours(reference: Any) -> Callable[[], None]:
        def call() -> None:
            results["ours"] = pairs.measure_tensors(
                reference, after, metrics=METRICS, null=False
            )

        return call

    def theirs() -> None:
        results["protocol"] = protocol(before, after)

    kept = comparison.reference(before)
    timed = {
        "pair": seconds(ours(before), repeats),
        "protocol": seconds(theirs, repeats),
    }
    ours(kept)()  # W0's side is computed here, once
    timed["further"] = seconds(ours(kept), repeats)
    if with_peer:
        timed["peer"] = seconds(lambda: peer(before, after), repeats)
    difference = max(
        abs(results["ours"][name] / value - 1)
        for name, value in results["protocol"].items()
    )
    return [
        {
            "rows": rows,
            "cols": cols,
            "side": side,
            **times,
            "largest_relative_difference": difference,
        }
        for side, times in timed.items()
    ]


# --- memory speed ----------------------------------------------------------------


def bandwidth(rows: int, cols: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Bytes read a second by what needs no singular values, and by plain copies.

    A mask, like a clone, is written to memory that is fresh; a copy is not.
    """
    before, after = (w.to(dtype) for w in matrix_pair(rows, cols))
    target = torch.empty_like(before), torch.empty_like(after)

    def copy() -> None:
        target[0].copy_(before)
        target[1].copy_(after)

    size = before.element_size() * before.numel()
    calls = {
        "copy": (copy, 2),
        "fresh_copy": (lambda: (before.clone(), after.clone()), 2),
        "sparsity": (lambda: updates.count_visible(before, after), 2),
        "update_mask": (lambda: updates.visible_update(before, after), 2),
        "norm_of_update": (lambda: bits.difference_norm(before, after), 2),
        "norm": (lambda: bits.norm(before), 1),
        "nonfinite": (lambda: bits.count_nonfinite(before), 1),
        "low_magnitude_mask": (lambda: updates.low_magnitude_mask(before), 1),
    }
    copy()
    rates = {
        name: n * size / seconds(call, 5)["cpu_seconds"] / 1e9
        for name, (call, n) in calls.items()
    }
    return [
        {
            "rows": rows,
            "cols": cols,
            "dtype": str(dtype).removeprefix("torch."),
            "quantity": name,
            "gigabytes_per_second": rate,
            "share_of_copy": rate / rates["copy"],
            "share_of_fresh_copy": rate / rates["fresh_copy"],
        }
        for name, rate in rates.items()
    ]


# --- memory ----------------------------------------------------------------------


def _peak_mib() -> float:
    """Most memory that this process has held; Linux only."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _peak(rows: int, cols: int, null: bool) -> float:
    """Peak of a process of its own, above what the libraries take, in MiB."""
    torch.set_num_threads(1)
    pairs.measure_tensors(*matrix_pair(300, 300))  # loads every library
    start = _peak_mib()
    w = torch.empty(rows, cols, dtype=torch.bfloat16)
    for part in w.split(256):
        part.copy_(torch.randn(part.shape) * 0.02)
    after = (w.view(torch.int16) + 1).view(torch.bfloat16)
    pairs.measure_tensors(w, after, null=null)
    return _peak_mib() - start


def memory(rows: int, cols: int) -> list[dict[str, Any]]:
    """Peak memory with and without nulls, in float64 copies of the matrix."""
    found = []
    for null in (False, True):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(_peak, (rows, cols, null))
        found.append(
            {
                "rows": rows,
                "cols": cols,
                "null": null,
                "peak_mib": peak,
                "float64_copies": peak * 2**20 / (8 * rows * cols),
            }
        )
    return found


# --- the command -----------------------------------------------------------------


def _shape(text: str) -> tuple[int, int]:
    rows, _, cols = text.partition("x")
    return int(rows), int(cols or rows)


def _show(rows: list[dict[str, Any]]) -> None:
    print_table(
        list(rows[0]),
        [
            [f"{v:.3g}" if isinstance(v, float) else str(v) for v in r.values()]
            for r in rows
        ],
    )


@click.command(context_settings={"show_default": True})
@click.option("--sizes", default=SIZES, help="Rows x columns, commas between.")
@click.option("--threads", default=1, help="Threads of all sides.")
@click.option("--with-peer/--no-peer", "with_peer", default=True)
@click.option(
    "--parts", default="ratios,bandwidth,memory", help="Which to run, commas between."
)
@click.option("--memory-size", default="4096x4096", help="Of the memory peak.")
def main(
    sizes: str, threads: int, with_peer: bool, parts: str, memory_size: str
) -> None:
    """Print ratios, bandwidths and the memory peak; write them to data/benchmarks."""
    torch.set_num_threads(threads)
    wanted = parts.split(",")
    for size in sizes.split(",") if "ratios" in wanted else ():
        rows = compare_size(*_shape(size), with_peer)
        record("ratios", rows, ["rows", "cols", "side", "threads"])
        _show(rows)
        cpu = {row["side"]: row["cpu_seconds"] for row in rows}
        wall = {row["side"]: row["wall_seconds"] for row in rows}
        for side in ("pair", "further"):
            for other in sorted({"protocol", "peer"} & {*cpu}):
                ratios = cpu[other] / cpu[side], wall[other] / wall[side]
                click.echo(
                    f"{size}: {other} / {side} = {ratios[0]:.1f} by processor time, "
                    f"{ratios[1]:.1f} by the clock"
                )
    if "bandwidth" in wanted:
        rows = [
            row
            for dtype in (torch.bfloat16, torch.float32)
            for row in bandwidth(4096, 12288, dtype)
        ]
        record("bandwidth", rows, ["rows", "cols", "dtype", "quantity"])
        _show(rows)
        share = statistics.median(row["share_of_copy"] for row in rows)
        click.echo(f"Median share of a copy's bandwidth: {share:.2f}")
    if "memory" in wanted:
        rows = memory(*_shape(memory_size))
        record("memory", rows, ["rows", "cols", "null"])
        _show(rows)


if __name__ == "__main__":
    main()

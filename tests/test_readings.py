"""What a table is said to say, against planted tables."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import t as student_law

from opd_geometry.geometry import pairs, readings


def table(**columns: object) -> pd.DataFrame:
    """Twelve matrices of the layers, 100 x 40, that went a hundredth of their norm."""
    base = {
        "matrix": [f"m{i}" for i in range(12)],
        "role": ["q", "k", "v"] * 4,
        "layer": np.arange(12) // 3,
        "rows": 100,
        "cols": 40,
        "dtype_before": "bfloat16",
        "dtype_after": "bfloat16",
        "sparsity_bf16": 0.5,
        "relative_norm": 0.01,
        "frobenius_norm": 0.2,
    }
    return pd.DataFrame({**base, **columns})


def test_equal_checkpoints_did_not_change() -> None:
    same = table(frobenius_norm=0.0, relative_norm=0.0, sparsity_bf16=1.0)
    assert readings.whether(same) == (
        "The weights did not change: all 12 matrices are equal."
    )
    one = same.assign(frobenius_norm=[0.1] + [0.0] * 11)
    assert readings.whether(one).startswith("1 of 12 matrices changed")


def test_a_refused_matrix_is_not_said_to_be_equal() -> None:
    norms = [np.nan] + [0.0] * 11
    said = readings.whether(table(frobenius_norm=norms, sparsity_bf16=1.0))
    assert "are equal" not in said
    unknown = table(frobenius_norm=np.nan, sparsity_bf16=np.nan)
    assert "cannot be said" in readings.whether(unknown)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_rounded_copy_is_no_training(stored: torch.dtype) -> None:
    """Measured, not planted: float32 weights against their own copy, and trained."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for scale in (0.0, 1e-2):
        for i in range(4):
            w = 0.02 * torch.randn(64, 64, generator=generator)
            step = scale * 0.02 * torch.randn(64, 64, generator=generator)
            row = pairs.measure_tensors(w, (w + step).to(stored), null=False)
            identity = {"matrix": f"{scale} {i}", "role": "q", "rows": 64, "cols": 64}
            kinds = ["float32", str(stored).removeprefix("torch.")]
            rows.append({**identity, **row, **dict(zip(DTYPES, kinds, strict=True))})
    found = pd.DataFrame(rows)
    copies, trained = found.iloc[:4], found.iloc[4:]
    assert "no training that shows" in readings.whether(copies)
    assert readings.whether(trained).startswith("4 of 4 matrices changed")
    assert "compare them in one format" in readings.whether(trained)


DTYPES = ["dtype_before", "dtype_after"]


def test_one_format_is_never_said_to_round() -> None:
    small = table(sparsity_bf16=1.0, relative_norm=1e-4, frobenius_norm=2e-3)
    assert readings.whether(small).startswith("12 of 12 matrices changed; 100.0 %")


@pytest.mark.parametrize(("aligned", "expected"), [(False, 1.0), (True, 10.0)])
def test_distance_in_steps_of_the_optimizer(aligned: bool, expected: float) -> None:
    """Planted: 100 steps of size lr, independent or all in one direction."""
    lr, steps, shape = 1e-3, 100, (100, 40)
    generator = np.random.default_rng(0)
    norms = []
    for _ in range(12):
        signs = generator.choice([-1.0, 1.0], (1 if aligned else steps, *shape))
        norms.append(np.linalg.norm(lr * signs.sum(0) * (steps if aligned else 1)))
    said = readings.how_far(table(frobenius_norm=norms), lr, steps)
    number = float(said.split(" or ")[1].split()[0])
    assert number == pytest.approx(expected, rel=0.02)
    assert "lr √T" not in readings.how_far(table(), None, None)


def test_embeddings_do_not_enter_the_means() -> None:
    mixed = table(
        role=["embed"] * 2 + ["q"] * 10, relative_norm=[9.0] * 2 + [0.01] * 10
    )
    assert "They went 0.01 of their own norm" in readings.how_far(mixed, None, None)
    assert "10 matrices of the layers" in readings.how_far(mixed, None, None)


def test_detection_limits_are_those_of_the_mean() -> None:
    generator = np.random.default_rng(1)
    null = np.full(12, 2.0)
    noise = generator.normal(0.0, 0.1, 12)
    found = readings.against_null(table(nss=null + noise, null_nss=null), ["nss"])
    half = student_law.ppf(0.975, 11) * noise.std(ddof=1) / 12**0.5
    assert found.loc["nss", "limit"] == pytest.approx(half / 2.0, rel=1e-3)


def test_noise_stays_within_its_limit_in_19_of_20_tables() -> None:
    generator = np.random.default_rng(2)
    beyond = 0
    for _ in range(400):
        value, null = generator.normal(1.0, 0.2, (2, 12))
        row = readings.against_null(table(nss=value, null_nss=null), ["nss"]).iloc[0]
        beyond += abs(row["ratio"] - 1.0) > row["limit"]
    assert 0.02 < beyond / 400 < 0.09


def test_what_stands_out_is_named_with_its_limit() -> None:
    noise = np.linspace(-0.02, 0.02, 12)
    planted = table(
        nss=0.3 + noise / 10,
        null_nss=0.1,
        sparsity_bf16=0.5 + noise,
        null_sparsity_bf16=0.5,
    )
    said = readings.what_stands_out(planted)
    differ, rest = said.split("; not beyond: ")
    assert "nss 3×" in differ
    assert "sparsity_bf16 1×" in rest
    bare = readings.what_stands_out(table().drop(columns=["rows", "cols"]))
    assert "no diagnostic has a null" in bare
    only = readings.what_stands_out(table(stable_rank=3.0))
    assert "the others need --null" in only


def test_parts_are_chosen_or_refused() -> None:
    table = pd.DataFrame({"part": ["language", "vision", None], "x": [1, 2, 3]})
    assert list(readings.of_parts(table)["x"]) == [1, 3]
    assert list(readings.of_parts(table, ["vision"])["x"]) == [2]
    assert list(readings.of_parts(table, ["vision", "language"])["x"]) == [1, 2, 3]
    towers = table[table["part"] == "vision"]
    assert list(readings.of_parts(towers)["x"]) == [2]  # of what there is
    for given, parts in ((table, ["audio"]), (table[["x"]], ["vision"])):
        with pytest.raises(ValueError, match="no matrix of the parts"):
            readings.of_parts(given, parts)
    assert len(readings.of_parts(table[["x"]], ["language"])) == 3

"""The explorer shows means of the tables, the calculator a closed form."""

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from opd_geometry.book import explorer


def run(seed: int, values: dict[tuple[str, int, str], float]) -> pd.DataFrame:
    rows = [
        {"arm": "opd", "seed": seed, "step": step, "matrix": matrix, "metric": metric}
        | {"role": "q" if matrix == "a" else "up", "layer": 0, "value": value}
        for (metric, step, matrix), value in values.items()
    ]
    return pd.DataFrame(rows)


def test_means_over_matrices_then_seeds() -> None:
    values = {
        ("nss", step, m): v for step in (1, 2) for m, v in (("a", 1.0), ("b", 3.0))
    }
    values |= {("stable_rank", 2, "a"): 4.0, ("stable_rank", 2, "b"): 100.0}
    values |= {("sparsity", 2, "a"): 0.2, ("sparsity", 2, "b"): 0.8}
    values |= {("parameters", 0, "a"): 100.0, ("parameters", 0, "b"): 300.0}
    double = {key: 2 * v if key[0] == "nss" else v for key, v in values.items()}
    found = explorer.aggregate([run(0, values), run(3, double)])["opd"]
    assert found["seeds"] == [0, 3]
    assert found["step"] == [1, 2]
    assert found["metrics"]["nss"] == [[3.0, 2.0, 4.0]] * 2
    assert found["metrics"]["stable_rank"] == [None, [4.0] * 3]  # attention only
    assert found["metrics"]["sparsity"] == [None, [0.65] * 3]  # by size
    assert found["layers"]["nss"] == [[3.0, 2.0, 4.0]]


def test_a_mean_over_other_matrices_is_not_drawn() -> None:
    values = {("nss", 2, "a"): 1.0, ("nss", 2, "b"): 3.0, ("nss", 1, "a"): 1.0}
    values |= {("null_nss", 2, "a"): 0.5}
    found = explorer.aggregate([run(0, values)])["opd"]["metrics"]
    assert found == {"nss": [[2.0] * 3]}


def test_the_calculator_is_the_closed_form(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explorer, "SCALES", [2.0**-8])
    weights = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.bfloat16)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({name: weights}, f"{tmp_path}/model.safetensors")
    found = explorer.without_place(f"{tmp_path}/model.safetensors")  # type: ignore[arg-type]
    assert found["density"]["sign"] == [0.75]
    assert set(found["density"]) == set(explorer.LAWS)

"""A sample of matrices stands for all: design, estimates and coverage."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_pairs import model, save

from opd_geometry import cli
from opd_geometry.book import report
from opd_geometry.geometry import defaults, pairs, readings, sampling, tables

ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def population(seed: int, n_layers: int = 12) -> pd.DataFrame:
    """A deep model: a trend with depth, levels by role, noise, another size a role."""
    generator = np.random.default_rng(seed)
    rows = []
    for layer in range(n_layers):
        for number, role in enumerate(ROLES):
            level = 1 + number / 3 + np.sin(layer / 4)
            rows.append(
                {
                    **{name: np.nan for name in pairs.COLUMNS},
                    "matrix": f"{role}{layer}",
                    "role": role,
                    "layer": layer,
                    "rows": 64 * (1 + number % 3),
                    "cols": 64,
                    "nss": level + 0.3 * generator.standard_normal(),
                    "stable_rank": np.exp(level + generator.standard_normal()),
                    "sparsity_bf16": generator.beta(2, 4) / (1 + number),
                }
            )
    return pd.DataFrame(rows)


def design_of(table: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    found = sampling.strata(list(table["role"]), list(table["layer"]), n)
    rows = {
        table["matrix"][place]: (h, len(found[h].members), found[h].drawn)
        for h, place in sampling.draw(found, seed)
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=[*defaults.STRATA])


def test_every_role_and_depth_is_drawn_and_every_matrix_is_in_one_stratum() -> None:
    table = population(0)
    found = sampling.strata(list(table["role"]), list(table["layer"]), 28)
    members = [place for stratum in found for place in stratum.members]
    assert sorted(members) == list(range(len(table)))
    assert sum(stratum.drawn for stratum in found) == 28
    for stratum in found:
        block = table.iloc[list(stratum.members)]
        assert block["role"].nunique() == 1
        assert np.ptp(block["layer"]) == len(block) - 1  # neighbours
    drawn = table[table["matrix"].isin(design_of(table, 28, 0).index)]
    assert set(drawn["role"]) == set(ROLES)
    assert (drawn.groupby("role")["layer"].max() > 5).all()
    assert (drawn.groupby("role")["layer"].min() < 6).all()


def test_too_few_are_refused_and_all_are_all() -> None:
    table = population(0)
    with pytest.raises(ValueError, match="a sample of 13, expected at least 14"):
        sampling.strata(list(table["role"]), list(table["layer"]), 13)
    found = sampling.estimates(table.join(design_of(table, 1000, 0), on="matrix")).loc[
        "nss"
    ]
    assert found["mean"] == pytest.approx(table["nss"].mean(), rel=1e-12)
    assert found["half_width"] == 0.0


def test_estimates_are_unbiased_and_intervals_hold() -> None:
    """Over draws from deep models whose full means are known."""
    held: dict[str, list[bool]] = {}
    errors: dict[str, list[float]] = {}
    for seed in range(60):
        table = population(seed)
        weights = table["rows"] * table["cols"]
        full = table[["nss", "stable_rank"]].mean()
        full["sparsity_bf16"] = np.average(table["sparsity_bf16"], weights=weights)
        design = design_of(table, 28, seed)
        found = sampling.estimates(table.join(design, on="matrix", how="inner"))
        for name, true in full.items():
            row = found.loc[name]
            held.setdefault(name, []).append(row["low"] <= true <= row["high"])
            errors.setdefault(name, []).append(row["mean"] / true - 1)
    for name, found_errors in errors.items():
        deviation = np.std(found_errors, ddof=1) / 60**0.5
        assert abs(np.mean(found_errors)) < 3 * deviation + 0.01, name
        assert np.mean(held[name]) > 0.86, name  # 95 % less three sigma


def test_the_median_of_largest_angles_holds_where_their_mean_has_no_variance() -> None:
    """As one over gaps that close linearly: tails of index two."""
    held, missed = [], []
    for seed in range(60):
        table = population(seed)
        generator = np.random.default_rng(1000 + seed)
        angles = 0.3 / np.sqrt(generator.random(len(table)))
        table["angle_left_max_deg"] = np.minimum(angles, 90.0)
        full = sampling.estimates(table.join(design_of(table, 1000, 0), on="matrix"))
        name = "angle_left_max_deg (median)"
        assert "angle_left_max_deg" not in full.index
        true = full.loc[name]
        assert true["low"] == true["mean"] == true["high"]
        assert true["mean"] == pytest.approx(np.median(angles), rel=0.05)
        design = design_of(table, 28, seed)
        row = sampling.estimates(table.join(design, on="matrix", how="inner"))
        row = row.loc[name]
        assert 0.0 <= row["low"] <= row["mean"] <= row["high"] <= 90.0
        held.append(row["low"] <= true["mean"] <= row["high"])
        missed.append(row["high"] < true["mean"])
    assert np.mean(held) > 0.9
    assert np.mean(missed) < 0.1


def test_the_words_of_a_sample_are_the_designs_estimates() -> None:
    """A large stratum counts as many matrices, not as those that were drawn of it."""
    sizes = {"expert_up": 32, "q": 4}
    table = pd.DataFrame(
        [
            {
                **{name: np.nan for name in pairs.COLUMNS},
                "matrix": f"{role}{layer}",
                "role": role,
                "layer": layer,
                "rows": 8,
                "cols": 8,
                "sparsity_bf16": 0.9 if role == "q" else 0.3,
                "relative_norm": 0.01 if role == "q" else 0.002,
                "frobenius_norm": 1.0,
                "nss": 2.0 if role == "q" else 1.0,
                "null_nss": 1.0,
            }
            for role, size in sizes.items()
            for layer in range(size)
        ]
    )
    whole = readings.sentences(table, 1e-3, 4)
    design = design_of(table, 8, 0)
    part = table.join(design, on="matrix", how="inner")
    said = readings.sentences(part, 1e-3, 4)
    assert "36.7 % of their entries" in whole[0]
    assert "36.7 % of all entries" in said[0]
    assert "They went 0.00289 of their own norm" in whole[1]
    assert "They went 0.00289 of their own norm" in said[1]
    assert "nss 1.11×" in whole[2]
    assert "nss 1.11×" in said[2]
    assert all("estimated from a sample of 8 of 36 matrices" in line for line in said)
    assert not any("sample" in line for line in whole)
    page = report.build_report(part, None, "t")
    assert "This is a sample of 8 of 36 matrices" in page
    assert "36.7 % of the weights" in page
    assert "embeddings and head included" not in page
    assert "a sample of" not in report.build_report(table, None, "t")


@pytest.mark.parametrize("apart", [True, False])
def test_the_interval_of_a_median_holds_also_where_roles_lie_apart(apart: bool) -> None:
    """q about 1 degree and o about 20: no stratum has one on either side."""
    generator = np.random.default_rng(0)
    held = []
    for seed in range(300):
        table = population(seed)
        table = table[table["role"].isin(["q", "o"])].reset_index(drop=True)
        level = np.where(table["role"] == "q", 1.0, 20.0) if apart else 10.0
        noise = np.exp(0.3 * generator.standard_normal(len(table)))
        table["angle_left_max_deg"] = level * noise
        design = design_of(table, 12, seed)
        row = sampling.estimates(table.join(design, on="matrix", how="inner"))
        row = row.loc["angle_left_max_deg (median)"]
        assert row["half_width"] > 0.0
        true = table["angle_left_max_deg"].median()
        held.append(row["low"] <= true <= row["high"])
    assert np.mean(held) >= 0.95


def test_no_interval_is_of_what_cannot_be() -> None:
    """Shares end at 0 and 1, norms at 0."""
    table = population(2)
    table["low_magnitude_overlap"] = np.where(table["layer"] % 2, 1.0, 0.4)
    table["relative_norm"] = np.where(table["layer"] == 3, 1.0, 0.0)
    table["nss"] -= 100.0
    for seed in range(20):
        design = design_of(table, 14, seed)
        found = sampling.estimates(table.join(design, on="matrix", how="inner"))
        assert found.loc["low_magnitude_overlap", "high"] <= 1.0
        assert found.loc["relative_norm", "low"] >= 0.0
        assert found.loc["nss", "low"] < found.loc["nss", "mean"] < 0.0


def test_an_undefined_value_is_no_zero() -> None:
    table = population(1)
    table.loc[table["layer"] == 3, "nss"] = np.nan
    design = design_of(table, 1000, 0)
    found = sampling.estimates(table.join(design, on="matrix"))
    assert found.loc["nss", "mean"] == pytest.approx(table["nss"].mean(), rel=1e-12)


def test_embedding_and_head_are_drawn_only_where_they_are_asked_for(
    tmp_path: Path,
) -> None:
    """They are alone in their roles, and can take longer than all layers together."""
    places = [save(tmp_path / str(i), model(i)) for i in range(2)]
    plan = pairs.plan_pair(*places)
    layers = sampling.layers_of(plan)
    left_out = {t.pair.before.role for t in plan.tasks if t not in layers.tasks}
    assert left_out
    assert left_out <= {*sampling.VOCABULARY}
    asked = pairs.plan_pair(*places, roles=["q", "embed"])
    assert sampling.layers_of(asked).tasks == asked.tasks
    out = tmp_path / "t.csv"
    arguments = ["measure", *map(str, places), "--out", str(out), "--metrics", "cheap"]
    assert cli.main([*arguments, "--no-null", "--quiet", "--sample", "16"]) == 0
    assert not {*tables.read_table(out)["role"]} & {*sampling.VOCABULARY}


def test_the_command_measures_a_sample(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = [str(save(tmp_path / str(i), model(i))) for i in range(2)]
    out = tmp_path / "t.csv"
    cheap = ["--metrics", "cheap", "--no-null", "--roles", "q,k,v,o"]
    arguments = ["measure", *places, "--out", str(out), *cheap]
    assert cli.main([*arguments, "--sample", "1"]) == 1
    assert "expected at least" in capsys.readouterr().err
    assert not out.exists()
    written = []
    finish = pairs.finish

    def watched(path: Path, table: pd.DataFrame, force: bool) -> None:
        finish(path, table, force)
        written.append(tables.read_table(path))

    monkeypatch.setattr(pairs, "finish", watched)
    assert cli.main([*arguments, "--sample", "100"]) == 0
    # Killed after any write, no sample may pass for a whole table.
    assert [{*defaults.STRATA} < {*table.columns} for table in written] == [True]
    said = capsys.readouterr()
    assert "with 95 % intervals" in said.out
    assert "All matrices, all: about" in said.err
    table = tables.read_table(out)
    assert {*defaults.STRATA} < {*table.columns}
    assert (table["stratum_drawn"] == table["stratum_size"]).all()

import math

import numpy as np
import pandas as pd
import pytest

from opd_geometry.analysis import directions, distance
from opd_geometry.book import distance_figures
from opd_geometry.experiments import measure
from opd_geometry.experiments.measure import COLUMNS

MATRICES = [f"layers.{i}.{role}" for i in range(8) for role in ("q", "up")]
STEPS = (10, 20, 40, 100)


def planted(n_runs: int = 12, noise: float = 0.05) -> pd.DataFrame:
    """Sparsity falls with distance, stable rank has nothing to do with it."""
    rng, rows = np.random.default_rng(0), []
    for index in range(n_runs):
        arm, seed = ("sft", "opd", "rlvr")[index % 3], index // 3
        for name in MATRICES:
            for step in STEPS:
                x = rng.normal(math.log(1e-2 * step / 100), 1.0)
                z = rng.standard_normal(4)
                values = {
                    "relative_norm": math.exp(x),
                    "sparsity": 1 / (1 + math.exp(x + 6)) + noise * z[0] * 0.2,
                    "low_magnitude_overlap": 0.6 - 0.05 * x + noise * z[0],
                    "angle_right_mean_deg": math.exp(x + noise * z[1]),
                    "nss": math.exp(x / 2 + noise * z[1]),
                    "stable_rank": math.exp(z[2]),
                    "hill_alpha": math.exp(z[3]),
                    "similarity_to_end": 1.0 if step == 100 else rng.uniform(),
                }
                role = name.rpartition(".")[2]
                place = (f"{arm}{seed}", arm, seed, step, name, role, 0)
                rows += [(*place, metric, value) for metric, value in values.items()]
                if name == MATRICES[0]:  # no layer: must not be looked at
                    rows.append((*place[:4], "head", "head", -1, "sparsity", 99.0))
    return pd.DataFrame(rows, columns=COLUMNS)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return planted()


@pytest.fixture(scope="module")
def shares(table: pd.DataFrame) -> pd.DataFrame:
    return distance.collapse(table)


def test_what_is_distance_collapses_and_what_is_not_does_not(
    shares: pd.DataFrame,
) -> None:
    found = shares.set_index("metric")
    assert found.loc["sparsity", "share"] > 0.9
    for name in ("nss", "angle_right_mean_deg"):
        assert found.loc[name, "share"] > 0.97
    n_points = len(MATRICES) * len(STEPS) * 12
    for name in ("stable_rank", "hill_alpha"):
        # chance alone gives the bins' number over that of the points
        assert found.loc[name, "share"] < 2 * distance.N_BINS / n_points
    assert (found["n_runs"] == 12).all()
    assert found.loc["sparsity", "n_points"] == n_points
    assert found.loc["similarity_to_end", "n_points"] == n_points * 3 / 4
    for name in ("sparsity", "nss"):
        row = found.loc[name]
        assert row["low"] <= row["share"] <= row["high"]
        assert row["n_seeds"] == 4
        assert row["seed_low"] - 0.05 <= row["share"] <= row["seed_high"] + 0.05
    assert "principal_overlap" not in found.index  # not in the table


def test_the_share_is_that_of_an_analysis_of_variance(table: pd.DataFrame) -> None:
    found = distance.points(table, "low_magnitude_overlap")
    order = found["x"].rank(method="first") - 1
    bins = (order * distance.N_BINS // len(found)).astype(int)
    groups = [part["y"].to_numpy() for _, part in found.groupby(bins)]
    within = sum(((g - g.mean()) ** 2).sum() for g in groups)
    total = ((found["y"] - found["y"].mean()) ** 2).sum()
    assert distance.explained(found) == pytest.approx(1 - within / total)


def test_a_common_shift_or_another_unit_changes_no_share(table: pd.DataFrame) -> None:
    found = distance.points(table, "nss")
    moved = found.assign(y=1e4 + 3 * found["y"], x=found["x"] + 7)
    assert distance.explained(moved) == pytest.approx(distance.explained(found))
    constant = found.assign(y=2.0)
    assert math.isnan(distance.explained(constant))


def test_weights_count_runs_as_often_as_they_say(table: pd.DataFrame) -> None:
    found = distance.points(table, "nss")
    runs = found["run"].unique()
    once = pd.Series(1.0, index=runs)
    assert distance.explained(found, once) == pytest.approx(distance.explained(found))
    draws = np.array([[2.0] + [1.0] * (len(runs) - 1)])
    many = distance._resampled(distance._sums(found), list(runs), draws)
    assert many[0] == pytest.approx(
        distance.explained(found, pd.Series(draws[0], index=runs))
    )


def test_undefined_values_are_left_out(table: pd.DataFrame) -> None:
    spoilt = table.copy()
    gone = (spoilt["metric"] == "nss") & (spoilt["matrix"] == MATRICES[0])
    spoilt.loc[gone, "value"] = np.nan
    spoilt.loc[gone & (spoilt["step"] == 10), "value"] = 0.0  # no logarithm
    row = distance.collapse(spoilt, ["nss"]).iloc[0]
    assert row["n_points"] == (len(MATRICES) - 1) * len(STEPS) * 12
    assert np.isfinite(row["share"])


# --- real updates -----------------------------------------------------------------


def at_end(values: dict[str, dict[str, float]], spread: float = 0.001) -> pd.DataFrame:
    rng, rows = np.random.default_rng(1), []
    for arm, metrics in values.items():
        for seed in range(3):
            shift = spread * rng.standard_normal()
            for metric, value in metrics.items():
                for name, role in (("a.q", "q"), ("a.up", "up")):
                    place = (f"{arm}{seed}", arm, seed, 100, name, role, 0)
                    rows.append((*place, metric, value + shift))
    return pd.DataFrame(rows, columns=COLUMNS)


def test_an_update_with_a_place_parts_from_its_permutation() -> None:
    mask, at = "low_magnitude_overlap", "@d=own"
    table = at_end(
        {
            "opd": {
                f"{mask}{at}": 0.61,
                f"shuffled_{mask}{at}": 0.61,
                f"free_{mask}{at}": 0.5,
            },
            "sft": {
                f"{mask}{at}": 0.40,
                f"shuffled_{mask}{at}": 0.55,
                f"free_{mask}{at}": 0.2,
            },
        }
    )
    found = distance.permuted(table, ["opd", "sft", "rlvr"]).set_index("arm")
    assert list(found.index) == ["opd", "sft"]
    assert found.loc["sft", "difference"] == pytest.approx(-0.15, abs=0.01)
    assert found.loc["sft", "high"] < 0
    assert abs(found.loc["opd", "difference"]) < 1e-9
    assert (found["n_seeds"] == 3).all()
    assert found.loc["sft", "free"] == pytest.approx(0.2, abs=0.01)


def test_angles_are_held_against_both_nulls_and_worlds_apart() -> None:
    metric = "angle_left_mean_deg"
    of_opd = {metric: 1.8, f"null_{metric}": 1.0, f"turned_{metric}": 0.9}
    small, large = at_end({"opd": of_opd}, 0), at_end({"opd": {metric: 1.8}}, 0)
    found = distance.by_world(distance.turned, {"a": small, "b": large}, ["opd", "sft"])
    assert set(found["world"]) == {"a"}  # the other one has no nulls
    times = found.set_index("null")["times"]
    assert times.to_dict() == pytest.approx({"Gaussian": 1.8, "turned": 2.0})


def test_a_shared_direction_is_told_from_shared_rounding() -> None:
    rows = []
    for other, cosine, jaccard in (("rlvr", 0.9, 0.77), ("sft", 0.0, 0.66)):
        for seed in range(3):
            for metric, value in {
                "cosine": cosine + 0.01 * seed,
                "similarity_right": 0.5,
                "null_similarity_right": 0.1,
                "jaccard": jaccard,
                "independent_jaccard": 0.6,
                "rounding_jaccard": 0.66,
            }.items():
                pair = ("opd", other) if other == "sft" else (other, "opd")
                rows.append((pair[0], seed, pair[1], seed, "q", metric, value))
                rows.append((pair[0], seed, pair[1], seed, "head", metric, 9.0))
    columns = ["arm", "seed", "other_arm", "other_seed", "role", "metric", "value"]
    found = directions.shared(pd.DataFrame(rows, columns=columns))
    assert list(found["other"]) == ["rlvr", "sft"]
    assert (found["n_pairs"] == 3).all()
    assert list(found["cosine"]) == pytest.approx([0.91, 0.01], rel=1e-3)
    assert found["cosine"].between(found["low"], found["high"]).all()
    assert list(found["beyond"]) == pytest.approx([0.11, 0.0])


def test_energies_are_in_units_of_chance() -> None:
    table = at_end(
        {"opd": {"energy_top_right": 0.5, "null_energy_top_right": 0.125}}, 0
    )
    (row,) = distance.energies(table, ["opd", "sft"]).itertuples()
    assert (row.place, row.times, row.n_seeds) == ("top_right", 4.0, 3)


def test_displacement_and_clipped_steps_of_every_run() -> None:
    """Norm 6 of 9 entries is 2 each; rates of 0.3 and 0.4 make a unit of 0.5."""
    rows = []
    for arm, norm, clipped in (("opd", 6.0, None), ("sft", 3.0, 0.25)):
        for seed in range(3):
            run = (f"{arm}{seed}", arm, seed)
            for name, entries, factor in (("a.q", 9, 1.0), ("b.up", 36, 2.0)):
                place = (name, name[-1] if name == "a.q" else "up", 0)
                rows.append((*run, 0, *place, "parameters", entries))
                for step, size in ((1, 99.0), (2, norm * factor)):
                    rows.append((*run, step, *place, "frobenius_norm", size))
            whole = ("", "model", -1)
            for step, rate, gradient in ((1, 0.3, 0.5), (2, 0.4, 3.0)):
                rows.append((*run, step, *whole, "learning_rate", rate))
                rows.append((*run, step, *whole, "grad_norm", gradient))
            if clipped is not None:  # older tables have the norms alone
                rows.append((*run, 2, *whole, "clipped_frac", clipped))
            rows.append((*run, 2, "head", "head", -1, "frobenius_norm", 1e3))
    table = pd.DataFrame(rows, columns=COLUMNS)
    found = distance.displacements(table, ["opd", "sft", "absent"]).set_index("arm")
    assert found["clipped"].to_dict() == {"opd": 0.5, "sft": 0.25}
    moved = found["displacement"].to_dict()
    assert moved == {"opd": pytest.approx(4.0), "sft": pytest.approx(2.0)}
    assert found["n_seeds"].to_list() == [3, 3]


def test_displacement_from_the_norms_is_that_of_the_weights() -> None:
    table = measure.committed("published")
    table = table[table["arm"].isin(["opd", "sft"]) & (table["seed"] == 0)]
    of_weights = table[table["metric"] == "displacement"]
    for row in distance.displacements(table, ["opd", "sft"]).itertuples():
        own = of_weights[of_weights["arm"] == row.arm]
        own = own[own["role"].isin(distance.LAYERS)]
        own = own[own["step"] == own["step"].max()]
        assert row.displacement == pytest.approx(own["value"].mean(), rel=1e-6)


def test_runs_without_displacement_get_it_and_others_keep_theirs() -> None:
    table = measure.committed("published")
    two = table[(table["arm"] == "opd") & table["seed"].isin([0, 3])]
    measured = two[two["seed"] == 0]
    known = measured[measured["metric"] == "displacement"]
    kept = distance.displacement_rows(measured)
    kept = kept[kept["metric"] == "displacement"]
    pd.testing.assert_frame_equal(kept, known)
    found = distance.displacement_rows(two)
    found = found[found["metric"] == "displacement"]
    later, own = found[found["seed"] == 3], found[found["seed"] == 0]
    assert len(later) == later["matrix"].nunique() == 28
    assert len(own) > len(later)  # measured at every checkpoint
    assert later["value"].mean() == pytest.approx(
        own[(own["step"] == own["step"].max()) & own["layer"].ge(0)]["value"].mean(),
        0.1,
    )


def test_figures_are_drawn(table: pd.DataFrame, shares: pd.DataFrame) -> None:
    figure = distance_figures.curves(table, shares)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[0].endswith(f"{100 * shares['share'].iloc[0]:.1f} % is distance")
    with pytest.raises(ValueError, match="no share of nss"):
        distance_figures.curves(table, shares[shares["metric"] != "nss"])
    names = [
        f"{p}{m}@d=own" for m in distance.OVERLAPS for p in ("", "shuffled_", "free_")
    ]
    placed = at_end({"opd": dict.fromkeys(names, 0.5)}, 0)
    worlds = {"small": placed, "large": placed, "none": placed.iloc[:0]}
    found = distance.by_world(distance.permuted, worlds, ["opd"])
    bars = distance_figures.permutations(found, 2)
    assert len(bars.axes) == 2 * 2  # worlds, masks
    names = [f"{p}{m}" for m in distance.SPECTRAL for p in ("", "null_", "turned_")]
    placed = at_end({"opd": dict.fromkeys(names, 0.5)}, 0.01)
    found = distance.by_world(distance.turned, {"small": placed}, ["opd"])
    assert len(distance_figures.angles(found).axes) == 3
    table = at_end({"opd": {"energy_inputs": 0.5, "null_energy_inputs": 0.125}}, 0.01)
    assert distance_figures.energy_dots(distance.energies(table, ["opd"])).axes
    moved = pd.DataFrame(
        [("opd", 3, 2.0, 1.9, 2.1, 0.97)],
        columns=["arm", "n_seeds", "displacement", "low", "high", "clipped"],
    )
    figure = distance_figures.displacement_dots(moved)
    assert "97.0 % of steps clipped" in [t.get_text() for t in figure.axes[0].texts]

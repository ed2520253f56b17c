"""Two worlds beside each other: the same matrices on both sides, and their figures."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from opd_geometry.analysis import directions, distance, evidence, real_model, signal
from opd_geometry.book import directions_figures, real_model_figures, signal_figures
from opd_geometry.experiments import measure, weights

ARMS = ("opd", "rlvr")


def row(
    arm: str, seed: int, matrix: str, step: int, metric: str, value: float
) -> dict[str, object]:
    place = {"matrix": matrix, "role": "q", "layer": 0}
    return {
        "run": f"{arm}{seed}",
        "arm": arm,
        "seed": seed,
        "step": step,
        **place,
        "metric": metric,
        "value": value,
    }


def table() -> pd.DataFrame:
    """Two matrices, of which one alone has nulls; the other would move the means."""
    rows = []
    for arm, times in (("opd", 2.0), ("rlvr", 3.0)):
        for seed in (0, 1):
            for metric, prefix in real_model.SHARPEST.items():
                rows.append(row(arm, seed, "a", 10, metric, times))
                rows.append(row(arm, seed, "a", 10, prefix + metric, 1.0))
                rows.append(row(arm, seed, "b", 10, metric, 99.0))
                rows.append(row(arm, seed, "a", 2, metric, 99.0))
            for prefix in ("", *real_model.LOCK_NULLS.values()):
                own = 0.8 if not prefix else 0.3
                rows.append(row(arm, seed, "a", 2, prefix + real_model.LOCK, own))
                rows.append(row(arm, seed, "a", 10, prefix + real_model.LOCK, 1.0))
    return pd.DataFrame(rows, columns=measure.COLUMNS)


def test_a_value_and_its_null_are_of_the_same_matrices_at_the_end() -> None:
    found = real_model.over_nulls(table(), ARMS)
    times = found.set_index(["arm", "metric"])["times"]
    assert set(times["opd"]) == {2.0}
    assert set(times["rlvr"]) == {3.0}
    assert set(found["n_matrices"]) == {1}
    assert set(found["n_seeds"]) == {2}


def test_locks_are_read_after_a_fifth_of_training() -> None:
    found = real_model.locking(table(), ("rlvr", "opd"))
    assert found["arm"].tolist() == ["rlvr", "opd"]
    assert found["own"].tolist() == [0.8, 0.8]
    assert found["walk"].tolist() == [0.3, 0.3]


def test_claims_hear_of_the_matrices_that_have_nulls_alone() -> None:
    sizes = [row("opd", 0, name, 0, "parameters", 4.0) for name in "ab"]
    rows = pd.concat([table(), pd.DataFrame(sizes)])
    plain = pd.DataFrame([row("sft", 0, "b", 10, "nss", 1.0)])
    kept = evidence.with_every_null(pd.concat([rows, plain]))
    assert set(kept[kept["run"] == "opd0"]["matrix"]) == {"a"}
    assert set(kept[kept["run"] == "sft0"]["matrix"]) == {"b"}
    assert evidence.with_every_null(plain) is plain


def test_what_is_not_there_gives_no_rows() -> None:
    bare = table()[lambda t: ~t["metric"].str.contains("_")]
    assert real_model.over_nulls(bare, ARMS).empty
    assert real_model.locking(bare, ARMS).empty


def test_properties_of_planted_weights() -> None:
    left, _ = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))
    spectrum = torch.linspace(4, 1, 64, dtype=torch.float64)
    found = weights.properties(left @ spectrum.diag())
    assert found["peak"] == pytest.approx(4 / float(spectrum.median()))
    squares = spectrum**2
    assert found["stable_rank"] == pytest.approx(float(squares.sum() / 16))
    assert found["top_energy"] == pytest.approx(
        float(squares[:4].sum() / squares.sum())
    )
    step = 3 / 63 / 4
    assert found["gap"] == pytest.approx(step)
    gauss = weights.properties(torch.randn(256, 256).bfloat16().float())
    assert gauss["kurtosis"] == pytest.approx(3, abs=0.1)
    # |w| of a standard Gaussian has its median at 0.67, between 1/2 and 1
    assert gauss["half_step"] == 2.0**-9
    assert gauss["zeros"] == 0


def test_weights_are_committed_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPD_GEOMETRY_DATA", str(tmp_path))
    rows = pd.DataFrame([("a", 0, "m", "q", 0, "std", 0.5)], columns=weights.COLUMNS)
    weights.commit_weights("smoke", rows)
    assert weights.committed_weights("smoke")["value"].tolist() == [0.5]
    both = real_model.weights_by_world({"x": rows, "y": rows.assign(value=2.0)})
    assert both.loc["std"].to_dict() == {"x": 0.5, "y": 2.0}


def test_another_arm_in_an_arms_place_is_read_and_kept_apart() -> None:
    levels = evidence.levels_of(table())
    swapped = levels.with_arm("opd", "rlvr")
    for one, value in ((swapped, 3.0), (levels, 2.0), (swapped, 3.0)):
        found = evidence.beside(one, "opd", ["nss", "turned_nss"])
        assert set(found["nss"]) == {value}


def test_angles_and_their_nulls_are_of_the_same_matrices() -> None:
    rows = table()
    gauss = rows[rows["metric"] == "turned_nss"].assign(metric="null_nss", value=4.0)
    found = distance.turned(pd.concat([rows, gauss]), ("opd",))
    times = found[found["metric"] == "nss"].set_index("null")["times"]
    assert times.to_dict() == {"Gaussian": 0.5, "turned": 2.0}


def test_figures_hold_what_they_are_given() -> None:
    tables = {"one": table(), "two": table()}
    ratios = {name: real_model.over_nulls(t, ARMS) for name, t in tables.items()}
    assert isinstance(real_model_figures.over_nulls(ratios), Figure)
    locks = {name: real_model.locking(t, ARMS) for name, t in tables.items()}
    ax = real_model_figures.locking(locks).axes[0]
    drawn = sorted(float(line.get_xdata()[0]) for line in ax.lines)
    assert drawn.count(0.8) == 2
    arms = [*signal.FLIPS, "opd"]
    found = pd.DataFrame({"arm": arms, "nss": [1.0, 2, 3, 4, 5], "seed": 0})
    (panel,) = signal_figures.flips(found, ["nss"], ["opd"]).axes
    level = next(line for line in panel.lines if line.get_label() == "OPD")
    assert set(level.get_ydata()) == {5.0}
    told = pd.DataFrame(
        {"arm": ["opd"], "seed": 0, "ceiling": 3.0, "displacement": 2.0}
    )
    figure = signal_figures.foretold({"one": told})
    assert np.isclose(figure.axes[0].lines[1].get_xdata()[0], 3.0)


def pair(arm: str, other: str, seed: int, metric: str, value: float) -> dict:
    sides = {"arm": arm, "seed": seed, "other_arm": other, "other_seed": seed}
    return {"matrix": "a", "role": "q", "metric": metric, "value": value, **sides}


@pytest.mark.parametrize(
    ("cosine", "similarity", "parts", "stays"),
    [(-0.2, 0.6, True, True), (0.2, 0.1, True, False), (0.5, 0.6, False, True)],
)
def test_an_arm_parts_by_its_direction_and_stays_by_its_subspace(
    cosine: float, similarity: float, parts: bool, stays: bool
) -> None:
    rows = [
        pair("opd-teacher-guess", "rlvr", 0, "cosine", cosine),
        pair("opd-teacher-guess", "rlvr", 0, "similarity_right", similarity),
        pair("rlvr", "rlvr-coin", 0, "cosine", 0.3),
        pair("rlvr", "sft", 0, "similarity_right", 0.2),
        pair("rlvr", "rlvr-coin", 1, "cosine", 0.9),  # a seed without the others
        pair("opd-teacher-guess", "rlvr", 0, "cosine", 9.0) | {"role": "embed"},
    ]
    found = directions.parted(pd.DataFrame(rows))
    assert found["seed"].tolist() == [0]
    assert found["cosine"].tolist() == [cosine]
    assert found["direction_parts"].tolist() == [parts]
    assert found["subspace_stays"].tolist() == [stays]


def test_increments_are_compared_window_by_window() -> None:
    rows = [
        pair("rlvr", "opd", seed, "cosine", value) | {"start": start, "stop": stop}
        for seed, shift in ((0, -0.1), (1, 0.1))
        for start, stop, value in ((0, 10, 0.8 + shift), (10, 40, 0.4 + shift))
    ]
    rows += [r | {"matrix": "b", "value": r["value"] + 0.1} for r in rows]
    rows += [pair("rlvr", "sft", 0, "cosine", 9.0) | {"start": 0, "stop": 10}]
    wrong = pair("rlvr", "opd", 0, "cosine", 9.0) | {"start": 0, "stop": 10}
    rows += [wrong | {"role": "gate"}, wrong | {"stop": 40}]
    found = directions.along_the_way(pd.DataFrame(rows))
    assert found["other"].tolist() == ["rlvr", "rlvr"]
    assert found["n_pairs"].tolist() == [2, 2]
    of_pairs = np.array([[0.75, 0.95], [0.35, 0.55]])
    by_z = np.tanh(np.arctanh(of_pairs).mean(axis=1))
    np.testing.assert_allclose(found["cosine"], by_z)
    assert found["cosine"].between(found["low"], found["high"]).all()
    np.testing.assert_allclose(found[["start", "stop"]], [[0, 0.25], [0.25, 1]])
    # Two pairs leave nearly everything open, and no cosine beyond one.
    assert (found[["low", "high"]].abs() < 1).all(axis=None)
    assert (found["low"] < found["cosine"]).all()
    assert (found["high"] > found["cosine"]).all()
    figure = directions_figures.along_the_way({"x": found}, ["rlvr", "sft"])
    assert isinstance(figure, Figure)
    ends = pd.DataFrame(
        {"other": ["rlvr"], "cosine": [0.8], "low": [0.7], "high": [0.9]}
    ).assign(subspace=0.5)
    assert isinstance(directions_figures.shared({"x": ends}), Figure)

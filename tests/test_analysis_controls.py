"""Confined runs against free and stopped ones: planted accuracies."""

import numpy as np
import pandas as pd
import pytest

from opd_geometry.analysis import controls, evidence
from opd_geometry.analysis.evidence import ALL_ACCURACIES, PRETRAINED_ACCURACIES
from opd_geometry.book import controls_figures
from opd_geometry.experiments.measure import COLUMNS

SEEDS = (0, 1, 2)
ENDS = {
    "opd": 0.8,
    "opd-projected": 0.78,
    "opd-projected-random": 0.65,
    "opd-projected-donor": 0.75,
}


@pytest.fixture
def table() -> pd.DataFrame:
    """OPD stands at 0.6 after a fifth of training; donor's seeds differ widely."""
    rows: list[tuple[object, ...]] = []
    for arm, end in ENDS.items():
        for seed in SEEDS:
            noise = 0.04 * (seed - 1) if arm.endswith("donor") else 0.001 * seed
            for metric in ALL_ACCURACIES:
                place = (f"{arm}-{seed}", arm, seed)
                last = end + noise
                rows.append((*place, 100, "", "model", -1, metric, last))
                if arm == "opd" and metric == "accuracy/chain":
                    rows.append((*place, 20, "", "model", -1, metric, 0.6))
    return pd.DataFrame(rows, columns=COLUMNS)


def test_which_confinements_suffice(table: pd.DataFrame) -> None:
    table.loc[table["arm"] == "opd-projected", "value"] += 0.015
    found = controls.sufficiency(table, "opd", "trained task").set_index("arm")
    assert found["outcome"].to_dict() == {
        "opd-projected": "suffices",
        "opd-projected-random": "falls short",
        "opd-projected-donor": "open",
        "stopped": "falls short",
    }
    np.testing.assert_allclose(found.loc["opd-projected", "difference"], -0.005)
    # 0.005 of the 0.201 that the free run gains after the branch are lost.
    np.testing.assert_allclose(found.loc["opd-projected", "kept"], 1 - 0.005 / 0.201)
    np.testing.assert_allclose(found.loc["stopped", "kept"], 0.0, atol=1e-12)
    claimed = evidence.kept_share(table, "opd", "opd-projected").mean()
    np.testing.assert_allclose(found.loc["opd-projected", "kept"], claimed)


def test_what_left_the_subspace_stands_beside_what_was_kept(
    table: pd.DataFrame,
) -> None:
    arm, leaks = "opd-projected", {0: 0.1, 1: 0.2, 2: 0.6}
    rows = [
        (f"{arm}-{seed}", arm, seed, step, "a", "q", 0, "leak", value * step / 100)
        for seed, value in leaks.items()
        for step in (40, 100)
    ]
    grown = pd.concat([table, pd.DataFrame(rows, columns=COLUMNS)])
    found = controls.sufficiency(grown, "opd", "trained task").set_index("arm")["leak"]
    np.testing.assert_allclose(found[arm], 0.3)  # at the end, mean over seeds
    assert found.drop(arm).isna().all()


def test_confined_arms_of_several_families_stand_together(table: pd.DataFrame) -> None:
    again = table.assign(arm=table["arm"].str.replace("opd", "rlvr"))
    asked = ["rlvr-projected-random", "opd-projected-donor", "rlvr-projected-update"]
    found = controls.kept_by(pd.concat([table, again]), asked)
    assert list(found.index) == asked
    assert found.loc["rlvr-projected-update"].isna().all()  # was not run
    want = controls.sufficiency(table, "opd", "trained task").set_index("arm")["kept"]
    theirs = want[["opd-projected-random", "opd-projected-donor"]]
    np.testing.assert_allclose(found["kept"][:2], theirs)


def test_a_language_model_is_asked_its_own_benchmarks(table: pd.DataFrame) -> None:
    theirs = dict(zip(ALL_ACCURACIES, PRETRAINED_ACCURACIES, strict=False))
    other = table.assign(metric=table["metric"].map(theirs)).dropna()
    found = controls.sufficiency(other, "opd", "all benchmarks").set_index("arm")
    want = controls.sufficiency(table, "opd", "all benchmarks").set_index("arm")
    np.testing.assert_allclose(found["difference"], want["difference"])


def test_nothing_is_decided_where_nothing_was_gained(table: pd.DataFrame) -> None:
    table.loc[table["step"] == 20, "value"] = 0.82  # no gain: it falls after
    found = controls.sufficiency(table, "opd", "trained task")
    assert found["kept"].isna().all()
    assert set(found["outcome"]) == {"without power"}
    assert controls.thesis(found).startswith("no test")


def test_a_control_has_to_gain_more_than_an_arm_that_is_claimed(
    table: pd.DataFrame,
) -> None:
    table.loc[table["step"] == 20, "value"] = 0.79  # 0.011 are gained
    for family, powerless in (("opd", False), ("rlvr", True)):
        arms = table["arm"].str.replace("opd", family)
        found = controls.sufficiency(table.assign(arm=arms), family, "trained task")
        assert (found["outcome"] == "without power").all() == powerless
        assert found["kept"].isna().all() == powerless


def test_benchmarks_are_averaged(table: pd.DataFrame) -> None:
    harder = table["metric"] == "accuracy/base"
    confined = table["arm"] == "opd-projected"
    table.loc[harder & confined, "value"] -= 0.7
    found = controls.sufficiency(table, "opd", "all benchmarks").set_index("arm")
    np.testing.assert_allclose(found.loc["opd-projected", "difference"], -0.12)
    assert found.loc["stopped", "outcome"] == "open"  # measured on one task only


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        ({"": "suffices", "-update": "suffices"}, "holds"),
        ({"": "suffices", "-update": "falls short"}, "refuted"),
        ({"": "suffices", "-update": "suffices", "-donor": "suffices"}, "refuted"),
        ({"": "suffices", "-update": "open"}, "open"),
    ],
)
def test_the_thesis_needs_the_own_subspace_and_no_other(
    outcomes: dict[str, str], said: str
) -> None:
    every = dict.fromkeys(controls.FOREIGN, "falls short")
    every |= {"stopped": "falls short"} | outcomes
    rows = pd.DataFrame({"confined": list(every), "outcome": list(every.values())})
    assert controls.thesis(rows) == said


# --- figures ---------------------------------------------------------------------


def test_dots_stand_at_what_is_lost(table: pd.DataFrame) -> None:
    (ax,) = controls_figures.subspace_dots(table, ["opd"]).axes
    dots = {
        float(line.get_ydata()[0]): float(line.get_xdata()[0])
        for line in ax.lines
        if line.get_marker() == "o"
    }
    names = [text.get_text() for text in ax.get_yticklabels()]
    assert names == ["own early subspace", "another arm's subspace", "random subspace"]
    kept = 1 + np.array([-0.02, -0.051, -0.15]) / 0.201
    np.testing.assert_allclose([dots[0], dots[1], dots[2]], kept)
    faces = {
        float(line.get_ydata()[0]): str(line.get_markerfacecolor())
        for line in ax.lines
        if line.get_marker() == "o"
    }
    assert [faces[row] == "none" for row in (0, 1, 2)] == [True, True, True]


def test_every_benchmark_has_a_row(table: pd.DataFrame) -> None:
    (ax,) = controls_figures.benchmark_dots(table, ["opd"], ["", "-random"]).axes
    assert len(ax.get_yticklabels()) == len(ALL_ACCURACIES)
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert len(dots) == 3 * len(ALL_ACCURACIES)

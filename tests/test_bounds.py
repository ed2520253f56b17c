"""Bounds held against measurements: planted numbers come out, planted breaches show."""

from itertools import product

import numpy as np
import pandas as pd
import pytest

from opd_geometry.analysis import bounds
from opd_geometry.analysis.bounds import ANGLE, DENSITY, SHIFT
from opd_geometry.experiments.measure import COLUMNS

SEEDS = (0, 1, 2)
MATRICES = 4
METRICS = ("angle_left_max_deg", "angle_right_max_deg", "bound_angle_deg", "nss")
METRICS += ("bound_nss", "density", "bound_density", "gap_share", "stable_rank")


def values(size: float, matrix: int) -> dict[str, float]:
    """Of an update of that size: smaller gaps, and angles, from matrix to matrix."""
    share = size * (1 + matrix)
    bound = float(np.degrees(np.arcsin(share))) if share < 1 else 90.0
    return {
        "frobenius_norm": 2 * size,
        "stable_rank": 4.0,  # so that the spectral norm is the size
        "gap_share": share,
        "angle_left_max_deg": 0.05 * bound,
        "angle_right_max_deg": 0.1 * bound,
        "bound_angle_deg": bound,
        "nss": 0.2 * size,
        "bound_nss": size,
        "density": 0.5 + size,
        "bound_density": 0.5 + size,
    }


def planted(sizes: dict[str, tuple[float, float]]) -> pd.DataFrame:
    """Arm to the sizes of its updates and of its nulls; an early step is no end."""
    rows = []
    for arm, (size, null) in sizes.items():
        for seed, matrix in product(SEEDS, range(MATRICES)):
            scale = 1 + 0.01 * seed
            place = (str(matrix), "q", 0)
            found = values(size * scale, matrix)
            noise = values(null * scale, matrix)
            found |= {f"null_{name}": noise[name] for name in METRICS}
            key = (f"{arm}-{seed}", arm, seed)
            rows += [(*key, 9, *place, name, value) for name, value in found.items()]
            rows.append((*key, 1, *place, "nss", 99.0))
    return pd.DataFrame(rows, columns=COLUMNS)


@pytest.fixture
def held() -> pd.DataFrame:
    return bounds.held_against(
        planted({"sft": (2.0, 0.5), "opd": (0.1, 0.05), "rlvr": (0.2, 0.1)})
    )


def test_holds_the_measured_against_its_bound(held: pd.DataFrame) -> None:
    assert len(held) == 3 * len(SEEDS) * MATRICES * 2 * 3
    one = held[(held["arm"] == "opd") & (held["seed"] == 0) & (held["matrix"] == "1")]
    one = one.set_index(["side", "gate"])
    angle = one.loc[("arm", ANGLE)]
    bound = np.degrees(np.arcsin(0.2))
    assert angle["bound"] == pytest.approx(bound)
    assert angle["measured"] == pytest.approx(0.1 * bound)  # the larger side
    assert angle["used"] == pytest.approx(np.sin(np.radians(0.1 * bound)) / 0.2)
    assert angle["gap_share"] == pytest.approx(0.2)
    assert angle["norm"] == pytest.approx(0.1)
    assert one.loc[("arm", SHIFT), "used"] == pytest.approx(0.2)
    assert one.loc[("null", SHIFT), "bound"] == pytest.approx(0.05)
    assert one.loc[("null", DENSITY), "measured"] == pytest.approx(0.55)


def test_a_null_has_the_norm_of_its_arm_and_ranks_and_gaps_of_its_own() -> None:
    table = planted({"opd": (0.1, 0.05)})
    table.loc[table["metric"] == "null_stable_rank", "value"] = 16.0
    held = bounds.held_against(table)
    one = held[(held["seed"] == 0) & (held["matrix"] == "1") & (held["gate"] == ANGLE)]
    one = one.set_index("side")
    assert one["norm"].to_dict() == pytest.approx({"arm": 0.1, "null": 0.05})
    assert one["gap_share"].to_dict() == pytest.approx({"arm": 0.2, "null": 0.1})


def test_every_arm_is_read_at_its_own_end() -> None:
    table = planted({"opd": (0.1, 0.05), "rlvr": (0.2, 0.1)})
    table.loc[table["arm"] == "opd", "step"] -= 1  # ends at 8, the other one at 9
    assert set(bounds.held_against(table)["arm"]) == {"opd", "rlvr"}


def test_a_silent_bound_has_no_used_share(held: pd.DataFrame) -> None:
    sft = held[(held["arm"] == "sft") & (held["gate"] == ANGLE)]
    assert sft[sft["side"] == "arm"]["used"].isna().all()
    # Of the null, one matrix in four has a gap larger than the update.
    assert sft[sft["side"] == "null"]["used"].notna().sum() == len(SEEDS)


def test_breaches_of_theorems_show_and_rounding_does_not(held: pd.DataFrame) -> None:
    assert bounds.violations(held).empty
    of_nss = held["gate"] == SHIFT
    held.loc[of_nss, "measured"] = held["bound"] * (1 + 1e-7)
    assert bounds.violations(held).empty
    held.loc[of_nss & (held["arm"] == "opd"), "measured"] = held["bound"] * 1.001
    assert set(bounds.violations(held)["arm"]) == {"opd"}
    held.loc[held["gate"] == DENSITY, "measured"] = 2.0  # no theorem
    assert set(bounds.violations(held)["gate"]) == {SHIFT}


def test_wedin_informs_where_most_bounds_lie_below_a_right_angle(
    held: pd.DataFrame,
) -> None:
    found = bounds.informative(held).set_index("arm")
    assert found["share"].to_dict() == {"sft": 0.0, "opd": 1.0, "rlvr": 1.0}
    assert found.loc["sft", "null"] == pytest.approx(0.25)
    assert found["outcome"].to_dict() == {
        "sft": "silent",
        "opd": "informs",
        "rlvr": "informs",
    }
    half = held.copy()
    even = half["matrix"].isin(["0", "2"])
    half.loc[(half["gate"] == ANGLE) & even, "bound"] = 90.0
    half.loc[(half["gate"] == ANGLE) & ~even, "bound"] = 45.0
    assert set(bounds.informative(half)["outcome"]) == {"undecided"}


def test_tells_the_norm_or_more() -> None:
    """Arms at 2, 2 and 3 / 4 of their nulls: the first two are told by norms alone."""
    sizes = {"opd": (0.1, 0.05), "rlvr": (0.2, 0.1), "sft": (0.15, 0.2)}
    held = bounds.held_against(planted(sizes))
    found = bounds.told_apart(held, ["opd", "rlvr", "sft"])
    assert set(found["gate"]) == {ANGLE}  # the other bounds are the norm itself
    found = found.set_index(["arm", "other"])
    assert found.loc[("opd", "rlvr"), "tells"] == "the norm"
    columns = ["measured", "bound", "tells"]
    assert found.loc[("rlvr", "sft"), columns].to_list() == ["<", "<", bounds.BEYOND]


def test_an_order_that_seeds_do_not_decide_tells_nothing() -> None:
    table = planted({"opd": (0.1, 0.05), "rlvr": (0.1, 0.05)})
    noisy = (table["arm"] == "opd") & (table["metric"] == "gap_share")
    table.loc[noisy, "value"] *= 1.0 + 0.5 * (table["seed"] - 1)
    held = bounds.held_against(table)
    assert set(bounds.told_apart(held, ["opd", "rlvr"])["tells"]) == {"undecided"}


def test_angles_may_go_against_the_bound() -> None:
    """SFT's bound is four times its null's, OPD's twice; its angle is turned round."""
    held = bounds.held_against(planted({"opd": (0.1, 0.05), "sft": (0.2, 0.05)}))
    found = bounds.told_apart(held, ["opd", "sft"]).iloc[0]
    assert (found["bound"], found["tells"]) == (">", bounds.BEYOND)
    arm = (held["arm"] == "sft") & (held["side"] == "arm")
    turned = held.assign(measured=held["measured"].where(~arm, 0.01))
    found = bounds.told_apart(turned, ["opd", "sft"]).iloc[0]
    assert (found["measured"], found["tells"]) == ("<", bounds.AGAINST)


def test_factors_are_arm_over_null(held: pd.DataFrame) -> None:
    found = bounds.factors(held, ["sft", "opd"]).set_index(["arm", "quantity"])
    assert found.loc[("opd", "Wedin's bound"), "factor"] == pytest.approx(2.0)
    assert found.loc[("sft", "Wedin's bound"), "factor"] == pytest.approx(4.0)
    assert found.loc[("opd", SHIFT), "factor"] == pytest.approx(2.0)
    assert found.loc[("opd", SHIFT), "low"] == pytest.approx(2.0)


def test_small_gaps_go_with_large_angles(held: pd.DataFrame) -> None:
    found = bounds.steering(held).set_index(["arm", "side", "cause"])["mean"]
    assert found["opd", "arm", "small gap"] == pytest.approx(1.0)
    assert found["opd", "null", "small gap"] == pytest.approx(1.0)
    turned = held.assign(measured=-held["measured"])
    found = bounds.steering(turned).set_index(["arm", "side", "cause"])["mean"]
    assert found["opd", "arm", "small gap"] == pytest.approx(-1.0)


def test_a_gap_and_a_large_update_are_two_causes(held: pd.DataFrame) -> None:
    """Angles that follow 1 / gap, in matrices that are pushed the less the more."""
    matrix = held["matrix"].astype(int)
    inverse_gap, norm = 1.0 + matrix, 8.0 - matrix**2 / 2
    moved = held.assign(
        gap_share=inverse_gap * norm, norm=norm, measured=inverse_gap**3
    )
    found = bounds.steering(moved).set_index(["arm", "side", "cause"])["mean"]
    assert found["opd", "arm", "small gap"] == pytest.approx(1.0)
    assert found["opd", "arm", "large update"] == pytest.approx(-1.0)


def test_the_summary_counts(held: pd.DataFrame) -> None:
    told = bounds.told_apart(held, ["opd", "rlvr"])
    found = bounds.summary(held, told).set_index("bounds")
    assert found["gate"].to_list() == ["I", "II", "II", "III"]
    assert found.loc["norm of the update"].drop("gate").isna().all()
    assert found.loc[SHIFT, "tests"] == 3 * len(SEEDS) * MATRICES * 2
    assert found.loc[SHIFT, "breaches"] == 0
    assert np.isnan(found.loc[DENSITY, "breaches"])
    assert found.loc[SHIFT, ["used", "used by noise"]].to_list() == pytest.approx(
        [0.2, 0.2]
    )
    assert found.loc[ANGLE, "pairs: the norm"] == 1
    assert np.isnan(found.loc[[SHIFT, DENSITY], "pairs: the norm"]).all()
    held.loc[held["matrix"] == "0", "used"] = 9.0  # one in four: a median stays
    found = bounds.summary(held, told).set_index("bounds")
    assert found.loc[SHIFT, "used"] == pytest.approx(0.2)
    held.loc[held["gate"] == SHIFT, "measured"] = 99.0
    found = bounds.summary(held, told).set_index("bounds")
    assert found.loc[SHIFT, "breaches"] == found.loc[SHIFT, "tests"]
    assert found.loc[ANGLE, "breaches"] == 0


def test_names_a_metric_that_was_not_measured() -> None:
    table = planted({"opd": (0.1, 0.05)})
    with pytest.raises(ValueError, match="no metric null_bound_nss: expected a table"):
        bounds.held_against(table[table["metric"] != "null_bound_nss"])

"""Arms at equal norm: planted curves have known crossings."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from opd_geometry.analysis import distance
from opd_geometry.analysis.distance import AT_END, AT_EQUAL_NORM
from opd_geometry.book import distance_figures
from opd_geometry.experiments.measure import COLUMNS

STEPS = (10, 20, 40, 80)
SEEDS = (0, 1, 2)


def planted(arm: str, speed: float, level: float) -> list[tuple[object, ...]]:
    """An arm whose norm is speed * step and whose nss is level * (1 + ln norm).

    Both are means over two matrices of the layers, one with a third of the other.
    """
    rows: list[tuple[object, ...]] = []
    for seed in SEEDS:
        for step in STEPS:
            norm = speed * step * (1 + 0.01 * seed)
            values = {
                "frobenius_norm": norm,
                "nss": level * (1 + np.log(norm)),
                "null_nss": 1 + np.log(norm),
            }
            rows += [
                (f"{arm}-{seed}", arm, seed, step, role, role, 0, metric, share * value)
                for metric, value in values.items()
                for role, share in (("q", 0.5), ("up", 1.5))
            ]
    return rows


@pytest.fixture
def table() -> pd.DataFrame:
    rows = planted("opd", 1.0, 2.0) + planted("rlvr", 3.0, 1.0)
    return pd.DataFrame(rows, columns=COLUMNS)


def test_reads_between_checkpoints(table: pd.DataFrame) -> None:
    wanted = pd.Series({0: 57.0, 1: 11.0})
    found = distance.at_norm(table, "opd", "nss", wanted)
    # Linear in the logarithm of the norm, hence exact here.
    np.testing.assert_allclose(found, 2 * (1 + np.log(wanted)), rtol=1e-12)


def test_the_head_is_no_matrix_of_the_layers(table: pd.DataFrame) -> None:
    head = table[table["role"] == "q"]
    head = head.assign(matrix="head", role="head", value=99 * head["value"])
    both, wanted = pd.concat([table, head]), pd.Series({0: 57.0})
    plain = distance.at_norm(table, "opd", "nss", wanted)
    np.testing.assert_allclose(distance.at_norm(both, "opd", "nss", wanted), plain)
    for at in (AT_END, AT_EQUAL_NORM):
        found, plain = (
            distance.ratio(rows, "opd", "rlvr", "nss", at) for rows in (both, table)
        )
        np.testing.assert_allclose(found, plain)


@pytest.mark.parametrize("norm", [9.9, 80.1])
def test_never_reads_beyond_the_checkpoints(table: pd.DataFrame, norm: float) -> None:
    assert np.isnan(distance.at_norm(table, "opd", "nss", pd.Series({0: norm}))[0])


def test_a_norm_that_shrinks_on_the_way_is_reached_at_no_one_moment(
    table: pd.DataFrame,
) -> None:
    back = (table["metric"] == "frobenius_norm") & (table["step"] == 40)
    table.loc[back & (table["seed"] == 1), "value"] = 15.0
    found = distance.at_norm(table, "opd", "nss", pd.Series({0: 30.0, 1: 30.0}))
    assert found.isna().to_list() == [False, True]


def test_the_common_norm_is_the_shorter_way(table: pd.DataFrame) -> None:
    found = distance.common_norm(table, "opd", "rlvr")
    np.testing.assert_allclose(found, [80.0, 80.8, 81.6])
    pd.testing.assert_series_equal(found, distance.common_norm(table, "rlvr", "opd"))


def test_an_order_of_norms_turns_round_at_equal_norm(table: pd.DataFrame) -> None:
    table.loc[(table["arm"] == "opd") & (table["metric"] == "nss"), "value"] *= 0.6
    found = distance.compared(table, [("opd", "rlvr")], ["nss"]).set_index("at")
    # opd is 1.2 times as steep; rlvr goes three times as far.
    assert found.loc[AT_END, "order"] == ">"
    assert found.loc[AT_EQUAL_NORM, "order"] == "<"
    np.testing.assert_allclose(found.loc[AT_EQUAL_NORM, "ratio"], 1 / 1.2)
    np.testing.assert_allclose(found.loc[AT_EQUAL_NORM, "null"], 1.0)
    assert found.loc[AT_END, "null"] > 1.2
    assert list(distance.fates(found.reset_index())["fate"]) == ["turns round"]


def test_arms_that_are_never_equally_far(table: pd.DataFrame) -> None:
    far = (table["arm"] == "rlvr") & (table["metric"] == "frobenius_norm")
    table.loc[far, "value"] *= 100
    found = distance.compared(table, [("opd", "rlvr")], ["nss"])
    assert list(found["n_seeds"]) == [3, 0]
    assert list(distance.fates(found)["fate"]) == ["never equal"]


def test_an_arm_without_rows_is_left_out(table: pd.DataFrame) -> None:
    pairs = [("opd", "sft"), ("opd", "rlvr")]
    found = distance.compared(table, pairs, ["nss"])
    assert set(found["other"]) == {"rlvr"}


@pytest.mark.parametrize(
    ("end", "equal", "fate"),
    [
        (">", ">", "survives"),
        (">", "<", "turns round"),
        ("<", "?", "goes"),
        ("?", "<", "comes"),
        ("?", "?", "none"),
    ],
)
def test_fates(end: str, equal: str, fate: str) -> None:
    rows = [
        {"arm": "a", "other": "b", "metric": "nss", "at": at, "n_seeds": 5, "order": o}
        for at, o in ((AT_END, end), (AT_EQUAL_NORM, equal))
    ]
    assert list(distance.fates(pd.DataFrame(rows))["fate"]) == [fate]


def test_typical_sizes_leave_out_what_is_never_equal() -> None:
    rows = [
        {"arm": "a", "other": other, "metric": "nss", "at": at, "ratio": ratio}
        for other, end, equal in (
            ("b", 2.0, 1.1),
            ("c", 0.5, 1.3),
            ("d", 4.0, 1 / 1.2),
            ("e", 99.0, np.nan),
        )
        for at, ratio in ((AT_END, end), (AT_EQUAL_NORM, equal))
    ]
    found = distance.typical_sizes(pd.DataFrame(rows)).loc["nss"]
    np.testing.assert_allclose(np.exp(found), [2.0, 1.2])


def test_every_rung_of_the_ladder_begins_where_the_last_one_ended() -> None:
    arms = [(arm, other) for arm, other, _ in distance.LADDER]
    assert all(a[1] == b[0] for a, b in pairwise(arms))


# --- figures ---------------------------------------------------------------------


def test_a_dot_stands_at_its_ratio(table: pd.DataFrame) -> None:
    found = distance.compared(table, [("opd", "rlvr")], ["nss"])
    figure = distance_figures.ladder(found, {("opd", "rlvr"): "reward"})
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    drawn = sorted(float(dot.get_xdata()[0]) for dot in dots)
    np.testing.assert_allclose(drawn, sorted(found["ratio"]))
    (label,) = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert label == "reward\nOPD → RLVR"

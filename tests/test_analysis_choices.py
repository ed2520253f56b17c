"""What hangs on a choice: planted tables have planted fates."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest

from opd_geometry.analysis import choices
from opd_geometry.analysis.choices import (
    CHOICES,
    HANGS,
    NULL,
    OPEN,
    STAYS,
    Choice,
    Reading,
)
from opd_geometry.analysis.claims import judge
from opd_geometry.analysis.statements import claim_of
from opd_geometry.experiments.measure import COLUMNS

SEEDS = (0, 1, 2)
STEPS = (10, 50)
# matrix, role, number of entries
MATRICES = (("a", "q", 100.0), ("b", "up", 300.0))
HILL = Choice(
    "hill_alpha",
    "k",
    (Reading("2", "hill_alpha@k=2"), Reading("8", "hill_alpha")),
    "8",
    log=True,
)


def rows_of(
    arm: str, metric: str, level: float, slope: float = 0.0, noise: float = 0.01
) -> list[tuple[object, ...]]:
    """A metric of both matrices: the second has ``slope`` more, seeds differ a bit."""
    return [
        (f"{arm}-{seed}", arm, seed, step, name, role, 0, metric, value)
        for seed in SEEDS
        for step in STEPS
        for index, (name, role, _) in enumerate(MATRICES)
        for value in [level + slope * index + noise * (seed - 1) + (step - 50) / 1e3]
    ]


def sizes(arm: str) -> list[tuple[object, ...]]:
    return [
        (f"{arm}-{seed}", arm, seed, 0, name, role, 0, "parameters", size)
        for seed in SEEDS
        for name, role, size in MATRICES
    ]


def planted(levels: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    rows = [
        row
        for arm, of_arm in levels.items()
        for row in sizes(arm)
        + [r for metric, level in of_arm.items() for r in rows_of(arm, metric, level)]
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


@pytest.fixture
def turning() -> pd.DataFrame:
    """OPD has more by one k and less by the other; its null lies above by both."""
    return planted(
        {
            "sft": {"hill_alpha@k=2": 2.0, "hill_alpha": 1.0},
            "opd": {
                "hill_alpha@k=2": 1.0,
                "hill_alpha": 2.0,
                "null_hill_alpha@k=2": 8.0,
                "null_hill_alpha": 4.0,
            },
        }
    )


def test_an_order_that_turns_hangs_on_the_choice(turning: pd.DataFrame) -> None:
    compared = choices.compared(turning, ["sft", "opd"], [HILL])
    found = choices.fates(compared).set_index(["arm", "other"])
    assert found.loc[("sft", "opd"), ["signs", "fate"]].to_list() == ["<>", HANGS]
    assert found.loc[(NULL, "opd"), ["signs", "fate"]].to_list() == ["<<", STAYS]
    assert (NULL, "sft") not in found.index  # it has no null
    by_value = compared[compared["arm"] == "sft"].set_index("value")["difference"]
    assert by_value["2"] == pytest.approx(np.log(1 / 2), abs=1e-4)
    assert by_value["8"] == pytest.approx(np.log(2 / 1), abs=1e-4)
    null = compared[compared["arm"] == NULL].set_index("value")["difference"]
    assert null["8"] == pytest.approx(np.log(2 / 4), abs=1e-4)


def test_the_rule() -> None:
    assert choices.fate("><") == choices.fate("?<?>") == HANGS
    assert choices.fate(">>") == choices.fate("<") == STAYS
    assert choices.fate("?") == choices.fate(">?") == OPEN


def test_counts_fates(turning: pd.DataFrame) -> None:
    found = choices.fates(choices.compared(turning, ["sft", "opd"], [HILL]))
    counts = choices.tally(found).loc[("hill_alpha", "k")]
    assert counts.to_dict() == {STAYS: 1, OPEN: 0, HANGS: 1}


def test_shares_are_compared_as_they_are() -> None:
    table = planted({"sft": {"sparsity": 0.2}, "opd": {"sparsity": 0.5}})
    choice = Choice("sparsity", "x", (Reading("x", "sparsity"),), "x")
    (difference,) = choices.compared(table, ["sft", "opd"], [choice])["difference"]
    assert difference == pytest.approx(0.3)


def test_reads_which_matrices_how_weighted_and_when() -> None:
    table = pd.DataFrame(
        sizes("opd") + rows_of("opd", "nss", 1.0, 1.0), columns=COLUMNS
    )

    def read(early: bool = False, **reading: object) -> float:
        chosen = Reading("", "nss", **reading)  # type: ignore[arg-type]
        choice = Choice("nss", "", (chosen,), "", early=early)
        return float(choices.level(table, "opd", choice, chosen).mean())

    assert read() == pytest.approx(1.5)
    assert read(roles=("q",)) == pytest.approx(1.0)
    assert read(weighted=True) == pytest.approx((1 * 100 + 2 * 300) / 400)
    assert read(early=True) == pytest.approx(1.5 - 0.04)


def test_leaves_out_an_arm_that_never_moved_and_refuses_a_table_without_any() -> None:
    table = planted({"sft": {"nss": 1.0}, "opd": {"nss": 2.0}, "rlvr": {}})
    choice = Choice("nss", "x", (Reading("x", "nss"),), "x")
    found = choices.compared(table, ["sft", "opd", "rlvr"], [choice])
    assert found[["arm", "other"]].to_numpy().tolist() == [["sft", "opd"]]
    with pytest.raises(ValueError, match="no rows of nss for rlvr: expected a table"):
        choices.compared(table, ["rlvr"], [choice])


def test_spans_reach_from_the_smallest_to_the_largest(turning: pd.DataFrame) -> None:
    (span,) = choices.spans(turning, "sft", [HILL]).itertuples()
    assert span.default == pytest.approx(1.0)
    assert (span.smallest, span.largest) == pytest.approx((1.0, 2.0))


def test_every_choice_has_its_default_among_its_values_once() -> None:
    for choice in CHOICES:
        values = [reading.value for reading in choice.readings]
        assert choice.default in values
        assert len(set(values)) == len(values) >= 2
    keys = [(choice.quantity, choice.name) for choice in CHOICES]
    assert len(set(keys)) == len(keys)


# --- claims judged again ----------------------------------------------------------


def ordered(*metrics: str, turned: str = "") -> pd.DataFrame:
    """SFT > OPD > RLVR in the metrics; the other way round in ``turned``."""
    levels = {"sft": 4.0, "sft-matched": 2.1, "opd": 2.0, "rlvr": 1.0}
    return planted(
        {
            arm: {
                **dict.fromkeys(metrics, level),
                **({turned: 5 - level} if turned else {}),
                **{f"null_{m}": 3.0 for m in (*metrics, turned) if m},
            }
            for arm, level in levels.items()
        }
    )


def test_reading_the_default_changes_no_verdict() -> None:
    table = ordered("nss")
    choice = Choice("nss", "x", (Reading("x", "nss"),), "x")
    claim = claim_of("drift-order")
    again = choices.reread(table, choice, choice.readings[0])
    assert judge(claim, again).effect == pytest.approx(judge(claim, table).effect)
    assert judge(claim, again).verdict == judge(claim, table).verdict


def test_reading_by_size_weighs_once() -> None:
    """The claim about sparsity weighs by size itself."""
    table = ordered("sparsity")
    table.loc[table["metric"].eq("sparsity") & table["role"].eq("up"), "value"] *= 2
    choice = Choice("sparsity", "x", (Reading("x", "sparsity", weighted=True),), "x")
    claim = claim_of("sparsity-order")
    again = judge(claim, choices.reread(table, choice, choice.readings[0]))
    assert again.effect == pytest.approx(judge(claim, table).effect)


def test_rotation_is_judged_on_the_angle_that_was_chosen() -> None:
    """Both largest angles give way to it."""
    largest = ("angle_left_max_deg", "angle_right_max_deg")
    table = ordered(*largest, turned="angle_left_mean_deg")
    chosen = Reading("left mean", "angle_left_mean_deg")
    choice = Choice("angle_left_mean_deg", "which angle", (chosen,), "left mean")
    again = choices.reread(table, choice, chosen)
    again = again[again["step"] == 50].groupby(["arm", "metric"])["value"].mean()
    for metric in largest:
        assert again["sft", metric] == pytest.approx(1.0)
        assert again["rlvr", metric] == pytest.approx(4.0)
        assert again["rlvr", f"null_{metric}"] == pytest.approx(3.0)


def test_attention_and_mlp_are_all_matrices() -> None:
    roles = {*choices.ATTENTION, *choices.MLP}
    assert roles == set(choices.LAYERS)


def test_a_claim_can_hang_on_the_choice() -> None:
    table = ordered("sparsity", turned="sparsity@eta=9")
    readings = (Reading("1", "sparsity"), Reading("9", "sparsity@eta=9"))
    choice = Choice("sparsity", "η", readings, "1")
    judged = [("sparsity-order", "sparsity")]
    found = choices.verdicts_by_choice(table, judged, [choice])
    assert found["value"].to_list() == ["1", "9"]
    # The claim is SFT < OPD < RLVR: turned holds, and the matched SFT lies with OPD.
    assert found["verdict"].to_list() == ["not reproduced", "explained by a control"]
    (line,) = choices.verdict_lines(found).itertuples()
    assert line.verdicts == "not reproduced: 1; explained by a control: 9"
    assert line.fate == HANGS


@pytest.mark.parametrize(
    ("verdicts", "fate"),
    [
        (["reproduced", "reproduced"], STAYS),
        (["reproduced", "not measured"], STAYS),
        (["reproduced", "inconclusive"], OPEN),
        (["inconclusive", "inconclusive"], OPEN),
        (["not measured", "not measured"], OPEN),
        (["explained by a control", "inconclusive", "not reproduced"], HANGS),
    ],
)
def test_an_inconclusive_verdict_turns_nothing(verdicts: list[str], fate: str) -> None:
    values = [str(place) for place in range(len(verdicts))]
    key = {"claim": "c", "quantity": "q", "choice": "k"}
    judged = pd.DataFrame({"value": values, "verdict": verdicts}).assign(**key)
    (line,) = choices.verdict_lines(judged).itertuples()
    assert line.fate == fate


def test_matrices_of_all_roles_count_for_a_claim_about_attention() -> None:
    rows = sizes("opd") + rows_of("opd", "stable_rank", 1.0, 1.0)
    table = pd.DataFrame(rows, columns=COLUMNS)

    def mean(reading: Reading) -> float:
        choice = Choice("stable_rank", "which matrices", (reading,), "")
        again = choices.reread(table, choice, reading)
        assert set(again["role"]) == {"q"}
        again = again[(again["metric"] == "stable_rank") & (again["step"] == 50)]
        return float(again["value"].mean())

    assert mean(Reading("", "stable_rank", ("q",))) == pytest.approx(1.0)
    assert mean(Reading("", "stable_rank", ("up",))) == pytest.approx(2.0)
    assert mean(Reading("", "stable_rank")) == pytest.approx(1.5)
    assert mean(Reading("", "stable_rank", weighted=True)) == pytest.approx(1.75)


def test_a_mask_of_another_share_has_its_baseline_where_the_claim_expects_it() -> None:
    metric = "principal_overlap@alpha=0.3"
    table = planted({"opd": {metric: 0.28, f"null_{metric}": 0.3}})
    choice = Choice("principal_overlap", "α", (Reading("0.3", metric),), "0.3")
    again = choices.reread(table, choice, choice.readings[0])
    at_end = again[again["step"] == 50].groupby("metric")["value"].mean()
    assert at_end["principal_overlap"] == pytest.approx(0.48)
    assert at_end["null_principal_overlap"] == pytest.approx(0.5)


def test_a_course_needs_more_than_the_last_checkpoint() -> None:
    table = ordered("hill_alpha", "stable_rank", turned="hill_alpha@k=2")
    last_only = (table["metric"] != "hill_alpha@k=2") | (table["step"] == 50)
    judged = [("hill-mild", "hill_alpha")]
    found = choices.verdicts_by_choice(table[last_only], judged, [HILL])
    assert (found["verdict"] == "not measured").to_list() == [True, False]
    (line,) = choices.verdict_lines(found).itertuples()
    assert line.verdicts == f"{found['verdict'][1]}: 8"
    assert line.fate == (OPEN if found["verdict"][1] == "inconclusive" else STAYS)

import copy
import math
import re
import warnings
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from opd_geometry.analysis import claims, evidence, verdicts
from opd_geometry.analysis.statements import CLAIMS, claim_of
from opd_geometry.analysis.verdicts import Control, Part
from opd_geometry.experiments.measure import COLUMNS
from opd_geometry.training.tasks import BENCHMARKS

PAPER = Path(__file__).parents[1] / "data" / "paper"
IDS = [
    "sparsity-order",
    "sparsity-robust",
    "rotation-order",
    "drift-order",
    "density-order",
    "principal-depleted",
    "lowmag-enriched",
    "rank-band",
    "norm-decoupled",
    "hill-mild",
    "early-lock",
    "sufficient-opd",
    "degrades-sft",
    "sparse-tokens",
    "off-policy",
    "mixing",
]
TEXTS = ["paper_item", "statement", "paper_value", "quantity", "unit", "rule"]
# Of data/claims.csv.
PUBLISHED = ["id", "paper_item", "statement", "paper_value", "readout", "n_seeds", "n"]
PUBLISHED += ["effect", "unit", "low", "high", "asked"]
PUBLISHED += ["ours", "ours_null", "ours_control"]
PUBLISHED += ["null", "matched", "nulls", "controls"]
PUBLISHED += ["verdict", "verdict_in_bf16", "verdict_at_papers_ratio", "rule", "runs"]
TWO_READOUTS = {"rank-band", "norm-decoupled", "hill-mild", "early-lock"}
TWO_READOUTS |= {"sparse-tokens", "off-policy", "mixing"}
STEPS = (10, 20, 100)  # the second one is where projected runs branch off
ATTENTION_METRICS = ("stable_rank", "hill_alpha", "frobenius_norm", "similarity")
NULLS = ("null", "shuffled", "turned", "increments", "walk", "rounding")
SIZES = {"q": 400, "o": 400, "up": 800}


# --- a planted table in which everything is as the paper says ---------------------


def final(sparsity, angle, nss, principal, low):
    """Diagnostics of one arm, and nulls that are the same for every arm."""
    ours = {
        "sparsity": sparsity,
        "density": 1 - sparsity,
        "angle_left_max_deg": 0.8 * angle,
        "angle_right_max_deg": 1.2 * angle,
        "nss": nss,
        "principal_overlap": principal,
        "low_magnitude_overlap": low,
    }
    flat = dict.fromkeys(ours, 0.5) | {
        "angle_left_max_deg": 1.0,
        "angle_right_max_deg": 1.0,
        "nss": 1e-4,
    }
    spectral = ("nss", "angle_left_max_deg", "angle_right_max_deg")
    for name, level in flat.items():
        sharper = "turned" if name in spectral else "shuffled"
        ours |= {f"null_{name}": level, f"{sharper}_{name}": level}
    return ours


def paths(rank, norm=1.0, hill=(2.4, 2.5, 2.6), similarity=(0.8, 0.9, 1.0)):
    """Trajectories in both readouts; nulls keep one level, well away from the arms'."""
    ours = {
        "stable_rank": rank,
        "null_stable_rank": 200.0,
        "frobenius_norm": norm,
        "hill_alpha": hill,
        "similarity_to_end": similarity,
        "null_similarity_to_end": 0.02,
    }
    for null in ("increments", "walk"):
        ours[f"{null}_stable_rank"] = (40.0, 70.0, 40.0)
        ours[f"{null}_hill_alpha"] = (4.0, 6.0, 4.0)
        ours[f"{null}_similarity_to_end"] = (0.2, 0.4, 1.0)
    ours["null_hill_alpha"] = 9.0
    ours |= dict.fromkeys(evidence.PREDICTORS.values(), 0.1)
    rounding = {"rounding_stable_rank_bf16": 30.0, "rounding_hill_alpha_bf16": 3.0}
    return ours | {f"{name}_bf16": level for name, level in ours.items()} | rounding


def scores(chain, others=0.5):
    """Sampled accuracies; without a path, of a run confined at the branch."""
    path = chain if isinstance(chain, tuple) else (0.1, 0.2, chain)
    rest = {f"accuracy/{name}": others for name in BENCHMARKS if name != "chain"}
    return {"accuracy/chain": path, **rest}


def gaining(end):
    """A free run that gains from 0.5 at the branch."""
    return scores((0.4, 0.5, end))


OPD_RANK = (20.0, 24.0, 22.0)
SFT_RANK, SFT_HILL, SFT_SIM = (20.0, 40.0, 75.0), (2.3, 3.0, 4.0), (0.3, 0.6, 1.0)
RLVR_RANK, RLVR_HILL = (26.0, 24.0, 20.0), (3.0, 2.6, 2.3)


def scaled(factor):
    return tuple(factor * value for value in OPD_RANK)


def variant(sparsity):
    return {"sparsity": sparsity, "null_sparsity": 0.3}


def paper_world():
    """Arm to metric to its level: a number, or one a checkpoint."""
    sft = paths(SFT_RANK, 9.0, SFT_HILL, SFT_SIM)
    matched = final(0.10, 10.0, 9e-4, 0.485, 0.515)
    matched |= paths(SFT_RANK, 2.0, SFT_HILL, SFT_SIM)
    # on coin flips nothing stays in a band, shrinks or locks
    coin = paths((10.0, 30.0, 40.0), 1.0, (2.0, 3.0, 4.0), (0.1, 0.5, 1.0))
    return {
        "sft": final(0.08, 12.0, 1e-3, 0.49, 0.51) | sft | gaining(0.9),
        **{arm: matched | gaining(0.8) for arm in evidence.MATCHED_ARMS},
        "rlvr-coin": coin,
        "opd": final(0.5, 1.0, 1e-4, 0.42, 0.6) | paths(OPD_RANK, 2.0) | gaining(0.9),
        "rlvr": final(0.8, 0.3, 1e-5, 0.35, 0.75)
        | paths(RLVR_RANK, 1.0, RLVR_HILL, (0.3, 0.7, 1.0))
        | gaining(0.8),
        "opd-projected": scores(0.89),
        "opd-projected-update": scores(0.9),
        "opd-projected-random": scores(0.7),
        "opd-projected-update-random": scores(0.7),
        "rlvr-projected": scores(0.6),
        **{f"{arm}-projected": scores(0.6) for arm in evidence.MATCHED_ARMS},
        "sft-projected": scores(0.7),
        "sft-projected-update": scores(0.7),
        "sft-projected-random": scores(0.6),
        "tokens-top-50": paths(scaled(1.02)),
        "tokens-top-25": paths(scaled(1.03)),
        "tokens-random-50": paths(scaled(0.98)),
        "tokens-random-25": paths(scaled(1.04)),
        **{arm: paths(scaled(1.02), 2.5) for arm in evidence.RATIO_ARMS},
        "mix-0.75": paths(scaled(1.01)),
        "mix-0.50": paths(scaled(0.97)),
        "mix-0.05": paths(scaled(0.8)),
        "mix-0.01": paths(scaled(0.75)),
        "opd-teacher-x1": variant(0.48),
        "opd-width-x2": variant(0.52),
        "opd-task-gcd": variant(0.53),
        "opd-teacher-moe": variant(0.49),
    }


def matrix_rows(metric, path, rng, noise):
    """Three matrices around the level, and two that must not be looked at."""
    rows = []
    for step, level in zip(STEPS, path, strict=True):
        value = level * math.exp(noise * rng.standard_normal())
        for role, offset in (("q", 1.1), ("o", 0.9), ("up", 1.0)):
            rows.append((step, f"layers.0.{role}", role, 0, metric, offset * value))
        rows.append((step, "head", "head", -1, metric, 1e3 * (1 + step)))
        if re.sub(f"^({'|'.join(NULLS)})_", "", metric).startswith(ATTENTION_METRICS):
            rows[-2] = (step, "layers.0.up", "up", 0, metric, -1e3)
    return rows


def plant(world, seeds=range(5), noise=0.004):
    rows = []
    for index, (arm, metrics) in enumerate(world.items()):
        for seed in seeds:
            rng = np.random.default_rng([seed, index])
            ours = [
                (0, f"layers.0.{r}", r, 0, "parameters", n) for r, n in SIZES.items()
            ]
            for metric, level in metrics.items():
                path = level if isinstance(level, tuple) else (level,) * len(STEPS)
                if metric.startswith("accuracy"):
                    shifts = noise * rng.standard_normal(len(STEPS))
                    ours += [
                        (step, "", "model", -1, metric, value + shift)
                        for step, value, shift in zip(STEPS, path, shifts, strict=True)
                    ]
                else:
                    ours += matrix_rows(metric, path, rng, noise)
            rows += [(f"{arm}{seed}", arm, seed, *row) for row in ours]
    return pd.DataFrame(rows, columns=COLUMNS)


def changed(*changes):
    """The paper's world with levels replaced: (arms, metric or metrics, level)."""
    world = copy.deepcopy(paper_world())
    for arms, metrics, level in changes:
        for arm in arms.split():
            for metric in metrics.split():
                assert metric in world[arm], (arm, metric)
                world[arm][metric] = level
    return world


def judged(claim_id, world, **how):
    """The finding on a planted world, cut down to the arms that matter."""
    claim = claim_of(claim_id)
    arms = evidence.arms_matching(
        pd.DataFrame({"arm": list(world)}), claim.arms + claim.control_arms
    )
    return claims.judge(claim, plant({arm: world[arm] for arm in arms}, **how))


@pytest.fixture(scope="module")
def paper_table():
    return plant(paper_world())


@pytest.fixture(scope="module")
def paper_findings(paper_table):
    return claims.claims_table(paper_table)


# --- texts -------------------------------------------------------------------------


def test_the_sixteen_claims_are_there_once_and_in_order():
    assert [claim.id for claim in CLAIMS] == IDS
    assert len({claim.statement for claim in CLAIMS}) == 16


@pytest.mark.parametrize("claim", CLAIMS, ids=IDS)
def test_every_text_is_there_and_fits_a_table_cell(claim):
    for name in [*TEXTS, "null", "matched"]:
        text = getattr(claim, name)
        assert text.strip()
        assert "|" not in text
        assert "\n" not in text
        assert "{" not in text
    assert claim.statement.endswith(".")
    assert claim.statement.count(".") == 1
    assert claim.rule.count("Reproduced when") == 1
    assert "not reproduced when" in claim.rule
    assert "Explained when" in claim.rule
    assert claim.arms
    assert claim.metrics


@pytest.mark.parametrize("claim", CLAIMS, ids=IDS)
def test_numbers_said_to_be_the_papers_are_in_the_papers_numbers(claim):
    printed = pd.concat(pd.read_csv(path) for path in sorted(PAPER.glob("*.csv")))
    known = set(pd.to_numeric(printed["value"], errors="coerce").dropna())
    text = re.sub(r"W_0|Figure\S*|bf16", "", claim.paper_value)
    for number in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", text):
        assert float(number) in known


def test_the_papers_numbers_are_tidy():
    for path in PAPER.glob("*.csv"):
        table = pd.read_csv(path)
        columns = [name for name in table if name != "place"]
        assert columns == ["item", "arm", "metric", "relation", "value", "unit"]
        assert not table.isna().any(axis=None)
        assert set(table["relation"]) <= {"=", "~", "<", ">"}
        keys = ["item", "arm", "metric", "relation"]
        assert not table.duplicated(keys).any()
        assert f"`{path.name}`" in (PAPER / "README.md").read_text()
        assert f"| {len(table)} |" in (PAPER / "README.md").read_text()


# --- rules -------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 5, 30])
def test_the_interval_is_scipys_and_decides_as_the_t_test_does(count):
    rng = np.random.default_rng(count)
    for _ in range(20):
        x = pd.Series(rng.normal(0.7, 1.0, count))
        mean, low, high = verdicts.interval(x)
        error = stats.sem(x)
        expected = stats.t.interval(0.95, count - 1, loc=x.mean(), scale=error)
        assert mean == pytest.approx(x.mean())
        assert (low, high) == pytest.approx(expected)
        excludes_zero = low > 0 or high < 0
        assert excludes_zero == (stats.ttest_1samp(x, 0).pvalue < 0.05)


def test_an_interval_needs_two_finite_numbers():
    assert all(math.isnan(x) for x in verdicts.interval(pd.Series([], dtype=float)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a reader's one seed should not print any
        mean, low, high = verdicts.interval(pd.Series([1.5, math.nan, math.inf]))
    assert mean == 1.5
    assert math.isnan(low)
    assert math.isnan(high)


def part(mean, error, lower=0.0, upper=math.inf):
    """A part whose interval is mean -+ error."""
    half = error / (stats.t.ppf(0.975, 2) / math.sqrt(3))
    return Part("", pd.Series([mean - half, mean, mean + half]), lower, upper)


@pytest.mark.parametrize(
    ("mean", "lower", "upper", "expected"),
    [
        (1.2, 0.0, math.inf, "holds"),
        (0.8, 0.0, math.inf, "open"),
        (-0.8, 0.0, math.inf, "open"),
        (-1.2, 0.0, math.inf, "fails"),
        (0.0, -1.2, 1.2, "holds"),
        (0.5, -1.2, 1.2, "open"),
        (2.0, -1.2, 1.2, "open"),
        (2.5, -1.2, 1.2, "fails"),
        (-2.5, -1.2, 1.2, "fails"),
        (-1.2, -math.inf, 0.0, "holds"),
        (1.2, -math.inf, 0.0, "fails"),
    ],
)
def test_a_part_is_decided_by_where_its_interval_lies(mean, lower, upper, expected):
    assert verdicts.state(part(mean, 1.0, lower, upper)) == expected


HOLDS, OPEN, FAILS = part(2, 1), part(0.5, 1), part(-2, 1)
NOTHING = Part("", pd.Series([], dtype=float))


@pytest.mark.parametrize(
    ("own", "excess", "expected"),
    [
        (HOLDS, None, "shows it too"),
        (OPEN, None, "undecided"),
        (FAILS, None, "ruled out"),
        (HOLDS, HOLDS, "ruled out"),
        (HOLDS, OPEN, "shows it too"),
        (OPEN, OPEN, "undecided"),
        (OPEN, FAILS, "shows it too"),
        (FAILS, OPEN, "ruled out"),
        (NOTHING, NOTHING, "not available"),
        (NOTHING, None, "not available"),
    ],
)
def test_a_control_explains_only_what_it_shows_and_the_arms_do_not_exceed(
    own, excess, expected
):
    assert Control("null", own, excess).ruling == expected


RULED_OUT, SHOWS = Control("null", FAILS), Control("matched", HOLDS)
UNDECIDED, ABSENT = Control("null", OPEN), Control("matched", NOTHING)


@pytest.mark.parametrize(
    ("parts", "controls", "expected"),
    [
        ([HOLDS], [], "reproduced"),
        ([HOLDS, HOLDS], [RULED_OUT, RULED_OUT], "reproduced"),
        ([HOLDS, OPEN], [RULED_OUT], "inconclusive"),
        ([HOLDS, FAILS], [SHOWS], "not reproduced"),
        ([OPEN, FAILS], [], "not reproduced"),
        ([HOLDS], [RULED_OUT, SHOWS], "explained by a control"),
        ([HOLDS], [UNDECIDED, SHOWS], "explained by a control"),
        ([HOLDS], [RULED_OUT, UNDECIDED], "inconclusive"),
        ([HOLDS], [RULED_OUT, ABSENT], "inconclusive"),
        ([OPEN], [SHOWS], "inconclusive"),
        ([NOTHING], [], "inconclusive"),
    ],
)
def test_parts_come_before_controls(parts, controls, expected):
    assert expected in verdicts.VERDICTS
    assert verdicts.verdict_of(parts, controls) == expected


def at_p(p_value):
    """A part above whose range the mean lies, at a two-sided p of four seeds."""
    spread = np.array([-1.0, -1.0, 1.0, 1.0])
    mean = stats.t.isf(p_value / 2, 3) * stats.sem(spread)
    return Part(f"p = {p_value}", pd.Series(spread + mean), -math.inf, 0.0)


@pytest.mark.parametrize("p_value", [0.9, 0.2, 0.04, 0.001])
def test_the_p_value_of_a_part_is_scipys(p_value):
    part_ = at_p(p_value)
    expected = stats.ttest_1samp(part_.values, 0.0).pvalue
    assert verdicts.against(part_) == pytest.approx(expected)
    assert verdicts.against(part_) == pytest.approx(p_value)
    assert (verdicts.state(part_) == "fails") == (p_value < 0.05)
    inside = Part("", part_.values, 0.0, math.inf)
    assert verdicts.against(inside) == 1.0


@pytest.mark.parametrize(
    ("p_values", "failing"),
    [
        ([0.04], [0.04]),
        ([0.04, 0.9], []),  # as good as nothing among two
        ([0.024, 0.9], [0.024]),
        ([0.024, 0.04], [0.024, 0.04]),  # the second is then alone
        ([0.03, 0.026, 0.9], []),
        ([0.016, 0.024, 0.9], [0.016, 0.024]),
        ([0.9, 0.016, 0.03], [0.016]),
    ],
)
def test_one_of_several_parts_fails_by_holms_method(p_values, failing):
    parts = [at_p(p) for p in p_values]
    found = dict(zip(p_values, verdicts.states(parts), strict=True))
    assert [p for p in p_values if found[p] == "fails"] == failing
    expected = "not reproduced" if failing else "inconclusive"
    assert verdicts.verdict_of(parts, []) == expected


def test_parts_that_hold_need_no_correction():
    """All must hold at once: a margin part is judged by its own 95 % interval."""
    just = part(1.001, 1.0)
    assert verdicts.states([just] * 20) == ["holds"] * 20


def test_a_control_with_nothing_to_lose_says_nothing_either_way():
    weak, strong = part(0.5, 1), part(2, 1)
    for own in (HOLDS, OPEN, FAILS):
        assert Control("matched", own, None, weak).ruling == "without power"
        plain = Control("matched", own).ruling
        assert Control("matched", own, None, strong).ruling == plain
    assert Control("matched", NOTHING, None, weak).ruling == "not available"
    powerless = Control("matched", HOLDS, None, weak)
    ruled_out = Control("matched", FAILS, None, strong)
    other_kind = Control("null", FAILS)
    verdict = verdicts.verdict_of
    assert verdict([HOLDS], [powerless, other_kind]) == "inconclusive"
    assert verdict([HOLDS], [powerless, ruled_out, other_kind]) == "reproduced"
    assert verdict([HOLDS], [powerless, SHOWS, other_kind]) == "explained by a control"
    assert verdict([FAILS], [powerless]) == "not reproduced"


def test_the_part_shown_is_the_one_that_decides():
    small, large = part(1.5, 1), part(9, 1)
    assert verdicts.deciding([large, small]) is small
    assert verdicts.deciding([small, OPEN, large]) is OPEN
    assert verdicts.deciding([part(-5, 9), FAILS, small]) is FAILS
    near_upper = part(0.9, 0.05, -math.inf, 1.0)
    assert (
        verdicts.deciding([part(0.5, 0.05, -math.inf, 1.0), near_upper]) is near_upper
    )


@pytest.mark.parametrize(
    ("shown", "expected"),
    [(0.1, "ruled out"), (0.49, "ruled out"), (0.6, "shows it too")],
)
def test_half_of_an_effect_is_what_explains_it(shown, expected):
    effect, control = part(1.0, 1e-6), part(shown, 1e-6)
    got = verdicts.exceeding("null", effect, "", control.values)
    assert got.ruling == expected


def test_a_difference_is_paired_by_seed():
    seeds = np.arange(5)
    common = pd.Series(100.0 * seeds, index=seeds)  # far larger than the effect
    level = {"sft": common, "opd": common + 1 + 0.1 * seeds, "rlvr": common[::-1] + 5}
    flat = pd.Series(0.0, index=seeds)
    parts, _ = verdicts.ordering(
        lambda arm: level.get(arm, flat),
        {"Gaussian": lambda arm: flat},
        ("sft", "opd", "rlvr"),
        ("sft-matched",),
    )
    assert [verdicts.state(p) for p in parts] == ["holds", "holds"]
    assert verdicts.interval(parts[0].values)[0] == pytest.approx(1.2)


# --- quantities --------------------------------------------------------------------


def test_sparsity_is_weighted_by_size_and_density_is_not():
    world = {"sft": {"sparsity": 0.4}}
    table = plant(world, seeds=[0], noise=0.0)
    table.loc[(table["metric"] == "sparsity") & (table["role"] == "up"), "value"] = 1.0
    roles = evidence.LAYERS
    plain = evidence.over_matrices(table, "sft", "sparsity", roles)
    weighted = evidence.over_matrices(table, "sft", "sparsity", roles, weighted=True)
    assert plain.loc[(0, 100)] == pytest.approx((0.44 + 0.36 + 1.0) / 3)
    assert weighted.loc[(0, 100)] == pytest.approx(0.25 * 0.8 + 0.5 * 1.0)


def test_claims_use_the_weighting_that_the_paper_states(paper_table):
    """With all of the difference in one large matrix the two means disagree."""
    table = paper_table.copy()
    rows = (table["metric"] == "sparsity") & (table["role"] == "up")
    small = (table["metric"] == "parameters") & (table["role"] == "up")
    table.loc[rows & (table["arm"] == "rlvr"), "value"] = 0.0
    assert claims.judge(claim_of("sparsity-order"), table).verdict == "not reproduced"
    table.loc[small, "value"] = 1.0
    assert claims.judge(claim_of("sparsity-order"), table).verdict == "reproduced"


def test_a_variant_is_read_as_its_weighted_sparsity_minus_opds(paper_table):
    """Half of the entries lie in one matrix: 0.53 / 2 + 0.9 / 2 - 0.5."""
    table = paper_table.copy()
    rows = (table["metric"] == "sparsity") & (table["role"] == "up")
    table.loc[rows & (table["arm"] == "opd-task-gcd"), "value"] = 0.9
    finding = claims.judge(claim_of("sparsity-robust"), table)
    assert finding.verdict == "not reproduced"
    assert "opd-task-gcd minus opd" in finding.unit
    assert finding.effect == pytest.approx(0.215, abs=0.01)


def test_one_matrix_that_is_nan_leaves_its_seed_out():
    table = plant({"opd": {"stable_rank": OPD_RANK}}, seeds=range(3), noise=0.0)
    spoilt = (table["seed"] == 1) & (table["role"] == "q") & (table["step"] == 100)
    table.loc[spoilt, "value"] = math.nan
    ends = evidence.last(
        evidence.over_matrices(table, "opd", "stable_rank", ("q", "o"))
    )
    assert ends.isna().tolist() == [False, True, False]
    assert evidence.first(
        evidence.over_matrices(table, "opd", "stable_rank", ("q", "o"))
    ).tolist() == pytest.approx([20.0] * 3)


def test_first_and_last_checkpoint_are_by_step_not_by_row():
    table = plant({"opd": {"stable_rank": OPD_RANK}}, seeds=range(3), noise=0.0)
    table = table.sample(frac=1.0, random_state=1)
    path = evidence.over_matrices(table, "opd", "stable_rank", ("q", "o"))
    assert evidence.first(path).tolist() == pytest.approx([20.0] * 3)
    assert evidence.last(path).tolist() == pytest.approx([22.0] * 3)


def test_the_distance_of_trajectories():
    world = {"opd": {"stable_rank": OPD_RANK}, "x": {"stable_rank": (22.0, 24.0, 20.0)}}
    table = plant(world, seeds=[0], noise=0.0)
    expected = (math.log(1.1) + 0.0 + math.log(1.1)) / 3
    assert evidence.distance(table, "x", "opd").tolist() == pytest.approx([expected])
    fewer = table[(table["arm"] == "opd") | (table["step"] != 20)]
    assert evidence.distance(fewer, "x", "opd").isna().all()


def test_accuracy_at_the_end_and_at_the_branch():
    table = plant({"opd": scores((0.5, 0.6, 0.9), 0.3)}, seeds=[3], noise=0.0)
    every = evidence.ALL_ACCURACIES
    assert evidence.accuracy(table, "opd", evidence.CHAIN).to_dict() == {3: 0.9}
    assert evidence.accuracy(table, "opd", evidence.CHAIN, 0.2).to_dict() == {3: 0.6}
    mean = (0.9 + 0.3 * (len(every) - 1)) / len(every)
    assert evidence.accuracy(table, "opd", every)[3] == pytest.approx(mean)
    partly = table[table["metric"] != "accuracy/gcd"]
    assert evidence.accuracy(partly, "opd", every).isna().all()
    assert evidence.accuracy(table, "rlvr", evidence.CHAIN).empty


# --- verdicts on planted worlds ----------------------------------------------------


def test_in_the_papers_world_every_claim_is_reproduced(paper_findings):
    found = paper_findings
    assert dict(zip(found["id"], found["verdict"], strict=True)) == {
        name: "reproduced" for name in IDS
    }
    assert (found["n_seeds"] == 5).all()
    assert (found["low"] <= found["effect"]).all()
    assert (found["effect"] <= found["high"]).all()
    assert not found["runs"].str.contains("missing").any()


REFUTED = [
    ("sparsity-order", ("opd", "sparsity", 0.05)),
    ("sparsity-order", ("rlvr", "sparsity", 0.3)),
    ("sparsity-robust", ("opd-teacher-moe", "sparsity", 0.6)),
    ("sparsity-robust", ("opd-task-gcd", "sparsity", 0.4)),
    ("rotation-order", ("rlvr", "angle_left_max_deg angle_right_max_deg", 2.0)),
    ("rotation-order", ("sft", "angle_left_max_deg angle_right_max_deg", 0.5)),
    ("rotation-order", ("rlvr", "angle_left_max_deg", 3.0)),
    ("rotation-order", ("rlvr", "angle_right_max_deg", 3.0)),
    ("drift-order", ("opd", "nss", 2e-3)),
    ("drift-order", ("rlvr", "nss", 3e-4)),
    ("density-order", ("rlvr", "density", 0.7)),
    ("density-order", ("sft", "density", 0.3)),
    ("principal-depleted", ("rlvr", "principal_overlap", 0.45)),
    ("principal-depleted", ("opd", "principal_overlap", 0.495)),
    ("principal-depleted", ("sft opd rlvr", "principal_overlap", 0.6)),
    ("lowmag-enriched", ("rlvr", "low_magnitude_overlap", 0.55)),
    ("lowmag-enriched", ("opd", "low_magnitude_overlap", 0.45)),
    ("rank-band", ("opd", "stable_rank", (20.0, 36.0, 22.0))),
    ("rank-band", ("rlvr", "stable_rank", (20.0, 24.0, 26.0))),
    ("rank-band", ("rlvr", "stable_rank", (20.0, 20.4, 20.8))),  # less than opd
    ("rank-band", ("sft", "stable_rank", (20.0, 18.0, 15.0))),
    ("rank-band", ("opd", "stable_rank", (28.0, 25.0, 20.0))),  # shrinks as RLVR does
    ("norm-decoupled", ("rlvr", "frobenius_norm", 1.8)),
    ("norm-decoupled", ("rlvr", "stable_rank", (26.0, 20.0, 12.0))),
    ("hill-mild", ("opd", "hill_alpha", (2.0, 2.5, 3.0))),
    ("hill-mild", ("sft", "hill_alpha", (2.4, 2.6, 2.9))),
    ("hill-mild", ("rlvr", "hill_alpha", (2.3, 2.6, 3.0))),
    ("early-lock", ("sft", "similarity_to_end", (0.9, 0.95, 1.0))),
    ("early-lock", ("rlvr", "similarity_to_end", (0.9, 0.95, 1.0))),
    ("early-lock", ("opd", "similarity_to_end", (0.45, 0.8, 1.0))),
    ("sufficient-opd", ("opd-projected", "accuracy/chain", (0.1, 0.2, 0.7))),
    ("sufficient-opd", ("opd-projected-update", "accuracy/chain", (0.1, 0.2, 0.8))),
    ("sufficient-opd", ("opd-projected", "accuracy/gcd accuracy/base", 0.2)),
    ("degrades-sft", ("sft-projected", "accuracy/chain", (0.1, 0.2, 0.9))),
    ("degrades-sft", ("sft-projected-update", "accuracy/chain", (0.1, 0.2, 0.9))),
    ("degrades-sft", ("opd-projected", "accuracy/chain", (0.1, 0.2, 0.6))),
    ("sparse-tokens", ("tokens-random-25", "stable_rank", scaled(1.2))),
    ("sparse-tokens", ("tokens-top-50", "stable_rank", scaled(0.8))),
    ("off-policy", ("off-policy", "stable_rank", scaled(1.2))),
    ("off-policy", ("off-policy", "frobenius_norm", 1.9)),
    ("off-policy", ("off-policy", "frobenius_norm", 3.2)),
    ("off-policy", ("off-policy-ratio", "stable_rank", scaled(0.8))),
    ("off-policy", ("off-policy-ratio-clip", "frobenius_norm", 3.2)),
    ("mixing", ("mix-0.50", "stable_rank", scaled(0.8))),
    ("mixing", ("mix-0.05", "stable_rank", scaled(1.01))),
]
ANGLES = "angle_left_max_deg angle_right_max_deg"
LOCKED_EARLY = (0.8, 0.9, 1.0)
SHOWN_BY_A_CONTROL = [
    ("sparsity-order", "null", ("sft", "null_sparsity", 0.2)),
    ("sparsity-order", "null", ("rlvr", "null_sparsity", 0.7)),
    ("sparsity-order", "null", ("rlvr", "shuffled_sparsity", 0.7)),
    ("sparsity-order", "matched", ("sft-matched", "sparsity", 0.45)),
    ("sparsity-order", "matched", ("sft-learns", "sparsity", 0.45)),
    ("sparsity-robust", "null", ("opd-task-gcd", "null_sparsity", 0.5)),
    ("sparsity-robust", "matched", ("ce-teacher", "sparsity", 0.52)),
    ("rotation-order", "null", ("sft", ANGLES.replace("angle", "null_angle"), 9.0)),
    ("rotation-order", "null", ("sft", ANGLES.replace("angle", "turned_angle"), 9.0)),
    ("rotation-order", "matched", ("sft-learns", ANGLES, 1.1)),
    ("drift-order", "null", ("rlvr", "null_nss", 1e-5)),
    ("drift-order", "null", ("rlvr", "turned_nss", 1e-5)),
    ("drift-order", "matched", ("sft-matched", "nss", 1e-4)),
    ("density-order", "null", ("rlvr", "null_density", 0.3)),
    ("density-order", "null", ("sft", "shuffled_density", 0.8)),
    ("density-order", "matched", ("ce-teacher", "density", 0.5)),
    ("principal-depleted", "null", ("opd", "null_principal_overlap", 0.43)),
    ("principal-depleted", "null", ("rlvr", "null_principal_overlap", 0.36)),
    ("principal-depleted", "null", ("sft opd", "null_principal_overlap", 0.44)),
    ("principal-depleted", "null", ("opd", "shuffled_principal_overlap", 0.43)),
    ("principal-depleted", "matched", ("sft-matched", "principal_overlap", 0.43)),
    ("lowmag-enriched", "null", ("rlvr", "null_low_magnitude_overlap", 0.6)),
    ("lowmag-enriched", "null", ("rlvr", "shuffled_low_magnitude_overlap", 0.6)),
    ("lowmag-enriched", "matched", ("sft-matched", "low_magnitude_overlap", 0.6)),
    ("rank-band", "null", ("opd", "null_stable_rank", 25.0)),
    ("rank-band", "null", ("opd", "walk_stable_rank", (40.0, 44.0, 42.0))),
    ("rank-band", "null", ("opd", "increments_stable_rank", (40.0, 44.0, 42.0))),
    ("rank-band", "null", ("sft", "walk_stable_rank", (20.0, 40.0, 75.0))),
    ("rank-band", "null", ("rlvr", "increments_stable_rank", (50.0, 70.0, 40.0))),
    ("rank-band", "null", ("rlvr-coin", "stable_rank", (10.0, 12.0, 14.0))),
    ("rank-band", "null", ("rlvr-coin", "stable_rank", (40.0, 70.0, 30.0))),
    ("rank-band", "matched", ("sft-learns", "stable_rank", OPD_RANK)),
    ("norm-decoupled", "null", ("rlvr", "null_stable_rank", 25.0)),
    ("hill-mild", "null", ("sft", "null_hill_alpha", (5.0, 7.0, 9.0))),
    ("hill-mild", "null", ("opd", "walk_hill_alpha", (4.0, 4.2, 4.1))),
    ("hill-mild", "matched", ("sft-matched", "hill_alpha", (2.4, 2.5, 2.6))),
    ("early-lock", "null", ("opd", "null_similarity_to_end", 0.6)),
    ("early-lock", "null", ("opd", "increments_similarity_to_end", LOCKED_EARLY)),
    ("early-lock", "null", ("opd", "walk_similarity_to_end", (0.5, 0.7, 1.0))),
    ("early-lock", "null", ("rlvr-coin", "similarity_to_end", (0.75, 0.9, 1.0))),
    ("early-lock", "null", ("opd", "similarity_of_weights", 0.5)),
    ("early-lock", "null", ("opd", "similarity_of_stage", 0.5)),
    ("early-lock", "null", ("opd", "similarity_of_arm", 0.5)),
    ("early-lock", "null", ("opd", "similarity_of_seed", 0.5)),
    ("early-lock", "matched", ("ce-teacher", "similarity_to_end", LOCKED_EARLY)),
    ("sufficient-opd", "null", ("opd-projected-random", "accuracy/chain", 0.89)),
    ("sufficient-opd", "null", ("opd-projected-update-random", "accuracy/chain", 0.9)),
    ("sufficient-opd", "matched", ("rlvr-projected", "accuracy/chain", 0.8)),
    ("sufficient-opd", "matched", ("sft-learns-projected", "accuracy/chain", 0.8)),
    ("degrades-sft", "null", ("sft-projected-random", "accuracy/chain", 0.7)),
    ("degrades-sft", "matched", ("sft-learns-projected", "accuracy/chain", 0.8)),
    ("sparse-tokens", "null", ("opd", "null_stable_rank", 25.0)),
    ("sparse-tokens", "null", ("rlvr-coin", "stable_rank", OPD_RANK)),
    ("sparse-tokens", "matched", ("rlvr", "stable_rank", OPD_RANK)),
    ("off-policy", "null", ("opd", "null_stable_rank", 25.0)),
    ("off-policy", "matched", ("sft-matched", "stable_rank", OPD_RANK)),
    ("mixing", "null", ("opd", "null_stable_rank", 25.0)),
    ("mixing", "matched", ("rlvr", "stable_rank", OPD_RANK)),
]


@pytest.mark.parametrize(("claim_id", "change"), REFUTED)
def test_the_opposite_is_not_reproduced(claim_id, change):
    finding = judged(claim_id, changed(change))
    assert finding.verdict == "not reproduced"


@pytest.mark.parametrize(("claim_id", "kind", "change"), SHOWN_BY_A_CONTROL)
def test_what_a_control_shows_too_is_explained(claim_id, kind, change):
    finding = judged(claim_id, changed(change))
    assert finding.verdict == "explained by a control"
    texts = {"null": finding.null, "matched": finding.matched}
    assert texts.pop(kind).endswith("shows it too")
    assert not next(iter(texts.values())).endswith("shows it too")


def test_every_claim_is_refuted_and_explained_in_some_world():
    assert {claim_id for claim_id, _ in REFUTED} == set(IDS)
    assert {claim_id for claim_id, _, _ in SHOWN_BY_A_CONTROL} == set(IDS)


# Margin to a world just inside it, and one just outside, of what they make.
KEPT, LOST, EXPLAINED = "reproduced", "not reproduced", "explained by a control"
MARGINS = [
    ("sparsity-robust", "opd-width-x2", "sparsity", 0.559, KEPT, 0.561, LOST),
    ("rank-band", "opd", "stable_rank", (18, 27.9, 20), KEPT, (18, 28.1, 20), LOST),
    ("hill-mild", "opd", "hill_alpha", (2.3, 2.89, 2.5), KEPT, (2.3, 2.91, 2.5), LOST),
    ("norm-decoupled", "rlvr", "frobenius_norm", 1.59, KEPT, 1.61, LOST),
    (
        "early-lock",
        "opd",
        "similarity_to_end",
        (0.505, 0.8, 1.0),
        KEPT,
        (0.495, 0.8, 1.0),
        LOST,
    ),
    (
        "sufficient-opd",  # OPD gains 0.4 after the branch, and keeps nine tenths of it
        "opd-projected",
        "accuracy/chain",
        (0.1, 0.2, 0.861),
        KEPT,
        (0.1, 0.2, 0.859),
        LOST,
    ),
    (
        "degrades-sft",
        "sft-projected-update",
        "accuracy/chain",
        (0.1, 0.2, 0.859),
        KEPT,
        (0.1, 0.2, 0.861),
        LOST,
    ),
    (
        "sparse-tokens",
        "tokens-top-25",
        "stable_rank",
        scaled(1.099),
        KEPT,
        scaled(1.101),
        LOST,
    ),
    ("sparse-tokens", "opd", "null_stable_rank", 44.1, KEPT, 43.9, EXPLAINED),
    ("off-policy", "off-policy", "frobenius_norm", 2.99, KEPT, 3.01, LOST),
]


@pytest.mark.parametrize(
    ("claim_id", "arm", "metric", "inside", "then", "outside", "else_"), MARGINS
)
def test_margins_are_those_that_were_fixed_before_the_runs(
    claim_id, arm, metric, inside, then, outside, else_
):
    for level, verdict in ((inside, then), (outside, else_)):
        world = changed((arm, metric, level))
        assert judged(claim_id, world, noise=1e-6).verdict == verdict


def test_variants_are_weighted_by_size_too(paper_table):
    """What the small matrices gain and the large one loses cancels out."""
    table = paper_table.copy()
    variant = (table["arm"] == "opd-width-x2") & (table["metric"] == "sparsity")
    table.loc[variant, "value"] += np.where(table["role"] == "up", -0.2, 0.2)[variant]
    assert claims.judge(claim_of("sparsity-robust"), table).verdict == "reproduced"


def test_sft_matched_can_explain_the_depletion_and_not_the_order():
    """It stands for OPD there, not for RLVR, which is depleted twice as much."""
    world = changed(
        ("sft", "principal_overlap", 0.47), ("sft-matched", "principal_overlap", 0.455)
    )
    finding = judged("principal-depleted", world, noise=1e-4)
    assert finding.verdict == "explained by a control"
    assert finding.matched.startswith("baseline minus sft-matched: ")


def test_a_course_with_an_undefined_checkpoint_leaves_its_seed_out(paper_table):
    table = paper_table.copy()
    spoilt = (table["arm"] == "opd") & (table["metric"] == "stable_rank")
    spoilt &= (table["seed"] == 3) & (table["step"] == STEPS[1])
    table.loc[spoilt, "value"] = math.nan
    rows = claims.parts_table("rank-band", table).set_index("label")
    assert rows.loc["opd, highest over lowest", "n_seeds"] == 4
    assert rows.loc["sft, last over first", "n_seeds"] == 5


def test_sft_may_grow_less_than_the_band_in_rank_but_not_in_hill():
    rank = changed(("sft", "stable_rank", (20.0, 24.0, 28.0)))
    assert judged("rank-band", rank).verdict == "reproduced"
    hill = changed(("sft", "hill_alpha", (2.4, 2.7, 2.95)))
    assert judged("hill-mild", hill).verdict == "not reproduced"


def test_the_share_kept_is_a_ratio_of_mean_gains_judged_as_a_difference():
    """A seed that gains nothing is not divided by; the verdict is the t-test's."""
    rng = np.random.default_rng(0)
    gains = np.array([0.2, 0.1, 0.0, -0.01, 0.3])
    kept = 0.8 * gains + 0.02 * rng.standard_normal(5)
    rows = []
    for seed in range(5):
        for arm, end in (("opd", gains[seed]), ("opd-projected", kept[seed])):
            for step, value in zip(STEPS, (0.3, 0.5, 0.5 + end), strict=True):
                place = ("", "model", -1, "accuracy/chain", value)
                rows.append((f"{arm}{seed}", arm, seed, step, *place))
    table = pd.DataFrame(rows, columns=COLUMNS)
    share = evidence.kept_share(table, "opd", "opd-projected")
    assert share.mean() == pytest.approx(kept.mean() / gains.mean())
    ours = stats.ttest_1samp(share - evidence.KEPT, 0).statistic
    theirs = stats.ttest_1samp(kept - evidence.KEPT * gains, 0).statistic
    assert ours == pytest.approx(theirs)
    none = table.assign(value=table["value"].clip(upper=0.5))
    assert evidence.kept_share(none, "opd", "opd-projected").isna().all()


def test_a_control_without_a_gain_leaves_degrades_sft_undecided():
    """As matched SFT is here: every subspace passes, as nothing is left to learn."""
    gone = [(arm, "accuracy/chain", (0.4, 0.5, 0.51)) for arm in evidence.MATCHED_ARMS]
    spared = [
        (f"{arm}-projected", "accuracy/chain", 0.51) for arm in evidence.MATCHED_ARMS
    ]
    finding = judged("degrades-sft", changed(*gone, *spared))
    assert finding.verdict == "inconclusive"
    assert finding.controls.startswith("without power: ")
    # another one that has power decides
    finding = judged("degrades-sft", changed(gone[0], spared[0]))
    assert finding.verdict == "reproduced"
    assert finding.matched.endswith("ruled out")


def test_a_claim_is_judged_in_the_other_readout_by_that_readouts_numbers():
    finding = judged("rank-band", paper_world())
    assert (finding.readout, finding.verdict) == ("float32", "reproduced")
    world = changed(("rlvr", "stable_rank_bf16", (20.0, 24.0, 26.0)))
    claim, table = claim_of("rank-band"), plant(world)
    assert claims.judge(claim, table).verdict == "reproduced"
    assert claims.judge(claim, table, "bf16").verdict == "not reproduced"
    row = claims.claims_table(table).set_index("id").loc["rank-band"]
    assert (row["readout"], row["verdict"]) == ("float32", "reproduced")
    assert row["verdict_in_bf16"] == "not reproduced"
    card = claims.claim_card("rank-band", table)
    assert "does not say what it read" in card
    assert "From bf16: **not reproduced**" in card
    with pytest.raises(ValueError, match=r"of drift-order: expected float32$"):
        claims.judge(claim_of("drift-order"), table, "bf16")


def test_rounding_alone_explains_what_only_stored_weights_show():
    """RLVR contracts in bf16, and so does its final update merely scaled down."""
    world = changed(("rlvr", "rounding_stable_rank_bf16", (40.0, 30.0, 25.0)))
    claim, table = claim_of("rank-band"), plant(world)
    assert claims.judge(claim, table).verdict == "reproduced"
    finding = claims.judge(claim, table, "bf16")
    assert finding.verdict == "explained by a control"
    assert finding.nulls.startswith("shows it too: rounding alone opd over rlvr: 1.6")


def test_every_control_is_named_with_what_became_of_it(paper_findings):
    rows = paper_findings.set_index("id")
    early = rows.loc["early-lock", "nulls"]
    assert early.startswith("ruled out: ")
    for name in ("two random subspaces", "rlvr-coin", "walk opd", "turned increments"):
        assert name in early
    for name in evidence.PREDICTORS:
        assert f"{name} as predictor: 0." in early
    for key in ("sparsity-order", "rank-band", "early-lock", "degrades-sft", "mixing"):
        for arm in evidence.MATCHED_ARMS:
            assert arm in rows.loc[key, "controls"]
    assert rows.loc["norm-decoupled", "controls"] == "none"
    assert "shuffled rlvr minus opd" in rows.loc["sparsity-order", "nulls"]
    assert "turned opd over rlvr" in rows.loc["drift-order", "nulls"]
    assert set(rows["n"]) == {
        "5 seeds: data, sampling and anchor each; 3 bases, 1 teacher"
    }
    for key, row in rows.iterrows():
        both = key in TWO_READOUTS
        assert row["verdict_in_bf16"] == ("reproduced" if both else "")


def test_levels_say_what_the_table_says(paper_table):
    """Grouped once for all or filtered for one, the means are the same."""
    levels = evidence.Levels(paper_table)
    for arm, metric, roles, weighted in (
        ("opd", "stable_rank", evidence.ATTENTION, False),
        ("rlvr", "sparsity", evidence.LAYERS, True),
        ("sft", "accuracy/chain", ("model",), False),
        ("sft", "no-such-metric", evidence.LAYERS, False),
    ):
        pd.testing.assert_series_equal(
            evidence.over_matrices(levels, arm, metric, roles, weighted),
            evidence.over_matrices(paper_table, arm, metric, roles, weighted),
        )
    other = levels.with_arm("rlvr", "opd")
    for arm in ("rlvr", "opd"):
        found = evidence.over_matrices(other, arm, "nss", evidence.LAYERS)
        known = evidence.over_matrices(levels, "opd", "nss", evidence.LAYERS)
        pd.testing.assert_series_equal(found, known)
    assert not levels.with_arm("rlvr", "rlvr-paper").has("rlvr", "nss")


def test_one_seed_is_inconclusive_whatever_it_shows(paper_table):
    found = claims.claims_table(paper_table[paper_table["seed"] == 2])
    assert set(found["verdict"]) == {"inconclusive"}
    assert set(found["n_seeds"]) == {1}
    assert found["low"].isna().all()
    assert found["high"].isna().all()
    assert found["effect"].notna().all()


def test_no_seed_in_common_is_inconclusive(paper_table):
    apart = (paper_table["arm"] == "opd") == (paper_table["seed"] < 2)
    found = claims.claims_table(paper_table[apart]).set_index("id")
    assert found.loc["sparsity-order", "verdict"] == "inconclusive"
    assert found.loc["sparsity-order", "n_seeds"] == 0
    assert math.isnan(found.loc["sparsity-order", "effect"])


def test_loud_seeds_are_inconclusive_and_never_explained():
    found = claims.claims_table(plant(paper_world(), noise=0.6))
    unclear = set(found["verdict"]) - {"inconclusive", "not reproduced"}
    assert not unclear
    assert (found["verdict"] == "inconclusive").sum() >= 10


def test_rlvr_equal_to_opd_is_inconclusive():
    world = changed(("rlvr", "sparsity", 0.5))
    assert judged("sparsity-order", world, noise=0.05).verdict == "inconclusive"


def test_nan_seeds_are_left_out_and_counted(paper_table):
    table = paper_table.copy()
    bad = (table["arm"] == "opd") & (table["metric"] == "nss")
    table.loc[bad & (table["seed"] == 3) & (table["role"] == "o"), "value"] = math.nan
    finding = claims.judge(claim_of("drift-order"), table)
    assert (finding.verdict, finding.n_seeds) == ("reproduced", 4)
    table.loc[bad, "value"] = math.nan
    finding = claims.judge(claim_of("drift-order"), table)
    assert (finding.verdict, finding.n_seeds) == ("inconclusive", 0)


def test_a_run_that_never_moved_has_no_ratio(paper_table):
    table = paper_table.copy()
    still = (table["arm"] == "rlvr") & (table["metric"] == "frobenius_norm")
    table.loc[still & (table["seed"] == 0), "value"] = 0.0
    finding = claims.judge(claim_of("norm-decoupled"), table)
    assert math.isfinite(finding.effect)
    assert finding.verdict == "reproduced"


@pytest.mark.parametrize("claim", CLAIMS, ids=IDS)
def test_a_missing_arm_is_named_and_nothing_is_claimed(claim, paper_table):
    for pattern in claim.arms:
        gone = paper_table["arm"].map(lambda arm, p=pattern: fnmatch(arm, p))
        finding = claims.judge(claim, paper_table[~gone])
        assert finding.verdict == "not measured"
        assert math.isnan(finding.effect)
        assert finding.n_seeds == 0
        assert pattern in finding.runs.split("missing: ")[1].split(", ")


@pytest.mark.parametrize("claim", CLAIMS, ids=IDS)
def test_a_missing_metric_is_named(claim, paper_table):
    gone = paper_table["metric"].isin(claim.metrics[:1])
    finding = claims.judge(claim, paper_table[~gone])
    assert finding.verdict == "not measured"
    assert f"{claim.metrics[0]} of {claim.arms[0].rstrip('*')}" in finding.runs


@pytest.mark.parametrize("claim", CLAIMS, ids=IDS)
def test_without_its_control_a_claim_that_holds_is_inconclusive(claim, paper_table):
    for arm in claim.control_arms:
        finding = claims.judge(claim, paper_table[paper_table["arm"] != arm])
        assert finding.verdict == "inconclusive"
        assert finding.runs.split("missing: ")[1] == arm
        is_reading = arm in evidence.RATIO_ARMS  # an open part, not a control
        assert is_reading or "not available" in finding.null + finding.matched


def test_without_its_control_a_refuted_claim_stays_refuted():
    world = changed(("opd", "sparsity", 0.05))
    del world["sft-matched"]
    assert judged("sparsity-order", world).verdict == "not reproduced"


def test_the_effect_shown_is_the_smaller_difference_and_ratios_are_factors(paper_table):
    quiet = plant(paper_world(), noise=1e-6)
    sparsity = claims.judge(claim_of("sparsity-order"), quiet)
    assert sparsity.effect == pytest.approx(0.3, abs=1e-4)  # rlvr - opd, not 0.42
    assert sparsity.unit == "share of entries: rlvr minus opd"
    drift = claims.judge(claim_of("drift-order"), quiet)
    assert drift.effect == pytest.approx(10.0, rel=1e-3)
    assert drift.unit.startswith("ratio: ")
    rotation = claims.judge(claim_of("rotation-order"), quiet)
    assert rotation.effect == pytest.approx(1.0 / 0.3, rel=1e-3)


def test_row_order_index_and_dtype_change_nothing(paper_table, paper_findings):
    other = paper_table.sample(frac=1.0, random_state=0)
    for column in ("run", "arm", "matrix", "role", "metric"):
        other[column] = other[column].astype("category")
    other.index = [0] * len(other)
    pd.testing.assert_frame_equal(claims.claims_table(other), paper_findings)


def test_claims_about_rlvr_are_judged_twice(paper_table, paper_findings):
    paper_ratio = paper_table[paper_table["arm"] == "rlvr"].assign(arm="rlvr-paper")
    reversed_rlvr = paper_table["value"].where(
        (paper_table["arm"] != "rlvr") | (paper_table["metric"] != "sparsity"), 0.0
    )
    both = pd.concat([paper_table.assign(value=reversed_rlvr), paper_ratio])
    found = claims.claims_table(both).set_index("id")
    assert found.loc["sparsity-order", "verdict"] == "not reproduced"
    named = {claim.id for claim in CLAIMS if "rlvr" in claim.arms}
    for key, row in found.iterrows():
        # What is planted in rlvr-paper is the paper's own world.
        expected = paper_findings.set_index("id").loc[key, "verdict"]
        assert row["verdict_at_papers_ratio"] == (expected if key in named else "")
    assert set(paper_findings["verdict_at_papers_ratio"]) == {"", "not measured"}


def test_a_finding_says_what_was_asked_and_where_holm_leaves_it_open() -> None:
    asked = verdicts.Part("x", pd.Series([-1.0, -1.1, -0.9]), 0.0)
    others = [verdicts.Part("y", pd.Series([1.0, 2.0, 3.0]), 0.0)] * 2
    assert verdicts.against(asked) < 0.05 / 3
    assert claims._asked(asked, [asked, *others], "share of entries") == "above 0"
    near = verdicts.Part("x", pd.Series([-1.0, -1.25, -0.6]), 0.0)
    assert 0.05 / 3 < verdicts.against(near) < 0.05
    told = claims._asked(near, [near, *others], "ratio")
    assert told == "above 1; outside, but open by Holm's method over 3 parts"
    assert claims._asked(near, [near], "ratio") == "above 1"  # alone it fails


def test_digits_on_file_survive_the_rounding_of_a_page(
    paper_findings, tmp_path
) -> None:
    exact = paper_findings.assign(low=-0.0665530507)  # of four digits: -0.06655
    path = claims.write_claims(exact, tmp_path / "claims.csv")
    assert f"{100 * claims.read_claims(path)['low'].iloc[0]:.3g}" == "-6.66"


def test_the_table_has_the_published_columns(paper_findings):
    found = paper_findings
    assert list(found) == PUBLISHED
    assert found["id"].tolist() == IDS
    assert set(found["verdict"]) <= set(verdicts.VERDICTS)


def test_an_empty_table_is_not_measured():
    found = claims.claims_table(pd.DataFrame(columns=COLUMNS))
    assert set(found["verdict"]) == {"not measured"}


def test_the_check_cells_table_agrees_with_the_verdict(paper_table):
    for name in IDS:
        rows = claims.parts_table(name, paper_table)
        kinds = rows.groupby("kind")["outcome"].agg(set).to_dict()
        assert kinds.pop("part") == {"holds"}
        assert all(outcomes == {"ruled out"} for outcomes in kinds.values())
    rows = claims.parts_table("norm-decoupled", paper_table).set_index("label")
    assert rows.loc["norm, opd over rlvr", "asked"] == "above 1.25"
    assert rows.loc["stable rank, opd over rlvr", "asked"] == "0.8 to 1.25"
    assert claims.parts_table("mixing", paper_table[:0]).empty


# --- what goes in wrong, and what comes out ----------------------------------------


def test_bad_tables_and_ids_are_refused(paper_table):
    with pytest.raises(ValueError, match="table without role"):
        claims.claims_table(paper_table.drop(columns="role"))
    twice = paper_table[paper_table["arm"] == "opd"].assign(run="other")
    with pytest.raises(ValueError, match="two runs of arm opd, seed 0"):
        claims.claims_table(pd.concat([paper_table, twice]))
    with pytest.raises(
        ValueError, match="unknown claim 'sparsity'; expected sparsity-"
    ):
        claims.claim_card("sparsity", paper_table)
    with pytest.raises(ValueError, match="expected that of claims_table"):
        claims.write_claims(paper_table, Path("nowhere.csv"))


def test_written_claims_are_rounded_and_the_same_each_time(paper_findings, tmp_path):
    found = paper_findings
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    claims.write_claims(found, first)
    jitter = found.assign(effect=found["effect"] * (1 + 1e-9))
    claims.write_claims(jitter, second)
    assert first.read_bytes() == second.read_bytes()
    assert sorted(tmp_path.glob("*.csv")) == [first, second]
    back = pd.read_csv(first)
    assert list(back) == list(found)
    for shown in re.findall(r",(0\.\d+),", first.read_text()):
        assert len(shown.lstrip("0.")) <= 6
    np.testing.assert_allclose(back["effect"], found["effect"], rtol=6e-6)
    assert back["verdict"].tolist() == found["verdict"].tolist()
    assert "not measured" not in set(back["verdict"])


def test_old_and_new_verdicts_stand_side_by_side(paper_findings, tmp_path):
    world = changed(("sft-matched", "sparsity", 0.45), ("rlvr", "nss", 3e-4))
    new = claims.write_claims(claims.claims_table(plant(world)), tmp_path / "new.csv")
    old = claims.write_claims(paper_findings[:8], tmp_path / "old.csv")
    found = claims.verdict_changes(claims.read_claims(old), claims.read_claims(new))
    assert list(found["claim"]) == IDS
    assert set(found["world"]) == {"published"}
    rows = found.set_index("claim")
    order = rows.loc["sparsity-order"]
    assert (order["before"], order["now"]) == ("reproduced", "explained by a control")
    assert order["why"].startswith("sft-matched minus sft: 36.9 points")
    assert order["why"].endswith("shows it too")
    drift = rows.loc["drift-order"]
    assert (drift["before"], drift["now"]) == ("reproduced", "not reproduced")
    assert re.match(r"ratio: opd over rlvr: 0.33\d? \[.*, .*\], 5 seeds$", drift["why"])
    assert rows.loc["mixing", "before"] == "–"
    none = claims.verdict_changes(claims.read_claims(new), claims.read_claims(old))
    assert list(none["now"][-8:]) == ["–"] * 8
    one = claims.claims_table(plant(world, seeds=range(1)))
    one = claims.read_claims(claims.write_claims(one, tmp_path / "one.csv"))
    why = claims.verdict_changes(one, one).set_index("claim")["why"]
    assert re.match(r"ratio: .*: 0.33\d? \[–, –\], 1 seeds$", why["drift-order"])
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"expected those of claims\.csv"):
        claims.read_claims(tmp_path / "bad.csv")
    with pytest.raises(ValueError, match=r"expected a claims\.csv"):
        claims.read_claims(tmp_path / "none.csv")


def test_without_its_ratios_off_policy_is_open_and_never_refuted():
    world = paper_world()
    del world["off-policy-ratio-clip"]
    finding = judged("off-policy", world)
    assert finding.verdict == "inconclusive"
    assert finding.runs.endswith("missing: off-policy-ratio-clip")
    world["off-policy"]["frobenius_norm"] = 3.2
    assert judged("off-policy", world).verdict == "not reproduced"


def test_a_failed_write_leaves_the_old_file(paper_findings, tmp_path, monkeypatch):
    path = claims.write_claims(paper_findings, tmp_path / "claims.csv")
    before = path.read_bytes()

    def full(frame, draft, **how):
        Path(draft).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(ValueError, match="No space left on device"):
        claims.write_claims(paper_findings[:3], path)
    assert path.read_bytes() == before
    assert {f.name for f in tmp_path.iterdir()} == {path.name, f"{path.name}.sha256"}


def test_a_card_says_what_the_table_says(paper_table, paper_findings, tmp_path):
    provenance = pd.DataFrame(
        [
            ("opd", 0, 100.0, "Linux x86_64"),
            ("rlvr", 0, 900.5, "Linux x86_64"),
            ("off-policy", 0, 5e6, "another"),
        ],
        columns=["arm", "seed", "wall_seconds", "machine"],
    )
    card = claims.claim_card("norm-decoupled", paper_table, provenance, "width 128")
    assert card.startswith(
        "| field | content |\n|---|---|\n| The claim | OPD moves the weights"
    )
    assert all(line.count("|") == 3 for line in card.splitlines())
    assert "**reproduced**" in card
    assert "5 seeds" in card
    assert "| width 128; opd 0-4; rlvr 0-4 |" in card
    assert "steps and batch. |" in card  # no matched arm, so no value of one
    assert "1,000 s of training in 2 runs (Linux x86_64)" in card
    control = provenance.assign(arm=["sft-matched", "mix-0.05", "sft"])
    card = claims.claim_card("sparsity-order", paper_table, control)
    assert "5,000,100 s of training in 2 runs (Linux x86_64; another)" in card
    path = claims.write_claims(paper_findings, tmp_path / "c.csv")
    stored = pd.read_csv(path)

    def words(card: str) -> str:
        """Without digits: those of the table were rounded once before."""
        return re.sub(r"\d", "", card)

    for name in IDS:
        fresh = claims.claim_card(name, paper_table)
        assert words(claims.claim_card(name, paper_findings)) == words(fresh)
        assert words(claims.claim_card(name, stored)) == words(fresh)


def test_a_card_without_a_measurement_or_an_interval(paper_table):
    card = claims.claim_card("mixing", paper_table[paper_table["arm"] == "opd"])
    assert "| Here | not measured |" in card
    assert "nan" not in card
    assert "missing: mix-0.75, mix-0.50" in card
    card = claims.claim_card("mixing", paper_table[paper_table["seed"] == 0])
    assert "interval undefined, 1 seed |" in card
    assert "nan" not in card


def test_no_verdict_is_typed_in_a_statement():
    for claim in CLAIMS:
        texts = (claim.statement, claim.paper_value, claim.quantity, claim.null)
        assert not any("reproduced" in text for text in texts)


# --- levels as the paper prints them -----------------------------------------------


def planted_levels(metric: str, by_arm: dict[str, float]) -> pd.DataFrame:
    """Two seeds, two checkpoints, one matrix; the first checkpoint has half."""
    rows = [
        (f"{arm}-{seed}", arm, seed, step, "0.q", "q", 0, metric, value * share)
        for arm, value in by_arm.items()
        for seed in (0, 1)
        for step, share in ((5, 0.5), (10, 1.0 + 0.1 * seed))
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def test_levels_stand_in_the_papers_unit_and_order():
    table = planted_levels("density", {"rlvr": 0.2, "sft": 0.6, "opd": 0.4})
    claim = claim_of("density-order")
    assert claims.levels_text(claim, table) == "63.0 / 42.0 / 21.0 % (sft / opd / rlvr)"
    assert claims.levels_text(claim, table, "null_") == ""
    assert claims.levels_text(claim, table[table["arm"] != "sft"]) == ""


def test_levels_of_a_course_are_its_lowest_and_highest_mean():
    table = planted_levels("stable_rank", {"sft": 2.0, "opd": 4.0, "rlvr": 8.0})
    text = claims.levels_text(claim_of("rank-band"), table)
    assert text == "sft 1 to 2.1, opd 2 to 4.2, rlvr 4 to 8.4"


def test_levels_of_the_first_checkpoint():
    table = planted_levels("similarity_to_end", {"sft": 0.2, "opd": 0.6, "rlvr": 1.0})
    text = claims.levels_text(claim_of("early-lock"), table)
    assert text == "0.1 / 0.3 / 0.5 (sft / opd / rlvr)"

"""What printed numbers allow, and what one seed would say: planted and enumerated."""

from itertools import product

import numpy as np
import pandas as pd
import pytest

from opd_geometry.analysis import exclusions
from opd_geometry.analysis.exclusions import (
    FITS,
    MASKS,
    THREE,
    Point,
    share_interval,
    share_interval_of_means,
)
from opd_geometry.book import exclusions_figures
from opd_geometry.experiments.choices import MASK_SHARES
from opd_geometry.experiments.measure import COLUMNS
from opd_geometry.geometry.comparison import MASK_ALPHA


def shares_of(mask: np.ndarray, update: np.ndarray) -> tuple[float, float, float]:
    """alpha, density, overlap."""
    inside = (mask & update).sum() / update.sum()
    return float(mask.mean()), float(update.mean()), float(inside)


def test_every_mask_and_update_of_five_entries_lie_inside_and_reach_both_ends() -> None:
    sets = [np.array(bits, dtype=bool) for bits in product((0, 1), repeat=5)]
    reached: dict[tuple[float, float], set[float]] = {}
    for mask, update in product(sets, sets):
        if not update.any():
            continue
        alpha, density, overlap = shares_of(mask, update)
        low, high = share_interval(density, overlap)
        assert low - 1e-12 <= alpha <= high + 1e-12
        wide_low, wide_high = share_interval_of_means(density, overlap)
        assert wide_low - 1e-12 <= low
        assert high <= wide_high + 1e-12
        reached.setdefault((density, overlap), set()).add(alpha)
    for (density, overlap), alphas in reached.items():
        ends = min(alphas), max(alphas)
        np.testing.assert_allclose(ends, share_interval(density, overlap), atol=1e-12)


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.5, 0.9])
def test_means_over_unlike_matrices_keep_the_true_share_inside(alpha: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        n_matrices = int(rng.integers(1, 6))
        rows, weights = [], rng.random(n_matrices)
        for density in rng.random(n_matrices):
            mask = np.arange(100) < 100 * alpha
            # from updates that avoid the mask to updates that seek it
            score = rng.random(100) + rng.choice([-2.0, 0.0, 2.0]) * mask
            update = score > np.quantile(score, min(density, 0.98))
            rows.append(shares_of(mask, update)[1:])
        density, overlap = np.average(rows, axis=0, weights=weights)
        low, high = share_interval_of_means(float(density), float(overlap))
        assert low - 1e-12 <= alpha <= high + 1e-12


def test_the_bound_of_means_is_reached() -> None:
    # Half of the matrices changed everywhere, half only inside the mask, fully.
    density, overlap = (1.0 + 0.5) / 2, (0.5 + 1.0) / 2
    assert share_interval_of_means(density, overlap)[0] == 0.5
    # Half changed everywhere, half only outside the mask.
    assert share_interval_of_means(density, (0.5 + 0.0) / 2)[1] == 0.5


@pytest.mark.parametrize("shares", [(1.1, 0.5), (0.5, -0.1), (46.28, 27.31)])
@pytest.mark.parametrize("function", [share_interval, share_interval_of_means])
def test_per_cent_is_refused(function: object, shares: tuple[float, float]) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match="expected a share from 0 to 1"):
        function(*shares)


def test_the_papers_numbers_allow_what_it_draws_and_not_what_it_states() -> None:
    rows = exclusions.printed_shares()
    assert list(rows["arm"]) == ["sft", "sft", "opd", "opd", "rlvr", "rlvr"]
    assert rows["density"].tolist()[::2] == [0.9273, 0.4628, 0.2776]
    ends = exclusions.joint(rows)
    assert ends["low"] <= 0.3 <= ends["high"] < 0.5
    assert ends["mean_low"] <= 0.3 <= ends["mean_high"] < 0.5


@pytest.fixture
def table() -> pd.DataFrame:
    """Two matrices of unlike size whose updates and masks were drawn."""
    rng = np.random.default_rng(1)
    shares = {f"@alpha={name}": share for name, share in MASK_SHARES.items()}
    rows: list[tuple[object, ...]] = []
    for arm, seed, (name, size) in product(
        ("rlvr", "opd", "sft"), (0, 1), {"a": 4000, "b": 1000}.items()
    ):
        place = (f"{arm}-{seed}", arm, seed)
        rows.append((*place, 0, name, "q", 0, "parameters", float(size)))
        for step, prefix in product((10, 20), ("", "null_")):
            update = rng.random(size) < rng.random()
            rows.append((*place, step, name, "q", 0, f"{prefix}density", update.mean()))
            for mask, (suffix, alpha) in product(MASKS, [("", 0.5), *shares.items()]):
                held = np.arange(size) < alpha * size
                overlap = (held & update).sum() / update.sum()
                metric = f"{prefix}{mask}{suffix}"
                rows.append((*place, step, name, "q", 0, metric, overlap))
    return pd.DataFrame(rows, columns=COLUMNS)


@pytest.mark.parametrize("prefix", ["", "null_"])
@pytest.mark.parametrize("alpha", [MASK_ALPHA, *MASK_SHARES.values()])
def test_a_known_share_lies_inside_its_interval(
    table: pd.DataFrame, alpha: float, prefix: str
) -> None:
    rows = exclusions.measured_shares(table, THREE, alpha, prefix)
    assert list(dict.fromkeys(rows["arm"])) == list(THREE)
    assert list(rows["seed"][:4]) == [0, 0, 1, 1]
    for low, high in (("low", "high"), ("mean_low", "mean_high")):
        assert (rows[low] <= alpha).all()
        assert (rows[high] >= alpha).all()
    last = table[(table["step"] == 20) & (table["arm"] == "opd")]
    density = last[(last["metric"] == f"{prefix}density") & (last["seed"] == 0)]
    opd = rows[(rows["arm"] == "opd") & (rows["seed"] == 0)]
    np.testing.assert_allclose(opd["density"], density["value"].mean())
    # pooled by hand: 4000 and 1000 entries
    pooled = float(np.average(density["value"], weights=[4000, 1000]))
    np.testing.assert_allclose(opd["high"] - opd["low"], 1 - pooled)


def test_shares_that_were_not_measured_are_refused(table: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="no principal_overlap, low_magnitude_overlap"):
        exclusions.measured_shares(table, THREE, 0.4)


def test_shares_are_drawn_with_the_right_names(table: pd.DataFrame) -> None:
    known = {a: exclusions.measured_shares(table, THREE, a) for a in (0.3, 0.5)}
    paper = exclusions.printed_shares()
    figure = exclusions_figures.feasible_shares(
        paper, {0.3: "drawn", 0.5: "stated"}, *[known] * 2
    )
    left, right = figure.axes
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names[:3] == ["SFT, principal", "SFT, low-magnitude", "OPD, principal"]
    assert names[-1] == "all together"
    others = [label.get_text() for label in right.get_yticklabels()]
    assert others == [*names, "Gaussian updates"]
    thick = [line for line in left.get_lines() if line.get_linewidth() == 7]
    np.testing.assert_allclose(thick[0].get_xdata(), [0.2750, 0.3477], atol=1e-4)


# --- one seed --------------------------------------------------------------------


@pytest.mark.parametrize("n_seeds", [1, 2, 5])
def test_how_often_one_seed_contradicts_the_mean_of_nothing(n_seeds: int) -> None:
    draws = np.random.default_rng(0).normal(size=(200_000, n_seeds))
    differs = np.sign(draws[:, 0]) != np.sign(draws.mean(axis=1))
    expected = exclusions.other_side_share(n_seeds)
    assert abs(differs.mean() - expected) < 0.005
    with pytest.raises(ValueError, match="n_seeds 0"):
        exclusions.other_side_share(0)


def runs(norms: list[float], ranks: list[float]) -> pd.DataFrame:
    """OPD's norm and stable rank by seed; RLVR's are 1."""
    rows = []
    for seed, (norm, rank) in enumerate(zip(norms, ranks, strict=True)):
        for arm, values in {"opd": (norm, rank), "rlvr": (1.0, 1.0)}.items():
            for metric, value in zip(
                ("frobenius_norm", "stable_rank"), values, strict=True
            ):
                place = (f"{arm}-{seed}", arm, seed, 10, "a", "q", 0)
                rows.append((*place, metric, value))
                rows.append((*place, f"null_{metric}", 40.0))
    return pd.DataFrame(rows, columns=COLUMNS)


def test_seeds_that_say_the_opposite_are_told() -> None:
    seeds = exclusions.by_seed(runs([1.6, 1.5, 1.2], [1.0, 1.01, 1.02]))
    assert set(seeds["claim"]) == {"norm-decoupled"}
    norm = seeds[seeds["part"] == "norm, opd over rlvr"]
    assert norm["agrees"].tolist() == [True, True, False]
    np.testing.assert_allclose(norm["distance"], np.log([1.6, 1.5, 1.2]) - np.log(1.25))
    read = exclusions.readings(seeds).loc["norm-decoupled"]
    assert (read["seeds"], read["for"], read["agree"]) == (3, 2, False)
    nearest = exclusions.closest(seeds)
    assert set(nearest["part"]) == {"norm, opd over rlvr"}
    np.testing.assert_allclose(nearest["spreads"].std(), 1.0)
    (axis,) = exclusions_figures.one_seed(seeds).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "norm decoupled:  norm, OPD over RLVR"
    ]
    red = [x for line in axis.get_lines()[2:3] for x in np.atleast_1d(line.get_xdata())]
    assert all(x < 0 for x in red)


def test_seeds_that_all_fail_agree() -> None:
    seeds = exclusions.by_seed(runs([0.9, 0.8, 0.7], [1.0, 1.001, 1.002]))
    read = exclusions.readings(seeds).loc["norm-decoupled"]
    assert (read["for"], read["agree"]) == (0, True)
    norm = exclusions.closest(seeds)
    assert set(norm["part"]) == {"norm, opd over rlvr"}
    assert (norm["spreads"] > 0).all()


def test_the_closest_call_is_told_by_its_distance_whatever_its_side() -> None:
    seeds = exclusions.by_seed(runs([0.2, 0.21, 0.19], [1.0, 1.1, 1.2]))
    means = seeds.groupby("part")["mean"].first()
    assert means["norm, opd over rlvr"] < 0 < means["stable rank, opd over rlvr"]
    nearest = exclusions.closest(seeds)
    assert set(nearest["part"]) == {"stable rank, opd over rlvr"}


def test_one_seed_is_read_and_drawn_without_a_spread() -> None:
    seeds = exclusions.by_seed(runs([1.6], [1.0]))
    assert seeds["spread"].isna().all()
    assert exclusions.readings(seeds)["agree"].all()
    assert exclusions.closest(seeds).empty
    assert exclusions_figures.one_seed(seeds).axes


# --- points, printed numbers, settings ---------------------------------------------


def test_a_point_that_is_not_borne_out_fits_after_all() -> None:
    kept = Point("a", "cannot both be", True, "1 is not 2", "2")
    gone = Point("b", "a choice left open", False, "1 is 1", "1")
    table = exclusions.points_table([kept, gone])
    assert list(table["kind"]) == ["cannot both be", FITS]
    assert list(table.columns) == ["point", "kind", "computed", "here instead"]
    assert exclusions.points_table([]).empty


def test_printed_numbers_are_numbers_and_words() -> None:
    settings = exclusions.printed("settings").set_index(["arm", "metric"])["value"]
    assert settings["opd", "batch_sequences"] == 64.0
    assert settings["sft", "schedule"] == "cosine"
    assert exclusions.printed("table_1")["value"].dtype == float
    with pytest.raises(ValueError, match="no printed numbers 'table_9'; expected fig"):
        exclusions.printed("table_9")


def test_settings_stand_side_by_side() -> None:
    table = exclusions.settings_table("published").set_index("setting")
    assert table.loc["learning rate"].tolist() == [
        "1e-05",
        "0.0005",
        "1e-06",
        "1e-05",
        "1e-06",
        "1e-05",
    ]
    assert table.loc["start"].tolist()[1::2] == ["base", "anchor", "anchor"]
    assert table.loc["batch sequences", "OPD, here"] == "192"
    assert table.loc["group size", "SFT, here"] == "–"
    assert table.loc["eps", "SFT, paper"] == "–"

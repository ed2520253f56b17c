"""An update without place at a printed density: closed form, draws, planted answers."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch

from opd_geometry.analysis import exclusions
from opd_geometry.analysis.unplaced import measured as un
from opd_geometry.analysis.unplaced import one_distance as od
from opd_geometry.analysis.unplaced import origins as og
from opd_geometry.analysis.unplaced import printed as pr
from opd_geometry.geometry import unplaced as closed
from opd_geometry.geometry import updates
from opd_geometry.geometry.spectra import stable_rank

DENSITIES = {"sft": 0.9273, "opd": 0.4628, "rlvr": 0.2776}


@pytest.fixture(scope="module")
def weights() -> list[og.Origin]:
    shapes = {"q": (192, 128), "down": (128, 256)}
    return og.synthetic("Student t, 5", 3, shapes)


def by_arm(rows: list[dict[str, object]]) -> pd.Series:
    return pd.DataFrame(rows).set_index(["arm", "metric"])["value"]


@pytest.mark.parametrize("law", og.LAWS)
def test_the_closed_form_is_the_mean_of_draws(
    weights: list[og.Origin], law: str
) -> None:
    expected = by_arm(pr.expected_rows(weights, DENSITIES, law))
    draws = [
        by_arm(pr.mask_rows(pr.without_place(weights, law, seed), DENSITIES))
        for seed in range(12)
    ]
    mean = pd.concat(draws, axis=1).mean(axis=1)
    for key, value in expected.items():
        assert mean[key] == pytest.approx(value, abs=0.004)
    for arm, density in DENSITIES.items():
        assert mean[arm, "density"] == pytest.approx(density, abs=1e-4)


def test_a_draw_measures_what_the_library_measures(weights: list[og.Origin]) -> None:
    draw = pr.without_place(weights, "Gaussian", 0)
    scales = [own[0] for own in draw.scales([0.4])]
    found = draw.overlaps(scales)
    again = []
    for place, origin in enumerate(weights):
        visible = updates.visible_update(origin.w, draw.after(place, scales[place]))
        low = updates.low_magnitude_mask(origin.w.bfloat16(), og.ALPHA)
        again.append(updates.mask_overlap(low, visible))
    assert found["low_magnitude_overlap"] == pytest.approx(np.mean(again), abs=2e-4)


def test_pooled_and_plain_agree_on_one_matrix_and_differ_on_unlike_ones() -> None:
    (one,) = og.synthetic("Gaussian", 0, {"q": (128, 128)})
    plain, pooled, one_scale = (
        by_arm(pr.expected_rows([one], DENSITIES, "Gaussian", average))
        for average in (pr.PLAIN, pr.POOLED, pr.ONE_SCALE)
    )
    np.testing.assert_allclose(plain, pooled, rtol=1e-6)
    np.testing.assert_allclose(plain, one_scale, rtol=1e-6)
    large = og.Origin("large", "down", 0, (8 * one.w).bfloat16().float())
    unlike = by_arm(pr.expected_rows([one, large], DENSITIES, "Gaussian", pr.POOLED))
    assert abs(unlike["opd", "low_magnitude_overlap"] - plain.iloc[2]) > 0.02


def test_by_role_takes_each_roles_density(weights: list[og.Origin]) -> None:
    equal = {arm: dict.fromkeys(("q", "down"), d) for arm, d in DENSITIES.items()}
    plain = by_arm(pr.expected_rows(weights, DENSITIES, "Gaussian"))
    same = by_arm(pr.expected_rows(weights, DENSITIES, "Gaussian", pr.BY_ROLE, equal))
    np.testing.assert_allclose(plain, same, rtol=1e-9)
    apart = {arm: {"q": d / 2, "down": d} for arm, d in DENSITIES.items()}
    other = by_arm(pr.expected_rows(weights, DENSITIES, "Gaussian", pr.BY_ROLE, apart))
    assert other["opd", "low_magnitude_overlap"] > plain["opd", "low_magnitude_overlap"]


def test_what_cannot_be_is_one_clear_line(weights: list[og.Origin]) -> None:
    with pytest.raises(ValueError, match="divide per cent by 100"):
        pr.expected_rows(weights, {"opd": 46.28}, "Gaussian")
    with pytest.raises(ValueError, match="unknown average 'median'"):
        pr.expected_rows(weights, DENSITIES, "Gaussian", "median")


def test_shifted_densities_keep_their_order_and_have_the_mean() -> None:
    given = {"q": 0.1, "k": 0.3, "v": 0.9}
    found = pr.shifted(given, 0.6)
    assert np.mean(list(found.values())) == pytest.approx(0.6)
    assert sorted(found, key=found.__getitem__) == list(given)
    assert pr.shifted(given, float(np.mean(list(given.values()))))[
        "q"
    ] == pytest.approx(0.1)


def test_jaccard_without_weights_and_its_inverse() -> None:
    assert pr.independent_jaccard([0.6, 0.6]) == pytest.approx(0.6 / 1.4)
    assert pr.density_of_jaccard(0.6 / 1.4) == pytest.approx(0.6)
    unlike = pr.apart([0.3, 0.5, 0.6], 0.4)
    assert pr.independent_jaccard(unlike) == pytest.approx(0.4)


@pytest.mark.parametrize("densities", [[0.6, 0.6], [0.3, 0.5, 0.7]])
def test_agreement_is_that_of_drawn_masks(
    weights: list[og.Origin], densities: list[float]
) -> None:
    found = []
    for seed in range(4):
        for origin in weights:
            masks = []
            for j, density in enumerate(densities):
                rng = np.random.default_rng((seed, j))
                critical = origin.critical(og.drawn("uniform", origin.w.shape, rng))
                masks.append(critical <= og.scales_at(critical, [density])[0])
            found += [
                (a & b).sum() / (a | b).sum()
                for a, b in itertools.combinations(masks, 2)
            ]
    expected = pr.agreement(weights, "uniform", densities)
    assert expected == pytest.approx(np.mean(found), abs=0.004)
    assert expected > pr.independent_jaccard(densities) + 0.05


def test_shared_gains_raise_agreement_and_none_do_not(weights: list[og.Origin]) -> None:
    none, some, more = (
        pr.shared_gain(weights, 0.6, log_sd, 0, "rows") for log_sd in (0.0, 0.3, 1.0)
    )
    assert none == pytest.approx(
        pr.agreement(weights, "Gaussian", [0.6, 0.6]), abs=0.01
    )
    assert none < some < more
    assert pr.shared_gain(weights, 0.6, 1.0, 0, "columns") > none


def test_a_gain_between_kinds_of_matrices_is_found_again() -> None:
    shapes = {"q": (64, 64), "down": (64, 256)}
    origins = og.synthetic("Gaussian", 0, shapes)
    scale = 0.002
    each = [
        closed.expected_density(origin.whole, scale * gain)
        for origin, gain in zip(origins, (1.0, 0.4), strict=True)
    ]
    weighted = (each[0] + 4 * each[1]) / 5
    found = od.gain_between(origins, float(np.mean(each)), weighted)
    assert found == pytest.approx(0.4, rel=1e-3)
    assert np.isnan(od.gain_between(origins, 0.5, 0.999))


def test_every_work_that_prints_two_numbers_is_asked() -> None:
    table = exclusions.printed("related")
    sets = [og.synthetic("Gaussian", 0, {"q": (64, 64)})]
    pairs = od.related_pairs(sets, {"rlvr": (0.0, 1.0), "sft": (0.0, 1.0)})
    asked = {name for pair in pairs for name in pair.work.split(" and ")}
    linked = table[~table["metric"].isin(["gain_kept", "steps_seen", "speed"])]
    works = {item.removeprefix("arXiv:").split("/")[-1] for item in linked["item"]}
    assert works == asked
    along = [pair for pair in pairs if pair.then.startswith("energy of OPD's")]
    assert [round(pair.value, 3) for pair in along] == [0.07, 0.048]
    # what is printed is what stands in the table: nothing is typed twice
    values = {float(v) for v in table["value"]}
    for pair in pairs:
        shown = (pair.value, 100 * pair.value, 100 - 100 * pair.value)
        assert any(np.isclose(a, b) for a in shown for b in values), pair


# --- arithmetic on printed numbers -------------------------------------------------


def test_possible_overlaps_are_those_of_all_masks() -> None:
    size, n_changed, n_mask = 12, 8, 6
    changed = set(range(n_changed))
    shares = {
        len(changed & set(mask)) / n_changed
        for mask in itertools.combinations(range(size), n_mask)
    }
    low, high = od.possible_overlap(n_changed / size, n_mask / size)
    assert (low, high) == pytest.approx((min(shares), max(shares)))


def test_the_printed_bounds_and_alpha() -> None:
    table = od.weights_table(un.paper_densities(), un.paper_overlaps())
    sft = table[table["arm"] == "sft"]
    assert sft["says"].tolist() == ["nothing", "nothing"]
    assert (table["says"] == "something").sum() == 4
    low, high = sft[["low", "high"]].iloc[0]
    assert low == pytest.approx((0.9273 + 0.3 - 1) / 0.9273)
    assert high == pytest.approx(0.3 / 0.9273)
    assert table["printed"].between(table["low"], table["high"]).all()
    ends = od.alpha_interval()
    assert ends == pytest.approx((0.9273 * 0.3188, 1 - 0.9273 * (1 - 0.2966)))
    half = od.possible_overlap(0.9273, 0.5)[0]
    assert half > 0.3188  # so that half of the entries cannot be in the mask


def test_embeddings_that_explain_a_weighted_mean() -> None:
    share = od.embedding_share()
    assert share == pytest.approx(1.2447 / 8.19, rel=0.01)  # billions of parameters
    weighted = (1 - share) * 0.4 + share * 0.1
    assert od.embedding_density(weighted, 0.4) == pytest.approx(0.1)
    assert od.embedding_density(0.1, 0.4) < 0  # even untouched ones do not


def test_one_scale_moves_the_larger_matrix_of_smaller_weights_more() -> None:
    small = og.synthetic("Gaussian", 0, {"q": (64, 64)})[0]
    wide = og.synthetic("Gaussian", 1, {"down": (64, 512)})[0]
    quiet = og.Origin("wide", "down", 0, (wide.w / 4).bfloat16().float())
    table = od.two_means([small, quiet], {"opd": 0.4})
    assert table["one_scale"].iloc[0] > 0.05
    same = od.two_means([small, wide], {"opd": 0.4})
    assert same["one_scale"].iloc[0] == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("shape", [(96, 96), (64, 256)])
def test_the_spectral_shift_falls_with_the_larger_side(shape: tuple[int, int]) -> None:
    rows = od.shift_rows(DENSITIES, [shape]).set_index("arm")
    assert rows["n"].tolist() == [max(shape)] * 3
    ratio = rows["nss"] / rows["expected"]
    assert ratio.between(1 / 1.3, 1.3).all()


def test_isotropic_ranks_are_those_of_noise() -> None:
    noise = torch.randn(
        300, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    rank, energy = od.isotropic_rank((300, 200))
    assert stable_rank(noise) == pytest.approx(rank, rel=0.1)
    values = torch.linalg.svdvals(noise).square()
    assert float(values[:16].sum() / values.sum()) == pytest.approx(energy, rel=0.3)


def test_a_pair_is_read_by_its_interval() -> None:
    pairs = [
        od.Pair("a", "x", "y", 0.5, 0.4, 0.6),
        od.Pair("b", "x", "y", 0.7, 0.4, 0.6),
        od.Pair("c", "x", "y", 1.0, 0.4, 0.6, order=True),
        od.Pair("d", "x", "y", 9.0, 0.4, 0.6, order=True),
    ]
    table = od.pairs_table(pairs)
    assert table["reading"].tolist() == [od.ONE, od.MORE, od.ORDER, od.MORE]


def test_stored_norms_grow_with_the_density(weights: list[og.Origin]) -> None:
    few, many = (od.stored_norm(weights, d, "Gaussian", 0) for d in (0.01, 0.2))
    assert few < many
    sparse = od.absolute_sparsity(weights, 0.5, 0.02, "Gaussian", 0)
    assert 0.5 <= sparse < 1  # what bf16 does not show is below any tolerance
    assert od.step_sparsity(weights, 1e-6) > od.step_sparsity(weights, 1e-4)


def test_decay_is_the_sum_of_the_rates() -> None:
    assert un.decayed("rlvr") == pytest.approx(1023 * 1e-6 * 0.1)
    mean = 0.1 * 0.5 * 1e-5 + 0.9 * 0.5 * (1e-5 + 1e-6)
    assert un.decayed("sft") == pytest.approx(5375 * 0.1 * mean, rel=1e-3)


def test_the_papers_distances_in_the_unit_of_its_rates() -> None:
    rows = [("rlvr", decay, "float32", 2e-3) for decay in (0.0, 0.1)]
    columns = ["arm", "decay", "readout", "distance"]
    table = pd.DataFrame([*rows, ("rlvr", 0.0, "bf16", 9.0)], columns=columns)
    unit = 1e-6 * 1023**0.5
    found = un.paper_displacements(table, 0.03)
    assert found.to_dict() == {"rlvr": pytest.approx(2e-3 * 0.03 / unit)}

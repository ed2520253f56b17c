"""What a place moves, from which strength on, and what a printed number leaves."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from opd_geometry.analysis.unplaced import measured as un
from opd_geometry.analysis.unplaced import origins as og
from opd_geometry.analysis.unplaced import power as pw
from opd_geometry.analysis.unplaced import printed as pr
from opd_geometry.book import unplaced_figures
from opd_geometry.experiments.measure import COLUMNS
from opd_geometry.experiments.records import seal
from opd_geometry.experiments.runs import data_directory
from opd_geometry.geometry.comparison import MASK_ALPHA

DENSITIES = {"opd": 0.4628}


@pytest.fixture(scope="module")
def weights() -> list[og.Origin]:
    return og.synthetic("Gaussian", 0, {"q": (128, 128), "down": (128, 192)})


@pytest.mark.parametrize("family", pw.FAMILIES)
def test_at_its_neutral_strength_a_family_has_no_place(
    weights: list[og.Origin], family: str
) -> None:
    none = pr.without_place(weights, "Gaussian", 5)
    draw = pw.placed(weights, family, pw.FAMILIES[family].neutral, 5)
    for a, b in zip(none.directions, draw.directions, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def moved(weights: list[og.Origin], family: str, strength: float) -> dict[str, float]:
    found = []
    for draw in (
        pr.without_place(weights, "Gaussian", 1),
        pw.placed(weights, family, strength, 1),
    ):
        rows = pd.DataFrame(
            pr.mask_rows(draw, DENSITIES) + pr.spectral_rows(draw, DENSITIES)
        )
        found.append(rows.groupby("metric")["value"].mean())
    return (found[1] / found[0]).to_dict()


@pytest.mark.parametrize(
    ("family", "strength", "metric", "above"),
    [
        ("size", 1.0, "low_magnitude_overlap", False),
        ("size", -0.2, "low_magnitude_overlap", True),
        ("large", 3.0, "low_magnitude_overlap", False),
        ("small", 3.0, "low_magnitude_overlap", True),
        ("principal", 2.0, "principal_overlap", True),
        ("principal", 0.5, "principal_overlap", False),
        ("core", 1.0, "nss", True),
        ("bottom", 1.0, "nss", True),
        ("rotation", 1.0, "nss", False),
    ],
)
def test_a_planted_place_moves_its_diagnostic(
    weights: list[og.Origin], family: str, strength: float, metric: str, above: bool
) -> None:
    ratio = moved(weights, family, strength)[metric]
    assert (ratio > 1.02) if above else (ratio < 0.98)


def test_masks_do_not_see_low_rank_and_rotations(weights: list[og.Origin]) -> None:
    for family in ("low rank", "rotation"):
        found = moved(weights, family, 1.0)
        for metric in pr.MASKS:
            assert found[metric] == pytest.approx(1, abs=0.03)


def test_low_rank_and_core_are_what_they_say(weights: list[og.Origin]) -> None:
    (origin, _) = weights
    low = pw.placed([origin], "low rank", 1.0, 0).directions[0]
    assert int(torch.linalg.matrix_rank(low, rtol=1e-4)) == 128 // pw.LOW_RANK
    core = pw.placed([origin], "core", 1.0, 0).directions[0].double()
    u = origin.top.left[:, : 128 // pw.CORE]
    assert float((u.T @ core).norm() / core.norm()) == pytest.approx(1, abs=1e-5)
    rows = pw.placed([origin], "rows", 10.0, 0).directions[0].norm(dim=1)
    assert int((rows > 5 * rows.median()).sum()) == round(0.1 * 128)


def test_strengths_that_cannot_be_are_refused(weights: list[og.Origin]) -> None:
    with pytest.raises(ValueError, match="unknown place 'corner'"):
        pw.placed(weights, "corner", 1.0, 0)
    with pytest.raises(ValueError, match="expected 0 to 1"):
        pw.placed(weights, "core", 1.5, 0)
    with pytest.raises(ValueError, match="more than 0"):
        pw.placed(weights, "rows", 0.0, 0)


def test_the_crossing_is_interpolated_on_either_side() -> None:
    curve = {0.5: -2.0, 0.8: -0.5, 1.25: 0.5, 2.0: 2.0}
    assert pw.crossing("principal", curve, 0.5 - 1e-9, upwards=True) == pytest.approx(
        1.25, abs=1e-3
    )
    up = pw.crossing("principal", curve, 1.25, upwards=True)
    assert up == pytest.approx((1.25 * 2.0) ** 0.5, abs=1e-3)  # half way in logarithms
    assert pw.crossing("principal", curve, 1.25, upwards=False) == pytest.approx(
        0.4**0.5, abs=1e-3
    )
    assert np.isnan(pw.crossing("principal", curve, 5.0, upwards=True))


def planted() -> pd.DataFrame:
    """A diagnostic that moves by ten times the logarithm of the gain."""
    rows = []
    for name, family in pw.FAMILIES.items():
        for strength in family.strengths:
            place = pw.on_axis(family.unit, strength)
            value = 3 + 10 * place if name == "principal" else 3.0
            rows.append((name, strength, value))
    rows.append(("none", 0.0, 3.0))
    table = pd.DataFrame(rows, columns=["family", "strength", "value"])
    return table.assign(seed=0, arm="opd", metric="m")


def test_limits_and_what_is_left_of_a_planted_diagnostic() -> None:
    bands = {("opd", "m"): (2.0, 4.0)}
    found = pw.limits(planted(), bands).set_index("family")
    assert found.loc["principal", "above"] == pytest.approx(np.exp(0.1), rel=1e-3)
    assert found.loc["principal", "below"] == pytest.approx(np.exp(-0.1), rel=1e-3)
    assert found.loc["rows", ["below", "above"]].isna().all()
    left = pw.allowed(planted(), bands, {("opd", "m"): 5.0}).set_index("family")
    ends = left.loc["principal", ["low", "high"]].astype(float)
    assert np.log(ends).tolist() == pytest.approx([0.1, 0.3], abs=0.01)
    assert left.loc["rows", ["low", "high"]].isna().all()  # 5 is off its band anywhere
    both = pd.concat([left.reset_index(), left.reset_index().assign(metric="other")])
    both.loc[(both["family"] == "principal") & (both["metric"] == "other"), "low"] = 1.2
    joined = pw.together(both).set_index("family")
    assert joined.loc["principal", "low"] == 1.2
    assert joined.loc["rows", ["low", "high"]].isna().all()


def test_committed_limits_are_those_of_the_committed_student() -> None:
    table = pd.read_csv(data_directory() / "unplaced" / "own_limits.csv")
    density = float(table["density"].iloc[0])
    student = data_directory() / "checkpoints" / un.STUDENT
    origins = og.stored(student, alpha=MASK_ALPHA)
    values = [
        pr.mask_rows(pr.without_place(origins, "Gaussian", seed), {"opd": density})
        for seed in range(un.N_DRAWS)
    ]
    for i, metric in ((1, "low_magnitude_overlap"), (2, "principal_overlap")):
        draws = [float(str(rows[i]["value"])) for rows in values]
        half = table[table["metric"] == metric]["half"].iloc[0]
        assert (max(draws) - min(draws)) / 2 == pytest.approx(half, rel=0.02)


def test_every_diagnostic_of_the_book_has_a_limit_in_words() -> None:
    for metric in pw.OWN_METRICS:
        assert pw.detection_limit(metric, [pw.GAIN]).startswith("a gain of 1.")
        assert "of the energy" in pw.detection_limit(metric)
    with pytest.raises(ValueError, match="no detection limit of 'accuracy'"):
        pw.detection_limit("accuracy")


def ends(values: dict[str, list[float]], metric: str) -> pd.DataFrame:
    rows = [
        (f"{arm}{seed}", arm, seed, 100, "a.q", "q", 0, metric, value)
        for arm, column in values.items()
        for seed, value in enumerate(column)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def test_a_difference_shows_from_half_its_interval() -> None:
    gaps = [0.1, 0.2, 0.3]
    values = {"sft": [0.5] * 3, "opd": [0.5 + x for x in gaps], "rlvr": [0.5] * 3}
    half = stats.t.ppf(0.975, 2) * 0.1 / 3**0.5
    limit, n = pw.difference_limit(ends(values, "sparsity"), [*values], "sparsity")
    assert (limit, n) == (pytest.approx(half), 3)
    logs = {arm: list(np.exp(column)) for arm, column in values.items()}
    limit, _ = pw.difference_limit(ends(logs, "nss"), [*values], "nss")
    assert limit == pytest.approx(half)
    one = ends({arm: column[:1] for arm, column in values.items()}, "sparsity")
    assert np.isnan(pw.difference_limit(one, [*values], "sparsity")[0])
    assert pw.difference_limit(one, ["sft"], "sparsity")[1] == 0


def test_the_law_of_entries_sets_rank_and_tail(weights: list[og.Origin]) -> None:
    found = un.shapes_table(weights)
    assert set(found["law"]) == set(og.LAWS)
    wide = found[found["readout"] == "float32"].pivot_table(
        index="law", columns="metric", values="value"
    )
    assert wide["stable_rank"].idxmin() == "Student t, 3"
    m, n = 128, 160  # between the two matrices
    noise = m * n / (m**0.5 + n**0.5) ** 2
    assert wide.loc["Gaussian", "stable_rank"] == pytest.approx(noise, rel=0.1)
    nss = found[(found["metric"] == "nss") & (found["law"] == "Gaussian")]
    assert nss.set_index("arm")["value"].is_monotonic_decreasing  # SFT, OPD, RLVR


def test_a_model_is_measured_whole_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every table that ``load`` reads is made, and kept ones of other bytes stay."""
    stub = pd.DataFrame({"a": [1]})
    for name in vars(un).copy():
        if name.endswith("_table"):
            monkeypatch.setattr(un, name, lambda *_, **__: stub)
    monkeypatch.setattr(un, "role_densities", dict)
    monkeypatch.setattr(un.od, "two_means", lambda *_: stub)
    monkeypatch.setattr(un, "data_directory", lambda: tmp_path)
    monkeypatch.setattr(un, "on_shelf", lambda name: tmp_path / name)
    source = data_directory() / "checkpoints" / un.STUDENT
    assert set(un.load(str(source))) == set(un.TABLES)
    folder = tmp_path / "unplaced" / un.STUDENT
    monkeypatch.setattr(un, "make", lambda *_: pytest.fail("measured again"))
    assert len(un.load(str(source))["provenance"]) == 2
    made = []
    monkeypatch.setattr(un, "make", lambda _, folder: made.append(folder) or folder)
    (folder / "placed.csv").unlink()
    with pytest.raises(ValueError, match=r"placed.csv is damaged: No such file"):
        un.load(str(source))  # not whole: made again, and the stub makes nothing
    table = pd.read_csv(folder / "provenance.csv").assign(sha256="of another model")
    table.to_csv(folder / "provenance.csv", index=False)
    seal(folder / "provenance.csv")
    stub.to_csv(folder / "placed.csv")
    with pytest.raises(ValueError, match=r"expected.csv is damaged: No such file"):
        un.load(str(source))
    digest = og.sha256(source)[:8]
    assert [f.name for f in made] == [un.STUDENT, f"{un.STUDENT}-{digest}"]


def test_printed_orders_are_met_within_half_a_decade() -> None:
    rows = [
        (arm, "bf16", metric, value * factor)
        for (arm, metric), (_, value) in un.paper_orders().items()
        for factor in (0.5, 2.0)
    ]
    shapes = pd.DataFrame(rows, columns=["arm", "readout", "metric", "value"])
    assert un.orders_table(shapes)["met"].all()
    assert un.orders_table(shapes[::2])["met"].all()  # half of what is printed
    assert un.orders_table(shapes[1::2])["met"].all()  # twice that
    far = un.orders_table(shapes.assign(value=shapes["value"] * 10))
    assert far["met"].eq(far["relation"] == ">").all()
    near = un.orders_table(shapes.assign(value=shapes["value"] / 10))
    assert near["met"].eq(near["relation"] == "<").all()


# --- the chapter's tables and figures ----------------------------------------------


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    return un.load()


def test_committed_tables_are_whole_and_agree_with_each_other(
    tables: dict[str, pd.DataFrame],
) -> None:
    assert set(tables) == set(un.TABLES)
    base = un.base_case(tables["expected"])
    drawn = tables["drawn"].set_index(["w0", "arm", "metric"])["mean"]
    for (arm, metric), value in base.items():
        assert drawn[un.THREE_LAYERS, arm, metric] == pytest.approx(value, abs=0.001)
    assert set(tables["provenance"]["w0"]) == {un.THREE_LAYERS, un.ALL_LAYERS}
    assert tables["provenance"]["sha256"].str.fullmatch("[0-9a-f]{64}").all()
    numbers = pd.concat(tables["placed"][["value"]] for _ in (0,))
    assert np.isfinite(numbers).all().all()


def test_printed_numbers_lie_where_the_chapter_says(
    tables: dict[str, pd.DataFrame],
) -> None:
    base, paper = un.base_case(tables["expected"]), un.paper_overlaps()
    for key in un.CHOICES:
        assert abs(paper[key] - base[key]) < 0.02  # two points
    shares = un.excess_share(tables["agreement"])[un.THREE_LAYERS, un.ON]
    assert shares["Gaussian", un.EQUAL] == pytest.approx(0.93, abs=0.05)


def test_the_hero_shows_every_printed_number_in_text_that_can_be_read(
    tables: dict[str, pd.DataFrame],
) -> None:
    empty = tables["expected"].iloc[:0], tables["agreement"].iloc[:0]
    rows = un.against(tables, *empty)
    assert len(rows) == 6 + 7
    assert (rows["low"] <= rows["high"]).all()
    figure = unplaced_figures.on_bands(rows)
    assert len(figure.axes) == 3
    sizes = [t.get_fontsize() for ax in figure.axes for t in [*ax.texts, ax.title]]
    assert min(sizes) >= unplaced_figures.SMALL
    named = [t.get_text() for ax in figure.axes for t in ax.get_yticklabels()]
    assert named[:3] == ["SFT", "OPD", "RLVR"]


def test_bars_of_the_power_figure_end_where_the_table_says(
    tables: dict[str, pd.DataFrame],
) -> None:
    bands = un.bands(tables["expected"])
    values = {k: v for k, v in un.paper_overlaps().items() if k[0] != "sft"}
    left = pw.together(pw.allowed(tables["placed"], bands, values))
    figure = unplaced_figures.left_possible(left)
    names = [t.get_text() for ax in figure.axes for t in ax.get_yticklabels()]
    assert len(names) == len(pw.FAMILIES)
    gains = left[left["family"] == "principal"]
    assert (gains["low"] > 0.5).all()
    assert (gains["high"] < 2.0).all()

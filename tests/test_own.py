"""A reader's own seed is held against the range of the published ones."""

import pandas as pd
import pytest

from opd_geometry.book import own


def table(values: dict[int, float]) -> pd.DataFrame:
    rows = [
        {"run": f"r{s}", "arm": "opd", "seed": s, "step": 10, "matrix": "m"}
        | {"role": "q", "layer": 0, "metric": "nss", "value": value}
        for s, value in values.items()
    ]
    return pd.DataFrame(rows)


def test_within_and_outside_of_the_published_range() -> None:
    published = table({0: 0.10, 1: 0.20, 2: 0.15})
    for value, lies in ((0.2, "within"), (0.0999, "outside"), (0.21, "outside")):
        found = own.against_published(table({7: value}), published, ["opd"], ["nss"])
        assert found["lies"].tolist() == [lies]
        assert found[["lowest", "highest", "n"]].iloc[0].tolist() == [0.1, 0.2, 3]
    text = own.page(found)
    assert "**0 of 1 numbers" in text
    assert f"{{figure}} {own.PICTURE}" in text
    assert (
        "| OPD | 7 | spectral shift NSS | 0.21 | 0.1 to 0.2 | 3 | ✗ outside |" in text
    )


def test_the_same_seed_is_no_yardstick() -> None:
    published = table({0: 0.10, 1: 0.20})
    found = own.against_published(table({0: 0.10}), published, ["opd"], ["nss"])
    assert found[["n", "lies"]].iloc[0].tolist() == [1, "outside"]


def test_an_arm_that_was_not_published_is_left_out() -> None:
    published = table({0: 0.1}).assign(arm="sft")
    found = own.against_published(table({7: 0.2}), published, ["opd"], ["nss"])
    assert found.empty


def test_points_lie_on_the_bands_where_they_lie() -> None:
    published = pd.concat([table({0: 0.1, 1: 0.2}), table({2: 0.3})])
    found = pd.concat(
        own.against_published(table({7: value}), published, ["opd"], ["nss"])
        for value in (0.15, 0.3, 9.0)
    )
    (ax,) = own.bands(found).axes
    dots = [line for line in ax.get_lines() if line.get_marker() == "o"]
    places = [float(line.get_xdata()[0]) for line in dots]
    assert places == pytest.approx([0.25, 1.0, 1 + own.FARTHEST])
    assert [line.get_markerfacecolor() == "none" for line in dots] == [
        False,
        False,
        True,
    ]


def test_what_lies_outside_one_published_value_is_not_drawn_on_its_band() -> None:
    published = table({0: 0.2, 1: 0.2})
    found = pd.concat(
        own.against_published(table({7: value}), published, ["opd"], ["nss"])
        for value in (0.2, 0.3, 0.1)
    )
    (ax,) = own.bands(found).axes
    dots = [line for line in ax.get_lines() if line.get_marker() == "o"]
    places = [float(line.get_xdata()[0]) for line in dots]
    assert places == [0.5, 1 + own.FARTHEST, -own.FARTHEST]

"""The board of claims shows each outcome where its claim stands."""

import pandas as pd
from matplotlib.colors import to_hex

from opd_geometry.book import contrast_figures
from opd_geometry.book.figures import BLUE, GREY, ORANGE

PARTS = {
    "first": [("part", "holds"), ("part", "open"), ("null", "ruled out")],
    "second": [("part", "fails"), ("null", "shows it too"), ("matched", "undecided")],
    "third": [],  # not measured
}
VERDICTS = {
    "first": "inconclusive",
    "second": "not reproduced",
    "third": "not measured",
}


def board() -> dict[str, pd.DataFrame]:
    columns = ["kind", "outcome"]
    return {key: pd.DataFrame(rows, columns=columns) for key, rows in PARTS.items()}


def test_a_mark_says_for_which_claim_and_of_which_kind_an_outcome_is() -> None:
    (ax,) = contrast_figures.claims_board(board(), VERDICTS).axes
    marks = sorted(
        (line.get_ydata()[0], line.get_xdata()[0], line)
        for line in ax.lines
        if line.get_marker() not in ("None", "")
    )
    # Two columns of parts, then those of nulls and of matched controls.
    assert [(row, round(place, 6)) for row, place, _ in marks] == [
        (0, 0.0),
        (0, 1.0),
        (0, 3.2),
        (1, 0.0),
        (1, 3.2),
        (1, 5.4),
    ]
    looks = [
        (line.get_marker(), to_hex(line.get_markeredgecolor()).upper())
        for *_, line in marks
    ]
    blue, grey, orange = (to_hex(c).upper() for c in (BLUE, GREY, ORANGE))
    assert looks == [
        ("o", blue),
        ("o", grey),
        ("o", blue),
        ("X", orange),
        ("X", orange),
        ("o", grey),
    ]
    filled = [line.get_markerfacecolor() != "none" for *_, line in marks]
    assert filled == [True, False, True, True, True, False]


def test_verdicts_stand_in_the_rows_of_their_claims() -> None:
    (ax,) = contrast_figures.claims_board(board(), VERDICTS).axes
    assert [text.get_text() for text in ax.get_yticklabels()] == list(PARTS)
    said = {text.get_position()[1]: text.get_text() for text in ax.texts}
    assert [said[row] for row in range(3)] == list(VERDICTS.values())
    low, high = ax.get_ylim()
    assert low > high  # the first claim is on top

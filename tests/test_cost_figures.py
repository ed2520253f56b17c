import pandas as pd

from opd_geometry.book import figures
from opd_geometry.book.cost_figures import cost_growth


def test_both_growths_are_drawn() -> None:
    ratios = pd.DataFrame(
        [
            {"rows": n, "cols": n, "side": side, "cpu_seconds": cost * n**3}
            for n in (512, 1024, 2048)
            for side, cost in (("protocol", 8.0), ("pair", 2.0), ("further", 1.0))
        ]
        + [{"rows": 9, "cols": 512, "side": "pair", "cpu_seconds": 1e9}]
    )
    growth = pd.DataFrame(
        [
            {"layers": n, "width": 512, "metrics": kind, "seconds": n * cost}
            for n in (1, 2, 4)
            for kind, cost in (("all", 5.0), ("cheap", 0.1))
        ]
        + [{"layers": 36, "width": 4096, "metrics": "cheap", "seconds": 100.0}]
    )
    with figures.styled():
        left, right = cost_growth(ratios, growth).axes
    solid = {line.get_label(): line for line in left.lines if line.get_marker() == "o"}
    assert set(solid) == {
        "paper's protocol, three full SVDs",
        "one pair",
        "each further checkpoint",
    }
    assert list(solid["one pair"].get_xdata()) == [512, 1024, 2048]
    dots = [line for line in left.lines if line.get_linestyle() == ":"]
    assert list(dots[0].get_ydata()) == [8.0 * 512**3, 8.0 * 2048**3]
    assert right.get_xlabel() == "layers of width 512"
    assert [t.get_text() for t in right.get_xticklabels()] == ["1", "2", "4"]
    assert len(right.lines) == 4

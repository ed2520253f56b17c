"""Figures draw what the table says, each with its null, whatever runs are missing."""

import functools
import io
from collections.abc import Callable, Iterable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D
from matplotlib.text import Text

from opd_geometry.analysis import evidence
from opd_geometry.book import figures
from opd_geometry.book.figures import ARM_STYLES, GREY, Panel
from opd_geometry.experiments import measure, profiles
from opd_geometry.geometry import comparison

SHAPES = {
    "q": (128, 128),
    "k": (64, 128),
    "v": (64, 128),
    "o": (128, 128),
    "gate": (384, 128),
    "up": (384, 128),
    "down": (128, 384),
}
STEPS = {0.1: 12, 0.2: 24, 0.8: 96, 1.0: 120}
MAIN = ("sft", "sft-matched", "opd", "rlvr")
NULLS = {"stable_rank": 40.0, "hill_alpha": 8.0, "similarity_to_end": 1 / 64}


def planted(
    arms: Iterable[str] = MAIN, seeds: Iterable[int] = (0, 1, 2), layers: int = 2
) -> pd.DataFrame:
    """A table of known values: different for each arm, seed, step and matrix."""
    return _planted(tuple(arms), tuple(seeds), layers).copy()


@functools.cache
def _planted(arms: tuple[str, ...], seeds: tuple[int, ...], layers: int) -> Any:
    rows = []
    for place, arm in enumerate(arms):
        for seed in seeds:
            run = f"{arm}-{seed}"
            for layer in range(layers):
                for role, shape in SHAPES.items():
                    name = f"model.layers.{layer}.{role}_proj.weight"
                    size = ("parameters", float(shape[0] * shape[1]))
                    rows.append((run, arm, seed, 0, name, role, layer, *size))
                    for frac, step in STEPS.items():
                        if "projected" in arm and frac <= 0.2:
                            continue
                        level = 1 + place + seed / 10 + layer / 5 + frac
                        level += shape[0] / 1000
                        for metric, value in values_at(level, frac).items():
                            key = (run, arm, seed, step, name, role, layer)
                            rows.append((*key, metric, value))
            for i, j in np.ndindex(2, 3):
                region = (run, arm, seed, 120, f"w[{i},{j}]", "region", -1)
                level = (10 * i + j + seed) / 100 + place / 10
                for metric in figures.MASK_METRICS:
                    rows.append((*region, metric, level))
                    rows.append((*region, f"null_{metric}", 0.9 * level))
            for frac, step in STEPS.items():
                accuracy = ("accuracy/chain", 0.3 + place / 50 + seed / 100 + frac / 3)
                rows.append((run, arm, seed, step, "", "model", -1, *accuracy))
    return pd.DataFrame(rows, columns=measure.COLUMNS)


def values_at(level: float, frac: float) -> dict[str, float]:
    values = {
        **dict.fromkeys(comparison.METRICS, level),
        "density": level / 20,
        "sparsity": 1 - level / 20,
        "principal_overlap": 0.5 - level / 500,
        "low_magnitude_overlap": 0.5 + level / 50,
        "similarity_to_end": 1 - (1 - frac) / (1 + level),
    }
    nulls = {f"null_{k}": 0.9 * v for k, v in values.items() if "norm" not in k}
    return {**values, **nulls, **{f"null_{k}": v for k, v in NULLS.items()}}


def lines_named(ax: Axes, label: str) -> list[Line2D]:
    return [line for line in ax.get_lines() if line.get_label() == label]


def labels(figure: Figure) -> list[str]:
    return [str(line.get_label()) for ax in figure.axes for line in ax.get_lines()]


def colours_written(figure: Figure) -> set[str]:
    """Of every text outside and inside the axes, their ticks and legends included."""
    return {
        to_hex(text.get_color()) for text in figure.findobj(Text) if text.get_text()
    }


FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "course": lambda table: figures.trajectories(
        table,
        [[Panel(m, MAIN) for m in ("stable_rank", "frobenius_norm", "hill_alpha")]],
    ),
    "similarity": lambda table: figures.trajectories(
        table, [[Panel("similarity_to_end", MAIN)]]
    ),
    "grid": lambda table: figures.trajectories(
        table,
        [[Panel(m, MAIN, "a"), Panel(m, MAIN[1:], "b")] for m in ("nss", "hill_alpha")],
    ),
    "depth": lambda table: figures.depth_profiles(
        table, MAIN, ("angle_left_mean_deg", "nss")
    ),
    "bars": lambda table: figures.mask_bars(table, MAIN),
    "confined": figures.projected_training,
}


@functools.cache
def drawn(name: str, arms: tuple[str, ...], seeds: tuple[int, ...]) -> Figure:
    """A figure of the planted table, rendered once."""
    figure = FIGURES[name](planted(arms, seeds))
    figure.draw_without_rendering()
    return figure


CONFINED = ("opd-projected", "opd-projected-random", "sft-projected")
ALL = (*MAIN, *CONFINED, "sft-projected-random")


# --- averages ------------------------------------------------------------------


def test_matrices_are_averaged_without_weights() -> None:
    table = planted(["opd"], [0])
    end = figures.at_end(table, "nss", ("q", "gate"))
    assert end["value"].tolist() == pytest.approx([1 + 0.1 + 1 + (0.128 + 0.384) / 2])


def test_sparsity_is_weighted_by_parameters() -> None:
    table = planted(["opd"], [0], layers=1)
    sizes = {role: m * n for role, (m, n) in SHAPES.items()}
    by_hand = {r: 1 - (2 + SHAPES[r][0] / 1000) / 20 for r in sizes}
    weighted = sum(sizes[r] * by_hand[r] for r in sizes) / sum(sizes.values())
    assert figures.at_end(table, "sparsity")["value"].item() == pytest.approx(weighted)
    assert weighted != pytest.approx(np.mean(list(by_hand.values())))


@pytest.mark.parametrize("metric", ["sparsity", "nss", "null_low_magnitude_overlap"])
def test_figures_and_verdicts_average_alike(metric: str) -> None:
    table = planted()
    weighted = metric == "sparsity"
    ours = figures.over_matrices(table, metric)
    for arm in MAIN:
        theirs = evidence.over_matrices(table, arm, metric, evidence.LAYERS, weighted)
        mine = ours[ours["arm"] == arm].set_index(["seed", "step"])["value"]
        pd.testing.assert_series_equal(mine, theirs, check_names=False)


def test_a_mean_with_an_undefined_matrix_is_left_out() -> None:
    table = planted(["opd"], [0])
    broken = (table["metric"] == "nss") & (table["step"] == 120)
    table.loc[table[broken].index[0], "value"] = np.nan
    assert figures.over_matrices(table, "nss")["step"].max() == 96
    assert figures.at_end(table, "nss").empty


def test_an_arm_that_never_moved_is_left_out() -> None:
    table = planted(MAIN)
    still = (table["arm"] == "rlvr") & table["metric"].str.contains("stable_rank")
    table.loc[still, "value"] = np.nan
    figure = figures.trajectories(table, [[Panel("stable_rank", MAIN)]])
    assert figures.ARM_STYLES["opd"].label in labels(figure)
    assert figures.ARM_STYLES["rlvr"].label not in labels(figure)
    course = figures.first_last(table, "stable_rank", MAIN)
    assert course.loc["rlvr"].isna().all()
    assert "RLVR" not in figures.ranking(course["last"])


def test_progress_is_a_share_of_each_runs_own_length() -> None:
    table = planted(["opd", "sft"], [0])
    table.loc[table["arm"] == "sft", "step"] *= 3
    values = figures.over_matrices(table, "nss")
    for _, run in values.groupby("arm"):
        assert run["frac"].tolist() == pytest.approx(list(STEPS))


def test_sparsity_of_matrices_without_sizes_is_nan() -> None:
    table = planted()
    table = table[table["metric"] != "parameters"]
    means = figures.summary(table, ["sparsity", "nss"])
    assert means["sparsity"].isna().all()
    assert means["nss"].notna().all()


def test_categories_of_a_stored_table_change_nothing() -> None:
    table = planted()
    names = ["run", "arm", "matrix", "role", "metric"]
    stored = table.astype(dict.fromkeys(names, "category"))
    plain = figures.summary(table, ["sparsity", "accuracy/chain"])
    pd.testing.assert_frame_equal(
        figures.summary(stored, ["sparsity", "accuracy/chain"]), plain
    )


def test_first_and_last_checkpoint() -> None:
    table = planted(["opd"], [0], layers=1)
    course = figures.first_last(table, "nss", ["opd"], ("q",))
    assert course.loc["opd"].tolist() == pytest.approx([1.228, 2.128])


def test_every_arm_and_metric_has_a_name() -> None:
    assert set(profiles.PUBLISHED_ARMS) <= set(ARM_STYLES)
    assert set(comparison.METRICS) <= set(figures.METRIC_LABELS)


# --- what is drawn -------------------------------------------------------------


def test_lines_are_means_over_seeds_and_bands_their_range() -> None:
    table = planted()
    figure = figures.trajectories(table, [[Panel("nss", ("opd", "sft"))]])
    values = figures.over_matrices(table, "nss", figures.ATTENTION_ROLES)
    for arm, band in zip(("opd", "sft"), figure.axes[0].collections, strict=True):
        (line,) = lines_named(figure.axes[0], ARM_STYLES[arm].label)
        by_time = values[values["arm"] == arm].groupby("frac")["value"]
        np.testing.assert_allclose(line.get_xdata(), list(STEPS))
        np.testing.assert_allclose(line.get_ydata(), by_time.mean())
        corners = band.get_paths()[0].vertices
        assert corners[:, 1].min() == pytest.approx(by_time.min().min())
        assert corners[:, 1].max() == pytest.approx(by_time.max().max())


def test_a_null_far_above_has_a_strip_and_a_near_one_lies_among_the_lines() -> None:
    table = planted()
    far = figures.trajectories(table, [[Panel("stable_rank", MAIN)]])
    main, strip = far.axes
    (null,) = lines_named(strip, figures.NULL_LABEL)
    np.testing.assert_allclose(null.get_ydata(), 40.0)
    assert not lines_named(main, figures.NULL_LABEL)
    assert main.get_ylim()[1] < 40 < strip.get_ylim()[1]
    near = figures.trajectories(table, [[Panel("nss", MAIN)]])
    (null,) = lines_named(near.axes[0], figures.NULL_LABEL)
    values = figures.over_matrices(table, "null_nss", figures.ATTENTION_ROLES)
    expected = values.groupby(values["frac"].round(2))["value"].mean()
    np.testing.assert_allclose(null.get_ydata(), expected)


def test_the_null_of_a_norm_is_equal_independent_steps() -> None:
    figure = figures.trajectories(planted(), [[Panel("frobenius_norm", ("opd",))]])
    (walk,) = lines_named(figure.axes[0], figures.WALK_LABEL)
    (line,) = lines_named(figure.axes[0], "OPD")
    end = np.asarray(line.get_ydata())[-1]
    np.testing.assert_allclose(walk.get_ydata(), end * np.sqrt(list(STEPS)))


def test_a_row_of_one_metric_shares_its_axis() -> None:
    grid = [[Panel("nss", ("sft",)), Panel("nss", ("rlvr",))]]
    left, right = figures.trajectories(planted(), grid).axes
    assert left.get_ylim() == right.get_ylim()


def test_bars_end_at_the_means_and_ticks_stand_at_the_nulls() -> None:
    table = planted()
    figure = figures.mask_bars(table, MAIN)
    for ax, metric in zip(figure.axes, figures.MASK_METRICS, strict=True):
        ends = [bar.get_x() + bar.get_width() for bar in ax.patches]
        means = figures.summary(table, [metric, f"null_{metric}"]).loc[list(MAIN)]
        np.testing.assert_allclose(ends, 100 * means[metric])
        ticks = [c.get_segments()[0][:, 0] for c in ax.collections[1::2]]
        expected = 100 * means[f"null_{metric}"].to_numpy()
        np.testing.assert_allclose([t[0] for t in ticks], expected)
        assert [bar.get_x() for bar in ax.patches] == (
            [0] * 4 if metric == "density" else [50] * 4
        )


def test_regions_are_no_matrices() -> None:
    table = planted(["opd"], [0])
    without = table[table["role"] != "region"]
    for metric in figures.MASK_METRICS:
        pd.testing.assert_frame_equal(
            figures.over_matrices(table, metric), figures.over_matrices(without, metric)
        )


def test_depth_shows_matrices_layers_and_the_null_of_the_same_arm() -> None:
    table = planted()
    ax = figures.depth_profiles(table, ("rlvr",), ("nss",)).axes[0]
    dots, mean, null = ax.get_lines()[:3]
    assert len(dots.get_ydata()) == 14
    by_layer = np.reshape(dots.get_ydata(), (2, 7)).mean(axis=1)
    np.testing.assert_allclose(mean.get_ydata(), by_layer)
    np.testing.assert_allclose(null.get_ydata(), 0.9 * by_layer)


def test_confined_runs_part_from_the_free_one_at_its_level() -> None:
    table = planted(ALL)
    figure = figures.projected_training(table)
    values = figures.over_matrices(table, "accuracy/chain")
    for ax, arm in zip(figure.axes, ("opd", "sft"), strict=True):
        free = values[(values["arm"] == arm) & (values["step"] == 24)]["value"]
        (level,) = lines_named(ax, "as at 20 %")
        np.testing.assert_allclose(level.get_ydata(), free.mean())
        assert lines_named(ax, "random subspace")


# --- whatever is there ---------------------------------------------------------


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize(
    ("arms", "seeds"),
    [(ALL, (0, 1, 2)), (("opd", "sft"), (4,))],
)
def test_draws_with_one_seed_and_with_missing_arms(
    name: str, arms: tuple[str, ...], seeds: tuple[int, ...]
) -> None:
    figure = drawn(name, arms, seeds)
    named = [ax.get_xlabel() or ax.get_ylabel() or outer(ax) for ax in figure.axes]
    assert all(named)
    if name not in ("maps", "bars"):
        known = {figures.NULL_LABEL, figures.SUBSPACE_NULL_LABEL, "as at 20 %"}
        assert known & set(labels(figure))
    if len(seeds) == 1 and name in ("course", "similarity", "grid", "confined"):
        assert not any(ax.collections for ax in figure.axes)


def colour_bar(ax: Axes) -> bool:
    return ax.get_label() == "<colorbar>"


def outer(ax: Axes) -> bool:
    """Whether neighbours or a title above name what the axes show."""
    spec = ax.get_subplotspec()
    corner = spec is not None and spec.is_first_col() and spec.is_last_row()
    return colour_bar(ax) or not corner


@pytest.mark.parametrize("name", FIGURES)
def test_refuses_a_table_without_its_arms(name: str) -> None:
    with pytest.raises(ValueError, match=r"none of the arms .*; it has mix-0\.25"):
        FIGURES[name](planted(["mix-0.25"], [0]))


def test_every_axis_of_the_training_curves_is_labelled() -> None:
    figure = FIGURES["grid"](planted())
    strips = [ax for ax in figure.axes if not ax.get_ylabel()]
    assert all(lines_named(ax, figures.NULL_LABEL) for ax in strips)
    bottom = [ax for ax in figure.axes if ax.get_subplotspec().is_last_row()]
    assert [ax.get_xlabel() for ax in bottom] == ["share of training"] * 2
    titles = [ax.get_title() for ax in figure.axes]
    assert titles.count("a") == 2


@pytest.mark.parametrize("name", FIGURES)
def test_is_transparent_and_its_text_reads_on_light_and_dark(name: str) -> None:
    figure = drawn(name, ALL, (0, 1, 2))
    assert figure.dpi == 144
    assert figure.get_facecolor()[3] == 0
    assert all(ax.get_facecolor()[3] == 0 for ax in figure.axes if not colour_bar(ax))
    allowed = {
        GREY,
        figures.TEXT,
        *(to_hex(style.colour) for style in ARM_STYLES.values()),
    }
    assert name == "maps" or colours_written(figure) <= allowed
    assert not plt.get_fignums()


def test_the_saved_image_has_a_transparent_background() -> None:
    buffer = io.BytesIO()
    drawn("bars", ALL, (0, 1, 2)).savefig(buffer, dpi=50)
    buffer.seek(0)
    assert imread(buffer)[0, 0, 3] == 0


def test_style_leaves_no_trace() -> None:
    before = dict(plt.rcParams)
    FIGURES["similarity"](planted())
    assert dict(plt.rcParams) == before


# --- labels --------------------------------------------------------------------


def test_labels_are_a_gap_apart_in_order_and_near_their_lines() -> None:
    rng = np.random.default_rng(0)
    for count in range(1, 9):
        heights = sorted(rng.random(count))
        placed = figures.spread(heights, 0.1)
        assert len(placed) == count
        assert np.all(np.diff(placed) >= 0.1 - 1e-6)
        assert placed[0] >= -1e-6
        assert placed[-1] <= 1 + 1e-6
    apart = [0.1, 0.4, 0.8]
    assert figures.spread(apart, 0.1) == apart


def test_labels_of_equal_ends_keep_the_order_of_their_starts() -> None:
    table = planted()
    ax = figures.trajectories(table, [[Panel("similarity_to_end", MAIN)]]).axes[0]
    first = figures.first_last(table, "similarity_to_end", MAIN)["first"]
    heights = {text.get_text(): text.get_position()[1] for text in ax.texts}
    ranked = [ARM_STYLES[arm].label for arm in first.sort_values().index]
    assert sorted(ranked, key=lambda label: heights[label]) == ranked


# --- colours -------------------------------------------------------------------


def contrast(colour: str, page: str) -> float:
    """The ratio of two colours' luminances, as WCAG defines it."""
    lights = []
    for name in (colour, page):
        rgb = np.array(to_rgb(name))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        lights.append(float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05)
    return max(lights) / min(lights)


def on_a_dark_page(colour: str) -> str:
    """CSS invert(1) hue-rotate(180deg): twice the grey of the inverse, less itself."""
    inverse = 1 - np.array(to_rgb(colour))
    turned = 2 * inverse @ [0.213, 0.715, 0.072] - inverse
    return to_hex(np.clip(turned, 0, 1))


@pytest.mark.parametrize(
    "colour", sorted({*figures._COLOURS, figures.GREY, figures.TEXT})
)
def test_colours_stand_out_on_both_pages(colour: str) -> None:
    assert contrast(colour, "#ffffff") >= 4.5
    assert contrast(on_a_dark_page(colour), "#121212") >= 4.5


def test_no_text_is_smaller_than_eleven_pixels() -> None:
    pixels_a_point = 672 / (72 * figures.WIDTH)  # as wide as a page's column
    with figures.styled():
        for name in ("font.size", "xtick.labelsize", "ytick.labelsize"):
            assert plt.rcParams[name] * pixels_a_point >= 11
    assert figures.SMALL * pixels_a_point >= 11

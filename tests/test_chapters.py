"""Chapters refuse what they do not know, and say where their numbers come from."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from opd_geometry.analysis.statements import CLAIMS
from opd_geometry.book import chapters
from opd_geometry.book.chapters import ParameterError, Parameters, check_parameters
from opd_geometry.experiments import measure, profiles
from opd_geometry.experiments.listing import write_listing
from opd_geometry.experiments.records import digest_of

DEFAULTS = {"profile": "laptop", "seeds": "0-2", "source": "committed", "jobs": 2}
# What a fresh kernel holds before a notebook defines anything.
KERNEL = {
    "__name__": "__main__",
    "_ih": [""],
    "_i1": "x = 1",
    "In": [""],
    "Out": {},
    "get_ipython": print,
    "exit": exit,
    "chapters": chapters,
}


# --- parameters ----------------------------------------------------------------


def test_reads_good_parameters() -> None:
    chosen = check_parameters({**KERNEL, **DEFAULTS})
    assert chosen == Parameters("laptop", (0, 1, 2), "committed", 2)


@pytest.mark.parametrize(
    ("seeds", "read"), [(1, (1,)), ("1", (1,)), ("0,2", (0, 2)), ("3-5", (3, 4, 5))]
)
def test_reads_seeds_as_papermill_passes_them(
    seeds: object, read: tuple[int, ...]
) -> None:
    assert check_parameters({**DEFAULTS, "seeds": seeds}).seeds == read


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": 1}, "unknown parameter seed; expected profile, seeds, source, jobs"),
        ({"lr": 1e-3, "k": "8"}, "unknown parameter lr, k; expected profile, "),
        ({"flag": None}, "unknown parameter flag; "),
        ({"profile": "Laptop"}, "unknown profile 'Laptop'; expected smoke, laptop"),
        ({"profile": 8}, "unknown profile 8; expected smoke, laptop"),
        ({"profile": ["laptop"]}, r"unknown profile \['laptop'\]; expected smoke"),
        ({"source": "web"}, "unknown source 'web'; expected committed, local, scratch"),
        ({"seeds": "two"}, "seeds 'two': expected integers such as 3, 0,2 or 0-4"),
        ({"seeds": 1.5}, "seeds '1.5': expected integers"),
        ({"seeds": True}, "seeds 'True': expected integers"),
        ({"seeds": -1}, "seeds '-1': expected integers"),
        ({"seeds": ""}, "seeds '': expected integers"),
        ({"jobs": 0}, "jobs 0: expected an integer, 1 or larger"),
        ({"jobs": "2"}, "jobs '2': expected an integer, 1 or larger"),
        ({"jobs": True}, "jobs True: expected an integer, 1 or larger"),
    ],
)
def test_refuses_what_it_does_not_know(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=f"^{message}") as caught:
        check_parameters({**KERNEL, **DEFAULTS, **given})
    assert len(str(caught.value).splitlines()) == 1


def test_is_one_line_in_a_notebook() -> None:
    shown = ParameterError("unknown parameter seed")._render_traceback_()
    assert shown == ["ParameterError: unknown parameter seed"]


def test_a_cell_that_is_run_again_meets_the_notebooks_own_names() -> None:
    names: dict[str, Any] = {**KERNEL, **DEFAULTS}
    names["chosen"] = check_parameters(names)
    names |= {"table": pd.DataFrame(), "angle": 3.0, "seeds": "1"}
    assert check_parameters(names).seeds == (1,)


def test_says_which_parameter_is_missing() -> None:
    with pytest.raises(ParameterError, match="no parameter source, jobs; run the"):
        check_parameters({"profile": "laptop", "seeds": "0"})


# --- runs ----------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    """A data folder with committed smoke measurements of opd and rlvr, seed 0."""
    monkeypatch.setenv("OPD_GEOMETRY_DATA", str(tmp_path))
    runs = [profiles.build("smoke", arm, 0) for arm in ("opd", "rlvr")]
    rows = [
        (r.key(), r.arm, 0, 10, "", "model", -1, "accuracy/chain", 0.5) for r in runs
    ]
    provenance = pd.DataFrame(
        {
            "run": [run.key() for run in runs],
            "arm": [run.arm for run in runs],
            "seed": 0,
            "steps": 10,
            "wall_seconds": [1800.0, 3600.0],
            "machine": "Linux x86_64",
            "python": "3.11.7",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "numpy": "2.4.6",
        }
    )
    path = measure.provenance_path()
    path.parent.mkdir(parents=True)
    table = pd.DataFrame(rows, columns=measure.COLUMNS)
    for run in runs:
        of_run = table[table["run"] == run.key()]
        of_run.to_parquet(path.with_name(f"{run.name}.parquet"))
    rows = provenance.to_dict("records")
    for row, run in zip(rows, runs, strict=True):
        row["table_sha256"] = digest_of(path.with_name(f"{run.name}.parquet"))
    write_listing(path, [], rows)
    return provenance


SMOKE = Parameters("smoke", (0,), "committed", 3)


def test_committed_runs_are_read_and_nothing_is_trained(
    shelf: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chapters, "train_all", None)
    table, provenance = chapters.load(SMOKE, ["opd", "rlvr"])
    assert set(table["arm"]) == {"opd", "rlvr"}
    assert list(provenance["source"]) == ["committed", "committed"]


def test_only_what_is_missing_is_trained_and_a_failure_is_one_line(
    shelf: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def train_all(profile: str, runs: list[Any], jobs: int, console: object) -> Any:
        asked.append((profile, [run.arm for run in runs], jobs))
        return {runs[0]: "the disk is full"}

    monkeypatch.setattr(chapters, "train_all", train_all)
    message = r"^off-policy-s0-\w+ is not finished: the disk is full$"
    with pytest.raises(ValueError, match=message):
        chapters.load(SMOKE, ["opd", "off-policy", "rlvr"])
    assert asked == [("smoke", ["off-policy"], 3)]


def test_an_arm_that_the_profile_does_not_list_is_left_out(
    shelf: pd.DataFrame,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(chapters, "train_all", None)
    table, _ = chapters.load(SMOKE, ["opd", "rlvr-paper", "opd-lr-x3"])
    assert set(table["arm"]) == {"opd"}
    assert capsys.readouterr().out == (
        "left out, being no part of profile smoke: rlvr-paper, opd-lr-x3\n"
    )


def test_says_where_runs_come_from(shelf: pd.DataFrame) -> None:
    committed = shelf.assign(source=["committed", "this machine"])
    text = chapters.provenance_text(SMOKE, committed)
    assert text == (
        "Profile smoke, seed 0: 2 runs, 1 of them read from committed measurements, "
        "1 trained on this machine: rlvr (seed 0). Together 1.5 hours of training on "
        "one core each (Linux x86_64)."
    )
    text = chapters.provenance_text(SMOKE, shelf.assign(source="committed"))
    assert "2 of them read from committed measurements, none trained on" in text


def test_costs_are_minutes_of_a_run(shelf: pd.DataFrame) -> None:
    more = pd.concat([shelf, shelf[:1].assign(seed=1, wall_seconds=3000.0)])
    costs = chapters.cost_table(more).set_index("called")
    assert costs.loc["opd"].tolist() == ["OPD", 2, 10, "40.0"]
    assert costs.loc["rlvr"].tolist() == ["RLVR", 1, 10, "60.0"]


def test_versions_are_named_once_each(shelf: pd.DataFrame) -> None:
    twice = shelf.assign(torch=["2.13.0", "2.14.0"])
    text = chapters.versions_text(twice)
    assert text.startswith("python 3.11.7; torch 2.13.0, 2.14.0; transformers 5.23.0")


def test_every_profile_is_described() -> None:
    assert list(chapters.profile_table()["profile"]) == list(profiles.PROFILES)


# --- what is shown -------------------------------------------------------------


def test_n_counts_what_seeds_do_not_share() -> None:
    published = Parameters("published", (0, 1, 2, 3, 4), "committed", 1)
    said = "n = 5: data, sampling and anchor each; 3 bases"
    assert chapters.n_text(published) == said
    assert chapters.n_text(published, [0, 2]).endswith("one base")
    assert chapters.seeds_text(published) == f"seeds 0 to 4 ({said})"
    assert chapters.n_text(Parameters("laptop", (3, 4), "local", 1)).endswith(
        "one base"
    )


def test_limits_say_what_parts_arms_and_what_shows_a_place() -> None:
    rows = [
        (f"{arm}{seed}", arm, seed, 100, "a.q", "q", 0, metric, 1.0 + i * seed / 100)
        for i, arm in enumerate(("opd", "rlvr"))
        for seed in range(3)
        for metric in ("sparsity", "principal_overlap")
    ]
    table = pd.DataFrame(rows, columns=measure.COLUMNS)
    said = chapters.limits_text(table, ["opd", "rlvr"], ["sparsity"])
    assert said == chapters.FOLDED_LIMITS.format(
        "Between two arms, n = 3: 2.5 points (update sparsity)."
    )
    said = chapters.limits_text(table, ["opd"], ["principal_overlap"])
    assert "One seed parts no arms" not in said
    assert "(gain: how many times as far" in said
    assert "a gain of 1.01 on principal entries (overlap, principal mask)" in said


def test_a_number_that_is_not_there_is_a_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chapters, "_all_there", False)
    told = chapters.say(
        "OPD has 0.5 [{x:.2f}, {x:.2f}], more {x:+.2f} to {y:.1f} nanometres",
        x=math.nan,
        y=-2,
    )
    assert told.data == "OPD has 0.5, more – to −2.0 nanometres"


def test_nan_where_no_run_is_missing_is_an_error() -> None:
    check_parameters({**DEFAULTS, "profile": "published"})
    with pytest.raises(ValueError, match=r"^a number is NaN in 'of OPD nan', though"):
        chapters.say("See here: of OPD {x:.2f}; all else.", x=math.nan)
    check_parameters({**DEFAULTS, "profile": "published", "seeds": "1"})
    assert chapters.say("{x:.2f}", x=math.nan).data == "–"


def test_runs_that_are_left_out_account_for_a_nan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parameters = check_parameters({**DEFAULTS, "profile": "published", "seeds": "3,4"})
    none = pd.DataFrame()
    monkeypatch.setattr(chapters, "_measured", lambda *_: (none, none))
    monkeypatch.setattr(chapters, "_absent", lambda *_: [])
    chapters.load_there(parameters, ["opd"])
    with pytest.raises(ValueError, match="though no run is missing"):
        chapters.say("{x:.2f}", x=math.nan)
    lost = [profiles.build("published", "opd", 3)]
    for absent in (lost, None):
        check_parameters({**DEFAULTS, "profile": "published", "seeds": "3,4"})
        found = {"opd": absent, "sft": []}
        monkeypatch.setattr(chapters, "_absent", lambda _, arm, f=found: f[arm])
        chapters.load_there(parameters, ["opd", "sft"])
        assert chapters.say("{x:.2f}", x=math.nan).data == "–"


def test_rounds_numbers_and_leaves_the_rest() -> None:
    frame = pd.DataFrame({"x": [0.123456, math.nan, 1234567.0], "n": [1, 2, 30]})
    shown = chapters.rounded(frame.assign(text="a"))
    assert shown["x"].tolist() == ["0.1235", "–", "1.235e+06"]
    assert shown["n"].tolist() == [1, 2, 30]
    assert shown["text"].tolist() == ["a"] * 3


def test_rounds_tables_with_two_rows_of_columns() -> None:
    part = pd.DataFrame({"first": [0.5], "last": [1.0]}, index=["opd"])
    shown = chapters.rounded(pd.concat({"a": part, "b": part}, axis=1, names=["x", ""]))
    assert shown.loc["OPD"].tolist() == ["0.5", "1"] * 2
    assert list(shown.columns.names) == [None, None]


def test_tables_name_arms_and_metrics_as_figures_do() -> None:
    frame = pd.DataFrame({"nss": [0.5], "null_nss": [0.1], "runs": [5]}, index=["opd"])
    shown = chapters.rounded(frame)
    nss = "spectral shift NSS"
    assert list(shown.columns) == [nss, f"{nss}, null", "runs"]
    assert list(shown.index) == ["OPD"]
    assert shown.columns.name == "arm"  # in the corner, where a head would be empty
    assert chapters.rounded(frame.T).columns.name == "diagnostic"
    pairs = pd.concat({"sft": frame}, names=["arm", "other"])
    assert chapters.rounded(pairs).index.tolist() == [("SFT", "OPD")]


def test_no_line_that_is_said_begins_as_a_comment_of_myst_does() -> None:
    said = chapters.say("means with 95\n% intervals, and {x:.0f} % more", x=2.0)
    assert said.data == "means with 95\N{NO-BREAK SPACE}% intervals, and 2 % more"


def test_publishes_few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    stored: dict[str, Any] = {}
    monkeypatch.setattr("myst_nb.glue", lambda n, v, display: stored.update({n: v}))
    chapters.publish(share=0.1234567, count=28, text="a", large=pd.Series([9.9]).sum())
    assert stored == {"share": 0.1235, "count": 28, "text": "a", "large": 9.9}
    assert repr(stored["large"]) == "9.9"  # not np.float64(9.9), which nbval compares


def test_says_what_was_published_or_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("myst_nb.glue", lambda *_, **__: None)
    chapters.publish(**{"share": 0.25219, "verdict_early-lock": "inconclusive"})
    text = """
        Of {n:d} matrices {share:.1%}, $x^{{2}}$;
        {verdict_early-lock}.
        """
    shown = chapters.say(text, n=28)
    assert (
        shown.data == "Of 28 matrices 25.2\N{NO-BREAK SPACE}%, $x^{2}$;\ninconclusive."
    )
    assert chapters.show("share") == 0.2522
    with pytest.raises(ValueError, match=r"^no value 'rank': publish it in a cell"):
        chapters.say("{rank:.1f}")
    with pytest.raises(ValueError, match=r"^nothing published as 'rank'"):
        chapters.show("rank")


def test_a_table_of_claims_says_what_is_not_measured() -> None:
    empty = pd.DataFrame(columns=measure.COLUMNS)
    shown = chapters.verdict_table(empty, [claim.id for claim in CLAIMS])
    assert shown["verdict"].tolist() == ["– not measured"] * len(CLAIMS)
    assert shown["here"].tolist() == ["–"] * len(CLAIMS)
    assert all(
        claim.id in text for claim, text in zip(CLAIMS, shown["claim"], strict=True)
    )


def test_html_escapes_and_is_never_cut() -> None:
    table = chapters.html(pd.DataFrame({"a": ["x < y " * 40]}), "a < b")
    text = table._repr_html_()
    assert text.startswith('<table class="table sentences"><caption>a &lt; b</caption>')
    assert "x &lt; y " * 39 in text
    assert "..." not in text
    assert repr(table).startswith("a < b\n")


def test_a_table_names_its_rows_and_columns() -> None:
    frame = pd.DataFrame({"nss": [0.123456]}, index=["opd"])
    text = chapters.table(frame, "What is shown", 2)._repr_html_()
    assert "<caption>What is shown</caption>" in text
    assert "<th>OPD</th>" in text
    assert "<td>0.12</td>" in text
    assert "<th></th>" not in text


# --- the chapter about two checkpoints ---------------------------------------------


def test_a_pair_is_two_places() -> None:
    names = {"before": "there", "after": "owner/name@abc", "In": [], "_i1": ""}
    assert chapters.check_pair(names) == chapters.Pair("there", "owner/name@abc")


def test_a_place_is_found_from_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = "data/checkpoints/laptop-base"
    root = Path(__file__).resolve().parents[1]
    assert chapters.Pair(given, "owner/name@abc").places == (
        str(root / given),
        "owner/name@abc",
    )
    (tmp_path / given).mkdir(parents=True)
    assert chapters.Pair(given, given).places == (given, given)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seeds": "0"}, "unknown parameter seeds; expected before, after"),
        ({"after": ""}, "after '': expected a directory, a .safetensors file or a hub"),
        ({"before": 3}, "before 3: expected a directory"),
    ],
)
def test_a_pair_that_is_none_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(chapters.ParameterError, match=f"^{said}"):
        chapters.check_pair({"before": "a", "after": "b", **change})
    with pytest.raises(chapters.ParameterError, match="no parameter after"):
        chapters.check_pair({"before": "a"})


def test_differences_are_told_field_by_field() -> None:
    arms = ["opd", "rlvr", "tokens-top-25", "sft-matched", "opd-projected-update"]
    table = chapters.differences_table("published", arms).set_index("called")
    told = table["against opd"]
    assert told["opd"] == "nothing"
    assert told["rlvr"] == (
        "teacher: checkpoints/laptop-teacher → none; alpha: 1.0 → 0.0"
    )
    assert told["tokens-top-25"] == (
        "token_selection: all → top-gap; keep_frac: 1.0 → 0.25"
    )
    assert "policy gradient → demonstrations" in told["sft-matched"]
    assert "learning_rate" not in told["sft-matched"]
    assert told["opd-projected-update"] == (
        "confined, rank: 2; confined, subspace: own; confined, form: update; "
        "from step 30 on"
    )
    others = chapters.differences_table("published", ["sft"], "sft-matched")
    assert "steps: 150 → 400" in others["against sft-matched"][0]


def test_said_numbers_have_a_minus_sign_and_names_keep_their_hyphen() -> None:
    text = "{x:.2f} to {y}, sft-1, 1e-05, `-1` and [2]-3, -p profile"
    said = chapters.say(text, x=-0.13, y="-2 %").data
    assert said == "−0.13 to −2 %, sft-1, 1e−05, `-1` and [2]-3, -p profile"


def test_a_small_profile_is_set_beside_the_committed_language_model() -> None:
    small = chapters.Parameters("laptop", (7,), "local", 2)
    found = chapters.of_pretrained(small)
    assert (found.profile, found.source) == ("pretrained", "committed")
    asked = chapters.Parameters("pretrained", (1,), "local", 2, "there")
    assert chapters.of_pretrained(asked) is asked


def test_a_table_without_rows_is_shown() -> None:
    """As with a profile whose arms are not the ones that a chapter compares."""
    empty = pd.DataFrame({"arm": [], "rank": []})
    assert "<table" in chapters.table(empty, "Nothing was run", 3)._repr_html_()

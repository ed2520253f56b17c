import math
import random
import shutil
from pathlib import Path

import children
import numpy as np
import pandas as pd
import pytest
import torch
from children import ANCHOR, OPD, PROJECTED, RANK, RLVR, Child
from safetensors.torch import save_file
from torch import Tensor

from opd_geometry.experiments import activations, committed, measure, profiles, runs
from opd_geometry.experiments.listing import line_digest, write_listing
from opd_geometry.experiments.measure import COLUMNS, committed_path
from opd_geometry.experiments.records import digest_of, seal
from opd_geometry.experiments.runs import Run
from opd_geometry.geometry import comparison, spectra
from opd_geometry.geometry.checkpoints import list_matrices
from opd_geometry.geometry.comparison import METRICS, NULL_METRICS, compare, reference


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them takes a third of the time of measuring a tiny run."""
    monkeypatch.setattr(activations, "TEXTS", 16)


@pytest.fixture(scope="module")
def measured(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny runs with their tables; not to be changed."""
    place = tmp_path_factory.mktemp("measured") / "data"
    shutil.copytree(trained, place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPD_GEOMETRY_DATA", str(place))
        patch.setattr(activations, "TEXTS", 16)
        for run in (ANCHOR, OPD, RLVR, PROJECTED):
            measure.measure_run(run, RANK)
    return place


@pytest.fixture
def copied(data: Path, measured: Path) -> Path:
    """A data directory of the test's own, with the runs and their tables."""
    shutil.copytree(measured, data)
    return data


@pytest.fixture
def unmeasured(data: Path, trained: Path) -> Path:
    shutil.copytree(trained, data)
    return data


@pytest.fixture
def tiny_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Profile smoke, whose arms are the tiny runs."""
    known = {"sft": ANCHOR, "opd": OPD, "rlvr": RLVR, "opd-projected": PROJECTED}

    def build(
        profile: str, arm: str, seed: int, from_scratch: bool = False, _: object = None
    ) -> Run:
        assert profile == "smoke"
        return profiles.replace(known[arm], seed=seed + 100 * from_scratch)

    for module in (measure, committed):
        monkeypatch.setattr(module, "build", build)
    settings = profiles.replace(profiles.PROFILES["smoke"], arms=tuple(known))
    monkeypatch.setitem(profiles.PROFILES, "smoke", settings)


def orthonormal(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q


# --- one matrix ------------------------------------------------------------------


def test_planted_rotation_and_growth_are_found() -> None:
    """W_0 = U S V^T; the last of the top k directions turns by 30 degrees."""
    n, k = 64, 8  # as 4096 and 512 in the paper
    u, v = orthonormal(n, 0), orthonormal(n, 1)
    s = torch.linspace(n, 1, n, dtype=torch.float64)
    angle = math.radians(30)
    turned_u, turned_v = u.clone(), v.clone()
    for turned, old in ((turned_u, u), (turned_v, v)):
        a, b = old[:, k - 1].clone(), old[:, -1].clone()
        turned[:, k - 1] = math.cos(angle) * a + math.sin(angle) * b
        turned[:, -1] = math.cos(angle) * b - math.sin(angle) * a
    before = reference(u * s @ v.T)
    values = compare(before, 1.5 * (turned_u * s) @ turned_v.T)
    for side in ("left", "right"):
        assert values[f"angle_{side}_max_deg"] == pytest.approx(30)
        assert values[f"angle_{side}_mean_deg"] == pytest.approx(30 / k)
    assert values["nss"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("n", "k", "rank"), [(64, 8, 1), (128, 16, 2), (4096, 512, 64)]
)
def test_ranks_are_those_of_the_paper_at_its_width(n: int, k: int, rank: int) -> None:
    assert spectra.default_rank((n, 3 * n), comparison.ANGLE_DIVISOR) == k
    assert spectra.default_rank((n, 3 * n), comparison.PRINCIPAL_DIVISOR) == rank


def test_sides_turn_apart() -> None:
    """Only the right subspace of a matrix that is not square turns, by 20 degrees."""
    u, v = orthonormal(96, 4)[:, :64], orthonormal(64, 5)
    s = torch.linspace(64, 1, 64, dtype=torch.float64)
    angle, turned = math.radians(20), v.clone()
    turned[:, 7] = math.cos(angle) * v[:, 7] + math.sin(angle) * v[:, 8]
    turned[:, 8] = math.cos(angle) * v[:, 8] - math.sin(angle) * v[:, 7]
    values = compare(reference(u * s @ v.T), u * s @ turned.T)
    assert values["angle_left_max_deg"] < 1e-6
    assert values["angle_right_max_deg"] == pytest.approx(20)
    assert values["angle_right_mean_deg"] == pytest.approx(20 / 8)


def test_stored_readout_rounds_both_sides() -> None:
    """Between two bf16 numbers nothing is stored, so a common shift is rank one."""
    w_before = torch.full((32, 32), 1 + 2**-10)  # stored as 1
    step = torch.full((32, 32), 2**-7)  # the next bf16 number
    values = compare(reference(w_before), w_before + step)
    assert values["stable_rank_bf16"] == pytest.approx(1)
    uneven = w_before + 2**-10 * torch.eye(32)  # both sides are stored as 1 ...
    uneven[0, 0] += 0.5  # ... but for one entry
    values = compare(reference(uneven.fill_diagonal_(1 + 2**-9)), uneven + step)
    assert values["stable_rank_bf16"] == pytest.approx(1)


def test_planted_delta_has_the_planted_numbers() -> None:
    u, v = orthonormal(64, 2), orthonormal(32, 3)
    s = torch.tensor([4.0, 2.0, 2.0, 1.0], dtype=torch.float64)
    delta = (u[:, :4] * s) @ v[:, :4].T
    w_before = torch.ones(64, 32, dtype=torch.float64) * 10
    values = compare(reference(w_before), w_before + delta)
    assert values["stable_rank"] == pytest.approx(25 / 16)
    assert values["frobenius_norm"] == pytest.approx(5)
    assert values["relative_norm"] == pytest.approx(5 / (10 * math.sqrt(64 * 32)))
    logs = math.log(4) + 2 * math.log(2)
    assert values["hill_alpha"] == pytest.approx(3 / logs)  # k = 32 / 8


def test_planted_places_are_counted() -> None:
    """A quarter of the entries change, all of them among the smallest."""
    w_before = torch.full((32, 32), 8.0)
    w_before[:8] = 0.5 + torch.arange(256).reshape(8, 32) / 256
    w_after = w_before.clone()
    w_after[:8] *= 2
    values = compare(reference(w_before), w_after)
    assert values["sparsity"] == 0.75
    assert values["density"] == 0.25
    assert values["low_magnitude_overlap"] == 1.0
    assert values["principal_overlap"] == 0.0


def test_change_below_bf16_is_no_visible_change() -> None:
    w_before = torch.ones(16, 16)
    w_after = w_before + 1e-4 * orthonormal(16, 0).float()
    values = compare(reference(w_before), w_after)
    assert values["sparsity"] == 1.0
    assert values["frobenius_norm"] == pytest.approx(4e-4, rel=1e-3)
    unseen = {name for name in METRICS if math.isnan(values[name])}
    assert unseen == {"principal_overlap", "low_magnitude_overlap", "stable_rank_bf16"}


def test_what_never_moved_is_nan_and_not_an_error() -> None:
    w_before = orthonormal(16, 0)
    values = compare(reference(w_before), w_before.clone())
    null = comparison.compare_null(reference(w_before), w_before.clone(), seed=0)
    assert list(values) == list(METRICS)
    assert list(null) == [f"null_{name}" for name in NULL_METRICS]
    defined = {"sparsity": 1.0, "density": 0.0, "frobenius_norm": 0.0}
    for name, value in values.items():
        assert value == defined[name] if name in defined else math.isnan(value)
    assert null["null_sparsity"] == 1.0
    assert math.isnan(null["null_stable_rank"])


def test_update_of_one_row_and_origin_of_zeros() -> None:
    w_before = orthonormal(32, 0)
    w_after = w_before.clone()
    w_after[3] *= 2
    values = compare(reference(w_before), w_after)
    assert values["stable_rank"] == pytest.approx(1)
    assert math.isnan(values["hill_alpha"])
    zeros = torch.zeros(16, 16)
    values = compare(reference(zeros), orthonormal(16, 1))
    assert math.isnan(values["nss"])
    assert math.isnan(values["relative_norm"])
    assert values["sparsity"] == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(bad: float, tmp_path: Path) -> None:
    w_before = orthonormal(16, 0).contiguous()
    w_after = w_before.clone()
    w_after[0, 0] = bad
    with pytest.raises(ValueError, match=r"NaN|inf"):
        compare(reference(w_before), w_after)
    paths = {}
    for step, w in ((0, w_before), (1, w_after)):
        paths[step] = tmp_path / f"{step}.safetensors"
        save_file({"w": w}, paths[step])
    with pytest.raises(ValueError, match=r"NaN|inf"):
        measure.measure_matrix("w", paths, 2, seed=0)


def test_null_is_gaussian_of_the_same_norm() -> None:
    w_before = orthonormal(64, 0)
    delta = 0.1 * torch.outer(orthonormal(64, 1)[0], orthonormal(64, 2)[0])
    before = reference(w_before)
    values = compare(before, w_before + delta)
    null = comparison.compare_null(before, w_before + delta, seed=0)
    assert values["stable_rank"] == pytest.approx(1)
    assert 12 < null["null_stable_rank"] < 22  # 64 / 4 for large Gaussian matrices
    assert null == comparison.compare_null(before, w_before + delta, seed=0)
    for other in (1, (0, 1), (0, 1, 2)):
        assert null != comparison.compare_null(before, w_before + delta, seed=other)


def test_every_matrix_and_step_has_noise_of_its_own(tmp_path: Path) -> None:
    """Two equal matrices that take the same step twice: four draws."""
    w, delta = orthonormal(32, 0).contiguous(), 0.1 * orthonormal(32, 1)
    paths = {}
    for step, after in {0: w, 1: w + delta, 2: w + delta}.items():
        paths[step] = tmp_path / f"{step}.safetensors"
        save_file({"a": after.clone(), "b": after.clone()}, paths[step])
    draws = [
        value
        for name in ("a", "b")
        for _, metric, value in measure.measure_matrix(name, paths, 2, seed=0)
        if metric == "null_stable_rank"
    ]
    assert len(set(draws)) == 4


def test_planted_region_is_where_the_map_shows_it() -> None:
    side = measure.MAP_REGIONS
    w_before = torch.full((4 * side, 2 * side), 8.0)
    w_before[:4, :2] = 0.5  # the region in the corner holds the smallest weights
    w_after = w_before.clone()
    w_after[:4, :2] *= 2
    w_after[4, 2] *= 2  # one of the eight entries of the next region on the diagonal
    maps = measure.local_maps(reference(w_before), w_after)
    density = torch.zeros(side, side).double()
    density[0, 0], density[1, 1] = 1.0, 1 / 8
    assert torch.equal(maps["density"], density)
    for name in ("principal_overlap", "low_magnitude_overlap"):
        assert torch.equal(maps[name].isnan(), density == 0)
    assert maps["low_magnitude_overlap"][0, 0] == 1.0
    assert maps["principal_overlap"][0, 0] == 0.0


def test_similarity_to_the_end(tmp_path: Path) -> None:
    """Two of K = 2 directions in common at step 2, one at step 1."""
    v, u = orthonormal(32, 0), orthonormal(32, 1)
    w_before = torch.zeros(32, 32, dtype=torch.float64)

    def update(first: int, second: int) -> Tensor:
        pair = v[:, [first, second]]
        return (u[:, :2] * torch.tensor([3.0, 2.0]).double()) @ pair.T

    paths = {}
    steps = {0: w_before, 1: update(0, 5), 2: 2 * update(1, 0), 3: update(0, 1)}
    for step, w in steps.items():
        paths[step] = tmp_path / f"{step}.safetensors"
        save_file({"w": w.contiguous()}, paths[step])
    rows = measure.measure_matrix("w", paths, 2, seed=0)
    found = {step: value for step, name, value in rows if name == "similarity_to_end"}
    assert found == {
        1: pytest.approx(0.5),
        2: pytest.approx(1.0),
        3: pytest.approx(1.0),
    }
    null = {value for _, name, value in rows if name == "null_similarity_to_end"}
    assert null == {2 / 32}


# --- one run ---------------------------------------------------------------------


def test_table_is_tidy_and_complete(copied: Path) -> None:
    table = measure.measure_run(OPD, RANK)
    assert list(table.columns) == COLUMNS
    assert set(table["run"]) == {OPD.key()}
    assert set(table["arm"]) == {"opd"}
    assert set(table["seed"]) == {0}
    assert not table.duplicated(["step", "matrix", "metric"]).any()
    matrices = list_matrices(runs.checkpoint(OPD))
    of_matrices = table[~table["role"].isin(["model", "region"])]
    assert set(of_matrices["matrix"]) == {matrix.name for matrix in matrices}
    similarity = ["similarity_to_end", "null_similarity_to_end"]
    wanted = {*METRICS, *(f"null_{name}" for name in NULL_METRICS), *similarity}
    later = of_matrices[of_matrices["step"] > 0]
    varied = later[later["metric"].str.contains("@|bound|gap_share")]
    at_all_steps = varied["metric"].str.contains("@K=")
    assert set(varied[~at_all_steps]["step"]) == {10}
    assert {"sparsity@eta=1e-2", "null_bound_nss"} <= set(varied["metric"])
    assert "similarity_to_end@K=8" in set(varied[at_all_steps]["metric"])
    later = later.drop(varied.index)
    held = later[~later["metric"].isin(wanted)]  # what it is held against
    later = later.drop(held.index)
    assert {"shuffled_sparsity", "turned_nss", "energy_inputs"} <= set(held["metric"])
    always = {"displacement", "hill_alpha_bf16", "walk_stable_rank_bf16"}
    always |= {"increments_similarity_to_end", "rounding_hill_alpha_bf16"}
    for name in always:
        of_name = held[held["metric"] == name]
        assert len(of_name) == len(matrices) * len(OPD.checkpoint_steps())
    assert set(held[held["metric"] == "similarity_of_stage"]["step"]) == {10}
    assert set(later["metric"]) == wanted
    assert set(later["step"]) == set(OPD.checkpoint_steps())
    assert len(later) == len(wanted) * len(matrices) * len(OPD.checkpoint_steps())
    at_end = later[(later["step"] == 10) & (later["metric"] == "similarity_to_end")]
    np.testing.assert_allclose(at_end["value"], 1.0)
    model = table[table["role"] == "model"]
    assert set(model["layer"]) == {-1}
    assert set(model["matrix"]) == {""}
    assert {"loss", "reward", "gap", "accuracy/chain"} <= set(model["metric"])
    norms = model[model["metric"] == "grad_norm"]["value"]
    clipped = model[model["metric"] == "clipped_frac"]
    assert (clipped["step"].item(), clipped["value"].item()) == (10, (norms > 1).mean())


def test_leak_is_that_of_the_confined_weights(copied: Path) -> None:
    table = measure.measure_run(PROJECTED, RANK)
    leaks = table[table["metric"] == "leak"]
    assert set(leaks["step"]) == {4, 6, 8, 10}
    name = "model.layers.0.self_attn.q_proj.weight"
    origin, start = (
        measure.read_matrix(runs.checkpoint(OPD, step), name).double()
        for step in (0, 2)
    )
    end = measure.read_matrix(runs.checkpoint(PROJECTED), name).double()
    v = spectra.top_right_subspace(start - origin, 2)
    inside = ((end - start) @ v).norm() ** 2 / (end - start).norm() ** 2
    shown = leaks[(leaks["matrix"] == name) & (leaks["step"] == 10)]["value"]
    assert shown.item() == pytest.approx(1 - float(inside), abs=1e-9)
    assert "leak" not in set(measure.measure_run(OPD, RANK)["metric"])
    # a confined run is no trajectory of its own: it has no nulls of one
    assert not table["metric"].str.startswith(("walk_", "increments_")).any()


def test_map_is_of_a_query_projection_at_the_end(copied: Path) -> None:
    table = measure.measure_run(OPD, RANK)
    regions = table[table["role"] == "region"]
    assert set(regions["step"]) == {10}
    assert set(regions["layer"]) == {-1}
    assert len(regions) == 2 * 3 * measure.MAP_REGIONS**2
    name = "model.layers.0.self_attn.q_proj.weight"
    assert set(regions["matrix"].str.partition("[")[0]) == {name}
    whole = table[(table["matrix"] == name) & (table["step"] == 10)]
    density = whole.set_index("metric")["value"]["density"]
    assert regions[regions["metric"] == "density"]["value"].mean() == pytest.approx(
        density
    )


def test_parameters_are_the_entries_of_each_matrix(copied: Path) -> None:
    table = measure.measure_run(OPD, RANK)
    rows = table[table["metric"] == "parameters"].set_index("matrix")
    assert set(rows["step"]) == {0}
    sizes = {
        m.name: m.shape[0] * m.shape[1] for m in list_matrices(runs.checkpoint(OPD))
    }
    assert rows["value"].to_dict() == sizes
    roles = {m.name: m.role for m in list_matrices(runs.checkpoint(OPD))}
    assert rows["role"].to_dict() == roles


def test_numbers_are_those_of_the_checkpoints(copied: Path) -> None:
    table = measure.measure_run(OPD, RANK)
    before, after = (
        measure.read_matrix(runs.checkpoint(OPD, step), "lm_head.weight").double()
        for step in (0, 4)
    )
    here = table[(table["matrix"] == "lm_head.weight") & (table["step"] == 4)]
    values = here.set_index("metric")["value"]
    assert values["frobenius_norm"] == pytest.approx(float((after - before).norm()))
    s = spectra.singular_values(after - before)
    assert values["stable_rank"] == pytest.approx(float((s**2).sum() / s[0] ** 2))


def test_projected_run_is_measured_after_its_branch(copied: Path) -> None:
    table = measure.measure_run(PROJECTED, RANK)
    matrices = table[(table["metric"] == "density") & (table["role"] != "region")]
    assert set(matrices["step"]) == {4, 6, 8, 10}
    rewards = table[table["metric"] == "reward"]
    assert set(rewards["step"]) == set(range(1, 11))


def test_run_that_never_moved_has_nan(copied: Path) -> None:
    table = measure.measure_run(RLVR, RANK)
    stable_rank = table[table["metric"] == "stable_rank"]["value"]
    assert len(stable_rank) > 0
    assert stable_rank.isna().all()
    assert (table[table["metric"] == "sparsity"]["value"] == 1.0).all()
    regions = table[table["role"] == "region"]
    assert (regions[regions["metric"] == "density"]["value"] == 0.0).all()
    assert regions[~regions["metric"].str.endswith("density")]["value"].isna().all()
    assert "similarity_to_end" not in set(table["metric"])


def test_map_is_of_the_middle_layer(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(4)]
    paths = [tmp_path / f"{name}.safetensors" for name in ("before", "after")]
    for seed, path in enumerate(paths):
        generator = torch.Generator().manual_seed(seed)
        save_file({n: torch.randn(32, 32, generator=generator) for n in names}, path)
    rows = measure.map_rows(list_matrices(paths[0]), paths[0], 5, paths[1], seed=0)
    assert {row[1].partition("[")[0] for row in rows} == {names[2]}
    assert len(rows) == 2 * 3 * 16 * 16
    assert {row[4].startswith("null_") for row in rows} == {True, False}


def test_damaged_kept_table_is_measured_again(copied: Path) -> None:
    whole = measure.measure_run(OPD, RANK)
    kept = measure.kept_table(OPD, RANK)
    kept.write_bytes(kept.read_bytes()[:500])
    assert not measure.is_measured(OPD, RANK)
    pd.testing.assert_frame_equal(measure.measure_run(OPD, RANK), whole)
    assert measure.is_measured(OPD, RANK)
    content = bytearray(kept.read_bytes())
    content[1000] ^= 1
    kept.write_bytes(content)
    assert not measure.is_measured(OPD, RANK)
    pd.testing.assert_frame_equal(measure.measure_run(OPD, RANK), whole)


def listed(*rows: str) -> str:
    """A list of runs whose digests fit: run, arm, seed, steps, seconds, machine."""
    names = [*committed.PROVENANCE, "table_sha256"]
    lines = [",".join([*names, "line_sha256"])]
    for row in rows:
        fields = dict(zip(names, [*row.split(","), "0" * 64], strict=True))
        lines.append(",".join([*fields.values(), line_digest(fields)]))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "it has no column run, "),
        ("run,arm\n1,2\n", "it has no column seed, steps, "),
        ("{]", "it has no column run, "),
        ("\xff", "codec can't decode"),
        (listed("a,opd,,1,1,m"), "a seed is nan, expected 0 or larger"),
        (listed("a,opd,-1,1,1,m"), "a seed is -1, expected 0 or larger"),
        (listed("a,opd,1.5,1,1,m"), "a seed is 1.5, expected 0 or larger"),
        (listed("a,opd,0,1,1,m", "a,opd,0,1,1,m"), "it lists run a twice"),
        (listed("a,opd,0,1,1,m", "b,opd,1,1,1,m")[:-30], "line 3 is cut or was ch"),
        (listed("a,opd,0,1,1,m")[:-90], "line 2 is cut or was changed"),
        (listed("a,opd,0,1,1,m").replace(",1,1,m", ",1,2,m"), "line 2 is cut or was"),
        (listed("a,opd,0,1,1,m").replace("m,0", "m,1,0"), "line 2 is cut or was ch"),
        (None, "Is a directory"),
    ],
)
def test_damaged_provenance_is_named(
    content: str | None, reason: str, data: Path
) -> None:
    path = measure.provenance_path()
    path.parent.mkdir(parents=True)
    if content is None:
        path.mkdir()
    else:
        path.write_text(content, encoding="latin1")
    with pytest.raises(ValueError, match=rf"runs\.csv is damaged: .*{reason}"):
        measure.committed_provenance()


@pytest.mark.usefixtures("tiny_profile")
def test_a_table_with_other_rows_than_its_runs_is_refused(copied: Path) -> None:
    """As of another run, edited by hand, or merged: nothing is averaged over it."""
    measure.commit("smoke", [OPD, RLVR])
    path, other = committed_path(OPD), committed_path(RLVR)
    table = pd.read_parquet(path)
    for changed, reason in (
        (pd.read_parquet(other), "its rows are not those of run opd-s0-"),
        (table[:0], "its rows are not those of run opd-s0-"),
        (table.assign(seed=1), "its rows are not those of run opd-s0-"),
        (table.assign(arm="rlvr"), "its rows are not those of run opd-s0-"),
        (table.assign(step=math.nan), "its column step has holes"),
        (table.assign(value="many"), "its column value holds no double"),
        (pd.concat([table, table[5:6]]), "two values of one matrix, step and metric"),
    ):
        changed.to_parquet(path)
        list_anew(path)
        with pytest.raises(ValueError, match=f"{path.name} is damaged: .*{reason}"):
            measure.committed("smoke")
    table.to_parquet(path)
    list_anew(path)
    assert len(measure.committed("smoke")) > len(table)


def list_anew(path: Path) -> None:
    """Write the digest of a table of OPD into the list, as if it were right."""
    listing = measure.provenance_path()
    lines = measure.read_lines(listing)
    row = next(line for line in lines if line["run"] == OPD.key())
    write_listing(listing, lines, [row | {"table_sha256": digest_of(path)}])


@pytest.mark.usefixtures("tiny_profile")
def test_no_flipped_bit_of_a_committed_table_is_silent(copied: Path) -> None:
    measure.commit("smoke", [RLVR])
    path, draw = committed_path(RLVR), random.Random(0)
    whole = path.read_bytes()
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="another digest than runs") as caught:
            measure.committed_table(RLVR)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    table = measure.committed_table(RLVR)
    table.loc[0, "value"] = 1.0  # a reader may write to it


@pytest.mark.usefixtures("tiny_profile")
def test_no_flipped_bit_and_no_cut_of_the_list_is_silent(copied: Path) -> None:
    measure.commit("smoke", [OPD, RLVR])
    path, draw = measure.provenance_path(), random.Random(0)
    whole, known = path.read_bytes(), measure.committed("smoke")
    for case in range(60):
        damaged = bytearray(whole)
        place = draw.randrange(len(whole) - 1)
        if case % 2:
            damaged[place] ^= 1 << draw.randrange(8)
        else:
            del damaged[place:]
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"runs\.csv (is|does not name)") as caught:
            measure.committed("smoke")
        assert "\n" not in str(caught.value)
    path.write_bytes(whole[: whole.rindex(b"\n", 0, -1) + 1])  # a whole line is gone
    with pytest.raises(ValueError, match=r"does not name .*parquet beside it"):
        measure.committed("smoke")
    path.write_bytes(whole)
    pd.testing.assert_frame_equal(measure.committed("smoke"), known)


@pytest.mark.usefixtures("tiny_profile")
def test_committed_data_of_the_checkout_are_found(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure.commit("smoke", [OPD, RLVR])
    known = measure.committed("smoke")
    monkeypatch.setenv("OPD_GEOMETRY_DATA", str(tmp_path / "elsewhere"))
    pd.testing.assert_frame_equal(measure.committed("smoke"), known)
    shutil.copytree(copied / "runs", tmp_path / "elsewhere" / "runs")
    measure.commit("smoke", [ANCHOR])  # goes elsewhere, and leaves the checkout alone
    assert set(measure.committed_provenance()["arm"]) == {"sft", "opd", "rlvr"}
    assert committed_path(ANCHOR).parent.parent.name == "elsewhere"
    assert committed_path(OPD).parent == copied / "measurements"
    assert len(measure.read_lines(copied / "measurements" / "runs.csv")) == 2
    (copied / "base").mkdir()
    save_file({"w": torch.eye(2)}, copied / "base" / "model.safetensors")
    assert runs.stored("base").source == "base"


@pytest.mark.usefixtures("tiny_profile")
def test_a_damaged_run_is_left_out_of_what_is_committed(unmeasured: Path) -> None:
    history = runs.run_directory(OPD) / "history.json"
    history.write_text(history.read_text().replace("reward", "rewards", 1))
    folder, left_out = measure.commit("smoke", [OPD, RLVR])
    assert left_out.keys() == {OPD}
    assert "history.json is missing or damaged" in left_out[OPD]
    assert set(measure.committed_provenance()["arm"]) == {"rlvr"}
    assert not list(folder.glob("opd-*"))
    with pytest.raises(ValueError, match=r"history\.json is missing or damaged"):
        measure.commit("smoke", [OPD])


@pytest.mark.usefixtures("tiny_profile")
@pytest.mark.parametrize("damage", ["missing", "cut", "columns"])
def test_listed_run_without_its_table_is_an_error(damage: str, copied: Path) -> None:
    measure.commit("smoke", [OPD, RLVR])
    path = committed_path(OPD)
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        pd.read_parquet(path).drop(columns="value").to_parquet(path)
    assert len(measure.load("smoke", ["rlvr"], [0])[0]) > 0
    with pytest.raises(ValueError, match=f"{path.name} is .*; take it from version"):
        measure.load("smoke", ["opd"], [0])


def test_table_is_kept(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure.measure_run(ANCHOR, RANK)
    monkeypatch.setattr(measure, "measure_matrix", None)
    pd.testing.assert_frame_equal(measure.measure_run(ANCHOR, RANK), first)
    with pytest.raises(TypeError):  # another K is another table
        measure.measure_run(ANCHOR, RANK + 1)


def test_missing_checkpoint_of_a_finished_run(unmeasured: Path) -> None:
    shutil.rmtree(runs.checkpoint(OPD, 4))
    with pytest.raises((ValueError, OSError), match="does not exist"):
        measure.measure_run(OPD, RANK)
    assert not measure.kept_table(OPD, RANK).exists()


def test_full_disk_leaves_no_table(unmeasured: Path) -> None:
    call = (children.measure_with_small_files, OPD, 4000)
    with pytest.raises(ValueError, match=r"cannot write below .*; make room") as error:
        Child(unmeasured, *call).result()
    assert "\n" not in str(error.value)
    names = [path.name for path in runs.run_directory(OPD).iterdir()]
    assert not [name for name in names if "measurements" in name]
    assert len(measure.measure_run(OPD, RANK)) > 0


# --- committed measurements ------------------------------------------------------


@pytest.mark.usefixtures("tiny_profile")
def test_commit_replaces_its_runs(copied: Path) -> None:
    asked = [OPD, RLVR, profiles.replace(OPD, seed=9)]
    folder, left_out = measure.commit("smoke", asked)
    assert not left_out
    assert folder == copied / "measurements"
    table, listing = measure.committed("smoke"), measure.committed_provenance()
    assert list(table.columns) == COLUMNS
    assert table["value"].dtype == float
    assert dict(zip(listing["arm"], listing["run"], strict=True)) == {
        "opd": OPD.key(),
        "rlvr": RLVR.key(),
    }
    assert {"seed", "steps", "wall_seconds", "library", "torch", "machine"} <= set(
        listing.columns
    )
    old = measure.measure_run(OPD, RANK)
    kept = measure.kept_table(OPD, RANK)
    old.assign(value=0.0).to_parquet(kept, index=False)
    seal(kept)
    measure.commit("smoke", [OPD])
    again = measure.committed("smoke")
    assert len(again) == len(table)
    assert set(again[again["arm"] == "opd"]["value"]) == {0.0}
    kept = again[again["arm"] == "rlvr"].reset_index(drop=True)
    before = table[table["arm"] == "rlvr"].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept.astype(object), before.astype(object))
    assert len(measure.committed_provenance()) == 2
    assert not list(copied.rglob(".*"))


@pytest.mark.usefixtures("tiny_profile")
def test_commit_needs_a_finished_run(data: Path) -> None:
    with pytest.raises(ValueError, match="no finished run of profile smoke"):
        measure.commit("smoke", [OPD])
    assert not data.exists()
    assert measure.committed("smoke").empty
    assert measure.committed_provenance().empty


@pytest.mark.usefixtures("tiny_profile")
def test_load_prefers_what_it_is_told_to(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure.commit("smoke", [OPD, ANCHOR])
    shutil.rmtree(runs.run_directory(ANCHOR))
    asked = ("smoke", ["opd", "sft"], [0])
    table, rows = measure.load(*asked)
    assert list(rows["source"]) == ["committed", "committed"]
    assert set(table["run"]) == {OPD.key(), ANCHOR.key()}
    local, rows = measure.load(*asked, source="local")
    assert list(rows["source"]) == ["this machine", "committed"]
    assert list(rows["arm"]) == ["opd", "sft"]
    for one in (table, local):
        opd = one[one["arm"] == "opd"]
        assert len(opd) == len(measure.measure_run(OPD, RANK))
    # in neither place: trained now
    trained_now = []
    monkeypatch.setattr(
        measure,
        "measure_run",
        lambda run, rank: trained_now.append((run, rank)) or table,
    )
    measure.load("smoke", ["rlvr"], [0, 1])
    rank = profiles.PROFILES["smoke"].rank
    assert trained_now == [(profiles.replace(RLVR, seed=s), rank) for s in (0, 1)]
    # from scratch: a run of another base is not the one that is committed
    trained_now.clear()
    _, rows = measure.load("smoke", ["opd"], [0], source="scratch")
    assert list(rows["source"]) == ["committed"]
    with pytest.raises(ValueError, match="unknown source 'x'; expected committed"):
        measure.load(*asked, source="x")

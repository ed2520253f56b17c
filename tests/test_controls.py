import math
from dataclasses import replace

import children
import numpy as np
import pytest
import torch
from torch import Tensor

from opd_geometry.experiments import activations, controls
from opd_geometry.experiments.runs import Run
from opd_geometry.geometry import locking, spectra
from opd_geometry.geometry.comparison import Reference, reference
from opd_geometry.training.models import build_model, character_tokenizer
from opd_geometry.training.optimizer import OptimizerConfig, learning_rate

RATE = 1e-3
CONFIG = OptimizerConfig(RATE, warmup_steps=5, betas=(0.9, 0.98))
LESSONS = replace(children.LESSONS, optimizer=CONFIG, steps=40)
RUN = Run("opd", 0, LESSONS, children.SHAPE)
STEPS = (4, 8, 16, 40)
SHAPE = (48, 40)


def noise(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or SHAPE), generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def before() -> Reference:
    return reference((0.04 * noise(0)).bfloat16().float())


def planted(delta: Tensor, before: Reference) -> dict[int, Tensor]:
    """Weights of a run whose update is always the same one, longer and longer."""
    return {s: (before.w_before + delta * s / 40).float() for s in STEPS}


def low_rank(seed: int, size: float = 0.05) -> Tensor:
    u, v = noise(seed, SHAPE[0], 2), noise(seed + 1, SHAPE[1], 2)
    delta = u @ torch.diag(torch.tensor([1.0, 0.7]).double()) @ v.T
    return size * delta / delta.norm()


def table(before: Reference, weights: dict[int, Tensor], **how: Tensor) -> dict:
    rows = controls.control_rows(RUN, "w", before, weights, 2, **how)
    keys = [(step, metric) for step, metric, _ in rows]
    assert len(keys) == len(set(keys))
    return {(step, metric): value for step, metric, value in rows}


# --- trajectories -----------------------------------------------------------------


def test_a_planted_lock_is_not_that_of_its_nulls(before: Reference) -> None:
    """All increments in one subspace: what turning them takes away."""
    found = table(before, planted(low_rank(2), before))
    weights = planted(low_rank(2), before)
    delta = {s: w.double() - before.w_before for s, w in weights.items()}
    own = controls.similarities(delta, {"": 2})
    assert own[4, "similarity_to_end"] > 0.999
    assert found[4, "increments_similarity_to_end"] < 0.3
    assert found[4, "walk_similarity_to_end"] < 0.6
    assert found[40, "increments_similarity_to_end"] == pytest.approx(1.0)
    # the sum of turned increments has more directions, the first has its own
    ranks = [found[s, "increments_stable_rank"] for s in STEPS]
    assert ranks[0] == pytest.approx(spectra.stable_rank(delta[4]), rel=1e-4)
    assert ranks[-1] > 1.1 * ranks[0]


def test_nulls_move_as_far_as_the_run_from_checkpoint_to_checkpoint() -> None:
    deltas = {s: 0.1 * math.sqrt(s) * noise(s) for s in STEPS}
    sizes = {s: float(d.norm()) for s, d in locking.increments(deltas).items()}
    generator = torch.Generator().manual_seed(0)
    for null in (
        locking.turned_increments(deltas, generator),
        controls.walk(RUN, deltas, generator),
    ):
        assert list(null) == list(STEPS)
        found = locking.increments(null)
        for step, change in found.items():
            assert float(change.norm()) == pytest.approx(sizes[step], rel=1e-5)
        first, last = found[4].flatten(), found[40].flatten()
        assert abs(float(first @ last) / float(first.norm() * last.norm())) < 0.6


def test_turned_increments_keep_their_spectra() -> None:
    deltas = {4: low_rank(5), 8: low_rank(5) + low_rank(7, 0.02)}
    generator = torch.Generator().manual_seed(0)
    null = locking.increments(locking.turned_increments(deltas, generator))
    for step, own in locking.increments(deltas).items():
        ours, theirs = (torch.linalg.svdvals(d) for d in (own, null[step]))
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert float((null[4] - deltas[4]).norm()) > 0.5 * float(deltas[4].norm())


def test_a_run_that_pauses_has_a_null_that_pauses() -> None:
    deltas = {4: low_rank(5), 8: low_rank(5)}
    null = locking.turned_increments(deltas, torch.Generator().manual_seed(0))
    assert torch.equal(null[4], null[8])


def test_the_walk_is_torchs_adam_on_the_same_noise() -> None:
    generator = torch.Generator().manual_seed(3)
    rates = [learning_rate(CONFIG, step, 12) for step in range(12)]
    found = locking.walk(
        (6, 5), rates, [12], generator, betas=CONFIG.betas, eps=CONFIG.eps
    )
    generator = torch.Generator().manual_seed(3)
    weight = torch.nn.Parameter(torch.zeros(6, 5))
    adam = torch.optim.AdamW(
        [weight], lr=RATE, betas=CONFIG.betas, eps=CONFIG.eps, weight_decay=0.0
    )
    for step in range(12):
        adam.param_groups[0]["lr"] = learning_rate(CONFIG, step, 12)
        left, right = (torch.randn(n, generator=generator) for n in (6, 5))
        weight.grad = torch.outer(left, right)
        adam.step()
    torch.testing.assert_close(found[12].float(), weight.detach(), rtol=1e-4, atol=1e-8)


def test_the_unit_of_displacement_is_that_of_a_walk() -> None:
    """Signs of random gradients: an entry moves by lr sqrt(T), one unit."""
    rates = [learning_rate(CONFIG, s, 40) for s in range(40)]
    signs = torch.sign(noise(9, 40, 60, 50))
    delta = (signs * torch.tensor(rates).double()[:, None, None]).sum(0)
    rows = dict((s, v) for s, _, v in controls.displacement(RUN, {40: delta}))
    assert rows[40] == pytest.approx(1.0, abs=0.03)
    straight = torch.full(SHAPE, sum(rates)).double()
    ((_, _, aligned),) = controls.displacement(RUN, {40: straight})
    assert aligned == pytest.approx(sum(rates) / np.sqrt(np.square(rates).sum()))


def test_rounding_alone_adds_rank_where_little_is_seen(before: Reference) -> None:
    """A fixed direction that only grows: constant in float32, contracting in bf16."""
    found = table(before, planted(low_rank(2, 0.02), before))
    path = [found[s, "rounding_stable_rank_bf16"] for s in STEPS]
    assert path[0] > 1.5 * path[-1]
    true = spectra.stable_rank(low_rank(2))
    assert path[-1] > true
    # here the run is its own final update scaled, so rounding is all there is
    for step in STEPS:
        delta = planted(low_rank(2, 0.02), before)[step].double() - before.w_before
        own = spectra.stable_rank(controls.stored(before, delta))
        assert found[step, "rounding_stable_rank_bf16"] == pytest.approx(own, rel=0.02)
    assert found[40, "frobenius_norm_bf16"] > 0.02  # a stored norm contains rounding


def test_what_is_stored_is_rounded_once() -> None:
    """1 + 2^-8 is half way to the next bf16 number; what lies above it rounds up."""
    before = reference(torch.ones(2, 2))
    delta = torch.tensor([[2**-8, 2**-8 + 2**-40], [2**-8 - 2**-40, 2**-7]]).double()
    delta[0, 1], delta[1, 0] = 2**-8 + 2**-40, 2**-8 - 2**-40  # in float64
    twice = (before.w_before.double() + delta).float().bfloat16().double() - 1
    found = controls.stored(before, delta)
    assert found.tolist() == [[0.0, 2**-7], [0.0, 2**-7]]
    assert twice.tolist() != found.tolist()


def test_predictors_know_a_planted_end(before: Reference) -> None:
    top = before.top.right[:, :2]
    inside = 0.05 * noise(11, SHAPE[0], 2) @ top.T
    found = table(before, planted(inside, before))
    assert found[40, "similarity_of_weights"] == pytest.approx(1.0, abs=1e-3)
    other = table(before, planted(low_rank(2), before))
    assert other[40, "similarity_of_weights"] < 0.3
    assert (40, "similarity_of_stage") not in other  # no stage before this one


# --- the end ---------------------------------------------------------------------


def test_a_placed_update_parts_from_its_permutation(before: Reference) -> None:
    """Sizes that grow with the weights': elsewhere, the same sizes show elsewhere."""
    signs = torch.sign(noise(21))
    placed = table(before, planted(0.02 * signs * before.w_before.abs(), before))
    free = placed[40, "free_low_magnitude_overlap@d=0.4628,alpha=0.3"]
    shuffled = placed[40, "shuffled_low_magnitude_overlap@d=0.4628,alpha=0.3"]
    own = placed[40, "low_magnitude_overlap@d=0.4628,alpha=0.3"]
    assert free == 0.0  # the largest changes are those of the largest weights
    assert own < shuffled - 0.1
    assert placed[40, "size_exponent"] == pytest.approx(1.0, abs=0.01)
    plain = table(before, planted(1e-3 * noise(22), before))
    for name in ("low_magnitude", "principal"):
        at = f"{name}_overlap@d=own"
        gap = plain[40, at] - plain[40, f"shuffled_{at}"]
        assert abs(gap) < 0.05
        assert plain[40, f"free_{at}"] == pytest.approx(0.5, abs=0.05)
    assert abs(plain[40, "size_exponent"]) < 0.1


def test_energies_of_planted_updates(before: Reference) -> None:
    u, _, vh = torch.linalg.svd(before.w_before.double(), full_matrices=False)
    k = 40 // 8
    right = 0.05 * noise(31, SHAPE[0], k) @ vh[:k]
    left = 0.05 * u[:, -k:] @ noise(32, k, SHAPE[1])
    found = dict(controls.energies(before, right))
    assert found["energy_top_right"] == pytest.approx(1.0)
    assert found["energy_bottom_right"] < 1e-12
    assert found["energy_top_left"] == pytest.approx(k / SHAPE[0], abs=0.1)
    assert found["null_energy_top_right"] == k / SHAPE[1]
    assert found["null_energy_top_left"] == k / SHAPE[0]
    assert dict(controls.energies(before, left))["energy_bottom_left"] > 1 - 1e-9
    many = [dict(controls.energies(before, noise(s))) for s in range(40, 60)]
    mean = np.mean([values["energy_top_right"] for values in many])
    assert mean == pytest.approx(k / SHAPE[1], abs=0.02)
    masked = torch.where(before.low_magnitude, noise(33), 0.0)
    found = dict(controls.energies(before, masked))
    assert found["energy_low_magnitude"] == pytest.approx(1.0)
    assert found["null_energy_low_magnitude"] == pytest.approx(0.5, abs=1e-3)


def test_energy_where_the_inputs_lie(before: Reference) -> None:
    basis = torch.linalg.qr(noise(51, SHAPE[1], SHAPE[1])).Q
    inputs = basis[:, :5] @ basis[:, :5].T
    update = 0.05 * noise(52, SHAPE[0], 5) @ basis[:, :5].T
    found = dict(controls.energies(before, update, inputs))
    assert found["energy_inputs"] == pytest.approx(1.0)
    assert found["null_energy_inputs"] == 5 / 40
    assert "energy_inputs" not in dict(controls.energies(before, update))


def test_what_never_moved_has_no_controls(before: Reference) -> None:
    still = dict.fromkeys(STEPS, before.w_before.clone())
    found = table(before, still)
    assert found == {(s, "displacement"): 0.0 for s in STEPS}
    late = {**planted(low_rank(2), before), 4: before.w_before.clone()}
    found = table(before, late)
    assert (4, "increments_stable_rank") not in found
    assert found[40, "increments_similarity_to_end"] == pytest.approx(1.0)


def test_another_optimizer_has_no_walk_and_no_displacement(before: Reference) -> None:
    """Both are of AdamW: of others they would be numbers that mean nothing."""
    weights, names = planted(low_rank(2), before), {}
    for kind in ("adamw", "sgd", "muon"):
        own = replace(RUN.train.optimizer, kind=kind)
        run = replace(RUN, train=replace(RUN.train, optimizer=own))
        rows = controls.control_rows(run, "w", before, weights, 2)
        names[kind] = {metric for _, metric, _ in rows}
    assert names["sgd"] == names["muon"]
    lost = names["adamw"] - names["sgd"]
    assert lost == {"displacement"} | {n for n in names["adamw"] if n[:5] == "walk_"}
    assert len(lost) > 5


def test_controls_are_the_same_each_time_and_others_for_each_matrix(
    before: Reference,
) -> None:
    weights = planted(low_rank(2), before)
    first, again = (
        controls.control_rows(RUN, name, before, weights, 2) for name in ("w", "w")
    )
    assert first == again
    other = controls.control_rows(RUN, "v", before, weights, 2)
    changed = {m for (_, m, a), (_, _, b) in zip(first, other, strict=True) if a != b}
    assert {"shuffled_sparsity", "turned_nss", "walk_stable_rank"} <= changed
    assert not changed & {"displacement", "energy_top_left", "size_exponent"}


# --- inputs ----------------------------------------------------------------------


def test_covariances_are_those_of_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first projections see the normalised embeddings, taken by hand here."""
    monkeypatch.setattr(activations, "TEXTS", 3)
    pairs = []
    draw = activations.tasks.draw_demonstrations

    def watched(*asked: object) -> list[tuple[str, str]]:
        pairs.extend(draw(*asked))  # type: ignore[arg-type]
        return pairs

    monkeypatch.setattr(activations.tasks, "draw_demonstrations", watched)
    model, tokenizer = build_model(children.SHAPE, 0), character_tokenizer()
    names = [name for name, _ in model.named_parameters() if "layers.0" in name]
    found = activations.input_covariances(children.ANCHOR, names)
    assert found
    assert set(found) <= set(names)
    expected = torch.zeros(32, 32).double()
    for prompt, answer in pairs:
        ids = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
        with torch.no_grad():
            embedded = model.model.embed_tokens(torch.tensor(ids))
            x = model.model.layers[0].input_layernorm(embedded).double()
        expected += x.T @ x
    for name in ("q", "k", "v"):
        ours = found[f"model.layers.0.self_attn.{name}_proj.weight"]
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, covariance in found.items():
        assert covariance.shape == (shapes[name][1],) * 2

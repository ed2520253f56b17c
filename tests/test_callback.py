"""The callbacks in TRL's trainers: what they log, confine, remember, leave alone."""

import copy
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import PreTrainedModel, Qwen3ForCausalLM, TrainerCallback, logging
from trl import (
    DistillationConfig,
    DistillationTrainer,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
)

from opd_geometry.geometry import (
    bits,
    locking,
    nulls,
    projection,
    spectra,
    unplaced,
    updates,
)
from opd_geometry.geometry.checkpoints import list_matrices, read_matrix
from opd_geometry.geometry.comparison import generator_of, null_seed
from opd_geometry.geometry.shadow import Shadow
from opd_geometry.training import callback
from opd_geometry.training.callback import GeometryCallback, ProjectionCallback
from opd_geometry.training.models import ModelConfig, build_model, character_tokenizer

logging.set_verbosity_error()
TINY = ModelConfig(width=32, layers=2, head_size=16)
K, STEPS = 4, 6
KINDS = ("sft", "grpo", "distillation")
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "logging_steps": 1,
    "save_steps": 2,
    "disable_tqdm": True,
    "seed": 0,
}
PROMPTS = [f"{a}+{b}=" for a in range(1, 9) for b in range(1, 9)]


def model(seed: int = 0) -> PreTrainedModel:
    return build_model(TINY, seed)


def trainer_of(kind: str, folder: Path, student: Any = None, **settings: Any) -> Any:
    """A TRL trainer on a tiny model."""
    student = student or model()
    common = {"processing_class": character_tokenizer()}
    options = {"output_dir": str(folder), **SETTINGS, **settings}
    if kind == "sft":
        texts = Dataset.from_list([{"text": f"{p}{len(p)},{p}"} for p in PROMPTS])
        return SFTTrainer(
            student, args=SFTConfig(**options), train_dataset=texts, **common
        )
    rows = Dataset.from_list([{"prompt": p} for p in PROMPTS])
    options |= {"max_completion_length": 4}
    if kind == "grpo":
        return GRPOTrainer(
            student,
            reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
            args=GRPOConfig(num_generations=4, beta=0.0, **options),
            train_dataset=rows,
            **common,
        )
    return DistillationTrainer(
        student,
        teacher_model=model(seed=1),
        args=DistillationConfig(beta=1.0, **options),
        train_dataset=rows,
        **common,
    )


def logged(trainer: Any) -> dict[int, dict[str, float]]:
    """Step to what the callback logged there."""
    return {
        row["step"]: row
        for row in trainer.state.log_history
        if "geometry/seconds" in row
    }


def offline(before: Path, after: Path, locked: Path | None = None) -> dict[str, float]:
    """The same values by the library's full SVDs, from checkpoints."""
    values: dict[str, list[float]] = {}
    unchanged = expected = shuffled = entries = 0.0
    for m in list_matrices(after):
        if m.role not in ("q", "k", "v", "o"):
            continue
        w_before, w_after = read_matrix(before, m.name), read_matrix(after, m.name)
        delta = w_after.double() - w_before.double()
        row = {
            "stable_rank": spectra.stable_rank(delta),
            "frobenius_norm": spectra.frobenius_norm(delta),
        }
        top = spectra.top_right_subspace(w_before, K)
        row["energy_of_weights"] = nulls.energy_share(delta, top)
        row["similarity_of_weights"] = spectra.subspace_similarity(
            spectra.top_right_subspace(delta, K), top
        )
        moved = nulls.shuffled(delta, torch.Generator().manual_seed(1)) + w_before
        shuffled += updates.update_sparsity(w_before, moved) * delta.numel()
        seen = bits.stored_difference(w_before, w_after)
        row["frobenius_norm_bf16"] = spectra.frobenius_norm(seen)
        row["stable_rank_bf16"] = spectra.stable_rank(seen) if seen.any() else math.nan
        if locked is not None:
            earlier = read_matrix(locked, m.name).double() - w_before.double()
            row["similarity_to_locked"] = spectra.subspace_similarity(
                spectra.top_right_subspace(delta, K),
                spectra.top_right_subspace(earlier, K),
            )
        for key, value in row.items():
            values.setdefault(key, []).append(value)
        unchanged += updates.update_sparsity(w_before, w_after) * delta.numel()
        scale = float(delta.square().mean().sqrt())
        chances = unplaced.change_probability(w_before, scale)
        expected += float((1.0 - chances).sum())
        entries += delta.numel()
    known = {key: [v for v in column if v == v] for key, column in values.items()}
    means = {key: sum(column) / len(column) for key, column in known.items() if column}
    shares = {"sparsity": unchanged, "expected_sparsity": expected}
    shares["shuffled_sparsity"] = shuffled
    return means | {name: share / entries for name, share in shares.items()}


# What is counted by cells, in float32 only, or drawn; all else is the same.
TOLERANCES = {
    "expected_sparsity": {"rel": 1e-3},
    "similarity_of_weights": {"rel": 1e-3},
    "shuffled_sparsity": {"abs": 0.02},
}


def rate_of(trainer: Any, step: int) -> float:
    """What the trainer says that it took a step with."""
    (row,) = (
        row
        for row in trainer.state.log_history
        if row["step"] == step and "learning_rate" in row
    )
    return row["learning_rate"]


def displaced(before: Path, after: Path, rates: list[float]) -> float:
    found = [
        locking.displacement(
            read_matrix(after, m.name).double() - read_matrix(before, m.name), rates
        )
        for m in list_matrices(after)
        if m.role in ("q", "k", "v", "o")
    ]
    return sum(found) / len(found)


@pytest.mark.parametrize("kind", KINDS)
def test_logs_what_the_saved_checkpoints_say(kind: str, tmp_path: Path) -> None:
    trainer = trainer_of(kind, tmp_path)
    trainer.model.save_pretrained(tmp_path / "start")
    trainer.add_callback(GeometryCallback(trainer, every=2, k=K, lock_at=2))
    trainer.train()
    rows = logged(trainer)
    assert list(rows) == [2, 4, 6]
    for step, row in rows.items():
        place = tmp_path / f"checkpoint-{step}"
        told = offline(tmp_path / "start", place, tmp_path / "checkpoint-2")
        for name, value in told.items():
            if step > 2 or name != "similarity_to_locked":
                near = pytest.approx(value, **TOLERANCES.get(name, {"rel": 1e-5}))
                assert row[f"geometry/{name}"] == near, name
        rates = [rate_of(trainer, n) for n in range(1, step + 1)]
        assert row["geometry/displacement"] == pytest.approx(
            displaced(tmp_path / "start", place, rates), rel=1e-5
        )
        norms = [x["grad_norm"] for x in trainer.state.log_history if "grad_norm" in x]
        seen = norms[: step - 1]  # this step's is logged afterwards
        clipped = sum(x > trainer.args.max_grad_norm for x in seen) / len(seen)
        assert row["geometry/clipped_share"] == pytest.approx(clipped)
    nulls = {"increments", "walk"}
    assert {f"geometry/{null}_stable_rank" for null in nulls} < rows[2].keys()
    assert {f"geometry/{n}_similarity_to_locked" for n in nulls} < rows[6].keys()
    assert "geometry/similarity_to_previous" not in rows[2]
    assert rows[4]["geometry/similarity_to_previous"] == pytest.approx(
        rows[4]["geometry/similarity_to_locked"]
    )
    assert rows[6]["geometry/similarity_null"] == pytest.approx(K / 32)
    assert 0.0 < rows[6]["geometry/time_share"] < 1.0


def losses(trainer: Any) -> list[dict[str, float]]:
    """The trainer's own log, less what is time."""
    drop = ("time", "runtime", "per_second", "geometry/")
    return [
        {key: v for key, v in row.items() if not any(word in key for word in drop)}
        for row in trainer.state.log_history
        if "geometry/seconds" not in row
    ]


def same_weights(one: PreTrainedModel, other: PreTrainedModel) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_training_and_its_own_log_stay_the_same(kind: str, tmp_path: Path) -> None:
    plain = trainer_of(kind, tmp_path / "plain", logging_steps=2)
    plain.train()
    watched = trainer_of(kind, tmp_path / "watched", logging_steps=2)
    watched.add_callback(GeometryCallback(watched, every=1, k=K, lock_at=0.5))
    watched.train()
    assert losses(watched) == losses(plain)
    assert len(logged(watched)) == STEPS
    same_weights(plain.model, watched.model)


class StopAt(TrainerCallback):
    """A training that is killed."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def both(trainer: Any, form: str = "update", **options: Any) -> ProjectionCallback:
    trainer.add_callback(GeometryCallback(trainer, every=1, k=K, lock_at=2, **options))
    confined = ProjectionCallback(trainer, lock_at=2, k=K, form=form, **options)
    trainer.add_callback(confined)
    return confined


def test_the_walk_takes_the_rates_of_training(tmp_path: Path) -> None:
    """What is logged of it is a walk by itself, rates and lengths given."""
    trainer = trainer_of("sft", tmp_path, lr_scheduler_type="linear")
    told = GeometryCallback(trainer, every=2, k=K, lock_at=2, detail="matrix")
    starts = {n: w.clone() for n, w in told.start.weights.items()}
    trainer.add_callback(told)
    trainer.train()
    group = trainer.optimizer.param_groups[0]
    rates = [rate_of(trainer, n) for n in range(1, STEPS + 1)]
    assert len(set(rates)) == STEPS
    rows, shapes = logged(trainer), {w.shape for w in starts.values()}
    followed = [n for n in starts if f"geometry/{n}/walk_stable_rank" in rows[6]]
    assert len(followed) == len(shapes)
    for name in followed:
        walk = locking.Walk(starts[name].shape, group["betas"], group["eps"])
        before = starts[name].double()
        for step in (2, 4, 6):
            now = read_matrix(tmp_path / f"checkpoint-{step}", name).double()
            noise = generator_of((*null_seed(0, name, 0), step), "walk")
            total = walk.add(rates[step - 2 : step], bits.norm(now - before), noise)
            before, row = now, rows[step]
            rank = float(bits.norm(total) / torch.linalg.matrix_norm(total, 2)) ** 2
            assert row[f"geometry/{name}/walk_stable_rank"] == pytest.approx(rank, 1e-5)
            assert row[f"geometry/{name}/stable_rank"] != pytest.approx(rank, 1e-3)


class Broken(TrainerCallback):
    """A weight that is not finite while one step is measured."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        self.weight, self.kept = weight, weight.detach().clone()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            self.kept.copy_(self.weight.detach())
            self.weight.data[0, 0] = float("nan")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            self.weight.data.copy_(self.kept)


def test_a_matrix_that_was_not_finite_has_no_nulls_from_then_on(tmp_path: Path) -> None:
    """Its walk would miss the rates of the steps before, and look like any other."""
    trainer = trainer_of("sft", tmp_path)
    told = GeometryCallback(trainer, every=2, k=K, lock_at=2, detail="matrix")
    name = next(iter(told._shadows()))
    trainer.add_callback(Broken(dict(trainer.model.named_parameters())[name]))
    trainer.add_callback(told)
    with pytest.warns(UserWarning, match="step 2: NaN or inf"):
        trainer.train()
    row = logged(trainer)[6]
    assert f"geometry/{name}/stable_rank" in row
    assert f"geometry/{name}/walk_stable_rank" not in row
    assert "geometry/walk_stable_rank" in row


@pytest.mark.parametrize(
    ("optim", "walks"),
    [("sgd", True), ("adafactor", False), ("rmsprop", False), ("adamw_torch", True)],
)
def test_a_walk_only_of_an_optimizer_that_it_knows(
    optim: str, walks: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    trainer = trainer_of("sft", tmp_path, optim=optim)
    trainer.add_callback(GeometryCallback(trainer, every=3, k=2, lock_at=3))
    trainer.train()
    row = logged(trainer)[6]
    assert ("geometry/walk_similarity_to_locked" in row) == walks
    assert "geometry/increments_similarity_to_locked" in row
    told = [w for w in recwarn if "no walk" in str(w.message)]
    assert len(told) == (not walks)
    assert ("geometry/displacement" in row) == (optim == "adamw_torch")


def test_one_direction_is_stored_and_a_failing_null_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With K = 1 the lock's subspace and that of the time before share their memory."""
    trainer = trainer_of("sft", tmp_path)
    trainer.add_callback(GeometryCallback(trainer, every=2, k=1, lock_at=2))

    def fails(*_: object) -> None:
        raise MemoryError("no room for a null")

    monkeypatch.setattr(Shadow, "add", fails)
    with pytest.warns(UserWarning, match="not complete: no room for a null"):
        trainer.train()
    rows = logged(trainer)
    assert list(rows) == [2, 4, 6]
    assert "geometry/similarity_to_locked" in rows[6]
    assert not [name for name in rows[6] if "walk" in name]


def test_what_cannot_be_stored_or_read_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of("sft", tmp_path)
    watch = GeometryCallback(trainer, every=2, k=K)
    trainer.add_callback(watch)

    def fails() -> None:
        raise OSError("disk full")

    monkeypatch.setattr(watch.checkpoints, "content", fails)
    with pytest.warns(UserWarning, match="not complete: disk full"):
        trainer.train()
    for group in trainer.optimizer.param_groups:
        del group["lr"]
    watch.on_optimizer_step(
        trainer.args, trainer.state, trainer.control, optimizer=trainer.optimizer
    )
    assert watch.squares is None


def test_nulls_can_be_left_out(tmp_path: Path) -> None:
    trainer = trainer_of("sft", tmp_path)
    trainer.add_callback(GeometryCallback(trainer, every=3, k=K, nulls=False))
    trainer.train()
    assert not [n for n in logged(trainer)[6] if "walk" in n or "increments" in n]


@pytest.mark.parametrize("form", ["gradient", "update"])
def test_resumed_training_equals_a_straight_one(form: str, tmp_path: Path) -> None:
    straight = trainer_of("sft", tmp_path / "straight")
    both(straight, form)
    straight.train()
    killed = trainer_of("sft", tmp_path / "killed")
    killed.model.save_pretrained(tmp_path / "start")
    both(killed, form)
    killed.add_callback(StopAt(4))
    killed.train()
    # The script hands over the last weights, so W_0 has to come from its checkpoint.
    later = Qwen3ForCausalLM.from_pretrained(tmp_path / "killed" / "checkpoint-4")
    resumed = trainer_of("sft", tmp_path / "killed", later)
    both(resumed, form, w_before=tmp_path / "start")
    resumed.train(resume_from_checkpoint=True)
    for a, b in zip(
        straight.model.parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(a, b)
    times = ("geometry/seconds", "geometry/time_share")
    for step in (5, 6):
        told, known = logged(resumed)[step], logged(straight)[step]
        assert told.keys() == known.keys()
        assert "geometry/similarity_to_locked" in told
        assert "geometry/walk_similarity_to_locked" in told
        for name in known.keys() - {*times}:
            assert told[name] == pytest.approx(known[name], rel=1e-9)


def test_another_start_is_refused_before_the_lock_and_not_asked_for_after_it(
    tmp_path: Path,
) -> None:
    for lock in (2, 5):
        folder = tmp_path / f"{lock}"
        first = trainer_of("sft", folder)
        first.add_callback(GeometryCallback(first, every=1, k=K, lock_at=lock))
        first.add_callback(ProjectionCallback(first, k=K, lock_at=lock))
        first.add_callback(StopAt(4))
        first.train()
        later = Qwen3ForCausalLM.from_pretrained(folder / "checkpoint-4")
        resumed = trainer_of("sft", folder, copy.deepcopy(later))
        resumed.add_callback(ProjectionCallback(resumed, k=K, lock_at=lock))
        if lock == 2:
            resumed.train(resume_from_checkpoint=True)
        else:
            with pytest.raises(ValueError, match="not the one that training started"):
                resumed.train(resume_from_checkpoint=True)
        # the geometry goes on without: nothing is measured against another W_0
        watched = trainer_of("sft", folder, copy.deepcopy(later))
        watched.add_callback(GeometryCallback(watched, every=1, k=K, lock_at=lock))
        with pytest.warns(UserWarning, match="not the one that training started"):
            watched.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
        assert watched.state.global_step == STEPS
        assert max(logged(watched)) <= 4


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training leaves that was locked at step 2 and ended at step 4."""
    folder = tmp_path_factory.mktemp("stopped")
    first = trainer_of("sft", folder)
    both(first)
    first.add_callback(StopAt(4))
    first.train()
    return folder


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "with the locked subspaces is missing; resume"),
        (lambda path: path.write_bytes(path.read_bytes()[:40]), "is damaged, expected"),
        (lambda path: save_file({}, path), "is damaged, expected"),
    ],
)
def test_a_damaged_memory_is_one_line(
    damage: Callable[[Path], None], said: str, stopped: Path, tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoint-4" / "opd_geometry_projection.state")
    resumed = trainer_of("sft", tmp_path)
    resumed.add_callback(ProjectionCallback(resumed, k=K, lock_at=2))
    with pytest.raises(ValueError, match=said) as caught:
        resumed.train(resume_from_checkpoint=True)
    assert "\n" not in str(caught.value)
    # the geometry loses a column, never the run
    damage(tmp_path / "checkpoint-4" / "opd_geometry_geometry.state")
    resumed = trainer_of("sft", tmp_path)
    resumed.add_callback(GeometryCallback(resumed, every=1, k=K, lock_at=2))
    with pytest.warns(UserWarning, match="the subspaces of before are lost"):
        resumed.train(resume_from_checkpoint=True)
    rows = logged(resumed)
    assert "geometry/similarity_to_locked" not in rows[6]
    assert "geometry/stable_rank" in rows[6]


def leak_since_lock(trainer: Any, confined: ProjectionCallback, folder: Path) -> float:
    """Largest share of energy of W_t - W_lock outside the subspaces."""
    assert confined.bases
    assert confined.handle is None  # taken off at the end
    lock, end = folder / "checkpoint-2", folder / f"checkpoint-{STEPS}"
    leaks = [
        projection.leaked_energy(
            read_matrix(end, name).double() - read_matrix(lock, name).double(), v
        )
        for name, v in confined.bases.items()
    ]
    assert len(leaks) == sum(p.ndim == 2 for p in trainer.model.parameters())
    return max(leaks)


@pytest.mark.parametrize("kind", KINDS)
def test_projected_updates_stay_inside_and_gradients_leak(
    kind: str, tmp_path: Path
) -> None:
    leaks = {}
    for form in ("update", "gradient"):
        trainer = trainer_of(kind, tmp_path / form)
        confined = both(trainer, form)
        trainer.train()
        leaks[form] = leak_since_lock(trainer, confined, tmp_path / form)
    assert leaks["update"] < 1e-9  # float32 weights round, squared
    assert 1e-3 < leaks["gradient"] < 0.9


def test_the_lock_is_the_top_subspace_at_that_step(tmp_path: Path) -> None:
    trainer = trainer_of("sft", tmp_path)
    trainer.model.save_pretrained(tmp_path / "start")
    confined = ProjectionCallback(trainer, lock_at=0.34, k=K, roles=("q", "down"))
    trainer.add_callback(confined)
    trainer.train()
    assert len(confined.bases) == 4
    for name, v in confined.bases.items():
        w_before = read_matrix(tmp_path / "start", name).double()
        w_lock = read_matrix(tmp_path / "checkpoint-2", name).double()
        exact = spectra.top_right_subspace(w_lock - w_before, K)
        assert spectra.subspace_similarity(v, exact) == pytest.approx(1, abs=1e-6)


def test_bf16_weights_and_tied_embeddings(tmp_path: Path) -> None:
    student = build_model(TINY, 0)
    student.config.tie_word_embeddings = True
    tied = Qwen3ForCausalLM(student.config).bfloat16()
    trainer = trainer_of("sft", tmp_path, tied, learning_rate=1e-2)
    watch = GeometryCallback(trainer, every=3, roles=None, k=K, detail="matrix")
    trainer.add_callback(watch)
    names = list(watch.start.weights)
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert all(w.dtype == torch.bfloat16 for w in watch.start.weights.values())
    trainer.train()
    row = logged(trainer)[3]
    assert 0.0 < row["geometry/model.embed_tokens.weight/sparsity"] < 1.0


def test_options_choose_matrices_and_detail(tmp_path: Path) -> None:
    trainer = trainer_of("sft", tmp_path)
    watch = GeometryCallback(trainer, roles=("q", "up"), max_layers=1, detail="role")
    assert list(watch.start.weights) == [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ]
    with torch.no_grad():
        trainer.model.model.layers[0].self_attn.q_proj.weight += 0.1
    values = watch.measure(1)
    assert values["geometry/q/stable_rank"] == pytest.approx(1.0)
    assert values["geometry/up/sparsity"] == 1.0
    assert "geometry/up/stable_rank" not in values  # it has not moved


class Reporter(TrainerCallback):
    """What TensorBoard, Weights & Biases and Trackio are to a trainer."""

    def __init__(self) -> None:
        self.told: list[tuple[int, set[str]]] = []

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any
    ) -> None:
        self.told.append((state.global_step, set(logs)))


def test_reporters_are_told_beside_the_loss(tmp_path: Path) -> None:
    trainer = trainer_of("sft", tmp_path)
    reporter = Reporter()
    trainer.add_callback(reporter)  # before ours, as report_to puts them
    trainer.add_callback(GeometryCallback(trainer, every=3, k=K))
    trainer.train()
    by_step = {step for step, names in reporter.told if "geometry/stable_rank" in names}
    assert by_step == {3, 6}
    assert {step for step, names in reporter.told if "loss" in names} == {*range(1, 7)}


def test_wrapped_models_keep_their_names() -> None:
    bare = model()
    names = [name for name, _ in bare.named_parameters()]
    for wrapped in (torch.nn.DataParallel(bare), torch.compile(bare)):
        assert [name for name, _ in wrapped.named_parameters()] != names
        inner = callback._inner(wrapped)
        assert [name for name, _ in inner.named_parameters()] == names


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trainer that is only looked at."""
    return trainer_of("sft", tmp_path_factory.mktemp("untrained"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every": 0}, "every = 0, expected an integer"),
        ({"k": 2.0}, "k = 2.0, expected an integer"),
        ({"lock_at": 0}, "lock_at = 0, expected a step"),
        ({"lock_at": 1.5}, "lock_at = 1.5, expected a step"),
        ({"roles": "q"}, "roles = 'q', expected a collection"),
        ({"roles": ("router",)}, "trains no matrix with a role of router"),
        ({"max_layers": 0}, "max_layers = 0, expected 1"),
        ({"detail": "all"}, "detail 'all', expected mean, role or matrix"),
        ({"w_before": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_bad_options_are_one_line(
    options: dict[str, Any], said: str, untrained: Any
) -> None:
    with pytest.raises((ValueError, OSError), match=said) as caught:
        GeometryCallback(untrained, **options)
    assert "\n" not in str(caught.value)


def test_a_lock_after_the_end_and_an_unknown_form_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of("sft", tmp_path)
    with pytest.raises(ValueError, match="form 'both', expected gradient or update"):
        ProjectionCallback(trainer, form="both")
    trainer.add_callback(ProjectionCallback(trainer, lock_at=STEPS + 1))
    with pytest.raises(ValueError, match="lies after the last step, 6"):
        trainer.train()

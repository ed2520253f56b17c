"""Confinement in transformers' own Trainer: is it there, and what is said if not?"""

import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_ranks
from children import Child
from schedulefree import AdamWScheduleFree
from torch import Tensor
from torch.nn.utils import prune
from trainer_ranks import LOCK, SIZES, STEPS, Data, K, logged, qwen, snap, trainer
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from opd_geometry.geometry.projection import leaked_energy
from opd_geometry.geometry.spectra import subspace_similarity, top_right_subspace
from opd_geometry.training.attached import origin_model
from opd_geometry.training.callback import GeometryCallback, ProjectionCallback


def moe() -> Any:
    set_seed(0)
    experts = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts))


def mixtral() -> Any:
    set_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


def gpt2() -> Any:
    set_seed(0)
    sizes = {"vocab_size": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, n_positions=32))


class At(TrainerCallback):
    """The weights after the lock's step, and which steps ran unconfined after it."""

    def __init__(self, trainer: Any, confined: ProjectionCallback) -> None:
        self.trainer, self.confined = trainer, confined
        self.weights: dict[str, Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == LOCK:
            self.weights = snap(self.trainer.model)
        assert state.global_step < LOCK or self.confined.handle is not None


def confine(model: Any, folder: Path, **options: Any) -> tuple[Any, Any, At]:
    trainer_options = {
        key: options.pop(key)
        for key in ("optimizer", "data", "learning_rate", "save_strategy")
        if key in options
    }
    made = trainer(model, folder, **{"save_strategy": "no"} | trainer_options)
    confined = ProjectionCallback(made, lock_at=LOCK, **{"k": K} | options)
    made.add_callback(confined)
    at = At(made, confined)
    made.add_callback(at)
    return made, confined, at


def leaks(model: Any, at: At, confined: ProjectionCallback) -> dict[str, float]:
    now = snap(model)
    return {
        name: leaked_energy(now[name].double() - at.weights[name].double(), v)
        for name, v in confined.bases.items()
        if (now[name] != at.weights[name]).any()
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saved_weights_stay_inside_up_to_one_rounding(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = qwen().to(dtype)
    made, confined, at = confine(model, tmp_path, form="update")
    made.train()
    found = leaks(model, at, confined)
    mean = sum(found.values()) / len(found)
    assert logged(made)[-1]["projection/leak"] == pytest.approx(mean, rel=1e-9)
    assert mean < {2: 0.02, 4: 1e-9}[dtype.itemsize]
    for name, v in confined.bases.items():
        assert v.shape == (model.state_dict()[name].shape[1], K)


@pytest.mark.filterwarnings("ignore")
def test_roundings_of_16_bits_do_not_add_up(tmp_path: Path) -> None:
    """One rounding a step would leak some tens of per cent by then."""
    shares = []
    for steps in (STEPS, 6 * STEPS):
        made = trainer(qwen().bfloat16(), tmp_path, save_strategy="no", max_steps=steps)
        confined = ProjectionCallback(made, lock_at=LOCK, k=K, form="update")
        made.add_callback(confined)
        made.train()
        shares.append(logged(made)[-1]["projection/leak"])
    assert shares[1] < shares[0]


def test_weights_in_16_bits_that_leak_are_said_so(tmp_path: Path) -> None:
    made, _, _ = confine(qwen().bfloat16(), tmp_path, form="update", learning_rate=1e-4)
    with pytest.warns(UserWarning, match="by the rounding of weights in 16 bits; to"):
        made.train()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [moe, mixtral])
def test_experts_are_confined_slice_by_slice(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    model = make()
    start = snap(model)
    made, confined, at = confine(model, tmp_path, form="update")
    made.train()
    stacks = [n for n, p in model.named_parameters() if p.ndim == 3]
    assert len(stacks) == 4
    assert set(stacks) <= set(confined.bases)
    assert max(leaks(model, at, confined).values()) < 1e-8
    name = stacks[0]
    for i, v in enumerate(confined.bases[name]):
        moved = at.weights[name][i].double() - start[name][i].double()
        exact = top_right_subspace(moved, K)
        assert subspace_similarity(v, exact) == pytest.approx(1, abs=1e-5)
    assert logged(made)[-1]["projection/confined"] > 0.98


def test_an_expert_that_has_not_moved_is_free_and_named(tmp_path: Path) -> None:
    model = moe()
    silent = [n for n, p in model.named_parameters() if p.ndim == 3]

    def hush(grad: Tensor) -> Tensor:
        kept = grad.clone()
        kept[1] = 0.0
        return kept

    for name in silent:
        model.get_parameter(name).register_hook(hush)
    made, confined, _ = confine(model, tmp_path, form="update")
    with pytest.warns(UserWarning, match=r"are free, .* directions: .*experts\."):
        made.train()
    assert not confined.bases[silent[0]][1].any()
    assert confined.bases[silent[0]][0].any()
    share = sum(model.get_parameter(n).numel() / 4 for n in silent)
    share /= sum(p.numel() for p in model.parameters())
    assert logged(made)[-1]["projection/free"] == pytest.approx(share)


@pytest.mark.filterwarnings("ignore")
def test_conv1d_is_confined_on_the_input_side(tmp_path: Path) -> None:
    model = gpt2()
    start = snap(model)
    made, confined, at = confine(model, tmp_path, form="update")
    made.train()
    for name in ("mlp.c_fc", "attn.c_proj"):  # one of them is square
        key = f"transformer.h.0.{name}.weight"
        moved = (at.weights[key] - start[key]).double().T
        later = (snap(model)[key] - at.weights[key]).double().T
        assert leaked_energy(later, top_right_subspace(moved, K)) < 1e-9
        assert leaked_energy(later, confined.bases[key]) < 1e-9
    shared = (
        snap(model)["transformer.wte.weight"] - at.weights["transformer.wte.weight"]
    )
    assert leaked_energy(shared, confined.bases["transformer.wte.weight"]) < 1e-9
    watch = GeometryCallback(trainer(gpt2(), tmp_path), roles=None)
    shapes = {m.name: m.shape for m, _ in watch._matrices(watch.origin.model).values()}
    assert shapes["transformer.h.0.mlp.c_fc.weight"] == (128, 32)


def test_adapters_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(qwen(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"adapters are trained .*lora_A.*; merge"):
        ProjectionCallback(trainer(adapted, tmp_path))


def normed(model: Any, how: Callable[..., Any]) -> Any:
    how(model.model.layers[0].self_attn.q_proj)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "how",
    [
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.orthogonal,
        torch.nn.utils.weight_norm,
        lambda linear: prune.random_unstructured(linear, "weight", 0.5),
    ],
)
def test_parameters_that_weights_are_computed_from_are_no_weights(
    how: Any, tmp_path: Path
) -> None:
    made = trainer(normed(qwen(), how), tmp_path, save_strategy="no")
    with pytest.raises(ValueError, match=r"computed from .*q_proj.*; remove the"):
        ProjectionCallback(made)
    ProjectionCallback(made, roles=("v",))
    with pytest.warns(UserWarning, match=r"q_proj.* are trained and not looked into"):
        geometry = GeometryCallback(made, roles=None)
    assert geometry.names is not None
    assert len(geometry.names) == 2 * 7 + 2 - 1  # all but that one
    assert not any("layers.0.self_attn.q_proj" in name for name in geometry.names)


@pytest.mark.parametrize("kind", ["lora", "ia3", "lokr", "lora and a whole module"])
def test_adapters_are_not_looked_into(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    whole = {"modules_to_save": ["o_proj"]} if "whole" in kind else {}
    config = {
        "ia3": peft.IA3Config(
            target_modules=["down_proj"], feedforward_modules=["down_proj"]
        ),
        "lokr": peft.LoKrConfig(target_modules=["q_proj"]),
    }.get(kind, peft.LoraConfig(target_modules=["q_proj"], **whole))
    made = trainer(peft.get_peft_model(qwen(), config), tmp_path)
    if not whole:
        with pytest.raises(ValueError, match=r"trains no matrix .*merge them"):
            GeometryCallback(made, roles=None)
        return
    with pytest.warns(UserWarning, match=r"lora_A.* not looked into"):
        geometry = GeometryCallback(made, roles=None)
    assert geometry.names is not None
    assert len(geometry.names) == 2
    assert all("modules_to_save" in name for name in geometry.names)


@pytest.mark.filterwarnings("ignore")
def test_adapters_that_were_merged_as_advised_are_whole_weights(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(qwen(), peft.LoraConfig(target_modules=["q_proj"]))
    merged = adapted.merge_and_unload().requires_grad_(True)
    made, confined, at = confine(merged, tmp_path, form="update")
    made.train()
    assert max(leaks(merged, at, confined).values()) < 1e-9


def test_tokens_that_are_added_after_the_callback_are_said(tmp_path: Path) -> None:
    made, _, _ = confine(qwen(), tmp_path, form="update")
    made.model.resize_token_embeddings(40)
    with pytest.raises(ValueError, match=r"has shape \(40, 32\) and had \(32, 32\)"):
        made.train()
    other = trainer(qwen(), tmp_path, save_strategy="no")
    other.add_callback(GeometryCallback(other, every=4, roles=None, detail="matrix"))
    other.model.resize_token_embeddings(40)
    with pytest.warns(UserWarning, match="has another shape now, and no W_0"):
        other.train()
    (row, *_) = [r for r in other.state.log_history if "geometry/seconds" in r]
    assert sum(name.endswith("/frobenius_norm") for name in row) == 1 + 2 * 7


class Masters(torch.optim.SGD):
    """An optimizer that steps a copy of its own."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("master", p.detach().clone())
                self.state[p]["master"] -= group["lr"] * p.grad
                p.data.copy_(self.state[p]["master"])


def layerwise(parameters: list[Any]) -> Any:
    """As transformers makes its layer-wise ones: a step in backward, and a dummy."""
    for p in parameters:
        own = torch.optim.AdamW([p], 1e-3)
        p.register_post_accumulate_grad_hook(lambda _, own=own: own.step())
    dummy = LayerWiseDummyOptimizer()
    dummy.param_groups = [{"params": parameters, "lr": 1e-3}]
    return dummy


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (AdamWScheduleFree, "AdamWScheduleFree keeps a second copy of the weights"),
        (lambda ps: Masters(ps, 1e-1), "Masters keeps .* once more, as 'master'"),
        (layerwise, "DummyOptimizer steps layer by layer within backward"),
        (lambda ps: torch.optim.AdamW(ps[1:], 1e-3), "is not stepped by the trainer's"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_an_optimizer_that_cannot_be_confined_is_refused(
    optimizer: Any, said: str, tmp_path: Path
) -> None:
    made, confined, _ = confine(qwen(), tmp_path, optimizer=optimizer, form="update")
    with pytest.raises(ValueError, match=said) as error:
        made.train()
    assert "\n" not in str(error.value)
    assert confined.handle is None


def inner_matrices(model: Any) -> list[Any]:
    return [p for n, p in model.named_parameters() if "layers" in n and p.ndim == 2]


def test_muon_undoes_the_gradient_form_and_that_is_said(tmp_path: Path) -> None:
    roles = ("q", "k", "v", "o", "gate", "up", "down")
    for form, bounds in (("gradient", (0.3, 1.0)), ("update", (0.0, 1e-9))):
        model = qwen()
        made = trainer(model, tmp_path, save_strategy="no")
        made.optimizer = torch.optim.Muon(inner_matrices(model), 1e-2)
        confined = ProjectionCallback(made, lock_at=LOCK, k=K, form=form, roles=roles)
        made.add_callback(confined)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            made.train()
        told = [str(w.message) for w in heard]
        assert any("Muon makes its steps" in t for t in told) == (form == "gradient")
        assert bounds[0] <= logged(made)[-1]["projection/leak"] <= bounds[1]


class Pulled(torch.optim.Optimizer):
    """A wrapper that pulls the weights back to where they began, as TRAC does."""

    def __init__(self, parameters: list[Any]) -> None:
        self.optimizer = torch.optim.AdamW(parameters, 1e-2)
        super().__init__(self.optimizer.param_groups, {})
        self.start = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.optimizer.step()
        for p, start in zip(self.param_groups[0]["params"], self.start, strict=True):
            p.lerp_(start, 0.2)


@pytest.mark.parametrize("form", ["gradient", "update"])
def test_a_wrapper_of_an_optimizer_is_said_at_the_start(
    form: str, tmp_path: Path
) -> None:
    made, confined, _ = confine(qwen(), tmp_path, optimizer=Pulled, form=form)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        made.train()
    told = [str(w.message) for w in heard]
    early = "Pulled moves the weights after the step of the optimizer within it"
    assert any(early in t for t in told) == (form == "gradient")
    assert (logged(made)[-1]["projection/leak"] < 1e-9) == (form == "update")
    for name, p in made.model.named_parameters():  # rounding is no movement
        if name in confined.locked_rows:
            lock = confined.locked_rows[name]
            assert lock.shape == p.shape
            p.data.copy_(lock + 1e-11 * torch.randn(lock.shape))
    assert confined.leaks() == {}


def test_the_warning_at_the_lock_names_what_is_not_covered(tmp_path: Path) -> None:
    made, _, _ = confine(qwen(), tmp_path, form="update", roles=("q",))
    with pytest.warns(UserWarning, match="locked at step") as heard:
        made.train()
    (said,) = [str(w.message) for w in heard if "locked at step" in str(w.message)]
    assert "are confined" in said
    assert "not covered (norms, biases, other roles): model.embed_tokens.weight" in said
    row = logged(made)[-1]
    shares = [row[f"projection/{n}"] for n in ("confined", "free", "not_covered")]
    assert sum(shares) == pytest.approx(1.0)
    assert shares[0] < 0.2


class Change(TrainerCallback):
    """Do something to a model at the end of a step."""

    def __init__(self, step: int, work: Callable[[], Any]) -> None:
        self.step, self.work = step, work

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.work()


def test_frozen_and_fresh_weights_are_reported(tmp_path: Path) -> None:
    model = qwen()
    q = "model.layers.{}.self_attn.q_proj.weight"
    model.get_parameter(q.format(1)).requires_grad_(False)

    def swap() -> None:
        model.get_parameter(q.format(0)).requires_grad_(False)
        model.get_parameter(q.format(1)).requires_grad_(True)

    made = trainer(model, tmp_path, save_strategy="no")
    made.add_callback(Change(LOCK - 1, swap))
    made.add_callback(GeometryCallback(made, every=1, k=K, roles=("q",)))
    made.add_callback(ProjectionCallback(made, lock_at=LOCK, k=K, form="update"))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        made.train()
    told = " ".join(str(w.message) for w in heard)
    assert f"frozen since the start: {q.format(0)}" in told
    assert f"trained, not looked at: {q.format(1)}" in told
    assert f"trained only since then, hence free: {q.format(1)}" in told
    assert made.state.global_step == STEPS


class Lisa(TrainerCallback):
    """Layerwise importance sampling: one layer is trained at a time, in turn."""

    def __init__(self, model: Any, every: int) -> None:
        self.layers, self.every = model.model.layers, every

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        active = state.global_step // self.every % len(self.layers)
        for i, layer in enumerate(self.layers):
            layer.requires_grad_(i == active)


@pytest.mark.parametrize("every", [1, 4])
def test_layers_that_take_turns_stay_confined_or_are_named(
    every: int, tmp_path: Path
) -> None:
    """Fixed by name: who had moved by the lock is confined in later turns, too."""
    model = qwen()
    stored = "steps" if every == 1 else "no"  # saving fixes no other set
    options = {"optimizer": torch.optim.AdamW, "save_strategy": stored}
    made, confined, at = confine(model, tmp_path, **options)
    confined.form = "update"
    made.add_callback(Lisa(model, every))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        made.train()
    (said,) = [str(w.message) for w in heard if "locked at step" in str(w.message)]
    second = "model.layers.1.self_attn.q_proj.weight"
    assert (second in confined.bases) == (every == 1)  # else it had no turn by then
    assert ("of these free, should they be trained again" in said) == (every == 4)
    assert "frozen since the start: model.layers." in said
    moved = leaks(model, at, confined)
    assert len(moved) == (14 if every == 1 else 7) + 2
    assert max(moved.values()) < 1e-9


def test_what_else_writes_weights_is_heard(tmp_path: Path) -> None:
    model = qwen()
    w = model.model.layers[0].self_attn.q_proj.weight

    def write() -> None:
        with torch.no_grad():
            w.add_(torch.randn(w.shape, generator=torch.Generator().manual_seed(2)))

    made, _, _ = confine(model, tmp_path, form="update")
    made.callback_handler.callbacks.insert(0, Change(LOCK + 1, write))
    with pytest.warns(UserWarning, match="something other than the optimizer's step"):
        made.train()


def test_weights_that_zero_3_has_partitioned_are_refused(tmp_path: Path) -> None:
    """DeepSpeed leaves empty tensors, or whole ones for as long as they are gathered.

    A stand-in: DeepSpeed itself needs an accelerator.
    """
    for gathered in (True, False):
        model = qwen()
        made, confined, _ = confine(model, tmp_path)
        geometry = GeometryCallback(made, every=1, k=K)
        made.add_callback(geometry)
        for i, p in enumerate(model.parameters()):
            p.ds_id, p.ds_shape = i, p.shape
            if not gathered:
                p.data = torch.empty(0)
        with pytest.raises(ValueError, match=r"ZeRO-3.*; train with DDP") as error:
            made.train()
        assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match=r"ZeRO-3.*; measure the checkpoints"):
            ProjectionCallback(made)
        with pytest.raises(ValueError, match=r"ZeRO-3.*; measure the checkpoints"):
            GeometryCallback(made)
        with pytest.warns(UserWarning, match=r"not complete: .*ZeRO-3"):
            geometry.on_train_begin(made.args, made.state, made.control)
        assert confined.handle is None


# --- several processes ---------------------------------------------------------------


def in_two(folder: Path, work: Callable[..., Any]) -> list[Any]:
    """What two processes return that can reach each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [Child(folder / f"data{r}", work, r, port, folder) for r in range(2)]
    return [rank.result() for rank in ranks]


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """DDP: only the first keeps W_0, columns and bases are those of one process."""
    first, second = in_two(tmp_path, trainer_ranks.confined_in_two)
    made, geometry, confined = trainer_ranks.watched(
        tmp_path / "one", per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        made.train()
    alone = trainer_ranks.told(made, geometry, confined, heard)
    assert [first[0]["kept"], second[0]["kept"]] == [[True, True], [False, False]]
    assert [first[0]["keeps"], second[0]["keeps"]] == [[True, False], [False, False]]
    assert first[0]["geometry"].keys() == alone["geometry"].keys()
    assert not second[0]["geometry"]
    for step, values in alone["geometry"].items():
        assert first[0]["geometry"][step] == pytest.approx(values, rel=1e-3), step
    assert first[0]["projection"] == pytest.approx(alone["projection"])
    assert max(first[0]["leak"]) < 1e-9
    assert [len(r[0]["heard"]) for r in (first, second)] == [1, 0]
    assert first[0]["heard"] == alone["heard"]
    for name, v in alone["bases"].items():
        for rank in (first, second):
            for run in rank:
                assert (run["bases"][name] == first[0]["bases"][name]).all()
        found = torch.tensor(first[0]["bases"][name])
        assert subspace_similarity(torch.tensor(v), found) > 1 - 1e-5
    for name, w in first[0]["weights"].items():  # the same everywhere, resumed or not
        for run in (second[0], first[1], second[1]):
            assert (run["weights"][name] == w).all()
        assert w == pytest.approx(alone["weights"][name], abs=1e-5)
    assert first[1]["lock_step"] == second[1]["lock_step"] == LOCK
    assert first[1]["geometry"] == first[0]["geometry"]


def test_weights_that_fsdp2_has_sharded_are_refused(tmp_path: Path) -> None:
    for said, heard, steps in in_two(tmp_path, trainer_ranks.sharded_in_two):
        assert said.startswith("model.embed_tokens.weight is spread over processes")
        assert "\n" not in said
        assert len(heard) <= 1  # once, by the first process; the training goes on
        assert all("expected whole weights" in line for line in heard)
        assert steps == STEPS


# --- not finite, and other ends --------------------------------------------------


def test_nan_is_called_nan_and_ends_no_training(tmp_path: Path) -> None:
    model = qwen()

    def spoil() -> None:
        with torch.no_grad():
            model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan

    made = trainer(model, tmp_path, save_strategy="no")
    made.add_callback(Change(4, spoil))
    made.add_callback(GeometryCallback(made, every=2, k=K, lock_at=2, detail="role"))
    with pytest.warns(UserWarning, match=r"NaN or inf in model\.layers\.1\.self_attn"):
        made.train()
    rows = {r["step"]: r for r in made.state.log_history if "geometry/seconds" in r}
    assert rows[2]["geometry/stable_rank"] > 0
    assert rows[4]["geometry/stable_rank"] != rows[4]["geometry/stable_rank"]
    assert rows[4]["geometry/k/stable_rank"] > 0  # the other roles are whole
    confined = trainer(model, tmp_path, save_strategy="no")
    confined.add_callback(ProjectionCallback(confined, lock_at=2, k=K))
    with pytest.raises(ValueError, match=r"holds NaN or inf at the lock, step 2"):
        confined.train()


def test_geometry_that_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(qwen(), tmp_path, save_strategy="no")
    watch = GeometryCallback(made, every=1, k=K, lock_at=STEPS + 1)
    made.add_callback(watch)
    monkeypatch.setattr(watch, "measure", lambda step: 1 / 0)
    with pytest.warns(UserWarning, match="the geometry is not") as heard:
        made.train()
    told = [str(w.message) for w in heard if "the geometry is not" in str(w.message)]
    assert len(told) == 2  # once each
    assert "lies after the last step" in told[0]
    assert "division by zero" in told[1]
    assert made.state.global_step == STEPS


class Stop(TrainerCallback):
    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = True


def test_a_training_that_stops_early_is_measured_at_its_end(tmp_path: Path) -> None:
    made = trainer(
        qwen(), tmp_path, save_strategy="no", eval_strategy="steps", eval_steps=5
    )
    made.add_callback(GeometryCallback(made, every=4, k=K))
    made.add_callback(Stop())
    made.train()
    rows = [r["step"] for r in made.state.log_history if "geometry/seconds" in r]
    assert rows == [4, 5]


def test_rates_by_layer_have_units_of_their_own(tmp_path: Path) -> None:
    """AdamW's first steps go as far as the rate, whatever the gradient."""
    model = qwen()
    made = trainer(model, tmp_path, save_strategy="no")
    rates = {"q_proj": 1e-5, "k_proj": 1e-3}
    groups = [
        {"params": [p for n, p in model.named_parameters() if part in n], "lr": rate}
        for part, rate in rates.items()
    ]
    made.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    made.add_callback(GeometryCallback(made, every=STEPS, detail="role"))
    made.train()
    (row,) = [r for r in made.state.log_history if "geometry/seconds" in r]
    for role in ("q", "k"):
        assert 0.7 < row[f"geometry/{role}/displacement"] < 1.5


class Blank(TrainerCallback):
    """Other weights at the end, as of an average or a best checkpoint."""

    def on_train_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        with torch.no_grad():
            for p in named["model"].parameters():
                p.mul_(0.5)


def test_what_is_loaded_at_the_end_is_held_against_the_lock(tmp_path: Path) -> None:
    made, _, _ = confine(qwen(), tmp_path, form="update")
    made.add_callback(Blank())
    with pytest.warns(UserWarning, match=r"lies outside the subspace, written by"):
        made.train()
    best = {"load_best_model_at_end": True, "metric_for_best_model": "distance"}
    each = {"eval_strategy": "steps", "eval_steps": 1, "greater_is_better": False}
    other = trainer(qwen(), tmp_path, **best, **each)
    evaluated = other.evaluate

    def evaluate(*arguments: Any, **named: Any) -> Any:
        metrics = evaluated(*arguments, **named)
        return metrics | {"eval_distance": abs(other.state.global_step - 2)}

    other.evaluate = evaluate
    other.add_callback(ProjectionCallback(other, lock_at=LOCK, k=K, form="update"))
    with pytest.warns(UserWarning, match=r"is of step 2, before the lock at step 3"):
        other.train()


def test_a_training_that_stops_before_the_lock_is_said(tmp_path: Path) -> None:
    made = trainer(
        qwen(), tmp_path, save_strategy="no", eval_strategy="steps", eval_steps=2
    )
    made.add_callback(ProjectionCallback(made, lock_at=LOCK, k=K))
    made.add_callback(Stop())
    with pytest.warns(UserWarning, match="before the lock at step 3: nothing was"):
        made.train()


def test_a_model_that_is_trained_once_more_starts_where_it_is(tmp_path: Path) -> None:
    """W_0 was given up at the lock; the callback was made for any training."""
    model = qwen()
    made, confined, at = confine(model, tmp_path, form="update")
    made.train()
    second = snap(model)
    with pytest.warns(UserWarning, match="W_0 are the weights of now"):
        made.train()
    assert max(leaks(model, at, confined).values()) < 1e-9
    name = "model.layers.0.self_attn.q_proj.weight"
    exact = top_right_subspace((at.weights[name] - second[name]).double(), K)
    assert subspace_similarity(confined.bases[name], exact) == pytest.approx(1)


# --- resumed -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_epochs_keep_the_lock(dtype: torch.dtype, tmp_path: Path) -> None:
    """A finished run is resumed for more: the share would now mean a later step."""

    def start(steps: int) -> tuple[Any, ProjectionCallback]:
        made = trainer(qwen().to(dtype), tmp_path, max_steps=steps)
        confined = ProjectionCallback(made, lock_at=LOCK / STEPS, k=K, form="update")
        made.add_callback(confined)
        return made, confined

    made, confined = start(STEPS)
    made.train()
    first = dict(confined.bases)
    more, again = start(3 * STEPS)
    more.add_callback(At(more, again))
    more.train(resume_from_checkpoint=True)
    assert again.lock_step == LOCK
    assert all(torch.equal(again.bases[name], v) for name, v in first.items())
    straight = trainer(qwen().to(dtype), tmp_path / "straight", max_steps=3 * STEPS)
    whole = ProjectionCallback(straight, lock_at=LOCK, k=K, form="update")
    straight.add_callback(whole)
    straight.train()
    for a, b in zip(straight.model.parameters(), more.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore")
def test_the_checkpoint_that_is_resumed_is_read_wherever_it_lies(
    tmp_path: Path,
) -> None:
    made, confined, _ = confine(qwen(), tmp_path / "a", save_strategy="steps")
    made.train()
    (tmp_path / "a" / "checkpoint-5").rename(tmp_path / "moved")
    again, other, at = confine(qwen(), tmp_path / "b", save_strategy="steps")
    again.remove_callback(at)
    again.train(resume_from_checkpoint=str(tmp_path / "moved"))
    assert all(torch.equal(other.bases[n], v) for n, v in confined.bases.items())
    # from before the lock, whose step was stored, not its subspaces
    more, late, _ = confine(qwen(), tmp_path / "c", save_strategy="steps")
    more.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert late.lock_step == LOCK


@pytest.mark.filterwarnings("ignore")
def test_two_callbacks_of_a_kind_remember_apart(tmp_path: Path) -> None:
    """And in no file that engines read as weights: those take every safetensors."""

    def start(folder: str) -> tuple[Any, list[Any]]:
        made = trainer(qwen(), tmp_path / folder, save_steps=4)
        added = [
            GeometryCallback(made, roles=("q",), every=2, lock_at=2),
            ProjectionCallback(made, roles=("q",), lock_at=2, k=2),
            GeometryCallback(made, roles=("down",), every=2, lock_at=4),
            ProjectionCallback(made, roles=("down",), lock_at=3, k=K),
        ]
        for one in added:
            made.add_callback(one)
        return made, added

    made, first = start("a")
    made.train()
    checkpoint = tmp_path / "a" / "checkpoint-4"
    assert [f.name for f in checkpoint.glob("*.safetensors")] == ["model.safetensors"]
    again, second = start("b")
    again.train(resume_from_checkpoint=str(checkpoint))
    for one, other in zip(first, second, strict=True):
        kind = "locked" if isinstance(one, GeometryCallback) else "bases"
        mine, theirs = getattr(one, kind), getattr(other, kind)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], v) for name, v in theirs.items())


def test_other_options_do_not_change_a_lock_that_is_resumed(tmp_path: Path) -> None:
    made, _, _ = confine(qwen(), tmp_path, save_strategy="steps")
    made.train()
    place = str(tmp_path / "checkpoint-5")
    again, confined, at = confine(qwen(), tmp_path, k=K + 1, roles=("q",))
    again.remove_callback(at)
    with pytest.warns(UserWarning, match="of the first start stay: 16 param.*K = 3,"):
        again.train(resume_from_checkpoint=place)
    assert len(confined.bases) == 16
    again, confined, _ = confine(moe(), tmp_path)
    with pytest.raises(ValueError, match=r"holds .* where the model has no such"):
        confined._compare({"lost": torch.eye(3)}, Path(place))


@pytest.mark.filterwarnings("ignore")
def test_the_file_is_there_before_an_upload_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _, _ = confine(qwen(), tmp_path, save_strategy="steps")
    seen = []

    def upload(folder: str) -> None:
        seen.append((Path(folder) / "opd_geometry_projection.state").is_file())

    made.args.push_to_hub = True
    monkeypatch.setattr(made, "_push_from_checkpoint", upload)
    monkeypatch.setattr(made, "init_hf_repo", lambda *_, **__: None)
    monkeypatch.setattr(made, "_finish_current_push", lambda: None)
    made.train()
    assert seen == [True] * STEPS


@pytest.mark.filterwarnings("ignore")
def test_a_trial_has_a_start_and_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = iter((0, 1, 2))
    made = trainer(qwen(), tmp_path, data=lambda: qwen(next(seeds)))
    confined = ProjectionCallback(made, lock_at=LOCK, k=K, form="update")
    made.add_callback(confined)
    name = "model.layers.0.self_attn.q_proj.weight"
    for trial in (1, 2):
        folder = tmp_path / f"run-{trial}"
        monkeypatch.setattr(made, "_get_output_dir", lambda trial, f=folder: str(f))
        made.train()
        assert (folder / "checkpoint-8" / confined.checkpoints.name).is_file()
        lock = Qwen3ForCausalLM.from_pretrained(folder / f"checkpoint-{LOCK}")
        moved = lock.get_parameter(name) - qwen(trial).get_parameter(name)
        exact = top_right_subspace(moved.detach().double(), K)
        assert subspace_similarity(confined.bases[name], exact) == pytest.approx(1)


@pytest.mark.filterwarnings("ignore")
def test_a_random_head_is_stored_for_what_is_resumed(tmp_path: Path) -> None:
    qwen().save_pretrained(tmp_path / "base")

    def classifier(seed: int) -> Any:
        set_seed(seed)
        return Qwen3ForSequenceClassification.from_pretrained(
            tmp_path / "base", num_labels=2, pad_token_id=0
        )

    made, confined, _ = confine(
        classifier(0), tmp_path / "run", data=Data(True), save_strategy="steps"
    )
    made.train()
    again, other, _ = confine(
        classifier(7), tmp_path / "run", data=Data(True), save_strategy="steps"
    )
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert confined.bases.keys() == other.bases.keys()
    for name, v in confined.bases.items():
        assert subspace_similarity(other.bases[name], v) == pytest.approx(1)


def gemma() -> Any:
    set_seed(0)
    text = {**SIZES, "sliding_window": 8, "layer_types": ["full_attention"] * 2}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=31,
        boi_token_index=30,
        eoi_token_index=29,
    )
    return Gemma3ForConditionalGeneration(config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [mixtral, gemma, moe, gpt2])
def test_the_checkpoint_of_the_start_is_read_under_the_names_in_memory(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    model = make()
    model.save_pretrained(tmp_path / "start")
    there = snap(model)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01
    watch = GeometryCallback(
        trainer(model, tmp_path), roles=None, w_before=tmp_path / "start"
    )
    assert len(watch.start.weights) >= 10
    for name, p in origin_model(model, tmp_path / "start").named_parameters():
        assert torch.equal(p, there[name])
    confined = ProjectionCallback(trainer(model, tmp_path), w_before=tmp_path / "start")
    assert len(confined.names) >= 10


def test_a_start_of_another_model_is_refused(tmp_path: Path) -> None:
    moe().save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match="expected the checkpoint that training began"):
        GeometryCallback(trainer(qwen(), tmp_path), w_before=tmp_path / "start")

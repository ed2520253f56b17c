import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import at_scale
import children
import pandas as pd
import pytest
import torch
from children import Child
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from opd_geometry.book import chapters
from opd_geometry.experiments import forecast, profiles, runs
from opd_geometry.training import data, models, rollout, tracking, verifier
from opd_geometry.training.data import DataConfig, TextProblem
from opd_geometry.training.models import load_model, load_tokenizer
from opd_geometry.training.optimizer import OptimizerConfig, adamw
from opd_geometry.training.policy import PolicyConfig, policy_steps
from opd_geometry.training.sft import encode_pairs

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "on_gpu.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a teacher and fifty problems."""
    return at_scale.save_all(tmp_path_factory.mktemp("scale"))


def dataset(place: Path, **columns: Any) -> DataConfig:
    source = str(place / "problems.jsonl")
    named = {"answer": "reward_model.ground_truth", "source": source} | columns
    return DataConfig(data.digest_of(named["source"]), **named)


scaled_down = at_scale.profile_gpu


# --- problems --------------------------------------------------------------------


def test_columns_are_mapped_and_an_eighth_is_held_out(place: Path) -> None:
    config = dataset(place, response="response")
    train, test = (data.problems(config, part) for part in ("train", "test"))
    assert len(train) + len(test) == 50
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    known = {row["prompt"][0]["content"]: row for row in at_scale.problems()}  # type: ignore[index]
    for problem in (*train, *test):
        row = known[problem.prompt]
        assert problem.answer == row["reward_model"]["ground_truth"]  # type: ignore[index]
        assert problem.response == row["response"]
        assert verifier.final_answer(problem.response) == problem.answer


def test_parquet_and_another_place_are_the_same_problems(
    place: Path, tmp_path: Path
) -> None:
    import pandas as pd

    pd.DataFrame(at_scale.problems()).to_parquet(tmp_path / "p.parquet")
    config = dataset(place)
    copied = tmp_path / "copy.jsonl"
    copied.write_bytes((place / "problems.jsonl").read_bytes())
    assert dataset(place, source=str(copied)) == config
    theirs = dataset(place, source=str(tmp_path / "p.parquet"))
    assert theirs != config
    assert data.problems(theirs) == data.problems(config)


@pytest.mark.parametrize(
    ("columns", "rows", "words"),
    [
        ({"prompt": "question"}, None, "has no column question: it has"),
        ({"answer": "gold.value"}, None, "has no column gold.value"),
        ({"answer": "reward_model.value"}, None, "row 1 has no answer in its column"),
        ({}, [{"prompt": "", "reward_model": {"ground_truth": "1"}}], "no prompt"),
        ({}, "no json", "cannot read the dataset"),
        ({}, [], "cannot read the dataset|has 0 rows"),
    ],
)
def test_bad_datasets_are_one_line(
    columns: dict[str, str], rows: Any, words: str, place: Path, tmp_path: Path
) -> None:
    source = place / "problems.jsonl"
    if rows is not None:
        source = tmp_path / "bad.jsonl"
        text = rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows))
        source.write_text(text)
    with pytest.raises(ValueError, match=words) as raised:
        data.problems(dataset(place, source=str(source), **columns))
    assert "\n" not in str(raised.value)


def test_a_dataset_that_is_not_there_is_one_line() -> None:
    with pytest.raises(ValueError, match="no dataset at nowhere: expected a parquet"):
        data.digest_of("nowhere")
    assert data.digest_of("owner/name@v1") == "owner/name@v1"


@pytest.mark.parametrize("thinking", [True, False])
def test_the_chat_template_is_asked_and_its_thinking_mode(
    thinking: bool, place: Path
) -> None:
    tokenizer = load_tokenizer(place / "student")
    problem = TextProblem((("system", "Be brief."), ("user", "Why?")), "7")
    text = data.as_prompt(replace(problem, thinking=thinking), tokenizer)
    opened = "" if thinking else "<think>\n\n</think>\n\n"
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        f"<|im_start|>assistant\n{opened}"
    )
    ids, _ = rollout.encode_prompts([text], tokenizer)
    assert tokenizer.decode(ids[0]) == text  # and nothing in front
    tokenizer.chat_template = None
    assert data.as_prompt(problem, tokenizer) == "Be brief.\n\nWhy?\n\n"


def test_a_long_demonstration_is_cut_without_an_end(place: Path) -> None:
    tokenizer = load_tokenizer(place / "student")
    tokens, learned = encode_pairs([("1+1=", "2" * 50)], tokenizer, longest=12)
    assert tokens.shape == learned.shape == (1, 12)
    assert tokenizer.eos_token_id not in tokens


# --- answers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        ("12", r"So \boxed{12}.", True),
        (r"\frac{1}{2}", r"<think>\boxed{3}</think> \boxed{0.5}", True),
        ("12", "The answer is 12.", True),
        ("12", "Answer: $12$", True),
        (r"3\sqrt{2}", r"\boxed{\sqrt{18}}", True),
        ("12", r"\boxed{13}", False),
        ("12", "12", False),  # says no answer
        ("12", r"\boxed{12", False),  # was cut
        ("12", r"<think> \boxed{12}", False),  # still thinks
        ("12", "", False),
        ("2", r"\boxed{__import__('os').system('touch planted')}", False),
    ],
)
def test_answers_are_compared_as_mathematics(
    answer: str,
    response: str,
    right: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert verifier.is_right(answer, response) is right
    assert not list(tmp_path.iterdir())


def test_a_verifier_that_hangs_is_ended_and_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hanging = "import sys, time; print('ready', flush=True); time.sleep(600)"
    monkeypatch.setattr(verifier, "SECONDS", 0.05)
    started: list[Any] = []
    popen = verifier.subprocess.Popen

    def start(_: object, **options: Any) -> Any:
        started.append(popen([sys.executable, "-c", hanging], **options))
        return started[-1]

    monkeypatch.setattr(verifier.subprocess, "Popen", start)
    process = verifier.Process("none", "math-verify")
    began = time.monotonic()
    assert process.verdict("1", "2") is False
    assert process.verdict("1", "2") is False
    with pytest.raises(ValueError, match=r"no verdict within 0\.05 s, 3 times") as got:
        process.verdict("1", "2")
    assert "\n" not in str(got.value)
    assert time.monotonic() - began < 60
    assert len(started) == 3
    assert all(child.poll() is not None for child in started)


# --- runs ------------------------------------------------------------------------


def test_every_arm_of_profile_gpu_runs_on_stand_ins(place: Path, data: Path) -> None:
    profile = scaled_down(place)
    for arm in ("opd", "rlvr"):
        run = profiles.build(profile, arm, 0)
        Child(data, runs.ensure, run).result()
        assert runs.is_done(run)
        said = {record["metric"] for record in runs.history(run)}
        assert {"reward", "accuracy/held-out"} <= said
        assert tracked(runs.run_directory(run) / "events" / run.name) == said
        end, _ = load_model(runs.checkpoint(run))
        begin, _ = load_model(runs.checkpoint(run, 0))
        moved = [
            not torch.equal(a, b)
            for a, b in zip(end.parameters(), begin.parameters(), strict=True)
        ]
        assert any(moved) is (arm == "opd")  # a random model earns no reward


def tracked(folder: Path) -> set[str]:
    """The names of the curves in TensorBoard's files."""
    events = EventAccumulator(str(folder)).Reload()
    return set(events.Tags()["scalars"])


@pytest.mark.parametrize(
    ("kind", "words"),
    [("excel", "'excel': expected tensorboard, wandb"), ("trackio", "pip install")],
)
def test_a_tracker_that_cannot_be_is_one_line(
    kind: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPD_GEOMETRY_TRACKER", kind)
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match=words), tracking.tracked("a", tmp_path):
        pass


def test_the_papers_profile_starts_with_shards(place: Path, data: Path) -> None:
    """Two processes, each with its shard: the state that they leave is whole."""
    profile = scaled_down(place, ",processes=2").replace("gpu:", "paper:", 1)
    run = profiles.build(profile, "opd", 0)
    assert run.train.sharded
    run = replace(run, start=runs.stored(place / "student"))
    Child(data, runs.ensure, run, profiles.settings_of(profile).processes).result()
    end, _ = load_model(runs.checkpoint(run))
    begin, _ = load_model(runs.checkpoint(run, 0))
    pairs = zip(end.parameters(), begin.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_layers_computed_again_give_the_same_step(place: Path) -> None:
    student, tokenizer = load_model(place / "student")
    teacher, _ = load_model(place / "teacher")
    config = PolicyConfig(
        OptimizerConfig(1e-3, warmup_steps=0),
        steps=1,
        prompts_per_step=2,
        group_size=2,
        max_new_tokens=8,
        dataset=dataset(place),
    )
    found = []
    for again in (False, True):
        model, _ = load_model(place / "student")
        changed = replace(config, gradient_checkpointing=again)
        optimizer = adamw(model, config.optimizer)
        found += policy_steps(changed, model, teacher, tokenizer, optimizer, seed=0)
        assert not any(module.training for module in model.modules())
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    seen: list[int] = []
    student.activation_checkpointing_enable()
    layer = student.base_model.layers[0]
    layer.self_attn.register_forward_hook(lambda *_: seen.append(1))
    with models.recomputing(student, True):
        loss = student(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.sum()
        loss.backward()
    assert len(seen) == 2


def test_vocabularies_that_differ_are_named(place: Path, tmp_path: Path) -> None:
    other = at_scale.byte_tokenizer(more=20)
    with pytest.raises(
        ValueError, match=r"differ \(400 and 420 tokens\): token '"
    ) as e:
        models.check_same_vocabulary(load_tokenizer(place / "student"), other)
    first = str(e.value).split("token ")[1].split(" is ")
    assert first[1].startswith("None for one and 400 for the other")


def test_out_of_gpu_memory_names_the_setting(
    place: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runs, "_train", full)
    run = profiles.build(scaled_down(place), "sft", 0)
    with pytest.raises(ValueError, match="micro_batch 2: lower it"):
        runs.ensure(run)


# --- profiles --------------------------------------------------------------------


def test_every_value_of_a_profile_can_be_given(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = profiles.settings_of(scaled_down(place, ",policy.checkpoints=1+2"))
    assert settings.policy.checkpoints == (1, 2)
    assert settings.sft.dataset is not None
    assert settings.sft.dataset.response == "response"
    assert settings.policy.gradient_checkpointing is True
    assert settings.student == runs.stored(place / "student")
    assert settings.rank == 16
    monkeypatch.chdir(place)
    assert profiles.settings_of("gpu", "student").student == settings.student
    for given, words in {
        "gpu:policy.step=3": "no setting 'step'; expected",
        "gpu:policy.steps=x": "steps 'x' is no int",
        "gpu:policy.steps": "sets nothing; expected FIELD=VALUE",
        "gpu:rank.x=3": "rank has no setting 'x'",
        "cpu:rank=3": "unknown profile",
        "gpu:sft.dataset=nowhere": "no dataset at nowhere",
    }.items():
        with pytest.raises(ValueError, match=words):
            profiles.settings_of(given)


def test_a_chapter_takes_a_profile_with_other_values(place: Path) -> None:
    given = {"profile": scaled_down(place), "seeds": "0", "source": "local", "jobs": 1}
    assert chapters.check_parameters(given).profile == given["profile"]
    for profile in ("gpu:policy.step=3", "gpus"):
        with pytest.raises(chapters.ParameterError, match=r"no setting|gpus"):
            chapters.check_parameters({**given, "profile": profile})


def test_the_papers_profile_has_its_settings() -> None:
    run = profiles.build("paper", "opd", 0)
    assert run.checkpoint_steps() == [63, 127, 191, 255, 299]
    assert run.train.prompts_per_step * run.train.group_size == 64  # type: ignore[union-attr]
    longer = profiles.build("paper", "rlvr-paper", 0).train
    assert longer.prompts_per_step * longer.group_size == 512  # type: ignore[union-attr]


# --- what it takes ---------------------------------------------------------------


def test_forecast_counts_what_a_step_computes_and_holds(place: Path) -> None:
    """Arithmetic against torch's counter, memory against the tensors themselves."""
    run = profiles.build(scaled_down(place), "opd", 0)
    shape = forecast.shape_of(str(place / "student"))
    assert shape is not None
    model, _ = load_model(place / "student")
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    tokens = torch.ones(3, 50, dtype=torch.int64)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.set_attn_implementation("eager")
        cache = model(input_ids=tokens, use_cache=True).past_key_values
    expected = shape.forward_flops(150, 50, 150)
    assert counted.get_total_flops() == pytest.approx(expected, rel=0.02)
    held = sum(
        x.numel() * 4 for layer in cache.layers for x in (layer.keys, layer.values)
    )
    assert held == shape.cache_bytes(150, 4)

    optimizer = adamw(model, run.train.optimizer)
    model(input_ids=tokens).logits.sum().backward()
    optimizer.step()
    parts = [*model.parameters(), *(p.grad for p in model.parameters())]
    parts += [t for s in optimizer.state.values() for t in s.values() if t.ndim]
    bytes_held = sum(t.numel() * t.element_size() for t in parts if t is not None)
    plain = replace(run.train, mixed_precision="no")
    assert forecast._held(shape, None, plain) == bytes_held


def test_forecast_of_the_gradient_is_its_peak(tmp_path: Path) -> None:
    """Within a factor of two of what a process's memory grows by, and on top."""
    took, said = Child(tmp_path, children.peak_of_a_step, tmp_path).result()
    assert 0.5 < took / said < 1.2


def test_plan_says_what_the_profiles_take(data: Path) -> None:
    call = ("fork", "plan", "--profile", "gpu", "--arms", "opd,rlvr")
    code, out, err = Child(data, children.command, *call).result()
    assert (code, err) == (0, "")
    gpu = profiles.build("gpu", "opd", 0)
    found = forecast.forecast(gpu)
    assert found is not None
    assert f"{found.memory / 1e9:.0f} GB" in out
    assert "1 x H100 80 GB a run" in out
    assert found.memory < 80e9
    assert 3 * 3600 < found.seconds < 24 * 3600
    paper = profiles.build("paper", "opd", 0)
    alone, shared = (forecast.forecast(paper, gpus) for gpus in (1, 8))
    assert alone is not None
    assert shared is not None
    assert alone.memory > 80e9 > shared.memory


# --- what a GPU is asked ---------------------------------------------------------


@pytest.mark.parametrize("minutes", [60.0, 0.0])
def test_the_script_for_a_gpu_runs_and_names_what_it_leaves_out(
    minutes: float, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    Child(data, children.on_gpu, SCRIPT, out, minutes).result()
    table = pd.read_csv(out).set_index("part")
    assert list(table.index.unique()) == [
        *("diagnostics", "step opd", "step rlvr"),
        "width 32",
    ]
    if not minutes:
        assert table["reason"].str.startswith("not run: 0.0 of 0 minutes").all()
        return
    assert table["reason"].isna().all()
    metrics = table.loc["diagnostics"].set_index("quantity").drop("seconds")
    assert metrics["value"].to_numpy() == pytest.approx(
        metrics["expected"].to_numpy(), rel=1e-6, abs=1e-9
    )
    told = set(table.loc["width 32", "quantity"])
    assert {name.split()[0] for name in told} == {"opd"}
    rewards = table.loc["step rlvr"].set_index("quantity")["value"]
    assert rewards["learned share"] > 0


# --- chapters --------------------------------------------------------------------


@pytest.mark.parametrize("notebook", at_scale.NOTEBOOKS, ids=lambda path: path.stem)
def test_every_chapter_takes_the_stand_ins(notebook: Path, place: Path) -> None:
    given = at_scale.parameters_of(notebook, place)
    if "profile" in given:
        assert chapters.check_parameters(given).profile == given["profile"]
    elif "model" in given:
        assert chapters.check_model(given).model == given["model"]
    else:
        assert chapters.check_pair(given).places == (given["before"], given["after"])

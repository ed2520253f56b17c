import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from opd_geometry.experiments import profiles
from opd_geometry.experiments.profiles import (
    ARMS,
    READER_ARMS,
    build,
    parse_arms,
    parse_seeds,
    settings_of,
)
from opd_geometry.experiments.runs import Run, Stored
from opd_geometry.training.policy import PolicyConfig

ROOT = Path(__file__).resolve().parents[1]
POLICY_ARMS = [arm for arm in ARMS if not arm.startswith("sft") and "proj" not in arm]


@pytest.fixture
def checkpoints(data: Path) -> Path:
    """What stands for the committed base and teacher."""
    for name in ("laptop-base", "laptop-teacher"):
        folder = data / "checkpoints" / name
        folder.mkdir(parents=True)
        save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    return data / "checkpoints"


def differences(one: Any, other: Any) -> dict[str, Any]:
    ours, theirs = asdict(one), asdict(other)
    return {name: ours[name] for name in ours if ours[name] != theirs[name]}


@pytest.mark.parametrize("profile", list(profiles.PROFILES))
def test_every_arm_and_seed_is_a_run_of_its_own(
    profile: str, checkpoints: Path
) -> None:
    runs = [build(profile, arm, seed) for arm in ARMS for seed in (0, 1)]
    assert len({run.key() for run in runs}) == 2 * len(ARMS)
    assert [run.arm for run in runs[::2]] == list(ARMS)
    assert [run.seed for run in runs[:2]] == [0, 1]


def test_policy_arms_differ_from_opd_in_one_thing(data: Path) -> None:
    opd = build("smoke", "opd", 0)
    changed = {arm: build("smoke", arm, 0) for arm in POLICY_ARMS if arm != "opd"}
    told = {arm: differences(run.train, opd.train) for arm, run in changed.items()}
    assert told == {
        "rlvr": {"alpha": 0.0},
        "tokens-top-50": {"token_selection": "top-gap", "keep_frac": 0.5},
        "tokens-top-25": {"token_selection": "top-gap", "keep_frac": 0.25},
        "tokens-random-50": {"token_selection": "random", "keep_frac": 0.5},
        "tokens-random-25": {"token_selection": "random", "keep_frac": 0.25},
        "off-policy": {"rollouts": "teacher", "clip_low": 1.0, "clip_high": 1.0},
        "mix-0.75": {"alpha": 0.75},
        "mix-0.50": {"alpha": 0.5},
        "mix-0.25": {"alpha": 0.25},
        "mix-0.05": {"alpha": 0.05},
        "mix-0.01": {"alpha": 0.01},
    }
    for arm, run in changed.items():
        assert run.start == opd.start == build("smoke", "sft", 0)
        assert run.teacher == (None if arm == "rlvr" else opd.teacher)


def test_projected_arms_are_their_branch_and_a_projection(data: Path) -> None:
    for arm in ARMS:
        if "projected" not in arm:
            continue
        run = build("smoke", arm, 3)
        free = build("smoke", arm.split("-projected")[0], 3)
        assert run.branch == free
        assert replace(run, arm=free.arm, projection=None, branch=None) == free
        assert run.projection is not None
        factor = 2 if "wide" in arm else 1
        assert run.projection.rank == factor * profiles.PROFILES["smoke"].rank
        assert run.projection.form == ("update" if "update" in arm else "gradient")
        assert run.projection.subspace == ("random" if "random" in arm else "own")


def test_matched_sft_has_the_budget_of_opd(data: Path) -> None:
    opd, matched = build("smoke", "opd", 0), build("smoke", "sft-matched", 0)
    assert isinstance(opd.train, PolicyConfig)
    assert matched.start == opd.start
    assert matched.train.optimizer == opd.train.optimizer
    assert matched.train.steps == opd.train.steps
    assert matched.train.batch_sequences == (
        opd.train.prompts_per_step * opd.train.group_size
    )
    assert matched.train.benchmarks == opd.train.benchmarks


def test_seed_reaches_the_anchor_and_not_the_teacher(data: Path) -> None:
    first, second = build("smoke", "opd", 0), build("smoke", "opd", 1)
    assert isinstance(second.start, Run)
    assert (second.seed, second.start.seed) == (1, 1)
    assert first.teacher == second.teacher
    assert first.start != second.start
    assert isinstance(first.start, Run)
    assert first.start.start == second.start.start


def test_base_and_teacher_are_committed_or_trained(checkpoints: Path) -> None:
    committed = build("laptop", "opd", 0)
    assert isinstance(committed.teacher, Stored)
    assert committed.teacher.source == "checkpoints/laptop-teacher"
    scratch = build("laptop", "opd", 0, from_scratch=True)
    assert scratch.teacher == build("laptop", "teacher", 0)
    assert scratch.key() != committed.key()
    assert isinstance(scratch.start, Run)
    assert scratch.start.start == build("laptop", "base", 0)
    sft = build("laptop", "sft-projected", 0, from_scratch=True)
    assert sft.start == build("laptop", "base", 0)
    for stage in profiles.STAGES:
        assert build("laptop", stage, 0).arm == stage
        assert build("laptop", stage, 5) == build("laptop", stage, 0, True)


def test_reader_trains_an_arm_of_each_kind() -> None:
    assert set(READER_ARMS) < set(ARMS)
    needed = {"sft", "opd", "rlvr", "opd-projected", "sft-projected"}
    controls = {"tokens-top-25", "off-policy", "mix-0.05"}
    assert set(READER_ARMS) == needed | controls


def test_missing_checkpoint_is_named(data: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint at checkpoints/laptop-base"):
        build("laptop", "sft", 0)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: build("large", "opd", 0), "unknown profile 'large'; expected smoke"),
        (lambda: build("smoke", "dpo", 0), "unknown arm 'dpo'; expected sft"),
        (lambda: parse_arms("opd,dpo", "smoke"), "unknown arm 'dpo'; expected sft"),
        (lambda: parse_arms("", "smoke"), "unknown arm ''"),
        (lambda: parse_arms("opd,all", "smoke"), "unknown arm 'all'"),
    ],
)
def test_unknown_names_list_the_known(
    call: Callable[[], object], said: str, data: Path
) -> None:
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("3", [3]),
        (3, [3]),
        ("0,2", [0, 2]),
        ("0-4", [0, 1, 2, 3, 4]),
        (" 2 , 0-1 ,1", [0, 1, 2]),
        ("7-7", [7]),
    ],
)
def test_seeds(text: str | int, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


NO_SEEDS = ["a", "-1", "1.0", "1-", "-", "0-1-2", "0..3", "3-1", "0-99999999999"]
NO_SEEDS += ["²", "٣", "0-99999999999999999999", "9" * 5000]


@pytest.mark.parametrize("text", ["", "0,,1", "0,3-1", *NO_SEEDS, -1, 1.0, True, None])
def test_bad_seeds(text: Any) -> None:
    with pytest.raises(ValueError, match=r"^seeds .*expected") as error:
        parse_seeds(text)
    assert repr(text) in str(error.value)


def test_arms() -> None:
    assert parse_arms("all", "smoke") == list(ARMS)
    assert parse_arms("all", "published") == list(profiles.PUBLISHED_ARMS)
    assert parse_arms("reader", "laptop") == list(READER_ARMS)
    assert parse_arms("rlvr, opd,rlvr", "smoke") == ["rlvr", "opd"]
    assert parse_arms("base,teacher", "smoke") == list(profiles.STAGES)
    with pytest.raises(ValueError, match="unknown profile 'large'"):
        parse_arms("all", "large")


# --- the published profile -------------------------------------------------------


def published(arm: str, seed: int = 0) -> Any:
    return build("published", arm, seed, from_scratch=True)


def test_published_runs_are_the_laptops_and_more() -> None:
    for seed in range(3):
        for arm in ARMS:
            theirs = build("laptop", arm, seed, from_scratch=True)
            assert published(arm, seed) == theirs
    names = profiles.PUBLISHED_ARMS
    keys = {published(arm, seed).key() for arm in names for seed in range(5)}
    assert len(keys) == 5 * len(names)


@pytest.mark.parametrize(("seed", "base"), [(0, 0), (2, 0), (3, 3), (4, 4)])
def test_later_seeds_have_a_base_of_their_own(seed: int, base: int) -> None:
    for arm in ("opd", "rlvr-paper", "opd-teacher-moe", "sft-projected-donor"):
        run = published(arm, seed)
        while isinstance(run.start, Run):
            run = run.start
        assert (run.arm, run.seed) == ("base-early", base)
    assert published("base", seed).seed == base
    assert build("laptop", "base", seed, from_scratch=True).seed == 0


def test_rlvr_at_the_papers_ratio() -> None:
    opd, rlvr = published("opd").train, published("rlvr-paper").train
    assert rlvr.prompts_per_step == 8 * opd.prompts_per_step
    assert rlvr.steps / opd.steps == 3.4
    assert (rlvr.alpha, rlvr.optimizer) == (0.0, opd.optimizer)


def test_cross_entropy_is_on_what_the_teacher_writes() -> None:
    train = published("ce-teacher").train
    assert (train.rollouts, train.credit) == ("teacher", "likelihood")
    assert published("ce-teacher").teacher == published("opd").teacher


@pytest.mark.parametrize("arm", ["sft", "opd", "rlvr"])
def test_learning_rates(arm: str) -> None:
    rates = [
        published(name).train.optimizer.learning_rate
        for name in (f"{arm}-lr-x0.3", arm, f"{arm}-lr-x3")
    ]
    assert rates == pytest.approx([0.3 * rates[1], rates[1], 3 * rates[1]])
    assert published(f"{arm}-lr-x3").start == published(arm).start


@pytest.mark.parametrize(("name", "width"), [("x1.5", 192), ("x2", 256)])
def test_widths(name: str, width: int) -> None:
    opd, rlvr, sft = (published(f"{a}-width-{name}") for a in ("opd", "rlvr", "sft"))
    assert opd.start == rlvr.start == sft
    assert opd.train == published("opd").train
    assert opd.teacher == published("opd").teacher
    assert sft.start.start.start.width == width


def test_teachers() -> None:
    shapes = [
        published(f"opd-teacher-{name}").teacher.start.start
        for name in ("x1", "x2", "moe")
    ]
    assert [(shape.width, shape.experts) for shape in shapes] == [
        (128, 0),
        (256, 0),
        (192, 8),
    ]


def test_donors_subspace_is_anothers() -> None:
    for arm, donor in (("opd", "sft-matched"), ("sft", "opd"), ("sft-matched", "opd")):
        run = published(f"{arm}-projected-donor", 1)
        assert run.donor == published(donor, 1)
        assert run.branch == published(arm, 1)
        assert run.donor in run.needs
    ranks = [
        published(f"opd-projected{suffix}").projection.rank
        for suffix in ("-half", "", "-wide", "-wider", "-random-wider")
    ]
    assert ranks == [1, 2, 4, 8, 8]


def test_sft_that_learns_sees_what_the_teacher_saw() -> None:
    for profile in ("smoke", "published"):
        matched = build(profile, "sft-matched", 2, from_scratch=True)
        learns = build(profile, "sft-learns", 2, from_scratch=True)
        teacher = build(profile, "teacher", 2, from_scratch=True)
        assert differences(learns.train, matched.train) == {
            "qualities": teacher.train.qualities
        }
        assert learns.start == matched.start


def test_noisy_and_unclipped_arms_change_one_thing() -> None:
    rlvr = published("rlvr")
    for name, share in (("flip-30", 0.3), ("flip-45", 0.45), ("coin", 0.5)):
        noisy = published(f"rlvr-{name}")
        assert differences(noisy.train, rlvr.train) == {"reward_flip": share}
        assert (noisy.start, noisy.teacher) == (rlvr.start, None)
    for nats in (3, 10):
        noisy, opd = published(f"opd-noise-{nats}"), published("opd")
        assert differences(noisy.train, opd.train) == {"gap_noise": float(nats)}
        assert (noisy.start, noisy.teacher) == (opd.start, opd.teacher)
    for arm in ("sft", "sft-matched", "opd", "rlvr"):
        clipped, free = published(arm), published(f"{arm}-unclipped")
        changed = replace(clipped.train.optimizer, max_grad_norm=math.inf)
        assert free == replace(
            clipped, arm=free.arm, train=replace(clipped.train, optimizer=changed)
        )
    plain = published("off-policy")
    wide, tight = (published(f"off-policy-ratio{end}") for end in ("", "-clip"))
    assert differences(wide.train, plain.train) == {"ratio_to": "author"}
    assert (tight.train.clip_low, tight.train.clip_high) == (0.2, 0.28)
    assert tight.train.ratio_to == "author"
    assert wide.teacher == tight.teacher == plain.teacher


def test_new_settings_rename_no_run_that_is_committed() -> None:
    listed = pd.read_csv(ROOT / "data" / "measurements" / "runs.csv")
    assert len(listed) >= 290
    for row in listed.itertuples():
        names = {
            build(profile, row.arm, row.seed).key()
            for profile in ("published", "pretrained")
            if row.arm in settings_of(profile).arms
        }
        assert row.run in names

"""Presets: which arms there are, and how large each profile trains them.

A profile fixes sizes and budgets; an arm is one difference from its neighbours; a seed
varies all sampling, the data order and, through the SFT anchor, where the policy arms
start. ``build(profile, arm, seed)`` turns the three into a run.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from opd_geometry.models import ModelConfig
from opd_geometry.optimizer import OptimizerConfig
from opd_geometry.policy import PolicyConfig
from opd_geometry.runs import ProjectionConfig, Run, Stored, stored
from opd_geometry.sft import SFTConfig

# Demonstrations of mixed quality give an anchor whose skill exceeds its sampled
# accuracy, as a language model's does; a teacher that has seen some of everything stays
# soft enough to put mass on its student's tokens.
STUDENT_QUALITIES = (("careful", 0.45), ("guess", 0.25), ("sloppy", 0.30))
TEACHER_QUALITIES = (("careful", 0.88), ("guess", 0.04), ("sloppy", 0.08))


@dataclass(frozen=True)
class Profile:
    """Sizes and budgets of every stage.

    Attributes:
        student, teacher: shapes.
        base, base_annealing: pretraining of the student; the second half draws more
            running totals. teacher_base: pretraining of the teacher.
        sft: the SFT arm, whose final checkpoint is the anchor.
        teacher_sft: what turns the teacher's base into the teacher.
        policy: OPD's settings; every policy arm differs in one or two fields.
        rank: K of Sim_K and of projected training, just under the stable rank early on.
    """

    student: ModelConfig
    teacher: ModelConfig
    base: SFTConfig
    base_annealing: SFTConfig
    teacher_base: SFTConfig
    sft: SFTConfig
    teacher_sft: SFTConfig
    policy: PolicyConfig
    rank: int


def _pretraining(steps: int, rate: float) -> SFTConfig:
    return SFTConfig(
        OptimizerConfig(rate, "cosine", 100, 0.05, (0.9, 0.95)),
        steps=steps,
        batch_sequences=128,
        micro_batch=32,
        data="pretraining",
    )


def _sft(
    steps: int, rate: float, qualities: tuple[tuple[str, float], ...]
) -> SFTConfig:
    return SFTConfig(
        OptimizerConfig(rate, "cosine", steps // 10, 0.1, (0.9, 0.95)),
        steps=steps,
        batch_sequences=96,
        micro_batch=32,
        qualities=qualities,
    )


_LAPTOP = Profile(
    student=ModelConfig(width=128, layers=4),
    teacher=ModelConfig(width=192, layers=4),
    base=_pretraining(3000, 1.5e-3),
    base_annealing=replace(_pretraining(1200, 1e-3), data="annealing"),
    teacher_base=_pretraining(2000, 1e-3),
    sft=replace(
        _sft(400, 5e-4, STUDENT_QUALITIES), benchmarks=("chain", "gcd", "chain", "base")
    ),
    teacher_sft=_sft(600, 3e-4, TEACHER_QUALITIES),
    policy=PolicyConfig(OptimizerConfig(1e-5, warmup_steps=10), steps=150),
    rank=2,
)
# Seconds instead of minutes: for tests, never for conclusions.
_SMOKE = Profile(
    student=ModelConfig(width=64, layers=2),
    teacher=ModelConfig(width=64, layers=2),
    base=_pretraining(20, 1.5e-3),
    base_annealing=replace(_pretraining(5, 1e-3), data="annealing"),
    teacher_base=_pretraining(20, 1e-3),
    sft=_sft(20, 1e-3, STUDENT_QUALITIES),
    teacher_sft=_sft(20, 1e-3, TEACHER_QUALITIES),
    policy=PolicyConfig(
        OptimizerConfig(1e-4, warmup_steps=2),
        steps=10,
        prompts_per_step=4,
        group_size=4,
        max_new_tokens=16,
    ),
    rank=2,
)
PROFILES = {"smoke": _SMOKE, "laptop": _LAPTOP}
# Profiles whose base and teacher are stored in data/checkpoints.
COMMITTED = ("laptop",)

# Arms of the policy loop as changes of OPD's settings (the claims' controls).
_POLICY_ARMS: dict[str, dict[str, object]] = {
    "opd": {},
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
_PROJECTED_ARMS: dict[str, tuple[str, str, str, int]] = {
    # arm: (the arm it branches from, subspace, form, K in units of the profile's rank)
    "opd-projected": ("opd", "own", "gradient", 1),
    "opd-projected-random": ("opd", "random", "gradient", 1),
    "opd-projected-update": ("opd", "own", "update", 1),
    "sft-projected": ("sft", "own", "gradient", 1),
    "sft-projected-random": ("sft", "random", "gradient", 1),
    # SFT's stable rank at the branch is about 4: the paper's rule applied to SFT itself
    "sft-projected-wide": ("sft", "own", "gradient", 2),
    "sft-matched-projected": ("sft-matched", "own", "gradient", 1),
}
ARMS = ("sft", "sft-matched", *_POLICY_ARMS, *_PROJECTED_ARMS)
STAGES = ("base", "teacher")  # shared by all seeds; stored in data/checkpoints
# What a reader's own run trains: each kind of arm and one control of each kind.
READER_ARMS = (
    "sft",
    "opd",
    "rlvr",
    "opd-projected",
    "sft-projected",
    "tokens-top-25",
    "off-policy",
    "mix-0.05",
)


def build(profile: str, arm: str, seed: int, from_scratch: bool = False) -> Run:
    """The run of an arm.

    Args:
        profile: a key of ``PROFILES``.
        arm: one of ``ARMS``, or ``base`` or ``teacher``.
        seed: 0 or larger.
        from_scratch: train base and teacher instead of taking the committed ones.

    Raises:
        ValueError: unknown profile or arm; the message lists the known ones.
    """
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; expected {_or(PROFILES)}")
    settings = PROFILES[profile]
    scratch = from_scratch or profile not in COMMITTED
    if arm == "base":
        early = Run("base-early", 0, settings.base, settings.student)
        return Run("base", 0, settings.base_annealing, early)
    if arm == "teacher":
        grown = Run("teacher-base", 0, settings.teacher_base, settings.teacher)
        return Run("teacher", 0, settings.teacher_sft, grown)
    if arm == "sft":
        return Run("sft", seed, settings.sft, _shared(profile, "base", scratch))
    if arm == "sft-matched":
        matched = replace(
            settings.sft,
            optimizer=settings.policy.optimizer,
            steps=settings.policy.steps,
            batch_sequences=settings.policy.prompts_per_step
            * settings.policy.group_size,
            benchmarks=settings.policy.benchmarks,
        )
        return Run(arm, seed, matched, build(profile, "sft", seed, scratch))
    if arm in _POLICY_ARMS:
        train = replace(settings.policy, **_POLICY_ARMS[arm])  # type: ignore[arg-type]
        teacher = _shared(profile, "teacher", scratch) if train.needs_teacher else None
        anchor = build(profile, "sft", seed, scratch)
        return Run(arm, seed, train, anchor, teacher)
    if arm in _PROJECTED_ARMS:
        free_arm, subspace, form, factor = _PROJECTED_ARMS[arm]
        free = build(profile, free_arm, seed, scratch)
        projection = ProjectionConfig(factor * settings.rank, subspace, form)
        return replace(free, arm=arm, projection=projection, branch=free)
    raise ValueError(f"unknown arm {arm!r}; expected {_or(ARMS)}")


def _shared(profile: str, stage: str, from_scratch: bool) -> Run | Stored:
    """The base or the teacher that all seeds share: committed, or a run."""
    if from_scratch:
        return build(profile, stage, 0, from_scratch)
    return stored(f"checkpoints/{profile}-{stage}")


def _or(names: Iterable[str]) -> str:
    return ", ".join(names)


MOST_SEEDS = 1000  # a typing error should not fill the disk


def parse_seeds(text: str | int) -> list[int]:
    """Read seeds as ``3``, ``0,2`` or ``0-4``.

    Raises:
        ValueError: anything else, naming it.
    """
    seeds: list[int] = []
    for part in str(text).split(","):
        first, dash, last = part.strip().partition("-")
        if not all(map(_is_number, (first, last) if dash else (first,))):
            raise ValueError(f"seeds {text!r}: expected integers such as 3, 0,2 or 0-4")
        low, high = int(first), int(last if dash else first)
        if not 0 <= high - low < MOST_SEEDS:
            raise ValueError(
                f"seeds {text!r}: {part.strip()} is a range of {high - low + 1} seeds; "
                f"expected the smaller end first, and at most {MOST_SEEDS}"
            )
        seeds += range(low, high + 1)
    return sorted(set(seeds))


def _is_number(text: str) -> bool:
    """Whether a text is a seed: ASCII digits, of a length that NumPy takes."""
    return text.isascii() and text.isdecimal() and len(text) <= 18


def parse_arms(text: str) -> list[str]:
    """Read arms as a comma-separated list, ``reader`` or ``all``.

    ``base`` and ``teacher``, the stages that all seeds share, can be named as well.

    Raises:
        ValueError: unknown arm, listing the known ones.
    """
    if text == "all":
        return list(ARMS)
    if text == "reader":
        return list(READER_ARMS)
    arms = [part.strip() for part in text.split(",")]
    for arm in arms:
        if arm not in (*ARMS, *STAGES):
            known = _or((*ARMS, *STAGES))
            raise ValueError(f"unknown arm {arm!r}; expected {known}, reader or all")
    return list(dict.fromkeys(arms))

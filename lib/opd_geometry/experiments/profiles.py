"""Presets: which arms there are, and how large each profile trains them.

A profile fixes sizes and budgets; an arm is one difference from its neighbours; a seed
varies all sampling, the data order and, through the SFT anchor, where the policy arms
start. ``build(profile, arm, seed)`` turns the three into a run.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from opd_geometry.experiments.descriptions import (
    ProjectionConfig,
    Run,
    Stored,
    stored,
    students_directory,
)
from opd_geometry.training.data import DataConfig, digest_of
from opd_geometry.training.settings import (
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    SFTConfig,
    Student,
)

# Demonstrations of mixed quality give an anchor whose skill exceeds its sampled
# accuracy, as a language model's does; a teacher that has seen some of everything stays
# soft enough to put mass on its student's tokens.
STUDENT_QUALITIES = (("careful", 0.45), ("guess", 0.25), ("sloppy", 0.30))
TEACHER_QUALITIES = (("careful", 0.88), ("guess", 0.04), ("sloppy", 0.08))


@dataclass(frozen=True)
class Profile:
    """Sizes and budgets of every stage.

    Attributes:
        student, teacher: shapes, a pretrained model that both begin with, or whole
            models as they are stored, of which the teacher is trained no further.
        sft: the SFT arm, whose final checkpoint is the anchor.
        teacher_sft: what turns the teacher's base into the teacher.
        policy: OPD's settings; every policy arm differs in one or two fields.
        rank: K of Sim_K and of projected training, just under the stable rank early on.
        arms: what ``all`` stands for.
        base, base_annealing: pretraining of the student; the second half draws more
            running totals. teacher_base: pretraining of the teacher. None for models
            that are pretrained already.
        shelf: name under which base and teacher are stored in data/checkpoints, if so.
        own_base_from: the first seed with a base of its own; None: all share one.
        processes: that train one run together, a GPU each where there are any.
    """

    student: ModelConfig | Student | Stored
    teacher: ModelConfig | Student | Stored
    sft: SFTConfig
    teacher_sft: SFTConfig
    policy: PolicyConfig
    rank: int
    arms: tuple[str, ...]
    base: SFTConfig | None = None
    base_annealing: SFTConfig | None = None
    teacher_base: SFTConfig | None = None
    shelf: str | None = None
    own_base_from: int | None = None
    processes: int = 1


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


# As far as AdamW after a fifth of training: rate <- rate |dW| / |dW_own|, twice.
SGD_RATE, MUON_RATE = 120.0, 3.9
# Arms of the policy loop as changes of OPD's settings (the claims' controls).
_LAPTOP_POLICY_ARMS: dict[str, dict[str, object]] = {
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
_POLICY_ARMS = {
    **_LAPTOP_POLICY_ARMS,
    # cross-entropy on what the teacher writes, at OPD's budget
    "ce-teacher": {"rollouts": "teacher", "credit": "likelihood"},
    "opd-task-gcd": {"benchmarks": ("gcd",)},
    # a share of the rewards is wrong: the same objective with less of a signal
    "rlvr-flip-30": {"alpha": 0.0, "reward_flip": 0.3},
    "rlvr-flip-45": {"alpha": 0.0, "reward_flip": 0.45},
    "rlvr-coin": {"alpha": 0.0, "reward_flip": 0.5},
    # the teacher's word with noise of so many nats a response: the converse
    "opd-noise-3": {"gap_noise": 3.0},
    "opd-noise-10": {"gap_noise": 10.0},
    # importance ratios against the teacher, who wrote; as wide as the paper's and not
    "off-policy-ratio": {
        "rollouts": "teacher",
        "ratio_to": "author",
        "clip_low": 1.0,
        "clip_high": 1.0,
    },
    "off-policy-ratio-clip": {"rollouts": "teacher", "ratio_to": "author"},
    # the KL over the whole vocabulary instead of the sampled token's gap
    "opd-full": {"estimator": "full"},
    "opd-full-forward": {"estimator": "full-forward"},
}
# Arms that are another one with its optimizer changed: which, its rate in units of that
# one's, and the other changes.
_Tuned = dict[str, tuple[str, float, dict[str, Any]]]
# SGD's decay would be as large as its rate is; AdamW's is next to nothing.
_OPTIMIZER_ARMS: _Tuned = {
    "opd-sgd": ("opd", SGD_RATE, {"kind": "sgd", "weight_decay": 0.0}),
    "opd-muon": ("opd", MUON_RATE, {"kind": "muon"}),
}
# OPD whose teacher is the anchor itself, its logits divided by a temperature: at one
# there is no gap when the run begins.
_SELF_ARMS = {"opd-self-0.5": 0.5, "opd-self": 1.0}
# Arms whose gradients are never scaled down.
_UNCLIPPED_ARMS: _Tuned = {
    f"{arm}-unclipped": (arm, 1.0, {"max_grad_norm": math.inf})
    for arm in ("sft", "sft-matched", "opd", "rlvr")
}


@dataclass(frozen=True)
class _Projected:
    """A projected arm: what it branches from, and where it is confined.

    Attributes:
        free: the unconstrained arm.
        subspace, form: see ``runs.ProjectionConfig``.
        factor: K in units of the profile's rank.
        donor: the arm whose early subspace is taken instead of its own.
    """

    free: str
    subspace: str = "own"
    form: str = "gradient"
    factor: float = 1
    donor: str | None = None


_LAPTOP_PROJECTED_ARMS = {
    "opd-projected": _Projected("opd"),
    "opd-projected-random": _Projected("opd", "random"),
    "opd-projected-update": _Projected("opd", form="update"),
    "sft-projected": _Projected("sft"),
    "sft-projected-random": _Projected("sft", "random"),
    # the paper's rule for K, just under the stable rank at the branch, for SFT itself
    "sft-projected-wide": _Projected("sft", factor=2),
    "sft-matched-projected": _Projected("sft-matched"),
}
_PROJECTED_ARMS = {
    **_LAPTOP_PROJECTED_ARMS,
    "opd-projected-pretrained": _Projected("opd", "pretrained"),
    "opd-projected-donor": _Projected("opd", "donor", donor="sft-matched"),
    "opd-projected-half": _Projected("opd", factor=0.5),
    "opd-projected-wide": _Projected("opd", factor=2),
    "opd-projected-wider": _Projected("opd", factor=4),
    "opd-projected-random-wider": _Projected("opd", "random", factor=4),
    "sft-projected-pretrained": _Projected("sft", "pretrained"),
    "sft-projected-donor": _Projected("sft", "donor", donor="opd"),
    "sft-projected-update": _Projected("sft", form="update"),
    "sft-projected-half": _Projected("sft", factor=0.5),
    "sft-projected-wider": _Projected("sft", factor=4),
    "sft-matched-projected-random": _Projected("sft-matched", "random"),
    "sft-matched-projected-pretrained": _Projected("sft-matched", "pretrained"),
    "sft-matched-projected-donor": _Projected("sft-matched", "donor", donor="opd"),
    "sft-matched-projected-update": _Projected("sft-matched", form="update"),
    "sft-matched-projected-half": _Projected("sft-matched", factor=0.5),
    "sft-matched-projected-wide": _Projected("sft-matched", factor=2),
    "sft-matched-projected-wider": _Projected("sft-matched", factor=4),
    "opd-projected-update-random": _Projected("opd", "random", form="update"),
    "rlvr-projected": _Projected("rlvr"),
    "rlvr-projected-update": _Projected("rlvr", form="update"),
    # OPD and RLVR, each in the other's early subspace
    "opd-projected-update-donor": _Projected("opd", "donor", "update", donor="rlvr"),
    "rlvr-projected-update-donor": _Projected("rlvr", "donor", "update", donor="opd"),
    "sft-learns-projected": _Projected("sft-learns"),
    "sft-learns-projected-random": _Projected("sft-learns", "random"),
    "ce-teacher-projected": _Projected("ce-teacher"),
}
# Other teachers for OPD: width in units of the student's, and experts.
_TEACHER_ARMS = {
    "opd-teacher-x1": (1, 0),
    "opd-teacher-x2": (2, 0),
    "opd-teacher-moe": (1.5, 8),
}
_RATE_ARMS: _Tuned = {
    f"{arm}-lr-{name}": (arm, factor, {})
    for arm in ("sft", "opd", "rlvr")
    for name, factor in (("x0.3", 0.3), ("x3", 3.0))
}
_TUNED_ARMS = _UNCLIPPED_ARMS | _OPTIMIZER_ARMS | _RATE_ARMS
_WIDTH_ARMS = {
    f"{arm}-width-{name}": (arm, factor)  # in units of the student's width
    for name, factor in (("x1.5", 1.5), ("x2", 2))
    for arm in ("sft", "opd", "rlvr")
}
# The paper's RLVR has 8 times OPD's batch and 3.4 times its steps.
PAPER_BATCH, PAPER_STEPS = 8, 3.4

ARMS = ("sft", "sft-matched", *_LAPTOP_POLICY_ARMS, *_LAPTOP_PROJECTED_ARMS)
PUBLISHED_ARMS = tuple(
    dict.fromkeys(
        [
            *ARMS,
            "sft-base-matched",
            "sft-learns",
            "rlvr-paper",
            *_POLICY_ARMS,
            *_UNCLIPPED_ARMS,
            *_OPTIMIZER_ARMS,
            *_SELF_ARMS,
            *_PROJECTED_ARMS,
            *_RATE_ARMS,
            *_TEACHER_ARMS,
            *_WIDTH_ARMS,
        ]
    )
)
STAGES = ("base", "teacher")  # stored in data/checkpoints
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
    arms=ARMS,
    shelf="laptop",
)
# The laptop's runs and many more: what every claim of the paper needs.
_PUBLISHED = replace(_LAPTOP, arms=PUBLISHED_ARMS, own_base_from=3)
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
    arms=ARMS,
)
# The student of the committed runs: Gemma 3 270M as gemma-3-270m-q4_k_m.gguf, named by
# its SHA-256. Nothing of it is committed; any other causal model can take its place.
GEMMA = Student(
    digest="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    view="f0b340b335829fbf",
    rows=1024,
    convention="bos",
    parameters=100_981_376,
)


def _pretrained_sft(steps: int, qualities: tuple[tuple[str, float], ...]) -> SFTConfig:
    return SFTConfig(
        OptimizerConfig(1e-4, "cosine", 8, 0.1, (0.9, 0.95), fused=True),
        steps=steps,
        batch_sequences=40,
        benchmarks=("pretrained/chain",),
        qualities=qualities,
        mixed_precision="bf16-copy",
        row_tokens=96,
    )


# The arms of a pretrained student, those first that the others are held against.
_TASK_ARMS = {
    f"{arm}-task-{task}": (arm, task)
    for task in ("teens", "list", "story", "odd")
    for arm in ("sft", "opd", "rlvr")
} | {"rlvr-task-brief": ("rlvr", "brief")}
_OWN_ANCHOR = ("list", "story", "odd")  # the others start from the anchor of chains
PRETRAINED_ARMS = (
    *("sft", "opd", "rlvr", "sft-matched", "sft-learns", "rlvr-coin", "rlvr-flip-45"),
    *("ce-teacher", "rlvr-flip-30", "opd-lr-x0.3", "rlvr-lr-x0.3", "opd-lr-x3"),
    *("rlvr-lr-x3", "opd-projected", "opd-projected-random", "off-policy"),
    *("mix-0.75", "mix-0.50", "mix-0.25", "mix-0.05", "mix-0.01"),
    *("tokens-top-50", "tokens-top-25", "tokens-random-50", "tokens-random-25"),
    *("opd-projected-update", "opd-projected-update-random", "opd-projected-donor"),
    *("opd-projected-pretrained", "opd-projected-half", "opd-projected-wide"),
    "sft-projected",
    *("sft-projected-random", "sft-projected-update", "sft-projected-half"),
    *("sft-projected-wide", "sft-matched-projected", "sft-matched-projected-random"),
    *("rlvr-projected", "sft-learns-projected", "sft-learns-projected-random"),
    *("rlvr-projected-update", "rlvr-projected-update-donor"),
    "opd-projected-update-donor",
    *("opd-teacher-rough", "sft-base-matched", "opd-teacher-guess"),
    *("opd-noise-3", "opd-noise-10"),
    *(arm for arm, (_, task) in _TASK_ARMS.items() if arm != "sft-task-teens"),
)
ROUGH_QUALITIES = (("careful", 0.70), ("guess", 0.14), ("sloppy", 0.16))
# A teacher that guesses disagrees with the reward: guesses are mostly wrong.
GUESS_QUALITIES = (("careful", 0.08), ("guess", 0.88), ("sloppy", 0.04))
_OTHER_TEACHERS = {
    "opd-teacher-rough": ("rough", ROUGH_QUALITIES),
    "opd-teacher-guess": ("guesser", GUESS_QUALITIES),
}
_PRETRAINED = Profile(
    student=GEMMA,
    teacher=GEMMA,
    sft=_pretrained_sft(100, STUDENT_QUALITIES),
    teacher_sft=_pretrained_sft(120, TEACHER_QUALITIES),
    policy=PolicyConfig(
        OptimizerConfig(3e-6, warmup_steps=4, fused=True),
        steps=40,
        prompts_per_step=8,
        group_size=8,
        max_new_tokens=24,
        benchmarks=("pretrained/chain",),
        micro_prompts=8,
        mixed_precision="bf16-copy",
        gap_from="scoring",
    ),
    rank=2,
    arms=PRETRAINED_ARMS,
)
DAPO = DataConfig(
    "BytedTsinghua-SIA/DAPO-Math-17k@main",
    source="BytedTsinghua-SIA/DAPO-Math-17k@main",
    answer="reward_model.ground_truth",
)
DEMONSTRATIONS = DataConfig(
    "open-r1/OpenR1-Math-220k@main",
    source="open-r1/OpenR1-Math-220k@main",
    prompt="problem",
    response="solution",
)
# The paper's settings on one GPU of 80 GB, smaller in model, length and steps.
_GPU = Profile(
    student=Stored("Qwen/Qwen3-1.7B@main", "main"),
    teacher=Stored("Qwen/Qwen3-8B@main", "main"),
    sft=SFTConfig(
        OptimizerConfig(1e-5, "cosine", 50, 0.1, (0.9, 0.95), fused=True),
        steps=500,
        batch_sequences=64,
        micro_batch=4,
        mixed_precision="bf16-copy",
        dataset=DEMONSTRATIONS,
        longest=4096,
        gradient_checkpointing=True,
    ),
    teacher_sft=SFTConfig(OptimizerConfig(1e-5), steps=0, batch_sequences=1),
    policy=PolicyConfig(
        OptimizerConfig(1e-6, warmup_steps=4, fused=True),
        steps=299,
        prompts_per_step=8,
        group_size=8,
        max_new_tokens=3072,
        micro_prompts=1,
        mixed_precision="bf16-copy",
        gap_from="scoring",
        dataset=DAPO,
        gradient_checkpointing=True,
    ),
    rank=16,
    arms=("sft", "opd", "rlvr"),
)
# Tables 2 to 5 and the checkpoints of arXiv:2606.07082.
_PAPER = replace(
    _GPU,
    student=Stored("Qwen/Qwen3-8B-Base@main", "main"),
    teacher=Stored("Qwen/Qwen3-32B@main", "main"),
    sft=replace(
        _GPU.sft,
        optimizer=OptimizerConfig(1e-5, "cosine", 538, 0.1, (0.9, 0.95), fused=True),
        steps=5375,
        batch_sequences=256,
        micro_batch=1,
        longest=16384,
        sharded=True,
    ),
    policy=replace(
        _GPU.policy,
        optimizer=OptimizerConfig(1e-6, warmup_steps=0, fused=True),
        steps=299,
        max_new_tokens=8192,
        sampled_prompts=2,
        sharded=True,
        checkpoints=(63, 127, 191, 255, 299),
    ),
    arms=("sft", "opd", "rlvr-paper"),
    processes=8,
)


class Profiles(dict[str, Profile]):
    """Presets by name; ``NAME:FIELD=VALUE,...`` is one with other values.

    >>> PROFILES["gpu:policy.steps=3,policy.optimizer.learning_rate=1e-5"].policy.steps
    3
    """

    def __contains__(self, name: object) -> bool:
        return super().__contains__(str(name).partition(":")[0])

    def __missing__(self, name: str) -> Profile:
        known, _, given = name.partition(":")
        if known == name or known not in self:
            raise ValueError(f"unknown profile {known!r}; expected {', '.join(self)}")
        settings = self[known]
        for part in given.split(","):
            field, equals, value = part.partition("=")
            if not equals:
                raise ValueError(
                    f"profile {name}: {part!r} sets nothing; expected FIELD=VALUE such "
                    "as policy.steps=10"
                )
            settings = _with(settings, field.strip(), value.strip(), name)
        return settings


def _with(settings: Any, field: str, value: str, name: str) -> Any:
    """A configuration with one field, perhaps of a field, set to what a text says."""
    first, _, rest = field.partition(".")
    known = sorted(f.name for f in fields(settings))
    if first not in known:
        raise ValueError(
            f"profile {name}: no setting {first!r}; expected {', '.join(known)}"
        )
    now = getattr(settings, first)
    if rest:
        if not is_dataclass(now):
            raise ValueError(f"profile {name}: {first} has no setting {rest!r}")
        new = _with(now, rest, value, name)
    else:
        new = _read(settings, first, now, value, name)
    return replace(settings, **{first: new})


def _read(settings: Any, field: str, now: Any, value: str, name: str) -> Any:
    if isinstance(now, Stored):
        return stored(_whole_path(value))
    if isinstance(now, Student):
        return _described(value)
    if isinstance(settings, DataConfig) and field == "source":
        return value
    if isinstance(now, DataConfig):
        return replace(now, digest=digest_of(value), source=_whole_path(value))
    declared = next(str(f.type) for f in fields(settings) if f.name == field)
    one: Any = str if "str" in declared else int
    readers: dict[str, Callable[[str], Any]] = {
        "int": int,
        "float": float,
        "str": str,
        "bool": {"true": True, "false": False}.__getitem__,
        "tuple": lambda text: tuple(one(part) for part in text.split("+") if part),
    }
    kind = type(now).__name__
    try:
        return readers[kind](value)
    except (KeyError, ValueError):
        raise ValueError(
            f"profile {name}: {field} {value!r} is no {kind}; it is {now!r} there"
        ) from None


def _described(source: str) -> Student:
    """What a model is as a student: asked of the model, hence with torch."""
    from opd_geometry.training.students import describe

    return describe(source, students_directory())


def _whole_path(source: str) -> str:
    """A file or folder seen from here, named for workers that stand elsewhere."""
    return str(Path(source).resolve()) if Path(source).exists() else source


PROFILES = Profiles(
    {
        "smoke": _SMOKE,
        "laptop": _LAPTOP,
        "published": _PUBLISHED,
        "pretrained": _PRETRAINED,
        "gpu": _GPU,
        "paper": _PAPER,
    }
)
PUBLISHED = "published"  # whose committed measurements the published pages print

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


def build(
    profile: str,
    arm: str,
    seed: int,
    from_scratch: bool = False,
    student: str | None = None,
) -> Run:
    """The run of an arm.

    Args:
        profile: a key of ``PROFILES``.
        arm: one of ``PUBLISHED_ARMS`` or ``PRETRAINED_ARMS``, or ``base`` or
            ``teacher``.
        seed: 0 or larger.
        from_scratch: train base and teacher instead of taking the committed ones.
        student: of a profile with a pretrained one: GGUF file, directory, or hub id
            with revision; None or empty for the one of the committed runs.

    Raises:
        ValueError: unknown profile or arm; the message lists the known ones. Or a
            student that is not there or not readable.
    """
    settings = settings_of(profile, student)
    return _build(
        replace(settings, shelf=None) if from_scratch else settings, arm, seed
    )


def _build(settings: Profile, arm: str, seed: int) -> Run:
    if arm == "base":
        return _base(settings, settings.student, _base_seed(settings, seed))
    if arm == "teacher":
        return _teacher(settings, settings.teacher)
    if arm in _TASK_ARMS and isinstance(settings.student, Student):
        return _other_task(settings, arm, seed)
    if arm in ("sft", "sft-base-matched"):
        own = settings.sft if arm == "sft" else _matched(settings)
        return Run(arm, seed, own, _shared_base(settings, seed))
    if arm in _WIDTH_ARMS:
        return _wider(settings, arm, seed)
    if arm in _TUNED_ARMS:
        plain, factor, changed = _TUNED_ARMS[arm]
        run = _build(settings, plain, seed)
        rate = factor * run.train.optimizer.learning_rate
        optimizer = replace(run.train.optimizer, learning_rate=rate, **changed)
        return replace(run, arm=arm, train=replace(run.train, optimizer=optimizer))
    if arm in _PROJECTED_ARMS:
        return _projected(settings, arm, seed)
    anchor = _build(settings, "sft", seed)
    if arm == "sft-matched":
        return Run(arm, seed, _matched(settings), anchor)
    if arm == "sft-learns":  # the teacher's mix of demonstrations: there is much to win
        better = settings.teacher_sft.qualities
        return Run(arm, seed, replace(_matched(settings), qualities=better), anchor)
    if arm in _SELF_ARMS:
        train = replace(settings.policy, teacher_temperature=_SELF_ARMS[arm])
        return Run(arm, seed, train, anchor, anchor)
    if arm == "rlvr-paper":
        longer = replace(
            settings.policy,
            alpha=0.0,
            steps=round(PAPER_STEPS * settings.policy.steps),
            prompts_per_step=PAPER_BATCH * settings.policy.prompts_per_step,
        )
        return Run(arm, seed, longer, anchor)
    if arm in _OTHER_TEACHERS:
        name, qualities = _OTHER_TEACHERS[arm]
        taught = replace(settings.teacher_sft, qualities=qualities)
        other = _teacher(replace(settings, teacher_sft=taught), settings.teacher)
        return Run(arm, seed, settings.policy, anchor, replace(other, arm=name))
    if arm in _TEACHER_ARMS:
        factor, experts = _TEACHER_ARMS[arm]
        shape = replace(_scaled(settings.student, factor), experts=experts)
        return Run(arm, seed, settings.policy, anchor, _teacher(settings, shape))
    if arm in _POLICY_ARMS:
        train = replace(settings.policy, **_POLICY_ARMS[arm])  # type: ignore[arg-type]
        teacher = _shared_teacher(settings)
        return Run(arm, seed, train, anchor, teacher if train.needs_teacher else None)
    raise ValueError(f"unknown arm {arm!r}; expected {', '.join(settings.arms)}")


def unit_of_n(profile: str, seeds: Sequence[int]) -> str:
    """What so many seeds stand for: how much of a run each of them draws anew.

    >>> unit_of_n("published", [0, 1, 2, 3])
    '4 seeds: data, sampling and anchor each; 2 bases, 1 teacher'
    """
    if not seeds:
        return "no seed"
    bases = len({_base_seed(settings_of(profile), seed) for seed in seeds})
    count = f"{len(seeds)} seed" + ("" if len(seeds) == 1 else "s")
    shared = f"{bases} base" + ("" if bases == 1 else "s")
    return f"{count}: data, sampling and anchor each; {shared}, 1 teacher"


def settings_of(profile: str, student: str | None = None) -> Profile:
    """Sizes and budgets of a profile, of another student where one is given.

    Args:
        profile: a key of ``PROFILES``.
        student: as in ``build``.

    Raises:
        ValueError: unknown profile; the message lists the known ones. Or a student
            that cannot be one, or that the profile does not take.
    """
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; expected {', '.join(PROFILES)}")
    settings = PROFILES[profile]
    if not student:
        return settings
    if isinstance(settings.student, Stored):
        return replace(settings, student=stored(_whole_path(student)))
    if not isinstance(settings.student, Student):
        takers = [
            name
            for name, other in PROFILES.items()
            if not isinstance(other.student, ModelConfig)
        ]
        raise ValueError(
            f"profile {profile} trains its students from scratch and takes no student "
            f"{student}; expected profile {', '.join(takers)} with one"
        )
    model = _described(student)
    return replace(settings, student=model, teacher=model)


def asks_gpus(settings: Profile) -> bool:
    """Whether a run asks GPUs of a cluster's worker: those of whole models do."""
    return isinstance(settings.student, Stored)


def _base(settings: Profile, shape: ModelConfig | Student | Stored, seed: int) -> Run:
    if settings.base is None or settings.base_annealing is None:
        raise ValueError(
            "no base is trained here: expected the pretrained model itself"
        )
    assert isinstance(shape, ModelConfig)
    early = Run("base-early", seed, settings.base, shape)
    return Run("base", seed, settings.base_annealing, early)


def _teacher(settings: Profile, shape: ModelConfig | Student | Stored) -> Run:
    if isinstance(shape, Stored):
        raise ValueError(
            "the teacher of this profile is a whole model that is trained no further: "
            "expected other arms"
        )
    if settings.teacher_base is None or isinstance(shape, Student):
        return Run("teacher", 0, settings.teacher_sft, shape)
    grown = Run("teacher-base", 0, settings.teacher_base, shape)
    return Run("teacher", 0, settings.teacher_sft, grown)


def _base_seed(settings: Profile, seed: int) -> int:
    """Seed of the base below a run: 0, or the run's own where the profile says so."""
    own = settings.own_base_from
    return 0 if own is None or seed < own else seed


def _shared_base(settings: Profile, seed: int) -> Run | Stored | Student:
    """The base that seeds share, committed where it is, or the seed's own."""
    if isinstance(settings.student, Student | Stored):
        return settings.student
    base_seed = _base_seed(settings, seed)
    if settings.shelf is None or base_seed:
        return _base(settings, settings.student, base_seed)
    return stored(f"checkpoints/{settings.shelf}-base")


def _shared_teacher(settings: Profile) -> Run | Stored:
    if isinstance(settings.teacher, Stored):
        return settings.teacher
    if settings.shelf is None:
        return _teacher(settings, settings.teacher)
    return stored(f"checkpoints/{settings.shelf}-teacher")


def _matched(settings: Profile) -> SFTConfig:
    """SFT at the policy arms' learning rate, steps, sequences and problems."""
    policy = settings.policy
    return replace(
        settings.sft,
        optimizer=policy.optimizer,
        steps=policy.steps,
        batch_sequences=policy.prompts_per_step * policy.group_size,
        benchmarks=policy.benchmarks,
    )


def _projected(settings: Profile, arm: str, seed: int) -> Run:
    """An arm that goes on, confined, where its unconstrained twin was at the branch."""
    spec = _PROJECTED_ARMS[arm]
    free = _build(settings, spec.free, seed)
    donor = _build(settings, spec.donor, seed) if spec.donor else None
    rank = max(1, round(spec.factor * settings.rank))
    projection = ProjectionConfig(rank, spec.subspace, spec.form)
    return replace(free, arm=arm, projection=projection, branch=free, donor=donor)


def _wider(settings: Profile, arm: str, seed: int) -> Run:
    """An arm of a wider student; all seeds share the base of that width."""
    plain, factor = _WIDTH_ARMS[arm]
    base = _base(settings, _scaled(settings.student, factor), 0)
    suffix = arm.removeprefix(plain)
    anchor = Run(f"sft{suffix}", seed, settings.sft, base)
    if plain == "sft":
        return anchor
    run = _build(settings, plain, seed)
    return replace(run, arm=arm, start=anchor)


def _other_task(settings: Profile, arm: str, seed: int) -> Run:
    """An arm of another task; anchor and teacher are that task's, if it has its own."""
    plain, task = _TASK_ARMS[arm]
    learned = ("pretrained/" + {"teens": "chain-teens"}.get(task, task),)
    own = task in _OWN_ANCHOR
    sft = replace(settings.sft, benchmarks=learned) if own else settings.sft
    teaching = replace(settings.teacher_sft, benchmarks=learned)
    anchor = Run(f"sft-task-{task}" if own else "sft", seed, sft, settings.student)
    if plain == "sft":
        return anchor
    teacher = Run(f"teacher-task-{task}", 0, teaching, settings.student)
    if not own:
        teacher = _teacher(settings, settings.teacher)
    train = replace(settings.policy, benchmarks=learned, **_POLICY_ARMS[plain])  # type: ignore[arg-type]
    return Run(arm, seed, train, anchor, teacher if train.needs_teacher else None)


def _scaled(shape: ModelConfig | Student | Stored, factor: float) -> ModelConfig:
    if not isinstance(shape, ModelConfig):
        raise ValueError("a pretrained model has the size it has; expected other arms")
    return replace(shape, width=round(factor * shape.width))


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


def parse_arms(text: str, profile: str) -> list[str]:
    """Read arms as a comma-separated list, ``reader`` or the profile's ``all``.

    ``base`` and ``teacher``, the stages that all seeds share, can be named as well.

    Raises:
        ValueError: unknown profile or arm, listing the known ones.
    """
    settings = settings_of(profile)
    if text == "all":
        return list(settings.arms)
    if text == "reader":
        return list(READER_ARMS)
    arms = [part.strip() for part in text.split(",")]
    for arm in arms:
        if arm not in (*PUBLISHED_ARMS, *PRETRAINED_ARMS, *STAGES):
            known = ", ".join((*settings.arms, *STAGES))
            raise ValueError(f"unknown arm {arm!r}; expected {known}, reader or all")
    return list(dict.fromkeys(arms))

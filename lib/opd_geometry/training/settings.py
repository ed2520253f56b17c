"""What a training is told: models, optimizers and loops as frozen settings.

They decide a run's identity; so a table can be found without torch, by who only reads.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from opd_geometry.training.data import DataConfig

KINDS = ("adamw", "sgd", "muon")


PRECISIONS = ("no", "bf16", "bf16-copy")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a tiny Qwen3 model.

    Attributes:
        width: hidden size; heads have ``head_size`` channels each.
        layers: number of decoder layers.
        head_size: channels of a head; two query heads share a key-value head.
        experts: 0 for one dense network a layer; else Qwen3-MoE, whose router sends
            every token to two experts of a third of the dense network's size.
    """

    width: int = 128
    layers: int = 4
    head_size: int = 32
    experts: int = 0


ROWS = 1024  # of the cut embedding


@dataclass(frozen=True)
class Student:
    """A pretrained model as a task's student: what stands there, and how it is cut.

    Where it lies is no part of what it is: two equal files make equal runs.

    Attributes:
        digest: SHA-256 of a GGUF file, digest of a directory's files, or a hub id
            with its revision.
        rows: of the cut vocabulary; the tokenizer's own size where that is smaller.
        view: SHA-256 of the kept tokens, and of how task texts are read as them.
        convention: how a prompt begins: ``plain``, ``bos`` (the token that the
            tokenizer puts in front) or ``chat`` (the user's turn of its template).
        source: GGUF file, directory, or hub id with revision; empty if unknown.
        parameters: after the cut; for estimates.
    """

    digest: str
    view: str
    rows: int = ROWS
    convention: str = "plain"
    source: str = field(default="", compare=False)
    parameters: int = field(default=0, compare=False)


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer and its schedule (AdamW in arXiv:2606.07082, tables 2 to 5).

    Attributes:
        learning_rate: peak learning rate.
        schedule: ``constant`` or ``cosine``, both after ``warmup_steps`` linear steps.
        warmup_steps: Adam's first steps are sign steps; a ramp softens them.
        final_frac: where the cosine ends, as a share of the peak.
        betas, eps, weight_decay: of AdamW; decay only on matrices, not on norms. The
            first beta is the momentum of the other kinds.
        max_grad_norm: the gradient of a step is scaled down to this 2-norm; infinite
            clips nothing.
        fused: one pass over each weight and its moments; faster on large models, and
            other last digits.
        kind: ``adamw``; ``sgd`` with momentum, which rescales no entry; or ``muon``,
            whose steps have equal singular values, for the layers' matrices (the rest
            by AdamW), its rate in AdamW's unit.
    """

    learning_rate: float
    schedule: str = "constant"
    warmup_steps: int = 10
    final_frac: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    fused: bool = False
    kind: str = "adamw"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"unknown optimizer {self.kind!r}; expected {', '.join(KINDS)}"
            )
        if self.fused and self.kind == "muon":
            raise ValueError(
                "fused with muon: torch has no fused one; set fused=false, or kind "
                "adamw"
            )
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(
                f"unknown schedule {self.schedule!r}; expected constant or cosine"
            )
        if not self.max_grad_norm > 0.0:
            raise ValueError(
                f"max_grad_norm {self.max_grad_norm}: expected above 0; infinite clips "
                "nothing"
            )


@dataclass(frozen=True)
class SFTConfig:
    """One supervised run.

    Attributes:
        optimizer: AdamW and schedule.
        steps: optimizer steps.
        batch_sequences: demonstrations a step.
        micro_batch: demonstrations a forward pass (memory only, never the result).
        data: ``demonstrations`` of the tasks, or one of the broad mixtures,
            ``pretraining`` and ``annealing`` (see ``tasks.draw_pretraining``).
        benchmarks: which task distributions the demonstrations come from.
        qualities: (quality, weight) pairs of the demonstrations.
        learn_prompt: whether prompt tokens are learned too (pretraining).
        mixed_precision: ``no``, ``bf16`` (autocast) or ``bf16-copy`` (see
            ``optimizer.Compute``); master weights stay float32.
        row_tokens: several demonstrations share a row of at most so many tokens, each
            seeing itself alone; 0 gives each a padded row of its own.
        dataset: where demonstrations come from instead of ``benchmarks``.
        longest: tokens of a demonstration, which is cut behind them; 0 for any number.
        gradient_checkpointing: layers are computed again for the gradient.
        sharded: several processes split master weights and moments (see ``ranks``).
    """

    optimizer: OptimizerConfig
    steps: int
    batch_sequences: int
    micro_batch: int = 128
    data: str = "demonstrations"
    benchmarks: tuple[str, ...] = ("chain", "gcd", "base")
    qualities: tuple[tuple[str, float], ...] = (("careful", 1.0),)
    learn_prompt: bool = False
    mixed_precision: str = "no"
    row_tokens: int = 0
    dataset: DataConfig | None = None
    longest: int = 0
    gradient_checkpointing: bool = False
    sharded: bool = False

    def __post_init__(self) -> None:
        if self.mixed_precision not in PRECISIONS:
            raise ValueError(
                f"mixed_precision {self.mixed_precision!r}: expected "
                f"{' or '.join(PRECISIONS)}"
            )
        if self.data not in ("demonstrations", "pretraining", "annealing"):
            raise ValueError(
                f"unknown data {self.data!r}; expected demonstrations, pretraining "
                "or annealing"
            )


@dataclass(frozen=True)
class PolicyConfig:
    """One run of the policy loop.

    Attributes:
        optimizer: AdamW and schedule (constant in the paper).
        steps: rollout rounds; one optimizer step each.
        prompts_per_step, group_size: the batch is their product.
        alpha: weight of the distillation advantage; 1 is OPD, 0 is RLVR.
        estimator: ``sampled`` (gap of the sampled token, the paper's experiments),
            ``full`` (reverse KL over the vocabulary, the paper's appendix D) or
            ``full-forward`` (KL of the teacher to the student, on the same states).
        rollouts: who writes the completions, ``student`` or ``teacher``.
        credit: ``gap`` (the advantage above) or ``likelihood``: every token's advantage
            is one. With the teacher's rollouts that is cross-entropy on what the
            teacher wrote, at this loop's budget.
        token_selection: ``all``, ``top-gap`` or ``random``.
        keep_frac: share of tokens that a selection keeps.
        clip_low, clip_high: the importance ratio stays within 1 - low and 1 + high.
        ratio_to: what the student's probability of a token is divided by: the
            ``student``'s own when the step begins, so that every ratio is one, or that
            of the ``author``, whoever wrote the token (off-policy, the teacher).
        reward_flip: probability that a reward is replaced by its opposite before
            anything is learned from it; 0.5 leaves coin flips.
        gap_noise: standard deviation, in nats, of a normal number that is drawn once a
            response and added to the gap of each of its tokens: OPD with a noisier
            signal, as a flipped reward is RLVR's.
        temperature: of the rollouts.
        teacher_temperature: the teacher's logits are divided by it wherever it scores
            tokens, beside ``temperature``: below one its word is sharper.
        max_new_tokens: longest completion.
        benchmarks: which task distributions the prompts come from.
        micro_prompts: prompts with their groups a forward pass, or completions where
            a group is too long for a row; memory only.
        mixed_precision: ``no``, ``bf16`` (autocast) or ``bf16-copy`` (see
            ``optimizer.Compute``); master weights stay float32.
        gap_from: whose log-probabilities of its own tokens are the student's: those of
            the ``rollout``, or those of the ``scoring`` pass, which reads the tokens as
            the teacher's does. In bf16 the two differ.
        dataset: where prompts and answers come from instead of ``benchmarks``.
        checkpoints: steps after which the weights are stored; empty for a run's usual.
        gradient_checkpointing: layers are computed again for the gradient.
        sampled_prompts: prompts whose completions a process samples at once, 0 for all
            of its share; memory only.
        teacher_dtype: what the teacher computes in, ``float32`` or ``bfloat16``; empty
            for bf16 on a dataset, else as the student does.
        teacher_device: where the teacher is, such as ``cuda:1`` or ``cpu``; empty for
            beside the student.
        sharded: several processes split master weights, moments and the teacher's
            layers (see ``ranks``).
        stop: strings that end a completion as its end-of-sequence token does.
        sampler: ``own``, or ``vllm``, an engine that writes the student's completions.
        sampler_memory: share of the GPU's memory that is the engine's.
        sampler_ratio: where the importance weight of a token that the engine sampled
            is cut off (see ``losses.truncated_ratio``); infinite cuts nothing, 0
            leaves the engine uncorrected. The full-vocabulary estimator has none.
        sampler_gap: mean distance of the engine's log-probabilities from those of the
            training pass, in nats a token, beyond which a step is refused.
        shared_prefixes: completions of a prompt are sampled and scored as one until
            they differ; the same rollouts and gradients but for last digits.
    """

    optimizer: OptimizerConfig
    steps: int
    prompts_per_step: int = 24
    group_size: int = 8
    alpha: float = 1.0
    estimator: str = "sampled"
    rollouts: str = "student"
    credit: str = "gap"
    token_selection: str = "all"
    keep_frac: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    ratio_to: str = "student"
    reward_flip: float = 0.0
    gap_noise: float = 0.0
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    max_new_tokens: int = 40
    benchmarks: tuple[str, ...] = ("chain",)
    micro_prompts: int = 24
    mixed_precision: str = "no"
    gap_from: str = "rollout"
    dataset: DataConfig | None = None
    checkpoints: tuple[int, ...] = ()
    gradient_checkpointing: bool = False
    sampled_prompts: int = 0
    sharded: bool = False
    teacher_dtype: str = ""
    teacher_device: str = ""
    stop: tuple[str, ...] = ()
    sampler: str = "own"
    sampler_memory: float = 0.3
    sampler_ratio: float = 2.0
    sampler_gap: float = 0.2
    shared_prefixes: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha {self.alpha}: expected 0 (RLVR) to 1 (OPD)")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} {getattr(self, name)!r}: expected {' or '.join(known)}"
                )
        if self.estimator != "sampled" and (
            self.alpha < 1.0 or self.token_selection != "all"
        ):
            raise ValueError(
                f"estimator {self.estimator} with alpha {self.alpha} and "
                f"{self.token_selection} tokens: a KL over the vocabulary has no "
                "per-token advantage to mix or select; use the sampled estimator"
            )
        if self.credit == "likelihood" and (
            self.alpha < 1.0 or self.estimator != "sampled"
        ):
            raise ValueError(
                f"credit likelihood with alpha {self.alpha} and estimator "
                f"{self.estimator}: every token's advantage is one, nothing is mixed; "
                "use alpha 1 and the sampled estimator"
            )
        if self.token_selection == "top-gap" and not self.needs_teacher:
            raise ValueError(
                "token_selection top-gap with alpha 0: no teacher scores the tokens; "
                "select at random, or set alpha above 0"
            )
        if not 0.0 <= self.reward_flip <= 0.5:
            raise ValueError(
                f"reward_flip {self.reward_flip}: expected 0 (true rewards) to 0.5 "
                "(coin flips)"
            )
        if not 0.0 <= self.gap_noise < math.inf:
            raise ValueError(
                f"gap_noise {self.gap_noise}: expected 0 nats or more, and finite"
            )
        if self.gap_noise and (self.credit != "gap" or self.estimator != "sampled"):
            raise ValueError(
                f"gap_noise {self.gap_noise} with credit {self.credit} and estimator "
                f"{self.estimator}: there is no gap of a token to add it to; use "
                "credit gap and the sampled estimator"
            )
        if not self.temperature > 0.0:
            raise ValueError(
                f"temperature {self.temperature}: expected above 0; a policy gradient "
                "needs samples"
            )
        if not 0.0 < self.teacher_temperature < math.inf:
            raise ValueError(
                f"teacher_temperature {self.teacher_temperature}: expected above 0, "
                "and finite"
            )
        if self.teacher_temperature != 1.0 and self.rollouts == "teacher":
            raise ValueError(
                f"teacher_temperature {self.teacher_temperature} with the teacher's "
                "rollouts: it would write at one temperature and score at another; "
                "set temperature, or rollouts to student"
            )
        if self.sharded and self.teacher_device:
            raise ValueError(
                f"teacher_device {self.teacher_device} with sharded: the teacher's "
                "layers are split over the processes; leave one of them out"
            )
        if self.sampler != "own":
            self._check_engine()

    def _check_engine(self) -> None:
        if self.rollouts != "student" or self.gap_from != "scoring":
            raise ValueError(
                f"sampler {self.sampler} with rollouts by the {self.rollouts} and "
                f"gap_from {self.gap_from}: expected the student and scoring; an "
                "engine writes for the student, and its log-probabilities are its own"
            )
        if not (self.sampler_ratio >= 0.0 and self.sampler_gap > 0.0):
            raise ValueError(
                f"sampler_ratio {self.sampler_ratio} and sampler_gap "
                f"{self.sampler_gap}: expected 0 or more, and above 0"
            )
        if not 0.0 < self.sampler_memory < 1.0:
            raise ValueError(
                f"sampler_memory {self.sampler_memory}: expected a share of the GPU's "
                "memory, above 0 and below 1"
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether a step asks the teacher anything."""
        return self.alpha > 0.0 or self.rollouts == "teacher"

    @property
    def scoring_temperature(self) -> float:
        """What the teacher's logits are divided by where it scores."""
        return self.temperature * self.teacher_temperature


_CHOICES = {
    "estimator": ("sampled", "full", "full-forward"),
    "rollouts": ("student", "teacher"),
    "ratio_to": ("student", "author"),
    "credit": ("gap", "likelihood"),
    "token_selection": ("all", "top-gap", "random"),
    "mixed_precision": PRECISIONS,
    "gap_from": ("rollout", "scoring"),
    "sampler": ("own", "vllm"),
    "teacher_dtype": ("", "float32", "bfloat16"),
}


def clipped_frac(norms: np.ndarray, limit: float) -> float:
    """Share of the steps whose gradient was scaled down.

    Args:
        norms: of the gradient at every step, before clipping.
        limit: ``max_grad_norm``.

    >>> clipped_frac(np.array([0.5, 2.0, 1.0, 3.0]), 1.0)
    0.5
    """
    return float(np.mean(norms > limit)) if len(norms) else math.nan

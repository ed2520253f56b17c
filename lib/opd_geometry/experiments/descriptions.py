"""A run as it is described: frozen, and named by the hash of all that decides it.

Describing needs no torch, so that tables of runs can be found by who only reads them;
``runs`` trains what is described here.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from opd_geometry.experiments.records import digest_of
from opd_geometry.files import data_directory, on_shelf
from opd_geometry.training.settings import ModelConfig, PolicyConfig, SFTConfig, Student

RECIPE = 1  # raised when the same description would train to other weights


CHECKPOINT_FRACS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)


BRANCH_FRAC = 0.2  # projected runs take over here (the paper's "about 20 %")


@dataclass(frozen=True)
class Stored:
    """A checkpoint that is not a run: a directory below data/, any directory, a hub id.

    Attributes:
        source: directory (absolute, or relative to the data directory), or hub id with
            its revision, ``owner/name@revision``.
        digest: SHA-256 of its files, tokenizer and config included, or the revision;
            part of a run's identity.
    """

    source: str
    digest: str


@dataclass(frozen=True)
class ProjectionConfig:
    """Training confined to a rank-K right subspace from ``BRANCH_FRAC`` on.

    Attributes:
        rank: K.
        subspace: ``own`` (top right singular vectors of this run's own W_t - W_0 at the
            branch), ``random``, ``pretrained`` (those of W_0), or ``donor`` (own, but
            of another run; see ``Run.donor``).
        form: ``gradient`` (g <- g V V^T before the optimizer, as in the paper; Adam
            leaks) or ``update`` (the weights' change itself, which stays inside).
    """

    rank: int
    subspace: str = "own"
    form: str = "gradient"

    def __post_init__(self) -> None:
        if self.subspace not in ("own", "random", "pretrained", "donor"):
            raise ValueError(
                f"unknown subspace {self.subspace!r}; "
                "expected own, random, pretrained or donor"
            )
        if self.form not in ("gradient", "update"):
            raise ValueError(f"unknown form {self.form!r}; expected gradient or update")


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's weights.

    Attributes:
        arm: its name in the book (``opd``, ``rlvr``, ``sft``, ...).
        seed: varies sampling, data order and, through ``start``, the anchor.
        train: the loop and its settings.
        start: a shape to initialise, a stored checkpoint, a pretrained student, or the
            run whose final checkpoint is taken over, rounded to bf16 as a stored
            checkpoint is.
        teacher: who scores (and writes off-policy), if anyone.
        projection: confines training after the branch point.
        branch: the unconstrained run whose state at the branch is continued.
        donor: the run whose early subspace is taken, where it is another's.
        recipe: see ``RECIPE``.
    """

    arm: str
    seed: int
    train: SFTConfig | PolicyConfig
    start: "ModelConfig | Stored | Student | Run"
    teacher: "Stored | Run | None" = None
    projection: ProjectionConfig | None = None
    branch: "Run | None" = None
    donor: "Run | None" = None
    recipe: int = RECIPE

    def __post_init__(self) -> None:
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"seed {self.seed!r}: expected an integer, 0 or larger")
        if (self.projection is None) != (self.branch is None):
            raise ValueError(
                f"run {self.arm!r}: a projection and the run it branches from "
                "go together"
            )
        given = self.projection is not None and self.projection.subspace == "donor"
        if given != (self.donor is not None):
            raise ValueError(
                f"run {self.arm!r}: the subspace donor and a donor go together"
            )

    def key(self) -> str:
        """Twelve hexadecimal digits that change with anything that matters."""
        return self._key

    @cached_property
    def _key(self) -> str:
        text = json.dumps(self._described, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def _described(self) -> dict[str, Any]:
        return _fields(self)

    def __hash__(self) -> int:  # the fields' own takes as long as the key, every time
        return hash(self._key)

    @property
    def name(self) -> str:
        """Name of the run's directory."""
        return f"{self.arm}-s{self.seed}-{self.key()}"

    @property
    def needs(self) -> "list[Run]":
        """The runs that must be finished before this one can start."""
        candidates = (self.start, self.teacher, self.branch, self.donor)
        return [run for run in candidates if isinstance(run, Run)]

    def checkpoint_steps(self) -> list[int]:
        """Steps after which a checkpoint is stored, the last one included."""
        steps = self.train.steps
        if isinstance(self.train, PolicyConfig) and self.train.checkpoints:
            return sorted({min(steps, s) for s in (*self.train.checkpoints, steps)})
        return sorted({max(1, round(frac * steps)) for frac in CHECKPOINT_FRACS})

    def branch_step(self) -> int:
        """The step at which projected runs take over."""
        return max(1, round(BRANCH_FRAC * self.train.steps))


def _description(value: Any) -> Any:
    """A configuration without the fields that stand at their default.

    A new field with a default therefore renames no earlier run. Nor does a field that
    two equal configurations may differ in, such as where a student lies.
    """
    if isinstance(value, Run):
        return value._described
    return _fields(value) if dataclasses.is_dataclass(value) else value


def _fields(value: Any) -> dict[str, Any]:
    return {"type": type(value).__name__} | {
        name: _description(content)
        for name, default in _defaults(value.__class__)
        if (content := getattr(value, name)) != default
    }


@lru_cache
def _defaults(kind: Any) -> list[tuple[str, Any]]:
    compared = (field for field in dataclasses.fields(kind) if field.compare)
    return [(field.name, field.default) for field in compared]


def stored(source: str | Path) -> Stored:
    """Describe a checkpoint by its place and what stands there.

    Args:
        source: a directory, relative to the data directory or absolute, or a hub id
            with its revision, ``owner/name@revision``.

    Raises:
        ValueError: no safetensors there, a hub id without a revision, or files that
            are not those of the list ``NAME.sha256`` beside the directory.
    """
    directory = on_shelf(source)
    name, _, revision = str(source).partition("@")
    if revision and not directory.exists():
        return Stored(str(source), revision)
    entries = list(os.scandir(directory)) if directory.is_dir() else []
    if not any(entry.name.endswith(".safetensors") for entry in entries):
        raise ValueError(
            f"no checkpoint at {source}: expected a directory with safetensors below "
            f"{data_directory()}, an absolute path, or a hub id with its revision, "
            f"{name}@REVISION"
        )
    files = sorted(
        (entry.path, entry.stat().st_mtime_ns) for entry in entries if entry.is_file()
    )
    _check_listed(directory, files)
    lines = [f"{Path(path).name} {_digest(path, when)}\n" for path, when in files]
    return Stored(str(source), hashlib.sha256("".join(lines).encode()).hexdigest()[:16])


@lru_cache
def _digest(path: str, modified: int) -> str:
    """SHA-256 of a file, read again only when it was modified."""
    return digest_of(Path(path))


def list_of(directory: Path) -> Path:
    """Digests of a checkpoint's files, as sha256sum prints them, beside it."""
    return directory.with_name(f"{directory.name}.sha256")


def _check_listed(directory: Path, files: Iterable[tuple[str, int]]) -> None:
    """Refuse a checkpoint that is not as it was stored: runs would take other names."""
    known = list_of(directory)
    if not known.is_file():
        return
    found = {
        f"{_digest(path, when)}  {directory.name}/{Path(path).name}"
        for path, when in files
    }
    other = found.symmetric_difference(known.read_text(errors="replace").splitlines())
    if other:
        name = min(line.rpartition("/")[2] for line in other)
        raise ValueError(
            f"{directory / name} is damaged: it is not as {known.name} says; take "
            f"{directory.name} from version control, or remove {known} where it was "
            "changed on purpose"
        )


def run_directory(run: Run) -> Path:
    """Where a run lives, whether or not it exists yet."""
    return data_directory() / "runs" / run.name


def students_directory() -> Path:
    """Where pretrained students lie, cut and rounded, each made once."""
    return data_directory() / "runs" / "students"


def is_lean(run: Run) -> bool:
    """Whether a run grew from a pretrained student: it keeps what is measured only.

    On the way these are the attention projections; at the branch and at the end, all
    weights. Step 0 is kept once for all that start there, in bf16, which it is
    rounded to.
    """
    return isinstance(origin(run), Student)


def origin(run: Run) -> "ModelConfig | Stored | Student":
    """What the chain of runs that a run starts from began with."""
    return origin(run.start) if isinstance(run.start, Run) else run.start

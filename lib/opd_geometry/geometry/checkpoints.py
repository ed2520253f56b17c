"""Pairs of weight matrices out of checkpoints, one at a time.

A checkpoint is a Hugging Face directory (one file or shards with an index), one
.safetensors file, an adapter of PEFT, or what a trainer leaves (see `directories`).
Nothing in it is run: pickles go through torch's restricted loader of tensors.

Each two-dimensional floating-point tensor is one matrix, except that what is fused,
stacked or turned is split (see `layouts`) and a head that equals the embedding is not
counted again. Whatever else a file holds is listed by `list_skipped` with the reason.
"""

import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from opd_geometry.geometry import adapters, directories, quantised
from opd_geometry.geometry.adapters import AdaptedCut, Adapter
from opd_geometry.geometry.directories import ADAPTER_CONFIG, INDEX_NAME, json_object
from opd_geometry.geometry.layouts import (
    ALL_ROLES,
    NO_ENTRIES,
    PARTS,
    Cut,
    Matrix,
    Skipped,
    cuts_or_reason,
    families_of,
    language_config,
    layout_of,
    matrices_in_memory,
    natural,
    role_of,
)
from opd_geometry.geometry.matching import ROTARY, match, normal_form, unwrapped
from opd_geometry.geometry.storage import Stored

__all__ = [
    "ALL_ROLES",
    "INDEX_NAME",
    "PARTS",
    "Matrix",
    "Skipped",
    "matrices_in_memory",
]

TIED = "equal to the embedding (tied), counted there"
TIED_BEFORE = "before: the embedding, to which the head was tied"
TIED_AFTER = "after: the embedding, to which the head is tied"
Item = TypeVar("Item")
CHUNK_ROWS = 4096  # of embedding and head that are compared at a time


class MatrixPair(NamedTuple):
    """One matrix in two checkpoints, in the dtypes they are stored in."""

    name: str
    role: str
    layer: int
    w_before: Tensor
    w_after: Tensor


@dataclass(frozen=True)
class StoredPair:
    """One matrix in two checkpoints, not read yet; small enough to be sent around.

    Attributes:
        before, after: what they are; both under the name that a table shows.
        cuts: where they lie.
        note: what a reader must know of the pair, nothing for most.
    """

    before: Matrix
    after: Matrix
    cuts: tuple[Cut, Cut]
    note: str = ""

    def read(self) -> tuple[Tensor, Tensor]:
        """Both, in the dtypes they are stored in, in memory of their own."""
        return self.read_before(), self.read_after()

    def read_before(self) -> Tensor:
        """The earlier one alone."""
        return self.cuts[0].read()

    def read_after(self) -> Tensor:
        """The later one alone."""
        return self.cuts[1].read()

    def read_head(self, n_bytes: int) -> Tensor:
        """The first rows of the later one, of about so many bytes, at least one."""
        cut, n_rows = self.cuts[1], self.after.shape[0]
        if isinstance(cut, AdaptedCut) and cut.base is not None:
            cut = cut.base
        n_head = min(n_rows, max(1, n_bytes * n_rows // self.after.n_bytes))
        start, step = cut.rows.start or 0, cut.rows.step or 1
        stop = start + (n_head - 1) * step + 1
        return replace(cut, rows=slice(start, stop, step), groups=1).read()

    def update(self) -> tuple[Tensor, Tensor] | None:
        """After - before as (left, right) in float64, where adapters make it low-rank.

        None where it is not known as a product: whole weights, or DoRA.
        """
        earlier, later = self.cuts
        if not self.adapted:
            return None
        signed = [(1.0, later), (-1.0, earlier)]
        factors = [
            (sign, cut.update()) for sign, cut in signed if isinstance(cut, AdaptedCut)
        ]
        known = [(sign * f[0], f[1]) for sign, f in factors if f is not None]
        if len(known) < len(factors):
            return None
        return torch.cat([f[0] for f in known], 1), torch.cat([f[1] for f in known])

    @property
    def adapted(self) -> bool:
        """Whether an adapter is all that may differ: both have the same base."""
        return _base_of(self.cuts[0]) == _base_of(self.cuts[1]) and any(
            isinstance(cut, AdaptedCut) for cut in self.cuts
        )

    @property
    def baseless(self) -> bool:
        """Whether only the updates are known, and no weights."""
        return all(isinstance(c, AdaptedCut) and c.base is None for c in self.cuts)


def _base_of(cut: Cut) -> Cut | None:
    return cut.base if isinstance(cut, AdaptedCut) else cut


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, from its headers alone.

    Attributes:
        path: as it was given.
        cuts: name to where the matrix lies, in natural order.
        skipped: name to tensor that is not measured.
        notes: which files were read, where there was a choice.
        files: that hold its tensors.
        tied: name of the embedding that is the head as well, or nothing.
        families: of the model and its parts, as config.json names them.
    """

    path: Path
    cuts: dict[str, Cut]
    skipped: dict[str, Skipped]
    notes: tuple[str, ...]
    files: tuple[Path, ...]
    tied: str = ""
    families: tuple[str, ...] = ()

    @property
    def baseless(self) -> bool:
        """Whether it is an adapter of which only the updates are known."""
        cuts = self.cuts.values()
        return any(isinstance(c, AdaptedCut) and c.base is None for c in cuts)


Source = str | Path | Checkpoint


def open_checkpoint(
    path: Source, base: Source | None = None, dequantise: bool = False
) -> Checkpoint:
    """A checkpoint, from its headers alone.

    Args:
        path: a directory, a file, or a checkpoint that is open already.
        base: of an adapter: what it was trained on; None for what the adapter's config
            names, and its updates alone where that is not here.
        dequantise: make weights of codes, where the format is known.

    Raises:
        FileNotFoundError: no such path, or a shard of the index is missing.
        ValueError: nothing that can be read, a truncated or damaged file, index and
            shards that disagree, or a broken config.json.
    """
    if isinstance(path, Checkpoint):
        return path
    path = Path(path)
    if place := adapters.adapter_in(path):
        found = _with_adapter(path, adapters.read_adapter(place), base, dequantise)
        aside = [n for n in directories.WHOLE_NAMES if (path / n).is_file()]
        beside = f"{path}: {''.join(aside[:1])} beside the adapter is left aside"
        return replace(found, notes=(*found.notes, beside)) if aside else found
    held = directories.holdings(path)
    config = _config(held.place)
    stored, notes = held.tensors, held.notes
    adapters.refuse_foreign(path, stored)
    if adapter := _unmerged(path, held.place, stored):
        own = [_without_base_layer(t) for t in stored if "lora_" not in t.name]
        whole = _contents(path, own, config, notes, dequantise)
        return _with_adapter(path, adapter, whole, dequantise)
    return _contents(path, stored, config, notes, dequantise)


def _config(place: Path) -> dict[str, Any]:
    """config.json beside the tensors, or {}."""
    for file in (place / "config.json", place / "huggingface" / "config.json"):
        if file.is_file():
            return json_object(file)
        if file.exists():
            raise ValueError(f"{file} is no regular file, expected one; remove it")
    return {}


def _contents(
    path: Path,
    stored: list[Stored],
    config: dict[str, Any],
    notes: tuple[str, ...],
    dequantise: bool,
) -> Checkpoint:
    """Every tensor of a checkpoint as matrices to measure or a reason not to."""
    codes = quantised.reasons(stored, config)
    if dequantise:
        stored, codes, notes = quantised.dequantised(stored, codes, config, notes)
    shapes = {tensor.name: tensor.shape for tensor in stored}
    layout = layout_of(language_config(config), shapes)
    cuts: dict[str, Cut] = {}
    skipped: dict[str, Skipped] = {}
    for tensor in stored:
        name = tensor.name
        reason = _flat(name) or codes.get(name)
        outcome = reason or cuts_or_reason(tensor, layout)
        if isinstance(outcome, str):
            unreadable = bool(reason) or outcome == NO_ENTRIES
            skipped[name] = Skipped(
                name, tensor.shape, tensor.dtype, outcome, unreadable
            )
            continue
        for cut in outcome:
            known = cuts.setdefault(cut.matrix.name, cut)
            if known is not cut:
                raise ValueError(
                    f"{path} holds {cut.matrix.name} twice, in {known.tensor.name} and "
                    f"in {name}, expected it once; remove one"
                )
    files = tuple(dict.fromkeys(f for t in stored for f in t.place.files()))
    tied = _tie(cuts, skipped, config)
    return Checkpoint(
        path, _sorted(cuts), _sorted(skipped), notes, files, tied, families_of(config)
    )


def _sorted(found: Mapping[str, Item]) -> dict[str, Item]:
    return {name: found[name] for name in sorted(found, key=natural)}


def _flat(name: str) -> str:
    leaf = name.rpartition(".")[2]
    if re.fullmatch(r"_?flat_params?(_\d+)?|_flat.*", leaf):
        return "a flat parameter of FSDP, all weights of a module in one row"
    return ""


def _tie(
    cuts: dict[str, Cut], skipped: dict[str, Skipped], config: dict[str, Any]
) -> str:
    """Take heads and embeddings that equal the first embedding out of the matrices.

    Returns:
        The embedding that is the head as well, or nothing.
    """

    def of_role(role: str) -> list[Cut]:
        found = [c for c in cuts.values() if c.matrix.role == role]
        return [c for c in found if c.matrix.part == "language"]

    embeds, heads = of_role("embed"), of_role("head")
    if not embeds:
        return ""
    # The outermost: T5's shared one may stand behind its copies.
    embeds.sort(key=lambda cut: (cut.matrix.name.count("."), natural(cut.matrix.name)))
    first = embeds[0]
    for cut in (*embeds[1:], *heads):
        if _equal(first, cut):
            copy = cut.matrix
            del cuts[copy.name]
            skipped[copy.name] = Skipped(copy.name, copy.shape, copy.dtype, TIED)
    tied = language_config(config).get("tie_word_embeddings") is True
    tied = tied if not heads else len(heads) == 1 and heads[0].matrix.name in skipped
    return first.matrix.name if tied and len(of_role("embed")) == 1 else ""


def _equal(a: Cut, b: Cut) -> bool:
    """Whether two matrices hold the same values, read a part at a time."""
    if a.matrix.shape != b.matrix.shape or a.matrix.dtype != b.matrix.dtype:
        return False
    for start in range(0, a.matrix.shape[0], CHUNK_ROWS):
        rows = slice(start, min(start + CHUNK_ROWS, a.matrix.shape[0]))
        if not torch.equal(replace(a, rows=rows).read(), replace(b, rows=rows).read()):
            return False
    return True


# --- adapters ----------------------------------------------------------------------


def _with_adapter(
    path: Path, adapter: Adapter, base: Source | None, dequantise: bool
) -> Checkpoint:
    """A base with an adapter merged, or the adapter's updates where there is none."""
    base = base if base is not None else _known_base(adapter)
    if base is None:
        return _updates_alone(path, adapter)
    whole = open_checkpoint(base, None, dequantise)
    replaced = _contents(adapter.path, adapter.replaced, {}, (), False)
    cuts, notes = adapters.merged(whole.cuts, adapter, replaced.cuts)
    said = f"{adapter.path}: an adapter, merged into {whole.path} as PEFT merges it"
    return replace(
        whole,
        path=path,
        cuts=_sorted(cuts),
        notes=(said, *notes),
        files=tuple(dict.fromkeys([*whole.files, *adapter.files(), *replaced.files])),
    )


def _known_base(adapter: Adapter) -> Path | None:
    """The base that the adapter's config names, where it is a path on this machine."""
    place = Path(os.path.expanduser(adapter.base))  # of no such user: as it is
    return place if adapter.base and place.exists() else None


def _updates_alone(path: Path, adapter: Adapter) -> Checkpoint:
    cuts = _sorted(adapters.alone(adapter))
    if not cuts:
        raise ValueError(
            f"{path} is an adapter whose update is not known without its base "
            f"({adapter.base or 'not named'}), expected that; name it with --base"
        )
    notes = [f"{path}: an adapter without its base, so its updates alone"]
    n_whole = len(adapter.stacks) + len(adapter.replaced)
    if n_whole:
        notes.append(
            f"{path}: {n_whole} stacks of experts or whole tensors of the adapter are "
            "left out, whose base has to be named with --base"
        )
    files = tuple(dict.fromkeys(adapter.files()))
    return Checkpoint(path, cuts, {}, tuple(notes), files)


def _unmerged(path: Path, place: Path, stored: list[Stored]) -> Adapter | None:
    """The adapter that lies unmerged among whole weights, if there is one."""
    mixed = [t for t in stored if ".lora_A." in t.name or ".lora_embedding_A" in t.name]
    if not mixed:
        return None
    for folder in (place, place / "lora_adapter", place.parent / "lora_adapter"):
        if (folder / ADAPTER_CONFIG).is_file():
            config = json_object(folder / ADAPTER_CONFIG)
            factors = [t for t in stored if "lora_" in t.name]
            return adapters.adapter_of(path, config, factors)
    raise ValueError(
        f"{path} holds an adapter that is not merged ({mixed[0].name}) and no "
        f"{ADAPTER_CONFIG}, which says how much of it counts, expected both; copy "
        "it beside the weights, or merge with PEFT's merge_and_unload"
    )


def _without_base_layer(tensor: Stored) -> Stored:
    name = tensor.name.removeprefix(adapters.PREFIX).replace(".base_layer.", ".")
    return replace(tensor, name=name)


# --- lists -------------------------------------------------------------------------


def list_matrices(path: Source) -> list[Matrix]:
    """Matrices of a checkpoint, from its headers alone.

    Args:
        path: as `open_checkpoint`.

    Returns:
        The matrices in natural order of their names (layer 2 before layer 10).

    Raises:
        FileNotFoundError, ValueError: as `open_checkpoint`.
    """
    return [cut.matrix for cut in open_checkpoint(path).cuts.values()]


def list_skipped(path: Source) -> list[Skipped]:
    """Tensors of a checkpoint that are not measured, each with the reason.

    Args:
        path: as `open_checkpoint`.

    Returns:
        The other tensors in natural order of their names.

    Raises:
        FileNotFoundError, ValueError: as `open_checkpoint`.
    """
    return list(open_checkpoint(path).skipped.values())


def list_files(path: Source) -> list[Path]:
    """The files of a checkpoint that hold its tensors.

    Args:
        path: as `open_checkpoint`.

    Raises:
        FileNotFoundError, ValueError: as `open_checkpoint`.
    """
    return sorted(open_checkpoint(path).files)


def read_matrix(path: Source, name: str) -> Tensor:
    """One matrix of a checkpoint, by the name that `list_matrices` gives it.

    Args:
        path: as `open_checkpoint`.
        name: of a matrix.

    Returns:
        (n_rows, n_cols) in the stored dtype, in memory of its own.

    Raises:
        FileNotFoundError, ValueError: as `open_checkpoint`; no matrix of that name.
    """
    found = open_checkpoint(path)
    if name not in found.cuts:
        why = found.skipped.get(name)
        reason = f"it is skipped: {why.reason}" if why else "no such tensor"
        raise ValueError(
            f"{found.path} has no matrix {name!r} ({reason}), "
            "expected a name of list_matrices(path)"
        )
    return found.cuts[name].read()


def missing_names(before: Source, after: Source) -> tuple[list[str], list[str]]:
    """Names that only one of two checkpoints has, tied heads left out.

    Args:
        before, after: as `open_checkpoint`.

    Returns:
        (only in before, only in after), matrices and skipped tensors alike.

    Raises:
        FileNotFoundError, ValueError: as `open_checkpoint`.
    """
    return pairing(open_checkpoint(before), open_checkpoint(after)).only


# --- pairs -------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairing:
    """What of two checkpoints belongs together.

    Attributes:
        pairs: in natural order of the names before.
        names: of before to that of after, where both have it, read or not.
        only: names of before alone, and of after alone.
        differing: matrices of equal names whose shapes do not fit.
        unreadable: matrices of either side that the other holds in a form that cannot
            be read.
        measured: share of the weights of the fuller side that `pairs` cover.
    """

    pairs: list[StoredPair]
    names: dict[str, str]
    only: tuple[list[str], list[str]]
    differing: list[tuple[Matrix, Matrix]]
    unreadable: tuple[set[str], set[str]]
    measured: float


@dataclass(frozen=True)
class Wanted:
    """Which matrices count.

    Attributes:
        roles: only these; None for all.
        parts: of the model, only these; None for all.

    Raises:
        ValueError: a name that is not known.
    """

    roles: Collection[str] | None = None
    parts: Collection[str] | None = None

    def __post_init__(self) -> None:
        for what, known in (("roles", ALL_ROLES), ("parts", {*PARTS})):
            names = getattr(self, what)
            if isinstance(names, str) or not {*(names or ())} <= known:
                raise ValueError(
                    f"{what} = {names!r}, expected a collection out of {sorted(known)}"
                )

    def __contains__(self, matrix: Matrix) -> bool:
        return (self.roles is None or matrix.role in self.roles) and (
            self.parts is None or matrix.part in self.parts
        )

    def described(self) -> dict[str, list[str] | None]:
        """The two, as JSON can hold them."""
        return {
            what: None if names is None else sorted(names)
            for what, names in vars(self).items()
        }


ALL = Wanted()


def pairing(before: Checkpoint, after: Checkpoint, wanted: Wanted = ALL) -> Pairing:
    """Which matrices of two checkpoints belong together.

    Args:
        before, after: open.
        wanted: only these.
    """
    shapes = _shapes(before, wanted), _shapes(after, wanted)
    names = match(*shapes, tuple(dict.fromkeys(before.families + after.families)))
    pairs, differing = [], []
    for name, other in names.items():
        cuts = before.cuts.get(name), after.cuts.get(other)
        if cuts[0] is None or cuts[1] is None:
            continue
        if pair := _pair(cuts[0], cuts[1]):
            pairs.append(pair)
        else:
            differing.append((cuts[0].matrix, cuts[1].matrix))
    pairs += _tied_pairs((before, after), wanted)
    paired = [{pair.cuts[i].matrix.name for pair in pairs} for i in (0, 1)]
    only = (
        [n for n in shapes[0] if n not in paired[0] and n not in names],
        [n for n in shapes[1] if n not in paired[1] | {*names.values()}],
    )
    unreadable = _unread(before, after, paired[0]), _unread(after, before, paired[1])
    share = _share((before, after), pairs, wanted)
    return Pairing(pairs, names, only, differing, unreadable, share)


def _shapes(side: Checkpoint, wanted: Wanted) -> dict[str, tuple[int, ...]]:
    """Name to what must agree for two names of one form to be the same matrix."""
    found: dict[str, tuple[int, ...]] = {}
    for name, cut in side.cuts.items():
        if cut.matrix in wanted:
            # Vocabularies are resized and padded: their rows may differ.
            vocabulary = cut.matrix.role in ("embed", "head")
            found[name] = cut.matrix.shape[1:] if vocabulary else cut.matrix.shape
    if wanted == ALL:
        found |= {
            name: skip.shape
            for name, skip in side.skipped.items()
            if skip.reason != TIED and not skip.unreadable
        }
    return found


def _pair(a: Cut, b: Cut, note: str = "") -> StoredPair | None:
    """Two cuts as a pair, of their common rows if that is all; None if they differ."""
    notes = [note] if note else []
    if a.matrix.shape != b.matrix.shape:
        vocabulary = {a.matrix.role, b.matrix.role} <= {"embed", "head"}
        if not vocabulary or a.matrix.shape[1] != b.matrix.shape[1]:
            return None
        n = min(a.matrix.shape[0], b.matrix.shape[0])
        notes.append(
            f"the first {n} rows, of {a.matrix.shape[0]} before and "
            f"{b.matrix.shape[0]} after (another vocabulary)"
        )
        a, b = first_rows(a, n), first_rows(b, n)
    for side, place in (("before", a.tensor.place), ("after", b.tensor.place)):
        if said := getattr(place, "note", ""):
            notes.append(f"{side}: {said}")
    note = "; ".join(notes)
    name = a.matrix.name
    if name != b.matrix.name and normal_form(name) == normal_form(b.matrix.name):
        name = unwrapped(name)
    before, after = replace(a.matrix, name=name), replace(b.matrix, name=name)
    return StoredPair(before, after, (a, b), note)


def first_rows(cut: Cut, n: int) -> Cut:
    """The first rows of a matrix."""
    matrix = replace(cut.matrix, shape=(n, cut.matrix.shape[1]))
    if isinstance(cut, AdaptedCut):
        base = None if cut.base is None else first_rows(cut.base, n)
        return replace(cut, matrix=matrix, base=base, of_rows=slice(0, n))
    return replace(cut, matrix=matrix, rows=slice(0, n))


def _tied_pairs(
    sides: tuple[Checkpoint, Checkpoint], wanted: Wanted
) -> list[StoredPair]:
    """A head that one side has, and the embedding that it is on the other."""
    heads = [
        [
            c
            for c in side.cuts.values()
            if c.matrix.role == "head" and c.matrix in wanted
        ]
        for side in sides
    ]
    heads = [[c for c in side if c.matrix.part == "language"] for side in heads]
    for i, note in enumerate((TIED_BEFORE, TIED_AFTER)):
        if len(heads[1 - i]) == 1 and not heads[i] and sides[i].tied:
            head, embed = heads[1 - i][0], sides[i].cuts[sides[i].tied]
            renamed = replace(embed.matrix, name=head.matrix.name, role="head")
            embed = replace(embed, matrix=renamed)
            pair = _pair(head, embed, note) if i else _pair(embed, head, note)
            return [pair] if pair else []
    return []


def _unread(side: Checkpoint, other: Checkpoint, paired: set[str]) -> set[str]:
    """Matrices of one side whose module the other has in a form that is not read."""
    modules = {
        normal_form(quantised.module_of(name) + ".weight")
        for name, skip in other.skipped.items()
        if skip.unreadable
    }
    modules |= {normal_form(name) for name, s in other.skipped.items() if s.unreadable}
    stacks = {name.removesuffix(".weight") for name in modules}
    found = set()
    for name, cut in side.cuts.items():
        forms = normal_form(name), normal_form(cut.tensor.name)
        stack = forms[0].partition(".experts.")[0] + ".experts"
        if name not in paired and (modules & {*forms} or stack in stacks):
            found.add(name)
    return found


def _share(
    sides: tuple[Checkpoint, Checkpoint], pairs: list[StoredPair], wanted: Wanted
) -> float:
    """Of the weights of the fuller side, which share is measured."""
    roles = wanted.roles
    if wanted.parts is None:
        wanted = Wanted(roles, {pair.before.part for pair in pairs})
    totals = []
    for side in sides:
        matrices = (cut.matrix for cut in side.cuts.values())
        total = sum(math.prod(matrix.shape) for matrix in matrices if matrix in wanted)
        for name, skip in side.skipped.items():
            role = role_of(quantised.module_of(name).split("."))
            if skip.unreadable and (roles is None or role in roles):
                total += _entries(name, skip)
        totals.append(total)
    measured = sum(math.prod(pair.before.shape) for pair in pairs)
    return measured / max(1, *totals)


def _entries(name: str, skip: Skipped) -> int:
    """Weights of a tensor that cannot be read: none of a scale's."""
    if "scale" in name.rpartition(".")[2] or len(skip.shape) < 2:
        return 0
    packed = 8 if skip.dtype in ("I32", "U32") else 1  # mostly four bits each
    return packed * math.prod(skip.shape)


def list_pairs(
    before: Source,
    after: Source,
    roles: Collection[str] | None = None,
    missing: str = "raise",
) -> list[StoredPair]:
    """Matching matrices of two checkpoints, from their headers alone.

    Args:
        before: as `open_checkpoint`.
        after: as `open_checkpoint`.
        roles: only these roles, such as ("q", "k", "v", "o"); None for all.
        missing: "raise" when a matrix is on one side only, or "skip" to go on with
            the common ones (`missing_names` lists the rest).

    Returns:
        Pairs in natural order of their names.

    Raises:
        FileNotFoundError, ValueError: as `open_checkpoint`; shapes differ, matrices
            are missing, no matrix is left, or an argument is unknown.
    """
    if missing not in ("raise", "skip"):
        raise ValueError(f"missing = {missing!r}, expected 'raise' or 'skip'")
    wanted = Wanted(roles)
    a, b = open_pair(before, after)
    found = pairing(a, b, wanted)
    if missing == "raise":
        known = found.names.items()
        skipped = [n for n, other in known if n in a.cuts and other not in b.cuts]
        _refuse_missing([n for n in found.only[0] if n in a.cuts] or skipped, a, b)
        _refuse_missing([n for n in found.only[1] if n in b.cuts], b, a)
    if not found.pairs and not found.differing:
        raise ValueError(diagnosis(a, b, found))
    refuse_shapes(found.differing, a, b)
    return found.pairs


def iter_pairs(
    before: Source,
    after: Source,
    roles: Collection[str] | None = None,
    missing: str = "raise",
) -> Iterator[MatrixPair]:
    """Matching matrices of two checkpoints, read one pair at a time.

    Names and shapes are checked at the call, before the first tensor is read.

    Args:
        before, after, roles, missing: as `list_pairs`.

    Returns:
        Iterator over (name, role, layer, w_before, w_after), in natural order.

    Raises:
        FileNotFoundError, ValueError: as `list_pairs`.
    """
    pairs = list_pairs(before, after, roles, missing)
    return (
        MatrixPair(p.before.name, p.before.role, p.before.layer, *p.read())
        for p in pairs
    )


def open_pair(
    before: Source,
    after: Source,
    base: Source | None = None,
    dequantise: bool = False,
) -> tuple[Checkpoint, Checkpoint]:
    """Two checkpoints; an adapter as the later one is merged into the earlier.

    Args:
        before, after: as `open_checkpoint`.
        base: of adapters; None for the earlier checkpoint, or what they name.
        dequantise: as `open_checkpoint`.

    Raises:
        FileNotFoundError, ValueError: as `open_checkpoint`.
    """
    a = open_checkpoint(before, base, dequantise)
    if base is None and not isinstance(after, Checkpoint) and not _is_adapter(before):
        base = a
    b = open_checkpoint(after, base, dequantise)
    if a.baseless != b.baseless:
        one, other = (a, b) if a.baseless else (b, a)
        raise ValueError(
            f"{one.path} is an adapter whose base is not here, and {other.path} has "
            "whole weights: an update and weights cannot be compared; name the base "
            "with --base"
        )
    return a, b


def _is_adapter(source: Source) -> bool:
    if isinstance(source, Checkpoint):
        source = source.path
    return adapters.adapter_in(Path(source)) is not None


def _refuse_missing(absent: list[str], side: Checkpoint, other: Checkpoint) -> None:
    if not absent:
        return
    why = other.skipped.get(absent[0])
    raise ValueError(
        f"{len(absent)} matrices of {side.path} are not in {other.path}, first "
        f"{absent[0]}"
        + (f" (skipped there: {why.reason})" if why else "")
        + ", expected the same names; pass missing='skip' for the common ones"
    )


def refuse_shapes(
    differing: list[tuple[Matrix, Matrix]], before: Checkpoint, after: Checkpoint
) -> None:
    """Refuse matrices of one name and two shapes.

    Raises:
        ValueError: there are some.
    """
    if differing:
        a, b = differing[0]
        raise ValueError(
            f"{len(differing)} matrices differ in shape, first {a.name}: {a.shape} in "
            f"{before.path} and {b.shape} in {after.path}, expected equal sizes: two "
            "checkpoints of one architecture; leave their roles out with --roles"
        )


# --- diagnosis ---------------------------------------------------------------------


OTHER_ROTARY = (
    "wq and wk of Llama's own files have their rows in another order than "
    "q_proj and k_proj: convert with transformers' script of the family"
)


def diagnosis(before: Checkpoint, after: Checkpoint, found: Pairing) -> str:
    """Why two checkpoints do not pair, and what would help, in one line."""
    n = [len(side.cuts) for side in (before, after)]
    said = (
        f"{before.path} and {after.path} have "
        + (f"{len(found.pairs)} matrices" if found.pairs else "no matrix")
        + f" in common out of {n[0]} and {n[1]}, expected two checkpoints of one "
        "architecture"
    )
    for which, side, only in zip(
        ("BEFORE", "AFTER"), (before, after), found.only, strict=True
    ):
        said += "; " + _side_of_diagnosis(which, side, only)
    return f"{said}; {_remedy(before, after)}"


def nothing_to_measure(side: Checkpoint) -> str:
    """That a checkpoint has no matrix, what it has instead, and what would help."""
    skips = [skip for skip in side.skipped.values() if skip.unreadable]
    has = _side_of_diagnosis("it", side, []).partition(": ")[2] if skips else ""
    remedy = _remedy(side, side) if skips else "check that it is the whole checkpoint"
    return (
        f"{side.path} has no weight matrix{f' but {has}' * bool(has)}, expected a "
        f"model's weights, some of them of two dimensions; {remedy}"
    )


def _side_of_diagnosis(which: str, side: Checkpoint, only: list[str]) -> str:
    reasons: dict[str, list[str]] = {}
    for skip in side.skipped.values():
        if skip.unreadable:
            reasons.setdefault(skip.reason, []).append(skip.name)
    found = [f"{len(names)} skipped ({reason})" for reason, names in reasons.items()]
    alone = [name for name in only if name in side.cuts]
    if alone:
        found.append(f"{len(alone)} there alone, first {', '.join(alone[:2])}")
    return f"{which}: {', '.join(found) or 'nothing of its own'}"


def _remedy(before: Checkpoint, after: Checkpoint) -> str:
    skips = [
        s for side in (before, after) for s in side.skipped.values() if s.unreadable
    ]
    if any("quantised" in s.reason for s in skips):
        return (
            "measure the checkpoint before it was quantised, or try --dequantise "
            "(FP8 and MXFP4 with their scales, compressed-tensors)"
        )
    if any("flat parameter" in s.reason for s in skips):
        return "save with StateDictType.FULL_STATE_DICT, or the trainer's own merge"
    if any("no entries" in s.reason for s in skips):
        return "gather the weights first, with python zero_to_fp32.py DIR OUT"
    if any(ROTARY & {*name.split(".")} for name in (*before.cuts, *after.cuts)):
        return OTHER_ROTARY
    return "give checkpoints of one model, or say with --roles which matrices count"

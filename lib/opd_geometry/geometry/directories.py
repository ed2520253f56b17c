"""What a path holds: which of its files are the checkpoint, and what was left aside."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from opd_geometry.geometry import gguf_format
from opd_geometry.geometry.storage import Stored, header, metadata, put_together
from opd_geometry.geometry.training_formats import (
    RANK_FILE,
    from_dcp,
    from_ranks,
    pickled,
    rank_files,
)

INDEX_NAME = "model.safetensors.index.json"
WHOLE_NAME = "model.safetensors"
WHOLE_NAMES = (WHOLE_NAME, INDEX_NAME, "pytorch_model.bin")
ADAPTER_CONFIG = "adapter_config.json"
JSON_BYTES = 2**28  # no index is larger
# Where trainers put the weights below the directory of a step.
NESTED = (
    "pytorch_model_fsdp_0",
    "actor",
    "actor/huggingface",
    "huggingface",
    "policy",
    "policy/weights/model",
    "policy/weights",
    "weights/model",
    "weights",
    "model",
    "model/huggingface",
    "trainer",
    "hf",
)
SAME_SAVE_NS = 60 * 10**9  # files of one save or copy are no further apart


@dataclass(frozen=True)
class Holdings:
    """The tensors of a checkpoint and where they were found.

    Attributes:
        tensors: as the headers describe them.
        place: the directory that config.json is looked for in.
        notes: what a reader would want to know of the choice.
    """

    tensors: list[Stored]
    place: Path
    notes: tuple[str, ...] = ()


def holdings(path: Path) -> Holdings:
    """The tensors of a checkpoint, from the headers of its files.

    Args:
        path: a directory as a trainer leaves it, a .safetensors file, an index, or a
            file of torch.save.

    Raises:
        FileNotFoundError: no such path, or a file of an index is missing.
        ValueError: nothing that can be read, damaged files, or files that disagree.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist, expected a checkpoint directory or a "
            ".safetensors file; check the path"
        )
    if path.is_dir():
        return _directory(path)
    if not path.is_file():
        raise ValueError(
            f"{path} is no regular file, expected a checkpoint; give a file or a "
            "directory"
        )
    return _file(path)


def _file(path: Path) -> Holdings:
    if ".safetensors.index" in path.name and path.suffix == ".json":
        notes: list[str] = []
        tensors = _indexed(path, notes)
        return Holdings(tensors, path.parent, tuple(notes))
    if match := RANK_FILE.fullmatch(path.name):
        if match["world"] and match["world"] != "1":
            raise ValueError(
                f"{path} is the share of one rank of {match['world']}, expected all of "
                f"them; give the directory {path.parent}"
            )
        return Holdings(pickled(path), path.parent)
    if path.suffix == ".distcp":
        raise ValueError(
            f"{path} is a part of a distributed checkpoint, expected the whole; give "
            f"the directory {path.parent}"
        )
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return Holdings(pickled(path), path.parent)
    if path.suffix == ".gguf":
        return Holdings(gguf_format.tensors(path), path.parent)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is no .safetensors file, and nothing else of that name is read; "
            "convert it with save_pretrained"
        )
    _refuse_pointer(path)
    return Holdings(_refuse_slices(header(path), path), path.parent)


def _directory(path: Path) -> Holdings:
    notes: list[str] = []
    tensors = _own(path, notes)
    if tensors is not None:
        return Holdings(tensors, path, tuple(notes))
    inner = [path / name for name in NESTED if (path / name).is_dir()]
    for place in inner:
        tensors = _own(place, notes)
        if tensors is not None:
            notes.insert(0, f"{path}: read from {place.relative_to(path)}")
            return Holdings(tensors, place, tuple(notes))
    raise ValueError(_nothing(path))


def _own(path: Path, notes: list[str]) -> list[Stored] | None:
    """The tensors that lie in a directory itself; None where there are none."""
    found = _safetensors(path, notes)
    if found is not None:
        return found
    if is_megatron(path):
        raise ValueError(f"{path} is {MEGATRON}")
    if (path / ".metadata").is_file():
        return from_dcp(path)
    if ranks := rank_files(path):
        return from_ranks(ranks)
    return _pickles(path, notes) or _gguf(path, notes)


def _gguf(path: Path, notes: list[str]) -> list[Stored] | None:
    """The only GGUF of a directory without other weights."""
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        return None
    notes.append(f"{path}: read from {files[0].name}")
    return gguf_format.tensors(files[0])


MEGATRON = (
    "a checkpoint of Megatron's torch_dist format, whose layers and projections are "
    "named and fused in its own way, expected Hugging Face names; convert it with the "
    "trainer's tool (slime: tools/convert_torch_dist_to_hf.py; verl: python -m "
    "verl.model_merger merge --backend megatron; else Megatron Bridge's export)"
)


def is_megatron(path: Path) -> bool:
    """Whether Megatron has written a directory in its distributed format."""
    if (path / "common.pt").is_file() and any(path.glob("*.distcp")):
        return True
    said = path / "metadata.json"
    return said.is_file() and "torch_dist" in said.read_text(errors="replace")[:4096]


# --- safetensors -------------------------------------------------------------------


def _safetensors(path: Path, notes: list[str]) -> list[Stored] | None:
    _refuse_folders(path)
    whole, index = path / WHOLE_NAME, path / INDEX_NAME
    variants = sorted(path.glob("model.safetensors.index.*.json"))
    if not index.is_file() and not whole.is_file() and len(variants) == 1:
        index = variants[0]
        notes.append(f"{path}: read by {index.name}")
    if index.is_file() and (not whole.is_file() or _prefers_index(whole, index, notes)):
        return _indexed(index, notes)
    if whole.is_file():
        _refuse_pointer(whole)
        return _refuse_slices(header(whole), whole)
    files = [f for f in sorted(path.glob("*.safetensors")) if f.is_file()]
    files = [f for f in files if not f.name.startswith("adapter_")]
    if not files:
        return None
    for file in files:
        _refuse_pointer(file)
    if any("DCP_SHARDING_INFO" in metadata(file) for file in files):
        return _from_slices(files)
    if len(files) == 1:
        return header(files[0])
    return _without_index(path, files, notes)


# What is a file in every checkpoint: a pipe of that name would be waited for.
FILES = re.compile(
    r"(model|pytorch_model|adapter_model)[\w.-]*\.(safetensors|bin|json)|config\.json|"
    r"adapter_config\.json|\.metadata|model_world_size_.*\.pt|.*\.(gguf|distcp)"
)


def _refuse_folders(path: Path) -> None:
    for place in sorted(path.iterdir()):
        if FILES.fullmatch(place.name) and place.exists() and not place.is_file():
            raise ValueError(f"{place} is no regular file, expected one; remove it")


def _prefers_index(whole: Path, index: Path, notes: list[str]) -> bool:
    """Whether the index's shards count, where a whole file lies beside them."""
    place = index.parent
    shards = {str(shard) for shard in _weight_map(index).values()}
    lacking = sorted(s for s in shards if not (place / s).is_file())
    if lacking:
        notes.append(
            f"{place}: read from {whole.name}; {index.name} beside it names "
            f"{lacking[0]}, which is not there"
        )
        return False
    later = whole.stat().st_mtime_ns - index.stat().st_mtime_ns
    if later > SAME_SAVE_NS:
        notes.append(f"{place}: read from {whole.name}, which is newer than the shards")
        return False
    notes.append(
        f"{place}: read from the {len(shards)} shards of {index.name}; {whole.name} "
        "beside them is left aside"
    )
    return True


def _weight_map(index: Path) -> dict[str, Any]:
    found = json_object(index)
    _refuse_delta(index, found.get("metadata"))
    weight_map = found.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map, expected one; copy it again")
    return weight_map


def _refuse_delta(file: Path, described: Any) -> None:
    if isinstance(described, dict) and "delta_encoding" in described:
        raise ValueError(
            f"{file} is of a delta checkpoint ({described['delta_encoding']!r} of the "
            f"bytes of version {described.get('base_version')}), expected weights: "
            "its tensors are differences of bytes; give a full version"
        )


def _indexed(index: Path, notes: list[str]) -> list[Stored]:
    """Tensors of the shards, checked against their index in both directions."""
    path = index.parent
    shard_of: dict[str, str] = {}
    for name, shard in _weight_map(index).items():
        inside = isinstance(shard, str) and PurePosixPath(shard)
        if not inside or inside.is_absolute() or ".." in inside.parts:
            raise ValueError(
                f"{index} places {name} in {shard!r}, "
                "expected the name of a file in the same directory"
            )
        shard_of[name] = shard
    shards = sorted({*shard_of.values()})
    absent = [shard for shard in shards if not (path / shard).is_file()]
    if absent:
        return _despite_index(index, absent, len(shards), notes)
    _check_strays(index, shards, notes)
    return _of_shards(index, shards, shard_of, notes)


def _despite_index(
    index: Path, absent: list[str], n_shards: int, notes: list[str]
) -> list[Stored]:
    """The shards of another complete set, where the index names files that are not."""
    path = index.parent
    complete = _complete_set([f for f in path.glob("*.safetensors") if f.is_file()])
    if len(absent) < n_shards or not complete:
        raise FileNotFoundError(
            f"{path} lacks {len(absent)} of {n_shards} shards of its index, first "
            f"{absent[0]}; copy it again"
        )
    notes.append(
        f"{path}: {index.name} names {absent[0]}, which is not there; read from the "
        f"{len(complete)} shards that are, which are all of their number"
    )
    return _union(complete)


SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.(?:safetensors|bin)")


def _complete_set(files: Iterable[Path]) -> list[Path]:
    """The only complete set of shards among files, as their names have it."""
    sets: dict[tuple[str, int], dict[int, Path]] = defaultdict(dict)
    for file in files:
        if match := SHARD.fullmatch(file.name):
            sets[match[1], int(match[3])][int(match[2])] = file
    complete = [
        [found[i] for i in sorted(found)]
        for (_, n), found in sets.items()
        if {*found} in ({*range(1, n + 1)}, {*range(n)})
    ]
    return complete[0] if len(complete) == 1 else []


def _check_strays(index: Path, shards: list[str], notes: list[str]) -> None:
    """Shards beside those of the index: of another save, or lost from the index."""
    numbers = {m[3] for shard in shards if (m := SHARD.fullmatch(Path(shard).name))}
    beside = {f.name for f in index.parent.glob("model-*-of-*.safetensors")}
    strays = sorted(beside - {*shards})
    lost = [s for s in strays if (m := SHARD.fullmatch(s)) and m[3] in numbers]
    if lost:
        raise ValueError(
            f"{index} does not name the shard {lost[0]} beside it, "
            "expected every shard; remove the file or copy the right index"
        )
    if strays:
        notes.append(
            f"{index.parent}: read from the shards of {index.name}; {len(strays)} of "
            f"another save beside them are left aside, first {strays[0]}"
        )


def _of_shards(
    index: Path, shards: list[str], shard_of: dict[str, str], notes: list[str]
) -> list[Stored]:
    found: list[Stored] = []
    for shard in shards:
        file = index.parent / shard
        _refuse_pointer(file)
        tensors = {tensor.name: tensor for tensor in header(file)}
        expected = {name for name, place in shard_of.items() if place == shard}
        lacking = sorted(expected - {*tensors}) or sorted({*tensors} - {*shard_of})
        if lacking:
            side = "lacks" if lacking[0] in expected else "holds"
            raise ValueError(
                f"{file} {side} {lacking[0]}, against its index; copy the checkpoint "
                "again"
            )
        twice = sorted({*tensors} - expected)
        if twice:
            notes.append(
                f"{file} also holds {twice[0]}, which {index.name} has in "
                f"{shard_of[twice[0]]}: read from there"
            )
        found += [tensors[name] for name in tensors if name in expected]
    return found


def _without_index(path: Path, files: list[Path], notes: list[str]) -> list[Stored]:
    complete = _complete_set(files)
    sharded = [f for f in files if SHARD.fullmatch(f.name)]
    if complete and len(sharded) == len(complete):
        notes.append(f"{path}: read from {len(complete)} shards, without an index")
        return _union(complete)
    if not sharded:
        try:
            tensors = _union(files)
        except ValueError:
            tensors = []
        if tensors:
            notes.append(
                f"{path}: read from {len(files)} files without an index, none of whose "
                "tensors has two of them"
            )
            return tensors
    raise ValueError(
        f"{path} holds {len(files)} .safetensors files and no {INDEX_NAME}, "
        "expected one file or an index; "
        + (
            "some shards are missing, copy it again"
            if sharded
            else "give one of the files, or merge them with the tool that wrote them "
            "if each is the share of a rank"
        )
    )


def _union(files: Iterable[Path]) -> list[Stored]:
    found: dict[str, Stored] = {}
    for file in files:
        for tensor in header(file):
            if tensor.name in found:
                first = found[tensor.name].place.files()[0].name
                raise ValueError(
                    f"{file.parent} holds {tensor.name} in {first} and in {file.name}, "
                    "expected it once; remove one or add an index"
                )
            found[tensor.name] = tensor
    return list(found.values())


def _refuse_pointer(file: Path) -> None:
    with file.open("rb") as stream:
        head = stream.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{file} is a pointer of git-lfs and holds no weights, expected the file "
            "itself; fetch it with git lfs pull"
        )


# --- slices of a distributed save --------------------------------------------------


def _offsets(file: Path) -> dict[str, tuple[int, ...]]:
    """Where the slices of a file lie in their tensors."""
    try:
        said = json.loads(metadata(file).get("DCP_SHARDING_INFO", "null"))
        return {name: tuple(map(int, s["saved_offsets"])) for name, s in said.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} says in DCP_SHARDING_INFO that it holds slices, and not where "
            "they lie; save it again"
        ) from error


def _from_slices(files: list[Path]) -> list[Stored]:
    """Tensors of which every file holds a slice, put together by the offsets."""
    pieces: dict[str, list[tuple[Any, Any, Any]]] = defaultdict(list)
    dtypes: dict[str, str] = {}
    for file in files:
        offsets = _offsets(file)
        for tensor in header(file):
            if tensor.name not in offsets:
                raise ValueError(
                    f"{file} does not say where {tensor.name} lies in its tensor, "
                    "expected offsets of every slice; save it again"
                )
            where = offsets[tensor.name]
            pieces[tensor.name].append((where, tensor.shape, tensor.place))
            dtypes[tensor.name] = tensor.dtype
    found = []
    for name, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        n_axes = len(parts[0][0])
        shape = tuple(
            max((o[i] + s[i] for o, s, _ in parts if len(o) == len(s) == n_axes))
            for i in range(n_axes)
        )
        folder, rest = files[0].parent, "expected every file of a distributed save, "
        rest += "copy the rest"
        found.append(put_together(folder, name, shape, dtypes[name], parts, rest))
    return found


def _refuse_slices(tensors: list[Stored], file: Path) -> list[Stored]:
    """Tensors of one file, unless they are slices whose rest lies elsewhere."""
    _refuse_delta(file, metadata(file))
    if "DCP_SHARDING_INFO" not in metadata(file):
        return tensors
    offsets = _offsets(file)
    names = {tensor.name for tensor in tensors if tensor.shape}
    beside = [
        other
        for other in file.parent.glob("*.safetensors")
        if other != file and other.is_file() and "DCP_SHARDING_INFO" in metadata(other)
    ]
    shared = [f for f in beside if names & {tensor.name for tensor in header(f)}]
    if shared or any(any(where) for where in offsets.values()):
        raise ValueError(
            f"{file} holds slices of a distributed save (DCP_SHARDING_INFO), expected "
            f"whole tensors; give the directory {file.parent}, with every file of it"
        )
    return tensors


# --- pickles -----------------------------------------------------------------------

PICKLED_INDEX = "pytorch_model.bin.index.json"
PICKLED_WHOLE = ("pytorch_model.bin", "pytorch_model_fsdp.bin")


def _pickles(path: Path, notes: list[str]) -> list[Stored] | None:
    index = path / PICKLED_INDEX
    whole = next((p for p in (path / n for n in PICKLED_WHOLE) if p.is_file()), None)
    if index.is_file():
        weight_map = _weight_map(index)
        files = sorted({path / Path(str(shard)).name for shard in weight_map.values()})
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise FileNotFoundError(
                f"{path} lacks {len(absent)} of {len(files)} files of its index, first "
                f"{absent[0]}; copy it again"
            )
    elif whole is not None:
        files = [whole]
    elif not (files := _complete_set(path.glob("pytorch_model-*.bin"))):
        return None
    notes.append(f"{path}: {files[0].name} read by torch's loader of tensors alone")
    found: dict[str, Stored] = {}
    for file in files:
        found |= {tensor.name: tensor for tensor in pickled(file)}
    return list(found.values())


# --- nothing -----------------------------------------------------------------------


def _nothing(path: Path) -> str:
    found, remedy = describe(path)
    return (
        f"{path} holds no .safetensors file"
        + (f" but {found}" if found else "")
        + f", expected a checkpoint; {remedy}"
    )


def describe(path: Path) -> tuple[str, str]:
    """What a directory without readable weights holds, and what to do about it."""
    names = sorted(f.name for f in path.iterdir()) if path.is_dir() else []

    def like(pattern: str) -> list[str]:
        return [name for name in names if re.fullmatch(pattern, name)]

    steps = sorted(
        like(r"(checkpoint|global_step|step|iter|epoch)[-_]?\d+.*"),
        key=lambda name: int(re.search(r"\d+", name)[0]),  # type: ignore[index]
    )
    if (path / "snapshots").is_dir():
        inner = sorted(f.name for f in (path / "snapshots").iterdir())
        last = path / "snapshots" / (inner[-1] if inner else "REVISION")
        return "the hub's snapshots/", f"give {last}"
    if zero := like(r"zero_to_fp32\.py|.*zero_pp_rank.*"):
        return (
            f"DeepSpeed's ZeRO shards ({zero[0]})",
            f"gather them first: python {path}/zero_to_fp32.py {path} OUT",
        )
    if inner := [p.name for p in path.glob("global_step*") if any(p.glob("*zero_pp*"))]:
        return (
            f"DeepSpeed's ZeRO shards ({inner[0]})",
            "gather them first with zero_to_fp32.py",
        )
    if steps:
        stem = re.split(r"\d", steps[0])[0]
        return (
            f"{len(steps)} checkpoints ({steps[0]} to {steps[-1]})",
            f"give one, such as {path / steps[-1]}, or follow all of them: "
            f"opd-geometry trajectory BEFORE {path}/{stem}* --out run.csv",
        )
    if files := like(r".*\.gguf"):
        return f"{len(files)} GGUF files ({files[0]})", f"give one: {path / files[0]}"
    if like(r".*\.distcp"):
        return ".distcp files without their .metadata", "copy the .metadata as well"
    if part := like(r".*\.incomplete"):
        return f"{part[0]}, a download that is not finished", "download it again"
    for place in path.glob("*/adapter_config.json"):
        return f"an adapter in {place.parent.name}/", f"give {place.parent}"
    for place in sorted(path.glob("*")):
        inside = [f.name for f in place.glob("*") if f.suffix != ".json"]
        if any(FILES.fullmatch(name) for name in inside):
            return f"weights in {place.name}/", f"give {place}"
    ranks = like(r"(mp_rank|consolidated|model|rank)[._-]?(rank[._-]?)?\d+\D.*")
    if len(ranks) > 1:
        return (
            f"the shares of {len(ranks)} ranks ({ranks[0]})",
            "merge them with the tool that wrote them",
        )
    if weights := like(r"adapter_model\.(safetensors|bin)"):
        return (
            f"{weights[0]} without {ADAPTER_CONFIG}, which says how much of it counts",
            "copy that as well",
        )
    if foreign := like(r".*\.(msgpack|h5|onnx|npz|nemo|pdparams|tflite|mlx)"):
        return (
            f"{foreign[0]}, a format of another framework",
            "write it as safetensors with the library that made it",
        )
    if pickles := like(r".*\.(bin|pt|pth|ckpt)"):
        return (
            f"{pickles[0]}, whose name is not that of a model",
            f"give the file itself, {path / pickles[0]}, or save with save_pretrained",
        )
    if names == ["config.json"] or "config.json" in names:
        return (
            "config.json and no weights",
            "give the directory that has them (verl: the one above huggingface/), or "
            "save with save_pretrained",
        )
    return (names[0] if names else ""), "save one with save_pretrained"


# --- json --------------------------------------------------------------------------


def json_object(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: it is too large, no JSON, too deep, or holds something else.
    """
    if file.stat().st_size > JSON_BYTES:
        raise ValueError(
            f"{file} has {file.stat().st_size} bytes, expected at most {JSON_BYTES}; "
            "copy it again"
        )
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(
            f"{file} is nested too deeply, expected an object; copy it again"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{file} is not JSON ({error}), expected an object; copy it again"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds no JSON object, expected one; copy it again")
    return value

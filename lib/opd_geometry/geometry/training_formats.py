"""Weights as trainers leave them: pickled tensors, rank files, torch's DCP.

Pickles are read by torch's restricted loader alone, which builds tensors and runs
nothing; an object that it does not know is named and refused. The metadata of DCP is a
pickle as well, and is read with a list of the classes that torch itself writes there.
"""

import importlib
import io
import logging
import pickle
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from opd_geometry.geometry.storage import (
    Index,
    OfFile,
    Stored,
    count_read,
    handle_of,
    put_together,
)

# --- pickled tensors ---------------------------------------------------------------

STATE_KEYS = ("model", "module", "state_dict", "model_state_dict", "app", "policy")


@dataclass(frozen=True)
class Pickled(OfFile):
    """A tensor of a file that torch.save wrote."""

    path: tuple[str, ...]

    def __getitem__(self, index: Index) -> Tensor:
        found: Any = load_archive(self.file)
        for key in self.path:
            found = found[key]
        local = _local(found)
        if not isinstance(index, tuple):
            index = (index,)
        w: Tensor = local.detach()[index].clone(memory_format=torch.contiguous_format)
        count_read(self.file, w.nbytes)
        return w


def load_archive(file: Path) -> Any:
    """What a file of torch.save holds, mapped, through the restricted loader.

    Raises:
        ValueError: it holds more than tensors and plain containers, or is damaged.
    """
    # Registers the tensors of distributed training with the restricted loader.
    importlib.import_module("torch.distributed.tensor")
    # No processes are meant to be here: nothing is looked up among them.
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
    return handle_of(file, _load)


def _load(file: Path) -> Any:
    try:
        return torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except pickle.UnpicklingError as error:
        raise ValueError(_refused(file, str(error))) from error
    except Exception as error:  # a damaged pickle may raise anything at all
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{file} cannot be read ({said}), expected a whole file of torch.save; "
            "copy it again"
        ) from error


def _refused(file: Path, said: str) -> str:
    named = re.search(r"GLOBAL (\S+)", said)
    lines = (
        re.findall(r"WeightsUnpickler error: (.*)", said) or said.strip().splitlines()
    )
    what = named[1] if named else " ".join(lines[:1]).strip() or "another object"
    return (
        f"{file} holds {what}, which is no tensor, expected tensors alone: nothing of "
        "it was loaded or run; save the weights with save_pretrained"
    )


def _local(value: Any) -> Tensor:
    """The tensor itself, of a distributed one this process's share."""
    return value._local_tensor if hasattr(value, "_local_tensor") else value


def dtype_name(dtype: torch.dtype) -> str:
    """As torch names it, less the module."""
    return str(dtype).removeprefix("torch.")


def _tensors_of(found: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, tensor) of every tensor of a nest of dictionaries."""
    if not isinstance(found, Mapping):
        return
    for key, value in found.items():
        if isinstance(value, Tensor):
            yield (str(key),), value
        elif isinstance(value, Mapping):
            yield from (((str(key), *path), t) for path, t in _tensors_of(value))


def pickled(file: Path) -> list[Stored]:
    """Tensors of a file such as pytorch_model.bin.

    Raises:
        ValueError: as `load_archive`; or it holds no tensor.
    """
    found = list(_tensors_of(load_archive(file)))
    if not found:
        raise ValueError(
            f"{file} holds no named tensors, expected a state dict; save the weights "
            "with save_pretrained"
        )
    for path, tensor in found:
        if tuple(_local(tensor).shape) != tuple(tensor.shape):
            raise ValueError(
                f"{file} holds one rank's share of {'.'.join(path)}, expected the "
                f"shares of all; give the directory {file.parent}, with every rank's "
                "file under the name that its trainer gave it"
            )
    return [
        Stored(
            _weight_name(path),
            tuple(tensor.shape),
            dtype_name(tensor.dtype),
            Pickled(file, path),
        )
        for path, tensor in found
        if not is_optimizer(".".join(path))
    ]


def _weight_name(path: tuple[str, ...]) -> str:
    while len(path) > 1 and path[0] in STATE_KEYS:
        path = path[1:]
    return ".".join(path)


_OPTIMIZER = re.compile(
    r"(^|\.)(optim|optimizer|optimizers|optimizer_state\w*|lr_scheduler|scheduler|"
    r"rng_state\w*|dataloader\w*)(\.|$)|\.(exp_avg|exp_avg_sq|max_exp_avg_sq|step)$"
)


def is_optimizer(name: str) -> bool:
    """Whether a tensor belongs to the optimizer, by its name."""
    return _OPTIMIZER.search(name) is not None


# --- rank files of FSDP ------------------------------------------------------------

RANK_FILE = re.compile(  # verl and SkyRL; accelerate without DCP
    r"model_world_size_(?P<world>\d+)_rank_(?P<rank>\d+)\.pt|"
    r"pytorch_model_fsdp(_\d+)?_rank(?P<place>\d+)\.bin"
)


def rank_files(path: Path) -> dict[int, Path]:
    """Rank to file of a checkpoint that has a file a rank; of one world size.

    Raises:
        ValueError: some rank's file is missing, or there are several world sizes.
    """
    found = [(m, f) for f in path.iterdir() if (m := RANK_FILE.fullmatch(f.name))]
    if not found:
        return {}
    sizes = {int(match["world"] or len(found)) for match, _ in found}
    ranks = {int(match["rank"] or match["place"]): file for match, file in found}
    if len(sizes) > 1 or {*ranks} != {*range(min(sizes))}:
        raise ValueError(
            f"{path} holds the files of {len(found)} ranks for a world size of "
            f"{', '.join(map(str, sorted(sizes)))}, expected every rank of one; "
            "copy it again"
        )
    return dict(sorted(ranks.items()))


def from_ranks(ranks: dict[int, Path]) -> list[Stored]:
    """Tensors of FSDP's rank files, put together by where each rank's share lies.

    Args:
        ranks: of `rank_files`.

    Raises:
        ValueError: shares that do not say where they lie, or do not make up a whole.
    """
    first = next(iter(ranks.values()))
    if len(ranks) == 1:
        return pickled(first)
    shares: dict[tuple[str, ...], list[tuple[Any, Any, Pickled]]] = defaultdict(list)
    whole: dict[tuple[str, ...], tuple[tuple[int, ...], str]] = {}
    for rank, file in ranks.items():
        for path, tensor in _tensors_of(load_archive(file)):
            if not hasattr(tensor, "_local_tensor"):
                _refuse_plain(tensor, path, file, len(ranks))
                continue
            whole[path] = tuple(tensor.shape), dtype_name(tensor.dtype)
            if share := _share(tensor, rank, path, file):
                shares[path].append((*share, Pickled(file, path)))
    found = []
    for path, pieces in shares.items():
        stored = put_together(first.parent, ".".join(path), *whole[path], pieces)
        found.append(replace(stored, name=_weight_name(path)))
    return found


def _refuse_plain(tensor: Tensor, path: tuple[str, ...], file: Path, n: int) -> None:
    if tensor.ndim > 1:
        raise ValueError(
            f"{file} holds {'.'.join(path)} as a plain tensor, and {n} ranks have one "
            "each: nothing says how they make up a whole, expected distributed "
            "tensors; merge them with the trainer's own tool "
            "(verl: python -m verl.model_merger merge --backend fsdp)"
        )


def _share(
    tensor: Any, rank: int, path: tuple[str, ...], file: Path
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(offsets, shape) of a rank's share; None where another rank has the same."""
    mesh = tensor._spec.mesh.mesh
    where = (mesh == rank).nonzero()
    if len(where) != 1:
        raise ValueError(
            f"{file} places {'.'.join(path)} on ranks that do not include {rank}, "
            "expected the files of one run; copy it again"
        )
    offsets, shape = [0] * tensor.ndim, list(tensor.shape)
    for i, placement in enumerate(tensor._spec.placements):
        coordinate, n = int(where[0][i]), int(mesh.shape[i])
        kind = type(placement).__name__
        if kind == "Replicate":
            if coordinate:
                return None
        elif kind == "Shard":
            axis = placement.dim
            step = -(-shape[axis] // n)
            start = min(coordinate * step, shape[axis])
            offsets[axis] += start
            shape[axis] = min(step, shape[axis] - start)
        else:
            raise ValueError(
                f"{file} holds {'.'.join(path)} in an order of its own ({kind}), "
                "expected shards along an axis; merge it with the trainer's own tool"
            )
    if tuple(shape) != tuple(_local(tensor).shape):
        raise ValueError(
            f"{file} holds {tuple(_local(tensor).shape)} of {'.'.join(path)}, where "
            f"its placement gives {tuple(shape)}; copy it again"
        )
    return None if 0 in shape else (tuple(offsets), tuple(shape))


# --- torch's distributed checkpoints -----------------------------------------------

_META = "torch.distributed.checkpoint.metadata"
METADATA_CLASSES = (
    "Metadata",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "TensorProperties",
    "ChunkStorageMetadata",
    "MetadataIndex",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
)
ALLOWED = {
    *((_META, name) for name in METADATA_CLASSES),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
}
PATHS = {"PosixPath", "WindowsPath", "PurePosixPath"}


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of DCP's own metadata, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        if module.startswith("pathlib") and name in PATHS:
            return PurePosixPath
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


@dataclass(frozen=True)
class Chunk(OfFile):
    """A tensor, or a piece of one, in a .distcp file: an archive of its own there."""

    offset: int
    length: int

    def __getitem__(self, index: Index) -> Tensor:
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            data = stream.read(self.length)
        try:
            tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(_refused(self.file, str(error))) from error
        except (RuntimeError, EOFError, ValueError) as error:
            raise ValueError(
                f"{self.file} is truncated or damaged at byte {self.offset}, expected "
                "a tensor there; copy it again"
            ) from error
        w: Tensor = tensor[index]
        return w.clone(memory_format=torch.contiguous_format)


def from_dcp(path: Path) -> list[Stored]:
    """Tensors of a torch distributed checkpoint, less those of the optimizer.

    Args:
        path: a directory with .metadata and .distcp files.

    Raises:
        ValueError: metadata that is damaged or holds an object that is not allowed, or
            a tensor that its pieces do not make up.
        FileNotFoundError: a file that the metadata names is missing.
    """
    metadata = _dcp_metadata(path / ".metadata")
    places = _dcp_places(path, metadata.storage_data)
    found = []
    for name, entry in metadata.state_dict_metadata.items():
        if type(entry).__name__ != "TensorStorageMetadata" or is_optimizer(name):
            continue
        shape, dtype = tuple(entry.size), dtype_name(entry.properties.dtype)
        known = [c for c in entry.chunks if (name, tuple(c.offsets)) in places]
        chunks = [
            (tuple(c.offsets), tuple(c.sizes), places[name, tuple(c.offsets)])
            for c in known
        ]
        found.append(put_together(path, name, shape, dtype, chunks))
    return found


def _dcp_metadata(file: Path) -> Any:
    try:
        with file.open("rb") as stream:
            found = _MetadataUnpickler(stream).load()
        found.state_dict_metadata.items(), found.storage_data.items()
    except Exception as error:  # a damaged pickle may raise anything at all
        refused = isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error)
        said = _refused(file, str(error)) if refused else _broken(file, error)
        raise ValueError(said) from error
    return found


def _broken(file: Path, error: BaseException) -> str:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"{file} is damaged or no metadata of a distributed checkpoint ({said}), "
        "expected what torch.distributed.checkpoint.save writes; copy it again"
    )


def _dcp_places(path: Path, storage: Mapping[Any, Any]) -> dict[Any, Chunk]:
    places, absent = {}, set()
    for index, info in storage.items():
        file = path / str(info.relative_path)
        if Path(str(info.relative_path)).name != str(info.relative_path):
            raise ValueError(
                f"{path / '.metadata'} places {index.fqn} in {info.relative_path!r}, "
                "expected a file beside it"
            )
        if getattr(info, "transform_descriptors", None):
            raise ValueError(
                f"{file} is compressed ({', '.join(info.transform_descriptors)}), "
                "expected tensors as they are; save it again without"
            )
        if not file.is_file():
            absent.add(file.name)
        offset = tuple(index.offset) if index.offset is not None else ()
        places[index.fqn, offset] = Chunk(file, int(info.offset), int(info.length))
    if absent:
        raise FileNotFoundError(
            f"{path} lacks {len(absent)} files of its metadata, first "
            f"{min(absent)}; copy it again"
        )
    return places

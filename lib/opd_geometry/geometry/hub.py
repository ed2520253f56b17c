"""Checkpoints by name: a path, or a model of the Hugging Face hub."""

import os
import re
from pathlib import Path

HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
WANTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "adapter_config.json",
]
# Only where there are no safetensors.
PICKLES = [
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.bin",
    "config.json",
    "adapter_config.json",
]
# Second copies in another layout, and files of other models below this one.
UNWANTED = ["consolidated*", "*/*"]


def locate(source: str | Path) -> Path:
    """Where a checkpoint lies on this machine, fetched first if it is a hub id.

    Safetensors, their index and config.json are fetched, of adapters theirs, and
    pytorch_model.bin only where there are none; nothing is run.

    Args:
        source: a directory, a .safetensors file, or ``owner/name`` with an optional
            ``@revision`` (branch, tag or commit).

    Returns:
        The path; that of the hub's local copy for a hub id.

    Raises:
        ValueError: no such path, and nothing of that name can be fetched.
    """
    path = Path(os.path.expanduser(source))  # ~nobody stays as it is
    if path.exists():
        return path
    found = HUB_NAME.fullmatch(str(source))
    if not found:
        raise ValueError(
            f"{source} does not exist, expected a checkpoint directory, a "
            ".safetensors file or a hub id such as owner/name@revision; check the path"
        )
    return _fetched(found["name"], found["revision"])


def _fetched(name: str, revision: str | None) -> Path:
    # Imported here: it takes a second, and a path needs no hub.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    asked = name + (f"@{revision}" if revision else "")

    def fetch(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=UNWANTED,
            )
        )

    try:
        place = fetch(WANTED)
        return place if any(place.glob("*.safetensors")) else fetch(PICKLES)
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{asked} is no path here, and the hub cannot be reached and has no copy "
            "of it on this machine, expected a checkpoint; go online or pass a path"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        said = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{asked} is no path here and could not be fetched from the hub ({said}), "
            "expected a checkpoint; check name, revision and access"
        ) from error

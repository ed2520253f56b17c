from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from opd_geometry.geometry.hub import locate


@pytest.fixture
def fetched() -> list[str]:
    """What a snapshot has."""
    return ["model.safetensors"]


@pytest.fixture
def asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fetched: list[str]
) -> list[dict]:
    """What the hub is asked for; it always has it."""
    calls: list[dict] = []

    def download(name: str, **options: object) -> str:
        calls.append({"name": name, **options})
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        for file in fetched:
            (tmp_path / "snapshot" / file).touch()
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_paths_are_not_asked_for(tmp_path: Path, asked: list[dict]) -> None:
    assert locate(tmp_path) == tmp_path
    assert locate(str(tmp_path)) == tmp_path
    assert asked == []


@pytest.mark.parametrize(
    ("source", "name", "revision"),
    [
        ("owner/name", "owner/name", None),
        ("owner/name-1.5_b@main", "owner/name-1.5_b", "main"),
        ("owner/name@refs/pr/1", "owner/name", "refs/pr/1"),
    ],
)
def test_only_tensors_and_config_are_fetched(
    source: str, name: str, revision: str | None, asked: list[dict], tmp_path: Path
) -> None:
    assert locate(source) == tmp_path / "snapshot"
    (call,) = asked
    assert (call["name"], call["revision"]) == (name, revision)
    files = {
        "model.safetensors": True,
        "model-00001-of-00002.safetensors": True,
        "model.safetensors.index.json": True,
        "config.json": True,
        "adapter_config.json": True,
        "adapter_model.safetensors": True,
        "pytorch_model.bin": False,
        "modeling_own.py": False,
        "consolidated.safetensors": False,
        "original/model.safetensors": False,
    }
    chosen = huggingface_hub.utils.filter_repo_objects(
        files,
        allow_patterns=call["allow_patterns"],
        ignore_patterns=call["ignore_patterns"],
    )
    assert set(chosen) == {name for name, wanted in files.items() if wanted}


@pytest.mark.parametrize("fetched", [["config.json"]])
def test_pickles_are_fetched_where_there_are_no_safetensors(
    asked: list[dict], tmp_path: Path, fetched: list[str]
) -> None:
    assert locate("owner/name@main") == tmp_path / "snapshot"
    _first, second = asked
    assert second["revision"] == "main"
    files = ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "optimizer.bin"]
    files += ["pytorch_model.bin.index.json", "training_args.bin", "adapter_model.bin"]
    chosen = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=second["allow_patterns"]
    )
    assert {*files} - {*chosen} == {"optimizer.bin", "training_args.bin"}


@pytest.mark.parametrize("source", ["nowhere", "a/b/c", "/no/such", "./a", "a/b@"])
def test_what_is_neither_path_nor_id(source: str, asked: list[dict]) -> None:
    with pytest.raises(ValueError, match="does not exist, expected a checkpoint dir"):
        locate(source)
    assert asked == []


def test_offline_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no\nway")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match="hub cannot be reached") as error:
        locate("owner/name@main")
    assert "owner/name@main is no path here" in str(error.value)
    assert "\n" not in str(error.value)


def test_other_failures_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        response = type("Response", (), {"headers": {}, "request": None})()
        raise RepositoryNotFoundError("404\n\nmany\nlines", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match="could not be fetched") as error:
        locate("owner/name")
    assert "\n" not in str(error.value)


def test_a_home_of_nobody_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^~nobody-here/x does not exist"):
        locate("~nobody-here/x")

"""What several test modules share: tiny finished runs, trained once."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

# Before transformers is imported, here and in the children.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_DISABLE_PROGRESS_BARS"):
    os.environ.setdefault(name, "1")
sys.path.insert(0, str(Path(__file__).parent))  # children.py, also for the children


# What takes longest comes first: at the end one worker would be left alone with it.
LONGEST = [
    *("test_chapters_at_scale", "test_schedule", "test_runs", "test_at_scale"),
    *("test_ranks", "test_measure", "test_confining", "test_site", "test_cli"),
    *("test_callback", "02_distance", "06_controls", "03_rank", "07_regimes"),
    *("A_choices", "01_unplaced", "08_exclusions", "04_real_model", "B_bounds"),
    *("05_directions", "09_your_checkpoints", "test_published_numbers"),
    *("test_policy", "test_rollout", "test_formats", "test_claims", "test_pairs"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order of their processor time; within a file nothing moves."""
    places = {stem: place for place, stem in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    """What is imported stays: trainers collect garbage, and need not look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with the tiny runs of ``children``; not to be changed."""
    import children

    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # all workers share what one has trained
        place = place.parent
    data = place / "trained"
    with FileLock(place / "trained.lock"):
        for run in (children.OPD, children.RLVR, children.PROJECTED):
            done = data / "runs" / run.name / "done.json"
            if not done.is_file():
                children.Child(data, children.runs.ensure, run).result()
                assert done.is_file(), "training died"
    return data


@pytest.fixture(autouse=True)
def no_child_outlives_its_test() -> Iterator[None]:
    """A test that fails half-way leaves no training behind."""
    yield
    if "children" in sys.modules:
        started = sys.modules["children"].Child.started
        while started:
            started.pop().kill()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data directory, with nothing committed in the checkout either."""
    from opd_geometry import files

    monkeypatch.setenv("OPD_GEOMETRY_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(files, "CHECKOUT_DATA", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def on_trained(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data directory with the tiny runs, as the library sees it."""
    from opd_geometry import files

    monkeypatch.setenv("OPD_GEOMETRY_DATA", str(trained))
    monkeypatch.setattr(files, "CHECKOUT_DATA", trained)
    return trained

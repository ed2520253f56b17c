"""Problems of reasoning-gym: the package itself, and one whose families misbehave."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from opd_geometry.experiments import profiles
from opd_geometry.training import data, gym, tasks, verifier
from opd_geometry.training.data import DataConfig

# The same calls, and what families of the package were seen to do.
STAND_IN = """
import sys, time, types
factory = types.ModuleType("reasoning_gym.factory")
factory.DATASETS = dict.fromkeys(
    ["plain", "evaluates", "own_text", "lenient", "raises", "prints", "hangs", "none",
     "one"])
sys.modules["reasoning_gym.factory"] = factory
order = list({"alpha", "beta", "gamma", "delta"})

class Dataset:
    def __init__(self, family, seed):
        self.family, self.seed = family, seed
    def __getitem__(self, index):
        if self.family == "prints":
            print("drawing", flush=True)
        question = "What?" if self.family == "one" else f"Number {self.seed}? {order}"
        answer = None if self.family == "none" else str(self.seed)
        return {"question": question, "answer": answer, "metadata": {"sum": ["2+2"]}}
    def score_answer(self, answer, entry):
        if self.family == "hangs" and answer == "slow":
            time.sleep(60)
        if self.family == "lenient":
            return 1.0
        if self.family == "raises":
            int(answer)
        if self.family == "evaluates":
            return float(str(eval(answer)) == entry["answer"])
        if self.family == "own_text" and eval(entry["metadata"]["sum"][0]) != 4:
            return 0.0
        return 1.0 if answer == entry["answer"] else 0.5 if answer else 0.0

def create_dataset(family, seed, size):
    assert size == 1
    return Dataset(family, seed)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "reasoning_gym.py").write_text(STAND_IN)
    told = tmp_path / "reasoning_gym-9.9.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Name: reasoning-gym\nVersion: 9.9\n")
    library = Path(gym.__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{library}")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield from forgotten()


def forgotten() -> Iterator[None]:
    """Processes and problems of no other test."""
    for known in (gym._process, gym.draw):
        known.cache_clear()
    yield
    gym._process().end()
    for known in (gym._process, gym.draw):
        known.cache_clear()


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("family", ["plain", "own_text", "raises", "prints", "hangs"])
def test_a_family_that_can_be_scored_gives_the_full_score_or_nothing(
    family: str,
) -> None:
    config = DataConfig(data.digest_of(f"gym:{family}"), source=f"gym:{family}")
    assert config.digest == f"gym:{family}@9.9"
    for problem in data.draw(config, 3, np.random.default_rng(0)):
        right = f"<think>\n7\n</think> <answer>{problem.answer}</answer>"
        assert data.verify(problem, right)
        assert data.verify(problem, problem.response)
        for wrong in (problem.answer, "<answer>1</answer>", f"<think>{right[20:]}", ""):
            assert not data.verify(problem, wrong)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("evaluates", "evaluates answers as Python"),
        ("lenient", "takes nonsense for an answer"),
        ("none", "does not take its own answer"),
        ("sudoko", "no such family; expected one of evaluates, hangs"),
        ("plain@1.0", r"reasoning-gym 9\.9 is installed, which draws other problems"),
    ],
)
def test_a_family_that_cannot_be_scored_is_one_line(family: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        data.digest_of(f"gym:{family}")
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("stand_in")
def test_what_a_model_wrote_is_not_evaluated(tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    said = f"<answer>open({str(planted)!r}, 'w').close() or '0'</answer>"
    assert not gym.is_right("evaluates", 0, said)
    assert not planted.exists()


@pytest.mark.usefixtures("stand_in")
def test_a_scorer_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    gym.draw("gym:hangs@9.9", 1)
    monkeypatch.setattr(verifier, "SECONDS", 0.2)
    for _ in range(2):
        assert not gym.is_right("hangs", 1, "<answer>slow</answer>")
    with pytest.raises(ValueError, match=r"reasoning-gym gave no verdict within 0\.2"):
        gym.is_right("hangs", 1, "<answer>slow</answer>")


@pytest.mark.usefixtures("stand_in")
def test_parts_share_neither_seed_nor_question() -> None:
    config = DataConfig(data.digest_of("gym:plain"))
    train = [
        p for s in range(20) for p in data.draw(config, 4, np.random.default_rng(s))
    ]
    test = data.held_out(config, 40)
    assert max(p.seed for p in train) < gym.HELD_OUT_SEEDS <= min(p.seed for p in test)
    assert not any(
        map(tasks.is_held_out, (gym.draw(config.digest, p.seed)[1] for p in train))
    )
    assert all(
        map(tasks.is_held_out, (gym.draw(config.digest, p.seed)[1] for p in test))
    )
    assert test == data.held_out(config, 40)
    few = DataConfig(data.digest_of("gym:one"))
    with pytest.raises(ValueError, match="has too few questions"):
        [data.held_out(few, 2), data.draw(few, 2, np.random.default_rng(0))]


@pytest.mark.usefixtures("stand_in")
def test_every_process_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Families that walk through sets of words depend on how texts are hashed."""
    drawn = []
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        gym._process().end()
        gym.draw.cache_clear()
        drawn.append(gym.draw("gym:plain@9.9", 3))
    assert drawn[0] == drawn[1]


def test_without_the_package_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise gym.PackageNotFoundError(name)

    monkeypatch.setattr(gym, "version", missing)
    with pytest.raises(
        ValueError, match=r"reasoning-gym is not installed; pip install"
    ):
        profiles.settings_of("gpu:policy.dataset=gym:chain_sum")


# --- the package itself --------------------------------------------------------------

REAL = pytest.mark.skipif(
    find_spec("reasoning_gym") is None, reason="reasoning-gym is an optional extra"
)


@pytest.fixture
def real() -> Iterator[None]:
    yield from forgotten()


@REAL
@pytest.mark.usefixtures("real")
@pytest.mark.parametrize("family", ["chain_sum", "spiral_matrix", "number_sorting"])
def test_real_families_are_drawn_and_scored(family: str) -> None:
    settings = profiles.settings_of(f"gpu:policy.dataset=gym:{family}")
    config = settings.policy.dataset
    assert config is not None
    assert config.digest == f"gym:{family}@{gym.version('reasoning-gym')}"
    drawn = data.draw(config, 2, np.random.default_rng(0)) + data.held_out(config, 2)
    for problem in drawn:
        assert problem.prompt.endswith(gym.ASKED)
        assert data.verify(problem, problem.response)
        assert not data.verify(problem, "<answer>no answer</answer>")
        assert not data.verify(problem, f"<answer>{problem.answer[:-1]}</answer>")


@REAL
@pytest.mark.usefixtures("real")
@pytest.mark.parametrize("family", ["countdown", "game_of_life_halting", "boxnet"])
def test_real_families_that_cannot_be_scored_are_refused(family: str) -> None:
    with pytest.raises(ValueError, match="its scorer"):
        data.digest_of(f"gym:{family}")

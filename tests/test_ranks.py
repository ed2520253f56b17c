"""Several processes that train one model take the steps of one process."""

import json
import math
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import children
import psutil
import pytest
import together
import torch
from children import Child

from opd_geometry.experiments import processes, runs
from opd_geometry.training import ranks
from opd_geometry.training.models import load_model


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one, two, and two processes with shards say of the same steps."""
    place = tmp_path_factory.mktemp("steps")
    Child(place, together.take_steps, place).result()
    Child(place, together.in_two, together.take_steps, place).result()
    return place


@pytest.mark.parametrize("how", ["two", "shards"])
@pytest.mark.parametrize("name", together.CASES)
def test_processes_take_the_steps_of_one(name: str, how: str, steps: Path) -> None:
    """The same samples; loss, gradient and every metric up to rounding."""
    wanted, drawn = torch.load(steps / f"{name} one.pt", weights_only=False)
    told, written = torch.load(steps / f"{name} {how}.pt", weights_only=False)
    low = name == "copy"
    if not low:
        for ours, theirs in zip(written, drawn, strict=True):
            assert all(map(torch.equal, ours, theirs))
    begun = {n: w.clone() for n, w in together.tiny(0).state_dict().items()}
    for (said, weights), (expected, right) in zip(told, wanted, strict=True):
        if low:  # two roundings to bf16 apart
            assert said["loss"] == pytest.approx(expected["loss"], rel=0.05)
            break
        assert said == pytest.approx(expected, rel=2e-5, abs=1e-7)
        for key, weight in weights.items():
            step, wish = weight - begun[key], right[key] - begun[key]
            assert wish.any() or name == "rlvr"
            largest = wish.abs().max()
            torch.testing.assert_close(
                step, wish, rtol=1e-3, atol=1e-4 * float(largest)
            )
        begun = right


def test_every_item_is_dealt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    items = list(range(7))
    dealt, rounds = [], []
    for rank in range(3):
        monkeypatch.setattr(ranks, "index", lambda rank=rank: rank)
        monkeypatch.setattr(ranks, "count", lambda: 3)
        parts = list(ranks.dealt(items, 2))
        rounds.append(len(parts))
        dealt += [item for part, share in parts if share for item in part]
        assert ranks.own(7) == slice(7 * rank // 3, 7 * (rank + 1) // 3)
    assert sorted(dealt) == items
    assert set(rounds) == {2}
    with pytest.raises(ValueError, match="2 prompts for 3 processes: expected one"):
        ranks.own(2)


def test_ranks_get_as_much_of_items_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of lengths that grow, in a list and in a tensor."""
    lengths, got = list(range(1, 41)), []
    monkeypatch.setattr(ranks, "count", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(ranks, "index", lambda rank=rank: rank)
        listed = [part for part, _ in ranks.dealt(lengths, 4)]
        tensors = [part for part, _ in ranks.dealt(torch.tensor(lengths), 4)]
        assert listed == [part.tolist() for part in tensors]
        got.append(sum(map(sum, listed)))
    assert got == [410, 410]


# --- runs ----------------------------------------------------------------------------

RUN = replace(
    children.OPD,
    start=children.SHAPE,
    train=replace(children.REWARDS, steps=6, prompts_per_step=3, sharded=True),
)


def test_a_rank_that_dies_stops_the_others_and_the_run_goes_on(data: Path) -> None:
    Child(data, children.train_needs, RUN).result()
    alone, straight = (replace(RUN, arm=arm) for arm in ("alone", "straight"))
    for run in (RUN, straight):
        runs.run_directory(run).mkdir()
    (runs.run_directory(straight) / "died").touch()
    died = "process 1 of 2 was ended by signal 9; is memory short"
    with pytest.raises(ValueError, match=died):
        Child(data, together.in_two, together.dying, RUN).result()
    assert runs.progress(RUN)["step"] in (3, 4)
    shutil.copytree(runs.run_directory(RUN), runs.run_directory(alone))
    Child(data, together.in_two, together.dying, RUN).result()
    Child(data, together.in_two, together.dying, straight).result()
    Child(data, runs.ensure, alone).result()  # from the state of two
    resumed, whole, other = (
        load_model(runs.checkpoint(run))[0] for run in (RUN, straight, alone)
    )
    assert type(resumed).__name__ == "Qwen3ForCausalLM"
    for a, b, c in zip(*(m.parameters() for m in (resumed, whole, other)), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=0, atol=2e-3)
    assert runs.history(RUN) == runs.history(straight)
    done = json.loads((runs.run_directory(RUN) / "done.json").read_text())
    assert done["machine"].endswith(", 2 processes")


@pytest.mark.parametrize(
    ("function", "argument", "words"),
    [
        (math.factorial, -1, r"^factorial\(\) not defined for negative values$"),
        (signal.raise_signal, 9, "process 0 of 2 was ended by signal 9; is memory"),
        (len, 3, "process 0 of 2 failed: TypeError: object of type 'int' has no"),
    ],
)
def test_a_process_that_fails_is_one_line(
    function: Callable[[Any], None], argument: int, words: str, tmp_path: Path
) -> None:
    """The last as ranks start in earnest: a new interpreter each, not a fork."""
    start, count = (processes.run, (2,)) if function is len else (together.in_two, ())
    with pytest.raises(ValueError, match=words) as raised:
        Child(tmp_path, start, function, argument, *count).result()
    assert "\n" not in str(raised.value)


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    starter = Child(tmp_path, processes.run, time.sleep, 600, 2)
    process, deadline = psutil.Process(starter.process.pid), time.monotonic() + 120
    while len(started := process.children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(started) == 2
    starter.kill()
    assert not psutil.wait_procs(started, timeout=60)[1]

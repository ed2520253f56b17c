"""Signal of gradients: planted answers, noise, and what a run gives."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from opd_geometry.analysis import signal as judged
from opd_geometry.experiments import signal
from opd_geometry.experiments.profiles import build


def drawn(mean: float, draws: int, entries: int) -> dict[str, float]:
    """Signal of Gaussian gradients of variance one about a mean."""
    generator = torch.Generator().manual_seed(0)
    g = mean + torch.randn(draws, entries, generator=generator)
    return signal.signal(g.sum(0), (g**2).sum(0), draws)


@pytest.mark.parametrize("mean", [0.0, 0.5, 2.0])
def test_signal_is_the_share_of_the_mean_in_the_mean_square(mean: float) -> None:
    found = drawn(mean, 64, 20_000)
    assert found["signal"] == pytest.approx(mean**2 / (1 + mean**2), abs=0.01)
    assert found["alignment"] == pytest.approx(mean**2 / (1 + mean**2), abs=0.01)


def test_noise_of_any_sizes_has_no_signal() -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.rand(8, 50_000, generator=generator) ** 6
    g = sizes * torch.randint(0, 2, sizes.shape, generator=generator).mul(2).sub(1)
    found = signal.signal(g.sum(0), (g**2).sum(0), 8)
    assert found["signal"] == pytest.approx(0.0, abs=0.005)


@pytest.mark.parametrize("mean", [0.25, 0.5, 1.0, 2.0])
def test_of_few_gradients_it_is_low_by_what_is_said(mean: float) -> None:
    true = mean**2 / (1 + mean**2)
    for n in (16, 64):
        bias = drawn(mean, n, 200_000)["signal"] / true - 1
        assert bias == pytest.approx(-2 * (1 - true) ** 2 / n, abs=0.01)


def test_tiny_gradients_are_not_lost() -> None:
    found = []
    for size in (1.0, 2.0**-90, 2.0**60):
        model = torch.nn.Linear(2, 1, bias=False)
        collector = signal.Collector(model)
        for values in ([0.0, 0.0], [1.5, -3.0], [2.5, 1.0]):
            model.weight.grad = torch.tensor([values]) * size
            collector.step()
        sums = collector.total[model.weight], collector.squares[model.weight]
        found.append(signal.signal(*sums, 2))
    assert found[0] == found[1] == found[2]


def test_entries_without_a_gradient_do_not_count() -> None:
    total, squares = torch.tensor([4.0, 0.0]), torch.tensor([4.0, 0.0])
    assert signal.signal(total, squares, 4)["signal"] == 1.0
    nothing = signal.signal(torch.zeros(3), torch.zeros(3), 4)
    assert np.isnan(nothing["signal"])
    assert np.isnan(signal.signal(total, squares, 1)["alignment"])


def test_a_collector_adds_up_and_moves_nothing() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    collector = signal.Collector(model)
    for value in (1.0, -3.0):
        model.weight.grad = torch.full((1, 2), value)
        collector.step()
    assert torch.equal(model.weight, before)
    assert collector.taken == 2
    assert collector.total[model.weight].tolist() == [[-2.0, -2.0]]
    assert collector.squares[model.weight].tolist() == [[10.0, 10.0]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    with pytest.MonkeyPatch.context() as patch:
        data = tmp_path_factory.mktemp("data")
        patch.setenv("OPD_GEOMETRY_DATA", str(data))
        run = build("smoke", "sft", 0)
        table = signal.signal_table(run, draws=4)
        again = signal.signal_table(run, draws=4)
        pd.testing.assert_frame_equal(table, again)
        assert not list(Path(data).glob("runs/sft-s0*"))
        signal.commit_signals("smoke", table)
        other = table.assign(run="another", seed=7)
        signal.commit_signals("smoke", other)
        signal.commit_signals("smoke", other)
        back = signal.committed_signals("smoke")
        assert len(back) == 2 * len(table)  # added to, and replaced by run
        np.testing.assert_allclose(back["value"][: len(table)], table["value"], 1e-6)
        return table


def test_a_run_is_asked_at_its_start_and_not_trained(measured: pd.DataFrame) -> None:
    values = measured[measured["metric"] == "signal"]["value"]
    assert values.between(-1 / 3, 1).all()
    assert (measured[measured["metric"] == "draws"]["value"] == 4).all()
    run = build("smoke", "sft", 0)
    predicted = judged.predictions(measured, [run, replace(run, arm="opd", seed=3)])
    assert predicted["arm"].tolist() == ["sft"]
    assert judged.known_runs("smoke", measured) == [run]


def test_the_rule_speaks_of_pairs_that_are_well_apart() -> None:
    predicted = pd.DataFrame(
        {
            "arm": ["rlvr", "rlvr-coin", "opd"],
            "seed": 0,
            "start": ["anchor", "anchor", "base"],
            "signal": 0.1,
            "ceiling": [2.0, 1.0, 2.1],
        }
    )
    found = pd.DataFrame(
        {
            "arm": ["rlvr", "rlvr-coin", "opd"],
            "seed": 0,
            "displacement": [1.5, 1.0, 0.9],
        }
    )
    pairs = judged.foretold(predicted, found).set_index(["farther", "nearer"])
    assert pairs["right"].to_dict() == {
        ("rlvr", "rlvr-coin"): True,
        ("opd", "rlvr-coin"): False,
    }
    assert pairs["kind"].tolist() == ["starts", "flips"]
    same = judged.foretold(predicted.assign(start="anchor"), found)
    assert same["kind"].tolist() == ["arms", "flips"]
    shares = judged.lasted(predicted, found).set_index("arm")["lasted"]
    assert shares["rlvr"] == pytest.approx(1.25 / 3)
    assert np.isnan(shares["rlvr-coin"])


def test_a_ceiling_counts_the_rates_of_its_steps() -> None:
    generator = torch.Generator().manual_seed(2)
    rates = torch.tensor([0.2, 0.6, 1.0, 1.0, 0.5])
    steady = 0.3  # of the mean square of every step
    steps = steady**0.5 + (1 - steady) ** 0.5 * torch.randn(
        400_000, 5, generator=generator
    )
    moved = float(((rates * steps).sum(1) ** 2).mean() / rates.square().sum()) ** 0.5
    assert judged.ceiling(steady, rates.tolist()) == pytest.approx(moved, rel=0.01)
    assert judged.ceiling(-0.01, rates.tolist()) == 1.0
    for bad in (float("nan"), 1.5):
        with pytest.raises(ValueError, match="expected a number up to 1"):
            judged.ceiling(bad, rates.tolist())
    for wrong in ([], [0.0, 0.0], [float("nan")]):
        with pytest.raises(ValueError, match="learning rates") as error:
            judged.ceiling(0.5, wrong)
        assert "\n" not in str(error.value)

"""What took a run's steps, by options and by what transformers' trainer leaves."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from opd_geometry.geometry import rates


@pytest.mark.parametrize("name", rates.SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 3])
def test_schedules_are_those_of_transformers(name: str, warmup: int) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    kind = "constant_with_warmup" if name == "constant" else name
    schedule = get_scheduler(kind, optimizer, warmup, 12)
    expected = []
    for _ in range(10):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    found = rates.given(2e-3, 10, name, warmup, 12)
    assert found.rates == pytest.approx(expected)
    assert (found.betas, found.eps) == ((0.9, 0.999), 1e-8)


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (x @ self.w).square().mean()}


def trained(path: Path, **options: object) -> Path:
    arguments = TrainingArguments(
        str(path),
        learning_rate=1e-3,
        max_steps=8,
        save_steps=8,
        warmup_steps=2,
        lr_scheduler_type="cosine",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    data = [{"x": torch.randn(3)} for _ in range(64)]
    Trainer(Line(), arguments, train_dataset=data).train()
    return path / "checkpoint-8"


def test_what_a_trainer_left_is_what_it_did(tmp_path: Path) -> None:
    """A rate that is logged at every step is the one that was used, and no other."""
    found = rates.left(
        {8: trained(tmp_path, logging_steps=1, adam_beta2=0.95, optim="adamw_torch")}
    )
    assert found.rates == pytest.approx(rates.given(1e-3, 8, "cosine", 2).rates)
    assert found.betas == (0.9, 0.95)
    assert "learning rates of 8 of 8 steps" in found.origin
    assert rates.left({8: tmp_path / "checkpoint-8"}, (0.8, 0.9)).betas == (0.8, 0.9)


def test_another_optimizer_is_no_adam(tmp_path: Path) -> None:
    there = trained(tmp_path / "sgd", logging_steps=2, optim="sgd")
    found = rates.left({8: there})
    assert found.betas is None
    assert found.rates[3] == pytest.approx(rates.given(1e-3, 8, "cosine", 2).rates[3])
    state = torch.load(there / "optimizer.pt", weights_only=True)
    state["param_groups"][0]["momentum"] = 0.9
    torch.save(state, there / "optimizer.pt")
    with pytest.raises(rates.UnknownRates, match="does not know") as error:
        rates.left({8: there})
    assert "\n" not in str(error.value)
    (there / "optimizer.pt").unlink()
    assert "assumed; --betas corrects it" in rates.left({8: there}).origin


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no trainer_state.json in"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"log_history": [{"step": 4, "loss": 1.0}]}', "no learning rate above 0"),
        ('{"log_history": [{"step": 4, "learning_rate": NaN}]}', "rate nan"),
        ('{"log_history": [{"step": 4, "learning_rate": "x"}]}', "cannot be read"),
    ],
)
def test_rates_that_are_not_there(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(rates.UnknownRates, match=said) as error:
        rates.left({4: tmp_path})
    assert "give --lr" in str(error.value)
    assert "\n" not in str(error.value)


def test_rates_between_logs_lie_on_a_line(tmp_path: Path) -> None:
    history = [{"step": s, "learning_rate": r} for s, r in ((2, 0.4), (6, 0.2))]
    state = json.dumps({"log_history": history})
    (tmp_path / "trainer_state.json").write_text(state)
    found = rates.left({7: tmp_path}).rates
    assert found == pytest.approx((0.4, 0.4, 0.35, 0.3, 0.25, 0.2, 0.2))


def test_schedules_that_cannot_be() -> None:
    for options in ({"whole": 9}, {"warmup": 10}):
        with pytest.raises(ValueError, match="--max-steps") as error:
            rates.given(1e-3, 10, "linear", **options)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="betas"):
        rates.given(1e-3, 10, betas=(0.9, 1.0))

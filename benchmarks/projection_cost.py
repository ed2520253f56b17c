"""What ProjectionCallback costs at 100 M parameters: memory, and processor time.

Each build trains the same model for five steps of plain SGD in a process of its own,
the lock at step 2. To compare with an earlier build, name its library:

    git worktree add /tmp/before REVISION
    python benchmarks/projection_cost.py --against /tmp/before/lib
"""

import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import click
import torch
from transformers import (
    PrinterCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    logging,
)

LOCK, STEPS = 2, 5
LIBRARY = Path(__file__).resolve().parents[1] / "lib"


class Timed(TrainerCallback):
    """Processor seconds of every step, other callbacks included."""

    def __init__(self) -> None:
        self.began, self.seconds = 0.0, {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read it."""
        self.seconds[state.global_step] = time.process_time() - self.began


def measure(form: str) -> None:
    """Train with the library on the path, and print one line of numbers."""
    from opd_geometry.training.callback import ProjectionCallback

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    shape: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 2304}
    shape |= {"num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64}
    config = Qwen3Config(vocab_size=16_000, num_hidden_layers=12, **shape)
    config.tie_word_embeddings = True
    model = Qwen3ForCausalLM(config)
    rows = [{"input_ids": r, "labels": r} for r in torch.randint(0, 16_000, (8, 16))]
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"output_dir": folder, "max_steps": STEPS}
        options |= {"use_cpu": True, "report_to": "none", "save_strategy": "no"}
        options |= {"optim": "sgd", "learning_rate": 1e-4, "bf16": False}
        options |= {"per_device_train_batch_size": 1, "disable_tqdm": True}
        trainer = Trainer(model, TrainingArguments(**options), train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        confined: Any = ProjectionCallback(trainer, lock_at=LOCK, k=16, form=form)
        timed = Timed()
        trainer.add_callback(confined)
        trainer.add_callback(timed)
        trainer.train()
    start = getattr(getattr(confined, "origin", confined), "start", None)
    kept = [] if start is None else start.weights.values()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    later = [timed.seconds[step] for step in range(LOCK + 1, STEPS)]
    print(
        sum(p.numel() for p in model.parameters()),
        f"{timed.seconds[LOCK]:.2f}",
        f"{sum(later) / len(later):.2f}",
        round(sum(w.numel() * w.element_size() for w in kept) / 2**20),
        round(peak),
    )


@click.command()
@click.option("--against", type=click.Path(exists=True), help="An earlier library.")
@click.option("--out", type=click.Path(path_type=Path), help="CSV to write as well.")
@click.option("--form", hidden=True)
def main(against: str | None, out: Path | None, form: str | None) -> None:
    """Print what the projection costs, build by build."""
    if form:
        return measure(form)
    names = ["build", "form", "parameters", "lock_step_s", "later_step_s"]
    names += ["w0_kept_after_lock_mib", "peak_rss_mib"]
    rows = [names]
    for build, library in (("before", against), ("now", str(LIBRARY))):
        for kind in ("update", "gradient") if library else ():
            said = subprocess.run(
                [sys.executable, __file__, "--form", kind],
                env={**os.environ, "PYTHONPATH": library},
                capture_output=True,
                text=True,
                check=True,
            )
            rows.append([build, kind, *said.stdout.splitlines()[-1].split()])
            click.echo(" ".join(rows[-1]))
    if out:
        with out.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    return None


if __name__ == "__main__":
    main()

"""What GeometryCallback costs, as a share of the training steps of TRL's SFTTrainer.

One process trains models of several widths for a few steps each, measures with the
callback in between, and prints for each width the median seconds of a step and of a
measurement, and the share that one measurement in 50 steps has of the time. Steps and
measurements alternate, so whatever else the machine does falls on both.
"""

import csv
import random
import statistics
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, logging
from trl import SFTConfig, SFTTrainer

from opd_geometry.experiments.runs import provenance
from opd_geometry.files import replacing
from opd_geometry.training.callback import GeometryCallback
from opd_geometry.training.models import ModelConfig, build_model, character_tokenizer

EVERY = 50  # steps from one measurement to the next, in the share that is printed
SEQUENCES, LENGTH = 16, 64
WARM_UP = 2  # steps, and one measurement, that are not counted
ROOT = Path(__file__).resolve().parents[1]


@click.command(context_settings={"show_default": True})
@click.option("--widths", default="128,256,512,1024", help="With commas between.")
@click.option("--layers", default=2, help="Of each model.")
@click.option("--steps", default=9, help="Steps that are timed, of each model.")
@click.option("--threads", default=1, help="Of torch.")
@click.option("--out", type=click.Path(path_type=Path), help="CSV to write as well.")
def main(widths: str, layers: int, steps: int, threads: int, out: Path | None) -> None:
    """Print the share of training that the callback takes at one in 50 steps."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    rows = [measured(int(width), layers, steps) for width in widths.split(",")]
    click.echo(f"{SEQUENCES * LENGTH} tokens a step, {threads} thread(s)")
    click.echo(
        "width  matrices  step (s)  measurement (s)  share at N = 50  no nulls (s)"
    )
    for row in rows:
        click.echo(
            f"{row['width']:5d}{row['matrices']:10d}{row['step_seconds']:10.3f}"
            f"{row['measure_seconds']:17.3f}{row['share_at_50']:17.2%}"
            f"{row['without_nulls_seconds']:14.3f}"
        )
    if out:
        written_by = provenance() | {"trl": version("trl"), "threads": threads}
        with replacing(out) as draft, draft.open("w", newline="") as file:
            names = [*rows[0], *written_by]
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(row | written_by for row in rows)


class Clock(TrainerCallback):
    """Seconds of every step, without what later callbacks do at its end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        """Note the seconds."""
        self.seconds.append(time.perf_counter() - self.began)


class Spaced(GeometryCallback):
    """Measures after every step what it would after `EVERY`: the walk takes as many."""

    def measure(self, step: int) -> dict[str, float]:
        """With the rates of the last step as those of all since the time before."""
        self.rates *= EVERY
        return super().measure(step)


def measured(width: int, layers: int, steps: int) -> dict[str, Any]:
    """One model: the medians, and the share at one measurement in 50 steps."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            build_model(ModelConfig(width=width, layers=layers), seed=0),
            args=config(folder, steps + WARM_UP),
            train_dataset=texts(),
            processing_class=character_tokenizer(),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        watch = Spaced(trainer, every=1, lock_at=1)
        trainer.add_callback(watch)
        trainer.add_callback(GeometryCallback(trainer, every=1, lock_at=1, nulls=False))
        trainer.train()
    kept = [row for row in trainer.state.log_history if "geometry/seconds" in row]
    step = statistics.median(clock.seconds[WARM_UP:])
    cost, plain = (
        statistics.median(row["geometry/seconds"] for row in rows[WARM_UP:])
        for rows in (kept[::2], kept[1::2])
    )
    return {
        "width": width,
        "layers": layers,
        "matrices": len(watch.start.weights),
        "tokens_a_step": SEQUENCES * LENGTH,
        "step_seconds": round(step, 4),
        "measure_seconds": round(cost, 4),
        "without_nulls_seconds": round(plain, 4),
        "share_at_50": round(cost / (EVERY * step + cost), 6),
    }


def config(folder: str, steps: int) -> SFTConfig:
    """A plain setting, without whatever would only make the steps longer."""
    return SFTConfig(
        folder,
        per_device_train_batch_size=SEQUENCES,
        max_steps=steps,
        learning_rate=1e-4,
        activation_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


def texts() -> Dataset:
    """Lines of digits, as long as a sequence."""
    draw = random.Random(0)
    lines = ["".join(draw.choices("0123456789", k=LENGTH)) for _ in range(256)]
    return Dataset.from_list([{"text": line} for line in lines])


if __name__ == "__main__":
    main()

"""The paper's learning rates, and how far its arms went in their unit."""

import numpy as np
import pandas as pd

from opd_geometry.analysis.exclusions import printed
from opd_geometry.experiments.shelf import committed_csv
from opd_geometry.files import on_shelf

COMMITTED = "gemma3-270m-bf16"


def paper_rates(arm: str) -> np.ndarray:
    """The learning rate of every step, by the printed settings.

    Warm-up is linear from 0; then constant, or a cosine to the printed final rate.

    Args:
        arm: one of ``printed.ARMS``.
    """
    table = printed("settings")
    own = table[table["arm"] == arm].set_index("metric")["value"]
    steps, rate = int(float(own["steps"])), float(own["learning_rate"])
    if own["schedule"] != "cosine":
        return np.full(steps, rate)
    t = np.arange(1, steps + 1) / steps
    warm, final = float(own["warmup_frac"]), float(own["final_learning_rate"])
    falling = (t - warm) / (1 - warm)
    rates = final + (rate - final) * (1 + np.cos(np.pi * falling)) / 2
    return np.where(t < warm, rate * t / warm, rates)


def decayed(arm: str) -> float:
    """How much of the weights decoupled decay alone removes, by the printed settings.

    wd * sum_t lr_t

    Args:
        arm: one of ``printed.ARMS``.
    """
    table = printed("settings")
    own = table[table["arm"] == arm].set_index("metric")["value"]
    return float(own["weight_decay"]) * float(paper_rates(arm).sum())


def paper_displacements(decay: pd.DataFrame, size: float) -> pd.Series:
    """How far the paper's arms went, in the unit of their learning rates.

    distance * size / sqrt(sum lr^2)

    The distance is that of an update without place at the density that the paper
    prints, on the weights that the table is of: on larger weights it is longer.

    Args:
        decay: of ``decay_table``.
        size: root mean square of those weights.

    Returns:
        Indexed by arm: root mean square change over sqrt(sum lr^2), about 1 for noise.
    """
    still = decay[(decay["decay"] == 0) & (decay["readout"] == "float32")]
    found = {
        str(row.arm): row.distance
        * size
        / np.sqrt(np.square(paper_rates(row.arm)).sum())
        for row in still.itertuples()
    }
    return pd.Series(found)


def committed_decay() -> pd.DataFrame:
    """The committed one of ``measured.decay_table``.

    Raises:
        ValueError: it is not as it was written, or cannot be read.
    """
    return committed_csv(on_shelf(f"unplaced/{COMMITTED}/decay.csv"))

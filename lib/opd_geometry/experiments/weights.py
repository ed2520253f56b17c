"""What kind of matrices a run starts from, one row a matrix and property.

std             of the entries
kurtosis        E[w^4] / E[w^2]^2 about the mean; 3 for a Gaussian
zeros           share of entries that are exactly 0
half_step       median over entries of half the spacing of bf16 at |w|
stable_rank     ||W||_F^2 / s_1^2
top_energy      share of ||W||_F^2 in the first n / 16 directions
peak            s_1 over the median singular value
gap             (s_k - s_(k+1)) / s_1 at k = n / 16
"""

import pandas as pd
import torch
from torch import Tensor

from opd_geometry.experiments.runs import Run, one_thread, sound_checkpoint
from opd_geometry.experiments.shelf import commit_table, committed_table
from opd_geometry.geometry import gram
from opd_geometry.geometry.checkpoints import list_matrices, read_matrix
from opd_geometry.geometry.spectra import default_rank

TOP = 16  # the top subspace is of n / 16 directions, as the principal mask's
COLUMNS = ["run", "seed", "matrix", "role", "layer", "metric", "value"]


def properties(w: Tensor) -> dict[str, float]:
    """The properties of one matrix (module docstring).

    Args:
        w: (n_rows, n_cols), finite, not all zero.

    >>> properties(torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0])))["peak"]
    2.0
    """
    k = default_rank(w.shape, TOP)
    entries = w.double()
    found = gram.decompose(entries, k)
    spectrum = found.spectrum
    squares, centred = spectrum**2, entries - entries.mean()
    low = w.bfloat16().abs()
    step = torch.nextafter(low, torch.tensor(torch.inf).bfloat16()).double() - low
    return {
        "std": float(centred.square().mean().sqrt()),
        "kurtosis": float((centred**4).mean() / centred.square().mean() ** 2),
        "zeros": float((w == 0).double().mean()),
        "half_step": float(step.median() / 2),
        "stable_rank": float(squares.sum() / squares[0]),
        "top_energy": float(squares[:k].sum() / squares.sum()),
        "peak": float(spectrum[0] / spectrum.median()),
        "gap": found.gap,
    }


def weights_table(run: Run) -> pd.DataFrame:
    """The properties of every matrix that a finished run started from."""
    origin, rows = sound_checkpoint(run, 0), []
    with one_thread():
        for matrix in list_matrices(origin):
            place = (run.key(), run.seed, matrix.name, matrix.role, matrix.layer)
            found = properties(read_matrix(origin, matrix.name))
            rows += [(*place, metric, value) for metric, value in found.items()]
    return pd.DataFrame(rows, columns=COLUMNS)


def commit_weights(profile: str, table: pd.DataFrame) -> None:
    """Add the properties of starting weights to a profile's; see ``shelf``."""
    commit_table("weights", profile, table, ["run"])


def committed_weights(profile: str) -> pd.DataFrame:
    """Those that were committed; empty when there are none."""
    return committed_table("weights", profile, COLUMNS)

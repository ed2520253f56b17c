"""What a matrix is fed: the covariance of its inputs over texts of the task.

A gradient of a linear map is a sum of outer products with its inputs, so an update lies
where the inputs have been, whatever the objective.
"""

from collections.abc import Container

import numpy as np
import torch
from torch import Tensor, nn

from opd_geometry.experiments.runs import Run, starting_model
from opd_geometry.training import tasks
from opd_geometry.training.data import as_pairs, draw
from opd_geometry.training.sft import encode_pairs

TEXTS = 256
STREAM = 77  # separates these texts from those that anything is trained on


def input_covariances(run: Run, names: Container[str]) -> dict[str, Tensor]:
    """X^T X of the inputs of linear maps of the model that a run starts from.

    Args:
        run: its start is read, and the seed decides the texts: problems of the
            run's first task with careful answers, one at a time, so that nothing is
            padding.
        names: of the weight matrices that are asked for.

    Returns:
        Name of a weight matrix to (n_cols, n_cols), float64; not centred.
    """
    model, tokenizer = starting_model(run)
    model.eval()
    found: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
            found[name] = found.get(name, 0.0) + x.mT @ x

        module.register_forward_pre_hook(hook)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in names:
            watch(f"{name}.weight", module)
    rng = np.random.default_rng([run.seed, STREAM])
    if run.train.dataset is not None:
        pairs = as_pairs(draw(run.train.dataset, TEXTS, rng), tokenizer)
    else:
        pairs = tasks.draw_demonstrations(
            TEXTS, run.train.benchmarks[:1], {"careful": 1.0}, rng
        )
    with torch.no_grad():
        for pair in pairs:
            tokens, _ = encode_pairs([pair], tokenizer)
            model(input_ids=tokens)
    return found

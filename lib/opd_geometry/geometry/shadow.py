"""What a matrix in training would show had it learned nothing, beside it as it goes.

`locking` asks the same of a finished trajectory; here only the last weights are kept.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from opd_geometry.geometry import bits, nulls
from opd_geometry.geometry.comparison import generator_of
from opd_geometry.geometry.locking import Walk

Moments = tuple[tuple[float, float] | None, float]  # betas (None: no Adam) and eps


class Shadow:
    """The two locking nulls of one matrix, as far as its training has come.

    increments: D_s + sum over later measurements of P (W_t - W_before) Q^T, P and Q
    random rotations; walk: a sum of segments of `locking.Walk`, each as long as
    ||W_t - W_before||

    It keeps 28 bytes an entry on the CPU: the weights of the time before, two sums,
    two moments.

    Args:
        w_before: (n_rows, n_cols) W_0.
        seed: what the rotations and the walk are drawn from, with every step.
        moments: of the optimizer; None for no walk.

    Source: ours, as `locking.Increments` and `locking.walk`.
    """

    def __init__(
        self, w_before: Tensor, seed: tuple[int, ...], moments: Moments | None
    ) -> None:
        self.before = w_before.detach().to("cpu", torch.float32, copy=True)
        self.turned = torch.zeros(*w_before.shape, dtype=torch.float64)
        self.walk = Walk(w_before.shape, *moments) if moments else None
        self.seed = seed

    def add(
        self, w: Tensor, rates: Sequence[float] | None, step: int
    ) -> dict[str, Tensor]:
        """The nulls' updates once the weights are these.

        Args:
            w: (n_rows, n_cols) W_t, finite.
            rates: learning rates of the steps since the last time; None where they are
                not known, which ends the walk.
            step: of training.

        Returns:
            ``increments`` and, while there is one, ``walk``: to the update, float64, to
            which the next ones are added in place.
        """
        now = w.detach().to("cpu", torch.float32)
        change = now.double() - self.before.double()
        self.before.copy_(now)
        length = bits.norm(change)
        if rates is None:
            self.walk = None
        if self.walk is not None:
            self.walk.add(rates or (), length, generator_of((*self.seed, step), "walk"))
        if length:
            turning = generator_of((*self.seed, step), "increments")
            # A rotation that all have in common changes no spectrum and no similarity.
            first = not bool(self.turned.any())
            self.turned += (
                change if first else nulls.turned(change, turning, nulls.SHORT_SIDE)
            )
        found = {"increments": self.turned}
        return found if self.walk is None else found | {"walk": self.walk.total}

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint has to remember."""
        yield from (("before", self.before), ("turned", self.turned))
        if self.walk is not None:
            taken = torch.tensor(self.walk.taken)
            yield from (("total", self.walk.total), ("taken", taken))
            yield from (("m", self.walk.m), ("v", self.walk.v))

    def recall(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave.

        Raises:
            KeyError: not all of it.
        """
        self.before, self.turned = state["before"], state["turned"]
        if "taken" not in state:
            self.walk = None
        elif self.walk is not None:
            self.walk.total, self.walk.taken = state["total"], int(state["taken"])
            self.walk.m, self.walk.v = state["m"], state["v"]

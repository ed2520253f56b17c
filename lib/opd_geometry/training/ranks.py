"""Several processes that train one model: who does what, and what they put together.

Every rank draws the same prompts and random numbers and does its share of the work.
What was written is handed to all, so that all that a batch decides (rewards, token
weights, denominators) is decided from the whole one, and a gradient is summed over the
ranks once a step. One process alone passes through here unchanged, to the bit.

Weights may be sharded by torch's FSDP2 (``shard``): float32 masters and moments lie
apart; within a step every rank holds the weights whole, in the dtype it computes in.
Ranks may therefore read a model as often as their share of the work needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

Items = TypeVar("Items", Tensor, list[Any])


def index() -> int:
    """This process among those that train together; 0 when alone."""
    return dist.get_rank() if _together() else 0


def count() -> int:
    """How many processes train together; 1 when alone."""
    return dist.get_world_size() if _together() else 1


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


# --- shares of the work --------------------------------------------------------------


def own(items: int) -> slice:
    """This rank's share of so many items, neighbours together.

    Raises:
        ValueError: fewer items than ranks.
    """
    if items < count():
        raise ValueError(
            f"{items} prompts for {count()} processes: expected one each at least; "
            "lower --processes or raise prompts_per_step"
        )
    first, last = (items * i // count() for i in (index(), index() + 1))
    return slice(first, last)


def dealt(items: Items, size: int) -> Iterator[tuple[Items, float]]:
    """This rank's share of a batch, a few items at a time, each part with its weight.

    Ranks take their parts in step: one that has fewer repeats an item of weight 0.
    Items are dealt to and fro, so that of items in order of length all get as much.

    Args:
        items: of the whole batch, the same on every rank.
        size: items a part, at most.

    Yields:
        A part and its share of the batch; over parts and ranks the shares sum to 1.

    >>> list(dealt([3, 1, 2], 2))
    [([3, 1], 0.6666666666666666), ([2], 0.3333333333333333)]
    """
    mine = items if count() == 1 else _to_and_fro(items)
    for first in range(0, len(items[:: count()]), size):
        part = mine[first : first + size]
        yield (part, len(part) / len(items)) if len(part) else (items[:1], 0.0)


def _to_and_fro(items: Items) -> Items:
    """Each 2n-th item from this rank's place on, and from its place on the way back."""
    order = torch.arange(len(items))
    turn, place = order // count(), order % count()
    mine = torch.where(turn % 2 == 0, place, count() - 1 - place) == index()
    if isinstance(items, Tensor):
        return items[mine.to(items.device)]
    return [item for item, ours in zip(items, mine.tolist(), strict=True) if ours]


# --- what they put together ----------------------------------------------------------


def gathered(value: Any) -> list[Any]:
    """What every rank gives, in their order; tensors come on the processor."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, tree_map_only(Tensor, Tensor.cpu, value))
    return values


def total(value: float) -> float:
    """The sum over ranks of what each gives, the same on all of them."""
    values = gathered(value)
    return float(sum(values[1:], start=values[0]))


def most(value: int) -> int:
    """The largest of what the ranks give."""
    return int(max(gathered(value)))


def sum_gradients(model: nn.Module) -> None:
    """Give every rank the gradient of the whole batch, or its shard of it.

    What no rank has a gradient of keeps none.
    """
    if is_sharded(model):
        _sum_into_shards(model)
    elif count() > 1:
        trained = [p for p in model.parameters() if p.requires_grad]
        given = gathered({i for i, p in enumerate(trained) if p.grad is not None})
        under_way = []  # all at once: one after another takes three times as long
        for parameter in [trained[i] for i in sorted(set.union(*given))]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            under_way.append(dist.all_reduce(parameter.grad, async_op=True))
        for sum_ in under_way:
            sum_.wait()


# --- sharded weights -----------------------------------------------------------------


def shard(model: Any, low: bool = False) -> None:
    """Split weights over the ranks, layer by layer; before their optimizer is made.

    Args:
        model: float32, the same on every rank; changed in place.
        low: whether forward and backward passes go through weights rounded to bf16;
            gradients are summed in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if low:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for part in (*_layers(model), model):
        fully_shard(part, mp_policy=policy)
    for part in _shards(model):
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no other kind
        part.set_gradient_divide_factor(1.0)


def shard_layers(model: Any, device: torch.device) -> None:
    """Split a model that is only read: a layer is whole while it is computed.

    Embedding and head stay whole. All ranks have to read it equally often.
    """
    from torch.distributed.fsdp import fully_shard

    for layer in _layers(model):
        fully_shard(layer, reshard_after_forward=True)
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)


def _layers(model: Any) -> list[nn.Module]:
    found = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(found, key=len)


def _shards(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are split over the ranks, gathered now or not."""
    return bool(_shards(model))


def lies_apart(model: nn.Module) -> bool:
    """Whether they lie apart now, so that all ranks have to read the model together."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gather_weights(model: Any) -> None:
    """Make sharded weights whole on every rank, until gradients are summed."""
    if not is_sharded(model):
        return
    _read_one_token(model)  # FSDP's groups know each other after the first pass only
    model.set_requires_gradient_sync(False)
    model.set_is_last_backward(False)
    model.set_reshard_after_forward(False)
    model.set_reshard_after_backward(False)
    for part in _shards(model):
        part.unshard()


def release_weights(model: Any) -> None:
    """Keep this rank's shard alone of weights that were gathered."""
    for part in _shards(model):
        part.reshard()


@contextmanager
def whole_weights(model: Any) -> Iterator[None]:
    """Sharded weights are whole within, for whoever only reads."""
    gather_weights(model)
    try:
        with torch.no_grad():
            yield
    finally:
        release_weights(model)


def _sum_into_shards(model: Any) -> None:
    """One more pass, of gradient zero, in which FSDP sums all that has gathered."""
    model.set_requires_gradient_sync(True)
    model.set_is_last_backward(True)
    model.set_reshard_after_backward(True)
    (0.0 * _read_one_token(model, gradient=True)).backward()
    release_weights(model)


def _read_one_token(model: Any, gradient: bool = False) -> Tensor:
    device = next(model.parameters()).device
    one = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with torch.set_grad_enabled(gradient):
        logits: Tensor = model(input_ids=one).logits
    return logits.sum()


def whole(tree: Any) -> Any:
    """Nested containers with every sharded tensor whole, on rank 0 alone.

    One tensor at a time is gathered, and kept in the processor's memory.
    """

    def gather(tensor: DTensor) -> Tensor:
        full = tensor.full_tensor()
        return full.cpu() if index() == 0 else full.new_empty(0, device="cpu")

    return tree_map_only(DTensor, gather, tree)


def like(tensor: Tensor, sharded: Tensor) -> Tensor:
    """A whole tensor split as another one is; as it is beside a whole one."""
    if not isinstance(sharded, DTensor):
        return tensor
    split = sharded.device_mesh, sharded.placements
    return distribute_tensor(tensor.to(sharded.device), *split, src_data_rank=None)


def load(
    model: nn.Module, optimizer: torch.optim.Optimizer, weights: Any, moments: Any
) -> None:
    """Take over whole weights and an optimizer's whole state, split as the model is."""
    if not is_sharded(model):
        model.load_state_dict(weights)
    else:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(like(weights[name], parameter))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number, state in moments["state"].items():
            for name, tensor in state.items():
                if isinstance(tensor, Tensor) and tensor.ndim:
                    state[name] = like(tensor, parameters[number])
    optimizer.load_state_dict(moments)

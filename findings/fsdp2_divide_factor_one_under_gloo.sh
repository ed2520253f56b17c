#!/usr/bin/env bash
# torch's FSDP2 on a processor: `set_gradient_divide_factor(1.0)`, which asks for a plain
# sum of gradients, ends the backward pass under gloo, where leaving the factor alone (a
# mean, which divides as well) works.
#
# Guess before it was run: a factor of one is a sum, the one thing that every backend has.
# Seen: "Cannot use ReduceOp.PREMUL_SUM with Gloo". A factor of any value asks for NCCL's
# own operation, one of 1 as well. `set_force_sum_reduction_for_comms(True)` beside it
# makes it a sum of the same gradients.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy==2.4.6
cat > check.py <<'Q'
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard


def gradient(factor: float | None, force: bool) -> torch.Tensor | str:
    torch.manual_seed(0)
    model = nn.Linear(4, 2, bias=False)
    fully_shard(model)
    if factor is not None:
        model.set_gradient_divide_factor(factor)
    if force:
        model.set_force_sum_reduction_for_comms(True)
    try:
        model(torch.ones(1, 4) * (1 + dist.get_rank())).sum().backward()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return model.weight.grad.full_tensor()[0, 0]


dist.init_process_group("gloo")
mean, bare, forced = gradient(None, False), gradient(1.0, False), gradient(1.0, True)
if dist.get_rank() == 0:
    print("torch", torch.__version__.partition("+")[0])
    print("gradients 1 and 2 of two ranks; untouched:", mean)
    print("factor 1:", bare)
    print("factor 1 and forced sums:", forced)
same = mean == 1.5 and "PREMUL_SUM" in str(bare) and forced == 3.0
dist.destroy_process_group()
sys.exit(not same)
Q
export OMP_NUM_THREADS=1
code=0
venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 check.py ||
  code=$?
[ "$code" = 0 ] && echo "as described" || echo "CHANGED"
exit "$code"

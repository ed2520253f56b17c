#!/usr/bin/env bash
# torch's AdamW on float16 weights: three implementations of one update, which give
# three different weights from the same valid input.
#
# Guess before it was run: they agree up to one rounding of the weights.
# Seen: at the usual epsilon of 1e-8 the default forms give NaN (gradient zero) and -inf
# (gradients of 1e-4 and 1e-3) in one step, since second moments and epsilon itself are
# zero in float16; fused=True computes in float32 and moves every weight by the learning
# rate. At 3e-8, which is rounded up to 6e-8, a weight of 1 becomes -15.8 in one step of
# learning rate 1e-3, finite, without any sign. Trainers choose a form by themselves, so
# the same script can end in NaN or not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy==2.4.6
cat > check.py <<'P'
import sys

import torch

print("torch", torch.__version__.partition("+")[0])
seen = {}
for eps in (1e-8, 3e-8, 1e-4):
    forms = {"loop": {"foreach": False}, "foreach": {"foreach": True}}
    for name, form in (forms | {"fused": {"fused": True}}).items():
        p = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
        p.grad = torch.tensor([0.0, 1e-4, 1e-3, 0.1], dtype=torch.float16)
        torch.optim.AdamW([p], 1e-3, eps=eps, weight_decay=0.0, **form).step()
        seen[eps, name] = [round(x, 3) for x in p.tolist()]
        print(f"eps {eps:g}, {name:7}: ones became {seen[eps, name]}")
moved = [1.0, 0.999, 0.999, 0.999]
same = (
    str(seen[1e-8, "loop"]) == str(seen[1e-8, "foreach"]) == "[nan, -inf, -inf, 0.999]"
    and seen[1e-8, "fused"] == moved
    and seen[3e-8, "foreach"][2] < -10
    and seen[3e-8, "fused"] == moved
    and all(abs(x - 1) < 0.02 for x in seen[1e-4, "loop"])
)
print("as described" if same else "CHANGED")
sys.exit(not same)
P
venv/bin/python check.py

#!/usr/bin/env bash
# transformers' Adafactor on bf16 weights: what is resumed is not what was stopped.
#
# Guess before it was run: an optimizer whose state_dict is saved and loaded goes on with
# the same bits.
# Seen: with float32 weights it does. With bf16 weights Adafactor keeps its second moments
# in float32 for good reason, state_dict stores them so, and torch's load_state_dict rounds
# every floating state to the type of the weight, bf16. The optimizer takes them back to
# float32 at the next step, so that no type shows what was lost; the weights differ from
# those of a training that was never stopped. AdamW and torch's own Adafactor, whose states
# have the type of the weights from the start, resume exactly.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cat > check.py <<'P'
import sys

import torch
import transformers
from transformers.optimization import Adafactor

print("torch", torch.__version__.partition("+")[0], "transformers", transformers.__version__)


def hf(p):
    return Adafactor([p], lr=1e-2, relative_step=False, scale_parameter=False)


def trained(make, dtype, stop):
    rng = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(64, 128, generator=rng).to(dtype))
    optimizer, kinds = make(p), []
    for step in range(10):
        if step == stop:
            saved = optimizer.state_dict()
            p = torch.nn.Parameter(p.detach().clone())
            optimizer = make(p)
            kinds += [str(v.dtype) for v in saved["state"][0].values() if torch.is_tensor(v)]
            optimizer.load_state_dict(saved)
            kinds += ["->"]
            kinds += [str(v.dtype) for v in optimizer.state[p].values() if torch.is_tensor(v)]
        p.grad = 1e-3 * torch.randn(p.shape, generator=rng).to(dtype)
        optimizer.step()
    return p.detach(), kinds


makers = {
    "transformers.Adafactor": hf,
    "torch.optim.Adafactor": lambda p: torch.optim.Adafactor([p], 1e-2),
    "torch.optim.AdamW": lambda p: torch.optim.AdamW([p], 1e-2),
}
differ = {}
for name, make in makers.items():
    for dtype in (torch.float32, torch.bfloat16):
        straight, _ = trained(make, dtype, None)
        resumed, kinds = trained(make, dtype, 5)
        differ[name, dtype] = int((straight != resumed).sum())
        print(f"{name}, {dtype}: {differ[name, dtype]} of {straight.numel()} weights differ;",
              "state", " ".join(kinds).replace("torch.", ""))
wrong = differ.pop(("transformers.Adafactor", torch.bfloat16))
same = wrong > 0 and not any(differ.values())
print("as described" if same else "CHANGED")
sys.exit(not same)
P
HF_HUB_OFFLINE=1 venv/bin/python check.py

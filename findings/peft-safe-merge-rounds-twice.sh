#!/bin/sh
# PEFT: merge_and_unload(safe_merge=True) gives other weights than safe_merge=False.
#
# The documentation says of safe_merge that it copies the weights and checks the result
# for NaN before it replaces them. On a bf16 layer with float32 adapters, which is what
# get_peft_model makes of a bf16 model, it also rounds the update to bf16 before adding it,
# so the sum is rounded twice; without it the float32 update is added and rounded once.
# Embeddings are rounded twice either way. Exits non-zero when that is no longer so.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q peft==0.21.2 torch==2.13.0 transformers==5.23.0
venv/bin/python - <<'PYTHON'
import copy
import sys

import peft
import torch
from torch import nn

print("peft", peft.__version__, "torch", torch.__version__.split("+")[0])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(256, 256)
        self.linear = nn.Linear(256, 256, bias=False)

    def forward(self, x):
        return self.linear(self.words(x))


torch.manual_seed(0)
base = Model().bfloat16()
config = peft.LoraConfig(
    r=8, target_modules=["words", "linear"], init_lora_weights=False
)
model = peft.get_peft_model(copy.deepcopy(base), config)
kinds = {str(p.dtype) for n, p in model.named_parameters() if "lora_" in n}
print("base in torch.bfloat16, adapters in", *kinds)
ok = kinds == {"torch.float32"}
for name in ("linear", "words"):
    layer = getattr(model.base_model.model, name)
    delta = layer.get_delta_weight("default")
    w = getattr(base, name).weight.data
    once = (w.float() + delta).bfloat16()
    twice = w + delta.bfloat16()
    for safe in (False, True):
        merged = copy.deepcopy(model).merge_and_unload(safe_merge=safe)
        found = getattr(merged, name).weight.data
        said = "once" if torch.equal(found, once) else "other"
        said = "twice" if torch.equal(found, twice) else said
        print(f"{name}, safe_merge={safe}: rounded {said}")
        ok &= said == ("once" if name == "linear" and not safe else "twice")
    share = float((once != twice).float().mean())
    print(f"{name}: {share:.1%} of the weights differ between the two")
    ok &= share > 0.01
sys.exit(not ok)
PYTHON

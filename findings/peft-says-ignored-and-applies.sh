#!/bin/sh
# PEFT: rank_pattern and alpha_pattern for a parameter (target_parameters) are applied,
# while a warning says that they matched nothing and were ignored.
#
# Guess before it was run: a warning of ignored keys means that the adapter has the default
# rank and alpha. Seen: both keys are warned about, and the parameter has the rank and the
# scaling of the patterns, in memory and in what is saved. So a reader of
# adapter_config.json who trusts the warning merges with another scaling than PEFT does.
# Exits non-zero when that is no longer so.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q peft==0.21.2 torch==2.13.0 transformers==5.23.0
venv/bin/python - <<'PYTHON'
import sys
import warnings

import peft
import torch
from torch import nn

print("peft", peft.__version__, "torch", torch.__version__.split("+")[0])


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x):
        return x @ self.down_proj[0]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()

    def forward(self, x):
        return self.experts(x)


config = peft.LoraConfig(
    r=4,
    lora_alpha=16,
    target_modules=[],
    target_parameters=["experts.down_proj"],
    rank_pattern={"experts.down_proj": 2},
    alpha_pattern={"experts.down_proj": 3},
    init_lora_weights=False,
)
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    model = peft.get_peft_model(Model(), config)
said = [str(w.message) for w in heard if "ignored" in str(w.message)]
for line in said:
    print("warning:", line)
layer = model.base_model.model.experts
rank = layer.lora_A["default"].weight.shape[0] // 3
scaling = layer.scaling["default"]
print(f"rank of the parameter: {rank} (pattern 2, default 4)")
print(f"scaling: {scaling} (3 / 2 by the patterns, 16 / 4 without)")
print("size of A as it is saved:", peft.get_peft_model_state_dict(model)[
    "base_model.model.experts.lora_A.weight"].shape)
sys.exit(not (len(said) == 2 and rank == 2 and scaling == 1.5))
PYTHON

#!/usr/bin/env bash
# grokadamw (optim="grokadamw" of transformers' Trainer): a state that is saved and loaded
# is not used.
#
# Guess before it was run: state_dict and load_state_dict carry the moments over.
# Seen: the moments are kept in the parameter group, by the parameter object itself, and
# state_dict()["state"] is empty. They are written to the checkpoint as part of the group
# and read again; but the model of the resumed process has other parameter objects, so
# every moment starts from zero and the count of steps from one, without a word. The first
# resumed step goes a whole learning rate in every entry, as a first step does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy==2.4.6
venv/bin/pip install --quiet --no-deps grokadamw==0.1.2
cat > check.py <<'P'
import copy
import sys
import warnings
from importlib.metadata import version

import torch
from grokadamw import GrokAdamW

warnings.simplefilter("ignore")
print("torch", torch.__version__.partition("+")[0], "grokadamw", version("grokadamw"))


def trained(make, stop):
    rng = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(64, 128, generator=rng))
    optimizer, keys = make(p), None
    for step in range(10):
        if step == stop:
            saved = copy.deepcopy(optimizer.state_dict())
            keys = list(saved["state"])
            p = torch.nn.Parameter(p.detach().clone())  # as in another process
            optimizer = make(p)
            optimizer.load_state_dict(saved)
        p.grad = 1e-3 * torch.randn(p.shape, generator=rng)
        optimizer.step()
    return p.detach(), keys


differ = {}
for name, make in {
    "AdamW": lambda p: torch.optim.AdamW([p], lr=1e-2),
    "GrokAdamW": lambda p: GrokAdamW([p], lr=1e-2),
}.items():
    straight, _ = trained(make, None)
    resumed, keys = trained(make, 5)
    differ[name] = int((straight != resumed).sum())
    print(f"{name}: parameters with a saved state {keys}; resumed, {differ[name]} of "
          f"{straight.numel()} weights differ, by up to {(straight - resumed).abs().max():.3f}")
same = differ["AdamW"] == 0 and differ["GrokAdamW"] > 8000
print("as described" if same else "CHANGED")
sys.exit(not same)
P
venv/bin/python check.py

#!/usr/bin/env bash
# torch: step hooks of an optimizer whose step calls its parent's run twice a step, and the
# first post hook runs before the subclass has written its last word.
#
# Guess before it was run: hooks that are registered on an instance run once a step, around
# all of it.
# Seen: torch wraps the step of every class once; a subclass that ends in
# super().step(closure) is wrapped, and so is its parent. The pre and post hooks of the
# instance run for both, nested: pre, pre, post, post. A hook that keeps something from the
# pre hook for the post hook, as a projection of updates does, takes the inner step for the
# whole one, or fails at the second post hook. Code that runs once a step and is no
# idempotent correction (counting, projecting, averaging) is wrong without a word.
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


class Decayed(torch.optim.AdamW):
    """AdamW, and after it something of its own."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.5)
        return loss


seen = {}
for kind in (torch.optim.AdamW, Decayed):
    p = torch.nn.Parameter(torch.ones(1))
    p.grad = torch.zeros(1)
    optimizer = kind([p], lr=1e-3, weight_decay=0.0)
    heard = seen.setdefault(kind.__name__, [])
    optimizer.register_step_pre_hook(lambda *_: heard.append(("pre", round(p.item(), 3))))
    optimizer.register_step_post_hook(lambda *_: heard.append(("post", round(p.item(), 3))))
    optimizer.step()
    print(f"{kind.__name__}: one step, hooks and the weight that they see: {heard}")
same = seen == {
    "AdamW": [("pre", 1.0), ("post", 1.0)],
    "Decayed": [("pre", 1.0), ("pre", 1.0), ("post", 1.0), ("post", 0.5)],
}
print("as described" if same else "CHANGED")
sys.exit(not same)
P
venv/bin/python check.py

#!/usr/bin/env bash
# reasoning-gym: data of two seeds as training and held-out part.
#
# Guess before it was run: another seed, other problems; the same seed, the same ones.
# Seen: problem i of seed s is problem i - 1 of seed s + 1, so two neighbouring seeds
# share all problems but one. And a family that walks through a set of words draws
# other problems of the same seed in a process in which texts hash otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet reasoning-gym==0.1.25
cat > check.py <<'P'
import os
import subprocess
import sys
from importlib.metadata import version

import reasoning_gym

print("reasoning-gym", version("reasoning-gym"))
train, held_out = (
    {p["question"] for p in reasoning_gym.create_dataset("chain_sum", seed=s, size=100)}
    for s in (0, 1)
)
shared = len(train & held_out)
print(f"chain_sum: seeds 0 and 1 share {shared} of 100 problems")
call = (
    "import reasoning_gym; "
    "print(reasoning_gym.create_dataset('word_ladder', seed=12345, size=1)[0])"
)
drawn = {
    subprocess.run(
        [sys.executable, "-c", call],
        env=os.environ | {"PYTHONHASHSEED": seed},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for seed in ("0", "1")
}
print(f"word_ladder of seed 12345 in two processes: {len(drawn)} problems")
sys.exit(not (shared == 99 and len(drawn) == 2))
P
venv/bin/python check.py

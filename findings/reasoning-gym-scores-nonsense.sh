#!/usr/bin/env bash
# reasoning-gym: what its scorers give for an answer that is no answer.
#
# Guess before it was run: 0, or a little for an answer of the right form.
# Seen: game_of_life_halting gives the full score for any text, whatever the right answer
# is, and prime_factorization raises an error for a text that is no product. A model
# earns all rewards of the first by writing anything, and ends a training that does not
# expect errors with the second.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet reasoning-gym==0.1.25
cat > check.py <<'P'
import sys
from importlib.metadata import version

import reasoning_gym

print("reasoning-gym", version("reasoning-gym"))
data = reasoning_gym.create_dataset("game_of_life_halting", seed=0, size=40)
given = [(p["answer"], data.score_answer("no answer", p)) for p in data]
full = {answer: {s for a, s in given if a == answer} for answer, _ in given}
print(f"game_of_life_halting, score of 'no answer' by right answer: {full}")
data = reasoning_gym.create_dataset("prime_factorization", seed=0, size=1)
try:
    raised = f"gives {data.score_answer('no answer', data[0])}"
except ValueError as error:
    raised = f"raises {error!r}"
print(f"prime_factorization, 'no answer': {raised}")
alike = full == {"True": {1.0}, "False": {1.0}}
sys.exit(not (alike and raised.startswith("raises")))
P
venv/bin/python check.py

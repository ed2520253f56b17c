#!/bin/sh
# transformers 5.23: save_pretrained into a folder of the rank's own, in a process group.
# Every process calls it with is_main_process=True (the default), which the documentation
# leaves to the caller. Rank 0 leaves a checkpoint, rank 1 an empty folder, without an
# error or a warning: it asks torch.distributed itself. Who trains a model a rank, or
# hands weights to an engine of the same process this way, finds it when it is read.
# Exits with 1 once every rank saves, or says that it does not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 numpy==2.4.6
cd "$folder"
cat > rank.py <<'END'
import os
import sys

import torch.distributed as dist
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

rank = int(sys.argv[1])
if sys.argv[2] == "group":
    dist.init_process_group(
        "gloo", init_method="file://" + os.path.abspath("meet"), rank=rank, world_size=2
    )
sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 16, "n_positions": 8}
sizes |= {"bos_token_id": 1, "eos_token_id": 2}
own = f"{sys.argv[2]} {rank}"
GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(own, is_main_process=True)
print(transformers.__version__, own, sorted(os.listdir(own)), flush=True)
if dist.is_initialized():
    dist.barrier()
END
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1
venv/bin/python rank.py 1 alone > alone.txt 2>&1
venv/bin/python rank.py 0 group > zero.txt 2>&1 &
venv/bin/python rank.py 1 group > one.txt 2>&1
wait
cat alone.txt zero.txt one.txt
test -f "alone 1/model.safetensors"
test -f "group 0/model.safetensors"
test -z "$(ls -A 'group 1')"
! grep -i "warn\|error" one.txt
echo "as found: rank 1 of a group saves nothing and says nothing"

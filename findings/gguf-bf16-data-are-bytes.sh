#!/bin/sh
# gguf: the data of a BF16 tensor are bytes with a doubled last axis, those of F16 are not.
#
# GGUFReader gives float16 and float32 tensors as arrays of that type in the shape of the
# matrix. Of a BF16 tensor, just as unquantised, it gives uint8 of shape (rows, 2 * cols):
# a program that measures tensor.data measures bytes, without an error, and its shape
# differs from the one that tensor.shape says. Exits non-zero when that is no longer so.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q gguf==0.19.0
venv/bin/python - <<'PYTHON'
import sys
from importlib.metadata import version

import gguf
import numpy as np

print("gguf", version("gguf"))
w = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
writer = gguf.GGUFWriter("m.gguf", "llama")
for kind in ("F32", "F16", "BF16"):
    type_ = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(kind, gguf.quants.quantize(w, type_), raw_dtype=type_)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
seen = {}
for tensor in gguf.GGUFReader("m.gguf").tensors:
    data = tensor.data
    shape = [int(n) for n in tensor.shape]
    mean = float(data.astype(np.float64).mean())
    print(f"{tensor.name}: shape {shape}, data {data.dtype} {data.shape}, mean {mean:.1f}")
    back = gguf.quants.dequantize(data, tensor.tensor_type)
    print(f"  dequantize gives the matrix: {np.array_equal(back, w)}")
    seen[tensor.name] = (str(data.dtype), data.shape, round(mean, 1))
print(f"the mean of the matrix is {w.mean():.1f}")
expected = {
    "F32": ("float32", (2, 3), 3.5),
    "F16": ("float16", (2, 3), 3.5),
    "BF16": ("uint8", (2, 6), seen["BF16"][2]),
}
sys.exit(seen != expected or seen["BF16"][2] == 3.5)
PYTHON

"""The stage that packs what ``run`` needs on a GPU machine without a network, in batches of a limited size."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from gpu_machine.batches import pack_folders
from gpu_machine.wheels import conflicts, download, lay_out, own_wheel

# The CUDA 13 builds: cuBLAS, cuDNN and the others come with torch. With what exporting needs beyond torch and
# transformers, and what those need in turn.
PACKAGES = (
    "onnxruntime-gpu==1.31.1",
    "onnxruntime-genai-cuda==0.18.0",
    "tensorrt-rtx-cu13-libs==1.7.1.116",
    "tensorrt-rtx-cu13-bindings==1.7.1.116",
    "flatbuffers==25.12.19",
    "ml-dtypes==0.6.0",
    "onnx==1.23.2",
    "onnx-ir==1.1.0",
    "onnxscript==0.7.2",
    "protobuf==7.36.2",
    "typing-extensions==4.16.0",
)
# Large ones are units of their own, so that a change to the rest packs only the rest anew.
LARGE = ("onnxruntime_gpu", "onnxruntime_genai_cuda", "tensorrt")

COMMANDS = """
On the GPU machine, from the root of a copy of this checkout; $BATCHES is the folder where a batch arrives, $OUT one
that comes back. A command may take ten minutes, the machine is lent for fifteen. One paragraph is one command.

{first}

{last} &&
. /tmp/onnx-gpu/env && onnx_gpu run --budget-s 400 --precisions fp16 --out $OUT/onnx_gpu_fp16.json

. /tmp/onnx-gpu/env; onnx_gpu run --budget-s 300 --precisions bf16 --out $OUT/onnx_gpu_bf16.json

Records go to benchmarks/results/. Should exporting take too long, --layers 8 halves the model.
"""


def pack(options: argparse.Namespace) -> int:
    """Download, compress, and write the batches; what is there from an earlier call is kept."""
    out: Path = options.out
    wheels = [*download(out / "wheels", PACKAGES), *options.wheel]
    wrong = conflicts(wheels, ())
    if wrong:
        sys.exit("\n".join(wrong))
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        own = own_wheel(Path(scratch))
        folders = lay_out([*wheels, own], Path(scratch) / "units", lambda wheel, name: unit(wheel, own))
        batches = pack_folders(folders, out, int(options.limit_mib * 2**20))
    take = "python3 benchmarks/onnx_gpu unpack --batches $BATCHES --into /tmp/onnx-gpu"
    lines = [f": {path.name} is in $BATCHES;\n{take}" for path in batches]
    print(COMMANDS.format(first="\n\n".join(lines[:-1]), last=lines[-1]))
    return 0


def unit(wheel: Path, own: Path) -> str:
    """Which unit a wheel's files go to."""
    if wheel == own:
        return "sparsify"
    return next((name for name in LARGE if wheel.name.startswith(name)), "packages")

"""ONNX Runtime and TensorRT on an NVIDIA GPU: do exported models run, are they right, and what do zeros save.

Written for a machine that is lent for a quarter of an hour, has Python 3.12, torch 2.11 for CUDA 13, transformers and
no network, and takes files in batches. What it lacks is packed elsewhere by the stage `pack`, which also prints the
commands. The stage `run` is one command of less than ten minutes and writes one JSON record:

    python3 benchmarks/onnx_gpu pack   --out DIR [--wheel FILE ...]   download and write the batches
    python3 benchmarks/onnx_gpu unpack --batches DIR --into DIR       join, verify, unpack; then `. DIR/env`
    onnx_gpu run --out FILE                                           export, build, check and time
    python3 benchmarks/onnx_gpu twin   --artifact DIR --out FILE      time an artifact's engine against its dense twin

`pack` takes TensorRT-RTX from PyPI, which has no wheel of TensorRT 10 or 11 with a builder. Wheels of TensorRT for
Python 3.12 that you have are packed with `--wheel`; `run` then prefers TensorRT (`--runtime`).

Parts of `run`, in order, each for every precision and in a process of its own: what fails is recorded, and the rest
goes on. Exit status: 0 all well, 1 something is wrong, 3 something could not be run or did not fit into --budget-s.
With `--device cpu --tiny` an ordinary machine runs export, TensorRT-RTX's build and ONNX Runtime on the CPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# A folder that is run is on the path itself; its modules are those of a package, beside the other benchmarks.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_machine.stages import add_packing, main, stage_options

from onnx_gpu.pack import pack
from onnx_gpu.run import PARTS, run
from onnx_gpu.tasks import TASKS
from onnx_gpu.twin import twin


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "onnx_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = parser.add_subparsers(required=True, metavar="STAGE")
    stage = add_packing(stages, pack, Path(__file__).parent)
    stage.add_argument("--wheel", type=Path, nargs="+", default=[], help="further wheels, as of TensorRT")
    stage = stages.add_parser(
        "run", parents=[stage_options("onnx-gpu/work", 560)], help="export, build, check and time"
    )
    stage.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    stage.add_argument("--precisions", nargs="+", default=["fp16", "bf16"], choices=["fp32", "fp16", "bf16"])
    stage.add_argument("--runtime", choices=["tensorrt", "tensorrt-rtx"], help="default: whichever is there, in order")
    stage.add_argument("--layers", type=int, help="blocks, fewer than the model has")
    stage.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    stage.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    stage.add_argument("--new-tokens", type=int, default=64)
    stage.add_argument("--repeats", type=int, default=5)
    stage.set_defaults(run=run)
    stage = stages.add_parser("twin", help="time an artifact's engine against its dense twin", description=twin.__doc__)
    stage.add_argument("--artifact", type=Path, required=True, help="folder that --target tensorrt wrote")
    stage.add_argument("--out", type=Path, required=True)
    stage.add_argument("--new-tokens", type=int, default=64)
    stage.add_argument("--repeats", type=int, default=5)
    stage.add_argument("--no-cuda-graphs", dest="cuda_graphs", action="store_false")
    stage.add_argument("--trust-engine", action="store_true", help="load engines that were not built here")
    stage.set_defaults(run=twin, device="cuda", budget_s=0.0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse, TASKS)

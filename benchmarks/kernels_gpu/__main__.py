"""The GPU kernels on an NVIDIA GPU: are they right, and what do 8-bit floats gain with zeros and without.

Not yet run on a GPU. Written for a machine that is lent for some minutes and has torch, triton and a copy of this
checkout, but no network. What the kernels gain is the hardware report's: benchmarks/gpu_report. Each stage fits into
one command of less than ten minutes and writes one JSON record; run `tune` before `prefill`:

    python3 benchmarks/kernels_gpu check   --out FILE    every kernel against float64, in graphs, twice the same
    python3 benchmarks/kernels_gpu tune    --out FILE    configurations of the Triton kernel, algorithms of cuSPARSELt
    python3 benchmarks/kernels_gpu prefill --out FILE    2048 tokens and more, MLPs of Llama-3.1-8B and -70B

A run on an H200, whose records are then copied to benchmarks/results:

    python3 benchmarks/kernels_gpu check --out $OUT/kernels_gpu_check.json --budget-s 120;
    python3 benchmarks/kernels_gpu tune --out $OUT/kernels_gpu_tune.json --budget-s 240;
    python3 benchmarks/kernels_gpu prefill --out $OUT/kernels_gpu_prefill.json --budget-s 120

Beside each time stand what the hardware allows and how long a call keeps the host busy. `--kernels` times others than
those two, and --layers also a GPU's share of a 70B model on eight.

What may crash or poison a CUDA context runs in a process of its own. Exit status: 0 all well, 1 something is wrong, 3
something could not be run or did not fit into --budget-s; the record says what and why. What is tuned lies in --work
and is read from there by the stages after it. With `--device cpu --tiny` the machinery runs on an ordinary machine,
with the reference kernel in place of those that need a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# A folder that is run is on the path itself; its modules are those of a package, beside the other benchmarks.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_machine.stages import main, stage_options

from kernels_gpu.check import TASKS, check
from kernels_gpu.layers import DECODE, LAYERS, MLP, SHARDS
from kernels_gpu.prefill import prefill
from kernels_gpu.tune import tune


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "kernels_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = parser.add_subparsers(required=True, metavar="STAGE")
    common = stage_options("kernels-gpu", 500)
    common.add_argument("--samples", type=int, default=20, help="of each variant, in turn")
    stage = stages.add_parser("check", parents=[common], help="are the kernels right")
    stage.add_argument("--parts", nargs="+", default=list(TASKS), choices=TASKS)
    stage.set_defaults(run=check)
    stage = stages.add_parser("tune", parents=[common], help="search configurations and algorithms")
    stage.add_argument("--layers", nargs="+", default=list(LAYERS), choices=[*LAYERS, *SHARDS])
    stage.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    stage.add_argument("--patterns", nargs="+", default=list(DECODE), help="2:4, or a share of zeros")
    stage.add_argument("--prefill-tokens", type=int, nargs="*", default=[2048, 4096, 8192])
    stage.set_defaults(run=tune)
    stage = stages.add_parser("prefill", parents=[common], help="time MLPs, many tokens")
    stage.add_argument("--kernels", nargs="+", choices=TASKS, help="to time beside the dense product")
    stage.add_argument("--layers", nargs="+", default=list(MLP), choices=[*LAYERS, *SHARDS])
    stage.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    stage.set_defaults(run=prefill)
    return parser.parse_args(arguments)


def parse_and_keep(arguments: list[str]) -> argparse.Namespace:
    """What is asked for; what is tuned is kept in --work, and found there."""
    options = parse(arguments)
    os.environ["SPARSIFY_CACHE"] = str(options.work / "cache")
    return options


if __name__ == "__main__":
    main(parse_and_keep, TASKS)

"""The sparse kernels and vLLM on an NVIDIA GPU: are they right, and what do they save.

Written for a machine that is lent for half an hour, has torch and no network, and takes files in batches. What it lacks
is packed elsewhere by the stage `pack`, which also prints the commands. Each other stage fits into one command of less
than ten minutes, and all but `unpack` write one JSON record:

    python3 benchmarks/vllm_gpu pack   --out DIR                   download and write the batches
    python3 benchmarks/vllm_gpu unpack --batches DIR --into DIR    join, verify, unpack; the rest runs after `. DIR/env`
    vllm_gpu check --out FILE              format, kernels and vLLM against the CPU and dense
    vllm_gpu model --out FILE              random weights of Llama-3.1-8B's shape with 2:4 zeros
    vllm_gpu serve --out FILE [--resume]   tokens per second, memory, load time, variants in turn

What may crash or poison a CUDA context runs in a process of its own. Exit status: 0 all well, 1 something is wrong, 3
something could not be run or did not fit into --budget-s; the record says what and why. Models and caches lie in
--work. With `--device cpu --tiny` everything but CUDA itself runs on an ordinary machine. Single linears are timed by
benchmarks/kernels_gpu.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# A folder that is run is on the path itself; its modules are those of a package, beside the other benchmarks.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_machine.stages import add_packing, main, stage_options

from vllm_gpu.check import PARTS, check
from vllm_gpu.children import TASKS
from vllm_gpu.model import model
from vllm_gpu.pack import pack
from vllm_gpu.serve import serve
from vllm_gpu.variants import KERNELS, VARIANTS


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "vllm_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = parser.add_subparsers(required=True, metavar="STAGE")
    add_packing(stages, pack, Path(__file__).parent)
    common = stage_options("vllm-gpu/work", 560)
    kernels = argparse.ArgumentParser(add_help=False)
    kernels.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS)
    engine = argparse.ArgumentParser(add_help=False)
    engine.add_argument("--attention", help="vLLM's attention backend, for example TRITON_ATTN")
    stage = stages.add_parser("check", parents=[common, kernels, engine], help="is it right")
    stage.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    stage.set_defaults(run=check)
    stage = stages.add_parser("model", parents=[common], help="write the model that serve runs")
    stage.add_argument("--layers", type=int, help="blocks, fewer than the model has")
    stage.set_defaults(run=model)
    stage = stages.add_parser("serve", parents=[common, engine], help="time vLLM")
    stage.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    stage.add_argument("--rounds", type=int, default=3)
    stage.add_argument("--repeats", type=int, default=3, help="of each measure within a process")
    stage.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256])
    stage.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    stage.add_argument("--new-tokens", type=int, default=64)
    stage.add_argument("--resume", action="store_true", help="add to the rounds of the call before, kept in --work")
    stage.add_argument("--in-process", action="store_true", help="the engine in the process that asks")
    stage.set_defaults(run=serve)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse, TASKS)

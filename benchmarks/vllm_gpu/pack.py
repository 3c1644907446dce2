"""The stage that packs what the others need on a GPU machine without a network, in batches of a limited size.

Downloads vLLM's CUDA wheel and the packages that it imports (nothing is installed), leaves out of vLLM what a Llama on
a Hopper GPU does not load, adds this checkout as a wheel, and writes `batch-1.tar`, `batch-2.tar` ..., which
the stage `unpack` verifies and joins. The machine has Python 3.12, torch 2.11 for CUDA 13, triton and transformers:
none of these is packed, nor is a model, whose weights are random and made there. Run again after a change, it downloads
and compresses only what changed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from gpu_machine.batches import pack_folders
from gpu_machine.wheels import conflicts, download, lay_out, own_wheel

# The newest version of vLLM for torch 2.11 whose compiled core is of moderate size.
VLLM = "vllm==0.25.1"
# What importing and running it on one GPU needs beyond torch, transformers and numpy, with what those need in turn;
# found by blocking one module at a time. Versions that vLLM or one of them asks for are kept, see ``conflicts``.
PACKAGES = (
    "aiohappyeyeballs==2.7.1",
    "aiohttp==3.14.5",
    "aiosignal==1.4.0",
    "annotated-doc==0.0.7",
    "annotated-types==0.8.0",
    "anyio==4.16.0",
    "apache-tvm-ffi==0.1.15.post2",
    "attrs==26.1.0",
    "cachetools==8.0.2",
    "cbor2==6.3.0",
    "certifi==2026.10.19.post1",
    "charset-normalizer==3.5.3",
    "cloudpickle==3.1.3",
    "compressed-tensors==0.17.0",
    "einops==0.8.2",
    "fastapi==0.136.3",
    "frozenlist==1.8.0",
    "h11==0.16.0",
    "httpcore2==2.16.2",
    "httpx2==2.16.2",
    "idna==3.20",
    "jiter==0.19.0",
    "llguidance==1.7.6",
    "loguru==0.7.3",
    "msgspec==0.22.0",
    "multidict==7.2.1",
    "openai==3.57.0",
    "openai-harmony==0.0.8",
    "partial-json-parser==0.2.1.1.post7",
    "pillow==13.0.0",
    "prometheus-client==0.26.0",
    "propcache==0.5.4",
    "psutil==7.2.2",
    "py-cpuinfo==9.0.0",
    "pybase64==1.5.1",
    "pydantic==2.14.4",
    "pydantic-core==2.50.5",
    "pyzmq==27.3.0",
    "requests==2.34.2",
    "sniffio==1.3.1",
    "starlette==1.10.0",
    "truststore==0.10.5",
    "typing-extensions==4.16.0",
    "typing-inspection==0.4.5",
    "urllib3==2.8.0",
    "uvloop==0.23.0",
    "xgrammar==0.2.8",
    "yarl==1.25.1",
)
# vLLM pins it for libraries that are not packed; the small build of xgrammar wants a newer one.
OTHERWISE = {("vllm", "apache-tvm-ffi")}

# Of vLLM's compiled modules: its core, which CUDA needs, and attention for Hopper; the others are for mixtures of
# experts, other attention, quantisation and other GPUs, and vLLM does without them.
CORE, ATTENTION = "vllm/_C_stable_libtorch", "vllm/vllm_flash_attn/_vllm_fa3_C"
SMALL = ("vllm/cumem_allocator", "vllm/spinloop")
LEFT_OUT = ("vllm/third_party/deep_gemm/", "vllm/third_party/fmha_sm100/")
SUFFIXES = (".py", ".jinja")


def vllm_part(name: str) -> str | None:
    """Which unit a file of vLLM's wheel goes to; None leaves it out."""
    if name.endswith(".so"):
        for prefix, unit in ((CORE, "vllm-core"), (ATTENTION, "vllm-attention")):
            if name.startswith(prefix):
                return unit
        return "vllm-python" if name.startswith(SMALL) else None
    keep = name.endswith(SUFFIXES) or ".dist-info/" in name
    return "vllm-python" if keep and not name.startswith(LEFT_OUT) else None


def part(wheel: Path, name: str, own: Path) -> str | None:
    """Which unit a wheel's file goes to; None leaves it out."""
    if wheel.name.startswith("vllm-"):
        return vllm_part(name)
    return "sparsify" if wheel == own else "packages"


COMMANDS = """
On the GPU machine, from the root of a copy of this checkout; $BATCHES is the folder where a batch arrives, $OUT one
that comes back. A command may take ten minutes, the machine is lent for thirty. One paragraph is one command.

{first}

{last} &&
. /tmp/vllm-gpu/env && vllm_gpu check --budget-s 420 --kernels packed cusparselt --out $OUT/check.json;
python3 -m pytest -q -m gpu -o filterwarnings=default tests/test_gpu.py 2>&1 | tee $OUT/pytest.txt

. /tmp/vllm-gpu/env; vllm_gpu model --out $OUT/model.json &&
vllm_gpu serve --budget-s 280 --variants plain dense packed cusparselt --out $OUT/serve.json

. /tmp/vllm-gpu/env; vllm_gpu serve --resume --variants plain dense packed cusparselt --out $OUT/serve.json

CUTLASS runs on compute capability 8.x only, so that it is left out; with it named the records say why. If vLLM's
attention for Hopper fails, add --attention TRITON_ATTN. The record of `serve --resume` holds the earlier rounds too.
"""


def pack(options: argparse.Namespace) -> int:
    """Download, strip, compress, and write the batches."""
    out: Path = options.out
    wheels = download(out / "wheels", [VLLM, *PACKAGES])
    wrong = conflicts(wheels, OTHERWISE)
    if wrong:
        sys.exit("\n".join(wrong))
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        own = own_wheel(Path(scratch))
        folders = lay_out([*wheels, own], Path(scratch) / "units", lambda wheel, name: part(wheel, name, own))
        batches = pack_folders(folders, out, int(options.limit_mib * 2**20))
    take = "python3 benchmarks/vllm_gpu unpack --batches $BATCHES --into /tmp/vllm-gpu"
    lines = [f": {path.name} is in $BATCHES;\n{take}" for path in batches]
    print(COMMANDS.format(first="\n\n".join(lines[:-1]), last=lines[-1]))
    return 0

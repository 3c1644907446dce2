"""What ONNX Runtime's exceptions mean to a user, in one line with what to do."""

from __future__ import annotations

import re
from pathlib import Path

from sparsify.errors import ModelError, SparsifyError

_NO_MEMORY = re.compile(
    r"bad_alloc|bad allocation|Failed to allocate memory|out of memory|OUT_OF_MEMORY|cudaErrorMemory"
)
_OPSET = re.compile(r"Opset (\d+) is under development|current official support for domain \S+ is till opset (\d+)")
_IR = re.compile(r"Unsupported model IR version: (\d+), max supported IR version: (\d+)")
_NO_KERNEL = re.compile(r"Could not find an implementation for (\w+)")
# The place in ONNX Runtime's own source that raised, which precedes the message.
_SOURCE = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : |/\S+\.(?:cc|h):\d+ [^:]*(?:::[^:]+)*?\) ")


class MissingKernelError(ModelError):
    """The provider has no kernel for an operator in the precision of the model."""


def line(error: BaseException) -> str:
    """The message of ONNX Runtime in one line, without the function signature before it, at most 300 characters."""
    return _SOURCE.sub("", " ".join(str(error).split()))[:300]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the CPU or a GPU."""
    return isinstance(error, MemoryError) or bool(_NO_MEMORY.search(str(error)))


def load_error(path: Path, error: BaseException) -> SparsifyError:
    """What to raise where no session could be made of ``path``."""
    import onnxruntime

    text, version = " ".join(str(error).split()), onnxruntime.__version__
    if is_out_of_memory(error):
        return SparsifyError(
            f"{path}: not enough memory to load it; free some, or export a smaller precision ({line(error)})"
        )
    if opset := _OPSET.search(text):
        return ModelError(
            f"{path}: opset {opset[1] or opset[2]} is newer than ONNX Runtime {version} reads; pip install --upgrade "
            "onnxruntime, or export with a lower --opset"
        )
    if ir := _IR.search(text):
        return ModelError(
            f"{path}: ONNX file version (IR) {ir[1]} is newer than the {ir[2]} of ONNX Runtime {version}; "
            "pip install --upgrade onnxruntime"
        )
    if kernel := _NO_KERNEL.search(text):
        return MissingKernelError(
            f"{path}: ONNX Runtime {version} cannot run {kernel[1]} in the precision of this model on this provider; "
            "choose another provider, or export another precision"
        )
    return ModelError(f"{path}: ONNX Runtime cannot load it: {line(error)}")


def run_error(path: Path, shape: tuple[int, int], error: BaseException) -> SparsifyError:
    """What to raise where a step on ids of ``shape`` [batch, length] failed."""
    if is_out_of_memory(error):
        return SparsifyError(
            f"{path}: not enough memory for {shape[0]} x {shape[1]} tokens; run fewer or shorter sequences at a time "
            f"({line(error)})"
        )
    return ModelError(f"{path}: ONNX Runtime failed on {shape[0]} x {shape[1]} tokens: {line(error)}")

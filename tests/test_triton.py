"""The Triton kernels without a GPU: run in its interpreter, compiled for three architectures, and their settings."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsify.format.packed import encode
from sparsify.kernels import device_cache, triton_config, triton_decode
from sparsify.kernels.triton_config import CHUNK, Config, bucket, candidates, configure, default, remember
from sparsify.kernels.triton_decode import TRITON, absent, kind_of
from sparsify.types import NofM

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


@needs_triton
def test_products_in_the_interpreter() -> None:
    """Triton decides when it is imported whether it interprets, so that this has a process of its own."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_cases.py"],
        cwd=root, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found is not None
    assert int(found[1]) > 70


def test_the_kernels_import_without_triton() -> None:
    code = (
        "import sys\nsys.modules['triton'] = None\n"
        "import sparsify.kernels.triton_decode, sparsify.kernels.semi_structured\n"
        "import sparsify.kernels.dispatch\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# Compiled.

SIZES = {"n_out": "i32", "n_in": "i32", "n_tokens": "i32"}
PAIRS = {"values": "*i32", "mask": "*i16"}
BITS = {"values": "*bf16", "mask": "*u8"}
ENDS = {"bias": "*bf16", "result": "*fp32", **SIZES}
TILE: dict[str, Any] = {"T": 16, "B": 64, "K": 128, "WIDE": False, "BIAS": True, "FINAL": False}
ROWS: dict[str, Any] = {"T": 1, "R": 4, "HALF": False, "BIAS": True, "FINAL": False}
CASES: dict[str, tuple[str, dict[str, str], dict[str, Any], int]] = {
    "pairs_rows": ("pairs_rows", {"x": "*i64", **PAIRS, **ENDS}, {**ROWS, "C": 32}, 1),
    "bits_rows": ("bits_rows", {"x": "*i64", "values": "*i16", "mask": "*u8", "starts": "*i32", **ENDS}, ROWS, 1),
    "tiles of pairs": ("tiles", {"x": "*bf16", **PAIRS, "starts": "*i32", **ENDS, "share": "i32"}, TILE, 4),
    "tiles of bits": ("tiles", {"x": "*bf16", **BITS, "starts": "*i32", **ENDS, "share": "i32"}, TILE, 4),
    "expand": (
        "expand", {**PAIRS, "starts": "*i32", "result": "*bf16", "n_out": "i32", "n_in": "i32"}, {"B": 32, "K": 128}, 4
    ),
    "reduce": (
        "reduce", {"partial": "*fp32", "bias": "*bf16", "result": "*bf16", "n_out": "i32", "total": "i32"},
        {"SPLIT": 4, "BIAS": True, "B": 512}, 4,
    ),
}  # fmt: skip


def compiled(case: str, architecture: int, ones: frozenset[str] = frozenset()) -> Any:
    """A kernel as the launch would have it compiled; Triton makes constants of sizes that are 1, here ``ones``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sparsify.kernels import triton_kernels

    name, signature, constants, warps = CASES[case]
    if "PAIRS" in getattr(triton_kernels, name).arg_names:
        constants = {**constants, "PAIRS": signature["values"] == "*i32"}
    constants = {**constants, **dict.fromkeys(ones & signature.keys(), 1)}
    source = ASTSource(
        getattr(triton_kernels, name),
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        # What the launch says of addresses and sizes that 16 divides.
        attrs={(i,): [["tt.divisibility", 16]] for i, key in enumerate(signature) if key not in ones},
    )
    options = {"num_warps": warps, **triton_decode._FUSED}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def stack_bytes(binary: bytes, folder: Path) -> int:
    """Bytes of a thread's registers that went to memory, says the disassembler that comes with Triton."""
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"STACK:(\d+)", text)[-1])


@needs_triton
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("case", CASES)
def test_kernels_compile(case: str, architecture: int, tmp_path: Path) -> None:
    found = compiled(case, architecture)
    ptx = found.asm["ptx"]
    # The same sum in the same order, whenever it runs.
    assert not re.search(r"\b(atom|red)\.", ptx)
    assert stack_bytes(found.asm["cubin"], tmp_path) == 0
    if case == "pairs_rows":
        assert "ld.global.v4.b32" in ptx
        assert found.metadata.shared == 0
    if case.startswith("tiles"):
        assert ("wgmma" if architecture == 90 else "tcgen05.mma" if architecture == 100 else "mma.sync") in ptx


@needs_triton
@pytest.mark.parametrize("ones", [{"n_tokens"}, {"n_out", "n_in", "n_tokens", "total"}], ids=["a token", "a value"])
@pytest.mark.parametrize("case", CASES)
def test_sizes_of_one_compile(case: str, ones: set[str]) -> None:
    assert compiled(case, 90, frozenset(ones)).asm["cubin"]


# Settings.


def test_defaults_fill_the_device() -> None:
    for shape in ((4096, 4096), (28672, 4096), (4096, 14336), (576, 1536), (5, 64), (1, 1)):
        for tokens in (1, 2, 3, 17, 64):
            config = default(shape, tokens, 132)
            assert config == default(shape, tokens, 132)
            assert config.tensor_cores == (tokens > 2)
            assert 1 <= config.split <= max(1, shape[1] // CHUNK)
            tried = candidates(triton_config.PAIRS, shape, tokens, 132, (9, 0))
            assert tried[0] == config
            assert len(set(tried)) == len(tried)
            assert all(tokens <= 4 for other in tried if not other.tensor_cores)
            # A program of bits takes whole chunks.
            bits = candidates(triton_config.BITS, shape, tokens, 132, (8, 0))
            assert all(other.columns == CHUNK for other in bits if not other.tensor_cores)
            assert all(CHUNK % other.columns == 0 for other in (*tried, *bits) if other.tensor_cores)
    assert default((4096, 4096), 1, 132).split > 1
    assert default((28672, 4096), 1, 132).split == 1


def test_what_was_tuned_is_used_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    triton_config._tuned.cache_clear()
    best = Config(False, 2, 1024, 2, 2)
    remember(CPU, "pairs", (64, 128), 1, best, us=3.5)
    assert configure(CPU, "pairs", (64, 128), 1) == best
    # As a later process finds it.
    triton_config._tuned.cache_clear()
    assert configure(CPU, "pairs", (64, 128), 1) == best
    for kind, shape, tokens in (("bits", (64, 128), 1), ("pairs", (64, 64), 1), ("pairs", (64, 128), 2)):
        assert configure(CPU, kind, shape, tokens) == default(shape, tokens, 1)
    # A row of another version is passed over.
    device_cache.add("triton", "cpu", {"pairs 64x128 1": {"config": {"blocks": 3}}})
    triton_config._tuned.cache_clear()
    assert configure(CPU, "pairs", (64, 128), 1) == default((64, 128), 1, 1)
    device_cache.cache_file("triton", "cpu").write_text("not JSON")
    triton_config._tuned.cache_clear()
    assert configure(CPU, "pairs", (64, 128), 1) == default((64, 128), 1, 1)
    triton_config._tuned.cache_clear()


def test_numbers_of_tokens_that_share_a_configuration() -> None:
    assert [bucket(tokens) for tokens in (1, 2, 3, 4, 5, 8, 9, 33, 64)] == [1, 2, 4, 4, 8, 8, 16, 64, 64]


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSIFY_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert device_cache.cache_folder() == Path.home() / ".cache/sparsify"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert device_cache.cache_folder() == Path("/x/sparsify")
    monkeypatch.setenv("SPARSIFY_CACHE", "/y")
    assert device_cache.cache_file("triton", "NVIDIA H200 / 2") == Path("/y/kernels/triton-NVIDIA-H200-2.json")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert absent(CPU) == "it runs on NVIDIA GPUs only"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for capability, why in (((7, 5), "it needs compute capability 8.0, this GPU has 7.5"), ((8, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        assert absent(GPU) == why
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert absent(GPU) == "the package triton is not installed"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in str(absent(GPU))


def test_the_operator_is_traced() -> None:
    """With the arguments that its schema asks for, and the shape of the result."""
    with FakeTensorMode():
        tensors = {
            "values": torch.empty(32, 32, dtype=torch.bfloat16, device="cuda"),
            "mask": torch.empty(32, 8, dtype=torch.uint8, device="cuda"),
            "starts": torch.empty(0, dtype=torch.int32, device="cuda"),
        }
        x, bias = torch.empty(2, 3, 64, dtype=torch.bfloat16, device="cuda"), torch.empty(32, device="cuda")
        result = TRITON.linear(x, tensors, {"n_out": 32, "n_in": 64, "n": 2, "m": 4}, bias)
        assert (tuple(result.shape), result.dtype, result.device.type) == ((2, 3, 32), torch.bfloat16, "cuda")


def test_weights_that_it_takes() -> None:
    weight = torch.zeros(4, 24)
    assert TRITON.refuse(encode(weight)) == "its values are torch.float32, not bfloat16 or float16"
    for pattern in (NofM(2, 4), NofM(3, 8), None):
        assert TRITON.refuse(encode(weight.bfloat16(), pattern)) is None
    assert kind_of(32, 2, 4) == "pairs"
    assert [kind_of(24, 2, 4), kind_of(32, 4, 8), kind_of(32, 0, 0)] == ["bits"] * 3

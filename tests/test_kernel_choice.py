"""Which kernel takes what, and what is chosen."""

import re

import pytest
import torch

from sparsify.errors import UsageError
from sparsify.kernels import semi_structured
from sparsify.kernels.dispatch import AUTO, DENSE, KERNELS, NATIVE, check_request, choose
from sparsify.kernels.kernel import Kernel
from sparsify.kernels.packed_reference import PACKED
from sparsify.kernels.semi_structured import CUSPARSELT, CUTLASS
from sparsify.types import NofM
from tests.random_packed import random_packed, width

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TWO_OF_FOUR = NofM(2, 4)
PATTERNS = [TWO_OF_FOUR, NofM(1, 4), NofM(4, 8), NofM(3, 7), None]
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("kernel", [CUSPARSELT, CUTLASS], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(
    ("n_out", "n_in", "pattern", "dtype", "why"),
    [
        (64, 128, None, torch.bfloat16, "its pattern is unstructured, not 2:4"),
        (64, 128, NofM(1, 4), torch.bfloat16, "its pattern is 1:4, not 2:4"),
        (64, 128, NofM(4, 8), torch.float16, "its pattern is 4:8, not 2:4"),
        (64, 128, TWO_OF_FOUR, torch.float32, "its values are torch.float32, not 16 bits"),
        (8, 128, TWO_OF_FOUR, torch.bfloat16, "its shape 8 x 128 is below"),
        (40, 128, TWO_OF_FOUR, torch.bfloat16, "its shape 40 x 128 .* or no multiple of"),
        (64, 8, TWO_OF_FOUR, torch.bfloat16, "its shape 64 x 8 is below"),
        (64, 136, TWO_OF_FOUR, torch.bfloat16, "its shape 64 x 136 .* or no multiple of"),
    ],
)
def test_weights_that_a_gpu_kernel_refuses(
    kernel: Kernel, n_out: int, n_in: int, pattern: NofM | None, dtype: torch.dtype, why: str
) -> None:
    found = kernel.refuse(random_packed(n_out, n_in, pattern, dtype))
    assert found is not None
    assert re.match(why, found)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_weights_that_every_kernel_takes(dtype: torch.dtype) -> None:
    for n_out, n_in in ((32, 64), (576, 1536), (192, 576), (1536, 576)):
        for perm in (False, True):
            packed = random_packed(n_out, n_in, TWO_OF_FOUR, dtype, perm)
            takes = [kernel for kernel in KERNELS.values() if kernel is not NATIVE or dtype != torch.float16]
            assert [kernel.refuse(packed) for kernel in takes] == [None] * len(takes)
    assert CUSPARSELT.refuse(random_packed(16, 16, TWO_OF_FOUR, dtype)) is None
    assert CUTLASS.refuse(random_packed(16, 16, TWO_OF_FOUR, dtype)) is not None
    for pattern in PATTERNS:
        assert PACKED.refuse(random_packed(5, width(pattern), pattern, torch.float32)) is None


@pytest.mark.parametrize(
    ("capability", "cusparselt", "cutlass"),
    [
        ((7, 5), "it needs compute capability 8.0, this GPU has 7.5", "it needs compute capability 8.0"),
        ((8, 0), None, None),
        ((8, 9), None, None),
        ((9, 0), None, "torch has it for compute capability 8.x only, this GPU has 9.0"),
        ((12, 0), None, "torch has it for compute capability 8.x only, this GPU has 12.0"),
    ],
)
def test_devices(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cusparselt: str | None, cutlass: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    for kernel, why in ((CUSPARSELT, cusparselt), (CUTLASS, cutlass)):
        found = kernel.absent(GPU)
        assert found == why if why is None else found is not None and found.startswith(why)
    assert PACKED.absent(GPU) is None


def test_builds_of_torch_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert CUSPARSELT.absent(GPU) == "this build of torch has no cuSPARSELt"
    assert CUTLASS.absent(GPU) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in str(CUSPARSELT.absent(GPU))
    assert "ROCm" in str(CUTLASS.absent(GPU))
    for device in ("cpu", "mps", "xpu"):
        assert CUSPARSELT.absent(torch.device(device)) == "it runs on NVIDIA GPUs only"


def test_requests() -> None:
    for requested in (AUTO, DENSE, "packed"):
        check_request(requested, CPU)
    with pytest.raises(UsageError, match="kernel 'fast' is unknown; choose auto, dense, packed, native, triton, "):
        check_request("fast", CPU)
    for requested in ("cusparselt", "cutlass"):
        with pytest.raises(UsageError, match=f"kernel {requested} cannot run on cpu: it runs on NVIDIA GPUs only; "):
            check_request(requested, CPU)
        with pytest.raises(UsageError, match="cannot run on cpu"):
            choose(random_packed(64, 64, TWO_OF_FOUR, torch.bfloat16), requested)


def test_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    two_of_four = random_packed(64, 64, TWO_OF_FOUR, torch.bfloat16)
    unstructured = random_packed(64, 64, None, torch.bfloat16)
    for packed in (two_of_four, unstructured):
        choice = choose(packed, DENSE)
        assert (choice.kernel, choice.name, choice.reason) == (None, "dense", "")
        choice = choose(packed, "packed")
        assert (choice.kernel, choice.name, choice.reason) == (PACKED, "packed", "")
    # As on a GPU, where the kernels are not absent.
    monkeypatch.setattr(semi_structured, "_no_gpu", lambda device: None)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert choose(two_of_four, "cusparselt").kernel is CUSPARSELT
    choice = choose(unstructured, "cusparselt")
    assert (choice.kernel, choice.name) == (None, "dense")
    assert choice.reason == "cusparselt cannot take it: its pattern is unstructured, not 2:4"


def test_the_table() -> None:
    assert list(KERNELS) == ["packed", "native", "triton", "cusparselt", "cusparselt_fp8", "cutlass"]
    assert all(name == kernel.name and kernel.summary for name, kernel in KERNELS.items())
    assert not {AUTO, DENSE} & KERNELS.keys()

"""Solvers, the storage format and the kernels on a GPU against the CPU."""

import math

import pytest
import torch
from torch.nn.functional import linear, silu

from sparsify.errors import UsageError
from sparsify.format.packed import DTYPES, Packed, decode, encode, unstructured
from sparsify.format.record import from_tensors, to_tensors
from sparsify.kernels.dispatch import KERNELS, choose
from sparsify.kernels.kernel import Kernel
from sparsify.layer import prune_layer
from sparsify.masks import keep_mask
from sparsify.methods import resolve
from sparsify.plugins.sparse_linear import SparseLinear
from sparsify.solvers.quadratic import Gram
from sparsify.stats import InputStats
from sparsify.types import NofM, parse_pattern

GPU = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no CUDA device")]


def objective(device: str, method: str, changes: dict[str, str | None], pattern: str) -> float:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    weight = torch.randn(96, 128, generator=generator).to(device)
    matrix = (x.T @ x).to(device)
    stats = InputStats(matrix.diagonal().clone(), len(x), gram=matrix)
    plan = resolve(method, changes, {}, grouped=":" in pattern)
    outcome = prune_layer(weight, stats, Gram(matrix, len(x), 0.01), parse_pattern(pattern), plan)
    assert outcome.objective is not None
    return outcome.objective


@pytest.mark.parametrize("pattern", ["2:4", "0.6"])
@pytest.mark.parametrize("method", ["sparsegpt", "mrp", "fistapruner", "admm", "alps"])
def test_solvers_reach_the_objective_of_the_cpu(method: str, pattern: str) -> None:
    # Masks may differ where scores nearly tie.
    on_cpu = objective("cpu", method, {}, pattern)
    assert objective(GPU, method, {}, pattern) == pytest.approx(on_cpu, rel=1e-2)


def test_the_optimum_of_a_mask_is_that_of_the_cpu() -> None:
    changes: dict[str, str | None] = {"refit": "exact"}
    on_cpu = objective("cpu", "magnitude", changes, "2:4")
    assert objective(GPU, "magnitude", changes, "2:4") == pytest.approx(on_cpu, rel=1e-4)


def random_packed(
    n_out: int, n_in: int, pattern: NofM | None, dtype: torch.dtype, perm: bool = False, device: str = GPU
) -> Packed:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n_out, n_in, generator=generator) / math.sqrt(n_in)
    weight.masked_fill_(~keep_mask(weight.abs(), pattern or parse_pattern("0.5")), 0)
    weight[1, : n_in // 2] = 0
    order = torch.randperm(n_in, generator=generator) if perm else torch.arange(n_in)
    original = torch.empty_like(weight)
    original[:, order] = weight
    return encode(original.to(dtype), pattern, order if perm else None).to(device)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", [NofM(2, 4), NofM(1, 4), NofM(4, 8), None], ids=str)
@pytest.mark.parametrize("perm", [False, True], ids=["", "permuted"])
def test_the_format_is_that_of_the_cpu_to_the_bit(pattern: NofM | None, dtype: torch.dtype, perm: bool) -> None:
    on_cpu = random_packed(96, 264, pattern, dtype, perm, "cpu")
    weight = decode(on_cpu)
    there = on_cpu.to(GPU)
    assert torch.equal(bits(decode(there)), bits(weight))
    again = encode(weight.to(GPU), pattern, on_cpu.perm)
    for name, tensor in to_tensors(on_cpu).items():
        assert torch.equal(bits(to_tensors(again)[name]), bits(tensor)), name
    assert torch.equal(bits(decode(from_tensors("x", to_tensors(there)))), bits(weight))
    assert torch.equal(bits(unstructured(there).values), bits(unstructured(on_cpu).values))


@pytest.fixture(params=list(KERNELS))
def kernel(request: pytest.FixtureRequest) -> Kernel:
    found = KERNELS[request.param]
    absent = found.absent(torch.device(GPU))
    if absent:
        with pytest.raises(UsageError, match=f"kernel {found.name} cannot run on cuda"):
            choose(random_packed(64, 64, NofM(2, 4), torch.bfloat16), found.name)
        pytest.skip(absent)
    return found


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n_out", "n_in"), [(32, 64), (96, 192), (1280, 2048), (4096, 14336)])
@pytest.mark.parametrize("perm", [False, True], ids=["", "permuted"])
def test_kernels_multiply(kernel: Kernel, n_out: int, n_in: int, dtype: torch.dtype, perm: bool) -> None:
    """No further from float64 than a few times the dense product, whatever the number of tokens."""
    packed = random_packed(n_out, n_in, NofM(2, 4), dtype, perm)
    assert choose(packed, kernel.name).kernel is kernel
    weight, state = decode(packed), kernel.prepare(packed)
    assert state.n_bytes <= 0.57 * weight.nbytes + 4 * n_in + 64
    inputs = [torch.randn(*shape, n_in, device=GPU, dtype=dtype) for shape in ((1,), (7,), (8,), (64,), (300,), (2, 3))]
    inputs.append(torch.randn(6, 2 * n_in, device=GPU, dtype=dtype)[:, ::2])
    for x in inputs:
        for bias in (None, torch.randn(n_out, device=GPU, dtype=dtype)):
            found, dense = kernel.linear(x, state.tensors, state.sizes, bias), linear(x, weight, bias)
            exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
            assert (found.shape, found.dtype) == (dense.shape, dtype)
            assert found.is_contiguous()
            limit = 3 * max(relative_error(dense, exact), torch.finfo(dtype).eps / 4)
            assert relative_error(found, exact) <= limit
    nothing = kernel.linear(x[:0], state.tensors, state.sizes, None)
    assert tuple(nothing.shape) == (0, n_out)


def test_kernels_compile_without_a_break(kernel: Kernel) -> None:
    packed = random_packed(512, 1024, NofM(2, 4), torch.bfloat16, perm=True)
    state, bias = kernel.prepare(packed), torch.randn(512, device=GPU, dtype=torch.bfloat16)

    def block(x: torch.Tensor) -> torch.Tensor:
        return silu(kernel.linear(x * 2, state.tensors, state.sizes, bias))

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    for tokens in (1, 8, 7, 300):
        x = torch.randn(tokens, 1024, device=GPU, dtype=torch.bfloat16)
        torch.testing.assert_close(compiled(x), block(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_kernels_are_captured_in_graphs(kernel: Kernel, tokens: int) -> None:
    packed = random_packed(512, 1024, NofM(2, 4), torch.bfloat16)
    state, bias = kernel.prepare(packed), torch.randn(512, device=GPU, dtype=torch.bfloat16)
    x = torch.randn(tokens, 1024, device=GPU, dtype=torch.bfloat16)
    kernel.linear(x, state.tensors, state.sizes, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = kernel.linear(x, state.tensors, state.sizes, bias)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        result.fill_(math.nan)
        graph.replay()
        assert torch.equal(result, kernel.linear(x, state.tensors, state.sizes, bias))


def test_packed_unstructured_weights(kernel: Kernel) -> None:
    packed = random_packed(300, 999, None, torch.float16)
    choice = choose(packed, kernel.name)
    if kernel.name != "packed":
        assert choice.kernel is None
        assert "unstructured" in choice.reason
        return
    state, x = kernel.prepare(packed), torch.randn(5, 999, device=GPU, dtype=torch.float16)
    exact = linear(x.double(), decode(packed).double())
    assert relative_error(kernel.linear(x, state.tensors, state.sizes, None), exact) <= 1e-3


@pytest.mark.parametrize("pattern", [NofM(2, 4), None], ids=str)
def test_a_layer_packed_on_the_cpu_moves(pattern: NofM | None) -> None:
    packed = random_packed(96, 264, pattern, torch.float32, device="cpu")
    x = torch.randn(5, 264)
    layer = SparseLinear(packed, KERNELS["packed"])
    wanted = layer(x)
    moved = layer.to(GPU)
    torch.testing.assert_close(moved(x.to(GPU)).cpu(), wanted, rtol=1e-4, atol=1e-4)

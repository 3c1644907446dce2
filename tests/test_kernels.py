"""Kernels: the products they compute, what they keep in memory, and why they refuse. Their GPU side is in test_gpu."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear
from torch.sparse import _semi_structured_conversions

from sparsify.errors import UsageError
from sparsify.format.packed import DTYPES, Packed, decode, encode
from sparsify.kernels import packed_reference, semi_structured, triton_decode
from sparsify.kernels.dispatch import NATIVE
from sparsify.kernels.kernel import Kernel
from sparsify.kernels.linear import Operands, operands
from sparsify.kernels.packed_reference import PACKED, rows_per_slice
from sparsify.kernels.semi_structured import CUSPARSELT, CUTLASS, cutlass_meta
from sparsify.kernels.triton_decode import TRITON
from sparsify.types import NofM
from tests.random_packed import random_packed, width

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TWO_OF_FOUR = NofM(2, 4)
PATTERNS = [TWO_OF_FOUR, NofM(1, 4), NofM(4, 8), NofM(3, 7), None]
HALVES = [torch.bfloat16, torch.float16]
# torch does not annotate them.
CONVERSIONS: Any = _semi_structured_conversions
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def to_dense_cutlass(values: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    """The weight as torch reads it."""
    weight: torch.Tensor = CONVERSIONS.sparse_semi_structured_to_dense_cutlass(values, meta)
    return weight


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(kernel: Kernel, packed: Packed, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    state = kernel.prepare(packed)
    return kernel.linear(x, state.tensors, state.sizes, bias)


# The packed reference.


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("perm", [False, True], ids=["", "permuted"])
def test_packed_is_the_product_with_the_dense_weight(pattern: NofM | None, dtype: torch.dtype, perm: bool) -> None:
    n_in = width(pattern)
    packed = random_packed(24, n_in, pattern, dtype, perm)
    weight = decode(packed)
    shapes: list[tuple[int, ...]] = [(0,), (1,), (13,), (2, 3), (2, 0), ()]
    for shape in shapes:
        for bias in (None, random(24, dtype=dtype, seed=2)):
            x = random(*shape, n_in, dtype=dtype)
            found, wanted = run(PACKED, packed, x, bias), linear(x, weight, bias)
            assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
            assert found.is_contiguous()
            if perm:  # sums run over another order
                torch.testing.assert_close(found, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
            else:
                assert torch.equal(found, linear(x.reshape(-1, n_in), weight, bias).view(wanted.shape))


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, None], ids=str)
def test_packed_goes_through_a_large_weight_in_slices(pattern: NofM | None) -> None:
    n_in = 1 << 19
    assert rows_per_slice(n_in, CPU) == 2
    packed = random_packed(5, n_in, pattern, torch.float32)
    x, bias = random(3, n_in), random(5, seed=2)
    found, weight = run(PACKED, packed, x, bias), decode(packed)
    parts = [linear(x, weight[i : i + 2], bias[i : i + 2]) for i in (0, 2, 4)]
    assert torch.equal(found, torch.cat(parts, dim=1))


def test_packed_runs_in_the_slices_that_its_state_was_prepared_for() -> None:
    """A layer may be prepared on one device and moved to another, where new ones would be cut otherwise."""
    packed = random_packed(40, 64, None, torch.float32)
    state = PACKED.prepare(packed)
    counts = (decode(packed) != 0).sum(dim=1)
    starts = torch.tensor([0, *counts.cumsum(dim=0)[6::7].tolist(), counts.sum()])
    sizes, x = {**state.sizes, "step": 7}, random(3, 64)
    found = PACKED.linear(x, {**state.tensors, "starts": starts}, sizes, None)
    torch.testing.assert_close(found, linear(x, decode(packed)))


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, None], ids=str)
@pytest.mark.parametrize("perm", [False, True], ids=["", "permuted"])
def test_inputs_may_lie_anyhow(pattern: NofM | None, perm: bool) -> None:
    packed = random_packed(16, 64, pattern, torch.float32, perm)
    inputs = {
        "every second": random(6, 128)[:, ::2],
        "transposed": random(64, 6).t(),
        "batches swapped": random(2, 3, 64).transpose(0, 1),
        "expanded": random(1, 64).expand(6, 64),
        "rows of another": random(9, 64)[2:7],
    }
    for name, x in inputs.items():
        found = run(PACKED, packed, x)
        torch.testing.assert_close(found, linear(x, decode(packed)), msg=name)
        assert found.is_contiguous()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, None], ids=str)
def test_packed_compiles_without_a_break(pattern: NofM | None, backend: str) -> None:
    packed, bias = random_packed(24, 64, pattern, torch.float32, perm=True), random(24, seed=2)
    state = PACKED.prepare(packed)

    def block(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(PACKED.linear(x * 2, state.tensors, state.sizes, bias)) + 1

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for tokens in (1, 8, 7, 30):  # from the third on with a symbolic number of tokens
        x = random(tokens, 64)
        torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, None], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_packed_operator_is_what_torch_asks_of_one(pattern: NofM | None, dtype: torch.dtype) -> None:
    state = PACKED.prepare(random_packed(24, 64, pattern, dtype))
    for x, bias in ((random(5, 64, dtype=dtype), None), (random(2, 3, 64, dtype=dtype), random(24, dtype=dtype))):
        weight = operands(state.tensors, state.sizes, bias, "packed")
        torch.library.opcheck(torch.ops.sparsify.linear.default, (x, *weight))


def test_operands_are_the_arguments_of_the_schema() -> None:
    arguments = torch.ops.sparsify.linear.default._schema.arguments
    assert [argument.name for argument in arguments] == ["x", *Operands._fields]


@pytest.mark.parametrize(
    ("kernel", "perm"), [(PACKED, False), (PACKED, True), (NATIVE, False), (NATIVE, True), (CUSPARSELT, True)]
)
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_another_number_of_columns_is_an_error(kernel: Kernel, perm: bool, device: str) -> None:
    """Also where as many numbers would make other rows of the right length, or an order would leave some out."""
    packed = random_packed(32, 64, TWO_OF_FOUR, torch.bfloat16, perm)
    if kernel is CUSPARSELT:  # whose weight is made on a GPU
        assert packed.perm is not None
        tensors, sizes = {"blob": packed.values, "perm": packed.perm}, {"n_out": 32, "n_in": 64}
    else:
        state = kernel.prepare(packed)
        tensors, sizes = dict(state.tensors), dict(state.sizes)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    for shape in ((4, 32), (1, 128), (2, 96), (128,), (2, 2, 32), (0, 65), (0,), ()):
        x = random(*shape, dtype=torch.bfloat16).to(device)
        with pytest.raises(RuntimeError, match=re.escape(f"input has the shape {list(shape)}, the weight takes 64 ")):
            kernel.linear(x, tensors, sizes, None)


def test_a_compiled_product_refuses_another_number_of_columns() -> None:
    state = PACKED.prepare(random_packed(24, 64, TWO_OF_FOUR, torch.float32))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: PACKED.linear(x, state.tensors, state.sizes, None), backend="aot_eager")
    assert compiled(random(2, 64)).shape == (2, 24)
    with pytest.raises(RuntimeError, match=r"input has the shape .*, the weight takes 64 columns"):
        compiled(random(1, 128))


def test_weights_in_slices_of_any_size_compile() -> None:
    """Sizes differ from weight to weight, so that a compiler takes them for numbers that vary."""

    def product(x: torch.Tensor, tensors: dict[str, torch.Tensor], sizes: dict[str, int]) -> torch.Tensor:
        return PACKED.linear(x, tensors, sizes, None) + 1

    torch._dynamo.reset()
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    for n_in in (64, 128, 256):
        packed = random_packed(24, n_in, None, torch.float32)
        state, x = PACKED.prepare(packed), random(3, n_in)
        assert state.sizes["step"] == rows_per_slice(n_in, CPU)
        found = compiled(x, dict(state.tensors), dict(state.sizes))
        torch.testing.assert_close(found, product(x, dict(state.tensors), dict(state.sizes)))


def test_plans_that_do_not_run_on_a_device() -> None:
    state = PACKED.prepare(random_packed(24, 64, None, torch.float32))
    weight = operands(state.tensors, state.sizes, None, "avx512<=4,slices")
    with pytest.raises(RuntimeError, match="plan 'avx512<=4,slices' does not run on cpu"):
        packed_reference._anywhere(random(1, 64), *weight)
    with pytest.raises(UsageError, match="plan 'triton' is none"):
        torch.ops.sparsify.linear(random(1, 64), *weight._replace(plan="triton"))
    with pytest.raises(RuntimeError, match="plan packed expands 0 rows at a time"):
        torch.ops.sparsify.linear(random(1, 64), *weight._replace(plan="packed", step=0))


@pytest.mark.parametrize("kernel", [PACKED, TRITON], ids=lambda kernel: kernel.name)
def test_the_operator_on_cuda_follows_its_plans(kernel: Kernel) -> None:
    """What is registered for CUDA, with tensors of the CPU: errors and the reference come before any GPU."""
    packed, x = random_packed(24, 64, None, torch.bfloat16), random(3, 64, dtype=torch.bfloat16)
    state = kernel.prepare(packed)
    weight = operands(state.tensors, state.sizes, None, "packed")
    if kernel is PACKED:
        assert torch.equal(triton_decode._cuda(x, *weight), run(PACKED, packed, x))
    bias = random(24, dtype=torch.bfloat16, seed=2)
    for plan in ("dense", "bf16<=2,dense", "amx<=2,dense"):
        with pytest.raises(RuntimeError, match=f"plan {plan} multiplies with the dense weight, which is not there"):
            triton_decode._cuda(x, *weight._replace(plan=plan))
        found = triton_decode._cuda(x, *weight._replace(plan=plan, dense=decode(packed), bias=bias))
        assert torch.equal(found, linear(x, decode(packed), bias))
    with pytest.raises(UsageError, match="plan 'fast' is none"):
        triton_decode._cuda(x, *weight._replace(plan="fast"))
    for plan in ("packed", "triton", "bf16<=4,slices"):
        with pytest.raises(RuntimeError, match=r"input has the shape \[6, 32\], the weight takes 64 columns"):
            triton_decode._cuda(x.view(6, 32), *weight._replace(plan=plan))


@pytest.mark.parametrize("perm", [False, True], ids=["", "permuted"])
def test_what_stays_in_memory(perm: bool) -> None:
    n_out, n_in = 96, 256
    order = 4 * n_in if perm else 0
    two_of_four = random_packed(n_out, n_in, TWO_OF_FOUR, torch.bfloat16, perm)
    for kernel in (PACKED, CUTLASS):
        state = kernel.prepare(two_of_four)
        # Values of half the places in 2 bytes, and 4 bits for each group of four, either way they are written.
        starts = state.tensors["starts"].nbytes if kernel is PACKED else 0
        assert starts <= 16
        assert state.n_bytes == n_out * n_in * 9 // 8 + order + starts
        assert ("perm" in state.tensors) == perm
    unstructured = random_packed(n_out, n_in, None, torch.bfloat16, perm)
    n_values = int((decode(unstructured) != 0).sum())
    assert PACKED.prepare(unstructured).n_bytes == 2 * n_values + n_out * n_in // 8 + order + 16


# Two of four on GPUs.


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("n_out", "n_in"), [(32, 64), (64, 96), (96, 160), (160, 1024)])
def test_cutlass_metadata_is_read_by_torch_as_the_same_weight(n_out: int, n_in: int, dtype: torch.dtype) -> None:
    """Groups with fewer than two values, down to none, hold explicit zeros wherever the encoder put them."""
    for seed in range(3):
        packed = random_packed(n_out, n_in, TWO_OF_FOUR, dtype, seed=seed)
        weight = decode(packed)
        per_group = (weight != 0).view(n_out, -1, 4).sum(dim=2)
        assert set(per_group.flatten().tolist()) == {0, 1, 2}
        meta = cutlass_meta(packed.mask)
        assert (meta.dtype, tuple(meta.shape)) == (torch.int16, (n_out, n_in // 16))
        assert torch.equal(to_dense_cutlass(packed.values, meta), weight)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_cutlass_state_is_that_of_torch_where_every_group_is_full(dtype: torch.dtype) -> None:
    weight = random(64, 4 * 48, dtype=dtype)
    rank = random(64, 48, 4, seed=2).argsort(dim=2).argsort(dim=2)
    weight = torch.where((rank < 2).view(64, -1), weight, 0)
    state = CUTLASS.prepare(encode(weight, TWO_OF_FOUR))
    values, meta = CONVERSIONS.sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(state.tensors["values"], values)
    assert torch.equal(state.tensors["meta"], meta)


def test_every_pair_of_places_has_its_code() -> None:
    """All 36 bytes of two groups, in one weight whose values tell where they belong."""
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    weight = torch.zeros(36, 8)
    for row, (low, high) in enumerate((low, high) for low in pairs for high in pairs):
        weight[row, list(low)] = torch.tensor([1.0, 2.0])
        weight[row, [4 + place for place in high]] = torch.tensor([3.0, 4.0])
    weight = weight.repeat(8, 16)[:64].bfloat16()
    packed = encode(weight, TWO_OF_FOUR)
    assert len(set(packed.mask.flatten().tolist())) == 36
    assert torch.equal(to_dense_cutlass(packed.values, cutlass_meta(packed.mask)), weight)


def stand_in_cusparselt(blob: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
    """What torch documents of its operator, for a weight that is not compressed at all."""
    assert options.keys() == {"bias", "transpose_result"}
    assert options["transpose_result"] is True
    assert b.shape[1] % 8 == 0
    assert b.t().is_contiguous()
    return linear(b.t(), blob, options["bias"])


def stand_in_cutlass(values: torch.Tensor, meta: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    assert b.shape[1] % 8 == 0
    assert b.t().is_contiguous()
    return to_dense_cutlass(values, meta) @ b


@pytest.fixture(params=["cusparselt", "cutlass"])
def on_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., torch.Tensor]:
    """The function behind an operator, with torch's own operator replaced by a product on the CPU."""
    monkeypatch.setattr(torch, "_cslt_sparse_mm", stand_in_cusparselt)
    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", stand_in_cutlass)

    def product(packed: Packed, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        n_out, n_in = packed.shape
        if request.param == "cusparselt":
            return semi_structured._cusparselt_linear(x, decode(packed), bias, n_out, n_in)
        state = CUTLASS.prepare(packed)
        return semi_structured._cutlass_linear(x, state.tensors["values"], state.tensors["meta"], bias, n_out, n_in)

    return product


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_tokens_are_padded_and_come_back_in_order(on_cpu: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
    packed = random_packed(64, 96, TWO_OF_FOUR, dtype)
    inputs = [random(*shape, 96, dtype=dtype) for shape in ((0,), (1,), (7,), (8,), (13,), (2, 3), (2, 0))]
    inputs += [random(6, 192, dtype=dtype)[:, ::2], random(96, 8, dtype=dtype).t()]
    for x in inputs:
        for bias in (None, random(64, dtype=dtype, seed=2)):
            found, wanted = on_cpu(packed, x, bias), linear(x, decode(packed), bias)
            torch.testing.assert_close(found, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
            assert found.is_contiguous()


def test_another_dtype_is_an_error_and_no_other_number(on_cpu: Callable[..., torch.Tensor]) -> None:
    packed, x = random_packed(64, 96, TWO_OF_FOUR, torch.bfloat16), random(8, 96)
    with pytest.raises(RuntimeError, match=r"input is torch.float16, the weight was prepared as torch.bfloat16"):
        on_cpu(packed, x.half(), None)
    with pytest.raises(RuntimeError, match=r"torch.bfloat16 and bias torch.float32"):
        on_cpu(packed, x.bfloat16(), random(64))


@pytest.mark.parametrize("name", ["cusparselt_linear", "cutlass_linear"])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,), ()], ids=str)
def test_fakes_have_the_shape_of_the_result(name: str, shape: tuple[int, ...]) -> None:
    with FakeTensorMode():
        x, bias = (torch.empty(*size, dtype=torch.bfloat16, device="cuda") for size in ((*shape, 64), (32,)))
        state = [torch.empty(32, 36, dtype=torch.bfloat16, device="cuda")]
        if name == "cutlass_linear":
            state.append(torch.empty(32, 4, dtype=torch.int16, device="cuda"))
        result = getattr(torch.ops.sparsify, name)(x, *state, bias, 32, 64)
        assert (tuple(result.shape), result.dtype, result.device.type) == ((*shape, 32), torch.bfloat16, "cuda")
        assert result.is_contiguous()


@pytest.mark.parametrize("kernel", [CUSPARSELT, CUTLASS], ids=lambda kernel: kernel.name)
def test_gpu_operators_do_not_run_elsewhere(kernel: Kernel) -> None:
    x = random(8, 64, dtype=torch.bfloat16)
    tensors = {"blob": x, "values": x, "meta": x}
    with pytest.raises(NotImplementedError, match="CPU"):
        kernel.linear(x, tensors, {"n_out": 32, "n_in": 64}, None)

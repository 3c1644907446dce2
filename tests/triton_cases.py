"""The Triton kernels in Triton's interpreter, on the CPU: run by ``test_triton`` in a process of its own."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import linear

from sparsify.format.packed import Packed, decode, encode
from sparsify.kernels import linear as operator_module
from sparsify.kernels import native, triton_decode, triton_kernels
from sparsify.kernels.linear import operands
from sparsify.kernels.triton_config import BITS, CHUNK, PAIRS, Config
from sparsify.kernels.triton_decode import TRITON, Weight, chunk_starts, expanded, kind_of, linear_cuda, multiply
from sparsify.masks import keep_mask
from sparsify.types import NofM

TWO_OF_FOUR = NofM(2, 4)
HALVES = [torch.bfloat16, torch.float16]
ROWS, TILES = Config(False, 2, 512, 1, 1), Config(True, 16, 128, 1, 4)
# Two shares of the columns, and programs whose last rows are not there.
SPLIT = [Config(False, 4, 512, 2, 1), Config(True, 32, 64, 2, 4)]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_packed(n_out: int, n_in: int, pattern: NofM | None, dtype: torch.dtype, share: float = 0.5) -> Packed:
    weight = random(n_out, n_in, seed=0)
    if pattern is None:
        keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < share
    else:
        keep = keep_mask(weight.abs(), pattern)
    return encode(torch.where(keep, weight, 0).to(dtype), pattern)


def prepared(packed: Packed) -> tuple[Weight, str]:
    state = TRITON.prepare(packed)
    weight = (state.tensors["values"], state.tensors["mask"], state.tensors["starts"])
    return weight, kind_of(packed.shape[1], state.sizes["n"], state.sizes["m"])


def check(packed: Packed, x: torch.Tensor, bias: torch.Tensor | None, config: Config) -> torch.Tensor:
    """Against float64: one rounding of the result, and float32 sums whose terms may be larger than it.

    The interpreter cuts bits off where a GPU rounds to bfloat16, so that the rounding may be twice as large.
    """
    weight, kind = prepared(packed)
    found = multiply(x, weight, bias, kind, packed.shape, config)
    dense = decode(packed).double()
    exact = linear(x.double(), dense, None if bias is None else bias.double())
    terms = linear(x.double().abs(), dense.abs())
    rounding = torch.finfo(x.dtype).eps / (1 if x.dtype == torch.bfloat16 else 2)
    limit = rounding * exact.abs() + 1e-6 * terms
    assert (found.shape, found.dtype) == (exact.shape, x.dtype)
    assert bool(((found.double() - exact).abs() <= limit).all())
    return found


def test_the_interpreter_is_what_runs() -> None:
    assert triton_kernels.INTERPRETED
    assert triton_kernels.CHUNK.value == CHUNK


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, None], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_products_in_float32(pattern: NofM | None, dtype: torch.dtype, tokens: int) -> None:
    packed = random_packed(7, 80 if pattern else 77, pattern, dtype)
    check(packed, random(tokens, packed.shape[1], dtype=dtype), random(7, dtype=dtype, seed=3), ROWS)


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, None], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 17, 64])
def test_products_on_tensor_cores(pattern: NofM | None, dtype: torch.dtype, tokens: int) -> None:
    packed = random_packed(19, 208 if pattern else 203, pattern, dtype)
    check(packed, random(tokens, packed.shape[1], dtype=dtype), None, TILES)


@pytest.mark.parametrize("config", SPLIT, ids=str)
@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, None], ids=str)
def test_shares_of_the_columns_are_added_in_order(config: Config, pattern: NofM | None) -> None:
    # The second share is shorter, and each goes through several steps.
    n_in = 2 * CHUNK + 48
    packed = random_packed(37, n_in, pattern, torch.bfloat16)
    x = random(3, n_in, dtype=torch.bfloat16)
    found = check(packed, x, random(37, dtype=torch.bfloat16, seed=3), config)
    again = check(packed, x, random(37, dtype=torch.bfloat16, seed=3), config)
    assert torch.equal(found, again)
    # More shares than there are chunks.
    check(random_packed(5, 64, pattern, torch.bfloat16), x[:2, :64].contiguous(), None, config)


@pytest.mark.parametrize(("pattern", "n_in"), [(TWO_OF_FOUR, 24), (NofM(1, 4), 64), (NofM(4, 8), 48), (NofM(3, 7), 56)])
@pytest.mark.parametrize("config", [ROWS, TILES], ids=["float32", "tensor cores"])
def test_other_patterns(pattern: NofM, n_in: int, config: Config) -> None:
    packed = random_packed(9, n_in, pattern, torch.bfloat16)
    assert prepared(packed)[1] == BITS
    check(packed, random(2, n_in, dtype=torch.bfloat16), None, config)


@pytest.mark.parametrize("config", [ROWS, TILES], ids=["float32", "tensor cores"])
@pytest.mark.parametrize("n_in", [1, 7, 8, 9, 31, 100])
def test_odd_sizes(config: Config, n_in: int) -> None:
    for n_out in (1, 3):
        check(random_packed(n_out, n_in, None, torch.float16), random(1, n_in, dtype=torch.float16), None, config)


@pytest.mark.parametrize("config", [ROWS, TILES], ids=["float32", "tensor cores"])
def test_empty_and_full_rows(config: Config) -> None:
    n_in = CHUNK + 40
    weight = random(6, n_in)
    weight[0] = 0
    weight[2, : n_in // 2] = 0
    weight[3, n_in // 2 :] = 0
    weight[4] = torch.where(torch.arange(n_in) == n_in - 1, weight[4], 0)
    bias = random(6, dtype=torch.bfloat16, seed=3)
    x = random(2, n_in, dtype=torch.bfloat16)
    found = check(encode(weight.bfloat16()), x, bias, config)
    assert torch.equal(found[:, 0], bias[0].expand(2))
    nothing = check(encode(torch.zeros(3, 24, dtype=torch.bfloat16)), x[:, :24].contiguous(), None, config)
    assert not nothing.any()


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, None], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("config", [ROWS, TILES], ids=["float32", "tensor cores"])
def test_values_at_the_ends_of_the_range(pattern: NofM | None, dtype: torch.dtype, config: Config) -> None:
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps
    kinds = torch.tensor([-0.0, 0.0, tiny, -3 * tiny, info.max, -info.max, 1.0, info.smallest_normal])
    weight = kinds[torch.randint(0, 8, (8, 64), generator=torch.Generator().manual_seed(0))]
    rank = torch.rand(8, 16, 4, generator=torch.Generator().manual_seed(1)).argsort(dim=2).view(8, 64)
    packed = encode(torch.where(rank < 2, weight, 0).to(dtype), pattern)
    values = packed.values.flatten()
    assert bool(((values == 0) & values.signbit()).any())
    assert float(values.abs().max()) == info.max
    # Sums of the largest values have to stay finite.
    x = torch.full((2, 64), 1 / 128) * torch.tensor([[1.0], [-0.5]])
    check(packed, x.to(dtype), None, config)
    small = encode(torch.where(rank < 2, weight.where(weight.abs() < 0.5, tiny), 0).to(dtype), pattern)
    assert bool((small.values.abs() < info.smallest_normal).any())
    # Denormal weights, products that are none.
    found = check(small, torch.full((1, 64), 2.0**14, dtype=dtype), None, config)
    assert bool(found.any())


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, NofM(4, 8), None], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_weights_are_expanded_to_the_bit(pattern: NofM | None, dtype: torch.dtype) -> None:
    n_in = CHUNK + (64 if pattern else 61)
    packed = random_packed(35, n_in, pattern, dtype)
    packed.values.flatten()[::7] = -0.0
    weight, kind = prepared(packed)
    found = expanded(weight, kind, packed.shape)
    assert torch.equal(found.view(torch.int16), decode(packed).view(torch.int16))


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, None], ids=str)
def test_the_operator_takes_any_shape_of_input(pattern: NofM | None) -> None:
    packed = random_packed(12, 64, pattern, torch.bfloat16)
    state = TRITON.prepare(packed)
    bias = random(12, dtype=torch.bfloat16, seed=3)
    inputs = [random(*shape, 64, dtype=torch.bfloat16) for shape in ((), (0,), (1,), (2, 3), (2, 0), (65,))]
    inputs += [random(3, 128, dtype=torch.bfloat16)[:, ::2], random(3, 65, dtype=torch.bfloat16)[:, 1:]]
    inputs.append(random(193, dtype=torch.bfloat16)[1:].view(3, 64))
    weight = operands(state.tensors, state.sizes, bias, "triton")
    # Not where 16 bytes begin.
    shifted = torch.nn.functional.pad(weight.values.flatten(), (1, 0))[1:].view(weight.values.shape)
    shifted_mask = torch.nn.functional.pad(weight.mask.flatten(), (1, 0))[1:].view(weight.mask.shape)
    for x, some in itertools.product(inputs, (weight, weight._replace(values=shifted, mask=shifted_mask))):
        found = linear_cuda(x, some)
        wanted = linear(x, decode(packed), bias)
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        assert found.is_contiguous()
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    # Of a layer that was prepared on a CPU.
    elsewhere = native.prepare_with(packed, "bf16<=4,slices")
    found = linear_cuda(inputs[3], operands(elsewhere.tensors, elsewhere.sizes, None, "bf16<=4,slices"))
    torch.testing.assert_close(found, linear(inputs[3], decode(packed)), rtol=2e-2, atol=2e-2)
    # As auto makes them on CPUs: few tokens packed, many with the dense weight.
    both = native.prepare_with(packed, "bf16<=2,dense")
    with_dense = operands(both.tensors, both.sizes, bias, "bf16<=2,dense")
    for x in inputs[2:4]:
        found = linear_cuda(x, with_dense)
        torch.testing.assert_close(found, linear(x, decode(packed), bias), rtol=2e-2, atol=2e-2)
    assert torch.equal(linear_cuda(inputs[3], with_dense), linear(inputs[3], decode(packed), bias))


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, None], ids=str)
def test_the_kernel_runs_through_the_operator(pattern: NofM | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered for CUDA, given the arguments of the call: here the operator's own key is another one."""
    monkeypatch.setattr(operator_module, "OP", triton_decode._cuda)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(4))
    weight = torch.empty(12, 64, dtype=torch.bfloat16)
    weight[:, order] = decode(random_packed(12, 64, pattern, torch.bfloat16))
    state = TRITON.prepare(encode(weight, pattern, order))
    x, bias = random(3, 64, dtype=torch.bfloat16), random(12, dtype=torch.bfloat16, seed=3)
    found = TRITON.linear(x, state.tensors, state.sizes, bias)
    torch.testing.assert_close(found, linear(x, weight, bias), rtol=2e-2, atol=2e-2)


def test_other_dtypes_are_refused() -> None:
    state = TRITON.prepare(random_packed(4, 16, TWO_OF_FOUR, torch.bfloat16))
    weight = operands(state.tensors, state.sizes, None, "triton")
    for x, other in (
        (random(1, 16, dtype=torch.float16), weight),
        (random(1, 16), weight._replace(values=weight.values.float())),
        (
            random(1, 16, dtype=torch.bfloat16),
            weight._replace(values=weight.values.to(torch.int8), scale=torch.ones(4)),
        ),
    ):
        with pytest.raises(RuntimeError, match="on a GPU both must be bfloat16 or float16"):
            linear_cuda(x, other)


def test_what_stays_in_memory() -> None:
    n_in = 3 * CHUNK
    assert TRITON.prepare(random_packed(8, n_in, TWO_OF_FOUR, torch.bfloat16)).n_bytes == 8 * n_in * 9 // 8
    packed = random_packed(8, n_in, None, torch.bfloat16)
    starts = chunk_starts(packed.mask)
    assert TRITON.prepare(packed).n_bytes == packed.n_bytes + 4 * 8 * 3
    kept = (decode(packed) != 0).view(-1, CHUNK).sum(dim=1)
    assert torch.equal(starts.flatten(), (kept.cumsum(0) - kept).int())
    assert math.prod(starts.shape) == 24
    assert prepared(random_packed(8, n_in, TWO_OF_FOUR, torch.float16))[1] == PAIRS

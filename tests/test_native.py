"""The compiled kernels: every way against float64, on shapes and values that real weights do not have."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from sparsify.bench.engaged import expands, runs_sparse
from sparsify.errors import UsageError
from sparsify.format.packed import Packed, decode, encode, quantise
from sparsify.kernels import native
from sparsify.kernels.kernel import State
from sparsify.kernels.linear import linear as product
from sparsify.kernels.linear import operands
from sparsify.types import NofM

pytestmark = pytest.mark.skipif(
    "avx512" not in native.features(), reason=native.missing() or "this processor has no AVX-512 with VBMI2"
)

F32, BF16, I8 = torch.float32, torch.bfloat16, torch.int8
PATTERNS = [NofM(2, 4), NofM(4, 8), NofM(1, 4), NofM(3, 7), None]
# Relative to the sum of absolute products: float32 sums in any order, and one rounding to the result's type.
ROUNDING = {F32: 2e-6, BF16: 2.0**-8}


@pytest.fixture(autouse=True)
def small_products_are_divided() -> Iterator[None]:
    from sparsify import _kernels

    _kernels.assume_wake_ns(0)
    yield
    _kernels.assume_wake_ns(-1)


@pytest.fixture(params=[1, 2, 5], ids=["1 thread", "2 threads", "5 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def kept(n_out: int, n_in: int, pattern: NofM | None, density: float, generator: torch.Generator) -> torch.Tensor:
    if pattern is None:
        return torch.rand(n_out, n_in, generator=generator) < density
    rank = torch.rand(n_out, n_in // pattern.m, pattern.m, generator=generator).argsort(dim=2).argsort(dim=2)
    return (rank < pattern.n).view(n_out, n_in)


def packed_weight(
    n_out: int, n_in: int, pattern: NofM | None, dtype: torch.dtype, density: float = 0.5, seed: int = 0
) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_out, n_in, generator=generator) / math.sqrt(n_in)
    weight = torch.where(kept(n_out, n_in, pattern, density, generator), weight, 0)
    if dtype == I8:
        return quantise(encode(weight, pattern))
    return encode(weight.to(dtype), pattern)


def exact_weight(packed: Packed) -> torch.Tensor:
    """In float64, without the rounding that decoding an int8 weight to a narrower type has."""
    if packed.scale is None:
        return decode(packed).double()
    codes = decode(Packed(packed.shape, packed.pattern, packed.values.float(), packed.mask))
    return packed.scale.double().unsqueeze(1) * codes.double()


def compare(state: State, packed: Packed, x: torch.Tensor, bias: torch.Tensor | None, way: str) -> None:
    found = product(x, state.tensors, state.sizes, bias, way)
    assert (found.shape, found.dtype) == ((x.shape[0], packed.shape[0]), x.dtype)
    weight = exact_weight(packed)
    wanted = x.double() @ weight.T + (0 if bias is None else bias.double())
    magnitude = x.double().abs() @ weight.abs().T + wanted.abs()
    allowed = ROUNDING[x.dtype] * magnitude
    if packed.scale is not None:
        # x in 16 bits a token; for `slices` and many tokens, weights rounded to x's type instead.
        step = x.double().abs().amax(dim=1, keepdim=True) / 32767
        allowed = allowed + step / 2 * weight.abs().sum(dim=1)
        allowed = torch.maximum(allowed, 2 * ROUNDING[x.dtype] * magnitude)
    excess = ((found.double() - wanted).abs() - allowed - 1e-37).max()
    assert excess <= 0, f"{way}: {float(excess)} too much"


SHAPES = [(1, 8), (1, 64), (3, 56), (17, 168), (33, 1064), (16, 64), (5, 4592), (300, 136)]


@pytest.mark.parametrize(("values", "x_dtype"), [(F32, F32), (BF16, BF16), (I8, F32), (I8, BF16)], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_way_is_the_product(
    values: torch.dtype, x_dtype: torch.dtype, pattern: NofM | None, threads: int
) -> None:
    tried = set()
    for n_out, n_in in SHAPES:
        if pattern is not None and n_in % pattern.m:
            continue
        packed = packed_weight(n_out, n_in, pattern, values)
        state = native.prepare_with(packed, native.SLICES)
        for tokens in (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 47, 80):
            generator = torch.Generator().manual_seed(tokens)
            x = torch.randn(tokens, n_in, generator=generator).to(x_dtype)
            bias = torch.randn(n_out, generator=generator).to(x_dtype) if tokens % 2 else None
            for way in native.ways(values, x_dtype, tokens, n_in):
                compare(state, packed, x, bias, way)
                tried.add(way)
    expected = native.features() & {F32: {"avx512"}, BF16: {"bf16", "amx", "avx512"}, I8: {"vnni", "amx"}}[values]
    assert tried == {*expected, native.SLICES}


@pytest.mark.parametrize("values", [BF16, I8], ids=str)
@pytest.mark.parametrize("tokens", [512, 513, 545, 1030])
def test_more_tokens_than_tiles_take_at_once(values: torch.dtype, tokens: int) -> None:
    """In parts of 512, the last of which may be few; more columns than a panel, so that sums are put down between."""
    packed = packed_weight(290, 1128, None, values)
    state = native.prepare_with(packed, native.SLICES)
    x = torch.randn(tokens, 1128, generator=torch.Generator().manual_seed(1)).to(BF16)
    for way in native.ways(values, BF16, tokens, 1128):
        compare(state, packed, x, None, way)


def test_more_tokens_than_are_laid_out_at_once() -> None:
    """512 of so many columns take 16 MB."""
    packed = packed_weight(20, 16416, None, BF16)
    state = native.prepare_with(packed, native.SLICES)
    x = torch.randn(600, 16416, generator=torch.Generator().manual_seed(1)).to(BF16)
    if "amx" in native.features():
        compare(state, packed, x, None, "amx")


def test_rows_too_wide_for_sums_of_bytes() -> None:
    wide = (1 << 16) + 64
    packed = quantise(encode(torch.ones(2, wide)))
    state = native.prepare_with(packed, native.SLICES)
    assert "amx" not in native.ways(I8, BF16, 8, wide)
    assert "vnni" not in native.ways(I8, BF16, 8, (1 << 20) + 64)
    x = torch.ones(8, wide, dtype=BF16)
    # A plan that says so all the same, as one for fewer columns does, goes another way.
    found = product(x, state.tensors, state.sizes, None, "vnni<=1,amx")
    torch.testing.assert_close(found, torch.full((8, 2), float(wide), dtype=BF16))


def test_scales_and_steps_that_are_no_floats_together() -> None:
    """The sum times the scale overflows, and the step of the input underflows; the result is an ordinary number."""
    packed = quantise(encode(torch.full((3, 4096), 1e31)))
    state = native.prepare_with(packed, native.SLICES)
    for size in (1e-30, 1e-38):
        x = torch.full((2, 4096), size)
        for way in ("vnni", "amx"):
            if way in native.ways(I8, F32, 2, 4096):
                found = product(x, state.tensors, state.sizes, None, way)
                torch.testing.assert_close(found, torch.full((2, 3), 4096 * size * 1e31), rtol=1e-3, atol=0)


@pytest.mark.parametrize("values", [F32, BF16, I8], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.97, 1.0])
def test_empty_and_full_rows(values: torch.dtype, density: float) -> None:
    for n_out, n_in in ((1, 1), (2, 65), (19, 200), (40, 1000)):
        packed = packed_weight(n_out, n_in, None, values, density)
        # One row is empty and one is full, whatever the others are.
        weight = decode(packed).float()
        weight[0] = 0
        weight[-1] = torch.linspace(1, 2, n_in)
        packed = quantise(encode(weight)) if values == I8 else encode(weight.to(values))
        state = native.prepare_with(packed, native.SLICES)
        x_dtype = F32 if values == F32 else BF16
        for tokens in (1, 5, 20, 50):
            x = torch.randn(tokens, n_in, generator=torch.Generator().manual_seed(tokens)).to(x_dtype)
            for way in native.ways(values, x_dtype, tokens, n_in):
                compare(state, packed, x, None, way)


def every_way(packed: Packed, x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    state = native.prepare_with(packed, native.SLICES)
    for way in native.ways(packed.values.dtype, x.dtype, x.shape[0], x.shape[1]):
        yield way, product(x, state.tensors, state.sizes, None, way)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_huge_values_and_those_that_are_none(dtype: torch.dtype) -> None:
    n_in = 96
    weight = torch.zeros(4, n_in)
    weight[0, 3], weight[1, 40], weight[2, 70], weight[3, 95] = 3e38, float("inf"), float("nan"), 2.0
    x = torch.ones(3, n_in)
    x[1, 95] = 3e38
    x[2, 0] = float("nan")
    for way, found in every_way(encode(weight.to(dtype)), x.to(dtype)):
        assert torch.isfinite(found[0, [0, 3]]).all(), way
        assert found[0, 1] == math.inf, way
        assert found[:, 2].isnan().all(), way
        assert found[1, 3] == math.inf, way  # 6e38 is past both types
        # Pruned weights are zeros, and zero times NaN is NaN, as in the dense model.
        assert found[2].isnan().all(), way


@pytest.mark.parametrize("x_dtype", [F32, BF16], ids=str)
def test_inputs_of_int8_products_may_be_extreme(x_dtype: torch.dtype) -> None:
    packed = packed_weight(7, 130, None, I8)
    x = torch.randn(6, 130, generator=torch.Generator().manual_seed(2))
    x[1] *= 1e-36
    x[2] *= 1e36
    x[3] = 0
    x[4, 5] = math.inf
    x[5, 5] = math.nan
    x = x.to(x_dtype)
    weight = exact_weight(packed)
    wanted = x[:3].double() @ weight.T
    for way, found in every_way(packed, x):
        error = (found[:3].double() - wanted).abs() / (x[:3].double().abs() @ weight.abs().T)
        assert error.max() < (2.0**-7 if x_dtype == BF16 else 1e-4), way
        assert torch.equal(found[3], torch.zeros(7, dtype=x_dtype)), way
        assert not found[4:].isfinite().any(), way


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_denormals_are_exact_or_nothing(dtype: torch.dtype) -> None:
    """The processor's bfloat16 products take denormals for zero; others must not."""
    weight = torch.zeros(2, 64)
    weight[0, 5] = 2.0**-130
    weight[1, 6] = -0.0
    packed = encode(weight.to(dtype))
    assert packed.values.numel() == 2  # -0.0 is a value
    x = torch.full((1, 64), 2.0**60).to(dtype)
    for way, found in every_way(packed, x):
        allowed = {2.0**-70} if way == "avx512" else {2.0**-70, 0.0}
        assert float(found[0, 0]) in allowed, way
        assert float(found[0, 1]) == 0, way


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values at an address that only their own size divides."""
    room = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    room[1:] = tensor.flatten()
    return room[1:].view(tensor.shape)


@pytest.mark.parametrize("values", [F32, BF16, I8], ids=str)
def test_tensors_may_lie_at_any_address(values: torch.dtype, threads: int) -> None:
    packed = packed_weight(37, 328, None, values)
    state = native.prepare_with(packed, native.SLICES)
    moved = State({name: unaligned(tensor) for name, tensor in state.tensors.items()}, state.sizes)
    x_dtype = F32 if values == F32 else BF16
    for tokens in (1, 9, 40):
        x = torch.randn(tokens, 328, generator=torch.Generator().manual_seed(0)).to(x_dtype)
        for way in native.ways(values, x_dtype, tokens, 328):
            straight = product(x, state.tensors, state.sizes, None, way)
            assert torch.equal(straight, product(x, moved.tensors, moved.sizes, None, way)), way
            found = product(unaligned(x), moved.tensors, moved.sizes, None, way)
            if way == native.SLICES:
                # By torch's library, which on some processors chooses its code by the address of x.
                torch.testing.assert_close(found, straight, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(straight, found), way


@pytest.mark.parametrize("values", [F32, BF16, I8], ids=str)
def test_threads_and_batches_do_not_change_a_bit(values: torch.dtype) -> None:
    """Of one way; a token's result does not depend on those beside it."""
    packed = packed_weight(390, 776, None, values)
    state = native.prepare_with(packed, native.SLICES)
    x_dtype = F32 if values == F32 else BF16
    x = torch.randn(11, 776, generator=torch.Generator().manual_seed(0)).to(x_dtype)
    before = torch.get_num_threads()
    try:
        for way in set(native.ways(values, x_dtype, 11, 776)) - {native.SLICES}:
            torch.set_num_threads(1)
            alone = torch.cat([product(row, state.tensors, state.sizes, None, way) for row in x.unsqueeze(1)])
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                assert torch.equal(alone, product(x, state.tensors, state.sizes, None, way)), way
    finally:
        torch.set_num_threads(before)


@settings(deadline=None, max_examples=60)
@given(
    n_out=st.integers(1, 40),
    n_in=st.integers(1, 300),
    density=st.floats(0, 1),
    tokens=st.integers(1, 40),
    seed=st.integers(0, 1000),
    values=st.sampled_from([F32, BF16, I8]),
)
def test_any_weight(n_out: int, n_in: int, density: float, tokens: int, seed: int, values: torch.dtype) -> None:
    packed = packed_weight(n_out, n_in, None, values, density, seed)
    state = native.prepare_with(packed, native.SLICES)
    x_dtype = F32 if values == F32 else BF16
    x = torch.randn(tokens, n_in, generator=torch.Generator().manual_seed(seed)).to(x_dtype)
    for way in native.ways(values, x_dtype, tokens, n_in):
        compare(state, packed, x, None, way)


# Plans, the operator, and what is refused.


def test_a_plan_says_which_way() -> None:
    assert [native.way_for("bf16<=4,amx<=512,slices", n) for n in (0, 1, 4, 5, 512, 513)] == [
        "bf16", "bf16", "bf16", "amx", "amx", "slices",
    ]  # fmt: skip
    for bad in ("", "bf16<=4", "bf16,amx", "amx<=4,bf16<=2,slices", "amx<=x,slices", "gpu", "amx<=4,amx<=4,slices"):
        with pytest.raises(UsageError, match="plan"):
            native.parse_plan(bad)


@pytest.mark.parametrize(
    ("plan", "name"),
    [
        ("amx", "native"), ("slices", "native+expanded:1-"), ("bf16<=4,slices", "native+expanded:5-"),
        ("bf16<=2,dense", "native+dense:3-"), ("dense", "native+dense:1-"),
        ("dense<=1,amx<=32,dense<=64,slices", "native+dense:1-1,33-64+expanded:65-"),
        ("slices<=3,amx<=32,slices", "native+expanded:1-3,33-"),
    ],
)  # fmt: skip
def test_a_plan_says_when_it_multiplies_zeros(plan: str, name: str) -> None:
    kernel = native.native(plan)
    assert (kernel.name, kernel.reported) == ("native", name)
    for n in (1, 2, 3, 4, 5, 32, 33, 64, 65, 512, 4096):
        assert runs_sparse(name, n) == (native.way_for(plan, n) in native.COMPILED)
        assert expands(name, n) == (native.way_for(plan, n) == native.SLICES)
    assert runs_sparse(name) == any(way in native.COMPILED for _, way in native.parse_plan(plan))


@pytest.mark.parametrize("plan", ["bf16<=4,slices", "slices", "bf16<=2,dense"])
@pytest.mark.parametrize("perm", [False, True], ids=["", "permuted"])
def test_kernel_takes_any_shape_of_input(plan: str, perm: bool) -> None:
    if "bf16" in plan and "bf16" not in native.features():
        pytest.skip("no bfloat16 instructions")
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)) if perm else None
    weight = decode(packed_weight(24, 64, None, BF16))
    packed = encode(weight, None, order)
    kernel = native.native(plan)
    state = kernel.prepare(packed)
    assert state.n_bytes >= packed.n_bytes
    for shape, bias in itertools.product([(), (0,), (1,), (2, 3), (2, 0)], (None, torch.randn(24).to(BF16))):
        x = torch.randn(*shape, 64, generator=torch.Generator().manual_seed(1)).to(BF16)
        wanted = linear(x, weight, bias)
        found = kernel.linear(x, state.tensors, state.sizes, bias)
        assert (found.shape, found.dtype, found.is_contiguous()) == (wanted.shape, BF16, True)
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    for tokens in (1, 6):
        for x in (torch.randn(128, tokens).to(BF16).t()[:, ::2], torch.randn(2, 64, tokens).to(BF16).permute(2, 0, 1)):
            x = x.requires_grad_()
            found = kernel.linear(x, state.tensors, state.sizes, None)
            assert found.is_contiguous()
            torch.testing.assert_close(found, linear(x, weight), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_break(backend: str) -> None:
    packed = packed_weight(24, 64, None, F32)
    kernel, bias = native.native("avx512<=4,slices"), torch.randn(24)
    state = kernel.prepare(packed)

    def block(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(kernel.linear(x * 2, state.tensors, state.sizes, bias)) + 1

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for tokens in (1, 8, 7, 30):
        x = torch.randn(tokens, 64)
        torch.testing.assert_close(compiled(x), block(x))


def test_operator_passes_torchs_own_checks() -> None:
    packed = packed_weight(24, 64, None, F32)
    state = native.prepare_with(packed, "avx512<=4,dense")
    for x, bias in ((torch.randn(3, 64), None), (torch.randn(2, 3, 64), torch.randn(24))):
        for plan in ("avx512", "slices", "avx512<=4,dense"):
            weight = operands(state.tensors, state.sizes, bias, plan)
            torch.library.opcheck(torch.ops.sparsify.linear.default, (x, *weight))


def test_what_does_not_belong_together_is_refused() -> None:
    packed = packed_weight(24, 64, None, BF16)
    state = native.prepare_with(packed, native.SLICES)
    x = torch.zeros(1, 64, dtype=BF16)
    t = state.tensors
    changed: dict[str, tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor | None]] = {
        "input": (x.float(), {**t}, None),
        "bias": (x, {**t}, torch.zeros(23, dtype=BF16)),
        "bias is": (x, {**t}, torch.zeros(24)),
        "mask": (x, {**t, "mask": t["mask"][:23]}, None),
        "mask or starts": (x, {**t, "starts": t["starts"][:-1]}, None),
        "contiguous": (x, {**t, "mask": t["mask"].t().contiguous().t()}, None),
    }
    for name, (inputs, tensors, bias) in changed.items():
        with pytest.raises(RuntimeError, match=name):
            product(inputs, tensors, state.sizes, bias, "slices")
    with pytest.raises(ValueError, match="number of values"):
        product(x, {**t, "values": t["values"][:-1]}, state.sizes, None, "slices")
    with pytest.raises(ValueError, match="no such product"):
        product(x, t, state.sizes, None, "vnni")
    half = encode(decode(packed).half())
    assert "float16" in str(native.native("slices").refuse(half))
    assert native.native("slices").absent(torch.device("cuda")) == "it runs on CPUs only"


def test_the_pool_is_torchs() -> None:
    # Whatever name the OpenMP runtime of this build of torch has, it is loaded already.
    assert native.pool()
    with open("/proc/self/maps") as maps:
        assert any(native.pool().rsplit("/", 1)[1] in line for line in maps)

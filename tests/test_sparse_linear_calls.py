"""Calls of packed layers beside those of ``nn.Linear``: values, dtypes, autocast, threads."""

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsify.compress import compress_, engaged
from sparsify.errors import UsageError
from sparsify.format.packed import decode, encode, quantise
from sparsify.kernels import native
from sparsify.kernels.dispatch import choose
from sparsify.kernels.kernel import Kernel
from sparsify.kernels.packed_reference import PACKED
from sparsify.kernels.table import Entry, Table, Times, device_key, places, write
from sparsify.plugins.sparse_linear import SparseLinear, linear
from sparsify.types import NofM
from tests.sparse_layers import BF16, F32, NAMES, NO_NATIVE, kernel_of, zeroed

N_OUT, N_IN = 40, 56
PATTERNS = [NofM(2, 4), NofM(4, 8), NofM(1, 4), NofM(3, 7), None]
F16 = torch.float16
no_native = pytest.mark.skipif(NO_NATIVE is not None, reason=NO_NATIVE or "")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def kernels(dtype: torch.dtype) -> list[Kernel]:
    if NO_NATIVE is not None:
        return [PACKED]
    return [PACKED, native.native(native.plan_without_measurements(dtype)), native.native("slices<=2,dense")]


def whole(shape: tuple[int, ...], most: int, seed: int = 0) -> torch.Tensor:
    """Small integers, whose sums are exact in any order and any dtype."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def pair(
    pattern: NofM | None, dtype: torch.dtype, kernel: Kernel, *, bias: bool = True, moved: bool = False
) -> tuple[SparseLinear, nn.Linear]:
    """A packed layer and the ordinary one, of integers."""
    # Not by a product, whose zeros have signs.
    stored = torch.where(zeroed((N_OUT, N_IN), pattern, F32) != 0, whole((N_OUT, N_IN), 1, 1), 0)
    perm = torch.randperm(N_IN, generator=torch.Generator().manual_seed(2)) if moved else None
    weight = stored.to(dtype)
    if perm is not None:
        weight = torch.empty_like(weight)
        weight[:, perm] = stored.to(dtype)
    parameter = nn.Parameter(whole((N_OUT,), 9, 3).to(dtype)) if bias else None
    return SparseLinear(encode(weight, pattern, perm), kernel, parameter), linear(weight, parameter)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_pattern_computes_what_the_linear_does(pattern: NofM | None, dtype: torch.dtype) -> None:
    compared = 0
    for kernel, bias, moved in itertools.product(kernels(dtype), (False, True), (False, True)):
        layer, ordinary = pair(pattern, dtype, kernel, bias=bias, moved=moved)
        for shape in ((), (1,), (3,), (2, 9), (64,), (0,)):
            x = whole((*shape, N_IN), 2, 4).to(dtype)
            with torch.no_grad():
                found, wanted = layer(x), ordinary(x)
            assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
            assert torch.equal(found, wanted), kernel.name
            compared += 1
    assert compared == 24 * len(kernels(dtype))


# Autocast


@pytest.mark.parametrize("to", [BF16, F16], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_autocast_takes_and_gives_the_dtypes_of_an_ordinary_linear(dtype: torch.dtype, to: torch.dtype) -> None:
    for kernel, bias in itertools.product(kernels(dtype), (False, True)):
        layer, ordinary = pair(None, dtype, kernel, bias=bias)
        for x_dtype, tokens in itertools.product((F32, BF16, F16), (1, 20)):
            x = whole((tokens, N_IN), 2, 4).to(x_dtype)
            with torch.no_grad(), torch.autocast("cpu", dtype=to):
                found, wanted = layer(x), ordinary(x)
            assert found.dtype == wanted.dtype == to
            assert torch.equal(found, wanted), kernel.name


def test_autocast_does_not_reach_into_kernels() -> None:
    """A weight in float32 keeps its precision up to the one rounding of the result."""
    for kernel in kernels(F32):
        weight = zeroed((N_OUT, N_IN), None, F32)
        layer = SparseLinear(encode(weight), kernel)
        for tokens in (1, 20):
            x = torch.randn(tokens, N_IN, generator=torch.Generator().manual_seed(tokens))
            with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
                found = layer(x)
            exact = x.double() @ weight.double().T
            assert ((found.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all(), kernel.name


def test_autocast_takes_8_bits_and_orders_too() -> None:
    for kernel in kernels(torch.int8):
        order = torch.randperm(N_IN, generator=torch.Generator().manual_seed(3))
        packed = quantise(encode(zeroed((N_OUT, N_IN), None, F32), None, order))
        layer = SparseLinear(packed, kernel)
        x = torch.randn(3, N_IN, generator=torch.Generator().manual_seed(1)).to(BF16)
        with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
            found = layer(x)
            wanted = linear(decode(packed), None)(x)
        assert found.dtype == wanted.dtype == BF16
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def test_tensors_without_data_have_no_autocast() -> None:
    for kernel in kernels(F32):
        layer, ordinary = pair(None, F32, kernel)
        x = whole((3, N_IN), 2, 4)
        for module in (layer, ordinary):
            module.to("meta")
        with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
            found, wanted = layer(x.to("meta")), ordinary(x.to("meta"))
        assert (found.shape, found.dtype, found.device) == (wanted.shape, wanted.dtype, wanted.device)


@pytest.mark.parametrize(
    "kernel", [PACKED, pytest.param(native.native("slices"), marks=no_native)], ids=lambda kernel: kernel.name
)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_without_autocast_a_wrong_dtype_is_an_error_as_for_an_ordinary_linear(kernel: Kernel, bias: bool) -> None:
    layer, ordinary = pair(None, BF16, kernel, bias=bias)
    for dtype in (F32, F16, torch.float64, torch.int64, torch.bool):
        x = torch.ones(2, N_IN, dtype=dtype)
        for module in (layer, ordinary):
            with torch.no_grad(), pytest.raises(RuntimeError):
                module(x)
            with torch.no_grad(), torch.autocast("cpu", enabled=False), pytest.raises(RuntimeError):
                module(x)
    # Nor does autocast touch these.
    for dtype in (torch.float64, torch.int64):
        for module in (layer, ordinary):
            with torch.no_grad(), torch.autocast("cpu", dtype=BF16), pytest.raises(RuntimeError):
                module(torch.ones(2, N_IN, dtype=dtype))


@pytest.mark.parametrize("kernel", NAMES)
def test_models_run_under_autocast_as_before(kernel: str) -> None:
    def made() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(N_IN, N_OUT), nn.LayerNorm(N_OUT), nn.Linear(N_OUT, 16))
        with torch.no_grad():
            for layer in (part for part in model if isinstance(part, nn.Linear)):
                layer.weight.copy_(zeroed((layer.out_features, layer.in_features), None, F32))
        return model

    model, ordinary = compress_(made(), kernel), made()
    assert {kernel_of(ran) for ran in engaged(model).values()} == {kernel}
    x = torch.randn(2, 5, N_IN, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=BF16):
        # With gradients, which are refused only when somebody asks for them.
        found, wanted = model(x), ordinary(x)
    assert found.dtype == wanted.dtype == BF16
    torch.testing.assert_close(found, wanted, rtol=3e-2, atol=3e-2)
    with pytest.raises(UsageError, match=f"kernel {kernel} computes no gradients"):
        found.sum().backward()


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
@pytest.mark.parametrize("kernel", NAMES)
def test_one_graph_under_autocast(kernel: str, inside: bool) -> None:
    model = compress_(nn.Sequential(pair(None, F32, PACKED)[1]), kernel)
    x = whole((3, N_IN), 2, 4)

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=BF16, enabled=inside):
            result: torch.Tensor = model(x)
        return result

    torch._dynamo.reset()
    compiled: Any = torch.compile(run if inside else model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        found = compiled(x)
        assert found.dtype == BF16
        assert torch.equal(found, model(x))
    with torch.no_grad():
        # The graph is of one state of autocast.
        assert compiled(x).dtype == (BF16 if inside else F32)


def test_of_8_bits_an_input_is_any_float_and_a_bias_is_of_its_dtype() -> None:
    packed = quantise(encode(zeroed((N_OUT, N_IN), None, BF16)))
    layer = SparseLinear(packed, PACKED, nn.Parameter(whole((N_OUT,), 9, 3).to(BF16)))
    for dtype in (torch.int64, torch.float64):
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"input is .*, the weight was prepared as torch.int8"):
            layer(torch.ones(2, N_IN, dtype=dtype))
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"bias is torch.bfloat16 \[40\], want torch.float32 \[40\]"),
    ):
        layer(torch.ones(2, N_IN))
    plain = SparseLinear(packed, PACKED)
    for dtype in (F32, F16, BF16):
        with torch.no_grad():
            assert plain(torch.ones(2, N_IN, dtype=dtype)).dtype == dtype


# Threads


@pytest.mark.parametrize("values", [F32, BF16, torch.int8], ids=str)
def test_threads_of_python_may_share_a_layer(values: torch.dtype) -> None:
    """Each gives its own inputs; the result of a call is that of the same call alone."""
    dtype = F32 if values == F32 else BF16
    for kernel in kernels(values):
        layer, _ = pair(None, dtype, kernel)
        if values == torch.int8:
            layer = SparseLinear(quantise(layer.packed()), kernel, layer.bias)
        inputs = [[whole((tokens, N_IN), 2, seed).to(dtype) for tokens in (1, 2, 20)] for seed in range(2)]
        with torch.inference_mode():
            alone = [[layer(x) for x in mine] for mine in inputs]
        assert not torch.equal(alone[0][0], alone[1][0])
        together = threading.Barrier(2)

        def many(mine: list[torch.Tensor], layer: nn.Module = layer, together: Any = together) -> list[torch.Tensor]:
            together.wait(60)
            with torch.inference_mode():
                return [layer(x) for _ in range(100) for x in mine]

        with ThreadPoolExecutor(2) as pool:
            for found, wanted in zip(pool.map(many, inputs), alone, strict=True):
                assert len(found) == 300
                assert all(torch.equal(y, wanted[i % 3]) for i, y in enumerate(found)), kernel.name


@no_native
def test_a_second_call_chooses_for_the_threads_of_that_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    device = torch.device("cpu")

    def times(slices_us: float) -> dict[str, Times]:
        return {"dense": Times(10, 10, 10, 3), "slices": Times(slices_us, slices_us, slices_us, 3)}

    # Packed is faster with two threads, slower with three, and with four faster for one token.
    for n, few, many in ((2, 5, 5), (3, 20, 20), (4, 5, 20)):
        torch.set_num_threads(n)
        entry = Entry("bf16", "bf16", "unstructured", 0.5, N_OUT, N_IN, {1: times(few), 512: times(many)})
        write(Table(device_key(device), n, {}, {}, (entry,)), places(device)["measured here"])
    model = nn.Sequential(linear(zeroed((N_OUT, N_IN), None, BF16), None))
    weight = model[0].weight.clone()  # type: ignore[operator]
    two, three = (2, "native+expanded:1-", "slices"), (3, "dense", "")
    four = (4, "native+dense:2-+expanded:1-1", "slices<=1,dense")
    for n, name, plan in (two, three, four, two, four, three):
        before = engaged(model)
        torch.set_num_threads(n)
        assert engaged(model) == before
        compress_(model)
        assert engaged(model) == {"0": name}
        layer: Any = model[0]
        assert choose(encode(weight), "auto").plan == plan
        if plan:
            assert layer.kernel is native.native(plan)
            assert torch.equal(decode(layer.packed()), weight)
        else:
            assert torch.equal(layer.weight, weight)

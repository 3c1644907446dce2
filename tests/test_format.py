"""The compressed storage of one weight: exact both ways, for readers of others too, and nothing malformed believed."""

import json
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save

from sparsify.errors import UsageError
from sparsify.format.bits import count_bits, pack_bits, unpack_bits
from sparsify.format.packed import DTYPES, Packed, columns, decode, encode, fits, rows, stack, unstructured
from sparsify.format.record import MASK, from_tensors, to_tensors
from sparsify.types import NofM

Tensors = dict[str, torch.Tensor]

PATTERNS = [NofM(1, 2), NofM(2, 4), NofM(1, 4), NofM(4, 8), NofM(8, 16), NofM(16, 32), NofM(3, 7)]
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def bits(weight: torch.Tensor) -> torch.Tensor:
    """As integers: -0.0 is not 0.0, and a NaN is itself."""
    return weight.contiguous().view({2: torch.int16, 4: torch.int32}[weight.itemsize])


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def random_weight(
    n_out: int, n_in: int, dtype: torch.dtype, pattern: NofM | None = None, seed: int = 0, share: float = 0.5
) -> torch.Tensor:
    """Random bits, NaNs and infinities among them: up to n in a group of m, or a ``share`` of all places."""
    generator = torch.Generator().manual_seed(seed)
    integer = torch.int16 if dtype.itemsize == 2 else torch.int32
    limits = torch.iinfo(integer)
    anything = torch.randint(limits.min, limits.max + 1, (n_out, n_in), generator=generator).to(integer)
    order = torch.rand(n_out, n_in, generator=generator)
    if pattern is None:
        keep = order < share
    else:
        groups = order.view(n_out, -1, pattern.m)
        at_most = torch.randint(0, pattern.n + 1, groups.shape[:2], generator=generator).unsqueeze(2)
        keep = (groups.argsort(dim=2).argsort(dim=2) < at_most).view(n_out, n_in)
    return torch.where(keep, anything, 0).to(integer).view(dtype)


def random_order(n_in: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(n_in, generator=torch.Generator().manual_seed(seed))


def read_by_another(file: bytes, module: str) -> NDArray[Any]:
    """The bits of a weight in a safetensors file: what somebody wrote who has only read the docstring of ``record``."""
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:start])

    def part(name: str, kind: str) -> NDArray[Any]:
        entry = header[f"{module}.{name}"]
        first, last = (start + offset for offset in entry["data_offsets"])
        return np.frombuffer(file[first:last], kind).reshape(entry["shape"])

    dtype = header[f"{module}.weight"]["dtype"]
    version, n_out, n_in, n, m, *checks = part("weight_check", "<i8").tolist()
    kinds = {"BF16": "<u2", "F16": "<u2", "F32": "<u4", "I8": "i1"}
    values, mask = part("weight", kinds[dtype]), part("weight_mask", "u1")
    perm = part("weight_perm", "<i4") if checks[2] != -1 else None
    parts = [values, mask, perm]
    if version == 2:
        assert dtype == "I8"
        wide = ["BF16", "F16", "F32"][checks.pop() - 1]
        dtype += f" {wide}"
        parts.append(part("weight_scale", "<f4"))
    line = zlib.crc32(f"sparsify {version} {n_out} {n_in} {n} {m} {dtype}".encode())
    assert checks == [-1 if tensor is None else zlib.crc32(tensor.tobytes(), line) for tensor in parts]
    keep = np.unpackbits(mask, axis=1, bitorder="little")[:, :n_in] == 1
    if m:
        assert (keep.reshape(n_out, -1, m).sum(axis=2) == n).all()
    values = values.flatten()
    if version == 2:
        assert parts[3] is not None
        assert values.min(initial=0) >= -127
        values = rounded(parts[3].repeat(keep.sum(axis=1)), values, wide)
    stored = np.zeros((n_out, n_in), values.dtype)
    stored[keep] = values
    weight = np.empty_like(stored)
    weight[:, slice(None) if perm is None else perm] = stored
    return weight


def rounded(scale: NDArray[Any], codes: NDArray[Any], dtype: str) -> NDArray[Any]:
    """The bits of ``scale * codes``, multiplied in float32 and rounded to ``dtype``."""
    with np.errstate(over="ignore"):
        product = scale * codes.astype(np.float32)
        if dtype == "F16":
            return product.astype(np.float16).view("<u2")
    whole = product.view("<u4")
    # To the nearest, and from the middle to the even one.
    return whole if dtype == "F32" else ((whole + 0x7FFF + (whole >> 16 & 1)) >> 16).astype("<u2")


def assert_holds(packed: Packed, weight: torch.Tensor) -> None:
    """``packed`` is ``weight``: decoded, stored and read again, and to a reader that shares no code with ours."""
    assert packed.shape == tuple(weight.shape)
    assert same(decode(packed), weight)
    tensors = to_tensors(packed)
    assert tensors[MASK].shape == (weight.shape[0], (weight.shape[1] + 7) // 8)
    assert same(decode(from_tensors("m", tensors)), weight)
    file = save({f"m.{part}": tensor.contiguous() for part, tensor in tensors.items()})
    unsigned = f"u{weight.itemsize}"
    assert np.array_equal(read_by_another(file, "m"), bits(weight).numpy().view(unsigned))


# --- exact ---------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(PATTERNS), st.sampled_from(DTYPES), st.integers(1, 6), st.integers(1, 6),
    st.booleans(), st.integers(0, 10**6),
)  # fmt: skip
def test_patterns_come_back_bit_for_bit(
    pattern: NofM, dtype: torch.dtype, n_out: int, n_groups: int, moved: bool, seed: int
) -> None:
    n_in = n_groups * pattern.m
    stored = random_weight(n_out, n_in, dtype, pattern, seed)
    perm = random_order(n_in, seed) if moved else None
    weight = stored
    if perm is not None:
        weight = torch.empty_like(stored)
        weight[:, perm] = stored
    packed = encode(weight, pattern, perm)
    assert packed.values.shape == (n_out, n_groups * pattern.n)
    assert_holds(packed, weight)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(DTYPES), st.integers(1, 6), st.integers(1, 45), st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.booleans(), st.integers(0, 10**6),
)  # fmt: skip
def test_any_zeros_come_back_bit_for_bit(
    dtype: torch.dtype, n_out: int, n_in: int, share: float, moved: bool, seed: int
) -> None:
    weight = random_weight(n_out, n_in, dtype, None, seed, share)
    packed = encode(weight, None, random_order(n_in, seed) if moved else None)
    assert packed.values.shape == (int((bits(weight) != 0).sum()),)
    assert_holds(packed, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", [*PATTERNS, None])
def test_the_ends_of_the_scale(dtype: torch.dtype, pattern: NofM | None) -> None:
    n_in = 3 * pattern.m if pattern else 23
    for n_out in (1, 5):
        assert_holds(encode(torch.zeros(n_out, n_in, dtype=dtype), pattern), torch.zeros(n_out, n_in, dtype=dtype))
    if pattern is None:
        for shape in ((1, 1), (9, 1), (1, 9), (4, 8), (4, 23)):
            assert_holds(encode(torch.ones(shape, dtype=dtype)), torch.ones(shape, dtype=dtype))
    else:
        one_group = random_weight(1, pattern.m, dtype, pattern)
        assert_holds(encode(one_group, pattern), one_group)


def test_nans_keep_their_payload() -> None:
    payloads = torch.tensor([[0x7FC1, 0, 0, -1, 0, 0x7F81, -0x7F, 0]], dtype=torch.int16)
    weight = payloads.view(torch.bfloat16)
    assert int(weight.isnan().sum()) == 4
    for pattern in (NofM(2, 4), NofM(4, 8), None):
        assert bits(decode(encode(weight, pattern))).tolist() == payloads.tolist()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_groups_with_too_few_values_are_filled_with_their_first_zeros(pattern: NofM) -> None:
    weight = torch.zeros(2, 2 * pattern.m)
    weight[1, -1] = 3.0
    packed = encode(weight, pattern)
    keep = np.unpackbits(packed.mask.numpy(), axis=1, bitorder="little")[:, : 2 * pattern.m].reshape(2, 2, pattern.m)
    assert (keep[:, 0, : pattern.n] == 1).all()
    assert keep[1, 1].tolist() == [1] * (pattern.n - 1) + [0] * (pattern.m - pattern.n) + [1]
    assert packed.values[1].tolist() == [0.0] * (2 * pattern.n - 1) + [3.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_zero_is_a_value(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1, 0, 2, 0, 0, 0, 3, 0]], dtype=dtype)
    assert fits(weight, NofM(2, 4))
    weight[0, 1] = -0.0
    assert not fits(weight, NofM(2, 4))
    with pytest.raises(UsageError, match="more than 2:4"):
        encode(weight, NofM(2, 4))
    packed = encode(weight)
    assert packed.values.tolist() == [1, 0, 2, 3]
    assert_holds(packed, weight)
    # Where there is room for it the pattern holds.
    assert_holds(encode(weight, NofM(4, 8)), weight)


def test_a_pattern_that_holds_in_another_order_only() -> None:
    weight = torch.tensor([[1.0, 2, 3, 4, 0, 0, 0, 0]])
    assert not fits(weight, NofM(2, 4))
    perm = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    packed = encode(weight, NofM(2, 4), perm)
    assert packed.values.tolist() == [[1, 2, 3, 4]]
    assert packed.perm is not None
    assert packed.perm.dtype == torch.int32
    assert_holds(packed, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_more_groups_than_are_expanded_at_a_time(dtype: torch.dtype) -> None:
    weight = random_weight(263, 1024, dtype, NofM(2, 4))
    packed = encode(weight, NofM(2, 4))
    assert same(decode(packed), weight)
    # Kernels expand views of a few rows.
    part = Packed((2, 1024), packed.pattern, packed.values[261:], packed.mask[261:])
    assert same(decode(part), weight[261:])


@pytest.mark.parametrize("pattern", [NofM(2, 4), NofM(4, 8), None])
def test_weights_need_not_be_contiguous(pattern: NofM | None) -> None:
    weight = random_weight(8, 16, torch.float16, pattern)
    assert_holds(encode(weight.t().contiguous().t(), pattern), weight)
    assert_holds(encode(torch.cat((weight, weight), dim=1)[:, :16], pattern), weight)


def test_two_of_four_in_sixteen_bits_costs_nine_sixteenths() -> None:
    weight = random_weight(64, 128, torch.bfloat16, NofM(2, 4))
    packed = encode(weight, NofM(2, 4))
    assert packed.n_bytes * 16 == weight.nbytes * 9
    assert sum(tensor.nbytes for tensor in to_tensors(packed).values()) == packed.n_bytes + 64


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 10**6))
def test_bitmasks_are_those_of_numpy(n_out: int, n_in: int, seed: int) -> None:
    keep = np.random.default_rng(seed).random((n_out, n_in)) < 0.5
    mask = pack_bits(torch.from_numpy(keep))
    assert np.array_equal(mask.numpy(), np.packbits(keep, axis=1, bitorder="little"))
    assert np.array_equal(unpack_bits(mask, n_in).numpy(), keep)
    assert count_bits(mask).sum(dim=1).tolist() == keep.sum(axis=1).tolist()
    for start in range(0, n_in - 8, 3):
        cut = torch.from_numpy(keep)[-1:, start : start + 8]
        assert np.array_equal(pack_bits(cut).numpy(), np.packbits(cut.numpy(), axis=1, bitorder="little"))


@pytest.mark.parametrize("moved", [False, True])
def test_values_in_another_dtype(moved: bool) -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    weight.view(6, 4, 4)[:, :, 1:3] = 0
    perm = random_order(4).repeat(4) + 4 * torch.arange(4).repeat_interleave(4) if moved else None
    packed = encode(weight, NofM(2, 4), perm)
    for converted in (packed.to(torch.bfloat16), packed.to("cpu", torch.bfloat16), packed.to(torch.bfloat16).to("cpu")):
        assert converted.dtype == torch.bfloat16
        assert same(decode(converted), weight.bfloat16())


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(4), torch.zeros(2, 2, 4), torch.zeros(2, 4).double(), torch.zeros(2, 4).char(), torch.ones(2, 4),
     torch.zeros(2, 6), torch.tensor(0.0), torch.zeros(2, 4, dtype=torch.float8_e4m3fn)],
)  # fmt: skip
def test_what_cannot_be_packed_is_refused(weight: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="pack"):
        encode(weight, NofM(2, 4))


# --- cut and stacked -----------------------------------------------------------------------------------------------


@st.composite
def weights(draw: st.DrawFn) -> tuple[torch.Tensor, NofM | None]:
    pattern = draw(st.sampled_from([*PATTERNS, None, None]))
    n_in = draw(st.integers(1, 5)) * pattern.m if pattern else draw(st.integers(1, 45))
    dtype = draw(st.sampled_from(DTYPES))
    return random_weight(draw(st.integers(1, 6)), n_in, dtype, pattern, draw(st.integers(0, 10**6))), pattern


def interval(data: st.DataObject, size: int, step: int = 1) -> tuple[int, int]:
    start = data.draw(st.integers(0, size // step - 1))
    return step * start, step * data.draw(st.integers(start + 1, size // step))


def assert_owns(packed: Packed) -> None:
    """It keeps nothing alive but itself: a rank that holds a cut must not hold the whole."""
    for tensor in (packed.values, packed.mask):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@settings(max_examples=150, deadline=None)
@given(weights(), st.data())
def test_rows_are_those_of_the_dense_weight(case: tuple[torch.Tensor, NofM | None], data: st.DataObject) -> None:
    weight, pattern = case
    packed = encode(weight, pattern)
    start, stop = interval(data, weight.shape[0])
    cut = rows(packed, start, stop)
    assert cut.pattern == pattern
    assert_owns(cut)
    assert_holds(cut, weight[start:stop])
    assert_holds(packed, weight)


@settings(max_examples=250, deadline=None)
@given(weights(), st.booleans(), st.data())
def test_columns_are_those_of_the_dense_weight(
    case: tuple[torch.Tensor, NofM | None], between: bool, data: st.DataObject
) -> None:
    weight, pattern = case
    packed = encode(weight, pattern)
    start, stop = interval(data, weight.shape[1], pattern.m if pattern and between else 1)
    cut = columns(packed, start, stop)
    assert (cut.pattern is None) == (pattern is None or bool(start % pattern.m or stop % pattern.m))
    assert_owns(cut)
    assert_holds(cut, weight[:, start:stop])
    # A cut of a cut.
    first, last = interval(data, stop - start)
    assert_holds(columns(cut, first, last), weight[:, start:stop][:, first:last])
    assert_holds(packed, weight)


def test_cuts_of_one_row_at_any_place() -> None:
    weight = random_weight(1, 64, torch.float16, NofM(2, 4))
    for packed in (encode(weight), encode(weight, NofM(2, 4))):
        for start in range(64):
            for stop in range(start + 1, 65):
                assert same(decode(columns(packed, start, stop)), weight[:, start:stop])


@settings(max_examples=150, deadline=None)
@given(weights(), st.booleans(), st.data())
def test_stacked_is_concatenated(case: tuple[torch.Tensor, NofM | None], alike: bool, data: st.DataObject) -> None:
    weight, pattern = case
    other = pattern if alike else None
    below = random_weight(3, weight.shape[1], weight.dtype, other, seed=1)
    parts = [encode(weight, pattern), encode(below, other), encode(weight, pattern)]
    whole, dense = stack(parts), torch.cat((weight, below, weight))
    assert whole.pattern == other
    assert_holds(whole, dense)
    start, stop = interval(data, len(dense))
    assert_holds(rows(whole, start, stop), dense[start:stop])
    assert stack(parts[:1]) is parts[0]


@settings(max_examples=60, deadline=None)
@given(weights(), st.booleans())
def test_unstructured_drops_what_filled_the_groups(case: tuple[torch.Tensor, NofM | None], moved: bool) -> None:
    weight, pattern = case
    perm = random_order(weight.shape[1]) if moved else None
    packed = encode(weight if perm is None else weight[:, perm.argsort()], pattern, perm)
    loose = unstructured(packed)
    assert loose.pattern is None
    assert len(loose.values) == int((bits(weight) != 0).sum())
    assert_holds(loose, decode(packed))


def test_weights_in_another_order_are_cut_by_rows_only() -> None:
    weight = random_weight(6, 16, torch.bfloat16, NofM(2, 4))
    perm, other = random_order(16, 1), random_order(16, 2)
    moved = encode(weight[:, perm.argsort()], NofM(2, 4), perm)
    assert_holds(rows(moved, 1, 4), weight[1:4][:, perm.argsort()])
    assert columns(moved, 0, 16) is moved
    again = encode(weight[:, perm.argsort()], NofM(2, 4), perm.clone())
    assert_holds(stack([moved, again]), torch.cat((weight, weight))[:, perm.argsort()])
    with pytest.raises(UsageError, match="another order"):
        columns(moved, 0, 8)
    for odd in (encode(weight, NofM(2, 4)), encode(weight[:, other.argsort()], NofM(2, 4), other)):
        for pair in ([moved, odd], [odd, moved]):
            with pytest.raises(UsageError, match="different orders"):
                stack(pair)

"""Values in 8 bits with a scale for each output: how far they are from the weight, and how they are stored and cut."""

import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save
from torch.nn.functional import linear

from sparsify.errors import ModelError, UsageError
from sparsify.format.packed import (
    DTYPES,
    Packed,
    columns,
    decode,
    encode,
    fits,
    quantise,
    rows,
    stack,
    unstructured,
)
from sparsify.format.record import CHECK, MASK, PERM, SCALE, VALUES, from_tensors, is_complete, to_tensors
from sparsify.kernels import native
from sparsify.kernels.linear import operands
from sparsify.kernels.packed_reference import PACKED
from sparsify.plugins.shards import Shards
from sparsify.types import NofM
from tests.test_format import PATTERNS, Tensors, bits, interval, random_order, random_weight, read_by_another, same
from tests.test_format_record import all_of, change, fields, finite, flip, forge, stored, without
from tests.test_kernels import TOLERANCE
from tests.test_shards import cut, place

KINDS = ["int8 2:4", "int8 3:7", "int8 odd", "int8 moved"]


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, NofM | None]:
    """Weights of any bits but NaN and infinity: denormals and the ends of each dtype are among them."""
    pattern = draw(st.sampled_from([*PATTERNS, None, None]))
    n_in = draw(st.integers(1, 5)) * pattern.m if pattern else draw(st.integers(1, 45))
    share, seed = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])), draw(st.integers(0, 10**6))
    weight = random_weight(draw(st.integers(1, 6)), n_in, draw(st.sampled_from(DTYPES)), pattern, seed, share)
    weight = finite(weight) if draw(st.booleans()) else torch.where(weight.isfinite(), weight, 0)
    return weight * draw(st.sampled_from([1.0, 1e-3, 2.0**-120, 2.0**-14])), pattern


def codes_of(packed: Packed) -> NDArray[np.float64]:
    """The values of ``packed`` as a dense matrix [out, in] in the stored order, not scaled."""
    mask = np.unpackbits(packed.mask.numpy(), axis=1, bitorder="little")[:, : packed.shape[1]] == 1
    dense = np.zeros(packed.shape)
    dense[mask] = packed.values.double().flatten().numpy()
    return dense


def assert_decodes(packed: Packed, weight: torch.Tensor) -> None:
    """``packed`` is ``weight`` to us, stored and read again, and to a reader that shares no code with ours."""
    assert packed.shape == tuple(weight.shape)
    assert same(decode(packed), weight)
    tensors = to_tensors(packed)
    assert tensors.keys() == {VALUES, MASK, CHECK, SCALE} | ({PERM} if packed.perm is not None else set())
    assert (tensors[VALUES].dtype, tensors[SCALE].dtype) == (torch.int8, torch.float32)
    again = from_tensors("m", tensors)
    assert same(decode(again), weight)
    assert again.dtype == weight.dtype
    file = save({f"m.{part}": tensor.contiguous() for part, tensor in tensors.items()})
    assert np.array_equal(read_by_another(file, "m"), bits(weight).numpy().view(f"u{weight.itemsize}"))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_no_value_is_further_than_half_a_step(case: tuple[torch.Tensor, NofM | None]) -> None:
    weight, pattern = case
    packed = encode(weight, pattern)
    found = quantise(packed)
    assert found.scale is not None
    assert (found.values.dtype, found.scale.dtype, found.scale.shape) == (torch.int8, torch.float32, weight.shape[:1])
    assert torch.equal(found.mask, packed.mask)
    codes, scale = codes_of(found), found.scale.double().numpy()[:, None]
    assert np.abs(codes).max(initial=0) <= 127
    wide = weight.double().numpy()
    # The quotient is rounded to float32 before it is rounded to a code.
    assert (np.abs(scale * codes - wide) <= scale * (0.5 + 2.0**-16)).all()
    assert (codes * wide >= 0).all()
    assert ((scale > 0)[:, 0] == (wide != 0).any(axis=1)).all()
    # No code is out of use, but where float32 has no steps between.
    steps = np.abs(wide).max(axis=1, initial=0) > 1e-36
    assert (np.abs(codes).max(axis=1, initial=0)[steps] == 127).all()
    # What decodes to another number than 0 was one.
    assert (weight[decode(found) != 0] != 0).all()


@settings(max_examples=200, deadline=None)
@given(cases(), st.booleans(), st.integers(0, 10**6))
def test_stored_and_read_again(case: tuple[torch.Tensor, NofM | None], moved: bool, seed: int) -> None:
    weight, pattern = case
    perm = random_order(weight.shape[1], seed) if moved else None
    packed = quantise(encode(weight if perm is None else weight[:, perm.argsort()], pattern, perm))
    assert_decodes(packed, decode(packed))
    loose = unstructured(packed)
    assert loose.pattern is None
    assert pattern is None or len(loose.values) == int((packed.values != 0).sum())
    assert_decodes(loose, decode(packed))


@settings(max_examples=150, deadline=None)
@given(cases(), st.data())
def test_cuts_and_stacks_are_those_of_the_dense_weight(
    case: tuple[torch.Tensor, NofM | None], data: st.DataObject
) -> None:
    weight, pattern = case
    packed = quantise(encode(weight, pattern))
    dense = decode(packed)
    (top, bottom), (left, right) = (interval(data, size) for size in weight.shape)
    lower = rows(packed, top, bottom)
    assert_decodes(lower, dense[top:bottom])
    assert_decodes(columns(packed, left, right), dense[:, left:right])
    assert_decodes(columns(lower, left, right), dense[top:bottom, left:right])
    assert_decodes(
        stack([lower, unstructured(packed), lower]), torch.cat((dense[top:bottom], dense, dense[top:bottom]))
    )
    with pytest.raises(UsageError, match="8 bits"):
        stack([packed, encode(weight, pattern)])
    with pytest.raises(UsageError, match="8 bits"):
        stack([encode(weight, pattern), packed])


@settings(max_examples=150, deadline=None)
@given(cases())
def test_the_scale_of_a_decoded_weight_gives_it_back(case: tuple[torch.Tensor, NofM | None]) -> None:
    weight, pattern = finite(case[0]), case[1]
    packed = quantise(encode(weight, pattern))
    dense = decode(packed)
    again = quantise(encode(dense, pattern), packed.scale)
    assert torch.equal(decode(again), dense)
    assert np.array_equal(codes_of(again), codes_of(packed))


def test_the_ends_of_float32() -> None:
    """The largest number is not rounded beyond, and of denormals each is a step."""
    largest, least = torch.finfo(torch.float32).max, 2.0**-149
    weight = torch.tensor(
        [[largest, -largest, largest / 2, 0], [190 * least, -least, 100 * least, 0], [0.0, -0.0, 0, 0]]
    )
    found = quantise(encode(weight))
    dense = decode(found)
    assert dense.isfinite().all()
    assert dense[0].tolist() == pytest.approx(weight[0].tolist(), rel=0.01)
    assert found.scale is not None
    assert found.scale[1] == 2 * least
    assert dense[1].tolist() == [190 * least, 0, 100 * least, 0]
    assert found.scale[2] == 0
    assert dense[2].tolist() == [0, 0, 0, 0]
    assert not dense.signbit()[2].any()


@pytest.mark.parametrize("pattern", [NofM(2, 4), None])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_has_no_code_is_refused(pattern: NofM | None, bad: float) -> None:
    weight = torch.zeros(3, 8)
    weight[1, 2] = bad
    with pytest.raises(UsageError, match="NaN or Inf"):
        quantise(encode(weight, pattern))
    with pytest.raises(UsageError, match="already"):
        quantise(quantise(encode(torch.ones(1, 4))))


def test_five_bits_a_weight() -> None:
    weight = random_weight(64, 128, torch.bfloat16, NofM(2, 4))
    weight = finite(torch.where(bits(weight) == 0, 0, weight))
    packed = quantise(encode(weight, NofM(2, 4)))
    assert packed.n_bytes == 64 * 128 * 5 // 8 + 64 * 4
    assert sum(tensor.nbytes for tensor in to_tensors(packed).values()) == packed.n_bytes + 80


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("pattern", [NofM(2, 4), None])
def test_another_dtype_is_rounded_to_once(pattern: NofM | None, moved: bool) -> None:
    weight = finite(random_weight(6, 16, torch.bfloat16, pattern))
    perm = random_order(16) if moved else None
    packed = quantise(encode(weight if perm is None else weight[:, perm.argsort()], pattern, perm))
    assert packed.dtype == torch.bfloat16
    wide = decode(packed.to(torch.float32))
    assert not torch.equal(wide, decode(packed).float())
    for dtype in DTYPES:
        for converted in (packed.to(dtype), packed.to("cpu", dtype), packed.to(dtype).to("cpu")):
            assert (converted.dtype, converted.values.dtype) == (dtype, torch.int8)
            assert same(decode(converted), wide.to(dtype))


# --- the parts, damaged --------------------------------------------------------------------------------------------


def scale_to(number: float) -> Callable[[Tensors], None]:
    return change(SCALE, lambda t: t.index_fill(0, torch.tensor(5), number))


WRONG: list[tuple[str, Callable[[Tensors], object], str, str]] = [
    *[("int8 2:4", without(part), part, "missing") for part in (VALUES, MASK, CHECK, SCALE)],
    ("int8 moved", without(PERM), PERM, "missing"),
    ("int8 2:4", all_of(without(SCALE), fields(scale=-1)), SCALE, "missing"),
    # Values and scales of another kind.
    ("int8 2:4", change(VALUES, lambda t: t.view(torch.uint8)), VALUES, "uint8, want int8"),
    ("int8 2:4", change(VALUES, lambda t: t.bfloat16()), VALUES, "bfloat16, want int8"),
    ("int8 2:4", change(VALUES, lambda t: t.flatten()), VALUES, "shape"),
    ("int8 odd", change(VALUES, lambda t: t[None]), VALUES, "shape"),
    ("int8 2:4", change(SCALE, lambda t: t.bfloat16()), SCALE, "bfloat16 [8], want float32 [8]"),
    ("int8 2:4", change(SCALE, lambda t: t.double()), SCALE, "float64"),
    ("int8 2:4", change(SCALE, lambda t: t.view(torch.int32)), SCALE, "int32"),
    ("int8 2:4", change(SCALE, lambda t: t[:7]), SCALE, "[7]"),
    ("int8 2:4", change(SCALE, lambda t: t[:1]), SCALE, "[1]"),
    ("int8 2:4", change(SCALE, lambda t: t[:, None]), SCALE, "[8, 1]"),
    ("int8 2:4", change(SCALE, lambda t: t[0]), SCALE, "[]"),
    # A format that has no scale, or has one.
    ("2:4", lambda tensors: tensors.update({SCALE: torch.ones(8)}), SCALE, "format 1 knows none"),
    ("2:4", change(VALUES, lambda t: t.to(torch.int8)), VALUES, "int8"),
    ("2:4", change(CHECK, lambda t: torch.cat((t, t[:2]))), CHECK, "10 numbers is of format 1"),
    ("int8 2:4", change(CHECK, lambda t: t[:8]), CHECK, "8 numbers is of format 2"),
    ("int8 2:4", change(CHECK, lambda t: t[:9]), CHECK, "[9]"),
    ("int8 2:4", all_of(change(CHECK, lambda t: t[:8]), fields(version=1)), VALUES, "int8"),
    *[("int8 2:4", fields(version=version), CHECK, f"format {version}") for version in (1, 3, 0, -1)],
    *[("int8 2:4", fields(dtype=number), CHECK, f"dtype {number}") for number in (0, 4, -1, 2**40)],
    ("int8 2:4", fields(dtype=2), VALUES, "checksum"),
    # Other bytes.
    ("int8 2:4", flip(VALUES), VALUES, "checksum"),
    ("int8 2:4", flip(SCALE), SCALE, "checksum"),
    ("int8 2:4", change(SCALE, lambda t: t.roll(1)), SCALE, "checksum"),
    ("int8 2:4", fields(scale=5), SCALE, "checksum"),
    ("int8 2:4", fields(scale=-1), SCALE, "checksum"),
    # Checksums that somebody made to fit.
    ("int8 2:4", all_of(change(VALUES, lambda t: t.clone().fill_(-128)), forge), VALUES, "-128"),
    ("int8 odd", all_of(change(VALUES, lambda t: t.index_fill(0, torch.tensor(3), -128)), forge), VALUES, "-128"),
    *[("int8 2:4", all_of(scale_to(number), forge), SCALE, "negative or not finite")
      for number in (-1.0, -0.0, torch.nan, torch.inf)],
    ("int8 2:4", all_of(flip(MASK), forge), MASK, "2:4 in every group"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "edit", "part", "words"), WRONG)
def test_what_is_wrong_is_named(kind: str, edit: Callable[[Tensors], object], part: str, words: str) -> None:
    tensors = stored(kind)
    from_tensors("layer.up", tensors)
    edit(tensors)
    with pytest.raises(ModelError) as refused:
        from_tensors("layer.up", tensors, where="a/model.safetensors")
    message = str(refused.value)
    assert message.startswith(f"a/model.safetensors: tensor layer.up.{part} ")
    assert words in message
    assert "\n" not in message
    assert message.endswith("download or export the model again")


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_complete_with_its_scale(kind: str) -> None:
    tensors = stored(kind)
    assert is_complete(tensors)
    assert tensors[CHECK].shape == (10,)
    for part in tensors:
        assert not is_complete({name: tensor for name, tensor in tensors.items() if name != part})


def test_a_weight_without_a_scale_is_stored_as_before() -> None:
    """Byte for byte, so that older versions read it."""
    tensors = to_tensors(encode(torch.tensor([[1.0, 0, 0, -2]]), NofM(2, 4)))
    assert list(tensors) == [VALUES, MASK, CHECK]
    assert tensors[VALUES].numpy().tobytes() == struct.pack("<2f", 1, -2)
    # CRC-32 of both tensors after "sparsify 1 1 4 2 4 F32".
    assert tensors[CHECK].tolist() == [1, 1, 4, 2, 4, 376348653, 3209112338, -1]


# --- shared out, and multiplied by ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [NofM(2, 4), NofM(4, 8), None])
@pytest.mark.parametrize("moved", [False, True])
def test_ranks_scale_their_own_rows_and_columns(pattern: NofM | None, moved: bool) -> None:
    perm = random_order(48) if moved else None
    weight = finite(random_weight(24, 48, torch.float32, pattern))
    packed = quantise(encode(weight if perm is None else weight[:, perm.argsort()], pattern, perm))
    # The runtime's dtype is another one than the checkpoint's.
    dense, parts = decode(packed.to(torch.bfloat16)), to_tensors(packed)
    for rank in range(4):
        for width, expected in ((48, dense[6 * rank : 6 * rank + 6]), (12, dense[:, 12 * rank : 12 * rank + 12])):
            n_rows = len(expected)
            shards = Shards(cut([n_rows], [24], rank, 4, n_in=width), lambda key: [0])
            for part in reversed(parts):
                shards.add(part, parts[part])
            found = shards.finish()
            assert isinstance(found, Packed) == (perm is None or width == 48)
            assert same(decode(found) if isinstance(found, Packed) else found, expected)
            assert not isinstance(found, Packed) or found.values.dtype == torch.int8


def test_weights_in_floats_and_in_8_bits_are_fused_dense() -> None:
    weight = finite(random_weight(8, 48, torch.bfloat16, NofM(2, 4)))
    plain = encode(weight, NofM(2, 4))
    scaled = quantise(plain)
    for stored_parts, note in ((([plain, scaled]), True), (([scaled, scaled]), False)):
        shards = Shards(cut([8, 8], [8, 8], 0, 1), place)
        for key, packed in enumerate(stored_parts):
            for part, tensor in to_tensors(packed).items():
                shards.add(part, tensor, key)
        found = shards.finish()
        assert isinstance(found, torch.Tensor) == note
        assert shards.notes == (["some of the weights fused into it are stored in 8 bits"] if note else [])
        dense = found if isinstance(found, torch.Tensor) else decode(found)
        assert same(dense, torch.cat([decode(packed) for packed in stored_parts]))


@pytest.mark.parametrize("pattern", [NofM(2, 4), NofM(3, 7), None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("moved", [False, True])
def test_the_packed_kernel_scales_what_it_expands(
    pattern: NofM | None, dtype: torch.dtype, moved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_in = 56 if pattern else 61
    weight = finite(random_weight(24, n_in, torch.bfloat16, pattern))
    perm = random_order(n_in) if moved else None
    packed = quantise(encode(weight if perm is None else weight[:, perm.argsort()], pattern, perm))
    x, bias = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype) for shape in ((3, n_in), (24,)))
    for step, n_starts in ((24, 2), (7, 5)):
        monkeypatch.setattr("sparsify.kernels.packed_reference._SLICE", step * n_in)
        state = PACKED.prepare(packed)
        assert state.n_bytes == packed.n_bytes + 8 * n_starts
        found = PACKED.linear(x, state.tensors, state.sizes, bias)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(found, linear(x, decode(packed.to(dtype)), bias), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("pattern", [NofM(2, 4), None])
def test_the_operator_with_a_scale_is_what_torch_asks_of_one(pattern: NofM | None) -> None:
    state = PACKED.prepare(quantise(encode(finite(random_weight(24, 64, torch.float32, pattern)), pattern)))
    weight = operands(state.tensors, state.sizes, None, "packed")
    assert weight.scale is not None
    starts = native.row_starts(weight.mask)[[0, 7, 14, 21, 24]]
    torch.library.opcheck(
        torch.ops.sparsify.linear.default, (torch.randn(5, 64), *weight._replace(starts=starts, step=7))
    )


def test_what_rounds_to_0_stays_kept() -> None:
    weight = torch.tensor([[100.0, 0.1, 0, 0]])
    for pattern in (NofM(2, 4), None):
        found = quantise(encode(weight, pattern))
        assert found.values.flatten().tolist() == [127, 0]
        assert found.mask.tolist() == [[3]]
        assert fits(decode(found), NofM(1, 4))

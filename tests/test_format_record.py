"""The tensors of a packed weight: what is stored, and what must not be believed."""

import zlib
from collections.abc import Callable

import pytest
import torch

from sparsify.errors import ModelError
from sparsify.format.bits import unpack_bits
from sparsify.format.packed import decode, encode, quantise
from sparsify.format.record import CHECK, MASK, PERM, SCALE, VALUES, from_tensors, is_complete, to_tensors
from sparsify.types import NofM, parse_pattern
from tests.test_format import NAMES, PATTERNS, Tensors, bits, random_order, random_weight


def finite(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` with ordinary numbers where it has values."""
    values = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return torch.where(bits(weight) != 0, values, 0.0).to(weight.dtype)


def stored(kind: str) -> Tensors:
    """The parts of a weight with a pattern, without one, of an odd width, or in another order; no two bytes shared.

    The same with values in 8 bits where ``kind`` begins with ``int8``.
    """
    weight, pattern, perm = {
        "2:4": (random_weight(8, 16, torch.bfloat16, NofM(2, 4), 1), NofM(2, 4), None),
        "3:7": (random_weight(4, 14, torch.float16, NofM(3, 7), 2), NofM(3, 7), None),
        "odd": (random_weight(3, 13, torch.float32, None, 3), None, None),
        "moved": (random_weight(8, 16, torch.bfloat16, NofM(2, 4), 4), NofM(2, 4), random_order(16, 4)),
    }[kind.removeprefix("int8 ")]
    quantised = kind.startswith("int8 ")
    weight = finite(weight) if quantised else weight
    packed = encode(weight if perm is None else weight[:, perm.argsort()], pattern, perm)
    packed = quantise(packed) if quantised else packed
    return {part: tensor.clone() for part, tensor in to_tensors(packed).items()}


def forge(tensors: Tensors) -> None:
    """Make the checksums right for whatever the parts hold now."""
    check = tensors[CHECK]
    wide = {1: "BF16", 2: "F16", 3: "F32"}
    dtype = NAMES[tensors[VALUES].dtype] if len(check) == 8 else f"I8 {wide.get(int(check[9]))}"
    line = zlib.crc32(f"sparsify {' '.join(map(str, check[:5].tolist()))} {dtype}".encode())
    for i, part in enumerate((VALUES, MASK, PERM, SCALE), 5):
        if part in tensors:
            check[i] = zlib.crc32(tensors[part].contiguous().flatten().view(torch.uint8).numpy().tobytes(), line)


def flip(part: str, byte: int = 0, bit: int = 0) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[part].view(torch.uint8).flatten()[byte] ^= 1 << bit

    return edit


def change(part: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({part: make(tensors[part])})


def fields(**values: int) -> Callable[[Tensors], None]:
    """Other numbers in the check tensor."""
    places = ("version", "n_out", "n_in", "n", "m", "values", "mask", "perm", "scale", "dtype")

    def edit(tensors: Tensors) -> None:
        for name, value in values.items():
            tensors[CHECK][places.index(name)] = value

    return edit


def bit_to(row: int, column: int, on: bool) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        byte = int(tensors[MASK][row, column // 8]) & ~(1 << column % 8)
        tensors[MASK][row, column // 8] = byte | on << column % 8

    return edit


def all_of(*edits: Callable[[Tensors], object]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for each in edits:
            each(tensors)

    return edit


def without(part: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(part)


def of(other: str, part: str) -> Callable[[Tensors], object]:
    """The same part of another module."""
    return lambda tensors: tensors.update({part: stored(other)[part]})


WRONG: list[tuple[str, Callable[[Tensors], object], str, str]] = [
    *[("2:4", without(part), part, "missing") for part in (VALUES, MASK, CHECK)],
    ("moved", without(PERM), PERM, "missing"),
    # Another dtype.
    ("2:4", change(VALUES, lambda t: t.view(torch.int16)), VALUES, "int16"),
    ("2:4", change(VALUES, lambda t: t.double()), VALUES, "float64"),
    ("2:4", change(VALUES, lambda t: t.view(torch.float16)), VALUES, "checksum"),
    ("2:4", change(VALUES, lambda t: t.float()), VALUES, "checksum"),
    ("2:4", change(VALUES, lambda t: t.to(torch.float8_e4m3fn)), VALUES, "float8"),
    ("2:4", change(MASK, lambda t: t.view(torch.int8)), MASK, "int8"),
    ("2:4", change(MASK, lambda t: t > 0), MASK, "bool"),
    ("2:4", change(CHECK, lambda t: t.int()), CHECK, "int32"),
    ("2:4", change(CHECK, lambda t: t.double()), CHECK, "float64"),
    ("2:4", change(CHECK, lambda t: torch.full((8,), float("nan"))), CHECK, "float32"),
    ("moved", change(PERM, lambda t: t.long()), PERM, "int64"),
    ("moved", change(PERM, lambda t: t.view(torch.float32)), PERM, "float32"),
    # Another shape.
    ("2:4", change(VALUES, lambda t: t.t()), VALUES, "checksum"),
    ("2:4", change(VALUES, lambda t: t.reshape(4, 16)), VALUES, "shape"),
    ("2:4", change(VALUES, lambda t: t.flatten()), VALUES, "shape"),
    ("2:4", change(VALUES, lambda t: t[None]), VALUES, "shape"),
    ("2:4", change(VALUES, lambda t: t[:7]), VALUES, "shape"),
    ("2:4", change(VALUES, lambda t: t[0, 0]), VALUES, "shape"),
    ("odd", change(VALUES, lambda t: t[None]), VALUES, "shape"),
    ("odd", change(VALUES, lambda t: t[0]), VALUES, "shape"),
    ("odd", change(VALUES, lambda t: t[:-1]), VALUES, "checksum"),
    ("odd", change(VALUES, lambda t: torch.cat((t, t[:1]))), VALUES, "checksum"),
    ("2:4", change(MASK, lambda t: t.t()), MASK, "[2, 8]"),
    ("2:4", change(MASK, lambda t: t[:, :1]), MASK, "[8, 1]"),
    ("2:4", change(MASK, lambda t: torch.cat((t, t[:1]))), MASK, "[9, 2]"),
    ("2:4", change(MASK, lambda t: t.flatten()), MASK, "[16]"),
    ("2:4", change(CHECK, lambda t: t[:7]), CHECK, "[7]"),
    ("2:4", change(CHECK, lambda t: t[:0]), CHECK, "[0]"),
    ("2:4", change(CHECK, lambda t: torch.cat((t, t[:1]))), CHECK, "[9]"),
    ("2:4", change(CHECK, lambda t: t[None]), CHECK, "[1, 8]"),
    ("2:4", change(CHECK, lambda t: t[0]), CHECK, "[]"),
    ("moved", change(PERM, lambda t: t[:15]), PERM, "[15]"),
    ("moved", change(PERM, lambda t: t[None]), PERM, "[1, 16]"),
    # Other bytes.
    *[("2:4", flip(VALUES, byte, bit), VALUES, "checksum") for byte, bit in ((0, 0), (0, 7), (127, 7), (64, 3))],
    *[("2:4", flip(MASK, byte, bit), MASK, "checksum") for byte, bit in ((0, 0), (15, 7))],
    ("moved", flip(PERM), PERM, "checksum"),
    ("moved", change(PERM, lambda t: t.roll(1)), PERM, "checksum"),
    ("2:4", change(VALUES, torch.zeros_like), VALUES, "checksum"),
    ("2:4", change(VALUES, lambda t: t.flip(0)), VALUES, "checksum"),
    ("2:4", lambda tensors: tensors.update({PERM: torch.arange(16, dtype=torch.int32)}), PERM, "checksum"),
    ("moved", fields(perm=-1), PERM, "checksum"),
    ("moved", all_of(without(PERM), fields(perm=-2)), PERM, "missing"),
    # Parts of two modules of one shape.
    ("2:4", of("moved", VALUES), VALUES, "checksum"),
    ("2:4", of("moved", MASK), MASK, "checksum"),
    ("2:4", of("moved", CHECK), VALUES, "checksum"),
    # Another header; where checksums are made to fit it, what follows from it does not.
    *[("2:4", fields(version=version), CHECK, f"format {version}") for version in (2, 0, -1, 2**40)],
    *[("2:4", fields(n_out=size), CHECK, str(size)) for size in (0, -8, 2**31, 2**62, -(2**63))],
    *[("2:4", fields(n_in=size), CHECK, str(size)) for size in (0, -16, 2**31, 2**62, -(2**63))],
    *[("2:4", fields(n=n, m=m), CHECK, f"{n}:{m}") for n, m in
      ((4, 4), (5, 4), (0, 4), (-2, 4), (2, 0), (0, -4), (-4, -2), (1, 3), (2, 5), (2**40, 2**41))],
    ("2:4", fields(n_out=16, n_in=8), MASK, "[16, 1]"),
    ("2:4", fields(n_out=2**31 - 1), MASK, str(2**31 - 1)),
    ("2:4", fields(n_in=2**31 - 4), MASK, str(2**28)),
    ("2:4", fields(n_in=12), VALUES, "shape"),
    ("2:4", fields(n=1), VALUES, "shape"),
    ("2:4", fields(n=0, m=0), VALUES, "shape"),
    ("odd", fields(n=2, m=13), VALUES, "shape"),
    ("odd", fields(n_in=14), VALUES, "checksum"),
    ("2:4", fields(n=4, m=8), VALUES, "checksum"),
    # Checksums that somebody made to fit.
    ("2:4", all_of(fields(n=1, m=2), forge), MASK, "1:2 in every group"),
    ("2:4", all_of(flip(MASK), forge), MASK, "2:4 in every group"),
    ("2:4", all_of(change(MASK, lambda t: torch.full_like(t, 15)), forge), MASK, "2:4 in every group"),
    ("3:7", all_of(flip(MASK, 1), forge), MASK, "3:7 in every group"),
    ("3:7", all_of(flip(MASK, 1, 7), forge), MASK, "columns that the weight does not have"),
    ("odd", all_of(change(VALUES, lambda t: t[:-1]), forge), MASK, "values are stored"),
    ("odd", all_of(change(VALUES, lambda t: t[:0]), forge), MASK, "0 values are stored"),
    ("odd", all_of(bit_to(1, 15, True), forge), MASK, "columns that the weight does not have"),
    ("odd", all_of(flip(MASK), forge), MASK, "values are stored"),
    ("odd", all_of(fields(n_in=9), forge), MASK, "columns that the weight does not have"),
    ("moved", all_of(change(PERM, lambda t: t.clone().fill_(3)), forge), PERM, "not a permutation"),
    ("moved", all_of(change(PERM, lambda t: t + 1), forge), PERM, "not a permutation"),
    ("moved", all_of(change(PERM, lambda t: t - 16), forge), PERM, "not a permutation"),
    ("moved", all_of(change(PERM, lambda t: t * 2**27), forge), PERM, "not a permutation"),
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


def test_forged_checksums_are_what_an_encoder_writes() -> None:
    for kind in ("2:4", "3:7", "odd", "moved", "int8 2:4", "int8 odd", "int8 moved"):
        tensors = stored(kind)
        tensors[CHECK][5:7] = 0
        tensors[CHECK][8:9] = 0
        forge(tensors)
        assert torch.equal(tensors[CHECK], stored(kind)[CHECK])


def test_a_bit_that_moves_within_its_group_is_noticed_by_the_checksum_alone() -> None:
    tensors = stored("odd")
    keep = unpack_bits(tensors[MASK], 13)
    on, off = keep[0].nonzero()[0].item(), (~keep[0]).nonzero()[0].item()
    all_of(bit_to(0, int(on), False), bit_to(0, int(off), True))(tensors)
    with pytest.raises(ModelError, match=r"weight_mask differs from its checksum"):
        from_tensors("m", tensors)
    forge(tensors)
    moved = decode(from_tensors("m", tensors))
    assert bits(moved)[0, int(on)] == 0
    assert bits(moved)[0, int(off)] != 0


def test_parts_of_a_weight_that_is_all_zero() -> None:
    tensors = to_tensors(encode(torch.zeros(3, 5)))
    assert tensors[VALUES].shape == (0,)
    for other in (fields(n_in=6), fields(n_out=4), fields(values=0), fields(mask=-1)):
        wrong = {part: tensor.clone() for part, tensor in tensors.items()}
        other(wrong)
        with pytest.raises(ModelError, match=r"tensor m\."):
            from_tensors("m", wrong)


def test_a_weight_is_complete_when_every_part_of_it_is_there() -> None:
    tensors = stored("2:4")
    assert is_complete(tensors)
    for part in (VALUES, MASK, CHECK):
        assert not is_complete({name: tensor for name, tensor in tensors.items() if name != part})
    moved = stored("moved")
    assert is_complete(moved)
    assert not is_complete({name: tensor for name, tensor in moved.items() if name != PERM})
    # Nothing more can arrive for these; reading them says what is wrong.
    for check in (tensors[CHECK][:3], torch.full((8,), float("nan")), torch.zeros(8, dtype=torch.complex64)):
        assert is_complete({**tensors, CHECK: check})
        with pytest.raises(ModelError, match=r"tensor m\.weight_check is"):
            from_tensors("m", {**tensors, CHECK: check})


def test_patterns_read_as_they_are_written() -> None:
    for pattern in PATTERNS:
        weight = random_weight(2, 2 * pattern.m, torch.float32, pattern)
        tensors = to_tensors(encode(weight, pattern))
        assert tensors[CHECK][3:5].tolist() == [pattern.n, pattern.m]
        assert from_tensors("m", tensors).pattern == parse_pattern(str(pattern)) == pattern

"""The parts of a packed weight, damaged in ten thousand ways."""

import random
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from safetensors.torch import save

from sparsify.errors import ModelError
from sparsify.format.packed import decode
from sparsify.format.record import CHECK, PERM, from_tensors, is_complete
from tests.test_format import Tensors, bits, read_by_another, same
from tests.test_format_record import fields, forge, stored

T = TypeVar("T")

KINDS = ["2:4", "3:7", "odd", "moved", "int8 2:4", "int8 odd", "int8 moved"]
DTYPES = [
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.bool, torch.int16,
    torch.uint16, torch.int32, torch.int64, torch.uint64, torch.float8_e4m3fn, torch.complex64,
]  # fmt: skip
FIELDS = ["version", "n_out", "n_in", "n", "m", "values", "mask", "perm", "scale", "dtype"]
NUMBERS = [0, 1, 2, 3, 4, 7, 8, 12, 13, 14, 15, 16, 32, -1, -2, 2**16, 2**31 - 1, 2**31, 2**32, 2**62, -(2**63)]


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes, copied."""
    return tensor.contiguous().flatten().view(torch.uint8).clone()


def shape_of(n: int, rng: random.Random) -> list[int]:
    """A random shape of ``n`` values."""
    shape = [n]
    for _ in range(rng.randrange(3)):
        factor = rng.choice([k for k in range(1, shape[-1] + 1) if shape[-1] % k == 0] or [1])
        shape[-1:] = [factor, shape[-1] // factor]
    return shape


def flip_bits(tensors: Tensors, part: str, rng: random.Random) -> None:
    data = raw(tensors[part])
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        if len(data):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    tensors[part] = data.view(tensors[part].dtype).view(tensors[part].shape)


def overwrite(tensors: Tensors, part: str, rng: random.Random) -> None:
    data = raw(tensors[part])
    start = rng.randrange(len(data) + 1)
    length = rng.randrange(len(data) - start + 1)
    data[start : start + length] = torch.tensor(list(rng.randbytes(length)), dtype=torch.uint8)
    tensors[part] = data.view(tensors[part].dtype).view(tensors[part].shape)


def reinterpret(tensors: Tensors, part: str, rng: random.Random) -> None:
    data = raw(tensors[part])
    values = data.view(rng.choice([dtype for dtype in DTYPES if len(data) % dtype.itemsize == 0]))
    tensors[part] = values.view(shape_of(len(values), rng))


def reshape(tensors: Tensors, part: str, rng: random.Random) -> None:
    tensor = tensors[part]
    tensors[part] = (
        tensor.mT if tensor.dim() > 1 and rng.random() < 0.5 else tensor.reshape(shape_of(tensor.numel(), rng))
    )


def convert(tensors: Tensors, part: str, rng: random.Random) -> None:
    if not tensors[part].is_complex():
        tensors[part] = tensors[part].to(rng.choice(DTYPES))


def resize(tensors: Tensors, part: str, rng: random.Random) -> None:
    tensor = tensors[part] if tensors[part].dim() else tensors[part][None]
    start = rng.randrange(len(tensor) + 1)
    tensors[part] = rng.choice((tensor[start:], tensor[:start], torch.cat((tensor, tensor[start:]))))


def shuffle(tensors: Tensors, part: str, rng: random.Random) -> None:
    tensor = tensors[part]
    if tensor.dim() and len(tensor):
        order = rng.sample(range(len(tensor)), len(tensor))
        tensors[part] = tensor[order]


def drop(tensors: Tensors, part: str, rng: random.Random) -> None:
    tensors.pop(part)


def borrow(tensors: Tensors, part: str, rng: random.Random) -> None:
    other = stored(rng.choice(KINDS))
    name = rng.choice(list(other))
    tensors[rng.choice((part, name))] = other[name]


def count_otherwise(tensors: Tensors, part: str, rng: random.Random) -> None:
    check = tensors.get(CHECK)
    if check is not None and check.shape in ((8,), (10,)) and check.dtype == torch.int64:
        fields(**{rng.choice(FIELDS[: len(check)]): rng.choice(NUMBERS)})(tensors)


MUTATIONS = [
    flip_bits, overwrite, reinterpret, reshape, convert, resize, shuffle, drop, borrow, count_otherwise
]  # fmt: skip


def equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        (tensor.dtype, tensor.shape) == (other[part].dtype, other[part].shape)
        and torch.equal(raw(tensor), raw(other[part]))
        for part, tensor in one.items()
    )


def attempt(read: Callable[[], T]) -> tuple[T | None, str]:
    """What was read, or why nothing was; nothing but a ``ModelError`` may come out of a reader."""
    try:
        return read(), ""
    except ModelError as error:
        return None, str(error)


def test_mutated_parts_are_refused_by_name_or_are_the_weight() -> None:
    rng = random.Random(0)
    originals = {kind: stored(kind) for kind in KINDS}
    weights = {kind: decode(from_tensors(kind, tensors)) for kind, tensors in originals.items()}
    refused = accepted = 0
    for _ in range(10_000):
        kind = rng.choice(KINDS)
        tensors = {part: tensor.clone() for part, tensor in originals[kind].items()}
        for mutate in rng.choices(MUTATIONS, k=rng.choice((1, 1, 1, 2, 3))):
            mutate(tensors, rng.choice(list(tensors)), rng)
        is_complete(tensors)
        packed, problem = attempt(partial(from_tensors, f"layer.{kind}", tensors, where="file"))
        assert (packed is not None) == equal(tensors, originals[kind])
        if packed is not None:
            assert same(decode(packed), weights[kind])
            accepted += 1
        else:
            assert problem.startswith(f"file: tensor layer.{kind}.weight")
            assert "\n" not in problem
            refused += 1
    assert refused + accepted >= 10_000
    assert refused > 8000
    assert accepted > 100


def test_forged_parts_are_refused_or_mean_to_others_what_they_mean_to_us() -> None:
    rng = random.Random(1)
    refused = accepted = 0
    for _ in range(3000):
        tensors = stored(rng.choice(KINDS))
        edits = (flip_bits, overwrite, resize, shuffle, reshape, count_otherwise)
        for mutate in rng.choices(edits, k=rng.choice((1, 2))):
            mutate(tensors, rng.choice([part for part in tensors if part != CHECK]), rng)
        forge(tensors)
        packed, problem = attempt(partial(from_tensors, "m", tensors))
        if packed is not None:
            file = save({f"m.{part}": tensor.contiguous() for part, tensor in tensors.items()})
            weight = bits(decode(packed)).numpy()
            assert np.array_equal(read_by_another(file, "m"), weight.view(f"u{weight.itemsize}"))
            accepted += 1
        else:
            assert "tensor m.weight" in problem
            # A header is checked with the parts it is about.
            assert "checksum" not in problem or PERM in problem
            refused += 1
    assert refused > 1000
    assert accepted > 300

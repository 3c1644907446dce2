"""Compressed checkpoints on disk: damaged files, and the entry of config.json."""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsify.checkpoint import INDEX, open_shard, read_config
from sparsify.errors import ModelError
from sparsify.format.packed import encode, quantise
from sparsify.format.reader import CompressedReader, open_checkpoint
from sparsify.format.record import CHECK, MASK, PERM, SCALE, VALUES, to_tensors
from sparsify.format.storage import Storage, read_storage
from sparsify.types import NofM
from tests.test_format import Tensors, random_order, random_weight, same
from tests.test_format_parts import attempt, shape_of


def of_codes() -> torch.Tensor:
    """2:4 with a largest value of 127 / 128 in each row: rounded to 8 bits it is what it was."""
    codes = torch.randint(-126, 127, (4, 12), generator=torch.Generator().manual_seed(5))
    codes[:, ::2] = 0
    codes[:, 1] = 127
    return (codes / 128).to(torch.bfloat16)


# Two of one shape and pattern, whose parts could be taken for each other.
TINY = {
    "layers.0.up": (random_weight(4, 8, torch.bfloat16, NofM(2, 4), 1), NofM(2, 4), None),
    "layers.0.gate": (random_weight(4, 8, torch.bfloat16, NofM(2, 4), 2), NofM(2, 4), None),
    "layers.0.down": (random_weight(3, 13, torch.float16, None, 3), None, None),
    "layers.1.up": (
        random_weight(4, 16, torch.float32, NofM(4, 8), 4)[:, random_order(16).argsort()], NofM(4, 8), random_order(16)
    ),
    "layers.1.int8": (of_codes(), NofM(2, 4), None),
}  # fmt: skip
ENTRY_DTYPES = [
    "BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16", "BF16",
    "I32", "U32", "F32", "C64", "F64", "I64", "U64", "F128", "", "bf16",
]  # fmt: skip
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "F8_E8M0": 8, "BF16": 16, "C64": 64, "F64": 64, "U64": 64}


def write_tiny(folder: Path, shards: int = 1) -> Path:
    """A compressed checkpoint of four weights and what is not packed; the tensors of a weight may be in two files."""
    folder.mkdir()
    tensors = {"norm.weight": torch.ones(5, dtype=torch.bfloat16), "embed.weight": torch.arange(24.0).view(6, 4)}
    for module, (weight, pattern, perm) in TINY.items():
        packed = encode(weight, pattern, perm)
        parts = to_tensors(quantise(packed) if module.endswith("int8") else packed)
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    config = {"model_type": "tiny", "quantization_config": Storage(("embed",), int8=True).to_dict()}
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    for i in range(shards):
        save_file({name: tensors[name] for name in names[i::shards]}, folder / f"{i}.safetensors")
    weight_map = {name: f"{i}.safetensors" for i in range(shards) for name in names[i::shards]}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def read_all(folder: Path) -> Tensors:
    reader = open_checkpoint(folder)
    found = dict(reader.read(reader.tensors))
    assert found.keys() == reader.tensors.keys()
    for name, info in reader.tensors.items():
        # Two values of four bits are one of torch's.
        assert info.shape == found[name].shape or info.dtype == "F4"
    return found


def assert_same_tensors(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same(found[name], tensor), name


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def join(header: str, body: bytes) -> bytes:
    text = header.encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def file_flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def file_flip_values(data: bytes, rng: random.Random) -> bytes:
    """Where the header is whole, so that the tensors themselves are reached."""
    _, body = split(data)
    return data[: len(data) - len(body)] + file_flip(body, rng)


def file_truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice((rng.randrange(len(data)), rng.randrange(16), len(data) - rng.randrange(1, 16)))]


def file_resize(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    length = rng.choice((1, 2, 7, 8, 64))
    return rng.choice(
        (
            data[:start] + rng.randbytes(length) + data[start:],
            data[:start] + data[start + length :],
            data + bytes(length),
        )
    )


def file_header_length(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    other = rng.choice((0, 1, length - 1, length + 1, length + 8, len(data), 100_000_000, 2**31, 2**63, 2**64 - 1))
    return other.to_bytes(8, "little") + data[8:]


def file_region(data: bytes, rng: random.Random) -> bytes:
    start, length = rng.randrange(len(data)), rng.choice((1, 4, 16, 64))
    filler = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    return (data[:start] + filler + data[start + length :])[: len(data)]


def file_entry(data: bytes, rng: random.Random) -> bytes:
    """One entry of the header: dtype, shape or offsets."""
    header, body = split(data)
    entry = header[rng.choice(list(header))]
    first, last = entry["data_offsets"]
    shift = rng.choice((-8, -4, -2, -1, 1, 2, 4, 8))
    match rng.choice(("dtype", "shape", "whole", "offsets", "key")):
        case "dtype":
            entry["dtype"] = rng.choice(ENTRY_DTYPES)
        case "shape":
            n = max(1, int(np.prod(entry["shape"])))
            odd = [
                [],
                [0],
                [-1],
                [2**63],
                [2**64],
                [2**40, 2**40],
                entry["shape"][::-1],
                [*entry["shape"], 1],
                "8",
                None,
            ]
            entry["shape"] = rng.choice(
                [*odd, shape_of(n, rng), shape_of(n, rng), shape_of(n, rng), shape_of(n + 1, rng)]
            )
        case "whole":
            # Consistent: only a reader of the format can object.
            entry["dtype"] = rng.choice(ENTRY_DTYPES)
            size = BITS.get(entry["dtype"]) or int("".join(filter(str.isdigit, entry["dtype"][:3]))[:2] or 8)
            entry["shape"] = shape_of((last - first) * 8 // size, rng)
        case "offsets":
            entry["data_offsets"] = rng.choice(
                ([first + shift, last + shift], [first, last + shift], [last, first], [0, last], [first, 2**64 - 1],
                 [first + shift, last], [-1, last], [2**63, 2**63 + 8], [first], None, [0, len(body)])
            )  # fmt: skip
        case "key":
            del entry[rng.choice(list(entry))]
    return join(json.dumps(header), body)


def file_names(data: bytes, rng: random.Random) -> bytes:
    """Names and entries of the header: another name, two that change places, one that is gone or there twice."""
    header, body = split(data)
    name, other = rng.sample(list(header), 2)
    module = name.rpartition(".")[0]
    new = rng.choice(
        (other, f"{module}.{rng.choice((VALUES, MASK, CHECK, PERM, SCALE))}", f"{name}x", "", "ü\u0000", "weight")
    )
    match rng.choice(("rename", "swap names", "swap offsets", "remove", "copy", "twice")):
        case "rename":
            header[new] = header.pop(name)
        case "swap names":
            header[name], header[other] = header[other], header[name]
        case "swap offsets":
            header[name]["data_offsets"], header[other]["data_offsets"] = (
                header[other]["data_offsets"], header[name]["data_offsets"],
            )  # fmt: skip
        case "remove":
            del header[name]
        case "copy":
            header[new] = header[name]
        case "twice":
            text = json.dumps(header)
            return join(f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[other])}}}", body)
    return join(json.dumps(header), body)


def file_swap_alike(data: bytes, rng: random.Random) -> bytes:
    """The parts of two weights of one shape change places."""
    header, body = split(data)
    part = rng.choice((VALUES, MASK, CHECK))
    one, other = (f"layers.0.{name}.{part}" for name in ("up", "gate"))
    if one in header and other in header:
        header[one], header[other] = header[other], header[one]
    return join(json.dumps(header), body)


FILE_MUTATIONS = [
    file_flip, file_flip_values, file_truncate, file_resize, file_header_length, file_region, file_entry, file_entry,
    file_names, file_names, file_swap_alike,
]  # fmt: skip


@pytest.mark.parametrize(("shards", "n_cases"), [(1, 8000), (2, 3000)])
def test_mutated_files_are_refused_or_hold_the_weights(shards: int, n_cases: int, tmp_path: Path) -> None:
    rng = random.Random(shards)
    folder = write_tiny(tmp_path / "model", shards)
    shard = sorted(folder.glob("*.safetensors"))[-1]
    original = shard.read_bytes()
    refused = accepted = 0
    for _ in range(n_cases):
        shard.write_bytes(rng.choice(FILE_MUTATIONS)(original, rng))
        found, problem = attempt(partial(read_all, folder))
        if found is not None:
            # Bytes outside the packed weights have no checksum.
            for module, (weight, _, _) in TINY.items():
                assert same(found[f"{module}.weight"], weight)
            accepted += 1
        else:
            assert str(folder) in problem
            assert "\n" not in problem
            refused += 1
        shard.unlink()
    assert refused + accepted >= n_cases
    assert refused > 0.7 * n_cases
    assert accepted > 0.01 * n_cases


def test_tensors_of_a_weight_may_lie_in_two_files(tmp_path: Path) -> None:
    one, two = write_tiny(tmp_path / "one"), write_tiny(tmp_path / "two", 2)
    assert_same_tensors(read_all(two), read_all(one))
    assert len(open_checkpoint(two).files) == 2


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_file_of_many_weights_is_opened_once(shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_checkpoint(write_tiny(tmp_path / "model", shards))
    opened: list[Path] = []

    def counted(file: Path) -> Any:
        opened.append(file)
        return open_shard(file)

    monkeypatch.setattr("sparsify.checkpoint.open_shard", counted)
    names = sorted(reader.tensors, reverse=True)
    found = list(reader.read([*names, *names]))
    assert sorted(name for name, _ in found) == names[::-1]
    assert len(opened) == len(set(opened)) == shards
    for module, (weight, _, _) in TINY.items():
        assert same(dict(found)[f"{module}.weight"], weight)
        [(name, alone)] = reader.read([f"{module}.weight"])
        assert (name, same(alone, weight)) == (f"{module}.weight", True)


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "BOOL", "U64", "C64", "F64"])
@pytest.mark.parametrize("part", [CHECK, MASK, VALUES])
def test_parts_of_dtypes_that_torch_cannot_calculate_with(part: str, dtype: str, tmp_path: Path) -> None:
    shard = write_tiny(tmp_path / "model") / "model.safetensors"
    header, body = split(shard.read_bytes())
    entry = header[f"layers.1.up.{part}"]
    first, last = entry["data_offsets"]
    entry["dtype"], entry["shape"] = dtype, [(last - first) * 8 // BITS[dtype]]
    shard.write_bytes(join(json.dumps(header), body))
    with pytest.raises(ModelError, match=rf"model\.safetensors: tensor layers\.1\.up\.{part} "):
        read_all(tmp_path / "model")


def rename(old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[new] = tensors.pop(old)
        save_file(tensors, folder / "model.safetensors")

    return edit


@pytest.mark.parametrize(
    ("module", "part", "named", "words"),
    [
        ("up", CHECK, f"{MASK}|{PERM}", f"has no {CHECK} beside it"),
        ("up", MASK, MASK, "is missing"),
        ("up", VALUES, VALUES, "is missing"),
        ("up", PERM, PERM, "is missing"),
        ("int8", SCALE, SCALE, "is missing"),
        ("int8", CHECK, f"{MASK}|{SCALE}", f"has no {CHECK} beside it"),
    ],
)
def test_parts_under_another_name_are_missed(module: str, part: str, named: str, words: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model")
    rename(f"layers.1.{module}.{part}", f"layers.1.{module}.other_{part}")(folder)
    with pytest.raises(ModelError, match=rf"model\.safetensors: tensor layers\.1\.{module}\.({named}) {words}"):
        read_all(folder)


FORMATS: list[Any] = [3, 0, -1, True, "1", None, 1.5, [1], {}, ...]
IGNORES: list[Any] = ["lm_head", None, 1, {"lm_head": 1}, [1], ["lm_head", None], True]


@pytest.mark.parametrize(
    ("change", "key"), [({key: v}, key) for key, values in (("format", FORMATS), ("ignore", IGNORES)) for v in values]
)
def test_malformed_storage_is_refused_by_key(change: dict[str, Any], key: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model")
    config = read_config(folder)
    entry = {**config["quantization_config"], **change}
    config["quantization_config"] = {name: value for name, value in entry.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    _, problem = attempt(partial(open_checkpoint, folder))
    assert problem.startswith(f"{folder / 'config.json'}: key quantization_config.{key} is ")
    assert "\n" not in problem


def test_a_checkpoint_from_which_tensors_are_gone(tmp_path: Path) -> None:
    """Nothing else tells that a tensor which is not packed should be there."""
    folder = write_tiny(tmp_path / "model")
    config = read_config(folder)
    digest = CompressedReader(folder).digest
    config["quantization_config"]["digest"] = digest
    (folder / "config.json").write_text(json.dumps(config))
    whole = read_all(folder)
    tensors = load_file(folder / "model.safetensors")
    gone = {name: tensor for name, tensor in tensors.items() if name != "norm.weight"}
    wider = {**tensors, "norm.weight": torch.ones(6, dtype=torch.bfloat16)}
    other = {**tensors, "norm.weight": torch.ones(5, dtype=torch.float16)}
    for changed in (gone, wider, other, {**tensors, "more": torch.ones(1)}):
        save_file(changed, folder / "model.safetensors")
        _, problem = attempt(partial(open_checkpoint, folder))
        assert problem.startswith(f"{folder / 'config.json'}: key quantization_config.digest does not belong")
    save_file(tensors, folder / "model.safetensors")
    assert_same_tensors(read_all(folder), whole)
    for value in (None, 7, ["x"]):
        config["quantization_config"]["digest"] = value
        (folder / "config.json").write_text(json.dumps(config))
        assert "key quantization_config.digest is not a string" in attempt(partial(open_checkpoint, folder))[1]
    config["quantization_config"]["digest"] = digest[::-1]
    (folder / "config.json").write_text(json.dumps(config))
    assert "digest does not belong" in attempt(partial(open_checkpoint, folder))[1]


def test_storage_reads_what_it_writes_and_leaves_others_alone() -> None:
    named = Storage(("lm_head", "model.layers.0.mlp.gate"))
    for storage in (Storage(), named, Storage(digest="9f"), Storage(int8=True)):
        assert read_storage(json.loads(json.dumps(storage.to_dict()))) == storage
    assert read_storage({"quant_method": "sparsify", "format": 1}) == Storage()
    assert read_storage({"quant_method": "sparsify", "format": 2}) == Storage(int8=True)
    others: list[Any] = [
        None,
        [],
        "sparsify",
        {},
        {"quant_method": "gptq"},
        {"format": 1},
        {"quant_method": ["sparsify"]},
    ]
    for other in others:
        assert read_storage(other) is None

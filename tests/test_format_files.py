"""Compressed checkpoints: written from pruned models, read like any other, and damaged in ten thousand ways."""

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from sparsify import manifest
from sparsify.checkpoint import INDEX, CheckpointReader, open_shard, read_config, read_permutations, write_permutations
from sparsify.errors import ModelError, UsageError
from sparsify.exporters.vllm_compressed import export_compressed
from sparsify.format.packed import decode, encode
from sparsify.format.reader import CompressedReader, open_checkpoint
from sparsify.format.record import CHECK, MASK, PERM, VALUES, from_tensors, is_complete, to_tensors
from sparsify.format.storage import Storage, read_storage
from sparsify.naming import linear_weights
from sparsify.pipeline import export
from sparsify.recipe import Recipe
from sparsify.types import NofM
from sparsify.verify import verify
from tests.conftest import CONFIGS, Run, refuse, save_random_model
from tests.coupled import run
from tests.test_format import Tensors, bits, fields, forge, random_order, random_weight, read_by_another, same, stored

T = TypeVar("T")

# --- mutations of the parts ------------------------------------------------------------------------------------------

KINDS = ["2:4", "3:7", "odd", "moved"]
DTYPES = [
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.bool, torch.int16,
    torch.uint16, torch.int32, torch.int64, torch.uint64, torch.float8_e4m3fn, torch.complex64,
]  # fmt: skip
FIELDS = ["version", "n_out", "n_in", "n", "m", "values", "mask", "perm"]
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
    if check is not None and check.shape == (8,) and check.dtype == torch.int64:
        fields(**{rng.choice(FIELDS): rng.choice(NUMBERS)})(tensors)


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


# --- mutations of the file -------------------------------------------------------------------------------------------

# Two of one shape and pattern, whose parts could be taken for each other.
TINY = {
    "layers.0.up": (random_weight(4, 8, torch.bfloat16, NofM(2, 4), 1), NofM(2, 4), None),
    "layers.0.gate": (random_weight(4, 8, torch.bfloat16, NofM(2, 4), 2), NofM(2, 4), None),
    "layers.0.down": (random_weight(3, 13, torch.float16, None, 3), None, None),
    "layers.1.up": (
        random_weight(4, 16, torch.float32, NofM(4, 8), 4)[:, random_order(16).argsort()], NofM(4, 8), random_order(16)
    ),
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
        parts = to_tensors(encode(weight, pattern, perm))
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    config = {"model_type": "tiny", "quantization_config": Storage(("embed",)).to_dict()}
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
        (other, f"{module}.{rng.choice((VALUES, MASK, CHECK, PERM))}", f"{name}x", "", "ü\u0000", "weight")
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
    ("part", "named", "words"),
    [
        (CHECK, f"{MASK}|{PERM}", f"has no {CHECK} beside it"),
        (MASK, MASK, "is missing"),
        (VALUES, VALUES, "is missing"),
        (PERM, PERM, "is missing"),
    ],
)
def test_parts_under_another_name_are_missed(part: str, named: str, words: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model")
    rename(f"layers.1.up.{part}", f"layers.1.up.other_{part}")(folder)
    with pytest.raises(ModelError, match=rf"model\.safetensors: tensor layers\.1\.up\.({named}) {words}"):
        read_all(folder)


# --- quantization_config ---------------------------------------------------------------------------------------------


FORMATS: list[Any] = [2, 0, -1, True, "1", None, 1.5, [1], {}, ...]
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


def test_storage_reads_what_it_writes_and_leaves_others_alone() -> None:
    for storage in (Storage(), Storage(("lm_head", "model.layers.0.mlp.gate"))):
        assert read_storage(json.loads(json.dumps(storage.to_dict()))) == storage
    assert read_storage({"quant_method": "sparsify", "format": 1}) == Storage()
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


# --- the exporter ----------------------------------------------------------------------------------------------------

FAMILIES = ["llama", "qwen2", "phi3", "mixtral", "qwen3_moe"]
Pruned = Callable[..., Path]


@pytest.fixture(scope="module")
def pruned(random_models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    """Family, pattern and other parts of a recipe -> pruned checkpoint, made once; not to be written to."""
    root = tmp_path_factory.mktemp("pruned")
    made: dict[str, Path] = {}

    def get(family: str, pattern: str = "2:4", **options: Any) -> Path:
        recipe = Recipe(pattern, **{"method": "magnitude", **options})
        key = f"{family} {recipe}"
        if key not in made:
            made[key] = run(random_models(family), recipe, root / str(len(made)))
        return made[key]

    return get


def rewrite(folder: Path, edit: Callable[[Tensors], object], like: str) -> None:
    """Edit the tensors of the shard that holds ``like``, and make the manifest's hashes fit."""
    file = CheckpointReader(folder).tensors[like].file
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    sign(folder)


def sign(folder: Path) -> None:
    manifest.write(
        folder, {key: value for key, value in manifest.read(folder).items() if key not in ("format", "files")}
    )


def packed_modules(folder: Path) -> set[str]:
    reader = open_checkpoint(folder)
    assert isinstance(reader, CompressedReader)
    return set(reader.packed)


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
@pytest.mark.parametrize("family", FAMILIES)
def test_back_in_hf_it_is_the_plain_checkpoint(family: str, pattern: str, pruned: Pruned, tmp_path: Path) -> None:
    checkpoint = pruned(family, pattern)
    body = export(checkpoint, "vllm", tmp_path / "packed")
    plain = export(checkpoint, "vllm", tmp_path / "plain", dense=True)
    back = export(tmp_path / "packed", "hf", tmp_path / "back")
    assert_same_tensors(read_all(tmp_path / "back"), read_all(checkpoint))
    assert_same_tensors(read_all(tmp_path / "packed"), read_all(checkpoint))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    # What is stored: one tensor per linear, with experts one by one; only those are packed, and every one of them.
    linears = sum(row["shape"][0] * row["shape"][1] for row in body["linears"])
    modules = packed_modules(tmp_path / "packed")
    assert sum(read_all(checkpoint)[f"{module}.weight"].numel() for module in modules) == linears
    kind = "2:4" if pattern == "2:4" else "unstructured"
    assert body["storage"]["packed"] == {kind: len(modules)}
    assert body["storage"]["dense"] == 0
    assert body["storage"]["dense_bytes"] == 4 * linears
    sizes = {name: info.n_bytes for name, info in CheckpointReader(tmp_path / "packed").tensors.items()}
    assert body["storage"]["packed_bytes"] == sum(
        size for name, size in sizes.items() if name.removesuffix("_mask").removesuffix("_check")[:-7] in modules
    )
    assert "storage" not in plain
    assert "storage" not in back
    assert (body["kind"], plain["kind"], back["kind"]) == ("vllm", "vllm", "hf")
    assert body["linears"] == back["linears"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_lists_the_matrices_that_are_dense(family: str, pruned: Pruned, tmp_path: Path) -> None:
    checkpoint = pruned(family)
    export(checkpoint, "vllm", tmp_path / "packed")
    config = read_config(tmp_path / "packed")
    entry = config.pop("quantization_config")
    assert config == read_config(checkpoint)
    assert entry.keys() == {"quant_method", "format", "ignore", "digest"}
    assert (entry["quant_method"], entry["format"]) == ("sparsify", 1)
    names = {f"{module}.weight" for module in entry["ignore"]}
    assert len(names) == len(entry["ignore"])
    matrices = {n for n, info in open_checkpoint(checkpoint).tensors.items() if len(info.shape) == 2}
    assert names == matrices - {f"{module}.weight" for module in packed_modules(tmp_path / "packed")}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= names
    assert any("gate" in name for name in names) == (family in ("mixtral", "qwen3_moe"))


def test_it_is_inspected_like_any_artifact(pruned: Pruned, cli: Run, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    result = cli("export", pruned("llama"), "--target", "vllm", "--out", out)
    assert result.returncode == 0, result.stderr
    assert verify(out)[1] == []
    assert cli("inspect", out).returncode == 0
    name = "model.layers.1.mlp.up_proj"
    shard = out / "model.safetensors"
    data = bytearray(shard.read_bytes())
    header, body = split(bytes(data))
    for part in (VALUES, MASK):
        at = len(data) - len(body) + header[f"{name}.{part}"]["data_offsets"][0]
        data[at] ^= 4
        shard.write_bytes(data)
        assert verify(out)[1] == ["model.safetensors: content differs from the manifest"]
        assert cli("inspect", out).returncode == 8
        # And where the manifest was written over the damage.
        sign(out)
        [problem] = verify(out)[1]
        assert f"model.safetensors: tensor {name}.{part} differs from its checksum" in problem
        with pytest.raises(ModelError, match=rf"{name}\.{part} differs"):
            export(out, "hf", tmp_path / "back")
        assert not (tmp_path / "back").exists()
        data[at] ^= 4


def test_nine_sixteenths_of_a_model_in_bfloat16(tmp_path: Path) -> None:
    source = save_random_model(tmp_path / "model", CONFIGS["llama"](), dtype=torch.bfloat16)
    checkpoint = run(source, Recipe("2:4", "magnitude"), tmp_path / "pruned")
    storage = export(checkpoint, "vllm", tmp_path / "packed")["storage"]
    assert storage["packed"] == {"2:4": 14}
    assert storage["packed_bytes"] == storage["dense_bytes"] * 9 // 16 + 14 * 64
    assert_same_tensors(read_all(tmp_path / "packed"), read_all(checkpoint))


@pytest.mark.parametrize("source_is_packed", [False, True])
def test_shards_hold_whole_weights(source_is_packed: bool, pruned: Pruned, tmp_path: Path) -> None:
    checkpoint = pruned("llama")
    if source_is_packed:
        export(checkpoint, "vllm", tmp_path / "packed")
        checkpoint = tmp_path / "packed"
    out = tmp_path / "out"
    out.mkdir()
    export_compressed(checkpoint, out, manifest.read(checkpoint)["linears"], shard_bytes=8000)
    index = json.loads((out / INDEX).read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 4
    assert sorted(set(index["weight_map"].values())) == files
    assert not [path for path in out.iterdir() if path.name == "model.safetensors" or path.suffix == ".tmp"]
    stored = CheckpointReader(out).tensors
    assert index["metadata"]["total_size"] == sum(info.n_bytes for info in stored.values())
    for module in packed_modules(out):
        assert len({stored[f"{module}.{part}"].file for part in (VALUES, MASK, CHECK)}) == 1
    assert_same_tensors(read_all(out), read_all(pruned("llama")))


def test_what_would_not_become_smaller_stays_dense(pruned: Pruned, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    checkpoint = pruned("llama", overrides={name: "0.01", "model.layers.1.mlp.up_proj": "0.5"})
    storage = export(checkpoint, "vllm", tmp_path / "packed")["storage"]
    assert (storage["packed"], storage["dense"]) == ({"2:4": 12, "unstructured": 1}, 1)
    assert name in read_config(tmp_path / "packed")["quantization_config"]["ignore"]
    assert name not in packed_modules(tmp_path / "packed")
    assert_same_tensors(read_all(tmp_path / "packed"), read_all(checkpoint))
    assert verify(tmp_path / "packed")[1] == []


def test_minus_zero_where_a_weight_was_pruned_is_stored(pruned: Pruned, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    checkpoint = Path(shutil.copytree(pruned("llama"), tmp_path / "pruned"))

    def negate(tensors: Tensors) -> None:
        place = tuple((tensors[name] == 0).nonzero()[5].tolist())
        tensors[name][place] = -0.0

    rewrite(checkpoint, negate, name)
    assert verify(checkpoint)[1] == []
    storage = export(checkpoint, "vllm", tmp_path / "packed")["storage"]
    assert storage["packed"] == {"2:4": 13, "unstructured": 1}
    back = read_all(tmp_path / "packed")
    assert int((back[name].signbit() & (back[name] == 0)).sum()) == 1
    assert_same_tensors(back, read_all(checkpoint))
    assert verify(tmp_path / "packed")[1] == []


@pytest.mark.parametrize("mode", ["simulate", "gather"])
@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral", "qwen3_moe"])
def test_recorded_orders_are_carried(family: str, mode: str, pruned: Pruned, ids_file: str, tmp_path: Path) -> None:
    checkpoint = pruned(family, method="ria", permute=mode, calibration=ids_file)
    body = export(checkpoint, "vllm", tmp_path / "packed")
    modules = packed_modules(tmp_path / "packed")
    # Each expert was pruned in an order of its own.
    assert body["storage"] == {**body["storage"], "packed": {"2:4": len(modules)}, "dense": 0}
    moved = {name.removesuffix(f".{PERM}") for name in CheckpointReader(tmp_path / "packed").tensors if PERM in name}
    rows = {row["name"] for row in body["linears"] if row["permuted"] == "recorded"}
    assert len(moved) == len(rows) > 0
    if family in ("llama", "phi3"):
        assert moved == rows
    assert_same_tensors(read_all(tmp_path / "packed"), read_all(checkpoint))
    orders = read_permutations(tmp_path / "packed" / manifest.PERMUTATIONS)
    reader = open_checkpoint(tmp_path / "packed")
    assert isinstance(reader, CompressedReader)
    for module in moved:
        perm = reader.read_packed(module).perm
        assert perm is not None
        found = {name for name, order in orders.items() if torch.equal(order, perm.long())}
        assert module in found or module not in orders
        assert found
    assert verify(tmp_path / "packed")[1] == []
    export(tmp_path / "packed", "hf", tmp_path / "back")
    assert verify(tmp_path / "back")[1] == []
    assert_same_tensors(read_all(tmp_path / "back"), read_all(checkpoint))


def test_orders_that_lack_a_linear_are_refused(pruned: Pruned, ids_file: str, tmp_path: Path) -> None:
    simulated = pruned("llama", method="ria", permute="simulate", calibration=ids_file)
    checkpoint = Path(shutil.copytree(simulated, tmp_path / "pruned"))
    orders = read_permutations(checkpoint / manifest.PERMUTATIONS)
    del orders["model.layers.1.mlp.up_proj"]
    write_permutations(checkpoint / manifest.PERMUTATIONS, orders)
    sign(checkpoint)
    with pytest.raises(ModelError, match=r"sparsify\.perm: entry model\.layers\.1\.mlp\.up_proj is missing"):
        export(checkpoint, "vllm", tmp_path / "packed")


def test_experts_are_stored_in_their_own_pattern(pruned: Pruned, tmp_path: Path) -> None:
    overrides = {"*.experts.1.*": "1:4", "*.experts.2.*": "0.7", "*.experts.3.down_proj": "0.01"}
    checkpoint = pruned("mixtral", overrides=overrides)
    storage = export(checkpoint, "vllm", tmp_path / "packed")["storage"]
    attention, parts, blocks = 4, 3, 2
    assert storage["packed"] == {
        "1:4": parts * blocks, "2:4": (attention + parts + parts - 1) * blocks, "unstructured": parts * blocks
    }  # fmt: skip
    assert storage["dense"] == blocks
    assert_same_tensors(read_all(tmp_path / "packed"), read_all(checkpoint))
    assert verify(tmp_path / "packed")[1] == []


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bloom"])
def test_families_whose_loader_is_not_known_are_refused(family: str, pruned: Pruned, tmp_path: Path) -> None:
    checkpoint = pruned(family)
    with pytest.raises(ModelError, match=rf"config\.json.*'{family}'.*--dense"):
        export(checkpoint, "vllm", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    export(checkpoint, "vllm", tmp_path / "out", dense=True)
    assert_same_tensors(read_all(tmp_path / "out"), read_all(checkpoint))
    assert "quantization_config" not in read_config(tmp_path / "out")
    assert verify(tmp_path / "out")[1] == []


def test_dense_is_about_vllm_only(pruned: Pruned, cli: Run, tmp_path: Path) -> None:
    checkpoint, out = pruned("llama"), tmp_path / "out"
    with pytest.raises(UsageError, match="--dense is about target vllm"):
        export(checkpoint, "hf", out, dense=True)
    refuse(cli("export", checkpoint, "--target", "hf", "--dense", "--out", out), 2, "--dense", "hf")
    assert cli("export", checkpoint, "--target", "vllm", "--dense", "--out", out).returncode == 0
    assert "quantization_config" not in read_config(out)
    pytest.importorskip("onnx")
    refuse(cli("export", checkpoint, "--target", "onnx", "--dense", "--out", tmp_path / "onnx"), 2, "--dense", "onnx")


def test_a_compressed_checkpoint_is_a_source_like_any(pruned: Pruned, tmp_path: Path) -> None:
    checkpoint = pruned("llama", "3:4")
    export(checkpoint, "vllm", tmp_path / "packed")
    export(checkpoint, "hf", tmp_path / "hf")
    out = run(tmp_path / "packed", Recipe("1:4", "magnitude"), tmp_path / "again")
    expected = run(tmp_path / "hf", Recipe("1:4", "magnitude"), tmp_path / "expected")
    assert_same_tensors(read_all(out), read_all(expected))
    assert manifest.read(out)["linears"] == manifest.read(expected)["linears"]
    assert "quantization_config" not in read_config(out)
    assert verify(out)[1] == []
    body = export(tmp_path / "packed", "vllm", tmp_path / "copy")
    assert body["storage"] == manifest.read(tmp_path / "packed")["storage"]
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "packed" / name).read_bytes()


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_without_its_entry_in_the_config_nobody_takes_the_values_for_weights(
    pattern: str, pruned: Pruned, tmp_path: Path
) -> None:
    export(pruned("llama", pattern), "vllm", tmp_path / "packed")
    config = read_config(tmp_path / "packed")
    del config["quantization_config"]
    (tmp_path / "packed/config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"proj\.weight has shape .* config\.json asks for"):
        next(linear_weights(tmp_path / "packed"))

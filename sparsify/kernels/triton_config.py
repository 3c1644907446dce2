"""How the Triton kernels are launched: a default per shape and number of tokens, candidates, what a tuner found."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sparsify.kernels import device_cache

# Columns of a row for which a table says where the values begin; also in the device code.
CHUNK = 512
# More tokens than this are no decode: the weight is expanded once.
MAX_TOKENS = 64
# More tokens than this do not fit into the registers of the kernels that multiply in float32.
MAX_ROWS_TOKENS = 4
# A kind of weight: 2:4 in whole words of the mask, or any bitmask.
PAIRS, BITS = "pairs", "bits"
_KIND = "triton"


@dataclass(frozen=True)
class Config:
    """One way to launch a product.

    Attributes:
        tensor_cores: expand tiles for the tensor cores; otherwise multiply in float32.
        rows: of the weight, that a program has.
        columns: that it takes at a time.
        split: shares of the columns, each a program of its own; their sums are added in order afterwards.
        warps: of a program.
        stages: depth of the software pipeline, where there are tensor cores.
    """

    tensor_cores: bool
    rows: int
    columns: int
    split: int
    warps: int
    stages: int = 3


# Fewer warps per multiprocessor leave memory idle: then the columns are split.
_WARPS_WANTED = 8


def _split(rows: int, warps: int, shape: tuple[int, int], multiprocessors: int) -> int:
    """The smallest power of two that fills the device, but no more than there are chunks to share."""
    steps = max(1, math.ceil(shape[1] / CHUNK))
    wanted = max(1, math.ceil(_WARPS_WANTED * multiprocessors / (math.ceil(shape[0] / rows) * warps)))
    return min(1 << (wanted - 1).bit_length(), 1 << (steps.bit_length() - 1))


def default(shape: tuple[int, int], tokens: int, multiprocessors: int) -> Config:
    """What is launched where nothing was tuned; it depends on the arguments only."""
    if tokens <= 2:
        return Config(False, 4, CHUNK, _split(4, 1, shape, multiprocessors), 1)
    return Config(True, 64, 128, _split(64, 4, shape, multiprocessors), 4)


# (rows, columns, warps) to try with each split, for float32 products. Of bits a program takes a chunk at a time.
_ROWS = ((1, 512, 1), (2, 512, 1), (4, 512, 1), (8, 512, 1), (2, 1024, 2), (4, 1024, 2), (4, 2048, 4))
# (rows, columns, warps, stages) for tensor cores, by the compute capability from which they are tried.
_TILES = {
    (8, 0): ((16, 128, 4, 3), (32, 128, 4, 3), (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 4, 3), (128, 64, 8, 3)),
    (9, 0): ((64, 256, 4, 2), (64, 256, 8, 3), (128, 128, 8, 3)),
}


def candidates(
    kind: str, shape: tuple[int, int], tokens: int, multiprocessors: int, capability: tuple[int, int]
) -> list[Config]:
    """What a tuner tries on a GPU of that compute capability; the default comes first."""
    first = default(shape, tokens, multiprocessors)
    found = [first]
    plain: list[tuple[bool, int, int, int, int]] = []
    if tokens <= MAX_ROWS_TOKENS:
        plain += [(False, *row, 3) for row in _ROWS if row[0] * tokens <= 8 and (kind == PAIRS or row[1] == CHUNK)]
    for since, tiles in _TILES.items():
        if capability >= since:
            plain += [(True, *tile) for tile in tiles]
    steps = max(1, math.ceil(shape[1] / CHUNK))
    for tensor_cores, rows, columns, warps, stages in plain:
        for split in (1, 2, 4, 8):
            config = Config(tensor_cores, rows, columns, split, warps, stages)
            if split <= steps and config not in found:
                found.append(config)
    return found


def bucket(tokens: int) -> int:
    """Numbers of tokens that share a configuration, by the largest of them."""
    return tokens if tokens <= 2 else max(4, 1 << (tokens - 1).bit_length())


def _key(kind: str, shape: tuple[int, int], tokens: int) -> str:
    return f"{kind} {shape[0]}x{shape[1]} {bucket(tokens)}"


@functools.cache
def _tuned(name: str) -> dict[str, Config]:
    known = {}
    for key, row in device_cache.read(_KIND, name).items():
        try:
            known[key] = Config(**row["config"])
        except (TypeError, KeyError):  # of another version
            continue
    return known


def remember(
    device: torch.device, kind: str, shape: tuple[int, int], tokens: int, config: Config, **measured: Any
) -> None:
    """Use ``config`` from now on, in this process and, through the cache folder, in later ones on such a device."""
    name, key = device_cache.device_name(device), _key(kind, shape, tokens)
    device_cache.add(_KIND, name, {key: {"config": asdict(config), **measured}})
    _tuned(name)[key] = config


def configure(device: torch.device, kind: str, shape: tuple[int, int], tokens: int) -> Config:
    """What was tuned, or the default."""
    name = _name(device)
    return _tuned(name).get(_key(kind, shape, tokens)) or default(shape, tokens, multiprocessors(device))


@functools.cache
def _name(device: torch.device) -> str:
    return device_cache.device_name(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 where Triton's interpreter stands in for one."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)

"""How products did that were measured: kernel records of ``sparsify bench``, and tables of ``sparsify tune``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import quantiles
from typing import Any

from sparsify.errors import UsageError
from sparsify.kernels.table import DENSE, GATHER, LOOP, UNSTRUCTURED, Table
from sparsify.roofline.devices import Device
from sparsify.roofline.work import Storage, bound, linear_work
from sparsify.types import NofM, Pattern, parse_pattern

# Shapes whose sides differ by more, both ratios multiplied, do not stand for each other; as in ``kernels.table``.
_FARTHEST = math.log(4)
# Half as many tokens as the least that were measured, or twice the most, are still near; from so many on all are.
_REACH, _MANY = 2.0, 512
_NEAR_DENSITY = 0.02
_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "i8": "int8"}


@dataclass(frozen=True)
class Point:
    """One product as it was measured, dense and sparse side by side.

    Attributes:
        shape: (out, in).
        dtype: of weight and inputs.
        pattern: N:M, or ``unstructured``.
        density: share of values kept.
        tokens: rows of x.
        dense_us: microseconds, median of the best dense way.
        low: least of the ratios dense time / best sparse time that the samples give.
        high: greatest.
    """

    shape: tuple[int, int]
    dtype: str
    pattern: str
    density: float
    tokens: int
    dense_us: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """What measured products say of one that is near.

    Attributes:
        low: of dense time / sparse time.
        high: of the same.
        efficiency: roof of the dense product / its time.
    """

    low: float
    high: float
    efficiency: float


def pattern_key(pattern: Pattern) -> tuple[str, float]:
    """The name of a pattern in points and tables, and its density."""
    name = str(pattern) if isinstance(pattern, NofM) else UNSTRUCTURED
    return name, float(1 - pattern.sparsity)


def from_records(records: Sequence[Mapping[str, Any]], device: Device) -> list[Point]:
    """The points of ``device`` among the kernel records of ``records``.

    Those of other devices, and without a sparse kernel, are left out, and on a CPU those of another number of threads.
    Weights in 8 bits are too: their rival is a dense weight in 16.

    Args:
        records: as ``sparsify bench`` writes them, those of ``run`` and ``artifact`` among them.
        device: wanted.

    Raises:
        UsageError: a record lacks what it should have.
    """
    names = (device.full_name, *device.known_as)
    points: list[Point] = []
    try:
        for record, measured_on in kernels(records):
            threads = record["threads"] if device.kind == "cpu" else device.threads
            if measured_on in names and threads == device.threads:
                points += _point(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"--records: a record is malformed ({type(error).__name__}: {error}); measure again") from None
    return points


def kernels(records: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], str]]:
    """The kernel records whose values are of the inputs' type, each with the name of the device it was measured on."""
    on: dict[str, str] = {}
    rounded: set[tuple[str, str]] = set()
    for record in records:
        if record["record"] == "run" and record["ceilings"]:
            on[record["run"]] = record["ceilings"][0]["device"]
        elif record["record"] == "artifact" and str(record["precision"]).startswith("int"):
            rounded.add((record["run"], record["artifact"]))
    # A kernel record says cpu or cuda; which one that was, its run says.
    return [
        (record, on.get(record["run"], record["device"]))
        for record in records
        if record["record"] == "kernel" and (record["run"], record["artifact"]) not in rounded
    ]


def _point(record: Mapping[str, Any]) -> Iterator[Point]:
    times = {name: [float(us) for us in kernel["samples_us"]] for name, kernel in record["kernels"].items()}
    sparse = [name for name in times if not _is_dense(name)]
    if not sparse:
        return
    dense, best = times[record["best_dense"]], min(sparse, key=lambda name: _quarters(times[name])[1])
    ratios = [d / s for d, s in zip(_quarters(dense), _quarters(times[best]), strict=True)]
    n_out, n_in = map(int, record["shape"])
    text = str(record["pattern"])
    name = UNSTRUCTURED if text == UNSTRUCTURED else pattern_key(parse_pattern(text))[0]
    yield Point(
        (n_out, n_in), record["dtype"], name, float(record["density"]), int(record["tokens"]), _quarters(dense)[1],
        min(ratios), max(ratios),
    )  # fmt: skip


def _is_dense(name: str) -> bool:
    return name == "dense" or name.startswith("dense ")


def _quarters(samples: Sequence[float]) -> list[float]:
    return quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3


def from_table(table: Table | None) -> list[Point]:
    """The points of a tuner's table whose inputs are of the weight's own type, against torch's dense product."""
    points = []
    for entry in table.entries if table else ():
        if entry.values != entry.x:
            continue
        for tokens, times in entry.tokens.items():
            packed = [each for name, each in times.items() if name not in (DENSE, LOOP, GATHER)]
            if packed:
                dense, best = times[DENSE], min(packed, key=lambda each: each.median_us)
                ratios = (dense.median_us / best.median_us, dense.min_us / best.min_us)
                shape = (entry.n_out, entry.n_in)
                points.append(
                    Point(
                        shape, _DTYPES[entry.x], entry.pattern, entry.density, tokens, dense.median_us,
                        min(ratios), max(ratios),
                    )
                )  # fmt: skip
    return points


def raised(device: Device, points: Sequence[Point]) -> Device:
    """A measured device with ceilings no lower than what ``points``, of the same device, have reached.

    Ceilings that were measured while something else ran would else make known products impossible.
    """
    bandwidth, flops = device.bytes_per_s, dict(device.flops)
    for point in points:
        dense = linear_work(*point.shape, point.tokens, point.dtype)
        sparse = linear_work(*point.shape, point.tokens, point.dtype, Storage(point.density, mask=True))
        for work, microseconds in ((dense, point.dense_us), (sparse, point.dense_us / point.high)):
            bandwidth = max(bandwidth, 1e6 * work.n_bytes / microseconds)
            if point.dtype in flops and device.kind == "cpu":
                flops[point.dtype] = max(flops[point.dtype], 1e6 * work.flops / microseconds)
    if device.how == "published" or (bandwidth, flops) == (device.bytes_per_s, device.flops):
        return device
    source = f"{device.source}; raised to what products reached that were measured before"
    return replace(device, bytes_per_s=bandwidth, flops=flops, source=source)


def near(
    points: Sequence[Point],
    device: Device,
    shape: tuple[int, int],
    dtype: str,
    storage: Storage,
    name: str,
    tokens: float,
) -> Measured | None:
    """What ``points`` say of a product; None if nothing near was measured.

    Type, pattern and density are the same. Of shapes the nearest counts; of tokens those measured on both sides.

    Args:
        points: of this device.
        device: whose roof the dense times are compared with.
        shape: (out, in).
        dtype: of weight and inputs.
        storage: of the weight.
        name: of its pattern, see ``pattern_key``.
        tokens: rows of x.
    """
    alike = [
        point
        for point in points
        if (point.dtype, point.pattern) == (dtype, name)
        and abs(point.density - storage.density) <= _NEAR_DENSITY
        and _distance(point, shape) <= _FARTHEST
    ]
    if not alike:
        return None
    nearest = min(_distance(point, shape) for point in alike)
    by_tokens = {point.tokens: point for point in alike if _distance(point, shape) == nearest}
    counts = sorted(by_tokens)
    if tokens < counts[0] / _REACH or (tokens > counts[-1] * _REACH and counts[-1] < _MANY):
        return None
    around = [
        max((c for c in counts if c <= tokens), default=counts[0]),
        min((c for c in counts if c >= tokens), default=counts[-1]),
    ]
    found = [by_tokens[count] for count in dict.fromkeys(around)]
    efficiency = [
        1e6 * bound(linear_work(*point.shape, point.tokens, dtype), device).seconds / point.dense_us for point in found
    ]
    # Above 1 the ceilings are those of a busier machine, see ``raised``.
    return Measured(min(p.low for p in found), max(p.high for p in found), min(1.0, sum(efficiency) / len(efficiency)))


def _distance(point: Point, shape: tuple[int, int]) -> float:
    return abs(math.log(point.shape[0] / shape[0])) + abs(math.log(point.shape[1] / shape[1]))

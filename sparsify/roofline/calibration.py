"""How products did that were measured: kernel records of ``sparsify bench``, and tables of ``sparsify tune``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, quantiles
from typing import Any

from sparsify.errors import UsageError
from sparsify.kernels.table import DENSE, GATHER, LOOP, UNSTRUCTURED, Table
from sparsify.roofline.bounds import Storage, bound, linear_work
from sparsify.roofline.devices import Device
from sparsify.types import NofM, Pattern, parse_pattern

# Shapes whose sides differ by more, both ratios multiplied, do not stand for each other; as in ``kernels.table``.
_FARTHEST = math.log(4)
# Half as many tokens as the least that were measured, or twice the most, are still near; from so many on all are.
_REACH, _MANY = 2.0, 512
_NEAR_DENSITY = 0.02
# Of one machine: what its system keeps for itself may change, and ceilings fall by as much while other work runs.
_SAME_MEMORY, _SAME_RATE = 0.02, 2.0
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
        low: of the ratios dense time / best sparse time, the lower end.
        high: the upper.
        fastest_us: of all samples of the best dense way, and of the best sparse way.
        in_table: of the tuner, else in a record.
        own: of the device that is planned for, else of another machine with one of the same name: then its times and
            rates are not this one's, and only its ratios stand for them.
    """

    shape: tuple[int, int]
    dtype: str
    pattern: str
    density: float
    tokens: int
    dense_us: float
    low: float
    high: float
    fastest_us: tuple[float, float]
    in_table: bool = False
    own: bool = True


def pattern_key(pattern: Pattern) -> tuple[str, float]:
    """The name of a pattern in points and tables, and its density."""
    name = str(pattern) if isinstance(pattern, NofM) else UNSTRUCTURED
    return name, float(1 - pattern.sparsity)


def from_records(records: Sequence[Mapping[str, Any]], device: Device) -> list[Point]:
    """The points of ``device`` among the kernel records of ``records``.

    Those of other devices, and without a sparse kernel, are left out, and on a CPU those of another number of threads.
    Weights in 8 bits are too: their rival is a dense weight in 16. A device at hand is told from others of its name by
    cores, memory and ceilings; published ones stand for all of theirs.

    Args:
        records: as ``sparsify bench`` writes them, those of ``run`` and ``artifact`` among them.
        device: wanted.

    Raises:
        UsageError: a record lacks what it should have.
    """
    names = (device.full_name, *device.known_as)
    points: list[Point] = []
    try:
        runs = {record["run"]: record for record in records if record["record"] == "run"}
        for record, measured_on in kernels(records):
            threads = record["threads"] if device.kind == "cpu" else device.threads
            if measured_on in names and threads == device.threads:
                own = device.how == "published" or _is_own(runs.get(record["run"], {}), device)
                points += (replace(point, own=own) for point in _point(record))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"--records: a record is malformed ({type(error).__name__}: {error}); measure again") from None
    return points


def _is_own(run: Mapping[str, Any], device: Device) -> bool:
    """Whether a run was on the device at hand, by all that its record says; one that says nothing was not."""
    ceilings = next((each for each in run.get("ceilings", ()) if each["how"] == "measured"), None)
    if ceilings is None:
        return False
    host = run["environment"]["host"]
    if device.kind == "cpu" and (
        host["cores"] != device.cores
        or not math.isclose(host["memory_bytes"], device.memory_bytes, rel_tol=_SAME_MEMORY)
        or host.get("last_level_cache_bytes", device.cache_bytes) != device.cache_bytes
    ):
        return False
    rates = [(ceilings["bytes_per_s"], device.bytes_per_s)]
    rates += [(peak, device.flops[dtype]) for dtype, peak in ceilings["flops"].items() if dtype in device.flops]
    return all(1 / _SAME_RATE <= there / here <= _SAME_RATE for there, here in rates)


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
    dense, best = (
        times[record["best_dense"]],
        min((times[name] for name in sparse), key=lambda each: _quarters(each)[1]),
    )
    low, high = _ratio(dense, best)
    n_out, n_in = map(int, record["shape"])
    text = str(record["pattern"])
    name = UNSTRUCTURED if text == UNSTRUCTURED else pattern_key(parse_pattern(text))[0]
    yield Point(
        (n_out, n_in), record["dtype"], name, float(record["density"]), int(record["tokens"]), _quarters(dense)[1],
        low, high, (min(dense), min(best)),
    )  # fmt: skip


def _ratio(dense: Sequence[float], sparse: Sequence[float]) -> tuple[float, float]:
    """Quartiles of the ratio. Samples of one round are a pair: what else the machine did then hit both."""
    if len(dense) == len(sparse):
        low, _, high = _quarters([d / s for d, s in zip(dense, sparse, strict=True)])
        return low, high
    (dense_low, _, dense_high), (sparse_low, _, sparse_high) = _quarters(dense), _quarters(sparse)
    return dense_low / sparse_high, dense_high / sparse_low


def _is_dense(name: str) -> bool:
    return name == "dense" or name.startswith("dense ")


def _quarters(samples: Sequence[float]) -> list[float]:
    return quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3


def from_table(table: Table | None) -> list[Point]:
    """The points of a tuner's table whose inputs are of the weight's own type, against torch's dense product.

    Of the samples a table has median and least, in no pairs: the range is that of one's median over the other's least.
    """
    points = []
    for entry in table.entries if table else ():
        if entry.values != entry.x:
            continue
        for tokens, times in entry.tokens.items():
            packed = [each for name, each in times.items() if name not in (DENSE, LOOP, GATHER)]
            if packed:
                dense, best = times[DENSE], min(packed, key=lambda each: each.median_us)
                shape = (entry.n_out, entry.n_in)
                points.append(
                    Point(
                        shape, _DTYPES[entry.x], entry.pattern, entry.density, tokens, dense.median_us,
                        dense.min_us / best.median_us, dense.median_us / best.min_us, (dense.min_us, best.min_us),
                        in_table=True,
                    )
                )  # fmt: skip
    return points


def raised(device: Device, points: Sequence[Point]) -> Device:
    """A measured device with ceilings no lower than what its own among ``points`` have reached.

    Ceilings that were measured while something else ran would else make known products impossible.
    """
    bandwidth, flops = device.bytes_per_s, dict(device.flops)
    for point in (point for point in points if point.own):
        dense = linear_work(*point.shape, point.tokens, point.dtype)
        sparse = linear_work(*point.shape, point.tokens, point.dtype, Storage(point.density, mask=True))
        for work, microseconds in zip((dense, sparse), point.fastest_us, strict=True):
            bandwidth = max(bandwidth, 1e6 * work.n_bytes / microseconds)
            if point.dtype in flops and device.kind == "cpu":
                flops[point.dtype] = max(flops[point.dtype], 1e6 * work.flops / microseconds)
    if device.how == "published" or (bandwidth, flops) == (device.bytes_per_s, device.flops):
        return device
    source = f"{device.source}; raised to what products reached that were measured before"
    return replace(device, bytes_per_s=bandwidth, flops=flops, source=source)


def near(
    points: Sequence[Point], shape: tuple[int, int], dtype: str, density: float, name: str, tokens: float
) -> tuple[float, float] | None:
    """The range of dense time / sparse time that ``points`` give for a product; None if nothing near was measured.

    Type, pattern and density are the same. Of shapes the nearest counts; of tokens those measured on both sides.

    Args:
        points: of one device.
        shape: (out, in).
        dtype: of weight and inputs.
        density: share of values kept.
        name: of its pattern, see ``pattern_key``.
        tokens: rows of x.
    """
    alike = [
        point
        for point in points
        if (point.dtype, point.pattern) == (dtype, name) and abs(point.density - density) <= _NEAR_DENSITY
    ]
    found = _nearest(alike, shape, tokens)
    return (min(point.low for point in found), max(point.high for point in found)) if found else None


def efficiency(points: Sequence[Point], device: Device, shape: tuple[int, int], dtype: str, tokens: float) -> float:
    """Roof of a dense product / its time, by the device's own points, whatever the pattern; 1 if none is near."""
    found = _nearest([point for point in points if point.own and point.dtype == dtype], shape, tokens)
    roofs = [1e6 * bound(linear_work(*point.shape, point.tokens, dtype), device).seconds for point in found]
    # Above 1 the ceilings are those of a busier machine, see ``raised``.
    return min(1.0, fmean(roof / point.dense_us for roof, point in zip(roofs, found, strict=True))) if found else 1.0


def _nearest(points: Sequence[Point], shape: tuple[int, int], tokens: float) -> list[Point]:
    """All of the nearest shape at the numbers of tokens around; where a record tells, tables do not count."""
    near_ones = [point for point in points if _distance(point, shape) <= _FARTHEST]
    least = min((_distance(point, shape) for point in near_ones), default=0.0)
    by_tokens: dict[int, list[Point]] = {}
    for point in near_ones:
        if _distance(point, shape) == least:
            by_tokens.setdefault(point.tokens, []).append(point)
    counts = sorted(by_tokens)
    if not counts or tokens < counts[0] / _REACH or (tokens > counts[-1] * _REACH and counts[-1] < _MANY):
        return []
    around = {
        max((c for c in counts if c <= tokens), default=counts[0]),
        min((c for c in counts if c >= tokens), default=counts[-1]),
    }
    found = [by_tokens[count] for count in sorted(around)]
    return [point for same in found for point in ([p for p in same if not p.in_table] or same)]


def _distance(point: Point, shape: tuple[int, int]) -> float:
    return abs(math.log(point.shape[0] / shape[0])) + abs(math.log(point.shape[1] / shape[1]))

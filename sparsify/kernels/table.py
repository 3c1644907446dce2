"""Measured times of products with packed and dense weights: the form of a table, where tables lie, and looking one up.

A table belongs to one device and one number of threads. ``sparsify tune`` writes the user's own into the cache folder;
those of devices that we measured come with the package. What the user measured goes before what was shipped. A table
that cannot be read, or is another device's, is not used, and a warning names it.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparsify.files import read_json, write_atomic, writing
from sparsify.format.packed import Packed
from sparsify.kernels import device_cache, native

FORMAT = 1
SHIPPED = Path(__file__).parent / "tables"
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int8: "i8"}
UNSTRUCTURED = "unstructured"
# Times that are no way to multiply by a packed weight: torch with the dense weight, our own loop over it, and bringing
# the inputs into the order of permuted columns.
DENSE, LOOP, GATHER = "dense", "loop", "gather"
# Shapes whose sides differ by more, both ratios multiplied, do not stand for each other.
_FARTHEST = math.log(4)
# A random weight of density 0.5 has a few values more or less.
_DENSITY_SLACK = 1.02
_log = logging.getLogger("sparsify.kernels")


@dataclass(frozen=True)
class Times:
    """Microseconds of one product, over ``n`` rounds."""

    median_us: float
    min_us: float
    max_us: float
    n: int


@dataclass(frozen=True)
class Entry:
    """Times of one kind of weight and one shape.

    Attributes:
        values: type of what is stored: ``bf16``, ``f16``, ``f32``, ``i8``.
        x: type of inputs and results.
        pattern: ``2:4`` and the like, or ``unstructured``.
        density: share of weights that are kept.
        n_out: rows.
        n_in: columns.
        tokens: number of tokens -> name of a way, ``dense``, ``loop`` or ``gather`` -> its times.
    """

    values: str
    x: str
    pattern: str
    density: float
    n_out: int
    n_in: int
    tokens: Mapping[int, Mapping[str, Times]]

    @property
    def key(self) -> tuple[str, str, str, float, int, int]:
        """What was measured."""
        return (self.values, self.x, self.pattern, self.density, self.n_out, self.n_in)

    def rival_us(self, tokens: int) -> float:
        """The best dense time: that of torch, or of our own loop where it is faster."""
        times = self.tokens[tokens]
        return min(times[name].median_us for name in (DENSE, LOOP) if name in times)

    def packed_us(self, tokens: int) -> float | None:
        """The best time with the packed weight, if there is any."""
        times = self.tokens[tokens]
        return min((times[name].median_us for name in times if name not in (DENSE, LOOP, GATHER)), default=None)


@dataclass(frozen=True)
class Table:
    """Entries of one device.

    Attributes:
        device: what ``device_key`` gives for it.
        threads: of torch; 0 for GPUs.
        versions: of the packages that were measured.
        run: how it was measured, for the reader.
        entries: one of each key.
    """

    device: Mapping[str, Any]
    threads: int
    versions: Mapping[str, str]
    run: Mapping[str, Any]
    entries: tuple[Entry, ...]

    def nearest(self, wanted: Entry) -> Entry | None:
        """The entry that stands for ``wanted``, whose times do not matter; None if nothing measured is near.

        Types and pattern are the same and the density is the weight's own or higher, at which packing gains less.
        Among those it is the nearest shape, by the sum of the logarithms of both sides' ratios.
        """

        def distance(entry: Entry) -> float:
            return abs(math.log(entry.n_out / wanted.n_out)) + abs(math.log(entry.n_in / wanted.n_in))

        found = [
            entry
            for entry in self.entries
            if entry.key[:3] == wanted.key[:3]
            and entry.density * _DENSITY_SLACK >= wanted.density
            and distance(entry) <= _FARTHEST
        ]
        return min(found, key=lambda entry: (distance(entry), entry.density), default=None)


def wanted(packed: Packed, x: torch.dtype) -> Entry:
    """What to look for in a table for products of ``packed`` with inputs of type ``x``; it has no times."""
    n_out, n_in = packed.shape
    pattern = str(packed.pattern) if packed.pattern else UNSTRUCTURED
    density = packed.values.numel() / max(1, n_out * n_in)
    return Entry(NAMES[packed.values.dtype], NAMES[x], pattern, density, n_out, n_in, {})


def device_key(device: torch.device) -> dict[str, Any]:
    """What tells devices apart whose times differ, as JSON values."""
    if device.type == "cuda":
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        return {"type": "cuda", "name": name, "capability": ".".join(map(str, capability))}
    if device.type == "cpu":
        # Of one model there are many, with other caches; a virtual machine says no more than its family.
        megabytes = round(last_level_cache_bytes() / 2**20)
        return {"type": "cpu", **_processor(), "cache": f"{megabytes}MB", "features": sorted(native.features())}
    return {"type": device.type}


@functools.cache
def _processor() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    # Of the first processor: the others say the same.
    first = text.partition("\n\n")[0].splitlines()
    rows = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)}
    names = {"vendor": "vendor_id", "family": "cpu family", "model": "model", "name": "model name"}
    return {name: rows[key] for name, key in names.items() if key in rows}


@functools.cache
def last_level_cache_bytes() -> int:
    """Of the largest cache of the first processor; 0 where the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM") or 0) * unit)
    return max(sizes)


def threads_of(device: torch.device) -> int:
    """Threads that products on ``device`` take now; 0 where that says nothing."""
    return torch.get_num_threads() if device.type == "cpu" else 0


def file_name(device: Mapping[str, Any], threads: int) -> str:
    """Of the table of such a device."""
    parts = [".".join(value) if isinstance(value, list) else str(value) for value in device.values()]
    parts += [f"{threads}-threads"] if threads else []
    return re.sub(r"[^0-9A-Za-z.]+", "-", "-".join(parts)).strip("-") + ".json"


def places(device: torch.device) -> dict[str, Path]:
    """Where tables of ``device`` lie if there are any: ``measured here``, then ``shipped``."""
    name = file_name(device_key(device), threads_of(device))
    return {"measured here": device_cache.cache_folder() / "tables" / name, "shipped": SHIPPED / name}


def table_for(device: torch.device) -> Table | None:
    """What is known of ``device`` and its present number of threads; the user's entries replace those shipped."""
    found = [read(path, device) for path in reversed(places(device).values()) if path.is_file()]
    tables = [table for table in found if table is not None]
    return functools.reduce(merged, tables) if tables else None


def merged(old: Table, new: Table) -> Table:
    """``new`` with those entries of ``old`` that it has not measured; times of one entry are merged by tokens."""
    entries = {entry.key: entry for entry in old.entries}
    for entry in new.entries:
        known = entries.get(entry.key)
        entries[entry.key] = entry if known is None else replace(entry, tokens={**known.tokens, **entry.tokens})
    return replace(new, entries=tuple(entries.values()))


def read(path: Path, device: torch.device) -> Table | None:
    """The table in ``path``; None, with a warning, if it is damaged or not one of ``device`` and its threads."""
    try:
        stat = path.stat()
        table = _read(path, stat.st_mtime_ns, stat.st_size)
    except (OSError, ValueError) as error:
        _warn(f"{path}: is no table of measured kernels ({_reason(error)}); run sparsify tune to measure again")
        return None
    if table.device != device_key(device) or table.threads != threads_of(device):
        _warn(f"{path}: was measured on another device or with other threads; run sparsify tune to measure here")
        return None
    return table


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200]


@functools.cache
def _warn(text: str) -> None:
    """Once: a model has many linears."""
    _log.warning("%s", text)


@functools.lru_cache(maxsize=16)
def _read(path: Path, changed: int, size: int) -> Table:
    return parse(read_json(path))


def parse(body: Any) -> Table:
    """A table from its JSON value.

    Raises:
        ValueError: it is none, or of another format.
    """
    _want(isinstance(body, dict), "it is not a JSON object")
    _want(body.get("format") == FORMAT, f"its format is {body.get('format')!r}, not {FORMAT}")
    for key, kind in (("device", dict), ("versions", dict), ("run", dict), ("threads", int), ("entries", list)):
        _want(isinstance(body.get(key), kind), f"{key} is missing or malformed")
    entries = tuple(_entry(row, f"entry {i}") for i, row in enumerate(body["entries"]))
    _want(len({entry.key for entry in entries}) == len(entries), "it holds an entry twice")
    return Table(body["device"], body["threads"], body["versions"], body["run"], entries)


def _entry(row: Any, where: str) -> Entry:
    _want(isinstance(row, dict), f"{where} is not an object")
    types = list(NAMES.values())  # a list: what is looked up may be anything
    _want(row.get("values") in types and row.get("x") in types, f"{where}: values or x is unknown")
    _want(isinstance(row.get("pattern"), str), f"{where}: pattern is missing")
    density = _number(row.get("density"), f"{where}: density")
    _want(density <= 1, f"{where}: density is above 1")
    n_out, n_in = (_whole(row.get(key), f"{where}: {key}") for key in ("n_out", "n_in"))
    _want(isinstance(row.get("tokens"), dict) and bool(row["tokens"]), f"{where}: tokens is missing")
    tokens: dict[int, dict[str, Times]] = {}
    for count, ways in row["tokens"].items():
        here = f"{where}, {count} tokens"
        _want(count.isdecimal() and int(count) > 0, f"{where}: {count!r} is no number of tokens")
        _want(isinstance(ways, dict) and DENSE in ways, f"{here}: dense is missing")
        tokens[int(count)] = {way: _times(times, f"{here}, {way}") for way, times in ways.items()}
    return Entry(row["values"], row["x"], row["pattern"], density, n_out, n_in, dict(sorted(tokens.items())))


def _times(row: Any, where: str) -> Times:
    _want(isinstance(row, dict), f"{where} is not an object")
    median, low, high = (_number(row.get(key), f"{where}: {key}") for key in ("median_us", "min_us", "max_us"))
    _want(low <= median <= high, f"{where}: the median is not between the ends")
    return Times(median, low, high, _whole(row.get("n"), f"{where}: n"))


_LARGEST = 1 << 62


def _number(value: Any, where: str) -> float:
    _want(isinstance(value, int | float) and not isinstance(value, bool), f"{where} is no number")
    # Integers of JSON have no end, and floats do.
    _want(0 < value < _LARGEST and math.isfinite(value), f"{where} is not above 0, or too large")
    return float(value)


def _whole(value: Any, where: str) -> int:
    _want(isinstance(value, int) and not isinstance(value, bool), f"{where} is no whole number")
    _want(0 < value < _LARGEST, f"{where} is not above 0, or too large")
    return int(value)


def _want(true: bool, what: str) -> None:
    if not true:
        raise ValueError(what)


def write(table: Table, path: Path) -> None:
    """Write ``table`` to ``path``, an entry a line; a reader sees the file before or after.

    Raises:
        OutputError: it cannot be written.
    """
    head = {"format": FORMAT, **{key: getattr(table, key) for key in ("device", "threads", "versions", "run")}}
    text = json.dumps(head, ensure_ascii=False)[:-1] + ', "entries": [\n' + ",\n".join(_lines(table.entries)) + "\n]}\n"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _lines(entries: Iterable[Entry]) -> Iterable[str]:
    for entry in entries:
        yield json.dumps(asdict(entry), separators=(",", ":"))

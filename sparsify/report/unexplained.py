"""Gains that exceed what fewer bytes and operations explain, with what the records show of why.

That is little: how fast the runtime's dense products are beside the best that were measured, and whether the weights
fit the last-level cache. Where they show neither, the report says that the cause was not measured.
"""

from __future__ import annotations

from collections.abc import Callable

from sparsify.bench.records import Record, Records
from sparsify.bench.report import size
from sparsify.bench.spread import Comparison
from sparsify.report.pairs import Measure, Pair, tokens_at_once
from sparsify.report.wording import times

# By so much a ratio may exceed that of the roofs, which are measured too; and a dense product the best one.
_MARGIN = 1.1
# The dense product of PyTorch among the kernels of a record.
_DENSE = "dense torch"


def gain(records: Records, pair: Pair, measure: Measure, compared: Comparison, roofs: float) -> str | None:
    """What is said of a gain that is more than ``roofs``, the ratio if dense and sparse reached theirs; else None."""
    if compared.claim != "faster" or compared.ratio <= _MARGIN * roofs:
        return None
    known = "; ".join(filter(None, (_dense_products(records, pair, measure), _in_cache(records, pair))))
    return f"more than fewer bytes explain: {known or 'why was not measured'}"


def _dense_products(records: Records, pair: Pair, measure: Measure) -> str:
    """How PyTorch's own dense products compare with the best that were measured; empty where they are as good."""
    tokens = tokens_at_once(pair.scenario, measure)
    mine = [
        each
        for each in records.of("kernel", pair.run)
        if (each["artifact"], each["tokens"]) == (pair.candidate["artifact"], tokens) and each["best_dense"]
    ]
    if pair.runtime != "torch" or not mine or not all(_DENSE in each["kernels"] for each in mine):
        return ""
    ratio = _all_linears(mine, lambda each: _DENSE) / _all_linears(mine, lambda each: str(each["best_dense"]))
    if ratio <= _MARGIN:
        return ""
    return f"torch's dense products of its linears, by themselves, took {times(ratio)} as long as the best dense ones"


def _all_linears(kernels: list[Record], name: Callable[[Record], str]) -> float:
    """Microseconds of every linear of the model once."""
    return float(sum(each["linears"] * each["kernels"][name(each)]["median_us"] for each in kernels))


def _in_cache(records: Records, pair: Pair) -> str:
    """Whether weights need not come from memory, at whose bandwidth roofs are."""
    (run,) = records.of("run", pair.run)
    cache = run["environment"]["host"].get("last_level_cache_bytes")
    (made,) = (each for each in records.of("artifact", pair.run) if each["artifact"] == pair.candidate["artifact"])
    on_device = run["environment"]["gpu"] and pair.candidate["gpu"]
    if cache is None or on_device or made["weight_bytes"] > cache:
        return ""
    return f"its weights ({size(made['weight_bytes'])}) fit the last-level cache ({size(cache)}), which no roof counts"

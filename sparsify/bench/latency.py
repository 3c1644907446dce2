"""The figures of one scenario from its rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsify.bench.spread import spread
from sparsify.errors import MeasurementError

_OF_ROUND = ("round", "position", "again", "ttft_s", "gaps_s", "total_s")


def latency_record(
    rounds: Sequence[dict[str, Any]], batch: int, new_tokens: int, reference: Sequence[Sequence[int]] | None
) -> dict[str, Any]:
    """Samples, statistics and agreement, as fields of a ``latency`` record.

    Args:
        rounds: what ``time_stream`` gave, with ``round``, ``position``, ``again`` and ``trace_sha256``.
        batch: rows of each.
        new_tokens: of each row.
        reference: the baseline's tokens [batch][new_tokens]; None where there is none.

    Raises:
        MeasurementError: no rounds, or rounds of different prompts.
    """
    traces = {each["trace_sha256"] for each in rounds}
    if len(traces) != 1:
        raise MeasurementError(f"{len(traces)} traces in one scenario, want one; measure again")
    made = rounds[0]["tokens"]
    return {
        "trace_sha256": traces.pop(),
        "interleaved": True,
        "rounds": [{key: each[key] for key in _OF_ROUND} for each in rounds],
        "statistics": statistics(rounds, batch * new_tokens),
        "same_tokens": None if reference is None else [same(*rows) for rows in zip(made, reference, strict=True)],
    }


def statistics(rounds: Sequence[Mapping[str, Any]], n_tokens: int) -> dict[str, Any]:
    """The ``statistics`` of a ``latency`` record: rows that come together are one sample, however many they are.

    Args:
        rounds: with ``ttft_s``, ``gaps_s`` and ``total_s``; at least one.
        n_tokens: that all rows of a round make together.
    """
    gaps = [gap for each in rounds for row in dict.fromkeys(map(tuple, each["gaps_s"])) for gap in row]
    return {
        "ttft_s": spread([value for each in rounds for value in dict.fromkeys(each["ttft_s"])]),
        "tpot_s": spread(gaps) if gaps else None,
        "total_s": spread([each["total_s"] for each in rounds]),
        "tokens_per_s": spread([n_tokens / each["total_s"] for each in rounds]),
    }


def same(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))

"""Tensor parallelism on this machine's CPU: several processes, each with its part of every linear."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests_vllm.conftest import ask

Pair = Callable[[str], tuple[Path, Path]]
Records = Callable[[], list[dict[str, Any]]]


def _check(records: list[dict[str, Any]], ranks: int, n_linears: int) -> None:
    assert [record["rank"] for record in records] == list(range(ranks))
    for record in records:
        assert len(record["linears"]) == n_linears
        assert {entry["kernel"] for entry in record["linears"].values()} == {"packed"}


def test_three_ranks(smol: Pair, engaged_folder: Records) -> None:
    """SmolLM2 has 9 query heads and 3 key heads: one of the latter on each rank."""
    reference = ask(smol("2:4")[0], dtype="float32")
    found = ask(smol("2:4")[1], dtype="float32", kernel="packed", tensor_parallel_size=3)
    assert found.tokens == reference.tokens
    torch.testing.assert_close(found.logprobs, reference.logprobs, rtol=1e-4, atol=1e-4)
    _check(engaged_folder(), 3, 120)


def test_two_ranks_unstructured(stories: Path, make: Callable[..., tuple[Path, Path]], engaged_folder: Records) -> None:
    plain, compressed = make(stories, pattern="0.5", method="magnitude")
    reference = ask(plain, dtype="float32")
    found = ask(compressed, dtype="float32", kernel="packed", tensor_parallel_size=2)
    assert found.tokens == reference.tokens
    torch.testing.assert_close(found.logprobs, reference.logprobs, rtol=1e-4, atol=1e-4)
    _check(engaged_folder(), 2, 20)

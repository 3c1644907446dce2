"""Tokens per second of several sessions on one model, in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from sparsify.runtimes.session import Session


def time_sessions(sessions: Mapping[str, Session], arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Prefill for each length (batch 1) and decoding for each batch (shortest length), the sessions in turn.

    Prefill is the time to the first token. Decoding is what further tokens cost: the median of prompt and tokens less
    the median of the prompt, measured in the same rounds. Raw samples are in the record, so that noise can be seen.
    """
    shortest, n_new = min(arguments["lengths"]), arguments["new_tokens"]
    vocabulary = arguments["sizes"]["vocabulary"]

    def seconds(session: Session, batch: int, length: int, n: int, seed: int) -> float:
        ids = np.random.default_rng(seed).integers(3, vocabulary, size=(batch, length), dtype=np.int64)
        started = time.perf_counter()
        session.generate(ids, n)
        return time.perf_counter() - started

    def rows(kind: str, batch: int, length: int) -> Iterator[dict[str, Any]]:
        first: dict[str, list[float]] = {name: [] for name in sessions}
        whole: dict[str, list[float]] = {name: [] for name in sessions}
        failed: dict[str, str] = {}
        # The first round warms up: kernels are loaded, graphs captured.
        for repeat in range(arguments["repeats"] + 1):
            for name in [name for name in sessions if name not in failed]:
                try:
                    first[name].append(seconds(sessions[name], batch, length, 1, repeat))
                    if kind == "decode":
                        whole[name].append(seconds(sessions[name], batch, length, 1 + n_new, repeat))
                except Exception as error:  # recorded as this session's result
                    failed[name] = f"{type(error).__name__}: {error}"
        for name in sessions:
            case = f"{kind}, batch {batch}, {length} tokens, {name}"
            if name in failed:
                yield {"case": case, "ok": False, "why": failed[name]}
                continue
            row = {"timed": kind, "session": name, "batch": batch, "length": length, "first_token_s": first[name][1:]}
            prompt_s = statistics.median(first[name][1:])
            if kind == "prefill":
                yield {**row, "tokens_per_s": batch * length / prompt_s}
                continue
            decode_s = statistics.median(whole[name][1:]) - prompt_s
            rate = batch * n_new / decode_s if decode_s > 0 else None
            if rate is None:
                yield {"not_run": case, "why": "the prompt took longer than prompt and tokens: too much noise"}
            yield {**row, "new_tokens": n_new, "generation_s": whole[name][1:], "tokens_per_s": rate}

    for length in arguments["lengths"]:
        yield from rows("prefill", 1, length)
    for batch in arguments["batches"]:
        yield from rows("decode", batch, shortest)

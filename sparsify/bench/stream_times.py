"""Times of one generation, token by token, and the prompts that every subject of a run gets alike."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import ModelError
from sparsify.runtimes.session import Session

# Ids that every vocabulary has, without the special ones at its start where it can be helped.
_FIRST = 3


def prompts(seed: int, prompt_tokens: int, batch: int, vocab_size: int) -> NDArray[np.int64]:
    """Random ids [batch, prompt_tokens] int64, the same for the same arguments on any machine."""
    draw = np.random.Generator(np.random.PCG64([seed, prompt_tokens, batch]))
    low = min(_FIRST, vocab_size - 1)
    return draw.integers(low, vocab_size, size=(batch, prompt_tokens), dtype=np.int64)


def trace_sha256(ids: NDArray[np.int64]) -> str:
    """Hash of ids with their shape."""
    return hashlib.sha256(repr(ids.shape).encode() + ids.astype("<i8").tobytes()).hexdigest()


def time_stream(
    session: Session, ids: NDArray[np.int64], n: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Generate ``n`` tokens for every row of ``ids`` and time each.

    Args:
        session: yields a step when its tokens are on the host.
        ids: [batch, prompt] int64.
        n: tokens of each row.
        clock: seconds, monotonic.

    Returns:
        ``ttft_s`` [batch]: from the call to a row's first token. ``gaps_s`` [batch][n - 1]: from a row's token to its
        next; those that came together share the time since the one before them equally. ``total_s``: to the last token
        of all. ``tokens`` [batch][n].

    Raises:
        ModelError: the session made more or fewer tokens than asked.
    """
    batch = ids.shape[0]
    tokens: list[list[int]] = [[] for _ in range(batch)]
    times: list[list[float]] = [[] for _ in range(batch)]
    started = clock()
    before = [started] * batch
    for step in session.stream(ids, n):
        now = clock()
        for row, came in enumerate(step):
            if came:
                # The first of several that come together with a row's first token did not come earlier.
                share = (now - before[row]) / len(came) if times[row] else 0.0
                times[row] += [now - share * i for i in reversed(range(len(came)))]
                tokens[row] += came
                before[row] = now
    if any(len(row) != n for row in tokens):
        counts = sorted({len(row) for row in tokens})
        raise ModelError(f"{session.name}: asked for {n} tokens a row and got {counts[0]} to {counts[-1]}")
    return {
        "ttft_s": [row[0] - started for row in times],
        "gaps_s": [[after - earlier for earlier, after in pairwise(row)] for row in times],
        "total_s": max(row[-1] for row in times) - started,
        "tokens": tokens,
    }

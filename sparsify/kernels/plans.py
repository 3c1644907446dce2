"""From measured times to a plan: which way multiplies how many tokens, and whether packing is worth it at all.

For each measured number of tokens it is the fastest way, as long as that takes no longer than dense by more than
noise; numbers in between do what the next larger measured one does. Where dense is faster the plan says ``dense``, and
the dense weight has to be kept beside the packed one: that is done only where decode gains by it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from sparsify.kernels.table import DENSE, GATHER, Entry

# Dense time / packed time from which a packed way is kept: medians of the same code differ by as much.
NOISE = 0.97
# Tokens of a decoding batch, and what one has to gain there to hold a weight twice.
DECODE_TOKENS = 32
WORTH_MEMORY = 1.1
# From as many tokens on products are bound by arithmetic, and more tokens change no ratio.
_MANY_TOKENS = 512


@dataclass(frozen=True)
class Decision:
    """What to do with a weight.

    Attributes:
        plan: as ``native.parse_plan`` reads it; empty: dense altogether.
        gain: dense time / packed time, where decode gains most; 0 if no packed way was measured there.
        reason: why it is dense; else empty.
    """

    plan: str
    gain: float
    reason: str = ""


def decide(
    entry: Entry, available: Callable[[int], Collection[str]], *, permuted: bool = False, packed_only: bool = False
) -> Decision:
    """The plan that ``entry`` suggests.

    Args:
        entry: measured times.
        available: number of tokens -> ways that this machine has for it.
        permuted: the weight's columns are stored in another order, in which inputs have to be brought first.
        packed_only: never dense, as somebody asked for who wants the memory.
    """
    steps: list[tuple[int, str]] = []
    gain, worst, worst_tokens = 0.0, 1.0, 0
    for tokens, times in sorted(entry.tokens.items()):
        if permuted and GATHER not in times:
            return Decision("", 0.0, "inputs in the order of its columns were not measured")
        before = times[GATHER].median_us if permuted else 0.0
        found = {way: times[way].median_us + before for way in available(tokens) if way in times}
        if not found and packed_only:
            continue
        way = min(found, key=found.__getitem__, default=DENSE)
        # Not that of our own loop over a dense weight, which nothing serves: torch would run instead.
        dense = times[DENSE].median_us
        ratio = dense / found[way] if found else 0.0
        if ratio < worst:
            worst, worst_tokens = ratio, tokens
        if packed_only or ratio >= NOISE:
            steps.append((tokens, way))
            gain = max(gain, ratio) if tokens <= DECODE_TOKENS else gain
        elif dense / (dense + before) < NOISE:
            return Decision("", gain, f"the order of its columns costs more than noise at {tokens} tokens")
        else:
            steps.append((tokens, DENSE))
    kept = {way for _, way in steps}
    if kept <= {DENSE}:
        return Decision("", gain, f"dense is faster: packed reaches {worst:.2f} of its speed at {worst_tokens} tokens")
    if steps[-1][0] < _MANY_TOKENS:
        steps.append((steps[-1][0] + 1, _beyond(packed_only)))
        kept.add(steps[-1][1])
    if DENSE in kept and gain < WORTH_MEMORY:
        return Decision("", gain, f"decode gains {gain:.2f}, too little to hold the weight twice")
    return Decision(plan_of(steps), gain)


def _beyond(packed_only: bool) -> str:
    """For more tokens than were measured."""
    return "slices" if packed_only else DENSE


def plan_of(steps: list[tuple[int, str]]) -> str:
    """The plan of ways by the most tokens of each, in rising order; the last way takes any number."""
    merged: list[tuple[int, str]] = []
    for tokens, way in steps:
        if merged and merged[-1][1] == way:
            merged.pop()
        merged.append((tokens, way))
    return ",".join([*(f"{way}<={tokens}" for tokens, way in merged[:-1]), merged[-1][1]])

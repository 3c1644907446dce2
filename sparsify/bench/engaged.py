"""What the names of kernels say that sessions report.

``native`` is a kernel. For some numbers of tokens one may multiply zeros like any weight: ``native+dense:513-`` with
the dense weight that it keeps too, ``native+expanded:513-`` with one that it makes of the packed one each time.
``packed`` does so always. ``dense | native`` is what two ranks run.
"""

from __future__ import annotations

import re

from sparsify.runtimes.session import RANKS

# Multiplies by zeros whatever the number of tokens: only the memory of the weights is smaller.
MEMORY_ONLY = "packed"
_DENSELY = re.compile(r"\+(dense|expanded):")
# Linears that a runtime holds as one -> how many of the checkpoint's they are.
_FUSED = {"qkv_proj": 3, "gate_up_proj": 2, "fused_qkv_a_proj": 2}
# Never pruned, so that they say nothing about what was.
_ENDS = ("lm_head", "embed_out", "embed_tokens", "wte")


def runs_sparse(kernel: str, tokens: int | None = None) -> bool:
    """Whether what ``engaged`` names is a kernel that makes use of the zeros in its product, on every rank.

    ``dense`` and ``unknown`` do not, nor does what expands the weight for a dense product (``packed``; ``triton,
    expanded``), nor any operator of ONNX Runtime (``DOMAIN::NAME``).

    Args:
        kernel: the name.
        tokens: that are multiplied at a time; None: whether it does for some number of them.
    """
    return all(_sparse(rank, tokens) for rank in kernel.split(RANKS))


def ran_sparse(engaged: dict[str, str], pruned: int, tokens: int | None = None) -> tuple[int, int]:
    """How many of ``pruned`` linears ran sparse, and of how many it is known what ran: neither is above ``pruned``.

    Args:
        engaged: linear -> kernel. Names of fused linears count as those that they are made of, unless there are as many
            names as linears were pruned; the head and embeddings do not count.
        pruned: linears of the artifact that were pruned.
        tokens: that were multiplied at a time; None: for some number of them.
    """
    named = [(name.rsplit(".", 1)[-1], kernel) for name, kernel in engaged.items()]
    inner = [(name, kernel) for name, kernel in named if name not in _ENDS]
    fused = _FUSED if len(inner) < pruned else {}
    sparse = sum(fused.get(name, 1) for name, kernel in inner if runs_sparse(kernel, tokens))
    known = sum(fused.get(name, 1) for name, kernel in inner if "unknown" not in _parts(kernel))
    return min(sparse, pruned), min(known, pruned)


def _parts(kernel: str) -> list[str]:
    """What ranks ran, without the reasons that stand behind."""
    return [part.split(" ", 1)[0] for rank in kernel.split(RANKS) for part in rank.split("+")]


def reads_packed(kernel: str) -> bool:
    """Whether it reads the weight without its zeros from memory, on every rank, for some number of tokens."""
    return all(_packed(rank) for rank in kernel.split(RANKS))


def expands(kernel: str, tokens: int) -> bool:
    """Whether the kernel of one rank makes a dense weight of the packed one for so many tokens."""
    name, densely = _parsed(kernel)
    return _memory_only(name) or any(way == "expanded" and _within(tokens, ranges) for way, ranges in densely)


def _parsed(kernel: str) -> tuple[str, list[tuple[str, list[tuple[int, float]]]]]:
    """The name, and what it does otherwise for which numbers of tokens."""
    name, *rest = _DENSELY.split(kernel)
    pairs = zip(rest[::2], rest[1::2], strict=True)
    return name, [(way, [_range(each) for each in ranges.split(",")]) for way, ranges in pairs]


def _range(text: str) -> tuple[int, float]:
    """``2-32`` or ``513-``; what cannot be read is any number."""
    found = re.fullmatch(r"(\d{1,18})-(\d{1,18})?", text, re.ASCII)
    if found is None:
        return 0, float("inf")
    return int(found[1]), int(found[2]) if found[2] else float("inf")


def _within(tokens: int, ranges: list[tuple[int, float]]) -> bool:
    return any(first <= tokens <= last for first, last in ranges)


def _packed(kernel: str) -> bool:
    name, densely = _parsed(kernel)
    # Records of old join ranks by a plus.
    plain = not name or "::" in name or any(part.startswith(("dense", "unknown")) for part in name.split("+"))
    return not plain and not _always([ranges for way, ranges in densely if way == "dense"])


def _sparse(kernel: str, tokens: int | None) -> bool:
    name, densely = _parsed(kernel)
    if _memory_only(name) or not _packed(kernel):
        return False
    every = [ranges for _, ranges in densely]
    return not _always(every) if tokens is None else not any(_within(tokens, ranges) for ranges in every)


def _memory_only(name: str) -> bool:
    return name.endswith("expanded") or any(part.startswith(MEMORY_ONLY) for part in name.split("+"))


def _always(every: list[list[tuple[int, float]]]) -> bool:
    """Whether ranges hold every number of tokens."""
    least: float = 1
    for first, last in sorted(each for ranges in every for each in ranges):
        if first <= least:
            least = max(least, last + 1)
    return least == float("inf")

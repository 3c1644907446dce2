"""Times of products on a CPU, with weights from memory.

Each way has copies of its weight that together exceed the last-level cache and takes the next few of them in each of
its rounds, which alternate with those of its rivals: so what the machine does meanwhile hits all ways.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from sparsify.kernels import native
from sparsify.kernels.kernel import State
from sparsify.kernels.linear import linear as product
from sparsify.kernels.table import DENSE, GATHER, LOOP, Entry, Times, last_level_cache_bytes
from sparsify.kernels.tuning_request import Request, entry_of, random_packed, times_of
from sparsify.progress import Progress
from sparsify.types import parse_pattern

# Copies of a dense weight take at least this, and twice the cache, as memory allows.
_BYTES = 1 << 30
SHARE_OF_MEMORY = 0.5
# Weights so small that more copies would be needed are in some cache of a running model too.
MOST_COPIES = 5000
# A round of a way takes about this long, or one product.
_ROUND_S = 0.02
# Tokens from which a product is bound by arithmetic, and the share of rounds that do there.
MANY_TOKENS, _FEWER = 64, 0.7
# Dense time / packed time where noise could decide which is taken: there times are taken over more rounds.
_CLOSE = (0.85, 1.0)
_ROUNDS_WHERE_CLOSE = 3
# Ways that multiply row by row take time in proportion to the tokens: none is tried for many, and one that has lost by
# this does not come back.
_ROW_BY_ROW = ("avx512", "bf16", "vnni", LOOP)
_HOPELESS = 1.5
# Fewer tokens than this never pay for expanding the weight.
_SLICES_FROM = 16
_ALIGNMENT = 64
# What is timed: the place of its weight among the subjects (-1: the dense rival), and its way.
Which = tuple[int, str]


def wanted_bytes(request: Request) -> int:
    """Of the copies of a dense weight, if memory allows."""
    return request.n_bytes or max(_BYTES, 2 * last_level_cache_bytes())


def available_bytes() -> int:
    """Of memory that this machine could give out now."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


@dataclass
class _Subject:
    """A weight to measure: its state, the tensors of all copies, and the times found so far."""

    values: torch.dtype
    pattern: str
    state: State
    copies: list[dict[str, torch.Tensor]]
    times: dict[int, dict[str, Times]] = field(default_factory=dict)


def copies_of(tensor: torch.Tensor, n: int) -> list[torch.Tensor]:
    """``n`` copies, one after the other in memory, each aligned as torch aligns tensors."""
    if not tensor.numel():
        return [tensor] * n
    step = -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    memory = torch.empty(n * step + _ALIGNMENT, dtype=torch.uint8)
    first = -memory.data_ptr() % _ALIGNMENT
    found = []
    for i in range(n):
        start = first + i * step
        found.append(memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor))
    return found


def shape_on_cpu(
    request: Request,
    shape: tuple[int, int],
    x_dtype: torch.dtype,
    weights: Sequence[tuple[torch.dtype, str]],
    progress: Progress,
) -> Iterator[Entry]:
    """Times of ``weights`` (type of values and pattern) of one shape, and of the dense weight that they share."""
    n_out, n_in = shape
    dense_bytes = n_out * n_in * x_dtype.itemsize
    states = []
    for values, pattern in weights:
        packed = random_packed(shape, parse_pattern(pattern), values, x_dtype)
        states.append((values, pattern, native.prepare_with(packed, native.SLICES)))
    together = dense_bytes + sum(state.n_bytes for *_, state in states)
    most = int(SHARE_OF_MEMORY * available_bytes() / together)
    n = max(1, min(most, MOST_COPIES, math.ceil(wanted_bytes(request) / dense_bytes)))
    dense = copies_of(torch.randn(shape).to(x_dtype), n)
    subjects = []
    for values, pattern, state in states:
        each = [copies_of(tensor, n) for tensor in state.tensors.values()]
        named = [dict(zip(state.tensors, tensors, strict=True)) for tensors in zip(*each, strict=True)]
        subjects.append(_Subject(values, pattern, state, named))
    lost: set[Which] = set()
    for tokens in sorted(request.tokens):
        _measure_tokens(request, tokens, dense, subjects, lost)
        progress.advance()
    for subject in subjects:
        yield entry_of(subject.values, x_dtype, subject.pattern, shape, subject.times)


def _measure_tokens(
    request: Request, tokens: int, dense: list[torch.Tensor], subjects: list[_Subject], lost: set[Which]
) -> None:
    """Measure all ways for one number of tokens; those in ``lost`` are left out, and more may join them."""
    n_in = dense[0].shape[1]
    x = torch.randn(tokens, n_in).to(dense[0].dtype)
    rounds = request.rounds if tokens < MANY_TOKENS else math.ceil(_FEWER * request.rounds)
    run: dict[Which, Callable[[int], Any]] = {(-1, DENSE): lambda i: linear(x, dense[i])}
    perm = torch.randperm(n_in)
    run[-1, GATHER] = lambda i: x.index_select(-1, perm)
    if "bf16" in native.features() and x.dtype == torch.bfloat16:
        run[-1, LOOP] = _loop(x, dense)
    for k, subject in enumerate(subjects):
        for way in native.ways(subject.values, x.dtype, tokens, n_in):
            if way != native.SLICES or tokens >= _SLICES_FROM:
                run[k, way] = _packed(x, subject, way)
    if tokens >= MANY_TOKENS:
        lost |= {which for which in run if which[1] in _ROW_BY_ROW}
    run = {which: call for which, call in run.items() if which not in lost}
    samples = interleaved(run, (-1, DENSE), len(dense), rounds)
    close = {which: run[which] for which in _close(samples)}
    if close:
        for which, more in interleaved(close, (-1, DENSE), len(dense), _ROUNDS_WHERE_CLOSE * rounds).items():
            samples[which] += more
    found = {which: times_of(each) for which, each in samples.items()}
    rival = min(times.min_us for (k, way), times in found.items() if k < 0 and way != GATHER)
    lost |= {which for which, times in found.items() if which[1] in _ROW_BY_ROW and times.min_us > _HOPELESS * rival}
    common = {way: times for (k, way), times in found.items() if k < 0}
    for k, subject in enumerate(subjects):
        subject.times[tokens] = {**common, **{way: times for (of, way), times in found.items() if of == k}}


def _close(samples: Mapping[Which, Sequence[float]]) -> set[Which]:
    """Torch's dense product and the two fastest ways of each weight for which it takes about as long; else nothing."""
    medians = {which: statistics.median(each) for which, each in samples.items()}
    dense = medians[-1, DENSE]
    found: set[Which] = set()
    for subject in {k for k, _ in medians if k >= 0}:
        best = sorted((which for which in medians if which[0] == subject), key=medians.__getitem__)[:2]
        if best and _CLOSE[0] < dense / medians[best[0]] < _CLOSE[1]:
            found |= {(-1, DENSE), *best}
    return found


def _packed(x: torch.Tensor, subject: _Subject, way: str) -> Callable[[int], torch.Tensor]:
    copies, sizes = subject.copies, subject.state.sizes
    return lambda i: product(x, copies[i], sizes, None, way)


def _loop(x: torch.Tensor, dense: list[torch.Tensor]) -> Callable[[int], None]:
    from sparsify import _kernels

    y = torch.empty((x.shape[0], dense[0].shape[0]), dtype=x.dtype)
    threads = torch.get_num_threads()

    def run(i: int) -> None:
        n_out, n_in = dense[i].shape
        _kernels.dense_linear(dense[i].data_ptr(), n_out, n_in, x.data_ptr(), x.shape[0], y.data_ptr(), threads)

    return run


def interleaved(
    run: Mapping[Which, Callable[[int], Any]], rival: Which, n: int, rounds: int
) -> dict[Which, list[float]]:
    """Microseconds of each of ``run``: in each round each goes through the next few of its ``n`` copies, one by one.

    How many that are depends on how long ``rival`` takes for one.
    """
    for call in run.values():
        call(0)
    start = time.perf_counter()
    run[rival](n - 1)
    few = min(n, max(1, math.ceil(_ROUND_S / (time.perf_counter() - start))))
    found: dict[Which, list[float]] = {which: [] for which in run}
    for number in range(rounds):
        copies = [(number * few + i) % n for i in range(few)]
        # Not always in the same one's wake.
        for which in sorted(run, reverse=bool(number % 2)):
            call = run[which]
            start = time.perf_counter()
            for i in copies:
                call(i)
            found[which].append((time.perf_counter() - start) / few * 1e6)
    return found

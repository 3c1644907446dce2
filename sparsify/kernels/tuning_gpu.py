"""Times of products on a GPU, each with a cold cache. Not yet run on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch.nn.functional import linear

from sparsify.kernels import cusparselt_search, triton_decode
from sparsify.kernels.cusparselt_search import Problem
from sparsify.kernels.dispatch import GPU_KERNELS
from sparsify.kernels.gpu_timing import timed_us
from sparsify.kernels.kernel import Kernel, State
from sparsify.kernels.semi_structured import CUSPARSELT
from sparsify.kernels.table import DENSE, GATHER, Entry, Times
from sparsify.kernels.triton_config import MAX_TOKENS
from sparsify.kernels.triton_decode import TRITON
from sparsify.kernels.tuning_request import Request, entry_of, random_packed, times_of
from sparsify.progress import Progress
from sparsify.types import parse_pattern


def shape_on_gpu(
    request: Request,
    shape: tuple[int, int],
    x_dtype: torch.dtype,
    weights: Sequence[tuple[torch.dtype, str]],
    progress: Progress,
) -> Iterator[Entry]:
    """Dense and each kernel that takes the weight, which first searches for its fastest launch."""
    device = request.device
    dense = torch.randn(shape, device=device).to(x_dtype)
    perm = torch.randperm(shape[1], device=device)
    subjects: list[tuple[torch.dtype, str, dict[Kernel, State]]] = []
    for values, pattern in weights:
        packed = random_packed(shape, parse_pattern(pattern), values, x_dtype).to(device)
        able = [kernel for kernel in GPU_KERNELS if not kernel.absent(device) and not kernel.refuse(packed)]
        subjects.append((values, pattern, {kernel: kernel.prepare(packed) for kernel in able}))
    found: list[dict[int, dict[str, Times]]] = [{} for _ in subjects]
    for tokens in sorted(request.tokens):
        x = torch.randn(tokens, shape[1], device=device).to(x_dtype)
        common = {
            DENSE: times_of(timed_us(partial(linear, x, dense), device)),
            GATHER: times_of(timed_us(partial(x.index_select, -1, perm), device)),
        }
        for (_, pattern, states), times in zip(subjects, found, strict=True):
            times[tokens] = dict(common)
            for kernel, state in states.items():
                try:
                    search_launch(kernel, state, x)
                    run = partial(kernel.linear, x, state.tensors, state.sizes, None)
                    times[tokens][kernel.name] = times_of(timed_us(run, device))
                except RuntimeError as error:
                    why = " ".join(str(error).split())[:200]
                    progress.notice(f"{kernel.name}, {shape[0]}x{shape[1]} {pattern}, {tokens} tokens: {why}")
        progress.advance()
    for (values, pattern, _), times in zip(subjects, found, strict=True):
        yield entry_of(values, x_dtype, pattern, shape, times)


def search_launch(kernel: Kernel, state: State, x: torch.Tensor) -> None:
    """Have ``kernel`` find and remember its fastest launch for the product, where it has a choice."""
    if kernel is TRITON and x.shape[0] <= MAX_TOKENS:
        triton_decode.tune(x, state.tensors, state.sizes)
    elif kernel is CUSPARSELT:
        padded = -(-x.shape[0] // 8) * 8
        dtype = str(x.dtype).removeprefix("torch.")
        cusparselt_search.search([Problem(state.sizes["n_out"], state.sizes["n_in"], padded, dtype)], x.device)

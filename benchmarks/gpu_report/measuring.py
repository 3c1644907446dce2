"""What is measured of each case: searches for algorithms, products of single linears, and whole models."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from kernels_gpu.layers import packed_weight

from gpu_report.cases import Case, Generation, Product, Search, searches
from gpu_report.generation import Linears, build_linears, measure_generation
from gpu_report.report import Report
from sparsify.bench import product_times
from sparsify.kernels.cusparselt_search import Problem, search
from sparsify.kernels.semi_structured import CUSPARSELT

# For one of cuSPARSELt's problems, and for those of one shape.
_ANSWER_S, _SEARCH_S = 30.0, 60.0


def measure(report: Report, wanted: Sequence[Case]) -> None:
    """Measure those of ``wanted`` that no record has, as far as the budget goes."""
    left = [case for case in wanted if case.what not in report.done]
    with_searches = left if CUSPARSELT.absent(report.device) else searches(left, report.sizes)
    named = [(case.what, case) for case in with_searches if case.what not in report.done]
    built: Linears | None = None
    for what, case in report.affordable(named, lambda case: case.kind):
        report.begin(what)
        if isinstance(case, Generation):
            if built is None or built.pattern != case.pattern:
                built = None  # before there is another
                built = build_linears(report, case.pattern)
                report.begin(what)
            measure_generation(report, case, built)
            continue
        built = None
        if isinstance(case, Search):
            _search(report, case)
        else:
            _measure_product(report, case)


def _measure_product(report: Report, case: Product) -> None:
    packed = packed_weight(case.shape, case.pattern, report.options.device)
    n_weights = report.sizes.layers * sum(map(math.prod, report.sizes.fused().values()))
    n_bytes = round(n_weights * packed.n_bytes / math.prod(case.shape))
    label = report.artifact(case.pattern, case.pattern, n_bytes)
    n_copied = 1 << 16 if report.options.tiny else 0
    rows = 0
    for fields in product_times.measure(
        packed, [case.tokens], report.options.rounds, report.ceilings,
        lambda why: report.failed(f"{case.what}: {why.partition(',')[0]}", why), n_bytes=n_copied,
    ):  # fmt: skip
        report.out.write(
            "kernel", artifact=label, linear=case.linear, linears=case.linears, shape=list(case.shape),
            pattern=case.pattern, **fields,
        )  # fmt: skip
        rows += 1
        shown = {name: f"{times['median_us']:.1f} us" for name, times in fields["kernels"].items()}
        print(f"{case.what}: {shown}", flush=True)
    if report.device.type == "cuda":
        # An error that a kernel leaves behind is this case's, and not that of the next.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    if not rows:
        report.failed(case.what, "no dense product could be timed")


class _Spent(Exception):
    """A search has taken its time."""


def _search(report: Report, case: Search) -> None:
    """Have cuSPARSELt's algorithms searched for in one process; what there is no time for, products search for."""
    problems = list(dict.fromkeys(Problem(*case.shape, -(-tokens // 8) * 8, "bfloat16") for tokens in case.tokens))
    started = time.monotonic()

    def told(problem: Problem, row: dict[str, Any]) -> None:
        if "failed" in row:
            report.failed(f"search {problem.key}", row["failed"])
        if time.monotonic() - started > _SEARCH_S and problem != problems[-1]:
            raise _Spent(f"{problem.key} is the last that {_SEARCH_S:.0f} s were enough for")

    try:
        search(problems, report.device, min(_ANSWER_S, max(1.0, report.left_s / 2)), told)
    except _Spent as spent:
        report.not_run(f"{case.what}: rest", str(spent))
    except Exception as error:  # products are right without it
        report.failed(case.what, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

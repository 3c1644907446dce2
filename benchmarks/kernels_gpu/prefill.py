"""The stage that times many tokens: cuSPARSELt, with the algorithms that were found, against cuBLAS."""

from __future__ import annotations

import argparse
from typing import Any

from gpu_machine.timing import measure_ceilings

from kernels_gpu.layers import FP8, Record, Variant, shapes, variants
from kernels_gpu.timing import CLOCK, add_bound, summary, time_variants


def prefill(options: argparse.Namespace) -> int:
    """Time 2:4 and dense products of 2048 tokens and more; 8-bit floats stand beside what they gain without zeros."""
    import torch

    record = Record("prefill", options)
    on_gpu = options.device == "cuda"
    names = options.kernels or (["cusparselt", FP8] if on_gpu else ["packed"])
    ceilings = measure_ceilings(options.device, options.tiny)
    rows: list[dict[str, Any]] = []
    record.body |= {
        "ceilings": ceilings, "timing": CLOCK[options.device],
        "dtype": "bfloat16", "rows": rows,
    }  # fmt: skip
    cases = [(f"prefill {name}", (name, shape)) for name, shape in shapes(options).items()]
    for what, (name, shape) in record.affordable(cases):
        found, refused = variants(shape, "2:4", names, options.device, 1)
        for kernel, why in refused.items():
            record.not_run(f"{what} {kernel}", why)
        if on_gpu:
            found["dense_fp8"] = _dense_fp8(found["dense"])
        for tokens in options.tokens:
            x = torch.randn(tokens, shape[1], device=options.device, dtype=torch.bfloat16)
            entries, failed = time_variants(found, x, options.samples, on_gpu)
            for kernel, why in failed.items():
                record.failed(f"{what}, {tokens} tokens, {kernel}", why)
            add_bound(entries, shape, tokens, ceilings)
            for kernel in entries:
                entries[kernel]["algorithm"] = _algorithm(kernel, shape, tokens) if on_gpu else None
            rows.append({"layer": name, "shape": shape, "tokens": tokens, "variants": entries})
            shown = {key: f"{entry['us']['median']:.0f} us" for key, entry in entries.items()}
            print(f"{what}, {tokens} tokens: {shown}", flush=True)
        record.body["summary"] = [*summary(rows, ("tokens",)), *summary(rows, ())]
        record.write()
    for line in record.body.get("summary", []):
        print(line)
    return record.close()


def _dense_fp8(dense: Variant) -> Variant:
    """The dense weight in 8-bit floats, input rounded at each call: torch's scaled product."""
    import torch

    from sparsify.kernels.semi_structured import to_fp8

    copy: Any = dense.copies[0]
    weight, scale = to_fp8(copy.keywords["weight"], None)

    def run(x: torch.Tensor) -> torch.Tensor:
        rounded, of_input = to_fp8(x, None)
        result: torch.Tensor = torch._scaled_mm(
            rounded, weight.t(), scale_a=of_input, scale_b=scale, out_dtype=torch.bfloat16
        )
        return result

    return Variant(weight.nbytes, [run], 0.08)


def _algorithm(kernel: str, shape: tuple[int, int], tokens: int) -> dict[str, Any] | None:
    """Which of the library's algorithms ran."""
    import torch

    from sparsify.kernels.cusparselt_search import DEFAULT, Problem, algorithm

    dtype = {"cusparselt": "bfloat16", FP8: "float8_e4m3fn"}.get(kernel)
    if dtype is None:
        return None
    found = algorithm(torch.device("cuda", 0), Problem(*shape, tokens, dtype))
    return {**found.options(), "default": found == DEFAULT}

"""The stage that times an artifact's own engines: the sparse one against its dense twin."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from gpu_machine import record

from onnx_gpu.run import PACKAGES
from onnx_gpu.timing import time_sessions

ENGINES = {"sparse": "model.engine", "dense": "dense.engine"}


def twin(options: argparse.Namespace) -> int:
    """Prefill and decoding of both engines in turn, in tokens per second; lengths and batches are the engine's own."""
    from sparsify.errors import SparsifyError
    from sparsify.runtimes.tensorrt_session import TensorRtSession

    found = record.Record("onnx_gpu twin", options, PACKAGES)
    with ExitStack() as stack:
        try:
            sessions = {
                name: stack.enter_context(
                    TensorRtSession(
                        options.artifact,
                        engine=file,
                        cuda_graphs=options.cuda_graphs,
                        trust_engine=options.trust_engine,
                    )
                )
                for name, file in ENGINES.items()
            }
        except SparsifyError as error:
            found.not_run("both engines", str(error))
            return found.close()
        limits = sessions["sparse"].limits
        length = min(128, limits.max_prompt)
        arguments = {
            "sizes": {"vocabulary": sessions["sparse"].vocab_size},
            "lengths": sorted({length, limits.max_prompt}),
            "batches": sorted({limits.min_batch, limits.max_batch}),
            "new_tokens": min(options.new_tokens, limits.max_tokens - length - 1),
            "repeats": options.repeats,
        }
        found.body |= {"timing": arguments, "engaged": sessions["sparse"].engaged(), "rows": []}
        rates: dict[tuple[str, int, int], dict[str, float]] = {}
        for row in time_sessions(sessions, arguments):
            found.body["rows"].append(row)
            if row.get("ok") is False:
                found.failed(row["case"], row["why"])
            elif "not_run" in row:
                found.not_run(row["not_run"], row["why"])
            elif row["tokens_per_s"]:
                key = row["timed"], row["batch"], row["length"]
                rates.setdefault(key, {})[row["session"]] = row["tokens_per_s"]
    for (kind, batch, length), rate in rates.items():
        if len(rate) == len(ENGINES):
            sparse, dense = rate["sparse"], rate["dense"]
            times = f"sparse {sparse:.0f}, dense {dense:.0f} tokens/s, {sparse / dense:.2f} times as fast"
            print(f"{kind}, batch {batch}, {length} tokens: {times}")
    return found.close()

"""Does our harness time a vLLM engine as vLLM's own `vllm bench latency` does? Same model, lengths, batch and settings.

In each round vLLM's tool runs in a process of its own, and then a worker of ours that is as fresh: both make one
generation that does not count, and then as many that do. A worker that had waited while the other ran would be another
experiment: on shared machines what has been idle is slower. vLLM's tool samples at temperature 1, ours is greedy.

    python benchmarks/agreement_vllm.py --python .venv-vllm/bin/python --model DIR --out FILE
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from provenance import commit

from sparsify.bench.host import environment
from sparsify.bench.spread import spread
from sparsify.bench.workers import WorkerProcess
from sparsify.runtimes import Runtime

PROMPT, NEW = 128, 32
# What `vllm bench latency` runs. The command itself does not start from a CPU build, whose package has another name.
_LATENCY = """
from vllm.benchmarks import latency
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
latency.add_cli_args(parser)
latency.main(parser.parse_args())
"""
VARIABLES = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
}  # fmt: skip


def theirs(options: argparse.Namespace, batch: int) -> list[float]:
    """Seconds of each of ``options.calls`` generations by vLLM's tool, after one that does not count."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "latency.json"
        command = [
            str(Path(options.python).absolute()), "-c", _LATENCY, "--model", str(options.model),
            "--input-len", str(PROMPT), "--output-len", str(NEW), "--batch-size", str(batch), "--dtype", "bfloat16",
            "--num-iters-warmup", "1", "--num-iters", str(options.calls), "--disable-detokenize", "--enforce-eager",
            "--max-model-len", str(PROMPT + NEW + 1), "--max-num-seqs", str(batch), "--skip-tokenizer-init",
            "--output-json", str(out),
        ]  # fmt: skip
        with (Path(folder) / "log").open("wb") as log:
            done = subprocess.run(command, env={**os.environ, **VARIABLES}, stdout=log, stderr=log, cwd=folder)
        if done.returncode:
            raise SystemExit((Path(folder) / "log").read_text(errors="replace")[-2000:])
        found: list[float] = json.loads(out.read_text(encoding="utf-8"))["latencies"]
        return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of the environment with vLLM")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    record: dict[str, Any] = {
        "benchmark": "agreement_vllm",
        "commit": commit(),
        "environment": environment(options.threads),
        "arguments": {key: str(value) for key, value in vars(options).items()},
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "results": [],
    }
    vocab_size = json.loads((options.model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    for batch in options.batches:
        runtime = Runtime("vllm", dtype="bfloat16", max_length=PROMPT + NEW, max_batch=batch)
        arguments = {"seed": 0, "prompt_tokens": PROMPT, "batch": batch, "n": NEW}
        rounds = []
        for _ in range(options.rounds):
            other = theirs(options, batch)
            with WorkerProcess("ours", python=options.python, variables=VARIABLES, timeout_s=900) as worker:
                opened = worker.ask(
                    "open",
                    path=str(options.model),
                    runtime=asdict(runtime),
                    vocab_size=vocab_size,
                    probe=2,
                    trust_remote_code=False,
                )
                record["session"] = opened["session"]
                worker.ask("stream", **arguments)
                ours = [worker.ask("stream", **arguments)["total_s"] for _ in range(options.calls)]
            rounds.append({"ours_s": ours, "theirs_s": other})
        ratios = [statistics.median(each["ours_s"]) / statistics.median(each["theirs_s"]) for each in rounds]
        result = {
            "batch": batch,
            "ours_over_theirs": spread(ratios),
            "ours_s": spread([value for each in rounds for value in each["ours_s"]]),
            "theirs_s": spread([value for each in rounds for value in each["theirs_s"]]),
            "rounds": rounds,
        }
        record["results"].append(result)
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        line = {key: result[key] for key in ("batch", "ours_over_theirs", "ours_s", "theirs_s")}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

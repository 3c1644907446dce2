"""Does our harness time a vLLM engine as vLLM's own `vllm bench latency` and `throughput` do? Same model and settings.

In each round vLLM's tool runs in a process of its own, and then a worker of ours that is as fresh: both make one
generation that does not count, and then as many that do (`throughput` makes one). A worker that had waited while the
other ran would be another experiment: on shared machines what has been idle is slower. vLLM's tools sample at
temperature 1, ours is greedy.

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
# What `vllm bench TOOL` runs. The command itself does not start from a CPU build, whose package has another name.
_TOOL = """
from vllm.benchmarks import {tool}
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
{tool}.add_cli_args(parser)
{tool}.main(parser.parse_args())
"""
TOOLS = ("latency", "throughput")
VARIABLES = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
}  # fmt: skip


def theirs(options: argparse.Namespace, tool: str, batch: int) -> list[float]:
    """Seconds of each generation by vLLM's tool, after one that does not count."""
    if tool == "latency":
        own = ["--batch-size", batch, "--num-iters-warmup", 1, "--num-iters", options.calls, "--skip-tokenizer-init"]
        own += ["--input-len", PROMPT, "--output-len", NEW]
    else:
        own = ["--num-prompts", batch, "--num-warmups", batch]
        own += ["--random-input-len", PROMPT, "--random-output-len", NEW]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [
            str(Path(options.python).absolute()), "-c", _TOOL.format(tool=tool), "--model", str(options.model),
            "--dtype", "bfloat16", "--disable-detokenize", "--enforce-eager", "--max-num-seqs", str(batch),
            "--max-model-len", str(2 * PROMPT + NEW), "--output-json", str(out), *map(str, own),
        ]  # fmt: skip
        with (Path(folder) / "log").open("wb") as log:
            done = subprocess.run(command, env={**os.environ, **VARIABLES}, stdout=log, stderr=log, cwd=folder)
        if done.returncode:
            raise SystemExit((Path(folder) / "log").read_text(errors="replace")[-2000:])
        found = json.loads(out.read_text(encoding="utf-8"))
        if tool == "latency":
            return list(found["latencies"])
        # Its prompts are text that is tokenised again, which moves their lengths a little.
        share = found["total_num_tokens"] / (batch * (PROMPT + NEW))
        if not 0.95 <= share <= 1.05:
            raise SystemExit(f"vLLM's tool ran {share:.2f} of the tokens that it was asked for")
        return [found["elapsed_time"]]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of the environment with vLLM")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tool", choices=TOOLS, default=TOOLS[0])
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
        # No paths of a machine in a record.
        "arguments": {key: getattr(options, key) for key in ("tool", "batches", "rounds", "calls", "threads")},
        "model": options.model.name,
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
            other = theirs(options, options.tool, batch)
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
                ours = [worker.ask("stream", **arguments)["total_s"] for _ in other]
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

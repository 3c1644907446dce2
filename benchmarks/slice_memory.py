"""Peak memory and time of pruning one block as wide as those of Llama 70B or 405B, and what the whole model would take.

    python benchmarks/slice_memory.py --shape 70b --out benchmarks/results/slice_memory_70b.json

A Llama of a few blocks of random weights is planned and pruned by each method, by the command line, in a process of its
own. That is killed once it is resident with more than `--limit-gib`, and its peak recorded; the budget's own refusal is
off, so that the limit decides. The record is written after every method.

A whole model takes its number of blocks times the seconds of a block. Where its blocks have another shape than those
measured, each step takes as much more as its operations do (`sparsify.budget.operations`, at the rates of this
machine). The last block puts nothing out; of a slice of one block that step is the products of its passes, at the pace
that the statistics had. What is done once (hashes, what is outside the blocks) is planned, not measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depth_memory import make_model
from provenance import commit

if TYPE_CHECKING:
    from sparsify.budget.operations import Rates, Work
    from sparsify.budget.shapes import Block, Shapes

SHAPES = {
    "small": {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 2},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
    "405b": {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "num_key_value_heads": 8},
}
# Of whole models: blocks and vocabulary.
WHOLE = {"70b": (80, 128256), "405b": (126, 128256)}
_EVERY_S = 0.1
_DOES_NOT_FIT = 12
# What terms of ``block_work`` begin with -> the step of the journal they belong to; all others are the solver's.
_STEPS = {
    "reading the block": "load",
    "converting and checking": "load",
    "writing it": "write",
    "forward passes": "statistics",
    "hidden states": "statistics",
    "Gram matrix": "statistics",
    "drift": "statistics",
    "shift": "statistics",
    "norms": "statistics",
}


# --- one run ---------------------------------------------------------------------------------------------------------


@dataclass
class Peak:
    """What a process was resident with at most, bytes: in all, and without pages of files; and whether it was ended."""

    rss_bytes: int = 0
    anonymous_bytes: int = 0
    killed: bool = False


def watched(command: list[str], limit_bytes: int) -> tuple[subprocess.CompletedProcess[str], Peak]:
    """Run ``command``, and kill it when it is resident with more than ``limit_bytes``."""
    peak, over = Peak(), threading.Event()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def watch() -> None:
        while not over.wait(_EVERY_S):
            sizes = resident(process.pid)
            peak.rss_bytes = max(peak.rss_bytes, sizes.get("VmRSS", 0), sizes.get("VmHWM", 0))
            peak.anonymous_bytes = max(peak.anonymous_bytes, sizes.get("RssAnon", 0))
            if peak.rss_bytes > limit_bytes and not peak.killed:
                peak.killed = True
                process.kill()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        out, err = process.communicate()
    finally:
        over.set()
        watcher.join()
        if process.poll() is None:
            process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, err), peak


def resident(pid: int) -> dict[str, int]:
    """Sizes of a process in /proc, bytes by name; nothing where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def steps_of(out: Path) -> dict[str, float]:
    """Seconds of each step of the block that took longest at it, from the journal of a run, finished or not."""
    found: dict[str, float] = {}
    for folder in (out, out.with_name(f"{out.name}.partial")):
        journal = folder / "journal.jsonl"
        for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else ():
            event = json.loads(line)
            if event["event"] == "block":
                for step, seconds in event["seconds"].items():
                    found[step] = max(found.get(step, 0.0), seconds)
    return found


def run_method(method: str, model: Path, out: Path, arguments: list[str], limit_bytes: int) -> dict[str, Any]:
    """Plan and prune; the record without what is extrapolated from it."""
    shared = [str(model), "--method", method, *arguments, "--out", str(out), "--json"]
    command = [sys.executable, "-m", "sparsify"]
    done = subprocess.run([*command, "plan-memory", *shared], capture_output=True, text=True, check=False)
    if done.returncode not in (0, _DOES_NOT_FIT):
        raise SystemExit(done.stderr)
    planned = json.loads(done.stdout)
    record: dict[str, Any] = {
        "method": method,
        "planned_bytes": planned["memory_bytes"],
        "planned_seconds": [planned["time"]["seconds_low"], planned["time"]["seconds_high"]],
        "largest": max(planned["phases"], key=lambda phase: phase["host_bytes"])["phase"],
        "rates_per_s": planned["time"]["rates_per_s"],
    }
    ran, peak = watched([*command, "prune", *shared, "--no-budget"], limit_bytes)
    if ran.returncode and not peak.killed:
        raise SystemExit(ran.stderr)
    answer = {} if peak.killed else json.loads(ran.stdout)
    # The last reading may be older than the peak; the process knows its own.
    peak.rss_bytes = max(peak.rss_bytes, answer.get("peak_memory_bytes", 0))
    return record | {
        "killed": peak.killed,
        "peak_bytes": peak.rss_bytes,
        "peak_anonymous_bytes": peak.anonymous_bytes,
        "seconds": answer.get("seconds"),
        "threads": answer.get("threads"),
        "steps_seconds": steps_of(out),
    }


# --- whole models ----------------------------------------------------------------------------------------------------


def shapes_for(folder: Path, method: str, arguments: dict[str, Any]) -> tuple[Shapes, Any]:
    """Shapes of the model of ``folder``, which may hold a config alone, and the recipe for its budget."""
    from sparsify.budget.estimate import budget_of
    from sparsify.recipe import Recipe

    budget = budget_of(folder, folder.name, Recipe(method=method, **arguments))
    return budget.shapes, budget.recipe


def seconds_by_step(works: Iterable[Work], rates: Rates) -> dict[str, float]:
    """Seconds of the terms of a block by step, halfway between the least and the most."""
    found = {"load": 0.0, "statistics": 0.0, "solve": 0.0, "write": 0.0}
    for work in works:
        step = next((step for begin, step in _STEPS.items() if work.what.startswith(begin)), "solve")
        found[step] += sum(work.seconds(rates)) / 2
    return found


def putting_out(block: Block, recipe: Any, rates: Rates) -> float:
    """Seconds of the products of the pass after a block is pruned, and of what the last of its dense ones does more."""
    passes = (recipe.plan.inputs == "pruned" or recipe.plan.aim == "own") + 0.5 * (recipe.plan.aim != "own")
    tokens: int = recipe.windows * recipe.length
    return 2.0 * tokens * sum(linear.n_weights for linear in block.linears) * float(passes) / rates.product


def extrapolated(
    measured: dict[str, float], here: tuple[Shapes, Any], there: tuple[Shapes, Any], rates: Rates
) -> dict[str, Any]:
    """Seconds of a whole model from those of a block, step by step, with the factors they were multiplied by."""
    from sparsify.budget.operations import block_work, rest_work

    (shapes, recipe), (whole, others) = here, there
    ours = seconds_by_step(block_work(shapes, shapes.blocks[0], recipe), rates)
    theirs = seconds_by_step(block_work(whole, whole.blocks[0], others), rates)
    steps = dict(measured)
    if "outputs" not in steps:
        pace = measured["statistics"] / ours["statistics"] if ours["statistics"] else 1.0
        steps["outputs"] = putting_out(shapes.blocks[0], recipe, rates) * pace
    outputs = putting_out(whole.blocks[0], others, rates) / putting_out(shapes.blocks[0], recipe, rates)
    factors = {step: outputs if step == "outputs" else theirs[step] / ours[step] for step in steps}
    a_block = {step: steps[step] * factors[step] for step in steps}
    once = sum(sum(work.seconds(rates)) / 2 for work in rest_work(whole, others))
    return {
        "blocks": whole.n_blocks,
        "factors": factors,
        "block_steps_seconds": a_block,
        "block_seconds": sum(a_block.values()),
        "once_seconds": once,
        "seconds": whole.n_blocks * sum(a_block.values()) + once,
    }


def configs(scratch: Path, length: int) -> Iterator[tuple[str, Path]]:
    """Folders with the config of whole models."""
    import transformers

    for name, (blocks, vocabulary) in WHOLE.items():
        transformers.LlamaConfig(
            **SHAPES[name],
            num_hidden_layers=blocks,
            vocab_size=vocabulary,
            max_position_embeddings=length,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
        ).save_pretrained(scratch / name)
        yield name, scratch / name


def arithmetic(name: str, measured: dict[str, float], found: dict[str, Any]) -> str:
    """The extrapolation in words."""
    terms = [
        f"{step} {measured[step]:.1f} x {found['factors'][step]:.3g}" if step in measured
        else f"{step} {seconds:.1f} (not measured)" for step, seconds in found["block_steps_seconds"].items()
    ]  # fmt: skip
    return (
        f"{name}: a block {' + '.join(terms)} = {found['block_seconds']:.1f} s; x {found['blocks']} blocks + "
        f"{found['once_seconds']:.0f} s once = {found['seconds'] / 3600:.2f} h"
    )


def main() -> None:
    """Every method; table, arithmetic and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="70b")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--methods", nargs="+", default=["sparsegpt", "admm", "fast"])
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--compute-dtype", default="bfloat16")
    parser.add_argument("--limit-gib", type=float, default=16.0)
    parser.add_argument("--scratch", type=Path, help="where model and output lie meanwhile")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import torch
    from safetensors.torch import save_file

    from sparsify.budget.operations import Rates

    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        scratch = Path(folder)
        model, ids = scratch / "model", scratch / "ids.safetensors"
        make_model(model, options.blocks, SHAPES[options.shape], options.length)
        drawn = torch.randint(0, 1024, (options.windows, options.length), generator=torch.Generator().manual_seed(0))
        save_file({"ids": drawn}, ids)
        wholes = dict(configs(scratch, options.length))
        fields = {"pattern": options.pattern, "calibration": f"{ids}:ids", "compute_dtype": options.compute_dtype}
        arguments = [part for key, value in fields.items() for part in (f"--{key.replace('_', '-')}", value)]
        print(
            "| method | planned GiB | peak GiB | anonymous | planned s | took s | load | statistics | solve | outputs "
            "| write | threads |\n|---|--:|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|"
        )
        for number, method in enumerate(options.methods):
            record = run_method(method, model, scratch / f"out-{number}", arguments, int(options.limit_gib * 2**30))
            record["extrapolated"] = {}
            if not record["killed"]:
                rates = Rates(**record["rates_per_s"])
                here = shapes_for(model, method, fields)
                record["extrapolated"] = {
                    name: extrapolated(record["steps_seconds"], here, shapes_for(path, method, fields), rates)
                    for name, path in wholes.items()
                }
            records.append(record)
            print(row(record), flush=True)
            if options.out:
                body = {"commit": commit(), "shape": options.shape, **SHAPES[options.shape], "blocks": options.blocks,
                        "windows": options.windows, "length": options.length, "pattern": options.pattern,
                        "compute_dtype": options.compute_dtype, "limit_gib": options.limit_gib,
                        "extrapolation": method_of_extrapolation(), "records": records}  # fmt: skip
                options.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    for record in records:
        for name, found in record["extrapolated"].items():
            print(f"\n{record['method']}, {arithmetic(name, record['steps_seconds'], found)}")


def method_of_extrapolation() -> str:
    """How whole models follow from a slice, as above."""
    return " ".join((__doc__ or "").split("\n\n")[3].split())


def row(record: dict[str, Any]) -> str:
    """A line of the table."""
    low, high = record["planned_seconds"]
    steps = record["steps_seconds"]
    times = [f"{steps[step]:.1f}" if step in steps else "" for step in ("load", "statistics", "solve", "outputs")]
    took = "killed" if record["killed"] else f"{record['seconds']:.0f}"
    cells = [
        record["method"],
        *(f"{record[key] / 2**30:.2f}" for key in ("planned_bytes", "peak_bytes", "peak_anonymous_bytes")),
        f"{low:.0f} to {high:.0f}",
        took,
        *times,
        f"{steps['write']:.1f}" if "write" in steps else "",
        str(record["threads"] or ""),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

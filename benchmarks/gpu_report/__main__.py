"""What sparsity gains on this GPU for models of Llama-3.1-8B's shape with random weights: measured, recorded, rendered.

Not yet run on a GPU. One command, for a machine with torch, triton, jinja2, matplotlib and jsonschema, and a copy of
this checkout, but no network:

    python benchmarks/gpu_report --out DIR --budget-s 800

writes DIR/records.jsonl (docs/formats.md), DIR/cache (the launches and algorithms that were found fastest) and
DIR/report (`sparsify report`). What matters most comes first: 1, 8 and 64 tokens of every linear, prefill of 2048, a
whole model, then the numbers between, and sparsities of 60 and 70 %. What the budget is not enough for is recorded as
not measured, and measured where the same command is given again: what DIR/records.jsonl has is not measured twice.

Each product is timed dense, by torch and by cuBLASLt through torch, and by every kernel of the GPU in turn, in CUDA
graphs over copies of its weight that exceed the L2 cache; products that differ from the dense one are recorded as
failed. cuSPARSELt's algorithms are searched for in processes of their own under a time-out, one for a shape.
Everything else runs in one process that a kernel may take down with it: what it was at is then recorded as failed, and
the next process goes on behind it.

What a machine without a network lacks of jsonschema, jinja2 and matplotlib is packed elsewhere, for Python 3.12:

    python benchmarks/gpu_report --pack --out DIR      # take DIR/site there and put it on PYTHONPATH

Exit status: 0 all well, 1 something failed, 3 something was not measured. `--device cpu --tiny` runs the machinery on
an ordinary machine, with the kernels that it has; those of GPUs are then recorded as missing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

# A folder that is run is on the path itself; its modules are those of a package, beside the other benchmarks.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_machine.record import NOT_RUN, WRONG
from gpu_machine.wheels import REPORTING, download, lay_out

from gpu_report.cases import PATTERNS, SIZES, cases

# Below this a new process would do nothing but start.
_LEAST_S = 30.0
# Of a process that an error ended.
_ENDED = 4
# Records are checked with the first two, rpds being the compiled part of jsonschema.
_NEEDED, _DRAWING = ("torch", "safetensors", "jsonschema", "rpds"), ("jinja2", "matplotlib")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "gpu_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=800)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="sizes that an ordinary machine runs in seconds")
    parser.add_argument("--size", default="8b", choices=list(SIZES), help="of 70b: single linears only")
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), help="2:4, or a share of zeros")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-render", dest="render", action="store_false", help="records only")
    parser.add_argument("--pack", action="store_true", help="write the packages of records and reports to DIR/site")
    parser.add_argument("--measure", action="store_true", help="in this process, which may not come back")
    return parser.parse_args(arguments)


def pack(options: argparse.Namespace) -> int:
    """Download what a GPU machine without a network may lack, as files that PYTHONPATH can name."""
    with tempfile.TemporaryDirectory() as scratch:
        wheels = download(Path(scratch), REPORTING)
        lay_out(wheels, options.out, lambda wheel, name: "site")
    print(f"take {options.out / 'site'} to the GPU machine (Python 3.12, x86-64) and add it to PYTHONPATH there")
    return 0


def unimportable(render: bool) -> str | None:
    """What to do about packages without which a run would end late or only start; None: they are all there."""
    lacking = []
    for name in (*_NEEDED, *(_DRAWING if render else ())):
        try:
            importlib.import_module(name)
        except ImportError as error:  # rpds is compiled, for one version of Python
            lacking.append(f"{name} ({error})")
    if not lacking:
        return None
    return (
        f"cannot import {', '.join(lacking)}; pip install them, or where there is a network write the wheels' files by "
        "`python benchmarks/gpu_report --pack --out DIR`, and put DIR/site on PYTHONPATH here"
    )


def run(options: argparse.Namespace) -> int:
    """Measure in processes of their own until everything is measured or the budget is spent, and render."""
    from gpu_report.report import RECORDS, last_begun

    started = time.monotonic()
    if why := unimportable(options.render):
        print(why)
        return NOT_RUN
    options.out.mkdir(parents=True, exist_ok=True)
    arguments = [
        "--out", options.out, "--device", options.device, "--size", options.size, "--rounds", options.rounds,
        "--patterns", *options.patterns, *(["--tiny"] if options.tiny else []), "--measure",
    ]  # fmt: skip
    status, before = NOT_RUN, last_begun(options.out)
    while (left := options.budget_s - (time.monotonic() - started)) > (0 if options.tiny else _LEAST_S):
        command = [sys.executable, Path(__file__).parent, *arguments, "--budget-s", left]
        # A kernel that hangs is ended some time after the budget.
        try:
            status = subprocess.run([str(part) for part in command], timeout=left + _LEAST_S, check=False).returncode
        except subprocess.TimeoutExpired:
            status = -1
        what = last_begun(options.out)
        if status in (0, WRONG, NOT_RUN) and what is None:
            break
        print(f"the process ended with status {status} at {what or 'its start'}", flush=True)
        # A process that starts records what the last one was at, and leaves it out.
        if what in (None, before):
            status = status or WRONG
            break
        before = what
    if status not in (0, WRONG, NOT_RUN):
        status = WRONG
    if options.render and (options.out / RECORDS).exists():
        command = [sys.executable, "-m", "sparsify", "report", options.out / RECORDS, "--out", options.out / "report"]
        rendered = subprocess.run([*map(str, command), "--overwrite"], check=False).returncode
        status = status or (WRONG if rendered else 0)
    return status


def main() -> int:
    options = parse(sys.argv[1:])
    if options.pack:
        return pack(options)
    # What a search finds is kept beside the records.
    os.environ["SPARSIFY_CACHE"] = str(options.out / "cache")
    if not options.measure:
        return run(options)
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("no CUDA device: this needs an NVIDIA GPU and a CUDA build of torch; try --device cpu --tiny")
            return NOT_RUN
    from gpu_report.measuring import measure
    from gpu_report.report import Report

    try:
        with Report(options) as report:
            measure(report, cases(options))
    except Exception:
        # What is wrong with a GPU's context stays wrong in this process, and Triton's errors have no common class.
        traceback.print_exc()
        return _ENDED
    return report.status


if __name__ == "__main__":
    sys.exit(main())

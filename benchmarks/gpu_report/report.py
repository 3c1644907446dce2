"""The records of a run, and what was at work when a process did not come back."""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from gpu_machine.llama import Llama
from gpu_machine.record import NOT_RUN, WRONG, Budget

from gpu_report.cases import SIZES, TINY, Generation, Product
from sparsify.bench.host import environment, gpu, load
from sparsify.bench.records import read, writer
from sparsify.kernels.dispatch import GPU_KERNELS
from sparsify.roofline.ceilings import measure_ceilings
from sparsify.types import parse_pattern

RECORDS, BEGUN = "records.jsonl", "begun.txt"
# On a GPU: a buffer that is read in less time than a few launches take says little of its memory.
_CEILING_BYTES = 4 << 30


def last_begun(out: Path) -> str | None:
    """The case that the last process was at when it ended."""
    path = out / BEGUN
    return path.read_text(encoding="utf-8") if path.exists() else None


class Report(Budget):
    """A run that writes records of what it measures.

    Attributes:
        options: what was asked for.
        sizes: of the model.
        device: where products run.
        done: cases that records have, of this run and of those before.
        out: the writer of records.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options.budget_s)
        self.options = options
        self.sizes: Llama = TINY if options.tiny else SIZES[options.size]
        self.device = torch.device(options.device)
        self._started = time.monotonic()
        self._failed = self._missing = 0
        self._unaffordable: list[str] = []
        self._stack = ExitStack()
        self._artifacts: set[str] = set()
        path = options.out / RECORDS
        known = read([path]).lines if path.exists() else ()
        self.done = {_done(line) for line in known if line["record"] == "kernel"}
        self.done |= {line["what"] for line in known if line["record"] == "missing" and line["failed"]}
        self.done |= {_generated(line) for line in known if line["record"] == "latency" and line["baseline"]}
        self.out = self._stack.enter_context(writer(path, append=path.exists()))
        self.ceilings = measure_ceilings(options.device, **_ceiling_sizes(options)).device

    def __enter__(self) -> Self:
        self.out.write(
            "run", command=sys.argv, seed=0, rounds=self.options.rounds, warm_up=3, environment=environment(None),
            ceilings=[self.ceilings.to_record()],
        )  # fmt: skip
        if what := last_begun(self.options.out):
            if what in self.done:  # that process could say itself what was wrong
                self._failed += 1
            else:
                self.failed(what, "the process that measured it did not come back")
                self.done.add(what)
            (self.options.out / BEGUN).unlink()
        for kernel in GPU_KERNELS:
            if why := kernel.absent(self.device):
                self.not_run(f"kernel {kernel.name}", why)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        if kind is None:
            if cases := self._unaffordable:
                why = f"the budget of {self.options.budget_s:.0f} s is spent; give the same command again"
                self.not_run(f"{len(cases)} cases, from {cases[0]} to {cases[-1]}", why)
            (self.options.out / BEGUN).unlink(missing_ok=True)
        elif what := last_begun(self.options.out):
            # What is left behind tells who started this process that there is a rest to be measured.
            self.failed(what, f"{kind.__name__}: {' '.join(str(error).split())[:300]}")
        self.out.write("end", seconds=time.monotonic() - self._started, failed=self._failed, load_1m=load(), gpu=gpu())
        self._stack.close()

    @property
    def status(self) -> int:
        """Exit status."""
        return WRONG if self._failed else NOT_RUN if self._missing else 0

    def failed(self, what: str, why: str) -> None:
        """Record that ``what`` gave a wrong result or crashed."""
        self._failed += 1
        self.done.add(what)
        self._write_missing(what, why, failed=True)

    def not_run(self, what: str, why: str) -> None:
        """Record that ``what`` was not measured."""
        self._missing += 1
        self._write_missing(what, why, failed=False)

    def unaffordable(self, what: str, why: str) -> None:
        """Note it, to be recorded with all others of its kind."""
        self._unaffordable.append(what)

    def _write_missing(self, what: str, why: str, *, failed: bool) -> None:
        print(f"{'WRONG  ' if failed else 'NOT RUN'} {what}: {why}", flush=True)
        self.out.write("missing", what=what, why=why, failed=failed, artifact=None, runtime=None, scenario=None)

    def begin(self, what: str) -> None:
        """Leave behind what is being measured now."""
        (self.options.out / BEGUN).write_text(what, encoding="utf-8")

    def artifact(self, label: str, pattern: str | None, n_bytes: int) -> str:
        """Describe what is measured, once; returns its label."""
        if label in self._artifacts:
            return label
        self._artifacts.add(label)
        model = f"random weights, llama {self.options.size}{' (tiny)' if self.options.tiny else ''}"
        self.out.write(
            "artifact", artifact=label, path=model, role="candidate" if pattern else "baseline", kind="random",
            model=model, pattern=pattern, method="magnitude" if pattern else None,
            sparsity=float(parse_pattern(pattern).sparsity) if pattern else None, precision="bfloat16",
            # There are no files: what tells it is its description.
            sha256=hashlib.sha256(f"{model} {label}".encode()).hexdigest(), source_sha256=None, tokenizer_sha256=None,
            file_bytes=n_bytes, weight_bytes=n_bytes, linears=len(self.sizes.fused()) * self.sizes.layers,
        )  # fmt: skip
        return label


def _ceiling_sizes(options: argparse.Namespace) -> dict[str, Any]:
    if options.tiny:
        return {"quick": True, "n_bytes": 1 << 20, "size": 64}
    return {"quick": False, "n_bytes": _CEILING_BYTES} if options.device == "cuda" else {"quick": True}


def _done(kernel: dict[str, Any]) -> str:
    return Product(
        kernel["linear"], kernel["linears"], (kernel["shape"][0], kernel["shape"][1]), kernel["pattern"],
        kernel["tokens"],
    ).what  # fmt: skip


def _generated(latency: dict[str, Any]) -> str:
    scenario = latency["scenario"]
    pattern = latency["artifact"].partition(" ")[0]
    return Generation(pattern, scenario["batch"], scenario["prompt_tokens"], scenario["new_tokens"]).what

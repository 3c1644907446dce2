"""One runtime of a run: all its artifacts are held at once and asked in turn, and what is complete is recorded.

The baseline is held twice (``rounds``). A run goes on where a measurement fails, and ends where records cannot be
written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from sparsify.bench import host
from sparsify.bench.accuracy import perplexity_record, task_records
from sparsify.bench.latency import latency_record
from sparsify.bench.records import Writer
from sparsify.bench.request import Request, Scenario
from sparsify.bench.roofs import Roofs
from sparsify.bench.rounds import Held, steps, take_rounds
from sparsify.bench.subjects import Subject
from sparsify.bench.workers import WorkerProcess
from sparsify.checkpoint import read_config
from sparsify.errors import MeasurementError, ModelError, OutputError, SparsifyError
from sparsify.progress import Progress

# Kinds whose linears can be timed one by one.
CHECKPOINTS = ("checkpoint", "hf", "vllm")


class Measuring:
    """What ``sparsify.bench.run`` asks for is measured, and recorded once it is complete.

    Args:
        request: what to measure.
        out: receives each record.
        progress: told of stages and of what there is no figure of.

    Attributes:
        failed: how many measurements did.
        roofs: of the device that was measured; none at first.
        reference: whose logits divergences are from.
    """

    def __init__(self, request: Request, out: Writer, progress: Progress) -> None:
        self.request, self.out, self.progress = request, out, progress
        self.failed = 0
        self.roofs = Roofs(None)
        self.reference: Subject | None = None

    def missing(
        self, what: str, why: str, *, failed: bool, subject: Subject | None = None, runtime: str | None = None,
        scenario: Scenario | None = None,
    ) -> None:  # fmt: skip
        """Record what there is no figure of."""
        self.failed += failed
        self.progress.notice(f"{what}: {why}")
        self.out.write(
            "missing", what=what, why=why, failed=failed, artifact=subject and subject.label, runtime=runtime,
            scenario=scenario and scenario.record(runtime or ""),
        )  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Variables of every worker."""
        threads = self.request.runtime.threads
        return {} if threads is None else {"OMP_NUM_THREADS": str(threads)}

    def worker(self, name: str, runtime: str) -> WorkerProcess:
        """A worker for ``runtime``."""
        return WorkerProcess(
            name, python=self.request.interpreter(runtime), variables=self.environment(),
            timeout_s=self.request.timeout_s,
        )  # fmt: skip

    def group(self, runtime: str, baseline: Subject | None, candidates: Sequence[Subject]) -> None:
        """Measure ``candidates`` and their baseline in one runtime."""
        wanted = [(baseline, False)] if baseline is not None else []
        wanted += [(candidate, False) for candidate in candidates]
        wanted += [(baseline, True)] if baseline is not None and self.request.twin and self.request.scenarios else []
        with ExitStack() as stack:
            held: list[Held] = []
            self.progress.stage(f"{runtime}: starting", len(wanted))
            for subject, twin in wanted:
                against = None if baseline is None or subject is baseline else baseline.label
                held += self.hold(stack, runtime, subject, against, twin=twin)
                self.progress.advance()
            for scenario in self.request.scenarios:
                held = list(self.scenario(runtime, scenario, held))
                for each in held:
                    found = each.worker.memory().device_bytes
                    each.device_bytes = max(filter(None, (found, each.device_bytes)), default=found)
            for each in held:
                if each.twin:
                    each.worker.close()
            held = [each for each in held if not each.twin]
            for each in held:
                self.memory(runtime, each)
            self.accuracy(runtime, held)

    def hold(
        self, stack: ExitStack, runtime: str, subject: Subject, baseline: str | None, *, twin: bool
    ) -> Iterator[Held]:
        """Open a subject; nothing where that fails."""
        name = f"{subject.label} in {runtime}" + (", a second time" if twin else "")
        worker = None
        try:
            worker = stack.enter_context(self.worker(name, runtime))
            opened = worker.ask(
                "open", path=str(subject.folder), runtime=asdict(self.request.options(runtime)),
                vocab_size=_vocab_size(subject.folder), probe=self.request.probe,
                trust_remote_code=self.request.trust_remote_code and runtime == "torch",
            )  # fmt: skip
        except SparsifyError as error:
            if worker is not None:
                worker.close()  # it may hold the model all the same
            self.missing(name, str(error), failed=True, subject=subject, runtime=runtime)
            return
        for notice in opened["notices"]:
            self.progress.notice(f"{name}: {notice}")
        yield Held(subject, baseline, worker, opened, worker.memory().resident_bytes, twin)

    def scenario(self, runtime: str, scenario: Scenario, held: Sequence[Held]) -> Iterator[Held]:
        """Measure one scenario; yields those that are still alive."""
        name = f"{scenario.prompt_tokens}+{scenario.new_tokens} tokens x {scenario.batch}"
        self.progress.stage(f"{runtime}: {name}", steps(self.request, held))
        taken = take_rounds(held, scenario, self.request, self.progress.advance)
        gpu = host.gpu(self.request.runtime.device)
        again = [found.rounds for each, found in zip(held, taken, strict=True) if each.twin and found.error is None]
        made: dict[str, list[list[int]]] = {}
        for each, found in zip(held, taken, strict=True):
            if found.error is not None:
                what, why = f"{each.subject.label} in {runtime}, {name}", str(found.error)
                what += ", a second time" if each.twin else ""
                gone = isinstance(found.error, MeasurementError)
                why += "; its process is gone: nothing more of it is measured in this runtime" if gone else ""
                self.missing(what, why, failed=True, subject=each.subject, runtime=runtime, scenario=scenario)
                if gone:
                    continue
            elif not each.twin:
                made[each.subject.label] = found.rounds[0]["tokens"]
                rounds = found.rounds + (again[0] if again and each.subject.label == _twin(held) else [])
                self.out.write(
                    "latency",
                    **self.common(runtime, each),
                    baseline=each.baseline,
                    asked_sparse=each.subject.sparse and self.request.runtime.kernel != "dense",
                    scenario=scenario.record(runtime),
                    roof=self.roofs.step(each.subject, each.opened, scenario, self.request, runtime),
                    gpu=gpu,
                    **latency_record(rounds, scenario.batch, scenario.new_tokens, made.get(each.baseline or "")),
                )
            yield each

    def common(self, runtime: str, each: Held) -> dict[str, Any]:
        """Fields of every record of a session."""
        how = ""
        if runtime.startswith("vllm"):
            how = ", eager" if self.request.runtime.eager else ", compiled"
        session = f"{each.opened['session']}{how}"
        engaged = each.opened["engaged"]
        return {"artifact": each.subject.label, "runtime": runtime, "session": session, "engaged": engaged}

    def memory(self, runtime: str, each: Held) -> None:
        """Record what the worker's processes held at most."""
        found = each.worker.memory()
        if found.processes == 0:
            why = "its process has ended"
            what = f"memory of {each.subject.label} in {runtime}"
            self.missing(what, why, failed=True, subject=each.subject, runtime=runtime)
            return
        self.out.write(
            "memory",
            **self.common(runtime, each),
            processes=found.processes,
            loaded_resident_bytes=each.loaded_bytes,
            peak_resident_bytes=found.peak_bytes,
            device_peak_bytes=each.device_bytes,
            weights_resident_bytes=each.opened["weights_resident_bytes"],
            versions=each.opened["versions"],
        )

    def accuracy(self, runtime: str, held: Sequence[Held]) -> None:
        """Perplexity and tasks of each, one after the other."""
        request = self.request
        kinds = (request.windows is not None, request.tasks is not None)
        if not any(kinds):
            return
        self.progress.stage(f"{runtime}: accuracy", len(held) * sum(kinds))
        for each in held:
            common, name = self.common(runtime, each), f"{each.subject.label} in {runtime}"
            if request.windows is not None:
                with self.attempt(f"perplexity of {name}", each.subject, runtime):
                    fields, why_no_kl = perplexity_record(each.worker, request, self.reference)
                    self.out.write("perplexity", **common, **fields)
                    if fields["kl"] is None:
                        why = why_no_kl
                        what = f"KL divergence of {name}"
                        self.missing(what, why, failed=False, subject=each.subject, runtime=runtime)
            if request.tasks is not None:
                cut = partial(
                    self.missing,
                    f"whole prompts of tasks of {name}",
                    failed=False,
                    subject=each.subject,
                    runtime=runtime,
                )
                with self.attempt(f"tasks of {name}", each.subject, runtime):
                    for fields in task_records(each.worker, each.subject.folder, request, cut):
                        self.out.write("task", **common, **fields)

    @contextmanager
    def attempt(self, what: str, subject: Subject, runtime: str) -> Iterator[None]:
        """A step of a stage: that it failed is recorded and the run goes on, unless records cannot be written."""
        try:
            yield
        except OutputError:
            raise
        except (SparsifyError, OSError) as error:
            self.missing(what, str(error), failed=True, subject=subject, runtime=runtime)
        self.progress.advance()

    def kernels(self, candidates: Sequence[Subject], device: str) -> None:
        """Times of single linears of each pruned checkpoint; two artifacts of one have the same."""
        request, seen = self.request, []
        for subject in candidates:
            if not subject.sparse or subject.kind not in CHECKPOINTS:
                continue
            assert subject.body is not None
            linears = [(row["name"], row["pattern"], row["zeros"]) for row in subject.body["linears"]]
            weights = linears, subject.source, subject.body.get("storage", {}).get("values")
            if weights in seen:
                continue
            seen.append(weights)
            name = f"kernels of {subject.label}"
            self.progress.stage(name, 1)
            with self.attempt(name, subject, "torch"), self.worker(name, "torch") as worker:
                for fields in worker.ask_all(
                    "kernels", path=str(subject.folder), device=device, dtype=request.dtype,
                    tokens=list(request.kernel_tokens), rounds=request.rounds, ceilings=self.roofs.records(),
                ):  # fmt: skip
                    self.out.write("kernel", artifact=subject.label, **fields)


def _vocab_size(folder: Path) -> int:
    config = read_config(folder)
    size = config.get("vocab_size")
    if size is None and isinstance(config.get("text_config"), dict):
        size = config["text_config"].get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise ModelError(f"{folder / 'config.json'}: key vocab_size is {str(size)[:40]}, want a positive number")
    return size


def _twin(held: Sequence[Held]) -> str | None:
    return next((each.subject.label for each in held if each.twin), None)

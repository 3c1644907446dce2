"""A run: what its runtimes can open of what was asked for, against which baselines; ``measuring`` does it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from sparsify.bench import host
from sparsify.bench.measuring import CHECKPOINTS, Measuring
from sparsify.bench.records import Writer
from sparsify.bench.request import Request, opens
from sparsify.bench.roofs import Roofs
from sparsify.bench.subjects import Subject, check_baseline
from sparsify.errors import UsageError
from sparsify.progress import Progress, Silent
from sparsify.roofline.devices import Device


def run(
    candidates: Sequence[Subject],
    baselines: Sequence[Subject],
    request: Request,
    out: Writer,
    *,
    command: Sequence[str],
    ceilings: Device | None = None,
    progress: Progress | None = None,
) -> int:
    """Measure, and write what was found; returns how many measurements failed.

    Args:
        candidates: artifacts.
        baselines: dense, of any kinds; the first that a runtime opens, and that a graph has its form in common with,
            is what candidates are compared with there.
        request: what to measure.
        out: receives each record once it is complete.
        command: as typed.
        ceilings: of this device; None measures them.
        progress: told of stages.

    Raises:
        UsageError: a baseline of another model, or nothing that a runtime could open.
        OutputError: records cannot be written.
    """
    progress = progress or Silent()
    pairs = [(candidate, baseline) for candidate in candidates for baseline in baselines]
    doubts = [(*pair, why) for pair in pairs for why in check_baseline(*pair)]
    if not any(opens(runtime, subject) for runtime in request.runtimes for subject in candidates):
        kinds = ", ".join(sorted({subject.kind for subject in candidates}))
        raise UsageError(f"--runtime {', '.join(request.runtimes)}: opens none of these artifacts (kinds: {kinds})")
    started = time.monotonic()
    work = Measuring(request, out, progress)
    device = request.runtime.device
    if ceilings is None:
        progress.stage("measuring the device's ceilings", 1)
        with work.worker("the device's ceilings", "torch") as worker:
            ceilings = Device(**worker.ask("ceilings", device=device))
        progress.advance()
    work.roofs = Roofs(ceilings)
    work.reference = next((each for each in baselines if each.kind in (*CHECKPOINTS, "model")), None)
    out.write(
        "run",
        command=list(command),
        seed=request.seed,
        rounds=request.rounds,
        warm_up=request.warm_up,
        environment=host.environment(request.runtime.threads),
        ceilings=work.roofs.records(),
    )
    for role, subjects in (("baseline", baselines), ("candidate", candidates)):
        for subject in subjects:
            out.write("artifact", **subject.record(role))
    for subject, baseline, why in doubts:
        work.missing(f"whether {subject.label} is of {baseline.label}", why, failed=False, subject=subject)
    for subject in candidates:
        if not any(opens(runtime, subject) for runtime in request.runtimes):
            asked = ", ".join(request.runtimes)
            work.missing(subject.label, f"kind {subject.kind} opens in none of {asked}", failed=False, subject=subject)
    for runtime in request.runtimes:
        for against, group in _groups(runtime, candidates, baselines):
            if against is None:
                names = ", ".join(subject.label for subject in group)
                why = "no --baseline of this kind was given, so nothing is compared"
                work.missing(f"a dense baseline for {names} in {runtime}", why, failed=False, runtime=runtime)
            work.group(runtime, against, group)
    if request.kernel_tokens:
        work.kernels(candidates, device)
    out.write(
        "end", seconds=round(time.monotonic() - started, 1), failed=work.failed, load_1m=host.load(), gpu=host.gpu()
    )
    return work.failed


def _groups(
    runtime: str, candidates: Sequence[Subject], baselines: Sequence[Subject]
) -> Iterator[tuple[Subject | None, list[Subject]]]:
    """What one runtime opens, by the baseline that it is compared with."""
    found: dict[str, tuple[Subject | None, list[Subject]]] = {}
    for candidate in candidates:
        if opens(runtime, candidate):
            fitting = [each for each in baselines if opens(runtime, each)]
            if candidate.kind in ("onnx", "tensorrt"):
                fitting = [each for each in fitting if each.like() == candidate.like()]
            baseline = fitting[0] if fitting else None
            found.setdefault(baseline.label if baseline else "", (baseline, []))[1].append(candidate)
    yield from found.values()

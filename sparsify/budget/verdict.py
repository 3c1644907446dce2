"""Whether a run fits this machine, and what would make it fit: the budget as people and programs read it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from sparsify.budget.machine import Available
from sparsify.budget.memory import Phase, Term, disk_terms, phases, process_bytes
from sparsify.budget.operations import START_SECONDS, Rates, Time, block_work, rest_work, time_of
from sparsify.budget.shapes import Shapes
from sparsify.errors import UsageError
from sparsify.recipe import Recipe

# Of a GPU: context, code of the libraries, and what the allocator leaves between pieces, as a share of what it holds.
_CONTEXT_BYTES = 600 << 20
_FRAGMENTED = 0.1
# Shorter windows than this say little about a model.
_LEAST_LENGTH = 128
# Methods by what they hold, most first; the remedy names the first that fits.
_SMALLER = ("sparsegpt", "ria", "wanda", "magnitude")


@dataclass(frozen=True)
class Budget:
    """What a run needs.

    Attributes:
        shapes: of the model.
        recipe: what is to be done.
        device: ``cpu`` or ``cuda:N``.
        workers: processes at once.
        base_bytes: resident in each once everything is imported.
        text_bytes: of the calibration text; 0 where token ids are given.
        time: None where nothing was measured.
        rates: as ``time``.
        offload: large matrices lie in files.
        elsewhere: workers have machines of their own; memory is that of one of them.
        targets: that the pruned model is exported for.
        whole_models: that accuracy is measured on at once, in float32, after all that.
    """

    shapes: Shapes
    recipe: Recipe
    device: str
    workers: int
    base_bytes: int
    text_bytes: int = 0
    time: Time | None = None
    rates: Rates | None = None
    offload: bool = False
    elsewhere: bool = False
    targets: tuple[str, ...] = ()
    whole_models: int = 0

    @property
    def phases(self) -> list[Phase]:
        """Moments that may be the largest, without what processes are made of."""
        return phases(
            self.shapes, self.recipe, on_gpu=self.on_gpu, text_bytes=self.text_bytes, workers=self.workers,
            offload=self.offload,
        )  # fmt: skip

    @property
    def on_gpu(self) -> bool:
        """Whether weights and statistics lie on a GPU, and not in the memory of the host."""
        return self.device != "cpu"

    @property
    def process_bytes(self) -> int:
        """Of one process on the host before it holds anything of the model."""
        return process_bytes(self.base_bytes, self.shapes.vocabulary if self.text_bytes else 0)

    def phase_bytes(self, phase: Phase) -> int:
        """Of one process on the host: with everything that is not on a GPU."""
        held = phase.n_bytes(device=False) + (0 if self.on_gpu else phase.n_bytes(device=True))
        return self.process_bytes + held

    @property
    def largest(self) -> Phase:
        """The phase that the host's memory has to hold."""
        return max(self.phases, key=self.phase_bytes)

    @property
    def memory_bytes(self) -> int:
        """Of the host: of all workers, and of the process that they work for; or what follows, if that is more."""
        if self.elsewhere:
            return max(self.phase_bytes(self.largest), self.measuring_bytes)
        idle = 0 if self.workers == 1 else self.process_bytes
        return max(self.workers * self.phase_bytes(self.largest) + idle, self.measuring_bytes)

    @property
    def measuring_bytes(self) -> int:
        """Of the host, once the model is pruned and exported."""
        return self.process_bytes + self.whole_models * 4 * self.shapes.n_values if self.whole_models else 0

    @property
    def device_phase(self) -> Phase | None:
        """The phase that a GPU has to hold; None without one."""
        return max(self.phases, key=lambda phase: phase.n_bytes(device=True)) if self.on_gpu else None

    @property
    def device_bytes(self) -> int:
        """Of the GPU, of which each worker has one; 0 without."""
        phase = self.device_phase
        if phase is None:
            return 0
        return _CONTEXT_BYTES + round((1 + _FRAGMENTED) * phase.n_bytes(device=True))

    @property
    def disk_terms(self) -> list[Term]:
        """Files of the run."""
        found = disk_terms(self.shapes, self.recipe, self.workers, offload=self.offload and not self.on_gpu)
        for target in self.targets:
            stored = self.shapes.stored_bytes
            # Their weights are float32 unless options say otherwise.
            n_bytes = max(4 * self.shapes.n_values, stored) if target in ("onnx", "tensorrt") else stored
            found.append(Term(f"artifact for {target}", n_bytes, False))
        return found

    @property
    def disk_bytes(self) -> int:
        """Of them all."""
        return sum(term.n_bytes for term in self.disk_terms)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the arithmetic of every figure."""
        found: dict[str, Any] = {
            "estimate": True,
            "model": self.shapes.name,
            "blocks": self.shapes.n_blocks,
            "recipe": self.recipe.to_dict(),
            "device": self.device,
            "workers": self.workers,
            "offload": self.offload,
            "memory_bytes": self.memory_bytes,
            "device_bytes": self.device_bytes if self.on_gpu else None,
            "disk_bytes": self.disk_bytes,
            "output_bytes": self.shapes.stored_bytes,
            "process_bytes": self.process_bytes,
            "phases": [
                {
                    "phase": phase.name,
                    "host_bytes": self.phase_bytes(phase),
                    "device_bytes": phase.n_bytes(device=True) if self.on_gpu else None,
                    "terms": [{"what": t.what, "bytes": t.n_bytes, "on": _place(t)} for t in phase.terms],
                }
                for phase in self.phases
            ],
            "disk": [{"what": term.what, "bytes": term.n_bytes} for term in self.disk_terms],
            "time": None,
        }
        if self.time is not None and self.rates is not None:
            found["time"] = {
                "seconds_low": self.time.low,
                "seconds_high": self.time.high,
                "block_seconds_low": self.time.block_low,
                "block_seconds_high": self.time.block_high,
                "start_seconds": START_SECONDS,
                "rates_per_s": self.rates.to_dict(),
                "terms": [
                    *(_rows(f"each of {block.count} blocks", block_work(self.shapes, block, self.recipe), self.rates)
                      for block in self.shapes.blocks),
                    _rows("once", rest_work(self.shapes, self.recipe), self.rates),
                ],
            }  # fmt: skip
        return found


def _place(term: Term) -> str:
    return "disk" if term.in_file else "device" if term.on_device else "host"


def _rows(where: str, works: Iterator[Any], rates: Rates) -> dict[str, Any]:
    rows = []
    for work in works:
        low, high = work.seconds(rates)
        rows.append(
            {"what": work.what, "formula": work.formula, "rate": work.rate, "amount_low": work.low,
             "amount_high": work.high, "seconds_low": low, "seconds_high": high}
        )  # fmt: skip
    return {"for": where, "work": rows}


def timed(budget: Budget, rates: Rates) -> Budget:
    """The budget with the time at ``rates``."""
    return replace(budget, rates=rates, time=time_of(budget.shapes, budget.recipe, rates, budget.workers))


def summary(budget: Budget, free: Available) -> str:
    """One line: memory, disk and time, with what there is."""
    parts = [f"about {size(budget.memory_bytes)} of memory ({size(free.memory_bytes)} available)"]
    if budget.on_gpu:
        there = f" ({size(free.device_bytes)} available)" if free.device_bytes is not None else ""
        parts.append(f"{size(budget.device_bytes)} on {budget.device}{there}")
    parts.append(f"{size(budget.disk_bytes)} of disk ({size(free.disk_bytes)} free)")
    if budget.time is not None:
        parts.append(f"{span(budget.time.low, budget.time.high)} (estimate)")
    return f"needs {', '.join(parts)}"


def check(budget: Budget, free: Available) -> list[str]:
    """What does not fit, a sentence each with the remedy in figures; empty where all does."""
    found = []
    if budget.measuring_bytes > free.memory_bytes:
        found.append(
            f"memory: {size(budget.measuring_bytes)} are needed (measuring accuracy on {budget.whole_models} models, "
            f"whole and in float32) and {size(free.memory_bytes)} available ({free.memory_source}); --eval-text none "
            "measures none"
        )
    budget = replace(budget, whole_models=0)
    if budget.memory_bytes > free.memory_bytes:
        found.append(
            f"memory: {size(budget.memory_bytes)} are needed ({budget.largest.name}) and {size(free.memory_bytes)} "
            f"available ({free.memory_source}); {_remedy(budget, free)}"
        )
    if free.device_bytes is not None and budget.device_bytes > free.device_bytes and budget.device_phase is not None:
        found.append(
            f"{budget.device}: {size(budget.device_bytes)} are needed ({budget.device_phase.name}) and "
            f"{size(free.device_bytes)} available; {_remedy(budget, free)}"
        )
    if budget.disk_bytes > free.disk_bytes:
        found.append(
            f"disk: {size(budget.disk_bytes)} are needed and {size(free.disk_bytes)} free; {_disk_remedy(budget, free)}"
        )
    return found


def fits(budget: Budget, free: Available) -> bool:
    """Whether memory of host and device suffice."""
    on_device = free.device_bytes is None or budget.device_bytes <= free.device_bytes
    return budget.memory_bytes <= free.memory_bytes and on_device


def _remedy(budget: Budget, free: Available) -> str:
    """The first change, from the least on, with which memory suffices."""
    tried = None
    for text, other in _changes(budget):
        need = other.device_bytes if other.on_gpu else other.memory_bytes
        # Matrices in files need room there.
        if fits(other, free) and (other.offload <= budget.offload or other.disk_bytes <= free.disk_bytes):
            return f"{text} needs {size(need)}"
        if tried is None or need < tried[0]:
            tried = need, text
    most = f"the least is {tried[1]} with {size(tried[0])}; " if tried else ""
    return f"{most}use a machine with more"


def _changes(budget: Budget) -> Iterator[tuple[str, Budget]]:
    one = " --workers 1" if budget.workers > 1 else ""
    for workers in range(budget.workers - 1, 0, -1):
        yield f"--workers {workers}", replace(budget, workers=workers)
    budget = replace(budget, workers=1)
    if budget.offload or budget.on_gpu:
        yield from _smaller(budget, one + (" --offload" if budget.offload else ""))
        return
    filed = replace(budget, offload=True)
    yield f"{one} --offload".strip(), filed
    yield from _smaller(budget, one)
    yield from _smaller(filed, f"{one} --offload")


def _smaller(budget: Budget, run: str) -> Iterator[tuple[str, Budget]]:
    """Shorter windows, smaller numbers, other devices, smaller methods; ``run`` stands behind the options of each."""
    recipe = budget.recipe
    length = recipe.length // 2
    while _cuts_text(recipe) and length >= _LEAST_LENGTH:
        windows = -(-recipe.windows * recipe.length // length)
        changed = replace(recipe, length=length, windows=windows)
        yield f"--length {length} --windows {windows}{run}", replace(budget, recipe=changed)
        length //= 2
    if recipe.compute_dtype == "float32" and budget.shapes.value_bytes == 2 and recipe.plan.needs_data:
        changed = replace(recipe, compute_dtype="bfloat16")
        yield f"--compute-dtype bfloat16{run}", replace(budget, recipe=changed)
    if budget.on_gpu:
        yield f"--device cpu{run}", replace(budget, device="cpu")
    for name in _SMALLER:
        try:
            # Parts and settings of one method mean nothing to another.
            changed = replace(
                recipe, method=name, settings={}, score=None, permute=None, refine=None, solver=None, refit=None,
                allocate=None, order=None, aim=None, inputs=None,
            )  # fmt: skip
            if changed.plan != recipe.plan:
                yield f"--method {name}{run}", replace(budget, recipe=changed)
        except UsageError:
            continue


def _cuts_text(recipe: Recipe) -> bool:
    """Whether windows and length are the recipe's; token ids come as they are."""
    return recipe.plan.needs_data and ".safetensors:" not in recipe.calibration


def _disk_remedy(budget: Budget, free: Available) -> str:
    windows = budget.recipe.windows // 2
    while _cuts_text(budget.recipe) and windows >= 1:
        other = replace(budget, recipe=replace(budget.recipe, windows=windows))
        if other.disk_bytes <= free.disk_bytes:
            return f"--windows {windows} needs {size(other.disk_bytes)}, or name an --out on another disk"
        windows //= 2
    return "name an --out on another disk"


def size(n_bytes: int) -> str:
    """Bytes as people read them, in decimal units."""
    value = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.2g} {unit}"
        value /= 1000
    return f"{value:.2f} TB" if value < 10 else f"{value:.0f} TB"


def span(low: float, high: float) -> str:
    """A range of seconds, in the unit that people would choose."""
    for name, seconds, least in (("days", 86400.0, 2), ("h", 3600.0, 2), ("min", 60.0, 2), ("s", 1.0, 0)):
        if high >= least * seconds:
            few, many = low / seconds, high / seconds
            return f"{_short(few)} to {_short(many)} {name}"
    return "0 s"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"

"""How far a run is at one moment, and the same as Prometheus' text exposition, for what scrapes it.

Times are seconds since 1970 by the clock of the machine that runs the driver.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sparsify import __version__

_PREFIX = "sparsify_prune_"


@dataclass(frozen=True)
class Stage:
    """A stage of the run.

    Attributes:
        name: as the progress bar shows it.
        total: its steps.
        done: those that are done.
        skipped: of the done ones those of an earlier process, which took this one no time.
        since: when it began.
    """

    name: str
    total: int
    done: int
    skipped: int
    since: float

    def seconds_left(self, now: float) -> float | None:
        """By the steps of this process; None before the first of them."""
        if self.done >= self.total:
            return 0.0
        here = self.done - self.skipped
        return (now - self.since) * (self.total - self.done) / here if here > 0 and now > self.since else None


@dataclass(frozen=True)
class Blocks:
    """How far the decoder blocks are.

    Attributes:
        total: blocks of the model.
        done: finished ones.
        resumed: of the finished ones those that an earlier process left.
        began: when this process began to work on blocks.
        last: when it last finished one; ``began`` before that.
        weights_here: weights of the blocks that this process finished, or blocks where the weights are not known.
        weights_left: the same of those to do.
        usual_s: median time of the last blocks, each from its beginning to its end; None before the first.
        begun: when each block that is being worked on was begun.
    """

    total: int
    done: int
    resumed: int
    began: float
    last: float
    weights_here: float
    weights_left: float
    usual_s: float | None = None
    begun: tuple[float, ...] = ()

    def seconds_left(self, now: float) -> float | None:
        """By the weights that this process got through in its time; None before its first finished block.

        A block that is being worked on counts by its age over the usual time of one, at most as a whole one. Without
        that, the first of a hundred blocks that are worked on at once would say that the rest takes a hundred times as
        long.
        """
        here = self.done - self.resumed
        if self.done >= self.total:
            return 0.0
        if here <= 0 or self.weights_here <= 0 or not self.usual_s or now <= self.began:
            return None
        # A driver that does not say what it works on works on one block after the other.
        begun = self.begun or (self.last,)
        flying = sum(min(1.0, max(0.0, now - since) / self.usual_s) for since in begun[: self.total - self.done])
        flying *= self.weights_left / (self.total - self.done)
        return (now - self.began) * (self.weights_left - flying) / (self.weights_here + flying)


@dataclass(frozen=True)
class Worker:
    """A process that computes, or the driver where it computes itself.

    Attributes:
        name: what the driver calls it.
        doing: kind of task; None while it waits for one.
        block: the block that the task belongs to, if any.
        since: when it began that, or began to wait.
        seen: when the driver last heard of it.
        alive: whether it still counts.
        peak_memory_bytes: its largest resident size, or a device's largest allocation, as the driver reports it.
    """

    name: str
    doing: str | None
    block: int | None
    since: float
    seen: float
    alive: bool = True
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment.

    Attributes:
        time: that moment.
        started: when this process started.
        state: ``running``, ``failed`` or ``interrupted``.
        model, method, pattern: of the run.
        stages: so far, the current one last.
        blocks: None before they are begun.
        block_s: seconds of the driver's block records by step, summed over the blocks of this process.
        tasks_failed, tasks_retried: of this process.
        workers: those that are known, lost ones too.
        peak_memory_bytes: largest resident size of the driver's process.
    """

    time: float
    started: float
    state: str = "running"
    model: str = ""
    method: str = ""
    pattern: str = ""
    stages: tuple[Stage, ...] = ()
    blocks: Blocks | None = None
    block_s: Mapping[str, float] = field(default_factory=dict)
    tasks_failed: int = 0
    tasks_retried: int = 0
    workers: tuple[Worker, ...] = ()
    peak_memory_bytes: int | None = None

    def seconds_left(self, now: float) -> float | None:
        """Until the blocks are done, by this process's own speed; None as long as nothing shows it."""
        if self.blocks is None:
            return None
        left = self.blocks.seconds_left(now)
        # Before the first block is finished the steps within it are all there is to go by.
        return self.stages[-1].seconds_left(now) if left is None and self.stages else left


def exposition(snapshot: Snapshot) -> str:
    """``snapshot`` in Prometheus' text format 0.0.4, metrics without a value left out."""
    blocks, workers = snapshot.blocks, snapshot.workers
    about = {key: getattr(snapshot, key) for key in ("model", "method", "pattern")} | {"version": __version__}
    alive = [worker for worker in workers if worker.alive]
    families: list[tuple[str, str, str, Iterable[tuple[Mapping[str, str], float | None]]]] = [
        ("info", "gauge", "What is pruned and how; always 1.", [(about, 1)]),
        ("running", "gauge", "1 while the driver works, 0 once it failed or was interrupted.",
         [({}, float(snapshot.state == "running"))]),
        ("start_timestamp_seconds", "gauge", "When the driver's process began this run.", [({}, snapshot.started)]),
        ("last_update_timestamp_seconds", "gauge", "When this file was written.", [({}, snapshot.time)]),
        ("blocks", "gauge", "Decoder blocks of the model.", [({}, blocks.total if blocks else None)]),
        ("blocks_done", "gauge", "Decoder blocks that are finished, in this run or before it was resumed.",
         [({}, blocks.done if blocks else None)]),
        ("steps", "gauge", "Steps of each stage.", [({"stage": stage.name}, stage.total) for stage in snapshot.stages]),
        ("steps_done", "gauge", "Finished steps of each stage.",
         [({"stage": stage.name}, stage.done) for stage in snapshot.stages]),
        ("seconds_per_block", "gauge", "Median time of the last blocks, each from its beginning to its end.",
         [({}, blocks.usual_s if blocks else None)]),
        ("block_seconds_total", "counter", "Time spent on blocks by step, summed over workers.",
         [({"step": step}, value) for step, value in snapshot.block_s.items()]),
        ("eta_seconds", "gauge", "Estimated time until all blocks are finished; absent while nothing shows it.",
         [({}, snapshot.seconds_left(snapshot.time))]),
        ("tasks_running", "gauge", "Workers that have a task.", [({}, sum(w.doing is not None for w in alive))]),
        ("tasks_failed_total", "counter", "Tasks that failed, retried or not.", [({}, snapshot.tasks_failed)]),
        ("tasks_retried_total", "counter", "Failed tasks that were given out again.", [({}, snapshot.tasks_retried)]),
        ("workers_alive", "gauge", "Workers that count as alive.", [({}, len(alive))]),
        ("worker_last_seen_timestamp_seconds", "gauge", "When the driver last heard of each worker.",
         [({"worker": worker.name}, worker.seen) for worker in workers]),
        ("worker_peak_memory_bytes", "gauge", "Largest memory of each worker, as it reported it.",
         [({"worker": worker.name}, worker.peak_memory_bytes) for worker in workers]),
        ("peak_memory_bytes", "gauge", "Largest resident memory of the driver's process.",
         [({}, snapshot.peak_memory_bytes)]),
    ]  # fmt: skip
    return "".join(_family(*each) for each in families)


def _family(name: str, kind: str, text: str, values: Iterable[tuple[Mapping[str, str], float | None]]) -> str:
    name = _PREFIX + name
    lines = [f"{name}{_labels(labels)} {_number(value)}\n" for labels, value in values if value is not None]
    return "".join([f"# HELP {name} {text}\n", f"# TYPE {name} {kind}\n", *lines]) if lines else ""


def _labels(labels: Mapping[str, str]) -> str:
    pairs = ",".join(f'{key}="{_escaped(value)}"' for key, value in labels.items())
    return "{" + pairs + "}" if pairs else ""


def _escaped(value: str) -> str:
    text = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    # A name that is not text (of a file, say) must not keep the whole file from being UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value) if isinstance(value, float) and not value.is_integer() else str(int(value))

"""The driver: decoder blocks are read, calibrated, pruned, written and freed, each a task; resumable after each.

A process that works for a run holds one block, the embeddings (only before its first block) and one window of hidden
states, whatever the depth. The state in the staging folder is the commit point: what it does not list never happened.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparsify import manifest
from sparsify.assemble import Rest
from sparsify.checkpoint import FLOATS, write_permutations
from sparsify.cluster.crew import Here, work_alone
from sparsify.cluster.files import ORDERS, PART, PIECES, SUMS, entered_of, hidden_names, streams_of
from sparsify.cluster.graph import Graph, Task
from sparsify.cluster.hire import crew_of
from sparsify.cluster.job import Bench, Job, chosen_of, inputs_of
from sparsify.cluster.pieces import handlers_of
from sparsify.cluster.pipeline import Gathered, Pipeline
from sparsify.cluster.plan import inputs_wanted, run_graph
from sparsify.data import Windows, load_windows
from sparsify.errors import OutputError, SparsifyError, UsageError
from sparsify.files import Staging, staging_folder, stamps, write_json
from sparsify.format.reader import open_checkpoint
from sparsify.hidden import file_crc32, shards_of
from sparsify.journal import About, Journal
from sparsify.memory import peak_memory_bytes, return_large_frees
from sparsify.methods import METHODS
from sparsify.model import Skeleton, load_skeleton
from sparsify.naming import Binding
from sparsify.offload import offloaded
from sparsify.progress import Progress, Silent
from sparsify.recipe import DEFAULT_CALIBRATION, Recipe
from sparsify.resume import damage
from sparsify.source import Source
from sparsify.survey import Survey, allocated, residual_order
from sparsify.types import NofM, Pattern, PrunedLinear, Unstructured


def prune(
    source: Source,
    recipe: Recipe,
    out: Path,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    workers: int | None = None,
    cluster: str | None = None,
    offload: bool = False,
    worker_bytes: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Prune ``source`` by ``recipe`` into the folder ``out``, an ordinary checkpoint with manifest; returns ``out``.

    An interrupted call leaves ``<out>.partial``; the same call, with whatever workers, goes on from the finished blocks
    and ends in the same bits.

    Args:
        source: the model.
        recipe: what to do.
        out: folder that must not exist yet, unless ``overwrite``.
        overwrite: replace an earlier output (at the very end), and start again where interrupted work does not fit.
        device: torch device of the forward passes and the scores; with several workers on ``cuda`` each has a GPU.
        workers: processes that prune blocks at the same time, where the method lets blocks be pruned by themselves;
            None is 1, or as many as a cluster has room for.
        cluster: where Ray runs them, see ``cluster.ray_workers``; None: on this machine, without Ray.
        offload: keep large matrices in files beside the output, which is slower, where memory does not suffice.
        worker_bytes: of memory that each worker needs, for a cluster to set aside; None: it is not asked to.
        trust_remote_code: let the model's own code load.
        progress: receives stages and steps.

    Raises:
        ModelError, DataError, UsageError, OutputError, NumericsError, WorkerError: see ``sparsify.errors``.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"--workers is {workers}, want 1 or more")
    if device.startswith("cuda:") and (cluster or workers not in (None, 1)):
        raise UsageError(f"--device {device} is one GPU, and each worker needs one of its own; use --device cuda")
    progress = progress or Silent()
    return_large_frees()
    began = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
    skeleton = load_skeleton(source.folder, trust_remote_code=trust_remote_code)
    binding = Binding(open_checkpoint(source.folder), skeleton)
    for text in skeleton.notices:
        progress.notice(text)
    if recipe.plan.needs_data and recipe.calibration == DEFAULT_CALIBRATION:
        progress.notice("calibrating on Python's help texts; --calibration takes text like the model will serve")
    patterns = recipe.assign([spec for block in skeleton.linears for spec in block])
    if METHODS[recipe.method].for_groups and len({isinstance(pattern, NofM) for pattern in patterns.values()}) > 1:
        progress.notice(
            f"method {recipe.method} is made of other parts for N:M than for a sparsity; all linears are pruned by "
            f"those for the recipe's own pattern, {recipe.pattern} (--set changes them)"
        )
    windows = _windows(source, recipe, trust_remote_code) if recipe.plan.needs_data else None
    _check_dtypes(binding, recipe)
    fingerprint = _fingerprint(source, recipe, binding, windows, device)
    with staging_folder(
        out,
        fingerprint,
        overwrite=overwrite,
        inputs=[source.folder],
        check=partial(
            damage, recipe, skeleton.n_blocks, chosen_of(skeleton, patterns)[1], len(windows.ids) if windows else 0
        ),
    ) as staging:
        threads = _threads(staging.state, workers if cluster in (None, "local") else None)
        torch.set_num_threads(threads)
        about = About(source.name, recipe.method, recipe.pattern, fingerprint, threads, workers or 0, device)
        done = len((staging.state or {}).get("blocks", ()))
        with Journal(staging.path, progress, about, done=done) as journal, torch.inference_mode():
            run = _Run(source, recipe, skeleton, binding, patterns, windows, staging, device, journal, began, threads)
            with offloaded(staging.path if offload else None):
                run.survey()
            run.blocks(run.job(trust_remote_code, offload), workers, cluster, worker_bytes)
            run.finish()
            journal.finish()
        staging.commit()
    return out


def _check_dtypes(binding: Binding, recipe: Recipe) -> None:
    stored = {info.dtype for info in binding.reader.tensors.values()} & FLOATS.keys()
    if recipe.compute_dtype == "bfloat16" and stored != {"BF16"}:
        other = sorted(stored - {"BF16"})[0]
        raise UsageError(f"compute_dtype bfloat16 would round weights that are stored as {other}; use float32")


def _fingerprint(
    source: Source, recipe: Recipe, binding: Binding, windows: Windows | None, device: str
) -> dict[str, Any]:
    return {
        "command": "prune",
        "recipe": recipe.to_dict(),
        "calibration": windows.sha256 if windows else None,
        "model": stamps([source.folder / "config.json", *binding.reader.files]),
        "versions": manifest.versions("torch", "transformers"),
        "device": device,
    }


def _windows(source: Source, recipe: Recipe, trust_remote_code: bool) -> Windows:
    return load_windows(
        recipe.calibration,
        source.folder,
        n_windows=recipe.windows,
        length=recipe.length,
        split="calibration",
        seed=recipe.seed,
        bos=recipe.bos,
        trust_remote_code=trust_remote_code,
    )


def _threads(state: Mapping[str, Any] | None, workers: int | None) -> int:
    """Those of every process: the order of a threaded sum, and so its bits, depend on their number.

    A run that is resumed has those that it began with, whatever works for it now.
    """
    if state is not None:
        return int(state["threads"])
    mine = torch.get_num_threads()
    return mine if "OMP_NUM_THREADS" in os.environ else max(mine // (workers or 1), 1)


class _Run:
    """One pruning run in its staging folder."""

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        skeleton: Skeleton,
        binding: Binding,
        patterns: dict[str, Pattern],
        windows: Windows | None,
        staging: Staging,
        device: str,
        journal: Journal,
        began: tuple[float, float],
        threads: int,
    ) -> None:
        self.source = source
        self.recipe = recipe
        self.skeleton = skeleton
        self.binding = binding
        self.patterns = patterns
        self.windows = windows
        self.staging = staging
        self.folder = staging.path
        self.device = device
        self.journal = journal
        self.dtype: torch.dtype = getattr(torch, recipe.compute_dtype)
        self.began = began
        self.n_resumed = 0
        self.peak_memory_bytes = self.peak_device_bytes = 0
        self._told: set[str] = set()
        self._gathered: dict[int, Gathered] = {}
        self._pipeline: Pipeline | None = None
        self.rest = Rest(staging.path, binding, source, recipe, windows)
        self.state = self._open_state(threads)

    # --- state -----------------------------------------------------------------------------------------------------

    def _open_state(self, threads: int) -> dict[str, Any]:
        state = self.staging.state
        if state is None:
            return {
                "threads": threads,
                "blocks": {},
                "hidden": {},
                "allocation": None,
                "residual": None,
            }
        self.n_resumed = len(state["blocks"])
        return state

    # --- before the first block ------------------------------------------------------------------------------------

    def survey(self) -> None:
        """Decide over the dense model what has to be decided for all blocks at once; kept with the run's state."""
        if self.windows is None:
            return
        plan, base = self.recipe.plan, self.recipe.parsed
        ids = torch.from_numpy(self.windows.ids)
        survey = Survey(self.binding, plan, ids, self.folder, self.dtype, self.device, self.journal)
        if plan.allocate != "uniform" and isinstance(base, Unstructured) and self.state["allocation"] is None:
            found = allocated(survey, self.patterns, base.sparsity)
            self.state["allocation"] = {name: str(sparsity) for name, sparsity in found.items()}
            self.staging.save(self.state)
        if plan.permute == "residual":
            path = self.folder / ORDERS.format("residual")
            if self.state["residual"] is None:
                write_permutations(path, {"residual": residual_order(survey, self.patterns, self.recipe.seed)})
                self.state["residual"] = {"file": path.name, "crc32": file_crc32(path)}
                self.staging.save(self.state)

    # --- blocks ----------------------------------------------------------------------------------------------------

    def job(self, trust_remote_code: bool, offload: bool) -> Job:
        """What any process needs to know for any task; after ``survey``."""
        residual = None
        if self.state["residual"] is not None:
            residual = self.state["residual"]["file"]
            if not (self.folder / residual).exists():
                # Already joined to the others, at the very end.
                residual = manifest.PERMUTATIONS
        return Job(
            folder=str(self.folder.absolute()),
            source=str(self.source.folder.absolute()),
            recipe=self.recipe.to_dict(),
            allocation=self.state["allocation"],
            residual=residual,
            shape=None if self.windows is None else self.windows.ids.shape,
            first=[] if self.windows is None else self.windows.ids[0].tolist(),
            n_shards=self.rest.n_shards,
            device=self.device,
            threads=self.state["threads"],
            trust_remote_code=trust_remote_code,
            offload=offload,
        )

    def _lost(self, task: Task, worker: str, error: SparsifyError, attempt: int, retried: bool) -> None:
        self.journal.lost(worker, str(error))
        self.journal.task(task.do, task.arguments["block"], worker, str(error), attempt=attempt, retried=retried)
        self.journal.notice(f"{task.name}, attempt {attempt}: {error}")

    def _failed(self, task: Task, worker: str, error: SparsifyError) -> None:
        # The error itself ends the run; where the disk is full, nothing more can be said here.
        with suppress(OutputError):
            self.journal.task(task.do, task.arguments["block"], worker, str(error), attempt=1, retried=False)

    def _waits(self) -> None:
        # No reason to end what is under way: whoever has results to write meets the full disk too.
        with suppress(OutputError):
            self.journal.beat()

    def _begun(self, task: Task, worker: str) -> None:
        self.journal.worker(worker, task.do, task.arguments["block"])

    def blocks(self, job: Job, workers: int | None, cluster: str | None, worker_bytes: int | None) -> None:
        """Prune every block that is not finished yet."""
        bench = Bench(job, self.journal, binding=self.binding)
        self.last, self.chosen = bench.last, bench.chosen
        weights = [sum(spec.n_weights for spec in specs) for specs in bench.chosen]
        self.journal.blocks(self.skeleton.n_blocks, {int(index) for index in self.state["blocks"]}, weights=weights)
        if len(self.state["blocks"]) == self.skeleton.n_blocks:
            return
        # Of a run that was interrupted within a block.
        for pattern in PIECES:
            self._remove(pattern)
        told = self._begun, self._lost, self._waits, self._failed
        with crew_of(job, workers, cluster, worker_bytes, *told) as crew:
            n = 1 if crew is None else len(crew)
            graph = self._graph(bench, n)
            if crew is None:
                work_alone(graph, Here(handlers_of(bench)), self._begun, self._done, self._event, self._failed)
            else:
                crew.work(graph, self._done, self._event)

    def _graph(self, bench: Bench, workers: int) -> Graph:
        """What is left, after the first block's inputs were made."""
        state, inputs = self.state, inputs_of(self.recipe)
        if self.windows is not None and not state["hidden"] and not state["blocks"]:
            state["hidden"] = bench.enter(torch.from_numpy(self.windows.ids))["hidden"]
            self.staging.save(state)
        done, entered = {int(index) for index in state["blocks"]}, self._entered()
        ahead = 1 + workers if workers > 1 and inputs == "dense" else 0
        graph = run_graph(self.skeleton.n_blocks, self.last, done=done, entered=entered, inputs=inputs, ahead=ahead)
        steps = sum(bench.steps(task.do, **task.arguments) for task in graph)
        before = sum(bench.steps("prune", block=block, leave=not ahead) for block in done)
        self.journal.stage("pruning", before + steps)
        self.journal.skip(before)
        if workers > 1 and inputs == "pruned":
            graph, chosen = Graph(), [bool(specs) for specs in bench.chosen]
            dense, shards = len(streams_of(self.recipe)) > 1, len(shards_of(self._n_windows))
            self._pipeline = Pipeline(graph, len(chosen), self.last, chosen, shards, dense, done, entered)
            self._pipeline.start()
        return graph

    def _entered(self) -> set[int]:
        """Blocks whose inputs are there."""
        return entered_of(self.recipe, self.state["hidden"], self._n_windows)

    @property
    def _n_windows(self) -> int:
        return 0 if self.windows is None else len(self.windows.ids)

    def _done(self, task: Task, answer: Mapping[str, Any], worker: str) -> None:
        """Commit to what a task made, and see to what follows from it."""
        state, block = self.state, task.arguments["block"]
        gathered = self._gathered.setdefault(block, Gathered())
        gathered.add(answer, worker)
        self.peak_memory_bytes = max(self.peak_memory_bytes, gathered.peak_memory_bytes)
        self.peak_device_bytes = max(self.peak_device_bytes, answer["peak_device_bytes"])
        self.journal.worker(worker, peak_memory_bytes=answer["peak_memory_bytes"])
        state["hidden"] |= answer["hidden"]
        if self._pipeline is not None and task.do == "look":
            self._pipeline.looked(block, answer["groups"], answer["places"])
        elif self._pipeline is not None and task.do == "solve":
            group = task.arguments["group"]
            if self._pipeline.solved(block, group):
                self._remove(SUMS.format(block, group, "*"))
        elif task.do in ("prune", "write", "forward"):
            if task.do != "forward":
                place = {spec.name: i for i, spec in enumerate(self.chosen[block])}
                linears = sorted(gathered.linears, key=lambda row: place[row["name"]])
                state["blocks"][str(block)] = {
                    "file": answer["file"], "bytes": answer["bytes"], "linears": linears, "orders": answer["orders"],
                }  # fmt: skip
                self.journal.advance()
            self._commit()
            if task.do != "forward":
                rows = [PrunedLinear(**{**row, "shape": tuple(row["shape"])}) for row in linears]
                peak = gathered.peak_memory_bytes
                workers = sorted(gathered.workers)
                self.journal.block(block, rows, gathered.seconds, workers=workers, peak_memory_bytes=peak)
                del self._gathered[block]
                self._remove(PART.format(block, "*"))

    def _remove(self, pattern: str) -> None:
        for path in self.folder.glob(pattern):
            path.unlink(missing_ok=True)

    def _commit(self) -> None:
        """Save the state, then remove the files that nothing reads any more."""
        state, done, entered = self.state, {int(index) for index in self.state["blocks"]}, self._entered()
        # What only some shards of are there is being made.
        unwanted = entered - inputs_wanted(self.last, done=done, entered=entered)
        old = {name for block in unwanted for name in hidden_names(self.recipe, block, self._n_windows)}
        state["hidden"] = {name: crc32 for name, crc32 in state["hidden"].items() if name not in old}
        self.staging.save(state)
        for name in old:
            (self.folder / name).unlink(missing_ok=True)

    def _event(self, worker: str, what: Mapping[str, Any]) -> None:
        """What a worker says of itself; of notices that several have, one."""
        self.journal.seen(worker)
        self.journal.advance(int(what.get("advance", 0)))
        notice = str(what.get("notice", ""))
        # What each worker says of the first linear that it is true of.
        matter = notice.partition(": ")[2] or notice
        if matter and matter not in self._told:
            self._told.add(matter)
            self.journal.notice(notice)

    def finish(self) -> None:
        """Write what is not in a block, then what tells of the whole."""
        self.rest.write(self.state["blocks"])
        run = {
            "seconds": round(time.monotonic() - self.began[0], 3),
            "user_cpu_seconds": round(resource.getrusage(resource.RUSAGE_SELF).ru_utime - self.began[1], 3),
            "peak_memory_bytes": max(peak_memory_bytes(), self.peak_memory_bytes),
            "peak_device_bytes": self.peak_device_bytes,
            "threads": torch.get_num_threads(),
            "blocks_resumed": self.n_resumed,
        }
        write_json(self.folder / manifest.RUN, run)
        manifest.write(self.folder, self.rest.described(self.state["blocks"]))

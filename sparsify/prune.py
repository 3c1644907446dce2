"""The driver: one decoder block at a time is read, calibrated, pruned, written and freed; resumable after each.

Memory holds one block, the embeddings (only before the first block) and one window of hidden states, whatever the
depth. The state in the staging folder is the commit point: what it does not list never happened.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from dataclasses import asdict
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparsify import manifest
from sparsify.block import BlockPruner, Streams
from sparsify.checkpoint import (
    FLOATS,
    copy_side_files,
    portable_config,
    read_permutations,
    write_index,
    write_permutations,
    write_shard,
)
from sparsify.couplings import in_stream_order
from sparsify.data import Windows, load_windows
from sparsify.errors import UsageError
from sparsify.files import Staging, sha256_file, staging_folder, stamps, write_json
from sparsify.format.reader import open_checkpoint
from sparsify.hidden import HiddenFile, enter, file_crc32
from sparsify.memory import peak_memory_bytes, return_freed_memory, return_large_frees
from sparsify.methods import METHODS
from sparsify.model import Skeleton, load_skeleton
from sparsify.naming import Binding
from sparsify.progress import Progress, Silent
from sparsify.recipe import DEFAULT_CALIBRATION, Recipe
from sparsify.source import Source
from sparsify.survey import Survey, allocated, residual_order
from sparsify.types import LinearSpec, NofM, Pattern, PrunedLinear, Unstructured

# Hidden states, in pairs of files that swap roles from block to block.
_PRUNED = ("hidden.0", "hidden.1")
_DENSE = ("dense.0", "dense.1")
# Orders of inputs found in a block, until they are put into one file.
_ORDERS = "orders.{}"
_SHARD = "model-{:05d}-of-{:05d}.safetensors"
# Tensors outside the blocks (embeddings, head) are copied in shards of at most this size, the bound on that step's
# memory; a larger single tensor has a shard to itself.
_COPY_BYTES = 1 << 30


def prune(
    source: Source,
    recipe: Recipe,
    out: Path,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Prune ``source`` by ``recipe`` into the folder ``out``, an ordinary checkpoint with manifest; returns ``out``.

    An interrupted call leaves ``<out>.partial``; the same call goes on from the last finished block and ends in the
    same bits.

    Args:
        source: the model.
        recipe: what to do.
        out: folder that must not exist yet, unless ``overwrite``.
        overwrite: replace an earlier output (at the very end), and start again where interrupted work does not fit.
        device: torch device of the forward passes and the scores.
        trust_remote_code: let the model's own code load.
        progress: receives stages and steps.

    Raises:
        ModelError, DataError, UsageError, OutputError, NumericsError: see ``sparsify.errors``.
    """
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
    with (
        staging_folder(
            out,
            _fingerprint(source, recipe, binding, windows, device),
            overwrite=overwrite,
            inputs=[source.folder],
            check=_damage,
        ) as staging,
        torch.inference_mode(),
    ):
        run = _Run(source, recipe, skeleton, binding, patterns, windows, staging, device, progress, began)
        run.survey()
        run.blocks()
        run.finish()
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


def _damage(folder: Path, state: Any) -> str | None:
    """What is wrong with an interrupted run, or None; raises whatever a malformed record makes Python raise."""
    if not 1 <= state["threads"] <= 4096:
        return "its number of threads is out of range"
    for text in (state["allocation"] or {}).values():
        if not 0 <= Fraction(text) < 1:
            return "its allocation is out of range"
    for block in state["blocks"]:
        if (folder / block["file"]).stat().st_size != block["bytes"] or Path(block["file"]).name != block["file"]:
            return f"{block['file']} is truncated"
        for row in block["linears"]:
            PrunedLinear(**row)
    # They are joined into one file at the very end, and then gone.
    parts = (
        []
        if (folder / manifest.PERMUTATIONS).exists()
        else [state["residual"], *(block["orders"] for block in state["blocks"])]
    )
    for part in filter(None, parts):
        if file_crc32(folder / part["file"]) != part["crc32"] or Path(part["file"]).name != part["file"]:
            return f"{part['file']} is not what was written"
    for hidden in state["hidden"]:
        if file_crc32(folder / hidden["file"]) != hidden["crc32"] or Path(hidden["file"]).name != hidden["file"]:
            return f"{hidden['file']} is not what was written"
    return None


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
        progress: Progress,
        began: tuple[float, float],
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
        self.progress = progress
        self.dtype: torch.dtype = getattr(torch, recipe.compute_dtype)
        self.began = began
        self.n_resumed = 0
        self.state = self._open_state()

    # --- state -----------------------------------------------------------------------------------------------------

    def _open_state(self) -> dict[str, Any]:
        state = self.staging.state
        if state is None:
            return {
                "threads": torch.get_num_threads(),
                "blocks": [],
                "hidden": [],
                "allocation": None,
                "residual": None,
            }
        # The order of a threaded sum depends on the number of threads, and resuming promises the same bits.
        torch.set_num_threads(state["threads"])
        self.n_resumed = len(state["blocks"])
        return state

    def _commit_block(
        self, shard: str, rows: list[PrunedLinear], hidden: list[dict[str, Any]], orders: dict[str, Any] | None
    ) -> None:
        n_bytes = (self.folder / shard).stat().st_size
        self.state["blocks"].append(
            {"file": shard, "bytes": n_bytes, "linears": [asdict(row) for row in rows], "orders": orders}
        )
        self.state["hidden"] = hidden
        self.staging.save(self.state)

    # --- before the first block ------------------------------------------------------------------------------------

    def survey(self) -> None:
        """Decide over the dense model what has to be decided for all blocks at once; kept with the run's state."""
        if self.windows is None:
            return
        plan, base = self.recipe.plan, self.recipe.parsed
        ids = torch.from_numpy(self.windows.ids)
        survey = Survey(self.binding, plan, ids, self.folder, self.dtype, self.device, self.progress)
        if plan.allocate != "uniform" and isinstance(base, Unstructured):
            if self.state["allocation"] is None:
                found = allocated(survey, self.patterns, base.sparsity)
                self.state["allocation"] = {name: str(sparsity) for name, sparsity in found.items()}
                self.staging.save(self.state)
            for name, text in self.state["allocation"].items():
                self.patterns[name] = Unstructured(Fraction(text), base.group)
        if plan.permute == "residual":
            path = self.folder / _ORDERS.format("residual")
            if self.state["residual"] is None:
                write_permutations(path, {"residual": residual_order(survey, self.patterns, self.recipe.seed)})
                self.state["residual"] = {"file": path.name, "crc32": file_crc32(path)}
                self.staging.save(self.state)
            elif not path.exists():
                # Already joined to the others, at the very end.
                path = self.folder / manifest.PERMUTATIONS
            perm = read_permutations(path)["residual"]
            self.binding.reorder = partial(in_stream_order, self.skeleton, perm)

    # --- blocks ----------------------------------------------------------------------------------------------------

    @property
    def _n_shards(self) -> int:
        return self.skeleton.n_blocks + len(self._copy_groups())

    def blocks(self) -> None:
        """Prune every block that is not finished yet."""
        n_blocks = self.skeleton.n_blocks
        done = len(self.state["blocks"])
        chosen = [[spec for spec in block if spec.name in self.patterns] for block in self.skeleton.linears]
        # What the last block with anything to prune puts out feeds nothing that is pruned.
        last = max(index for index, specs in enumerate(chosen) if specs)
        steps = self._steps(chosen, last)
        self.progress.stage("pruning", sum(steps))
        self.progress.advance(sum(steps[:done]))
        if done == n_blocks:
            return
        streams = self._enter(done) if done <= last else None
        plan = self.recipe.plan
        pruner = BlockPruner(
            self.skeleton,
            plan,
            self.patterns,
            self.binding.stored_dtypes(),
            seed=self.recipe.seed,
            length=self.windows.ids.shape[1] if self.windows is not None else 1,
            device=self.device,
            progress=self.progress,
        )
        for index, specs in enumerate(chosen[done:], done):
            block = self.binding.load_block(index, self.dtype, self.device)
            shard = _SHARD.format(index + 1, self._n_shards)
            hidden: list[dict[str, Any]] = []
            ahead = streams is not None and index < last
            entering = streams.turned(index) if streams is not None else None
            dense = entering.dense if ahead and entering is not None else None
            # Where the method runs the dense block anyway, the pruner writes what leaves it on its way.
            write_dense = dense is not None and bool(specs) and plan.aim != "own"
            if entering is not None and dense is not None and not write_dense:
                self._write_hidden(block, index, entering, dense)
            rows, orders = pruner.prune(block, index, specs, entering, write_dense=write_dense) if specs else ([], {})
            part = self.folder / _ORDERS.format(index)
            if orders:
                write_permutations(part, orders)
            found = {"file": part.name, "crc32": file_crc32(part)} if orders else None
            write_shard(self.folder / shard, self.binding.stored_form(index))
            if ahead and entering is not None and plan.inputs == "pruned":
                self._write_hidden(block, index, entering, entering.pruned)
            if ahead and entering is not None:
                written = [entering.pruned] if plan.inputs == "pruned" else []
                written += [dense] if dense is not None else []
                hidden = [files[1].record for files in written]
            self.binding.unload(block)
            return_freed_memory()
            self._commit_block(shard, rows, hidden, found)
            self.progress.advance()

    def _steps(self, chosen: list[list[LinearSpec]], last: int) -> list[int]:
        """Steps of each block: it is written; its linears are solved; windows run for statistics and for outputs."""
        n_windows = 0 if self.windows is None else self.windows.ids.shape[0]
        plan = self.recipe.plan
        # By group, nearly every architecture has four: before attention, its output, before the MLP, its output.
        passes = 4 if plan.order == "group" else 1
        streams = len(self._stream_names())
        # Dense outputs come out of the last of the passes, if there are any.
        along = int(plan.aim != "own")
        return [
            1
            + n_windows * (passes * bool(specs) + (streams - along * bool(specs)) * (index < last))
            + (len(specs) if n_windows else 0)
            for index, specs in enumerate(chosen)
        ]

    def _stream_names(self) -> list[tuple[str, str]]:
        """Files of hidden states: of the pruned model, and of the dense one where targets or inputs are dense."""
        plan = self.recipe.plan
        if plan.inputs == "dense":
            return [_DENSE]
        return [_PRUNED] if plan.aim == "own" else [_PRUNED, _DENSE]

    def _enter(self, done: int) -> Streams | None:
        if self.windows is None:
            return None
        ids = torch.from_numpy(self.windows.ids)
        names = self._stream_names()
        pairs = [(self.folder / first, self.folder / second) for first, second in names]
        calls, files = enter(self.binding, ids, pairs, self.dtype, self.device, resume=done > 0)
        return Streams(calls, files[0], files[-1] if names[-1] is _DENSE else None)

    def _write_hidden(self, block: Any, index: int, streams: Streams, files: tuple[HiddenFile, HiddenFile]) -> None:
        def windows() -> Iterator[torch.Tensor]:
            for hidden in files[0].windows(self.device):
                yield streams.calls.run(block, index, hidden)
                self.progress.advance()

        files[1].write(windows())

    # --- the rest of the checkpoint --------------------------------------------------------------------------------

    def _copy_groups(self) -> list[list[str]]:
        groups: list[list[str]] = []
        size = _COPY_BYTES
        for name in sorted(self.binding.stored_outside_blocks()):
            n_bytes = self.binding.reader.tensors[name].n_bytes
            if size + n_bytes > _COPY_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += n_bytes
        return groups

    def finish(self) -> None:
        """Write what is not in a block, the index, the configuration and the manifest."""
        reader, staging = self.binding.reader, self.folder
        shards = {
            block["file"]: {
                name: reader.tensors[name].n_bytes for name in self.binding.stored_in(self.skeleton.prefix(index))
            }
            for index, block in enumerate(self.state["blocks"])
        }
        for i, names in enumerate(self._copy_groups(), self.skeleton.n_blocks + 1):
            shard = _SHARD.format(i, self._n_shards)
            write_shard(staging / shard, self.binding.copies(names))
            shards[shard] = {name: reader.tensors[name].n_bytes for name in names}
        write_index(staging, shards)
        write_json(
            staging / "config.json",
            portable_config(self.skeleton.config, getattr(self.skeleton.text_config, "rope_parameters", None)),
        )
        copy_side_files(self.source.folder, staging)
        for name in (*_PRUNED, *_DENSE, *(path.name for path in staging.glob("*.tmp"))):
            (staging / name).unlink(missing_ok=True)
        self._join_orders()
        linears = [
            PrunedLinear(**{**row, "shape": tuple(row["shape"])})
            for block in self.state["blocks"]
            for row in block["linears"]
        ]
        body = self._manifest_body(linears)
        run = {
            "seconds": round(time.monotonic() - self.began[0], 3),
            "user_cpu_seconds": round(resource.getrusage(resource.RUSAGE_SELF).ru_utime - self.began[1], 3),
            "peak_memory_bytes": peak_memory_bytes(),
            "threads": torch.get_num_threads(),
            "blocks_resumed": self.n_resumed,
        }
        write_json(staging / manifest.RUN, run)
        manifest.write(staging, body)

    def _join_orders(self) -> None:
        """Put the orders of inputs that blocks left into ``sparsify.perm``, int32 [in] by linear name."""
        parts = [self.folder / _ORDERS.format(index) for index in ("residual", *range(self.skeleton.n_blocks))]
        parts = [path for path in parts if path.exists()]
        orders = {name: perm for path in parts for name, perm in read_permutations(path).items()}
        # Where it exists, an interrupted run has joined them all and may have removed some.
        if orders and not (self.folder / manifest.PERMUTATIONS).exists():
            write_permutations(self.folder / manifest.PERMUTATIONS, orders)
        for path in parts:
            path.unlink()

    def _manifest_body(self, linears: list[PrunedLinear]) -> dict[str, Any]:
        reader = self.binding.reader
        # Parameters, not stored tensors: checkpoints may hold buffers, and a tied weight twice.
        tied = self.binding.tied()
        total = sum(p.numel() for name, p in self.skeleton.model.named_parameters() if name not in tied)
        prunable = sum(spec.n_weights for block in self.skeleton.linears for spec in block)
        return {
            "kind": "checkpoint",
            "source": {
                "name": self.source.name,
                "origin": self.source.origin,
                "model_type": self.skeleton.config["model_type"],
                "files": {path.name: sha256_file(path) for path in reader.files},
            },
            "recipe": self.recipe.to_dict(),
            "calibration": self.windows.describe() if self.windows else None,
            "coverage": manifest.coverage(total, prunable, linears),
            "linears": manifest.linear_records(linears),
            "notices": self.skeleton.notices,
            "versions": manifest.versions("torch", "transformers", "safetensors"),
        }

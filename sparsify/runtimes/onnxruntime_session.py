"""An exported decoder in ONNX Runtime: ``model.onnx`` with flat key/value cache tensors, of either layout.

One code path serves CPU and GPU: inputs and outputs are bound, and the cache stays where it was computed. Graphs of
layout ``genai`` (com.microsoft's GroupQueryAttention) write each step into one buffer of full length; those of layout
``standard`` give a new cache each step, which becomes the next step's past.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import DataError, MissingExtraError
from sparsify.memory import return_freed_memory
from sparsify.runtimes.onnxruntime_cache import Cache, allocate, as_float32, bind
from sparsify.runtimes.onnxruntime_errors import run_error
from sparsify.runtimes.onnxruntime_graph import read_graph
from sparsify.runtimes.onnxruntime_interface import read_interface
from sparsify.runtimes.onnxruntime_providers import start
from sparsify.runtimes.onnxruntime_settings import CPU, TENSORRT, OrtSettings
from sparsify.runtimes.onnxruntime_source import open_source
from sparsify.runtimes.session import Stream, check_count, check_ids, check_mask, collect, positions


class OnnxRuntimeSession:
    """``model.onnx`` of an artifact folder as a Session (see ``sparsify.runtimes.session``).

    Args:
        path: artifact folder.
        settings: where and how it runs.

    Attributes:
        path: the ONNX file.
        vocab_size: logits of each token.
        n_layers: layers with a cache.
        context: longest sequence in tokens; None where no configuration beside the model says.
        pads_right_only: whether the graph computes left-padded rows wrongly; ``logits`` moves their tokens.
        notices: what runs elsewhere than asked, one line each; only with ``allow_fallback`` can there be any.

    Raises:
        MissingExtraError: onnxruntime or onnx is absent, or too old for this provider.
        UsageError: a setting is out of range; a provider is not in this build, does not start, or leaves operators to
            the CPU, and no fallback is allowed.
        ModelError: the file or its external data is missing, truncated, too new, not a decoder with a key/value
            cache, or another model's than the config.json beside it.
        OutputError: TensorRT's engine cache cannot be written.
        SparsifyError: not enough memory.
    """

    def __init__(self, path: Path, settings: OrtSettings | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError('onnxruntime is missing; pip install "sparsify-toolkit[onnx]"') from error
        settings = settings or OrtSettings()
        settings.check()
        self.path = path / "model.onnx"
        self._graph = read_graph(self.path)
        started = start(self._graph, open_source(self._graph, unpack=settings.unpack), settings)
        return_freed_memory()  # unpacking weights leaves several times their size in the heap
        self._session: Any = started.session
        self._providers, self._assigned, self.notices = started.providers, started.assigned, started.notices
        interface = read_interface(self.path, self._session)
        self.vocab_size, self.n_layers, self.context = interface.vocab_size, interface.n_layers, interface.context
        self._tensors, self._takes_positions = interface.cache, interface.takes_positions
        self._most = 2**31
        if TENSORRT in self._providers:
            self._most = settings.max_batch
            self.context = min(settings.max_length, self.context or settings.max_length)
        self._device = ("cpu", 0) if self._providers == (CPU,) else ("cuda", settings.device)
        self._run_options = onnxruntime.RunOptions()
        self._run_options.log_severity_level = 4
        self.pads_right_only = self._graph.grouped
        self.name = f"onnxruntime {' '.join(self._providers)}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._session = None

    def empty_past(self, batch: int, capacity: int | None = None) -> Cache:
        """A cache of no tokens for ``batch`` sequences.

        Args:
            batch: sequences.
            capacity: tokens it will hold at most; steps of layout ``genai`` then write into one buffer.

        Raises:
            SparsifyError: not enough memory.
        """
        capacity = capacity if self._graph.grouped else None
        try:
            values = allocate(self._tensors, batch, capacity, *self._device)
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise run_error(self.path, (batch, capacity or 0), error) from error
        return Cache(values, batch, 0, capacity)

    def run(
        self,
        ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        past: Cache,
    ) -> tuple[NDArray[np.float32], Cache]:
        """One step of the graph as it is: (logits [batch, sequence, vocab] float32, present cache).

        Args:
            ids: [batch, sequence] int64.
            attention_mask: [batch, past + sequence] int64.
            position_ids: [batch, sequence] int64; not used where the graph takes none.
            past: what ``empty_past`` or the step before gave; not to be used again.

        Raises:
            DataError: ids or mask of another type or shape than stated, ids outside the vocabulary, more tokens than
                the model or the cache has room for, or a mask that this graph would compute wrongly: layout ``genai``
                takes padding only on the right, and none before a cache.
            ModelError: ONNX Runtime failed.
            SparsifyError: not enough memory.
        """
        check_ids(ids, self.vocab_size)
        shape = (past.batch, past.length + ids.shape[1])
        if ids.shape[0] != past.batch or attention_mask.shape != shape or attention_mask.dtype != np.int64:
            raise DataError(
                f"attention mask: want int64 {list(shape)} for ids {list(ids.shape)}, "
                f"got {attention_mask.dtype} {list(attention_mask.shape)}"
            )
        if self._graph.grouped and (np.diff(attention_mask, axis=1) > 0).any():
            raise DataError(
                f"attention mask: {self.path} (layout genai) takes padding on the right only; "
                "move the tokens of each row to the left"
            )
        logits, present = self._step(ids, attention_mask, position_ids, past)
        return logits, present

    def logits(self, ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """See ``Session.logits``; the cache is not fetched, and in float32 the logits are not copied."""
        check_ids(ids, self.vocab_size)
        mask = check_mask(attention_mask, ids)
        order = None
        if self._graph.grouped and (np.diff(mask, axis=1) > 0).any():
            order = np.argsort(mask == 0, axis=1, kind="stable")
            ids, mask = np.take_along_axis(ids, order, axis=1), np.take_along_axis(mask, order, axis=1)
        values, _ = self._step(ids, mask, positions(mask), self.empty_past(ids.shape[0]), keep=False)
        if order is None:
            return values
        placed = np.empty_like(values)
        np.put_along_axis(placed, order[:, :, None], values, axis=1)
        return placed

    def stream(self, ids: NDArray[np.int64], n: int) -> Stream:
        """See ``Session.stream``.

        Raises:
            DataError: as there, or the model has not room for so many tokens.
        """
        check_ids(ids, self.vocab_size)
        check_count(n)
        batch, length = ids.shape
        self._check_room(batch, length + n - 1)
        past = self.empty_past(batch, length + n)
        mask = np.ones((batch, length + n), dtype=np.int64)
        places = positions(mask)
        start = 0
        if self._device[0] != "cpu" and length > 1:
            # The graph gives logits of every token; those of all but the last would cross the bus for nothing.
            start = length - 1
            _, past = self._step(ids[:, :start], mask[:, :start], places[:, :start], past, fetch=False)
        step = ids[:, start:]
        for i in range(n):
            stop = length + i
            logits, past = self._step(step, mask[:, :stop], places[:, start:stop], past)
            step = logits[:, -1].argmax(axis=-1)[:, None]
            start = stop
            yield step.tolist()

    def generate(self, ids: NDArray[np.int64], n: int) -> NDArray[np.int64]:
        """See ``Session.generate``; errors as ``stream``."""
        return collect(self.stream(ids, n), len(ids), n)

    def _check_room(self, batch: int, length: int) -> None:
        if self.context is not None and length > self.context:
            raise DataError(f"{self.path}: {length} tokens are more than the {self.context} the model takes")
        if batch > self._most:
            raise DataError(f"{self.path}: a batch of {batch} is more than the {self._most} its engines take")

    def _step(
        self,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        past: Cache,
        *,
        fetch: bool = True,
        keep: bool = True,
    ) -> tuple[NDArray[np.float32], Cache]:
        """One run: (logits, or nothing without ``fetch``; the cache, or ``past`` without ``keep``)."""
        length = past.length + ids.shape[1]
        self._check_room(past.batch, length)
        if past.capacity is not None and length > past.capacity:
            raise DataError(f"{self.path}: {length} tokens are more than the cache's {past.capacity}")
        device, device_id = self._device
        feeds = {"input_ids": ids, "attention_mask": mask}
        if self._takes_positions:
            feeds["position_ids"] = position_ids
        feeds = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        try:
            binding = self._session.io_binding()
            for name, array in feeds.items():
                binding.bind_cpu_input(name, array)
            if fetch:
                binding.bind_output("logits", "cpu")
            bind(binding, self._tensors, past, keep=keep, device=device, device_id=device_id)
            self._session.run_with_iobinding(binding, self._run_options)
            outputs = binding.get_outputs()
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise run_error(self.path, (past.batch, length), error) from error
        logits = as_float32(outputs[0]) if fetch else np.empty((past.batch, 0, self.vocab_size), np.float32)
        if not keep:
            return logits, past
        values = past.values if past.capacity is not None else tuple(outputs[int(fetch) :])
        return logits, Cache(values, past.batch, length, past.capacity)

    def engaged(self) -> dict[str, str]:
        """Per linear of the checkpoint what multiplies it, as far as it is known.

        ``dense`` where MatMul or Gemm does: ONNX Runtime has no kernel of these that skips zeros, on CPU or CUDA.
        Other operators by domain and name (``com.microsoft::MatMulNBits bits=8``). ``unknown (TensorRT EP)`` where
        TensorRT chose a tactic, which ONNX Runtime does not say. Linears that the graph fuses are listed one by one;
        an output layer that shares the embedding's weight goes by the name the graph has for it.
        """
        return self._graph.engaged(self._assigned, self._providers[0])

    def options(self) -> dict[str, dict[str, str]]:
        """Provider -> the options it runs with, as it reports them itself (strings; empty for the CPU)."""
        given = self._session.get_provider_options()
        return {name: dict(given.get(name, {})) for name in self._providers}
